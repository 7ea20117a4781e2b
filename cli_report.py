"""The command `featlas report`: opens the atlas, calls, writes one file."""

from pathlib import Path
from typing import Annotated

import typer

from . import console, files
from .options import DEFAULT_ATLAS, Atlas, Graph, Json, Run, app, open_atlas, open_statistics


@app.command("report")
def report_command(
    run: Run = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("report.html"),
    max_edges: Annotated[int, typer.Option("--max-edges", min=1, help="Edges of each circuit, the strongest: what the slider goes down to.")] = 5000,
    sequences: Annotated[int, typer.Option("--sequences", min=0, help="Sequences of each run that have a circuit of their own.")] = 24,
    features: Annotated[int, typer.Option("--features", min=0, help="Features with contexts and edges, the most influential first.")] = 3000,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """One HTML file of everything in the atlas, or of one run: circuits, features, sweeps, regions, communities, comparisons; it opens offline."""
    from .pages.report import ReportOptions, render
    from .pages.source import PageSource

    options = ReportOptions(run, max_edges, sequences, features)
    with open_atlas(atlas, graph, write=False) as store, console.saving(output):
        statistics = open_statistics(atlas)
        try:
            with console.progress("report", quiet=as_json) as bar:
                text = render(PageSource(store, statistics, atlas), options, bar)
        finally:
            if statistics is not None:
                statistics.close()
        files.write_text(output, text)
    if as_json:
        console.say_json({"file": str(output), "bytes": len(text.encode())})
    else:
        console.say(f"wrote {output}, {len(text.encode()) / 1e6:.1f} MB: open it in any browser")
