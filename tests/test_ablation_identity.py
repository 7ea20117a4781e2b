"""What tells one measurement of a circuit from another, and what each circuit is tested on."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from featlas import verdict
from featlas.analysis import study as study_module
from featlas.analysis.circuits import Circuit, Selection, run_circuit
from featlas.analysis.controls import Method
from featlas.analysis.faithfulness import ATTRIBUTION, FOUND, HELD_OUT, POOLED
from featlas.analysis.scores import read_sweep, write_effects
from featlas.analysis.single_effects import EffectOptions, measure_effects
from featlas.analysis.study import Split, Study, StudyOptions, found_pairs, held_out_pairs, measure, open_study
from featlas.analysis.sweeps import SweepOptions, _trial, own_contenders, plan_sweep
from featlas.ingest.pipeline import plan_run
from featlas.ingest.statistics import StatisticsOptions, measure_statistics, pair_corpus
from featlas.model.ablation import Errors
from featlas.model.baselines import Baseline
from featlas.model.metrics import Metric
from featlas.model.pairs import NoDonor, Pair
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import find_run

from .study_atlas import TinyAtlas, options

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps

ALONE = verdict.VerdictOptions(controls=())


def opened(store: GraphStore, tiny: TinyAtlas, **settings: object) -> Study:
    chosen = {"metrics": (Metric.LOGIT_DIFF, Metric.KL), **settings}
    return open_study(store, find_run(store, tiny.runs["main"]), StudyOptions(**chosen), tiny.atlas)


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return opened(store, tiny)


def of_one_sequence(store: GraphStore, study: Study) -> tuple[Pair, Circuit]:
    pair = found_pairs(store, study.run)[3]
    return pair, run_circuit(store, study.run, Selection(study.run.key, sequence=pair.key), n_edges=150)


# --- names ------------------------------------------------------------------------------------------------------------


def test_baselines_that_differ_have_names_that_differ(study) -> None:
    made = lambda baseline, **changes: replace(study, baseline=baseline, options=replace(study.options, **changes)).baseline_name
    names = [
        made(Baseline.ZERO), made(Baseline.ZERO, errors=Errors.KEPT), made(Baseline.MEAN), made(Baseline.MEAN, per_position=True),
        made(Baseline.NOISE), made(Baseline.NOISE, noise_scale=2.0), made(Baseline.NOISE, seed=3), made(Baseline.RESAMPLE),
        made(Baseline.RESAMPLE, seed=3),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    # The seed is of no account where nothing is drawn.
    assert made(Baseline.ZERO, seed=3) == names[0]


def test_means_of_other_statistics_are_another_baseline(store, tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    plan = plan_run(options(tiny.folder))
    wanted = StatisticsOptions(second_moments=False)
    with StatisticsStore(folder) as statistics:
        corpus = pair_corpus("half", plan.pairs[::2], plan.model.tokenizer, wanted)
        other = measure_statistics(statistics, plan.model, plan.dictionaries, corpus, wanted).run
    run = find_run(store, tiny.runs["main"])
    named = {
        name: open_study(store, run, StudyOptions(baseline=Baseline.MEAN, statistics_run=name), folder) for name in (other, tiny.statistics_run)
    }
    assert named[other].baseline_name == f"mean of statistics {other[:8]}"
    assert len({study.baseline_name for study in named.values()}) == 2
    site = next(iter(named[other].moments))
    assert not named[other].moments[site].features.equal(named[tiny.statistics_run].moments[site].features)


def test_circuits_among_fewer_candidates_are_kept_apart(store, study) -> None:
    """Controls and rankings at one size depend on what they are chosen from."""
    at = {n: plan_sweep(store, study, SweepOptions(sizes=(60,), candidates=n, held_out=1)) for n in (None, 100, 200, 10**6)}
    subjects = {n: plan.subject for n, plan in at.items()}
    assert len({subjects[n] for n in (None, 100, 200)}) == 3
    assert subjects[10**6] == subjects[None] == study.run.key


def test_scores_of_a_drawn_baseline_have_its_seed(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        for seed in (0, 4):
            study = opened(store, tiny, baseline=Baseline.RESAMPLE, seed=seed)
            sweep = verdict.try_circuits(plan_sweep(store, study, SweepOptions(shares=(0.5,), held_out=6)), ALONE)
            verdict.write_back(store, statistics, study, sweep, ALONE)
        found = store.query("MATCH (s:Score) RETURN s.seed AS seed, s.baseline AS baseline, count(*) AS n ORDER BY seed")
        assert found.select("seed", "baseline").rows() == [(0, "resample"), (4, "resample, seed 4")]
        assert found["n"].n_unique() == 1
        values, _ = read_sweep(statistics, sweep.run, sweep.subject)
        assert values.group_by("baseline").len()["len"].n_unique() == 1


# --- what circuits are tested on --------------------------------------------------------------------------------------


def test_a_circuit_of_one_sequence_is_tested_with_donors_of_the_run(store, study) -> None:
    pair, circuit = of_one_sequence(store, study)
    drawn = replace(study, baseline=Baseline.RESAMPLE)
    with pytest.raises(NoDonor):
        measure(drawn, [pair], [])
    plan = plan_sweep(store, drawn, SweepOptions(), circuits=[circuit])
    sweep = verdict.try_circuits(plan, verdict.VerdictOptions(control_draws=1))
    assert set(sweep.values["method"]) == {ATTRIBUTION, *(method.value for method in Method)}
    trials = [_trial(drawn, contender) for contender in own_contenders(plan)]
    among = measure(drawn, found_pairs(store, study.run), trials, split=FOUND).filter(sequence=pair.key)
    ours = sweep.values.filter(method=ATTRIBUTION)
    assert ours["value"].to_list() == pytest.approx(among.sort("ablation", "part", maintain_order=True)["value"].to_list(), abs=1e-4)
    only = EffectOptions(in_model=False, nodes=False)
    effects = measure_effects(drawn, circuit, [pair], only, split=FOUND, among=verdict.donors(store, drawn, [pair]))
    assert set(effects["sequence"]) == {pair.key}
    assert verdict.testing_pairs(store, study, Split.FRESH, 3, circuit) == (None, [pair], FOUND)


def test_a_circuit_of_one_task_is_tested_on_it(store, study) -> None:
    circuit = run_circuit(store, study.run, Selection(study.run.key, task="odd"), n_edges=150)
    plan = plan_sweep(store, study, SweepOptions(held_out=3), circuits=[circuit])
    assert {pair.task for pair in (*plan.tested, *plan.found)} == {"odd"}
    other = plan_sweep(store, study, SweepOptions(held_out=3, task="even"), circuits=[circuit])
    assert {pair.task for pair in other.tested} == {"even"}
    _, tested, split = verdict.testing_pairs(store, study, Split.FRESH, 3, circuit)
    assert ({pair.task for pair in tested}, len(tested), split) == ({"odd"}, 3, HELD_OUT)


def test_a_circuit_of_all_tasks_has_no_pooled_score_of_one(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny)
        circuit = run_circuit(store, study.run, Selection(study.run.key), n_edges=150)
        tasks = {}
        for task in ("odd", None):
            plan = plan_sweep(store, study, SweepOptions(held_out=4, task=task), circuits=[circuit])
            verdict.write_back(store, statistics, study, verdict.try_circuits(plan, ALONE), ALONE)
            tasks[task] = set(store.query("MATCH (s:Score) RETURN DISTINCT s.task AS task")["task"])
        assert tasks == {"odd": {"odd"}, None: {"odd", "even", POOLED}}


@pytest.mark.parametrize("task", [None, "file"])
def test_a_mixture_s_file_that_ends_ends_the_search(task, monkeypatch) -> None:
    """The other part of the mixture could be drawn from for ever."""
    asked = []

    def drawn(named, tokenizer, *, n, seed, skip_invalid):
        asked.append(n)
        file = [Pair(f"f{i}", f"g{i}", "a", "b", "file") for i in range(min(n // 2, 6))]
        return [*file, *(Pair(f"c{i}", f"d{i}", "a", "b", "agreement") for i in range(n - n // 2))]

    class Stub:
        run = type("R", (), {"task": "file.jsonl+agreement", "properties": {"seed": 0, "settings": '{"limit": 8}'}})()
        model = type("M", (), {"tokenizer": None})

    found = drawn("", None, n=8, seed=0, skip_invalid=True)
    monkeypatch.setattr(study_module, "load_task", drawn)
    fresh = held_out_pairs(Stub(), found, 10, task=task)  # type: ignore[arg-type]
    assert len(fresh) == (2 if task else 10)
    assert len(asked) < 6


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_page_shows_effects_by_its_own_baseline_and_metric(tiny, tmp_path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny, baseline=Baseline.ZERO)
        circuit = run_circuit(store, study.run, Selection(study.run.key), n_edges=40)
        effects = measure_effects(study, circuit, found_pairs(store, study.run)[:2], EffectOptions(in_circuit=False, nodes=False), split=FOUND)
        write_effects(store, statistics, study.run, effects, metric="kl", baseline="zero")
        shown = lambda metric, baseline: verdict.stored_page(store, statistics, study.run, metric, baseline, HELD_OUT, None)
        with pytest.raises(verdict.NothingMeasured, match=r"baseline 'counterfactual' .*there are zero"):
            shown(None, None)
        with pytest.raises(verdict.NothingMeasured, match="'logit_diff' was not measured: there are kl"):
            shown("logit_diff", "zero")
        assert "kl, baseline zero, means over sequences" in shown(None, "zero")


@pytest.mark.slow
def test_values_of_single_candidates_are_plotted_by_their_number(tiny, tmp_path: Path) -> None:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as store, StatisticsStore(folder) as statistics:
        study = opened(store, tiny)
        plan = plan_sweep(store, study, SweepOptions(shares=(0.5, 1), candidates=100, held_out=3))
        verdict.write_back(store, statistics, study, verdict.try_circuits(plan, ALONE), ALONE)
        with pytest.raises(verdict.NothingMeasured, match="--candidates"):
            verdict.stored_page(store, statistics, study.run, None, None, HELD_OUT, None)
        page = verdict.stored_page(store, statistics, study.run, None, None, HELD_OUT, None, 100)
        assert all(f'"{figure}"' in page for figure in ("faithfulness-logit-diff-pooled", "areas"))
        whole = plan_sweep(store, study, SweepOptions(shares=(0.5, 1), held_out=3))
        verdict.write_back(store, statistics, study, verdict.try_circuits(whole, ALONE), ALONE)
        assert '"areas"' in verdict.stored_page(store, statistics, study.run, None, None, HELD_OUT, None)
        assert pl.DataFrame(store.query("MATCH (c:Circuit) RETURN c.key AS key")).height
