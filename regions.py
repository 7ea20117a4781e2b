"""Regions of interest from samples to the graph: found or read back, described, named, written.

1. `find_regions`: the partition of every site of a run of samples, kept in the statistics store under the key of what determined it.
2. `described`: what is known of every block, with the names that people give.
3. `name_regions`: those names.
4. `write_into_graph`: partitions and blocks as nodes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from .analysis.correlations import Correlation, correlation
from .analysis.finding import FindingOptions, find_parcellation, like
from .analysis.parcellation import NotAPartition, Parcellation
from .analysis.partitioning import FINDERS, PartitionMethod
from .analysis.region_gallery import regions_page
from .analysis.regions import Description, describe
from .analysis.regions_store import label_block, read_parcellation, write_parcellation, write_regions
from .errors import UserError
from .model.dictionaries import Dictionary
from .model.sites import Site
from .queries.labels import LabelKind, best_labels
from .queries.partitions import NoSuchParcellation, user_labels
from .queries.samples import SampleRun, SampleStore
from .queries.schema import feature_key
from .queries.statistics import FILE_NAME, StatisticsStore
from .queries.store import GraphStore

_LABEL = re.compile(r"([a-z]+(?:_\d+)?)/(\d+)(?:@(\d+))?=(.*)", re.DOTALL)


class BadLabel(UserError):
    """A name for a region that does not say which region."""


@dataclass(frozen=True, eq=False)
class Regions:
    """A parcellation with what is known of its blocks, and the samples that it was found in."""

    parcellation: Parcellation
    description: Description
    samples: SampleRun


@dataclass(frozen=True)
class NamedBlock:
    """What a person calls a block; an empty label takes the name away. level None is the chosen one."""

    site: str
    block: int
    level: int | None
    label: str

    @classmethod
    def parse(cls, text: str) -> "NamedBlock":
        """From `resid_11/3=plural nouns`, or `resid_11/3@1=…` for another level. Raises `BadLabel`."""
        match = _LABEL.fullmatch(text)
        if match is None:
            raise BadLabel(f"--label {text!r} names no region: write SITE/BLOCK=TEXT, as in resid_11/3='plural nouns'")
        site, block, level, label = match.groups()
        return cls(site, int(block), None if level is None else int(level), label.strip())


def sampled_sites(run: SampleRun, sites: Sequence[str]) -> list[str]:
    """The run's sites that are wanted, all where none is named. Raises `UserError` for one that it lacks."""
    known = list(run.dictionaries)
    if unknown := [site for site in sites if site not in known]:
        raise UserError(f"--sites {unknown[0]!r} is not among the samples: {run.key} has {', '.join(known)}")
    return [site for site in known if not sites or site in sites]


def find_regions(
    store: SampleStore, run: SampleRun, sites: Sequence[str], options: FindingOptions, *, progress: Callable[[str], None] = lambda said: None
) -> Parcellation:
    """The partition of the sites' features, from samples."""
    return find_parcellation(run, (store.read(run.key, site) for site in sampled_sites(run, sites)), options, progress=progress)


def described(
    store: SampleStore, run: SampleRun, parcellation: Parcellation, dictionaries: Mapping[Site, Dictionary] | None, labels: pl.DataFrame | None
) -> Regions:
    """The blocks with all that is known of them; `labels` as `user_labels` gives them. Features that have been named name their blocks."""
    found = describe(
        parcellation, lambda site: store.read(run.key, site), run.sequences, store.tokens(run.key), dictionaries=dictionaries,
        feature_labels=_feature_names(store.folder.parent, run),
    )  # fmt: skip
    return Regions(parcellation, found if labels is None else found.with_labels(labels), run)


def _feature_names(atlas: Path, run: SampleRun) -> pl.DataFrame | None:
    """What people, files and Neuronpedia call the features of a run of samples: `site, feature, label`; None where nobody has named any."""
    if not (atlas / FILE_NAME).exists():
        return None
    with StatisticsStore(atlas, read_only=True) as statistics:
        names = best_labels(statistics).filter((pl.col("kind") != LabelKind.AUTOMATIC) & (pl.col("model") == run.model))
    stems = [feature_key(run.model, dictionary, site, "") for site, dictionary in run.dictionaries.items()]
    own = names.filter(pl.any_horizontal(pl.lit(False), *(pl.col("key").str.starts_with(stem) for stem in stems)))
    return own.select("site", "feature", "label") if own.height else None


def keep(atlas: Path, parcellation: Parcellation, named: Sequence[NamedBlock]) -> pl.DataFrame:
    """Keep a parcellation and names of its blocks in the statistics store; what people call its blocks, old names and new."""
    with StatisticsStore(atlas) as statistics:
        write_parcellation(statistics, parcellation)
        for one in named:
            own = parcellation.sites.get(one.site)
            if own is None:
                raise BadLabel(f"--label names {one.site!r}: the regions are of {', '.join(parcellation.sites)}")
            level = own.chosen if one.level is None else one.level
            label_block(statistics, None, parcellation.key, one.site, level, one.block, one.label or None)
        return user_labels(statistics, parcellation.key)


def read(atlas: Path, name: str | None, model: str | None = None) -> tuple[Parcellation, pl.DataFrame]:
    """A parcellation found before, by the beginning of its key, or the last one (of a model); and what people call its blocks."""
    with StatisticsStore(atlas, read_only=True) as statistics:
        parcellation = read_parcellation(statistics, name, model=model)
        return parcellation, user_labels(statistics, parcellation.key)


def write_into_graph(store: GraphStore, regions: Regions) -> None:
    """Partitions and blocks as nodes, features as their members. Doing it twice is doing it once."""
    write_regions(store, regions.parcellation, regions.description)


def names_of(parcellation: Parcellation, labels: pl.DataFrame) -> dict[str, str]:
    """What the units of a parcellation's chosen levels are called beside their numbers, where a person gave a name."""
    chosen = {name: own.chosen for name, own in parcellation.sites.items()}
    rows = labels.select("site", "level", "block", "label").iter_rows()
    return {f"{site}/block {block}": f"{site}/{block} {label}" for site, level, block, label in rows if chosen.get(site) == level}


# --- other partitions beside them ------------------------------------------------------------------------------------


def at_level(parcellation: Parcellation, level: int | None) -> Parcellation:
    """The parcellation with another kept level as the chosen one, the coarsest where a site has fewer levels. Raises `NotAPartition`."""
    if level is None:
        return parcellation
    deepest = max(len(own.levels) for own in parcellation.sites.values())
    if not 0 <= level < deepest:
        raise NotAPartition(f"--level {level}: parcellation {parcellation.key} has levels 0 to {deepest - 1}")
    sites = {name: replace(own, chosen=min(level, len(own.levels) - 1)) for name, own in parcellation.sites.items()}
    return replace(parcellation, sites=sites)


def others(samples: SampleStore, atlas: Path, own: Parcellation, names: Sequence[str]) -> dict[str, Parcellation]:
    """Parcellations to compete with `own`: methods, which find as many blocks at every site in the same samples, or keys of what was found before.

    Raises `UserError` for a name that is neither, or a parcellation of other sites.
    """
    found = {}
    for name in names:
        if name in FINDERS:
            options = like(options_of(own), own, PartitionMethod(name))
            run = samples.find(own.samples)
            found[name] = find_regions(samples, run, list(own.sites), options)
        else:
            try:
                other, _ = read(atlas, name, own.model)
            except NoSuchParcellation as error:
                methods = ", ".join(FINDERS)
                raise UserError(f"--against {name!r} is neither features, nor a method ({methods}), nor found before: {error}") from None
            if set(other.sites) != set(own.sites):
                raise UserError(f"--against {name}: its regions are of {', '.join(other.sites)}, not of {', '.join(own.sites)}")
            found[f"{other.method} {other.key[:6]}"] = other
    return found


def options_of(parcellation: Parcellation) -> FindingOptions:
    """The options that a parcellation was found by, as far as its settings say."""
    settings, usual = parcellation.settings, FindingOptions()
    known = lambda name, default: default if settings.get(name) is None else settings[name]
    return FindingOptions(
        correlation=None if settings.get("correlation") is None else Correlation(settings["correlation"]), seed=known("seed", usual.seed),
        min_count=known("min_count", usual.min_count), min_sequences=known("min_sequences", usual.min_sequences),
        neighbours=known("neighbours", usual.neighbours),
    )


# --- out of the program -----------------------------------------------------------------------------------------------


def page(store: SampleStore, found: Regions) -> str:
    """Regions as a page of figures, with the correlations that they were found in."""
    parcellation, samples = found.parcellation, found.samples
    kind = Correlation(parcellation.settings.get("correlation") or Correlation.PEARSON)
    settings = (("samples of", samples.source), ("tokens", f"{samples.n_tokens:,}"), ("sequences", f"{samples.n_sequences:,}"))
    commands = (f"featlas analyze ablate-rois --parcellation {parcellation.key[:8]}", f"featlas query regions -p parcellation={parcellation.key[:8]}")
    of_site = lambda name: correlation(store.read(parcellation.samples, name), parcellation.sites[name].features, kind=kind)
    return regions_page(parcellation, found.description, of_site, settings=settings, commands=commands)


def as_json(found: Regions) -> dict[str, object]:
    """Regions for machines."""
    parcellation, description = found.parcellation, found.description
    return {
        "parcellation": parcellation.key, "method": parcellation.method, "basis": parcellation.basis, "samples": parcellation.samples,
        "model": parcellation.model, "settings": dict(parcellation.settings),
        "notes": {name: dict(own.notes) for name, own in parcellation.sites.items()}, "sites": description.sites.to_dicts(),
        "blocks": description.chosen(description.blocks).to_dicts(), "exemplars": description.chosen(description.exemplars).to_dicts(),
        "paths": {name: own.scores.to_dicts() for name, own in parcellation.sites.items()},
    }  # fmt: skip
