"""What `featlas ingest statistics` does once its words are understood: in one process, by workers, or one shard of many."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .errors import UserError
from .options import open_atlas

if TYPE_CHECKING:
    from .ingest.corpora import Corpus
    from .ingest.statistics import Measurement
    from .ingest.statistics_workers import StatisticsJob
    from .model.dictionary_sources import SiteDictionaries
    from .model.loading import LoadedModel
    from .queries.statistics import RunRecord, StatisticsStore

Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes that measure shards of the texts, each with its share of the cores or a GPU; by Ray.")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="The Ray cluster that the workers run on, HOST:PORT or auto; else this machine.")
]
OneShard = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Measure the I-th of N shards only, for jobs of a batch system; without, merge them.")
]


class BadShardOption(UserError):
    """--shard is no I/N, or stands beside --workers."""


@dataclass(frozen=True)
class How:
    """By whom it is measured. shard: (number, of) of one shard that is measured alone."""

    workers: int | None = None
    ray_address: str | None = None
    shard: tuple[int, int] | None = None

    @staticmethod
    def of(workers: int | None, ray_address: str | None, shard: str | None, device: str) -> "How":
        """From the command line's words; raises `BadShardOption`, and what `check_workers` raises, before anything is loaded."""
        if shard is not None and (workers is not None or ray_address is not None):
            raise BadShardOption("--shard measures one shard in this process: leave --workers and --ray-address out, or --shard")
        if workers is not None or ray_address is not None:
            from .ingest.cluster import check_workers

            n_workers = 1 if workers is None else workers
            check_workers(ray_address, n_workers, device=device)
            return How(n_workers, ray_address)
        if shard is None:
            return How()
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
        if found is None:
            raise BadShardOption(f"--shard {shard!r}: write the number of the shard and how many there are, such as 3/16")
        return How(shard=(int(found[1]), int(found[2])))


@dataclass(frozen=True)
class Asked:
    """What is measured of what, as it was loaded here, and by whom."""

    job: "StatisticsJob"
    model: "LoadedModel"
    dictionaries: "SiteDictionaries"
    corpus: "Corpus"
    how: How


def run(asked: Asked, atlas: Path, graph: str | None, *, as_json: bool) -> None:
    """Measure, and say what came of it."""
    atlas.mkdir(parents=True, exist_ok=True)
    if asked.how.shard is not None:
        _one_shard(asked, atlas, *asked.how.shard, as_json=as_json)
        return
    from .queries.statistics import StatisticsStore

    with StatisticsStore(atlas) as statistics, console.progress("statistics", quiet=as_json) as bar:
        record = _measured(asked, statistics, lambda done, total, tokens: bar(done, total, f"{tokens:,} tokens"))
        # Frequencies and names are of activations.
        annotated = _annotate(atlas, graph, statistics, record.run) if asked.job.basis == "activation" else 0
    if as_json:
        console.say_json({"run": record.run, "sequences": record.sequences, "tokens": record.tokens, "annotated": annotated})
    else:
        measured = f"{record.sequences:,} sequences, {record.tokens:,} tokens"
        console.say(f"statistics run {record.run}: {measured}; {annotated:,} nodes of the graph annotated")


def _measured(asked: Asked, statistics: "StatisticsStore", report: Any) -> "RunRecord":
    from .ingest.statistics import run_measurement

    job, measurement = _with_means(asked, statistics)
    if asked.how.workers is None:
        return run_measurement(statistics, measurement, progress=report)
    from .ingest.cluster import ray_session
    from .ingest.statistics_workers import measure_by_workers

    with ray_session(asked.how.ray_address, asked.how.workers, device=job.device) as session:
        return measure_by_workers(statistics, measurement, job, session, progress=report, on_loss=console.note)


def _with_means(asked: Asked, statistics: "StatisticsStore | None") -> "tuple[StatisticsJob, Measurement]":
    """The job with the means that its baseline needs, and what is measured."""
    from .ingest.statistics import node_means

    job = asked.job
    if job.basis == "attribution" and job.settings.baseline.of_corpus:
        assert statistics is not None  # the caller has opened it
        key = statistics.find_run(job.statistics_run).run
        means = node_means(statistics, key, asked.model, asked.dictionaries, job.settings.choice)
        job = replace(job, statistics_run=key, means=means)
    return job, job.of(asked.model, asked.dictionaries, asked.corpus)


def _one_shard(asked: Asked, atlas: Path, number: int, of: int, *, as_json: bool) -> None:
    from .ingest.statistics_workers import measure_one_shard
    from .queries.statistics import StatisticsStore

    if asked.job.basis == "attribution" and asked.job.settings.baseline.of_corpus:
        with StatisticsStore(atlas, read_only=True) as statistics:
            _, measurement = _with_means(asked, statistics)
    else:
        _, measurement = _with_means(asked, None)
    with console.progress("shard", quiet=as_json) as bar:
        report = measure_one_shard(atlas, measurement, number, of, progress=lambda done, total, tokens: bar(done, total, f"{tokens:,} tokens"))
    if as_json:
        console.say_json({"run": report.run, "shard": number, "of": of, "measured": report.measured, "done": report.n_done})
        return
    if report.merged:
        console.say(f"statistics run {report.run} is done, with all of its shards: nothing was measured")
        return
    found = "measured" if report.measured else "was measured before"
    console.say(f"statistics run {report.run}: {report.shard} {found}; {report.n_done} of {of} are there")
    if report.n_done == of:
        console.note("all shards are there: the same command without --shard merges them")


def _annotate(atlas: Path, graph: str | None, statistics: "StatisticsStore", run: str) -> int:
    """Frequencies onto the graph's features, where there is a graph."""
    from .analysis.labels import annotate

    if graph is None and not (atlas / "graph.lbug").exists():
        return 0
    with open_atlas(atlas, graph, write=True) as store:
        return annotate(store, statistics, run)
