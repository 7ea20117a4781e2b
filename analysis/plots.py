"""Figures: pure functions from frames to plotly figures, nothing computed that a table would not show.

The circuit is drawn from the input (bottom) to the output (top), one row a site:

1. `lay_out`: rows by site; inside a row nodes are ordered by the weighted mean place of their neighbours, which uncrosses edges
   (Sugiyama's barycentre heuristic), or stand at their token position where positions were kept.
2. `_edge_traces`: a smooth curve an edge, blue where it raises the metric and red where it lowers it, as wide as it is strong.
3. `_node_traces`: circles for features, diamonds for error nodes, a star for the output, as large as their influence.
4. `_labels`: names of the most influential nodes of each row, as many as fit.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from ..errors import UserError
from .circuits import Circuit, strongest_part
from .faithfulness import ATTRIBUTION, POOLED
from .notes import SEPARATOR, marked, readable

RAISES, LOWERS, FEATURE, ERROR, OUTPUT = "#2166ac", "#b2182b", "#3b7d6e", "#a9a9a9", "#e0a526"
INK, SOFT, PALE, _FONT = "#24292f", "#57606a", "#e7eaee", "Helvetica, Arial, DejaVu Sans, sans-serif"
Figure = go.Figure
"""What the functions here return, for those that may not import plotly."""
WIDTH_CLASSES = 6  # plotly has one width per trace, so widths come in steps
_CURVE_POINTS = 15
_CHARACTER_PIXELS = 6.2
_PIXELS = 1040  # width of the drawing area, to know which names fit
_ROW_PIXELS = 104
_CROWDED = 24  # nodes in a row from which on they stand in zigzag
_STAGGER = 0.16  # of a row's height


@dataclass(frozen=True)
class Drawing:
    """A laid-out circuit: `nodes` and `edges` of the circuit with coordinates `x, y` and `x0, y0, x1, y1`; `sites` from the bottom up."""

    nodes: pl.DataFrame
    edges: pl.DataFrame
    sites: tuple[str, ...]
    positions: bool


def lay_out(circuit: Circuit) -> Drawing:
    """Coordinates for every node: y is the site's row, x in [0, 1] inside it, or the token position."""
    nodes = circuit.nodes
    sites = tuple(nodes["site"].unique(maintain_order=True).to_list())
    row = nodes["site"].replace_strict({site: i for i, site in enumerate(sites)}, return_dtype=pl.Int64).to_numpy()
    positions = bool((nodes["pos"] >= 0).any())
    at = nodes.select("key", "pos").with_row_index("node")
    edges = circuit.edges.join(at.rename({"node": "from_node", "key": "source", "pos": "src_pos"}), on=["source", "src_pos"], maintain_order="left")
    edges = edges.join(at.rename({"node": "to_node", "key": "target", "pos": "dest_pos"}), on=["target", "dest_pos"], maintain_order="left")
    source, target = edges["from_node"].to_numpy(), edges["to_node"].to_numpy()
    x = _positioned(nodes["pos"].to_numpy(), row) if positions else uncrossed(row, source, target, edges["strength"].to_numpy())
    y = row.astype(np.float64)
    if not positions:
        y += _stagger(row, x, nodes["influence"].to_numpy())
    ends = {"x0": x[source], "y0": y[source], "x1": x[target], "y1": y[target]}
    placed = nodes.with_columns(pl.Series("x", x), pl.Series("y", y))
    return Drawing(placed, edges.with_columns([pl.Series(name, values) for name, values in ends.items()]), sites, positions)


def _spread(order: np.ndarray) -> np.ndarray:
    """Places in [0, 1] for nodes ranked `order` (n,): even steps, centred, never wider apart than a ninth."""
    n = len(order)
    step = min(1 / max(n - 1, 1), 1 / 9)
    return 0.5 + (order - (n - 1) / 2) * step


def uncrossed(row: np.ndarray, source: np.ndarray, target: np.ndarray, strength: np.ndarray, sweeps: int = 8) -> np.ndarray:
    """x (n,) after `sweeps` rounds of ordering each row by the weighted mean x of its neighbours."""
    x = np.zeros(len(row))
    for r in np.unique(row):
        x[row == r] = _spread(np.arange((row == r).sum()))
    for sweep in range(sweeps):
        for r in np.unique(row)[:: 1 if sweep % 2 else -1]:
            pull, mass = np.zeros(len(row)), np.full(len(row), 1e-12)
            for here, there in ((source, target), (target, source)):
                mine = row[here] == r
                np.add.at(pull, here[mine], strength[mine] * x[there[mine]])
                np.add.at(mass, here[mine], strength[mine])
            inside = np.flatnonzero(row == r)
            order = np.argsort(np.argsort(pull[inside] / mass[inside], kind="stable"), kind="stable")
            x[inside] = _spread(order)
    return x


def _stagger(row: np.ndarray, x: np.ndarray, influence: np.ndarray) -> np.ndarray:
    """Offsets in y (n,) for rows of more than 24 nodes: of three neighbours the most influential stands lowest, where its name has room."""
    offset = np.zeros(len(row))
    for r in np.unique(row):
        inside = np.flatnonzero(row == r)
        if len(inside) > _CROWDED:
            ordered = inside[np.argsort(x[inside])]
            by_triple = np.lexsort((-influence[ordered], np.arange(len(ordered)) // 3))
            offset[ordered[by_triple]] = _STAGGER * (np.arange(len(ordered)) % 3 - 1)
    return offset


def _positioned(pos: np.ndarray, row: np.ndarray) -> np.ndarray:
    """x (n,): the token position, nodes that share a position and a row side by side in 0.8 of its width."""
    x = pos.astype(np.float64)
    for r, p in np.unique(np.stack([row, pos]), axis=1).T:
        inside = np.flatnonzero((row == r) & (pos == p))
        x[inside] += (np.arange(len(inside)) - (len(inside) - 1) / 2) * 0.8 / max(len(inside), 3)
    return x


def circuit_figure(circuit: Circuit, notes: pl.DataFrame, *, max_edges: int = 150, tokens: Sequence[str] | None = None, title: str = "") -> go.Figure:
    """The circuit, input at the bottom, output on top.

    At most `max_edges` edges are drawn, those on the strongest paths; the caption says how many of how many. `notes` as `notes.feature_notes`
    makes them name and explain the nodes. `tokens` are the sequence's, for the x axis where positions were kept.
    """
    drawn = strongest_part(circuit, max_edges)
    drawing = lay_out(drawn)
    nodes = drawing.nodes.join(notes, on="key", how="left", maintain_order="left")
    figure = go.Figure([*_edge_traces(drawing), *_node_traces(nodes, circuit, notes), _edge_hovers(drawing, notes)])
    height = 170 + _ROW_PIXELS * len(drawing.sites)
    n_positions = int(nodes["pos"].to_numpy().max()) + 1
    labels = _labels(nodes, n_positions if drawing.positions else 1)
    figure.update_layout(
        title={"text": html.escape(title), "x": 0.5, "font": {"size": 19}}, height=height, template="plotly_white", hovermode="closest",
        font={"family": _FONT, "color": INK, "size": 13}, margin={"l": 84, "r": 24, "t": 84 if title else 48, "b": 74}, plot_bgcolor="white",
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": 1.0, "yanchor": "bottom", "itemsizing": "constant"},
        hoverlabel={"align": "left", "bgcolor": "white", "bordercolor": "#8c959f", "font": {"family": _FONT, "size": 12, "color": INK}},
        annotations=[*labels, _caption(drawn, circuit)],
    )
    figure.update_yaxes(
        tickvals=list(range(len(drawing.sites))), ticktext=list(drawing.sites), range=[-0.55, len(drawing.sites) - 0.4],
        showgrid=True, gridcolor=PALE, zeroline=False, fixedrange=False,
    )
    figure.update_xaxes(visible=drawing.positions, showgrid=False, zeroline=False)
    if drawing.positions:
        shown = range(n_positions)
        figure.update_xaxes(tickvals=list(shown), ticktext=[html.escape(readable(tokens[p])) if tokens else str(p) for p in shown], tickangle=0)
    else:
        figure.update_xaxes(range=[-0.06, 1.06])
    return figure


def plotly_script() -> str:
    """plotly.js itself, to be put into a page."""
    return get_plotlyjs()


def embedded(figure: go.Figure, element: str) -> str:
    """The figure as a `div` of this id, for a page that already has plotly.js; without the button that would send it to a server."""
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}
    config |= {"showSendToCloud": False, "plotlyServerURL": ""}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=element, config=config)


def _caption(drawn: Circuit, circuit: Circuit) -> dict[str, object]:
    """What is drawn, of what, and how to read it."""
    part = f"Drawn: the {drawn.n_edges} edges on the strongest paths, of {circuit.n_edges}; {drawn.n_nodes} of {circuit.n_nodes} nodes."
    if drawn.n_edges == circuit.n_edges:
        part = f"Drawn: all {circuit.n_edges} edges and {circuit.n_nodes} nodes."
    text = f"{part} An edge is as wide as the square root of its strength, a node as large as its influence on the output."
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0, "yshift": -52}
    return {"text": text, **place, "showarrow": False, "font": {"size": 12, "color": SOFT}}


def curves(edges: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Smooth curves that leave and enter vertically, as (n_edges, points + 1) with a gap (NaN) after each."""
    t = np.linspace(0, 1, _CURVE_POINTS)[None, :]
    x0, y0, x1, y1 = (edges[c].to_numpy()[:, None] for c in ("x0", "y0", "x1", "y1"))
    ease = 3 * t**2 - 2 * t**3
    gap = np.full((edges.height, 1), np.nan)
    return np.hstack([x0 + (x1 - x0) * ease, gap]), np.hstack([y0 + (y1 - y0) * t, gap])


_SIGNS = ((True, RAISES, "raises the metric"), (False, LOWERS, "lowers the metric"))


def width_classes(strength: np.ndarray) -> np.ndarray:
    """Class 0 ... WIDTH_CLASSES - 1 of each edge by the root of its strength; the top twentieth share the widest, so that none dwarfs the rest."""
    size = np.sqrt(strength / np.quantile(strength, 0.95))
    return np.minimum((size * WIDTH_CLASSES).astype(int), WIDTH_CLASSES - 1)


def line_width(step: float) -> float:
    """Pixels of a width class."""
    return 0.8 + 5.2 * ((step + 0.5) / WIDTH_CLASSES) ** 1.5


def _edge_traces(drawing: Drawing) -> list[go.Scatter]:
    """One trace for each sign and width class, the weak ones first so that strong edges lie on top; then the legend's two lines."""
    xs, ys = curves(drawing.edges)
    classes = width_classes(drawing.edges["strength"].to_numpy())
    positive = drawing.edges["weight"].to_numpy() >= 0
    traces = []
    for step in range(WIDTH_CLASSES):
        for sign, colour, name in _SIGNS:
            chosen = (classes == step) & (positive == sign)
            line, opacity = {"color": colour, "width": line_width(step)}, 0.34 + 0.5 * step / WIDTH_CLASSES
            curve = {"x": xs[chosen].ravel(), "y": ys[chosen].ravel(), "mode": "lines", "line": line, "opacity": opacity}
            traces.append(go.Scatter(**curve, hoverinfo="skip", name=name, legendgroup=name, showlegend=False))
    for _, colour, name in _SIGNS:
        traces.append(go.Scatter(x=[None], y=[None], mode="lines", line={"color": colour, "width": 4}, name=name, legendgroup=name, hoverinfo="skip"))
    return traces


def _edge_hovers(drawing: Drawing, notes: pl.DataFrame) -> go.Scatter:
    """Invisible points in the middle of each edge that answer to the mouse."""
    names = {key: marked(name, kind) for key, name, kind in notes.select("key", "name", "label_kind").iter_rows()}
    edges = drawing.edges
    text = [
        f"<b>{_name(names.get(s), s)} → {_name(names.get(t), t)}</b><br>weight {weight:+.4g}, {share:.1%} of what enters the target"
        for s, t, weight, share in edges.select("source", "target", "weight", "share").iter_rows()
    ]
    x, y = (edges["x0"] + edges["x1"]) / 2, (edges["y0"] + edges["y1"]) / 2
    return go.Scatter(x=x, y=y, mode="markers", marker={"size": 7, "opacity": 0}, text=text, hoverinfo="text", showlegend=False, name="edges")


def _name(name: object, key: str) -> str:
    """What to call a node in a hover text, escaped: plotly reads tags."""
    return html.escape(readable(str(name or key)))


def _neighbours(circuit: Circuit, notes: pl.DataFrame, *, of: str, other: str, n: int = 5) -> dict[str, list[str]]:
    """For each node, lines naming the strongest `n` nodes at the `other` end of its edges."""
    named = circuit.edges.join(notes.select("key", "name"), left_on=other, right_on="key", how="left")
    top = named.sort(["strength", other], descending=[True, False]).group_by(of, maintain_order=True).head(n)
    line = pl.struct("weight", pl.coalesce("name", other).alias("name"))
    lines = top.group_by(of, maintain_order=True).agg(line.alias("lines"))
    return {key: [f"{row['weight']:+.3g}  {html.escape(readable(row['name']))}" for row in rows] for key, rows in lines.iter_rows()}


def _hover(row: dict[str, object], inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """The text beside a node under the mouse; every token and label escaped, plotly reads tags."""
    contexts = [html.escape(str(c)) for c in (row["contexts"] or [])][:4]  # type: ignore[attr-defined]
    tokens = ", ".join(html.escape(readable(t)) for t in (row["tokens"] or []))  # type: ignore[attr-defined]
    frequency, index = row["frequency"], row["index"] if row["kind"] == "feature" else ""
    parts = [
        f"<b>{_name(marked(str(row['name']), row['label_kind']) if row['name'] else None, str(row['key']))}</b>",  # type: ignore[arg-type]
        " · ".join([f"{row['site']}", f"{row['kind']} {index}".rstrip(), *([f"position {row['pos']}"] if row["pos"] != -1 else [])]),
        f"influence {row['influence']:.1%}" + (f" · active at {frequency:.2%} of tokens" if frequency is not None else ""),
    ]
    parts += [f"top tokens: {tokens}"] if tokens else []
    parts += ["contexts:", *(f"  {c}" for c in contexts)] if contexts else []
    parts += ["<i>from</i>", *(f"  {line}" for line in inputs)] if inputs else []
    parts += ["<i>to</i>", *(f"  {line}" for line in outputs)] if outputs else []
    return "<br>".join([*parts, f"<span style='color:#8c959f;font-size:10px'>{html.escape(str(row['key']))}</span>"])


_MARKS = (("feature", "feature", "circle", FEATURE), ("error", "error node", "diamond", ERROR), ("output", "output", "star", OUTPUT))


def _node_traces(nodes: pl.DataFrame, circuit: Circuit, notes: pl.DataFrame) -> list[go.Scatter]:
    """One trace for each kind of node."""
    inputs = _neighbours(circuit, notes, of="target", other="source")
    outputs = _neighbours(circuit, notes, of="source", other="target")
    traces = []
    for kind, name, symbol, colour in _MARKS:
        rows = nodes.filter(pl.col("kind") == kind)
        text = [_hover(row, inputs.get(row["key"], []), outputs.get(row["key"], [])) for row in rows.iter_rows(named=True)]
        size = 8 + 22 * np.sqrt(rows["influence"].to_numpy().clip(0, 1))
        marker = {"symbol": symbol, "color": colour, "size": size if kind != "output" else 26, "line": {"color": "white", "width": 1.2}, "opacity": 1}
        traces.append(go.Scatter(
            x=rows["x"], y=rows["y"], mode="markers", marker=marker, text=text, hoverinfo="text", name=name,
            customdata=rows.select(pl.concat_str("key", pl.lit("@"), "pos")).to_series().to_list(),
        ))
    return traces


def _labels(nodes: pl.DataFrame, span: float) -> list[dict[str, object]]:
    """Names under the most influential features of each row, where they do not run into one another; in crowded rows under the lowest only."""
    placed: dict[str, list[tuple[float, float]]] = {}
    labels: list[dict[str, object]] = []
    counts = dict(nodes.group_by("site").len().iter_rows())
    rows = nodes.filter(pl.col("kind") != "error").sort(["influence", "key"], descending=[True, False])
    for site, key, name, x, y, influence in rows.select("site", "key", "name", "x", "y", "influence").iter_rows():
        crowded = counts[site] > _CROWDED and span == 1
        if crowded and round(y) - y < _STAGGER / 2:
            continue
        room = _PIXELS / counts[site] * (3 if crowded else 1) / _CHARACTER_PIXELS
        text = _shortened(str(name or key), int(min(max(room, 9), 24)))
        half = (len(text) * _CHARACTER_PIXELS / 2 + 3) / _PIXELS * span * 1.12
        taken = placed.setdefault(site, [])
        if any(abs(x - other) < half + width for other, width in taken):
            continue
        taken.append((x, half))
        labels.append({
            "x": x, "y": y, "text": html.escape(text), "showarrow": False, "yshift": -(16 + 11 * influence**0.5), "font": {"size": 11.5},
            "bgcolor": "rgba(255,255,255,0.72)", "borderpad": 1,
        })
    return labels


def _shortened(name: str, width: int) -> str:
    """As many of a name's tokens as fit, at least the first, cut where it must be."""
    whole = readable(name, 80)
    while len(whole) > width and SEPARATOR in whole:
        whole = whole.rpartition(SEPARATOR)[0]
    return readable(whole, width)


def flow_figure(summary: pl.DataFrame) -> go.Figure:
    """Bars of `circuits.site_summary`: how much of what enters the output passes through each site's features and error nodes."""
    rows = summary.filter(pl.col("site") != "y")
    features = rows["flow"] - rows["error_flow"]
    bars = [
        go.Bar(x=rows["site"], y=features, name="features", marker_color=FEATURE, text=[f"{v:.0%}" for v in features]),
        go.Bar(x=rows["site"], y=rows["error_flow"], name="error nodes", marker_color=ERROR, text=[f"{v:.0%}" for v in rows["error_flow"]]),
    ]
    figure = go.Figure(bars)
    figure.update_traces(textposition="inside", hovertemplate="%{x}: %{y:.1%} %{fullData.name}<extra></extra>")
    figure.update_layout(
        barmode="stack", template="plotly_white", height=330, font={"family": _FONT, "color": INK, "size": 13}, bargap=0.35,
        margin={"l": 84, "r": 24, "t": 40, "b": 40}, legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_yaxes(tickformat=".0%", title="share of the output's flow", rangemode="tozero")
    return figure


_AGREEMENT_MEASURES = ("signed", "magnitude", "partial_magnitude", "centred_magnitude")
_NULL_COLOURS = {"shuffled": "#c5ccd3", "matched": "#8c98a4"}


def agreement_figure(table: pl.DataFrame, measures: Sequence[str] = _AGREEMENT_MEASURES, *, title: str = "") -> go.Figure:
    """`agreement.Agreement.table` as small pictures: a row for each two connectivities, a column for each measure.

    In each the pairs of sites stand side by side, the pooled line last: a dot for the measure (filled where q <= 0.05 against the first null), bars
    from end to end of each null's 95 % interval.
    """
    kinds = table.select("first", "second").unique(maintain_order=True).rows()
    shown = [name for name in measures if name in table["measure"]] or table["measure"].unique(maintain_order=True).to_list()
    names = [f"{name.replace('_', ' ')}" for name in shown]
    figure = make_subplots(
        rows=len(kinds), cols=len(shown), shared_xaxes=True, shared_yaxes=True, column_titles=names, row_titles=[f"{a} · {b}" for a, b in kinds],
        horizontal_spacing=0.02, vertical_spacing=0.05,
    )  # fmt: skip
    for row, (first, second) in enumerate(kinds, 1):
        for column, name in enumerate(shown, 1):
            of_cell = table.filter((pl.col("first") == first) & (pl.col("second") == second) & (pl.col("measure") == name))
            for trace in _agreement_traces(of_cell, legend=(row, column) == (1, 1)):
                figure.add_trace(trace, row=row, col=column)
    height = 240 + 210 * len(kinds)
    at_top = lambda pixels: {"yref": "container", "y": 1 - pixels / height, "yanchor": "top"}
    figure.update_layout(
        template="plotly_white", title={"text": html.escape(title), **at_top(20)}, legend={"orientation": "h", "x": 0, **at_top(52)}, height=height,
        barmode="overlay", bargap=0.35, margin={"t": 130, "b": 110}, font={"family": _FONT, "color": INK, "size": 13},
    )
    figure.update_yaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1, gridcolor=PALE)
    figure.update_xaxes(tickangle=-35)
    return figure


def _agreement_traces(rows: pl.DataFrame, *, legend: bool) -> list[go.Bar | go.Scatter]:
    """The nulls' intervals of one cell, then its dots."""
    traces: list[go.Bar | go.Scatter] = []
    nulls = rows["null"].unique(maintain_order=True).to_list()
    for place, null in enumerate(nulls):
        own = rows.filter((pl.col("null") == null) & pl.col("p").is_not_null())
        traces.append(go.Bar(
            x=_site_pairs(own), base=own["null_low"], y=own["null_high"] - own["null_low"], width=0.6 - 0.3 * place, name=f"{null} labels, 95 %",
            marker_color=_NULL_COLOURS.get(null, PALE), legendgroup=null, showlegend=legend,
            customdata=own.select("null_low", "null_high", "p", "q").rows(), hovertemplate=f"{null}: %{{customdata[0]:.3f}} … %{{customdata[1]:.3f}}"
            "<br>p %{customdata[2]:.3g}, q %{customdata[3]:.3g}<extra></extra>",
        ))  # fmt: skip
    observed = rows.filter(pl.col("null") == nulls[0]) if nulls else rows
    beyond = (observed["q"].fill_null(1.0) <= 0.05).to_list()
    marker = {"size": 9, "color": [RAISES if found else "white" for found in beyond], "line": {"color": RAISES, "width": 2}}
    traces.append(go.Scatter(
        x=_site_pairs(observed), y=observed["value"], mode="markers", marker=marker, name="measured (filled: q ≤ 0.05)", legendgroup="measured",
        showlegend=legend, customdata=observed.select("n_pairs").rows(), hovertemplate="%{x}: %{y:.3f}, %{customdata[0]:,} pairs<extra></extra>",
    ))  # fmt: skip
    return traces


def _site_pairs(rows: pl.DataFrame) -> list[str]:
    pairs = rows.select("source_site", "target_site").rows()
    return [source if source == target else f"{source} → {target}" for source, target in pairs]


# What one method is drawn in, in every figure: Okabe and Ito's colours, told apart by dash and symbol too. Attribution is always the blue line.
@dataclass(frozen=True)
class Pen:
    colour: str
    dash: str
    symbol: str
    width: float = 1.8


_PENS = {
    ATTRIBUTION: Pen("#0072b2", "solid", "circle", 3.0),
    "greedy pruning": Pen("#d55e00", "solid", "star", 2.2),
    "learned gates": Pen("#56b4e9", "dash", "hexagon", 2.2),
    "measured effects": Pen("#5e4fa2", "dashdot", "cross", 2.2),
    "per sequence": Pen("#8c6d31", "solid", "pentagon", 2.2),
    "node attribution": Pen("#009e73", "longdash", "triangle-down"),
    "top activations": Pen("#e69f00", "dashdot", "diamond"),
    "shuffled weights": Pen("#cc79a7", "dash", "triangle-up"),
    "random edges": Pen("#57606a", "dot", "square"),
    "random nodes": Pen("#98a2ac", "dash", "x"),
}
_OTHER_PENS = (Pen("#b2182b", "dot", "bowtie"), Pen("#1b7837", "dashdot", "hourglass"), Pen("#542788", "dash", "star-diamond"))

SIZES_OF_A_CIRCUIT = {
    "n_edges": "edges", "n_nodes": "nodes", "average_degree": "average degree",
    "size": "candidates kept (by the circuit that a control is matched to)",
}  # fmt: skip
"""What a circuit's size can be; edges and nodes are what pruning leaves, which of a random control is little or nothing."""
PARTS = {"circuit": "faithfulness, φ of the circuit", "complement": "completeness, φ of the rest"}
_ABLATIONS = ("edge", "node")
_POINT_KEYS = ("method", "ablation", "part", "size")
_PHI_LIMITS = (-1.0, 2.0)  # φ beyond is drawn at no axis's cost: the hover and the table have it
_DRAWN_EDGES = 4000


class MixedTable(UserError):
    """A figure is of one metric, baseline, averaging, split and task."""


def _pen(method: str) -> Pen:
    """The method's own, else one of three by its name, so that it is the same in every figure."""
    name = method.replace("_", " ").replace("-", " ").lower()
    return _PENS.get(name) or _OTHER_PENS[crc32(name.encode()) % len(_OTHER_PENS)]


def _methods(table: pl.DataFrame) -> list[str]:
    """The table's methods, controls first and attribution last, so that it lies on top."""
    order = {name: place for place, name in enumerate(_PENS)}
    return sorted(table["method"].unique().to_list(), key=lambda name: (-order.get(name.replace("_", " ").lower(), len(order)), name))


def _present(table: pl.DataFrame, column: str, known: Sequence[str]) -> list[str]:
    """The values of a column, the known ones in their order, then others."""
    values = table[column].drop_nulls().unique(maintain_order=True).to_list()
    return [name for name in known if name in values] + [name for name in values if name not in known]


def stated(table: pl.DataFrame) -> str:
    """What all rows share, for a figure's subtitle: metric, baseline, averaging, split, task and the number of sequences.

    Raises `MixedTable` where rows differ in one of them; a missing column or null says nothing.
    """
    parts = []
    for column in (name for name in _STATEMENTS if name in table.columns):
        values = table[column].drop_nulls().unique(maintain_order=True).to_list()
        if len(values) > 1:
            raise MixedTable(f"one figure for {column} {', '.join(map(repr, values))}: filter the table to one of them")
        parts += ["all tasks pooled" if (column, value) == ("task", POOLED) else _STATEMENTS[column].format(value) for value in values]
    if "n" in table.columns and table["n"].drop_nulls().len():
        low, high = int(table["n"].min()), int(table["n"].max())  # type: ignore[arg-type]
        parts.append(f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}")
    return " · ".join(parts)


_STATEMENTS = {"task": "{}", "metric": "{}", "baseline": "{} baseline", "split": "{} sequences", "averaging": "{}"}


def _points(table: pl.DataFrame) -> pl.DataFrame:
    """The table in the order of its points; raises `MixedTable` where a point has several rows."""
    if table.select(_POINT_KEYS).is_duplicated().any():
        raise MixedTable("several rows for one method, ablation, part and size: pool the draws, filter the table to one metric, split and task")
    missing = [pl.lit(None, dtype=pl.Float64).alias(name) for name in ("draw_min", "draw_max") if name not in table.columns]
    return table.with_columns(*missing).sort(_POINT_KEYS)


@dataclass(frozen=True)
class _Axis:
    """An axis of sizes: a column, its name and its button's, whether it is logarithmic, where a size of zero stands on it, as what it is written."""

    column: str
    name: str
    button: str
    logarithmic: bool
    zero: float
    greatest: float
    percent: bool = False

    @classmethod
    def of(cls, points: pl.DataFrame, column: str) -> "_Axis":
        """Logarithmic where the sizes above zero span more than a factor of 30."""
        sizes = points[column].drop_nulls()
        above = sizes.filter(sizes > 0)
        least, greatest = (float(above.min()), float(above.max())) if above.len() else (1.0, 1.0)  # type: ignore[arg-type]
        name = SIZES_OF_A_CIRCUIT.get(column, column)
        return cls(column, name, name.partition(" (")[0], greatest > 30 * least, least / 2, greatest)

    def place(self, sizes: pl.Series) -> list[float | None]:
        """Where sizes stand: as they are; on a logarithmic axis those of zero at its left end, where the tick says 0."""
        if not self.logarithmic:
            return sizes.to_list()
        return [None if size is None else max(size, self.zero) for size in sizes.to_list()]

    def layout(self, zeros: bool) -> dict[str, object]:
        """The axis's settings; `zeros`: whether there are sizes of zero."""
        if not self.logarithmic:
            span = [-0.02 * self.greatest, 1.04 * self.greatest]
            return {"type": "linear", "range": span, "tickmode": "auto", "tickformat": ".0%" if self.percent else ",~r"}
        first, last = int(np.floor(np.log10(self.zero))), int(np.ceil(np.log10(self.greatest)))
        inside = lambda ticks: [tick for tick in ticks if 1.9 * self.zero <= tick <= 1.01 * self.greatest]
        decades = inside(10.0**power for power in range(first, last + 1))
        if len(decades) < 3:
            decades = inside(factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5))
        ticks = ([self.zero] if zeros else []) + decades
        text = (["0"] if zeros else []) + [f"{100 * tick:g}%" if self.percent else f"{tick:,g}" for tick in decades]
        span = [np.log10(self.zero * (0.8 if zeros else 1.6)), np.log10(1.25 * self.greatest)]
        return {"type": "log", "range": span, "tickmode": "array", "tickvals": ticks, "ticktext": text}

    @property
    def title(self) -> str:
        return f"{self.name}, logarithmic" if self.logarithmic else self.name


def faithfulness_figure(table: pl.DataFrame, *, reached: pl.DataFrame | None = None, title: str = "") -> go.Figure:
    """Faithfulness and completeness against a circuit's size: a row of panels for each part, a column for each way of ablating.

    `table`: rows of `faithfulness.with_sizes`, draws pooled, of one metric, baseline, averaging, split and task; a switch changes between
    `n_edges`, `n_nodes`, `average_degree` and `size`, those that are there. A null `value` is undefined and leaves a gap.
    `reached`: rows of `faithfulness.smallest` of the same sweeps, marked on attribution's line; null sizes: no circuit reaches that level.
    """
    subtitle, points = stated(table), _points(table)
    parts, ablations = _present(points, "part", tuple(PARTS)), _present(points, "ablation", _ABLATIONS)
    figure = make_subplots(
        rows=len(parts), cols=len(ablations), shared_yaxes=True, horizontal_spacing=0.04, vertical_spacing=0.14,
        column_titles=[f"{name} ablation" for name in ablations],
    )  # fmt: skip
    axes = [_Axis.of(points, column) for column in SIZES_OF_A_CIRCUIT if column in points.columns]
    drawn: list[tuple[go.Scatter, list[list[float | None]]]] = []  # a trace, and its x on each axis
    for row, part in enumerate(parts, 1):
        for column, ablation in enumerate(ablations, 1):
            panel = points.filter((pl.col("part") == part) & (pl.col("ablation") == ablation))
            traces = [pair for method in _methods(points) for pair in _curve(panel.filter(pl.col("method") == method), axes)]
            if part == "circuit" and reached is not None:
                traces += _reached(reached.filter((pl.col("ablation") == ablation) & (pl.col("method") == ATTRIBUTION)), axes)
            for trace, _ in traces:
                figure.add_trace(trace, row=row, col=column)
            drawn += traces
        figure.update_yaxes(range=_phi_range(points.filter(pl.col("part") == part)), row=row)
        figure.update_yaxes(title_text=PARTS.get(part, part), row=row, col=1)
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": SOFT, "width": 1}, layer="below")
    for level in () if reached is None or "circuit" not in parts else reached["level"].unique().to_list():
        figure.add_hline(y=level, line={"color": "#afb8c1", "width": 1, "dash": "dot"}, layer="below", row=1 + parts.index("circuit"), col="all")
    legend_once(figure)
    height = 190 + 290 * len(parts)
    style(figure, title, subtitle, height, notes=[_band_note(points), _empty_note(points), _undefined_note(points)])
    zeros = [bool((points[axis.column] == 0).any()) for axis in axes]
    panels = [len(ablations) * row + column + 1 for row in range(len(parts)) for column in range(len(ablations))]
    _switch(figure, axes, [xs for _, xs in drawn], zeros=zeros, panels=panels, titled=panels[-len(ablations) :])
    return figure


def _curve(rows: pl.DataFrame, axes: Sequence[_Axis]) -> list[tuple[go.Scatter, list[list[float | None]]]]:
    """The line of one method in one panel, over its band where it has one: attribution's interval, a control's spread over draws."""
    if not rows.height:
        return []
    rows = rows.sort(axes[0].column)
    method = str(rows["method"][0])
    pen, ends = _pen(method), ("low", "high") if method == ATTRIBUTION else ("draw_min", "draw_max")
    pairs = []
    if rows[ends[0]].drop_nulls().len():
        outline = [_band(rows, axis, ends) for axis in axes]
        band = go.Scatter(
            x=outline[0][0], y=outline[0][1], mode="lines", fill="toself", fillcolor=faded(pen.colour, 0.2 if method == ATTRIBUTION else 0.13),
            line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=method, name=f"{method} band",
        )  # fmt: skip
        pairs.append((band, [x for x, _ in outline]))
    hover, data = _hover_lines(rows, axes)
    line = go.Scatter(
        x=axes[0].place(rows[axes[0].column]), y=rows["value"].to_list(), name=html.escape(method), legendgroup=method, **pen_marks(pen),
        customdata=data, hovertemplate=hover,
    )  # fmt: skip
    return [*pairs, (line, [axis.place(rows[axis.column]) for axis in axes])]


def pen_marks(pen: Pen) -> dict[str, object]:
    """A line with its points, and a gap where there is none."""
    line, marker = {"color": pen.colour, "dash": pen.dash, "width": pen.width}, {"symbol": pen.symbol, "size": 7, "color": pen.colour}
    return {"mode": "lines+markers", "connectgaps": False, "line": line, "marker": marker}


def _hover_lines(rows: pl.DataFrame, axes: Sequence[_Axis]) -> tuple[str, list[tuple[object, ...]]]:
    """The hover text's template, and the row's values that it takes; a part that no row has is left out."""
    shown = [("value", "φ {:.3f}"), ("low", "95 %: {:.3f}"), ("high", " … {:.3f}"), ("draw_min", "draws: {:.3f}"), ("draw_max", " … {:.3f}")]
    shown += [(axis.column, f"{{:{'.3~%' if axis.percent else ',.4~g'}}} {axis.name.partition(' (')[0]}") for axis in axes]
    shown += [("n", "{} sequences"), ("undefined_n", ", {} undefined")]
    known = [(name, text) for name, text in shown if name in rows.columns and rows[name].drop_nulls().len()]
    text = f"<b>{html.escape(str(rows['method'][0]))}</b>"
    for i, (name, form) in enumerate(known):
        place = form.replace("{:", f"%{{customdata[{i}]:").replace("{}", f"%{{customdata[{i}]}}")
        text += place if name in ("high", "draw_max", "undefined_n") else f"<br>{place}"
    return text + "<extra></extra>", rows.select([name for name, _ in known]).rows()


def _band(rows: pl.DataFrame, axis: _Axis, ends: tuple[str, str]) -> tuple[list[float | None], list[float | None]]:
    """x and y of the outline between the columns `ends`, low and high: a closed piece for each stretch without a gap, None between pieces."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    known = rows.with_columns(pl.any_horizontal(pl.col("value", *ends).is_null()).alias("gap"))
    known = known.with_columns(pl.col("gap").cast(pl.Int64).cum_sum().alias("piece")).filter(~pl.col("gap"))
    for _, piece in known.group_by("piece", maintain_order=True):
        x = axis.place(piece[axis.column])
        xs += [*x, *x[::-1], None]
        ys += [*piece[ends[1]].to_list(), *piece[ends[0]].to_list()[::-1], None]
    return xs, ys


def _reached(rows: pl.DataFrame, axes: Sequence[_Axis]) -> list[tuple[go.Scatter, list[list[float | None]]]]:
    """A mark on each circuit that is the smallest to reach a level, or several levels at once."""
    columns = [axis.column for axis in axes]
    marks = rows.drop_nulls(["value", columns[0]]).sort("level").group_by("value", *columns, maintain_order=True).agg("level")
    if not marks.height:
        return []
    text = [f"{' and '.join(f'{level:g}' for level in levels)}    " for levels in marks["level"]]
    sizes = "<br>".join(f"%{{customdata[{i}]:,.4~g}} {axis.button}" for i, axis in enumerate(axes))
    marker = {"symbol": "diamond-open", "size": 15, "color": INK, "line": {"width": 2.5}}
    trace = go.Scatter(
        x=axes[0].place(marks[columns[0]]), y=marks["value"].to_list(), mode="markers+text", text=text, textposition="middle left",
        name="smallest to reach", marker=marker, legendgroup="reached", textfont={"size": 12.5},
        customdata=marks.select(columns).rows(), hovertemplate=f"<b>the smallest to reach %{{text}}</b><br>φ %{{y:.3f}}<br>{sizes}<extra></extra>",
    )  # fmt: skip
    return [(trace, [axis.place(marks[axis.column]) for axis in axes])]


_Places = Sequence[Sequence[list[float | None]]]


def _switch(
    figure: go.Figure, axes: Sequence[_Axis], xs: _Places, *, zeros: Sequence[bool], panels: Sequence[int], titled: Sequence[int]
) -> None:
    """Buttons that change what the x axes are; the first of `axes` is shown, without buttons where it is the only one.

    `xs`: each trace's x on each axis; `zeros`: which axes have sizes of zero; `panels`: numbers of plotly's axes, those `titled` say what they are.
    """
    name = lambda number: "xaxis" if number == 1 else f"xaxis{number}"
    settings = []
    for axis, zero in zip(axes, zeros):
        own = {f"{name(number)}.{key}": value for number in panels for key, value in axis.layout(zero).items()}
        settings.append(own | {f"{name(number)}.title.text": axis.title for number in titled})
    figure.update_layout({key.replace(".", "_"): value for key, value in settings[0].items()})
    if len(axes) < 2:
        return
    buttons = [{"label": axis.button, "method": "update", "args": [{"x": [own[i] for own in xs]}, settings[i]]} for i, axis in enumerate(axes)]
    add_buttons(figure, buttons)


def add_buttons(figure: go.Figure, buttons: Sequence[Mapping[str, object]]) -> None:
    """A row of buttons over the figure's right end, the first pressed."""
    height = figure.layout.height
    above = 1 + 46 / (height - figure.layout.margin.t - figure.layout.margin.b)
    place = {"x": 1.0, "xanchor": "right", "y": above, "yanchor": "bottom", "direction": "right", "pad": {"r": 0, "t": 0}, "font": {"size": 12.5}}
    figure.update_layout(updatemenus=[{"type": "buttons", "buttons": list(buttons), "active": 0, "showactive": True, **place}])


def _band_note(points: pl.DataFrame) -> str:
    """What is shaded."""
    own = "attribution's 95 % interval over sequences" if points["method"].is_in([ATTRIBUTION]).any() else ""
    drawn = "a control's range over its draws" if points["draw_min"].drop_nulls().len() else ""
    return f"Shaded: {'; '.join(part for part in (own, drawn) if part)}." if own or drawn else ""


def _empty_note(points: pl.DataFrame) -> str:
    """Which controls pruning left nothing of."""
    empty = points.filter((pl.col("size") > 0) & (pl.col("n_edges") == 0)) if "n_edges" in points.columns else points.clear()
    methods = ", ".join(reversed(_methods(empty)))
    return f"No path from an input to the output is left at some sizes of {methods}: such a circuit has 0 edges." if methods else ""


def _phi_range(points: pl.DataFrame) -> list[float]:
    """An axis that shows 0, 1, every value and attribution's interval, within `_PHI_LIMITS`."""
    own = points.filter(pl.col("method") == ATTRIBUTION)
    shown = pl.concat([points["value"], own["low"], own["high"]]).drop_nulls()
    low, high = (min(0.0, float(shown.min())), max(1.0, float(shown.max()))) if shown.len() else (0.0, 1.0)  # type: ignore[arg-type]
    return [max(low, _PHI_LIMITS[0]) - 0.06, min(high, _PHI_LIMITS[1]) + 0.06]


def _undefined_note(points: pl.DataFrame) -> str:
    """How many sequences and points are undefined, and how many lie beyond the axis."""
    notes = []
    if "undefined_n" in points.columns and (points["undefined_n"].fill_null(0) > 0).any():
        low, high = int(points["undefined_n"].min()), int(points["undefined_n"].max())  # type: ignore[arg-type]
        many = f"{high}" if low == high else f"{low} to {high}"
        notes.append(f"φ is undefined for {many} sequences (the task has no effect on them): counted, left out of a mean of ratios.")
    gaps = points["value"].null_count()
    notes += [f"{gaps} {'points have' if gaps > 1 else 'point has'} no value at all: gaps in the lines."] if gaps else []
    beyond = int(((points["value"] < _PHI_LIMITS[0]) | (points["value"] > _PHI_LIMITS[1])).sum())
    notes += [f"{beyond} points lie beyond the axis."] if beyond else []
    return " ".join(notes)


def faded(colour: str, opacity: float) -> str:
    """A colour such as #0072b2 as rgba."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def legend_once(figure: go.Figure) -> None:
    """One entry in the legend for each group, attribution's first: the lines are drawn in the opposite order."""
    seen: set[str] = set()
    for rank, trace in enumerate(figure.data):
        trace.legendrank = 1000 - rank if trace.legendgroup != "reached" else 2000
        trace.showlegend = trace.showlegend is not False and trace.legendgroup not in seen
        if trace.showlegend:
            seen.add(trace.legendgroup)


def style(figure: go.Figure, title: str, subtitle: str, height: int, *, notes: Sequence[str] = (), legend: bool = True) -> None:
    """What the figures of ablation share: fonts, a title over what is held fixed, the legend beside the data, notes under it."""
    said = [html.escape(note) for note in notes if note]
    under = {"text": html.escape(subtitle), "font": {"size": 13.5, "color": SOFT}}
    at_top = {"yref": "container", "y": 1 - 20 / height, "yanchor": "top", "x": 0, "xref": "paper", "xanchor": "left"}
    figure.update_layout(
        template="plotly_white", height=height, font={"family": _FONT, "color": INK, "size": 13.5}, hovermode="closest", showlegend=legend,
        title={"text": html.escape(title), "font": {"size": 19}, "subtitle": under, **at_top},
        margin={"l": 76, "r": 24, "t": 104, "b": 68 + 19 * len(said)},
        legend={"x": 1.015, "xanchor": "left", "y": 1, "yanchor": "top", "tracegroupgap": 2},
        hoverlabel={"align": "left", "bgcolor": "white", "bordercolor": "#8c959f", "font": {"family": _FONT, "size": 13, "color": INK}},
    )  # fmt: skip
    figure.update_annotations(font_size=14.5)  # the panels' names; notes come after
    figure.update_xaxes(gridcolor=PALE, zeroline=False, showline=True, linecolor="#8c959f", ticks="outside", tickcolor="#8c959f", title_font_size=14)
    figure.update_yaxes(gridcolor=PALE, zeroline=False, showline=True, linecolor="#8c959f", title_font_size=14)
    if said:
        place = {"xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "y": 0, "yshift": -60, "yanchor": "top"}
        figure.add_annotation(text="<br>".join(said), showarrow=False, align="left", font={"size": 12.5, "color": SOFT}, **place)


def removal_figure(table: pl.DataFrame, *, quantity: str = "accuracy", title: str = "", subtitle: str = "") -> go.Figure:
    """A heat map of `task, removed, value, low, high` (and `n`, when there): a row for each task, a column for each removed part.

    Each cell says its value over its interval. Values from 0 to 1 go from white to blue; others from red over white at 0 to blue. A null is a dash.
    """
    tasks, removed = (table[name].unique(maintain_order=True).to_list() for name in ("task", "removed"))
    cells = {(task, part): rest for task, part, *rest in table.select("task", "removed", "value", "low", "high").iter_rows()}
    grid = [[cells.get((task, part), [None] * 3) for part in removed] for task in tasks]
    counts = {(task, part): n for task, part, n in table.select("task", "removed", "n").iter_rows()} if "n" in table.columns else {}
    values = [[value for value, _, _ in row] for row in grid]
    known = table["value"].drop_nulls()
    share = not known.len() or bool((known.min() >= 0) and (known.max() <= 1))  # type: ignore[operator]
    reach = 1.0 if share else float(known.abs().max())  # type: ignore[arg-type]
    colours = [(0, "#f7fafc"), (0.5, "#8fbcd9"), (1, "#0b4f82")] if share else [(0, LOWERS), (0.5, "#f7fafc"), (1, RAISES)]
    heat = go.Heatmap(
        z=values, x=[html.escape(part) for part in removed], y=[html.escape(task) for task in tasks],
        zmin=0 if share else -reach, zmax=reach, colorscale=colours, xgap=3, ygap=3, hoverongaps=False,
        text=[[_cell(*cell) for cell in row] for row in grid], texttemplate="%{text}", textfont={"size": 14},
        colorbar={"title": {"text": quantity, "side": "right"}, "outlinewidth": 0, "thickness": 14},
        customdata=[[_cell_hover(cell, counts.get((task, part))) for part, cell in zip(removed, row)] for task, row in zip(tasks, grid)],
        hovertemplate=f"<b>%{{y}}</b>, removed: %{{x}}<br>{html.escape(quantity)} %{{customdata}}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heat)
    style(figure, title, subtitle, 220 + 76 * len(tasks), legend=False)
    figure.update_xaxes(side="top", showgrid=False, showline=False, ticks="", title={"text": "removed", "standoff": 6}, tickangle=0)
    figure.update_yaxes(autorange="reversed", showgrid=False, showline=False, automargin=True)
    figure.update_layout(margin_t=160, margin_b=30, plot_bgcolor="white")
    missing = [(part, task) for task in tasks for part in removed if cells.get((task, part), [None])[0] is None]
    for part, task in missing:
        figure.add_annotation(x=html.escape(part), y=html.escape(task), text="–", showarrow=False, font={"size": 15, "color": SOFT})
    return figure


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    interval = "" if low is None or high is None else f"<br><span style='font-size:11.5px'>{low:.2f} … {high:.2f}</span>"
    return f"<b>{value:.2f}</b>{interval}"


def _cell_hover(cell: Sequence[float | None], n: int | None) -> str:
    value, low, high = cell
    interval = "" if low is None or high is None else f"<br>95 %: {low:.3f} … {high:.3f}"
    return "" if value is None else f"{value:.3f}{interval}" + (f"<br>{n:,} sequences" if n is not None else "")


def distribution_figure(sequences: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """φ of each sequence, as `faithfulness.per_sequence` gives it: a violin, its quartiles and every sequence as a dot, for each method.

    The frame is of one size, part, metric, baseline and split. A null `ratio` is undefined: counted under the method's name, as are
    sequences beyond the axis (φ has heavy tails).
    """
    ablations = _present(sequences, "ablation", _ABLATIONS)
    figure = make_subplots(cols=len(ablations), shared_yaxes=True, horizontal_spacing=0.03, column_titles=[f"{name} ablation" for name in ablations])
    known = sequences["ratio"].drop_nulls()
    low, high = _inner_range(known)
    for column, ablation in enumerate(ablations, 1):
        names, texts = [], []
        for method in reversed(_methods(sequences)):
            rows = sequences.filter((pl.col("ablation") == ablation) & (pl.col("method") == method))
            if not rows.height:
                continue
            figure.add_trace(_violin(method, rows, low, high), row=1, col=column)
            values = rows["ratio"].drop_nulls()
            beyond = int(((values < low) | (values > high)).sum())
            counts = [f"n {values.len():,}", f"undefined {rows['ratio'].null_count():,}", *([f"beyond {beyond:,}"] if beyond else [])]
            names.append(method)
            texts.append("<br>".join([*(f"<b>{html.escape(word)}</b>" for word in method.split()), *counts]))
        figure.update_xaxes(tickvals=names, ticktext=texts, tickangle=0, row=1, col=column)
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": SOFT, "width": 1}, layer="below")
    style(figure, title, subtitle, 540, legend=False)
    figure.update_yaxes(range=[low, high])
    figure.update_yaxes(title_text="φ of a sequence", row=1, col=1)
    figure.update_layout(margin_b=116, violinmode="overlay")
    return figure


def _violin(method: str, rows: pl.DataFrame, low: float, high: float) -> go.Violin:
    """One method's sequences, its shape between the ends of the axis."""
    known, pen = rows.filter(pl.col("ratio").is_not_null()), _pen(method)
    # Silverman's rule by the quartiles: by the standard deviation one far sequence would flatten the shape
    quartiles = known["ratio"].quantile(0.75), known["ratio"].quantile(0.25)
    spread = 0.0 if None in quartiles else quartiles[0] - quartiles[1]  # type: ignore[operator]
    bandwidth = max(0.9 * spread / 1.34 * max(known.height, 1) ** -0.2, 0.005)
    inside = known["ratio"].filter(known["ratio"].is_between(low, high))
    ends = [*(float(value) for value in inside.to_list()), *([] if inside.len() else [low, high])]
    span = [min(ends) - bandwidth / 5, max(ends) + bandwidth / 5]  # of one value too it must not be empty
    text, marker = [html.escape(name) for name in known["sequence"]], {"color": pen.colour, "size": 4.5, "opacity": 0.6}
    return go.Violin(
        x=[method] * known.height, y=known["ratio"], name=method, text=text, points="all", pointpos=0, jitter=0.5, marker=marker, hoveron="points",
        line={"color": pen.colour, "width": 1.4}, fillcolor=faded(pen.colour, 0.13), box_visible=True, meanline_visible=True, spanmode="manual",
        span=span, bandwidth=bandwidth, box_width=0.16, width=0.85, hovertemplate="%{text}<br>φ %{y:.3f}<extra></extra>",
    )  # fmt: skip


def _inner_range(values: pl.Series) -> tuple[float, float]:
    """Wide enough for 0, 1 and all values that lie within `_PHI_LIMITS` or are 98 % of them."""
    if not values.len():
        return -0.06, 1.06
    low, high = (float(values.quantile(q)) for q in (0.01, 0.99))  # type: ignore[arg-type]
    least = max(float(values.min()), min(low, _PHI_LIMITS[0]))  # type: ignore[arg-type]
    greatest = min(float(values.max()), max(high, _PHI_LIMITS[1]))  # type: ignore[arg-type]
    return min(least, 0.0) - 0.06, max(greatest, 1.0) + 0.06


def effects_figure(effects: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """What attribution estimates of an edge against what cutting it alone costs, a panel for each `within` (full model, circuit).

    `effects`: `source, target, within, estimated, measured`. Both axes share a symmetric logarithm (linear near 0, so that signs and zeros stay),
    which a button turns off; the dashed line is where both are equal.
    The titles give Spearman's rank correlation over all edges; at most the 4,000 of the greatest estimate or measurement are drawn.
    """
    contexts = effects["within"].unique(maintain_order=True).to_list()
    known = effects.drop_nulls(["estimated", "measured"])
    panels = [known.filter(pl.col("within") == context) for context in contexts]
    figure = make_subplots(
        cols=len(contexts), shared_yaxes=True, horizontal_spacing=0.04,
        column_titles=[f"in the {html.escape(context)}: {_correlation_text(rows)}" for context, rows in zip(contexts, panels)],
    )  # fmt: skip
    size = pl.max_horizontal(pl.col("estimated").abs(), pl.col("measured").abs())
    largest = float(known.select(size.max()).item() or 1.0) if known.height else 1.0
    scale = SymmetricLog(largest / 1000, largest)
    shown = [rows.sort(size, descending=True).head(_DRAWN_EDGES) for rows in panels]
    for column, (context, rows) in enumerate(zip(contexts, shown), 1):
        figure.add_trace(_edge_dots(context, rows, scale), row=1, col=column)
    ends = [scale.place(np.array([side])).item() for side in (-1.1 * largest, 1.1 * largest)]
    equal = {"type": "line", "x0": ends[0], "x1": ends[1], "y0": ends[0], "y1": ends[1], "line": {"color": SOFT, "width": 1, "dash": "dash"}}
    figure.add_shape(**equal, layer="below", row="all", col="all")
    counts = [(context, rows.height, every.height) for context, rows, every in zip(contexts, shown, panels)]
    cut = [f"{context}: {n:,} of {n_edges:,} edges drawn." for context, n, n_edges in counts if n < n_edges]
    style(figure, title, subtitle, 620, legend=False, notes=[" ".join(cut)])
    figure.update_xaxes(title_text="estimated: the edge's attribution")
    figure.update_yaxes(title_text="measured: what cutting it alone costs", row=1, col=1)
    _scale_buttons(figure, scale, shown, ends)
    return figure


@dataclass(frozen=True)
class SymmetricLog:
    """asinh(x / 2s): linear below s, logarithmic above, odd."""

    scale: float
    largest: float

    def place(self, values: np.ndarray) -> np.ndarray:
        return np.arcsinh(values / (2 * self.scale))

    def layout(self) -> dict[str, object]:
        """Ticks at 0 and at powers of ten on both sides."""
        powers = [10.0**power for power in range(int(np.ceil(np.log10(self.scale))), int(np.floor(np.log10(self.largest))) + 1)]
        ticks = np.array([-value for value in reversed(powers)] + [0.0] + powers)
        return {"tickmode": "array", "tickvals": self.place(ticks).tolist(), "ticktext": [f"{tick:g}".replace("-", "−") for tick in ticks]}


def _correlation_text(rows: pl.DataFrame) -> str:
    """Spearman's rank correlation and the number of edges, or why there is none."""
    rank = rows.select(pl.corr("estimated", "measured", method="spearman")).item() if rows.height > 2 else None
    return f"{rows.height:,} edges, rank correlation {'undefined' if rank is None or np.isnan(rank) else f'{rank:.2f}'}"


def _edge_dots(context: str, rows: pl.DataFrame, scale: SymmetricLog) -> go.Scatter:
    """One dot an edge, each named."""
    text = [
        f"{_name(None, source)} → {_name(None, target)}<br>estimated {estimated:+.4g}, measured {measured:+.4g}"
        for source, target, estimated, measured in rows.select("source", "target", "estimated", "measured").iter_rows()
    ]
    marker = {"color": _PENS[ATTRIBUTION].colour, "size": 6, "opacity": 0.5, "line": {"color": "white", "width": 0.4}}
    x, y = (scale.place(rows[name].to_numpy()) for name in ("estimated", "measured"))
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, text=text, hoverinfo="text", name=context)


def _scale_buttons(figure: go.Figure, scale: SymmetricLog, shown: Sequence[pl.DataFrame], ends: Sequence[float]) -> None:
    """Buttons between the symmetric logarithm, which is shown, and plain axes; the line of equality follows."""
    axes = [f"{letter}axis{'' if i == 0 else i + 1}" for i in range(len(shown)) for letter in "xy"]
    padded, plain = 1.1 * scale.largest, {"tickmode": "auto"}
    buttons = []
    for label, place, setting, limits in (
        ("logarithmic", scale.place, scale.layout(), ends),
        ("linear", lambda values: values, plain, (-padded, padded)),
    ):
        data = {letter: [place(rows[name].to_numpy()).tolist() for rows in shown] for letter, name in (("x", "estimated"), ("y", "measured"))}
        layout: dict[str, object] = {f"{axis}.{key}": value for axis in axes for key, value in ({"range": list(limits)} | setting).items()}
        layout |= {f"shapes[{i}].{end}": limits[end in ("x1", "y1")] for i in range(len(shown)) for end in ("x0", "y0", "x1", "y1")}
        buttons.append({"label": label, "method": "update", "args": [data, layout]})
        if label == "logarithmic":
            figure.update_layout({key.replace(".", "_"): value for key, value in layout.items() if not key.startswith("shapes")})
    add_buttons(figure, buttons)


def matched_figure(table: pl.DataFrame, *, title: str = "") -> go.Figure:
    """How far each method's φ is from the reference's at equal size, with intervals: rows of `faithfulness.matched`, a panel for each ablation.

    A switch changes between what is equal (`on`: n_edges, n_nodes, average_degree, size). The rows are of one metric, baseline, averaging, split
    and task.
    """
    subtitle = stated(table)
    ons, ablations = _present(table, "on", tuple(SIZES_OF_A_CIRCUIT)), _present(table, "ablation", _ABLATIONS)
    known = table.drop_nulls("difference")
    figure = make_subplots(cols=len(ablations), shared_yaxes=True, horizontal_spacing=0.04, column_titles=[f"{name} ablation" for name in ablations])
    axes = [_Axis.of(known.filter(pl.col("on") == on).select(pl.col("at").alias(on)), on) for on in ons]
    data: dict[str, list[list[object]]] = {key: [[] for _ in ons] for key in ("x", "y", "error_y.array", "error_y.arrayminus", "customdata")}
    for column, ablation in enumerate(ablations, 1):
        for method in _methods(known.filter(pl.col("ablation") == ablation)):
            pen = _pen(method)
            for i, axis in enumerate(axes):
                of_line = (pl.col("method") == method) & (pl.col("ablation") == ablation) & (pl.col("on") == axis.column)
                rows = known.filter(of_line).sort("at")
                # a line without points still has its entry in the legend when they are null, not when there are none
                data["x"][i].append(axis.place(rows["at"]) or [None])
                data["y"][i].append(rows["difference"].to_list() or [None])
                data["error_y.array"][i].append((rows["high"] - rows["difference"]).to_list())
                data["error_y.arrayminus"][i].append((rows["difference"] - rows["low"]).to_list())
                data["customdata"][i].append(rows.select("difference", "low", "high", "value", "reference_value", "at").rows())
            hover = [f"<b>{html.escape(method)}</b>", "difference %{customdata[0]:+.3f}", "95 %: %{customdata[1]:+.3f} … %{customdata[2]:+.3f}"]
            hover += ["φ %{customdata[3]:.3f}, reference %{customdata[4]:.3f}", "at %{customdata[5]:,.4~g}<extra></extra>"]
            bars = {"type": "data", "symmetric": False, "array": data["error_y.array"][0][-1], "arrayminus": data["error_y.arrayminus"][0][-1]}
            line = go.Scatter(
                x=data["x"][0][-1], y=data["y"][0][-1], error_y=bars | {"thickness": 1.2, "width": 3}, name=html.escape(method), legendgroup=method,
                customdata=data["customdata"][0][-1], hovertemplate="<br>".join(hover), **pen_marks(pen),
            )  # fmt: skip
            figure.add_trace(line, row=1, col=column)
    figure.add_hline(y=0, line={"color": INK, "width": 1.2}, layer="below")
    legend_once(figure)
    style(figure, title, subtitle, 460)
    figure.update_yaxes(title_text="difference of φ", row=1, col=1)
    panels = list(range(1, len(ablations) + 1))
    zeros = [bool((known.filter(pl.col("on") == axis.column)["at"] == 0).any()) for axis in axes]
    _switch(figure, axes, [list(xs) for xs in zip(*data["x"])], zeros=zeros, panels=panels, titled=panels)
    for i, button in enumerate(figure.layout.updatemenus[0].buttons if len(axes) > 1 else ()):
        button.args = [{key: values[i] for key, values in data.items()}, button.args[1]]
    return figure


AREAS = {"CPR": "CPR: area under φ, more is better", "CMD": "CMD: area between φ and 1, less is better"}


def areas_figure(areas: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """Bars of `faithfulness.areas` (draws pooled), a panel for each area, node ablation hatched.

    The rows are of one metric, baseline, averaging, split and task, which `subtitle` names unless it is given.
    """
    subtitle = subtitle or stated(areas)
    shown, ablations = _present(areas, "area", tuple(AREAS)), _present(areas, "ablation", _ABLATIONS)
    figure = make_subplots(cols=len(shown), shared_yaxes=True, horizontal_spacing=0.05, column_titles=[AREAS.get(name, name) for name in shown])
    lines = [(method, ablation) for method in _methods(areas) for ablation in reversed(ablations)]
    for column, area in enumerate(shown, 1):
        rows = pl.DataFrame(lines, schema=["method", "ablation"], orient="row").with_row_index("line")
        rows = rows.join(areas.filter(pl.col("area") == area), on=["method", "ablation"], maintain_order="left")
        for trace in _area_bars(rows):
            figure.add_trace(trace, row=1, col=column)
        reach = rows.select(pl.max_horizontal("value", pl.col("high").fill_null(0.0)).max()).item() or 1.0
        least = min(0.0, rows.select(pl.min_horizontal("value", "low").min()).item() or 0.0)
        figure.update_xaxes(range=[1.08 * least, reach + 0.42 * (reach - least)], row=1, col=column)
    figure.update_yaxes(tickvals=list(range(len(lines))), ticktext=[f"{html.escape(method)}, {ablation}" for method, ablation in lines])
    style(figure, title, subtitle, 170 + 34 * len(lines), legend=False)
    figure.update_yaxes(showgrid=False, automargin=True, range=[-0.6, len(lines) - 0.4])
    figure.update_layout(bargap=0.25, margin_b=50)
    return figure


def _area_bars(rows: pl.DataFrame) -> list[go.Bar | go.Scatter]:
    """The bars with their intervals, each at the height `line`, then their numbers to the right of them."""
    rows = rows.filter(pl.col("value").is_not_null())
    up, down = (rows["high"] - rows["value"]).fill_null(0.0), (rows["value"] - rows["low"]).fill_null(0.0)
    pattern = {"shape": ["/" if ablation == "node" else "" for ablation in rows["ablation"]], "fgcolor": "white", "size": 7, "solidity": 0.35}
    error = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": INK, "thickness": 1.4, "width": 4}
    hover = "%{customdata[0]}, %{customdata[1]} ablation<br>%{customdata[2]:.3f}, 95 %: %{customdata[3]:.3f} … %{customdata[4]:.3f}<extra></extra>"
    bars = go.Bar(
        x=rows["value"], y=rows["line"], orientation="h", marker={"color": [_pen(method).colour for method in rows["method"]], "pattern": pattern},
        error_x=error, customdata=rows.select(pl.col("method"), "ablation", "value", "low", "high").rows(), hovertemplate=hover, name="area",
    )  # fmt: skip
    text = [
        f"  <b>{value:.3f}</b>{'' if low is None or high is None else f' ({low:.3f} … {high:.3f})'}".replace("-", "−")
        for value, low, high in rows.select("value", "low", "high").iter_rows()
    ]
    at = rows.select(pl.max_horizontal("value", "high", pl.lit(0.0))).to_series()
    return [bars, go.Scatter(x=at, y=rows["line"], mode="text", text=text, textposition="middle right", hoverinfo="skip", name="numbers")]


def improvement_figure(table: pl.DataFrame, gains: pl.DataFrame | None = None, *, title: str = "") -> go.Figure:
    """φ against the share of the candidates kept, of attribution and of what improves on it: the area under each line is its CPR.

    `table`: as for `faithfulness_figure`, with `share` = size / candidates; only part `circuit` is drawn. The area between a line and attribution's
    is shaded: it is the gain (on the linear axis, to which a button changes). `gains`: `method, ablation, value, low, high`, the gain in CPR over
    attribution, named in the legend.
    """
    subtitle = stated(table)
    points = _points(table.filter(pl.col("part") == "circuit"))
    ablations = _present(points, "ablation", _ABLATIONS)
    found = _Axis.of(points, "share")
    found = replace(found, name="share of the candidates kept", percent=True, button="logarithmic")
    axes = [*([found] if found.logarithmic else []), replace(found, button="linear", logarithmic=False)]
    figure = make_subplots(cols=len(ablations), shared_yaxes=True, horizontal_spacing=0.04, column_titles=[f"{name} ablation" for name in ablations])
    said = _gains_text(gains) if gains is not None else {}
    drawn: list[list[list[float | None]]] = []
    for column, ablation in enumerate(ablations, 1):
        panel = points.filter(pl.col("ablation") == ablation)
        own = panel.filter(pl.col("method") == ATTRIBUTION)
        for method in _methods(panel):
            for trace, xs in _improved(panel.filter(pl.col("method") == method), own, axes, said.get(method, "")):
                figure.add_trace(trace, row=1, col=column)
                drawn.append(xs)
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": SOFT, "width": 1}, layer="below")
    legend_once(figure)
    shaded = "Shaded: what lies between a line and attribution's; on a linear axis its area is the gain in CPR." if len(_methods(points)) > 1 else ""
    style(figure, title, subtitle, 500, notes=[shaded, _undefined_note(points)])
    figure.update_yaxes(range=_phi_range(points))
    figure.update_yaxes(title_text=PARTS["circuit"], row=1, col=1)
    panels = list(range(1, len(ablations) + 1))
    _switch(figure, axes, drawn, zeros=[bool((points["share"] == 0).any())] * len(axes), panels=panels, titled=panels)
    return figure


def _gains_text(gains: pl.DataFrame) -> dict[str, str]:
    """What the legend says under each method's name: the gain in CPR by each ablation."""
    said: dict[str, str] = {}
    for method, ablation, value, low, high in gains.select("method", "ablation", "value", "low", "high").drop_nulls("value").iter_rows():
        interval = "" if low is None or high is None else f" ({low:+.3f} … {high:+.3f})"
        said[method] = said.get(method, "") + f"<br>CPR {value:+.3f}{interval} by {ablation}".replace("-", "−")
    return said


def _improved(
    rows: pl.DataFrame, own: pl.DataFrame, axes: Sequence[_Axis], gain: str
) -> list[tuple[go.Scatter, list[list[float | None]]]]:
    """A method's line, over the area between it and attribution's, with its x on each axis."""
    method = str(rows["method"][0])
    pen, traces = _pen(method), []
    known, base = (frame.drop_nulls(["value", "share"]) for frame in (rows, own))
    if method != ATTRIBUTION and known.height and base.height:
        xs = [axis.place(pl.concat([known["share"], base["share"].reverse()])) for axis in axes]
        fill = {"mode": "lines", "fill": "toself", "fillcolor": faded(pen.colour, 0.16), "line": {"width": 0}, "hoverinfo": "skip"}
        ys = [*known["value"], *base["value"].reverse()]
        traces.append((go.Scatter(x=xs[0], y=ys, **fill, showlegend=False, legendgroup=method, name=f"{method} gain"), xs))
    hover, data = _hover_lines(rows, [axes[-1]])
    name = html.escape(method) + gain
    placed = [axis.place(rows["share"]) for axis in axes]
    line = go.Scatter(x=placed[0], y=rows["value"].to_list(), name=name, legendgroup=method, customdata=data, hovertemplate=hover, **pen_marks(pen))
    return [*traces, (line, placed)]


def save_figure(figure: go.Figure, path: Path) -> None:
    """A figure as a page of its own that opens offline."""
    figure.write_html(path, include_plotlyjs=True, full_html=True, config={"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""})
