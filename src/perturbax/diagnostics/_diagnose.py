"""diagnose: what an estimate is worth, what is wrong with it, and how many samples it takes."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks
from .._types import Fun
from ..sampling._independent import Antithetic, Independent
from ..sampling._nets import OrthogonalArray, Sobol
from ..sampling._orthogonal import Orthogonal
from . import _plots, _variance_law
from ._subject import FEW_SPACINGS, PLATEAU, Pilot, Subject, variance_of
from ._variance_law import Runs
from ._words import count_of, numbers_of, one_digit, percent, seconds_of, wrapped

# Evaluations after the pilot, at most, in units of the pilot's.
_FURTHER = 4
# Most runs of the same number of samples.
_MOST_RUNS = 64
# With fewer samples for each, other samplers and degrees are not compared.
_FEWEST = 24
# Standard errors that the squared length of a gradient must be from zero.
_SIGNIFICANT = 2.0
# Spacings of the numbers of x that sigma is at least, where their dtype is wide.
_MANY_SPACINGS = 1000
# Ratio of the ends of the suggested range from which on the suggestion is a rough one: 1.69 each
# way, which is 1.3 in the relative error.
_SETTLED = 2.86
# Standard deviations of 90 % of a Gaussian.
_NINETY = 1.645
# Standard errors that the error of the suggested number stays below what is asked for.
_CAUTION = 1.0
# A rare event: at most this share of the samples, but no fewer and no more than these numbers, make
# at least that share of the variance of the values. Fewer samples than the last number do not tell.
_RARE, _RARE_COUNTS, _RARE_VARIANCE, _RARE_SAMPLES = 0.02, (2, 20), 0.95, 100
# A variance of the values in a further run, over that in the pilot, that chance does not explain.
_MISSED = 100
# Share of the pairs of a layer's solutions from which on its solver has the wrong sign; and share
# of the samples from which on it is not exact.
_WRONG_SIGN, _INEXACT = 0.75, 0.05
# A variance of the values with another sampler, below that of the pilot, that is no merit of it.
_LESS = 10
# What a user finds in perturbax.
_SAMPLERS = [s.__name__ for s in (Independent, Antithetic, Orthogonal, Sobol, OrthogonalArray)]
# By how much the number of samples of whole nets may be short, rather than half as large again.
_SHORT = 1.1


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


def diagnose(
    g: Fun,
    key: Array,
    x: Any,
    /,
    *args: Any,
    relative_error: float = 0.1,
    **kwargs: Any,
) -> Diagnosis:
    r"""Tells what an estimate is worth, what is wrong with it, and how many samples it takes.

    A pilot estimate with the samples of g is followed by at most four times as many evaluations:
    runs at numbers of samples near the one that is suggested, whose spread tells their error, and
    other samplers and degrees, for comparison. The relative error of a gradient estimate is

    .. math:: \sqrt{E |\hat g - \nabla F|^2} / |\nabla F|

    with the squared length of the gradient estimated without bias. If the value is not one number,
    the gradient is the whole Jacobian; if that has more than 65,536 entries, the gradient of the
    sum of all numbers of the value with random signs, whose squared length has that of the Jacobian
    for its mean. The gradient of a layer or loss is the one that its own derivative rules give; the
    samples of a layer are its solutions.

    Args:
      g: what `make_perturbed_fun`, `make_straight_through_fun`, `make_perturbed_argmax`,
        `make_perturbed_max` or `make_fenchel_young_loss` returned, with at least 16 samples.
      key: one PRNG key; it is consumed.
      x: where to look.
      *args: further arguments of the function.
      relative_error: of the gradient, that a number of samples is suggested for; between 0 and 1.
      **kwargs: further keyword arguments of the function.

    Returns:
      A `Diagnosis`: `print` it for a table in words; `ok` is false if there is a problem; `plot()`
      draws the relative error against the number of samples.

    Raises:
      TypeError: if g is not what one of these returned, or anything is traced.
      ValueError: if g has fewer than 16 samples, or one group of them; if relative_error is not
        between 0 and 1.
      NotImplementedError: if the noise is good for no derivative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> steps = lambda x: jnp.sum(jnp.where(x > 0, 1.0, 0.0))
      >>> g = px.make_perturbed_fun(steps, 100, sigma=1e-4, noise=px.Normal())
      >>> found = px.diagnose(g, jax.random.key(0), jnp.array([0.3, -0.2]))
      >>> found.ok, found.share_equal
      (False, 1.0)
      >>> print(found.problems[0])
      sigma is too small: 100 % of the samples have the value that fun has at x, ...
    """
    wanted = _checks.check_level(relative_error, "relative_error", "0.1 stands for 10 %")
    subject = Subject(g, key, x, args, kwargs)
    with warnings.catch_warnings():
        # It is told as a problem.
        warnings.filterwarnings("ignore", message="sigma is below the spacing")
        return _examine(subject, wanted)


def _examine(subject: Subject, wanted: float) -> Diagnosis:
    value_at_x = subject.value_at_x()
    pilot = subject.pilot()
    budget = (1 + _FURTHER) * subject.num_samples - subject.num_evaluations
    if subject.dim and not pilot.runs.gradient.size:
        raise NotImplementedError(
            f"{subject.settings.noise!r} is good for no derivative, so there is no gradient to "
            "diagnose; px.estimate tells the value and its error"
        )
    nan = np.isnan(pilot.values).any(axis=1)
    infinite = np.isinf(pilot.values).any(axis=1) & ~nan
    finite = bool(np.isfinite(pilot.runs.gradient).all() and np.isfinite(pilot.runs.variance))
    runs, alternatives = [pilot.runs], []
    rare = _rare(pilot.values)
    # Where few samples make the variance, runs that miss them seem to be the most precise.
    if finite and pilot.runs.variance > 0 and not rare:
        others = _other_samplers(subject)
        share = _nearest_power(subject.num_samples // max(len(others), 1) - 1)
        if share < _FEWEST:
            others = []
        runs += _further_runs(subject, pilot.runs, budget - len(others) * (share + 1), wanted)
        alternatives = list(_alternatives(subject, pilot, runs, others, share))
        rare = _missed(subject, pilot.values)
        alternatives = [] if rare else alternatives
    squares, squares_error = _variance_law.signal_of(runs)
    length = math.sqrt(max(squares, 0.0)) if finite else math.nan
    noise = _noise_length(subject, runs)
    significant = finite and squares > _SIGNIFICANT * squares_error
    significant = significant and (length >= noise or squares > _least_seen(subject, runs))
    number, ends = None, (math.nan, math.nan)
    if not rare:
        number, ends = _suggestion(subject, runs, wanted, significant)
    choice = subject.choose(subject.num_samples)
    found = Diagnosis(
        name=subject.name,
        num_coordinates=subject.dim,
        num_samples=subject.num_samples,
        value_at_x=value_at_x,
        value=pilot.value,
        value_error=pilot.value_error,
        gradient_of=subject.gradient_of,
        gradient_length=length,
        gradient_length_error=_error_of_root(squares, squares_error) if finite else math.nan,
        signal_to_noise=_signal_to_noise(length, noise),
        relative_error=wanted,
        suggested_num_samples=number,
        suggested_range=ends,
        share_equal=float(np.mean(pilot.equal)),
        share_nan=float(np.mean(nan)),
        share_infinite=float(np.mean(infinite)),
        sigma_in_spacings=min((ratio for *_, ratio in subject.spacings()), default=math.inf),
        sampler=repr(choice.sampler),
        degree=choice.degree if subject.settings.use_baseline else None,
        reason=choice.reason,
        alternatives=tuple(alternatives),
        seconds_per_evaluation=subject.seconds,
        num_evaluations=subject.num_evaluations,
        problems=(),
        notes=(),
        values=pilot.values,
        measured=tuple(
            (one.num_samples, math.sqrt(one.variance) / length, one.freedom)
            for one in runs
            if length > 0 and one.variance > 0
        ),
    )
    problems, notes = _of_solver(subject, *pilot.better)
    problems += _problems(subject, found, finite, significant, rare)
    found = dataclasses.replace(found, problems=tuple(problems))
    return dataclasses.replace(found, notes=(*notes, *_notes(subject, found)))


# --- Measuring


def _further_runs(subject: Subject, pilot: Runs, budget: int, wanted: float) -> list[Runs]:
    """Runs with about as many samples as will be suggested, as far as the budget allows.

    First many small runs, whose spread is known well, then fewer and larger ones: if more samples
    are needed than there are, they tell together how the variance falls. Where that is known, all
    are of one size.
    """
    found: list[Runs] = []
    fixed = not pilot.law.slope_deviation and subject.law(1 << 30) == pilot.law
    plan = [(1, 4)] if fixed else [(3, 8), (2, 4), (1, 2)]  # parts of what is left, runs at least
    for parts, least_runs in plan:
        share = budget // parts
        guess, _ = _enough(subject, [pilot, *found], wanted)
        guess = guess and _whole(subject, guess)
        number = _nearest_power(min(guess or share, share // least_runs - 1))
        if guess and subject.law(number) != subject.law(guess):
            # What follows another law tells little: rather a single run that follows this one.
            same = (n for n in _POWERS if n > number and subject.law(n) == subject.law(guess))
            larger = next(same, budget)
            number = larger if larger * subject.least_runs < budget else number
        if number >= subject.least_samples():
            # As many as make a whole block may be a single group, whose spread tells nothing.
            number = next(n for n in _POWERS if n >= number and subject.choose(n).num_groups > 1)
        count = max(min(share // (number + 1), _MOST_RUNS), subject.least_runs)
        if number < subject.least_samples() or count * (number + 1) > budget:
            break
        runs = subject.runs(number, count)
        found.append(runs.drawn_to(pilot) if subject.least_runs > 1 else runs)
        budget -= count * (number + 1)
    return found


# Few different numbers are few programs to compile; and nets are good at powers of two.
_POWERS = [2**k * 3 // 2 if half else 2**k for k in range(1, 31) for half in (0, 1)]


def _nearest_power(number: int) -> int:
    """A power of two, or one and a half, not far above the number."""
    return max((n for n in _POWERS if n <= 1.2 * number), default=1)


def _enough(subject: Subject, runs: list[Runs], wanted: float) -> tuple[int | None, float]:
    """How many samples give the relative error wanted, and the error of the number's logarithm."""
    squares, error = _variance_law.signal_of(runs)
    target = wanted**2 * max(squares, error)
    return _variance_law.smallest(runs, subject.law, subject.least_samples(), target)


def _whole(subject: Subject, number: int) -> int:
    """A number to suggest: a round one, not smaller; with nets, one at which these are whole.

    Behind a power of two, the points of a net that has more are spread less evenly, and for some
    while the variance falls no further, or rises. The law is that of whole nets.
    """
    if subject.law(number).name[0] != "nets":
        return _variance_law.round_number(number)
    return next((n for n in _POWERS if _SHORT * n >= number), number)


def _suggestion(
    subject: Subject, runs: list[Runs], wanted: float, significant: bool
) -> tuple[int | None, tuple[float, float]]:
    """The number of samples, and a 90 % interval; its lower end alone where there is no signal."""
    squares, error = _variance_law.signal_of(runs)
    if not math.isfinite(squares) or not runs[0].variance:
        return None, (math.nan, math.nan)
    if not significant:
        target = wanted**2 * (max(squares, 0) + _NINETY * error)
        least, _ = _variance_law.smallest(runs, subject.law, subject.least_samples(), target)
        return None, (least or math.inf, math.inf)
    number, law_error = _enough(subject, runs, wanted)
    if number is None:
        return None, (_variance_law.MOST_SAMPLES, math.inf)
    width = math.exp(_NINETY * math.hypot(law_error, error / squares))
    target, least = wanted**2 * squares, subject.least_samples()
    caution = _CAUTION, error / squares
    safe, _ = _variance_law.smallest(runs, subject.law, least, target, *caution)
    suggested = _whole(subject, safe or number)
    return suggested, (number / width, max(number * width, suggested))


def _noise_length(subject: Subject, runs: list[Runs], times: int = 1) -> float:
    """The root mean square error of the gradient, with so many times the samples that g has."""
    if not runs[0].variance:
        return 0.0
    number = np.array([times * subject.num_samples])
    log, _ = _variance_law.predict(runs, subject.law(subject.num_samples), number)
    return math.exp(float(log[0]) / 2)


def _signal_to_noise(length: float, noise: float) -> float:
    if not length > 0 or not noise:
        return length if length != length else 0.0 if not length else math.inf
    return length / noise


def _least_seen(subject: Subject, runs: list[Runs]) -> float:
    """A squared length that all evaluations together hardly tell from zero.

    Less than that seems to be seen if a few runs happen to be equal.
    """
    noise = _noise_length(subject, runs, 1 + _FURTHER)
    return _SIGNIFICANT * noise**2 * math.sqrt(2 / max(runs[0].gradient.size, 1))


def _rare(values: np.ndarray) -> str:
    """In words, that very few samples make nearly all of the variance; empty if they do not.

    What counts are departures from the median: what all values share adds no variance.
    """
    rows = values[np.isfinite(values).all(axis=1)]
    departures = np.abs(rows - np.median(rows, axis=0)) if len(rows) >= _RARE_SAMPLES else rows[:0]
    largest = departures.max(initial=0)
    if not 0 < largest < math.inf:
        return ""
    squares = np.sort(np.sum((departures / largest) ** 2, axis=1))[::-1]
    shares = np.cumsum(squares) / np.sum(squares)
    count = int(np.argmax(shares >= _RARE_VARIANCE)) + 1
    if count > np.clip(_RARE * len(rows), *_RARE_COUNTS):
        return ""
    make = "sample makes" if count == 1 else "samples make"
    return (
        f"{count} {make} {percent(shares[count - 1])} of the variance of all {len(values):,} values"
    )


def _missed(subject: Subject, values: np.ndarray) -> str:
    """In words, that further runs met rare values and the pilot did not; empty if not so."""
    variance = variance_of(values)
    if not variance or subject.most_variance < _MISSED * variance:
        return ""
    return (
        f"in a further run the values had {subject.most_variance / variance:.2g} times the "
        f"variance that they have in the first {len(values):,}, which missed a rare event"
    )


def _other_samplers(subject: Subject) -> list[Any]:
    """Those that are possible here."""
    choice = subject.choose(subject.num_samples)
    return [
        sampler
        for sampler in (Independent(), Antithetic())
        if not isinstance(choice.sampler, type(sampler))
        and subject.is_possible(sampler, choice.degree)
    ]


def _alternatives(
    subject: Subject, pilot: Pilot, runs: list[Runs], samplers: list[Any], share: int
) -> Iterator[Alternative]:
    """Other degrees, from the pilot's evaluations, and other samplers, from `share` for each.

    These are carried to as many samples as g has; both are compared with what g has there.
    """
    choice = subject.choose(subject.num_samples)
    number = np.array([subject.num_samples])
    for degree, found in pilot.degrees.items():
        if found.variance:
            ratio = math.log(found.variance / pilot.runs.variance)
            uncertain = 2 / found.freedom + 2 / pilot.runs.freedom
            yield Alternative(repr(choice.sampler), degree, *_interval(ratio, uncertain))
    log, uncertain = _variance_law.predict(runs, subject.law(subject.num_samples), number)
    for sampler in samplers:
        found = subject.runs_of(share, sampler=sampler, degree=choice.degree)
        # Samples that vary far less have missed what makes the pilot's variance.
        if found.variance and subject.kept_variance * _LESS > variance_of(pilot.values):
            other_log, other = _variance_law.predict([found], found.law, number)
            ends = _interval(float(other_log[0] - log[0]), float(uncertain[0] + other[0]))
            yield Alternative(repr(sampler), choice.degree, *ends)


def _interval(log: float, variance: float) -> tuple[float, float, float]:
    """A number, given its logarithm, and the ends of a 90 % interval."""
    width = _NINETY * math.sqrt(variance)
    return math.exp(log), math.exp(log - width), math.exp(log + width)


def _error_of_root(squares: float, error: float) -> float:
    """The standard error of a root, from that of its square."""
    return error / (2 * math.sqrt(squares)) if squares > error else math.sqrt(error) / 2


# --- What needs action, with the action


def _problems(
    subject: Subject,
    found: Diagnosis,
    finite: bool,
    significant: bool,
    rare: str,
) -> Iterator[str]:
    lost = False
    for name, dtype, ratio in subject.spacings():
        if ratio < FEW_SPACINGS:
            lost = True
            yield (
                f"sigma is lost in rounding: at leaf {name!r}, of {dtype}, it is only {ratio:.2g} "
                "times the distance of neighbouring numbers, so that fun sees few different "
                f"inputs. {_wider(dtype)}"
            )
    dropped = subject.settings.missing == "drop"
    if found.share_nan and not dropped:
        yield (
            f"{percent(found.share_nan)} of the samples are NaN, and so is every estimate. Let "
            "fun return a finite penalty where it fails, for example jnp.where(jnp.isnan(value), "
            "penalty, value); or leave such samples out, by missing='drop'."
        )
    if found.share_infinite:
        yield (
            f"{percent(found.share_infinite)} of the samples are infinite, so that means and "
            "derivatives are not finite. If fun overflows, compute in float64 or return a "
            "logarithm; if infinity stands for failure, return a finite penalty instead."
        )
    failed = found.share_infinite or (found.share_nan and not dropped)
    if not (failed or finite):
        yield (
            "all samples are finite, but the estimate is not: their sum, or their spread, leaves "
            "the range of the dtype. Divide fun by a constant, or compute in float64."
        )
    if failed or not finite or lost:
        return  # what follows has this cause
    if _loses_digits(found):
        yield (
            "the values differ in their last digits alone, so that rounding is part of every "
            "difference. Subtract from fun the constant that all values share, before it is "
            "rounded, or compute in float64."
        )
    elif found.share_equal > PLATEAU:
        few = "the gradient comes from the few others"
        whence = "no gradient is seen" if found.share_equal == 1 else few
        yield (
            f"sigma is too small: {percent(found.share_equal)} of the samples have the value that "
            f"fun has at x, so {whence}. Take a larger sigma; "
            "px.sweep_sigma shows from where on the function is seen to change."
        )
    elif rare:
        heavy = not math.isfinite(getattr(subject.settings.noise, "variance", 0.0))
        tails = " Noise that has no variance may be the cause: px.Normal() has one."
        yield (
            f"{rare}, so that the estimate and its error depend on chance. If fun has a penalty "
            "for a rare failure, make it smaller, or return a logarithm or a bounded value; if the "
            "rare event is what matters, take a larger sigma or many more samples."
            f"{tails if heavy else ''}"
        )
    elif not significant:
        better = _better(subject, found)
        least, _ = found.suggested_range
        how_many = f" (more than {count_of(least)})" if math.isfinite(least) and least > 1 else ""
        yield (
            "the gradient cannot be told from zero. Unless x is where it vanishes, take more "
            f"samples{how_many} or a larger sigma; px.sweep_sigma compares them."
            f"{f' First pass {better}: that has less variance.' if better else ''}"
        )


def _of_solver(
    subject: Subject, better_pairs: float, better_samples: float
) -> tuple[list[str], list[str]]:
    """Problems and notes about the solver of a layer."""
    if not better_samples:
        return [], []
    arguments, mean_alone = subject.arguments, subject.maker == "make_perturbed_argmax"
    if better_pairs > _WRONG_SIGN:
        does, remedy = "maximise", "leave out maximize=False"
        if arguments["maximize"]:
            does, remedy = "minimise", "pass maximize=False"
        told = (
            f"the solver seems to {does} <theta, y>: in {percent(better_pairs)} of the pairs of "
            f"samples the solution of the other one is better. If it does, {remedy}"
        )
        symmetric = getattr(subject.settings.noise, "mean", None) == 0
        if mean_alone and (symmetric or arguments["multiplicative"]):
            return [], [f"{told}; to a mean solution with this noise it makes no difference."]
        return [f"{told}; until then the noise, or the derivatives, have the wrong sign."], []
    if better_samples > _INEXACT and arguments["symmetrize"]:
        what = "the Jacobian is" if mean_alone else "second derivatives are"
        costs = not (arguments["maximize"] or arguments["multiplicative"])
        why = (
            " If it is for costs that noise makes negative, multiplicative=True keeps their signs."
        )
        return [], [
            f"the solver is not exact: for {percent(better_samples)} of the samples the solution "
            f"of another one is better. Pass symmetrize=False, because {what} not symmetric then."
            f"{why if costs else ''}"
        ]
    return [], []


def _notes(subject: Subject, found: Diagnosis) -> Iterator[str]:
    for name, dtype, ratio in subject.spacings():
        if FEW_SPACINGS <= ratio and (ratio < _MANY_SPACINGS or jnp.finfo(dtype).bits < 32):
            yield (
                f"leaf {name!r} is {dtype}: fun sees inputs rounded to 1/{ratio:.0f} of sigma. "
                f"{_wider(dtype)}"
            )
    if found.share_nan and subject.settings.missing == "drop":
        yield (
            f"{percent(found.share_nan)} of the samples are NaN and left out: all is about the "
            "mean over those that are not."
        )
    for name, dtype in subject.fixed:
        yield (
            f"leaf {name!r} is {dtype}, so it is not perturbed and has no gradient. If it should, "
            f"convert it: x.astype(float)."
        )
    better = _better(subject, found)
    if found.suggested_num_samples is not None and (
        found.relative_error * found.signal_to_noise < 1
    ):
        other = f", or pass {better}, and diagnose again: then fewer will do" if better else ""
        yield (
            f"for a relative error of {percent(found.relative_error)}, take num_samples="
            f"{found.suggested_num_samples}{other}; a training loop is often content with less."
        )
    elif better and found.ok:
        yield f"pass {better}, to have less variance."
    if found.suggested_num_samples is not None:
        if not found.settled:
            # A pilot of a size from which the suggestion is within reach.
            pilot = max(found.suggested_num_samples, 2 * found.num_samples)
            yield (
                "the suggested number is a rough one, as its range tells; to know it better, "
                f"diagnose the same function with num_samples={pilot}."
            )


def _wider(dtype: Any) -> str:
    wide = "float32" if jnp.finfo(dtype).bits < 32 else "float64"
    return f"Make it {wide}, take a larger sigma, or let x be the distance from a fixed point."


def _loses_digits(found: Diagnosis) -> bool:
    """Whether the spread of the values is hardly above the rounding of the largest."""
    start = 0
    for leaf in jax.tree.leaves(found.value_at_x):
        rows = found.values[:, start : start + leaf.size]
        start += leaf.size
        if not jnp.issubdtype(leaf.dtype, jnp.inexact) or not leaf.size:
            continue
        spread = np.std(rows, axis=0)
        rounding = float(jnp.finfo(leaf.dtype).eps) * np.max(np.abs(rows), axis=0)
        if ((spread > 0) & (spread < 16 * rounding)).any():
            return True
    return False


# --- Words


def _better(subject: Subject, found: Diagnosis) -> str:
    """The alternative with the least variance, if that is less beyond what is uncertain of it."""
    surely = [one for one in found.alternatives if one.high < 1]
    if not surely:
        return ""
    one = min(surely, key=lambda one: one.ratio)
    ours = one.sampler.partition("(")[0] in _SAMPLERS
    sampler = f"px.{one.sampler}" if ours else one.sampler
    return f"sampler={sampler}, degree={one.degree} to {subject.maker}"


def _way(sampler: str, degree: int | None) -> str:
    return f"{sampler}, {'no baseline' if degree is None else f'degree {degree}'}"
