"""The command `featlas serve`: opens, calls, says where the page is."""

import contextlib
import os
import sys
from typing import Annotated

import typer

from . import console
from .options import DEFAULT_ATLAS, Atlas, Graph, Json, NoAtlas, app


@app.command("serve")
def serve_command(
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="The port; 8765 or the next free one unless given, any free one with 0.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The loopback address to listen on; no other is allowed.")] = "127.0.0.1",
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    rows: Annotated[int, typer.Option("--rows", min=1, max=10_000, help="Rows of a query's answer that are shown, unless it asks for more.")] = 1_000,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=300, help="How long a query may take.")] = 30.0,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """The page of an atlas, alive, on this machine alone: circuits cut anew, every feature, a box for Cypher. Reads only; Ctrl-C ends it."""
    import secrets

    from .pages.live import live_page, scripts
    from .pages.reader import AtlasReader
    from .pages.server import Served, ServeOptions, address_of, listen, make_app, serve

    if graph is None and not (atlas / "graph.lbug").exists():
        raise NoAtlas(f"no graph in {atlas}: make one with `featlas demo` or `featlas ingest edges`, or name another with --atlas or --graph")
    token = secrets.token_urlsafe(24)
    # the port first: what is wrong with it is said before anything is opened
    with listen(host, port) as bound, AtlasReader(atlas, graph) as reader:
        address = address_of(bound, token)
        if as_json:
            console.say_json({"address": address, "token": token, "atlas": str(atlas), "graph": str(reader.target)})
        else:
            console.say(f"{atlas} is at {address}\nWho has this address can read the atlas, from this machine alone. Ctrl-C ends it.")
        sys.stdout.flush()
        if show:
            typer.launch(address)
        # where Ctrl-C was ignored when the process began (a shell's background jobs), the server returns instead of raising
        with contextlib.suppress(KeyboardInterrupt):
            serve(make_app(reader, token, Served(live_page(), scripts()), ServeOptions(rows, seconds)), bound)
        reader.close()
        console.note("stopped")
        sys.stderr.flush()
        # nothing was written and nothing is open; a query that still runs in a thread would keep the process until its time is over
        os._exit(0)
