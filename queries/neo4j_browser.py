"""Neo4j Browser made ready for a graph of features: a style, a guide with ten questions, saved queries, and edges as wide as they are strong.

What the Browser (5.24) can and cannot do decides how:

- A style rule matches nodes by their labels and edges by their type, never by a value. `mark_nodes` therefore gives `Feature` nodes further labels:
  what they are (`KINDS`) and their layer (`L0`, `L1`, …). `draw_circuit` copies a circuit's edges to ten types, `RAISES_1` to `RAISES_5` and
  `LOWERS_1` to `LOWERS_5`, by the sign and size of their weights. Both are for looking at: nothing else in featlas reads them, and `unmark`
  takes them away.
- `:style ADDRESS` and `:play ADDRESS` take http addresses alone, of hosts that the server allows (localhost is one): `files_server` serves the files.
  Without it `:style {…}` takes the style as one line.
- Saved queries cannot be imported: `saved-queries.js`, pasted into the developer console, puts them where the Browser keeps its own.
"""

import colorsys
import html
import http.server
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

from ..errors import UserError
from .circuits import find_circuit
from .store import GraphStore

_FOLDER = Path(__file__).with_name("browser")
Rules = dict[str, dict[str, str]]

KINDS = {"resid": "Residual", "attn": "Attention", "mlp": "Mlp", "embed": "Embedding"}
"""Label of features by what their site holds; error nodes are `Error`, outputs `Output`."""
_HUES = {"Residual": 217, "Attention": 271, "Mlp": 142, "Embedding": 200}  # degrees
WIDTHS = (1, 2, 5, 9, 15)  # pixels of an edge, by its strength
ONLY_ASKED = ":config autoComplete: false"
"""The Browser's command after which it draws only the edges that a query returns."""
_RAISING, _LOWERING = "#2563EB", "#DC2626"
_NODE = {"diameter": "60px", "border-width": "2px", "font-size": "10px"}


class NotANeo4j(UserError):
    """Neo4j Browser shows what a Neo4j server holds."""


@dataclass(frozen=True)
class Question:
    """A question, what to say of its answer, and the Cypher that draws it."""

    name: str
    title: str
    about: str
    cypher: str

    @property
    def script(self) -> str:
        """The text as the Browser saves it: the first line is the name that it shows."""
        return f"// {self.title}\n{self.cypher}"


@dataclass(frozen=True)
class BrowserFiles:
    """What `write_browser_files` wrote."""

    folder: Path
    style: Path
    guide: Path
    saved: Path
    style_command: Path
    queries: tuple[Path, ...]


def questions() -> tuple[Question, ...]:
    """The ten questions, in order; they are answered on either kind of store."""
    return tuple(_question(path) for path in sorted(_FOLDER.glob("[0-9]*.cypher")))


def drawn_question() -> Question:
    """How to see what `draw_circuit` drew."""
    return _question(_FOLDER / "drawn.cypher")


def _question(path: Path) -> Question:
    title, about, *cypher = path.read_text(encoding="utf-8").splitlines()
    return Question(path.stem, title.removeprefix("// "), about.removeprefix("// "), "\n".join(cypher))


# Style


def style(layers: Sequence[int]) -> Rules:
    """GraSS rules by selector for the layers that a graph has features of: a hue for what a site holds, darker with the layer; edges by type.

    A label's own rule comes before those of several labels, and has a colour and a caption: the Browser makes up one for a label that lacks
    them, and puts it last, over all others.
    """
    rules: Rules = {
        "node": {**_NODE, **_colour(220, 0.05, 0.65), "caption": "<id>"},
        "relationship": {
            "color": "#A5ABB6", "shaft-width": "1px", "font-size": "8px", "padding": "3px", "text-color-external": "#334155",
            "text-color-internal": "#FFFFFF", "caption": "<type>",
        },
    }  # fmt: skip
    captions = {
        "Feature": "{label} {site}/{index}", "Model": "{name}", "Run": "{task}", "Sequence": "{clean}", "Circuit": "{description}",
        "Score": "{kind} {value}", "Partition": "{site}", "Block": "{automatic_label}", "Meta": "{value}",
    }  # fmt: skip
    for place, (label, caption) in enumerate(captions.items()):
        rules[f"node.{label}"] = {**_NODE, **_colour(30 + 37 * place, 0.35, 0.45), "caption": caption}
    for layer in layers:
        rules[f"node.L{layer}"] = {**_colour(220, 0.1, _lightness(layer, max(layers))), "caption": captions["Feature"]}
    for label, hue in _HUES.items():
        rules[f"node.{label}"] = {**_colour(hue, 0.65, 0.5), "caption": captions["Feature"]}
        if label != "Embedding":
            for layer in layers:
                rules[f"node.{label}.L{layer}"] = _colour(hue, 0.65, _lightness(layer, max(layers)))
    rules["node.Error"] = {**_colour(30, 0.08, 0.55), "border-color": "#DC2626", "caption": "error {site}", "diameter": "45px"}
    rules["node.Output"] = {**_colour(38, 0.9, 0.5), "caption": "{label}", "diameter": "80px"}
    for type, colour in (("INFLUENCES", "#94A3B8"), ("CIRCUIT_EDGE", "#64748B"), ("ATTRIBUTES", "#CBD5E1"), ("WIRED", "#0D9488")):
        rules[f"relationship.{type}"] = {"color": colour, "shaft-width": "2px", "caption": "{weight}"}
    for colour, types in ((_RAISING, "RAISES"), (_LOWERING, "LOWERS")):
        for place, width in enumerate(WIDTHS, start=1):
            rules[f"relationship.{types}_{place}"] = {"color": colour, "shaft-width": f"{width}px", "caption": "{effect}"}
    return rules


def _lightness(layer: int, last: int) -> float:
    """From light in the first layer to dark in the last."""
    return 0.78 - 0.46 * layer / max(last, 1)


def _colour(hue: float, saturation: float, lightness: float) -> dict[str, str]:
    """Fill, border and a text colour that can be read on it."""
    rgb = lambda light: colorsys.hls_to_rgb((hue % 360) / 360, light, saturation)
    written = lambda values: "#" + "".join(f"{round(255 * value):02X}" for value in values)
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb(lightness)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # white has the greater contrast on what is darker than this (WCAG's relative luminance)
    text = "#FFFFFF" if luminance < 0.2 else "#1E293B"
    return {"color": written(rgb(lightness)), "border-color": written(rgb(lightness * 0.8)), "text-color-internal": text}


def grass(rules: Mapping[str, Mapping[str, str]]) -> str:
    """The rules as a `.grass` file."""
    quoted = lambda name, value: f"'{value}'" if name == "caption" else value
    blocks = (f"{selector} {{\n" + "".join(f"  {n}: {quoted(n, v)};\n" for n, v in props.items()) + "}\n" for selector, props in rules.items())
    return "\n".join(blocks)


def style_command(rules: Mapping[str, Mapping[str, str]]) -> str:
    """The rules as one command of the Browser's editor, which takes no line break and no semicolon in it."""
    return f":style {json.dumps(rules, separators=(',', ':'))}"


# Labels and edges to look at


def mark_nodes(store: GraphStore) -> list[int]:
    """Give every feature the labels that the style goes by; the layers that there are. Idempotent. Raises `NotANeo4j`."""
    _require_neo4j(store)
    for stem, label in KINDS.items():
        store.query(f"MATCH (f:Feature) WHERE f.kind = 'feature' AND f.site STARTS WITH $stem SET f:{label}", {"stem": stem}, write=True)
    for kind, label in (("error", "Error"), ("output", "Output")):
        store.query(f"MATCH (f:Feature) WHERE f.kind = $kind SET f:{label}", {"kind": kind}, write=True)
    layers = store.query("MATCH (f:Feature) WHERE f.layer >= 0 RETURN DISTINCT f.layer AS layer ORDER BY layer")
    found = [int(layer) for layer in layers["layer"].to_list()] if layers.height else []
    for layer in found:
        store.query(f"MATCH (f:Feature) WHERE f.layer = $layer SET f:L{layer}", {"layer": layer}, write=True)
    return found


def draw_circuit(store: GraphStore, name: str) -> tuple[str, int]:
    """Copy the edges of the circuit whose key begins with `name` to the types by which the style draws their widths.

    The width's class is 1 + floor(5·sqrt(|weight| / greatest |weight|)), at most 5; each copy has `circuit`, `weight` and `effect`, the weight in
    three digits. Drawn again they are replaced. Returns the whole key and the number of edges. Raises `NotANeo4j` or `UnknownCircuit`.
    """
    _require_neo4j(store)
    key = str(find_circuit(store, name)["key"])
    _delete_drawn(store, key)
    edges = "MATCH (a:Feature)-[e:CIRCUIT_EDGE]->(b:Feature) WHERE e.circuit = $circuit"
    greatest = store.query(f"{edges} RETURN max(abs(e.weight)) AS greatest, count(e) AS n", {"circuit": key}).row(0)
    for sign, types in ((">", "RAISES"), ("<", "LOWERS")):
        for place in range(1, len(WIDTHS) + 1):
            chosen = f"{edges} AND e.weight {sign} 0 WITH a, b, e, 1 + toInteger(floor($classes * sqrt(abs(e.weight) / $greatest))) AS class"
            text = f"{chosen} WHERE CASE WHEN class > $classes THEN $classes ELSE class END = $place"
            shown = "CASE WHEN e.weight > 0 THEN '+' ELSE '' END + toString(round(e.weight, 3))"
            text += f" CREATE (a)-[:{types}_{place} {{circuit: $circuit, weight: e.weight, effect: {shown}}}]->(b)"
            store.query(text, {"circuit": key, "greatest": greatest[0], "classes": len(WIDTHS), "place": place}, write=True)
    return key, int(greatest[1])


def unmark(store: GraphStore) -> None:
    """Take away what `mark_nodes` and `draw_circuit` added."""
    _require_neo4j(store)
    _delete_drawn(store)
    labels = store.query("MATCH (f:Feature) UNWIND labels(f) AS label RETURN DISTINCT label")
    for label in labels["label"].to_list() if labels.height else ():
        if is_of_the_browser(label):
            store.query(f"MATCH (f:Feature:{label}) REMOVE f:{label}", write=True)


def is_of_the_browser(name: str) -> bool:
    """Whether a label or type is one that `mark_nodes` or `draw_circuit` makes."""
    return name in (*KINDS.values(), "Error", "Output") or re.fullmatch(r"L\d+|(RAISES|LOWERS)_\d+", name) is not None


def _delete_drawn(store: GraphStore, circuit: str | None = None) -> None:
    types = "|".join(f"{name}_{place}" for name in ("RAISES", "LOWERS") for place in range(1, len(WIDTHS) + 1))
    text = f"MATCH (:Feature)-[e:{types}]->(:Feature) WHERE $circuit IS NULL OR e.circuit = $circuit DELETE e"
    store.query(text, {"circuit": circuit}, write=True)


def _require_neo4j(store: GraphStore) -> None:
    if store.dialect != "neo4j":
        raise NotANeo4j("Neo4j Browser shows what a Neo4j server holds: start one (`featlas neo4j up`) and name it with --graph")


# Files


def write_browser_files(folder: Path, rules: Rules) -> BrowserFiles:
    """Write the style, the guide, the questions as `.cypher` files and what saves them in the Browser, over those of an earlier time."""
    asked = (*questions(), drawn_question())
    shutil.rmtree(folder / "queries", ignore_errors=True)
    (folder / "queries").mkdir(parents=True)
    files = BrowserFiles(
        folder, folder / "style.grass", folder / "guide.html", folder / "saved-queries.js", folder / "style-command.txt",
        tuple(folder / "queries" / f"{question.name}.cypher" for question in asked),
    )  # fmt: skip
    files.style.write_text(grass(rules), encoding="utf-8")
    files.style_command.write_text(style_command(rules) + "\n", encoding="utf-8")
    files.guide.write_text(guide(), encoding="utf-8")
    saved = Template((_FOLDER / "saved_queries.js").read_text(encoding="utf-8"))
    files.saved.write_text(saved.substitute(queries=json.dumps([q.script for q in asked], indent=2)), encoding="utf-8")
    for path, question in zip(files.queries, asked):
        path.write_text(f"// {question.title}\n// {question.about}\n{question.cypher}\n", encoding="utf-8")
    return files


def guide() -> str:
    """The guide that `:play` shows: a slide for each question, its Cypher run by a click."""
    escape = html.escape
    slides = [
        '<slide class="row-fluid"><div class="col-sm-12"><h3>A graph of features</h3><p>Features of a network, and how they drive each other. '
        "Each of the following pages asks one question; click its Cypher to put it into the editor, and run it there.</p>"
        "<p>Blue nodes are features of the residual stream, violet of attention, green of MLPs; the darker, the later the layer. "
        "Grey nodes are error nodes, what a dictionary misses. The output is yellow.</p>"
        "<p>The Browser adds every edge between the nodes that it shows, which hides the ones asked for. This turns that off:</p>"
        f'<figure><pre class="pre-scrollable code runnable">{ONLY_ASKED}</pre></figure></div></slide>'
    ]
    slides += [
        f'<slide class="row-fluid"><div class="col-sm-12"><h3>{escape(question.title)}</h3><p>{escape(question.about)}</p>'
        f'<figure><pre class="pre-scrollable code runnable">{escape(question.cypher)}</pre></figure></div></slide>'
        for question in (*questions(), drawn_question())
    ]
    return f'<article class="guide" data-title="featlas">\n<carousel class="deck container-fluid">\n{chr(10).join(slides)}\n</carousel>\n</article>\n'


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files for the Browser's page, which comes from another port."""

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def do_OPTIONS(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is said of each request."""


def files_server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the folder's files on the loopback, not yet running; port 0 takes any free one. Raises `neo4j_server.PortTaken`."""
    from .neo4j_server import LOOPBACK, free_port

    return http.server.ThreadingHTTPServer((LOOPBACK, free_port(port, "--port")), partial(_Handler, directory=str(folder)))
