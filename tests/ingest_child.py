"""Run one edge ingest in a process of its own, printing how many sequences are done: something to kill.

    python -m tests.ingest_child OPTIONS.json
"""

import json
import sys
from pathlib import Path

from featlas.ingest.effective import EdgeSettings, Positions
from featlas.ingest.pipeline import EdgeOptions, ingest_edges


def options_of(described: dict[str, object]) -> EdgeOptions:
    """The options from their JSON form."""
    settings = EdgeSettings(positions=Positions(described.pop("positions", "sum")))
    return EdgeOptions(**{**described, "atlas": Path(str(described["atlas"])), "settings": settings})


if __name__ == "__main__":
    options = options_of(json.loads(Path(sys.argv[1]).read_text()))
    ingest_edges(options, progress=lambda p: print(p.done, flush=True))
    print("finished", flush=True)
