"""Aligned samples made of matrices, without any model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from featlas.queries.matches import Aligned, AlignedStore, finish_aligned
from featlas.queries.samples import SampleRun, SampleStore, SiteSamples
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]


def sparse_features(seed: int, n: int, d: int, *, frequency: float = 0.1) -> Array:
    """Positive features, each active on about that share of the rows, unrelated to each other."""
    random = np.random.default_rng(seed)
    return random.gamma(2.0, size=(n, d)) * (random.random((n, d)) < frequency)


def aligned_of(
    atlas: Path,
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    *,
    lengths: list[int] | None = None,
    raw: tuple[Mapping[str, Array], Mapping[str, Array]] | None = None,
    models: tuple[str, str] = ("m@1", "n@1"),
    key: str = "made",
    **settings: Any,
) -> Aligned:
    """Sites' features (n, d) by name, each side; sequences of these lengths, of 20 segments unless given; raw values for covariances."""
    n = len(next(iter(a.values())))
    lengths = lengths or [20] * (n // 20) + ([n % 20] if n % 20 else [])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    keys = [f"s{i}" for i in range(len(lengths))]
    frame = pl.DataFrame({"sequence": range(len(lengths)), "key": keys, "task": None, "label": None, "text": keys})
    store = AlignedStore(atlas)
    with store.writing(key) as folder:
        for name, side, model in zip("ab", (a, b), models):
            ids = dict.fromkeys(side, f"d{name}")
            run = SampleRun(name, model, "activation", "text", ids, len(lengths), n, {}, frame)
            rows = {site: sparse.csr_matrix(x.astype(np.float32)) for site, x in side.items()}
            sites = [SiteSamples(site, ids[site], x.shape[1], x, sequence, position) for site, x in rows.items()]
            SampleStore(folder.parent, folder=folder.name).write(run, sites, [f"t{i}" for i in range(n)])
        if raw is not None:
            sums: dict[str, Any] = {"n": np.array(n)}
            for name, side in zip("ab", raw):
                sums |= {f"sum_{name}/{site}": x.sum(axis=0) for site, x in side.items()}
                sums |= {f"{name}{name}/{site}": x.T @ x for site, x in side.items()}
            sums |= {f"ab/{one}/{other}": x.T @ y for one, x in raw[0].items() for other, y in raw[1].items()}
            np.savez(folder / "covariances.npz", **sums)
        layers = {name: {site: i for i, site in enumerate(side)} for name, side in zip("ab", (a, b))}
        finish_aligned(folder, {"key": key, "source": "text", "n_segments": n, "settings": settings, "layers": layers})
    return store.open(key)
