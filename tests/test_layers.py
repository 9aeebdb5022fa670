"""Imports inside the package run one way: from the files further down in LAYERS to those above."""

import ast
from pathlib import Path

import pytest

import perturbax

PACKAGE = Path(perturbax.__file__).parent

# A file may import from the files that come before it here. A new file gets its place in this list;
# a folder stands for all the files in it, which may also import one another.
LAYERS = [
    "_bits",
    "_words",
    "_rules",
    "_blocks",
    "_trace",
    "_sharding",
    "_calls",
    "_arguments",
    "_tracing",
    "_quantiles",
    "_smoothness",
    "_noise",
    "_interop",
    "_check_noise",
    "_generators",
    "_nets",
    "_sampling",
    "_surrogate",
    "_defaults",
    "_evaluation",
    "_estimator",
    "_spread",
    "_perturb",
    "_estimate",
    "solvers",
    "_perturbation",
    "_argmax",
    "_fenchel_young",
    "_implicit_mle",
    "_straight_through",
    "_distribution",
    "_patch",
    "__init__",
    "__main__",
]

# Useful without the rest: these import nothing of the package.
INDEPENDENT = {"solvers"}

FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def layer(file):
    """The entry of LAYERS that a path inside the package, such as `solvers/_grid.py`, is under."""
    return file.parts[0].removesuffix(".py")


def imported_layers(file, text):
    """Yields the line and the layer of every import from this package, inside functions too."""
    folder = ("perturbax", *file.parts[:-1])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = [*above, *(node.module or "").split(".")] if node.module else [*above]
            # `from . import _noise` names files, `from ._noise import Gumbel` what is in one.
            modules = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] == "perturbax":
                named = module[1] if module[1:] and module[1] in known_names() else "__init__"
                yield node.lineno, named


def known_names():
    return {layer(file) for file in FILES} | set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_has_its_place(file):
    assert layer(file) in LAYERS, f"{file} is new: give it its place in LAYERS of {__file__}"


def test_every_place_is_taken():
    """One that no file has would hide a misspelt name. (There was one.)"""
    assert sorted(LAYERS) == sorted({layer(file) for file in FILES})


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file):
    own = layer(file)
    for line, name in imported_layers(file, (PACKAGE / file).read_text()):
        if name == own and len(file.parts) > 1:
            continue
        assert own not in INDEPENDENT, f"{file}:{line} imports {name}, and {own} stands alone"
        assert LAYERS.index(name) < LAYERS.index(own), (
            f"{file}:{line} imports {name}, which comes after {own}"
        )


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("_noise.py", "import jax\nfrom jax import lax", []),
        ("_noise.py", "from ._estimator import estimate", [(1, "_estimator")]),
        (
            "_noise.py",
            "from . import _estimator, __version__",
            [(1, "_estimator"), (1, "__init__")],
        ),
        ("_noise.py", "import perturbax", [(1, "__init__")]),
        ("_noise.py", "import perturbax._argmax as argmax", [(1, "_argmax")]),
        ("_noise.py", "from perturbax import Gumbel", [(1, "__init__")]),
        ("_noise.py", "from perturbax._argmax import argmax", [(1, "_argmax")]),
        ("_noise.py", "def f():\n    from ._argmax import argmax", [(2, "_argmax")]),
        ("solvers/_grid.py", "from ._path import path", [(1, "solvers")]),
        ("solvers/_grid.py", "from .._noise import Gumbel", [(1, "_noise")]),
        ("solvers/_grid.py", "from .. import _noise", [(1, "_noise")]),
    ],
)
def test_every_form_of_import_is_seen(file, text, expected):
    assert list(imported_layers(Path(file), text)) == expected
