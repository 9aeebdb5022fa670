"""What a run is made of: a way of stepping, the state it carries, and what a step tells."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array


class Operands(NamedTuple):
    """Numbers that a run depends on.

    Attributes:
      function: what the function closes over.
      scale: how wide each coordinate may be expected to range.
      widest: most noise that each coordinate is to have.
      sigma: as it was given, if as numbers; of a schedule, those in it.
      tol: the tolerance, below 0 for none.
      optimizer: the numbers in it.
      noise: those in a user's noise.
    """

    function: Any
    scale: Any
    widest: Any
    sigma: Any
    tol: Array
    optimizer: Any
    noise: Any


class Start(NamedTuple):
    """What the beginning of a run found.

    Attributes:
      candidate: the point with the lowest value.
      candidate_value: its value, not finite if there is none to offer.
      evaluations: how many were made.
    """

    candidate: Any
    candidate_value: Array
    evaluations: Array


class Step(NamedTuple):
    """What one step found, all of it in the dtype of values.

    Attributes:
      smoothed_value: estimate of the smoothed function where the step was taken.
      standard_error: of that estimate.
      hard_value: of the function itself at the step's centre, NaN where it was not evaluated.
      sigma: scale of the noise, the geometric mean over coordinates.
      most_noise: that of the coordinate that has most.
      candidate: the point of this step with the lowest value.
      candidate_value: its value, NaN if the step has none to offer.
      centre: the centre of the step, which the smoothed value belongs to.
      evaluations: how many the step took.
      wants_more: whether the signal is so weak that steps should take more samples.
    """

    smoothed_value: Array
    standard_error: Array
    hard_value: Array
    sigma: Array
    most_noise: Array
    candidate: Any
    candidate_value: Array
    centre: Any
    evaluations: Array
    wants_more: Array


class Method(NamedTuple):
    """A way of stepping.

    Attributes:
      most_evaluations: most evaluations of one step.
      init: its state and what it found, from operands, two keys, for the noise and for the
        function, the start and the value there under the second key.
      init_evaluations: how many evaluations `init` takes at most.
      step: the next state and what the step found, from operands, the state, two keys, for the
        noise and for the function, and the number of steps before this one.
    """

    most_evaluations: int
    init: Callable[["Operands", tuple[Array, Array], Any, Array], tuple[Any, Start]]
    init_evaluations: int
    step: Callable[["Operands", Any, tuple[Array, Array], Array], tuple[Any, Step]]


class Run(NamedTuple):
    """The state of a run.

    Attributes:
      key: which the keys of all steps are made from.
      method: the state of the method.
      steps: number of steps made.
      evaluations: number of evaluations made.
      noisy: whether the function depends on a key, or two evaluations at one point differed.
      best: the point with the lowest value that was seen, or, of a noisy function, the centre with
        the lowest smoothed value.
      best_value: that value.
      centre: the last step's centre.
      reference: smoothed value that later ones must fall below by the tolerance.
      patience: steps since one did.
      status: 0 while running, else an index into `REASONS`.
      wants_more: whether the next steps should take more samples.
    """

    key: Array
    method: Any
    steps: Array
    evaluations: Array
    noisy: Array
    best: Any
    best_value: Array
    centre: Any
    reference: Array
    patience: Array
    status: Array
    wants_more: Array


REASONS = (
    "running",
    "max_evaluations reached",
    "no improvement by more than tol",
    "sigma is lost in the rounding of x",
    "every value was NaN or infinite",
    "stopped by callback",
)
RUNNING, EXHAUSTED, CONVERGED, ROUNDING, NOT_FINITE, CALLED_OFF = range(len(REASONS))


def where(condition: Array, yes: Any, no: Any) -> Any:
    """One of two pytrees."""
    return jax.tree.map(lambda a, b: jax.numpy.where(condition, a, b), yes, no)
