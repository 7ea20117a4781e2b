"""The verdict on regions of interest: do they matter, and more than other sets of features of the same sizes?

1. `attributions`: what every node sends to the output on every path, and what units drive each other, by the engine at threshold 0.
2. `contestants`: the regions beside other parcellations, heads, single features and random blocks of the same sizes.
3. `put_to_the_test`: keeping and cutting them by share of features, circuits of them, and which breaks which task.
4. `write_back`: edges between regions and their scores into the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from .analysis.faithfulness import CIRCUIT, COMPLEMENT, HELD_OUT, Averaging, faithfulness, matched
from .analysis.parcellation import Parcellation, units_of
from .analysis.partitioning import random_blocks
from .analysis.region_gallery import Tested, verdict_page
from .analysis.region_study import (
    EDGE_SHARES,
    FEATURES,
    HEADS,
    RANDOM,
    REGIONS,
    SHARES,
    Contestant,
    Drives,
    NothingToTest,
    UnitCircuit,
    cutting_circuits,
    drive_removals,
    drive_table,
    keeping,
    live_members,
    region_circuits,
    removal_matrix,
    removals,
    run_kept,
    run_removals,
    selectivity,
    strongest_units,
)
from .analysis.regions_store import drives_frame, unit_blocks, write_drives, write_region_circuit, write_regions
from .analysis.scores import DefaultScore, merge_scores, write_scores, write_sweep
from .analysis.study import Ablation, Study, own_baseline_name
from .errors import UserError
from .ingest.unit_edges import attribute_units
from .model.sites import Site
from .model.tasks import Pair
from .model.units import NotUnits, Units, heads
from .queries.blocks import blocks_of
from .queries.statistics import StatisticsStore
from .queries.store import GraphStore
from .verdict import attributed

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """What each node sends to the output on every path, per sequence (Marks et al. 2024): per site (sequences, d_sae + 1), the error node last."""

    effects: Mapping[Site, sparse.csr_matrix]
    tasks: tuple[str, ...]

    def of(self, units: Units) -> FloatArray:
        """Attribution of units, the sum over their members, (sequences, units)."""
        found = np.zeros((len(self.tasks), len(units)))
        for site, own in units.of.items():
            members = sparse.csr_matrix((np.ones(len(own)), (np.arange(len(own)), own.numpy())), shape=(len(own), len(units)))
            found += (self.effects[site] @ members).toarray()
        return found


def attributions(
    study: Study, pairs: Sequence[Pair], among: Sequence[Pair] | None, partitions: Sequence[Units], progress: Progress | None = None
) -> tuple[NodeEffects, list[Drives]]:
    """Every node's attribution to the metric on each sequence, and the attribution between the units of each partition.

    At threshold 0, positions summed. among: the sequences that a resampled baseline is drawn from.
    """
    parts: dict[Site, list[sparse.csr_matrix]] = {}
    tasks: list[str] = []
    sums = [_DriveSums(units) for units in partitions]
    for prepared, of_sites in attributed(study, pairs, among):
        for site, per_sequence in of_sites:
            parts.setdefault(site, []).append(sparse.csr_matrix(per_sequence.cpu().double().numpy()))
        own = [pair.task for pair in prepared.pairs.pairs]
        for one in sums:
            one.add(attribute_units(prepared, one.units).cpu().numpy())
        tasks += own
        if progress is not None:
            progress(len(tasks), len(pairs))
    effects = {site: sparse.vstack(found, format="csr") for site, found in parts.items()}
    return NodeEffects(effects, tuple(tasks)), [one.drives() for one in sums]


class _DriveSums:
    """Sums over sequences of the attribution between units."""

    def __init__(self, units: Units) -> None:
        n = len(units) + 1
        self.units = units
        self.signed, self.magnitude = np.zeros((n, n)), np.zeros((n, n))
        self.found = np.zeros((n, n), dtype=np.int64)
        self.n = 0

    def add(self, weights: FloatArray) -> None:
        """Add sequences: weights (batch, n + 1, n + 1)."""
        self.signed += weights.sum(axis=0)
        self.magnitude += np.abs(weights).sum(axis=0)
        self.found += (weights != 0).sum(axis=0)
        self.n += len(weights)

    def drives(self) -> Drives:
        n = max(1, self.n)
        return Drives(self.units, self.signed / n, self.magnitude / n, self.found, n)


# --- who competes -----------------------------------------------------------------------------------------------------


def partitions(
    study: Study, parcellations: Mapping[str, Parcellation], *, draws: int, features: bool = True, seed: int = 0
) -> dict[tuple[str, int], Units]:
    """The partitions of the model's nodes under test, by name and draw: the parcellations', the first one's with random blocks of the same sizes,
    heads where every site that it partitions is the identity on heads, and single features.

    Sites that the first parcellation does not partition are one unit for all their features, in every partition.
    """
    first = next(iter(parcellations.values()))
    sites = [site.name for site in study.dictionaries]
    if not set(sites) & set(first.sites):
        raise NothingToTest(f"regions {first.key} are of {', '.join(first.sites)}, and run {study.run.key} is of {', '.join(sites)}: none in common")
    found = {(name, 0): own.units(study.graph, study.dictionaries) for name, own in parcellations.items()}
    blocks = {name: own.labels_of() for name, own in first.sites.items()}
    for draw in range(draws):
        shuffled = {name: _shuffled(labels, seed + draw) for name, labels in blocks.items()}
        found[RANDOM, draw] = units_of(study.graph, study.dictionaries, shuffled)
    if (by_head := _head_blocks(study, first)) is not None:
        found[HEADS, 0] = units_of(study.graph, study.dictionaries, by_head)
    if features:
        singles = {name: np.where(labels < 0, -1, (labels >= 0).cumsum() - 1) for name, labels in blocks.items()}
        found[FEATURES, 0] = units_of(study.graph, study.dictionaries, singles)
    return found


def _shuffled(labels: IntArray, seed: int) -> IntArray:
    """Blocks of the same sizes, drawn at random among the live features."""
    found = labels.copy()
    found[labels >= 0] = random_blocks(labels[labels >= 0], seed)
    return found


def _head_blocks(study: Study, parcellation: Parcellation) -> dict[str, IntArray] | None:
    """Each feature's head, for sites whose features are the dimensions of their heads' outputs; None where one is not."""
    found = {}
    for site, dictionary in study.dictionaries.items():
        if site.name in parcellation.sites:
            try:
                labels, _ = heads(dictionary, site, study.binding.n_heads)
            except NotUnits:
                return None
            found[site.name] = labels[:-1].numpy()
    return found


def contestants(
    known: Mapping[tuple[str, int], Units], effects: NodeEffects, drives: Sequence[Drives], live: Mapping[str, IntArray]
) -> list[Contestant]:
    """The partitions with their attributions; `drives` of some of them."""
    of = {id(one.units): one for one in drives}
    return [
        Contestant(name, units, effects.of(units), effects.tasks, live_members(units, live), of.get(id(units)), draw)
        for (name, draw), units in known.items()
    ]


# --- the test ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionTests:
    """What is tested. shares: of the live features that are kept alive. edge_shares: of the edges between units; empty for no circuits.

    per_member: rank units by attribution per live member. blocks: units of each partition that are cut one at a time, the strongest; 0 for none.
    drives: strongest edges between regions that are cut one at a time. random_draws: random partitions of the same sizes. features: whether
    single features compete. held_out: sequences to test on.
    """

    shares: tuple[float, ...] = SHARES
    edge_shares: tuple[float, ...] = EDGE_SHARES
    per_member: bool = False
    blocks: int = 24
    drives: int = 40
    random_draws: int = 2
    features: bool = True
    held_out: int = 24

    def check(self) -> None:
        """Raise a `UserError` for a number out of range."""
        if not self.shares:
            raise UserError("--shares is empty: give numbers above 0 and at most 1, such as 0.1,0.3,1")
        for name, shares in (("--shares", self.shares), ("--edge-shares", self.edge_shares)):
            if bad := [share for share in shares if not 0 < share <= 1]:
                raise UserError(f"{name} {bad[0]:g} is no share to keep: give numbers above 0 and at most 1")
        for name, number, least in (
            ("--blocks", self.blocks, 0), ("--drives", self.drives, 0), ("--random-draws", self.random_draws, 1), ("--held-out", self.held_out, 1),
        ):  # fmt: skip
            if number < least:
                raise UserError(f"{name} {number} is too small: give at least {least}")


@dataclass(frozen=True, eq=False)
class RegionVerdict:
    """What was measured. values, kept: as `VALUES` and `KEPT`. matrix_values: of removals of single units, by the study's metrics.

    drive_values: of removals of single edges between regions, `size` their rank. competitors: every partition, with the attributions it is ranked by.
    circuits: of regions, those among `kept` that are cut by edges.
    """

    study: Study
    options: RegionTests
    n_found: int
    n_tested: int
    competitors: Sequence[Contestant]
    values: pl.DataFrame
    kept: pl.DataFrame
    matrix_values: pl.DataFrame
    drive_values: pl.DataFrame
    circuits: Sequence[UnitCircuit] = ()

    @property
    def metric(self) -> str:
        return self.study.default_metric

    @property
    def regions(self) -> Contestant:
        return self.competitors[0]

    @cached_property
    def sizes(self) -> pl.DataFrame:
        """`kept` as `faithfulness.SIZES`: nodes are live features; edges, degree and density those of the graph of units."""
        n, m = pl.col("n_units").cast(pl.Float64), pl.col("n_edges")
        return self.kept.select(
            "method", "ablation", "size", "draw", pl.col("n_features").alias("n_nodes"), "n_edges",
            pl.when(n > 0).then(2 * m / n).otherwise(0.0).alias("average_degree"),
            pl.when(n > 1).then(2 * m / (n * (n - 1))).otherwise(0.0).alias("density"),
            pl.lit(None, dtype=pl.Float64).alias("threshold"), pl.lit(None, dtype=pl.String).alias("circuit"),
        )  # fmt: skip

    @cached_property
    def table(self) -> pl.DataFrame:
        """φ of the units kept and of what is left without them, with the share of live features and the number of units, tasks pooled."""
        sizes = self.kept.group_by("method", "ablation", "size").agg(pl.col("share", "n_units", "n_features", "n_edges").mean())
        return faithfulness(self.values).join(sizes, on=["method", "ablation", "size"], how="left")

    @cached_property
    def compared(self) -> pl.DataFrame:
        """φ of every other partition beside that of the regions, nodes cut, at equal numbers of live features; positive differences are theirs."""
        return self._matched(CIRCUIT)

    @cached_property
    def compared_cut(self) -> pl.DataFrame:
        """The same of what is left when the strongest are cut: lower is more damage with as many features."""
        return self._matched(COMPLEMENT)

    def _matched(self, part: str) -> pl.DataFrame:
        own = (pl.col("metric") == self.metric) & (pl.col("ablation") == Ablation.NODE.value)
        return matched(
            self.values.filter(own), self.sizes, (REGIONS, Ablation.NODE.value), on="n_nodes", part=part, averaging=(Averaging.RATIO_OF_MEANS,)
        )

    @cached_property
    def matrix(self) -> pl.DataFrame:
        """Which unit breaks which task, as `MATRIX`, by the default metric; empty where none was cut."""
        return removal_matrix(self.matrix_values.filter(pl.col("metric") == self.metric), self.competitors)

    @cached_property
    def selectivity(self) -> pl.DataFrame | None:
        """How much of what the blocks break is one task's alone; None for one task."""
        rows = self.matrix_values.filter(pl.col("metric") == self.metric)
        return selectivity(rows) if rows["task"].n_unique() > 1 else None

    @cached_property
    def drives(self) -> pl.DataFrame:
        """The strongest edges between regions with what cutting each costs: source, target, weight, strength, per_member, effect, low, high, n."""
        return drive_table(self.regions, self.drive_values.filter(pl.col("metric") == self.metric))


def put_to_the_test(
    study: Study,
    parcellations: Mapping[str, Parcellation],
    found: Sequence[Pair],
    tested: Sequence[Pair],
    options: RegionTests,
    *,
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda label: nullcontext(lambda done, total: None),
) -> RegionVerdict:
    """Attribute on the sequences `found`, test on `tested`. parcellations: by the name under which each competes, the regions first.

    `progress(label)` is entered for each part and gives what is called with (sequences done, all) while it goes on.
    """
    options.check()
    among = list({pair.key: pair for pair in (*found, *tested)}.values())
    known = partitions(study, parcellations, draws=options.random_draws, features=options.features, seed=study.options.seed)
    joined = [units for (name, draw), units in known.items() if name != FEATURES and not draw] if options.edge_shares or options.drives else []
    with progress("attribution") as report:
        effects, drives = attributions(study, found, among, joined, report)
    live = {name: own.features for name, own in next(iter(parcellations.values())).sites.items()}
    competitors = contestants(known, effects, drives, live)
    kept = [one for own in competitors for one in keeping(own, options.shares, per_member=options.per_member)]
    circuits = {own: region_circuits(own.drives, options.edge_shares) for own in competitors if own.drives is not None and options.edge_shares}
    kept += [one for own, cut in circuits.items() for one in cutting_circuits(own, cut)]
    single = [trial for own in competitors if own.method != FEATURES for trial in removals(own, strongest_units(own, options.blocks))]
    edges = drive_removals(competitors[0], options.drives) if options.drives else []
    with progress("kept and cut") as report:
        values, sizes = run_kept(study, tested, kept, among=among, progress=report)
    with progress("one block at a time") as report:
        matrix = run_removals(study, tested, single, among=among, progress=report) if single else values.clear()
    with progress("one edge at a time") as report:
        cut = run_removals(study, tested, edges, among=among, progress=report) if edges else values.clear()
    return RegionVerdict(
        study, options, len(found), len(tested), competitors, values, sizes, matrix, cut, tuple(circuits.get(competitors[0], ()))
    )


# --- out of the program -----------------------------------------------------------------------------------------------

LARGEST_WRITTEN = 2_000
"""Edges of the largest circuit of regions that is written into the graph."""


@dataclass(frozen=True)
class RegionsScored:
    """What was written: edges between blocks, circuits of blocks, scores of blocks and of circuits."""

    n_drives: int
    n_circuits: int
    n_scores: int


def sweep_subject(verdict: RegionVerdict, parcellation: Parcellation) -> str:
    """What the values in the statistics store are of: other levels, or another ranking, are other units of the same numbers."""
    levels = ",".join(str(own.chosen) for own in parcellation.sites.values())
    return f"{verdict.study.run.key}:{parcellation.key}@{levels}" + (":by mean" if verdict.options.per_member else "")


def write_back(store: GraphStore, statistics: StatisticsStore, verdict: RegionVerdict, parcellation: Parcellation) -> RegionsScored:
    """What regions drive, their circuits, and what each task loses without each of them, into the graph; every value into the statistics store.

    Doing it twice is doing it once. A `DRIVES` edge is of a run, hence of the run's own baseline: by another one none is written.
    """
    study, regions = verdict.study, verdict.regions
    run, drives = study.run, regions.drives
    own = study.baseline_name.removesuffix(f", errors {study.options.errors.value}") == own_baseline_name(run)
    subject = sweep_subject(verdict, parcellation)
    write_sweep(statistics, run.key, subject, verdict.values, verdict.sizes)
    for part, values in (("removals", verdict.matrix_values), ("drives", verdict.drive_values)):
        if values.height:
            write_sweep(statistics, run.key, f"{subject}:{part}", values)
    if blocks_of(store, parcellation.key).is_empty():
        write_regions(store, parcellation)
    n_drives, keys = 0, {}
    if drives is not None:
        frame = drives_frame(drives.units, drives.mean, drives.strength, drives.n)
        n_drives = write_drives(store, run.key, parcellation, drives.units, frame, output=study.target.name) if own else 0
        for circuit in verdict.circuits:
            if 0 < circuit.n_edges <= LARGEST_WRITTEN:
                keys[circuit.size] = write_region_circuit(
                    store, run.key, parcellation, drives.units, circuit.edges.rows.numpy(), drives.mean, strengths=drives.strength,
                    output=study.target.name, settings={"baseline": study.baseline_name},
                )  # fmt: skip
    _write_purposes(store, verdict, parcellation)
    written = _score_circuits(store, verdict, keys) + _score_blocks(store, verdict, parcellation)
    return RegionsScored(n_drives, len(keys), written)


def _write_purposes(store: GraphStore, verdict: RegionVerdict, parcellation: Parcellation) -> None:
    """The task that each block is most attributed to, with its share, onto the blocks."""
    regions = verdict.regions
    keys = unit_blocks(parcellation, regions.units, output=verdict.study.target.name)["key"]
    found = regions.purposes.filter(pl.Series(regions.live[regions.purposes["unit"].to_numpy()] > 0))
    store.merge_nodes(
        "Block",
        found.select(
            keys.gather(found["unit"]).alias("key"), pl.col("task").alias("attributed_task"), pl.col("share").alias("attributed_share"),
            pl.lit(verdict.study.run.key).alias("attributed_run"),
        ),
    )


def _score_circuits(store: GraphStore, verdict: RegionVerdict, keys: Mapping[int, str]) -> int:
    """Faithfulness and completeness of the circuits of regions, by the number of edges that they were cut from."""
    seed = verdict.study.options.seed if verdict.study.baseline.drawn else 0
    own = faithfulness(verdict.values).filter((pl.col("method") == REGIONS) & (pl.col("ablation") == Ablation.EDGE.value))
    default = replace(DefaultScore.of(verdict.study.run), baseline=own_baseline_name(verdict.study.run), averaging=Averaging.RATIO_OF_MEANS)
    written = [
        write_scores(store, verdict.study.run, own.filter(pl.col("size") == size), circuit=key, own=REGIONS, default=default, seed=seed).n_scores
        for size, key in keys.items()
    ]
    return sum(written)


def _score_blocks(store: GraphStore, verdict: RegionVerdict, parcellation: Parcellation) -> int:
    """What each task loses without each block that was cut, as `Score`s of kind `loss`."""
    rows = verdict.matrix.filter(pl.col("method") == REGIONS)
    if rows.is_empty():
        return 0
    study = verdict.study
    blocks = unit_blocks(parcellation, verdict.regions.units, output=study.target.name)["key"]
    said = {
        "kind": "loss", "ablation": Ablation.NODE.value, "metric": verdict.metric, "baseline": study.baseline_name,
        "averaging": Averaging.RATIO_OF_MEANS.value, "split": HELD_OUT, "seed": study.options.seed if study.baseline.drawn else 0,
    }  # fmt: skip
    scores = rows.select("task", "value", "low", "high", "n", "undefined_n", pl.Series("subject", blocks.gather(rows["unit"]))).with_columns(
        *(pl.lit(value).alias(name) for name, value in said.items()), pl.lit(REGIONS).alias("method")
    )
    return merge_scores(store, scores)


def as_json(verdict: RegionVerdict, parcellation: Parcellation) -> dict[str, object]:
    """A verdict for machines."""
    chosen = verdict.selectivity
    return {
        "run": verdict.study.run.key, "parcellation": parcellation.key, "metric": verdict.metric, "baseline": verdict.study.baseline_name,
        "found": verdict.n_found, "tested": verdict.n_tested, "table": verdict.table.to_dicts(), "compared": verdict.compared.to_dicts(),
        "compared_cut": verdict.compared_cut.to_dicts(), "matrix": verdict.matrix.to_dicts(), "drives": verdict.drives.to_dicts(),
        "selectivity": [] if chosen is None else chosen.to_dicts(),
    }  # fmt: skip


def page(verdict: RegionVerdict, parcellation: Parcellation, names: Mapping[str, str]) -> str:
    """A verdict as a page of figures; `names`: what units are called."""
    study, units = verdict.study, verdict.regions.units
    sites = [study.graph.sites[i].name for i in units.site_of.tolist()]
    labels = [names.get(name, name) for name in units.names]
    nodes = pl.DataFrame({"name": list(units.names), "label": labels, "site": sites, "n_features": [*verdict.regions.live.tolist(), 0]})
    fixed = f"{verdict.metric} · {study.baseline_name} baseline · {verdict.n_tested} held-out sequences · ratio of means"
    compared = {"Kept": verdict.compared, "Cut (lower is more damage)": verdict.compared_cut}
    tested = Tested(verdict.table, compared, verdict.matrix, verdict.selectivity, verdict.drives, nodes, verdict.metric, fixed)
    settings = [
        ("parcellation", parcellation.key), ("method", f"{parcellation.method} of {parcellation.basis}s"), ("run", study.run.key),
        ("model", study.model.key), ("baseline", study.baseline_name), ("found on", f"{verdict.n_found} sequences"),
        ("tested on", f"{verdict.n_tested} held-out sequences"), ("ranked by", "mean" if verdict.options.per_member else "sum"),
        ("partitions", ", ".join(dict.fromkeys(one.method for one in verdict.competitors))), ("seed", str(study.options.seed)),
    ]  # fmt: skip
    subtitle = f"{parcellation.method} of {parcellation.basis}s, parcellation {parcellation.key}, run {study.run.key}"
    return verdict_page(tested, names, f"Regions put to the test: {study.run.task}", subtitle=subtitle, settings=settings)


def all_values(verdict: RegionVerdict) -> pl.DataFrame:
    """Every value that was measured, with the `test` that it is of and what was kept alive."""
    kept = verdict.values.join(verdict.kept, on=["method", "ablation", "size", "draw"], how="left").with_columns(pl.lit("kept").alias("test"))
    rest = [
        values.with_columns(pl.lit(name).alias("test")) for name, values in (("block cut", verdict.matrix_values), ("edge cut", verdict.drive_values))
    ]
    return pl.concat([kept, *rest], how="diagonal")
