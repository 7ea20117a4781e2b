"""Figures say what the frames say: counts, signs, places, escapes."""

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import Selection, extract, site_summary, strongest_part, strongest_paths
from featlas.analysis.notes import CONTEXTS, NOTES, feature_notes, readable
from featlas.analysis.plots import circuit_figure, embedded, flow_figure, lay_out

from .layered_circuit import HOSTILE, layered_circuit


def drawn_curves(figure: object) -> dict[str, int]:
    """Number of edges drawn, by the name of their trace; a NaN ends each curve."""
    counts: dict[str, int] = {}
    for trace in figure.data:  # type: ignore[attr-defined]
        if trace.mode == "lines" and trace.x is not None and trace.showlegend is False and not trace.name.startswith("highlight"):
            counts[trace.name] = counts.get(trace.name, 0) + int(np.isnan(np.asarray(trace.x, dtype=float)).sum())
    return counts


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
