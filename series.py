"""Series: the same analysis over a list of models, checkpoints of one training run or sizes of one family, and how they differ from the last.

1. `members_of`: models by name (`EleutherAI/pythia-70m-deduped@step3000`), or the checkpoints of a folder that `featlas series train` made.
2. `measure_member`: a model's dictionaries (given, trained here, or its own neurons), how well it solves the task, the effective edges, and how
   faithful the circuits are on sequences that they were not found on.
3. `measure_series`: all of them, and each beside the last and the one before (`compare_members`): features matched by activation on the same text,
   and edges shared after matching, with nulls.

What is measured of a model is kept as soon as it is there: the same call goes on where it was interrupted.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path

import polars as pl

from .analysis.circuits import Circuit, EmptyCircuit, NoEdges, Selection, run_circuit
from .analysis.comparison_records import CURVES, VALUES
from .analysis.controls import Method
from .analysis.faithfulness import CIRCUIT, POOLED, Averaging, areas, faithfulness, smallest, with_sizes
from .analysis.graph_comparison import CompareOptions, Part, compare
from .analysis.graph_sides import BadMatching, SideOptions, read_side
from .analysis.matching import Matching, MatchOptions, match
from .analysis.study import Ablation, StudyOptions, open_study
from .analysis.sweeps import Sweep, SweepOptions, plan_sweep
from .errors import UserError
from .ingest.alignment import AlignOptions, Side, aligned_task, collect_aligned
from .ingest.effective import EdgeSettings
from .ingest.pipeline import EdgeOptions, ingest_edges
from .model.corpus import prompt_tokens, read_texts
from .model.dictionary_sources import SiteDictionaries, load_dictionaries
from .model.evaluation import evaluate_dictionaries
from .model.loading import LoadedModel, load_model
from .model.metrics import Metric
from .model.sites import Site, SiteKind, parse_site
from .model.small_models import HELD_OUT_FILE, LISTING, TEXTS_FILE, SmallModelOptions, read_series, train_small_model
from .model.solvability import check_task
from .model.tasks import load_task
from .model.training import TrainingOptions, corpus_digest, train_dictionaries
from .queries.series import SeriesRecord, put_part, read_part, write_series
from .queries.store import open_graph
from .queries.subgraphs import find_run
from .verdict import VerdictOptions, try_circuits

TRAINED, IDENTITY = "train", "identity"
KEY_LENGTH = 16


class BadSeries(UserError):
    """The models, or what is to be measured of them, make no series."""


@dataclass(frozen=True)
class Member:
    """One model of a series. model: what `load_model` takes. x: its place on the axis. name: what it is called. loss: if known, nats per token."""

    model: str
    x: float
    name: str
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class SeriesOptions:
    """What is measured of every model, in one atlas.

    dictionaries: `train` (small ones, trained for each model on `texts`), `identity`, or what `load_dictionaries` takes, in which {model}, {name} and
    {x} stand for the member's. width, k, tokens: of trained ones. sites: None is every `resid` site for trained ones, all that there are for others.
    task, limit, steps, threshold, metric: of the edges. held_out: sequences on which circuits are tested. shares: their sizes, of the edges.
    texts: what dictionaries are trained on (see `read_texts`). matched: prompts of the task on which features are matched. draws: of each null.
    """

    atlas: Path
    graph: str | None = None
    task: str
    dictionaries: str = TRAINED
    texts: Path | None = None
    sites: tuple[str, ...] | None = None
    width: int = 256
    k: int = 8
    tokens: int = 60_000
    limit: int = 48
    held_out: int = 32
    shares: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    steps: int = 1
    threshold: float = 0.001
    metric: Metric = Metric.LOGIT_DIFF
    matched: int = 200
    draws: int = 10
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """Raise `BadSeries` for what cannot be."""
        for name in ("limit", "held_out", "draws", "matched", "width", "k", "tokens"):
            if getattr(self, name) < 1:
                raise BadSeries(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.dictionaries == TRAINED and self.texts is None:
            raise BadSeries("dictionaries that are to be trained need a text: name one with --texts, or take --dictionaries identity or a folder")
        if self.texts is not None and not self.texts.exists():
            raise BadSeries(f"--texts {self.texts}: there is no such file or folder")
        if any(not 0 <= share <= 1 for share in self.shares) or 1.0 not in self.shares:
            raise BadSeries(f"shares are {', '.join(map(str, self.shares))}: they lie between 0 and 1, and 1 is one of them")

    @cached_property
    def settings(self) -> dict[str, object]:
        """What determines the result, as plain values: everything but where it is kept and what it is computed on."""
        left_out = ("atlas", "graph", "device")
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name not in left_out}, default=str))


Report = Callable[[int, int, str], None]


# -- 1. The models -------------------------------------------------------------------------------------------


def members_of(models: Sequence[str], *, axis: Sequence[float] | None = None) -> list[Member]:
    """The models in the order given, or those of one folder of checkpoints by their steps.

    axis: the place of each; unless given the last number in its short name (`step3000`; `70m` is 70 million) where all have one, else 0, 1, 2, ….
    Raises `BadSeries` where there are fewer than two, or one twice.
    """
    folder = Path(models[0]) if len(models) == 1 else None
    if folder is not None and (folder / LISTING).is_file():
        saved = read_series(folder)
        members = [Member(str(folder / checkpoint.folder), float(checkpoint.step), checkpoint.folder, checkpoint.loss) for checkpoint in saved]
    else:
        found = [_number(model) for model in models]
        counted = all(number is not None for number in found) and len(set(found)) == len(found)
        places = found if counted else range(len(models))
        members = [Member(model, float(x or 0), name) for model, x, name in zip(models, places, _names(models))]
    if axis is not None:
        if len(axis) != len(members):
            raise BadSeries(f"{len(axis)} places are given for {len(members)} models: give one for each")
        members = [replace(member, x=float(x)) for member, x in zip(members, axis)]
    if len(members) < 2:
        raise BadSeries("a series needs at least two models, or one folder of checkpoints")
    if twice := [member.name for i, member in enumerate(members) if member.model in {other.model for other in members[:i]}]:
        raise BadSeries(f"{twice[0]} is named twice")
    return sorted(members, key=lambda member: member.x)


def begin_series(models: Sequence[str], options: SeriesOptions) -> SeriesOptions:
    """The options, with the held-out pairs and the texts of a folder of checkpoints where no others are named. Raises `BadSeries` without a task."""
    folder = Path(models[0])
    if len(models) == 1 and (folder / LISTING).is_file():
        texts = options.texts or (folder / TEXTS_FILE if options.dictionaries == TRAINED else None)
        options = replace(options, task=options.task or str(folder / HELD_OUT_FILE), texts=texts)
    if not options.task:
        raise BadSeries("the models are to be measured on a task: name one with --task")
    options.check()
    return options


def _names(models: Sequence[str]) -> list[str]:
    """What each model is called: the end of its name, as much of it as tells it from the others."""
    parts = [re.split(r"[/@]", model.rstrip("/")) for model in models]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(models)


def _short(model: str) -> str:
    return model.rpartition("@")[2] if "@" in model else model.rstrip("/").rpartition("/")[2]


def _number(model: str) -> float | None:
    """The last number of a model's short name, with k, m or b for thousands, millions, billions."""
    found = re.findall(r"(\d+(?:\.\d+)?)([kKmMbB]?)(?![A-Za-z])", _short(model))
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}[unit.lower()]


# -- 2. One model --------------------------------------------------------------------------------------------


PARTS = ("members", "tasks", "quality", "faithfulness", "areas", "graphs", "flow")
"""Frames of one model; each begins with `x` and `name`."""


def series_key(members: Sequence[Member], options: SeriesOptions) -> str:
    """Content hash of the models and of what is measured."""
    return _hashed([asdict(member) for member in members], [_member_key(member, options) for member in members])


def _member_key(member: Member, options: SeriesOptions) -> str:
    files = [_content(name) for name in (member.model, options.task, str(options.texts or ""), _named_dictionaries(member, options))]
    return _hashed(member.model, member.x, member.name, options.settings, files)


def _hashed(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def _content(name: str) -> str:
    """A digest of what a name stands for, where that is a file or a folder: a file that was changed is another one."""
    path = Path(name)
    if not name or not path.exists():
        return name
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return _digest(name, tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=256)
def _digest(name: str, state: tuple[tuple[str, int, int], ...]) -> str:
    """Of the bytes; read again only where a file's size or time has changed (`state`)."""
    return corpus_digest(name)


def _named_dictionaries(member: Member, options: SeriesOptions) -> str:
    """What `load_dictionaries` is to be asked for; `TRAINED` where they are trained here."""
    return options.dictionaries.format(model=member.model, name=member.name, x=f"{member.x:g}")


def measure_member(member: Member, options: SeriesOptions, say: Callable[[str], None] = lambda said: None) -> dict[str, pl.DataFrame]:
    """The frames of `PARTS` of one model; its edges go into the atlas' graph."""
    model = load_model(member.model, device=options.device, dtype=options.dtype)
    say("dictionaries")
    spec, dictionaries = _dictionaries(member, model, options)
    tasks = check_task(model, load_task(options.task, model.tokenizer, n=options.limit + options.held_out, seed=options.seed))
    quality = _quality(model, dictionaries, options)
    say("edges")
    edges = EdgeOptions(
        model=member.model, dictionaries=spec, task=options.task, atlas=options.atlas, graph=options.graph, limit=options.limit, seed=options.seed,
        settings=EdgeSettings(steps=options.steps, threshold=options.threshold, metric=options.metric), device=options.device, dtype=options.dtype,
        sites=tuple(site.name for site in dictionaries.sites),
    )  # fmt: skip
    summary = ingest_edges(edges)
    say("circuits")
    about = pl.DataFrame(
        {"model": [model.key], "run": [summary.run], "loss": [member.loss], "n_layers": [model.n_layers], "d_model": [model.d_model],
         "parameters": [sum(weight.numel() for weight in model.module.parameters())], "dictionaries": [spec]},
        schema_overrides={"loss": pl.Float64},
    )  # fmt: skip
    frames = {"members": about, "tasks": tasks.rename({"n": "pairs"}), "quality": quality, **_circuits(member, spec, summary.run, options)}
    return {name: _of_member(frames[name], member) for name in PARTS if name in frames}


def _circuits(member: Member, dictionaries: str, run_key: str, options: SeriesOptions) -> dict[str, pl.DataFrame]:
    """`graphs`, `flow`, `faithfulness` and `areas` of a run; only `graphs`, of zeros, where no edge of it reaches the output."""
    with open_graph(options.graph or options.atlas) as store:
        run = find_run(store, run_key)
        try:
            whole = run_circuit(store, run, Selection(run.key))
        except (NoEdges, EmptyCircuit):
            return {"graphs": pl.DataFrame([dict.fromkeys(GRAPH_NUMBERS, 0) | {"error_share": None}], schema=GRAPH_NUMBERS)}
        ablated = StudyOptions(
            metrics=(options.metric,), device=options.device, dtype=options.dtype, model=member.model, dictionaries=dictionaries, seed=options.seed
        )
        study = open_study(store, run, ablated, options.atlas)
        plan = plan_sweep(store, study, SweepOptions(shares=options.shares, held_out=options.held_out, ablations=(Ablation.EDGE,), complement=False))
        sweep = try_circuits(plan, VerdictOptions(controls=(Method.RANDOM_EDGES,), control_draws=1))
    return {"faithfulness": _faithfulness(sweep), "areas": _areas(sweep), "graphs": graph_numbers(whole), "flow": flow_by_site(whole)}


def _of_member(frame: pl.DataFrame, member: Member) -> pl.DataFrame:
    return frame.select(pl.lit(member.x, pl.Float64).alias("x"), pl.lit(member.name).alias("name"), pl.all())


def _dictionaries(member: Member, model: LoadedModel, options: SeriesOptions) -> tuple[str, SiteDictionaries]:
    """How the member's dictionaries are named, and they themselves; trained where asked for and not there yet."""
    wanted = None if options.sites is None else [parse_site(name) for name in options.sites]
    if options.dictionaries != TRAINED:
        spec = _named_dictionaries(member, options)
        return spec, load_dictionaries(spec, model, sites=wanted, device=options.device, dtype=options.dtype)
    sites = wanted or [Site(SiteKind.RESID, layer) for layer in range(model.n_layers)]
    folder = options.atlas / "dictionaries" / f"series-{_member_key(member, options)}"
    texts = list(read_texts(str(options.texts)))
    training = TrainingOptions(
        sites=tuple(sites), width=options.width, k=options.k, tokens=options.tokens, prompt_share=1.0, sequences=64, context=64, batch=512,
        seed=options.seed, save_dtype="float32",
    )  # fmt: skip
    train_dictionaries(model, str(options.texts), folder, training, prompts=texts)
    return str(folder), load_dictionaries(str(folder), model, device=options.device, dtype=options.dtype)


def _quality(model: LoadedModel, dictionaries: SiteDictionaries, options: SeriesOptions) -> pl.DataFrame:
    """FVU, L0 and dead share of each site's dictionary on the task's clean prompts; null for neurons, which are the values themselves."""
    pairs = load_task(options.task, model.tokenizer, n=options.limit, seed=options.seed)
    measured = evaluate_dictionaries(model, dictionaries, prompt_tokens([pair.clean for pair in pairs], model.tokenizer, longest=1024), loss_tokens=0)
    rows = [{"site": q.site.name, "layer": q.site.layer, "fvu": q.fvu, "l0": q.l0, "dead_share": q.dead_share} for q in measured]
    return pl.DataFrame(rows, schema={"site": pl.String, "layer": pl.Int64, "fvu": pl.Float64, "l0": pl.Float64, "dead_share": pl.Float64})


def _faithfulness(sweep: Sweep) -> pl.DataFrame:
    """φ of circuits by their share of the edges, tasks pooled and apart, ours and random ones of equal size, with the metric's values."""
    pooled = with_sizes(faithfulness(sweep.values, averaging=(Averaging.RATIO_OF_MEANS,)), sweep.sizes)
    apart = with_sizes(faithfulness(sweep.values, by=("task",), averaging=(Averaging.RATIO_OF_MEANS,)), sweep.sizes)
    scale = sweep.values.group_by("task").agg(pl.col("full").mean().alias("full_value"), pl.col("empty").mean().alias("empty_value"))
    whole = sweep.values.select(pl.lit(POOLED).alias("task"), pl.col("full").mean().alias("full_value"), pl.col("empty").mean().alias("empty_value"))
    rows = pl.concat([pooled, apart], how="vertical_relaxed").filter(pl.col("part") == CIRCUIT)
    rows = rows.join(pl.concat([whole, scale.select("task", "full_value", "empty_value")]), on="task", how="left")
    columns = ("task", "method", "size", "n_nodes", "n_edges", "value", "low", "high", "n", "undefined_n", "full_value", "empty_value", "baseline")
    return rows.with_columns((pl.col("size") / sweep.n_candidates).alias("share")).select("share", *columns).sort("task", "method", "size")


def _areas(sweep: Sweep) -> pl.DataFrame:
    """CPR and CMD of our circuits and random ones, and the fewest edges that reach φ = 0.8, by task."""
    ways = (Averaging.RATIO_OF_MEANS,)
    found = []
    for by in ((), ("task",)):
        table = areas(sweep.values, sweep.n_candidates, by=by, averaging=ways)
        least = smallest(faithfulness(sweep.values, by=by, averaging=ways), sweep.sizes, levels=(0.8,))
        least = least.select("task", "method", "ablation", pl.col("n_edges").alias("edges_to_0.8"))
        found.append(table.join(least, on=["task", "method", "ablation"], how="left"))
    return pl.concat(found, how="vertical_relaxed").select("task", "method", "area", "value", "low", "high", "edges_to_0.8")


GRAPH_NUMBERS = {
    "nodes": pl.Int64(), "edges": pl.Int64(), "strength": pl.Float64(), "effective_edges": pl.Float64(), "error_share": pl.Float64(),
    "average_degree": pl.Float64(),
}  # fmt: skip
"""What is said of a graph as a whole, see `graph_numbers`."""


def graph_numbers(whole: Circuit) -> pl.DataFrame:
    """One row about a graph, as `GRAPH_NUMBERS`: nodes, edges, and how spread its attribution is.

    effective_edges: exp of the entropy of the edges' shares of all |weight|: how many edges of equal weight would be as spread (Hill number of order
    1). error_share: of the strength into the output, what passes error nodes last.
    """
    edges = whole.edges.filter(pl.col("strength") > 0)
    share = edges["strength"] / edges["strength"].sum()
    entropy = -float((share * share.log()).sum())
    into_output = edges.join(whole.nodes.filter(pl.col("kind") == "output").select(pl.col("key").alias("target")), on="target", how="semi")
    errors = into_output.join(whole.nodes.filter(pl.col("kind") == "error").select(pl.col("key").alias("source")), on="source", how="semi")
    total = float(into_output["strength"].sum())
    row = {
        "nodes": whole.n_nodes, "edges": whole.n_edges, "strength": float(edges["strength"].sum()),
        "effective_edges": math.exp(entropy) if edges.height else 0.0,
        "error_share": float(errors["strength"].sum()) / total if total else None, "average_degree": whole.average_degree,
    }  # fmt: skip
    return pl.DataFrame([row], schema=GRAPH_NUMBERS)


def flow_by_site(whole: Circuit) -> pl.DataFrame:
    """Strength from site to site: `source_site`, `target_site`, `edges`, `strength`, and its `share` of all."""
    sites = whole.nodes.select("key", "site").unique()
    named = whole.edges.join(sites.rename({"key": "source", "site": "source_site"}), on="source").join(
        sites.rename({"key": "target", "site": "target_site"}), on="target"
    )
    flow = named.group_by("source_site", "target_site").agg(pl.len().cast(pl.Int64).alias("edges"), pl.col("strength").sum())
    return flow.with_columns((pl.col("strength") / pl.col("strength").sum()).alias("share")).sort("source_site", "target_site")


# -- 3. Two models -------------------------------------------------------------------------------------------


PAIRED = ("sites", "matching", "values", "curves")
"""Frames of two models; each begins with `x`, `name`, and the `reference` that the model stands beside."""


def compare_members(
    member: Member, reference: Member, runs: tuple[str, str], options: SeriesOptions, say: Callable[[str], None] = lambda said: None
) -> dict[str, pl.DataFrame]:
    """The frames of `PAIRED`: features of both that are active together on the task's prompts, and what their graphs have in common then.

    sites: `analysis.matching`'s, one row per pair of sites. matching: how many features are matched in all, and by chance. values, curves: of
    `analysis.graph_comparison`, empty where nothing is matched.
    """
    say("features")
    sides = tuple(_side_of(one, options) for one in (member, reference))
    tokenizers = (sides[0].tokenizer, sides[1].tokenizer)
    pairs = load_task(options.task, tokenizers[0], n=options.matched, seed=options.seed)
    settings = AlignOptions(seed=options.seed)
    aligned = collect_aligned(options.atlas, (sides[0], sides[1]), aligned_task(options.task, pairs, tokenizers, settings), settings)
    found = match(aligned, MatchOptions(draws=options.draws, seed=options.seed))
    say("graphs")
    compared = _compared(runs, found, options)
    frames = {"sites": found.sites, "matching": _overall(found), **compared}
    about = (pl.lit(member.x, pl.Float64).alias("x"), pl.lit(member.name).alias("name"), pl.lit(reference.name).alias("reference"))
    return {name: frames[name].select(*about, pl.all()) for name in PAIRED}


def _compared(runs: tuple[str, str], found: Matching, options: SeriesOptions) -> dict[str, pl.DataFrame]:
    """`values` and `curves` of the two runs' graphs through their matched features."""
    # an edge from layer 0 to layer 1 has its counterpart there, where the models have the same sites
    matched = found.matched(same_sites=set(found.sites["site_a"]) == set(found.sites["site_b"]))
    empty = {"values": pl.DataFrame(schema=dict(VALUES)), "curves": pl.DataFrame(schema=dict(CURVES))}
    if matched.is_empty():
        return empty
    try:
        with open_graph(options.graph or options.atlas, read_only=True) as store:
            a, b = (read_side(store, key, SideOptions()) for key in runs)
        comparison = compare(a, b, matched, CompareOptions(parts=(Part.EDGES,), draws=options.draws, seed=options.seed))
    except (BadMatching, NoEdges, EmptyCircuit):  # a graph without edges, or none of the matched features in one
        return empty
    return {"values": comparison.values, "curves": comparison.curves}


def _overall(found: Matching) -> pl.DataFrame:
    """One row: the numbers of a matching over all sites at once."""
    return pl.DataFrame([dict(found.overall)], infer_schema_length=None)


def _side_of(member: Member, options: SeriesOptions) -> Side:
    """A member to be measured on aligned text, loaded when it is its turn."""

    def load() -> tuple[LoadedModel, SiteDictionaries]:
        model = load_model(member.model, device=options.device, dtype=options.dtype)
        return model, _dictionaries(member, model, options)[1]

    return Side.later(load, {"model": member.model})


# -- 4. The whole series -------------------------------------------------------------------------------------


def measure_series(members: Sequence[Member], options: SeriesOptions, *, title: str, axis: str, progress: Report | None = None) -> SeriesRecord:
    """Every model, then each beside the last and beside the one before it; the record is kept in the atlas.

    What is measured of a model, or of two, is kept at once under the series' key: an interrupted call goes on where it stopped.
    """
    options.check()
    key = series_key(members, options)
    beside = list(dict.fromkeys([*((member, members[-1]) for member in members[:-1]), *((after, before) for before, after in pairwise(members))]))
    total = len(members) + len(beside)
    parts: list[Mapping[str, pl.DataFrame]] = []
    for done, member in enumerate(members):
        say = _saying(progress, done, total, member.name)
        parts.append(_kept(options.atlas, key, _member_key(member, options), partial(measure_member, member, options, say)))
    runs = {member: str(part["members"]["run"][0]) for member, part in zip(members, parts)}
    for done, (member, reference) in enumerate(beside, len(members)):
        say = _saying(progress, done, total, f"{member.name} and {reference.name}")
        name = f"{_member_key(member, options)}-{_member_key(reference, options)}"
        parts.append(_kept(options.atlas, key, name, partial(compare_members, member, reference, (runs[member], runs[reference]), options, say)))
    if progress:
        progress(total, total, "done")
    names = dict.fromkeys(name for part in parts for name in part)
    frames = {name: pl.concat([part[name] for part in parts if name in part], how="vertical_relaxed") for name in names}
    record = SeriesRecord(key, title, axis, {"models": [member.model for member in members], **options.settings}, frames)
    write_series(options.atlas, record)
    return record


def _kept(atlas: Path, key: str, member: str, measure: Callable[[], Mapping[str, pl.DataFrame]]) -> Mapping[str, pl.DataFrame]:
    """What is kept already, else what is measured now."""
    found = read_part(atlas, key, member)
    if found is None:
        found = dict(measure())
        put_part(atlas, key, member, found)
    return found


def _saying(progress: Report | None, done: int, total: int, name: str) -> Callable[[str], None]:
    return lambda stage: progress(done, total, f"{name}: {stage}") if progress else None


# -- 5. The demonstration ------------------------------------------------------------------------------------


def demo_series(atlas: Path, *, graph: str | None = None, fast: bool = False, seed: int = 0, progress: Report | None = None) -> SeriesRecord:
    """Train a small transformer on four tasks, keep its checkpoints in the atlas, and measure them all. fast: a smaller one on two tasks."""
    folder = atlas / "models" / (f"small-fast-{seed}" if fast else f"small-{seed}")
    training = SmallModelOptions(seed=seed)
    if fast:
        training = SmallModelOptions(tasks=("agreement", "pronoun"), n_layers=2, d_model=32, n_heads=2, steps=256, first=64, evenly=1, seed=seed)
    train_small_model(folder, training, progress=progress)
    asked = SeriesOptions(atlas=atlas, graph=graph, task="", seed=seed)
    if fast:
        asked = replace(asked, width=64, k=4, tokens=15_000, limit=12, held_out=12, matched=40, draws=2)
    options = begin_series([str(folder)], asked)
    return measure_series(members_of([str(folder)]), options, title="Checkpoints of a small transformer", axis="step", progress=progress)
