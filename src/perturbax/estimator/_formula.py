r"""The formula: evaluate, weigh, combine. What is faster than this stands in `_derivatives`.

Notation, used throughout (`docs/theory.md` derives it):

    x, sigma    the point and the scale at which the function is evaluated, held fixed
    a, r        (x0 - x) / sigma and sigma0 / sigma, where x0 and sigma0 are x and sigma held fixed:
                always 0 and 1, but with derivatives; a has shape (D,), r has shape () or (D,), or
                is a matrix in `Blocks`, where sigma is one
    z           noise of a chunk of samples, shape (C, D);  y = x0 + sigma0 z
    f           values of the function at y, flattened, shape (C, M); f0 its value at x0
    l           log p(a + r z) + sum log r: the log-density of y under x + sigma eps, y held fixed
    w           exp(l - stop_gradient(l)): 1, but with the derivatives of the score function
    q           what a group's surrogate, made of the other groups' samples, predicts of f: for
                degree 0 the baseline b, the mean of their f and, where these are few, of f0; for
                higher degrees a polynomial in z with coefficients beta, see `_surrogate`
    E q         its mean at x + sigma eps, in closed form; with derivatives in a and r

    V = mean_i [ w_i (f_i - q_i) + E q_i ]

The value of V is the plain mean of the f_i. Its derivatives in x and sigma, which it has through a
and r alone, are unbiased at every order, because q_i does not depend on the noise of sample i.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..execution._chunks import Chunk, drawer, evaluate_at, stacked, summed
from ..execution._plan import (
    Operands,
    Plan,
    Point,
    cut,
    group_sizes,
    in_groups,
    mean_over_groups,
    noise_in,
)
from ..scale._matrices import Blocks
from ..tracing._derivative_rules import with_jvp
from . import _surrogate

# Values that tell the unit of all. XLA compiles a larger maximum in three parts.
_SOME = 31


def formula(
    plan: Plan, key: Array, point: Point, operands: Operands
) -> tuple[Callable[[Array, Any], list[Array]], list[Array]]:
    """V as a function of a and r, which JAX differentiates in everything, to any order; and aux.

    In a part for each leaf, lest a leaf that is not finite spoil the derivatives of the others.
    Calling V does not evaluate fun again.
    """
    noise, noise_of = noise_in(plan, operands), drawer(plan, key, operands)

    def evaluate(chunk: Chunk, _: Any) -> tuple[Array, list[Array]]:
        return evaluate_at(plan, operands, point, noise_of(chunk))

    f, aux = stacked(plan, evaluate)
    surrogates = fitted(plan, operands, point, noise_of, f)

    def value(a: Array, r: Any) -> list[Array]:
        def weigh(chunk: Chunk, parts: Any) -> list[Array]:
            z = noise_of(chunk)
            w = unit_weight(log_density(plan, noise, z, a, r))[:, None].astype(f.dtype)
            return [jnp.sum(w * v, axis=0) for v in cut(residual(plan, noise, z, *parts), outputs)]

        outputs = plan.outputs
        weighed = summed(plan, weigh, (surrogates.rest, surrogates.beta))
        expected = cut(expected_surrogate(plan, noise, surrogates, a, r), outputs)
        means = cut(jnp.mean(lax.stop_gradient(f), axis=0), outputs)
        v = [s / plan.num_samples + e for s, e in zip(weighed, expected, strict=True)]
        return with_value(means, v)

    return value, aux


# --- Weigh


def unit_weight(log_density: Array) -> Array:
    """w = exp(l - stop_gradient(l)): it cannot overflow, and is 1 where l is infinite.

    Not by a derivative rule, which JAX drops from what it computes anew in reverse mode.

    References:
      Foerster et al., DiCE: The Infinitely Differentiable Monte Carlo Estimator, 2018,
      arXiv:1802.05098
    """
    change = log_density - lax.stop_gradient(log_density)
    return jnp.exp(jnp.where(jnp.isinf(log_density), jnp.zeros_like(change), change))


def log_prob_of(noise: Any, z: Array) -> Array:
    """Log-density of each row of z."""
    return jax.vmap(lambda row: jnp.sum(noise.log_prob(row)))(z)


def log_density(plan: Plan, noise: Any, z: Array, a: Array, r: Any) -> Array:
    """l: the log-density of y = x0 + sigma0 z under x + sigma eps, shape (C,)."""
    if isinstance(r, Blocks):
        return log_prob_of(noise, a[None] + r.times(z)) + r.log_det()
    log_r = jnp.log(r)
    log_scale = jnp.sum(log_r) if r.ndim else plan.dim * log_r
    # An explicit axis for the samples, for `jax_numpy_rank_promotion='raise'`.
    return log_prob_of(noise, a[None] + (r[None] if r.ndim else r) * z) + log_scale


def slope_of(noise: Any, z: Array) -> Array:
    """d log p / dz, at each row of z: the score, less its sign."""
    # Not by noise.score: with Gumbel noise XLA would compute the exponential at each use of it.
    return jax.grad(lambda z: jnp.sum(log_prob_of(noise, z)))(z)


# --- Combine


class Surrogates(NamedTuple):
    """What is left of the values (N, M) when each group's constant is subtracted; and the rest."""

    rest: Array  # (N, M)
    beta: Array | tuple[()]  # coefficients (groups, P, M) of what polynomials predict of the rest
    mean: Array  # of the constants, (M,), or of beta, (P, M), over the groups


def fitted(
    plan: Plan,
    operands: Operands,
    point: Point,
    noise_of: Callable[[Chunk], Array],
    f: Array,
) -> Surrogates:
    """Each group's surrogate, from the values f (N, M) of the other groups."""
    if plan.degree is None:
        return Surrogates(f, (), jnp.zeros(f.shape[1], f.dtype))
    if plan.degree == 0:
        b = baselines(plan, operands, point, f)
        rest = f - jnp.repeat(b, plan.group_size, axis=0)[: plan.num_samples]
        return Surrogates(rest, (), mean_over_groups(plan, b))
    noise: Any = noise_in(plan, operands)
    # For digits only: the fit is equivariant, so that these constants have no influence on f - q
    # but by rounding.
    f = f - lax.stop_gradient(f[:1])
    unit = unit_of(f).astype(f.dtype)  # lest squares overflow or vanish
    enough = _surrogate.enough(plan.dim, plan.degree, plan.num_groups, plan.group_size)
    sizes = np.minimum(group_sizes(plan), enough)

    def equations_of(chunk: Chunk, values: Array) -> _surrogate.Equations:
        z = noise_of(chunk)
        weight = jnp.mean(slope_of(noise, z) ** 2, axis=1)
        # Rows that the last group lacks have no weight.
        z, values, weight = (in_groups(plan, v)[:, : sizes[0]] for v in (z, values, weight))
        phi = _surrogate.features(z, plan.degree or 0, noise.mean).astype(f.dtype)
        return _surrogate.normal_equations(phi, values, weight)

    equations = stacked(plan, equations_of, f / unit[None])
    least = int((sizes.sum() - sizes).min())
    beta = _surrogate.fit(equations, least) * unit[None, None]
    return Surrogates(f, beta, mean_over_groups(plan, beta))


def residual(plan: Plan, noise: Any, z: Array, rest: Array, beta: Any) -> Array:
    """f_i - q_i of a chunk, (C, M): its rows of `Surrogates.rest`, less the polynomials at z."""
    if not plan.degree:
        return rest
    phi = _surrogate.features(in_groups(plan, z), plan.degree, noise.mean).astype(rest.dtype)
    q = _surrogate.predict(phi, beta)
    return rest - q.reshape(q.shape[0] * q.shape[1], q.shape[2])[: rest.shape[0]]


def expected_surrogate(plan: Plan, noise: Any, surrogates: Surrogates, a: Array, r: Any) -> Array:
    """E q, averaged over the groups, (M,)."""
    if not plan.degree:
        return surrogates.mean
    phi = _surrogate.expected_features(a, r, plan.degree, noise)
    return phi.astype(surrogates.mean.dtype) @ surrogates.mean


def baselines(plan: Plan, operands: Operands, point: Point, f: Array) -> Array:
    """b: for each group, the mean of f over the other groups and of f0, if used, (groups, M)."""
    centre, counted = at_x(plan, operands, point) if plan.evaluates_at_x else centre_of(f[0])
    sums = jnp.sum(in_groups(plan, f - centre[None]), axis=1)
    others = jnp.sum(sums, axis=0)[None] - sums
    share = share_of_one(plan.num_samples - group_sizes(plan) + counted).astype(f.dtype)
    return centre[None] + others * share[:, None]


def weights_less_baselines(change: Array, group_size: int) -> Array:
    """e' such that sum_i e_i (f_i - b_i) = sum_i e'_i f_i for all f, for weights e, shape (N,).

    Baselines are means of values, so that what is subtracted from a value can as well be subtracted
    from the weights of others: with E_g the sum of e over group g, and n_g the number of samples
    of the other groups, e'_i = e_i + E_g / n_g - sum_h E_h / n_h. Without f0.
    """
    num = len(change)
    if group_size >= num:  # no others, hence no baseline
        return change
    group = np.arange(num) // group_size
    others = num - np.bincount(group)
    share = jax.ops.segment_sum(change, group, len(others)) / others.astype(change.dtype)
    return change + share[group] - jnp.sum(share)


def at_x(plan: Plan, operands: Operands, point: Point) -> tuple[Array, Array]:
    """f0, zero if it is not finite, and whether it counts as one more value.

    Any number would do as long as it does not depend on the noise, so it is held fixed. Its
    derivative in what fun closes over may not exist where those of the samples do.
    """
    f0 = evaluate_at(plan, operands, point, jnp.zeros((1, plan.dim), plan.dtype))[0][0]
    return centre_of(f0)[0], jnp.all(jnp.isfinite(f0)).astype(np.int32)


def centre_of(one: Array) -> tuple[Array, int]:
    """What to subtract from values before summing them, for digits; it does not count as one."""
    one = lax.stop_gradient(one)
    return jnp.where(jnp.isfinite(one), one, jnp.zeros_like(one)), 0


def share_of_one(count: Any) -> Array:
    """The weight of one of `count` values in their mean; 0 if there is none."""
    return jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0)


def unit_of(f: Array) -> Array:
    """A magnitude of each column of f (N, M), as some of its rows tell it; held fixed."""
    # An odd number apart, for rows of a net that are a power of two apart lie together.
    some = lax.stop_gradient(f[:: -(-f.shape[0] // _SOME) | 1])
    largest = jnp.max(jnp.abs(some), axis=0)
    return jnp.where(largest > 0, largest, 1)


def _with_value_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return with_value(*primals), tangents[1]


# The first argument, with the derivatives of the second, which has the same expectation.
with_value = with_jvp(lambda value, derivatives: value, _with_value_jvp)
