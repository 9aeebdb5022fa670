"""A perturbed function at a point, run again and again with other samples than its own.

The one place of `diagnose` that looks at what a perturbed function was made of.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import _checks
from .._perturb import PerturbedFun
from ..estimator._default_rule import Choice, choose_sampler
from ..estimator._surrogate import num_features
from ..sampling._independent import Independent
from ..sampling._nets import OrthogonalArray, Sobol
from ..scale import _scales
from ..scale._matrices import is_matrix
from . import _variance_law
from ._standard_errors import estimates_by_degree
from ._variance_law import Law, Runs

# A pilot of fewer samples tells too little to go by.
LEAST_SAMPLES = 16
# Samples for each coefficient of a fit that is tried for comparison.
_PER_COEFFICIENT = 20
# Up to this many numbers, the whole Jacobian is looked at; beyond, that of a random combination.
WHOLE = 2**16


class Pilot(NamedTuple):
    """The first estimate.

    Attributes:
      value: the smoothed value.
      value_error: its standard errors.
      values: what was averaged, (samples, outputs).
      runs: the gradient.
      degrees: the gradient by surrogates of other degrees, from the same evaluations.
    """

    value: Any
    value_error: Any
    values: np.ndarray
    runs: Runs
    degrees: dict[int, Runs]


class Subject:
    """A perturbed function at a point.

    Attributes:
      name: of the function that is smoothed.
      settings: how it is perturbed.
      leaves: those of x that are perturbed.
      names: of these.
      fixed: the names of those that are not, with their dtypes.
      dim: number of coordinates.
      num_evaluations: how many there were so far, at most.
      seconds: that an evaluation took in the largest program so far.
    """

    def __init__(self, g: Any, key: Array, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """Checks what came."""
        if not isinstance(g, PerturbedFun):
            kind = getattr(g, "__name__", type(g).__name__)
            wraps = isinstance(getattr(g, "__wrapped__", None), PerturbedFun)
            kind += ", a function that wraps it" if wraps else ""
            raise TypeError(f"g must be what make_perturbed_fun returned, got {kind}")
        fun, settings = g.fun, g.settings
        if settings.num_samples < LEAST_SAMPLES:
            raise ValueError(
                f"g has num_samples={settings.num_samples}, but a diagnosis needs a pilot of at "
                f"least {LEAST_SAMPLES}: diagnose the same function with num_samples=1000, for "
                "example"
            )
        if isinstance(key, Tracer) or _checks.is_traced((x, args, kwargs, settings.sigma)):
            raise TypeError("diagnose needs known numbers, got traced ones; call it outside jit")
        self.settings = settings
        self._key = _checks.check_key(key, x)
        self._x = x
        self.leaves, self.names, self._merge = _checks.perturbed_leaves(x)
        self.fixed = [
            (_checks.leaf_name(path), jnp.result_type(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(x)
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]
        self.dim = _checks.num_elements(self.leaves)
        self.name = getattr(fun, "__name__", type(fun).__name__)
        self.num_evaluations = 0
        self.seconds = float("nan")
        self._num_outputs = 1
        self._largest = 0
        self._signs: np.ndarray | None = None
        self._programs: dict[Any, tuple[Any, list[int]]] = {}

        def value_at(x: Any) -> Any:
            value = fun(x, *args, **kwargs)
            value = value[0] if settings.has_aux else value
            if self._signs is None:
                return value
            return self._signs.astype(np.float32) @ _joined(value)

        self._value_at = value_at

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
        value = jax.tree.map(np.asarray, self._value_at(self._x))
        size = self._num_outputs = sum(v.size for v in jax.tree.leaves(value))
        if size == 1 or size * self.dim <= WHOLE:
            return value
        key = jax.random.fold_in(self._key, 0)
        self._signs = np.asarray(jax.random.rademacher(key, (size,), np.int8))
        return self._signs.astype(np.float32) @ np.asarray(_joined(value))

    def spacings(self) -> list[tuple[str, np.dtype, float]]:
        """Of each leaf, its name, its dtype and the least sigma in spacings of numbers near x."""
        scales = _scales.scale_leaves(self.settings.sigma, self._x, self.leaves, self.names)
        scales = scales * (len(self.leaves) if len(scales) == 1 else 1)
        found = []
        for name, leaf, scale in zip(self.names, self.leaves, scales, strict=True):
            values, sigma = np.asarray(leaf), np.asarray(scale, np.float64)
            if is_matrix(scale, leaf):
                square = sigma.reshape(leaf.size, leaf.size)
                sigma = np.linalg.norm(square, axis=1).reshape(leaf.shape)
            with np.errstate(all="ignore"):
                spacing = np.spacing(np.abs(values)).astype(np.float64)
                ratios = np.where(np.isfinite(spacing), sigma / spacing, np.inf)
            found.append((name, leaf.dtype, float(np.min(ratios, initial=np.inf))))
        return found

    def least_samples(self) -> int:
        """The least power of two that makes two groups."""
        return next(2**k for k in range(1, 31) if self.choose(2**k).num_groups >= 2)

    def is_possible(self, sampler: Any, degree: int) -> bool:
        """Whether the noise allows these two, and the samples tell the fit."""
        features = num_features(self.dim, degree)
        if degree and self.num_samples < _PER_COEFFICIENT * features:
            return False
        try:
            return self.choose(self.num_samples, sampler=sampler, degree=degree).degree == degree
        except (TypeError, ValueError):
            return False

    def choose(self, num_samples: int, **changes: Any) -> Choice:
        """Sampler, degree and groups for a number of samples."""
        settings = dataclasses.replace(self.settings, **changes)
        return choose_sampler(
            num_samples,
            self.dim,
            settings.noise,
            sampler=settings.sampler,
            degree=settings.degree,
        )

    def law(self, num_samples: int, **changes: Any) -> Law:
        """The law that the variance follows as long as the choice is the same."""
        choice = self.choose(num_samples, **changes)
        fitted = bool(choice.degree and self.settings.use_baseline)
        if isinstance(choice.sampler, Sobol | OrthogonalArray):
            return Law(("nets", choice.degree), *_variance_law.NETS)
        slope = _variance_law.FITTED if fitted else _variance_law.FIXED
        return Law((type(choice.sampler).__name__, choice.degree), *slope)

    def pilot(self) -> Pilot:
        """One estimate, with the samples of the function as it is."""
        degrees = tuple(self._other_degrees())
        value, error, gradients, values, freedoms = self._estimates(
            self.num_samples, 1, {}, True, degrees
        )
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
            value,
            error,
            values[0].reshape(self.num_samples, -1),
            runs[0],
            dict(zip(degrees, runs[1:], strict=True)),
        )

    def _other_degrees(self) -> Iterator[int]:
        """Those that the samples tell, and for which no others would be drawn."""
        choice = self.choose(self.num_samples)
        for degree in range(3) if self.settings.use_baseline and self.dim else ():
            if degree != choice.degree and self.is_possible(choice.sampler, degree):
                other = self.choose(self.num_samples, sampler=choice.sampler, degree=degree)
                if other.sampler == choice.sampler or isinstance(choice.sampler, Independent):
                    yield degree

    def runs(self, num_samples: int, count: int, **changes: Any) -> Runs:
        """Some estimates, each with the sampler and degree that g would have with as many."""
        law = self.law(num_samples, **changes)
        choice = self.choose(num_samples, **changes)
        changes = {"sampler": choice.sampler, "degree": choice.degree}
        _, _, [(gradients, errors)], _, [freedom] = self._estimates(
            num_samples, count, changes, False
        )
        return _variance_law.pooled(num_samples, gradients, errors**2, freedom, law)

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
        start = time.perf_counter()
        found = jax.block_until_ready(program(keys, self.leaves))
        seconds = time.perf_counter() - start
        # Few samples of degree 0 take the value at x as well.
        self.num_evaluations += (num_samples + 1) * count
        if num_samples * count >= self._largest:
            self._largest = num_samples * count
            self.seconds = seconds / self._largest
        return *(jax.tree.map(_wide, part) for part in found), freedoms

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
            return value, _joined(value) if keep else ()

        changes = {"num_samples": num_samples, "has_aux": True, **changes}
        g = PerturbedFun(fun, dataclasses.replace(self.settings, **changes))
        freedoms: list[int] = []

        def one(key: Array, leaves: list[Array]) -> Any:
            found = estimates_by_degree(g, degrees, key, self._merge(leaves), (), {})
            freedoms[:] = [each.degrees_of_freedom for each in found]
            gradients = [(_joined(v.gradient), _joined(v.gradient_error)) for v in found]
            return found[0].value, found[0].value_error, gradients, found[0].aux

        def all_of(keys: Array, leaves: list[Array]) -> Any:
            return jax.lax.map(lambda key: one(key, leaves), keys)

        return jax.jit(all_of).lower(keys, self.leaves).compile(), freedoms


def _joined(tree: Any) -> Array:
    """All numbers of a pytree, one after another."""
    leaves = [jnp.ravel(v) for v in jax.tree.leaves(tree)]
    dtype = jnp.result_type(np.float32, *[v.dtype for v in leaves])
    return jnp.concatenate([v.astype(dtype) for v in leaves]) if leaves else jnp.zeros((0,))


def _wide(value: Any) -> np.ndarray:
    """In double precision."""
    value = np.asarray(value)
    return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)
