"""What a run is set to: all that its compiled parts depend on."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jax import Array

from ..noise._protocol import NoiseDistribution
from ..sampling._protocol import Sampler
from ._problem import Objective

# What stands for a sigma that is not a schedule.
ADAPTED, GIVEN = "adapted", "given"

Sigma = Callable[[Array], Array] | str


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


class Setup(NamedTuple):
    """What the compiled parts depend on, comparable, so that equal runs are compiled once.

    Attributes:
      objective: what is minimised.
      optimizer: of optax, or None.
      sigma: adapted, given, or a schedule.
      num_samples: for each step, at first.
      grows: whether num_samples may grow.
      doublings: how often it has.
      noise: its law.
      sampler: as for `make_perturbed_fun`.
      degree: as for `make_perturbed_fun`.
      batch_size: as for `make_perturbed_fun`.
    """

    objective: Objective
    optimizer: Optimizer | None
    sigma: Sigma
    num_samples: int
    grows: bool
    doublings: int
    noise: NoiseDistribution
    sampler: Sampler | None
    degree: int | None
    batch_size: int | None
