"""What a run is set to: all that its compiled parts depend on."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from ..noise._protocol import NoiseDistribution
from ..noise._traced import TracedNoise, with_numbers
from ..sampling._protocol import Sampler
from ..tracing._host_call import Host
from ..tracing._signature import TracedFunction, trace
from ._problem import Objective
from ._states import Operands

# What stands for a sigma that is not a schedule.
ADAPTED, GIVEN = "adapted", "given"

Sigma = TracedFunction | str


class Optimizer(Protocol):
    """An optimiser as optax makes them."""

    @property
    def init(self) -> Callable[[Any], Any]:
        """The state for given parameters."""
        ...

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """Updates and the next state, from gradients, the state and the parameters."""
        ...


class TracedOptimizer(NamedTuple):
    """An optimiser as its operations: one that was made anew, with other rates, is equal to it."""

    init: TracedFunction
    update: TracedFunction

    def start(self, operands: Any, u: Any) -> Any:
        """The state for the parameters u."""
        found = self.init(operands[0], *jax.tree.leaves(u))
        return jax.tree.unflatten(self.init.out_tree, found)

    def step(self, operands: Any, gradient: Any, state: Any, u: Any) -> tuple[Any, Any]:
        """Updates, and the next state."""
        found = self.update(operands[1], *jax.tree.leaves((gradient, state, u)))
        return jax.tree.unflatten(self.update.out_tree, found)


def trace_optimizer(optimizer: Optimizer, u: Any) -> tuple[TracedOptimizer, Any]:
    """The optimiser for parameters like u, and its numbers, which are the operands."""

    def of_leaves(fun: Callable[..., Any], *like: Any) -> tuple[TracedFunction, Any]:
        leaves, tree = jax.tree.flatten(like)
        return trace(lambda *values: fun(*jax.tree.unflatten(tree, values)), *leaves)

    u = jax.eval_shape(lambda: u)
    init, numbers = of_leaves(optimizer.init, u)
    state = jax.tree.unflatten(
        init.out_tree, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in init.out_avals]
    )
    try:
        update, more = of_leaves(optimizer.update, u, state, u)
    except TypeError as error:
        error.add_note(
            "minimize calls optimizer.update(gradients, state, x) alone; if the optimizer needs "
            "more, as for a line search, it is not supported"
        )
        raise
    return TracedOptimizer(init, update), (numbers, more)


class Setup(NamedTuple):
    """What the compiled parts depend on, comparable, so that equal runs are compiled once.

    Attributes:
      objective: what is minimised.
      optimizer: the optimiser, or None.
      sigma: adapted, given, or a schedule, of steps.
      num_samples: for each step, at first.
      grows: whether num_samples may grow.
      doublings: how often it has.
      noise: its law, without its numbers where it is a user's.
      sampler: as for `make_perturbed_fun`.
      degree: as for `make_perturbed_fun`.
      batch_size: as for `make_perturbed_fun`.
    """

    objective: Objective
    optimizer: TracedOptimizer | None
    sigma: Sigma
    num_samples: int
    grows: bool
    doublings: int
    noise: NoiseDistribution | TracedNoise
    sampler: Sampler | None
    degree: int | None
    batch_size: int | None

    def law(self, operands: Operands) -> NoiseDistribution | TracedNoise:
        """The noise, with its numbers."""
        return with_numbers(self.noise, operands.noise)

    @property
    def hosts(self) -> tuple[Host, ...]:
        """The functions outside JAX that a step calls."""
        parts = [self.objective.traced, *(self.optimizer or ())]
        if isinstance(self.sigma, TracedFunction):
            parts.append(self.sigma)
        if isinstance(self.noise, TracedNoise):
            parts.extend(traced for _, traced in self.noise.methods)
        return tuple(host for part in parts for host in part.hosts)
