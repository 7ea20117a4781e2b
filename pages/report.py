"""A whole atlas as one HTML file that opens offline.

1. `contents` asks `payload` for every page that the file can show: the overview, each run with its circuits (of all sequences, of each task, of some
   sequences, and those that were saved), sweeps, regions, communities, matchings, comparisons, series, and the features that any of these name.
2. `render` puts them, compressed, into the page.

What a file cannot hold without end is cut to the strongest: edges of a circuit, sequences, features; the page says what was left out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlencode

from ..errors import UserError
from ..queries.subgraphs import RunRow, find_run, list_runs
from .document import document, embedded
from .features import feature_pages, feature_table
from .payload import DRAWN_EDGES, circuit_page, overview, run_page
from .source import Page, PageSource
from .studies import community_page, comparison_page, matching_page, region_page, series_page, sweep_page

Progress = Callable[[int, int, str], None]


class NothingToReport(UserError):
    """The atlas holds nothing that a page could show."""


@dataclass(frozen=True)
class ReportOptions:
    """What the file holds. run: the beginning of a key, to be about that run alone. max_edges: of each circuit, the strongest. max_sequences: of each
    run, with a circuit of their own, at most a fifth of the edges each. max_features: with all that is known of them, the most influential first."""

    run: str | None = None
    max_edges: int = DRAWN_EDGES
    max_sequences: int = 24
    max_features: int = 3000


@dataclass
class _Contents:
    """The pages by their addresses, and the features that they name with their weight: the greatest influence that any circuit gives them."""

    pages: dict[str, Page] = field(default_factory=dict)
    features: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, page: Page, **parameters: str | None) -> Page:
        given = sorted((key, value) for key, value in parameters.items() if value is not None)
        self.pages[name + (f"?{urlencode(given)}" if given else "")] = page
        return page

    def name(self, keys: Iterable[str], weight: float = 0.0) -> None:
        for key in keys:
            self.features[key] = max(self.features.get(key, 0.0), weight)


def contents(source: PageSource, options: ReportOptions = ReportOptions(), progress: Progress | None = None) -> dict[str, object]:
    """Everything that the file shows: `pages` by their addresses (`name?parameter=value`). Raises `NothingToReport`, `UnknownRun`."""
    found = _Contents()
    runs = [find_run(source.store, options.run)] if options.run is not None else list_runs(source.store)
    summary = _of_runs(overview(source), {run.key for run in runs}) if options.run is not None else overview(source)
    if not summary["counts"]:
        raise NothingToReport(f"the graph of {source.atlas} is empty: measure something first, with `featlas demo` or `featlas ingest edges`")
    found.add("overview", summary)
    steps: list[tuple[str, Callable[[], None]]] = [(f"run {run.key}", partial(_add_run, found, source, run, options)) for run in runs]
    steps += [(f"sweep {row['subject']}", partial(_add_sweep, found, source, row)) for row in summary["sweeps"]]
    for section, name, add in (
        ("parcellations", "key", _add_regions), ("communities", "parcellation", _add_communities), ("matchings", "matching", _add_matching),
        ("comparisons", "comparison", _add_comparison), ("series", "series", _add_series),
    ):  # fmt: skip
        steps += [(f"{section} {row[name]}", partial(add, found, source, row[name])) for row in summary[section]]
    steps.append(("features", partial(_add_features, found, source, options)))
    for done, (what, step) in enumerate(steps):
        if progress is not None:
            progress(done, len(steps), what)
        step()
    if progress is not None:
        progress(len(steps), len(steps), "")
    return {"pages": found.pages}


def render(source: PageSource, options: ReportOptions = ReportOptions(), progress: Progress | None = None) -> str:
    """The file as text, about 5.5 MB and what the atlas holds; 5 MB are the libraries."""
    made = contents(source, options, progress)
    return document(f"Atlas {source.atlas.resolve().name}", embedded(made))


# --- one part each ----------------------------------------------------------------------------------------------------


def _of_runs(summary: Page, runs: set[str]) -> Page:
    """The overview of some runs alone: what is about others is left out, what is about none of them (regions, matchings) stays."""
    mine = lambda rows: [row for row in rows if row.get("run") in runs]
    own = {name: mine(summary[name]) for name in ("circuits", "sweeps", "communities")}
    return {**summary, **own, "runs": [row for row in summary["runs"] if row["key"] in runs]}


def _add_run(found: _Contents, source: PageSource, run: RunRow, options: ReportOptions) -> None:
    page = found.add("run", run_page(source, run.key), run=run.key)
    found.name((row["key"] for row in page["features"]), 1.0)
    found.name((node["key"] for path in page["paths"] for node in path["nodes"]), 1.0)
    if not page["sequences"] or not run.properties.get("n_edges"):
        return
    _add_circuit(found, source, {"run": run.key}, options.max_edges)
    tasks = [row[0] for row in page["tasks"]["rows"]]
    for task in tasks if len(tasks) > 1 else ():
        _add_circuit(found, source, {"run": run.key, "task": task}, options.max_edges)
    for circuit in page["circuits"]:
        if circuit["of"] == "features":
            _add_circuit(found, source, {"circuit": circuit["key"]}, options.max_edges)
    for sequence in _in_turn(page["sequences"], options.max_sequences):
        _add_circuit(found, source, {"run": run.key, "sequence": sequence}, max(options.max_edges // 5, 1))


def _in_turn(sequences: list[Page], n: int) -> list[str]:
    """Keys of `n` sequences, of each task in turn."""
    by_task: dict[str, list[str]] = {}
    for sequence in sequences:
        if sequence["n_edges"]:
            by_task.setdefault(str(sequence["task"]), []).append(sequence["key"])
    longest = max(map(len, by_task.values()), default=0)
    return [keys[i] for i in range(longest) for keys in by_task.values() if i < len(keys)][:n]


def _add_circuit(found: _Contents, source: PageSource, parameters: dict[str, str], max_edges: int) -> None:
    """A circuit and the features in it; one that nothing is left of is left out."""
    try:
        page = circuit_page(source, parameters.get("run"), edges=max_edges, **{k: v for k, v in parameters.items() if k != "run"})  # type: ignore[arg-type]
    except UserError:
        return
    if "circuit" in parameters:
        page = _strongest(page, max_edges)
    found.add("circuit", page, **parameters)
    for node in page["nodes"]:
        found.name([node["key"]], node["influence"] or 0.0)


def _strongest(page: Page, max_edges: int) -> Page:
    """A stored circuit with its strongest edges, and the nodes that these join; edges name nodes by their ids, which stay."""
    if len(page["edges"]) <= max_edges:
        return page
    edges = page["edges"][:max_edges]
    joined = {end for edge in edges for end in edge[:2]}
    settings = {**page["settings"], "weakest": edges[-1][3]}
    return {**page, "edges": edges, "nodes": [node for node in page["nodes"] if node["id"] in joined], "settings": settings}


def _add_sweep(found: _Contents, source: PageSource, row: Page) -> None:
    page = sweep_page(source, row["subject"], row["baseline"])
    found.add("sweep", page, subject=row["subject"], baseline=row["baseline"])


def _add_regions(found: _Contents, source: PageSource, key: str) -> None:
    found.add("region", region_page(source, key), parcellation=key)


def _add_communities(found: _Contents, source: PageSource, key: str) -> None:
    page = found.add("community", community_page(source, key), parcellation=key)
    for block in page["blocks"]:
        found.name(block["members"])


def _add_matching(found: _Contents, source: PageSource, key: str) -> None:
    page = found.add("matching", matching_page(source, key), matching=key)
    at = [page["pairs"]["columns"].index(name) for name in ("source", "target")]
    found.name(row[column] for row in page["pairs"]["rows"] for column in at)


def _add_comparison(found: _Contents, source: PageSource, key: str) -> None:
    found.add("comparison", comparison_page(source, key), comparison=key)


def _add_series(found: _Contents, source: PageSource, key: str) -> None:
    found.add("series", series_page(source, key), series=key)


def _add_features(found: _Contents, source: PageSource, options: ReportOptions) -> None:
    """The table of all features, and the pages of those that are named most; the others that are live fill what room is left."""
    everything = found.add("features", feature_table(source))
    key = everything["table"]["columns"].index("key")
    found.name(row[key] for row in everything["table"]["rows"])
    chosen = sorted(found.features, key=lambda name: -found.features[name])[: options.max_features]
    for name, page in feature_pages(source, chosen).items():
        found.add("feature", page, key=name)
