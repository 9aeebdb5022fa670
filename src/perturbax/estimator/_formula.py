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
                higher degrees a polynomial in z with coefficients beta, see `_surrogate`, or for
                groups of one sample `_left_out`
    E q         its mean at x + sigma eps, in closed form; with derivatives in a and r

    V = mean_i [ w_i (f_i - q_i) + E q_i ]

Means are over the samples that are not missing. The value of V is the plain mean of the f_i. Its
derivatives in x and sigma, which it has through a and r alone, are unbiased at every order, because
q_i does not depend on the noise of sample i.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..execution._chunks import (
    Chunk,
    drawer,
    evaluate_at,
    kept_noise,
    stacked,
    summed,
    vmapped_in_parts,
)
from ..execution._plan import (
    Operands,
    Plan,
    Point,
    cut,
    group_sizes,
    in_groups,
    noise_in,
)
from ..scale._matrices import Blocks
from ..tracing._broadcasting import where
from ..tracing._derivative_rules import live_jvp, with_jvp
from . import _left_out, _surrogate

# Values that tell the unit of all. XLA compiles a larger maximum in three parts.
_SOME = 31


def formula(
    plan: Plan, key: Array, point: Point, operands: Operands, in_parts: bool = False
) -> tuple[Callable[[Array, Any], list[Array]], list[Array]]:
    """V as a function of a and r, which JAX differentiates in everything, to any order; and aux.

    In a part for each leaf, lest a leaf that is not finite spoil the derivatives of the others.
    Calling V does not evaluate fun again. `in_parts` goes through batches in parts that fit into
    the cache.
    """
    run = _evaluated_in_parts if in_parts else _evaluated
    z, aux, surrogates = run(plan, key, point, operands)
    noise, noise_of = noise_in(plan, operands), drawer(plan, key, operands, z)
    number, outputs = surrogates.number, plan.outputs

    def value(a: Array, r: Any) -> list[Array]:
        def weigh(chunk: Chunk, part: Part) -> list[Array]:
            z = noise_of(chunk)
            w = unit_weight(log_density(plan, noise, z, a, r))[:, None].astype(plan.value_dtype)
            return [jnp.sum(w * v, axis=0) for v in cut(residual(plan, noise, z, part), outputs)]

        weighed = summed(plan, weigh, surrogates.parts)
        expected = expected_surrogate(plan, noise, surrogates, a, r)
        means = cut(lax.stop_gradient(surrogates.value), outputs)
        v = [s / number + e for s, e in zip(weighed, expected, strict=True)]
        return with_value(means, v)

    return value, aux


def _evaluated(
    plan: Plan, key: Array, point: Point, operands: Operands
) -> tuple[Array | None, list[Array], "Surrogates"]:
    """What V needs of the samples: their noise, if it is kept, aux and surrogates."""
    z = kept_noise(plan, key, operands)
    noise_of = drawer(plan, key, operands, z)
    f, aux = stacked(plan, lambda c, _: evaluate_at(plan, operands, point, noise_of(c)))
    return z, aux, fitted(plan, operands, point, noise_of, f)


def _in_parts(plan: Plan, *args: Any) -> Any:
    return jax.tree.map(jnp.asarray, vmapped_in_parts(plan, partial(_evaluated, plan), *args))


def _in_parts_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Any, Any]:
    def evaluated(*args: Any) -> Any:
        return jax.tree.map(jnp.asarray, _evaluated(plan, *args))

    return live_jvp(evaluated, primals, tangents)


# Derivatives are taken of all inputs of a batch at once: a function that custom_vmap has made
# cannot be differentiated forwards over reverse.
_evaluated_in_parts = with_jvp(_in_parts, _in_parts_jvp, 1, symbolic_zeros=True)


# --- Weigh


def unit_weight(log_density: Array) -> Array:
    """w = exp(l - stop_gradient(l)): it cannot overflow, and is 1 where l is infinite.

    Not by a derivative rule, which JAX drops from what it computes anew in reverse mode.

    References:
      Foerster et al., DiCE: The Infinitely Differentiable Monte Carlo Estimator, 2018,
      arXiv:1802.05098
    """
    change = log_density - lax.stop_gradient(log_density)
    return jnp.exp(where(jnp.isinf(log_density), 0, change))


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


def grad_log_prob(noise: Any, z: Array) -> Array:
    """d log p / dz, at each row of z: the score, less its sign."""
    # Not by noise.score: with Gumbel noise XLA would compute the exponential at each use of it.
    return jax.grad(lambda z: jnp.sum(log_prob_of(noise, z)))(z)


# --- Combine


class Part(NamedTuple):
    """What is known of samples, a row each, and of groups, a row each, after they are evaluated."""

    rest: Array  # f less a constant, (N, M), or less q where there is no beta
    beta: Array | None  # coefficients (groups, P, M) of the polynomials that predict the rest
    sizes: Array  # how many samples of each group are not missing, (groups,)
    present: Array | None  # which samples these are, (N,); None for all
    left_out: _left_out.Rows | None = None  # of each sample's surrogate, instead of beta


class Surrogates(NamedTuple):
    """Values and their predictions, averaged over all samples that are not missing."""

    parts: Part  # of all groups
    number: Any  # of samples that are not missing
    value: Array  # mean of f, (M,)
    mean: Array  # of the baselines, (M,), or of beta, (P, M)
    common: Array | None = None  # to the surrogates of all samples, see `_left_out`, (D, M)


def present_in(plan: Plan, f: Array) -> Array | None:
    """Which rows of the values f (C, M) are not missing: those without a NaN; None for all."""
    return ~jnp.any(jnp.isnan(f), axis=1) if plan.drop_missing else None


def kept(rows: Array, present: Array | None) -> Array:
    """Rows (C, ...), zero where a sample is missing."""
    if present is None:
        return rows
    return where(present.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


class Values(NamedTuple):
    """What surrogates are made of: values, and which of them there are."""

    f: Array  # (N, M), zero where a sample is missing
    present: Array | None  # as in `Part`
    sizes: Array  # as in `Part`
    number: Any  # of samples that are not missing

    def mean(self, of_groups: Array) -> Array:
        """The mean over samples of what each group has, a row each."""
        shares = self.sizes.astype(self.f.dtype) / self.number
        # Not a product of matrices, which takes longer to compile.
        return jnp.sum(shares.reshape(-1, *[1] * (of_groups.ndim - 1)) * of_groups, axis=0)


def fitted(
    plan: Plan,
    operands: Operands,
    point: Point,
    noise_of: Callable[[Chunk], Array],
    f: Array,
) -> Surrogates:
    """Each group's surrogate, from the values f (N, M) of the other groups."""
    present = present_in(plan, f)
    sizes, number = jnp.asarray(group_sizes(plan), jnp.int32), plan.num_samples
    if present is not None:
        f = kept(f, present)
        sizes = jnp.sum(in_groups(plan, present.astype(jnp.int32)), axis=1)
        number = jnp.sum(sizes).astype(f.dtype)
    values, value = Values(f, present, sizes, number), jnp.sum(f, axis=0) / number
    if plan.degree is None:
        return Surrogates(Part(f, None, sizes, present), number, value, jnp.zeros_like(value))
    if plan.degree == 0:
        b = baselines(plan, operands, point, f, sizes, present)
        rest = f - jnp.repeat(b, plan.group_size, axis=0)[: plan.num_samples]
        return Surrogates(Part(rest, None, sizes, present), number, value, values.mean(b))
    # For digits only: the fit is equivariant, so that these constants have no influence on f - q
    # but by rounding; unless all others are missing, and there is no fit.
    first = lax.stop_gradient(f[:1])
    values = values._replace(f=kept(f - first, present))
    fit = _left_out_fit if plan.fits_each_sample else _polynomial_fit
    part, *means = fit(plan, noise_in(plan, operands), noise_of, values, first)
    return Surrogates(part, number, value, *means)


def _left_out_fit(
    plan: Plan, noise: Any, noise_of: Callable[[Chunk], Array], values: Values, first: Array
) -> tuple[Part, Array, Array]:
    """Of each sample, by those of all others; and the means that `Surrogates` has."""
    f, present, sizes, _ = values
    # Lest squares overflow or vanish; of few samples one may be far larger than all others.
    unit = unit_of(f, len(f)).astype(f.dtype)
    z = stacked(plan, lambda chunk, _: noise_of(chunk))
    fit = _left_out.fit(z - noise.mean, f / unit[None], _fit_weight(noise, z, present))
    rows = fit.rows._replace(lost=fit.rows.lost * unit[None])
    rest = _restored(fit.rest * unit[None], first, jnp.sum(sizes) - sizes, present)
    part = Part(rest, None, sizes, present, rows)
    return part, fit.mean * unit[None], fit.common * unit[None]


def _polynomial_fit(
    plan: Plan, noise: Any, noise_of: Callable[[Chunk], Array], values: Values, first: Array
) -> tuple[Part, Array]:
    """Of each group, by those of all others; and the mean that `Surrogates` has."""
    f, present, sizes, _ = values
    degree, unit = plan.degree or 0, unit_of(f).astype(f.dtype)
    enough = _surrogate.enough(plan.dim, degree, plan.num_groups, plan.group_size)
    seen = np.minimum(group_sizes(plan), enough)

    def equations_of(chunk: Chunk, rows: Any) -> _surrogate.Equations:
        z, (part, counts) = noise_of(chunk), rows
        weight = _fit_weight(noise, z, counts)
        # Rows that the last group lacks have no weight.
        z, part, weight = (in_groups(plan, v)[:, : seen[0]] for v in (z, part, weight))
        phi = _surrogate.features(z, degree, noise.mean).astype(f.dtype)
        return _surrogate.normal_equations(phi, part, weight)

    equations = stacked(plan, equations_of, (f / unit[None], present))
    least, counts = int((seen.sum() - seen).min()), None
    if present is not None:
        seen = jnp.sum(in_groups(plan, present.astype(jnp.int32))[:, :enough], axis=1)
        counts = jnp.sum(seen) - seen
        of_samples = jnp.repeat(counts, plan.group_size)[: plan.num_samples]
        f = _restored(f, first, of_samples, present)
    elif seen[-1] < seen[0]:
        counts = jnp.asarray(seen.sum() - seen, jnp.int32)
    beta = _surrogate.fit(equations, least, counts, plan.dim) * unit[None, None]
    return Part(f, beta, sizes, present), values.mean(beta)


def _fit_weight(noise: Any, z: Array, present: Array | None) -> Array:
    """What a sample counts in a fit: the mean square of its score, (C,)."""
    return kept(jnp.mean(grad_log_prob(noise, z) ** 2, axis=1), present)


def _restored(rest: Array, first: Array, others: Array, present: Array | None) -> Array:
    """f - q (N, M) of values less `first`: whole where q was made of no `others` (N,)."""
    if present is None:
        return rest
    own = where((others == 0)[:, None], jnp.broadcast_to(first, rest.shape), 0)
    return rest + kept(own, present)


def residual(plan: Plan, noise: Any, z: Array, part: Part) -> Array:
    """f_i - q_i of a chunk, (C, M); zero where a sample is missing."""
    rest = part.rest
    if part.beta is not None:
        q = _surrogate.predict(part.beta, in_groups(plan, z), plan.degree or 0, noise.mean)
        rest = rest - q.reshape(q.shape[0] * q.shape[1], q.shape[2])[: rest.shape[0]]
    return kept(rest, part.present)


def coefficients(surrogates: Surrogates, part: Part) -> Array | None:
    """Those of each group's polynomial, of the groups of a part, (groups, P, M); None for none."""
    if part.left_out is None or surrogates.common is None:
        return part.beta
    return _left_out.coefficients(part.left_out, surrogates.common)


def expected_surrogate(
    plan: Plan, noise: Any, surrogates: Surrogates, a: Array, r: Any
) -> list[Array]:
    """E q, averaged over the groups, a part for each leaf."""
    means = cut(surrogates.mean, plan.outputs)
    if not plan.degree:
        return means
    phi = _surrogate.expected_features(a, r, plan.degree, noise)
    return [phi.astype(mean.dtype) @ mean for mean in means]


def baselines(
    plan: Plan,
    operands: Operands,
    point: Point,
    f: Array,
    sizes: Array,
    present: Array | None,
) -> Array:
    """b: for each group, the mean of f over the other groups and of f0, if used, (groups, M)."""
    centre, counted = at_x(plan, operands, point) if plan.evaluates_at_x else (centre_of(f[0]), 0)
    sums = jnp.sum(in_groups(plan, kept(f - centre[None], present)), axis=1)
    others = jnp.sum(sums, axis=0)[None] - sums
    count = (jnp.sum(sizes) - sizes + counted)[:, None]
    b = centre[None] + others * share_of_one(count, f.dtype)
    # Where all others are missing, the centre may be the group's own value.
    return b if present is None else where(count > 0, b, 0)


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
    return centre_of(f0), jnp.all(jnp.isfinite(f0)).astype(np.int32)


def centre_of(one: Array) -> Array:
    """What to subtract from values before summing them, for digits; it does not count as one."""
    one = lax.stop_gradient(one)
    return where(jnp.isfinite(one), one, 0)


def share_of_one(count: Any, dtype: Any) -> Array:
    """The weight of one of `count` values of a dtype in their mean; 0 if there is none."""
    # JAX divides integers in single precision.
    number = jnp.maximum(count, 1).astype(jnp.finfo(dtype).dtype)
    return where(count > 0, 1 / number, 0).astype(dtype)


def unit_of(f: Array, rows: int = _SOME) -> Array:
    """A magnitude of each column of f (N, M), as so many of its rows tell it; held fixed."""
    # An odd number apart, for rows of a net that are a power of two apart lie together.
    some = lax.stop_gradient(f[:: -(-f.shape[0] // rows) | 1])
    largest = jnp.max(jnp.abs(some), axis=0)
    return where(largest > 0, largest, 1)


def _with_value_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return with_value(*primals), tangents[1]


# The first argument, with the derivatives of the second, which has the same expectation.
with_value = with_jvp(lambda value, derivatives: value, _with_value_jvp)
