"""Which rows of the statistics store belong together, and to what: by these, rows are copied, compared and deleted.

Every table of the layout is here with its owner: the columns whose values make rows one unit, which is copied or deleted as a whole, and the kind of
thing that it is. A unit of several tables (a statistics run, a parcellation, a matching, a comparison) has its own row in the kind's first table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from .statistics import EFFECT_IDENTITY, SCORE_IDENTITY, SIZE_IDENTITY, StatisticsStore

UNCOPIED = ("migrations",)
"""What every store has of its own."""

TIMES = ("started", "finished", "written", "indexed", "applied")
"""Columns that say when, in which two copies of one measurement may differ."""


class Owner(StrEnum):
    """What a row belongs to."""

    STATISTICS = "statistics run"
    MEASURED = "measured value of a run"
    PARCELLATION = "parcellation"
    MATCHING = "matching"
    COMPARISON = "comparison"
    RANKING = "ranking"
    LABEL = "label"
    WIRING = "wiring"
    INDEX = "search index"


@dataclass(frozen=True)
class Belonging:
    """A table, what its rows belong to, and the columns that say to which."""

    table: str
    owner: Owner
    columns: tuple[str, ...]


_OF_RUN = (
    "runs", "run_sites", "run_state", "feature_statistics", "contexts", "second_moments", "node_means", "error_means", "live_nodes", "run_lags",
    "site_pairs", "second_moments_between", "correlations", "correlation_tests",
)  # fmt: skip
_OF_PARCELLATION = ("parcellations", "site_partitions", "partition_levels", "block_members", "path_scores", "block_labels")
_OF_MATCHING = ("matchings", "matched_sites", "matched_pairs", "matched_scores")
_OF_COMPARISON = ("comparisons", "comparison_values", "comparison_curves", "comparison_links", "joint_blocks", "joint_members")
_OF_WIRING = ("model", "source_dictionary", "source_site", "target_dictionary", "target_site")

BELONGINGS: Mapping[str, Belonging] = MappingProxyType({
    one.table: one
    for one in (
        *(Belonging(table, Owner.STATISTICS, ("run",)) for table in _OF_RUN),
        Belonging("scores", Owner.MEASURED, SCORE_IDENTITY),
        Belonging("score_sizes", Owner.MEASURED, SIZE_IDENTITY),
        Belonging("ablation_effects", Owner.MEASURED, EFFECT_IDENTITY),
        *(Belonging(table, Owner.PARCELLATION, ("parcellation",)) for table in _OF_PARCELLATION),
        *(Belonging(table, Owner.MATCHING, ("matching",)) for table in _OF_MATCHING),
        *(Belonging(table, Owner.COMPARISON, ("comparison",)) for table in _OF_COMPARISON),
        Belonging("rankings", Owner.RANKING, ("ranking",)),
            Belonging("ranking_values", Owner.RANKING, ("ranking",)),
            Belonging("feature_labels", Owner.LABEL, ("key", "kind", "rule", "source")),
        Belonging("wirings", Owner.WIRING, _OF_WIRING),
        Belonging("head_shares", Owner.WIRING, ("model", "dictionary", "site", "layer")),
        Belonging("search_terms", Owner.INDEX, ("origin", "field", "key")),
        Belonging("search_documents", Owner.INDEX, ("origin", "field", "key")),
        Belonging("search_origins", Owner.INDEX, ("origin",)),
    )
})  # fmt: skip


def belonging(table: str, columns: Mapping[str, str]) -> Belonging:
    """What a table's rows belong to; of a table that this featlas does not know, its `run`, or each row is its own."""
    known = BELONGINGS.get(table)
    return known or Belonging(table, Owner.STATISTICS if "run" in columns else Owner.MEASURED, ("run",) if "run" in columns else tuple(columns))


def tables_of(store: StatisticsStore, database: str | None = None) -> dict[str, dict[str, str]]:
    """The tables of a store's own file (or of an attached one), each with its columns' types, by name and in the order of the columns."""
    rows = store.query(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal AND database_name = coalesce($database,"
        " current_database()) ORDER BY table_name, column_index",
        {"database": database},
    )
    tables: dict[str, dict[str, str]] = {}
    for table, column, type in rows.iter_rows():
        tables.setdefault(table, {})[column] = type
    return tables
