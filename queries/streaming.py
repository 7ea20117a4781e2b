"""A whole graph, block by block: what reads more than fits in memory goes by these.

1. `node_blocks` gives the nodes of a label, by key, so many at a time; `edge_blocks` the edges of a type, by source and then target.
2. Both take several stores, whose blocks they give side by side: each block holds the same nodes, or the edges between the same nodes, of each store,
   so that two graphs can be compared, or one brought to the other, without holding either.
3. `content_hash` is a hash of rows in which their order does not count, so that two blocks are compared by two numbers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from .schema import EdgeType, NodeLabel, edge_type, node_label
from .store import GraphStore, KeyRange

NODES_PER_BLOCK = 50_000
EDGES_PER_BLOCK = 250_000
"""Edges that are held at once, of each store; a block takes about 100 MB."""

_COUNTS = pl.Schema({"node": pl.String(), "n": pl.Int64()})


def columns_of(label: str, node: str = "n") -> str:
    """What a statement returns to give a label's columns by name."""
    return ", ".join(f"{node}.`{name}` AS `{name}`" for name in node_label(label).all_columns)


def typed(rows: pl.DataFrame, label: NodeLabel | EdgeType) -> pl.DataFrame:
    """An answer with a label's or type's columns and their types; an empty one has no types of its own."""
    types = {name: column.dtype for name, column in label.all_columns.items()}
    return pl.DataFrame(schema=types) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in types.items())


def node_keys(store: GraphStore, label: str) -> pl.Series:
    """The keys of a label's nodes, ascending; a key that two nodes have is there twice."""
    rows = store.query(f"MATCH (n:{node_label(label).name}) RETURN n.key AS key")
    return rows["key"].cast(pl.String).sort()


def read_nodes(store: GraphStore, label: str, keys: Sequence[str] | pl.Series) -> pl.DataFrame:
    """The nodes of a label that have one of the keys, all columns, by key; keys without a node are left out."""
    wanted = list(keys)
    if not wanted:
        return typed(pl.DataFrame(), node_label(label))
    text = f"UNWIND $keys AS wanted MATCH (n:{label} {{key: wanted}}) RETURN {columns_of(label)}"
    return typed(store.query(text, {"keys": wanted}), node_label(label)).sort("key")


def node_blocks(label: str, *stores: GraphStore, size: int = NODES_PER_BLOCK) -> Iterator[tuple[pl.DataFrame, ...]]:
    """The nodes of a label in blocks of at most `size` keys, ascending: of each block one frame a store."""
    keys = pl.concat([node_keys(store, label) for store in stores]).unique().sort()
    for start in range(0, len(keys), size):
        block = keys.slice(start, size)
        yield tuple(read_nodes(store, label, block) for store in stores)


def edge_counts(store: GraphStore, type: str, run: str | None = None) -> pl.DataFrame:
    """How many edges of a type leave each node that any leaves: `node, n`."""
    edge = edge_type(type)
    where, given = (" WHERE e.run = $run", {"run": run}) if run is not None and "run" in edge.properties else ("", {})
    parts = [
        store.query(f"MATCH (a:{source})-[e:{edge.name}]->(b:{target}){where} RETURN a.key AS node, count(*) AS n", given)
        for source, target in edge.ends
    ]
    found = [part.cast(_COUNTS) for part in parts if part.height]
    return pl.concat(found) if found else pl.DataFrame(schema=_COUNTS)


def edge_blocks(type: str, *stores: GraphStore, run: str | None = None, size: int = EDGES_PER_BLOCK) -> Iterator[tuple[pl.DataFrame, ...]]:
    """The edges of a type (of one run) in blocks of about `size`, at most twice as many, by source and target: of each block one frame a store.

    All edges from one node to another are in one block.
    """
    for sources, targets in edge_ranges(type, *stores, run=run, size=size):
        yield tuple(store.read_edges(type, run=run, sources=sources, targets=targets) for store in stores)


def edge_ranges(type: str, *stores: GraphStore, run: str | None = None, size: int = EDGES_PER_BLOCK) -> Iterator[tuple[KeyRange, KeyRange | None]]:
    """The ranges of sources, and of a source with very many edges those of its targets, that hold the blocks of `edge_blocks`."""
    for sources in key_ranges(_added([edge_counts(store, type, run) for store in stores]), size):
        if sources.low != sources.high:
            yield sources, None
            continue
        yield from ((sources, targets) for targets in key_ranges(_added([hub_counts(store, type, run, sources.low) for store in stores]), size))


def hub_counts(store: GraphStore, type: str, run: str | None, source: str) -> pl.DataFrame:
    """How many edges of one source each target has: `node, n`."""
    edge = edge_type(type)
    by_run = run is not None and "run" in edge.properties
    given = {"source": source, **({"run": run} if by_run else {})}
    parts = [
        store.query(
            f"MATCH (a:{start} {{key: $source}})-[e:{edge.name}]->(b:{end})" + (" WHERE e.run = $run" if by_run else "")
            + " RETURN b.key AS node, count(*) AS n",
            given,
        )
        for start, end in edge.ends
    ]  # fmt: skip
    found = [part.cast(_COUNTS) for part in parts if part.height]
    return pl.concat(found) if found else pl.DataFrame(schema=_COUNTS)


def _added(counts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Counts of several stores: the greatest for each node."""
    by_store = [frame.group_by("node").agg(pl.col("n").sum()) for frame in counts]
    return pl.concat(by_store).group_by("node").agg(pl.col("n").max())


def key_ranges(counts: pl.DataFrame, size: int) -> list[KeyRange]:
    """Consecutive ranges of the keys `node` that have at most 2·`size` of the `n` edges each; a key with more than `size` stands alone."""
    if counts.is_empty():
        return []
    counts = counts.sort("node").with_columns(((pl.col("n").cum_sum() - pl.col("n")) // size).alias("block"), (pl.col("n") > size).alias("alone"))
    # those that stand alone are each a group of their own
    counts = counts.with_columns(pl.when("alone").then(pl.int_range(pl.len())).otherwise(-1).alias("alone"))
    ends = counts.group_by(pl.struct("block", "alone").rle_id(), maintain_order=True).agg(
        pl.col("node").first().alias("low"), pl.col("node").last().alias("high")
    )
    return [KeyRange(low, high) for low, high in ends.select("low", "high").iter_rows()]


def content_hash(rows: pl.DataFrame) -> tuple[int, int]:
    """A hash of rows in which their order does not count, 128 bits as two numbers; those of two sets of rows add up (modulo 2⁶⁴) to that of both."""
    if rows.is_empty():
        return 0, 0
    plain = rows.with_columns(pl.col(pl.Float64) + 0.0)  # -0.0 and 0.0 are one number
    return tuple(int(plain.hash_rows(seed=seed).to_numpy().sum(dtype=np.uint64)) for seed in (11, 1789))  # type: ignore[return-value]


def added_hashes(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The hash of two sets of rows together."""
    return (first[0] + second[0]) % 2**64, (first[1] + second[1]) % 2**64
