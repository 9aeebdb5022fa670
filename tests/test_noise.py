"""The laws of noise: draws, densities, orders of derivatives, other libraries' laws, checks."""

import dataclasses
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import closed_forms as cf
import perturbax as px
from helpers import assert_distributed_as, assert_unbiased, enable_x64
from perturbax.noise._foreign import as_noise
from perturbax.noise._inverse import from_normal, from_words
from perturbax.noise._traced import trace_noise

LAWS = {
    "Normal": (px.Normal(), cf.normal),
    "Gumbel": (px.Gumbel(), cf.gumbel),
    "Logistic": (px.Logistic(), cf.logistic),
    "Laplace": (px.Laplace(), cf.laplace),
    "Cauchy": (px.Cauchy(), cf.cauchy),
    "StudentT": (px.StudentT(6), cf.student_t(6.0)),
    "Triangular": (px.Triangular(), cf.triangular),
    "Uniform": (px.Uniform(), cf.uniform),
}
SYMMETRIC = [name for name in LAWS if name != "Gumbel"]
WITH_SCORE = [name for name in LAWS if name != "Uniform"]
KEY = jax.random.key(20)

every_law = pytest.mark.parametrize("name", LAWS)
with_score = pytest.mark.parametrize("name", WITH_SCORE)


def words(bits):
    """Random words, the outermost ones, and those next to the centre and to powers of two."""
    kind = np.uint32 if bits == 32 else np.uint64
    low = np.arange(64, dtype=kind)
    powers = 2 ** np.arange(bits, dtype=kind)
    random = np.random.default_rng(5).integers(0, 2**bits, 20_000, dtype=kind)
    lower = np.concatenate([low, powers[:-1], powers[-1] - low[1:], random // 2])
    return np.sort(np.concatenate([lower, ~lower]))


def tails(values):
    """What the words stand for: the distance to the nearer end of (0, 1), and which end it is."""
    bits = values.itemsize * 8
    upper = values >> (bits - 1) == 1
    folded = np.where(upper, ~values, values)
    if bits == 64:
        return ((folded >> np.uint64(10)).astype(np.float64) + 0.5) * 2.0**-54, upper
    return (folded.astype(np.float64) + 0.5) * 2.0**-32, upper


@functools.cache
def drawn(name):
    """What a law makes of the words, by one program for all tests that look at it."""
    return np.asarray(jax.jit(LAWS[name][0].from_bits)(words(32)))


def quantiles(law, tail, upper):
    """Of scipy's law, accurate in both tails."""
    return np.where(upper, law.isf(tail), law.ppf(tail))


# --- Draws


@every_law
def test_words_become_quantiles(name):
    z = drawn(name)
    exact = quantiles(LAWS[name][1].law, *tails(words(32)))
    assert z.dtype == np.float32
    assert np.max(np.abs(z - exact) / np.maximum(np.abs(exact), 1)) < 1e-6


@every_law
def test_wide_words_become_quantiles(name):
    noise, reference = LAWS[name]
    values = words(64)
    with enable_x64(True):
        z = np.asarray(jax.jit(noise.from_bits)(values))
    tail, upper = tails(values)
    sign = np.where(upper, 1, -1)
    if name == "Triangular":  # scipy's loses half the digits next to the ends
        exact = sign * (1 - np.sqrt(2 * tail))
    elif name == "Cauchy":  # as does that of scipy 1.13
        exact = sign / np.tan(np.pi * tail)
    elif name == "StudentT":  # of which that loses a few
        near = scipy.special.betainccinv(0.5, noise.df / 2, 2 * tail)
        far = scipy.special.betaincinv(noise.df / 2, 0.5, 2 * tail)
        ratio = np.where(near < 0.5, near / (1 - near), 1 / far - 1)
        exact = sign * np.sqrt(noise.df * ratio)
    else:
        exact = quantiles(reference.law, tail, upper)
    assert z.dtype == np.float64
    assert np.max(np.abs(z - exact) / np.maximum(np.abs(exact), 1)) < 1e-13


@pytest.mark.parametrize("df", [1, 1.5, 2, 3, 10, 100, 1e4])
def test_student_quantiles_for_any_df(df):
    values = words(32)
    z = np.asarray(px.StudentT(df).from_bits(jnp.asarray(values)))
    exact = quantiles(scipy.stats.t(df), *tails(values))
    assert np.max(np.abs(z - exact) / np.maximum(np.abs(exact), 1)) < 4e-6


@every_law
def test_draws_increase_in_the_words(name):
    z = drawn(name).astype(np.float64)
    # Up to a unit in the last place.
    assert np.min(np.diff(z) / np.maximum(np.abs(z[1:]), 1)) > -2e-7


@pytest.mark.parametrize("name", SYMMETRIC)
def test_complements_are_opposites(name):
    values = words(32)
    np.testing.assert_array_equal(~values, values[::-1])
    np.testing.assert_array_equal(drawn(name)[::-1], -drawn(name))


def test_gumbel_reaches_into_both_tails():
    ends = np.isin(words(32), [0, 2**32 - 1])
    np.testing.assert_allclose(
        drawn("Gumbel")[ends], [-np.log(33 * np.log(2)), 33 * np.log(2)], rtol=1e-6
    )


@every_law
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_follow_the_law(name, dtype):
    noise, reference = LAWS[name]
    with enable_x64(dtype == "float64"):
        z = jax.jit(lambda: noise.sample(jax.random.key(7), (300, 400), dtype))()
    assert z.dtype == dtype
    assert z.shape == (300, 400)
    assert_distributed_as(z, reference.law.cdf)


@every_law
def test_half_precision_is_rounded_single_precision(name):
    noise, _ = LAWS[name]
    half, single = jax.jit(
        lambda: [noise.sample(KEY, (1000,), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    )()
    assert half.dtype == jnp.bfloat16
    if name != "Triangular":
        half, single = np.asarray(half), np.asarray(single)
        np.testing.assert_array_equal(half, single.astype(half.dtype))


def test_triangular_stays_inside_in_half_precision():
    noise = px.Triangular()
    z = jax.jit(lambda: noise.sample(KEY, (200_000,), jnp.bfloat16))()
    assert np.max(np.abs(np.asarray(z, np.float32))) < 1
    # A program of its own: one for both might keep more digits of z.
    assert np.isfinite(np.asarray(jax.jit(noise.log_prob)(z), np.float32)).all()


@every_law
def test_dtype_must_be_floating(name):
    with pytest.raises(TypeError, match="dtype must be a floating dtype, got int32"):
        LAWS[name][0].sample(KEY, (3,), jnp.int32)


@every_law
def test_defaults_give_one_number_of_the_default_dtype(name):
    z = jax.eval_shape(LAWS[name][0].sample, KEY)
    assert z.shape == ()
    assert z.dtype == jnp.float32


# --- Densities


@every_law
def test_log_prob_is_that_of_the_law_up_to_a_constant(name):
    noise, reference = LAWS[name]
    z = np.linspace(-0.99, 0.99, 41) * (1 if name in ("Triangular", "Uniform") else 4)
    log_prob = np.asarray(jax.jit(noise.log_prob)(z.astype(np.float32)))
    difference = log_prob - reference.law.logpdf(z)
    np.testing.assert_allclose(difference, difference[20], atol=2e-5)
    if name not in ("Normal", "StudentT"):
        np.testing.assert_allclose(difference, 0, atol=2e-5)


@pytest.mark.parametrize("name", ["Triangular", "Uniform"])
def test_there_is_no_density_outside_the_support(name):
    log_prob = jax.jit(LAWS[name][0].log_prob)
    np.testing.assert_array_equal(log_prob(np.float32([-1.5, 1.5])), -np.inf)


@with_score
def test_score_is_minus_the_slope_of_log_prob(name):
    noise, reference = LAWS[name]
    z = np.linspace(-0.95, 0.95, 20) * (1 if name == "Triangular" else 6)
    score, slope = jax.jit(lambda z: (noise.score(z), jax.vmap(jax.grad(noise.log_prob))(z)))(
        z.astype(np.float32)
    )
    slope = np.asarray(slope)
    np.testing.assert_allclose(score, -slope, rtol=2e-5, atol=3e-7)
    np.testing.assert_allclose(-slope, -reference.pdf1(z) / reference.pdf(z), rtol=2e-5, atol=3e-7)


@with_score
def test_a_score_at_the_kink_and_outside_is_finite(name):
    score = jax.jit(LAWS[name][0].score)
    assert np.isfinite(score(np.float32([-2.0, 0.0, 2.0]))).all()


@every_law
def test_cdf(name):
    noise, reference = LAWS[name]
    z = np.linspace(-3, 3, 61)
    np.testing.assert_allclose(
        jax.jit(noise.cdf)(z.astype(np.float32)), reference.law.cdf(z), rtol=2e-5, atol=1e-9
    )


@every_law
def test_icdf_and_its_ends(name):
    noise, reference = LAWS[name]
    u = np.array([1e-6, 0.01, 0.3, 0.5, 0.7, 0.99], np.float32)
    exact = reference.law.ppf(u.astype(np.float64))
    ends, outside = np.float32([0, 1]), np.float32([-0.1, 1.1])
    found = np.asarray(jax.jit(noise.icdf)(np.concatenate([u, ends, outside])))
    np.testing.assert_allclose(found[:-4], exact, rtol=3e-6, atol=1e-6)
    np.testing.assert_array_equal(found[-4:-2], reference.law.support())
    assert np.isnan(found[-2:]).all()


@every_law
def test_normal_numbers_become_the_law(name):
    noise, reference = LAWS[name]
    z = np.linspace(-6, 6, 121)
    exact = quantiles(reference.law, scipy.stats.norm.sf(np.abs(z)), z > 0)
    far = np.concatenate([z, [-30, 30]]).astype(np.float32)
    *mapped, low, high = np.asarray(jax.jit(lambda z: from_normal(noise, z))(far))
    assert np.max(np.abs(mapped - exact) / np.maximum(np.abs(exact), 1)) < 2e-5
    assert np.isfinite([low, high]).all()


def test_normal_numbers_become_gumbel_noise_to_rounding():
    """By quotients of polynomials; the score is the exponential of minus the noise."""
    z = np.linspace(-13, 13, 20_001, dtype=np.float32)
    exact = -np.log(-scipy.special.log_ndtr(z.astype(np.float64)))
    mapped = np.asarray(jax.jit(px.Gumbel().from_normal)(z))
    assert np.max(np.abs(mapped - exact) / np.maximum(np.abs(exact), 1)) < 1e-6
    assert np.max(np.abs(np.exp(exact - mapped) - 1)[z < 0]) < 3e-6
    assert np.all(np.diff(mapped) >= 0)


def test_a_noise_with_nothing_but_an_icdf_is_mapped_through_it():
    class Inverse:
        def icdf(self, u):
            return jax.scipy.special.logit(u)

    @jax.jit
    def mapped(values, z):
        noise = Inverse()
        return from_words(noise, values), from_normal(noise, z), from_normal(px.Logistic(), z)

    values = words(32)
    found, *normal = map(np.asarray, mapped(values, np.float32([-3.0, 0.5, 9.0])))
    assert np.isfinite(found).all()
    inner = (values > np.uint32(2**16)) & (values < np.uint32(2**31))
    np.testing.assert_allclose(found[inner], drawn("Logistic")[inner], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normal[0][:2], normal[1][:2], rtol=1e-5)
    assert np.isfinite(normal[0]).all()


@pytest.mark.parametrize("wide", [False, True])
def test_a_noise_with_nothing_but_from_bits_is_mapped_through_it(wide):
    """Orthogonal directions asked it for an icdf."""

    class FromBits:
        from_bits = px.Logistic().from_bits

    with enable_x64(wide):
        z = jnp.array([-30, -5, -3, -1e-7, 0, 1e-7, 0.5, 5, 30], jnp.float64 if wide else "f4")
        found, exact = (
            np.asarray(jax.jit(functools.partial(from_normal, noise))(z))
            for noise in (FromBits(), px.Logistic())
        )
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(found[2:-2], exact[2:-2], rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()
    assert found.dtype == exact.dtype


# --- Moments


@every_law
def test_moments(name):
    noise, reference = LAWS[name]
    if name == "Cauchy":
        np.testing.assert_array_equal([noise.moment(k) for k in range(3)], [1, np.nan, np.inf])
        assert np.isnan([noise.mean, noise.variance]).all()
        return
    np.testing.assert_allclose([noise.moment(k) for k in range(5)], reference.moments, atol=1e-12)
    np.testing.assert_allclose([noise.mean, noise.variance], reference.law.stats("mv"), atol=1e-12)


@every_law
def test_the_order_of_a_moment_is_checked(name):
    with pytest.raises(ValueError, match="order must be an int >= 0"):
        LAWS[name][0].moment(-1)


@pytest.mark.parametrize(
    ("df", "mean", "variance"), [(1, math.nan, math.nan), (2, 0, math.inf), (2.5, 0, 5.0)]
)
def test_moments_of_student_exist_below_df(df, mean, variance):
    noise = px.StudentT(df)
    np.testing.assert_array_equal([noise.mean, noise.variance], [mean, variance])
    assert noise.moment(4) == math.inf
    assert math.isnan(noise.moment(3))


@pytest.mark.parametrize("df", [1, 3, 1e2, 3e3, 1e5, 1e8, 1e12])
def test_student_probabilities_for_any_df(df):
    """Near 1 the argument of the incomplete beta function was rounded, at last to 1."""
    z = np.linspace(-6, 6, 49)
    exact = scipy.stats.t.cdf(z, df)
    np.testing.assert_allclose(jax.jit(px.StudentT(df).cdf)(z.astype(np.float32)), exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("df", "error"),
    [
        (0.5, ValueError),
        (math.inf, ValueError),
        (2e12, ValueError),
        ("3", TypeError),
        (True, TypeError),
    ],
)
def test_df_is_checked(df, error):
    with pytest.raises(error, match="df must be"):
        px.StudentT(df)


@with_score
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_score_identities_hold_for_the_draws(name, dtype):
    """E[s] = 0 and E[z s] = 1: what a draw in half precision, or another density, would break."""
    noise, _ = LAWS[name]

    @jax.jit
    def draws_and_scores(key):
        z = noise.sample(key, (400_000,), dtype)
        return z, -jax.vmap(jax.grad(noise.log_prob))(z)

    with enable_x64(dtype == "float64"):
        z, s = (np.asarray(v, np.float64) for v in draws_and_scores(jax.random.key(31)))
    for values, exact in ((s, 0), (z * s, 1)):
        error = values.std() / math.sqrt(values.size)
        assert error < (0.02 if name == "Triangular" else 0.004)
        assert abs(values.mean() - exact) < 5 * error


def test_the_fourth_moment_of_gumbels_score_is_nine():
    """The lowest draws decide it; with coarse ones it comes out as 19."""
    draw = jax.jit(lambda: px.Gumbel().sample(jax.random.key(2), (4_000_000,)))
    z = np.asarray(draw(), np.float64)
    fourth = (1 - np.exp(-z)) ** 4
    # E[(E - 1)^8] = 14833 for an exponential number E.
    error = math.sqrt((14833 - 81) / z.size)
    assert abs(fourth.mean() - 9) < 5 * error < 0.31
    # No draw is where at most 1e-9 of them may be expected.
    assert z.min() > -math.log(-math.log(1e-10))


def test_the_fourth_moment_of_gumbels_score_by_all_words():
    """The same without chance: words on a grid, finer towards the end that counts."""
    edges = np.array([0, *(2**k for k in range(8, 33))])
    inside = np.linspace(edges[:-1], edges[1:] - 1, 2048).astype(np.uint32)
    z = np.asarray(jax.jit(px.Gumbel().from_bits)(inside), np.float64)
    total = np.sum(np.mean((1 - np.exp(-z)) ** 4, axis=0) * np.diff(edges) / 2**32)
    assert abs(total - 9) < 0.01


# --- Derivatives


def step_case(name):
    cases = {case.name: case for case in cf.cases(LAWS[name][1])}
    return cases["step"]


@with_score
def test_gradient_by_quadrature(name):
    """E[f(x + sigma z) s(z)] / sigma over an even grid of probabilities: no chance at all."""
    noise, _ = LAWS[name]
    case = step_case(name)
    values = np.arange(2**31 // 2**17, 2**32, 2**32 // 2**17, dtype=np.uint32)
    z, score = map(np.float64, jax.jit(lambda v: (z := noise.from_bits(v), noise.score(z)))(values))
    for i, (x, weight) in enumerate(zip(case.x, cf.WEIGHTS, strict=True)):
        f = weight * (x + case.sigma * z > 0)
        gradient = np.mean(f * score) / case.sigma
        assert abs(gradient / case.exact.gradient[i] - 1) < 5e-3


@pytest.mark.parametrize("name", ["Logistic", "Laplace", "Cauchy", "StudentT"])
def test_derivatives_are_unbiased(name):
    noise, _ = LAWS[name]
    case = step_case(name)
    smooth = noise.derivatives > 1

    def estimator(key, x, sigma):
        def value(p):
            return px.make_perturbed_fun(case.fun, 512, sigma=p[-1], noise=noise)(key, p[:-1])

        first = jax.grad(value)
        p = jnp.append(x, sigma)
        if not smooth:
            gradient = first(p)
            return {"gradient": gradient[:-1], "dsigma": gradient[-1]}
        gradient, push = jax.linearize(first, p)
        second = jax.vmap(push)(jnp.eye(p.size))
        return {
            "gradient": gradient[:-1],
            "dsigma": gradient[-1],
            "hessian": second[:-1, :-1],
            "mixed": second[:-1, -1],
        }

    names = ("gradient", "dsigma", "hessian", "mixed")
    exact = case.exact.as_dict(*(names if smooth else names[:2]))
    promise = {"gradient": 0.02, "dsigma": 0.05, "hessian": 0.08, "mixed": 0.08}
    assert_unbiased(
        estimator,
        exact,
        seed=71,
        num_keys=2048,
        args=(jnp.asarray(case.x, jnp.float32), jnp.float32(case.sigma)),
        promise={key: promise[key] for key in exact},
    )


class ManyDerivatives:
    derivatives = 1000

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -(inputs**2) / 2


def test_a_noise_may_promise_any_number_of_derivatives():
    """As many rules were made at once, one inside the other: RecursionError."""
    assert np.isfinite(jax.grad(lambda x: scalar_estimate(ManyDerivatives(), x))(X)).all()


def scalar_estimate(noise, x, sigma=0.5):
    fun = px.make_perturbed_fun(lambda y: jnp.sum(y**2), 8, sigma=sigma, noise=as_noise(noise))
    return fun(KEY, x)


X = jnp.array([0.25, -0.5])
FIRST_DERIVATIVES = {
    "grad": lambda f: jax.grad(f)(X),
    "grad in jit": lambda f: jax.jit(jax.grad(f))(X),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(X[None]),
    "scan": lambda f: jax.lax.scan(lambda x, _: (jax.grad(f)(x), None), X, length=2),
    "sigma": lambda f: jax.grad(lambda sigma: f(X, sigma))(0.5),
}
SECOND_DERIVATIVES = {
    "hessian": lambda f: jax.hessian(f)(X),
    "hessian in jit": lambda f: jax.jit(jax.hessian(f))(X),
    "grad of grad": lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x)))(X),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f))(X),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f))(X),
    "jvp of jvp": lambda f: jax.jvp(lambda x: jax.jvp(f, (x,), (X,))[1], (X,), (X,)),
    "jvp of grad": lambda f: jax.jvp(jax.grad(f), (X,), (X,)),
    "x and sigma": lambda f: jax.jacfwd(lambda sigma: jax.grad(f)(X, sigma))(0.5),
    "sigma twice": lambda f: jax.grad(jax.grad(lambda sigma: f(X, sigma)))(0.5),
}


class Flat:
    """A user's Uniform, under another name."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.uniform(key, sample_shape, dtype, -1, 1)

    def log_prob(self, inputs):
        return jnp.where(jnp.abs(inputs) <= 1, -jnp.log(2.0), -jnp.inf)


class TwoSided:
    """A user's Laplace, under another name; the log-density of all coordinates together."""

    def sample(self, key, sample_shape=(), dtype=float):
        return 2 * jax.random.laplace(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -jnp.sum(jnp.abs(inputs / 2))


class OneSided:
    """A user's Exponential, under another name."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.exponential(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return jnp.where(inputs >= 0, -inputs, -jnp.inf)


class Bell:
    """A user's Normal."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -0.5 * inputs**2


class Declared(TwoSided):
    derivatives = 1

    def log_prob(self, inputs):  # of two logistic pieces: nothing in it gives the kink away
        return -jnp.sum(jax.nn.softplus(jnp.abs(inputs)))


class Tripled(px.Normal):
    """Three times a law of the library, by methods of its own."""

    def sample(self, key, sample_shape=(), dtype=float):
        return 3 * super().sample(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return super().log_prob(inputs / 3)


class Composed:
    """The same without inheriting anything."""

    def sample(self, key, sample_shape=(), dtype=float):
        return 3 * px.Normal().sample(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return px.Normal().log_prob(inputs / 3)


class Cut(px.Normal):
    """With a density that jumps."""

    def log_prob(self, inputs):
        return jnp.where(jnp.abs(inputs) < 1, jnp.zeros_like(inputs), -jnp.inf)


class Named(px.Normal):
    """The library's own law under another name."""


@dataclasses.dataclass(frozen=True)
class Scaled(px.Normal):
    """One with a number of its own."""

    variance: float

    def sample(self, key, sample_shape=(), dtype=float):
        return self.variance**0.5 * super().sample(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -(inputs**2) / (2 * self.variance)

    def mean(self):
        return 0.0


class Quantiles(px.Normal):
    """Three times the law, by its quantiles and its density."""

    def icdf(self, u):
        return 3 * super().icdf(u)

    def log_prob(self, inputs):
        return super().log_prob(inputs / 3)


ORDERS = [
    (px.Normal(), math.inf),
    (px.Laplace(), 1),
    (px.Triangular(), 1),
    (px.Uniform(), 0),
    (Bell(), math.inf),
    (TwoSided(), 1),
    (Declared(), 1),
    (Flat(), 0),
    (OneSided(), 0),
]
each_order = pytest.mark.parametrize(
    ("noise", "order"), ORDERS, ids=lambda v: type(v).__name__ if hasattr(v, "sample") else str(v)
)


@each_order
def test_the_value_is_always_there(noise, order):
    assert jax.eval_shape(lambda x: scalar_estimate(noise, x), X).shape == ()


@pytest.mark.covering("order", "how")
@each_order
@pytest.mark.parametrize("how", FIRST_DERIVATIVES)
def test_first_derivatives_or_an_error(noise, order, how):
    def trace():
        derivative = FIRST_DERIVATIVES[how]
        return jax.make_jaxpr(lambda: derivative(lambda *args: scalar_estimate(noise, *args)))()

    if order >= 1:
        trace()
    else:
        message = f"order 1 was asked for, but the noise {type(noise).__name__}.*values only"
        with pytest.raises(NotImplementedError, match=message):
            trace()


@pytest.mark.covering("order", "how")
@each_order
@pytest.mark.parametrize("how", SECOND_DERIVATIVES)
def test_second_derivatives_or_an_error(noise, order, how):
    def trace():
        derivative = SECOND_DERIVATIVES[how]
        return jax.make_jaxpr(lambda: derivative(lambda *args: scalar_estimate(noise, *args)))()

    if order >= 2:
        trace()
    else:
        message = rf"order {order + 1} was asked for.*{type(noise).__name__}.*such as Normal\(\)"
        with pytest.raises(NotImplementedError, match=message):
            trace()


def test_a_law_made_of_one_of_the_library_has_its_own_draws_and_moments():
    """Quantiles and moments that it inherits are not its own: there was silently no factor 3."""

    def estimates(noise):
        smooth = px.make_perturbed_fun(lambda y: jnp.sum(y**2), 40, 0.5, noise)
        return jax.value_and_grad(smooth, argnums=1)(KEY, jnp.array([0.5, -1.0]))

    jax.tree.map(np.testing.assert_array_equal, estimates(Tripled()), estimates(Composed()))
    assert px.choose_sampler(40, 2, Tripled()).sampler == px.Independent()
    assert px.check_noise(Tripled())
    assert px.choose_sampler(40, 2, Scaled(9.0), degree=1).degree == 1
    assert px.check_noise(Quantiles())
    assert px.choose_sampler(40, 2, Named()).sampler == px.choose_sampler(40, 2).sampler
    with pytest.raises(NotImplementedError, match="Cut is good for values only"):
        estimates(Cut())


@pytest.mark.parametrize("degree", [None, 1])
def test_noise_for_values_only_serves_all_that_needs_no_derivative_in_x(degree):
    """A fit needs the first derivative of the density; it raised where nobody asked for one."""

    def fun(y, w):
        return w * jnp.sum(y**2)

    def seen(y, w):
        jax.debug.callback(lambda v: None, y[0])
        return fun(y, w)

    x, w = jnp.array([0.5, -1.0, 2.0]), 3.0
    options = {"num_samples": 100, "sigma": 0.5, "noise": px.Uniform(), "degree": degree}
    smooth = px.make_perturbed_fun(fun, **options)
    value = smooth(KEY, x, w)
    slope = jax.grad(smooth, argnums=2)(KEY, x, w)
    with_aux = px.make_perturbed_fun(lambda y, w: (fun(y, w), y), has_aux=True, **options)
    others = [with_aux(KEY, x, w)[0], px.make_perturbed_fun(seen, **options)(KEY, x, w), w * slope]
    np.testing.assert_allclose(others, [value] * 3, rtol=1e-6)
    assert px.choose_sampler(100, 3, px.Uniform()).degree == 0
    with pytest.raises(NotImplementedError, match="good for values only"):
        jax.grad(smooth, argnums=1)(KEY, x, w)


@pytest.mark.parametrize("noise", [px.Laplace(), px.Uniform(), TwoSided()])
def test_derivatives_in_other_arguments_do_not_count(noise):
    fun = px.make_perturbed_fun(
        lambda y, theta: jnp.sum(theta * y**2), 8, sigma=0.5, noise=as_noise(noise)
    )
    jax.make_jaxpr(jax.hessian(fun, argnums=2))(KEY, X, X)
    if not isinstance(noise, px.Uniform):
        jax.make_jaxpr(jax.jacfwd(jax.grad(fun, argnums=1), argnums=2))(KEY, X, X)
        jax.make_jaxpr(jax.jacrev(jax.grad(fun, argnums=2), argnums=1))(KEY, X, X)


@pytest.mark.parametrize("noise", [px.Laplace(), px.Triangular()])
def test_limits_hold_with_aux_and_many_outputs(noise):
    many = px.make_perturbed_fun(lambda y: jnp.outer(y, y).ravel(), 8, 0.5, noise, batch_size=4)
    wide = px.make_perturbed_fun(lambda y: jnp.tile(y, 8), 8, 0.5, noise)
    aux = px.make_perturbed_fun(lambda y: (jnp.sum(y), y), 8, 0.5, noise, has_aux=True)
    for fun, options in ((many, {}), (wide, {}), (aux, {"has_aux": True})):
        first = jax.jacrev(fun, argnums=1, **options)
        jax.make_jaxpr(first)(KEY, X)
        with pytest.raises(NotImplementedError, match="order 2"):
            jax.make_jaxpr(jax.jacfwd(first, argnums=1, **options))(KEY, X)


def test_scores_count_as_a_derivative():
    assert jax.grad(px.Laplace().log_prob)(0.5) == -1
    with pytest.raises(NotImplementedError, match="order 2"):
        jax.grad(px.Laplace().score)(0.5)
    with pytest.raises(NotImplementedError, match="order 1"):
        px.Uniform().score(0.5)


# --- Other conventions


class Numpyros:
    """The convention of numpyro."""

    batch_shape = event_shape = ()

    def __init__(self, loc=0.0, scale=1.0):
        self.loc, self.scale = loc, scale

    def sample(self, key, sample_shape=()):
        return self.loc + self.scale * jax.random.normal(key, sample_shape)

    def log_prob(self, value):
        return -0.5 * ((value - self.loc) / self.scale) ** 2


class Distraxs(Numpyros):
    """The convention of distrax."""

    def sample(self, *, seed, sample_shape=()):
        return super().sample(seed, sample_shape)

    def mean(self):
        return jnp.asarray(self.loc)


class TensorFlows(Numpyros):
    """The convention of TensorFlow Probability."""

    def sample(self, sample_shape=(), seed=None, name="sample", **kwargs):
        return super().sample(seed, sample_shape)

    def quantile(self, value, name="quantile", **kwargs):
        return self.loc + self.scale * jax.scipy.special.ndtri(value)

    def mean(self, name="mean", **kwargs):
        return jnp.asarray(self.loc)


class Conditionals(Numpyros):
    """The convention of numpyro with something else, which may be left out, in third place."""

    def sample(self, key, sample_shape=(), condition=None):
        assert condition is None
        return super().sample(key, sample_shape)


class Positional(Numpyros):
    """This library's convention under other names."""

    def sample(self, k, shape, kind):
        assert kind == jnp.float32
        return super().sample(k, shape)


CONVENTIONS = [Numpyros, Distraxs, TensorFlows, Conditionals, Positional]


@pytest.mark.parametrize("law", CONVENTIONS)
def test_conventions_are_recognised(law):
    noise = as_noise(law(0.5, 2.0))
    z = noise.sample(KEY, (3,), jnp.float32)
    np.testing.assert_array_equal(z, 0.5 + 2 * jax.random.normal(KEY, (3,)))
    np.testing.assert_allclose(noise.log_prob(z), -0.5 * ((z - 0.5) / 2) ** 2, rtol=1e-6)


def test_what_a_distribution_knows_is_passed_on():
    assert as_noise(TensorFlows(0.5)).mean == 0.5
    np.testing.assert_allclose(as_noise(TensorFlows(0.5)).icdf(0.5), 0.5)
    assert not hasattr(as_noise(Numpyros()), "mean")
    assert not hasattr(as_noise(Distraxs()), "icdf")
    assert not hasattr(as_noise(Numpyros()), "from_bits")
    assert as_noise(Declared()).derivatives == 1


class Transformeds(Numpyros):
    """The convention of numpyro, where it does not know the moments of a law."""

    @property
    def mean(self):
        raise NotImplementedError

    @property
    def variance(self):
        raise NotImplementedError


def test_moments_that_are_not_implemented_are_none():
    """The error of the property was once all that a call came to."""
    noise = as_noise(Transformeds())
    assert not hasattr(noise, "mean")
    assert not hasattr(noise, "variance")
    with pytest.raises(AttributeError, match="Transformeds does not know its mean"):
        _ = noise.mean
    known, unknown = (px.make_perturbed_fun(jnp.sum, 8, 0.5, v) for v in (Numpyros(), noise))
    np.testing.assert_array_equal(unknown(KEY, X), known(KEY, X))


def test_own_noise_is_left_alone():
    noise = px.Gumbel()
    assert as_noise(noise) is noise
    adapted = as_noise(Bell())
    assert as_noise(adapted) is adapted


@pytest.mark.parametrize("law", [*CONVENTIONS, TwoSided])
def test_adapted_noise_traces_to_the_same_program(law):
    """So that an eager call compiles once."""
    traces = [trace_noise(as_noise(law()), KEY, 3, np.dtype("float32"))[0] for _ in range(2)]
    assert traces[0] == traces[1]
    assert hash(traces[0]) == hash(traces[1])


class Stretched:
    """Normal noise of a scale of its own, drawn by from_bits."""

    def __init__(self, scale):
        self.scale = scale

    def sample(self, key, sample_shape=(), dtype=float):
        return self.scale * jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -0.5 * (inputs / self.scale) ** 2

    def from_bits(self, bits):
        return self.scale * px.Normal().from_bits(bits)


@dataclasses.dataclass(frozen=True)
class FrozenStretched:
    scale: jax.Array

    sample, log_prob, from_bits = Stretched.sample, Stretched.log_prob, Stretched.from_bits


@pytest.mark.parametrize(
    "sampler", [px.Independent(), px.Antithetic(), px.Sobol()], ids=lambda s: type(s).__name__
)
def test_from_bits_reads_parameters_at_each_call(sampler):
    """It was part of the compiled program: changes went unseen, and arrays could not be hashed."""
    run = lambda noise: px.make_perturbed_fun(  # noqa: E731
        lambda y: jnp.sum(y), 8, 0.5, noise, sampler=sampler
    )(KEY, jnp.zeros(2))
    expected = run(px.Normal())
    noise = Stretched(1.0)
    results = [run(noise)]
    noise.scale = 3.0
    results += [run(noise), run(FrozenStretched(jnp.float32(3.0)))]
    results += [run(FrozenStretched(np.array(3.0, np.float32)))]
    np.testing.assert_allclose(results, expected * np.array([1, 3, 3, 3]), rtol=1e-5, atol=1e-6)


def test_from_bits_of_a_scaled_law_is_a_scaled_sigma():
    """Sample by sample, for the samples are the same, and so is the density at each."""
    x = jnp.array([0.5, -1.0])
    settings = {"sampler": px.Independent(), "degree": 0}
    gradients = [
        jax.grad(
            px.make_perturbed_fun(lambda y: jnp.sum(y**2), 8, sigma, noise, **settings), argnums=1
        )(KEY, x)
        for sigma, noise in [(0.5, Stretched(1.5)), (0.75, px.Normal())]
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4)


def test_location_and_scale_count_and_can_be_differentiated():
    """E[sum (x + sigma z)^2], z of mean m and deviation c: 2 (x + sigma m) and 2 sigma^2 c D."""
    x = jnp.array([0.5, -1.0])

    def value(key, x, scale):
        noise = as_noise(Normalised(0.5, scale))
        return px.make_perturbed_fun(lambda y: jnp.sum(y**2), 64, 0.5, noise)(key, x)

    def estimator(key):
        gradient, scale = jax.grad(value, argnums=(1, 2))(key, x, 1.5)
        return {"gradient": gradient, "scale": scale}

    exact = {"gradient": 2 * (np.array([0.5, -1.0]) + 0.25), "scale": 2 * 0.25 * 1.5 * 2}
    assert_unbiased(
        estimator, exact, seed=3, num_keys=8192, promise={"gradient": 0.03, "scale": 0.05}
    )


class Normalised(Numpyros):
    """With the part of the log-density that depends on the scale."""

    def log_prob(self, value):
        return super().log_prob(value) - jnp.log(self.scale)


def test_batches_and_vectors_are_refused():
    class Batch(Numpyros):
        batch_shape = (3,)

    class Vector(Numpyros):
        event_shape = (3,)

    with pytest.raises(ValueError, match=r"batch_shape \(3,\).*as sigma"):
        as_noise(Batch())
    with pytest.raises(ValueError, match=r"event_shape \(3,\)"):
        as_noise(Vector())


def test_discrete_and_coarse_laws_are_refused():
    class Poisson(Numpyros):
        pass

    class Integers(Numpyros):
        def sample(self, key, sample_shape=()):
            return jax.random.randint(key, sample_shape, 0, 3)

    class Coarse(Bell):
        def sample(self, key, sample_shape=(), dtype=float):
            return jax.random.normal(key, sample_shape, jnp.bfloat16)

    with pytest.raises(ValueError, match="Poisson is discrete"):
        as_noise(Poisson())
    with pytest.raises(TypeError, match=r"Integers\.sample returned int32"):
        as_noise(Integers()).sample(KEY, (3,), jnp.float32)
    with pytest.raises(TypeError, match="bfloat16, which holds so few numbers"):
        as_noise(Coarse()).sample(KEY, (3,), jnp.float32)


@pytest.mark.parametrize(("derivatives", "error"), [("1", TypeError), (-1, ValueError)])
def test_declared_derivatives_are_checked(derivatives, error):
    noise = Declared()
    noise.derivatives = derivatives
    with pytest.raises(error, match=r"Declared\.derivatives must be"):
        as_noise(noise)


def library(name):
    module = {
        "numpyro": "numpyro.distributions",
        "distrax": "distrax",
        "tensorflow_probability": "tensorflow_probability.substrates.jax.distributions",
    }[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pytest.importorskip(module, exc_type=ImportError)
        except AttributeError as error:  # a release that does not know this release of JAX
            pytest.skip(f"{name} does not work here: {error}")


LIBRARIES = ["numpyro", "distrax", "tensorflow_probability"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARIES)
def test_distributions_of_other_libraries(name):
    laws = library(name)
    noise = as_noise(laws.Normal(1.0, 2.0))
    z = noise.sample(KEY, (20_000,), jnp.float32)
    assert_distributed_as(z, scipy.stats.norm(1, 2).cdf)
    np.testing.assert_allclose(
        noise.log_prob(z[:9]), scipy.stats.norm(1, 2).logpdf(z[:9]), rtol=1e-5
    )
    assert float(noise.mean) == 1
    assert float(noise.variance) == 4
    gradient = jax.grad(lambda x: scalar_estimate(laws.Gumbel(0.0, 1.0), x))(X)
    assert np.isfinite(gradient).all()
    with pytest.raises(NotImplementedError, match=f"{name}.Laplace.*order 1"):
        jax.make_jaxpr(jax.hessian(lambda x: scalar_estimate(laws.Laplace(0.0, 1.0), x)))(X)
    with pytest.raises(NotImplementedError, match=f"{name}.Uniform.*values only"):
        jax.make_jaxpr(jax.grad(lambda x: scalar_estimate(laws.Uniform(-1.0, 1.0), x)))(X)
    with pytest.raises(ValueError, match=r"batch_shape \(3,\)"):
        as_noise(laws.Normal(jnp.zeros(3), 1.0))
    with pytest.raises(ValueError, match="is discrete"):
        as_noise(laws.Bernoulli(0.5) if name == "numpyro" else laws.Bernoulli(probs=0.5))


@pytest.mark.filterwarnings("ignore")
def test_laws_with_edges_are_known_by_name():
    laws = library("numpyro")
    moved = laws.TransformedDistribution(
        laws.HalfNormal(1.0), laws.transforms.AffineTransform(0.5, 2.0)
    )
    known = laws.HalfNormal(1.0), laws.Gamma(1.0), laws.TruncatedNormal(0.0, 1.0, low=-1.0)
    for law in (*known, moved, laws.Gompertz(1.0, 1.0), laws.FoldedDistribution(laws.Normal())):
        with pytest.raises(NotImplementedError, match=r"values only.*attribute `derivatives`"):
            jax.make_jaxpr(jax.grad(lambda x, law=law: scalar_estimate(law, x)))(X)
    mixture = laws.MixtureSameFamily(
        laws.Categorical(jnp.ones(2) / 2), laws.Laplace(jnp.array([-1.0, 1.0]), 1.0)
    )
    assert as_noise(mixture).derivatives == 1
    assert as_noise(laws.LogNormal()).limit is None
    with pytest.raises(ValueError, match="is discrete, or in part"):
        as_noise(laws.HurdleLogNormal(gate=0.5, loc=0.0, scale=1.0))


# --- check_noise


@every_law
def test_own_noise_passes(name):
    report = px.check_noise(LAWS[name][0])
    assert report.ok == (name != "Uniform"), str(report)
    assert bool(report) == report.ok
    assert report.derivatives == LAWS[name][0].derivatives
    if report.ok:
        assert "is good noise" in str(report)
        assert ("order 1" in str(report)) == (name in ("Laplace", "Triangular"))
        assert ("infinite" in str(report)) == (name == "Triangular")
        assert abs(report.mean_score[0]) < 5 * report.mean_score[1]
        assert abs(report.mean_z_score[0] - 1) < 5 * report.mean_z_score[1]


@pytest.mark.parametrize("law", [Numpyros, Distraxs, TensorFlows, Bell, TwoSided])
def test_foreign_noise_passes(law):
    assert px.check_noise(law()).ok


class Coin(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.rademacher(key, sample_shape, dtype)


class HiddenCoarse(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, jnp.bfloat16).astype(dtype)


class OpenCoarse(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, jnp.bfloat16)


class HalfBell(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jnp.abs(jax.random.normal(key, sample_shape, dtype))


class Mismatched(Bell):
    def log_prob(self, inputs):
        return -jnp.abs(inputs)


class SlightlyMismatched(Bell):
    """Student's draws with a normal density of such a scale that E[z s] is 1 all the same."""

    def sample(self, key, sample_shape=(), dtype=float):
        return px.StudentT(4).sample(key, sample_shape, dtype) / jnp.sqrt(2.0)


class Frozen(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jnp.asarray(np.random.default_rng(0).normal(size=sample_shape), dtype)


class Numpy(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        seed = np.asarray(jax.random.key_data(key))
        return jnp.asarray(np.random.default_rng(seed).normal(size=sample_shape), dtype)


class Shared(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jnp.broadcast_to(jax.random.normal(key, (), dtype), sample_shape)


class Misshapen(Bell):
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, (), dtype)


class MisshapenDensity(Bell):
    def log_prob(self, inputs):
        return jnp.zeros((2, *inputs.shape)) - inputs**2 / 2


class Semicircle(Bell):
    def log_prob(self, inputs):
        return jnp.where(jnp.abs(inputs) < 2, jnp.sqrt(4 - inputs**2), -jnp.inf)


class HiddenKink(Bell):
    """A mixture of two Laplace laws: only its second derivatives are wrong."""

    def sample(self, key, sample_shape=(), dtype=float):
        one, two = jax.random.split(key)
        sign = jax.random.rademacher(two, sample_shape, dtype)
        return jax.random.laplace(one, sample_shape, dtype) + sign

    def log_prob(self, inputs):
        return jnp.logaddexp(-jnp.abs(inputs - 1), -jnp.abs(inputs + 1))


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (Flat, "good for values only"),
        (OneSided, "good for values only"),
        (HalfBell, r"E\[score\] is 0.79.* must be 0"),
        (Coin, "no more than 2 different values"),
        (HiddenCoarse, "half precision"),
        (OpenCoarse, "bfloat16, which holds so few numbers"),
        (Mismatched, r"E\[z score\] is 0.79.* must be 1"),
        (SlightlyMismatched, r"E\[score h\(z\)\] is not E\[h'\(z\)\]"),
        (Frozen, "does not depend on the key"),
        (Numpy, "with jax.random, not with numpy"),
        (Shared, "coordinates of one draw depend on each other"),
        (Misshapen, r"returned shape \(\), expected \(4,\)"),
        (MisshapenDensity, r"log_prob\(inputs\) returned shape \(2, 4\)"),
        (Semicircle, "score is infinite or NaN"),
        (HiddenKink, "second ones would silently be wrong.*`derivatives = 1`"),
    ],
)
def test_wrong_noise_is_told_what_is_wrong(law, words):
    report = px.check_noise(law())
    assert not report.ok
    assert len(report.problems) == 1
    assert re.search(words, str(report), flags=re.DOTALL), str(report)
    assert "is not valid noise" in str(report)


def test_check_noise_takes_a_key_and_sizes():
    report = px.check_noise(px.Normal(), key=jax.random.key(5), num_samples=1000, dim=1)
    assert report.ok
    assert report.mean_score[1] == pytest.approx(1 / math.sqrt(1000), rel=0.2)
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        px.check_noise(px.Normal(), num_samples=0)


@pytest.mark.parametrize(("num_samples", "dim"), [(399, 4), (99, 1), (1, 1), (1000, 11)])
def test_check_noise_refuses_too_few_draws(num_samples, dim):
    """It called good noise bad, by standard errors that a few draws cannot tell."""
    with pytest.raises(ValueError, match=rf"num_samples must be .*{100 * dim}.*{num_samples}"):
        px.check_noise(px.Normal(), num_samples=num_samples, dim=dim)


@pytest.mark.parametrize("noise", [px.Normal, None, 3.0])
def test_check_noise_wants_noise(noise):
    with pytest.raises(TypeError, match="noise must"):
        px.check_noise(noise)


# --- What noise declares about itself


class WrongInverse:
    """Draws the Gumbel law of maxima, and inverts that of minima."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.gumbel(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -inputs - jnp.exp(-inputs)

    def icdf(self, u):
        return jnp.log(-jnp.log1p(-u))


class Wide:
    """Normal with mean 1 and standard deviation 2."""

    mean, variance = 1.0, 4.0

    def sample(self, key, sample_shape=(), dtype=float):
        return 1 + 2 * jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -(((inputs - 1) / 2) ** 2) / 2

    def icdf(self, u):
        return 1 + 2 * jax.scipy.special.ndtri(u)


class StaleMean(Wide):
    mean = 0.0


class StaleVariance(Wide):
    variance = 1.0


class WrongOfTwoInverses(Wide):
    """Nets draw by the first, orthogonal directions by the second."""

    def from_bits(self, bits):
        return 1 + 2 * px.Normal().from_bits(bits)

    def icdf(self, u):
        return 1 + 1.9 * px.Normal().icdf(u)


class Moving:
    """A moving average: neighbouring coordinates have the correlation 0.48 or 0.8."""

    derivatives = math.inf

    def sample(self, key, sample_shape=(), dtype=float):
        w = jax.random.normal(key, sample_shape, dtype)
        return jnp.concatenate([w[:1], 0.8 * w[:-1] + 0.6 * w[1:]])

    def log_prob(self, inputs):
        size = inputs.shape[-1]
        root = (0.6 * jnp.eye(size) + 0.8 * jnp.eye(size, k=-1)).at[0, 0].set(1.0)
        w = jax.scipy.linalg.solve_triangular(root, inputs, lower=True)
        return -jnp.sum(w**2) / 2


class MovingWithVariance(Moving):
    mean, variance = 0.0, 1.0


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (WrongInverse, r"of draws by icdf, which nets.* E\[score\] is .* must be 0"),
        (StaleMean, r"the draws have the mean (0\.99|1\.00)\d .*noise\.mean is 0"),
        (StaleVariance, r"the draws have the variance (3\.9|4\.0)\d+ .*noise\.variance is 1"),
        (
            WrongOfTwoInverses,
            r"of draws by icdf, .* E\[z score\] is 0\.(89|90|91)\d*.* must be 1",
        ),
        (MovingWithVariance, "depend on each other, but what the noise declares"),
    ],
)
def test_what_noise_declares_is_measured(law, words):
    """Fits and nets rely on moments and inverses; wrong ones gave wrong numbers in silence."""
    report = px.check_noise(law())
    assert len(report.problems) == 1
    assert re.search(words, str(report), flags=re.DOTALL), str(report)


@pytest.mark.parametrize("law", [Wide, Moving])
def test_what_noise_declares_rightly_passes(law):
    assert px.check_noise(law()), str(px.check_noise(law()))


def test_a_name_does_not_make_a_law_discrete_against_its_word():
    class Empirical(Wide):
        is_discrete = False

    assert as_noise(Empirical()).law == "Empirical"
    with pytest.raises(ValueError, match=r"Empirical is discrete.*is_discrete = False"):
        as_noise(type("Empirical", (Wide,), {})())
