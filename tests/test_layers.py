"""Imports inside the package run one way: from the files further down in LAYERS to those above."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import perturbax

PACKAGE = Path(perturbax.__file__).parent

# A file may import from the files that come before it here. A new file gets its place in this list;
# a folder alone stands for all the files in it, which may also import one another.
LAYERS = [
    "_types",
    "_leaves",
    "_checks",
    "_describe",
    "tracing/_broadcasting",
    "sampling/_random_bits",
    "tracing/_derivative_rules",
    "tracing/_linear_algebra",
    "tracing/_jaxprs",
    "tracing/_callbacks",
    "tracing/_mesh_axes",
    "tracing/_dependence",
    "tracing/_host_exceptions",
    "tracing/_host_call",
    "tracing/_files",
    "tracing/_signature",
    "tracing/_compiled",
    "tracing/_user_code",
    "scale/_matrices",
    "scale/_scales",
    "noise/_protocol",
    "noise/_quantiles",
    "noise/_derivative_limit",
    "noise/_moments",
    "noise/_inverse",
    "noise/_smooth",
    "noise/_limited",
    "noise/_foreign",
    "noise/_traced",
    "diagnostics/_check_noise",
    "sampling/_protocol",
    "sampling/_drawn_together",
    "sampling/_draw_groups",
    "sampling/_merged",
    "sampling/_independent",
    "sampling/_orthogonal",
    "sampling/_generators",
    "sampling/_nets",
    "execution/_devices",
    "execution/_plan",
    "execution/_chunks",
    "estimator/_left_out",
    "estimator/_surrogate",
    "estimator/_default_rule",
    "estimator/_formula",
    "estimator/_derivatives",
    "host_functions/_worker",
    "host_functions/_results",
    "host_functions/_attempts",
    "host_functions/_pickles",
    "host_functions/_crew",
    "host_functions/_processes",
    "host_functions/_foreign_executors",
    "host_functions/_executors",
    "host_functions/_encoding",
    "host_functions/_function_names",
    "host_functions/_journal",
    "host_functions/_arguments",
    "host_functions/_progress",
    "host_functions/_scheduling",
    "host_functions/_call_back",
    "host_functions/_host_function",
    "estimator/_estimator",
    "_call",
    "_perturb",
    "diagnostics/_words",
    "diagnostics/_standard_errors",
    "diagnostics/_variance_law",
    "diagnostics/_subject",
    "diagnostics/_layer_subject",
    "diagnostics/_plots",
    "diagnostics/_sweep",
    "diagnostics/_smoothing",
    "diagnostics/_diagnosis",
    "diagnostics/_findings",
    "diagnostics/_diagnose",
    "carried/_features",
    "carried/_regression",
    "carried/_carry",
    "solvers",
    "optimizers/_perturbed_scores",
    "optimizers/_layer",
    "optimizers/_symmetric",
    "optimizers/_argmax",
    "optimizers/_max",
    "optimizers/_fenchel_young",
    "optimizers/_implicit_mle",
    "_straight_through",
    "optimizers/_distribution",
    "minimization/_states",
    "minimization/_problem",
    "minimization/_setup",
    "minimization/_first_sigma",
    "minimization/_descent",
    "minimization/_quadratic_fit",
    "minimization/_shape_of_noise",
    "minimization/_trust_region",
    "minimization/_sigma_rule",
    "minimization/_surrogate_search",
    "minimization/_result",
    "minimization/_run",
    "minimization/_fingerprint",
    "minimization/_checkpoint",
    "minimization/_progress",
    "minimization/_minimize",
    "_optax",
    "__init__",
    "__main__",
]

# Useful without the rest: these import nothing of the package.
INDEPENDENT = {"solvers"}

ALL_FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# What a room has in front of its files is one sentence about it.
DOORS = [file for file in ALL_FILES if file.name == "__init__.py" and file.parent.parts]
DOORS = [file for file in DOORS if str(file.parent) not in LAYERS]
FILES = [file for file in ALL_FILES if file not in DOORS]


def layer(file):
    """The entry of LAYERS that a path inside the package, such as `solvers/_grid.py`, is under."""
    return file.parts[0] if file.parts[0] in LAYERS else file.with_suffix("").as_posix()


def imported_layers(file, text):
    """Yields the line and the layer of every import from this package, inside functions too."""
    folder = ("perturbax", *file.parts[:-1])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = [*above, *(node.module or "").split(".")] if node.module else [*above]
            # `from . import _smooth` names files, `from ._smooth import Gumbel` what is in one.
            modules = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] == "perturbax":
                paths = ("/".join(module[1:end]) for end in (3, 2))
                known = [path for path in paths if path in known_names()]
                yield node.lineno, (known or ["__init__"])[0]


def known_names():
    return {layer(file) for file in FILES} | set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_has_its_place(file):
    assert layer(file) in LAYERS, f"{file} is new: give it its place in LAYERS of {__file__}"


def test_every_place_is_taken():
    """One that no file has would hide a misspelt name. (There was one.)"""
    assert sorted(LAYERS) == sorted({layer(file) for file in FILES})


def test_every_public_name_is_in_the_list_of_the_api_page():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    [listed] = re.findall(r"autosummary::\n   :nosignatures:\n\n((?:   \w+\n)+)", page)
    public = [
        name
        for name, value in vars(perturbax).items()
        if not name.startswith("_") and (name == "solvers" or not inspect.ismodule(value))
    ]
    assert sorted(listed.split()) == sorted(public)


@pytest.mark.parametrize("file", DOORS, ids=str)
def test_a_room_is_told_in_a_sentence(file):
    body = ast.parse((PACKAGE / file).read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr), f"{file} should hold a docstring alone"


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
        ("noise/_smooth.py", "import jax\nfrom jax import lax", []),
        ("noise/_smooth.py", "from ..estimator._estimator import V", [(1, "estimator/_estimator")]),
        (
            "noise/_smooth.py",
            "from .. import _checks, __version__",
            [(1, "_checks"), (1, "__init__")],
        ),
        ("noise/_smooth.py", "from ..estimator import _surrogate", [(1, "estimator/_surrogate")]),
        ("_checks.py", "import perturbax", [(1, "__init__")]),
        ("_checks.py", "import perturbax.optimizers._argmax as a", [(1, "optimizers/_argmax")]),
        ("_checks.py", "from perturbax import Gumbel", [(1, "__init__")]),
        ("_checks.py", "from perturbax.optimizers._argmax import a", [(1, "optimizers/_argmax")]),
        ("_checks.py", "def f():\n    from ._perturb import a", [(2, "_perturb")]),
        ("solvers/_grid.py", "from ._path import path", [(1, "solvers")]),
        ("solvers/_grid.py", "from ..noise._smooth import Gumbel", [(1, "noise/_smooth")]),
        ("solvers/_grid.py", "from ..noise import _smooth", [(1, "noise/_smooth")]),
    ],
)
def test_every_form_of_import_is_seen(file, text, expected):
    assert list(imported_layers(Path(file), text)) == expected
