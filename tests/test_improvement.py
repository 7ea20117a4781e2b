"""Rankings of candidate edges by measured effects, by greedy pruning and by trained gates."""

import random

import polars as pl
import pytest
import torch
from featlas.analysis.circuits import Candidates
from featlas.analysis.improvement import (
    RANKING,
    BadSearch,
    Search,
    Training,
    greedy,
    hard_concrete,
    learned,
    nested,
    open_probability,
    ranking,
    remeasured,
    reranked,
)
from featlas.model.ablation import Errors, ablate_edges
from featlas.model.masks import EdgeSet
from featlas.model.metrics import Metric, UnsuitableMetric

from .ablation_cases import random_edges, tiny_case
from .hand_worked_ablation import CLEAN, CUTS
from .test_ablation import hand_worked_batch, hand_worked_set

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps


def measured(batch, sets):
    return batch.measure(ablate_edges(batch, sets), Metric.LOGIT_DIFF).mean(dim=1)


def small_case():
    case = tiny_case("llama", "relu", ("embed", "mlp_0", "resid_0", "mlp_1"), baseline="counterfactual", d_sae=6)
    edges = random_edges(case, random.Random(4), 0.7, 0.5)
    rows = edges.rows[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:24].sort().values]
    return case, EdgeSet(edges.graph, rows)


def test_measured_effects_rank_hand_worked_edges():
    batch = hand_worked_batch()
    candidates = hand_worked_set(batch, list(CUTS))
    scores = remeasured([batch, batch], candidates)
    assert sorted(scores.tolist()) == sorted(float(CLEAN - y) for y in CUTS.values())
    frame = ranking(candidates, scores, "measured")
    assert dict(frame.schema) == dict(RANKING)
    assert frame["score"].is_sorted(descending=True)
    best = frame.row(0, named=True)
    cut = min(CUTS, key=lambda edge: CUTS[edge])
    assert (best["source_site"], best["source"], best["target_site"], best["target"]) == cut
    assert nested(candidates, scores, [0, 3, len(candidates)])[2].rows.equal(candidates.rows)


@pytest.mark.slow
def test_greedy_pruning_is_the_loop_that_drops_the_least_edge():
    case, candidates = small_case()
    batch = case.batch()
    scores = greedy([case.only(0).batch(), case.only(1).batch()], candidates, drop=1e-9)  # one edge a round
    left = list(range(len(candidates)))
    for round_ in range(len(candidates) - 1):
        rest = [[i for i in left if i != cut] for cut in left]
        values = measured(batch, [EdgeSet(candidates.graph, candidates.rows[r]) for r in rest])
        gone = int(scores.tolist().index(round_))
        assert gone in left
        chosen = values[left.index(gone)]
        assert chosen >= values.max() - 1e-5, "another cut would have lost less"
        left.remove(gone)


def test_greedy_pruning_stops_at_wanted_sizes_and_ties_go_by_the_prior():
    case, candidates = small_case()
    prior = torch.arange(len(candidates), dtype=torch.float64)
    scores = greedy([case.batch()], candidates, drop=0.5, sizes=(20, 7), prior=prior)
    assert sorted(scores.tolist()) == list(range(len(candidates)))
    full = measured(case.batch(), nested(candidates, scores, [20]))
    by_hand = greedy([case.batch()], candidates, drop=4 / 24 - 1e-9)
    assert full.item() == pytest.approx(measured(case.batch(), nested(candidates, by_hand, [20])).item(), abs=1e-5)
    nothing = EdgeSet.of(candidates.graph, ["embed"] * 3, [0, 1, 2], ["mlp_0"] * 3, [3, 4, 5])  # nothing reads mlp_0 then
    assert greedy([case.batch()], nothing, prior=torch.tensor([2.0, 0.0, 1.0])).argsort().tolist() == [1, 2, 0]


def test_trained_gates_keep_what_matters():
    batch = hand_worked_batch()
    through, direct = [("embed", 0, "resid_0", 0), ("resid_0", 0, "y", 0)], [("mlp_0", 0, "resid_0", 1), ("embed", 1, "attn_0", 0)]
    needed = hand_worked_set(batch, through).rows.tolist()
    candidates = hand_worked_set(batch, [*through, *direct])  # the last two bring nothing: g is not added to r₁
    scores = learned([batch], candidates, training=Training(steps=60, penalty=0.2))
    best = nested(candidates, scores, [2])[0].rows.tolist()
    assert best == sorted(needed)
    again = learned([batch], candidates, training=Training(steps=60, penalty=0.2))
    assert scores.equal(again)


@pytest.mark.slow
def test_trained_gates_are_no_worse_than_chance():
    case, candidates = small_case()
    batch = case.batch()
    scores = learned([batch], candidates, training=Training(steps=80, penalty=0.3))
    sizes = range(len(candidates))
    full = batch.full(Metric.LOGIT_DIFF).mean()
    distance = lambda s: (measured(batch, nested(candidates, s, sizes)) - full).abs().sum()
    chance = [distance(torch.rand(len(candidates), generator=torch.Generator().manual_seed(i))) for i in range(5)]
    assert distance(scores) < torch.stack(chance).mean()


def test_gates_and_their_probability():
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for log_odds in (-1.0, 0.5, 2.0):
        odds = torch.full_like(noise, log_odds)
        gates = hard_concrete(odds, noise)
        assert float(gates.min()) >= 0
        assert float(gates.max()) <= 1
        assert float((gates > 0).double().mean()) == pytest.approx(float(open_probability(odds[:1])), abs=5e-3)


def test_candidates_of_a_run_take_the_ranks_as_strengths():
    names = {"key": ["a", "b", "y"], "site": ["resid_0", "resid_1", "y"], "layer": [0, 1, -1]}
    features = pl.DataFrame({**names, "kind": ["feature", "feature", "output"], "index": [0, 0, 0]})
    ends = {"source": ["a", "b", "a"], "target": ["b", "y", "y"], "src_pos": [-1] * 3, "dest_pos": [-1] * 3}
    edges = pl.DataFrame({**ends, "weight": [1.0, -2.0, 3.0], "strength": [1.0, 2.0, 3.0]})
    candidates = Candidates.of(edges, features, ["resid_0"])
    keys = edges.select("source", "target", "src_pos", "dest_pos")
    new = reranked(candidates, keys, torch.tensor([5.0, -1.0, 7.0]))
    ours = {(s, t): x for s, t, x in new.edges.select("source", "target", "strength").iter_rows()}
    assert ours == {("a", "b"): 2.0, ("b", "y"): 1.0, ("a", "y"): 3.0}
    assert new.edges["weight"].to_list() == candidates.edges["weight"].to_list()
    with pytest.raises(BadSearch, match="1 of 3 candidates have no score"):
        reranked(candidates, keys.head(2), torch.tensor([1.0, 2.0]))


def test_searches_that_mean_nothing_are_refused():
    case, candidates = small_case()
    batch = case.batch()
    with pytest.raises(BadSearch, match="give at least one batch"):
        remeasured([], candidates)
    with pytest.raises(BadSearch, match="a complement has too many"):
        greedy([batch], EdgeSet.full(candidates.graph))
    with pytest.raises(BadSearch, match="between 0 and 1"):
        greedy([batch], candidates, drop=1.0)
    with pytest.raises(BadSearch, match="--train-steps 0"):
        learned([batch], candidates, training=Training(steps=0))
    with pytest.raises(BadSearch, match="penalty nan"):
        learned([batch], candidates, training=Training(penalty=float("nan")))
    with pytest.raises(BadSearch, match="let them be listed, or dead"):
        learned([batch], candidates, Search(errors=Errors.KEPT))
    with pytest.raises(UnsuitableMetric):
        learned([batch], candidates, Search(metric=Metric.ACCURACY))
