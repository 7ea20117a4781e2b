"""The file format of attribution graphs that circuit-tracer writes and its viewer and Neuronpedia open: what a file says, as frames.

One JSON object: `metadata` (slug, scan, prompt, prompt_tokens, …), `qParams` (what is pinned in the viewer), `nodes` and `links`. A node is a
feature of a transcoder at one token position, a reconstruction error, a token's embedding or a logit; `node_types` says which site each is of:

    cross layer transcoder, mlp reconstruction error     mlp_L, L its layer          (with attention in the file: layer 2 L + 1)
    lorsa, lorsa error                                   attn_L                      (layer 2 L)
    embedding                                            embed, index the token's number in the vocabulary
    logit                                                y, an output of its own for each token

A feature's number is told by `node_id`, `layer_index_position`, and again by `feature`: the index, or the Cantor pairing of layer and index.
An error node is never known by its `node_id`: older files gave it one that a feature may have as well.
Files that featlas wrote name each node's key, site and kind in a field `featlas` of its own, and are read back by these.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..errors import UserError
from .sites import EMBED, OUTPUT, Site, SiteGraph, SiteKind, parse_site

TRANSCODER, TRANSCODER_ERROR, TOKEN, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
ATTENTION, ATTENTION_ERROR = "lorsa", "lorsa error"
ERROR_TYPES = (TRANSCODER_ERROR, ATTENTION_ERROR)
SCHEMA_VERSION = 1  # of files whose `feature` is a Cantor pairing
MOST_LAYERS = 100_000  # more no model has: what a file says of them becomes so many sites
LARGEST_INDEX = 2**53
OWN = "featlas"  # the field in which featlas says what the format has no field for

NODES = {
    "node_id": pl.String(), "key": pl.String(), "site": pl.String(), "layer": pl.Int64(), "kind": pl.String(), "index": pl.Int64(),
    "pos": pl.Int64(), "label": pl.String(), "dictionary": pl.String(), "influence": pl.Float64(), "activation": pl.Float64(),
    "token_prob": pl.Float64(), "is_target": pl.Boolean(),
}  # fmt: skip
LINKS = {"source": pl.String(), "target": pl.String(), "weight": pl.Float64()}

_NODE_ID = re.compile(r"(-?\w+)_(-?\d+)_(\d+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # no label holds these, see `queries.labels.checked`
_PICTURES = {**{i: 0x2400 + i for i in range(0x20) if chr(i) not in "\n\t\r"}, 0x7F: 0x2421}  # a token of one byte keeps something to be seen
_LOGIT = re.compile(r'Output "(.*)" \(p=[^)]*\)', re.DOTALL)


class NotAnAttributionGraph(UserError):
    """The file is no attribution graph of circuit-tracer's or Neuronpedia's format."""


def _stripped(label: str) -> str:
    """A label without control characters."""
    return _CONTROL.sub("", label)


class BadAttributionGraph(UserError):
    """The file has the format's form and contradicts itself."""


@dataclass(frozen=True)
class AttributionGraph:
    """A file's content.

    `nodes` are of schema `NODES`: one row a node; `key` and `dictionary` are null unless featlas wrote the file, `index` is -1 for error nodes and
    outputs. `links` are of schema `LINKS`; their ends are `node_id`s. `metadata` is the file's own.
    """

    slug: str
    scan: str
    prompt: str
    tokens: tuple[str, ...]
    metadata: Mapping[str, Any]
    nodes: pl.DataFrame
    links: pl.DataFrame

    @property
    def n_layers(self) -> int:
        """Layers of the model: one less than the logits' layer says, which stands above them all; at least those that nodes are of."""
        used = int(self.nodes["layer"].max() or 0) + 1 if self.nodes.height else 0  # type: ignore[arg-type]
        return max(used, int(self.metadata.get("n_layers") or 0))


def pairing(layer: int, index: int) -> int:
    """The Cantor pairing of a layer and a feature's index: one number for both."""
    return (layer + index) * (layer + index + 1) // 2 + index


def unpaired(number: int) -> tuple[int, int]:
    """The layer and index whose pairing is `number`, in whole numbers of any size."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


def read_attribution_graph(path: Path) -> AttributionGraph:
    """Read a `.json` file. Raises `NotAnAttributionGraph` or `BadAttributionGraph`, naming what is wrong and where."""
    if path.suffix == ".pt":
        raise NotAnAttributionGraph(
            f"{path} is pickled Python, which can run anything when it is read: write it as JSON with circuit-tracer's create_graph_files"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # half of a character, which JSON can spell and no text can hold
            json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise NotAnAttributionGraph(f"no such file: {path}") from None
    except OSError as error:
        raise NotAnAttributionGraph(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise NotAnAttributionGraph(f"{path} is nested too deep: an attribution graph is an object with metadata, nodes and links") from None
    except UnicodeEncodeError:
        raise NotAnAttributionGraph(f"{path} has a text with half a character (a lone surrogate)") from None
    except ValueError as error:
        raise NotAnAttributionGraph(f"{path} is not JSON: {error}") from None
    return parse_attribution_graph(content, str(path))


def parse_attribution_graph(content: object, name: str = "the graph") -> AttributionGraph:
    """The graph that a file's content says; `name` is what messages call it."""
    whole = _of_type(content, dict, name)
    metadata = _field(whole, "metadata", dict, name)
    nodes, links = _field(whole, "nodes", list, name), _field(whole, "links", list, name)
    slug, scan, prompt = (_field(metadata, field, str, f"{name}: metadata") for field in ("slug", "scan", "prompt"))
    tokens = _field(metadata, "prompt_tokens", list, f"{name}: metadata")
    _check_metadata(metadata, name)
    if not nodes:
        raise BadAttributionGraph(f"{name} has no nodes")
    read = _Reader(name, metadata, tuple(str(token) for token in tokens), _has_attention(nodes))
    frame = pl.DataFrame([read.node(node, f"{name}: node {place}") for place, node in enumerate(nodes)], schema=NODES)
    linked = _links(links, frame, name)
    highest = max((layer - 1 for layer in read.logit_layers), default=0)
    known = {**metadata, "n_layers": metadata.get(OWN, {}).get("n_layers") or highest}
    return AttributionGraph(slug, scan, prompt, read.tokens, known, frame, linked)


def _check_metadata(metadata: Mapping[str, Any], name: str) -> None:
    """That what is read of the metadata, where it is there, is of the types that it should have."""
    own, version = metadata.get(OWN), metadata.get("schema_version")
    if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
        raise BadAttributionGraph(f"{name}: metadata: schema_version {version!r} is no whole number")
    if own is None:
        return
    texts = [_of_type(own, dict, f"{name}: metadata: {OWN}").get(field) for field in ("model", "sequence")]
    n_layers, roots = own.get("n_layers"), own.get("roots")
    fits = all(text is None or isinstance(text, str) for text in texts) and (n_layers is None or _is_whole(n_layers, MOST_LAYERS))
    if not fits or not (roots is None or (isinstance(roots, list) and all(isinstance(root, str) for root in roots))):
        raise BadAttributionGraph(f"{name}: metadata: {OWN} holds no model and sequence by name, number of layers and list of roots")


def _is_whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _of_type(value: object, kind: type, where: str) -> Any:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    if not isinstance(value, kind):
        raise NotAnAttributionGraph(f"{where} is not {names[kind]}: an attribution graph is an object with metadata, nodes and links")
    return value


def _field(value: Mapping[str, Any], field: str, kind: type, where: str) -> Any:
    if field not in value:
        raise NotAnAttributionGraph(f"{where} has no {field!r}: an attribution graph is an object with metadata, nodes and links")
    return _of_type(value[field], kind, f"{where}: {field}")


def _has_attention(nodes: Sequence[Any]) -> bool:
    return any(isinstance(node, dict) and node.get("feature_type") in (ATTENTION, ATTENTION_ERROR) for node in nodes)


class _Reader:
    """Reads the nodes of one file."""

    def __init__(self, name: str, metadata: Mapping[str, Any], tokens: tuple[str, ...], attention: bool) -> None:
        self.name, self.tokens, self.attention = name, tokens, attention
        self.version = int(metadata.get("schema_version") or 0)
        self.logit_layers: list[int] = []

    def node(self, node: object, where: str) -> dict[str, object]:
        """One row of `NODES`."""
        entry = _of_type(node, dict, where)
        for field in ("node_id", "feature_type", "layer", "ctx_idx"):
            if field not in entry:
                raise NotAnAttributionGraph(f"{where} has no {field!r}")
        node_id, type = str(entry["node_id"]), str(entry["feature_type"])
        pos = entry["ctx_idx"]
        if not isinstance(pos, int) or not 0 <= pos < max(len(self.tokens), 1):
            raise BadAttributionGraph(f"{where} ({node_id}) is at position {pos!r}: the prompt has {len(self.tokens)} tokens, counted from 0")
        own = entry.get(OWN)
        told = self._own(own, where) if isinstance(own, dict) else self._foreign(entry, node_id, type, pos, where)
        if not (-1 <= told["index"] <= LARGEST_INDEX and told["layer"] <= MOST_LAYERS):
            raise BadAttributionGraph(f"{where} ({node_id}) is of layer {told['layer']} and index {told['index']}, which no model has")
        numbers = {name: _number(entry.get(name)) for name in ("influence", "activation", "token_prob")}
        return {"node_id": node_id, "pos": pos, "key": None, "dictionary": None, **numbers, "is_target": bool(entry.get("is_target_logit")), **told}

    def _own(self, own: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What featlas wrote beside the format's fields."""
        try:
            site = parse_site(str(own["site"]))
            told: dict[str, Any] = {"key": str(own["key"]), "kind": str(own["kind"]), "index": int(own["index"]), "pos": int(own["pos"])}
        except (KeyError, TypeError, ValueError):
            raise BadAttributionGraph(f"{where} names no key, site, kind, index and pos in its field {OWN!r}") from None
        if told["kind"] not in ("feature", "error", "output") or not -1 <= told["pos"] < max(len(self.tokens), 1):
            raise BadAttributionGraph(f"{where} is of kind {told['kind']!r} at position {told['pos']} in its field {OWN!r}")
        if not isinstance(own.get("dictionary"), str | None):
            raise BadAttributionGraph(f"{where}: the dictionary {own['dictionary']!r} in its field {OWN!r} is no text")
        label = None if own.get("label") is None else _stripped(str(own["label"])) or None
        return {**told, "site": site.name, "layer": site.layer, "dictionary": own.get("dictionary"), "label": label}

    def _foreign(self, entry: Mapping[str, Any], node_id: str, type: str, pos: int, where: str) -> dict[str, Any]:
        """What circuit-tracer's own fields say."""
        label = _stripped(str(entry.get("clerp") or "")) or None
        if type == TOKEN:
            index = self._index(entry, node_id, "E", where)
            return {"site": EMBED.name, "layer": EMBED.layer, "kind": "feature", "index": index, "label": self.tokens[pos].translate(_PICTURES)}
        layer = self._layer(entry, node_id, where)
        if type == LOGIT:
            self.logit_layers.append(layer)
            named = _LOGIT.fullmatch(label or "")
            index = self._index(entry, node_id, str(entry["layer"]), where)
            return {"site": OUTPUT.name, "layer": OUTPUT.layer, "kind": "output", "index": index, "label": named[1] if named else label}
        site = self._site(type, layer, node_id, where)
        if type in ERROR_TYPES:
            return {"site": site.name, "layer": site.layer, "kind": "error", "index": -1, "label": "error"}
        index = self._index(entry, node_id, str(layer), where, layer)
        return {"site": site.name, "layer": site.layer, "kind": "feature", "index": index, "label": label}

    def _layer(self, entry: Mapping[str, Any], node_id: str, where: str) -> int:
        try:
            layer = int(entry["layer"])
        except (TypeError, ValueError):
            layer = -1
        if layer < 0:
            raise BadAttributionGraph(f"{where} ({node_id}) is of layer {entry['layer']!r}: a layer is a number from 0 on, or E for an embedding")
        return layer

    def _site(self, type: str, layer: int, node_id: str, where: str) -> Site:
        kinds = {TRANSCODER: SiteKind.MLP, TRANSCODER_ERROR: SiteKind.MLP, ATTENTION: SiteKind.ATTN, ATTENTION_ERROR: SiteKind.ATTN}
        if type not in kinds:
            known = ", ".join([*kinds, TOKEN, LOGIT])
            raise BadAttributionGraph(f"{where} ({node_id}) is of type {type!r}, which featlas has no site for: it knows {known}")
        if not self.attention:
            return Site(kinds[type], layer)
        if (layer % 2 == 1) != (kinds[type] is SiteKind.MLP):
            meant = "with attention in a file, layer 2 L is attn_L and 2 L + 1 mlp_L"
            raise BadAttributionGraph(f"{where} ({node_id}, {type}) is of layer {layer}: {meant}")
        return Site(kinds[type], layer // 2)

    def _index(self, entry: Mapping[str, Any], node_id: str, prefix: str, where: str, layer: int | None = None) -> int:
        """The number of a feature in its dictionary, of a token or a logit in the vocabulary."""
        matched, feature = _NODE_ID.fullmatch(node_id), entry.get("feature")
        told = int(matched[2]) if matched and matched[1] == prefix else None
        if layer is None:
            told = told if told is not None else feature
        elif isinstance(feature, int) and feature >= 0:
            read = unpaired(feature)
            paired = read[1] if read[0] == layer else None
            if told is None:
                told = paired if paired is not None and self.version >= SCHEMA_VERSION else feature
            elif told not in (feature, paired):
                neither = f"neither {told} nor the pairing of {layer} and {told}, {pairing(layer, told)}"
                raise BadAttributionGraph(f"{where} ({node_id}) names feature {feature}, which is {neither}")
        if not isinstance(told, int) or told < 0:
            raise BadAttributionGraph(f"{where} ({node_id}) names no feature: its node_id is not layer_index_position, and feature is {feature!r}")
        return told


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _links(links: Sequence[Any], nodes: pl.DataFrame, name: str) -> pl.DataFrame:
    """The links as a frame, each with both ends, of a finite weight, from a site to a later one, and there once."""
    try:
        frame = pl.DataFrame(
            {column: [link[column] for link in links] for column in LINKS}, schema_overrides=LINKS, strict=False
        ).select(list(LINKS))  # fmt: skip
    except (KeyError, TypeError, pl.exceptions.PolarsError):
        raise NotAnAttributionGraph(f"{name}: links must each have a source, a target and a weight") from None
    bad = frame.filter(pl.any_horizontal(pl.all().is_null()) | ~pl.col("weight").is_finite())
    if bad.height:
        raise BadAttributionGraph(f"{name}: link {bad.row(0)} has no source, no target or no finite weight")
    ends = set(frame["source"]) | set(frame["target"])
    if missing := sorted(ends - set(nodes["node_id"])):
        raise BadAttributionGraph(f"{name}: {len(missing)} ends of links are no nodes of the file, among them {missing[0]!r}")
    if doubled := sorted(node for node, n in Counter(nodes["node_id"]).items() if n > 1 and node in ends):
        raise BadAttributionGraph(
            f"{name}: {len(doubled)} ids are those of two nodes, among them {doubled[0]!r}, and links do not say of which: circuit-tracer once gave "
            "error nodes ids that features have too; write the file again with a newer one"
        )
    if (twice := frame.filter(frame.select("source", "target").is_duplicated())).height:
        raise BadAttributionGraph(f"{name}: the link {twice.row(0)[:2]} is there twice")
    _check_order(frame, nodes, name)
    return frame


def _check_order(links: pl.DataFrame, nodes: pl.DataFrame, name: str) -> None:
    """Every link leads from a site to a later one."""
    sites = [parse_site(site) for site in nodes["site"].unique()]
    order = SiteGraph.of(max(site.layer for site in sites) + 2, False, [EMBED, *sites]).sites
    places = pl.DataFrame({"site": [site.name for site in order], "place": range(len(order))})
    placed = nodes.unique("node_id").join(places, on="site").select("node_id", "place")
    joined = links.join(placed.rename({"node_id": "source", "place": "from"}), on="source")
    joined = joined.join(placed.rename({"node_id": "target", "place": "to"}), on="target").filter(pl.col("from") >= pl.col("to"))
    if joined.height:
        raise BadAttributionGraph(f"{name}: the link {joined.row(0)[:2]} does not lead from a site to a later one")
