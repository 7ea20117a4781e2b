"""The growth figures as one SVG, small multiples with logarithmic axes: python -m benchmarks.plot FIGURES.json OUTPUT.svg."""

import json
import math
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN, COLUMNS = 300, 210, 46, 3
INK, SECOND, GRID = "#24476b", "#b3541e", "#dddddd"


def panel(what: str, points: list[dict[str, Any]], left: float, top: float) -> list[str]:
    """One panel: seconds (blue) and peak memory (orange) against what grows."""
    series = {"cpu": (INK, "CPU seconds"), "peak_gb": (SECOND, "peak GB")}
    xs = [math.log10(p["value"]) for p in points]
    ys = [math.log10(max(p[name], 1e-2)) for p in points for name in series]
    low_y, high_y = math.floor(min(ys)), math.ceil(max(ys))
    low_x, high_x = min(xs), max(xs)
    x = lambda v: left + MARGIN + (math.log10(v) - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - 1.4 * MARGIN)
    y = lambda v: top + HEIGHT - MARGIN - (math.log10(max(v, 1e-2)) - low_y) / (high_y - low_y) * (HEIGHT - 1.9 * MARGIN)
    out = [f'<text x="{left + MARGIN}" y="{top + 18}" font-weight="600">{what}</text>']
    for power in range(low_y, high_y + 1):
        at = y(10**power)
        out.append(f'<line x1="{left + MARGIN}" x2="{left + WIDTH - 0.4 * MARGIN}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        out.append(f'<text x="{left + MARGIN - 6}" y="{at + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    out += [f'<text x="{x(p["value"]):.1f}" y="{top + HEIGHT - MARGIN + 16}" text-anchor="middle">{p["value"]}</text>' for p in points]
    for i, (name, (colour, label)) in enumerate(series.items()):
        path = " ".join(f"{x(p['value']):.1f},{y(p[name]):.1f}" for p in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        out += [f'<circle cx="{x(p["value"]):.1f}" cy="{y(p[name]):.1f}" r="2.6" fill="{colour}"/>' for p in points]
        out.append(f'<text x="{left + MARGIN + 95 * i}" y="{top + HEIGHT - 10}" fill="{colour}">{label}</text>')
    return out


def draw(figures: list[dict[str, Any]]) -> str:
    """The whole figure."""
    groups = [(what, list(points)) for what, points in groupby(figures, key=lambda p: p["what"])]
    rows = -(-len(groups) // COLUMNS)
    parts = [
        line
        for i, (what, points) in enumerate(groups)
        for line in panel(what, points, i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT)
    ]
    size = f'width="{COLUMNS * WIDTH}" height="{rows * HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="#333333"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="white"/>', f"<g {style}>"]
    return "\n".join([*head, *parts, "</g></svg>"])


# -- how a graph's stores and analyses grow (benchmarks/big_graphs.py) -------------------------------------------------

PALETTE = ("#24476b", "#b3541e", "#3b7d4f", "#7a4b8c", "#8a7a1f", "#4a8fa8", "#a83254", "#555555", "#c08bd0")
Curve = list[tuple[float, float]]


def curves(title: str, series: dict[str, Curve], left: float, top: float, width: float, height: float) -> list[str]:
    """One panel, both axes logarithmic: a line a name, which stands at its last point's height beside the panel."""
    points = [point for line in series.values() for point in line if point[1] > 0]
    xs, ys = [math.log10(x) for x, _ in points], [math.log10(y) for _, y in points]
    low_x, high_x, low_y, high_y = min(xs), max(xs), math.floor(min(ys)), math.ceil(max(ys))
    plot_w, plot_h, base = width - 210, height - 70, top + height - 34
    at_x = lambda v: left + 46 + (math.log10(v) - low_x) / max(high_x - low_x, 1e-9) * plot_w
    at_y = lambda v: base - (math.log10(v) - low_y) / max(high_y - low_y, 1) * plot_h
    out = [f'<text x="{left + 46}" y="{top + 18}" font-weight="600">{title}</text>']
    for power in range(low_y, high_y + 1):
        y = at_y(10.0**power)
        out.append(f'<line x1="{left + 46}" x2="{left + 46 + plot_w}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        out.append(f'<text x="{left + 40}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    sizes = sorted({x for x, _ in points})
    out += [f'<text x="{at_x(x):.1f}" y="{base + 16}" text-anchor="middle">1e{math.log10(x):.0f}</text>' for x in sizes]
    taken: list[float] = []
    last = {name: at_y(line[-1][1]) for name, line in series.items() if line and line[-1][1] > 0}
    for i, (name, y) in enumerate(sorted(last.items(), key=lambda item: item[1])):
        colour = PALETTE[i % len(PALETTE)]
        line = [(at_x(x), at_y(v)) for x, v in series[name] if v > 0]
        out.append(f'<polyline points="{" ".join(f"{x:.1f},{v:.1f}" for x, v in line)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        out += [f'<circle cx="{x:.1f}" cy="{v:.1f}" r="2.6" fill="{colour}"/>' for x, v in line]
        place = max([y, *(other + 14 for other in taken)])
        taken.append(place)
        out.append(f'<text x="{line[-1][0] + 8:.1f}" y="{place + 4:.1f}" fill="{colour}">{name}</text>')
    return out


def draw_growth(figures: list[dict[str, Any]]) -> str:
    """The figure of docs/growth.md: time, memory and disk against the number of edges, on both stores."""
    ok = [row for row in figures if "failed" not in row]
    here = lambda row, name, column, store: (row["step"], row["store"]) == (name, store) and row.get(column)
    of = lambda name, column, store: sorted((row["edges"], row[column]) for row in ok if here(row, name, column, store))
    both = lambda names, column: {f"{name}, {store}": of(name, column, store) for name in names for store in ("embedded", "server")}
    queries: dict[str, Curve] = {}
    for store in ("embedded", "server"):
        by_size: dict[int, list[float]] = {}
        for row in ok:
            if row["store"] == store and row["step"].startswith("query "):
                by_size.setdefault(row["edges"], []).append(row["cpu"])
        for label, place in (("median", 0.5), ("9 of 10 below", 0.9), ("slowest", 1.0)):
            line = [(size, sorted(times)[min(len(times) - 1, int(place * len(times)))]) for size, times in sorted(by_size.items())]
            queries[f"{label}, {store}"] = [(x, y) for x, y in line if y > 0]
    analyses = sorted({row["of"] for row in ok} & {"analyze circuit", "analyze communities", "analyze rank", "compare", "report", "atlas check"})
    panels = [
        ("CPU seconds: writing the edges, closing the run", both(["ingest", "close run"], "cpu")),
        ("Megabytes on the disk, edges and means", both(["close run"], "disk_mb")),
        ("CPU seconds: the named queries", queries),
        ("CPU seconds: analyses, embedded", {name: of(name, "cpu", "embedded") for name in analyses}),
        ("CPU seconds: analyses, server", {name: of(name, "cpu", "server") for name in analyses}),
        ("Greatest memory of the process, MB, embedded", {n: of(n, "peak_mb", "embedded") for n in ["ingest", "close run", *analyses]}),
    ]
    width, height, columns = 520, 260, 2
    shown = [(title, {name: line for name, line in lines.items() if line}) for title, lines in panels]
    shown = [(title, lines) for title, lines in shown if lines]
    parts = [
        line for i, (title, lines) in enumerate(shown) for line in curves(title, lines, i % columns * width, i // columns * height, width, height)
    ]  # fmt: skip
    size = f'width="{columns * width}" height="{-(-len(shown) // columns) * height}"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="white"/>']
    return "\n".join([*head, '<g font-family="sans-serif" font-size="11" fill="#333333">', *parts, "</g></svg>"])


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text(encoding="utf-8"))["figures"]) + "\n", encoding="utf-8")
