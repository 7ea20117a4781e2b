"""A vision model on the engine of language models: against naive loops with hooks on the torch module, and what must hold for every set."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from featlas import cli, vision
from featlas.analysis import study as study_module
from featlas.analysis.faithfulness import CIRCUIT, COMPLEMENT, VALUES, Bootstrap
from featlas.analysis.finding import FindingOptions
from featlas.analysis.levels import Rule
from featlas.analysis.region_study import REGIONS
from featlas.errors import UserError
from featlas.ingest.effective import EdgeSettings, node_attributions, prepare
from featlas.ingest.unit_edges import attribute_units
from featlas.model.ablation import ablate_edges, ablate_nodes, clean_run
from featlas.model.baselines import Baseline, baseline_nodes
from featlas.model.binding import UnknownArchitecture
from featlas.model.masks import EdgeSet, NodeSet
from featlas.model.metrics import Metric
from featlas.model.sites import EMBED, OUTPUT, Basis, Site, SiteGraph, SiteKind, UnknownSite, parse_site
from featlas.model.tasks import batches
from featlas.model.unit_ablation import ablate_units
from featlas.model.units import UnitEdges, Units, single_features
from featlas.model.vision import (
    ImageTokenizer,
    LayeredNetwork,
    NoSuchImage,
    activations,
    bind_digits,
    image_pairs,
    moments,
    neurons,
    per_class,
    train_digits,
)
from typer.testing import CliRunner

SMALL = {"epochs": 4, "channels": (3, 4), "hidden": 12}
RESID = [Site(SiteKind.RESID, layer) for layer in range(3)]


@pytest.fixture(scope="module")
def digits():
    return train_digits(**SMALL)


@pytest.fixture(scope="module")
def binding(digits):
    return bind_digits(digits)


@pytest.fixture(scope="module")
def pairs(digits, binding):
    return image_pairs(binding, digits.labels, per_class(digits.test, digits.labels, 1), digits.train)


def numbers_of(pairs, which="clean"):
    return torch.tensor([int(getattr(pair, which).split()[1]) for pair in pairs])


def hooked(digits, images, masks, base):
    """Logits of the torch module with hooks that put dead neurons (bool, per layer) to their baseline values, layer by layer: the naive oracle."""
    handles = []
    for layer, alive, value in zip(digits.module.layers, masks, base, strict=True):
        def hook(module, args, output, alive=alive, value=value):
            return torch.where(alive.view(1, *output.shape[1:]), output, value.view(-1, *output.shape[1:]))

        handles.append(layer.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return digits.module(images)
    finally:
        for handle in handles:
            handle.remove()


def recorded(digits, images):
    """Each layer's map, flattened, by hooks."""
    seen = []
    handles = [layer.register_forward_hook(lambda m, a, output: seen.append(output.flatten(1))) for layer in digits.module.layers]
    with torch.no_grad():
        digits.module(images)
    for handle in handles:
        handle.remove()
    return seen


def baseline_values(digits, pairs, batch, baseline):
    """What each layer's neurons are worth when cut, (1 or batch, width), from the definition."""
    if baseline is Baseline.ZERO:
        return [torch.zeros_like(value[:1]) for value in recorded(digits, digits.images[:1])]
    if baseline is Baseline.MEAN:
        return [value.mean(0, keepdim=True) for value in recorded(digits, digits.images[digits.train])]
    tokens = batch.clean.pairs.corrupt if baseline is Baseline.COUNTERFACTUAL else batch.clean.pairs.donor
    return recorded(digits, digits.images[tokens[:, 0]])


def ablation_batch(digits, binding, pairs, baseline):
    dictionaries = neurons(binding)
    donors = 0 if baseline is Baseline.RESAMPLE else None
    (batch,) = batches(pairs, ImageTokenizer(len(digits.images)), batch_size=len(pairs), donor_seed=donors)
    clean = clean_run(binding, dictionaries, batch)
    return clean.with_baseline(
        baseline_nodes(binding, dictionaries, clean.pairs, clean.values, baseline, moments=moments(binding, digits.train, dictionaries))
    )


# --- the network and its binding --------------------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_network_and_nothing_else_draws(digits):
    before = torch.random.get_rng_state()
    again = train_digits(**SMALL)
    assert again.key == digits.key
    assert torch.equal(torch.random.get_rng_state(), before)
    assert train_digits(**SMALL, seed=1).key != digits.key


def test_images_are_split_within_each_class(digits):
    assert not set(digits.train.tolist()) & set(digits.test.tolist())
    assert len(digits.train) + len(digits.test) == 1797
    for digit in range(10):
        own = int((digits.labels == digit).sum())
        assert int((digits.labels[digits.test] == digit).sum()) == round(own / 3)


@pytest.mark.slow
def test_the_default_network_is_accurate():
    found = train_digits()
    assert found.accuracy(found.test) >= 0.97


def test_sites_are_the_layers_own_maps(digits, binding):
    numbers = digits.test[:7]
    run = binding.forward(numbers[:, None], dict.fromkeys([EMBED, *RESID], Basis.RESIDUAL))
    for site, expected in zip(RESID, recorded(digits, digits.images[numbers]), strict=True):
        assert torch.equal(run.values[site][:, 0], expected)
        assert binding.width(site) == expected.shape[1]
    assert torch.equal(run.values[EMBED][:, 0], digits.images[numbers].flatten(1))
    assert torch.equal(run.logits, digits.module(digits.images[numbers]))
    binding.assert_no_hooks()


def test_a_run_stops_early_and_takes_patches(digits, binding):
    numbers = digits.test[:3, None]
    run = binding.forward(numbers, {RESID[0]: Basis.RESIDUAL}, stop_early=True)
    assert run.logits is None
    assert list(run.values) == [RESID[0]]
    patched = binding.forward(numbers, {RESID[2]: Basis.RESIDUAL}, patches={RESID[1]: torch.zeros_like})
    nothing = binding.compute(RESID[2], [torch.zeros(3, 1, binding.width(RESID[1]))], patched, Basis.RESIDUAL)
    assert torch.equal(patched.values[RESID[2]], nothing)


def test_a_module_that_is_not_its_layers_is_refused(digits):
    with pytest.raises(UnknownArchitecture, match="the logits composed from its parts"):
        LayeredNetwork(digits.module, digits.module.layers, torch.nn.Linear(12, 10), digits.images)


def test_layers_are_a_chain(binding):
    graph = binding.graph(RESID)
    assert graph.parents(RESID[2]) == (RESID[1],)
    assert graph.parents(OUTPUT) == (RESID[2],)
    assert binding.graph([RESID[0], RESID[2]]).parents(RESID[2]) == (RESID[0],)
    assert not graph.looks_back(RESID[1], RESID[0])
    assert SiteGraph.of(3, False, [EMBED, RESID[0]], RESID[1], chain=True).parents(OUTPUT) == (RESID[0],)
    for name in ("attn_0", "mlp_1", "resid_3"):
        with pytest.raises(UnknownSite, match=name):
            binding.graph([parse_site(name)])
    with pytest.raises(UnknownArchitecture, match="no attention"):
        binding.attend(0, torch.zeros(1, 1, 4), None)
    with pytest.raises(UserError, match="no attention heads"):
        binding.width(RESID[0], Basis.HEADS)


def test_images_that_are_not_there(binding):
    with pytest.raises(NoSuchImage, match="image 1797"):
        binding.forward(torch.tensor([[1797]]), {})
    with pytest.raises(NoSuchImage, match="'image 3 is a 12'"):
        ImageTokenizer(10)(["image 3 is a 12"])
    with pytest.raises(NoSuchImage, match="picture"):
        ImageTokenizer(10)(["picture 3"])


def test_pairs_have_the_runner_up_as_the_wrong_answer(digits, binding, pairs):
    logits = digits.module(digits.images[numbers_of(pairs)])
    for pair, row in zip(pairs, logits, strict=True):
        own, wrong = int(pair.answer), int(pair.wrong_answer)
        assert own == int(digits.labels[int(pair.clean.split()[1])])
        assert wrong == max((c for c in range(10) if c != own), key=lambda c: float(row[c]))
        other = int(pair.corrupt.split()[1])
        assert other in digits.train.tolist()
        assert int(digits.labels[other]) == wrong
        assert pair.task == f"digit {own}"
    assert image_pairs(binding, digits.labels, numbers_of(pairs), digits.train) == pairs
    with pytest.raises(UserError, match="none of the 1 images"):
        image_pairs(binding, digits.labels, numbers_of(pairs), digits.train[:1])


def test_moments_are_those_of_the_images(digits, binding):
    found = moments(binding, digits.train, RESID)
    for site, value in zip(RESID, recorded(digits, digits.images[digits.train]), strict=True):
        assert torch.allclose(found[site].features, value.mean(0), atol=1e-6)
        assert torch.allclose(found[site].features_std, value.std(0, correction=0), atol=1e-5)
        assert not found[site].error.any()


# --- ablation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [Baseline.MEAN, Baseline.ZERO, Baseline.COUNTERFACTUAL, Baseline.RESAMPLE])
def test_nodes_are_ablated_as_by_hooks(digits, binding, pairs, baseline):
    batch = ablation_batch(digits, binding, pairs, baseline)
    base = baseline_values(digits, pairs, batch, baseline)
    images = digits.images[batch.clean.pairs.clean[:, 0]]
    rng = torch.Generator().manual_seed(3)
    masks, sets = [], []
    for density in (0.05, 0.5, 0.9):
        alive = [torch.rand(value.shape[1], generator=rng) < density for value in base]
        chosen = [(site.name, node) for site, own in zip(RESID, alive, strict=True) for node in own.nonzero().flatten().tolist()]
        own = NodeSet.of(batch.graph, [site for site, _ in chosen], [node for _, node in chosen])
        masks += [alive, [~one for one in alive]]
        sets += [own, own.inverse()]
    ends = ablate_nodes(batch, sets)
    for mask, end in zip(masks, ends, strict=True):
        assert torch.allclose(binding.logits(end), hooked(digits, images, mask, base), atol=1e-4)
    full, empty = ablate_nodes(batch, [NodeSet.full(batch.graph), NodeSet.empty(batch.graph)])
    assert torch.equal(full, batch.clean_end)
    assert torch.allclose(empty, base[-1].expand_as(empty), atol=1e-6)


def test_edges_and_units_are_ablated_as_defined(digits, binding, pairs):
    """Every target unit is read off a run of its layer in which only the units with an edge to it are alive."""
    batch = ablation_batch(digits, binding, pairs[:4], Baseline.MEAN)
    base = baseline_values(digits, pairs, batch, Baseline.MEAN)
    rng = np.random.default_rng(5)
    labels = {site: torch.tensor([*(np.arange(binding.width(site)) % 5).tolist(), 5]) for site in RESID}
    units = Units.from_labels(batch.graph, labels)
    joined = units.joined.nonzero()
    some = joined[torch.tensor(rng.random(len(joined)) < 0.5)]
    own = UnitEdges.of(units, some[:, 0].tolist(), some[:, 1].tolist())
    ends = ablate_units(batch, [own, own.inverse(), UnitEdges.full(units), UnitEdges.empty(units)])
    listed = {tuple(row) for row in some.tolist()}
    every = {tuple(row) for row in joined.tolist()}
    for end, edges in zip(ends, (listed, every - listed, every, set()), strict=True):
        assert torch.allclose(end, _naive_units(binding, batch, units, base, edges), atol=1e-4)
    assert torch.allclose(ablate_edges(batch, [own.expanded(), EdgeSet.full(batch.graph)]), ends[[0, 2]], atol=1e-4)


def _naive_units(binding, batch, units, base, edges):
    values = {RESID[0]: batch.clean.values[RESID[0]][:, 0]}
    for layer in (1, 2):
        before, site = RESID[layer - 1], RESID[layer]
        value = base[layer].expand(len(values[before]), -1).clone()
        for target in units.of[site].unique().tolist():
            live = torch.tensor([(source, target) in edges for source in units.of[before][:-1].tolist()])
            if not live.any():
                continue
            given = torch.where(live, values[before], base[layer - 1])
            members = units.of[site][:-1] == target
            value[:, members] = binding.compute(site, [given[:, None]], None, Basis.RESIDUAL)[:, 0][:, members]
        values[site] = value
    live = torch.tensor([(source, units.output) in edges for source in units.of[RESID[2]][:-1].tolist()])
    return torch.where(live, values[RESID[2]], base[2])


# --- attribution ------------------------------------------------------------------------------------------------------


def test_one_step_of_attribution_is_gradient_times_change(digits, binding, pairs):
    dictionaries = neurons(binding)
    (batch,) = batches(pairs, ImageTokenizer(len(digits.images)), batch_size=20)
    found = moments(binding, digits.train, dictionaries)
    prepared = prepare(binding, dictionaries, batch, EdgeSettings(baseline=Baseline.MEAN, steps=1), found)
    for site, features, errors in node_attributions(prepared):
        value = activations(binding, batch.clean[:, 0], [site])[site].requires_grad_()
        through = value[:, None]
        for layer in range(site.layer + 1, 3):
            through = binding.compute(RESID[layer], [through], None, Basis.RESIDUAL)
        logits = binding.logits(through[:, 0])
        rows = torch.arange(len(logits))
        (gradient,) = torch.autograd.grad((logits[rows, batch.answer] - logits[rows, batch.wrong_answer]).sum(), value)
        assert torch.allclose(features[:, 0], gradient * (value.detach() - found[site].features), atol=1e-5)
        assert not errors.any()


def test_integrated_attribution_is_complete_and_its_edges_are_its_derivatives(digits, binding, pairs):
    batch = ablation_batch(digits, binding, pairs, Baseline.MEAN)
    dictionaries, found = neurons(binding), moments(binding, digits.train, RESID)
    prepared = prepare(binding, dictionaries, batch.clean.pairs, EdgeSettings(baseline=Baseline.MEAN, steps=64), found)
    gone = batch.full(Metric.LOGIT_DIFF) - batch.measure(ablate_nodes(batch, [NodeSet.empty(batch.graph)]), Metric.LOGIT_DIFF)[0]
    for site, features, _ in node_attributions(prepared):
        if site == RESID[2]:  # the head is linear: the last layer's attributions add up to all that is lost
            assert torch.allclose(features.sum((1, 2)), gone, atol=1e-3)
    one = prepare(binding, dictionaries, batch.clean.pairs, EdgeSettings(baseline=Baseline.MEAN, steps=1), found)
    weights = attribute_units(one, single_features(batch.graph, dictionaries))  # (batch, n + 1, n + 1)
    into_y = weights[:, :-1, -1]
    last = {site: features for site, features, _ in node_attributions(one)}[RESID[2]][:, 0]
    assert torch.allclose(into_y[:, -13:-1].float(), last, atol=1e-5)


# --- the study --------------------------------------------------------------------------------------------------------

OPTIONS = vision.VisionOptions(
    finding=FindingOptions(rule=Rule.GIVEN, n_blocks=6, nulls=0), against=("ward",), random_draws=2, attributed=4, tested=3, blocks=3,
    shares=(0.1, 0.5), share=0.2, steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def verdict(digits):
    return vision.run_vision(OPTIONS, digits=digits)


def test_accuracy_by_class_is_that_of_hooked_runs(digits, verdict):
    """Every class trial of every partition, both parts, image by image."""
    base = [value.mean(0, keepdim=True) for value in recorded(digits, digits.images[digits.train])]
    _, tested = vision.study_pairs(verdict.study, digits, OPTIONS)
    values = verdict.class_values.filter(pl.col("metric") == "accuracy")
    images = digits.images[numbers_of(tested)]
    labels = digits.labels[numbers_of(tested)]
    for one in verdict.trials:
        trial, rows = one.trial, one.trial.mask.rows
        alive = [torch.isin(torch.arange(value.shape[1]), rows[rows[:, 0] == place, 1]) for place, value in enumerate(base)]
        own = values.filter((pl.col("method") == trial.method) & (pl.col("size") == trial.size) & (pl.col("draw") == trial.draw))
        for part, mask in ((CIRCUIT, alive), (COMPLEMENT, [~a for a in alive])):
            right = (hooked(digits, images, mask, base).argmax(1) == labels).float()
            measured = dict(own.filter(pl.col("part") == part).select("sequence", "value").iter_rows())
            assert [measured[pair.key] for pair in tested] == right.tolist()


def test_the_tables_are_means_of_the_values(digits, verdict):
    full = {}
    _, tested = vision.study_pairs(verdict.study, digits, OPTIONS)
    right = digits.module(digits.images[numbers_of(tested)]).argmax(1) == digits.labels[numbers_of(tested)]
    for pair, ok in zip(tested, right.tolist(), strict=True):
        full.setdefault(pair.task, []).append(ok)
    tasks = sorted(full)
    values = verdict.class_values.filter(pl.col("metric") == "accuracy")
    for row in verdict.class_table.iter_rows(named=True):
        assert row["full"] == pytest.approx(np.mean(full[row["task"]]))
        own = values.filter((pl.col("method") == row["method"]) & (pl.col("task") == row["task"]))
        own = own.filter(pl.col("part") == (CIRCUIT if row["part"] == vision.KEPT else COMPLEMENT))
        if row["ranked_for"] is not None:
            own = own.filter(pl.col("size") == tasks.index(row["ranked_for"]))
        assert row["accuracy"] == pytest.approx(own["value"].mean())
        assert row["low"] <= row["accuracy"] + 1e-9
        assert row["high"] >= row["accuracy"] - 1e-9
    ranked = verdict.class_table.filter((pl.col("method") == REGIONS) & (pl.col("part") == vision.CUT))
    cells = {(r, t): f - a for r, t, a, f in ranked.select("ranked_for", "task", "accuracy", "full").iter_rows()}
    own = np.mean([cells[t, t] for t in tasks])
    others = np.mean([cells[r, t] for r in tasks for t in tasks if r != t])
    row = verdict.targeted.row(by_predicate=(pl.col("method") == REGIONS) & (pl.col("part") == vision.CUT), named=True)
    assert (row["own"], row["others"], row["difference"]) == pytest.approx((own, others, own - others))


def test_blocks_of_a_class_are_those_of_greatest_attribution(verdict):
    regions = verdict.verdict.regions
    blocks = [unit for unit in range(len(regions.units)) if regions.live[unit]]
    n = round(OPTIONS.share * len(blocks))
    for one in verdict.trials:
        if one.trial.method == REGIONS:
            strongest = sorted(blocks, key=lambda unit: (-regions.by_task[one.ranked_for][unit], unit))[:n]
            assert torch.equal(one.trial.mask.rows, regions.units.nodes(strongest).rows)
            assert one.share_of_features == pytest.approx(sum(regions.live[strongest]) / regions.live.sum())


def test_random_partitions_have_the_regions_sizes(verdict):
    first = sorted(verdict.verdict.regions.live.tolist())
    drawn = [own for own in verdict.verdict.competitors if own.method == "random blocks"]
    assert len(drawn) == 2
    assert all(sorted(own.live.tolist()) == first for own in drawn)


@pytest.mark.slow
def test_it_is_the_engine_of_language_models_and_reproducible(digits, verdict, monkeypatch):
    calls = []
    monkeypatch.setattr(study_module, "ablate_nodes", lambda batch, sets, **rest: calls.append(len(sets)) or ablate_nodes(batch, sets, **rest))
    again = vision.run_vision(OPTIONS, digits=digits)
    assert sum(calls) > len(verdict.trials)
    assert again.class_values.equals(verdict.class_values)
    assert again.parcellation.key == verdict.parcellation.key
    assert again.targeted.equals(verdict.targeted)


def test_the_matrix_is_what_single_blocks_cost(digits, verdict):
    base = [value.mean(0, keepdim=True) for value in recorded(digits, digits.images[digits.train])]
    _, tested = vision.study_pairs(verdict.study, digits, OPTIONS)
    images, labels = digits.images[numbers_of(tested)], digits.labels[numbers_of(tested)]
    clean = (digits.module(images).argmax(1) == labels).double()
    regions = verdict.verdict.regions
    rows = verdict.matrix.filter(pl.col("method") == REGIONS)
    assert rows.height == 3 * 10
    for removed, task, lost in rows.select("removed", "task", "lost").iter_rows():
        nodes = regions.units.nodes([regions.units.names.index(removed)]).rows
        alive = [~torch.isin(torch.arange(value.shape[1]), nodes[nodes[:, 0] == place, 1]) for place, value in enumerate(base)]
        right = (hooked(digits, images, alive, base).argmax(1) == labels).double()
        own = torch.tensor([pair.task == task for pair in tested])
        assert lost == pytest.approx(float((clean - right)[own].mean()), abs=1e-9)


def class_values(accuracies):
    """Values of two classes with four images each: method → part → [ranking][class] accuracy."""
    rows = [
        {
            "method": method, "ablation": "node", "part": part, "size": ranking, "draw": 0, "metric": "accuracy", "baseline": "mean",
            "split": "held-out", "sequence": f"{task}-{image}", "task": f"digit {task}", "value": float(image < 4 * accuracy),
            "full": 1.0, "empty": 0.5,
        }
        for method, parts in accuracies.items() for part, table in parts.items() for ranking, per_task in enumerate(table)
        for task, accuracy in enumerate(per_task) for image in range(4)
    ]  # fmt: skip
    return pl.DataFrame(rows).select(pl.col(name).cast(dtype) for name, dtype in VALUES.items())


def test_targeted_by_hand():
    """Regions: cutting a class's blocks costs it 3/4 and the other 1/4; the other partition costs both 1/2; a random choice costs both 1/4."""
    nothing = [[0.5, 0.5], [0.5, 0.5]]
    values = class_values({
        REGIONS: {COMPLEMENT: [[0.25, 0.75], [0.75, 0.25]], CIRCUIT: [[1.0, 0.5], [0.5, 1.0]]},
        "ward": {COMPLEMENT: [[0.5, 0.5], [0.5, 0.5]], CIRCUIT: nothing},
        vision.CHOICE: {COMPLEMENT: [[0.75, 0.75]], CIRCUIT: [[0.5, 0.5]]},
    })  # fmt: skip
    table = vision.targeted(values, dict.fromkeys((REGIONS, "ward", vision.CHOICE), 0.1), bootstrap=Bootstrap(50))
    found = {(m, p): (o, x, d, b) for m, p, o, x, d, b in table.select("method", "part", "own", "others", "difference", "beyond").iter_rows()}
    assert found[REGIONS, "cut"] == (0.75, 0.25, 0.5, None)
    assert found["ward", "cut"] == (0.5, 0.5, 0.0, 0.5)
    assert found[vision.CHOICE, "cut"] == (0.25, 0.25, None, None)
    assert found[REGIONS, "kept"] == (1.0, 0.5, 0.5, None)
    assert found["ward", "kept"] == (0.5, 0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"share": 1.0}, "--share 1 "), ({"tested": 1}, "--tested 1"), ({"against": ("random",)}, "'random' is no method"), ({"steps": 0}, "--steps 0")],
)  # fmt: skip
def test_options_out_of_range(change, said):
    with pytest.raises(UserError, match=said):
        replace(OPTIONS, **change).check()


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ["analyze", "vision", "--epochs", "1", "--attributed", "2", "--tested", "2", "--blocks", "2", "--random-draws", "1", "--nulls", "0",
         "--level", "5", "--against", "none", "--shares", "0.2", "--steps", "1"]  # fmt: skip


@pytest.mark.slow
def test_the_command(tmp_path):
    page, table = tmp_path / "page.html", tmp_path / "classes.csv"
    done = CliRunner().invoke(cli.app, [*QUICK, "--gallery", str(page), "--output", str(table)])
    assert done.exit_code == 0, done.output
    assert "accuracy lost" in done.output
    assert page.stat().st_size > 1_000_000
    assert pl.read_csv(table).columns == list(vision.CLASS_TABLE)
    done = CliRunner().invoke(cli.app, [*QUICK, "--json"])
    found = json.loads(done.stdout)
    assert {name: site["n_blocks"] for name, site in found["sites"].items()} == {"resid_0": 5, "resid_1": 5, "resid_2": 5}
    assert {row["method"] for row in found["targeted"]} == {"regions", "random blocks", "features", "random choice"}


@pytest.mark.parametrize("wrong", [["--share", "0"], ["--against", "heads"], ["--show", "0"], ["--level", "best"], ["--shares", "2"]])
def test_the_command_refuses(wrong):
    done = CliRunner().invoke(cli.app, [*QUICK, *wrong])
    assert done.exit_code != 0
    assert isinstance(done.exception, UserError)
