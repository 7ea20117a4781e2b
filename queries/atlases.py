"""Atlases as wholes: what one holds and how large it is, one brought into another, parts taken out and space given back.

An atlas is a folder (statistics, samples, manifests, dictionaries) with a graph, which is a file in it or on a server: `Place`.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from ..errors import FeatlasError, UserError
from .copying import AtlasesClash, Clashes, Selection, TypeCopied, copy_graph, refuse_clashes, select
from .copying_statistics import Wanted, copy_statistics
from .foreign import foreign_parts
from .pruning import (
    Going,
    circuits_of_blocks,
    delete_circuit,
    delete_nodes,
    delete_parcellation,
    delete_run,
    delete_statistics_run,
    needed_by_nothing_else,
    run_belongings,
)
from .samples import NoSamples
from .statistics import FILE_NAME, StatisticsStore, parts_folder
from .store import GraphStore, NotAGraph, ServerCredentials, is_server, open_graph

GRAPH_FILE = "graph.lbug"
UNITS = {"samples": "samples", "aligned": "aligned samples", "series": "series", "dictionaries": "dictionaries"}
"""Folders of an atlas whose sub-folders are each one whole, and what these are."""
MANIFESTS = "runs"

Report = Callable[[int, int, str], None]


class NothingToCopy(UserError):
    """The source is no atlas."""


class SamePlace(UserError):
    """Source and target are one."""


@dataclass(frozen=True)
class Place:
    """Where an atlas is. folder: None for a graph on a server by itself. graph: a server's URI; None for the embedded graph in the folder."""

    folder: Path | None
    graph: str | None = None
    credentials: ServerCredentials | None = field(default=None, repr=False)

    @staticmethod
    def of(name: str, graph: str | None = None, credentials: ServerCredentials | None = None) -> "Place":
        """The place of a folder's name, whose graph may be on a server, or of a server's address alone."""
        return Place(None, name, credentials) if is_server(name) else Place(Path(name), graph, credentials)

    def __str__(self) -> str:
        return " with ".join(str(part) for part in (self.folder, self.graph) if part is not None)

    def open(self, *, write: bool) -> GraphStore:
        """The graph; a folder that is to hold it is made. Raises what `open_graph` does."""
        if self.graph is None and self.folder is not None and not write and not (self.folder / GRAPH_FILE).exists():
            raise NotAGraph(f"no graph in {self.folder}: name an atlas' folder, or its server's address")
        if self.graph is None and self.folder is not None and write:
            self.folder.mkdir(parents=True, exist_ok=True)
        return open_graph(self.graph or self.folder or "", credentials=self.credentials, read_only=not write)

    @property
    def statistics(self) -> Path | None:
        """The folder of the statistics, where there are any."""
        return self.folder if self.folder is not None and (self.folder / FILE_NAME).exists() else None


# -- copying -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtlasCopied:
    """What a copy came to. files: units of files (samples, manifests, …) written and there already, by kind: `what, n, written, megabytes`.

    foreign: what the source's graph has that is no atlas' own and is not copied (`foreign_parts`).
    """

    graph: list[TypeCopied]
    statistics: list[TypeCopied]
    files: pl.DataFrame
    runs: tuple[str, ...]
    foreign: tuple[str, ...] = ()


def copy_atlas(
    source: Place, target: Place, *, runs: Sequence[str] | None = None, clashes: Clashes = Clashes.REFUSE, report: Report | None = None
) -> AtlasCopied:
    """Bring an atlas, or some runs of it (by the beginnings of their keys), into another, which may hold others already; verified at the end.

    While it is read, nobody else may write to an embedded source; that of a server may grow, and what came in meanwhile is for another copy. It may
    be killed at any moment and the same call goes on: graphs resume at the sequences that are missing, statistics and folders appear whole.
    Raises `AtlasesClash`, `UnknownRun`, `CopyDiffers`, and what opening either raises.
    """
    _refuse_same(source, target)
    one_folder = target.folder is not None and source.folder is not None and source.folder.resolve() == target.folder.resolve()
    # For writing: an embedded graph that someone else writes to is refused, and a log that a killed process left is brought in.
    with source.open(write=source.graph is None and (source.folder is None or (source.folder / GRAPH_FILE).exists())) as graph:
        keys = None if runs is None else find_runs(graph, runs)
        selection = select(graph, keys)
        with target.open(write=True) as into:
            if target.folder is not None:  # after that: a server that cannot be reached leaves no empty one
                target.folder.mkdir(parents=True, exist_ok=True)
            if clashes is Clashes.REFUSE:
                refuse_clashes(graph, into, selection)
            statistics: list[TypeCopied] = []
            wanted = None if keys is None else Wanted(keys, _statistics_runs(graph, selection), selection.nodes["Feature"])
            if source.statistics is not None and target.folder is not None and not one_folder:
                statistics = copy_statistics(source.statistics, target.folder, wanted=wanted, clashes=clashes)
            files = _no_files()
            if source.folder is not None and target.folder is not None and not one_folder:
                parts = [path for path in unfinished_parts(source.folder, target.folder) if wanted is None or path.name in wanted.statistics_runs]
                files = copy_files(source.folder, target.folder, runs=keys, parts=parts, clashes=clashes)
            copied = copy_graph(graph, into, selection=selection, clashes=clashes, report=report)
        foreign = tuple(foreign_parts(graph))
    return AtlasCopied(copied, statistics, files, tuple(keys or ()), foreign)


def _refuse_same(source: Place, target: Place) -> None:
    folders = [place.folder.resolve() if place.folder is not None else None for place in (source, target)]
    if source.graph == target.graph and folders[0] == folders[1]:
        raise SamePlace(f"{source} is both source and target: name another target")
    if source.graph is not None and source.graph == target.graph and _database(source) == _database(target):
        raise SamePlace(f"the graph at {source.graph} is both source and target: name another server or another of its databases")
    if source.graph is None and source.folder is not None and not (source.folder / GRAPH_FILE).exists():
        raise NothingToCopy(f"no graph in {source.folder}: name an atlas' folder, a server's address, or the folder's server by --from-graph")


def _database(place: Place) -> str | None:
    return (place.credentials or ServerCredentials.from_environment()).database


def find_runs(store: GraphStore, names: Sequence[str]) -> tuple[str, ...]:
    """The whole keys of runs by their beginnings. Raises `subgraphs.UnknownRun`."""
    from .subgraphs import find_run

    return tuple(dict.fromkeys(find_run(store, name).key for name in names))


def _statistics_runs(store: GraphStore, selection: Selection) -> list[str]:
    """The statistics runs that some runs' features take their numbers from, and those that their baselines are of."""
    if selection.runs is None:
        return []
    rows = store.query("MATCH (f:Feature) WHERE f.statistics_run IS NOT NULL RETURN f.key AS key, f.statistics_run AS run")
    named = rows.filter(pl.col("key").is_in(selection.nodes["Feature"].implode()))["run"].unique().to_list() if rows.height else []
    settings = store.query("MATCH (r:Run) WHERE r.key IN $runs RETURN r.settings AS settings", {"runs": list(selection.runs)})["settings"].to_list()
    of_baselines = [json.loads(text).get("statistics_run") for text in settings if text]
    return sorted({*named, *(run for run in of_baselines if run)})


# -- files ---------------------------------------------------------------------------------------------------


def _no_files() -> pl.DataFrame:
    return pl.DataFrame(schema={"what": pl.String, "n": pl.Int64, "written": pl.Int64, "megabytes": pl.Float64})


def unfinished_parts(source: Path, target: Path) -> list[Path]:
    """The folders in which an atlas keeps what statistics runs need to go on, and their finished shards; not of runs that either has finished."""
    done: set[str] = set()
    for folder in (source, target):
        if (folder / FILE_NAME).exists():
            with StatisticsStore(folder, read_only=True) as statistics:
                done |= set(statistics.query("SELECT run FROM runs WHERE status = 'done'")["run"].cast(pl.String))
    return [path for path in _visible(parts_folder(source, "")) if path.is_dir() and path.name not in done]


def copy_files(source: Path, target: Path, *, runs: Sequence[str] | None, parts: Sequence[Path] = (), clashes: Clashes) -> pl.DataFrame:
    """Bring samples, aligned samples, series, dictionaries and manifests into another atlas, each whole or not at all: `what, n, written, megabytes`.

    Of some runs only their manifests go. parts: those of `unfinished_parts` that go. Raises `AtlasesClash` where a unit has other files there.
    """
    rows = []
    for folder, what in UNITS.items() if runs is None else ():
        rows.append(_copy_units(what, [path for path in _visible(source / folder) if path.is_dir()], target / folder, clashes))
    if parts:
        rows.append(_copy_units("unfinished statistics", parts, parts_folder(target, parts[0].name).parent, clashes))
    manifests = [path for path in _visible(source / MANIFESTS) if path.is_file() and (runs is None or path.stem in runs)]
    rows.append(_copy_units("manifests", manifests, target / MANIFESTS, clashes))
    return pl.DataFrame(rows, schema=_no_files().schema, orient="row").filter(pl.col("n") > 0)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _copy_units(what: str, units: Sequence[Path], target: Path, clashes: Clashes) -> tuple[str, int, int, float]:
    written = 0
    for unit in units:
        there = target / unit.name
        if there.exists():
            if what == "manifests" or clashes is Clashes.KEEP or contents_hash(unit) == contents_hash(there):
                continue  # of a run that both have, the target's own manifest says how it was made there
            if clashes is Clashes.REFUSE:
                raise AtlasesClash(what, 1, [f"{unit.name} has other files in {target}"])
        _put(unit, there)
        written += 1
    n_bytes = sum(path.stat().st_size for unit in units for path in _files(unit))
    return what, len(units), written, n_bytes / 2**20


def _files(unit: Path) -> list[Path]:
    return sorted(path for path in unit.rglob("*") if path.is_file()) if unit.is_dir() else [unit]


def contents_hash(unit: Path) -> str:
    """A hash of the names and contents of a unit's files."""
    total = hashlib.sha256()
    for path in _files(unit):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(unit)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _put(unit: Path, there: Path) -> None:
    """Copy a unit under a hidden name, then give it its own."""
    there.parent.mkdir(parents=True, exist_ok=True)
    hidden = there.parent / f".{there.name}.{uuid.uuid4().hex[:12]}"
    try:
        shutil.copytree(unit, hidden) if unit.is_dir() else shutil.copy2(unit, hidden)
        if contents_hash(hidden) != contents_hash(unit) and unit.is_dir():
            raise FeatlasError(f"{unit} changed while it was copied: repeat the command")
        if there.is_dir():
            shutil.rmtree(there)
        hidden.replace(there)
    finally:
        shutil.rmtree(hidden, ignore_errors=True) if hidden.is_dir() else hidden.unlink(missing_ok=True)


# -- pruning -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prunable:
    """What is to go, by whole keys."""

    runs: tuple[str, ...] = ()
    circuits: tuple[str, ...] = ()
    parcellations: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing is."""
        return not (self.runs or self.circuits or self.parcellations or self.statistics or self.samples)

    @property
    def going(self) -> Going:
        """What of it is in the graph."""
        return Going(self.runs, self.circuits, self.parcellations, self.statistics)


def doomed(store: GraphStore, statistics: StatisticsStore | None, atlas: Path, chosen: Prunable) -> pl.DataFrame:
    """What would go with what is chosen: `of` (what was chosen), `what`, `n`; of samples `n` are bytes."""
    rows: list[tuple[str, str, int]] = []
    for run in chosen.runs:
        rows += [(f"run {run}", one.what, one.n) for one in run_belongings(store, statistics, run)]
        if (atlas / MANIFESTS / f"{run}.json").exists():
            rows.append((f"run {run}", "manifest", 1))
    for circuit in chosen.circuits:
        row = store.query("MATCH (c:Circuit) WHERE c.key = $key RETURN c.n_nodes AS nodes, c.n_edges AS edges", {"key": circuit})
        rows += [(f"circuit {circuit}", name, int(row[name][0] or 0)) for name in ("nodes", "edges")]
    for key in chosen.parcellations:
        n = int(store.query("MATCH (b:Block) WHERE b.parcellation = $key RETURN count(*) AS n", {"key": key})["n"][0])
        rows.append((f"parcellation {key}", "blocks", n))
        rows += [(f"parcellation {key}", "circuits of blocks", n) for n in [len(circuits_of_blocks(store, key))] if n]
    for key in chosen.statistics:
        n = 0 if statistics is None else int(statistics._fetch("SELECT count(*) FROM feature_statistics WHERE run = ?", [key])[0][0])
        rows.append((f"statistics run {key}", "features", n))
    for key in chosen.samples:
        rows.append((f"samples {key}", "bytes", sum(path.stat().st_size for path in _files(atlas / "samples" / key))))
    rows += [(NEEDED_BY_NOTHING_ELSE, f"{label} nodes", len(keys)) for label, keys in _nodes_of(store, statistics, chosen).items() if len(keys)]
    return pl.DataFrame(rows, schema={"of": pl.String, "what": pl.String, "n": pl.Int64}, orient="row")


NEEDED_BY_NOTHING_ELSE = "nothing else needs"


def _nodes_of(store: GraphStore, statistics: StatisticsStore | None, chosen: Prunable) -> dict[str, pl.Series]:
    return needed_by_nothing_else(store, statistics, chosen.going)


def prune_atlas(store: GraphStore, statistics: StatisticsStore | None, atlas: Path, chosen: Prunable, report: Report | None = None) -> dict[str, int]:
    """Take what is chosen out of an atlas, and the features, sequences and models that only it used; how many of these. May be repeated.

    While another run is unfinished no such node goes: it may be one that this run has planned. Space is given back by
    `compaction` afterwards; a server uses it again for what comes.
    """
    nodes = _nodes_of(store, statistics, chosen)
    for circuit in chosen.circuits:
        delete_circuit(store, statistics, circuit)
    for key in chosen.parcellations:
        delete_parcellation(store, statistics, key)
    for run in chosen.runs:
        delete_run(store, statistics, run, report)
        (atlas / MANIFESTS / f"{run}.json").unlink(missing_ok=True)
    for key in chosen.statistics:
        if statistics is not None:
            delete_statistics_run(store, statistics, key)
    for key in chosen.samples:
        delete_samples(atlas, key)
    return {label: delete_nodes(store, label, keys) for label, keys in nodes.items()} if chosen.runs else {}


def delete_samples(atlas: Path, key: str) -> None:
    """Delete a run of samples: from one moment to the next it is no run any more. Raises `NoSamples`."""
    folder = atlas / "samples" / key
    if not folder.is_dir():
        raise NoSamples(f"no samples {key!r} in {atlas}: `featlas atlas info` lists them")
    hidden = folder.with_name(f".{key}.{uuid.uuid4().hex[:12]}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


_HALF_UNIT = re.compile(r"\..+\.[0-9a-f]{12}", re.DOTALL)
_HALF_DATABASE = re.compile(rf"\.compacting-({Path(GRAPH_FILE).stem}|{Path(FILE_NAME).stem})-[0-9]+")  # `compaction` makes them


def abandoned(atlas: Path) -> Iterator[Path]:
    """Hidden folders that killed processes left, told by the names that are given to them here: all others are their users' own (.git, .venv)."""
    for folder, name in ((atlas, _HALF_DATABASE), *((atlas / unit, _HALF_UNIT) for unit in UNITS)):
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink())
