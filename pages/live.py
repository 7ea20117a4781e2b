"""The page of `featlas serve`: that of the report, with its scripts apart and what is only alive added to it."""

import hashlib
import html
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from string import Template

LIBRARY = "vendor/cytoscape.min.js"
ONLY_ALIVE = ("vendor/codemirror.min.js", "cypher.js")
_ALIVE = "window.featlasServer = { alive: true };\n"
# The token is in the address that was opened: it goes out of the address bar, and with it out of the history, once the cookie is set.
_FORGET = """(() => {
  const address = new URL(location.href);
  if (!address.searchParams.has("token")) return;
  address.searchParams.delete("token");
  history.replaceState(null, "", address.pathname + address.search + address.hash);
})();
"""


@cache
def scripts() -> Mapping[str, str]:
    """The page's scripts by name, in the order that they run in."""
    from ..analysis.plots import plotly_script
    from .document import SCRIPTS, asset

    read = {Path(name).name: asset(name) for name in (*SCRIPTS, *ONLY_ALIVE)}
    return {"alive.js": _FORGET + _ALIVE, "cytoscape.min.js": asset(LIBRARY), "plotly.min.js": plotly_script(), **read}


@cache
def live_page(title: str = "featlas") -> str:
    """The page's HTML: no script stands in it, each is asked for by name and by what it holds."""
    from .document import asset

    tags = "\n".join(f'<script src="scripts/{name}?v={_mark(text)}"></script>' for name, text in scripts().items())
    style = asset("page.css") + asset("cypher.css")
    return Template(asset("page.html")).substitute(policy="", title=html.escape(title), style=style, data="", scripts=tags)


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
