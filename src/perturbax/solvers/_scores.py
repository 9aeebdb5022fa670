"""What every solver asks of its arguments, and the form in which it returns a solution."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core
from jax.typing import ArrayLike


def is_static(value: object) -> bool:
    """Whether `value` is known while JAX traces, so that it can be checked and sized."""
    return not isinstance(value, core.Tracer)


def real_array(name: str, value: ArrayLike, *, ndim: int | None = None) -> Array:
    """Returns `value` as an array of real numbers, or raises an error that names it.

    Args:
      name: The argument's name, for the message.
      value: What the caller passed.
      ndim: The number of axes it must have; None asks for at least one.

    Returns:
      The array, in its own dtype.

    Raises:
      TypeError: If `value` is no array of integers or floats.
      ValueError: If it has another number of axes, or an axis of length 0.
    """
    try:
        try:
            array = jnp.asarray(value)
        except OverflowError:  # of integers too large for JAX's own, which floats still hold
            array = jnp.asarray(np.asarray(value, float))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array of real numbers, got {type(value).__name__}; "
            "pass a jax or numpy array, or a list of numbers"
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(
            f"{name} must hold real numbers, got dtype {array.dtype}; "
            f"convert first, for instance {name}.astype(float)"
        )
    if ndim is None and array.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar; pass shape (n,)")
    if ndim is not None and array.ndim != ndim:
        remedy = "solve a batch with jax.vmap" if array.ndim > ndim else "add the missing axis"
        raise ValueError(
            f"{name} must have {ndim} {'axis' if ndim == 1 else 'axes'}, "
            f"got shape {array.shape}; {remedy}"
        )
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    return array


def constant_scores(name: str, value: ArrayLike, *, ndim: int | None = None) -> Array:
    """As `real_array`, with a zero derivative: a hard solution has no other.

    Said here, it spares JAX from carrying tangents through the solvers' loops.
    """
    return jax.lax.stop_gradient(real_array(name, value, ndim=ndim))


def solution_dtype(scores: Array) -> np.dtype:
    """The dtype of a solution: that of `scores` if floating, JAX's default float otherwise."""
    if jnp.issubdtype(scores.dtype, jnp.floating):
        return scores.dtype
    return jnp.result_type(float)


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """`dtype`, or float32 in place of a shorter one."""
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)


def accumulator(scores: Array) -> Array:
    """`scores` in a dtype fit for sums: at least float32."""
    return scores.astype(at_least_float32(solution_dtype(scores)))


def summable(costs: Array, count: int) -> Array:
    """`costs`, divided by a power of two where the sum of `count` of them might overflow."""
    power = 2.0 ** math.ceil(math.log2(count))
    largest = jnp.max(jnp.abs(costs), where=jnp.isfinite(costs), initial=0)
    return jnp.where(largest > float(jnp.finfo(costs.dtype).max) / power, costs / power, costs)


def as_solution(selected: Array, scores: Array, *, feasible: ArrayLike = True) -> Array:
    """Casts a solution to its dtype, and makes it NaN where there is none.

    Args:
      selected: The solution of one instance, of any dtype.
      scores: The scores it was found for; one NaN among them makes the solution NaN.
      feasible: Whether a solution exists.
    """
    exists = jnp.logical_and(feasible, ~jnp.any(jnp.isnan(scores)))
    return jnp.where(exists, selected.astype(solution_dtype(scores)), jnp.nan)


def static_int(name: str, value: object) -> int:
    """Returns `value` as a Python int, or raises a TypeError that names it."""
    if not is_static(value):
        raise TypeError(
            f"{name} must be a Python int, got a traced value; it sets the size of the "
            "computation: close over it, or mark it with static_argnames"
        )
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a Python int, got bool")
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name} must be a Python int, got {type(value).__name__}") from None


def static_bool(name: str, value: object) -> bool:
    """Returns `value` as a Python bool, or raises a TypeError that names it."""
    if not is_static(value):
        raise TypeError(
            f"{name} must be a bool, got a traced value; it chooses the computation: "
            "close over it, or mark it with static_argnames"
        )
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {value!r} ({type(value).__name__})")
    return bool(value)


def edge_list(costs: Array, edges: ArrayLike) -> np.ndarray:
    """Returns `edges` as a numpy array of Python's integers, of shape (num_edges, 2), or raises.

    One dtype, whatever that of `edges`: loops carry their nodes beside those of the arguments.

    Args:
      costs: One cost an edge, of shape (num_edges,).
      edges: Pairs of nodes, numbered from 0.

    Raises:
      TypeError: If `edges` is traced, or does not hold integers.
      ValueError: If its shape does not fit `costs`, or a node is negative.
    """
    if not is_static(edges):
        raise TypeError(
            "edges must be known while tracing, got a traced value; "
            "close over a numpy array instead of passing it through jax.jit or jax.vmap"
        )
    try:
        pairs = np.asarray(edges)
    except ValueError:  # a ragged list
        pairs = np.asarray(None)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"edges must have shape (num_edges, 2), got {pairs.shape}; "
            "pass one pair (tail, head) of node numbers an edge"
        )
    if not np.issubdtype(pairs.dtype, np.integer):
        raise TypeError(f"edges must hold integers, got dtype {pairs.dtype}; number the nodes")
    if len(pairs) != costs.shape[0]:
        raise ValueError(
            f"costs must hold one cost an edge, got {costs.shape[0]} costs for {len(pairs)} edges"
        )
    if pairs.min() < 0:
        raise ValueError(f"edges must hold node numbers >= 0, got {pairs.min()}")
    return pairs.astype(int)


def heads_by_tail(pairs: np.ndarray, num_nodes: int) -> list[list[int]]:
    """For every node those to which an edge leads from it."""
    heads = [[] for _ in range(num_nodes)]
    for tail, head in zip(*pairs.T.tolist(), strict=True):
        heads[tail].append(head)
    return heads
