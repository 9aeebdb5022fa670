"""Exact values of smoothed functions and of their derivatives, in numpy and scipy at float64.

For a function f and a law of noise, ``F(x, sigma) = E f(x + sigma * eps)`` with independent
coordinates ``eps``. Everything here is a closed form, or a one-dimensional integral evaluated to
about twelve digits; nothing is sampled and nothing is differentiated automatically.

A `Case` joins a function written in JAX with its exact smoothing. `cases` lists those that exist
for a law of noise.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Noise:
    """A law of noise with the functions that the closed forms need.

    The second derivative of the density is the ordinary one, away from ``kinks``.

    Attributes:
        name: The name of the law, as the library spells it.
        law: The same law in scipy, for sampling and as an independent witness.
        cdf: The distribution function G.
        pdf: The density g.
        pdf1: Its derivative.
        pdf2: Its second derivative.
        ramp: ``E max(z + eps, 0)``, or where that is infinite an antiderivative of ``1 - G(-z)``
            that may stand in for it in differences.
        moments: ``E eps**k`` for k from 0 to 4; NaN where there is none.
        quantile: The inverse of G.
        kinks: Where the density or its derivative jumps.
        jumps: The pairs (place, height) of the density's own jumps.
    """

    name: str
    law: Any
    cdf: Callable[[Array], Array]
    pdf: Callable[[Array], Array]
    pdf1: Callable[[Array], Array]
    pdf2: Callable[[Array], Array]
    ramp: Callable[[Array], Array]
    moments: tuple[float, ...]
    quantile: Callable[[Array], Array]
    kinks: tuple[float, ...] = ()
    jumps: tuple[tuple[float, float], ...] = ()

    @property
    def has_moments(self) -> bool:
        """Whether all moments up to the fourth exist."""
        return bool(np.all(np.isfinite(self.moments)))


def _gauss(z: Array) -> Array:
    return np.exp(-0.5 * z * z) / np.sqrt(2.0 * np.pi)


def _gumbel_pdf(z: Array) -> Array:
    return np.exp(-z - np.exp(-z))


def _sech(z: Array) -> Array:
    return scipy.special.expit(z) * scipy.special.expit(-z)


normal = Noise(
    name="Normal",
    law=scipy.stats.norm(),
    cdf=scipy.special.ndtr,
    pdf=_gauss,
    pdf1=lambda z: -z * _gauss(z),
    pdf2=lambda z: (z * z - 1.0) * _gauss(z),
    ramp=lambda z: z * scipy.special.ndtr(z) + _gauss(z),
    moments=(1.0, 0.0, 1.0, 0.0, 3.0),
    quantile=scipy.special.ndtri,
)


def _gumbel_moments() -> tuple[float, ...]:
    # The cumulants are Euler's gamma and (k - 1)! zeta(k).
    k1, k2 = np.euler_gamma, np.pi**2 / 6.0
    k3, k4 = 2.0 * float(scipy.special.zeta(3.0)), np.pi**4 / 15.0
    return (
        1.0,
        k1,
        k2 + k1**2,
        k3 + 3.0 * k2 * k1 + k1**3,
        k4 + 4.0 * k3 * k1 + 3.0 * k2**2 + 6.0 * k2 * k1**2 + k1**4,
    )


gumbel = Noise(
    name="Gumbel",
    law=scipy.stats.gumbel_r(),
    cdf=lambda z: np.exp(-np.exp(-z)),
    pdf=_gumbel_pdf,
    pdf1=lambda z: np.expm1(-z) * _gumbel_pdf(z),
    pdf2=lambda z: (np.expm1(-z) ** 2 - np.exp(-z)) * _gumbel_pdf(z),
    ramp=lambda z: scipy.special.exp1(np.exp(z)) + z + np.euler_gamma,
    moments=_gumbel_moments(),
    quantile=lambda u: -np.log(-np.log(u)),
)

logistic = Noise(
    name="Logistic",
    law=scipy.stats.logistic(),
    cdf=scipy.special.expit,
    pdf=_sech,
    pdf1=lambda z: -np.tanh(z / 2.0) * _sech(z),
    pdf2=lambda z: (1.0 - 6.0 * _sech(z)) * _sech(z),
    ramp=lambda z: np.logaddexp(z, 0.0),
    moments=(1.0, 0.0, np.pi**2 / 3.0, 0.0, 7.0 * np.pi**4 / 15.0),
    quantile=scipy.special.logit,
)

laplace = Noise(
    name="Laplace",
    law=scipy.stats.laplace(),
    cdf=lambda z: np.where(z < 0.0, 0.5 * np.exp(-np.abs(z)), 1.0 - 0.5 * np.exp(-np.abs(z))),
    pdf=lambda z: 0.5 * np.exp(-np.abs(z)),
    pdf1=lambda z: -0.5 * np.sign(z) * np.exp(-np.abs(z)),
    pdf2=lambda z: 0.5 * np.exp(-np.abs(z)),
    ramp=lambda z: np.maximum(z, 0.0) + 0.5 * np.exp(-np.abs(z)),
    moments=(1.0, 0.0, 2.0, 0.0, 24.0),
    quantile=lambda u: np.where(u < 0.5, np.log(2.0 * u), -np.log(2.0 - 2.0 * u)),
    kinks=(0.0,),
)

cauchy = Noise(
    name="Cauchy",
    law=scipy.stats.cauchy(),
    cdf=lambda z: 0.5 + np.arctan(z) / np.pi,
    pdf=lambda z: 1.0 / (np.pi * (1.0 + z * z)),
    pdf1=lambda z: -2.0 * z / (np.pi * (1.0 + z * z) ** 2),
    pdf2=lambda z: (6.0 * z * z - 2.0) / (np.pi * (1.0 + z * z) ** 3),
    ramp=lambda z: z * (0.5 + np.arctan(z) / np.pi) - np.log1p(z * z) / (2.0 * np.pi),
    moments=(1.0, np.nan, np.nan, np.nan, np.nan),
    quantile=lambda u: np.tan(np.pi * (u - 0.5)),
)


def student_t(df: float) -> Noise:
    """Student's law with ``df`` degrees of freedom, more than four."""
    squares = df / (df - 2.0)
    log_scale = -np.log(df) / 2.0 - scipy.special.betaln(0.5, df / 2.0)

    def pdf(z: Array) -> Array:
        return np.exp(log_scale - 0.5 * (df + 1.0) * np.log1p(z * z / df))

    def cdf(z: Array) -> Array:
        return scipy.special.stdtr(df, z)

    def slope(z: Array) -> Array:
        return (df + 1.0) * z / (df + z * z)

    def slope1(z: Array) -> Array:
        return (df + 1.0) * (df - z * z) / (df + z * z) ** 2

    return Noise(
        name="StudentT",
        law=scipy.stats.t(df),
        cdf=cdf,
        pdf=pdf,
        pdf1=lambda z: -slope(z) * pdf(z),
        pdf2=lambda z: (slope(z) ** 2 - slope1(z)) * pdf(z),
        ramp=lambda z: z * cdf(z) + pdf(z) * (df + z * z) / (df - 1.0),
        moments=(1.0, 0.0, squares, 0.0, squares * 3.0 * df / (df - 4.0)),
        quantile=lambda u: scipy.special.stdtrit(df, u),
    )


triangular = Noise(
    name="Triangular",
    law=scipy.stats.triang(0.5, loc=-1.0, scale=2.0),
    cdf=lambda z: np.where(
        z < 0.0,
        0.5 * np.clip(1.0 + z, 0.0, 1.0) ** 2,
        1.0 - 0.5 * np.clip(1.0 - z, 0.0, 1.0) ** 2,
    ),
    pdf=lambda z: np.maximum(1.0 - np.abs(z), 0.0),
    pdf1=lambda z: np.where(np.abs(z) < 1.0, -np.sign(z), 0.0),
    pdf2=lambda z: np.zeros_like(z),
    ramp=lambda z: np.maximum(z, 0.0) + np.maximum(1.0 - np.abs(z), 0.0) ** 3 / 6.0,
    moments=(1.0, 0.0, 1.0 / 6.0, 0.0, 1.0 / 15.0),
    quantile=lambda u: np.where(u < 0.5, np.sqrt(2.0 * u) - 1.0, 1.0 - np.sqrt(2.0 - 2.0 * u)),
    kinks=(-1.0, 0.0, 1.0),
)

uniform = Noise(
    name="Uniform",
    law=scipy.stats.uniform(-1.0, 2.0),
    cdf=lambda z: np.clip(0.5 * (1.0 + z), 0.0, 1.0),
    pdf=lambda z: np.where(np.abs(z) < 1.0, 0.5, 0.0),
    pdf1=lambda z: np.zeros_like(z),
    pdf2=lambda z: np.zeros_like(z),
    ramp=lambda z: np.where(np.abs(z) < 1.0, 0.25 * (1.0 + z) ** 2, np.maximum(z, 0.0)),
    moments=(1.0, 0.0, 1.0 / 3.0, 0.0, 1.0 / 5.0),
    quantile=lambda u: 2.0 * u - 1.0,
    kinks=(-1.0, 1.0),
    jumps=((-1.0, 0.5), (1.0, -0.5)),
)

NOISES = (normal, gumbel, logistic, laplace, cauchy, student_t(6.0), triangular, uniform)


@dataclasses.dataclass(frozen=True)
class Exact:
    """F and its derivatives at one point; out is the shape of the function's output.

    Attributes:
        value: F, out.
        gradient: dF/dx, (*out, D).
        hessian: d2F/dx2, (*out, D, D).
        dsigma: dF/dsigma, out.
        mixed: d2F/dx dsigma, (*out, D).
        dsigma2: d2F/dsigma2, out.
        third: d3F/dx3, (*out, D, D, D), or None where it is not worked out.
    """

    value: Array
    gradient: Array
    hessian: Array
    dsigma: Array
    mixed: Array
    dsigma2: Array
    third: Array | None = None

    def __add__(self, other: "Exact") -> "Exact":
        """The exact numbers of the sum of two functions."""

        def add(one: Array | None, two: Array | None) -> Array | None:
            return None if one is None or two is None else one + two

        return Exact(
            *(add(one, two) for one, two in zip(_fields(self), _fields(other), strict=False))
        )

    def as_dict(self, *names: str) -> dict[str, Array]:
        """The named quantities (all that there are, if none is named)."""
        names = names or tuple(field.name for field in dataclasses.fields(self))
        found = {name: getattr(self, name) for name in names}
        return {name: array for name, array in found.items() if array is not None}


def _fields(exact: Exact) -> list[Any]:
    return [getattr(exact, field.name) for field in dataclasses.fields(exact)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, a point, and the exact smoothing.

    Attributes:
        name: What is smoothed.
        fun: The function, in JAX: (D,) -> out.
        exact_at: ``(x, sigma)`` to the exact numbers there.
        x: The point of the case, (D,).
        sigma: Its scale.
    """

    name: str
    fun: Callable[[jax.Array], jax.Array]
    exact_at: Callable[[Array, float], Exact]
    x: Array
    sigma: float

    @functools.cached_property
    def exact(self) -> Exact:
        """The exact numbers at the point of the case."""
        return self.exact_at(self.x, self.sigma)


# --- Sums of functions of one coordinate ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Profile:
    """``a + b y + sum c_k max(y - t_k, 0) + sum d_k 1[y > u_k]``, a function of a number.

    Attributes:
        offset: a.
        slope: b.
        kinks: The pairs (t_k, c_k).
        jumps: The pairs (u_k, d_k).
    """

    offset: float = 0.0
    slope: float = 0.0
    kinks: tuple[tuple[float, float], ...] = ()
    jumps: tuple[tuple[float, float], ...] = ()


def smooth_profile(
    profile: Profile, x: Array, sigma: float | Array, noise: Noise
) -> dict[str, Array]:
    """The smoothed profile at each entry of ``x``: its derivatives in x and sigma.

    A scale for each entry is welcome: ``sigma`` has the shape of ``x``, or none.

    With ``z = (x - t) / sigma``, a ramp gives ``sigma r(z)`` and a step gives ``r'(z)``, where
    ``r' = 1 - G(-z)``, ``r'' = g(-z)``, ``r''' = -g'(-z)`` and ``r'''' = g''(-z)``.
    """
    x, sigma = np.asarray(x, np.float64), np.asarray(sigma, np.float64)
    mean = noise.moments[1] if profile.slope else 0.0
    names = ("value", "first", "second", "third", "dsigma", "mixed", "dsigma2")
    total = {name: np.zeros_like(x) for name in names}
    total["value"] += profile.offset + profile.slope * (x + sigma * mean)
    total["first"] += profile.slope
    total["dsigma"] += profile.slope * mean
    if profile.kinks:
        thresholds, heights = np.asarray(profile.kinks).T
        z = (x[..., None] - thresholds) / sigma[..., None]
        r, r1, r2, r3 = noise.ramp(z), 1.0 - noise.cdf(-z), noise.pdf(-z), -noise.pdf1(-z)
        total["value"] += sigma * r @ heights
        total["first"] += r1 @ heights
        total["second"] += r2 @ heights / sigma
        total["third"] += r3 @ heights / sigma**2
        total["dsigma"] += (r - z * r1) @ heights
        total["mixed"] += -(z * r2) @ heights / sigma
        total["dsigma2"] += (z**2 * r2) @ heights / sigma
    if profile.jumps:
        thresholds, heights = np.asarray(profile.jumps).T
        z = (x[..., None] - thresholds) / sigma[..., None]
        r1, r2, r3, r4 = 1.0 - noise.cdf(-z), noise.pdf(-z), -noise.pdf1(-z), noise.pdf2(-z)
        total["value"] += r1 @ heights
        total["first"] += r2 @ heights / sigma
        total["second"] += r3 @ heights / sigma**2
        total["third"] += r4 @ heights / sigma**3
        total["dsigma"] += -(z * r2) @ heights / sigma
        total["mixed"] += -(r2 + z * r3) @ heights / sigma**2
        total["dsigma2"] += (z**2 * r3 + 2.0 * z * r2) @ heights / sigma**2
    return total


step = Profile(jumps=((0.0, 1.0),))
relu = Profile(kinks=((0.0, 1.0),))
absolute = Profile(slope=-1.0, kinks=((0.0, 2.0),))


def clip(low: float, high: float) -> Profile:
    """The profile of ``clip(y, low, high)``."""
    return Profile(offset=low, kinks=((low, 1.0), (high, -1.0)))


def floor(reach: int = 60) -> Profile:
    """The profile of ``floor(y)`` for y from ``-reach`` to ``reach + 1``; constant beyond."""
    thresholds = range(-reach + 1, reach + 1)
    return Profile(offset=-float(reach), jumps=tuple((float(k), 1.0) for k in thresholds))


def smooth_separable(
    profile: Profile, weights: Array, x: Array, sigma: float, noise: Noise
) -> Exact:
    """``sum_i weights_i profile(y_i)``."""
    x = np.asarray(x, np.float64)
    parts = smooth_profile(profile, x, sigma, noise)
    return _assemble_separable({name: weights * part for name, part in parts.items()})


def _assemble_separable(parts: dict[str, Array]) -> Exact:
    dimension = parts["first"].shape[0]
    third = np.zeros((dimension,) * 3)
    third[(np.arange(dimension),) * 3] = parts["third"]
    return Exact(
        value=np.sum(parts["value"]),
        gradient=parts["first"],
        hessian=np.diag(parts["second"]),
        dsigma=np.sum(parts["dsigma"]),
        mixed=parts["mixed"],
        dsigma2=np.sum(parts["dsigma2"]),
        third=third,
    )


def smooth_polynomial(
    coefficients: Sequence[float], weights: Array, x: Array, sigma: float, noise: Noise
) -> Exact:
    """``sum_i weights_i sum_k coefficients_k y_i**k``, of degree four at most."""
    x = np.asarray(x, np.float64)

    def derivative(in_x: int, in_sigma: int) -> Array:
        total = np.zeros_like(x)
        for k, coefficient in enumerate(coefficients):
            for j in range(k + 1):
                # One term of E (x + sigma eps)**k, differentiated as a monomial in x and sigma.
                if k - j < in_x or j < in_sigma:
                    continue
                falling = scipy.special.poch(k - j - in_x + 1, in_x)
                falling *= scipy.special.poch(j - in_sigma + 1, in_sigma)
                powers = x ** (k - j - in_x) * sigma ** (j - in_sigma)
                total += coefficient * comb(k, j) * noise.moments[j] * falling * powers
        return weights * total

    return _assemble_separable(
        {
            "value": derivative(0, 0),
            "first": derivative(1, 0),
            "second": derivative(2, 0),
            "third": derivative(3, 0),
            "dsigma": derivative(0, 1),
            "mixed": derivative(1, 1),
            "dsigma2": derivative(0, 2),
        }
    )


# --- Linear and quadratic forms, half-spaces, balls, bumps -----------------------------------


def smooth_linear(a: Array, x: Array, sigma: float, noise: Noise) -> Exact:
    """``a . y``."""
    return smooth_quadratic(np.zeros((len(a), len(a))), a, x, sigma, noise)


def smooth_quadratic(matrix: Array, a: Array, x: Array, sigma: float, noise: Noise) -> Exact:
    """``y' matrix y + a . y`` with a symmetric matrix."""
    x = np.asarray(x, np.float64)
    ones = np.ones_like(x)
    mean = noise.moments[1]
    # A linear form needs no variance.
    variance = noise.moments[2] - mean**2 if np.any(matrix) else 0.0
    curvature = variance * np.trace(matrix) + mean**2 * ones @ matrix @ ones
    shifted = x + sigma * mean
    return Exact(
        value=x @ matrix @ x
        + 2.0 * sigma * mean * ones @ matrix @ x
        + sigma**2 * curvature
        + a @ shifted,
        gradient=2.0 * matrix @ shifted + a,
        hessian=2.0 * matrix,
        dsigma=2.0 * mean * ones @ matrix @ x + 2.0 * sigma * curvature + mean * np.sum(a),
        mixed=2.0 * mean * matrix @ ones,
        dsigma2=2.0 * curvature,
        third=np.zeros((len(x),) * 3),
    )


def smooth_halfspace(a: Array, bound: float, x: Array, sigma: float, noise: Noise) -> Exact:
    """``1[a . y > bound]``, for stable noise: Normal, and Cauchy."""
    if noise.name not in ("Normal", "Cauchy"):
        raise ValueError(f"no closed form for {noise.name} noise")
    norm = np.linalg.norm(a, 2 if noise.name == "Normal" else 1)
    # The noise along a is the one-dimensional noise at the scale sigma * norm.
    part = smooth_profile(step, np.asarray(a @ x - bound), sigma * norm, noise)
    return Exact(
        value=part["value"],
        gradient=part["first"] * a,
        hessian=part["second"] * np.multiply.outer(a, a),
        dsigma=part["dsigma"] * norm,
        mixed=part["mixed"] * norm * a,
        dsigma2=part["dsigma2"] * norm**2,
        third=part["third"] * np.multiply.outer(a, np.multiply.outer(a, a)),
    )


# The law of a difference of two independent draws, and its scale.
DIFFERENCES = {
    "Normal": (normal, np.sqrt(2.0)),
    "Gumbel": (logistic, 1.0),
    "Cauchy": (cauchy, 2.0),
}


def smooth_pair(weight: float, x: Array, sigma: float, noise: Noise) -> Exact:
    """``weight * 1[y_0 > y_1]`` in two dimensions, where the law of eps_1 - eps_0 is known."""
    law, scale = DIFFERENCES[noise.name]
    difference = np.array([1.0, -1.0])
    part = smooth_profile(step, np.asarray(difference @ x), sigma * scale, law)
    outer = np.multiply.outer(difference, difference)
    return Exact(
        value=weight * part["value"],
        gradient=weight * part["first"] * difference,
        hessian=weight * part["second"] * outer,
        dsigma=weight * part["dsigma"] * scale,
        mixed=weight * part["mixed"] * scale * difference,
        dsigma2=weight * part["dsigma2"] * scale**2,
        third=weight * part["third"] * np.multiply.outer(outer, difference),
    )


def smooth_ball(radius: float, x: Array, sigma: float) -> Exact:
    """``1[|y| <= radius]`` under Normal noise.

    ``|y|^2 / sigma^2`` follows the noncentral chi-squared law with the noncentrality
    ``|x|^2 / sigma^2``, whose distribution function has the derivative
    ``(F_{n+2} - F_n) / 2`` in it.
    """
    x = np.asarray(x, np.float64)
    n, identity = len(x), np.eye(len(x))
    squares = x @ x
    at, noncentrality = radius**2 / sigma**2, squares / sigma**2

    def differences(order: int) -> float:
        cdf = [scipy.special.chndtr(at, n + 2 * k, noncentrality) for k in range(order + 1)]
        return float(np.diff(cdf, order)[0] if order else cdf[0]) / 2.0**order

    first, second, third = (differences(order) for order in (1, 2, 3))
    scale = 2.0 / sigma**2  # noncentrality = scale * |x|^2 / 2, so its gradient is scale * x
    outer = np.multiply.outer(x, x)
    permuted = sum(
        np.transpose(np.multiply.outer(identity, x), axes)
        for axes in ((0, 1, 2), (0, 2, 1), (2, 0, 1))
    )
    gradient = first * scale * x
    hessian = second * scale**2 * outer + first * scale * identity
    tensor = third * scale**3 * np.multiply.outer(outer, x) + second * scale**2 * permuted
    # Under Normal noise dF/dsigma = sigma * Laplacian F; differentiate once more for the rest.
    laplacian = np.trace(hessian)
    mixed = sigma * np.einsum("ijj->i", tensor)
    # F depends on x / sigma and radius / sigma alone, and through |x| alone in x.
    fourth = differences(4)
    bilaplacian = (
        fourth * scale**4 * squares**2
        + third * scale**3 * squares * (4.0 + 2.0 * n)
        + second * scale**2 * (n**2 + 2.0 * n)
    )
    return Exact(
        value=np.asarray(differences(0)),
        gradient=gradient,
        hessian=hessian,
        dsigma=np.asarray(sigma * laplacian),
        mixed=mixed,
        dsigma2=np.asarray(laplacian + sigma**2 * bilaplacian),
        third=tensor,
    )


def smooth_bump(x: Array, sigma: float) -> Exact:
    """``exp(-|y|^2 / n)`` in n dimensions under Normal noise.

    Each coordinate gives ``exp(-x_i^2 / (n q)) / sqrt(q)`` with ``q = 1 + 2 sigma^2 / n``.
    """
    x = np.asarray(x, np.float64)
    n, identity = len(x), np.eye(len(x))
    q = 1.0 + 2.0 * sigma**2 / n
    value = np.exp(-(x @ x) / (n * q)) * q ** (-n / 2.0)
    slope = -2.0 * x / (n * q)  # the gradient of log F
    bend = -2.0 / (n * q)
    outer = np.multiply.outer(slope, slope)
    permuted = sum(
        np.transpose(np.multiply.outer(identity, slope), axes)
        for axes in ((0, 1, 2), (0, 2, 1), (2, 0, 1))
    )
    # In q, log F has the derivatives rate and rate1; q has 4 sigma / n and 4 / n in sigma.
    rate = x @ x / (n * q**2) - n / (2.0 * q)
    rate1 = -2.0 * (x @ x) / (n * q**3) + n / (2.0 * q**2)
    dq = 4.0 * sigma / n
    return Exact(
        value=np.asarray(value),
        gradient=value * slope,
        hessian=value * (outer + bend * identity),
        dsigma=np.asarray(value * rate * dq),
        mixed=value * (rate * dq * slope + 2.0 * x / (n * q**2) * dq),
        dsigma2=np.asarray(value * ((rate**2 + rate1) * dq**2 + rate * 4.0 / n)),
        third=value * (np.multiply.outer(outer, slope) + bend * permuted),
    )


# --- Orders: argmax, ranks, permutations, maximum --------------------------------------------


def _homogeneous(
    degree: int,
    value: Array,
    gradient: Array,
    hessian: Array,
    x: Array,
    sigma: float,
    third: Array | None = None,
) -> Exact:
    """Adds the derivatives in sigma for a function that is homogeneous of the given degree.

    Euler: ``x . F_x + sigma F_sigma = degree F``, and its derivatives in x and in sigma.
    """
    dsigma = (degree * value - gradient @ x) / sigma
    mixed = ((degree - 1) * gradient - hessian @ x) / sigma
    dsigma2 = ((degree - 1) * dsigma - mixed @ x) / sigma
    return Exact(value, gradient, hessian, dsigma, mixed, dsigma2, third)


def _tanh_sinh(count: int = 401, reach: float = 3.4) -> tuple[Array, Array]:
    """Nodes and weights on (0, 1) for integrands that may be singular at the ends."""
    t = np.linspace(-reach, reach, count)
    half = 0.5 * np.pi * np.sinh(t)
    nodes = scipy.special.expit(2.0 * half)
    weights = 0.25 * np.pi * np.cosh(t) / np.cosh(half) ** 2 * (t[1] - t[0])
    return nodes, weights


def _integrate(integrand: Callable[[Array], Array], noise: Noise, shifts: Sequence[float]) -> Array:
    """``E integrand(eps)``; the integrand maps (nodes,) to (..., nodes).

    It may have the noise's kinks, and the same moved by ``-shifts``.
    """
    # In u = G(eps) the range is finite and no tail is cut off.
    kinks = {float(noise.cdf(np.asarray(k - s))) for k in noise.kinks for s in (0.0, *shifts)}
    edges = [0.0, *sorted(u for u in kinks if 1e-9 < u < 1.0 - 1e-9), 1.0]
    nodes, weights = _tanh_sinh()
    total: Any = 0.0
    for low, high in itertools.pairwise(edges):
        u = np.clip(low + (high - low) * nodes, 1e-300, np.nextafter(1.0, 0.0))
        total = total + integrand(noise.quantile(u)) @ (weights * (high - low))
    return np.asarray(total)


def _count_below(chances: Array) -> Array:
    """The law of the number of successes in independent trials (Poisson-binomial).

    Args:
        chances: (trials, nodes).

    Returns:
        (trials + 1, nodes).
    """
    law = np.ones((1, chances.shape[1]))
    for chance in chances:
        law = _one_more(law, 1.0 - chance, chance)
    return law


def _one_more(law: Array, failure: Array, success: Array) -> Array:
    """The law of the count with one more trial of the given weights."""
    none = np.zeros((1, law.shape[1]))
    return np.concatenate([law * failure, none]) + np.concatenate([none, law * success])


def rank_probabilities(x: Array, sigma: float, noise: Noise) -> tuple[Array, Array, Array]:
    """``P[i, k]``, the chance that coordinate i has exactly k others below it.

    Given ``y_i = x_i + sigma e``, coordinate j is below with the chance
    ``q_j = G(e + (x_i - x_j) / sigma)``, independently. The derivative in a ``q_j`` gives trial j
    the weights -1 for failure and 1 for success.

    Returns:
        P of shape (D, D), its Jacobian (D, D, D) and its Hessian (D, D, D, D).
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    value, gradient, hessian = np.zeros((n, n)), np.zeros((n, n, n)), np.zeros((n, n, n, n))
    for i in range(n):
        others = [j for j in range(n) if j != i]
        shifts = (x[i] - x[others]) / sigma

        def integrand(e: Array, shifts: Array = shifts) -> Array:
            at = e + shifts[:, None]
            chance, density, slope = noise.cdf(at), noise.pdf(at), noise.pdf1(at)
            one = np.ones_like(e)
            parts = [_count_below(chance)]
            for a in range(len(shifts)):
                change = _one_more(_count_below(np.delete(chance, a, axis=0)), -one, one)
                # Trial a depends on x_j through the argument of G, by -1 / sigma.
                parts += [-density[a] / sigma * change, slope[a] / sigma**2 * change]
                for b in range(a):
                    rest = _count_below(np.delete(chance, [a, b], axis=0))
                    change = _one_more(_one_more(rest, -one, one), -one, one)
                    parts.append(density[a] * density[b] / sigma**2 * change)
            return np.stack(parts)

        parts = iter(_integrate(integrand, noise, list(shifts)))
        value[i] = next(parts)
        for a, j in enumerate(others):
            gradient[i, :, j] = next(parts)
            hessian[i, :, j, j] = next(parts)
            for place, height in noise.jumps:
                # Where the density jumps, its derivative has a point mass.
                e = np.array([place - shifts[a]])
                chance = noise.cdf(e + np.delete(shifts, a)[:, None])
                change = _one_more(_count_below(chance), -np.ones(1), np.ones(1))
                hessian[i, :, j, j] += height * noise.pdf(e) / sigma**2 * change[:, 0]
            for m in others[:a]:
                hessian[i, :, j, m] = hessian[i, :, m, j] = next(parts)
        # Moving all coordinates together changes nothing.
        gradient[i, :, i] = -gradient[i].sum(axis=-1)
        hessian[i, :, i, :] = -hessian[i].sum(axis=-2)
        hessian[i, :, :, i] = -hessian[i].sum(axis=-1)
    return value, gradient, hessian


def smooth_permutation(x: Array, sigma: float, noise: Noise) -> Exact:
    """The matrix ``1[y_i has k others below it]``."""
    return _homogeneous(0, *rank_probabilities(x, sigma, noise), x, sigma)


def smooth_argmax(x: Array, sigma: float, noise: Noise) -> Exact:
    """The one-hot vector of the largest coordinate, by quadrature."""
    value, gradient, hessian = rank_probabilities(x, sigma, noise)
    return _homogeneous(0, value[:, -1], gradient[:, -1], hessian[:, -1], x, sigma)


def smooth_ranks(x: Array, sigma: float, noise: Noise) -> Exact:
    """The ranks, 1 for the smallest, from the law of the difference of two draws of noise.

    ``1 + sum_j K((x_i - x_j) / sigma)`` with ``K(d) = P(eps_j - eps_i < d) = E G(eps + d)``.
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    value, gradient, hessian = np.ones(n), np.zeros((n, n)), np.zeros((n, n, n))
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            d = (x[i] - x[j]) / sigma

            def integrand(e: Array, d: float = d) -> Array:
                return np.stack([noise.cdf(e + d), noise.pdf(e + d), noise.pdf1(e + d)])

            chance, density, slope = _integrate(integrand, noise, [d])
            for place, height in noise.jumps:
                slope += height * noise.pdf(np.asarray(place - d))
            sign = np.zeros(n)
            sign[i], sign[j] = 1.0, -1.0
            value[i] += chance
            gradient[i] += density / sigma * sign
            hessian[i] += slope / sigma**2 * np.multiply.outer(sign, sign)
    return _homogeneous(0, value, gradient, hessian, x, sigma)


def smooth_max(x: Array, sigma: float, noise: Noise) -> Exact:
    """The largest coordinate. Its gradient is the smoothed argmax, its Hessian that's Jacobian."""
    x = np.asarray(x, np.float64)
    chances, jacobian, hessian = rank_probabilities(x, sigma, noise)
    value = chances[:, -1] @ x
    for i in range(len(x)):
        shifts = (x[i] - np.delete(x, i)) / sigma

        def integrand(e: Array, shifts: Array = shifts) -> Array:
            return sigma * e * np.prod(noise.cdf(e + shifts[:, None]), axis=0)

        value = value + _integrate(integrand, noise, list(shifts))
    return _homogeneous(
        1, np.asarray(value), chances[:, -1], jacobian[:, -1], x, sigma, hessian[:, -1]
    )


def smooth_argmax_gumbel(x: Array, sigma: float) -> Exact:
    """The one-hot vector of the largest coordinate under Gumbel noise: a softmax."""
    x = np.asarray(x, np.float64)
    p = scipy.special.softmax(x / sigma)
    identity = np.eye(len(x))
    away = identity - p  # away[i, j] = 1[i = j] - p_j
    jacobian = p[:, None] * away / sigma
    curvature = np.einsum("ij,ik->ijk", away, away) - (p[:, None] * away)[None]
    hessian = p[:, None, None] * curvature / sigma**2
    return _homogeneous(0, p, jacobian, hessian, x, sigma)


def smooth_max_gumbel(x: Array, sigma: float) -> Exact:
    """The largest coordinate under Gumbel noise: a log-sum-exp."""
    x = np.asarray(x, np.float64)
    choice = smooth_argmax_gumbel(x, sigma)
    value = sigma * (scipy.special.logsumexp(x / sigma) + np.euler_gamma)
    return _homogeneous(
        1, np.asarray(value), choice.value, choice.gradient, x, sigma, choice.hessian
    )


# --- The same functions in JAX ---------------------------------------------------------------


def argmax_one_hot(y: jax.Array) -> jax.Array:
    """The one-hot vector of the largest coordinate."""
    return jax.nn.one_hot(jnp.argmax(y), y.shape[0], dtype=jnp.float32)


def ranks(y: jax.Array) -> jax.Array:
    """The rank of each coordinate, 1 for the smallest."""
    return (jnp.argsort(jnp.argsort(y)) + 1).astype(jnp.float32)


def permutation(y: jax.Array) -> jax.Array:
    """The matrix whose entry (i, k) is 1 where coordinate i has k others below it."""
    return jax.nn.one_hot(jnp.argsort(jnp.argsort(y)), y.shape[0], dtype=jnp.float32)


def indicator(condition: jax.Array) -> jax.Array:
    """0.0 or 1.0."""
    return condition.astype(jnp.float32)


def _constant(array: Any, y: jax.Array) -> jax.Array:
    return jnp.asarray(array, y.dtype)


POINT = np.array([0.5, -0.3125])
WEIGHTS = np.array([1.0, 0.5])
MATRIX = np.array([[0.5, 0.25], [0.25, 0.375]])
SCORES = np.array([0.5, 0.0625, -0.3125])


def _separable_case(
    name: str,
    noise: Noise,
    sigma: float,
    profile: Profile,
    scalar: Callable[[jax.Array], jax.Array],
) -> Case:
    return Case(
        name,
        lambda y: jnp.sum(_constant(WEIGHTS, y) * scalar(y).astype(y.dtype)),
        lambda x, s: smooth_separable(profile, WEIGHTS, x, s, noise),
        POINT,
        sigma,
    )


def step_and_choice(noise: Noise, sigma: float = 0.5) -> Case:
    """``1[y_0 > 0] - 1[y_0 > y_1]``, for Normal, Gumbel and Cauchy noise.

    Bounded, and no derivative up to the third is zero, or small against what it is estimated from,
    in x or in sigma: so the statistical tests have power for all of them at once.
    """
    return Case(
        "step_and_choice",
        lambda y: (indicator(y[0] > 0) - indicator(y[0] > y[1])).astype(y.dtype),
        lambda x, s: (
            smooth_separable(step, np.array([1.0, 0.0]), x, s, noise)
            + smooth_pair(-1.0, x, s, noise)
        ),
        np.array([0.125, 0.75]),
        sigma,
    )


def window(noise: Noise, sigma: float = 0.5) -> Case:
    """``1/4 + 1[0 < y_0 <= 1/2]`` in one dimension.

    Another with power for all derivatives; fun(x) is near the mean, so it serves as a baseline even
    where it is the only one, beside a single sample.
    """
    profile = Profile(offset=0.25, jumps=((0.0, 1.0), (0.5, -1.0)))
    return Case(
        "window",
        lambda y: (0.25 + indicator((y[0] > 0) & (y[0] <= 0.5))).astype(y.dtype),
        lambda x, s: smooth_separable(profile, np.ones(1), x, s, noise),
        np.array([-0.125]),
        sigma,
    )


def cases(noise: Noise, sigma: float = 0.75) -> list[Case]:
    """All cases whose exact numbers exist for this noise."""
    profiles: list[tuple[str, Profile, Callable]] = [
        ("step", step, lambda y: y > 0),
        ("clip", clip(-0.5, 1.0), lambda y: jnp.clip(y, -0.5, 1.0)),
    ]
    orders = [
        ("argmax", argmax_one_hot, smooth_argmax),
        ("ranks", ranks, smooth_ranks),
        ("permutation", permutation, smooth_permutation),
    ]
    if noise.has_moments:
        profiles += [
            ("relu", relu, lambda y: jnp.maximum(y, 0)),
            ("absolute", absolute, jnp.abs),
            ("floor", floor(400 if noise.name == "StudentT" else 60), jnp.floor),
        ]
        orders.append(("max", jnp.max, smooth_max))
    found = [
        _separable_case(name, noise, sigma, profile, scalar) for name, profile, scalar in profiles
    ]
    found.append(window(noise, sigma))
    found += [
        Case(name, fun, lambda x, s, smooth=smooth: smooth(x, s, noise), SCORES, sigma)
        for name, fun, smooth in orders
    ]
    if noise.has_moments:
        coefficients = (0.0, 1.0, 0.25, 0.0625)
        found += [
            Case(
                "linear",
                lambda y: jnp.dot(_constant(WEIGHTS, y), y),
                lambda x, s: smooth_linear(WEIGHTS, x, s, noise),
                POINT,
                sigma,
            ),
            Case(
                "quadratic",
                lambda y: (
                    jnp.dot(y, jnp.dot(_constant(MATRIX, y), y)) + jnp.dot(_constant(WEIGHTS, y), y)
                ),
                lambda x, s: smooth_quadratic(MATRIX, WEIGHTS, x, s, noise),
                POINT,
                sigma,
            ),
            Case(
                "cubic",
                lambda y: jnp.dot(
                    _constant(WEIGHTS, y), jnp.polyval(_constant(coefficients[::-1], y), y)
                ),
                lambda x, s: smooth_polynomial(coefficients, WEIGHTS, x, s, noise),
                POINT,
                sigma,
            ),
        ]
    if noise.name in DIFFERENCES:
        found.append(step_and_choice(noise, sigma))
    if noise.name in ("Normal", "Cauchy"):
        direction = np.array([1.0, -2.0])
        found.append(
            Case(
                "halfspace",
                lambda y: indicator(jnp.dot(_constant(direction, y), y) > 0.25),
                lambda x, s: smooth_halfspace(direction, 0.25, x, s, noise),
                POINT,
                sigma,
            )
        )
    if noise.name == "Normal":
        found += [
            Case(
                "ball",
                lambda y: indicator(jnp.dot(y, y) <= 1.0),
                lambda x, s: smooth_ball(1.0, x, s),
                POINT,
                sigma,
            ),
            Case(
                "bump",
                lambda y: jnp.exp(-jnp.dot(y, y) / y.shape[0]),
                smooth_bump,
                POINT,
                sigma,
            ),
        ]
    return found
