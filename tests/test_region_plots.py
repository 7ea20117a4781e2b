"""Figures of regions say what their frames say: cells, places, widths, orders, escapes."""

import numpy as np
import polars as pl
import pytest
from featlas.analysis.parcellation import PATH_SCORES
from featlas.analysis.region_plots import (
    alluvial_figure,
    block_order,
    correlation_figure,
    drives_figure,
    likeness_figure,
    mean_cells,
    path_figure,
    removal_order,
    selectivity_figure,
    sweep_figure,
    task_block_figure,
)
from featlas.analysis.region_study import MATRIX, SELECTIVITY
from scipy.stats import spearmanr

from .layered_circuit import HOSTILE
from .region_frames import made_drives, made_matrix, made_nodes, made_selectivity, made_sweep


def made_correlation(n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.corrcoef(random.normal(size=(n, 40)) + np.repeat(random.normal(size=(-(-n // 6), 40)), 6, axis=0)[:n])


def cells_of(figure: object) -> np.ndarray:
    """What the drawn matrix says, up to a byte's step."""
    heat = figure.data[0]  # type: ignore[attr-defined]
    ends = heat.colorbar.tickvals, [float(text.lstrip("≥≤ ").replace("−", "-")) for text in heat.colorbar.ticktext]
    return np.asarray(heat.z, dtype=float) / 127 * ends[1][-1]


def test_blocks_stand_by_coarser_level_then_by_size() -> None:
    fine = np.array([0, 1, 2, 0, 3, 1, 0, 4, 4, 4])
    coarse = np.array([0, 1, 0, 0, 1, 1, 0, 1, 1, 1])  # of blocks 0 and 2; of 1, 3 and 4, which is greater
    features, blocks = block_order(fine, [coarse])
    assert blocks.tolist() == [4, 1, 3, 0, 2]
    assert features.tolist() == [7, 8, 9, 1, 5, 4, 0, 3, 6, 2]
    assert block_order(fine)[1].tolist() == [0, 4, 1, 2, 3]


def test_cells_are_means_over_pairs_of_different_rows() -> None:
    matrix, starts = made_correlation(11), np.array([0, 1, 4, 9])
    ends = [*starts[1:], 11]
    found = mean_cells(matrix, starts)
    for i, (a, b) in enumerate(zip(starts, ends)):
        for j, (c, d) in enumerate(zip(starts, ends)):
            pairs = [matrix[p, q] for p in range(a, b) for q in range(c, d) if p != q]
            assert found[i, j] == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found[i, j])


def test_a_small_matrix_is_drawn_exactly_with_names() -> None:
    correlation, labels = made_correlation(12), np.repeat([1, 0], 6)
    names = [*(f"feature {i}" for i in range(11)), HOSTILE]
    figure = correlation_figure(correlation, labels, features=names)
    order = block_order(labels)[0]
    ordered = correlation[np.ix_(order, order)]
    shown = cells_of(figure)
    reach = np.abs(shown).max()
    assert shown == pytest.approx(np.clip(ordered, -reach, reach), abs=reach / 127)
    assert np.asarray(figure.data[1].z) == pytest.approx(ordered)
    assert len(figure.layout.shapes) == 2
    assert HOSTILE not in figure.to_json()
    assert figure.data[1].text[0][1].endswith(f"r {ordered[0, 1]:.3f}".replace("-", "−"))


def test_many_features_share_cells_that_never_mix_blocks() -> None:
    n, random = 300, np.random.default_rng(1)
    correlation, labels = made_correlation(n), np.sort(random.integers(0, 9, n))
    figure = correlation_figure(correlation, labels, coarser=[labels // 3], cells=60)
    blocks = block_order(labels, [labels // 3])[1]
    shown = cells_of(figure)
    assert 9 <= len(shown) <= 69
    edges = np.round(np.asarray(figure.data[1].x) + 0.5).astype(int)
    means = np.asarray(figure.data[1].z)
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks):
            rows, columns = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            pairs = [correlation[p, q] for p in rows for q in columns if p != q]
            assert means[i, j] == pytest.approx(np.mean(pairs), abs=1e-4)
            if i != j:  # cells of a pair of blocks average, by their sizes, to its mean; those beyond the colours' end are clipped
                part = shown[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
                if np.abs(part).max() < 0.95 * np.abs(shown).max():
                    assert part.mean() == pytest.approx(np.mean(pairs), abs=0.03)
    assert figure.data[1].customdata[2][3][:2] == [blocks[2], blocks[3]]
    assert len(figure.layout.shapes) == 9 + 3
    assert any("300 features are drawn in" in note.text for note in figure.layout.annotations)


def made_paths() -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = [(site, level, n, 40 - n, -100.0 - n, 0.01 * n, None, None, None) for site in ("a", HOSTILE) for level, n in enumerate((20, 10, 3, 1))]
    scores = pl.DataFrame(rows, schema={"site": pl.String, **PATH_SCORES}, orient="row")
    kept = [("a", "held-out likelihood, description length", 20, True), ("a", "more blocks than heads", 3, False), (HOSTILE, "ward's own", 10, True)]
    return scores, pl.DataFrame(kept, schema=["site", "rule", "n_blocks", "chosen"], orient="row")


def test_a_path_is_drawn_with_the_levels_that_are_kept() -> None:
    figure = path_figure(*made_paths(), title=HOSTILE)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == 2 * 2  # stability was not measured
    assert list(lines[0].x) == [1, 3, 10, 20]
    marks = [(trace.name, trace.x[0], trace.y[0]) for trace in figure.data if trace.mode == "markers"]
    held_out = ("held-out likelihood", 20, -120.0), ("description length", 20, -120.0), ("more blocks than heads", 3, -103.0)
    assert marks[:3] == list(held_out)
    assert ("ward&#x27;s own", 10, 0.1) in marks
    assert sum(trace.showlegend is True for trace in figure.data if trace.mode == "markers") == 4
    assert HOSTILE not in figure.to_json()


def test_ribbons_are_as_thick_as_their_flows_and_ordered_on_both_sides() -> None:
    frame = pl.DataFrame([("b", "y", 2), ("a", "x", 3), ("a", "y", 1), ("b", "x", 4)], schema=["left", "right", "n"], orient="row")
    figure = alluvial_figure(frame, ["a", "b"], ["x", "y"], sides=("blocks", "heads"))
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    assert list(bars["blocks"].y) == [4, 6]
    assert list(bars["heads"].y) == [7, 3]
    tops = dict(zip("ab", bars["blocks"].base)), dict(zip("xy", bars["heads"].base))
    drawn = {trace.name: np.stack([trace.x, trace.y]) for trace in figure.data if trace.type == "scatter" and trace.fill}
    ribbons = {name: np.split(line, np.flatnonzero(np.isnan(line[0])), axis=1) for name, line in drawn.items()}
    found = {}
    for group, pieces in ribbons.items():
        for piece in pieces:
            piece = piece[:, ~np.isnan(piece[0])]
            if piece.size:
                ends = [np.sort(piece[1][np.isclose(piece[0], at(piece[0]))]) for at in (np.min, np.max)]
                found[group, *(round(float(value), 6) for end in ends for value in (end[0], end[-1]))] = True
    left, right = tops
    expected = {  # at either side from where to where: a → x before a → y, and into x first what comes from a
        ("x", left["a"], left["a"] + 3, right["x"], right["x"] + 3), ("x", left["b"], left["b"] + 4, right["x"] + 3, right["x"] + 7),
        ("y", left["a"] + 3, left["a"] + 4, right["y"], right["y"] + 1), ("y", left["b"] + 4, left["b"] + 6, right["y"] + 1, right["y"] + 3),
    }  # fmt: skip
    assert set(found) == {(name, *(round(float(value), 6) for value in values)) for name, *values in expected}
    hovers = next(trace for trace in figure.data if trace.name == "flows")
    assert "<b>b → x</b><br>4 features" in hovers.text


def test_names_beside_the_flows_do_not_run_into_one_another() -> None:
    names = [f"{HOSTILE} {i}" for i in range(150)]
    frame = pl.DataFrame({"left": names, "right": ["x"] * 150, "n": [1] * 149 + [40]})
    figure = alluvial_figure(frame, names, ["x"])
    shown = [note for note in figure.layout.annotations if note.xanchor == "right"]
    assert 10 < len(shown) < 150
    height = figure.layout.height - 150
    places = np.sort([note.y for note in shown])
    assert np.diff(places).min() * height / max(figure.layout.yaxis.range) >= 12
    assert HOSTILE not in figure.to_json()


def test_blocks_are_ordered_by_the_task_that_they_break_most() -> None:
    rows = [("t1", "b", 0.2), ("t2", "b", -0.6), ("t1", "a", 0.9), ("t2", "a", 0.1), ("t1", "c", 0.1), ("t2", "c", 0.7), ("t1", "d", None)]
    frame = pl.DataFrame(rows, schema=["task", "removed", "value"], orient="row")
    assert removal_order(frame) == ["a", "d", "c", "b"]


def test_the_matrix_of_tasks_and_blocks() -> None:
    matrix = made_matrix()
    figure = task_block_figure(matrix, names={"resid_0/block 0": HOSTILE})
    heat = figure.data[0]
    own = {(r["removed"], r["task"]): r for r in matrix.filter(method="regions").iter_rows(named=True)}
    order = removal_order(matrix.filter(method="regions"))
    for i, removed in enumerate(order):
        for j, task in enumerate(heat.x):
            row = own[removed, task]
            assert heat.z[i][j] == row["value"]
            decided = row["value"] is not None and (row["low"] > 0 or row["high"] < 0)
            assert heat.text[i][j].startswith("<b>") == decided
    assert "–" in {cell for line in heat.text for cell in line}
    strips = {trace.name: trace for trace in figure.data[1:]}
    counts = matrix.drop_nulls("value").group_by("method").len()
    assert {name: len(trace.x) for name, trace in strips.items()} == dict(counts.iter_rows())
    assert HOSTILE not in figure.to_json()
    assert task_block_figure(pl.DataFrame(schema=MATRIX)).data[0].z is not None


def test_a_sweep_stands_at_the_share_that_whole_units_come_to() -> None:
    table = made_sweep()
    figure = sweep_figure(table, metric="logit_diff")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    shown = [trace for trace in lines if trace.visible]
    assert len(lines) == 2 * len(shown) == 2 * (3 * 2 + 2 * 2)  # two metrics; three partitions kept and cut, two as circuits
    own = table.filter(method="regions", metric="logit_diff", ablation="node", part="circuit", averaging="ratio of means").sort("n_features")
    line = next(trace for trace in shown if trace.name == "regions")
    assert list(line.x) == pytest.approx([n / 1000 for n in own["n_features"]])
    assert list(line.y) == own["value"].to_list()
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["logit diff", "accuracy"]
    hidden = figure.layout.updatemenus[0].buttons[1].args[0]["visible"]
    assert [bool(trace.visible) for trace in figure.data] == [not value for value in hidden]
    named = [trace.name for trace in figure.data if trace.showlegend and trace.visible]
    assert sorted(named) == ["features", "random blocks", "regions"]


def test_selectivity_has_every_interval_and_the_reference_no_difference() -> None:
    table = made_selectivity()
    value, difference, impact = selectivity_figure(table).data
    assert list(value.x) == table["value"].to_list()
    assert (np.asarray(value.x) + value.error_x.array).tolist() == pytest.approx(table["high"].to_list())
    assert (np.asarray(value.x) - value.error_x.arrayminus).tolist() == pytest.approx(table["low"].to_list())
    assert len(difference.x) == table.height - 1
    assert len(impact.x) == table.height
    assert set(table.columns) == set(SELECTIVITY)


def test_drives_go_upwards_with_their_sign_and_stand_against_their_effect() -> None:
    drives, nodes = made_drives(), made_nodes()
    figure = drives_figure(drives, nodes)
    curves = dict.fromkeys(("raises the metric", "lowers the metric"), 0)
    for trace in figure.data:
        if trace.mode == "lines" and trace.showlegend is False:
            curves[trace.name] += int(np.isnan(np.asarray(trace.x, dtype=float)).sum())
            pieces = np.asarray(trace.y, dtype=float).reshape(-1, 16)[:, :15]
            assert (np.diff(pieces, axis=1) > 0).all()
    positive = int((drives["weight"] >= 0).sum())
    assert curves == {"raises the metric": positive, "lowers the metric": drives.height - positive}
    units = next(trace for trace in figure.data if trace.name == "units")
    assert len(units.x) == len({*drives["source"], *drives["target"]})
    rank = spearmanr(drives["weight"], drives["effect"]).statistic
    assert any(f"rank correlation {rank:.2f} over {drives.height} edges".replace("-", "−") in note.text for note in figure.layout.annotations)
    dots = next(trace for trace in figure.data if trace.name == "effects")
    assert (np.sign(dots.x) == np.sign(drives["weight"].to_numpy())).all()
    assert HOSTILE not in figure.to_json()


def test_one_edge_between_regions_has_no_rank_correlation() -> None:
    figure = drives_figure(made_drives().head(1), made_nodes())
    assert any("undefined over 1 edges" in note.text for note in figure.layout.annotations)


def test_likeness_has_a_circle_for_each_block_with_a_cosine() -> None:
    blocks = pl.DataFrame({
        "site": ["a", "a", "a", "b"], "block": [0, 1, 2, 0], "size": [4, 1, 9, 2], "mean_correlation": [0.5, None, 0.1, 0.4],
        "mean_cosine": [0.1, None, 0.3, None], "label": [HOSTILE, None, None, None], "automatic_label": ["x", "y", "z", "w"],
    })  # fmt: skip
    sites = pl.DataFrame({
        "site": ["a", "b"], "rank_correlation": [0.25, None], "cosine_ami": [None, None], "mean_cosine_outside": [0.0, None],
        "mean_correlation_outside": [0.01, 0.0],
    })  # fmt: skip
    inside, across = likeness_figure(blocks, sites).data
    assert list(zip(inside.x, inside.y)) == [(0.1, 0.5), (0.3, 0.1)]
    assert (across.x[0], across.y[0]) == (0.0, 0.01)
    assert HOSTILE not in likeness_figure(blocks, sites).to_json()
