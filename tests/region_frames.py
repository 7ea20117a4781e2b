"""Frames of regions put to the test, made up: a sweep, a task × block matrix, selectivity, edges between units; some names hostile."""

import numpy as np
import polars as pl
from featlas.analysis.faithfulness import TABLE
from featlas.analysis.region_study import MATRIX, SELECTIVITY

from .layered_circuit import HOSTILE

SHARES = (0.02, 0.1, 0.5, 1.0)


def made_sweep() -> pl.DataFrame:
    """Rows as of `RegionVerdict.table`: of 1,000 live features, regions come to a fifth more than was asked for."""
    rows = []
    for metric in ("accuracy", "logit_diff"):
        for method, rate in (("regions", 3.0), ("features", 8.0), ("random blocks", 1.0)):
            for ablation in ("node", "edge"):
                for share in SHARES if (method, ablation) != ("features", "edge") else ():
                    held = min(1.0, share * (1.2 if method == "regions" else 1.0))
                    phi = (1 - np.exp(-rate * held)) / (1 - np.exp(-rate))
                    for part, value in (("circuit", phi), ("complement", 1 - phi)):
                        point = (method, ablation, part, round(1000 * share), None, metric, "counterfactual", "held-out", "pooled", "ratio of means")
                        kept = (share, 10 * held, 1000 * held, 200 * share if ablation == "edge" else 0.0)
                        rows.append((*point, value, value - 0.1, value + 0.1, 24, 0, 1, None, None, None, 1.0, 2.0, 0.0, *kept))
    kept = {name: pl.Float64() for name in ("share", "n_units", "n_features", "n_edges")}
    return pl.DataFrame(rows, schema={**TABLE, **kept}, orient="row")


def made_matrix() -> pl.DataFrame:
    """Four blocks of two sites and as many random ones on two tasks; one cell undefined."""
    random, rows = np.random.default_rng(0), []
    for method in ("regions", "random blocks"):
        for unit in range(4):
            removed = f"resid_{unit // 2}/block {unit % 2}"
            for place, task in enumerate(("agreement", "ioi")):
                value = 0.8 if method == "regions" and unit % 2 == place else float(random.normal(0, 0.05))
                known = None if (method, unit, place) == ("regions", 3, 0) else value
                ends = (None, None) if known is None else (known - 0.1, known + 0.1)
                name = removed if method == "regions" else f"random blocks 0: {removed}"
                rows.append((task, name, method, unit, 3 + unit, known, *ends, 12, 0, value))
    return pl.DataFrame(rows, schema=MATRIX, orient="row")


def made_selectivity() -> pl.DataFrame:
    rows = [("regions", 4, 0.7, 0.5, 0.8, 0.6, 0.5, 0.7, 0.0, 0.0, 0.0), ("random blocks", 4, 0.3, 0.1, 0.6, 0.2, 0.1, 0.3, -0.4, -0.6, -0.1)]
    return pl.DataFrame(rows, schema=SELECTIVITY, orient="row")


def made_nodes() -> pl.DataFrame:
    """Units of three sites and the output; one is called something hostile."""
    names = [f"resid_{layer}/{unit}" for layer in range(3) for unit in ("block 0", "block 1", "error")]
    labels = [HOSTILE if name == "resid_1/block 0" else name for name in names]
    return pl.DataFrame({
        "name": [*names, "y"], "label": [*labels, "y"], "site": [*(name.split("/")[0] for name in names), "y"], "n_features": [12, 4, 0] * 3 + [0],
    })  # fmt: skip


def made_drives() -> pl.DataFrame:
    """Eight edges, strongest first, two of which lower the metric."""
    ends = [("resid_2/block 0", "y"), ("resid_2/error", "y"), ("resid_1/block 0", "resid_2/block 0"), ("resid_1/block 1", "resid_2/error"),
            ("resid_0/block 0", "resid_1/block 0"), ("resid_0/block 1", "resid_1/block 1"), ("resid_0/error", "resid_2/block 0"),
            ("resid_0/block 0", "y")]  # fmt: skip
    weight = np.array([4.0, 2.0, 1.0, -0.8, 0.5, 0.4, -0.3, 0.1])
    effect = weight * [1.1, 0.7, -0.2, 0.9, 1.3, 0.1, 2.0, 1.0]
    source, target = zip(*ends)
    return pl.DataFrame({
        "source": source, "target": target, "weight": weight, "strength": np.abs(weight), "per_member": weight / 30, "effect": effect,
        "low": effect - 0.2, "high": effect + 0.2, "n": [24] * 8,
    })  # fmt: skip
