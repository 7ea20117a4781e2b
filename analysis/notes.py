"""Notes on features: what a person reads instead of an index, from the graph's labels and the statistics store's contexts."""

from collections.abc import Collection

import polars as pl

from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import model_features

# One row a node: `name` is its label if it has one, else its most telling tokens; `contexts` are its strongest, with the token in 【】.
NOTES = {"key": pl.String(), "name": pl.String(), "tokens": pl.List(pl.String()), "contexts": pl.List(pl.String()), "frequency": pl.Float64()}
CONTEXTS = {"key": pl.String(), "value": pl.Float64(), "before": pl.List(pl.String()), "token": pl.String(), "after": pl.List(pl.String())}

_SHOWN = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
SEPARATOR = " · "  # between the tokens of a name: a token may be a comma
_AROUND = 8  # tokens of context on either side


def readable(text: str, width: int = 80) -> str:
    """`text` on one line of at most `width` characters, line breaks made visible; blanks alone are shown as ␣."""
    line = text.translate(_SHOWN)
    line = line.strip() or line.replace(" ", "␣")
    return line if len(line) <= width else line[: width - 1] + "…"


def _joined(column: str) -> pl.Expr:
    """A list of tokens as one string with visible line breaks."""
    return pl.col(column).list.join("").str.replace_all("\n", "⏎", literal=True).str.replace_all("\t", "⇥", literal=True)


def _per_key(contexts: pl.DataFrame, n_tokens: int, n_contexts: int) -> pl.DataFrame:
    """Columns `key, tokens, contexts`: the tokens with the largest summed |value|, and the strongest contexts as text."""
    size = contexts.with_columns(pl.col("value").abs().alias("size"))
    by_token = size.group_by("key", "token").agg(pl.col("size").sum()).sort(["key", "size", "token"], descending=[False, True, False])
    tokens = by_token.group_by("key", maintain_order=True).agg(pl.col("token").head(n_tokens).alias("tokens"))
    token = pl.col("token").str.replace_all("\n", "⏎", literal=True)
    around = [pl.col("before").list.tail(_AROUND).alias("before"), pl.col("after").list.head(_AROUND).alias("after")]
    text = size.sort(["key", "size"], descending=[False, True]).with_columns(around)
    text = text.with_columns(pl.concat_str(_joined("before"), pl.lit("【"), token, pl.lit("】"), _joined("after")).alias("text"))
    lines = text.group_by("key", maintain_order=True).agg(pl.col("text").unique(maintain_order=True).head(n_contexts).alias("contexts"))
    return tokens.join(lines, on="key")


def strongest_contexts(statistics: StatisticsStore, run: str, keys: Collection[str]) -> pl.DataFrame:
    """The contexts (schema `CONTEXTS`) that a finished statistics run kept for the features of these keys."""
    known = statistics.feature_statistics(run).filter(pl.col("key").is_in(list(keys))).select("key", "site", "feature")
    frames = [
        statistics.contexts(run, site).join(known.filter(pl.col("site") == site), on=["site", "feature"]).select(list(CONTEXTS))
        for site in known["site"].unique(maintain_order=True)
    ]
    return pl.concat(frames) if frames else pl.DataFrame(schema=CONTEXTS)


def annotate(store: GraphStore, statistics: StatisticsStore, run: str) -> int:
    """Write what a finished statistics run says of the features that the graph has; how many nodes it says something of.

    `frequency`, `mean_activation` and `statistics_run`; and as the label of a feature that has none, its most telling tokens.
    """
    present = model_features(store, statistics.run(run).model)
    rows = statistics.feature_properties(run).join(present.select("key"), on="key", how="semi")
    if rows.is_empty():
        return 0
    store.merge_nodes("Feature", rows)
    unnamed = present.filter(pl.col("label").is_null() & (pl.col("kind") == "feature")).join(rows.select("key"), on="key", how="semi")
    notes = feature_notes(unnamed, strongest_contexts(statistics, run, unnamed["key"].to_list())).filter(pl.col("tokens").list.len() > 0)
    if notes.height:
        store.merge_nodes("Feature", notes.select("key", pl.col("name").alias("label")))
    return rows.height


def feature_notes(
    features: pl.DataFrame, contexts: pl.DataFrame, *, output: str = "output", n_tokens: int = 3, n_contexts: int = 4
) -> pl.DataFrame:
    """A frame of schema `NOTES`, one row for each of `features` (`key, site, kind, index, label, frequency`).

    `contexts` (schema `CONTEXTS`) are the strongest places of each feature; a feature without label or contexts is named by its index.
    `output` is what to call the output node: the metric.
    """
    known = features.join(_per_key(contexts.select(list(CONTEXTS)), n_tokens, n_contexts), on="key", how="left", maintain_order="left")
    shown = pl.col("tokens").list.eval(pl.element().str.strip_chars(" ").replace({"": "␣"}).str.replace_all("\n", "⏎", literal=True))
    unnamed = pl.concat_str(pl.lit("feature "), pl.col("index").cast(pl.String))
    name = (
        pl.when(pl.col("label").is_not_null()).then(pl.col("label"))
        .when(pl.col("kind") == "error").then(pl.concat_str(pl.lit("error of "), pl.col("site")))
        .when(pl.col("kind") == "output").then(pl.lit(output))
        .when(pl.col("tokens").is_not_null()).then(shown.list.unique(maintain_order=True).list.join(SEPARATOR))
        .otherwise(unnamed)
    )
    empty = pl.lit([], dtype=pl.List(pl.String))
    return known.select(
        "key", name.alias("name"), pl.col("tokens").fill_null(empty), pl.col("contexts").fill_null(empty), pl.col("frequency").cast(pl.Float64)
    )
