r"""Linear surrogates for groups of one sample, each fitted on all other samples, by one inverse.

With fewer samples than coordinates (N and D of them) a ridge regression is cheaper in the samples.
With z less its mean, w = |s|^2 / D as in `_surrogate`, S = diag(w)^(1/2), s = S 1 and g = S f, the
minimiser of sum_i w_i (f_i - c - slope . z_i)^2 + rho |slope|^2 has the slope Z^T S B g, where

    B = M - M s s^T M / (s^T M s),    M = (S Z Z^T S + rho)^-1.

Fitted on all samples but i, it has the slope Z^T S (B g - e_i B_i) with e_i = (B g)_i / B_ii, and
e_i is what it leaves of g_i, so that one inverse serves all N fits.

Each is drawn towards a constant, to (1 - keep_i) constant + keep_i regression, with the keep_i from
0 to 1 that would predict its own samples best had each been left out, which the same inverse tells.
Few samples leave keep uncertain. So it is a posterior mean, cut to 0 and 1: the prior is normal of
mean 0 and variance 1, and errors are normal, with the mean square that the best keep leaves of
n - 1 numbers.
Nothing in the surrogate of sample i depends on z_i or f_i.

References:
  Allen, The Relationship between Variable Selection and Data Augmentation and a Method for
    Prediction, 1974, on what a fit leaves of a sample that it has not seen
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
    present, weight, tiny = root > 0, root**2, float(jnp.finfo(root.dtype).eps)
    others = jnp.sum(present, dtype=root.dtype) - 1
    pairs = present & present.T & ~np.eye(len(root), dtype=bool)
    total = _safe(_others(weight))
    mean = _others(root.astype(g.dtype) * g) / total.astype(g.dtype)
    # Of sample j by what is fitted without i, over what is left once it is fitted without j, too.
    of_constant = total / jnp.maximum(total - weight.T, tiny * total)
    of_slope = 1 / jnp.maximum(own.T - b**2 / own, tiny * own.T)
    constant = where(pairs, of_constant, 0), g, root.T, mean
    slope = where(pairs, of_slope, 0), dual, b, error
    cc, ce, ee = _product(constant, constant), _product(constant, slope), _product(slope, slope)
    most = cc - 2 * ce + ee
    chance = jnp.maximum(cc - (cc - ce) * ((cc - ce) / where(most > 0, most, 1)), 0)
    most += chance / _safe(others - 1)
    keep = jnp.clip((cc - ce) / where(most > 0, most, 1), 0, 1)
    # Of two others what both leave is one number, which tells nothing.
    return where(present & (others > 2), keep, 0)


def _product(one: tuple[Array, ...], other: tuple[Array, ...]) -> Array:
    """sum_j v_ij (p_j - q_ij r_i) v'_ij (p'_j - q'_ij r'_i), (N, M), of (v, p, q, r) and another.

    What a constant and a regression leave of sample j are of this form; p and r have a column for
    each output.
    """
    (scale, p, q, r), (other_scale, p2, q2, r2) = one, other
    scale = scale * other_scale
    left, right = (matmul((scale * v).astype(p.dtype), w) for v, w in ((q, p2), (q2, p)))
    both = jnp.sum(scale * q * q2, axis=1, keepdims=True)
    return matmul(scale, _dot(p, p2)) - _dot(r, left) - _dot(r2, right) + both * _dot(r, r2)


def coefficients(rows: Rows, common: Array) -> Array:
    """Those of the surrogates of some samples, (n, 1 + D, M), 0 in place of their constants."""
    slopes = common[None] * rows.keep[:, None] - rows.own[:, :, None] * rows.lost[:, None]
    return jnp.concatenate([jnp.zeros_like(slopes[:, :1]), slopes], axis=1)


def _others(rows: Array) -> Array:
    """The sum over all rows but each.

    Summed, not taken from the total: a sample of large weight would leave nothing but rounding.
    """
    return matmul(jnp.asarray(1 - np.eye(len(rows)), rows.dtype), rows)


def _dot(left: Array, right: Array) -> Array:
    """The products of real numbers, or of complex ones as of vectors."""
    return jnp.real(jnp.conj(left) * right)


def _safe(divisor: Any) -> Array:
    """The divisor, 1 where it is 0: of samples that are missing, or of none."""
    return where(divisor == 0, 1, divisor)
