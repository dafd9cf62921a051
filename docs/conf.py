"""Sphinx configuration: ``sphinx-build -W -q -b html docs OUTPUT``. Nothing here needs the network."""

from __future__ import annotations

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
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autosummary_generate = False  # pages are written by hand, grouped by use; a test compares them with __all__
nitpicky = False

html_theme = "furo"
html_title = f"lightning-lcnn {version}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
