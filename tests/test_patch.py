"""`patch_optax`, `unpatch_optax` and `python -m perturbax`: programs for optax run unmodified."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.perturbations
import pytest
import scipy.integrate

import perturbax as px
from perturbax.__main__ import main

NAMES = ("Gumbel", "NoiseDistribution", "Normal", "make_perturbed_fun")


@pytest.fixture
def module():
    """`optax.perturbations`, given back its own objects after the test."""
    px.unpatch_optax()
    yield optax.perturbations
    px.unpatch_optax()


def run(*arguments, **options):
    """Runs Python with these arguments, in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# The patch ----------------------------------------------------------------------------------------


def test_patched_module_serves_this_package(module):
    px.patch_optax()
    assert all(getattr(module, name) is getattr(px, name) for name in NAMES)


def test_unpatch_restores_the_very_same_objects(module):
    before = dict(vars(module))
    px.patch_optax()
    px.patch_optax()
    px.unpatch_optax()
    after = vars(module)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_unpatch_without_patch_changes_nothing(module):
    before = dict(vars(module))
    px.unpatch_optax()
    assert vars(module) == before


def test_patch_serves_again_after_unpatch(module):
    px.patch_optax()
    px.unpatch_optax()
    px.patch_optax()
    assert module.make_perturbed_fun is px.make_perturbed_fun


def test_name_imported_before_the_patch_stays_as_it_was(module):
    from optax.perturbations import Gumbel

    px.patch_optax()
    assert Gumbel is not px.Gumbel
    assert module.Gumbel is px.Gumbel


# scipy.stats once doubled the time that it took.
IMPORT = """
import sys
import perturbax
assert not {"optax", "scipy.stats"} & {*sys.modules}
"""

# The second patch took the module for patched still, and did nothing.
RELOAD = """
import importlib
import optax.perturbations as module
for patched in (False, True):
    perturbax.patch_optax()
    importlib.reload(module)
    own = module.make_perturbed_fun
    assert own is not perturbax.make_perturbed_fun
    if patched:
        perturbax.patch_optax()
        assert module.make_perturbed_fun is perturbax.make_perturbed_fun
        assert module.Normal is perturbax.Normal
    perturbax.unpatch_optax()
    assert module.make_perturbed_fun is own
"""

EVERY_FORM = """
for first in ("import optax", "import optax.perturbations", ""):
    # As in a new process, but for JAX, whose import takes longest.
    for name in list(sys.modules):
        if name.partition(".")[0] in ("optax", "perturbax"):
            del sys.modules[name]
    exec(first)
    import perturbax
    perturbax.patch_optax()
    import optax
    import optax.perturbations
    import optax.perturbations as alias
    from optax import perturbations
    from optax.perturbations import make_perturbed_fun, Gumbel, Normal
    for module in (optax.perturbations, alias, perturbations):
        assert module.make_perturbed_fun is perturbax.make_perturbed_fun, first
        assert module.Gumbel is perturbax.Gumbel, first
        assert module.Normal is perturbax.Normal, first
    assert make_perturbed_fun is perturbax.make_perturbed_fun, first
    assert Gumbel is perturbax.Gumbel, first
    assert Normal is perturbax.Normal, first
"""


def test_imports_reloads_and_every_form_of_import():
    """The package leaves others alone; the module may be reloaded, and imported in any form."""
    result = run("-c", IMPORT + RELOAD + EVERY_FORM)
    assert result.returncode == 0, result.stderr


def test_optax_without_the_module_is_given_one(monkeypatch):
    old_optax = types.ModuleType("optax")
    old_optax.__path__ = []
    monkeypatch.setitem(sys.modules, "optax", old_optax)
    monkeypatch.delitem(sys.modules, "optax.perturbations")

    px.patch_optax()
    from optax.perturbations import make_perturbed_fun

    assert make_perturbed_fun is px.make_perturbed_fun
    assert old_optax.perturbations.Normal is px.Normal

    px.unpatch_optax()
    assert "optax.perturbations" not in sys.modules
    assert not hasattr(old_optax, "perturbations")


def test_patch_without_optax_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install optax.*from perturbax import"):
        px.patch_optax()


# The runner ---------------------------------------------------------------------------------------

REPORT = """
import json, os, pickle, sys
import sibling

class Record:
    pass

same = type(pickle.loads(pickle.dumps(Record()))) is Record
print(json.dumps([
    sys.argv, sys.path[0], __name__, __file__, __package__, type(__loader__).__name__, same,
    __loader__.get_source("__main__") if __spec__ is None else __spec__.name,
    sys.modules["__main__"].Record is Record, sibling.__file__,
]))
"""


@pytest.mark.covering("program")
@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["plain", "safe path"])
@pytest.mark.parametrize("program", ["folder/report.py", "-m folder.report"])
def test_program_sees_what_python_itself_shows_it(tmp_path, program, flags):
    """The module is importable from the working folder, the script's sibling from its own."""
    environment = dict(os.environ)
    if flags or program.startswith("-m"):
        folders = [str(tmp_path), str(tmp_path / "folder"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "report.py").write_text(REPORT)
    (tmp_path / "folder" / "sibling.py").write_text("")
    program = [*program.split(), "--help", "-m", "a b"]
    options = {"cwd": tmp_path, "env": environment}
    plain = run(*flags, *program, **options)
    served = run(*flags, "-m", "perturbax", *program, **options)
    assert plain.returncode == 0, plain.stderr
    assert served.returncode == 0, served.stderr
    assert json.loads(served.stdout) == json.loads(plain.stdout)


# By then runpy has put the module away.
AT_EXIT = """
import atexit, pickle

class Record:
    pass

atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Record()))) is Record))
"""


@pytest.mark.parametrize("program", ["-m job", pytest.param("job", marks=pytest.mark.full)])
def test_a_module_keeps_its_place_to_the_end(tmp_path, program):
    """runpy put the former `__main__` and `sys.argv` back when the module's code had ended."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "__init__.py").write_text("")
    told = "import sys\natexit.register(lambda: print(sys.argv, sys.path[0], __spec__.name))\n"
    (tmp_path / "job" / "__main__.py").write_text(AT_EXIT + told)
    plain = run(*program.split(), "a", cwd=tmp_path)
    served = run("-m", "perturbax", *program.split(), "a", cwd=tmp_path)
    assert plain.stdout.splitlines()[-1] == "True"
    assert served.stdout == plain.stdout


@pytest.mark.parametrize(
    ("program", "returncode"),
    [
        (AT_EXIT + "import sys\nsys.exit(3)\n", 3),
        pytest.param("import sys\nsys.exit('said by the script')\n", 1, marks=pytest.mark.full),
        ("def fail():\n    raise ValueError('said by the script')\n\n\nfail()\n", 1),
        pytest.param("import json\njson.loads('{')\n", 1, marks=pytest.mark.full),
        ("print('begun'\n", 1),
        ("def wait():\n    raise KeyboardInterrupt\n\n\nwait()\n", -signal.SIGINT),
        ("import sys\nsys.excepthook = lambda *error: print(error[1])\n1 / 0\n", 1),
        pytest.param(AT_EXIT, 0, marks=pytest.mark.full),
        pytest.param("print('ends well')\n", 0, marks=pytest.mark.full),
    ],
    ids=[
        "status at exit",
        "message",
        "exception",
        "exception in a library",
        "syntax",
        "interrupt",
        "own hook",
        "at exit",
        "success",
    ],
)
def test_program_ends_as_under_python_itself(tmp_path, program, returncode):
    script = tmp_path / "script.py"
    script.write_text(program)
    plain, served = run(script), run("-m", "perturbax", script)
    assert plain.returncode == returncode
    assert served.returncode == returncode
    assert served.stdout == plain.stdout
    assert served.stderr == plain.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a script"),
        (["-m"], "-m needs the name of a module"),
        (["--fast", "script.py"], "unknown option '--fast'"),
        (["no_such_script.py"], "there is no file 'no_such_script.py'"),
    ],
)
def test_wrong_command_line_is_told_with_the_usage(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["perturbax", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "python -m perturbax SCRIPT [ARG ...]" in printed.err


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("-h", "python -m perturbax SCRIPT [ARG ...]"),
        ("--help", "python -m perturbax SCRIPT [ARG ...]"),
        ("-V", f"perturbax {px.__version__}"),
        ("--version", f"perturbax {px.__version__}"),
    ],
)
def test_help_and_version(monkeypatch, capsys, option, expected):
    monkeypatch.setattr(sys, "argv", ["perturbax", option])
    main()
    printed = capsys.readouterr()
    assert expected in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("missing", "first_line"),
    [
        ("optax", "python -m perturbax: perturbax can only serve optax.perturbations where optax"),
        ("absl", "Traceback (most recent call last):"),
    ],
)
def test_runner_where_optax_cannot_be_imported(tmp_path, missing, first_line):
    """Only a missing optax has the message; what optax itself misses is told by its own error."""
    (tmp_path / "optax.py").write_text(
        f"raise ModuleNotFoundError('No module named {missing!r}', name={missing!r})\n".replace(
            f"named '{missing}'", f"named {missing}"
        )
    )
    script = tmp_path / "script.py"
    script.write_text("print('begun')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    result = run("-m", "perturbax", script, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(first_line)


# The programs of the documentation of optax.perturbations -----------------------------------------

RELU = """
import jax
import jax.numpy as jnp
import optax

# Example: Making a non-differentiable ReLU function differentiable
def non_differentiable_fn(x):
    return jnp.sum(jnp.maximum(x, 0.0))  # ReLU activation

# Create perturbed version
key = jax.random.PRNGKey(42)
perturbed_fn = optax.perturbations.make_perturbed_fun(
    fun=non_differentiable_fn,
    num_samples=1000,
    sigma=0.1,
    noise=optax.perturbations.Gumbel()
)

# Now we can compute gradients
x = jnp.array([-1.0, 0.5, 2.0])
gradient = jax.grad(perturbed_fn, argnums=1)(key, x)
print(f"Gradient: {gradient}")
"""

NOISES = """
# Using Gumbel noise (default)
gumbel_fn = optax.perturbations.make_perturbed_fun(
    fun=non_differentiable_fn,
    noise=optax.perturbations.Gumbel()
)

# Using Normal noise
normal_fn = optax.perturbations.make_perturbed_fun(
    fun=non_differentiable_fn,
    noise=optax.perturbations.Normal()
)

# Compare gradients from different noise distributions
key1, key2 = jax.random.split(key)
grad_gumbel = jax.grad(gumbel_fn, argnums=1)(key1, x)
grad_normal = jax.grad(normal_fn, argnums=1)(key2, x)
"""

FINER = """
# Adjust perturbation scale and sample count
fine_tuned_fn = optax.perturbations.make_perturbed_fun(
    fun=non_differentiable_fn,
    num_samples=5000,  # More samples for better approximation
    sigma=0.05,  # Smaller perturbations for finer approximation
    use_baseline=True  # Use baseline for variance reduction
)
"""

CHOICE = """
def discrete_objective(weights):
    \"\"\"Example function with discrete operations.\"\"\"
    # Simulate some discrete decision-making process
    scores = weights @ jnp.array([1.0, 2.0, 3.0])
    best_choice = jnp.argmax(scores)  # Non-differentiable
    return -scores[best_choice]  # Negative because we want to maximize

# Make it differentiable
differentiable_objective = optax.perturbations.make_perturbed_fun(
    fun=discrete_objective,
    num_samples=2000,
    sigma=0.2
)

# Now we can use gradient-based optimization
def optimize_discrete_choice():
    weights = jnp.array([0.1, 0.1, 0.1])
    optimizer = optax.adam(0.01)
    opt_state = optimizer.init(weights)

    for step in range(100):
        key = jax.random.PRNGKey(step)
        loss_val, grads = jax.value_and_grad(differentiable_objective, argnums=1)(key, weights)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)

        if step % 20 == 0:
            print(f"Step {step}, Loss: {loss_val:.3f}")

    return weights

optimized_weights = optimize_discrete_choice()
"""

IMPORTS = "import jax\nimport jax.numpy as jnp\nimport optax\n"


def run_program(folder, program):
    """Runs the program by `python -m perturbax`."""
    script = folder / "program.py"
    script.write_text(program)
    return run("-m", "perturbax", script)


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def test_relu_programs_of_the_documentation(tmp_path):
    """Served by this package: not a digit differs from what its own functions give."""
    show = """
import json
def numbers(array):
    return [float(number) for number in array]
grad_fine = jax.grad(fine_tuned_fn, argnums=1)(key, x)
gradients = {"relu": gradient, "gumbel": grad_gumbel, "normal": grad_normal, "fine": grad_fine}
print(json.dumps({name: numbers(gradient) for name, gradient in gradients.items()}))
"""
    result = run_program(tmp_path, RELU + NOISES + FINER + show)
    assert result.returncode == 0, result.stderr
    printed, numbers = result.stdout.splitlines()
    assert re.fullmatch(r"Gradient: \[.*\]", printed)

    key, x = jax.random.PRNGKey(42), jnp.array([-1.0, 0.5, 2.0])
    gumbel_key, normal_key = jax.random.split(key)
    expected = {
        "relu": (key, px.make_perturbed_fun(relu_sum, 1000, 0.1, px.Gumbel())),
        "gumbel": (gumbel_key, px.make_perturbed_fun(relu_sum)),
        "normal": (normal_key, px.make_perturbed_fun(relu_sum, noise=px.Normal())),
        "fine": (key, px.make_perturbed_fun(relu_sum, 5000, 0.05)),
    }
    for name, gradient in json.loads(numbers).items():
        own_key, function = expected[name]
        np.testing.assert_array_equal(
            np.array(gradient, np.float32), jax.grad(function, argnums=1)(own_key, x), name
        )


def test_choice_program_ends_in_its_own_error_as_printed(tmp_path):
    """`weights @ [1, 2, 3]` is one number, which the program then indexes."""
    result = run_program(tmp_path, IMPORTS + CHOICE)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "    return -scores[best_choice]  # Negative" in result.stderr
    assert "IndexError: Too many indices" in result.stderr


def exact_choice(weights, sigma=0.2, slopes=(1.0, 2.0, 3.0)):
    """The mean and the standard deviation of max_i slopes_i * (weights_i + sigma * Gumbel).

    The maximum m has P(m <= t) = prod_i exp(-exp(-(t / slopes_i - weights_i) / sigma)).
    """
    points = np.linspace(-20.0, 40.0, 600_001)
    exponents = [(points / b - w) / sigma for w, b in zip(weights, slopes, strict=True)]
    with np.errstate(over="ignore"):
        below = np.exp(-np.sum(np.exp(-np.array(exponents)), axis=0))
    above_zero = np.where(points > 0, 1.0, 0.0)
    mean = scipy.integrate.trapezoid(above_zero - below, points)
    square = scipy.integrate.trapezoid(2 * points * (above_zero - below), points)
    return mean, np.sqrt(square - mean**2)


def test_choice_program_optimises_with_the_elementwise_product(tmp_path):
    program = CHOICE.replace("weights @ jnp.array", "weights * jnp.array")
    assert program != CHOICE
    program = IMPORTS + program + "print(*optimized_weights.tolist())\n"
    result = run_program(tmp_path, program)
    assert result.returncode == 0, result.stderr
    *steps, last = result.stdout.splitlines()
    losses = [float(loss) for loss in re.findall(r"Step \d+, Loss: (.*)", result.stdout)]
    assert [step.partition(",")[0] for step in steps] == [f"Step {n}" for n in range(0, 100, 20)]

    mean, deviation = exact_choice([0.1, 0.1, 0.1])
    assert abs(losses[0] + mean) < 5 * deviation / np.sqrt(2000) + 0.0005
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))

    optimised, _ = exact_choice([float(weight) for weight in last.split()])
    assert optimised > mean + 2.0
