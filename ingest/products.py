"""Second moments of the live nodes within sites and between them: sums of products over a corpus, out of core.

1. Entries of the nodes are collected, batch after batch, the same tokens at every site.
2. After the first tokens `LiveRule` chooses each site's live features; its error node takes part as one more node.
   A node that is active on most tokens is shifted by its mean over them, so that no digits are lost where the mean is
   far from 0 (a sparse node needs none: active on a share f of the tokens, |mean| ≤ √(f / (1 − f)) standard deviations).
3. Collected entries are folded into blocks of products, one per pair of sites, cut into tiles. Tiles up to a share of the
   memory allowed stay in it, the others are read, added to and written, one at a time.
4. A commit writes what changed to new files and returns a list of the files that count; only when that list is committed
   are the older ones removed. A killed run goes on from the list and comes to the same numbers, bit by bit.

Beside the products each node keeps what tests of a correlation need: its third moment, and its autocovariance along the
sequence at some lags, since tokens of one sequence are not independent.
"""

import io
import os
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from ..errors import FeatlasError
from ..files import on_disk
from .moments import Arrays, LiveRule, ShapesDiffer, SparseNodes
from .settings import DEFAULT_MEMORY

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Distances in tokens at which autocovariances are kept; what lies between them is interpolated."""

ENTRY_BYTES = 48
"""What a collected entry takes at most: 16 bytes at rest, the rest while it is folded."""

FLUSH_ROWS = 32_768
"""Rows collected at most before they are folded: one sparse product of many rows is cheaper than many of few."""

TILE_BYTES = 8 * 1024**2
"""Largest tile of a block of products (one row of it, where that is larger)."""

DENSE_ROWS = 1024
"""Rows multiplied at a time where the nodes are dense."""

SHIFTED_SHARE = 0.5
"""A node active on more than this share of the first tokens is shifted by its mean over them."""


class PartsMissing(FeatlasError):
    """A file of an interrupted run is gone or unreadable."""


class Tile(NamedTuple):
    """Rows `start` to `stop` of the block `first` × `second` of products."""

    first: str
    second: str
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """The entries of one batch of sequences of `n_positions` rows each: site → (row, node, value), node `d_sae` being the error node."""

    n_rows: int
    n_positions: int
    entries: Mapping[str, tuple[NDArray[np.int32], NDArray[np.int32], NDArray[Any]]]

    @staticmethod
    def of(nodes: Mapping[str, SparseNodes], sites: Iterable[str], n_positions: int) -> "Batch":
        """The entries of the nodes of `sites`, all on the same rows."""
        entries = {}
        for site in sites:
            row, node, value = (column.cpu().numpy() for column in nodes[site].entries)
            precision = np.float64 if nodes[site].value.dtype == torch.float64 else np.float32
            entries[site] = (row.astype(np.int32), node.astype(np.int32), value.astype(precision))
        return Batch(next(iter(nodes.values())).n_rows, n_positions, entries)

    @property
    def n_entries(self) -> int:
        return sum(len(row) for row, _, _ in self.entries.values())


@dataclass(frozen=True)
class NodeSums:
    """Sums over tokens of z = x − shift for the n live nodes of a site.

    sums, squares, cubes: (n,), of z, z², z³. lagged: (n_lags, n), of z_p·z_{p+lag} within sequences. ends: (n_lags, n), of z_p + z_{p+lag}.
    """

    shift: FloatArray
    sums: FloatArray
    squares: FloatArray
    cubes: FloatArray
    lagged: FloatArray
    ends: FloatArray

    @staticmethod
    def empty(shift: FloatArray) -> "NodeSums":
        zero, by_lag = np.zeros(len(shift)), np.zeros((len(LAGS), len(shift)))
        return NodeSums(shift, zero, zero, zero, by_lag, by_lag)

    def with_rows(self, z: sparse.csr_matrix, masks: Sequence[FloatArray]) -> "NodeSums":
        """With more rows z (n_rows, n); masks[l]: (n_rows − lag,), 1 where a row and the one `lag` later are of one sequence."""
        lagged, ends = self.lagged.copy(), self.ends.copy()
        for i, (lag, mask) in enumerate(zip(LAGS, masks)):
            early, late = z[:-lag], z[lag:]
            lagged[i] += mask @ early.multiply(late).tocsr()
            ends[i] += mask @ early + mask @ late
        power = lambda k: np.asarray(z.power(k).sum(axis=0)).ravel()
        return NodeSums(self.shift, self.sums + power(1), self.squares + power(2), self.cubes + power(3), lagged, ends)

    def shifted(self, shift: FloatArray, rows: int, lag_rows: IntArray) -> "NodeSums":
        """The same sums about another shift."""
        d, n = self.shift - shift, lag_rows[:, None]
        return NodeSums(
            shift, self.sums + rows * d, self.squares + 2 * d * self.sums + rows * d**2,
            self.cubes + 3 * d * self.squares + 3 * d**2 * self.sums + rows * d**3,
            self.lagged + d * self.ends + n * d**2, self.ends + 2 * n * d,
        )  # fmt: skip

    def __add__(self, other: "NodeSums") -> "NodeSums":
        """Of both samples together; the shifts are equal."""
        added = (getattr(self, name) + getattr(other, name) for name in ("sums", "squares", "cubes", "lagged", "ends"))
        return NodeSums(self.shift, *added)

    def autocorrelation(self, rows: int, lag_rows: IntArray) -> FloatArray:
        """(n, n_lags): correlation of a node with itself `lag` tokens later in the same sequence; 0 where there are no such tokens."""
        n = np.maximum(lag_rows, 1)[:, None]
        mean = self.sums / max(rows, 1)
        covariance = (self.lagged - mean * self.ends) / n + mean**2
        variance = self.squares / max(rows, 1) - mean**2
        found = np.divide(covariance, variance, out=np.zeros_like(covariance), where=(variance > 0) & (lag_rows > 0)[:, None])
        return np.clip(found, -1.0, 1.0).T


class TileFiles:
    """Tiles of sums: those that fit in `memory` bytes stay there, the others are files of `folder`, read and written one at a time."""

    def __init__(self, folder: Path, memory: int, known: Mapping[Tile, str] | None = None, counter: int = 0) -> None:
        self.folder, self.memory, self.counter = folder, memory, counter
        self.files: dict[Tile, str] = dict(known or {})
        self.committed = frozenset(self.files.values())
        self.resident: dict[Tile, FloatArray] = {}
        self.used = 0
        self.changed: set[Tile] = set()  # resident tiles that differ from their files

    def read(self, tile: Tile, width: int) -> FloatArray:
        """The sums so far, (stop − start, width)."""
        if tile in self.resident:
            return self.resident[tile]
        if tile not in self.files:
            return np.zeros((tile.stop - tile.start, width))
        return load_array(self.folder / self.files[tile])

    def write(self, tile: Tile, sums: FloatArray) -> None:
        if tile in self.resident or self.used + sums.nbytes <= self.memory:
            self.used += 0 if tile in self.resident else sums.nbytes
            self.resident[tile] = sums
            self.changed.add(tile)
            return
        # A committed file stays as it is until the next commit; a file written since then may be replaced.
        if self.files.get(tile) in self.committed or tile not in self.files:
            self.files[tile] = self.name()
        save_array(self.folder / self.files[tile], sums)

    def name(self, stem: str = "tile", suffix: str = "npy") -> str:
        self.counter += 1
        return f"{stem}.{self.counter:09d}.{suffix}"

    def flush(self) -> None:
        """Write the resident tiles that changed to new files."""
        for tile in sorted(self.changed):
            self.files[tile] = self.name()
            save_array(self.folder / self.files[tile], self.resident[tile])
        self.changed = set()


class JointMoments:
    """Sums of products of the live nodes of several sites, by pairs of sites; see the module's first lines.

    widths: site → d_sae. pairs: of sites, a site with itself included, where their products are wanted. folder: where tiles and
    entries are kept; nobody else writes there. live, shifts: the live nodes of another shard, to be merged with, and what they are shifted by;
    None chooses them here.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        pairs: Sequence[tuple[str, str]],
        rule: LiveRule,
        folder: Path,
        *,
        memory: int = DEFAULT_MEMORY,
        device: torch.device | str = "cpu",
        live: Mapping[str, IntArray] | None = None,
        shifts: Mapping[str, FloatArray] | None = None,
    ) -> None:
        self.widths, self.pairs, self.rule, self.folder, self.device = dict(widths), list(pairs), rule, folder, torch.device(device)
        self.max_entries = max(memory // 4 // ENTRY_BYTES, 1)
        self.tiles = TileFiles(folder, memory // 2)
        self.rows = 0
        self.lag_rows: IntArray = np.zeros(len(LAGS), dtype=np.int64)
        self.live: dict[str, IntArray] | None = None if live is None else dict(live)
        self.shifts = shifts
        self.sums: dict[str, NodeSums] = {}
        self.pending: list[Batch] = []
        self.segments: list[str] = []  # files of the first pending batches
        self.n_saved = 0  # how many those are

    # -- collecting ------------------------------------------------------------------------------------------

    def add(self, nodes: Mapping[str, SparseNodes], n_positions: int) -> None:
        """Take one batch: the nodes of every site on the same rows, `n_positions` rows a sequence."""
        self.take(Batch.of(nodes, self.widths, n_positions))

    def take(self, batch: Batch) -> None:
        """Take the entries of one batch."""
        if self.live is not None:
            kept = {site: np.isin(node, self.live[site]) for site, (_, node, _) in batch.entries.items()}
            entries = {site: (row[kept[site]], node[kept[site]], value[kept[site]]) for site, (row, node, value) in batch.entries.items()}
            batch = Batch(batch.n_rows, batch.n_positions, entries)
        if self.collect(batch):
            self.fold()

    def collect(self, batch: Batch) -> bool:
        """Keep a batch's entries; returns whether enough are pending to be folded."""
        self.pending.append(batch)
        self.rows += batch.n_rows
        rows = sum(batch.n_rows for batch in self.pending)
        full = sum(batch.n_entries for batch in self.pending) >= self.max_entries
        return full or rows >= (FLUSH_ROWS if self.live is not None else self.rule.rows)

    def _choose(self) -> dict[str, IntArray]:
        """The live nodes of each site by what is pending."""
        rows, chosen = sum(batch.n_rows for batch in self.pending), {}
        for site, width in self.widths.items():
            node = np.concatenate([batch.entries[site][1] for batch in self.pending] or [np.zeros(0, np.int32)])
            count = np.bincount(node, minlength=width + 1)
            features = self.rule.choose(torch.from_numpy(count[:width]), rows).numpy()
            chosen[site] = np.append(features, [width] if count[width] else []).astype(np.int64)
        return chosen

    # -- folding ---------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Add the products of all pending rows; the live nodes are chosen at the first call."""
        rows = self.begin()
        if not self.pending:
            return
        z = {site: _centred(x, self.sums[site].shift) for site, x in rows.items()}
        del rows
        masks = self._masks()
        for site in self.widths:
            self.sums[site] = self.sums[site].with_rows(z[site], masks)
        self.lag_rows = self.lag_rows + np.array([int(mask.sum()) for mask in masks] + [0] * (len(LAGS) - len(masks)))
        turned = {site: z[site].T.tocsr() for site in {first for first, _ in self.pairs}}
        for tile in self._tiling():
            sums = self.tiles.read(tile, self.n_live(tile.second))
            sums += _product(z[tile.first], turned[tile.first], z[tile.second], tile, self.device)
            self.tiles.write(tile, sums)
        self.pending, self.segments, self.n_saved = [], [], 0

    def begin(self) -> dict[str, sparse.csr_matrix]:
        """Choose the live nodes, and what they are shifted by, unless they are; returns the pending rows of each site."""
        if self.live is None:
            self.live = self._choose()
        rows = {site: self._rows(site) for site in self.widths}
        if not self.sums:
            shifts = self.shifts if self.shifts is not None else {site: self._shift(site, x) for site, x in rows.items()}
            self.sums = {site: NodeSums.empty(shifts[site]) for site in rows}
        return rows

    def n_live(self, site: str) -> int:
        assert self.live is not None  # asked for after the first fold
        return len(self.live[site])

    def _rows(self, site: str) -> sparse.csr_matrix:
        """The pending rows of the live nodes, (rows, n_live)."""
        assert self.live is not None
        slot = np.full(self.widths[site] + 1, -1)
        slot[self.live[site]] = np.arange(len(self.live[site]))
        start = np.cumsum([0] + [batch.n_rows for batch in self.pending])
        parts = [batch.entries[site] for batch in self.pending]
        none = [np.zeros(0, dtype=np.int64)]
        row = np.concatenate([part[0] + first for part, first in zip(parts, start)] or none)
        column = slot[np.concatenate([part[1] for part in parts] or none)]
        value = np.concatenate([part[2] for part in parts] or none).astype(np.float64)
        kept = column >= 0
        return sparse.csr_matrix((value[kept], (row[kept], column[kept])), shape=(int(start[-1]), len(self.live[site])))

    def _shift(self, site: str, x: sparse.csr_matrix) -> FloatArray:
        rows = max(x.shape[0], 1)
        often = np.bincount(x.indices, minlength=x.shape[1]) > SHIFTED_SHARE * rows
        return np.where(often, np.asarray(x.sum(axis=0)).ravel() / rows, 0.0)

    def _masks(self) -> list[FloatArray]:
        """Per lag that fits: (n_rows − lag,), 1 where row r and r + lag are of one sequence."""
        position = np.concatenate([np.arange(batch.n_rows) % batch.n_positions for batch in self.pending])
        length = np.concatenate([np.full(batch.n_rows, batch.n_positions) for batch in self.pending])
        fitting = [lag for lag in LAGS if lag < length.max()]
        return [(position[:-lag] + lag < length[:-lag]).astype(np.float64) for lag in fitting]

    def _tiling(self) -> Iterator[Tile]:
        for first, second in self.pairs:
            n, width = self.n_live(first), self.n_live(second)
            step = max(TILE_BYTES // (8 * max(width, 1)), 1)
            for start in range(0, n, step):
                yield Tile(first, second, start, min(start + step, n))

    def blocks(self, *, within: bool | None = None) -> Iterator[tuple[Tile, FloatArray]]:
        """Tiles with their sums of products, one at a time: all, or those within sites, or those between; what is pending is folded first."""
        self.fold()
        for tile in self._tiling():
            if within is None or within == (tile.first == tile.second):
                yield tile, self.tiles.read(tile, self.n_live(tile.second))

    def merge(self, other: "JointMoments") -> None:
        """Take in the sums of another shard, which must have the same live nodes (given to it as `live`)."""
        self.fold()
        other.fold()
        assert self.live is not None
        assert other.live is not None
        same = self.live.keys() == other.live.keys() and all(np.array_equal(nodes, other.live[site]) for site, nodes in self.live.items())
        if self.pairs != other.pairs or not same:
            raise ShapesDiffer("second moments of different live nodes cannot be merged: give both shards the same live nodes")
        moved = {site: sums.shift - self.sums[site].shift for site, sums in other.sums.items()}
        for tile, sums in other.blocks():
            d, e = moved[tile.first][tile.start : tile.stop], moved[tile.second]
            if d.any() or e.any():
                first, second = other.sums[tile.first].sums[tile.start : tile.stop], other.sums[tile.second].sums
                sums = sums + np.outer(d, second) + np.outer(first, e) + other.rows * np.outer(d, e)
            self.tiles.write(tile, self.tiles.read(tile, self.n_live(tile.second)) + sums)
        for site, others in other.sums.items():
            self.sums[site] = self.sums[site] + others.shifted(self.sums[site].shift, other.rows, other.lag_rows)
        self.rows, self.lag_rows = self.rows + other.rows, self.lag_rows + other.lag_rows

    # -- committing ------------------------------------------------------------------------------------------

    def save(self) -> Arrays:
        """Write what changed to files, and return what `restore` needs; to be committed, and then `cleaned`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if len(self.pending) > self.n_saved:
            self.segments.append(self.tiles.name("entries", "npz"))
            save_bytes(self.folder / self.segments[-1], packed(_batch_arrays(self.pending[self.n_saved :])))
            self.n_saved = len(self.pending)
        self.tiles.flush()
        arrays: Arrays = {
            "rows": np.array(self.rows), "lag_rows": self.lag_rows, "counter": np.array(self.tiles.counter),
            "segments": np.array(self.segments, dtype=np.str_),
            "tiles": np.array([(*map(str, tile), name) for tile, name in self.tiles.files.items()], dtype=np.str_).reshape(-1, 5),
        }  # fmt: skip
        for site, nodes in (self.live or {}).items():
            arrays[f"live/{site}"] = nodes
        for site, sums in self.sums.items():
            arrays |= {f"{name}/{site}": array for name, array in vars(sums).items()}
        return arrays

    def cleaned(self) -> None:
        """After the commit: remove the files that it no longer names."""
        self.tiles.committed = frozenset(self.tiles.files.values())
        wanted = self.tiles.committed | set(self.segments)
        _only(self.folder, wanted)

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `save` returned. Raises `PartsMissing`."""
        self.rows, self.lag_rows = int(arrays["rows"]), arrays["lag_rows"]
        known = {Tile(first, second, int(start), int(stop)): str(name) for first, second, start, stop, name in arrays["tiles"].tolist()}
        self.tiles = TileFiles(self.folder, self.tiles.memory, known, int(arrays["counter"]))
        if known or len(arrays["segments"]):
            missing = [name for name in (*known.values(), *arrays["segments"].tolist()) if not (self.folder / name).is_file()]
            if missing:
                raise PartsMissing(f"{self.folder / missing[0]} is gone: delete the run and repeat it")
            self._taken_up(arrays["segments"].tolist())
        self._become_resident()
        named = lambda stem: {key.removeprefix(f"{stem}/"): array for key, array in arrays.items() if key.startswith(f"{stem}/")}
        self.live = named("live") or None
        parts = {name: named(name) for name in NodeSums.__dataclass_fields__}
        self.sums = {site: NodeSums(**{name: parts[name][site] for name in parts}) for site in parts["shift"]}
        self.pending = [batch for name in self.segments for batch in _batches(_read_arrays(self.folder / name))]
        self.n_saved = len(self.pending)

    def _taken_up(self, segments: list[str]) -> None:
        """Take up committed segments; files of a commit that did not come to be are removed."""
        self.segments = segments
        self.cleaned()

    def _become_resident(self) -> None:
        """Tiles that fit in memory are read into it, in the order in which they were first written."""
        for tile, name in sorted(self.tiles.files.items(), key=lambda item: item[1]):
            size = 8 * (tile.stop - tile.start)
            sums = load_array(self.folder / name) if self.tiles.used + size <= self.tiles.memory else None
            if sums is None or self.tiles.used + sums.nbytes > self.tiles.memory:
                break
            self.tiles.resident[tile] = sums
            self.tiles.used += sums.nbytes


class Collected:
    """The entries of the first batches of a corpus, for whoever chooses the live nodes: what a shard keeps that lies within them.

    Same use as `JointMoments`: `add`, `save`, `cleaned`, `restore`. All entries go to files of `folder`, at most `max_entries` are held.
    """

    def __init__(self, widths: Mapping[str, int], folder: Path, *, memory: int = DEFAULT_MEMORY) -> None:
        self.widths, self.folder = dict(widths), folder
        self.max_entries = max(memory // 4 // ENTRY_BYTES, 1)
        self.segments: list[str] = []
        self.pending: list[Batch] = []

    def add(self, nodes: Mapping[str, SparseNodes], n_positions: int) -> None:
        """Take one batch: the nodes of every site on the same rows, `n_positions` rows a sequence."""
        self.pending.append(Batch.of(nodes, self.widths, n_positions))
        if sum(batch.n_entries for batch in self.pending) >= self.max_entries:
            self._write()

    def _write(self) -> None:
        if self.pending:
            self.segments.append(f"entries.{len(self.segments) + 1:09d}.npz")
            save_bytes(self.folder / self.segments[-1], packed(_batch_arrays(self.pending)))
            self.pending = []

    def batches(self) -> Iterator[Batch]:
        """All that were added, in order."""
        for name in self.segments:
            yield from _batches(_read_arrays(self.folder / name))
        yield from self.pending

    def save(self) -> Arrays:
        """Write what is not in a file, and return what `restore` needs."""
        self._write()
        return {"segments": np.array(self.segments, dtype=np.str_)}

    def cleaned(self) -> None:
        """After the commit: remove the files that it does not name."""
        _only(self.folder, set(self.segments))

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `save` returned. Raises `PartsMissing`."""
        self.segments, self.pending = arrays["segments"].tolist(), []
        missing = [name for name in self.segments if not (self.folder / name).is_file()]
        if missing:
            raise PartsMissing(f"{self.folder / missing[0]} is gone: delete the run and repeat it")


def _only(folder: Path, wanted: Collection[str]) -> None:
    """Remove all other files of a folder."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_file() and path.name not in wanted:
                path.unlink()


def _centred(x: sparse.csr_matrix, shift: FloatArray) -> sparse.csr_matrix:
    """x − shift; only columns with a shift are filled."""
    moved = np.flatnonzero(shift)
    if not len(moved):
        return x
    dense = x[:, moved].toarray() - shift[moved]  # (rows, n_moved)
    place = np.full(x.shape[1], -1)
    place[moved] = np.arange(len(moved))
    kept = sparse.coo_matrix(x)
    plain = place[kept.col] < 0
    row, column = np.indices(dense.shape, dtype=np.int32).reshape(2, -1)
    entries = np.concatenate([kept.data[plain], dense.ravel()])
    where = np.concatenate([kept.row[plain], row]), np.concatenate([kept.col[plain], moved[column]])
    return sparse.csr_matrix((entries, where), shape=x.shape)


def _product(x: sparse.csr_matrix, turned: sparse.csr_matrix, y: sparse.csr_matrix, tile: Tile, device: torch.device) -> FloatArray:
    """Rows `tile.start` to `tile.stop` of xᵀy (n_x, n_y), `turned` being xᵀ: a sparse product on a CPU where it has far fewer terms, else blocks."""
    rows, (n_x, n_y) = x.shape[0], (x.shape[1], y.shape[1])
    terms = float(np.diff(x.indptr).astype(np.float64) @ np.diff(y.indptr))
    if device.type == "cpu" and 16 * terms < float(rows) * n_x * n_y:
        return np.asarray((turned[tile.start : tile.stop] @ y).toarray())
    sums = torch.zeros(tile.stop - tile.start, n_y, dtype=torch.float64, device=device)
    for low, high in pairwise([*range(0, rows, DENSE_ROWS), rows]):
        left, right = x[low:high, tile.start : tile.stop].toarray(), y[low:high].toarray()
        sums.addmm_(torch.from_numpy(left).to(device).T, torch.from_numpy(right).to(device))
    return sums.cpu().numpy()


# -- files ---------------------------------------------------------------------------------------------------


def packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as one piece of bytes."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def unpacked(payload: bytes) -> dict[str, NDArray[Any]]:
    """What `packed` was given."""
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return dict(arrays)


def save_array(path: Path, array: NDArray[Any]) -> None:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    save_bytes(path, stream.getbuffer())


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Raises `PartsMissing`."""
    try:
        return unpacked(path.read_bytes())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PartsMissing(f"{path} cannot be read ({error}): delete the run and repeat it") from None


def load_array(path: Path) -> FloatArray:
    """Raises `PartsMissing`."""
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise PartsMissing(f"{path} cannot be read ({error}): delete the run and repeat it") from None


def save_bytes(path: Path, payload: bytes | memoryview) -> None:
    """Onto the disk itself: what a commit names must be there after a power cut too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with on_disk(path), path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _batch_arrays(batches: Sequence[Batch]) -> Arrays:
    arrays: Arrays = {"shapes": np.array([(batch.n_rows, batch.n_positions) for batch in batches])}
    for i, batch in enumerate(batches):
        for site, columns in batch.entries.items():
            arrays |= {f"{i}/{site}/{name}": column for name, column in zip(("row", "node", "value"), columns)}
    return arrays


def _batches(arrays: Mapping[str, NDArray[Any]]) -> Iterator[Batch]:
    sites: dict[int, list[str]] = {}
    for key in arrays:
        number, _, rest = key.partition("/")
        if rest.endswith("/row"):
            sites.setdefault(int(number), []).append(rest.removesuffix("/row"))
    for i, (n_rows, n_positions) in enumerate(arrays["shapes"].tolist()):
        entries = {site: (arrays[f"{i}/{site}/row"], arrays[f"{i}/{site}/node"], arrays[f"{i}/{site}/value"]) for site in sites.get(i, [])}
        yield Batch(n_rows, n_positions, entries)
