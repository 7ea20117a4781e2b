"""Communities in the graph: one `Partition` over all sites, a `Block` for each community, their members, and scores of what they are worth.

Keys are content hashes: the same communities of the same graph, found the same way, written again change nothing.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import polars as pl

from ..queries.schema import block_key, partition_key
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow
from .communities import Communities, CommunityOptions, EffectiveGraph, FloatArray, IntArray
from .community_ablation import RANDOM, Tested, Treatment
from .faithfulness import HELD_OUT, Averaging
from .scores import merge_scores
from .study import Ablation

BASIS = "effective"
"""`Partition.basis` of communities."""

KIND = "community"
"""`Block.kind` of communities."""

KINDS = {Treatment.REMOVED.value: "completeness", Treatment.ALONE.value: "faithfulness"}
"""`Score.kind`: of what is left without a community, and of the community alone."""

RANDOM_NODES = "random nodes"
"""`Score.method` of random nodes like a community; that of the community itself is the method that found it."""

N_TOP = 10

DESCRIBED = {
    "community": pl.Int64(), "size": pl.Int64(), "n_sites": pl.Int64(), "task": pl.String(), "task_share": pl.Float64(), "within": pl.Float64(),
    "into": pl.Float64(), "out": pl.Float64(), "label": pl.String(), "top_features": pl.List(pl.String()),
}  # fmt: skip
"""One row a community. task: the one that its nodes are most attributed to, task_share: its part in the sum over tasks (each task's strengths summing
to 1 over the graph). within, into, out: the weight of its inner edges, of those that enter it and of those that leave it. top_features: keys of the
strongest nodes."""


def describe(graph: EffectiveGraph, labels: IntArray, tasks: tuple[str, ...], strengths: FloatArray) -> pl.DataFrame:
    """What each community is, as `DESCRIBED`. tasks, strengths (n, n_tasks): of `task_strengths`."""
    n = int(labels.max()) + 1
    of_task = np.zeros((n, len(tasks)))
    np.add.at(of_task, labels, strengths)
    share = of_task / np.maximum(of_task.sum(axis=1, keepdims=True), 1e-300)
    source, target = labels[graph.source], labels[graph.target]
    inner = source == target
    total = lambda which, of: np.bincount(of[which], graph.weight[which], n)
    rows = graph.nodes.with_columns(pl.Series("community", labels), pl.Series("strength", graph.strength))
    by_strength = rows.sort(["community", "strength", "key"], descending=[False, True, False])
    readable = pl.col("site") + pl.lit("/") + pl.when(pl.col("kind") == "feature").then(pl.col("index").cast(pl.String)).otherwise(pl.col("kind"))
    named = by_strength.group_by("community", maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("size"), pl.col("site").n_unique().cast(pl.Int64).alias("n_sites"),
        pl.col("key").head(N_TOP).alias("top_features"), readable.head(3).str.join(", ").alias("_readable"),
    ).sort("community")  # fmt: skip
    best = share.argmax(axis=1) if len(tasks) else np.zeros(n, dtype=np.int64)
    task = [tasks[i] if len(tasks) else None for i in best]
    named = named.with_columns(
        pl.Series("task", task, dtype=pl.String), pl.Series("task_share", share[np.arange(n), best] if len(tasks) else [None] * n, dtype=pl.Float64),
        pl.Series("within", total(inner, source)), pl.Series("into", total(~inner, target)), pl.Series("out", total(~inner, source)),
    )  # fmt: skip
    purpose = pl.format("{} {}%: ", "task", (100 * pl.col("task_share")).round(0).cast(pl.Int64)).fill_null("")
    label = (purpose if len(tasks) > 1 else pl.lit("")) + pl.col("_readable")
    return named.with_columns(label.alias("label")).select(pl.col(name).cast(dtype) for name, dtype in DESCRIBED.items())


@dataclass(frozen=True, slots=True)
class Written:
    """partition: the key of the `Partition`; how many blocks, members and scores it has."""

    partition: str
    n_blocks: int
    n_members: int
    n_scores: int


def communities_key(run: RunRow, graph: EffectiveGraph, communities: Communities, options: CommunityOptions) -> str:
    """A content hash of the graph, of how communities were found in it, and of which nodes are in each."""
    content = [run.key, graph.description, options.method.value, options.resolution, options.n_communities, options.seed]
    members = hashlib.sha256(json.dumps([graph.nodes["key"].to_list(), communities.labels.tolist()]).encode()).hexdigest()
    return hashlib.sha256(json.dumps([*content, members], ensure_ascii=False).encode()).hexdigest()[:24]


def write_communities(
    store: GraphStore, run: RunRow, graph: EffectiveGraph, communities: Communities, options: CommunityOptions, described: pl.DataFrame,
    *, tested: Tested | None = None, notes: dict[str, object] | None = None,
) -> Written:  # fmt: skip
    """Merge the partition, its blocks and members, and the scores of what was tested. `notes`: JSON-able, kept on the partition."""
    key = communities_key(run, graph, communities, options)
    partition = partition_key(key, "")
    shared = {"parcellation": key, "run": run.key, "model": run.model, "method": communities.method.value, "basis": BASIS, "site": "", "level": 0}
    settings = {"graph": graph.description, "resolution": options.resolution, "n_communities": options.n_communities, "seed": options.seed}
    node = {**shared, "key": partition, "n_blocks": communities.n_communities, "settings": json.dumps(settings, sort_keys=True)}
    node["notes"] = json.dumps({**communities.info, "modularity": communities.modularity, "codelength": communities.codelength, **(notes or {})})
    store.merge_nodes("Partition", pl.DataFrame([node]))
    keys = [block_key(key, "", KIND, 0, i) for i in range(communities.n_communities)]
    blocks = described.select(
        pl.Series("key", keys), pl.col("community").alias("index"), "size", "label", pl.col("label").alias("automatic_label"), "task", "task_share",
        pl.Series("top_features", [json.dumps(list(top)) for top in described["top_features"]]),
    ).with_columns(*(pl.lit(value).alias(name) for name, value in shared.items()), kind=pl.lit(KIND), chosen=pl.lit(True))  # fmt: skip
    store.merge_nodes("Block", blocks)
    members = pl.DataFrame({"source": graph.nodes["key"], "target": [keys[i] for i in communities.labels.tolist()]})
    store.merge_edges("MEMBER_OF", members)
    store.merge_edges("PART_OF", pl.DataFrame({"source": keys, "target": [partition] * len(keys)}))
    store.merge_edges("OF_RUN", pl.DataFrame({"source": [partition], "target": [run.key]}))
    n_scores = _write_scores(store, keys, communities, options, tested) if tested is not None else 0
    return Written(partition, len(keys), members.height, n_scores)


def _write_scores(store: GraphStore, keys: list[str], communities: Communities, options: CommunityOptions, tested: Tested) -> int:
    """`Score` nodes of what each tested community is worth, and random nodes like it; the rest is no block and has none."""
    blocks = {part.name: keys[part.community] for part in tested.parts if part.community is not None}
    own = tested.table.with_columns(
        pl.col("part").str.strip_prefix(RANDOM).replace_strict(blocks, default=None, return_dtype=pl.String).alias("subject"),
        pl.when(pl.col("part").str.starts_with(RANDOM)).then(pl.lit(RANDOM_NODES)).otherwise(pl.lit(communities.method.value)).alias("method"),
        pl.col("treatment").replace_strict(KINDS).alias("kind"),
        pl.lit(Ablation.NODE.value).alias("ablation"), pl.lit(tested.metric).alias("metric"), pl.lit(tested.baseline).alias("baseline"),
        pl.lit(Averaging.RATIO_OF_MEANS.value).alias("averaging"), pl.lit(HELD_OUT).alias("split"), pl.lit(options.seed).alias("seed"),
    ).filter(pl.col("subject").is_not_null())  # fmt: skip
    return merge_scores(store, own)
