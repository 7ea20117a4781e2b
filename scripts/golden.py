"""Golden runs: what a run came to when it was looked at and found right, kept as numbers, and compared with what it comes to now.

    python scripts/golden.py write demo ATLAS      keep the numbers of an atlas that `featlas demo` made
    python scripts/golden.py check demo ATLAS      compare; a table of what differs, exit code 1

1. `numbers` reads a run out of an atlas: counts, the metric's means, its strongest edges by name, some features' statistics, its circuits.
2. `differences` compares two such records within `TOLERANCES`. Edges are compared by name and weight, never by rank: two of nearly equal weight
   may change places between two machines, and both be right.

The file of a golden run says by which versions it was written. A difference is either a mistake, or a change that was wanted: then the file is
written anew, and the change stands in the history beside its reason.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import find_run

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
OUTPUT = "y"
N_EDGES = 50
N_FEATURES = 20

TOLERANCES: Mapping[str, tuple[float, float, str]] = {
    # kind: (relative, share of the largest number of its kind, why)
    "edge": (1e-4, 2e-5, "float32: matrix kernels of different machines add up in different orders, 1e-6 of a value, some layers deep"),
    "metric": (1e-4, 1e-5, "float32 logits"),
    "share": (1e-3, 1e-3, "quotients of sums in which a feature at its threshold may be active or not"),
    "mean": (1e-4, 1e-5, "float32 activations, summed in float64"),
    "count": (1e-3, 0.0, "an edge or an activation at its very threshold may fall to either side; at least 2"),
    "exact": (0.0, 0.0, "texts, sequences, settings: no arithmetic"),
}
LEAST_COUNT = 2


@dataclass(frozen=True)
class Difference:
    """One number that is not what it was; None where it is not there at all."""

    what: str
    golden: object
    now: object
    relative: float | None

    @property
    def row(self) -> str:
        by = "" if self.relative is None else f"{self.relative:.1e}"
        return f"{self.what:<58} {_shown(self.golden):>14} {_shown(self.now):>14} {by:>9}"


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


# -- reading -------------------------------------------------------------------------------------------------

_EDGES = """
MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE e.run = $run
RETURN a.site AS source, a.`index` AS i, b.site AS target, b.`index` AS j, e.weight AS weight
ORDER BY abs(e.weight) DESC LIMIT $n
"""
_COUNTS = "MATCH (:Feature)-[e:{}]->(:Feature) WHERE e.run = $run RETURN count(e) AS n"
_MARKS = """
MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run
RETURN s.clean AS text, m.metric_clean AS clean, m.metric_corrupt AS corrupt ORDER BY text
"""
_INTO_OUTPUT = "MATCH (:Feature)-[e:INFLUENCES]->(y:Feature) WHERE e.run = $run AND y.kind = 'output' RETURN sum(e.weight) AS total"
_CIRCUITS = (
    "MATCH (c:Circuit) WHERE c.run = $run RETURN c.threshold AS threshold, c.n_nodes AS nodes, c.n_edges AS edges, "
    "c.faithfulness AS faithfulness, c.completeness AS completeness ORDER BY edges, threshold"
)


def numbers(atlas: Path, run: str | None = None) -> dict[str, Any]:
    """What a run of an atlas came to: kind → name → number; its strongest edges are twice as many as are kept."""
    with open_graph(atlas, read_only=True) as graph:
        key = find_run(graph, run).key
        found = _of_graph(graph, key)
    with StatisticsStore(atlas, read_only=True) as statistics:
        record = statistics.find_run(None)
        frame = statistics.feature_statistics(record.run).filter(_strong())
        found["exact"]["statistics.sequences"], found["exact"]["statistics.tokens"] = record.sequences, record.tokens
        for row in frame.sort("mean_magnitude", "key", descending=[True, False]).head(N_FEATURES).to_dicts():
            name = f"{row['site']}.{'error' if row['feature'] < 0 else row['feature']}"
            found["share"][f"frequency of {name}"] = row["frequency"]
            found["mean"][f"mean of {name}"] = row["mean"]
    return found


def _strong() -> Any:
    import polars as pl

    return pl.col("count") > 0


def _of_graph(graph: GraphStore, run: str) -> dict[str, Any]:
    marks = graph.query(_MARKS, {"run": run})
    clean, corrupt = float(marks["clean"].mean()), float(marks["corrupt"].mean())  # type: ignore[arg-type]
    total = float(graph.query(_INTO_OUTPUT, {"run": run})["total"].item() or 0.0)
    named = lambda site, index: site if site == OUTPUT else f"{site}.{'error' if index < 0 else index}"
    edges = graph.query(_EDGES, {"run": run, "n": 2 * N_EDGES}).to_dicts()
    found: dict[str, Any] = {
        "exact": {"sequences": marks.height, **{f"text {i}": text for i, text in enumerate(marks["text"].to_list()[:3])}},
        "count": {name: int(graph.query(_COUNTS.format(name), {"run": run})["n"].item()) for name in ("ATTRIBUTES", "INFLUENCES")},
        "metric": {"clean": clean, "corrupt": corrupt, "effects on the output": total},
        "share": {"completeness of the attribution": total / (clean - corrupt)},
        "mean": {},
        "edge": {f"{named(e['source'], e['i'])} -> {named(e['target'], e['j'])}": float(e["weight"]) for e in edges},
    }
    for i, row in enumerate(graph.query(_CIRCUITS, {"run": run}).to_dicts()):
        found["count"] |= {f"circuit {i} nodes": row["nodes"], f"circuit {i} edges": row["edges"]}
        found["share"] |= {f"circuit {i} {name}": row[name] for name in ("faithfulness", "completeness") if row[name] is not None}
    return found


# -- comparing -----------------------------------------------------------------------------------------------


def differences(golden: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Every number of `golden` that `now` has not, within the tolerance of its kind; and texts, counts and strong edges that are new."""
    found = []
    for kind in ("exact", "count", "metric", "share", "mean"):
        was, here = golden[kind], now[kind]
        largest = max((abs(value) for value in was.values() if isinstance(value, int | float)), default=0.0)
        found += [_difference(f"{kind}: {name}", value, here.get(name), kind, largest) for name, value in was.items()]
        found += [Difference(f"{kind}: {name}", None, value, None) for name, value in here.items() if kind in ("exact", "count") and name not in was]
    return [one for one in (*found, *_edge_differences(golden["edge"], now["edge"])) if one is not None]


def _difference(what: str, was: Any, now: Any, kind: str, largest: float) -> Difference | None:
    relative, share, _ = TOLERANCES[kind]
    if not isinstance(was, int | float) or not isinstance(now, int | float):
        return None if was == now else Difference(what, was, now, None)
    allowed = max(relative * abs(was), share * largest, LEAST_COUNT if kind == "count" else 0)
    # Written so that a number that is none (NaN) differs.
    return None if abs(now - was) <= allowed else Difference(what, was, now, abs(now - was) / max(abs(was), 1e-300))


def _edge_differences(was: Mapping[str, float], now: Mapping[str, float]) -> list[Difference | None]:
    """Of the strongest edges, by name. An edge that is new counts where it is stronger than the weakest that was kept."""
    kept = dict(sorted(was.items(), key=lambda item: -abs(item[1]))[:N_EDGES])
    if not kept:
        return []
    largest, weakest = max(map(abs, kept.values())), min(map(abs, kept.values()))
    relative, share, _ = TOLERANCES["edge"]
    clearly = weakest + relative * weakest + share * largest
    new = [Difference(f"edge: {name}", None, value, None) for name, value in now.items() if name not in kept and abs(value) > clearly]
    return [*(_difference(f"edge: {name}", value, now.get(name), "edge", largest) for name, value in kept.items()), *new]


def table(found: Sequence[Difference]) -> str:
    """The differences, the greatest first."""
    head = f"{'':<58} {'golden':>14} {'now':>14} {'relative':>9}"
    ordered = sorted(found, key=lambda one: -1e300 if one.relative is None else -one.relative)
    return "\n".join([head, *(one.row for one in ordered)])


# -- files ---------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("featlas", "torch", "transformers", "numpy")} | {"python": platform.python_version()}


def write(name: str, found: Mapping[str, Any]) -> Path:
    """Keep a golden run in `tests/golden`."""
    strongest = dict(sorted(found["edge"].items(), key=lambda item: -abs(item[1]))[:N_EDGES])
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"written by": versions(), **found, "edge": strongest}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(name: str) -> dict[str, Any]:
    """A golden run of `tests/golden`."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument("name", help="the golden run: a file tests/golden/NAME.json")
    parser.add_argument("atlas", type=Path)
    parser.add_argument("--run", help="the run, by its key or the beginning of it; not needed where there is only one")
    asked = parser.parse_args()
    found = numbers(asked.atlas, asked.run)
    if asked.action == "write":
        print(write(asked.name, found))
        return 0
    golden = read(asked.name)
    differing = differences(golden, found)
    if not differing:
        print(f"{asked.name}: {sum(len(part) for part in golden.values())} numbers as they were (written by {golden['written by']})")
        return 0
    print(table(differing))
    print(f"\n{len(differing)} numbers of {asked.name} differ; written by {golden['written by']}, now {versions()}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
