"""The command that makes Neo4j Browser ready for a graph of features: `featlas neo4j browser`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlencode

import typer

from . import console
from .errors import UserError
from .options import Graph, Json, NotBoth, neo4j_app

if TYPE_CHECKING:
    from .queries.neo4j_browser import BrowserFiles
    from .queries.neo4j_server import ServerInfo

FILES_PORT = 8474


class NoNeo4j(UserError):
    """No server is named, and none of featlas' own runs."""


@neo4j_app.command("browser")
def neo4j_browser_command(
    circuit: Annotated[
        list[str] | None,
        typer.Option("--circuit", help="Draw this circuit's edges as wide as they are strong, blue raising, red lowering; may be given again."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the style, the guide and the queries; one in the server's own unless given.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the files on this machine until interrupted: the Browser reads styles and guides by address only.")
    ] = False,
    port: Annotated[int, typer.Option("--port", help="With --serve: the port; 0 takes any free one.")] = FILES_PORT,
    undo: Annotated[bool, typer.Option("--undo", help="Take the labels and the drawn edges out of the graph again.")] = False,
    graph: Graph = None,
    home: Annotated[Path | None, typer.Option("--home", envvar="FEATLAS_NEO4J_HOME", help="Folder of the local server.")] = None,
    as_json: Json = False,
) -> None:
    """Make Neo4j Browser show features: labels that a style can colour, the style, a guide with ten questions, and queries to save."""
    from .queries.neo4j_browser import draw_circuit, mark_nodes, style, unmark, write_browser_files
    from .queries.neo4j_server import default_home, status
    from .queries.store import ServerCredentials, open_graph

    if undo and (circuit or serve):
        raise NotBoth("--undo takes away what the others add: leave --circuit and --serve out")
    home = home or default_home()
    local = status(home)
    if graph is None and local is None:
        raise NoNeo4j("no Neo4j of featlas is running: start it with `featlas neo4j up`, or name another by --graph bolt://…")
    own = local if local is not None and graph in (None, local.uri) else None
    credentials = ServerCredentials(own.username, own.password) if own is not None else None
    with open_graph(graph or str(own and own.uri), credentials=credentials) as store:
        if undo:
            unmark(store)
            console.say_json({"undone": True}) if as_json else console.say("the labels and the drawn edges are gone; the files stay")
            return
        layers = mark_nodes(store)
        drawn = dict(draw_circuit(store, name) for name in circuit or [])
    with console.saving(output or home / "browser"):
        files = write_browser_files((output or home / "browser").absolute(), style(layers))
    if as_json:
        console.say_json({"folder": str(files.folder), "layers": layers, "drawn": drawn, "browser": own.http_url if own else None})
    else:
        _say(files, own, drawn)
    if serve:
        _serve(files, own, port)


def _say(files: "BrowserFiles", own: "ServerInfo | None", drawn: dict[str, int]) -> None:
    """Where everything is and how it is loaded."""
    from .queries.neo4j_browser import ONLY_ASKED

    for key, n_edges in drawn.items():
        console.say(f"drawn: {n_edges} edges of circuit {key}; {files.queries[-1].name} shows them")
    console.say(f"wrote {files.folder}")
    console.table(
        ("file", "what it is", "how to load it in the Browser"),
        [
            (files.style.name, "colours, captions, widths", "featlas neo4j browser --serve, then :style ADDRESS"),
            (files.style_command.name, "the same on one line", "paste it into the editor and run it"),
            (files.guide.name, "ten questions with their Cypher", "featlas neo4j browser --serve, then :play ADDRESS"),
            (files.saved.name, "saves the questions as queries", "paste it into the page's developer console (F12)"),
            ("queries/", "the questions, a file each", "paste one into the editor"),
        ],
    )
    console.say(f"so that only the edges asked for are drawn: {ONLY_ASKED}")
    if own is not None:
        console.say(f"the Browser is {own.http_url}/browser/")


def _serve(files: "BrowserFiles", own: "ServerInfo | None", port: int) -> None:
    """Serve the files until interrupted."""
    from .queries.neo4j_browser import files_server

    with files_server(files.folder, port) as server:
        # the name that the Browser's list of allowed hosts has, not the number
        address = f"http://localhost:{server.server_port}"
        console.say(f":style {address}/{files.style.name}")
        console.say(f":play {address}/{files.guide.name}")
        if own is not None:
            link = urlencode({"dbms": own.uri, "db": "neo4j", "cmd": "play", "arg": f"{address}/{files.guide.name}"})
            console.say(f"or open {own.http_url}/browser/?{link}")
        console.note("serving until interrupted (Control-C)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.note("no longer serving")
