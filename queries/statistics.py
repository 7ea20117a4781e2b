"""The statistics store: what was measured about each node over a corpus, in one DuckDB file.

Its tables and what their columns mean stand in `statistics_0001.sql` and the numbered files after it, the migrations:
1. A file that lacks some of them gets those in one transaction; a file that has more comes from a newer featlas and is refused.
2. A run that is going on keeps its running state beside its count of sequences, written in one transaction, so that a
   killed run resumes there. When it is done, its tables are written and the state dropped, again in one transaction.
3. Frames go in and out as polars, over Arrow. One process at a time may hold the file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import FeatlasError, UserError

FloatArray = NDArray[np.float64]

FILE_NAME = "statistics.duckdb"
"""The store's file in an atlas."""

ERROR = -1
"""The number of the error node in `feature` columns."""

RESULT_TABLES = ("feature_statistics", "contexts", "second_moments", "node_means", "error_means")
"""The tables that a run fills when it is done."""

SCORE_IDENTITY = ("run", "subject", "kind", "ablation", "metric", "baseline", "size", "seed", "sequence")
"""What makes a score the same score; a later value replaces an earlier one."""


class NotAStatisticsStore(UserError):
    """The file cannot be opened as a statistics store."""


class NewerStatisticsStore(UserError):
    """The file was written by a newer featlas."""


class OlderStatisticsStore(UserError):
    """The file needs a migration and was opened for reading only."""


class StatisticsStoreHeld(FeatlasError):
    """Another process holds the file."""


class NoSuchRun(UserError):
    """The statistics store has no such run, or the run has no such site."""


class RunNotDone(UserError):
    """A run's results were asked for before it was done."""


@dataclass(frozen=True)
class Migration:
    """One step of the file's layout: `version` counts from 1."""

    version: int
    name: str
    sql: str


def migrations() -> tuple[Migration, ...]:
    """The migrations that come with featlas, in order."""
    files = sorted(Path(__file__).parent.glob("statistics_[0-9]*.sql"))
    return tuple(Migration(int(file.stem.rpartition("_")[2]), file.stem, file.read_text(encoding="utf-8")) for file in files)


@dataclass(frozen=True)
class SiteRecord:
    """A site of a run: name, layer (-1 for `embed`), its dictionary's id and sizes."""

    site: str
    layer: int
    dictionary: str
    d_in: int
    d_sae: int


@dataclass(frozen=True)
class RunRecord:
    """A measurement over one corpus. `run` is its key; `arguments` the options that made it; `total_sequences` what it will hold when done."""

    run: str
    model: str
    corpus: str
    corpus_hash: str
    basis: str
    sites: tuple[SiteRecord, ...]
    total_sequences: int
    arguments: Mapping[str, object]
    version: str
    seed: int = 0
    status: str = "running"
    sequences: int = 0
    tokens: int = 0

    def site(self, name: str) -> SiteRecord:
        """The record of a site; raises `NoSuchRun`."""
        found = [site for site in self.sites if site.site == name]
        if not found:
            raise NoSuchRun(f"run {self.run} did not measure site {name!r}: it has {', '.join(site.site for site in self.sites)}")
        return found[0]


@dataclass(frozen=True)
class NodeBaseline:
    """Means and standard deviations of the nodes of one site over a corpus.

    features, features_std: (d_sae,). error, error_std: (d_in,), per component of the error vector.
    position_features (pos, d_sae) and position_errors (pos, d_in) hold the means per position where the run kept
    them (else None); a position that was not measured has the means over all positions.
    """

    features: FloatArray
    features_std: FloatArray
    error: FloatArray
    error_std: FloatArray
    position_features: FloatArray | None = None
    position_errors: FloatArray | None = None


class StatisticsStore:
    """Opens, or creates, a statistics store; a context manager. `path` is its file (`*.duckdb`), or the folder of an atlas, which is made.

    Raises `NotAStatisticsStore`, `NewerStatisticsStore`, `OlderStatisticsStore` (read_only) and `StatisticsStoreHeld`.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, steps: Sequence[Migration] | None = None) -> None:
        self.path = _file(Path(path), read_only)
        self._connection = _connect(self.path, read_only)
        try:
            self._migrate(tuple(steps) if steps is not None else migrations(), read_only)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StatisticsStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; may be called twice."""
        self._connection.close()

    # -- layout ----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The number of the last migration that the file has; 0 for an empty file."""
        if not self._fetch("SELECT 1 FROM duckdb_tables() WHERE table_name = 'migrations'"):
            return 0
        return int(self._fetch("SELECT coalesce(max(version), 0) FROM migrations")[0][0])

    def _migrate(self, steps: tuple[Migration, ...], read_only: bool) -> None:
        version, known = self.version, steps[-1].version
        if version > known:
            raise NewerStatisticsStore(
                f"{self.path} has layout {version}, this featlas knows layouts up to {known}: upgrade featlas, or choose another atlas by --atlas"
            )
        if version == known:
            return
        if version == 0 and self._fetch("SELECT 1 FROM duckdb_tables() LIMIT 1"):
            raise NotAStatisticsStore(f"{self.path} is a DuckDB file of something else: choose another atlas by --atlas")
        if read_only:
            raise OlderStatisticsStore(f"{self.path} has layout {version}, this featlas uses {known}: open it once for writing, which migrates it")
        with self.transaction():
            self._run("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, name VARCHAR NOT NULL, applied TIMESTAMP NOT NULL)")
            for step in steps[version:]:
                for statement in self._connection.extract_statements(step.sql):
                    self._run(statement)
                self._run("INSERT INTO migrations VALUES (?, ?, ?)", [step.version, step.name, _now()])

    # -- SQL -------------------------------------------------------------------------------------------------

    def _fetch(self, sql: Any, parameters: object = None) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, parameters).fetchall()

    def _run(self, sql: Any, parameters: object = None) -> None:
        # A connection is busy until its result is fetched to the end.
        self._fetch(sql, parameters)

    def query(self, sql: str, parameters: object = None) -> pl.DataFrame:
        """The answer to one SELECT with its parameters (`?` and a list, or `$name` and a mapping)."""
        frame = pl.from_arrow(self._connection.sql(sql, params=parameters).to_arrow_table())
        assert isinstance(frame, pl.DataFrame)  # a table never becomes a series
        return frame

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside stays, or nothing does."""
        self._connection.begin()
        try:
            yield
        except BaseException:
            # After a fatal error of the database there may be nothing to roll back; the first error is what counts.
            with suppress(duckdb.Error):
                self._connection.rollback()
            raise
        self._connection.commit()

    def _insert(self, table: str, frame: pl.DataFrame) -> None:
        """Append rows; `table` is always one of this module's own names."""
        if frame.is_empty():
            return
        self._connection.register("incoming", frame.to_arrow())
        try:
            self._run(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
        finally:
            self._connection.unregister("incoming")

    # -- runs ------------------------------------------------------------------------------------------------

    def start_run(self, record: RunRecord) -> RunRecord:
        """Register a run, unless it is there already; returns it as it stands in the file."""
        if self._find(record.run) is None:
            row = {
                "run": record.run, "model": record.model, "corpus": record.corpus, "corpus_hash": record.corpus_hash, "basis": record.basis,
                "status": "running", "sequences": 0, "total_sequences": record.total_sequences, "tokens": 0, "seed": record.seed,
                "version": record.version, "arguments": json.dumps(dict(record.arguments), sort_keys=True), "started": _now(),
            }  # fmt: skip
            sites = [{"run": record.run, "ordinal": i, **vars(site)} for i, site in enumerate(record.sites)]
            with self.transaction():
                self._insert("runs", pl.DataFrame([row]))
                self._insert("run_sites", pl.DataFrame(sites))
        return self.run(record.run)

    def _find(self, run: str) -> RunRecord | None:
        columns = "run, model, corpus, corpus_hash, basis, total_sequences, arguments, version, seed, status, sequences, tokens"
        rows = self._fetch(f"SELECT {columns} FROM runs WHERE run = ?", [run])
        if not rows:
            return None
        values = dict(zip(columns.split(", "), rows[0]))
        sites = self._fetch("SELECT site, layer, dictionary, d_in, d_sae FROM run_sites WHERE run = ? ORDER BY ordinal", [run])
        return RunRecord(**{**values, "sites": tuple(SiteRecord(*site) for site in sites), "arguments": json.loads(values["arguments"])})

    def run(self, run: str) -> RunRecord:
        """A run by its key; raises `NoSuchRun`."""
        record = self._find(run)
        if record is None:
            raise NoSuchRun(f"no statistics run {run!r} in {self.path}: `featlas ingest statistics` makes one")
        return record

    def runs(self) -> pl.DataFrame:
        """All runs, oldest first, one row each."""
        return self.query("SELECT * FROM runs ORDER BY started, run")

    def latest_run(self, model: str, dictionaries: Mapping[str, str], basis: str = "activation") -> RunRecord | None:
        """The run that was done last for a model whose sites include `dictionaries` (site name → dictionary id)."""
        rows = self._fetch("SELECT run FROM runs WHERE model = ? AND basis = ? AND status = 'done' ORDER BY finished DESC, run", [model, basis])
        for (run,) in rows:
            record = self.run(run)
            if dictionaries.items() <= {site.site: site.dictionary for site in record.sites}.items():
                return record
        return None

    def save_state(self, run: str, sequences: int, tokens: int, state: Mapping[str, bytes]) -> None:
        """In one transaction: what was accumulated over the first `sequences` sequences, and that they are done."""
        with self.transaction():
            self._run("UPDATE runs SET sequences = ?, tokens = ? WHERE run = ?", [sequences, tokens, run])
            self._run("DELETE FROM run_state WHERE run = ?", [run])
            for part, payload in state.items():
                self._run("INSERT INTO run_state VALUES (?, ?, ?)", [run, part, payload])

    def load_state(self, run: str) -> dict[str, bytes]:
        """What `save_state` wrote last; empty where nothing was."""
        return dict(self._fetch("SELECT part, payload FROM run_state WHERE run = ? ORDER BY part", [run]))

    def finish_run(self, run: str, sequences: int, tokens: int, results: Mapping[str, Sequence[pl.DataFrame]]) -> None:
        """In one transaction: the results (table name → frames without the column `run`), and that the run is done."""
        unknown = set(results) - set(RESULT_TABLES)
        if unknown:
            raise ValueError(f"unknown result tables {sorted(unknown)}")
        with self.transaction():
            self._run("DELETE FROM run_state WHERE run = ?", [run])
            for table, frames in results.items():
                for frame in frames:
                    self._insert(table, frame.with_columns(pl.lit(run).alias("run")))
            self._run(
                "UPDATE runs SET sequences = ?, tokens = ?, status = 'done', finished = ? WHERE run = ?", [sequences, tokens, _now(), run]
            )

    def delete_run(self, run: str) -> None:
        """Remove a run with all its rows, its scores included; raises `NoSuchRun`."""
        self.run(run)
        with self.transaction():
            for table in (*RESULT_TABLES, "scores", "run_state", "run_sites", "runs"):
                self._run(f"DELETE FROM {table} WHERE run = ?", [run])

    # -- results ---------------------------------------------------------------------------------------------

    def _done(self, run: str, site: str | None = None) -> RunRecord:
        record = self.run(run)
        if record.status != "done":
            progress = f"{record.sequences} of {record.total_sequences} sequences"
            raise RunNotDone(f"statistics run {run} is not done ({progress}): repeat its `featlas ingest statistics`, which resumes it")
        if site is not None:
            record.site(site)
        return record

    def feature_statistics(self, run: str, site: str | None = None) -> pl.DataFrame:
        """Moments of every node of a run, or of one site of it, in order of site and feature; the error node (-1) first."""
        self._done(run, site)
        return self.query(
            "SELECT s.* FROM feature_statistics s JOIN run_sites r ON r.run = s.run AND r.site = s.site"
            " WHERE s.run = $run AND ($site IS NULL OR s.site = $site) ORDER BY r.ordinal, s.feature",
            {"run": run, "site": site},
        )

    def contexts(self, run: str, site: str, feature: int | None = None) -> pl.DataFrame:
        """The strongest contexts of a site's nodes, or of one of them (`ERROR` for the error node), strongest first."""
        self._done(run, site)
        return self.query(
            "SELECT * FROM contexts WHERE run = $run AND site = $site AND ($feature IS NULL OR feature = $feature) ORDER BY feature, rank",
            {"run": run, "site": site, "feature": feature},
        )

    def feature_properties(self, run: str) -> pl.DataFrame:
        """What a run adds to `Feature` nodes of the graph: `key`, `frequency`, `mean_activation` (over all measured tokens) and `statistics_run`.

        Raises `UserError` for a run over attributions, which has no activations.
        """
        record = self._done(run)
        if record.basis != "activation":
            raise UserError(f"statistics run {run} is over {record.basis}s: frequency and mean activation come from a run over activations")
        return self.query(
            "SELECT key, frequency, mean AS mean_activation, run AS statistics_run FROM feature_statistics WHERE run = ? ORDER BY key", [run]
        )

    def baseline_means(self, run: str, site: str, dictionary: str | None = None, *, model: str | None = None) -> NodeBaseline:
        """Means and standard deviations of a site's nodes over the corpus of a run over activations.

        Where `dictionary` (an id) or `model` (a key) is given, a run that measured another one is refused.
        """
        record = self._done(run, site)
        measured = record.site(site).dictionary
        if dictionary is not None and dictionary != measured:
            raise UserError(f"statistics run {run} measured dictionary {measured} at {site}, not {dictionary}: measure that one first")
        if model is not None and model != record.model:
            raise UserError(f"statistics run {run} measured model {record.model}, not {model}: measure that one first")
        if record.basis != "activation":
            raise UserError(f"statistics run {run} is over {record.basis}s: baselines come from a run over activations")
        shape = record.site(site)
        moments = self.query(
            "SELECT mean, sqrt(variance) AS std FROM feature_statistics WHERE run = ? AND site = ? AND feature >= 0 ORDER BY feature", [run, site]
        )
        errors = self.query("SELECT position, mean, variance FROM error_means WHERE run = ? AND site = ? ORDER BY position", [run, site])
        overall = errors.row(0, named=True)
        features, error = moments["mean"].to_numpy(), np.array(overall["mean"])
        by_position = self._position_means(run, shape, errors[1:], features, error) if len(errors) > 1 else (None, None)
        return NodeBaseline(features, moments["std"].to_numpy(), error, np.sqrt(np.array(overall["variance"])), *by_position)

    def _position_means(
        self, run: str, shape: SiteRecord, errors: pl.DataFrame, features: FloatArray, error: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Means per position (pos, d_sae) and (pos, d_in); positions that were not measured take the overall means."""
        measured = errors["position"].to_numpy()
        length = int(measured[-1]) + 1
        position_features, position_errors = np.tile(features, (length, 1)), np.tile(error, (length, 1))
        position_features[measured] = 0.0
        means = self.query("SELECT position, feature, mean FROM node_means WHERE run = ? AND site = ?", [run, shape.site])
        position_features[means["position"].to_numpy(), means["feature"].to_numpy()] = means["mean"].to_numpy()
        position_errors[measured] = np.array(errors["mean"].to_list())
        return position_features, position_errors

    def covariance(self, run: str, site: str) -> tuple[NDArray[np.int64], FloatArray]:
        """(live, covariance): the live features of a site (n,), ascending, and their population covariance (n, n).

        It is E[x_i·x_j] − E[x_i]·E[x_j] in float64: exact enough while |mean| is below about 1e5 standard deviations.
        Raises `UserError` where the run kept no second moments.
        """
        record = self._done(run, site)
        live = self.query("SELECT feature, mean FROM feature_statistics WHERE run = ? AND site = ? AND live ORDER BY feature", [run, site])
        if live.is_empty():
            raise UserError(f"statistics run {run} has no second moments at {site}: measure it with second moments, or lower its minimum frequency")
        features, mean = live["feature"].to_numpy().astype(np.int64), live["mean"].to_numpy()
        sums = self.query("SELECT feature_i, feature_j, sum_product FROM second_moments WHERE run = ? AND site = ?", [run, site])
        product = np.zeros((len(features), len(features)))
        i, j = (np.searchsorted(features, sums[column].to_numpy()) for column in ("feature_i", "feature_j"))
        product[i, j] = product[j, i] = sums["sum_product"].to_numpy()
        return features, product / record.tokens - np.outer(mean, mean)

    def correlation(self, run: str, site: str) -> tuple[NDArray[np.int64], FloatArray]:
        """(live, correlation) as `covariance`; a constant feature correlates 0 with all others and 1 with itself."""
        features, covariance = self.covariance(run, site)
        variance = np.clip(np.diag(covariance), 0.0, None)
        scale = np.sqrt(np.outer(variance, variance))
        correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
        np.fill_diagonal(correlation, 1.0)
        return features, np.clip(correlation, -1.0, 1.0)

    # -- scores ----------------------------------------------------------------------------------------------

    def write_scores(self, scores: pl.DataFrame) -> None:
        """Add metric values per sequence (columns `SCORE_IDENTITY` and `value`); the last value of a score wins."""
        rows = scores.unique(subset=SCORE_IDENTITY, keep="last", maintain_order=True).select(*SCORE_IDENTITY, "value")
        if rows.is_empty():
            return
        same = " AND ".join(f"scores.{name} = incoming.{name}" for name in SCORE_IDENTITY)
        with self.transaction():
            self._connection.register("incoming", rows.to_arrow())
            try:
                self._run(f"DELETE FROM scores USING incoming WHERE {same}")
                self._run("INSERT INTO scores BY NAME SELECT * FROM incoming")
            finally:
                self._connection.unregister("incoming")

    def scores(self, run: str, subject: str | None = None) -> pl.DataFrame:
        """Metric values of a run, or of one subject of it, ordered by identity."""
        order = ", ".join(SCORE_IDENTITY)
        return self.query(
            f"SELECT * FROM scores WHERE run = $run AND ($subject IS NULL OR subject = $subject) ORDER BY {order}", {"run": run, "subject": subject}
        )


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _file(path: Path, read_only: bool) -> Path:
    if path.is_file() or path.suffix == Path(FILE_NAME).suffix:
        return path
    if not read_only:
        path.mkdir(parents=True, exist_ok=True)
    return path / FILE_NAME


def _connect(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    if read_only and not path.exists():
        raise NotAStatisticsStore(f"no statistics store at {path}: `featlas ingest statistics` makes one")
    if not path.parent.is_dir():
        raise NotAStatisticsStore(f"folder {path.parent} for {path.name} does not exist: create it, or choose another atlas by --atlas")
    try:
        return duckdb.connect(path, read_only=read_only)
    except duckdb.IOException as error:
        message = str(error).splitlines()[0]
        if "lock" in message.lower():
            raise StatisticsStoreHeld(f"another process holds {path}: wait until it ends, or choose another atlas by --atlas ({message})") from error
        raise NotAStatisticsStore(f"{path} cannot be opened as a statistics store ({message}): choose another atlas by --atlas") from error
    except duckdb.ConnectionException as error:
        raise StatisticsStoreHeld(f"{path} is open in this process in another mode: close it first ({str(error).splitlines()[0]})") from error
