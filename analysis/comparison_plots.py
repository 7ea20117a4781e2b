"""Figures of a comparison, each from its frames alone, nothing that a table would not show, and the page that has them all.

1. `edges_figure`: what two graphs share of their strongest edges, at every size or threshold, over the bands of both nulls. `ranks_figure`: how far
   their strengths are ordered alike.
2. `refinement_figure`: classes and similarity by rounds. `profiles_figure`: where nodes and strength are, and how long paths are.
3. `coupling_figure`: which region corresponds to which. `joint_figure`: blocks of two models' features.
4. `comparison_figures`: those that a comparison has something for, by name; `comparison_page`: the same with question, reading and numbers.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from .comparison_records import Comparison
from .comparison_verdict import verdict
from .edge_overlap import CURVE_NAMES, PERMUTED, RANKS, REWIRED
from .gallery import Exhibit, gallery
from .plots import INK, SOFT, faded, legend_once, style

A, B = "#0072b2", "#d55e00"
"""The colours of the two sides."""

NULLS = {REWIRED: "#8c959f", PERMUTED: "#b8860b"}
"""The colours of the nulls' bands; others are drawn as the first."""

CELLS = 400
"""Regions of a side at most in a drawn coupling, those of the greatest mass."""


def comparison_figures(found: Comparison) -> dict[str, go.Figure]:
    """The figures by name."""
    return {one.name: one.figure for one in exhibits(found)}


def comparison_page(found: Comparison) -> str:
    """All figures with what they say on one page that opens offline."""
    settings = [(name, str(value)) for name, value in found.settings.items()]
    title = "Joint partitions" if found.kind == "joint" else "Two graphs compared"
    return gallery(
        exhibits(found), title, subtitle=f"A: {found.a} — B: {found.b}", settings=[("comparison", found.key), *settings],
        commands=[f"featlas compare --show {found.key}"],
    )  # fmt: skip


def exhibits(found: Comparison) -> list[Exhibit]:
    """What a comparison has something for, each figure with its question."""
    if found.kind == "joint":
        return [_joint_exhibit(found)] if found.blocks.height else []
    made = [_edges_exhibit(found, axis) for axis in ("strongest edges", "threshold")]
    made += [_ranks_exhibit(found), _refinement_exhibit(found), _profiles_exhibit(found), _coupling_exhibit(found)]
    return [one for one in made if one is not None]


def _fixed(found: Comparison) -> str:
    of = f"nodes joined by matching {found.matching}" if found.matching else "the same nodes on both sides"
    return f"A: {found.a}; B: {found.b}; {of}; {found.settings['draws']} draws of each null, seed {found.settings['seed']}."


def _curves(found: Comparison, part: str, axis: str, quantities: Sequence[str] | None = None) -> pl.DataFrame:
    own = found.curves.filter((pl.col("part") == part) & (pl.col("axis") == axis))
    return own if quantities is None else own.filter(pl.col("quantity").is_in(list(quantities)))


# --- edges --------------------------------------------------------------------------------------------------------------


def edges_figure(curves: pl.DataFrame, *, title: str = "", subtitle: str = "") -> go.Figure:
    """A panel for each quantity of `CURVE_NAMES`: the value over a logarithmic axis, over the bands of the nulls."""
    names = [name for name in CURVE_NAMES.values() if name in set(curves["quantity"])]
    figure = make_subplots(rows=2, cols=2, subplot_titles=names, horizontal_spacing=0.09, vertical_spacing=0.16)
    axis = curves["axis"][0]
    for i, name in enumerate(names):
        row, col = i // 2 + 1, i % 2 + 1
        own = curves.filter(quantity=name)
        for null in own["null"].unique(maintain_order=True):
            rows = own.filter(null=null)
            if null:
                figure.add_traces(_band(rows, null), rows=row, cols=col)
        rows = own.filter(null=own["null"][0])
        figure.add_trace(_line(rows, "data", INK), row=row, col=col)
        figure.update_xaxes(type="log", title_text=_AXES.get(axis, axis) if row == 2 else None, row=row, col=col)
        # curves near 0 fill their panel too
        most = max((float(m) for m in (own["value"].max(), own["null_high"].max()) if m is not None), default=1.0)  # type: ignore[arg-type]
        figure.update_yaxes(range=[-0.03 * most, min(1.03, 1.1 * most) or 1.0], row=row, col=col)
    if axis == "threshold":
        figure.update_xaxes(autorange="reversed", exponentformat="power")
    legend_once(figure)
    style(figure, title or "Shared edges", subtitle, 640, notes=["Bands: the middle 95 % of the draws of a null."])
    return figure


_AXES = {"strongest edges": "strongest edges of each graph", "threshold": "least strength, as a share of the graph's, from strong to weak"}


def _line(rows: pl.DataFrame, name: str, colour: str, *, dash: str = "solid", marks: bool = False) -> go.Scatter:
    return go.Scatter(
        x=rows["place"].to_list(), y=rows["value"].to_list(), name=name, legendgroup=name, mode="lines+markers" if marks else "lines",
        line={"color": colour, "width": 2.6, "dash": dash}, hovertemplate=f"{name}: %{{y:.3f}} at %{{x}}<extra></extra>",
    )  # fmt: skip


def _band(rows: pl.DataFrame, null: str) -> list[go.Scatter]:
    """The middle 95 % of a null as an area, its mean as a line."""
    known = rows.drop_nulls("null_mean")
    colour = NULLS.get(null, NULLS[REWIRED])
    x = known["place"].to_list()
    shared = {"legendgroup": null, "mode": "lines"}
    return [
        go.Scatter(x=x, y=known["null_high"].to_list(), line={"width": 0}, hoverinfo="skip", showlegend=False, **shared),
        go.Scatter(x=x, y=known["null_low"].to_list(), line={"width": 0}, hoverinfo="skip", fill="tonexty", fillcolor=faded(colour, 0.28),
                   showlegend=False, **shared),
        go.Scatter(x=x, y=known["null_mean"].to_list(), name=null, line={"color": colour, "width": 1.6, "dash": "dot"},
                   hovertemplate=f"{null}: %{{y:.3f}} at %{{x}}<extra></extra>", **shared),
    ]  # fmt: skip


def _edges_exhibit(found: Comparison, axis: str) -> Exhibit | None:
    curves = _curves(found, "edges", axis, list(CURVE_NAMES.values()))
    if curves.is_empty():
        return None
    by = "size" if axis == "strongest edges" else "threshold"
    return Exhibit(
        name=f"edges-by-{by}", title=f"Edges that both graphs have, by {by}", question="How much do the graphs share, and is it more than chance?",
        fixed=_fixed(found),
        reading="Left are the strongest edges alone, right all of them. Above the grey band the graphs share more than their degrees and layers "
        "bring about; above the golden one, more than using the same nodes does. Weighted: Σ min over Σ max of the strengths; signed: an edge of "
        "opposite signs counts as two.",
        figure=edges_figure(curves, title="Shared edges", subtitle=f"by {by}"), table=curves, findings=verdict(found)[:3],
    )  # fmt: skip


def ranks_figure(curves: pl.DataFrame) -> go.Figure:
    """Rank correlations of strengths over how many of each graph's strongest edges count."""
    figure = go.Figure()
    for name, colour, dash in zip(RANKS, ("#0072b2", "#56b4e9", "#d55e00", "#e69f00"), ("solid", "dash", "solid", "dash"), strict=True):
        rows = curves.filter(quantity=name).drop_nulls("value")
        if rows.height:
            figure.add_trace(_line(rows, name, colour, dash=dash, marks=True))
    figure.add_hline(y=0, line={"color": SOFT, "width": 1})
    figure.update_xaxes(type="log", title_text=_AXES["strongest edges"])
    figure.update_yaxes(range=[-1.05, 1.05], title_text="rank correlation")
    style(figure, "Are shared edges ordered alike?", "Spearman's ρ and Kendall's τ-b of strengths", 420)
    return figure


def _ranks_exhibit(found: Comparison) -> Exhibit | None:
    curves = _curves(found, "edges", "strongest edges", RANKS)
    if curves.drop_nulls("value").is_empty():
        return None
    return Exhibit(
        name="ranks", title="Rank correlations of strengths", question="Are the edges that matter in the one graph those that matter in the other?",
        fixed=_fixed(found),
        reading="Over shared edges alone, and over all edges of either graph, where an edge that a graph lacks has strength 0: edges of one graph "
        "alone then pull the coefficient below 0, as they should.",
        figure=ranks_figure(curves), table=curves,
    )  # fmt: skip


# --- refinement, profiles -----------------------------------------------------------------------------------------------


def refinement_figure(curves: pl.DataFrame, subtitle: str = "") -> go.Figure:
    """A row for each part: similarity by rounds over the null's band, and how many classes either graph has."""
    parts = curves["part"].unique(maintain_order=True).to_list()
    titles = [text for part in parts for text in (f"{part}: similarity", f"{part}: classes")]
    figure = make_subplots(rows=len(parts), cols=2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.24 / len(parts))
    for i, part in enumerate(parts, start=1):
        own = curves.filter(part=part)
        for name, dash in (("shared classes", "solid"), ("WL kernel", "dash"), ("1 − Jensen–Shannon", "dot")):
            rows = own.filter(quantity=name)
            if name == "shared classes" and rows.height and rows["null"][0]:
                figure.add_traces(_band(rows, rows["null"][0]), rows=i, cols=1)
            figure.add_trace(_line(rows, name, INK, dash=dash, marks=True), row=i, col=1)
        for name, colour in (("A", A), ("B", B)):
            figure.add_trace(_line(own.filter(quantity=f"classes of {name}"), f"classes of {name}", colour, marks=True), row=i, col=2)
        figure.update_yaxes(range=[-0.04, 1.04], row=i, col=1)
        figure.update_yaxes(rangemode="tozero", row=i, col=2)
    figure.update_xaxes(dtick=1, title_text="rounds", row=len(parts))
    legend_once(figure)
    style(figure, "Colour refinement by rounds", subtitle, 120 + 250 * len(parts), notes=["The band is of shared classes."])
    return figure


def _refinement_exhibit(found: Comparison) -> Exhibit | None:
    curves = found.curves.filter(pl.col("axis") == "rounds")
    if curves.is_empty():
        return None
    return Exhibit(
        name="refinement", title="Colour refinement by rounds",
        question="Are the graphs built alike, whichever node is which, and down to what depth of neighbourhoods?",
        fixed=_fixed(found) + f" Strengths in {found.settings['bins']} bins by quantile of each graph where it says so.",
        reading="After k rounds two nodes are in one class where their neighbourhoods of depth k look the same. Shared classes: what part of the "
        "nodes lies in classes that both graphs have equally. Graphs of features fall into single nodes after two rounds or so: then only an exact "
        "copy is alike, and the graphs of regions say more.",
        figure=refinement_figure(curves), table=curves,
    )  # fmt: skip


def profiles_figure(curves: pl.DataFrame) -> go.Figure:
    """Where nodes and strength are by site, and how long paths are, A beside B."""
    names = [name for name in dict.fromkeys(text.rpartition(",")[0] for text in curves["quantity"]) if name]
    figure = make_subplots(rows=2, cols=3, subplot_titles=names, horizontal_spacing=0.07, vertical_spacing=0.2)
    for i, name in enumerate(names):
        row, col = i // 3 + 1, i % 3 + 1
        for side, colour in (("A", A), ("B", B)):
            rows = curves.filter(quantity=f"{name}, {side}")
            if name.startswith("path"):
                bars = {"x": rows["place"].to_list(), "y": rows["value"].to_list(), "marker": {"color": colour}}
                figure.add_trace(go.Bar(name=side, legendgroup=side, **bars), row=row, col=col)
            else:
                figure.add_trace(_line(rows, side, colour, marks=True), row=row, col=col)
        figure.update_xaxes(title_text=curves.filter(quantity=f"{name}, A")["axis"][0], dtick=1, row=row, col=col)
        figure.update_yaxes(rangemode="tozero", tickformat=".0%", row=row, col=col)
    legend_once(figure)
    style(figure, "Profiles", "shares of each graph", 620)
    return figure


def _profiles_exhibit(found: Comparison) -> Exhibit | None:
    curves = found.curves.filter(pl.col("part") == "profiles")
    if curves.is_empty():
        return None
    return Exhibit(
        name="profiles", title="Where nodes, strength and paths are", question="Do the graphs do their work at the same depth, in as many steps?",
        fixed=_fixed(found),
        reading="Sites count from the input. Paths lead from the inputs to the output: by strength, each counts with the product of its edges' "
        "shares of what enters their targets.",
        figure=profiles_figure(curves), table=found.values.filter(pl.col("part") == "profiles"),
    )  # fmt: skip


# --- regions ------------------------------------------------------------------------------------------------------------


def coupling_figure(links: pl.DataFrame, *, subtitle: str = "") -> go.Figure:
    """The coupling as a matrix: what part of its mass each region of A sends to each of B. Regions in the order of their labels, those of A below.

    Rows are divided by their sums over what is drawn.
    """
    order = lambda side: (
        links.group_by(f"{side}_label").agg(pl.col("weight").sum(), pl.col(side).first()).sort("weight", descending=True).head(CELLS)
        .sort(side)[f"{side}_label"].to_list()
    )  # fmt: skip
    rows, columns = order("source"), order("target")
    place = {side: {name: i for i, name in enumerate(names)} for side, names in (("source", rows), ("target", columns))}
    shown = links.filter(pl.col("source_label").is_in(rows) & pl.col("target_label").is_in(columns))
    matrix = np.zeros((len(rows), len(columns)))
    at = [shown[f"{side}_label"].replace_strict(place[side], return_dtype=pl.Int64).to_numpy() for side in ("source", "target")]
    np.add.at(matrix, (at[0], at[1]), shown["weight"].to_numpy())
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1e-300)
    heat = go.Heatmap(
        z=matrix, x=columns, y=rows, zmin=0, zmax=1, colorscale=[(0, "#ffffff"), (1, A)], colorbar={"title": "share"},
        hovertemplate="A: %{y}<br>B: %{x}<br>%{z:.0%} of the mass<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heat)
    few = max(len(rows), len(columns)) <= 60
    figure.update_xaxes(title_text="regions of B", showticklabels=few, tickangle=60, type="category")
    figure.update_yaxes(title_text="regions of A", showticklabels=few, autorange="reversed", type="category")
    style(figure, "Which region corresponds to which", subtitle, 720, legend=False)
    if few:
        figure.update_xaxes(automargin=True)
        figure.update_yaxes(automargin=True)
    return figure


def _coupling_exhibit(found: Comparison) -> Exhibit | None:
    links = found.links.filter(pl.col("kind") == "region")
    if links.is_empty():
        return None
    return Exhibit(
        name="coupling", title="Which region corresponds to which", question="Do the same regions play the same part in both graphs?",
        fixed=_fixed(found) + f" α = {found.settings['alpha']}: 0 goes by what regions are, 1 by what they drive.",
        reading="A dark cell: the region of A plays the part of that of B. Where both graphs have the same regions, the diagonal says that regions "
        "keep their parts. Hover for names.",
        figure=coupling_figure(links), table=links,
    )  # fmt: skip


# --- joint partitions ---------------------------------------------------------------------------------------------------


def joint_figure(blocks: pl.DataFrame) -> go.Figure:
    """A panel for each pair of sites: each block's features of A to the left and of B to the right, darker where the block is shared."""
    pairs = list(blocks.select("site_a", "site_b").unique(maintain_order=True).iter_rows())
    figure = make_subplots(rows=1, cols=len(pairs), subplot_titles=[f"{a} of A, {b} of B" for a, b in pairs], horizontal_spacing=0.06)
    for i, (site_a, site_b) in enumerate(pairs, start=1):
        own = blocks.filter((pl.col("site_a") == site_a) & (pl.col("site_b") == site_b))
        names = [f"block {block}" for block in own["block"]]
        said = [f"{name}: {a} of A, {b} of B, shared {shared:.2f}" for name, (a, b, shared) in
                zip(names, own.select("n_a", "n_b", "shared").iter_rows(), strict=True)]  # fmt: skip
        for side, sign, colour in (("A", -1, A), ("B", 1, B)):
            shades = [faded(colour, 0.25 + 0.75 * shared) for shared in own["shared"]]
            figure.add_trace(
                go.Bar(
                    y=names, x=(sign * own[f"n_{side.lower()}"]).to_list(), orientation="h", name=side, legendgroup=side,
                    marker={"color": shades}, hovertext=said, hoverinfo="text",
                ), row=1, col=i,
            )  # fmt: skip
        most = max(1, *own["n_a"], *own["n_b"])
        step = max(1, round(most / 2))
        figure.update_xaxes(tickvals=[-2 * step, -step, 0, step, 2 * step], ticktext=[2 * step, step, 0, step, 2 * step], title_text="features",
                            row=1, col=i)  # fmt: skip
        figure.update_yaxes(autorange="reversed", showticklabels=len(names) <= 40, type="category", row=1, col=i)
    figure.update_layout(barmode="relative", bargap=0.12)
    legend_once(figure)
    style(figure, "Blocks of both models' features", "left of A, right of B; the darker, the more shared", 620)
    return figure


def _joint_exhibit(found: Comparison) -> Exhibit:
    return Exhibit(
        name="joint", title="Blocks of both models' features", question="Do two models' features fall into the same groups?",
        fixed=f"A: {found.a}; B: {found.b}; the same segments of {found.notes.get('source', 'one text')}; {found.settings['method']}.",
        reading="A bar to both sides: features of both models are active together on the same text. A bar to one side: a group that one model alone "
        "has. Chance is the same partition with one model's text moved against the other's.",
        figure=joint_figure(found.blocks), table=found.blocks, findings=verdict(found),
    )  # fmt: skip
