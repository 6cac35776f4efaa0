"""How Sphinx builds the site: `make docs`.

The root of the repository is the source, so that a relative link means the same on the site as in a clone.
What is built is in `include_patterns`; every warning is an error, a link that leads nowhere among them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import batchshaping  # noqa: E402

logger = logging.getLogger(__name__)

project = "batchshaping"
author = "The batchshaping authors"
copyright = author
version = release = batchshaping.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "*.ipynb",
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "configs/README.md"),
]
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
autodoc_inherit_docstrings = False  # what implements a documented base is documented there
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

nitpicky = True
# A folder hands on the names of its files, so that a name may have two places.
suppress_warnings = ["ref.python"]
# What is not of this package has its documentation elsewhere, and names in prose are no references.
nitpick_ignore_regex = [
    (r"py:.*", r"(abc|builtins|collections|contextlib|contextvars|enum|os|pathlib|typing)\..*"),
    (r"py:.*", r"(matplotlib|np|numpy|torch|dist|nn|td|typer)\..*"),
    (r"py:.*", r"(PIL|annotated_types|lightning|pl|pydantic|pydantic_core|rich)\..*"),
    (r"py:.*", r"(AllowInfNan|(types\.)?Annotated\[.*|CheckpointIO|Field|FieldInfo|G[et]|L[et]|NoneType)"),
    (r"py:.*", r"(Path|_\w+)"),
    (r"py:.*", r"(ABC|Any|Axes|Distribution|Enum|Figure|Line2D|PathLike|Tensor|load_state_dict)"),
    (r"py:.*", r"batchshaping\.(\w+\.)*(_\w+|Annotated)"),
]


# Formulas


# What the converter does not know, in terms of what it does.
_COMMANDS = {r"\dots": r"\ldots", r"\Big/": "/"}


class _Formulas:
    """Formulas as MathML, which browsers show by themselves: a site without scripts from elsewhere."""

    @staticmethod
    def _mathml(node: nodes.Element, as_block: bool) -> str:
        formula = node.astext()
        for command, known in _COMMANDS.items():
            formula = formula.replace(command, known)
        try:
            return latex2mathml.tex2mathml(formula, as_block=as_block)
        except MathError as error:
            logger.warning("formula %r: %s", formula, error, location=node)
            return formula

    @staticmethod
    def inline(translator: Any, node: nodes.math) -> None:
        translator.body.append(_Formulas._mathml(node, as_block=False))
        raise nodes.SkipNode

    @staticmethod
    def block(translator: Any, node: nodes.math_block) -> None:
        translator.body.append(f'<div class="formula">{_Formulas._mathml(node, as_block=True)}</div>\n')
        raise nodes.SkipNode


class _PlainData:
    """Docstrings of data as they are; napoleon would take what stands before a colon for a type."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}

    def keep(self, app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
        if what in ("attribute", "data"):
            self.kept[name] = list(lines)

    def restore(self, app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
        if name in self.kept:
            lines[:] = self.kept.pop(name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    data = _PlainData()
    app.connect("autodoc-process-docstring", data.keep, priority=400)
    app.connect("autodoc-process-docstring", data.restore, priority=600)
    app.add_html_math_renderer("mathml", (_Formulas.inline, None), (_Formulas.block, None))


html_math_renderer = "mathml"
