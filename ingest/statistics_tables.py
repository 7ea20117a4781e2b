"""Records become the tables of the statistics store."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ..queries.schema import feature_key
from ..queries.statistics import ERROR, RunRecord, SiteRecord
from .moments import Contexts, Moments, SiteStatistics
from .products import LAGS, JointMoments, Tile


def site_tables(
    record: RunRecord, site: SiteRecord, statistics: SiteStatistics, live: np.ndarray | None, keys: Sequence[str], tokenizer: Any
) -> dict[str, pl.DataFrame]:
    """Table name → rows of one site, without the column `run`."""
    tables = {
        "feature_statistics": _feature_table(record, site, statistics, live),
        "contexts": _context_table(statistics.contexts, site.d_sae, keys, tokenizer),
    }
    if statistics.errors is not None:
        tables["error_means"] = _error_table(statistics)
    if statistics.positions is not None:
        rows, nodes, _ = statistics.positions.sums
        position, feature = nodes.nonzero(as_tuple=True)
        mean = nodes[position, feature] / rows[position]
        tables["node_means"] = pl.DataFrame({"position": position.cpu().numpy(), "feature": feature.cpu().numpy(), "mean": mean.cpu().numpy()})
    return {table: frame.with_columns(pl.lit(site.site).alias("site")) for table, frame in tables.items()}


def _feature_table(record: RunRecord, site: SiteRecord, statistics: SiteStatistics, live_nodes: np.ndarray | None) -> pl.DataFrame:
    moments = statistics.moments
    live = np.zeros(site.d_sae + 1, dtype=bool)
    live[live_nodes if live_nodes is not None else []] = True
    live[site.d_sae] = False  # it is no feature, though it takes part in second moments
    host = {name: getattr(moments, name).cpu().numpy() for name in ("count", "mean", "variance", "minimum", "maximum", "magnitude")}
    active = np.maximum(host["count"], 1)
    index = pl.int_range(site.d_sae + 1, dtype=pl.Int32, eager=True)
    frame = pl.DataFrame(
        {
            "feature": index, "live": live, "count": host["count"], "frequency": host["count"] / moments.rows,
            "mean": host["mean"], "variance": host["variance"], "minimum": host["minimum"], "maximum": host["maximum"],
            "mean_active": host["mean"] * moments.rows / active, "mean_magnitude": host["magnitude"] / moments.rows,
        }
    )  # fmt: skip
    error = pl.col("feature") == site.d_sae
    name = pl.when(error).then(pl.lit("error")).otherwise(pl.col("feature").cast(pl.String))
    return frame.with_columns(
        pl.lit(site.layer).alias("layer"),
        pl.when(error).then(pl.lit("error")).otherwise(pl.lit("feature")).alias("kind"),
        pl.concat_str([pl.lit(feature_key(record.model, site.dictionary, site.site, "")), name]).alias("key"),
        pl.when(error).then(pl.lit(ERROR, dtype=pl.Int32)).otherwise(pl.col("feature")).alias("feature"),
    )


def joint_tables(joint: JointMoments, moments: Mapping[str, Moments]) -> dict[str, Iterable[pl.DataFrame]]:
    """Table name → frames of what is of all sites together, without the column `run`; products are read tile by tile."""
    pairs = pl.DataFrame(joint.pairs, schema=["site_i", "site_j"], orient="row").with_row_index("ordinal")
    return {
        "live_nodes": [_live_table(joint, site, moments[site]) for site in joint.widths],
        "run_lags": [pl.DataFrame({"lag": LAGS, "rows": joint.lag_rows})],
        "site_pairs": [pairs],
        "second_moments": (_product_table(joint, tile, sums) for tile, sums in joint.blocks(within=True)),
        "second_moments_between": (_product_table(joint, tile, sums) for tile, sums in joint.blocks(within=False)),
    }


def _live_table(joint: JointMoments, site: str, moments: Moments) -> pl.DataFrame:
    assert joint.live is not None  # the caller has folded
    nodes, sums = joint.live[site], joint.sums[site]
    mean = sums.sums / joint.rows
    square, cube = sums.squares / joint.rows, sums.cubes / joint.rows
    # Exactly: rounding leaves a constant far from 0 some variance.
    constant = (moments.minimum == moments.maximum).cpu().numpy()[nodes]
    variance = np.where(constant, 0.0, np.clip(square - mean**2, 0.0, None))
    third = cube - 3 * mean * square + 2 * mean**3
    autocorrelation = sums.autocorrelation(joint.rows, joint.lag_rows) * (variance > 0)[:, None]
    return pl.DataFrame(
        {
            "site": [site] * len(nodes), "feature": _numbers(joint, site).astype(np.int32), "shift": sums.shift, "mean": mean, "variance": variance,
            "skewness": np.divide(third, variance**1.5, out=np.zeros_like(third), where=variance > 0),
            "autocorrelation": pl.Series(autocorrelation.tolist(), dtype=pl.List(pl.Float64)),
        }
    )  # fmt: skip


def _numbers(joint: JointMoments, site: str) -> np.ndarray:
    """The live nodes' numbers in the store: the error node is `ERROR`."""
    assert joint.live is not None
    return np.where(joint.live[site] == joint.widths[site], ERROR, joint.live[site])


def _product_table(joint: JointMoments, tile: Tile, sums: np.ndarray) -> pl.DataFrame:
    """The nonzero products of a tile; within a site those with feature_i ≤ feature_j, the error node being the least."""
    i, j = np.nonzero(sums)
    first, second = _numbers(joint, tile.first)[tile.start + i], _numbers(joint, tile.second)[j]
    frame = pl.DataFrame({"feature_i": first.astype(np.int32), "feature_j": second.astype(np.int32), "sum_product": sums[i, j]})
    if tile.first == tile.second:
        return frame.filter(pl.col("feature_i") <= pl.col("feature_j")).with_columns(pl.lit(tile.first).alias("site"))
    return frame.with_columns(pl.lit(tile.first).alias("site_i"), pl.lit(tile.second).alias("site_j"))


def _context_table(contexts: Contexts, d_sae: int, keys: Sequence[str], tokenizer: Any) -> pl.DataFrame:
    sequence = contexts.sequence.cpu().numpy()
    feature, rank = np.nonzero(sequence >= 0)  # sorted by feature, then rank
    sequence, tokens = sequence[feature, rank], contexts.tokens.cpu().numpy()[feature, rank]  # (n,), (n, before + 1 + after)
    frame = pl.DataFrame(
        {
            "feature": np.where(feature == d_sae, ERROR, feature).astype(np.int32), "rank": rank.astype(np.int32),
            "value": contexts.value.cpu().numpy()[feature, rank], "sequence": sequence,
            "sequence_key": pl.Series([keys[i] for i in sequence] if keys else [None] * len(sequence), dtype=pl.String),
            "position": contexts.position.cpu().numpy()[feature, rank],
            "ids": _rows(pl.Series(tokens.reshape(-1), dtype=pl.Int32), tokens.shape), "texts": _rows(token_texts(tokens, tokenizer), tokens.shape),
        }
    )  # fmt: skip
    texts, before = pl.col("texts").list, contexts.before
    return frame.with_columns(
        pl.col("ids").list.eval(pl.element().filter(pl.element() >= 0)).alias("token_ids"),
        texts.slice(0, before).list.drop_nulls().alias("before"), texts.get(before).alias("token"),
        texts.slice(before + 1).list.drop_nulls().alias("after"),
    ).drop("ids", "texts")  # fmt: skip


def _rows(flat: pl.Series, shape: tuple[int, ...]) -> pl.Series:
    """A flat series (n · width,) as n lists of `width`."""
    return flat.reshape(shape).arr.to_list() if len(flat) else pl.Series(dtype=pl.List(flat.dtype))


def token_texts(tokens: np.ndarray, tokenizer: Any) -> pl.Series:
    """The text of each token id, flat, null where there is none (-1); each different id is decoded once."""
    ids, place = np.unique(tokens, return_inverse=True)
    real = ids[ids >= 0]
    texts = tokenizer.batch_decode(real[:, None].tolist(), clean_up_tokenization_spaces=False) if len(real) else []
    return pl.Series([None] * (len(ids) - len(real)) + texts, dtype=pl.String).gather(place.reshape(-1))


def _error_table(statistics: SiteStatistics) -> pl.DataFrame:
    """The overall mean and variance vectors (position -1), then the mean vectors by position."""
    assert statistics.errors is not None  # the caller asked
    errors = statistics.errors
    rows = [(-1, errors.rows, errors.mean.tolist(), errors.variance.tolist())]
    if statistics.positions is not None:
        counts, _, sums = statistics.positions.sums
        measured = counts.nonzero().squeeze(-1).tolist()
        rows += [(position, int(counts[position]), (sums[position] / counts[position]).tolist(), []) for position in measured]
    schema: dict[str, Any] = {"position": pl.Int32, "tokens": pl.Int64, "mean": pl.List(pl.Float64), "variance": pl.List(pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row")
