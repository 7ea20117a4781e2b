"""Definitions of an edge on the same edges: each against a loop over edges written from its definition, and what must hold of them all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

import numpy as np
import polars as pl
import pytest
import torch
from featlas.ingest.definitions import (
    AGREEMENT,
    SCHEMA,
    Definition,
    NothingToCompare,
    agreement,
    compare_batches,
    compare_definitions,
)
from featlas.ingest.effective import Baseline, EdgeSettings, prepare
from featlas.model.binding import TooLong, bind
from featlas.model.frozen import frozen
from featlas.model.metrics import Metric
from featlas.model.sites import OUTPUT, parse_site
from featlas.model.targets import FeatureTarget
from scipy import stats
from torch import nn

from .compare_edges import in_float64, random_means, setting, steps
from .micro import FAMILIES, save_tiny, tiny_module
from .micro_dictionaries import tiny_dictionary
from .micro_pairs import tiny_pairs
from .naive import Case, clean_gradient, mean_gradients, naive_patch, node_change
from .test_cli import featlas

pytestmark = pytest.mark.slow

SITES = ("resid_0", "attn_1", "mlp_1", "resid_1")
GAPS = ("embed", "resid_0", "resid_2")
WEIGHTS = [definition.value for definition in Definition]


def compared(case, settings, n_edges=24, target=None, means=None):
    prepared = prepare(*case, settings, means, *([] if target is None else [target]))
    return compare_definitions(prepared, n_edges, seed=1)


def cases(case, settings, frame, target=None, means=None) -> Iterator[tuple[Case, tuple, dict]]:
    """Per edge of the frame: the naive case of its sequence, the edge as the naive reference writes it, and its row."""
    made = {i: Case.of(*case, i, settings, means, target) for i in range(len(case[2].answer))}
    for row in frame.iter_rows(named=True):
        named = [row[n] for n in ("sequence", "src_site", "src_index", "src_pos", "dest_site", "dest_index", "dest_pos")]
        yield made[row["sequence"]], tuple(named), row


def assert_close(ours: dict, theirs: dict, tolerance=1e-5):
    """Equal to `tolerance` of the largest weight into the same site."""
    assert ours.keys() == theirs.keys()
    assert theirs
    scale = {}
    for key, w in theirs.items():
        scale[key[4]] = max(scale.get(key[4], 0.0), abs(w))
    assert max(scale.values()) > 0
    for key, w in theirs.items():
        assert abs(ours[key] - w) <= tolerance * scale[key[4]], (key, ours[key], w, scale[key[4]])


def assert_defined_by(definition, naive, case, settings, tolerance=1e-5, **more):
    frame = compared(case, settings, **more)
    ours, theirs = {}, {}
    more.pop("n_edges", None)
    for one, edge, row in cases(case, settings, frame, **more):
        ours[edge], theirs[edge] = row[definition], naive(one, edge)
    assert_close(ours, theirs, tolerance)
    return frame


# ---- the definitions, edge by edge


def ends(case: Case, edge):
    names = {site.name: site for site in case.graph.sites}
    return names[edge[1]], names[edge[4]]


def times_change(case: Case, edge, gradient):
    """A gradient with respect to the upstream site's value, (pos, width), times how far node u alone moves that value."""
    src, _ = ends(case, edge)
    delta, error = case.deltas[src]
    pos, index, dictionary = edge[3], edge[2], case.dictionaries[src]
    move = error[pos] if index == dictionary.d_sae else delta[pos, index] * dictionary.W_dec[index]
    return float(gradient[pos] @ move)


def naive_integrated_gradients(case: Case, edge) -> float:
    src, dest = ends(case, edge)
    return times_change(case, edge, mean_gradients(case, dest, [(edge[6], edge[5])])[src][0])


def naive_attribution_patching(case: Case, edge) -> float:
    return naive_integrated_gradients(replace(case, settings=replace(case.settings, steps=1)), edge)


def naive_gradient_product(case: Case, edge) -> float:
    """Each factor from its own runs: the first one step of the downstream site's path at a time, the second at the clean run."""
    src, dest = ends(case, edge)
    if dest == OUTPUT:
        return naive_integrated_gradients(case, edge)
    first = 0
    for value in case.path(dest):
        leaf = value[None].clone().requires_grad_()
        first = first + torch.autograd.grad(case.metric(case.clean_run(1, {dest: leaf})).sum(), leaf)[0][0] / case.settings.steps
    leaf = case.clean.values[src].clone().requires_grad_()
    others = {parent: case.clean.values[parent] for parent in case.graph.parents(dest) if parent != src}
    moved = case.clean_run(1, {src: leaf, **others}).values[dest][:, edge[6]]
    change = node_change(case.dictionaries[dest], moved, case.clean.values[dest][0, edge[6]], edge[5])
    return times_change(case, edge, torch.autograd.grad((change[0] * first[edge[6]]).sum(), leaf)[0][0])


@pytest.mark.parametrize("kind", ["topk", "relu/layer_norm"])
def test_integrated_gradients_and_attribution_patching_are_the_engines(kind):
    case = setting("llama", kind, SITES, batch=1)
    assert_defined_by(Definition.INTEGRATED_GRADIENTS, naive_integrated_gradients, case, steps(3), n_edges=8)
    assert_defined_by(Definition.ATTRIBUTION_PATCHING, naive_attribution_patching, case, steps(3), n_edges=8)


@pytest.mark.parametrize(("family", "names"), [("gpt_neox", SITES), ("gemma2", GAPS)])
def test_gradient_product_against_a_loop_over_edges(family, names):
    case = setting(family, "relu", names, n_layers=3)
    frame = assert_defined_by(Definition.GRADIENT_PRODUCT, naive_gradient_product, case, steps(3), n_edges=8)
    assert frame["edges"].unique().sort().to_list() == ["errors", "features"]
    inner = frame.filter(pl.col("dest_kind") != "y")
    assert not np.allclose(inner[Definition.GRADIENT_PRODUCT], inner[Definition.ATTRIBUTION_PATCHING], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [SITES, GAPS], ids=["dense", "gaps"])
def test_derivatives_against_loops_over_edges_on_every_family(family, names):
    case = setting(family, "topk", names, n_layers=3)
    assert_defined_by(Definition.GRADIENT_PRODUCT, naive_gradient_product, case, steps(4), n_edges=40)
    assert_defined_by(Definition.ATTRIBUTION_PATCHING, naive_attribution_patching, case, steps(4), n_edges=40)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_against_whole_model_runs(family):
    frame = assert_defined_by(Definition.PATCHING, naive_patch, setting(family, "topk", SITES), steps(2), tolerance=1e-4)
    assert frame["rounding"].max() < 1e-4


@pytest.mark.parametrize(
    ("names", "baseline"), [(GAPS, Baseline.ZERO), (("mlp_1", "resid_2"), Baseline.MEAN), (("attn_0", "attn_1"), Baseline.ZERO)]
)
def test_patching_with_sites_left_out_and_from_other_baselines(names, baseline):
    case = setting("gpt2", "relu", names, n_layers=3, heads=names[0] == "attn_0", d_sae=8)
    settings = steps(2, baseline=baseline)
    assert_defined_by(Definition.PATCHING, naive_patch, case, settings, tolerance=1e-4, means=random_means(case[1]))


def test_a_feature_as_the_output():
    binding, dictionaries, batch = in_float64(setting("llama", "relu", ("embed", "resid_0", "mlp_1", "resid_1")))
    site = parse_site("resid_1")
    values = binding.forward(batch.clean, {site: dictionaries[site].basis}).values[site]
    target = FeatureTarget(site, dictionaries[site], int(dictionaries[site].encode(values)[:, -2].amin(0).argmax()), -2)
    case = (binding, dictionaries, batch)
    assert_defined_by(Definition.PATCHING, naive_patch, case, steps(2), n_edges=8, target=target)
    assert_defined_by(Definition.GRADIENT_PRODUCT, naive_gradient_product, case, steps(2), n_edges=6, target=target)


# ---- frozen patterns and denominators: against a model in which they are numbers


def eager(family, names, batch):
    """A case in double precision whose attention calls softmax, where the numbers can be put in its place."""
    _, dictionaries, pairs = setting(family, "relu", names, batch=batch)
    module = tiny_module(family, n_layers=2)
    module.set_attn_implementation("eager")
    return bind(module.double()), {site: d.to("cpu", torch.float64) for site, d in dictionaries.items()}, pairs


@contextmanager
def with_constants(case: Case) -> Iterator[None]:
    """The model with every pattern of attention and every norm's denominator replaced by its number in the case's clean run.

    Nothing is detached and no derivative is taken: it is another function, which may be moved by finite steps.
    """
    softmax, patterns, seen = torch.nn.functional.softmax, [], {}
    blocks = case.binding.blocks
    norms = [norm for b in blocks for norm in (b.ln_attn, b.post_attn, b.ln_mlp, b.post_mlp)] + [case.binding.final_norm]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    handles = [norm.register_forward_hook(lambda m, inputs, out: seen.update({m: inputs[0]})) for norm in norms]
    torch.nn.functional.softmax = lambda *a, **k: patterns.append(softmax(*a, **k)) or patterns[-1]
    try:
        case.run(case.pairs.clean)
        assert len(patterns) == len(blocks)
        replayed = cycle(patterns)
        torch.nn.functional.softmax = lambda *a, **k: next(replayed)
        for norm in norms:
            norm.forward = constant_norm(norm, seen[norm])
        yield
    finally:
        torch.nn.functional.softmax = softmax
        for handle in handles:
            handle.remove()
        for norm in norms:
            vars(norm).pop("forward", None)


def constant_norm(norm, seen):
    """LayerNorm's or RMSNorm's formula with the denominator that it has at `seen`, (1, pos, d_model)."""
    centre = (lambda x: x - x.mean(-1, keepdim=True)) if isinstance(norm, nn.LayerNorm) else (lambda x: x)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    denominator = (centre(seen).pow(2).mean(-1, keepdim=True) + eps).sqrt()
    gain = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    bias = getattr(norm, "bias", None)
    return lambda x: centre(x) / denominator * gain + (0 if bias is None else bias)


def naive_frozen(case: Case, edge, share=1e-5) -> float:
    """Central differences of the model with constants, in node d, or in the metric where that is d; the first factor is the clean model's."""
    src, dest = ends(case, edge)
    first = None if dest == OUTPUT else clean_gradient(case, dest)[edge[6]]
    delta, error = case.deltas[src]
    dictionary = case.dictionaries[src]
    move = error[edge[3]] if edge[2] == dictionary.d_sae else delta[edge[3], edge[2]] * dictionary.W_dec[edge[2]]
    values = {parent: case.clean.values[parent].repeat(2, 1, 1) for parent in case.graph.parents(dest)}
    values[src][:, edge[3]] += torch.tensor([[share], [-share]]) * move
    with torch.no_grad(), with_constants(case):
        run = case.clean_run(2, values)
        if dest == OUTPUT:
            up, down = case.metric(run)
        else:
            at_d = run.values[dest][:, edge[6]]
            up, down = node_change(case.dictionaries[dest], at_d, case.clean.values[dest][0, edge[6]], edge[5]) @ first
    return float(up - down) / (2 * share)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_edges_are_differences_of_a_model_with_constants(family):
    case = eager(family, SITES, batch=1)
    frame = assert_defined_by(Definition.FROZEN, naive_frozen, case, steps(2), n_edges=10, tolerance=1e-4)
    assert {"y", "attn", "mlp", "resid"} >= set(frame["dest_kind"])
    assert not np.allclose(frame[Definition.FROZEN], frame[Definition.ATTRIBUTION_PATCHING], rtol=1e-2), "nothing was frozen"
    case[0].assert_no_hooks()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_frozen_edges_through_whole_blocks(family):
    case = eager(family, ("embed", "resid_1"), batch=2)
    assert_defined_by(Definition.FROZEN, naive_frozen, case, steps(2), n_edges=10, tolerance=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox"])
def test_fused_attention_is_frozen_as_softmax_is(family):
    """The kernel that does attention in one has no softmax to stop at: its queries and keys are constants instead."""
    fused = setting(family, "topk", SITES)
    module = tiny_module(family, n_layers=2)
    module.set_attn_implementation("eager")
    frames = [compared(case, steps(2)) for case in (fused, (bind(module), *fused[1:]))]
    at = ["sequence", "src_site", "src_index", "src_pos", "dest_site", "dest_index", "dest_pos"]
    both = frames[0].join(frames[1], on=at)
    assert len(both) > 30
    scale = both[Definition.FROZEN].abs().max()
    np.testing.assert_allclose(both[Definition.FROZEN], both[f"{Definition.FROZEN}_right"], atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_changes_no_value_and_leaves_no_hook(family):
    binding = bind(tiny_module(family, n_layers=2))
    tokens = tiny_pairs().clean
    before = binding.forward(tokens, {}).logits
    with frozen(binding):
        assert torch.equal(binding.forward(tokens, {}).logits, before)
    binding.assert_no_hooks()
    with pytest.raises(TooLong), frozen(binding):
        binding.forward(tokens.repeat(1, 50), {})
    binding.assert_no_hooks()
    assert torch.equal(binding.forward(tokens, {}).logits, before)


# ---- what must hold of them all


class Same(nn.Identity):
    """The identity, in the layout that GPT-2's products need."""

    def forward(self, x):
        return x.contiguous()


def linear_model():
    """GPT-2 without its norms and activation functions and with equal patterns: everything is linear."""
    module = tiny_module("gpt2", n_layers=2)
    module.transformer.ln_f = Same()
    for block in module.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = Same(), Same(), Same()
        width = block.attn.c_attn.weight.shape[0]
        block.attn.c_attn.weight[:, : 2 * width] = 0  # queries and keys
        block.attn.c_attn.bias[: 2 * width] = 0
    return bind(module)


@pytest.mark.parametrize("kind", ["identity", "linear"])
@pytest.mark.parametrize("names", [("embed", *SITES), ("embed", "resid_1")], ids=["dense", "gaps"])
def test_all_definitions_coincide_on_a_linear_model(kind, names):
    binding, batch = linear_model(), tiny_pairs()
    dictionaries = {parse_site(n): tiny_dictionary(kind, binding.width(parse_site(n)), seed=i) for i, n in enumerate(names)}
    frame = compared((binding, dictionaries, batch), steps(3), n_edges=400)
    assert len(frame) > 300
    for name in WEIGHTS[1:]:
        scale = frame[WEIGHTS[0]].abs().max()
        np.testing.assert_allclose(frame[name], frame[WEIGHTS[0]], rtol=1e-4, atol=1e-5 * scale, err_msg=name)
    # Weak edges' order is rounding's.
    measured = agreement(frame.filter(pl.col(WEIGHTS[0]).abs() > 1e-3 * scale))
    assert measured["spearman"].min() > 0.999
    assert measured["difference"].max() < 1e-3
    assert measured["sign"].min() == 1


def test_definitions_differ_where_the_model_is_not_linear():
    frame = compared(setting("llama", "relu", SITES), steps(4), n_edges=100).filter(pl.col("dest_kind") != "y")
    for i, first in enumerate(WEIGHTS):
        for second in WEIGHTS[i + 1 :]:
            assert not np.allclose(frame[first], frame[second], rtol=1e-2), (first, second)


def test_a_feature_that_is_inactive_in_the_clean_run_has_edges_by_some_definitions_only():
    frame = compared(setting("llama", "topk", SITES), steps(4), n_edges=400)
    inactive = frame.filter((pl.col(Definition.ATTRIBUTION_PATCHING) == 0) & (pl.col("edges") == "features"))
    assert len(inactive) > 3
    assert (inactive[Definition.INTEGRATED_GRADIENTS] != 0).all()
    assert (inactive[Definition.GRADIENT_PRODUCT] == 0).all()
    assert (inactive[Definition.FROZEN] == 0).all()


# ---- choosing, agreeing, refusing


def test_the_strongest_edges_and_a_sample_of_all_are_chosen():
    case = setting("llama", "relu", SITES)
    everything, some = compared(case, steps(2), n_edges=100_000), compared(case, steps(2), n_edges=21)
    assert everything.schema == some.schema == pl.Schema(SCHEMA)
    for edges, part in some.group_by("edges"):
        of_all = everything.filter(pl.col("edges") == edges[0])[WEIGHTS[0]].abs().sort(descending=True)
        np.testing.assert_allclose(part.filter("top")[WEIGHTS[0]].abs().sort(descending=True), of_all[:11], rtol=1e-6)
        assert part["sampled"].sum() == 10
    # The sample is of all edges alike: its mean strength is theirs, which is far below that of the strongest.
    features = pl.col("edges") == "features"
    strength = everything.filter(features)[WEIGHTS[0]].abs()
    prepared = prepare(*case, steps(2))
    drawn = compare_definitions(prepared, 600, 3).filter(features & pl.col("sampled"))[WEIGHTS[0]].abs()
    assert drawn.mean() == pytest.approx(strength.mean(), abs=4 * strength.std() / len(drawn) ** 0.5)
    assert compare_definitions(prepared, 21, 3).equals(compare_definitions(prepared, 21, 3))


def test_batches_share_the_edges_and_name_their_sequences():
    binding, dictionaries, batch = setting("llama", "relu", SITES, batch=3)
    small = [tiny_pairs(batch=3, only=i) for i in range(3)]
    frame = compare_batches(binding, dictionaries, small, steps(2), n_edges=20, n_sequences=3)
    assert frame["sequence"].unique(maintain_order=True).to_list() == [pair.key for pair in batch.pairs]
    top = frame.filter(pl.col("top") & (pl.col("edges") == "features")).group_by("sequence", maintain_order=True).len()["len"]
    assert top.to_list() == [3, 4, 4]  # of 6, 7 and 7 edges half are the strongest
    together = compare_batches(binding, dictionaries, [batch], steps(2), n_edges=20, n_sequences=3)
    assert together.filter(pl.col("top") & (pl.col("edges") == "features")).height == 10


def test_agreement_is_what_scipy_says():
    generator = np.random.default_rng(0)
    n = 300
    weights = {name: generator.normal(size=n) for name in WEIGHTS}
    weights["frozen"] = 2 * weights["patching"] + 0.1 * generator.normal(size=n)
    weights["attribution_patching"] = np.zeros(n)
    dest_kind = np.array(["y", "mlp", "resid"])[np.arange(n) % 3]
    frame = pl.DataFrame(
        {"edges": np.where(np.arange(n) < 250, "features", "errors"), "dest_kind": dest_kind, "top": np.arange(n) % 2 == 0,
         "sampled": np.arange(n) % 2 == 1, **weights}
    )  # fmt: skip
    found = agreement(frame)
    assert found.schema == pl.Schema(AGREEMENT)
    row = lambda first, second, edges="features", dest="all", chosen="all": found.row(
        by_predicate=(pl.col("first") == first) & (pl.col("second") == second) & (pl.col("edges") == edges)
        & (pl.col("dest") == dest) & (pl.col("chosen") == chosen), named=True,
    )  # fmt: skip
    part = np.arange(n) < 250
    a, b = weights["frozen"], weights["patching"]
    for measured, where in (
        (row("frozen", "patching"), part), (row("frozen", "patching", edges="errors"), ~part),
        (row("frozen", "patching", dest="mlp", chosen="top"), part & (dest_kind == "mlp") & (np.arange(n) % 2 == 0)),
        (row("frozen", "patching", dest="all but y"), part & (dest_kind != "y")),
    ):  # fmt: skip
        assert measured["n"] == where.sum()
        assert measured["spearman"] == pytest.approx(stats.spearmanr(a[where], b[where]).statistic)
        assert measured["pearson"] == pytest.approx(stats.pearsonr(a[where], b[where]).statistic)
        assert measured["sign"] == pytest.approx(np.mean(a[where] * b[where] > 0))
        assert measured["difference"] == pytest.approx(np.abs(a[where] - b[where]).sum() / np.abs(b[where]).sum())
    strongest = lambda x, k: {i for _, i in sorted((-abs(w), i) for i, w in enumerate(x[part]))[:k]}
    assert row("frozen", "patching")["top_10"] == len(strongest(a, 10) & strongest(b, 10)) / 10
    assert row("integrated_gradients", "patching")["top_100"] == len(strongest(weights[WEIGHTS[0]], 100) & strongest(b, 100)) / 100
    assert row("frozen", "patching", edges="errors")["top_100"] is None
    constant = row("attribution_patching", "patching")
    assert (constant["spearman"], constant["pearson"], constant["sign"]) == (None, None, 0)


def test_what_is_refused():
    case = setting("llama", "relu", ("resid_0",))
    with pytest.raises(NothingToCompare, match="--steps 1"):
        compared(case, steps(1))
    with pytest.raises(NothingToCompare, match="--edges 0"):
        compared(case, steps(2), n_edges=0)
    with pytest.raises(NothingToCompare, match="--threshold"):
        compare_batches(*case[:2], [case[2]], steps(2, threshold=1e9), n_edges=4, n_sequences=2)
    kl = compared(case, EdgeSettings(metric=Metric.KL, steps=3))
    assert (kl[Definition.ATTRIBUTION_PATCHING] == 0).all(), "KL has no slope at the clean run"
    assert (kl[Definition.INTEGRATED_GRADIENTS] != 0).any()
    case[0].assert_no_hooks()


def test_the_command_prints_the_agreement_and_keeps_the_edges(tmp_path):
    model = save_tiny(tmp_path / "model", n_layers=2)
    task, output = tmp_path / "pairs.jsonl", tmp_path / "edges.parquet"
    pairs = [{"clean": f"w{i} w7 w9", "corrupt": f"w{i} w8 w9", "answer": " w1", "wrong_answer": " w2"} for i in range(3)]
    task.write_text("\n".join(map(json.dumps, pairs)))
    common = ("ingest", "definitions", "--model", model, "--dictionaries", "identity", "--task", task, "--atlas", tmp_path / "atlas")
    common += ("--sites", "resid_0,mlp_1", "--steps", 3, "--edges", 40)
    printed = featlas(*common, "--output", output)
    assert printed.returncode == 0, printed.stderr
    for word in ("integrated gradients", "gradient product", "frozen", "Spearman", "of 3 sequences"):
        assert word in printed.stdout
    edges = pl.read_parquet(output)
    assert edges["sequence"].n_unique() == 3
    done = json.loads(featlas(*common, "--json").stdout)
    assert done["n_edges"] == len(edges)
    assert done["agreement"] == agreement(edges).to_dicts()
    for name, value in (("--steps", 1), ("--edges", 0), ("--threshold", 1e9)):
        refused = featlas(*common, name, value)
        assert refused.returncode == 2
        assert name in refused.stderr
    assert not (tmp_path / "atlas").exists()
