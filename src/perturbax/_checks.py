"""Checks of what users pass: every error names the argument, what came, what was expected."""

import functools
import math
import operator
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .scale import _matrices

# Whose frames a warning passes over.
_NOT_OF_USERS = ("jax", "perturbax")


def check_fun(fun: Any, name: str = "fun") -> None:
    """Raises TypeError unless `fun` is callable."""
    if not callable(fun):
        raise TypeError(f"{name} must be callable, got {type(fun).__name__}")


def check_count(value: Any, name: str, most: int | None = None) -> int:
    """A static integer of at least 1, and at most `most`."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be static (a Python int), got a traced value; pass it outside jit, or "
            "mark it with static_argnums"
        )
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an int, got bool")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}")
    if most is not None and count > most:
        raise ValueError(
            f"{name} must be <= {most}, got {count}; average calls with different keys instead"
        )
    return count


def check_bool(value: Any, name: str) -> bool:
    """A Python (or numpy) bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r} ({type(value).__name__})")
    return bool(value)


def check_level(value: Any) -> float:
    """A static number between 0 and 1."""
    if isinstance(value, Tracer):
        raise TypeError(
            "level must be static (a Python number), got a traced value; pass it outside jit, or "
            "mark it with static_argnums"
        )
    number = isinstance(value, int | float | np.number | np.ndarray | Array)
    if isinstance(value, bool) or not number or np.shape(value):
        what = f"an array of shape {np.shape(value)}" if np.shape(value) else type(value).__name__
        raise TypeError(f"level must be a number between 0 and 1, such as 0.95, got {what}")
    if not 0 < value < 1:
        raise ValueError(
            f"level must be between 0 and 1, got {value}; 0.95 stands for intervals of 95 %"
        )
    return float(value)


def check_noise(noise: Any) -> None:
    """Raises TypeError unless `noise` is an object with the methods sample and log_prob."""
    if isinstance(noise, type):
        raise TypeError(
            f"noise must be an instance, got the class {noise.__name__}; pass {noise.__name__}()"
        )
    missing = [m for m in ("sample", "log_prob") if not callable(getattr(noise, m, None))]
    if missing:
        raise TypeError(
            f"noise must define sample and log_prob (see NoiseDistribution); "
            f"{type(noise).__name__} lacks {' and '.join(missing)}"
        )


def check_log_prob(value: Any) -> None:
    """Raises TypeError unless `value`, what log_prob returned, is an array of floating dtype."""
    dtype = getattr(value, "dtype", type(value).__name__)
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"noise.log_prob(inputs) returned {dtype}, expected an array of a floating dtype: its "
            "derivative is needed"
        )


def check_sampler(sampler: Any) -> None:
    """Raises TypeError unless `sampler` is None or a hashable object with a sampler's methods."""
    if isinstance(sampler, type):
        raise TypeError(
            f"sampler must be an instance, got the class {sampler.__name__}; pass "
            f"{sampler.__name__}()"
        )
    needed = ("group_size", "sample_group")
    missing = [m for m in needed if not callable(getattr(sampler, m, None))]
    if sampler is not None and missing:
        raise TypeError(
            f"sampler must be None or define group_size and sample_group (see Sampler); "
            f"{type(sampler).__name__} lacks {' and '.join(missing)}"
        )
    if getattr(type(sampler), "__hash__", None) is None:
        raise TypeError(
            f"sampler must be hashable, for it is static under jit; make {type(sampler).__name__} "
            "a frozen dataclass"
        )


def check_group_size(sampler: Any, num_samples: int, dim: int) -> None:
    """Raises unless the sampler's groups have a size: a Python (or numpy) int of at least 1."""
    size = sampler.group_size(num_samples, dim)
    name = f"sampler.group_size({num_samples}, {dim})"
    if isinstance(size, Array) and not isinstance(size, Tracer):
        raise TypeError(f"{name} must be a Python int, got a JAX array; convert it by int(...)")
    check_count(size, name)


def check_degree(degree: Any) -> None:
    """Raises unless `degree` is None, 0, 1 or 2."""
    if degree is None:
        return
    if isinstance(degree, bool) or not isinstance(degree, int | np.integer):
        raise TypeError(f"degree must be None, 0, 1 or 2, got {type(degree).__name__}")
    if not 0 <= degree <= 2:
        raise ValueError(f"degree must be None, 0, 1 or 2, got {degree}")


def check_sigma(sigma: Any) -> Any:
    """The scale as a pytree of numpy arrays and tracers, each real and, if known, positive.

    What may be a matrix for a leaf, having its axes twice, may hold any finite number. A None
    inside may stand beside a None of x, which is seen when x is.
    """
    if sigma is None:
        raise TypeError("sigma must be a positive number, array or pytree of them, got None")
    return jax.tree.map(_check_scale, sigma)


def _check_scale(scale: Any) -> Any:
    if isinstance(scale, bool | np.bool_):
        raise TypeError("sigma must be a real number, got bool")
    if not isinstance(scale, int | float | complex | np.ndarray | np.generic | Array):
        raise TypeError(
            f"sigma must be a positive number, array or pytree of them, got {type(scale).__name__}"
        )
    dtype = dtype_of(scale)
    if dtype is None:
        raise TypeError(
            f"sigma must be a real number, got {kind_of(scale)}, a dtype that JAX does not "
            "support: convert it to float32, for example"
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"sigma must be real, got {dtype}")
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"sigma must be a real number, got an array of {dtype}")
    if isinstance(scale, Tracer):
        return scale
    values = np.asarray(jax.device_get(scale))
    known = values.astype(np.float64)
    if not np.isfinite(known).all():
        raise ValueError(f"sigma must be finite, got {_first(known, ~np.isfinite(known))}")
    half = known.ndim // 2
    if not known.ndim or known.shape[:half] != known.shape[half:]:
        _check_positive(known)
    # Double precision until the dtype of x is known.
    return scale if isinstance(scale, Array) and jnp.issubdtype(dtype, jnp.floating) else known


def _check_positive(known: np.ndarray) -> None:
    if not (known > 0).all():
        raise ValueError(
            f"sigma must be > 0 (it is a scale), got {_first(known, known <= 0)}. "
            "For the unperturbed function call fun(x) directly."
        )


def _first(values: np.ndarray, wrong: np.ndarray) -> float:
    return float(values[wrong].ravel()[0])


def dtype_of(value: Any) -> Any:
    """As JAX has it; None for those that it does not support, such as that of strings."""
    try:
        return jnp.result_type(value)
    except TypeError:
        return None


def kind_of(value: Any) -> str:
    """What an error calls it."""
    dtype = getattr(value, "dtype", None)
    return f"a {type(value).__name__}" if dtype is None else f"an array of {dtype}"


def check_key(key: Any, x: Any) -> Array:
    """One typed PRNG key, from a typed one or a raw one; `x` is looked at for swapped arguments."""
    hint = "; did you call g(x, key)? it is g(key, x)" if _is_key(x) else ""
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
    raise TypeError(
        f"the first argument must be a PRNG key such as jax.random.key(0), got {what}{hint}"
    )


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and (
        jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        or (value.dtype == np.uint32 and np.shape(value) == (2,))
    )


def on_device(value: Any) -> Any:
    # Explicit, so that jax.transfer_guard('disallow') has nothing to object to. JAX may use memory
    # of numpy in place, which its owner may change before the program, or its derivative, runs.
    return value if isinstance(value, Array) else jax.device_put(np.array(value))


def leaf_name(path: Any) -> str:
    """How an error names a leaf of x."""
    return f"x{jax.tree_util.keystr(path)}"


def perturbed_leaves(x: Any) -> tuple[list[Array], list[str], Callable[[Any], Any]]:
    """The floating leaves of x, their names, and how to put others in their place."""
    paths, tree = jax.tree_util.tree_flatten_with_path(x)
    fixed: list[Any] = []
    leaves: list[Any] = []
    names: list[str] = []
    for path, leaf in paths:
        if isinstance(leaf, float):
            leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(float))
        if not isinstance(leaf, int | np.ndarray | np.generic | Array | complex):
            raise TypeError(
                f"x must be a pytree of arrays, but leaf {leaf_name(path)!r} is a "
                f"{type(leaf).__name__}: pass it to fun as a further argument, g(key, x, ...)"
            )
        dtype = dtype_of(leaf)
        if dtype is None:
            raise TypeError(
                f"x must be a pytree of arrays, but leaf {leaf_name(path)!r} is {kind_of(leaf)}, "
                "a dtype that JAX does not support: convert it to float32, for example, or pass it "
                "to fun as a further argument, g(key, x, ...)"
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"complex leaves are not supported (leaf {leaf_name(path)!r} is {dtype}); "
                "split it into its real and imaginary parts"
            )
        if jnp.issubdtype(dtype, jnp.floating):
            if isinstance(leaf, np.ndarray | np.generic):
                leaf = on_device(np.asarray(leaf, dtype))
            leaves.append(leaf)
            names.append(leaf_name(path))
            fixed.append(None)
        else:
            fixed.append(leaf)
    if paths and not leaves:
        raise TypeError(
            "x has no floating leaf to perturb: its leaves are "
            f"{', '.join(sorted({str(jnp.result_type(v)) for v in fixed}))}"
        )

    def merge(perturbed: Any) -> Any:
        perturbed = iter(perturbed)
        return tree.unflatten([next(perturbed) if v is None else v for v in fixed])

    return leaves, names, merge


def scale_leaves(sigma: Any, x: Any, leaves: list[Array], names: list[str]) -> list[Array]:
    """One scale for each floating leaf of x, or a single scalar for all of them."""
    alone = not isinstance(sigma, dict | list | tuple) and jax.tree_util.all_leaves([sigma])
    if alone:
        scales: list[Any] = [sigma]
        scales = scales * (len(leaves) if np.ndim(scales[0]) else 1)
    else:
        try:
            jax.tree_util.tree_map_with_path(_check_none, sigma, x, is_leaf=lambda v: v is None)
            spread = jax.tree.broadcast(sigma, x)
        except ValueError as error:
            raise ValueError(
                f"sigma has structure {jax.tree.structure(sigma)}, which is neither that of x, "
                f"{jax.tree.structure(x)}, nor a prefix of it"
            ) from error
        scales = [
            s
            for s, v in zip(jax.tree.leaves(spread), jax.tree.leaves(x), strict=True)
            if jnp.issubdtype(jnp.result_type(v), jnp.floating)
        ]
    if len(scales) == len(leaves):
        for scale, leaf, name in zip(scales, leaves, names, strict=True):
            shape = np.shape(scale)
            # One array for several leaves holds scales of coordinates.
            if leaf.ndim and shape == leaf.shape * 2 and not (alone and len(leaves) > 1):
                _check_matrix(scale, leaf, name, noise_dtype(leaves))
                continue
            tail = leaf.shape[len(leaf.shape) - len(shape) :]
            fits = all(a in (1, b) for a, b in zip(shape, tail, strict=False))
            if len(shape) > len(leaf.shape) or not fits:
                raise ValueError(
                    f"sigma of shape {shape} does not broadcast into leaf {name!r} of shape "
                    f"{leaf.shape}, and is no matrix for it, of shape {leaf.shape * 2}, given for "
                    "this leaf alone; it must not enlarge the leaf"
                )
            if _is_known(scale):
                _check_positive(np.asarray(jax.device_get(scale)))
        scales = [_with_rank(s, leaf.ndim) for s, leaf in zip(scales, leaves, strict=True)]
    for i, scale in enumerate(scales):
        if not (leaves and _matrices.is_matrix(scale, leaves[i])):
            _check_range(scale, noise_dtype(leaves))
    _warn_if_lost(scales, leaves, names)
    return [on_device(s) for s in scales]


def _check_none(path: Any, scale: Any, part: Any) -> None:
    if scale is None and jax.tree.leaves(part):
        raise TypeError(
            f"sigma{jax.tree_util.keystr(path)} must be a positive number, array or pytree of "
            f"them, as {leaf_name(path)} is not None, got None"
        )


def noise_dtype(leaves: list[Array]) -> np.dtype:
    """Dtype of noise, scores and weights for these leaves: at least single precision."""
    return np.dtype(np.float64 if any(v.dtype == np.float64 for v in leaves) else np.float32)


def _check_range(scale: Any, dtype: np.dtype) -> None:
    if isinstance(scale, np.ndarray):
        range_ = np.finfo(dtype)
        wrong = (scale < range_.tiny) | (scale > range_.max)
        if wrong.any():
            raise ValueError(
                f"sigma must be within the range of {dtype} numbers, {range_.tiny:.2g} to "
                f"{range_.max:.2g}, got {_first(scale, wrong):.2g}; rescale x, or make it float64"
            )


def _check_matrix(scale: Any, leaf: Array, name: str, dtype: np.dtype) -> None:
    if not _is_known(scale) or not leaf.size:
        return
    size = math.prod(leaf.shape)
    matrix = np.asarray(jax.device_get(scale), np.float64).reshape(size, size)
    _check_range(np.maximum(abs(matrix), np.finfo(dtype).tiny), dtype)
    lengths = _matrices.row_lengths(matrix)
    if (lengths < np.finfo(dtype).tiny).any():
        what = f"row {int(np.argmin(lengths))} is zero"
    elif not _is_regular(matrix, lengths, dtype):
        what = f"it is singular to the precision of {dtype}"
    else:
        return
    raise ValueError(
        f"sigma, a matrix of shape {np.shape(scale)} for leaf {name!r} of shape {leaf.shape}, must "
        f"be invertible, but {what}. Pass the Cholesky factor of a covariance to whose diagonal a "
        "small number was added"
    )


def _is_regular(matrix: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> bool:
    try:
        inverse = np.linalg.inv(matrix / lengths[:, None])
    except np.linalg.LinAlgError:
        return False
    return bool(_matrices.is_accurate(inverse, dtype))


def _with_rank(scale: Any, rank: int) -> Any:
    """With as many axes as its leaf, unless it has none, for `jax_numpy_rank_promotion='raise'`."""
    shape = np.shape(scale)
    return scale.reshape((1,) * (rank - len(shape)) + shape) if shape else scale


def is_traced(values: Any) -> bool:
    """Whether a leaf of the pytree is not known yet, so that it could not be checked."""
    return any(isinstance(v, Tracer) for v in jax.tree.leaves(values))


def nan_unless_valid(
    value: list[Array], scales: list[Array], leaves: list[Array] | None = None
) -> list[Array]:
    """The value; NaN if a scale that was traced, so could not be checked, is not a scale.

    That is, positive and finite; or invertible, where it is a matrix for its leaf.
    """
    traced = [i for i, s in enumerate(scales) if isinstance(s, Tracer)]
    if not traced:
        return value
    dims = tuple(
        leaves[i].size if leaves and _matrices.is_matrix(scales[i], leaves[i]) else None
        for i in traced
    )
    return _poisoned(dims, value, [scales[i] for i in traced])


@functools.partial(jax.jit, static_argnums=0)
def _poisoned(dims: tuple[int | None, ...], value: list[Array], scales: list[Array]) -> list[Array]:
    valid = [
        jnp.all((s > 0) & jnp.isfinite(s)) if n is None else _matrices.is_regular(s.reshape(n, n))
        for n, s in zip(dims, scales, strict=True)
    ]
    valid = jnp.stack(valid).all()
    # A factor, so that derivatives become NaN as well.
    return [_scaled(v, jnp.where(valid, 1.0, jnp.nan)) for v in value]


def _scaled(value: Array, factor: Array) -> Array:
    factor = factor.astype(jnp.finfo(value.dtype).dtype)
    if jnp.iscomplexobj(value):  # part by part, for inf times 0 is NaN
        return jax.lax.complex(value.real * factor, value.imag * factor)
    return value * factor


def _warn_if_lost(scales: list[Any], leaves: list[Array], names: list[str]) -> None:
    """Warns where x + sigma z rounds to x, so that fun would hardly see a perturbation at all."""
    for i, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
        found = _value_of(leaf), _value_of(scales[i] if len(scales) > 1 else scales[0])
        if not leaf.size or not all(map(_is_known, found)):
            continue
        values, scale = map(np.asarray, jax.device_get(found))
        if _matrices.is_matrix(scale, leaf):
            scale = _matrices.row_lengths(scale.reshape(leaf.size, leaf.size)).reshape(leaf.shape)
        with np.errstate(all="ignore"):
            spacing = np.spacing(np.abs(values.astype(leaf.dtype))).astype(np.float64)
        if (scale < np.where(np.isfinite(spacing), spacing, 0) / 2).any():
            warnings.warn(
                f"sigma is below the spacing of {leaf.dtype} numbers at leaf {name!r}: fun sees "
                "the same input at most samples, and the gradient is noise. Use a larger sigma, "
                "rescale x, or use a wider dtype.",
                stacklevel=_stacklevel_of_user(),
            )


def _value_of(value: Any) -> Any:
    """The value itself where it is known although JAX is differentiating, as in an eager grad."""
    return jax.lax.stop_gradient(value) if isinstance(value, Tracer) else value


def _stacklevel_of_user() -> int:
    """The stacklevel at which its caller's warning points at the line of the user."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_OF_USERS:
        level, frame = level + 1, frame.f_back
    return level


def _is_known(value: Any) -> bool:
    return not isinstance(value, Tracer) and getattr(value, "is_fully_addressable", True)


def num_elements(leaves: list[Array]) -> int:
    """Number of coordinates of the leaves together."""
    return sum(math.prod(leaf.shape) for leaf in leaves)
