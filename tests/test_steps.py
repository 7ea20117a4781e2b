"""What is shown step by step is what the engines compute, on every family; by hand on the worked example; refusals."""

import random

import pytest
import torch
from featlas.analysis.steps import NotAStep, ablation_steps, attribution_steps
from featlas.model.ablation import ablate_edges, clean_run
from featlas.model.baselines import Baseline, baseline_nodes
from featlas.model.masks import EdgeSet
from featlas.model.metrics import Metric
from featlas.model.sites import parse_site

from .ablation_cases import random_edges, tiny_case
from .compare_edges import engine_edges, setting
from .compare_edges import steps as settings
from .hand_worked import hand_worked_case
from .hand_worked_ablation import CIRCUITS, CLEAN, CORRUPT, edge_set
from .micro import FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ablated_pass_is_the_engines(family, by_position):
    case = tiny_case(family, "relu", batch=1, baseline="arbitrary").only(0)
    batch = case.batch()
    edges = random_edges(case, random.Random(3), 0.6, 0.5, by_position=by_position)
    shown = ablation_steps(batch, edges)
    engine = ablate_edges(batch, [edges])
    torch.testing.assert_close(shown.end, engine[0], rtol=1e-4, atol=1e-4)
    assert shown.metric == pytest.approx(float(batch.measure(engine, Metric.LOGIT_DIFF)[0, 0]), rel=1e-4, abs=1e-4)
    empty = ablate_edges(batch, [EdgeSet.empty(batch.graph)])
    assert shown.metric_empty == pytest.approx(float(batch.measure(empty, Metric.LOGIT_DIFF)[0, 0]), rel=1e-4, abs=1e-4)
    assert shown.metric_full == pytest.approx(float(batch.full(Metric.LOGIT_DIFF)[0]), rel=1e-5)


def test_every_edge_gives_the_whole_way_and_every_own_value():
    case = tiny_case("llama", "relu", ("embed", "resid_0", "mlp_1"), batch=1, d_sae=4).only(0)
    batch = case.batch()
    edges = random_edges(case, random.Random(0), 1.0, 1.0)
    shown = ablation_steps(batch, edges)
    assert shown.faithfulness == pytest.approx(1, abs=1e-4)
    for one in shown.targets:
        assert (one.way, one.n_cut) == (pytest.approx(1, abs=1e-4), 0)
        assert one.value == pytest.approx(one.clean, abs=1e-4)


def test_no_edge_leaves_the_output_alone_at_the_baseline():
    batch = tiny_case("gpt2", batch=1).only(0).batch()
    shown = ablation_steps(batch, EdgeSet.empty(batch.graph))
    (y,) = shown.targets
    assert (y.site, y.sources, y.way, shown.faithfulness) == ("y", (), 0.0, 0.0)


def test_by_hand():
    """The worked example's y = 2·x₀ + x₁, every number of which stands in `hand_worked_ablation`."""
    binding, dictionaries, pairs = hand_worked_case()
    clean = clean_run(binding, dictionaries, pairs)
    batch = clean.with_baseline(baseline_nodes(binding, dictionaries, pairs, clean.values, Baseline.COUNTERFACTUAL))
    for cuts, y, _ in CIRCUITS:
        shown = ablation_steps(batch, edge_set(binding, dictionaries, cuts))
        assert (shown.metric, shown.metric_full, shown.metric_empty) == pytest.approx((float(y), float(CLEAN), float(CORRUPT)))


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_an_attribution_is_the_engines_edge(family, n_steps):
    binding, dictionaries, pairs = setting(family, "relu", ("embed", "resid_0", "mlp_1"), d_sae=6, batch=1)
    engine = engine_edges(binding, dictionaries, pairs, settings(n_steps))
    clean = clean_run(binding, dictionaries, pairs)
    batch = clean.with_baseline(baseline_nodes(binding, dictionaries, pairs, clean.values, Baseline.COUNTERFACTUAL))
    d_sae = {site.name: d.d_sae for site, d in dictionaries.items()}
    feature = [edge for edge in engine if edge[4] != "y" and edge[5] < d_sae[edge[4]]]
    chosen = sorted(feature, key=lambda edge: -abs(engine[edge]))[:6] + [edge for edge in engine if edge[4] == "y"][:4]
    largest = max(abs(engine[edge]) for edge in chosen)
    for edge in chosen:
        _, s, i, p, d, j, q = edge
        number = -1 if i == d_sae[s] else i
        shown = attribution_steps(batch, (parse_site(s), number, p), (parse_site(d), j, q), n_steps)
        assert shown.effect == pytest.approx(engine[edge], rel=1e-3, abs=1e-4 * largest)
        into = sum(weight for other, weight in engine.items() if other[4:] == edge[4:])
        assert shown.total == pytest.approx(into, rel=1e-3, abs=1e-4 * largest)


def test_effects_add_up_to_what_the_node_brings():
    binding, dictionaries, pairs = setting("llama", "relu", ("resid_0", "mlp_1"), d_sae=6, batch=1)
    clean = clean_run(binding, dictionaries, pairs)
    batch = clean.with_baseline(baseline_nodes(binding, dictionaries, pairs, clean.values, Baseline.COUNTERFACTUAL))
    last = pairs.clean.shape[1] - 1
    shown = attribution_steps(batch, (parse_site("resid_0"), 0, last), (parse_site("y"), 0, last), 200)
    assert shown.total == pytest.approx(shown.metric_clean - shown.metric_start, rel=0.02)
    assert shown.steps[-1].metric == pytest.approx(shown.metric_clean, rel=1e-4)


def test_refusals():
    batch = tiny_case("llama", batch=2).batch()
    with pytest.raises(NotAStep, match="one sequence"):
        ablation_steps(batch, EdgeSet.empty(batch.graph))
    batch = tiny_case("llama", batch=1).only(0).batch()
    with pytest.raises(NotAStep, match="complement"):
        ablation_steps(batch, EdgeSet.full(batch.graph))
    with pytest.raises(NotAStep, match="does not read"):
        attribution_steps(batch, (parse_site("mlp_1"), 0, 0), (parse_site("resid_0"), 0, 0))
    with pytest.raises(NotAStep, match="error node"):
        attribution_steps(batch, (parse_site("embed"), 0, 0), (parse_site("resid_0"), -1, 0))
    with pytest.raises(NotAStep, match="no live target"):
        ablation_steps(batch, EdgeSet.empty(batch.graph)).of("resid_0", 1)
