"""One call of a perturbed function: its settings and arguments checked, planned, evaluated."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from . import _checks, _leaves
from ._types import PyTree
from .estimator import _default_rule, _estimator
from .execution._plan import Operands, Plan
from .noise._foreign import as_noise
from .noise._protocol import NoiseDistribution
from .noise._smooth import Gumbel
from .noise._traced import without_numbers
from .sampling._protocol import Sampler
from .scale import _scales
from .tracing import _user_code
from .tracing._host_exceptions import called
from .tracing._mesh_axes import (
    in_told_types,
    in_types_of_constants,
    inside_shard_map,
    replicated,
    share_axes,
    traced_for,
    with_explicit_axes,
)

# Sums over samples are divided by their number, an int32.
_MAX_SAMPLES = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Settings:
    """How a function is perturbed: the arguments of `make_perturbed_fun` but fun, checked.

    `dataclasses.replace(settings, num_samples=4000)` gives others, checked as well.

    Attributes:
      num_samples: number of evaluations.
      sigma: scale of the noise, a pytree of arrays.
      noise: law of the noise; another library's is wrapped.
      use_baseline: whether derivatives are of what a surrogate leaves.
      batch_size: how many samples are evaluated at a time; None leaves it open.
      has_aux: whether the function returns a pair (value, aux).
      sampler: draws the samples; None leaves it open.
      degree: of the surrogate; None leaves it open.
      missing: "propagate" or "drop", what becomes of samples whose value has a NaN.
      mesh: whose devices share the samples, with axes along which JAX itself places arrays.
    """

    num_samples: int = 1000
    sigma: PyTree = 0.1
    noise: NoiseDistribution = Gumbel()
    use_baseline: bool = True
    batch_size: int | None = None
    has_aux: bool = False
    sampler: Sampler | None = None
    degree: int | None = None
    missing: str = "propagate"
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Checks all that can be checked before a call."""
        remedy = "; average calls with different keys instead"
        count = _checks.check_count(self.num_samples, "num_samples", _MAX_SAMPLES, remedy=remedy)
        checked: dict[str, Any] = {"num_samples": count}
        checked["sigma"] = _scales.check_sigma(self.sigma)
        _checks.check_noise(self.noise)
        checked["noise"] = as_noise(self.noise)
        checked["use_baseline"] = _checks.check_bool(self.use_baseline, "use_baseline")
        if self.batch_size is not None:
            checked["batch_size"] = _checks.check_count(self.batch_size, "batch_size")
        checked["has_aux"] = _checks.check_bool(self.has_aux, "has_aux")
        _checks.check_sampler(self.sampler)
        _checks.check_degree(self.degree)
        _checks.check_missing(self.missing)
        checked["mesh"] = _checks.check_mesh(self.mesh)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        told["sigma"] = jax.tree.map(_number, self.sigma)
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def _number(scale: Any) -> Any:
    return scale.item() if isinstance(scale, np.ndarray) and not scale.ndim else scale


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a perturbed function: its arguments, checked, and what was found out about them.

    Attributes:
      settings: of the perturbed function.
      plan: the static part.
      key: one typed PRNG key.
      x: the perturbed leaves.
      sigma: one scale a leaf, or a single number for all.
      operands: what fun and the noise close over.
      value_tree: structure of the value.
      aux_tree: structure of aux; of None, if there is none.
    """

    settings: Settings
    plan: Plan
    key: Array
    x: list[Array]
    sigma: list[Array]
    operands: Operands
    value_tree: Any
    aux_tree: Any

    @property
    def inputs(self) -> tuple[Array, list[Array], list[Array], Operands]:
        """What is not static: key, x, sigma and operands."""
        return self.key, self.x, self.sigma, self.operands


def prepare(
    settings: Settings,
    fun: Callable[[PyTree], PyTree],
    key: Array,
    x: PyTree,
    num_nets: int = _default_rule.RULE.nets,
) -> Call:
    """Checks the arguments of a call, traces fun(x), and chooses what was left open.

    Args:
      settings: how fun is perturbed.
      fun: a function of x alone.
      key: one PRNG key.
      x: where.
      num_nets: how many nets, where nets are chosen.
    """
    mesh = settings.mesh
    if mesh is not None and inside_shard_map():
        raise ValueError(
            "mesh must be None inside jax.shard_map and jax.pmap, where each device makes a call "
            "of its own; call the perturbed function outside of it, or leave mesh away"
        )
    key = _checks.check_key(key, x)
    leaves, names, merge = _leaves.perturbed_leaves(x)
    scales = _scales.scale_leaves(settings.sigma, x, leaves, names)
    key, leaves, scales = replicated(mesh, share_axes(key, leaves, scales))

    def trace_at(merge: Callable[[Any], Any]) -> _user_code.Traced:
        with traced_for(mesh):
            found = _user_code.trace_fun(
                lambda values: fun(merge(values)), leaves, settings.has_aux
            )
        if mesh is None:
            return found
        return found._replace(function=found.function.without_told_meshes())

    traced, own_operands = trace_at(merge), ()
    # Callbacks of many points see numbers and other leaves of x at each point too.
    if traced.function.takes_many:
        x = jax.tree.map(lambda v: v if isinstance(v, Array | float) else jnp.asarray(v), x)
        traced = trace_at(_leaves.perturbed_leaves(x)[2])
        own_operands = _user_code.leaves_among(traced.operands, x)
    num_outputs = traced.value_tree.num_leaves
    dtype = _leaves.noise_dtype(leaves)
    dim = _leaves.num_elements(leaves)
    num_numbers = sum(v.size for v in traced.function.out_avals[:num_outputs])
    choice = _default_rule.choose(
        settings.num_samples,
        dim,
        settings.noise,
        settings.sampler,
        settings.degree,
        num_nets,
        num_numbers,
    )
    with traced_for(mesh):
        noise, noise_operands = without_numbers(settings.noise, key, dim, dtype)
    # A surrogate serves derivatives alone, and its fit needs the first one of the density.
    fits = settings.use_baseline and getattr(noise, "derivatives", math.inf) >= 1
    plan = Plan(
        fun=traced.function,
        noise=noise,
        sampler=choice.sampler,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        degree=choice.degree if fits else None,
        num_outputs=num_outputs,
        shapes=tuple(v.shape for v in leaves),
        dtypes=tuple(v.dtype for v in leaves),
        dtype=dtype,
        drop_missing=settings.missing == "drop",
        own_operands=own_operands,
        mesh=mesh,
    )
    both = replicated(mesh, Operands(traced.operands, noise_operands))
    return Call(settings, plan, key, leaves, scales, both, traced.value_tree, traced.aux_tree)


def run(call: Call, program: Callable[..., Any], *static: Any) -> Any:
    """program(*static, key, x, sigma, operands), all but the first from the call.

    Exceptions of host functions arrive as they were raised, those of JAX with remedies added.
    """
    explained = _user_code.explained_vmap(call.settings.batch_size)
    *inputs, operands = call.inputs
    with explained, traced_for(call.plan.mesh):
        # Fun alone is told how x is split over a mesh of explicit axes.
        inputs = in_types_of_constants(inputs)
        if call.plan.mesh is not None:
            program, static = _untold, (call.plan.mesh, program, static)
        found = called(call.plan.fun.hosts, program, *static, *inputs, operands)
    return in_told_types(call.plan.mesh, found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _untold(mesh: Mesh, program: Callable[..., Any], static: tuple[Any, ...], *inputs: Any) -> Any:
    """program(*static, *inputs), where neither arguments nor cotangents tell a mesh.

    Jitted, for outside of `jit` the type of an array tells its mesh, even after `replicated`.
    """
    return replicated(mesh, program(*static, *replicated(mesh, inputs)))


def evaluate(call: Call) -> PyTree:
    """The estimate of E[fun(x + sigma eps)]; with aux, if there is any, a pair."""
    settings = call.settings
    value, aux = run(call, _estimator.estimate, call.plan)
    if _checks.is_traced(settings.sigma):
        value = _scales.nan_unless_valid(value, call.sigma, call.x)
    told = list(map(with_explicit_axes, [*value, *aux], call.plan.fun.out_avals))
    value = jax.tree.unflatten(call.value_tree, told[: call.plan.num_outputs])
    if not settings.has_aux:
        return value
    return value, jax.tree.unflatten(call.aux_tree, told[call.plan.num_outputs :])
