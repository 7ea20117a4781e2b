"""The rule of who imports whom and where each thing may stand, as a check of one file's text."""

import ast
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

# the folder of a file -> the folders it may import from; the root's errors.py and files.py are everyone's
MAY_IMPORT = {
    "model": {"model"},
    "queries": {"queries"},
    "ingest": {"ingest", "model", "queries"},
    "analysis": {"analysis", "model", "queries"},
    "pages": {"pages", "analysis", "queries"},
}
# a library -> the only files that may import it
ONLY_IN = {
    "ladybug": {"queries/embedded.py", "queries/keys.py"},
    "neo4j": {"queries/server.py"},
    "graphdatascience": {"queries/gds.py"},
    "py2neo": set(),
    "duckdb": {"queries/statistics.py", "queries/keys.py"},
    "plotly": {f"analysis/{name}plots.py" for name in ("", "region_", "comparison_", "matching_", "series_")},
    "fastapi": {"pages/server.py"},
    "uvicorn": {"pages/server.py"},
    "ot": {"analysis/transport.py"},
    "graph_tool": {"analysis/graph_tool_worker.py"},
    "ray": {"ingest/cluster.py"},
    "pickle": set(),
    "cloudpickle": set(),
    "joblib": set(),
}
CYPHER = re.compile(r"\b(MATCH|MERGE|CREATE)\s*\(|\]->\s*\(|\bMATCH\s+\w+\s*=|\bUNWIND\s+\$|\bLOAD FROM\b")
# written apart, so that this file names none of them
REGISTRY_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"), ("files", "pythonhosted", "org"), ("repo", "maven", "apache", "org"), ("repo1", "maven", "org"),
        ("search", "maven", "org"), ("conda", "anaconda", "org"), ("registry", "npmjs", "org"), ("download", "pytorch", "org"),
        ("docker", "io"), ("ghcr", "io"), ("deb", "debian", "org"), ("archive", "ubuntu", "com"), ("debian", "neo4j", "com"), ("crates", "io"),
        ("proxy", "golang", "org"), ("dist", "neo4j", "org"), ("repo", "anaconda", "com"),
    )
)  # fmt: skip


def violations(path: str, text: str) -> list[str]:
    """What the Python file at `path` (relative to the root, with slashes) does against the rule, one line each."""
    if path.startswith(("tests/", "benchmarks/", "scripts/", "docs/")):
        return []
    tree = ast.parse(text)
    return [f"{path}:{line}: {what}" for line, what in sorted({*_import_violations(path, tree), *_text_violations(path, tree)})]


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Each imported module: with a leading dot and relative to the package's root when it is the package's own."""
    folder = PurePosixPath(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1])
            if node.level - 1 > len(folder):
                yield node.lineno, "..outside"
            elif node.module:
                yield node.lineno, "." + ".".join([*base, node.module])
            else:
                yield from ((node.lineno, "." + ".".join([*base, alias.name])) for alias in node.names)


def _import_violations(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if path == "__init__.py" and not (len(tree.body) == 1 and ast.get_docstring(tree)):
        yield 1, "the root's __init__.py holds a docstring and nothing else"
    own = path.split("/")[0] if "/" in path else None
    for line, name in _imports(path, tree):
        library = name.split(".")[0]
        if library == "featlas":
            yield line, f"imports inside the package are relative, not {name}"
        elif name.startswith("."):
            target = name[1:].split(".")[0]
            if own is not None and target not in {"errors", "files"} and target not in MAY_IMPORT.get(own, set()):
                yield line, f"{own} must not import {name}"
            if own is None and path == "errors.py":
                yield line, f"errors.py must not import {name}"
        elif library in ONLY_IN and path not in ONLY_IN[library]:
            yield line, f"{library} may be imported only in {', '.join(sorted(ONLY_IN[library])) or 'no file of the package'}"


def _text_violations(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if not path.startswith("queries/") and CYPHER.search(node.value):
                yield node.lineno, "Cypher stands only under queries/"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield node.lineno, "torch.load runs code that a file brings: read safetensors"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle runs code that a file brings"


def registry_hosts(text: str) -> list[str]:
    """The package registries that a text names by host; where packages come from is the user's to say."""
    return [host for host in REGISTRY_HOSTS if host in text]
