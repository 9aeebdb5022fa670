"""Inside `jax.shard_map`: which mesh axes values vary over."""

import contextlib
from typing import Any

import jax
from jax import Array

# Since jax 0.7.
_use_mesh: Any = getattr(jax.sharding, "use_abstract_mesh", contextlib.nullcontext)


def in_told_mesh() -> Any:
    """A context in which a jitted function is traced once for a value and its derivative.

    JAX (0.10.2, no issue is known) tells the mesh in derivative rules alone, and would trace once
    with it and once without.
    """
    return _use_mesh(jax.sharding.get_abstract_mesh())


def share_axes(
    key: Array, leaves: list[Array], scales: list[Array]
) -> tuple[Array, list[Array], list[Array]]:
    """Makes all arguments vary over the mesh axes that any of them varies over.

    Samples do, and fun has to be traced for arguments of their type.
    """
    axes = frozenset().union(*map(varying_axes, (key, *leaves, *scales)))
    if not axes:
        return key, leaves, scales

    impl = jax.random.key_impl(key)
    key = jax.random.wrap_key_data(varying(jax.random.key_data(key), axes), impl=impl)
    return key, [varying(v, axes) for v in leaves], [varying(v, axes) for v in scales]


def varying(value: Array, axes: frozenset[Any]) -> Array:
    """The value, as one that varies over these mesh axes too."""
    missing = tuple(axes - varying_axes(value))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009 (its name until jax 0.7)
    return pvary(value, missing)


def varying_axes(value: Any) -> frozenset[Any]:
    """The mesh axes that an array, or a described one, varies over inside `shard_map`."""
    kind: Any = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    kind = getattr(kind, "manual_axis_type", kind)  # its name since jax 0.10
    return frozenset(getattr(kind, "varying", None) or getattr(kind, "vma", None) or ())
