"""Shared helpers of the tests: a statistical test of unbiasedness, and small comparisons.

The statistical protocol, once for all tests. An estimator is a function of a PRNG key that
returns a pytree of arrays, the exact expectation is the same pytree in float64.

1. The estimator is run at ``num_keys`` keys, split from one literal seed (threefry, so that the
   numbers do not depend on the platform's default generator). Sums are kept in float64.
2. Each component gets ``z = (mean - exact) / (sd / sqrt(num_keys))``. All ``abs(z) <= 5`` passes.
3. Otherwise a second, independent set of four times as many keys decides: the test fails if the
   same component is beyond 5 again, on the same side. Under the null hypothesis one comparison
   fails with probability 5.7e-7 * 2.9e-7 = 1.6e-13.
4. A component that is exact but for rounding (its standard deviation is below a thousandth of the
   scale) must equal the exact number to 1e-6 and 5 standard errors. Rounding has no normal law.
5. A number that is not finite fails.
6. **A test without power fails.** A bias is caught by stage one with probability .999 if it is at
   least ``(5 + 3.09) * sd / sqrt(num_keys)``. This detectable bias, divided by the array's
   *scale*, has to be below the promise of the test (say 2 % for a gradient); and no test may
   promise less than `LEAST_PROMISES` says. The scale of an array
   is its largest exact magnitude, so that an entry that happens to be small is held to the accuracy
   of its neighbours; an array of zeros has no scale of its own and needs one.
7. The normal law of z needs a mean that is close to normal: the skewness of the mean,
   ``skewness / sqrt(num_keys)``, must be below 0.2. The tails of z at 5 are off by a factor of
   about ``exp(skewness_of_mean * 5**3 / 3)``; at the limit that makes 1e-3 * 2e-5 of the 1.6e-13.
   Heavily skewed weights (a third derivative, few keys) would raise false alarms without it.
"""

import dataclasses
import functools
import importlib
import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

enable_x64 = jax.enable_x64

Z_LIMIT = 5.0
Z_OF_POWER = 3.09  # the normal quantile of .999
SKEWNESS_LIMIT = 0.2
ROUNDING = 1e-3
CONSTANT_TOLERANCE = 1e-6
SECOND_STAGE_FACTOR = 4
SECOND_STAGE_SEED = 1_000_000  # added to the seed of stage one
# The largest relative bias that a test may leave unnoticed, by the name of the quantity: third
# derivatives 15 %, second ones 10 %, values 1 %. Under any other name, a first derivative, 5 %.
LEAST_PROMISES = {
    "value": 0.01,
    "hessian": 0.10,
    "mixed": 0.10,
    "dsigma2": 0.10,
    "third": 0.15,
}
OTHER_PROMISES = 0.05


def _options(**options: Any) -> dict[str, Any]:
    """Those that `conftest.py` has set to less than users have."""
    return {name: v for name, v in options.items() if name in os.environ.get("XLA_FLAGS", "")}


# How XLA compiles for users: for what measures programs.
AS_FOR_USERS = _options(xla_backend_optimization_level=3, xla_cpu_use_fusion_emitters=True)
# For what runs longer than it takes to compile: statistical tests take two thirds to three quarters
# of the time that they take as for users, or without any.
FOR_LONG_RUNS = _options(xla_backend_optimization_level=1)
LONG = 2**13  # keys
# Quantities of `derivatives`, up to an order.
FIRST_ORDER = ("value", "gradient", "dsigma")
SECOND_ORDER = (*FIRST_ORDER, "hessian", "mixed", "dsigma2")
ALL_ORDERS = (*SECOND_ORDER, "third")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one run over many keys says about one array of an estimate.

    Attributes:
        name: The path of the array in the pytree, ``"['gradient']"``.
        mean: Its mean over the keys.
        exact: Its expectation, as claimed.
        deviation: Its standard deviation from key to key.
        skewness: The skewness of the mean over the keys (0 where the array is constant).
        z: ``(mean - exact)`` in standard errors (0 or infinite where the array is constant).
        scale: The magnitude that relative errors refer to.
        num_keys: The number of keys.
    """

    name: str
    mean: np.ndarray
    exact: np.ndarray
    deviation: np.ndarray
    skewness: np.ndarray
    z: np.ndarray
    scale: float
    num_keys: int

    @property
    def largest_z(self) -> float:
        """The z of largest magnitude, with its sign; NaN if any is."""
        flat = self.z.ravel()
        if flat.size == 0:
            return 0.0
        return float(flat[np.argmax(np.where(np.isnan(flat), np.inf, np.abs(flat)))])

    @property
    def detectable(self) -> float:
        """The relative bias that is caught with probability .999, at the worst component."""
        worst = np.max(self.deviation, initial=0.0)
        return float((Z_LIMIT + Z_OF_POWER) * worst / np.sqrt(self.num_keys) / self.scale)

    @property
    def relative_bias(self) -> float:
        """The largest observed difference from the exact array over its scale."""
        return float(np.max(np.abs(self.mean - self.exact), initial=0.0) / self.scale)

    def __str__(self) -> str:
        """One line: name, z, observed and detectable relative bias."""
        return (
            f"{self.name or 'estimate'}: z {self.largest_z:+.2f}, "
            f"relative bias {self.relative_bias:.2g} (detectable {self.detectable:.2g}), "
            f"skewness {np.max(np.abs(self.skewness), initial=0.0):.2g}, {self.num_keys} keys"
        )


def measure(
    estimator: Callable[..., Any],
    exact: Any,
    *,
    seed: int,
    num_keys: int,
    args: tuple = (),
    scale: Any = None,
    keys_per_batch: int = 1024,
    jit: bool = True,
    batched: Callable[..., Any] | None = None,
) -> list[Measurement]:
    """Runs ``estimator(key, *args)`` at many keys and compares its means with ``exact``.

    Args:
        estimator: A function of a key (and of ``args``) to a pytree of arrays.
        exact: The expectation of that pytree, float64.
        seed: The literal seed from which the keys are split.
        num_keys: How many keys, a multiple of ``keys_per_batch`` (or less than it).
        args: Further arguments. They enter the compiled program as arguments, whereas what
            ``estimator`` closes over becomes a constant of it.
        scale: A pytree prefix of ``exact`` with the magnitudes that relative errors refer to;
            None where the largest magnitude in ``exact`` shall be taken.
        keys_per_batch: How many keys are evaluated by one call, under ``jax.vmap``.
        jit: Whether that call is compiled.
        batched: What `over_keys` makes of ``estimator``, if it is there already.

    Returns:
        One `Measurement` for every array, in the order of the flattened pytree.
    """
    keys_per_batch = min(keys_per_batch, num_keys)
    if num_keys % keys_per_batch:
        raise ValueError(f"num_keys {num_keys} is not a multiple of {keys_per_batch}")
    paths, structure = jax.tree.flatten_with_path(exact)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    targets = [np.asarray(target, np.float64) for _, target in paths]
    scales = [
        float(np.max(np.abs(target), initial=0.0)) if given is None else float(given)
        for given, target in zip(_as_leaves(scale, exact), targets, strict=True)
    ]
    for name, target, number in zip(names, targets, scales, strict=True):
        if target.size and not number > 0:
            raise ValueError(f"the exact array {name} is zero everywhere: it needs a scale")

    batched = batched or over_keys(estimator, num_args=len(args), num_keys=num_keys, jit=jit)
    powers = [[np.zeros(target.shape) for _ in range(3)] for target in targets]
    for start in range(0, num_keys, keys_per_batch):
        keys = keys_of(np.uint32(seed), np.uint32(start), keys_per_batch)
        estimates = batched(keys, *args)
        if jax.tree.structure(estimates) != structure:
            raise ValueError(f"expected {structure}, got {jax.tree.structure(estimates)}")
        for name, estimate, target, sums in zip(
            names, jax.tree.leaves(estimates), targets, powers, strict=True
        ):
            if estimate.shape[1:] != target.shape:
                raise ValueError(
                    f"{name} has the shape {estimate.shape[1:]}, expected {target.shape}"
                )
            # Differences from the exact number keep the sums of powers free of cancellation.
            difference = np.asarray(estimate).astype(np.float64) - target
            power = np.ones_like(difference)
            for total in sums:
                power *= difference
                total += np.sum(power, axis=0)
    return [
        _summarise(name, target, [total / num_keys for total in sums], number, num_keys)
        for name, target, sums, number in zip(names, targets, powers, scales, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=2)
def keys_of(seed: Any, start: Any, count: int) -> Any:
    """Some of the keys that are split from the key of a seed.

    `jax.random.split` of each number of keys would be a program, and each slice of them another.

    Args:
        seed: The seed, uint32.
        start: The number of the first key, uint32.
        count: How many keys.

    Returns:
        An array of keys.
    """
    root = jax.random.key(seed, impl="threefry2x32")
    # Key i of `jax.random.split` is what folding in i makes.
    return jax.vmap(jax.random.fold_in, (None, 0))(root, start + jnp.arange(count, dtype="uint32"))


def over_keys(
    estimator: Callable[..., Any], *, num_args: int, num_keys: int, jit: bool = True
) -> Callable[..., Any]:
    """``estimator`` for a batch of keys, compiled with care where it will run for long.

    Args:
        estimator: As in `measure`.
        num_args: The number of its further arguments.
        num_keys: How many keys it will be given in all.
        jit: Whether it is compiled.

    Returns:
        A function of an array of keys and of the further arguments.
    """
    batched = jax.vmap(estimator, in_axes=(0,) + (None,) * num_args)
    if not jit:
        return batched
    return jax.jit(batched, compiler_options=FOR_LONG_RUNS if num_keys >= LONG else None)


def _as_leaves(prefix: Any, tree: Any) -> list:
    """Expands a pytree prefix (whose leaves are numbers or None) to one entry per leaf."""
    entries = []
    jax.tree.map(
        lambda entry, part: entries.extend([entry] * len(jax.tree.leaves(part))),
        prefix,
        tree,
        is_leaf=lambda node: node is None,
    )
    return entries


def _summarise(
    name: str, exact: np.ndarray, moments: list[np.ndarray], scale: float, num_keys: int
) -> Measurement:
    finite = np.isfinite(moments).all(axis=0)
    first, second, third = (np.where(finite, moment, np.nan) for moment in moments)
    variance = np.maximum(second - first**2, 0.0) * num_keys / max(num_keys - 1, 1)
    deviation = np.sqrt(variance)
    constant = deviation <= ROUNDING * scale
    safe = np.where(constant, 1.0, deviation)
    agrees = np.abs(first) <= CONSTANT_TOLERANCE * scale + Z_LIMIT * deviation / np.sqrt(num_keys)
    z = np.where(
        constant,
        np.where(agrees, 0.0, np.copysign(np.inf, first)),
        first / safe * np.sqrt(num_keys),
    )
    z = np.where(finite, z, np.nan)
    centred = third - 3.0 * first * second + 2.0 * first**3
    skewness = np.where(constant, 0.0, centred / safe**3 / np.sqrt(num_keys))
    return Measurement(name, first + exact, exact, deviation, skewness, z, scale, num_keys)


def find_biased(
    estimator: Callable[..., Any], exact: Any, *, seed: int, num_keys: int, **settings: Any
) -> tuple[list[Measurement], list[str]]:
    """Runs both stages of the protocol; returns stage one's measurements and what is biased.

    Args:
        estimator: As in `measure`.
        exact: As in `measure`.
        seed: The literal seed of the keys.
        num_keys: The number of keys of stage one.
        **settings: ``args``, ``scale``, ``keys_per_batch`` and ``jit`` of `measure`.

    Returns:
        The measurements of stage one, and the names of the arrays with a component that is
        not finite, or beyond the limit on the same side in both stages.
    """
    batched = over_keys(
        estimator,
        num_args=len(settings.get("args", ())),
        num_keys=num_keys,
        jit=settings.get("jit", True),
    )
    settings["batched"] = batched
    first = measure(estimator, exact, seed=seed, num_keys=num_keys, **settings)
    if not any(np.any(~(np.abs(one.z) <= Z_LIMIT)) for one in first):
        return first, []
    second = measure(
        estimator,
        exact,
        seed=seed + SECOND_STAGE_SEED,
        num_keys=SECOND_STAGE_FACTOR * num_keys,
        **settings,
    )
    biased = []
    for one, two in zip(first, second, strict=True):
        beyond = (np.abs(one.z) > Z_LIMIT) & (np.abs(two.z) > Z_LIMIT)
        confirmed = beyond & (np.sign(one.z) == np.sign(two.z))
        if np.any(confirmed | np.isnan(one.z) | np.isnan(two.z)):
            biased.append(one.name)
    return first, biased


def assert_unbiased(
    estimator: Callable[..., Any],
    exact: Any,
    *,
    seed: int,
    num_keys: int,
    promise: Any,
    args: tuple = (),
    scale: Any = None,
    keys_per_batch: int = 1024,
    jit: bool = True,
) -> list[Measurement]:
    """Fails if the mean of ``estimator(key, *args)`` differs from ``exact``, or might unnoticed.

    The protocol is described at the top of this module. One call checks all quantities that one
    function returns, so that they are compiled once.

    Args:
        estimator: A function of a key (and of ``args``) to a pytree of arrays.
        exact: The expectation of that pytree, float64.
        seed: The literal seed of the keys.
        num_keys: The number of keys of stage one.
        promise: The largest relative bias that may stay unnoticed; a number or a pytree prefix
            of ``exact``. At most what `LEAST_PROMISES` has for the name of the quantity.
        args: As in `measure`.
        scale: As in `measure`.
        keys_per_batch: As in `measure`.
        jit: As in `measure`.

    Returns:
        The measurements of stage one.

    Raises:
        AssertionError: If a component is biased, not finite, or the test has too little power.
        ValueError: If the promise is worth too little.
    """
    paths, _ = jax.tree.flatten_with_path(exact)
    for (path, _), promised in zip(paths, _as_leaves(promise, exact), strict=True):
        least = least_promise(path)
        if promised > least:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"promise {promised} for {name or 'estimate'}, at most {least}")
    measurements, biased = find_biased(
        estimator,
        exact,
        seed=seed,
        num_keys=num_keys,
        args=args,
        scale=scale,
        keys_per_batch=keys_per_batch,
        jit=jit,
    )
    complaints = [f"{name}: biased, or not finite" for name in biased]
    for one, promised in zip(measurements, _as_leaves(promise, exact), strict=True):
        if one.exact.size == 0 or one.name in biased:
            continue
        if not one.detectable <= promised:
            complaints.append(
                f"{one.name}: under-powered, a relative bias below {one.detectable:.3g} may stay "
                f"unnoticed, promised {promised:.3g}; raise num_keys"
            )
        if not np.all(np.abs(one.skewness) <= SKEWNESS_LIMIT):
            complaints.append(f"{one.name}: too skewed for a z test; raise num_keys")
    if complaints:
        raise AssertionError("\n".join([*complaints, "stage one:", *map(str, measurements)]))
    return measurements


def least_promise(path: tuple) -> float:
    """The largest relative bias that may stay unnoticed in the array at a path of the pytree."""
    names = [getattr(entry, "key", None) for entry in path]
    return next((LEAST_PROMISES[name] for name in names if name in LEAST_PROMISES), OTHER_PROMISES)


def assert_biased(
    estimator: Callable[..., Any],
    exact: Any,
    *,
    seed: int,
    num_keys: int,
    quantities: tuple[str, ...] = (),
    **settings: Any,
) -> list[Measurement]:
    """Fails unless the protocol of `assert_unbiased` finds a bias: the test of a wrong estimator.

    Args:
        estimator: A wrong estimator.
        exact: What it should estimate.
        seed: As in `assert_unbiased`.
        num_keys: As in `assert_unbiased`.
        quantities: The top-level entries of ``exact`` in each of which a bias must be found; none
            where any array will do.
        **settings: ``args``, ``scale``, ``keys_per_batch`` and ``jit`` of `assert_unbiased`.

    Returns:
        The measurements of stage one.

    Raises:
        AssertionError: If the bias was missed.
    """
    measurements, biased = find_biased(estimator, exact, seed=seed, num_keys=num_keys, **settings)
    prefixes = [f"[{quantity!r}]" for quantity in quantities] or [""]
    missed = [p for p in prefixes if not any(name.startswith(p) for name in biased)]
    if missed:
        raise AssertionError("\n".join([f"no bias found: {missed}", *map(str, measurements)]))
    return measurements


def twice(fun: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The function, with its value as aux beside it: one pass gives it with a derivative."""

    def both(*args: Any) -> tuple[Any, Any]:
        value = fun(*args)
        return value, value

    return both


def derivatives(estimate: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """What a test of unbiasedness runs: named derivatives of an estimate, all by one pass.

    Reverse mode inside, forward mode outside.

    Args:
        estimate: A function of a key, a vector x and a number sigma to a pytree of arrays.
        names: Some of `ALL_ORDERS`.

    Returns:
        A function of the same arguments to a dictionary with the names.
    """

    def first(key: Any, p: Any) -> tuple[Any, Any]:
        # One vector of all variables; its last entry is sigma.
        return jax.jacrev(twice(lambda p: estimate(key, p[:-1], p[-1])), has_aux=True)(p)

    def second(key: Any, p: Any) -> tuple[Any, Any]:
        def gradient(p: Any) -> tuple[Any, Any]:
            one, value = first(key, p)
            return one, (one, value)

        return jax.jacfwd(gradient, has_aux=True)(p)

    def third(key: Any, x: Any, sigma: Any) -> tuple[Any, Any]:
        def hessian(x: Any) -> tuple[Any, Any]:
            two, rest = second(key, jnp.append(x, sigma))
            return two, (two, *rest)

        return jax.jacfwd(hessian, has_aux=True)(x)

    def estimator(key: Any, x: Any, sigma: Any) -> dict[str, Any]:
        two = three = None
        if "third" in names:
            three, (two, one, value) = third(key, x, sigma)
        elif set(names) - set(FIRST_ORDER):
            two, (one, value) = second(key, jnp.append(x, sigma))
        else:
            one, value = first(key, jnp.append(x, sigma))
        parts = {
            "value": (value, ...),
            "gradient": (one, np.s_[..., :-1]),
            "dsigma": (one, np.s_[..., -1]),
            "hessian": (two, np.s_[..., :-1, :-1]),
            "mixed": (two, np.s_[..., :-1, -1]),
            "dsigma2": (two, np.s_[..., -1, -1]),
            "third": (three, np.s_[..., :-1, :-1, :]),
        }
        return {
            name: jax.tree.map(lambda leaf, part=parts[name][1]: leaf[part], parts[name][0])
            for name in names
        }

    return estimator


def assert_distributed_as(
    samples: Any, cdf: Callable[[np.ndarray], np.ndarray], *, least_p_value: float = 2e-5
) -> float:
    """Fails if a Kolmogorov-Smirnov test tells ``samples`` from the law with the given ``cdf``.

    Args:
        samples: Independent draws, any shape.
        cdf: The cumulative distribution function they should follow.
        least_p_value: The probability of a false alarm, once, when the seed is chosen.

    Returns:
        The p value.
    """
    flat = np.asarray(samples).astype(np.float64).ravel()
    if not np.all(np.isfinite(flat)):
        raise AssertionError("the samples are not all finite")
    result: Any = scipy.stats.kstest(flat, cdf)
    if not result.pvalue >= least_p_value:
        raise AssertionError(
            f"distance {result.statistic:.3g} over {flat.size} samples has the p value "
            f"{result.pvalue:.3g}, least {least_p_value:.3g}"
        )
    return float(result.pvalue)


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Fails unless two pytrees have one structure, equal shapes and dtypes, and close entries.

    Args:
        actual: A pytree of arrays.
        expected: The pytree it should equal; entries are compared by ``numpy.allclose`` with
            NaN equal to NaN. Typed keys are compared by their data.
        rtol: The relative tolerance, 0 for equality.
        atol: The absolute tolerance, 0 for equality.
    """
    structure, wanted = jax.tree.structure(actual), jax.tree.structure(expected)
    if structure != wanted:
        raise AssertionError(f"the structure is {structure}, expected {wanted}")
    paths, _ = jax.tree.flatten_with_path(actual)
    for (path, one), other in zip(paths, jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        one, other = _plain(one), _plain(other)
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise AssertionError(
                f"{name} is {one.dtype}{one.shape}, expected {other.dtype}{other.shape}"
            )
        if jnp.issubdtype(other.dtype, jnp.inexact):
            # numpy does not take bfloat16 for a floating type.
            wide = np.promote_types(other.dtype, np.float32)
            one, other = one.astype(wide), other.astype(wide)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)


def _plain(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def import_program(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """Imports a program by its name, as a script beside it would.

    Such programs run for long: what they jit in their functions is compiled `FOR_LONG_RUNS`.

    Args:
        folder: Where it lies.
        monkeypatch: What takes the changes back.
        name: Its name.

    Returns:
        The module.
    """
    monkeypatch.syspath_prepend(folder)
    program = importlib.import_module(name)
    jit = functools.partial(jax.jit, compiler_options=FOR_LONG_RUNS)
    careful = types.SimpleNamespace(**{**vars(jax), "jit": jit})
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if path and Path(path).parent == folder and hasattr(module, "jax"):
            monkeypatch.setattr(module, "jax", careful)
    return program


class EvaluationCounter:
    """Wraps a function and counts how often it is traced and how often it is evaluated.

    Evaluations are counted where they happen, when the program runs: under ``jax.vmap`` each
    sample counts as one, in a loop each pass, and under ``jit`` each call again.

    Attributes:
        traces: How often Python ran the function.
    """

    def __init__(self, fun: Callable[..., Any]):
        """Wraps ``fun``, whose first argument must have a leaf that is an array."""
        self.fun = fun
        self.traces = 0
        self._evaluations = 0

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the function, and counts."""
        self.traces += 1
        # The callback takes the argument's first leaf so that jax.vmap sees one call per sample.
        leaf = jax.lax.stop_gradient(jax.tree.leaves(x)[0])
        jax.debug.callback(self._count, jnp.ravel(leaf)[:1])
        return self.fun(x, *args, **kwargs)

    def _count(self, _: np.ndarray) -> None:
        self._evaluations += 1

    @property
    def evaluations(self) -> int:
        """The number of evaluations so far, once all running programs have ended."""
        jax.effects_barrier()
        return self._evaluations

    def reset(self) -> None:
        """Starts both counts again from zero."""
        jax.effects_barrier()
        self.traces = self._evaluations = 0


def failures(checks: dict[str, Callable[[], None]]) -> dict[str, str]:
    """The traceback of every check that fails, by name."""
    failed = {}
    for name, check in checks.items():
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
    return failed
