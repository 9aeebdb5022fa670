"""What JAX traces slowly by jax.numpy, by lax."""

from typing import Any

from jax import Array, lax


def where(chosen: Any, yes: Any, no: Any) -> Array:
    """jnp.where, which JAX traces, lowers and inlines as a function of its own at each shape.

    That takes ten times as long. Of `yes` and `no` one is an array; a number becomes one like it.
    """
    if not hasattr(yes, "dtype"):
        yes = lax.full_like(no, yes)
    if not hasattr(no, "dtype"):
        no = lax.full_like(yes, no)
    return lax.select(*broadcast(chosen, yes, no))


def broadcast(*values: Any) -> list[Any]:
    """All of their common shape."""
    shape = lax.broadcast_shapes(*(v.shape for v in values))
    first = [len(shape) - v.ndim for v in values]
    return [
        v if v.shape == shape else lax.broadcast_in_dim(v, shape, range(start, len(shape)))
        for v, start in zip(values, first, strict=True)
    ]
