r"""The estimator: evaluate, weigh, combine.

Notation, used throughout (`docs/theory.md` derives it):

    x, sigma    the point and the scale at which the function is evaluated, held fixed
    a, r        (x0 - x) / sigma and sigma0 / sigma, where x0 and sigma0 are x and sigma held fixed:
                always 0 and 1, but with derivatives; a has shape (D,), r has shape () or (D,), or
                is a matrix in `Blocks`, where sigma is one
    z           noise of a chunk of samples, shape (C, D);  y = x0 + sigma0 z
    f           values of the function at y, flattened, shape (C, M); f0 its value at x0
    l           log p(a + r z) + sum log r: the log-density of y under x + sigma eps, y held fixed
    w           exp(l - stop_gradient(l)): 1, but with the derivatives of the score function
    b           baseline of each sample: the mean of f over all other groups and, where these are
                few, of f0, which is the surrogate of degree 0; for higher degrees, fitted on the
                other groups alone, see `_surrogate`
    s           score -d log p / dz of the noise, shape (C, D)

    V = mean_i [ w_i (f_i - b_i) + b_i ]

The value of V is the plain mean of the f_i. Its derivatives in x and sigma, which it has through a
and r alone, are unbiased at every order, because b_i does not depend on the noise of sample i.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..execution._evaluation import (
    MAX_ROWS,
    Plan,
    Point,
    call_fun,
    concatenate,
    cut,
    draw_noise,
    drawer,
    evaluate_at,
    group_sizes,
    in_groups,
    mean_over_groups,
    noise_in,
    over_groups,
    point_of,
    shaped,
    vmapped_in_parts,
)
from ..sampling import _random_bits
from ..scale._matrices import Blocks, departures, matmul
from ..tracing._derivative_rules import any_live, departure, is_live, live_jvp, with_jvp
from ..tracing._mesh_axes import varying, varying_axes
from . import _surrogate

# Values that tell the unit of all. XLA compiles a larger maximum in three parts.
_SOME = 31


@partial(jax.jit, static_argnums=0)
def estimate(plan: Plan, key: Array, x: list[Array], sigma: list[Array], operands: Any):
    """The Monte-Carlo estimate of E[fun(x + sigma eps)]; differentiable in x, sigma and operands.

    Args:
      plan: the static part.
      key: one typed PRNG key.
      x: the perturbed leaves.
      sigma: one scale a leaf, each of which broadcasts into the leaf, or is a matrix that has the
        leaf's axes twice; or a single number for all.
      operands: what fun and the noise close over, a pair of tuples.

    Returns:
      The leaves of the value, and of aux stacked over samples.
    """
    point = point_of(plan, x, sigma)
    # Flat from here on: what is done leaf by leaf is compiled leaf by leaf.
    flat_x = concatenate([v.astype(plan.dtype) for v in x], plan.dtype)
    flat_a, flat_r = standardise(plan, flat_x, sigma)
    words = _random_bits.root(key)
    has_aux = len(plan.fun.out_avals) > plan.num_outputs
    if has_aux or plan.fun.jaxpr.effects:
        # JAX allows no side effects inside a custom derivative rule.
        parts, aux = _differentiable(plan, words, point, flat_a, flat_r, operands)
    else:
        parts, aux = _expectation(plan, words, point, flat_a, flat_r, operands), []
    return shaped(parts, plan.fun.out_avals[: plan.num_outputs], plan.output_dtypes), aux


def standardise(plan: Plan, flat_x: Array, sigma: list[Array]) -> tuple[Array, Any]:
    """a and r."""
    away = departure(flat_x)
    scales = [v.astype(plan.dtype) for v in sigma]
    if len(scales) == 1 and scales[0].ndim == 0:
        scale = scales[0]
    elif any(v.ndim > len(shape) for v, shape in zip(scales, plan.shapes, strict=True)):
        return departures(away, scales, plan.shapes)
    else:
        scale = concatenate(
            [jnp.broadcast_to(v, shape) for v, shape in zip(scales, plan.shapes, strict=True)],
            plan.dtype,
        )
    return -away / scale, lax.stop_gradient(scale) / scale


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


def _log_density(plan: Plan, operands: Any, z: Array, a: Array, r: Any) -> Array:
    """l: the log-density of y = x0 + sigma0 z under x + sigma eps, shape (C,)."""
    if isinstance(r, Blocks):
        return log_prob_of(noise_in(plan, operands), _row(a) + r.times(z)) + r.log_det()
    log_r = jnp.log(r)
    log_scale = jnp.sum(log_r) if r.ndim else plan.dim * log_r
    return log_prob_of(noise_in(plan, operands), _row(a) + _row(r) * z) + log_scale


def _row(value: Array) -> Array:
    """With an axis for the samples: explicit, for `jax_numpy_rank_promotion='raise'`."""
    return value[None] if value.ndim else value


# --- Combine


def _with_value_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return with_value(*primals), tangents[1]


# The first argument, with the derivatives of the second, which has the same expectation.
with_value = with_jvp(lambda value, derivatives: value, _with_value_jvp)


def _centre(one: Array) -> tuple[Array, Array]:
    """What to subtract from values before summing them, and whether one value is finite."""
    finite = jnp.isfinite(one)
    return jnp.where(finite, one, jnp.zeros_like(one)), jnp.all(finite)


def _share(plan: Plan, counted: Array, sizes: Any, dtype: np.dtype) -> Array:
    """The weight of one value in the baseline of a group of the given size; 0 if there is none.

    `counted` says whether f0 is among the values.
    """
    count = (plan.num_samples - sizes).astype(np.int32) + counted.astype(np.int32)
    return jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0).astype(dtype)


def baselines(plan: Plan, operands: Any, point: Point, f: Array) -> Array:
    """b: for each group, the mean of f over the other groups and of f0, if used, (groups, M)."""
    if plan.evaluates_at_x:
        centre, counted = _centre(value_at_x(plan, operands, point))
    else:
        centre, counted = _centre(lax.stop_gradient(f[0]))[0], jnp.zeros((), bool)
    sums = jnp.sum(in_groups(plan, f - centre[None]), axis=1)
    others = jnp.sum(sums, axis=0)[None] - sums
    share = _share(plan, counted, group_sizes(plan), f.dtype)
    return centre[None] + others * share[:, None]


def unit_of(f: Array) -> Array:
    """A magnitude of each column of f (N, M), as some of its rows tell it; held fixed."""
    # An odd number apart, for rows of a net that are a power of two apart lie together.
    some = lax.stop_gradient(f[:: -(-f.shape[0] // _SOME) | 1])
    largest = jnp.max(jnp.abs(some), axis=0)
    return jnp.where(largest > 0, largest, 1)


def less_baselines(plan: Plan, f: Array, b: Array) -> Array:
    """f_i - b_i, (N, M)."""
    return f - jnp.repeat(b, plan.group_size, axis=0)[: plan.num_samples]


def fitted(
    plan: Plan, noise: Any, noise_of: Callable[[Array, int], Array], f: Array
) -> tuple[Array, Array, Callable[[Array, Array], Array]]:
    """Values less a constant, and each group's surrogate of these.

    Returns:
      The values (N, M); the coefficients (groups, P, M); and the function that predicts values from
      noise (C, D) of whole groups, but for what the last one lacks, and these groups' coefficients.
    """

    def phi(z: Array) -> Array:
        return _surrogate.features(z, plan.degree or 0, noise.mean).astype(f.dtype)

    # For digits only: the fit is equivariant, so that these constants have no influence on f - q
    # but by rounding.
    f = f - lax.stop_gradient(f[:1])
    unit = unit_of(f).astype(f.dtype)  # lest squares overflow or vanish
    enough = _surrogate.enough(plan.dim, plan.degree or 0, plan.num_groups, plan.group_size)
    sizes = np.minimum(group_sizes(plan), enough)

    def equations_of(first: Array, count: int, rows: int, values: Array) -> tuple[tuple[()], Any]:
        z = noise_of(first, count)[:rows]
        weight = jnp.mean(slope_of(noise, z) ** 2, axis=1)
        # Rows that the last group lacks have no weight.
        z, values, weight = (in_groups(plan, v)[:, : sizes[0]] for v in (z, values, weight))
        return (), _surrogate.normal_equations(phi(z), values, weight)

    def predict(z: Array, beta: Array) -> Array:
        q = _surrogate.predict(phi(in_groups(plan, z)), beta)
        return q.reshape(q.shape[0] * q.shape[1], plan.num_rows)[: z.shape[0]]

    _, equations = over_groups(plan, equations_of, f / unit[None])
    least = int((sizes.sum() - sizes).min())
    return f, _surrogate.fit(equations, least) * unit[None, None], predict


def _differentiable(
    plan: Plan, key: Array, point: Point, a: Array, r: Any, operands: Any
) -> tuple[list[Array], list[Array]]:
    """V, as an expression that JAX differentiates in everything, to any order; and aux."""
    value, aux = _evaluated(plan, key, point, operands)
    return value(a, r), aux


def _evaluated(
    plan: Plan, key: Array, point: Point, operands: Any
) -> tuple[Callable[[Array, Any], list[Array]], list[Array]]:
    """V as a function of a and r, which does not evaluate fun again, a part for each leaf; and aux.

    Parts are kept apart, lest a leaf that is not finite spoil the derivatives of the others.
    """
    avals = plan.fun.out_avals[: plan.num_outputs]
    noise = noise_in(plan, operands)
    noise_of = drawer(plan, key, operands)

    def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[tuple[()], Any]:
        z = noise_of(first, count)[:rows]
        return (), evaluate_at(plan, operands, point, z)

    _, (f, aux) = over_groups(plan, evaluate)
    predict, beta = None, None
    if plan.degree is None:
        residual, mean_b = f, jnp.zeros(f.shape[1], f.dtype)
    elif plan.degree == 0:
        b = baselines(plan, operands, point, f)
        residual, mean_b = less_baselines(plan, f, b), mean_over_groups(plan, b)
    else:
        residual, beta, predict = fitted(plan, noise, noise_of, f)
        mean_b = mean_over_groups(plan, beta)

    def expected(a: Array, r: Any) -> list[Array]:
        if not plan.degree:
            return cut(mean_b, avals)
        mean_phi = _surrogate.expected_features(a, r, plan.degree, noise).astype(f.dtype)
        return [mean_phi @ part for part in cut(mean_b, avals)]

    def value(a: Array, r: Any) -> list[Array]:
        def weigh(first: Array, count: int, rows: int, xs: Any) -> tuple[list[Array], tuple[()]]:
            residual, beta = xs
            z = noise_of(first, count)[:rows]
            if predict is not None:
                residual = residual - predict(z, beta)
            w = unit_weight(_log_density(plan, operands, z, a, r))
            w = w[:, None].astype(residual.dtype)
            return [jnp.sum(w * part, axis=0) for part in cut(residual, avals)], ()

        totals, _ = over_groups(plan, weigh, (residual, beta))
        means = cut(jnp.mean(lax.stop_gradient(f), axis=0), avals)
        pairs = zip(totals, expected(a, r), strict=True)
        return with_value(means, [v / plan.num_samples + e for v, e in pairs])

    return value, aux


def value_at_x(plan: Plan, operands: Any, point: Point) -> Array:
    """f0. Any number would do as long as it does not depend on the noise, so it is held fixed.

    Its derivative in what fun closes over may not exist where those of the samples do.
    """
    return lax.stop_gradient(call_fun(plan, operands, point.x)[0])


def _value(plan: Plan, key: Array, point: Point, a: Array, r: Any, operands: Any) -> list[Array]:
    """The value of V alone, a part for each leaf, with derivatives by the cheapest way there is."""
    del a, r

    def mean(key: Array, point: Point, operands: Any) -> Array:
        def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[Array, tuple[()]]:
            z = draw_noise(plan, key, operands, first, count)[:rows]
            return jnp.sum(evaluate_at(plan, operands, point, z)[0], axis=0), ()

        return over_groups(plan, evaluate)[0] / plan.num_samples

    value = vmapped_in_parts(plan, mean, key, point, operands)
    return cut(value, plan.fun.out_avals[: plan.num_outputs])


def _value_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    *_, a_dot, r_dot, operands_dot = tangents
    real = not jnp.issubdtype(plan.value_dtype, jnp.complexfloating)
    matrix_dot = r_dot if isinstance(r_dot, Blocks) else None
    few = isinstance(plan.num_rows, int) and 0 < plan.num_rows <= MAX_ROWS
    if few and real and not any_live((operands_dot, matrix_dot)):
        wrt = (is_live(a_dot), matrix_dot is None and is_live(r_dot))
        value, *jacobians = _jacobian(plan, wrt, *primals)
        dots = [
            jnp.asarray(t, plan.value_dtype)
            for t, asked in zip((a_dot, r_dot), wrt, strict=True)
            if asked
        ]
        rows = zip(*jacobians, strict=True)
        steps = [[j @ t if t.ndim else j * t for j, t in zip(r, dots, strict=True)] for r in rows]
        return value, [functools.reduce(jnp.add, parts) for parts in steps]
    if plan.groups_at_a_time() == plan.num_groups and not any_live((operands_dot, matrix_dot)):
        return _factored_jvp(plan, primals, tangents)
    return live_jvp(lambda *args: _differentiable(plan, *args)[0], primals, tangents)


_expectation = with_jvp(_value, _value_jvp, 1, symbolic_zeros=True)


def _value_and_jacobians(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[list[Array], ...]:
    """The value, and the Jacobians in a (M, D) and r (M,) or (M, D), as far as `wrt` asks.

    Each in a part for each leaf, lest derivatives of one leaf spoil those of the others.
    """
    one = _jacobian_of_surrogates if plan.degree else _jacobian_of_baselines
    found = vmapped_in_parts(plan, partial(one, plan, wrt), key, point, a, r, operands)
    avals = plan.fun.out_avals[: plan.num_outputs]
    return tuple(cut(v, avals, axis=0) for v in found)


def _jacobian_of_baselines(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[Array, ...]:
    """`_value_and_jacobians` for degree 0, or none.

    One pass: with 1 / n_g the weight of a value in the baseline of group g, and with c = f0, or the
    first value if f0 is not used,

        sum_i (f_i - b_i) dl_i = sum_i (f_i - c) dl_i - S sum_g B_g / n_g + sum_g S_g B_g / n_g,

    where S_g and B_g are the sums of f_i - c and of dl_i over group g, and S is the sum of all S_g.
    """
    del a
    noise = noise_in(plan, operands)
    start = jnp.zeros((plan.num_rows,), plan.value_dtype)
    counted = None if plan.degree is None else jnp.zeros((), bool)
    if plan.evaluates_at_x:
        start, counted = _centre(value_at_x(plan, operands, point))

    def accumulate(
        first: Array, count: int, rows: int, _: Any, centre: Array
    ) -> tuple[Any, tuple[()], Array]:
        z = draw_noise(plan, key, operands, first, count)[:rows]
        f = evaluate_at(plan, operands, point, z)[0]
        if counted is not None and not plan.evaluates_at_x:
            centre = jnp.where(first == 0, _centre(f[0])[0], centre)
        f = f - centre[None]
        slopes = _slopes(plan, wrt, noise, z, r)
        if counted is None:
            sums = [(matmul(f.T, v), ()) for v in slopes]
        else:
            sizes = jnp.where(
                first + lax.iota(jnp.uint32, count) < plan.num_groups - 1,
                *group_sizes(plan)[[0, -1]],
            )
            share = _share(plan, counted, sizes, f.dtype)
            if plan.group_size == 1:
                # One product yields the sums of (f_i - c) dl_i (1 + 1 / n_g) and of dl_i / n_g.
                columns = jnp.concatenate([f * (1 + share[:, None]), share[:, None]], axis=1)
                products = [matmul(columns.T, v) for v in slopes]
            else:
                own = jnp.sum(in_groups(plan, f), axis=1) * share[:, None]
                own = jnp.concatenate([own, share[:, None]], axis=1)
                columns = jnp.concatenate([f, jnp.zeros_like(f[:, :1])], axis=1)
                products = [
                    matmul(columns.T, v) + matmul(own.T, jnp.sum(in_groups(plan, v), axis=1))
                    for v in slopes
                ]
            sums = [(v[:-1], v[-1:]) for v in products]
        return (jnp.sum(f, axis=0), sums), (), centre

    (total, sums), _, centre = over_groups(plan, accumulate, carry=start)
    jacobians = []
    for product, score in sums:
        if counted is not None:
            # A matrix product, lest XLA recompute the total for every leaf of the result.
            product = product + matmul(-total[:, None], score)
        jacobians.append(product / plan.num_samples)
    if wrt[1] and not r.ndim:
        jacobians[-1] = jacobians[-1][:, 0]
    return (centre + total / plan.num_samples, *jacobians)


def _jacobian_of_surrogates(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[Array, ...]:
    """The same for degrees 1 and 2: sum_i (f_i - q(z_i)) dl_i, and the derivatives of E q."""
    del a  # 0
    noise = noise_in(plan, operands)
    noise_of = drawer(plan, key, operands)

    def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[tuple[()], Array]:
        return (), evaluate_at(plan, operands, point, noise_of(first, count)[:rows])[0]

    _, f = over_groups(plan, evaluate)
    residual, beta, predict = fitted(plan, noise, noise_of, f)

    def weigh(first: Array, count: int, rows: int, xs: Any) -> tuple[Any, tuple[()]]:
        residual, beta = xs
        z = noise_of(first, count)[:rows]
        residual = residual - predict(z, beta)
        return [matmul(residual.T, v) for v in _slopes(plan, wrt, noise, z, r)], ()

    sums, _ = over_groups(plan, weigh, (residual, beta))
    mean_beta = mean_over_groups(plan, beta)

    expected = _surrogate.expected_slopes(mean_beta, plan.dim, plan.degree or 0, noise)
    jacobians = [v / plan.num_samples for v in sums]
    for i, argnum in enumerate(np.flatnonzero(wrt)):
        slope = expected[argnum]
        if argnum and not r.ndim:
            jacobians[i], slope = jacobians[i][:, 0], jnp.sum(slope, axis=1)
        jacobians[i] += slope
    return (jnp.mean(f, axis=0), *jacobians)


def _factored_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    """V and its derivative along a and r, of all samples in one chunk.

    For what has no Jacobian of its own, because outputs are many or complex.
    """
    _, _, a, r, operands = primals
    a_dot, r_dot = tangents[2:4]
    wrt = (is_live(a_dot), not isinstance(r, Blocks) and is_live(r_dot))
    value, residual, mean_beta, slopes = _factors(plan, wrt, *primals)
    dots = [
        jnp.atleast_1d(t).astype(plan.value_dtype)
        for t, asked in zip((a_dot, r_dot), wrt, strict=True)
        if asked
    ]
    along = [matmul(v, t) for v, t in zip(slopes, dots, strict=True)]
    step = functools.reduce(jnp.add, along) / plan.num_samples
    value_dot = [matmul(step, part) for part in residual]
    if plan.degree:

        def expected(a: Array, r: Any) -> Array:
            features = _surrogate.expected_features(
                a, r, plan.degree or 0, noise_in(plan, operands)
            )
            return features.astype(plan.value_dtype)

        _, features_dot = live_jvp(expected, (a, r), (a_dot, r_dot))
        parts = [matmul(features_dot, part) for part in mean_beta]
        value_dot = [v + e for v, e in zip(value_dot, parts, strict=True)]
    return value, value_dot


def _find_factors(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    """What V and its derivative are made of, from all samples at once.

    With residuals e (N, M), slopes dl (N, D) and q = phi^T beta, dV = e^T dl / N + beta^T d E phi.

    Returns:
      The value (M,), e, and beta (P, M) averaged over the groups, if there is one, each in a part
      for each leaf; and the slopes in a and r, as far as `wrt` asks.
    """
    del a
    return vmapped_in_parts(plan, partial(_factors_of_one, plan, wrt), key, point, r, operands)


def _factors_of_one(
    plan: Plan, wrt: tuple[bool, bool], key: Array, point: Point, r: Any, operands: Any
) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    z = draw_noise(plan, key, operands, jnp.uint32(0), plan.num_groups)[: plan.num_samples]
    slopes = _slopes(plan, wrt, noise_in(plan, operands), z, r)
    return *_residuals(plan, operands, point, z), slopes


def _residuals(
    plan: Plan, operands: Any, point: Point, z: Array
) -> tuple[list[Array], list[Array], list[Array]]:
    """The value, e and beta of `_find_factors`."""
    avals = plan.fun.out_avals[: plan.num_outputs]
    f, _ = evaluate_at(plan, operands, point, z)
    residual, mean_beta = f, []
    if plan.degree == 0:
        b = baselines(plan, operands, point, f)
        residual = less_baselines(plan, f, b)
    elif plan.degree:
        noise = noise_in(plan, operands)
        residual, beta, predict = fitted(plan, noise, lambda first, count: z, f)
        residual = residual - predict(z, beta)
        mean_beta = cut(mean_over_groups(plan, beta), avals)
    return cut(jnp.mean(f, axis=0), avals), cut(residual, avals), mean_beta


def _factors_jvp(plan: Plan, wrt: tuple[bool, bool], primals: Any, tangents: Any) -> Any:
    def factors(key: Array, point: Point, a: Array, r: Any, operands: Any) -> tuple[Any, ...]:
        """The same as an expression of a, r and operands; y is held fixed."""
        z = draw_noise(plan, key, operands, jnp.uint32(0), plan.num_groups)[: plan.num_samples]
        means, residual, mean_beta = _residuals(plan, operands, point, z)
        w = unit_weight(_log_density(plan, operands, z, a, r))[:, None]
        weighed = [w.astype(part.dtype) * part for part in residual]
        # V as in `_differentiable`, from the same values.
        if plan.degree:
            noise = noise_in(plan, operands)
            mean_phi = _surrogate.expected_features(a, r, plan.degree, noise)
            expected = [mean_phi.astype(part.dtype) @ part for part in mean_beta]
        else:
            expected = [m - jnp.mean(v, axis=0) for m, v in zip(means, residual, strict=True)]
        derivatives = [jnp.mean(v, axis=0) + e for v, e in zip(weighed, expected, strict=True)]
        value = with_value(lax.stop_gradient(means), derivatives)

        def slopes(row: Array) -> list[Array]:
            def log_density(*args: Any) -> Array:
                return _log_density(plan, operands, row[None], *args)[0]

            found = jax.grad(log_density, tuple(np.flatnonzero(wrt).tolist()))(a, r)
            return [jnp.atleast_1d(v).astype(plan.value_dtype) for v in found]

        return value, weighed, mean_beta, jax.vmap(slopes)(z)

    return live_jvp(factors, primals, tangents)


_factors = with_jvp(_find_factors, _factors_jvp, 2, symbolic_zeros=True)


def _slopes(plan: Plan, wrt: tuple[bool, bool], noise: Any, z: Array, r: Any) -> list[Array]:
    """dl/da (C, D) and dl/dr, (C, 1) or (C, D), of each row of z, as far as `wrt` asks."""
    dl_da = slope_of(noise, z)
    slopes = [dl_da] if wrt[0] else []
    if wrt[1]:
        dl_dr = 1 + z * dl_da
        slopes.append(dl_dr if r.ndim else jnp.sum(dl_dr, axis=1, keepdims=True))
    return [v.astype(plan.value_dtype) for v in slopes]


def slope_of(noise: Any, z: Array) -> Array:
    """d log p / dz, at each row of z: the score, less its sign."""
    # Not by noise.score: with Gumbel noise XLA would compute the exponential at each use of it.
    return jax.grad(lambda z: jnp.sum(log_prob_of(noise, z)))(z)


def _jacobian_jvp(plan: Plan, wrt: tuple[bool, bool], primals: Any, tangents: Any) -> Any:
    def jacobian(
        key: Array, point: Point, a: Array, r: Any, operands: Any
    ) -> tuple[list[Array], ...]:
        value, _ = _evaluated(plan, key, point, operands)

        def rows_of(leaf: int) -> tuple[Array, ...]:
            out, pullback = jax.vjp(lambda a, r: value(a, r)[leaf], a, r)
            basis = varying(jnp.eye(out.size, dtype=out.dtype), varying_axes(out))
            rows = jax.vmap(pullback)(basis)
            return (out, *(v for v, asked in zip(rows, wrt, strict=True) if asked))

        return tuple(map(list, zip(*map(rows_of, range(plan.num_outputs)), strict=True)))

    return live_jvp(jacobian, primals, tangents)


_jacobian = with_jvp(_value_and_jacobians, _jacobian_jvp, 2, symbolic_zeros=True)
