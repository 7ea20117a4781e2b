"""What features are called: every label in the statistics store, the best one on the feature's node in the graph.

1. A label has a kind: given by hand, read from a file, from Neuronpedia, or automatic (found by a rule, with the numbers that it stands on). All are
   kept; one of the same feature, kind, rule and source replaces the one before, and a feature has one label by hand.
2. The best label is that of the first of these kinds; of several the newest, of the automatic ones the summary, or without one the tokens. What
   the other rules say stands in the store beside it.
3. `apply_labels` makes the graph say so, `Feature.label` and `Feature.label_kind`. The statistics store is what counts: a graph that is measured
   again, or anew, gets its labels from there. `adopt_labels` takes over what stands in the graph alone.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

import polars as pl

from ..errors import UserError
from . import search
from .statistics import FILE_NAME, OlderStatisticsStore, StatisticsStore, StatisticsStoreHeld
from .store import GraphStore


class LabelKind(StrEnum):
    """Who gave a label, best first."""

    HAND = "hand"
    FILE = "file"
    NEURONPEDIA = "neuronpedia"
    AUTOMATIC = "automatic"


SUMMARY, TOKENS = "summary", "tokens"
"""The rules of automatic labels that a feature is called by: what joins them all, and the tokens that it fires on."""

LONGEST = 500
"""Characters of a label."""

_EMBEDDING = "embed"  # the site whose features an imported graph calls by their tokens

LABEL_COLUMNS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "key": pl.String(), "model": pl.String(), "site": pl.String(), "feature": pl.Int64(), "label": pl.String(), "kind": pl.String(),
        "rule": pl.String(), "source": pl.String(), "author": pl.String(), "confidence": pl.Float64(), "evidence": pl.String(),
        "written": pl.Datetime("us"),
    }
)  # fmt: skip
"""One row a label. `rule`, `source`, `author`, `confidence`, `evidence` may be left out when written."""

FOUND: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "key": pl.String(), "site": pl.String(), "feature": pl.Int64(), "score": pl.Float64(), "label": pl.String(), "label_kind": pl.String(),
        "fields": pl.List(pl.String()), "text": pl.String(),
    }
)  # fmt: skip
"""What a search gives, best first: `fields` says where it was found, `text` shows it, a label or a context with the token in 【】."""

SITES: Mapping[str, pl.DataType] = MappingProxyType({"model": pl.String(), "dictionary": pl.String(), "site": pl.String(), "d_sae": pl.Int64()})
"""The sites of an atlas; `d_sae` is null where no statistics run says it."""

_IDENTITY = ("key", "kind", "rule", "source")
_RANK = "CASE kind WHEN 'hand' THEN 0 WHEN 'file' THEN 1 WHEN 'neuronpedia' THEN 2 ELSE 3 END"
_BEST_FIRST = f"{_RANK}, rule <> '{SUMMARY}', rule <> '{TOKENS}', CASE WHEN kind <> 'automatic' THEN written END DESC, rule, source"
_A_NAME = f"(kind <> 'automatic' OR rule IN ('{SUMMARY}', '{TOKENS}'))"


class BadLabel(UserError):
    """A label's text cannot be one."""


class UnknownFeature(UserError):
    """The atlas has no such feature, or the name fits several."""


class NoLabel(UserError):
    """A feature has no such label."""


def checked(text: str) -> str:
    """A label without the blanks around it. Raises `BadLabel` where it is empty, too long, or holds what no text does."""
    label = text.strip()
    if not label:
        raise BadLabel("a label must have at least one character that is no blank: `featlas labels remove` takes one away")
    if len(label) > LONGEST:
        raise BadLabel(f"a label has {LONGEST} characters at most, not {len(label):,}: {label[:40]!r}…")
    wrong = next((c for c in label if (c < " " and c not in "\n\t\r") or c == "\x7f" or "\ud800" <= c <= "\udfff"), None)
    if wrong is not None:
        raise BadLabel(f"a label cannot hold the character U+{ord(wrong):04X}: {label[:40].encode('ascii', 'backslashreplace').decode()!r}")
    return label


# -- features ------------------------------------------------------------------------------------------------


def known_sites(store: GraphStore | None, statistics: StatisticsStore) -> pl.DataFrame:
    """The models' sites that the graph or the statistics know, as `SITES`, in order."""
    schema = pl.Schema(SITES)
    measured = statistics.query(
        "SELECT r.model, s.dictionary, s.site, max(s.d_sae)::BIGINT AS d_sae FROM run_sites s JOIN runs r ON r.run = s.run GROUP BY ALL"
    ).cast(schema)
    rows = pl.DataFrame(schema=schema)
    if store is not None:
        rows = store.query('MATCH (f:Feature) WHERE f.kind = "feature" RETURN DISTINCT f.model AS model, f.dictionary AS dictionary, f.site AS site')
        rows = rows.with_columns(d_sae=pl.lit(None)).select(list(SITES)).cast(schema) if rows.height else pl.DataFrame(schema=schema)
    both = pl.concat([measured, rows]).sort("d_sae", nulls_last=True).unique(["model", "dictionary", "site"], keep="first")
    layer = pl.col("site").str.extract(r"_(\d+)$").cast(pl.Int64).fill_null(-1)
    return both.sort("model", layer, "site", "dictionary")


def existing_features(store: GraphStore | None, statistics: StatisticsStore, keys: Collection[str]) -> pl.DataFrame:
    """Those of these keys that are features of the graph or the statistics: `key, model, site, feature`."""
    schema = pl.Schema({name: LABEL_COLUMNS[name] for name in ("key", "model", "site", "feature")})
    frames = [
        statistics.query(
            "SELECT DISTINCT s.key, r.model, s.site, s.feature::BIGINT AS feature FROM feature_statistics s JOIN runs r ON r.run = s.run"
            " WHERE s.kind = 'feature' AND s.key IN (SELECT unnest($keys::VARCHAR[]))",
            {"keys": list(keys)},
        ).cast(schema)
    ]
    if store is not None:
        rows = store.query(
            'MATCH (f:Feature) WHERE f.kind = "feature" AND f.key IN $keys'
            " RETURN f.key AS key, f.model AS model, f.site AS site, f.`index` AS feature",
            {"keys": list(keys)},
        )
        frames += [rows.cast(schema)] if rows.height else []
    return pl.concat(frames).unique("key").sort("key")


def of_model(of: str | None) -> pl.Expr:
    """Whether a site (`SITES`) is of the model whose key begins so, or of the dictionary whose id does; any where nothing is given."""
    return pl.lit(True) if of is None else pl.col("model").str.starts_with(of) | pl.col("dictionary").str.starts_with(of)


def find_feature(store: GraphStore | None, statistics: StatisticsStore, name: str, *, of: str | None = None) -> dict[str, object]:
    """The feature of a name, its whole key or SITE/INDEX: `key, model, site, feature`; `of` as in `of_model`. Raises `UnknownFeature`."""
    whole = existing_features(store, statistics, [name])
    if whole.height:
        return whole.row(0, named=True)
    sites = known_sites(store, statistics).filter(of_model(of))
    known = ", ".join(sites["site"].unique(maintain_order=True)) or "none: measure some with `featlas ingest edges` or `featlas ingest statistics`"
    site, _, index = name.rpartition("/")
    fitting = sites.filter(pl.col("site") == site)
    if not site or not (index.isascii() and index.isdigit()) or fitting.is_empty():
        whose = f" of {of}" if of else ""
        raise UnknownFeature(f"no feature {name!r}{whose}: name one by its key, or as SITE/INDEX (resid_11/123); the sites are {known}")
    stems = fitting.select(stem=pl.concat_str("model", "dictionary", "site", separator="|"))["stem"]
    keys = [f"{stem}|{int(index)}" for stem in stems]
    there = existing_features(store, statistics, keys)
    if there.is_empty():
        width = fitting["d_sae"].max()
        has = f"{site} has features 0 to {width - 1:,}" if isinstance(width, int) else f"the graph has no feature of that number at {site}"
        raise UnknownFeature(f"no feature {name!r}: {has}")
    if there.height > 1:
        raise UnknownFeature(f"{name!r} fits several features: name one by its key, {' or '.join(map(repr, there['key']))}, or say --of")
    return there.row(0, named=True)


# -- writing -------------------------------------------------------------------------------------------------


def write_labels(statistics: StatisticsStore, labels: pl.DataFrame) -> int:
    """Keep labels (`LABEL_COLUMNS`), each in place of the one of the same feature, kind, rule and source, if there is one; how many.

    All or nothing. Raises `BadLabel` for a text that cannot be one; the text is the caller's to `checked` where it is a user's.
    """
    rows = _filled(statistics, labels)
    wrong = rows.filter(
        pl.col("label").is_null() | (pl.col("label").str.len_chars() > LONGEST) | (pl.col("label").str.strip_chars() == "")
        | ~pl.col("kind").is_in(list(LabelKind))
    )  # fmt: skip
    if wrong.height:
        row = wrong.row(0, named=True)
        raise BadLabel(f"{row['key']}: no label of kind {row['kind']!r} can be {str(row['label'])[:40]!r} (1 to {LONGEST} characters)")
    with statistics.transaction():
        by_hand = rows.filter(pl.col("kind") == LabelKind.HAND)
        statistics._run(
            "DELETE FROM feature_labels WHERE kind = 'hand' AND key IN (SELECT unnest(?::VARCHAR[]))", [by_hand["key"].to_list()]
        )
        statistics._replace("feature_labels", rows, _IDENTITY)
        _index(statistics, rows["key"].unique().to_list())
    return rows.height


def _filled(statistics: StatisticsStore, labels: pl.DataFrame) -> pl.DataFrame:
    """All columns of labels, those that were left out with what stands for nothing; of several of one identity the last."""
    texts = dict.fromkeys(("rule", "source"), "")
    absent = [pl.lit(texts.get(name), dtype=dtype).alias(name) for name, dtype in LABEL_COLUMNS.items() if name not in labels.columns]
    rows = labels.with_columns(absent).select(pl.col(name).cast(dtype) for name, dtype in LABEL_COLUMNS.items())
    rows = rows.with_columns(pl.col("rule", "source").fill_null(""), pl.col("written").fill_null(statistics.now()))
    of_others = pl.col("kind") != LabelKind.HAND  # by hand there is one a feature, whatever its rule and source
    identity = [pl.when(of_others).then(name).alias(f"_{name}") for name in ("rule", "source")]
    return rows.with_columns(identity).unique(["key", "kind", "_rule", "_source"], keep="last", maintain_order=True).select(list(LABEL_COLUMNS))


def _index(statistics: StatisticsStore, keys: list[str]) -> None:
    """Index the labels that these features have now."""
    columns = "key, model, site, feature, label"
    rows = statistics.query(f"SELECT {columns} FROM feature_labels WHERE key IN (SELECT unnest($keys::VARCHAR[]))", {"keys": keys})
    search.index_labels(statistics, rows, keys)


def remove_labels(
    statistics: StatisticsStore,
    keys: Collection[str] | None = None,
    *,
    kind: LabelKind | None = None,
    source: str | None = None,
    rule: str | None = None,
    model: str | None = None,
) -> pl.DataFrame:
    """Take labels away, all that fit; returns them (`LABEL_COLUMNS`)."""
    where = (
        "($keys IS NULL OR key IN (SELECT unnest($keys::VARCHAR[]))) AND ($kind IS NULL OR kind = $kind) AND ($source IS NULL OR source = $source)"
        " AND ($rule IS NULL OR rule = $rule) AND ($model IS NULL OR model = $model)"
    )
    given = {"keys": None if keys is None else list(keys), "kind": kind and str(kind), "source": source, "rule": rule, "model": model}
    gone = _labels(statistics.query(f"SELECT * FROM feature_labels WHERE {where} ORDER BY key, {_BEST_FIRST}", given))
    if gone.height:
        with statistics.transaction():
            statistics._run(f"DELETE FROM feature_labels WHERE {where}", given)
            _index(statistics, gone["key"].unique().to_list())
    return gone


# -- reading -------------------------------------------------------------------------------------------------


def _labels(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select(pl.col(name).cast(dtype) for name, dtype in LABEL_COLUMNS.items())


def labels_of(statistics: StatisticsStore, keys: Collection[str]) -> pl.DataFrame:
    """All labels of some features (`LABEL_COLUMNS`), by key, best first."""
    rows = statistics.query(
        f"SELECT * FROM feature_labels WHERE key IN (SELECT unnest($keys::VARCHAR[])) ORDER BY key, {_BEST_FIRST}", {"keys": list(keys)}
    )
    return _labels(rows)


def list_labels(
    statistics: StatisticsStore, *, kind: LabelKind | None = None, site: str | None = None, model: str | None = None, rule: str | None = None
) -> pl.DataFrame:
    """All labels that fit (`LABEL_COLUMNS`), by model, site and feature, best first."""
    rows = statistics.query(
        "SELECT * FROM feature_labels WHERE ($kind IS NULL OR kind = $kind) AND ($site IS NULL OR site = $site)"
        f" AND ($model IS NULL OR starts_with(model, $model)) AND ($rule IS NULL OR rule = $rule)"
        f" ORDER BY model, coalesce(try_cast(regexp_extract(site, '_(\\d+)$', 1) AS INTEGER), -1), site, feature, key, {_BEST_FIRST}",
        {"kind": kind and str(kind), "site": site, "model": model, "rule": rule},
    )
    return _labels(rows)


def best_labels(statistics: StatisticsStore, keys: Collection[str] | None = None) -> pl.DataFrame:
    """The best label of each feature that has one (`LABEL_COLUMNS`), of all features unless `keys` are given, by key."""
    rows = statistics.query(
        f"SELECT * FROM feature_labels WHERE {_A_NAME} AND ($keys IS NULL OR key IN (SELECT unnest($keys::VARCHAR[])))"
        f" QUALIFY row_number() OVER (PARTITION BY key ORDER BY {_BEST_FIRST}) = 1 ORDER BY key",
        {"keys": None if keys is None else list(keys)},
    )
    return _labels(rows)


def label_summary(statistics: StatisticsStore) -> pl.DataFrame:
    """How many labels there are by kind, rule and (but for automatic ones) source: `kind, rule, source, n, features, written` (the last)."""
    return statistics.query(
        "SELECT kind, rule, origin AS source, count(*) AS n, count(DISTINCT key) AS features, max(written) AS written"
        " FROM (SELECT *, CASE kind WHEN 'automatic' THEN '' ELSE source END AS origin FROM feature_labels) GROUP BY kind, rule, origin"
        f" ORDER BY {_RANK}, rule <> '{SUMMARY}', rule, source"
    )


# -- the graph -----------------------------------------------------------------------------------------------


def graph_labels(store: GraphStore, keys: Collection[str] | None = None) -> pl.DataFrame:
    """The features of the graph with the labels that they have there: `key, model, site, feature, label, label_kind`, by key."""
    schema = {**{name: LABEL_COLUMNS[name] for name in ("key", "model", "site", "feature", "label")}, "label_kind": pl.String()}
    columns = "f.key AS key, f.model AS model, f.site AS site, f.`index` AS feature, f.label AS label, f.label_kind AS label_kind"
    where = 'f.kind = "feature"' + ("" if keys is None else " AND f.key IN $keys")
    rows = store.query(f"MATCH (f:Feature) WHERE {where} RETURN {columns} ORDER BY key", {} if keys is None else {"keys": list(keys)})
    return rows.cast(pl.Schema(schema)) if rows.height else pl.DataFrame(schema=schema)


def apply_labels(store: GraphStore, statistics: StatisticsStore, keys: Collection[str] | None = None, *, take_away: bool = True) -> int:
    """Write the best labels onto the graph's features, all or those of `keys`; how many changed.

    A label that is no more is taken away, unless `take_away` is false: then labels that stand in the graph alone stay, and only better ones come
    in their place. A label that the statistics store does not know, of no kind, stays where the feature has no other.
    """
    there = graph_labels(store, keys)
    best = best_labels(statistics, None if keys is None else keys).select("key", best="label", best_kind="kind")
    both = there.join(best, on="key", how="left", maintain_order="left")
    stale = pl.col("best").is_null() & pl.col("label_kind").is_not_null()
    differs = pl.col("best").is_not_null() & (pl.col("best").ne_missing(pl.col("label")) | pl.col("best_kind").ne_missing(pl.col("label_kind")))
    if not take_away:
        of_graph = pl.col("label").is_not_null() & pl.col("label_kind").ne_missing(str(LabelKind.AUTOMATIC))
        stale, differs = pl.lit(False), differs & ~(of_graph & (pl.col("best_kind") == str(LabelKind.AUTOMATIC)))
    changed = both.filter(stale | differs).select("key", label="best", label_kind="best_kind")
    if changed.height:
        store.merge_nodes("Feature", changed)
    return changed.height


def restore_labels(store: GraphStore, atlas: Path) -> int:
    """`apply_labels` with the statistics of an atlas, for features that the graph has only now; how many changed. None is taken away.

    Without statistics, or while another process holds them, nothing is: the next command of labels does it then.
    """
    if not (atlas / FILE_NAME).exists():
        return 0
    try:
        with StatisticsStore(atlas, read_only=True) as statistics:
            return apply_labels(store, statistics, take_away=False)
    except (StatisticsStoreHeld, OlderStatisticsStore):
        return 0


def adopt_labels(
    store: GraphStore,
    statistics: StatisticsStore,
    automatic: pl.DataFrame | None = None,
    keys: Collection[str] | None = None,
    *,
    of_unknown_kind: bool = True,
) -> int:
    """Keep labels that stand in the graph alone, of all features or those of `keys`; how many. Those that the store knows of come first.

    That is what people wrote there (a label whose kind is hand, or one without a kind, unless it is what `automatic` (`key, label`) says: graphs of
    old had automatic labels without a kind), and what came with a graph that was imported (kinds file and neuronpedia, tokens of the embedding). With
    `of_unknown_kind` false labels without a kind are left where they are, but for tokens of the embedding.
    """
    there = graph_labels(store, keys).filter(pl.col("label").is_not_null() & pl.col("label_kind").ne_missing(str(LabelKind.AUTOMATIC)))
    known = statistics.query("SELECT DISTINCT key FROM feature_labels WHERE kind <> 'automatic'")
    said = there.join(known, on="key", how="anti").with_columns(pl.col("label").str.strip_chars())
    if automatic is not None:
        said = said.join(automatic.select("key", "label"), on=["key", "label"], how="anti")
    if not of_unknown_kind:
        said = said.filter(pl.col("label_kind").is_not_null() | (pl.col("site") == _EMBEDDING))
    said = said.filter(pl.col("label").str.len_chars().is_between(1, LONGEST))
    if said.height:
        unsaid = pl.when(pl.col("site") == _EMBEDDING).then(pl.lit(str(LabelKind.FILE))).otherwise(pl.lit(str(LabelKind.HAND)))
        kind = pl.coalesce("label_kind", unsaid)
        write_labels(statistics, said.select("key", "model", "site", "feature", "label", kind=kind, source=pl.lit("graph")))
    return said.height


# -- searching -----------------------------------------------------------------------------------------------


def search_labels(
    store: GraphStore | None,
    statistics: StatisticsStore,
    text: str,
    limit: int = 20,
    *,
    site: str | None = None,
    model: str | None = None,
    fields: tuple[str, ...] = tuple(search.FIELDS),
) -> pl.DataFrame:
    """The features whose labels, tokens or contexts have the words of a text, best first (`FOUND`); see `search` for words and ranks.

    Statistics that are not indexed yet are indexed first. `label` is the best one, or where the statistics store has none that of the graph.
    Raises `search.BadQuery`.
    """
    wanted = search.parse(text)
    if {"token", "context"} & set(fields):
        search.index_contexts(statistics)
    found = search.ranked(statistics, wanted, limit, model=model, site=site, fields=fields)
    if found.is_empty():
        return pl.DataFrame(schema=FOUND)
    keys = found["key"].to_list()
    named = best_labels(statistics, keys).select("key", "label", label_kind="kind")
    if store is not None:
        named = pl.concat([named, graph_labels(store, keys).drop_nulls("label").select("key", "label", "label_kind")]).unique("key", keep="first")
    shown = _shown(statistics, keys, wanted)
    rows = found.join(named, on="key", how="left", maintain_order="left").join(shown, on="key", how="left", maintain_order="left")
    return rows.select(pl.col(name).cast(dtype) for name, dtype in FOUND.items())


def _shown(statistics: StatisticsStore, keys: list[str], wanted: search.Wanted) -> pl.DataFrame:
    """Per key the text that has most of the query's terms, a context of such a token (in 【】) rather than a label or other context; `key, text`."""
    labels = labels_of(statistics, keys).select("key", "label").with_columns(n=search.matching(pl.col("label"), wanted), at=pl.lit(1))
    around = statistics.query(
        "SELECT s.key, c.before, c.token, c.after FROM contexts c"
        " JOIN feature_statistics s ON s.run = c.run AND s.site = c.site AND s.feature = c.feature"
        " JOIN runs r ON r.run = c.run AND r.basis = 'activation'"
        " WHERE s.key IN (SELECT unnest($keys::VARCHAR[])) ORDER BY s.key, r.finished DESC, c.rank",
        {"keys": keys},
    )
    if around.height:
        blank = search.blank_between(around)
        join = lambda column: pl.col(column).list.join(blank)
        marked = pl.concat_str(join("before"), pl.lit("【"), pl.col("token"), pl.lit("】"), join("after"))
        token, context = search.matching(search.whole_word(blank), wanted), search.matching(search.whole_context(blank), wanted)
        contexts = around.select("key", label=marked, n=context, at=pl.when(token > 0).then(0).otherwise(2))
        labels = pl.concat([labels, contexts.cast(labels.schema)])
    best = labels.filter(pl.col("n") > 0).sort(["n", "at"], descending=[True, False], maintain_order=True)
    return best.unique("key", keep="first", maintain_order=True).select("key", text="label")
