"""The schema of the graph: every label and type with its columns, as records from which both backends create it.

Labels, types and property names are the public interface: people's Cypher relies on them. The version is written into the graph
when it is created and checked when it is opened. A label, type or property that is new is added to an older graph when it is opened; a
change that takes something away, or lets it mean something else, raises `SCHEMA_VERSION`.

Identity. A node is identified by its `key`. An edge is identified by its two ends and the columns listed as its identity;
those are never null (a position that was not kept is -1). Keys are built here and never parsed: what they are made of are
properties too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import polars as pl

from ..errors import UserError

SCHEMA_VERSION = 1
VERSION_KEY = "schema_version"


class RowsRejected(UserError):
    """A frame does not fit the label or type that it was to be written to."""


class UnknownLabel(UserError):
    """No such node label or edge type in the schema."""


class ColumnType(StrEnum):
    """The types that both databases share."""

    STRING = "STRING"
    INT64 = "INT64"
    DOUBLE = "DOUBLE"
    BOOL = "BOOL"

    @property
    def dtype(self) -> pl.DataType:
        """The polars type of a column of this type."""
        return _DTYPES[self]


_DTYPES: Mapping[ColumnType, pl.DataType] = MappingProxyType(
    {ColumnType.STRING: pl.String(), ColumnType.INT64: pl.Int64(), ColumnType.DOUBLE: pl.Float64(), ColumnType.BOOL: pl.Boolean()}
)
STRING, INT64, DOUBLE, BOOL = ColumnType.STRING, ColumnType.INT64, ColumnType.DOUBLE, ColumnType.BOOL


@dataclass(frozen=True, slots=True)
class NodeLabel:
    """A node label: its columns beside `key` (STRING, unique within the label), and those a server indexes."""

    name: str
    columns: Mapping[str, ColumnType]
    indexed: tuple[str, ...] = ()

    @property
    def all_columns(self) -> dict[str, ColumnType]:
        """`key` first, then the properties."""
        return {"key": STRING, **self.columns}


@dataclass(frozen=True, slots=True)
class EdgeType:
    """An edge type: the (source, target) labels it may join, the columns of its identity, its other columns."""

    name: str
    ends: tuple[tuple[str, str], ...]
    identity: Mapping[str, ColumnType]
    columns: Mapping[str, ColumnType]
    indexed: tuple[str, ...] = ()

    @property
    def properties(self) -> dict[str, ColumnType]:
        """Every stored property: identity first."""
        return {**self.identity, **self.columns}

    @property
    def all_columns(self) -> dict[str, ColumnType]:
        """The columns of a frame of these edges: both ends' keys, then every property."""
        return {"source": STRING, "target": STRING, **self.properties}

    @property
    def order(self) -> tuple[str, ...]:
        """The columns by which edges are sorted when read: they tell two edges of this type apart."""
        names = [name for name, column in self.identity.items() if column is STRING]
        return (*names, "source", "target", *(name for name in self.identity if name not in names))


_PARTITION = {
    "parcellation": STRING, "run": STRING, "model": STRING, "dictionary": STRING, "method": STRING, "basis": STRING, "site": STRING, "level": INT64,
}  # fmt: skip
_ABLATION = {"ablation_effect": DOUBLE, "ablation_metric": STRING, "ablation_baseline": STRING}
_FEATURES = (("Feature", "Feature"),)
_BLOCKS = (("Block", "Block"),)

_NODES = (
    NodeLabel("Meta", {"value": STRING}),
    NodeLabel("Model", {"name": STRING, "revision": STRING, "family": STRING, "n_layers": INT64, "d_model": INT64}),
    # `kind` is feature, error or output; `index` is -1 for the last two, `layer` -1 for the sites without one (embed, y).
    # `label` is the best of a feature's labels, `label_kind` who gave it: hand, file, neuronpedia or automatic.
    NodeLabel(
        "Feature",
        {
            "model": STRING, "dictionary": STRING, "site": STRING, "layer": INT64, "kind": STRING, "index": INT64, "label": STRING,
            "frequency": DOUBLE, "mean_activation": DOUBLE, "statistics_run": STRING, "label_kind": STRING,
        },
        indexed=("site", "kind"),
    ),
    NodeLabel("Sequence", {"task": STRING, "clean": STRING, "corrupt": STRING, "answer": STRING, "wrong_answer": STRING}, indexed=("task",)),
    # `settings` is JSON for what has no column of its own: dtype, limit, batch size, statistics run, the sites without parents (`roots`),
    # whether prompts begin with a beginning-of-text token (`bos`), what the output is (`target`).
    NodeLabel(
        "Run",
        {
            "model": STRING, "dictionaries": STRING, "task": STRING, "method": STRING, "steps": INT64, "metric": STRING, "baseline": STRING,
            "threshold": DOUBLE, "max_edges": INT64, "aggregation": STRING, "sites": STRING, "status": STRING, "seed": INT64, "version": STRING,
            "n_planned": INT64, "n_sequences": INT64, "n_edges": INT64, "settings": STRING,
        },
    ),
    # `description` says in words what the circuit is made of, `settings` as JSON: the sequences, the set operation, whether it is pruned.
    NodeLabel(
        "Circuit",
        {
            "run": STRING, "sequence": STRING, "threshold": DOUBLE, "by": STRING, "n_nodes": INT64, "n_edges": INT64,
            "average_degree": DOUBLE, "density": DOUBLE, "faithfulness": DOUBLE, "completeness": DOUBLE, "task": STRING, "description": STRING,
            "settings": STRING,
        },
    ),
    # `subject` is what is scored (a circuit's key), `kind` faithfulness or completeness; `task` is "pooled" over all of its tasks.
    # `method` chose the edges that were kept: the circuit's own, or that of a control of its size.
    NodeLabel(
        "Score",
        {
            "subject": STRING, "kind": STRING, "ablation": STRING, "metric": STRING, "baseline": STRING, "averaging": STRING, "split": STRING,
            "seed": INT64, "value": DOUBLE, "low": DOUBLE, "high": DOUBLE, "n": INT64, "undefined_n": INT64, "task": STRING, "method": STRING,
        },
    ),
    # The partition of one site's features: `run` is the run of samples, `level` the one that regions are; `settings` and `notes` are JSON.
    NodeLabel("Partition", {**_PARTITION, "n_blocks": INT64, "settings": STRING, "notes": STRING}),
    # A set of nodes of one site. `kind` is roi, dead (features never or hardly active), error, head, whole (all features of a site that has no
    # partition), output or community; `chosen` says whether its level is the chosen one. Only regions and communities have a `level` and an `index`,
    # the others stand at all levels, -1. `label` is what people call it, else `automatic_label`; `top_features` and `contexts` are JSON lists.
    NodeLabel(
        "Block",
        {
            **_PARTITION, "layer": INT64, "kind": STRING, "chosen": BOOL, "index": INT64, "size": INT64, "label": STRING, "automatic_label": STRING,
            "mean_correlation": DOUBLE, "mean_correlation_outside": DOUBLE, "mean_cosine": DOUBLE, "mean_cosine_outside": DOUBLE,
            "frequency": DOUBLE, "member_frequency": DOUBLE, "mean_activation": DOUBLE, "task": STRING, "task_share": DOUBLE, "task_entropy": DOUBLE,
            "distinctive_task": STRING, "distinctive_lift": DOUBLE, "top_features": STRING, "contexts": STRING, "attributed_task": STRING,
            "attributed_share": DOUBLE, "attributed_run": STRING,
        },
        indexed=("parcellation",),
    ),
)

_EDGES = (
    EdgeType(
        "ATTRIBUTES", _FEATURES, {"run": STRING, "sequence": STRING, "src_pos": INT64, "dest_pos": INT64}, {"weight": DOUBLE},
        indexed=("run", "sequence"),
    ),
    EdgeType(
        "INFLUENCES", _FEATURES, {"run": STRING},
        {"weight": DOUBLE, "abs_weight": DOUBLE, "max_weight": DOUBLE, "variance": DOUBLE, "n": INT64, **_ABLATION}, indexed=("run",),
    ),
    EdgeType("CORRELATES", _FEATURES, {"run": STRING, "basis": STRING}, {"r": DOUBLE}, indexed=("run",)),
    EdgeType("WIRED", _FEATURES, {"path": STRING}, {"weight": DOUBLE}),
    # What the metric loses without this node, m(C) - m(C without it), or without this edge.
    EdgeType("IN_CIRCUIT", (("Feature", "Circuit"), ("Block", "Circuit")), {}, {"role": STRING, **_ABLATION}),
    EdgeType(
        "CIRCUIT_EDGE", (*_FEATURES, *_BLOCKS), {"circuit": STRING}, {"weight": DOUBLE, "strength": DOUBLE, **_ABLATION}, indexed=("circuit",)
    ),
    # What the metric loses when this node alone is at its baseline in the whole model: the mean of m(M) - m(M without it) over `n` sequences.
    EdgeType("ABLATED", (("Feature", "Run"),), {"metric": STRING, "baseline": STRING}, {"effect": DOUBLE, "n": INT64}),
    EdgeType("SCORED", (("Circuit", "Score"), ("Block", "Score")), {}, {}),
    EdgeType("MEMBER_OF", (("Feature", "Block"),), {}, {}),
    EdgeType("PART_OF", (("Block", "Block"), ("Block", "Partition")), {}, {}),
    # Attribution between sets of nodes in a run: `weight_sum` is the mean over sequences of the sum over all edges between members, `weight_mean`
    # the same per pair of members, `abs_sum` the mean magnitude of the sum; `n` sequences have any.
    EdgeType(
        "DRIVES", _BLOCKS, {"run": STRING}, {"weight_sum": DOUBLE, "weight_mean": DOUBLE, "abs_sum": DOUBLE, "n": INT64}, indexed=("run",)
    ),
    # Two features that are one across models or dictionaries, stored once, smaller key → larger: `score` their correlation on the same text, `method`
    # what it was searched among (all-sites, site-pairs), `matching` the key of the matching in the statistics.
    EdgeType("MATCHES", _FEATURES, {"method": STRING}, {"score": DOUBLE, "matching": STRING, "mutual": BOOL, "assigned": BOOL}),
    # The mark that a sequence is done: at most one between a run and a sequence.
    EdgeType(
        "ON_SEQUENCE", (("Run", "Sequence"),), {},
        {"key": STRING, "status": STRING, "n_edges": INT64, "metric_clean": DOUBLE, "metric_corrupt": DOUBLE},
    ),
    EdgeType("OF_MODEL", (("Feature", "Model"), ("Run", "Model")), {}, {}),
    EdgeType("OF_RUN", (("Circuit", "Run"), ("Partition", "Run")), {}, {}),
)

NODES: Mapping[str, NodeLabel] = MappingProxyType({label.name: label for label in _NODES})
EDGES: Mapping[str, EdgeType] = MappingProxyType({edge.name: edge for edge in _EDGES})


def node_label(name: str) -> NodeLabel:
    """The label of that name; raises `UnknownLabel`."""
    if name not in NODES:
        raise UnknownLabel(f"unknown node label {name!r}: the schema has {', '.join(NODES)}")
    return NODES[name]


def edge_type(name: str) -> EdgeType:
    """The edge type of that name; raises `UnknownLabel`."""
    if name not in EDGES:
        raise UnknownLabel(f"unknown edge type {name!r}: the schema has {', '.join(EDGES)}")
    return EDGES[name]


def feature_key(model_key: str, dictionary_id: str, site: object, index: int | str) -> str:
    """The key of a feature, `model_key|dictionary_id|site|index`; `index` is "error" for the site's error node.

    `site` is a `model.sites.Site` or its name: `str` gives the name of both.
    """
    return f"{model_key}|{dictionary_id}|{site}|{index}"


def output_key(model_key: str, target: str) -> str:
    """The key of the output node `y` whose value is `target` (for example a metric's name)."""
    return f"{model_key}|-|y|{target}"


def partition_key(parcellation: str, site: object) -> str:
    """The key of the partition of one site, `parcellation|site`."""
    return f"{parcellation}|{site}"


def block_key(parcellation: str, site: object, kind: str, level: int = -1, index: int = -1) -> str:
    """The key of a block, `parcellation|site|kind|level|index`; level and index are -1 for those that stand at all levels."""
    return f"{parcellation}|{site}|{kind}|{level}|{index}"


def mark_key(run: str, sequence: str) -> str:
    """The key of the `ON_SEQUENCE` mark."""
    return f"{run}|{sequence}"


def score_key(
    subject: str, kind: str, ablation: str, metric: str, baseline: str, averaging: str, split: str, seed: int, task: str = "pooled", method: str = ""
) -> str:
    """The key of a score: a content hash of what was measured, and how. The same measurement made again has the same key."""
    content = json.dumps([subject, kind, ablation, metric, baseline, averaging, split, seed, task, method], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def node_frame(label: str, rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` as they are stored: known columns with the schema's types, one row per key (the last wins).

    Raises `RowsRejected` for an unknown or missing column, a null key or a value that does not fit its type.
    """
    schema = node_label(label)
    frame = _cast(label, rows, schema.all_columns, required=("key",))
    return frame.unique(subset="key", keep="last", maintain_order=True)


def edge_frame(type: str, rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` as they are stored: known columns with the schema's types, one row per identity (the last wins).

    Raises `RowsRejected` as `node_frame` does; the ends and the identity columns are required and not null.
    """
    schema = edge_type(type)
    required = ("source", "target", *schema.identity)
    frame = _cast(type, rows, schema.all_columns, required)
    return frame.unique(subset=list(required), keep="last", maintain_order=True)


def attributes_frame(edges: pl.DataFrame) -> pl.DataFrame:
    """One sequence's edges as they are stored: `source`, `target`, `src_pos`, `dest_pos`, `weight`, in this order.

    Positions may be left out (-1). Two rows of one identity are an error here, not a correction: they are created, never merged.
    """
    columns = {name: column for name, column in EDGES["ATTRIBUTES"].all_columns.items() if name not in ("run", "sequence")}
    for position in ("src_pos", "dest_pos"):
        if position not in edges.columns:
            edges = edges.with_columns(pl.lit(-1).alias(position))
    frame = _cast("ATTRIBUTES", edges, columns, tuple(columns))
    identity = ["source", "target", "src_pos", "dest_pos"]
    doubled = frame.filter(frame.select(identity).is_duplicated())
    if doubled.height:
        edge = doubled.select(identity).row(0)
        raise RowsRejected(f"ATTRIBUTES rows: the edge {edge} (source, target, src_pos, dest_pos) is there twice in one sequence")
    return frame.select(list(columns))


def _cast(what: str, rows: pl.DataFrame, columns: Mapping[str, ColumnType], required: tuple[str, ...]) -> pl.DataFrame:
    unknown = [name for name in rows.columns if name not in columns]
    if unknown:
        raise RowsRejected(f"{what} rows: unknown column {unknown[0]!r}: {what} has {', '.join(columns)}")
    for name in required:
        if name not in rows.columns:
            raise RowsRejected(f"{what} rows: column {name!r} is missing; they have {', '.join(rows.columns) or 'no columns'}")
        if rows[name].null_count():
            raise RowsRejected(f"{what} rows: column {name!r} is null in {rows[name].null_count()} of {rows.height} rows; it identifies them")
    cast = []
    for name in rows.columns:
        try:
            cast.append(rows[name].cast(columns[name].dtype))
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise RowsRejected(f"{what} rows: column {name!r} must be {columns[name].value}, not {rows[name].dtype}: {reason}") from None
    return pl.DataFrame(cast)
