"""How Sphinx builds the site: `make docs`.

The root of the repository is the source, so that a relative link means the same on the site as in a clone. What
is built is in `include_patterns`; every warning is an error, a link that leads nowhere among them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import batchshaping  # noqa: E402

project = "batchshaping"
author = "The batchshaping authors"
copyright = author
version = release = batchshaping.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "*.ipynb", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "**/.*", "docs/_build", "docs/_templates", "batchshaping", "tests", "benchmarks"]
templates_path = [str(ROOT / "docs" / "_templates")]  # for autosummary, which would look below the root

# Pages

html_theme = "furo"
html_title = "batchshaping"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
# The front page is that of docs/, and whoever opens the folder shall get there.
html_additional_pages = {"index": "front.html"}
pygments_style = "friendly"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are stored executed, and executed again by the tests
nb_merge_streams = True

# The reference

autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

nitpicky = True
# What is not of this package has its documentation elsewhere, and names in prose are no references.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|np|numpy|nn|dist|td|typing|collections|pathlib|os|enum|abc|builtins|matplotlib|typer)\..*"),
    (r"py:.*", r".*\b(Tensor|Distribution|Module|Generator|Figure|Axes|Line2D|PathLike|Enum|ABC)"),
]


# Formulas


class _Formulas:
    """Formulas as MathML, which browsers show by themselves: a site without scripts from elsewhere."""

    @staticmethod
    def inline(translator: Any, node: nodes.math) -> None:
        translator.body.append(latex2mathml.tex2mathml(node.astext()))
        raise nodes.SkipNode

    @staticmethod
    def block(translator: Any, node: nodes.math_block) -> None:
        formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
        translator.body.append(f'<div class="formula">{formula}</div>\n')
        raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_Formulas.inline, None), (_Formulas.block, None))


html_math_renderer = "mathml"
