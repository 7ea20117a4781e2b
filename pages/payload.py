"""What the pages show, as values that JSON has: the report embeds them, the server answers with them.

`answer(source, name, parameters)` is the one door: `PAGES` says which pages there are, and what each is made of. The names and what they take are
those of `atlas.get(name, parameters)` in page.js.
"""

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl

from ..analysis.circuits import (
    By,
    Circuit,
    Path,
    Selection,
    read_circuit,
    run_circuit,
    strongest_candidates,
    strongest_paths,
    top_nodes,
)
from ..analysis.summary import task_summary
from ..errors import UserError
from ..queries.inventory import UnknownFeature, find_node, find_nodes
from ..queries.labels import search_labels
from ..queries.pages import circuits_of, count_all, models_of, nodes_of, partitions_of, swept
from ..queries.partitions import stored_parcellations
from ..queries.samples import SampleStore
from ..queries.subgraphs import RunRow, find_run, list_runs, run_sequences
from .commands import commands_of, next_commands
from .features import feature_page, feature_pages, feature_table, named, sequence_tokens
from .source import Page, PageSource, plain, records, table
from .studies import community_page, comparison_page, comparisons_of, matching_page, matchings_of, region_page, series_of, series_page, sweep_page

__all__ = ["PAGES", "PageSource", "UnknownPage", "answer", "circuit_page", "feature_page", "feature_pages", "overview", "run_page", "search"]

DRAWN_EDGES = 5000
PATH_EDGES = 600
"""Edges of the circuit whose strongest paths a run's page names."""
PATHS_SHOWN = 12
FOUND_AT_MOST = 50


class UnknownPage(UserError):
    """There is no page of this name."""


class BadPageParameter(UserError):
    """A page was asked for with something that it does not take."""


# --- overview ---------------------------------------------------------------------------------------------------------


def overview(source: PageSource) -> Page:
    """Everything that an atlas holds, one row each: models, runs, circuits, sweeps, partitions, matchings, comparisons, series, counts, commands."""
    runs = list_runs(source.store)
    partitions = partitions_of(source.store)
    by_key: dict[str, list[Page]] = {}
    for partition in partitions:
        by_key.setdefault(partition["parcellation"], []).append(partition)
    return {
        "atlas": source.atlas.resolve().name,
        "models": plain(models_of(source.store)),
        "runs": [_run_row(run) for run in runs],
        "circuits": [_circuit_row(circuit) for circuit in circuits_of(source.store)],
        "sweeps": records(swept(source.statistics)) if source.statistics is not None else [],
        "statistics": _statistics_rows(source),
        "samples": _sample_rows(source),
        "parcellations": [_parcellation_row(source, key, rows) for key, rows in by_key.items() if rows[0].get("basis") != "effective"],
        "communities": [_communities_row(rows[0]) for rows in by_key.values() if rows[0].get("basis") == "effective"],
        "matchings": matchings_of(source),
        "comparisons": comparisons_of(source),
        "series": series_of(source),
        "counts": count_all(source.store),
        "commands": commands_of(source.atlas, runs),
        **({"held": "Another process is writing the statistics of this atlas: what they hold is not shown now."} if source.held else {}),
    }


def _run_row(run: RunRow) -> Page:
    wanted = ("key", "model", "task", "method", "steps", "metric", "baseline", "threshold", "aggregation", "status", "n_sequences", "n_edges")
    return plain({name: run.properties.get(name) for name in wanted})


def _circuit_row(circuit: Mapping[str, Any]) -> Page:
    wanted = ("key", "run", "sequence", "task", "threshold", "by", "n_nodes", "n_edges", "average_degree", "density", "faithfulness", "completeness",
              "description")  # fmt: skip
    settings = json.loads(str(circuit.get("settings") or "{}"))
    return plain({**{name: circuit.get(name) for name in wanted}, "of": "regions" if "parcellation" in settings else "features"})


def _statistics_rows(source: PageSource) -> list[Page]:
    if source.statistics is None:
        return []
    return records(source.statistics.runs().select("run", "model", "corpus", "basis", "status", "sequences", "tokens"))


def _sample_rows(source: PageSource) -> list[Page]:
    return [
        {"key": run.key, "model": run.model, "basis": run.basis, "source": run.source, "sites": list(run.dictionaries),
         "n_sequences": run.n_sequences, "n_tokens": run.n_tokens}
        for run in SampleStore(source.atlas, read_only=True).runs()
    ]  # fmt: skip


def _parcellation_row(source: PageSource, key: str, partitions: list[Page]) -> Page:
    first = partitions[0]
    stored = set(stored_parcellations(source.statistics)["parcellation"]) if source.statistics is not None else set()
    return plain({
        "key": key, "model": first.get("model"), "method": first.get("method"), "basis": first.get("basis"),
        "sites": [partition.get("site") for partition in partitions], "n_blocks": sum(partition.get("n_blocks") or 0 for partition in partitions),
        "stored": key in stored,
    })  # fmt: skip


def _communities_row(partition: Page) -> Page:
    notes = json.loads(partition.get("notes") or "{}")
    wanted = ("key", "parcellation", "run", "model", "method", "n_blocks")
    return plain({**{name: partition.get(name) for name in wanted}, "notes": notes, "settings": json.loads(partition.get("settings") or "{}")})


# --- a run ------------------------------------------------------------------------------------------------------------

_SETTINGS = (
    "key", "model", "task", "method", "steps", "metric", "baseline", "threshold", "max_edges", "aggregation", "seed", "status", "n_planned",
    "n_sequences", "n_edges", "version",
)  # fmt: skip


def metric_name(run: RunRow) -> str:
    """A run's metric as a reader says it; "feature resid_11/123" names a site and stays as it is."""
    return run.metric if " " in run.metric else run.metric.replace("_", " ")


def run_page(source: PageSource, run: str | None = None) -> Page:
    """A run: `settings`, `tasks` (how well the model does), its sequences, circuits, the strongest paths and the most influential features.

    Paths and features are of the circuit of its `PATH_EDGES` strongest edges. Raises `UnknownRun`.
    """
    found = find_run(source.store, run)
    sequences = run_sequences(source.store, found.key)
    settings = [[name, str(found.properties[name])] for name in _SETTINGS if found.properties.get(name) is not None]
    settings.append(["dictionaries", ", ".join(f"{site}: {dictionary}" for site, dictionary in found.dictionaries.items())])
    page = {
        "key": found.key, "title": f"{found.model.partition('@')[0]}: {found.task.replace('+', ' + ')}",
        "subtitle": f"effects on the {metric_name(found)}, run {found.key}", "metric": metric_name(found), "task": found.task, "model": found.model,
        "settings": settings, "tasks": table(task_summary(sequences, found.metric)), "sequences": records(sequences),
        "circuits": [_circuit_row(circuit) for circuit in circuits_of(source.store, found.key)],
        "positions": found.properties.get("aggregation") == "keep", "commands": next_commands(source.atlas, found.key),
        "paths": [], "features": [],
    }  # fmt: skip
    if sequences.height and found.properties.get("n_edges"):
        circuit = run_circuit(source.store, found, Selection(found.key), n_edges=PATH_EDGES)
        page |= {"paths": _paths(source, circuit), "features": _top_features(source, circuit)}
    return page


def _paths(source: PageSource, circuit: Circuit) -> list[Page]:
    """The strongest paths: nodes by key, name and site, weights between them."""
    paths = strongest_paths(circuit, PATHS_SHOWN)
    keys = {key for path in paths for key in path.nodes}
    known = {row["key"]: row for row in named(source, nodes_of(source.store, keys)).iter_rows(named=True)}
    return [_path(path, known) for path in paths]


def _path(path: Path, known: Mapping[str, Mapping[str, Any]]) -> Page:
    nodes = [{name: known[key][name] for name in ("key", "name", "site", "kind")} for key in path.nodes]
    return {"score": plain(path.score), "nodes": nodes, "weights": plain(path.weights)}


def _top_features(source: PageSource, circuit: Circuit) -> list[Page]:
    """The most influential features with what enters and leaves each."""
    rows = top_nodes(circuit, 25)
    names = named(source, nodes_of(source.store, rows["key"].to_list())).select("key", "name", "label_kind")
    columns = ("key", "name", "label_kind", "site", "layer", "index", "influence", "in_strength", "out_strength", "n_in", "n_out")
    return records(rows.join(names, on="key", how="left", maintain_order="left").select(columns))


# --- a circuit --------------------------------------------------------------------------------------------------------


def circuit_page(
    source: PageSource, run: str | None = None, *, threshold: float | None = None, edges: int | None = None, circuit: str | None = None,
    sequence: str | None = None, task: str | None = None, by: str = "abs_weight",
) -> Page:  # fmt: skip
    """A circuit as nodes and edges: a stored one by its key, or what a threshold, or the strongest `edges`, leave of a run, a task or a sequence.

    `nodes`: `id` (the row's number, that edges name), `key, site, layer, row` (the site's place, 0 at the input), `pos` (-1: not kept), `kind, index,
    name, label_kind, role, influence`. `edges`: `[source id, target id, weight, strength]`, the strongest first. `sites`: names by row. `settings`:
    what it was cut from, `n_candidates` edges in all, and the least `threshold` that is drawn. `tokens` where a sequence's positions were kept.
    Raises `UnknownRun`, `UnknownCircuit`, `NoEdges`, `EmptyCircuit`.
    """
    if circuit is not None:
        cut = read_circuit(source.store, circuit)
        found, n_candidates = find_run(source.store, cut.selection.run), cut.n_edges
    else:
        found = find_run(source.store, run)
        positions = sequence is not None and found.properties.get("aggregation") == "keep"
        if by not in set(By):
            raise BadPageParameter(f"by {by!r}: edges are cut by {' or '.join(By)}")
        selection = Selection(found.key, threshold or 0.0, By(by), sequence=sequence, positions=positions, task=task)
        cut, n_candidates = _cut(source, found, selection, edges or DRAWN_EDGES, exact=threshold is not None)
    tokens = _tokens_of(source, found, cut.selection)
    return {"run": found.key, "metric": metric_name(found), **_drawn(source, cut, metric_name(found)), "tokens": tokens,
            "settings": _cut_settings(cut, circuit, n_candidates)}  # fmt: skip


def _cut(source: PageSource, run: RunRow, selection: Selection, n_edges: int, *, exact: bool) -> tuple[Circuit, int]:
    """(circuit, edges to choose from). Without a threshold of its own the strongest `n_edges`, then pruned."""
    candidates, selection, n_candidates = strongest_candidates(source.store, run, selection, None if exact else n_edges)
    return candidates.circuit(np.ones(candidates.edges.height, dtype=bool), selection), n_candidates


def _cut_settings(cut: Circuit, circuit: str | None, n_candidates: int) -> Page:
    selection = cut.selection
    least = cut.edges["strength"].min() if cut.n_edges else None
    return plain({
        "circuit": circuit and cut.key, "run": selection.run, "by": selection.by.value, "threshold": selection.threshold,
        "sequence": selection.sequence, "task": selection.task, "positions": selection.positions, "pruned": selection.pruned,
        "n_candidates": n_candidates, "n_edges": cut.n_edges, "n_nodes": cut.n_nodes, "weakest": least, "description": selection.description,
    })  # fmt: skip


def _drawn(source: PageSource, cut: Circuit, metric: str) -> Page:
    """Nodes, edges and sites of a circuit."""
    sites = cut.nodes["site"].unique(maintain_order=True).to_list()
    row = pl.col("site").replace_strict({site: i for i, site in enumerate(sites)}, return_dtype=pl.Int64) if sites else pl.lit(0)
    nodes = cut.nodes.with_row_index("id").with_columns(row.alias("row"), pl.col("id").cast(pl.Int64))
    names = named(source, nodes_of(source.store, cut.nodes["key"].to_list())).select("key", "name", "label_kind")
    nodes = nodes.join(names, on="key", how="left", maintain_order="left")
    nodes = nodes.with_columns(pl.when(pl.col("kind") == "output").then(pl.lit(metric)).otherwise(pl.col("name")).alias("name"))
    at = nodes.select("id", "key", "pos")
    edges = cut.edges.join(at.rename({"id": "from", "key": "source", "pos": "src_pos"}), on=["source", "src_pos"])
    edges = edges.join(at.rename({"id": "to", "key": "target", "pos": "dest_pos"}), on=["target", "dest_pos"])
    edges = edges.sort(["strength", "from", "to"], descending=[True, False, False]).select("from", "to", "weight", "strength")
    columns = ("id", "key", "site", "layer", "row", "pos", "kind", "index", "name", "label_kind", "role", "influence")
    return {"nodes": records(nodes.select(columns)), "edges": [plain(edge) for edge in edges.iter_rows()], "sites": sites}


def _tokens_of(source: PageSource, run: RunRow, selection: Selection) -> list[str] | None:
    """The tokens of the circuit's one sequence, where its positions were kept."""
    if selection.sequence is None or not selection.positions:
        return None
    sequences = run_sequences(source.store, run.key).filter(pl.col("key") == selection.sequence)
    texts = dict(sequences.select("key", "clean").iter_rows())
    return sequence_tokens(source, texts).get(selection.sequence)


# --- search -----------------------------------------------------------------------------------------------------------


def search(source: PageSource, text: str = "") -> Page:
    """Features by their labels, tokens and contexts: `found`, the best first; without statistics, by the graph's labels. Raises `BadQuery`.

    The box asks while one still types: a word that nothing follows is the beginning of one. A place (`resid_11/696`) or key leads to its node first.
    """
    if not text.strip():
        return {"text": text, "found": []}
    if source.statistics is None:
        keys = find_nodes(source.store, text=text.strip())["key"].head(FOUND_AT_MOST)
    else:
        typed = f"{text}*" if text[-1].isalnum() else text
        keys = search_labels(source.store, source.statistics, typed, FOUND_AT_MOST)["key"]
    with contextlib.suppress(UnknownFeature):
        keys = pl.concat([pl.Series("key", [find_node(source.store, text.strip())["key"]], dtype=pl.String), keys]).unique(maintain_order=True)
    columns = ("key", "name", "label_kind", "model", "site", "layer", "kind", "index", "frequency")
    nodes = named(source, nodes_of(source.store, keys.to_list())).select(columns)
    return {"text": text, "found": records(keys.to_frame("key").join(nodes, on="key", how="inner", maintain_order="left"))}


# --- the door ---------------------------------------------------------------------------------------------------------

PAGES: Mapping[str, Callable[..., Page]] = MappingProxyType({
    "overview": overview, "run": run_page, "circuit": circuit_page, "feature": feature_page, "features": feature_table, "region": region_page,
    "community": community_page, "sweep": sweep_page, "matching": matching_page, "comparison": comparison_page, "series": series_page,
    "search": search,
})  # fmt: skip
"""What `atlas.get` can be asked for, by name."""


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _count(text: str) -> int:
    if not 1 <= (number := int(text)) < 2**31:
        raise ValueError
    return number


_READ: Mapping[str, Callable[[str], Any]] = MappingProxyType({"threshold": _finite, "edges": _count})


def answer(source: PageSource, name: str, parameters: Mapping[str, str] | None = None) -> Page:
    """A page by its name, with parameters as an address has them. Raises `UnknownPage`, `BadPageParameter`, and what the page raises."""
    if name not in PAGES:
        raise UnknownPage(f"no page {name!r}: there are {', '.join(PAGES)}")
    takes = [parameter for parameter in inspect.signature(PAGES[name]).parameters if parameter != "source"]
    given: dict[str, Any] = {}
    for parameter, text in (parameters or {}).items():
        if parameter not in takes:
            raise BadPageParameter(f"page {name} has no parameter {parameter!r}: it takes {', '.join(takes) or 'none'}")
        try:
            given[parameter] = _READ.get(parameter, str)(text)
        except ValueError as error:
            what = "a whole number from 1 on" if parameter == "edges" else "a finite number"
            raise BadPageParameter(f"page {name}: {parameter} is {what}, not {text!r}") from error
    required = [p.name for p in inspect.signature(PAGES[name]).parameters.values() if p.default is p.empty and p.name != "source"]
    if missing := [parameter for parameter in required if parameter not in given]:
        raise BadPageParameter(f"page {name} needs {' and '.join(missing)}")
    return PAGES[name](source, **given)
