"""How the variance of a gradient falls with the number of samples, from runs at a few numbers.

With independent samples it is c / N. With nets it falls faster, by how much depends on the
function; and where the rule that chooses sampler and degree takes others, it jumps. So a law is
fitted for each such choice, ln V = a - b ln N, to the runs that were made with it, and b is held
near to what it usually is, as far as the runs do not tell.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Of b, before looking at runs, mean and standard deviation: where groups have a fixed size and
# nothing is fitted; where something is fitted; for nets, and nets with a fit, as on the problems of
# benchmarks/diagnose.py.
FIXED, FITTED, NETS, FITTED_NETS = (1.0, 0.0), (1.0, 0.1), (1.2, 0.3), (1.7, 0.5)
# Numbers of samples at which a law is looked at are this factor apart.
_STEP = 1.01
MOST_SAMPLES = 2**31 - 1


class Law(NamedTuple):
    """What is known of a law before looking at runs.

    Attributes:
      name: tells it from others.
      slope: mean of b.
      slope_deviation: its standard deviation.
    """

    name: tuple[object, ...]
    slope: float
    slope_deviation: float


@dataclasses.dataclass(frozen=True)
class Runs:
    """What some runs of one estimator with the same number of samples say about its gradient.

    Attributes:
      num_samples: samples in each run.
      num_runs: how many runs.
      gradient: the mean over the runs, one number for each coordinate.
      variances: of one run, coordinate by coordinate.
      degrees_of_freedom: of each of the variances.
      law: that the variance follows.
    """

    num_samples: int
    num_runs: int
    gradient: np.ndarray
    variances: np.ndarray
    degrees_of_freedom: float
    law: Law

    def split(self, count: int) -> "Runs":
        """Each run seen as the mean of so many smaller ones."""
        return dataclasses.replace(
            self,
            num_samples=self.num_samples // count,
            num_runs=self.num_runs * count,
            variances=self.variances * count,
        )

    def drawn_to(self, other: "Runs") -> "Runs":
        """With variances that others, in proportion to 1 / num_samples, count for as one more run.

        Few runs may be equal by chance, which would tell that there is no variance at all.
        """
        known = self.degrees_of_freedom
        expected = other.variances * (other.num_samples / self.num_samples)
        return dataclasses.replace(
            self,
            variances=(known * self.variances + expected) / (known + 1),
            degrees_of_freedom=known + 1,
        )

    @property
    def variance(self) -> float:
        """Of one run: the mean squared length of its error."""
        return float(np.sum(self.variances))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `variance`, which many coordinates tell better than one."""
        if not self.degrees_of_freedom:  # nothing is told
            return math.nan
        squares = float(np.sum(self.variances**2))
        share = self.variance**2 / squares if squares else 1.0
        # The spread of the measured variances themselves counts as unevenness: take it out.
        even = self.degrees_of_freedom / (self.degrees_of_freedom + 2)
        return self.degrees_of_freedom * max(1.0, min(share / even, len(self.variances)))


def pooled(
    num_samples: int,
    gradients: np.ndarray,
    squared_errors: np.ndarray | None,
    freedom: np.ndarray | int,
    law: Law,
) -> Runs:
    """`Runs` from gradients (runs, coordinates) and the squared errors that each run tells itself.

    Those have `freedom` degrees of freedom each, of a run without any they are NaN; the spread of
    the runs has one less than the number of runs. Variances are NaN where nothing is told.
    """
    count = len(gradients)
    if not count:
        nothing = np.full(gradients.shape[1], np.nan)
        return Runs(num_samples, 0, nothing, nothing, 0, law)
    mean = gradients.mean(axis=0)
    squares = np.sum(np.abs(gradients - mean) ** 2, axis=0)
    total = count - 1
    if squared_errors is not None:
        each = np.broadcast_to(freedom, count)[:, None]
        squares = squares + np.sum(each * np.where(each > 0, squared_errors, 0), axis=0)
        total += int(each.sum())
    return Runs(num_samples, count, mean, squares / (total or np.nan), total, law)


def squared_length(gradient: np.ndarray, variances: np.ndarray) -> tuple[Any, Any]:
    """The squared length along the last axis, free of the noise's share, and its error.

    E |g_hat|^2 = |g|^2 + V, so V is taken off; and Var |g_hat|^2 = 4 g' C g + 2 tr C^2 for a
    Gaussian error with the covariance C, which is taken to be diagonal.
    """
    squares = np.abs(gradient) ** 2 - variances
    along = np.maximum(squares, 0) * variances
    return squares.sum(-1), np.sqrt(np.sum(4 * along + 2 * variances**2, axis=-1))


def signal_of(runs: Sequence[Runs]) -> tuple[float, float]:
    """`squared_length` of what all runs say of the gradient together."""
    # In proportion to precision, as far as it is known.
    weights = [
        one.num_runs / max(one.variance, 1e-300) * one.freedom / (one.freedom + 10) for one in runs
    ]
    weights = np.array(weights) / sum(weights)
    gradient = sum(w * one.gradient for w, one in zip(weights, runs, strict=True))
    errors = sum(w**2 * one.variances / one.num_runs for w, one in zip(weights, runs, strict=True))
    squares, error = squared_length(np.asarray(gradient), np.asarray(errors))
    return float(squares), float(error)


def predict(runs: Sequence[Runs], law: Law, num_samples: np.ndarray) -> np.ndarray:
    """Mean and variance of ln V at each number of samples, shape (2, numbers).

    From the runs that follow the law; from all, if none does.
    """
    same = [one for one in runs if one.law.name == law.name] or list(runs)
    _, mean, deviation = law
    # Rounding is no information.
    floor = max(max(one.variance for one in same) * 1e-12, 1e-300)
    # The logarithm of a variance of k degrees of freedom is low by 1/k in the mean.
    logs = np.array([math.log(max(one.variance, floor)) + 1 / one.freedom for one in same])
    weights = np.array([one.freedom / 2 for one in same])
    at = np.log([one.num_samples for one in same])
    centre = weights @ at / weights.sum()
    height = weights @ logs / weights.sum()
    lean = weights @ (at - centre) ** 2 + (1 / deviation**2 if deviation else math.inf)
    slope = mean
    if deviation:
        slope = (-weights @ ((at - centre) * (logs - height)) + mean / deviation**2) / lean
    away = np.log(num_samples) - centre
    return np.stack([height - slope * away, 1 / weights.sum() + away**2 / lean])


def round_number(number: int) -> int:
    """The number, with two digits other than zero at most, not smaller."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // unit) * unit


def smallest(
    runs: Sequence[Runs],
    law_at: Callable[[int], Law],
    least: int,
    variance: float,
    caution: float = 0.0,
    asked_error: float = 0.0,
) -> tuple[int | None, float]:
    """The least number of samples whose variance is at most as asked; and the error of its log.

    With `caution`, by so many standard errors, `asked_error` of the logarithm of what is asked
    included. None if it is more than can be taken.
    """
    numbers = _STEP ** np.arange(math.ceil(math.log(MOST_SAMPLES) / math.log(_STEP)))
    numbers = np.unique(np.maximum(np.ceil(numbers), least).astype(np.int64))
    laws = [law_at(int(n)) for n in numbers]
    found = np.empty((2, len(numbers)))
    for law in dict.fromkeys(laws):
        mask = np.array([one == law for one in laws])
        found[:, mask] = predict(runs, law, numbers[mask])
    logs = found[0] + caution * np.sqrt(found[1] + asked_error**2)
    enough = np.flatnonzero(logs <= math.log(max(variance, 1e-300)))
    if not len(enough):
        return None, math.inf
    first = int(enough[0])
    return int(numbers[first]), math.sqrt(found[1, first])
