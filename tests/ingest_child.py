"""Run one edge ingest in a process of its own, printing how many sequences are done: something to kill.

    python -m tests.ingest_child OPTIONS.json
"""

import json
import os
import sys
import time
from pathlib import Path

from featlas.ingest.effective import EdgeSettings, Positions
from featlas.ingest.pipeline import EdgeOptions, Progress, ingest_edges


def options_of(described: dict[str, object]) -> EdgeOptions:
    """The options from their JSON form."""
    settings = EdgeSettings(positions=Positions(described.pop("positions", "sum")), steps=int(str(described.pop("steps", 10))))
    return EdgeOptions(**{**described, "atlas": Path(str(described["atlas"])), "settings": settings})


if __name__ == "__main__":
    options = options_of(json.loads(Path(sys.argv[1]).read_text()))
    stop_after = int(os.environ.get("STOP_AFTER", "0"))
    reports = []

    def report(progress: Progress) -> None:
        """Say how far it is; after the given number of times, wait to be killed."""
        reports.append(progress)
        print(progress.done, flush=True)
        if len(reports) == stop_after:
            time.sleep(600)

    ingest_edges(options, progress=report)
    print("finished", flush=True)
