"""What a diagnosis holds, as a table in words and as a picture."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _plots
from ._words import count_of, numbers_of, one_digit, percent, seconds_of, wrapped

# Ratio of the ends of the suggested range from which on the suggestion is a rough one: 1.69 each
# way, which is 1.3 in the relative error.
_SETTLED = 2.86


class Alternative(NamedTuple):
    """Another sampler or degree, and its variance over that of those in use.

    Attributes:
      sampler: as its representation says.
      degree: of the surrogate.
      ratio: of the variances of the gradient at the same number of samples.
      low: lower end of a 90 % interval of the ratio.
      high: its upper end.
    """

    sampler: str
    degree: int
    ratio: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What `diagnose` found; prints as a table in words.

    Attributes:
      name: of the function that is smoothed.
      num_coordinates: how many numbers of x are perturbed.
      num_samples: of the perturbed function.
      value_at_x: fun(x).
      value: the smoothed value, of the same structure.
      value_error: its standard errors.
      gradient_of: what the gradient is of, in words: the value, or a combination of its numbers.
      gradient_length: the length of the gradient, without what noise adds to it.
      gradient_length_error: its standard error.
      signal_to_noise: that length over the root mean square error of the gradient.
      relative_error: as asked for.
      suggested_num_samples: what gives a root mean square error of that share of the length; None
        where too little is known.
      suggested_range: ends of a 90 % interval of the number that truly does.
      share_equal: of samples, at which fun returns what it returns at x, but for rounding.
      share_nan: of samples, with a NaN.
      share_infinite: of samples, with an infinite number and no NaN.
      sigma_in_spacings: the least sigma of a coordinate, in spacings of the numbers near x.
      sampler: in use, as its representation says.
      degree: in use; None without a baseline.
      reason: why these.
      alternatives: other samplers and degrees, measured on this function.
      seconds_per_evaluation: of the function and of all that is done for a sample.
      num_evaluations: made for this diagnosis.
      problems: what needs action, with the action; empty if all is well.
      notes: what to know, though nothing is wrong.
      values: of the pilot's samples, one row each.
      measured: relative errors as measured: a number of samples, the error, and the degrees of
        freedom of its square.
    """

    name: str
    num_coordinates: int
    num_samples: int
    value_at_x: Any
    value: Any
    value_error: Any
    gradient_of: str
    gradient_length: float
    gradient_length_error: float
    signal_to_noise: float
    relative_error: float
    suggested_num_samples: int | None
    suggested_range: tuple[float, float]
    share_equal: float
    share_nan: float
    share_infinite: float
    sigma_in_spacings: float
    sampler: str
    degree: int | None
    reason: str
    alternatives: tuple[Alternative, ...]
    seconds_per_evaluation: float
    num_evaluations: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    values: np.ndarray
    measured: tuple[tuple[int, float, float], ...]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def settled(self) -> bool:
        """Whether the suggested number of samples is known to a factor of about 1.7."""
        low, high = self.suggested_range
        return self.suggested_num_samples is not None and high < _SETTLED * low

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rows = list(self._rows())
        width = max(len(head) for head, _ in rows)
        lines = [f"{self.name}, {self.num_coordinates:,} coordinates:"]
        lines += [wrapped(f"  {head:{width}}  ", text) for head, text in rows]
        problems = [wrapped("Problem: ", problem) for problem in self.problems]
        lines += problems or ["No problem was found."]
        lines += [wrapped("Note: ", note) for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "value at x", numbers_of(self.value_at_x)
        yield "smoothed value", numbers_of(self.value, self.value_error)
        length = f"{self.gradient_length:.3g} ± {one_digit(self.gradient_length_error)}"
        yield "length of the gradient", f"{length}, of {self.gradient_of}"
        ratio, samples = self.signal_to_noise, f"{self.num_samples:,} samples"
        if ratio > 0:
            ratio = f"{ratio:.2g}, so a relative error of {percent(1 / ratio)}"
            yield "signal to noise", f"{ratio}, with {samples}"
        low, high = self.suggested_range
        if self.suggested_num_samples is not None:
            asked = f"{self.suggested_num_samples:,} ({count_of(low)} to {count_of(high)})"
            yield f"samples for {percent(self.relative_error)}", asked
        elif low > 1:
            yield f"samples for {percent(self.relative_error)}", f"more than {count_of(low)}"
        yield "samples as at x", f"{percent(self.share_equal)} have the value that fun has at x"
        failed = f"{percent(self.share_nan)} NaN, {percent(self.share_infinite)} infinite"
        yield "samples that fail", failed
        many = self.sigma_in_spacings > 1e9  # near 0, where numbers lie close
        spacings = "more than 1e9" if many else f"at least {self.sigma_in_spacings:.2g}"
        yield "sigma", f"{spacings} spacings of the numbers near x"
        yield "in use", f"{_way(self.sampler, self.degree)}. {self.reason}"
        for i, one in enumerate(self.alternatives):
            times = f"{one.ratio:.2g} ({one.low:.2g} to {one.high:.2g}) times"
            head = "" if i else "its variance would be"
            yield head, f"{times} with {_way(one.sampler, one.degree)}"
        yield "an evaluation takes", seconds_of(self.seconds_per_evaluation)

    def plot(self, *, ax: Any = None) -> Any:
        """Draws the relative error of the gradient against the number of samples.

        Args:
          ax: axes of matplotlib to draw into; None makes some.

        Returns:
          The axes.

        Raises:
          ImportError: without matplotlib.
        """
        now = 1 / self.signal_to_noise if self.signal_to_noise > 0 else math.nan
        ax = _plots.plot_errors(
            ax,
            self.measured,
            self.relative_error,
            self.suggested_num_samples,
            self.suggested_range,
            (self.num_samples, now),
        )
        ax.set_title(self.name)
        return ax


def _way(sampler: str, degree: int | None) -> str:
    return f"{sampler}, {'no baseline' if degree is None else f'degree {degree}'}"
