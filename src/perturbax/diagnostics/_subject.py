"""A perturbed function at a point, run again and again with other samples than its own."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks, _leaves
from .._call import Settings
from .._perturb import PerturbedFun
from .._types import Fun
from ..estimator._default_rule import Choice, choose
from ..estimator._surrogate import num_features
from ..sampling._independent import Independent
from ..sampling._nets import OrthogonalArray, Sobol
from ..scale import _scales
from ..tracing._compiled import compiled_map
from ..tracing._host_exceptions import own_exceptions
from . import _variance_law
from ._standard_errors import estimates_by_degree, freedom_left
from ._variance_law import Law, Runs
from ._words import wide

# A pilot of fewer samples tells too little to go by.
LEAST_SAMPLES = 16
# Samples for each coefficient of a fit that is tried for comparison, by degree. With fewer, eight
# nets of the pilot tell a fit more than two nets of as many samples would.
_PER_COEFFICIENT = {0: 0, 1: 20, 2: 10}
# From this share of samples on that equal fun(x), it is a plateau.
PLATEAU = 0.95
# Spacings of the numbers of x that sigma should be at least.
FEW_SPACINGS = 8
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
      better: of a layer whose objective is linear, the shares of pairs of solutions, and of
        samples, for which another solution is better.
    """

    value: Any
    value_error: Any
    values: np.ndarray
    equal: np.ndarray
    runs: Runs
    degrees: dict[int, Runs]
    better: tuple[float, float] = (0.0, 0.0)


class ManyEstimates(NamedTuple):
    """Results of `estimate` at some keys, a row each.

    Attributes:
      value: the smoothed value.
      value_error: its standard errors.
      gradients: pairs of gradients and their errors as rows, of g and of further degrees.
      kept: of all samples, what is to be kept.
      groups: how many groups of samples there are, of g and of further degrees.
      freedoms: degrees of freedom of the errors, likewise.
      present: how many samples are not missing.
    """

    value: Any
    value_error: Any
    gradients: list[tuple[Any, Any]]
    kept: tuple[Any, ...]
    groups: list[Any]
    freedoms: list[Any]
    present: Any


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

    # How many runs of a size tell their spread.
    least_runs: ClassVar[int] = 1

    def __init__(
        self,
        maker: str,
        fun: Fun,
        settings: Settings,
        key: Array,
        x: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        """Checks what came."""
        self.maker = maker
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
        self._fun, self._x, self._args, self._kwargs = fun, x, args, kwargs
        self.leaves, self.names, self._merge = _leaves.perturbed_leaves(x)
        # Where noise is added to, made of these leaves, and how.
        self._sampled_at, self._sampled_settings = self._merge, settings
        self.fixed = [
            (_leaves.leaf_name(path), jnp.result_type(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(x)
            if not _leaves.is_floating(leaf)
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
        self._programs: dict[Any, Any] = {}

    def _sampled(self, point: Any) -> Any:
        """What the samples are values of."""
        value = self._fun(point, *self._args, **self._kwargs)
        return value[0] if self.settings.has_aux else value

    def _seen(self, point: Any) -> list[Array]:
        """What the pilot keeps of a sample beside its value."""
        del point
        return []

    def _value_of(self, found: Any) -> Any:
        """The value, from that of a sample."""
        return found

    def _value_at(self, point: Any) -> Any:
        return self._combined(self._sampled(point))

    def _combined(self, value: Any) -> Any:
        """The value, or its numbers with random signs in one sum."""
        if self._signs is None:
            return value
        return self._signs.astype(np.float32) @ joined(value)

    @property
    def num_samples(self) -> int:
        """Of the function as it is."""
        return self.settings.num_samples

    @property
    def gradient_of(self) -> str:
        """What the gradient is of."""
        if self._signs is not None:
            return f"the sum of {self._signs.size:,} numbers with random signs"
        return "the value" if self._num_outputs == 1 else f"all {self._num_outputs:,} numbers"

    def value_at_x(self) -> Any:
        """fun(x), by one evaluation; decides whether outputs are combined from now on."""
        self.num_evaluations += 1
        found = self._value_at(self._sampled_at(self.leaves))
        value = self._value_of(found)
        size = self._num_outputs = sum(jnp.size(v) for v in jax.tree.leaves(value))
        if not size:
            raise ValueError(f"{self.name} returns no numbers, so there is nothing to diagnose")
        if size > 1 and size * self.dim > WHOLE:
            key = jax.random.fold_in(self._key, 0)
            self._signs = np.asarray(jax.random.rademacher(key, (size,), np.int8))
            value = found = self._combined(value)
        self._at_x = jax.tree.map(np.asarray, found)
        return jax.tree.map(np.asarray, value)

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
        degrees = tuple(self._other_degrees())
        found = self._estimates(self.num_samples, 1, {}, True, degrees)
        [values] = self._rows(found.kept)
        # Of a default with nets it takes more, smaller ones than g does: as several runs of g with
        # fewer samples would.
        count = int(found.groups[0][0]) // self.choose(self.num_samples).num_groups or 1
        laws = self.law(self.num_samples), *(self.law(self.num_samples, degree=d) for d in degrees)
        runs = []
        for law, (gradient, errors), freedom in zip(
            laws, found.gradients, found.freedoms, strict=True
        ):
            one = _variance_law.pooled(self.num_samples, gradient, errors**2, freedom, law)
            runs.append(one.split(count))
        value, error = (
            jax.tree.map(lambda v: v[0], tree) for tree in (found.value, found.value_error)
        )
        others = dict(zip(degrees, runs[1:], strict=True))
        return Pilot(value, error, values, equal_rows(values, self._at_x), runs[0], others)

    def _rows(self, values: tuple[Any, ...]) -> list[np.ndarray]:
        """What the pilot kept, with a row for each sample."""
        return [one[0].reshape(self.num_samples, -1) for one in values]

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
        found = self._estimates(num_samples, count, changes, keep)
        if keep:
            self.kept_variance = variance_of(found.kept[0].reshape(count * num_samples, -1))
        squares = [v.reshape(count, -1) ** 2 for v in jax.tree.leaves(found.value_error)]
        variances = found.present * np.concatenate(squares, axis=1).sum(axis=1)
        self.most_variance = max(self.most_variance, float(np.nanmax(variances, initial=0)))
        [(gradients, errors)], [freedom] = found.gradients, found.freedoms
        if self.settings.missing == "drop":  # runs of which nothing is left
            left = found.present > 0
            gradients, errors, freedom = gradients[left], errors[left], freedom[left]
        return _variance_law.pooled(num_samples, gradients, errors**2, freedom, law)

    def _cut(self, num_samples: int) -> tuple[int, int]:
        """A number of samples as so many runs of so many, whose spread can be told."""
        return num_samples, 1

    def runs_of(self, num_samples: int, **changes: Any) -> Runs:
        """`runs` that take this number of samples together, and keep values."""
        return self.runs(*self._cut(num_samples), keep=True, **changes)

    def _run(
        self,
        name: tuple[object, ...],
        compiled: Callable[[Array], Any],
        num_samples: int,
        count: int,
        sigma: Any,
    ) -> Any:
        """Results at new keys, in double precision; evaluations and seconds are noted.

        Of a program of keys, leaves and sigma, which is compiled, for such keys, if none of the
        name was before.
        """
        self._key, key = jax.random.split(self._key)
        keys = jax.random.split(key, count)
        if name not in self._programs:
            self._programs[name] = compiled(keys)
        start = time.perf_counter()
        program = own_exceptions(self._programs[name])
        found = jax.block_until_ready(program(keys, self.leaves, sigma))
        seconds = time.perf_counter() - start
        # Few samples of degree 0 take the value at x as well.
        self.num_evaluations += (num_samples + 1) * count
        if num_samples * count >= self._largest:
            self._largest = num_samples * count
            self.seconds = seconds / self._largest
        return jax.tree.map(wide, found)

    def _estimates(
        self,
        num_samples: int,
        count: int,
        changes: dict[str, Any],
        keep: bool,
        degrees: tuple[int, ...] = (),
    ) -> ManyEstimates:
        """`estimate` at new keys, of g and further degrees, in double precision."""
        name = num_samples, count, repr(changes), keep
        compiled = partial(
            self._compiled, num_samples=num_samples, changes=changes, keep=keep, degrees=degrees
        )
        return self._run(name, compiled, num_samples, count, self._sampled_settings.sigma)

    def _compiled(
        self,
        keys: Array,
        num_samples: int,
        changes: dict[str, Any],
        keep: bool,
        degrees: tuple[int, ...],
    ) -> Any:
        def fun(x: Any) -> Any:
            value = self._value_at(x)
            if not keep:
                return value, ()
            seen = self._seen(x) if self._signs is None else []  # what is combined is no solution
            return value, tuple(map(joined, (value, *seen)))

        changes = {"num_samples": num_samples, "has_aux": True, **changes}
        settings = dataclasses.replace(self._sampled_settings, **changes)

        def one(key: Array, leaves: list[Array], sigma: Any) -> Any:
            g = PerturbedFun(fun, dataclasses.replace(settings, sigma=sigma))
            found = estimates_by_degree(g, degrees, key, self._sampled_at(leaves), (), {})
            missing = 0 if found[0].missing is None else found[0].missing
            return ManyEstimates(
                value=found[0].value,
                value_error=found[0].value_error,
                gradients=[(joined(v.gradient), joined(v.gradient_error)) for v in found],
                kept=found[0].aux,
                groups=[jnp.asarray(v.degrees_of_freedom + 1) for v in found],
                freedoms=list(map(freedom_left, found)),
                present=jnp.asarray(num_samples - missing),
            )

        return compiled_map(one, keys, self.leaves, settings.sigma)


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


def joined(tree: Any) -> Array:
    """All numbers of a pytree, one after another."""
    leaves = [jnp.ravel(v) for v in jax.tree.leaves(tree)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(np.float32, *[v.dtype for v in leaves])
    return jnp.concatenate([v.astype(dtype) for v in leaves]) if leaves else jnp.zeros((0,))
