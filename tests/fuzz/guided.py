"""Parsers of bytes fuzzed by coverage: atheris changes the bytes towards lines that no input has reached yet.

Each parser takes the bytes of a file as featlas' own code does; it may raise a `FeatlasError` and nothing else. Seeds are files of
`tests/fuzz/seeds/PARSER`, and what `SEEDS` holds of the targets' documents.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

_OURS = (
    "featlas.model.pairs", "featlas.model.dictionary_sources", "featlas.model.attribution_graphs", "featlas.ingest.label_files",
    "featlas.configuration", "featlas.queries.labels",
)  # fmt: skip

with atheris.instrument_imports(include=list(_OURS)):
    from featlas import cli, configuration, running
    from featlas.ingest import label_files
    from featlas.model import attribution_graphs, dictionary_sources, pairs
from featlas.errors import FeatlasError  # noqa: E402

from ..attribution_graph_files import texas  # noqa: E402
from ..micro import word_tokenizer  # noqa: E402
from .targets import CONFIG, CONFIGURATION, LABELS, NEURONPEDIA, PAIRS, SAE, tensors_file  # noqa: E402


def _lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _parsers(folder: Path) -> dict[str, tuple[Callable[[bytes], object], list[bytes]]]:
    """Each parser, and the seeds that are made of the targets' documents."""
    tokenizer, root = word_tokenizer(), running.tree(cli.app)

    def file(name: str, data: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def labels(data: bytes) -> object:
        name = ("labels.jsonl", "labels.json", "labels.csv", "labels.tsv")[data[0] % 4] if data else "labels.csv"
        return label_files.read_label_file(file(name, data[1:]))

    def settings(data: bytes) -> object:
        environment = {configuration.VARIABLE: str(file("featlas.toml", data))}
        return configuration.load(root, ["tasks", "list"], environment=environment, folder=folder)

    def dictionary(data: bytes) -> object:
        config, _, weights = data.partition(b"\0\0SPLIT\0\0")
        file("d/resid_0/cfg.json", config)
        file("d/resid_0/sae_weights.safetensors", weights)
        ((_, reader),) = dictionary_sources._folder_readers(folder / "d").items()
        return reader()

    table = b"\x02site,index,label\nresid_0,1,plural\n"
    return {
        "pairs": (lambda data: pairs.read_pairs(file("pairs.jsonl", data), tokenizer), [_lines(PAIRS)]),
        "labels": (labels, [b"\0" + _lines(LABELS), b"\1" + json.dumps(LABELS).encode(), table, b"\3" + table[1:].replace(b",", b"\t")]),
        "neuronpedia": (lambda data: label_files.read_neuronpedia(file("batch-0.jsonl", data), {}, "resid_0"), [_lines(NEURONPEDIA)]),
        "attribution_graphs": (lambda data: attribution_graphs.read_attribution_graph(file("g.json", data)), [json.dumps(texas()).encode()]),
        "settings": (settings, [CONFIGURATION.encode()]),
        "dictionaries": (dictionary, [json.dumps(CONFIG).encode() + b"\0\0SPLIT\0\0" + tensors_file(SAE)]),
    }


def fuzz(name: str, runs: int, seconds: int, seeds: Path) -> int:
    """Fuzz one parser for so many runs or seconds, whichever ends first; 2 for a name that is none. Ends the process where a case breaks."""
    folder = Path(tempfile.mkdtemp(prefix="featlas-atheris-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    parsers = _parsers(folder)
    if name not in parsers:
        print(f"there is no parser {name!r}: {', '.join(parsers)}", file=sys.stderr)
        return 2
    parse, own = parsers[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate([*own, *(path.read_bytes() for path in sorted(seeds.glob(f"{name}/*")))]):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            parse(data)
        except FeatlasError:
            return

    limits = [f"-runs={runs}", f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=6000", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()
    return 0
