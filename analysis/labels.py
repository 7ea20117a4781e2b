"""Automatic labels: the rules of `label_rules` on what an atlas holds, kept, and shown where nobody has named a feature.

1. `gather` finds what the rules can use: samples or contexts, the model where it is given, runs of edges, regions.
2. Each rule gives its labels; `summaries` joins those of a feature into one.
3. `write_automatic` puts them in place of the automatic labels that these features had, and the best label of each onto the graph.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from ..model.dictionary_sources import SiteDictionaries
from ..model.loading import LoadedModel
from ..queries.labels import (
    SUMMARY,
    LabelKind,
    adopt_labels,
    apply_labels,
    known_sites,
    remove_labels,
    write_labels,
)
from ..queries.partitions import stored_parcellations
from ..queries.places import blocks_of_features, drives, model_layers, sent_by_sequence, tasks_of_run
from ..queries.samples import SampleStore
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import list_runs, model_features
from . import label_rules
from .label_rules import Occurrences, Rule
from .notes import feature_notes, strongest_contexts
from .promoted import promoted_tokens

FEATURE: Mapping[str, pl.DataType] = {"key": pl.String(), "model": pl.String(), "dictionary": pl.String(), "site": pl.String(), "feature": pl.Int64()}
"""Features to be labelled."""


class NothingToLabel(UserError):
    """An atlas has no features of a model, or nothing that the rules could go by."""


@dataclass(frozen=True)
class AutomaticOptions:
    """rules: those to apply. sites: of these only, all unless given. samples: the run of samples to take, by its key; the newest unless given."""

    rules: tuple[Rule, ...] = tuple(Rule)
    sites: tuple[str, ...] | None = None
    samples: str | None = None


@dataclass(frozen=True)
class Atlas:
    """What the rules go by; `samples` None: without. model, dictionaries: for the decoder's rule, None: without."""

    store: GraphStore
    statistics: StatisticsStore
    samples: SampleStore | None = None
    model: LoadedModel | None = None
    dictionaries: SiteDictionaries | None = None


@dataclass(frozen=True)
class Automatic:
    """What the rules found. labels: `label_rules.RULED`, the summaries among them by rule "summary". features: `FEATURE`, those that were looked at.

    left_out: rules that gave nothing, with the reason. changed: nodes of the graph whose label is another now.
    """

    labels: pl.DataFrame
    features: pl.DataFrame
    left_out: Mapping[str, str] = field(default_factory=dict)
    changed: int = 0

    def counts(self) -> dict[str, int]:
        """How many features each rule labelled."""
        n = dict(self.labels.group_by("rule").len().iter_rows())
        return {rule: int(n.get(rule, 0)) for rule in (*map(str, Rule), SUMMARY) if rule in n or rule == SUMMARY}


# -- 1. what there is ----------------------------------------------------------------------------------------


def labelled_features(store: GraphStore, statistics: StatisticsStore, model: str, sites: Collection[str] | None = None) -> pl.DataFrame:
    """The features (`FEATURE`) that automatic labels are for: those of the graph, and all that a statistics run saw active, by key."""
    frames = [model_features(store, model).filter(pl.col("kind") == "feature").select("key", "model", "dictionary", "site", feature="index")]
    frames.append(
        statistics.query(
            "SELECT DISTINCT s.key, r.model, d.dictionary, s.site, s.feature::BIGINT AS feature FROM feature_statistics s"
            " JOIN runs r ON r.run = s.run AND r.basis = 'activation' AND r.status = 'done'"
            " JOIN run_sites d ON d.run = s.run AND d.site = s.site WHERE r.model = $model AND s.kind = 'feature' AND s.count > 0",
            {"model": model},
        )
    )
    rows = pl.concat([frame.cast(pl.Schema(FEATURE)) for frame in frames]).unique("key").sort("key")
    return rows if sites is None else rows.filter(pl.col("site").is_in(list(sites)))


def model_of(store: GraphStore | None, statistics: StatisticsStore, name: str | None = None) -> str:
    """The only model of an atlas, or the one whose key begins so. Raises `NothingToLabel`."""
    models = known_sites(store, statistics)["model"].unique(maintain_order=True).to_list()
    fitting = [model for model in models if name is None or model.startswith(name)]
    if len(fitting) == 1:
        return str(fitting[0])
    if not models:
        raise NothingToLabel("the atlas has no features yet: `featlas ingest edges` or `featlas ingest statistics` measures some")
    said = "the atlas has several models" if len(fitting) > 1 else f"the atlas has no model {name!r}"
    raise NothingToLabel(f"{said}: choose by --of {' or '.join(models)}")


def occurrences(atlas: Atlas, features: pl.DataFrame, options: AutomaticOptions) -> list[Occurrences]:
    """Where the features of each site are active: in samples of activations of their dictionary; those that are not, in their contexts."""
    found: list[Occurrences] = []
    for (site,), own in features.partition_by("site", as_dict=True, maintain_order=True).items():
        for (dictionary,), part in own.partition_by("dictionary", as_dict=True, maintain_order=True).items():
            where = str(site), str(dictionary), str(part["model"][0])
            seen = _from_samples(atlas, part, *where, options.samples)
            found += seen
            silent = part.filter(~pl.col("key").is_in([key for one in seen for key in one.active_keys()]))
            found += _from_contexts(atlas, silent, *where) if silent.height else []
    return found


def _from_samples(atlas: Atlas, own: pl.DataFrame, site: str, dictionary: str, model: str, name: str | None) -> list[Occurrences]:
    if atlas.samples is None:
        return []
    run = atlas.samples.find(name) if name is not None else atlas.samples.latest(model, {site: dictionary}, "activation")
    if run is None or run.basis != "activation" or run.model != model or run.dictionaries.get(site) != dictionary:
        return []
    tokens = atlas.samples.tokens(run.key)
    if tokens["text"].null_count() == len(tokens):
        return []
    order = own.sort("feature")
    index = order["feature"].to_numpy()
    return [label_rules.sampled(atlas.samples.read(run.key, site), tokens, np.asarray(index), order["key"].to_list(), f"samples {run.key}")]


def _from_contexts(atlas: Atlas, own: pl.DataFrame, site: str, dictionary: str, model: str) -> list[Occurrences]:
    run = atlas.statistics.latest_run(model, {site: dictionary})
    if run is None:
        return []
    contexts = strongest_contexts(atlas.statistics, run.run, own["key"].to_list())
    return [label_rules.from_contexts(contexts, f"{label_rules.OF_CONTEXTS}{run.run}")] if contexts.height else []


# -- 2. the rules --------------------------------------------------------------------------------------------


def find_labels(atlas: Atlas, features: pl.DataFrame, options: AutomaticOptions) -> Automatic:
    """What the rules say of features (`FEATURE`, of one model)."""
    if features.is_empty():
        raise NothingToLabel("there are no features to label" + (f" at {', '.join(options.sites)}" if options.sites else ""))
    left_out: dict[str, str] = {}
    frames: list[pl.DataFrame] = []
    seen = occurrences(atlas, features, options) if {Rule.TOKENS, Rule.CLASS} & set(options.rules) else []
    firing = {rule: pl.concat([label_rules.empty(), *map(apply, seen)]) for rule, apply in _FIRING.items()}
    firing[Rule.TOKENS] = _surer(atlas, features, firing[Rule.TOKENS])
    names = dict(firing[Rule.TOKENS].select("key", "label").iter_rows())
    for rule in options.rules:
        rows = firing[rule] if rule in firing else _OTHERS[rule](atlas, features, names)
        if rows.is_empty():
            left_out[str(rule)] = _reason(rule, atlas)
        frames.append(rows)
    keys = features.select("key")
    parts = pl.concat(frames).join(keys, on="key", how="semi") if frames else label_rules.empty()
    joined = label_rules.summaries(parts).with_columns(rule=pl.lit(SUMMARY)).select(list(label_rules.RULED))
    return Automatic(pl.concat([parts, joined.cast(pl.Schema(label_rules.RULED))]), features, left_out)


def _surer(atlas: Atlas, features: pl.DataFrame, tokens: pl.DataFrame) -> pl.DataFrame:
    """The tokens' labels (`RULED`); where what samples say is not sure, the tokens of the strongest contexts, if there are any, take its place.

    A feature that fires on many words has a little of its activation at each of them: the first by its share in a small text may say nothing.
    """
    unsure = tokens.filter((pl.col("confidence") < label_rules.SURE) & ~pl.col("source").str.starts_with(label_rules.OF_CONTEXTS))
    asked = features.join(unsure.select("key"), on="key", how="semi")
    found: list[Occurrences] = []
    for (site, dictionary, model), part in asked.partition_by("site", "dictionary", "model", as_dict=True, maintain_order=True).items():
        found += _from_contexts(atlas, part, str(site), str(dictionary), str(model))
    instead = pl.concat([label_rules.empty(), *map(label_rules.tokens_rule, found)])
    return pl.concat([tokens.join(instead.select("key"), on="key", how="anti"), instead]).sort("key")


def _reason(rule: Rule, atlas: Atlas) -> str:
    """Why a rule gave nothing."""
    if rule is Rule.DECODER and atlas.model is None:
        return "it needs the model: give --model and --dictionaries"
    return {
        Rule.TOKENS: "no samples and no statistics of these dictionaries: `featlas ingest samples` or `featlas ingest statistics`",
        Rule.CLASS: "no class of tokens has half of any feature's activation",
        Rule.DECODER: "the dictionaries given are not those of these features",
        Rule.TASK: "no run has sequences of two tasks: `featlas ingest edges --task a+b`",
        Rule.PLACE: "the graph has no aggregated edges: `featlas ingest edges`",
        Rule.REGION: "the graph has no regions or communities: `featlas analyze rois`, `featlas analyze communities`",
    }[rule]


def _promoted(atlas: Atlas, features: pl.DataFrame, names: Mapping[str, str]) -> pl.DataFrame:
    """The decoder's rule, on the features whose dictionaries are given."""
    if atlas.model is None or atlas.dictionaries is None:
        return label_rules.empty()
    present = set(features["site"])
    given = {site: atlas.dictionaries[site] for site in atlas.dictionaries.sites if site.name in present}
    ids = pl.DataFrame({"site": [site.name for site in given], "dictionary": [d.id for d in given.values()]}, schema_overrides={"site": pl.String})
    own = features.filter(pl.col("model") == atlas.model.key).join(ids, on=["site", "dictionary"], how="semi") if given else features.clear()
    chosen = {str(site): part["feature"].to_list() for (site,), part in own.partition_by("site", as_dict=True).items()}
    found = promoted_tokens(atlas.model, given, chosen, n=label_rules.N_TOKENS)
    if found.is_empty():
        return label_rules.empty()
    n_vocabulary = len(atlas.model.tokenizer)
    return label_rules.decoder_rule(found, own.select("site", "feature", "key"), n_vocabulary, f"decoders of {atlas.dictionaries.name}")


def _tasks(atlas: Atlas, features: pl.DataFrame, names: Mapping[str, str]) -> pl.DataFrame:
    runs = [run.key for run in list_runs(atlas.store) if run.model == features["model"][0]]
    tasks = [tasks_of_run(atlas.store, run).with_columns(run=pl.lit(run)) for run in runs]
    if not tasks or pl.concat(tasks)["task"].n_unique() < 2:
        return label_rules.empty()
    sent = [sent_by_sequence(atlas.store, run).with_columns(run=pl.lit(run)) for run in runs]
    return label_rules.task_rule(pl.concat(sent), pl.concat(tasks))


def _places(atlas: Atlas, features: pl.DataFrame, names: Mapping[str, str]) -> pl.DataFrame:
    model = features["model"][0]
    runs = [run.key for run in list_runs(atlas.store) if run.model == model]
    edges = [drives(atlas.store, run).with_columns(run=pl.lit(run)) for run in runs]
    if not edges:
        return label_rules.empty()
    deepest = features["site"].str.extract(r"_(\d+)$").cast(pl.Int64).max()
    n_layers = model_layers(atlas.store).get(model) or (deepest + 1 if isinstance(deepest, int) else 1)
    return label_rules.place_rule(pl.concat(edges), features, n_layers, names)


def _regions(atlas: Atlas, features: pl.DataFrame, names: Mapping[str, str]) -> pl.DataFrame:
    newest = stored_parcellations(atlas.statistics)["parcellation"].to_list()
    return label_rules.region_rule(blocks_of_features(atlas.store).join(features.select("key"), on="key", how="semi"), newest)


_FIRING: Mapping[Rule, Callable[[Occurrences], pl.DataFrame]] = {Rule.TOKENS: label_rules.tokens_rule, Rule.CLASS: label_rules.class_rule}
_OTHERS: Mapping[Rule, Callable[[Atlas, pl.DataFrame, Mapping[str, str]], pl.DataFrame]] = {
    Rule.DECODER: _promoted, Rule.TASK: _tasks, Rule.PLACE: _places, Rule.REGION: _regions,
}  # fmt: skip


# -- 3. keeping ----------------------------------------------------------------------------------------------


def write_automatic(store: GraphStore, statistics: StatisticsStore, found: Automatic, rules: Collection[str]) -> int:
    """Keep automatic labels in place of those that these rules, and the summary, gave these features before; how many nodes of the graph changed."""
    keys = found.features["key"].to_list()
    for rule in (*map(str, rules), SUMMARY):
        remove_labels(statistics, keys, kind=LabelKind.AUTOMATIC, rule=rule)
    rows = found.labels.join(found.features.select("key", "model", "site", "feature"), on="key")
    write_labels(statistics, rows.with_columns(kind=pl.lit(str(LabelKind.AUTOMATIC))))
    return apply_labels(store, statistics)


def label_automatically(atlas: Atlas, model: str, options: AutomaticOptions | None = None) -> Automatic:
    """Find automatic labels of a model's features and keep them. Labels of other kinds stand above them and stay. Raises `NothingToLabel`.

    A summary joins what the rules say now with what those that are not applied this time said before.
    """
    options = options or AutomaticOptions()
    features = labelled_features(atlas.store, atlas.statistics, model, options.sites)
    found = find_labels(atlas, features, options)
    before = _kept(atlas.statistics, [str(rule) for rule in Rule if rule not in options.rules], features)
    if before.height:
        parts = pl.concat([found.labels.filter(pl.col("rule") != SUMMARY), before])
        joined = label_rules.summaries(parts).with_columns(rule=pl.lit(SUMMARY)).select(list(label_rules.RULED))
        labels = pl.concat([found.labels.filter(pl.col("rule") != SUMMARY), joined.cast(pl.Schema(label_rules.RULED))])
        found = Automatic(labels, features, found.left_out)
    adopt_labels(atlas.store, atlas.statistics, _older_names(atlas.store, atlas.statistics, model))
    changed = write_automatic(atlas.store, atlas.statistics, found, [str(rule) for rule in options.rules])
    return Automatic(found.labels, features, found.left_out, changed)


def _kept(statistics: StatisticsStore, rules: list[str], features: pl.DataFrame) -> pl.DataFrame:
    """The automatic labels of some rules that features have, as `RULED`."""
    rows = statistics.query(
        f"SELECT {', '.join(label_rules.RULED)} FROM feature_labels WHERE kind = 'automatic' AND rule IN (SELECT unnest($rules::VARCHAR[]))"
        " ORDER BY key, rule, source",
        {"rules": rules},
    )
    own = rows.cast(pl.Schema(label_rules.RULED)).join(features.select("key"), on="key", how="semi")
    return own.unique(["key", "rule"], keep="first", maintain_order=True)


def _older_names(store: GraphStore, statistics: StatisticsStore, model: str) -> pl.DataFrame:
    """What older versions wrote as labels of features, without saying that nobody gave them: `key, label`."""
    features = model_features(store, model).filter((pl.col("kind") == "feature") & pl.col("label").is_not_null() & pl.col("label_kind").is_null())
    runs = statistics.runs().filter((pl.col("model") == model) & (pl.col("status") == "done") & (pl.col("basis") == "activation"))
    if features.is_empty():
        return pl.DataFrame(schema={"key": pl.String, "label": pl.String})
    unnamed, keys = features.with_columns(label=pl.lit(None, dtype=pl.String)), features["key"].to_list()
    names = [feature_notes(unnamed, strongest_contexts(statistics, run, keys)).select("key", label="name") for run in runs["run"]]
    return pl.concat(names) if names else pl.DataFrame(schema={"key": pl.String, "label": pl.String})


def annotate(store: GraphStore, statistics: StatisticsStore, run: str) -> int:
    """Write what a finished statistics run says of the features that the graph has; how many nodes it says something of.

    `frequency`, `mean_activation` and `statistics_run`; and the tokens that features fire on as their automatic label by that rule, which the graph
    shows where they have no better one. The statistics must be open for writing.
    """
    model = statistics.run(run).model
    present = model_features(store, model)
    rows = statistics.feature_properties(run).join(present.select("key"), on="key", how="semi")
    if rows.is_empty():
        return 0
    store.merge_nodes("Feature", rows)
    features = present.filter(pl.col("kind") == "feature").join(rows.select("key"), on="key", how="semi")
    features = features.select("key", "model", "dictionary", "site", feature="index").cast(pl.Schema(FEATURE))
    adopt_labels(store, statistics, _older_names(store, statistics, model))
    contexts = strongest_contexts(statistics, run, features["key"].to_list())
    source = f"{label_rules.OF_CONTEXTS}{run}"
    labels = label_rules.tokens_rule(label_rules.from_contexts(contexts, source)) if contexts.height else label_rules.empty()
    named = statistics.query("SELECT key FROM feature_labels WHERE kind = 'automatic' AND rule = ? AND starts_with(source, 'samples')", [Rule.TOKENS])
    fresh = features.join(named, on="key", how="anti")  # what samples say of all activations stays
    remove_labels(statistics, fresh["key"].to_list(), kind=LabelKind.AUTOMATIC, rule=Rule.TOKENS)
    known = labels.join(fresh.select("key", "model", "site", "feature"), on="key")
    if known.height:
        write_labels(statistics, known.with_columns(kind=pl.lit(str(LabelKind.AUTOMATIC))))
    apply_labels(store, statistics)
    return rows.height


def open_samples(atlas: Path) -> SampleStore:
    """The samples of an atlas, for reading."""
    return SampleStore(atlas, read_only=True)
