"""What the graph says of features' places: what they send in each sequence, who drives whom, which blocks they belong to."""

from collections.abc import Mapping

import polars as pl

from .store import GraphStore

SENT: Mapping[str, pl.DataType] = {"key": pl.String(), "task": pl.String(), "sequence": pl.String(), "sent": pl.Float64()}
"""Per feature and sequence the sum of the magnitudes of its outgoing edges."""

DRIVES: Mapping[str, pl.DataType] = {
    "source": pl.String(), "source_site": pl.String(), "source_kind": pl.String(), "target": pl.String(), "target_site": pl.String(),
    "target_kind": pl.String(), "weight": pl.Float64(), "abs_weight": pl.Float64(),
}  # fmt: skip
"""The edges of a run as it was aggregated, with what is at their ends."""

BLOCKS: Mapping[str, pl.DataType] = {
    "key": pl.String(), "block": pl.String(), "parcellation": pl.String(), "kind": pl.String(), "site": pl.String(), "index": pl.Int64(),
    "size": pl.Int64(), "label": pl.String(), "mean_correlation": pl.Float64(), "task": pl.String(), "task_share": pl.Float64(),
}  # fmt: skip
"""Features with the regions and communities of chosen levels that they belong to."""


def _typed(rows: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    return pl.DataFrame(schema=schema) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def sent_by_sequence(store: GraphStore, run: str) -> pl.DataFrame:
    """What each feature of a run sends in each sequence, as `SENT`, by key and sequence."""
    rows = store.query(
        'MATCH (f:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.run = $run AND f.kind = "feature"'
        " RETURN f.key AS key, e.sequence AS sequence, sum(abs(e.weight)) AS sent",
        {"run": run},
    )
    tasks = store.query("MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run RETURN s.key AS sequence, s.task AS task", {"run": run})
    if rows.is_empty() or tasks.is_empty():
        return pl.DataFrame(schema=SENT)
    return _typed(rows.join(tasks, on="sequence"), SENT).sort("key", "sequence")


def tasks_of_run(store: GraphStore, run: str) -> pl.DataFrame:
    """How many sequences of each task a run has done: `task, n`."""
    rows = store.query(
        "MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run RETURN s.task AS task, count(s) AS n ORDER BY task", {"run": run}
    )
    return _typed(rows, {"task": pl.String(), "n": pl.Int64()})


def drives(store: GraphStore, run: str) -> pl.DataFrame:
    """The aggregated edges of a run, as `DRIVES`, by their ends."""
    rows = store.query(
        "MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE e.run = $run RETURN a.key AS source, a.site AS source_site, a.kind AS source_kind,"
        " b.key AS target, b.site AS target_site, b.kind AS target_kind, e.weight AS weight, e.abs_weight AS abs_weight",
        {"run": run},
    )
    return _typed(rows, DRIVES).sort("source", "target")


def blocks_of_features(store: GraphStore) -> pl.DataFrame:
    """All features in regions and communities of chosen levels, as `BLOCKS`, by key and block."""
    rows = store.query(
        "MATCH (f:Feature)-[:MEMBER_OF]->(x:Block)-[:PART_OF*0..9]->(b:Block)"
        ' WHERE f.kind = "feature" AND (b.kind = "community" OR (b.kind = "roi" AND b.chosen))'
        " RETURN DISTINCT f.key AS key, b.key AS block, b.parcellation AS parcellation, b.kind AS kind, b.site AS site, b.`index` AS `index`,"
        " b.size AS size, b.label AS label, b.mean_correlation AS mean_correlation, b.task AS task, b.task_share AS task_share",
    )
    return _typed(rows, BLOCKS).sort("key", "block")


def model_layers(store: GraphStore) -> dict[str, int]:
    """How many layers each model of the graph has, by its key."""
    rows = store.query("MATCH (m:Model) WHERE m.n_layers IS NOT NULL RETURN m.key AS key, m.n_layers AS n")
    return {str(key): int(n) for key, n in rows.iter_rows()} if rows.height else {}
