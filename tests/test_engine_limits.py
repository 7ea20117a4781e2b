"""What the engine does at its limits: memory, half precision, numbers that overflow, screens, estimates of cost."""

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from featlas.errors import UserError
from featlas.ingest.cost import expected_cost
from featlas.ingest.effective import (
    Baseline,
    EdgeSettings,
    FirstFactor,
    NotFinite,
    Positions,
    TooManyEdges,
    attribute,
    prepare,
    screened,
)
from featlas.model.metrics import Metric
from featlas.model.sites import parse_site
from featlas.model.targets import LogitTarget, ProbeTarget

from .compare_edges import assert_equal, engine_edges, setting, steps

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps

SITES = ("resid_0", "attn_1", "mlp_1", "resid_1")


def relative_l1(edges, exact):
    """Σ|difference| / Σ|exact|."""
    return sum(abs(edges.get(k, 0.0) - exact.get(k, 0.0)) for k in edges.keys() | exact.keys()) / sum(map(abs, exact.values()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_half_precision_tails_are_close_and_say_how_close(family):
    binding, dictionaries, batch = setting(family, "relu", SITES)
    exact = engine_edges(binding, dictionaries, batch, steps(4))
    settings = steps(4, tail_dtype="bfloat16")
    prepared = prepare(binding, dictionaries, batch, settings)
    blocks = list(attribute(prepared))
    tally = prepared.tally
    assert sum(len(block.weight) for block in blocks) > 0.9 * len(exact)
    assert 0 < relative_l1(engine_edges(binding, dictionaries, batch, settings), exact) < 0.05
    sampled = tally.tail_error / tally.tail_scale
    assert 1e-4 < sampled < 0.1


def test_overflow_in_half_precision_is_an_error_and_loses_no_edge_silently():
    binding, dictionaries, batch = setting("llama", "relu", SITES)
    with torch.no_grad():
        binding.blocks[1].mlp.up_proj.weight.mul_(3e4)
        binding.blocks[1].mlp.down_proj.weight.div_(3e4)
    assert engine_edges(binding, dictionaries, batch, steps(3))
    with pytest.raises(NotFinite, match="not finite in float16"):
        engine_edges(binding, dictionaries, batch, steps(3, tail_dtype="float16"))


def test_interpolation_of_a_sequence_does_not_depend_on_its_companions():
    binding, dictionaries, batch = setting("llama", "relu", SITES, batch=3)
    settings = steps(4, first_factor=FirstFactor.INTERPOLATED)
    together = engine_edges(binding, dictionaries, batch, settings)
    alone = {}
    for i in range(3):
        one = setting("llama", "relu", SITES, batch=3, only=i)[2]
        alone |= {(i, *key[1:]): w for key, w in engine_edges(binding, dictionaries, one, settings).items()}
    assert_equal(together, alone, tolerance=2e-5)


@pytest.mark.slow
def test_the_default_tolerance_keeps_features_within_a_thousandth():
    for kind in ("topk", "relu"):
        binding, dictionaries, batch = setting("llama", kind)
        exact = engine_edges(binding, dictionaries, batch, steps(10))
        quick = engine_edges(binding, dictionaries, batch, steps(10, first_factor=FirstFactor.INTERPOLATED))
        features = {k: w for k, w in exact.items() if k[4] != "y" and k[5] != 24}
        assert relative_l1({k: w for k, w in quick.items() if k in features}, features) < 1e-3
    assert EdgeSettings().first_factor is FirstFactor.EXACT


def test_too_many_edges_are_an_error_that_names_ways_out():
    binding, dictionaries, batch = setting("llama", "identity", ("resid_0", "resid_1"), n_layers=3, length=40)
    settings = EdgeSettings(steps=1, positions=Positions.KEEP, baseline=Baseline.ZERO, memory=2**24)
    with pytest.raises(TooManyEdges, match=r"--threshold.*--memory"):
        list(attribute(prepare(binding, dictionaries, batch, settings)))
    summed = list(attribute(prepare(binding, dictionaries, batch, replace(settings, positions=Positions.SUM))))
    assert sum(len(block.weight) for block in summed) == 2 * 16 * (16 + 1), "sums over positions are few"


def test_a_screen_holds_no_edges_and_keeps_what_passes_it():
    binding, dictionaries, batch = setting("llama", "identity", SITES, batch=4, length=40)
    settings = EdgeSettings(steps=2, threshold=1e-6, max_edges=3, positions=Positions.KEEP, screen=1e-9, memory=2**24)
    mask = screened(prepare(binding, dictionaries, batch, settings))
    assert any(nodes.any() for nodes in mask.values())
    full = engine_edges(binding, dictionaries, batch, replace(settings, screen=None))
    assert_equal(engine_edges(binding, dictionaries, batch, settings), full)


@pytest.mark.parametrize("how", list(FirstFactor))
def test_the_cost_announced_covers_what_is_run(how):
    binding, dictionaries, batch = setting("llama", "topk", SITES, batch=3)
    prepared = prepare(binding, dictionaries, batch, steps(5, first_factor=how, tolerance=1.0))
    cost = expected_cost(prepared)
    list(attribute(prepared))
    assert prepared.tally.rows <= cost.rows + 3  # and one row of the output for each sequence
    # A feature whose way goes to both sides of its clean value takes two runs.
    assert prepared.tally.evaluations <= (2 if how is FirstFactor.INTERPOLATED else 1) * cost.evaluations
    assert cost.sequences == 3
    assert cost.of(12).rows == 4 * cost.rows
    assert cost.seconds > 0
    assert (cost.evaluations == 0) == (how is FirstFactor.CLEAN)


def test_settings_that_mean_nothing_together_are_refused():
    for changes, message in [
        ({"tail_dtype": "bfloat16", "first_factor": FirstFactor.INTERPOLATED}, "rounds away"),
        ({"tail_dtype": "int8"}, "--tail-dtype int8"),
        ({"screen": 0.0}, "--screen 0.0"),
        ({"tolerance": -1.0}, "--tolerance -1.0"),
        ({"memory": 1}, "--memory of 1 bytes"),
    ]:
        with pytest.raises(UserError, match=message):
            EdgeSettings(**changes).check()
    binding, dictionaries, batch = setting("llama", "relu", SITES)
    with pytest.raises(UserError, match="kl"):  # the target counts, not the settings' metric
        prepare(binding, dictionaries, batch, steps(1), target=LogitTarget(Metric.KL))
    probe = ProbeTarget(parse_site("resid_1"), torch.ones(binding.d_model), torch.zeros(()))
    assert engine_edges(binding, dictionaries, batch, steps(1, metric=Metric.KL), target=probe)


def test_identity_leaves_out_what_changes_no_edge():
    settings = EdgeSettings(steps=10, tolerance=0.3, memory=2**30)
    assert settings.identity == replace(settings, memory=2**28, tolerance=0.1).identity
    assert replace(settings, steps=1, first_factor=FirstFactor.CLEAN).identity == replace(settings, steps=1, tail_dtype="bfloat16").identity
    assert settings.identity != replace(settings, baseline=Baseline.ZERO).identity


class _Peak(threading.Thread):
    """Watches this process' resident memory, in bytes above the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_at, self.most, self.running = self._now(), 0, True

    @staticmethod
    def _now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def run(self):
        while self.running:
            self.most = max(self.most, self._now() - self.start_at)
            time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [1, 3])
def test_memory_keeps_to_what_is_allowed(n_steps):
    """A frontier that would take gigabytes at once stays within three times a small allowance (its pieces are estimates)."""
    binding, dictionaries, batch = setting("llama", "relu", ("embed", "resid_1", "resid_2"), n_layers=3, d_sae=256, batch=1, length=24)
    allowed = 2**25
    settings = EdgeSettings(steps=n_steps, baseline=Baseline.ZERO, first_factor=FirstFactor.CLEAN, memory=allowed)
    gc.collect()
    peak = _Peak()
    peak.start()
    edges = sum(len(block.weight) for block in attribute(prepare(binding, dictionaries, batch, settings)))
    peak.running = False
    peak.join()
    assert edges > 10_000
    assert peak.most < 3 * allowed, f"{peak.most / 2**20:.0f} MB"
