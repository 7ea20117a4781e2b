"""What pages say of features: their names, moments, strongest contexts token by token, edges, and everything that they belong to.

Everything is read for many features at once; a page is then put together from each one's rows.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import polars as pl

from ..analysis.notes import CONTEXTS, feature_notes
from ..errors import UserError
from ..queries.labels import labels_of
from ..queries.pages import (
    PLACES,
    all_moments,
    all_nodes,
    circuits_of,
    node_blocks,
    node_circuits,
    node_contexts,
    node_effects,
    node_matches,
    node_moments,
    nodes_of,
    sequence_places,
)
from ..queries.samples import SampleRun, SampleStore
from ..queries.store import KeyRange
from .source import Page, PageSource, plain, records, table

CONTEXTS_SHOWN = 8
EDGES_SHOWN = 12
AROUND = 12
"""Tokens on either side of the marked one."""


class NoSuchFeature(UserError):
    """The graph has no such node."""


# --- names ------------------------------------------------------------------------------------------------------------


def named(source: PageSource, nodes: pl.DataFrame) -> pl.DataFrame:
    """Nodes (`queries.pages.NODE_COLUMNS`) with what to call each: `name`, and `label_kind`, null where the name is not a label."""
    unlabelled = nodes.filter(pl.col("label").is_null() & (pl.col("kind") == "feature"))["key"].to_list()
    contexts = pl.DataFrame(schema=CONTEXTS)
    if source.statistics is not None and unlabelled:
        contexts = node_contexts(source.statistics, unlabelled, CONTEXTS_SHOWN).select(list(CONTEXTS))
    notes = feature_notes(nodes, contexts)
    outputs = pl.when(pl.col("kind") == "output").then(pl.col("key").str.split("|").list.last().str.replace_all("_", " ")).otherwise(pl.col("name"))
    called = nodes.drop("label_kind").join(notes.select("key", "name", "label_kind"), on="key", how="left", maintain_order="left")
    return called.with_columns(outputs.alias("name"))


def feature_table(source: PageSource) -> Page:
    """Every node of the graph that says something, as a table: the live ones with their frequency and moments, the most frequent first.

    Columns `key, name, label_kind, model, site, layer, kind, index, frequency, mean_active, maximum`.
    """
    moments = pl.DataFrame(schema={"key": pl.String, "frequency": pl.Float64, "mean_active": pl.Float64, "maximum": pl.Float64})
    if source.statistics is not None:
        moments = all_moments(source.statistics).select(list(moments.schema))
    nodes = named(source, all_nodes(source.store)).join(moments, on="key", how="left", suffix="_measured", maintain_order="left")
    nodes = nodes.with_columns(pl.coalesce("frequency_measured", "frequency").alias("frequency"))
    alive = nodes.filter((pl.col("kind") != "feature") | (pl.col("frequency").fill_null(1.0) > 0))
    columns = ("key", "name", "label_kind", "model", "site", "layer", "kind", "index", "frequency", "mean_active", "maximum")
    ordered = alive.sort(["frequency", "key"], descending=[True, False], nulls_last=True).select(columns)
    return {"table": table(ordered), "n_dead": nodes.height - alive.height}


# --- a feature's page -------------------------------------------------------------------------------------------------


def feature_page(source: PageSource, key: str) -> Page:
    """What is known of one node, as `feature_pages` has it. Raises `NoSuchFeature`."""
    found = feature_pages(source, [key])
    if key not in found:
        raise NoSuchFeature(f"no feature {key!r} in the graph: keys must be whole; `featlas query find_features` finds them")
    return found[key]


def feature_pages(source: PageSource, keys: Collection[str]) -> dict[str, Page]:
    """What is known of nodes, by key; nodes that the graph lacks are left out.

    Each: the columns of the node, `name`, `label_kind`, `labels`, `statistics` (or null), `contexts` (`before, token, after, value, values`:
    the activation at each of these tokens, null where only the marked one's is known), `inputs` and `outputs` (of each run), `circuits`,
    `regions`, `communities`, `matches`, `effects`.
    """
    nodes = named(source, nodes_of(source.store, keys))
    known = nodes["key"].to_list()
    edges = _edges(source, known)
    parts: dict[str, Mapping[str, list[Page]]] = {
        "labels": _labels(source, known), "contexts": _contexts(source, nodes), "inputs": edges[0], "outputs": edges[1],
        "circuits": _circuits(source, known), **_blocks(source, known), "matches": _matches(source, known),
        "effects": _by_key(node_effects(source.store, known)),
    }  # fmt: skip
    moments = node_moments(source.statistics, known) if source.statistics is not None else pl.DataFrame(schema={"key": pl.String})
    statistics = {row["key"]: row for row in records(moments)}
    return {
        row["key"]: {**row, "statistics": statistics.get(row["key"]), **{name: of.get(row["key"], []) for name, of in parts.items()}}
        for row in records(nodes)
    }


def _by_key(frame: pl.DataFrame, key: str = "key") -> dict[str, list[Page]]:
    """Rows as records, by key; the key itself is left out of them."""
    found: dict[str, list[Page]] = {}
    for row in records(frame):
        found.setdefault(row.pop(key), []).append(row)
    return found


def _labels(source: PageSource, keys: Collection[str]) -> dict[str, list[Page]]:
    """Every label that a node was given."""
    if source.statistics is None:
        return {}
    return _by_key(labels_of(source.statistics, list(keys)))


def _edges(source: PageSource, keys: Collection[str]) -> tuple[dict[str, list[Page]], dict[str, list[Page]]]:
    """(inputs, outputs): the strongest `INFLUENCES` of each run that enter and leave nodes, with the other end's name and site."""
    if not keys:
        return {}, {}
    wanted, span = pl.DataFrame({"near": sorted(keys)}), KeyRange(min(keys), max(keys))
    frames = []
    for near, far, side in (("target", "source", {"targets": span}), ("source", "target", {"sources": span})):
        edges = source.store.read_edges("INFLUENCES", **side).rename({near: "near", far: "far"}).join(wanted, on="near", how="semi")  # type: ignore[arg-type]
        edges = edges.sort(["near", "run", "abs_weight", "far"], descending=[False, False, True, False])
        shown = ("far", "weight", "abs_weight", "n")
        best = edges.group_by("near", "run", maintain_order=True).agg(pl.col(shown).head(EDGES_SHOWN), pl.len().alias("of"))
        frames.append(best.explode(shown))
    ends = named(source, nodes_of(source.store, set(pl.concat(frames)["far"].to_list()))).select(pl.col("key").alias("far"), "name", "site", "kind")
    full = [frame.join(ends, on="far", how="left", maintain_order="left").rename({"far": "key"}) for frame in frames]
    return _by_key(full[0], "near"), _by_key(full[1], "near")


def _circuits(source: PageSource, keys: Collection[str]) -> dict[str, list[Page]]:
    """The circuits that nodes are in, with their sizes."""
    columns = ("run", "n_nodes", "n_edges", "description", "faithfulness")
    known = {circuit["key"]: {name: circuit.get(name) for name in columns} for circuit in circuits_of(source.store)}
    return {
        key: [{**row, **plain(known.get(row["circuit"], {}))} for row in rows] for key, rows in _by_key(node_circuits(source.store, keys)).items()
    }


def _blocks(source: PageSource, keys: Collection[str]) -> dict[str, dict[str, list[Page]]]:
    """`regions` and `communities` that nodes are in."""
    blocks = node_blocks(source.store, keys)
    community = pl.col("kind") == "community"
    return {"regions": _by_key(blocks.filter(~community)), "communities": _by_key(blocks.filter(community))}


def _matches(source: PageSource, keys: Collection[str]) -> dict[str, list[Page]]:
    """The counterparts of nodes, with their names."""
    rows = node_matches(source.store, keys)
    others = named(source, nodes_of(source.store, rows["other"].to_list())).select(pl.col("key").alias("other"), "name", "site", "model")
    return _by_key(rows.join(others, on="other", how="left", maintain_order="left"))


# --- contexts, token by token -----------------------------------------------------------------------------------------


def _contexts(source: PageSource, nodes: pl.DataFrame) -> dict[str, list[Page]]:
    """The strongest contexts of nodes: those that the statistics kept, with all tokens' activations where samples of the same text are there;
    of features without any, the strongest of the samples."""
    features = nodes.filter(pl.col("kind") == "feature")
    found: dict[str, list[Page]] = {key: [] for key in nodes["key"]}
    places = pl.DataFrame(schema=PLACES)
    if source.statistics is not None:
        places = node_contexts(source.statistics, nodes["key"].to_list(), CONTEXTS_SHOWN)
    strips = _Strips.of(source, features)
    for row in places.iter_rows(named=True):
        found[row["key"]].append(_shown(row, strips.values(row)))
    for key, shown in found.items():
        if not shown:
            shown.extend(strips.strongest(key, CONTEXTS_SHOWN))
    return found


def _shown(row: Mapping[str, Any], values: list[float] | None) -> Page:
    """A context as the page has it, at most `AROUND` tokens on either side."""
    before, after = row["before"][-AROUND:], row["after"][:AROUND]
    if values is not None:
        start = len(row["before"]) - len(before)
        values = values[start : start + len(before) + 1 + len(after)]
    return {"before": before, "token": row["token"], "after": after, "value": plain(row["value"]), "values": values}


class _Strips:
    """Activations of features at every token of samples' sequences, for windows of tokens that are found there again."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[str, Any]] = {}  # key -> (run of samples, the feature's values, (n_tokens,))
        self._texts: dict[str, dict[str, list[tuple[int, list[str]]]]] = {}  # run -> sequence's key -> (first row, tokens)
        self._rows: dict[str, list[tuple[int, list[str]]]] = {}  # run -> (first row, tokens) of each sequence

    @classmethod
    def of(cls, source: PageSource, features: pl.DataFrame) -> "_Strips":
        """For features (`key, model, dictionary, site, index`) of which the atlas has samples over activations."""
        strips, store = cls(), SampleStore(source.atlas, read_only=True)
        runs = [run for run in reversed(store.runs()) if run.basis == "activation"]
        for (model, dictionary, site), rows in features.group_by("model", "dictionary", "site"):
            fitting = [run for run in runs if run.model == model and run.dictionaries.get(str(site)) == dictionary]
            if fitting:
                strips._add(store, fitting[0], str(site), rows)
        return strips

    def _add(self, store: SampleStore, run: SampleRun, site: str, rows: pl.DataFrame) -> None:
        samples = store.read(run.key, site)
        within = rows.filter(pl.col("index") < samples.d_sae)
        chosen = samples.values[:, within["index"].to_numpy()]  # (n_tokens, n_features)
        dense = chosen if isinstance(chosen, np.ndarray) else chosen.tocsc()
        for column, key in enumerate(within["key"]):
            values = dense[:, column] if isinstance(dense, np.ndarray) else dense[:, [column]].toarray()[:, 0]
            self._columns[key] = (run.key, values)
        if run.key not in self._texts:
            self._read_texts(store, run)

    def _read_texts(self, store: SampleStore, run: SampleRun) -> None:
        tokens = store.tokens(run.key).with_row_index("row").filter(pl.col("text").is_not_null())
        by_sequence = tokens.group_by("sequence", maintain_order=True).agg(pl.col("row").min(), pl.col("text"))
        keys = dict(run.sequences.select("sequence", "key").iter_rows())
        own = self._texts.setdefault(run.key, {})
        self._rows[run.key] = []
        for sequence, first, texts in by_sequence.iter_rows():
            own.setdefault(keys.get(sequence, ""), []).append((first, texts))
            self._rows[run.key].append((first, texts))

    def values(self, row: Mapping[str, Any]) -> list[float] | None:
        """The activations at the window's tokens, rounded; None where no samples have this very window."""
        if row["key"] not in self._columns or row["sequence_key"] is None:
            return None
        run, values = self._columns[row["key"]]
        window, start = [*row["before"], row["token"], *row["after"]], row["position"] - len(row["before"])
        for first, tokens in self._texts[run].get(row["sequence_key"], []):
            if tokens[start : start + len(window)] == window:
                return [float(f"{value:.3g}") for value in values[first + start : first + start + len(window)]]
        return None

    def strongest(self, key: str, n: int) -> list[Page]:
        """The strongest places of a feature in its samples, one a sequence."""
        if key not in self._columns:
            return []
        run, values = self._columns[key]
        peaks = ((float(values[first : first + len(texts)].max()), first, texts) for first, texts in self._rows[run])
        best = sorted(peaks, key=lambda place: -place[0])
        shown: dict[str, Page] = {}
        for value, first, texts in best[: 4 * n]:
            at = int(values[first : first + len(texts)].argmax())
            if value <= 0 or len(shown) == n:
                break
            row = {"before": texts[:at], "token": texts[at], "after": texts[at + 1 :], "value": value}
            shown.setdefault("".join(texts[: at + 1]), _shown(row, [float(f"{v:.3g}") for v in values[first : first + len(texts)]]))
        return list(shown.values())


def sequence_tokens(source: PageSource, texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The tokens of sequences (key -> clean text), as far as samples or contexts tell; a position that none tells is empty text."""
    found: dict[str, list[str]] = {}
    for run in SampleStore(source.atlas, read_only=True).runs():
        own = run.sequences.filter(pl.col("key").is_in(list(texts)))
        if own.is_empty():
            continue
        tokens = SampleStore(source.atlas, read_only=True).tokens(run.key).join(own.select(pl.col("sequence").cast(pl.Int32), "key"), on="sequence")
        for (_, key), rows in tokens.sort("position").group_by("sequence", "key", maintain_order=True):
            parts = [text or "" for text in rows["text"]]
            if texts[str(key)] in "".join(parts):
                found.setdefault(str(key), parts)
    missing = {key: text for key, text in texts.items() if key not in found}
    if source.statistics is not None and missing:
        for row in sequence_places(source.statistics, missing).iter_rows(named=True):
            window, start = [*row["before"], row["token"], *row["after"]], row["position"] - len(row["before"])
            if "".join(window[1:] if start == 0 else window) in missing[row["sequence_key"]]:
                parts = found.setdefault(row["sequence_key"], [])
                parts.extend([""] * (start + len(window) - len(parts)))
                parts[start : start + len(window)] = window
    return found
