"""Figures of an ablation study on one self-contained HTML page: it opens offline, and nothing in it comes from anywhere else.

1. The exhibits: each is a figure with its question, what is held fixed, how to read it, what it found and its numbers as a table.
   `sweep_exhibits` makes them of a sweep over sizes, the other functions of one frame each. What they find is computed by `faithfulness`.
2. `gallery` puts them on a page. Every name, label and setting is escaped; plotly.js is there once.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

import polars as pl

from ..errors import UserError
from .faithfulness import (
    ATTRIBUTION,
    CIRCUIT,
    DEFAULT_BOOTSTRAP,
    HELD_OUT,
    POOLED,
    RATIO_OF_MEANS_ONLY,
    Averaging,
    Bootstrap,
    areas,
    faithfulness,
    matched,
    per_sequence,
    smallest,
    with_sizes,
)  # fmt: skip
from .plots import (
    Figure,
    areas_figure,
    distribution_figure,
    effects_figure,
    embedded,
    faithfulness_figure,
    improvement_figure,
    matched_figure,
    plotly_script,
    removal_figure,
    stated,
)  # fmt: skip


class UnknownCandidates(UserError):
    """Areas of a sweep whose full candidate set is not known."""


_SHOWN_ROWS = 300
_FILE_ROWS = 20_000


@dataclass(frozen=True)
class Exhibit:
    """One figure and what a reader needs beside it. `name` is the figure's id on the page; `table` holds its numbers."""

    name: str
    title: str
    question: str
    fixed: str
    reading: str
    figure: Figure
    table: pl.DataFrame
    findings: Sequence[str] = ()


# --- the page ---------------------------------------------------------------------------------------------------------


def gallery(
    exhibits: Sequence[Exhibit], title: str, *, subtitle: str = "", settings: Sequence[tuple[str, str]] = (), commands: Sequence[str] = ()
) -> str:
    """The page as text, about 5 MB, nearly all of it plotly.js. `settings` are (name, value); `commands` make the page or go on from it."""
    page = Template(resources.files(__package__).joinpath("gallery.html").read_text(encoding="utf-8"))
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in settings)
    end = f'<section><h2>Settings</h2><table class="settings">{rows}</table></section>' if settings else ""
    end += f"<section><h2>Commands</h2><pre>{html.escape(chr(10).join(commands))}</pre></section>" if commands else ""
    return page.substitute(
        title=html.escape(title), subtitle=html.escape(subtitle), plotly=plotly_script(), end=end,
        contents="".join(f'<li><a href="#{html.escape(e.name)}-exhibit">{html.escape(e.title)}</a></li>' for e in exhibits),
        sections="".join(map(_section, exhibits)),
    )  # fmt: skip


def _section(exhibit: Exhibit) -> str:
    """An exhibit: caption, findings, figure, numbers."""
    said = (("Question", exhibit.question), ("Held fixed", exhibit.fixed), ("How to read it", exhibit.reading))
    caption = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in said if text)
    findings = "".join(f"<li>{html.escape(finding)}</li>" for finding in exhibit.findings)
    return (
        f'<section id="{html.escape(exhibit.name)}-exhibit"><h2>{html.escape(exhibit.title)}</h2><dl>{caption}</dl>'
        + (f'<ul class="findings">{findings}</ul>' if findings else "")
        + f'<div class="figure">{embedded(exhibit.figure, exhibit.name)}</div>{_numbers(exhibit)}</section>'
    )


def _numbers(exhibit: Exhibit) -> str:
    """The table, opened by a click, and the same numbers as a file to save."""
    frame = exhibit.table
    data = base64.b64encode(_flat(frame).head(_FILE_ROWS).write_csv().encode()).decode()
    part = f" (the first {_FILE_ROWS:,} rows)" if frame.height > _FILE_ROWS else ""
    link = f'<a download="{html.escape(exhibit.name)}.csv" href="data:text/csv;base64,{data}">save as CSV{part}</a>'
    shown = f"the first {_SHOWN_ROWS:,} of {frame.height:,} rows" if frame.height > _SHOWN_ROWS else f"{frame.height:,} rows"
    return f'<details><summary>The numbers: {shown}</summary><div class="scroll">{_table(frame.head(_SHOWN_ROWS))}</div>{link}</details>'


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame without lists, as CSV has none."""
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(" ") for name in lists)


def _table(frame: pl.DataFrame) -> str:
    """A table of the columns that say something; `low` and `high` in one column, null as a dash."""
    columns = [name for name in frame.columns if frame[name].drop_nulls().len()]
    interval = {"low", "high"} <= set(columns)
    columns = [name for name in columns if name != "high" or not interval]
    texts = {name: _texts(frame[name]) for name in (*columns, *(["high"] if interval else []))}
    if interval:
        texts["low"] = ["–" if low == "–" else f"{low} … {high}" for low, high in zip(texts["low"], texts["high"])]
    number = {name: frame.schema[name].is_numeric() for name in columns}
    head = "".join(
        f"<th{' class=number' if number[name] else ''}>{html.escape('95 % interval' if interval and name == 'low' else name.replace('_', ' '))}</th>"
        for name in columns
    )
    cells = ([f"<td{' class=number' if number[name] else ''}>{html.escape(text)}</td>" for text in texts[name]] for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join('<tr>' + ''.join(row) + '</tr>' for row in zip(*cells))}</tbody></table>"


def _texts(column: pl.Series) -> list[str]:
    """A column as a reader wants it: counts with commas, other numbers with four digits, lists shortened."""
    if column.dtype.is_integer():
        return ["–" if value is None else f"{value:,}" for value in column]
    if column.dtype.is_float():
        return ["–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "−") for value in column]
    if isinstance(column.dtype, pl.List):
        return ["–" if values is None else ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values) for values in column]
    return ["–" if value is None else str(value) for value in column]


# --- exhibits of a sweep ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GalleryOptions:
    """How a sweep is shown: the metric looked at first, others that get a figure too, and how φ is averaged and compared.

    `candidates`: how many edges or nodes are all (as `faithfulness.areas` takes it); None, or a sweep that ends before them, leaves the areas out.
    """

    metric: str
    others: Sequence[str] = ()
    candidates: int | Mapping[str, int] | None = None
    whole_model: bool = False
    levels: Sequence[float] = (0.8, 0.9)
    averaging: Averaging = Averaging.MEAN_OF_RATIOS
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
    split: str = HELD_OUT

    def average(self, metric: str) -> Averaging:
        """The way of averaging that a metric has."""
        return Averaging.RATIO_OF_MEANS if metric in RATIO_OF_MEANS_ONLY else self.averaging


def sweep_exhibits(values: pl.DataFrame, sizes: pl.DataFrame, options: GalleryOptions) -> list[Exhibit]:
    """The exhibits of a sweep over sizes: faithfulness of the pooled sequences and of each task, methods at equal size, single sequences, areas.

    `values` and `sizes` are of schema `faithfulness.VALUES` and `SIZES`, of one baseline, as a `sweeps.Sweep` has them; shown is
    `options.split`.
    """
    rows = values.filter(pl.col("split") == options.split)
    own = rows.filter(pl.col("metric") == options.metric)
    tasks = own["task"].unique(maintain_order=True).to_list()
    shown = [_faithfulness(own, sizes, options, options.metric, None)]
    shown += [_faithfulness(own, sizes, options, options.metric, task) for task in tasks] if len(tasks) > 1 else []
    # a sweep of regions has no circuits of single edges, which others are matched to
    ours = own.filter((pl.col("method") == ATTRIBUTION) & (pl.col("ablation") == _reference(own)[1]))
    shown += [_matched(own, sizes, options)] if ours.height and own.select("method", "ablation").n_unique() > 1 else []
    shown += [_sequences(own, sizes, options)] if options.metric not in RATIO_OF_MEANS_ONLY else []
    shown += [_areas(own, options)] if _whole_grid(own, options) else []
    for metric in options.others:
        of_metric = rows.filter(pl.col("metric") == metric)
        shown += [_faithfulness(of_metric, sizes, options, metric, None)] if of_metric.height else []
    return shown


_HELD = "{}. The sequences, the baseline and the candidates are the same for every line."


def _faithfulness(values: pl.DataFrame, sizes: pl.DataFrame, options: GalleryOptions, metric: str, task: str | None) -> Exhibit:
    """Faithfulness and completeness against size, of one metric; of one task, or of all pooled."""
    own = values if task is None else values.filter(pl.col("task") == task)
    table = faithfulness(own, by=() if task is None else ("task",), averaging=(options.average(metric),), bootstrap=options.bootstrap)
    reached = smallest(table, sizes, levels=options.levels)
    table = with_sizes(table, sizes)
    where = "" if task is None else f", {task}"
    return Exhibit(
        name=identifier("faithfulness", metric, task or POOLED), title=f"Faithfulness and completeness: {metric}{where}",
        question="How much of what the model does is done by the circuit alone (faithfulness), and how much is left without it (completeness)?",
        fixed=_HELD.format(stated(table)),
        reading="φ is 1 where an ablated model does as well as the whole one, 0 where it does as the baseline. The upper row should rise early, "
        "the lower row fall early; a control as high as the circuit means that the circuit's edges are nothing special.",
        figure=faithfulness_figure(table, reached=reached, title=f"φ by {metric} against the size of the circuit{where}"),
        table=table.select(_FAITHFULNESS_COLUMNS), findings=_reaching(reached, table),
    )  # fmt: skip


_FAITHFULNESS_COLUMNS = (
    "method", "ablation", "part", "size", "n_nodes", "n_edges", "average_degree", "value", "low", "high", "n", "undefined_n", "n_draws", "draw_min",
    "draw_max", "mean_value", "mean_full", "mean_empty",
)  # fmt: skip


def identifier(*parts: str) -> str:
    """An id for an element of the page."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else "-" for c in part) for part in parts)


def _reaching(reached: pl.DataFrame, table: pl.DataFrame) -> list[str]:
    """What attribution's smallest circuits are, in words; the most faithful one where none reaches a level."""
    said = []
    for (ablation,), rows in reached.filter(pl.col("method") == ATTRIBUTION).sort("ablation", "level").group_by(["ablation"], maintain_order=True):
        done = rows.drop_nulls("value").iter_rows(named=True)
        said += [f"By {ablation} ablation, φ ≥ {row['level']:g} is first reached by {_described(row)}." for row in done]
        levels = " or ".join(f"{level:g}" for level in rows.filter(pl.col("value").is_null())["level"])
        own = table.filter((pl.col("method") == ATTRIBUTION) & (pl.col("ablation") == ablation) & (pl.col("part") == CIRCUIT)).drop_nulls("value")
        best = own.sort("value", "size", descending=[True, False]).head(1).to_dicts()
        if not best:
            said.append(f"By {ablation} ablation φ is undefined at every size: by this metric the task has no effect beyond its error.")
        elif levels:
            greatest = f"; the greatest is of {_described(best[0])}" if best else ""
            said.append(f"By {ablation} ablation, no circuit of the sweep reaches φ ≥ {levels}{greatest}.")
    return said


def _described(row: Mapping[str, Any]) -> str:
    """A circuit by its size and φ."""
    size = f"{row['n_nodes']:,.0f} nodes and {row['n_edges']:,.0f} edges" if row["n_nodes"] is not None else f"size {row['size']:,}"
    return f"{size}: φ = {row['value']:.3f}{_interval(row['low'], row['high'])}".replace("-", "−")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.3f} … {high:.3f})".replace("-", "−")


def _reference(values: pl.DataFrame) -> tuple[str, str]:
    """What the others are matched to: attribution's circuits, by edge ablation where there is any."""
    ablations = values["ablation"].unique().sort().to_list()
    return ATTRIBUTION, "edge" if "edge" in ablations else ablations[0]


def _matched(values: pl.DataFrame, sizes: pl.DataFrame, options: GalleryOptions) -> Exhibit:
    """How far every method is above or below attribution by edge ablation at equal size."""
    reference = _reference(values)
    frames = [
        matched(values, sizes, reference, on=on, averaging=(options.average(options.metric),), bootstrap=options.bootstrap)
        for on in ("n_edges", "n_nodes", "average_degree", "size")
    ]
    table, name = pl.concat(frames), f"{reference[0]} by {reference[1]} ablation"
    return Exhibit(
        name="matched", title="Methods at equal size",
        question=f"At equal edges, nodes or average degree, which method is more faithful than {name}, and which is less?",
        fixed=_HELD.format(stated(table)),
        reading="Above 0 a method has the higher φ, below 0 the lower. The bars are 95 % bootstrap intervals of the difference, the same sequences "
        "drawn for both: one that crosses 0 decides nothing. Between the measured sizes φ is interpolated, never beyond them.",
        figure=matched_figure(table, title=f"φ beside that of {name} at equal size"),
        table=table.drop("metric", "baseline", "split", "task", "averaging", "reference", "reference_ablation"), findings=_verdicts(table),
    )  # fmt: skip


def _verdicts(table: pl.DataFrame) -> list[str]:
    """At how many sizes each method is better, worse or undecided: at equal edges, or beside the circuit it is a control of where none are equal."""
    said = []
    for (method, ablation), every in table.drop_nulls("difference").group_by(["method", "ablation"], maintain_order=True):
        equal = every.filter(pl.col("on") == "n_edges")
        rows = equal if equal.height else every.filter(pl.col("on") == "size")
        better, worse, n = int((rows["low"] > 0).sum()), int((rows["high"] < 0).sum()), rows.height
        mean = f"{rows['difference'].to_numpy().mean():+.3f}".replace("-", "−")
        counts = f"higher at {better}, lower at {worse} and undecided at {n - better - worse} of {n} sizes; mean difference {mean}"
        said.append(f"{method}, {ablation} ablation: {'at equal edges' if equal.height else 'beside the circuit it is matched to'} φ is {counts}.")
    return said


def _sequences(values: pl.DataFrame, sizes: pl.DataFrame, options: GalleryOptions) -> Exhibit:
    """φ of single sequences at one size: attribution's smallest circuit that reaches the first level, else its middle size."""
    table = faithfulness(values, averaging=(options.average(options.metric),), bootstrap=options.bootstrap)
    reached = smallest(table, sizes, levels=options.levels[:1]).filter(pl.col("method") == ATTRIBUTION).sort("ablation").drop_nulls("size")
    known = values["size"].unique().sort()
    size = int(reached["size"][0]) if reached.height else int(known[len(known) // 2])
    rows = per_sequence(values).filter((pl.col("part") == CIRCUIT) & (pl.col("size") == size))
    why = f"the smallest to reach {options.levels[0]:g}" if reached.height else f"none reaches {options.levels[0]:g}"
    setting = f"{stated(rows.drop('task'))} · {rows['sequence'].n_unique():,} sequences"
    undefined = max(rows.group_by("method", "ablation").agg(pl.col("ratio").null_count())["ratio"].to_list(), default=0)
    return Exhibit(
        name="sequences", title="φ of single sequences", question="Is the mean made by all sequences, or by a few?",
        fixed=f"{setting}. Every circuit keeps {size:,} candidates ({why}).",
        reading="Each dot is a sequence; the box holds the middle half, the dashed line is the mean. A sequence on which the task has no effect has "
        "no φ: it is counted under its method, not drawn. φ is not bounded: where the whole model hardly differs from the baseline it can be far "
        "from 0 and 1.",
        figure=distribution_figure(rows, title=f"φ of each sequence at size {size:,}", subtitle=setting),
        table=rows.select("method", "ablation", "sequence", "task", "value", "full", "empty", "ratio"),
        findings=[f"{undefined} sequences are undefined."] if undefined else [],
    )  # fmt: skip


def _whole_grid(values: pl.DataFrame, options: GalleryOptions) -> bool:
    """Whether attribution was measured up to all candidates, as areas need it."""
    if options.candidates is None:
        return False
    largest = dict(values.filter(pl.col("method") == ATTRIBUTION).group_by("ablation").agg(pl.col("size").max()).iter_rows())
    if options.whole_model or isinstance(options.candidates, int):
        return options.whole_model or all(size == options.candidates for size in largest.values())
    return all(size == options.candidates.get(ablation) for ablation, size in largest.items())


def _areas_of(values: pl.DataFrame, options: GalleryOptions) -> pl.DataFrame:
    """`faithfulness.areas` of the metric looked at; raises `UnknownCandidates` where their number was not given."""
    if options.candidates is None:
        raise UnknownCandidates("areas and shares are of the candidates: say how many edges or nodes they are")
    way, whole = (options.average(options.metric),), options.whole_model
    return areas(completed(values, options.candidates), options.candidates, whole_model=whole, averaging=way, bootstrap=options.bootstrap)


def completed(values: pl.DataFrame, candidates: int | Mapping[str, int]) -> pl.DataFrame:
    """`values` with attribution's rows of all candidates for each other method that was not measured there.

    All candidates are one circuit, whatever order they were taken in; a draw of another method gets the mean of attribution's draws.
    """
    number = pl.lit(candidates) if isinstance(candidates, int) else pl.col("ablation").replace_strict(candidates, return_dtype=pl.Int64)
    point = ["ablation", "part", "size", "metric", "baseline", "split", "sequence", "task"]
    of_all = values.filter((pl.col("method") == ATTRIBUTION) & (pl.col("size") == number))
    of_all = of_all.group_by(point, maintain_order=True).agg(pl.col("value", "full", "empty").mean())
    lines = values.group_by("method", "ablation", "part", maintain_order=True).agg(largest=pl.col("size").max(), draw=pl.col("draw").unique().sort())
    short = lines.filter((pl.col("largest") < number) & (pl.col("method") != ATTRIBUTION)).explode("draw").drop("largest")
    return pl.concat([values, short.join(of_all, on=["ablation", "part"]).select(values.columns)])


def _areas(values: pl.DataFrame, options: GalleryOptions) -> Exhibit:
    """CPR and CMD of every method."""
    table = _areas_of(values, options)
    return Exhibit(
        name="areas", title="Areas over the whole sweep",
        question="Which method finds the more faithful circuits over all sizes, not at one that was chosen?", fixed=_HELD.format(stated(table)),
        reading="CPR is the area under φ over the share of the candidates kept, CMD the area between φ and 1. Whiskers are 95 % intervals. "
        "All candidates are one circuit, whatever order they were taken in: every method ends where attribution does.",
        figure=areas_figure(table, title=f"CPR and CMD by {options.metric}"),
        table=table.select("area", "method", "ablation", "value", "low", "high", "n", "undefined_n", "n_candidates", "shares"),
    )  # fmt: skip


# --- exhibits of one frame --------------------------------------------------------------------------------------------


def improvement_exhibit(values: pl.DataFrame, sizes: pl.DataFrame, options: GalleryOptions, gains: pl.DataFrame | None = None) -> Exhibit:
    """What pruning by measured effect gains over attribution: `values` of both, `gains` as `plots.improvement_figure` takes them.

    Without `gains` they are the differences of CPR, without interval.
    """
    own = values.filter((pl.col("metric") == options.metric) & (pl.col("split") == options.split))
    cpr = _areas_of(own, options).filter(pl.col("area") == "CPR")
    table = with_sizes(faithfulness(own, averaging=(options.average(options.metric),), bootstrap=options.bootstrap), sizes)
    number = pl.col("ablation").replace_strict(dict(cpr.select("ablation", "n_candidates").iter_rows()), return_dtype=pl.Int64)
    table = table.with_columns((pl.col("size") / number).alias("share"))
    if gains is None:
        both = cpr.filter(pl.col("method") != ATTRIBUTION).join(cpr.filter(pl.col("method") == ATTRIBUTION), on="ablation", suffix="_of_attribution")
        gains = both.select("method", "ablation", pl.col("value") - pl.col("value_of_attribution"), low=None, high=None)
    said = [
        f"{method}, {ablation} ablation: CPR {value:+.3f}{_interval(low, high)} against attribution.".replace("-", "−")
        for method, ablation, value, low, high in gains.select("method", "ablation", "value", "low", "high").iter_rows() if value is not None
    ]  # fmt: skip
    return Exhibit(
        name="improvement", title="Pruning by measured instead of estimated effect",
        question="How much more faithful do circuits get when edges are dropped by what cutting them does, not by what attribution estimates?",
        fixed=_HELD.format(stated(table)),
        reading="Each line is φ of the circuits of one method; what is shaded between it and attribution's is gained (on the linear axis: in CPR).",
        figure=improvement_figure(table, gains, title=f"φ by {options.metric} against the share of the candidates kept"),
        table=table.filter(pl.col("part") == CIRCUIT).select("share", *_FAITHFULNESS_COLUMNS), findings=said,
    )  # fmt: skip


def effects_exhibit(effects: pl.DataFrame, fixed: str) -> Exhibit:
    """Estimated against measured effects of single edges, as `plots.effects_figure` takes them; `fixed` names metric, baseline and sequences."""
    rows = effects.drop_nulls(["estimated", "measured"])
    said = []
    for (within,), part in rows.group_by(["within"], maintain_order=True):
        same = part.select(((pl.col("estimated") * pl.col("measured")) > 0).mean()).item()
        said.append(f"In the {within}: cutting the edge moves the metric the way attribution says for {same:.0%} of {part.height:,} edges.")
    return Exhibit(
        name="effects", title="What attribution estimates, and what cutting the edge does",
        question="Does an edge's attribution predict what the metric loses when that edge alone is cut?", fixed=fixed,
        reading="On the dashed line both are equal. Above it cutting the edge costs more than estimated, below it less; in the upper left and lower "
        "right the sign is wrong. Attribution is linear: nonlinear sites and edges that stand in for one another are why the two differ.",
        figure=effects_figure(effects, title="Attribution of an edge against its ablation effect", subtitle=fixed),
        table=rows.sort(pl.col("measured").abs(), descending=True), findings=said,
    )  # fmt: skip


def removal_exhibit(removals: pl.DataFrame, fixed: str, *, quantity: str = "accuracy", name: str = "removals") -> Exhibit:
    """Tasks against what was removed from the model, of `task, removed, value, low, high`; `fixed` names what is the same in every cell."""
    return Exhibit(
        name=name, title="What each task loses when a part is removed", fixed=fixed,
        question="Does removing a part hurt only the task that it belongs to?",
        reading=f"Each cell is {quantity} on the row's task with the column's part removed, over its 95 % interval. A selective removal changes one "
        "row; a random part of equal size shows what removing anything does.",
        figure=removal_figure(removals, quantity=quantity, title=f"{quantity.capitalize()} by what is removed", subtitle=fixed), table=removals,
    )  # fmt: skip
