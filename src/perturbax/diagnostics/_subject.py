"""A perturbed function at a point, run again and again with other samples than its own.

The one place of `diagnose` that looks at what a perturbed function was made of; and bounds
that sweeps have as well.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks, _leaves
from .._call import Settings
from .._describe import Made, leading
from .._perturb import PerturbedFun, kind_of_fun
from ..estimator._default_rule import Choice, choose
from ..estimator._surrogate import num_features
from ..sampling._independent import Independent
from ..sampling._nets import OrthogonalArray, Sobol
from ..scale import _scales
from ..tracing._compiled import compiled_map
from ..tracing._host_exceptions import own_exceptions
from . import _variance_law
from ._standard_errors import estimates_by_degree
from ._variance_law import Law, Runs
from ._words import wide

# Runs that a number of samples is cut into where the spread inside of a run is not known.
_CUT = 8
# A pilot of fewer samples tells too little to go by.
LEAST_SAMPLES = 16
# Samples for each coefficient of a fit that is tried for comparison, by degree. With fewer, eight
# nets of the pilot tell a fit more than two nets of as many samples would.
_PER_COEFFICIENT = {0: 0, 1: 20, 2: 10}
# From this share of samples on that equal fun(x), it is a plateau.
PLATEAU = 0.95
# Spacings of the numbers of x that sigma should be at least.
FEW_SPACINGS = 8
# What has other derivatives than by the score or Danskin's theorem.
_OTHERS = ("make_implicit_mle", "make_perturbed_distribution")
# Solutions that a solver's own are held against, at most, and by which share of the sum of the
# sizes of its terms an objective must be better, to tell more than a solver's tolerance.
_COMPARED, _SURELY_BETTER = 256, 1e-3
# Up to this many numbers, the whole Jacobian is looked at; beyond, that of a random combination.
WHOLE = 2**16


class Pilot(NamedTuple):
    """The first estimate.

    Attributes:
      value: the smoothed value.
      value_error: its standard errors.
      values: what was averaged, (samples, outputs); of a layer, the solutions.
      equal: which of them are the value at x, but for rounding.
      runs: the gradient.
      degrees: the gradient by surrogates of other degrees, from the same evaluations.
      better: of a layer whose objective is linear, what `share_better` tells of its solutions.
    """

    value: Any
    value_error: Any
    values: np.ndarray
    equal: np.ndarray
    runs: Runs
    degrees: dict[int, Runs]
    better: tuple[float, float] = (0.0, 0.0)


class Subject:
    """A perturbed function at a point.

    Attributes:
      name: of the function that is smoothed.
      maker: the name of the public function that g was made by.
      settings: how it is perturbed.
      leaves: those of x that are perturbed.
      names: of these.
      fixed: the names of those that are not, with their dtypes.
      dim: number of coordinates.
      num_evaluations: how many there were so far, at most.
      seconds: that an evaluation took in the largest program so far.
      kept_variance: of the values of the last runs that kept them; infinite before.
      most_variance: of the values of a sample, that a run so far has told; zero for layers.
    """

    def __init__(self, g: Any, key: Array, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """Checks what came."""
        fun, settings, self._made = _origin(g)
        self.maker = g.maker.__name__ if isinstance(g, Made) else "make_perturbed_fun"
        if settings.num_samples < LEAST_SAMPLES:
            raise ValueError(
                f"g has num_samples={settings.num_samples}, but a diagnosis needs a pilot of at "
                f"least {LEAST_SAMPLES}: diagnose the same function with num_samples=1000, for "
                "example"
            )
        if _checks.is_traced((key, x, args, kwargs, settings.sigma)):
            raise TypeError("diagnose needs known numbers, got traced ones; call it outside jit")
        self.settings = settings
        self._key = _checks.check_key(key, x, "diagnose(g, key, x)")
        self._x, self._args, self._kwargs = x, args, kwargs
        self.leaves, self.names, self._merge = _leaves.perturbed_leaves(x)
        self.fixed = [
            (_leaves.leaf_name(path), jnp.result_type(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(x)
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]
        self.dim = _leaves.num_elements(self.leaves)
        self.name = getattr(fun, "__name__", type(fun).__name__)
        self.num_evaluations = 0
        self.seconds = float("nan")
        self.kept_variance = math.inf
        self.most_variance = 0.0
        self._num_outputs = 1
        self._largest = 0
        self._signs: np.ndarray | None = None
        self._choices: dict[Any, Choice] = {}
        self._programs: dict[Any, tuple[Any, list[int]]] = {}
        # What the samples of the pilot are values of, and where.
        sampled, self._sampled_at, self._sampled_settings = fun, self._merge, settings
        self._seen: Callable[[Any], Any] | None = None
        if self._made is not None:
            if self.maker == "make_fenchel_young_loss":
                kwargs = dict(kwargs)
                names = "key", "theta", "y_true"
                self._y_true, *rest = leading(names, (key, x, *args), kwargs)[2:]
                args = tuple(rest)
            self._rest = args, kwargs
            solve, seen, self._sampled_at, sigma = self._solver()
            if self._made.arguments.get("objective") is None:
                self._seen = seen

            def sampled(point: Any, *args: Any, **kwargs: Any) -> Any:
                return solve(seen(point), *args, **kwargs)

            self._sampled_settings = dataclasses.replace(settings, sigma=sigma)

        def value_at(x: Any) -> Any:
            value = sampled(x, *args, **kwargs)
            return self._combined(value[0] if settings.has_aux else value)

        self._value_at = value_at

    def _solver(self) -> tuple[Any, Callable[[Any], Any], Callable[[list[Array]], Any], Any]:
        """Of a layer, its solver, what that sees of a point, where noise is added, its scale."""
        assert self._made is not None
        solve, sigma = self._made.arguments["argmax_fun"], self.settings.sigma
        if self._made.arguments["multiplicative"]:
            # theta exp(sigma Z - sigma^2 / 2), a function of Z
            scales = _scales.scale_leaves(sigma, self._x, self.leaves, self.names)
            scales = _scales.one_each(scales, self.leaves)

            def factors(z: Any) -> Any:
                theta = [
                    (v * jnp.exp(s * one - s**2 / 2)).astype(v.dtype)
                    for v, s, one in zip(self.leaves, scales, jax.tree.leaves(z), strict=True)
                ]
                return self._merge(theta)

            zeros = lambda leaves: self._merge([jnp.zeros_like(v) for v in leaves])  # noqa: E731
            return solve, factors, zeros, 1.0
        if self._made.arguments["maximize"]:
            return solve, lambda u: u, self._merge, sigma
        negated = functools.partial(jax.tree.map, jnp.negative)
        return solve, negated, lambda leaves: self._merge([-v for v in leaves]), sigma

    def _combined(self, value: Any) -> Any:
        """The value, or its numbers with random signs in one sum."""
        if self._signs is None:
            return value
        return self._signs.astype(np.float32) @ _joined(value)

    @property
    def num_samples(self) -> int:
        """Of the function as it is."""
        return self.settings.num_samples

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the maker of a layer, by name; empty for other functions."""
        return {} if self._made is None else self._made.arguments

    @property
    def gradient_of(self) -> str:
        """What the gradient is of."""
        if self._signs is not None:
            return f"the sum of {self._signs.size:,} numbers with random signs"
        return "the value" if self._num_outputs == 1 else f"all {self._num_outputs:,} numbers"

    @property
    def least_runs(self) -> int:
        """How many of a size tell their spread: of a layer, whose runs tell nothing alone, two."""
        return 1 if self._made is None else 2

    def value_at_x(self) -> Any:
        """fun(x), by one evaluation; decides whether outputs are combined from now on.

        Of a maximum or a loss, that of the solution at x.
        """
        self.num_evaluations += 1
        found = self._value_at(self._sampled_at(self.leaves))
        value = found if self._made is None else self._value_of(found)
        size = self._num_outputs = sum(jnp.size(v) for v in jax.tree.leaves(value))
        if not size:
            raise ValueError(f"{self.name} returns no numbers, so there is nothing to diagnose")
        if size > 1 and size * self.dim > WHOLE:
            key = jax.random.fold_in(self._key, 0)
            self._signs = np.asarray(jax.random.rademacher(key, (size,), np.int8))
            value = found = self._combined(value)
        self._at_x = jax.tree.map(np.asarray, found)
        return jax.tree.map(np.asarray, value)

    def _value_of(self, y: Any) -> Any:
        """The value of a layer that has the solution y."""
        assert self._made is not None
        arguments, theta, (rest, kwargs) = self._made.arguments, self._x, self._rest
        if self.maker == "make_perturbed_argmax":
            return y

        def objective(y: Any) -> Any:
            if arguments["objective"] is not None:
                return arguments["objective"](theta, y, *rest, **kwargs)
            return jnp.sum(_joined(jax.tree.map(jnp.multiply, theta, y)))

        if self.maker == "make_perturbed_max":
            return objective(y)
        loss = objective(y) - objective(self._y_true)
        return loss if arguments["maximize"] else -loss

    def spacings(self) -> list[tuple[str, np.dtype, float]]:
        """Of each leaf, its name, its dtype and the least sigma in spacings of numbers near x."""
        scales = _scales.scale_leaves(self.settings.sigma, self._x, self.leaves, self.names)
        scales = _scales.one_each(scales, self.leaves)
        return [
            (name, leaf.dtype, _scales.spacings(scale, leaf))
            for name, leaf, scale in zip(self.names, self.leaves, scales, strict=True)
        ]

    def least_samples(self) -> int:
        """The least power of two that makes two groups."""
        return next(2**k for k in range(1, 31) if self.choose(2**k).num_groups >= 2)

    def is_possible(self, sampler: Any, degree: int) -> bool:
        """Whether the noise allows these two, and the samples tell the fit."""
        if self.num_samples < _PER_COEFFICIENT[degree] * num_features(self.dim, degree):
            return False
        try:
            return self.choose(self.num_samples, sampler=sampler, degree=degree).degree == degree
        except (TypeError, ValueError):
            return False

    def choose(self, num_samples: int, **changes: Any) -> Choice:
        """Sampler, degree and groups for a number of samples."""
        settings = self.settings
        asked = {"sampler": settings.sampler, "degree": settings.degree, **changes}
        asked["num_outputs"] = 1 if self._signs is not None else self._num_outputs
        # For thousands of numbers of samples, several times each.
        name = num_samples, *asked.values()
        if name not in self._choices:
            self._choices[name] = choose(num_samples, self.dim, settings.noise, **asked)
        return self._choices[name]

    def law(self, num_samples: int, **changes: Any) -> Law:
        """The law that the variance follows as long as the choice is the same."""
        choice = self.choose(num_samples, **changes)
        fitted = bool(choice.degree and self.settings.use_baseline)
        if isinstance(choice.sampler, Sobol | OrthogonalArray):
            slope = _variance_law.FITTED_NETS if fitted else _variance_law.NETS
            return Law(("nets", choice.degree), *slope)
        slope = _variance_law.FITTED if fitted else _variance_law.FIXED
        return Law((type(choice.sampler).__name__, choice.degree), *slope)

    def pilot(self) -> Pilot:
        """One estimate, with the samples of the function as it is."""
        degrees = () if self._made else tuple(self._other_degrees())
        value, error, gradients, values, freedoms = self._estimates(
            self.num_samples, 1, {}, True, degrees
        )
        values, *seen = (one[0].reshape(self.num_samples, -1) for one in values)
        equal = equal_rows(values, self._at_x)
        if self._made is not None:
            # That was of the solver. The layer's own gradient has no spread inside of a run.
            runs, found = self._runs_of_layer(*self._cut(self.num_samples), {})
            value = jax.tree.map(lambda v: np.mean(v, axis=0), found)
            count = runs.num_runs
            error = jax.tree.map(lambda v: np.std(v, axis=0, ddof=1) / count**0.5, found)
            better = self._share_better(values, *seen) if seen else (0.0, 0.0)
            return Pilot(value, error, values, equal, runs, {}, better)
        # Of a default with nets it takes more, smaller ones than g does: as several runs of g with
        # fewer samples would.
        count = (freedoms[0] + 1) // self.choose(self.num_samples).num_groups or 1
        laws = self.law(self.num_samples), *(self.law(self.num_samples, degree=d) for d in degrees)
        runs = []
        for law, (gradient, errors), freedom in zip(laws, gradients, freedoms, strict=True):
            found = _variance_law.pooled(self.num_samples, gradient, errors**2, freedom, law)
            runs.append(found.split(count))
        value, error = (jax.tree.map(lambda v: v[0], tree) for tree in (value, error))
        return Pilot(
            value, error, values, equal, runs[0], dict(zip(degrees, runs[1:], strict=True))
        )

    def _share_better(self, solutions: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
        """Of pairs of solutions, and of samples, those for which another solution is better.

        An exact solver has none: <s_i, y_i> is at least <s_i, y_j>, but for rounding. Pairs that
        differ too little to tell are left out.
        """
        assert self._made is not None
        told = np.isfinite(solutions).all(axis=1) & ~np.isnan(scores).any(axis=1)
        y, s = (rows[told][:_COMPARED] for rows in (solutions, scores))
        s = np.where(np.isfinite(s), s, 0)  # what is masked, no solution has
        objectives = s @ y.T  # of scores i and solution j
        losses = objectives - np.diagonal(objectives)[:, None]
        if not self._made.arguments["maximize"]:
            losses = -losses
        size = np.abs(s) @ np.abs(y).T
        size = size + np.diagonal(size)[:, None]
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in self.leaves)
        least = max(_SURELY_BETTER, 16 * eps) * size
        better, worse = losses > least, losses < -least
        pairs = max(int(np.sum(better | worse)), 1)
        return float(np.sum(better) / pairs), float(np.mean(better.any(axis=1))) if len(s) else 0.0

    def _other_degrees(self) -> Iterator[int]:
        """Those that the samples tell, and for which no others would be drawn."""
        choice = self.choose(self.num_samples)
        for degree in range(3) if self.settings.use_baseline and self.dim else ():
            if degree != choice.degree and self.is_possible(choice.sampler, degree):
                other = self.choose(self.num_samples, sampler=choice.sampler, degree=degree)
                if other.sampler == choice.sampler or isinstance(choice.sampler, Independent):
                    yield degree

    def runs(self, num_samples: int, count: int, keep: bool = False, **changes: Any) -> Runs:
        """Some estimates, each with the sampler and degree that g would have with as many."""
        law = self.law(num_samples, **changes)
        choice = self.choose(num_samples, **changes)
        changes = {"sampler": choice.sampler, "degree": choice.degree}
        if self._made is not None:
            return self._runs_of_layer(num_samples, count, changes)[0]
        _, value_errors, [(gradients, errors)], values, [freedom] = self._estimates(
            num_samples, count, changes, keep
        )
        if keep:
            self.kept_variance = variance_of(values[0].reshape(count * num_samples, -1))
        squares = [v.reshape(count, -1) ** 2 for v in jax.tree.leaves(value_errors)]
        variances = num_samples * np.concatenate(squares, axis=1).sum(axis=1)
        self.most_variance = max(self.most_variance, float(np.nanmax(variances, initial=0)))
        return _variance_law.pooled(num_samples, gradients, errors**2, freedom, law)

    def _cut(self, num_samples: int) -> tuple[int, int]:
        """A number of samples as so many runs of so many, whose spread can be told."""
        return (num_samples, 1) if self._made is None else (num_samples // _CUT - 1, _CUT)

    def runs_of(self, num_samples: int, **changes: Any) -> Runs:
        """`runs` that take this number of samples together, and keep values."""
        return self.runs(*self._cut(num_samples), keep=True, **changes)

    def _runs_of_layer(
        self, num_samples: int, count: int, changes: dict[str, Any]
    ) -> tuple[Runs, Any]:
        """Gradients of a layer by its own derivative rules, and its values at all runs."""
        law = self.law(num_samples, **changes)
        self._key, key = jax.random.split(self._key)
        keys = jax.random.split(key, count)
        name = num_samples, count, repr(changes)
        if name not in self._programs:
            self._programs[name] = self._compiled_layer(keys, num_samples, changes), []
        program, sigma = self._programs[name][0], self.settings.sigma
        values, gradients = self._timed(program, (keys, self.leaves, sigma), num_samples)
        return _variance_law.pooled(num_samples, gradients, None, 0, law), values

    def _compiled_layer(self, keys: Array, num_samples: int, changes: dict[str, Any]) -> Any:
        assert self._made is not None
        # A degree that is chosen for each number of samples serves derivatives of this one.
        again = functools.partial(self._made.again, num_samples=num_samples, **changes)

        def value(leaves: list[Array], key: Array, sigma: Any) -> tuple[Array, Any]:
            found = again(sigma=sigma)(key, self._merge(leaves), *self._args, **self._kwargs)
            found = self._combined(found)
            flat = _joined(found)
            return (flat[0] if flat.size == 1 else flat), found

        derive = jax.grad if self._num_outputs == 1 or self._signs is not None else jax.jacrev

        def one(key: Array, leaves: list[Array], sigma: Any) -> Any:
            gradient, found = derive(value, has_aux=True)(leaves, key, sigma)
            return found, _joined(gradient)

        return compiled_map(one, keys, self.leaves, self.settings.sigma)

    def _timed(self, program: Any, args: tuple[Array, Any, Any], num_samples: int) -> Any:
        """The results of a program, in double precision; evaluations and seconds are noted."""
        start, keys = time.perf_counter(), args[0]
        found = jax.block_until_ready(own_exceptions(program)(*args))
        seconds = time.perf_counter() - start
        # Few samples of degree 0 take the value at x as well.
        self.num_evaluations += (num_samples + 1) * len(keys)
        if num_samples * len(keys) >= self._largest:
            self._largest = num_samples * len(keys)
            self.seconds = seconds / self._largest
        return jax.tree.map(wide, found)

    def _estimates(
        self,
        num_samples: int,
        count: int,
        changes: dict[str, Any],
        keep: bool,
        degrees: tuple[int, ...] = (),
    ) -> tuple[Any, ...]:
        """Results of `estimate` at new keys, stacked, in double precision.

        The value, its errors; for g and for further degrees pairs of the gradients and their errors
        as rows; the values of all samples, if they are to be kept; and the degrees of freedom of
        each.
        """
        self._key, key = jax.random.split(self._key)
        keys = jax.random.split(key, count)
        name = num_samples, count, repr(changes), keep
        if name not in self._programs:
            self._programs[name] = self._compiled(keys, num_samples, changes, keep, degrees)
        program, freedoms = self._programs[name]
        args = keys, self.leaves, self._sampled_settings.sigma
        return *self._timed(program, args, num_samples), freedoms

    def _compiled(
        self,
        keys: Array,
        num_samples: int,
        changes: dict[str, Any],
        keep: bool,
        degrees: tuple[int, ...],
    ) -> tuple[Any, list[int]]:
        def fun(x: Any) -> Any:
            value = self._value_at(x)
            if not keep:
                return value, ()
            # A value that is combined is no solution.
            seen = [] if self._seen is None or self._signs is not None else [self._seen(x)]
            return value, tuple(map(_joined, (value, *seen)))

        changes = {"num_samples": num_samples, "has_aux": True, **changes}
        settings = dataclasses.replace(self._sampled_settings, **changes)
        freedoms: list[int] = []

        def one(key: Array, leaves: list[Array], sigma: Any) -> Any:
            g = PerturbedFun(fun, dataclasses.replace(settings, sigma=sigma))
            found = estimates_by_degree(g, degrees, key, self._sampled_at(leaves), (), {})
            freedoms[:] = [each.degrees_of_freedom for each in found]
            gradients = [(_joined(v.gradient), _joined(v.gradient_error)) for v in found]
            return found[0].value, found[0].value_error, gradients, found[0].aux

        return compiled_map(one, keys, self.leaves, settings.sigma), freedoms


def _origin(g: Any) -> tuple[Any, Settings, Made | None]:
    """The function that is perturbed, how, and, if g is a layer, how that was made."""
    if isinstance(g, PerturbedFun):
        return g.fun, g.settings, None
    if isinstance(g, Made) and g.maker.__name__ not in _OTHERS:
        known = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(**{k: v for k, v in g.arguments.items() if k in known})
        if "fun" in g.arguments:  # the derivatives are those of a perturbed function
            return g.arguments["fun"], settings, None
        return g.arguments["argmax_fun"], settings, g
    raise TypeError(
        "g must be what make_perturbed_fun, make_straight_through_fun, make_perturbed_argmax, "
        f"make_perturbed_max or make_fenchel_young_loss returned, got {kind_of_fun(g)}"
    )


def equal_rows(values: np.ndarray, value_at_x: Any) -> np.ndarray:
    """Of each row, whether it is the value at x, but for rounding."""
    same, start = np.ones(len(values), bool), 0
    for leaf in jax.tree.leaves(value_at_x):
        rows = values[:, start : start + leaf.size]
        start += leaf.size
        same &= nearly_equal(rows, np.ravel(leaf)).all(axis=1)
    return same


def variance_of(values: np.ndarray) -> float:
    """Of rows of values, that of a row; infinite if there is no finite one."""
    rows = values[np.isfinite(values).all(axis=1)]
    return float(np.sum(np.var(rows, axis=0))) if len(rows) else math.inf


def nearly_equal(values: Any, at_x: Any) -> Any:
    """Which values, of numpy or JAX, are the ones at x, but for rounding in the dtype of these."""
    numbers = at_x.astype(values.dtype)
    equal = values == numbers
    if not jnp.issubdtype(at_x.dtype, jnp.inexact):
        return equal
    size = abs(numbers)
    slack = (8 * float(jnp.finfo(at_x.dtype).eps) * size).astype(size.dtype)
    with np.errstate(invalid="ignore"):
        # Near an infinite value there is no other.
        return equal | ((abs(values - numbers) <= slack) & (size < np.inf))


def _joined(tree: Any) -> Array:
    """All numbers of a pytree, one after another."""
    leaves = [jnp.ravel(v) for v in jax.tree.leaves(tree)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(np.float32, *[v.dtype for v in leaves])
    return jnp.concatenate([v.astype(dtype) for v in leaves]) if leaves else jnp.zeros((0,))
