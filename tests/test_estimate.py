"""px.estimate: the numbers of the perturbed function, and errors that are what they say."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from helpers import AS_FOR_USERS
from perturbax.diagnostics._standard_errors import estimates_by_degree

KEY = jax.random.key(3)
X = jnp.array([-0.1, 0.05, 0.2])
SAMPLERS = [px.Independent(), px.Antithetic(), px.Sobol(4), px.Independent(block=25)]


def relu(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def steps(x):
    return jnp.sum(jnp.where(x > 0, 1.0, 0.0))


def both(smooth, x):
    """The estimate, and the value and the Jacobian of the function, by one program."""
    derive = jax.jacrev(lambda x: 2 * (smooth(KEY, x),), has_aux=True)
    found, (gradient, value) = jax.jit(lambda x: (px.estimate(smooth, KEY, x), derive(x)))(x)
    return found, (value, gradient)


SCALES = [0.3, [0.1, 0.2, 0.3], np.diag([0.1, 0.2, 0.3]) + 0.02]


@pytest.mark.parametrize(
    ("sampler", "degree", "sigma"),
    [(sampler, degree, SCALES[1]) for sampler in SAMPLERS for degree in (0, 1)]
    + [(px.Sobol(4), 2, sigma) for sigma in SCALES],
)
def test_value_and_gradient_are_those_of_the_function(sampler, degree, sigma):
    smooth = px.make_perturbed_fun(
        relu, 98, jnp.array(sigma, jnp.float32), px.Normal(), sampler=sampler, degree=degree
    )
    found, (value, gradient) = both(smooth, X)
    np.testing.assert_allclose(found.value, value, rtol=1e-6)
    np.testing.assert_allclose(found.gradient, gradient, atol=1e-4, rtol=1e-4)
    assert found.value_error > 0
    assert (found.gradient_error > 0).all()


@pytest.mark.parametrize("options", [{"use_baseline": False}, {"batch_size": 10}, {}], ids=str)
def test_other_options(options):
    smooth = px.make_perturbed_fun(relu, 100, 0.2, sampler=px.Sobol(4), **options)
    found, (value, gradient) = both(smooth, X)
    np.testing.assert_allclose(found.value, value, rtol=1e-5)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-4, atol=1e-5)


def test_intervals_have_the_dtypes_of_the_estimates():
    """Those of half precision, and of single where double is enabled, were wider."""
    found = px.estimate(px.make_perturbed_fun(relu, 8, 0.2), KEY, X.astype(jnp.bfloat16))
    for one, interval in zip((found.value, found.gradient), found.interval(), strict=True):
        assert [end.dtype for end in interval] == [one.dtype, one.dtype]


@functools.cache
def intervals(noise, **options):
    """Of 95 %, at 1,000 keys, with the estimates."""
    smooth = px.make_perturbed_fun(steps, 200, 0.5, noise, **options)

    @jax.jit
    def run(keys):
        found = jax.vmap(lambda key: px.estimate(smooth, key, X))(keys)
        return found, found.interval()

    return jax.tree.map(np.asarray, run(jax.random.split(KEY, 1_000)))


def coverage(noise, options, scale=1.0):
    """Shares of the intervals that hold the mean over all keys, in value and gradient."""
    found, ends = intervals(noise, **options)
    shares = []
    for (low, high), middle in zip(ends, (found.value, found.gradient), strict=True):
        half = scale * (high - low) / 2
        shares.append(np.mean(np.abs(middle - middle.mean(axis=0)) <= half, axis=0).ravel())
    return np.concatenate(shares)


@pytest.mark.parametrize("options", [{}, {"sampler": px.Independent(), "degree": 0}], ids=str)
@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=str)
def test_intervals_cover(noise, options):
    # 1,000 keys: a standard error of 0.7 %; the bounds are 5 of them from 95 %.
    shares = coverage(noise, options)
    assert (shares > 0.915).all()
    assert (shares < 0.985).all()


@pytest.mark.parametrize("scale", [0.6, 1.7])
def test_wrong_errors_would_be_noticed(scale):
    shares = coverage(px.Normal(), {}, scale)
    assert not ((shares > 0.915) & (shares < 0.985)).any()


@pytest.mark.parametrize(
    ("num_samples", "dim", "sampler", "num_groups"),
    [
        (10, 1, px.Sobol(9), 5),
        (10, 1, px.Sobol(6), 5),
        (13, 3, None, 7),
        (4, 1, None, 4),
        (1000, 3, None, 8),
        (65_536, 3, None, 8),
        (65_537, 3, None, 9),
    ],
)
def test_there_are_as_many_nets_as_the_documentation_says(num_samples, dim, sampler, num_groups):
    smooth = px.make_perturbed_fun(relu, num_samples, noise=px.Normal(), sampler=sampler)
    found = jax.eval_shape(lambda x: px.estimate(smooth, KEY, x), jnp.zeros(dim))
    assert found.degrees_of_freedom == num_groups - 1


@pytest.mark.parametrize(
    ("sampler", "degree", "degrees_of_freedom"),
    [
        (px.Independent(), None, 7),
        (px.Independent(), 1, 7),
        (px.Independent(), 0, 999),
        (px.Independent(block=100), 1, 9),
        (px.Independent(block=100), 0, 9),
    ],
    ids=str,
)
def test_groups_of_independent_samples(sampler, degree, degrees_of_freedom):
    """A fit is on eight blocks, unless their size is given; without one, each sample tells."""
    smooth = px.make_perturbed_fun(relu, 1000, 0.3, px.Normal(), sampler=sampler, degree=degree)
    found = jax.eval_shape(lambda x: px.estimate(smooth, KEY, x), jnp.zeros(5))
    assert found.degrees_of_freedom == degrees_of_freedom


@pytest.mark.parametrize("num_samples", [11, 14, 25])
def test_a_last_group_of_few_samples_tells_no_less(num_samples):
    """Errors were up to five times too small: the factor was that of groups of one size."""
    options = {"sampler": px.Independent(block=10), "degree": 0}
    smooth = px.make_perturbed_fun(relu, num_samples, 0.3, px.Normal(), **options)

    @jax.jit
    @jax.vmap
    def each(key):
        found = px.estimate(smooth, key, X)
        return found.value, found.gradient, found.value_error, found.gradient_error

    *found, value_error, gradient_error = each(jax.random.split(KEY, 32_000))
    # Of a gradient it is not quite in proportion: baselines are of few samples or of many.
    errors = zip((value_error, gradient_error), (0.05, 0.15), strict=True)
    for estimates, (error, far) in zip(found, errors, strict=True):
        reported = np.sqrt(np.mean(np.square(error), axis=0))
        np.testing.assert_allclose(reported / np.std(estimates, axis=0), 1, atol=far)


def test_errors_do_not_depend_on_the_unit_of_the_function():
    """Squares of small numbers vanish in single precision: the errors of these were 0."""
    smooth = px.make_perturbed_fun(lambda x, unit: unit * relu(x), 200, 0.3, px.Normal())
    run = jax.jit(lambda unit: px.estimate(smooth, KEY, X, unit))
    expected = run(1.0)
    for unit in (1e18, 1e-20, 1e-30):
        found = run(unit)
        for name in ("value_error", "gradient_error"):
            error = np.asarray(getattr(found, name), np.float64) / unit
            np.testing.assert_allclose(error, getattr(expected, name), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"degree": 1}, {"degree": 0}, {"use_baseline": False}], ids=str
)
def test_a_masked_score_has_no_slope_and_no_error(options):
    """At an infinite coordinate, which no noise moves, the slope was a number of no meaning."""

    def fun(y):
        choice = jax.nn.one_hot(jnp.argmax(y), 4)
        return {"cost": choice @ jnp.array([1.0, 5.0, -2.0, 3.0]), "choice": choice}

    x = jnp.array([0.1, -jnp.inf, 0.2, -0.1])
    smooth = px.make_perturbed_fun(fun, 400, 0.5, sampler=px.Independent(), **options)
    found, (_, expected) = both(smooth, x)
    for name in ("cost", "choice"):
        gradient, error = np.asarray(found.gradient[name]), np.asarray(found.gradient_error[name])
        np.testing.assert_array_equal(gradient[..., 1], 0.0)
        np.testing.assert_array_equal(error[..., 1], 0.0)
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-4)
    assert (np.asarray(found.gradient_error["cost"])[[0, 2, 3]] > 1e-3).all()


def test_errors_of_nets_are_not_those_of_independent_samples():
    """The spread is that of whole nets: far below what their points, one by one, would say."""
    smooth = px.make_perturbed_fun(relu, 512, 0.3, px.Normal(), sampler=px.Sobol(8), degree=0)
    independent = px.make_perturbed_fun(
        relu, 512, 0.3, px.Normal(), sampler=px.Independent(), degree=0
    )
    nets, points = (px.estimate(fun, KEY, X).value_error for fun in (smooth, independent))
    assert nets < points / 3


def test_a_gradient_and_its_errors_take_no_further_evaluations():
    calls = []

    def count(x):
        calls.append(1)
        return np.float32(x.sum())

    def fun(x):
        return jax.pure_callback(
            count, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential"
        )

    smooth = px.make_perturbed_fun(fun, 64, 0.1, px.Normal(), sampler=px.Sobol(4))
    jax.block_until_ready(px.estimate(smooth, KEY, X))
    assert len(calls) == 64


def test_trees_and_vector_values():
    def fun(x, power):
        return {"a": x["w"] ** power, "b": jnp.sum(x["w"] > 0)}

    smooth = px.make_perturbed_fun(fun, 100, 0.1, sampler=px.Sobol(4))
    x = {"w": jnp.array([0.1, 0.2]), "n": 3, "p": 0.5}
    found = px.estimate(smooth, KEY, x, 2)
    jacobian = jax.jacobian(lambda w: smooth(KEY, {**x, "w": w}, 2))(x["w"])
    assert found.gradient["a"]["n"] is None
    assert found.gradient["b"]["p"].shape == ()
    for name in ("a", "b"):
        np.testing.assert_allclose(found.gradient[name]["w"], jacobian[name], atol=1e-5)
    assert jax.tree.structure(found.gradient_error) == jax.tree.structure(found.gradient)


def test_it_prints_as_a_short_table():
    """It printed all numbers: 80 lines for 128 coordinates."""
    smooth = px.make_perturbed_fun(lambda x: relu(x["w"]), 64, 0.1, sampler=px.Sobol(4))
    texts = []

    @jax.jit
    def traced(x):
        found = px.estimate(smooth, KEY, x)
        texts.append(str(found))
        return found

    found = traced({"w": jnp.zeros((4, 32), jnp.bfloat16), "n": 3})
    assert "Tracer" in texts[0]
    head, value, gradient, freedom = str(found).splitlines()
    assert max(map(len, (head, value, gradient))) <= 110
    assert f"{found.value:.5g} ± {found.value_error:.1g}" in value
    assert re.search(r"^gradient\['w'\] +\(4, 32\) .*\.\.\. \(128 numbers\)", gradient)
    length, error = (
        np.linalg.norm(np.float64(v["w"])) for v in (found.gradient, found.gradient_error)
    )
    assert gradient.split()[-2:] == [f"{length:.3g}", f"{error:.3g}"]
    assert freedom == "3 degrees of freedom"
    assert repr(found) == str(found)
    both = found.interval()
    assert repr(both) == str(both)
    head, value, gradient = str(both).splitlines()
    low, high = both.value
    assert value.endswith(f"{low:.5g} to {high:.5g}")
    assert re.search(r"^gradient\['w'\] +\(4, 32\) .* to .*, \.\.\. \(128 numbers\)$", gradient)
    many = px.estimate(px.make_perturbed_fun(lambda x: x[0], 8), KEY, [jnp.ones(())] * 30)
    last = str(many).splitlines()[-2], str(many.interval()).splitlines()[-1]
    assert last == ("and 11 more arrays",) * 2


def test_it_is_compared_as_an_object():
    """By == of their numbers two of them raised that the truth of an array is ambiguous."""
    one = px.estimate(px.make_perturbed_fun(relu, 8), KEY, X)
    other = jax.tree.map(jnp.copy, one)
    assert one != other
    assert one in {one}


def test_aux_and_narrow_leaves():
    smooth = px.make_perturbed_fun(lambda x: (relu(x), x[0]), 40, 0.1, has_aux=True)
    found = px.estimate(smooth, KEY, X.astype(jnp.bfloat16))
    assert found.aux.shape == (40,)
    assert found.gradient.dtype == jnp.bfloat16


def test_complex_values_have_real_errors():
    """Those of their parts together. (The gradient lacked its imaginary part.)"""
    factor = np.complex64(3 - 4j)

    def results(fun):
        smooth = px.make_perturbed_fun(fun, 100, 0.3, px.Normal(), sampler=px.Sobol(4))
        return smooth, px.estimate(smooth, KEY, X)

    smooth, found = results(lambda x: {"z": factor * relu(x), "r": relu(x)})
    _, real = results(relu)
    gradient = jax.jit(jax.jacfwd(smooth, argnums=1))(KEY, X)
    for name, size in (("z", 5), ("r", 1)):
        assert found.gradient[name].dtype == found.value[name].dtype == gradient[name].dtype
        np.testing.assert_allclose(found.gradient[name], gradient[name], rtol=1e-4, atol=1e-4)
        for field in ("value_error", "gradient_error"):
            error = getattr(found, field)[name]
            assert error.dtype == jnp.float32
            np.testing.assert_allclose(error, size * getattr(real, field), rtol=1e-3)
    with pytest.raises(TypeError, match="intervals are of real numbers, but the value is complex"):
        found.interval()


@pytest.mark.parametrize(
    ("level", "error", "text"),
    [
        ("a", TypeError, "level must be a number between 0 and 1, such as 0.95, got str"),
        (None, TypeError, "got NoneType"),
        (True, TypeError, "got bool"),
        (1j, TypeError, "got complex"),
        (np.array([0.9, 0.95]), TypeError, r"got an array of shape \(2,\)"),
        (95, ValueError, "between 0 and 1, got 95; 0.95 stands for"),
        (0.0, ValueError, "between 0 and 1, got 0.0"),
        (float("nan"), ValueError, "between 0 and 1, got nan"),
    ],
    ids=str,
)
def test_levels_that_are_refused(level, error, text):
    with pytest.raises(error, match=text):
        found_for_levels().interval(level)


@functools.cache
def found_for_levels():
    return px.estimate(px.make_perturbed_fun(relu, 20), KEY, X)


def test_levels():
    found = found_for_levels()
    with pytest.raises(TypeError, match="level must be static"):
        jax.jit(found.interval)(0.9)
    for level in (np.float32(0.5), jnp.float32(0.5), np.array(0.5)):
        assert found.interval(level)[0] == found.interval(0.5)[0]


def test_noise_without_derivatives_has_a_value():
    found = px.estimate(px.make_perturbed_fun(relu, 64, 0.1, px.Uniform()), KEY, X)
    assert found.gradient is None
    assert found.value_error > 0
    assert found.interval()[1] == (None, None)


def test_a_traced_scale_that_is_not_positive_gives_nan():
    def errors(sigma):
        found = px.estimate(px.make_perturbed_fun(relu, 64, sigma), KEY, X)
        return found.value_error, found.gradient_error

    assert all(np.isnan(v).all() for v in jax.jit(errors)(-1.0))


@pytest.mark.covering
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ["x", "sigma", "what the function and its noise depend on"])
@pytest.mark.parametrize("derivative", [jax.jacrev, jax.jacfwd])
def test_results_have_no_derivatives(derivative, name, jit):
    """They were zero in x, and in sigma a part of what they should be, without a word."""

    def results(number):
        x, sigma, factor = X, 0.2, 1.0
        if name == "x":
            x = number * X
        elif name == "sigma":
            sigma = number
        else:
            factor = number
        fun = px.make_perturbed_fun(lambda x, factor: factor * relu(x), 20, sigma)
        found = px.estimate(fun, KEY, x, factor)
        return found.value, found.gradient, found.gradient_error

    with pytest.raises(NotImplementedError, match=f"in {name}, .*perturbed function itself"):
        derivative(jax.jit(results) if jit else results)(0.3)


@pytest.mark.parametrize("jit", [False, True])
def test_results_may_be_looked_at_while_something_is_differentiated(jit):
    smooth = px.make_perturbed_fun(relu, 20, 0.2, px.Normal())

    def loss(x):
        found = px.estimate(smooth, KEY, jax.lax.stop_gradient(x))
        return smooth(KEY, x), (found.value, found.value_error, found.interval())

    derive = jax.grad(loss, has_aux=True)
    gradient, (value, error, _) = (jax.jit(derive) if jit else derive)(X)
    found = px.estimate(smooth, KEY, X)
    np.testing.assert_allclose((value, error), (found.value, found.value_error), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(smooth, argnums=1)(KEY, X), rtol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        lambda g: jax.vmap(g, (None, 0)),
        lambda g: jax.grad(g, 1),
        lambda g: functools.wraps(g)(lambda *args: -g(*args)),
    ],
    ids=["jit", "vmap", "grad", "wraps"],
)
def test_wrappers_of_a_perturbed_function_are_not_looked_through(wrap):
    """They share its attributes: the estimate was that of the function inside."""
    wrapped = wrap(px.make_perturbed_fun(relu, 20, 0.2))
    with pytest.raises(
        TypeError, match=r"a function that wraps it, .*; apply jit and vmap to estimate"
    ):
        px.estimate(wrapped, KEY, X)


def test_what_it_cannot_do_it_says():
    smooth = px.make_perturbed_fun(relu, 10, 0.1, sampler=px.Sobol(1))
    with pytest.raises(ValueError, match=r"at least two groups.*Sobol\(num_groups=1\) makes one"):
        px.estimate(smooth, KEY, X)
    with pytest.raises(ValueError, match="num_samples=1 "):
        px.estimate(px.make_perturbed_fun(relu, 1), KEY, X)
    with pytest.raises(TypeError, match="must be what make_perturbed_fun returned, got relu"):
        px.estimate(relu, KEY, X)


@pytest.mark.parametrize("degree", [0, 1])
def test_large_jacobians_do_not_change_how_the_function_is_evaluated(degree, monkeypatch):
    """It was evaluated for no more samples at a time than Jacobians are held: one by one, here."""
    shapes = []

    def signs(x):
        shapes.append(x.shape)
        return np.sign(x)

    def fun(x):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(signs, like, x, vmap_method="expand_dims")

    x, sampler = jnp.linspace(-1.0, 1.0, 12), px.Independent(block=2)
    smooth = px.make_perturbed_fun(fun, 64, 0.3, px.Normal(), sampler=sampler, degree=degree)
    monkeypatch.setitem(px.execution._plan.CHUNK, "cpu", 12 * 16)
    jax.block_until_ready(smooth(KEY, x))
    expected, shapes[:] = sorted(shapes), []
    found = px.estimate(smooth, KEY, x)
    jax.block_until_ready(found)
    assert sorted(shapes) == expected == [(32, 12)] * 2
    assert found.gradient.shape == (12, 12)


def test_memory_of_large_jacobians_is_bounded():
    """Those of all groups at once would take 48 times as much as one."""
    smooth = px.make_perturbed_fun(jnp.sign, 48, 0.3, sampler=px.Independent(), degree=0)
    program = jax.jit(lambda x: px.estimate(smooth, KEY, x)).lower(jnp.zeros(1000))
    memory = program.compile(compiler_options=AS_FOR_USERS).memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 6 * 1000 * 1000 * 4


@pytest.mark.parametrize("sampler", [px.Sobol(4), px.Independent(block=16)], ids=str)
def test_other_degrees_from_the_same_evaluations(sampler):
    """As if each were asked for."""
    calls = []

    def count(x):
        calls.append(1)
        return np.float32(np.maximum(x, 0).sum())

    def fun(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(count, like, x, vmap_method="sequential")

    def smooth(fun, degree):
        return px.make_perturbed_fun(fun, 128, 0.3, px.Normal(), sampler=sampler, degree=degree)

    found = estimates_by_degree(smooth(fun, 1), (2, 0), KEY, X, (), {})
    jax.block_until_ready(found)
    assert len(calls) == 128
    for degree, one in zip((1, 2, 0), found, strict=True):
        expected = px.estimate(smooth(relu, degree), KEY, X)
        np.testing.assert_allclose(one.value, expected.value, rtol=1e-6)
        np.testing.assert_allclose(one.gradient, expected.gradient, atol=1e-3)
        np.testing.assert_allclose(one.gradient_error, expected.gradient_error, rtol=1e-2)


def test_other_degrees_that_take_other_samples_are_refused():
    smooth = px.make_perturbed_fun(relu, 100, 0.3, px.Normal(), sampler=px.Antithetic(), degree=0)
    with pytest.raises(ValueError, match="other samples are drawn for degree=1"):
        estimates_by_degree(smooth, (1,), KEY, X, (), {})
