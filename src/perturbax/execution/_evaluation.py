"""What is estimated, and its evaluation at samples: flat arrays, and chunks of groups."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from ..sampling._draw_groups import draw
from ..sampling._random_bits import materialise
from ..scale._matrices import scaled
from ..tracing._mesh_axes import in_told_mesh, varying, varying_axes
from ..tracing._signature import TracedFunction

# Numbers in flight at a time: a chunk of noise should stay in the cache of a core, and fill a GPU.
CHUNK = {"cpu": 2**19}
_CHUNK_ACCELERATOR = 2**26
# Numbers in flight under vmap on a CPU: what all cores share should hold them.
_BATCH = 2**21
# A sample of the noise that several passes read is drawn again in each of them if there are several
# chunks; chunks this many times as large cost less.
_PASSES = 2
# Noise that several passes read is kept up to this many numbers: drawing it costs more than memory.
_KEPT = {"cpu": 2**22}
_KEPT_ACCELERATOR = 2**27
# With fewer values of other groups than this, the value at x is worth another evaluation.
_FEW = 32
# Up to this many outputs, the Jacobian is accumulated while evaluating: the noise is drawn once.
MAX_ROWS = 8


def chunk_size() -> int:
    """Numbers in flight at a time on the default backend."""
    return CHUNK.get(jax.default_backend(), _CHUNK_ACCELERATOR)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about an estimate: what to evaluate, how often, with what noise."""

    fun: TracedFunction
    noise: Any
    sampler: Any
    num_samples: int
    batch_size: int | None
    degree: int | None  # of the surrogate; None for none
    num_outputs: int  # leaves of fun's result that are its value; the rest is aux
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    dtype: np.dtype  # of the noise, the scores and the weights: at least float32

    @property
    def dim(self) -> int:
        """Number D of perturbed coordinates."""
        return sum(map(math.prod, self.shapes))

    @property
    def group_size(self) -> int:
        """Samples in a group."""
        return self.sampler.group_size(self.num_samples, self.dim)

    @property
    def num_groups(self) -> int:
        """Independent groups of samples."""
        return -(-self.num_samples // self.group_size)

    @property
    def evaluates_at_x(self) -> bool:
        """Whether the value at x is part of the baseline, for want of other values.

        Among many it tells next to nothing, and fun would be compiled once more for it.
        """
        return self.degree == 0 and self.num_samples - self.group_size < _FEW

    @property
    def output_dtypes(self) -> list[np.dtype]:
        """Dtypes of the estimate's leaves: those of fun's values, at least float32."""
        avals: Any = self.fun.out_avals[: self.num_outputs]
        # By hand: with jax_numpy_dtype_promotion='strict' JAX refuses to promote.
        return [
            self.dtype
            if not jnp.issubdtype(a.dtype, jnp.inexact)
            else np.dtype(a.dtype if a.dtype.itemsize >= 4 else np.float32)
            for a in avals
        ]

    @property
    def value_dtype(self) -> np.dtype:
        """Dtype in which values are combined."""
        return np.result_type(self.dtype, *self.output_dtypes)

    @property
    def num_rows(self) -> int:
        """Number M of scalar outputs."""
        return sum(a.size for a in self.fun.out_avals[: self.num_outputs])

    @property
    def width(self) -> int:
        """Numbers of the widest array that one sample needs; symbolic, if any of them is."""
        widths = (self.dim, self.num_rows, *self.fun.widths)
        symbolic = [v for v in widths if not isinstance(v, int)]
        return symbolic[0] if symbolic else max(widths, default=1) or 1

    def groups_at_a_time(self) -> int:
        """How many groups a chunk holds."""
        if not isinstance(self.width, int):  # a symbolic shape, while exporting
            most = 16
        elif self.batch_size is None:
            budget = chunk_size()
            own = max(self.dim, self.num_rows, 1)
            if self.width == own and (self.degree or self.num_rows > MAX_ROWS):
                budget *= _PASSES
            most = budget // (self.group_size * self.width)
        else:
            most = self.batch_size // self.group_size
        most = min(max(most, 1), self.num_groups)
        if self.batch_size is None:
            # A divisor saves the last, smaller chunk a compilation of its own.
            for count in range(most, most // 2, -1):
                if self.num_groups % count == 0:
                    return count
        return most


def group_sizes(plan: Plan) -> np.ndarray:
    """Samples in each group."""
    sizes = np.full(plan.num_groups, plan.group_size)
    sizes[-1] = plan.num_samples - plan.group_size * (plan.num_groups - 1)
    return sizes


def mean_over_groups(plan: Plan, values: Array) -> Array:
    """The mean of values (groups, ...) of groups, each of which counts by its size."""
    share = (group_sizes(plan) / plan.num_samples).astype(values.dtype)
    # Not a product of matrices, which takes longer to compile.
    return jnp.sum(share.reshape(-1, *[1] * (values.ndim - 1)) * values, axis=0)


class Point(NamedTuple):
    """Where the function is evaluated: the leaves of x and their scales, held fixed."""

    x: list[Array]
    sigma: list[Array]


def point_of(plan: Plan, x: list[Array], sigma: list[Array]) -> Point:
    """x and sigma as a `Point`."""
    return Point(*lax.stop_gradient((x, [v.astype(plan.dtype) for v in sigma])))


def concatenate(leaves: list[Array], dtype: np.dtype) -> Array:
    """All leaves in one flat array; an empty one of `dtype` if there are none."""
    flat = [leaf.reshape(-1) for leaf in leaves]
    return jnp.concatenate(flat) if flat else jnp.zeros((0,), dtype)


def split_leaves(flat: Array, avals: Any, dtypes: list[np.dtype]) -> list[Array]:
    """Cuts the last axis of `flat` into leaves of the given shapes and dtypes."""
    return shaped(cut(flat, avals), avals, dtypes)


def cut(flat: Array, avals: Any, axis: int = -1) -> list[Array]:
    """Cuts an axis of `flat` into parts of the sizes of the leaves."""
    parts, start = [], 0
    for aval in avals:
        parts.append(lax.slice_in_dim(flat, start, start + aval.size, axis=axis))
        start += aval.size
    return parts


def shaped(parts: list[Array], avals: Any, dtypes: list[np.dtype]) -> list[Array]:
    """Gives the last axis of each part the shape of its leaf, and the part the leaf's dtype."""
    leaves = []
    for part, aval, dtype in zip(parts, avals, dtypes, strict=True):
        part = part if jnp.issubdtype(dtype, jnp.complexfloating) else _real(part)
        leaves.append(part.reshape(part.shape[:-1] + aval.shape).astype(dtype))
    return leaves


def _real(value: Array) -> Array:
    return value.real if jnp.iscomplexobj(value) else value


def noise_in(plan: Plan, operands: Any) -> Any:
    """The noise, with what it closes over."""
    return plan.noise.bind(operands[1]) if operands[1] is not None else plan.noise


def draw_noise(plan: Plan, key: Array, operands: Any, first: Array, count: int) -> Array:
    """Noise of `count` groups from the `first` on, (count * n, D), which has no derivative."""
    noise = noise_in(plan, operands)
    z = draw(noise, plan.sampler, key, first, count, plan.group_size, plan.dim, plan.dtype)
    return lax.stop_gradient(z)


def drawer(plan: Plan, key: Array, operands: Any) -> Callable[[Array, int], Array]:
    """`draw_noise` for several passes over the groups, which keeps it unless it is too large."""
    most = _KEPT.get(jax.default_backend(), _KEPT_ACCELERATOR)
    size = plan.group_size * plan.dim
    whole = plan.groups_at_a_time() == plan.num_groups
    if not whole and (not isinstance(size, int) or plan.num_groups * size > most):
        return lambda first, count: draw_noise(plan, key, operands, first, count)
    z = draw_noise(plan, key, operands, jnp.uint32(0), plan.num_groups)
    if whole:
        return lambda first, count: z

    def part(first: Array, count: int) -> Array:
        rows = count * plan.group_size

        def block() -> Array:
            return lax.dynamic_slice_in_dim(z, first * np.uint32(plan.group_size), rows)

        # Or XLA would cut again for every reading.
        return materialise(block, (rows, plan.dim), z.dtype, key)

    return part


def evaluate_at(plan: Plan, operands: Any, point: Point, z: Array) -> tuple[Array, list[Array]]:
    """Values (C, M) and stacked aux of the function at x + sigma z for the rows z of (C, D)."""
    with in_told_mesh():
        return _evaluate_at(plan, operands, point, z)


@partial(jax.jit, static_argnums=0)  # traced once for value and derivative
def _evaluate_at(plan: Plan, operands: Any, point: Point, z: Array) -> tuple[Array, list[Array]]:
    specs = [jax.ShapeDtypeStruct(shape, plan.dtype) for shape in plan.shapes]

    def one(row: Array) -> tuple[Array, list[Array]]:
        noise = split_leaves(row, specs, [plan.dtype] * len(specs))
        scales = point.sigma * (len(point.x) if len(point.sigma) == 1 else 1)
        leaves = [
            (x.astype(plan.dtype) + scaled(sigma, v)).astype(x.dtype)
            for x, sigma, v in zip(point.x, scales, noise, strict=True)
        ]
        return call_fun(plan, operands, leaves)

    if z.shape[0] == 1:  # as it is: fun may hold what cannot be vmapped
        return jax.tree.map(lambda v: v[None], one(z[0]))
    if plan.batch_size is not None and plan.batch_size < z.shape[0]:
        return lax.map(one, z, batch_size=plan.batch_size if plan.batch_size > 1 else None)
    return jax.vmap(one)(z)


def call_fun(plan: Plan, operands: Any, leaves: list[Array]) -> tuple[Array, list[Array]]:
    """Flat value (M,) and aux of the function at one point."""
    out = [jnp.asarray(v) for v in plan.fun(operands[0], *leaves)]
    values = [v.astype(plan.value_dtype) for v in out[: plan.num_outputs]]
    # What fun sums over a mesh axis varies no more over it, but its weight does.
    axes = frozenset().union(*map(varying_axes, leaves))
    return concatenate([varying(v, axes) for v in values], plan.value_dtype), out[
        plan.num_outputs :
    ]


def over_groups(
    plan: Plan, body: Callable[..., Any], xs: Any = (), carry: Array | None = None
) -> tuple[Any, ...]:
    """Sums the first and stacks the second result of body(first, count, rows, xs of these).

    `body` sees all groups, a chunk of `count` at a time, which hold `rows` samples: all but the
    last group, which may lack some, are whole. `xs` and stacked results have one row a sample or
    one row a group. If there is a carry, `body` takes it as a further argument and returns it as
    a further result, from chunk to chunk; so does this function.
    """
    size, total, count = plan.group_size, plan.num_groups, plan.groups_at_a_time()
    carried = () if carry is None else (carry,)
    if count == total:
        return body(jnp.uint32(0), total, plan.num_samples, xs, *carried)
    # Without this, reverse mode would keep the noise of all chunks; it is drawn again instead.
    if not plan.fun.jaxpr.effects:
        body = jax.checkpoint(body, static_argnums=(1, 2), prevent_cse=False)
    steps = plan.num_samples // (count * size)
    rest = plan.num_samples - steps * count * size

    def rows_of(v: Any) -> int:  # in the part that the scan covers
        return steps * count * (size if v.shape[0] == plan.num_samples else 1)

    def step(state: Any, step_xs: Any) -> tuple[Any, Any]:
        (index, part), (total_sums, *carried) = step_xs, state
        first = index * np.uint32(count)
        sums, stacked, *carried = body(first, count, count * size, part, *carried)
        return (jax.tree.map(jnp.add, total_sums, sums), *carried), stacked

    def chunked(v: Any) -> Array:
        return v[: rows_of(v)].reshape(steps, rows_of(v) // steps, *v.shape[1:])

    chunks = jax.tree.map(chunked, xs)
    steps_xs = (lax.iota(jnp.uint32, steps), chunks)
    head = jax.tree.map(lambda v: v[0], steps_xs)
    shapes, _, *after = jax.eval_shape(
        lambda h: body(h[0], count, count * size, h[1], *carried), head
    )
    # What is carried on may vary over more mesh axes than at the start.
    carried = [varying(v, varying_axes(t)) for v, t in zip(carried, after, strict=True)]
    (sums, *carried), stacked = lax.scan(step, (jax.tree.map(_zeros, shapes), *carried), steps_xs)
    stacked = jax.tree.map(lambda v: v.reshape(steps * v.shape[1], *v.shape[2:]), stacked)
    if rest:
        tail = jax.tree.map(lambda v: v[rows_of(v) :], xs)
        first = jnp.uint32(steps * count)
        more, last, *carried = body(first, total - steps * count, rest, tail, *carried)
        sums = jax.tree.map(jnp.add, sums, more)
        stacked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacked, last)
    return sums, stacked, *carried


def vmapped_in_parts(plan: Plan, fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args); if vmapped on a single CPU, for so few inputs at a time as fit into the cache.

    A chunk is sized for one input. All inputs of a batch at once would each go through memory with
    every step; XLA itself uses all cores for one input.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not isinstance(plan.width, int):
        return fun(*args)
    most = max(1, _BATCH // (plan.groups_at_a_time() * plan.group_size * plan.width))
    one = custom_vmap(fun)

    @one.def_vmap
    def batch(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(args)
        batched = jax.tree.leaves(in_batched)
        moving = [v for v, b in zip(leaves, batched, strict=True) if b]

        def at(moving: list[Array], fun: Callable[..., Any]) -> Any:
            parts = iter(moving)
            merged = [next(parts) if b else v for v, b in zip(leaves, batched, strict=True)]
            return fun(*jax.tree.unflatten(tree, merged))

        if axis_size <= most:
            out = jax.vmap(partial(at, fun=fun))(moving)
        elif most == 1:
            out = lax.map(partial(at, fun=one), moving)
        else:
            size = next((n for n in range(most, most // 2, -1) if axis_size % n == 0), most)
            out = lax.map(partial(at, fun=fun), moving, batch_size=size)
        return out, jax.tree.map(lambda _: True, out)

    return one(*args)


def in_groups(plan: Plan, rows: Array) -> Array:
    """Rows (C, ...) cut into groups (count, n, ...), zeros for what the last one lacks."""
    missing = -rows.shape[0] % plan.group_size
    if missing:
        rows = jnp.concatenate([rows, jnp.zeros((missing, *rows.shape[1:]), rows.dtype)])
    # In sizes, for -1 says nothing about an array without elements.
    return rows.reshape(rows.shape[0] // plan.group_size, plan.group_size, *rows.shape[1:])


def _zeros(aval: Any) -> Array:
    return varying(jnp.zeros(aval.shape, aval.dtype), varying_axes(aval))
