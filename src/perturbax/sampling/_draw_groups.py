"""Draws noise group by group: the same numbers however many groups are drawn at a time."""

from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from .._checks import defined_at, is_ours
from ..noise._protocol import NoiseDistribution
from ..tracing._mesh_axes import in_told_mesh
from ..tracing._user_code import trace_draw
from ._protocol import Sampler
from ._random_bits import child, group_numbers, materialise


def draw(
    noise: NoiseDistribution,
    sampler: Sampler,
    key: Array,
    first: Array,
    count: int,
    group_size: int,
    dim: int,
    dtype: np.dtype,
) -> Array:
    """Noise of the groups first, ..., first + count - 1: shape (count * group_size, dim).

    A function of the key and of each group's number alone, so that it is the same however many
    groups are drawn at a time and wherever they are.

    Args:
      noise: the distribution.
      sampler: how samples of a group depend on each other.
      key: two uint32 words (see `_random_bits.root`).
      first: number of the first group, uint32 scalar.
      count: number of groups, static.
      group_size: samples in a group, static.
      dim: number of coordinates of a sample, static.
      dtype: floating dtype of the result.
    """
    # Traced once for value and derivative, unless the noise holds arrays, or a size is symbolic.
    static = isinstance(dim, int) and getattr(noise, "operands", None) is None
    with in_told_mesh():
        return (_traced_once if static else sample_groups)(
            noise, sampler, key, first, count, group_size, dim, dtype
        )


def sample_groups(
    noise: NoiseDistribution,
    sampler: Sampler,
    key: Array,
    first: Array,
    count: int,
    group_size: int,
    dim: int,
    dtype: np.dtype,
) -> Array:
    """What a sampler's `sample_groups` draws, or, if it has none, its `sample_group` one by one.

    Each number is computed once, however often it is read: those of this library see to that
    themselves.
    """
    together = getattr(sampler, "sample_groups", None)
    # Not what a class inherits that draws by another `sample_group`.
    newest = defined_at(sampler, "sample_groups")[0] <= defined_at(sampler, "sample_group")[0]
    rest, name = (noise, group_size, dim, dtype), np.dtype(dtype).name
    shape = count * group_size, dim
    if together is not None and newest:
        if is_ours(type(sampler)):  # tested, not checked at each call
            return together(key, first, count, *rest)
        what = f"sampler.sample_groups(key, first, {count}, noise, {group_size}, {dim}, {name})"

        def block() -> Array:
            return _checked(lambda key: together(key, first, count, *rest), key, what, shape, dtype)

    else:
        what = f"sampler.sample_group(key, noise, {group_size}, {dim}, {name})"

        def one(key: Array) -> Array:
            typed = jax.random.wrap_key_data(key, impl="threefry2x32")
            draw = lambda key: sampler.sample_group(key, *rest)  # noqa: E731
            return _checked(draw, typed, what, (group_size, dim), dtype)

        def block() -> Array:
            return jax.vmap(one)(child(key, group_numbers(first, count))).reshape(shape)

    return materialise(block, shape, dtype, key)


_traced_once = jax.jit(sample_groups, static_argnums=(0, 1, 4, 5, 6, 7))


def _checked(
    draw: Callable[[Array], Array], key: Array, what: str, shape: tuple[int, int], dtype: np.dtype
) -> Array:
    """What a user's sampler draws, if its shape, its dtype and its use of the key are right."""
    layout = ": one row for each sample of a group"
    traced, operands = trace_draw(draw, key, what, shape, "Sampler", "groups", layout)
    given = traced.out_avals[0].dtype
    if given.itemsize < 4:
        raise TypeError(
            f"{what} returned {given}, which holds so few numbers that the gradient would be far "
            f"off. Draw in {np.dtype(dtype).name}, as asked for"
        )
    return traced(operands, key)[0].astype(dtype)
