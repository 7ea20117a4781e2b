"""The commands that made what an atlas holds, as far as its manifests tell, and those that go on from it."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..queries.contents import SETTINGS, flags_of
from ..queries.kept_files import run_options
from ..queries.samples import SampleStore
from ..queries.subgraphs import STRONGEST_ON_OUTPUT, RunRow

_OPTIONS = ("model", "dictionaries", "task", "limit", "seed", "sites", "dtype", "statistics_run", "target")
_DEFAULTS: Mapping[str, object] = {
    "seed": 0, "baseline": "counterfactual", "positions": "sum", "metric": "logit_diff", "dtype": "float32", "first_factor": "exact",
    "tolerance": 0.02, "noise_scale": 1.0,
}  # fmt: skip


def _place(atlas: Path) -> list[str]:
    return [] if atlas == Path("atlas") else ["--atlas", str(atlas)]


def _options(values: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """The options that were given, without those that say what holds anyway."""
    words: list[str] = []
    for name in names:
        value = values.get(name)
        if value is not None and value != _DEFAULTS.get(name):
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words


def commands_of(atlas: Path, runs: Iterable[RunRow]) -> list[str]:
    """One command for each run whose manifest the atlas keeps, and one for each run of samples: that made it, or what does the same."""
    said = []
    for run in runs:
        manifest = atlas / "runs" / f"{run.key}.json"
        if manifest.exists():
            options = run_options(atlas, run.key)
            settings = options.get("settings") or {}
            words = [*_options(options, _OPTIONS), *_options(settings, SETTINGS), *flags_of(options)]
            said.append(shlex.join(["featlas", "ingest", "edges", *words, *_place(atlas)]))
    samples = SampleStore(atlas, read_only=True).runs()
    return said + [shlex.join(["featlas", "ingest", "samples", "--task", run.source, *_place(atlas)]) for run in samples]


def next_commands(atlas: Path, run: str) -> list[str]:
    """What goes on from a run, complete as they stand."""
    place = _place(atlas)
    return [
        shlex.join(["featlas", "query", "hubs", "--param", f"run={run}", *place]),
        shlex.join(["featlas", "query", "--cypher", STRONGEST_ON_OUTPUT, *place]),
        shlex.join(["featlas", "analyze", "circuit", "--run", run, "--edges", "100", "--by", "weight", *place]),
        shlex.join(["featlas", "analyze", "faithfulness", "--run", run, *place]),
    ]
