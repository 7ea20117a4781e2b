"""Which of some nodes a graph has: what is written only where nothing is yet asks this first."""

from collections.abc import Collection

from .schema import node_label
from .store import GraphStore

_KEYS_PER_QUERY = 20_000


def known_keys(store: GraphStore, label: str, keys: Collection[str]) -> frozenset[str]:
    """Those of `keys` that nodes of the label have. Raises `schema.UnknownLabel`."""
    text = f"MATCH (n:{node_label(label).name}) WHERE n.key IN $keys RETURN n.key AS key"
    wanted = sorted(set(keys))
    parts = [store.query(text, {"keys": wanted[i : i + _KEYS_PER_QUERY]}) for i in range(0, len(wanted), _KEYS_PER_QUERY)]
    return frozenset(key for part in parts if part.height for key in part["key"].to_list())
