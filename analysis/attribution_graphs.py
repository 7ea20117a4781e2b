"""A circuit as an attribution graph file: what circuit-tracer's viewer and Neuronpedia open (`model/attribution_graphs.py` has the format).

What fits and what does not:

- The format's `layer` is the row in which the viewer draws a node. Where no two of the circuit's sites share a layer it is the site's layer; else
  each site has a row of its own, numbered in their order. `metadata.featlas.sites` names the rows.
- All features are of type `cross layer transcoder`, the only one that the viewer shows in full, whatever their site is; error nodes are
  `mlp reconstruction error`; features of a dictionary of tokens are `embedding`. Site, kind and key stand in each node's field `featlas`.
- The format knows no sums over positions: without kept positions there are two columns, all positions and the output.
- A logit node must show a probability; where none is known (the output is a metric) it is 1.
- `influence` is circuit-tracer's: the share of all influence that nodes at least as influential hold together; the viewer prunes by it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..errors import UserError
from ..files import write_text
from ..model.attribution_graphs import LOGIT, OWN, SCHEMA_VERSION, TOKEN, TRANSCODER, TRANSCODER_ERROR, pairing
from ..model.sites import EMBED, OUTPUT, parse_site
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import find_run, model_features, run_sequences
from .circuits import NO_POSITION, Circuit, input_roots
from .exchange import node_ids
from .notes import CONTEXTS, feature_notes, strongest_contexts

ALL_POSITIONS, AT_OUTPUT = "all positions", "output"
TOKENS = "tokens"  # the dictionary whose features are tokens
EXAMPLES = "features"  # folder of the features' examples, beside the graph's file


class BadSlug(UserError):
    """A name that cannot be a file's."""


class ExamplesMissing(UserError):
    """Nothing is known of where features are active."""


class TokensMissing(UserError):
    """The text's tokens are not known, or are fewer than positions are used."""


@dataclass(frozen=True)
class GraphSource:
    """What a circuit's own frames do not say.

    `features`: key, dictionary, and where known `label` (as stored) and `name` (what to show) of the circuit's nodes. `tokens`: the sequence's,
    where positions were kept. `examples` (schema `notes.CONTEXTS`): the features' strongest contexts, written as files for the viewer.
    `frequency`: share of tokens on which a feature is active, by key. `outputs`: probabilities of outputs by key.
    """

    model: str
    prompt: str
    features: pl.DataFrame
    tokens: tuple[str, ...] | None = None
    sequence: str | None = None
    scan: str | None = None
    examples: pl.DataFrame | None = None
    frequency: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, float] = field(default_factory=dict)


def graph_source(
    store: GraphStore,
    statistics: StatisticsStore | None,
    circuit: Circuit,
    *,
    tokenize: Callable[[str], Sequence[str]] | None = None,
    examples: bool = False,
    scan: str | None = None,
) -> GraphSource:
    """What the atlas knows of a circuit: names, contexts, the text of its sequence.

    `tokenize` gives a text's tokens where positions were kept and the run does not name them; `examples` asks for the features' contexts, `scan` is
    what to call the model. Raises `ExamplesMissing` where there are none.
    """
    run = find_run(store, circuit.selection.run)
    features = model_features(store, run.model).join(circuit.nodes.select("key").unique(), on="key", how="semi")
    contexts = pl.DataFrame(schema=CONTEXTS)
    measured = statistics.latest_run(run.model, run.dictionaries) if statistics is not None else None
    if statistics is not None and measured is not None:
        contexts = strongest_contexts(statistics, measured.run, features["key"].to_list())
    elif examples:
        way_out = "measure them with `featlas ingest statistics`, or leave --examples out"
        raise ExamplesMissing(f"no statistics of {run.model}'s features in the atlas: {way_out}")
    notes = feature_notes(features, contexts, output=run.metric.replace("_", " "))
    told = notes.filter(~pl.col("name").str.contains(r"^feature -?\d+$")).select("key", "name")
    named = features.select("key", "dictionary", "label").join(told, on="key", how="left", maintain_order="left")
    settings = json.loads(str(run.properties.get("settings") or "{}"))
    sequence = circuit.selection.sequence
    prompt, tokens = circuit.selection.effects_of, None
    if sequence is not None:
        texts = run_sequences(store, run.key).filter(pl.col("key") == sequence)["clean"].to_list()
        prompt = texts[0] if texts else prompt
        tokens = settings.get("tokens", {}).get(sequence)
        if tokens is None and circuit.selection.positions and tokenize is not None:
            tokens = tokenize(prompt)
    frequency = dict(features.filter(pl.col("frequency").is_not_null()).select("key", "frequency").iter_rows())
    return GraphSource(
        run.model, prompt, named, None if tokens is None else tuple(tokens), sequence, scan, contexts if examples else None, frequency,
        settings.get("outputs", {}),
    )  # fmt: skip


def attribution_graph(circuit: Circuit, source: GraphSource, slug: str) -> dict[str, Any]:
    """The file's content. Raises `TokensMissing` where the circuit's positions have no tokens."""
    nodes = _numbered(circuit, source)
    tokens = _tokens(circuit, source)
    rows = _site_rows(circuit)
    ids = dict(nodes.select("id", "node_id").iter_rows())
    links = circuit.edges.select(
        node_ids(pl.col("source"), pl.col("src_pos")).replace_strict(ids).alias("source"),
        node_ids(pl.col("target"), pl.col("dest_pos")).replace_strict(ids).alias("target"), "weight",
    )
    own = {
        "model": source.model, "run": circuit.selection.run, "circuit": circuit.key, "sequence": source.sequence, "roots": input_roots(circuit.nodes),
        "sites": rows, "n_layers": max(parse_site(site).layer for site in rows) + 1, "description": circuit.selection.description,
    }  # fmt: skip
    metadata = {
        "slug": slug, "scan": _scan(source, slug), "transcoder_list": [], "prompt_tokens": list(tokens), "prompt": source.prompt,
        "node_threshold": 1.0, "schema_version": SCHEMA_VERSION, "info": {"description": _described(own, rows), "generator": {"name": "featlas"}},
        OWN: own,
    }  # fmt: skip
    state = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    written = [_node(row, tokens, source) for row in nodes.iter_rows(named=True)]
    return {"metadata": metadata, "qParams": state, "nodes": written, "links": links.to_dicts()}


def write_attribution_graph(circuit: Circuit, source: GraphSource, folder: Path, slug: str) -> Path:
    """Write `folder/SLUG.json`, put it on the list that the viewer reads (`graph-metadata.json`), and write examples where there are any.

    The viewer: `circuit-tracer start-server --graph_file_dir FOLDER`. Returns the graph's file.
    """
    if not slug or any(character in slug for character in "/\\?#%") or slug.startswith("."):
        raise BadSlug(f"--slug {slug!r} cannot be the name of a file and part of an address: use letters, digits and hyphens")
    content = attribution_graph(circuit, source, slug)
    folder.mkdir(parents=True, exist_ok=True)
    if source.examples is not None:
        _write_examples(content, source, folder / EXAMPLES / slug)
    path = folder / f"{slug}.json"
    _write_json(path, content)
    listed = folder / "graph-metadata.json"
    graphs = json.loads(listed.read_text(encoding="utf-8"))["graphs"] if listed.exists() else []
    _write_json(listed, {"graphs": [*(graph for graph in graphs if graph["slug"] != slug), content["metadata"]]})
    return path


def _write_json(path: Path, content: object) -> None:
    """The file appears whole or not at all."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _scan(source: GraphSource, slug: str) -> str:
    """What the viewer asks for a feature's examples: a folder beside the file where they are written, else the model's name as Neuronpedia has it."""
    if source.examples is not None and source.scan is None:
        return f"./data/{EXAMPLES}/{slug}"
    return source.scan or source.model.partition("@")[0]


def _described(own: Mapping[str, Any], rows: Mapping[str, int]) -> str:
    placed = ", ".join(f"{site} in row {row}" for site, row in rows.items() if site not in (EMBED.name, OUTPUT.name))
    return f"{own['description']}. Sites: {placed}."


def _site_rows(circuit: Circuit) -> dict[str, int]:
    """The row of each site: its layer where no two sites share one, else its place among the circuit's sites; the output stands above all."""
    sites = circuit.nodes["site"].unique(maintain_order=True).to_list()
    inner = [site for site in sites if site not in (EMBED.name, OUTPUT.name)]
    layers = [parse_site(site).layer for site in inner]
    rows = dict(zip(inner, layers if len(set(layers)) == len(layers) else range(len(inner))))
    top = max(rows.values(), default=-1)
    return {EMBED.name: -1, **rows, OUTPUT.name: top + 2}


def _tokens(circuit: Circuit, source: GraphSource) -> tuple[str, ...]:
    """The texts of the columns."""
    last = int(circuit.nodes["pos"].max())  # type: ignore[arg-type]
    if last == NO_POSITION:
        return (ALL_POSITIONS, AT_OUTPUT)
    if source.tokens is None or last >= len(source.tokens):
        known = "none" if source.tokens is None else f"only {len(source.tokens)}"
        way_out = "name the model that was measured by --model"
        raise TokensMissing(f"the circuit uses token position {last}, and of the tokens of its text are known {known}: {way_out}")
    return source.tokens


def _numbered(circuit: Circuit, source: GraphSource) -> pl.DataFrame:
    """The nodes with all that is written of them.

    `id` of the frames, `node_id` of the file, `row`, `ctx` (column), `number` (the feature's index, an output's place), `dictionary`, `label` and
    `name` (null where there is none), `cumulative` influence.
    """
    rows = _site_rows(circuit)
    told = [name for name in ("label", "name") if name in source.features.columns]
    known = source.features.select("key", "dictionary", *told).unique("key")
    absent = [pl.lit(None, dtype=pl.String).alias(name) for name in ("label", "name") if name not in told]
    nodes = circuit.nodes.join(known, on="key", how="left", maintain_order="left").with_columns(absent)
    output, pos = pl.col("kind") == "output", pl.col("pos")
    nodes = nodes.with_columns(
        node_ids(pl.col("key"), pos).alias("id"),
        pl.col("site").replace_strict(rows, return_dtype=pl.Int64).alias("row"),
        pl.when(pos != NO_POSITION).then(pos).when(output).then(1).otherwise(0).alias("ctx"),
        pl.when(output).then(pl.col("key").rank("dense").over("kind") - 1).otherwise("index").cast(pl.Int64).alias("number"),
        _cumulative(nodes).alias("cumulative"),
    )
    shown = pl.when(pl.col("site") == EMBED.name).then(pl.lit("E")).otherwise(pl.col("row").cast(pl.String))
    number = pl.when(pl.col("kind") == "error").then(-1).otherwise("number").cast(pl.String)
    nodes = nodes.with_columns(pl.concat_str([shown, number, pl.col("ctx").cast(pl.String)], separator="_").alias("node_id"))
    again = pl.int_range(pl.len()).over("node_id")  # a site may have several dictionaries
    doubled = pl.concat_str("node_id", pl.lit("_"), again.cast(pl.String))
    return nodes.with_columns(pl.when(again > 0).then(doubled).otherwise("node_id").alias("node_id"))


def _cumulative(nodes: pl.DataFrame) -> pl.Series:
    """circuit-tracer's score by which nodes are pruned: sorted by influence, the share of its sum up to and with each node; 0 for the output."""
    inner = (nodes["kind"] != "output").to_numpy()
    influence = np.where(inner, nodes["influence"].fill_null(0.0).to_numpy(), 0.0)
    order = np.argsort(-influence, kind="stable")
    total = influence.sum()
    summed = np.cumsum(influence[order]) / total if total > 0 else np.zeros(len(order))
    score = np.empty(len(order))
    score[order] = np.minimum(summed, 1.0)
    return pl.Series("cumulative", np.where(inner, score, 0.0))


def _node(row: Mapping[str, Any], tokens: Sequence[str], source: GraphSource) -> dict[str, Any]:
    """One node as it is written."""
    kind, site, name = row["kind"], row["site"], row["name"] or row["label"]
    own = {column: row[column] for column in ("key", "site", "kind", "dictionary", "pos")} | {"index": -1 if kind != "feature" else int(row["index"])}
    shared = {
        "node_id": row["node_id"], "layer": "E" if site == EMBED.name else str(row["row"]), "ctx_idx": row["ctx"], "run_idx": 0,
        "reverse_ctx_idx": len(tokens) - 1 - row["ctx"], "token_prob": 0.0, "is_target_logit": False, "influence": row["cumulative"],
        "activation": None, OWN: {**own, "label": row["label"]},
    }  # fmt: skip
    if kind == "output":
        share = source.outputs.get(row["key"], 1.0)
        said = f'Output "{name or "output"}" (p={share:.3f})'
        return {
            **shared, "feature": row["number"], "feature_type": LOGIT, "jsNodeId": f"L_{row['number']}-{row['ctx']}", "clerp": said,
            "token_prob": share, "is_target_logit": row["number"] == 0, "influence": None,
        }  # fmt: skip
    if kind == "error":
        js = f"{shared['layer']}_-1-{row['ctx']}"
        return {**shared, "feature": -1, "feature_type": TRANSCODER_ERROR, "jsNodeId": js, "clerp": f"error of {site}"}
    if site == EMBED.name and row["dictionary"] == TOKENS:
        place = row["ctx"] if row["pos"] != NO_POSITION else row["index"]
        return {**shared, "feature": place, "feature_type": TOKEN, "jsNodeId": f"E_{row['index']}-{row['ctx']}", "clerp": name or ""}
    told = f"{site}/{row['index']}" + (f" {name}" if name else "")
    # the embedding's own features are drawn in the lowest row, of which a pairing has no layer: they go by their index
    feature = int(row["index"]) if site == EMBED.name else pairing(row["row"], int(row["index"]))
    return {**shared, "feature": feature, "feature_type": TRANSCODER, "jsNodeId": f"{shared['layer']}_{row['index']}-0", "clerp": told}


def _write_examples(content: Mapping[str, Any], source: GraphSource, folder: Path) -> None:
    """`FEATURE.json` for each feature that the graph has, in the form that the viewer asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    contexts: dict[str, list[dict[str, Any]]] = {}
    examples = source.examples if source.examples is not None else pl.DataFrame(schema={"key": pl.String, "value": pl.Float64})
    for row in examples.sort("value", descending=True).iter_rows(named=True):
        tokens = [*row["before"], row["token"], *row["after"]]
        place = len(row["before"])
        values = [0.0] * len(tokens)
        values[place] = row["value"]
        example = {"tokens_acts_list": values, "train_token_ind": place, "is_repeated_datapoint": False, "tokens": tokens}
        contexts.setdefault(row["key"], []).append(example)
    for node in content["nodes"]:
        if node["feature_type"] != TRANSCODER:
            continue
        key = node[OWN]["key"]
        found = contexts.get(key, [])
        values = [max(example["tokens_acts_list"]) for example in found]
        feature = {
            "transcoder_id": str(node[OWN]["dictionary"]), "index": node["feature"], "top_logits": [], "bottom_logits": [],
            "examples_quantiles": [{"quantile_name": "strongest contexts", "examples": found}] if found else [],
            "act_min": 0.0, "act_max": max(values, default=1.0), "quantile_values": [], "histogram": [],
            "activation_frequency": source.frequency.get(key, 0.0),
        }  # fmt: skip
        _write_json(folder / f"{node['feature']}.json", feature)
