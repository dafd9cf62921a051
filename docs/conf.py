"""Sphinx configuration: ``sphinx-build -W -q -b html docs OUTPUT``. Nothing here needs the network."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from lightning_lcnn import __version__

project = "lightning-lcnn"
author = "The lightning-lcnn developers"
copyright = "the lightning-lcnn developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

# pages
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# API reference
default_role = "py:obj"  # `name` in a docstring links to it where it can and is code where it cannot
add_module_names = False
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "exclude-members": "add_module, extra_repr, named_children, reset_parameters, torch_class",  # torch's own hooks
}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autosummary_generate = False  # pages are written by hand, grouped by use; a test compares them with __all__

html_theme = "furo"
html_title = f"lightning-lcnn {version}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]


# Sphinx shows no comments, and the fields of our results carry shape and meaning in one each, beside the field and not
# a second time in a docstring that would drift from it. So they are read from the source here. May go when autodoc
# shows `#:` comments behind dataclass fields in the parameter list.
def add_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give results their fields, whose shapes and meanings stand in comments of the source."""
    if what == "class" and dataclasses.is_dataclass(obj) and not any(line.startswith(":param") for line in lines):
        source = re.sub(r"([*|])", r"\\\1", inspect.getsource(obj))
        lines += [f":param {n}: {comment}" for n, comment in re.findall(r"^    (\w+): [^#\n]+  # (.+)$", source, re.M)]


def setup(app: Any) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("autodoc-process-docstring", add_fields)
