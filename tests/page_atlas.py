"""An atlas made by hand for the tests of pages: one run whose positions were kept, hostile labels and tokens, statistics, samples, a community."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from featlas.ingest.pipeline import finish_run
from featlas.queries.samples import SampleRun, SampleStore, SiteSamples
from featlas.queries.schema import block_key, feature_key, output_key, partition_key
from featlas.queries.statistics import RunRecord, SiteRecord, StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from scipy import sparse

from .layered_circuit import HOSTILE

MODEL, RUN, STATISTICS = "m@1", "run0123456789", "stat0123456789"
SITES = ("resid_0", "resid_4", "resid_8")
LAYERS = (0, 4, 8)
SEQUENCES = {"seq-a": ["The", " dogs", " near", " <b>it", "</script>"], "seq-b": ["A", " cat", "\u2028", ' "quoted"', " ran"]}
NAMES = {
    ("resid_0", 0): HOSTILE, ("resid_0", 1): "</script><b>bold", ("resid_4", 0): 'quotes " and \' and \u2028 and ${x}', ("resid_4", 1): "plain name",
}  # fmt: skip


def key_of(site: str, index: int | str) -> str:
    return output_key(MODEL, "logit_diff") if site == "y" else feature_key(MODEL, "d", site, index)


@dataclass(frozen=True)
class PageAtlas:
    """`edges`: of all sequences, one row an edge: `sequence, source, target, src_pos, dest_pos, weight`. `values`: (n_tokens, n) per site."""

    folder: Path
    edges: pl.DataFrame
    values: dict[str, np.ndarray]


def page_atlas(folder: Path, *, per_site: int = 6, density: float = 0.5, seed: int = 0) -> PageAtlas:
    """The atlas in `folder`: `per_site` features a site, each edge between neighbouring sites there with probability `density`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    edges = _edges(rng, per_site, density)
    values = {site: np.maximum(rng.normal(0, 1, (10, per_site)), 0).round(3).astype(np.float32) for site in SITES}
    with open_graph(folder) as store:
        _graph(store, edges, per_site)
        finish_run(store, RUN)
        _community(store, per_site)
    with StatisticsStore(folder) as statistics:
        _statistics(statistics, values, per_site)
    _samples(folder, values, per_site)
    return PageAtlas(folder, edges, values)


def _edges(rng: np.random.Generator, per_site: int, density: float) -> pl.DataFrame:
    """Edges from each site to the next, and of the last site to the output. A feature stands at one position, the later the later its site."""
    position = lambda site, i: 4 if site == "y" else SITES.index(site) + (i % 2 if i != "error" else 0)
    rows = []
    for sequence in SEQUENCES:
        for below, above in itertools.pairwise((*SITES, "y")):
            for u in [*range(per_site), "error"]:
                for v in [*range(per_site), "error"] if above != "y" else [-1]:
                    if rng.random() < density or above == "y":
                        p, q = position(below, u), position(above, v)
                        rows.append((sequence, key_of(below, u), key_of(above, v), p, q, float(rng.pareto(1.5) * rng.choice([-1, 1]) + 1e-3)))
    return pl.DataFrame(rows, schema=["sequence", "source", "target", "src_pos", "dest_pos", "weight"], orient="row")


def _graph(store: GraphStore, edges: pl.DataFrame, per_site: int) -> None:
    store.merge_nodes("Model", pl.DataFrame([{"key": MODEL, "name": "m", "revision": "1", "family": "llama", "n_layers": 9, "d_model": 8}]))
    nodes = [
        {"key": key_of(site, i), "model": MODEL, "dictionary": "d", "site": site, "layer": layer, "kind": "error" if i == "error" else "feature",
         "index": -1 if i == "error" else i, "label": NAMES.get((site, i)), "label_kind": "hand" if (site, i) in NAMES else None}
        for site, layer in zip(SITES, LAYERS) for i in [*range(per_site), "error"]
    ]  # fmt: skip
    output = {"key": key_of("y", -1), "model": MODEL, "dictionary": "-", "site": "y", "layer": -1, "kind": "output", "index": -1}
    store.merge_nodes("Feature", pl.DataFrame([*nodes, output], infer_schema_length=None))
    store.merge_nodes("Sequence", pl.DataFrame([
        {"key": key, "task": "kind", "clean": "".join(tokens), "corrupt": "other", "answer": " yes", "wrong_answer": " no"}
        for key, tokens in SEQUENCES.items()
    ]))  # fmt: skip
    store.merge_nodes("Run", pl.DataFrame([{
        "key": RUN, "model": MODEL, "dictionaries": '{"resid_0": "d", "resid_4": "d", "resid_8": "d"}', "task": "kind",
        "method": "attribution patching", "steps": 1, "metric": "logit_diff", "baseline": "counterfactual", "threshold": 0.0,
        "aggregation": "keep", "status": "running", "seed": 0,
        "n_planned": 2, "settings": '{"roots": ["resid_0"], "batch_size": 1}',
    }]))  # fmt: skip
    for key, own in edges.group_by("sequence", maintain_order=True):
        store.commit_sequence(RUN, str(key[0]), own.drop("sequence"), {"metric_clean": 2.0, "metric_corrupt": -1.0})


def _community(store: GraphStore, per_site: int) -> None:
    """Two communities: the first feature of every site, and all others."""
    shared = {"parcellation": "parts0123", "run": RUN, "model": MODEL, "method": "leiden", "basis": "effective", "site": "", "level": 0}
    partition = {**shared, "key": partition_key("parts0123", ""), "n_blocks": 2, "settings": "{}", "notes": '{"modularity": 0.5}'}
    store.merge_nodes("Partition", pl.DataFrame([partition]))
    blocks = [block_key("parts0123", "", "community", 0, i) for i in (0, 1)]
    store.merge_nodes("Block", pl.DataFrame([
        {**shared, "key": block, "kind": "community", "chosen": True, "index": i, "size": 3 if i else 3 * per_site - 3, "label": f"part {i}"}
        for i, block in enumerate(blocks)
    ]))  # fmt: skip
    members = [(key_of(site, i), blocks[int(i == 0)]) for site in SITES for i in range(per_site)]
    store.merge_edges("MEMBER_OF", pl.DataFrame(members, schema=["source", "target"], orient="row"))
    store.merge_edges("PART_OF", pl.DataFrame({"source": blocks, "target": [partition_key("parts0123", "")] * 2}))


def _statistics(statistics: StatisticsStore, values: dict[str, np.ndarray], per_site: int) -> None:
    sites = tuple(SiteRecord(site, layer, "d", 8, per_site) for site, layer in zip(SITES, LAYERS))
    statistics.start_run(RunRecord(STATISTICS, MODEL, "kind", "hash", "activation", sites, 2, {}, "0"))
    moments, contexts = [], []
    for site, layer in zip(SITES, LAYERS):
        for i in range(per_site):
            own = values[site][:, i].astype(float)
            moments.append({
                "site": site, "layer": layer, "kind": "feature", "feature": i, "key": key_of(site, i), "live": True, "count": int((own > 0).sum()),
                "frequency": float((own > 0).mean()), "mean": own.mean(), "variance": own.var(), "minimum": own.min(), "maximum": own.max(),
                "mean_active": own[own > 0].mean() if (own > 0).any() else 0.0, "mean_magnitude": own.mean(),
            })  # fmt: skip
            for rank, row in enumerate(np.argsort(-own, kind="stable")[:3].tolist()):
                sequence, position = list(SEQUENCES)[row // 5], row % 5
                tokens = SEQUENCES[sequence]
                contexts.append({
                    "site": site, "feature": i, "rank": rank, "value": own[row], "sequence": row // 5, "sequence_key": sequence, "position": position,
                    "token_ids": [0], "before": tokens[:position], "token": tokens[position], "after": tokens[position + 1 :],
                })  # fmt: skip
    statistics.finish_run(STATISTICS, 2, 10, {"feature_statistics": [pl.DataFrame(moments)], "contexts": [pl.DataFrame(contexts)]})


def _samples(folder: Path, values: dict[str, np.ndarray], per_site: int) -> None:
    """The first sequence alone, at the same activations."""
    sequences = pl.DataFrame({"sequence": [0], "key": ["seq-a"], "task": ["kind"], "label": [None], "text": ["".join(SEQUENCES["seq-a"])]})
    run = SampleRun("samples01", MODEL, "activation", "kind", dict.fromkeys(SITES, "d"), 1, 5, {}, sequences)
    rows = np.arange(5)
    one = np.zeros(5, dtype=np.int64)  # all of one sequence, of one group
    made = [SiteSamples(site, "d", per_site, sparse.csr_matrix(values[site][:5]), one, rows, one) for site in SITES]
    SampleStore(folder).write(run, made, SEQUENCES["seq-a"])
