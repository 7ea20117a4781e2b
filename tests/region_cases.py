"""A small parcellation of a model of three residual sites, two of which are partitioned, and attribution between its blocks."""

from types import SimpleNamespace

import numpy as np
import polars as pl
from featlas.analysis.parcellation import PATH_SCORES, Level, Parcellation, SitePartition
from featlas.model.sites import SiteGraph, parse_site
from featlas.model.units import Units
from featlas.queries.samples import SiteSamples

MODEL = "tiny@1"
GRAPH = SiteGraph.of(3, False, [parse_site(f"resid_{i}") for i in range(3)])
DICTIONARIES = {site: SimpleNamespace(id=f"d{site.layer}", d_sae=6) for site in GRAPH.sites[:-1]}


def site_partition(site: str, features: list[int], fine: list[int], coarse: list[int], chosen: int = 0) -> SitePartition:
    levels = (Level("held-out likelihood", np.array(fine, dtype=np.int64)), Level("stability between halves", np.array(coarse, dtype=np.int64)))
    scores = pl.DataFrame({"level": [0, 1], "n_blocks": [3, 2], "largest": [2, 4], "held_out": [0.5, 0.25]})
    scores = scores.select((pl.col(name) if name in scores.columns else pl.lit(None)).cast(dtype).alias(name) for name, dtype in PATH_SCORES.items())
    notes = {"n_live": len(features), "seconds": np.float64(0.5)}
    return SitePartition(site, f"d{site[-1]}", 6, np.array(features, dtype=np.int64), levels, chosen, scores, notes)


def small_parcellation(key: str = "p1", fine: tuple[int, ...] = (0, 0, 1, 2, 1), method: str = "ward") -> Parcellation:
    """resid_0: features 0, 1, 2, 4, 5 in three blocks (feature 3 dead), then two. resid_1: all six, chosen at the coarse level."""
    sites = {
        "resid_0": site_partition("resid_0", [0, 1, 2, 4, 5], list(fine), [0 if b == 0 else 1 for b in fine]),
        "resid_1": site_partition("resid_1", [0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 0], chosen=1),
    }
    return Parcellation(key, "samples1", MODEL, method, "attribution", sites, {"seed": 3, "n": np.int64(2)})


def small_samples(site: str, seed: int = 0) -> SiteSamples:
    """30 tokens of six sequences of two tasks, all of the site's features active now and then but those that are dead."""
    random = np.random.default_rng(seed)
    values = np.maximum(random.normal(size=(30, 6)), 0).astype(np.float32)
    if site == "resid_0":
        values[:, 3] = 0
    return SiteSamples(site, f"d{site[-1]}", 6, values, np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6))


SEQUENCES = pl.DataFrame({"sequence": range(6), "task": ["ioi", "gender"] * 3, "label": "x"})
TOKENS = pl.DataFrame({"sequence": np.repeat(np.arange(6), 5), "position": np.tile(np.arange(5), 6), "text": [f" w{i % 4}" for i in range(30)]})


def small_units(parcellation: Parcellation, level: int | None = None) -> Units:
    return parcellation.units(GRAPH, DICTIONARIES, level)


def random_weights(units: Units, n_sequences: int = 3, seed: int = 0) -> np.ndarray:
    """(n_sequences, n + 1, n + 1): some of the edges that the architecture has, in sixteenths."""
    random = np.random.default_rng(seed)
    shape = (n_sequences, len(units) + 1, len(units) + 1)
    drawn = random.integers(-32, 33, shape) / 16 * (random.random(shape) < 0.7)
    return drawn * units.joined.numpy()
