"""The scale sigma: checked, spread over the leaves of x, and NaN where a traced one is none."""

import functools
import math
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .._checks import array_hint
from .._leaves import (
    conversion_of,
    dtype_of,
    is_floating,
    kind_of,
    leaf_name,
    noise_dtype,
    on_device,
)
from .._types import PyTree
from . import _matrices

# Whose frames a warning passes over.
_NOT_OF_USERS = ("jax", "perturbax")


def check_sigma(sigma: PyTree) -> PyTree:
    """The scale as a pytree of numpy arrays and tracers, each real and, if known, positive.

    What may be a matrix for a leaf, having its axes twice, may hold any finite number. A None
    inside may stand beside a None of x, which is seen when x is.
    """
    if sigma is None:
        raise TypeError("sigma must be a positive number, array or pytree of them, got None")
    return jax.tree_util.tree_map_with_path(_check_scale, sigma)


def _check_scale(path: Any, scale: Any) -> Any:
    if isinstance(scale, bool | np.bool_):
        raise TypeError("sigma must be a real number, got bool")
    if not isinstance(scale, int | float | complex | np.ndarray | np.generic | Array):
        conversion = conversion_of(scale, f"sigma{jax.tree_util.keystr(path)}")
        raise TypeError(
            f"sigma must be a positive number, array or pytree of them, got {type(scale).__name__}"
            + (f": {conversion}" if conversion else "")
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
        found = _first(known, ~np.isfinite(known), f"sigma{jax.tree_util.keystr(path)}")
        raise ValueError(f"sigma must be finite, got {found}")
    half = known.ndim // 2
    if not known.ndim or known.shape[:half] != known.shape[half:]:
        _check_positive(known, f"sigma{jax.tree_util.keystr(path)}")
    # Double precision until the dtype of x is known.
    return scale if isinstance(scale, Array) and jnp.issubdtype(dtype, jnp.floating) else known


def _check_positive(known: np.ndarray, name: str, shape: tuple[int, ...] = ()) -> None:
    """Raises unless all of a scale, of a leaf of that shape if that is known, is positive."""
    if (known > 0).all():
        return
    remedy = "For the unperturbed function call fun(x) directly."
    if shape and _looks_like_a_matrix(known):
        remedy = f"A matrix for a leaf of shape {shape} has shape {shape * 2}."
    raise ValueError(
        f"sigma must be > 0 (it is a scale), got {_first(known, known <= 0, name)}. {remedy}"
    )


def _looks_like_a_matrix(known: np.ndarray) -> bool:
    """Whether it is square, and positive on its diagonal."""
    square = known.ndim == 2 and known.shape[0] == known.shape[1] > 1
    return square and bool((np.diagonal(known) > 0).all())


def _first(values: np.ndarray, wrong: np.ndarray, name: str) -> str:
    """The first wrong entry, and where it is."""
    at = tuple(np.argwhere(wrong)[0].tolist())
    place = f"{name}{list(at) if at else ''}"
    return f"{values[at]}" + (f" at {place}" if place != "sigma" else "")


def scale_leaves(
    sigma: PyTree, x: PyTree, leaves: list[Array], names: list[str], root: str = "x"
) -> list[Array]:
    """One scale for each floating leaf of x, or a single scalar for all of them.

    Errors call x by `root`, and its leaves by their names.
    """
    alone = not isinstance(sigma, dict | list | tuple) and jax.tree_util.all_leaves([sigma])
    if alone:
        scales: list[Any] = [sigma]
        scales = scales * (len(leaves) if np.ndim(scales[0]) else 1)
    else:
        try:
            check = functools.partial(_check_none, root)
            jax.tree_util.tree_map_with_path(check, sigma, x, is_leaf=lambda v: v is None)
            spread = jax.tree.broadcast(sigma, x)
        except ValueError as error:
            raise ValueError(
                f"sigma has structure {jax.tree.structure(sigma)}, neither that of {root}, "
                f"{jax.tree.structure(x)}, nor a prefix of it{array_hint(sigma, x)}"
            ) from error
        scales = [
            s
            for s, v in zip(jax.tree.leaves(spread), jax.tree.leaves(x), strict=True)
            if is_floating(v)
        ]
    if len(scales) == len(leaves):
        for scale, leaf, name in zip(scales, leaves, names, strict=True):
            shape = np.shape(scale)
            # One array for several leaves holds scales of coordinates.
            if leaf.ndim and shape == leaf.shape * 2 and not (alone and len(leaves) > 1):
                _check_matrix(scale, leaf, name, noise_dtype(leaves), root)
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
                _check_positive(np.asarray(jax.device_get(scale)), "sigma", leaf.shape)
        scales = [_with_rank(s, leaf.ndim) for s, leaf in zip(scales, leaves, strict=True)]
    for i, scale in enumerate(scales):
        if not (leaves and _matrices.is_matrix(scale, leaves[i])):
            _check_range(scale, noise_dtype(leaves), root)
    _warn_if_lost(scales, leaves, names)
    return [on_device(s) for s in scales]


def _check_none(root: str, path: Any, scale: Any, part: Any) -> None:
    if scale is None and jax.tree.leaves(part):
        raise TypeError(
            f"sigma{jax.tree_util.keystr(path)} must be a positive number, array or pytree of "
            f"them, as {leaf_name(path, root)} is not None, got None"
        )


def _check_range(scale: Any, dtype: np.dtype, root: str) -> None:
    if _is_known(scale):
        scale = np.asarray(jax.device_get(scale), np.float64)
        range_ = np.finfo(dtype)
        wrong = (scale < range_.tiny) | (scale > range_.max)
        if wrong.any():
            first = scale[wrong].ravel()[0]
            raise ValueError(
                f"sigma must be within the range of {dtype} numbers, {range_.tiny:.2g} to "
                f"{range_.max:.2g}, got {first:.2g}; rescale {root}, or make it float64"
            )


def _check_matrix(scale: Any, leaf: Array, name: str, dtype: np.dtype, root: str) -> None:
    if not _is_known(scale) or not leaf.size:
        return
    size = math.prod(leaf.shape)
    matrix = np.asarray(jax.device_get(scale), np.float64).reshape(size, size)
    _check_range(np.maximum(abs(matrix), np.finfo(dtype).tiny), dtype, root)
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


def one_each(scales: list[Any], leaves: list[Array]) -> list[Any]:
    """One scale for each leaf, where there may be a single one for all."""
    return scales * (len(leaves) if len(scales) == 1 else 1)


def of_coordinates(scale: Any, leaf: Any) -> np.ndarray:
    """A known scale, of coordinates: of a matrix, the lengths of its rows."""
    scale = np.asarray(scale, np.float64)
    if not _matrices.is_matrix(scale, leaf):
        return scale
    return _matrices.row_lengths(scale.reshape(leaf.size, leaf.size)).reshape(leaf.shape)


def spacings(scale: Any, leaf: Any) -> float:
    """The least known scale of a coordinate, in spacings of the numbers near the leaf's."""
    with np.errstate(all="ignore"):
        spacing = np.spacing(np.abs(np.asarray(leaf))).astype(np.float64)
        ratios = np.where(np.isfinite(spacing), of_coordinates(scale, leaf) / spacing, np.inf)
    return float(np.min(ratios, initial=np.inf))


def _is_lost(scale: Any, leaf: Any) -> bool:
    """Whether x + sigma z rounds to x in a coordinate."""
    with np.errstate(all="ignore"):
        # The largest number has the widest spacing. Where sigma is above that, as it nearly always
        # is, no array as large as x is made.
        widest = np.spacing(np.maximum(leaf.max(initial=0), -leaf.min(initial=0)))
        if np.min(of_coordinates(scale, leaf), initial=np.inf) >= 0.5 * np.float64(widest):
            return False
    return spacings(scale, leaf) < 0.5


def _warn_if_lost(scales: list[Any], leaves: list[Array], names: list[str]) -> None:
    """Warns where x + sigma z rounds to x, so that fun would hardly see a perturbation at all."""
    for scale, leaf, name in zip(one_each(scales, leaves), leaves, names, strict=True):
        found = _value_of(scale), _value_of(leaf)
        if not all(map(_is_known, found)):
            continue
        known, numbers = jax.device_get(found)
        # A Python number under derivatives is still one, and of no dtype.
        if _is_lost(known, np.asarray(numbers, leaf.dtype)):
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
