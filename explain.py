"""One target of an ablated run, or one edge's attribution, step by step on one sequence of a run, with names and a drawing.

The model, its dictionaries, the baseline and the output are those of the run. What is shown are the definitions, computed plainly
(`analysis.steps`); the engines compute the same for all targets at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from .analysis.circuits import Circuit
from .analysis.drawings import ablation_drawing, attribution_drawing
from .analysis.masks import edge_set
from .analysis.notes import CONTEXTS, feature_notes, strongest_contexts
from .analysis.steps import AblationSteps, AttributionSteps, NotAStep, TargetSteps, ablation_steps, attribution_steps, differ
from .analysis.study import Study, StudyOptions, open_study
from .model.ablation import AblationBatch
from .model.masks import ERROR
from .model.metrics import Metric
from .model.sites import OUTPUT, Site, parse_site
from .model.tasks import Pair
from .queries.statistics import StatisticsStore
from .queries.store import GraphStore
from .queries.subgraphs import RunRow, run_sequences


@dataclass(frozen=True, eq=False)
class Scene:
    """One sequence of a run, ready to be ablated: `tokens` are the clean prompt's, `names` those of nodes by (site, number)."""

    study: Study
    batch: AblationBatch
    pair: Pair
    tokens: tuple[str, ...]
    names: Mapping[tuple[str, int], str]

    @property
    def subtitle(self) -> str:
        """The sequence, its answers, and the baseline."""
        pair = self.pair
        of = f"{self.study.target.name.replace('_', ' ')} of “{pair.answer}” and “{pair.wrong_answer}”"
        told = f"clean “{pair.clean}”, corrupted “{pair.corrupt}”; {of}; baseline: {self.study.baseline_name}"
        return f"{told}. {self.study.run.model.partition('@')[0]}, run {self.study.run.key}."


def open_scene(
    store: GraphStore, statistics: StatisticsStore | None, atlas: Path, run: RunRow, *, sequence: str | None = None, task: str | None = None,
    options: StudyOptions | None = None,
) -> Scene:  # fmt: skip
    """Load a run's model and take one of its sequences: by the beginning of its key, else the first of a task, else of all.

    Raises `NotAStep` where there is none such, and what `open_study` raises.
    """
    done = run_sequences(store, run.key)
    fitting = done if task is None else done.filter(pl.col("task") == task)
    if sequence is not None:
        fitting = fitting.filter(pl.col("key").str.starts_with(sequence))
    if fitting.is_empty() or (sequence is not None and fitting.height > 1):
        what = f"{fitting.height} sequences" if fitting.height else "no sequence"
        asked = " and ".join([*([f"task {task!r}"] if task else []), *([f"key {sequence!r}…"] if sequence else [])]) or "the run"
        raise NotAStep(f"{what} of run {run.key} fit {asked}: `featlas query sequences --param run={run.key[:8]}` lists them")
    study = open_study(store, run, options or StudyOptions(), atlas)
    row = fitting.row(0, named=True)
    pair = Pair(row["clean"], row["corrupt"], row["answer"], row["wrong_answer"], row["task"])
    seed = study.seeds[0]
    among = [Pair(r["clean"], r["corrupt"], r["answer"], r["wrong_answer"], r["task"]) for r in done.iter_rows(named=True)]
    (batch,) = study.batches([pair], seed, among)
    tokens = tuple(study.model.tokenizer.decode([token]) for token in batch.pairs.clean[0].tolist())
    return Scene(study, batch, pair, tokens, _names(statistics, study))


def _names(statistics: StatisticsStore | None, study: Study) -> dict[tuple[str, int], str]:
    """What nodes are called, by (site, number)."""
    contexts = pl.DataFrame(schema=CONTEXTS)
    measured = statistics.latest_run(study.run.model, study.run.dictionaries) if statistics is not None else None
    if statistics is not None and measured is not None:
        contexts = strongest_contexts(statistics, measured.run, study.features["key"].to_list())
    notes = feature_notes(study.features, contexts, output=study.target.name.replace("_", " "))
    number = pl.when(pl.col("kind") == "error").then(ERROR).when(pl.col("kind") == "output").then(0).otherwise(pl.col("index"))
    rows = notes.join(study.features.select("key", "site", number.alias("number")), on="key")
    return {(site, node): name for site, node, name in rows.select("site", "number", "name").iter_rows()}


def parse_node(name: str) -> tuple[Site, int]:
    """`resid_11/696`, `resid_11/error`, `y`. Raises `NotAStep`."""
    site, _, index = name.rpartition("/")
    if name == OUTPUT.name:
        return OUTPUT, 0
    if not site or not (index == "error" or index.isdecimal()):
        raise NotAStep(f"{name!r} names no node: write site/index (resid_11/696), site/error, or y")
    return parse_site(site), ERROR if index == "error" else int(index)


@dataclass(frozen=True, eq=False)
class ExplainedAblation:
    """The steps of a whole ablated pass, one target of which is looked at."""

    scene: Scene
    steps: AblationSteps
    target: TargetSteps
    n_edges: int

    @property
    def svg(self) -> str:
        """The drawing."""
        title = f"One ablated forward pass: a circuit of {self.n_edges:,} edges"
        return ablation_drawing(self.steps, self.target, self.scene.names, self.scene.tokens, title=title, subtitle=self.scene.subtitle)


@dataclass(frozen=True, eq=False)
class ExplainedAttribution:
    """The steps of one edge's attribution."""

    scene: Scene
    steps: AttributionSteps

    @property
    def svg(self) -> str:
        """The drawing."""
        n, metric = len(self.steps.steps), self.scene.study.target.name.replace("_", " ")
        method = "integrated gradients" if n > 1 else "attribution patching"
        title, said = f"One attribution: {method}, {n} step{'s' * (n != 1)}", self.scene.subtitle
        return attribution_drawing(self.steps, self.scene.names, self.scene.tokens, title=title, subtitle=said, metric=metric)


def explain_ablation(scene: Scene, circuit: Circuit, target: str | None = None, position: int | None = None) -> ExplainedAblation:
    """A circuit alone alive on the scene's sequence. The target looked at is the one whose edges bring most, among features, unless named."""
    if not _measures_logits(scene):
        raise NotAStep(f"steps of an ablation are shown of a metric of the logits: this run's output is {scene.study.target.name}")
    edges = edge_set(circuit.edges, circuit.nodes, scene.study.graph)
    steps = ablation_steps(scene.batch, edges)
    if target is None:
        chosen = _telling(steps.targets)
    else:
        site, node = parse_node(target)
        chosen = steps.of(site.name, node, position)
    return ExplainedAblation(scene, steps, chosen, circuit.n_edges)


def _measures_logits(scene: Scene) -> bool:
    return isinstance(getattr(scene.batch.clean.target, "metric", None), Metric)


def _telling(targets: Sequence[TargetSteps]) -> TargetSteps:
    """The feature that is alive in the ablated run, off its baseline, and that most of a circuit's edges lead into."""
    features = [one for one in targets if one.site != OUTPUT.name and one.node != ERROR] or list(targets)
    moved = lambda one: one.value != 0 and differ(one.value, one.baseline)
    return max(features, key=lambda one: (moved(one), min(len(one.sources), 4), abs(one.value - one.baseline)))


def explain_attribution(
    scene: Scene, source: str, target: str, *, source_position: int | None = None, target_position: int | None = None, steps: int | None = None
) -> ExplainedAttribution:
    """One edge on the scene's sequence. Positions are where the nodes change most unless given; steps the run's own.

    Raises `NotAStep` for a position that the sequence does not have.
    """
    (source_site, source_node), (target_site, target_node) = parse_node(source), parse_node(target)
    last = scene.batch.clean.length - 1
    for name, given in (("source", source_position), ("target", target_position)):
        if given is not None and not 0 <= given <= last:
            raise NotAStep(f"the {name}'s position {given} is none of the sequence's: 0 to {last}")
    dest = last if target_site == OUTPUT else _moves_most(scene, target_site, target_node, last) if target_position is None else target_position
    origin = _moves_most(scene, source_site, source_node, dest) if source_position is None else source_position
    n = int(str(scene.study.run.properties.get("steps") or 10)) if steps is None else steps
    return ExplainedAttribution(scene, attribution_steps(scene.batch, (source_site, source_node, origin), (target_site, target_node, dest), n))


def _moves_most(scene: Scene, site: Site, node: int, last: int) -> int:
    """The position up to `last` where a node is furthest from its baseline. Raises `NotAStep` for a node that the run does not have."""
    if site not in scene.batch.base:
        raise NotAStep(f"run {scene.study.run.key} has no site {site.name}: it has {', '.join(own.name for own in scene.batch.base)}")
    clean, base = scene.batch.clean.nodes[site], scene.batch.base[site]
    if node >= clean.features.shape[-1]:
        raise NotAStep(f"{site.name} has no feature {node}: its dictionary has {clean.features.shape[-1]:,}")
    if node == ERROR:
        moved = (clean.error - base.error)[0].norm(dim=-1)
    else:
        moved = (clean.features - base.features)[0, :, node].abs()
    return int(moved[: last + 1].argmax())
