# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. Nothing here needs a network: no intersphinx, no fonts or scripts from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import peft_dnd


sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "peft_dnd"
author = "The peft_dnd authors"
copyright = f"2026, {author}"
release = version = peft_dnd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "markdown_docstrings"]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
# What transformers and PEFT say of a method that is overridden here is theirs, and in another markup.
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Blocks in docstrings are formulas and layouts of folders more often than Python, which doctests show by themselves.
highlight_language = "text"

html_theme = "furo"
html_title = f"peft_dnd {release}"
html_show_sphinx = False
