"""Parcellations as the statistics store keeps them: frames of their sites, levels, members and path scores, and what people call their blocks.

1. `write_rows` puts a parcellation in place of the one of the same key, in one transaction; `read_rows` gives it back.
2. `stored_parcellations` lists what is there, `find_parcellation` finds one by the beginning of its key.
3. `set_label` names a block, `clear_label` takes the name away. A name belongs to a set of features and survives the parcellation being
   written again: `user_labels` gives the names of the sets that are still blocks, `lost_labels` the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import polars as pl

from ..errors import UserError
from .statistics import StatisticsStore

RECORD = ("samples", "model", "method", "basis", "settings")
"""What is kept of a parcellation itself, beside its key and time; `settings` is JSON text."""

SITES: Mapping[str, pl.DataType] = MappingProxyType(
    {"site": pl.String(), "dictionary": pl.String(), "d_sae": pl.Int64(), "chosen": pl.Int64(), "notes": pl.String()}
)
"""One row per site, in the model's order; `notes` is JSON text."""

LEVELS: Mapping[str, pl.DataType] = MappingProxyType({"site": pl.String(), "level": pl.Int64(), "rule": pl.String(), "n_blocks": pl.Int64()})
"""One row per kept level of a site, 0 the finest."""

MEMBERS: Mapping[str, pl.DataType] = MappingProxyType({"site": pl.String(), "level": pl.Int64(), "feature": pl.Int64(), "block": pl.Int64()})
"""One row per live feature and kept level."""

SCORES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site": pl.String(), "level": pl.Int64(), "n_blocks": pl.Int64(), "largest": pl.Int64(), "description_length": pl.Float64(),
        "held_out": pl.Float64(), "stability": pl.Float64(), "stability_low": pl.Float64(), "stability_high": pl.Float64(),
    }
)  # fmt: skip
"""One row per level of a site's path, fine to coarse."""

LABELS: Mapping[str, pl.DataType] = MappingProxyType({"site": pl.String(), "level": pl.Int64(), "block": pl.Int64(), "label": pl.String()})
"""What people call blocks."""

# The hash by which a name knows its set of features.
_SETS = (
    "SELECT site, level, block, md5(string_agg(feature, ',' ORDER BY feature)) AS members FROM block_members"
    " WHERE parcellation = $parcellation GROUP BY site, level, block"
)


class NoSuchParcellation(UserError):
    """The statistics store has no such parcellation, or the name fits several."""


class NoSuchBlock(UserError):
    """A parcellation has no such site, level or block."""


@dataclass(frozen=True, eq=False)
class ParcellationRows:
    """A parcellation as rows. record: by the names of `RECORD`, text all of them. The frames have the columns of their schemas and may have more."""

    key: str
    record: Mapping[str, str]
    sites: pl.DataFrame
    levels: pl.DataFrame
    members: pl.DataFrame
    scores: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(SCORES)))


def _typed(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def write_rows(statistics: StatisticsStore, rows: ParcellationRows) -> None:
    """A parcellation in place of the one of the same key, if there is one; what people called its blocks is left alone."""
    sites = _typed(rows.sites, SITES).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("ordinal"))
    frames = {
        "parcellations": pl.DataFrame([{name: rows.record[name] for name in RECORD}]).with_columns(finished=pl.lit(statistics.now())),
        "site_partitions": sites,
        "partition_levels": _typed(rows.levels, LEVELS),
        "block_members": _typed(rows.members, MEMBERS),
        "path_scores": _typed(rows.scores, SCORES),
    }
    statistics.rewrite("parcellation", rows.key, frames)


def read_rows(statistics: StatisticsStore, key: str) -> ParcellationRows:
    """The parcellation of a key (whole, see `find_parcellation`), its rows sorted by site, level and feature."""
    given = {"parcellation": key}
    found = statistics.query(f"SELECT {', '.join(RECORD)} FROM parcellations WHERE parcellation = $parcellation", given)
    if found.is_empty():
        raise NoSuchParcellation(_unknown(statistics, key))
    part = lambda columns, table, order: _typed(
        statistics.query(f"SELECT * FROM {table} WHERE parcellation = $parcellation ORDER BY {order}", given), columns
    )
    return ParcellationRows(
        key, found.row(0, named=True), part(SITES, "site_partitions", "ordinal"), part(LEVELS, "partition_levels", "site, level"),
        part(MEMBERS, "block_members", "site, level, feature"), part(SCORES, "path_scores", "site, level"),
    )  # fmt: skip


def stored_parcellations(statistics: StatisticsStore, model: str | None = None) -> pl.DataFrame:
    """The parcellations of a model, or all, the last found first: parcellation, method, basis, model, samples, n_sites, n_blocks (of the chosen
    levels, all sites together), settings (JSON), finished."""
    return statistics.query(
        "SELECT p.parcellation, p.method, p.basis, p.model, p.samples, count(s.site) AS n_sites, coalesce(sum(l.n_blocks), 0)::BIGINT AS n_blocks,"
        " p.settings, p.finished FROM parcellations p LEFT JOIN site_partitions s ON s.parcellation = p.parcellation"
        " LEFT JOIN partition_levels l ON l.parcellation = s.parcellation AND l.site = s.site AND l.level = s.chosen"
        " WHERE $model IS NULL OR p.model = $model GROUP BY ALL ORDER BY p.finished DESC, p.parcellation",
        {"model": model},
    )


def find_parcellation(statistics: StatisticsStore, name: str | None = None, *, model: str | None = None) -> str:
    """The key that begins with `name`, or that of the parcellation found last (of a model). Raises `NoSuchParcellation`."""
    keys = stored_parcellations(statistics, model)["parcellation"].to_list()
    fitting = keys[:1] if name is None else [key for key in keys if key.startswith(name)]
    if name is not None and name in fitting:
        return name
    if len(fitting) != 1:
        raise NoSuchParcellation(_unknown(statistics, name, model, n=len(fitting)))
    return str(fitting[0])


def _unknown(statistics: StatisticsStore, name: str | None, model: str | None = None, n: int = 0) -> str:
    there = stored_parcellations(statistics, model).select("parcellation", "method", "basis", "n_blocks").head(8)
    known = ", ".join(f"{key} ({method} of {basis}s, {blocks} blocks)" for key, method, basis, blocks in there.iter_rows())
    called = f" {name!r}" if name else ""
    said = f"parcellation{called} is not unique" if n else f"no parcellation{called}" + (f" of {model}" if model else "")
    return f"{said} in {statistics.path}: it has {known or 'none: `featlas analyze rois` finds them'}"


# What people call blocks


def set_label(statistics: StatisticsStore, key: str, site: str, level: int, block: int, label: str) -> None:
    """Call a block of a parcellation `label`, in place of what it was called before. Raises `NoSuchBlock`."""
    given = {"parcellation": key, "site": site, "level": level, "block": block}
    found = statistics.query(f"SELECT * FROM ({_SETS}) WHERE site = $site AND level = $level AND block = $block", given)
    if found.is_empty():
        raise NoSuchBlock(_no_block(statistics, key, site, level, block))
    row = found.with_columns(parcellation=pl.lit(key), label=pl.lit(label), written=pl.lit(statistics.now()))
    statistics.replace("block_labels", row, ("parcellation", "site", "level", "members"))


def clear_label(statistics: StatisticsStore, key: str, site: str, level: int, block: int) -> None:
    """Take what people called a block away: it has its automatic label again."""
    kept = _all_labels(statistics, key).filter(~((pl.col("site") == site) & (pl.col("level") == level) & (pl.col("now") == block)).fill_null(False))
    statistics.rewrite("parcellation", key, {"block_labels": kept.select("site", "level", "block", "members", "label", "written")})


def user_labels(statistics: StatisticsStore, key: str) -> pl.DataFrame:
    """What people call blocks of a parcellation, as `LABELS`, by site, level and block as they are numbered now."""
    rows = _all_labels(statistics, key).filter(pl.col("now").is_not_null())
    return _typed(rows.with_columns(block="now"), LABELS).sort("site", "level", "block")


def lost_labels(statistics: StatisticsStore, key: str) -> pl.DataFrame:
    """Names of sets of features that are blocks of the parcellation no longer, as `LABELS`, by their last number."""
    return _typed(_all_labels(statistics, key).filter(pl.col("now").is_null()), LABELS).sort("site", "level", "block")


def _all_labels(statistics: StatisticsStore, key: str) -> pl.DataFrame:
    """All names, with `now`, the number of the block that has the same features, null where there is none."""
    return statistics.query(
        f"SELECT l.*, s.block AS now FROM block_labels l LEFT JOIN ({_SETS}) s ON s.site = l.site AND s.level = l.level AND s.members = l.members"
        " WHERE l.parcellation = $parcellation",
        {"parcellation": key},
    )


def _no_block(statistics: StatisticsStore, key: str, site: str, level: int, block: int) -> str:
    levels = read_rows(statistics, key).levels
    own = levels.filter(pl.col("site") == site)
    if own.is_empty():
        return f"parcellation {key} has no site {site!r}: its sites are {', '.join(levels['site'].unique(maintain_order=True))}"
    blocks = own.filter(pl.col("level") == level)["n_blocks"]
    if blocks.is_empty():
        return f"{site} has levels 0 to {own.height - 1} in parcellation {key}, not {level}"
    return f"{site} has blocks 0 to {blocks[0] - 1} at level {level} of parcellation {key}, not {block}"
