"""What a check found, mended where it can be derived again from what is certain; nothing that was measured is ever changed or made up.

Edges of a sequence whose mark is missing count as not measured: the mark is what commits a sequence, and what goes on measures it again.
"""

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import polars as pl

from ..files import is_alive
from .belongings import BELONGINGS
from .copying import derive_influences
from .integrity import ROOTS, Checked, Finding, Repair, leftovers, statistics_copies, unlike_labels, unmarked_edges
from .labels import apply_labels
from .pruning import EDGES_PER_DELETION, delete_circuit, delete_edges, delete_unused
from .runs import DONE, aggregate, done_sequences, record_counts
from .samples import ABANDONED_SECONDS
from .statistics import StatisticsStore
from .store import GraphStore, KeyRange
from .streaming import edge_blocks, node_keys


def repair_atlas(store: GraphStore, statistics: StatisticsStore | None, folder: Path | None, findings: Collection[Finding]) -> dict[Repair, int]:
    """Mend what the findings say can be mended; how many things of each kind were written or removed. Both stores must be open for writing."""
    wanted = {one.repair for one in findings if one.repair is not None}
    atlas = Checked(store, statistics, folder)
    return {one: mend(atlas) for one, mend in _MENDS.items() if one in wanted}


def _closed_runs(store: GraphStore) -> list[str]:
    return list(store.query("MATCH (r:Run) WHERE r.status = $done RETURN r.key AS key", {"done": DONE})["key"].cast(pl.String))


def _influences(atlas: Checked) -> int:
    """Derive the aggregated edges of every closed run, and take away those of edges that are not there.

    Not of a run that lacks edges which its marks promise: its aggregated ones are the last that is known of them.
    """
    n = 0
    for run in _closed_runs(atlas.store):
        if not done_sequences(atlas.store, run) or _lacks_edges(atlas.store, run):  # an imported graph's aggregated edges are its own
            continue
        n += derive_influences(atlas.store, run)
        n_done = len(done_sequences(atlas.store, run))
        for (own,) in edge_blocks("INFLUENCES", atlas.store, run=run, size=20_000):
            ends = ["source", "target"]
            low, high = own["source"].min(), own["source"].max()
            edges = atlas.store.read_edges("ATTRIBUTES", run=run, sources=KeyRange(str(low), str(high)))
            extra = own.select(ends).join(aggregate(edges, n_done).select(ends), on=ends, how="anti")
            for part in extra.iter_slices(5000):
                text = (
                    "UNWIND $rows AS row MATCH (a:Feature {key: row.source})-[e:INFLUENCES]->(b:Feature {key: row.target})"
                    " WHERE e.run = $run DELETE e"
                )
                atlas.store.query(text, {"rows": part.to_dicts(), "run": run}, write=True)
                n += part.height
    return n


def _lacks_edges(store: GraphStore, run: str) -> bool:
    """Whether a sequence of a run has fewer edges than its mark says."""
    marks = store.query(
        "MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run AND m.n_edges > 0 RETURN s.key AS key, m.n_edges AS n", {"run": run}
    )
    counts = dict(store.query(
        "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.run = $run RETURN e.sequence AS key, count(*) AS n", {"run": run}
    ).iter_rows())  # fmt: skip
    return any(counts.get(key, 0) < n for key, n in marks.iter_rows())


def _unmarked(atlas: Checked) -> int:
    """Take away the edges of sequences without a mark, a bounded number in a transaction, so that the run can go on.

    A mark that is committed meanwhile, with edges of its own, keeps what is there.
    """
    rows, text = unmarked_edges(atlas.store), (
        "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.run = $run AND e.sequence IN $sequences"
        " AND NOT EXISTS { MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence) WHERE r.key = e.run AND s.key = e.sequence }"
        f" WITH e LIMIT {EDGES_PER_DELETION} DELETE e"
    )  # fmt: skip
    for (run,), own in rows.partition_by("run", as_dict=True).items():
        for _ in range(-(-int(own["n"].sum()) // EDGES_PER_DELETION)):
            atlas.store.query(text, {"run": run, "sequences": own["sequence"].to_list()}, write=True)
    return int(rows["n"].sum())


def _run_counts(atlas: Checked) -> int:
    runs = _closed_runs(atlas.store)
    for run in runs:
        record_counts(atlas.store, run, n_sequences=len(done_sequences(atlas.store, run)))
    return len(runs)


def _circuit_counts(atlas: Checked) -> int:
    keys = node_keys(atlas.store, "Circuit").to_frame("key")
    counted = keys
    for name, text in (
        ("n_nodes", "MATCH (n)-[:IN_CIRCUIT]->(c:Circuit) RETURN c.key AS key, count(*) AS n_nodes"),
        ("n_edges", "MATCH ()-[e:CIRCUIT_EDGE]->() RETURN e.circuit AS key, count(*) AS n_edges"),
    ):
        rows = atlas.store.query(text)
        rows = rows.cast({"key": pl.String, name: pl.Int64}) if rows.height else pl.DataFrame(schema={"key": pl.String, name: pl.Int64})
        counted = counted.join(rows, on="key", how="left").with_columns(pl.col(name).fill_null(0))
    atlas.store.merge_nodes("Circuit", counted)
    return counted.height


def _statistics(atlas: Checked) -> int:
    """Frequencies as they were measured; those of a statistics run that is not there are taken away."""
    assert atlas.statistics is not None
    n = 0
    for _, expected in statistics_copies(atlas.store, atlas.statistics):
        atlas.store.merge_nodes("Feature", expected)
        n += expected.height
    known = atlas.statistics.query("SELECT run FROM runs")["run"].to_list()
    rows = atlas.store.query("MATCH (f:Feature) WHERE f.statistics_run IS NOT NULL RETURN f.key AS key, f.statistics_run AS run")
    lost = rows.filter(~pl.col("run").is_in(known))["key"].to_list() if rows.height else []
    if lost:
        empty = {"frequency": pl.Float64, "mean_activation": pl.Float64, "statistics_run": pl.String}
        nothing = pl.DataFrame({"key": lost}).with_columns(pl.lit(None, dtype=dtype).alias(name) for name, dtype in empty.items())
        atlas.store.merge_nodes("Feature", nothing)
    return n + len(lost)


def _labels(atlas: Checked) -> int:
    assert atlas.statistics is not None
    return apply_labels(atlas.store, atlas.statistics, unlike_labels(atlas.store, atlas.statistics)["key"].to_list())


def _orphans(atlas: Checked) -> int:
    """Edges of runs and circuits that are not there, circuits of such runs, scores of nothing: what names is read before what it may name."""
    store, n = atlas.store, 0
    for type in ("ATTRIBUTES", "INFLUENCES"):
        named = _values(store, f"MATCH (:Feature)-[e:{type}]->(:Feature) RETURN DISTINCT e.run AS key")
        runs = set(node_keys(store, "Run"))
        for run in named:
            if run not in runs:
                delete_edges(store, type, run, lambda done, total, detail: None, orphans=True)
                n += 1
    of_runs = store.query("MATCH (c:Circuit) WHERE c.run IS NOT NULL RETURN c.key AS key, c.run AS run").rows()
    runs = set(node_keys(store, "Run"))
    for circuit, run in of_runs:
        if run not in runs:
            delete_circuit(store, atlas.statistics, circuit)
            n += 1
    named = _values(store, "MATCH ()-[e:CIRCUIT_EDGE]->() RETURN DISTINCT e.circuit AS key")
    circuits = set(node_keys(store, "Circuit"))
    for circuit in named:
        if circuit not in circuits:
            delete_circuit(store, atlas.statistics, circuit)
            n += 1
    lost = _values(store, "MATCH (s:Score) WHERE NOT EXISTS { MATCH (s)<-[:SCORED]-() } RETURN s.key AS key")
    if lost:
        store.query("UNWIND $keys AS wanted MATCH (s:Score {key: wanted}) WHERE NOT EXISTS { MATCH (s)--() } DELETE s", {"keys": lost}, write=True)
    return n + len(lost)


def _values(store: GraphStore, text: str) -> list[str]:
    return list(store.query(text)["key"].cast(pl.String))


def _unused(atlas: Checked) -> int:
    return sum(delete_unused(atlas.store, bare=True).values())


def _tables(atlas: Checked) -> int:
    """Rows of statistics runs, parcellations, matchings and comparisons that are not there."""
    statistics, n = atlas.statistics, 0
    assert statistics is not None
    with statistics.transaction():
        for one in BELONGINGS.values():
            if one.owner not in ROOTS or one.table in (ROOTS[one.owner][0], "block_labels"):
                continue
            root, column = ROOTS[one.owner]
            n += int(statistics._fetch(f"DELETE FROM {one.table} WHERE {column} NOT IN (SELECT {column} FROM {root})")[0][0])
    return n


def _leftovers(atlas: Checked) -> int:
    """What was written to last an hour ago or earlier: a process may be at work in the others."""
    assert atlas.folder is not None
    n = 0
    for path in leftovers(atlas.folder, atlas.statistics):
        pid = path.name.rpartition("-")[2] if path.parent == atlas.folder else ""
        if pid.isdecimal() and is_alive(int(pid)):  # a large file is compared for long without being written to
            continue
        if time.time() - max(part.stat().st_mtime for part in (path, *path.rglob("*"))) > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
            n += not path.exists()
    return n


_MENDS: Mapping[Repair, Callable[[Checked], int]] = MappingProxyType({
    Repair.ORPHANS: _orphans, Repair.UNMARKED: _unmarked, Repair.RUN_COUNTS: _run_counts, Repair.INFLUENCES: _influences,
    Repair.CIRCUIT_COUNTS: _circuit_counts,
    Repair.STATISTICS: _statistics, Repair.LABELS: _labels, Repair.UNUSED: _unused, Repair.TABLES: _tables, Repair.LEFTOVERS: _leftovers,
})  # fmt: skip
