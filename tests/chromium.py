"""Where a Chromium is that playwright can drive: the system's, Google Chrome, or one that `playwright install chromium` made."""

import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MACOS = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_chromium(home: Path) -> str | None:
    """The path of the program, None when there is none; `home` is the user's home folder, where playwright keeps its own."""
    on_path = next((path for name in NAMES if (path := shutil.which(name))), None)
    if on_path:
        return on_path
    own = sorted((home / ".cache" / "ms-playwright").glob("chromium-*/chrome-linux*/chrome"))
    own += sorted((home / "Library" / "Caches" / "ms-playwright").glob("chromium-*/chrome-mac*/*.app/Contents/MacOS/*"))
    own += [MACOS] if MACOS.exists() else []
    return str(own[-1]) if own else None


CHROMIUM = find_chromium(Path.home())
