"""The engine on the real language model with its trained dictionaries, against the naive definition on the nodes that matter most."""

import pytest
import torch
from featlas.ingest.effective import EdgeSettings, Positions, attribute, prepare
from featlas.model.binding import bind
from featlas.model.dictionary_sources import load_dictionaries
from featlas.model.loading import load_model
from featlas.model.sites import OUTPUT
from featlas.model.tasks import batches, build_task

from .naive import deltas, downstream_gradients

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
THRESHOLD = 0.02


def test_equal_to_the_definition_on_the_strongest_nodes():
    model = load_model("smollm2")
    binding, dictionaries = bind(model), dict(load_dictionaries("demo", model))
    batch = next(batches(build_task("agreement", model.tokenizer, n=1), model.tokenizer, batch_size=1))
    prepared = prepare(binding, dictionaries, batch, EdgeSettings(positions=Positions.KEEP, threshold=THRESHOLD))
    sites = prepared.graph.sites
    rows = {}
    for block in attribute(prepared):
        for _, su, iu, pu, sd, j, pd, w in zip(*(column.tolist() for column in block), strict=True):
            rows.setdefault((sites[sd], pd, j), {})[sites[su], pu, iu] = w
    strongest = sorted(rows, key=lambda node: -sum(map(abs, rows[node].values())))[:10]
    assert OUTPUT in {site for site, _, _ in strongest}
    assert any(site in dictionaries and j == dictionaries[site].d_sae for site, _, j in strongest), "no error node among them"
    corrupt = binding.forward(batch.corrupt, prepared.bases).values
    first = int(batch.first_difference[0])
    for node in strongest:
        found = {}
        scale = 0.0
        for src, gradient in downstream_gradients(binding, dictionaries, batch, 0, prepared.settings, node, prepared.run).items():
            dictionary = dictionaries[src]
            delta, error = deltas(dictionary, prepared.values[src][0], corrupt[src][0], prepared.settings.baseline, first, None)
            effects = torch.cat([(gradient @ dictionary.W_dec.T) * delta, (gradient * error).sum(-1, keepdim=True)], -1)
            scale = max(scale, float(effects.abs().max()))
            found |= {(src, p, i): float(effects[p, i]) for p, i in (effects.abs() >= 0.9 * THRESHOLD).nonzero().tolist()}
        for edge, weight in rows[node].items():
            assert weight == pytest.approx(found[edge], abs=1e-5 * max(scale, 1.0)), (node, edge)
        missing = [edge for edge, weight in found.items() if abs(weight) >= THRESHOLD + 1e-5 * max(scale, 1.0) and edge not in rows[node]]
        assert not missing, (node, missing)
