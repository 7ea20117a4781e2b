"""Rankings in the statistics store: written in place of the one of the same key, listed, and read back."""

import json

import polars as pl

from ..errors import UserError
from ..queries.statistics import StatisticsStore
from .ranks import RANKS, Ranking

LISTED = ("ranking", "run", "method", "basis", "settings", "n", "finished")
"""What `list_rankings` gives of each: `settings` is JSON, `n` how many nodes (or paths) it has."""


class NoSuchRanking(UserError):
    """The statistics store has no such ranking, or the name fits several."""


def write_ranking(statistics: StatisticsStore, ranking: Ranking) -> str:
    """Keep a ranking, in place of the one of the same key; its key."""
    settings = json.dumps(dict(ranking.settings), sort_keys=True, ensure_ascii=False)
    record = pl.DataFrame({"run": [ranking.run], "method": [ranking.method], "basis": [ranking.basis], "settings": [settings]})
    frames = {"rankings": record.with_columns(finished=pl.lit(statistics.now())), "ranking_values": ranking.rows.select("key", "value", "rank")}
    statistics.rewrite("ranking", ranking.key, frames)
    return ranking.key


def list_rankings(statistics: StatisticsStore, run: str | None = None) -> pl.DataFrame:
    """All rankings (of a run), the last made first, as `LISTED`."""
    return statistics.query(
        "SELECT ranking, run, method, basis, settings, (SELECT count(*) FROM ranking_values v WHERE v.ranking = r.ranking) AS n, finished"
        " FROM rankings r WHERE $run IS NULL OR run = $run ORDER BY finished DESC, ranking",
        {"run": run},
    )


def read_ranking(statistics: StatisticsStore, name: str) -> Ranking:
    """The ranking whose key begins with `name`. Raises `NoSuchRanking`."""
    there = list_rankings(statistics)
    fitting = there.filter(pl.col("ranking").str.starts_with(name))
    if fitting.height != 1:
        known = ", ".join(f"{key} ({method})" for key, method in there.head(8).select("ranking", "method").iter_rows())
        said = f"ranking {name!r} is not unique" if fitting.height else f"no ranking {name!r}"
        raise NoSuchRanking(f"{said} in {statistics.path}: there are {known or 'none: `featlas analyze rank` makes them'}")
    record = fitting.row(0, named=True)
    rows = statistics.query("SELECT key, value, rank FROM ranking_values WHERE ranking = $key ORDER BY rank", {"key": record["ranking"]})
    rows = rows.with_columns(pl.lit(record[name]).alias(name) for name in ("run", "method", "basis"))
    rows = rows.select(pl.col(name).cast(dtype) for name, dtype in RANKS.items())
    return Ranking(record["run"], record["method"], record["basis"], json.loads(record["settings"]), rows)
