import importlib.metadata
import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "perturbax"
author = "The perturbax developers"
copyright = author
release = importlib.metadata.version(project)

extensions = [
    "gallery",
    "myst_parser",
    "native_math",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_generated"]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings are written for `help()`, where single backticks mark code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"perturbax {release}"


def without_last_line(app, doctree):
    """Takes off the empty line that examples end in for the sake of doctest."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip("\n")
        if block.rawsource == block.astext():
            block.rawsource, block.children = text, []
            block += nodes.Text(text)


def setup(app):
    """Sphinx calls it."""
    app.connect("doctree-read", without_last_line)
