"""One ablated forward pass and one attribution, step by step, on one sequence: slow, plain, and every number on the way kept.

`ablation_steps`: the model with only some edges alive. For each live target, in topological order,

1. its edges' sources take their already ablated value, every other node of its parents its baseline: its private input;
2. the whole local function runs on that input, norms and attention patterns included;
3. the dictionary encodes the result;
4. of all entries the target keeps its own.

`attribution_steps`: one edge u → d, by S steps from the baseline to the clean run. At each step α

1. all that d reads is moved to x(α) = x_base + α (x_clean − x_base);
2. d's site is recomputed there, which gives f_d(α);
3. d alone is put into an otherwise clean run, which gives m(α);
4. ∂m/∂f_d at f_d(α) times ∂f_d/∂f_u at x(α) is the slope from u through d.

The mean slope times u's own change is the edge. These are the definitions that the engines (`model.ablation`, `ingest.effective`) compute for
all targets at once; here they are what drawings and explanations are made of, and tests hold the two together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..model.ablation import AblationBatch
from ..model.masks import ERROR, SHARED, EdgeSet
from ..model.sites import OUTPUT, Site

Node = tuple[Site, int]
"""A site and a node's number there: a feature's index, `ERROR` for the error node, 0 for the output."""

Ends = dict[tuple[Node, int], list[tuple[Node, int]]]
"""(target, position) → the (source, position)s of its edges; positions are `SHARED` where edges are meant for all."""


class NotAStep(UserError):
    """Something cannot be shown step by step."""


@dataclass(frozen=True)
class Source:
    """One kept edge's source at one position, as a target's private input has it. Error nodes have the norms of their vectors."""

    site: str
    node: int
    position: int
    baseline: float
    clean: float
    alive: float


@dataclass(frozen=True)
class TargetSteps:
    """What one live target goes through, at one position.

    `sources`: of its kept edges, at the positions where they differ from their baseline, the largest differences first. n_cut: nodes of its
    parents that are off their baseline in the clean run, at this position or before, and that no kept edge brings. way: of the way from the
    parents' baseline to their clean value, the share that the private input has gone at this position. n_entries: features active in what the
    local function gave. top: the largest entries there, (index, value). value: the target's own. For the output value, clean and baseline are
    the metric's.
    """

    site: str
    node: int
    position: int
    sources: tuple[Source, ...]
    n_cut: int
    way: float
    n_entries: int
    top: tuple[tuple[int, float], ...]
    value: float
    clean: float
    baseline: float


@dataclass(frozen=True, eq=False)
class AblationSteps:
    """Every target's steps, in the order in which they are taken. end: what the output reads, (1, width)."""

    targets: tuple[TargetSteps, ...]
    end: Tensor
    metric: float
    metric_full: float
    metric_empty: float

    @property
    def faithfulness(self) -> float | None:
        """(m(C) − m(∅)) / (m(M) − m(∅)); None where the baseline changes nothing."""
        effect = self.metric_full - self.metric_empty
        return (self.metric - self.metric_empty) / effect if abs(effect) >= 1e-6 else None

    def of(self, site: str, node: int, position: int | None = None) -> TargetSteps:
        """The steps of one target, at the last position where it differs from its baseline unless told. Raises `NotAStep`."""
        own = [one for one in self.targets if (one.site, one.node) == (site, node) and position in (None, one.position)]
        moved = [one for one in own if differ(one.value, one.baseline)]
        if not own:
            raise NotAStep(f"{site}/{'error' if node == ERROR else node} is no live target of this circuit: it has no edge into it")
        return (moved or own)[-1]


@dataclass(eq=False)
class _Ablated:
    """A site's nodes, (pos, d_sae) and (pos, width)."""

    features: Tensor
    error: Tensor

    def copy(self) -> "_Ablated":
        return _Ablated(self.features.clone(), self.error.clone())

    def at(self, node: int, position: int) -> float:
        return float(self.error[position].norm() if node == ERROR else self.features[position, node])


@torch.no_grad()
def ablation_steps(batch: AblationBatch, edges: EdgeSet) -> AblationSteps:
    """The model of one sequence in which only `edges` are alive, target by target. Raises `NotAStep` for more than one sequence or a complement."""
    if batch.clean.size != 1 or edges.complement:
        raise NotAStep("steps are shown of one sequence, and of edges that are listed: a batch of one, no complement")
    clean, graph, length = batch.clean, batch.graph, batch.clean.length
    expanded = lambda tensor, width: tensor.expand(1, length, width)[0]
    baseline = {
        site: _Ablated(expanded(base.features, clean.dictionaries[site].d_sae), expanded(base.error, clean.dictionaries[site].d_in))
        for site, base in batch.base.items()
    }
    own = {site: _Ablated(nodes.features[0], nodes.error[0]) for site, nodes in clean.nodes.items()}
    ablated = {site: own[site].copy() if not graph.parents(site) else nodes.copy() for site, nodes in baseline.items()}
    found: list[TargetSteps] = []
    end = clean.values[clean.end][:, -1]
    listed = _by_target(edges)
    listed.setdefault(((OUTPUT, 0), SHARED), [])
    for (target, position), sources in sorted(listed.items(), key=lambda item: (graph.sites.index(item[0][0][0]), item[0][0][1], item[0][1])):
        site, node = target
        private = {parent: _private(baseline[parent], ablated[parent], parent, sources) for parent in graph.parents(site)}
        value = _recomputed(batch, site, private)
        said = _Said(batch, site, node, baseline, own, ablated, private, sources)
        if site == OUTPUT:
            end = value[-1:]
            measured = [float(batch.measure(one[None], clean.target.metric)[0, 0]) for one in (end, clean.values[clean.end][:, -1])]  # type: ignore[attr-defined]
            empty = _recomputed(batch, site, {parent: _private(baseline[parent], baseline[parent], parent, []) for parent in graph.parents(site)})
            nothing = float(batch.measure(empty[-1:][None], clean.target.metric)[0, 0])  # type: ignore[attr-defined]
            found.append(said.at(length - 1, value, (measured[0], measured[1], nothing)))
            continue
        nodes = clean.dictionaries[site].encode(value)
        error = value - clean.dictionaries[site].decode(nodes)
        for pos in range(length) if position == SHARED else [position]:
            if node == ERROR:
                ablated[site].error[pos] = error[pos]
            else:
                ablated[site].features[pos, node] = nodes[pos, node]
            found.append(said.at(pos, value))
    last = found[-1]
    return AblationSteps(tuple(found), end, last.value, last.clean, last.baseline)


def differ(value: float, other: float, scale: float | None = None) -> bool:
    """Whether two values are more than float32's rounding apart, on the scale of the larger unless given."""
    return abs(value - other) > 1e-5 * (max(abs(value), abs(other)) if scale is None else scale)


def _by_target(edges: EdgeSet) -> Ends:
    """The set's edges by the target that they lead into."""
    sites, found = edges.graph.sites, {}  # type: ignore[var-annotated]
    for s, i, p, d, j, q in edges.rows.tolist():
        found.setdefault(((sites[d], j), q), []).append(((sites[s], i), p))
    return found


def _private(baseline: _Ablated, ablated: _Ablated, parent: Site, sources: list[tuple[Node, int]]) -> _Ablated:
    """A parent's nodes as a target reads them: those of its edges alive, all others at their baseline."""
    nodes = baseline.copy()
    for (site, node), position in sources:
        if site != parent:
            continue
        at = slice(None) if position == SHARED else slice(position, position + 1)
        if node == ERROR:
            nodes.error[at] = ablated.error[at]
        else:
            nodes.features[at, node] = ablated.features[at, node]
    return nodes


def _recomputed(batch: AblationBatch, site: Site, nodes: Mapping[Site, _Ablated]) -> Tensor:
    """A site's value, (pos, width), from its parents' nodes."""
    clean, function = batch.clean, batch.clean.functions[site]
    values = {parent: (clean.dictionaries[parent].decode(own.features) + own.error)[None] for parent, own in nodes.items()}
    value: Tensor = function(values, {constant: clean.values[constant] for constant in function.constants}, clean.run)
    return value[0]


@dataclass(frozen=True, eq=False)
class _Said:
    """What there is to say of one target, gathered for each of its positions."""

    batch: AblationBatch
    site: Site
    node: int
    baseline: Mapping[Site, _Ablated]
    clean: Mapping[Site, _Ablated]
    ablated: Mapping[Site, _Ablated]
    private: Mapping[Site, _Ablated]
    sources: list[tuple[Node, int]]

    def at(self, position: int, value: Tensor, metric: tuple[float, float, float] | None = None) -> TargetSteps:
        """The steps at one position. value (pos, width): what the local function gave; metric: of the output, its value, clean and at baseline."""
        if metric is None:
            dictionary = self.batch.clean.dictionaries[self.site]
            entries = dictionary.encode(value[position])
            own = float((value[position] - dictionary.decode(entries)).norm() if self.node == ERROR else entries[self.node])
            order = entries.abs().argsort(descending=True, stable=True)[:12].tolist()
            metric = own, self.clean[self.site].at(self.node, position), self.baseline[self.site].at(self.node, position)
            n_entries, top = int((entries != 0).sum()), tuple((i, float(entries[i])) for i in order if entries[i] != 0)
        else:
            n_entries, top = 0, ()
        sources, n_cut, way = self._sources(position), self._n_cut(position), self._way(position)
        return TargetSteps(self.site.name, self.node, position, sources, n_cut, way, n_entries, top, *metric)

    def _positions(self, position: int) -> range:
        """The positions that the target can read at `position`."""
        return range(position + 1) if self.batch.clean.functions[self.site].mixes_positions else range(position, position + 1)

    def _sources(self, position: int) -> tuple[Source, ...]:
        found = []
        for (site, node), at in self.sources:
            for pos in self._positions(position) if at == SHARED else [at]:
                values = [nodes[site].at(node, pos) for nodes in (self.baseline, self.clean, self.ablated)]
                change = abs(values[2] - values[0])
                if node == ERROR:
                    change = float((self.ablated[site].error[pos] - self.baseline[site].error[pos]).norm())
                if differ(change, 0.0, max(abs(values[0]), abs(values[2]))):
                    found.append((change, Source(site.name, node, pos, *values)))
        return tuple(one for _, one in sorted(found, key=lambda pair: -pair[0]))

    def _n_cut(self, position: int) -> int:
        """Nodes of the parents that are off their baseline in the clean run and at it in the private input."""
        n, at = 0, self._positions(position)
        for parent, private in self.private.items():
            base, clean = self.baseline[parent], self.clean[parent]
            features = (clean.features != base.features) & (private.features == base.features)
            errors = (clean.error != base.error).any(-1) & (private.error == base.error).all(-1)
            n += int(features[at.start : at.stop].sum()) + int(errors[at.start : at.stop].sum())
        return n

    def _way(self, position: int) -> float:
        """How far the private input has gone from the baseline to the clean value, as a share of that way (its projection)."""
        gone = whole = 0.0
        for parent, private in self.private.items():
            decode = self.batch.clean.dictionaries[parent].decode
            base, clean, own = ((decode(n.features[position]) + n.error[position]) for n in (self.baseline[parent], self.clean[parent], private))
            gone, whole = gone + float((own - base) @ (clean - base)), whole + float((clean - base) @ (clean - base))
        return gone / whole if whole else 0.0


# --- attribution ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttributionStep:
    """One step. value: f_d(α). metric: m(α). slope_metric: ∂m/∂f_d there, 1 where d is the output. slope_local: ∂f_d/∂f_u at x(α)."""

    alpha: float
    value: float
    metric: float
    slope_metric: float
    slope_local: float

    @property
    def slope(self) -> float:
        """What the metric gains, through d alone, for each unit of u."""
        return self.slope_metric * self.slope_local


@dataclass(frozen=True)
class AttributionSteps:
    """One edge u → d. `clean` and `baseline` are u's values; an error node's are 1 and 0, its slope being along its own change.

    total: the sum of the effects of all nodes that d reads, through d. metric_clean: m of the clean run. metric_start: with d alone recomputed from
    the baseline of what it reads: as S grows, `total` becomes their difference. value_start, value_clean: f_d there.
    """

    source: tuple[str, int, int]
    target: tuple[str, int, int]
    steps: tuple[AttributionStep, ...]
    clean: float
    baseline: float
    total: float
    metric_clean: float
    metric_start: float
    value_clean: float
    value_start: float

    @property
    def mean_slope(self) -> float:
        """The slope's mean over the way."""
        return sum(step.slope for step in self.steps) / len(self.steps)

    @property
    def effect(self) -> float:
        """The edge's weight."""
        return self.mean_slope * (self.clean - self.baseline)


def attribution_steps(batch: AblationBatch, source: tuple[Site, int, int], target: tuple[Site, int, int], n_steps: int = 10) -> AttributionSteps:
    """One edge between nodes (site, number, position) by `n_steps` steps. Raises `NotAStep` where it is none, or leads into an error node."""
    site, node, position = target
    if batch.clean.size != 1 or n_steps < 1:
        raise NotAStep("steps are shown of one sequence, and there is at least one")
    if source[0] not in batch.graph.parents(site):
        parents = ", ".join(parent.name for parent in batch.graph.parents(site)) or "nothing"
        raise NotAStep(f"{site.name} does not read {source[0].name}: it reads {parents}")
    if node == ERROR and site != OUTPUT:
        raise NotAStep(f"steps are shown for edges into features and the output, not into the error node of {site.name}")
    through = _Through(batch, site, node, position)
    steps, weighted = [], []
    for k in range(1, n_steps + 1):
        (value, metric, slope), gradient = through.step(k / n_steps)
        steps.append(AttributionStep(k / n_steps, value, metric, slope, float(through.along(gradient, source))))
        weighted.append({parent: slope * own for parent, own in gradient.items()})
    mean = {parent: torch.stack([one[parent] for one in weighted]).mean(0) for parent in weighted[0]}
    start, _ = through.step(0.0)
    clean, baseline = through.ends(source)
    return AttributionSteps(
        (source[0].name, *source[1:]), (site.name, node, position), tuple(steps), clean, baseline,
        through.total(mean), through.metric_clean, start[1], through.value_clean, start[0],
    )  # fmt: skip


class _Through:
    """Everything that acts through one node d of one sequence."""

    def __init__(self, batch: AblationBatch, site: Site, node: int, position: int) -> None:
        self.batch, self.site, self.node, self.position = batch, site, node, position
        clean = batch.clean
        self.function = clean.functions[site]
        self.base = {parent: batch.base_values[parent] for parent in self.function.parents}  # (1, pos, width)
        with torch.no_grad():
            self.metric_clean = float(self._metric_of(clean.values[clean.end][:, -1]))
            value = clean.values[site] if site != OUTPUT else None
            self.value_clean = self.metric_clean if value is None else float(clean.dictionaries[site].encode(value)[0, position, node])

    def step(self, alpha: float) -> tuple[tuple[float, float, float], dict[Site, Tensor]]:
        """(f_d, m, ∂m/∂f_d) at x(α), and ∂f_d/∂x of each parent, (pos, width)."""
        clean = self.batch.clean
        with torch.enable_grad():
            values = {
                parent: (clean.values[parent] - (1 - alpha) * (clean.values[parent] - base)).detach().requires_grad_()
                for parent, base in self.base.items()
            }  # fmt: skip
            whole = self.function(values, {c: clean.values[c] for c in self.function.constants}, clean.run)  # (1, pos, width)
            if self.site == OUTPUT:
                own = self._metric_of(whole[:, -1])
            else:
                own = clean.dictionaries[self.site].encode(whole)[0, self.position, self.node]
            gradients = torch.autograd.grad(own, list(values.values()), allow_unused=True)
        found = {parent: torch.zeros_like(v[0]) if g is None else g[0] for (parent, v), g in zip(values.items(), gradients)}
        if self.site == OUTPUT:
            return (float(own.detach()), float(own.detach()), 1.0), found
        metric, slope = self._put_into_clean(own.detach())
        return (float(own.detach()), metric, slope), found

    def _put_into_clean(self, value: Tensor) -> tuple[float, float]:
        """The metric of the clean run with d alone at `value`, and its slope there."""
        clean, dictionary = self.batch.clean, self.batch.clean.dictionaries[self.site]
        own = clean.values[self.site]
        with torch.enable_grad():
            leaf = value.clone().requires_grad_()
            mark = torch.zeros(own.shape[1], device=own.device, dtype=own.dtype)
            mark[self.position] = 1
            now = dictionary.encode(own)[0, self.position, self.node].detach()
            change = mark[None, :, None] * (leaf - now) * dictionary.directions(self.node)
            tokens = clean.pairs.clean[:, : own.shape[1]]
            bases = {self.site: dictionary.basis, clean.end: clean.target.basis}
            run = clean.binding.forward(tokens, bases, patches={self.site: lambda x: x + change})
            metric = self._metric_of(run.values[clean.end][:, -1])
            (slope,) = torch.autograd.grad(metric, leaf)
        return float(metric.detach()), float(slope)

    def _metric_of(self, end: Tensor) -> Tensor:
        clean = self.batch.clean
        return clean.target(clean.binding, end, clean.pairs.answer, clean.pairs.wrong_answer, clean.clean_logits)[0]

    def ends(self, source: tuple[Site, int, int]) -> tuple[float, float]:
        """A source's clean value and its baseline; an error node's are 1 and 0."""
        site, node, position = source
        if node == ERROR:
            return 1.0, 0.0
        clean, base = self.batch.clean.nodes[site].features, self.batch.base[site].features
        return float(clean[0, position, node]), float(base.expand_as(clean)[0, position, node])

    def along(self, gradient: Mapping[Site, Tensor], source: tuple[Site, int, int]) -> Tensor:
        """The gradient along what a source writes."""
        site, node, position = source
        if node != ERROR:
            return gradient[site][position] @ self.batch.clean.dictionaries[site].directions(node)
        clean = self.batch.clean.nodes[site].error
        return gradient[site][position] @ (clean - self.batch.base[site].error.expand_as(clean))[0, position]

    def total(self, gradient: Mapping[Site, Tensor]) -> float:
        """The effects of all nodes that d reads, summed: mean ∂m/∂x times the whole change of x."""
        return sum(float((own * (self.batch.clean.values[parent] - self.base[parent])[0]).sum()) for parent, own in gradient.items())
