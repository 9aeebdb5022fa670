"""Straight-through estimation: the value of a function itself, derivatives of it smoothed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from . import _checks, _leaves
from ._call import Settings, evaluate, prepare
from ._describe import describe, leading, remembered
from ._types import Fun, PyTree
from .estimator._formula import with_value
from .noise._protocol import NoiseDistribution
from .noise._smooth import Gumbel
from .sampling._protocol import Sampler
from .tracing._derivative_rules import live_jvp, with_jvp
from .tracing._host_exceptions import called
from .tracing._signature import TracedFunction, trace


@remembered
def make_straight_through_fun(
    fun: Fun,
    num_samples: int = 1000,
    sigma: PyTree = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
    mesh: Mesh | None = None,
) -> Fun:
    r"""Gives a function the derivatives of its smoothed version, and leaves its value as it is.

    Forward, the result is `fun(x)` exactly: hard choices stay hard. Backward, all derivatives, of
    every order and in every argument, are those that `make_perturbed_fun` estimates. In a longer
    computation that is a biased gradient: the functions that follow are differentiated at `fun(x)`
    and not at the mean.

    Args:
      fun: as in `make_perturbed_fun`.
      num_samples: number of evaluations of fun for derivatives, as in `make_perturbed_fun`. A
        value takes one evaluation.
      sigma: as in `make_perturbed_fun`.
      noise: as in `make_perturbed_fun`.
      use_baseline: as in `make_perturbed_fun`.
      batch_size: as in `make_perturbed_fun`.
      sampler: as in `make_perturbed_fun`.
      degree: as in `make_perturbed_fun`.
      mesh: as in `make_perturbed_fun`.

    Returns:
      A function `g(key, x, *args, **kwargs)` that returns `fun(x, *args, **kwargs)`, in floating
      dtypes of at least single precision. `key` is one PRNG key; it is consumed.

    Raises:
      TypeError: at construction or call, as in `make_perturbed_fun`.
      ValueError: as in `make_perturbed_fun`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> round_off = px.make_straight_through_fun(jnp.round, 4000, sigma=0.5, noise=px.Normal())
      >>> x = jnp.array([0.2, 1.7])
      >>> print(round_off(jax.random.key(0), x))
      [0. 2.]
      >>> slope = jax.grad(lambda x: jnp.sum(round_off(jax.random.key(0), x)))(x)
      >>> print(jnp.round(slope))
      [1. 1.]

    References:
      Bengio, Leonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons
      for Conditional Computation, 2013, arXiv:1308.3432
    """
    _checks.check_fun(fun)
    settings = Settings(
        num_samples=num_samples,
        sigma=sigma,
        noise=noise,
        use_baseline=use_baseline,
        batch_size=batch_size,
        sampler=sampler,
        degree=degree,
        mesh=mesh,
    )

    def straight_through_fun(*args: Any, **kwargs: Any) -> PyTree:
        key, x, *rest = leading(("key", "x"), args, kwargs)
        key = _checks.check_key(key, x)
        leaves, _, merge = _leaves.perturbed_leaves(x)

        def at(x: PyTree) -> PyTree:
            return fun(x, *rest, **kwargs)

        soft, operands = trace(lambda *v: evaluate(prepare(settings, at, key, merge(v))), *leaves)
        hard, hard_operands = trace(lambda *v: at(merge(v)), *leaves)
        operands = (operands, hard_operands)
        if soft.jaxpr.effects:  # which a derivative rule may not have (jax#11916)
            # Held fixed, for what has side effects may have no derivative either.
            fixed = jax.lax.stop_gradient((leaves, operands))
            values = called(hard.hosts, _value, soft, hard, *fixed)
            means = called(soft.hosts, soft, operands[0], *leaves)
            out = [with_value(v, mean) for v, mean in zip(values, means, strict=True)]
        else:
            out = called(soft.hosts, _straight_through, soft, hard, leaves, operands)
        return jax.tree.unflatten(soft.out_tree, out)

    does = "Gives {name}(x), with the derivatives of E[{name}(x + sigma eps)]."
    maker = "make_straight_through_fun"
    describe(straight_through_fun, "straight_through", fun, ("key", "x"), maker, does)
    return straight_through_fun


def _value(
    soft: TracedFunction, hard: TracedFunction, leaves: PyTree, operands: PyTree
) -> list[Array]:
    return [
        jnp.asarray(v).astype(aval.dtype)
        for v, aval in zip(hard(operands[1], *leaves), soft.out_avals, strict=True)
    ]


def _value_jvp(
    soft: TracedFunction, hard: TracedFunction, primals: PyTree, tangents: PyTree
) -> tuple[list[Array], list[Array]]:
    leaves, operands = primals
    leaves_dot, operands_dot = tangents
    _, out_dot = live_jvp(
        lambda leaves, operands: soft(operands, *leaves),
        (leaves, operands[0]),
        (leaves_dot, operands_dot[0]),
    )
    # What soft closed over is of no use here, and its keys are consumed by now.
    operands = jax.tree.map(_clone, operands)
    return _hard_value(soft, hard, leaves, operands), out_dot


def _clone(value: Any) -> Any:
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
    return jax.random.clone(value) if is_key else value


# The results of `hard`, with the derivatives of `soft`.
_hard_value = with_jvp(_value, _value_jvp, 2, symbolic_zeros=True)
_straight_through = jax.jit(_hard_value, static_argnums=(0, 1))
