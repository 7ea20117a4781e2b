"""One pass of edge ablation over the sites, for several sets of edges at once (see `ablation` for what is computed).

1. Sets that list the same edges into a site and agree in all that it reads are one *class* there: it is computed once for all of them.
2. In a class that differs little from the first set's, targets with the same edges and no changed source have the same values.
3. What is left are the targets' private inputs, each distinct one once (`private_inputs`), of which targets keep their own entries
   (`readout`). The other nodes stay at their baseline, or, where a set reads everything, are those of the site's whole value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .masks import ERROR, SHARED, SOURCE, SOURCE_POSITION, SOURCE_SITE, TARGET, TARGET_POSITION, TARGET_SITE, EdgeSet, Errors
from .private_inputs import WHOLE, Computed, Entries, Inputs, State
from .readout import Reader
from .signatures import row_hashes
from .sites import OUTPUT, Site

if TYPE_CHECKING:
    from .ablation import AblationBatch


@dataclass(frozen=True, eq=False)
class Classes:
    """Sets that agree at a site. of (sets,): each one's class. first (classes,): a set of each. parents: per parent the class there, (classes,)."""

    of: Tensor
    first: Tensor
    parents: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.first)


@dataclass
class EdgeAblation:
    """One pass over the sites for some sets. Tables of sets and edges are on the CPU, values on the model's device."""

    batch: "AblationBatch"
    sets: Sequence[EdgeSet]
    errors: Errors
    memory: int
    states: dict[Site, State] = field(default_factory=dict)
    classes: dict[Site, Classes] = field(default_factory=dict)
    touched: dict[Site, Tensor] = field(default_factory=dict)  # (classes,): not all as in the clean run

    @cached_property
    def device(self) -> torch.device:
        return self.batch.clean.binding.device

    @cached_property
    def complement(self) -> Tensor:
        """Which sets are everything but what they list, (sets,)."""
        return torch.tensor([s.complement for s in self.sets])

    @cached_property
    def rows(self) -> list[Tensor]:
        """Each set's edges, (n, 6); error nodes as `errors` says, and nothing behind the end."""
        last, output = self.batch.clean.length - 1, len(self.batch.graph.sites) - 1
        found = []
        for one in self.sets:
            position = one.rows[:, TARGET_POSITION]
            keep = (position <= last) & ((one.rows[:, TARGET_SITE] != output) | (position == SHARED) | (position == last))
            if self.errors is not Errors.LISTED:
                keep &= (one.rows[:, SOURCE] != ERROR) & (one.rows[:, TARGET] != ERROR)
            found.append(one.rows if bool(keep.all()) else one.rows[keep])
        return found

    @cached_property
    def _listed(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Per set and site: the hash of the edges into it, (sets, sites); whether one of its nodes is at an end of an edge, (sets, sites).

        Per site: the features at an end of some set's edge, ascending.
        """
        sites = self.batch.graph.sites
        hashes = torch.zeros(len(self.sets), len(sites), dtype=torch.int64)
        used = torch.zeros(len(self.sets), len(sites), dtype=torch.bool)
        widths = torch.tensor([1 if site == OUTPUT else self.batch.clean.dictionaries[site].d_sae + 1 for site in sites])
        start = widths.cumsum(0) - widths
        named = torch.zeros(int(widths.sum()), dtype=torch.bool)
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for i, rows in enumerate(self.rows):
            if id(rows) not in seen:  # a set and its complement share their rows
                own = torch.zeros(len(sites), dtype=torch.int64).index_add_(0, rows[:, TARGET_SITE], row_hashes(rows))
                ends = torch.zeros(len(sites), dtype=torch.bool)
                ends[rows[:, SOURCE_SITE]] = ends[rows[:, TARGET_SITE]] = True
                named[start[rows[:, SOURCE_SITE]] + rows[:, SOURCE] % widths[rows[:, SOURCE_SITE]]] = True  # −1 is the last
                named[start[rows[:, TARGET_SITE]] + rows[:, TARGET] % widths[rows[:, TARGET_SITE]]] = True
                seen[id(rows)] = own, ends
            hashes[i], used[i] = seen[id(rows)]
        columns = [table[:-1].nonzero().flatten() for table in named.split(widths.tolist())]
        return hashes, used, columns

    def run(self) -> Tensor:
        """What the target reads, (sets, batch, width)."""
        graph = self.batch.graph
        for number, site in enumerate(graph.sites):
            if not graph.parents(site):
                self._root(number, site)
                continue
            self.classes[site] = self._agreeing(number, site)
            if site == OUTPUT:
                return self._output(number)
            self._inner(number, site)
            self._forget(number)
        raise AssertionError("a graph ends with y")

    def _forget(self, number: int) -> None:
        """Let go of states that nothing later reads."""
        later = {parent for site in self.batch.graph.sites[number + 1 :] for parent in self.batch.graph.parents(site)}
        for site in [site for site in self.states if site not in later]:
            del self.states[site]

    def _agreeing(self, number: int, site: Site) -> Classes:
        """Which sets agree at a site: the same edges into it, the same classes at all that it reads."""
        above = [self.classes[parent].of for parent in self.batch.graph.parents(site)]
        keys = row_hashes(torch.stack([*above, self._listed[0][:, number], self.complement.long()], dim=1))
        _, of = keys.unique(return_inverse=True)
        first = torch.full((int(of.max()) + 1,), len(of)).scatter_reduce_(0, of, torch.arange(len(of)), "amin")
        return Classes(of, first, tuple(classes[first] for classes in above))

    def _whole(self, site: Site) -> Tensor:
        """Which classes need the site's whole value, (classes,)."""
        return self.complement[self.classes[site].first] | (self.errors is Errors.KEPT)

    # -- sites --------------------------------------------------------------------------------------------------------

    def _root(self, number: int, site: Site) -> None:
        """A site without parents: its nodes are clean, in all sets."""
        clean, base, columns = self.batch.clean.nodes[site], self.batch.base[site], self._listed[2][number].to(self.device)
        n = len(self.sets)
        delta = (clean.features - base.features)[..., columns]
        error, value = clean.error - base.error, self.batch.clean.values[site]
        if self.errors is Errors.DEAD:
            value, error = value - error, torch.zeros_like(error)
        self.classes[site] = Classes(torch.zeros(n, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), ())
        self.touched[site] = torch.tensor([self.errors is Errors.DEAD])
        whole = bool(self._whole(site).any()) or bool(self.complement.any())
        cells = (1, self.batch.clean.size, self.batch.clean.length, -1)
        self.states[site] = State(columns, delta.expand(cells), error.expand(cells), value.expand(cells) if whole else None).trimmed()

    def _inner(self, number: int, site: Site) -> None:
        """A site with parents: every live target from its own input."""
        batch, dictionary = self.batch, self.batch.clean.dictionaries[site]
        entries = self._entries(number, site)
        cells = (len(self.classes[site]), batch.clean.size, batch.clean.length)
        columns = self._listed[2][number].to(self.device)
        like = batch.clean.values[site]
        state = State(columns, like.new_zeros(*cells, len(columns)), like.new_zeros(*cells, dictionary.d_in))
        whole = like.expand(*cells, -1).clone() if bool(self._whole(site).any()) else None
        copied = self._as_in_first(site, entries)
        for found, reader in self._computed(site, entries.only(~(copied | entries.dead))):
            self._store(site, state, whole, found, reader)
        self._copy(site, state, entries.only(copied))
        if whole is not None:
            self._complete(number, site, state, whole, entries)
        self.states[site] = state.trimmed()

    def _store(self, site: Site, state: State, whole: Tensor | None, found: Computed, reader: Reader | None) -> None:
        """Put the entries of computed hidden values (rows, width) where their targets are; without a reader they are the nodes."""
        clean, dictionary, base = self.batch.clean, self.batch.clean.dictionaries[site], self.batch.base[site]
        feature, error = found.node >= 0, found.node == ERROR
        at = found.only(feature)
        nodes = found.hidden[at.row, 0] if reader is None else reader.nodes(found.hidden, at.row, at.node, found.cell)
        before = base.features.expand(clean.size, clean.length, -1)[at.sequence, at.position, at.node]
        state.delta[at.variant, at.sequence, at.position, torch.searchsorted(state.columns, at.node)] = nodes - before
        at = found.only(~feature)
        if not len(at.row) or reader is None:
            return
        rows, inverse = at.row.unique(return_inverse=True)
        values = reader.values(found.hidden[rows])
        error = at.node == ERROR
        if bool(error.any()):
            own = at.only(error)
            rows, place = inverse[error].unique(return_inverse=True)
            rest = values[rows] - dictionary.decode(dictionary.encode(values[rows]))
            before = base.error.expand(clean.size, clean.length, -1)[own.sequence, own.position]
            state.error[own.variant, own.sequence, own.position] = rest[place] - before
        if whole is not None:
            own = at.only(~error)
            whole[own.variant, own.sequence, own.position] = values[inverse[~error]]

    def _complete(self, number: int, site: Site, state: State, whole: Tensor, entries: Entries) -> None:
        """The state of classes that read everything: `whole` is computed from all parents' nodes, listed targets replace their share of it.

        Where a complement lists no node of the site, and error nodes are alive, the whole value is all that is read.
        """
        needed = torch.zeros(len(self.classes[site]), dtype=torch.bool)
        needed[self.classes[site].of[self._listed[1][:, number] | (self.errors is Errors.DEAD) | ~self.complement]] = True
        state.value = whole
        for chosen in needed.nonzero().flatten().split(self._classes_at_once(site)):
            self._complete_some(site, state, whole, entries, chosen)

    def _classes_at_once(self, site: Site) -> int:
        dictionary = self.batch.clean.dictionaries[site]
        per_class = 4 * self.batch.clean.size * self.batch.clean.length * (3 * dictionary.d_sae + 6 * dictionary.d_in)
        return max(1, self.memory // 4 // per_class)

    def _complete_some(self, site: Site, state: State, whole: Tensor, entries: Entries, chosen: Tensor) -> None:
        batch, dictionary, base = self.batch, self.batch.clean.dictionaries[site], self.batch.base[site]
        listed = self._is_listed(entries, state, chosen).to(self.device)[:, None]  # (chosen, 1, pos, C + 1)
        flip = self.complement[self.classes[site].first[chosen]].to(self.device)[:, None, None, None]
        chosen = chosen.to(self.device)
        whole, own_delta, own_error = whole[chosen], state.delta[chosen], state.error[chosen]
        features = dictionary.encode(whole)
        delta = features[..., state.columns] - base.features[..., state.columns]
        error = whole - dictionary.decode(features) - base.error
        change = (own_delta - delta) * listed[..., :-1]
        error_change = -error if self.errors is Errors.DEAD else (own_error - error) * listed[..., -1:]
        value = whole + change @ dictionary.directions(state.columns) + error_change
        if self.errors is Errors.KEPT:
            own_error = error
        circuit = batch.base_values[site] + own_delta @ dictionary.directions(state.columns) + own_error
        assert state.value is not None
        state.value[chosen] = torch.where(flip, value, circuit)
        state.delta[chosen] = torch.where(flip, delta + change, own_delta)
        state.error[chosen] = torch.where(flip, error + error_change, own_error)

    def _is_listed(self, entries: Entries, state: State, chosen: Tensor) -> Tensor:
        """Which nodes are targets in these classes, (chosen, pos, C + 1); the error node is the last."""
        length = self.batch.clean.length
        place = torch.full((int(entries.variant.max()) + 1 if len(entries) else 1,), -1)
        place[chosen[chosen < len(place)]] = torch.arange(len(chosen))[chosen < len(place)]
        own = entries.only((place[entries.variant] >= 0) & (entries.node != WHOLE))
        column = torch.where(own.node == ERROR, len(state.columns), torch.searchsorted(state.columns.cpu(), own.node))
        listed = torch.zeros(len(chosen), length, len(state.columns) + 1, dtype=torch.bool)
        shared = own.position == SHARED
        listed[place[own.variant[shared]], :, column[shared]] = True
        listed[place[own.variant[~shared]], own.position[~shared], column[~shared]] = True
        return listed

    def _output(self, number: int) -> Tensor:
        """y: always alive, from its own input in each set."""
        clean = self.batch.clean
        classes = self.classes[OUTPUT]
        ends = clean.values[clean.end][:, -1].expand(len(classes), -1, -1).clone()
        for found, _ in self._computed(OUTPUT, self._entries(number, OUTPUT)):
            ends[found.variant, found.sequence] = found.hidden[found.row]
        return ends[classes.of.to(ends.device)]

    # -- targets ------------------------------------------------------------------------------------------------------

    def _entries(self, number: int, site: Site) -> Entries:
        """The site's targets in all classes: those listed, the whole value of sets that need it, and y."""
        graph, classes = self.batch.graph, self.classes[site]
        own = [self.rows[first] for first in classes.first.tolist()]
        own = [rows[rows[:, TARGET_SITE] == number] for rows in own]
        variant = torch.repeat_interleave(torch.tensor([len(rows) for rows in own]))
        rows = torch.cat(own)
        touched = torch.zeros(len(classes), dtype=torch.bool)
        for parent, above in zip(graph.parents(site), classes.parents, strict=True):
            touched |= self.touched[parent][above]
        listed = torch.zeros(len(classes), dtype=torch.bool)
        listed[variant] = True
        complement = self.complement[classes.first]
        # In a complement without a change before the site and without a cut at it everything is as in the clean run.
        self.touched[site] = touched | listed | (self.errors is Errors.DEAD) | ~complement
        if site == OUTPUT:
            always, kind = (~complement | touched | listed).nonzero().flatten(), 0
        else:
            always, kind = (self._whole(site) & (~complement | touched)).nonzero().flatten(), WHOLE
        position = torch.full_like(variant, SHARED) if site == OUTPUT else rows[:, TARGET_POSITION]
        lookup = torch.full((len(graph.sites),), -1)
        for i, parent in enumerate(graph.parents(site)):
            lookup[graph.sites.index(parent)] = i
        entries = Entries.of(
            torch.cat([variant, always]), torch.cat([rows[:, TARGET], torch.full_like(always, kind)]),
            torch.cat([position, torch.full_like(always, SHARED)]), lookup[rows[:, SOURCE_SITE]], rows[:, SOURCE], rows[:, SOURCE_POSITION],
        )  # fmt: skip
        return entries.with_dead(self._all_cut(site, entries))

    def _all_cut(self, site: Site, entries: Entries) -> Tensor:
        """Which targets of a complement have lost every edge that they have, (n,): those are dead."""
        clean = self.batch.clean
        edges = torch.zeros(len(entries), dtype=torch.int64)
        for parent in clean.functions[site].parents:
            earlier = entries.position.clamp(min=0) if clean.graph.looks_back(site, parent) else 0  # positions that count besides its own
            edges += (clean.dictionaries[parent].d_sae + (self.errors is Errors.LISTED)) * (1 + earlier)
        complement = self.complement[self.classes[site].first]
        return complement[entries.variant] & (entries.n_edges == edges) & (entries.node != WHOLE) & (site != OUTPUT)

    def _as_in_first(self, site: Site, entries: Entries) -> Tensor:
        """Which targets have the edges that they have in the first circuit's class, and no source that differs from there, (n,)."""
        classes = self.classes[site]
        circuits = (~self.complement).nonzero().flatten()
        none = torch.zeros(len(entries), dtype=torch.bool)
        if len(classes) == 1 or not len(circuits):
            return none
        first = int(classes.of[circuits[0]])
        comparable = ~self.complement[classes.first]
        comparable[first] = False
        changed_sources = []
        for parent, above in zip(self.batch.graph.parents(site), classes.parents, strict=True):
            table = self.states[parent].differs(int(above[first])).cpu()  # (classes there, C + 1)
            changed_sources.append(table[above])
            if self.errors is Errors.KEPT:
                comparable &= ~table[above][:, -1]
        columns = [self.states[parent].columns.cpu() for parent in self.batch.graph.parents(site)]
        return entries.same_as(first, columns, changed_sources) & comparable[entries.variant] & (entries.node != WHOLE)

    def _copy(self, site: Site, state: State, entries: Entries) -> None:
        """Targets as in the first circuit's class."""
        if not len(entries):
            return
        first = int(self.classes[site].of[int((~self.complement).nonzero()[0])])
        for shared in (True, False):
            chosen = entries.only((entries.position == SHARED) == shared)
            features, errors = chosen.only(chosen.node != ERROR), chosen.only(chosen.node == ERROR)
            at = [slice(None) if shared else own.position.to(self.device) for own in (features, errors)]
            column = torch.searchsorted(state.columns, features.node.to(self.device))
            theirs = state.delta[first][..., column] if shared else state.delta[first][:, at[0], column]  # (batch, pos, n) or (batch, n)
            state.delta[features.variant.to(self.device), :, at[0], column] = theirs.movedim(-1, 0)
            rest = state.error[first].clone() if shared else state.error[first][:, at[1]].transpose(0, 1)  # (batch, pos, width) or (n, batch, width)
            state.error[errors.variant.to(self.device), :, at[1]] = rest

    # -- private inputs ------------------------------------------------------------------------------------------------

    def _computed(self, site: Site, entries: Entries) -> Iterator[tuple[Computed, Reader | None]]:
        """The hidden values at every live target's own input, in portions, and what reads the targets' entries off them."""
        function = self.batch.clean.functions[site]
        positions = self.batch.clean.length if function.mixes_positions and bool((entries.source_position != SHARED).any()) else 1
        width = sum(len(self.states[parent].columns) + 1 for parent in function.parents)
        cells = self.batch.clean.size * self.batch.clean.length
        size = max(1, self.memory // 4 // (4 * positions * width + 24 * cells))
        for start in range(0, len(entries), size):
            inputs = Inputs(self, site, entries.part(start, start + size), positions)
            if inputs.by_virtual_weights:
                features = inputs.entries.node >= 0
                yield Inputs(self, site, inputs.entries.only(features), positions).virtual(), None
                inputs = Inputs(self, site, inputs.entries.only(~features), positions)
            for found in inputs.computed():
                yield found, inputs.reader
