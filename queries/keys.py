"""Keys that are in an atlas, read by the drivers alone: what a shell offers as completions must be there in a moment.

Nothing is made, migrated or waited for: a file that is missing, held by another process or of another layout has no keys.
"""

import json
from pathlib import Path

STATISTICS = "statistics.duckdb"
GRAPH = "graph.lbug"

_CIRCUITS = "MATCH (c:Circuit) RETURN c.key, c.description ORDER BY c.key"
_TABLES = {
    "statistics": "SELECT run, corpus || ' (' || basis || ')' FROM runs ORDER BY started DESC",
    "parcellations": "SELECT parcellation, method FROM parcellations ORDER BY finished DESC",
    "matchings": "SELECT matching, model_a || ' · ' || model_b FROM matchings ORDER BY matching",
    "comparisons": "SELECT comparison, a || ' · ' || b FROM comparisons ORDER BY comparison",
}


def measured_runs(atlas: Path) -> list[tuple[str, str]]:
    """Runs of `ingest edges` of this atlas with their tasks, from their manifests: also those of a server's graph."""
    return [(key, str(options.get("task", ""))) for key, options in _manifests(atlas / "runs", "*.json", "run", "options")]


def sample_runs(atlas: Path) -> list[tuple[str, str]]:
    """Runs of `ingest samples` with their texts."""
    return [(key, str(source)) for key, source in _manifests(atlas / "samples", "[!.]*/manifest.json", "key", "source")]


def _manifests(folder: Path, pattern: str, key: str, about: str) -> list[tuple[str, dict]]:
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found.append((str(manifest[key]), manifest.get(about) or {}))
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return found


def circuits(atlas: Path) -> list[tuple[str, str]]:
    """Circuits of the atlas' embedded graph with what they were made of."""
    path = atlas / GRAPH
    if not path.exists():
        return []
    import ladybug

    try:
        database = ladybug.Database(str(path), read_only=True)
        try:
            rows = ladybug.Connection(database).execute(_CIRCUITS).get_all()
        finally:
            database.close()
    except (RuntimeError, OSError):
        return []
    return [(str(key), str(about or "")) for key, about in rows]


def rows(atlas: Path, what: str) -> list[tuple[str, str]]:
    """Keys of the statistics store with a word about each. what: statistics, or parcellations."""
    path = atlas / STATISTICS
    if not path.exists():
        return []
    import duckdb

    try:
        with duckdb.connect(str(path), read_only=True, config={"enable_external_access": False, "lock_configuration": True}) as connection:
            return [(str(key), str(about or "")) for key, about in connection.execute(_TABLES[what]).fetchall()]
    except (duckdb.Error, OSError):
        return []
