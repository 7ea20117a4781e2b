"""Attribution graphs of circuit-tracer as a run of the atlas, so that they are queried, cut, compared and shown as measured edges are.

1. `read_attribution_graph` reads each file (`model/attribution_graphs.py` says what becomes of which node).
2. `_plan`: the files of one model and its dictionaries are one run, each of them one of its sequences; everything has a key made of content.
3. Nodes and the run are merged, each file's links are committed with its mark, in one transaction.
4. `close_run` derives `INFLUENCES`: means over the files, a link that a file lacks counting 0.

Done again nothing changes: files that are in are passed over.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import polars as pl

from ..errors import UserError
from ..model.attribution_graphs import OWN, AttributionGraph, read_attribution_graph
from ..model.sites import EMBED, OUTPUT
from ..queries import runs
from ..queries.known import known_keys
from ..queries.schema import feature_key, output_key
from ..queries.store import GraphStore, SequenceCommit
from .closing import close_run

METHOD = "circuit-tracer"
REVISION = "circuit-tracer"  # of a model that a file names without a revision
TOKENS = "tokens"  # the dictionary of `embed`: one feature for each token of the vocabulary
ERROR_INPUTS = "error"  # among a run's `roots`: its error nodes are inputs, nothing enters them


class DifferentModels(UserError):
    """Files that name different models or dictionaries are no one run."""


class SameSequence(UserError):
    """Two files are of one prompt by one name."""


@dataclass(frozen=True)
class ImportOptions:
    """`model`: the key of the model, `name@revision`, instead of the files' `scan`; `dictionaries`: the id of its dictionaries; `task`: what to call
    the sequences' task instead of circuit-tracer."""

    model: str | None = None
    dictionaries: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class ImportSummary:
    """What was written: `n_new` of `n_sequences` files were not in the graph before; edges and nodes are those of all files."""

    run: str
    model: str
    n_sequences: int
    n_new: int
    n_nodes: int
    n_edges: int
    n_influences: int


@dataclass(frozen=True)
class _File:
    """One file with keys: `features` are rows of `Feature`, `edges` as `ATTRIBUTES` are written."""

    graph: AttributionGraph
    sequence: str
    features: pl.DataFrame
    edges: pl.DataFrame
    outputs: dict[str, float]


@dataclass(frozen=True)
class _Plan:
    run: str
    model: str
    n_layers: int
    dictionaries: dict[str, str]
    files: tuple[_File, ...]
    task: str


def import_attribution_graphs(
    store: GraphStore, paths: Sequence[Path], options: ImportOptions | None = None, progress: Callable[[int, int, str], None] | None = None
) -> ImportSummary:
    """Write the files of `paths` into the graph as one run.

    Raises `NotAnAttributionGraph`, `BadAttributionGraph`, `DifferentModels` or `SameSequence` before anything is written.
    """
    plan = _plan([read_attribution_graph(path) for path in paths], options or ImportOptions())
    features = pl.concat([file.features for file in plan.files]).unique("key", keep="first", maintain_order=True)
    n_edges = sum(file.edges.height for file in plan.files)
    done = runs.done_sequences(store, plan.run)
    new = [file for file in plan.files if file.sequence not in done]
    if new or not runs.exists(store, plan.run):
        _write_provenance(store, plan)
        told = pl.col("label").is_not_null() & (pl.col("kind") == "feature") & (pl.col("site") != EMBED.name)
        _merge_new(store, "Feature", features.with_columns(pl.when(told).then(pl.lit("file")).alias("label_kind")))
        store.merge_edges("OF_MODEL", features.select(pl.col("key").alias("source"), pl.lit(plan.model).alias("target")))
    for number, file in enumerate(new):
        store.commit_sequences([SequenceCommit(plan.run, file.sequence, file.edges)])
        if progress is not None:
            progress(number + 1, len(new), file.graph.slug)
    n_influences = close_run(store, plan.run)
    return ImportSummary(plan.run, plan.model, len(plan.files), len(new), features.height, n_edges, n_influences)


def _plan(graphs: Sequence[AttributionGraph], options: ImportOptions) -> _Plan:
    """Everything that is to be written."""
    models = sorted({_model(graph, options) for graph in graphs})
    if len(models) > 1:
        raise DifferentModels(f"the files are of different models, {' and '.join(models[:3])}: import those of each in a call of its own")
    model, task = models[0], options.task or METHOD
    files = tuple(_file(graph, model, task, options) for graph in graphs)
    seen: dict[str, str] = {}
    for file in files:
        if file.sequence in seen:
            raise SameSequence(f"two files are {file.graph.slug!r} with the prompt {file.graph.prompt!r}, one sequence of a run: name one of them")
        seen[file.sequence] = file.graph.slug
    pairs = pl.concat([file.features for file in files]).filter(pl.col("kind") != "output").select("site", "dictionary").unique().sort("site")
    dictionaries = dict(pairs.iter_rows())
    if len(dictionaries) < pairs.height:
        site = next(site for site in dictionaries if pairs.filter(pl.col("site") == site).height > 1)
        ids = pairs.filter(pl.col("site") == site)["dictionary"].to_list()
        raise DifferentModels(f"the files are of different dictionaries at {site}, {' and '.join(ids[:3])}: import each one's in a call of its own")
    content = [model, task, dictionaries, sorted((file.sequence, file.edges.write_csv()) for file in files)]
    run = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
    return _Plan(run, model, max(graph.n_layers for graph in graphs), dictionaries, files, task)


def _model(graph: AttributionGraph, options: ImportOptions) -> str:
    own = graph.metadata.get(OWN, {}).get("model")
    return options.model or own or f"{graph.scan}@{REVISION}"


def _dictionary(graph: AttributionGraph, layer: int, options: ImportOptions) -> str:
    """What the file says of where its features come from: the transcoder of the layer, the set of them, or the scan."""
    info, details, each = (graph.metadata.get(name) or {} for name in ("info", "feature_details", "transcoder_list"))
    if options.dictionaries is not None:
        return options.dictionaries
    if each:
        return str(each[layer] if layer < len(each) else each[-1])
    return str(info.get("transcoder_set") or details.get("neuronpedia_source_set") or graph.scan)


def _file(graph: AttributionGraph, model: str, task: str, options: ImportOptions) -> _File:
    rows = []
    for node in graph.nodes.iter_rows(named=True):
        dictionary = node["dictionary"] or _named_dictionary(node, graph, options)
        key = node["key"] or _key(node, model, dictionary)
        index = -1 if node["kind"] != "feature" else node["index"]
        rows.append({**node, "key": key, "model": model, "dictionary": dictionary, "index": index})
    nodes = pl.DataFrame(rows, schema={**graph.nodes.schema, "model": pl.String})
    features = nodes.select("key", "model", "dictionary", "site", "layer", "kind", "index", "label").unique("key", keep="first", maintain_order=True)
    at = nodes.select("node_id", "key", "pos")
    edges = graph.links.join(at.rename({"node_id": "source", "key": "from", "pos": "src_pos"}), on="source")
    edges = edges.join(at.rename({"node_id": "target", "key": "to", "pos": "dest_pos"}), on="target")
    edges = edges.select(pl.col("from").alias("source"), pl.col("to").alias("target"), "src_pos", "dest_pos", "weight")
    content = json.dumps([METHOD, task, graph.slug, graph.prompt], ensure_ascii=False)
    outputs = nodes.filter((pl.col("kind") == "output") & pl.col("token_prob").is_not_null()).select("key", "token_prob")
    sequence = graph.metadata.get(OWN, {}).get("sequence") or hashlib.sha256(content.encode()).hexdigest()[:24]
    return _File(graph, str(sequence), features, edges.sort("source", "target", "src_pos", "dest_pos"), dict(outputs.iter_rows()))


def _named_dictionary(node: dict[str, object], graph: AttributionGraph, options: ImportOptions) -> str:
    if node["site"] == EMBED.name:
        return TOKENS
    return "-" if node["site"] == OUTPUT.name else _dictionary(graph, int(str(node["layer"])), options)


def _key(node: dict[str, object], model: str, dictionary: str) -> str:
    if node["kind"] == "output":
        return output_key(model, f"logit_{node['index']}")
    return feature_key(model, dictionary, node["site"], "error" if node["kind"] == "error" else int(str(node["index"])))


def _merge_new(store: GraphStore, label: str, rows: pl.DataFrame) -> None:
    """Merge the rows of nodes that the graph does not have yet: what was written about the others stays."""
    new = rows.filter(~pl.col("key").is_in(list(known_keys(store, label, rows["key"].to_list()))))
    if new.height:
        store.merge_nodes(label, new)


def _write_provenance(store: GraphStore, plan: _Plan) -> None:
    """The model, the run and the sequences."""
    name, _, revision = plan.model.partition("@")
    _merge_new(store, "Model", pl.DataFrame([{"key": plan.model, "name": name, "revision": revision, "n_layers": plan.n_layers}]))
    graphs = {file.sequence: file.graph for file in plan.files}
    told = [graph.metadata.get(OWN, {}).get("roots") for graph in graphs.values()]
    roots = sorted({root for some in told for root in some}) if all(told) else [EMBED.name, ERROR_INPUTS]
    settings = {
        "roots": roots, "tokens": {key: list(graph.tokens) for key, graph in graphs.items()},
        "outputs": {key: p for file in plan.files for key, p in file.outputs.items()},
        "files": {key: {k: v for k, v in graph.metadata.items() if k not in ("prompt", "prompt_tokens")} for key, graph in graphs.items()},
    }  # fmt: skip
    run = {
        "key": plan.run, "model": plan.model, "dictionaries": json.dumps(plan.dictionaries), "task": plan.task, "method": METHOD, "metric": "logits",
        "sites": json.dumps(list(plan.dictionaries)), "aggregation": "keep", "status": runs.RUNNING, "version": metadata.version("featlas"),
        "n_planned": len(plan.files), "settings": json.dumps(settings, ensure_ascii=False),
    }  # fmt: skip
    store.merge_nodes("Run", pl.DataFrame([run]))
    store.merge_edges("OF_MODEL", pl.DataFrame({"source": [plan.run], "target": [plan.model]}))
    answers = [file.graph.nodes.filter(pl.col("is_target") & (pl.col("kind") == "output"))["label"].to_list() for file in plan.files]
    rows = [
        {"key": file.sequence, "task": plan.task, "clean": file.graph.prompt, "corrupt": "", "answer": next(iter(answer), ""), "wrong_answer": ""}
        for file, answer in zip(plan.files, answers)
    ]
    _merge_new(store, "Sequence", pl.DataFrame(rows))
