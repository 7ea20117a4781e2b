"""Commands of labels: given by hand, from files and from Neuronpedia, found by rule; listed, searched, saved."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from . import console, files
from .errors import UserError
from .options import DEFAULT_ATLAS, Atlas, Device, Dtype, Graph, Json, NotBoth, app, load_named, open_atlas, split_names

if TYPE_CHECKING:
    import polars as pl

    from .queries.statistics import StatisticsStore
    from .queries.store import GraphStore

labels_app = typer.Typer(
    help="What features are called: by hand, from files, from Neuronpedia, by rule; full-text search.",
    no_args_is_help=True, rich_markup_mode=None, add_completion=False,
)  # fmt: skip
app.add_typer(labels_app, name="labels")

Feature = Annotated[str, typer.Argument(help="A feature: its key, or SITE/INDEX, for example resid_11/123.")]
Of = Annotated[
    str | None, typer.Option("--of", help="The model or dictionary whose features they are, by the beginning of its key, where several fit.")
]
OfModel = Annotated[str | None, typer.Option("--of", help="The model whose features they are, by the beginning of its key, where there are several.")]
KindOption = Annotated[
    Literal["hand", "file", "neuronpedia", "automatic"] | None, typer.Option("--kind", help="Labels of this kind only; all kinds unless given.")
]
Site = Annotated[str | None, typer.Option("--site", help="Features of this site only.")]
RuleOption = Annotated[str | None, typer.Option("--rule", help="Labels by this rule (or explainer of Neuronpedia's) only.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Rows to show at most.")]


class NoSuchRule(UserError):
    """There is no automatic rule of that name."""


@contextmanager
def _opened(atlas: Path, graph: str | None) -> "Iterator[tuple[GraphStore | None, StatisticsStore]]":
    """The atlas' statistics and its graph, where it has one, for writing."""
    from .queries.statistics import FILE_NAME, StatisticsStore

    if graph is None and not (atlas / "graph.lbug").exists():
        if not (atlas / FILE_NAME).exists():
            open_atlas(atlas, graph, write=True)  # says what is missing
        with StatisticsStore(atlas) as statistics:
            yield None, statistics
    else:
        with open_atlas(atlas, graph, write=True) as store, StatisticsStore(atlas) as statistics:
            yield store, statistics


@contextmanager
def _searched(atlas: Path, graph: str | None) -> "Iterator[tuple[GraphStore | None, StatisticsStore]]":
    """The same for searching: the graph for reading; the statistics for writing, since their index is kept, or for reading where they cannot be."""
    from .queries.statistics import FILE_NAME, NotAStatisticsStore, StatisticsStore, StatisticsStoreHeld

    there = graph is not None or (atlas / "graph.lbug").exists()
    if not there and not (atlas / FILE_NAME).exists():
        open_atlas(atlas, graph, write=False)  # says what is missing
    with ExitStack() as opened:
        store = opened.enter_context(open_atlas(atlas, graph, write=False)) if there else None
        try:
            statistics = StatisticsStore(atlas, wait_s=0)
        except (NotAStatisticsStore, StatisticsStoreHeld):
            statistics = StatisticsStore(atlas, read_only=True)
        yield store, opened.enter_context(statistics)


def _apply(store: "GraphStore | None", statistics: "StatisticsStore", keys: list[str]) -> int:
    from .queries.labels import apply_labels

    return 0 if store is None else apply_labels(store, statistics, keys)


@labels_app.command("set")
def labels_set_command(
    feature: Feature,
    text: Annotated[str, typer.Argument(help="What to call it: any text of up to 500 characters.")],
    author: Annotated[str | None, typer.Option("--author", envvar="FEATLAS_AUTHOR", help="Who says so.")] = None,
    of: Of = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Call a feature by a name of your own; it stands above every other label, and stays when the atlas is measured again."""
    import polars as pl

    from .queries.labels import LabelKind, adopt_labels, checked, find_feature, labels_of, write_labels

    label = checked(text)
    with _opened(atlas, graph) as (store, statistics):
        known = find_feature(store, statistics, feature, of=of)
        if store is not None:
            adopt_labels(store, statistics, keys=[str(known["key"])])
        before = labels_of(statistics, [str(known["key"])]).filter(pl.col("kind") == LabelKind.HAND)["label"].to_list()
        row = {**known, "label": label, "kind": str(LabelKind.HAND), "author": author}
        write_labels(statistics, pl.DataFrame([row], schema_overrides={"author": pl.String}))
        _apply(store, statistics, [str(known["key"])])
    if as_json:
        console.say_json({"feature": known["key"], "label": label, "before": before[0] if before else None})
    else:
        was = f" (it was {before[0]!r})" if before and before[0] != label else ""
        console.say(f"{known['site']}/{known['feature']} is called {label!r} now{was}")


@labels_app.command("remove")
def labels_remove_command(
    feature: Annotated[str | None, typer.Argument(help="The feature, by its key or SITE/INDEX; left out, all that --kind and --source say.")] = None,
    kind: Annotated[
        Literal["hand", "file", "neuronpedia", "automatic"] | None, typer.Option("--kind", help="Labels of this kind; by hand unless given.")
    ] = None,
    source: Annotated[str | None, typer.Option("--source", help="Those from this file, or this source of Neuronpedia's.")] = None,
    rule: RuleOption = None,
    of: Of = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Take labels away, of one feature or a whole kind or source; the next best label stands in their place."""
    from .queries.labels import LabelKind, NoLabel, find_feature, remove_labels

    if feature is None and kind is None and source is None:
        raise NotBoth("name a feature, or say by --kind or --source which labels to take away")
    chosen = LabelKind(kind) if kind else LabelKind.HAND if feature is not None and source is None and rule is None else None
    with _opened(atlas, graph) as (store, statistics):
        keys = None if feature is None else [str(find_feature(store, statistics, feature, of=of)["key"])]
        gone = remove_labels(statistics, keys, kind=chosen, source=source, rule=rule)
        if gone.is_empty():
            what = " ".join(filter(None, ["label", chosen and f"of kind {chosen}", source and f"from {source}", rule and f"by {rule}"]))
            raise NoLabel(f"{'no feature' if feature is None else feature} has {'a' if feature is None else 'no'} {what}: see `featlas labels list`")
        changed = _apply(store, statistics, gone["key"].unique().to_list())
    if as_json:
        console.say_json({"removed": gone.select("key", "label", "kind", "rule", "source").to_dicts(), "changed": changed})
    elif gone.height == 1:
        console.say(f"{gone['site'][0]}/{gone['feature'][0]} is no longer called {gone['label'][0]!r}")
    else:
        console.say(f"{gone.height:,} labels taken away; {changed:,} features of the graph have another label, or none, now")


@labels_app.command("import")
def labels_import_command(
    file: Annotated[Path, typer.Argument(help="A .csv, .tsv, .jsonl or .json file, also .gz; with --format neuronpedia also a folder.")],
    format: Annotated[
        Literal["table", "neuronpedia"],
        typer.Option("--format", help="Columns key, or site and index, and label; or explanations as Neuronpedia exports or gives them."),
    ] = "table",
    site: Annotated[
        list[str] | None,
        typer.Option("--site", help="Where sae_lens does not know the site of Neuronpedia's source: resid_5, or gpt2-small/6-res-jb=resid_5."),
    ] = None,
    of: Of = None,
    author: Annotated[str | None, typer.Option("--author", envvar="FEATLAS_AUTHOR", help="Who says so, where the file does not.")] = None,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Leave unusable lines out, naming them, instead of refusing all.")] = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Labels from a file: all of them or, where a line is wrong, none."""
    import polars as pl

    from .ingest.label_files import NoLabelFile, neuronpedia_sites, read_label_file, read_neuronpedia, resolve, site_options
    from .queries.labels import LabelKind, adopt_labels, labels_of, write_labels

    if site and format != "neuronpedia":
        raise NotBoth("--site is for --format neuronpedia: a table has a column site")
    with _opened(atlas, graph) as (store, statistics):
        if format == "neuronpedia":
            given, only = site_options(site or [])
            read = read_neuronpedia(file, {**neuronpedia_sites(store, statistics), **given}, only)
        else:
            read = read_label_file(file)
        found = resolve(store, statistics, read, of=of)
        if not skip_invalid:
            found.refuse()
        if found.rows.is_empty():
            raise NoLabelFile(f"{file} has no label of a feature of {atlas}" + (f": {found.problems[0]}" if found.problems else ""))
        rows = found.rows.drop("place").with_columns(author=pl.col("author").fill_null(pl.lit(author, dtype=pl.String)))
        if store is not None:
            adopt_labels(store, statistics, keys=rows["key"].unique().to_list(), of_unknown_kind=False)
        by_hand = rows.filter(pl.col("kind") == LabelKind.HAND).unique("key", keep="last").select("key", now="label")
        before = labels_of(statistics, by_hand["key"].to_list()).filter(pl.col("kind") == LabelKind.HAND)
        replaced = before.join(by_hand, on="key").filter(pl.col("label") != pl.col("now")).height
        n = write_labels(statistics, rows)
        changed = _apply(store, statistics, rows["key"].unique().to_list())
    for problem in found.problems if not as_json else ():
        console.note(f"left out: {problem}")
    if as_json:
        console.say_json({"labels": n, "changed": changed, "left_out": list(found.problems), "empty": found.n_empty, "replaced": replaced})
    else:
        empty = f"; {found.n_empty:,} explanations have no text" if found.n_empty else ""
        if replaced:
            empty += f"; {replaced:,} {'label' if replaced == 1 else 'labels'} by hand replaced"
        console.say(f"{n:,} labels of {rows['key'].n_unique():,} features read; {changed:,} features of the graph have another label now{empty}")


@labels_app.command("export")
def labels_export_command(
    file: Annotated[Path, typer.Argument(help="Where to save them: .csv, .tsv, .jsonl, .json or .parquet; all but the last can be imported again.")],
    kind: KindOption = None,
    site: Site = None,
    rule: RuleOption = None,
    of: OfModel = None,
    best: Annotated[bool, typer.Option("--best", help="Only the label that each feature is called by.")] = False,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """Save labels with all that is known of them: kind, rule, source, author, confidence and evidence."""
    rows = _chosen(atlas, kind, site, rule, of, best)
    _save(rows, file)
    if as_json:
        console.say_json({"file": str(file), "labels": rows.height})
    else:
        console.say(f"{rows.height:,} labels saved in {file}")


def _chosen(atlas: Path, kind: str | None, site: str | None, rule: str | None, of: str | None, best: bool) -> "pl.DataFrame":
    """The labels that the options choose."""
    from .queries.labels import LabelKind, best_labels, list_labels
    from .queries.statistics import StatisticsStore

    with StatisticsStore(atlas, read_only=True) as statistics:
        rows = list_labels(statistics, kind=LabelKind(kind) if kind else None, site=site, rule=rule, model=of)
        if best:
            identity = ["key", "kind", "rule", "source"]
            rows = rows.join(best_labels(statistics).select(identity), on=identity, how="semi", maintain_order="left")
    return rows


def _save(rows: "pl.DataFrame", file: Path) -> None:
    """Save labels in the format that the file's name ends in."""
    import polars as pl

    suffix = file.suffix.lower()
    plain = rows.rename({"feature": "index"}).with_columns(pl.col("written").dt.strftime("%Y-%m-%dT%H:%M:%S"))
    writers: dict[str, Callable[[Any], object]] = {
        ".csv": plain.write_csv, ".tsv": lambda part: plain.write_csv(part, separator="\t"), ".jsonl": plain.write_ndjson,
        ".json": plain.write_json, ".parquet": rows.write_parquet,
    }  # fmt: skip
    if suffix not in writers:
        raise console.OutputFails(f"{file}: labels are saved as {', '.join(writers)}")
    with console.saving(file), files.whole(file) as part:
        writers[suffix](part)


@labels_app.command("auto")
def labels_auto_command(
    rules: Annotated[
        str | None,
        typer.Option("--rules", help="Comma-separated: tokens, class (both it fires on), decoder (promotes; with --model), task, place, region."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="For the rule decoder: a name, folder or file, or smollm2.")] = None,
    dictionaries: Annotated[str | None, typer.Option("--dictionaries", help="For the rule decoder: as `ingest edges` takes them.")] = None,
    sites: Annotated[str | None, typer.Option("--sites", help="Features of these sites only, comma-separated.")] = None,
    samples: Annotated[
        str | None, typer.Option("--samples", help="Run of `ingest samples` for tokens and class, by the beginning of its key; else the latest.")
    ] = None,
    of: OfModel = None,
    show_n: Annotated[int, typer.Option("--show", min=0, help="Labels of each rule to show, the surest.")] = 4,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Labels by rule, marked as such, with the numbers that justify them; never in place of a person's, a file's or Neuronpedia's."""
    from .analysis.label_rules import Rule
    from .analysis.labels import Atlas as Source
    from .analysis.labels import AutomaticOptions, label_automatically, model_of, open_samples
    from .queries.statistics import StatisticsStore
    from .show_labels import show_automatic

    if (model is None) != (dictionaries is None):
        raise NotBoth("the rule decoder needs both --model and --dictionaries")
    chosen = tuple(Rule(name) if name in list(Rule) else _no_rule(name) for name in split_names(rules)) if rules else tuple(Rule)
    options = AutomaticOptions(chosen, split_names(sites) if sites else None, samples)
    with open_atlas(atlas, graph, write=True) as store, StatisticsStore(atlas) as statistics:
        wanted = Rule.DECODER in chosen and model is not None and dictionaries is not None
        loaded, found = load_named(model, dictionaries, sites, device, dtype) if wanted else (None, None)  # type: ignore[arg-type]
        source = Source(store, statistics, open_samples(atlas), loaded, found)
        result = label_automatically(source, model_of(store, statistics, of or (loaded.key if loaded else None)), options)
    if as_json:
        n = {"features": result.features.height, "labels": result.counts(), "changed": result.changed, "left_out": dict(result.left_out)}
        console.say_json(n)
    else:
        show_automatic(result, show_n)


def _no_rule(name: str) -> NoReturn:
    from .analysis.label_rules import Rule

    raise NoSuchRule(f"no rule {name!r}: there are {', '.join(Rule)}")


@labels_app.command("list")
def labels_list_command(
    feature: Annotated[str | None, typer.Argument(help="All labels of one, by its key or SITE/INDEX; left out, how many of each kind.")] = None,
    kind: KindOption = None,
    site: Site = None,
    rule: RuleOption = None,
    of: Of = None,
    limit: Limit = 40,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """What features are called and why: all labels of one, those of a kind, a site or a rule, or how many there are."""
    from .queries.labels import find_feature, label_summary, labels_of
    from .queries.statistics import StatisticsStore
    from .show_labels import show_labels, show_summary

    if feature is None and kind is None and site is None and rule is None:
        with StatisticsStore(atlas, read_only=True) as statistics:
            summary = label_summary(statistics)
        console.say_json(summary.to_dicts()) if as_json else show_summary(summary)
        return
    if feature is not None:
        with _opened(atlas, graph) as (store, statistics):
            rows = labels_of(statistics, [str(find_feature(store, statistics, feature, of=of)["key"])])
    else:
        rows = _chosen(atlas, kind, site, rule, of, False)
    if as_json:
        console.say_json(rows.to_dicts())
    elif rows.is_empty():
        console.say("no such labels")
    else:
        show_labels(rows, limit)


@labels_app.command("search")
def labels_search_command(
    text: Annotated[str, typer.Argument(help="Words of labels, tokens or contexts; a word that ends in * stands for all that begin so.")],
    site: Site = None,
    of: OfModel = None,
    fields: Annotated[
        str | None, typer.Option("--in", help="Where to look, comma-separated: label, token, context; everywhere unless given.")
    ] = None,
    limit: Limit = 20,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Find features by any word: in their labels, the tokens they fire on, and the contexts of these; ranked, without regard to case and accents."""
    from .analysis.labels import model_of
    from .queries.labels import search_labels
    from .queries.search import FIELDS, BadQuery
    from .show_labels import show_found

    chosen = split_names(fields) if fields else tuple(FIELDS)
    wrong = [name for name in chosen if name not in FIELDS]
    if wrong or not chosen:
        raise BadQuery(f"--in {fields!r}: there are {', '.join(FIELDS)}")
    with _searched(atlas, graph) as (store, statistics):
        model = model_of(store, statistics, of) if of else None
        found = search_labels(store, statistics, text, limit, site=site, model=model, fields=chosen)
    console.say_json(found.to_dicts()) if as_json else show_found(found, text)
