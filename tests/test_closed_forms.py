"""The exact values that other tests trust, checked by quadrature, differences and sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

import closed_forms as cf

NOISES = pytest.mark.parametrize("noise", cf.NOISES, ids=lambda noise: noise.name)
CASES = pytest.mark.parametrize(
    ("noise", "case"),
    [
        pytest.param(noise, case, id=f"{noise.name}-{case.name}")
        for noise in cf.NOISES
        for case in cf.cases(noise)
    ],
)


def expectation(function, noise, points=()):
    """E function(eps) by adaptive quadrature over the density, cut at kinks and at ``points``."""
    low, high = noise.law.support()
    inner = [p for p in (*noise.kinks, *points) if low < p < high]
    edges = np.unique([low, *inner, high])
    if np.isinf(low) and not inner:
        edges = np.array([low, 0.0, high])
    total = 0.0
    for left, right in itertools.pairwise(edges):
        with np.errstate(over="ignore"):  # in the density's far tails
            part, _ = scipy.integrate.quad(
                lambda e: function(e) * noise.pdf(np.asarray(e)),
                left,
                right,
                epsabs=1e-12,
                epsrel=1e-12,
                limit=500,
            )
        total += part
    return total


def central_difference(function, at, step):
    """The derivative of an array-valued function of a number, with an error of order step^4."""
    near = (function(at + step) - function(at - step)) / (2.0 * step)
    far = (function(at + 2.0 * step) - function(at - 2.0 * step)) / (4.0 * step)
    return (4.0 * near - far) / 3.0


def difference_quotients(exact_at, at, step):
    """The same for all quantities of an Exact that depends on a number."""
    near, back = exact_at(at + step).as_dict(), exact_at(at - step).as_dict()
    far, far_back = exact_at(at + 2.0 * step).as_dict(), exact_at(at - 2.0 * step).as_dict()
    return {
        name: (8.0 * (near[name] - back[name]) - (far[name] - far_back[name])) / (12.0 * step)
        for name in near
    }


@NOISES
def test_density_and_distribution_are_scipys(noise):
    z = np.linspace(-4.03, 5.01, 57)
    np.testing.assert_allclose(noise.cdf(z), noise.law.cdf(z), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(noise.pdf(z), noise.law.pdf(z), rtol=1e-12, atol=1e-14)
    u = np.linspace(0.001, 0.999, 41)
    np.testing.assert_allclose(noise.quantile(u), noise.law.ppf(u), rtol=1e-9, atol=1e-12)


@NOISES
def test_derivatives_of_the_density(noise):
    z = np.linspace(-2.93, 3.91, 38)
    assert min(np.abs(z - kink).min() for kink in (*noise.kinks, 9.0)) > 4e-3
    np.testing.assert_allclose(
        noise.pdf1(z), central_difference(noise.pdf, z, 1e-3), rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(
        noise.pdf2(z), central_difference(noise.pdf1, z, 1e-3), rtol=1e-8, atol=1e-10
    )


@NOISES
def test_moments_and_ramp(noise):
    if noise.has_moments:
        for k, moment in enumerate(noise.moments):
            assert expectation(lambda e, k=k: e**k, noise) == pytest.approx(moment, abs=1e-8)
        for z in (-2.3, -0.4, 0.0, 0.7, 3.1):
            expected = expectation(lambda e, z=z: max(z + e, 0.0), noise, points=[-z])
            assert noise.ramp(np.asarray(z)) == pytest.approx(expected, abs=1e-10)
    z = np.linspace(-2.9, 2.9, 27)
    np.testing.assert_allclose(
        central_difference(noise.ramp, z, 1e-3), 1.0 - noise.law.cdf(-z), rtol=1e-8, atol=1e-10
    )


PROFILES = {
    "step": (cf.step, lambda y: float(y > 0.0), [0.0]),
    "relu": (cf.relu, lambda y: max(y, 0.0), [0.0]),
    "absolute": (cf.absolute, abs, [0.0]),
    "clip": (cf.clip(-0.5, 1.0), lambda y: min(max(y, -0.5), 1.0), [-0.5, 1.0]),
    "floor": (cf.floor(), np.floor, list(range(-25, 26))),
}


@pytest.mark.parametrize(
    ("noise", "name"),
    [
        pytest.param(noise, name, id=f"{noise.name}-{name}")
        for noise in cf.NOISES
        for name in PROFILES
        # The rest has no expectation, or a thousand jumps in reach of the noise.
        if (noise.has_moments or name in ("step", "clip"))
        and (noise.name, name) != ("StudentT", "floor")
    ],
)
def test_profiles_by_quadrature(noise, name):
    profile, function, jumps = PROFILES[name]
    for x, sigma in ((0.31, 0.7), (-1.2, 0.4), (0.6, 1.3)):
        smooth = cf.smooth_profile(profile, np.asarray(x), sigma, noise)
        points = [(jump - x) / sigma for jump in jumps]
        expected = expectation(lambda e, x=x, s=sigma: function(x + s * e), noise, points)
        assert smooth["value"] == pytest.approx(expected, abs=1e-9)


def test_known_numbers():
    """Numbers worked out independently: d/dsigma at x = .31, sigma = .7."""
    relu = {
        "Normal": 0.361678436922,
        "Logistic": 0.66922004548,
        "Laplace": 0.4633006662,
        "Gumbel": 0.7624503164,
        "Triangular": 0.0975568513,
    }
    for noise in cf.NOISES:
        if noise.name in relu:
            smooth = cf.smooth_profile(cf.relu, np.asarray(0.31), 0.7, noise)
            assert smooth["dsigma"] == pytest.approx(relu[noise.name], abs=1e-9)
    smooth = cf.smooth_profile(cf.step, np.asarray(0.31), 0.7, cf.cauchy)
    assert smooth["dsigma"] == pytest.approx(-0.1683604585, abs=1e-9)
    softmax = cf.smooth_argmax_gumbel(np.array([-0.6, 1.9, -0.2, 1.1, -1.0]), 0.5)
    np.testing.assert_allclose(
        softmax.value, [0.00549293, 0.8152234, 0.01222475, 0.16459079, 0.00246813], atol=1e-8
    )


def test_straight_through_is_an_exact_smoothing():
    x = np.linspace(-2.95, 2.95, 24)
    for noise, sigma in ((cf.uniform, 0.5), (cf.triangular, 1.0)):
        smooth = cf.smooth_profile(cf.floor(), x, sigma, noise)
        np.testing.assert_allclose(smooth["value"], x - 0.5, atol=1e-12)


@CASES
def test_value_is_the_mean_of_the_function(noise, case):
    """Ties each JAX function to its closed form: 50,000 draws by scipy, seed fixed."""
    rng = np.random.Generator(np.random.Philox(20))
    draws = noise.law.rvs(size=(50_000, len(case.x)), random_state=rng)
    points = jnp.asarray(case.x + case.sigma * draws, jnp.float32)
    outputs = np.asarray(jax.vmap(case.fun)(points), np.float64)
    mean, error = outputs.mean(axis=0), outputs.std(axis=0) / np.sqrt(len(draws))
    assert mean.shape == case.exact.value.shape
    assert np.all(error < 0.04)
    assert np.all(np.abs(mean - case.exact.value) <= 5.0 * error + 1e-6)


@CASES
def test_derivatives_by_differences(noise, case):
    """Each derivative is the difference quotient of the one before it."""
    exact, x, sigma, step = case.exact, case.x, case.sigma, 2e-3
    units = np.eye(len(x))
    along_x = [
        difference_quotients(lambda t, unit=unit: case.exact_at(x + t * unit, sigma), 0.0, step)
        for unit in units
    ]
    along_sigma = difference_quotients(lambda s: case.exact_at(x, s), sigma, step)
    close = {"rtol": 1e-7, "atol": 2e-8}
    for name, before in (("gradient", "value"), ("hessian", "gradient"), ("third", "hessian")):
        if getattr(exact, name) is not None:
            quotients = np.stack([quotient[before] for quotient in along_x], axis=-1)
            np.testing.assert_allclose(getattr(exact, name), quotients, **close, err_msg=name)
    for name, before in (("dsigma", "value"), ("mixed", "gradient"), ("dsigma2", "dsigma")):
        np.testing.assert_allclose(getattr(exact, name), along_sigma[before], **close, err_msg=name)


@CASES
def test_derivatives_are_symmetric(noise, case):
    hessian = case.exact.hessian
    np.testing.assert_allclose(hessian, np.swapaxes(hessian, -1, -2), atol=1e-11)
    if case.exact.third is not None:
        third = case.exact.third
        np.testing.assert_allclose(third, np.swapaxes(third, -1, -3), atol=1e-11)
        np.testing.assert_allclose(third, np.swapaxes(third, -2, -3), atol=1e-11)


@pytest.mark.parametrize("name", [case.name for case in cf.cases(cf.normal)])
def test_heat_equation_under_normal_noise(name):
    """Normal smoothing solves dF/dsigma = sigma times the Laplacian of F."""
    (case,) = (case for case in cf.cases(cf.normal) if case.name == name)
    laplacian = np.trace(case.exact.hessian, axis1=-2, axis2=-1)
    np.testing.assert_allclose(case.exact.dsigma, case.sigma * laplacian, atol=1e-11)
    if case.exact.third is not None:
        mixed = case.sigma * np.einsum("...ijj->...i", case.exact.third)
        np.testing.assert_allclose(case.exact.mixed, mixed, atol=1e-11)


def test_argmax_and_max_under_gumbel_noise():
    x, sigma = np.array([0.5, 0.0, -0.25, 0.75]), 0.6
    by_quadrature = cf.smooth_argmax(x, sigma, cf.gumbel).as_dict()
    closed = cf.smooth_argmax_gumbel(x, sigma).as_dict()
    assert by_quadrature.keys() == closed.keys()
    for name in closed:
        np.testing.assert_allclose(by_quadrature[name], closed[name], atol=1e-10, err_msg=name)
    by_quadrature = cf.smooth_max(x, sigma, cf.gumbel).as_dict()
    closed = cf.smooth_max_gumbel(x, sigma).as_dict()
    for name in closed:
        np.testing.assert_allclose(by_quadrature[name], closed[name], atol=1e-10, err_msg=name)


def test_argmax_and_max_of_two_under_normal_noise():
    x, sigma = np.array([0.4, -0.3]), 0.7
    d = (x[0] - x[1]) / (sigma * np.sqrt(2.0))
    chance, density = scipy.stats.norm.cdf(d), scipy.stats.norm.pdf(d)
    np.testing.assert_allclose(
        cf.smooth_argmax(x, sigma, cf.normal).value, [chance, 1.0 - chance], atol=1e-12
    )
    value = x[0] * chance + x[1] * (1.0 - chance) + sigma * np.sqrt(2.0) * density
    np.testing.assert_allclose(cf.smooth_max(x, sigma, cf.normal).value, value, atol=1e-12)


@NOISES
def test_ranks_from_pairs_and_from_permutations(noise):
    """Two independent routes to the mean ranks, and the pairs' closed forms where known."""
    x, sigma = np.array([0.3, -0.2, 0.45]), 0.8
    permutation = cf.smooth_permutation(x, sigma, noise)
    np.testing.assert_allclose(permutation.value.sum(axis=0), 1.0, atol=1e-11)
    np.testing.assert_allclose(permutation.value.sum(axis=1), 1.0, atol=1e-11)
    pairs = cf.smooth_ranks(x, sigma, noise)
    weights = np.arange(1.0, 4.0)
    for name in ("value", "gradient", "hessian", "dsigma", "mixed", "dsigma2"):
        combined = np.einsum("ik...,k->i...", getattr(permutation, name), weights)
        np.testing.assert_allclose(getattr(pairs, name), combined, atol=1e-9, err_msg=name)
    pair_law = {
        "Gumbel": lambda d: scipy.special.expit(d),
        "Normal": lambda d: scipy.stats.norm.cdf(d / np.sqrt(2.0)),
        "Cauchy": lambda d: 0.5 + np.arctan(d / 2.0) / np.pi,
        "Laplace": lambda d: np.where(
            d >= 0.0, 1.0 - np.exp(-d) * (0.5 + d / 4.0), np.exp(d) * (0.5 - d / 4.0)
        ),
    }
    if noise.name in pair_law:
        gaps = (x[:, None] - x[None, :]) / sigma
        # A coordinate is not below itself: each law gives 1/2 there.
        expected = 0.5 + pair_law[noise.name](gaps).sum(axis=1)
        np.testing.assert_allclose(pairs.value, expected, atol=1e-11)


def test_permutations_under_gumbel_noise_are_plackett_luce():
    x, sigma = np.array([0.3, -0.2, 0.45]), 0.8
    skill = np.exp(x / sigma)
    expected = np.zeros((3, 3))
    for first, second, third in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        # From the largest down, each is drawn among those left in proportion to its skill.
        chance = skill[first] / skill.sum() * skill[second] / (skill[second] + skill[third])
        for item, place in ((first, 2), (second, 1), (third, 0)):
            expected[item, place] += chance
    np.testing.assert_allclose(
        cf.smooth_permutation(x, sigma, cf.gumbel).value, expected, atol=1e-11
    )
