"""The commands that keep an atlas: what is in it, whether it is whole, a copy elsewhere, parts taken out."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import completion, console
from .errors import UserError
from .options import _GROUP, DEFAULT_ATLAS, Atlas, Graph, Json, app, open_atlas, open_statistics

if TYPE_CHECKING:
    import polars as pl

    from .queries.atlases import Prunable
    from .queries.compaction import Compacted
    from .queries.integrity import Finding
    from .queries.statistics import StatisticsStore
    from .queries.store import GraphStore, ServerCredentials

atlas_app = typer.Typer(help="An atlas as a whole: what is in it, whether it is sound, copies, space.", **_GROUP)  # type: ignore[arg-type]
app.add_typer(atlas_app, name="atlas")

SOURCE_ENVIRONMENT = ("NEO4J_SOURCE_USERNAME", "NEO4J_SOURCE_PASSWORD", "NEO4J_SOURCE_DATABASE")
"""Who to be on the server that is copied from, where that is another than on the one that is copied to."""

Keys = list[str] | None


class NothingChosen(UserError):
    """Nothing was named that could be deleted."""


class NotConfirmed(UserError):
    """What would be deleted was not agreed to."""


@atlas_app.command("info")
def atlas_info_command(atlas: Atlas = DEFAULT_ATLAS, graph: Graph = None, as_json: Json = False) -> None:
    """What an atlas holds, how large it is on the disk, and what is unfinished, with the command that goes on."""
    from .queries.contents import atlas_contents
    from .show_atlas import show_contents

    statistics = open_statistics(atlas)
    with open_atlas(atlas, graph, write=False) as store:
        try:
            contents = atlas_contents(store, statistics, atlas if atlas.is_dir() else None, graph or str(atlas / "graph.lbug"))
        finally:
            if statistics is not None:
                statistics.close()
    if as_json:
        values = {name: getattr(contents, name) for name in contents.__dataclass_fields__}
        console.say_json({name: value if isinstance(value, str | int) else value.to_dicts() for name, value in values.items()})
        return
    show_contents(contents)


@atlas_app.command("check")
def atlas_check_command(
    fast: Annotated[bool, typer.Option("--fast", help="Leave out what is derived again from all edges: the aggregated edges.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what follows from what is certain; without --yes it is only listed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Mend without being asked again.")] = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Whether an atlas is sound: every row of graph, statistics and samples is read and held against the others; exit code 1 on errors."""
    from .queries.integrity import Severity, check_atlas
    from .show_atlas import show_findings

    mended: dict[str, int] = {}
    with open_atlas(atlas, graph, write=repair and yes) as store:
        statistics = _statistics(atlas, write=repair and yes)
        try:
            with console.progress("check", quiet=as_json) as bar:
                found = check_atlas(store, statistics, atlas if atlas.is_dir() else None, fast=fast, report=bar)
            if repair and yes and found:
                from .queries.repairing import repair_atlas

                mended = {kind.value: n for kind, n in repair_atlas(store, statistics, atlas if atlas.is_dir() else None, found).items()}
                found = check_atlas(store, statistics, atlas if atlas.is_dir() else None, fast=fast)
        finally:
            if statistics is not None:
                statistics.close()
    if as_json:
        console.say_json({"findings": [asdict(one) for one in found], "mended": mended})
    else:
        for kind, n in mended.items():
            console.say(f"mended: {kind} ({n:,})")
        show_findings(found, str(graph or atlas))
        if repair and not yes:
            _say_mendable(found)
    errors = sum(one.severity is Severity.ERROR for one in found)
    if errors:
        raise typer.Exit(1)


def _say_mendable(found: "list[Finding]") -> None:
    mendable = [one for one in found if one.repair is not None]
    console.say(f"\n{len(mendable)} of {len(found)} findings can be mended:" if mendable else "\nnothing here can be mended by itself")
    for one in mendable:
        console.say(f"  {one.repair.value if one.repair else ''}: {one.what}")
    if mendable:
        console.say("nothing was changed: --repair --yes mends them")


def _statistics(atlas: Path, *, write: bool) -> "StatisticsStore | None":
    from .queries.statistics import FILE_NAME, StatisticsStore

    return StatisticsStore(atlas, read_only=not write) if (atlas / FILE_NAME).exists() else None


@atlas_app.command("copy")
def atlas_copy_command(
    source: Annotated[str, typer.Argument(help="Folder of an atlas, or the address of a server (bolt://…) for its graph alone.")],
    target: Annotated[str, typer.Argument(help="Folder, made if need be, or a server's address; it may hold another atlas already.")],
    from_graph: Annotated[str | None, typer.Option("--from-graph", help="The server of the source folder's graph.")] = None,
    to_graph: Annotated[str | None, typer.Option("--to-graph", help="The server for the target folder's graph.")] = None,
    run: Annotated[Keys, typer.Option("--run", help="Only this run, by the beginning of its key, with what belongs to it; may be repeated.")] = None,
    on_clash: Annotated[
        Literal["refuse", "keep", "replace"],
        typer.Option(
            "--on-clash", help="Where both say different things of the same: copy nothing, keep the target's, or put the source's in its place."
        ),
    ] = "refuse",
    as_json: Json = False,
) -> None:
    """Copy an atlas to another folder or server, or into another atlas; verified row by row, and begun again where it was stopped."""
    from .queries.atlases import Place, copy_atlas
    from .queries.copying import Clashes
    from .show_atlas import show_copied

    places = Place.of(source, from_graph, _source_credentials()), Place.of(target, to_graph)
    with console.progress("copy", quiet=as_json) as bar:
        copied = copy_atlas(*places, runs=run or None, clashes=Clashes(on_clash), report=bar)
    if as_json:
        of_types = lambda types: [{"type": one.type, "rows": one.n, "written": one.written, "kept": one.kept, "equal": one.equal} for one in types]
        types = {"graph": of_types(copied.graph), "statistics": of_types(copied.statistics)}
        console.say_json({**types, "files": copied.files.to_dicts(), "left_behind": list(copied.foreign)})
        return
    show_copied(copied)
    if places[0].folder is None or places[1].folder is None:
        console.note("the graph alone: a server's address has no statistics, samples or manifests beside it (--from-graph, --to-graph with folders)")
    if copied.foreign:
        console.note(f"left behind, since they are no atlas' own: {', '.join(copied.foreign[:10])}{', …' if len(copied.foreign) > 10 else ''}")
    what = "all of it" if not copied.foreign else "all that is an atlas' own"
    console.say(f"\n{places[1]} has {what}: {sum(one.n for one in copied.graph):,} rows of the graph were read again on both sides and are equal")


def _source_credentials() -> "ServerCredentials | None":
    from .queries.credentials import authorities
    from .queries.store import ServerCredentials

    given = [os.environ.get(name) for name in SOURCE_ENVIRONMENT]
    username, password, database = given
    return ServerCredentials(username, password, database, authorities=authorities()) if any(given) else None


@atlas_app.command("prune")
def atlas_prune_command(
    runs: Annotated[Keys, typer.Argument(help="Runs of edges, by the beginnings of their keys.", autocompletion=completion.runs)] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Runs that are not done; on a server those of this folder's manifests, begun over an hour ago.")
    ] = False,
    older_than: Annotated[float | None, typer.Option("--older-than", metavar="DAYS", help="Runs measured more than so many days ago.")] = None,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=0, help="All runs with a manifest here but this many that were measured last.")
    ] = None,
    circuit: Annotated[Keys, typer.Option("--circuit", help="A circuit, by the beginning of its key; may be repeated.")] = None,
    parcellation: Annotated[Keys, typer.Option("--parcellation", help="A parcellation into regions, likewise.")] = None,
    statistics_run: Annotated[Keys, typer.Option("--statistics-run", help="A run of statistics, likewise.")] = None,
    samples: Annotated[Keys, typer.Option("--samples", help="A run of samples, likewise.")] = None,
    compact: Annotated[
        bool, typer.Option("--compact/--no-compact", help="Write the files anew, as small as what is left; alone: nothing else.")
    ] = True,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without being asked.")] = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Delete runs with all that hangs on them (or circuits, regions, statistics, samples) and give the space back; lists what goes and asks first."""
    named = any((runs, unfinished, older_than is not None, keep_last is not None, circuit, parcellation, statistics_run, samples))
    if not named and not compact:
        raise NothingChosen("nothing to delete was named: name runs by their keys (featlas atlas info lists them), or see --help")
    gone: dict[str, int] = {}
    listed: list[dict[str, Any]] = []
    sizes = _sizes(atlas)  # files grow while rows are deleted
    with open_atlas(atlas, graph, write=True) as store:
        statistics = _statistics(atlas, write=True)
        try:
            chosen = _chosen(
                store, statistics, atlas, runs=list(runs or []), unfinished=unfinished, older_than=older_than, keep_last=keep_last,
                circuits=list(circuit or []), parcellations=list(parcellation or []), statistics_runs=list(statistics_run or []),
                samples=list(samples or []), on_server=graph is not None,
            )  # fmt: skip
            if not chosen.empty:
                listed = _listed(store, statistics, atlas, chosen, quiet=as_json)
                _agreed(yes)
                gone = _pruned(store, statistics, atlas, chosen, quiet=as_json)
        finally:
            if statistics is not None:
                statistics.close()
    smaller = _compacted(atlas, graph) if compact and (not named or not chosen.empty) else []
    smaller = [replace(one, before=sizes.get(one.file.name, one.before)) for one in smaller]
    if as_json:
        files = [{"file": one.file.name, "before": one.before, "after": one.after} for one in smaller]
        console.say_json({"deleted": listed, "unused": gone, "files": files})
        return
    from .show_atlas import show_compacted

    if named and chosen.empty:
        console.say("nothing fits: nothing was deleted")
    if any(gone.values()):
        console.say("nothing needs any more, and gone too: " + ", ".join(f"{n:,} {label} nodes" for label, n in gone.items()))
    show_compacted(smaller)
    if graph is not None and not chosen.empty:
        console.note("a server's files do not shrink: it fills the room again with what is written next")


def _chosen(
    store: "GraphStore", statistics: "StatisticsStore | None", atlas: Path, *, runs: list[str], unfinished: bool, older_than: float | None,
    keep_last: int | None, circuits: list[str], parcellations: list[str], statistics_runs: list[str], samples: list[str],
    on_server: bool,
) -> "Prunable":  # fmt: skip
    """What is to go, by whole keys."""
    from .queries.atlases import Prunable, find_runs
    from .queries.circuits import find_circuit
    from .queries.contents import atlas_runs, last_runs, older_runs
    from .queries.partitions import find_parcellation
    from .queries.samples import SampleStore

    keys = list(find_runs(store, runs))
    there = atlas_runs(store, atlas if atlas.is_dir() else None)
    if unfinished:
        keys += _unfinished(there, on_server=on_server)
    if older_than is not None:
        old, unknown = older_runs(there, older_than)
        keys += old
        _note_unknown([run for run in unknown if run not in keys])
    if keep_last is not None:
        old, unknown = last_runs(there, keep_last)
        keys += old
        _note_unknown([run for run in unknown if run not in keys])
    if (parcellations or statistics_runs) and statistics is None:
        raise NothingChosen(f"there are no statistics in {atlas}, hence no regions or runs of statistics")
    return Prunable(
        tuple(dict.fromkeys(keys)), tuple(str(find_circuit(store, name)["key"]) for name in circuits),
        tuple(find_parcellation(statistics, name) for name in parcellations if statistics is not None),
        tuple(statistics.find_run(name).run for name in statistics_runs if statistics is not None),
        tuple(SampleStore(atlas, read_only=True).find(name).key for name in samples),
    )  # fmt: skip


def _note_unknown(runs: list[str]) -> None:
    if runs:
        console.note(f"no manifest in this folder says when {len(runs)} run(s) were measured ({', '.join(runs[:3])}): they stay, unless named by key")


def _unfinished(there: "pl.DataFrame", *, on_server: bool) -> list[str]:
    """Unfinished runs that nobody seems to measure now; what a server cannot tell is said."""
    from .queries.contents import unfinished_here

    keys, fresh, unknown = unfinished_here(there, on_server=on_server)
    if fresh:
        console.note(
            f"{len(fresh)} unfinished run(s) were begun within the hour ({', '.join(fresh[:3])}) and may be at work: they stay, unless named by key"
        )
    if unknown:
        console.note(
            f"{len(unknown)} unfinished run(s) have no manifest in this folder ({', '.join(unknown[:3])}), somebody else may be measuring them: "
            "they stay, unless named by key"
        )
    if keys and on_server:
        console.note("a server does not tell who is at work: make sure that nobody measures what is listed now")
    return keys


def _listed(store: "GraphStore", statistics: "StatisticsStore | None", atlas: Path, chosen: "Prunable", *, quiet: bool) -> list[dict[str, Any]]:
    """What would go, said."""
    from .queries.atlases import doomed
    from .queries.pruning import unfinished_runs

    rows: pl.DataFrame = doomed(store, statistics, atlas, chosen)
    if chosen.runs and (others := unfinished_runs(store, chosen.runs)):
        console.note(
            f"{len(others)} other run(s) are not finished ({', '.join(others[:3])}): features, sequences and models stay, since these may need them; "
            "once they are, `featlas atlas check --repair` takes away what nothing uses"
        )
    if not quiet:
        console.table(rows.columns, [(of, what, f"{n:,}") for of, what, n in rows.iter_rows()], title="To be deleted")
    return rows.to_dicts()


def _agreed(yes: bool) -> None:
    if yes:
        return
    import sys

    if not sys.stdin.isatty():
        raise NotConfirmed("nothing was deleted: this is not a terminal to be asked at, say --yes")
    if not typer.confirm("delete this?"):
        raise NotConfirmed("nothing was deleted")


def _pruned(store: "GraphStore", statistics: "StatisticsStore | None", atlas: Path, chosen: "Prunable", *, quiet: bool) -> dict[str, int]:
    from .queries.atlases import prune_atlas

    with console.progress("prune", quiet=quiet) as bar:
        return prune_atlas(store, statistics, atlas, chosen, bar)


def _sizes(atlas: Path) -> dict[str, int]:
    """The sizes of the databases' files, with their logs."""
    from .queries.atlases import GRAPH_FILE
    from .queries.compaction import size_of
    from .queries.statistics import FILE_NAME

    return {name: size_of(atlas / name) for name in (GRAPH_FILE, FILE_NAME)}


def _compacted(atlas: Path, graph: str | None) -> "list[Compacted]":
    from .queries.atlases import GRAPH_FILE
    from .queries.compaction import compact_graph, compact_statistics
    from .queries.statistics import FILE_NAME

    smaller = []
    if graph is None and (atlas / GRAPH_FILE).exists():
        smaller.append(compact_graph(atlas / GRAPH_FILE))
    if (atlas / FILE_NAME).exists():
        smaller.append(compact_statistics(atlas))
    return smaller
