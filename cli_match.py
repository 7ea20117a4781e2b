"""The commands that compare features across models: `featlas ingest aligned` and `featlas analyze match`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import console
from .cli_ablation import Gallery, save_frame, save_page
from .options import (
    DEFAULT_ATLAS,
    DEMO_DICTIONARIES,
    DEMO_MODEL,
    Atlas,
    BatchSize,
    Bos,
    Device,
    Dictionaries,
    Dtype,
    Graph,
    Json,
    Memory,
    Model,
    NotBoth,
    Seed,
    Sites,
    SkipInvalid,
    analyze_app,
    ingest_app,
    load_named,
    memory_bytes,
    open_atlas,
)

if TYPE_CHECKING:
    from .analysis.matching import Matching, MatchOptions
    from .ingest.alignment import AlignOptions, Side, Windows
    from .queries.matches import Aligned

SHOWN = 10
"""Pairs of features that are shown."""


@ingest_app.command("aligned")
def ingest_aligned_command(
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    other_model: Annotated[str | None, typer.Option("--other-model", help="The other model (B); the same as --model unless given.")] = None,
    other_dictionaries: Annotated[
        str | None, typer.Option("--other-dictionaries", help="The other model's dictionaries; those of --dictionaries unless given.")
    ] = None,
    sites: Sites = None,
    other_sites: Annotated[str | None, typer.Option("--other-sites", help="Sites of the other model; as --sites unless given.")] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Text file, folder of them, JSONL with `text`, or Hugging Face data set.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Instead of a corpus: the prompts of a task's pairs, clean and corrupted.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Windows of text, or pairs of a task (100 unless given), to draw from.")] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in a window of text at most, on either side.")] = 128,
    max_segments: Annotated[
        int, typer.Option("--max-segments", help="Segments at most; where the texts have more, whole windows or pairs are drawn by --seed.")
    ] = 20_000,
    skip_positions: Annotated[
        int | None, typer.Option("--skip-positions", help="Segments with one of so many first positions are left out; 1 for a corpus, 0 for a task.")
    ] = None,
    pool: Annotated[
        Literal["max", "last", "mean"],
        typer.Option("--pool", help="Of several tokens in a segment: each feature's value of greatest magnitude, the last token's, or the mean."),
    ] = "max",
    covariances: Annotated[
        bool, typer.Option("--covariances/--no-covariances", help="Sum products of the sites' raw values: what CKA and SVCCA are computed from.")
    ] = True,
    memory: Memory = "2GB",
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Hold only one of the two models in memory: the other one is loaded twice.")
    ] = False,
    bos: Bos = "auto",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """The features of two models, checkpoints or sets of dictionaries on the same pieces of the same text: what `analyze match` compares."""
    if (corpus is None) == (task is None):
        raise NotBoth("name a text corpus with --corpus, or a task with --task: one of the two")
    from .ingest.ranges import check_numbers

    check_numbers(limit=limit, batch_size=batch_size)
    from .ingest.alignment import AlignOptions, Pool, aligned_key, collect_aligned
    from .queries.matches import AlignedStore

    options = AlignOptions(
        length=length, batch_size=batch_size, skip_positions=skip_positions, max_segments=max_segments, pool=Pool(pool), covariances=covariances,
        memory=memory_bytes(memory), seed=seed,
    )  # fmt: skip
    ours = (model, dictionaries, sites)
    theirs = (other_model or model, other_dictionaries or dictionaries, other_sites or sites)
    sides = _sides(ours, theirs, (device, dtype, bos), one_at_a_time=one_at_a_time)
    windows = _windows(corpus, task, sides, options, limit=limit, skip_invalid=skip_invalid)
    known = AlignedStore(atlas).has(aligned_key(sides, windows, options))
    with console.progress("aligned", quiet=as_json) as bar:
        aligned = collect_aligned(atlas, sides, windows, options, progress=lambda done, total: bar(done, total, "windows"))
    if as_json:
        console.say_json(_aligned_json(aligned) | {"new": not known})
        return
    from .show_match import show_aligned

    show_aligned(aligned, known=known)


Named = tuple[str, str, str | None]
"""What a user calls a side: model, dictionaries, sites."""


def _sides(ours: Named, theirs: Named, how: tuple[str, str, str], *, one_at_a_time: bool) -> "tuple[Side, Side]":
    """Both sides; a model that is on both is in memory once."""
    from .ingest.alignment import Side
    from .model.beginning import with_beginning
    from .model.dictionary_sources import load_dictionaries
    from .model.sites import parse_site
    from .options import BOS, split_names

    device, dtype, bos = how
    named = [{"model": side[0], "dictionaries": side[1]} for side in (ours, theirs)]
    load = lambda side: load_named(side[0], side[1], side[2], device, dtype, bos)
    if ours[0] != theirs[0]:
        if one_at_a_time:
            return Side.later(lambda: load(ours), named[0]), Side.later(lambda: load(theirs), named[1])
        return Side.of(*load(ours), named[0]), Side.of(*load(theirs), named[1])
    loaded, found = load(ours)
    chosen = [parse_site(name) for name in split_names(theirs[2])] if theirs[2] else None
    others = found if theirs == ours else load_dictionaries(theirs[1], loaded, sites=chosen, device=device, dtype=dtype)
    return Side.of(loaded, found, named[0]), Side.of(with_beginning(loaded, others, BOS[bos]), others, named[1])


def _windows(
    corpus: str | None, task: str | None, sides: "tuple[Side, Side]", options: "AlignOptions", *, limit: int | None, skip_invalid: bool
) -> "Windows":
    from .ingest.alignment import aligned_corpus, aligned_task

    tokenizers = (sides[0].tokenizer, sides[1].tokenizer)
    if corpus is not None:
        return aligned_corpus(corpus, tokenizers, options, limit=limit)
    from .cli import _pairs

    pairs = _pairs(str(task), tokenizers[0], limit or 100, options.seed, skip_invalid)
    return aligned_task(str(task), pairs, tokenizers, options)


def _aligned_json(aligned: "Aligned") -> dict[str, object]:
    sides = [
        {
            "model": side.model, "sites": [
                {"site": s.site, "dictionary": s.dictionary, "d_sae": s.d_sae, "mean_l0": s.mean_l0, "bytes": s.n_bytes} for s in side.run.sites
            ]
        }
        for side in (aligned.a, aligned.b)
    ]  # fmt: skip
    counts = {"segments": aligned.n_segments, "sequences": aligned.a.run.n_sequences, "available": aligned.settings["n_available"]}
    return {"aligned": aligned.key, **counts, "tokens_per_segment": aligned.settings["tokens_per_segment"], "a": sides[0], "b": sides[1]}


@analyze_app.command("match")
def analyze_match_command(
    aligned: Annotated[str | None, typer.Argument(help="Aligned samples, by the beginning of their key; the last ones unless given.")] = None,
    min_active: Annotated[int, typer.Option("--min-active", help="Leave out features that are active on fewer segments.")] = 10,
    top_k: Annotated[int, typer.Option("--top-k", help="Best counterparts kept of each feature; the assignment chooses among them.")] = 16,
    fdr: Annotated[float, typer.Option("--fdr", help="False discovery rate of the matches.")] = 0.05,
    draws: Annotated[int, typer.Option("--draws", help="Times that chance is drawn.")] = 5,
    null: Annotated[
        Literal["sequences", "shift"] | None,
        typer.Option("--null", help="Chance: exchange whole sequences (for a corpus), or shift one side's rows (for a task)."),
    ] = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="Features of opposite signs match too, as neurons may.")] = False,
    variance: Annotated[float, typer.Option("--variance", help="Share of the variance that SVCCA keeps.")] = 0.99,
    memory: Memory = "512MB",
    seed: Seed = 0,
    edges: Annotated[
        Literal["all-sites", "site-pairs", "both"],
        typer.Option("--edges", help="Which matches become MATCHES: over all sites at once, within each pair of sites, or both."),
    ] = "all-sites",
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write MATCHES edges into the graph.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Compute a matching anew that was found before.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every pair, as .parquet or .csv.")] = None,
    gallery: Gallery = None,
    list_all: Annotated[bool, typer.Option("--list", help="Only list the matchings that there are.")] = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Which features of two models, checkpoints or dictionaries are the same, which layer is which, and what is more than chance."""
    from .analysis.matching import MatchOptions, Null, shared_contexts
    from .queries.matches import AlignedStore
    from .queries.statistics import StatisticsStore

    if list_all:
        _list(atlas, as_json)
        return
    samples = AlignedStore(atlas).open(aligned)
    options = MatchOptions(
        min_active=min_active, top_k=top_k, fdr=fdr, draws=draws, null=None if null is None else Null(null), absolute=absolute, variance=variance,
        memory=memory_bytes(memory), seed=seed,
    )  # fmt: skip
    with StatisticsStore(atlas) as statistics:
        found, known = _found(statistics, samples, options, again=again, quiet=as_json)
    contexts = shared_contexts(samples, found, SHOWN)
    if not as_json:
        from .show_match import show_matching

        show_matching(found, contexts, known=known)
    save_frame(output, lambda: found.pairs)
    if gallery is not None:
        from .analysis.matching_plots import matching_page

        save_page(gallery, lambda: matching_page(found))
    written = _write(found, samples, edges, atlas, graph) if write else None
    if as_json:
        console.say_json(_matching_json(found, contexts.to_dicts(), written, known))
        return
    if written is not None:
        if written:
            console.say(f"{written:,} MATCHES edges in the graph, of mutual and of assigned pairs")
            console.say(f"next: featlas query matched_features --param matching={found.key}")
        else:
            console.say("no MATCHES edges: " + ("each feature is its own counterpart" if found.overall["n_matched"] else "there are no matches"))
    for path in (output, gallery):
        if path is not None:
            console.say(f"wrote {path}")


def _found(statistics: Any, samples: "Aligned", options: "MatchOptions", *, again: bool, quiet: bool) -> "tuple[Matching, bool]":
    """The matching, and whether it was there already."""
    from .analysis.matching import keep_matching, match, matching_key, stored_matching

    if not again and (stored := stored_matching(statistics, matching_key(samples, options))) is not None:
        return stored, True
    with console.progress("matching", quiet=quiet) as bar:
        found = match(samples, options, progress=lambda done, total: bar(done, total, "pairs of sites"))
    keep_matching(statistics, found)
    return found, False


def _write(found: "Matching", samples: "Aligned", edges: str, atlas: Path, graph: str | None) -> int:
    """Write the edges; the embedded graph is made where there is none, since its features may be these alone."""
    from .analysis.matching import write_matches
    from .queries.matches import Method
    from .queries.store import open_graph

    methods = list(Method) if edges == "both" else [Method(edges)]
    with open_atlas(atlas, graph, write=True) if graph else open_graph(atlas) as store:
        return write_matches(store, found, samples, methods)


def _list(atlas: Path, as_json: bool) -> None:
    """The matchings of an atlas."""
    from .options import open_statistics
    from .queries.matches import list_matchings

    statistics = open_statistics(atlas)
    rows = []
    if statistics is not None:
        with statistics:
            rows = list_matchings(statistics).to_dicts()
    if as_json:
        console.say_json(rows)
    elif not rows:
        console.say(f"no matchings in {atlas}: `featlas ingest aligned` and `featlas analyze match` make one")
    else:
        columns = ("matching", "A", "B", "text", "matched", "of A", "of B", "chance")
        shares = lambda row: (f"{row[name]:.1%}" for name in ("share_a", "share_b", "null_share"))
        table = [(*(row[name] for name in ("matching", "model_a", "model_b", "source")), f"{row['n_matched']:,}", *shares(row)) for row in rows]
        console.table(columns, table)


def _matching_json(found: "Matching", contexts: list[dict[str, Any]], written: int | None, known: bool) -> dict[str, object]:
    from .analysis.matching import correspondence

    return {
        "matching": found.key, "aligned": found.aligned, "model_a": found.model_a, "model_b": found.model_b, "source": found.source, "new": not known,
        **found.overall, "edges": written, "settings": dict(found.settings), "sites": found.sites.to_dicts(),
        "correspondence": correspondence(found.sites).to_dicts(), "best": contexts,
    }  # fmt: skip
