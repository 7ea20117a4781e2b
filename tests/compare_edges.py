"""Tiny cases for the attribution engine, its edges as a dictionary, and when two such dictionaries are equal."""

import torch
from featlas.ingest.effective import EdgeSettings, Positions, attribute, prepare
from featlas.model.baselines import NodeMoments
from featlas.model.binding import bind
from featlas.model.sites import Basis, SiteKind, parse_site

from .micro import tiny_module
from .micro_dictionaries import tiny_dictionary
from .micro_pairs import tiny_pairs

ALL = ("embed", "attn_0", "mlp_0", "resid_0", "attn_1", "mlp_1", "resid_1")


def setting(family="llama", kind="topk", names=ALL, heads=False, n_layers=2, d_sae=24, **pairs):
    """A tiny model, random dictionaries of one kind at the named sites, and a batch of pairs made with the keywords `pairs`."""
    binding = bind(tiny_module(family, n_layers=n_layers))
    batch = tiny_pairs(**pairs)
    dictionaries = {}
    for i, site in enumerate(parse_site(n) for n in names):
        basis = Basis.HEADS if heads and site.kind is SiteKind.ATTN else Basis.RESIDUAL
        values = binding.forward(batch.clean, {site: basis}).values[site]
        width = binding.width(site, basis)
        dictionaries[site] = tiny_dictionary(kind, width, seed=i, basis=basis, sample=values, n_heads=binding.n_heads, d_sae=d_sae)
    return binding, dictionaries, batch


def engine_edges(binding, dictionaries, batch, settings, means=None, target=None):
    """The engine's edges as the naive reference writes them."""
    prepared = prepare(binding, dictionaries, batch, settings, means, *([] if target is None else [target]))
    names = [s.name for s in prepared.graph.sites]
    edges = {}
    for b in attribute(prepared):
        for s, su, iu, pu, sd, j, pd, w in zip(*(c.tolist() for c in b), strict=True):
            key = (s, names[su], iu, pu, names[sd], j, pd)
            assert key not in edges, f"edge {key} came twice"
            edges[key] = w
    return edges


def assert_equal(ours, theirs, tolerance=1e-5):
    """Same edges, weights equal to `tolerance` of the largest weight into the same site (fp32 rounding is relative to that)."""
    assert theirs, "the reference found no edge: the comparison would say nothing"
    scale = {}
    for (*_, dest, _, _), w in theirs.items():
        scale[dest] = max(scale.get(dest, 0.0), abs(w))
    clear = {key for key, w in theirs.items() if abs(w) > tolerance * scale[key[4]]}
    assert clear <= ours.keys(), f"{len(clear - ours.keys())} edges are missing"
    for key in ours.keys() | theirs.keys():
        difference = abs(ours.get(key, 0.0) - theirs.get(key, 0.0))
        assert difference <= tolerance * scale.get(key[4], 0.0), (key, ours.get(key), theirs.get(key), scale.get(key[4]))


def steps(n, **others):
    """Settings of `n` steps that keep positions."""
    return EdgeSettings(positions=Positions.KEEP, steps=n, **others)


def random_means(dictionaries, seed=9):
    """Some mean nodes for the mean baseline."""
    generator = torch.Generator().manual_seed(seed)
    return {s: NodeMoments(torch.rand(d.d_sae, generator=generator), torch.rand(d.d_in, generator=generator)) for s, d in dictionaries.items()}


def random_moments(dictionaries, n_pos=4, seed=9, dtype=torch.float32):
    """Some means, over positions and of the first `n_pos`, and deviations: small ones, so that noise leaves the path short."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.rand(*shape, generator=generator).to(dtype)
    return {
        s: NodeMoments(random(d.d_sae), random(d.d_in), 0.2 * random(d.d_sae), 0.2 * random(d.d_in), random(n_pos, d.d_sae), random(n_pos, d.d_in))
        for s, d in dictionaries.items()
    }


def in_float64(case):
    """The same case in float64; but the norms of all families but GPT-2 and GPT-NeoX compute in float32, too little for finite differences."""
    binding, dictionaries, batch = case
    binding.module.double()
    return binding, {s: d.to("cpu", torch.float64) for s, d in dictionaries.items()}, batch


def assert_only_where_the_architecture_has_edges(edges, binding, dictionaries, batch, local_sites):
    """Between all sites that read each other and no others, never ahead, never before anything differs, at one position into `local_sites`."""
    graph = binding.graph(dictionaries)
    allowed = {(p.name, s.name) for s in graph.sites for p in graph.parents(s)}
    assert {(k[1], k[4]) for k in edges} == allowed
    assert all(k[3] <= k[6] for k in edges), "an edge looks ahead"
    first = batch.first_difference.tolist()
    assert all(k[3] >= first[k[0]] for k in edges), "an edge starts before anything differs"
    local = [k for k in edges if k[4] in local_sites]
    assert local
    assert all(k[3] == k[6] for k in local), "a position-local site reads another position"
    return allowed
