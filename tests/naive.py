"""The definition of an effective edge, one downstream feature at a time, by whole-model runs: the engine's oracle.

Nothing here is shared with the engine but the hooks: a site is recomputed by running the whole model with its parents'
values replaced, the node is put into a second whole run, and one backward pass gives the effects of all upstream nodes.
"""

from collections.abc import Mapping

import torch
from featlas.ingest.effective import Baseline, EdgeSettings, NodeMeans, Positions
from featlas.model.binding import Binding
from featlas.model.dictionaries import Dictionary
from featlas.model.metrics import evaluate
from featlas.model.sites import OUTPUT, Site
from featlas.model.tasks import PairBatch
from torch import Tensor

Edge = tuple[int, str, int, int, str, int, int]
"""(sequence, source site, node, position, target site, node, position); the error node's number is d_sae."""


def naive_edges(
    binding: Binding, dictionaries: Mapping[Site, Dictionary], pairs: PairBatch, settings: EdgeSettings, means: Mapping[Site, NodeMeans] | None = None
) -> dict[Edge, float]:
    """Every kept single-position edge of every sequence, straight from the definition at one step (α = 1)."""
    edges: dict[Edge, float] = {}
    for sequence in range(len(pairs.answer)):
        edges.update(_sequence_edges(binding, dictionaries, pairs, sequence, settings, means or {}))
    return edges


def _sequence_edges(binding, dictionaries, pairs, sequence, settings, means) -> dict[Edge, float]:
    graph = binding.graph(dictionaries)
    bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}
    one = slice(sequence, sequence + 1)
    clean, corrupt = pairs.clean[one], pairs.corrupt[one]
    first = int(pairs.first_difference[sequence])
    with torch.no_grad():
        run, other = binding.forward(clean, bases), binding.forward(corrupt, bases)
    nodes = {s: deltas(d, run.values[s][0], other.values[s][0], settings.baseline, first, means.get(s)) for s, d in dictionaries.items()}
    n_pos = clean.shape[1]
    wanted = {(OUTPUT, n_pos - 1, 0)}
    kept: dict[Edge, float] = {}
    for site in reversed(graph.sites):
        for dest, dest_pos, dest_index in sorted((w for w in wanted if w[0] == site), key=lambda w: w[1:]):
            if not graph.parents(dest):
                continue
            found = {}
            gradients = downstream_gradients(binding, dictionaries, pairs, sequence, settings, (dest, dest_pos, dest_index), run)
            for src, gradient in gradients.items():  # (pos, width)
                delta, error_delta = nodes[src]
                effects = torch.cat([(gradient @ dictionaries[src].W_dec.T) * delta, (gradient * error_delta).sum(-1, keepdim=True)], dim=-1)
                for src_pos, src_index in effects.nonzero().tolist():
                    weight = float(effects[src_pos, src_index])
                    if abs(weight) >= settings.threshold:
                        found[sequence, src.name, src_index, src_pos, dest.name, dest_index, dest_pos] = weight
            if settings.max_edges is not None:
                order = {s.name: i for i, s in enumerate(graph.sites)}
                ranked = sorted(found, key=lambda e: (-abs(found[e]), order[e[1]], e[2], e[3]))
                found = {e: found[e] for e in ranked[: settings.max_edges]}
            wanted |= {(next(s for s in graph.sites if s.name == e[1]), e[3], e[2]) for e in found}
            kept.update(found)
    return kept


def deltas(dictionary: Dictionary, clean: Tensor, corrupt: Tensor, baseline: Baseline, first: int, means: NodeMeans | None) -> tuple[Tensor, Tensor]:
    """(pos, d_sae) and (pos, width): clean minus baseline for features and error."""
    nodes = dictionary.encode(clean)
    error = clean - dictionary.decode(nodes)
    if baseline is Baseline.ZERO:
        return nodes, error
    if baseline is Baseline.MEAN:
        return nodes - means.features, error - means.error
    other = dictionary.encode(corrupt)
    delta, error_delta = nodes - other, error - (corrupt - dictionary.decode(other))
    delta[:first], error_delta[:first] = 0, 0  # causality: nothing differs before the first differing token
    return delta, error_delta


def downstream_gradients(binding, dictionaries, pairs, sequence, settings, node, run) -> dict[Site, Tensor]:
    """Gradient of the metric with respect to every parent site's value, (pos, width), through node (site, pos, index) only."""
    dest, pos, index = node
    one = slice(sequence, sequence + 1)
    graph = binding.graph(dictionaries)
    bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}
    leaves = {p: run.values[p].clone().requires_grad_() for p in graph.parents(dest)}
    with torch.enable_grad():
        moved = binding.forward(pairs.clean[one], bases, patches={p: (lambda x, v=v: v) for p, v in leaves.items()})
        if dest == OUTPUT:
            logits = moved.logits
        else:
            dictionary = dictionaries[dest]
            change = torch.zeros_like(run.values[dest])
            value, clean = moved.values[dest][0, pos], run.values[dest][0, pos]
            if index == dictionary.d_sae:
                error = lambda x: x - dictionary.decode(dictionary.encode(x))
                change[0, pos] = error(value) - error(clean)
            else:
                change[0, pos] = (dictionary.encode(value)[index] - dictionary.encode(clean)[index]) * dictionary.W_dec[index]
            logits = binding.forward(pairs.clean[one], bases, patches={dest: lambda x: run.values[dest] + change}).logits
        metric = evaluate(settings.metric, logits, pairs.answer[one], pairs.wrong_answer[one], run.logits)
        grads = torch.autograd.grad(metric.sum(), list(leaves.values()), allow_unused=True)
    return {p: torch.zeros_like(leaves[p])[0] if g is None else g[0] for p, g in zip(leaves, grads, strict=True)}


def over_positions(edges: Mapping[Edge, float], how: Positions) -> dict[tuple, float]:
    """Aggregate single-position edges over positions: their sum, or the signed effect of greatest magnitude."""
    merged: dict[tuple, list[float]] = {}
    for (sequence, src, i, _, dest, j, _), weight in edges.items():
        merged.setdefault((sequence, src, i, dest, j), []).append(weight)
    return {key: sum(w) if how is Positions.SUM else max(w, key=abs) for key, w in merged.items()}
