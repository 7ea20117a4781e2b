"""The statistics store: layout and migrations, runs and their state, results, scores, and who may hold the file."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import duckdb
import numpy as np
import polars as pl
import pytest
from featlas.errors import UserError
from featlas.queries.statistics import (
    DERIVED_TABLES,
    ERROR,
    RESULT_TABLES,
    SCORE_IDENTITY,
    Migration,
    NewerStatisticsStore,
    NoSuchRun,
    NotAStatisticsStore,
    OlderStatisticsStore,
    RunNotDone,
    RunRecord,
    SiteRecord,
    StatisticsStore,
    StatisticsStoreHeld,
    migrations,
)

RUN = RunRecord(
    run="r1", model="tiny@0", corpus="text.txt", corpus_hash="c0", basis="activation", sites=(SiteRecord("resid_1", 1, "dict", 2, 3),),
    total_sequences=4, arguments={"length": 8}, version="0.1.0",
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "statistics.duckdb"


@pytest.fixture
def store(path):
    with StatisticsStore(path) as opened:
        yield opened


def results(site: str = "resid_1") -> dict[str, list[pl.DataFrame]]:
    """Two tokens, three features: x = (1, 0, 3) and (3, 0, 1); features 0 and 2 are live; errors (1, 0) and (3, 0)."""
    base = {"site": site, "layer": 1, "live": False, "mean_active": 0.0, "mean_magnitude": 0.0, "minimum": 0.0}
    row = lambda feature, kind, count, mean, variance: {
        **base, "feature": feature, "kind": kind, "key": f"k{feature}", "count": count, "frequency": count / 2, "mean": mean,
        "variance": variance, "maximum": 3.0, "live": feature in (0, 2),
    }  # fmt: skip
    statistics = [row(0, "feature", 2, 2.0, 1.0), row(1, "feature", 0, 0.0, 0.0), row(2, "feature", 2, 2.0, 1.0), row(ERROR, "error", 2, 2.0, 1.0)]
    context = {
        "site": site, "feature": 0, "rank": 0, "value": 3.0, "sequence": 1, "sequence_key": "pair", "position": 2,
        "token_ids": [5, 6], "before": [" a"], "token": " b", "after": [],
    }  # fmt: skip
    products = {"site": site, "feature_i": [0, 0, 2], "feature_j": [0, 2, 2], "sum_product": [10.0, 6.0, 10.0]}
    errors = {"site": site, "position": [-1, 1], "tokens": [2, 2], "mean": [[2.0, 0.0], [2.0, 0.5]], "variance": [[1.0, 0.0], []]}
    means = {"site": site, "position": [1, 1], "feature": [0, 2], "mean": [2.0, 2.5]}
    live = {
        "site": site, "feature": [0, 2], "shift": 0.0, "mean": [2.0, 2.0], "variance": [1.0, 1.0], "skewness": 0.0, "autocorrelation": [[0.5], [0.0]],
    }  # fmt: skip
    between = {"site_i": site, "site_j": "other", "feature_i": [0], "feature_j": [7], "sum_product": [1.5]}
    frames = {
        "feature_statistics": statistics, "contexts": [context], "second_moments": products, "error_means": errors, "node_means": means,
        "live_nodes": live, "run_lags": {"lag": [1], "rows": [1]}, "site_pairs": {"ordinal": [0], "site_i": [site], "site_j": [site]},
        "second_moments_between": between,
    }  # fmt: skip
    schema = {"contexts": {"after": pl.List(pl.String)}}
    return {table: [pl.DataFrame(rows, schema_overrides=schema.get(table))] for table, rows in frames.items()}


def finished(store: StatisticsStore) -> str:
    store.start_run(RUN)
    store.finish_run(RUN.run, sequences=4, tokens=2, results=results())
    return RUN.run


# -- layout --------------------------------------------------------------------------------------------------


def test_a_new_file_has_every_table_and_the_latest_version(store):
    tables = {name for (name,) in store._fetch("SELECT table_name FROM duckdb_tables()")}
    assert tables >= {*RESULT_TABLES, *DERIVED_TABLES, "runs", "run_sites", "run_state", "scores", "score_sizes", "ablation_effects", "migrations"}
    assert store.version == len(migrations()) == migrations()[-1].version
    assert [step.version for step in migrations()] == list(range(1, len(migrations()) + 1))


def test_an_atlas_folder_names_its_file(tmp_path):
    atlas = tmp_path / "new" / "atlas"
    with pytest.raises(NotAStatisticsStore, match=r"no statistics store at .*atlas/statistics\.duckdb"):
        StatisticsStore(atlas, read_only=True)
    with StatisticsStore(atlas) as store:
        assert store.path == atlas / "statistics.duckdb"
    assert StatisticsStore(str(atlas), read_only=True).path == store.path


def test_opening_again_changes_nothing(path):
    with StatisticsStore(path) as store:
        run = finished(store)
        before = store.query("SELECT * FROM migrations")
    with StatisticsStore(path, read_only=True) as store:
        assert store.query("SELECT * FROM migrations").equals(before)
        assert store.run(run).status == "done"


def test_an_old_file_is_migrated_and_keeps_its_rows(path):
    steps = (Migration(1, "first", "CREATE TABLE a (x INTEGER); INSERT INTO a VALUES (7);"),)
    StatisticsStore(path, steps=steps).close()
    later = (*steps, Migration(2, "second", "ALTER TABLE a ADD COLUMN y INTEGER DEFAULT 3;"), Migration(3, "third", "UPDATE a SET y = y + x;"))
    with StatisticsStore(path, read_only=True, steps=later) as store:
        assert store.version == 3
        assert store.query("SELECT x, y FROM a").rows() == [(7, 10)]
        assert store.query("SELECT version, name FROM migrations ORDER BY version").rows() == [(1, "first"), (2, "second"), (3, "third")]


def test_an_old_file_that_others_are_reading_is_not_migrated_under_them(path):
    steps = (Migration(1, "first", "CREATE TABLE a (x INTEGER);"),)
    StatisticsStore(path, steps=steps).close()
    later = (*steps, Migration(2, "second", "ALTER TABLE a ADD COLUMN y INTEGER;"))
    with StatisticsStore(path, read_only=True, steps=steps) as reader:
        with pytest.raises(OlderStatisticsStore, match=r"layout 1, this featlas uses 2, and it cannot be migrated now: .* open in this process"):
            StatisticsStore(path, read_only=True, steps=later)
        assert reader.version == 1
    with StatisticsStore(path, read_only=True, steps=later) as store:
        assert store.version == 2


def test_a_migration_that_fails_leaves_the_old_file(path):
    steps = (Migration(1, "first", "CREATE TABLE a (x INTEGER)"),)
    StatisticsStore(path, steps=steps).close()
    broken = (*steps, Migration(2, "second", "ALTER TABLE a ADD COLUMN y INTEGER"), Migration(3, "third", "SELECT * FROM missing"))
    with pytest.raises(duckdb.CatalogException):
        StatisticsStore(path, steps=broken)
    with StatisticsStore(path, steps=steps) as store:
        assert store.version == 1
        assert store.query("SELECT * FROM a").columns == ["x"]


def test_a_newer_file_is_refused_with_both_versions(path):
    with StatisticsStore(path) as store:
        store._run("INSERT INTO migrations VALUES (99, 'later', now()::TIMESTAMP)")
    with pytest.raises(NewerStatisticsStore, match=rf"layout 99.*up to {len(migrations())}: upgrade featlas.*--atlas") as error:
        StatisticsStore(path)
    assert error.value.exit_code == 2


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "notes.duckdb"
    text.write_text("not a database\n" * 1000)
    with pytest.raises(NotAStatisticsStore, match=r"notes.duckdb"):
        StatisticsStore(text)
    other = tmp_path / "other.duckdb"
    with duckdb.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x INTEGER)")
    with pytest.raises(NotAStatisticsStore, match="something else"):
        StatisticsStore(other)
    with pytest.raises(NotAStatisticsStore, match="does not exist"):
        StatisticsStore(tmp_path / "no" / "such" / "s.duckdb")
    with pytest.raises(NotAStatisticsStore, match="no statistics store at"):
        StatisticsStore(tmp_path / "none.duckdb", read_only=True)


@pytest.mark.slow
def test_a_file_held_by_another_process_says_so(path, store):
    code = "\n".join(
        (
            "import sys", "from featlas.queries.statistics import StatisticsStore, StatisticsStoreHeld",
            "try: StatisticsStore(sys.argv[1], wait_s=0.1)", "except StatisticsStoreHeld as error: print(error, error.exit_code)",
        )
    )  # fmt: skip
    answer = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    held = rf"\S+ is held by process {os.getpid()} \([^)]+, since [\d:]+\): 0.1 s were waited; wait until it is done \(FEATLAS_WAIT=600 [^)]+\)"
    assert re.fullmatch(rf"{held}, or end it, or choose another atlas by --atlas 1\n", answer), answer
    assert answer.strip().endswith("1")
    with pytest.raises(StatisticsStoreHeld, match="in this process"):
        StatisticsStore(path, read_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_let_go_soon_is_waited_for(tmp_path, read_only):
    code = "\n".join(
        (
            "import sys, time", "from featlas.queries.statistics import StatisticsStore",
            "with StatisticsStore(sys.argv[1]): print(flush=True); time.sleep(0.7)",
        )
    )  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StatisticsStoreHeld):
            StatisticsStore(tmp_path, read_only=read_only, wait_s=0)
        with StatisticsStore(tmp_path, read_only=read_only) as store:
            assert store.version


# -- runs and their state ------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_registered(store):
    assert store.start_run(RUN) == RUN
    assert store.start_run(replace(RUN, corpus="renamed")) == RUN
    assert store.runs()["run"].to_list() == ["r1"]
    with pytest.raises(NoSuchRun, match="'r2'"):
        store.run("r2")


def test_state_and_mark_are_written_together(store):
    store.start_run(RUN)
    store.save_state("r1", 1, 7, {"a": b"\x00\xff", "b": b"one"})
    store.save_state("r1", 2, 14, {"a": b"two"})
    assert store.load_state("r1") == {"a": b"two"}
    assert (store.run("r1").sequences, store.run("r1").tokens) == (2, 14)
    with pytest.raises(duckdb.Error):
        store.save_state("r1", 3, 21, {"a": None})
    assert store.load_state("r1") == {"a": b"two"}
    assert store.run("r1").sequences == 2


def test_results_come_with_the_end_of_the_run(store):
    store.start_run(RUN)
    store.save_state("r1", 1, 1, {"a": b"x"})
    with pytest.raises(RunNotDone, match="1 of 4 sequences"):
        store.feature_statistics("r1")
    with pytest.raises(duckdb.Error):
        store.finish_run("r1", 4, 2, {**results(), "contexts": [pl.DataFrame({"nonsense": [1]})]})
    assert store.run("r1").status == "running"
    assert store.query("SELECT count(*) FROM feature_statistics").item() == 0
    store.finish_run("r1", 4, 2, results())
    assert store.load_state("r1") == {}
    done = store.run("r1")
    assert (done.status, done.sequences, done.tokens) == ("done", 4, 2)
    assert store.feature_statistics("r1")["feature"].to_list() == [-1, 0, 1, 2]


def test_contexts_come_back_with_their_tokens(store):
    row = store.contexts(finished(store), "resid_1", 0).row(0, named=True)
    assert (row["token_ids"], row["before"], row["token"], row["after"]) == ([5, 6], [" a"], " b", [])
    assert store.contexts("r1", "resid_1", 1).is_empty()
    with pytest.raises(NoSuchRun, match="did not measure site 'resid_9': it has resid_1"):
        store.contexts("r1", "resid_9")


def test_properties_for_the_graph(store):
    frame = store.feature_properties(finished(store))
    assert frame.columns == ["key", "frequency", "mean_activation", "statistics_run"]
    assert frame.filter(pl.col("key") == "k0").row(0) == ("k0", 1.0, 2.0, "r1")


def test_baseline_means_and_deviations(store):
    baseline = store.baseline_means(finished(store), "resid_1", "dict", model="tiny@0")
    assert baseline.features.tolist() == [2.0, 0.0, 2.0]
    assert baseline.features_std.tolist() == [1.0, 0.0, 1.0]
    assert baseline.error.tolist() == [2.0, 0.0]
    assert baseline.error_std.tolist() == [1.0, 0.0]
    # Position 0 was not measured: it takes the overall means.
    assert baseline.position_features.tolist() == [[2.0, 0.0, 2.0], [2.0, 0.0, 2.5]]
    assert baseline.position_errors.tolist() == [[2.0, 0.0], [2.0, 0.5]]
    with pytest.raises(UserError, match="measured dictionary dict at resid_1, not other"):
        store.baseline_means("r1", "resid_1", "other")
    with pytest.raises(UserError, match="measured model tiny@0, not big@1"):
        store.baseline_means("r1", "resid_1", model="big@1")


def test_covariance_of_the_live_features(store):
    live, covariance = store.covariance(finished(store), "resid_1")
    # x_0 = (1, 3), x_2 = (3, 1): variances 1, covariance -1.
    assert live.tolist() == [0, 2]
    assert covariance.tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    assert store.correlation("r1", "resid_1")[1].tolist() == [[1.0, -1.0], [-1.0, 1.0]]


def test_attribution_runs_have_no_activations(store):
    store.start_run(replace(RUN, run="r2", basis="attribution"))
    store.finish_run("r2", 4, 2, results())
    for ask in (store.feature_properties, lambda run: store.baseline_means(run, "resid_1")):
        with pytest.raises(UserError, match="is over attributions"):
            ask("r2")


def test_the_latest_run_with_the_dictionaries(store):
    assert store.latest_run("tiny@0", {"resid_1": "dict"}) is None
    finished(store)
    store.start_run(replace(RUN, run="r2"))
    assert store.latest_run("tiny@0", {"resid_1": "dict"}).run == "r1"
    store.finish_run("r2", 4, 2, results())
    assert store.latest_run("tiny@0", {"resid_1": "dict"}).run == "r2"
    assert store.latest_run("tiny@0", {"resid_1": "other"}) is None
    assert store.latest_run("other@0", {}) is None


def test_a_deleted_run_leaves_no_row(store):
    finished(store)
    store.start_run(replace(RUN, run="r2"))
    store.finish_run("r2", 4, 2, results())
    store.delete_run("r1")
    assert store.runs()["run"].to_list() == ["r2"]
    for table in (*RESULT_TABLES, "run_sites"):
        assert store.query(f"SELECT DISTINCT run FROM {table}")["run"].to_list() == ["r2"], table


def test_names_with_quotes_are_only_names(store):
    odd = "r'; DROP TABLE runs; --"
    store.start_run(replace(RUN, run=odd))
    store.finish_run(odd, 4, 2, results())
    assert store.run(odd).status == "done"
    assert len(store.feature_statistics(odd)) == 4
    store.delete_run(odd)
    assert store.runs().is_empty()


# -- scores --------------------------------------------------------------------------------------------------


SCORES = pl.DataFrame(
    {
        "run": "r1", "subject": ["c1", "c1", "c2"], "method": "attribution", "ablation": "node", "part": "circuit", "size": [10, 20, 10], "draw": 0,
        "metric": "logit_diff", "baseline": "zero", "split": "held-out", "sequence": "s1", "task": "ioi", "value": [1.0, 2.0, 3.0], "full_value": 4.0,
        "empty_value": 0.5,
    }
)  # fmt: skip


def test_the_last_value_of_a_score_wins(store):
    store.write_scores(SCORES)
    again = SCORES.filter(pl.col("subject") == "c1").with_columns(value=pl.col("value") + 10)
    store.write_scores(again)
    store.write_scores(again)
    assert store.scores("r1")["value"].to_list() == [11.0, 12.0, 3.0]
    assert store.scores("r1", "c2").rows() == [SCORES.row(2)]
    assert store.scores("r1", "c2").columns == SCORES.columns
    assert store.scores("r0").is_empty()
    store.write_scores(pl.concat([SCORES, SCORES.with_columns(value=pl.col("value") * 2)]))
    assert store.scores("r1")["value"].to_list() == [2.0, 4.0, 6.0]
    store.write_scores(SCORES.head(0))


def test_every_column_of_the_identity_tells_scores_apart(store):
    one = SCORES.head(1)
    others = [
        one.with_columns(pl.lit("other").alias(name) if one.schema[name] == pl.String else pl.lit(99).alias(name))
        for name in SCORE_IDENTITY if name != "run"
    ]
    store.write_scores(pl.concat([one, *(other.cast(dict(one.schema)) for other in others)]))
    assert store.scores("r1").height == 1 + len(others)


def test_a_sweeps_sizes_are_kept_beside_its_scores(store):
    sizes = SCORES.select("run", "subject", "method", "ablation", "baseline", "size", "draw").with_columns(
        n_nodes=pl.Series([5, 8, 5]), n_edges=pl.col("size"), average_degree=2.5, density=0.25, threshold=pl.Series([0.5, None, 0.5]),
        circuit=pl.lit(None),
    )
    store.write_scores(SCORES, sizes)
    store.write_scores(SCORES, sizes.with_columns(n_nodes=pl.col("n_nodes") + 1))
    found = store.score_sizes("r1", "c1")
    assert found["n_nodes"].to_list() == [6, 9]
    assert found["threshold"].to_list() == [0.5, None]
    assert store.score_sizes("r1").height == 3
    store.write_scores(SCORES, sizes.with_columns(baseline=pl.lit("noise"), n_nodes=1))
    of_noise = pl.col("baseline") == "noise"
    assert store.score_sizes("r1", "c1").filter(~of_noise)["n_nodes"].to_list() == [6, 9]
    assert store.score_sizes("r1", "c1").filter(of_noise)["n_nodes"].to_list() == [1, 1]


def test_effects_of_edges_and_nodes_are_told_apart_by_where_they_were_cut(store):
    effects = pl.DataFrame(
        {
            "run": "r1", "circuit": ["", "c1", ""], "source": "a", "target": ["b", "b", ""], "metric": "logit_diff", "baseline": "zero",
            "split": "held-out", "draw": 0, "sequence": "s1", "task": "ioi", "effect": [1.0, 2.0, 3.0],
        }
    )  # fmt: skip
    store.write_effects(effects)
    store.write_effects(effects.with_columns(effect=pl.col("effect") * 10))
    assert store.effects("r1").select("circuit", "target", "effect").rows() == [("", "", 30.0), ("", "b", 10.0), ("c1", "b", 20.0)]
    assert store.effects("r1", "")["effect"].to_list() == [30.0, 10.0]
    assert store.effects("r1", "c1")["effect"].to_list() == [20.0]
    assert store.effects("r2").is_empty()


@pytest.mark.slow
def test_ten_million_products_round_trip(store):
    n = 3200
    i, j = (index.astype(np.int32) for index in np.triu_indices(n))
    frame = pl.DataFrame({"site": pl.repeat("resid_1", len(i), eager=True), "feature_i": i, "feature_j": j, "sum_product": (i + j).astype(float)})
    store.start_run(RUN)
    store.finish_run("r1", 4, 2, {"second_moments": [frame, frame.with_columns(site=pl.lit("resid_2"))]})
    found = store.query("SELECT count(*) AS n, sum(sum_product) AS s FROM second_moments WHERE run = 'r1' AND site = 'resid_2'").row(0)
    assert found == (len(i), float((i.astype(np.int64) + j).sum()))


def test_a_file_of_the_first_layout_keeps_its_covariances(path):
    first = migrations()[:1]
    with StatisticsStore(path, steps=first) as store:
        store.start_run(RUN)
        old = {table: frames for table, frames in results().items() if table in store.query("SELECT table_name FROM duckdb_tables()")["table_name"]}
        assert "second_moments" in old
        assert "live_nodes" not in old
        store.finish_run(RUN.run, sequences=4, tokens=2, results=old)
    with StatisticsStore(path) as store:
        assert store.version == len(migrations())
        assert store.covariance("r1", "resid_1")[1].tolist() == [[1.0, -1.0], [-1.0, 1.0]]
        assert store.live_nodes("r1", "resid_1").shift.tolist() == [0.0, 0.0]
        assert store.site_pairs("r1") == []


def test_runs_are_found_by_the_beginning_of_their_key_or_as_the_last_one_done(store):
    with pytest.raises(NoSuchRun, match="no statistics run in"):
        store.find_run()
    finished(store)
    for run in ("abc1", "abd2"):
        store.start_run(replace(RUN, run=run))
    assert store.find_run().run == "r1"
    assert store.find_run("abc").run == "abc1"
    with pytest.raises(NoSuchRun, match="'ab' is not unique"):
        store.find_run("ab")
    with pytest.raises(NoSuchRun, match=r"'zz' in .* it has r1"):
        store.find_run("zz")


def test_a_deleted_run_leaves_no_files(store):
    finished(store)
    store.parts("r1").mkdir(parents=True)
    (store.parts("r1") / "tile.000000001.npy").write_bytes(b"x")
    store.delete_run("r1")
    assert not store.parts("r1").exists()
