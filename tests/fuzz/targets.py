"""Every place where featlas reads what others wrote, as a target: inputs, and the command that reads them.

A target's cases are whatever its strategy draws; `run` puts one on the stage and runs commands on it through the command line's own entry.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from featlas.model.bios import profession_number
from hypothesis import strategies as st

from ..attribution_graph_files import texas
from ..study_atlas import D_MODEL, line
from .mutations import Strategy, arguments, broken_bytes, bytes_of, documents, line_files, numbers, spoiled, texts, values, written
from .stage import Broken, Outcome, Stage, apart


@dataclass(frozen=True)
class Target:
    """`weight`: its share of a campaign's cases."""

    name: str
    inputs: Strategy[Any]
    run: Callable[[Stage, Any], Outcome]
    weight: float = 1.0


TARGETS: dict[str, Target] = {}


def target(inputs: Strategy[Any], weight: float = 1.0) -> Callable[[Callable[[Stage, Any], Outcome]], Callable[[Stage, Any], Outcome]]:
    """Register a function as the target of its name."""

    def register(run: Callable[[Stage, Any], Outcome]) -> Callable[[Stage, Any], Outcome]:
        TARGETS[run.__name__] = Target(run.__name__, inputs, run, weight)
        return run

    return register


def _edges(stage: Stage, **changes: object) -> list[object]:
    """The words of a small `ingest edges`; a change to None leaves an option out."""
    options: dict[str, object] = {
        "model": stage.model, "dictionaries": stage.folder / "dictionaries", "task": stage.folder / "task.jsonl", "sites": "embed,resid_0", "steps": 1,
        "limit": 1, "atlas": stage.atlas, **changes,
    }  # fmt: skip
    return ["ingest", "edges", *(word for name, value in options.items() if value is not None for word in (f"--{name.replace('_', '-')}", value))]


# ---- files of tasks and texts

PAIRS = [line(i) for i in range(3)] + [{**line(4), "label": "a label"}]
BIOS = [{"hard_text": f"she works w{i} here", "profession": profession_number(("nurse", "journalist")[i % 2]), "gender": i // 2 % 2} for i in range(16)]
CORPUS = [{"text": f"w{i} w{i + 1} w{i + 2} w3 w4 w5"} for i in range(6)]


@target(st.tuples(line_files(PAIRS), st.booleans()), weight=6)
def pairs(stage: Stage, case: tuple[bytes, bool]) -> Outcome:
    """Files of pairs, as tasks."""
    path = stage.file("pairs.jsonl", case[0])
    return stage.run("tasks", "show", path, "--model", stage.model, "--json", *["--skip-invalid"][: case[1]])


@target(st.tuples(line_files(PAIRS), st.booleans()), weight=1.5)
def pairs_measured(stage: Stage, case: tuple[bytes, bool]) -> Outcome:
    """Files of pairs, measured into the graph."""
    path = stage.file("pairs.jsonl", case[0])
    return stage.writes(*_edges(stage, task=path), *["--skip-invalid"][: case[1]])


@target(st.one_of(line_files(CORPUS).map(lambda data: ("corpus.jsonl", data)), texts(200).flatmap(bytes_of).map(lambda data: ("corpus.txt", data))), weight=2)
def corpora(stage: Stage, case: tuple[str, bytes]) -> Outcome:
    """Plain and JSONL corpora, measured."""
    path = stage.file(*case)
    words = ("--model", stage.model, "--dictionaries", stage.folder / "dictionaries", "--sites", "resid_0", "--corpus", path, "--length", 4, "--limit", 4)
    return stage.writes("ingest", "statistics", *words, "--atlas", stage.atlas)


@target(line_files(BIOS), weight=1.5)
def bios(stage: Stage, case: bytes) -> Outcome:
    """Files of biographies."""
    path = stage.file("bios.jsonl", case)
    words = ("--model", stage.model, "--site", "resid_1", "--limit", 8, "--held-out", 4, "--training", "balanced", "--male", "nurse", "--female", "journalist")
    return stage.run("tasks", "probe", "--bios", path, "--output", stage.input / "probe.safetensors", *words)


# ---- models and dictionaries


def tensors_file(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, header: Callable[[dict[str, Any]], str] = json.dumps) -> bytes:
    """A safetensors file spelled by hand: eight bytes of length, the header, the numbers."""
    described: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.astype(np.float32).tobytes()
        described[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    spelled = header(described).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(spelled)) + spelled + data


_RANDOM = np.random.default_rng(0)
SAE = {"W_enc": _RANDOM.normal(size=(D_MODEL, 12)), "b_enc": _RANDOM.normal(size=12), "W_dec": _RANDOM.normal(size=(12, D_MODEL)), "b_dec": np.zeros(D_MODEL)}
GATED = {**{k: v for k, v in SAE.items() if k != "b_enc"}, "b_gate": np.zeros(12), "b_mag": np.zeros(12), "r_mag": np.zeros(12)}
CONFIG = {
    "architecture": "standard", "d_in": D_MODEL, "d_sae": 12, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none", "metadata": {"hook_name": "blocks.0.hook_resid_post", "sae_lens_version": "6.0.0"},
}  # fmt: skip
FLAT = {
    "architecture": "jumprelu", "d_in": D_MODEL, "d_sae": 12, "hook_name": "blocks.0.hook_resid_post", "hook_layer": 0, "model_name": "x", "dtype": "float32",
    "normalize_activations": "none", "apply_b_dec_to_input": False, "prepend_bos": True, "context_size": 16, "activation_fn_str": "relu",
}  # fmt: skip
DICTIONARIES = (
    (CONFIG, SAE), ({**CONFIG, "architecture": "gated"}, GATED), ({**CONFIG, "architecture": "topk", "k": 3}, SAE), (FLAT, {**SAE, "threshold": np.ones(12)}),
    ({"architecture": "linear"}, SAE), ({"architecture": "per_head_linear", "reshape_activations": "hook_z"}, {"W_enc": np.ones((2, 4, 3)), "W_dec": np.ones((2, 3, 4))}),
)  # fmt: skip


@st.composite
def dictionary_folders(draw: Any) -> tuple[str, bytes, bytes | None]:
    """A folder's name, its cfg.json and its weights."""
    config, tensors = draw(st.sampled_from(DICTIONARIES))
    kind = draw(st.sampled_from(("config", "config", "header", "bytes", "shape", "name", "values", "none")))
    name = draw(st.sampled_from(("resid_0",) * 8 + ("mlp_1", "attn_0", "resid_9", "nowhere")))
    data: bytes | None = tensors_file(tensors)
    if kind == "config":
        return name, draw(documents(config)), data
    if kind == "header":
        data = tensors_file(tensors, header=lambda described: written(draw(spoiled(described))))
    elif kind == "bytes":
        data = draw(broken_bytes(data))  # type: ignore[arg-type]
    elif kind == "none":
        data = None
    else:
        spoilt = draw(st.sampled_from(list(tensors)))
        other = {
            "shape": lambda t: np.ones(draw(st.sampled_from(((), (0,), (1,), (12,), (3, D_MODEL), (12, 12), (D_MODEL, 12, 1), (0, D_MODEL))))),
            "values": lambda t: np.full(t.shape, draw(st.sampled_from((np.nan, np.inf, -np.inf, 1e6, 0.0)))), "name": lambda t: t,
        }[kind](tensors[spoilt])  # fmt: skip
        data = tensors_file({(draw(texts(6)) if kind == "name" and key == spoilt else key): (other if key == spoilt else t) for key, t in tensors.items()})
    return name, json.dumps(config).encode(), data


@target(dictionary_folders(), weight=4)
def dictionaries(stage: Stage, case: tuple[str, bytes, bytes | None]) -> Outcome:
    """Folders of dictionaries."""
    name, config, weights = case
    folder = stage.fresh() / "dictionaries" / name
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_bytes(config)
    if weights is not None:
        (folder / "sae_weights.safetensors").write_bytes(weights)
    listed = stage.run("dictionaries", "list", folder.parent)
    measured = stage.writes(*_edges(stage, dictionaries=folder.parent, sites=None))
    return measured if measured.refused or not listed.refused else listed


@target(st.one_of(documents({"__metadata__": {"site": "resid_1", "name": "slope", "position": "-1"}}).map(lambda header: ("header", header)),
                  st.just(tensors_file({"weight": np.ones(D_MODEL)}, {"site": "resid_1", "name": "slope"})).flatmap(broken_bytes).map(lambda data: ("bytes", data)),
                  spoiled({"site": "resid_1", "name": "slope", "position": "-1"}).map(lambda metadata: ("metadata", metadata)),
                  st.sampled_from(((), (0,), (1,), (D_MODEL + 1,), (2, D_MODEL), (D_MODEL, 1))).map(lambda shape: ("shape", shape))), weight=1.5)  # fmt: skip
def probes(stage: Stage, case: tuple[str, Any]) -> Outcome:
    """Probes as targets."""
    kind, what = case
    good = {"site": "resid_1", "name": "slope"}
    if kind == "bytes":
        data = what
    elif kind == "header":
        data = struct.pack("<Q", len(what)) + what
    elif kind == "metadata":
        data = tensors_file({"weight": np.ones(D_MODEL)}, header=lambda described: written({**described, "__metadata__": what}))
    else:
        data = tensors_file({"weight": np.ones(what)}, good)
    return stage.writes(*_edges(stage, target=stage.file("probe.safetensors", data)))


@target(st.tuples(st.sampled_from(("config.json",) * 5 + ("tokenizer.json", "tokenizer_config.json", "model.safetensors")), st.data()), weight=2)
def models(stage: Stage, case: tuple[str, Any]) -> Outcome:
    """Folders of models: configuration, tokenizer, weights."""
    name, data = case
    folder = stage.fresh() / "model"
    folder.mkdir()
    for path in stage.model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    whole = (stage.model / name).read_bytes()
    spoilt = data.draw(broken_bytes(whole)) if name.endswith(".safetensors") else data.draw(documents(json.loads(whole)))
    (folder / name).write_bytes(spoilt)
    return stage.run("tasks", "check", stage.folder / "task.jsonl", "--limit", 2, "--model", folder)


@target(st.data(), weight=0.5)
def gguf(stage: Stage, data: Any) -> Outcome:
    """.gguf files: the header and its keys."""
    whole = (stage.folder / "tiny.gguf").read_bytes()
    path = stage.file("x.gguf", data.draw(broken_bytes(whole[: data.draw(st.sampled_from((len(whole), len(whole), 400, 32)))])))
    environment = {"XDG_CACHE_HOME": str(stage.input / "cache")}
    return stage.run("tasks", "show", stage.folder / "task.jsonl", "--model", path, environment=environment)


# ---- what other programs wrote


@target(documents(texas()), weight=6)
def attribution_graphs(stage: Stage, case: bytes) -> Outcome:
    """Attribution graphs of circuit-tracer."""
    return stage.writes("import", "circuit-tracer", stage.file("texas.json", case), "--atlas", stage.atlas)


LABELS = [
    {"site": "resid_0", "index": 1, "label": "plural subjects"},
    {"site": "resid_0", "index": "2", "label": "names", "confidence": 0.5, "author": "me", "rule": "", "evidence": "seen"},
    {"site": "resid_0", "index": 3, "label": "“quotes”", "source": "table", "kind": "file"},
]
NEURONPEDIA = [
    {"modelId": "gpt2-small", "layer": "0-res", "index": "1", "description": "verbs", "typeName": "t", "explanationModelName": "m", "scores": [{"value": 0.5}]},
    {"modelId": "gpt2-small", "layer": "0-res", "index": 2, "explanations": [{"description": "nouns"}, {"description": None}]},
]


@st.composite
def label_files(draw: Any) -> tuple[str, bytes]:
    """A file's name and content: JSONL, JSON, CSV or TSV."""
    kind = draw(st.sampled_from((".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv", ".xlsx")))
    if kind == ".json":
        return "labels.json", draw(documents(draw(st.sampled_from((LABELS, {"resid_0/1": "one"}, LABELS[0])))))
    if kind in (".csv", ".tsv"):
        return f"labels{kind}", draw(tables(kind))
    return f"labels{kind}", draw(line_files(LABELS))


@st.composite
def tables(draw: Any, kind: str = ".csv") -> bytes:
    """A table in which some cells hold anything."""
    rows = [["site", "index", "label", "confidence"], ["resid_0", "1", "plural, or not", "0.5"], ["resid_0", "2", 'said "so"', ""], ["resid_0", "0", "three", "1"]]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, 3))] = draw(st.one_of(texts(), numbers()))
    quote = lambda cell: '"' + cell.replace('"', '""') + '"' if any(c in cell for c in '",\t\n\r') and draw(st.sampled_from((True, True, False))) else cell
    text = draw(st.sampled_from(("\n", "\r\n", "\r"))).join(("\t" if kind == ".tsv" else ",").join(map(quote, row)) for row in rows)
    return draw(bytes_of(text + draw(st.sampled_from(("\n", "", '"', "\n,,,\n", "\n" + "a," * 5_000, "\n\x00,1,x,0\n", "\n" + "x" * 200_000)))))


@target(st.tuples(label_files(), st.booleans()), weight=6)
def labels(stage: Stage, case: tuple[tuple[str, bytes], bool]) -> Outcome:
    """Tables of labels."""
    path = stage.file(*case[0])
    return stage.writes("labels", "import", path, "--of", stage.dictionary, *["--skip-invalid"][: case[1]], "--atlas", stage.atlas)


@target(st.tuples(st.one_of(line_files(NEURONPEDIA).map(lambda data: ("batch-0.jsonl", data)), documents(NEURONPEDIA).map(lambda data: ("x.json", data))),
                  st.sampled_from(("resid_0", "gpt2-small/0-res=resid_0", "nowhere")), st.booleans()), weight=3)  # fmt: skip
def neuronpedia(stage: Stage, case: tuple[tuple[str, bytes], str, bool]) -> Outcome:
    """Explanations of Neuronpedia's."""
    (name, data), site, skip = case
    path = stage.file(name, data)
    return stage.writes("labels", "import", path, "--format", "neuronpedia", "--of", stage.dictionary, "--site", site, *["--skip-invalid"][:skip], "--atlas", stage.atlas)


@target(st.data(), weight=2)
def circuits_by_file(stage: Stage, data: Any) -> Outcome:
    """Circuits by hand, from a CSV file or JSON lines."""
    key = f"{stage.keys[0]}"
    pair = {"source": key, "target": stage.keys[1]}
    rows = data.draw(st.sampled_from(([pair, {**pair, "target": stage.keys[2]}], [{"key": key}, {"key": stage.keys[1]}])))
    if data.draw(st.booleans()):
        name, content = "edges.jsonl", data.draw(line_files(rows))
    else:
        lines = [",".join(rows[0]), *(",".join(data.draw(st.one_of(st.just(str(v)), st.just(str(v)), texts())) for v in row.values()) for row in rows)]
        name, content = "edges.csv", data.draw(bytes_of("\n".join(lines)))
    return stage.writes("analyze", "circuit", "--run", stage.runs["main"], "--file", stage.file(name, content), "--atlas", stage.atlas)


# ---- values on the command line


@target(st.data(), weight=8)
def queries(stage: Stage, data: Any) -> Outcome:
    """Parameters of every named query."""
    from featlas.queries.library import list_queries

    query = data.draw(st.sampled_from(list_queries()))
    known = {"run": stage.runs["main"], "feature": stage.keys[0], "site": "resid_0", "task": "even", "key": stage.keys[1], "least": "0.1", "position": "1"}
    words: list[object] = []
    for parameter in query.parameters:
        kind = data.draw(st.sampled_from(("good", "good", "number", "text", "none")))
        good = known.get(parameter.name, "1")
        value = {"good": lambda good=good: good, "number": lambda: data.draw(numbers()), "text": lambda: data.draw(arguments()), "none": lambda: None}[kind]()
        if value is not None:
            words += ["--param", f"{parameter.name}={value}"]
    if data.draw(st.sampled_from((False, False, False, True))):
        words += ["--param", data.draw(arguments())]
    shape = data.draw(st.sampled_from(("table", "json", "csv")))
    return stage.writes("query", query.name, *words, "--format", shape, "--atlas", stage.atlas)


CYPHER = (
    "MATCH (f:Feature) RETURN f.key LIMIT 3", "MATCH (f:Feature {key: $key}) RETURN f", "MATCH p=(a)-[e:INFLUENCES]->(b) RETURN p LIMIT 2", "RETURN $key AS x",
    "MATCH (f:Feature) SET f.label = 'x'", "MATCH (n) DETACH DELETE n", "UNWIND $key AS x RETURN x", "CALL show_tables() RETURN *", "CREATE (:Feature {key: 'x'})",
)  # fmt: skip


@target(st.tuples(st.sampled_from(CYPHER), st.text(max_size=4), st.integers(0, 40), values()), weight=3)
def cypher(stage: Stage, case: tuple[str, str, int, Any]) -> Outcome:
    """Cypher of one's own, nearly right, read-only."""
    text, extra, place, value = case
    text = text[:place] + extra.replace("\x00", "") + text[place:]
    if len(spelled := written(value)) > 100_000:
        spelled = spelled[:1_000]
    spelled = spelled.replace("\x00", "").encode("utf-8", "replace").decode()
    return stage.writes("query", "--cypher", text, "--param", f"key={spelled}", "--atlas", stage.atlas, "--json")


@target(st.tuples(arguments(), st.one_of(arguments(), st.just("resid_0/1"), st.just("resid_0/2")), arguments(10)), weight=4)
def names(stage: Stage, case: tuple[str, str, str]) -> Outcome:
    """Labels given by hand, looked for and shown, in the store, the graph and the tables."""
    text, feature, author = case
    given = stage.writes("labels", "set", "--of", stage.dictionary, "--author", author, "--atlas", stage.atlas, "--", feature, text)
    if not given.refused:
        stage.run("labels", "list", "--atlas", stage.atlas)
        stage.run("query", "find_features", "--param", f"text={text}", "--atlas", stage.atlas)
    return stage.run("labels", "search", "--atlas", stage.atlas, "--", text)


OPTIONS = {
    "sites": ("resid_0", "embed,mlp_1", "resid_0,,embed", "resid_99", "attn_-1", "y", "resid_0/1"), "target": ("resid_1/2", "resid_1/2@-1", "resid_1/99", "y/0", "resid_1/2@99"),
    "threshold": ("0.1", "0"), "max_edges": ("5",), "steps": ("1", "2"), "limit": ("1", "2"), "device": ("cpu", "cuda:9", "meta"), "dtype": ("float32", "float64"), "memory": ("1GB", "0", "1e400TB"),
    "metric": ("logit_diff", "kl"), "baseline": ("zero", "mean", "noise", "resample"), "noise_scale": ("1", "-1"), "positions": ("sum", "keep", "max"), "seed": ("0", "-1"), "batch_size": ("1", "9999999999"),
    "statistics_run": ("", "bd"), "screen": ("0.1",), "tolerance": ("0.1",), "bos": ("yes", "no"), "task": ("agreement", "agreement+", "+"), "dictionaries": ("identity", "identity-heads"),
    "model": ("nowhere/at/all", "./none", "@"),
}  # fmt: skip


@st.composite
def option_sets(draw: Any) -> dict[str, str]:
    """A few options with a good value, a number or any text."""
    chosen = draw(st.lists(st.sampled_from(list(OPTIONS)), min_size=1, max_size=3, unique=True))
    return {name: draw(st.one_of(st.sampled_from(OPTIONS[name]), st.sampled_from(OPTIONS[name]), numbers(), arguments(10))) for name in chosen}


@target(option_sets(), weight=3)
def options(stage: Stage, case: dict[str, str]) -> Outcome:
    """Sites, targets, thresholds, devices and the other values of `ingest edges`."""
    if (name := case.get("model", "./")).count("/") < 2 and not name.startswith(("./", "~", "/", "@")):
        case = {**case, "model": f"./{name}"}  # no name of the hub is asked for
    return stage.writes(*_edges(stage, **case))


@target(st.tuples(st.sampled_from(("circuit", "export", "series", "labels list", "plain")), st.lists(st.tuples(st.sampled_from(
    ("--run", "--threshold", "--edges", "--top-edges", "--by", "--sequence", "--task", "--union", "--intersection", "--difference", "--paths", "--features", "--limit", "--kind", "--site", "--circuit")),
    st.one_of(arguments(12), numbers())), max_size=3)), weight=3)  # fmt: skip
def choices(stage: Stage, case: tuple[str, list[tuple[str, str]]]) -> Outcome:
    """Runs, circuits, sequences, thresholds and filters of what only reads or cuts."""
    what, given = case
    words = [word for pair in given for word in pair]
    if what == "export":
        return stage.writes("export", stage.fresh() / "x.graphml", "--format", "graphml", "--run", stage.runs["main"], *words, "--atlas", stage.atlas)
    if what == "series":
        return stage.run("series", "show", *words, "--atlas", stage.folder / "series")
    if what == "labels list":
        return stage.writes("labels", "list", *words, "--atlas", stage.atlas)
    if what == "plain":
        return stage.run(*words)
    return stage.writes("analyze", "circuit", "--run", stage.runs["main"], *words, "--atlas", stage.atlas)


CONFIGURATION = """# settings
quiet = true
[defaults]
device = "cpu"
atlas = "./atlas"
[ingest.edges]
steps = 2
sites = ["resid_0", "embed"]
threshold = 0.5
[analyze.circuit]
edges = 100
by = "weight"
write = false
[tasks]
limit = 3
"""


@st.composite
def toml_files(draw: Any) -> bytes:
    """A file of settings with lines left out, doubled, or with other values."""
    lines = CONFIGURATION.splitlines()
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        name = lines[place].partition("=")[0]
        value = draw(st.sampled_from(("true", "1", "-1", "1.5", "nan", "inf", '"x"', "[1, 'a']", "{a = 1}", "1979-05-27", '"""', "[[", "0x1F", "''", "9" * 5_000, "[" * 3_000)))
        lines[place] = draw(st.sampled_from((lines[place], "", lines[place] * 2, f"{name}= {value}", f"{draw(texts(6))} = {value}", f"[{draw(texts(6))}]", f'"{draw(texts(6))}" = 1',
                                             f"{name}= {json.dumps(draw(texts()))}")))  # fmt: skip
    return draw(bytes_of("\n".join(lines)))


@target(st.tuples(toml_files(), st.sampled_from((("config", "show"), ("tasks", "list"), ("config", "show", "ingest", "edges"), ("labels", "list")))), weight=4)
def settings(stage: Stage, case: tuple[bytes, tuple[str, ...]]) -> Outcome:
    """Files of settings."""
    path = stage.file("featlas.toml", case[0])
    return stage.run(*case[1], environment={"FEATLAS_CONFIG": str(path)})


# ---- the page's server


def sendable(text: str) -> str:
    """The text as a client can send it: an address has no room for half a character."""
    return text.encode("utf-8", "replace").decode()


@target(st.data(), weight=8)
def serve(stage: Stage, data: Any) -> Outcome:
    """Requests to `featlas serve`: every page with any parameters, queries, bodies."""
    client, pages = stage.client
    kind = data.draw(st.sampled_from(("page", "page", "page", "query", "body", "path")))
    good = {"run": stage.runs["main"], "feature": stage.keys[0], "key": stage.keys[0], "circuit": stage.circuit, "q": "plural"}
    if kind == "page":
        names = ("run", "key", "feature", "circuit", "q", "text", "limit", "offset", "threshold", "edges", "by", "site", "sort", "task", "sequence", "level", "order", "page", "kind", "region")
        given = data.draw(st.dictionaries(st.one_of(st.sampled_from(names), texts(5)), st.one_of(texts(12), numbers()), max_size=3))
        given |= {name: value for name, value in good.items() if data.draw(st.booleans())}
        sent = {sendable(name): sendable(str(value)) for name, value in given.items()}
        answer = client.get(f"/api/{data.draw(st.sampled_from(pages))}", params=sent)
    elif kind == "path":
        answer = client.get("/" + data.draw(st.sampled_from(("api/", "scripts/", "", "api/queries/"))) + "".join(f"%{ord(c) % 256:02x}" for c in data.draw(texts(6))))
    else:
        body = data.draw(documents({"cypher": data.draw(st.sampled_from(CYPHER)), "parameters": {"key": stage.keys[0]}, "rows": 5, "seconds": 1.0}))
        if kind == "query":
            body = data.draw(documents({"name": data.draw(st.sampled_from(("hubs", "feature_inputs", "neighbours", "runs"))), "parameters": {"run": stage.runs["main"], "limit": 3}}))
        answer = client.post("/api/query", content=body, headers={"content-type": "application/json"})
    if answer.status_code >= 500 and answer.status_code != 503:
        raise Broken(f"answer {answer.status_code}", f"{answer.request.url} {answer.text[:600]}")
    if answer.status_code >= 400 and answer.status_code not in (404, 405) and "error" not in answer.json():
        raise Broken("an error without a message", answer.text[:600])
    return Outcome(int(answer.status_code >= 400), answer.text, "")


# ---- what lies in an atlas


_READERS = {
    "runs": (("analyze", "effects", "--edges", "3", "--held-out", "1", "--no-write"), ("ingest", "finish")),
    "samples": (("analyze", "rois", "--nulls", "0", "--no-write"), ("labels", "auto", "--rules", "tokens"), ("report",)),
}


@target(st.tuples(st.sampled_from(("runs/*.json", "runs/*.json", "samples/*/manifest.json", "samples/*/*.npz", "samples/*/*.parquet")), st.data()), weight=1.5)
def kept_files(stage: Stage, case: tuple[str, Any]) -> Outcome:
    """Manifests and samples in an atlas."""
    pattern, data = case
    path = data.draw(st.sampled_from(sorted(stage.atlas.glob(pattern))))
    whole = path.read_bytes()
    words = data.draw(st.sampled_from(_READERS[pattern.partition("/")[0]]))
    more = ["--run", path.stem] if words[:2] in (("analyze", "effects"), ("ingest", "finish")) else []
    more += ["--output", stage.fresh() / "r.html"] if words[0] == "report" else []
    path.write_bytes(data.draw(documents(json.loads(whole)) if path.suffix == ".json" else broken_bytes(whole)))
    try:
        return stage.run(*words, *more, "--atlas", stage.atlas)
    finally:
        path.write_bytes(whole)


@target(st.tuples(st.sampled_from(("graph.lbug", "statistics.duckdb")), st.sampled_from((("query", "runs"), ("labels", "list"), ("labels", "set", "resid_0/1", "x"), ("query", "hubs"))),
                  st.sampled_from(("head", "any", "cut", "noise", "folder", "empty")), st.integers(0, 2**32)), weight=1.5)  # fmt: skip
def databases(stage: Stage, case: tuple[str, tuple[str, ...], str, int]) -> Outcome:
    """Garbage in the databases' files. Read in a process of its own: it may die of it."""
    name, words, kind, seed = case
    chosen = np.random.default_rng(seed)
    whole = bytearray((stage.atlas / name).read_bytes())
    place = {"head": 4096, "any": len(whole)}.get(kind, len(whole))
    for at in chosen.integers(0, place, size=chosen.integers(1, 30)) if kind in ("head", "any") else ():
        whole[int(at)] = int(chosen.integers(0, 256))
    folder = stage.fresh() / "atlas"
    folder.mkdir()
    for other in ("graph.lbug", "statistics.duckdb"):
        if other != name:
            (folder / other).write_bytes((stage.atlas / other).read_bytes())
    if kind == "folder":
        (folder / name).mkdir()
    else:
        cut = {"cut": whole[: int(chosen.integers(0, len(whole)))], "noise": chosen.bytes(300), "empty": b""}.get(kind, whole)
        (folder / name).write_bytes(bytes(cut))
    return apart(*words, "--atlas", folder)
