"""Edges per second written to and read from each graph store, beside what trial code measured as possible.

    python benchmarks/stores.py [--edges 200000] [--per-sequence 20000] [--neo4j bolt://…]

Each sequence is one `commit_sequence` of random edges among 3000 features whose keys are as long as real ones. The server is the
one at `--neo4j` (credentials from the environment; what it holds must be a featlas graph or nothing, and is added to), or a
throwaway one of 512 MB heap that is started and stopped here.
"""

import argparse
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from featlas.queries.neo4j_server import ServerOptions, down, up
from featlas.queries.schema import feature_key
from featlas.queries.store import GraphStore, ServerCredentials, open_graph

N_FEATURES = 3000
# Edges per second of trial code on a quiet machine of two cores, with short integer keys.
POSSIBLE = {
    ("embedded", "commit"): "66,000 (LOAD FROM … MERGE, 1M)", ("embedded", "merge"): "31,000 (LOAD FROM … MERGE, four properties)",
    ("embedded", "read"): "0.8-2.6 million", ("server", "commit"): "26,000-28,800 (CREATE, lists)", ("server", "merge"): "19,800 (MERGE)",
    ("server", "read"): "118,000 (collect(), six columns)",
}


@dataclass(frozen=True)
class Timing:
    """Edges per second, and of writes the first and the last commit's seconds."""

    rate: float
    first_s: float
    last_s: float


def keys() -> list[str]:
    return [feature_key("smollm2@0123456789ab", "0123456789ab", f"resid_{i % 30}", i) for i in range(N_FEATURES)]


def edges(rng: np.random.Generator, n: int) -> pl.DataFrame:
    names = pl.Series(keys())
    ends = rng.choice(N_FEATURES * N_FEATURES, n, replace=False)
    source, target = names.gather(ends // N_FEATURES), names.gather(ends % N_FEATURES)
    return pl.DataFrame({"source": source, "target": target, "weight": rng.normal(size=n)})


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(store: GraphStore, n_edges: int, per_sequence: int) -> dict[str, Timing]:
    """Commit `n_edges` by sequences, merge as many aggregated ones as one sequence has, read all back."""
    rng, run = np.random.default_rng(0), uuid.uuid4().hex[:24]
    sequences = [f"{run}{i:06d}" for i in range(max(1, n_edges // per_sequence))]
    store.merge_nodes("Feature", pl.DataFrame({"key": keys()}))
    store.merge_nodes("Run", pl.DataFrame({"key": [run]}))
    store.merge_nodes("Sequence", pl.DataFrame({"key": sequences}))
    seconds = []
    for sequence in sequences:
        rows = edges(rng, per_sequence)
        seconds.append(timed(lambda sequence=sequence, rows=rows: store.commit_sequence(run, sequence, rows, {})))
    n = len(sequences) * per_sequence
    merged = edges(rng, per_sequence).with_columns(run=pl.lit(run), abs_weight=pl.col("weight").abs(), max_weight="weight", n=1)
    first = timed(lambda: store.merge_edges("INFLUENCES", merged))
    again = timed(lambda: store.merge_edges("INFLUENCES", merged))
    read = timed(lambda: store.read_edges("ATTRIBUTES", run=run))
    return {
        "commit": Timing(n / sum(seconds), seconds[0], seconds[-1]), "merge": Timing(per_sequence / first, first, again),
        "read": Timing(n / read, read, read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=200_000)
    parser.add_argument("--per-sequence", type=int, default=20_000)
    parser.add_argument("--neo4j", help="URI of a server; else a throwaway one")
    parser.add_argument("--only", choices=("embedded", "server"))
    options = parser.parse_args()
    print(f"{'store':9} {'what':7} {'edges/s':>9}  first s  last s  possible, edges/s")
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "server":
            with open_graph(Path(folder) / "graph.lbug") as store:
                report("embedded", measure(store, options.edges, options.per_sequence))
        if options.only != "embedded" and options.neo4j:
            with open_graph(options.neo4j) as store:
                report("server", measure(store, options.edges, options.per_sequence))
        elif options.only != "embedded":
            home = Path(folder) / "neo4j"
            info = up(home, ServerOptions(bolt_port=0, http_port=0, heap_mb=512, pagecache_mb=128, throwaway=True, start_limit_s=300))
            try:
                with open_graph(info.uri, credentials=ServerCredentials(info.username, info.password)) as store:
                    report("server", measure(store, options.edges, options.per_sequence))
            finally:
                down(home)


def report(store: str, timings: dict[str, Timing]) -> None:
    for what, timing in timings.items():
        print(f"{store:9} {what:7} {timing.rate:9,.0f}  {timing.first_s:7.2f} {timing.last_s:7.2f}  {POSSIBLE[store, what]}")


if __name__ == "__main__":
    main()
