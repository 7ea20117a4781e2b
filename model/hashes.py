"""Hashes of files, remembered: hundreds of gigabytes of weights are read once for their hash, not at every start.

What is remembered is in featlas's cache, by a file's place, size and time of change; a file changed moments ago is not yet trusted to stay.
Where the cache cannot be written, nothing is remembered.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

WORTH_IT = 64 * 2**20
"""Files of fewer bytes together are hashed in no time."""

_SETTLED = 5.0
"""Seconds after which a file that did not change is taken to be written."""


def remembered(files: Sequence[Path], compute: Callable[[], str], cache: Path, kind: str) -> str:
    """compute(), or what it gave when these very files were last asked about; `kind` names what is computed."""
    state = [(str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    if sum(size for _, size, _ in state) < WORTH_IT or any(time.time() - changed / 1e9 < _SETTLED for _, _, changed in state):
        return compute()
    name = hashlib.sha256(json.dumps([kind, [path for path, _, _ in state]]).encode()).hexdigest()[:32]
    entry = cache / "hashes" / f"{name}.json"
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["files"] == [list(one) for one in state]:
            return str(known["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never asked, or not to be read: it is computed
    computed = compute()
    _write(entry, json.dumps({"files": state, "hash": computed}))
    return computed


def _write(entry: Path, text: str) -> None:
    """Written beside its place and renamed into it: of two processes at once, one's whole entry stays."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".partial-", dir=entry.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(entry)
    except OSError:
        return  # a cache is a convenience
