"""The default way of stepping: to the minimum of a quadratic surrogate of all recent samples."""

import dataclasses
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
from . import _quadratic_fit, _sigma_rule
from ._first_sigma import WIDEST_EVALUATIONS, coordinate_scales, given_sigma, widest
from ._quadratic_fit import FIRST, Fit, fit, normal_scores
from ._setup import ADAPTED, Setup
from ._shape_of_noise import limited, standard, stretched, widths
from ._states import Method, Operands, Start, Step
from ._trust_region import move

# Samples that the surrogate is fitted to: as many for each coordinate, and at most.
_KEPT, _MOST_KEPT = 4, 600
# How far a step may go, as a share of the longest: less where one was for the worse.
_REACH_DOWN, _REACH_UP, _LEAST_REACH = 0.7, 1.3, 0.05


class Search(NamedTuple):
    """The state of a search.

    Attributes:
      centre: the last point that was accepted, flat.
      value: the surrogate's value there.
      proposal: where the next samples are drawn around.
      metric: shape of the noise, a matrix of determinant 1 or a scale for each coordinate; noise is
        sigma times it times what is drawn.
      sigma: scale of the noise.
      unlimited: what sigma would be, were no coordinate's noise limited, which is what is drawn
        towards the problem's scale.
      points: where the function was evaluated, oldest first.
      values: what it was; NaN where there is none yet.
      priors: logarithms of ridge and prior variances, for values and for their ranks, (2, 2) or,
        of a function that depends on a key, (2, 3).
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


class Seen(NamedTuple):
    """Recent samples, described in two ways.

    A plain fit is exact where the function is nearly quadratic; one to ranks does not mind outliers
    and steps. Both are made, and the one is followed that predicts better.

    Attributes:
      points: where, (kept, D).
      described: values and their normal scores, (2, kept).
      ordered: both sorted, by which one is translated to the other.
      same_step: which samples are of one step, (kept, kept), 1 or 0.
    """

    points: Array
    described: Array
    ordered: Array
    same_step: np.ndarray


class Attempt(NamedTuple):
    """A fit to values and one to their ranks, and what comes of them.

    Attributes:
      centre: around which both are made.
      back: what the noise's scale is multiplied by.
      again: whether a fit around the last centre is still to be made.
      worse: whether the proposal turned out worse than that.
      which: of the two, the one that is followed.
      both: the fits.
    """

    centre: Array
    back: Array
    again: Array
    worse: Array
    which: Array
    both: Fit


def surrogate_search(setup: Setup) -> Method:
    """The method: draw around a proposal, fit, go back if it is worse, propose."""
    search = SurrogateSearch(setup)
    choosing = WIDEST_EVALUATIONS if search.adapts else 0
    return Method(search.batch, search.init, choosing, search.step)


@dataclasses.dataclass(frozen=True)
class SurrogateSearch:
    """Start and step of a search."""

    setup: Setup

    @property
    def adapts(self) -> bool:
        """Whether sigma is the search's own."""
        return self.setup.sigma == ADAPTED

    @property
    def batch(self) -> int:
        """Evaluations of a step."""
        return self.setup.num_samples + 1

    @property
    def kept(self) -> int:
        """Samples that the surrogate is fitted to, those of whole steps."""
        several = min(_KEPT * self.setup.objective.dim, _MOST_KEPT) + 10
        return max(2, -(-several // self.batch)) * self.batch

    def init(
        self, operands: Operands, keys: tuple[Array, Array], u: Any, value: Array
    ) -> tuple[Search, Start]:
        """As `Method` has it."""
        objective, kept = self.setup.objective, self.kept
        flat, dtype = objective.flat, objective.dtype
        relative = self._scales(operands, jnp.zeros((), jnp.int32), u)
        sigma = jnp.exp(jnp.mean(jnp.log(relative)))
        metric = relative / sigma
        points, values = flat(u)[None], value[None]
        made = jnp.zeros((), jnp.int32)
        stream = root(jax.random.fold_in(keys[0], np.iinfo(np.int32).max))
        if self.adapts:
            multiple, seen, found, made = widest(self.setup)(operands, keys, u, value)
            sigma = multiple * sigma
            points = jnp.concatenate([points, jax.vmap(flat)(seen)])
            values = jnp.concatenate([values, found])
        finite = jnp.where(jnp.isfinite(values), values, jnp.inf)
        lowest = points[jnp.argmin(finite)]
        # What was not evaluated comes last here, and is forgotten first.
        room = max(0, kept - len(values))
        points = jnp.pad(points, ((0, room), (0, 0)), "edge")[:kept]
        values = jnp.pad(values, (0, room), constant_values=jnp.nan)[:kept]
        learns_metric = objective.dim <= _quadratic_fit.MOST_METRIC
        begun = Search(
            centre=flat(u),
            value=jnp.asarray(jnp.inf, dtype),
            proposal=lowest,
            metric=jnp.diag(metric) if learns_metric else metric,
            sigma=jnp.asarray(sigma, dtype),
            unlimited=jnp.asarray(sigma, dtype),
            points=points[::-1],
            values=values[::-1],
            priors=jnp.tile(np.array(FIRST[: 2 + objective.uses_key], np.int32), (2, 1)),
            reach=jnp.ones((), dtype),
            stream=stream,
        )
        return begun, Start(objective.point(lowest), jnp.min(finite), made)

    def step(
        self, operands: Operands, state: Search, keys: tuple[Array, Array], count: Array
    ) -> tuple[Search, Step]:
        """As `Method` has it."""
        objective, dtype = self.setup.objective, self.setup.objective.dtype
        if not self.adapts:
            wanted = self._scales(operands, count, objective.point(state.centre))
            state = state._replace(sigma=jnp.exp(jnp.mean(jnp.log(wanted))))
        scale = state.sigma * state.metric
        new_points, new_values = self._evaluated(operands, state, scale, keys, count)
        points = jnp.concatenate([state.points[self.batch :], new_points])
        values = jnp.concatenate([state.values[self.batch :], new_values])
        seen = self._described(points, values)

        chosen = self._attempted(seen, state, scale, count)
        plain, found = (jax.tree.map(lambda v, i=i: v[i], chosen.both) for i in (0, chosen.which))
        explained = jnp.clip(found.explained, 0, 1)
        reach = jnp.where(chosen.worse, _REACH_DOWN, _REACH_UP) * state.reach
        reach = jnp.clip(reach, _LEAST_REACH, 1).astype(dtype)
        made = move(found, chosen.centre, chosen.back * scale, state.metric, explained, reach)
        sigma, unlimited, metric = state.sigma, state.unlimited, made.metric
        if self.adapts:
            home = jnp.exp(jnp.mean(jnp.log(objective.flat(operands.scale))))
            # More than half of the values are the same.
            alike = jnp.sum(new_values[:, None] == new_values, axis=1)
            flat = 2 * jnp.max(alike) > self.batch
            least, away = _sigma_rule.least_explained(found.prior, dtype), home / unlimited
            factor = _sigma_rule.factor(made, reach, chosen.back, explained, least, away, flat)
            factor = factor.astype(dtype)
            unlimited = jnp.minimum(unlimited * factor, jnp.finfo(dtype).max)
            sigma, unlimited, metric = limited(
                sigma * factor, unlimited, metric, objective.flat(operands.widest)
            )

        by_value, by_rank = seen.ordered
        value = _translated(found.value, by_rank, by_value)
        value = jnp.where(chosen.which == 1, value, found.value)
        lowest = jnp.argmin(jnp.where(jnp.isfinite(new_values), new_values, jnp.inf))
        told = Step(
            smoothed_value=plain.value + jnp.trace(plain.curvature) / 2,
            standard_error=jnp.where(jnp.isnan(plain.value), jnp.nan, plain.value_error),
            hard_value=new_values[0],
            sigma=state.sigma,
            most_noise=jnp.max(state.sigma * widths(state.metric)),
            candidate=objective.point(new_points[lowest]),
            candidate_value=jnp.where(
                jnp.isfinite(new_values[lowest]), new_values[lowest], jnp.nan
            ),
            centre=objective.point(chosen.centre),
            evaluations=jnp.asarray(self.batch, jnp.int32),
            wants_more=jnp.zeros((), bool),
        )
        state = Search(
            centre=chosen.centre,
            value=jnp.where(jnp.isfinite(found.value), value, jnp.inf).astype(dtype),
            proposal=made.proposal,
            metric=metric,
            sigma=sigma,
            unlimited=unlimited,
            points=points,
            values=values,
            priors=chosen.both.prior,
            reach=reach,
            stream=state.stream,
        )
        return state, told

    def _scales(self, operands: Operands, count: Array, u: Any) -> Array:
        """Sigma for each coordinate, as it is given; else the problem's scale."""
        given = operands.scale
        if not self.adapts:
            given = given_sigma(self.setup.sigma, operands, count)
        return coordinate_scales(given, u).astype(self.setup.objective.dtype)

    def _evaluated(
        self,
        operands: Operands,
        state: Search,
        scale: Array,
        keys: tuple[Array, Array],
        count: Array,
    ) -> tuple[Array, Array]:
        """The points of a step, (batch, D), the proposal first, and the function's values there."""
        setup, objective = self.setup, self.setup.objective

        def value(z: Array) -> Array:
            point = objective.point(state.proposal + stretched(scale, z))
            return objective.value(operands.function, keys[1], point)

        zero = jnp.zeros(objective.dim, objective.dtype)
        smooth = make_perturbed_fun(
            value,
            setup.num_samples,
            1.0,
            setup.law(operands),
            batch_size=setup.batch_size,
            sampler=setup.sampler,
            degree=0,
        )
        call = smooth.prepare(keys[0], zero, (), {})
        # A step takes the next samples of a group, so that those of several steps, which the
        # surrogate is fitted to, are orthogonal too.
        together = max(setup.num_samples, min(objective.dim, _MOST_KEPT))
        plan = dataclasses.replace(call.plan, num_samples=together)

        def program(_key: Array, _x: Any, _sigma: Any, inner: Any) -> tuple[Array, Array]:
            first = count.astype(jnp.uint32) * np.uint32(setup.num_samples)
            z = draw_next(plan, state.stream, inner, first, setup.num_samples)
            found, _ = evaluate_at(plan, inner, Point(zero, jnp.ones((), objective.dtype)), z)
            return z, found[:, 0]

        z, values = run(call, program)
        hard = objective.value(operands.function, keys[1], objective.point(state.proposal))
        points = jnp.concatenate([state.proposal[None], state.proposal + stretched(scale, z)])
        return points, jnp.concatenate([hard[None], values])

    def _described(self, points: Array, values: Array) -> Seen:
        described = jnp.stack([values, normal_scores(values)])
        order = jnp.argsort(jnp.where(jnp.isfinite(values), values, jnp.inf))
        last = jnp.maximum(jnp.isfinite(values).sum() - 1, 0)
        order = order[jnp.minimum(jnp.arange(self.kept), last)]
        # What the choice of the first sigma saw is of one key, but told as if it were of several.
        steps = np.arange(self.kept) // self.batch
        same_step = (steps[:, None] == steps[None]).astype(values.dtype)
        return Seen(points, described, described[:, order], same_step)

    def _fitted(self, seen: Seen, priors: Array, count: Array, centre: Array, scale: Array) -> Fit:
        """A fit to values and one to ranks, in units of the noise around a centre."""
        dim, num_samples = self.setup.objective.dim, self.setup.num_samples
        z = standard(scale, seen.points - centre)
        known = jnp.isfinite(seen.described[0])
        squares = jnp.where(known, jnp.sum(z**2, 1) / dim, jnp.inf)
        enough = jnp.sort(squares)[min(dim + num_samples // 2, self.kept - 1)]
        enough = jnp.where(jnp.isfinite(enough), enough, jnp.inf)
        near = known & (squares <= jnp.maximum(16, enough))
        z = jnp.where(near[:, None], z, 0)
        targets = jnp.where(near, seen.described, jnp.nan)
        ranked = jnp.array([False, True])
        each = jax.vmap(fit, (None, 0, 0, 0, None, None))
        return each(z, targets, ranked, priors, count, seen.same_step)

    def _attempted(self, seen: Seen, state: Search, scale: Array, count: Array) -> Attempt:
        """Fits around the proposal; where it turns out worse, around the old centre again.

        In a loop, for two calls would be compiled twice.
        """
        dtype = self.setup.objective.dtype
        before = jnp.stack([state.value, _translated(state.value, *seen.ordered)])
        before = jnp.where(jnp.isfinite(state.value), before, jnp.inf)

        def fitted(centre: Array, scale: Array) -> Fit:
            return self._fitted(seen, state.priors, count, centre, scale)

        def attempt(last: Attempt) -> Attempt:
            both = fitted(last.centre, last.back * scale)
            first = ~last.worse
            better = (both.explained[1] > both.explained[0]).astype(jnp.int32)
            which = jnp.where(first, better, last.which)
            found = jax.tree.map(lambda v: v[which], both)
            worse = ~(found.value <= before[which] + found.value_error)
            back = 1.0
            if self.adapts:
                least = _sigma_rule.least_explained(found.prior, dtype)
                back = _sigma_rule.back(found.explained > least)
            return Attempt(
                centre=jnp.where(first & worse, state.centre, last.centre),
                back=jnp.where(first & worse, back, last.back).astype(dtype),
                again=first & worse,
                worse=last.worse | worse,
                which=which,
                both=both,
            )

        like = jax.eval_shape(fitted, state.proposal, scale)
        nothing = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), like)
        yes, no, one = jnp.ones((), bool), jnp.zeros((), bool), jnp.ones((), dtype)
        begun = Attempt(state.proposal, one, yes, no, jnp.zeros((), jnp.int32), nothing)
        return lax.while_loop(lambda last: last.again, attempt, begun)


def _translated(value: Array, rising: Array, images: Array) -> Array:
    """What a number in one of two orders is in the other, between its neighbours; as `jnp.interp`.

    By counting: the search in a loop of that has a dozen kernels more to compile.
    """
    after = jnp.clip(jnp.sum(rising <= value), 1, len(rising) - 1)
    (low, first), (high, second) = ((rising[i], images[i]) for i in (after - 1, after))
    share = jnp.where(high > low, (value - low) / (high - low), 0)
    return first + jnp.clip(share, 0, 1) * (second - first)
