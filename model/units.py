"""Units: sets of nodes that are attributed to, cut and kept together, such as regions of interest, attention heads, or single features.

Units are a partition: every node of every chosen site is in exactly one. Attribution between two units is the sum over their members'
edges, and an edge between two units is all edges between their members, so that what is cut between them is cut for every member. All
members of a unit have the same edges into them, hence the same private input: what costs a run of the local function for every feature
costs one for every unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ..errors import UserError
from .dictionaries import Dictionary
from .masks import ERROR, EdgeSet, NodeSet, NotAnEdge
from .sites import OUTPUT, Basis, Site, SiteGraph


class NotUnits(UserError):
    """Something that is no partition of a site graph's nodes, or a unit that it does not have."""


@dataclass(frozen=True, eq=False)
class Units:
    """A partition of the nodes of a site graph.

    of: per chosen site the unit of each feature and, last, of the error node, (d_sae + 1,) int64 on the CPU. Units are numbered from 0 over
    all sites, in the sites' order, each of one site alone; the output y is the last one, `output`. names (n + 1,): what each is called, y last.
    """

    graph: SiteGraph
    of: Mapping[Site, Tensor]
    names: tuple[str, ...]

    @classmethod
    def from_labels(cls, graph: SiteGraph, labels: Mapping[Site, Tensor], names: Mapping[Site, Sequence[str]] | None = None) -> Self:
        """Units from each site's own labels, (d_sae + 1,) integers from 0 to the site's number of units − 1, the error node's last.

        names: of a site's units in the order of their labels; `site/label` unless given. Raises `NotUnits` for a site left out or a label
        that no node has.
        """
        of: dict[Site, Tensor] = {}
        named: list[str] = []
        for site in graph.sites:
            if site == OUTPUT:
                continue
            if site not in labels:
                raise NotUnits(f"site {site.name} has no units: every chosen site needs them")
            own = torch.as_tensor(labels[site], dtype=torch.int64).cpu()
            n = int(own.max()) + 1
            if int(own.min()) < 0 or len(own.unique()) != n:
                raise NotUnits(f"the labels of {site.name} are not 0 to {n - 1}, each with a node: number them without gaps")
            given = [f"{site.name}/{i}" for i in range(n)] if names is None else list(names[site])
            if len(given) != n:
                raise NotUnits(f"{len(given)} names for the {n} units of {site.name}")
            of[site] = own + len(named)
            named += given
        return cls(graph, of, (*named, OUTPUT.name))

    def __len__(self) -> int:
        """How many units there are, y left out."""
        return len(self.names) - 1

    @property
    def output(self) -> int:
        """The number of y."""
        return len(self.names) - 1

    @cached_property
    def site_of(self) -> Tensor:
        """Each unit's site by its place in `graph.sites`, (n + 1,)."""
        found = torch.full((len(self.names),), len(self.graph.sites) - 1)
        for site, own in self.of.items():
            found[own] = self.graph.sites.index(site)
        return found

    @cached_property
    def sizes(self) -> Tensor:
        """How many nodes each unit has, (n + 1,); y has one."""
        counts = torch.zeros(len(self.names), dtype=torch.int64)
        for own in self.of.values():
            counts += torch.bincount(own, minlength=len(counts))
        counts[-1] = 1
        return counts

    @cached_property
    def joined(self) -> Tensor:
        """Which units the architecture joins, bool (n + 1, n + 1): source, target."""
        reads = torch.zeros(len(self.graph.sites), len(self.graph.sites), dtype=torch.bool)
        for i, site in enumerate(self.graph.sites):
            for parent in self.graph.parents(site):
                reads[self.graph.sites.index(parent), i] = True
        return reads[self.site_of[:, None], self.site_of[None, :]]

    def at(self, site: Site) -> range:
        """The units of a site."""
        own = self.of[site]
        return range(int(own.min()), int(own.max()) + 1)

    def members(self, unit: int) -> Tensor:
        """The nodes of a unit, ascending, the error node (`ERROR`) first; of y 0."""
        if unit == self.output:
            return torch.zeros(1, dtype=torch.int64)
        own = self.of[self.graph.sites[int(self.site_of[unit])]]
        nodes = (own == unit).nonzero().flatten()
        return torch.where(nodes == len(own) - 1, ERROR, nodes).sort().values

    def nodes(self, units: Sequence[int]) -> NodeSet:
        """The members of these units as a set of nodes; y is not listed."""
        self.check(units)
        chosen = torch.zeros(len(self.names), dtype=torch.bool)
        chosen[torch.as_tensor(list(units), dtype=torch.int64)] = True
        rows = []
        for i, site in enumerate(self.graph.sites[:-1]):
            nodes = chosen[self.of[site]].nonzero().flatten()
            nodes = torch.where(nodes == len(self.of[site]) - 1, ERROR, nodes).sort().values
            rows.append(torch.stack([torch.full_like(nodes, i), nodes, torch.full_like(nodes, -1)], dim=1))
        return NodeSet(self.graph, torch.cat(rows))

    def check(self, units: Sequence[int]) -> None:
        """Raise `NotUnits` for a number that is no unit's."""
        if bad := [unit for unit in units if not 0 <= unit <= self.output]:
            raise NotUnits(f"unit {bad[0]}: there are units 0 to {self.output}, the last one y")


@dataclass(frozen=True, eq=False)
class UnitEdges:
    """Edges between units that are alive, or with `complement` all edges of the architecture but these.

    rows: (n, 2) int64 on the CPU, source and target unit, sorted and each once. Make one by `of`, `empty` or `full`. A unit with no edge into it
    is dead, except at sites without parents, where all are clean; y is always alive.
    """

    units: Units
    rows: Tensor
    complement: bool = False

    @classmethod
    def of(cls, units: Units, sources: Sequence[int], targets: Sequence[int]) -> Self:
        """The set of these edges. Raises `NotUnits`, `NotAnEdge`."""
        units.check([*sources, *targets])
        rows = torch.tensor([list(sources), list(targets)], dtype=torch.int64).T.reshape(-1, 2)
        if bool((bad := ~units.joined[rows[:, 0], rows[:, 1]]).any()):
            source, target = rows[bad][0].tolist()
            raise NotAnEdge(f"an edge from {units.names[source]} to {units.names[target]}: the one's site does not read the other's")
        return cls(units, rows.unique(dim=0) if len(rows) else rows)

    @classmethod
    def empty(cls, units: Units) -> Self:
        """No edge."""
        return cls(units, torch.zeros(0, 2, dtype=torch.int64))

    @classmethod
    def full(cls, units: Units) -> Self:
        """Every edge of the architecture."""
        return cls(units, torch.zeros(0, 2, dtype=torch.int64), complement=True)

    def inverse(self) -> Self:
        """All edges that are not in this set."""
        return replace(self, complement=not self.complement)

    @property
    def graph(self) -> SiteGraph:
        return self.units.graph

    @cached_property
    def alive(self) -> Tensor:
        """Which edges are alive, bool (n + 1, n + 1): source, target."""
        listed = torch.zeros_like(self.units.joined)
        listed[self.rows[:, 0], self.rows[:, 1]] = True
        return self.units.joined & ~listed if self.complement else listed

    def __len__(self) -> int:
        """How many edges are listed."""
        return len(self.rows)

    def expanded(self) -> EdgeSet:
        """The same set, edge of a member by edge of a member: as many rows as the sizes' products."""
        units, rows = self.units, [torch.zeros(0, 6, dtype=torch.int64)]
        for source, target in self.rows.tolist():
            ends = torch.cartesian_prod(units.members(source), units.members(target))
            shared = torch.full((len(ends),), -1)
            sites = [torch.full((len(ends),), int(units.site_of[unit])) for unit in (source, target)]
            rows.append(torch.stack([sites[0], ends[:, 0], shared, sites[1], ends[:, 1], shared], dim=1))
        return EdgeSet(units.graph, torch.cat(rows).unique(dim=0), self.complement)


def single_features(graph: SiteGraph, dictionaries: Mapping[Site, Dictionary]) -> Units:
    """Every node a unit of its own; names `site/index`, `site/error`. As many units as nodes: for small sites."""
    labels = {site: torch.arange(dictionaries[site].d_sae + 1) for site in graph.sites if site != OUTPUT}
    names = {site: [*(f"{site.name}/{i}" for i in range(len(own) - 1)), f"{site.name}/error"] for site, own in labels.items()}
    return Units.from_labels(graph, labels, names)


def whole_site(dictionary: Dictionary, site: Site) -> tuple[Tensor, list[str]]:
    """Labels and names of one unit for all features of a site, and one for its error node."""
    labels = torch.zeros(dictionary.d_sae + 1, dtype=torch.int64)
    labels[-1] = 1
    return labels, [f"{site.name}/all", f"{site.name}/error"]


def heads(dictionary: Dictionary, site: Site, n_heads: int) -> tuple[Tensor, list[str]]:
    """Labels and names of one unit for each attention head, and one for the error node, of an identity on the concatenated head outputs.

    A head is the set of the nodes of its slice of `hook_z`. Raises `NotUnits` for another dictionary: its features belong to no one head.
    """
    if dictionary.basis is not Basis.HEADS or dictionary.kind.value != "identity" or dictionary.d_sae % n_heads:
        raise NotUnits(
            f"{site.name}: heads are sets of nodes only where the dictionary is the identity on the heads' outputs (hook_z); "
            f"this one is {dictionary.kind.value} on the {dictionary.basis.value} basis"
        )
    labels = torch.arange(dictionary.d_sae + 1) // (dictionary.d_sae // n_heads)
    return labels, [*(f"{site.name}/head {h}" for h in range(n_heads)), f"{site.name}/error"]
