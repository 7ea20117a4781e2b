"""Runs, circuits, statistics and samples taken out of an atlas, each with all that hangs on it.

What is shared stays: a feature while any edge but its model's touches it, a sequence while a run marks it, a model while a run or a feature is of it.
A run goes in an order in which a process that is killed leaves an atlas that can be read, and the same command finishes:

1. Its status and its sequences' marks say `deleting`: nothing takes it for done, and no ingest adds to it.
2. What follows from it: its circuits and communities with their scores, what its nodes and edges were measured to do, comparisons with it.
3. Its rows in the statistics, in one transaction.
4. Its edges, so many at a time, then the marks, the run itself and its manifest.
5. The sequences, features and models that nothing else needs (`needed_by_nothing_else`, decided before anything is deleted). While another run is
   unfinished these stay, all of them: what it has planned it is not joined to yet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from .belongings import BELONGINGS, Owner
from .runs import DONE
from .statistics import StatisticsStore
from .store import GraphStore, QueryRejected
from .streaming import edge_counts, node_keys

DELETING = "deleting"
"""`Run.status`, and the status of its marks, from when a run is being deleted."""

EDGES_PER_DELETION = 50_000
"""Edges deleted in one transaction: a server keeps a transaction in memory."""

Report = Callable[[int, int, str], None]

_PARCELLATIONS = "MATCH (p:Partition)-[:OF_RUN]->(r:Run) WHERE r.key = $run RETURN DISTINCT p.parcellation AS key"
_BOTH_ENDS = ("ATTRIBUTES", "INFLUENCES", "CORRELATES", "WIRED", "CIRCUIT_EDGE", "MATCHES")
_FEATURES_EDGES = (
    *(f"-[:{type}]->" for type in (*_BOTH_ENDS, "IN_CIRCUIT", "ABLATED", "MEMBER_OF")),
    *(f"<-[:{type}]-" for type in _BOTH_ENDS),
)
_UNUSED: Mapping[str, str] = {
    # a feature's edge to its model keeps nothing
    "Feature": " AND ".join(f"NOT EXISTS {{ MATCH (n){edge}() }}" for edge in _FEATURES_EDGES),
    "Sequence": "NOT EXISTS { MATCH (n)<-[:ON_SEQUENCE]-() }",
    "Model": "NOT EXISTS { MATCH (n)<-[:OF_MODEL]-() }",
}
_NAMING: Mapping[str, Sequence[str]] = {
    # features name their model even where no edge leads to it
    "Model": [f"MATCH (n:{one}) WHERE n.model IS NOT NULL RETURN DISTINCT n.model AS key" for one in ("Feature", "Run")],
    # a text whose mark is lost is still what edges were measured on
    "Sequence": [
        "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.sequence IS NOT NULL RETURN DISTINCT e.sequence AS key",
        "MATCH (c:Circuit) WHERE c.sequence IS NOT NULL RETURN DISTINCT c.sequence AS key",
    ],
}
"""By label: queries of the keys that are named where no edge leads to the node."""


@dataclass(frozen=True)
class Doomed:
    """What would go, counted: `what` (a label, a type, a table, a kind of file), how many."""

    what: str
    n: int


def run_belongings(store: GraphStore, statistics: StatisticsStore | None, run: str) -> list[Doomed]:
    """What hangs on a run of edges, counted; what is shared with other runs is not in it."""
    found = [Doomed(what, _count(store, text, {"run": run})) for what, text in _COUNTED.items()]
    communities = _parcellations(store, run)
    for what, text in _OF_PARCELLATIONS.items():
        found.append(Doomed(what, _count(store, text, {"parcellations": communities}) if communities else 0))
    if statistics is not None:
        found += [Doomed(f"{table} (statistics)", n) for table, n in _statistics_rows(statistics, run, communities)]
    return [one for one in found if one.n]


def _edges_text(type: str) -> str:
    return f"MATCH (a:Feature)-[e:{type}]->(b:Feature) WHERE e.run = $run RETURN count(*) AS n"


_COUNTED: Mapping[str, str] = {
    "edges": _edges_text("ATTRIBUTES"),
    "aggregated edges": _edges_text("INFLUENCES"),
    "sequences' marks": "MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run RETURN count(*) AS n",
    "circuits": "MATCH (c:Circuit) WHERE c.run = $run RETURN count(*) AS n",
    "circuits' edges": "MATCH (c:Circuit) WHERE c.run = $run WITH c MATCH ()-[e:CIRCUIT_EDGE]->() WHERE e.circuit = c.key RETURN count(*) AS n",
    "scores": "MATCH (c:Circuit)-[:SCORED]->(s:Score) WHERE c.run = $run RETURN count(*) AS n",
    "nodes' ablation effects": "MATCH (:Feature)-[e:ABLATED]->(r:Run) WHERE r.key = $run RETURN count(*) AS n",
    "drives between blocks": "MATCH (:Block)-[e:DRIVES]->(:Block) WHERE e.run = $run RETURN count(*) AS n",
}
_OF_PARCELLATIONS: Mapping[str, str] = {
    "partitions": "MATCH (p:Partition) WHERE p.parcellation IN $parcellations RETURN count(*) AS n",
    "blocks": "MATCH (b:Block) WHERE b.parcellation IN $parcellations RETURN count(*) AS n",
}


def _count(store: GraphStore, text: str, parameters: Mapping[str, object]) -> int:
    return int(store.query(text, parameters)["n"][0])


def _parcellations(store: GraphStore, run: str) -> list[str]:
    """The parcellations that were found in a run's own graph: its communities."""
    return list(store.query(_PARCELLATIONS, {"run": run})["key"].cast(pl.String))


def _statistics_rows(statistics: StatisticsStore, run: str, parcellations: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Which tables have how many rows of a run, of its comparisons and its communities."""
    for table, condition, given in _conditions(run, parcellations):
        n = int(statistics._fetch(f"SELECT count(*) FROM {table} WHERE {condition}", given)[0][0])
        if n:
            yield table, n


def _conditions(run: str, parcellations: Sequence[str]) -> Iterator[tuple[str, str, list[object]]]:
    """For each table with rows of a run: the condition on these, with its parameters; the own rows of comparisons and rankings come last."""
    for one in BELONGINGS.values():
        if one.owner is Owner.MEASURED:
            yield one.table, "run = ?", [run]
        elif one.owner is Owner.PARCELLATION:
            yield one.table, "parcellation IN (SELECT unnest(?::VARCHAR[]))", [list(parcellations)]
        elif one.owner is Owner.COMPARISON and one.table != "comparisons":
            yield one.table, "comparison IN (SELECT comparison FROM comparisons WHERE run_a = ? OR run_b = ?)", [run, run]
        elif one.owner is Owner.RANKING and one.table != "rankings":
            yield one.table, "ranking IN (SELECT ranking FROM rankings WHERE run = ?)", [run]
    yield "rankings", "run = ?", [run]
    yield "comparisons", "run_a = ? OR run_b = ?", [run, run]


# -- deleting a run ------------------------------------------------------------------------------------------


def delete_run(store: GraphStore, statistics: StatisticsStore | None, run: str, report: Report | None = None) -> None:
    """Delete a run of edges with all that hangs on it, but for what `delete_unused` takes; may be repeated."""
    given = {"run": run}
    said = report or (lambda done, total, detail: None)
    store.query("MATCH (r:Run) WHERE r.key = $run SET r.status = $status", {**given, "status": DELETING}, write=True)
    store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run SET m.status = $status", {**given, "status": DELETING}, write=True)
    communities = _parcellations(store, run)
    circuits = _keys(store, "MATCH (c:Circuit) WHERE c.run = $run RETURN c.key AS key", given)
    for circuit in dict.fromkeys([*circuits, *(one for parcellation in communities for one in circuits_of_blocks(store, parcellation))]):
        delete_circuit(store, statistics, circuit)
    if statistics is not None:
        with statistics.transaction():
            for table, condition, parameters in _conditions(run, communities):
                statistics._run(f"DELETE FROM {table} WHERE {condition}", parameters)
    for parcellation in communities:
        delete_parcellation(store, None, parcellation)
    for text in (
        "MATCH (:Feature)-[e:ABLATED]->(r:Run) WHERE r.key = $run DELETE e",
        "MATCH (:Block)-[e:DRIVES]->(:Block) WHERE e.run = $run DELETE e",
    ):
        store.query(text, given, write=True)
    for type in ("INFLUENCES", "ATTRIBUTES"):
        delete_edges(store, type, run, said)
    store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run DELETE m", given, write=True)
    store.query("MATCH (r:Run) WHERE r.key = $run DETACH DELETE r", given, write=True)


def _keys(store: GraphStore, text: str, parameters: Mapping[str, object]) -> list[str]:
    return list(store.query(text, parameters)["key"].cast(pl.String))


def delete_edges(store: GraphStore, type: str, run: str, report: Report, *, orphans: bool = False) -> None:
    """Delete a run's edges of one type, a bounded number in a transaction; `orphans`: none where the run is there when they are deleted."""
    counts = edge_counts(store, type, run).sort("node")
    total, done = int(counts["n"].sum()), 0
    which = "e.run = $run" + (" AND NOT EXISTS { MATCH (r:Run) WHERE r.key = e.run }" if orphans else "")
    text = f"UNWIND $keys AS wanted MATCH (a:Feature {{key: wanted}})-[e:{type}]->(:Feature) WHERE {which} DELETE e"
    some = f"MATCH (a:Feature {{key: $hub}})-[e:{type}]->(:Feature) WHERE {which} WITH e LIMIT {EDGES_PER_DELETION} DELETE e"
    few = counts.filter(pl.col("n") <= EDGES_PER_DELETION).with_columns(part=(pl.col("n").cum_sum() - pl.col("n")) // EDGES_PER_DELETION)
    for part in few.partition_by("part", maintain_order=True):
        store.query(text, {"keys": part["node"].to_list(), "run": run}, write=True)
        done += int(part["n"].sum())
        report(done, total, type)
    for hub, n in counts.filter(pl.col("n") > EDGES_PER_DELETION).iter_rows():
        for _ in range(-(-n // EDGES_PER_DELETION)):
            store.query(some, {"hub": hub, "run": run}, write=True)
        done += n
        report(done, total, type)


def delete_circuit(store: GraphStore, statistics: StatisticsStore | None, circuit: str) -> None:
    """Delete a circuit with its edges and scores, by its whole key; may be repeated."""
    given = {"circuit": circuit}
    if statistics is not None:
        with statistics.transaction():
            for table, column in (("scores", "subject"), ("score_sizes", "subject"), ("ablation_effects", "circuit")):
                statistics._run(f"DELETE FROM {table} WHERE {column} = ?", [circuit])
    for pattern in ("(:Feature)-[e:CIRCUIT_EDGE]->(:Feature)", "(:Block)-[e:CIRCUIT_EDGE]->(:Block)"):
        store.query(f"MATCH {pattern} WHERE e.circuit = $circuit DELETE e", given, write=True)
    store.query("MATCH (s:Score) WHERE s.subject = $circuit DETACH DELETE s", given, write=True)
    store.query("MATCH (c:Circuit) WHERE c.key = $circuit DETACH DELETE c", given, write=True)


def delete_parcellation(store: GraphStore, statistics: StatisticsStore | None, parcellation: str) -> None:
    """Delete a parcellation with its blocks, their scores and the circuits between them, from the graph and the statistics; may be repeated.

    The statistics come last: by their rows it is found again after a kill.
    """
    given = {"parcellation": parcellation}
    for circuit in circuits_of_blocks(store, parcellation):
        delete_circuit(store, statistics, circuit)
    store.query("MATCH (b:Block)-[:SCORED]->(s:Score) WHERE b.parcellation = $parcellation DETACH DELETE s", given, write=True)
    store.query("MATCH (b:Block) WHERE b.parcellation = $parcellation DETACH DELETE b", given, write=True)
    store.query("MATCH (p:Partition) WHERE p.parcellation = $parcellation DETACH DELETE p", given, write=True)
    if statistics is not None:
        with statistics.transaction():
            for one in BELONGINGS.values():
                if one.owner is Owner.PARCELLATION:
                    statistics._run(f"DELETE FROM {one.table} WHERE parcellation = ?", [parcellation])


def circuits_of_blocks(store: GraphStore, parcellation: str) -> list[str]:
    """The circuits whose nodes are blocks of a parcellation, by key."""
    text = "MATCH (b:Block)-[:IN_CIRCUIT]->(c:Circuit) WHERE b.parcellation = $parcellation RETURN DISTINCT c.key AS key"
    return _keys(store, text, {"parcellation": parcellation})


def delete_statistics_run(store: GraphStore, statistics: StatisticsStore, run: str) -> None:
    """Delete a statistics run: its rows, its correlations in the graph, what features say of it. Raises `NoSuchRun`."""
    store.query("MATCH (:Feature)-[e:CORRELATES]->(:Feature) WHERE e.run = $run DELETE e", {"run": run}, write=True)
    text = "MATCH (f:Feature) WHERE f.statistics_run = $run SET f.frequency = null, f.mean_activation = null, f.statistics_run = null"
    store.query(text, {"run": run}, write=True)
    for table in ("search_terms", "search_documents", "search_origins"):
        statistics._run(f"DELETE FROM {table} WHERE origin = ?", [run])
    with statistics.transaction():  # those that `delete_run` of an older layout does not know
        for one in BELONGINGS.values():
            if one.owner is Owner.STATISTICS and one.table != "runs":
                statistics._run(f"DELETE FROM {one.table} WHERE run = ?", [run])
    statistics.delete_run(run)


# -- nodes that nothing needs --------------------------------------------------------------------------------


def unused(store: GraphStore, label: str, *, bare: bool = False) -> pl.Series:
    """Features, sequences or models that nothing needs any more, by key; `bare`: without features that have a label or statistics of their own."""
    own = " AND n.statistics_run IS NULL AND (n.label IS NULL OR n.kind <> 'feature')" if bare and label == "Feature" else ""
    rows = store.query(f"MATCH (n:{label}) WHERE {_UNUSED[label]}{own} RETURN n.key AS key")
    keys = rows["key"].cast(pl.String).sort()
    if keys.is_empty():
        return keys
    named = [store.query(text)["key"].cast(pl.String) for text in _NAMING.get(label, ())]
    return keys.filter(~keys.is_in(pl.concat(named).implode())) if named else keys


def delete_unused(
    store: GraphStore, labels: Sequence[str] = ("Feature", "Sequence", "Model"), size: int = 20_000, *, bare: bool = False
) -> dict[str, int]:
    """Delete the features, sequences and models that nothing needs any more (see `unused`); how many of each.

    None while a run is unfinished, which is asked last: what a run that has just begun has planned is joined to nothing yet.
    """
    gone = {}
    for label in labels:
        keys = unused(store, label, bare=bare)
        gone[label] = 0 if unfinished_runs(store) else delete_nodes(store, label, keys, size)
    return gone


_ALONE = "WHERE NOT EXISTS { MATCH (n)--() } DELETE n"
_DELETION: Mapping[str, Sequence[str]] = {
    # An edge that is no atlas' own needs a feature too. Not one statement with OPTIONAL MATCH: the embedded database cannot.
    "Feature": (
        "MATCH (n)-[m:OF_MODEL]->() WHERE COUNT { MATCH (n)--() } = COUNT { MATCH (n)-[:OF_MODEL]->() } DELETE m, n",
        _ALONE,
    ),
    "Sequence": (_ALONE,),
    "Model": (
        "WHERE NOT EXISTS { MATCH (n)--() } AND NOT EXISTS { MATCH (f:Feature) WHERE f.model = n.key }"
        " AND NOT EXISTS { MATCH (r:Run) WHERE r.model = n.key } DELETE n",
    ),
}
"""How nodes are deleted: none that anything needs in that moment, and no edge but a feature's to its model."""

_TRIES = 3


def delete_nodes(store: GraphStore, label: str, keys: pl.Series, size: int = 20_000) -> int:
    """Delete those of some features, sequences or models that nothing needs in the moment when they go; how many did."""
    texts = [f"UNWIND $keys AS wanted MATCH (n:{label} {{key: wanted}}) {deletion} RETURN count(*) AS n" for deletion in _DELETION[label]]
    gone = 0
    for part, text in ((part, text) for part in _slices(keys, size) for text in texts):
        for left in reversed(range(_TRIES)):
            try:
                gone += int(store.query(text, {"keys": part}, write=True)["n"][0])
                break
            except QueryRejected:  # an edge to one of them was committed meanwhile: the next time it is left out
                if not left:
                    raise
    return gone


def unfinished_runs(store: GraphStore, besides: Sequence[str] = ()) -> list[str]:
    """Runs that are measured, imported or copied now, or were stopped: nodes that nothing uses may be what these have planned."""
    rows = store.query("MATCH (r:Run) WHERE r.status IS NOT NULL RETURN r.key AS key, r.status AS status ORDER BY key")
    return [key for key, status in rows.iter_rows() if status not in (DONE, DELETING) and key not in besides]


@dataclass(frozen=True)
class Going:
    """Runs and what goes beside them, by whole keys."""

    runs: tuple[str, ...]
    circuits: tuple[str, ...] = ()
    parcellations: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    def whole(self, store: GraphStore) -> "Going":
        """With the runs' communities and circuits, and the circuits between blocks that go."""
        communities = [one for run in self.runs for one in _parcellations(store, run)]
        parcellations = tuple(dict.fromkeys([*self.parcellations, *communities]))
        circuits = _keys(store, "MATCH (c:Circuit) WHERE c.run IN $runs RETURN c.key AS key", {"runs": list(self.runs)})
        of_blocks = [one for parcellation in parcellations for one in circuits_of_blocks(store, parcellation)]
        return Going(self.runs, tuple(dict.fromkeys([*self.circuits, *circuits, *of_blocks])), parcellations, self.statistics)

    @property
    def parameters(self) -> dict[str, object]:
        """For the queries below."""
        return {name: list(getattr(self, name)) for name in ("runs", "circuits", "parcellations", "statistics")}


def _of_both_ends(type: str, goes: str) -> list[str]:
    return [f"MATCH (a:Feature)-[e:{type}]->(b:Feature) RETURN DISTINCT {end}.key AS key, {goes} AS goes" for end in "ab"]


_USES: Mapping[str, Sequence[str]] = {
    "Feature": [
        *_of_both_ends("ATTRIBUTES", "e.run IN $runs"), *_of_both_ends("INFLUENCES", "e.run IN $runs"),
        *_of_both_ends("CIRCUIT_EDGE", "e.circuit IN $circuits"), *_of_both_ends("CORRELATES", "e.run IN $statistics"),
        *_of_both_ends("WIRED", "false"), *_of_both_ends("MATCHES", "false"),
        "MATCH (a:Feature)-[:IN_CIRCUIT]->(c:Circuit) RETURN DISTINCT a.key AS key, c.key IN $circuits AS goes",
        "MATCH (a:Feature)-[:ABLATED]->(r:Run) RETURN DISTINCT a.key AS key, r.key IN $runs AS goes",
        "MATCH (a:Feature)-[:MEMBER_OF]->(b:Block) RETURN DISTINCT a.key AS key, b.parcellation IN $parcellations AS goes",
    ],
    "Sequence": [
        "MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence) RETURN DISTINCT s.key AS key, r.key IN $runs AS goes",
        "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.sequence IS NOT NULL RETURN DISTINCT e.sequence AS key, e.run IN $runs AS goes",
        "MATCH (c:Circuit) WHERE c.sequence IS NOT NULL RETURN DISTINCT c.sequence AS key, c.key IN $circuits AS goes",
    ],
    "Model": ["MATCH (r:Run) WHERE r.model IS NOT NULL RETURN DISTINCT r.model AS key, r.key IN $runs AS goes"],
}  # fmt: skip
"""By label: which nodes are used, and whether by what goes."""


def needed_by_nothing_else(store: GraphStore, statistics: StatisticsStore | None, going: Going) -> dict[str, pl.Series]:
    """By label: the nodes that only what goes uses, by key. None at all while a run that stays is unfinished.

    Where the deletion of one of the runs was cut off, or it was stopped before it was done, what it used alone cannot be told from what nothing uses.
    """
    nothing = dict.fromkeys(_USES, pl.Series("key", [], dtype=pl.String))
    if not going.runs or unfinished_runs(store, going.runs):
        return nothing
    status = dict(store.query("MATCH (r:Run) WHERE r.key IN $runs RETURN r.key AS key, r.status AS status", {"runs": list(going.runs)}).iter_rows())
    cut_off = any(status.get(run, DELETING) == DELETING for run in going.runs)
    stopped = any(status.get(run) != DONE for run in going.runs)
    parameters = going.whole(store).parameters
    found = {}
    for label in ("Feature", "Sequence"):
        unnamed = unused(store, label, bare=True) if cut_off or (stopped and label == "Sequence") else nothing[label]
        found[label] = pl.concat([_used_alone(store, label, parameters), unnamed]).unique().sort()
    found["Feature"] = found["Feature"].filter(~found["Feature"].is_in(_only_here(store, statistics, found["Feature"], going).implode()))
    of_models = store.query("MATCH (f:Feature) WHERE f.model IS NOT NULL RETURN f.model AS key, count(*) AS n")
    left = dict(of_models.iter_rows())
    for part in _slices(found["Feature"]):
        text = "UNWIND $keys AS wanted MATCH (f:Feature {key: wanted}) WHERE f.model IS NOT NULL RETURN f.model AS key, count(*) AS n"
        for model, n in store.query(text, {"keys": part}).iter_rows():
            left[model] -= n
    models = pl.concat([_used_alone(store, "Model", parameters), unused(store, "Model") if cut_off else nothing["Model"]]).unique().sort()
    return {**found, "Model": models.filter(pl.Series([not left.get(model) for model in models], dtype=pl.Boolean))}


def _used_alone(store: GraphStore, label: str, parameters: Mapping[str, object]) -> pl.Series:
    """The nodes of a label that what goes uses and nothing else does, by key."""
    used = [pl.DataFrame(schema={"key": pl.String, "goes": pl.Boolean})]
    for text in _USES[label]:
        named = {name: value for name, value in parameters.items() if f"${name}" in text}
        rows = store.query(text, named)
        used += [rows.select(pl.col("key").cast(pl.String), pl.col("goes").cast(pl.Boolean).fill_null(False))] if rows.height else []
        used = [pl.concat(used).unique()]
    return used[0].group_by("key").agg(pl.col("goes").all()).filter("goes")["key"]


def _slices(keys: pl.Series, size: int = 20_000) -> Iterator[list[str]]:
    return (keys.slice(start, size).to_list() for start in range(0, len(keys), size))


def _only_here(store: GraphStore, statistics: StatisticsStore | None, keys: pl.Series, going: Going) -> pl.Series:
    """Those of some features whose label or numbers are in the graph alone, so that they would be lost: on a server others may have made them."""
    labels = [] if statistics is None else statistics.query("SELECT DISTINCT key FROM feature_labels")["key"].to_list()
    runs = [*going.statistics, *([] if statistics is None else statistics.query("SELECT run FROM runs")["run"].to_list())]
    kept = [pl.Series("key", [], dtype=pl.String)]
    for part in _slices(keys):
        rows = store.query(
            "UNWIND $keys AS wanted MATCH (f:Feature {key: wanted}) WHERE f.label_kind IS NOT NULL OR f.statistics_run IS NOT NULL"
            " RETURN f.key AS key, f.label_kind AS kind, f.statistics_run AS run",
            {"keys": part},
        )
        if rows.height:
            rows = rows.cast(pl.String)
            made = pl.col("kind").is_not_null() & (pl.col("kind") != "file") & ~pl.col("key").is_in(labels)  # files can be imported again
            kept.append(rows.filter(made | (pl.col("run").is_not_null() & ~pl.col("run").is_in(runs)))["key"])
    return pl.concat(kept)


def runs_being_deleted(store: GraphStore) -> list[str]:
    """Runs whose deletion was begun and not finished."""
    return _keys(store, "MATCH (r:Run) WHERE r.status = $status RETURN r.key AS key ORDER BY key", {"status": DELETING})


def all_runs(store: GraphStore) -> list[str]:
    """The keys of all runs of edges."""
    return node_keys(store, "Run").to_list()
