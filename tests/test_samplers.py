"""Samplers and surrogates: exact laws, exact results where theory promises them, no bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import qmc

import closed_forms as cf
import perturbax as px
from helpers import assert_distributed_as, assert_unbiased
from perturbax._defaults import choose
from perturbax._sampling import _sobol_generators

SAMPLERS = {
    "independent": px.Independent(),
    "blocks": px.Independent(block=8),
    "antithetic": px.Antithetic(),
    "orthogonal": px.Orthogonal(),
    "orthogonal pairs": px.Orthogonal(antithetic=True),
    "two nets": px.Sobol(),
    "four nets": px.Sobol(num_groups=4),
}
PROMISES = {"value": 0.01, "gradient": 0.02, "dsigma": 0.05, "hessian": 0.05}


def smooth(fun, x, sigma, noise, num_samples=64, **options):
    return px.make_perturbed_fun(fun, num_samples, sigma, noise, **options)


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=["normal", "gumbel"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sample_has_the_law_of_the_noise(name, noise):
    sampler, law = SAMPLERS[name], {px.Normal: "norm", px.Gumbel: "gumbel_r"}[type(noise)]
    size = min(sampler.group_size(64, 3), 12)

    def draw(key):
        return sampler.sample_group(key, noise, size, 3, np.dtype("float32"))

    z = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 4000))
    for row, column in ((0, 0), (size - 1, 2)):
        assert_distributed_as(np.asarray(z[:, row, column]), law)


def test_rows_of_a_block_are_orthogonal():
    z = px.Orthogonal().sample_group(jax.random.key(2), px.Normal(), 5, 5, np.dtype("float32"))
    gram = np.asarray(z, np.float64) @ np.asarray(z, np.float64).T
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0.0, atol=1e-5)


def test_a_net_has_one_point_in_each_slice():
    class Words:
        def from_bits(self, bits):
            return bits

    z = px.Sobol().sample_group(jax.random.key(3), Words(), 32, 7, np.dtype("float32"))
    slices = np.sort(np.asarray(z) >> 27, axis=0)
    np.testing.assert_array_equal(slices, np.tile(np.arange(32)[:, None], (1, 7)))


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("noise_name", ["normal", "gumbel"])
def test_derivatives_are_unbiased(name, noise_name, degree):
    noise = {"normal": px.Normal(), "gumbel": px.Gumbel()}[noise_name]
    case = cf.step_and_choice(getattr(cf, noise_name))
    x = jnp.asarray(case.x, jnp.float32)

    def estimator(key):
        def estimate(p):
            return smooth(case.fun, x, p[-1], noise, sampler=SAMPLERS[name], degree=degree)(
                key, p[:-1]
            )

        p = jnp.append(x, case.sigma)
        one = jax.jacrev(estimate)(p)
        two = jax.jacfwd(jax.jacrev(estimate))(p)
        hessian = two[..., :-1, :-1]
        return {
            "value": estimate(p),
            "gradient": one[..., :-1],
            "dsigma": one[..., -1],
            "hessian": hessian,
        }

    exact = {name: getattr(case.exact, name) for name in PROMISES}
    assert_unbiased(estimator, exact, seed=4, num_keys=32768, promise=PROMISES)


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel(), px.Logistic(), px.Laplace()], ids=str)
@pytest.mark.parametrize("sampler", [px.Independent(), px.Sobol()], ids=str)
def test_the_gradient_of_a_linear_function_is_exact(sampler, noise):
    slope = jnp.array([1.0, -2.0, 0.5])
    fun = smooth(lambda y: slope @ y, None, 0.5, noise, 32, sampler=sampler, degree=1)
    gradient = jax.grad(fun, argnums=1)(jax.random.key(5), jnp.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel(), px.Logistic()], ids=str)
@pytest.mark.parametrize("sampler", [px.Independent(), px.Sobol()], ids=str)
def test_the_hessian_of_a_quadratic_is_exact(sampler, noise):
    matrix = jnp.array([[2.0, 0.5], [0.5, -1.0]])
    fun = smooth(lambda y: y @ matrix @ y, None, 0.5, noise, 128, sampler=sampler, degree=2)
    key, x = jax.random.key(6), jnp.array([0.1, -0.2])
    np.testing.assert_allclose(jax.hessian(fun, argnums=1)(key, x), 2 * matrix, atol=3e-4)
    slope = 2 * matrix @ (x + 0.5 * noise.mean)
    np.testing.assert_allclose(jax.grad(fun, argnums=1)(key, x), slope, atol=1e-4)


def test_more_coordinates_than_samples_determine_stay_finite():
    """The ridge holds coefficients that nothing determines; refinement must not undo that."""
    fun = smooth(lambda y: jnp.sum(jnp.abs(y)), None, 0.5, px.Normal(), 16, degree=1)
    gradient = jax.grad(fun, argnums=1)(jax.random.key(5), jnp.linspace(-1.0, 1.0, 64))
    assert np.abs(gradient).max() < 100.0


def test_generators_of_nets_are_those_of_scipy():
    generators = _sobol_generators(5, 4)
    points = qmc.Sobol(5, scramble=False, bits=32).random(16) * 2.0**32
    for index, point in enumerate(points.astype(np.uint64).astype(np.uint32)):
        gray = index ^ (index >> 1)
        digits = [generators[k] for k in range(4) if gray >> k & 1]
        np.testing.assert_array_equal(np.bitwise_xor.reduce([np.zeros_like(point), *digits]), point)


@pytest.mark.parametrize(
    ("num_samples", "dim", "noise", "chosen"),
    [
        (200, 3, px.Normal(), (px.Sobol(), 2)),
        (199, 3, px.Normal(), (px.Sobol(), 1)),
        (560, 6, px.Gumbel(), (px.Sobol(), 2)),
        (10_000, 7, px.Gumbel(), (px.Sobol(), 1)),
        (606, 100, px.Gumbel(), (px.Sobol(), 1)),
        (605, 100, px.Gumbel(), (px.Sobol(), 0)),
        (10_000, 101, px.Gumbel(), (px.Sobol(), 0)),
        (399, 100, px.Gumbel(), (px.Independent(), 0)),
        (100_000, 1001, px.Gumbel(), (px.Independent(), 0)),
        (100, 3, px.Cauchy(), (px.Sobol(), 0)),
        (11, 3, px.Cauchy(), (px.Independent(), 0)),
        (1, 1, px.Normal(), (px.Independent(), 0)),
        (1000, 0, px.Normal(), (px.Independent(), 0)),
    ],
)
def test_the_default_is_that_of_the_documentation(num_samples, dim, noise, chosen):
    assert choose(None, None, num_samples, dim, noise) == chosen


def test_the_default_leaves_noise_without_an_inverse_alone():
    assert choose(None, None, 1000, 3, Draws()) == (px.Independent(), 0)


def test_a_surrogate_reaches_nothing_of_its_own_group():
    """A prediction that saw its own sample would be biased most where samples are few."""

    def estimator(key):
        fun = smooth(
            lambda y: (y[0] > 0).astype(jnp.float32), None, 0.5, px.Normal(), 6,
            sampler=px.Independent(), degree=1,
        )  # fmt: skip
        return jax.grad(fun, argnums=1)(key, jnp.array([0.2]))

    exact = np.array([np.exp(-0.08) / np.sqrt(2 * np.pi) / 0.5])
    assert_unbiased(estimator, exact, seed=7, num_keys=196_608, promise=0.02)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 31, 33, 97])
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_samples_is_evaluated_exactly(name, num_samples):
    fun = px.make_perturbed_fun(
        lambda y: (jnp.sum(y), y), num_samples, 0.5, sampler=SAMPLERS[name], has_aux=True
    )
    value, points = fun(jax.random.key(8), jnp.zeros(5))
    assert points.shape == (num_samples, 5)
    np.testing.assert_allclose(value, np.mean(np.sum(points, axis=1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_batch_size_changes_nothing(name):
    x = jnp.array([0.3, -0.2, 0.1])

    def gradient(batch_size):
        fun = smooth(
            lambda y: jnp.sum(jnp.abs(y)), x, 0.5, px.Normal(), 96,
            sampler=SAMPLERS[name], degree=1, batch_size=batch_size,
        )  # fmt: skip
        return jax.grad(fun, argnums=1)(jax.random.key(9), x)

    for batch_size in (1, 16, 50):
        np.testing.assert_allclose(gradient(batch_size), gradient(None), rtol=1e-4, atol=1e-5)


class Draws:
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -(inputs**2) / 2


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
