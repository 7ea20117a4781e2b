"""An atlas in a notebook: what it holds as polars frames, circuits as igraph or networkx graphs, figures that show themselves.

    from featlas.atlas import Atlas

    atlas = Atlas("atlas")
    atlas.runs                                  # a frame
    circuit = atlas.run().circuit(edges=200)
    circuit.figure()                            # a plotly figure
    circuit.to_igraph()
    atlas.query("hubs", limit=5)                # a named query, or Cypher of your own

An embedded graph is one process's at a time while it is open. Outside a `with` block every call therefore opens what it reads and lets go of it
again (about 0.05 s), so that `featlas ingest` may write to the same atlas between two cells; inside `with Atlas("atlas") as atlas:` both
databases stay open until the end. Nothing here measures anything: that is done by the commands.
"""

import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from .analysis.circuits import (
    By,
    Circuit,
    PathRule,
    Selection,
    read_circuit,
    read_effects,
    run_circuit,
    site_summary,
    strongest_paths,
    top_nodes,
)
from .analysis.comparisons_store import list_comparisons, read_comparison
from .analysis.notes import CONTEXTS, feature_notes, readable, strongest_contexts
from .analysis.scores import estimated_and_measured
from .errors import UserError
from .options import open_atlas
from .queries.inventory import circuits_of_node, find_node, find_nodes, list_models
from .queries.labels import list_labels, search_labels
from .queries.library import list_queries, run_query
from .queries.matches import list_matchings, matched_features, read_site_pairs
from .queries.partitions import find_parcellation, stored_parcellations
from .queries.series import list_series
from .queries.statistics import FILE_NAME, StatisticsStore
from .queries.store import GraphStore
from .queries.subgraphs import RunRow, find_run, run_sequences

if TYPE_CHECKING:
    import igraph
    import networkx

    from .analysis.comparison_records import Comparison
    from .analysis.gallery import Exhibit
    from .analysis.parcellation import Parcellation
    from .analysis.plots import Figure
    from .queries.atlases import AtlasCopied
    from .queries.contents import Contents
    from .queries.integrity import Finding
    from .queries.samples import SampleRun
    from .queries.series import SeriesRecord

__all__ = ["Atlas", "AtlasCircuit", "AtlasFeature", "AtlasRun"]

_NAME = re.compile(r"[A-Za-z][\w-]*")
_RUNS = ("run", "status", "task", "method", "steps", "metric", "baseline", "threshold", "n_sequences", "n_edges", "model")


class NoStatistics(UserError):
    """The atlas has no statistics store."""


class ReadOnly(UserError):
    """Something is to be written to an atlas that was opened for reading."""


@dataclass
class _Handles:
    """The open databases of a `with` block; both None outside of one."""

    store: GraphStore | None = None
    statistics: StatisticsStore | None = None
    held: bool = False


@dataclass(frozen=True)
class Atlas:
    """An atlas by its folder. `graph` names a Neo4j server instead of the embedded graph; NEO4J_URI does where it is set.

    With `read_only=False` `query(…, write=True)` may change the graph. Raises `options.NoAtlas` at the first look where there is no graph.
    """

    path: Path
    graph: str | None = None
    read_only: bool = True
    _handles: _Handles = field(default_factory=_Handles, repr=False, compare=False)

    def __init__(self, path: str | Path = "atlas", *, graph: str | None = None, read_only: bool = True) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "graph", graph or os.environ.get("NEO4J_URI") or None)
        object.__setattr__(self, "read_only", read_only)
        object.__setattr__(self, "_handles", _Handles())

    # -- opening -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Atlas":
        self._handles.held = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of both databases; the next call opens them again. Twice is once."""
        self._handles.held = False
        for handle in (self._handles.store, self._handles.statistics):
            if handle is not None:
                handle.close()
        self._handles.store = self._handles.statistics = None

    @contextmanager
    def store(self) -> Iterator[GraphStore]:
        """The graph, for library functions that take a `GraphStore`."""
        if self._handles.store is not None:
            yield self._handles.store
            return
        opened = open_atlas(self.path, self.graph, write=not self.read_only)
        if self._handles.held:
            self._handles.store = opened
            yield opened
            return
        with opened:
            yield opened

    @contextmanager
    def statistics_store(self) -> Iterator[StatisticsStore]:
        """The statistics, for library functions that take a `StatisticsStore`; always for reading. Raises `NoStatistics`."""
        if self._handles.statistics is not None:
            yield self._handles.statistics
            return
        if not self.has_statistics:
            raise NoStatistics(f"no statistics in {self.path}: `featlas ingest statistics` and the analyses make them")
        opened = StatisticsStore(self.path, read_only=True)
        if self._handles.held:
            self._handles.statistics = opened
            yield opened
            return
        with opened:
            yield opened

    @property
    def has_statistics(self) -> bool:
        """Whether there is a statistics store beside the graph."""
        return (self.path / FILE_NAME).exists()

    # -- asking ------------------------------------------------------------------------------------------------------------

    def query(self, question: str, /, *, write: bool = False, **parameters: object) -> pl.DataFrame:
        """The answer to a named query, or to Cypher of your own, with its parameters: `atlas.query("hubs", limit=5)`.

        A single word is a name (`atlas.queries` lists them). Where a query takes a `run`, the only one, or the beginning of a key, will do. Raises
        `UnknownQuery`, `BadParameters`, `QueryRejected` or `WriteRefused`.
        """
        if write and self.read_only:
            raise ReadOnly(f"{self.path} was opened for reading: Atlas({str(self.path)!r}, read_only=False) may write")
        with self.store() as store:
            if _NAME.fullmatch(question.strip()):
                return run_query(store, question.strip(), parameters)
            return store.query(question, parameters, write=write)

    def sql(self, text: str, /, **parameters: object) -> pl.DataFrame:
        """The answer of `statistics.duckdb` to one SELECT; parameters stand in it as `$name`."""
        with self.statistics_store() as statistics:
            return statistics.query(text, parameters or None)

    @property
    def queries(self) -> pl.DataFrame:
        """The named queries: `query, answers, parameters`."""
        rows = [{"query": one.name, "answers": one.doc, "parameters": ", ".join(map(str, one.parameters))} for one in list_queries()]
        return pl.DataFrame(rows)

    @property
    def tables(self) -> pl.DataFrame:
        """The tables of the statistics store with their columns: `table, columns`."""
        return self.sql(
            "SELECT table_name AS \"table\", string_agg(column_name, ', ' ORDER BY column_index) AS columns FROM duckdb_columns()"
            " WHERE NOT internal GROUP BY ALL ORDER BY 1"
        )

    # -- what there is -----------------------------------------------------------------------------------------------------

    @property
    def models(self) -> pl.DataFrame:
        """The models: `key, name, revision, family, n_layers, d_model`."""
        with self.store() as store:
            return list_models(store)

    @property
    def runs(self) -> pl.DataFrame:
        """The runs of edges, one row each, by key."""
        rows = self.query("runs")
        return rows.select(_RUNS) if rows.height else pl.DataFrame(schema=dict.fromkeys(_RUNS, pl.String))

    def run(self, key: str | None = None) -> "AtlasRun":
        """The run whose key begins with `key`, or the only one. Raises `UnknownRun`, which lists them."""
        with self.store() as store:
            return AtlasRun(self, find_run(store, key))

    @property
    def circuits(self) -> pl.DataFrame:
        """The circuits that were written into the graph, with their sizes and scores."""
        return self.query("circuits")

    def circuit(self, key: str) -> "AtlasCircuit":
        """The circuit whose key begins with `key`, as it was written. Raises `UnknownCircuit` or `NotRestored`."""
        with self.store() as store:
            circuit = read_circuit(store, key)
            return AtlasCircuit(self, find_run(store, circuit.selection.run), circuit)

    def features(self, *, site: str | None = None, text: str | None = None, kind: str | None = "feature", model: str | None = None) -> pl.DataFrame:
        """Features of the graph as a frame: of a site, with a text in their label (whatever its case), of a kind (feature, error, output; None: all).

        Columns: `key, model, dictionary, site, layer, kind, index, label, name, frequency, mean_activation, statistics_run`.
        """
        with self.store() as store:
            found = find_nodes(store, model=model, site=site, kind=kind, text=text)
        return _named(found)

    def feature(self, name: str) -> "AtlasFeature":
        """One feature, by its key or as `resid_11/696` (`resid_11/error`: the error node; `y`: the output). Raises `UnknownFeature`."""
        with self.store() as store:
            return AtlasFeature(self, find_node(store, name))

    @property
    def parcellations(self) -> pl.DataFrame:
        """The parcellations into regions, the last found first; empty where there are none."""
        if not self.has_statistics:
            return pl.DataFrame()
        with self.statistics_store() as statistics:
            return stored_parcellations(statistics)

    def parcellation(self, key: str | None = None) -> "Parcellation":
        """A parcellation with all its levels, by the beginning of its key; the one found last unless given. Raises `NoSuchParcellation`."""
        from .analysis.regions_store import read_parcellation

        with self.statistics_store() as statistics:
            return read_parcellation(statistics, key)

    @property
    def regions(self) -> pl.DataFrame:
        """The regions of the parcellation that was found last: size, label, correlations inside and outside, how often active, for which task."""
        return self.regions_of()

    def regions_of(self, parcellation: str | None = None) -> pl.DataFrame:
        """The regions of a parcellation, by the beginning of its key. Raises `NoSuchParcellation`."""
        with self.statistics_store() as statistics:
            key = find_parcellation(statistics, parcellation)
        return self.query("regions", parcellation=key, limit=1_000_000)

    def region(self, name: str, parcellation: str | None = None) -> pl.DataFrame:
        """The features of a region, named as `regions` numbers them (`resid_11/3`), or by a block's key; most often active first."""
        if "|" in name:
            return self.query("region_features", block=name, limit=1_000_000)
        site, _, number = name.rpartition("/")
        rows = self.regions_of(parcellation).filter((pl.col("site") == site) & (pl.col("number").cast(pl.String) == number))
        if rows.is_empty():
            raise UserError(f"no region {name!r}: regions are named as site/number (resid_11/3), see `atlas.regions`")
        return self.query("region_features", block=rows["block"][0], limit=1_000_000)

    def region_exhibits(self, parcellation: str | None = None) -> "dict[str, Exhibit]":
        """Figures of a parcellation's paths of partitions, by name, each with its question, reading and table; `.figure` is plotly's."""
        from .analysis.region_gallery import path_exhibits

        return {exhibit.name: exhibit for exhibit in path_exhibits(self.parcellation(parcellation))}

    @property
    def communities(self) -> pl.DataFrame:
        """The communities of every run's graphs, largest first."""
        with self.store() as store:
            frames = [run_query(store, "communities", {"run": run}) for run in self.runs["run"]]
        found = [frame for frame in frames if frame.height]
        return pl.concat(found) if found else pl.DataFrame()

    @property
    def samples(self) -> pl.DataFrame:
        """The runs of samples: `samples, basis, source, model, n_sequences, n_tokens, sites, megabytes`, the last first."""
        from .queries.samples import SampleStore

        runs = reversed(SampleStore(self.path, read_only=True).runs())
        return pl.DataFrame([
            {"samples": run.key, "basis": run.basis, "source": run.source, "model": run.model, "n_sequences": run.n_sequences,
             "n_tokens": run.n_tokens, "sites": ", ".join(run.dictionaries), "megabytes": run.n_bytes / 2**20}
            for run in runs
        ])  # fmt: skip

    def sample_run(self, key: str | None = None) -> "SampleRun":
        """A run of samples by the beginning of its key; the last unless given. Raises `NoSamples`."""
        from .queries.samples import SampleStore

        return SampleStore(self.path, read_only=True).find(key)

    @property
    def statistics(self) -> pl.DataFrame:
        """The runs of statistics, oldest first; empty where there are none."""
        if not self.has_statistics:
            return pl.DataFrame()
        with self.statistics_store() as statistics:
            return statistics.runs()

    # -- as a whole ----------------------------------------------------------------------------------------------------------

    def info(self) -> "Contents":
        """What the atlas holds: frames of runs, counts, dictionaries, sizes on the disk, and of what is unfinished."""
        from .queries.contents import atlas_contents

        with self.store() as store, self._statistics_or_none() as statistics:
            return atlas_contents(store, statistics, self.path if self.path.is_dir() else None, self.graph or str(self.path / "graph.lbug"))

    def check(self, *, fast: bool = False) -> "list[Finding]":
        """Everything that is wrong with the atlas, the worst first; empty where nothing is. `fast` leaves out deriving the aggregated edges."""
        from .queries.integrity import check_atlas

        with self.store() as store, self._statistics_or_none() as statistics:
            return check_atlas(store, statistics, self.path if self.path.is_dir() else None, fast=fast)

    def copy(self, target: str | Path, *, graph: str | None = None, runs: Sequence[str] | None = None, on_clash: str = "refuse") -> "AtlasCopied":
        """Copy the atlas, or some runs of it, to a folder (whose graph may be on a server) or into the atlas that is there; verified.

        Raises `AtlasesClash`, `UnknownRun`, and `StoreBusy` where the graph is open elsewhere, as in a `with` block of this atlas.
        """
        from .queries.atlases import Place, copy_atlas
        from .queries.copying import Clashes

        return copy_atlas(Place(self.path, self.graph), Place.of(str(target), graph), runs=runs, clashes=Clashes(on_clash))

    def prune(self, *runs: str, compact: bool = True) -> dict[str, int]:
        """Delete runs, by the beginnings of their keys, with all that hangs on them; how many nodes nothing needed then. Raises `ReadOnly`."""
        from .queries.atlases import GRAPH_FILE, Prunable, find_runs, prune_atlas
        from .queries.compaction import compact_graph, compact_statistics

        if self.read_only:
            raise ReadOnly(f"{self.path} was opened for reading: Atlas({str(self.path)!r}, read_only=False) may delete")
        self.close()
        with self.store() as store:
            chosen = Prunable(runs=find_runs(store, runs))
            if self.has_statistics:
                with StatisticsStore(self.path) as statistics:
                    gone = prune_atlas(store, statistics, self.path, chosen)
            else:
                gone = prune_atlas(store, None, self.path, chosen)
        if compact and self.graph is None:
            compact_graph(self.path / GRAPH_FILE)
        if compact and self.has_statistics:
            compact_statistics(self.path)
        return gone

    @contextmanager
    def _statistics_or_none(self) -> Iterator[StatisticsStore | None]:
        if not self.has_statistics:
            yield None
            return
        with self.statistics_store() as statistics:
            yield statistics

    # -- labels, and other models --------------------------------------------------------------------------------------------

    @property
    def labels(self) -> pl.DataFrame:
        """Every label of every kind, by model, site and feature, the best first."""
        with self.statistics_store() as statistics:
            return list_labels(statistics)

    def search(self, text: str, limit: int = 20, *, site: str | None = None) -> pl.DataFrame:
        """Features whose labels, tokens or contexts have the words of a text, best first."""
        with self.store() as store, self.statistics_store() as statistics:
            return search_labels(store, statistics, text, limit, site=site)

    @property
    def matchings(self) -> pl.DataFrame:
        """Matchings of features across models, the last made first."""
        with self.statistics_store() as statistics:
            return list_matchings(statistics)

    def matches(self, matching: str | None = None) -> pl.DataFrame:
        """The one-to-one matches of a matching, the one made last unless named: `source`, `target`, `score`, best first."""
        with self.statistics_store() as statistics:
            return matched_features(statistics, matching)

    def site_pairs(self, matching: str | None = None) -> pl.DataFrame:
        """Each pair of sites of a matching: features matched with what chance gives, CKA, SVCCA."""
        with self.statistics_store() as statistics:
            return read_site_pairs(statistics, matching)

    @property
    def comparisons(self) -> pl.DataFrame:
        """Comparisons of graphs that were kept, the last made first."""
        with self.statistics_store() as statistics:
            return list_comparisons(statistics)

    def comparison(self, name: str | None = None) -> "Comparison":
        """A comparison with its frames `values`, `curves`, `links`; the one made last unless named."""
        with self.statistics_store() as statistics:
            return read_comparison(statistics, name)

    @property
    def series(self) -> "list[SeriesRecord]":
        """The series of models that were measured; `.frames` of each are its numbers."""
        return list_series(self.path)

    def feature_statistics(self, site: str | None = None, run: str | None = None) -> pl.DataFrame:
        """Moments of every node (frequency, mean, variance, …) in a run of statistics, the last unless given."""
        with self.statistics_store() as statistics:
            return statistics.feature_statistics(statistics.find_run(run).run, site)

    def notes(self, keys: "pl.Series | list[str]", run: RunRow | None = None) -> pl.DataFrame:
        """Names, tokens and contexts of nodes, as `analysis.notes.NOTES`; from the statistics that fit a run, where one is given."""
        with self.store() as store:
            wanted = pl.DataFrame({"key": list(keys)}, schema={"key": pl.String}).unique()
            features = find_nodes(store).join(wanted, on="key", how="semi")
        contexts = pl.DataFrame(schema=CONTEXTS)
        if self.has_statistics:
            with self.statistics_store() as statistics:
                measured = _measured(statistics, features, run)
                if measured is not None:
                    contexts = strongest_contexts(statistics, measured, features["key"].to_list())
        return feature_notes(features, contexts, output=(run.metric.replace("_", " ") if run else "output"))

    def __repr__(self) -> str:
        of = f", graph={re.sub('//[^/@]*@', '//', self.graph)!r}" if self.graph else ""
        return f"Atlas({str(self.path)!r}{of}{'' if self.read_only else ', read_only=False'})"

    def _repr_html_(self) -> str:
        """What there is, in a notebook."""
        runs, counts = self.runs, self.query("overview")
        lines = [f"<b>Atlas</b> {html.escape(str(self.path))}" + (f" · {html.escape(self.graph)}" if self.graph else "")]
        lines += [_html_table(runs.select("run", "task", "method", "metric", "n_sequences", "n_edges"))] if runs.height else ["no runs yet"]
        return "<br>".join(lines) + _html_table(counts)


@dataclass(frozen=True)
class AtlasRun:
    """A run of edges: one model, its dictionaries, a task. `row` holds its properties."""

    atlas: Atlas
    row: RunRow

    @property
    def key(self) -> str:
        """The run's key."""
        return self.row.key

    @property
    def task(self) -> str:
        """The task, or tasks joined by `+`."""
        return self.row.task

    @property
    def properties(self) -> Mapping[str, object]:
        """Everything that the graph says of the run."""
        return self.row.properties

    @property
    def sequences(self) -> pl.DataFrame:
        """Its sequences: `key, task, clean, corrupt, answer, wrong_answer, metric_clean, metric_corrupt, n_edges`."""
        with self.atlas.store() as store:
            return run_sequences(store, self.key)

    @property
    def influences(self) -> pl.DataFrame:
        """Its edges as means over the sequences, strongest first, the ends named; `weight` is signed, in the metric's units."""
        with self.atlas.store() as store:
            edges = store.read_edges("INFLUENCES", run=self.key)
        return self.atlas_names(edges).sort("abs_weight", "source", "target", descending=[True, False, False])

    def edges(self, sequence: str | None = None, *, task: str | None = None) -> pl.DataFrame:
        """One sequence's edges (by the beginning of its key), or the means over one task of a mixture; else `influences`.

        Raises `UserError` for a sequence that the run does not have, `UnknownTask`.
        """
        if sequence is None and task is None:
            return self.influences
        chosen = None if sequence is None else self._sequence(sequence)
        with self.atlas.store() as store:
            edges = read_effects(store, self.row, Selection(self.key, sequence=chosen, task=task))
        return self.atlas_names(edges).sort(pl.col("weight").abs(), descending=True, maintain_order=True)

    def circuit(
        self, *, edges: int | None = None, threshold: float | None = None, by: str = "abs_weight", task: str | None = None,
        sequence: str | None = None, positions: bool = False,
    ) -> "AtlasCircuit":  # fmt: skip
        """A circuit: about the `edges` strongest (200 unless told otherwise), or all from a `threshold` on, without what lies on no path.

        `task`: of one task of a mixture; `sequence`: of one sequence, its token `positions` apart where they were kept. Raises `EmptyCircuit`
        or `NoEdges`.
        """
        if edges is not None and threshold is not None:
            raise UserError("edges and threshold exclude each other: give one of them")
        if by not in [one.value for one in By]:
            raise UserError(f"by={by!r}: an edge's strength is one of {', '.join(By)}")
        n = 200 if edges is None and threshold is None else edges
        chosen = None if sequence is None else self._sequence(sequence)
        selection = Selection(self.key, threshold or 0.0, By(by), sequence=chosen, task=task, positions=positions)
        with self.atlas.store() as store:
            return AtlasCircuit(self.atlas, self.row, run_circuit(store, self.row, selection, n_edges=n))

    @property
    def circuits(self) -> pl.DataFrame:
        """Its circuits that were written into the graph."""
        rows = self.atlas.circuits
        return rows.filter(pl.col("run") == self.key) if rows.height else rows

    @property
    def scores(self) -> pl.DataFrame:
        """Every value that ablation measured of its circuits and of controls, sequence by sequence; empty where nothing was."""
        if not self.atlas.has_statistics:
            return pl.DataFrame()
        with self.atlas.statistics_store() as statistics:
            return statistics.scores(self.key)

    @property
    def cut_edges(self) -> pl.DataFrame:
        """Its edges that were cut one at a time: `estimated` (attribution) beside `measured` (what the metric loses), the ends named."""
        with self.atlas.store() as store:
            return self.atlas_names(estimated_and_measured(store, self.key))

    def exhibits(
        self, *, metric: str | None = None, baseline: str | None = None, split: str = "held-out", task: str | None = None,
        candidates: int | None = None,
    ) -> "dict[str, Exhibit]":  # fmt: skip
        """What `featlas plot` draws, by name: each has `.figure` (plotly), `.table`, `.question`, `.reading` and `.findings`.

        Raises `NothingMeasured`.
        """
        from .verdict import stored_exhibits

        with self.atlas.store() as store:
            if not self.atlas.has_statistics:
                found = stored_exhibits(store, None, self.row, metric, baseline, split, task, candidates)
            else:
                with self.atlas.statistics_store() as statistics:
                    found = stored_exhibits(store, statistics, self.row, metric, baseline, split, task, candidates)
        return {exhibit.name: exhibit for exhibit in found}

    def figures(self, **chosen: Any) -> "dict[str, Figure]":
        """The figures of `exhibits`, by name."""
        return {name: exhibit.figure for name, exhibit in self.exhibits(**chosen).items()}

    @property
    def communities(self) -> pl.DataFrame:
        """The communities of its graph, largest first."""
        return self.atlas.query("communities", run=self.key)

    def atlas_names(self, edges: pl.DataFrame) -> pl.DataFrame:
        """Edges with `source_site`, `source_name`, `target_site` and `target_name` behind their ends."""
        with self.atlas.store() as store:
            nodes = _named(find_nodes(store, model=self.row.model), output=self.row.metric).select("key", "site", "name")
        for end in ("source", "target"):
            named = nodes.rename({"key": end, "site": f"{end}_site", "name": f"{end}_name"})
            edges = edges.join(named, on=end, how="left", maintain_order="left")
        first = ["source", "source_site", "source_name", "target", "target_site", "target_name"]
        return edges.select(*first, pl.exclude(first))

    def _sequence(self, name: str) -> str:
        """The key of the run's sequence that begins with `name`."""
        keys = [key for key in self.sequences["key"] if key.startswith(name)]
        if len(keys) != 1:
            known = ", ".join(self.sequences["key"].head(4))
            raise UserError(f"sequence {name!r} {'fits several' if keys else 'is none'} of run {self.key}: it has {known}, … (`run.sequences`)")
        return str(keys[0])

    def __repr__(self) -> str:
        return f"AtlasRun({self.key!r}, {self.task}, {self.properties.get('n_edges') or 0:,} edges)"

    def _repr_html_(self) -> str:
        names = ("model", "method", "steps", "metric", "baseline", "threshold", "n_sequences", "n_edges", "status")
        rows = pl.DataFrame({"property": names, "value": [str(self.properties.get(name, "")) for name in names]})
        return f"<b>Run</b> {html.escape(self.key)}: {html.escape(self.task)}{_html_table(rows)}"


@dataclass(frozen=True)
class AtlasCircuit:
    """A circuit of a run: `circuit` is the library's record of it; here its nodes are named."""

    atlas: Atlas
    run: RunRow
    circuit: Circuit

    @property
    def key(self) -> str:
        """Its key: under it it stands in the graph, once written."""
        return self.circuit.key

    @property
    def description(self) -> str:
        """What it is made of."""
        return self.circuit.selection.description

    @cached_property
    def notes(self) -> pl.DataFrame:
        """Names, telling tokens and contexts of its nodes, as `analysis.notes.NOTES`."""
        return self.atlas.notes(self.circuit.nodes["key"], self.run)

    @property
    def nodes(self) -> pl.DataFrame:
        """Its nodes by site: `key, name, site, layer, pos, kind, index, role, influence`."""
        named = self.circuit.nodes.join(self.notes.select("key", "name"), on="key", how="left", maintain_order="left")
        return named.select("key", "name", pl.exclude("key", "name"))

    @property
    def edges(self) -> pl.DataFrame:
        """Its edges: `source, target, src_pos, dest_pos, weight, strength, share, flow`, and the names of their ends."""
        names = self.notes.select("key", "name")
        edges = self.circuit.edges
        for end in ("source", "target"):
            edges = edges.join(names.rename({"key": end, "name": f"{end}_name"}), on=end, how="left", maintain_order="left")
        return edges

    @property
    def sites(self) -> pl.DataFrame:
        """How much of the effect flows through each site, and how much of it through its error node."""
        return site_summary(self.circuit)

    def top(self, n: int = 10, kinds: tuple[str, ...] = ("feature",)) -> pl.DataFrame:
        """The nodes with the most influence, with their contexts."""
        rows = top_nodes(self.circuit, n, kinds=kinds)
        return rows.join(self.notes.select("key", "name", "contexts"), on="key", how="left", maintain_order="left")

    def paths(self, n: int = 10, rule: str = "product") -> pl.DataFrame:
        """The strongest paths from an input to the output: `score, path` (names), `nodes` (keys), `positions`, `weights` along it."""
        if rule not in [one.value for one in PathRule]:
            raise UserError(f"rule={rule!r}: the strength of a path is one of {', '.join(PathRule)}")
        names = dict(self.notes.select("key", "name").iter_rows())
        found = strongest_paths(self.circuit, n, rule=PathRule(rule))
        rows = [
            {"score": path.score, "path": " → ".join(names.get(key) or key for key in path.nodes), "nodes": list(path.nodes),
             "positions": list(path.positions), "weights": list(path.weights)}
            for path in found
        ]  # fmt: skip
        lists = {"nodes": pl.List(pl.String), "positions": pl.List(pl.Int64), "weights": pl.List(pl.Float64)}
        types: dict[str, Any] = {"score": pl.Float64, "path": pl.String, **lists}
        return pl.DataFrame(rows, schema=types)

    @property
    def scores(self) -> pl.DataFrame:
        """Its faithfulness and completeness and those of controls of its size; empty where it was not measured, or not written."""
        return self.atlas.query("circuit_scores", circuit=self.key)

    def figure(self, max_edges: int = 150, title: str = "") -> "Figure":
        """The circuit drawn, input at the bottom, output on top; at most `max_edges`, those on the strongest paths."""
        from .analysis.plots import circuit_figure

        return circuit_figure(self.circuit, self.notes, max_edges=max_edges, title=title or self.description)

    def flow_figure(self) -> "Figure":
        """Where the effect flows, site by site."""
        from .analysis.plots import flow_figure

        return flow_figure(self.sites)

    def to_igraph(self) -> "igraph.Graph":
        """The circuit as a directed igraph graph: `vs["label"]` are names, `es["weight"]` strengths, `es["effect"]` signed effects."""
        from .analysis.exchange import circuit_frames, to_igraph

        return to_igraph(circuit_frames(self.circuit, self.notes))

    def to_networkx(self) -> "networkx.DiGraph":
        """The circuit as a directed networkx graph, its nodes by key, with the same attributes."""
        from .analysis.exchange import circuit_frames, to_networkx

        return to_networkx(circuit_frames(self.circuit, self.notes))

    def save(self) -> str:
        """Write it into the graph as a `Circuit`; its key. Raises `ReadOnly` unless the atlas was opened with `read_only=False`."""
        from .analysis.circuits import write_circuit

        if self.atlas.read_only:
            raise ReadOnly(f"{self.atlas.path} was opened for reading: Atlas({str(self.atlas.path)!r}, read_only=False) may write")
        with self.atlas.store() as store:
            return write_circuit(store, self.circuit)

    def __repr__(self) -> str:
        return f"AtlasCircuit({self.key!r}, {self.circuit.n_nodes:,} nodes, {self.circuit.n_edges:,} edges)"

    def _repr_html_(self) -> str:
        c = self.circuit
        said = f"{c.n_nodes:,} nodes, {c.n_edges:,} edges, average degree {c.average_degree:.1f}, density {c.density:.3g}"
        shown = self.top(8).select("name", "site", "influence")
        return f"<b>Circuit</b> {html.escape(self.key)}: {said}<br>{html.escape(self.description)}{_html_table(shown)}"


@dataclass(frozen=True)
class AtlasFeature:
    """One node of the graph: a feature, an error node or an output. `row` holds its properties."""

    atlas: Atlas
    row: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Its key."""
        return str(self.row["key"])

    @property
    def site(self) -> str:
        """The site it stands at."""
        return str(self.row["site"])

    @cached_property
    def name(self) -> str:
        """Its label, or what is most telling of it."""
        return str(self.atlas.notes([self.key])["name"][0])

    @property
    def statistics(self) -> pl.DataFrame:
        """Its moments in every run of statistics, one row each."""
        return self.atlas.sql("SELECT * FROM feature_statistics WHERE key = $key ORDER BY run", key=self.key)

    @property
    def contexts(self) -> pl.DataFrame:
        """The places where it is strongest, strongest first: `value, before, token, after`; empty where none are known."""
        if not self.atlas.has_statistics:
            return pl.DataFrame(schema=CONTEXTS)
        with self.atlas.statistics_store() as statistics:
            run = _measured(statistics, pl.DataFrame([dict(self.row)], schema_overrides={"statistics_run": pl.String}), None)
            found = strongest_contexts(statistics, run, [self.key]) if run else pl.DataFrame(schema=CONTEXTS)
        return found.sort(pl.col("value").abs(), descending=True, maintain_order=True)

    def inputs(self, run: str | None = None, limit: int = 20) -> pl.DataFrame:
        """What drives it in a run (the only one unless given), strongest first."""
        return self._neighbours("feature_inputs", run, limit)

    def outputs(self, run: str | None = None, limit: int = 20) -> pl.DataFrame:
        """What it drives in a run (the only one unless given), strongest first."""
        return self._neighbours("feature_outputs", run, limit)

    def _neighbours(self, query: str, run: str | None, limit: int) -> pl.DataFrame:
        named: dict[str, Any] = {} if run is None else {"run": run}
        return self.atlas.query(query, feature=self.key, limit=limit, **named)

    @property
    def wired_inputs(self) -> pl.DataFrame:
        """What is wired into it by the weights alone."""
        return self.atlas.query("wired_inputs", feature=self.key)

    @property
    def wired_outputs(self) -> pl.DataFrame:
        """What it is wired to by the weights alone."""
        return self.atlas.query("wired_outputs", feature=self.key)

    @property
    def circuits(self) -> pl.DataFrame:
        """The circuits of the graph that it is in, the smallest first."""
        with self.atlas.store() as store:
            return circuits_of_node(store, self.key)

    @property
    def regions(self) -> pl.DataFrame:
        """The regions that it is in, at every level of every parcellation."""
        return self.atlas.query("regions_of_feature", feature=self.key)

    def __repr__(self) -> str:
        label = self.row.get("label")
        return f"AtlasFeature({self.key!r}{f', {label!r}' if label else ''})"

    def _repr_html_(self) -> str:
        """Its name and strongest contexts, the token marked."""
        lines = []
        for row in self.contexts.head(8).iter_rows(named=True):
            before, after = ("".join(row[side] or []) for side in ("before", "after"))
            text = f"{html.escape(readable(before[-60:]))} <mark>{html.escape(readable(row['token']))}</mark> {html.escape(readable(after[:40]))}"
            lines.append(f'<tr><td style="text-align:right">{row["value"]:.2f}</td><td style="text-align:left">{text}</td></tr>')
        head = f"<b>{html.escape(self.name)}</b> · {html.escape(self.site)} · <code>{html.escape(self.key)}</code>"
        return f"{head}<table>{''.join(lines)}</table>"


def _named(features: pl.DataFrame, output: str = "output") -> pl.DataFrame:
    """Nodes with a `name` behind their label, from the graph alone."""
    names = feature_notes(features, pl.DataFrame(schema=CONTEXTS), output=output).select("key", "name")
    named = features.join(names, on="key", how="left", maintain_order="left")
    order = [name for name in features.columns if name != "label"]
    place = order.index("index") + 1
    return named.select(*order[:place], "label", "name", *order[place:])


def _measured(statistics: StatisticsStore, features: pl.DataFrame, run: RunRow | None) -> str | None:
    """The run of statistics that contexts are taken from: the last that fits a run, else the one that the nodes name."""
    if run is not None:
        found = statistics.latest_run(run.model, run.dictionaries)
        return None if found is None else found.run
    named = features["statistics_run"].drop_nulls() if "statistics_run" in features.columns else pl.Series([], dtype=pl.String)
    return str(named.mode()[0]) if named.len() else None


def _html_table(frame: pl.DataFrame) -> str:
    """A small table, everything escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in frame.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(readable(_cell(value), 60))}</td>' for value in row)}</tr>" for row in frame.iter_rows())
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cell(value: object) -> str:
    """A value as a reader wants it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
