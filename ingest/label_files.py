"""Labels from files: tables and JSON of one's own, and Neuronpedia's explanations.

1. `read_label_file` and `read_neuronpedia` give rows as they stand in the file, each with where it stands; lines that cannot be read are told apart.
2. `resolve` finds the features that rows name, by key or by site and index, all at once; those that the atlas does not have are told apart.

Neuronpedia's exports are folders of `batch-N.jsonl.gz`, one explanation a line (`modelId`, `layer`, `index`, `description`, `typeName`,
`explanationModelName`); its API gives a feature as a JSON object with a list `explanations`, or a list of explanations. All three are read.
Its `layer` (such as 6-res-jb) belongs to a site by sae_lens's directory where the site's dictionary is a release of sae_lens.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import polars as pl

from ..errors import UserError
from ..queries.labels import BadLabel, LabelKind, checked, existing_features, known_sites, of_model
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore

ROW: Mapping[str, pl.DataType] = {
    "place": pl.String(), "key": pl.String(), "model": pl.String(), "dictionary": pl.String(), "site": pl.String(), "feature": pl.Int64(),
    "label": pl.String(), "kind": pl.String(), "rule": pl.String(), "source": pl.String(), "author": pl.String(), "confidence": pl.Float64(),
    "evidence": pl.String(),
}  # fmt: skip
"""One label as a file has it: `place` says where, `key` or `site` and `feature` say of what (`model`, `dictionary` where several have the site)."""

_NAMES = {"index": "feature", "number": "feature", "description": "label", "explanation": "label"}
_TEXTS = ("key", "model", "dictionary", "site", "rule", "source", "author", "evidence")
_SHOWN = 5


class NoLabelFile(UserError):
    """The file is not there, is not of a format that holds labels, or has none."""


class BadLabelFile(UserError):
    """Lines of a file are no labels."""


class UnknownSource(UserError):
    """A source of Neuronpedia's is of no site that is known."""


@dataclass(frozen=True)
class Read:
    """rows: `ROW`. problems: what is wrong, one sentence a line of the file. n_empty: explanations without a text, which Neuronpedia has."""

    rows: pl.DataFrame
    problems: tuple[str, ...] = ()
    n_empty: int = 0

    def refuse(self) -> None:
        """Raise `BadLabelFile` where there is any problem."""
        if self.problems:
            more = f"; and {len(self.problems) - _SHOWN:,} more" if len(self.problems) > _SHOWN else ""
            raise BadLabelFile(
                f"nothing was written, {len(self.problems):,} lines are wrong: {'; '.join(self.problems[:_SHOWN])}{more}. "
                "Mend them, or leave them out with --skip-invalid"
            )


# -- 1. reading ----------------------------------------------------------------------------------------------


def read_label_file(path: Path) -> Read:
    """Labels of a .csv, .tsv, .jsonl or .json file (also .gz): columns `key`, or `site` and `index`; `label`; and optionally the others of `ROW`.

    A kind is kept where the file says it, as `featlas labels export` does; else it is that of labels from files, their source the file's name.
    """
    stem = path.name.removesuffix(".gz")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json}
    reader = readers.get(Path(stem).suffix.lower())
    if reader is None:
        raise NoLabelFile(f"{path}: labels are read from {', '.join(readers)} files (also .gz); for Neuronpedia's say --format neuronpedia")
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for place, record in reader(path):
        try:
            found.append(_row(place, record, stem))
        except (BadLabel, ValueError) as error:
            problems.append(f"{place}: {error}")
    return Read(pl.DataFrame(found, schema=ROW, orient="row"), tuple(problems))


def _row(place: str, record: object, name: str) -> dict[str, Any]:
    """One record of a file as a row; raises `ValueError` with what is wrong."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"{repr(record)[:40]} is no object with names")
    known = {_NAMES.get(str(column).strip().lower(), str(column).strip().lower()): value for column, value in record.items() if column is not None}
    unknown = [column for column in known if column not in ROW and column not in ("written", "layer")]
    if unknown:
        raise ValueError(f"unknown column {unknown[0][:40]!r}: there are key, or site and index; label; {', '.join(list(ROW)[7:])}")
    row: dict[str, Any] = dict.fromkeys(ROW)
    row.update({column: _text(known.get(column)) for column in _TEXTS}, place=place)
    row["feature"] = _number(known.get("feature"), "index", int)
    row["confidence"] = _number(known.get("confidence"), "confidence", float)
    if row["key"] is None and (row["site"] is None or row["feature"] is None):
        raise ValueError("neither a key, nor a site and an index")
    label = known.get("label")
    if not isinstance(label, str):
        raise ValueError("no label" if label is None else f"the label {repr(label)[:40]} is no text")
    row["label"] = checked(label)
    kind = _text(known.get("kind"))
    if kind is not None and kind not in list(LabelKind):
        raise ValueError(f"unknown kind {kind[:40]!r}: there are {', '.join(LabelKind)}")
    row["kind"] = kind or str(LabelKind.FILE)
    row["source"] = row["source"] if row["source"] is not None or kind == LabelKind.HAND else name
    return row


def _text(value: object) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str | int):
        raise ValueError(f"{repr(value)[:40]} is no text")
    return str(value)


def _number(value: object, name: str, kind: type) -> Any:
    """A number from what a table or JSON has; null stays null."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = kind(value.strip()) if isinstance(value, str) else kind(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} {repr(value)[:40]} is no {'whole number' if kind is int else 'number'}") from None
    if kind is int and not 0 <= number < 2**31:
        raise ValueError(f"{name} {value!r} is no number of a feature")
    return number


def _open(path: Path) -> IO[str]:
    """A file as text, decompressed where its name ends in .gz."""
    try:
        data = path.read_bytes()
        return io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig"), newline="")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NoLabelFile(f"cannot read {path}: it is no whole gzip file ({error})") from None
    except OSError as error:
        raise NoLabelFile(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise NoLabelFile(f"cannot read {path}: it is not UTF-8 from byte {error.start:,} on") from None


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    with _open(path) as stream:
        rows = csv.reader(stream, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        header: list[str] | None = None
        while True:
            try:
                values = next(rows, None)
            except csv.Error as error:
                yield f"line {rows.line_num}", ValueError(str(error))
                return
            if values is None:
                break
            if header is None:
                header = values
            elif any(value.strip() for value in values):
                fits = len(values) == len(header)
                wrong = ValueError(f"{len(values)} values where the first line names {len(header)} columns")
                yield f"line {rows.line_num}", dict(zip(header, values)) if fits else wrong
    if header is None:
        raise NoLabelFile(f"{path} is empty")


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(text: str) -> object:
    """JSON, or the mistake in it."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deep")
    except ValueError as error:
        return ValueError(f"no JSON ({error})")


def _json(path: Path) -> Iterator[tuple[str, object]]:
    with _open(path) as stream:
        whole = _parsed(stream.read())
    if isinstance(whole, ValueError):
        raise NoLabelFile(f"{path}: {whole}")
    if isinstance(whole, Mapping) and all(isinstance(value, str) for value in whole.values()) and "label" not in whole:
        yield from ((f"entry {i}", {"key": key, "label": label}) for i, (key, label) in enumerate(whole.items(), start=1))
    else:
        yield from ((f"entry {i}", record) for i, record in enumerate(whole if isinstance(whole, list) else [whole], start=1))


# -- Neuronpedia ---------------------------------------------------------------------------------------------


def read_neuronpedia(path: Path, sites: Mapping[str, str], only: str | None = None) -> Read:
    """Explanations in a file of Neuronpedia's, or in all such files of a folder.

    sites: source (`modelId/layer`) → site. only: the site of whatever source the files have, where there is one source. Raises `UnknownSource`.
    """
    files = sorted(p for p in path.rglob("*") if _is_json(p)) if path.is_dir() else [path]
    if not files:
        raise NoLabelFile(f"no .jsonl, .jsonl.gz or .json file in {path}")
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    n_empty = 0
    for file in files:
        stem = file.name.removesuffix(".gz")
        for place, record in (_json if stem.endswith(".json") else _json_lines)(file):
            at = f"{file.name} {place}" if len(files) > 1 else place
            try:
                for row in _explanations(at, record):
                    n_empty += row["label"] is None
                    rows += [row] if row["label"] is not None else []
            except (BadLabel, ValueError) as error:
                problems.append(f"{at}: {error}")
    found = pl.DataFrame(rows, schema=ROW, orient="row")
    return Read(_at_sites(found, sites, only), tuple(problems), n_empty)


def _is_json(path: Path) -> bool:
    return path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def _explanations(place: str, record: object) -> Iterator[dict[str, Any]]:
    """The explanations of one record, which is one, or a feature with a list of them."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"{repr(record)[:40]} is no explanation")
    parts = record.get("explanations") if "explanations" in record else [record]
    if not isinstance(parts, list):
        raise ValueError("`explanations` is no list")
    for part in parts:
        if not isinstance(part, Mapping):
            raise ValueError(f"{repr(part)[:40]} is no explanation")
        whole = {**record, **{name: value for name, value in part.items() if value not in (None, "")}}
        model, layer, index = whole.get("modelId"), whole.get("layer"), _number(whole.get("index"), "index", int)
        if not isinstance(model, str) or not isinstance(layer, str) or index is None:
            raise ValueError("modelId, layer and index must say of which feature it is")
        description = part.get("description")
        if description is not None and not isinstance(description, str):
            raise ValueError(f"the description {repr(description)[:40]} is no text")
        explainer = " ".join(str(part[name]) for name in ("typeName", "explanationModelName") if part.get(name))
        listed = part.get("scores")
        scores = [score.get("value") for score in listed if isinstance(score, Mapping)] if isinstance(listed, list) else []
        known = [float(v) for v in scores if isinstance(v, int | float) and 0 <= v <= 1]
        empty = description is None or not description.strip()
        yield {
            **dict.fromkeys(ROW), "place": place, "feature": index, "label": None if empty else checked(str(description)),
            "kind": str(LabelKind.NEURONPEDIA), "rule": explainer, "source": f"{model}/{layer}", "confidence": max(known, default=None),
            "evidence": f"explained by {explainer}" if explainer else None,
        }  # fmt: skip


def _at_sites(rows: pl.DataFrame, sites: Mapping[str, str], only: str | None) -> pl.DataFrame:
    """Rows with the site of their source."""
    sources = rows["source"].unique().sort().to_list()
    if only is not None:
        if len(sources) > 1:
            raise UnknownSource(f"--site {only} is one site, the files have {len(sources)} sources: say --site SOURCE=SITE for {', '.join(sources)}")
        return rows.with_columns(site=pl.lit(only))
    unknown = [source for source in sources if source not in sites]
    if unknown:
        known = ", ".join(f"{source} is {site}" for source, site in list(sites.items())[:6]) or "none of the atlas' dictionaries is one of sae_lens's"
        raise UnknownSource(f"no site is known for Neuronpedia's source {unknown[0]!r} ({known}): say --site {unknown[0]}=SITE")
    return rows.with_columns(site=pl.col("source").replace_strict(dict(sites), default=None, return_dtype=pl.String))


def neuronpedia_sites(store: GraphStore | None, statistics: StatisticsStore) -> dict[str, str]:
    """Neuronpedia's source (`modelId/layer`) of each site whose dictionary is a release of sae_lens → the site; nothing is fetched."""
    named = known_sites(store, statistics).filter(pl.col("dictionary").str.contains(":", literal=True))
    if named.is_empty():
        return {}
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    found: dict[str, str] = {}
    for dictionary, site in named.select("dictionary", "site").iter_rows():
        release, _, sae_id = dictionary.partition(":")
        source = releases[release].neuronpedia_id.get(sae_id) if release in releases else None
        if source:
            found[source] = site
    return found


# -- 2. features ---------------------------------------------------------------------------------------------


def resolve(store: GraphStore | None, statistics: StatisticsStore, read: Read, *, of: str | None = None) -> Read:
    """Rows with the key, model, site and number of their feature; rows of features that the atlas does not have become problems.

    of: the model or dictionary, as in `labels.of_model`.

    A feature named by site and index is there where the statistics say that the dictionary is so wide, or the graph has it.
    """
    sites = known_sites(store, statistics).filter(of_model(of))
    stems = sites.with_columns(stem=pl.concat_str("model", "dictionary", "site", pl.lit(""), separator="|"))
    rows = read.rows.with_row_index("order")
    named = rows.filter(pl.col("key").is_not_null()).drop("model", "site", "feature")
    there = existing_features(store, statistics, named["key"].unique().to_list()) if named.height else _no_features()
    by_key = named.join(there, on="key", how="left")
    numbered = rows.filter(pl.col("key").is_null()).drop("key").rename({"model": "said_model", "dictionary": "said_dictionary"})
    joined = numbered.join(stems.select("model", "dictionary", "site", "stem", "d_sae"), on="site", how="left")
    agrees = lambda name: pl.col(f"said_{name}").is_null() | pl.col(name).str.starts_with(pl.col(f"said_{name}")).fill_null(False)
    joined = joined.filter(agrees("model") & agrees("dictionary"))
    joined = joined.with_columns(key=pl.col("stem") + pl.col("feature").cast(pl.String))
    unmeasured = joined.filter(pl.col("d_sae").is_null() & pl.col("key").is_not_null())
    seen = existing_features(store, statistics, unmeasured["key"].unique().to_list())["key"] if unmeasured.height else pl.Series([], dtype=pl.String)
    fits = (pl.col("feature") < pl.col("d_sae")).fill_null(pl.col("key").is_in(seen.to_list()))
    fitting = joined.filter(fits & pl.col("key").is_not_null())
    several = fitting.filter(pl.col("order").is_duplicated()).unique("order").sort("order")
    alone = fitting.filter(~pl.col("order").is_duplicated())
    lost = numbered.join(fitting, on="order", how="anti")
    columns = ["order", *ROW]
    found = pl.concat([by_key.filter(pl.col("feature").is_not_null()).select(columns), alone.select(columns)]).sort("order")
    known = ", ".join(sites["site"].unique(maintain_order=True)) or "none"
    place, numbered_as = pl.col("place") + pl.lit(": "), pl.concat_str("site", pl.lit("/"), "feature")
    problems = pl.concat(
        [
            by_key.filter(pl.col("feature").is_null()).select("order", text=place + pl.lit("the atlas has no feature ") + pl.col("key")),
            lost.select("order", text=place + pl.lit("the atlas has no feature ") + numbered_as + pl.lit(f" (its sites are {known})")),
            several.select("order", text=place + numbered_as + pl.lit(" fits several features: choose by --of, or give keys")),
        ]
    ).sort("order")
    return Read(found.drop("order", "dictionary"), (*read.problems, *problems["text"]), read.n_empty)


def _no_features() -> pl.DataFrame:
    return pl.DataFrame(schema={"key": pl.String, "model": pl.String, "site": pl.String, "feature": pl.Int64})


def site_options(given: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """What --site says: sources with their sites, or one site for the only source. Raises `UnknownSource`."""
    pairs = dict(text.rsplit("=", 1) for text in given if "=" in text)
    alone = [text for text in given if "=" not in text]
    if len(alone) > 1 or (alone and pairs):
        raise UnknownSource(f"--site {alone[-1]!r} says of no source: say --site SOURCE=SITE for each")
    return pairs, alone[0] if alone else None
