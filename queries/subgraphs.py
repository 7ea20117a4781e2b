"""What the analyses read of a graph: its runs, and the nodes and sequences of one of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from ..errors import UserError
from .store import GraphStore

STRONGEST_ON_OUTPUT = (
    'MATCH (f:Feature)-[i:INFLUENCES]->(y:Feature) WHERE y.kind = "output"'
    " RETURN f.site, f.label, i.weight ORDER BY i.weight DESC LIMIT 10"
)
"""A first question of one's own: which nodes move the output most. Shown as an example of what --cypher takes."""


class UnknownRun(UserError):
    """The graph has no such run, or the name fits several."""


@dataclass(frozen=True)
class RunRow:
    """A `Run` node. `dictionaries` maps sites to dictionary ids; `properties` are all of the node's, by name."""

    key: str
    model: str
    task: str
    metric: str
    dictionaries: Mapping[str, str]
    properties: Mapping[str, object]


# column: polars type; `label`, `frequency` and `label_kind` may be null
FEATURES = {
    "key": pl.String(), "model": pl.String(), "dictionary": pl.String(), "site": pl.String(), "layer": pl.Int64(), "kind": pl.String(),
    "index": pl.Int64(), "label": pl.String(), "frequency": pl.Float64(), "label_kind": pl.String(),
}  # fmt: skip
SEQUENCES = {name: pl.String() for name in ("key", "task", "clean", "corrupt", "answer", "wrong_answer")}
MEASURED = {"metric_clean": pl.Float64(), "metric_corrupt": pl.Float64(), "n_edges": pl.Int64()}


def _typed(rows: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """An answer with the declared types; an empty one has no types of its own."""
    return pl.DataFrame(schema=schema) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def list_runs(store: GraphStore) -> list[RunRow]:
    """All runs by key."""
    rows = store.query("MATCH (r:Run) RETURN properties(r) AS run ORDER BY r.key")
    found = [json.loads(text) for text in rows["run"].to_list()] if rows.height else []
    return [
        RunRow(run["key"], run.get("model", ""), run.get("task", ""), run.get("metric", ""), json.loads(run.get("dictionaries") or "{}"), run)
        for run in found
    ]


def _described(run: RunRow) -> str:
    """A run's key, and what tells it from the others."""
    steps, n = run.properties.get("steps"), run.properties.get("n_planned")
    return f"{run.key} ({run.task}, {run.metric}" + (f", {steps} steps" if steps else "") + (f", {n} sequences)" if n else ")")


def find_run(store: GraphStore, name: str | None = None) -> RunRow:
    """The run whose key begins with `name`, or the only run there is. Raises `UnknownRun`."""
    runs = list_runs(store)
    known = ", ".join(_described(run) for run in runs) or "none"
    if not runs:
        raise UnknownRun("the graph has no runs yet: make one with `featlas ingest edges` or `featlas demo`")
    fitting = [run for run in runs if name is None or run.key.startswith(name)]
    if not fitting:
        raise UnknownRun(f"no run {name!r} in the graph: its runs are {known}")
    if len(fitting) > 1:
        raise UnknownRun(f"{'--run is needed: the graph has' if name is None else f'run {name!r} is not unique among'} {len(runs)} runs: {known}")
    return fitting[0]


def model_features(store: GraphStore, model: str) -> pl.DataFrame:
    """The model's features, error nodes and outputs that the graph holds, as `FEATURES`, by key."""
    # `index` is a word of one of the two dialects
    columns = ", ".join(f"f.`{name}` AS `{name}`" for name in FEATURES)
    return _typed(store.query(f"MATCH (f:Feature) WHERE f.model = $model RETURN {columns} ORDER BY f.key", {"model": model}), FEATURES)


def run_sequences(store: GraphStore, run: str) -> pl.DataFrame:
    """The sequences that a run has done, as `SEQUENCES` and `MEASURED` (the metric on either text, the edges kept), by key."""
    columns = ", ".join([f"s.{name} AS {name}" for name in SEQUENCES] + [f"m.{name} AS {name}" for name in MEASURED])
    rows = store.query(f"MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run RETURN {columns} ORDER BY s.key", {"run": run})
    return _typed(rows, {**SEQUENCES, **MEASURED})
