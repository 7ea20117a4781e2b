"""A batch made ready for attribution: clean run and gradients, the baseline, and the nodes that change between them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..model.baselines import Baseline, BaselineChoice, NodeMoments, NodeValues
from ..model.binding import Forward, LocalFunction, Network
from ..model.dictionaries import Dictionary
from ..model.metrics import Metric
from ..model.sites import EMBED, Basis, Site, SiteGraph, SiteKind
from ..model.tail import CleanRun, Tail
from ..model.targets import FeatureTarget, LogitTarget, Target
from ..model.tasks import PairBatch
from .settings import EdgeSettings, NotFinite, ZeroGradient, wider


@dataclass(frozen=True)
class CandidateGroup:
    """Changed features at cells with similar numbers of them; `index` None means all features, in order."""

    cells: Tensor  # (P,) cell = sequence · n_pos + pos
    index: Tensor | None  # (P, C) feature; in the padding some unchanged one
    delta: Tensor  # (P, C) clean − baseline, 0 in the padding


@dataclass(frozen=True)
class Candidates:
    """The upstream nodes of one site that differ from the baseline."""

    groups: tuple[CandidateGroup, ...]
    error_delta: Tensor  # (cells, d_in)
    live: Tensor  # (cells,) bool: something changed there

    @cached_property
    def counts(self) -> Tensor:
        """How many nodes of each cell are looked at, the error node among them, (cells,)."""
        counts = torch.ones_like(self.live, dtype=torch.int64)
        for group in self.groups:
            counts[group.cells] += group.delta.shape[1]
        return counts

    @property
    def finite(self) -> bool:
        """Whether every change is a number."""
        return bool(self.error_delta.isfinite().all()) and all(bool(group.delta.isfinite().all()) for group in self.groups)


@dataclass
class Tally:
    """What the first factors of a run cost and how far their approximations are off; counts add up over batches.

    rows: downstream nodes expanded. evaluations: runs of the tail. fallbacks: interpolated nodes that were computed exactly after all.
    interpolation_error, interpolated: sums over interpolated nodes of the estimated |error| and of the |integral| of their first factor.
    tail_error, tail_scale: sums over sampled evaluations of |half − full precision| and of |full precision|.
    """

    rows: int = 0
    evaluations: int = 0
    fallbacks: int = 0
    interpolation_error: float = 0.0
    interpolated: float = 0.0
    tail_error: float = 0.0
    tail_scale: float = 0.0

    def add(self, other: "Tally") -> None:
        """Add another tally's counts and sums to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Prepared:
    """A batch ready for attribution. Values and gradients are (batch, pos, width) per site, without graph."""

    binding: Network
    graph: SiteGraph
    dictionaries: Mapping[Site, Dictionary]  # of the graph's sites
    settings: EdgeSettings
    target: Target
    pairs: PairBatch
    clean_logits: Tensor | None  # (batch, vocab)
    run: Forward
    values: dict[Site, Tensor]  # chosen sites, the constants of late starts, and the residual streams that tails pass
    base: dict[Site, Tensor]  # chosen sites at the baseline; empty at one step
    gradients: dict[Site, Tensor]  # chosen sites, and the site that the target reads
    candidates: dict[Site, Candidates]
    clean_metric: Tensor  # (batch,)
    corrupt_metric: Tensor  # (batch,)
    clean: CleanRun
    tally: Tally = field(default_factory=Tally)

    @property
    def bases(self) -> dict[Site, Basis]:
        return _bases(self.dictionaries, self.target)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, pos)."""
        batch, pos = self.pairs.clean.shape
        return int(batch), int(pos)

    @property
    def end(self) -> Site:
        """The site that the target reads."""
        return end_site(self.binding, self.target)

    @property
    def position(self) -> int:
        """The position that the target reads."""
        return self.target.position(self.shape[1])

    @property
    def alphas(self) -> list[float]:
        """1/S … 1."""
        return [k / self.settings.steps for k in range(1, self.settings.steps + 1)]

    def tail(self, site: Site) -> Tail:
        """The model from `site` to what the target reads."""
        return Tail(self.clean, site, self.dictionaries[site].basis, self.end, self.target.basis, self.position)

    def measure(self, value: Tensor, sequence: Tensor) -> Tensor:
        """The metric of values (n, width) of the end site at its position, branched off the sequences (n,)."""
        clean = None if self.clean_logits is None else self.clean_logits[sequence]
        return self.target(self.binding, value, self.pairs.answer[sequence], self.pairs.wrong_answer[sequence], clean)


def _bases(dictionaries: Mapping[Site, Dictionary], target: Target) -> dict[Site, Basis]:
    """In which basis each chosen site is read, and the one that the target reads."""
    own = {site: dictionary.basis for site, dictionary in dictionaries.items()}
    return own if target.site is None else {target.site: target.basis, **own}


def of_target(settings: EdgeSettings, target: Target) -> EdgeSettings:
    """The settings with the metric that the target is, or the default one, which then means nothing, for a target inside the model."""
    return replace(settings, metric=target.metric if isinstance(target, LogitTarget) else EdgeSettings().metric)


def end_site(binding: Network, target: Target) -> Site:
    """The site that a target reads: its own, or the last residual stream for the logits."""
    return target.site or Site(SiteKind.RESID, binding.n_layers - 1)


def prepare(
    binding: Network,
    dictionaries: Mapping[Site, Dictionary],
    pairs: PairBatch,
    settings: EdgeSettings,
    means: Mapping[Site, NodeMoments] | None = None,
    target: Target | None = None,
) -> Prepared:
    """Run the clean and corrupted sequences of a batch and find what changed between them.

    `means` is needed for the mean and noise baselines, `pairs.donor` for resampling. Unless given, the target is the settings' metric.
    Sites that do not feed the target are left out. Raises `ZeroGradient` where the metric does not depend on a chosen site.
    """
    target = target or LogitTarget(settings.metric)
    of_target(settings, target).check()
    pairs = pairs.to(binding.device)
    graph = binding.graph(dictionaries, target.site)
    dictionaries = {site: dictionaries[site] for site in graph.sites if site in dictionaries}
    bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}
    run, gradients, clean_metric = _clean_run(binding, graph, bases, pairs, settings, target)
    with torch.no_grad():
        end = end_site(binding, target)
        corrupt = binding.forward(pairs.corrupt, {**bases, end: target.basis}, stop_early=True).values
        position = target.position(pairs.corrupt.shape[1])
        corrupt_metric = target(binding, corrupt[end][:, position], pairs.answer, pairs.wrong_answer, run.logits)
        choice = settings.choice
        other = corrupt if choice.baseline is Baseline.COUNTERFACTUAL else _other_values(binding, bases, pairs, choice)
        candidates, base = {}, {}
        for site, dictionary in dictionaries.items():
            clean = run.values[site]
            nodes = choice.nodes(site, dictionary, pairs, clean, other.get(site), (means or {}).get(site))
            candidates[site] = _candidates(dictionary, clean, nodes)
            if settings.steps > 1:
                base[site] = nodes.value(dictionary).expand_as(clean)
            if not candidates[site].finite:
                raise NotFinite(f"nodes of {site.name} are not finite in {run.values[site].dtype}: {wider(run.values[site].dtype)}")
    return Prepared(
        binding, graph, dictionaries, settings, target, pairs, run.logits, run, dict(run.values), base, gradients, candidates,
        clean_metric.detach(), corrupt_metric, CleanRun(binding, run, run.values),
    )  # fmt: skip


def _clean_run(
    binding: Network, graph: SiteGraph, bases: Mapping[Site, Basis], pairs: PairBatch, settings: EdgeSettings, target: Target
) -> tuple[Forward, dict[Site, Tensor], Tensor]:
    """The clean run with every chosen site's value and its gradient G = ∂m/∂x, from one backward pass."""
    end = end_site(binding, target)
    constants = {c for site in graph.sites for c in LocalFunction(binding, graph, site, {**bases, end: target.basis}).constants}
    first = graph.sites[0]
    # The graph of the backward pass starts at the residual stream that the first chosen layer reads.
    start = Site(SiteKind.RESID, first.layer - 1) if first.layer > 0 else EMBED
    layers = range(max(first.layer, 0), end.layer + (end.kind is SiteKind.RESID)) if settings.steps > 1 else ()
    passed = {start, *(Site(SiteKind.RESID, layer) for layer in layers)}
    recorded = {**dict.fromkeys(constants | passed, Basis.RESIDUAL), end: target.basis, **bases}
    with torch.enable_grad():
        leaf = lambda x: x.detach().requires_grad_()
        run = binding.forward(pairs.clean, recorded, patches={start: leaf}, keep_attention=True, stop_early=target.site is not None)
        clean_logits = None if run.logits is None else run.logits.detach()
        value = target(binding, run.values[end][:, target.position(pairs.clean.shape[1])], pairs.answer, pairs.wrong_answer, clean_logits)
        wanted = list(dict.fromkeys([*bases, end]))
        grads = torch.autograd.grad(value.sum(), [run.values[site] for site in wanted], materialize_grads=True)
    gradients = dict(zip(wanted, grads, strict=True))
    flat_at_clean = isinstance(target, LogitTarget) and target.metric in (Metric.KL, Metric.TV)
    if flat_at_clean:  # their greatest value lies there: what backward gives is rounding
        gradients = {site: torch.zeros_like(gradient) for site, gradient in gradients.items()}
    # An inactive feature is a constant here: its edges at the clean run are none, and other batches may have some.
    may_be_flat = flat_at_clean or isinstance(target, FeatureTarget)
    for site in wanted:
        if not gradients[site].isfinite().all():
            raise NotFinite(f"the gradient of {target.name} at {site.name} is not finite in {value.dtype}: {wider(value.dtype)}")
        if not may_be_flat and not gradients[site].any():
            raise ZeroGradient(f"the gradient of {target.name} is zero everywhere at {site.name}: no effect can be attributed through it")
    run.values = {site: x.detach() for site, x in run.values.items()}
    run.logits = clean_logits
    return run, gradients, value


# --- the baseline ---------------------------------------------------------------------------------------------------


def _other_values(binding: Network, bases: Mapping[Site, Basis], pairs: PairBatch, choice: BaselineChoice) -> dict[Site, Tensor]:
    """Values of the sites on the sequences that the baseline's nodes are taken from; empty for baselines that take none."""
    tokens = choice.tokens(pairs)
    return {} if tokens is None else binding.forward(tokens, bases, stop_early=True).values


def _candidates(dictionary: Dictionary, clean: Tensor, base: NodeValues) -> Candidates:
    """Nodes that differ between clean and baseline, in padded groups of similar size."""
    nodes = dictionary.encode(clean)
    error = clean - dictionary.decode(nodes)
    delta, error_delta = nodes - base.features, error - base.error
    same = base.same(clean)
    if same is not None:
        delta, error_delta = torch.where(same[..., None], 0, delta), torch.where(same[..., None], 0, error_delta)
    delta, error_delta = delta.flatten(0, 1), error_delta.flatten(0, 1)  # (cells, d_sae), (cells, d_in)
    live = delta.any(-1) | error_delta.any(-1)
    return Candidates(tuple(_group(delta)), error_delta, live)


def _group(delta: Tensor) -> Iterator[CandidateGroup]:
    """Split cells into groups whose counts of changed features lie within a factor of two, so that padding wastes little."""
    counts = (delta != 0).sum(-1)  # (cells,)
    upper = int(counts.max())
    while upper > 0:
        lower = upper // 2
        cells = ((counts <= upper) & (counts > lower)).nonzero().flatten()
        if len(cells):
            rows = delta[cells]
            width = int(counts[cells].max())
            if 2 * width > delta.shape[1]:
                yield CandidateGroup(cells, None, rows)
            else:
                index = (rows != 0).to(torch.uint8).topk(width, dim=-1).indices.sort(-1).values  # the changed ones first, then in order
                yield CandidateGroup(cells, index, rows.gather(-1, index))
        upper = lower
