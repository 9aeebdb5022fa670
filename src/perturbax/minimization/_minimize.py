"""minimize: the public face, and the loop around the compiled blocks."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks, _leaves
from ..estimator._default_rule import check_needs
from ..noise._foreign import as_noise
from ..noise._inverse import is_invertible
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Normal
from ..noise._traced import without_numbers
from ..sampling._independent import Independent
from ..sampling._orthogonal import Orthogonal
from ..sampling._protocol import Sampler
from ..scale._matrices import is_matrix
from ..scale._scales import check_sigma, scale_leaves
from ..tracing._derivative_rules import without_derivatives
from ..tracing._host_exceptions import called
from ..tracing._mesh_axes import in_types_of_constants
from ..tracing._signature import trace
from ._checkpoint import Checkpoint
from ._problem import Objective, Problem, make_problem
from ._progress import Telling
from ._result import MinimizeHistory, MinimizeResult
from ._run import Found, begin, block, finish, joined, method_of, own_settings
from ._setup import ADAPTED, GIVEN, Optimizer, Setup, trace_optimizer
from ._states import CALLED_OFF, EXHAUSTED, RUNNING, Operands, Run

_MAX_EVALUATIONS = 2**31 - 1
# Most samples a step of the surrogate's, unless more are asked for.
_MOST_SAMPLES = 200
# Longest block of steps, and how long one is to take, in seconds.
_LONGEST_BLOCK = 4096
_SECONDS_A_BLOCK = 1.0
_NO_DERIVATIVES = (
    "the result of minimize has no derivatives, in x0 or in what fun depends on: to hold it fixed, "
    "give minimize jax.lax.stop_gradient of these; of the result it comes too late"
)


class MinimizeProgress(NamedTuple):
    """What a callback is told after each step.

    Attributes:
      step: number of steps made.
      evaluations: number of evaluations made.
      x: where the last step drew its samples around, with the structure of x0.
      smoothed_value: estimate of the smoothed function there.
      standard_error: of that estimate.
      best_value: the lowest value so far; of a noisy function, the lowest smoothed value.
      sigma: scale of the noise.
    """

    step: int
    evaluations: int
    x: Any
    smoothed_value: float
    standard_error: float
    best_value: float
    sigma: float


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    key: Array,
    *,
    args: tuple[Any, ...] = (),
    optimizer: Optimizer | None = None,
    sigma: Any = None,
    num_samples: int | None = None,
    noise: NoiseDistribution = Normal(),
    max_evaluations: int = 10_000,
    tol: float | None = None,
    lower: Any = None,
    upper: Any = None,
    takes_key: bool = False,
    sampler: Sampler | None = None,
    degree: int | None = None,
    batch_size: int | None = None,
    callback: Callable[[MinimizeProgress], Any] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> MinimizeResult:
    r"""Minimises a function from its values alone, by way of its smoothed version.

    Each step draws `num_samples` points x + sigma eps and learns from the values of fun there how
    :math:`F(x) = E[f(x + \sigma \epsilon)]` falls. fun may be a step function, noisy, or a program
    outside JAX.

    By default a quadratic surrogate is fitted to the samples of this step and of earlier ones (by
    Stein's identity it has F's gradient and Hessian), and the next samples are drawn around its
    minimum, no farther than a few sigma; sigma and the shape of the noise follow the surrogate.
    With `optimizer`, an unbiased estimate of F's gradient is handed to that optimiser in each step.

    Args:
      fun: from x, and args, to one number: any function that `make_perturbed_fun` takes.
      x0: where to begin, a pytree of floating arrays.
      key: one PRNG key; it is consumed.
      args: further arguments of fun.
      optimizer: of optax, such as `optax.adam(0.05)`; what evaluates the function itself, such as
        a line search, is not supported. None for the surrogate.
      sigma: scale of the noise: a number (or pytree, as for `make_perturbed_fun`; matrices only
        with an optimizer); a schedule as optax has them, called with the number of steps; or None,
        for one that is chosen from a sweep at the start and then adapted: by the surrogate; with an
        optimizer, halved wherever 20 gradients add up to no more than chance would let them.
      num_samples: evaluations a step. None begins with a number that depends on the number of
        coordinates, and, with an optimizer, doubles it where less than a tenth of the gradient's
        square is signal.
      noise: law of the noise, as for `make_perturbed_fun`.
      max_evaluations: of fun, all told.
      tol: the run ends where the smoothed value has not fallen by more than this for 30 steps; None
        for never.
      lower: bound of x, a number or a pytree of them with the structure of x0 or a prefix of it;
        None is for no bound, as a leaf too. fun is evaluated between the bounds only: points
        outside are reflected.
      upper: the other bound.
      takes_key: whether fun takes a key, as `fun(key, x, *args)`. It has a new one in each step,
        the same for all samples of the step, so that their differences are those of x. A
        function whose value depends on it is noisy; one that takes none, such as one outside JAX,
        is if two evaluations at x0 differ.
      sampler: as for `make_perturbed_fun`. The surrogate's default is `Orthogonal()`; several
        steps share a block of directions.
      degree: as for `make_perturbed_fun`, with an optimizer only.
      batch_size: as for `make_perturbed_fun`.
      callback: called with a `MinimizeProgress` after each step; the run ends if it returns true.
      progress: whether a run of more than a second tells on standard error how far it is: by a bar
        if tqdm is installed (extra `progress`), else by a line now and then.
      checkpoint: path of a file to keep the run in, every few seconds and where it is interrupted.
        If there is one, the run goes on from there, to the same result as without interruption;
        also one that the callback ended, or max_evaluations if they are more now.

    Returns:
      A `MinimizeResult`: x, value, value_error, num_evaluations, history, reason. Under `jit`, or
      `vmap` for a batch of starts, everything runs in one program: num_samples does not grow then,
      and callback and checkpoint are not possible.

    Raises:
      TypeError: if an argument is of the wrong kind; if x0 has leaves that are not floating.
      ValueError: if an argument has a value that is not possible; if the checkpoint is of another
        problem, or cannot be written.
      NotImplementedError: if a derivative of the result is asked for, which has none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> def staircase(x):
      ...     return jnp.sum(jnp.round(4 * (x - 1)) ** 2)
      >>> found = px.minimize(staircase, jnp.zeros(5), jax.random.key(0), max_evaluations=2000)
      >>> float(found.value)
      0.0
      >>> found.reason
      'max_evaluations reached'

    References:
      - Nesterov and Spokoiny, Random Gradient-Free Minimization of Convex Functions, 2017,
        doi:10.1007/s10208-015-9296-2
      - Powell, The NEWUOA software for unconstrained optimization without derivatives, 2006,
        doi:10.1007/0-387-30065-1_16
    """
    key = _checks.check_key(key, x0, "minimize(fun, x0, key)")
    _checks.check_noise(noise)
    _checks.check_sampler(sampler)
    max_evaluations = _checks.check_count(max_evaluations, "max_evaluations", _MAX_EVALUATIONS)
    takes_key = _checks.check_bool(takes_key, "takes_key")
    progress = _checks.check_bool(progress, "progress")
    if batch_size is not None:
        batch_size = _checks.check_count(batch_size, "batch_size")
    _checks.check_degree(degree)
    if not isinstance(checkpoint, str | os.PathLike | None):
        raise TypeError(
            f"checkpoint must be None or a path, such as 'run.npz', got {type(checkpoint).__name__}"
        )
    _checks.check_args(args)
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "optimizer must be one of optax, such as optax.adam(0.05), with init and update, got "
            f"{type(optimizer).__name__}"
        )
    if callback is not None:
        _checks.check_fun(callback, "callback")
    if degree is not None and optimizer is None:
        raise ValueError("degree is for gradients: give an optimizer, or leave degree out")
    law = as_noise(noise)
    if optimizer is not None and getattr(law, "derivatives", 1) < 1:
        raise ValueError(
            f"noise={noise!r} is good for no derivative, but optimizer needs gradients: take "
            "another noise, or leave optimizer out"
        )
    problem = make_problem(fun, x0, key, args, takes_key, lower, upper)
    objective = problem.objective
    if sigma is not None:
        _check_fits(sigma, problem, optimizer)
    if optimizer is None and sampler is None:
        sampler = Orthogonal() if is_invertible(law) else Independent()
    with own_settings():
        kind, numbers = _sigma(sigma)
        traced, rates = None, ()
        if optimizer is not None:
            traced, rates = trace_optimizer(optimizer, problem.start)
    if optimizer is not None:  # of the noise as it was given, which tells more than its trace
        check_needs(sampler, degree, objective.dim, law)
    static_law, law_numbers = without_numbers(law, key, objective.dim, objective.dtype)
    setup = Setup(
        objective=objective,
        optimizer=traced,
        sigma=kind,
        num_samples=_num_samples(num_samples, objective, optimizer),
        grows=num_samples is None,
        doublings=0,
        noise=static_law,
        sampler=sampler,
        degree=degree,
        batch_size=batch_size,
    )
    operands = Operands(
        function=problem.operands,
        scale=problem.scale,
        widest=problem.widest,
        sigma=numbers,
        tol=jnp.asarray(-1.0 if tol is None else _tolerance(tol)),
        optimizer=rates,
        noise=law_numbers,
    )
    key, operands = in_types_of_constants((key, operands))
    method = method_of(setup)
    kept = int(_final_evaluations(setup, max_evaluations)[int(objective.uses_key)])
    least = 2 + method.init_evaluations + method.most_evaluations + kept
    if max_evaluations < least:
        raise ValueError(
            f"max_evaluations must be at least {least} for one step with "
            f"num_samples={setup.num_samples} and what comes before and after, got "
            f"{max_evaluations}"
        )
    if _checks.is_traced((problem.start, key, operands)):
        if callback is not None or checkpoint is not None:
            raise TypeError(
                "callback and checkpoint need a run outside jit and vmap, but x0, key or args "
                "are traced"
            )
        start, operands = without_derivatives(_NO_DERIVATIVES, (problem.start, operands))
        problem = problem._replace(start=start)
        return _in_one_program(setup, operands, problem, key, max_evaluations)
    telling = Telling(progress, max_evaluations)
    try:
        telling.begin()
        keeping = None
        if checkpoint is not None:
            keeping = Checkpoint(Path(checkpoint), setup, operands, problem, key)
        return _in_blocks(
            setup, operands, problem, key, max_evaluations, callback, telling, keeping
        )
    finally:
        telling.close()


class _State(NamedTuple):
    """What the next block begins with. Replaced as a whole: an interrupt may come at any time."""

    setup: Setup
    run: Run


@own_settings()
def _in_one_program(
    setup: Setup, operands: Operands, problem: Problem, key: Array, max_evaluations: int
) -> MinimizeResult:
    """A run whose numbers are not known yet."""
    setup = setup._replace(grows=False)
    run = begin(setup, operands, key, problem.start)
    most = -(-max_evaluations // setup.num_samples)
    budget = max_evaluations - _final_evaluations(setup, max_evaluations)
    run, history = block(setup, most, operands, run, jnp.asarray(most), budget)
    return _result(problem, run, history, _finished(setup, operands, run, max_evaluations))


@own_settings()
def _in_blocks(
    setup: Setup,
    operands: Operands,
    problem: Problem,
    key: Array,
    max_evaluations: int,
    callback: Callable[[MinimizeProgress], Any] | None,
    telling: Telling,
    keeping: Checkpoint | None,
) -> MinimizeResult:
    """A run in blocks of steps, as long as fits between two looks at the clock.

    The blocks' lengths change nothing about the result.
    """
    budget = max_evaluations - _final_evaluations(setup, max_evaluations)
    hosts = setup.hosts
    run, told = None, []
    if keeping is not None:
        setup, run, told = keeping.load()
    if run is None:
        run = called(hosts, begin, setup, operands, key, problem.start)
    # A kept run that ended by max_evaluations or the callback may have more of the one now, and
    # another callback.
    ended_from_outside = (run.status == EXHAUSTED) | (run.status == CALLED_OFF)
    run = run._replace(status=jnp.where(ended_from_outside, RUNNING, run.status))
    state, most = _State(setup, run), 1
    try:
        while int(state.run.status) == RUNNING:
            begun = time.monotonic()
            limit = jnp.asarray(1 if callback else most)
            after, rows = called(
                hosts, block, state.setup, _LONGEST_BLOCK, operands, state.run, limit, budget
            )
            steps = int(after.steps) - int(state.run.steps)
            if steps:
                told.append(jax.tree.map(lambda column, n=steps: np.asarray(column)[:n], rows))
            most = _next_length(most, steps, time.monotonic() - begun)
            doublings = state.setup.doublings + int(after.wants_more)
            state = _State(state.setup._replace(doublings=doublings), after)
            if steps:
                last = jax.tree.map(lambda column: column[-1], told[-1])
                telling.tell(int(last.evaluations), float(last.best_value), float(last.sigma))
                if keeping is not None:
                    keeping.save_now_and_then(state.setup, state.run, told)
                if callback is not None and _ends(callback(_progress(problem, after, last))):
                    ended = after._replace(status=jnp.asarray(CALLED_OFF, jnp.int32))
                    state = state._replace(run=ended)
    except KeyboardInterrupt:
        if keeping is not None:
            keeping.save(state.setup, state.run, told)
        raise
    setup, run = state
    if keeping is not None:
        keeping.save(setup, run, told)
    found = called(hosts, _finished, setup, operands, run, max_evaluations)
    history = joined(setup.objective, told)
    return _result(problem, run, history, found)


def _next_length(length: int, steps: int, seconds: float) -> int:
    """Steps of the next block, from the last one's length, steps made, and time."""
    fitting = int(steps * _SECONDS_A_BLOCK / max(seconds, 1e-9))
    # The first block may have been compiled in this time, too.
    least = 2 if length == 1 else 1
    return min(max(fitting, least), 64 * length, _LONGEST_BLOCK)


def _ends(answer: Any) -> bool:
    """Whether a callback's answer ends the run."""
    try:
        return bool(answer)
    except ValueError as error:
        raise TypeError(
            "callback must return whether the run is to end, as one truth value or None, got "
            f"{type(answer).__name__} of shape {np.shape(answer)}"
        ) from error


def _progress(problem: Problem, run: Run, last: MinimizeHistory) -> MinimizeProgress:
    return MinimizeProgress(
        step=int(run.steps),
        evaluations=int(last.evaluations),
        x=problem.inside(run.centre),
        smoothed_value=float(last.smoothed_value),
        standard_error=float(last.standard_error),
        best_value=float(last.best_value),
        sigma=float(last.sigma),
    )


def _result(problem: Problem, run: Run, history: MinimizeHistory, found: Found) -> MinimizeResult:
    return MinimizeResult(
        x=problem.inside(found.u),
        value=found.value,
        value_error=found.value_error,
        num_evaluations=found.evaluations,
        history=history,
        num_steps=run.steps,
        status=run.status,
    )


def _sigma(sigma: Any) -> tuple[Any, Any]:
    """What kind of sigma it is, and its numbers."""
    if sigma is None:
        return ADAPTED, None
    if callable(sigma):
        return trace(sigma, jnp.zeros((), jnp.int32))
    return GIVEN, jax.tree.map(jnp.asarray, check_sigma(sigma))


def _check_fits(sigma: Any, problem: Problem, optimizer: Optimizer | None) -> None:
    """Raises unless sigma fits x0; of a schedule, that of the first step."""
    given = sigma
    if callable(sigma):
        try:
            given = sigma(jnp.zeros((), jnp.int32))
        except TypeError as error:
            error.add_note("raised by sigma(step): a schedule is called with the number of steps")
            raise
    given = jax.tree.map(jnp.asarray, check_sigma(given))
    leaves, names, _ = _leaves.perturbed_leaves(problem.start, "x0")
    scales = scale_leaves(given, problem.start, leaves, names, "x0")
    if optimizer is not None or len(scales) != len(leaves):
        return
    for scale, leaf, name in zip(scales, leaves, names, strict=True):
        if is_matrix(scale, leaf):
            raise ValueError(
                f"sigma is a matrix for leaf {name!r}, which only steps of an optimizer can "
                "have: give optimizer, or a scale for each coordinate; directions are learnt"
            )


def _tolerance(tol: Any) -> float:
    number = _checks.check_number(tol, "tol", "a number or None")
    if not 0 <= number < math.inf:
        raise ValueError(f"tol must be >= 0 and finite, got {tol}")
    return number


def _num_samples(num_samples: Any, objective: Objective, optimizer: Optimizer | None) -> int:
    if num_samples is not None:
        return _checks.check_count(num_samples, "num_samples", _MAX_EVALUATIONS)
    if optimizer is None:
        return max(5, min(objective.dim // 2, 8), min(objective.dim // 15, _MOST_SAMPLES))
    return min(256, max(16, 2 ** math.ceil(math.log2(2 * objective.dim))))


def _finished(setup: Setup, operands: Operands, run: Run, max_evaluations: int) -> Found:
    """What a run found; where an optimiser ended was not evaluated before."""
    last = None if setup.optimizer is None else run.method.point
    return finish(setup.objective, _repeats(max_evaluations), operands, run, last)


def _repeats(max_evaluations: int) -> int:
    """Evaluations that the value of a noisy function is the mean of."""
    return max(2, min(100, max_evaluations // 50))


def _final_evaluations(setup: Setup, max_evaluations: int) -> np.ndarray:
    """Evaluations kept for the end: of a function without noise, and of a noisy one."""
    points = 1 if setup.optimizer is None else 2
    return np.asarray([points, 3 * _repeats(max_evaluations)], np.int32)
