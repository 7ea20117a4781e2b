"""Edges and statistics by one process and by workers on this machine: the whole time, and what is left of it once the models are loaded.

    python -m benchmarks.workers [--workers 1,2] [--limit 48] [--tokens 36864] [--output FILE]

SmolLM2, its demo dictionaries, agreement, attribution patching; each run into an atlas of its own, in a process of its own, one thread a worker.
*Loading* is the time until the first batch is in the graph, less one batch: imports, the driver's plan, Ray, the workers' models. *Sequences a
minute* counts from the first batch to the last, which is what a long run comes to. The graphs are compared edge by edge. The load of the
machine is noted, for it may have other work.

Statistics are those of the pages of the documentation, blocks of 128 tokens, at two sites, by `featlas ingest statistics`: once of a third of
the tokens and once of all, each into an atlas of its own. *Tokens a minute* are those of the other two thirds in the time that they add, which
leaves out what the start takes; the means of both atlases are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph

ROOT = Path(__file__).parents[1]
BATCH = 4
LENGTH = 128
CHILD = """
import json, sys, time
from pathlib import Path
from featlas.ingest.effective import EdgeSettings
from featlas.ingest.pipeline import EdgeOptions, ingest_edges
began, seen = float(sys.argv[3]), []
options = EdgeOptions(
    model="smollm2", dictionaries="demo", task="agreement", atlas=Path(sys.argv[1]), settings=EdgeSettings(steps=1, threshold=0.01),
    sites=("resid_5", "resid_11", "resid_17", "resid_23"), limit=int(sys.argv[4]), batch_size=int(sys.argv[5]), workers=int(sys.argv[2]),
)
summary = ingest_edges(options, progress=lambda p: seen.append((p.done, time.time() - began)))
print(json.dumps({"run": summary.run, "edges": summary.n_edges, "seen": seen}))
"""


def measured(folder: Path, workers: int, limit: int) -> dict[str, float | int | str]:
    """One run: its seconds, those before the first batch, sequences a minute after it."""
    before = os.getloadavg()[0]
    began = time.time()
    arguments = [str(folder), str(workers), str(began), str(limit), str(BATCH)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True, check=True)
    seconds = time.time() - began
    answer = json.loads(done.stdout.splitlines()[-1])
    (first, at), (last, end) = answer["seen"][0], answer["seen"][-1]
    rate = (last - first) / (end - at)
    return {
        "workers": workers, "run": answer["run"], "edges": answer["edges"], "seconds": seconds, "loading": at - workers * first / rate,
        "sequences a minute": 60 * rate, "load before": before, "load after": os.getloadavg()[0],
    }  # fmt: skip


def statistics_measured(folder: Path, workers: int, tokens: int) -> dict[str, float | int | str]:
    """Two runs, the second over three times as many tokens: their seconds, and tokens a minute between them."""
    before = os.getloadavg()[0]
    corpus = folder.parent / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))), encoding="utf-8")
    seconds, counted = [], []
    for part, blocks in enumerate((tokens // LENGTH // 3, tokens // LENGTH)):
        command = [str(Path(sys.executable).with_name("featlas")), "ingest", "statistics", "--model", "smollm2", "--dictionaries", "demo"]
        command += ["--corpus", str(corpus)]
        command += ["--sites", "resid_11,resid_23", "--limit", str(blocks), "--length", str(LENGTH), "--atlas", str(folder / str(part)), "--json"]
        command += ["--workers", str(workers)] if workers > 1 else []
        began = time.time()
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(time.time() - began)
        counted.append(json.loads(done.stdout)["tokens"])
    rate = (counted[1] - counted[0]) / (seconds[1] - seconds[0])
    return {
        "workers": workers, "tokens": counted[1], "seconds": seconds[1], "loading": seconds[1] - counted[1] / rate, "tokens a minute": 60 * rate,
        "load before": before, "load after": os.getloadavg()[0],
    }  # fmt: skip


def largest_difference_of_means(folders: list[Path]) -> float:
    """Between the first store's means and the others', relative to the largest mean of the site; raises where their counts differ."""
    tables = []
    for folder in folders:
        with StatisticsStore(folder / "1", read_only=True) as store:
            tables.append(store.query('SELECT site, feature, "count", mean FROM feature_statistics ORDER BY site, feature'))
    found = 0.0
    for table in tables[1:]:
        if not table.select("site", "feature", "count").equals(tables[0].select("site", "feature", "count")):
            raise SystemExit("the statistics have different counts")
        off = (table["mean"] - tables[0]["mean"]).abs() / tables[0].select(pl.col("mean").abs().max().over("site"))["mean"]
        found = max(found, float(off.max() or 0.0))
    return found


def largest_difference(folders: list[Path], run: str) -> float:
    """Between the first graph's weights and the others', relative to the largest weight; raises where their edges differ."""
    tables = []
    for folder in folders:
        with open_graph(folder, read_only=True) as store:
            tables.append(store.read_edges("ATTRIBUTES", run=run).sort("sequence", "source", "target"))
    keys = ["sequence", "source", "target", "src_pos", "dest_pos"]
    for table in tables[1:]:
        if not table.select(keys).equals(tables[0].select(keys)):
            raise SystemExit("the graphs have different edges")
    scale = tables[0].select(pl.col("weight").abs().max()).item()
    return max((float((table["weight"] - tables[0]["weight"]).abs().max() or 0.0) / scale for table in tables[1:]), default=0.0)


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated; 1 is a process without Ray")
    parser.add_argument("--limit", type=int, default=48, help="sequences")
    parser.add_argument("--tokens", type=int, default=36_864, help="of statistics; 0 measures none")
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    numbers = [int(word) for word in arguments.workers.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(n)) for n in numbers]
        rows = [measured(folder, n, arguments.limit) for folder, n in zip(folders, numbers, strict=True)]
        difference = largest_difference(folders, str(rows[0]["run"]))
        counting = []
        if arguments.tokens:
            places = [Path(temporary, f"statistics-{n}") for n in numbers]
            counting = [statistics_measured(place, n, arguments.tokens) for place, n in zip(places, numbers, strict=True)]
            off = largest_difference_of_means(places)
    found = {"edges": {"rows": rows, "largest difference": difference}}
    with pl.Config(float_precision=1, tbl_cols=-1, tbl_width_chars=200):
        print(pl.DataFrame(rows))
        print(f"largest difference of a weight, relative to the largest weight: {difference:.1e}")
        if counting:
            found["statistics"] = {"rows": counting, "largest difference": off}
            print(pl.DataFrame(counting))
            print(f"largest difference of a mean, relative to the largest of its site: {off:.1e}")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
