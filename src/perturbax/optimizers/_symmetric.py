"""Derivatives of perturbed optimizers: symmetric Jacobians, and slopes by Danskin's theorem.

Throughout, `traced` is a function of operands (all that it closes over, the key included) and
inputs: first the scores, `num_scores` arrays, then scales. The first of its results is its gradient
in the scores, whose Jacobian is symmetric.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._types import PyTree
from ..tracing._derivative_rules import is_live, live_jvp, with_jvp
from ..tracing._signature import TracedFunction


@partial(jax.jit, static_argnums=(0, 1, 2))
def symmetrized(
    traced: TracedFunction, num_scores: int, num_symmetric: int, inputs: PyTree, operands: PyTree
) -> list[Array]:
    """traced(operands, *inputs), with a symmetric Jacobian of the first results in the scores."""
    if not num_symmetric:
        return traced(operands, *inputs)
    return _with_symmetric_jacobian(traced, num_scores, inputs, operands)


def _as_is(
    traced: TracedFunction, num_scores: int, inputs: PyTree, operands: PyTree
) -> list[Array]:
    """traced(operands, *inputs); its derivative in the scores is J t / 2 + J' t / 2."""
    del num_scores
    return traced(operands, *inputs)


def _symmetric_jvp(
    traced: TracedFunction, num_scores: int, primals: PyTree, tangents: PyTree
) -> Any:
    leaves, tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    by_scores = any(map(is_live, dots[:num_scores]))
    live = [i for i, dot in enumerate(dots) if is_live(dot) or (by_scores and i < num_scores)]

    def restricted(*values: Array) -> list[Array]:
        merged = list(leaves)
        for i, value in zip(live, values, strict=True):
            merged[i] = value
        inputs, operands = jax.tree.unflatten(tree, merged)
        return traced(operands, *inputs)

    points = [leaves[i] for i in live]
    directions = [_instantiated(dots[i], leaves[i]) for i in live]
    out, push = jax.linearize(restricted, *points)
    out_dot = push(*directions)
    if by_scores:
        scores_dot = directions[:num_scores]
        halves = push(*(v / 2 for v in scores_dot), *directions[num_scores:])
        weights = [v.astype(o.dtype) for v, o in zip(scores_dot, out, strict=False)]

        def push_scores(*directions: Array) -> list[Array]:
            # Alone, for results behind them may have infinite derivatives, and 0 times one is NaN.
            return push(*directions)[:num_scores]

        pulled = jax.linear_transpose(push_scores, *points)(weights)[:num_scores]
        symmetric = [
            half + pull.astype(half.dtype) / 2
            for half, pull in zip(halves[:num_scores], pulled, strict=True)
        ]
        out_dot = [*symmetric, *out_dot[num_scores:]]
    return out, out_dot


_with_symmetric_jacobian = with_jvp(_as_is, _symmetric_jvp, 2, symbolic_zeros=True)


def _instantiated(tangent: Any, like: Array) -> Array:
    return tangent if is_live(tangent) else jnp.zeros_like(like)


def _maximum(
    traced: TracedFunction, num_scores: int, num_symmetric: int, inputs: PyTree, operands: PyTree
) -> Array:
    """The maximum, result number `num_scores`; those before and after it are its derivatives."""
    return symmetrized(traced, num_scores, num_symmetric, inputs, operands)[num_scores]


def _maximum_jvp(
    traced: TracedFunction, num_scores: int, num_symmetric: int, primals: PyTree, tangents: PyTree
) -> tuple[Array, Array]:
    inputs, operands = primals
    inputs_dot, operands_dot = tangents

    def results(operands: PyTree) -> list[Array]:
        return symmetrized(traced, num_scores, num_symmetric, inputs, operands)

    out, out_dot = live_jvp(results, (operands,), (operands_dot,))
    value, value_dot = out[num_scores], out_dot[num_scores]
    # The results before the value belong to the scores, those after it to the scales.
    for slope, dot in zip([*out[:num_scores], *out[num_scores + 1 :]], inputs_dot, strict=True):
        if is_live(dot):
            value_dot += jnp.sum(slope.astype(value.dtype) * dot.astype(value.dtype))
    return value, value_dot


with_envelope_derivatives = jax.jit(
    with_jvp(_maximum, _maximum_jvp, 3, symbolic_zeros=True), static_argnums=(0, 1, 2)
)


def _value_alone(value: Array, fixed: Array, slopes: list[Array], inputs: list[Array]) -> Array:
    """`value`, with `slopes` as its derivatives in the inputs.

    `fixed` is the mean of the same values, held fixed: its derivatives are those of `value` by the
    score alone, which are replaced; what is left are derivatives in operands, and mixed ones. So
    the slopes have none of these.
    """
    del fixed, slopes, inputs
    return value


def _value_alone_jvp(primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    value, _, slopes, _ = primals
    value_dot, fixed_dot, _, inputs_dot = tangents
    out_dot = _instantiated(value_dot, value) - _instantiated(fixed_dot, value)
    for slope, dot in zip(slopes, inputs_dot, strict=True):
        if is_live(dot):
            out_dot += jnp.sum(slope.astype(value.dtype) * dot.astype(value.dtype))
    return with_slopes(*primals), out_dot


with_slopes = with_jvp(_value_alone, _value_alone_jvp, symbolic_zeros=True)
