"""Notes on features: what a person reads instead of an index, from the graph's labels and the statistics store's contexts."""

from collections.abc import Collection

import polars as pl

from ..queries.statistics import StatisticsStore

# One row a node: `name` is its label if it has one, else its most telling tokens; `contexts` are its strongest, with the token in 【】. `label_kind`
# says who gave the name: hand, file, neuronpedia, automatic (a rule; tokens too), null for names that are the node's own or nobody's.
NOTES = {
    "key": pl.String(), "name": pl.String(), "tokens": pl.List(pl.String()), "contexts": pl.List(pl.String()), "frequency": pl.Float64(),
    "label_kind": pl.String(),
}  # fmt: skip
CONTEXTS = {"key": pl.String(), "value": pl.Float64(), "before": pl.List(pl.String()), "token": pl.String(), "after": pl.List(pl.String())}

_SHOWN = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
SEPARATOR = " · "  # between the tokens of a name: a token may be a comma
AUTOMATIC_MARK = "≈ "  # before a name that a rule gave, where there are no italics
_AROUND = 8  # tokens of context on either side


def readable(text: str, width: int = 80) -> str:
    """`text` on one line of at most `width` characters, line breaks made visible; blanks alone are shown as ␣."""
    line = text.translate(_SHOWN)
    line = line.strip() or line.replace(" ", "␣")
    return line if len(line) <= width else line[: width - 1] + "…"


def marked(name: str, label_kind: str | None) -> str:
    """A name as text shows it: one that a rule gave is marked."""
    return AUTOMATIC_MARK + name if label_kind == "automatic" else name


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


def feature_notes(
    features: pl.DataFrame, contexts: pl.DataFrame, *, output: str = "output", n_tokens: int = 3, n_contexts: int = 4
) -> pl.DataFrame:
    """A frame of schema `NOTES`, one row for each of `features` (`key, site, kind, index, label, frequency`, and `label_kind` where it is known).

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
    if "label_kind" not in known.columns:
        known = known.with_columns(label_kind=pl.lit(None, dtype=pl.String))
    by_tokens = pl.col("label").is_null() & (pl.col("kind") == "feature") & pl.col("tokens").is_not_null()
    kind = pl.when(by_tokens).then(pl.lit("automatic")).when(pl.col("label").is_not_null()).then(pl.col("label_kind").cast(pl.String))
    empty = pl.lit([], dtype=pl.List(pl.String))
    return known.select(
        "key", name.alias("name"), pl.col("tokens").fill_null(empty), pl.col("contexts").fill_null(empty), pl.col("frequency").cast(pl.Float64),
        kind.alias("label_kind"),
    )
