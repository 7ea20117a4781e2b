"""Tiny models with baselines and random circuits, for the engine of ablated models and its oracle."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from featlas.model.ablation import AblationBatch, Errors, clean_run
from featlas.model.baselines import Baseline, NodeMoments, NodeValues, baseline_nodes
from featlas.model.binding import Binding, bind
from featlas.model.dictionaries import Dictionary
from featlas.model.masks import ERROR, SHARED, EdgeSet, NodeSet
from featlas.model.pairs import PairBatch
from featlas.model.sites import OUTPUT, Basis, Site, SiteGraph, SiteKind, parse_site
from featlas.model.targets import FeatureTarget, ProbeTarget
from torch import Tensor

from .micro import FAMILIES, tiny_module
from .micro_dictionaries import KINDS, tiny_dictionary
from .micro_pairs import tiny_pairs
from .naive_ablation import through_attention

WITHOUT_HEADS = tuple(kind for kind in KINDS if kind != "per_head_linear")
ARBITRARY = "arbitrary"
"""A baseline of random numbers: for every sequence and position others, and none follows from the others."""

BASELINES = (*(baseline.value for baseline in Baseline), ARBITRARY)
_BINDINGS: dict[tuple, Binding] = {}  # nothing changes a model: tests share them


@dataclass(frozen=True)
class Case:
    """A model, its dictionaries, a batch of pairs, and a baseline for every node, over all positions."""

    binding: Binding
    dictionaries: Mapping[Site, Dictionary]
    pairs: PairBatch
    base: Mapping[Site, NodeValues]
    target: object | None = None

    @property
    def graph(self) -> SiteGraph:
        site = None if self.target is None else self.target.site
        return SiteGraph.of(self.binding.n_layers, self.binding.parallel, self.dictionaries, target=site)

    @property
    def length(self) -> int:
        return self.pairs.clean.shape[1]

    @property
    def d_sae(self) -> dict[Site, int]:
        return {site: dictionary.d_sae for site, dictionary in self.dictionaries.items()}

    def batch(self) -> AblationBatch:
        """What the engine works on."""
        return clean_run(self.binding, self.dictionaries, self.pairs, self.target).with_baseline(self.base)

    def oracle(self) -> tuple:
        """What the naive functions take first."""
        return self.binding, self.dictionaries, self.pairs, self.base

    def only(self, *sequences: int) -> "Case":
        """The same with some of its sequences, in that order."""
        own = torch.tensor(sequences)
        base = {
            site: NodeValues(*(part[own] if len(part) > 1 else part for part in (values.features, values.error)))
            for site, values in self.base.items()
        }
        return replace(self, pairs=_some(self.pairs, own), base=base)


def _some(pairs: PairBatch, own: Tensor) -> PairBatch:
    tensors = {name: value[own] for name, value in vars(pairs).items() if isinstance(value, Tensor)}
    return replace(pairs, pairs=tuple(pairs.pairs[i] for i in own.tolist()), **tensors)


def tiny_binding(family: str, n_layers: int = 2, *, dtype: torch.dtype = torch.float32, **sizes: int) -> Binding:
    """A bound tiny model; the same object for the same arguments."""
    key = (family, n_layers, dtype, *sorted(sizes.items()))
    if key not in _BINDINGS:
        _BINDINGS[key] = bind(tiny_module(family, n_layers=n_layers, dtype=dtype, **sizes))
    return _BINDINGS[key]


def tiny_case(
    family="llama", kinds: Mapping[str, str] | str = "topk", names=("embed", "attn_0", "mlp_0", "resid_0", "mlp_1"), *,
    baseline=ARBITRARY, n_layers=2, d_model=8, d_sae=8, heads=False, batch=2, length=4, target=None, seed=0,
    dtype=torch.float32,
) -> Case:  # fmt: skip
    """A case with random dictionaries at the named sites; `kinds` is one for all sites, or one per name."""
    binding = tiny_binding(family, n_layers, d_model=d_model, n_heads=2, dtype=dtype)
    pairs = tiny_pairs(batch, length, seed=seed + 5)
    pairs = replace(pairs, donor=pairs.clean.roll(1, 0) if batch > 1 else (pairs.clean + 11) % 48)
    dictionaries = {}
    for i, site in enumerate(parse_site(name) for name in names):
        kind = kinds if isinstance(kinds, str) else kinds[site.name]
        basis = Basis.HEADS if site.kind is SiteKind.ATTN and (heads or kind == "per_head_linear") else Basis.RESIDUAL
        values = binding.forward(pairs.clean, {site: basis}).values[site]
        width = binding.width(site, basis)
        drawn = tiny_dictionary(kind, width, seed=seed + i, basis=basis, sample=values.float(), n_heads=2, d_sae=d_sae)
        dictionaries[site] = drawn.to("cpu", dtype)
    case = Case(binding, dictionaries, pairs, {}, target)
    return replace(case, base=base_of(case, baseline, seed))


@torch.no_grad()
def base_of(case: Case, baseline: str, seed: int = 0) -> dict[Site, NodeValues]:
    """A baseline of every node, over all positions of the sequences."""
    values = case.binding.forward(case.pairs.clean, {site: d.basis for site, d in case.dictionaries.items()}).values
    generator = torch.Generator().manual_seed(seed + 31)
    random_like = lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)
    if baseline == ARBITRARY:
        return {s: NodeValues(random_like(d.encode(values[s])), random_like(values[s])) for s, d in case.dictionaries.items()}
    uniform = lambda width: torch.rand(width, generator=generator).to(case.binding.precision)
    moments = {s: NodeMoments(uniform(d.d_sae), uniform(d.d_in), uniform(d.d_sae), uniform(d.d_in)) for s, d in case.dictionaries.items()}
    return baseline_nodes(case.binding, case.dictionaries, case.pairs, values, Baseline(baseline), moments=moments, seed=seed)


# --- random sets -----------------------------------------------------------------------------------------------------


def random_nodes(case: Case, rng: random.Random, share: float, *, by_position=False, complement=False) -> NodeSet:
    """A set of a share of all nodes."""
    rows = [
        (site.name, node, pos) for site, d_sae in case.d_sae.items() if site in case.graph.sites for node in (ERROR, *range(d_sae))
        for pos in (range(case.length) if by_position else [SHARED]) if rng.random() < share
    ]  # fmt: skip
    made = NodeSet.of(case.graph, *([row[i] for row in rows] for i in range(3))) if rows else NodeSet.empty(case.graph)
    return made.inverse() if complement else made


def random_edges(case: Case, rng: random.Random, share: float, density: float, *, by_position=False, complement=False) -> EdgeSet:
    """A set of a share `density` of the edges among a share of the nodes of each site, and from them to y.

    By position only those that the architecture has, into y at the target's position.
    """
    graph = case.graph
    nodes = {
        site: [node for node in (ERROR, *range(case.d_sae[site])) if rng.random() < share] if site != OUTPUT else [0] for site in graph.sites
    }  # fmt: skip
    end = case.length - 1 if case.target is None else case.target.position(case.length)
    positions = [(p, q) for q in range(case.length) for p in range(q + 1)] if by_position else [(SHARED, SHARED)]
    rows = [
        (parent.name, u, site.name, v, p, q)
        for site in graph.sites for parent in graph.parents(site) for u in nodes[parent] for v in nodes[site] for p, q in positions
        if rng.random() < density and (site != OUTPUT or q in (SHARED, end)) and (p == q or through_attention(graph, parent, site))
    ]  # fmt: skip
    made = EdgeSet.of(graph, *([row[i] for row in rows] for i in range(6))) if rows else EdgeSet.empty(graph)
    return made.inverse() if complement else made


# --- a random case ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A case, sets of edges and of nodes, and what becomes of error nodes."""

    case: Case
    edges: tuple[EdgeSet, ...]
    nodes: tuple[NodeSet, ...]
    errors: Errors


def random_experiment(seed: int) -> Experiment:
    """Every choice drawn: family, layers, sites, dictionaries, basis, baseline, target, positions, density, complement, error nodes.

    In double precision: among many random cases some magnify single precision's rounding, which differs from processor to processor.
    """
    rng = random.Random(seed)
    family, n_layers = FAMILIES[seed % len(FAMILIES)], rng.choice([1, 2, 2, 3])
    every = ["embed", *(f"{kind}_{layer}" for layer in range(n_layers) for kind in ("attn", "mlp", "resid"))]
    names = tuple(name for name in every if rng.random() < rng.choice([0.4, 0.7])) or (rng.choice(every),)
    attention = lambda name: name.startswith("attn") and rng.random() < 0.3
    kinds = {name: "per_head_linear" if attention(name) else rng.choice(WITHOUT_HEADS) for name in names}
    sizes = {"batch": rng.choice([1, 2]), "length": rng.choice([3, 4]), "d_sae": rng.choice([5, 7]), "seed": seed}
    baseline, heads = rng.choice(BASELINES), rng.random() < 0.3
    case = tiny_case(family, kinds, names, baseline=baseline, n_layers=n_layers, heads=heads, dtype=torch.float64, **sizes)
    case = replace(case, target=_random_target(case, rng))
    by_position = rng.random() < 0.4
    edges = [
        random_edges(case, rng, rng.choice([0.3, 0.6, 1.0]), rng.choice([0.1, 0.4, 0.8]), by_position=by_position, complement=rng.random() < 0.25)
        for _ in range(rng.choice([1, 1, 2]))
    ]  # fmt: skip
    nodes = [random_nodes(case, rng, rng.random(), by_position=rng.random() < 0.4, complement=rng.random() < 0.3) for _ in range(2)]
    return Experiment(case, tuple(edges), tuple(nodes), rng.choice([Errors.LISTED, Errors.LISTED, *Errors]))


def _random_target(case: Case, rng: random.Random) -> object | None:
    """The logits (None), or a feature or a probe behind some chosen site."""
    kind = rng.choice(["logits", "logits", "feature", "probe"])
    places = [Site(k, layer) for layer in range(case.binding.n_layers) for k in (SiteKind.ATTN, SiteKind.MLP, SiteKind.RESID)]
    graph = case.graph
    behind = [site for site in places if set(graph.sources(site)) - {site}]
    pos = rng.choice([-1, -1, -2])
    if kind == "feature" and (chosen := [site for site in behind if site in case.dictionaries and graph.parents(site)]):
        site = rng.choice(chosen)
        return FeatureTarget(site, case.dictionaries[site], rng.randrange(case.d_sae[site]), pos)
    if kind == "probe" and (reading := [site for site in behind if site not in case.dictionaries or graph.parents(site)]):
        site = rng.choice(reading)
        basis = rng.choice(list(Basis)) if site.kind is SiteKind.ATTN else Basis.RESIDUAL
        weight = torch.randn(case.binding.width(site, basis), generator=torch.Generator().manual_seed(rng.randrange(1000)))
        weight = weight.to(case.binding.precision)
        return ProbeTarget(site, weight, torch.tensor(0.5, dtype=weight.dtype), pos, basis=basis)
    return None
