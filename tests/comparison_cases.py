"""Small layered graphs to compare: drawn at random, permuted, rewired."""

from dataclasses import replace

import numpy as np
import polars as pl
from featlas.analysis.graph_sides import GraphSide


def layered(seed: int = 0, *, sizes: tuple[int, ...] = (6, 6, 6), density: float = 0.4, model: str = "m", output: bool = True) -> GraphSide:
    """Sites resid_0, resid_1, … of features, edges from each to the next, the last into y; signed weights of magnitudes that all differ."""
    rng = np.random.default_rng(seed)
    rows = [(f"{model}|d|resid_{site}|{i}", f"resid_{site}", site, "feature", i, site + 1) for site, n in enumerate(sizes) for i in range(n)]
    if output:
        rows.append((f"{model}|-|y|logit_diff", "y", -1, "output", -1, len(sizes) + 1))
    nodes = pl.DataFrame(rows, schema=["key", "site", "layer", "kind", "index", "order"], orient="row")
    order = nodes["order"].to_numpy()
    drawn = (rng.random((len(rows), len(rows))) < density) | (nodes["kind"] == "output").to_numpy()
    source, target = np.nonzero((order[None] == order[:, None] + 1) & drawn)
    strength = rng.permutation(len(source)) + 1.0
    weight = strength * rng.choice([-1.0, 1.0], len(source))
    side = GraphSide(f"graph {seed}", f"run{seed}", model, nodes, source, target, weight, strength, ("resid_0",))
    return without_isolated(side)


def without_isolated(side: GraphSide) -> GraphSide:
    """The side without nodes that have no edge."""
    used = np.zeros(side.n, dtype=bool)
    used[side.source] = used[side.target] = True
    number = np.cumsum(used) - 1
    return replace(side, nodes=side.nodes.filter(used), source=number[side.source], target=number[side.target])


def renamed(side: GraphSide, seed: int, model: str = "other") -> tuple[GraphSide, pl.DataFrame]:
    """The same graph with its features' indexes permuted inside their sites, of another model; and the matching from the first to it."""
    rng = np.random.default_rng(seed)
    index = side.nodes["index"].to_numpy().copy()
    for site in range(1, int(side.order.max()) + 1):
        here = np.flatnonzero((side.order == site) & (side.nodes["kind"] == "feature").to_numpy())
        index[here] = rng.permutation(index[here])
    keys = [
        f"{model}|d|{site}|{i}" if kind == "feature" else f"{model}|-|y|logit_diff"
        for site, kind, i in zip(side.nodes["site"], side.nodes["kind"], index, strict=True)
    ]
    matched = pl.DataFrame({"source": side.nodes["key"], "target": keys}).filter(side.nodes["kind"] == "feature").with_columns(score=pl.lit(0.9))
    nodes = side.nodes.with_columns(key=pl.Series(keys), index=pl.Series(index))
    order = nodes.with_row_index("row").sort("order", "key")["row"].to_numpy()
    number = np.empty(side.n, dtype=np.int64)
    number[order] = np.arange(side.n)
    other = replace(side, name="renamed", run="other", model=model, nodes=nodes[order], source=number[side.source], target=number[side.target])
    return other, matched
