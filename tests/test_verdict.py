"""The verdict: nodes' effects against the definition, scores written twice as once, on both databases, files and pages."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from featlas import console, verdict
from featlas.analysis.circuits import Selection, read_circuit, run_circuit
from featlas.analysis.controls import Method
from featlas.analysis.faithfulness import ATTRIBUTION, FOUND, HELD_OUT, SIZES, VALUES
from featlas.analysis.improved import ImprovementOptions, gains, run_improvement
from featlas.analysis.improvement import Training
from featlas.analysis.mixtures import MixtureOptions, run_mixture
from featlas.analysis.scores import estimated_and_measured, read_sweep, write_effects
from featlas.analysis.single_effects import measure_effects
from featlas.analysis.study import Ablation, Split, Study, StudyOptions, found_pairs, open_study
from featlas.analysis.sweeps import BadGrid, Sweep, SweepOptions, SweepPlan, plan_sweep
from featlas.errors import UserError
from featlas.ingest.effective import EdgeSettings
from featlas.ingest.pipeline import ingest_edges
from featlas.model.metrics import Metric
from featlas.model.tasks import batches
from featlas.queries.schema import feature_key
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, ServerCredentials, open_graph
from featlas.queries.subgraphs import find_run
from featlas.verdict import VerdictOptions
from polars.testing import assert_frame_equal

from .naive import naive_node_attributions
from .study_atlas import TinyAtlas, options

FEW = VerdictOptions(control_draws=2)


@pytest.fixture(scope="module")
def atlas(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copied(tmp_path_factory.mktemp("verdict"))


@pytest.fixture(scope="module")
def store(atlas: Path) -> Iterator[GraphStore]:
    with open_graph(atlas) as opened:
        yield opened


@pytest.fixture(scope="module")
def statistics(atlas: Path) -> Iterator[StatisticsStore]:
    with StatisticsStore(atlas) as opened:
        yield opened


def opened(store: GraphStore, tiny: TinyAtlas) -> Study:
    chosen = StudyOptions(metrics=(Metric.LOGIT_DIFF, Metric.KL, Metric.ACCURACY))
    return open_study(store, find_run(store, tiny.runs["main"]), chosen, tiny.atlas)


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return opened(store, tiny)


@pytest.fixture(scope="module")
def plan(store: GraphStore, study: Study) -> SweepPlan:
    return plan_sweep(store, study, SweepOptions(shares=(0, 0.4, 0.7, 1), held_out=4, per_sequence=2))


@pytest.fixture(scope="module")
def sweep(plan: SweepPlan) -> Sweep:
    return verdict.try_circuits(plan, FEW)


# --- trying -----------------------------------------------------------------------------------------------------------


def test_nodes_effects_are_those_of_the_definition(store, study) -> None:
    pairs = found_pairs(store, study.run)
    expected: dict[str, float] = {}
    for batch in batches(pairs, study.model.tokenizer, batch_size=8):
        for site, (features, errors) in naive_node_attributions(study.binding, study.dictionaries, batch, EdgeSettings(steps=2)).items():
            stem = feature_key(study.model.key, study.dictionaries[site].id, site, "")
            own = features.sum(1).abs().sum(0).tolist()
            for name, value in [*((str(i), v) for i, v in enumerate(own)), ("error", float(errors.sum(1).abs().sum()))]:
                expected[stem + name] = expected.get(stem + name, 0.0) + value / len(pairs)
    ours = dict(verdict.node_effects(study, pairs).select("key", "effect").iter_rows())
    assert ours == pytest.approx({key: value for key, value in expected.items() if value}, abs=1e-4)


def test_all_controls_are_tried(sweep) -> None:
    assert set(sweep.values.filter(split=HELD_OUT)["method"]) == {ATTRIBUTION, *(method.value for method in Method)}
    draws = sweep.values.group_by("method").agg(pl.col("draw").n_unique())
    assert dict(draws.iter_rows())["random edges"] == 2
    assert dict(draws.iter_rows())["top activations"] == 1


def test_no_controls_and_too_few_draws(plan) -> None:
    alone = verdict.try_circuits(replace(plan, own=()), VerdictOptions(controls=()))
    assert set(alone.values["method"]) == {ATTRIBUTION}
    with pytest.raises(UserError, match=r"--control-draws 0 .*--controls none"):
        VerdictOptions(control_draws=0).check()


def test_what_effects_are_measured_on(store, study) -> None:
    found = found_pairs(store, study.run)
    finding, testing, name = verdict.testing_pairs(store, study, Split.HALVES, 3, None)
    assert (len(testing), name) == (4, HELD_OUT)
    assert set(finding) | {pair.key for pair in testing} == {pair.key for pair in found}
    half = run_circuit(store, study.run, Selection(study.run.key, sequences=finding), n_edges=100)
    assert verdict.testing_pairs(store, study, Split.HALVES, 3, half)[1] == testing
    whole = run_circuit(store, study.run, Selection(study.run.key), n_edges=100)
    with pytest.raises(BadGrid, match="take --split fresh"):
        verdict.testing_pairs(store, study, Split.HALVES, 3, whole)
    assert verdict.testing_pairs(store, study, Split.FOUND, 3, whole) == (None, found, FOUND)
    assert len(verdict.testing_pairs(store, study, Split.FRESH, 3, whole)[1]) == 3
    foreign = replace(whole, selection=replace(whole.selection, run="elsewhere"))
    with pytest.raises(BadGrid, match="is of run elsewhere"):
        verdict.testing_pairs(store, study, Split.FRESH, 3, foreign)


# --- writing back -----------------------------------------------------------------------------------------------------


def written(store: GraphStore) -> dict[str, pl.DataFrame]:
    """All that the graph has of circuits and scores."""
    nodes = {
        label: store.query(f"MATCH (n:{label}) RETURN properties(n) AS p ORDER BY n.key")["p"].to_list() for label in ("Circuit", "Score")
    }
    frames = {label: pl.DataFrame({"text": sorted(str(p) for p in rows)}) for label, rows in nodes.items()}
    edges = {name: store.read_edges(name).sort("source", "target") for name in ("SCORED", "CIRCUIT_EDGE", "IN_CIRCUIT")}
    return frames | edges


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.neo4j)])
def fresh(request: pytest.FixtureRequest, tiny: TinyAtlas, tmp_path: Path) -> Iterator[tuple[GraphStore, StatisticsStore, Study]]:
    """A graph of the main run's own to write to, on either database."""
    if request.param == "embedded":
        folder, graph = tiny.copied(tmp_path), open_graph(tmp_path / "atlas")
    else:
        server = request.getfixturevalue("clean_neo4j")
        patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        patch.setenv("NEO4J_USERNAME", server.username)
        patch.setenv("NEO4J_PASSWORD", server.password)
        folder = tmp_path / "atlas"
        ingest_edges(options(tiny.folder, atlas=folder, graph=server.uri))
        graph = open_graph(server.uri, credentials=ServerCredentials(server.username, server.password))
    with graph, StatisticsStore(folder) as statistics:
        yield graph, statistics, opened(graph, tiny)


@pytest.mark.slow
def test_written_twice_is_written_once(fresh) -> None:
    store, statistics, study = fresh
    plan = plan_sweep(store, study, SweepOptions(shares=(0.4, 0.7, 1), held_out=3))
    sweep = verdict.try_circuits(plan, VerdictOptions(controls=(Method.RANDOM_EDGES,), control_draws=2))
    first = verdict.write_back(store, statistics, study, sweep, FEW)
    before = written(store)
    assert first.n_circuits == before["Circuit"].height == 3
    assert first.n_scores == before["Score"].height == before["SCORED"].height
    assert verdict.write_back(store, statistics, study, sweep, FEW) == first
    for name, frame in written(store).items():
        assert_frame_equal(frame, before[name], check_row_order=False)
    values, sizes = read_sweep(statistics, sweep.run, sweep.subject)
    assert_frame_equal(values, sweep.values, check_row_order=False)
    assert_frame_equal(sizes, sweep.sizes, check_row_order=False)
    # What a circuit shows itself is what the table says of it.
    shown = store.query("MATCH (c:Circuit) RETURN c.key AS key, c.faithfulness AS faithfulness, c.completeness AS completeness ORDER BY key")
    for key, faithful, complete in shown.iter_rows():
        for part, value in (("circuit", faithful), ("complement", complete)):
            row = sweep.default_rows(Ablation.EDGE, part).filter(circuit=key)
            assert value == pytest.approx(row["value"][0], abs=1e-9)
    # A control's scores stand beside the circuit that it is a control of.
    beside = store.query(
        "MATCH (c:Circuit)-[:SCORED]->(s:Score) WHERE s.method = 'random edges' AND s.task = 'pooled' RETURN c.key AS key, s.metric AS metric,"
        " s.averaging AS averaging, s.value AS value"
    )
    table = sweep.table.filter(method="random edges", ablation="edge")
    for key, metric, averaging, value in beside.iter_rows():
        size = sweep.table.filter(circuit=key)["size"][0]
        expected = table.filter(size=size, metric=metric, averaging=averaging)["value"][0]
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-9))
    assert beside.height


def test_large_circuits_stay_out_of_the_graph(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny)
        sweep = verdict.try_circuits(plan_sweep(store, study, SweepOptions(shares=(0.4, 1), held_out=2)), VerdictOptions(controls=()))
        small = min(circuit.n_edges for circuit in sweep.lasting)
        done = verdict.write_back(store, statistics, study, sweep, VerdictOptions(largest_written=small))
        assert done.n_circuits == 1
        assert store.query("MATCH (c:Circuit) RETURN c.n_edges AS n")["n"].to_list() == [small]
        assert read_sweep(statistics, sweep.run, sweep.subject)[0].height == sweep.values.height


def test_a_split_that_is_found_leaves_no_default_score(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny)
        plan = plan_sweep(store, study, SweepOptions(shares=(0.5,), split=Split.FOUND))
        sweep = verdict.try_circuits(plan, VerdictOptions(controls=()))
        verdict.write_back(store, statistics, study, sweep, FEW)
        shown = store.query("MATCH (c:Circuit) RETURN c.faithfulness AS f")["f"].to_list()
        assert shown == [None]  # an upper bound is not what a circuit is known by
        assert set(store.query("MATCH (s:Score) RETURN DISTINCT s.split AS split")["split"]) == {FOUND}


@pytest.mark.slow
def test_circuits_by_another_ranking_show_their_own_score(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny)
        chosen = SweepOptions(shares=(0.5, 1), candidates=80, held_out=3, ablations=(Ablation.EDGE,), complement=False)
        sweep = run_improvement(plan_sweep(store, study, chosen), ImprovementOptions(found=2, drop=0.5, training=Training(steps=3)))
        verdict.write_back(store, statistics, study, sweep, FEW)
        shown = dict(store.query("MATCH (c:Circuit) RETURN c.key AS key, c.faithfulness AS f").iter_rows())
        for method in ("measured effects", "greedy pruning", "learned gates"):
            row = sweep.default_rows(Ablation.EDGE, "circuit", method).row(0, named=True)
            if row["circuit"] is not None:
                assert shown[row["circuit"]] == pytest.approx(row["value"], abs=1e-9), method
        with_gains, without = verdict.improvement_page(sweep, study, gains(sweep)), verdict.improvement_page(sweep, study, None)
        assert len(with_gains) > len(without) > 1000
        assert all("greedy pruning" in page for page in (with_gains, without))


# --- out of the program -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_saved_values_have_their_sizes(sweep, tmp_path, ending) -> None:
    path = tmp_path / f"values.{ending}"
    console.save_frame(verdict.values_with_sizes(sweep), path)
    saved = pl.read_parquet(path) if ending == "parquet" else pl.read_csv(path, infer_schema_length=None)
    assert saved.height == sweep.values.height
    assert set(saved.columns) == set(VALUES) | set(SIZES)
    assert saved["n_nodes"].null_count() == 0
    at = {"method": ATTRIBUTION, "ablation": "edge", "part": "circuit", "size": sweep.n_candidates, "split": HELD_OUT}
    assert set(saved.filter(**at)["n_edges"]) == {sweep.circuits[sweep.n_candidates].n_edges}


def test_as_json_is_json(sweep) -> None:
    told = json.loads(json.dumps(verdict.as_json(sweep)))
    assert (told["tested"], told["found"], told["candidates"]) == (4, 8, sweep.n_candidates)
    assert len(told["table"]) == sweep.table.height
    assert told["areas"]


@pytest.mark.slow
def test_pages_hold_their_figures(store, statistics, study, plan, sweep) -> None:
    page = verdict.page(sweep, study)
    for figure in ("faithfulness-logit-diff-pooled", "matched", "sequences", "areas", "faithfulness-accuracy-pooled"):
        assert f'"{figure}"' in page or f"#{figure}" in page, figure
    assert study.run.key in page
    assert "4 held-out" in page
    circuit = run_circuit(store, study.run, Selection(study.run.key), n_edges=60)
    effects = measure_effects(study, circuit, plan.tested[:2])
    assert "effects" in verdict.effects_page(circuit, effects, study)
    mixture = run_mixture(store, study, MixtureOptions(edges=150, held_out=4, control_draws=1))
    shown = verdict.mixture_page(mixture, study)
    for figure in ("removals-edge-retained", "removals-node-accuracy", "removals-edge-logit-diff"):
        assert figure in shown


@pytest.mark.slow
def test_a_page_of_what_is_kept(store, statistics, study, sweep) -> None:
    run = study.run
    with pytest.raises(verdict.NothingMeasured, match=r"nothing is kept .*featlas analyze faithfulness"):
        verdict.stored_page(store, statistics, run, None, "zero", HELD_OUT, None)
    verdict.write_back(store, statistics, study, sweep, FEW)
    page = verdict.stored_page(store, statistics, run, None, None, HELD_OUT, None)
    assert "faithfulness-logit-diff-pooled" in page
    with pytest.raises(verdict.NothingMeasured, match="--metric 'mrr' was not measured: there are"):
        verdict.stored_page(store, statistics, run, "mrr", None, HELD_OUT, None)


def test_names_that_a_person_reads(store, study) -> None:
    names = verdict.readable_names(store, study.run)
    stem = feature_key(study.model.key, study.run.dictionaries["resid_0"], next(s for s in study.graph.sites if s.name == "resid_0"), "")
    assert names[stem + "3"].startswith("resid_0/3")
    assert names[stem + "error"] == "resid_0/error"


@pytest.mark.slow
def test_effects_on_the_graph_are_the_means_measured(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny)
        circuit = read_circuit(store, verdict.write_circuit(store, run_circuit(store, study.run, Selection(study.run.key), n_edges=60)))
        effects = measure_effects(study, circuit, found_pairs(store, study.run)[:3])
        for _ in range(2):
            done = write_effects(store, statistics, study.run, effects, metric="logit_diff", baseline=study.baseline_name)
            assert (done.n_edges, done.n_missing) == (2 * circuit.n_edges, 0)
        measured = estimated_and_measured(store, study.run.key)
        shown = {row[:2]: row[2] for row in measured.select("source", "target", "measured").iter_rows()}
        own = effects.filter(pl.col("circuit").is_null(), pl.col("target").is_not_null(), metric="logit_diff")
        means = {row[:2]: row[2] for row in own.group_by("source", "target").agg(pl.col("effect").mean()).iter_rows()}
        assert shown == pytest.approx(means)
