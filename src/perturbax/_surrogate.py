r"""Polynomial surrogates of the function, one for each group, fitted on all the other groups.

    q_g(z) = sum_p beta_gp phi_p(z),   phi = 1, z_j - m_j, and for degree 2 (z_j - m_j)(z_k - m_k)

where m is the mean of the noise. Each q_g minimises the sum of w_i (f_i - q_g(z_i))^2 over the
samples i of other groups, with weights w_i = |s_i|^2 / D, for what the variance of a derivative
sees of a residual is its product with the score s; then it is drawn towards a constant.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._blocks import Blocks

RIDGE = 1e-3
_REFINEMENTS = 2
# How much of its samples a fit counts as spare at least, when their weights leave none.
_LEAST_SPARE = 0.01
_PRECISION = jax.lax.Precision.HIGHEST
# Above this many coordinates a surrogate of degree 2 keeps the squares alone.
_MAX_FULL = 20
# Larger matrices are inverted by halves, in products; each half takes time to compile.
_MAX_ELIMINATION = 64


def num_features(dim: int, degree: int) -> int:
    """Number of coefficients of a surrogate for each output."""
    if degree < 2:
        return 1 + degree * dim
    return 1 + dim + (dim * (dim + 1) // 2 if dim <= _MAX_FULL else dim)


def features(z: Array, degree: int, mean: float) -> Array:
    """phi at each row of z (C, D): shape (C, P)."""
    centred = z - mean
    columns = [jnp.ones_like(z[:, :1]), centred]
    if degree == 2:
        j, k = _pairs(z.shape[1])
        columns.append(centred[:, j] * centred[:, k])
    return jnp.concatenate(columns, axis=1)


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


def _pairs(dim: int) -> tuple[np.ndarray, np.ndarray]:
    if dim <= _MAX_FULL:
        return np.triu_indices(dim)
    return np.arange(dim), np.arange(dim)


class Equations(NamedTuple):
    """Sums over the samples of each group, weighted by w; their sum over groups serves a fit."""

    products: Array  # of phi with phi and, beside them, w and f: (groups, P, P + 1 + M)
    squares: Array  # of |f|^2: (groups, M)


def normal_equations(phi: Array, f: Array, weight: Array) -> Equations:
    """The equations of each group.

    Args:
      phi: (groups, n, P).
      f: (groups, n, M).
      weight: (groups, n).
    """
    weight = weight[..., None]
    weighted = jnp.swapaxes(phi * weight, 1, 2)
    columns = jnp.concatenate([phi, weight.astype(phi.dtype), f], axis=2)
    squares = jnp.sum(weight * jnp.abs(f) ** 2, axis=1)
    return Equations(_matmul(weighted, columns), squares)


def fit(equations: Equations, least: int) -> Array:
    """beta, shape (groups, P, M), from the other groups' equations; equivariant under f + constant.

    Args:
      equations: of each group, at least two.
      least: number of samples that each fit has at least.
    """
    size = equations.products.shape[1]
    others = jax.tree.map(_others, equations)
    gram, moment = others.products[:, :, :size], others.products[:, :, size + 1 :]
    diagonal = jnp.einsum("gpp->gp", gram)
    # The ridge is relative to each feature's own size, and leaves the constant alone, lest a
    # constant added to f change the rest; the tiny floor is for features never seen.
    relative = np.full(size, RIDGE, gram.dtype)
    relative[0] = 0
    ridge = diagonal * relative[None] + jnp.finfo(gram.dtype).tiny * 1e10
    scale = jax.lax.rsqrt(diagonal + ridge)
    scaled = gram * scale[:, :, None] * scale[:, None, :]
    eye = jnp.eye(size, dtype=gram.dtype)
    # It depends on the noise alone, which has no derivative.
    stable = jax.lax.stop_gradient(scaled + (ridge * scale**2)[:, None, :] * eye[None])
    inverse = _inverse(stable, halve=least >= 2 * size)
    target = moment * scale[:, :, None]

    # What the ridge took from well determined coefficients is given back: each step leaves a
    # thousandth of it. Those that the samples do not determine stay small.
    def refine(_: Any, beta: Array) -> Array:
        return beta + _apply(inverse, target - _apply(scaled, beta))

    # A loop, for a product takes long to compile.
    beta = jax.lax.fori_loop(0, 1 + _REFINEMENTS, refine, jnp.zeros_like(target))
    return _shrunk(scale[:, :, None] * beta, others, least)


def _others(values: Array) -> Array:
    """For each group, the sum over all others.

    Summed, not taken from the total: a group of large weight would leave nothing but rounding.
    """
    if values.shape[0] == 2:
        return values[::-1]
    own = np.eye(values.shape[0], dtype=bool).reshape(-1, values.shape[0], *[1] * (values.ndim - 1))
    return jnp.sum(jnp.where(own, jnp.zeros_like(values)[None], values[None]), axis=1)


def _shrunk(beta: Array, equations: Equations, least: int) -> Array:
    """Each polynomial, drawn towards its constant as far as its samples may have made it up.

    A function that has nothing of a polynomial would otherwise pay for coefficients that are noise.
    This is the positive-part estimator of James and Stein: of what is explained, P - 1 times the
    mean square of what is not may be chance. With no more samples than coefficients nothing can be
    told, and the constant remains. Of weighted samples fewer count; if they are fewer than the
    coefficients, a fit is kept that leaves next to nothing unexplained.

    References:
      James and Stein, Estimation with Quadratic Loss, 1961
    """
    size = beta.shape[1]
    gram, moment = equations.products[:, :, :size], equations.products[:, :, size + 1 :]
    # The first feature is 1: beside it stand the sums of w and of w^2.
    totals = jnp.real(equations.products[:, 0])
    weight, squared_weight = totals[:, :1], totals[:, size : size + 1]
    # Features and weights are real; f may be complex.
    explained = jnp.sum(jnp.real(jnp.conj(beta) * (2 * moment - _apply(gram, beta))), axis=1)
    by_constant = jnp.abs(moment[:, 0]) ** 2 / weight
    spare = jnp.maximum(weight**2 / squared_weight - size, _LEAST_SPARE * (least - size))
    rounding = 16 * float(jnp.finfo(beta.dtype).eps)
    unexplained = jnp.maximum((1 - rounding) * equations.squares - explained, 0)
    chance = (size - 1) * unexplained
    gain = (explained - by_constant) * spare
    enough = (spare > 0) & (gain > chance)
    keep = jnp.where(enough, 1 - chance / jnp.where(enough, gain, 1), 0)[:, None]
    keep = jax.lax.stop_gradient(keep).astype(beta.dtype)
    constant = moment[:, :1] / weight[..., None].astype(beta.dtype)
    return jnp.concatenate([keep * beta[:, :1] + (1 - keep) * constant, keep * beta[:, 1:]], axis=1)


def _inverse(matrix: Array, halve: bool) -> Array:
    """Inverses of positive definite matrices (groups, P, P), by halves if large, or by elimination.

    Halves are faster, and wrong where the matrix is nearly singular. In plain operations: batches
    of LAPACK's Cholesky factorisations and triangular solves can bring XLA's thread pool to a
    standstill on machines with two cores.
    """
    if not halve or matrix.shape[1] <= _MAX_ELIMINATION:
        return _eliminate(matrix)
    half = matrix.shape[1] // 2
    head, off, tail = matrix[:, :half, :half], matrix[:, :half, half:], matrix[:, half:, half:]
    head = _inverse(head, halve)
    ratio = _matmul(head, off)
    tail = _inverse(tail - _matmul(jnp.swapaxes(off, 1, 2), ratio), halve)
    off = -_matmul(ratio, tail)
    head = head - _matmul(off, jnp.swapaxes(ratio, 1, 2))
    rows = [jnp.concatenate([head, off], 2), jnp.concatenate([jnp.swapaxes(off, 1, 2), tail], 2)]
    return jnp.concatenate(rows, 1)


def _eliminate(matrix: Array) -> Array:
    """Inverses by Gauss-Jordan elimination in place, each step a change of rank one."""
    index = jax.lax.iota(jnp.int32, matrix.shape[1])

    def eliminate(k: Array, table: Array) -> Array:
        unit = (index == k).astype(table.dtype)
        column = jax.lax.dynamic_index_in_dim(table, k, 2)
        row = jax.lax.dynamic_index_in_dim(table, k, 1)
        pivot = jax.lax.dynamic_index_in_dim(row, k, 2)
        return table - (column - unit[None, :, None]) * ((row + unit[None, None, :]) / pivot)

    return jax.lax.fori_loop(0, matrix.shape[1], eliminate, matrix)


def predict(phi: Array, beta: Array) -> Array:
    """q at each sample, (groups, n, M), of phi (groups, n, P) and beta (groups, P, M)."""
    return _matmul(phi, beta)


def _apply(matrix: Array, beta: Array) -> Array:
    """matrix @ beta, (groups, P, M); for a single output in a form that compiles faster."""
    if beta.shape[2] == 1:
        return jnp.sum(matrix * jnp.swapaxes(beta, 1, 2), axis=2, keepdims=True)
    return _matmul(matrix, beta)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=_PRECISION)
