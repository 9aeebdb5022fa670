"""sweep_sigma: a function smoothed at many scales, to choose one."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks, _leaves
from .._describe import Made
from .._perturb import PerturbedFun, kind_of_fun, make_perturbed_fun
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Gumbel
from ..sampling._protocol import Sampler
from ..tracing._compiled import compiled_map
from ..tracing._host_exceptions import own_exceptions
from . import _plots
from ._standard_errors import estimate
from ._subject import FEW_SPACINGS, PLATEAU, nearly_equal
from ._variance_law import squared_length
from ._words import columns_of, count_of, one_digit, percent, wide, wrapped

# The least and the largest scale that are tried where none are given, over the size of x.
_FACTORS = (1e-3, 3.0)
# What the error of a gradient may be of its length, in what is suggested.
_MOST_ERROR = 0.5
# Cosine between the gradients of neighbours that is needed in what is suggested.
_LEAST_COSINE = 0.7


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SigmaSweep:
    """A function smoothed at many scales; prints as a table with a suggestion.

    Arrays have an entry for each sigma, those of cosines one for each pair of neighbours. Errors
    are standard errors.

    Attributes:
      sigmas: the scales, in ascending order.
      num_samples: taken at each.
      hard_value: fun(x).
      values: smoothed values.
      value_errors: theirs.
      lengths: of the gradients, without what noise adds.
      length_errors: theirs.
      relative_errors: of the gradients: root mean square error over length.
      cosines: between the gradients at a sigma and the next.
      cosine_errors: theirs.
      share_equal: of samples, that have the value at x, but for rounding.
      share_failed: of samples, that are NaN or infinite.
      degrees_of_freedom: of the errors.
      suggested_range: the least and the largest sigma worth using; None if there is none.
      reason: why this range.
    """

    sigmas: np.ndarray
    num_samples: int
    hard_value: float
    values: np.ndarray
    value_errors: np.ndarray
    lengths: np.ndarray
    length_errors: np.ndarray
    relative_errors: np.ndarray
    cosines: np.ndarray
    cosine_errors: np.ndarray
    share_equal: np.ndarray
    share_failed: np.ndarray
    degrees_of_freedom: int
    suggested_range: tuple[float, float] | None
    reason: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("sigma", "smoothed", "gradient", "error", "cosine to next", "as at x", "failed")
        ]
        for i, sigma in enumerate(self.sigmas):
            cosine = "" if i + 1 == len(self.sigmas) else _with(self.cosines, self.cosine_errors, i)
            rows.append(
                (
                    f"{sigma:.3g}",
                    _with(self.values, self.value_errors, i, 5),
                    _with(self.lengths, self.length_errors, i),
                    percent(float(self.relative_errors[i])),
                    cosine,
                    percent(float(self.share_equal[i])),
                    percent(float(self.share_failed[i])),
                )
            )
        lines = [
            f"Hard value {self.hard_value:.5g}; {count_of(self.num_samples)} samples at each sigma",
            *columns_of(rows),
            wrapped("", self.reason),
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, *, ax: Any = None) -> Any:
        """Draws smoothed values, and on a second axis lengths of gradients, against sigma.

        Args:
          ax: axes of matplotlib to draw into; None makes some.

        Returns:
          The axes of the values.

        Raises:
          ImportError: without matplotlib.
        """
        return _plots.plot_sweep(
            ax,
            self.sigmas,
            self.hard_value,
            (self.values, self.value_errors),
            (self.lengths, self.length_errors),
            self.suggested_range,
        )


def sweep_sigma(
    fun: Callable[..., Any],
    key: Array,
    x: Any,
    sigmas: Any = None,
    *,
    args: tuple[Any, ...] = (),
    num_samples: int = 1000,
    noise: NoiseDistribution = Gumbel(),
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
    missing: str = "propagate",
) -> SigmaSweep:
    r"""Smooths a function at many scales, and suggests which of them are worth using.

    A sigma is worth using where the gradient of the smoothed function is seen through its noise,
    with an error of at most half its length, and where its direction is much that of the next
    sigma: a cosine of at least .7. Among such ranges the one with the smallest sigmas is suggested
    that is not a single sigma. Small ones are nearer to the function itself, large ones less noisy
    and blind to small features; one often starts with the largest and goes down.

    The estimates at different sigmas are independent, with one compilation for all. Squares of
    lengths and cosines are estimated without the share of the noise.

    Args:
      fun: a function of x, and args, to one number.
      key: one PRNG key; it is consumed.
      x: where to look.
      sigmas: the scales; None takes round ones from .001 to 3 times the root mean square of x (or
        of 1, where x is zero), as far as they are not lost in the rounding of x.
      args: further arguments of fun.
      num_samples: of evaluations at each sigma.
      noise: as in `make_perturbed_fun`.
      batch_size: as in `make_perturbed_fun`.
      sampler: as in `make_perturbed_fun`.
      degree: as in `make_perturbed_fun`.
      missing: as in `make_perturbed_fun`: with "drop", a sigma at which some samples are NaN may be
        worth using.

    Returns:
      A `SigmaSweep`: `print` it for a table; `suggested_range`, `reason`; `plot()`.

    Raises:
      TypeError: if an argument is not of the kind described, or traced; if fun does not return one
        array of real numbers.
      ValueError: if that is not one number; if sigmas are not positive; if x is empty.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> staircase = lambda x: jnp.sum(jnp.floor(x) ** 2)
      >>> sweep = px.sweep_sigma(staircase, jax.random.key(0), jnp.array([1.5, -2.5]))
      >>> low, high = sweep.suggested_range
      >>> bool(0.05 < low < 0.5), bool(high > 1)
      (True, True)
    """
    if isinstance(fun, PerturbedFun | Made):
        mine = "g.fun" if isinstance(fun, PerturbedFun) else "what it was made of"
        raise TypeError(
            f"sweep_sigma takes the function itself, as it smooths it at each sigma: pass {mine}, "
            f"got {kind_of_fun(fun)}"
        )
    _checks.check_fun(fun)
    _checks.check_missing(missing)
    _checks.check_args(args)
    key = _checks.check_key(key, x, "sweep_sigma(fun, key, x)")
    leaves, _, merge = _leaves.perturbed_leaves(x)
    if _checks.is_traced((key, leaves, sigmas, args)):
        raise TypeError("sweep_sigma needs known numbers, got traced ones; call it outside jit")
    if not _leaves.num_elements(leaves):
        raise ValueError("x has no coordinates: there is nothing to smooth")
    scales = _check_sigmas(sigmas, leaves)
    at_x = _value_at(fun, x, args)

    def smoothed(sigma: Array) -> PerturbedFun:
        return make_perturbed_fun(
            lambda x: (_number(fun(x, *args)),) * 2,
            num_samples,
            sigma,
            noise,
            batch_size=batch_size,
            has_aux=True,
            sampler=sampler,
            degree=degree,
            missing=missing,
        )

    found = _measured(smoothed, at_x, key, scales, leaves, merge)
    spacings = scales / _largest_spacing(leaves)
    swept = _assessed(found, scales, spacings, at_x, num_samples, missing == "drop")
    if sigmas is None and swept.share_equal[-1] == 1:
        reason = f"{swept.reason} {_wider_than(scales[-1])}"
        swept = dataclasses.replace(swept, reason=reason)
    return swept


def _wider_than(sigma: float) -> str:
    """What to try on a plateau that none of the scales chosen leaves."""
    low, high = (f"{factor * sigma:.0e}".replace("e+0", "e") for factor in (1, 1e4))
    return f"Larger ones were not tried: pass sigmas=np.geomspace({low}, {high}, 9), for example."


def _number(value: Any) -> Array:
    return _checks.one_number(value, "fun", "sweep the loss that it is used in", any_rank=True)


def _value_at(fun: Callable[..., Any], x: Any, args: tuple[Any, ...]) -> np.ndarray:
    """The value at x, of shape ()."""
    try:
        value = fun(x, *args)
    except TypeError as error:
        error.add_note(
            "Raised by fun(x, *args): if fun has further arguments, pass them: "
            "sweep_sigma(fun, key, x, args=(...,))"
        )
        raise
    return np.asarray(_number(value))


class _Measured(NamedTuple):
    """What was measured, a row for each sigma."""

    values: Any
    value_errors: Any
    gradients: Any
    gradient_errors: Any
    share_equal: Any  # of samples: to the value at x, but for rounding
    share_failed: Any  # that are NaN or infinite
    share_nan: Any
    degrees_of_freedom: Any


def _measured(
    smoothed: Callable[[Array], PerturbedFun],
    at_x: np.ndarray,
    key: Array,
    scales: np.ndarray,
    leaves: list[Array],
    merge: Callable[[Iterable[Array]], Any],
) -> _Measured:
    """Estimates at all scales, by one program, of a function whose aux are its values."""

    def one(arguments: tuple[Array, Array], leaves: list[Array], at_x: Array) -> _Measured:
        key, sigma = arguments
        g = smoothed(sigma)
        found = estimate(g, key, merge(leaves))
        if found.gradient is None:
            noise = g.settings.noise
            raise NotImplementedError(f"{noise!r} is good for no derivative: take another noise")
        gradient, gradient_error = (
            jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(tree)])
            for tree in (found.gradient, found.gradient_error)
        )
        values = found.aux
        return _Measured(
            found.value,
            found.value_error,
            gradient,
            gradient_error,
            share_equal=jnp.mean(nearly_equal(values, at_x)),
            share_failed=jnp.mean(~jnp.isfinite(values)),
            share_nan=jnp.mean(jnp.isnan(values)),
            degrees_of_freedom=jnp.asarray(found.degrees_of_freedom, jnp.int32),
        )

    keys = jax.random.split(key, len(scales))
    args = (keys, jnp.asarray(scales, _leaves.noise_dtype(leaves))), leaves, at_x
    found = own_exceptions(compiled_map(one, *args))(*args)
    return _Measured(*map(wide, found))


def _assessed(
    found: _Measured,
    scales: np.ndarray,
    spacings: np.ndarray,
    at_x: np.ndarray,
    num_samples: int,
    drop: bool,
) -> SigmaSweep:
    """What the measurements tell, and which scales they suggest."""
    gradients, variances = found.gradients, found.gradient_errors**2
    with np.errstate(all="ignore"):
        squares, square_errors = squared_length(gradients, variances)
        lengths = np.sqrt(np.maximum(squares, 0))
        roots = np.sqrt(np.maximum(squares, square_errors))
        length_errors = np.where(roots > 0, square_errors / (2 * roots), 0.0)
        noise_lengths = np.sqrt(np.sum(variances, axis=1))
        relative = np.where(lengths > 0, noise_lengths / lengths, np.inf)
        cosines, cosine_errors = _cosines(gradients, variances, squares)
    seen = np.isfinite(squares) & (squares > 2 * square_errors) & (relative <= _MOST_ERROR)
    # What was left out is held against a sigma if nothing is left.
    absent = np.where(drop & (found.share_nan < 1), found.share_nan, 0)
    of_rest = [share / (1 - absent) for share in (found.share_equal, found.share_failed - absent)]
    rows = zip(seen, relative, *of_rest, absent, found.value_errors, spacings, strict=True)
    why = [_why_not(*row) for row in rows]
    ends, reason = _suggest(scales, why, cosines, cosine_errors)
    return SigmaSweep(
        sigmas=scales,
        num_samples=num_samples,
        hard_value=float(at_x),
        values=found.values,
        value_errors=found.value_errors,
        lengths=lengths,
        length_errors=length_errors,
        relative_errors=relative,
        cosines=cosines,
        cosine_errors=cosine_errors,
        share_equal=found.share_equal,
        share_failed=found.share_failed,
        degrees_of_freedom=int(found.degrees_of_freedom[0]),
        suggested_range=ends,
        reason=reason,
    )


def _check_sigmas(sigmas: Any, leaves: list[Array]) -> np.ndarray:
    """The scales in ascending order; a grid if None."""
    if sigmas is None:
        return _grid(leaves)
    try:
        scales = np.sort(np.asarray(sigmas, np.float64))
    except (TypeError, ValueError):
        raise TypeError(
            f"sigmas must be None or an array of numbers, got {type(sigmas).__name__}"
        ) from None
    if scales.ndim != 1 or scales.size < 2:
        raise ValueError(f"sigmas must be at least two numbers in a row, got shape {scales.shape}")
    if not ((scales > 0) & np.isfinite(scales)).all():
        raise ValueError(f"sigmas must be positive and finite, got {scales.tolist()}")
    return scales


def _grid(leaves: list[Array]) -> np.ndarray:
    numbers = np.concatenate([np.ravel(v).astype(np.float64) for v in leaves])
    numbers = numbers[np.isfinite(numbers)]
    size = float(np.sqrt(np.mean(numbers**2))) if numbers.size else 0.0
    low, high = (factor * (size or 1.0) for factor in _FACTORS)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    grid = np.array([digit * 10.0**k for k in exponents for digit in (1, 2, 5)])
    grid = grid[(grid >= 0.99 * low) & (grid <= 1.01 * high)]
    wide = grid[grid >= 2 * FEW_SPACINGS * _largest_spacing(leaves)]
    return wide if len(wide) > 1 else grid[-2:]


def _largest_spacing(leaves: list[Array]) -> float:
    """Of neighbouring numbers, over the finite entries of x."""
    largest = 0.0
    for leaf in leaves:
        values = np.abs(np.asarray(leaf))
        values = values[np.isfinite(values.astype(np.float64))]
        if values.size:
            largest = max(largest, float(np.spacing(values.max())))
    return max(largest, 1e-200)  # at 0 numbers lie so close that ratios to them would overflow


def _cosines(
    gradients: np.ndarray, variances: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Between neighbours, and their errors: NaN where a length cannot be told from zero."""
    one, two = slice(None, -1), slice(1, None)
    products = np.sum(gradients[one] * gradients[two], axis=1)
    lengths = np.sqrt(np.maximum(squares[one], 0) * np.maximum(squares[two], 0))
    spread = (
        gradients[one] ** 2 * variances[two]
        + gradients[two] ** 2 * variances[one]
        - variances[one] * variances[two]
    )
    errors = np.sqrt(np.maximum(np.sum(spread, axis=1), 0)) / lengths
    cosines = np.where(lengths > 0, products / lengths, np.nan)
    return np.clip(cosines, -1, 1), np.where(lengths > 0, errors, np.nan)


def _why_not(
    seen: bool,
    relative: float,
    equal: float,
    failed: float,
    absent: float,
    value_error: float,
    spacings: float,
) -> str:
    """Why a sigma is not worth using; empty if it is."""
    if failed:
        what = "left are infinite" if absent else "are NaN or infinite"
        return f"{percent(failed)} of the samples {what}"
    if absent and math.isnan(value_error):
        return f"{percent(absent)} of the samples are NaN, and those left do not tell the error"
    if spacings < FEW_SPACINGS:
        return "sigma is lost in the rounding of x"
    if equal > PLATEAU:
        return f"{percent(equal)} of the samples have the value at x"
    if not seen:
        if relative <= _MOST_ERROR:
            return "the gradient cannot be told from zero with these samples"
        error = f"its error is {percent(relative)}" if math.isfinite(relative) else "it vanishes"
        return f"the gradient is not seen through its noise ({error} with these samples)"
    return ""


def _suggest(
    sigmas: np.ndarray, why: Sequence[str], cosines: np.ndarray, errors: np.ndarray
) -> tuple[tuple[float, float] | None, str]:
    """The first range of usable sigmas whose neighbours agree in direction; and the reason."""

    def turns(i: int) -> bool:
        return bool(cosines[i] + 2 * errors[i] < _LEAST_COSINE)

    def ranges() -> Iterator[tuple[int, int]]:
        start = None
        for i in range(len(sigmas)):
            if why[i]:
                start = None
                continue
            start = i if start is None else start
            if i + 1 == len(sigmas) or why[i + 1] or turns(i):
                yield start, i
                start = None

    found = list(ranges())
    if not found:
        return None, f"No sigma is worth using: {why[len(why) // 2]}, for example."
    first, last = next((one for one in found if one[0] < one[1]), found[0])
    text = f"Worth using: sigma from {sigmas[first]:.3g} to {sigmas[last]:.3g}."
    if first == last:
        text = f"Worth using, of these: sigma {sigmas[first]:.3g} alone."
    if first:
        below = why[first - 1] or f"the gradient turns (cosine {cosines[first - 1]:.2f})"
        text += f" Below, {below}."
    else:
        text += " Smaller ones were not tried."
    if last + 1 < len(sigmas):
        above = why[last + 1] or f"the gradient turns (cosine {cosines[last]:.2f})"
        text += f" Above, {above}."
    else:
        text += " Larger ones were not tried."
    return (float(sigmas[first]), float(sigmas[last])), text


def _with(values: np.ndarray, errors: np.ndarray, i: int, digits: int = 3) -> str:
    if np.isnan(values[i]):
        return "-"
    return f"{values[i]:.{digits}g} ± {one_digit(errors[i])}"
