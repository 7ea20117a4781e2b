"""Figures say what the frames say: counts, signs, places, escapes."""

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import Selection, extract, site_summary, strongest_part, strongest_paths
from featlas.analysis.faithfulness import Bootstrap, matched
from featlas.analysis.notes import CONTEXTS, NOTES, feature_notes, readable
from featlas.analysis.plots import (
    MixedTable,
    areas_figure,
    circuit_figure,
    distribution_figure,
    effects_figure,
    embedded,
    faithfulness_figure,
    flow_figure,
    improvement_figure,
    lay_out,
    matched_figure,
    removal_figure,
)
from scipy.stats import spearmanr

from .layered_circuit import HOSTILE, layered_circuit
from .made_scores import (
    GRID,
    IMPROVED,
    RATES,
    RATIOS,
    UNDEFINED,
    N,
    made_areas,
    made_effects,
    made_gains,
    made_reached,
    made_removals,
    made_sequences,
    made_sizes,
    made_table,
    made_values,
)


def drawn_curves(figure: object) -> dict[str, int]:
    """Number of edges drawn, by the name of their trace; a NaN ends each curve."""
    counts: dict[str, int] = {}
    for trace in figure.data:  # type: ignore[attr-defined]
        if trace.mode == "lines" and trace.x is not None and trace.showlegend is False:
            counts[trace.name] = counts.get(trace.name, 0) + int(np.isnan(np.asarray(trace.x, dtype=float)).sum())
    return counts


@pytest.mark.slow
def test_every_edge_is_drawn_once_with_its_sign() -> None:
    circuit, notes = layered_circuit()
    figure = circuit_figure(circuit, notes, max_edges=100_000)
    positive = int((circuit.edges["weight"] >= 0).sum())
    assert drawn_curves(figure) == {"raises the metric": positive, "lowers the metric": circuit.n_edges - positive}
    kinds = {trace.name: len(trace.x) for trace in figure.data if trace.mode == "markers" and trace.name != "edges"}
    counted = dict(circuit.nodes.group_by("kind").len().iter_rows())
    assert kinds == {"feature": counted["feature"], "error node": counted["error"], "output": 1}
    assert any(f"all {circuit.n_edges} edges" in note.text for note in figure.layout.annotations)


def test_the_strongest_edges_are_drawn_and_the_caption_says_how_many() -> None:
    circuit, notes = layered_circuit()
    figure = circuit_figure(circuit, notes, max_edges=120)
    part = strongest_part(circuit, 120)
    assert sum(drawn_curves(figure).values()) == part.n_edges
    assert 110 <= part.n_edges <= 120
    assert any(f"{part.n_edges} edges on the strongest paths, of {circuit.n_edges}" in note.text for note in figure.layout.annotations)
    # The strongest paths themselves are in the drawing, and nothing in it dangles.
    pairs = set(part.edges.select("source", "target").iter_rows())
    for path in strongest_paths(circuit, 10):
        assert set(zip(path.nodes, path.nodes[1:])) <= pairs
    ends = set(part.edges["source"]) | set(part.edges["target"])
    assert ends == set(part.nodes["key"])
    inner = part.nodes.filter(pl.col("role") == "inner")["key"]
    assert set(inner) <= set(part.edges["source"])
    assert set(inner) <= set(part.edges["target"])


def test_rows_are_sites_and_nodes_do_not_coincide() -> None:
    circuit, _ = layered_circuit(per_site=60)
    drawing = lay_out(circuit)
    assert drawing.sites == ("resid_0", "resid_4", "resid_8", "resid_12", "resid_16", "y")
    row = drawing.nodes["site"].replace_strict({site: i for i, site in enumerate(drawing.sites)}, return_dtype=pl.Int64)
    assert (drawing.nodes["y"] - row).abs().max() < 0.3
    assert drawing.nodes.select(pl.struct("x", "y").n_unique()).item() == circuit.n_nodes
    assert drawing.nodes["x"].min() >= 0
    assert drawing.nodes["x"].max() <= 1


def crossings(drawing: object) -> int:
    """Pairs of edges between the same two rows that cross."""
    total = 0
    for _, group in drawing.edges.with_columns(pl.col("y0").round(), pl.col("y1").round()).group_by("y0", "y1"):  # type: ignore[attr-defined]
        x0, x1 = group["x0"].to_numpy(), group["x1"].to_numpy()
        total += int((((x0[:, None] - x0) * (x1[:, None] - x1)) < -1e-12).sum()) // 2
    return total


def test_layout_uncrosses_a_graph_that_can_be_drawn_without_crossings() -> None:
    names = [f"{layer}{i}" for layer in "abc" for i in range(6)]
    features = pl.DataFrame([
        {"key": name, "site": f"resid_{'abc'.index(name[0])}", "layer": 0, "kind": "feature", "index": name} for name in names
    ] + [{"key": "y", "site": "y", "layer": -1, "kind": "output", "index": "y"}])
    order = [3, 0, 5, 1, 4, 2]
    edges = [(f"a{i}", f"b{order[i]}", 1.0) for i in range(6)] + [(f"b{i}", f"c{(i * 5) % 6}", 1.0) for i in range(6)]
    edges += [(f"b{i}", f"c{i}", 1e-3) for i in range(6)] + [(f"c{i}", "y", 1.0) for i in range(6)]
    frame = pl.DataFrame(edges, schema=["source", "target", "weight"], orient="row").unique(["source", "target"])
    frame = frame.with_columns(pl.col("weight").abs().alias("abs_weight"))
    circuit = extract(frame.filter(pl.col("weight") == 1.0), features, Selection("r"))
    assert crossings(lay_out(circuit)) <= 1


def test_positions_kept_are_the_x_axis() -> None:
    _, notes = layered_circuit()
    features = pl.DataFrame(
        [("u", "resid_0", 0, "feature", "1"), ("v", "resid_1", 1, "feature", "2"), ("y", "y", -1, "output", "y")],
        schema=["key", "site", "layer", "kind", "index"], orient="row",
    )
    rows = [("u", "v", "s", 0, 2, 1.0), ("u", "v", "s", 1, 2, -1.0), ("v", "y", "s", 2, 3, 2.0)]
    edges = pl.DataFrame(rows, schema=["source", "target", "sequence", "src_pos", "dest_pos", "weight"], orient="row")
    circuit = extract(edges, features, Selection("r", sequence="s", positions=True))
    figure = circuit_figure(circuit, notes.clear(), tokens=["The", " dogs", " <b>", "\n"])
    assert list(figure.layout.xaxis.ticktext) == ["The", "dogs", "&lt;b&gt;", "⏎"]
    assert lay_out(circuit).nodes["x"].to_list() == [0.0, 1.0, 2.0, 3.0]


def test_text_in_figures_is_escaped() -> None:
    circuit, notes = layered_circuit()
    figure = circuit_figure(circuit, notes, max_edges=200, title=HOSTILE)
    texts = [text for trace in figure.data if trace.text is not None for text in trace.text] + [note.text for note in figure.layout.annotations]
    assert not any("<script" in text for text in [*texts, figure.layout.title.text])
    assert any("&lt;script&gt;" in text for text in texts)
    assert "<script>document" not in embedded(figure, "circuit").replace("\\u003c", "")


def test_flow_bars_are_the_summary() -> None:
    circuit, _ = layered_circuit()
    summary = site_summary(circuit).filter(pl.col("site") != "y")
    features, errors = flow_figure(site_summary(circuit)).data
    assert list(features.x) == summary["site"].to_list()
    assert np.asarray(features.y) + np.asarray(errors.y) == pytest.approx(np.ones(5))
    assert np.asarray(errors.y) == pytest.approx(summary["error_flow"].to_numpy())


def test_notes_name_features_by_label_then_tokens_then_index() -> None:
    columns = ["key", "site", "kind", "index", "label", "frequency"]
    rows = [
        ("a", "resid_1", "feature", 3, None, 0.1),
        ("b", "resid_1", "feature", 4, "plural subject", 0.2),
        ("c", "resid_1", "feature", 5, None, None),
        ("e", "resid_1", "error", -1, None, None), ("y", "y", "output", -1, None, None),
    ]
    features = pl.DataFrame(rows, schema=columns, orient="row")
    contexts = pl.DataFrame(
        [("a", 3.0, ["x", " y\n"], " are", [" z"]), ("a", -2.0, [], " are", []), ("a", 4.0, ["q"], "\n", [])], schema=CONTEXTS, orient="row"
    )
    notes = feature_notes(features, contexts, output="logit difference")
    assert notes.schema == pl.Schema(NOTES)
    assert notes["name"].to_list() == ["are · ⏎", "plural subject", "feature 5", "error of resid_1", "logit difference"]
    assert notes["contexts"].to_list()[0] == ["q【⏎】", "x y⏎【 are】 z", "【 are】"]
    assert feature_notes(features, contexts.clear())["name"].to_list()[0] == "feature 3"


@pytest.mark.parametrize(("text", "shown"), [(" are", "are"), ("\n", "⏎"), ("  ", "␣␣"), ("a\tb", "a⇥b"), ("x" * 100, "x" * 79 + "…")])
def test_readable(text: str, shown: str) -> None:
    assert readable(text) == shown


def lines_of(figure: object) -> dict[tuple[str, str], object]:
    """The lines of a figure by method and x axis."""
    return {(t.name, t.xaxis): t for t in figure.data if t.mode == "lines+markers"}  # type: ignore[attr-defined]


def test_faithfulness_is_drawn_as_the_table_says() -> None:
    table = made_table()
    figure = faithfulness_figure(table, reached=made_reached())
    lines = lines_of(figure)
    assert len(lines) == len(RATES) * 4
    for place, (part, ablation) in {"x": ("circuit", "edge"), "x2": ("circuit", "node"), "x3": ("complement", "edge")}.items():
        rows = table.filter((pl.col("method") == "top activations") & (pl.col("part") == part) & (pl.col("ablation") == ablation)).sort("size")
        assert list(lines["top activations", place].y) == pytest.approx(rows["value"].to_list())
    # The size of zero stands at the left end of the logarithmic axis, where a tick says so.
    assert figure.layout.xaxis.type == "log"
    assert lines["attribution", "x"].x == (5, *GRID[1:])
    assert dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals))["0"] == 5
    # One entry in the legend for each method, attribution's first and drawn last.
    named = [t.name for t in figure.data if t.showlegend]
    assert sorted(named) == sorted([*RATES, "smallest to reach"])
    assert min((t.legendrank, t.name) for t in figure.data if t.showlegend)[1] == "attribution"
    text = figure.layout.title.subtitle.text
    assert all(word in text for word in ("logit_diff", "counterfactual", "held-out", "mean of ratios", "n = 24", "all tasks pooled"))
    assert any(f"undefined for {UNDEFINED} sequences" in note.text for note in figure.layout.annotations)


def test_bands_are_intervals_of_attribution_and_ranges_of_draws() -> None:
    table = made_table()
    bands = {(t.name, t.xaxis): t for t in faithfulness_figure(table).data if t.fill == "toself"}
    assert {name for name, _ in bands} == {"attribution band", "random edges band", "random nodes band"}
    for method, low, high in (("attribution", "low", "high"), ("random edges", "draw_min", "draw_max")):
        rows = table.filter((pl.col("method") == method) & (pl.col("part") == "circuit") & (pl.col("ablation") == "edge")).sort("size")
        assert list(bands[f"{method} band", "x"].y)[:-1] == pytest.approx([*rows[high], *rows[low].reverse()])


def test_the_switch_changes_every_trace_and_axis() -> None:
    table = made_table()
    figure = faithfulness_figure(table, reached=made_reached())
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["edges", "nodes", "average degree", "candidates kept"]
    place = next(i for i, t in enumerate(figure.data) if t.name == "attribution" and t.xaxis == "x2")
    rows = table.filter((pl.col("method") == "attribution") & (pl.col("part") == "circuit") & (pl.col("ablation") == "node")).sort("size")
    for button, column in zip(buttons, ("n_edges", "n_nodes", "average_degree", "size")):
        data, layout = button.args
        assert len(data["x"]) == len(figure.data)
        assert list(data["x"][place])[1:] == pytest.approx(rows[column].to_list()[1:])
        assert {name.partition(".")[0] for name in layout} == {"xaxis", "xaxis2", "xaxis3", "xaxis4"}
    assert buttons[2].args[1]["xaxis.type"] == "linear"


def test_the_smallest_circuits_are_marked_on_the_line() -> None:
    reached = made_reached().filter((pl.col("method") == "attribution") & (pl.col("ablation") == "edge"))
    assert reached["size"].to_list() == [1000, 1000]
    mark = next(t for t in faithfulness_figure(made_table(), reached=made_reached()).data if t.legendgroup == "reached")
    assert (list(mark.x), list(mark.y)) == ([1000], pytest.approx([reached["value"][0]]))
    assert mark.text[0].strip() == "0.8 and 0.9"
    none = made_reached().with_columns(pl.lit(None, dtype=pl.Float64).alias(name) for name in ("value", "n_edges", "n_nodes", "average_degree"))
    assert not any(t.legendgroup == "reached" for t in faithfulness_figure(made_table(), reached=none).data)


def test_undefined_points_are_gaps() -> None:
    gone = (pl.col("method") == "attribution") & (pl.col("size") == 100)
    table = made_table().with_columns(pl.when(~gone).then(name).alias(name) for name in ("value", "low", "high"))
    figure = faithfulness_figure(table)
    line = lines_of(figure)["attribution", "x"]
    assert line.y[3] is None
    assert line.connectgaps is False
    band = next(t for t in figure.data if t.name == "attribution band" and t.xaxis == "x")
    assert [i for i, y in enumerate(band.y) if y is None] == [6, 15]  # three sizes, then four, each up and back
    assert any("4 points have no value" in note.text for note in figure.layout.annotations)


def test_controls_that_pruning_left_nothing_of_are_named() -> None:
    gone = (pl.col("method") == "random edges") & (pl.col("size") == 10)
    table = made_table().with_columns(pl.when(gone).then(0.0).otherwise("n_edges").alias("n_edges"))
    notes = [note.text for note in faithfulness_figure(table).layout.annotations]
    assert any("left at some sizes of random edges:" in note for note in notes)
    assert not any("left at some sizes" in note.text for note in faithfulness_figure(made_table()).layout.annotations)


def test_a_figure_is_of_one_setting() -> None:
    table = made_table()
    both = pl.concat([table, table.with_columns(pl.lit("kl").alias("metric"))])
    with pytest.raises(MixedTable, match="metric 'logit_diff', 'kl'"):
        faithfulness_figure(both)
    with pytest.raises(MixedTable, match="several rows"):
        faithfulness_figure(pl.concat([table, table]))


def test_a_method_has_one_colour_in_every_figure() -> None:
    improved = made_table(IMPROVED).with_columns((pl.col("size") / GRID[-1]).alias("share"))
    figures = [faithfulness_figure(made_table()), improvement_figure(improved, made_gains())]
    colours = {t.line.color for figure in figures for t in figure.data if t.name == "attribution"}
    violins = {t.line.color for t in distribution_figure(made_sequences()).data if t.name == "attribution"}
    areas = areas_figure(made_areas())
    top = [bar.marker.color[-1] for bar in areas.data if bar.type == "bar"]
    assert colours == violins == set(top) == {"#0072b2"}
    every = {t.line.color for t in figures[0].data if t.mode == "lines+markers"}
    assert len(every) == len(RATES)


def test_heat_map_cells_say_value_and_interval() -> None:
    figure = removal_figure(made_removals())
    heat = figure.data[0]
    assert (len(heat.y), len(heat.x)) == (2, 4)
    assert heat.z[1][2] == 0.52
    assert "0.52" in heat.text[1][2]
    assert "0.42 … 0.62" in heat.text[1][2]
    assert "80 sequences" in heat.customdata[1][2]
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert heat.z[1][3] is None
    assert [note.text for note in figure.layout.annotations] == ["–"]
    signed = removal_figure(made_removals().with_columns(pl.col("value") - 0.9)).data[0]
    assert (signed.zmin, signed.zmax) == pytest.approx((-0.38, 0.38))


def test_undefined_and_far_sequences_are_counted_under_the_method() -> None:
    figure = distribution_figure(made_sequences())
    assert [t.name for t in figure.data[:2]] == ["attribution", "node attribution"]
    assert all(len(t.y) == N - UNDEFINED for t in figure.data)
    labels = dict(zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext))
    assert "undefined 2" in labels["attribution"]
    assert "beyond 1" in labels["attribution"]
    assert "beyond" not in labels["node attribution"]
    assert 40.0 in figure.data[0].y
    assert figure.layout.yaxis.range[1] < 3
    assert figure.data[0].text[0].startswith("sequence &lt;")


def test_effects_share_their_scale_and_the_correlation_is_of_ranks() -> None:
    effects = made_effects()
    figure = effects_figure(effects)
    for trace, (_, rows) in zip(figure.data, effects.group_by("within", maintain_order=True)):
        expected = spearmanr(rows["estimated"], rows["measured"]).statistic
        assert any(f"600 edges, rank correlation {expected:.2f}" in note.text for note in figure.layout.annotations)
        # Both axes are transformed alike: sorted by the estimate, places are in order, and equal effects are on the line.
        back = 2 * np.abs(effects.select(pl.max_horizontal(pl.col("estimated", "measured").abs())).max().item()) / 1000 * np.sinh(np.asarray(trace.x))
        assert np.sort(back) == pytest.approx(np.sort(rows["estimated"].to_numpy()))
    data, layout = figure.layout.updatemenus[0].buttons[1].args
    assert sorted(data["x"][0]) == pytest.approx(sorted(effects.filter(pl.col("within") == "full model")["estimated"]))
    assert layout["shapes[0].x0"] == layout["shapes[0].y0"] == -layout["shapes[0].x1"]
    few = effects_figure(effects.head(2).with_columns(pl.lit(0.0).alias("measured")))
    assert any("rank correlation undefined" in note.text for note in few.layout.annotations)


def test_areas_are_bars_with_their_intervals() -> None:
    areas = made_areas()
    bars = areas_figure(areas).data[0]
    rows = {tuple(row[:2]): row[2:] for row in areas.filter(pl.col("area") == "CPR").select("method", "ablation", "value", "low", "high").iter_rows()}
    assert len(bars.x) == len(rows) == 2 * len(RATES)
    for x, up, down, data in zip(bars.x, bars.error_x.array, bars.error_x.arrayminus, bars.customdata):
        value, low, high = rows[tuple(data[:2])]
        assert (x, x + up, x - down) == pytest.approx((value, high, low))
    assert len(set(bars.y)) == len(bars.y)


def test_gains_are_shaded_and_named() -> None:
    table = made_table(IMPROVED).filter(pl.col("ablation") == "edge").with_columns((pl.col("size") / GRID[-1]).alias("share"))
    figure = improvement_figure(table, made_gains())
    names = [t.name for t in figure.data if t.showlegend]
    assert "greedy pruning<br>CPR +0.021 (+0.012 … +0.030) by edge" in names
    assert "learned gates<br>CPR +0.009 (−0.002 … +0.016) by edge" in names
    linear = figure.layout.updatemenus[0].buttons[1].args[0]["x"]
    greedy = next(i for i, t in enumerate(figure.data) if t.name == "greedy pruning gain")
    outline = np.array([linear[greedy], figure.data[greedy].y])
    # The shaded polygon's area on the linear axis is the difference of the trapezoids.
    area = 0.5 * abs(np.sum(outline[0] * np.roll(outline[1], -1) - np.roll(outline[0], -1) * outline[1]))
    own = table.filter(pl.col("part") == "circuit").sort("share").partition_by("method", as_dict=True)
    cpr = {method: np.trapezoid(rows["value"], rows["share"]) for (method,), rows in own.items()}
    assert area == pytest.approx(cpr["greedy pruning"] - cpr["attribution"])


def test_methods_at_equal_size_are_differences_with_intervals() -> None:
    options = {"averaging": (RATIOS,), "bootstrap": Bootstrap(resamples=100)}
    table = pl.concat([matched(made_values(RATES), made_sizes(RATES), ("attribution", "edge"), on=on, **options) for on in ("n_edges", "n_nodes")])
    figure = matched_figure(table)
    line = lines_of(figure)["top activations", "x"]
    rows = table.filter((pl.col("method") == "top activations") & (pl.col("ablation") == "edge"))
    edges, nodes = (rows.filter(pl.col("on") == on).sort("at") for on in ("n_edges", "n_nodes"))
    assert list(line.y) == pytest.approx(edges["difference"].to_list())
    assert np.add(line.y, line.error_y.array) == pytest.approx(edges["high"].to_numpy())
    data = figure.layout.updatemenus[0].buttons[1].args[0]
    place = next(i for i, t in enumerate(figure.data) if t.name == "top activations" and t.xaxis == "x")
    assert data["y"][place] == pytest.approx(nodes["difference"].to_list())
    assert data["error_y.arrayminus"][place] == pytest.approx((nodes["difference"] - nodes["low"]).to_list())
    # A control that has nothing at equal edges is in the legend, and on the axis where it has.
    gone = (pl.col("method") == "random edges") & (pl.col("on") == "n_edges")
    figure = matched_figure(table.filter(~gone))
    place, control = next((i, t) for i, t in enumerate(figure.data) if t.name == "random edges" and t.xaxis == "x")
    assert (list(control.x), control.showlegend) == ([None], True)
    assert len(figure.layout.updatemenus[0].buttons[1].args[0]["x"][place]) > 1
