"""Regions in the stores: parcellations kept whole in DuckDB, their blocks and what these drive written back to the graph, where Cypher finds them.

1. `write_parcellation`, `read_parcellation`: a parcellation with its levels and path scores, and what people call its blocks (`label_block`).
2. `write_regions`: `Partition` per site, `Block` per block of every kept level and for the dead features and the error node, `MEMBER_OF` from the
   site's nodes to the finest level, `PART_OF` from level to level up to the partition.
3. `write_drives`: attribution between the blocks of one level in a run, `DRIVES`; sites without a partition are one block for all features.
4. `write_region_circuit`: a circuit whose nodes are blocks.

Writing twice is writing once. A parcellation that is found again with other blocks under its key takes the place of the one before, in the graph too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..model.sites import OUTPUT, parse_site
from ..model.units import NotUnits, Units
from ..queries.blocks import blocks_of, forget_drives, forget_parcellation, members_of, parts_of
from ..queries.partitions import ParcellationRows, clear_label, find_parcellation, read_rows, set_label, write_rows
from ..queries.schema import block_key, feature_key, partition_key
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from .parcellation import PATH_SCORES, Level, NotAPartition, Parcellation, SitePartition
from .regions import Description

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ROI, HEAD, DEAD, ERROR, WHOLE, OUTPUT_BLOCK = "roi", "head", "dead", "error", "whole", "output"
"""`Block.kind`. Blocks of a parcellation by the method `heads` are heads."""

DRIVES: Mapping[str, pl.DataType] = MappingProxyType(
    {"source": pl.Int64(), "target": pl.Int64(), "weight_sum": pl.Float64(), "weight_mean": pl.Float64(), "abs_sum": pl.Float64(), "n": pl.Int64()}
)
"""Attribution between units by their numbers. weight_sum: the mean over sequences of the sum over all edges between members; weight_mean: the same
per pair of members, so that size does not decide; abs_sum: the mean magnitude of the sum; n: sequences where it is not 0."""


# Kept in DuckDB


def write_parcellation(statistics: StatisticsStore, parcellation: Parcellation) -> None:
    """Keep a parcellation, in place of the one of the same key; what people called its blocks stays with the sets of features that still are."""
    record = {"samples": parcellation.samples, "model": parcellation.model, "method": parcellation.method, "basis": parcellation.basis,
              "settings": _json(parcellation.settings)}  # fmt: skip
    sites = [
        {"site": name, "dictionary": own.dictionary, "d_sae": own.d_sae, "chosen": own.chosen, "notes": _json(own.notes)}
        for name, own in parcellation.sites.items()
    ]
    levels = [(name, i, level) for name, own in parcellation.sites.items() for i, level in enumerate(own.levels)]
    of_level = [{"site": name, "level": i, "rule": level.rule, "n_blocks": _n_blocks(level)} for name, i, level in levels]
    members = [
        pl.DataFrame({"feature": parcellation.sites[name].features, "block": level.labels}).with_columns(site=pl.lit(name), level=pl.lit(i))
        for name, i, level in levels
    ]
    scores = [own.scores.with_columns(pl.lit(name).alias("site")) for name, own in parcellation.sites.items()]
    rows = ParcellationRows(parcellation.key, record, pl.DataFrame(sites), pl.DataFrame(of_level), pl.concat(members),
                            pl.concat(scores, how="diagonal_relaxed"))  # fmt: skip
    write_rows(statistics, rows)


def read_parcellation(statistics: StatisticsStore, name: str | None = None, *, model: str | None = None) -> Parcellation:
    """The parcellation whose key begins with `name`, or the one found last (of a model). Raises `NoSuchParcellation`."""
    rows = read_rows(statistics, find_parcellation(statistics, name, model=model))
    members = {(*key,): frame for key, frame in rows.members.group_by("site", "level", maintain_order=True)}
    sites = {}
    for site in rows.sites.iter_rows(named=True):
        own = rows.levels.filter(pl.col("site") == site["site"]).sort("level")
        empty = rows.members.clear()
        found = [members.get((site["site"], level), empty) for level in own["level"]]
        levels = tuple(Level(rule, frame["block"].to_numpy()) for rule, frame in zip(own["rule"], found, strict=True))
        scores = rows.scores.filter(pl.col("site") == site["site"]).select(pl.col(name).cast(dtype) for name, dtype in PATH_SCORES.items())
        sites[site["site"]] = SitePartition(
            site["site"], site["dictionary"], site["d_sae"], found[0]["feature"].to_numpy(), levels, site["chosen"], scores, json.loads(site["notes"])
        )
    record = rows.record
    return Parcellation(rows.key, record["samples"], record["model"], record["method"], record["basis"], sites, json.loads(record["settings"]))


def label_block(
    statistics: StatisticsStore, store: GraphStore | None, parcellation: str, site: str, level: int, block: int, label: str | None
) -> None:
    """Call a block `label`, in the statistics store and, where it has the block, in the graph; None gives it its automatic label back.

    Raises `NoSuchBlock`.
    """
    if label is None:
        clear_label(statistics, parcellation, site, level, block)
    else:
        set_label(statistics, parcellation, site, level, block, label)
    if store is None:
        return
    known = blocks_of(store, parcellation).filter(
        (pl.col("site") == site) & (pl.col("level") == level) & (pl.col("index") == block) & pl.col("kind").is_in([ROI, HEAD])
    )
    if known.height:
        shown = known.select("key", label=pl.col("automatic_label") if label is None else pl.lit(label))
        store.merge_nodes("Block", shown)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's own."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _n_blocks(level: Level) -> int:
    return level.n_blocks if len(level.labels) else 0


# Blocks in the graph


@dataclass(frozen=True, slots=True)
class RegionsWritten:
    """How many partitions, blocks and memberships the graph has of a parcellation now; whether blocks of an earlier one were taken away."""

    n_partitions: int
    n_blocks: int
    n_members: int
    replaced: bool


def write_regions(store: GraphStore, parcellation: Parcellation, description: Description | None = None) -> RegionsWritten:
    """Partitions, blocks at every kept level, members and their nesting. Idempotent.

    description: what is known of the blocks, with what people call them (`named`); without it they have sizes alone. Features that the graph
    does not have are added, without a label. Raises `NotAPartition` where a site's levels are not nested.
    """
    members = pl.concat([_members(parcellation, own) for own in parcellation.sites.values()])
    parts = pl.concat([_parts(parcellation, own) for own in parcellation.sites.values()])
    replaced = _changed(store, parcellation.key, members, parts)
    if replaced:
        forget_parcellation(store, parcellation.key)
    store.merge_nodes("Partition", pl.DataFrame([_partition_node(parcellation, own) for own in parcellation.sites.values()]))
    blocks = _block_nodes(parcellation, description)
    store.merge_nodes("Block", blocks)
    for own in parcellation.sites.values():
        nodes = _feature_nodes(parcellation.model, own)
        store.merge_nodes("Feature", nodes.filter(pl.col("kind") == "feature").drop("label"))
        store.merge_nodes("Feature", nodes.filter(pl.col("kind") == "error"))
    store.merge_edges("MEMBER_OF", members)
    store.merge_edges("PART_OF", parts)
    return RegionsWritten(len(parcellation.sites), blocks.height, members.height, replaced)


def _changed(store: GraphStore, parcellation: str, members: pl.DataFrame, parts: pl.DataFrame) -> bool:
    """Whether the graph has edges of this parcellation that it no longer has."""
    ends = ["source", "target"]
    stale = members_of(store, parcellation).join(members, on=ends, how="anti"), parts_of(store, parcellation).join(parts, on=ends, how="anti")
    return any(rows.height > 0 for rows in stale)


def _described(parcellation: Parcellation, own: SitePartition | None = None, site: str = "") -> dict[str, object]:
    """What partitions and blocks have in common."""
    common: dict[str, object] = {
        "parcellation": parcellation.key, "run": parcellation.samples, "model": parcellation.model, "method": parcellation.method,
        "basis": parcellation.basis, "site": own.site if own else site,
    }  # fmt: skip
    return {**common, "dictionary": own.dictionary} if own else common


def _layer(site: str) -> int:
    return parse_site(site).layer


def _partition_node(parcellation: Parcellation, own: SitePartition) -> dict[str, object]:
    return {
        "key": partition_key(parcellation.key, own.site), **_described(parcellation, own), "level": own.chosen,
        "n_blocks": _n_blocks(own.levels[own.chosen]), "settings": _json(parcellation.settings), "notes": _json(own.notes),
    }  # fmt: skip


def _kind(parcellation: Parcellation) -> str:
    return HEAD if parcellation.method == "heads" else ROI


def _block_nodes(parcellation: Parcellation, description: Description | None) -> pl.DataFrame:
    """One row per block of every site: those of its levels, the dead features', the error node's."""
    rows = []
    for own in parcellation.sites.values():
        common = _described(parcellation, own)
        for i, level in enumerate(own.levels):
            sizes = np.bincount(level.labels, minlength=_n_blocks(level))
            rows += [
                {
                    **common, "key": block_key(parcellation.key, own.site, _kind(parcellation), i, b), "kind": _kind(parcellation), "level": i,
                    "layer": _layer(own.site), "chosen": i == own.chosen, "index": b, "size": int(size),
                }
                for b, size in enumerate(sizes)
            ]  # fmt: skip
        rows += _standing_blocks(parcellation, own)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    if description is None:
        return frame
    known = description.blocks.drop("size").with_columns(label=pl.coalesce("label", "automatic_label")).rename({"block": "index"})
    for frames, column, value in ((description.exemplars, "top_features", "feature"), (description.contexts, "contexts", "text")):
        known = known.join(_lists(frames, value, column), on=["site", "level", "index"], how="left")
    known = known.with_columns(pl.lit(_kind(parcellation)).alias("kind"))
    joined = frame.join(known, on=["site", "kind", "level", "index"], how="left", suffix="_known", maintain_order="left")
    return joined.with_columns(pl.coalesce("label_known", "label").alias("label")).drop("label_known")


def _lists(rows: pl.DataFrame, value: str, column: str) -> pl.DataFrame:
    """A value of each block's rows, in the order of their rank, as a JSON list per block."""
    if value == "text":
        joined = lambda name: pl.col(name).list.join("")
        rows = rows.filter(pl.col("token").is_not_null()).with_columns(
            text=pl.concat_str(joined("before"), pl.lit("【"), "token", pl.lit("】"), joined("after"))
        )
    lists = rows.sort("rank").group_by("site", "level", pl.col("block").alias("index"), maintain_order=True).agg(value)
    texts = [json.dumps(items, ensure_ascii=False) for items in lists[value].to_list()]
    return lists.drop(value).with_columns(pl.Series(column, texts, dtype=pl.String))


def _standing_blocks(parcellation: Parcellation, own: SitePartition) -> list[dict[str, object]]:
    """The blocks that stand at all levels."""
    n_dead = own.d_sae - len(own.features)
    common = {**_described(parcellation, own), "layer": _layer(own.site), "level": -1, "chosen": True, "index": -1}
    dead = {**common, "key": block_key(parcellation.key, own.site, DEAD), "kind": DEAD, "size": n_dead, "label": f"dead features of {own.site}"}
    error = {**common, "key": block_key(parcellation.key, own.site, ERROR), "kind": ERROR, "size": 1, "label": f"error of {own.site}"}
    return [dead, error] if n_dead else [error]


def _feature_nodes(model: str, own: SitePartition) -> pl.DataFrame:
    """The site's features in order of index, then its error node, as the graph knows them; only the error node has a label."""
    number = pl.col("number")
    is_error = number == own.d_sae
    stem = feature_key(model, own.dictionary, own.site, "")
    return pl.DataFrame({"number": range(own.d_sae + 1)}).select(
        key=pl.lit(stem) + pl.when(is_error).then(pl.lit("error")).otherwise(number.cast(pl.String)),
        model=pl.lit(model), dictionary=pl.lit(own.dictionary), site=pl.lit(own.site), layer=pl.lit(_layer(own.site), dtype=pl.Int64),
        kind=pl.when(is_error).then(pl.lit("error")).otherwise(pl.lit("feature")), index=pl.when(is_error).then(-1).otherwise(number),
        label=pl.when(is_error).then(pl.lit(f"error of {own.site}")),
    )  # fmt: skip


def _members(parcellation: Parcellation, own: SitePartition) -> pl.DataFrame:
    """`source` (every node of the site), `target` (its block of the finest level, or the dead features', or the error node's)."""
    finest = own.labels_of(0) if len(own.features) else np.full(own.d_sae, -1, dtype=np.int64)
    stem = block_key(parcellation.key, own.site, _kind(parcellation), 0, 0).removesuffix("0")
    standing = {kind: block_key(parcellation.key, own.site, kind) for kind in (DEAD, ERROR)}
    block = pl.Series([*finest.tolist(), -2], dtype=pl.Int64)
    nodes = _feature_nodes(parcellation.model, own).select(pl.col("key").alias("source"), block.alias("block"))
    target = (
        pl.when(pl.col("block") == -2).then(pl.lit(standing[ERROR])).when(pl.col("block") == -1).then(pl.lit(standing[DEAD]))
        .otherwise(pl.lit(stem) + pl.col("block").cast(pl.String))
    )  # fmt: skip
    return nodes.select("source", target.alias("target"))


def _parts(parcellation: Parcellation, own: SitePartition) -> pl.DataFrame:
    """Which block of the next level each block is part of; those of the coarsest level, and those at all levels, are part of the partition."""
    whole = partition_key(parcellation.key, own.site)
    key = lambda level, block: block_key(parcellation.key, own.site, _kind(parcellation), level, block)
    rows = [(str(block["key"]), whole) for block in _standing_blocks(parcellation, own)]
    for i, level in enumerate(own.levels):
        if i + 1 == len(own.levels):
            rows += [(key(i, b), whole) for b in range(_n_blocks(level))]
            continue
        pairs = np.unique(np.stack([level.labels, own.levels[i + 1].labels]), axis=1)
        if pairs.shape[1] != _n_blocks(level):
            raise NotAPartition(f"level {i + 1} of {own.site} is no coarsening of level {i}: its blocks cannot be part of one another")
        rows += [(key(i, fine), key(i + 1, coarse)) for fine, coarse in pairs.T.tolist()]
    return pl.DataFrame(rows, schema={"source": pl.String, "target": pl.String}, orient="row")


# What blocks drive


def drives_of_sequences(units: Units, weights: Any) -> pl.DataFrame:
    """Attribution between units, aggregated over sequences, as `DRIVES`. weights: (batch, n + 1, n + 1), source × target, y last."""
    values = np.asarray(weights.detach().cpu().numpy() if hasattr(weights, "detach") else weights, dtype=np.float64)
    return drives_frame(units, values.mean(axis=0), np.abs(values).mean(axis=0), (values != 0).sum(axis=0))


def drives_frame(units: Units, mean: FloatArray, magnitude: FloatArray, n: IntArray) -> pl.DataFrame:
    """`DRIVES` from (n + 1, n + 1) arrays: mean over sequences, mean magnitude, how many sequences have any; edges that none has are left out."""
    source, target = np.nonzero(n)
    sizes = units.sizes.numpy()
    total = mean[source, target]
    frame = {"source": source, "target": target, "weight_sum": total, "weight_mean": total / (sizes[source] * sizes[target]),
             "abs_sum": magnitude[source, target], "n": n[source, target]}  # fmt: skip
    return pl.DataFrame(frame).select(pl.col(name).cast(dtype) for name, dtype in DRIVES.items())


def unit_blocks(parcellation: Parcellation, units: Units, level: int | None = None, *, output: str = "y") -> pl.DataFrame:
    """The `Block` of every unit, in the units' order, y last: key, site, kind, level, index, size, label, …

    units: those of `parcellation.units(…, level)`. output: what y is called. Raises `NotUnits` for other units.
    """
    rows: list[dict[str, object]] = []
    for site in units.graph.sites:
        if site == OUTPUT:
            continue
        own, numbers = parcellation.sites.get(site.name), units.at(site)
        rows += _whole_site(parcellation, site.name) if own is None else _site_units(parcellation, own, level)
        if len(rows) != numbers.stop:
            raise NotUnits(f"{site.name} has {len(numbers)} units, which are not the blocks of parcellation {parcellation.key} at that level")
    y = {**_described(parcellation, site=OUTPUT.name), "key": block_key(parcellation.key, OUTPUT.name, OUTPUT_BLOCK), "kind": OUTPUT_BLOCK,
         "layer": -1, "level": -1, "chosen": True, "index": -1, "label": output}  # fmt: skip
    frame = pl.DataFrame([*rows, y], infer_schema_length=None)
    return frame.with_columns(pl.Series("size", units.sizes.numpy()))


def _site_units(parcellation: Parcellation, own: SitePartition, level: int | None) -> list[dict[str, object]]:
    at = own.chosen if level is None else level
    blocks = [
        {
            **_described(parcellation, own), "key": block_key(parcellation.key, own.site, _kind(parcellation), at, b), "kind": _kind(parcellation),
            "level": at, "layer": _layer(own.site), "chosen": at == own.chosen, "index": b,
        }
        for b in range(int(own.labels_of(at).max(initial=-1)) + 1)
    ]  # fmt: skip
    return [*blocks, *_standing_blocks(parcellation, own)]


def _whole_site(parcellation: Parcellation, site: str) -> list[dict[str, object]]:
    common = {**_described(parcellation, site=site), "layer": _layer(site), "level": -1, "chosen": True, "index": -1}
    labels = {WHOLE: f"all features of {site}", ERROR: f"error of {site}"}
    return [{**common, "key": block_key(parcellation.key, site, kind), "kind": kind, "label": label} for kind, label in labels.items()]


def write_drives(
    store: GraphStore, run: str, parcellation: Parcellation, units: Units, drives: Any, *, level: int | None = None, output: str = "y"
) -> int:
    """What the blocks of one level drive in a run, in place of what the graph had of it; how many edges. Idempotent.

    run: whose sequences and settings these are. drives: a frame `DRIVES` (`drives_frame`), or weights (batch, n + 1, n + 1) of sequences. The
    blocks of partitioned sites must have been written (`write_regions`); those of other sites, and y, are added here. Raises `NotUnits`.
    """
    rows = drives if isinstance(drives, pl.DataFrame) else drives_of_sequences(units, drives)
    blocks = _written_units(store, parcellation, units, level, output)
    keys = blocks["key"]
    edges = rows.with_columns(source=keys.gather(rows["source"]), target=keys.gather(rows["target"]), run=pl.lit(run))
    forget_drives(store, run, parcellation.key, keys.to_list())
    store.merge_edges("DRIVES", edges)
    return edges.height


def _written_units(store: GraphStore, parcellation: Parcellation, units: Units, level: int | None, output: str) -> pl.DataFrame:
    """`unit_blocks`, with those in the graph that no partition has."""
    blocks = unit_blocks(parcellation, units, level, output=output)
    sites = [name for name in blocks["site"].unique() if name not in parcellation.sites]
    store.merge_nodes("Block", blocks.filter(pl.col("site").is_in(sites)).drop("dictionary"))
    return blocks


# Circuits of blocks


def write_region_circuit(
    store: GraphStore, run: str, parcellation: Parcellation, units: Units, edges: Sequence[tuple[int, int]] | IntArray, weights: FloatArray,
    *, strengths: FloatArray | None = None, level: int | None = None, output: str = "y", threshold: float | None = None, task: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """A `Circuit` whose nodes are blocks, with its `IN_CIRCUIT` and `CIRCUIT_EDGE`s; returns its key. Idempotent.

    edges: (n, 2) source and target units. weights: (n + 1, n + 1), the mean attribution between units, of which the edges' are kept. strengths: the
    numbers that edges were chosen by, mean magnitudes; |weights| unless given. threshold: the least of them that was kept, where there is one.
    settings: what else determined the attributions (the baseline), JSON-able; with blocks and edges it makes the key, which rounding of the weights
    does not change. Blocks and run must have been written. Scores are written by `scores.write_scores`.
    """
    ends = np.unique(np.asarray(edges, dtype=np.int64).reshape(-1, 2), axis=0)
    blocks = _written_units(store, parcellation, units, level, output)
    keys = blocks["key"].to_list()
    weight = np.asarray(weights, dtype=np.float64)[ends[:, 0], ends[:, 1]]
    listed = [(keys[source], keys[target]) for source, target in ends.tolist()]
    strength = np.abs(weight) if strengths is None else np.asarray(strengths, dtype=np.float64)[ends[:, 0], ends[:, 1]]
    by = "weight_sum" if strengths is None else "abs_sum"
    content = _json({"parcellation": parcellation.key, "run": run, "level": level, "by": by, "edges": listed, **(settings or {})})
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    nodes = np.unique(ends)
    roots = {site.name for site in units.graph.sites if site != OUTPUT and not units.graph.parents(site)}
    role = ["output" if unit == units.output else "input" if blocks["site"][unit] in roots else "inner" for unit in nodes.tolist()]
    n_nodes, n_edges = len(nodes), len(ends)
    row = {
        "key": key, "run": run, "threshold": threshold, "by": by, "n_nodes": n_nodes, "n_edges": n_edges,
        "average_degree": 2 * n_edges / n_nodes if n_nodes else 0.0, "density": 2 * n_edges / (n_nodes * (n_nodes - 1)) if n_nodes > 1 else 0.0,
        "task": task, "description": f"blocks of parcellation {parcellation.key} ({parcellation.method})",
        "settings": _json({"parcellation": parcellation.key, "level": level, "output": output, **(settings or {})}),
    }  # fmt: skip
    store.merge_nodes("Circuit", pl.DataFrame([row]))
    store.merge_edges("OF_RUN", pl.DataFrame({"source": [key], "target": [run]}))
    members = {"source": [keys[unit] for unit in nodes.tolist()], "target": [key] * n_nodes, "role": role}
    store.merge_edges("IN_CIRCUIT", pl.DataFrame(members, schema=dict.fromkeys(members, pl.String)))
    links = pl.DataFrame(listed, schema={"source": pl.String, "target": pl.String}, orient="row")
    store.merge_edges("CIRCUIT_EDGE", links.with_columns(circuit=pl.lit(key), weight=pl.Series(weight), strength=pl.Series(strength)))
    return key
