"""The default way of stepping: to the minimum of a quadratic surrogate of all recent samples."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._call import run
from .._perturb import make_perturbed_fun
from ..execution._chunks import draw_next, evaluate_at
from ..execution._plan import Point
from ..sampling._random_bits import root
from . import _quadratic_fit
from ._quadratic_fit import FIRST, Fit, fit, normal_scores
from ._schedules import WIDEST_EVALUATIONS, given_sigma, widest
from ._setup import ADAPTED, Setup
from ._states import Method, Operands, Start, Step

# Samples that the surrogate is fitted to: as many for each coordinate, and at most.
_KEPT, _MOST_KEPT = 4, 600
# Longest step, in standard deviations of the noise. It shrinks where a step was one for the worse.
_RADIUS = 2.0
_REACH_DOWN, _REACH_UP, _LEAST_REACH = 0.7, 1.3, 0.05
# By how much a step may lengthen or shorten the noise along one direction.
_STRETCH = 1.2
# Share of the variance between samples that the surrogate explains: below it, sigma follows the
# surrogate with caution. At half, a function of plateaus is followed down between its steps. The
# more is taken for noise, the more must be explained, up to the other number: sigma would stay at
# the size of the steps, while a wider one sees over them.
_EXPLAINED, _EXPLAINED_OF_NOISE = 0.7, 0.85
_SHRINK, _GROW = 0.2, 2.0
# Below that share: the length of a step that leaves sigma as it is, and by how much, times the
# share, another changes it.
_MODERATE, _CAUTION = 0.4, 0.3
# What is not explained pulls sigma towards the problem's scale: the power of their ratio, and the
# most of a step.
_PULL, _MOST_PULL = 0.15, 1.3
# Of sigma on a plateau.
_FLAT = 1.25


class Search(NamedTuple):
    """The state of a search.

    Attributes:
      centre: the last point that was accepted, flat.
      value: the surrogate's value there.
      proposal: where the next samples are drawn around.
      metric: a matrix of determinant 1; noise is sigma times it times what is drawn.
      sigma: scale of the noise.
      unlimited: what sigma would be, were no coordinate's noise limited, which is what is drawn
        towards the problem's scale.
      points: where the function was evaluated, oldest first.
      values: what it was; NaN where there is none yet.
      priors: logarithms of ridge and prior variances, for values and for their ranks, (2, 2) or,
        of a function that takes a key, (2, 3).
      reach: how far the next step may go, as a share of the longest.
      stream: two words, the key of all noise.
    """

    centre: Array
    value: Array
    proposal: Array
    metric: Array
    sigma: Array
    unlimited: Array
    points: Array
    values: Array
    priors: Array
    reach: Array
    stream: Array


class Attempt(NamedTuple):
    """A fit to values and one to their ranks, and what comes of them.

    Attributes:
      centre: around which both are made.
      back: what the noise's scale is multiplied by.
      again: whether a fit around the last centre is still to be made.
      worse: whether the proposal turned out worse than that.
      which: of the two, the one that is followed.
      found: both.
    """

    centre: Array
    back: Array
    again: Array
    worse: Array
    which: Array
    found: Fit


def trust_region_step(gradient: Array, curvatures: Array, radius: Array) -> tuple[Array, Array]:
    """The minimum of a quadratic with these curvatures along the axes, no longer than radius.

    Returns:
      The step, and whether it is as long as it may be.
    """
    tiny = jnp.finfo(gradient.dtype).tiny
    # By a power of two, for digits: of values such as 1e25 squares of slopes would overflow.
    largest = jnp.maximum(jnp.abs(gradient).max(), jnp.abs(curvatures).max())
    exponent = jnp.frexp(largest)[1]
    gradient, curvatures = (jnp.ldexp(v, -exponent) for v in (gradient, curvatures))
    lowest = jnp.maximum(0, -curvatures.min())
    length = jnp.linalg.norm(gradient)
    low = lowest
    high = lowest + length / radius + tiny

    def step(shift: Array) -> Array:
        shifted = curvatures + shift
        return -gradient / jnp.where(shifted > 0, shifted, tiny)

    free = jnp.where(lowest == 0, jnp.linalg.norm(step(jnp.zeros_like(low))), jnp.inf) <= radius

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        long = ~(jnp.linalg.norm(step(middle)) <= radius)
        return jnp.where(long, middle, low), jnp.where(long, high, middle)

    low, high = lax.fori_loop(0, 60, halve, (low, high))
    return jnp.where(free, step(jnp.zeros_like(low)), step(high)), ~free


def reshaped(
    metric: Array, axes: Array, curvatures: Array, unsure: Array, explained: Array
) -> Array:
    """The metric with more noise along axes of little curvature, and less along those of much.

    Samples are fewer than curvatures: ratios are drawn towards one by how unsure each is, and by
    the correlation of what is predicted with what is seen.
    """
    typical, curved = jnp.mean(jnp.abs(curvatures)), jnp.maximum(curvatures, 0)
    stretch = jnp.sqrt((typical + unsure) / (curved + unsure)) ** jnp.sqrt(explained)
    stretch = jnp.clip(stretch, 1 / _STRETCH, _STRETCH)
    stretch = stretch / jnp.exp(jnp.mean(jnp.log(stretch)))
    after = metric @ (axes * stretch) @ axes.T
    return jnp.where((typical > 0) & jnp.isfinite(after).all(), after, metric)


def limited_noise(sigma: Array, metric: Array, widest: Array) -> tuple[Array, Array]:
    """Sigma and metric whose noise is as wide as `widest` at most in each coordinate.

    What all rows lose is sigma's: it would grow without end, and the metric vanish, where the
    function does not depend on a coordinate.
    """
    left = jnp.minimum(1, widest / (sigma * jnp.linalg.norm(metric, axis=1)))
    common = jnp.exp(jnp.mean(jnp.log(left)))
    return sigma * common, metric * (left / common)[:, None]


def surrogate_search(setup: Setup) -> Method:
    """The method: draw around a proposal, fit, go back if it is worse, propose."""
    objective, sigma, num_samples = setup.objective, setup.sigma, setup.num_samples
    dim, dtype = objective.dim, objective.dtype
    adapts = sigma == ADAPTED
    sizes = np.cumsum([math.prod(shape) for shape in objective.shapes])[:-1]
    batch = num_samples + 1
    kept = min(_KEPT * dim, _MOST_KEPT) + 10
    kept = max(2, -(-kept // batch)) * batch
    # What the choice of the first sigma saw is of one key, but told as if it were of several.
    steps = np.arange(kept) // batch
    same_step = (steps[:, None] == steps[None]).astype(dtype)
    learns_metric = dim <= _quadratic_fit.MOST_METRIC
    longest = _RADIUS * math.sqrt(dim)
    choose = widest(setup)

    def point(flat: Array) -> Any:
        parts = zip(jnp.split(flat, sizes), objective.shapes, objective.dtypes, strict=True)
        return jax.tree.unflatten(
            objective.tree, [part.reshape(shape).astype(kind) for part, shape, kind in parts]
        )

    def flat(u: Any) -> Array:
        return jnp.concatenate([leaf.ravel().astype(dtype) for leaf in jax.tree.leaves(u)])

    def noises(sigma: Array, metric: Array) -> Array:
        """Scale of the noise of each coordinate."""
        return sigma * (jnp.linalg.norm(metric, axis=1) if learns_metric else metric)

    def samples(
        operands: Operands, state: Search, scale: Array, keys: tuple[Array, Array], count: Array
    ) -> tuple[Array, Array]:
        """Noise of a step, (n, D), and the function's values there."""

        def value(z: Array) -> Array:
            shift = scale @ z if learns_metric else scale * z
            return objective.value(operands.function, keys[1], point(state.proposal + shift))

        zero, one = jnp.zeros(dim, dtype), jnp.ones((), dtype)
        smooth = make_perturbed_fun(
            value,
            num_samples,
            1.0,
            setup.noise,
            batch_size=setup.batch_size,
            sampler=setup.sampler,
            degree=0,
        )
        call = smooth.prepare(keys[0], zero, (), {})
        # A step takes the next samples of a group, so that those of several steps, which the
        # surrogate is fitted to, are orthogonal too.
        together = max(num_samples, min(dim, _MOST_KEPT))
        plan = dataclasses.replace(call.plan, num_samples=together)

        def program(_key: Array, _x: Any, _sigma: Any, inner: Any) -> tuple[Array, Array]:
            first = count.astype(jnp.uint32) * np.uint32(num_samples)
            z = draw_next(plan, state.stream, inner, first, num_samples)
            found, _ = evaluate_at(plan, inner, Point(zero, one), z)
            return z, found[:, 0]

        return run(call, program)

    def init(
        operands: Operands, keys: tuple[Array, Array], u: Any, value: Array
    ) -> tuple[Search, Start]:
        relative = flat(scales(operands, jnp.zeros((), jnp.int32), u))
        mean = jnp.exp(jnp.mean(jnp.log(relative)))
        metric = relative / mean
        points, values = flat(u)[None], value[None]
        made = jnp.zeros((), jnp.int32)
        stream = root(jax.random.fold_in(keys[0], np.iinfo(np.int32).max))
        if adapts:
            multiple, seen, found, made = choose(operands, keys, u, value)
            mean = multiple * mean
            points = jnp.concatenate([points, jax.vmap(flat)(seen)])
            values = jnp.concatenate([values, found])
        finite = jnp.where(jnp.isfinite(values), values, jnp.inf)
        lowest = points[jnp.argmin(finite)]
        # What was not evaluated comes last here, and is forgotten first.
        room = max(0, kept - len(values))
        points = jnp.pad(points, ((0, room), (0, 0)), "edge")[:kept]
        values = jnp.pad(values, (0, room), constant_values=jnp.nan)[:kept]
        begun = Search(
            centre=flat(u),
            value=jnp.asarray(jnp.inf, dtype),
            proposal=lowest,
            metric=jnp.diag(metric) if learns_metric else metric,
            sigma=jnp.asarray(mean, dtype),
            unlimited=jnp.asarray(mean, dtype),
            points=points[::-1],
            values=values[::-1],
            priors=jnp.tile(np.array(FIRST[: 2 + objective.uses_key], np.int32), (2, 1)),
            reach=jnp.ones((), dtype),
            stream=stream,
        )
        return begun, Start(point(lowest), jnp.min(finite), made)

    def scales(operands: Operands, count: Array, u: Any) -> Any:
        given = operands.scale if adapts else given_sigma(sigma, operands, count)
        return jax.tree.map(
            lambda s, part: jax.tree.map(lambda leaf: jnp.broadcast_to(s, leaf.shape), part),
            given,
            u,
        )

    def step(
        operands: Operands, state: Search, keys: tuple[Array, Array], count: Array
    ) -> tuple[Search, Step]:
        if not adapts:
            wanted = flat(scales(operands, count, point(state.centre)))
            state = state._replace(sigma=jnp.exp(jnp.mean(jnp.log(wanted))))
        scale = state.sigma * state.metric
        z, values = samples(operands, state, scale, keys, count)
        hard = objective.value(operands.function, keys[1], point(state.proposal))
        shifts = z @ scale.T if learns_metric else z * scale
        new_points = jnp.concatenate([state.proposal[None], state.proposal + shifts])
        new_values = jnp.concatenate([hard[None], values])
        points = jnp.concatenate([state.points[batch:], new_points])
        values = jnp.concatenate([state.values[batch:], new_values])

        # A plain fit is exact where the function is nearly quadratic; one to ranks does not mind
        # outliers and steps. Both are made, and the one is followed that predicts better.
        ranks = normal_scores(values)
        described = jnp.stack([values, ranks])
        order = jnp.argsort(jnp.where(jnp.isfinite(values), values, jnp.inf))
        last = jnp.maximum(jnp.isfinite(values).sum() - 1, 0)
        order = order[jnp.minimum(jnp.arange(kept), last)]
        falling = values[order], ranks[order]

        def fit_around(centre: Array, scale: Array) -> Fit:
            away = points - centre
            z = jnp.linalg.solve(scale, away.T).T if learns_metric else away / scale
            known = jnp.isfinite(values)
            squares = jnp.where(known, jnp.sum(z**2, 1) / dim, jnp.inf)
            enough = jnp.sort(squares)[min(dim + num_samples // 2, kept - 1)]
            enough = jnp.where(jnp.isfinite(enough), enough, jnp.inf)
            near = known & (squares <= jnp.maximum(16, enough))
            z = jnp.where(near[:, None], z, 0)
            targets = jnp.where(near, described, jnp.nan)
            ranked = jnp.array([False, True])
            each = jax.vmap(fit, (None, 0, 0, 0, None, None))
            return each(z, targets, ranked, state.priors, count, same_step)

        def clear(found: Fit) -> Array:
            """How much must be explained for sigma to follow the surrogate without caution."""
            noise = 10.0 ** (found.prior[0].astype(dtype) / 2)
            return _EXPLAINED + (_EXPLAINED_OF_NOISE - _EXPLAINED) * noise

        def followed(found: Fit) -> Array:
            return (found.explained[1] > found.explained[0]).astype(jnp.int32)

        # Where the proposal turns out worse, the fit is made again, around the old centre: in a
        # loop, for two calls would be compiled twice.
        before = state.value, jnp.interp(state.value, *falling)
        before = jnp.where(jnp.isfinite(state.value), jnp.stack(before), jnp.inf)

        def attempt(last: Attempt) -> Attempt:
            both = fit_around(last.centre, last.back * scale)
            first = ~last.worse
            which = jnp.where(first, followed(both), last.which)
            found = jax.tree.map(lambda v: v[which], both)
            worse = ~(found.value <= before[which] + found.value_error)
            back = jnp.where(found.explained > clear(found), 0.5, 0.9) if adapts else 1.0
            return Attempt(
                centre=jnp.where(first & worse, state.centre, last.centre),
                back=jnp.where(first & worse, back, last.back).astype(dtype),
                again=first & worse,
                worse=last.worse | worse,
                which=which,
                found=both,
            )

        nothing = jax.tree.map(
            lambda v: jnp.zeros(v.shape, v.dtype),
            jax.eval_shape(fit_around, state.proposal, scale),
        )
        yes, no, one = jnp.ones((), bool), jnp.zeros((), bool), jnp.ones((), dtype)
        begun = Attempt(state.proposal, one, yes, no, jnp.zeros((), jnp.int32), nothing)
        ended = lax.while_loop(lambda last: last.again, attempt, begun)
        centre, back, worse, which = ended.centre, ended.back, ended.worse, ended.which
        plain, found = (jax.tree.map(lambda v, i=i: v[i], ended.found) for i in (0, which))
        scale = back * scale
        reach = jnp.where(worse, _REACH_DOWN, _REACH_UP) * state.reach
        reach = jnp.clip(reach, _LEAST_REACH, 1).astype(dtype)
        radius = reach * longest

        explained, least = jnp.clip(found.explained, 0, 1), clear(found)
        if learns_metric:
            curvatures, axes = jnp.linalg.eigh(found.curvature)
            along, limited = trust_region_step(axes.T @ found.gradient, curvatures, radius)
            move = axes @ along
            proposal = centre + scale @ move
            metric = reshaped(state.metric, axes, curvatures, found.unsure, explained)
        else:
            curvatures = jnp.full(dim, jnp.trace(found.curvature) / dim)
            move, limited = trust_region_step(found.gradient, curvatures, radius)
            proposal = centre + scale * move
            metric = state.metric
        length = jnp.linalg.norm(move) / math.sqrt(dim)
        # Under the smallest ridges a factorisation may fail; the next one has a larger one.
        sound = jnp.isfinite(length)
        length = jnp.where(sound, length, 0)
        proposal = jnp.where(sound, proposal, centre)
        floor = jnp.maximum(_SHRINK, 1 - (explained - least) / (1 - least))
        wanted = jnp.where(limited & (reach >= 1), jnp.maximum(length, 1.5), length)
        factor = jnp.where(worse, 1, jnp.clip(wanted, jnp.minimum(floor, 1), _GROW))
        most = 1 / (1 - _CAUTION * explained)
        home = jnp.exp(jnp.mean(jnp.log(flat(operands.scale))))
        pull = (home / state.unlimited) ** (_PULL * (1 - explained))
        unclear = jnp.clip(length / _MODERATE, 1 / most, most)
        unclear = unclear * jnp.clip(pull, 1 / _MOST_PULL, _MOST_PULL) / jnp.where(worse, back, 1)
        factor = jnp.where(explained < least, unclear, factor)
        flat_here = 2 * jnp.sum(new_values == jnp.median(new_values)) > batch
        factor = jnp.where(flat_here, _FLAT, factor)
        grown = (back * factor).astype(dtype) if adapts else one
        new_sigma = state.sigma * grown
        unlimited = jnp.minimum(state.unlimited * grown, jnp.finfo(dtype).max)

        if adapts:
            widest = flat(operands.widest)
            if learns_metric:
                new_sigma, metric = limited_noise(new_sigma, metric, widest)
            else:
                new_sigma = unlimited = jnp.minimum(new_sigma, jnp.min(widest / metric))

        value = jnp.where(which == 1, jnp.interp(found.value, *falling[::-1]), found.value)
        lowest = jnp.argmin(jnp.where(jnp.isfinite(new_values), new_values, jnp.inf))
        told = Step(
            smoothed_value=plain.value + jnp.trace(plain.curvature) / 2,
            standard_error=jnp.where(jnp.isnan(plain.value), jnp.nan, plain.value_error),
            hard_value=hard,
            sigma=state.sigma,
            most_noise=jnp.max(noises(state.sigma, state.metric)),
            candidate=point(new_points[lowest]),
            candidate_value=jnp.where(
                jnp.isfinite(new_values[lowest]), new_values[lowest], jnp.nan
            ),
            centre=point(centre),
            evaluations=jnp.asarray(batch, jnp.int32),
            wants_more=jnp.zeros((), bool),
        )
        state = Search(
            centre=centre,
            value=jnp.where(jnp.isfinite(found.value), value, jnp.inf).astype(dtype),
            proposal=proposal,
            metric=metric,
            sigma=new_sigma,
            unlimited=unlimited,
            points=points,
            values=values,
            priors=ended.found.prior,
            reach=reach,
            stream=state.stream,
        )
        return state, told

    return Method(batch, init, WIDEST_EVALUATIONS if adapts else 0, step)
