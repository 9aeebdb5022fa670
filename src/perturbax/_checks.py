"""Checks of what users pass: every error names the argument, what came, what was expected."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh

from ._leaves import dtype_of, kind_of, on_device
from ._types import PyTree


def check_fun(fun: object, name: str = "fun") -> None:
    """Raises TypeError unless `fun` is callable."""
    if not callable(fun):
        raise TypeError(f"{name} must be callable, got {type(fun).__name__}")


def package_of(kind: type) -> str:
    """The package that a class is from."""
    return kind.__module__.partition(".")[0]


def is_ours(kind: type) -> bool:
    """Whether a class is of this library."""
    return package_of(kind) == __name__.partition(".")[0]


def defined_at(value: object, name: str) -> tuple[int, type]:
    """How far up a value has an attribute from, 0 if of its own, and from which class."""
    kinds = type(value).__mro__
    places = [(type(value), getattr(value, "__dict__", {})), *((k, vars(k)) for k in kinds)]
    found = ((far, kind) for far, (kind, place) in enumerate(places) if name in place)
    return next(found, (len(places), object))


def _check_static(value: Any, name: str, kind: str) -> None:
    """Raises TypeError if `value`, which a program is compiled for, is not known yet."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be static (a Python {kind}), got a traced value; pass it outside jit, or "
            "mark it with static_argnums"
        )


def check_count(
    value: Any, name: str, most: int | None = None, least: int = 1, remedy: str = ""
) -> int:
    """A static integer of at least `least`, and at most `most`."""
    _check_static(value, name, "int")
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an int, got bool")
    try:
        count = operator.index(value)
    except TypeError:
        came = type(value).__name__
        if isinstance(value, float | np.floating) and float(value).is_integer():
            came = f"{came} {value}: write int({value})"
        raise TypeError(f"{name} must be an int, got {came}") from None
    if count < least:
        raise ValueError(f"{name} must be >= {least}, got {count}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be <= {most}, got {count}{remedy}")
    return count


def check_bool(value: object, name: str) -> bool:
    """A Python (or numpy) bool."""
    _check_static(value, name, "bool")
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r} ({type(value).__name__})")
    return bool(value)


def check_missing(value: Any) -> None:
    """Raises ValueError unless `value` is 'propagate' or 'drop'."""
    if not isinstance(value, str) or value not in ("propagate", "drop"):
        raise ValueError(f"missing must be 'propagate' or 'drop', got {value!r}")


def check_number(value: Any, name: str, wanted: str = "a number") -> float:
    """A static real number, of Python, numpy or JAX; an error says what is `wanted`."""
    _check_static(value, name, "number")
    dtype: Any = getattr(value, "dtype", None)
    array = isinstance(value, np.generic | np.ndarray | Array)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if array:
        real = jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)
    if not real or np.shape(value):
        came = f"{type(value).__name__} {value!r}"
        if array and np.shape(value):
            came = f"an array of shape {np.shape(value)}"
        raise TypeError(f"{name} must be {wanted}, got {came}")
    try:
        return float(value)
    except OverflowError:  # of Python's integers
        return math.inf if value > 0 else -math.inf


def check_level(
    value: Any,
    name: str = "level",
    example: str = "0.95 stands for intervals of 95 %",
) -> float:
    """A static number between 0 and 1; the example starts with one."""
    such = example.partition(" ")[0]
    level = check_number(value, name, f"a number between 0 and 1, such as {such}")
    if not 0 < level < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}; {example}")
    return level


def one_number(value: PyTree, name: str, remedy: str, any_rank: bool = False) -> Array:
    """The one real number that a function returned, of shape ().

    With `any_rank`, an array of one element, whatever its shape, is a number too.

    Raises:
      TypeError: for several arrays or none, and for what is not a real number.
      ValueError: for an array of another shape.
    """
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and callable(getattr(leaves[0], "__jax_array__", None)):
        leaves = [leaves[0].__jax_array__()]  # JAX takes such objects for arrays
    kinds = [dtype_of(leaf) for leaf in leaves]
    came = [
        f"{kind}{list(np.shape(leaf))}" if kind is not None else kind_of(leaf)
        for leaf, kind in zip(leaves, kinds, strict=True)
    ]
    told = f"{name} must return one real number, got {', '.join(came) or 'nothing'}: "
    if len(leaves) != 1:
        raise TypeError(told + remedy)
    [leaf], [kind] = leaves, kinds
    if kind is not None and jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(f"{told}return its real or its imaginary part, or its absolute value")
    if kind is None or not any(jnp.issubdtype(kind, real) for real in (np.number, np.bool_)):
        raise TypeError(told + remedy)
    if np.shape(leaf) and not (any_rank and np.size(leaf) == 1):
        raise ValueError(told + remedy)
    return jnp.reshape(leaf, ()) if np.shape(leaf) else jnp.asarray(leaf)


def check_args(args: object) -> None:
    """Raises TypeError unless `args`, further arguments of a function, is a tuple."""
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, such as (data,), got {type(args).__name__}")


def check_noise(noise: object) -> None:
    """Raises TypeError unless `noise` is an object with the methods sample and log_prob."""
    _check_methods(noise, "noise", ("sample", "log_prob"), "NoiseDistribution")


def _check_methods(
    value: object, name: str, needed: tuple[str, ...], protocol: str, otherwise: str = ""
) -> None:
    """Raises TypeError unless `value` is an object with the needed methods."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an instance, got the class {value.__name__}; pass {value.__name__}()"
        )
    missing = [method for method in needed if not callable(getattr(value, method, None))]
    if missing:
        raise TypeError(
            f"{name} must {otherwise}define {' and '.join(needed)} (see {protocol}); "
            f"{type(value).__name__} lacks {' and '.join(missing)}"
        )


def check_log_prob(value: object) -> None:
    """Raises TypeError unless `value`, what log_prob returned, is an array of floating dtype."""
    dtype = getattr(value, "dtype", type(value).__name__)
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"noise.log_prob(inputs) returned {dtype}, expected an array of a floating dtype: its "
            "derivative is needed"
        )


def check_sampler(sampler: object) -> None:
    """Raises TypeError unless `sampler` is None or a hashable object with a sampler's methods."""
    if sampler is None:
        return
    _check_methods(sampler, "sampler", ("group_size", "sample_group"), "Sampler", "be None or ")
    try:
        hash(sampler)
    except TypeError:
        raise TypeError(
            f"sampler must be hashable, for it is static under jit; make {type(sampler).__name__} "
            "a frozen dataclass of Python numbers"
        ) from None


def check_mesh(mesh: Any) -> Mesh | None:
    """None, or the mesh, with axes along which JAX itself may choose where arrays are."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be None or a jax.sharding.Mesh, got {type(mesh).__name__}; of all devices "
            'make one by jax.make_mesh((jax.device_count(),), ("samples",))'
        )
    if not mesh.size:
        raise ValueError("mesh must have at least one device, got an empty mesh")
    return Mesh(mesh.devices, mesh.axis_names)


def check_group_size(sampler: Any, num_samples: int, dim: int) -> None:
    """Raises unless the sampler's groups have a size: a Python (or numpy) int of at least 1."""
    size = sampler.group_size(num_samples, dim)
    name = f"sampler.group_size({num_samples}, {dim})"
    if isinstance(size, Array) and not isinstance(size, Tracer):
        raise TypeError(f"{name} must be a Python int, got a JAX array; convert it by int(...)")
    check_count(size, name)


def check_degree(degree: object) -> None:
    """Raises unless `degree` is None, 0, 1 or 2."""
    if degree is None:
        return
    _check_static(degree, "degree", "int")
    if isinstance(degree, bool) or not isinstance(degree, int | np.integer):
        raise TypeError(f"degree must be None, 0, 1 or 2, got {type(degree).__name__}")
    if not 0 <= degree <= 2:
        raise ValueError(f"degree must be None, 0, 1 or 2, got {degree}")


def check_key(key: Any, x: PyTree, call: str | None = None) -> Array:
    """One typed PRNG key, from a typed one or a raw one; `x` is looked at for swapped arguments.

    `call` is how the function is called, if not as g(key, x).
    """
    place, hint = "the first argument", "did you call g(x, key)? it is g(key, x)"
    if call is not None:
        place, hint = "key", f"did you swap arguments? it is {call}"
    hint = f"; {hint}" if is_key(x) else ""
    if isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise TypeError(
                f"key must be one PRNG key, got an array of keys of shape {key.shape}; "
                "vmap over the keys"
            )
        return key
    if isinstance(key, Array | np.ndarray) and key.dtype == np.uint32:
        if key.ndim == 1:
            try:
                return jax.random.wrap_key_data(on_device(key))
            except TypeError:
                pass
        if key.ndim == 2:
            raise TypeError(
                f"key must be one PRNG key, got raw keys of shape {key.shape}; vmap over the keys"
            )
    what = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else type(key).__name__
    raise TypeError(f"{place} must be a PRNG key such as jax.random.key(0), got {what}{hint}")


def is_key(value: Any) -> bool:
    """Whether it is a PRNG key, typed or raw, or an array of typed ones."""
    return isinstance(value, Array | np.ndarray) and (
        jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        or (value.dtype == np.uint32 and np.shape(value) == (2,))
    )


def array_hint(value: Any, x: PyTree) -> str:
    """What to do about a list where an array is meant, as the end of an error; else nothing."""
    if not isinstance(value, list | tuple) or not jax.tree_util.all_leaves([x]):
        return ""
    return ": for an array give an array, np.array([...])"


def is_traced(values: PyTree) -> bool:
    """Whether a leaf of the pytree is not known yet, so that it could not be checked."""
    return any(isinstance(v, Tracer) for v in jax.tree.leaves(values))
