"""What a reader of a graph looks up without knowing keys: its models, its features by site and text, the circuits that a feature is in."""

from collections.abc import Mapping

import polars as pl

from ..errors import UserError
from .store import GraphStore

MODELS = {
    "key": pl.String(), "name": pl.String(), "revision": pl.String(), "family": pl.String(), "n_layers": pl.Int64(), "d_model": pl.Int64(),
}  # fmt: skip
# one row a node of the graph; `label`, `frequency` and `mean_activation` may be null
FOUND = {
    "key": pl.String(), "model": pl.String(), "dictionary": pl.String(), "site": pl.String(), "layer": pl.Int64(), "kind": pl.String(),
    "index": pl.Int64(), "label": pl.String(), "frequency": pl.Float64(), "mean_activation": pl.Float64(),
    "statistics_run": pl.String(),
}  # fmt: skip
MEMBERSHIPS = {"circuit": pl.String(), "role": pl.String(), "n_nodes": pl.Int64(), "n_edges": pl.Int64(), "made_of": pl.String()}


class UnknownFeature(UserError):
    """The graph has no such node, or the name fits several."""


def _typed(rows: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """An answer with the declared types; an empty one has no types of its own."""
    return pl.DataFrame(schema=dict(schema)) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def _columns(schema: Mapping[str, pl.DataType], node: str = "f") -> str:
    # `index` is a word of one of the two dialects
    return ", ".join(f"{node}.`{name}` AS `{name}`" for name in schema)


def list_models(store: GraphStore) -> pl.DataFrame:
    """The models of the graph as `MODELS`, by key."""
    return _typed(store.query(f"MATCH (m:Model) RETURN {_columns(MODELS, 'm')} ORDER BY m.key"), MODELS)


def find_nodes(
    store: GraphStore, *, model: str | None = None, site: str | None = None, kind: str | None = None, text: str | None = None
) -> pl.DataFrame:
    """Features, error nodes and outputs that fit every condition given, as `FOUND`, by layer, site and index.

    `text` is looked for in labels, whatever the case of its letters.
    """
    given = {name: value for name, value in (("model", model), ("site", site), ("kind", kind)) if value is not None}
    conditions = [f"f.{name} = ${name}" for name in given]
    if text is not None:
        given["text"] = text.lower()
        conditions.append("lower(f.label) CONTAINS $text")
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = store.query(f"MATCH (f:Feature){where} RETURN {_columns(FOUND)} ORDER BY f.layer, f.site, f.`index`, f.key", given)
    return _typed(rows, FOUND)


def find_node(store: GraphStore, name: str) -> dict[str, object]:
    """One node as a row of `FOUND`: by its key, by site and index (`resid_11/696`, `resid_11/error`), or `y` for the only output.

    Raises `UnknownFeature`.
    """
    site, _, index = name.rpartition("/")
    by_place: str = "f.key = $name"
    given: dict[str, object] = {"name": name}
    if "|" not in name and site:
        by_place = "f.site = $site AND " + ("f.kind = 'error'" if index == "error" else "f.`index` = $number AND f.kind = 'feature'")
        given = {"site": site} if index == "error" else {"site": site, "number": _number(name, index)}
    elif name == "y":
        by_place, given = "f.kind = 'output'", {}
    found = _typed(store.query(f"MATCH (f:Feature) WHERE {by_place} RETURN {_columns(FOUND)} ORDER BY f.key", given), FOUND)
    if found.height == 1:
        return found.row(0, named=True)
    if found.height:
        raise UnknownFeature(f"{name!r} fits {found.height} nodes, name one by its key: {', '.join(found['key'].head(4))}")
    raise UnknownFeature(f"no feature {name!r} in the graph: name one by its key, as site/index (resid_11/696), as site/error, or y")


def _number(name: str, index: str) -> int:
    if not index.isdecimal():
        raise UnknownFeature(f"no feature {name!r}: after the slash stands a feature's number, or `error` (resid_11/696, resid_11/error)")
    return int(index)


def circuits_of_node(store: GraphStore, key: str) -> pl.DataFrame:
    """The circuits that a node is in, as `MEMBERSHIPS`, the smallest first."""
    text = (
        "MATCH (f:Feature)-[i:IN_CIRCUIT]->(c:Circuit) WHERE f.key = $key RETURN c.key AS circuit, i.role AS role, c.n_nodes AS n_nodes,"
        " c.n_edges AS n_edges, c.description AS made_of ORDER BY n_edges, circuit"
    )
    return _typed(store.query(text, {"key": key}), MEMBERSHIPS)
