"""The distribution of a solver's solutions under noise: which ones there are, and how often."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from .. import _checks, _leaves
from .._call import Call, Settings, evaluate, prepare
from .._describe import describe, remembered
from .._types import Fun, PyTree
from ..diagnostics._words import are_known, columns_of, fields_of, numbers_of, wide
from ..estimator import _formula
from ..execution._plan import concatenate, flat_scale, noise_in, standardised
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Gumbel
from ..sampling import _random_bits
from ..sampling._protocol import Sampler
from ..scale import _scales
from ..tracing._mesh_axes import in_types_of_constants, with_explicit_axes
from ._layer import Layer
from ._perturbed_scores import Perturbation

# Solutions that are printed, and numbers of each.
_ROWS, _NUMBERS = 10, 8
# The key of the hash by which solutions are sorted.
_HASH = np.array([0x9E3779B9, 0x7F4A7C15], np.uint32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EmpiricalDistribution:
    """Distinct solutions and their weights, by falling weight.

    There are as many places as samples, so that shapes do not depend on chance. Places beyond the
    number of distinct solutions repeat the first one, with the weight 0.

    Attributes:
      solutions: a pytree of arrays, each with a leading axis of places.
      weights: their relative frequencies, which add up to 1; shape (places,).
    """

    solutions: PyTree
    weights: Array

    def __str__(self) -> str:
        """A table of the solutions with the largest weights."""
        if not are_known(self) or np.ndim(self.weights) != 1:
            return fields_of(self)
        weights = wide(self.weights)
        distinct = np.count_nonzero(weights)
        shown = range(min(distinct, _ROWS))
        paths, _ = jax.tree_util.tree_flatten_with_path(self.solutions)
        leaves = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in paths]
        rows = [("weight", "solution")]
        for i in shown:
            solution = "; ".join(f"{name} {_in_words(leaf[i])}".lstrip() for name, leaf in leaves)
            rows.append((f"{weights[i]:.3g}", solution))
        if distinct > _ROWS:
            rest = f"of {distinct - _ROWS:,} more solutions"
            rows.append((f"{weights[_ROWS:].sum():.3g}", rest))
        head = f"{distinct:,} distinct solutions of {len(weights):,} samples"
        return "\n".join([head, *columns_of(rows, left=(1,))])

    __repr__ = __str__

    def expectation(self, cost: Fun, *args: Any) -> Any:
        """The mean of `cost(solution, *args)`, a pytree of arrays, under the weights.

        Its derivative in the scores is that of the weights; in further arguments and in whatever
        `cost` closes over it is that of the cost. The cost, vmapped, may be any function of a
        solution; it is not differentiated in it, where the solver is not. It is evaluated at every
        place, those that repeat the first solution included: as often as there are samples.
        """
        costs = jax.vmap(lambda y: cost(y, *args))(self.solutions)

        def mean(values: Array) -> Array:
            dtype = self.weights.dtype
            if jnp.issubdtype(values.dtype, jnp.inexact):
                dtype = np.result_type(dtype, values.dtype)
            column = (-1, *[1] * (values.ndim - 1))
            # A place of weight 0 repeats a solution, whose cost may be infinite.
            used = (lax.stop_gradient(self.weights) != 0).reshape(column)
            values = jnp.where(used, values.astype(dtype), 0)
            return jnp.sum(self.weights.astype(dtype).reshape(column) * values, axis=0)

        return jax.tree.map(mean, costs)


def _in_words(solution: np.ndarray) -> str:
    """The first numbers; of many that are 0 or 1, where the first ones are that are 1."""
    if solution.size > _NUMBERS and np.isin(solution, (0, 1)).all():
        ones = np.argwhere(solution)
        places = [str(at[0]) if len(at) == 1 else str(tuple(at.tolist())) for at in ones[:_NUMBERS]]
        more = f", ... ({len(ones):,} of {solution.size:,})" if len(ones) > _NUMBERS else ""
        return f"1 at {', '.join(places)}{more}" if places else "0 everywhere"
    return numbers_of(wide(solution), most=_NUMBERS, digits=6)


@remembered
def make_perturbed_distribution(
    argmax_fun: Fun,
    num_samples: int = 1000,
    sigma: PyTree = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    maximize: bool = True,
    multiplicative: bool = False,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    mesh: Mesh | None = None,
) -> Fun:
    r"""Gives the distribution of a solver's solutions when its scores are perturbed.

    .. math:: p_\theta(y) = P(y^*(\theta + \sigma Z) = y)

    It answers which solutions compete, how sure the choice is, and what the expected cost of the
    choice is, for any cost of a hard solution (such as regret). The weights are differentiable in
    theta and sigma by the score of the noise, to every order and without bias.

    To train on one expected cost alone, `make_perturbed_fun` of the cost of the solution does the
    same with less variance where a surrogate helps, and without storing solutions.

    Args:
      argmax_fun: the solver, `argmax_fun(theta, *args, **kwargs)`; solutions may have any
        structure, shapes and dtypes. Equal means equal in all bits.
      num_samples: how many problems are solved, and how many places the result has.
      sigma: as in `make_perturbed_argmax`.
      noise: as in `make_perturbed_argmax`.
      use_baseline: weigh each solution against the frequencies among the samples of other groups,
        which lowers the variance of derivatives; for a cost c, that is the baseline of the mean
        of the others' costs. One sample, or one group of samples, has no others, hence no
        baseline.
      maximize: False for a solver that minimises costs theta, which sees theta - sigma Z.
      multiplicative: as in `make_perturbed_argmax`.
      batch_size: as in `make_perturbed_argmax`.
      sampler: as in `make_perturbed_argmax`; None chooses, as for degree 0.
      mesh: as in `make_perturbed_argmax`.

    Returns:
      A function `g(key, theta, *args, **kwargs)` that returns an `EmpiricalDistribution`. `key` is
      one PRNG key; it is consumed.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: as in `make_perturbed_fun`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> distribution = px.make_perturbed_distribution(
      ...     px.solvers.one_hot_argmax, 10_000, sigma=0.5
      ... )
      >>> theta, prices = jnp.array([0.0, 0.0, 0.5]), jnp.array([1.0, 2.0, 4.0])
      >>> found = distribution(jax.random.key(0), theta)
      >>> print(found.solutions[0], found.weights[:4].round(1))
      [0. 0. 1.] [0.6 0.2 0.2 0. ]
      >>> print(found.expectation(lambda y: y @ prices).round(1))
      2.9

    References:
      Dalle et al., Learning with Combinatorial Optimization Layers: a Probabilistic Approach, 2022,
      arXiv:2207.13513
    """
    # All that is wanted of the perturbed function are its samples.
    settings = Settings(
        num_samples=num_samples,
        sigma=sigma,
        noise=noise,
        use_baseline=False,
        batch_size=batch_size,
        has_aux=True,
        sampler=sampler,
        degree=0,
        mesh=mesh,
    )
    use_baseline = _checks.check_bool(use_baseline, "use_baseline")
    layer = Layer(argmax_fun, settings, maximize, multiplicative)

    def perturbed_distribution(*args: Any, **kwargs: Any) -> EmpiricalDistribution:
        key, leaves, scales, tree, rest = layer.given(args, kwargs)
        dtype = _leaves.noise_dtype(leaves)
        scores, _ = layer.split(layer.inputs(leaves, scales), scales)
        perturbation = Perturbation(scores, scales, layer.multiplicative, dtype)

        def solve(v: list[Array]) -> Any:
            u = layer.unsigned(tree, perturbation.point(v))
            # Noise and solutions, as aux of no value.
            return jnp.zeros((), dtype), (v, argmax_fun(u, *rest, **kwargs))

        location, scale = perturbation.location(), perturbation.scale()
        call = prepare(dataclasses.replace(settings, sigma=scale), solve, key, location)
        _, (v, solutions) = evaluate(call)
        size = call.plan.group_size if use_baseline else num_samples
        density = _log_density(call, v)
        distinct, weights = _tabulate(size, in_types_of_constants(solutions), density)
        distinct = jax.tree.map(with_explicit_axes, distinct, solutions)
        if layer.has_traced_scales:
            [weights] = _scales.nan_unless_valid([weights], scales)
        return EmpiricalDistribution(distinct, weights)

    does = f"Estimates the distribution of {{name}}(theta + sigma Z) from {num_samples} solutions."
    names, maker = ("key", "theta"), "make_perturbed_distribution"
    describe(perturbed_distribution, "distribution_of", argmax_fun, names, maker, does)
    return perturbed_distribution


def _log_density(call: Call, v: list[Array]) -> Array:
    """Log-density of each sample v, held fixed, under m + r Z: shape (N,)."""
    plan = call.plan
    v, x, sigma = in_types_of_constants((v, call.x, call.sigma))
    # v is the noise itself, for m is 0 and r is 1; there may be no leaves.
    rows = [jnp.zeros((plan.num_samples, 0), plan.dtype), *(one.reshape(len(one), -1) for one in v)]
    z, noise = lax.stop_gradient(jnp.concatenate(rows, axis=1)), noise_in(plan, call.operands)
    a_and_r = standardised(plan, concatenate(x, plan.dtype), flat_scale(plan, sigma))
    return _formula.log_density(plan, noise, z, *a_and_r)


@partial(jax.jit, static_argnums=0)
def _tabulate(group_size: int, solutions: PyTree, density: Array) -> tuple[Any, Array]:
    """Distinct solutions, by falling frequency, and the frequencies, with derivatives."""
    num = len(density)
    place, counts, first = _classes(jax.tree.leaves(lax.stop_gradient(solutions)), num)
    distinct = jax.tree.map(lambda y: jnp.asarray(y)[first], solutions)
    # Zero, also where the density is not known, with the derivatives of the samples' weights.
    change = _formula.with_value(jnp.zeros_like(density), _formula.unit_weight(density))
    change = _formula.weights_less_baselines(change, group_size)
    change_of_class = jax.ops.segment_sum(change, place, num)
    return distinct, (counts.astype(density.dtype) + change_of_class) / num


def _classes(leaves: list[Any], num: int) -> tuple[Array, Array, Array]:
    """The class of each of `num` samples, the size of each class, and a member of each.

    Classes of equal samples, the largest first. Samples are sorted by a hash of 64 bits and
    compared with their neighbours in full, so unequal ones are never taken for equal.
    """
    words = [_words(jnp.asarray(v)).reshape(num, -1) for v in leaves]
    rows = jnp.concatenate([*words, jnp.zeros((num, 1), jnp.uint32)], axis=1)
    columns = lax.iota(jnp.uint32, rows.shape[1])[None]
    hashes = [
        jnp.sum(h, axis=1, dtype=jnp.uint32)
        for h in _random_bits.threefry(jnp.asarray(_HASH), rows, columns)
    ]
    index = lax.iota(jnp.int32, num)
    *_, order = lax.sort((*hashes, index), num_keys=2)
    rows = rows[order]
    new = jnp.any(rows[1:] != rows[:-1], axis=1)
    label = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    counts = jax.ops.segment_sum(jnp.ones(num, jnp.int32), label, num)
    first = jax.ops.segment_min(order, label, num)
    counts, first, old = lax.sort((-counts, first, index), num_keys=2)
    counts = -counts
    place = jnp.zeros(num, jnp.int32).at[old].set(index)[label]
    first = jnp.where(counts > 0, first, first[0])
    return jnp.zeros(num, jnp.int32).at[order].set(place), counts, first


def _words(values: Array) -> Array:
    """The bits of each number, as uint32; the two zeros count as one."""
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        return jnp.stack([_words(values.real), _words(values.imag)], axis=-1)
    if jnp.issubdtype(values.dtype, jnp.floating):
        values = jnp.where(values == 0, jnp.zeros_like(values), values)
        if values.dtype.itemsize < 4:
            values = values.astype(jnp.float32)
    elif values.dtype.itemsize < 4:
        values = values.astype(jnp.int32)
    return lax.bitcast_convert_type(values, jnp.uint32)
