"""The blocks that a graph holds: which features they are made of, and how what is no longer so is taken away."""

from collections.abc import Mapping

import polars as pl

from ..errors import UserError
from .store import GraphStore

EDGES_AT_ONCE = 20_000
"""Edges that are deleted in one transaction."""

BLOCKS: Mapping[str, pl.DataType] = {
    "key": pl.String(), "site": pl.String(), "kind": pl.String(), "level": pl.Int64(), "index": pl.Int64(), "chosen": pl.Boolean(),
    "size": pl.Int64(), "label": pl.String(), "automatic_label": pl.String(),
}  # fmt: skip
DRIVES: Mapping[str, pl.DataType] = {
    "source": pl.String(), "target": pl.String(), "run": pl.String(), "weight_sum": pl.Float64(), "weight_mean": pl.Float64(),
    "abs_sum": pl.Float64(), "n": pl.Int64(),
}  # fmt: skip
LOSSES: Mapping[str, pl.DataType] = {
    "site": pl.String(), "index": pl.Int64(), "size": pl.Int64(), "task": pl.String(), "metric": pl.String(), "baseline": pl.String(),
    "split": pl.String(), "averaging": pl.String(), "seed": pl.Int64(), "value": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(),
    "n": pl.Int64(), "undefined_n": pl.Int64(),
}  # fmt: skip
_ENDS: Mapping[str, pl.DataType] = {"source": pl.String(), "target": pl.String()}


class UnknownBlock(UserError):
    """The graph has no such block."""


def _typed(rows: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """An answer with the declared types; an empty one has no types of its own."""
    return pl.DataFrame(schema=dict(schema)) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def blocks_of(store: GraphStore, parcellation: str) -> pl.DataFrame:
    """The blocks of a parcellation as `BLOCKS`, by key."""
    columns = ", ".join(f"b.`{name}` AS `{name}`" for name in BLOCKS)
    text = f"MATCH (b:Block) WHERE b.parcellation = $parcellation RETURN {columns} ORDER BY b.key"
    return _typed(store.query(text, {"parcellation": parcellation}), BLOCKS)


def members_of(store: GraphStore, parcellation: str) -> pl.DataFrame:
    """`source` (a node's key), `target` (its block's) of all of a parcellation's `MEMBER_OF`s."""
    text = "MATCH (f:Feature)-[:MEMBER_OF]->(b:Block) WHERE b.parcellation = $parcellation RETURN f.key AS source, b.key AS target"
    return _typed(store.query(text, {"parcellation": parcellation}), _ENDS)


def parts_of(store: GraphStore, parcellation: str) -> pl.DataFrame:
    """`source` (a block's key), `target` (the coarser block's, or the partition's) of all of a parcellation's `PART_OF`s."""
    text = "MATCH (b:Block)-[:PART_OF]->(c) WHERE b.parcellation = $parcellation RETURN b.key AS source, c.key AS target"
    return _typed(store.query(text, {"parcellation": parcellation}), _ENDS)


def drives_of(store: GraphStore, parcellation: str, run: str | None = None) -> pl.DataFrame:
    """What blocks of a parcellation drive each other, as `DRIVES`, by run, source and target."""
    of_run = "" if run is None else " AND d.run = $run"
    columns = ", ".join(f"d.`{name}` AS `{name}`" for name in DRIVES if name not in _ENDS)
    text = (
        f"MATCH (a:Block)-[d:DRIVES]->(b:Block) WHERE a.parcellation = $parcellation{of_run} RETURN a.key AS source, b.key AS target, {columns}"
        " ORDER BY run, source, target"
    )
    return _typed(store.query(text, {"parcellation": parcellation, **({} if run is None else {"run": run})}), DRIVES)


def losses_of(store: GraphStore, parcellation: str) -> pl.DataFrame:
    """What each task loses without each of a parcellation's chosen blocks that was cut, as `LOSSES`, by site, block and task."""
    columns = ", ".join(f"{'b' if name in ('site', 'index', 'size') else 's'}.`{name}` AS `{name}`" for name in LOSSES)
    text = (
        "MATCH (b:Block)-[:SCORED]->(s:Score) WHERE b.parcellation = $parcellation AND b.chosen AND s.kind = 'loss' "
        f"RETURN {columns} ORDER BY site, `index`, task, s.key"
    )
    return _typed(store.query(text, {"parcellation": parcellation}), LOSSES)


def forget_parcellation(store: GraphStore, parcellation: str) -> None:
    """Remove a parcellation's partitions and blocks with all their edges, and the circuits of these blocks with their scores; features stay."""
    given = {"parcellation": parcellation, "limit": EDGES_AT_ONCE}
    for edge in ("MATCH ()-[e:MEMBER_OF]->(b:Block)", "MATCH (b:Block)-[e:DRIVES]->()"):
        while _n(store.query(f"{edge} WHERE b.parcellation = $parcellation WITH e LIMIT $limit DELETE e RETURN count(*) AS n", given, write=True)):
            pass
    circuits = "MATCH (b:Block)-[:IN_CIRCUIT]->(c:Circuit)"
    for of_circuit in (f"{circuits}-[:SCORED]->(x:Score)", f"{circuits} WITH b, c AS x"):
        text = f"{of_circuit} WHERE b.parcellation = $parcellation WITH DISTINCT x DETACH DELETE x"
        store.query(text, {"parcellation": parcellation}, write=True)
    for label in ("Block", "Partition"):
        store.query(f"MATCH (b:{label}) WHERE b.parcellation = $parcellation DETACH DELETE b", {"parcellation": parcellation}, write=True)


def forget_drives(store: GraphStore, run: str, parcellation: str, chosen: list[str]) -> None:
    """Remove what these blocks of a parcellation drive each other in a run."""
    text = (
        "MATCH (a:Block)-[d:DRIVES]->(b:Block) WHERE d.run = $run AND a.parcellation = $parcellation AND a.key IN $chosen AND b.key IN $chosen"
        " WITH d LIMIT $limit DELETE d RETURN count(*) AS n"
    )
    while _n(store.query(text, {"run": run, "parcellation": parcellation, "chosen": chosen, "limit": EDGES_AT_ONCE}, write=True)):
        pass


def _n(answer: pl.DataFrame) -> int:
    return int(answer["n"][0]) if answer.height else 0
