"""estimate: a perturbed function and its gradient, with standard errors."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks, _leaves
from .._call import run
from .._perturb import PerturbedFun, check_perturbed_fun
from ..estimator._default_rule import RULE, choose
from ..estimator._derivatives import grads_of_expected, score_function_sums
from ..estimator._formula import Part, Surrogates, coefficients, fitted, kept, unit_of
from ..execution._chunks import Chunk, drawer, evaluate_at, kept_noise, stacked, summed
from ..execution._plan import (
    Operands,
    Plan,
    Point,
    chunk_size,
    concatenate,
    flat_scale,
    in_groups,
    noise_in,
    split_leaves,
    standardised,
)
from ..sampling import _random_bits
from ..sampling._independent import Independent
from ..scale import _scales
from ..tracing._derivative_rules import without_derivatives
from ..tracing._mesh_axes import with_explicit_axes
from ._words import are_known, columns_of, fields_of, numbers_of, wide

# Arrays that are printed.
_ROWS = 20


class Intervals(NamedTuple):
    """Ends of confidence intervals, `(low, high)`, structured as what they are intervals of.

    Attributes:
      value: of the value.
      gradient: of the gradient; a pair of None where there is none.
    """

    value: tuple[Any, Any]
    gradient: tuple[Any, Any]

    def __str__(self) -> str:
        """A table with a row for each array: its first intervals."""
        if not are_known(self):
            return fields_of(self)
        rows = [["", "shape", "intervals"]]
        for name, (lows, highs) in zip(self._fields, self, strict=True):
            found = jax.tree_util.tree_leaves_with_path(lows)
            for (path, low), high in zip(found, jax.tree.leaves(highs), strict=True):
                words = numbers_of(wide(low), to=wide(high))
                rows.append([f"{name}{jax.tree_util.keystr(path)}", f"{np.shape(low)}", words])
        return "\n".join(_first_rows(rows))

    __repr__ = __str__


def _first_rows(rows: list[list[str]]) -> list[str]:
    """Lines of a table of arrays, and how many more there are."""
    more = len(rows) - 1 - _ROWS
    return [
        *columns_of(rows[: _ROWS + 1], left=(0, 2)),
        *([f"and {more} more arrays"] if more > 0 else []),
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """Estimates of a perturbed function and its gradient, with a standard error for each number.

    Attributes:
      value: as the perturbed function returns it.
      value_error: its standard errors, of the same structure; real, those of a complex number
        being the root of what its two parts' squares add up to.
      gradient: in x, with its structure, None in place of leaves that are not perturbed; where the
        value is not one number, the Jacobian, structured as by `jax.jacobian`. None for noise that
        is good for no derivative.
      gradient_error: its standard errors, of the same structure.
      aux: stacked over the samples if the function has any, else None.
      degrees_of_freedom: of the standard errors, one less than there are groups of samples.
      missing: with missing="drop", how many samples were left out; else None.
      empty_groups: with missing="drop", how many groups have no sample left, which
        degrees_of_freedom counts and `interval` does not; else None. Where less than two groups
        have any, errors are NaN.
    """

    value: Any
    value_error: Any
    gradient: Any
    gradient_error: Any
    aux: Any
    degrees_of_freedom: int = dataclasses.field(metadata={"static": True})
    missing: Array | None = None
    empty_groups: Array | None = None

    def __str__(self) -> str:
        """A table with a row for each array: its first numbers, its length and that of errors."""
        if not are_known(self):
            return fields_of(self)
        rows = [["", "shape", "numbers ± standard errors", "length", "of errors"]]
        for name in ("value", "gradient"):
            errors = jax.tree.leaves(getattr(self, f"{name}_error"))
            found = jax.tree_util.tree_leaves_with_path(getattr(self, name))
            for (path, leaf), error in zip(found, errors, strict=True):
                shape = f"{np.shape(leaf)}"
                lengths = [f"{np.linalg.norm(np.ravel(wide(v))):.3g}" for v in (leaf, error)]
                numbers = numbers_of(wide(leaf), wide(error))
                rows.append([f"{name}{jax.tree_util.keystr(path)}", shape, numbers, *lengths])
        freedom, missing = f"{self.degrees_of_freedom}", ""
        if self.empty_groups is not None:
            # One number for each estimate of a batch.
            left = sorted(map(str, np.ravel(freedom_left(self))), key=int)
            freedom = " to ".join(dict.fromkeys(left[:1] + left[-1:]))
            missing = f", {np.sum(np.asarray(self.missing))} samples left out"
        return "\n".join([*_first_rows(rows), f"{freedom} degrees of freedom{missing}"])

    __repr__ = __str__

    def interval(self, level: float = 0.95) -> Intervals:
        """Confidence intervals, number by number, of the value and of the gradient.

        By Student's law, whose tails allow for how well few groups tell their own spread.

        Args:
          level: how often each interval is to contain what is estimated, between 0 and 1, a Python
            number.

        Returns:
          `Intervals`: `(low, high)` for the value and `(low, high)` for the gradient.

        Raises:
          TypeError: if level is not a number, or traced; if the value is complex.
          ValueError: if level is not between 0 and 1.
        """
        level = _checks.check_level(level)
        if any(map(jnp.iscomplexobj, jax.tree.leaves((self.value, self.gradient)))):
            raise TypeError(
                "intervals are of real numbers, but the value is complex: let the function return "
                "its real and imaginary parts"
            )
        import scipy.stats  # takes long to import

        degrees: Any = self.degrees_of_freedom
        if self.empty_groups is not None:
            degrees = np.arange(degrees + 1)
        # NaN without a degree of freedom.
        degrees = np.where(degrees > 0, degrees, np.nan)
        width = jnp.asarray(scipy.stats.t.ppf((1 + level) / 2, degrees))
        if self.empty_groups is not None:  # one number for each estimate of a batch
            width = width[freedom_left(self)]

        def half_of(error: Array) -> Array:
            return error * width.astype(error.dtype).reshape(
                *width.shape, *[1] * (error.ndim - width.ndim)
            )

        def ends(middle: Any, error: Any) -> tuple[Any, Any]:
            half = jax.tree.map(half_of, error)
            return jax.tree.map(jnp.subtract, middle, half), jax.tree.map(jnp.add, middle, half)

        return Intervals(
            value=ends(self.value, self.value_error),
            gradient=ends(self.gradient, self.gradient_error),
        )


def freedom_left(found: Estimate) -> Array:
    """Degrees of freedom of the standard errors, without those of groups of which none is left."""
    empty = 0 if found.empty_groups is None else found.empty_groups
    return jnp.maximum(found.degrees_of_freedom - empty, 0)


def _without_derivatives(name: str, values: Any) -> Any:
    # Noise and the point of evaluation are held fixed in what follows, so that automatic
    # differentiation would find zero, or a part of the derivative, and say nothing.
    return without_derivatives(
        f"a derivative of the results of estimate was asked for, in {name}, but they have none. "
        "Differentiate the perturbed function itself, for example by jax.grad(g, argnums=1)(key, "
        "x); where results are only to be looked at, compute them from jax.lax.stop_gradient of "
        f"{name}",
        values,
    )


def estimate(
    perturbed_fun: PerturbedFun, key: Array, x: Any, /, *args: Any, **kwargs: Any
) -> Estimate:
    """Value and gradient of a perturbed function, and the standard error of each.

    The errors come from the spread of the groups of samples, which are independent of each other:
    the function is evaluated no more often than for a gradient alone. Works under `jit` and `vmap`;
    the results have no derivatives, which the perturbed function has.

    Value and gradient are those that `perturbed_fun` and `jax.grad` of it have at the same key if
    it was given a sampler. If it was not, and would take two nets of samples, eight smaller ones
    (fewer of few samples, and perhaps of the other kind) are taken here, as two tell almost nothing
    about their spread.

    Args:
      perturbed_fun: what `make_perturbed_fun` returned.
      key: one PRNG key; it is consumed.
      x: where to estimate.
      *args: further arguments of the function.
      **kwargs: further keyword arguments of the function.

    Returns:
      An `Estimate`.

    Raises:
      TypeError: if perturbed_fun is not what make_perturbed_fun returned: a layer, or a wrapper.
      ValueError: if its sampler puts all samples into one group.
      NotImplementedError: if the results are differentiated, in x, sigma or anything else; if the
        noise turns out to be good for no derivative, but does not say so (see `check_noise`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> steps = lambda x: jnp.sum(jnp.where(x > 0, 1.0, 0.0))
      >>> smooth_steps = px.make_perturbed_fun(steps, 1_000, sigma=0.5, noise=px.Normal())
      >>> found = px.estimate(smooth_steps, jax.random.key(0), jnp.zeros(2))
      >>> low, high = found.interval(0.95).value
      >>> bool(low < 1.0), bool(1.0 < high), found.degrees_of_freedom
      (True, True, 7)

    References:
      Owen, Practical Quasi-Monte Carlo Integration, 2023, chapter 17, on replicates of nets
    """
    return estimates_by_degree(perturbed_fun, (), key, x, args, kwargs)[0]


def estimates_by_degree(
    perturbed_fun: PerturbedFun,
    degrees: tuple[int, ...],
    key: Array,
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Estimate]:
    """What `estimate` returns, and the same of other degrees from the same evaluations.

    Raises:
      ValueError: if for one of the degrees other samples would be drawn.
    """
    check_perturbed_fun(
        perturbed_fun,
        "perturbed_fun",
        "apply jit and vmap to estimate (layers and losses have no standard errors; a mean "
        "solution is a perturbed function of its solver)",
    )
    key = _checks.check_key(key, x, "estimate(g, key, x)")
    call = perturbed_fun.prepare(key, x, args, kwargs, RULE.nets_for_errors)
    call = dataclasses.replace(
        call,
        x=_without_derivatives("x", call.x),
        sigma=_without_derivatives("sigma", call.sigma),
        operands=_without_derivatives("what the function and its noise depend on", call.operands),
    )
    plan = call.plan
    if plan.num_groups < 2:
        raise ValueError(
            "standard errors need at least two groups of samples, but num_samples="
            f"{plan.num_samples} with {plan.sampler} makes one; take more samples, or a sampler "
            "with smaller groups, such as Independent() or Sobol(num_groups=8)"
        )
    plans = [plan]
    for degree in degrees:
        choice = choose(plan.num_samples, plan.dim, call.settings.noise, plan.sampler, degree)
        if choice.sampler != plan.sampler and not isinstance(plan.sampler, Independent):
            raise ValueError(f"other samples are drawn for degree={degree}: {choice}")
        plans.append(dataclasses.replace(plan, sampler=choice.sampler, degree=choice.degree))
    derive = getattr(plan.noise, "derivatives", 1) > 0
    found, aux = run(call, _with_errors, tuple(plans), derive)
    missing, empty_groups = found[0].missing, [one.empty_groups for one in found]
    numbers = [one._replace(missing=None, empty_groups=None) for one in found]
    leaves, tree = jax.tree.flatten(numbers)
    found = tree.unflatten(_scales.nan_unless_valid(leaves, call.sigma, call.x))

    aux = list(map(with_explicit_axes, aux, plan.fun.out_avals[plan.num_outputs :]))

    def like_value(parts: list[Array]) -> Any:
        return jax.tree.unflatten(call.value_tree, map(with_explicit_axes, parts, plan.outputs))

    def like_x(parts: list[Array]) -> Any:
        rest = map(with_explicit_axes, parts, plan.fun.in_avals)
        return jax.tree.map(lambda v: next(rest) if _leaves.is_floating(v) else None, x)

    def like_jacobian(rows: list[list[Array]]) -> Any:
        return jax.tree.unflatten(call.value_tree, map(like_x, rows)) if derive else None

    return [
        Estimate(
            value=like_value(one.value),
            value_error=like_value(one.value_error),
            gradient=like_jacobian(one.jacobian),
            gradient_error=like_jacobian(one.jacobian_error),
            aux=jax.tree.unflatten(call.aux_tree, aux) if call.settings.has_aux else None,
            degrees_of_freedom=plan.num_groups - 1,
            missing=missing,
            empty_groups=empty,
        )
        for plan, one, empty in zip(plans, found, empty_groups, strict=True)
    ]


class _Estimates(NamedTuple):
    """Estimates and their standard errors: leaves of the value, and for each of them those of x."""

    value: list[Array]
    value_error: list[Array]
    jacobian: list[list[Array]]
    jacobian_error: list[list[Array]]
    missing: Array | None
    empty_groups: Array | None


@partial(jax.jit, static_argnums=(0, 1))
def _with_errors(
    plans: tuple[Plan, ...],
    derive: bool,
    key: Array,
    x: list[Array],
    sigma: list[Array],
    operands: Operands,
) -> tuple[list[_Estimates], list[Array]]:
    """Estimates for each plan, which all draw the same samples, and aux; evaluated by the first."""
    flat_x, scale = concatenate(x, plans[0].dtype), flat_scale(plans[0], sigma)
    words, point = _random_bits.root(key), Point(flat_x, scale)
    drawers = [drawer(plan, words, operands, kept_noise(plan, words, operands)) for plan in plans]

    def evaluate(chunk: Chunk, _: Any) -> tuple[Array, list[Array]]:
        return evaluate_at(plans[0], operands, point, drawers[0](chunk))

    f, aux = stacked(plans[0], evaluate)
    found = [
        _combined(plan, derive, noise_of, f, x, point, operands)
        for plan, noise_of in zip(plans, drawers, strict=True)
    ]
    return found, aux


def _combined(
    plan: Plan,
    derive: bool,
    noise_of: Callable[[Chunk], Array],
    f: Array,
    x: list[Array],
    point: Point,
    operands: Operands,
) -> _Estimates:
    """Value and, if `derive`, Jacobian in x, with their errors as the groups' spread tells them.

    Each group g adds a part to the estimate, C_g, with the surrogate that is fitted on the others.
    The estimate is their sum; its squared error that of a sum of independent numbers. (They are not
    quite: surrogates are fitted on common samples. What that correlates is a product of two errors
    of fits.)
    """
    # What is fitted serves the Jacobian alone; the rest tells which samples are missing.
    fit_for = plan if derive else dataclasses.replace(plan, degree=None)
    surrogates = fitted(fit_for, operands, point, noise_of, f)
    value, parts = surrogates.value, surrogates.parts
    deviations = kept(f - value[None], parts.present)
    spread = _spread(surrogates, deviations)
    means = jnp.sum(in_groups(plan, deviations), axis=1) / surrogates.number
    value_error = spread.error(spread.squares(means, parts, jnp.zeros_like(value)))
    jacobian, jacobian_error = [], []
    if derive:
        found = _jacobian_with_error(plan, noise_of, point, operands, spread)
        jacobian, jacobian_error = (_by_leaf_of_x(plan, rows, x) for rows in found)
    missing, empty = None, None
    if parts.present is not None:
        missing = plan.num_samples - jnp.sum(parts.sizes)
        empty = jnp.sum(parts.sizes == 0, dtype=np.int32)
    return _Estimates(
        _in_leaves(plan, value),
        _in_leaves(plan, value_error),
        jacobian,
        jacobian_error,
        missing,
        empty,
    )


class _Spread(NamedTuple):
    """What tells the error of an estimate C, the sum of the groups' parts C_g."""

    surrogates: Surrogates
    unit: Array  # of each output, (M,), lest squares overflow or vanish
    told_of: Array  # the share of the squared error of C that `squares` are in the mean

    def squares(self, rows: Array, part: Part, whole: Array) -> Array:
        """Sums over some groups of |C_g - n_g / N C|^2 in squared units, C_g being the rows.

        If variances of C_g are in proportion to n_g, the mean of this, of all groups, is
        1 - sum_g (n_g / N)^2 of that of C: 1 - 1/G for G groups of one size.
        """
        shares = _shares(self.surrogates, part).reshape(-1, *[1] * whole.ndim)
        deviations = rows - shares * whole[None]
        return jnp.sum((jnp.abs(deviations) / self._unit_for(whole)[None]) ** 2, axis=0)

    def error(self, squares: Array) -> Array:
        """The standard error of C, given the sum over all groups."""
        return self._unit_for(squares) * jnp.sqrt(squares / self.told_of)

    def _unit_for(self, whole: Array) -> Array:
        return self.unit.reshape(-1, *[1] * (whole.ndim - 1))


def _spread(surrogates: Surrogates, deviations: Array) -> _Spread:
    """What the deviations of all values from their mean, (N, M), tell."""
    told_of = 1 - jnp.sum(jnp.real(_shares(surrogates, surrogates.parts)) ** 2)
    # One group alone, or none, tells nothing; what rounding leaves of 1 - 1 is not to count.
    told_of = jnp.where(jnp.sum(surrogates.parts.sizes > 0) > 1, told_of, jnp.nan)
    return _Spread(surrogates, unit_of(deviations), told_of)


def _shares(surrogates: Surrogates, part: Part) -> Array:
    """n_g / N: which part of all samples each group of a part has."""
    return part.sizes.astype(surrogates.value.dtype) / surrogates.number


def _jacobian_with_error(
    plan: Plan,
    noise_of: Callable[[Chunk], Array],
    point: Point,
    operands: Operands,
    spread: _Spread,
) -> tuple[Array, Array]:
    """The Jacobian in x, (M, D), and its errors."""
    surrogates, noise = spread.surrogates, noise_in(plan, operands)
    parts, number, for_jacobians = surrogates.parts, surrogates.number, _for_jacobians(plan)
    _, pull = jax.vjp(lambda v: standardised(plan, v, point.scale)[0], point.x)

    def in_x(in_a: Array) -> Array:
        if jnp.iscomplexobj(in_a):
            return lax.complex(in_x(in_a.real), in_x(in_a.imag))
        return jax.vmap(jax.vmap(pull))(in_a.astype(plan.dtype))[0].astype(in_a.dtype)

    def jacobians(chunk: Chunk, part: Part) -> Array:
        """C_g of a chunk's groups, (groups, M, D)."""
        z, wanted = noise_of(chunk), (True, False)
        [in_a] = score_function_sums(plan, wanted, noise, None, z, part, by_group=True)
        beta = coefficients(surrogates, part)
        if beta is not None:
            [expected] = grads_of_expected(plan, wanted, noise, None, beta)
            in_a += part.sizes.astype(expected.dtype)[:, None, None] * expected
        return in_x(in_a / number)

    whole = summed(for_jacobians, lambda *args: jnp.sum(jacobians(*args), axis=0), parts)

    def squares(chunk: Chunk, part: Part) -> Array:
        return spread.squares(jacobians(chunk, part), part, whole)

    return whole, spread.error(summed(for_jacobians, squares, parts))


def _for_jacobians(plan: Plan) -> Plan:
    """The plan for sums over groups, each with a Jacobian: with fewer at a time, if need be."""
    if not isinstance(plan.width, int):  # a symbolic shape, while exporting, for which there is one
        return plan
    most = max(1, chunk_size() // max(plan.num_rows * plan.dim, 1))
    return dataclasses.replace(plan, most_groups=most) if most < plan.groups_at_a_time() else plan


def _in_leaves(plan: Plan, flat: Array) -> list[Array]:
    """Leaves of the value, or of its errors, from the last axis of flat arrays (..., M)."""
    dtypes = plan.output_dtypes
    if not jnp.iscomplexobj(flat):  # errors are real, also those of complex numbers
        dtypes = [np.dtype(jnp.finfo(dtype).dtype) for dtype in dtypes]
    return split_leaves(flat, plan.outputs, dtypes)


def _by_leaf_of_x(plan: Plan, rows: Array, x: list[Array]) -> list[list[Array]]:
    """For each leaf of the value, those of x, from a Jacobian (M, D) or its errors."""
    columns = [jnp.moveaxis(v, 0, -1) for v in _in_leaves(plan, rows.T)]
    return [
        split_leaves(v, x, [v.dtype if jnp.iscomplexobj(v) else leaf.dtype for leaf in x])
        for v in columns
    ]
