"""diagnose: what an estimate is worth, what is wrong with it, and how many samples it takes."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax import Array

from .. import _checks
from .._types import Fun
from ..sampling._independent import Antithetic, Independent
from . import _variance_law
from ._diagnosis import Alternative, Diagnosis
from ._findings import findings_of_solver, notes_of, problems_of
from ._layer_subject import subject_of
from ._subject import LEAST_SAMPLES, Pilot, Subject, variance_of
from ._variance_law import Runs
from ._words import percent

# Evaluations after the pilot, at most, in units of the pilot's.
_FURTHER = 4
# Most runs of the same number of samples.
_MOST_RUNS = 64
# With fewer samples for each, other samplers and degrees are not compared.
_FEWEST = 24
# Standard errors that the squared length of a gradient must be from zero.
_SIGNIFICANT = 2.0
# Standard deviations of 90 % of a Gaussian.
_NINETY = 1.645
# Standard errors that the error of the suggested number stays below what is asked for.
_CAUTION = 1.0
# A rare event: at most this share of the samples, but no fewer and no more than these numbers, make
# at least that share of the variance of the values. Fewer samples than the last number do not tell.
_RARE, _RARE_COUNTS, _RARE_VARIANCE, _RARE_SAMPLES = 0.02, (2, 20), 0.95, 100
# A variance of the values in a further run, over that in the pilot, that chance does not explain.
_MISSED = 100
# A variance of the values with another sampler, below that of the pilot, that is no merit of it.
_LESS = 10
# By how much the number of samples of whole nets may be short, rather than half as large again.
_SHORT = 1.1


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
    subject = subject_of(g, key, x, args, kwargs)
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
    problems, notes = findings_of_solver(subject, *pilot.better)
    problems += problems_of(subject, found, finite, significant, rare)
    found = dataclasses.replace(found, problems=tuple(problems))
    return dataclasses.replace(found, notes=(*notes, *notes_of(subject, found)))


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
        if not math.isnan(runs.variance):  # as where hardly any sample is left
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
    known = int(np.isfinite(values).all(axis=1).sum()) >= LEAST_SAMPLES
    if not known or not variance or subject.most_variance < _MISSED * variance:
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
        if found.variance > 0:
            ratio = math.log(found.variance / pilot.runs.variance)
            uncertain = 2 / found.freedom + 2 / pilot.runs.freedom
            yield Alternative(repr(choice.sampler), degree, *_interval(ratio, uncertain))
    log, uncertain = _variance_law.predict(runs, subject.law(subject.num_samples), number)
    for sampler in samplers:
        found = subject.runs_of(share, sampler=sampler, degree=choice.degree)
        # Samples that vary far less have missed what makes the pilot's variance.
        if found.variance > 0 and subject.kept_variance * _LESS > variance_of(pilot.values):
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
