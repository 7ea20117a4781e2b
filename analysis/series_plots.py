"""Figures of a series of models: what changes over steps or sizes. Functions from frames to plotly figures.

All are panels of lines over the series' axis: `lines_figure`. Where the places on it span more than a factor of `SPAN` the axis is logarithmic,
with 0, which has no logarithm, one doubling to the left of the least.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from .plots import Pen, faded, legend_once, style

SPAN = 20.0
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5e4fa2", "#8c6d31")
_DASHES, _SYMBOLS = ("solid", "dash", "dashdot"), ("circle", "diamond", "square")
NULL = "#8c959f"


@dataclass(frozen=True)
class Panel:
    """Some lines over the axis. frame: `x`, `line` (its name), `value`, and where they are known `name` (of the model), `low`, `high` (an interval),
    `null`, `null_low`, `null_high` (what chance gives). limits: of the vertical axis. log: whether it is logarithmic.
    """

    title: str
    frame: pl.DataFrame
    unit: str = ""
    limits: tuple[float, float] | None = None
    log: bool = False


@dataclass(frozen=True)
class Axis:
    """Places along the series: `at` gives where x is drawn; ticks are (where, what is written)."""

    title: str
    where: Mapping[float, float]
    ticks: tuple[tuple[float, str], ...]


def axis_of(places: Sequence[float], title: str) -> Axis:
    """A linear axis, or a logarithmic one where the places above 0 span more than `SPAN`."""
    known = sorted(set(places))
    above = [x for x in known if x > 0]
    if len(above) < 2 or above[-1] / above[0] <= SPAN or known[0] < 0:
        return Axis(title, {x: x for x in known}, tuple((x, written(x)) for x in known))
    where = {x: math.log2(x) if x > 0 else math.log2(above[0]) - 1 for x in known}
    return Axis(f"{title} (logarithmic)", where, tuple((where[x], written(x)) for x in known))


def written(x: float) -> str:
    """A place as it is written: 3000 as it is, 20000 as 20k, 135e6 as 135M."""
    if abs(x) < 10_000:
        return f"{x:g}"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit:
            return f"{x / unit:.3g}{name}"
    return f"{x:g}"


def lines_figure(panels: Sequence[Panel], *, axis: str, title: str, subtitle: str = "", notes: Sequence[str] = (), columns: int = 2) -> go.Figure:
    """Panels of lines over the series. A line of one name has one colour in all of them; intervals are bands, chance is dotted in the same colour."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=[panel.title for panel in panels], horizontal_spacing=0.09, vertical_spacing=min(0.16, 0.5 / rows)
    )
    places = axis_of([x for panel in panels for x in panel.frame["x"].to_list()], axis)
    names = list(dict.fromkeys(name for panel in panels for name in panel.frame["line"].unique(maintain_order=True)))
    for i, panel in enumerate(panels):
        row, column = i // columns + 1, i % columns + 1
        for name in names:
            rows_of = panel.frame.filter(pl.col("line") == name).sort("x")
            for trace in _traces(rows_of, name, pen_of(names.index(name)), places) if rows_of.height else ():
                figure.add_trace(trace, row=row, col=column)
        figure.update_yaxes(title_text=panel.unit, type="log" if panel.log else "linear", row=row, col=column)
        if panel.limits is not None and not panel.log:
            figure.update_yaxes(range=list(panel.limits), row=row, col=column)
    legend_once(figure)
    for rank, trace in enumerate(figure.data):
        trace.legendrank = rank
    style(figure, title, subtitle, 150 + 330 * rows, notes=notes, legend=len(names) > 1)
    at, text = zip(*_thinned(places.ticks), strict=True)
    figure.update_xaxes(tickvals=list(at), ticktext=list(text), title_text=places.title, tickangle=0, tickfont_size=11.5)
    return figure


def pen_of(number: int) -> Pen:
    """The line of the number-th name."""
    return Pen(COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % 3], _SYMBOLS[number // len(COLOURS) % 3], 2.4)


def _thinned(ticks: Sequence[tuple[float, str]], most: int = 7) -> Sequence[tuple[float, str]]:
    """The ticks, those left out that would stand too close to the one before: the axis holds about `most`."""
    least = (ticks[-1][0] - ticks[0][0]) / most
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or tick[0] - kept[-1][0] >= least:
            kept.append(tick)
    return kept


def _traces(rows: pl.DataFrame, name: str, pen: Pen, places: Axis) -> list[go.Scatter]:
    """One line with its interval and what chance gives."""
    x = [places.where[value] for value in rows["x"].to_list()]
    shown = html.escape(name)
    shared = {"legendgroup": name, "name": shown}
    traces = []
    for low, high, colour, opacity in (("null_low", "null_high", NULL, 0.10), ("low", "high", pen.colour, 0.16)):
        if _known(rows, low) and _known(rows, high):
            known = rows.with_columns(pl.Series("at", x)).drop_nulls([low, high])
            band = {"x": [*known["at"], *known["at"].reverse()], "y": [*known[high], *known[low].reverse()]}
            filled = {"fill": "toself", "fillcolor": faded(colour, opacity), "line": {"width": 0}}
            traces.append(go.Scatter(**band, **filled, mode="lines", hoverinfo="skip", showlegend=False, **shared))
    if _known(rows, "null"):
        dotted = {"color": pen.colour, "dash": "dot", "width": 1.4}
        said = f"{shown}, chance: %{{y:.3g}}<extra></extra>"
        traces.append(go.Scatter(x=x, y=rows["null"], mode="lines", line=dotted, showlegend=False, hovertemplate=said, **shared))
    names = rows["name"].to_list() if "name" in rows.columns else [written(value) for value in rows["x"].to_list()]
    line = {"color": pen.colour, "dash": pen.dash, "width": pen.width}
    said = f"{shown}<br>%{{customdata}}: %{{y:.3g}}<extra></extra>"
    drawn = {"customdata": [html.escape(name) for name in names], "marker": {"symbol": pen.symbol, "size": 7}, "hovertemplate": said}
    traces.append(go.Scatter(x=x, y=rows["value"], mode="lines+markers", line=line, **drawn, **shared))
    return traces


def _known(rows: pl.DataFrame, column: str) -> bool:
    return column in rows.columns and bool(rows[column].is_not_null().any())
