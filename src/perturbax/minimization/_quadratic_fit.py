"""A quadratic surrogate of a function, fitted to recent samples, however many there are."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

# Logarithms, base 10, of what is chosen for each fit, relative to the prior variance of the linear
# part: the ridge, and the prior variances of the quadratic part and, of a function that depends on
# a key, of what the values of a step have in common; their bounds, and where they begin. Single
# precision cannot factorise with smaller ridges; under larger ones, steps would be too short to
# find out that the function is not noise alone.
_RIDGES = (-12, 0)
_RIDGES_SINGLE = (-5, 0)
_QUADRATICS = (-3, 3)
_COMMON = (-3, 1)
FIRST = (-4, -1, -1)
# A prior variance that leaves the constant free.
_CONSTANT = 10.0
# Most coordinates whose curvatures are learnt as a matrix, at a cost of their third power a step.
MOST_METRIC = 200


class Fit(NamedTuple):
    """A quadratic surrogate in units of the noise, around a centre.

    Attributes:
      value: at the centre.
      gradient: there.
      curvature: a symmetric matrix.
      unsure: standard deviation of what the prior says of the curvature along one direction.
      value_error: standard error of the value.
      explained: share of the variance between values that is predicted where they are left out.
      prior: logarithms of the ridge and the prior variances that predict best.
    """

    value: Array
    gradient: Array
    curvature: Array
    unsure: Array
    value_error: Array
    explained: Array
    prior: Array


def normal_scores(values: Array) -> Array:
    """Quantiles of the normal distribution in place of values, by their ranks; ties share one."""
    known = jnp.isfinite(values)
    others = jnp.where(known, values, jnp.inf)[None]
    below = jnp.sum(others < values[:, None], axis=1)
    up_to = jnp.sum(others <= values[:, None], axis=1)
    centred = (below + up_to).astype(values.dtype) / jnp.maximum(known.sum(), 1) - 1
    return jnp.where(known, math.sqrt(2) * lax.erf_inv(jnp.where(known, centred, 0)), jnp.nan)


def fit(
    z: Array, values: Array, ranked: Array, before: Array, count: Array, same_step: np.ndarray
) -> Fit:
    r"""A quadratic polynomial fitted to values at points z, the Bayesian way.

    The prior of its coefficients is normal, with a curvature that is one number times the identity,
    plus a symmetric matrix whose entries are as likely positive as negative. Where the function
    depends on a key, another one in each step, values of a step have a further number in common.
    Ridge and prior variances move to the neighbour that predicts left-out values best, which is
    what counts where the function is no quadratic; those of the polynomial do so in turn. In many
    coordinates there are too few samples to predict one from the others, and it is the neighbour
    under which the values are most likely. Under normal noise the coefficients of a least-squares
    fit are those of Stein's identity: the smoothed function's own gradient and Hessian.

    Args:
      z: shape (M, D).
      values: shape (M,); those that are not finite are left out.
      ranked: whether values are scores of ranks, which have no outliers.
      before: logarithms of the ridge and the prior variances so far, (2,), or with that of what a
        step has in common (3,).
      count: number of the step.
      same_step: which samples are of one step, (M, M), 1 or 0.
    """
    dim = z.shape[1]
    known = jnp.isfinite(values)
    num = jnp.maximum(known.sum(), 1)
    ordered = jnp.sort(jnp.where(known, values, jnp.inf))
    middle = ordered[(num - 1) // 2] / 2 + ordered[num // 2] / 2
    middle = jnp.where(jnp.isfinite(middle), middle, 0)
    residual = jnp.where(known, values - middle, 0)
    unit = jnp.abs(residual).sum() / num + jnp.finfo(values.dtype).tiny
    residual = residual / unit
    gram = z @ z.T
    squares = jnp.diagonal(gram)
    spread = (squares - dim) / math.sqrt(2 * dim)
    # What lies far away, or high above, is described less well by one quadratic.
    above = jnp.where(ranked, 0, jnp.maximum(residual, 0))
    trust = 1 / (jnp.maximum(squares / dim, 1) * (1 + above) ** 2) ** 2
    ridges = _RIDGES if values.dtype == np.float64 else _RIDGES_SINGLE
    lowest, highest = np.array([ridges, _QUADRATICS, _COMMON][: before.size], np.int32).T
    both = known[:, None] & known[None, :]
    counted = jnp.where(known, trust, 0)

    def inverse_of(root: Array) -> Array:
        return solve_triangular(root, jnp.eye(len(values), dtype=z.dtype), lower=True)

    def left_out(inverse: Array, white: Array) -> Array:
        """Each value against the fit to all others."""
        return jnp.where(known, inverse.T @ white, 0) / jnp.sum(inverse**2, 0)

    few = dim <= MOST_METRIC

    def quality(logs: Array) -> tuple[Array, Array]:
        """How good it is, and the root of the covariances; in few coordinates, its inverse."""
        ridge, prior, *common = 10.0 ** logs.astype(z.dtype)
        kernel = _CONSTANT + gram / dim
        kernel = kernel + prior * (gram**2 / (2 * dim**2) + 3 * jnp.outer(spread, spread))
        if common:
            kernel = kernel + common[0] * same_step
        noise = ridge / trust
        matrix = jnp.where(both, kernel, 0) + jnp.diag(jnp.where(known, noise, 1))
        root = jnp.linalg.cholesky(matrix)
        if few:
            root = inverse_of(root)
            good = -(counted @ left_out(root, root @ residual) ** 2)
        else:
            white = solve_triangular(root, residual, lower=True)
            log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
            tiny = jnp.finfo(values.dtype).tiny
            good = -0.5 * num * jnp.log(white @ white / num + tiny) - log_det
        return jnp.where(jnp.isfinite(good), good, -jnp.inf), root

    axes = jnp.eye(before.size, dtype=jnp.int32)
    up = jnp.concatenate([axes[count % 2][None], axes[2:]])
    moves = jnp.concatenate([jnp.zeros_like(up[:1]), up, -up])
    priors = jnp.clip(before + moves, lowest, highest)
    good, roots = jax.vmap(quality)(priors)
    best = jnp.argmax(good)
    failed = ~jnp.isfinite(good[best])
    prior = 10.0 ** priors[best, 1].astype(z.dtype)

    inverse = roots[best] if few else inverse_of(roots[best])
    white = inverse @ residual
    variance = white @ white / num
    weights = inverse.T @ white
    weights = jnp.where(known, weights, 0)
    isotropic = prior * 3 * (spread @ weights) * math.sqrt(2 / dim)
    curvature = prior * (z.T * weights) @ z / dim**2 + isotropic * jnp.eye(dim, dtype=z.dtype)
    at_centre = jnp.where(known, _CONSTANT - prior * 3 * spread * math.sqrt(dim / 2), 0)
    left = inverse @ at_centre
    error = jnp.sqrt(jnp.maximum(_CONSTANT + prior * 3 * dim / 2 - left @ left, 0) * variance)
    away = residual - counted @ residual / counted.sum()
    if before.size > 2:
        # That the values of a step have something in common is no merit of the polynomial.
        others = jnp.where(both, same_step, 0) - jnp.diag(known.astype(z.dtype))
        others_sum, number = others @ residual, others.sum(axis=1)
        away = jnp.where(number > 0, residual - others_sum / jnp.maximum(number, 1), away)
    total = counted @ away**2
    missed = counted @ left_out(inverse, white) ** 2
    explained = 1 - missed / jnp.where(total > 0, total, 1)
    explained = jnp.where((total > 0) & ~failed, explained, 0)
    firmer = before.at[0].set(jnp.minimum(before[0] + 2, ridges[1]))
    return Fit(
        value=jnp.where(known.any(), middle + unit * (at_centre @ weights), jnp.nan),
        gradient=unit * (z.T @ weights) / dim,
        curvature=unit * (curvature + curvature.T) / 2,
        unsure=unit * jnp.sqrt(2 * prior * variance) / dim,
        value_error=unit * error,
        explained=explained,
        prior=jnp.where(failed, firmer, priors[best]),
    )
