"""Comparison of two graphs: of two runs, tasks, methods or circuits of one model, or of two models through a matching of their features.

1. `graph_sides.pair_nodes`: which node of A is which of B; `coverage` says how much of either graph that reaches.
2. `PARTS`, each a function of the pairs, give numbers beside nulls:
   - edges: shared ones at every size and threshold, rank correlations (`edge_overlap`);
   - profiles: degrees, strengths, path lengths (`graph_profiles`);
   - refinement: classes of colour refinement, fractional isomorphism (this file, by `refinement`);
   - partitions: regions and communities over matched nodes (`region_graphs`);
   - regions: the graphs of regions of interest (`region_graphs`, `transport`).
3. `compare` puts them together under a key that the same question has again. A part that cannot be had (no regions, a missing package) is named in
   the notes with the reason, not silently left out.
4. `compare_named` reads both sides, the matching and the regions from the stores first.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

import numpy as np
import polars as pl

from ..errors import UserError
from ..queries.matches import Method as MatchMethod
from ..queries.matches import NoMatching, find_matching, list_matchings, matched_dictionaries, read_matches
from ..queries.partitions import stored_parcellations, user_labels
from ..queries.places import model_layers
from ..queries.schema import feature_key
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import find_run
from .communities import CommunityOptions, MissingPackage
from .community_nulls import rewired, task_strengths
from .comparison_records import CURVES, LINKS, VALUES, Comparison, IntArray, Values, together
from .edge_overlap import PERMUTED, REWIRED, Scale, compare_edges, coverage
from .graph_profiles import compare_profiles
from .graph_sides import NO_PAIR, BadMatching, BadSide, GraphSide, Paired, SideOptions, one_to_one, pair_nodes, read_side
from .parcellation import Parcellation
from .refinement import Coloured, JointRefinement, quantile_bins, refine_both
from .region_graphs import MOST_ROUNDS, compare_memberships, compare_regions, drives_of_run, refinement_rows, with_regions
from .regions_store import read_parcellation
from .transport import NoTransport

ProgressOf = Callable[[int, int, str], None]


class Part(StrEnum):
    """What is compared."""

    EDGES = "edges"
    PROFILES = "profiles"
    REFINEMENT = "refinement"
    PARTITIONS = "partitions"
    REGIONS = "regions"
    TRANSPORT = "transport"
    """Fused Gromov–Wasserstein, the costly part of `REGIONS`."""


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How graphs are compared. parts: which. draws: random graphs and matchings of each null. scale: what strengths are compared as.

    bins: classes of strength in refinement, by quantile in each graph; 1 for none. alpha: between what regions are (0) and what they drive (1).
    communities: how they are found in either graph; None for none.
    """

    parts: tuple[Part, ...] = tuple(Part)
    draws: int = 20
    seed: int = 0
    scale: Scale = Scale.SHARE
    bins: int = 4
    alpha: float = 0.5
    communities: CommunityOptions | None = field(default_factory=CommunityOptions)

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range."""
        if self.draws < 0:
            raise UserError(f"--draws {self.draws} is too small: give 0 for no nulls, 20 or more for a p below 0.05")
        if self.bins < 1:
            raise UserError(f"--bins {self.bins} is too small: give at least 1")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha:g} is out of range: give 0 (what regions are) to 1 (what they drive)")
        if not set(self.parts) - {Part.TRANSPORT}:  # which is a part of the regions'
            raise UserError(f"nothing is left to compare: leave out fewer of {', '.join(Part)}")


@dataclass(frozen=True, eq=False)
class Found:
    """What a part gives."""

    values: pl.DataFrame
    curves: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(CURVES)))
    links: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(LINKS)))


class NotThere(UserError):
    """A part that cannot be had of these two sides."""


def compare(
    a: GraphSide, b: GraphSide, matched: pl.DataFrame | None = None, options: CompareOptions | None = None, *, matching: str = "",
    match_sites: "MatchSites | None" = None, progress: ProgressOf = lambda done, total, what: None,
) -> Comparison:  # fmt: skip
    """Compare two graphs. matched: `source` (key in A), `target` (key in B), `score`, one to one; None where both have the same nodes.

    matching: the key of the stored matching, match_sites: which of its pairs `matched` are, both for the record.
    `progress` is told what part goes on. Raises `BadMatching`.
    """
    options = options or CompareOptions()
    options.check()
    paired = pair_nodes(a, b, matched)
    found, without = [Found(coverage(paired))], {}
    chosen = [part for part in Part if part in options.parts and part is not Part.TRANSPORT]
    for i, part in enumerate(chosen):
        progress(i, len(chosen), part.value)
        try:
            found.append(PARTS[part](paired, options))
        except (NotThere, NoTransport, MissingPackage) as reason:
            without[part.value] = str(reason)
    notes = {"pairs": paired.n, "pairs_in_both": int(paired.both.sum()), "without": without}
    progress(len(chosen), len(chosen), "")
    settings = _settings(options) | ({} if match_sites is None else {"match_sites": match_sites.value})
    content = json.dumps([_identity(a), _identity(b), matching or _pairs_identity(matched), settings], sort_keys=True, ensure_ascii=False)
    return Comparison(
        hashlib.sha256(content.encode()).hexdigest()[:16], "graphs", a.name, b.name, a.run, b.run, a.model, b.model, matching, settings, notes,
        together([one.values for one in found], VALUES), together([one.curves for one in found], CURVES),
        together([one.links for one in found], LINKS),
    )  # fmt: skip


def _settings(options: CompareOptions) -> dict[str, object]:
    """What determines the numbers, JSON-able."""
    own = {**asdict(options), "parts": [part.value for part in options.parts], "scale": options.scale.value}
    if options.communities is not None:
        own["communities"] = {**asdict(options.communities), "method": options.communities.method.value}
    return own


def _identity(side: GraphSide) -> list[object]:
    """What makes a side what it is: its edges, their weights and strengths, to six digits."""
    edges = side.nodes["key"].gather(side.source).to_frame("s").with_columns(
        t=side.nodes["key"].gather(side.target), w=pl.Series(side.weight), strength=pl.Series(side.strength)
    )  # fmt: skip
    text = edges.with_columns(pl.col("w", "strength").round_sig_figs(6)).write_csv()
    regions = None if side.regions is None else [side.regions.key, side.regions.measured]
    return [side.run, hashlib.sha256(text.encode()).hexdigest(), regions]


def _pairs_identity(matched: pl.DataFrame | None) -> str:
    """What tells a matching that has no key from another one; empty for the same nodes."""
    if matched is None:
        return ""
    text = one_to_one(matched).with_columns(pl.col("score").cast(pl.Float64).round_sig_figs(6)).write_csv()
    return hashlib.sha256(text.encode()).hexdigest()


# --- the parts ----------------------------------------------------------------------------------------------------------


def _edges(paired: Paired, options: CompareOptions) -> Found:
    found = compare_edges(paired, draws=options.draws, seed=options.seed, scale=options.scale)
    return Found(found.values, found.curves)


def _profiles(paired: Paired, options: CompareOptions) -> Found:
    return Found(*compare_profiles(paired, draws=options.draws, seed=options.seed))


def _coloured(side: GraphSide, labels: IntArray, bins: int, target: IntArray | None = None) -> Coloured:
    return Coloured(side.n, side.source, side.target if target is None else target, labels, quantile_bins(side.strength, bins))


def _labels(paired: Paired) -> tuple[IntArray, IntArray]:
    """The site and kind of every node of A and of B as numbers that mean the same in both: B's sites by those that its pairs lead to."""
    most = paired.pairs.group_by("site_b", "site_a").len().sort(["len", "site_a"], descending=[True, False])
    named = dict(most.group_by("site_b", maintain_order=True).agg(pl.col("site_a").first()).iter_rows())
    texts = [
        side.nodes.select(pl.format("{}|{}", pl.col("site").replace(mapping), "kind")).to_series().to_list()
        for side, mapping in ((paired.side_a, {}), (paired.side_b, named))
    ]
    numbers = np.unique(np.array(texts[0] + texts[1]), return_inverse=True)[1]
    return numbers[: paired.side_a.n], numbers[paired.side_a.n :]


def _refinement(paired: Paired, options: CompareOptions) -> Found:
    """Colour refinement of both graphs, nodes labelled by site and kind, with strengths in bins and without, beside B rewired."""
    a, b = paired.side_a, paired.side_b
    of_a, of_b = _labels(paired)
    values, curves = Values("refinement"), []
    targets = [rewired(b.effective, options.seed + 6000 + i)[0].target for i in range(options.draws)]
    for bins in dict.fromkeys((1, options.bins)):
        first = _coloured(a, of_a, bins)
        both = lambda target, first=first, bins=bins: refine_both(first, _coloured(b, of_b, bins, target), rounds=MOST_ROUNDS)
        of_null = [both(target) for target in targets]
        # decided on all rounds, while similarities stop at MOST_ROUNDS
        found = refine_both(first, _coloured(b, of_b, bins))
        own = Values("refinement" if bins == 1 else f"refinement, {bins} bins of strength")
        curves += refinement_rows(own, found, of_null, REWIRED)
        _same_classes(own, paired, found, options)
        values.rows += own.rows
    return Found(values.frame(), together(curves, CURVES))


def _same_classes(values: Values, paired: Paired, found: JointRefinement, options: CompareOptions) -> None:
    """The share of pairs whose two nodes are in one class, by rounds, beside pairs permuted inside sites."""
    rows = np.flatnonzero(paired.both)
    rng = np.random.default_rng([options.seed, 7000])
    moved = [paired.permuted(rng)[rows] for _ in range(options.draws)]
    for k in range(1, min(found.rounds, 2) + 1):
        same = lambda b_rows, k=k: float((found.a[k][paired.a[rows]] == found.b[k][b_rows]).mean())
        # a pair moved to one that B's graph has not is in no class of it
        drawn = [float(((paired.b[to] >= 0) & (found.a[k][paired.a[rows]] == found.b[k][paired.b[to]])).sum() / max((paired.b[to] >= 0).sum(), 1))
                 for to in moved]  # fmt: skip
        values.add_against(f"matched nodes of one class after {k} round{'s' if k != 1 else ''}", same(paired.b[rows]), PERMUTED, drawn, n=len(rows))


def _partitions(paired: Paired, options: CompareOptions) -> Found:
    try:
        return Found(compare_memberships(paired, draws=options.draws, seed=options.seed, communities=options.communities))
    except ImportError as missing:
        raise NotThere(f'communities need igraph and leidenalg ({missing}): pip install "featlas[communities]"') from None


def _regions(paired: Paired, options: CompareOptions) -> Found:
    a, b = paired.side_a, paired.side_b
    if a.regions is None or b.regions is None:
        missing = " and ".join(f"{name} ({side.model})" for name, side in (("A", a), ("B", b)) if side.regions is None)
        raise NotThere(f"no regions of {missing} in the statistics store: `featlas analyze rois` finds some in samples")
    return Found(
        *compare_regions(
            paired, draws=options.draws, seed=options.seed, bins=options.bins, alpha=options.alpha, with_transport=Part.TRANSPORT in options.parts
        )
    )


PARTS: Mapping[Part, Callable[[Paired, CompareOptions], Found]] = MappingProxyType(
    {Part.EDGES: _edges, Part.PROFILES: _profiles, Part.REFINEMENT: _refinement, Part.PARTITIONS: _partitions, Part.REGIONS: _regions}
)
"""`TRANSPORT` is a part of `REGIONS`."""


# --- from the stores ------------------------------------------------------------------------------------------------------


class MatchSites(StrEnum):
    """Which pairs of a stored matching say which feature is which."""

    ALL = "all"
    """Mutual nearest neighbours over all sites at once."""
    SAME = "same"
    """Mutual nearest neighbours between sites of one name."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where two named sides are read from. matching: the beginning of a stored matching's key, None for the newest that fits the two runs.

    match_sites: which of its pairs; None for those of the same sites where both runs have the same sites and the models as many layers, else of all.
    parcellation, other_parcellation: the beginnings of keys; None for the regions found last of each side's model.
    """

    store: GraphStore
    statistics: StatisticsStore | None
    matching: str | None = None
    match_sites: MatchSites | None = None
    parcellation: str | None = None
    other_parcellation: str | None = None


@dataclass(frozen=True, eq=False)
class Matched:
    """A stored matching's pairs, A's features as `source`, and which they are; nothing (None) where both sides have the same nodes."""

    key: str = ""
    pairs: pl.DataFrame | None = None
    sites: MatchSites | None = None


def stored_matching(
    statistics: StatisticsStore | None, a: GraphSide, b: GraphSide, key: str | None = None, sites: MatchSites | None = None,
    layers: Mapping[str, int] | None = None,
) -> Matched:  # fmt: skip
    """The significant mutual pairs of a stored matching, whichever way round it was made; none where both have the same nodes.

    key: the beginning of its key, None for the newest of the two models that is of the runs' dictionaries. sites: as `Sources.match_sites`; layers:
    how many each model has. Raises `NoMatching` for two models, or one with other dictionaries at every site, without one; `BadMatching` for one
    without pairs; `BadSide` where `sites` says nothing.
    """
    shared = [site for site, name in a.dictionaries.items() if b.dictionaries.get(site) == name]
    if key is None and a.model == b.model and shared:
        if sites is not None:
            raise BadSide(f"--match-sites {sites} says nothing here: both graphs have the same nodes, so that no matching is used")
        return Matched()
    if statistics is None:
        raise NoMatching(f"no matching of {a.model} and {b.model}: the atlas has no statistics; make one with `featlas analyze match`")
    chosen = _fitting(statistics, a, b, key)
    if sites is None:
        counted = layers or {}
        alike = set(a.dictionaries) == set(b.dictionaries) and counted.get(a.model) == counted.get(b.model)
        sites = MatchSites.SAME if alike else MatchSites.ALL
    method = MatchMethod.SITE_PAIRS if sites is MatchSites.SAME else MatchMethod.ALL_SITES
    pairs = read_matches(statistics, chosen, model_a=a.model, model_b=b.model, method=method).filter("significant", "mutual")
    if sites is MatchSites.SAME:
        pairs = pairs.filter(pl.col("site_a") == pl.col("site_b"))
    if pairs.is_empty():
        among = "between sites of one name (--match-sites all pairs those of any sites)" if sites is MatchSites.SAME else "over all sites"
        raise BadMatching(f"matching {chosen} found no pair beyond chance {among}: {NO_PAIR}")
    return Matched(chosen, _turned(pairs, a, b), sites)


def _fitting(statistics: StatisticsStore, a: GraphSide, b: GraphSide, key: str | None) -> str:
    """The matching that is named, or the newest of the two models that is of most of the runs' sites. Raises `NoMatching`."""
    named = find_matching(statistics, key, model_a=a.model, model_b=b.model)
    there = list_matchings(statistics)
    of_models = [sorted(ends) == sorted((a.model, b.model)) for ends in zip(there["model_a"], there["model_b"], strict=True)]
    asked = [named] if key is not None else there.filter(pl.Series(of_models, dtype=pl.Boolean))["matching"].to_list()
    wanted = [{feature_key(side.model, name, site, "") for site, name in side.dictionaries.items()} for side in (a, b)]
    covered = {matching: _covers(matched_dictionaries(statistics, matching), wanted) for matching in asked}
    fitting = {matching: n for matching, n in covered.items() if n is not None}
    if not fitting:
        which = f"matching {named} is" if len(asked) == 1 else f"all {len(asked)} matchings of {a.model} and {b.model} are"
        raise NoMatching(
            f"{which} of other dictionaries than {a.name} and {b.name}: make one of theirs with `featlas ingest aligned` and `featlas analyze match`"
        )
    return max(fitting, key=lambda matching: fitting[matching])  # the first of them, which is the newest


def _covers(ends: Sequence[Set[str]], wanted: Sequence[Set[str]]) -> int | None:
    """How many of both runs' sites a matching is of, whichever way round; None where it is of no site of one of them.

    A run that does not say what its dictionaries are fits any, and so does a matching that has neither aligned samples nor pairs.
    """
    if not any(ends) or not all(wanted):
        return 0
    ways = [[len(own & asked) for own, asked in zip(way, wanted, strict=True)] for way in (ends, ends[::-1])]
    return max((sum(way) for way in ways if all(way)), default=None)


def _turned(pairs: pl.DataFrame, a: GraphSide, b: GraphSide) -> pl.DataFrame:
    """The pairs with A's features as `source`: of one model with two sets of dictionaries only the keys tell which side is which."""
    ends = [set(side.nodes["key"].to_list()) for side in (a, b)]
    counts = [
        int(pairs.select((pl.col(first).is_in(list(ends[0])) & pl.col(second).is_in(list(ends[1]))).sum()).item())
        for first, second in (("source", "target"), ("target", "source"))
    ]
    if counts[1] <= counts[0]:
        return pairs
    swapped = {"source": "target", "site_a": "site_b", "feature_a": "feature_b"}
    swapped |= {other: name for name, other in swapped.items()}
    return pairs.rename({name: other for name, other in swapped.items() if name in pairs.columns})


def compare_named(
    sources: Sources, a: tuple[str | None, SideOptions], b: tuple[str | None, SideOptions], options: CompareOptions,
    *, progress: ProgressOf = lambda done, total, what: None,
) -> Comparison:  # fmt: skip
    """Compare two runs or circuits by the beginnings of their keys, with the regions of their models where there are some."""
    sides = [read_side(sources.store, name, own) for name, own in (a, b)]
    found = stored_matching(sources.statistics, sides[0], sides[1], sources.matching, sources.match_sites, model_layers(sources.store))
    if {Part.REGIONS, Part.PARTITIONS, Part.TRANSPORT} & set(options.parts):
        whole = all(own == SideOptions(by=own.by) for _, own in (a, b))
        sides = list(_with_regions(sources, sides, whole))
    return compare(sides[0], sides[1], found.pairs, options, matching=found.key, match_sites=found.sites, progress=progress)


def _with_regions(sources: Sources, sides: Sequence[GraphSide], whole: bool) -> Iterator[GraphSide]:
    """The sides with regions, as far as their models have some. What was measured between regions is taken where both whole runs have it."""
    found: list[Parcellation | None] = []
    for side, name in zip(sides, (sources.parcellation, sources.other_parcellation or sources.parcellation), strict=True):
        # one --parcellation is both sides' where they are of one model
        own = name if name is not None and (side is sides[0] or sources.other_parcellation or side.model == sides[0].model) else None
        found.append(_parcellation(sources.statistics, own, side))
    drives = [
        drives_of_run(sources.store, parcellation.key, side.run) if parcellation is not None and whole else pl.DataFrame()
        for side, parcellation in zip(sides, found, strict=True)
    ]
    measured = all(frame.height for frame in drives)
    for side, parcellation, frame in zip(sides, found, drives, strict=True):
        if parcellation is None:
            yield side
            continue
        assert sources.statistics is not None
        labels = user_labels(sources.statistics, parcellation.key)
        names = {(site, block): label for site, level, block, label in labels.iter_rows() if parcellation.sites[site].chosen == level}
        yield with_regions(_with_tasks(sources.store, side), parcellation, names=names, drives=frame if measured else None)


def _parcellation(statistics: StatisticsStore | None, name: str | None, side: GraphSide) -> Parcellation | None:
    """The regions of a side's model: those named, else those found last; None where there are none. Raises `BadSide` for another dictionary's."""
    if statistics is None or (name is None and stored_parcellations(statistics, side.model).is_empty()):
        return None
    found = read_parcellation(statistics, name, model=side.model)
    other = [site for site, own in found.sites.items() if site in side.dictionaries and side.dictionaries[site] != own.dictionary]
    if other and name is not None:
        raise BadSide(f"regions {found.key} are of another dictionary at {', '.join(other)} than {side.name}: name others by --parcellation")
    return None if other else found


def _with_tasks(store: GraphStore, side: GraphSide) -> GraphSide:
    """The side with how strong each task's edges at every node are in its run."""
    tasks, strengths = task_strengths(store, find_run(store, side.run), side.effective)
    return replace(side, tasks=tasks, profile=strengths)
