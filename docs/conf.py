"""The documentation's site: `make docs` writes it to build/docs; it opens from there in any browser, without a network.

Formulas become MathML while the site is built (docutils has the translator), which every current browser draws by itself. Figures of the
tutorial are plotly's; its script is copied from the installed package.
"""

import os
import re
import shutil
from importlib.metadata import version as installed
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

project = "featlas"
author = "the featlas developers"
release = version = installed("featlas")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx_design"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
nitpicky = False

html_theme = "furo"
html_title = "featlas"
html_static_path = ["_static"]
html_css_files = ["featlas.css"]
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#075", "color-brand-content": "#075"},
    "dark_css_variables": {"color-brand-primary": "#4c9", "color-brand-content": "#6db"},
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "amsmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]  # Pygments knows older Cypher

# The tutorial takes its first hour's steps on a real model: FEATLAS_DOCS_EXECUTE=0 leaves its cells without results.
nb_execution_mode = "off" if os.environ.get("FEATLAS_DOCS_EXECUTE") == "0" else "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
os.environ["PLOTLY_RENDERER"] = "sphinx_gallery"  # figures as HTML in the page; see `_own_scripts`
os.environ.setdefault("OMP_NUM_THREADS", "1")

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False, "ignore-module-all": True}
autosummary_generate = True

_PLOTLY = re.compile(r'<script[^>]*src="https://cdn\.plot\.ly/[^"]*"[^>]*></script>')
_MATHJAX = re.compile(r'<script[^>]*src="https://cdnjs\.cloudflare\.com/ajax/libs/mathjax/[^"]*"[^>]*></script>')  # no figure has formulas
_FOREIGN = re.compile(r"""<(?!a\s)[a-z][^<>]*?[\s:](?:src|srcset|href|data|poster)=["']?((?:https?:)?//[^"'\s>]+)""", re.IGNORECASE)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_ITEM = re.compile(r"(\d+\.|-) ")


def _formula(node: nodes.Element, *, block: bool) -> str:
    """MathML of a formula; one that cannot be read is a warning that names it."""
    try:
        return tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def _inline_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_formula(node, block=False))
    raise nodes.SkipNode


def _display_math(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math-block">{_formula(node, block=True)}</div>')
    raise nodes.SkipNode


def _docstrings(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `code` and lists: made into reStructuredText, in which stars and trailing underscores are plain."""
    made: list[str] = []
    for line in lines:
        in_list = bool(made) and (_ITEM.match(made[-1]) or made[-1].startswith(" "))
        if _ITEM.match(line) and made and made[-1].strip() and not in_list:
            made.append("")
        parts = _CODE.split(line)
        marked = [_marked(part, code=place % 2 == 1) for place, part in enumerate(parts)]
        # `Block`s: markup must end where a word does
        made.append("".join(text + ("\\ " if place % 2 and parts[place + 1][:1].isalnum() else "") for place, text in enumerate(marked)))
    lines[:] = made


def _marked(part: str, *, code: bool) -> str:
    """A piece of a line: code in doubled backquotes, or text without what would be markup."""
    return f"``{part}``" if code else re.sub(r"([*|])", r"\\\1", re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part))


def _own_scripts(app: Sphinx, error: Exception | None) -> None:
    """Figures draw themselves with the plotly.js of the installed package; what a page still asks of the network is a warning."""
    if error is not None or app.builder.format != "html":
        return
    import plotly

    folder = Path(app.outdir)
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        own = f'<script src="{"../" * (len(page.relative_to(folder).parts) - 1)}_static/plotly.min.js"></script>'
        if _PLOTLY.search(text):
            shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", folder / "_static" / "plotly.min.js")
        made = _MATHJAX.sub("", _PLOTLY.sub("", _PLOTLY.sub(own, text, count=1)))
        if made != text:
            page.write_text(made, encoding="utf-8")
        for address in _FOREIGN.findall(made):
            logging.getLogger(__name__).warning("%s asks the network for %s", page.relative_to(folder), address)


def setup(app: Sphinx) -> None:
    """Register the formulas' renderer and the two corrections."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
    app.connect("autodoc-process-docstring", _docstrings)
    app.connect("build-finished", _own_scripts)
