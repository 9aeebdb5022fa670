r"""carry: an estimate made more precise by what earlier steps of an optimisation saw.

The estimate of `make_perturbed_fun` is unbiased for fun less any function q, as long as q does not
depend on the noise of this call; and the mean of q under the noise is known. So

    V = V_g[f - q] + E q(x + sigma eps)

has the expectation of V_g[f], for every q that was made of earlier steps, and less variance as far
as q predicts f. Samples of the past enter through q alone, never through weights.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import _checks, _leaves
from .._perturb import PerturbedFun, check_perturbed_fun
from ..scale import _scales
from ..tracing._derivative_rules import departure
from ..tracing._mesh_axes import in_types_of_constants, with_explicit_axes
from . import _regression
from ._features import Law, law_of
from ._regression import Fit

# How long a step counts for what a prediction is worth: this share is kept from step to step.
_KEPT = 0.8
# Farthest jump, and largest growth of sigma, after which a prediction is used, in units of sigma.
_NEAR = 10.0
# How many evaluations are remembered, where memory is not given: at least and at most, and so many
# as have together so many coordinates, or were made in so many steps.
_FEWEST, _MOST, _NUMBERS, _STEPS = 64, 256, 2**16, 2


class CarriedState(NamedTuple):
    """What is known of a function from earlier steps: a pytree of arrays of fixed shapes.

    Attributes:
      origin: x at the beginning, (D,); all points are told from here, for the sake of digits.
      points: where the function was evaluated last, newest first, (M, D).
      values: what it was there, (M,).
      counted: 1 for a value that counts, 0 for one that is not finite, or nearly, and for places
        not yet taken, (M,).
      fit: the predictions made of them, one for each of R noise levels.
      error: running mean square of what each prediction left of the next step's values, in units
        of the step's variances of values and (the least) of predictions, (R,).
      covariance: running covariance of prediction and values, in these units, (R,).
      variance: running variance of the prediction, in these units, (R,).
    """

    origin: Array
    points: Array
    values: Array
    counted: Array
    fit: Fit
    error: Array
    covariance: Array
    variance: Array

    def __repr__(self) -> str:
        """Shapes alone, for there are thousands of numbers."""
        found = jax.tree_util.tree_leaves_with_path(self)
        told = [f"{jax.tree_util.keystr(at)[1:]}={getattr(v, 'shape', v)}" for at, v in found]
        return f"CarriedState({', '.join(told)})"


@dataclasses.dataclass(frozen=True)
class Carried:
    """A perturbed function that learns from step to step; made by `perturbax.carry`."""

    perturbed_fun: PerturbedFun
    memory: int | None

    def __call__(self, /, *args: Any, **kwargs: Any) -> NoReturn:
        """Tells what is to be called instead.

        Raises:
          TypeError: always.
        """
        raise TypeError(
            "what carry returned cannot be called or differentiated: use "
            "carried.value_and_grad(state, key, x), it takes the place of jax.value_and_grad(g), "
            "with carried.init(x) as the first state"
        )

    def init(self, x: Any) -> CarriedState:
        """The state of somebody who has seen nothing yet, for points like x."""
        leaves, names, _ = _leaves.perturbed_leaves(x)
        dtype = _leaves.noise_dtype(leaves)
        # Arrays of their own each, and not x itself, for a step may be given them to write on.
        origin = jnp.copy(lax.stop_gradient(_flat(leaves, dtype)))
        dim = origin.shape[0]
        settings = self.perturbed_fun.settings
        size = self.memory or max(
            min(_MOST, max(_FEWEST, _NUMBERS // max(dim, 1))),
            min(_MOST, _STEPS * settings.num_samples),
        )
        scales = _scales.scale_leaves(settings.sigma, x, leaves, names)
        sigma = lax.stop_gradient(_spread(scales, leaves, names, dtype))
        levels = (len(_regression.NOISE_LEVELS),)
        return CarriedState(
            origin,
            jnp.zeros((size, dim), dtype),
            jnp.zeros((size,), dtype),
            jnp.zeros((size,), dtype),
            _regression.nothing(size, sigma, law_of(settings.noise)),
            jnp.zeros(levels, dtype),
            jnp.zeros(levels, dtype),
            jnp.zeros(levels, dtype),
        )

    def value_and_grad(
        self, state: CarriedState, key: Array, x: Any, /, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, Any], CarriedState]:
        """Value and gradient of the perturbed function at x, and what is known after this step.

        Args:
          state: of the step before, or `init(x)`.
          key: one PRNG key; it is consumed.
          x: where to estimate.
          *args: further arguments of the function.
          **kwargs: further keyword arguments of the function.

        Returns:
          `((value, gradient), state)`, where value is a pair of value and aux if the perturbed
          function has aux. The gradient has the structure of x, as that of `jax.value_and_grad`.

        Raises:
          TypeError: if state is none, or the value is not one array of real numbers.
          ValueError: if that is not a scalar; if state is one for points of another dtype or with
            another number of coordinates, or for noise whose predictions have other terms.
        """
        fun, settings = self.perturbed_fun.fun, self.perturbed_fun.settings
        if not isinstance(state, CarriedState):
            raise TypeError(
                "state must be what init(x), or the step before, returned, got "
                f"{type(state).__name__}; it is value_and_grad(state, key, x)"
            )
        key = _checks.check_key(key, x, "value_and_grad(state, key, x)")
        leaves, names, merge = _leaves.perturbed_leaves(x)
        if state.origin.shape != (_leaves.num_elements(leaves),):
            raise ValueError(
                f"state is one for {state.origin.size} coordinates, but x has "
                f"{_leaves.num_elements(leaves)}; call init(x) for points like x"
            )
        scales = _scales.scale_leaves(settings.sigma, x, leaves, names)
        dtype = _leaves.noise_dtype(leaves)
        sigma, law = _spread(scales, leaves, names, dtype), law_of(settings.noise)
        if state.origin.dtype != dtype:
            raise ValueError(
                f"state is one for points of {state.origin.dtype}, but noise for x is {dtype}; "
                "call init(x) for points like x"
            )
        if state.fit.weights.shape[1] != _regression.num_features(state.origin.size, law):
            raise ValueError(
                f"state is one for other noise than {settings.noise!r}: call init(x) with this "
                "noise"
            )
        state = lax.stop_gradient(in_types_of_constants(state))
        held, scale = lax.stop_gradient((leaves, sigma))
        place = _offset(held, state.origin)
        centre = place + scale * law.mean
        chosen = _chosen(state, centre, scale)
        # A coordinate at an infinity stays there, whatever is added to it.
        moving = jnp.isfinite(_flat(held, dtype))

        def residual(away: Any, *args: Any, **kwargs: Any) -> Any:
            steps, _, put_back = _leaves.perturbed_leaves(away)
            y = [(v.astype(dtype) + s).astype(v.dtype) for v, s in zip(held, steps, strict=True)]
            out = fun(put_back(y), *args, **kwargs)
            value, aux = out if settings.has_aux else (out, None)
            # Where y is before it is rounded: of that q has a known mean.
            point = place + jnp.where(moving, _flat(steps, dtype), 0)
            q = _regression.predict(chosen, point[None], law)[0, 0]
            remedy = "carry the perturbed function of a loss instead"
            number = _checks.one_number(value, "fun", remedy)
            with jax.numpy_dtype_promotion("standard"):
                number = number.astype(jnp.promote_types(number.dtype, dtype))
            return number - with_explicit_axes(q.astype(number.dtype), number), (value, point, aux)

        smoothed = PerturbedFun(residual, dataclasses.replace(settings, has_aux=True))

        def estimate(values: list[Array]) -> tuple[Array, Any]:
            away = [departure(v.astype(dtype)) for v in values]
            rest, seen = smoothed(key, merge(away), *args, **kwargs)
            spread = jnp.where(moving, sigma, 0)
            q = _regression.expect(chosen, _offset(values, state.origin), spread, law)[0]
            return rest + with_explicit_axes(q.astype(rest.dtype), rest), seen

        (value, seen), parts = jax.value_and_grad(estimate, has_aux=True)(leaves)
        values, points, aux = seen
        values = in_types_of_constants(jnp.asarray(values).astype(dtype))
        after = _learn(state, points, values, centre, scale, law)
        rest = iter(parts)
        gradient = jax.tree.map(
            lambda v: (
                next(rest) if _leaves.is_floating(v) else jnp.zeros(jnp.shape(v), jax.dtypes.float0)
            ),
            x,
        )
        return ((value, aux) if settings.has_aux else value, gradient), after


def carry(perturbed_fun: PerturbedFun, *, memory: int | None = None) -> Carried:
    r"""Makes a perturbed function more precise by what earlier steps of an optimisation saw.

    At each step, a regression on the evaluations of earlier steps predicts the function's values;
    the prediction q is subtracted from them, and its known mean is added back:
    :math:`V = V_g[f - q] + E\,q(x + \sigma \epsilon)`. Since q was made before this step's noise
    was drawn, value and gradient are unbiased whatever q is; where q predicts f, they have less
    variance. q is drawn towards a constant as far as it failed to predict the last steps, so where
    nothing can be learnt next to nothing is lost. No further evaluations are made.

    It pays in optimisations with fewer samples a step than a fit needs, most for functions that are
    nearly sums of functions of single coordinates at the scale of sigma, and for points that move
    by no more than a few sigma while `memory` evaluations are made. x may move anywhere and sigma
    may change. Where further arguments change from step to step, such as batches of data, q
    predicts what the batches have in common.

    Args:
      perturbed_fun: what `make_perturbed_fun` returned, of a function whose value is a real scalar.
        Its noise must have a finite mean and variance (Normal noise is predicted best, then Gumbel
        and Logistic noise), its scale must not be a matrix.
      memory: how many evaluations are remembered one by one; of earlier ones, what they said of
        single coordinates. None for 256, fewer from 256 coordinates on: at least 64, and those of
        two steps, up to 256. An update takes time in proportion to its square.

    Returns:
      An object with two methods, in the convention of optax:

      - `init(x)` returns the state at the start, a pytree of arrays of fixed shapes: it may be
        scanned over, vmapped and saved;
      - `value_and_grad(state, key, x, *args, **kwargs)` returns `((value, gradient), state)`.

    Raises:
      TypeError: if perturbed_fun is not what make_perturbed_fun returned; by `value_and_grad`, if
        its value is not one array of real numbers.
      ValueError: if its noise lacks a mean or variance, or memory is below 1; by `init` and
        `value_and_grad`, if its scale is a matrix; by `value_and_grad`, if its value is not a
        scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> stairs = lambda x: jnp.sum(jnp.floor(4 * x) ** 2)
      >>> carried = px.carry(px.make_perturbed_fun(stairs, 16, sigma=0.3, noise=px.Normal()))
      >>> x = jnp.full(10, 2.0)
      >>> state = carried.init(x)
      >>> step = jax.jit(carried.value_and_grad)
      >>> for key in jax.random.split(jax.random.key(0), 100):
      ...     (value, gradient), state = step(state, key, x)
      ...     x = x - 0.003 * gradient
      >>> bool(stairs(jnp.full(10, 2.0)) == 640), bool(stairs(x) <= 10)
      (True, True)

    References:
      - Owen, Monte Carlo Theory, Methods and Examples, 2013, section 8.9 (control variates)
      - Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2
      - Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007
    """
    hint = "carry first, then apply jit, vmap and scan to value_and_grad"
    check_perturbed_fun(perturbed_fun, "perturbed_fun", hint)
    if memory is not None:
        memory = _checks.check_count(memory, "memory")
    law_of(perturbed_fun.settings.noise)
    return Carried(perturbed_fun, memory)


# Jitted, as what else takes many operations, for a step that is not.
@jax.jit
def _chosen(state: CarriedState, centre: Array, sigma: Array) -> Fit:
    """The prediction to be used, as far as it is to be; nothing far from what it was made of."""
    near = _near(state.fit, centre, sigma)
    best, share = _best(state)
    return state.fit._replace(
        centre=jnp.where(near, state.fit.centre, centre),
        coefficients=jnp.where(near, share * state.fit.coefficients[best], 0)[None],
        weights=jnp.where(near, share * state.fit.weights[best], 0)[None],
    )


def _best(state: CarriedState) -> tuple[Array, Array]:
    """Which prediction left least of the last steps' values, and what share of it is to be used."""
    best = jnp.argmin(state.error)
    return best, _shares(state)[best]


def _shares(state: CarriedState) -> Array:
    """The factor by which each prediction would have served best, between 0 and 1."""
    known = state.variance > 0
    ratio = state.covariance / jnp.where(known, state.variance, 1)
    return jnp.where(known, jnp.clip(ratio, 0, 1), 0)


def _near(fit: Fit, centre: Array, sigma: Array) -> Array:
    """Whether the next samples lie where the fit may tell anything of them."""
    away = jnp.abs(centre - fit.centre) <= _NEAR * fit.scale
    return jnp.all(away & (sigma <= _NEAR * fit.scale))


@partial(jax.jit, static_argnums=5)
def _learn(
    state: CarriedState, points: Array, values: Array, centre: Array, scale: Array, law: Law
) -> CarriedState:
    """What is known after the function had the values (N,) at the points (N, D)."""
    values, points = lax.stop_gradient((values, points))
    # What is near the largest number is left out as infinities are: sums of it would be infinite.
    finite = jnp.abs(values) < jnp.finfo(values.dtype).max / 2**12
    counted = finite.astype(values.dtype)
    values = jnp.where(finite, values, 0)
    # What the predictions, made before, were worth at these points.
    q = _regression.predict(state.fit, points, law)
    size = _regression.size_of(jnp.concatenate([values[None], q]))
    [f] = _regression.centred(values[None] / size, counted)
    q = _regression.centred(q / size, counted)
    moved = jnp.sum(q**2, axis=1)
    # Where no value differs from another, a prediction that says otherwise must lose its share.
    unit = jnp.sum(f**2) + jnp.min(moved)
    told = (unit > 0) & jnp.all(jnp.isfinite(moved)) & _near(state.fit, centre, scale)
    unit = jnp.where(told, unit, 1)
    left = jnp.sum((f[None] - _shares(state)[:, None] * q) ** 2, axis=1) / unit

    def running(before: Array, now: Array) -> Array:
        return jnp.where(told, _KEPT * before + (1 - _KEPT) * now, before)

    kept = state.values.shape[0]

    def newest_first(new: Array, old: Array) -> Array:
        return jnp.concatenate([new, old])[:kept]

    points = newest_first(points, state.points)
    values = newest_first(values, state.values)
    counted = newest_first(counted, state.counted)
    new = min(f.shape[0], kept)
    return CarriedState(
        origin=state.origin,
        points=points,
        values=values,
        counted=counted,
        fit=_regression.renew(state.fit, points, values, counted, new, centre, scale, law),
        error=running(state.error, left),
        covariance=running(state.covariance, jnp.sum(f[None] * q, axis=1) / unit),
        variance=running(state.variance, moved / unit),
    )


def _flat(leaves: list[Array], dtype: Any) -> Array:
    # The regression mixes coordinates, however x is split over devices.
    arrays = in_types_of_constants([jnp.asarray(v) for v in leaves])
    flat = [v.astype(dtype).reshape(-1) for v in arrays]
    return jnp.concatenate(flat) if flat else jnp.zeros((0,), dtype)


def _offset(leaves: list[Array], origin: Array) -> Array:
    """Where a point lies from the origin, (D,); 0 in coordinates that are masked by an infinity."""
    away = _flat(leaves, origin.dtype) - origin
    return jnp.where(jnp.isfinite(away), away, 0)


def _spread(scales: list[Array], leaves: list[Array], names: list[str], dtype: Any) -> Array:
    """The scale of each coordinate, (D,)."""
    scales = _scales.one_each(scales, leaves)
    for scale, leaf, name in zip(scales, leaves, names, strict=True):
        if jnp.ndim(scale) > leaf.ndim:
            raise ValueError(
                f"carry needs a scale for each coordinate, but sigma is a matrix for leaf {name!r}"
            )
    return _flat(
        [jnp.broadcast_to(s.astype(dtype), v.shape) for s, v in zip(scales, leaves, strict=True)],
        dtype,
    )
