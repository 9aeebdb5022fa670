"""Standard errors: what the spread of the groups tells about an estimate and its derivatives."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..estimator import _surrogate
from ..estimator._estimator import (
    baselines,
    fitted,
    less_baselines,
    slope_of,
    standardise,
    unit_of,
)
from ..execution._evaluation import (
    Plan,
    chunk_size,
    concatenate,
    drawer,
    evaluate_at,
    group_sizes,
    in_groups,
    noise_in,
    over_groups,
    point_of,
    split_leaves,
)
from ..sampling import _random_bits
from ..scale._matrices import matmul


class Spread(NamedTuple):
    """Estimates and their standard errors: leaves of the value, and for each of them those of x."""

    value: list[Array]
    value_error: list[Array]
    jacobian: list[list[Array]]
    jacobian_error: list[list[Array]]


@partial(jax.jit, static_argnums=(0, 1))
def spread(
    plan: Plan, derive: bool, key: Array, x: list[Array], sigma: list[Array], operands: Any
) -> tuple[Spread, list[Array]]:
    """Value and, if `derive`, Jacobian in x, with their errors as the groups' spread tells them.

    Each group g makes an estimate C_g of its own, with the surrogate that is fitted on the others.
    The estimate is their mean, weighted by their sizes; its squared error that of a mean of
    independent numbers. (They are not quite: surrogates are fitted on common samples. What that
    correlates is a product of two errors of fits.)
    """
    words, point = _random_bits.root(key), point_of(plan, x, sigma)
    noise = noise_in(plan, operands)
    if derive:
        # Bounds the Jacobians of groups that are held at a time.
        most = max(1, chunk_size() // max(plan.num_rows * plan.dim, 1))
        if most < plan.groups_at_a_time():
            plan = dataclasses.replace(plan, batch_size=most * plan.group_size)
    noise_of = drawer(plan, words, operands)
    sizes = jnp.asarray(group_sizes(plan), plan.value_dtype)
    shares = sizes / plan.num_samples

    def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[tuple[()], Any]:
        return (), evaluate_at(plan, operands, point, noise_of(first, count)[:rows])

    _, (f, aux) = over_groups(plan, evaluate)
    value = jnp.mean(f, axis=0)
    unit = unit_of(f - value[None])  # lest squares overflow or vanish
    means = jnp.sum(in_groups(plan, f - value[None]), axis=1) / sizes[:, None]
    avals = plan.fun.out_avals[: plan.num_outputs]

    def values(flat: Array) -> list[Array]:
        dtypes = plan.output_dtypes
        if not jnp.iscomplexobj(flat):  # errors are real, also those of complex numbers
            dtypes = [np.dtype(jnp.finfo(dtype).dtype) for dtype in dtypes]
        return split_leaves(flat, avals, dtypes)

    def errors(squares: Array) -> Array:
        return jnp.sqrt(squares * (plan.num_groups / max(plan.num_groups - 1, 1)))

    scaled_means = jnp.abs(shares[:, None] * means) / unit
    value_error = unit * errors(jnp.sum(scaled_means**2, axis=0))
    if not derive:
        return Spread(values(value), values(value_error), [], []), aux

    flat_x = concatenate([v.astype(plan.dtype) for v in x], plan.dtype)
    _, pull = jax.vjp(lambda v: standardise(plan, v, sigma)[0], flat_x)

    def in_x(rows: Array) -> Array:
        return jax.vmap(pull)(rows)[0].astype(f.dtype)

    residual, beta, predict, slope = f, None, None, flat_x
    if plan.degree is not None:
        if plan.degree:
            residual, beta, predict = fitted(plan, noise, noise_of, f)
            each = jnp.eye(_surrogate.num_features(plan.dim, plan.degree), dtype=plan.dtype)
            slope = in_x(_surrogate.expected_slopes(each, plan.dim, plan.degree, noise)[0])
        else:
            b = baselines(plan, operands, point, f)
            residual = less_baselines(plan, f, b)

    def jacobians(first: Array, count: int, rows: int, xs: Any) -> tuple[Array, Array]:
        """C_g of each group, (count, M, D), and its share in the whole."""
        residual, beta = xs
        z = noise_of(first, count)[:rows]
        if predict is not None:
            residual = residual - predict(z, beta)
        left = jnp.swapaxes(in_groups(plan, residual), 1, 2)
        found = matmul(left, in_groups(plan, in_x(slope_of(noise, z))))
        last = first + lax.iota(jnp.uint32, count) == plan.num_groups - 1
        size = jnp.where(last, sizes[-1], sizes[0])
        found = found / size[:, None, None]
        if beta is not None:
            found = found + matmul(jnp.swapaxes(beta, 1, 2), slope)
        return found, (size / plan.num_samples)[:, None, None]

    def add(*args: Any) -> tuple[Array, tuple[()]]:
        found, share = jacobians(*args)
        return jnp.sum(share * found, axis=0), ()

    jacobian, _ = over_groups(plan, add, (residual, beta))

    def add_square(*args: Any) -> tuple[Array, tuple[()]]:
        found, share = jacobians(*args)
        scaled = jnp.abs(share * (found - jacobian[None])) / unit[:, None]
        return jnp.sum(scaled**2, axis=0), ()

    squares, _ = over_groups(plan, add_square, (residual, beta))

    def in_leaves(rows: Array) -> list[list[Array]]:
        columns = [jnp.moveaxis(v, 0, -1) for v in values(rows.T)]
        return [
            split_leaves(v, x, [v.dtype if jnp.iscomplexobj(v) else leaf.dtype for leaf in x])
            for v in columns
        ]

    found = Spread(
        values(value),
        values(value_error),
        in_leaves(jacobian),
        in_leaves(unit[:, None] * errors(squares)),
    )
    return found, aux
