"""What the commands share: their groups, the options that mean the same everywhere, how an atlas and a model are opened."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import checks, completion, console
from .errors import UserError

if TYPE_CHECKING:
    from .model.dictionary_sources import SiteDictionaries
    from .model.loading import LoadedModel
    from .queries.statistics import StatisticsStore
    from .queries.store import GraphStore

_GROUP = {"no_args_is_help": True, "rich_markup_mode": None, "add_completion": False}
_ROOT = {**_GROUP, "add_completion": True}
app = typer.Typer(name="featlas", help="featlas: a feature atlas of neural networks, in a graph database.", **_ROOT)  # type: ignore[arg-type]
tasks_app = typer.Typer(help="Prompt pairs: list, show, build and check them.", **_GROUP)  # type: ignore[arg-type]
dictionaries_app = typer.Typer(help="Dictionaries: list, train and evaluate them.", **_GROUP)  # type: ignore[arg-type]
ingest_app = typer.Typer(help="Measure a model: edges into the graph, statistics into DuckDB.", **_GROUP)  # type: ignore[arg-type]
analyze_app = typer.Typer(help="The science on a measured graph.", **_GROUP)  # type: ignore[arg-type]
neo4j_app = typer.Typer(help="A local Neo4j server with its Browser.", **_GROUP)  # type: ignore[arg-type]
config_app = typer.Typer(help="Settings from files: which count, and what they say.", **_GROUP)  # type: ignore[arg-type]
app.add_typer(config_app, name="config")
for _name, _sub in (("tasks", tasks_app), ("dictionaries", dictionaries_app), ("ingest", ingest_app), ("analyze", analyze_app), ("neo4j", neo4j_app)):
    app.add_typer(_sub, name=_name)

# --- options that mean the same everywhere ---------------------------------------------------------------------------

DEMO_MODEL, DEMO_DICTIONARIES = "smollm2", "demo"


def task_option(help: str) -> Any:
    """--task: a task's name, a mixture, or a file of pairs."""
    return typer.Option("--task", callback=checks.task, autocompletion=completion.tasks, help=help)


def corpus_option(help: str) -> Any:
    """--corpus: a text."""
    return typer.Option("--corpus", callback=checks.corpus, help=help)



Atlas = Annotated[Path, typer.Option("--atlas", envvar="FEATLAS_ATLAS", help="Folder of the atlas: embedded graph, statistics, manifests.")]
Graph = Annotated[
    str | None,
    typer.Option(
        "--graph", envvar="NEO4J_URI", callback=checks.graph, help="A Neo4j server (bolt://… or neo4j://…) instead of the atlas' embedded graph."
    ),
]  # fmt: skip
Model = Annotated[str, typer.Option("--model", callback=checks.model, help="Hugging Face name, local folder, .gguf file, or smollm2.")]
Dictionaries = Annotated[
    str,
    typer.Option(
        "--dictionaries",
        callback=checks.dictionaries,
        autocompletion=completion.dictionaries,
        help="Folder with a sub-folder per site, sae_lens release, release:sae_id,…, identity (neurons), identity-heads (the same, at attn_L of the "
        "heads' outputs), or demo.",
    ),
]
Task = Annotated[str, task_option("Task name, a mixture a+b+c, or a JSONL file of pairs.")]
Sites = Annotated[
    str | None,
    typer.Option(
        "--sites", callback=checks.sites, autocompletion=completion.sites,
        help="Sites to take, comma-separated: resid_3,mlp_4; all that have a dictionary unless given.",
    ),
]  # fmt: skip
Limit = Annotated[int, typer.Option("--limit", callback=checks.at_least_one, help="Pairs at most.")]
Device = Annotated[
    str,
    typer.Option(
        "--device", "--device-map", callback=checks.device, autocompletion=completion.devices,
        help="cpu, cuda, cuda:0 or mps; auto; layers by device, cuda:0=0-15,cuda:1=16-31; weights at rest in main memory or on disk, cuda:0+cpu, "
        "cpu+disk; or a device map's .json.",
    ),
]  # fmt: skip
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", callback=checks.dtype, autocompletion=completion.dtypes,
        help="Of the model's weights: float32, bfloat16 or float16; bfloat16/bfloat16 keeps dictionaries so, too.",
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option("--batch-size", callback=checks.at_least_one, help="Sequences in one run of the model.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Leave out a file's unusable pairs, naming them, instead of refusing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Run = Annotated[
    str | None,
    typer.Option("--run", autocompletion=completion.runs, help="The run, by its key or the beginning of it; not needed where there is only one."),
]
By = Literal["abs_weight", "weight"]
Rule = Literal["product", "bottleneck"]
ByOption = Annotated[By, typer.Option("--by", help="Threshold the mean magnitude of the effects, or the magnitude of their mean.")]
Metric = Annotated[
    Literal["logit_diff", "log_prob", "kl", "tv", "accuracy", "mrr"],
    typer.Option("--metric", help="What the effects are on; it must be differentiable: not accuracy or mrr, and kl and tv at several --steps."),
]
Baseline = Annotated[
    Literal["counterfactual", "resample", "zero", "mean", "noise"],
    typer.Option(
        "--baseline",
        help="The value that nodes are moved from: the corrupted prompt's, another prompt's (seeded), 0, the mean over a corpus, or the clean value "
        "with seeded noise.",
    ),
]
Mean = Annotated[
    Literal["over-positions", "per-position"],
    typer.Option("--mean", help="With --baseline mean: one mean, or each position's own (statistics measured --by-position)."),
]
NoiseScale = Annotated[
    float, typer.Option("--noise-scale", help="With --baseline noise: its size, in each node's standard deviations over the corpus.")
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="The output, instead of --metric: a feature (resid_11/123, resid_11/123@-2), or a probe's .safetensors file."),
]
Bos = Annotated[
    Literal["auto", "yes", "no"],
    typer.Option("--bos", help="Texts begin with a beginning-of-text token: as the dictionaries were trained, always, or never."),
]
Architecture = Annotated[
    Literal["standard", "gated", "topk", "batchtopk", "jumprelu"], typer.Option("--architecture", help="Kind of dictionary.")
]
Positions = Annotated[Literal["keep", "sum", "max"], typer.Option("--positions", help="Token positions: kept apart, summed, or the greatest effect.")]
Steps = Annotated[
    int,
    typer.Option(
        "--steps",
        help="Steps of integrated gradients; 1 is attribution patching, many times faster. "
        "At 1 a feature that is inactive in the clean run gets no incoming edge.",
    ),
]
FirstFactor = Annotated[
    Literal["exact", "interpolated", "clean"],
    typer.Option(
        "--first-factor",
        help="How a node's effect on the metric is followed along the path: by a run of the model's tail for each step, by one for each feature and "
        "a curve between (error nodes stay exact), or as it is in the clean run.",
    ),
]
Tolerance = Annotated[
    float, typer.Option("--tolerance", help="With --first-factor interpolated: estimated relative error above which more of a node's steps are run.")
]
Screen = Annotated[
    float | None,
    typer.Option(
        "--screen",
        help="Expand only nodes into which a quick first pass (clean first factor, two steps) finds an edge of at least this |effect|; "
        "edges into other nodes are lost.",
    ),
]
TailDtype = Annotated[
    Literal["bfloat16", "float16"] | None, typer.Option("--tail-dtype", help="Half precision for the tail's runs; the error is measured on a sample.")
]
EdgeBatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Sequences in one run of the model; as many as --memory allows, up to 8, unless given.")
]
StatisticsRun = Annotated[
    str | None,
    typer.Option(
        "--statistics-run", autocompletion=completion.statistics_runs,
        help="Run of `ingest statistics` that --baseline mean or noise takes, by the beginning of its key.",
    ),
]  # fmt: skip
Basis = Annotated[
    Literal["activation", "attribution"],
    typer.Option("--basis", help="Statistics of activations, or (with --task) of each node's attribution to --metric from --baseline."),
]
WirePaths = Annotated[
    str | None,
    typer.Option("--paths", help="Kinds of paths, comma-separated: residual, attention, mlp (needs a text); all that can be had unless given."),
]
Reach = Annotated[
    Literal["parents", "all"], typer.Option("--pairs", help="Wire sites that read each other without a chosen site in between, or all to all later.")
]
Keep = Annotated[
    Literal["both", "outputs", "inputs"], typer.Option("--keep", help="--top-k of the wires out of each feature, of those into it, or of either.")
]
WireWeight = Annotated[
    Literal["raw", "cosine"], typer.Option("--weight", help="Virtual weights as they are, or as cosines of what is sent and what is read.")
]
NormScale = Annotated[
    Literal["one", "mean"], typer.Option("--norm-scale", help="Norms count with their gain alone, or (with a text) with their mean scale too.")
]
Memory = Annotated[str, typer.Option("--memory", help="Memory for working tensors, beside the model and its dictionaries: 512MB, 2GB, …")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", envvar="FEATLAS_QUIET", help="No progress bars and no notes: results and mistakes only.")
]
ShowVersion = Annotated[bool, typer.Option("--version", help="Print the version and leave.")]
AskPassword = Annotated[
    bool, typer.Option("--ask-password", help="Ask for the password of the Neo4j server, instead of NEO4J_PASSWORD or NEO4J_PASSWORD_FILE.")
]

DEFAULT_ATLAS = Path("atlas")


class NoAtlas(UserError):
    """A command that reads found no graph."""


class BadParameterValue(UserError):
    """An option's value is not of the form that it must have."""


class NoSuchDictionaries(UserError):
    """Nothing that has dictionaries fits the name."""


class WrongModel(UserError):
    """The model or the dictionaries named are not those that were measured."""


class NotBoth(UserError):
    """Two options exclude each other, or one of two is needed."""


class NoTerminal(UserError):
    """A password is to be asked for, and there is nobody to ask."""


def password_from_terminal() -> None:
    """Ask for the server's password, unseen, and keep it for this process and those that it starts. Raises `NoTerminal`."""
    if not sys.stdin.isatty():
        raise NoTerminal("--ask-password needs a terminal: set NEO4J_PASSWORD, or NEO4J_PASSWORD_FILE to a file that holds the password")
    os.environ["NEO4J_PASSWORD"] = str(typer.prompt("Password of the Neo4j server", hide_input=True, err=True))


# --- opening ---------------------------------------------------------------------------------------------------------


def open_atlas(atlas: Path, graph: str | None, *, write: bool) -> "GraphStore":
    """The graph that the options name; an embedded one must be there."""
    from .queries.store import open_graph

    if graph is None and not (atlas / "graph.lbug").exists():
        raise NoAtlas(f"no graph in {atlas}: make one with `featlas demo` or `featlas ingest edges`, or name another with --atlas or --graph")
    return open_graph(graph or atlas, read_only=not write)


def open_statistics(atlas: Path) -> "StatisticsStore | None":
    """The atlas' statistics for reading, where there are any."""
    from .queries.statistics import FILE_NAME, StatisticsStore

    return StatisticsStore(atlas, read_only=True) if (atlas / FILE_NAME).exists() else None


def load_named(
    model: str, dictionaries: str, sites: str | None, device: str, dtype: str, bos: str = "auto"
) -> "tuple[LoadedModel, SiteDictionaries]":
    """The model, whose tokenizer begins texts as the dictionaries or `bos` say, and the dictionaries."""
    from .model.beginning import with_beginning
    from .model.dictionary_sources import load_dictionaries
    from .model.loading import load_model
    from .model.sites import parse_site

    loaded = load_model(model, device=device, dtype=dtype)
    chosen = [parse_site(name) for name in split_names(sites)] if sites else None
    found = load_dictionaries(dictionaries, loaded, sites=chosen, device=device, dtype=dtype)
    return with_beginning(loaded, found, BOS[bos]), found


def within_context(length: int, model: "LoadedModel") -> int:
    """`length` tokens, or as many as the model reads at once where those are fewer; a note says so."""
    context = int(getattr(model.module.config, "max_position_embeddings", 0) or 0)
    if not context or length <= context:
        return length
    console.note(f"blocks of {context} tokens, not {length}: the model reads no more at once")
    return context


BOS = {"auto": None, "yes": True, "no": False}


def split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def memory_bytes(text: str) -> int:
    """An amount of memory: a number of bytes, or with KB, MB, GB or TB (of 1024 each) behind it."""
    from .model.placement import parse_bytes

    if (amount := parse_bytes(text)) is None:
        raise BadParameterValue(f"--memory {text!r} is no amount of memory: write 512MB or 2GB")
    return amount
