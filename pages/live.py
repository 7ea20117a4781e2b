"""The page of `featlas serve`: that of the report, with its scripts apart and what is only alive added to it."""

import hashlib
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from string import Template

_FOLDER = Path(__file__).parent
BEFORE = ("vendor/cytoscape.min.js", "page.js", "graph.js")
AFTER = ("vendor/codemirror.min.js", "cypher.js")
_ALIVE = "window.featlasServer = { alive: true };\n"
# The token is in the address that was opened: it goes out of the address bar, and with it out of the history, once the cookie is set.
_FORGET = """(() => {
  const address = new URL(location.href);
  if (!address.searchParams.has("token")) return;
  address.searchParams.delete("token");
  history.replaceState(null, "", address.pathname + address.search + address.hash);
})();
"""


@cache
def scripts() -> Mapping[str, str]:
    """The page's scripts by name, in the order that they run in."""
    from ..analysis.plots import plotly_script

    own = sorted(file.name for file in _FOLDER.glob("*.js") if file.name not in (*BEFORE, *AFTER))
    read = {Path(name).name: (_FOLDER / name).read_text(encoding="utf-8") for name in (*BEFORE, *own, *AFTER)}
    return {"alive.js": _FORGET + _ALIVE, "plotly.min.js": plotly_script(), **read, "start.js": "window.featlas.start();\n"}


@cache
def live_page(title: str = "featlas") -> str:
    """The page's HTML: no script stands in it, each is asked for by name and by what it holds."""
    template = Template((_FOLDER / "page.html").read_text(encoding="utf-8"))
    style = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "cypher.css"))
    tags = "\n".join(f'<script src="scripts/{name}?v={_mark(text)}"></script>' for name, text in scripts().items())
    return template.substitute(policy="", title=escape(title), style=style, data="", scripts=tags)


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
