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
    present, root = weight > 0, jnp.sqrt(weight)
    ridge = np.asarray(_RIDGE * z.shape[1], real)
    scaled = root[:, None] * z
    gram = matmul(scaled, scaled.T) + ridge * np.eye(len(z), dtype=real)
    inverse = invert_positive(gram[None])[0]
    total = matmul(inverse, root)
    share = total / _safe(jnp.sum(root * total))
    b = inverse - total[:, None] * share[None]
    own, squares, number = jnp.diag(b), jnp.sum(b**2, axis=1), jnp.sum(present, dtype=real)
    trace = jnp.sum(where(present, own, 0))
    # n / (n - k) for each fit of the samples other than i: of a constant, and of the regression.
    others = number - 1
    of_constant = others / _safe(others - 1)
    of_slope = others / _safe(ridge * (trace - squares / own))

    # From here on, columns and rows of the values.
    b, scaled, own, root, share, weight = (
        v.astype(f.dtype).reshape(len(z), -1) for v in (b, scaled, own, root, share, weight)
    )
    g = root * f
    dual = matmul(b, g)
    error = dual / own
    sums = jnp.sum(root * g, axis=0)[None] - root * g
    mean = sums / _safe(jnp.sum(weight) - weight)
    # Sums over the samples other than i of squares of what the constant leaves, of products of that
    # and what the regression leaves, and of squares of the latter.
    of_one = jnp.sum(_abs2(g), axis=0)[None] - _abs2(g) - jnp.real(jnp.conj(mean) * sums)
    of_both = jnp.sum(jnp.real(jnp.conj(g) * dual), axis=0)[None] - jnp.real(jnp.conj(error) * dual)
    twice = jnp.real(jnp.conj(error) * matmul(b, dual))
    of_two = jnp.sum(_abs2(dual), axis=0)[None] - 2 * twice + _abs2(error) * squares[:, None]
    of_one = of_constant**2 * of_one
    of_both = (of_constant * of_slope)[:, None] * ridge * of_both
    of_two = of_slope[:, None] ** 2 * ridge**2 * of_two
    gained, most = of_one - of_both, of_one - 2 * of_both + of_two
    # Of two others what both leave is one number, which tells nothing.
    keep = where(number > 3, jnp.clip(gained / where(most > 0, most, 1), 0, 1), 0)
    keep = lax.stop_gradient(where(present[:, None], keep, 0)).astype(f.dtype)

    lost, error, number = keep * error, error / _safe(root), number.astype(f.dtype)
    without = f - mean
    rest = without + keep * (error - without)
    weights = (dual * jnp.sum(keep, axis=0)[None] - matmul(b, lost)) / number
    # What surrogates predict of their own samples, less their constants.
    slopes = keep * (f - jnp.sum(share * f * root, axis=0)[None] - error * (1 - root * share))
    constants = where(present[:, None], f - rest - slopes, 0)
    rows = [jnp.sum(constants, axis=0, keepdims=True) / number, matmul(scaled.T, weights)]
    return LeftOut(
        rest,
        jnp.concatenate(rows),
        matmul(scaled.T, dual),
        Rows(keep, matmul(b, scaled), lost),
    )


def coefficients(rows: Rows, common: Array) -> Array:
    """Those of the surrogates of some samples, (n, 1 + D, M), 0 in place of their constants."""
    slopes = common[None] * rows.keep[:, None] - rows.own[:, :, None] * rows.lost[:, None]
    return jnp.concatenate([jnp.zeros_like(slopes[:, :1]), slopes], axis=1)


def _abs2(values: Array) -> Array:
    return jnp.real(values) ** 2 + jnp.imag(values) ** 2


def _safe(divisor: Any) -> Array:
    """The divisor, 1 where it is 0: of samples that are missing, or of none."""
    return where(divisor == 0, 1, divisor)
