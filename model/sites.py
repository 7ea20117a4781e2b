"""Sites of a transformer and the graph of who reads whom.

A transformer is a directed acyclic graph of sites: `embed` (the input of block 0), `attn_l` and `mlp_l` (what is
added to the residual stream, after any post-norm), `resid_l` (after block l) and the output `y` (a scalar metric of
the logits). A site may be left out: its readers then read its parents, and the local function becomes the composition.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from ..errors import UserError


class UnknownSite(UserError):
    """A name is no site of this model."""


class NothingBeforeTarget(UserError):
    """No chosen site feeds the site that the output reads."""


class SiteKind(StrEnum):
    """What a site holds; the value is the stem of its name."""

    EMBED = "embed"
    ATTN = "attn"
    MLP = "mlp"
    RESID = "resid"
    OUTPUT = "y"


class Basis(StrEnum):
    """In which basis a site's value is read."""

    RESIDUAL = "residual"  # as added to (or held in) the residual stream
    HEADS = "heads"  # concatenated head outputs before the attention's output projection (`hook_z`)


# Within one layer attention comes before the MLP, and both before the sum.
_RANK = {SiteKind.EMBED: 0, SiteKind.ATTN: 1, SiteKind.MLP: 2, SiteKind.RESID: 3, SiteKind.OUTPUT: 4}
_LAYERED = (SiteKind.ATTN, SiteKind.MLP, SiteKind.RESID)
_NAME = re.compile(r"(embed|y)|(attn|mlp|resid)_(\d+)")


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the network; `layer` is -1 where a site has none (`embed`, `y`)."""

    kind: SiteKind
    layer: int = -1

    def __post_init__(self) -> None:
        if (self.kind in _LAYERED) != (self.layer >= 0):
            raise UnknownSite(f"site {self.kind.value!r} with layer {self.layer}: attn, mlp and resid have a layer >= 0, embed and y have none")

    @property
    def name(self) -> str:
        """`embed`, `attn_3`, `mlp_3`, `resid_3` or `y`."""
        return f"{self.kind.value}_{self.layer}" if self.kind in _LAYERED else self.kind.value

    def __str__(self) -> str:
        return self.name


EMBED = Site(SiteKind.EMBED)
OUTPUT = Site(SiteKind.OUTPUT)


def parse_site(name: str) -> Site:
    """The site that a user or a folder names; raises `UnknownSite`."""
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise UnknownSite(f"unknown site {name!r}: a site is embed, attn_L, mlp_L or resid_L with a layer L, for example resid_3")
    plain, stem, layer = match.groups()
    return Site(SiteKind(plain)) if plain else Site(SiteKind(stem), int(layer))


@dataclass(frozen=True)
class SiteGraph:
    """The sites chosen for a model, in topological order, `y` last, and who reads whom among them.

    `parallel` says that attention and MLP both read the block's input (GPT-NeoX with parallel residual).
    `target` is the site that `y` reads, None for the last residual stream. `chain` is a network of plain layers, each reading the one before:
    it has `embed` (its input) and `resid_l` (what layer l gives) alone.
    """

    n_layers: int
    parallel: bool
    sites: tuple[Site, ...]
    target: Site | None = None
    chain: bool = False

    @staticmethod
    def of(n_layers: int, parallel: bool, sites: Iterable[Site], target: Site | None = None, *, chain: bool = False) -> "SiteGraph":
        """The graph over `sites` (`y` is added); raises `UnknownSite` for a site that the model lacks.

        With a `target` `y` reads that site's value. The target itself, and chosen sites that it does not depend on, are
        left out; raises `NothingBeforeTarget` where no other is there.
        """
        chosen = set(sites) | {OUTPUT}
        for site in chosen | ({target} if target else set()):
            if site.layer >= n_layers:
                raise UnknownSite(f"unknown site {site.name!r}: this model has layers 0 to {n_layers - 1}")
            if chain and site.kind in (SiteKind.ATTN, SiteKind.MLP):
                raise UnknownSite(f"unknown site {site.name!r}: a network of plain layers has embed and resid_0 to resid_{n_layers - 1}")
        if len(chosen) == 1:
            raise UnknownSite("no site was chosen: name at least one, for example resid_0")
        if target is not None:
            chosen = (chosen & _ancestors(n_layers, parallel, target, chain)) | {OUTPUT}
            if len(chosen) == 1:
                raise NothingBeforeTarget(f"target {target.name} reads none of the chosen sites: choose a site before it, or a later target")
        key = lambda s: (n_layers if s.kind is SiteKind.OUTPUT else s.layer, _RANK[s.kind])
        return SiteGraph(n_layers, parallel, tuple(sorted(chosen, key=key)), target, chain)

    def architectural_parents(self, site: Site) -> tuple[Site, ...]:
        """Parents of a site in the full architecture, whether or not they were chosen."""
        if site.kind is SiteKind.EMBED:
            return ()
        if site.kind is SiteKind.OUTPUT:
            return (self.target or Site(SiteKind.RESID, self.n_layers - 1),)
        before = Site(SiteKind.RESID, site.layer - 1) if site.layer > 0 else EMBED
        if self.chain:
            return (before,)
        attn, mlp = Site(SiteKind.ATTN, site.layer), Site(SiteKind.MLP, site.layer)
        if site.kind is SiteKind.ATTN:
            return (before,)
        if site.kind is SiteKind.MLP:
            return (before,) if self.parallel else (before, attn)
        return (before, attn, mlp)

    @cached_property
    def _sources(self) -> dict[Site, tuple[Site, ...]]:
        """For every site of the architecture the chosen sites that its value is read from (a chosen site: itself)."""
        position = {site: i for i, site in enumerate(self.sites)}
        resolved: dict[Site, tuple[Site, ...]] = {}
        layers = range(self.n_layers)
        for site in (EMBED, *(Site(kind, layer) for layer in layers for kind in _LAYERED), OUTPUT):
            above = {source for parent in self.architectural_parents(site) for source in resolved[parent]}
            resolved[site] = (site,) if site in position else tuple(sorted(above, key=position.__getitem__))
        return resolved

    def sources(self, site: Site) -> tuple[Site, ...]:
        """The chosen sites that feed the value of any site of the architecture: itself if chosen, else what it is composed from.

        Empty for what no chosen site feeds: such a value stays at its clean state.
        """
        return self._sources[site]

    @cached_property
    def _attended(self) -> dict[Site, frozenset[Site]]:
        """For every site of the architecture the chosen sites that it reads, through sites left out, by attention."""
        found: dict[Site, frozenset[Site]] = {}
        for site in self._sources:
            parents = self.architectural_parents(site)
            found[site] = frozenset(s for p in parents if p not in self.sites for s in found[p])
            if site.kind is SiteKind.ATTN:
                found[site] |= {s for p in parents for s in self._sources[p]}
        return found

    def looks_back(self, site: Site, parent: Site) -> bool:
        """Whether `site` reads a parent's earlier positions too: where attention lies between them, or is the site itself."""
        return parent in self._attended[site]

    @cached_property
    def _parents(self) -> dict[Site, tuple[Site, ...]]:
        position = {site: i for i, site in enumerate(self.sites)}
        return {
            site: tuple(sorted({s for p in self.architectural_parents(site) for s in self._sources[p]}, key=position.__getitem__))
            for site in self.sites
        }

    def parents(self, site: Site) -> tuple[Site, ...]:
        """The chosen sites that `site` reads, in topological order; empty where the graph starts."""
        return self._parents[site]

    def readers(self, site: Site) -> tuple[Site, ...]:
        """The chosen sites (and `y`) that read `site`, in topological order."""
        return tuple(d for d in self.sites if site in self._parents[d])


def _ancestors(n_layers: int, parallel: bool, target: Site, chain: bool) -> set[Site]:
    """Every site of the architecture that `target` depends on, itself left out; raises `UnknownSite` for `y`."""
    if target.kind is SiteKind.OUTPUT:
        raise UnknownSite("the target is y itself: name a site of the model, for example resid_3")
    graph = SiteGraph(n_layers, parallel, (), chain=chain)
    found: set[Site] = set()
    waiting = [target]
    while waiting:
        new = set(graph.architectural_parents(waiting.pop())) - found
        found |= new
        waiting.extend(new)
    return found
