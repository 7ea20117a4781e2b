"""How everything grows with a graph: ingest, disk, each named query, each analysis, memory, from 1e4 to 1e7 edges, on both stores.

    python -m benchmarks.big_graphs measure [--sizes 10000 100000 1000000 10000000] [--stores embedded server] [--work FOLDER]
    python -m benchmarks.big_graphs table       the figures so far, as the tables of docs/growth.md
    python -m benchmarks.big_graphs draw        docs/figures/growth_stores.svg

The graph is made up, not measured: what is timed are stores and analyses, not the model. It has the shape of a real run: 12 residual sites of
4,096 features, of which a sequence uses 64 a site: 24 that belong to its task (one of two), the others by popularity (Zipf); 10,000 edges a
sequence from site to site and on to the output, weights of both signs and heavy tails, ten times heavier between the task's own, six of which
drive each other from the first site to the output in every sequence. Beside them it has two wires a feature, a partition of each site into 64
regions and the drives between those.

Each step runs in a process of its own and tells seconds (wall, CPU) and its greatest memory (VmHWM); the server's memory is bounded by its heap
and page cache. CPU seconds are the process's and the server's. Steps that are in the figures already are not measured again, unless `--again`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

FIGURES = Path(__file__).parent / "figures" / "big_graphs.json"
DRAWING = Path(__file__).parents[1] / "docs" / "figures" / "growth_stores.svg"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
N_SITES, D_SAE, ACTIVE, CORE, CHAINS, PER_SEQUENCE, BATCH = 12, 4096, 64, 24, 6, 10_000, 8
REGION = D_SAE // 64
MODEL, DICTIONARY, RUN, PARCELLATION = "synthetic@000000000000", "0" * 12, "5" * 16, "7" * 16
QUERY_LIMIT_S = 60.0
ONLINE_AT_MOST = 1_000_000
"""Larger graphs come to the server by its offline importer."""
WRITES = ("ingest", "close run", "wires", "regions")
HEAP_MB, PAGECACHE_MB = 2048, 1024

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "analyze circuit": ("analyze", "circuit", "--edges", "300"),
    "analyze communities": (
        "analyze", "communities", "--no-test", "--no-scan", "--seeds", "2", "--nulls", "2", "--top-edges", "100000", "--no-write"),
    "compare": ("compare", RUN, "--task", "one", "--other-task", "other", "--only", "edges,profiles", "--draws", "2", "--top-edges", "100000",
                "--no-write"),
    "analyze rank": ("analyze", "rank", "--no-write"),
    "report": ("report", "--output", "report.html"),
    "export (parquet)": ("export", "--format", "parquet", "exported"),
    "export (import files)": ("export", "exported"),
    "atlas check": ("atlas", "check"),
    "atlas check, fast": ("atlas", "check", "--fast"),
}  # fmt: skip
"""Commands that read a whole run. Communities and comparisons are of the 100,000 strongest edges, which are searched among all."""


@dataclass(frozen=True)
class Place:
    """Where a graph of a size is: the atlas' folder, and the server's address with its password file where there is one."""

    atlas: Path
    home: Path | None = None

    def environment(self) -> dict[str, str]:
        """What a command needs to find the graph."""
        own = {**os.environ, "FEATLAS_ATLAS": str(self.atlas), "OMP_NUM_THREADS": "1"}
        if self.home is not None:
            from featlas.queries.neo4j_server import status

            info = status(self.home)
            assert info is not None, f"no server of {self.home} runs"
            own |= {"NEO4J_URI": info.uri, "NEO4J_USERNAME": info.username, "NEO4J_PASSWORD": info.password_file.read_text().strip()}
        return own

    def cpu_seconds(self) -> float:
        """Of this process and of the server, since they began."""
        own = time.process_time()
        if self.home is None:
            return own
        from featlas.queries.neo4j_server import status

        info = status(self.home)
        assert info is not None, f"no server of {self.home} runs"
        fields = Path(f"/proc/{info.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return own + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def bytes_on_disk(self) -> int:
        """Of the graph alone."""
        if self.home is None:
            return sum(path.stat().st_size for path in self.atlas.glob("graph.lbug*"))
        return sum(path.stat().st_size for part in ("databases", "transactions") for path in (self.home / "data" / part).rglob("*") if path.is_file())


# -- the graph ------------------------------------------------------------------------------------------------


def site_keys(site: int) -> pl.Series:
    """Keys of a site's features, then of its error node."""
    from featlas.queries.schema import feature_key

    return pl.Series([feature_key(MODEL, DICTIONARY, f"resid_{site}", i) for i in [*range(D_SAE), "error"]])


def feature_rows() -> pl.DataFrame:
    """Every node of every site, and the output."""
    from featlas.queries.schema import output_key

    frames = [
        pl.DataFrame({"key": site_keys(site)}).with_columns(
            model=pl.lit(MODEL), dictionary=pl.lit(DICTIONARY), site=pl.lit(f"resid_{site}"), layer=pl.lit(site, pl.Int64),
            kind=pl.Series(["feature"] * D_SAE + ["error"]), index=pl.Series([*range(D_SAE), -1]), label=pl.lit(None, pl.String),
        )
        for site in range(N_SITES)
    ]  # fmt: skip
    output = {"key": output_key(MODEL, "logit_diff"), "model": MODEL, "dictionary": "-", "site": "y", "layer": -1, "kind": "output", "index": -1,
              "label": "logit diff"}  # fmt: skip
    return pl.concat([*frames, pl.DataFrame([output], schema=frames[0].schema)])


class Edges:
    """Edges of one sequence after the other, the same for the same seed and number."""

    def __init__(self) -> None:
        from featlas.queries.schema import output_key

        self.keys = [site_keys(site) for site in range(N_SITES)]
        self.output = pl.Series([output_key(MODEL, "logit_diff")])
        rank = np.random.default_rng(0)
        popular = 1 / np.arange(1, D_SAE + 1)
        self.popularity = [rank.permutation(popular / popular.sum()) for _ in range(N_SITES)]

    def of(self, number: int, n: int = PER_SEQUENCE) -> pl.DataFrame:
        """Sequence `number`'s edges: source, target, weight."""
        random = np.random.default_rng([1, number])
        active = [self._active(random, site, number % 2) for site in range(N_SITES)]
        frames = [self._frame(random, self.keys[-1].gather(active[-1]), self.output, len(active[-1]))]
        left = n - frames[0].height
        for site in range(N_SITES - 1):
            part = left // (N_SITES - 1 - site)
            left -= part
            frames.append(self._frame(random, self.keys[site].gather(active[site]), self.keys[site + 1].gather(active[site + 1]), part))
        return pl.concat(frames)

    def _active(self, random: np.random.Generator, site: int, task: int) -> np.ndarray:
        """The features of a site that a sequence uses, its task's own first; then the error node, which is always there."""
        own = np.arange(task * CORE, (task + 1) * CORE)
        drawn = random.choice(D_SAE, ACTIVE, replace=False, p=self.popularity[site])
        return np.concatenate([own, drawn[~np.isin(drawn, own)][: ACTIVE - CORE], [D_SAE]])

    def _frame(self, random: np.random.Generator, sources: pl.Series, targets: pl.Series, n: int) -> pl.DataFrame:
        chains = np.arange(CHAINS) * len(targets) + np.arange(CHAINS) % len(targets)
        drawn = random.choice(len(sources) * len(targets), n, replace=False)
        pairs = np.concatenate([chains, drawn[~np.isin(drawn, chains)]])[:n]
        source, target = pairs // len(targets), pairs % len(targets)
        weight = random.standard_t(3, n) * np.where((source < CORE) & (target < CORE), 0.1, 0.01)
        weight[:CHAINS] = random.uniform(0.5, 1, len(weight[:CHAINS]))
        return pl.DataFrame({"source": sources.gather(source), "target": targets.gather(target), "weight": weight})


def write_graph(place: Place, n_edges: int) -> int:
    """Nodes, then the edges by sequences in batches, as an ingest commits them. Edges written."""
    from featlas.queries.store import SequenceCommit, graph_target, open_graph

    n_sequences = max(2, n_edges // PER_SEQUENCE)
    sequences = [f"{i:024d}" for i in range(n_sequences)]
    edges, written = Edges(), 0
    with open_graph(graph_target(place.atlas)) as store:
        store.merge_nodes("Model", pl.DataFrame([{"key": MODEL, "name": "synthetic", "revision": "0" * 12, "family": "llama", "n_layers": N_SITES,
                                                  "d_model": 256}]))  # fmt: skip
        store.merge_nodes("Feature", feature_rows())
        store.merge_nodes("Run", pl.DataFrame([run_row(n_sequences)]))
        store.merge_edges("OF_MODEL", pl.DataFrame({"source": [RUN], "target": [MODEL]}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": sequences}).with_columns(
            task=pl.Series(["one", "other"] * n_sequences)[:n_sequences], clean=pl.lit("a text"), corrupt=pl.lit("another text"),
            answer=pl.lit(" a"), wrong_answer=pl.lit(" b")))  # fmt: skip
        for start in range(0, n_sequences, BATCH):
            commits = [
                SequenceCommit(RUN, sequences[i], edges.of(i, n_edges // n_sequences), {"metric_clean": 1.0, "metric_corrupt": -1.0})
                for i in range(start, min(n_sequences, start + BATCH))
            ]
            store.commit_sequences(commits)
            written += sum(commit.edges.height for commit in commits)
    return written


def run_row(n_sequences: int) -> dict[str, Any]:
    """The run's properties."""
    sites = [f"resid_{site}" for site in range(N_SITES)]
    return {
        "key": RUN, "model": MODEL, "dictionaries": json.dumps(dict.fromkeys(sites, DICTIONARY)), "task": "one+other",
        "method": "attribution patching", "steps": 1, "metric": "logit_diff", "baseline": "counterfactual",
        "threshold": 0.0, "aggregation": "sum", "sites": json.dumps(sites),
        "status": "running", "seed": 0, "version": "0", "n_planned": n_sequences,
        "settings": json.dumps({"limit": n_sequences, "batch_size": BATCH, "dtype": "float32", "roots": sites[:1]}),
    }  # fmt: skip


def write_wires(place: Place, n_edges: int) -> int:
    """Two wires of each feature into the next site."""
    from featlas.queries.store import graph_target, open_graph

    random, written = np.random.default_rng(2), 0
    with open_graph(graph_target(place.atlas)) as store:
        for site in range(N_SITES - 1):
            pairs = np.unique(np.repeat(np.arange(D_SAE), 2) * D_SAE + random.integers(0, D_SAE, 2 * D_SAE))
            wires = pl.DataFrame({"source": site_keys(site).gather(pairs // D_SAE), "target": site_keys(site + 1).gather(pairs % D_SAE)})
            store.merge_edges("WIRED", wires.with_columns(path=pl.lit("residual"), weight=pl.Series(random.normal(size=len(pairs)))))
            written += len(pairs)
    return written


def write_regions(place: Place, n_edges: int) -> int:
    """A partition of each site into blocks of neighbouring indices, and the drives between them, summed over the run's edges."""
    from featlas.queries.schema import block_key, partition_key
    from featlas.queries.store import graph_target, open_graph

    sites = [f"resid_{site}" for site in range(N_SITES)]
    blocks = pl.DataFrame(
        [
            {"key": block_key(PARCELLATION, site, "roi", 0, block), "parcellation": PARCELLATION, "model": MODEL, "dictionary": DICTIONARY,
             "method": "dense-sbm", "basis": "activation", "site": site, "layer": i, "level": 0, "kind": "roi", "chosen": True, "index": block,
             "size": REGION}
            for i, site in enumerate(sites) for block in range(D_SAE // REGION)
        ]
    )  # fmt: skip
    with open_graph(graph_target(place.atlas)) as store:
        store.merge_nodes("Partition", pl.DataFrame([{"key": partition_key(PARCELLATION, site), "parcellation": PARCELLATION, "model": MODEL,
                          "dictionary": DICTIONARY, "method": "dense-sbm", "basis": "activation", "site": site, "level": 0,
                          "n_blocks": D_SAE // REGION} for site in sites]))  # fmt: skip
        store.merge_nodes("Block", blocks)
        store.merge_edges("PART_OF", blocks.select(source="key", target=pl.format("{}|{}", "parcellation", "site")))
        features = feature_rows().filter(pl.col("kind") == "feature")
        of = features.select("key", block=pl.format(f"{PARCELLATION}|{{}}|roi|0|{{}}", "site", pl.col("index") // REGION))
        store.merge_edges("MEMBER_OF", of.rename({"key": "source", "block": "target"}))
        drives = [
            part.join(of.rename({"key": "source", "block": "from"}), on="source").join(of.rename({"key": "target", "block": "to"}), on="target")
            .group_by("from", "to").agg(weight_sum=pl.col("weight").sum(), abs_sum=pl.col("abs_weight").sum(), n=pl.len())
            for part in influences(store)
        ]  # fmt: skip
        summed = pl.concat(drives).group_by("from", "to").sum().rename({"from": "source", "to": "target"})
        store.merge_edges("DRIVES", summed.with_columns(run=pl.lit(RUN), weight_mean=pl.col("weight_sum") / REGION**2, n=pl.col("n").cast(pl.Int64)))
    return summed.height


def influences(store: Any) -> Iterator[pl.DataFrame]:
    """The run's aggregated edges, one source site after the other."""
    from featlas.queries.store import KeyRange

    for site in range(N_SITES):
        keys = site_keys(site).sort()
        yield store.read_edges("INFLUENCES", run=RUN, sources=KeyRange(keys[0], keys[-1]))


def close(place: Place, n_edges: int) -> int:
    """`INFLUENCES` from the run's edges; their number."""
    from featlas.ingest.closing import close_run
    from featlas.queries.store import graph_target, open_graph

    with open_graph(graph_target(place.atlas)) as store:
        return close_run(store, RUN)


def read_all(place: Place, n_edges: int) -> int:
    """Every aggregated edge read back, as analyses do."""
    from featlas.queries.store import graph_target, open_graph

    with open_graph(graph_target(place.atlas), read_only=True) as store:
        return sum(part.height for part in influences(store))


# -- the named queries ------------------------------------------------------------------------------------------


def ask_all(place: Place) -> Iterator[dict[str, Any]]:
    """Each named query once, warm (an overview was asked before), within a time limit: name, seconds, rows; seconds None where it was stopped.

    Or why it failed.
    """
    from featlas.queries.library import bound_query, list_queries
    from featlas.queries.schema import block_key
    from featlas.queries.store import QueryLimits, QueryTooSlow, StoreFailed, graph_target, open_graph

    known = {
        "run": RUN, "other_run": RUN, "sequence": f"{0:024d}", "site": f"resid_{N_SITES - 3}", "parcellation": PARCELLATION, "task": "one",
        "other_task": "other",
        "block": block_key(PARCELLATION, "resid_5", "roi", 0, 3), "community": block_key(PARCELLATION, "resid_5", "roi", 0, 3),
        "partition": f"{PARCELLATION}|resid_5", "text": "a", "matching": "0" * 16, "position": -1, "least": 0.2,
    }  # fmt: skip
    with open_graph(graph_target(place.atlas), read_only=True) as store:
        store.query("MATCH (r:Run) RETURN r.key")
        circuits = store.query("MATCH (c:Circuit) RETURN c.key AS key ORDER BY key LIMIT 1")["key"].to_list()
        strongest = store.query("MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE e.run = $run AND a.kind = 'feature' AND a.site = 'resid_8' "
                                "RETURN a.key AS key ORDER BY e.abs_weight DESC LIMIT 1", {"run": RUN})["key"].to_list()  # fmt: skip
        known |= {name: key for name, keys in (("circuit", circuits), ("other_circuit", circuits), ("feature", strongest), ("key", strongest))
                  for key in keys}  # fmt: skip
        for query in list_queries():
            given = {p.name: known[p.name] for p in query.parameters if p.name in known}
            if any(p.name not in given and p.required for p in query.parameters):
                raise LookupError(f"{query.name} takes {query.parameters}: give the benchmark a value for each")
            bound = bound_query(store, query.name, given)
            started, cpu = time.perf_counter(), place.cpu_seconds()
            try:
                rows = len(store.answer(bound.text, bound.values, limits=QueryLimits(seconds=QUERY_LIMIT_S)).frame())
                wall = time.perf_counter() - started
            except QueryTooSlow:
                rows = wall = None
            except StoreFailed as error:  # its memory
                yield {"step": f"query {query.name}", "failed": str(error)}
                continue
            yield {"step": f"query {query.name}", "wall": wall, "cpu": place.cpu_seconds() - cpu, "rows": rows}


# -- measuring ------------------------------------------------------------------------------------------------

STEPS: Mapping[str, Callable[[Place, int], int]] = {
    "ingest": write_graph, "close run": close, "wires": write_wires, "regions": write_regions, "read aggregated edges": read_all,
}  # fmt: skip


def run_step(name: str, place: Place, n_edges: int) -> None:
    """In a child: one step, its figures as the last line of stdout."""
    base, wall, cpu = _peak_mb(), time.perf_counter(), place.cpu_seconds()
    if name == "queries":
        rows = list(ask_all(place))
        print(json.dumps([*rows, {"step": "all queries", "wall": time.perf_counter() - wall, "peak_mb": _peak_mb(), "base_mb": base}]))
        return
    rows = STEPS[name](place, n_edges)
    found = {"step": name, "wall": time.perf_counter() - wall, "cpu": place.cpu_seconds() - cpu, "peak_mb": _peak_mb(), "base_mb": base, "rows": rows}
    print(json.dumps([found]))


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure_step(name: str, place: Place, n_edges: int) -> list[dict[str, Any]]:
    """A step in a process of its own; its rows, with its disk afterwards."""
    words = [sys.executable, "-m", "benchmarks.big_graphs", "step", name, str(place.atlas), str(n_edges), *([str(place.home)] if place.home else [])]
    done = subprocess.run(words, capture_output=True, text=True, env=place.environment(), check=False)
    if done.returncode:
        return [{"step": name, "failed": done.stderr.strip().splitlines()[-1][-300:]}]
    return [{**row, "disk_mb": place.bytes_on_disk() / 2**20} for row in json.loads(done.stdout.strip().splitlines()[-1])]


def measure_command(name: str, place: Place) -> list[dict[str, Any]]:
    """A command of the command line, start included: seconds and its greatest memory."""
    for left in ("exported", "report.html"):
        path = place.atlas / left
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    words = [sys.executable, "-c", _MEASURED, *COMMANDS[name], "-q"]
    started, before = time.perf_counter(), place.cpu_seconds() - time.process_time()
    done = subprocess.run(words, capture_output=True, text=True, env=place.environment(), cwd=place.atlas, check=False)
    wall, told = time.perf_counter() - started, done.stderr.strip().splitlines()
    if not told or not told[-1].startswith("{"):
        return [{"step": name, "failed": (told or ["no output"])[-1][-300:]}]
    found = json.loads(told[-1])
    found["cpu"] += place.cpu_seconds() - time.process_time() - before
    return [{"step": name, "wall": wall, **({} if found["code"] == 0 else {"failed": " ".join(told[:-1])[-300:]}), **found}]


_MEASURED = """
import json, sys, resource
from featlas.cli import app
from featlas.running import run
code = run(app, sys.argv[1:])
own = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "cpu": own.ru_utime + own.ru_stime, "peak_mb": own.ru_maxrss / 1024}), file=sys.stderr)
"""


def measure(sizes: list[int], stores: list[str], work: Path, again: bool, only: str | None) -> None:
    """Every step for each store and size, smallest first; figures are saved after each."""
    figures = load() if again else [row for row in load() if row.get("failed") != "no output"]  # broken off
    for store in stores:
        for n_edges in sizes:
            folder = work / f"{store}-{n_edges}"
            folder.mkdir(parents=True, exist_ok=True)
            if store == "server" and n_edges > ONLINE_AT_MOST:
                figures = measure_import(work / f"embedded-{n_edges}", folder, n_edges, figures)
            with served(store, folder) as place:
                for name in [*WRITES, "analyze circuit", "queries", "read aggregated edges", *list(COMMANDS)[1:]]:
                    known = [row for row in figures if (row["store"], row["edges"], row["of"]) == (store, n_edges, name)]
                    imported = store == "server" and n_edges > ONLINE_AT_MOST and name in WRITES
                    if (known and not again) or (only and only not in name) or imported:
                        continue
                    rows = measure_step(name, place, n_edges) if name in STEPS or name == "queries" else measure_command(name, place)
                    figures = saved(figures, store, n_edges, name, rows)


def saved(figures: list[dict[str, Any]], store: str, n_edges: int, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures with these rows in place of older ones of the same step, written down and shown."""
    figures = [row for row in figures if (row["store"], row["edges"], row["of"]) != (store, n_edges, name)]
    figures += [{"store": store, "edges": n_edges, "of": name, "load": round(os.getloadavg()[0], 1), **row} for row in rows]
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(store, f"{n_edges:.0e}", {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return figures


def measure_import(source: Path, folder: Path, n_edges: int, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A graph too large to be written through transactions in a benchmark goes to the server by import files of the embedded one."""
    from featlas.queries.bulk_import import bulk_import
    from featlas.queries.neo4j_server import ServerOptions, down

    home = folder / "neo4j"
    if home.exists():
        return figures
    found = measure_command("export (import files)", Place(source))
    started = time.perf_counter()
    bulk_import(source / "exported", home, ServerOptions(bolt_port=0, http_port=0, heap_mb=HEAP_MB, pagecache_mb=PAGECACHE_MB, throwaway=True))
    down(home)
    wall = time.perf_counter() - started
    shutil.rmtree(source / "exported")
    disk = Place(folder, home).bytes_on_disk() / 2**20
    rows = [{**found[0], "step": "import: export"}, {"step": "import: offline importer", "wall": wall, "disk_mb": disk}]
    return saved(figures, "server", n_edges, "import", rows)


class served:
    """The place of a store: an atlas' folder, for the server with a server of its own that is stopped at the end."""

    def __init__(self, store: str, folder: Path) -> None:
        self.place = Place(folder, folder / "neo4j" if store == "server" else None)

    def __enter__(self) -> Place:
        if self.place.home is not None:
            from featlas.queries.neo4j_server import ServerOptions, up

            up(self.place.home, ServerOptions(bolt_port=0, http_port=0, heap_mb=HEAP_MB, pagecache_mb=PAGECACHE_MB, throwaway=True))
        return self.place

    def __exit__(self, *error: object) -> None:
        if self.place.home is not None:
            from featlas.queries.neo4j_server import down

            down(self.place.home)


def load() -> list[dict[str, Any]]:
    """The figures so far."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else []


# -- what is shown ----------------------------------------------------------------------------------------------


SHOWN = ("ingest", "close run", "read aggregated edges", "analyze circuit", "analyze rank", "analyze communities", "compare", "report",
         "export (parquet)", "export (import files)", "atlas check", "atlas check, fast")  # fmt: skip


def table() -> str:
    """Markdown as docs/growth.md has it: for each store a row a step, a column a size; CPU seconds, and of the process its greatest memory."""
    figures = [row for row in load() if "failed" not in row]
    out = []
    for store, title in (("embedded", "Embedded"), ("server", "Neo4j")):
        own = {(row["step"], row["edges"]): row for row in figures if row["store"] == store}
        sizes = sorted({edges for _, edges in own})
        if not sizes:
            continue
        whose = ", the server's included" if store == "server" else ""
        out += [f"**{title}**: CPU seconds{whose}, and in brackets the greatest memory of the process in MB"]
        out += ["", _row("", [f"{n:,}" for n in sizes]), "|---|" + "---|" * len(sizes)]
        for step in SHOWN:
            cells = [f"{_number(row['cpu'])} ({row['peak_mb']:,.0f})" if (row := own.get((step, n))) else "" for n in sizes]
            out += [_row(step, cells)] if any(cells) else []
        asked = [sorted(row["cpu"] for (step, n), row in own.items() if n == size and step.startswith("query ")) for size in sizes]
        for name, share in (("named queries: median", 0.5), ("… nine of ten below", 0.9), ("… the slowest", 1.0)):
            out.append(_row(name, [_number(times[min(len(times) - 1, int(share * len(times)))]) if times else "" for times in asked]))
        written = [own.get(("close run", n)) or own.get(("import: offline importer", n), {}) for n in sizes]
        out += [_row("disk after closing, MB", [_number(row.get("disk_mb")) for row in written]), ""]
    return "\n".join(out)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}" if value >= 0.01 else "<.01"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    measuring.add_argument("--stores", nargs="+", choices=("embedded", "server"), default=["embedded", "server"])
    measuring.add_argument("--work", type=Path, default=Path("big-graphs"))
    measuring.add_argument("--again", action="store_true")
    measuring.add_argument("--only", help="steps whose name holds this")
    commands.add_parser("table")
    commands.add_parser("draw")
    step = commands.add_parser("step")
    for name in ("name", "atlas", "edges"):
        step.add_argument(name)
    step.add_argument("home", nargs="?")
    options = parser.parse_args()
    if options.command == "measure":
        measure(options.sizes, options.stores, options.work.absolute(), options.again, options.only)
    elif options.command == "step":
        run_step(options.name, Place(Path(options.atlas), Path(options.home) if options.home else None), int(options.edges))
    elif options.command == "draw":
        from .plot import draw_growth

        DRAWING.write_text(draw_growth(load()) + "\n", encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
