r"""How perturbed optimizers perturb their scores, additively or multiplicatively.

The perturbed scores are, coordinate by coordinate,

    u = theta + sigma Z                        or    u = theta exp(sigma Z - sigma^2 / 2)

with noise Z; the second, for Normal Z, keeps signs and has the mean theta. Both are functions of

    v = m + r Z,   r = sigma / sigma0,   sigma0 m = theta - theta0   or
                                         sigma0 m = log(theta / theta0) - (sigma^2 - sigma0^2) / 2

where theta0 and sigma0 are theta and sigma held fixed: m is always 0 and r always 1, but with
derivatives. So a layer is a perturbed function of v at m with the scale r. That function sees the
noise itself, and never has to recover it as (u - theta) / sigma, which loses digits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks, _leaves
from .._types import PyTree
from ..noise._foreign import AdaptedNoise
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Normal
from ..scale import _scales
from ..scale._matrices import is_matrix
from ..tracing._derivative_rules import departure, with_jvp


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """The perturbation of scores theta, as functions of v; see the top of this file.

    Attributes:
      theta: the scores, a list of arrays.
      sigma: their scales, one for each, or a single one for all; none of it smaller than 0.
      multiplicative: which of the two kinds.
      dtype: that of v, at least single precision.
    """

    theta: list[Array]
    sigma: list[Array]
    multiplicative: bool
    dtype: np.dtype

    @property
    def _scales(self) -> list[Array]:
        """One scale for each array of scores."""
        return _scales.one_each([s.astype(self.dtype) for s in self.sigma], self.theta)

    def location(self) -> list[Array]:
        """m: zeros, with derivatives in theta and sigma."""
        fixed = lax.stop_gradient(self._scales)
        return [d / s for d, s in zip(self._departures(), fixed, strict=True)]

    def scale(self) -> Any:
        """r: ones, with a derivative in sigma; one for each array of scores, or one for all."""
        ratios = [s.astype(self.dtype) for s in self.sigma]
        ratios = [s / lax.stop_gradient(s) for s in ratios]
        return ratios[0] if len(ratios) == 1 and not ratios[0].ndim else ratios

    def point(self, v: list[Array]) -> list[Array]:
        """u, in the dtypes of theta; it has no derivative but in v."""
        fixed = lax.stop_gradient((self.theta, self._scales))
        points = []
        for theta, sigma, one in zip(*fixed, v, strict=True):
            wide = theta.astype(self.dtype)
            if self.multiplicative:
                wide = wide * jnp.exp(sigma * one - sigma**2 / 2)
            else:
                wide = wide + sigma * one
            points.append(wide.astype(theta.dtype))
        return points

    def slopes(self, v: list[Array]) -> tuple[list[Array] | None, list[Array]]:
        """du/dtheta and du/dsigma at fixed noise, where u is what it is; None stands for ones.

        Both are functions of u, theta and sigma, and are differentiated in theta and sigma at
        fixed u where derivatives of higher order are taken.
        """
        fixed = lax.stop_gradient(self._scales)
        noise = [
            (s0 * one - d) / s
            for s0, one, d, s in zip(fixed, v, self._departures(), self._scales, strict=True)
        ]
        if not self.multiplicative:
            return None, noise
        factors = [
            jnp.exp(s0 * one - s0**2 / 2 - _log_departure(theta.astype(self.dtype)))
            for s0, one, theta in zip(fixed, v, self.theta, strict=True)
        ]
        points = [u.astype(self.dtype) for u in self.point(v)]
        changes = [u * (z - s) for u, z, s in zip(points, noise, self._scales, strict=True)]
        return factors, changes

    def along_sigma(self, parts: list[Array]) -> list[Array]:
        """The parts of a derivative in the scales of all coordinates, one for each of sigma."""
        if len(self.sigma) == 1 and not self.sigma[0].ndim:
            return [sum((jnp.sum(v) for v in parts), jnp.zeros((), self.dtype))]
        return parts

    def _departures(self) -> list[Array]:
        wide = [v.astype(self.dtype) for v in self.theta]
        if not self.multiplicative:
            return [departure(v) for v in wide]
        # sigma^2 - sigma0^2, without the square of a large number
        gaps = [(s - lax.stop_gradient(s)) * (s + lax.stop_gradient(s)) / 2 for s in self._scales]
        return [_log_departure(v) - gap for v, gap in zip(wide, gaps, strict=True)]


def _log_departure_jvp(primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    (theta,), (theta_dot,) = primals, tangents
    change = theta_dot / theta
    return _log_departure(theta), jnp.where(jnp.isfinite(theta), change, jnp.zeros_like(theta))


# log(theta / stop_gradient(theta)): zero; at theta = 0 the derivative does not exist.
_log_departure = with_jvp(jnp.zeros_like, _log_departure_jvp)


def check_multiplicative(multiplicative: Any, noise: NoiseDistribution) -> bool:
    """A bool; raises ValueError if it is true and the noise is not standard Normal."""
    multiplicative = _checks.check_bool(multiplicative, "multiplicative")
    if multiplicative and not _is_standard_normal(noise):
        name = noise.law if isinstance(noise, AdaptedNoise) else repr(noise)
        raise ValueError(
            "multiplicative=True needs noise=Normal(), for which exp(sigma Z - sigma^2 / 2) has "
            f"the mean 1; got {name}"
        )
    return multiplicative


def _is_standard_normal(noise: NoiseDistribution) -> bool:
    """Whether the noise is this library's Normal, or another with its density."""
    if not isinstance(noise, AdaptedNoise):
        return isinstance(noise, Normal)
    # By its values, as a class of that name may have another mean and scale. Far out, too, where a
    # truncated law differs; and up to a constant, which many leave away.
    points = np.array([0.0, -9.0, -2.0, 0.5, 3.0, 9.0], np.float32)
    try:
        with jax.ensure_compile_time_eval():
            found = np.array([float(jnp.sum(noise.log_prob(jnp.asarray(z)))) for z in points])
    except Exception:  # its parameters are traced, or it is a law of whole rows, for instance
        return False
    return np.allclose(found - found[0], -(points**2) / 2, rtol=1e-4)


def score_leaves(theta: PyTree) -> tuple[list[Array], list[str], Any]:
    """The leaves of theta, their names, and its structure.

    Raises:
      TypeError: if a leaf is not an array of real floating-point numbers.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(theta)
    leaves, names = [], []
    for path, leaf in paths:
        label = f"theta{jax.tree_util.keystr(path)}"
        known = isinstance(leaf, float | np.ndarray | np.generic | Array)
        if not known or not _leaves.is_floating(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"theta must be a pytree of floating-point arrays, but {label!r} is {kind}: "
                "convert it, or pass it to the solver as a further argument"
            )
        leaves.append(jnp.asarray(leaf))
        names.append(label)
    return leaves, names, tree


def scales_of(
    sigma: PyTree, theta: PyTree, leaves: list[Array], names: list[str], multiplicative: bool
) -> list[Array]:
    """One scale for each leaf of theta, or one for all; errors as in make_perturbed_fun.

    Raises:
      ValueError: for a matrix, too.
    """
    if multiplicative:  # sigma is relative, so that no score is too large for it
        leaves = [jnp.zeros_like(v) for v in leaves]
    scales = _scales.scale_leaves(sigma, theta, leaves, names, "theta")
    for scale, leaf, name in zip(scales, leaves, names, strict=False):
        if is_matrix(scale, leaf):
            raise ValueError(
                f"sigma of shape {scale.shape} is a matrix for {name!r} of shape {leaf.shape}, "
                "which make_perturbed_fun takes; here sigma must be a number, or broadcast into "
                "theta"
            )
    return scales


def same_shapes(name: str, value: Any, theta: PyTree) -> list[Array]:
    """The leaves of `value`, floating, if it has the structure and the shapes of theta.

    Raises:
      ValueError: otherwise; it tells both shapes.
    """
    tree, wanted = jax.tree.structure(value), jax.tree.structure(theta)
    if tree != wanted:
        raise ValueError(f"{name} has the structure {tree}, expected that of theta, {wanted}")
    leaves = []
    paths, _ = jax.tree_util.tree_flatten_with_path(value)
    for (path, leaf), score in zip(paths, jax.tree.leaves(theta), strict=True):
        leaf = jnp.asarray(leaf)
        if leaf.shape != jnp.shape(score):
            label = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}{label} has the shape {leaf.shape}, expected that of theta{label}, "
                f"{jnp.shape(score)}"
            )
        if jnp.iscomplexobj(leaf):
            label = jax.tree_util.keystr(path)
            raise ValueError(f"{name}{label} must be real numbers, got {leaf.dtype}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(_leaves.noise_dtype([jnp.asarray(score)]))
        leaves.append(leaf)
    return leaves


def inner_product(theta: list[Array], y: list[Array], dtype: np.dtype) -> Array:
    """<theta, y>, where a masked score, -inf, that is not chosen counts 0."""
    products = [
        jnp.sum(times(one.astype(dtype), score.astype(dtype)))
        for score, one in zip(theta, y, strict=True)
    ]
    return sum(products, jnp.zeros((), dtype))


def times(one: Array, factor: Array) -> Array:
    """The product, element by element, where 0 times what is not finite is 0."""
    return one * jnp.where((one == 0) & ~jnp.isfinite(factor), jnp.zeros_like(factor), factor)
