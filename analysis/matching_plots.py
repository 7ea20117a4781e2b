"""Figures of a matching, and a page of them.

1. `site_pair_figure`: which site corresponds to which, by features that match, by CKA and by SVCCA, side by side.
2. `score_figure`: the scores of mutual nearest neighbours beside those by chance, and the threshold between them.
3. `matching_page`: both as a page that opens offline.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from ..queries.matches import Method
from .gallery import Exhibit, gallery
from .matching import BIN, Matching, MatchOptions, correspondence
from .plots import INK, LOWERS, RAISES, SOFT, style

SEQUENTIAL = [(0, "#f7fafc"), (0.35, "#b6d3e8"), (0.7, "#4b8fc2"), (1, "#0b4a7f")]
WRITTEN = 12
"""Sites on a side up to which each cell's number is written into it."""

_PANELS = (("share_a", "features of A matched"), ("cka", "linear CKA"), ("svcca", "SVCCA"))


def short_model(key: str) -> str:
    """A model's name as it is shown: its key without the folders and the long revision."""
    name, _, revision = key.partition("@")
    return f"{name.rsplit('/', 1)[-1]}@{revision[:8]}" if revision else name


def side_names(matching: Matching) -> tuple[str, str]:
    """What the two sides are called: the model, and with it the dictionaries that a user named."""
    named: Sequence[Mapping[str, str]] = matching.settings.get("named") or ({}, {})
    own = [f" ({Path(one['dictionaries']).name})" if one.get("dictionaries") else "" for one in named]
    return short_model(matching.model_a) + own[0], short_model(matching.model_b) + own[1]


def _models(matching: Matching) -> str:
    a, b = side_names(matching)
    return f"A: {a}, B: {b}; text: {Path(matching.source).name}"


def site_pair_figure(matching: Matching, *, title: str = "") -> go.Figure:
    """Sites of A (rows) against sites of B (columns). The best of each row has a frame; what was not measured is left out."""
    sites = matching.sites
    a, b = (sites[name].unique(maintain_order=True).to_list() for name in ("site_a", "site_b"))
    panels = [(column, name) for column, name in _PANELS if sites[column].is_not_null().any()]
    spacing = 0.06 if len(panels) > 1 else 0.0
    figure = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=spacing, column_titles=[name for _, name in panels])
    for place, (column, name) in enumerate(panels, 1):
        values = sites[column].cast(pl.Float64).fill_null(np.nan).to_numpy().reshape(len(a), len(b))
        share = column == "share_a"
        figure.add_trace(_heat(values, a, b, name, share=share, extra=_extra(sites, len(a), len(b)) if share else None), row=1, col=place)
        for row, best in enumerate(np.where(np.isfinite(values), values, -np.inf).argmax(axis=1)):
            if np.isfinite(values[row, best]) and values[row, best] > 0:
                frame = {"x0": best - 0.48, "x1": best + 0.48, "y0": row - 0.48, "y1": row + 0.48}
                figure.add_shape(type="rect", line={"color": LOWERS, "width": 2}, row=1, col=place, **frame)
    side = min(46 * max(len(a), 3) + 190, 900)
    style(figure, title, _models(matching), side, legend=False, notes=["Framed: the site of B that each site of A is most like."])
    figure.update_xaxes(title_text="site of B", tickangle=-45 if len(b) > 4 else 0, tickmode="array", tickvals=list(range(len(b))), ticktext=b)
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(a))), ticktext=a, autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(title_text="site of A", row=1, col=1)
    figure.update_layout(margin_b=118 + (20 if len(b) > 4 else 0))
    return figure


def _extra(sites: pl.DataFrame, n_a: int, n_b: int) -> Any:
    """What the hover text says of each cell: features matched, live, by chance, threshold."""
    threshold = pl.when(pl.col("threshold").is_null()).then(pl.lit("none")).otherwise(pl.col("threshold").round(3).cast(pl.String))
    chosen = sites.select("n_matched", "n_a", "n_b", "null_share", threshold.alias("threshold"), "n_all")
    return np.array(chosen.rows(), dtype=object).reshape(n_a, n_b, 6)


def _heat(values: Any, a: list[str], b: list[str], name: str, *, share: bool, extra: Any) -> go.Heatmap:
    written = max(len(a), len(b)) <= WRITTEN
    hover = "A %{customdata[6]}, B %{customdata[7]}<br>" + html.escape(name) + (": %{z:.1%}" if share else ": %{z:.3f}")
    if extra is not None:
        hover += "<br>%{customdata[0]:,} pairs of %{customdata[1]:,} and %{customdata[2]:,} live features<br>by chance %{customdata[3]:.1%}"
        hover += "; threshold %{customdata[4]}<br>%{customdata[5]:,} of the matches over all sites"
    names = np.array([[(one, other) for other in b] for one in a], dtype=object)
    data = np.concatenate([np.zeros((len(a), len(b), 6), dtype=object) if extra is None else extra, names], axis=2)
    return go.Heatmap(
        z=values, x=list(range(len(b))), y=list(range(len(a))), colorscale=SEQUENTIAL, zmin=0, zmax=1, showscale=False, customdata=data,
        hovertemplate=hover + "<extra></extra>", texttemplate=("%{z:.0%}" if share else "%{z:.2f}") if written else None, xgap=1, ygap=1,
        hoverongaps=False, name=name,
    )  # fmt: skip


def score_figure(matching: Matching, *, title: str = "") -> go.Figure:
    """How many mutual nearest neighbours over all sites have which score, and how many by chance."""
    rows = matching.scores.filter(pl.col("method") == str(Method.ALL_SITES)).sort("low")
    figure = go.Figure()
    centre = rows["low"] + BIN / 2
    traces: Mapping[str, tuple[str, str, Callable[[float], str]]] = {
        "n": ("mutual nearest", RAISES, lambda n: f"{n:,.0f}"), "null_n": ("by chance", SOFT, lambda n: f"{n:,.1f}")
    }  # fmt: skip
    for column, (name, colour, said) in traces.items():
        text = [f"{low:.2f} … {low + BIN:.2f}: {said(n)}" for low, n in rows.select("low", column).iter_rows()]
        figure.add_bar(x=centre, y=rows[column], width=BIN, name=name, marker_color=colour, opacity=0.72, text=text, textposition="none",
                       hovertemplate="r %{text}<extra>" + name + "</extra>")  # fmt: skip
    threshold = matching.overall["threshold"]
    if threshold is not None:
        mark = {"text": f"r = {threshold:.3f}", "font": {"size": 13}}
        figure.add_vline(x=threshold, line={"color": INK, "dash": "dash"}, annotation=mark, annotation_position="top")
    found = f"{matching.overall['n_matched']:,} at or above the threshold" if threshold is not None else "none is more than chance"
    style(figure, title, f"{_models(matching)}: {found}", 430)
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title_text="correlation")
    figure.update_yaxes(title_text="pairs")
    return figure


def _options(matching: Matching) -> str:
    """The options that make this matching again: the null, and what is not as it is unless given."""
    usual = {field.name: field.default for field in fields(MatchOptions)}
    given = {name: value for name, value in matching.settings.items() if name in usual and value != usual[name]}
    return "".join(f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given.items())


def matching_page(matching: Matching) -> str:
    """Which sites correspond, and how sure the matches are, as a page that opens offline."""
    overall, settings = matching.overall, matching.settings
    null = "exchanged sequences" if settings["null"] == "sequences" else "shifted rows"
    chance = f"chance by {settings['draws']} draws of {null}, false discovery rate {settings['fdr']}"
    fixed = f"features live on {settings['min_active']} segments or more; {chance}; seed {settings['seed']}"
    found = correspondence(matching.sites)
    said = [
        f"{one}: {by_share or 'nothing'} by features matched" + ("" if by_cka is None else f", {by_cka} by CKA, {by_svcca} by SVCCA") + "."
        for one, by_share, by_cka, by_svcca in found.select("site_a", "by_share", "by_cka", "by_svcca").iter_rows()
    ]
    exhibits = [
        Exhibit(
            name="sites", title="Which site corresponds to which?", question="Where do the features of A lie in B, and is it where the values agree?",
            fixed=fixed, reading="Share: mutual nearest neighbours beyond chance, of A's live features at that site. CKA and SVCCA compare the raw "
            "values as a whole and know no features.", figure=site_pair_figure(matching), table=matching.sites, findings=said,
        ),
        Exhibit(
            name="scores", title="Are the matches more than chance?", question="How high are the correlations of mutual nearest neighbours?",
            fixed=fixed, reading="Chance is the same search with one side's segments moved, as said. Pairs right of the dashed line are matches.",
            figure=score_figure(matching), table=matching.scores.filter(pl.col("method") == str(Method.ALL_SITES)),
            findings=[
                f"{overall['n_matched']:,} of {overall['n_a']:,} live features of A ({overall['share_a']:.1%}) and of {overall['n_b']:,} of B match; "
                f"by chance {overall['null_share']:.1%}."
            ],
        ),
    ]  # fmt: skip
    told = [(name, f"{side}, {key}") for name, side, key in zip("AB", side_names(matching), (matching.model_a, matching.model_b))]
    told += [("text", matching.source), ("matching", matching.key)]
    command = f"featlas analyze match {matching.aligned[:8]}{_options(matching)}"
    return gallery(exhibits, "Matched features", subtitle=_models(matching), settings=told, commands=[command])
