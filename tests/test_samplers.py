"""Samplers and surrogates: exact laws, exact results where theory promises them, no bias."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

import closed_forms as cf
import perturbax as px
from helpers import (
    AS_FOR_USERS,
    FOR_LONG_RUNS,
    assert_distributed_as,
    assert_unbiased,
    derivatives,
)
from perturbax.estimator import _surrogate
from perturbax.execution import _chunks
from perturbax.sampling import _draw_groups, _random_bits
from perturbax.sampling._merged import Merged

SAMPLERS = {
    "independent": px.Independent(),
    "blocks": px.Independent(block=8),
    "antithetic": px.Antithetic(),
    "orthogonal": px.Orthogonal(),
    "orthogonal pairs": px.Orthogonal(antithetic=True),
    "two nets": px.Sobol(),
    "four arrays": px.OrthogonalArray(num_groups=4),
}
PAIRS = px.Orthogonal(antithetic=True)
NETS = ("two nets", "four arrays")  # which need fewer keys
PROMISES = {"value": 0.01, "gradient": 0.02, "dsigma": 0.05, "hessian": 0.05}


class Draws:
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -(inputs**2) / 2


def smooth(fun, x, sigma, noise, num_samples=64, **options):
    return px.make_perturbed_fun(fun, num_samples, sigma, noise, **options)


@pytest.mark.covering("name")
@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=["normal", "gumbel"])
@pytest.mark.parametrize("name", [*SAMPLERS, "merged pairs"])
def test_each_sample_has_the_law_of_the_noise(name, noise):
    sampler = {**SAMPLERS, "merged pairs": Merged(px.Antithetic(), 3)}[name]
    law = {px.Normal: "norm", px.Gumbel: "gumbel_r"}[type(noise)]
    size = min(sampler.group_size(64, 3), 12)

    def draw(key):
        return sampler.sample_group(key, noise, size, 3, np.dtype("float32"))

    z = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 4000))
    for row, column in ((0, 0), (size - 1, 2)):
        assert_distributed_as(np.asarray(z[:, row, column]), law)


@pytest.mark.parametrize("kind", [px.Independent, px.Orthogonal])
def test_a_sampler_made_of_one_of_the_library_draws_by_its_own_method(kind):
    """What it inherits draws several groups at once, and was taken instead."""
    drawn = []

    class Own(kind):
        def __init__(self):
            super().__init__()

        def sample_group(self, *args):
            drawn.append(1)
            return super().sample_group(*args)

    class Wrapped:
        """Hands on what it does not have itself."""

        def __init__(self, sampler):
            self.sampler = sampler

        def __getattr__(self, name):
            return getattr(self.sampler, name)

        def sample_group(self, *args):
            drawn.append(1)
            return self.sampler.sample_group(*args)

    for sampler, degree in ((Own(), 1), (Wrapped(kind()), 0)):
        drawn.clear()
        fun = smooth(lambda y: y[0], None, 1.0, px.Normal(), 32, sampler=sampler, degree=degree)
        jax.eval_shape(fun, jax.random.key(0), jnp.zeros(3))
        assert drawn


def test_several_groups_may_be_drawn_by_the_inherited_method_for_one():
    """The latter drew by the former, without end."""

    class Own(px.Antithetic):
        def sample_groups(self, key, first, count, *args):
            one = super().sample_group
            keys = jax.random.split(jax.random.wrap_key_data(key), count)
            return jax.vmap(lambda key: one(key, *args))(keys).reshape(-1, 3)

    fun = smooth(lambda y: y[0], None, 1.0, px.Normal(), 32, sampler=Own(), degree=0)
    assert jax.eval_shape(fun, jax.random.key(0), jnp.zeros(3)).shape == ()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "blocks"])
def test_groups_are_independent(name):
    """Of two independent normal numbers the sum and the difference are normal again, of variance 2.

    So are the first numbers of two groups, and the last of one with the first of the next.
    """
    sampler = SAMPLERS[name] if name != "two nets" else px.Sobol(num_groups=3)
    size = sampler.group_size(32, 2)

    def draw(key):
        fun = smooth(lambda y: (y[0], y), None, 1.0, px.Normal(), 32, sampler=sampler, has_aux=True)
        return fun(key, jnp.zeros(2))[1]

    z = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(10), 4000)))
    for one, two in ((0, size), (size - 1, size), (0, 2 * size)):
        for sign in (1, -1):
            for columns in ((0, 0), (0, 1)):
                both = z[:, one, columns[0]] + sign * z[:, two, columns[1]]
                assert_distributed_as(both / np.sqrt(2), "norm")


# With doublings, with coordinates added, with both, and fewer rows than coordinates.
BLOCKS = [(1, 1), (2, 2), (15, 15), (16, 16), (45, 45), (45, 20), (45, 44), (300, 4)]


@functools.cache
def blocks_of(dim, rows):
    """Blocks of normal noise for 1,000 keys."""
    sampler = px.Orthogonal(rows)

    def draw(key):
        return sampler.sample_group(key, px.Normal(), rows, dim, np.dtype("float32"))

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 1000)), "f8")


@pytest.mark.parametrize(("dim", "rows"), BLOCKS)
def test_rows_of_a_block_are_orthogonal(dim, rows):
    z = blocks_of(dim, rows)[:50]
    directions = z / np.linalg.norm(z, axis=2, keepdims=True)
    gram = directions @ np.swapaxes(directions, 1, 2)
    np.testing.assert_allclose(gram - np.eye(rows), 0.0, atol=2e-6)


@pytest.mark.parametrize(("dim", "rows"), BLOCKS)
def test_each_row_of_a_block_is_normal_in_all_coordinates_together(dim, rows):
    """Normal along any direction, with a length that is chi-distributed, and so is that of a part.

    Marginals would not show that a row keeps to some of the directions.
    """
    z = blocks_of(dim, rows)
    direction = np.random.RandomState(1).normal(size=(dim, 3))
    direction[:, 1] *= np.arange(dim) < 2  # of two neighbours
    direction[:, 2] *= np.arange(dim) >= dim // 2
    direction /= np.linalg.norm(direction, axis=0)
    part = max(dim // 2, 1)
    for row in {0, rows // 2, rows - 1}:
        for along in (z[:, row] @ direction).T:
            assert_distributed_as(along, "norm")
        for some, count in ((z[:, row], dim), (z[:, row, :part], part), (z[:, row, -1:], 1)):
            assert_distributed_as(np.sum(some**2, axis=1), scipy.stats.chi2(count).cdf)


@pytest.mark.parametrize("num_samples", [1, 2, 67, 20_001])
def test_rows_of_any_number_are_those_of_a_larger_one(num_samples):
    """XLA is given a few more where that is faster; they must not be seen."""
    drawn = [
        _draw_groups.draw(
            px.Gumbel(), px.Independent(), jnp.array([1, 2], jnp.uint32), jnp.uint32(0),
            count, 1, 3, np.dtype(np.float32),
        )
        for count in (num_samples, 20_004)
    ]  # fmt: skip
    assert drawn[0].shape == (num_samples, 3)
    np.testing.assert_array_equal(drawn[0], drawn[1][:num_samples])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "blocks"])
def test_each_number_is_drawn_once(name):
    """A sampler of the library keeps its noise, lest XLA draw it again for each use of it."""

    def fun(y):
        return jnp.sum(jnp.abs(y[:, None] - y[None])) + jnp.max(y)

    g = smooth(fun, None, 1.0, px.Gumbel(), 60, sampler=SAMPLERS[name], degree=1)
    gradient = jax.jit(jax.value_and_grad(g, argnums=1), compiler_options=AS_FOR_USERS)
    program = gradient.lower(jax.random.key(0), jnp.zeros(5)).compile().as_text()
    # The twenty rounds of a generator, in as many computations as it was copied to.
    rounds = [part.count(" xor(") for part in program.split("\n\n")]
    assert sum(number >= 20 for number in rounds) == 1


class Words:
    """Noise whose draws are the bits of the random words themselves."""

    def from_bits(self, bits):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (px.Independent(), [[3716834203, 1946498123]]),
        (px.Independent(block=3), [[3716834203, 1946498123], [90224275, 3816610971]]),
        (px.Antithetic(), [[3716834203, 1946498123], [578133092, 2348469172]]),
        (px.Sobol(), [[1024511538, 877192987], [3768233385, 3226325840]]),
        (px.OrthogonalArray(), [[1024511538, 877192987], [3768233385, 3226325840]]),
    ],
    ids=repr,
)
def test_the_words_of_a_group_are_those_of_the_release(sampler, expected):
    """A program gives the same numbers in the next release; else, the change log must say so."""
    key = jax.random.key(3, impl="threefry2x32")
    size = sampler.group_size(3, 2)
    draw = jax.jit(lambda key: sampler.sample_group(key, Words(), size, 2, np.dtype("float32")))
    words = np.asarray(draw(key)).view(np.uint32)
    np.testing.assert_array_equal(words[:2], np.array(expected, np.uint32))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (px.Independent(), [[0.293797, -2.554201], [0.023944, -1.175723], [0.190614, 0.071418]]),
        (px.Independent(4), [[0.293797, -2.554201], [0.023944, -1.175723], [0.190614, 0.071418]]),
        (px.Antithetic(), [[0.293797, -2.554201], [-0.627559, -0.201935], [0.023944, -1.175723]]),
        (px.Orthogonal(), [[1.012348, 2.593971], [-0.625779, 0.464111], [1.080189, 0.143197]]),
        (px.Sobol(), [[1.295756, -0.140711], [1.029991, 0.880455], [-1.237252, -1.305724]]),
        (px.Sobol(4), [[2.464661, 1.140358], [0.36164, 0.646178], [1.851143, -1.12735]]),
        (px.OrthogonalArray(), [[1.295756, -0.140711], [-1.103355, 0.64646], [-0.69527, 1.89569]]),
    ],
    ids=repr,
)
def test_samples_are_those_of_the_release(sampler, expected):
    options = {"sampler": sampler, "degree": 0, "has_aux": True}
    fun = px.make_perturbed_fun(lambda y: (y[0], y), 9, 1.0, px.Normal(), **options)
    _, samples = fun(jax.random.key(3, impl="threefry2x32"), jnp.zeros(2))
    np.testing.assert_allclose(samples[::4], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("degree", [None, 1])
def test_a_fit_does_not_depend_on_the_unit_of_the_function(degree):
    """Squares of small values vanished in its equations, and those of large ones overflowed."""
    x, key = jnp.linspace(-0.2, 0.3, 5), jax.random.key(8)

    def gradient(scale):
        fun = smooth(
            lambda y, scale: scale * (jnp.sum(jnp.abs(y)) + (y[0] > y[1])), x, 0.5, px.Normal(),
            1000, degree=degree,
        )  # fmt: skip
        return jax.grad(fun, argnums=1)(key, x, scale)

    gradient = jax.jit(gradient)
    expected = np.asarray(gradient(1.0), np.float64)
    closed_form = 2 * scipy.stats.norm.cdf(np.asarray(x) / 0.5) - 1
    np.testing.assert_allclose(expected[2:], closed_form[2:], atol=0.15)
    for scale in (1e18, 1e-20, 1e-30):
        found = np.asarray(gradient(scale), np.float64) / scale
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_noise_is_not_made_of_what_jax_makes_of_a_key(impl):
    """Else a point drawn with the same key, by mistake, would be in line with the first sample."""
    key = jax.random.key(7, impl=impl)
    words = np.asarray(_random_bits.grid(_random_bits.root(key), 4, 8, np.dtype("float32")))
    drawn = [
        jax.random.bits(key, (64,), jnp.uint32),
        jax.random.key_data(jax.random.split(key, 64)),
    ]
    assert not np.intersect1d(words, np.concatenate([np.ravel(v) for v in drawn])).size


def test_watching_for_reuse_of_keys_changes_no_numbers():
    key = jax.random.key(7)
    expected = np.asarray(_random_bits.root(key))
    with jax.debug_key_reuse(True):
        key = jax.random.key(7)
        np.testing.assert_array_equal(_random_bits.root(key), expected)
        with pytest.raises(jax.errors.KeyReuseError):
            _random_bits.root(key)


def test_keys_of_steps_are_those_of_jax():
    for impl in ("threefry2x32", "rbg"):
        key = jax.random.key(7, impl=impl)
        found = jnp.stack(_random_bits.fold_in_and_split(key, jnp.int32(2**31 - 1)))
        expected = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
        data = [jax.random.key_data(keys) for keys in (found, expected)]
        np.testing.assert_array_equal(*data)


def cases_of_derivatives():
    """Each sampler with degree 2, under one of the laws; a few with others.

    The two tests that follow have each sampler with degrees 0 and 1, but blocks with degree 0. Of
    independent samples test_unbiased.py has the exact formulas of degree 0, and what sampler it is
    makes no difference to second derivatives of degree 1.
    """
    more = [("blocks", "gumbel", 0), ("orthogonal", "normal", 1)]
    laws = "normal", "gumbel"
    for i, name in enumerate(SAMPLERS):
        for case in itertools.product([name], laws, [0, 1, 2]):
            chosen = case == (name, laws[i % 2], 2) or case in more
            yield pytest.param(*case, marks=() if chosen else pytest.mark.full)


@pytest.mark.parametrize(("name", "noise_name", "degree"), [*cases_of_derivatives()])
def test_derivatives_are_unbiased(name, noise_name, degree, everything):
    noise = {"normal": px.Normal(), "gumbel": px.Gumbel()}[noise_name]
    case = cf.step_and_choice(getattr(cf, noise_name))
    x = jnp.asarray(case.x, jnp.float32)

    def estimate(key, x, sigma):
        return smooth(case.fun, x, sigma, noise, sampler=SAMPLERS[name], degree=degree)(key, x)

    num_keys = 12_288 if name in NETS else 16_384 if degree else 28_672
    # Some of the cases that run with --all only need more.
    num_keys *= 2 if everything else 1
    assert_unbiased(
        derivatives(estimate, tuple(PROMISES)),
        {name: getattr(case.exact, name) for name in PROMISES},
        args=(x, jnp.float32(case.sigma)),
        seed=4,
        num_keys=num_keys,
        promise=PROMISES,
    )


class ByInverse:
    """One of several laws, scaled to unit variance where there is one, with icdf but no from_bits.

    The number of the law is traced, so that one compiled program serves them all.
    """

    derivatives = np.inf
    mean = 0.0
    variance = 1.0

    def __init__(self, laws, number):
        self.laws, self.number = laws, number
        self.scales = [law.variance**0.5 if np.isfinite(law.variance) else 1.0 for law in laws]

    def by_law(self, method, argument):
        branches = [
            lambda v, law=law, scale=scale: method(law, v, scale)
            for law, scale in zip(self.laws, self.scales, strict=True)
        ]
        return jax.lax.switch(self.number, branches, argument)

    def sample(self, key, sample_shape=(), dtype=float):
        words = jax.random.bits(key, sample_shape, jnp.uint32)
        return self.by_law(lambda law, w, scale: law.from_bits(w) / scale, words).astype(dtype)

    def icdf(self, u):
        return self.by_law(lambda law, u, scale: law.icdf(u) / scale, u)

    def log_prob(self, inputs):
        return self.by_law(lambda law, z, scale: law.log_prob(scale * z), inputs)


STEP_AT, SIGMA = 0.25, 0.75
SMOOTH_LAWS = {
    "logistic": (px.Logistic(), cf.logistic),
    "student": (px.StudentT(6), cf.student_t(6.0)),
    "cauchy": (px.Cauchy(), cf.cauchy),
}


def one_step(y):
    return (y[0] > 0).astype(jnp.float32)


@pytest.mark.covering("name")
@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_smooth_laws_are_unbiased(name, degree):
    """P(x + sigma z > 0) and its derivatives are those of the distribution function."""
    precise = name in ("antithetic", "orthogonal pairs", *NETS)  # which need fewer keys
    laws = [v for v in SMOOTH_LAWS.values() if not degree or np.isfinite(v[0].variance)]
    quantities = {"value": "value", "gradient": "first", "dsigma": "dsigma", "hessian": "second"}
    exact = {quantity: [] for quantity in quantities}
    for law, closed in laws:
        scale = law.variance**0.5 if np.isfinite(law.variance) else 1.0
        parts = cf.smooth_profile(cf.step, np.float64(STEP_AT), SIGMA / scale, closed)
        for quantity, part in quantities.items():
            exact[quantity].append(parts[part] / (scale if quantity == "dsigma" else 1.0))

    def one(key, number):
        noise = ByInverse([law for law, _ in laws], number)

        def estimate(p):
            fun = smooth(one_step, None, p[1], noise, sampler=SAMPLERS[name], degree=degree)
            return fun(key, p[:1])

        p = jnp.array([STEP_AT, SIGMA])
        (value, slope), push = jax.linearize(jax.value_and_grad(estimate), p)
        _, hessian = push(jnp.array([1.0, 0.0]))
        return {
            "value": value, "gradient": slope[0], "dsigma": slope[1], "hessian": hessian[0]
        }  # fmt: skip

    assert_unbiased(
        lambda key: jax.vmap(lambda number: one(key, number))(jnp.arange(len(laws))),
        {quantity: np.array(values) for quantity, values in exact.items()},
        seed=11,
        num_keys=13_312 if degree else 4096 if precise else 8192,
        promise=PROMISES,
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_laws_with_edges_are_unbiased(name):
    """As far as they have derivatives: Laplace and Triangular one, Uniform none.

    Triangular without a baseline and with a function that is 0 at the ends of the support: its
    score is infinite there, and so is the variance otherwise.
    """
    x, sigma, bound = jnp.array([0.125]), 0.75, 0.6

    def inside(y):
        return (jnp.abs(y[0] - 0.1) < bound * sigma).astype(jnp.float32)

    def estimator(key):
        options = {"sampler": SAMPLERS[name]}
        laplace = smooth(one_step, None, sigma, px.Laplace(), degree=1, **options)
        edges = smooth(inside, None, sigma, px.Triangular(), use_baseline=False, **options)
        uniform = smooth(one_step, None, sigma, px.Uniform(), degree=1, **options)
        value, slope = jax.value_and_grad(laplace, argnums=1)(key, x)
        other, other_slope = jax.value_and_grad(edges, argnums=1)(key, x)
        return {
            "value": jnp.stack([value, other, uniform(key, x)]),
            "gradient": jnp.stack([slope[0], other_slope[0]]),
        }

    window = cf.Profile(jumps=((0.1 - bound * sigma, 1.0), (0.1 + bound * sigma, -1.0)))
    at = np.float64(x[0])
    parts = [
        cf.smooth_profile(profile, at, sigma, law)
        for profile, law in ((cf.step, cf.laplace), (window, cf.triangular), (cf.step, cf.uniform))
    ]
    exact = {
        "value": np.array([part["value"] for part in parts]),
        "gradient": np.array([part["first"] for part in parts[:2]]),
    }
    num_keys = 2048 if name in NETS else 7168
    promise = {"value": 0.01, "gradient": 0.05}
    assert_unbiased(estimator, exact, seed=12, num_keys=num_keys, promise=promise)


# Every law with moments and a score; of Laplace and Triangular first derivatives alone.
POLYNOMIAL = [
    px.Normal(), px.Gumbel(), px.Logistic(), px.Laplace(), px.StudentT(6), px.Triangular()
]  # fmt: skip


@pytest.mark.covering("noise")
@pytest.mark.parametrize("noise", POLYNOMIAL, ids=str)
@pytest.mark.parametrize("sampler", [px.Independent(), px.Sobol()], ids=str)
def test_the_gradient_of_a_linear_function_is_exact(sampler, noise):
    slope = jnp.array([1.0, -2.0, 0.5])
    fun = smooth(lambda y: slope @ y, None, 0.5, noise, 32, sampler=sampler, degree=1)
    gradient = jax.grad(fun, argnums=1)(jax.random.key(5), jnp.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


@pytest.mark.covering("noise")
@pytest.mark.parametrize("noise", POLYNOMIAL, ids=str)
@pytest.mark.parametrize("sampler", [px.Independent(), px.Sobol()], ids=str)
def test_the_hessian_of_a_quadratic_is_exact(sampler, noise):
    matrix = jnp.array([[2.0, 0.5], [0.5, -1.0]])
    fun = smooth(lambda y: y @ matrix @ y, None, 0.5, noise, 128, sampler=sampler, degree=2)
    key, x = jax.random.key(6), np.array([0.1, -0.2], np.float32)

    def derivatives(x):
        twice = jax.hessian(fun, argnums=1)(key, x) if noise.derivatives > 1 else None
        return jax.grad(fun, argnums=1)(key, x), twice

    gradient, hessian = jax.jit(derivatives)(x)
    if noise.derivatives > 1:
        np.testing.assert_allclose(hessian, 2 * matrix, atol=3e-4)
    slope = 2 * np.asarray(matrix) @ (x + 0.5 * noise.mean)
    np.testing.assert_allclose(gradient, slope, atol=1e-4)


def test_squares_are_doubted_apart_from_slopes():
    """Of a function that has none they cost next to nothing, of a quadratic one they take all."""
    dim, keys = 12, jax.random.split(jax.random.key(8), 100)
    wave, square = np.float32([3, 0, 1]), np.float32([0, 1, 0.1])

    def fun(y, weights):
        return weights @ jnp.stack([jnp.sum(y), jnp.sum(y) ** 2, jnp.sum(jnp.sin(40 * y))])

    @functools.cache
    def gradients(num_samples, degree):
        options = {"sampler": px.Independent(), "degree": degree}
        perturbed = smooth(fun, None, 0.5, px.Normal(), num_samples, **options)
        gradient, x = jax.grad(perturbed, argnums=1), jnp.full(dim, 0.3)
        return jax.jit(
            lambda weights: jax.lax.map(lambda key: gradient(key, x, weights), keys),
            compiler_options=FOR_LONG_RUNS,
        )

    def variance(weights, num_samples, degree):
        return float(np.sum(np.var(gradients(num_samples, degree)(weights), axis=0)))

    # Of 300 samples 262 are for a fit of 91 coefficients; of 100 there are fewer than coefficients,
    # and the linear function remains.
    assert variance(wave, 300, 2) < 1.1 * variance(wave, 300, 1)
    assert variance(wave, 100, 2) < 1.1 * variance(wave, 100, 1)
    assert variance(wave, 100, 1) < 0.5 * variance(wave, 100, 0)
    assert variance(square, 300, 2) < 0.1 * variance(square, 300, 1)


@pytest.mark.parametrize("batch_size", [None, 6_000])
def test_a_fit_on_a_part_of_the_samples_is_exact_too(batch_size):
    """12,000 samples of 60 coordinates: 32 for each coefficient are enough, the rest save time."""
    dim, options = 60, {"batch_size": batch_size, "degree": 1, "sampler": px.Sobol()}
    assert _surrogate.enough(dim, 1, 2, 6_000) == 32 * (1 + dim)
    slope = jnp.asarray(np.random.RandomState(0).normal(size=dim), jnp.float32)
    fun = smooth(lambda y: slope @ y, None, 0.5, px.Gumbel(), 12_000, **options)
    gradient = jax.grad(fun, argnums=1)(jax.random.key(5), jnp.zeros(dim))
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=str)
@pytest.mark.parametrize(("dim", "degree"), [(3, 1), (3, 2), (25, 2)])
def test_slopes_of_surrogates_are_their_derivatives(dim, degree, noise):
    """What is written down agrees with what JAX derives."""
    size = _surrogate.num_features(dim, degree)

    @jax.jit
    def both(beta):
        def expected(a, r):
            return _surrogate.expected_features(a, r, degree, noise) @ beta

        in_a = _surrogate.expected_slope_in_a(beta, dim)
        in_r = _surrogate.expected_slope_in_r(beta, dim, degree, noise)
        derived = jax.jacfwd(expected, argnums=(0, 1))(jnp.zeros(dim), jnp.ones(dim))
        return (in_a, in_r), derived

    beta = np.random.RandomState(1).normal(size=(size, 2)).astype(np.float32)
    for ours, theirs in zip(*both(beta), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_more_coordinates_than_samples_determine_stay_finite():
    """The ridge holds coefficients that nothing determines; refinement must not undo that."""
    x, sigma = np.linspace(-1.0, 1.0, 32), 0.5
    exact = 2 * scipy.stats.norm.cdf(x / sigma) - 1

    def slope(key, degree=1):
        fun = smooth(lambda y: jnp.sum(jnp.abs(y)), None, sigma, px.Normal(), 16, degree=degree)
        return jax.grad(fun, argnums=1)(key, jnp.asarray(x, jnp.float32))

    def mean_square(degree):
        keys = jax.random.split(jax.random.key(5), 1024)
        slopes = jax.vmap(functools.partial(slope, degree=degree))
        slopes = jax.jit(slopes, compiler_options=FOR_LONG_RUNS)(keys)
        return np.mean((slopes - exact) ** 2)

    assert mean_square(1) < 1.2 * mean_square(0)
    along = jnp.asarray(exact / np.sum(exact**2), jnp.float32)
    assert_unbiased(
        lambda key: along @ slope(key), np.ones(()), seed=13, num_keys=8192, promise=0.05
    )


@pytest.mark.parametrize(
    ("num_samples", "dim", "noise", "chosen"),
    [
        (200, 3, px.Normal(), (px.Sobol(), 2)),
        (199, 3, px.Normal(), (px.Sobol(), 1)),
        (560, 6, px.Gumbel(), (px.Sobol(), 2)),
        (190, 6, px.Gumbel(), (px.OrthogonalArray(), 1)),
        (10_000, 7, px.Gumbel(), (px.Sobol(), 1)),
        (499, 10, px.Normal(), (px.Sobol(), 1)),
        (498, 10, px.Normal(), (px.OrthogonalArray(), 1)),
        (10_000, 11, px.Normal(), (px.OrthogonalArray(), 1)),
        (1201, 100, px.Gumbel(), (px.OrthogonalArray(), 1)),
        (10_000, 101, px.Gumbel(), (px.OrthogonalArray(), 0)),
        (600, 50, px.Gumbel(), (PAIRS, 1)),
        (150, 50, px.Laplace(), (PAIRS, 1)),
        (149, 50, px.Gumbel(), (PAIRS, 0)),
        (600, 51, px.Gumbel(), (PAIRS, 0)),
        (150, 50, px.StudentT(3), (PAIRS, 0)),
        (300, 100, px.StudentT(2), (px.Independent(), 0)),
        (1200, 101, px.Normal(), (PAIRS, 0)),
        (200, 100, px.Gumbel(), (PAIRS, 0)),
        (199, 100, px.Gumbel(), (px.Orthogonal(100), 0)),
        (399, 200, px.Gumbel(), (px.Orthogonal(200), 0)),
        (301, 201, px.Gumbel(), (px.Independent(), 0)),
        (302, 201, px.Gumbel(), (px.Orthogonal(201), 0)),
        (100, 100, px.Gumbel(), (px.Orthogonal(80), 0)),
        (99, 100, px.Gumbel(), (px.Independent(), 1)),
        (25, 100, px.Gumbel(), (px.Independent(), 1)),
        (24, 100, px.Gumbel(), (px.Independent(), 0)),
        (256, 201, px.Normal(), (px.Independent(), 1)),
        (257, 300, px.Normal(), (px.Independent(), 0)),
        (256, 1000, px.Normal(), (px.Independent(), 1)),
        (7, 12, px.Normal(), (px.Independent(), 0)),
        (8, 12, px.Normal(), (px.Independent(), 1)),
        (100, 300, px.StudentT(3), (px.Independent(), 0)),
        (12, 12, px.Gumbel(), (px.Orthogonal(8), 0)),
        (1001, 1001, px.Gumbel(), (px.Independent(), 0)),
        (2000, 1000, px.Gumbel(), (PAIRS, 0)),
        (100_000, 1001, px.Gumbel(), (px.Independent(), 0)),
        (100, 3, px.Cauchy(), (px.Sobol(), 0)),
        (47, 3, px.Normal(), (px.Sobol(), 1)),
        (46, 3, px.Normal(), (px.OrthogonalArray(), 1)),
        (37, 3, px.Normal(), (px.OrthogonalArray(), 1)),
        (36, 3, px.Normal(), (PAIRS, 1)),
        (19, 3, px.Normal(), (PAIRS, 0)),
        (8, 2, px.Normal(), (px.Sobol(), 0)),
        (10, 2, px.Cauchy(), (px.Sobol(), 0)),
        (191, 5, px.Normal(), (px.Sobol(), 1)),
        (191, 4, px.Normal(), (px.Sobol(), 1)),
        (190, 4, px.Normal(), (px.OrthogonalArray(), 1)),
        (11, 3, px.Cauchy(), (px.Independent(), 0)),
        (1, 1, px.Normal(), (px.Independent(), 0)),
        (1000, 0, px.Normal(), (px.Independent(), 0)),
    ],
)
def test_the_default_is_that_of_the_documentation(num_samples, dim, noise, chosen):
    choice = px.choose_sampler(num_samples, dim, noise)
    sampler = choice.sampler.sampler if isinstance(choice.sampler, Merged) else choice.sampler
    assert (sampler, choice.degree) == chosen


def test_the_default_leaves_noise_without_an_inverse_alone():
    choice = px.choose_sampler(1000, 3, Draws())
    assert (choice.sampler, choice.degree) == (px.Independent(), 0)


@pytest.mark.parametrize(
    ("num_samples", "dim", "options", "told"),
    [
        (200, 3, {}, "Sobol nets, because .* Degree 2, because 200 samples are enough"),
        (121, 10, {}, "Orthogonal arrays, because .* of 10 .* need 250 points each. Degree 1"),
        (600, 10, {}, "Sobol nets, because .* so few coordinates. Degree 1"),
        (600, 11, {}, "Orthogonal arrays, because .* miss some functions of 11 .* Degree 1"),
        (600, 60, {}, "opposites, .* Degree 0, because .* in more than 50"),
        (100, 10, {}, "3 groups of 40 .* opposites, because there are 2 to 12 samples .* Degree 1"),
        (100, 10, {"num_nets": 8}, "block=6, .* 9 groups of 12 .* Degree 1, because 30 samples"),
        (256, 31, {}, "^<Orthogonal.*, 2 of its groups as one>, 3 groups .* 2 groups of it count"),
        (19, 10, {}, "Orthogonal directions, because there are 1 to 2 samples for each coord"),
        (19, 10, {"num_nets": 8}, "block=3, .* 7 groups of 3"),
        (400, 250, {}, "Orthogonal directions, because there are 1.5 to 2 samples for each coord"),
        (46, 3, {}, "because .* Sobol nets of 3 coordinates need 24 points"),
        (100, 50, {}, "opposites, .* Degree 0, because a fit of degree 1 needs 150 samples"),
        (100, 101, {}, "pay from 4 samples .* 100 for 101. Degree 1, because each of so few"),
        (100, 101, {"num_outputs": 9}, "Degree 0, because predicting 9 outputs .* costs too much"),
        (100, 101, {"num_outputs": 8}, "Degree 1, because each of so few"),
        (100, 401, {}, "100 for 401. Degree 0, because .* from the rest pays from 101 samples"),
        (300, 301, {}, "300 for 301. Degree 0, because .* each of 300 samples .* costs too much"),
        (4000, 2000, {}, "nets of more than 1000 .* Degree 0, because .* costs too much"),
        (200, 3, {"noise": px.Cauchy()}, "Degree 0, because the noise has too few moments"),
        (200, 3, {"noise": Draws()}, "Independent samples, because Draws has no inverse"),
        (200, 3, {"sampler": px.Sobol(1)}, "Degree 0, because a single group .* for: sampler"),
        (200, 3, {"degree": 1, "sampler": px.Antithetic()}, "Asked for: sampler and degree"),
        (200, 3, {"num_nets": 8}, "8 groups of 25 samples, degree 2"),
        (9, 0, {}, "9 groups of 1 sample, degree 0. .* because there are no coordinates"),
    ],
)
def test_a_choice_says_why(num_samples, dim, options, told):
    choice = px.choose_sampler(num_samples, dim, **options)
    assert re.search(told, str(choice))
    assert repr(choice) == str(choice)


@pytest.mark.parametrize(
    ("num_samples", "dim", "fun", "degree"),
    [(90, 3, jnp.max, 1), (12, 10, jnp.max, 0), (9, 10, jnp.max, 1), (9, 10, jnp.cumsum, 0)],
)
def test_a_choice_is_what_happens(num_samples, dim, fun, degree):
    """Asked for by name, it gives the same numbers."""
    num_outputs = fun(jnp.zeros(dim)).size
    choice = px.choose_sampler(num_samples, dim, px.Normal(), num_outputs=num_outputs)
    assert choice.degree == degree

    def gradient(**options):
        smoothed = px.make_perturbed_fun(fun, num_samples, 0.5, px.Normal(), **options)
        total = lambda x: jnp.sum(smoothed(jax.random.key(2), x))  # noqa: E731
        return jax.grad(total)(jnp.arange(dim) / dim)

    asked = gradient(sampler=choice.sampler, degree=choice.degree)
    np.testing.assert_array_equal(gradient(), asked)


@pytest.mark.parametrize(
    ("args", "options", "error", "told"),
    [
        ((0, 3), {}, ValueError, "num_samples must be >= 1, got 0"),
        ((10, -3), {}, ValueError, "dim must be >= 0, got -3"),
        ((10, np.zeros(2)), {}, TypeError, "dim must be an int, got ndarray"),
        ((10, 3), {"degree": 3}, ValueError, "degree must be None, 0, 1 or 2, got 3"),
        ((10, 3), {"num_nets": 0}, ValueError, "num_nets must be >= 1, got 0"),
        ((10, 3), {"noise": 1.0}, TypeError, "noise must define sample and log_prob"),
        ((10, 3), {"sampler": px.Sobol}, TypeError, "sampler must be an instance"),
        ((10, 3, Draws()), {"sampler": px.Sobol()}, TypeError, "needs noise with an inverse"),
        ((10, 3, px.Cauchy()), {"degree": 1}, ValueError, "needs noise with a finite mean"),
    ],
)
def test_a_choice_among_what_cannot_be_is_refused(args, options, error, told):
    with pytest.raises(error, match=told):
        px.choose_sampler(*args, **options)


def test_one_more_sample_does_not_make_gradients_worse():
    """With 73 samples of 12 coordinates two groups of two blocks had twice the variance of 72."""
    matrix = np.random.RandomState(2).normal(size=(12, 12)) / 4

    def variance(num_samples):
        fun = px.make_perturbed_fun(lambda y: jnp.sum(y + (matrix @ y) ** 2), num_samples, 0.3)
        gradient = lambda key: jax.grad(fun, argnums=1)(key, jnp.linspace(-1, 1, 12))  # noqa: E731
        gradients = jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), 1000))
        return float(np.sum(np.var(gradients, axis=0)))

    assert px.choose_sampler(72, 12).num_groups == 3
    assert px.choose_sampler(73, 12).num_groups == 4
    assert px.choose_sampler(97, 12).num_groups == 3
    assert variance(73) < 1.15 * variance(72)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_samples", [10, 90, 1000])
def test_the_number_of_fits_is_bounded(name, num_samples):
    """Each takes memory and time; with one for each of 500 pairs, 140 coordinates took 20 GiB."""
    choice = px.choose_sampler(num_samples, 20, px.Normal(), sampler=SAMPLERS[name], degree=1)
    assert choice.group_size == choice.sampler.group_size(num_samples, 20)
    assert choice.num_groups == -(-num_samples // choice.group_size) <= 16
    assert (choice.degree, choice.num_groups > 1) in ((1, True), (0, False))


def test_a_surrogate_reaches_nothing_of_its_own_group():
    """A prediction that saw its own sample would be biased most where samples are few."""

    def estimator(key):
        fun = smooth(
            lambda y: (y[0] > 0).astype(jnp.float32), None, 0.5, px.Normal(), 6,
            sampler=px.Independent(), degree=1,
        )  # fmt: skip
        return jax.grad(fun, argnums=1)(key, jnp.array([0.2]))

    exact = np.array([np.exp(-0.08) / np.sqrt(2 * np.pi) / 0.5])
    assert_unbiased(estimator, exact, seed=7, num_keys=65_536, promise=0.02)


@pytest.mark.parametrize(
    "num_samples", [1, 33, 97, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 3, 31))]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_samples_is_evaluated_exactly(name, num_samples):
    fun = px.make_perturbed_fun(
        lambda y: (jnp.sum(y), y), num_samples, 0.5, sampler=SAMPLERS[name], has_aux=True
    )
    value, points = fun(jax.random.key(8), np.zeros(5, np.float32))
    assert points.shape == (num_samples, 5)
    np.testing.assert_allclose(value, np.mean(np.sum(points, axis=1)), rtol=1e-5, atol=1e-5)


@pytest.mark.covering("name")
@pytest.mark.parametrize("batch_size", [50, 1, 16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_batch_size_changes_nothing(name, batch_size):
    x = jnp.array([0.3, -0.2, 0.1])

    def gradient(x, batch_size):
        fun = smooth(
            lambda y: jnp.sum(jnp.abs(y)), x, 0.5, px.Normal(), 96,
            sampler=SAMPLERS[name], degree=1, batch_size=batch_size,
        )  # fmt: skip
        return jax.grad(fun, argnums=1)(jax.random.key(9), x)

    found, expected = jax.jit(lambda x: [gradient(x, size) for size in (batch_size, None)])(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_coordinates(name):
    fun = smooth(lambda y: jnp.sum(y) + 2, None, 0.5, px.Normal(), sampler=SAMPLERS[name])
    gradient = jax.jit(jax.value_and_grad(fun, argnums=1))
    value, slope = gradient(jax.random.key(1), jnp.zeros(0))
    assert (value, slope.shape) == (2, (0,))


def test_errors_name_the_remedy():
    x = jnp.zeros(3)
    with pytest.raises(TypeError, match=r"pass Sobol\(\)"):
        px.make_perturbed_fun(jnp.sum, sampler=px.Sobol)
    with pytest.raises(TypeError, match="group_size and sample_group"):
        px.make_perturbed_fun(jnp.sum, sampler="sobol")
    with pytest.raises(ValueError, match="degree must be None, 0, 1 or 2, got 3"):
        px.make_perturbed_fun(jnp.sum, degree=3)
    with pytest.raises(TypeError, match="degree must be None, 0, 1 or 2, got bool"):
        px.make_perturbed_fun(jnp.sum, degree=True)
    with pytest.raises(TypeError, match=r"Sobol\(\) needs noise with an inverse.*Draws"):
        px.make_perturbed_fun(jnp.sum, noise=Draws(), sampler=px.Sobol())(jax.random.key(0), x)
    with pytest.raises(ValueError, match="degree=1 needs noise with a finite mean"):
        px.make_perturbed_fun(jnp.sum, noise=px.Cauchy(), degree=1)(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"StudentT\(df=2.0\) has none: use degree=0"):
        px.make_perturbed_fun(jnp.sum, noise=px.StudentT(2), degree=1)(jax.random.key(0), x)
    law = pytest.importorskip("numpyro.distributions").Normal(0.0, 1.0)
    with pytest.raises(ValueError, match=r"Python numbers; mean of .* is an array: give a float"):
        px.make_perturbed_fun(jnp.sum, noise=law, degree=1)(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: px.Sobol(0), ValueError, "num_groups must be >= 1, got 0"),
        (lambda: px.Sobol(True), TypeError, "num_groups must be an int, got bool"),
        (lambda: px.Sobol(2.5), TypeError, "num_groups must be an int, got float"),
        (lambda: px.Sobol("2"), TypeError, "num_groups must be an int, got str"),
        (lambda: jax.jit(px.Sobol)(2), TypeError, "num_groups must be static"),
        (lambda: px.Independent(0), ValueError, "block must be >= 1, got 0"),
        (lambda: px.Independent(2.5), TypeError, "block must be an int, got float"),
        (lambda: px.Orthogonal(0), ValueError, "block must be >= 1, got 0"),
        (lambda: px.Orthogonal(-2), ValueError, "block must be >= 1, got -2"),
        (lambda: px.Orthogonal(antithetic="no"), TypeError, "antithetic must be a bool, got 'no'"),
    ],
)
def test_fields_of_samplers_are_checked(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_fields_of_any_integer_type_are_the_same_sampler():
    """A program that is compiled for one serves the other; a JAX array could not be hashed."""
    for count in (np.int64(3), jnp.int32(3)):
        assert px.Sobol(count) == px.Sobol(3)
        assert hash(px.Independent(count)) == hash(px.Independent(3))
    assert repr(px.Orthogonal(np.int8(3), np.True_)) == "Orthogonal(block=3, antithetic=True)"


@dataclasses.dataclass(frozen=True)
class Flipped:
    """Rows of a user's noise with random signs, drawn by its sample in one call of some shape."""

    shape: tuple = (64, 2)
    attribute: str = "sample"

    def group_size(self, num_samples, dim):
        return 64

    def sample_group(self, key, noise, group_size, dim, dtype):
        first, second = jax.random.split(key)
        signs = jnp.where(jax.random.bernoulli(first, shape=(group_size, 1)), 1, -1).astype(dtype)
        return signs * getattr(noise, self.attribute)(second, self.shape, dtype)


def test_a_sampler_draws_as_much_of_a_users_noise_as_it_asks_for():
    """One row came back, whatever the shape, and was spread over the group."""

    def gradient(key, noise):
        smooth = px.make_perturbed_fun(jnp.sum, 640, 0.5, noise, sampler=Flipped())
        return jax.grad(smooth, argnums=1)(key, jnp.zeros(2))

    keys = jax.random.split(jax.random.key(8), 200)
    spread = np.std(jax.jit(jax.vmap(lambda key: gradient(key, Draws())))(keys), axis=0)
    # The root of E[(z^2 + z z' - 1)^2] / 640 = 3 / 640. One row for all of a group would give
    # several times as much.
    np.testing.assert_allclose(spread, np.sqrt(3 / 640), rtol=0.25)


@pytest.mark.parametrize("shape", [(64,), (), (2, 64)])
def test_a_shape_that_noise_was_not_traced_for_is_refused(shape):
    smooth = px.make_perturbed_fun(jnp.sum, 640, 0.5, Draws(), sampler=Flipped(shape))
    with pytest.raises(ValueError, match=r"noise\.sample was asked for .* ends with 2"):
        smooth(jax.random.key(0), jnp.zeros(2))


def test_an_attribute_that_noise_lacks_is_named():
    smooth = px.make_perturbed_fun(jnp.sum, 640, 0.5, Draws(), sampler=Flipped(attribute="icdf"))
    with pytest.raises(AttributeError, match=r"no attribute 'icdf' here.*sample, log_prob"):
        smooth(jax.random.key(0), jnp.zeros(2))


class ShapedLogistic:
    """Its inverse reads the shape of what it is given, which has to be that of one draw."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.logistic(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -inputs - 2 * jnp.log1p(jnp.exp(-inputs))

    def icdf(self, u):
        return jnp.log(u / (1 - u)) + jnp.zeros(u.shape)


@pytest.mark.parametrize(("dim", "num_samples"), [(3, 50), (3, 4000), (10, 1000), (40, 1000)])
def test_nets_of_several_points_to_a_row_invert_users_noise_point_by_point(dim, num_samples):
    """Its inverse was traced for one point, and was given rows of several."""
    options = {"num_samples": num_samples, "sigma": 0.5, "sampler": px.Sobol(), "degree": 0}
    x, key = jnp.zeros(dim), jax.random.key(2)
    own = px.make_perturbed_fun(lambda y: jnp.sin(y), noise=px.Logistic(), **options)
    users = px.make_perturbed_fun(lambda y: jnp.sin(y), noise=ShapedLogistic(), **options)
    np.testing.assert_allclose(users(key, x), own(key, x), atol=1e-5)


@pytest.mark.parametrize(("steepness", "left"), [(1.0, 0.15), (60.0, 0.32)])
def test_a_fit_sees_values_of_any_range(steepness, left):
    """Rows of a net a power of two apart lie together: softplus is next to nothing at all of them.

    In such a unit the other values' squares overflowed, and the polynomial was dropped.
    """

    def soft(y):
        return jnp.sum(jax.nn.softplus(steepness * y))

    def spread(**settings):
        g = px.make_perturbed_fun(soft, 1000, 1.0, px.Normal(), **settings)
        keys = jax.random.split(jax.random.key(1), 300)
        gradients = jax.jit(jax.vmap(jax.grad(g, argnums=1), (0, None)))(keys, jnp.zeros(1))
        return float(np.std(gradients))

    assert spread() < left * spread(degree=0)


@pytest.mark.parametrize(("group_size", "count"), [(45, 10), (40, 10), (6, 6), (1, 6), (4, 12)])
def test_samples_taken_a_few_at_a_time_are_those_of_whole_groups(group_size, count):
    key, drawn = jnp.array([3, 5], jnp.uint32), []
    sampler = px.Orthogonal() if group_size > 1 else px.Independent()
    smooth = px.make_perturbed_fun(jnp.sum, group_size, noise=px.Normal(), sampler=sampler)
    call = smooth.prepare(jax.random.key(0), jnp.zeros(45), (), {})
    assert call.plan.group_size == group_size
    turns = 13
    for turn in range(turns):
        first = jnp.uint32(turn * count)
        drawn.append(_chunks.draw_next(call.plan, key, call.operands, first, count))
    groups = -(-turns * count // group_size)
    sizes = group_size, 45, np.dtype(np.float32)
    whole = _draw_groups.draw(px.Normal(), sampler, key, jnp.uint32(0), groups, *sizes)
    np.testing.assert_allclose(jnp.concatenate(drawn), whole[: turns * count], atol=1e-5)
