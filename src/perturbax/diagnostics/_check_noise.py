"""check_noise: whether an object is what noise should be, by measurement."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks
from ..noise import _quantiles
from ..noise._foreign import as_noise
from ..noise._inverse import by_icdf, is_invertible

# Standard errors beyond which a difference is not chance: 6e-7 for each comparison.
_LIMIT = 5.0
# Least index of a tail, as of t^-index, whose average tells its own standard error.
_LEAST_INDEX = 2.5
# Fewest draws for which standard errors can be trusted.
_LEAST_DRAWS = 100


@dataclasses.dataclass(frozen=True, repr=False)
class NoiseReport:
    """What `check_noise` found; prints as a verdict in words, and is true if all is well.

    Attributes:
      noise: the noise, as its representation says.
      problems: what is wrong, a sentence each; empty if nothing is.
      notes: what to know, though it is not wrong.
      derivatives: how many derivatives the noise is good for, as far as is known.
      mean_score: measured E[s], with s = -d log p / dz, and its standard error.
      mean_z_score: measured E[z s], and its standard error.
    """

    noise: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    derivatives: float = math.inf
    mean_score: tuple[float, float] = (math.nan, math.nan)
    mean_z_score: tuple[float, float] = (math.nan, math.nan)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"{self.noise} {'is good noise' if self.ok else 'is not valid noise'}."]
        lines += [f"- {problem}" for problem in self.problems]
        lines += [f"- Note: {note}" for note in self.notes]
        if not math.isnan(self.mean_score[0]):
            lines.append(
                f"Measured: E[score] = {_number(*self.mean_score)}, expected 0; "
                f"E[z score] = {_number(*self.mean_z_score)}, expected 1."
            )
        return "\n".join(lines)

    __repr__ = __str__


def check_noise(
    noise: Any, *, key: Array | None = None, num_samples: int = 2**17, dim: int = 4
) -> NoiseReport:
    """Measures whether an object is good noise, and says in words what is wrong.

    The score-function method rests on identities that hold for every density p that is smooth on
    the whole line, with the score s = -d log p / dz: E[s] = 0, E[z s] = 1, E[s h(z)] = E[h'(z)] for
    any smooth bounded h and, for second derivatives, E[(s^2 - s') h(z)] = E[h''(z)]. All are
    measured over many draws, for the noise as `make_perturbed_fun` would use it: drawn by `sample`
    and, where it has them, by `icdf` and `from_bits`. Measured, too, are whether
    draws have the shape and the dtype that were asked for, depend on the key, are independent from
    coordinate to coordinate (unless `log_prob` is of all together) and from key to key, take
    enough different values, and have the `mean` and `variance` that the noise declares.

    Args:
      noise: an object with sample and log_prob, in this library's convention or another's.
      key: one PRNG key; None takes a fixed one.
      num_samples: how many numbers are drawn, at least 100 times dim. Differences of at least
        10 / sqrt(num_samples), relative to the standard deviation of what is compared, are found.
      dim: how many coordinates a draw has.

    Returns:
      A `NoiseReport`: `report.ok`, or `bool(report)`, tells whether all is well, `print(report)`
      what was found.

    Raises:
      TypeError: if noise is not an object with sample and log_prob.
      ValueError: if num_samples is below 100 times dim: so few draws tell too little.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> class Exponential:
      ...     def sample(self, key, sample_shape=(), dtype=float):
      ...         return jax.random.exponential(key, sample_shape, dtype)
      ...
      ...     def log_prob(self, inputs):
      ...         return jnp.where(inputs >= 0, -inputs, -jnp.inf)
      >>> px.check_noise(Exponential()).ok
      False
      >>> px.check_noise(px.Logistic()).ok
      True

    References:
      Petersen et al., Generalizing Stochastic Smoothing for Differentiation and Gradient
      Estimation, 2024, arXiv:2410.08125
    """
    _checks.check_noise(noise)
    num_samples = _checks.check_count(num_samples, "num_samples")
    dim = _checks.check_count(dim, "dim")
    if num_samples < _LEAST_DRAWS * dim:
        raise ValueError(
            f"num_samples must be at least {_LEAST_DRAWS * dim}, which is {_LEAST_DRAWS} draws of "
            f"dim={dim} numbers, got {num_samples}: standard errors of fewer mean little"
        )
    key = (
        jax.random.key(0)
        if key is None
        else _checks.check_key(key, None, "check_noise(noise, key=key)")
    )
    name = repr(noise)
    if len(name) > 60 or " object at " in name:
        name = type(noise).__name__
    try:
        law = as_noise(noise)
        z = _draws(law, key, -(-num_samples // dim), dim)
        scores = _scores(law, z)
    except _Problem as problem:
        return NoiseReport(name, (str(problem),))
    except NotImplementedError as error:  # no derivative at all
        return NoiseReport(name, (f"no gradient can be had: {error}.",), derivatives=0)
    except (TypeError, ValueError) as error:
        return NoiseReport(name, (f"{error}.",))

    notes = []
    derivatives = _derivatives(law, dim)
    problems = [*_dependences(law, z)]
    mean, mean_z = _mean(scores), _mean(z * scores)
    problems += _identities(z, scores, mean, mean_z)
    if not problems and derivatives >= 2:
        problems += _second_order(law, z, scores)
    problems += _moments(law, z)
    problems += _inverses(law, jax.random.fold_in(key, 1), *z.shape)
    if not problems and derivatives < math.inf:
        notes.append(
            f"it is good for derivatives up to order {derivatives:.0f}; beyond, it raises."
        )
    if _tail_index(scores**2) < 1.3:
        notes.append(
            "the variance of the score looks infinite: now and then one draw outweighs all others."
        )
    return NoiseReport(name, tuple(problems), tuple(notes), derivatives, mean, mean_z)


class _Problem(Exception):
    """What makes further measurements pointless."""


def _draws(law: Any, key: Array, count: int, dim: int) -> np.ndarray:
    """Draws (count, dim), one key each, once they have passed the checks of their form."""
    what = f"sample(key, ({dim},), float32)"

    def one(key: Array) -> Array:
        return law.sample(key, (dim,), np.dtype("float32"))

    try:
        aval = jax.eval_shape(one, key)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        raise _Problem(f"{what} must compute with jax.random, not with numpy.") from None
    if getattr(aval, "shape", None) != (dim,):
        shape = getattr(aval, "shape", type(aval).__name__)
        raise _Problem(f"{what} returned shape {shape}, expected ({dim},).")
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        raise _Problem(f"{what} returned dtype {aval.dtype}, expected a floating one.")
    # Keys are used again on purpose.
    keys = jax.random.split(jax.random.clone(key), count)
    z = np.asarray(jax.jit(jax.vmap(one))(jax.random.clone(keys)), np.float64)
    _check_finite(z)
    if count > 1 and (z == z[0]).all():
        raise _Problem(
            f"{what} does not depend on the key: all samples would share one draw. Draw with "
            "jax.random from the key."
        )
    once, again = (np.asarray(one(jax.random.clone(keys)[0]), np.float64) for _ in range(2))
    if not np.array_equal(once, again):
        raise _Problem(f"{what} returns something else each time; the key alone must decide.")
    some = z[: 2**16, 0]
    values = np.unique(some).size
    if values < 0.95 * some.size:
        raise _Problem(
            f"{some.size} draws take no more than {values} different values. A discrete law has no "
            "density, and half precision (bfloat16 has 128 numbers between 1 and 2) biases the "
            "gradient; draw in float32."
        )
    return z


def _check_finite(z: np.ndarray) -> None:
    if not np.isfinite(z).all():
        raise _Problem(f"{np.mean(~np.isfinite(z)):.2%} of the draws are infinite or NaN.")


def _scores(law: Any, z: np.ndarray) -> np.ndarray:
    """-d log p / dz at each of the draws."""
    shape = _log_prob_shape(law, z)
    if shape not in (z.shape[1:], ()):
        raise _Problem(
            f"log_prob(inputs) returned shape {shape} for inputs of shape {z.shape[1:]}, expected "
            f"{z.shape[1:]}, or () for the log-density of all coordinates together."
        )
    score = jax.jit(jax.vmap(_score(law)))
    scores = np.asarray(score(jnp.asarray(z, np.float32)), np.float64)
    if not np.isfinite(scores).all():
        raise _Problem(
            f"the score is infinite or NaN at {np.mean(~np.isfinite(scores)):.2%} of the draws: "
            "log_prob must be finite, with a finite derivative, wherever sample draws."
        )
    if not scores.any():
        raise _Problem(
            "the score is 0 at every draw (a flat density, like that of Uniform): every gradient "
            "would come out as 0."
        )
    return scores


def _log_prob_shape(law: Any, z: np.ndarray) -> tuple[int, ...]:
    """Of the log-density of one draw."""
    return jax.eval_shape(law.log_prob, jax.ShapeDtypeStruct(z.shape[1:], np.float32)).shape


def _score(law: Any) -> Any:
    return jax.grad(lambda z: -jnp.sum(law.log_prob(z)))


def _derivatives(law: Any, dim: int) -> float:
    """How many derivatives the noise allows, up to two; infinity if it allows these."""
    declared = getattr(law, "derivatives", None)
    if declared is not None:
        return declared
    try:
        row = jax.ShapeDtypeStruct((dim,), np.float32)
        jax.eval_shape(jax.grad(lambda z: jnp.sum(_score(law)(z))), row)
    except NotImplementedError:
        return 1
    return math.inf


def _dependences(law: Any, z: np.ndarray) -> Iterator[str]:
    """Coordinates of a draw, and draws of neighbouring keys, must be uncorrelated.

    Coordinates may be correlated if the log-density is one of all of them.
    """
    u = _standardised(z)
    bounded = u / (1 + np.abs(u))  # as not all laws have a variance
    bounded = bounded - bounded.mean(axis=0)
    bounded = bounded / np.maximum(bounded.std(axis=0), 1e-30)

    def dependent(a: np.ndarray, b: np.ndarray) -> bool:
        return abs(float(np.mean(a * b))) * math.sqrt(len(a)) > _LIMIT

    pairs = itertools.combinations(range(min(z.shape[1], 8)), 2)
    if any(dependent(bounded[:, i], bounded[:, j]) for i, j in pairs):
        if _log_prob_shape(law, z):
            yield (
                "the coordinates of one draw depend on each other, but log_prob takes them for "
                "independent: let it return one number, the log-density of all together."
            )
        elif is_invertible(law) or getattr(law, "variance", None) is not None:
            yield (
                "the coordinates of one draw depend on each other, but what the noise declares, an "
                "inverse distribution function or a variance, is used as that of independent "
                "coordinates: leave it away."
            )
    if any(dependent(column[1:], column[:-1]) for column in bounded.T[:8]):
        yield "draws from different keys depend on each other; the keys must make them independent."


def _standardised(z: np.ndarray) -> np.ndarray:
    low, centre, high = np.quantile(z, (0.25, 0.5, 0.75))
    return (z - centre) / (high - low)


def _identities(
    z: np.ndarray, scores: np.ndarray, mean: tuple[float, float], mean_z: tuple[float, float]
) -> Iterator[str]:
    """E[s] = 0, E[z s] = 1, E[s h] = E[h']."""
    cause = (
        "Either log_prob is not the log-density of these draws, or that density jumps, for example "
        "at an end of its support."
    )
    found = False
    if _differs(mean, 0.0):
        found = True
        yield f"E[score] is {_number(*mean)} and must be 0. {cause}"
    if _differs(mean_z, 1.0):
        found = True
        yield (
            f"E[z score] is {_number(*mean_z)} and must be 1; the gradient of a linear function "
            f"would be off by this factor. {cause}"
        )
    if found:
        return
    u, width = _standardised(z), np.subtract(*np.quantile(z, (0.75, 0.25)))
    tests = [(np.tanh(u), 1 - np.tanh(u) ** 2), (np.sin(2 * u), 2 * np.cos(2 * u))]
    for centre in (-1, 0, 1):
        v = np.clip(u - centre, -40, 40)
        tests.append((np.exp(-(v**2) / 2), -v * np.exp(-(v**2) / 2)))
    gaps = [_mean(scores * h - slope / width) for h, slope in tests]
    worst = max(gaps, key=lambda gap: abs(gap[0]) / max(gap[1], 1e-30))
    if _differs(worst, 0.0):
        yield (
            "E[score h(z)] is not E[h'(z)] for a smooth bounded function h: they differ by "
            f"{_number(*worst)}. {cause}"
        )


def _second_order(law: Any, z: np.ndarray, scores: np.ndarray) -> Iterator[str]:
    """E[(s^2 - s') h] = E[h'']."""

    def slope(row: Array) -> Array:
        return jnp.diagonal(jax.jacfwd(_score(law))(row))

    slopes = np.asarray(jax.jit(jax.vmap(slope))(jnp.asarray(z, np.float32)), np.float64)
    u, width = _standardised(z), np.subtract(*np.quantile(z, (0.75, 0.25)))
    for centre in (-1.5, -1, -0.5, 0, 0.5, 1, 1.5):
        v = np.clip(2 * (u - centre), -40, 40)
        bump = np.exp(-(v**2) / 2)
        gap = _mean((scores**2 - slopes) * bump - 4 * (v**2 - 1) * bump / width**2)
        if _differs(gap, 0.0):
            yield (
                "first derivatives are right, but second ones would silently be wrong: the density "
                "has a kink. Give the noise an attribute `derivatives = 1`, and asking for a "
                "second derivative will raise."
            )
            return


def _moments(law: Any, z: np.ndarray) -> Iterator[str]:
    """The moments that the noise declares, which a fit relies on, are those of its draws."""
    mean: Any = getattr(law, "mean", None)
    variance: Any = getattr(law, "variance", None)
    if not _is_finite(mean):
        return
    # With heavy tails an average says little, and its standard error even less.
    if _tail_index(np.abs(z)) > _LEAST_INDEX and _differs(found := _mean(z), mean):
        yield (
            f"the draws have the mean {_number(*found)}, but noise.mean is {mean:g}: derivatives "
            "would silently be wrong wherever a polynomial is fitted."
        )
    elif _is_finite(variance) and _tail_index((z - mean) ** 2) > _LEAST_INDEX:
        found = _mean((z - mean) ** 2)
        if _differs(found, variance):
            yield (
                f"the draws have the variance {_number(*found)}, but noise.variance is "
                f"{variance:g}: derivatives would silently be wrong wherever a polynomial of "
                "degree 2 is fitted."
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _inverses(law: Any, key: Array, count: int, dim: int) -> Iterator[str]:
    """What other samplers draw, through inverse distribution functions, has the same law."""
    bits = jax.random.bits(key, (count, dim), np.uint32)
    ways: dict[str, Any] = {
        "from_bits": lambda bits: law.from_bits(bits),
        "icdf": lambda bits: by_icdf(law, *_quantiles.from_bits(bits)),
    }
    for name, draw in ways.items():
        if not hasattr(law, name):
            continue
        try:
            z = np.asarray(jax.jit(draw)(bits), np.float64)
            _check_finite(z)
            scores = _scores(law, z)
            found = list(_identities(z, scores, _mean(scores), _mean(z * scores)))
        except _Problem as problem:
            found = [str(problem)]
        for one in found:
            yield f"of draws by {name}, which nets and other samplers take: {one}"


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error; rows are independent, their entries need not be."""
    rows = values.mean(axis=1)
    return float(rows.mean()), float(rows.std() / math.sqrt(max(len(rows) - 1, 1)))


def _differs(measured: tuple[float, float], expected: float) -> bool:
    mean, error = measured
    # Single precision leaves some 1e-5 of rounding where there is no chance at all.
    return abs(mean - expected) > _LIMIT * error + 1e-4


def _number(mean: float, error: float) -> str:
    return f"{mean:.3f} ± {error:.3f}"


def _tail_index(values: np.ndarray) -> float:
    """Hill's estimate of a where the chance to exceed t falls like t^-a, from the top .5 %."""
    top = np.sort(values.ravel())[-max(values.size // 200, 2) :]
    return 1 / max(float(np.mean(np.log(top / top[0]))), 1e-9)
