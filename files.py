"""Files that appear whole or not at all, and what is said when a disk is full.

A process may be killed, and a disk may fill up, at any moment of a write. So a file is written beside its place under a hidden name, brought
onto the disk, and only then takes its name: whoever reads it sees the old one or the new one, never a part.
"""

import errno
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import FeatlasError

ABANDONED_SECONDS = 3600.0
"""After so long a hidden part is of a killed process, and goes when its file is written next."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_SAID = ("no space left on device", "os error 28", "disk quota exceeded")


class DiskFull(FeatlasError):
    """A disk has no room for what was to be written."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(f"{_described(path)}: what was committed before is safe; make room there, then give the same command again")


def _described(path: Path | None) -> str:
    if path is None:
        return "a disk is full"
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    disk = place
    while not os.path.ismount(disk) and disk != disk.parent:
        disk = disk.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return f"the disk of {path} is full"
    return f"the disk of {path} is full ({disk} has {_size(usage.free)} of {_size(usage.total)} left)"


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that a disk is full; libraries say it in words."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, FeatlasError) and any(said in str(error).lower() for said in _SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn what is raised in the block into `DiskFull`, naming `path`, where it says that a disk is full."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if is_full(error):
            raise DiskFull(path) from error
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a hidden path beside `path` to write a file to, which takes that name when the block ends well, and goes when it does not.

    A link is followed, and a file that is there keeps its permissions. What is no plain file (a pipe, /dev/stdout) and what stands in a folder
    that cannot be written is given itself. Raises `DiskFull`, and the file system's own errors.
    """
    target = path.resolve()
    if (target.exists() and not target.is_file()) or (target.parent.is_dir() and not os.access(target.parent, os.W_OK)):
        with on_disk(path):
            yield target
        return
    _sweep(target)
    part = target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex[:8]}.part")  # within the 255 bytes that a name may have
    try:
        with on_disk(path):
            yield part
            _sync(part)
            if target.exists():
                part.chmod(stat.S_IMODE(target.stat().st_mode))
            part.replace(target)
            _sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, onto the disk: a name must not outlive a power cut that its content does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove the parts of this file that killed processes left."""
    with suppress(OSError):
        for left in target.parent.glob(f".{_plain(target.name[:40])}.????????.part"):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink(missing_ok=True)


def _plain(name: str) -> str:
    """A name in which no character is a pattern's."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as given) whole or not at all; raises as `whole`."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that number; another user's too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def scratch_folder(parent: Path) -> Path:
    """A new folder in `parent` for this process alone, named after it; those of processes of this machine that are gone are removed."""
    own = f"{socket.gethostname()}-"
    with on_disk(parent):
        parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_plain(own)}*"):
        pid = left.name.removeprefix(own).partition("-")[0]
        if pid.isdecimal() and not is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{own}{os.getpid()}-", dir=parent))
