"""Figures of regions, communities and heads: functions from frames (one from a matrix) to plotly figures, nothing that a table would not show.

1. `correlation_figure`: a site's correlations in the order of its blocks. `path_figure`: the levels that the blocks were chosen from.
2. `alluvial_figure`: what two partitions of the same things have in common. `likeness_figure`: are blocks merely a smaller dictionary?
3. `task_block_figure`: which block breaks which task. `sweep_figure`: φ against what is kept. `selectivity_figure`: is a block of one task?
4. `drives_figure`: what blocks drive each other, and what cutting that costs.
"""

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from .faithfulness import CIRCUIT, COMPLEMENT, Averaging
from .notes import readable
from .parcellation import FloatArray, IntArray
from .plots import (
    INK,
    LOWERS,
    RAISES,
    SOFT,
    WIDTH_CLASSES,
    Pen,
    SymmetricLog,
    add_buttons,
    curves,
    faded,
    legend_once,
    line_width,
    pen_marks,
    stated,
    style,
    uncrossed,
    width_classes,
)
from .region_study import FEATURES, HEADS, RANDOM, REGIONS

DIVERGING = [(0, LOWERS), (0.25, "#e58b78"), (0.5, "#ffffff"), (0.75, "#7fb0d6"), (1, RAISES)]
CELLS = 480
"""Cells on a side of a drawn matrix, about; of more features neighbours in a block are averaged."""
FEW = 60
"""Features whose pairs are named one by one."""

_PENS = {
    REGIONS: Pen("#0072b2", "solid", "circle", 3.0), HEADS: Pen("#009e73", "longdash", "triangle-down", 2.2),
    FEATURES: Pen("#d55e00", "dash", "diamond", 2.2), RANDOM: Pen("#57606a", "dot", "square", 2.2),
    "ward": Pen("#cc79a7", "dashdot", "triangle-up", 2.2), "spectral": Pen("#e69f00", "longdashdot", "pentagon", 2.2),
}  # fmt: skip
_OTHERS = (Pen("#56b4e9", "dash", "hexagon"), Pen("#8c6d31", "dashdot", "star"), Pen("#542788", "dot", "bowtie"), Pen("#1b7837", "dash", "hourglass"))
_GROUPS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#5e4fa2", "#7fbc41", "#b2182b", "#35978f", "#999999",
)  # fmt: skip


def partition_pen(method: str) -> Pen:
    """What a partition is drawn in, the same in every figure."""
    return _PENS.get(method) or _OTHERS[crc32(method.encode()) % len(_OTHERS)]


def _partitions(frame: pl.DataFrame) -> list[str]:
    """The partitions of a frame, the regions first."""
    order = {name: place for place, name in enumerate(_PENS)}
    return sorted(frame["method"].unique().to_list(), key=lambda name: (order.get(name, len(order)), name))


def signed(value: float, form: str = ".2f") -> str:
    """A number with a proper minus, and zero without one."""
    text = f"{value:{form}}"
    return (text.replace("-", "") if not text.strip("+-0.") else text).replace("-", "−")  # no negative zero


# --- correlations in the order of blocks ------------------------------------------------------------------------------


def block_order(labels: IntArray, coarser: Sequence[IntArray] = ()) -> tuple[IntArray, IntArray]:
    """(features, blocks) as they are drawn: a coarser level's blocks together, largest first, then by size; inside a block by number.

    labels (n,), each of `coarser` (n,) a coarsening of the one before.
    """
    keys: list[IntArray] = [np.arange(len(labels)), labels, -np.bincount(labels)[labels]]
    for own in coarser:
        keys += [own, -np.bincount(own)[own]]
    features = np.lexsort(keys)
    return features, labels[features][np.unique(_rank(labels[features]), return_index=True)[1]]


def _rank(ordered: IntArray) -> IntArray:
    """0, 1, … for runs of equal labels, (n,)."""
    return np.concatenate([[0], np.cumsum(np.diff(ordered) != 0)]).astype(np.int64)


def _cell_starts(sizes: IntArray, cells: int) -> tuple[IntArray, IntArray]:
    """Where each cell begins among the ordered features, and how many cells each block has: one a feature, or fewer so that all are about `cells`."""
    n = int(sizes.sum())
    many = sizes if n <= cells else np.clip(np.rint(sizes * cells / n), 1, sizes).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    within = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    return np.repeat(first, many) + within * np.repeat(sizes, many) // np.repeat(many, many), many


def mean_cells(matrix: FloatArray, starts: IntArray) -> FloatArray:
    """Means over cells of a symmetric matrix, (m, m); on the diagonal over pairs of different rows, NaN where there is one row alone."""
    n = np.diff([*starts, len(matrix)])
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    pairs = np.outer(n, n).astype(float)
    own = np.arange(len(starts))
    sums[own, own] -= np.add.reduceat(np.diag(matrix), starts)
    pairs[own, own] -= n
    return np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)


def correlation_figure(
    correlation: FloatArray, labels: IntArray, *, coarser: Sequence[IntArray] = (), features: Sequence[str] | None = None, cells: int = CELLS,
    title: str = "", subtitle: str = "",
) -> go.Figure:  # fmt: skip
    """Correlations (n, n) of a site's features in the order of their blocks (n,), whose squares are drawn; `coarser`: levels that hold them together.

    Of more features than `cells` neighbours inside a block are averaged, so that no cell mixes blocks; the hover text has each pair of blocks' mean
    over all its pairs of features. Of at most `FEW` features it has each pair of them, by the names `features`.
    """
    n = len(labels)
    order, blocks = block_order(labels, coarser)
    sizes = np.bincount(labels)[blocks]
    starts, many = _cell_starts(sizes, cells)
    ordered = correlation[np.ix_(order, order)]
    drawn = np.nan_to_num(mean_cells(ordered, starts), nan=1.0)  # a feature alone correlates with itself
    apart = np.abs(drawn[~np.eye(len(drawn), dtype=bool)])
    reach = float(np.clip(np.ceil(20 * np.quantile(apart, 0.98)) / 20, 0.05, 1.0)) if apart.size else 1.0
    edges = np.concatenate([[0], np.cumsum(many)]) - 0.5
    ticks = [-reach, -reach / 2, 0.0, reach / 2, reach]
    figure = go.Figure([
        go.Heatmap(  # bytes: a matrix of a thousand features stays small in a page
            z=np.rint(127 * np.clip(drawn / reach, -1, 1)).astype(np.int8), zmin=-127, zmax=127, colorscale=DIVERGING, hoverinfo="skip", name="cells",
            colorbar={
                "title": {"text": ("mean r" if n > cells else "r") + "<br> <br> ", "side": "top"}, "outlinewidth": 0, "thickness": 14,
                "tickvals": [127 * tick / reach for tick in ticks],
                "ticktext": [("≥ " if t == reach < 1 else "≤ " if t == -reach > -1 else "") + signed(t, ".3g") for t in ticks],
            },
        ),
        _pair_hovers(ordered, order, blocks, sizes, edges, features),
    ])  # fmt: skip
    said = "Squares: blocks" + (f", bold those of the coarser level ({int(coarser[-1].max()) + 1} blocks)." if coarser else ".")
    averaged = f"{n:,} features are drawn in {len(drawn)} × {len(drawn)} cells; a cell is the mean over pairs of different features of two blocks."
    notes = [said + f" Colours end at ±{reach:g}, which 2 % of the cells exceed.", averaged if n > cells else ""]
    style(figure, title, subtitle or f"{n:,} live features in {len(blocks)} blocks", 860, legend=False, notes=notes)
    shapes = [_square(low, high, 0.8 if len(blocks) <= 60 else 0.5, "#6b7580") for low, high in pairwise(edges)]
    for own in coarser[-1:]:
        ends = np.flatnonzero(np.diff(own[order][np.cumsum(sizes) - 1])) + 1
        bounds = edges[[0, *ends, len(blocks)]]
        shapes += [_square(low, high, 1.8, INK) for low, high in pairwise(bounds)]
    centre, each = (edges[:-1] + edges[1:]) / 2, features is not None and n <= FEW
    axis = {"showgrid": False, "ticks": "", "range": [-0.5, len(drawn) - 0.5]}
    for least, axes, title_text in ((0.033, figure.update_xaxes, "block"), (0.02, figure.update_yaxes, "")):
        shown = many >= least * len(drawn)
        axes(**axis, tickvals=centre[shown], ticktext=blocks[shown].astype(str), title_text="" if each else title_text)
    if each and features is not None:
        figure.update_yaxes(tickvals=list(range(n)), ticktext=[html.escape(readable(features[i], 24)) for i in order])
        figure.update_xaxes(showticklabels=False)
    figure.update_layout(shapes=shapes, width=1010, margin_l=96, margin_r=120)
    figure.update_yaxes(range=axis["range"][::-1], scaleanchor="x", constrain="domain", automargin=True)  # type: ignore[index]
    figure.update_xaxes(constrain="domain")
    return figure


def _pair_hovers(
    ordered: FloatArray, order: IntArray, blocks: IntArray, sizes: IntArray, edges: FloatArray, features: Sequence[str] | None
) -> go.Heatmap:
    """An invisible matrix that answers to the mouse: the means of pairs of blocks, or of few features each pair."""
    if features is not None and len(order) <= FEW:
        names = [html.escape(readable(features[i])) for i in order]
        text = [[f"{a}<br>{b}<br>r {signed(r, '.3f')}" for b, r in zip(names, row)] for a, row in zip(names, ordered)]
        return go.Heatmap(z=ordered, text=text, hoverinfo="text", opacity=0, showscale=False, name="pairs")
    means = mean_cells(ordered, np.cumsum(sizes) - sizes)
    grid = np.meshgrid(np.arange(len(blocks)), np.arange(len(blocks)))
    data = np.stack([blocks[grid[1]], blocks[grid[0]], sizes[grid[1]], sizes[grid[0]]], axis=-1)
    hover = "<b>block %{customdata[0]} and block %{customdata[1]}</b><br>%{customdata[2]} × %{customdata[3]} features<br>mean r %{z:.3f}"
    return go.Heatmap(
        z=np.round(means, 4), x=edges, y=edges, customdata=data.tolist(), hovertemplate=hover + "<extra></extra>", opacity=0, showscale=False,
        hoverongaps=False, name="pairs of blocks",
    )  # fmt: skip


def _square(low: float, high: float, width: float, colour: str) -> dict[str, object]:
    return {"type": "rect", "x0": low, "x1": high, "y0": low, "y1": high, "line": {"width": width, "color": colour}, "layer": "above"}


# --- the path of partitions -------------------------------------------------------------------------------------------

_MEASURES = {
    "description_length": ("description length<br>(nats; less is better)", "%{y:,.0f} nats"),
    "held_out": ("held-out likelihood<br>(nats a pair; more is better)", "%{y:.4f} nats a pair"),
    "stability": ("stability<br>(AMI between halves)", "AMI %{y:.3f}"),
}
_RULES = {
    "held-out likelihood": ("circle", "#d55e00"), "stability between halves": ("diamond", "#009e73"), "description length": ("square", "#5e4fa2"),
    "more blocks than heads": ("triangle-up", "#e69f00"), "number of blocks": ("star", "#cc79a7"),
}  # fmt: skip


def path_figure(scores: pl.DataFrame, kept: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """What is known of every level of the paths of partitions, a column for each site, a row for each quantity that was measured.

    `scores`: `site` and `PATH_SCORES`. `kept`: `site, rule, n_blocks, chosen`, the levels that are kept, each with the rules that name it.
    """
    sites = scores["site"].unique(maintain_order=True).to_list()
    measures = [name for name in _MEASURES if scores[name].drop_nulls().len()]
    chosen = dict(kept.filter("chosen").select("site", "n_blocks").iter_rows())
    n_columns, n_rows = max(len(sites), 1), max(len(measures), 1)
    figure = make_subplots(
        rows=n_rows, cols=n_columns, shared_xaxes=True, horizontal_spacing=0.2 / n_columns if n_columns > 1 else 0, vertical_spacing=0.045,
        column_titles=[f"{html.escape(site)}: {chosen[site]:,} blocks" if site in chosen else html.escape(site) for site in sites],
    )  # fmt: skip
    marked: set[str] = set()
    for column, site in enumerate(sites, 1):
        path = scores.filter(pl.col("site") == site).sort("n_blocks")
        for row, name in enumerate(measures, 1):
            for trace in [*_path_lines(path, name), *_path_marks(path, kept.filter(pl.col("site") == site), name, marked)]:
                figure.add_trace(trace, row=row, col=column)
            if site in chosen:
                figure.add_vline(x=chosen[site], line={"color": "#8c959f", "width": 1.2, "dash": "dot"}, layer="below", row=row, col=column)
    note = "Marks: the levels that are kept, by the rule that names them; dotted line: the one that is used."
    style(figure, title, subtitle, 237 + 200 * n_rows, notes=[note])
    figure.update_layout(legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 26 / (200 * n_rows), "yanchor": "bottom"}, margin_t=150)
    most = max([2, *scores["n_blocks"].drop_nulls()])
    span = [-0.08, float(np.log10(most)) + 0.12]
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= 10 ** span[1]]
    ticks = ticks if n_columns <= 2 else [t for t in ticks if str(t)[0] == "1"] if most >= 40 else [t for t in ticks if str(t)[0] in "15"]
    figure.update_xaxes(type="log", range=span, tickvals=ticks, ticktext=[f"{t:,}" for t in ticks])
    figure.update_yaxes(nticks=5)
    figure.update_xaxes(title_text="blocks", row=n_rows)
    for row, name in enumerate(measures, 1):
        figure.update_yaxes(title_text=_MEASURES[name][0], title_standoff=8, row=row, col=1)
        if name == "stability":
            figure.update_yaxes(range=[-0.03, 1.03], row=row)
    figure.update_yaxes(tickfont_size=11.5, exponentformat="SI")
    return figure


def _path_lines(path: pl.DataFrame, name: str) -> list[go.Scatter]:
    """A quantity along the path, over its band where it has one."""
    lines, low, high = [], f"{name}_low", f"{name}_high"
    if low in path.columns and (known := path.drop_nulls([low, high])).height:
        xs, ys = [*known["n_blocks"], *known["n_blocks"].reverse()], [*known[high], *known[low].reverse()]
        lines.append(go.Scatter(
            x=xs, y=ys, mode="lines", fill="toself", fillcolor=faded(RAISES, 0.16), line={"width": 0}, hoverinfo="skip", showlegend=False, name="band"
        ))  # fmt: skip
    hover = "%{x:,} blocks, the largest of %{customdata[0]:,}<br>" + _MEASURES[name][1] + "<extra></extra>"
    lines.append(go.Scatter(
        x=path["n_blocks"], y=path[name], mode="lines", line={"color": RAISES, "width": 1.8}, customdata=path.select("largest").rows(),
        hovertemplate=hover, showlegend=False, name=name,
    ))  # fmt: skip
    return lines


def _path_marks(path: pl.DataFrame, kept: pl.DataFrame, name: str, marked: set[str]) -> list[go.Scatter]:
    """A mark on each level that is kept, one for each of the rules that name it; `marked`: the rules that are in the legend already."""
    values = dict(path.select("n_blocks", name).iter_rows())
    marks = []
    for rules, n_blocks, chosen in kept.select("rule", "n_blocks", "chosen").iter_rows():
        for rule in rules.split(", "):  # the chosen level is named by the rule that chose it first
            symbol, colour = _RULES.get(rule, ("cross", INK))
            marker = {"symbol": symbol, "size": 13 if chosen else 10, "color": colour, "line": {"color": "white", "width": 1.2}}
            marks.append(go.Scatter(
                x=[n_blocks], y=[values.get(n_blocks)], mode="markers", marker=marker, name=html.escape(rule), legendgroup=rule,
                showlegend=rule not in marked, hovertemplate=f"<b>{html.escape(rules)}</b><br>%{{x:,}} blocks, {_MEASURES[name][1]}<extra></extra>",
            ))  # fmt: skip
            marked.add(rule)
    return marks


# --- two partitions of the same things ---------------------------------------------------------------------------------


_BAR = 0.02  # width of a group, of the distance between the two sides


def alluvial_figure(
    frame: pl.DataFrame, left_order: Sequence[str], right_order: Sequence[str], *, sides: tuple[str, str] = ("regions", "heads"),
    things: str = "features", title: str = "", subtitle: str = "",
) -> go.Figure:  # fmt: skip
    """Flows `left, right, n` between two partitions: a ribbon is as thick as the number of things that both have, coloured by its right end.

    A right group takes its ribbons in the order of the left ones, so that a thing's place to the right is by right group, then left group.
    Names stand beside groups that have room for them; the hover text has all.
    """
    rows = frame.filter(pl.col("n") > 0)
    left, right = (_stacked(rows, column, order) for column, order in (("left", left_order), ("right", right_order)))
    placed = _ribbon_ends(rows, left, right)
    colours = {name: _GROUPS[i % len(_GROUPS)] for i, name in enumerate(right_order)}
    height = int(np.clip(15 * max(len(left), len(right)) + 190, 480, 1500))
    figure = go.Figure([*_ribbons(placed, colours), *_group_bars(left, right, colours, sides, things), _ribbon_hovers(placed, things)])
    style(figure, title, subtitle, height, legend=False)
    pixels = (height - 150) / max(float(left["end"].max() or 1), 1.0)  # type: ignore[arg-type]
    labels = [*_group_names(left, pixels, "right", -0.02), *_group_names(right, pixels, "left", 1.02)]
    heads = [
        {"x": x, "y": 1, "xref": "x", "yref": "paper", "yanchor": "bottom", "yshift": 8, "text": f"<b>{html.escape(name)}</b>", "showarrow": False}
        for x, name in zip((0, 1), sides)
    ]
    figure.update_layout(annotations=[*labels, *heads], barmode="overlay", margin={"l": 24, "r": 24, "b": 24})
    figure.update_xaxes(visible=False, range=[-0.27, 1.27])
    figure.update_yaxes(visible=False, range=[1.01 * float(left["end"].max() or 1), -0.01 * float(left["end"].max() or 1)])  # type: ignore[arg-type]
    return figure


def _stacked(rows: pl.DataFrame, column: str, order: Sequence[str]) -> pl.DataFrame:
    """The groups of a side `name, n, begin, end`, from the top; the gaps of both sides together are three tenths of what flows."""
    counts = dict(rows.group_by(column).agg(pl.col("n").sum()).iter_rows())
    names = [name for name in order if name in counts]
    n = np.array([counts[name] for name in names], dtype=float)
    gap = 0.3 * n.sum() / max(len(n) - 1, 1)
    begin = np.cumsum(n) - n + gap * np.arange(len(n)) + (0.15 * n.sum() if len(n) == 1 else 0)
    return pl.DataFrame({"name": names, "n": n, "begin": begin, "end": begin + n}, schema_overrides={"name": pl.String})


def _ribbon_ends(rows: pl.DataFrame, left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """`rows` with `y0`, `y1`: where each ribbon's upper edge leaves and enters."""
    for side, frame, place in (("left", left, "y0"), ("right", right, "y1")):
        rank = {name: i for i, name in enumerate(frame["name"])}
        at = dict(frame.select("name", "begin").iter_rows())
        rows = rows.with_columns(
            pl.col(side).replace_strict(rank, return_dtype=pl.Int64).alias(f"{side}_rank"),
            pl.col(side).replace_strict(at, return_dtype=pl.Float64).alias(place),
        )
    rows = rows.sort("left_rank", "right_rank").with_columns(pl.col("y0") + pl.col("n").cum_sum().over("left") - pl.col("n"))
    return rows.sort("right_rank", "left_rank").with_columns(pl.col("y1") + pl.col("n").cum_sum().over("right") - pl.col("n"))


def _ribbons(placed: pl.DataFrame, colours: Mapping[str, str]) -> list[go.Scatter]:
    """One trace for each right group."""
    traces = []
    for (group,), rows in placed.group_by(["right"], maintain_order=True):
        ends = {"y0": pl.lit(_BAR / 2), "y1": pl.lit(1 - _BAR / 2)}
        y, x = curves(rows.select(pl.col("y0").alias("x0"), pl.col("y1").alias("x1"), **ends))  # an upright edge on its side
        n = rows["n"].to_numpy()[:, None]
        outline_x = np.hstack([x[:, :-1], x[:, -2::-1], x[:, -1:]])
        outline_y = np.hstack([y[:, :-1], y[:, -2::-1] + n, y[:, -1:]])
        traces.append(go.Scatter(
            x=outline_x.ravel(), y=outline_y.ravel(), mode="lines", fill="toself", fillcolor=faded(colours[str(group)], 0.42),
            line={"width": 0.4, "color": faded(colours[str(group)], 0.7)}, hoverinfo="skip", name=str(group), showlegend=False,
        ))  # fmt: skip
    return traces


def _group_bars(left: pl.DataFrame, right: pl.DataFrame, colours: Mapping[str, str], sides: tuple[str, str], things: str) -> list[go.Bar]:
    """The groups as upright bars at either end."""
    bars = []
    for x, frame, side in ((0.0, left, sides[0]), (1.0, right, sides[1])):
        colour = [colours[name] if x else SOFT for name in frame["name"]]
        bars.append(go.Bar(
            x=[x] * frame.height, y=frame["n"], base=frame["begin"], width=_BAR, marker={"color": colour, "line": {"width": 0}}, name=side,
            customdata=[html.escape(f"{name}: {n:,.0f} {things}") for name, n in frame.select("name", "n").iter_rows()],
            hovertemplate="%{customdata}<extra></extra>",
        ))  # fmt: skip
    return bars


def _ribbon_hovers(placed: pl.DataFrame, things: str) -> go.Scatter:
    """Invisible points in the middle of each ribbon and near its ends that answer to the mouse."""
    xs, ys, texts = [], [], []
    for left, right, n, y0, y1 in placed.select("left", "right", "n", "y0", "y1").iter_rows():
        text = f"<b>{html.escape(left)} → {html.escape(right)}</b><br>{n:,} {html.escape(things)}"
        for t in (0.06, 0.5, 0.94):
            xs.append(t)
            ys.append(y0 + n / 2 + (y1 - y0) * (3 * t**2 - 2 * t**3))
            texts.append(text)
    return go.Scatter(x=xs, y=ys, mode="markers", marker={"size": 9, "opacity": 0}, text=texts, hoverinfo="text", showlegend=False, name="flows")


def _group_names(frame: pl.DataFrame, pixels: float, anchor: str, x: float) -> list[dict[str, object]]:
    """Names beside the groups of a side, the greatest first, where they do not run into one another."""
    taken: list[float] = []
    found = []
    for name, n, begin, end in frame.sort("n", descending=True).select("name", "n", "begin", "end").iter_rows():
        y = (begin + end) / 2
        if all(abs(y - other) * pixels >= 13 for other in taken):
            taken.append(y)
            text = f"{html.escape(readable(name, 40))} <span style='color:{SOFT}'>{n:,.0f}</span>"
            found.append({"x": x, "y": y, "text": text, "showarrow": False, "xanchor": anchor, "font": {"size": 12}})
    return found


def likeness_figure(blocks: pl.DataFrame, sites: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """Mean correlation against mean decoder cosine inside each block: are blocks merely sets of features that write alike?

    `blocks`, `sites`: rows of `regions.BLOCKS` and `SITES` of one level of each site. Hollow squares: the means across blocks.
    """
    names = [site for site in sites["site"].to_list() if blocks.filter(pl.col("site") == site)["mean_cosine"].drop_nulls().len()]
    known = sites.filter(pl.col("site").is_in(names))
    number = lambda value: "undefined" if value is None else signed(value)
    figure = make_subplots(
        cols=max(len(names), 1), shared_yaxes=True, shared_xaxes="all", horizontal_spacing=0.025,
        column_titles=[
            f"{html.escape(site)}<br><span style='font-size:12.5px'>rank corr. {number(rank)} · AMI {number(agreed)}</span>"
            for site, rank, agreed in known.select("site", "rank_correlation", "cosine_ami").iter_rows()
        ],
    )  # fmt: skip
    for column, site in enumerate(names, 1):
        own = blocks.filter(pl.col("site") == site).drop_nulls(["mean_correlation", "mean_cosine"])
        size = 5 + 2.2 * np.sqrt(own["size"].to_numpy())
        text = [html.escape(readable(label or "", 60)) for label in own.select(pl.coalesce("label", "automatic_label")).to_series()]
        data = own.select("block", "size").rows()
        hover = f"<b>{html.escape(site)}/%{{customdata[0]}}</b> %{{text}}<br>%{{customdata[1]:,}} features"
        hover += "<br>mean r %{y:.3f}, mean cosine %{x:.3f}"
        marker = {"size": size, "color": RAISES, "opacity": 0.6, "line": {"color": "white", "width": 0.8}}
        inside = go.Scatter(
            x=own["mean_cosine"], y=own["mean_correlation"], mode="markers", marker=marker, text=text, customdata=data, name="inside a block",
            hovertemplate=hover + "<extra></extra>", legendgroup="inside",
        )  # fmt: skip
        across = known.filter(pl.col("site") == site)
        hollow = {"size": 12, "symbol": "square-open", "color": LOWERS, "line": {"width": 2.2}}
        outside = go.Scatter(
            x=across["mean_cosine_outside"], y=across["mean_correlation_outside"], mode="markers", marker=hollow, name="across blocks",
            hovertemplate="across blocks<br>mean r %{y:.3f}, mean cosine %{x:.3f}<extra></extra>", legendgroup="across",
        )  # fmt: skip
        figure.add_traces([inside, outside], rows=[1, 1], cols=[column, column])
    legend_once(figure)
    note = "Rank corr.: of correlation and cosine over pairs of features. AMI: with as many clusters of decoder rows (0 by chance, 1 the same)."
    style(figure, title, subtitle, 480, notes=[note])
    figure.update_layout(margin_t=136)
    figure.update_xaxes(title_text="mean cosine", zeroline=True, zerolinecolor=SOFT, zerolinewidth=1, nticks=5)
    figure.update_yaxes(zeroline=True, zerolinecolor=SOFT, zerolinewidth=1)
    figure.update_yaxes(title_text="mean correlation", row=1, col=1)
    return figure


# --- which block breaks which task ------------------------------------------------------------------------------------


def removal_order(rows: pl.DataFrame) -> list[str]:
    """What was removed, by the task that it breaks most, then by how much, the greatest first; what breaks nothing that is defined comes last."""
    known = rows.with_columns(pl.col("value").abs().alias("_size")).sort("_size", descending=True, nulls_last=True)
    first = known.unique("removed", keep="first", maintain_order=True)
    return first.sort(["task", "_size"], descending=[False, True], nulls_last=True)["removed"].to_list()


def task_block_figure(
    matrix: pl.DataFrame, *, own: str = REGIONS, names: Mapping[str, str] | None = None, title: str = "", subtitle: str = ""
) -> go.Figure:
    """What share of its effect each task loses without each block: rows of `region_study.MATRIX`.

    To the left the blocks of `own`, by the task that they break most; bold where the interval leaves out 0. To the right every block of every
    partition, as strips with boxes: the random blocks are of the same sizes. `names`: what a unit is called in place of its name.
    """
    rows = matrix.filter(pl.col("method") == own)
    tasks, removed = rows["task"].unique().sort().to_list(), removal_order(rows)
    room = 0.03 + 0.0068 * max((len(task) for task in tasks), default=0)
    titles = [f"{own}, one at a time: share lost", "beside other partitions"]
    figure = make_subplots(cols=2, column_widths=[0.64, 0.36], horizontal_spacing=min(room, 0.3), column_titles=titles)
    figure.add_trace(_loss_cells(rows, tasks, removed, names or {}), row=1, col=1)
    methods = _partitions(matrix)
    for method in methods:
        figure.add_trace(_loss_strips(matrix.filter(pl.col("method") == method), method), row=1, col=2)
    figure.add_vline(x=0, line={"color": INK, "width": 1.2}, layer="below", row=1, col=2)
    beyond = int((rows["value"].abs() > 1).sum())
    note = "Bold: the 95 % interval leaves out 0. Below 0 the task does better without the block."
    notes = [note, f"{beyond} cells lie beyond ±1: the colour ends there." if beyond else ""]
    style(figure, title, subtitle or stated(matrix.drop("task")), max(430, 250 + 25 * len(removed)), notes=notes)
    figure.update_layout(boxmode="group", boxgap=0.25, boxgroupgap=0.15, margin_t=140, plot_bgcolor="white")
    above = 1 + 30 / (figure.layout.height - 140 - figure.layout.margin.b)
    figure.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": above, "yanchor": "bottom"})
    figure.update_xaxes(side="bottom", showgrid=False, showline=False, ticks="", tickfont_size=13.5, row=1, col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, showline=False, automargin=True, ticksuffix="  ", tickfont_size=12.5, row=1, col=1)
    figure.update_xaxes(title_text="share of the task's effect that is lost", tickformat=".0%", row=1, col=2)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[html.escape(t) for t in tasks], showgrid=False, row=1, col=2)
    return figure


def _loss_cells(rows: pl.DataFrame, tasks: Sequence[str], removed: Sequence[str], names: Mapping[str, str]) -> go.Heatmap:
    """The task × block heat map; a null is left white."""
    cells = {(part, task): tuple(rest) for part, task, *rest in rows.select("removed", "task", "value", "low", "high", "lost", "n").iter_rows()}
    empty = (None,) * 5
    grid = [[cells.get((part, task), empty) for task in tasks] for part in removed]
    sizes = dict(rows.select("removed", "n_features").iter_rows())
    values = rows["value"].drop_nulls().abs()
    reach = float(np.clip(values.max() or 0.0, 0.05, 1.0)) if values.len() else 1.0  # type: ignore[arg-type]
    labels = [f"{html.escape(readable(names.get(part, part), 34))} <span style='color:{SOFT}'>({sizes[part]:,})</span>" for part in removed]
    return go.Heatmap(
        z=[[value for value, *_ in row] for row in grid], x=[html.escape(task) for task in tasks], y=labels, zmin=-reach, zmax=reach, xgap=2, ygap=2,
        colorscale=DIVERGING, hoverongaps=False, texttemplate="%{text}", textfont={"size": 12}, name="lost",
        text=[[_loss_text(*cell[:3], wide=len(tasks) <= 3) for cell in row] for row in grid],
        customdata=[[_loss_hover(names.get(part, part), sizes[part], *cell) for cell in row] for part, row in zip(removed, grid)],
        hovertemplate="%{customdata}<br>task %{x}<extra></extra>", showscale=False,
    )  # fmt: skip


def _loss_text(value: float | None, low: float | None, high: float | None, *, wide: bool) -> str:
    if value is None:
        return "–"
    decided = low is not None and high is not None and (low > 0 or high < 0)
    interval = f" <span style='font-size:10.5px'>({signed(low)} … {signed(high)})</span>" if wide and low is not None and high is not None else ""
    return (f"<b>{signed(value)}</b>" if decided else signed(value)) + interval


def _loss_hover(
    name: str, size: int, value: float | None, low: float | None, high: float | None, lost: float | None, n: int | None
) -> str:
    interval = "" if low is None or high is None else f"<br>95 %: {signed(low, '.3f')} … {signed(high, '.3f')}"
    metric = "" if lost is None else f"<br>{signed(lost, '.3g')} in the metric's units"
    what = f"<b>{html.escape(name)}</b>, {size:,} live features"
    share = "undefined" if value is None else signed(value, ".3f")
    return f"{what}<br>lost {share}{interval}{metric}" + ("" if n is None else f"<br>{n:,} sequences")


def _loss_strips(rows: pl.DataFrame, method: str) -> go.Box:
    """Every block of a partition as a dot, by task."""
    pen, known = partition_pen(method), rows.drop_nulls("value")
    return go.Box(
        x=known["value"], y=[html.escape(task) for task in known["task"]], orientation="h", name=html.escape(method), boxpoints="all",
        jitter=0.6, pointpos=0, marker={"color": pen.colour, "size": 4.5, "opacity": 0.55}, line={"width": 1.2, "color": pen.colour},
        fillcolor=faded(pen.colour, 0.1), text=[html.escape(part) for part in known["removed"]], hoveron="points",
        hovertemplate="%{text}<br>%{x:.3f} of %{y}<extra></extra>",
    )  # fmt: skip


# --- keeping and cutting by share ---------------------------------------------------------------------------------------

_TESTS = {
    ("node", CIRCUIT): "only the strongest units alive", ("node", COMPLEMENT): "the strongest units cut: what is left",
    ("edge", CIRCUIT): "only the strongest edges between units", ("edge", COMPLEMENT): "without the edges of those circuits",
}  # fmt: skip


def sweep_figure(table: pl.DataFrame, *, metric: str | None = None, title: str = "", averaging: Averaging = Averaging.RATIO_OF_MEANS) -> go.Figure:
    """φ against the share of live features (node ablation), and of edges between units (edge ablation), kept in order of attribution.

    `table`: rows of `faithfulness` of one baseline, split and task with `share, n_units, n_features, n_edges`; buttons change the metric, the
    first of which is `metric`. The share of features is what whole units come to, which is more than was asked for where units are large.
    """
    rows = table.filter(pl.col("averaging") == averaging.value)
    metrics = sorted(rows["metric"].unique(maintain_order=True).to_list(), key=lambda name: name != metric)
    panels = [key for key in _TESTS if rows.filter((pl.col("ablation") == key[0]) & (pl.col("part") == key[1])).height]
    n_rows = max(1, len({ablation for ablation, _ in panels}))
    gaps = {"horizontal_spacing": 0.04, "vertical_spacing": 0.17}
    figure = make_subplots(rows=n_rows, cols=2, shared_yaxes=True, subplot_titles=[_TESTS[key] for key in panels], **gaps)
    of_metric: list[str] = []
    for shown in metrics:
        for place, (ablation, part) in enumerate(panels):
            here = rows.filter((pl.col("metric") == shown) & (pl.col("ablation") == ablation) & (pl.col("part") == part))
            for method in reversed(_partitions(rows)):
                for trace in _sweep_lines(here.filter(pl.col("method") == method), ablation):
                    trace.visible = shown == metrics[0]
                    figure.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
                    of_metric.append(shown)
    for shown in metrics:
        seen: set[str] = set()
        own = [trace for trace, name in zip(figure.data, of_metric) if name == shown and trace.showlegend is not False]
        for trace in reversed(own):
            trace.showlegend = trace.legendgroup not in seen
            seen.add(trace.legendgroup)
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": SOFT, "width": 1}, layer="below")
    notes = ["Shaded: 95 % intervals over sequences; draws are pooled. Error nodes, and a site's dead features, are units without live features."]
    style(figure, title, stated(rows.drop("metric")), 200 + 320 * n_rows, notes=notes)
    figure.update_layout(margin_t=136, legend_traceorder="reversed")
    figure.update_yaxes(range=_range(rows, metrics[0]) if metrics else None)
    figure.update_yaxes(title_text="φ", col=1)
    for place, (ablation, _) in enumerate(panels):
        figure.update_xaxes(
            type="log", tickvals=_SHARE_TICKS, ticktext=[f"{100 * t:g}%" for t in _SHARE_TICKS], row=place // 2 + 1, col=place % 2 + 1,
            title_text="share of the live features" if ablation == "node" else "share of the edges between units",
        )  # fmt: skip
    if len(metrics) > 1:
        axes = ["yaxis" if i == 0 else f"yaxis{i + 1}" for i in range(2 * n_rows)]
        add_buttons(figure, [
            {"label": shown.replace("_", " "), "method": "update",
             "args": [{"visible": [name == shown for name in of_metric]}, {f"{axis}.range": _range(rows, shown) for axis in axes}]}
            for shown in metrics
        ])  # fmt: skip
    return figure


_SHARE_TICKS = [factor * 10.0**power for power in range(-5, 0) for factor in (1, 3)] + [1.0]


def _range(rows: pl.DataFrame, metric: str) -> list[float]:
    """An axis that shows 0, 1 and every value, from −1 to 2 at most."""
    values = rows.filter(pl.col("metric") == metric)["value"].drop_nulls()
    low, high = (float(values.min()), float(values.max())) if values.len() else (0.0, 1.0)  # type: ignore[arg-type]
    return [max(min(0.0, low), -1.0) - 0.06, min(max(1.0, high), 2.0) + 0.06]


def _sweep_lines(rows: pl.DataFrame, ablation: str) -> list[go.Scatter]:
    """A partition's line over its interval."""
    if rows.is_empty():
        return []
    total = float((rows["size"] / rows["share"]).max() or 1.0)  # type: ignore[arg-type]
    held = pl.col("n_features") / total if ablation == "node" else pl.col("share")
    rows = rows.with_columns(held.alias("held")).filter(pl.col("held") > 0).sort("held")
    method, pen, band = str(rows["method"][0]), partition_pen(str(rows["method"][0])), rows.drop_nulls(["value", "low", "high"])
    lines = []
    if band.height:
        xs, ys = [*band["held"], *band["held"].reverse()], [*band["high"], *band["low"].reverse()]
        lines.append(go.Scatter(
            x=xs, y=ys, mode="lines", fill="toself", fillcolor=faded(pen.colour, 0.12), line={"width": 0}, hoverinfo="skip", showlegend=False,
            legendgroup=method, name=f"{method} band",
        ))  # fmt: skip
    hover = f"<b>{html.escape(method)}</b><br>φ %{{y:.3f}}, 95 %: %{{customdata[0]:.3f}} … %{{customdata[1]:.3f}}<br>"
    hover += "%{customdata[2]:,.0f} units, %{customdata[3]:,.0f} live features" + (", %{customdata[4]:,.0f} edges" if ablation == "edge" else "")
    hover += "<br>%{customdata[5]:.1%} asked for<br>%{customdata[6]} sequences<extra></extra>"
    data = rows.select("low", "high", "n_units", "n_features", "n_edges", "share", "n").rows()
    named = {"name": html.escape(method), "legendgroup": method, "hovertemplate": hover}
    return [*lines, go.Scatter(x=rows["held"], y=rows["value"], customdata=data, **named, **pen_marks(pen))]


# --- selectivity --------------------------------------------------------------------------------------------------------

_SELECTIVITY = {
    "value": ("selectivity", "low", "high"), "difference": ("selectivity minus the regions'", "difference_low", "difference_high"),
    "impact": ("mean loss of a block's own task", "impact_low", "impact_high"),
}  # fmt: skip


def selectivity_figure(table: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """Rows of `region_study.SELECTIVITY`: each partition's selectivity, the difference from the first one's, and the mean loss, with intervals."""
    methods = [table["method"][0], *(name for name in _partitions(table) if name != table["method"][0])]
    rows = pl.DataFrame({"method": methods}).join(table, on="method", maintain_order="left")
    figure = make_subplots(cols=3, shared_yaxes=True, horizontal_spacing=0.05, column_titles=[name for name, _, _ in _SELECTIVITY.values()])
    for column, (name, (_, low, high)) in enumerate(_SELECTIVITY.items(), 1):
        shown = rows.with_row_index("at").filter(pl.col("method") != methods[0]) if name == "difference" else rows.with_row_index("at")
        shown = shown.drop_nulls(name)  # where blocks break nothing that is told from noise
        bars = {"type": "data", "symmetric": False, "array": shown[high] - shown[name], "arrayminus": shown[name] - shown[low]}
        pens = [partition_pen(methods[i]) for i in shown["at"]]
        hover = "<b>%{customdata[0]}</b>, %{customdata[3]} blocks<br>%{x:.3f}, 95 %: %{customdata[1]:.3f} … %{customdata[2]:.3f}<extra></extra>"
        marks = go.Scatter(
            x=shown[name], y=shown["at"], mode="markers+text", text=[f"<b>{signed(value)}</b>" for value in shown[name]], textposition="top center",
            error_x=bars | {"color": "#8c959f", "thickness": 1.6, "width": 5}, name=name, cliponaxis=False, hovertemplate=hover,
            marker={"size": 11, "color": [pen.colour for pen in pens], "symbol": [pen.symbol for pen in pens]},
            customdata=shown.select(pl.col("method").map_elements(html.escape, pl.String), low, high, "n_blocks").rows(),
        )  # fmt: skip
        figure.add_trace(marks, row=1, col=column)
        ends = [0.0, *(end for column_of in (low, high, name) for end in shown[column_of].drop_nulls())]
        pad = 0.07 * (max(ends) - min(ends) or 1.0)
        figure.update_xaxes(range=[min(ends) - pad, max(ends) + pad], row=1, col=column)
        figure.add_vline(x=0, line={"color": INK, "width": 1.2}, layer="below", row=1, col=column)
    style(figure, title, subtitle, 230 + 62 * len(methods), legend=False)
    figure.update_yaxes(
        tickvals=list(range(len(methods))), range=[len(methods) - 0.5, -0.7], automargin=True, showgrid=False,
        ticktext=[f"{html.escape(m)} <span style='color:{SOFT}'>({n})</span>" for m, n in zip(methods, rows["n_blocks"])],
    )  # fmt: skip
    figure.update_layout(margin_b=50)
    return figure


# --- what blocks drive ---------------------------------------------------------------------------------------------------


def drives_figure(drives: pl.DataFrame, nodes: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """The strongest edges between units, the input at the bottom, beside what cutting each costs.

    `drives`: `source, target, weight, strength, per_member, effect, low, high, n` as `region_study.drive_table` gives them. `nodes`: `name, label,
    site, n_features` of all units, sites from the input up.
    """
    used = nodes.filter(pl.col("name").is_in([*drives["source"], *drives["target"]]))
    sites = used["site"].unique(maintain_order=True).to_list()
    row = np.array([sites.index(site) for site in used["site"]], dtype=np.int64)
    place = {name: i for i, name in enumerate(used["name"])}
    source, target = (np.array([place[name] for name in drives[end]], dtype=np.int64) for end in ("source", "target"))
    x, y = uncrossed(row, source, target, drives["strength"].to_numpy()), row.astype(float)
    figure = make_subplots(
        cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.09, column_titles=["what drives what", f"attribution and effect: {_rank_text(drives)}"]
    )
    ends = drives.with_columns(pl.Series("x0", x[source]), pl.Series("y0", y[source]), pl.Series("x1", x[target]), pl.Series("y1", y[target]))
    labels = dict(used.select("name", "label").iter_rows())
    text = [_drive_hover(one, labels) for one in drives.iter_rows(named=True)]
    for trace in (*_drive_lines(ends), _drive_points(ends, text), _unit_marks(used, x, y)):
        figure.add_trace(trace, row=1, col=1)
    note = "An edge is as wide as the root of its attribution's size; a circle's area is its number of live features. Grey: units without any."
    style(figure, title, subtitle, 210 + 104 * max(len(sites), 3), notes=[note])
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.02, "yanchor": "top"}, margin_t=130, margin_b=110)
    for under in _unit_names(used, x, y):
        figure.add_annotation(**under, row=1, col=1)
    figure.update_xaxes(visible=False, range=[-0.08, 1.08], row=1, col=1)
    levels = {"tickvals": list(range(len(sites))), "ticktext": [html.escape(site) for site in sites], "range": [-0.6, len(sites) - 0.5]}
    figure.update_yaxes(**levels, showline=False, row=1, col=1)
    _add_effects(figure, drives, text)
    return figure


def _rank_text(drives: pl.DataFrame) -> str:
    rank = drives.select(pl.corr("weight", "effect", method="spearman")).item() if drives.height > 2 else None
    return f"rank correlation {'undefined' if rank is None or np.isnan(rank) else signed(rank)} over {drives.height} edges"


def _drive_hover(one: Mapping[str, object], labels: Mapping[str, str]) -> str:
    name = lambda key: html.escape(readable(labels.get(str(one[key]), str(one[key])), 60))
    known = one["low"] is not None and one["high"] is not None
    interval = f" (95 %: {signed(one['low'], '+.3g')} … {signed(one['high'], '+.3g')})" if known else ""  # type: ignore[arg-type]
    effect = "undefined" if one["effect"] is None else signed(one["effect"], "+.3g") + interval  # type: ignore[arg-type]
    attributed = f"attribution {signed(one['weight'], '+.3g')}, {signed(one['per_member'], '+.2e')} per pair of members"  # type: ignore[arg-type]
    return f"<b>{name('source')} → {name('target')}</b><br>{attributed}<br>measured effect {effect}<br>{one['n']} sequences"


def _drive_lines(ends: pl.DataFrame) -> list[go.Scatter]:
    """The edges, weak ones first; then the legend's two."""
    if ends.is_empty():
        return []
    xs, ys = curves(ends)
    classes, positive = width_classes(ends["weight"].abs().to_numpy() + 1e-300), ends["weight"].to_numpy() >= 0
    signs, lines = ((True, RAISES, "raises the metric"), (False, LOWERS, "lowers the metric")), []
    for step in range(WIDTH_CLASSES):
        for sign, colour, name in signs:
            chosen = (classes == step) & (positive == sign)
            if chosen.any():
                pen = {"color": colour, "width": line_width(step)}
                lines.append(go.Scatter(
                    x=xs[chosen].ravel(), y=ys[chosen].ravel(), mode="lines", line=pen, opacity=0.4 + 0.4 * step / WIDTH_CLASSES, hoverinfo="skip",
                    showlegend=False, name=name,
                ))  # fmt: skip
    for sign, colour, name in signs:
        if (positive == sign).any():
            lines.append(go.Scatter(x=[None], y=[None], mode="lines", line={"color": colour, "width": 4}, name=name, hoverinfo="skip"))
    return lines


def _drive_points(ends: pl.DataFrame, text: Sequence[str]) -> go.Scatter:
    """Invisible points in the middle of each edge that answer to the mouse."""
    x, y = (ends["x0"] + ends["x1"]) / 2, (ends["y0"] + ends["y1"]) / 2
    return go.Scatter(x=x, y=y, mode="markers", marker={"size": 9, "opacity": 0}, text=text, hoverinfo="text", showlegend=False, name="edges")


def _unit_marks(used: pl.DataFrame, x: FloatArray, y: FloatArray) -> go.Scatter:
    n = used["n_features"].to_numpy()
    size = 9 + 29 * np.sqrt(n / max(float(n.max(initial=1)), 1.0))
    marker = {"size": size, "color": np.where(n > 0, "#3b7d6e", "#a9a9a9"), "line": {"color": "white", "width": 1.2}, "opacity": 1}
    rows = used.select("label", "site", "n_features").iter_rows()
    text = [f"<b>{html.escape(readable(label, 70))}</b><br>{html.escape(site)}, {count:,} live features" for label, site, count in rows]
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, text=text, hoverinfo="text", showlegend=False, name="units")


def _unit_names(used: pl.DataFrame, x: FloatArray, y: FloatArray) -> list[dict[str, object]]:
    """Names under the units, as many characters as fit between neighbours of a row; the site is on the axis."""
    found = []
    for (site,), rows in used.with_columns(pl.Series("x", x), pl.Series("y", y)).group_by(["site"], maintain_order=True):
        at = rows["x"].sort().to_numpy()
        room = float(np.diff(at).min()) * 560 / 6.4 if len(at) > 1 else 40.0
        for label, px, py, n in rows.select("label", "x", "y", "n_features").iter_rows():
            text = readable(str(label).removeprefix(f"{site}/"), int(np.clip(room, 5, 30)))
            found.append({"x": px, "y": py, "text": html.escape(text), "showarrow": False, "yshift": -(14 + (10 if n else 0)), "font": {"size": 11},
                          "bgcolor": "rgba(255,255,255,0.7)", "borderpad": 0})  # fmt: skip
    return found


def _add_effects(figure: go.Figure, drives: pl.DataFrame, text: Sequence[str]) -> None:
    """Attribution against measured effect, both axes on a symmetric logarithm, in the right panel."""
    ends = (pl.col(name).abs().fill_null(0.0) for name in ("weight", "effect", "low", "high"))
    largest = float(drives.select(pl.max_horizontal(*ends).max()).item() or 1.0)
    scale = SymmetricLog(largest / 1000, largest)
    place = lambda name: scale.place(drives[name].cast(pl.Float64).to_numpy())
    bars = {"type": "data", "symmetric": False, "array": place("high") - place("effect"), "arrayminus": place("effect") - place("low")}
    colours = [RAISES if weight >= 0 else LOWERS for weight in drives["weight"]]
    marker = {"size": 8, "color": colours, "opacity": 0.8, "line": {"color": "white", "width": 0.6}}
    dots = go.Scatter(
        x=place("weight"), y=place("effect"), mode="markers", marker=marker, text=text, hoverinfo="text", showlegend=False, name="effects",
        error_y=bars | {"thickness": 1, "width": 2, "color": "#afb8c1"},
    )  # fmt: skip
    figure.add_trace(dots, row=1, col=2)
    low, high = (scale.place(np.array([side])).item() for side in (-1.15 * largest, 1.15 * largest))
    figure.add_shape(type="line", x0=low, x1=high, y0=low, y1=high, line={"color": SOFT, "width": 1, "dash": "dash"}, layer="below", row=1, col=2)
    ticks = scale.layout()
    every = list(zip(ticks["tickvals"], ticks["ticktext"]))  # type: ignore[call-overload]
    few = every if len(every) <= 7 else [pair for i, pair in enumerate(every) if (i - len(every) // 2) % 2 == 0]
    shown = {"tickmode": "array", "tickvals": [v for v, _ in few], "ticktext": [t for _, t in few], "range": [low, high]}
    figure.update_xaxes(title_text="attribution (symmetric logarithm)", row=1, col=2, **shown)
    figure.update_yaxes(title_text="effect of cutting it alone", row=1, col=2, **shown)
