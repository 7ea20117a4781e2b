"""The statistics store: what was measured about each node over a corpus, in one DuckDB file.

Its tables and what their columns mean stand in `statistics_0001.sql` and the numbered files after it, the migrations:
1. A file that lacks some of them gets those in one transaction, also when it is opened for reading; one that has more comes from a newer
   featlas and is refused.
2. A run that is going on keeps its running state beside its count of sequences, written in one transaction, so that a
   killed run resumes there. When it is done, its tables are written and the state dropped, again in one transaction.
3. Frames go in and out as polars, over Arrow. One process at a time may hold the file.
"""

import fcntl
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..files import DiskFull, is_full, on_disk
from . import holders

log = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]

FILE_NAME = "statistics.duckdb"
"""The store's file in an atlas."""

HEADER_BYTES = 3 * 4096
"""What DuckDB writes when it makes a file, before anything else."""

ERROR = -1
"""The number of the error node in `feature` columns."""

RESULT_TABLES = (
    "feature_statistics", "contexts", "second_moments", "node_means", "error_means", "live_nodes", "run_lags", "site_pairs", "second_moments_between",
)  # fmt: skip
"""The tables that a run fills when it is done."""

DERIVED_TABLES = ("correlations", "correlation_tests")
"""The tables that a test of a done run fills, as often as it is repeated."""

LARGEST_R = 1 - 1e-7
"""A correlation's magnitude is clipped to this before its Fisher weight is taken."""

SCORE_IDENTITY = ("run", "subject", "method", "ablation", "part", "size", "draw", "metric", "baseline", "split", "sequence")
"""What makes a score the same score; a later value replaces an earlier one."""

SCORE_COLUMNS = (*SCORE_IDENTITY, "task", "value", "full_value", "empty_value")
"""The columns of `scores`."""

SIZE_IDENTITY = ("run", "subject", "method", "ablation", "baseline", "size", "draw")
"""What makes a circuit of a sweep the same circuit."""

SIZE_COLUMNS = (*SIZE_IDENTITY, "n_nodes", "n_edges", "average_degree", "density", "threshold", "circuit")
"""The columns of `score_sizes`."""

EFFECT_IDENTITY = ("run", "circuit", "source", "target", "metric", "baseline", "split", "draw", "sequence")
"""What makes an effect of a single edge or node the same effect."""

EFFECT_COLUMNS = (*EFFECT_IDENTITY, "task", "effect")
"""The columns of `ablation_effects`."""


_BROKEN = (duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException, duckdb.IOException)
_DAMAGED = "bring back a copy, or move the file away and measure again; labels are in it too (`featlas labels export` saves them)"


class NotAStatisticsStore(UserError):
    """The file cannot be opened as a statistics store."""


class StatisticsDamaged(FeatlasError):
    """The file holds what DuckDB did not write there."""


class NewerStatisticsStore(UserError):
    """The file was written by a newer featlas."""


class OlderStatisticsStore(UserError):
    """The file needs a migration, was opened for reading, and cannot be written to."""


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


@dataclass(frozen=True)
class LiveNodes:
    """The nodes of one site that take part in second moments, by feature, the error node (`ERROR`) first where it is asked for.

    features: (n,). mean, shift: (n,); the mean is of x − shift. variance: (n,), 0 where the node is constant. skewness: (n,).
    autocorrelation: (n, n_lags). The last two are empty in runs of an older featlas.
    """

    site: str
    features: NDArray[np.int64]
    shift: FloatArray
    mean: FloatArray
    variance: FloatArray
    skewness: FloatArray
    autocorrelation: FloatArray

    @property
    def varied(self) -> NDArray[np.bool_]:
        """Which of them have a correlation at all, (n,)."""
        return self.variance > 0

    def part(self, start: int, stop: int) -> "LiveNodes":
        """The nodes from `start` on, before `stop`."""
        return LiveNodes(self.site, *(getattr(self, name)[start:stop] for name in list(self.__dataclass_fields__)[1:]))


def fisher_weights(r: FloatArray) -> FloatArray:
    """2·artanh(r), |r| clipped to `LARGEST_R`."""
    return 2.0 * np.arctanh(np.clip(r, -LARGEST_R, LARGEST_R))


def _scaled(covariance: FloatArray, variance_i: FloatArray, variance_j: FloatArray) -> FloatArray:
    """Correlations; 0 where one of the two is constant."""
    scale = np.sqrt(np.outer(variance_i, variance_j))
    return np.clip(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0), -1.0, 1.0)


CONFINED: Mapping[str, str | bool | int | float | list[str]] = {"enable_external_access": False, "lock_configuration": True}
"""How every handle is opened: a file from somebody else may hold views that would read other files, or fetch and load an extension."""


class StatisticsStore:
    """Opens, or creates, a statistics store; a context manager. `path` is its file (`*.duckdb`), or the folder of an atlas, which is made.

    While another process holds the file, `wait_s` seconds (`holders.patience()`) are waited for it. `beside` are files that may be attached to it,
    no others may. Raises `NotAStatisticsStore`, `NewerStatisticsStore`, `OlderStatisticsStore` (read_only) and `StatisticsStoreHeld`.
    """

    def __init__(
        self, path: str | Path, *, read_only: bool = False, steps: Sequence[Migration] | None = None, wait_s: float | None = None,
        beside: Sequence[Path] = (),
    ) -> None:
        self.path = _file(Path(path), read_only)
        self._connection = _connect(self.path, read_only, wait_s, beside)
        try:
            self._migrate(tuple(steps) if steps is not None else migrations(), read_only)
        except BaseException as error:
            self.close()
            if isinstance(error, duckdb.IOException | duckdb.FatalException | duckdb.InternalException):
                raise NotAStatisticsStore(
                    f"{self.path} is damaged ({str(error).splitlines()[0]}): put a copy of it in its place (`featlas atlas copy` makes them),"
                    " or move it away and measure again"
                ) from error
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
            self._migrate_by_writing(steps, f"{self.path} has layout {version}, this featlas uses {known}")
            return
        with self.transaction():
            self._run("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, name VARCHAR NOT NULL, applied TIMESTAMP NOT NULL)")
            for step in steps[version:]:
                for statement in self._connection.extract_statements(step.sql):
                    self._run(statement)
                self._run("INSERT INTO migrations VALUES (?, ?, ?)", [step.version, step.name, _now()])

    def _migrate_by_writing(self, steps: tuple[Migration, ...], reason: str) -> None:
        """Let go of the file that was opened for reading, migrate it, and read on."""
        self.close()
        try:
            StatisticsStore(self.path, steps=steps).close()
        except FeatlasError as error:
            raise OlderStatisticsStore(f"{reason}, and it cannot be migrated now: {error}") from error
        self._connection = _connect(self.path, read_only=True)

    # -- SQL -------------------------------------------------------------------------------------------------

    def _fetch(self, sql: Any, parameters: object = None) -> list[tuple[Any, ...]]:
        with self._readable():
            return self._connection.execute(sql, parameters).fetchall()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """A full disk and a damaged file are said as such; what is wrong with a statement stays DuckDB's own error."""
        try:
            with on_disk(self.path):
                yield
        except duckdb.Error as error:
            if type(error) is not duckdb.Error and not isinstance(error, _BROKEN):
                raise
            raise StatisticsDamaged(f"{self.path} is damaged ({str(error).splitlines()[0][:200]}): {_DAMAGED}") from error

    def _run(self, sql: Any, parameters: object = None) -> None:
        # A connection is busy until its result is fetched to the end.
        self._fetch(sql, parameters)

    def query(self, sql: str, parameters: object = None) -> pl.DataFrame:
        """The answer to one SELECT with its parameters (`?` and a list, or `$name` and a mapping)."""
        with self._readable():
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
        with on_disk(self.path):
            self._connection.commit()

    def _insert(self, table: str, frame: pl.DataFrame) -> None:
        """Append rows; `table` is always one of this module's own names."""
        if frame.is_empty():
            return
        self._connection.register("incoming", frame.to_arrow())
        try:
            self._run(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
        finally:
            with suppress(duckdb.Error):  # refused in a transaction that has failed: the first error is what counts
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

    def finish_run(self, run: str, sequences: int, tokens: int, results: Mapping[str, Iterable[pl.DataFrame]]) -> None:
        """In one transaction: the results (table name → frames without the column `run`, taken one by one), and that the run is done."""
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
            for table in (*RESULT_TABLES, *DERIVED_TABLES, "scores", "run_state", "run_sites", "runs"):
                self._run(f"DELETE FROM {table} WHERE run = ?", [run])
        shutil.rmtree(self.parts(run), ignore_errors=True)

    def parts(self, run: str) -> Path:
        """Where a run that is going on keeps what is too large for its state; gone when it is done."""
        return parts_folder(self.path, run)

    def find_run(self, name: str | None = None) -> RunRecord:
        """The run whose key begins with `name`, or the one that was done last. Raises `NoSuchRun`."""
        rows = self._fetch("SELECT run, corpus, basis FROM runs ORDER BY finished DESC NULLS LAST, started, run")
        fitting = [run for run, _, _ in rows if run.startswith(name)] if name is not None else [run for run, _, _ in rows[:1]]
        known = ", ".join(f"{run} ({basis}s of {corpus})" for run, corpus, basis in rows) or "none: `featlas ingest statistics` makes one"
        if not fitting:
            raise NoSuchRun(f"no statistics run{f' {name!r}' if name else ''} in {self.path}: it has {known}")
        if len(fitting) > 1:
            raise NoSuchRun(f"statistics run {name!r} is not unique: there are {known}")
        return self.run(fitting[0])

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

    def live_nodes(self, run: str, site: str, *, errors: bool = False) -> LiveNodes:
        """The live features of a site, ascending, with the error node before them where `errors` asks for it.

        Raises `UserError` where the run kept no second moments.
        """
        self._done(run, site)
        rows = self.query("SELECT * FROM live_nodes WHERE run = ? AND site = ? AND (feature >= 0 OR ?) ORDER BY feature", [run, site, errors])
        if rows.is_empty():
            rows = self.query(
                "SELECT feature, 0.0::DOUBLE AS shift, mean, variance FROM feature_statistics WHERE run = ? AND site = ? AND live ORDER BY feature",
                [run, site],
            )
        if rows.is_empty():
            raise UserError(f"statistics run {run} has no second moments at {site}: measure it with second moments, or lower its minimum frequency")
        column = lambda name: rows[name].to_numpy().astype(np.float64) if name in rows.columns else np.zeros(0)
        lags = np.array(rows["autocorrelation"].to_list()).reshape(len(rows), -1) if "autocorrelation" in rows.columns else np.zeros((len(rows), 0))
        features = rows["feature"].to_numpy().astype(np.int64)
        return LiveNodes(site, features, column("shift"), column("mean"), column("variance"), column("skewness"), lags)

    def lags(self, run: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(lag, rows): the distances of the autocorrelations, and how many pairs of tokens are so far apart."""
        rows = self.query("SELECT lag, rows FROM run_lags WHERE run = ? ORDER BY lag", [run])
        return rows["lag"].to_numpy().astype(np.int64), rows["rows"].to_numpy().astype(np.int64)

    def site_pairs(self, run: str) -> list[tuple[str, str]]:
        """The pairs of sites, within and between, whose products a run kept."""
        self._done(run)
        return self._fetch("SELECT site_i, site_j FROM site_pairs WHERE run = ? ORDER BY ordinal", [run])

    def covariance_rows(self, run: str, first: LiveNodes, second: LiveNodes) -> FloatArray:
        """Population covariances of the nodes of `first` with those of `second`, (n_first, n_second).

        The nodes are those of a pair of sites as `site_pairs` gives it, `first` being a part of them where all are too many at once.
        Within a site only entries with feature_i <= feature_j are filled.
        """
        low, high = int(first.features[0]), int(first.features[-1])
        if first.site == second.site:
            rows = self.query(
                "SELECT feature_i, feature_j, sum_product FROM second_moments WHERE run = ? AND site = ? AND feature_i BETWEEN ? AND ?",
                [run, first.site, low, high],
            )
        else:
            rows = self.query(
                "SELECT feature_i, feature_j, sum_product FROM second_moments_between"
                " WHERE run = ? AND site_i = ? AND site_j = ? AND feature_i BETWEEN ? AND ?",
                [run, first.site, second.site, low, high],
            )
        rows = rows.filter(pl.col("feature_j") >= int(second.features[0]))  # without the error node where it is not asked for
        product = np.zeros((len(first.features), len(second.features)))
        i, j = (np.searchsorted(nodes.features, rows[name].to_numpy()) for nodes, name in ((first, "feature_i"), (second, "feature_j")))
        product[i, j] = rows["sum_product"].to_numpy()
        product /= self.run(run).tokens
        product -= np.outer(first.mean, second.mean)
        return product

    def covariance(self, run: str, site: str, *, errors: bool = False) -> tuple[NDArray[np.int64], FloatArray]:
        """(live, covariance): the live features of a site (n,), ascending, and their population covariance (n, n), dense.

        With `errors` the error node comes first. It is from sums of (x_i − shift_i)(x_j − shift_j) in float64, exact to rounding.
        Raises `UserError` where the run kept no second moments.
        """
        nodes = self.live_nodes(run, site, errors=errors)
        upper = np.triu(self.covariance_rows(run, nodes, nodes))
        return nodes.features, upper + np.triu(upper, 1).T

    def correlation(self, run: str, site: str, *, errors: bool = False) -> tuple[NDArray[np.int64], FloatArray]:
        """(live, correlation) as `covariance`; a constant feature correlates 0 with all others and 1 with itself."""
        nodes = self.live_nodes(run, site, errors=errors)
        features, covariance = self.covariance(run, site, errors=errors)
        correlation = _scaled(covariance, nodes.variance, nodes.variance)
        np.fill_diagonal(correlation, 1.0)
        return features, correlation

    def covariance_between(
        self, run: str, site_i: str, site_j: str, *, errors: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
        """(live_i, live_j, covariance): the live features of two sites and their population covariances (n_i, n_j), dense.

        Raises `UserError` where the run did not measure this pair of sites.
        """
        first, second = (self.live_nodes(run, site, errors=errors) for site in (site_i, site_j))
        pairs = self.site_pairs(run)
        if (site_i, site_j) in pairs:
            return first.features, second.features, self.covariance_rows(run, first, second)
        if (site_j, site_i) in pairs:
            return first.features, second.features, self.covariance_rows(run, second, first).T
        raise UserError(f"statistics run {run} has no products of {site_i} with {site_j}: measure it with `--between all`")

    def correlation_between(
        self, run: str, site_i: str, site_j: str, *, errors: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
        """(live_i, live_j, correlation) as `covariance_between`; a constant feature correlates 0 with all others."""
        live_i, live_j, covariance = self.covariance_between(run, site_i, site_j, errors=errors)
        first, second = (self.live_nodes(run, site, errors=errors) for site in (site_i, site_j))
        return live_i, live_j, _scaled(covariance, first.variance, second.variance)

    def write_correlations(self, run: str, found: Iterable[pl.DataFrame], tests: Callable[[], pl.DataFrame]) -> None:
        """In one transaction: a run's significant correlations (site_i, feature_i, site_j, feature_j, r, p) in place of those of an earlier test.

        `tests` is asked for the rows of `correlation_tests` (without run and time) after the last frame.
        """
        self._done(run)
        with self.transaction():
            for table in DERIVED_TABLES:
                self._run(f"DELETE FROM {table} WHERE run = ?", [run])
            for frame in found:
                fisher = pl.Series("fisher", fisher_weights(frame["r"].to_numpy()))
                self._insert("correlations", frame.with_columns(pl.lit(run).alias("run"), fisher))
            self._insert("correlation_tests", tests().with_columns(pl.lit(run).alias("run"), pl.lit(_now()).alias("finished")))

    def correlation_tests(self, run: str) -> pl.DataFrame:
        """The last test of a run, one row per pair of sites; empty where there was none."""
        return self.query("SELECT * FROM correlation_tests WHERE run = ? ORDER BY ordinal", [run])

    def correlations(self, run: str, *, limit: int | None = None) -> pl.DataFrame:
        """The significant correlations, strongest first: key_i, key_j, site_i, feature_i, site_j, feature_j, r, fisher, p."""
        self._done(run)
        return self.query(
            "SELECT a.key AS key_i, b.key AS key_j, c.site_i, c.feature_i, c.site_j, c.feature_j, c.r, c.fisher, c.p FROM correlations c"
            " JOIN feature_statistics a ON a.run = c.run AND a.site = c.site_i AND a.feature = c.feature_i"
            " JOIN feature_statistics b ON b.run = c.run AND b.site = c.site_j AND b.feature = c.feature_j"
            " WHERE c.run = ? ORDER BY abs(c.r) DESC, key_i, key_j LIMIT ?",
            [run, limit],
        )

    # -- rows of other modules of queries --------------------------------------------------------------------

    def rewrite(self, column: str, value: str, frames: Mapping[str, pl.DataFrame]) -> None:
        """In one transaction: the rows of each table whose `column` is `value` are replaced by its frame, which gets the column.

        Tables and column are always names from the package's own layout, never a user's text.
        """
        with self.transaction():
            for table, frame in frames.items():
                self._run(f"DELETE FROM {table} WHERE {column} = ?", [value])
                self._insert(table, frame.with_columns(pl.lit(value).alias(column)))

    def replace(self, table: str, rows: pl.DataFrame, identity: Sequence[str]) -> None:
        """In one transaction: rows added in place of those of the same identity; names as in `rewrite`."""
        with self.transaction():
            self._replace(table, rows, identity)

    @staticmethod
    def now() -> datetime:
        """The time as it is kept here: UTC without a zone."""
        return _now()

    # -- scores ----------------------------------------------------------------------------------------------

    def write_scores(self, scores: pl.DataFrame, sizes: pl.DataFrame | None = None) -> None:
        """Add metric values per sequence (`SCORE_COLUMNS`) and the sizes of their circuits (`SIZE_COLUMNS`); the last of one identity wins."""
        with self.transaction():
            self._replace("scores", scores.select(SCORE_COLUMNS), SCORE_IDENTITY)
            if sizes is not None:
                self._replace("score_sizes", sizes.select(SIZE_COLUMNS), SIZE_IDENTITY)

    def scores(self, run: str, subject: str | None = None) -> pl.DataFrame:
        """Metric values of a run, or of one subject of it, ordered by identity."""
        return self._of_run("scores", SCORE_COLUMNS, SCORE_IDENTITY, run, {"subject": subject})

    def score_sizes(self, run: str, subject: str | None = None) -> pl.DataFrame:
        """The sizes of the circuits of a run's sweeps, or of one subject's, ordered by identity."""
        return self._of_run("score_sizes", SIZE_COLUMNS, SIZE_IDENTITY, run, {"subject": subject})

    def write_effects(self, effects: pl.DataFrame) -> None:
        """Add effects of single edges and nodes per sequence (`EFFECT_COLUMNS`); the last value of one identity wins."""
        with self.transaction():
            self._replace("ablation_effects", effects.select(EFFECT_COLUMNS), EFFECT_IDENTITY)

    def effects(self, run: str, circuit: str | None = None) -> pl.DataFrame:
        """Effects measured for a run, or those in one circuit (empty text: in the whole model), ordered by identity."""
        return self._of_run("ablation_effects", EFFECT_COLUMNS, EFFECT_IDENTITY, run, {"circuit": circuit})

    def _replace(self, table: str, rows: pl.DataFrame, identity: Sequence[str]) -> None:
        """Add rows in place of those of the same identity, the last of several; `table` is always one of this module's own names."""
        rows = rows.unique(subset=identity, keep="last", maintain_order=True)
        if rows.is_empty():
            return
        same = " AND ".join(f"{table}.{name} = incoming.{name}" for name in identity)
        self._connection.register("incoming", rows.to_arrow())
        try:
            self._run(f"DELETE FROM {table} USING incoming WHERE {same}")
            self._run(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
        finally:
            self._connection.unregister("incoming")

    def _of_run(self, table: str, columns: Sequence[str], order: Sequence[str], run: str, only: Mapping[str, str | None]) -> pl.DataFrame:
        """A run's rows of a table of this module's own, of which `only` some; a condition that is None is none."""
        where = " AND ".join(["run = $run", *(f"(${name} IS NULL OR {name} = ${name})" for name in only)])
        return self.query(f"SELECT {', '.join(columns)} FROM {table} WHERE {where} ORDER BY {', '.join(order)}", {"run": run, **only})


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def parts_folder(path: Path, run: str) -> Path:
    """`StatisticsStore.parts` of a store that is not open; `path` is its file, or the folder of an atlas."""
    file = path if path.suffix == Path(FILE_NAME).suffix else path / FILE_NAME
    return file.parent / f"{file.stem}.parts" / run


def _file(path: Path, read_only: bool) -> Path:
    if path.is_file() or path.suffix == Path(FILE_NAME).suffix:
        return path
    if not read_only:
        path.mkdir(parents=True, exist_ok=True)
    return path / FILE_NAME


def _unfinished(path: Path) -> bool:
    """Whether the making of a file was cut off before its first `HEADER_BYTES` stood: it can hold nothing, and no other process holds it."""
    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            begun = file.read(HEADER_BYTES)
        ours = begun[8:12] == b"DUCK" or not any(begun)  # never a file of somebody else's
        return ours and len(begun) < HEADER_BYTES and not path.with_name(path.name + ".wal").exists()
    except OSError:
        return False


def _beside(connection: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> duckdb.DuckDBPyConnection:
    """A handle that may attach these files, with their logs, and is confined as every other."""
    allowed = ", ".join("'" + str(file).replace("'", "''") + end for file in files for end in ("'", ".wal'", ".wal.checkpoint'", ".wal.recovery'"))
    connection.execute(f"SET allowed_paths = [{allowed}]")
    for name, value in CONFINED.items():
        connection.execute(f"SET {name} = {value!r}")
    return connection


def _connect(path: Path, read_only: bool, wait_s: float | None = None, beside: Sequence[Path] = ()) -> duckdb.DuckDBPyConnection:
    if read_only and not path.exists():
        raise NotAStatisticsStore(f"no statistics store at {path}: `featlas ingest statistics` makes one")
    if not path.parent.is_dir():
        raise NotAStatisticsStore(f"folder {path.parent} for {path.name} does not exist: create it, or choose another atlas by --atlas")
    wait_s = holders.patience() if wait_s is None else wait_s
    until = time.monotonic() + wait_s
    while True:
        try:
            return _beside(duckdb.connect(path), beside) if beside else duckdb.connect(path, read_only=read_only, config=dict(CONFINED))
        except duckdb.IOException as error:
            if is_full(error):
                raise DiskFull(path) from error
            message = str(error).splitlines()[0]
            if not read_only and _unfinished(path):
                log.warning("%s was cut off when it was made, and is made anew", path)
                path.unlink()
                continue
            if "lock" not in message.lower():
                raise NotAStatisticsStore(f"{path} cannot be opened as a statistics store ({message}): choose another atlas by --atlas") from error
            if time.monotonic() >= until:
                by = re.search(r"\bPID (\d+)", message)
                who = holders.held_by(int(by[1]) if by else None)
                raise StatisticsStoreHeld(f"{path} is held by {who}: {holders.way_out(wait_s)}, or choose another atlas by --atlas") from error
        except duckdb.Error as error:
            if not isinstance(error, duckdb.ConnectionException):
                raise NotAStatisticsStore(f"{path} is damaged ({str(error).splitlines()[0][:200]}): {_DAMAGED}") from error
            raise StatisticsStoreHeld(f"{path} is open in this process in another mode: close it first ({str(error).splitlines()[0]})") from error
        time.sleep(0.05)
