r"""Linear surrogates for groups of one sample, each fitted on all other samples, by one inverse.

With fewer samples than coordinates (N and D of them) a ridge regression is cheaper in the samples.
With z less its mean, w = |s|^2 / D as in `_surrogate`, S = diag(w)^(1/2), s = S 1 and g = S f, the
minimiser of sum_i w_i (f_i - c - slope . z_i)^2 + rho |slope|^2 has the slope Z^T S B g, where

    B = M - M s s^T M / (s^T M s),    M = (S Z Z^T S + rho)^-1.

Fitted on all samples but i, it has the slope Z^T S (B g - e_i B_i) with e_i = (B g)_i / B_ii, and
e_i is what it leaves of g_i, so that one inverse serves all N fits.

Each is drawn towards a constant, to (1 - keep_i) constant + keep_i regression, with the keep_i from
0 to 1 that would predict its own samples best had they been left out, as generalised
cross-validation tells: what a fit leaves of n samples, of which it determines k coefficients, times
n / (n - k). Nothing in the surrogate of sample i depends on z_i or f_i.

References:
  Craven and Wahba, Smoothing Noisy Data with Spline Functions, 1978, on both
  Breiman, Stacked Regressions, 1996, on weighing predictors by what they predict held out
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..tracing._broadcasting import where
from ..tracing._linear_algebra import invert_positive, matmul

# Relative to D, for w |z|^2 has a mean of D times the variance of the noise times the information
# in it, 1 for Normal noise and hardly more for others. Less serves functions that are linear.
_RIDGE = 0.3


class Rows(NamedTuple):
    """Of each sample's surrogate, whose slope is common * keep_i - own_i * lost_i."""

    keep: Array  # (N, M)
    own: Array  # (N, D)
    lost: Array  # (N, M)


class LeftOut(NamedTuple):
    """What is left of each value, and the surrogates, linear in z less its mean."""

    rest: Array  # f_i - q_i(z_i), (N, M)
    mean: Array  # coefficients averaged over the samples that are not missing, (1 + D, M)
    common: Array  # (D, M)
    rows: Rows


def fit(z: Array, f: Array, weight: Array) -> LeftOut:
    """Fits a surrogate for each sample on all others.

    Args:
      z: noise less its mean, (N, D).
      f: values (N, M), of a size that squares do not overflow.
      weight: w, (N,), 0 for samples that are missing.
    """
    real = jnp.finfo(f.dtype).dtype
    # They depend on the noise alone, which has no derivative.
    z, weight = lax.stop_gradient((z.astype(real), weight.astype(real)))
    root, ridge = jnp.sqrt(weight)[:, None], np.asarray(_RIDGE * z.shape[1], real)
    present, scaled = root > 0, root * z
    b, own, share = _swept(scaled, root, ridge)
    g = root.astype(f.dtype) * f
    dual = matmul(b.astype(f.dtype), g)
    error = dual / own.astype(f.dtype)
    keep = lax.stop_gradient(_keep(b, own, root, g, dual, error))

    b, scaled, root, share, keep = (v.astype(f.dtype) for v in (b, scaled, root, share, keep))
    number = jnp.sum(present, dtype=f.dtype)
    lost, error = keep * error, error / _safe(root)
    without = f - _others(root * g) / _safe(_others(root**2))
    rest = without + keep * (error - without)
    weights = (dual * jnp.sum(keep, axis=0)[None] - matmul(b, lost)) / number
    # What surrogates predict of their own samples, less their constants.
    slopes = keep * (f - jnp.sum(share * g, axis=0)[None] - error * (1 - root * share))
    constants = where(present, f - rest - slopes, 0)
    rows = [jnp.sum(constants, axis=0, keepdims=True) / number, matmul(scaled.T, weights)]
    return LeftOut(
        rest,
        jnp.concatenate(rows),
        matmul(scaled.T, dual),
        Rows(keep, matmul(b, scaled), lost),
    )


def _swept(scaled: Array, root: Array, ridge: np.ndarray) -> tuple[Array, Array, Array]:
    """B (N, N), its diagonal (N, 1), and M s / (s^T M s), (N, 1), of S Z and s."""
    eye = np.eye(len(scaled), dtype=scaled.dtype)
    inverse = invert_positive((matmul(scaled, scaled.T) + ridge * eye)[None])[0]
    total = matmul(inverse, root)
    share = total / _safe(jnp.sum(root * total))
    b = inverse - total * share.T
    return b, jnp.sum(b * eye, axis=1, keepdims=True), share


def _keep(b: Array, own: Array, root: Array, g: Array, dual: Array, error: Array) -> Array:
    """How much of each regression to keep beside a constant, (N, M), told by the other samples."""
    present = root > 0
    others = jnp.sum(present, dtype=root.dtype) - 1
    squares = jnp.sum(b**2, axis=1, keepdims=True)
    # n / (n - k) for the constant, and for the regression, which leaves rho times the dual.
    of_constant = others / _safe(others - 1)
    of_slope = others / _safe(jnp.sum(where(present, own, 0)) - squares / own)
    # Sums over the samples other than i: of the square of what the constant leaves, c, of its
    # product with what the regression leaves, e, and of the square of the latter.
    sums = _others(root.astype(g.dtype) * g)
    cc = _others(_dot(g, g)) - _dot(sums, sums) / _safe(_others(root**2))
    ce = jnp.sum(_dot(g, dual), axis=0)[None] - _dot(error, dual)
    ee = jnp.sum(_dot(dual, dual), axis=0)[None] + squares * _dot(error, error)
    ee -= 2 * _dot(error, matmul(b.astype(g.dtype), dual))
    cc, ce, ee = of_constant**2 * cc, of_constant * of_slope * ce, of_slope**2 * ee
    most = cc - 2 * ce + ee
    keep = jnp.clip((cc - ce) / where(most > 0, most, 1), 0, 1)
    # Of two others what both leave is one number, which tells nothing.
    return where(present & (others > 2), keep, 0)


def coefficients(rows: Rows, common: Array) -> Array:
    """Those of the surrogates of some samples, (n, 1 + D, M), 0 in place of their constants."""
    slopes = common[None] * rows.keep[:, None] - rows.own[:, :, None] * rows.lost[:, None]
    return jnp.concatenate([jnp.zeros_like(slopes[:, :1]), slopes], axis=1)


def _others(rows: Array) -> Array:
    """The sum over all rows but each."""
    return jnp.sum(rows, axis=0)[None] - rows


def _dot(left: Array, right: Array) -> Array:
    """The products of real numbers, or of complex ones as of vectors."""
    return jnp.real(jnp.conj(left) * right)


def _safe(divisor: Any) -> Array:
    """The divisor, 1 where it is 0: of samples that are missing, or of none."""
    return where(divisor == 0, 1, divisor)
