"""Ablated models: only a circuit is alive, and everything else takes its baseline value.

Node ablation, in topological order: a site is recomputed from its parents' ablated values; dead nodes take their baseline.

Edge ablation, in topological order:

1. Each live target (a feature or the error node, at each position) has a private input: the parents' nodes with an edge to it
   take their already ablated value, all others their baseline. A complement is the other way round: everything but the cut
   edges. Either is a point (the baseline, or the whole ablated value) plus few nodes' changes times their decoder rows.
2. Equal private inputs are found by a signature of their changed nodes' values, before they are written out, over all
   targets, positions, sequences and sets; each is written out once.
3. The whole local function runs on them, norms and attention patterns included, and of the result the dictionary computes the
   targets' own entries. How each step is made cheap stands in `edge_ablation`, `private_inputs`, `low_rank` and `readout`.
4. The site's ablated nodes are those entries; dead ones stay at their baseline. The output `y` is always alive.

Sites without parents keep their clean value. Whatever lies behind the position that the target reads is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError
from .baselines import NodeValues
from .binding import Forward, LocalFunction, Network, UnknownArchitecture
from .dictionaries import Dictionary, TopKDictionary
from .edge_ablation import EdgeAblation
from .low_rank import LowRank, low_rank
from .masks import ERROR, SHARED, SOURCE_SITE, TARGET_SITE, EdgeSet, Errors, NodeSet, NotANode
from .metrics import Metric
from .pairs import PairBatch
from .products import fast_products
from .sites import EMBED, OUTPUT, Basis, Site, SiteGraph, SiteKind
from .tail import CleanRun, Prefix
from .targets import LogitTarget, Target

DEFAULT_MEMORY = 2**31
"""Bytes for working tensors, unless told."""


class WrongGraph(UserError):
    """A set of edges or nodes was made for other sites than those of the batch."""


@dataclass(frozen=True)
class CleanBatch:
    """The clean run of a batch. Values are (batch, pos, width) per site, up to the position that the target reads.

    dictionaries: of the graph's sites. run: lends the attention's arguments. clean_logits: (batch, vocab), None for a target inside the model.
    """

    binding: Network
    graph: SiteGraph
    dictionaries: Mapping[Site, Dictionary]
    target: Target
    pairs: PairBatch
    run: Forward
    values: Mapping[Site, Tensor]
    clean_logits: Tensor | None

    def with_baseline(self, base: Mapping[Site, NodeValues]) -> "AblationBatch":
        """The batch with a baseline value for every node."""
        return AblationBatch(self, {site: _cut(base[site], self.length) for site in self.dictionaries})

    @property
    def end(self) -> Site:
        """The site that the target reads."""
        return self.target.site or Site(SiteKind.RESID, self.binding.n_layers - 1)

    @property
    def length(self) -> int:
        """How many positions matter: those up to the one that the target reads."""
        return self.target.position(int(self.pairs.clean.shape[1])) + 1

    @property
    def size(self) -> int:
        """Sequences."""
        return int(self.pairs.clean.shape[0])

    @cached_property
    def functions(self) -> dict[Site, LocalFunction]:
        """How each site with parents, and y, is recomputed from them."""
        bases = {self.end: self.target.basis, **{site: dictionary.basis for site, dictionary in self.dictionaries.items()}}
        return {site: LocalFunction(self.binding, self.graph, site, bases) for site in self.graph.sites if self.graph.parents(site)}

    @cached_property
    def _forms(self) -> dict[Site, LowRank | None]:
        return {}

    def form(self, site: Site) -> LowRank | None:
        """How a site is computed from few changed nodes; None where it has no such form."""
        if site not in self._forms:
            function = self.functions[site]
            read = self.graph.architectural_parents(function.target)[0]
            sample = self.values[read][:1] if read in self.values else self.values[function.parents[0]][:1]
            self._forms[site] = low_rank(function, self.run, sample)
        return self._forms[site]

    @cached_property
    def streams(self) -> CleanRun:
        """The clean run with every residual stream up to the end."""
        layers = range(self.end.layer + (self.end.kind is SiteKind.RESID))
        wanted = {**dict.fromkeys([EMBED, *(Site(SiteKind.RESID, layer) for layer in layers)], Basis.RESIDUAL), self.end: self.target.basis}
        run = self.binding.forward(self.pairs.clean[:, : self.length], wanted, keep_attention=True, stop_early=True)
        return CleanRun(self.binding, run, run.values)

    @cached_property
    def begins_late(self) -> bool:
        """Whether a run may begin behind the first position, on the clean keys and values of those before."""
        try:
            self.streams.keys_values(self.end.layer)
        except UnknownArchitecture:  # its attention can be run on whole sequences alone
            return False
        return True

    def behind(self, function: LocalFunction, sequence: Tensor, begin: int) -> Forward:
        """The attention's arguments for runs of a local function on these sequences (n,) from position `begin` on, clean before it."""
        if begin == 0:
            return self.run
        run = Forward(attention=dict(self.streams.suffix(begin, self.length).attention))
        for layer in range(function.lowest, function.target.layer + 1) if function.mixes_positions else ():
            args, kwargs = run.attention[layer]
            cache = Prefix(self.streams.keys_values(layer), sequence, begin)
            run.attention[layer] = (args, {**kwargs, self.binding.cache_name: cache})
        return run

    @cached_property
    def last_only(self) -> dict[Site, bool]:
        """Sites of which only the last position is read by anything."""
        found = {OUTPUT: True}
        for site in reversed(self.graph.sites[:-1]):
            found[site] = all(found[reader] and not self.functions[reader].mixes_positions for reader in self.graph.readers(site))
        return found

    @cached_property
    def nodes(self) -> dict[Site, NodeValues]:
        """The clean nodes of every chosen site."""
        found = {}
        for site, dictionary in self.dictionaries.items():
            features = dictionary.encode(self.values[site])
            found[site] = NodeValues(features, self.values[site] - dictionary.decode(features))
        return found


def _cut(values: NodeValues, length: int) -> NodeValues:
    """The values of the first `length` positions, three-dimensional."""
    origin = None if values.origin is None else values.origin[:, :length]
    return NodeValues(values.features[:, :length], values.error[:, :length], origin)


@torch.no_grad()
def clean_run(binding: Network, dictionaries: Mapping[Site, Dictionary], pairs: PairBatch, target: Target | None = None) -> CleanBatch:
    """Run the clean sequences of a batch. Unless given, the target is the logit difference (any `Metric` can be measured with it).

    Sites that do not feed the target are left out.
    """
    target = target or LogitTarget(Metric.LOGIT_DIFF)
    pairs = pairs.to(binding.device)
    graph = binding.graph(dictionaries, target.site)
    dictionaries = {site: dictionaries[site] for site in graph.sites if site in dictionaries}
    batch = CleanBatch(binding, graph, dictionaries, target, pairs, Forward(), {}, None)
    constants = {constant for function in batch.functions.values() for constant in function.constants}
    bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}
    wanted = {**dict.fromkeys(constants, Basis.RESIDUAL), batch.end: target.basis, **bases}
    run = binding.forward(pairs.clean, wanted, keep_attention=True, stop_early=target.site is not None)
    short = run.shortened(batch.length) if batch.length < pairs.clean.shape[1] else run
    values = {site: value[:, : batch.length] for site, value in run.values.items()}
    return CleanBatch(binding, graph, dictionaries, target, pairs, short, values, run.logits)


@dataclass(frozen=True)
class AblationBatch:
    """A batch whose nodes have a clean and a baseline value: what `ablate_edges` and `ablate_nodes` work on."""

    clean: CleanBatch
    base: Mapping[Site, NodeValues]

    @property
    def graph(self) -> SiteGraph:
        return self.clean.graph

    @property
    def pairs(self) -> PairBatch:
        return self.clean.pairs

    @cached_property
    def base_values(self) -> dict[Site, Tensor]:
        """Each site's value with all nodes at their baseline, (batch, pos, width)."""
        shape = (self.clean.size, self.clean.length, -1)
        return {site: base.value(self.clean.dictionaries[site]).expand(shape) for site, base in self.base.items()}

    @cached_property
    def _likely(self) -> dict[Site, Tensor | None]:
        return {}

    def likely(self, site: Site) -> Tensor | None:
        """Features active in the clean or the baseline run at a cell, bool (batch · pos, d_sae); None unless only so many are active (TopK)."""
        if site not in self._likely:
            active = None
            if isinstance(self.clean.dictionaries[site], TopKDictionary):
                base = self.base[site].features.expand(self.clean.size, self.clean.length, -1)
                active = ((self.clean.nodes[site].features != 0) | (base > 0)).flatten(0, 1)
            self._likely[site] = active
        return self._likely[site]

    @property
    def clean_end(self) -> Tensor:
        """What the target reads in the clean run, (batch, width)."""
        return self.clean.values[self.clean.end][:, -1]

    def measure(self, ends: Tensor, metric: Metric) -> Tensor:
        """A metric of what the target reads, `ends` (n, batch, width) → (n, batch); greater is better.

        KL and total variation are taken to the clean run. With a target inside the model its value is measured, whatever the metric.
        """
        return self.measures(ends, [metric])[metric]

    @torch.no_grad()
    def measures(self, ends: Tensor, metrics: Sequence[Metric]) -> dict[Metric, Tensor]:
        """Several metrics of the same ends, each (n, batch): see `measure`."""
        clean = self.clean
        found: dict[Metric, list[Tensor]] = {metric: [] for metric in metrics}
        for end in ends:  # one set at a time: logits of all of them at once would be large
            for metric in metrics:
                target = LogitTarget(metric) if clean.target.site is None else clean.target
                found[metric].append(target(clean.binding, end, clean.pairs.answer, clean.pairs.wrong_answer, clean.clean_logits))
        return {metric: torch.stack(values) for metric, values in found.items()}

    def full(self, metric: Metric) -> Tensor:
        """The metric of the unablated model on each sequence, (batch,)."""
        return self.measure(self.clean_end[None], metric)[0]


# --- node ablation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablate_nodes(
    batch: AblationBatch, sets: Sequence[NodeSet], *, errors: Errors = Errors.LISTED, memory: int = DEFAULT_MEMORY
) -> Tensor:
    """What the target reads when only the nodes of a set are alive, (n_sets, batch, width).

    A sequence is run from the first site and position on at which a set differs from the clean run. Raises `WrongGraph` for a set over other sites,
    `NotANode` for a feature that a dictionary lacks. Nothing depends on how many sets go together.
    """
    _check_graphs(batch, sets)
    clean = batch.clean
    ends = batch.clean_end.expand(len(sets), -1, -1).clone()
    first, begin = _first_touched(batch, sets, errors)  # (n_sets, batch)
    rows = (first < len(clean.graph.sites) - 1).nonzero()  # of the others nothing changes
    begins = begin[rows[:, 0], rows[:, 1]]
    if bool(begins.any()) and not clean.begins_late:
        begins = torch.zeros_like(begins)
    order = first[rows[:, 0], rows[:, 1]].argsort(stable=True)
    rows, begins = rows[order], begins[order]
    with fast_products(clean.values[clean.end]):
        for start in begins.unique().tolist():
            per_row = 4 * (clean.length - start) * (24 * clean.binding.d_model + 2 * _widest(batch))
            for part in rows[begins == start].split(max(1, memory // per_row)):
                own, sequence = part.unbind(1)
                ends[own, sequence] = _nodes_ablated(batch, sets, own, sequence.to(ends.device), first[own, sequence], start, errors)
    return ends


def _first_touched(batch: AblationBatch, sets: Sequence[NodeSet], errors: Errors) -> tuple[Tensor, Tensor]:
    """The first site that a set changes in each sequence, by its place in the graph, and the first position, both (n_sets, batch).

    Where a set changes nothing the site is y. A complement changes a site where one of the nodes that it lists differs from the baseline.
    """
    clean, output = batch.clean, len(batch.graph.sites) - 1
    site_of, begin = torch.full((len(sets), clean.size), output), torch.full((len(sets), clean.size), clean.length)
    rows = [torch.cat([torch.full_like(one.rows[:, :1], i), one.rows], dim=1) for i, one in enumerate(sets) if one.complement]
    every = torch.cat([torch.zeros(0, 4, dtype=torch.int64), *rows])  # set, site, node, position
    every = every[(every[:, 3] < clean.length) & ((every[:, 2] != ERROR) | (errors is Errors.LISTED))]
    anywhere = torch.full((clean.size,), clean.length)  # where any node differs
    for number, site in enumerate(batch.graph.sites[:-1]):
        nodes, base = clean.nodes[site], batch.base[site]
        moves = torch.cat([nodes.features != base.features, (nodes.error != base.error).any(dim=-1, keepdim=True)], dim=-1)
        earliest = torch.where(moves.any(dim=1), moves.int().argmax(dim=1), clean.length)  # (batch, d_sae + 1); the error node is the last
        anywhere = anywhere.minimum(earliest.amin(dim=-1).cpu())
        own, _, node, position = every[every[:, 1] == number].unbind(1)
        if not len(own):
            continue
        at = torch.where(moves[:, position.clamp(min=0), node].cpu(), position, clean.length)  # (batch, n)
        at = torch.where(position == SHARED, earliest[:, node].cpu(), at)
        place = own[:, None].expand(-1, clean.size)
        at = at.T.contiguous()  # (n, batch)
        site_of.scatter_reduce_(0, place, torch.where(at < clean.length, number, output), "amin")
        begin.scatter_reduce_(0, place, at, "amin")
    whole = [i for i, one in enumerate(sets) if not one.complement or errors is Errors.DEAD]
    site_of[whole] = torch.where(anywhere < clean.length, 0, output)
    begin[whole] = anywhere
    return site_of, begin


def _nodes_ablated(
    batch: AblationBatch, sets: Sequence[NodeSet], own: Tensor, sequence: Tensor, first: Tensor, begin: int, errors: Errors
) -> Tensor:
    """What the target reads, (n, width), of n rows: set own[i] on a sequence.

    Before site first[i] (ascending), and before position `begin`, all is as in the clean run.
    """
    clean = batch.clean
    values: dict[Site, Tensor] = {}  # of the rows that a site differs in, which come first: (rows, pos, width)
    for number, site in enumerate(clean.graph.sites):
        before = int((first < number).sum()) if clean.graph.parents(site) else 0
        whole = _recomputed(clean, site, values, sequence[:before], begin) if before else None
        if site == OUTPUT:
            assert whole is not None  # all rows differ somewhere before y
            return whole[:, -1]
        here = int((first <= number).sum())
        new = clean.values[site][sequence[before:here], begin:]
        if here:
            whole = new if whole is None else torch.cat([whole, new])
            values[site] = _with_dead_nodes(batch, number, whole, sets, own[:here], sequence[:here], begin, errors)
    raise AssertionError("a graph ends with y")


def _recomputed(clean: CleanBatch, site: Site, values: Mapping[Site, Tensor], sequence: Tensor, begin: int) -> Tensor:
    """A site's value from its parents', (n, pos, width), on these sequences from position `begin` on; behind a parent's own rows it is clean."""
    function = clean.functions[site]
    n, inputs = len(sequence), {}
    for parent in function.parents:
        given = values[parent][:n] if parent in values else clean.values[parent][:0, begin:]
        inputs[parent] = torch.cat([given, clean.values[parent][sequence[len(given) :], begin:]]) if len(given) < n else given
    return function(inputs, {c: clean.values[c][sequence, begin:] for c in function.constants}, clean.behind(function, sequence, begin))


def _at_site(nodes: NodeSet, number: int) -> Tensor:
    """The nodes of one site, (n, 2): node, position."""
    return nodes.rows[nodes.rows[:, 0] == number, 1:]


def _with_dead_nodes(
    batch: AblationBatch, number: int, whole: Tensor, sets: Sequence[NodeSet], own: Tensor, sequence: Tensor, begin: int, errors: Errors
) -> Tensor:
    """A site's value with its dead nodes at their baseline, of rows (n, pos, width) from position `begin` on; own, sequence (n,): of each."""
    site, device = batch.graph.sites[number], whole.device
    dictionary, base = batch.clean.dictionaries[site], batch.base[site]
    chosen, place = own.unique(return_inverse=True)
    listed = [_at_site(sets[i], number) for i in chosen.tolist()]
    features = torch.cat([rows[:, 0] for rows in listed])
    columns = features[features != ERROR].unique()
    shape = (len(listed), batch.clean.length, len(columns) + 1)  # the last one is the error node
    is_listed = torch.zeros(shape, dtype=torch.bool)
    for i, rows in enumerate(listed):
        column = torch.where(rows[:, 0] == ERROR, len(columns), torch.searchsorted(columns, rows[:, 0].contiguous()))
        _mark(is_listed[i], rows[:, 1], column)
    is_listed = is_listed[:, begin:]
    flip = torch.tensor([sets[i].complement for i in chosen.tolist()])
    error_alive = (is_listed[..., -1] ^ flip[:, None]) if errors is Errors.LISTED else torch.full(is_listed.shape[:2], errors is Errors.KEPT)
    is_listed, flip, error_alive = (t[place].to(device) for t in (is_listed[..., :-1], flip, error_alive))  # (n, ...)
    columns = columns.to(device)
    of = lambda tensor: tensor.expand(batch.clean.size, batch.clean.length, -1)[sequence, begin:]
    moved: Tensor | float = 0.0
    if len(columns):
        change = (dictionary.encode_columns(whole, columns) - of(base.features[..., columns])) * is_listed  # (n, pos, C)
        moved = change @ dictionary.directions(columns)  # (n, pos, width)
    error_moves = bool((error_alive ^ flip[:, None]).any())  # away from the point that a set starts from
    error_change = whole - dictionary.decode(dictionary.encode(whole)) - of(base.error) if error_moves else 0.0
    from_base = batch.base_values[site][sequence, begin:] + moved + error_alive[..., None] * error_change
    from_whole = whole - moved - ~error_alive[..., None] * error_change
    return torch.where(flip[:, None, None], from_whole, from_base)


def _mark(table: Tensor, positions: Tensor, columns: Tensor) -> None:
    """Set the entries (position, column) of a table (pos, n); all positions where they are shared. Positions behind its end are left out."""
    if len(positions) and int(positions[0]) == SHARED:
        table[:, columns] = True
        return
    within = positions < len(table)
    table[positions[within], columns[within]] = True


def _check_graphs(batch: AblationBatch, sets: Sequence[EdgeSet] | Sequence[NodeSet]) -> None:
    for one in sets:
        if one.graph.sites != batch.graph.sites:
            own, other = (", ".join(site.name for site in graph.sites) for graph in (one.graph, batch.graph))
            raise WrongGraph(f"a set over {own} cannot be ablated in a graph over {other}")
        for column in range(0, one.rows.shape[1], 3):  # site, node and position: of edges twice
            _check_features(batch, one.rows[:, column : column + 2])


def _check_features(batch: AblationBatch, nodes: Tensor) -> None:
    """Raise `NotANode` for a feature that its site's dictionary does not have; nodes (n, 2): site, node."""
    d_sae = torch.tensor([*(batch.clean.dictionaries[site].d_sae for site in batch.graph.sites[:-1]), 1])
    if bool((unknown := nodes[:, 1] >= d_sae[nodes[:, 0]]).any()):
        site, node = nodes[unknown][0].tolist()
        raise NotANode(f"feature {node} of {batch.graph.sites[site].name}: its dictionary has features 0 to {int(d_sae[site]) - 1}")


def _widest(batch: AblationBatch) -> int:
    return max(dictionary.d_sae for dictionary in batch.clean.dictionaries.values())


# --- edge ablation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablate_edges(
    batch: AblationBatch, sets: Sequence[EdgeSet], *, errors: Errors = Errors.LISTED, memory: int = DEFAULT_MEMORY
) -> Tensor:
    """What the target reads when only the edges of a set are alive, (n_sets, batch, width).

    Sets that go together share what is equal in them: pass a whole sweep, complements included. Raises `WrongGraph`, `NotANode`.
    """
    _check_graphs(batch, sets)
    ends = [EdgeAblation(batch, part, errors, memory // 2).run() for part in _portions(batch, sets, errors, memory)]
    return torch.cat([batch.clean_end[None][:0], *ends])  # of no sets: (0, batch, width)


def _portions(batch: AblationBatch, sets: Sequence[EdgeSet], errors: Errors, memory: int) -> Iterator[Sequence[EdgeSet]]:
    """Consecutive sets whose ablated nodes fit into half of the memory together."""
    clean = batch.clean
    cells = clean.size * clean.length
    widths = torch.tensor([*(dictionary.d_sae for dictionary in clean.dictionaries.values()), 1]) + 1
    named = torch.zeros(int(widths.sum()), dtype=torch.bool)  # nodes at an end of an edge
    for one in sets:
        for column in (SOURCE_SITE, TARGET_SITE):
            site, node = one.rows[:, column], one.rows[:, column + 1]
            named[(widths.cumsum(0) - widths)[site] + node % widths[site]] = True
    nodes = int(named.sum())
    whole = 3 if errors is Errors.KEPT or any(s.complement for s in sets) else 1
    per_set = 8 * cells * (nodes + whole * sum(dictionary.d_in for dictionary in clean.dictionaries.values()))
    size = max(1, memory // 2 // max(per_set, 1))
    for start in range(0, len(sets), size):
        yield sets[start : start + size]
