"""Regions put to the test: is a set of features that fire together also a part of the model that does something?

Every partition of the model's nodes is put to the same tests, by the same engine: regions of interest, attention heads where the sites have
them, single features, random blocks of equal sizes. Error nodes, dead features, and all of a site that was not partitioned are units of their own.

1. `keeping`: only the units of greatest attribution are alive (node ablation), by growing share of the live features; the complement is the
   model with those units cut, in order of attribution. Units without live features stay alive in both.
2. `region_circuits`: circuits of units, the strongest edges between them, error nodes' among them, pruned (edge ablation).
3. `removals`: one unit at a time at its baseline, and what each task loses: the task × block matrix; `drive_removals` cuts one edge between
   units at a time.
4. `selectivity`: how much of what a block breaks is one task's alone, beside random blocks of the same sizes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError
from ..model.sites import OUTPUT
from ..model.tasks import Pair
from ..model.units import UnitEdges, Units
from .faithfulness import DEFAULT_BOOTSTRAP, EPSILON, HELD_OUT, VALUES, Averaging, Bootstrap, checked, faithfulness
from .study import Study, Trial, measure

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares of the live features that are kept unless told otherwise."""

EDGE_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the edges between units that are kept unless told otherwise."""

FEWEST_SEQUENCES = 4
"""Sequences of a task that intervals of selectivity need: a half of one alone is resampled into itself."""

REGIONS, HEADS, FEATURES, RANDOM = "regions", "heads", "features", "random blocks"
"""Names of partitions under test."""

MATRIX = {
    "task": pl.String(), "removed": pl.String(), "method": pl.String(), "unit": pl.Int64(), "n_features": pl.Int64(), "value": pl.Float64(),
    "low": pl.Float64(), "high": pl.Float64(), "n": pl.Int64(), "undefined_n": pl.Int64(), "lost": pl.Float64(),
}  # fmt: skip
"""What `removal_matrix` returns. value: the share of the task's effect that is lost, 1 − φ of the model without the unit; lost: the same in the
metric's units, m(M) − m(M without it)."""


class NothingToTest(UserError):
    """No unit, or too few tasks, to say anything of."""


@dataclass(frozen=True, eq=False)
class Drives:
    """Attribution between units, over sequences. mean, strength, n: (units + 1, units + 1), source × target, y last: the mean over sequences of the
    sum over member edges, the mean of its magnitude, and in how many sequences it is not 0."""

    units: Units
    mean: FloatArray
    strength: FloatArray
    n: IntArray
    n_sequences: int

    @property
    def per_member(self) -> FloatArray:
        """`mean` over the number of member pairs, so that size does not decide."""
        sizes = self.units.sizes.numpy().astype(float)
        return self.mean / np.outer(sizes, sizes)

    @property
    def edges(self) -> tuple[IntArray, IntArray]:
        """Source and target of every edge that the architecture has and that has an effect, strongest first."""
        strength = np.where(self.units.joined.numpy(), self.strength, 0.0)
        source, target = np.nonzero(strength)
        order = np.argsort(-strength[source, target], kind="stable")
        return source[order], target[order]


@dataclass(frozen=True, eq=False)
class Contestant:
    """A partition of the model's nodes under test. method: its name. draw: the seed of a random one.

    effects: (sequences, units): each unit's attribution to the metric, summed over its members. tasks (sequences,). live: (units,): how many of
    its features are live, which is its size; error nodes, dead features and sites without a partition count 0.
    """

    method: str
    units: Units
    effects: FloatArray
    tasks: Sequence[str]
    live: IntArray
    drives: Drives | None = None
    draw: int = 0

    @cached_property
    def strength(self) -> FloatArray:
        """The mean over sequences of the magnitude of each unit's attribution, (units,)."""
        return np.abs(self.effects).mean(axis=0)

    @cached_property
    def by_task(self) -> dict[str, FloatArray]:
        """`strength` on each task's sequences alone."""
        tasks = np.array(self.tasks)
        return {task: np.abs(self.effects[tasks == task]).mean(axis=0) for task in sorted(set(self.tasks))}

    @cached_property
    def purposes(self) -> pl.DataFrame:
        """The task that each unit is most attributed to, `unit`, `task`, `share`: its share of the task's whole attribution over that of all tasks.

        Each task's attribution is taken to sum to 1 first, or tasks whose metric is large would have all units. Units without any are left out.
        """
        tasks = list(self.by_task)
        shares = np.stack([self.by_task[task] / max(self.by_task[task].sum(), 1e-30) for task in tasks])  # (tasks, units)
        total = shares.sum(axis=0)
        units = np.flatnonzero(total > 0)
        best = shares[:, units].argmax(axis=0)
        return pl.DataFrame({"unit": units, "task": [tasks[i] for i in best], "share": shares[best, units] / total[units]})

    def ranking(self, *, per_member: bool = False) -> IntArray:
        """The units that have any attribution, strongest first; `per_member`: by the mean over live members, so that size does not decide."""
        strength = self.strength / np.maximum(self.live, 1) if per_member else self.strength
        order = np.argsort(-strength, kind="stable")
        return order[self.strength[order] > 0]


def live_members(units: Units, live: Mapping[str, IntArray]) -> IntArray:
    """How many live features each unit has, (units,). live: of each partitioned site its live features; other sites' units count none."""
    found = np.zeros(len(units), dtype=np.int64)
    for site, own in units.of.items():
        if site.name in live:
            found += np.bincount(own[:-1].numpy()[live[site.name]], minlength=len(units))
    return found


# --- keeping the strongest units ---------------------------------------------------------------------------------------


KEPT = {
    "method": pl.String(), "ablation": pl.String(), "size": pl.Int64(), "draw": pl.Int64(), "share": pl.Float64(), "n_units": pl.Int64(),
    "n_features": pl.Int64(), "n_edges": pl.Int64(),
}  # fmt: skip
"""What a trial keeps alive: `share` of the live features (or edges between units) was asked for, `size` features (edges) are that, and so many
units with so many live features it came to."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A trial and what it keeps alive."""

    trial: Trial
    share: float
    n_units: int
    n_features: int
    n_edges: int = 0

    def row(self, draws: int, drawn: int) -> dict[str, object]:
        """Its row of `KEPT`, for one of the baseline's draws."""
        trial = self.trial
        return {
            "method": trial.method, "ablation": trial.ablation.value, "size": trial.size, "draw": trial.draw * draws + drawn, "share": self.share,
            "n_units": self.n_units, "n_features": self.n_features, "n_edges": self.n_edges,
        }  # fmt: skip


def keeping(contestant: Contestant, shares: Sequence[float] = SHARES, *, per_member: bool = False) -> list[Kept]:
    """Only the strongest units alive, each time until they hold a share of the live features; at share 1 every unit that has any attribution.

    Units without live features (error nodes, dead features, sites without a partition) are neither chosen nor counted: they are alive whatever
    is kept, and whatever is cut, or partitions that rank them high would have more alive at equal sizes. The trial's size is the share's number
    of features, rounded up, so that partitions are compared at equal sizes as near as whole units allow; of shares with the same number the
    greatest counts. Raises `NothingToTest` where nothing with live features has any attribution.
    """
    order = contestant.ranking(per_member=per_member)
    order = order[contestant.live[order] > 0]
    if not len(order):
        raise NothingToTest(f"no unit of {contestant.method} has any attribution: the metric does not depend on these sites")
    always = np.flatnonzero(contestant.live == 0).tolist()
    held, total = np.cumsum(contestant.live[order]), int(contestant.live.sum())
    sizes = {math.ceil(share * total - 1e-9): share for share in sorted(shares)}
    found = []
    for size, share in sizes.items():
        k = len(order) if share >= 1 else min(int(np.searchsorted(held, size)) + 1, len(held))
        chosen = order[:k].tolist()
        alive, rest = contestant.units.nodes([*chosen, *always]), contestant.units.nodes(chosen).inverse()
        found.append(Kept(Trial(contestant.method, size, alive, contestant.draw, rest=rest), share, k, int(held[k - 1])))
    return found


# --- circuits of units ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnitCircuit:
    """The strongest `size` edges between units, and what of them lies on a path from an input to y."""

    size: int
    edges: UnitEdges
    units: tuple[int, ...]

    @property
    def n_edges(self) -> int:
        return len(self.edges)


def region_circuits(drives: Drives, shares: Sequence[float] = EDGE_SHARES) -> list[UnitCircuit]:
    """Circuits of units by growing share of the edges that have an effect, each pruned; equal sizes once."""
    source, target = drives.edges
    if not len(source):
        raise NothingToTest("no edge between units has any effect: take another baseline or task")
    sizes = dict.fromkeys(max(1, round(share * len(source))) for share in shares)
    return [_pruned(drives.units, source[:size], target[:size]) for size in sizes]


def _pruned(units: Units, source: IntArray, target: IntArray) -> UnitCircuit:
    """Without what cannot be reached from a site without parents or cannot reach y."""
    graph, site_of = units.graph, units.site_of.numpy()
    alive = np.zeros((len(units) + 1,) * 2, dtype=bool)
    alive[source, target] = True
    roots = [i for i, site in enumerate(graph.sites) if site != OUTPUT and not graph.parents(site)]
    reached, reaching = np.isin(site_of, roots), np.arange(len(units) + 1) == units.output
    for i in range(len(graph.sites)):  # sites come in topological order
        here = site_of == i
        reached[here] |= alive[:, here][reached].any(axis=0)
    for i in reversed(range(len(graph.sites))):
        here = site_of == i
        reaching[here] |= alive[here][:, reaching].any(axis=1)
    alive &= (reached & reaching)[:, None] & (reached & reaching)[None, :]
    kept_source, kept_target = np.nonzero(alive)
    edges = UnitEdges.of(units, kept_source.tolist(), kept_target.tolist())
    nodes = sorted({*kept_source.tolist(), *kept_target.tolist()} - {units.output})
    return UnitCircuit(len(source), edges, tuple(nodes))


def cutting_circuits(contestant: Contestant, circuits: Sequence[UnitCircuit]) -> list[Kept]:
    """Circuits of units under edge ablation; a trial's size is the number of edges before pruning, its share that of all edges with an effect."""
    assert contestant.drives is not None
    n = len(contestant.drives.edges[0])
    return [
        Kept(
            Trial(contestant.method, circuit.size, circuit.edges, contestant.draw), circuit.size / n, len(circuit.units),
            int(contestant.live[list(circuit.units)].sum()) if circuit.units else 0, circuit.n_edges,
        )
        for circuit in circuits
    ]  # fmt: skip


# --- one unit at a time -----------------------------------------------------------------------------------------------


def strongest_units(contestant: Contestant, n: int) -> list[int]:
    """The `n` units with live features that some task is attributed to most, in the order of the greatest of their shares in a task's attribution.

    A share, since tasks whose metric is large would choose for all.
    """
    shares = [strength / max(strength.sum(), 1e-30) for strength in contestant.by_task.values()]
    greatest = np.max(shares, axis=0)
    order = np.argsort(-greatest, kind="stable")
    return [int(unit) for unit in order if contestant.live[unit] and greatest[unit] > 0][:n]


def removals(contestant: Contestant, units: Sequence[int]) -> list[Trial]:
    """Trials with all alive but one unit. Their `size` is the unit's number."""
    return [Trial(contestant.method, unit, contestant.units.nodes([unit]).inverse(), contestant.draw, complement=False) for unit in units]


def drive_removals(contestant: Contestant, n: int) -> list[Trial]:
    """Trials with all edges between units alive but one, the `n` strongest in turn. Their `size` is the edge's rank."""
    assert contestant.drives is not None
    source, target = contestant.drives.edges
    return [
        Trial(contestant.method, i, UnitEdges.of(contestant.units, [s], [t]).inverse(), contestant.draw, complement=False)
        for i, (s, t) in enumerate(zip(source[:n].tolist(), target[:n].tolist(), strict=True))
    ]


DRIVE_EFFECTS = {
    "source": pl.String(), "target": pl.String(), "weight": pl.Float64(), "strength": pl.Float64(), "per_member": pl.Float64(),
    "effect": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(), "n": pl.Int64(),
}  # fmt: skip
"""What `drive_table` returns. source, target: names of units; weight: mean signed attribution, summed over member edges; strength: mean magnitude;
per_member: weight over the number of member pairs; effect: m(M) − m(M without the edge)."""


def drive_table(contestant: Contestant, values: pl.DataFrame, *, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> pl.DataFrame:
    """The edges that were cut one at a time, by rank, as `DRIVE_EFFECTS`; empty where none was."""
    drives, names = contestant.drives, contestant.units.names
    if drives is None or values.is_empty():
        return pl.DataFrame(schema=DRIVE_EFFECTS)
    source, target = drives.edges
    # The mean of what is lost is the ratio of means to 1.
    lost = values.with_columns((pl.col("full") - pl.col("value")).alias("value"), full=pl.lit(1.0), empty=pl.lit(0.0))
    effects = faithfulness(lost, averaging=(Averaging.RATIO_OF_MEANS,), bootstrap=bootstrap).sort("size")
    rank = effects["size"].to_numpy()
    s, t = source[rank], target[rank]
    return pl.DataFrame(
        {
            "source": [names[i] for i in s], "target": [names[i] for i in t], "weight": drives.mean[s, t], "strength": drives.strength[s, t],
            "per_member": drives.per_member[s, t], "effect": effects["value"], "low": effects["low"], "high": effects["high"], "n": effects["n"],
        },
        schema=DRIVE_EFFECTS,
    )  # fmt: skip


def removal_matrix(values: pl.DataFrame, contestants: Sequence[Contestant], *, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> pl.DataFrame:
    """What each task loses without each unit, as `MATRIX`; `values` of one metric, measured by `removals`."""
    table = faithfulness(values, by=("task", "draw"), averaging=(Averaging.RATIO_OF_MEANS,), bootstrap=bootstrap)
    cut = {key: own["size"].unique().sort().to_list() for key, own in _by_partition(values)}
    names = pl.DataFrame(
        [
            {"method": c.method, "draw": c.draw, "size": unit, "removed": c.units.names[unit], "n_features": int(c.live[unit])}
            for c in contestants for unit in cut.get((c.method, c.draw), [])
        ],
        schema={"method": pl.String, "draw": pl.Int64, "size": pl.Int64, "removed": pl.String, "n_features": pl.Int64},
    )  # fmt: skip
    rows = table.join(names, on=["method", "draw", "size"], how="inner").with_columns(
        (1 - pl.col("value")).alias("value"), (1 - pl.col("high")).alias("low"), (1 - pl.col("low")).alias("high"),
        (pl.col("mean_full") - pl.col("mean_value")).alias("lost"), pl.col("size").alias("unit"),
        pl.when(pl.col("method") == RANDOM).then(pl.format("{} {}: {}", "method", "draw", "removed")).otherwise(pl.col("removed")).alias("removed"),
    )  # fmt: skip
    return rows.select(pl.col(name).cast(dtype) for name, dtype in MATRIX.items())


# --- selectivity ------------------------------------------------------------------------------------------------------

SELECTIVITY = {
    "method": pl.String(), "n_blocks": pl.Int64(), "value": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(), "impact": pl.Float64(),
    "impact_low": pl.Float64(), "impact_high": pl.Float64(), "difference": pl.Float64(), "difference_low": pl.Float64(),
    "difference_high": pl.Float64(),
}  # fmt: skip
"""What `selectivity` returns: a row per method, draws pooled. difference: value minus that of the reference method, resampled together. Null where
undefined."""


def selectivity(values: pl.DataFrame, *, reference: str = REGIONS, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> pl.DataFrame:
    """How much of what blocks break is one task's alone, for each method, as `SELECTIVITY`.

    With L(b, t) the share of task t's effect that is lost without block b, a(b) = |L| of the block's task and o(b) the mean of |L| of the others,
    a method's selectivity is Σ (a − o) / Σ (a + o) over its blocks: 1 where each block breaks one task only, 0 where all alike. Which task is a
    block's, and the signs by which L becomes |L|, are decided on one half of the sequences and measured on the other, both ways round, so that the
    greatest of several noisy numbers, or the size of noise, is not taken for an effect. Where the interval of the denominator reaches 0, blocks
    break nothing that is told from noise, and the selectivity is undefined; effects on other tasks that are no greater than noise count too low.
    `impact` is the mean of a, decided in the same way. Tasks whose own effect is not told from 0 are left out; of fewer than two, all is undefined.
    The bootstrap resamples sequences within tasks; with fewer than `FEWEST_SEQUENCES` of a task there are no intervals.
    Raises `NothingToTest` for one task alone.
    """
    frame = checked(values)
    tasks = sorted(frame["task"].unique().to_list())
    if len(tasks) < 2:
        raise NothingToTest(f"selectivity compares tasks, and there is only {tasks[0] if tasks else 'none'}: ingest a mixture, --task agreement+ioi")
    cubes = {key: _cube(rows, tasks) for key, rows in _by_partition(frame)}
    first = next(iter(cubes.values()))
    sizes = [len(whole) for _, whole in first]
    counts = [replace(bootstrap, seed=bootstrap.seed + i).counts(n) for i, n in enumerate(sizes)]  # tasks are resampled apart
    told = [i for i, (_, whole) in enumerate(first) if _has_effect(whole, counts[i], bootstrap)] or [0]
    cubes, counts = {key: [cube[i] for i in told] for key, cube in cubes.items()}, [counts[i] for i in told]
    pooled: dict[str, list[_Losses]] = {}
    for (method, _), cube in cubes.items():
        pooled.setdefault(method, []).append(_losses(cube, counts))
    if reference not in pooled:
        raise NothingToTest(f"no values of the reference {reference!r}: there are {', '.join(pooled)}")
    value = {method: _ratio(own, bootstrap) for method, own in pooled.items()}
    few = min(sizes[i] for i in told) < FEWEST_SEQUENCES
    rows = []
    for method, own in pooled.items():
        impact = np.mean([one.own for one in own], axis=0) / own[0].n_blocks
        columns = np.stack([value[method], impact, value[method] - value[reference]], axis=1)
        low, high = np.full((2, 3), np.nan) if few else bootstrap.interval(columns[1:])
        rows.append((method, own[0].n_blocks, *(x for i in range(3) for x in (columns[0, i], low[i], high[i]))))
    table = pl.DataFrame(rows, schema=SELECTIVITY, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))
    return table.sort(pl.col("method") != reference, "method")


@dataclass(frozen=True, eq=False)
class _Losses:
    """A partition's Σ a(b) and Σ o(b), the mean of both ways round, in the sample and in each resample: (resamples + 1,) each."""

    own: FloatArray
    others: FloatArray
    n_blocks: int


def _ratio(draws: Sequence[_Losses], bootstrap: Bootstrap) -> FloatArray:
    """Selectivity of a method's draws together, (resamples + 1,): at most 1, NaN where the denominator is not told from 0."""
    own, others = (np.sum([getattr(one, name) for one in draws], axis=0) for name in ("own", "others"))
    low, _ = bootstrap.interval((own + others)[1:, None])
    defined = (own + others > EPSILON) & (low[0] > EPSILON) & (own[0] + others[0] > EPSILON)
    found = np.divide(own - others, own + others, out=np.full(own.shape, np.nan), where=defined)
    return np.clip(found, -1, 1)  # where others are about 0, noise gives either sign


def _has_effect(whole: FloatArray, counts: FloatArray, bootstrap: Bootstrap) -> bool:
    """Whether the mean over sequences of m(M) − m(∅) is told from 0: what is lost is a share of it."""
    low, high = bootstrap.interval((counts @ whole / len(whole))[1:, None])
    return bool(low[0] > EPSILON or high[0] < -EPSILON)


def _by_partition(frame: pl.DataFrame) -> Iterator[tuple[tuple[str, int], pl.DataFrame]]:
    for key, rows in frame.group_by("method", "draw", maintain_order=True):
        yield (str(key[0]), int(str(key[1]))), rows


def _cube(rows: pl.DataFrame, tasks: Sequence[str]) -> list[tuple[FloatArray, FloatArray]]:
    """Per task (lost, whole): m(M) − m(C) of every block and sequence (blocks, sequences), and m(M) − m(∅) of every sequence."""
    found = []
    for task in tasks:
        own = rows.filter(pl.col("task") == task)
        lost = own.with_columns((pl.col("full") - pl.col("value")).alias("lost")).pivot("sequence", index="size", values="lost").sort("size")
        names = [name for name in lost.columns if name != "size"]
        whole = own.unique("sequence", keep="first", maintain_order=True).with_columns((pl.col("full") - pl.col("empty")).alias("whole"))
        order = {name: i for i, name in enumerate(whole["sequence"].to_list())}
        found.append((lost.select(names).to_numpy(), whole["whole"].to_numpy()[[order[name] for name in names]]))
    return found


def _losses(cube: Sequence[tuple[FloatArray, FloatArray]], counts: Sequence[FloatArray]) -> _Losses:
    """What the blocks of a partition lose under every row of resampled counts; NaN where fewer than two tasks have an effect in both halves."""
    halves = []
    for parity in (0, 1):
        shares = []
        for (lost, whole), weight in zip(cube, counts, strict=True):
            part = weight * (np.arange(len(whole)) % 2 == parity)  # (resamples + 1, sequences)
            total = part @ whole
            shares.append(part @ lost.T / np.where(np.abs(total) < EPSILON, np.nan, total)[:, None])  # (resamples + 1, blocks)
        halves.append(np.stack(shares, axis=-1))  # (resamples + 1, blocks, tasks)
    # A task without an effect is no task that a block leaves alone: it is left out, not counted as 0.
    defined = np.isfinite(halves[0]) & np.isfinite(halves[1])
    n_others = defined[:, 0].sum(-1) - 1.0  # (resamples + 1,)
    n_others[n_others < 1] = np.nan
    known = [np.where(defined, half, 0.0) for half in halves]
    own, others = [], []
    for decide, judge in (known, known[::-1]):
        # Decided once, on the sample itself: deciding anew on every resample would take more noise for effects than the estimate does.
        signed = judge * np.sign(decide[:1])
        task = np.broadcast_to(np.abs(decide[:1]).argmax(axis=-1)[..., None], (*judge.shape[:2], 1))
        of_task = np.take_along_axis(signed, task, -1)[..., 0]  # (resamples + 1, blocks)
        own.append(np.where(np.isnan(n_others), np.nan, of_task.sum(-1)))
        others.append((signed.sum(-1) - of_task).sum(-1) / n_others)
    return _Losses(np.mean(own, axis=0), np.mean(others, axis=0), halves[0].shape[1])


# --- measuring --------------------------------------------------------------------------------------------------------


def run_kept(
    study: Study,
    pairs: Sequence[Pair],
    kept: Sequence[Kept],
    *,
    among: Sequence[Pair] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(values, kept) of trials on sequences, as `faithfulness.VALUES` and `KEPT`."""
    draws = len(study.seeds)
    values = measure(study, pairs, [one.trial for one in kept], split=HELD_OUT, among=among, progress=progress)
    return values, pl.DataFrame([one.row(draws, i) for one in kept for i in range(draws)], schema=KEPT)


def run_removals(
    study: Study,
    pairs: Sequence[Pair],
    trials: Sequence[Trial],
    *,
    among: Sequence[Pair] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Values of removals, as `faithfulness.VALUES`; draws of the baseline averaged, so that `draw` is the partition's own."""
    values = measure(study, pairs, trials, split=HELD_OUT, among=among, progress=progress)
    if len(study.seeds) == 1:
        return values
    own = [name for name in VALUES if name not in ("value", "full", "empty", "draw")]
    averaged = values.group_by(*own, pl.col("draw") // len(study.seeds), maintain_order=True).agg(pl.col("value", "full", "empty").mean())
    return averaged.select(list(VALUES))
