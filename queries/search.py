"""Full-text search of features: an inverted index in the statistics store, ranked by BM25.

1. `terms` cuts a text into what is indexed: words without their case and accents, the signs of scripts that put no blanks between words one by one,
   and symbols; in tokens and in queries that hold nothing else punctuation marks too.
2. A feature has three fields: its labels, the tokens that it is strongest at (the whole words that they are parts of), and their contexts.
   Labels are indexed as they are written, a statistics run's tokens and contexts when they are first searched. Where the store is open for
   reading only, those are indexed in memory, for as long as it is open.
3. A feature's score is the sum over fields, by their weight, and over the query's terms of

       ln(1 + (N − n + ½) / (n + ½)) · f (k + 1) / (f + k (1 − b + b · length / mean length))

   with f the term's count in the field, which n of all N features have in it. A term that ends in * stands for all that begin so.

Robertson & Zaragoza (2009), The Probabilistic Relevance Framework: BM25 and Beyond.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from ..errors import UserError
from .statistics import StatisticsStore

FIELDS: Mapping[str, float] = {"label": 3.0, "token": 2.0, "context": 1.0}
"""What a feature is found by, and how much each counts."""

K, B = 1.2, 0.75
LABELS = ""
"""The origin of labels in the index."""

LONGEST_QUERY = 1000
_CHUNK = 200_000  # contexts at once
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
_TERM = rf"[{_UNSPACED}]|[[\p{{L}}\p{{N}}\p{{Mc}}]--[{_UNSPACED}]]+|\p{{S}}"
_MARK = r"\p{P}"
_TABLES = ("search_terms", "search_documents", "search_origins")


class BadQuery(UserError):
    """A text cannot be searched for."""


@dataclass(frozen=True)
class Wanted:
    """The terms of a query, and which of them stand for all that begin so."""

    terms: tuple[str, ...]
    prefixes: tuple[bool, ...]


def plain(text: pl.Expr) -> pl.Expr:
    """A text without case and accents."""
    return text.str.to_lowercase().str.normalize("NFKD").str.replace_all(r"\p{Mn}", "").str.replace_all("ß", "ss", literal=True)


def terms(text: pl.Expr, *, marks: bool = False) -> pl.Expr:
    """The terms of a text, a list, in order and with repetitions; with `marks` punctuation is among them."""
    return plain(text).str.extract_all(f"{_TERM}|{_MARK}" if marks else _TERM)


def parse(text: str) -> Wanted:
    """The terms that a query asks for, each once. Raises `BadQuery` where there are none."""
    if len(text) > LONGEST_QUERY:
        raise BadQuery(f"the text to search for has {len(text):,} characters: {LONGEST_QUERY:,} at most")
    words = pl.DataFrame({"word": text.encode("utf-8", "replace").decode().split() or [""]}).select(
        "word", terms=terms(pl.col("word")), marks=terms(pl.col("word"), marks=True)
    )
    column = "terms" if words["terms"].list.len().sum() else "marks"
    found: dict[tuple[str, bool], None] = {}
    for word, parts in words.select("word", column).iter_rows():
        starred = column == "terms" and word.endswith("*")
        for i, part in enumerate(parts):
            found[part, starred and i == len(parts) - 1] = None
    if not found:
        raise BadQuery(f"nothing to search for in {text!r}: give a word, a token or a symbol")
    return Wanted(tuple(term for term, _ in found), tuple(prefix for _, prefix in found))


# -- indexing ------------------------------------------------------------------------------------------------


def documents_of(texts: pl.DataFrame, field: str, *, marks: bool = False) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(terms, documents) of texts of one field: `key, model, site, feature, text`, any number of rows a key."""
    cut = texts.with_columns(term=terms(pl.col("text"), marks=marks)).explode("term").drop_nulls("term")
    identity = ["key", "model", "site", "feature"]
    counted = cut.group_by(*identity, "term").agg(pl.len().cast(pl.Int64).alias("n"))
    documents = counted.group_by(identity).agg(pl.col("n").sum().alias("length"))
    return counted.select("key", "term", "n", field=pl.lit(field)), documents.with_columns(field=pl.lit(field))


def index_labels(statistics: StatisticsStore, labels: pl.DataFrame, gone: Sequence[str] = ()) -> None:
    """Index all labels of some features (`key, model, site, feature, label`) anew, and take those `gone` out; the transaction is the caller's."""
    keys = pl.DataFrame({"key": pl.concat([labels["key"], pl.Series("key", list(gone), dtype=pl.String)]).unique()})
    found, documents = documents_of(labels.rename({"label": "text"}), "label")
    for table, rows in (("search_terms", found), ("search_documents", documents)):
        _remove(statistics, table, keys)
        statistics._insert(table, rows.with_columns(origin=pl.lit(LABELS)).sort("key", *(("term",) if table == "search_terms" else ())))


def _remove(statistics: StatisticsStore, table: str, keys: pl.DataFrame) -> None:
    """Take the labels of these keys out of one of the index' tables."""
    statistics._run(f"DELETE FROM {table} WHERE origin = ? AND key IN (SELECT unnest(?::VARCHAR[]))", [LABELS, keys["key"].to_list()])


def index_contexts(statistics: StatisticsStore) -> int:
    """Index the tokens and contexts of every finished run over activations that is not indexed yet; how many runs that were.

    Of a store that is open for reading they are indexed in memory.
    """
    suffix = _in_memory(statistics)
    known = " UNION ALL ".join(f"SELECT origin FROM {table}" for table in ("search_origins", *([f"search_origins{suffix}"] if suffix else [])))
    waiting = statistics.query(
        f"SELECT run FROM runs WHERE status = 'done' AND basis = 'activation' AND run NOT IN ({known}) ORDER BY started, run"
    )["run"].to_list()
    for run in waiting:
        with statistics.transaction():
            for site in statistics.run(run).sites:
                _index_site(statistics, run, site.site, suffix)
            statistics._insert(f"search_origins{suffix}", pl.DataFrame({"origin": [run], "indexed": [statistics.now()]}))
    if not suffix:
        orphans = "origin <> '' AND origin NOT IN (SELECT run FROM runs)"
        if statistics.query(f"SELECT 1 FROM search_origins WHERE {orphans} LIMIT 1").height:
            with statistics.transaction():
                for table in _TABLES:
                    statistics._run(f"DELETE FROM {table} WHERE {orphans}")
    return len(waiting)


def _in_memory(statistics: StatisticsStore) -> str:
    """What the names of the tables to write to end in: those in memory where the file cannot be written to; they are made once."""
    if not statistics.query("SELECT readonly FROM duckdb_databases() WHERE database_name = current_database()")["readonly"][0]:
        return ""
    for table in _TABLES:
        statistics._run(f"CREATE TEMP TABLE IF NOT EXISTS {table}_read AS SELECT * FROM {table} LIMIT 0")
    return "_read"


def _index_site(statistics: StatisticsStore, run: str, site: str, suffix: str) -> None:
    """Index one site of a run, a part of its features at a time."""
    total = int(statistics.query("SELECT count(*) AS n FROM contexts WHERE run = ? AND site = ?", [run, site])["n"][0])
    if not total:
        return
    last = int(statistics.query("SELECT max(feature) AS n FROM contexts WHERE run = ? AND site = ?", [run, site])["n"][0])
    step = max(1, (last + 1) * _CHUNK // total)
    for start in range(0, last + 1, step):
        rows = statistics.query(
            "SELECT s.key, r.model, s.site, s.feature::BIGINT AS feature, c.before, c.token, c.after FROM contexts c"
            " JOIN feature_statistics s ON s.run = c.run AND s.site = c.site AND s.feature = c.feature JOIN runs r ON r.run = c.run"
            " WHERE c.run = ? AND c.site = ? AND c.feature BETWEEN ? AND ? ORDER BY c.feature, c.rank",
            [run, site, start, start + step - 1],
        )
        identity, blank = ["key", "model", "site", "feature"], blank_between(rows)
        for field, text in (("token", whole_word(blank)), ("context", whole_context(blank))):
            found, documents = documents_of(rows.select(*identity, text=text), field, marks=field == "token")
            statistics._insert(f"search_terms{suffix}", found.with_columns(origin=pl.lit(run)).sort("key", "term"))
            statistics._insert(f"search_documents{suffix}", documents.with_columns(origin=pl.lit(run)).sort("key"))


def blank_between(contexts: pl.DataFrame) -> str:
    """What stands between tokens (columns `before, token, after`): nothing where they bring their own blanks, a blank where they are whole words."""
    texts = (contexts["before"].explode(), contexts["token"], contexts["after"].explode())
    return "" if any(text.str.contains(r"^\s").any() for text in texts) else " "


def whole_context(blank: str = "") -> pl.Expr:
    """A context as one text, of its columns `before, token, after`, with `blank` between tokens."""
    return pl.concat_str(pl.col("before").list.join(blank), pl.col("token"), pl.col("after").list.join(blank), separator=blank)


def whole_word(blank: str = "") -> pl.Expr:
    """The token with what belongs to the same word before and behind it; itself where there is a `blank` between tokens."""
    if blank:
        return pl.col("token")
    before = pl.when(pl.col("token").str.contains(r"^[\p{L}\p{N}]")).then(pl.col("before").list.join("").str.extract(r"([\p{L}\p{N}]+)$"))
    after = pl.when(pl.col("token").str.contains(r"[\p{L}\p{N}]$")).then(pl.col("after").list.join("").str.extract(r"^([\p{L}\p{N}]+)"))
    return pl.concat_str(before.otherwise(pl.lit("")).fill_null(""), pl.col("token"), after.otherwise(pl.lit("")).fill_null(""))


# -- searching -----------------------------------------------------------------------------------------------


def ranked(
    statistics: StatisticsStore,
    wanted: Wanted,
    limit: int,
    *,
    model: str | None = None,
    site: str | None = None,
    fields: Sequence[str] = tuple(FIELDS),
) -> pl.DataFrame:
    """The features that have any of the terms, best first: `key, model, site, feature, score, fields` (where it was found, a list).

    N, n and mean lengths are those of all features that are indexed in these fields, whatever `model` and `site` leave of the answer.
    """
    suffix = _in_memory(statistics)
    whole = lambda table: f"SELECT * FROM {table}" + (f" UNION ALL SELECT * FROM {table}{suffix}" if suffix else "")
    return statistics.query(
        f"""
        WITH wanted AS (SELECT unnest($terms::VARCHAR[]) AS asked, unnest($prefixes::BOOLEAN[]) AS prefix),
        weights AS (SELECT unnest($fields::VARCHAR[]) AS field, unnest($weights::DOUBLE[]) AS weight),
        live AS (SELECT '' AS origin UNION ALL SELECT run FROM runs),
        documents AS (
            SELECT field, key, any_value(model) AS model, any_value(site) AS site, any_value(feature) AS feature, sum(length) AS length
            FROM ({whole("search_documents")}) SEMI JOIN live USING (origin) SEMI JOIN weights USING (field) GROUP BY field, key
        ),
        sizes AS (SELECT field, avg(length) AS mean_length, (SELECT count(DISTINCT key) FROM documents) AS n_features FROM documents GROUP BY field),
        found AS (
            SELECT t.field, t.key, w.asked, w.prefix, sum(t.n) AS n
            FROM ({whole("search_terms")}) t SEMI JOIN live USING (origin) SEMI JOIN weights USING (field)
            JOIN wanted w ON t.term = w.asked OR (w.prefix AND starts_with(t.term, w.asked)) GROUP BY ALL
        ),
        spread AS (SELECT field, asked, prefix, count(*) AS n_with FROM found GROUP BY ALL)
        SELECT d.key, any_value(d.model) AS model, any_value(d.site) AS site, any_value(d.feature) AS feature,
               sum(weight * ln(1 + (n_features - n_with + 0.5) / (n_with + 0.5))
                   * f.n * ($k + 1) / (f.n + $k * (1 - $b + $b * d.length / mean_length)) ORDER BY f.field, f.asked, f.prefix)::DOUBLE AS score,
               list(DISTINCT f.field ORDER BY f.field) AS fields
        FROM found f JOIN spread USING (field, asked, prefix) JOIN documents d USING (field, key) JOIN sizes USING (field) JOIN weights USING (field)
        WHERE ($model IS NULL OR d.model = $model) AND ($site IS NULL OR d.site = $site)
        GROUP BY d.key ORDER BY score DESC, d.key LIMIT $limit
        """,
        {
            "terms": list(wanted.terms), "prefixes": list(wanted.prefixes), "fields": list(fields), "weights": [FIELDS[name] for name in fields],
            "k": K, "b": B, "model": model, "site": site, "limit": limit,
        },
    )  # fmt: skip


def matching(text: pl.Expr, wanted: Wanted) -> pl.Expr:
    """How many of the query's terms a text has."""
    found = terms(text, marks=True)
    exact = [term for term, prefix in zip(wanted.terms, wanted.prefixes) if not prefix]
    begun = [term for term, prefix in zip(wanted.terms, wanted.prefixes) if prefix]
    hits = found.list.set_intersection(pl.lit(exact, dtype=pl.List(pl.String))).list.len().cast(pl.Int64)
    for stem in begun:
        hits = hits + found.list.eval(pl.element().str.contains(f"^{re.escape(stem)}")).list.any().fill_null(False).cast(pl.Int64)
    return hits
