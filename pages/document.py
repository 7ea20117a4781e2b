"""The page itself as one HTML text: styles, libraries and scripts inlined, so that it opens without a network.

Nothing of an atlas is ever part of the HTML or of a script: contents are JSON in an element that is not run, or are fetched, and the scripts put
them on the page as text. The page's policy names every script that it may run by its hash, and forbids every address.
"""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template

from ..analysis.plots import plotly_script

SCRIPTS = ("page.js", "graph.js", "panel.js", "sections.js")
"""The page's own scripts, in order."""

PACKED_FROM = 200_000
"""Bytes of contents from which on they are embedded compressed."""


def asset(name: str) -> str:
    """A file of this folder."""
    return resources.files(__package__).joinpath(*name.split("/")).read_text(encoding="utf-8")


def document(title: str, data: str) -> str:
    """The page with its scripts inlined and a policy that names them by their hashes; `data` is the element that holds its contents."""
    texts = [_unbroken(text) for text in (asset("vendor/cytoscape.min.js"), plotly_script(), *map(asset, SCRIPTS))]
    return Template(asset("page.html")).substitute(
        title=html.escape(title), style=asset("page.css"), data=data, scripts="\n".join(f"<script>{text}</script>" for text in texts),
        policy=f'<meta http-equiv="Content-Security-Policy" content="{_policy(texts)}">\n',
    )


def embedded(contents: Mapping[str, object]) -> str:
    """The element that holds a report's contents, compressed where they are long."""
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if len(text.encode()) >= PACKED_FROM:
        packed = base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
        return f'<script type="application/octet-stream" id="atlas-data-gzip">{packed}</script>'
    # no tag can begin or end inside of it
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="atlas-data">{safe}</script>'


def _unbroken(script: str) -> str:
    """A script that does not end, or change how it is read, where its own text says so."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _policy(scripts: Sequence[str]) -> str:
    """What the page may do: run these scripts, style itself, draw pictures of its own; ask no address for anything."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {rest}"
