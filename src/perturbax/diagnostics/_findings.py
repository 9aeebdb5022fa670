"""What a diagnosis means, in words: problems, each with what to do about it, and notes."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..sampling._independent import Antithetic, Independent
from ..sampling._nets import OrthogonalArray, Sobol
from ..sampling._orthogonal import Orthogonal
from ._diagnosis import Diagnosis
from ._layer_subject import LayerSubject
from ._subject import FEW_SPACINGS, PLATEAU, Subject
from ._words import count_of, percent

# Spacings of the numbers of x that sigma is at least, where their dtype is wide.
_MANY_SPACINGS = 1000
# Share of the pairs of a layer's solutions from which on its solver has the wrong sign; and share
# of the samples from which on it is not exact.
_WRONG_SIGN, _INEXACT = 0.75, 0.05
# What a user finds in perturbax.
_SAMPLERS = [s.__name__ for s in (Independent, Antithetic, Orthogonal, Sobol, OrthogonalArray)]


def problems_of(
    subject: Subject,
    found: Diagnosis,
    finite: bool,
    significant: bool,
    rare: str,
) -> Iterator[str]:
    """What needs action, with the action: causes first, and not what follows from them."""
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
    if dropped and found.share_nan and not failed and not _tells_errors(found):
        failed = True
        left = "nothing is left" if found.share_nan == 1 else "those left do not tell the error"
        yield (
            f"{percent(found.share_nan)} of the samples are NaN and left out, and {left}. Take "
            "more samples; where failing depends on the point, a smaller sigma; or let fun return "
            "a finite penalty where it fails."
        )
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


def findings_of_solver(
    subject: Subject, better_pairs: float, better_samples: float
) -> tuple[list[str], list[str]]:
    """Problems and notes about the solver of a layer."""
    if not isinstance(subject, LayerSubject) or not better_samples:
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


def notes_of(subject: Subject, found: Diagnosis) -> Iterator[str]:
    """What to know, though nothing is wrong."""
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


def _tells_errors(found: Diagnosis) -> bool:
    """Whether there is a standard error of any number of the value."""
    return not all(np.isnan(v).all() for v in jax.tree.leaves(found.value_error))


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


def _better(subject: Subject, found: Diagnosis) -> str:
    """The alternative with the least variance, if that is less beyond what is uncertain of it."""
    surely = [one for one in found.alternatives if one.high < 1]
    if not surely:
        return ""
    one = min(surely, key=lambda one: one.ratio)
    ours = one.sampler.partition("(")[0] in _SAMPLERS
    sampler = f"px.{one.sampler}" if ours else one.sampler
    return f"sampler={sampler}, degree={one.degree} to {subject.maker}"
