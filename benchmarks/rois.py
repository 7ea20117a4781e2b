"""Methods of partition against planted truth: how well blocks are found, how many where there are none, how long it takes.

    python -m benchmarks.rois truth [--sizes 500 1000 2000] [--seeds 5] [--kinds gauss sae attr] [--settings clear hard]
    python -m benchmarks.rois null  [--sizes 500 1000]      the same samples with every feature's values shuffled: one block is right
    python -m benchmarks.rois times [--sizes 500 1000 2000 5000] [--seeds 3]
    python -m benchmarks.rois table [--markdown]            the figures so far, as tables

Every figure goes to `--output` (a JSON list of rows, by default benchmarks/figures/rois.json) as soon as it is there; what is there already is
not measured again, unless `--again` is given, so that a run can be broken off. `--ways` takes some ways alone.

A way is a method with the means by which its number of blocks was chosen; `TOLD` says what each is told of the truth. AMI is with the planted
fine and coarse blocks, unstructured features left out; `ami_all` has them as one block more. A way that is told the number of fine blocks is
told that of coarse ones for `ami_coarse`; the others have one partition for both, the one they choose. Intervals are Student's t over seeds.
`times` are CPU seconds of this process and its children (graph-tool) for everything after the correlation matrices, choosing included, on one
thread: so that other work on the machine counts less. A way that takes the dense model's number of blocks has its seconds too.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from featlas.analysis.block_model import dense_block_model
from featlas.analysis.correlations import fisher
from featlas.analysis.levels import Rule, choose, null_verdict, scored
from featlas.analysis.parcellation import FloatArray, IntArray, PartitionPath
from featlas.analysis.partitioning import PartitionMethod, PartitionOptions, ami, from_weights, partition
from featlas.analysis.planted import Planted, PlantedData, planted
from scipy import stats

FIGURES = Path(__file__).parent / "figures" / "rois.json"

NOTHING, FINE_NUMBER, OWN_NUMBER = "nothing", "number of blocks", "dense model's number"


class Setting(NamedTuple):
    """How hard the truth is to find."""

    samples: int
    loading_spread: float
    noise_share: float


SETTINGS: Mapping[str, Setting] = {"clear": Setting(4000, 0.15, 0.1), "hard": Setting(1000, 0.4, 0.3)}


@dataclass(frozen=True, eq=False)
class Case:
    """One planted matrix with its halves, and what several ways share: the dense model's path and its choice, timed once."""

    data: PlantedData
    seed: int
    seconds: float
    """graph-tool's time limit."""

    @cached_property
    def correlation(self) -> FloatArray:
        return self.data.correlation()

    @cached_property
    def halves(self) -> tuple[FloatArray, FloatArray]:
        """Fisher weights of two halves of the samples."""
        first, second = self.data.halves(self.seed)
        return fisher(self.data.correlation(first)), fisher(self.data.correlation(second))

    @cached_property
    def known(self) -> tuple[int, int]:
        """Fine and coarse blocks planted, and one for unstructured features."""
        return int(self.data.fine.max()) + 2, int(self.data.coarse.max()) + 2

    @cached_property
    def fitted(self) -> dict[PartitionMethod, tuple[PartitionPath, float]]:
        """Paths of methods that are told nothing, and their seconds."""
        return {}

    def told_nothing(self, method: PartitionMethod) -> tuple[PartitionPath, float]:
        """A method's path and its seconds, fitted once."""
        if method not in self.fitted:
            self.fitted[method] = timed(lambda: self.fit(method))
        return self.fitted[method]

    @property
    def dense(self) -> tuple[PartitionPath, float]:
        return self.told_nothing(PartitionMethod.DENSE_SBM)

    @cached_property
    def dense_scores(self) -> tuple[pl.DataFrame, float]:
        """The scores of its levels, from fits of both halves, and their seconds."""
        return timed(lambda: scored(self.dense[0], self.halves, refit=self.refit_dense))

    def refit_dense(self, weights: FloatArray) -> PartitionPath:
        return dense_block_model(weights, seed=self.seed)

    def fit(self, method: PartitionMethod, correlation: FloatArray | None = None, **options: Any) -> PartitionPath:
        """A method's path of this matrix, or of another."""
        given = PartitionOptions(seed=self.seed, seconds=self.seconds, **options)
        return partition(method, self.correlation if correlation is None else correlation, given)


class Found(NamedTuple):
    """Labels for the fine blocks and for the coarse ones, seconds, and what is to be known: a fallback, a time limit that was met."""

    fine: IntArray
    coarse: IntArray
    seconds: float
    notes: str = ""

    @property
    def n_blocks(self) -> int:
        return int(self.fine.max()) + 1


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Its result, and CPU seconds of this process and of the children that it waited for."""
    started = sum(os.times()[:4])
    found = work()
    return found, sum(os.times()[:4]) - started


def one(path: PartitionPath, level: int, seconds: float) -> Found:
    """One level for both truths."""
    notes = [f"instead: {path.method}"] if "instead_of" in path.info else []
    notes += ["time limit"] if path.info.get("timed_out") else []
    return Found(path.labels[level], path.labels[level], seconds, ", ".join(notes))


def alone(method: PartitionMethod, level: int = 0) -> Callable[[Case], Found]:
    """A method that finds the number of blocks itself."""

    def find(case: Case) -> Found:
        path, seconds = case.told_nothing(method)
        return one(path, level, seconds)

    return find


def told_number(method: PartitionMethod) -> Callable[[Case], Found]:
    """A method that is told how many blocks there are."""

    def find(case: Case) -> Found:
        path, seconds = timed(lambda: case.fit(method, n_blocks=case.known[0]))
        coarse = path if len(path) > 1 else case.fit(method, n_blocks=case.known[1])
        fine = one(path, path.with_blocks(case.known[0]), seconds)
        return fine._replace(coarse=coarse.labels[coarse.with_blocks(case.known[1])])

    return find


def told_dense(method: PartitionMethod) -> Callable[[Case], Found]:
    """A method that takes the number of blocks that the dense model chose; its seconds count too."""

    def find(case: Case) -> Found:
        own = dense_by(Rule.HELD_OUT)(case)
        n_blocks = own.n_blocks
        path, seconds = timed(lambda: case.fit(method, n_blocks=n_blocks))
        return one(path, path.with_blocks(n_blocks), own.seconds + seconds)

    return find


def dense_by(rule: Rule) -> Callable[[Case], Found]:
    """The dense model's path, the level by a rule; fits of the halves count where the rule needs them."""

    def find(case: Case) -> Found:
        (path, fitting), (scores, scoring) = case.dense, case.dense_scores
        return one(path, choose(path, scores, rule), fitting + (0 if rule is Rule.DESCRIPTION_LENGTH else scoring))

    return find


def cut_at_known(method: PartitionMethod) -> Callable[[Case], Found]:
    """The levels of a method's own path whose numbers of blocks are nearest to the planted ones."""

    def find(case: Case) -> Found:
        path, seconds = case.told_nothing(method)
        fine, coarse = (path.with_blocks(n) for n in case.known)
        return one(path, fine, seconds)._replace(coarse=path.labels[coarse])

    return find


def ward_held_out(case: Case) -> Found:
    """Ward's tree, the level by the same rule as the dense model's: no block model is fitted, but one's likelihood is what chooses."""
    refit = from_weights(PartitionMethod.WARD, PartitionOptions(seed=case.seed))
    path, seconds = timed(lambda: case.fit(PartitionMethod.WARD))
    level, more = timed(lambda: choose(path, scored(path, case.halves, refit=refit), Rule.HELD_OUT))
    return one(path, level, seconds + more)


class Way(NamedTuple):
    """told: what it is told of the truth, or whose number of blocks it takes."""

    told: str
    find: Callable[[Case], Found]


M = PartitionMethod
WAYS: Mapping[str, Way] = {
    "dense-sbm, held-out level": Way(NOTHING, dense_by(Rule.HELD_OUT)),
    "dense-sbm, description length": Way(NOTHING, dense_by(Rule.DESCRIPTION_LENGTH)),
    "dense-sbm, stability": Way(NOTHING, dense_by(Rule.STABILITY)),
    "dense-sbm, known number": Way(FINE_NUMBER, cut_at_known(M.DENSE_SBM)),
    "nested-sbm, finest level": Way(NOTHING, alone(M.NESTED_SBM)),
    "nested-sbm, known number": Way(FINE_NUMBER, cut_at_known(M.NESTED_SBM)),
    "ward, held-out level": Way(NOTHING, ward_held_out),
    "ward, dense model's number": Way(OWN_NUMBER, told_dense(M.WARD)),
    "ward, known number": Way(FINE_NUMBER, told_number(M.WARD)),
    "spectral, eigengap": Way(NOTHING, alone(M.SPECTRAL)),
    "spectral, dense model's number": Way(OWN_NUMBER, told_dense(M.SPECTRAL)),
    "spectral, known number": Way(FINE_NUMBER, told_number(M.SPECTRAL)),
    "leiden, modularity": Way(NOTHING, alone(M.LEIDEN)),
    "louvain, first level": Way(NOTHING, alone(M.LOUVAIN)),
    "louvain, last level": Way(NOTHING, alone(M.LOUVAIN, level=-1)),
    "hdbscan, 1 − r": Way(NOTHING, alone(M.HDBSCAN)),
    "hdbscan, embedding of known number": Way(FINE_NUMBER, told_number(M.HDBSCAN)),
}


TESTED = "dense-sbm, held-out level, tested against shuffled samples"
"""The default way's number of blocks where the test says that there are any, else one."""


ROWS = {
    **dict.fromkeys(("what", "setting", "kind"), pl.String()), "n": pl.Int64(), "seed": pl.Int64(), "way": pl.String(), "told": pl.String(),
    "n_blocks": pl.Int64(), "notes": pl.String(), "seconds": pl.Float64(), "planted": pl.Int64(),
    **dict.fromkeys(("ami_fine", "ami_all", "ami_coarse"), pl.Float64()), "significant": pl.Boolean(), "n_blocks_tested": pl.Int64(),
}  # fmt: skip
"""One row per way and matrix; seconds null but for times, AMIs null where nothing is planted, the test's verdict null where it was not made."""


# --- measuring --------------------------------------------------------------------------------------------------------


class Book:
    """The rows of a figures file, written after each one."""

    KEY = ("what", "setting", "kind", "n", "seed", "way")

    def __init__(self, path: Path, again: bool) -> None:
        self.path, self.again = path, again
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.exists():
            self.rows = {self.key(row): row for row in json.loads(path.read_text())}

    def key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.KEY)

    def lacks(self, row: Mapping[str, Any]) -> bool:
        return self.again or self.key(row) not in self.rows

    def add(self, row: dict[str, Any]) -> None:
        self.rows[self.key(row)] = row
        beside = self.path.with_suffix(".part")
        beside.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows.values()) + "\n]\n")
        beside.replace(self.path)


def cells(arguments: argparse.Namespace, what: str) -> Iterator[tuple[dict[str, Any], PlantedData]]:
    """Every planted matrix that is asked for, the small ones first."""
    for n in arguments.sizes:
        for seed in range(arguments.seeds):
            for setting in arguments.settings:
                for kind in arguments.kinds:
                    given = SETTINGS[setting]._asdict()
                    place = {"what": what, "setting": setting, "kind": kind, "n": n, "seed": seed}
                    yield place, planted(kind, n, seed=seed, **given)


def measure(arguments: argparse.Namespace, what: str) -> None:
    """Every way on every matrix; `null` on the shuffled ones."""
    book = Book(arguments.output, arguments.again)
    for place, data in cells(arguments, what):
        lacking = [name for name in arguments.ways if book.lacks({**place, "way": name})]
        if not lacking:
            continue
        case = Case(data.shuffled(place["seed"]) if what == "null" else data, place["seed"], arguments.seconds)
        _ = case.correlation, case.halves  # made before any time is taken
        for name in lacking:
            if what == "null" and WAYS[name].told != NOTHING:
                continue
            found = WAYS[name].find(case)
            row = {**place, "way": name, "told": WAYS[name].told, "n_blocks": found.n_blocks, "notes": found.notes}
            match what:
                case "times":
                    row["seconds"] = found.seconds
                case "null":
                    row |= null_scores(name, case, found)
                case "truth":
                    row |= truth_scores(data, found)
            book.add(row)
            print(" ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)


def truth_scores(data: PlantedData, found: Found) -> dict[str, Any]:
    inside = data.structured
    return {
        "planted": int(data.fine.max()) + 1, "ami_fine": ami(found.fine[inside], data.fine[inside]), "ami_all": ami(found.fine, data.fine),
        "ami_coarse": ami(found.coarse[inside], data.coarse[inside]),
    }  # fmt: skip


def null_scores(name: str, case: Case, found: Found) -> dict[str, Any]:
    """For the default way, what the test against shuffled samples makes of it: another shuffle of samples that have nothing to find."""
    if name != "dense-sbm, held-out level":
        return {}
    nulls = []
    for i in range(5):
        other = case.data.shuffled(1000 + 10 * case.seed + i)
        first, second = (fisher(other.correlation(rows)) for rows in case.data.halves(case.seed))
        nulls.append((first, second))
    verdict = null_verdict(case.dense[0], case.halves, nulls, refit=case.refit_dense, scores=case.dense_scores[0])
    return {"significant": verdict.significant, "n_blocks_tested": found.n_blocks if verdict.significant else 1}


# --- tables -----------------------------------------------------------------------------------------------------------


def interval(values: pl.Series) -> str:
    """Mean ± half of the 95 % interval by Student's t."""
    mean = float(values.mean())
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std()) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def truth_table(rows: pl.DataFrame, setting: str, column: str) -> pl.DataFrame:
    """One row per way, one column per kind and size."""
    own = rows.filter((pl.col("what") == "truth") & (pl.col("setting") == setting))
    table = []
    for name, way in WAYS.items():
        cell = own.filter(pl.col("way") == name)
        if not len(cell):
            continue
        row = {"way": name, "told": way.told}
        for (kind, n), some in cell.sort("n").group_by("kind", "n", maintain_order=True):
            row[f"{kind} {n}"] = interval(some[column])
        table.append(row)
    sizes = sorted(set(own["n"]))
    columns = [f"{kind} {n}" for kind in Planted for n in sizes]
    return pl.DataFrame(table, schema={name: pl.String() for name in ("way", "told", *columns)})


def numbers_table(rows: pl.DataFrame, setting: str) -> pl.DataFrame:
    """Blocks found, median over seeds (least to greatest), of those planted and one for unstructured features."""
    own = rows.filter((pl.col("what") == "truth") & (pl.col("setting") == setting))
    return spread(own, "n_blocks", {f"{kind} {n}" for kind, n in own.select("kind", "n").unique().rows()})


def null_table(rows: pl.DataFrame) -> pl.DataFrame:
    """Blocks found in shuffled samples."""
    own = rows.filter(pl.col("what") == "null")
    tested = own.filter(pl.col("n_blocks_tested").is_not_null())
    tested = tested.with_columns(pl.lit(TESTED).alias("way"), pl.col("n_blocks_tested").alias("n_blocks"))
    return spread(pl.concat([own, tested]), "n_blocks", {f"{kind} {n}" for kind, n in own.select("kind", "n").unique().rows()})


def spread(own: pl.DataFrame, column: str, columns: set[str]) -> pl.DataFrame:
    """Per way and cell the median over seeds, with the least and the greatest where they differ."""
    table: dict[str, dict[str, str]] = {}
    for (way, kind, n), some in own.group_by("way", "kind", "n", maintain_order=True):
        low, middle, high = some[column].min(), some[column].median(), some[column].max()
        table.setdefault(way, {"way": way})[f"{kind} {n}"] = f"{middle:g}" if low == high else f"{middle:g} ({low:g}–{high:g})"
    order = sorted(columns, key=lambda name: (list(Planted).index(name.split()[0]), int(name.split()[1])))
    rows = [table[way] for way in (*WAYS, TESTED) if way in table]
    return pl.DataFrame(rows, schema={name: pl.String() for name in ("way", *order)})


def times_table(rows: pl.DataFrame) -> pl.DataFrame:
    """Seconds by size, median over seeds (least to greatest)."""
    own = rows.filter(pl.col("what") == "times").with_columns(pl.col("seconds").round(2))
    return spread(own, "seconds", {f"{kind} {n}" for kind, n in own.select("kind", "n").unique().rows()})


def markdown(table: pl.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join("" if value is None else value for value in row) + " |" for row in table.rows())])


def show(arguments: argparse.Namespace) -> None:
    """Every table that there are figures for."""
    rows = pl.DataFrame(json.loads(arguments.output.read_text()), schema=ROWS)
    found = {}
    for setting in sorted(set(rows.filter(pl.col("what") == "truth")["setting"])):
        for column, name in (("ami_fine", "AMI with the fine blocks"), ("ami_all", "the same, unstructured features as one block"),
                             ("ami_coarse", "AMI with the coarse blocks")):  # fmt: skip
            found[f"{setting}: {name}"] = truth_table(rows, setting, column)
        found[f"{setting}: blocks found"] = numbers_table(rows, setting)
    found["shuffled samples: blocks found"] = null_table(rows)
    found["seconds"] = times_table(rows)
    plain = {"tbl_hide_dataframe_shape": True, "tbl_hide_column_data_types": True}
    with pl.Config(tbl_rows=100, tbl_cols=20, tbl_width_chars=240, fmt_str_lengths=60, **plain):
        for title, table in found.items():
            if len(table):
                print(f"\n{title}\n\n{markdown(table) if arguments.markdown else table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("truth", "null", "times", "table"))
    parser.add_argument("--sizes", nargs="*", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--kinds", nargs="*", choices=[kind.value for kind in Planted])
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS))
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=120.0, help="graph-tool's time limit")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--output", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    defaults = {
        "truth": ([500, 1000, 2000], 5, [kind.value for kind in Planted], list(SETTINGS)),
        "null": ([500, 1000], 5, [kind.value for kind in Planted], ["clear"]),
        "times": ([500, 1000, 2000, 5000], 3, ["sae"], ["clear"]),
        "table": ([], 0, [], []),
    }[arguments.what]
    for name, value in zip(("sizes", "seeds", "kinds", "settings"), defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    torch.set_num_threads(1)
    if arguments.what == "table":
        show(arguments)
    else:
        measure(arguments, arguments.what)


if __name__ == "__main__":
    main()
