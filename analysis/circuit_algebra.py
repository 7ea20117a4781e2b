"""Circuits made of others, or by hand: union, intersection and difference; edges or nodes from a query or a file.

A circuit is a set of edges; its nodes are their ends. Edges keep the numbers that they were measured with:
1. `combine`: each edge of the result has the weight and strength of the first circuit, in the order given, that has it.
2. `chosen`: edges by hand have the numbers of the run, unless they bring their own; an edge that the run did not measure has 0.
   Nodes by hand stand for all of the run's edges among them.
Either may be pruned to what lies between inputs and the output, or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from ..model.sites import OUTPUT
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, find_run, model_features
from .circuits import (
    NO_POSITION,
    Candidates,
    Circuit,
    EmptyCircuit,
    Selection,
    UnknownNodes,
    read_circuit,
    read_effects,
    root_sites,
    run_roots,
    strengths,
)

ENDS = ["source", "target", "src_pos", "dest_pos"]


class NotAChoice(UserError):
    """A query's answer or a file does not name edges or nodes."""


class NotCombined(UserError):
    """Circuits that cannot be taken together."""


class Operation(StrEnum):
    """What is done with the edge sets of several circuits."""

    UNION = "union"
    """Edges that any of them has."""
    INTERSECTION = "intersection"
    """Edges that all of them have."""
    DIFFERENCE = "difference"
    """Edges of the first that none of the others has."""


def combine(operation: Operation, circuits: Sequence[Circuit], *, pruned: bool = True) -> Circuit:
    """One circuit of several; it may be empty.

    Inputs are the nodes of the sites that are inputs in any of them. Raises `NotCombined` for fewer than two circuits, or where some
    keep positions apart and others do not.
    """
    if len(circuits) < 2:
        raise NotCombined(f"the {operation.value} of {len(circuits)} circuit: name two or more, separated by commas")
    if len({circuit.selection.positions for circuit in circuits}) > 1:
        raise NotCombined("some of the circuits keep positions apart and others do not: take all with --positions, or none")
    tagged = [circuit.edges.select(*ENDS, "weight", "strength").with_columns(pl.lit(i).alias("part")) for i, circuit in enumerate(circuits)]
    every = pl.concat(tagged).sort(*ENDS, "part").group_by(ENDS, maintain_order=True)
    edges = every.agg(pl.col("weight", "strength").first(), pl.col("part").first().alias("first"), pl.len().alias("n"))
    edges = edges.filter(_KEPT[operation] if operation is not Operation.INTERSECTION else pl.col("n") == len(circuits))
    features = pl.concat([circuit.nodes.select("key", "site", "layer", "kind", "index") for circuit in circuits]).unique("key")
    inputs = pl.concat([circuit.nodes.filter(pl.col("role") == "input")["site"] for circuit in circuits]).unique().sort().to_list()
    candidates = Candidates.of(edges.select(*ENDS, "weight", "strength"), features, inputs)
    return candidates.circuit(np.ones(edges.height, dtype=bool), _combined(operation, circuits, pruned))


_KEPT = {Operation.UNION: pl.lit(True), Operation.DIFFERENCE: (pl.col("first") == 0) & (pl.col("n") == 1)}


def _combined(operation: Operation, circuits: Sequence[Circuit], pruned: bool) -> Selection:
    """What the result is made of: the parts by their keys, all their runs."""
    first = circuits[0].selection
    runs = dict.fromkeys(run for circuit in circuits for run in circuit.selection.runs)
    others = tuple(run for run in runs if run != first.run)
    origin = f"{operation.value} of {', '.join(circuit.key for circuit in circuits)}"
    return Selection(first.run, by=first.by, positions=first.positions, origin=origin, other_runs=others, pruned=pruned)


def combine_stored(store: GraphStore, operation: Operation, keys: Sequence[str], *, pruned: bool = True) -> Circuit:
    """`combine` of circuits of the graph, by the beginnings of their keys. Raises `NotCombined` for different models, `EmptyCircuit`."""
    circuits = [read_circuit(store, key) for key in keys]
    models = {find_run(store, run).model for circuit in circuits for run in circuit.selection.runs}
    if len(models) > 1:
        raise NotCombined(f"the circuits are of different models, {' and '.join(sorted(models))}: their features are not the same nodes")
    made = combine(operation, circuits, pruned=pruned)
    if not made.n_edges:
        on_path = "on a path from an input to the output: --no-prune keeps what is on none, where there is any" if pruned else "at all"
        raise EmptyCircuit(f"the {operation.value} of {', '.join(keys)} has no edge {on_path}")
    return made


@dataclass(frozen=True)
class Choice:
    """Edges or nodes by hand. `rows` has `source`, `target` (and `src_pos`, `dest_pos`, `weight`), or `key` (and `pos`); `origin` is whence."""

    rows: pl.DataFrame
    origin: str

    def __post_init__(self) -> None:
        if not {"source", "target"} <= set(self.rows.columns) and "key" not in self.rows.columns:
            columns = ", ".join(self.rows.columns) or "none"
            raise NotAChoice(f"{self.origin}: columns {columns} name neither edges (source, target: keys of features) nor nodes (key)")
        keys = [name for name in ("source", "target", "key") if name in self.rows.columns]
        if not self.rows.height:
            raise NotAChoice(f"{self.origin}: no rows")
        if bad := next((name for name in keys if self.rows[name].dtype != pl.String or self.rows[name].null_count()), None):
            raise NotAChoice(f"{self.origin}: column {bad} must hold keys of features, in every row")

    @property
    def of_edges(self) -> bool:
        """Whether edges are named, not nodes."""
        return "source" in self.rows.columns


def query_choice(store: GraphStore, cypher: str) -> Choice:
    """The edges or nodes that a reading query answers with, by the names of its columns."""
    return Choice(store.query(cypher), f"query {' '.join(cypher.split())}")


def file_choice(path: Path) -> Choice:
    """The edges or nodes of a CSV file with a header, or of a file of JSON lines. Raises `NotAChoice`."""
    try:
        with path.open("rb") as file:  # not by its path, which would be read as a pattern
            rows = pl.read_csv(file) if path.suffix.lower() == ".csv" else pl.read_ndjson(file)
    except OSError as error:
        raise NotAChoice(f"{path} cannot be read: {error.strerror or error}") from None
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise NotAChoice(f"{path} is no CSV file with a header (.csv), nor one of JSON lines: {reason}") from None
    return Choice(rows, f"file {path.name}")


def chosen(candidates_rows: pl.DataFrame, features: pl.DataFrame, choice: Choice, selection: Selection, roots: Sequence[str]) -> Circuit:
    """The circuit of edges or nodes by hand; it may be empty.

    `candidates_rows`: the run's edges, as `strengths` gives them; `features`: `key, site, layer, kind, index` of the model's nodes.
    Nodes stand for the run's edges among them; the output is always one of them. Raises `UnknownNodes` for keys that `features` lacks.
    """
    if choice.of_edges:
        rows = _edges_by_hand(candidates_rows, choice.rows, selection)
    else:
        rows = _edges_among(candidates_rows, features, choice.rows, selection)
    selection = replace(selection, origin=choice.origin if choice.of_edges else f"{choice.origin} (nodes)")
    return Candidates.of(rows, features, roots).circuit(np.ones(rows.height, dtype=bool), selection)


def _edges_by_hand(candidates: pl.DataFrame, given: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """Edges named by their ends, as `strengths` gives them."""
    ends = ENDS if selection.positions else ENDS[:2]
    if not set(ends) <= set(given.columns):
        raise NotAChoice("edges with --positions need the columns src_pos and dest_pos")
    own = pl.col("weight").cast(pl.Float64) if "weight" in given.columns else pl.lit(None, dtype=pl.Float64)
    given = given.unique(ends, keep="first", maintain_order=True)
    given = given.select(*[pl.col(name).cast(candidates.schema[name]) for name in ends], own.alias("own"))
    rows = given.join(candidates, on=ends, how="left", maintain_order="left")
    return rows.select(
        *[pl.col(name).fill_null(NO_POSITION) if name in ENDS[2:] else pl.col(name) for name in ENDS],
        pl.coalesce("own", "weight", pl.lit(0.0)).alias("weight"),
        pl.coalesce(pl.col("own").abs(), "strength", pl.lit(0.0)).alias("strength"),
    )


def _edges_among(candidates: pl.DataFrame, features: pl.DataFrame, given: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """The run's edges among named nodes and the output; at the named positions only, where they are kept and given."""
    missing = given.join(features, on="key", how="anti")["key"].unique().sort()
    if len(missing):
        raise UnknownNodes(f"{len(missing)} keys are none of this model's nodes in the graph, among them {missing[0]!r}")
    output = features.filter(pl.col("site") == OUTPUT.name)["key"]
    at_positions = selection.positions and "pos" in given.columns
    for key, pos in (("source", "src_pos"), ("target", "dest_pos")):
        named = given.select(pl.col("key").alias(key), *([pl.col("pos").cast(pl.Int64).alias(pos)] if at_positions else [])).unique()
        inside = candidates.join(named, on=named.columns, how="semi")
        candidates = pl.concat([inside, candidates.filter(pl.col(key).is_in(output.implode()))]).unique(ENDS)
    return candidates


def chosen_from(store: GraphStore, run: RunRow, choice: Choice, selection: Selection) -> Circuit:
    """The circuit of edges or nodes by hand, with the numbers of a run's effects. Raises `EmptyCircuit`, and what `chosen` does."""
    rows = strengths(read_effects(store, run, selection), selection)
    features = model_features(store, run.model)
    roots = run_roots(run)
    made = chosen(rows, features, choice, selection, root_sites(rows, features) if roots is None else roots)
    if not made.n_edges:
        given = f"{choice.rows.height} edges" if choice.of_edges else f"the run's edges among {choice.rows.height} nodes"
        none = "leave no path from an input to the output: --no-prune keeps what is on none" if selection.pruned else "are none at all"
        raise EmptyCircuit(f"{choice.origin}: {given} {none}")
    return made
