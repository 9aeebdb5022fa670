"""The evaluation of a plan: noise and values, a chunk of groups at a time, and the door to fun."""

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
from ..tracing._derivative_rules import aligned
from ..tracing._mesh_axes import (
    in_told_mesh,
    in_types_of_constants,
    varying,
    varying_axes,
    with_explicit_axes,
)
from . import _devices
from ._plan import Operands, Plan, Point, concatenate, noise_in, perturbed

# Numbers in flight under vmap on a CPU: what all cores share should hold them.
_BATCH = 2**21
# Noise that several passes read is kept up to this many numbers: drawing it costs more than memory.
_KEPT = {"cpu": 2**22}
_KEPT_ACCELERATOR = 2**27


class Chunk(NamedTuple):
    """Some groups in a row. All are whole, but for the very last group, which may lack samples."""

    first: Array  # number of the first group
    groups: int  # how many of them
    rows: int  # how many samples they hold


def draw_noise(plan: Plan, key: Array, operands: Operands, chunk: Chunk) -> Array:
    """Noise of a chunk, (rows, D), which has no derivative."""
    noise, (first, count, rows) = noise_in(plan, operands), chunk
    z = draw(noise, plan.sampler, key, first, count, plan.group_size, plan.dim, plan.dtype)
    return lax.stop_gradient(z)[:rows]


def draw_next(plan: Plan, key: Array, operands: Operands, first: Array, count: int) -> Array:
    """Noise of the samples first, ..., first + count - 1 of all groups in a row, (count, D).

    Who asks for one range of `count` samples after another has whole groups after enough calls, so
    that samples of several calls are orthogonal or stratified together. `first` is an uint32
    scalar, a multiple of `count`.
    """
    size = plan.group_size
    if count % size == 0:
        groups = count // size
    else:
        groups = 1 if size % count == 0 else -(-(count - 1) // size) + 1
    chunk = Chunk(first // np.uint32(size), groups, groups * size)
    z = draw_noise(plan, key, operands, chunk)
    return lax.dynamic_slice_in_dim(z, first % np.uint32(size), count)


def kept_noise(plan: Plan, key: Array, operands: Operands) -> Array | None:
    """Noise of all samples for several passes over the groups; None if it is too large to keep."""
    if plan.shares_groups:
        return None
    most = _KEPT.get(jax.default_backend(), _KEPT_ACCELERATOR)
    size = plan.group_size * plan.dim
    whole = plan.groups_at_a_time() == plan.num_groups
    if not whole and (not isinstance(size, int) or plan.num_groups * size > most):
        return None
    return draw_noise(plan, key, operands, everything(plan))


def drawer(plan: Plan, key: Array, operands: Operands, z: Array | None) -> Callable[[Chunk], Array]:
    """`draw_noise` for several passes: by reading what `kept_noise` found, if it is not None."""
    if z is None:
        return partial(draw_noise, plan, key, operands)

    def part(chunk: Chunk) -> Array:
        if chunk.groups == plan.num_groups:
            return z

        def block() -> Array:
            return lax.dynamic_slice_in_dim(z, chunk.first * np.uint32(plan.group_size), chunk.rows)

        # Or XLA would cut again for every reading.
        return materialise(block, (chunk.rows, plan.dim), z.dtype, key)

    return part


def evaluate_at(
    plan: Plan, operands: Operands, point: Point, z: Array
) -> tuple[Array, list[Array]]:
    """Values (C, M) and stacked aux of the function at x + sigma z for the rows z of (C, D).

    The only place that calls fun, which is vmapped over the rows, be there many or one; it is
    called as it is where batch_size is 1, for it may hold what cannot be vmapped.
    """
    if plan.mesh is None or plan.shares_groups:
        with in_told_mesh():
            return _evaluate_at(plan, operands, point, z)
    mesh, rows = plan.mesh, z.shape[0]
    each = -(-rows // mesh.size)

    def on_this(operands: Operands, point: Point, z: Array) -> tuple[Array, list[Array]]:
        # Where the number of devices does not divide that of rows, some are taken twice.
        own = _devices.this_device(mesh) * np.uint32(each) + lax.iota(jnp.uint32, each)
        found = _evaluate_at(plan, operands, point, z[own % np.uint32(rows)])
        return jax.tree.map(partial(_devices.gathered, mesh), found)

    found = _devices.on_each(mesh, on_this, operands, point, z)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:rows], found)


@partial(jax.jit, static_argnums=0)  # traced once for value and derivative
def _evaluate_at(
    plan: Plan, operands: Operands, point: Point, z: Array
) -> tuple[Array, list[Array]]:
    def one(row: Array) -> tuple[Array, list[Array]]:
        leaves = list(map(with_explicit_axes, perturbed(plan, point, row), plan.fun.in_avals))
        known = list(operands.fun)
        for i in plan.own_operands:
            known[i] = aligned(known[i], leaves)
        out = in_types_of_constants([jnp.asarray(v) for v in plan.fun(known, *leaves)])
        value = concatenate(out[: plan.num_outputs], plan.value_dtype)
        # What fun sums over a mesh axis varies no more over it, but its weight does.
        return varying(value, varying_axes(row) | varying_axes(point.x)), out[plan.num_outputs :]

    if plan.batch_size == 1:
        if z.shape[0] > 1:
            return lax.map(one, z)
        return jax.tree.map(lambda v: v[None], one(z[0]))
    if plan.batch_size is not None and plan.batch_size < z.shape[0]:
        return lax.map(one, z, batch_size=plan.batch_size)
    return jax.vmap(one)(z)


def added(left: Any, right: Any) -> Any:
    """The sum of two pytrees."""
    return jax.tree.map(jnp.add, left, right)


def everything(plan: Plan) -> Chunk:
    """All groups in one chunk."""
    return Chunk(jnp.uint32(0), plan.num_groups, plan.num_samples)


def summed(
    plan: Plan, body: Callable[..., Any], xs: Any = (), merge: Callable[[Any, Any], Any] = added
) -> Any:
    """The sum over chunks of body(chunk, xs of its samples or groups); see `over_groups`."""
    return over_groups(plan, lambda chunk, xs: (body(chunk, xs), ()), xs, merge)[0]


def stacked(plan: Plan, body: Callable[..., Any], xs: Any = ()) -> Any:
    """What body(chunk, xs) returns for all chunks, one behind the other.

    body gets the part of xs that belongs to the chunk, and returns arrays with a row for each of
    its samples, or for each of its groups.
    """
    return over_groups(plan, lambda chunk, xs: ((), body(chunk, xs)), xs)[1]


def over_groups(
    plan: Plan, body: Callable[..., Any], xs: Any = (), merge: Callable[[Any, Any], Any] = added
) -> tuple[Any, Any]:
    """Sums the first and stacks the second result of body(chunk, xs of its samples or groups).

    `xs` and stacked results have one row a sample or one row a group. merge(left, right) makes the
    sums of chunks in a row from those of the former and of the latter; zeros are those of none.
    """
    if plan.shares_groups:
        return _over_shares(plan, body, xs, merge)
    size, total, count = plan.group_size, plan.num_groups, plan.groups_at_a_time()
    if count == total:
        return body(everything(plan), xs)

    def of_chunk(count: int, rows: int, first: Array, xs: Any) -> Any:
        def part(first: Array, xs: Any) -> Any:
            return body(Chunk(first, count, rows), xs)

        # Without this, reverse mode would keep the noise of all chunks; it is drawn again instead.
        # Of no static arguments, with which it would keep tracers (`jax.checking_leaks`).
        if not plan.fun.jaxpr.effects:
            part = jax.checkpoint(part, prevent_cse=False)
        return part(first, xs)

    steps = plan.num_samples // (count * size)
    rest = plan.num_samples - steps * count * size

    def rows_of(v: Any) -> int:  # in the part that the scan covers
        return steps * count * (size if v.shape[0] == plan.num_samples else 1)

    def step(sums: Any, step_xs: Any) -> tuple[Any, Any]:
        index, part = step_xs
        more, rows = of_chunk(count, count * size, index * np.uint32(count), part)
        return merge(sums, more), rows

    def chunked(v: Any) -> Array:
        return v[: rows_of(v)].reshape(steps, rows_of(v) // steps, *v.shape[1:])

    steps_xs = (lax.iota(jnp.uint32, steps), jax.tree.map(chunked, xs))
    head = jax.tree.map(lambda v: v[0], steps_xs)
    shapes, _ = jax.eval_shape(lambda h: body(Chunk(h[0], count, count * size), h[1]), head)
    sums, stack = lax.scan(step, jax.tree.map(_zeros, shapes), steps_xs)
    stack = jax.tree.map(lambda v: v.reshape(steps * v.shape[1], *v.shape[2:]), stack)
    if rest:
        tail = jax.tree.map(lambda v: v[rows_of(v) :], xs)
        first = jnp.uint32(steps * count)
        more, last = of_chunk(total - steps * count, rest, first, tail)
        sums = merge(sums, more)
        stack = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stack, last)
    return sums, stack


def _over_shares(
    plan: Plan, body: Callable[..., Any], xs: Any, merge: Callable[[Any, Any], Any]
) -> tuple[Any, Any]:
    """`over_groups`, of which each device does a part."""
    assert plan.mesh is not None
    size, count = plan.group_size, plan.groups_at_a_time()
    chunks = -(-plan.num_groups // count)
    before = chunks - 1  # of the last chunk, which may lack some
    groups, rows = plan.num_groups - before * count, plan.num_samples - before * count * size

    def whole(number: Array, part: Any) -> Any:
        return body(Chunk(number * np.uint32(count), count, count * size), part)

    def last(number: Array, part: Any) -> Any:
        part = jax.tree.map(lambda v: v[: groups if v.shape[0] == count else rows], part)
        return body(Chunk(number * np.uint32(count), groups, rows), part)

    def chunked(v: Array) -> Array:
        rows = count * (size if v.shape[0] == plan.num_samples else 1)
        missing = chunks * rows - v.shape[0]
        v = jnp.concatenate([v, jnp.zeros((missing, *v.shape[1:]), v.dtype)]) if missing else v
        return v.reshape(chunks, rows, *v.shape[1:])

    def unchunked(v: Array) -> Array:
        number = plan.num_groups if v.shape[1] == count else plan.num_samples
        return v.reshape(chunks * v.shape[1], *v.shape[2:])[:number]

    sums, stack = _devices.shared_out(
        plan.mesh,
        chunks,
        whole,
        last if rows < count * size else None,
        jax.tree.map(chunked, xs),
        merge,
    )
    return sums, jax.tree.map(unchunked, stack)


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

        # How many inputs there are may not be known, while exporting.
        if axis_size <= most if isinstance(axis_size, int) else most > 1:
            out = jax.vmap(partial(at, fun=fun))(moving)
        elif most == 1:
            out = lax.map(partial(at, fun=one), moving)
        else:
            size = next((n for n in range(most, most // 2, -1) if axis_size % n == 0), most)
            out = lax.map(partial(at, fun=fun), moving, batch_size=size)
        return out, jax.tree.map(lambda _: True, out)

    return one(*args)


def _zeros(aval: Any) -> Array:
    return varying(jnp.zeros(aval.shape, aval.dtype), varying_axes(aval))
