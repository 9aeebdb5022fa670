"""px.diagnose: it finds what is wrong, finds nothing where nothing is, and keeps to its budget."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from perturbax.diagnostics import _diagnose, _findings, _variance_law
from perturbax.diagnostics._layer_subject import subject_of
from perturbax.diagnostics._subject import equal_rows

KEY = jax.random.key(5)
X = np.float32([-0.1, 0.05, 0.2])


def steps(x):
    return jnp.sum(jnp.where(x > 0, 1.0, 0.0))


def relu(x):
    return jnp.sum(jnp.maximum(x, 0.0))


@dataclasses.dataclass
class Row:
    """A function at a point, and the problems and notes that must be found there, in order."""

    fun: Callable[..., Any]
    x: Any
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sigma: Any = 0.3
    num_samples: int = 20
    args: tuple[Any, ...] = ()
    missing: str = "propagate"
    noise: Any = px.Normal()


def fails(x):
    return jnp.where(x[0] > 0.1, jnp.nan, relu(x))


def explodes(x):
    return jnp.sum(jnp.exp(100 * x) * jnp.exp(80 * x))


def far(x):
    return relu(x) + 1e6


def halves(x):
    return jnp.sum(jnp.where(x > jnp.asarray(0, x.dtype), 1.0, 0.0))


def punishes(x):
    return jnp.where(x[0] > 0.5, 1e6, jnp.sum(jnp.floor(4 * x) ** 2))


TABLE = {
    # Healthy: nothing may be found.
    "steps": Row(steps, X),
    "a tree": Row(lambda x: relu(x["w"]) + steps(x["b"]), {"w": X, "b": np.float32(0.1)}),
    "an argument": Row(lambda x, y: relu(x * y), X, args=(2.0,)),
    "a vector": Row(lambda x: jnp.argsort(jnp.argsort(x)).astype(float), X),
    "a masked score": Row(relu, np.float32([0.1, -np.inf, 0.2])),
    "a rare step": Row(steps, np.float32([-0.5, 0.4]), num_samples=512),
    "large values": Row(lambda x: 1e30 * steps(x), X),
    "whole values": Row(lambda x: jnp.sum(jnp.floor(3 * x).astype(int)), X),
    # Plateaus.
    "a plateau": Row(steps, X, ("sigma is too small: 100 % of the samples",), sigma=1e-3),
    "a constant": Row(lambda x: 3.0, X, ("sigma is too small: 100 % of the samples",)),
    # What fails.
    "NaN": Row(fails, X, (r"\d+ % of the samples are NaN.*finite penalty",)),
    "NaN that is left out": Row(fails, X, notes=(".*left out",), missing="drop"),
    "all of them NaN": Row(
        lambda x: jnp.nan * x[0],
        X,
        ("100 % of the samples are NaN.*nothing is left",),
        (".*left out",),
        missing="drop",
    ),
    "all but one of them NaN": Row(
        lambda x: jnp.where(x[0] > 0.6, x[1], jnp.nan),
        X,
        (r"9\d % of the samples are NaN.*left do not tell the error",),
        (".*left out",),
        missing="drop",
        num_samples=160,
    ),
    "overflow": Row(explodes, X + 1, (r"\d+ % of the samples are infinite.*float64",)),
    "an infinite sum": Row(
        lambda x: 3e38 * jnp.where(x[0] > -9, 0.9, x[0]) * jnp.sign(x[1] + 9) + 0 * steps(x),
        X,
        ("the estimate is not: their sum",),
    ),
    # Rounding.
    "sigma below the spacing": Row(
        relu, X + 1e4, ("sigma is lost in rounding.*float64",), sigma=1e-4
    ),
    "half precision": Row(
        halves, (X + 8).astype(jnp.bfloat16), ("sigma is lost in rounding.*bfloat16.*float32",)
    ),
    "digits of the value": Row(far, X, ("the values differ in their last digits",), sigma=0.1),
    # Rare events.
    "a rare penalty": Row(
        punishes,
        X - np.float32([0.1, 0, 0]),
        (r"\d samples? makes? 100 % of the variance of all 200 values.*penalty",),
        num_samples=200,
    ),
    "a penalty that is not rare": Row(punishes, X + np.float32([0.4, 0, 0]), num_samples=200),
    "noise without a variance": Row(
        lambda x: jnp.sum(x**2),
        X,
        ("of the variance of all 200 values.*no variance may be the cause",),
        num_samples=200,
        noise=px.Cauchy(),
    ),
    "a rare 0": Row(
        lambda x: jnp.where(x[0] > 0.6, 0.0, 1.0),
        np.float32([-0.1]),
        ("sigma is too small: 9. % of the samples",),
        num_samples=200,
    ),
    # No signal.
    "no slope": Row(
        lambda x: jnp.where(jnp.sin(1e4 * x[0]) > 0, 1.0, 0.0), X, ("cannot be told from zero",)
    ),
    # To know.
    "a harmless half": Row(
        halves, X.astype(np.float16), notes=(r"leaf 'x' is float16: fun sees inputs rounded",)
    ),
    "a whole leaf": Row(
        lambda x: relu(x["w"]) + jnp.sum(x["b"]),
        {"w": X, "b": np.array([1, 2])},
        notes=(r"leaf \"x\['b'\]\" is int32, so it is not perturbed.*convert",),
    ),
}


def smoothed(row):
    # So few that nothing is compared, and what is quickest to compile.
    options = {"sampler": px.Independent(), "degree": 0, "missing": row.missing}
    return px.make_perturbed_fun(row.fun, row.num_samples, row.sigma, row.noise, **options)


@pytest.mark.parametrize("name", TABLE)
def test_what_is_found(name):
    row = TABLE[name]
    found = px.diagnose(smoothed(row), KEY, row.x, *row.args)
    notes = [note for note in found.notes if "num_samples=" not in note and "sampler=" not in note]
    for texts, expected in ((found.problems, row.problems), (notes, row.notes)):
        assert len(texts) == len(expected), texts
        for text, pattern in zip(texts, expected, strict=True):
            assert re.search(pattern, text), text
    assert found.ok == bool(found) == (not row.problems)
    text = " ".join(str(found).split())
    assert all(problem in text for problem in found.problems)
    assert max(map(len, str(found).splitlines())) <= 100


def test_samples_that_are_suggested():
    """Of a linear function of D numbers, V = (D + 1) / N of the squared slope: known exactly."""
    dim = 30
    g = px.make_perturbed_fun(jnp.sum, 400, 0.3, px.Normal(), sampler=px.Independent(), degree=0)
    found = px.diagnose(g, KEY, jnp.zeros(dim), relative_error=0.05)
    exact = (dim + 1) / 0.05**2
    assert found.suggested_num_samples == pytest.approx(exact, rel=0.15)
    assert found.suggested_range[0] < exact < found.suggested_range[1]
    assert found.gradient_length == pytest.approx(np.sqrt(dim), abs=3 * found.gradient_length_error)
    assert found.gradient_length_error < 0.1 * np.sqrt(dim)
    assert found.signal_to_noise == pytest.approx(np.sqrt(400 / (dim + 1)), rel=0.1)
    assert any("num_samples=" in note for note in found.notes)
    text = str(found)
    assert "samples for 5 %" in text
    assert f"{found.suggested_num_samples:,}" in text


@pytest.mark.parametrize("slope", [1.0, 1e-3])
def test_an_alternative_that_surely_has_less_variance_is_named(slope):
    """Beside a number of samples for what is in use, 48,000, it was in a note of its own."""

    def fun(x):
        return slope * jnp.sum(x) + jnp.sum(x**2)

    g = px.make_straight_through_fun(fun, 200, 0.5, px.Normal(), sampler=px.Independent(), degree=0)
    found = px.diagnose(g, KEY, jnp.zeros(3), relative_error=0.01)
    best = min(found.alternatives, key=lambda one: one.ratio)
    assert best.high < 1e-3
    assert best.degree == 2
    advice = "pass sampler=px.Independent(block=1), degree=2 to make_straight_through_fun"
    [told] = [text for text in (*found.problems, *found.notes) if "samples" in text][:1]
    assert advice in told
    assert ("cannot be told from zero" in told) == (slope < 1)
    # Where fewer do already, it is a note of its own; where none is surely better, there is none.
    found = px.diagnose(g, KEY, jnp.zeros(3), relative_error=0.9)
    assert found.ok == (slope == 1)
    assert any(note.startswith(advice) for note in found.notes) == found.ok
    unsure = (px.Alternative("Antithetic()", 0, 0.5, 0.2, 1.01),)
    found = dataclasses.replace(found, alternatives=unsure)
    assert not _findings._better(subject_of(g, KEY, jnp.zeros(3), (), {}), found)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_runs_that_miss_a_rare_penalty_advise_nothing(seed):
    """A sampler was advised that had 5e-10 times the variance, and no problem was found.

    Of these pilots one misses the penalty itself.
    """
    g = px.make_perturbed_fun(punishes, 200, 0.3, px.Normal())
    found = px.diagnose(g, jax.random.key(seed), X - np.float32([0.1, 0, 0]))
    [problem] = found.problems
    assert "depend on chance" in problem
    met = found.values.max() == 1e6
    assert met == (seed != 1)
    assert ("of the variance of all 200" if met else "which missed a rare event") in problem
    assert not found.alternatives
    assert found.suggested_num_samples is None
    assert not any("sampler=" in note or "num_samples=" in note for note in found.notes)


def test_a_sampler_that_missed_a_penalty_is_not_compared(monkeypatch):
    """With Independent() the variance was to be 5e-10 times what it is."""
    monkeypatch.setattr(_diagnose, "_rare", lambda values: "")
    g = px.make_perturbed_fun(punishes, 200, 0.3, px.Normal())
    for less, missed in ((10, False), (math.inf, True)):
        monkeypatch.setattr(_diagnose, "_LESS", less)
        found = px.diagnose(g, jax.random.key(0), X - np.float32([0.1, 0, 0]))
        assert any(one.ratio < 1e-6 for one in found.alternatives) == missed


def test_what_is_no_rare_event():
    """Values of plain functions: no few samples make their variance."""
    noise = np.random.RandomState(0).normal(size=(20, 200, 3))
    plain = {
        "steps": lambda z: np.sum(z > [0, 1, -1], axis=1),
        "relu": lambda z: np.sum(np.maximum(z - 1, 0), axis=1),
        "quadratic": lambda z: 1e6 + np.sum(z**2, axis=1),
        "fourth powers": lambda z: np.sum(z**4, axis=1),
        "exponential": lambda z: np.exp(z[:, 0]),
        "0 or 1": lambda z: z[:, 0] > 1.6,
        "constant": lambda z: 0 * z[:, 0],
        "vector": lambda z: np.argsort(z, axis=1),
    }
    for name, fun in plain.items():
        values = [np.asarray(fun(z), float).reshape(200, -1) for z in noise]
        assert not any(map(_diagnose._rare, values)), name
    rare = np.float64(np.arange(200) < 2)[:, None]
    assert _diagnose._rare(rare)
    # Few samples do not tell; of very many the rare ones are enough.
    assert not _diagnose._rare(rare[:99])
    assert not _diagnose._rare(np.tile(rare, (30, 1)))


def test_a_signal_that_all_evaluations_could_not_show_is_not_seen():
    """Runs that were equal by chance told a gradient of 1 % of the error as seen."""
    law = _variance_law.Law(("Independent", 0), *_variance_law.FIXED)
    subject = subject_of(
        px.make_perturbed_fun(steps, 100, sampler=px.Independent()), KEY, X, (), {}
    )
    runs = [_variance_law.Runs(100, 1, np.ones(2), np.full(2, 50.0), 99, law)]
    assert _diagnose._noise_length(subject, runs) == pytest.approx(10, rel=0.02)
    assert _diagnose._least_seen(subject, runs) == pytest.approx(2 * 100 / 5, rel=0.03)


def test_it_keeps_to_its_evaluations():
    """A pilot (and one at x, for few samples of degree 0), then at most four times as many."""
    calls = []

    def count(x):
        calls.append(1)
        return np.float32(np.sum(x > 0))

    def fun(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(count, like, x, vmap_method="sequential")

    num_samples = 40
    g = px.make_perturbed_fun(
        fun, num_samples, 0.3, px.Normal(), sampler=px.Independent(), degree=0
    )
    found = px.diagnose(g, KEY, X)
    assert len(calls) <= found.num_evaluations <= num_samples + 1 + 4 * num_samples
    assert len(calls) > 3 * num_samples
    assert [one.sampler for one in found.alternatives] == ["Antithetic()"]
    assert found.alternatives[0].low < found.alternatives[0].ratio < found.alternatives[0].high


def test_a_jacobian_too_large_is_combined(monkeypatch):
    """The gradient of a sum with random signs has the Jacobian's length in the mean square."""
    monkeypatch.setattr("perturbax.diagnostics._subject.WHOLE", 8)
    g = px.make_perturbed_fun(
        lambda x: 2 * x, 23, 0.1, px.Normal(), sampler=px.Antithetic(), degree=1
    )
    found = px.diagnose(g, KEY, X)
    assert found.gradient_of == "the sum of 3 numbers with random signs"
    assert found.gradient_length == pytest.approx(2 * np.sqrt(3), rel=1e-4)
    assert np.shape(found.value) == ()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: steps, TypeError, "g must be what make_perturbed_fun, .* returned, got steps"),
        (
            lambda: jax.jit(px.make_perturbed_fun(steps)),
            TypeError,
            "got perturbed_steps, a function that wraps it",
        ),
        (
            lambda: px.make_perturbed_fun(steps, 15),
            ValueError,
            "num_samples=15, but .* at least 16",
        ),
        (
            lambda: px.make_perturbed_fun(lambda x: x[:0], 16),
            ValueError,
            "<lambda> returns no numbers",
        ),
        (
            lambda: px.make_perturbed_fun(steps, 16, noise=px.Uniform(), sampler=px.Independent()),
            NotImplementedError,
            r"Uniform\(\) is good for no derivative",
        ),
    ],
)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        px.diagnose(make(), KEY, X)


def test_numbers_that_are_not_known_are_refused():
    g = px.make_perturbed_fun(steps, 16)
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda x: px.diagnose(g, KEY, x).value)(X)
    with pytest.raises(ValueError, match=r"relative_error must be between 0 and 1, got 10; 0\.1 "):
        px.diagnose(g, KEY, X, relative_error=10)


# --- The law of the variance


def runs_at(numbers, variance, slope=1.0, freedom=20, law=("nets", 0)):
    return [
        _variance_law.Runs(
            n,
            1,
            np.ones(1),
            np.array([variance * n**-slope]),
            freedom,
            _variance_law.Law(law, *_variance_law.NETS),
        )
        for n in numbers
    ]


@pytest.mark.parametrize("slope", [1.0, 1.6, 2.5])
def test_the_slope_is_found_where_runs_tell_it(slope):
    runs = runs_at([16, 64, 256, 1024], 5.0, slope, freedom=1e6)
    log, uncertain = _variance_law.predict(runs, runs[0].law, np.array([64, 4096]))
    np.testing.assert_allclose(np.exp(log), 5.0 * np.array([64, 4096.0]) ** -slope, rtol=0.01)
    assert uncertain[0] < uncertain[1]


def test_what_usually_holds_where_runs_do_not():
    runs = runs_at([256], 5.0)
    log, uncertain = _variance_law.predict(runs, runs[0].law, np.array([256, 1024]))
    mean, deviation = _variance_law.NETS
    assert log[0] - log[1] == pytest.approx(mean * np.log(4))
    assert uncertain[1] - uncertain[0] == pytest.approx((deviation * np.log(4)) ** 2)


def test_the_least_number_of_samples_may_be_where_another_choice_begins():
    below = runs_at([16], 16.0, law=("Independent", 0))
    above = runs_at([64, 128], 1e-6, law=("nets", 1))
    law_at = lambda n: (below if n < 24 else above)[0].law  # noqa: E731
    number, _ = _variance_law.smallest(below + above, law_at, 2, 0.01)
    assert number == 24


def test_a_suggestion_is_cautious():
    """A variance of 1 / N that is known to a tenth, for a square that is known to a tenth."""
    law = _variance_law.Law(("Independent", 0), *_variance_law.FIXED)
    runs = [_variance_law.Runs(100, 8, np.zeros(1), np.array([0.01]), 200, law)]
    asked = [_variance_law.smallest(runs, lambda _: law, 2, 1e-4, *c)[0] for c in ((), (1, 0.1))]
    np.testing.assert_allclose(asked, [1e4, 1e4 * np.exp(np.hypot(0.1, 0.1))], rtol=0.02)


def test_sigma_is_not_checked_for_each_number_of_samples(monkeypatch):
    """Of a million coordinates that took seconds, for thousands of numbers."""
    subject = subject_of(px.make_perturbed_fun(steps, 64, np.ones(3)), KEY, X, (), {})
    monkeypatch.delattr("perturbax.scale._scales.check_sigma")
    assert subject.law(64).name == ("nets", 1)
    assert subject.choose(64) == px.choose_sampler(64, 3)
    assert subject.choose(64, degree=1) == px.choose_sampler(64, 3, degree=1)


def test_nets_that_are_suggested_are_whole():
    x = jnp.asarray(np.random.RandomState(0).normal(0, 0.3, 3), jnp.float32)
    subject = subject_of(px.make_perturbed_fun(jnp.sum, 1000, 0.5, px.Normal()), KEY, x, (), {})
    whole = [_diagnose._whole(subject, n) for n in (70, 71, 96, 106, 141, 4097)]
    assert whole == [64, 96, 96, 128, 192, 4096]
    alone = px.make_perturbed_fun(jnp.sum, 1000, 0.5, px.Normal(), sampler=px.Independent())
    subject = subject_of(alone, KEY, x, (), {})
    assert [_diagnose._whole(subject, n) for n in (65, 129, 4097)] == [65, 130, 4100]


def test_runs_are_not_of_a_single_group():
    """So precise that about six samples are enough: of three coordinates one block, that is."""
    x = jnp.asarray(np.random.RandomState(0).normal(0, 0.1, 3), jnp.float32)
    g = px.make_perturbed_fun(lambda y: jnp.sum(jnp.maximum(y, 0)), 1000, 0.1, px.Gumbel())
    assert px.choose_sampler(6, 3).num_groups == 1
    found = px.diagnose(g, jax.random.split(jax.random.key(1), 20)[7], x)
    assert 6 < found.suggested_num_samples < 100


@pytest.mark.parametrize(("number", "expected"), [(7, 7), (24, 24), (101, 110), (3141, 3200)])
def test_numbers_are_rounded_up_to_two_digits(number, expected):
    assert _variance_law.round_number(number) == expected


# --- Layers and losses

SCORES = np.float32([0.5, 0.0625, -0.3125])
Y_TRUE = np.float32([0.0, 1.0, 0.0])


def choice(scores):
    return jax.nn.one_hot(jnp.argmax(scores), 3)


def least(costs):
    return jax.nn.one_hot(jnp.argmin(costs), 3)


@pytest.mark.parametrize(
    ("make", "args", "at_x", "length"),
    [
        # With Gumbel noise the mean solution is a softmax, of the opposite of costs.
        (lambda **k: px.make_perturbed_argmax(choice, sigma=0.5, **k), (), [1, 0, 0], "jacobian"),
        (
            lambda **k: px.make_perturbed_max(least, sigma=0.5, maximize=False, **k),
            (),
            -0.3125,
            "least",
        ),
        (
            lambda **k: px.make_fenchel_young_loss(choice, sigma=0.5, **k),
            (Y_TRUE,),
            0.5 - 0.0625,
            "loss",
        ),
        (
            lambda **k: px.make_perturbed_max(
                choice, sigma=0.5, objective=lambda theta, y: 2 * theta @ y, **k
            ),
            (),
            1.0,
            "twice",
        ),
    ],
    ids=["argmax", "minimum", "loss", "objective"],
)
def test_layers(make, args, at_x, length):
    softmax = np.array(jax.nn.softmax(SCORES / 0.5))
    exact = {
        "jacobian": np.linalg.norm((np.diag(softmax) - np.outer(softmax, softmax)) / 0.5),
        "least": np.linalg.norm(jax.nn.softmax(-SCORES / 0.5)),
        "loss": np.linalg.norm(softmax - Y_TRUE),
        "twice": 2 * np.linalg.norm(softmax),
    }[length]
    g = make(num_samples=128, sampler=px.Independent(), degree=0)
    found = px.diagnose(g, KEY, SCORES, *args)
    np.testing.assert_allclose(found.value_at_x, at_x, rtol=1e-6)
    assert abs(found.gradient_length - exact) < 4 * found.gradient_length_error
    assert found.gradient_length_error < 0.2 * exact
    assert 0.3 < found.share_equal < 0.8
    assert found.suggested_num_samples is not None
    assert not found.problems


def grid(scores):
    return px.solvers.grid_shortest_path(scores.reshape(3, 3), neighbors=4).reshape(-1)


def tree(scores):
    edges = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (3, 4), (2, 4), (0, 4)]
    return px.solvers.minimum_spanning_tree(scores, np.array(edges))


SOLVERS = {
    # A solver, and whether it maximises.
    "one of many": (px.solvers.one_hot_argmax, True),
    "the largest": (lambda s: px.solvers.top_k_mask(s, 3), True),
    "ranks": (px.solvers.ranks, True),
    "falling ranks": (lambda s: px.solvers.ranks(s, descending=True), False),
    "a knapsack": (lambda s: px.solvers.knapsack(s, np.arange(1, 10), 20), True),
    "a matching": (lambda s: px.solvers.assignment(s.reshape(3, 3)).reshape(-1), True),
    "a path": (grid, False),
    "a tree": (tree, False),
}
NINE = np.float32([2.5, 3.1, 2.2, 2.7, 3.3, 2.9, 2.4, 3.0, 2.6])


@pytest.mark.parametrize(
    ("name", "maximize"),
    [
        *((name, maximizes) for name, (_, maximizes) in SOLVERS.items()),
        ("a path", True),
        ("the largest", False),
        *(
            pytest.param(name, not maximizes, marks=pytest.mark.full)
            for name, (_, maximizes) in SOLVERS.items()
            if name not in ("a path", "the largest")
        ),
    ],
)
def test_the_sign_of_a_solver(name, maximize):
    """A loss of shortest paths without maximize=False was fine."""
    solver, maximizes = SOLVERS[name]
    options = {"maximize": maximize, "sampler": px.Independent(), "degree": 0}
    found = px.diagnose(px.make_perturbed_argmax(solver, 20, 0.3, **options), KEY, NINE)
    told = [text for text in (*found.problems, *found.notes) if "solver" in text]
    if maximizes == maximize:
        assert not told
    else:
        assert told == list(found.problems[:1])
        does, remedy = ("minimise", "pass max") if maximize else ("maximise", "leave out max")
        assert re.search(f"seems to {does} .*in 100 % of the pairs.*{remedy}imize=False", told[0])


@pytest.mark.parametrize("make", [px.make_perturbed_max, px.make_fenchel_young_loss])
def test_the_sign_of_a_solver_in_a_loss(make):
    args = (least(NINE[:3]),) if make is px.make_fenchel_young_loss else ()
    for options, wrong in (
        ({}, True),
        ({"multiplicative": True, "noise": px.Normal()}, True),
        ({"multiplicative": True, "noise": px.Normal(), "maximize": False}, False),
        # What is optimised is not known to be linear.
        ({"objective": lambda theta, y: -theta @ y}, False),
    ):
        g = make(least, 20, 0.3, sampler=px.Independent(), degree=0, **options)
        problems = px.diagnose(g, KEY, NINE[:3], *args).problems
        assert any("seems to minimise" in problem for problem in problems) == wrong


def test_a_mean_solution_with_symmetric_noise_has_no_sign():
    g = px.make_perturbed_argmax(least, 20, 0.3, px.Normal(), sampler=px.Independent(), degree=0)
    found = px.diagnose(g, KEY, NINE[:3])
    assert not any("solver" in problem for problem in found.problems)
    assert "it makes no difference" in found.notes[0]


def test_a_solver_that_is_not_exact():
    """It looks at the first five scores alone in three cases of four, say."""

    def careless(scores):
        seen = jnp.where((jnp.arange(9) < 5) | (scores[8] > 3), scores, -jnp.inf)
        return jax.nn.one_hot(jnp.argmax(seen), 9)

    for symmetrize in (True, False):
        g = px.make_perturbed_argmax(
            careless, 64, 0.3, symmetrize=symmetrize, sampler=px.Independent(), degree=0
        )
        found = px.diagnose(g, KEY, NINE)
        assert any("not exact" in note for note in found.notes) == symmetrize
        assert not any("solver" in problem for problem in found.problems)


def test_evaluations_of_a_layer():
    calls = []

    def solve(scores):
        calls.append(1)
        return np.eye(3, dtype=np.float32)[np.argmax(scores)]

    def solver(scores):
        like = jax.ShapeDtypeStruct((3,), jnp.float32)
        return jax.pure_callback(solve, like, scores, vmap_method="sequential")

    layer = px.make_perturbed_argmax(solver, 64, 0.5, sampler=px.Independent(), degree=0)
    found = px.diagnose(layer, KEY, SCORES)
    assert 3 * 64 < len(calls) <= found.num_evaluations <= 65 + 4 * 64


@pytest.mark.parametrize("num_samples", [64, pytest.param(100, marks=pytest.mark.full)])
def test_runs_of_a_layer_are_several(num_samples):
    """One run of a layer tells no spread: at these numbers it was once divided by zero of them."""
    layer = px.make_perturbed_max(px.solvers.one_hot_argmax, num_samples, sigma=1.0, degree=0)
    found = px.diagnose(layer, jax.random.key(0), np.float32([0.1, 0.5, -0.3]))
    assert found.gradient_length_error > 0


def test_runs_that_are_equal_by_chance_tell_no_certainty():
    """With this key they were: 3 samples were to give an error of 10 %, which is one of 60 %."""
    layer = px.make_perturbed_max(choice, num_samples=64, sigma=0.5)
    found = px.diagnose(layer, jax.random.key(0), np.float32([0.1, 0.5, -0.3]))
    assert found.gradient_length_error > 0
    assert found.suggested_num_samples > 20


def test_arguments_of_layers_by_name():
    options = {"num_samples": 32, "sigma": 0.5, "sampler": px.Independent(), "degree": 0}
    loss = px.make_fenchel_young_loss(choice, **options)
    found = px.diagnose(loss, KEY, SCORES, y_true=Y_TRUE)
    np.testing.assert_allclose(found.value_at_x, 0.5 - 0.0625, rtol=1e-6)
    # An argument of the solver, of a layer that is no loss.
    layer = px.make_perturbed_argmax(lambda scores, y_true: choice(scores - y_true), **options)
    assert px.diagnose(layer, KEY, SCORES, Y_TRUE).value_at_x.tolist() == [1, 0, 0]
    with pytest.raises(TypeError, match=r"y_true is missing: .* called as g\(key, theta, y_true"):
        px.diagnose(loss, KEY, SCORES)


def test_a_finite_value_is_not_near_an_infinite_one():
    values = np.array([[np.inf], [1.0], [np.nan], [-np.inf]])
    assert equal_rows(values, [np.float32(np.inf)]).tolist() == [True, False, False, False]


def test_a_multiplicative_layer_is_sampled_as_it_perturbs():
    layer = px.make_perturbed_argmax(
        choice, 20, 0.5, px.Normal(), multiplicative=True, sampler=px.Independent(), degree=0
    )
    assert px.diagnose(layer, KEY, np.float32([0.3, -0.1, -0.2])).share_equal == 1
    assert px.diagnose(layer, KEY, np.float32([1.0, 0.9, 0.8])).share_equal < 0.7


def test_a_straight_through_function_is_diagnosed_by_its_derivatives():
    options = {"sampler": px.Independent(), "degree": 0}
    through = px.make_straight_through_fun(steps, 20, 0.3, px.Normal(), **options)
    smooth = px.make_perturbed_fun(steps, 20, 0.3, px.Normal(), **options)
    found, expected = (px.diagnose(g, KEY, X) for g in (through, smooth))
    assert found.gradient_length == expected.gradient_length
    assert found.value == expected.value


def test_a_rough_suggestion_says_so():
    """Of a gradient that is seen, but hardly; the noise of its values is one that has no slope."""
    for noisy in (False, True):
        g = px.make_perturbed_fun(
            lambda x, noisy=noisy: jnp.sum(x) + 1.5 * noisy * jnp.sin(1e4 * jnp.sum(x)),
            40,
            0.3,
            px.Normal(),
            sampler=px.Independent(),
            degree=0,
        )
        found = px.diagnose(g, jax.random.key(2), jnp.zeros(4))
        assert found.settled != noisy
        assert any("is a rough one" in note for note in found.notes) == noisy


def test_runs_with_too_few_samples_left_tell_nothing():
    """Where nine of ten samples are missing, many a run has one left or none; errors were 0."""
    law = _variance_law.Law(("Independent", 0), *_variance_law.FIXED)
    gradients, errors = np.array([[1.0], [3.0], [2.0]]), np.array([[0.5], [np.nan], [0.25]])
    runs = _variance_law.pooled(8, gradients, errors, np.array([3, 0, 1]), law)
    assert runs.variance == pytest.approx((2 + 3 * 0.5 + 0.25) / (2 + 3 + 1))
    for kept in (1, 0):
        few = _variance_law.pooled(8, gradients[:kept], errors[1 : 1 + kept], np.zeros(kept), law)
        assert np.isnan([few.variance, few.freedom]).all()

    g = px.make_perturbed_fun(
        lambda x: jnp.where(x[0] < 0.3, jnp.nan, steps(x)), 64, 0.3, px.Normal(), missing="drop"
    )
    found = px.diagnose(g, KEY, X)
    assert 0.85 < found.share_nan < 1
    assert found.gradient_length_error > 0
    assert "missed a rare event" not in str(found)
