"""What a shell offers after an option: keys, names and sites that there are, without loading a library that takes seconds.

Each function gives (value, what it is) for what begins with what was typed so far. The atlas is that of the command line that is being typed.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from . import checks

Offers = list[tuple[str, str]]
QUERIES = Path(__file__).parent / "queries"
LONGEST = 60  # characters that are said about a value
SITES = ("embed", "attn_0", "mlp_0", "resid_0")  # forms of names, where nothing says which sites there are


def _atlas(context: typer.Context) -> Path:
    return Path(context.params.get("atlas") or "atlas")


def _beginning(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    return [(value, about if len(about) <= LONGEST else about[: LONGEST - 1] + "…") for value, about in offers if value.startswith(incomplete)]


def _last(incomplete: str, offers: Iterable[tuple[str, str]], separator: str = ",") -> Offers:
    """Offers for the last of several names; those before it stay, and are not offered again."""
    before, comma, last = incomplete.rpartition(separator)
    given = set(before.split(separator))
    return [(before + comma + value, about) for value, about in _beginning(offers, last) if value not in given]


def _of_atlas(read: Callable[[Path], Offers]) -> Callable[[typer.Context, str], Offers]:
    def offered(context: typer.Context, incomplete: str) -> Offers:
        return _beginning(read(_atlas(context)), incomplete)

    return offered


def _kept(what: str) -> Callable[[typer.Context, str], Offers]:
    def read(atlas: Path) -> Offers:
        from .queries import keys

        return keys.rows(atlas, what)

    return _of_atlas(read)


def runs(context: typer.Context, incomplete: str) -> Offers:
    """Runs of `ingest edges`."""
    from .queries import keys

    return _beginning(keys.measured_runs(_atlas(context)), incomplete)


def samples(context: typer.Context, incomplete: str) -> Offers:
    """Runs of `ingest samples`."""
    from .queries import keys

    return _beginning(keys.sample_runs(_atlas(context)), incomplete)


def circuits(context: typer.Context, incomplete: str) -> Offers:
    """Circuits of the embedded graph; several with commas between."""
    from .queries import keys

    return _last(incomplete, keys.circuits(_atlas(context)))


statistics_runs = _kept("statistics")
parcellations = _kept("parcellations")
matchings = _kept("matchings")
comparisons = _kept("comparisons")


def queries(incomplete: str) -> Offers:
    """Named queries with what they answer, the first line of their files."""
    found: dict[str, str] = {}
    for path in sorted(QUERIES.glob("*.cypher")):
        with path.open(encoding="utf-8") as text:
            found.setdefault(path.name.partition(".")[0], text.readline().lstrip("/ ").strip())
    return _beginning(found.items(), incomplete)


def parameters(context: typer.Context, incomplete: str) -> Offers:
    """Parameters of the named query, as name=."""
    files = sorted(QUERIES.glob(f"{context.params.get('name') or next(iter(context.args), '?')}.*cypher"))
    declared = re.findall(r"^// \$(\w+): *(.*)$", files[0].read_text(encoding="utf-8"), re.MULTILINE) if files else []
    return _beginning([(f"{name}=", about) for name, about in declared], incomplete)


def tasks(incomplete: str) -> Offers:
    """Tasks; several with + between."""
    return _last(incomplete, [(name, "") for name in checks.TASK_NAMES], "+")


def devices(incomplete: str) -> Offers:
    """Kinds of devices; whether they are there is known to a library that is not loaded for this."""
    own = [("cpu", ""), ("cuda", "the first NVIDIA or AMD GPU"), ("cuda:0", ""), ("mps", "Apple's GPU"), ("auto", "layers over all that is here")]
    return _beginning(own, incomplete)


def dtypes(incomplete: str) -> Offers:
    """Floating-point types."""
    return _beginning([(name, "") for name in checks.DTYPE_NAMES], incomplete)


def dictionaries(incomplete: str) -> Offers:
    """demo, identity, sae_lens' releases, and folders here that hold dictionaries."""
    own = [("demo", "small ones of SmolLM2"), ("identity", "neurons"), ("identity-heads", "neurons, heads' outputs at attn_L")]
    folders = [(str(path), "folder") for path in sorted(Path.cwd().iterdir()) if path.is_dir() and _dictionary_sites(path)]
    return _beginning([*own, *folders, *((name, "sae_lens release") for name in checks.releases())], incomplete)


def _dictionary_sites(folder: Path) -> Sequence[str]:
    return sorted((path.parent.name for path in folder.glob("*/cfg.json")), key=_site_order)


def _site_order(name: str) -> tuple[int, str]:
    kind, _, layer = name.rpartition("_")
    return (int(layer), kind) if layer.isdigit() else (-1, name)


def sites(context: typer.Context, incomplete: str) -> Offers:
    """Sites of the dictionaries that are named, else of the demo's; several with commas between."""
    named = str(context.params.get("dictionaries") or "demo")
    folder = Path(__file__).parent / "model" / "demo_dictionaries" if named == "demo" else Path(named).expanduser()
    found = _dictionary_sites(folder) if folder.is_dir() else ()
    return _last(incomplete, [(name, "") for name in found or SITES])
