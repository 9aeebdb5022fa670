"""What is minimised: one number, of a point that is reflected where it leaves its bounds."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks, _leaves
from ..tracing._mesh_axes import (
    has_explicit_axes,
    in_types_of_constants,
    with_explicit_axes,
)
from ..tracing._signature import TracedFunction
from ..tracing._user_code import trace_fun

# Most noise of a coordinate without two bounds, in units of its scale: what does not matter to the
# function would get ever more of it.
_FAR = 1e4


@dataclasses.dataclass(frozen=True)
class Objective:
    """A function of points that may lie anywhere, comparable by the operations it consists of.

    Attributes:
      traced: one number, from a key and the leaves of a point.
      tree: structure of a point.
      shapes: of its leaves.
      dtypes: of its leaves.
      dtype: that of noise and values, of at least single precision.
      uses_key: whether the value can change with the key.
    """

    traced: TracedFunction
    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    dtype: np.dtype
    uses_key: bool

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes)

    def point(self, flat: Array) -> Any:
        """The point with these coordinates in a row."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = zip(jnp.split(flat, ends), self.shapes, self.dtypes, strict=True)
        leaves = [part.reshape(shape).astype(kind) for part, shape, kind in parts]
        return jax.tree.unflatten(self.tree, leaves)

    def flat(self, u: Any) -> Array:
        """All coordinates of a point in a row."""
        return jnp.concatenate([leaf.ravel().astype(self.dtype) for leaf in jax.tree.leaves(u)])

    def value(self, operands: Any, key: Array, u: Any) -> Array:
        """The function at u."""
        # Points that are to be compared share a key: for `jax.debug_key_reuse` it is no reuse.
        (number,) = self.traced(operands, jax.random.clone(key), *jax.tree.leaves(u))
        return number


def evaluations(objective: Objective, operands: Any, keys: Array, u: Any) -> Array:
    """The function at u, once for each key.

    A function that takes no key, such as one outside JAX, may be noisy all the same. The barrier
    keeps the compiler from evaluating it once for all keys.
    """

    def evaluate(u: Any, key: Array) -> tuple[Any, Array]:
        return lax.optimization_barrier((u, objective.value(operands, key, u)))

    return lax.scan(evaluate, u, keys)[1]


class Problem(NamedTuple):
    """What is minimised, and where.

    Attributes:
      objective: the function.
      operands: what it closes over.
      inside: the point between the bounds that a point stands for.
      start: x0, with arrays as leaves.
      scale: how wide each coordinate may be expected to range, with the structure of x0.
      widest: most noise that each coordinate is to have, likewise.
    """

    objective: Objective
    operands: Any
    inside: Callable[[Any], Any]
    start: Any
    scale: Any
    widest: Any


def make_problem(
    fun: Callable[..., Any],
    x0: Any,
    key: Array,
    args: tuple[Any, ...],
    takes_key: bool,
    lower: Any,
    upper: Any,
) -> Problem:
    """Checks what is to be minimised, and where.

    Raises:
      TypeError: if fun is not callable, or a leaf of x0, lower or upper is of the wrong kind.
      ValueError: if bounds do not fit x0, are not in order, or x0 lies outside.
    """
    _checks.check_fun(fun)
    _check_call(fun, takes_key, args)
    fixed = [leaf for leaf in jax.tree.leaves(x0) if not _leaves.is_floating(leaf)]
    dtypes = [_leaves.dtype_of(leaf) for leaf in fixed]
    if any(map(_checks.is_key, fixed)):
        raise TypeError(
            "x0 must be floating numbers, but it has a PRNG key: hand that to fun by args=(...), "
            "or, if fun is to have a new one in each step, let it take one, with takes_key=True"
        )
    # Complex leaves, and what is no array, have errors of their own.
    if fixed and not any(d is None or jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        kinds = ", ".join(sorted(set(map(str, dtypes))))
        raise TypeError(
            f"minimize moves all of x0, but it has leaves of {kinds}: hand those to fun by "
            "args=(...), or, where they are to be found too, make them floating numbers that fun "
            "rounds, as jnp.round(x) does"
        )
    elsewhere = "hand it to fun by args=(...)"
    leaves, names, merge = _leaves.perturbed_leaves(x0, "x0", elsewhere)
    if not _leaves.num_elements(leaves):
        raise ValueError("x0 has no coordinates: there is nothing to minimise over")
    dtype = _leaves.noise_dtype(leaves)
    low = _bounds(lower, x0, leaves, names, "lower", -np.inf)
    high = _bounds(upper, x0, leaves, names, "upper", np.inf)
    for bounds in zip(low, high, leaves, names, strict=True):
        _check_between(*bounds)

    def inside(u: Any) -> Any:
        parts = zip(jax.tree.leaves(u), low, high, strict=True)
        inner = [_reflected(*part) for part in parts]
        return merge([with_explicit_axes(v, leaf) for v, leaf in zip(inner, leaves, strict=True)])

    def value(key_and_leaves: list[Array]) -> Array:
        x = inside(merge(key_and_leaves[1:]))
        key = key_and_leaves[0]
        result = fun(key, x, *args) if takes_key else fun(x, *args)
        remedy = "return what is to be minimised alone, such as a sum or a mean of it"
        return _checks.one_number(result, "fun", remedy).astype(dtype)

    def widths(leaf: Array, low: np.ndarray, high: np.ndarray) -> tuple[Array, Array]:
        """How wide each coordinate may be expected to range, and most noise that it is to have."""
        bounded = np.isfinite(high - low)
        # Reflection makes noise of half the range nearly uniform between the bounds: a wave of one
        # crest and one trough from bound to bound keeps 0.29 of its height, with a quarter 0.73.
        quarter = jnp.asarray(np.where(bounded, high - low, 0) / 4, dtype)
        typical = jnp.maximum(1, jnp.sqrt(jnp.mean(leaf.astype(dtype) ** 2)))
        width = jnp.broadcast_to(jnp.where(bounded, quarter, typical), leaf.shape)
        # Noise as wide as the bounds says nothing about what is between them.
        return width, width * np.where(bounded, 1, _FAR).astype(dtype)

    # Not of a weak type, which `jnp.full` gives: those of later steps have none, and steps would be
    # compiled twice.
    leaves = [jnp.asarray(leaf, jnp.result_type(leaf)) for leaf in leaves]
    traced, operands, *_ = trace_fun(value, [key, *leaves], has_aux=False)
    free = leaves
    if any(map(has_explicit_axes, jax.tree.leaves((key, leaves, operands)))):
        # A step mixes coordinates, however x0 is split over devices; fun was told.
        traced = traced.without_told_meshes()
        free, operands = in_types_of_constants((leaves, operands))
    objective = Objective(
        traced=traced,
        tree=jax.tree.structure(x0),
        shapes=tuple(leaf.shape for leaf in leaves),
        dtypes=tuple(leaf.dtype for leaf in leaves),
        dtype=dtype,
        uses_key=traced.depends_on_inputs(0),
    )
    parts = zip(*map(widths, free, low, high), strict=True)
    scale, widest = (merge(list(part)) for part in parts)
    return Problem(objective, operands, inside, merge(free), scale, widest)


def _check_call(fun: Callable[..., Any], takes_key: bool, args: tuple[Any, ...]) -> None:
    """Raises TypeError if fun is known not to take what it is called with."""
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return

    def takes(*names: str, count: int = len(args)) -> bool:
        try:
            signature.bind(*names, *args[:count])
        except TypeError:
            return False
        return True

    names = ("key", "x") if takes_key else ("x",)
    if takes(*names):
        return
    more = ", *args" if args else ""
    remedy = "hand further arguments to it by args=(...)"
    if not takes_key and takes("key", "x"):
        remedy = f"if it is fun(key, x{more}), give takes_key=True; else {remedy}"
    elif any(takes(*names, count=count) for count in range(len(args))):
        remedy = "leave out of args what it does not take"
    elif takes_key and takes("x"):
        remedy = "takes_key=True is for functions whose first argument is a key: leave it out"
    raise TypeError(
        f"fun is called as fun({', '.join(names)}{more}), with {len(args)} args, but takes "
        f"{signature}: {remedy}"
    )


def _reflected(u: Array, low: np.ndarray, high: np.ndarray) -> Array:
    """Coordinates reflected at their bounds, as often as it takes to lie between them.

    A reflection leaves lengths as they are, so that one sigma means the same everywhere, and it
    lets a minimum lie on a bound. A transform, such as the logistic function, stretches what is
    close to a bound, and moves a minimum that lies on it to infinity.
    """
    if np.isneginf(low).all() and np.isposinf(high).all():
        return u
    low, high = low.astype(u.dtype), high.astype(u.dtype)
    both = np.isfinite(low) & np.isfinite(high)
    base, end = np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, 0)
    span = np.where(both, end - base, 1)
    inside = jnp.mod(u - base, 2 * span)
    between = base + jnp.minimum(inside, 2 * span - inside)
    above, below = base + jnp.abs(u - base), end - jnp.abs(end - u)
    one = jnp.where(np.isfinite(low), above, jnp.where(np.isfinite(high), below, u))
    # What lies inside is not rounded.
    reflected = jnp.where((u >= low) & (u <= high), u, jnp.where(both, between, one))
    return jnp.clip(reflected, low, high)


def _bounds(
    bound: Any, x0: Any, leaves: list[Array], names: list[str], name: str, missing: float
) -> list[np.ndarray]:
    """A bound for each leaf of x0."""
    if _checks.is_traced(bound):
        raise TypeError(f"{name} must be known, got a traced value: make it a numpy array")

    def spread(value: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: missing if value is None else value, part)

    try:
        tree = jax.tree.map(spread, bound, x0, is_leaf=lambda value: value is None)
    except ValueError:
        raise ValueError(
            f"{name} must be a number or a pytree with the structure of x0 or a prefix of it, got "
            f"{jax.tree.structure(bound)} for {jax.tree.structure(x0)}"
            f"{_checks.array_hint(bound, x0)}"
        ) from None
    found = []
    for part, leaf, leaf_name in zip(jax.tree.leaves(tree), leaves, names, strict=True):
        array = np.asarray(part)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be real numbers, got {array.dtype} for {leaf_name}")
        if np.isnan(array).any():
            raise ValueError(f"{name} must not be NaN (for {leaf_name}); None is for no bound")
        try:
            found.append(np.broadcast_to(array.astype(np.float64), leaf.shape))
        except ValueError:
            raise ValueError(
                f"{name} of shape {array.shape} does not broadcast to {leaf_name}, of shape "
                f"{leaf.shape}"
            ) from None
    return found


def _check_between(low: np.ndarray, high: np.ndarray, leaf: Array, name: str) -> None:
    if not (low < high).all():
        at = np.unravel_index(np.argmin(low < high), low.shape)
        raise ValueError(
            f"lower must be below upper, got {low[at]:g} and {high[at]:g} in {name}; what is not "
            "to move is handed to fun by args=(...)"
        )
    if _checks.is_traced(leaf):
        return
    known = np.asarray(leaf).astype(np.float64)
    # Bounds are rounded as x0 was: a start at 0.7 in single precision lies below 0.7.
    low, high = (v.astype(leaf.dtype).astype(np.float64) for v in (low, high))
    if not np.isfinite(known).all():
        raise ValueError(f"x0 must be finite, but {name} is not")
    inside = (known >= low) & (known <= high)
    if not inside.all():
        at = np.unravel_index(np.argmin(inside), known.shape)
        raise ValueError(
            f"x0 must lie between lower and upper, got {known[at]:g} in {name}, with bounds "
            f"{low[at]:g} and {high[at]:g}"
        )
