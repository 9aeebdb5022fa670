"""px.sweep_sigma and the pictures: numbers against closed forms, what is suggested, and drawn."""

import re
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

import closed_forms
import perturbax as px
from helpers import enable_x64
from perturbax.diagnostics import _plots
from perturbax.diagnostics._sweep import _suggest, _why_not
from test_trace import compilations

mpl.use("Agg")
import matplotlib.pyplot as plt

KEY = jax.random.key(7)
X = np.float32([0.2, -0.4, 0.1])
SIGMAS = np.array([1e-4, 0.1, 0.3, 1.0])
# What is quickest to compile.
OPTIONS = {"sampler": px.Independent(), "degree": 0}


def steps(x):
    return jnp.sum(jnp.where(x > 0, 1.0, 0.0))


@pytest.fixture(scope="module")
def sweep():
    traces = []

    def fun(x):
        traces.append(1)
        return steps(x)

    found = px.sweep_sigma(
        fun, KEY, X, SIGMAS[::-1], num_samples=2000, noise=px.Normal(), **OPTIONS
    )
    return found, len(traces)


def exact_at(sigma, x=X):
    return closed_forms.smooth_separable(
        closed_forms.step, np.ones(3), x, sigma, closed_forms.normal
    )


def test_numbers_of_a_sweep(sweep):
    found, num_traces = sweep
    assert num_traces <= 3  # of all sigmas together: fun(x) itself, and shapes
    np.testing.assert_array_equal(found.sigmas, SIGMAS)
    assert found.hard_value == 2.0
    exact = [exact_at(sigma) for sigma in SIGMAS]
    for i, one in enumerate(exact):
        assert abs(found.values[i] - one.value) <= 4 * found.value_errors[i] + 1e-6
        length = np.linalg.norm(one.gradient)
        assert abs(found.lengths[i] - length) <= 4 * found.length_errors[i] + 1e-6
    for i in (1, 2):
        one, two = exact[i].gradient, exact[i + 1].gradient
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        assert abs(found.cosines[i] - cosine) <= 4 * found.cosine_errors[i]
        assert found.cosine_errors[i] < 0.2
    assert found.share_equal[0] == 1
    assert not found.share_failed.any()


def test_what_a_sweep_suggests(sweep):
    found, _ = sweep
    assert found.suggested_range == (0.1, 1.0)
    assert "Below, 100 % of the samples have the value at x. Larger ones were not" in found.reason
    text = str(found)
    assert " ".join(text.split()).endswith(found.reason)
    assert len(text.splitlines()) == len(SIGMAS) + 4
    assert max(map(len, text.splitlines())) <= 100


def test_a_gradient_that_turns_ends_the_range():
    """Stairs that go down, in a step that goes up."""

    def fun(x):
        return jnp.where(jnp.abs(x) < 0.5, -jnp.floor(100 * x), 200 * jnp.sign(x))

    sigmas = [0.02, 0.05, 0.1, 1.0, 2.0]
    found = px.sweep_sigma(
        fun, KEY, jnp.float32(0.1), sigmas, num_samples=500, noise=px.Normal(), **OPTIONS
    )
    low, high = found.suggested_range
    assert (low, high) == (0.02, 0.1)
    assert "Above, the gradient turns" in found.reason


@pytest.mark.parametrize(
    ("fun", "text"),
    [
        (lambda x: jnp.where(x[0] > 0.3, jnp.nan, steps(x)), "NaN or infinite"),
        (lambda x: 0 * steps(x), "100 % of the samples have the value at x"),
    ],
)
def test_nothing_to_suggest(fun, text):
    found = px.sweep_sigma(fun, KEY, X, [0.5, 1.0], num_samples=50, **OPTIONS)
    assert found.suggested_range is None
    assert text in found.reason


def test_a_single_sigma_is_told_as_one():
    none = np.full(2, np.nan)
    why = ["the gradient cannot be told from zero with these samples", "", "2 % are infinite"]
    ends, reason = _suggest(np.array([0.1, 0.2, 0.5]), why, none, none)
    assert ends == (0.2, 0.2)
    assert reason == (
        "Worth using, of these: sigma 0.2 alone. Below, the gradient cannot be told from zero with "
        "these samples. Above, 2 % are infinite."
    )
    assert _why_not(False, 0.4, 0.0, 0.0, 0.0, 0.1, 100.0) == why[0]


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (np.float32([3.0, -4.0]), 0.005, 10.0),
        (np.zeros(2, np.float32), 1e-3, 2.0),
        (np.float16([100.0]), 1.0, 200.0),
        (np.float32([1.0, -np.inf]), 1e-3, 2.0),
    ],
)
def test_scales_that_are_tried_by_themselves(x, low, high):
    found = px.sweep_sigma(lambda x: jnp.sum(x > 0), KEY, x, num_samples=8, **OPTIONS)
    assert found.sigmas[0] == pytest.approx(low)
    assert found.sigmas[-1] == pytest.approx(high)
    assert all(f"{sigma:.0e}"[0] in "125" for sigma in found.sigmas)


@pytest.mark.parametrize(
    ("sigmas", "error", "text"),
    [
        ([0.1], ValueError, r"at least two numbers in a row, got shape \(1,\)"),
        ([0.1, 0.0], ValueError, r"positive and finite, got \[0.0, 0.1\]"),
        ("ab", TypeError, "must be None or an array of numbers, got str"),
    ],
)
def test_sigmas_that_are_refused(sigmas, error, text):
    with pytest.raises(error, match=text):
        px.sweep_sigma(steps, KEY, X, sigmas)


def test_values_beyond_single_precision_are_finite():
    """They were looked at in single precision, where they are infinite, so that no sigma was."""
    with enable_x64(True):
        options = {"num_samples": 64, "noise": px.Normal()}
        found = px.sweep_sigma(
            lambda x: 1e39 * (1 + jnp.sum(x**2)), KEY, np.ones(2), [0.1, 0.5], **options
        )
    assert not found.share_failed.any()
    assert found.hard_value == 3e39
    assert found.suggested_range == (0.1, 0.5)


@pytest.mark.parametrize("value", [1.5, 2, True])
def test_a_python_number_as_value(value):
    """JAX warned that it has no such dtype in single precision."""
    found = px.sweep_sigma(lambda x: value, KEY, X, [0.1, 0.5], num_samples=16)
    assert found.hard_value == value
    assert (found.share_equal == 1).all()


def test_what_a_sweep_needs():
    with pytest.raises(ValueError, match=r"fun must return one real number, got float32\[3\]"):
        px.sweep_sigma(lambda x: x, KEY, X)
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda x: px.sweep_sigma(steps, KEY, x).values)(X)
    with pytest.raises(
        TypeError, match=r"got float32\[3\]; did you swap .* sweep_sigma\(fun, key, x"
    ):
        px.sweep_sigma(steps, X, KEY)
    with pytest.raises(ValueError, match="x has no coordinates"):
        px.sweep_sigma(lambda x: jnp.zeros(()), KEY, {})


def fails_on_one_side(x):
    """Whether it fails has nothing to do with what it returns."""
    return jnp.where(x[2] > 0.1, jnp.nan, steps(x[:2]))


def test_samples_that_are_missing_may_be_left_out():
    found = {}
    for missing in ("propagate", "drop"):
        found[missing] = px.sweep_sigma(
            fails_on_one_side, KEY, X, [0.3, 1.0], noise=px.Normal(), missing=missing, **OPTIONS
        )
        np.testing.assert_allclose(found[missing].share_failed, 0.5, atol=0.1)
    assert found["propagate"].suggested_range is None
    assert "% of the samples are NaN" in found["propagate"].reason
    assert found["drop"].suggested_range == (0.3, 1.0)
    exact = [
        closed_forms.smooth_separable(
            closed_forms.step, np.ones(2), X[:2], sigma, closed_forms.normal
        )
        for sigma in (0.3, 1.0)
    ]
    errors = np.abs(found["drop"].values - [one.value for one in exact])
    assert np.all(errors <= 4 * found["drop"].value_errors)


def test_where_no_sample_is_left_there_is_nothing_to_suggest():
    def fun(x):
        return jnp.where(x[0] == X[0], 0.0, jnp.nan)

    found = px.sweep_sigma(fun, KEY, X, [0.3, 1.0], missing="drop", num_samples=8, **OPTIONS)
    assert found.suggested_range is None
    assert "100 % of the samples are NaN" in found.reason


def test_where_the_samples_left_tell_no_error_a_sigma_is_not_suggested():
    """Of one sample the error was 0."""

    def fun(x):
        return jnp.where(x[0] > X[0] + 1.7, x[1], jnp.nan)

    options = {"missing": "drop", "num_samples": 80, **OPTIONS}
    found = px.sweep_sigma(fun, KEY, X, [0.5, 0.6], **options)
    assert found.suggested_range is None
    assert np.isfinite(found.values).all()
    np.testing.assert_array_equal(np.isnan(found.value_errors), [True, False])
    assert found.relative_errors[0] == np.inf
    assert "98 % of the samples are NaN, and those left" in _why_not(
        False, np.inf, 0.0, 0.0, 0.98, np.nan, 100.0
    )


def test_infinite_samples_beside_missing_ones_are_told_as_such():
    def cliff(x):
        return jnp.where(x[0] > X[0] + 0.4, jnp.inf, jnp.where(x[1] > X[1], jnp.nan, jnp.sum(x)))

    found = px.sweep_sigma(cliff, KEY, X, [1.0, 2.0], noise=px.Normal(), missing="drop", **OPTIONS)
    assert "% of the samples left are infinite" in found.reason


def test_further_arguments():
    def fun(x, weights, level):
        return weights @ jnp.maximum(x, level)

    args, options = (np.float32([1, 2, 3]), 0.1), {"num_samples": 64, **OPTIONS}
    found = px.sweep_sigma(fun, KEY, X, [0.2, 0.5], args=args, **options)
    closed = px.sweep_sigma(lambda x: fun(x, *args), KEY, X, [0.2, 0.5], **options)
    np.testing.assert_array_equal(found.values, closed.values)
    np.testing.assert_array_equal(found.lengths, closed.lengths)
    assert found.hard_value == closed.hard_value
    with pytest.raises(TypeError, match="missing 2 required") as caught:
        px.sweep_sigma(fun, KEY, X)
    assert "pass them: sweep_sigma(fun, key, x, args=(...,))" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match=r"args must be a tuple, such as \(data,\), got float"):
        px.sweep_sigma(fun, KEY, X, args=0.1)


@pytest.mark.parametrize(
    ("g", "what"),
    [
        (px.make_perturbed_fun(steps), "pass g.fun, got perturbed_steps"),
        (px.make_perturbed_max(px.solvers.one_hot_argmax), "pass what it was made of, got pertur"),
    ],
)
def test_a_function_that_is_smoothed_already(g, what):
    """It failed for want of a key, in words about further arguments."""
    with pytest.raises(TypeError, match=f"sweep_sigma takes the function itself, .*: {what}"):
        px.sweep_sigma(g, KEY, X)


def test_a_plateau_wider_than_all_scales():
    """That no sigma is worth using was all that was said."""
    fun = lambda x: jnp.sum(jnp.where(x > 1e3, 1.0, 0.0))  # noqa: E731
    options = {"num_samples": 16, "noise": px.Normal(), **OPTIONS}
    found = px.sweep_sigma(fun, KEY, X, **options)
    assert found.suggested_range is None
    told = r"tried: pass sigmas=np.geomspace\((.*), (.*), (\d+)\), for example"
    sigmas = np.geomspace(*map(float, re.search(told, found.reason).groups()[:2]), 9)
    assert sigmas[0] == pytest.approx(found.sigmas[-1])
    assert sigmas[-1] > 1e3
    # Who chose the scales knows that there are others.
    assert "np.geomspace" not in px.sweep_sigma(fun, KEY, X, [0.1, 0.2], **options).reason


def test_a_finite_value_does_not_equal_an_infinite_one():
    """Of the samples of a wide scale about two thirds have the value at x, and not all."""
    fun = lambda x: jnp.where(x[0] > 0, jnp.inf, 1.0)  # noqa: E731
    found = px.sweep_sigma(fun, jax.random.key(0), np.ones(1, np.float32), [0.01, 2.0])
    assert found.share_equal[0] == 1
    assert 0.5 < found.share_equal[1] < 0.9


def test_a_sweep_of_truth_values():
    """It failed in a difference of them."""

    def either(dtype):
        def fun(x):
            return (x[0] > 0).astype(dtype)

        return px.sweep_sigma(fun, KEY, X, [0.2, 0.5], num_samples=64)

    truth, number = either(bool), either(jnp.float32)
    np.testing.assert_array_equal(truth.share_equal, number.share_equal)
    np.testing.assert_allclose(truth.values, number.values)
    assert truth.share_equal[1] < 1


# --- Pictures


def test_what_was_made_anew_is_not_compiled_anew(everything):
    """A second diagnosis, sweep or picture took as long as the first."""

    def run(shift):
        # So little that as many samples are suggested, for which programs are compiled.
        level, sigma = np.float32([shift, 0]), 0.5 + shift

        def fun(x):
            return steps(x - level) + jnp.sum(level * x)

        g = px.make_perturbed_fun(fun, 64, sigma, px.Normal())
        layer = px.make_perturbed_argmax(px.solvers.one_hot_argmax, 64, sigma)
        told = [px.diagnose(made, KEY, X[:2]).gradient_length for made in (g, layer)]
        told.append(px.sweep_sigma(fun, KEY, X[:2], num_samples=64).lengths[-1])
        ax = plt.figure().subplots()
        px.plot_smoothing(g, KEY, X[:2], np.float32([1, shift]), num_points=3, ax=ax)
        told.append(line(ax, "smoothed")[1][0])
        plt.close("all")
        return np.array(told)

    first, second = run(0.0), []
    assert compilations(lambda: second.append(run(1e-4)) or second) == 0
    assert (first != second[0]).all()
    if everything:
        jax.clear_caches()
        np.testing.assert_array_equal(run(1e-4), second[0])


def test_without_jit_and_where_nan_is_an_error():
    """Programs compiled ahead of time refuse the former, and raise what nobody can catch."""
    options = {"sigmas": [0.3, 1.0], "num_samples": 8, "sampler": px.Independent(), "degree": 0}
    with jax.disable_jit():
        told = px.sweep_sigma(steps, KEY, X, **options)
    np.testing.assert_allclose(told.values, px.sweep_sigma(steps, KEY, X, **options).values)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        px.sweep_sigma(lambda x: jnp.where(x[0] > 0.3, jnp.nan, 0.0), KEY, X, **options)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def line(ax, label):
    return next(one for one in ax.get_lines() if one.get_label().startswith(label)).get_data()


def test_picture_of_a_sweep(sweep, ax):
    found, _ = sweep
    assert found.plot(ax=ax) is ax
    np.testing.assert_array_equal(line(ax, "smoothed value"), (found.sigmas, found.values))
    twin = next(one for one in ax.figure.axes if one is not ax)
    np.testing.assert_array_equal(line(twin, "length"), (found.sigmas, found.lengths))


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_legend_hides_no_line(scale, ax):
    ax.plot([1, 2, 9], [50, 3, 50], label="one")
    twin = ax.twinx()
    twin.plot([1, 4, 9], [7, 700, 7])
    for one in (ax, twin):
        one.set_yscale(scale)
    _plots.legend_above(ax, twin, [*ax.get_lines(), *ax.get_lines()], "left")
    ax.figure.canvas.draw()
    lowest = ax.get_legend().get_window_extent().y0
    for one in (ax, twin):
        _, y = one.transData.transform(one.get_lines()[0].get_xydata()).T
        assert np.all(y < lowest)
        assert np.max(y) > lowest - 0.1 * ax.bbox.height


def test_picture_along_a_line(ax):
    x = {"w": X, "n": 2}
    direction = {"w": jnp.array([0.0, 1.0, 0.0]), "n": 0}

    def fun(x, factor):
        return factor * steps(x["w"])

    g = px.make_perturbed_fun(fun, 2000, 0.25, px.Normal(), **OPTIONS)
    assert px.plot_smoothing(g, KEY, x, direction, 2.0, num_points=5, ax=ax) is ax
    t, values = line(ax, "smoothed")
    np.testing.assert_allclose(t, np.linspace(-1, 1, 5))
    moved = [X + np.float32([0, s, 0]) for s in t]
    exact = [2 * exact_at(0.25, y).value for y in moved]
    np.testing.assert_allclose(values, exact, atol=0.1)
    fine, hard = line(ax, "function")
    np.testing.assert_array_equal(hard, np.where(fine > 0.41, 6.0, 4.0))
    (left, right), (low, high) = line(ax, "tangent")
    slope = 2 * exact_at(0.25).gradient[1]
    assert (high - low) / (right - left) == pytest.approx(slope, abs=0.3)


def test_picture_of_a_host_function_that_was_not_called_before(ax):
    """The picture is drawn under jit, where a host function cannot find out what it returns."""
    g = px.make_perturbed_fun(px.host_function(lambda y: np.round(y).sum()), 8, 0.3, **OPTIONS)
    px.plot_smoothing(g, KEY, X, np.ones(3), num_points=3, ax=ax)


def test_keys_that_are_used_again_on_purpose(ax):
    """With JAX's check for it noise was "not valid", and no line was drawn."""
    with jax.debug_key_reuse(True):
        assert px.check_noise(px.Normal(), key=jax.random.key(1), num_samples=1000)
        g = px.make_perturbed_fun(steps, 20, 0.3, **OPTIONS)
        px.plot_smoothing(g, jax.random.key(2), X, np.ones(3), num_points=3, ax=ax)


def test_picture_of_a_diagnosis(ax):
    g = px.make_perturbed_fun(steps, 23, 0.5, px.Normal(), **OPTIONS)
    found = px.diagnose(g, KEY, X)
    assert found.plot(ax=ax) is ax
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert line(ax, "as it is")[0] == [23]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"direction": np.zeros(3)}, "direction must not be zero"),
        ({"direction": np.ones(2)}, r"that of 'x' is \(3,\), and that of its direction \(2,\)"),
        ({"direction": {"a": np.ones(3)}}, "direction must have the structure of x"),
        ({"direction": np.array([1, np.nan, 0])}, "direction must be finite"),
        ({"reach": 0}, "reach must be positive and finite, got 0"),
        ({"reach": np.nan}, "reach must be positive and finite, got nan"),
        ({"fun": lambda x: x}, r"must return one real number, got float32\[3\]: choose one"),
    ],
)
def test_lines_that_are_refused(change, text, ax):
    options = {"fun": steps, "direction": np.ones(3), "reach": None, **change}
    g = px.make_perturbed_fun(options["fun"], 20, 0.3, **OPTIONS)
    with pytest.raises(ValueError, match=text):
        px.plot_smoothing(g, KEY, X, options["direction"], reach=options["reach"], ax=ax)


def test_lines_of_the_wrong_kind(ax):
    g, direction = px.make_perturbed_fun(steps, 20, 0.3, **OPTIONS), np.ones(3)
    complex_steps = px.make_perturbed_fun(lambda x: 1j * steps(x), 20, 0.3, **OPTIONS)
    with pytest.raises(TypeError, match=r"one real number, got complex64\[\]: return its real"):
        px.plot_smoothing(complex_steps, KEY, X, direction, ax=ax)
    with pytest.raises(TypeError, match=r"g must be what make_perturbed_fun returned, got steps$"):
        px.plot_smoothing(steps, KEY, X, direction, ax=ax)
    with pytest.raises(TypeError, match="reach must be a number or None, got str"):
        px.plot_smoothing(g, KEY, X, direction, reach="a", ax=ax)
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda x: px.plot_smoothing(g, KEY, x, direction, ax=ax))(X)
    with pytest.raises(TypeError, match="got perturbed_steps, a function that wraps it"):
        px.plot_smoothing(jax.jit(g), KEY, X, direction, ax=ax)


def test_without_matplotlib(monkeypatch, sweep):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'perturbax\[plots\]'"):
        sweep[0].plot()


@pytest.mark.parametrize("span", [1.3, 5.0, 30.0, 900.0, 1e8, 1e20])
def test_logarithmic_axes_have_ticks(span):
    """A run's axis of sigma had none where it was long, or the picture small."""
    figure, axes = plt.subplots(2, 2)
    ax = axes[0, 0]
    ax.plot([0, 1], [0.02, 0.02 * span])
    ax.set_yscale("log")
    _plots.plain_numbers(ax.yaxis)
    figure.canvas.draw()
    low, high = ax.get_ylim()
    shown = [t for t in ax.yaxis.get_ticklabels() if low <= t.get_position()[1] <= high]
    assert 2 <= sum(bool(t.get_text()) for t in shown) <= 10
    plt.close(figure)
