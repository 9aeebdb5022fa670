"""Faster ways to what `_formula` says, for derivatives in x and sigma, and when to take them.

`tests/test_formula.py` compares each with the formula as JAX differentiates it;
`benchmarks/faster_ways.py` prints what each is worth.
"""

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..execution._chunks import (
    Chunk,
    added,
    draw_noise,
    drawer,
    evaluate_at,
    kept_noise,
    stacked,
    summed,
    vmapped_in_parts,
)
from ..execution._plan import (
    MAX_ROWS,
    Operands,
    Plan,
    Point,
    concatenate,
    cut,
    cut_small,
    flat_scale,
    group_sizes,
    in_groups,
    noise_in,
    standardised,
)
from ..tracing._derivative_rules import any_live, is_live, live_jvp, with_jvp
from ..tracing._linear_algebra import matmul
from ..tracing._mesh_axes import varying, varying_axes
from . import _surrogate
from ._formula import (
    Part,
    at_x,
    centre_of,
    fitted,
    formula,
    grad_log_prob,
    kept,
    present_in,
    residual,
    share_of_one,
)

# With more leaves than this, what is done leaf by leaf takes the compiler longer than the rest.
_FEW_LEAVES = 16
# Which of a and r derivatives are asked for in.
Wanted = tuple[bool, bool]


def _value(
    plan: Plan, key: Array, x: list[Array], sigma: list[Array], operands: Operands
) -> list[Array]:
    """The value of V alone, a part for each leaf, with derivatives by the fastest way there is."""

    def mean(key: Array, point: Point, operands: Operands) -> Array:
        def evaluate(chunk: Chunk, _: Any) -> tuple[Array, Any]:
            f, _ = evaluate_at(plan, operands, point, draw_noise(plan, key, operands, chunk))
            present = present_in(plan, f)
            number = None if present is None else jnp.sum(present, dtype=f.dtype)
            return jnp.sum(kept(f, present), axis=0), number

        total, number = summed(plan, evaluate)
        return total / (plan.num_samples if number is None else number)

    point = point_of(plan, x, sigma)
    return cut(vmapped_in_parts(plan, mean, key, point, operands), plan.outputs)


def _value_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    key, x, sigma, operands = primals
    _, x_dot, sigma_dot, operands_dot = tangents
    in_sigma = any_live(sigma_dot)
    real = not jnp.issubdtype(plan.value_dtype, jnp.complexfloating)
    few = isinstance(plan.num_rows, int) and 0 < plan.num_rows <= MAX_ROWS
    matrices = in_sigma and isinstance(flat_scale(plan, sigma), list)
    if not few or not real or matrices or any_live(operands_dot):
        by_formula = partial(value_by_formula, plan, in_parts=not any_live(operands_dot))
        return live_jvp(lambda *args: by_formula(*args)[0], primals, tangents)

    wide = dataclasses.replace(plan, dtype=plan.value_dtype)
    a, r = standardised(plan, concatenate(x, plan.dtype), flat_scale(plan, sigma))
    point, wanted = point_of(plan, x, sigma), (True, in_sigma)
    value, *jacobians = _jacobian(plan, wanted, key, point, a, r, operands)

    def inputs(flat_x: Array, sigma: list[Array]) -> tuple[Array, ...]:
        """a, and r if derivatives in it are asked for."""
        scale = flat_scale(wide, [v.astype(wide.dtype) for v in sigma])
        found = standardised(wide, flat_x.astype(wide.dtype), scale)
        return found if in_sigma else found[:1]

    rows = zip(*jacobians, strict=True)
    if len(x) <= _FEW_LEAVES:
        _, dots = live_jvp(
            lambda x, sigma: inputs(concatenate(x, plan.dtype), sigma),
            (x, sigma),
            (x_dot, sigma_dot),
        )
        steps = [[j @ t if t.ndim else j * t for j, t in zip(r, dots, strict=True)] for r in rows]
        return value, [functools.reduce(jnp.add, parts) for parts in steps]

    # Many leaves are not put together once more for their tangents: the Jacobian is cut for them.
    flat_x = concatenate(x, plan.dtype).astype(wide.dtype)
    if in_sigma:
        _, pull = jax.vjp(inputs, flat_x, [v.astype(wide.dtype) for v in sigma])
    else:
        _, pull = jax.vjp(lambda flat_x: inputs(flat_x, sigma), flat_x)

    def step(*rows: Array) -> Array:
        """The derivative of one leaf of the value, whose Jacobians in a and in r these are."""
        along_x, *along_sigma = jax.vmap(pull)(rows)
        products = [
            part.reshape(part.shape[0], -1) @ dot.astype(wide.dtype).reshape(-1)
            for part, dot in zip(
                [*cut_small(along_x, x), *jax.tree.leaves(along_sigma)],
                [*x_dot, *(sigma_dot if in_sigma else ())],
                strict=True,
            )
            if is_live(dot)
        ]
        return functools.reduce(jnp.add, products)

    return value, [step(*row) for row in rows]


expectation = with_jvp(_value, _value_jvp, 1, symbolic_zeros=True)


def point_of(plan: Plan, x: list[Array], sigma: list[Array]) -> Point:
    """x and sigma as a `Point`."""
    return Point(*lax.stop_gradient((concatenate(x, plan.dtype), flat_scale(plan, sigma))))


def value_by_formula(
    plan: Plan,
    key: Array,
    x: list[Array],
    sigma: list[Array],
    operands: Operands,
    in_parts: bool = False,
) -> tuple[list[Array], list[Array]]:
    """V, a part for each leaf, as an expression that JAX differentiates in everything; and aux."""
    value, aux = formula(plan, key, point_of(plan, x, sigma), operands, in_parts)
    return value(*standardised(plan, concatenate(x, plan.dtype), flat_scale(plan, sigma))), aux


def _value_and_jacobians(
    plan: Plan, wanted: Wanted, key: Array, point: Point, a: Array, r: Any, operands: Operands
) -> tuple[list[Array], ...]:
    """The value, and the Jacobians in a (M, D) and r (M,) or (M, D), as far as they are wanted.

    Each in a part for each leaf, lest derivatives of one leaf spoil those of the others.
    """
    del a
    by_groups = plan.degree or plan.drop_missing
    one = _jacobian_of_groups if by_groups else _jacobian_of_baselines
    value, *jacobians = vmapped_in_parts(plan, partial(one, plan, wanted), key, point, r, operands)
    if wanted[1] and not r.ndim:
        jacobians[-1] = jacobians[-1][:, 0]
    return tuple(cut(v, plan.outputs, axis=0) for v in (value, *jacobians))


def _jacobian_jvp(plan: Plan, wanted: Wanted, primals: Any, tangents: Any) -> Any:
    def jacobian(
        key: Array, point: Point, a: Array, r: Any, operands: Operands
    ) -> tuple[list[Array], ...]:
        value, _ = formula(plan, key, point, operands)

        def rows_of(leaf: int) -> tuple[Array, ...]:
            out, pullback = jax.vjp(lambda a, r: value(a, r)[leaf], a, r)
            basis = varying(jnp.eye(out.size, dtype=out.dtype), varying_axes(out))
            rows = jax.vmap(pullback)(basis)
            return (out, *(v for v, asked in zip(rows, wanted, strict=True) if asked))

        return tuple(map(list, zip(*map(rows_of, range(plan.num_outputs)), strict=True)))

    return live_jvp(jacobian, primals, tangents)


_jacobian = with_jvp(_value_and_jacobians, _jacobian_jvp, 2, symbolic_zeros=True)


class Centred(NamedTuple):
    """Sums over samples of their values less a centre, and of these times scores.

    Attributes:
      centre: what is subtracted, (M,).
      rows: how many samples.
      total: the sum of what is left, (M,).
      products: for each of a and r that is asked for, the sum of what is left, and of its group's
        share F_g / n_g, times dl_i, (M, D); and that of dl_i / n_g, (1, D), N times which is what
        the former grows by where each value does by 1.
    """

    centre: Array
    rows: Array
    total: Array
    products: Any


def _jacobian_of_baselines(
    plan: Plan, wanted: Wanted, key: Array, point: Point, r: Any, operands: Operands
) -> list[Array]:
    """Value and Jacobians for degree 0, or none: in one pass, which stores neither z nor f.

    With 1 / n_g the weight of a value in the baseline of group g, and with c = f0, or the first
    value if f0 is not used (of each chunk, until they are merged),

        sum_i (f_i - b_i) dl_i = sum_i (f_i - c + F_g / n_g) dl_i - S sum_i dl_i / n_g,

    where F_g is the sum of f_i - c over the group g of sample i, and S that over all.
    """
    noise = noise_in(plan, operands)
    value_at_x, counted = None, 0
    if plan.evaluates_at_x:
        value_at_x, counted = at_x(plan, operands, point)

    def accumulate(chunk: Chunk, sizes: Array) -> Centred:
        z = draw_noise(plan, key, operands, chunk)
        f = evaluate_at(plan, operands, point, z)[0]
        centre = jnp.zeros_like(f[0])
        if plan.degree == 0:
            centre = centre_of(f[0]) if value_at_x is None else value_at_x
        f = f - centre[None]
        slopes = [v.astype(f.dtype) for v in grads_of_log_density(wanted, noise, z, r)]
        total, rows = jnp.sum(f, axis=0), jnp.full((), chunk.rows, f.dtype)
        if plan.degree is None:
            return Centred(centre, rows, total, [(matmul(f.T, v), ()) for v in slopes])
        share = share_of_one(plan.num_samples - sizes + counted, f.dtype)[:, None]
        own = jnp.sum(in_groups(plan, f), axis=1) * share
        own, share = (jnp.repeat(v, plan.group_size, axis=0)[: chunk.rows] for v in (own, share))
        columns = [f + own, share]
        if f.shape[1] == 1:  # in long rows, which XLA vectorises
            weights = jnp.concatenate([v.T for v in columns])
        else:
            weights = jnp.concatenate(columns, axis=1).T
        products = [matmul(weights, v) for v in slopes]
        return Centred(centre, rows, total, [(v[:-1], v[-1:]) for v in products])

    def merge(left: Centred, right: Centred) -> Centred:
        """The sums of both, around the centre of the left, if that is not of nothing."""
        centre = jnp.where(left.rows > 0, left.centre, right.centre)
        change = right.centre - centre
        total = left.total + right.total + right.rows * change
        products = [
            (v + w + plan.num_samples * change[:, None] * score, before + score)
            for (v, before), (w, score) in zip(left.products, right.products, strict=True)
        ]
        return Centred(centre, left.rows + right.rows, total, products)

    sizes = jnp.asarray(group_sizes(plan), jnp.int32)
    centred = merge if plan.degree == 0 else added
    centre, _, total, sums = summed(plan, accumulate, sizes, centred)
    if plan.degree == 0:
        # A matrix product, lest XLA recompute the total for every leaf of the result.
        jacobians = [product + matmul(-total[:, None], score) for product, score in sums]
    else:
        jacobians = [product for product, _ in sums]
    return [centre + total / plan.num_samples, *(v / plan.num_samples for v in jacobians)]


def _jacobian_of_groups(
    plan: Plan, wanted: Wanted, key: Array, point: Point, r: Any, operands: Operands
) -> list[Array]:
    """Value and Jacobians by what each group adds: for polynomials, or where values are missing."""
    noise_of = drawer(plan, key, operands, kept_noise(plan, key, operands))
    noise = noise_in(plan, operands)

    def evaluate(chunk: Chunk, _: Any) -> Array:
        return evaluate_at(plan, operands, point, noise_of(chunk))[0]

    surrogates = fitted(plan, operands, point, noise_of, stacked(plan, evaluate))

    def weigh(chunk: Chunk, part: Part) -> list[Array]:
        return score_function_sums(plan, wanted, noise, r, noise_of(chunk), part)

    jacobians = [v / surrogates.number for v in summed(plan, weigh, surrogates.parts)]
    if plan.degree:
        expected = grads_of_expected(plan, wanted, noise, r, surrogates.mean)
        jacobians = [v + e for v, e in zip(jacobians, expected, strict=True)]
    return [surrogates.value, *jacobians]


def score_function_sums(
    plan: Plan,
    wanted: Wanted,
    noise: Any,
    r: Any,
    z: Array,
    part: Part,
    by_group: bool = False,
) -> list[Array]:
    """What the residuals of a chunk add to N times the Jacobian of V in a and in r, each (M, D).

    That is the sum of (f_i - q_i) dl_i over its samples i; or over each group's, (groups, M, D).
    """
    left, slopes = residual(plan, noise, z, part), grads_of_log_density(wanted, noise, z, r)
    if by_group:
        left, *slopes = (in_groups(plan, v) for v in (left, *slopes))
    left = jnp.swapaxes(left, -1, -2)
    return [matmul(left, v.astype(left.dtype)) for v in slopes]


def grads_of_expected(plan: Plan, wanted: Wanted, noise: Any, r: Any, beta: Array) -> list[Array]:
    """dE q, (..., M, D), in a and in r, of polynomials with coefficients beta, (..., P, M)."""
    slopes = [_surrogate.expected_slope_in_a(beta, plan.dim)] if wanted[0] else []
    if wanted[1]:
        in_r = _surrogate.expected_slope_in_r(beta, plan.dim, plan.degree or 0, noise)
        slopes.append(in_r if r.ndim else jnp.sum(in_r, axis=-1, keepdims=True))
    return slopes


def grads_of_log_density(wanted: Wanted, noise: Any, z: Array, r: Any) -> list[Array]:
    """dl/da (C, D) and dl/dr, (C, 1) or (C, D), of each row of z, as far as they are wanted."""
    dl_da = grad_log_prob(noise, z)
    slopes = [dl_da] if wanted[0] else []
    if wanted[1]:
        dl_dr = 1 + z * dl_da
        slopes.append(dl_dr if r.ndim else jnp.sum(dl_dr, axis=1, keepdims=True))
    return slopes
