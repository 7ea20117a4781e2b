"""What an atlas holds, part by part: how much of each, how large it is on the disk, what is unfinished and which command goes on with it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from .atlases import GRAPH_FILE, MANIFESTS, UNITS
from .pruning import DELETING
from .runs import DONE
from .samples import SampleStore
from .schema import EDGES, NODES, SCHEMA_VERSION
from .series import list_series
from .statistics import FILE_NAME, StatisticsStore
from .store import GraphStore, is_server

RUNS: Mapping[str, pl.DataType] = {
    "run": pl.String(), "model": pl.String(), "task": pl.String(), "method": pl.String(), "status": pl.String(), "done": pl.Int64(),
    "planned": pl.Int64(), "edges": pl.Int64(), "share": pl.Float64(), "measured": pl.String(), "deterministic": pl.Boolean(), "goes_on": pl.String(),
}  # fmt: skip
"""share: of all edges. measured: when, by the manifest. deterministic: whether the device's kernels are. goes_on: an unfinished run's command."""


@dataclass(frozen=True)
class Contents:
    """An atlas. counts: `what, n` of the graph's labels and types that it has any of. parts: `part, bytes, files`. held: `what, n` of the rest.

    dictionaries: `model, dictionary, site, features`. unfinished: `what, state, command`.
    """

    graph: str
    schema: int
    runs: pl.DataFrame
    counts: pl.DataFrame
    dictionaries: pl.DataFrame
    held: pl.DataFrame
    statistics_runs: pl.DataFrame
    samples: pl.DataFrame
    parts: pl.DataFrame
    unfinished: pl.DataFrame


def atlas_contents(store: GraphStore, statistics: StatisticsStore | None, folder: Path | None, graph: str) -> Contents:
    """What an atlas holds. `folder` and `statistics` are None where there are none; `graph` is where the graph is, in words."""
    runs = atlas_runs(store, folder, graph if is_server(graph) else None)
    of_statistics = _statistics_runs(statistics)
    return Contents(
        graph, SCHEMA_VERSION, runs, _counts(store), _dictionaries(store), _held(store, statistics, folder), of_statistics, _samples(folder),
        _parts(folder), _unfinished(runs, of_statistics),
    )  # fmt: skip


def _counts(store: GraphStore) -> pl.DataFrame:
    rows = [(name, _one(store, f"MATCH (n:{name}) RETURN count(*) AS n")) for name in NODES if name != "Meta"]
    rows += [(name, sum(_one(store, f"MATCH (:{a})-[e:{name}]->(:{b}) RETURN count(*) AS n") for a, b in edge.ends)) for name, edge in EDGES.items()]
    return pl.DataFrame(rows, schema={"what": pl.String, "n": pl.Int64}, orient="row").filter(pl.col("n") > 0)


def _one(store: GraphStore, text: str) -> int:
    return int(store.query(text)["n"][0])


def atlas_runs(store: GraphStore, folder: Path | None, server: str | None = None) -> pl.DataFrame:
    """The runs of edges as `RUNS`, the one measured last first. server: the address of the graph, where it is on one."""
    rows = store.query("MATCH (r:Run) RETURN properties(r) AS run ORDER BY r.key")
    marks = store.query(
        "MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE m.status = 'done' RETURN r.key AS run, count(*) AS n, sum(m.n_edges) AS edges"
    )
    done = {run: (int(n), int(edges or 0)) for run, n, edges in marks.iter_rows()} if marks.height else {}
    found = []
    for run in (json.loads(text) for text in rows["run"].to_list()):
        n, edges = done.get(run["key"], (0, 0))
        manifest = _manifest(folder, run["key"])
        unfinished = run.get("n_planned") is not None and run.get("status") != DONE
        found.append({
            "run": run["key"], **{name: run.get(name) for name in ("model", "task", "method", "status")}, "done": n,
            "planned": run.get("n_planned"), "edges": edges or run.get("n_edges"), "share": None, "measured": manifest.get("written"),
            "deterministic": manifest.get("deterministic"), "goes_on": going_on(run, manifest, folder, server) if unfinished else None,
        })  # fmt: skip
    frame = pl.DataFrame(found, schema=RUNS)
    total = pl.col("edges").sum()
    share = pl.when(total > 0).then(pl.col("edges") / total)
    return frame.with_columns(share.alias("share")).sort("measured", "run", descending=[True, False], nulls_last=True)


def _manifest(folder: Path | None, run: str) -> dict[str, object]:
    """A run's manifest; empty where there is none that can be read."""
    if folder is None:
        return {}
    try:
        found = json.loads((folder / MANIFESTS / f"{run}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_OPTIONS = ("model", "revision", "dictionaries", "task", "limit", "seed", "device", "dtype", "statistics_run", "target", "batch_size")
SETTINGS = ("metric", "baseline", "steps", "threshold", "max_edges", "positions", "first_factor", "tolerance", "screen", "tail_dtype", "noise_scale")


def flags_of(options: Mapping[str, object]) -> list[str]:
    """The words of `ingest edges` for those of a manifest's options that are not called as their option is."""
    settings = options.get("settings")
    words = ["--mean", "per-position"] if isinstance(settings, Mapping) and settings.get("per_position") else []
    words += [] if options.get("bos") is None else ["--bos", "yes" if options["bos"] else "no"]
    return [*words, *(["--skip-invalid"] if options.get("skip_invalid") else [])]


def going_on(run: Mapping[str, object], manifest: Mapping[str, object], folder: Path | None, server: str | None = None) -> str:
    """The command that goes on with a run, from its manifest; a run that is being deleted is deleted to the end."""
    place = [*([] if folder is None else ["--atlas", str(folder)]), *([] if server is None else ["--graph", server])]
    if run.get("status") == DELETING:
        return shlex.join(["featlas", "atlas", "prune", str(run["key"]), "--yes", *place])
    options = manifest.get("options")
    if not isinstance(options, Mapping):
        return "the run's own `featlas ingest edges`, `featlas import files` or `featlas atlas copy`, whichever was stopped (no manifest is here)"
    if options.get("import_files"):  # measured into files: what is unfinished here is their import
        return shlex.join(["featlas", "import", "files", str(options["import_files"]), *place])
    settings = options.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    words = ["featlas", "ingest", "edges"]
    given = {**{name: options.get(name) for name in _OPTIONS}, **{name: settings.get(name) for name in SETTINGS}}
    for name, value in given.items():
        if value is not None and name != "revision":
            words += [f"--{name.replace('_', '-')}", str(value)]
    sites = options.get("sites")
    words += ["--sites", ",".join(map(str, sites))] if sites else []
    return shlex.join([*words, *flags_of(options), *place])


def _dictionaries(store: GraphStore) -> pl.DataFrame:
    rows = store.query(
        "MATCH (f:Feature) WHERE f.kind = 'feature' RETURN f.model AS model, f.dictionary AS dictionary, f.site AS site, f.layer AS layer,"
        " count(*) AS features ORDER BY model, layer, site, dictionary"
    )
    types = {"model": pl.String, "dictionary": pl.String, "site": pl.String, "features": pl.Int64}
    return pl.DataFrame(schema=types) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in types.items())


_TABLES = {
    "parcellations": "parcellations", "comparisons": "comparisons", "matchings": "matchings", "rankings": "rankings", "feature_labels": "labels",
    "scores": "measured scores", "ablation_effects": "measured effects",
}  # fmt: skip


def _held(store: GraphStore, statistics: StatisticsStore | None, folder: Path | None) -> pl.DataFrame:
    """What was found by analyses: `what, n`."""
    rows = [
        ("circuits", _one(store, "MATCH (c:Circuit) RETURN count(*) AS n")),
        ("partitions", _one(store, "MATCH (p:Partition) RETURN count(*) AS n")),
    ]
    if statistics is not None:
        rows += [(what, int(statistics._fetch(f"SELECT count(*) FROM {table}")[0][0])) for table, what in _TABLES.items()]
    if folder is not None:
        rows.append(("series", len(list_series(folder))))
    return pl.DataFrame(rows, schema={"what": pl.String, "n": pl.Int64}, orient="row").filter(pl.col("n") > 0)


_STATISTICS_RUNS = {
    "run": pl.String,
    "corpus": pl.String,
    "basis": pl.String,
    "status": pl.String,
    "sequences": pl.Int64,
    "total_sequences": pl.Int64,
}


def _statistics_runs(statistics: StatisticsStore | None) -> pl.DataFrame:
    return pl.DataFrame(schema=_STATISTICS_RUNS) if statistics is None else statistics.runs().select(list(_STATISTICS_RUNS))


def _samples(folder: Path | None) -> pl.DataFrame:
    types = {"samples": pl.String, "basis": pl.String, "source": pl.String, "tokens": pl.Int64, "bytes": pl.Int64}
    runs = [] if folder is None else SampleStore(folder, read_only=True).runs()
    return pl.DataFrame([(run.key, run.basis, run.source, run.n_tokens, run.n_bytes) for run in runs], schema=types, orient="row")


def _parts(folder: Path | None) -> pl.DataFrame:
    """The parts of the folder with their sizes, the largest first: `part, bytes, files`."""
    types = {"part": pl.String, "bytes": pl.Int64, "files": pl.Int64}
    if folder is None:
        return pl.DataFrame(schema=types)
    named = [GRAPH_FILE, f"{GRAPH_FILE}.wal", FILE_NAME, f"{FILE_NAME}.wal", f"{Path(FILE_NAME).stem}.parts", *UNITS, MANIFESTS]
    sizes = dict.fromkeys(named, 0)
    files = dict(sizes)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        top = path.relative_to(folder).parts[0]
        sizes[top] = sizes.get(top, 0) + path.stat().st_size
        files[top] = files.get(top, 0) + 1
    rows = [(name, size, files[name]) for name, size in sizes.items() if files[name]]
    return pl.DataFrame(rows, schema=types, orient="row").sort("bytes", descending=True)


def _unfinished(runs: pl.DataFrame, of_statistics: pl.DataFrame) -> pl.DataFrame:
    rows = [
        (f"run {run}", f"{status}, {done} of {planned} sequences", command)
        for run, status, done, planned, command in runs.select("run", "status", "done", "planned", "goes_on").iter_rows()
        if command is not None
    ]
    rows += [
        (f"statistics run {run}", f"{done} of {total} sequences", "its own `featlas ingest statistics` goes on")
        for run, status, done, total in of_statistics.select("run", "status", "sequences", "total_sequences").iter_rows()
        if status != "done"
    ]
    return pl.DataFrame(rows, schema={"what": pl.String, "state": pl.String, "command": pl.String}, orient="row")


def last_runs(runs: pl.DataFrame, n: int) -> tuple[list[str], list[str]]:
    """Runs measured before the last `n`, and those of which no manifest says when: on a server they are mostly somebody else's."""
    known = runs.filter(pl.col("measured").is_not_null()).sort("measured", "run", descending=[True, False])
    return known["run"].to_list()[n:], runs.filter(pl.col("measured").is_null())["run"].to_list()


AT_WORK_S = 3600.0
"""Where a manifest was written later than so many seconds ago, its run may well be measured now."""


def unfinished_here(runs: pl.DataFrame, *, on_server: bool, now: datetime | None = None) -> tuple[list[str], list[str], list[str]]:
    """Unfinished runs: those that may be deleted, those begun within the hour, and those without a manifest here.

    Who holds an embedded graph for writing knows that nobody else measures into it: there all may be deleted.
    """
    unfinished = runs.filter(pl.col("goes_on").is_not_null())
    if not on_server:
        return unfinished["run"].to_list(), [], []
    after = (now or datetime.now(UTC)).timestamp() - AT_WORK_S
    known = {run: datetime.fromisoformat(text).timestamp() for run, text in unfinished.select("run", "measured").iter_rows() if text}
    going = unfinished.filter(pl.col("status") == DELETING)["run"].to_list()
    fresh = [run for run, at in known.items() if at >= after and run not in going]
    unknown = [run for run in unfinished["run"] if run not in known and run not in going]
    return [run for run in unfinished["run"] if run not in fresh and run not in unknown], fresh, unknown


def older_runs(runs: pl.DataFrame, days: float, now: datetime | None = None) -> tuple[list[str], list[str]]:
    """Runs measured more than so many days ago, and those of which no manifest says when."""
    before = (now or datetime.now(UTC)).timestamp() - 86400 * days
    known = {run: datetime.fromisoformat(text).timestamp() for run, text in runs.select("run", "measured").iter_rows() if text}
    return [run for run, at in known.items() if at < before], [run for run in runs["run"] if run not in known]
