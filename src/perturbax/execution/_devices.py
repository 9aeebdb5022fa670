"""Chunks shared out over the devices of a mesh, and sums in an order that is always the same.

Noise is a function of the key and of a group's number alone, so that sharing out work takes nothing
but numbers. All devices have the same arguments, and all get the same results; in between, each
does some of the chunks. Chunks are dealt to slots, a row of them to each, and slots to devices; of
slots there are 16, however many devices there are, if these divide 16. A slot adds up its chunks
one after the other, and slots are added up in pairs, pairs of pairs, and so on. So the result has
the same bits on 1, 2, 4, 8 and 16 devices.

Each pass over the chunks is a `jax.shard_map` of its own, of operations that were traced outside,
and JAX differentiates around it: inside, what a derivative is summed over would have to be told.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import eval_jaxpr
from jax.sharding import Mesh, PartitionSpec

from ..tracing._mesh_axes import replicated

_SLOTS = 16


def num_slots(mesh: Mesh) -> int:
    """Number of slots, a multiple of the number of devices."""
    return mesh.size * -(-_SLOTS // mesh.size)


def starts(number: int, parts: int) -> np.ndarray:
    """Where the parts of `number` things start, and the last one ends: (parts + 1,).

    Sizes differ by one at most, and larger parts are spread evenly, so that any parts in a row have
    a fair share, too.
    """
    return np.arange(parts + 1, dtype=np.int64) * number // parts


def on_each(mesh: Mesh, fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args) on every device; fun returns the same on all, and knows where it is."""
    # Types do not tell that results are the same: fun holds what was traced outside.
    spec = PartitionSpec()
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return replicated(mesh, mapped(*args))


def this_device(mesh: Mesh) -> Array:
    """Number of the device, in the order of the mesh."""
    return lax.axis_index(mesh.axis_names).astype(jnp.uint32)


def gathered(mesh: Mesh, value: Array) -> Array:
    """The values of all devices, stacked along a new axis."""
    return lax.all_gather(value, mesh.axis_names)


def shared_out(
    mesh: Mesh,
    chunks: int,
    whole: Callable[..., Any],
    last: Callable[..., Any] | None,
    xs: Any,
    merge: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """Sums the first and stacks the second result of whole(number of a chunk, its xs).

    Args:
      mesh: of the devices.
      chunks: how many there are.
      whole: what is done for a chunk; it may close over anything.
      last: what is done for the last one, if that is another function with results of other shapes,
        which are filled up with zeros.
      xs: a pytree of arrays with a leading axis for the chunks; of the last one, the first rows.
      merge: of the sums of chunks in a row and those of the next ones, what all have; zeros are
        those of none.

    Returns:
      The sums, and the stacked results with a leading axis for the chunks.
    """
    slots = num_slots(mesh)
    bounds = starts(chunks, slots)
    steps, own = int(np.diff(bounds).max()), slots // mesh.size
    head = (jnp.uint32(0), jax.tree.map(lambda v: v[0], xs))
    functions = [whole] if last is None else [whole, last]
    closed = [jax.make_jaxpr(fun, return_shape=True)(*head) for fun in functions]
    shapes = closed[0][1]
    constants, places = _distinct([jaxpr.consts for jaxpr, _ in closed])
    branches = [_filled(*one, shapes, at) for one, at in zip(closed, places, strict=True)]

    def nothing(constants: Any, chunk: Array, part: Any) -> Any:
        return _zeros(shapes)

    def one(constants: Any, chunk: Array, end: Array, part: Any) -> Any:
        """What is done for a chunk, if it is before `end`."""
        kind = (chunk < end).astype(jnp.int32)
        if last is not None:
            kind *= jnp.where(chunk == chunks - 1, 2, 1)
        # The barrier keeps XLA from merging what is done with what is around it, which rounds in
        # another way when there are other loops around it.
        kind = lax.optimization_barrier(kind)
        return lax.switch(kind, [nothing, *branches], constants, chunk, part)

    if not any(jaxpr.effects for jaxpr, _ in closed):
        # Without this, reverse mode would keep the noise of all chunks; it is drawn again instead.
        one = jax.checkpoint(one, prevent_cse=False)

    def on_this(constants: Any, xs: Any) -> Any:
        first_slot = this_device(mesh) * np.uint32(own)
        numbers = np.minimum(bounds[:-1, None] + np.arange(steps), chunks - 1)
        numbers = lax.dynamic_slice_in_dim(numbers.astype(np.uint32), first_slot, own)
        ends = jnp.asarray(bounds.astype(np.uint32))
        nought = _zeros(shapes[0])

        def in_slot(slot: Array, parts: Any) -> Any:
            def step(sums: Any, xs: Any) -> tuple[Any, Any]:
                first, i, part = xs
                more, rows = one(constants, first + i, end, part)
                return merge(sums, more), rows

            start, end = ends[slot], ends[slot + 1]
            count = lax.iota(jnp.uint32, steps)
            return lax.scan(step, nought, (jnp.broadcast_to(start, (steps,)), count, parts))

        def in_slots(slot: Array, number: int, parts: Any) -> Any:
            if number == 1:
                return in_slot(slot, jax.tree.map(lambda v: v[0], parts))
            ways = next(i for i in range(2, number + 1) if number % i == 0)
            each = number // ways
            split = jax.tree.map(lambda v: v.reshape(ways, each, *v.shape[1:]), parts)

            def step(sums: Any, xs: Any) -> tuple[Any, Any]:
                i, parts = xs
                more, rows = in_slots(slot + i * np.uint32(each), each, parts)
                return merge(sums, more), rows

            sums, rows = lax.scan(step, nought, (lax.iota(jnp.uint32, ways), split))
            return sums, jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), rows)

        parts = jax.tree.map(lambda v: v[numbers], xs)
        sums, rows = in_slots(first_slot, own, parts)
        return _merged(mesh, sums, merge), jax.tree.map(functools.partial(gathered, mesh), rows)

    sums, rows = on_each(mesh, on_this, constants, xs)
    done = np.concatenate([slot * steps + np.arange(n) for slot, n in enumerate(np.diff(bounds))])

    def in_order(v: Array) -> Array:  # (devices, slots of each * steps, ...)
        v = v.reshape(slots * steps, *v.shape[2:])
        return v if chunks == slots * steps else v[done]

    return sums, jax.tree.map(in_order, rows)


def _merged(mesh: Mesh, sums: Any, merge: Callable[[Any, Any], Any]) -> Any:
    """The sums of all devices, merged in pairs of neighbours, these in pairs, and so on.

    If the number of devices is a power of two, else one by one.
    """
    if mesh.size & (mesh.size - 1):
        all_sums = jax.tree.map(functools.partial(gathered, mesh), sums)
        first, rest = (jax.tree.map(lambda v, i=i: v[i], all_sums) for i in (0, slice(1, None)))
        length = mesh.size - 1
        return lax.scan(lambda a, b: (merge(a, b), None), first, rest, length=length)[0]
    here, distance = this_device(mesh), 1
    while distance < mesh.size:
        pairs = [(i, i ^ distance) for i in range(mesh.size)]
        other = jax.tree.map(lambda v, p=pairs: lax.ppermute(v, mesh.axis_names, p), sums)
        is_left = here & np.uint32(distance) == 0
        left, right = (
            jax.tree.map(lambda a, b, at=at: jnp.where(at, a, b), sums, other)
            for at in (is_left, ~is_left)
        )
        sums, distance = merge(left, right), 2 * distance
    return sums


# --- What functions close over, as arguments


def _filled(closed: Any, tree: Any, shapes: Any, places: Sequence[int]) -> Callable[..., Any]:
    """The operations as a function of all constants, of which `places` are theirs, and arguments.

    Rows are as many as asked.
    """

    def call(constants: Sequence[Any], *args: Any) -> Any:
        flat = eval_jaxpr(closed.jaxpr, [constants[i] for i in places], *jax.tree.leaves(args))
        sums, rows = jax.tree.unflatten(jax.tree.structure(tree), flat)

        def fill(v: Array, like: Any) -> Array:
            missing = like.shape[0] - v.shape[0]
            return jnp.concatenate([v, jnp.zeros((missing, *v.shape[1:]), v.dtype)])

        return sums, jax.tree.map(fill, rows, shapes[1])

    return call


def _distinct(lists: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[int]]]:
    """All elements once, and where in them those of each list are."""
    places: dict[int, int] = {}
    for one in lists:
        for value in one:
            places.setdefault(id(value), len(places))
    values = {places[id(v)]: v for one in lists for v in one}
    return [values[i] for i in range(len(values))], [[places[id(v)] for v in one] for one in lists]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
