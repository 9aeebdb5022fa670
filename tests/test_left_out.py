"""Surrogates of single samples against a regression of all the others for each, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import closed_forms as cf
import perturbax as px
from helpers import assert_biased, assert_unbiased, derivatives
from perturbax.estimator import _left_out

fit = jax.jit(_left_out.fit)  # as one program, not as one for each operation


def plain_regression(z, f, weight):
    """Constant and slope of one output by the definition."""
    n, dim = z.shape
    design = np.concatenate([np.ones((n, 1)), z], axis=1)
    penalty = np.diag([0.0] + [float(_left_out._RIDGE * dim)] * dim)
    return np.linalg.solve(design.T @ (weight[:, None] * design) + penalty, design.T @ (weight * f))


def regression(z, f, weight):
    """The same, drawn towards a constant by what both leave of each sample once it is left out."""
    beta, constant = plain_regression(z, f, weight), weight @ f / weight.sum()
    of_constant, of_slope = [], []
    for j in range(len(f)):
        rest = np.delete(np.arange(len(f)), j)
        found = plain_regression(z[rest], f[rest], weight[rest])
        of_slope.append(f[j] - found[0] - z[j] @ found[1:])
        of_constant.append(f[j] - weight[rest] @ f[rest] / weight[rest].sum())
    root = np.sqrt(weight)
    left, gained = root * of_constant, root * (np.asarray(of_constant) - of_slope)
    chance = (left @ left - (gained @ left) ** 2 / (gained @ gained)) / (len(f) - 1)
    keep = np.clip(gained @ left / (gained @ gained + chance), 0, 1)
    return np.concatenate([[(1 - keep) * constant + keep * beta[0]], keep * beta[1:]])


def samples(num, dim, outputs, seed):
    """Noise, values nearly linear in it, some more and some less, and weights; one is missing."""
    rng = np.random.default_rng(seed)
    z = rng.gumbel(size=(num, dim)) - np.euler_gamma
    noise = rng.standard_normal((num, outputs)) * np.geomspace(0.3, 30, outputs)
    f = 5 + z @ rng.standard_normal((dim, outputs)) + noise
    weight = np.mean((1 - np.exp(-z - np.euler_gamma)) ** 2, axis=1)
    weight[num // 2], f[num // 2] = 0, 0
    return z, f, weight


@pytest.mark.parametrize(("num", "dim"), [(5, 9), (20, 30), (70, 41)])
def test_each_surrogate_is_the_regression_on_all_other_samples(num, dim):
    z, f, weight = samples(num, dim, 3, seed=num)
    with jax.enable_x64(True):
        found = fit(z, f, weight)
        beta = np.asarray(jax.jit(_left_out.coefficients)(found.rows, found.common))
        rest, mean = np.asarray(found.rest), np.asarray(found.mean)
    present, coefficients = np.flatnonzero(weight), []
    for i in present:
        others = np.setdiff1d(present, i)
        each = [regression(z[others], v, weight[others]) for v in f[others].T]
        coefficients.append(np.stack(each, axis=1))
        np.testing.assert_allclose(beta[i, 1:], coefficients[-1][1:], atol=1e-9)
        predicted = coefficients[-1][0] + z[i] @ coefficients[-1][1:]
        np.testing.assert_allclose(rest[i], f[i] - predicted, atol=1e-9)
    np.testing.assert_allclose(mean, np.mean(coefficients, axis=0), atol=1e-9)
    keep = np.asarray(found.rows.keep)[present]
    assert np.any((keep > 0) & (keep < 1)), "only ends were compared"


def test_complex_values_have_the_surrogates_of_real_ones():
    z, f, weight = (v.astype(np.float32) for v in samples(20, 30, 3, seed=1))
    found = fit(z, f, weight)
    turned = fit(z, (3 + 4j) * f, weight)
    np.testing.assert_allclose(turned.mean, (3 + 4j) * np.asarray(found.mean), atol=1e-4)
    np.testing.assert_allclose(turned.rows.keep, found.rows.keep, atol=1e-5)


def test_a_sample_of_huge_weight_is_left_out_like_any_other():
    """A sum of all weights less its own would be nothing but rounding."""
    z, f, weight = samples(20, 30, 3, seed=2)
    weight[0], f[1] = 1e12, 1e3
    found = fit(*(v.astype(np.float32) for v in (z, f, weight)))
    with jax.enable_x64(True):
        exact = fit(z, f, weight)
    np.testing.assert_allclose(found.rest[0], exact.rest[0], rtol=0.01)
    weight[1] = 1e12  # of two of them, float32 tells no more than that they are there
    found = fit(*(v.astype(np.float32) for v in (z, f, weight)))
    assert np.all(np.isfinite(found.mean))


def test_two_samples_and_a_constant_function_have_derivatives():
    for num_samples, fun in ((2, jnp.sum), (3, jnp.sum), (9, lambda y: 7.0 + 0 * jnp.sum(y))):
        g = px.make_perturbed_fun(fun, num_samples, sampler=px.Independent(), degree=1)
        gradient = jax.grad(g, argnums=1)(jax.random.key(0), jnp.zeros(20))
        assert np.all(np.isfinite(gradient))
        assert fun is jnp.sum or not np.any(gradient)


def test_fewer_samples_than_coordinates_are_each_fitted_on_all_others():
    choice = px.choose_sampler(40, 60)
    assert (choice.sampler, choice.degree, choice.num_groups) == (px.Independent(), 1, 40)
    assert "from the rest" in str(choice)
    few = px.choose_sampler(14, 60)
    assert (few.sampler, few.degree) == (px.Independent(), 0)
    dear = px.choose_sampler(257, 600)
    assert (dear.sampler, dear.degree) == (px.Independent(), 0)
    asked = px.choose_sampler(600, 300, degree=1, sampler=px.Independent())
    assert asked.num_groups == 600
    squares = px.choose_sampler(40, 60, degree=2, sampler=px.Independent())
    assert squares.num_groups < 10
    many = px.choose_sampler(601, 300, degree=1, sampler=px.Independent())
    assert many.num_groups < 10


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=["Normal", "Gumbel"])
def test_a_linear_function_gains_what_the_samples_span(noise):
    """Half as many samples as coordinates leave half of the slope: nearly half of the variance."""
    dim = 60

    def gradients(**options):
        g = px.make_perturbed_fun(jnp.sum, dim // 2, 0.5, noise, **options)
        gradient = jax.jit(jax.vmap(jax.grad(g, argnums=1), in_axes=(0, None)))
        return gradient(jax.random.split(jax.random.key(0), 400), jnp.zeros(dim))

    alone, fitted = gradients(degree=0), gradients()
    ratio = np.var(alone, axis=0).sum() / np.var(fitted, axis=0).sum()
    assert 1.5 < ratio < 2.2, ratio
    error = np.std(fitted, axis=0).mean() / np.sqrt(fitted.size)
    assert abs(np.mean(fitted) - 1) < 5 * error


PROMISES = {"value": 0.01, "gradient": 0.03, "dsigma": 0.03, "hessian": 0.1, "mixed": 0.1}


def run_protocol(check, noise_name, names=tuple(PROMISES), **options):
    """Four samples of two coordinates: of so few a prediction that saw its own would be far off."""
    noise = {"normal": px.Normal(), "gumbel": px.Gumbel()}[noise_name]
    case = cf.step_and_choice(getattr(cf, noise_name))
    x = jnp.asarray(case.x, jnp.float32)

    def estimate(key, x, sigma):
        options = {"sampler": px.Independent(), "degree": 1}
        return px.make_perturbed_fun(case.fun, 4, sigma, noise, **options)(key, x)

    return check(
        derivatives(estimate, names),
        {name: getattr(case.exact, name) for name in names},
        args=(x, jnp.float32(case.sigma)),
        seed=6,
        **options,
    )


@pytest.mark.parametrize("noise_name", ["normal", "gumbel"])
def test_derivatives_are_unbiased(noise_name):
    run_protocol(assert_unbiased, noise_name, num_keys=5 * 2**16, promise=PROMISES)


@pytest.mark.parametrize("noise_name", ["normal", "gumbel"])
def test_a_fit_that_saw_its_own_sample_is_noticed(noise_name, monkeypatch):
    fit = _left_out.fit

    def fit_on_all(z, f, weight):
        found = fit(z, f, weight)
        constants = found.mean[0] + z @ found.mean[1:]
        return found._replace(rest=f - constants)

    monkeypatch.setattr(_left_out, "fit", fit_on_all)
    run_protocol(assert_biased, noise_name, ("gradient",), num_keys=2**11)


def test_standard_errors_tell_the_spread_between_keys():
    """Parts of samples add up like independent ones, though all share one inverse."""
    dim = 40
    wave = lambda y: jnp.sum(jnp.maximum(y, 0.0)) + 2 * jnp.sin(3 * jnp.sum(y[:4]))  # noqa: E731
    g = px.make_perturbed_fun(wave, 30, 0.5, px.Normal())
    keys = jax.random.split(jax.random.key(2), 1000)
    found = jax.jit(jax.vmap(lambda key: px.estimate(g, key, jnp.zeros(dim))))(keys)
    assert found.degrees_of_freedom == 29
    told = np.sum(np.mean(np.square(found.gradient_error), axis=0))
    spread = np.sum(np.var(found.gradient, axis=0, ddof=1))
    np.testing.assert_allclose(told, spread, rtol=0.06)
    gradient = jax.grad(g, argnums=1)(keys[0], jnp.zeros(dim))
    np.testing.assert_allclose(gradient, found.gradient[0], atol=1e-4)


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"missing": "drop"}], ids=str)
def test_chunks_and_missing_values_change_nothing_else(options):
    """Noise that is drawn again, and as many samples as are left."""
    dim = 40

    def fun(y):
        hole = jnp.where(y[0] > 0.9, jnp.nan, 0.0) if "missing" in options else 0.0
        return jnp.sum(jnp.abs(y)) + hole

    settings = {"noise": px.Normal(), "sampler": px.Independent(), "degree": 1}
    g = px.make_perturbed_fun(fun, 30, 0.5, **settings, **options)
    with_aux = lambda y: (fun(y), y)  # noqa: E731
    formula = px.make_perturbed_fun(with_aux, 30, 0.5, has_aux=True, **settings, **options)
    key, x = jax.random.key(3), jnp.linspace(-0.5, 0.5, dim)
    gradient = jax.grad(g, argnums=1)(key, x)
    expected = jax.grad(lambda x: formula(key, x)[0])(x)
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
    assert np.all(np.isfinite(gradient))
    if "batch_size" in options:
        whole = px.make_perturbed_fun(fun, 30, 0.5, **settings)
        np.testing.assert_allclose(gradient, jax.grad(whole, argnums=1)(key, x), atol=1e-4)
