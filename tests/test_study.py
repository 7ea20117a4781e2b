"""A run with its model at hand again: what is loaded and what is refused, which sequences are held out, and every measured number by itself."""

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import polars as pl
import pytest
import torch
from featlas.analysis.circuits import Selection, run_circuit
from featlas.analysis.faithfulness import FOUND, VALUES
from featlas.analysis.masks import edge_set, node_set
from featlas.analysis.study import (
    Ablation,
    NoHeldOut,
    Study,
    StudyOptions,
    Trial,
    WrongModel,
    found_pairs,
    halves,
    held_out_pairs,
    measure,
    open_study,
    recorded_options,
    with_metrics,
)
from featlas.errors import UserError
from featlas.model.ablation import Errors, ablate_edges, ablate_nodes
from featlas.model.baselines import Baseline
from featlas.model.metrics import Metric
from featlas.model.pairs import Pair
from featlas.model.tasks import batches
from featlas.queries.store import GraphStore
from featlas.queries.subgraphs import find_run
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

from .study_atlas import N_FOUND, N_LINES, SITES, TinyAtlas, line

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps

SOME = (Metric.LOGIT_DIFF, Metric.KL, Metric.MRR)


def opened(store: GraphStore, tiny: TinyAtlas, name: str = "main", **options: object) -> Study:
    return open_study(store, find_run(store, tiny.runs[name]), StudyOptions(**options), tiny.atlas)


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return opened(store, tiny, metrics=SOME, batch_size=3)


def with_baseline(study: Study, baseline: Baseline, store: GraphStore, tiny: TinyAtlas, **options: object) -> Study:
    """The study with another baseline, whose moments are read where it needs some."""
    return opened(store, tiny, metrics=SOME, baseline=baseline, **options) if baseline.of_corpus else replace(study, baseline=baseline)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_a_run_is_opened_as_it_was_measured(study: Study, tiny: TinyAtlas) -> None:
    assert tuple(site.name for site in study.graph.sites) == (*SITES, "y")
    assert {site.name: dictionary.id for site, dictionary in study.dictionaries.items()} == dict(study.run.dictionaries)
    assert (study.baseline, study.default_metric, study.seeds) == (Baseline.COUNTERFACTUAL, "logit_diff", (0,))
    assert recorded_options(tiny.atlas, study.run.key)["model"] == str(tiny.folder / "model")
    assert replace(study, options=replace(study.options, metrics=(Metric.KL, Metric.TV))).default_metric == "kl"
    assert with_metrics(study, [Metric.TV]).metrics == (Metric.TV,)


def test_a_target_inside_the_model_is_the_one_thing_measured(store: GraphStore, tiny: TinyAtlas) -> None:
    feature, probe = opened(store, tiny, "feature"), opened(store, tiny, "probe", target=str(tiny.probe))
    for study, name in ((feature, "feature resid_1/2"), (probe, "probe slope")):
        assert len(study.metrics) == 1
        assert study.metric_name(study.metrics[0]) == study.default_metric == name
        assert study.graph.sites[-1].name == "y"
        pair = found_pairs(store, study.run)[0]
        (values,) = measure(study, [pair], [whole(study, Ablation.EDGE)]).filter(pl.col("part") == "circuit").to_dicts()
        assert (values["metric"], values["value"]) == (name, pytest.approx(values["full"], abs=1e-5))
        tokens = torch.tensor([study.model.tokenizer(pair.clean)["input_ids"]])
        stream = study.binding.forward(tokens, {study.target.site: study.target.basis}).values[study.target.site][0, -1]
        own = feature.target.dictionary.encode(stream)[2] if name.startswith("feature") else stream @ torch.linspace(-1, 1, 8)
        assert values["full"] == pytest.approx(float(own), abs=1e-5)


def test_what_was_not_measured_is_refused(store: GraphStore, tiny: TinyAtlas, tmp_path) -> None:
    with pytest.raises(WrongModel, match=r"--model .*model --dictionaries identity are: name those of the run"):
        opened(store, tiny, dictionaries="identity")
    with pytest.raises(WrongModel, match=r"name its \.safetensors file by --target"):
        opened(store, tiny, "probe")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.linspace(-1, 2, 8)}, other, metadata={"site": "resid_1", "name": "slope"})
    with pytest.raises(WrongModel, match=r"other\.safetensors is not the one"):
        opened(store, tiny, "probe", target=str(other))
    run = find_run(store, tiny.runs["main"])
    named = StudyOptions(model=str(tiny.folder / "model"), dictionaries=str(tiny.folder / "dictionaries"))
    assert recorded_options(tmp_path, run.key) == {}
    assert open_study(store, run, named, tmp_path).model.key == run.model  # no manifest there: what it would tell is named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "--draws 0"), ({"batch_size": 0}, "--batch-size 0"), ({"memory": 1000}, "--memory of 1000 bytes"),
        ({"noise_scale": float("nan")}, "--noise-scale nan"), ({"baseline": Baseline.ZERO, "per_position": True}, "not of zero"),
    ],
)  # fmt: skip
def test_options_out_of_range(store: GraphStore, tiny: TinyAtlas, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(store, tiny, **options)


def test_moments_are_the_statistics_own(store: GraphStore, tiny: TinyAtlas, tmp_path) -> None:
    study = opened(store, tiny, baseline=Baseline.MEAN)
    assert study.moments is not None
    pairs = found_pairs(store, study.run)
    site = next(iter(study.dictionaries))
    rows = [text for pair in pairs for text in (pair.clean, pair.corrupt)]
    tokens = [torch.tensor([study.model.tokenizer(text)["input_ids"]]) for text in rows]
    nodes = [study.dictionaries[site].encode(study.binding.forward(t, {site: study.dictionaries[site].basis}).values[site])[0] for t in tokens]
    assert torch.allclose(study.moments[site].features.float(), torch.cat(nodes).mean(0), atol=1e-5)
    with pytest.raises(UserError, match=r"no statistics of .*featlas ingest statistics"):
        opened(store, tiny, "identity", baseline=Baseline.MEAN)


def test_draws_are_seeds_of_drawn_baselines_alone(study: Study) -> None:
    drawn = replace(study, options=replace(study.options, draws=3, seed=5))
    assert replace(drawn, baseline=Baseline.RESAMPLE).seeds == (5, 6, 7)
    assert replace(drawn, baseline=Baseline.NOISE).seeds == (5, 6, 7)
    assert drawn.seeds == replace(drawn, baseline=Baseline.MEAN).seeds == (5,)


# --- sequences --------------------------------------------------------------------------------------------------------


def prompts(pairs: list[Pair]) -> set[str]:
    return set(chain.from_iterable((pair.clean, pair.corrupt) for pair in pairs))


def test_held_out_sequences_share_no_prompt_with_those_found_on(store: GraphStore, study: Study) -> None:
    found = found_pairs(store, study.run)
    assert {pair.clean for pair in found} == {line(i)["clean"] for i in range(N_FOUND)}
    fresh = held_out_pairs(study, found, 6)
    assert len(fresh) == 6
    assert not prompts(found) & prompts(fresh)
    assert [pair.task for pair in fresh] == ["even", "odd"] * 3
    odd = held_out_pairs(study, found, 7, task="odd")
    assert (len(odd), {pair.task for pair in odd}) == (7, {"odd"})
    assert len(held_out_pairs(study, found, 1000)) == N_LINES - N_FOUND  # the file's end
    turned = [*found, Pair(fresh[0].corrupt, fresh[0].clean, " w2", " w1", "odd")]
    assert not prompts(turned) & prompts(held_out_pairs(study, turned, 1000))
    with pytest.raises(NoHeldOut, match="no sequence beyond the run's 26"):
        held_out_pairs(study, [*found, *held_out_pairs(study, found, 1000)], 4)


def test_a_file_that_the_run_has_used_up_has_none_left(store: GraphStore, study: Study, tmp_path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps(line(i)) + "\n" for i in range(N_FOUND)))
    with pytest.raises(NoHeldOut, match=r"short\.jsonl' has no sequence beyond the run's 8: .*--split halves"):
        held_out_pairs(replace(study, run=replace(study.run, task=str(path))), found_pairs(store, study.run), 3)


def test_a_drawn_task_is_drawn_further_until_there_are_enough() -> None:
    """A task whose draws are half seen: those seen are passed over, not given for new."""
    from featlas.analysis import study as module

    class Run:
        task, properties = "agreement", {"seed": 0, "settings": '{"limit": 4}'}

    class Stub:
        run = Run()
        model = type("M", (), {"tokenizer": None})

    asked = []

    def drawn(named, tokenizer, *, n, seed, skip_invalid):
        asked.append(n)
        return [Pair(f"c{i // 2}", f"d{i}", "a", "b", "agreement") for i in range(n)]  # clean prompts come twice

    found = drawn("agreement", None, n=4, seed=0, skip_invalid=True)[::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_task", drawn)
        fresh = held_out_pairs(Stub(), found, 4)  # type: ignore[arg-type]
    assert len(fresh) == 4
    assert not prompts(found) & prompts(fresh)


def test_halves_share_nothing_and_tasks_evenly() -> None:
    pairs = [Pair(f"c{i}", f"d{i}", "a", "b", ("x", "y")[i % 2]) for i in range(10)]
    ours, others = halves(pairs, 3)
    assert sorted(pair.key for pair in ours + others) == sorted(pair.key for pair in pairs)
    assert abs(len(ours) - len(others)) <= 1
    assert sum(pair.task == "x" for pair in ours) in (2, 3)
    assert halves(pairs[::-1], 3) == (ours, others)  # whatever the order
    assert halves(pairs, 4) != (ours, others)
    # c0 -> d0, d0 -> c9 and c9 -> d9 belong together.
    turned = [*pairs, Pair("d0", "c9", "b", "a", "x"), Pair("c5", "e5", "a", "b", "x")]
    for seed in range(6):
        ours, others = halves(turned, seed)
        assert not prompts(ours) & prompts(others)
        assert len(ours) + len(others) == len(turned)
        assert abs(len(ours) - len(others)) <= 3
    with pytest.raises(NoHeldOut, match="all are joined by prompts"):
        halves([Pair("c", "d", "a", "b", "x"), Pair("d", "c", "b", "a", "x")])


# --- measuring --------------------------------------------------------------------------------------------------------


def whole(study: Study, ablation: Ablation) -> Trial:
    """The full model as a trial."""
    empty = edge_set(pl.DataFrame(schema={"source": pl.String, "target": pl.String}), study.features, study.graph)
    return Trial("all", 1, (empty if ablation is Ablation.EDGE else no_nodes(study)).inverse())


def no_nodes(study: Study):
    return node_set(pl.DataFrame(schema={"key": pl.String}), study.features, study.graph)


@pytest.fixture(scope="module")
def trials(store: GraphStore, study: Study) -> list[Trial]:
    """A circuit by its edges and by its nodes, and a smaller one of a seed."""
    found = []
    for n, draw in ((120, 0), (60, 2)):
        circuit = run_circuit(store, study.run, Selection(study.run.key), n_edges=n)
        edges = edge_set(circuit.edges, circuit.nodes, study.graph)
        found += [Trial("ours", n, edges, draw), Trial("ours", n, node_set(circuit.nodes, circuit.nodes, study.graph), draw, complement=False)]
    return found


def by_hand(study: Study, pair: Pair, trial: Trial, seed: int, donors: list[Pair]) -> dict[str, tuple[float, float, float]]:
    """m(C), m(M), m(∅) of one pair on its own, by metric."""
    donor_seed = seed if study.baseline is Baseline.RESAMPLE else None
    (alone,) = [
        batch for batch in batches(sorted(donors, key=lambda p: p.key), study.model.tokenizer, batch_size=1, donor_seed=donor_seed)
        if batch.pairs[0].key == pair.key
    ]  # fmt: skip
    batch = study.prepared(alone, seed)
    run = ablate_edges if trial.ablation is Ablation.EDGE else ablate_nodes
    ends = run(batch, [trial.mask, type(trial.mask).empty(study.graph)], errors=study.options.errors)  # (2, 1, width)
    full = study.binding.logits(batch.clean_end)[0].double()
    logits = study.binding.logits(ends)[:, 0].double()
    difference = [float(row[alone.answer[0]] - row[alone.wrong_answer[0]]) for row in (logits[0], full, logits[1])]
    p = full.log_softmax(-1)
    kl = [-float((p.exp() * (p - row.log_softmax(-1))).sum()) for row in (logits[0], full, logits[1])]
    rank = [1 / float(1 + (row > row[alone.answer[0]]).sum()) for row in (logits[0], full, logits[1])]
    return {"logit_diff": tuple(difference), "kl": tuple(kl), "mrr": tuple(rank)}


@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("errors", [Errors.LISTED, Errors.KEPT])
def test_every_value_is_that_of_its_pair_on_its_own(store, tiny, study, trials, baseline, errors) -> None:
    study = with_baseline(study, baseline, store, tiny)
    study = replace(study, options=replace(study.options, draws=2, seed=7, errors=errors, batch_size=4))
    pairs = found_pairs(store, study.run)[:5]
    values = measure(study, pairs, trials, split=FOUND)
    assert list(values.columns) == list(VALUES)
    assert set(values["split"]) == {FOUND}
    assert set(values["baseline"]) == {study.baseline_name}
    n_draws = len(study.seeds)
    assert n_draws == (2 if baseline.drawn else 1)
    assert values.height == len(pairs) * 3 * n_draws * sum(1 + trial.complement for trial in trials)
    for trial in trials[:3]:
        for i, seed in enumerate(study.seeds):
            for pair in pairs[::2]:
                expected = by_hand(study, pair, trial, seed, pairs)
                rows = values.filter(
                    part="circuit", ablation=trial.ablation.value, size=trial.size, draw=trial.draw * n_draws + i, sequence=pair.key
                )
                assert rows.height == 3
                for row in rows.iter_rows(named=True):
                    assert [row["value"], row["full"], row["empty"]] == pytest.approx(expected[row["metric"]], abs=1e-4), (row, trial.size)
    rest = values.filter(part="complement", ablation="edge", size=120, draw=0, sequence=pairs[0].key)
    inverse = by_hand(study, pairs[0], Trial("", 0, trials[0].mask.inverse()), study.seeds[0], pairs)
    assert dict(rest.select("metric", "value").iter_rows()) == pytest.approx({name: own[0] for name, own in inverse.items()}, abs=1e-4)


@pytest.mark.parametrize("baseline", list(Baseline))
def test_order_and_batches_change_nothing(store, tiny, study, trials, baseline) -> None:
    study = with_baseline(study, baseline, store, tiny)
    pairs = found_pairs(store, study.run)
    frames = []
    for size, order in ((1, pairs), (4, pairs[::-1]), (8, pairs[3:] + pairs[:3])):
        values = measure(replace(study, options=replace(study.options, batch_size=size)), order, trials[:2])
        assert values.filter(part="circuit", ablation="edge", metric="kl")["sequence"].to_list() == [pair.key for pair in order]
        frames.append(values.sort("ablation", "part", "metric", "draw", "sequence"))
    for frame in frames[1:]:
        assert_frame_equal(frame, frames[0], abs_tol=1e-4)


def test_a_resampled_baseline_of_some_sequences_is_that_among_all(store, study, trials) -> None:
    study, pairs = replace(study, baseline=Baseline.RESAMPLE), found_pairs(store, study.run)
    every = measure(study, pairs, trials[:2])
    one = measure(study, pairs[2:3], trials[:2], among=pairs)
    assert_frame_equal(one, every.filter(pl.col("sequence") == pairs[2].key), abs_tol=1e-4)
    with pytest.raises(UserError, match="cannot be resampled"):
        measure(study, pairs[2:3], trials[:2])


def test_a_full_set_is_the_model_and_an_empty_one_its_baseline(store, study) -> None:
    pairs = found_pairs(store, study.run)[:3]
    for ablation in Ablation:
        values = measure(study, pairs, [whole(study, ablation)])
        kept, cut = (values.filter(part=part) for part in ("circuit", "complement"))
        assert np.allclose(kept["value"], kept["full"], atol=1e-5)
        assert np.allclose(cut["value"], cut["empty"], atol=1e-5)
    with pytest.raises(UserError, match="split 'new' is neither"):
        measure(study, pairs, [whole(study, Ablation.EDGE)], split="new")
    assert measure(study, [], [whole(study, Ablation.EDGE)]).is_empty()


def test_progress_counts_sequences(store, study, trials) -> None:
    pairs, told = found_pairs(store, study.run)[:4], []
    values = measure(study, pairs, trials[:2], progress=lambda done, total: told.append((done, total)))
    assert values["sequence"].n_unique() == 4
    assert told[-1] == (4, 4)
