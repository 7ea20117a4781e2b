"""A random layered circuit with names, some of them hostile, for the tests of figures and pages."""

import itertools

import numpy as np
import polars as pl
from featlas.analysis.circuits import Circuit, Selection, extract
from featlas.analysis.notes import NOTES

HOSTILE = "<script>document.title='broken'</script>"
TOKENS = (" the", " dogs", " are", " is", " John", " Mary", " gave", "\n", "&amp;", HOSTILE, "</script><b>", "${x}", " nurse", " 1732", "“", " True")


def layered_circuit(*, seed: int = 0, n_sites: int = 5, per_site: int = 40, threshold: float = 0.0) -> tuple[Circuit, pl.DataFrame]:
    """The circuit and its notes: `n_sites` residual sites with `per_site` features and one error node each, then the output."""
    rng = np.random.default_rng(seed)
    sites = [f"resid_{4 * i}" for i in range(n_sites)]
    rows = [
        {"key": f"m@1|d|{site}|{i}", "site": site, "layer": 4 * k, "kind": "error" if i == "error" else "feature", "index": str(i)}
        for k, site in enumerate(sites) for i in [*range(per_site), "error"]
    ]
    features = pl.DataFrame([*rows, {"key": "m@1|-|y|logit_diff", "site": "y", "layer": -1, "kind": "output", "index": "logit_diff"}])
    layers = [features.filter(pl.col("site") == site)["key"].to_list() for site in [*sites, "y"]]
    edges = [
        (u, v, float(rng.pareto(1.3) * rng.choice([-1, 1])))
        for below, above in itertools.pairwise(layers) for u in below for v in above if len(above) == 1 or rng.random() < 0.2
    ]
    influences = pl.DataFrame(edges, schema=["source", "target", "weight"], orient="row").with_columns(pl.col("weight").abs().alias("abs_weight"))
    circuit = extract(influences, features, Selection("a-run", threshold=threshold))
    notes = [
        {
            "key": row["key"], "name": ", ".join(t.strip() for t in tokens[:2]), "tokens": tokens,
            "contexts": [f"seen with{tokens[0]} 【{tokens[1]}】 after"], "frequency": float(rng.random() / 10),
        }
        for row in features.iter_rows(named=True) if (tokens := rng.choice(TOKENS, 3).tolist())
    ]
    return circuit, pl.DataFrame(notes, schema=NOTES)
