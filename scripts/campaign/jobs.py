"""What is killed: commands on a tiny model, whose results are known from an uninterrupted run."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from featlas.files import ABANDONED_SECONDS
from featlas.queries.belongings import TIMES
from featlas.queries.checking import graph_difference, statistics_difference
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, ServerCredentials, open_graph

from tests.micro import save_tiny_with_corpus

Command = Sequence[object]

N_PAIRS = 60
# in which two undisturbed runs differ too: how many seconds a partition took
SECONDS = ("Partition.notes", "site_partitions.notes")


@dataclass(frozen=True)
class Workload:
    """The tiny model, its text and its pairs."""

    folder: Path

    @property
    def model(self) -> Command:
        return ("--model", self.folder / "model", "--dictionaries", "identity")

    def edges(self) -> list[Command]:
        asked = ("--task", self.folder / "pairs.jsonl", "--limit", N_PAIRS, "--steps", 2, "--batch-size", 2)
        return [("ingest", "edges", *self.model, "--sites", "resid_0,resid_2", *asked)]

    def statistics(self) -> list[Command]:
        asked = ("--corpus", self.folder / "corpus.txt", "--length", 40, "--batch-size", 2)
        return [("ingest", "statistics", *self.model, "--sites", "resid_0,resid_1,resid_2", *asked)]

    def samples(self) -> list[Command]:
        return [("ingest", "samples", *self.model, "--sites", "resid_0,resid_2", "--corpus", self.folder / "corpus.txt", "--length", 40)]

    def writeback(self) -> list[Command]:
        """Every command here writes into the graph, most of them into the statistics store too."""
        tested = ("--split", "halves", "--ablation", "edge", "--controls", "random-edges", "--control-draws", 1)
        regions = ("--min-count", 1, "--min-sequences", 1, "--method", "ward", "--level", 3, "--nulls", 0)
        return [
            ("analyze", "circuit", "--edges", 40, "--write"),
            ("analyze", "faithfulness", "--sizes", "5,20", *tested),
            ("ingest", "correlations", "--max-edges", 60),
            ("analyze", "rois", *regions),
            ("labels", "auto"),
            ("analyze", "effects", "--edges", 6, "--split", "halves"),
        ]


def workload(folder: Path) -> Workload:
    """Make the model, the text and the pairs."""
    save_tiny_with_corpus(folder, words=8_000)
    words = [(f"w{7 + i % 30}", f"w{(11 * i) % 40}", f"w{(3 * i + i // 30) % 40}") for i in range(N_PAIRS)]
    pairs = [{"clean": f"w1 {a} {b} {c} w2", "corrupt": f"w1 w9 {b} {c} w2" if a != "w9" else f"w1 w8 {b} {c} w2"} for a, b, c in words]
    lines = [json.dumps({**pair, "answer": " w5", "wrong_answer": " w6"}) for pair in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Workload(folder)


@dataclass(frozen=True)
class Place:
    """Where an atlas is: its folder, and the server that holds its graph, if one does."""

    atlas: Path
    uri: str | None = None
    username: str | None = None
    password: str | None = None

    @property
    def options(self) -> Command:
        return ("--atlas", self.atlas, *(("--graph", self.uri) if self.uri else ()))

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.uri is None else {"NEO4J_USERNAME": self.username or "", "NEO4J_PASSWORD": self.password or ""}

    @contextmanager
    def graph(self) -> Iterator[GraphStore]:
        credentials = ServerCredentials(self.username, self.password) if self.uri else None
        with open_graph(self.uri or self.atlas, credentials=credentials, read_only=True) as store:
            yield store


def differences(whole: Path, place: Place, *, graph: bool = True) -> list[str]:
    """How an atlas differs from that of an uninterrupted run, a line each; times are left out, and what is a file of no reader."""
    found = []
    if graph:
        with open_graph(whole, read_only=True) as expected, place.graph() as store:
            found += [f"graph: {row}" for row in graph_difference(expected, store, ignoring=SECONDS).head(10).iter_rows()]
    if (whole / "statistics.duckdb").exists():
        with StatisticsStore(whole, read_only=True) as expected, StatisticsStore(place.atlas, read_only=True) as store:
            found += [f"statistics: {row}" for row in statistics_difference(expected, store, ignoring=(*TIMES, *SECONDS)).head(10).iter_rows()]
    for path in sorted(place.atlas.rglob("*")):
        # The hidden part of a file that a kill cut off is nobody's: it goes an hour later, when that file is written again (`files.whole`).
        hidden = path.name.startswith(".") and time.time() - path.stat().st_mtime < ABANDONED_SECONDS
        if (path.name.endswith(".part") and not hidden) or path.parent.name.endswith(".parts"):
            found.append(f"left behind: {path.relative_to(place.atlas)}")
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found.append(f"torn: {path.relative_to(place.atlas)}")
    wanted, there = ({path.relative_to(atlas) for atlas_path in ("runs", "samples") for path in (atlas / atlas_path).rglob("*.json")}
                     for atlas in (whole, place.atlas))  # fmt: skip
    return found + [f"files differ: {path}" for path in sorted(wanted ^ there)]


def copied(atlas: Path, to: Path) -> Path:
    """A copy of an atlas in place of what was there."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(atlas, to)) if atlas.exists() else to
