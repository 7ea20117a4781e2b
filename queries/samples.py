"""Samples: the nodes of sites token by token, kept sparse in files of the atlas, for what needs more than moments of them.

A run of samples is a folder `samples/<key>`:
- `manifest.json`: what was sampled, and how (`SampleRun`);
- `sequences.parquet`: one row per sequence, `SEQUENCE_COLUMNS`;
- `tokens.parquet`: one row per row of the matrices: its sequence, position, and the token's text;
- `<site>.npz`: the site's features, (n_tokens, d_sae) float32. Where at most `DENSEST` of the entries are not 0 it is a matrix in CSR form, in
  the very layout of `scipy.sparse.save_npz`; else a dense array `values`. Neither is pickled.

Batches are appended to files in a hidden folder beside it, so that memory does not grow with the run; the folder is renamed when all is
there. A killed process leaves no run that is half written, only the hidden folder, which goes when a run of the same key is begun an hour later.
"""

import json
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from ..errors import FeatlasError, UserError
from ..files import on_disk
from .kept_files import intact, read_object

FOLDER = "samples"
"""The folder of the runs of samples in an atlas."""

LAYOUT = 1
"""The layout of a run's files; a greater number is of a newer featlas."""

DENSEST = 1 / 3
"""A site of which a greater share of the entries is not 0 is kept as a dense array: CSR takes 8 bytes for each of them, this 4 for each entry."""

CHUNK_ROWS = 4096
"""Rows of a dense site that are made at a time."""

ABANDONED_SECONDS = 3600.0
"""A hidden folder into which nothing was written for so long is a killed process's."""

SEQUENCE_COLUMNS: Mapping[str, pl.DataType] = MappingProxyType(
    {"sequence": pl.Int64(), "key": pl.String(), "task": pl.String(), "label": pl.String(), "text": pl.String()}
)
"""What `sequences` has at least. key: sequences of one key belong together (the prompts of a pair). task: null for a corpus. label: the class of the
sequence (what is right to follow it), or null. Others may stand beside them: `part` (clean or corrupt), `task_label` (the task's own label)."""

TOKEN_COLUMNS: Mapping[str, pl.DataType] = MappingProxyType({"sequence": pl.Int32(), "position": pl.Int32(), "text": pl.String()})
"""What `tokens` has, one row per row of the matrices; the text may be null."""

_FIELDS: Mapping[str, type] = MappingProxyType(
    {
        "key": str, "model": str, "basis": str, "source": str, "dictionaries": dict, "n_sequences": int, "n_tokens": int, "settings": dict,
        "finished": str,
    }
)  # fmt: skip

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


class NoSamples(UserError):
    """The atlas has no such run of samples, or the run has no such site."""


class NewerSamples(UserError):
    """The run was written by a newer featlas."""


class BadSamples(FeatlasError):
    """What was to be written does not fit together, or a file is not what the manifest says."""


@dataclass(frozen=True, eq=False)
class SiteSamples:
    """One site of a run of samples: a matrix of its nodes whose rows are tokens; error nodes are not in it.

    values: (n_tokens, d_sae) float32, activations or signed attributions: a `scipy.sparse.csr_matrix`, or a numpy array where more than `DENSEST` of
    the entries are not 0. sequence, position: (n_tokens,), where each row lies. group: (n_tokens,), what must stay together when samples are
    split (the prompts of a pair, and pairs that share a prompt); the sequence unless given.
    """

    site: str
    dictionary: str
    d_sae: int
    values: Any
    sequence: IntArray
    position: IntArray
    group: IntArray = field(default=None)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.group is None:
            object.__setattr__(self, "group", self.sequence)
        n = len(self.sequence)
        if self.values.shape != (n, self.d_sae) or len(self.position) != n or len(self.group) != n:
            raise BadSamples(f"samples of {self.site} have shape {self.values.shape}: {n} tokens × {self.d_sae} features are needed")

    @property
    def n_tokens(self) -> int:
        return len(self.sequence)

    @property
    def dense(self) -> bool:
        """Whether `values` is a numpy array."""
        return not sparse.issparse(self.values)


@dataclass(frozen=True)
class SampledSite:
    """What the manifest says of a site. mean_l0: features that are not 0, per token. n_bytes: of its file."""

    site: str
    dictionary: str
    d_sae: int
    dense: bool
    mean_l0: float
    n_bytes: int


@dataclass(frozen=True, eq=False)
class SampleRun:
    """A run of samples. basis: activation or attribution. source: the task or corpus. dictionaries: site → its id. sequences: `SEQUENCE_COLUMNS`.

    settings: JSON-able, what determined the samples. sites and finished are filled in when it is written.
    """

    key: str
    model: str
    basis: str
    source: str
    dictionaries: Mapping[str, str]
    n_sequences: int
    n_tokens: int
    settings: Mapping[str, Any]
    sequences: pl.DataFrame
    sites: tuple[SampledSite, ...] = ()
    finished: str = ""

    def site(self, name: str) -> SampledSite:
        """What is known of one of its sites; raises `NoSamples`."""
        found = [site for site in self.sites if site.site == name]
        if not found:
            raise NoSamples(f"samples {self.key} have no site {name!r}: they have {', '.join(self.dictionaries)}")
        return found[0]

    @property
    def n_bytes(self) -> int:
        """The size of its sites' files."""
        return sum(site.n_bytes for site in self.sites)


class SampleStore:
    """The runs of samples of an atlas; nothing is held open. With `read_only` the folder is not made. They are in `folder` of the atlas.

    Raises `BadSamples` where something is to be written all the same.
    """

    def __init__(self, atlas: str | Path, *, read_only: bool = False, folder: str = FOLDER) -> None:
        self.folder = Path(atlas) / folder
        self.read_only = read_only

    # -- reading ---------------------------------------------------------------------------------------------

    def runs(self) -> list[SampleRun]:
        """All finished runs, oldest first. Raises `NewerSamples`."""
        manifests = sorted(self.folder.glob("[!.]*/manifest.json"))
        return sorted((self._run(path.parent) for path in manifests), key=lambda run: (run.finished, run.key))

    def find(self, prefix: str | None = None) -> SampleRun:
        """The run whose key begins with `prefix`, or the one that was written last. Raises `NoSamples`."""
        runs = self.runs()
        fitting = runs[-1:] if prefix is None else [run for run in runs if run.key.startswith(prefix)]
        known = "; ".join(f"{run.key} ({run.basis}s of {run.source})" for run in runs) or "none: `featlas ingest samples` makes some"
        if not fitting:
            raise NoSamples(f"no samples{f' {prefix!r}' if prefix else ''} in {self.folder}: there are {known}")
        if len(fitting) > 1:
            raise NoSamples(f"samples {prefix!r} are not unique: there are {known}")
        return fitting[0]

    def has(self, key: str) -> bool:
        """Whether the run is there, whole."""
        return (self.folder / key / "manifest.json").exists()

    def latest(self, model: str, dictionaries: Mapping[str, str], basis: str | None = None) -> SampleRun | None:
        """The run that was written last for a model whose sites include `dictionaries` (site → dictionary id)."""
        own = [run for run in self.runs() if run.model == model and basis in (None, run.basis)]
        fitting = [run for run in own if dictionaries.items() <= run.dictionaries.items()]
        return fitting[-1] if fitting else None

    def read(self, run: str, site: str) -> SiteSamples:
        """A site of a run, by the run's whole key. Raises `NoSamples`."""
        record = self._known(run)
        of_site, tokens = record.site(site), self.tokens(run)
        group = _groups(record.sequences)
        sequence = tokens["sequence"].to_numpy().astype(np.int64)
        with self._intact(run), np.load(self.folder / run / f"{site}.npz", allow_pickle=False) as file:
            if of_site.dense:
                values = file["values"]
            else:
                values = sparse.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
            groups = group[sequence]  # a damaged table names sequences that there are none of
        return SiteSamples(site, of_site.dictionary, of_site.d_sae, values, sequence, tokens["position"].to_numpy().astype(np.int64), groups)

    def tokens(self, run: str) -> pl.DataFrame:
        """What the rows of a run's matrices are: `TOKEN_COLUMNS`."""
        self._known(run)
        with self._intact(run):
            tokens = pl.read_parquet(self.folder / run / "tokens.parquet", glob=False)
            return tokens.select(pl.col(name).cast(kind) for name, kind in TOKEN_COLUMNS.items())

    def _known(self, key: str) -> SampleRun:
        if not self.has(key):
            return self.find(key)  # a whole key is a prefix too: this raises
        return self._run(self.folder / key)

    def _run(self, folder: Path) -> SampleRun:
        with self._intact(folder.name):
            manifest = read_object(folder / "manifest.json")
            if manifest["layout"] > LAYOUT:
                newer = f"samples in {folder} have layout {manifest['layout']}, this featlas knows layouts up to {LAYOUT}: upgrade featlas"
                raise NewerSamples(newer)
            for name, kind in _FIELDS.items():
                if not isinstance(manifest[name], kind):
                    raise TypeError(f"{name} is {manifest[name]!r:.40}")
            sites = tuple(SampledSite(**site) for site in manifest["sites"])
            sequences = pl.read_parquet(folder / "sequences.parquet", glob=False).cast(pl.Schema(SEQUENCE_COLUMNS))
            return SampleRun(**{name: manifest[name] for name in _FIELDS}, sites=sites, sequences=sequences)

    def _intact(self, run: str) -> AbstractContextManager[None]:
        return intact(self.folder / run, "remove that folder, and make it anew with `featlas ingest samples`")

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self, run: SampleRun, samples: Iterable[SiteSamples], token_texts: Iterable[str | None] | None = None) -> SampleRun:
        """Keep a run whose sites are at hand, all with the same rows; one that is there already is left as it is."""
        if self.has(run.key):
            return self._run(self.folder / run.key)
        with self.writing(run.key) as writer:
            for first, site in enumerate(samples):
                if not first:
                    texts = [None] * site.n_tokens if token_texts is None else list(token_texts)
                    writer.add_tokens(pl.DataFrame({"sequence": site.sequence, "position": site.position, "text": texts}))
                writer.add(site.site, sparse.csr_matrix(site.values))
            return writer.finish(run)

    @contextmanager
    def writing(self, key: str) -> Iterator["SampleWriter"]:
        """A writer of a new run, batch by batch: what it has not finished is gone when the block ends."""
        if self.read_only:
            raise BadSamples(f"samples in {self.folder} were opened for reading")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(key)
        hidden = self.folder / f".{key}.{uuid.uuid4().hex[:12]}"
        hidden.mkdir()
        try:
            with on_disk(hidden):
                writer = SampleWriter(hidden, self.folder / key)
                try:
                    yield writer
                finally:
                    writer.close()
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def _sweep(self, key: str) -> None:
        """Remove what killed processes left of this run."""
        for hidden in self.folder.glob(f".{key}.*"):
            with suppress(OSError):
                if time.time() - max(path.stat().st_mtime for path in (hidden, *hidden.iterdir())) > ABANDONED_SECONDS:
                    shutil.rmtree(hidden, ignore_errors=True)

    def delete(self, run: str) -> None:
        """Remove a run, by its whole key. Raises `NoSamples`."""
        self._known(run)
        shutil.rmtree(self.folder / run)


class SampleWriter:
    """Appends batches to the files of one run; `finish` makes it a run that can be read."""

    def __init__(self, hidden: Path, final: Path) -> None:
        self._hidden, self._final = hidden, final
        self._sites: dict[str, _SiteFiles] = {}
        self._tokens: list[pl.DataFrame] = []

    def add_tokens(self, tokens: pl.DataFrame) -> None:
        """What the next rows are: `TOKEN_COLUMNS`."""
        self._tokens.append(tokens.select(list(TOKEN_COLUMNS)).cast(pl.Schema(TOKEN_COLUMNS)))

    def add(self, site: str, rows: Any) -> None:
        """The next rows of a site, a CSR matrix (n_rows, d_sae)."""
        if site not in self._sites:
            if Path(site).name != site or site.startswith("."):
                raise BadSamples(f"{site!r} is no name of a site")
            self._sites[site] = _SiteFiles(self._hidden, site, rows.shape[1])
        self._sites[site].add(rows)

    def finish(self, run: SampleRun) -> SampleRun:
        """Make what was added the run's; returns it with its sites. Raises `BadSamples` where rows, sites or sequences do not fit each other."""
        if not self._tokens:
            raise BadSamples(f"samples {run.key} have no tokens")
        tokens = pl.concat(self._tokens)
        wrong = {name: files.n_rows for name, files in self._sites.items() if files.n_rows != tokens.height}
        if wrong or set(self._sites) != set(run.dictionaries) or tokens.height != run.n_tokens or run.sequences.height != run.n_sequences:
            raise BadSamples(
                f"samples {run.key} are of {run.n_tokens} tokens, {run.n_sequences} sequences and sites {', '.join(run.dictionaries)}, "
                f"but given were {tokens.height} tokens, {run.sequences.height} sequences and sites {', '.join(self._sites)}, of these short: {wrong}"
            )
        tokens.write_parquet(self._hidden / "tokens.parquet")
        run.sequences.cast(pl.Schema(SEQUENCE_COLUMNS)).write_parquet(self._hidden / "sequences.parquet")
        sites = tuple(self._sites[name].finish(run.dictionaries[name]) for name in run.dictionaries)
        described = {name: getattr(run, name) for name in ("key", "model", "basis", "source", "n_sequences", "n_tokens")}
        described |= {"dictionaries": dict(run.dictionaries), "settings": dict(run.settings), "sites": [asdict(site) for site in sites]}
        described |= {"layout": LAYOUT, "version": version("featlas"), "finished": datetime.now(UTC).isoformat(timespec="microseconds")}
        (self._hidden / "manifest.json").write_text(json.dumps(described, indent=1, ensure_ascii=False), encoding="utf-8")
        try:
            self._hidden.rename(self._final)
        except OSError:
            if not self._final.exists():  # else another process has finished the same run meanwhile, which is as good
                raise
        return SampleStore(self._final.parent.parent, read_only=True, folder=self._final.parent.name).find(run.key)

    def close(self) -> None:
        """Let the files go."""
        for files in self._sites.values():
            files.close()


class _SiteFiles:
    """The entries of one site as they come: the values and the columns of what is not 0, and how many there are per row."""

    def __init__(self, folder: Path, site: str, d_sae: int) -> None:
        self.site, self.d_sae, self.n_rows, self.nnz = site, d_sae, 0, 0
        self._npz = folder / f"{site}.npz"
        self._paths = [folder / f"{site}.{name}" for name in ("values", "columns", "counts")]
        self._files = [path.open("wb") for path in self._paths]

    def add(self, rows: Any) -> None:
        if rows.shape[1] != self.d_sae:
            raise BadSamples(f"{self.site} has {self.d_sae} features, and now {rows.shape[1]}")
        for file, part in zip(self._files, (rows.data.astype(np.float32), rows.indices.astype(np.int32), np.diff(rows.indptr).astype(np.int32))):
            file.write(np.ascontiguousarray(part).tobytes())
        self.n_rows += rows.shape[0]
        self.nnz += rows.nnz

    def close(self) -> None:
        for file in self._files:
            file.close()

    def finish(self, dictionary: str) -> SampledSite:
        """Make one file of them."""
        self.close()
        dense = self.nnz > DENSEST * self.n_rows * self.d_sae
        self._write_dense() if dense else self._write_sparse()
        for path in self._paths:
            path.unlink()
        return SampledSite(self.site, dictionary, self.d_sae, dense, self.nnz / max(self.n_rows, 1), self._npz.stat().st_size)

    def _indptr(self) -> IntArray:
        return np.concatenate([[0], np.cumsum(np.fromfile(self._paths[2], dtype=np.int32), dtype=np.int64)])

    def _write_sparse(self) -> None:
        index = np.int32 if self.nnz <= np.iinfo(np.int32).max else np.int64
        with zipfile.ZipFile(self._npz, "w") as file:
            _array(file, "data", np.float32, (self.nnz,), _pieces(self._paths[0]))
            columns = (np.frombuffer(piece, dtype=np.int32).astype(index).tobytes() for piece in _pieces(self._paths[1]))
            _array(file, "indices", index, (self.nnz,), columns)
            shape = np.array([self.n_rows, self.d_sae])
            for name, whole in (("indptr", self._indptr().astype(index)), ("shape", shape), ("format", np.array(b"csr"))):
                _array(file, name, whole.dtype, whole.shape, [whole.tobytes()])

    def _write_dense(self) -> None:
        with zipfile.ZipFile(self._npz, "w") as file:
            _array(file, "values", np.float32, (self.n_rows, self.d_sae), self._dense_rows())

    def _dense_rows(self) -> Iterator[bytes]:
        indptr = self._indptr()
        values = np.memmap(self._paths[0], dtype=np.float32, mode="r")
        columns = np.memmap(self._paths[1], dtype=np.int32, mode="r")
        for start in range(0, self.n_rows, CHUNK_ROWS):
            own = indptr[start : start + CHUNK_ROWS + 1]
            entries = slice(own[0], own[-1])
            yield sparse.csr_matrix((values[entries], columns[entries], own - own[0]), shape=(len(own) - 1, self.d_sae)).toarray().tobytes()


def _groups(sequences: pl.DataFrame) -> IntArray:
    """What each sequence must stay with when samples are split, (n_sequences,): those of one key, and, from pair to pair, those of one text."""
    n = sequences.height
    key = sequences["key"].rank("dense").cast(pl.Int64).to_numpy() - 1
    text = sequences["text"].rank("dense").cast(pl.Int64)
    known = text.is_not_null().to_numpy()
    keys, texts = key[known], text.drop_nulls().to_numpy() - 1 + n
    joined = sparse.coo_array((np.ones(len(keys), dtype=bool), (keys, texts)), shape=(2 * n, 2 * n))
    return np.unique(connected_components(joined, directed=False)[1][key], return_inverse=True)[1].astype(np.int64)


def _array(file: zipfile.ZipFile, name: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[bytes]) -> None:
    """Add an array to an .npz piece by piece, as `numpy.savez` would whole."""
    # a fixed time in the archive, so that the same samples are the same bytes
    with file.open(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(piece)


def _pieces(path: Path, size: int = 1 << 24) -> Iterator[bytes]:
    stream: IO[bytes]
    with path.open("rb") as stream:
        while piece := stream.read(size):
            yield piece
