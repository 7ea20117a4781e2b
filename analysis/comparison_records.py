"""What a comparison of two graphs is as records: single numbers beside their nulls, curves beside theirs, and links between parts.

1. `against`: a number, the values that chance gives it, and what follows: their mean, their middle 95 %, z and p.
2. `Values` and `Curves` gather such rows; `VALUES`, `CURVES` and `LINKS` are what they become.
3. `Comparison`: all of it, as it is shown, drawn and kept.

z counts standard deviations of the null from its mean, signed so that a positive z says *more alike than chance*, whichever way the quantity goes.
p is one-sided: the share of draws at least as extreme as the value, which is itself one of them (Phipson and Smyth 2010).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

VALUES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "part": pl.String(), "quantity": pl.String(), "site": pl.String(), "value": pl.Float64(), "null": pl.String(), "null_mean": pl.Float64(),
        "null_low": pl.Float64(), "null_high": pl.Float64(), "z": pl.Float64(), "p": pl.Float64(), "n": pl.Int64(),
    }
)  # fmt: skip
"""One row a number and null; `null` is empty where there is none, `site` where the number is of the whole graph. n: what it is of (pairs, edges)."""

CURVES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "part": pl.String(), "quantity": pl.String(), "axis": pl.String(), "place": pl.Float64(), "value": pl.Float64(), "null": pl.String(),
        "null_mean": pl.Float64(), "null_low": pl.Float64(), "null_high": pl.Float64(),
    }
)  # fmt: skip
"""One row a point and null."""

LINKS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "kind": pl.String(), "source": pl.String(), "target": pl.String(), "source_label": pl.String(), "target_label": pl.String(),
        "weight": pl.Float64(),
    }
)  # fmt: skip
"""What of A corresponds to what of B."""

JOINT_BLOCKS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site_a": pl.String(), "site_b": pl.String(), "block": pl.Int64(), "n_a": pl.Int64(), "n_b": pl.Int64(), "shared": pl.Float64(),
        "null_mean": pl.Float64(), "null_high": pl.Float64(), "r_a": pl.Float64(), "r_b": pl.Float64(), "r_between": pl.Float64(),
    }
)  # fmt: skip
"""Blocks of joint partitions, see `joint_partition`."""

JOINT_MEMBERS: Mapping[str, pl.DataType] = MappingProxyType(
    {"site_a": pl.String(), "site_b": pl.String(), "side": pl.String(), "feature": pl.Int64(), "block": pl.Int64()}
)
"""The block of every live feature of either side."""

ALIKE, DIFFERENT = "alike", "different"
"""What a p is the probability of under the null: being as alike, or as different, as was found."""


@dataclass(frozen=True, slots=True)
class Against:
    """A null's mean, middle 95 %, and where the value stands in it; None where nothing can be said."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    z: float | None = None
    p: float | None = None


def against(value: float | None, draws: ArrayLike, *, greater: bool = True, tested: str = ALIKE) -> Against:
    """A value among those of chance. greater: whether a greater value is more alike. tested: `ALIKE` or `DIFFERENT`. NaN draws are left out."""
    found = np.asarray(draws, dtype=np.float64)
    found = found[np.isfinite(found)]
    if value is None or not np.isfinite(value) or not len(found):
        return Against()
    low, high = np.quantile(found, [0.025, 0.975])
    sign = 1.0 if greater else -1.0
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    # draws that are all the same to rounding have no spread to count in
    z = float(sign * (value - found.mean()) / spread) if spread > 1e-12 * max(1.0, abs(value)) else None
    towards = sign if tested == ALIKE else -sign
    p = float(1 + (towards * found >= towards * value - 1e-12 * abs(value)).sum()) / (1 + len(found))
    return Against(float(found.mean()), float(low), float(high), z, p)


@dataclass(eq=False)
class Values:
    """Rows of `VALUES` of one part, gathered one by one."""

    part: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, quantity: str, value: float | None, *, site: str = "", n: int | None = None) -> None:
        """A number without a null."""
        self._add(quantity, value, "", Against(), site, n)

    def add_against(
        self, quantity: str, value: float | None, null: str, draws: ArrayLike, *, greater: bool = True, tested: str = ALIKE, site: str = "",
        n: int | None = None,
    ) -> None:  # fmt: skip
        """A number beside the values that a null gives it; without any draws it stands alone."""
        drawn = np.asarray(draws, dtype=np.float64)
        self._add(quantity, value, null if len(drawn) else "", against(value, drawn, greater=greater, tested=tested), site, n)

    def _add(self, quantity: str, value: float | None, null: str, found: Against, site: str, n: int | None) -> None:
        number = None if value is None or not np.isfinite(value) else float(value)
        self.rows.append(
            {"part": self.part, "quantity": quantity, "site": site, "value": number, "null": null, "null_mean": found.mean, "null_low": found.low,
             "null_high": found.high, "z": found.z, "p": found.p, "n": n}
        )  # fmt: skip

    def frame(self) -> pl.DataFrame:
        """As `VALUES`."""
        return pl.DataFrame(self.rows, schema=dict(VALUES), orient="row")


def curve(
    part: str, quantity: str, axis: str, at: ArrayLike, value: ArrayLike, *, null: str = "", draws: FloatArray | None = None
) -> pl.DataFrame:
    """Rows of `CURVES`: value (n,) over its places (n,), and the band of draws (n_draws, n), points without any finite draw having none."""
    places, values = np.asarray(at, dtype=np.float64), np.asarray(value, dtype=np.float64)
    columns: dict[str, Any] = {"place": places, "value": values}
    if draws is not None and len(draws):
        masked = np.ma.masked_invalid(draws)
        some = ~np.all(masked.mask, axis=0) if masked.mask is not np.ma.nomask else np.ones(len(places), dtype=bool)
        band = np.full((3, len(places)), np.nan)
        band[0, some] = masked.mean(axis=0)[some]
        band[1:, some] = np.nanquantile(np.where(np.isfinite(draws), draws, np.nan)[:, some], [0.025, 0.975], axis=0)
        columns |= {"null_mean": band[0], "null_low": band[1], "null_high": band[2]}
    frame = pl.DataFrame(columns).with_columns(
        part=pl.lit(part), quantity=pl.lit(quantity), axis=pl.lit(axis), null=pl.lit(null if "null_mean" in columns else "")
    )
    missing = [pl.lit(None).alias(name) for name in CURVES if name not in frame.columns]
    return frame.with_columns(missing).select(pl.col(name).cast(dtype).fill_nan(None) if dtype == pl.Float64() else pl.col(name).cast(dtype)
                                              for name, dtype in CURVES.items())  # fmt: skip


def together(frames: list[pl.DataFrame], schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Frames of one schema as one; an empty one where there are none."""
    return pl.concat([pl.DataFrame(schema=dict(schema)), *frames])


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was found. key: a content hash of both sides, the matching and the settings. kind: graphs, or joint for joint partitions.

    a, b: what the sides are, in words. matching: the key of the stored matching, empty for the same nodes on both sides. settings, notes: JSON-able.
    values, curves, links: as `VALUES`, `CURVES`, `LINKS`; blocks, members: as `JOINT_BLOCKS`, `JOINT_MEMBERS`, of joint partitions alone.
    """

    key: str
    kind: str
    a: str
    b: str
    run_a: str
    run_b: str
    model_a: str
    model_b: str
    matching: str
    settings: Mapping[str, Any]
    notes: Mapping[str, Any]
    values: pl.DataFrame
    curves: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(CURVES)))
    links: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(LINKS)))
    blocks: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(JOINT_BLOCKS)))
    members: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(JOINT_MEMBERS)))

    def value(self, part: str, quantity: str, *, null: str | None = None, site: str = "") -> dict[str, Any] | None:
        """The row of one number (beside a null, where one is named), or None."""
        here = (pl.col("part") == part) & (pl.col("quantity") == quantity) & (pl.col("site") == site)
        rows = self.values.filter(here if null is None else here & (pl.col("null") == null))
        return rows.row(0, named=True) if rows.height else None
