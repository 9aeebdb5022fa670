r"""Scales that are matrices, one for each leaf of x that has one: y = x + L eps.

With x0 and L0, which are x and L held fixed, and y = x0 + L0 z held fixed too,

    L^-1 (y - x) = a + R z,   R = L^-1 L0,   a = -R L0^-1 (x - x0).

L0^-1 is a constant, so R^-1 = 1 + L0^-1 (L - L0) is linear in L, with the value 1. Hence nothing
but derivatives of R and of log |det R| has to be worked out, and those by two short rules.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..tracing._derivative_rules import with_jvp
from ..tracing._linear_algebra import invert, matmul, row_lengths


def is_matrix(sigma: Any, leaf: Any) -> bool:
    """Whether a scale is a matrix for its leaf; any other broadcasts into it."""
    return np.ndim(sigma) > np.ndim(leaf)


def scaled(sigma: Array, z: Array) -> Array:
    """The scale times noise of the shape of one leaf."""
    if not is_matrix(sigma, z):
        return sigma * z
    return jnp.tensordot(sigma, z, axes=z.ndim, precision=lax.Precision.HIGHEST)


class Blocks(NamedTuple):
    """R, block by block: factors (n,) for a leaf whose coordinates have scales, or (n, n)."""

    blocks: tuple[Array, ...]

    def times(self, z: Array) -> Array:
        """R z, for each row z of (C, D)."""
        parts = [
            part * r[None] if r.ndim == 1 else matmul(part, r.T)
            for r, part in zip(self.blocks, self._cut(z), strict=True)
        ]
        return jnp.concatenate(parts, axis=1)

    def solve(self, v: Array) -> Array:
        """R^-1 v for one vector v (D,)."""
        parts = [
            part / r if r.ndim == 1 else matmul(_inverse_of_unit(r), part)
            for r, part in zip(self.blocks, self._cut(v), strict=True)
        ]
        return jnp.concatenate(parts)

    def log_det(self) -> Array:
        """log |det R|."""
        parts = [jnp.sum(jnp.log(r)) if r.ndim == 1 else _log_det(r) for r in self.blocks]
        return jnp.sum(jnp.stack(parts))

    def covariance(self, j: np.ndarray, k: np.ndarray) -> Array:
        """The entries (j, k) of R^-1 R^-T; of its diagonal alone, or of few coordinates."""
        roots = [1 / r if r.ndim == 1 else _inverse_of_unit(r) for r in self.blocks]
        if np.array_equal(j, k):
            squares = [b**2 if b.ndim == 1 else jnp.sum(b**2, axis=1) for b in roots]
            return jnp.concatenate(squares)[j]
        dense = [jnp.diag(b) if b.ndim == 1 else b for b in roots]
        root = jax.scipy.linalg.block_diag(*dense)
        return jnp.sum(root[j] * root[k], axis=1)

    def _cut(self, values: Array) -> list[Array]:
        ends = np.cumsum([r.shape[0] for r in self.blocks])
        return jnp.split(values, ends[:-1], axis=-1)


def departures(
    departure: Array, scales: Sequence[Array], shapes: Sequence[tuple[int, ...]]
) -> tuple[Array, Blocks]:
    """a, shape (D,), and R, for the flat x - x0 and one scale a leaf."""
    a, blocks, start = [], [], 0
    for sigma, shape in zip(scales, shapes, strict=True):
        size = int(np.prod(shape))
        part = departure[start : start + size]
        start += size
        if sigma.ndim <= len(shape):
            sigma = jnp.broadcast_to(sigma, shape).reshape(size)
            blocks.append(lax.stop_gradient(sigma) / sigma)
            a.append(-part / sigma)
        else:
            matrix = sigma.reshape(size, size)
            fixed = lax.stop_gradient(matrix)
            inverse = invert(fixed)
            unit = jnp.eye(size, dtype=matrix.dtype) + matmul(inverse, matrix - fixed)
            blocks.append(_inverse_of_unit(unit))
            a.append(-matmul(blocks[-1], matmul(inverse, part)))
    return jnp.concatenate(a), Blocks(tuple(blocks))


def _unit(matrix: Array) -> Array:
    """The inverse of a matrix whose value is 1: the same value, other derivatives."""
    return matrix


def _unit_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    inverse = _inverse_of_unit(*primals)
    return inverse, -matmul(matmul(inverse, tangents[0]), inverse)


_inverse_of_unit = with_jvp(_unit, _unit_jvp)


def _zero(matrix: Array) -> Array:
    """log |det| of a matrix whose value is 1: zero, with derivatives."""
    return jnp.zeros((), matrix.dtype)


def _log_det_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _log_det(*primals), jnp.sum(_inverse_of_unit(*primals).T * tangents[0])


_log_det = with_jvp(_zero, _log_det_jvp)


def is_regular(matrix: Array) -> Array:
    """Whether a matrix has an inverse to the precision of its dtype."""
    matrix = lax.stop_gradient(matrix)
    if not matrix.size:
        return jnp.array(True)
    return is_accurate(invert(matrix) * row_lengths(matrix)[None], matrix.dtype)


def is_accurate(inverse: Any, dtype: Any) -> Any:
    """Whether an inverse, of a matrix with rows of length 1, has digits left in `dtype`."""
    return abs(inverse).max() * inverse.shape[0] * float(jnp.finfo(dtype).eps) < 1
