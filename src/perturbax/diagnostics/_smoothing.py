"""plot_smoothing: a function and its smoothed version along a line."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks, _leaves
from .._perturb import PerturbedFun, check_perturbed_fun
from ..scale import _scales
from ..tracing._compiled import compiled_map
from ..tracing._host_exceptions import own_exceptions
from . import _plots
from ._standard_errors import estimate

# How far the line goes to each side where that is not given: in sigma, of the coordinate that moves
# most.
_REACH = 4.0
# Points at which the function itself is evaluated, for each at which it is smoothed.
_FINER = 8


def plot_smoothing(
    g: PerturbedFun,
    key: Array,
    x: Any,
    direction: Any,
    /,
    *args: Any,
    reach: float | None = None,
    num_points: int = 61,
    ax: Any = None,
    **kwargs: Any,
) -> Any:
    r"""Draws a function and its smoothed version along a line, with the estimated tangent.

    .. math:: t \mapsto f(x + t d), \quad t \mapsto F(x + t d), \quad
        t \mapsto F(x) + t \langle \nabla F(x), d \rangle

    Bands are two standard errors to each side. All points share one key: errors of neighbours are
    nearly the same, so the curve is smoother than its band is narrow.

    Args:
      g: what `make_perturbed_fun` returned, of a function to one number.
      key: one PRNG key; it is consumed.
      x: where the line has t = 0.
      direction: d, with the structure and shapes of x; leaves that are not perturbed are not moved.
      *args: further arguments of the function.
      reach: the largest \|t\|; None for what moves a coordinate by four times its sigma.
      num_points: how many points of the smoothed function, one more if that is even, so that x is
        one of them; each takes `num_samples` evaluations. There are eight times as many of the
        function itself.
      ax: axes of matplotlib to draw into; None makes some.
      **kwargs: further keyword arguments of the function.

    Returns:
      The axes.

    Raises:
      TypeError: if g is not what make_perturbed_fun returned, if its value is not one array of real
        numbers, or anything is traced.
      ValueError: if that is not one number, direction is not like x, zero or not finite, or
        reach is not positive and finite.
      ImportError: without matplotlib.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> steps = lambda x: jnp.sum(jnp.floor(x))
      >>> g = px.make_perturbed_fun(steps, 100, sigma=0.3, noise=px.Normal())
      >>> x, direction = jnp.array([0.2, -0.4]), jnp.array([1.0, 0.0])
      >>> ax = px.plot_smoothing(g, jax.random.key(0), x, direction, num_points=5)
    """
    check_perturbed_fun(g, "g")
    num_points = _checks.check_count(num_points, "num_points")
    if _checks.is_traced((key, x, direction, args, kwargs, g.settings.sigma)):
        raise TypeError("plot_smoothing needs known numbers, got traced ones; call it outside jit")
    key = _checks.check_key(key, x, "plot_smoothing(g, key, x, direction)")
    leaves, names, merge = _leaves.perturbed_leaves(x)
    if jax.tree.structure(direction) != jax.tree.structure(x):
        raise ValueError(
            f"direction must have the structure of x, {jax.tree.structure(x)}, got "
            f"{jax.tree.structure(direction)}"
        )
    moved = [
        jnp.asarray(d, _leaves.noise_dtype(leaves))
        for d, v in zip(jax.tree.leaves(direction), jax.tree.leaves(x), strict=True)
        if _leaves.is_floating(v)
    ]
    for d, leaf, name in zip(moved, leaves, names, strict=True):
        if d.shape != leaf.shape:
            raise ValueError(
                f"direction must have the shapes of x, but that of {name!r} is {leaf.shape}, and "
                f"that of its direction {d.shape}"
            )
    if not all(bool(jnp.all(jnp.isfinite(d))) for d in moved):
        raise ValueError("direction must be finite")
    if not any(bool(jnp.any(d != 0)) for d in moved):
        raise ValueError("direction must not be zero")
    reach = _reach(g, x, leaves, names, moved) if reach is None else _check_reach(reach)
    ax = _plots.axes(ax)

    def at(t: Array) -> Any:
        return merge(
            [
                (v.astype(d.dtype) + t * d).astype(v.dtype)
                for v, d in zip(leaves, moved, strict=True)
            ]
        )

    def hard(t: Array) -> Array:
        value = g.fun(at(t), *args, **kwargs)
        return _one_number(value[0] if g.settings.has_aux else value)

    def smooth(t: Array, sigma: Any) -> tuple[Array, Array, Array, Array]:
        smoothed = PerturbedFun(g.fun, dataclasses.replace(g.settings, sigma=sigma))
        # The same noise for all points, on purpose.
        found = estimate(smoothed, jax.random.clone(key), at(t), *args, **kwargs)
        value, error = _one_number(found.value), _one_number(found.value_error)
        if found.gradient is None:
            return value, error, jnp.full((), jnp.nan), jnp.full((), jnp.nan)
        parts = jax.tree.leaves(found.gradient), jax.tree.leaves(found.gradient_error)
        slope = sum(jnp.sum(p * d) for p, d in zip(parts[0], moved, strict=True))
        square = sum(jnp.sum((p * d) ** 2) for p, d in zip(parts[1], moved, strict=True))
        return value, error, jnp.asarray(slope), jnp.sqrt(jnp.asarray(square))

    # The one in the middle, at 0, is that of the tangent.
    t = np.linspace(-reach, reach, num_points | 1)
    fine = np.linspace(-reach, reach, _FINER * num_points | 1)
    dtype = _leaves.noise_dtype(leaves)

    # Outside of jit, where a host function finds out what it returns.
    g.prepare(jax.random.clone(key), x, args, kwargs)

    def along(one: Callable[..., Any], t: np.ndarray, *more: Any) -> Any:
        args = t.astype(dtype), *more
        return own_exceptions(compiled_map(one, *args))(*args)

    curve = [np.asarray(v) for v in along(smooth, t, g.settings.sigma)]
    values = np.asarray(along(hard, fine))
    middle = len(t) // 2
    tangent = float(curve[0][middle]), float(curve[2][middle]), float(curve[3][middle])
    _plots.plot_line(ax, t, (fine, values), (curve[0], curve[1]), tangent)
    ax.set(xlabel="t, along the direction", ylabel=getattr(g.fun, "__name__", "value"))
    return ax


def _one_number(value: Any) -> Array:
    remedy = "choose one of several, or draw the loss that they are used in"
    return _checks.one_number(value, "the function", remedy, any_rank=True)


def _check_reach(reach: Any) -> float:
    number = _checks.check_number(reach, "reach", "a number or None")
    if not 0 < number < math.inf:
        raise ValueError(f"reach must be positive and finite, got {reach}")
    return number


def _reach(g: PerturbedFun, x: Any, leaves: Any, names: Any, moved: list[Array]) -> float:
    """The t that moves the coordinate that moves most, in sigma, by four of them."""
    scales = _scales.scale_leaves(g.settings.sigma, x, leaves, names)
    largest = 0.0
    for d, leaf, scale in zip(moved, leaves, _scales.one_each(scales, leaves), strict=True):
        sigma = _scales.of_coordinates(scale, leaf)
        largest = max(largest, float(np.max(np.abs(d) / sigma, initial=0.0)))
    return _REACH / largest if largest else math.inf
