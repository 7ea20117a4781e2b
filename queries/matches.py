"""Aligned samples of two models, and the matchings made from them, as an atlas keeps them.

1. `AlignedStore`: folders `aligned/<key>` of the atlas. `a` and `b` are runs of samples as `samples` writes them, whose rows are the same segments of
   text; `covariances.npz` holds sums of products of the sites' raw values; `manifest.json` says what was aligned, and how.
2. `write_matching` keeps a matching's frames in the statistics; `read_matches`, `matched_features`, `read_site_pairs` and `list_matchings` read them.
3. `replace_matches` brings the graph's `MATCHES` edges to what a matching found.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError
from ..files import on_disk
from .correlations import CHUNK
from .kept_files import intact, read_object
from .samples import ABANDONED_SECONDS, SampleRun, SampleStore, SiteSamples
from .schema import feature_key
from .statistics import StatisticsStore
from .store import GraphStore

FOLDER = "aligned"
"""The folder of the aligned samples in an atlas."""

LAYOUT = 1
"""The layout of aligned samples; a greater number is of a newer featlas."""

FloatArray = NDArray[np.float64]


class NoAligned(UserError):
    """The atlas has no such aligned samples."""


class NoMatching(UserError):
    """The statistics have no such matching."""


class NewerAligned(UserError):
    """The aligned samples were written by a newer featlas."""


class Method(StrEnum):
    """What a feature's counterpart is searched among."""

    ALL_SITES = "all-sites"
    """All sites of the other side at once: a feature has one counterpart."""
    SITE_PAIRS = "site-pairs"
    """Each site of the other side by itself: a feature has one counterpart in each."""


class Pairing(StrEnum):
    """What makes two features a pair."""

    MUTUAL = "mutual"
    """Each is the other's nearest."""
    ASSIGNED = "assigned"
    """The one-to-one assignment with the greatest sum of scores joins them."""


PAIRS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "source": pl.String(), "target": pl.String(), "site_a": pl.String(), "site_b": pl.String(), "feature_a": pl.Int64(), "feature_b": pl.Int64(),
        "score": pl.Float64(), "mutual": pl.Boolean(), "assigned": pl.Boolean(), "significant": pl.Boolean(), "method": pl.String(),
    }
)  # fmt: skip
"""A matching's pairs: a feature of A, one of B, their correlation, and what says that they are a pair (`Method`, `Pairing`)."""

SITES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site_a": pl.String(), "site_b": pl.String(), "layer_a": pl.Int64(), "layer_b": pl.Int64(), "n_a": pl.Int64(), "n_b": pl.Int64(),
        "n_mutual": pl.Int64(), "n_matched": pl.Int64(), "n_all": pl.Int64(), "share_a": pl.Float64(), "share_b": pl.Float64(),
        "mean_score": pl.Float64(), "null_share": pl.Float64(), "threshold": pl.Float64(), "cka": pl.Float64(), "svcca": pl.Float64(),
        "kept_a": pl.Int64(), "kept_b": pl.Int64(),
    }
)  # fmt: skip
"""One row per pair of sites. n_mutual: mutual nearest neighbours; n_matched: those at or above the threshold, with their share of the live features
n_a and n_b and their mean score; n_all: matches over all sites at once that lie here; kept_a, kept_b: directions that SVCCA kept."""

SCORES: Mapping[str, pl.DataType] = MappingProxyType(
    {"method": pl.String(), "site_a": pl.String(), "site_b": pl.String(), "low": pl.Float64(), "n": pl.Int64(), "null_n": pl.Float64()}
)
"""How scores of mutual nearest neighbours are spread, in bins from `low` on, and by chance; no site for the search over all sites."""

OVERALL = ("n_a", "n_b", "n_mutual", "n_matched", "share_a", "share_b", "mean_score", "null_share", "threshold")
"""What is kept of the search over all sites at once, as in `SITES`."""


# -- 1. Aligned samples --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AlignedRun:
    """One side of aligned samples: a run of samples whose rows are segments."""

    run: SampleRun
    store: SampleStore
    layers: Mapping[str, int]

    @property
    def model(self) -> str:
        """The key of the model."""
        return self.run.model

    @property
    def dictionaries(self) -> Mapping[str, str]:
        """Site → the id of its dictionary."""
        return self.run.dictionaries

    @property
    def site_names(self) -> tuple[str, ...]:
        """Its sites, in the model's order."""
        return tuple(self.run.dictionaries)

    @property
    def sequences(self) -> pl.DataFrame:
        """One row per sequence."""
        return self.run.sequences

    def tokens(self) -> pl.DataFrame:
        """One row per segment: its sequence, its number in it, its text."""
        return self.store.tokens(self.run.key)

    def site(self, name: str) -> SiteSamples:
        """The features of one site, (n_segments, d_sae). Raises `NoSamples`."""
        return self.store.read(self.run.key, name)


@dataclass(frozen=True, eq=False)
class Covariances:
    """Population covariances of the sites' raw values over the segments: within each side, (d, d), and between, (d_a, d_b) by (site_a, site_b)."""

    a: Mapping[str, FloatArray]
    b: Mapping[str, FloatArray]
    between: Mapping[tuple[str, str], FloatArray]


@dataclass(frozen=True, eq=False)
class Aligned:
    """Samples of two models, or of two sets of dictionaries, whose rows are the same segments of the same text."""

    key: str
    folder: Path
    a: AlignedRun
    b: AlignedRun
    n_segments: int
    source: str
    settings: Mapping[str, Any]
    finished: str

    @property
    def model_a(self) -> str:
        """The key of the first model."""
        return self.a.model

    @property
    def model_b(self) -> str:
        """The key of the other model."""
        return self.b.model

    def covariances(self) -> Covariances | None:
        """Those of the sites' raw values, or None where they were not summed."""
        path = self.folder / "covariances.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            n = float(file["n"])
            shifted = {side: {site: file[f"sum_{side}/{site}"] / n for site in self._side(side).site_names} for side in "ab"}
            within = {
                side: {site: file[f"{side}{side}/{site}"] / n - np.outer(mean, mean) for site, mean in shifted[side].items()} for side in "ab"
            }
            between = {
                (one, other): file[f"ab/{one}/{other}"] / n - np.outer(shifted["a"][one], shifted["b"][other])
                for one in self.a.site_names for other in self.b.site_names
            }  # fmt: skip
        return Covariances(within["a"], within["b"], between)

    def _side(self, side: str) -> AlignedRun:
        return self.a if side == "a" else self.b


class AlignedStore:
    """The aligned samples of an atlas; nothing is held open."""

    def __init__(self, atlas: str | Path) -> None:
        self.folder = Path(atlas) / FOLDER

    def list(self) -> list[Aligned]:
        """All that are there, oldest first. Raises `NewerAligned`."""
        found = [self._read(path.parent) for path in sorted(self.folder.glob("[!.]*/manifest.json"))]
        return sorted(found, key=lambda aligned: (aligned.finished, aligned.key))

    def open(self, key: str | None = None) -> Aligned:
        """Those whose key begins with `key`, or those that were written last. Raises `NoAligned`."""
        there = self.list()
        fitting = there[-1:] if key is None else [aligned for aligned in there if aligned.key.startswith(key)]
        if len(fitting) == 1:
            return fitting[0]
        known = "; ".join(f"{aligned.key} ({aligned.model_a} and {aligned.model_b})" for aligned in there)
        known = known or "none: `featlas ingest aligned` makes some"
        said = f"aligned samples {key!r} are not unique" if fitting else f"no aligned samples{f' {key!r}' if key else ''} in {self.folder}"
        raise NoAligned(f"{said}: there are {known}")

    def has(self, key: str) -> bool:
        """Whether the whole key is there."""
        return (self.folder / key / "manifest.json").exists()

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A hidden folder to fill (`finish_aligned` ends it), which takes its name when the block ends well and goes when it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{key}.*"):  # by a killed process
            with suppress(OSError):
                if time.time() - max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        hidden = self.folder / f".{key}.{uuid.uuid4().hex[:12]}"
        hidden.mkdir()
        try:
            with on_disk(hidden):
                yield hidden
            try:
                hidden.rename(self.folder / key)
            except OSError:
                if not self.has(key):  # else another process was faster, which is as good
                    raise
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def delete(self, key: str) -> None:
        """Remove aligned samples by their whole key. Raises `NoAligned`."""
        shutil.rmtree(self.open(key).folder)

    def _read(self, folder: Path) -> Aligned:
        with intact(folder, "remove that folder, and make it anew with `featlas ingest aligned`"):
            manifest = read_object(folder / "manifest.json")
            if manifest["layout"] > LAYOUT:
                newer = f"aligned samples in {folder} have layout {manifest['layout']}, this featlas knows up to {LAYOUT}: upgrade featlas"
                raise NewerAligned(newer)
            store = SampleStore(folder.parent, read_only=True, folder=folder.name)
            a, b = (AlignedRun(store.find(side), store, manifest["layers"][side]) for side in ("a", "b"))
            return Aligned(manifest["key"], folder, a, b, manifest["n_segments"], manifest["source"], manifest["settings"], manifest["finished"])


def finish_aligned(folder: Path, described: Mapping[str, Any]) -> None:
    """Write the manifest of aligned samples whose two runs and covariances are in `folder`. described: the fields of `Aligned`, and `layers`."""
    content = {**described, "layout": LAYOUT, "version": version("featlas"), "finished": StatisticsStore.now().isoformat(timespec="microseconds")}
    (folder / "manifest.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# -- 2. Matchings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MatchingRows:
    """A matching as rows. record: aligned, model_a, model_b, source, settings (JSON), and the numbers of `OVERALL`."""

    key: str
    record: Mapping[str, object]
    sites: pl.DataFrame
    pairs: pl.DataFrame
    scores: pl.DataFrame


def _typed(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def write_matching(statistics: StatisticsStore, rows: MatchingRows) -> None:
    """Keep a matching, in place of the one of the same key if there is one."""
    floats = {"mean_score": pl.Float64, "threshold": pl.Float64}
    record = pl.DataFrame([dict(rows.record)], schema_overrides=floats).with_columns(finished=pl.lit(statistics.now()))
    frames = {
        "matchings": record,
        "matched_sites": _typed(rows.sites, SITES).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("ordinal")),
        "matched_pairs": _typed(rows.pairs, PAIRS),
        "matched_scores": _typed(rows.scores, SCORES),
    }
    statistics.rewrite("matching", rows.key, frames)


def list_matchings(statistics: StatisticsStore) -> pl.DataFrame:
    """All matchings, the last made first: matching, aligned, model_a, model_b, source, settings (JSON), the columns of `OVERALL`, finished."""
    return statistics.query("SELECT * FROM matchings ORDER BY finished DESC, matching")


def find_matching(statistics: StatisticsStore, key: str | None = None, *, model_a: str | None = None, model_b: str | None = None) -> str:
    """The key that begins with `key`, or that of the matching made last; of these two models, in either order. Raises `NoMatching`."""
    there = list_matchings(statistics)
    named = [model for model in (model_a, model_b) if model is not None]
    ends = zip(there["model_a"], there["model_b"])
    of_models = [sorted(named) == sorted(end) if len(named) == 2 else set(named) <= set(end) for end in ends]
    fitting = there.filter(pl.Series(of_models, dtype=pl.Boolean))["matching"].to_list()
    chosen = fitting[:1] if key is None else [name for name in fitting if name.startswith(key)]
    if len(chosen) == 1:
        return str(chosen[0])
    known = "; ".join(f"{row[0]} ({row[2]} and {row[3]})" for row in there.head(8).iter_rows()) or "none"
    way_out = "" if chosen else ": `featlas ingest aligned` and `featlas analyze match` make one"
    of = f" of {' and '.join(named)}" if named else ""
    said = f"matching {key!r} is not unique" if chosen else f"no matching{f' {key!r}' if key else ''}{of}"
    raise NoMatching(f"{said} in {statistics.path}: there are {known}{way_out}")


def matched_dictionaries(statistics: StatisticsStore, matching: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a matching (its whole key) is of, on either side: how the keys of the sites' features begin, `model|dictionary|site|`.

    By its aligned samples where the atlas still has them, and by its pairs; both empty where there are neither. Raises `NewerAligned`.
    """
    ends: list[frozenset[str]] = []
    aligned = str(statistics.query("SELECT aligned FROM matchings WHERE matching = ?", [matching]).item())
    samples = AlignedStore(statistics.path.parent)
    there = samples.open(aligned) if samples.has(aligned) else None
    for end, side in (("source", None if there is None else there.a), ("target", None if there is None else there.b)):
        rows = statistics.query(f"SELECT DISTINCT regexp_replace({end}, '[^|]*$', '') AS begins FROM matched_pairs WHERE matching = ?", [matching])
        known = {} if side is None else side.dictionaries
        ends.append(frozenset({*rows["begins"].to_list(), *(feature_key(side.model, name, site, "") for site, name in known.items() if side)}))
    return ends[0], ends[1]


def read_matches(
    statistics: StatisticsStore, key: str | None = None, *, model_a: str | None = None, model_b: str | None = None, method: Method | None = None
) -> pl.DataFrame:
    """The pairs of a matching (`PAIRS`; the one made last unless named), best first; of one method, or of both. `source` is a feature of `model_a`.

    A matching that was made the other way round is turned. Raises `NoMatching`.
    """
    matching = find_matching(statistics, key, model_a=model_a, model_b=model_b)
    rows = statistics.query(
        f"SELECT {', '.join(PAIRS)} FROM matched_pairs WHERE matching = $matching AND ($method IS NULL OR method = $method)"
        " ORDER BY method, score DESC, source, target",
        {"matching": matching, "method": None if method is None else str(method)},
    )
    made = statistics.query("SELECT model_a, model_b FROM matchings WHERE matching = ?", [matching]).row(0)
    turned = made[0] != made[1] and (model_a == made[1] or model_b == made[0])
    if turned:
        swap = {"source": "target", "site_a": "site_b", "feature_a": "feature_b"}
        rows = rows.rename(swap | {there: here for here, there in swap.items()}).select(list(PAIRS))
    return _typed(rows, PAIRS)


def matched_features(
    statistics: StatisticsStore,
    key: str | None = None,
    *,
    model_a: str | None = None,
    model_b: str | None = None,
    pairing: Pairing = Pairing.MUTUAL,
) -> pl.DataFrame:
    """The significant matches over all sites at once, one-to-one: source (in A), target (in B), score, best first. Raises `NoMatching`."""
    pairs = read_matches(statistics, key, model_a=model_a, model_b=model_b, method=Method.ALL_SITES)
    return pairs.filter(pl.col(str(pairing)) & pl.col("significant")).select("source", "target", "score")


def read_site_pairs(statistics: StatisticsStore, key: str | None = None) -> pl.DataFrame:
    """One row per pair of sites of a matching (`SITES`), in the models' order. Raises `NoMatching`."""
    matching = find_matching(statistics, key)
    return _typed(statistics.query("SELECT * FROM matched_sites WHERE matching = ? ORDER BY ordinal", [matching]), SITES)


def read_scores(statistics: StatisticsStore, key: str | None = None) -> pl.DataFrame:
    """How a matching's scores are spread (`SCORES`). Raises `NoMatching`."""
    matching = find_matching(statistics, key)
    return _typed(statistics.query("SELECT * FROM matched_scores WHERE matching = ? ORDER BY method, site_a, site_b, low", [matching]), SCORES)


# -- 3. The graph --------------------------------------------------------------------------------------------


def replace_matches(store: GraphStore, matching: str, edges: pl.DataFrame) -> int:
    """Make `edges` (as `PAIRS`) the graph's `MATCHES` of a matching; how many there are. Stored once, smaller key → larger, no loops.

    A pair of features that another matching has found by the same method is this one's now. Raises `UnknownEndpoint` where the graph lacks a node.
    """
    smaller = pl.col("source") < pl.col("target")
    columns = ["source", "target", "method", "score", "matching", "mutual", "assigned"]
    wanted = edges.filter(pl.col("source") != pl.col("target")).with_columns(
        pl.when(smaller).then("source").otherwise("target").alias("source"), pl.when(smaller).then("target").otherwise("source").alias("target"),
        pl.lit(matching).alias("matching"),
    ).select(columns)  # fmt: skip
    there = store.query(
        "MATCH (a:Feature)-[e:MATCHES]->(b:Feature) WHERE e.matching = $matching RETURN a.key AS source, b.key AS target, e.method AS method",
        {"matching": matching},
    )
    if there.height:
        stale = there.join(wanted, on=["source", "target", "method"], how="anti")
        for start in range(0, stale.height, CHUNK):
            store.query(
                "UNWIND $stale AS pair MATCH (a:Feature {key: pair.source}) MATCH (b:Feature {key: pair.target})"
                " MATCH (a)-[e:MATCHES]->(b) WHERE e.matching = $matching AND e.method = pair.method DELETE e",
                {"stale": stale[start : start + CHUNK].to_dicts(), "matching": matching},
                write=True,
            )
    for start in range(0, wanted.height, CHUNK):
        store.merge_edges("MATCHES", wanted[start : start + CHUNK])
    return wanted.height
