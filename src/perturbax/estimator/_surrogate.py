r"""Polynomial surrogates of the function, one for each group, fitted on all the other groups.

    q_g(z) = sum_p beta_gp phi_p(z),   phi = 1, z_j - m_j, and for degree 2 (z_j - m_j)(z_k - m_k)

where m is the mean of the noise. Each q_g minimises the sum of w_i (f_i - q_g(z_i))^2 over the
samples i of other groups, with weights w_i = |s_i|^2 / D, for what the variance of a derivative
sees of a residual is its product with the score s; then it is drawn towards a constant,
and one of many squares and products towards a linear function.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..scale._matrices import Blocks
from ..tracing._broadcasting import where
from ..tracing._linear_algebra import invert_positive, matmul

RIDGE = 1e-3
_REFINEMENTS = 2
# How much of its samples a fit counts as spare at least, when their weights leave none.
_LEAST_SPARE = 0.01
# Samples that each fit is made from, for each coefficient. More hardly help: what a fit errs adds
# one part in so many to the variance that it leaves.
_ENOUGH = 32
# Multiplications that take no noticeable time.
_LITTLE = 2**20
# Above this many coordinates a surrogate of degree 2 keeps the squares alone.
_MAX_FULL = 20
# A surrogate with more coefficients than so many times those of a linear function is doubted in two
# parts. Of fewer, a second fit gains less than it takes to compile.
_MANY = 4
# Most rows of a product with the coefficients of one output that is not worth calling a library.
_FEW = 64


def num_features(dim: int, degree: int) -> int:
    """Number of coefficients of a surrogate for each output."""
    if degree < 2:
        return 1 + degree * dim
    return 1 + dim + (dim * (dim + 1) // 2 if dim <= _MAX_FULL else dim)


def enough(dim: int, degree: int, groups: int, group_size: int) -> int:
    """Of how many of its samples a group makes equations for the others' fits."""
    size = num_features(dim, degree)
    most = -(-_ENOUGH * size // max(groups - 1, 1))
    # Little is not worth a second array of features.
    return most if (group_size - most) * size**2 > _LITTLE else group_size


def features(z: Array, degree: int, mean: float) -> Array:
    """phi at each row of z (..., n, D), a row for each feature: shape (..., P, n).

    So that long rows are multiplied and put together, however few the coordinates: XLA vectorises
    no rows of three or ten numbers.
    """
    centred = (z - mean).mT
    rows = [jnp.ones_like(centred[..., :1, :]), centred]
    if degree == 2 and z.shape[-1] > _MAX_FULL:
        rows.append(centred**2)
    elif degree == 2:  # in the order of `_pairs`; by slices, for a gather takes long
        rows += [centred[..., j : j + 1, :] * centred[..., j:, :] for j in range(z.shape[-1])]
    return jnp.concatenate(rows, axis=-2)


def predict(beta: Array, z: Array, degree: int, mean: float) -> Array:
    """q at each row of z (groups, n, D), of coefficients (groups, P, M): shape (groups, n, M)."""
    if degree == 2:
        return matmul(beta.mT, features(z, degree, mean).astype(beta.dtype)).mT
    return beta[:, :1] + _apply((z - mean).astype(beta.dtype), beta[:, 1:])


def expected_features(a: Array, r: Any, degree: int, noise: Any) -> Array:
    """E phi(u) at u = (eps - a) / r, the place of x + sigma eps in terms of z: shape (P,)."""
    dim = a.shape[0]
    ahead = noise.mean - a
    shift = (r.solve(ahead) if isinstance(r, Blocks) else ahead / r) - noise.mean
    columns = [jnp.ones((1,), a.dtype), shift]
    if degree == 2:
        j, k = _pairs(dim)
        if isinstance(r, Blocks):
            covariance = noise.variance * r.covariance(j, k)
        else:
            variance = jnp.broadcast_to(noise.variance / r**2, (dim,))
            covariance = jnp.where(j == k, variance[j], 0)
        columns.append(shift[j] * shift[k] + covariance)
    return jnp.concatenate(columns)


def expected_slope_in_a(beta: Array, dim: int) -> Array:
    """What `expected_features` times beta (..., P, M) grows by with a, at a = 0: (..., M, D)."""
    return -beta[..., 1 : 1 + dim, :].mT


def expected_slope_in_r(beta: Array, dim: int, degree: int, noise: Any) -> Array:
    """The same for an r of shape (D,), at r = 1."""
    in_r = noise.mean * expected_slope_in_a(beta, dim)
    if degree == 2:
        j, k = _pairs(dim)
        in_r -= 2 * noise.variance * beta[..., 1 + dim + np.flatnonzero(j == k), :].mT
    return in_r


def _pairs(dim: int) -> tuple[np.ndarray, np.ndarray]:
    if dim <= _MAX_FULL:
        return np.triu_indices(dim)
    return np.arange(dim), np.arange(dim)


class Equations(NamedTuple):
    """Sums over the samples of each group, weighted by w; their sum over groups serves a fit."""

    gram: Array  # of phi with phi: (groups, P, P)
    moments: Array  # of phi with w, f and |f|^2: (groups, P, 1 + 2 M)


def normal_equations(phi: Array, f: Array, weight: Array) -> Equations:
    """The equations of each group.

    Args:
      phi: (groups, P, n).
      f: (groups, n, M).
      weight: (groups, n).
    """
    weight, f = weight[:, None], f.mT
    weighted = phi * weight
    rows = [weight.astype(phi.dtype), f, (jnp.abs(f) ** 2).astype(f.dtype)]
    moments = matmul(weighted, jnp.concatenate(rows, axis=1).mT)
    return Equations(matmul(weighted, phi.mT), moments)


def fit(equations: Equations, least: int, counts: Array | None, dim: int) -> Array:
    """beta, shape (groups, P, M), from the other groups' equations; equivariant under f + constant.

    Args:
      equations: of each group, at least two.
      least: number of samples that each fit has at least, if none is missing.
      counts: how many each fit has, (groups,), where not all have the same number; else None.
      dim: number of coordinates.
    """
    # Of two groups each is fitted on the other.
    pair = equations.gram.shape[0] == 2
    gram, moments = equations if pair else jax.tree.map(_others, equations)
    if counts is not None:
        # A number like those that it is multiplied by, for jax_numpy_dtype_promotion='strict'.
        counts = (counts[::-1] if pair else counts)[:, None].astype(jnp.finfo(gram.dtype).dtype)
    sums = Sums(jnp.real(gram[:, 0, :1]), moments[:, 0], least, counts)
    size, outputs, linear = gram.shape[1], moments.shape[2] // 2, 1 + dim
    moment = moments[:, :, 1 : 1 + outputs]
    beta, explained = _least_squares(gram, moment)
    if size <= _MANY * linear:
        beta = _drawn_to_constant(beta, explained, sums)
    else:
        # What squares and products explain beyond a linear function is doubted by itself, lest its
        # coefficients, which are many, cost a function that is nearly linear what that explains.
        slopes, before = _least_squares(gram[:, :linear, :linear], moment[:, :linear])
        weight = sums.weight / least
        gain = (explained - before) / least * weight
        keep = 1 - _lost(gain, explained, size - linear, size, sums) * weight
        rest = [(0, 0), (0, size - linear), (0, 0)]
        slopes = jnp.pad(_drawn_to_constant(slopes, before, sums), rest)
        beta = slopes + keep[:, None].astype(beta.dtype) * (beta - slopes)
    return beta[::-1] if pair else beta


def _least_squares(gram: Array, moment: Array) -> tuple[Array, Array]:
    """Coefficients (groups, P, M), and what they explain of the sums of |f|^2, (groups, M)."""
    size = gram.shape[1]
    # The ridge is relative to each feature's own size, and leaves the constant alone, lest a
    # constant added to f change the rest; the tiny floor is for features never seen.
    own = np.eye(size, dtype=gram.dtype)
    relative = np.array([0.0, *[RIDGE] * (size - 1)], gram.dtype)[None, :, None]
    floor = float(jnp.finfo(gram.dtype).tiny) * 1e10
    # It depends on the noise alone, which has no derivative.
    added = jax.lax.stop_gradient(relative * gram + np.asarray(floor, gram.dtype)) * own[None]
    inverse = invert_positive(jax.lax.stop_gradient(gram) + added)
    # What the ridge took from well determined coefficients is given back: each step leaves a
    # thousandth of it. Those that the samples do not determine stay small.
    beta = _apply(inverse, moment)
    rest = moment - _apply(gram, beta)
    ridge = jnp.sum(added, axis=2, keepdims=True)
    for _ in range(_REFINEMENTS):
        more = _apply(inverse, rest)
        beta, rest = beta + more, ridge * more
    # Features and weights are real; f may be complex.
    return beta, jnp.sum(jnp.real(jnp.conj(beta) * (moment + rest)), axis=1)


def _others(values: Array) -> Array:
    """For each group, the sum over all others.

    Summed, not taken from the total: a group of large weight would leave nothing but rounding.
    """
    own = np.eye(values.shape[0], dtype=bool).reshape(-1, values.shape[0], *[1] * (values.ndim - 1))
    return jnp.sum(where(own, 0, values[None]), axis=1)


class Sums(NamedTuple):
    """What else is known of the samples of each fit."""

    weight: Array  # sums of w, (groups, 1)
    totals: Array  # sums of w times w, f and |f|^2, (groups, 1 + 2 M)
    least: int  # number of samples of each fit at least, if none is missing
    counts: Array | None  # number of samples of each fit, (groups, 1), if some are missing


def _drawn_to_constant(beta: Array, explained: Array, sums: Sums) -> Array:
    """Each polynomial, drawn towards its constant as far as its samples may have made it up.

    A function that has nothing of a polynomial would otherwise pay for coefficients that are noise.

    Args:
      beta: coefficients (groups, P, M).
      explained: what they explain of the sums of |f|^2, (groups, M).
      sums: of the samples.
    """
    size, outputs = beta.shape[1:]
    # Sums become means, lest products of several of them overflow.
    weight, first = sums.weight / sums.least, sums.totals[:, 1 : 1 + outputs] / sums.least
    gain = explained / sums.least * weight - jnp.abs(first) ** 2
    lost = _lost(gain, explained, size - 1, size, sums)
    keep, constant = 1 - lost * weight, lost.astype(beta.dtype) * first
    place = np.eye(1, size, dtype=beta.dtype)[:, :, None]
    return keep[:, None].astype(beta.dtype) * beta + place * constant[:, None]


def _lost(gain: Array, explained: Array, tried: int, size: int, sums: Sums) -> Array:
    """Which share of a gain chance may have made, at most 1, over the mean weight: (groups, M).

    This is the positive-part estimator of James and Stein: of what is explained, the number of
    coefficients tried times the mean square of what is not may be chance. With no more samples than
    coefficients nothing can be told, and all is lost. Of weighted samples fewer count; if they are
    fewer than the coefficients, a fit is kept that leaves next to nothing unexplained.

    Args:
      gain: what is explained more, a mean, times the mean weight, (groups, M).
      explained: what is explained in all, a sum, (groups, M).
      tried: how many coefficients explain the gain.
      size: how many there are in all.
      sums: of the samples.

    References:
      James and Stein, Estimation with Quadratic Loss, 1961
    """
    least, outputs = sums.least, explained.shape[1]
    per_sample = 1 / least
    weight, totals = sums.weight * per_sample, jnp.real(sums.totals) * per_sample
    squared_weight, squares = totals[:, :1], totals[:, 1 + outputs :]
    rounding = 16 * float(jnp.finfo(totals.dtype).eps)
    unexplained = jnp.maximum((1 - rounding) * squares - explained * per_sample, 0)
    spare = least * weight**2 - size * squared_weight
    counts = least if sums.counts is None else sums.counts
    spare = jnp.maximum(spare, _LEAST_SPARE * (counts - size) * squared_weight)
    # What chance may explain, and what is explained, both times the same.
    chance, gain = tried * unexplained * squared_weight * weight, gain * spare
    told = (spare > 0) & (gain > chance)
    # The share over the weight in one division, for each is compiled by itself.
    safe = where(weight > 0, weight, 1)
    return jax.lax.stop_gradient(where(told, chance, 1) / where(told, gain * weight, safe))


def _apply(matrix: Array, beta: Array) -> Array:
    """matrix (groups, n, P) @ beta (groups, P, M): of few rows by a sum, else in long rows."""
    if beta.shape[2] == 1 and matrix.shape[1] <= _FEW:
        return jnp.sum(matrix * beta.mT, axis=2, keepdims=True)
    return matmul(beta.mT, matrix.mT).mT
