"""An atlas without a model: two runs that share features, with everything that hangs on a run, so that what is copied or pruned can be counted.

Features f0 … f9 of one dictionary (layers 0 and 1, five each), the error node `e`, the output `y`; runs `one` (sequences s0, s1, s2), `two` (s2, s3).
Edges of `one`: fi → f(i+5) in each of its sequences, f(i+5) → y. Of `two`: f0 → f5, f0 → f9, f9 → y, e → y. Communities of both hold f0, f5, f9, f4.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
from featlas.queries.runs import aggregate
from featlas.queries.samples import SampleRun, SampleStore
from featlas.queries.schema import block_key, feature_key, output_key, partition_key, score_key
from featlas.queries.statistics import RunRecord, SiteRecord, StatisticsStore
from featlas.queries.store import GraphStore, SequenceCommit, open_graph
from scipy import sparse

MODEL, DICTIONARY = "micro@0", "dic"
SEQUENCES = {"one": ("s0", "s1", "s2"), "two": ("s2", "s3")}
STATISTICS_RUN = "stats1"


def feature(i: int) -> str:
    return feature_key(MODEL, DICTIONARY, f"resid_{i // 5}", i)


ERROR, OUTPUT = feature_key(MODEL, DICTIONARY, "resid_0", "error"), output_key(MODEL, "logit_diff")


def edges_of(run: str, sequence: str) -> pl.DataFrame:
    """The edges of a run in one sequence; weights are different everywhere."""
    if run == "one":
        ends = [*((feature(i), feature(i + 5)) for i in range(5)), *((feature(i + 5), OUTPUT) for i in range(5))]
    else:
        ends = [(feature(0), feature(5)), (feature(0), feature(9)), (feature(9), OUTPUT), (ERROR, OUTPUT)]
    n = int(sequence[1:]) + 1
    weights = [(-1) ** i * (i + 1) * n / 8 for i in range(len(ends))]
    return pl.DataFrame({"source": [a for a, _ in ends], "target": [b for _, b in ends], "weight": weights})


def write_graph(store: GraphStore, runs: tuple[str, ...] = ("one", "two")) -> None:
    """The whole graph of these runs."""
    _nodes(store, runs)
    for run in runs:
        _run(store, run)
        _circuit(store, run)
        _blocks(store, run)


def _nodes(store: GraphStore, runs: tuple[str, ...]) -> None:
    store.merge_nodes("Model", pl.DataFrame([{"key": MODEL, "name": "micro", "revision": "0", "family": "llama", "n_layers": 2, "d_model": 8}]))
    shared = {"model": MODEL, "dictionary": DICTIONARY}
    nodes = [{"key": feature(i), **shared, "site": f"resid_{i // 5}", "layer": i // 5, "kind": "feature", "index": i} for i in range(10)]
    if "two" in runs:
        nodes.append({"key": ERROR, **shared, "site": "resid_0", "layer": 0, "kind": "error", "index": -1})
    nodes.append({"key": OUTPUT, "model": MODEL, "dictionary": "-", "site": "y", "layer": -1, "kind": "output", "index": -1})
    store.merge_nodes("Feature", pl.DataFrame(nodes))
    statistics = {"frequency": 0.5, "mean_activation": 1.0, "statistics_run": STATISTICS_RUN, "label": "café \"x\"\n日本", "label_kind": "hand"}
    store.merge_nodes("Feature", pl.DataFrame([{"key": feature(0), **statistics}]))
    store.merge_edges("OF_MODEL", pl.DataFrame({"source": [feature(i) for i in range(10)], "target": [MODEL] * 10}))


def _run(store: GraphStore, run: str) -> None:
    sequences = SEQUENCES[run]
    text = [{"key": s, "task": "t", "clean": f"clean {s}\n🙂", "corrupt": "c", "answer": " a", "wrong_answer": " b"} for s in sequences]
    store.merge_nodes("Sequence", pl.DataFrame(text))
    edges = {s: edges_of(run, s) for s in sequences}
    settings = {"batch_size": 2, "statistics_run": STATISTICS_RUN if run == "one" else None}
    described = {
        "key": run, "model": MODEL, "dictionaries": json.dumps({"resid_0": DICTIONARY, "resid_1": DICTIONARY}), "task": "t",
        "method": "integrated gradients", "steps": 2, "metric": "logit_diff", "baseline": "mean", "threshold": 0.0, "aggregation": "sum",
        "sites": json.dumps(["resid_0", "resid_1"]), "status": "done", "seed": 0, "version": "1", "n_planned": len(sequences),
        "n_sequences": len(sequences), "n_edges": sum(frame.height for frame in edges.values()), "settings": json.dumps(settings),
    }  # fmt: skip
    store.merge_nodes("Run", pl.DataFrame([described]))
    store.merge_edges("OF_MODEL", pl.DataFrame({"source": [run], "target": [MODEL]}))
    store.commit_sequences([SequenceCommit(run, s, edges[s], {"metric_clean": 1.5, "metric_corrupt": None}) for s in sequences])
    stored = store.read_edges("ATTRIBUTES", run=run)
    store.merge_edges("INFLUENCES", aggregate(stored, len(sequences)).with_columns(run=pl.lit(run)))
    store.merge_edges("ABLATED", pl.DataFrame({
        "source": [feature(0)], "target": [run], "metric": ["logit_diff"], "baseline": ["zero"], "effect": [0.25], "n": [2],
    }))  # fmt: skip


def _circuit(store: GraphStore, run: str) -> None:
    circuit = f"circuit-{run}"
    store.merge_nodes("Circuit", pl.DataFrame([{
        "key": circuit, "run": run, "threshold": 0.5, "by": "abs_weight", "n_nodes": 3, "n_edges": 2, "average_degree": 2 / 3, "density": 0.5,
        "faithfulness": 0.75, "task": "t", "description": f"of {run}",
    }]))  # fmt: skip
    members = [feature(0), feature(5), OUTPUT]
    store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": members, "target": [circuit] * 3, "role": ["input", "", "output"]}))
    store.merge_edges("CIRCUIT_EDGE", pl.DataFrame({
        "source": members[:2], "target": members[1:], "circuit": [circuit] * 2, "weight": [0.5, 1.0], "strength": [0.5, 1.0],
    }))  # fmt: skip
    store.merge_edges("OF_RUN", pl.DataFrame({"source": [circuit], "target": [run]}))
    identity = (circuit, "faithfulness", "edges", "logit_diff", "mean", "mean_of_ratios", "found", 0, "t", "attribution")
    names = ("subject", "kind", "ablation", "metric", "baseline", "averaging", "split", "seed", "task", "method")
    score = {"key": score_key(*identity), **dict(zip(names, identity)), "value": 0.75, "low": 0.5, "high": 1.0, "n": 2, "undefined_n": 0}
    store.merge_nodes("Score", pl.DataFrame([score]))
    store.merge_edges("SCORED", pl.DataFrame({"source": [circuit], "target": [score["key"]]}))


def _blocks(store: GraphStore, run: str) -> None:
    """A partition of a run into communities: two blocks of two features each."""
    parcellation = f"communities-{run}"
    partition = partition_key(parcellation, "graph")
    shared = {"parcellation": parcellation, "run": run, "model": MODEL, "method": "leiden", "basis": "effective", "site": "graph", "level": 0}
    store.merge_nodes("Partition", pl.DataFrame([{"key": partition, **shared, "n_blocks": 2}]))
    keys = [block_key(parcellation, "graph", "community", 0, i) for i in range(2)]
    store.merge_nodes("Block", pl.DataFrame([{"key": key, **shared, "kind": "community", "index": i, "size": 2} for i, key in enumerate(keys)]))
    members = [feature(0), feature(5), feature(9), feature(4)]
    store.merge_edges("MEMBER_OF", pl.DataFrame({"source": members, "target": [keys[0], keys[0], keys[1], keys[1]]}))
    store.merge_edges("PART_OF", pl.DataFrame({"source": keys, "target": [partition] * 2}))
    store.merge_edges("OF_RUN", pl.DataFrame({"source": [partition], "target": [run]}))
    drives = {"source": [keys[0]], "target": [keys[1]], "run": [run], "weight_sum": [1.0], "weight_mean": [0.25], "abs_sum": [1.0], "n": [2]}
    store.merge_edges("DRIVES", pl.DataFrame(drives))


def write_statistics(statistics: StatisticsStore, runs: tuple[str, ...] = ("one", "two")) -> None:
    """A statistics run that the graph's features name, and the measured scores and effects of the runs' circuits."""
    site = SiteRecord("resid_0", 0, DICTIONARY, 8, 5)
    statistics.start_run(RunRecord(STATISTICS_RUN, MODEL, "corpus", "hash", "activation", (site,), 4, {}, "1"))
    rows = pl.DataFrame([{
        "site": "resid_0", "layer": 0, "kind": "feature", "feature": i, "key": feature(i), "live": True, "count": 2, "frequency": 0.5, "mean": 1.0,
        "variance": 0.5, "minimum": 0.0, "maximum": 3.0, "mean_active": 2.0, "mean_magnitude": 1.0,
    } for i in range(5)])  # fmt: skip
    statistics.finish_run(STATISTICS_RUN, 4, 40, {"feature_statistics": [rows]})
    for run in runs:
        shared = {"run": run, "metric": "logit_diff", "baseline": "mean", "split": "found", "draw": 0, "sequence": SEQUENCES[run][0], "task": "t"}
        statistics.write_effects(pl.DataFrame([{**shared, "circuit": f"circuit-{run}", "source": feature(0), "target": feature(5), "effect": 0.5}]))
        score = {"subject": f"circuit-{run}", "method": "attribution", "ablation": "edges", "part": "circuit", "size": 2, "value": 1.0}
        statistics.write_scores(pl.DataFrame([{**shared, **score, "full_value": 2.0, "empty_value": 0.0}]))
    given = {"kind": "hand", "rule": "", "source": ""}
    label = {"key": feature(0), "model": MODEL, "site": "resid_0", "feature": 0, "label": "café \"x\"\n日本", **given}
    statistics.replace("feature_labels", pl.DataFrame([label]).with_columns(written=pl.lit(statistics.now())), ("key", "kind", "rule", "source"))


def write_samples(atlas: Path, key: str = "samples1") -> None:
    """A run of samples of one site: six tokens."""
    sequences = pl.DataFrame({"sequence": [0, 1], "key": ["a", "b"], "task": ["t", "t"], "label": [None, None], "text": ["x", "y"]},
                             schema_overrides={"label": pl.String})  # fmt: skip
    tokens = pl.DataFrame({"sequence": [0, 0, 0, 1, 1, 1], "position": [0, 1, 2] * 2, "text": list("abcdef")})
    run = SampleRun(key, MODEL, "activation", "t", {"resid_0": DICTIONARY}, 2, 6, {}, sequences)
    values = sparse.csr_matrix((np.arange(30).reshape(6, 5) % 7 == 0).astype(np.float32))
    with SampleStore(atlas).writing(key) as writer:
        writer.add_tokens(tokens)
        writer.add("resid_0", values)
        writer.finish(run)


def write_atlas(atlas: Path, runs: tuple[str, ...] = ("one", "two"), *, samples: bool = False) -> Path:
    """The atlas in a folder, manifests included."""
    atlas.mkdir(parents=True, exist_ok=True)
    with open_graph(atlas) as store:
        write_graph(store, runs)
    with StatisticsStore(atlas) as statistics:
        write_statistics(statistics, runs)
    (atlas / "runs").mkdir(exist_ok=True)
    for run in runs:
        manifest = {"run": run, "status": "done", "model": MODEL, "deterministic": True, "device": "cpu"}
        (atlas / "runs" / f"{run}.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    if samples:
        write_samples(atlas)
    return atlas
