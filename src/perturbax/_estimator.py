r"""The estimator: evaluate, weigh, combine.

Notation, used throughout (`docs/theory.md` derives it):

    x, sigma    the point and the scale at which the function is evaluated, held fixed
    a, r        (x0 - x) / sigma and sigma0 / sigma, where x0 and sigma0 are x and sigma held fixed:
                always 0 and 1, but with derivatives; a has shape (D,), r has shape () or (D,), or
                is a matrix in `Blocks`, where sigma is one
    z           noise of a chunk of samples, shape (C, D);  y = x0 + sigma0 z
    f           values of the function at y, flattened, shape (C, M); f0 its value at x0
    l           log p(a + r z) + sum log r: the log-density of y under x + sigma eps, y held fixed
    w           exp(l - stop_gradient(l)): 1, but with the derivatives of the score function
    b           baseline of each sample: the mean of f over all other groups and of f0, which is the
                surrogate of degree 0; for higher degrees, fitted on the other groups alone, see
                `_surrogate`
    s           score -d log p / dz of the noise, shape (C, D)

    V = mean_i [ w_i (f_i - b_i) + b_i ]

The value of V is the plain mean of the f_i. Its derivatives in x and sigma, which it has through a
and r alone, are unbiased at every order, because b_i does not depend on the noise of sample i.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from . import _bits, _surrogate
from ._arguments import varying, varying_axes
from ._blocks import Blocks, departures, scaled
from ._rules import any_live, is_live, live_jvp, with_jvp
from ._sampling import draw
from ._trace import TracedFunction

# Numbers in flight at a time: a chunk of noise should stay in the cache of a core, and fill a GPU.
_CHUNK = {"cpu": 2**19}
_CHUNK_ACCELERATOR = 2**26
# Numbers in flight under vmap on a CPU: what all cores share should hold them.
_BATCH = 2**21
# A sample of the noise that several passes read is drawn again in each of them if there are several
# chunks; chunks this many times as large cost less.
_PASSES = 2
# Up to this many outputs, the Jacobian is accumulated while evaluating: the noise is drawn once.
_MAX_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about an estimate: what to evaluate, how often, with what noise."""

    fun: TracedFunction
    noise: Any
    sampler: Any
    num_samples: int
    batch_size: int | None
    degree: int | None  # of the surrogate; None for none
    num_outputs: int  # leaves of fun's result that are its value; the rest is aux
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    dtype: np.dtype  # of the noise, the scores and the weights: at least float32

    @property
    def dim(self) -> int:
        """Number D of perturbed coordinates."""
        return sum(map(math.prod, self.shapes))

    @property
    def group_size(self) -> int:
        """Samples in a group."""
        return self.sampler.group_size(self.num_samples, self.dim)

    @property
    def num_groups(self) -> int:
        """Independent groups of samples."""
        return -(-self.num_samples // self.group_size)

    @property
    def output_dtypes(self) -> list[np.dtype]:
        """Dtypes of the estimate's leaves: those of fun's values, at least float32."""
        avals: Any = self.fun.out_avals[: self.num_outputs]
        # By hand: with jax_numpy_dtype_promotion='strict' JAX refuses to promote.
        return [
            self.dtype
            if not jnp.issubdtype(a.dtype, jnp.inexact)
            else np.dtype(a.dtype if a.dtype.itemsize >= 4 else np.float32)
            for a in avals
        ]

    @property
    def value_dtype(self) -> np.dtype:
        """Dtype in which values are combined."""
        return np.result_type(self.dtype, *self.output_dtypes)

    @property
    def num_rows(self) -> int:
        """Number M of scalar outputs."""
        return sum(a.size for a in self.fun.out_avals[: self.num_outputs])

    @property
    def width(self) -> int:
        """Numbers of the widest array that one sample needs; symbolic, if any of them is."""
        widths = (self.dim, self.num_rows, *self.fun.widths)
        symbolic = [v for v in widths if not isinstance(v, int)]
        return symbolic[0] if symbolic else max(widths, default=1) or 1

    def groups_at_a_time(self) -> int:
        """How many groups a chunk holds."""
        if not isinstance(self.width, int):  # a symbolic shape, while exporting
            most = 16
        elif self.batch_size is None:
            budget = _CHUNK.get(jax.default_backend(), _CHUNK_ACCELERATOR)
            own = max(self.dim, self.num_rows, 1)
            if self.width == own and (self.degree or self.num_rows > _MAX_ROWS):
                budget *= _PASSES
            most = budget // (self.group_size * self.width)
        else:
            most = self.batch_size // self.group_size
        most = min(max(most, 1), self.num_groups)
        if self.batch_size is None:
            # A divisor saves the last, smaller chunk a compilation of its own.
            for count in range(most, most // 2, -1):
                if self.num_groups % count == 0:
                    return count
        return most


@partial(jax.jit, static_argnums=0)
def estimate(plan: Plan, key: Array, x: list[Array], sigma: list[Array], operands: Any):
    """The Monte-Carlo estimate of E[fun(x + sigma eps)]; differentiable in x, sigma and operands.

    Args:
      plan: the static part.
      key: one typed PRNG key.
      x: the perturbed leaves.
      sigma: one scale a leaf, each of which broadcasts into the leaf, or is a matrix that has the
        leaf's axes twice; or a single number for all.
      operands: what fun and the noise close over, a pair of tuples.

    Returns:
      The leaves of the value, and of aux stacked over samples.
    """
    point = _point(plan, x, sigma)
    # Flat from here on: what is done leaf by leaf is compiled leaf by leaf.
    departure = _departure(_concatenate([v.astype(plan.dtype) for v in x], plan.dtype))
    flat_a, flat_r = _standardised(plan, departure, sigma)
    words = _bits.root(key)
    has_aux = len(plan.fun.out_avals) > plan.num_outputs
    if has_aux or plan.fun.jaxpr.effects:
        # JAX allows no side effects inside a custom derivative rule.
        parts, aux = _differentiable(plan, words, point, flat_a, flat_r, operands)
    else:
        parts, aux = _expectation(plan, words, point, flat_a, flat_r, operands), []
    return _shaped(parts, plan.fun.out_avals[: plan.num_outputs], plan.output_dtypes), aux


class Point(NamedTuple):
    """Where the function is evaluated: the leaves of x and their scales, held fixed."""

    x: list[Array]
    sigma: list[Array]


def _point(plan: Plan, x: list[Array], sigma: list[Array]) -> Point:
    return Point(*lax.stop_gradient((x, [v.astype(plan.dtype) for v in sigma])))


def _standardised(plan: Plan, departure: Array, sigma: list[Array]) -> tuple[Array, Any]:
    """a and r, for the flat x - x0."""
    scales = [v.astype(plan.dtype) for v in sigma]
    if len(scales) == 1 and scales[0].ndim == 0:
        scale = scales[0]
    elif any(v.ndim > len(shape) for v, shape in zip(scales, plan.shapes, strict=True)):
        return departures(departure, scales, plan.shapes)
    else:
        scale = _concatenate(
            [jnp.broadcast_to(v, shape) for v, shape in zip(scales, plan.shapes, strict=True)],
            plan.dtype,
        )
    return -departure / scale, lax.stop_gradient(scale) / scale


def _departure_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    return _departure(x), jnp.where(jnp.isfinite(x), x_dot, jnp.zeros_like(x_dot))


# x - stop_gradient(x): zero, also where x is infinite or NaN; such x have no derivative.
_departure = with_jvp(jnp.zeros_like, _departure_jvp)


def _concatenate(leaves: list[Array], dtype: np.dtype) -> Array:
    flat = [leaf.reshape(-1) for leaf in leaves]
    return jnp.concatenate(flat) if flat else jnp.zeros((0,), dtype)


def _split(flat: Array, avals: Any, dtypes: list[np.dtype]) -> list[Array]:
    """Cuts the last axis of `flat` into leaves of the given shapes and dtypes."""
    return _shaped(_cut(flat, avals), avals, dtypes)


def _cut(flat: Array, avals: Any, axis: int = -1) -> list[Array]:
    """Cuts an axis of `flat` into parts of the sizes of the leaves."""
    parts, start = [], 0
    for aval in avals:
        parts.append(lax.slice_in_dim(flat, start, start + aval.size, axis=axis))
        start += aval.size
    return parts


def _shaped(parts: list[Array], avals: Any, dtypes: list[np.dtype]) -> list[Array]:
    """Gives the last axis of each part the shape of its leaf, and the part the leaf's dtype."""
    leaves = []
    for part, aval, dtype in zip(parts, avals, dtypes, strict=True):
        part = part if jnp.issubdtype(dtype, jnp.complexfloating) else _real(part)
        leaves.append(part.reshape(part.shape[:-1] + aval.shape).astype(dtype))
    return leaves


def _real(value: Array) -> Array:
    return value.real if jnp.iscomplexobj(value) else value


# --- Evaluate


def _noise(plan: Plan, operands: Any) -> Any:
    return plan.noise.bind(operands[1]) if operands[1] is not None else plan.noise


def _draw(plan: Plan, key: Array, operands: Any, first: Array, count: int) -> Array:
    noise = _noise(plan, operands)
    z = draw(noise, plan.sampler, key, first, count, plan.group_size, plan.dim, plan.dtype)
    return lax.stop_gradient(z)


def _drawer(plan: Plan, key: Array, operands: Any) -> Callable[[Array, int], Array]:
    """`_draw` for several passes over the groups: drawn once where one chunk holds them all."""
    if plan.groups_at_a_time() < plan.num_groups:
        return lambda first, count: _draw(plan, key, operands, first, count)
    z = _draw(plan, key, operands, jnp.uint32(0), plan.num_groups)
    return lambda first, count: z


def _evaluate(plan: Plan, operands: Any, point: Point, z: Array) -> tuple[Array, list[Array]]:
    """Values (C, M) and stacked aux of the function at x + sigma z for the rows z of (C, D)."""
    specs = [jax.ShapeDtypeStruct(shape, plan.dtype) for shape in plan.shapes]

    def one(row: Array) -> tuple[Array, list[Array]]:
        noise = _split(row, specs, [plan.dtype] * len(specs))
        scales = point.sigma * (len(point.x) if len(point.sigma) == 1 else 1)
        leaves = [
            (x.astype(plan.dtype) + scaled(sigma, v)).astype(x.dtype)
            for x, sigma, v in zip(point.x, scales, noise, strict=True)
        ]
        return _call(plan, operands, leaves)

    if z.shape[0] == 1:  # as it is: fun may hold what cannot be vmapped
        return jax.tree.map(lambda v: v[None], one(z[0]))
    if plan.batch_size is not None and plan.batch_size < z.shape[0]:
        return lax.map(one, z, batch_size=plan.batch_size if plan.batch_size > 1 else None)
    return jax.vmap(one)(z)


def _call(plan: Plan, operands: Any, leaves: list[Array]) -> tuple[Array, list[Array]]:
    """Flat value (M,) and aux of the function at one point."""
    out = [jnp.asarray(v) for v in plan.fun(operands[0], *leaves)]
    values = [v.astype(plan.value_dtype) for v in out[: plan.num_outputs]]
    # What fun sums over a mesh axis varies no more over it, but its weight does.
    axes = frozenset().union(*map(varying_axes, leaves))
    return _concatenate([varying(v, axes) for v in values], plan.value_dtype), out[
        plan.num_outputs :
    ]


def _over_groups(plan: Plan, body: Callable[..., Any], xs: Any = ()) -> tuple[Any, Any]:
    """Sums the first and stacks the second result of body(first, count, rows, xs of these).

    `body` sees all groups, a chunk of `count` at a time, which hold `rows` samples: all but the
    last group, which may lack some, are whole. `xs` and stacked results have one row a sample or
    one row a group.
    """
    size, total, count = plan.group_size, plan.num_groups, plan.groups_at_a_time()
    if count == total:
        return body(jnp.uint32(0), total, plan.num_samples, xs)
    # Without this, reverse mode would keep the noise of all chunks; it is drawn again instead.
    if not plan.fun.jaxpr.effects:
        body = jax.checkpoint(body, static_argnums=(1, 2), prevent_cse=False)
    steps = plan.num_samples // (count * size)
    rest = plan.num_samples - steps * count * size

    def rows_of(v: Any) -> int:  # in the part that the scan covers
        return steps * count * (size if v.shape[0] == plan.num_samples else 1)

    def step(carry: Any, step_xs: Any) -> tuple[Any, Any]:
        index, part = step_xs
        sums, stacked = body(index * np.uint32(count), count, count * size, part)
        return jax.tree.map(jnp.add, carry, sums), stacked

    def chunked(v: Any) -> Array:
        return v[: rows_of(v)].reshape(steps, rows_of(v) // steps, *v.shape[1:])

    chunks = jax.tree.map(chunked, xs)
    steps_xs = (lax.iota(jnp.uint32, steps), chunks)
    head = jax.tree.map(lambda v: v[0], steps_xs)
    shapes = jax.eval_shape(lambda h: body(h[0], count, count * size, h[1])[0], head)
    sums, stacked = lax.scan(step, jax.tree.map(_zeros, shapes), steps_xs)
    stacked = jax.tree.map(lambda v: v.reshape(steps * v.shape[1], *v.shape[2:]), stacked)
    if rest:
        tail = jax.tree.map(lambda v: v[rows_of(v) :], xs)
        more, last = body(jnp.uint32(steps * count), total - steps * count, rest, tail)
        sums = jax.tree.map(jnp.add, sums, more)
        stacked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacked, last)
    return sums, stacked


def _in_turn(plan: Plan, fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args); if vmapped on a single CPU, for so few inputs at a time as fit into the cache.

    A chunk is sized for one input. All inputs of a batch at once would each go through memory with
    every step; XLA itself uses all cores for one input.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not isinstance(plan.width, int):
        return fun(*args)
    most = max(1, _BATCH // (plan.groups_at_a_time() * plan.group_size * plan.width))
    one = custom_vmap(fun)

    @one.def_vmap
    def batch(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(args)
        batched = jax.tree.leaves(in_batched)
        moving = [v for v, b in zip(leaves, batched, strict=True) if b]

        def at(moving: list[Array], fun: Callable[..., Any]) -> Any:
            parts = iter(moving)
            merged = [next(parts) if b else v for v, b in zip(leaves, batched, strict=True)]
            return fun(*jax.tree.unflatten(tree, merged))

        if axis_size <= most:
            out = jax.vmap(partial(at, fun=fun))(moving)
        elif most == 1:
            out = lax.map(partial(at, fun=one), moving)
        else:
            size = next((n for n in range(most, most // 2, -1) if axis_size % n == 0), most)
            out = lax.map(partial(at, fun=fun), moving, batch_size=size)
        return out, jax.tree.map(lambda _: True, out)

    return one(*args)


def _grouped(plan: Plan, rows: Array) -> Array:
    """Rows (C, ...) cut into groups (count, n, ...), zeros for what the last one lacks."""
    missing = -rows.shape[0] % plan.group_size
    if missing:
        rows = jnp.concatenate([rows, jnp.zeros((missing, *rows.shape[1:]), rows.dtype)])
    # In sizes, for -1 says nothing about an array without elements.
    return rows.reshape(rows.shape[0] // plan.group_size, plan.group_size, *rows.shape[1:])


def _zeros(aval: Any) -> Array:
    return varying(jnp.zeros(aval.shape, aval.dtype), varying_axes(aval))


# --- Weigh


def unit_weight(log_density: Array) -> Array:
    """w = exp(l - stop_gradient(l)): it cannot overflow, and is 1 where l is infinite.

    Not by a derivative rule, which JAX drops from what it computes anew in reverse mode.

    References:
      Foerster et al., DiCE: The Infinitely Differentiable Monte Carlo Estimator, 2018,
      arXiv:1802.05098
    """
    change = log_density - lax.stop_gradient(log_density)
    return jnp.exp(jnp.where(jnp.isinf(log_density), jnp.zeros_like(change), change))


def _log_prob(noise: Any, z: Array) -> Array:
    """Log-density of each row of z."""
    return jax.vmap(lambda row: jnp.sum(noise.log_prob(row)))(z)


def _log_density(plan: Plan, operands: Any, z: Array, a: Array, r: Any) -> Array:
    """l: the log-density of y = x0 + sigma0 z under x + sigma eps, shape (C,)."""
    if isinstance(r, Blocks):
        return _log_prob(_noise(plan, operands), _row(a) + r.times(z)) + r.log_det()
    log_r = jnp.log(r)
    log_scale = jnp.sum(log_r) if r.ndim else plan.dim * log_r
    return _log_prob(_noise(plan, operands), _row(a) + _row(r) * z) + log_scale


def _row(value: Array) -> Array:
    """With an axis for the samples: explicit, for `jax_numpy_rank_promotion='raise'`."""
    return value[None] if value.ndim else value


# --- Combine


def _with_value_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return with_value(*primals), tangents[1]


# The first argument, with the derivatives of the second, which has the same expectation.
with_value = with_jvp(lambda value, derivatives: value, _with_value_jvp)


def _sizes(plan: Plan) -> np.ndarray:
    """Samples in each group."""
    sizes = np.full(plan.num_groups, plan.group_size)
    sizes[-1] = plan.num_samples - plan.group_size * (plan.num_groups - 1)
    return sizes


def _shares(plan: Plan) -> np.ndarray:
    """The share of each group in all samples."""
    return _sizes(plan) / plan.num_samples


def _centre(f0: Array) -> tuple[Array, Array]:
    """What to subtract from values before summing them, and whether f0 is finite."""
    finite = jnp.isfinite(f0)
    return jnp.where(finite, f0, jnp.zeros_like(f0)), jnp.all(finite)


def _share(plan: Plan, finite: Array, sizes: Any, dtype: np.dtype) -> Array:
    """The weight of one value in the baseline of a group of the given size; 0 if there is none."""
    count = plan.num_samples - sizes + finite.astype(np.int32)
    return jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0).astype(dtype)


def _baselines(plan: Plan, f: Array, f0: Array) -> Array:
    """b: for each group, the mean of f0, if finite, and of f over the other groups, (groups, M)."""
    centre, finite = _centre(f0)
    sums = jnp.sum(_grouped(plan, f - centre[None]), axis=1)
    others = jnp.sum(sums, axis=0)[None] - sums
    share = _share(plan, finite, _sizes(plan), f.dtype)
    return centre[None] + others * share[:, None]


def _fit(
    plan: Plan, noise: Any, noise_of: Callable[[Array, int], Array], f: Array
) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Values less a constant, each group's surrogate of these (groups, P, M), and its features."""

    def phi(z: Array) -> Array:
        return _surrogate.features(z, plan.degree or 0, noise.mean).astype(f.dtype)

    # For digits only: the fit is equivariant, so that this constant has no influence on f - q.
    f = f - lax.stop_gradient(f[:1])

    def equations_of(first: Array, count: int, rows: int, values: Array) -> tuple[tuple[()], Any]:
        z = noise_of(first, count)[:rows]
        weight = jnp.mean(_slope(noise, z) ** 2, axis=1)
        grouped = [_grouped(plan, v) for v in (phi(z), values, weight)]
        return (), _surrogate.normal_equations(*grouped)

    _, equations = _over_groups(plan, equations_of, f)
    return f, _surrogate.fit(equations, int((plan.num_samples - _sizes(plan)).min())), phi


def _differentiable(
    plan: Plan, key: Array, point: Point, a: Array, r: Any, operands: Any
) -> tuple[list[Array], list[Array]]:
    """V, a part for each leaf, as an expression that JAX differentiates in everything, any order.

    Parts are kept apart, lest a leaf that is not finite spoil the derivatives of the others.
    """
    avals = plan.fun.out_avals[: plan.num_outputs]
    noise = _noise(plan, operands)
    noise_of = _drawer(plan, key, operands)

    def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[tuple[()], Any]:
        z = noise_of(first, count)[:rows]
        return (), _evaluate(plan, operands, point, z)

    _, (f, aux) = _over_groups(plan, evaluate)
    share = jnp.asarray(_shares(plan), f.dtype)
    phi, beta = None, None
    if plan.degree is None:
        residual, expected = f, _cut(jnp.zeros(f.shape[1], f.dtype), avals)
    elif plan.degree == 0:
        b = _baselines(plan, f, _value_at_x(plan, operands, point))
        residual = f - jnp.repeat(b, plan.group_size, axis=0)[: plan.num_samples]
        expected = _cut(share @ b, avals)
    else:
        residual, beta, phi = _fit(plan, noise, noise_of, f)
        mean_phi = _surrogate.expected_features(a, r, plan.degree, noise).astype(f.dtype)
        mean_beta = jnp.tensordot(share, beta, axes=1)
        expected = [mean_phi @ part for part in _cut(mean_beta, avals)]

    def weigh(first: Array, count: int, rows: int, xs: Any) -> tuple[list[Array], tuple[()]]:
        residual, beta = xs
        z = noise_of(first, count)[:rows]
        if phi is not None:
            q = _surrogate.predict(_grouped(plan, phi(z)), beta)
            residual = residual - q.reshape(q.shape[0] * q.shape[1], plan.num_rows)[:rows]
        w = unit_weight(_log_density(plan, operands, z, a, r))
        w = w[:, None].astype(residual.dtype)
        return [jnp.sum(w * part, axis=0) for part in _cut(residual, avals)], ()

    totals, _ = _over_groups(plan, weigh, (residual, beta))
    means = _cut(jnp.mean(lax.stop_gradient(f), axis=0), avals)
    derivatives = [v / plan.num_samples + e for v, e in zip(totals, expected, strict=True)]
    return with_value(means, derivatives), aux


def _value_at_x(plan: Plan, operands: Any, point: Point) -> Array:
    """f0. Any number would do as long as it does not depend on the noise, so it is held fixed.

    Its derivative in what fun closes over may not exist where those of the samples do.
    """
    return lax.stop_gradient(_call(plan, operands, point.x)[0])


def _value(plan: Plan, key: Array, point: Point, a: Array, r: Any, operands: Any) -> list[Array]:
    """The value of V alone, a part for each leaf, with derivatives by the cheapest way there is."""
    del a, r

    def mean(key: Array, point: Point, operands: Any) -> Array:
        def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[Array, tuple[()]]:
            z = _draw(plan, key, operands, first, count)[:rows]
            return jnp.sum(_evaluate(plan, operands, point, z)[0], axis=0), ()

        return _over_groups(plan, evaluate)[0] / plan.num_samples

    value = _in_turn(plan, mean, key, point, operands)
    return _cut(value, plan.fun.out_avals[: plan.num_outputs])


def _value_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    *_, a_dot, r_dot, operands_dot = tangents
    real = not jnp.issubdtype(plan.value_dtype, jnp.complexfloating)
    matrix_dot = r_dot if isinstance(r_dot, Blocks) else None
    few = isinstance(plan.num_rows, int) and 0 < plan.num_rows <= _MAX_ROWS
    if few and real and not any_live((operands_dot, matrix_dot)):
        wrt = (is_live(a_dot), matrix_dot is None and is_live(r_dot))
        value, *jacobians = _jacobian(plan, wrt, *primals)
        dots = [
            jnp.asarray(t, plan.value_dtype)
            for t, asked in zip((a_dot, r_dot), wrt, strict=True)
            if asked
        ]
        avals = plan.fun.out_avals[: plan.num_outputs]
        rows = zip(*(_cut(j, avals, axis=0) for j in jacobians), strict=True)
        steps = [[j @ t if t.ndim else j * t for j, t in zip(r, dots, strict=True)] for r in rows]
        return _cut(value, avals), [functools.reduce(jnp.add, parts) for parts in steps]
    if plan.groups_at_a_time() == plan.num_groups and not any_live((operands_dot, matrix_dot)):
        return _factored_jvp(plan, primals, tangents)
    return live_jvp(lambda *args: _differentiable(plan, *args)[0], primals, tangents)


_expectation = with_jvp(_value, _value_jvp, 1, symbolic_zeros=True)


def _value_and_jacobians(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[Array, ...]:
    """The value, and the Jacobians in a (M, D) and r (M,) or (M, D), as far as `wrt` asks."""
    one = _jacobian_of_surrogates if plan.degree else _jacobian_of_baselines
    return _in_turn(plan, partial(one, plan, wrt), key, point, a, r, operands)


def _jacobian_of_baselines(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[Array, ...]:
    """`_value_and_jacobians` for degree 0, or none.

    One pass: with c = f0 and 1 / n_g the weight of a value in the baseline of group g,

        sum_i (f_i - b_i) dl_i = sum_i (f_i - c) dl_i - S sum_g B_g / n_g + sum_g S_g B_g / n_g,

    where S_g and B_g are the sums of f_i - c and of dl_i over group g, and S is the sum of all S_g.
    """
    del a
    noise = _noise(plan, operands)
    centre, finite = jnp.zeros((plan.num_rows,), plan.value_dtype), None
    if plan.degree is not None:
        centre, finite = _centre(_value_at_x(plan, operands, point))

    def accumulate(first: Array, count: int, rows: int, _: Any) -> tuple[Any, tuple[()]]:
        z = _draw(plan, key, operands, first, count)[:rows]
        f = _evaluate(plan, operands, point, z)[0] - centre[None]
        slopes = _slopes(plan, wrt, noise, z, r)
        if finite is None:
            sums = [(_product(f.T, v), ()) for v in slopes]
        else:
            sizes = jnp.where(
                first + lax.iota(jnp.uint32, count) < plan.num_groups - 1, *_sizes(plan)[[0, -1]]
            )
            share = _share(plan, finite, sizes, f.dtype)
            if plan.group_size == 1:
                # One product yields the sums of (f_i - c) dl_i (1 + 1 / n_g) and of dl_i / n_g.
                columns = jnp.concatenate([f * (1 + share[:, None]), share[:, None]], axis=1)
                products = [_product(columns.T, v) for v in slopes]
            else:
                own = jnp.sum(_grouped(plan, f), axis=1) * share[:, None]
                own = jnp.concatenate([own, share[:, None]], axis=1)
                columns = jnp.concatenate([f, jnp.zeros_like(f[:, :1])], axis=1)
                products = [
                    _product(columns.T, v) + _product(own.T, jnp.sum(_grouped(plan, v), axis=1))
                    for v in slopes
                ]
            sums = [(v[:-1], v[-1:]) for v in products]
        return (jnp.sum(f, axis=0), sums), ()

    (total, sums), _ = _over_groups(plan, accumulate)
    jacobians = []
    for product, score in sums:
        if finite is not None:
            # A matrix product, lest XLA recompute f0, part of total, for every leaf of the result.
            product = product + _product(-total[:, None], score)
        jacobians.append(product / plan.num_samples)
    if wrt[1] and not r.ndim:
        jacobians[-1] = jacobians[-1][:, 0]
    return (centre + total / plan.num_samples, *jacobians)


def _jacobian_of_surrogates(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[Array, ...]:
    """The same for degrees 1 and 2: sum_i (f_i - q(z_i)) dl_i, and the derivatives of E q."""
    noise = _noise(plan, operands)
    noise_of = _drawer(plan, key, operands)

    def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[tuple[()], Array]:
        return (), _evaluate(plan, operands, point, noise_of(first, count)[:rows])[0]

    _, f = _over_groups(plan, evaluate)
    residual, beta, phi = _fit(plan, noise, noise_of, f)

    def weigh(first: Array, count: int, rows: int, xs: Any) -> tuple[Any, tuple[()]]:
        residual, beta = xs
        z = noise_of(first, count)[:rows]
        q = _surrogate.predict(_grouped(plan, phi(z)), beta)
        q = q.reshape(q.shape[0] * q.shape[1], plan.num_rows)[:rows]
        return [_product((residual - q).T, v) for v in _slopes(plan, wrt, noise, z, r)], ()

    sums, _ = _over_groups(plan, weigh, (residual, beta))
    mean_beta = jnp.tensordot(jnp.asarray(_shares(plan), f.dtype), beta, axes=1)

    def expected(a: Array, r: Any) -> Array:
        return _surrogate.expected_features(a, r, plan.degree or 0, noise).astype(f.dtype)

    jacobians = []
    for argnum in np.flatnonzero(wrt):
        slope = jax.jacfwd(expected, argnums=int(argnum))(a, r)  # (P, D), or (P,) in a scalar r
        weighed = sums[len(jacobians)] / plan.num_samples
        weighed = weighed.reshape(plan.num_rows, *slope.shape[1:])
        jacobians.append(weighed + _product(mean_beta.T, slope))
    return (jnp.mean(f, axis=0), *jacobians)


def _factored_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    """V and its derivative along a and r, for outputs too many for a Jacobian."""
    _, _, a, r, operands = primals
    a_dot, r_dot = tangents[2:4]
    wrt = (is_live(a_dot), not isinstance(r, Blocks) and is_live(r_dot))
    value, residual, mean_beta, slopes = _factors(plan, wrt, *primals)
    avals = plan.fun.out_avals[: plan.num_outputs]
    dots = [
        jnp.atleast_1d(t).astype(plan.value_dtype)
        for t, asked in zip((a_dot, r_dot), wrt, strict=True)
        if asked
    ]
    along = [_product(v, t) for v, t in zip(slopes, dots, strict=True)]
    step = functools.reduce(jnp.add, along) / plan.num_samples
    value_dot = [_product(step, part) for part in _cut(residual, avals)]
    if plan.degree:

        def expected(a: Array, r: Any) -> Array:
            features = _surrogate.expected_features(a, r, plan.degree or 0, _noise(plan, operands))
            return features.astype(plan.value_dtype)

        _, features_dot = live_jvp(expected, (a, r), (a_dot, r_dot))
        parts = [_product(features_dot, part) for part in _cut(mean_beta, avals)]
        value_dot = [v + e for v, e in zip(value_dot, parts, strict=True)]
    return _cut(value, avals), value_dot


def _find_factors(
    plan: Plan,
    wrt: tuple[bool, bool],
    key: Array,
    point: Point,
    a: Array,
    r: Any,
    operands: Any,
) -> tuple[Array, Array, Any, list[Array]]:
    """The value (M,), f_i - q(z_i) (N, M), the coefficients of E q (P, M) if any, and the slopes.

    The derivative of V is the product of the second and the slopes, and that of E q. All samples
    are held at once.
    """
    del a
    one = partial(_find_factors_of_one, plan, wrt)
    return _in_turn(plan, one, key, point, r, operands)


def _find_factors_of_one(
    plan: Plan, wrt: tuple[bool, bool], key: Array, point: Point, r: Any, operands: Any
) -> tuple[Array, Array, Any, list[Array]]:
    noise = _noise(plan, operands)
    z = _draw(plan, key, operands, jnp.uint32(0), plan.num_groups)[: plan.num_samples]
    f, _ = _evaluate(plan, operands, point, z)
    residual, mean_beta = f, ()
    if plan.degree == 0:
        b = _baselines(plan, f, _value_at_x(plan, operands, point))
        residual = f - jnp.repeat(b, plan.group_size, axis=0)[: plan.num_samples]
    elif plan.degree:
        residual, beta, phi = _fit(plan, noise, lambda first, count: z, f)
        q = _surrogate.predict(_grouped(plan, phi(z)), beta)
        residual -= q.reshape(q.shape[0] * q.shape[1], plan.num_rows)[: plan.num_samples]
        mean_beta = jnp.tensordot(jnp.asarray(_shares(plan), f.dtype), beta, axes=1)
    return jnp.mean(f, axis=0), residual, mean_beta, _slopes(plan, wrt, noise, z, r)


def _factors_jvp(plan: Plan, wrt: tuple[bool, bool], primals: Any, tangents: Any) -> Any:
    def factors(key: Array, point: Point, a: Array, r: Any, operands: Any) -> tuple[Any, ...]:
        """The same as an expression of a, r and operands; y is held fixed."""
        value = jnp.concatenate(_differentiable(plan, key, point, a, r, operands)[0])
        _, residual, mean_beta, _ = _find_factors_of_one(plan, wrt, key, point, r, operands)
        z = _draw(plan, key, operands, jnp.uint32(0), plan.num_groups)[: plan.num_samples]

        def slopes(row: Array) -> list[Array]:
            def log_density(*args: Any) -> Array:
                return _log_density(plan, operands, row[None], *args)[0]

            found = jax.grad(log_density, tuple(np.flatnonzero(wrt).tolist()))(a, r)
            return [jnp.atleast_1d(v).astype(plan.value_dtype) for v in found]

        weight = unit_weight(_log_density(plan, operands, z, a, r))
        residual = residual * weight[:, None].astype(residual.dtype)
        return value, residual, mean_beta, jax.vmap(slopes)(z)

    return live_jvp(factors, primals, tangents)


_factors = with_jvp(_find_factors, _factors_jvp, 2, symbolic_zeros=True)


def _slopes(plan: Plan, wrt: tuple[bool, bool], noise: Any, z: Array, r: Any) -> list[Array]:
    """dl/da (C, D) and dl/dr, (C, 1) or (C, D), of each row of z, as far as `wrt` asks."""
    dl_da = _slope(noise, z)
    slopes = [dl_da] if wrt[0] else []
    if wrt[1]:
        dl_dr = 1 + z * dl_da
        slopes.append(dl_dr if r.ndim else jnp.sum(dl_dr, axis=1, keepdims=True))
    return [v.astype(plan.value_dtype) for v in slopes]


def _slope(noise: Any, z: Array) -> Array:
    """d log p / dz, at each row of z: the score, less its sign."""
    return jax.grad(lambda z: jnp.sum(_log_prob(noise, z)))(z)


def _product(left: Array, right: Array) -> Array:
    """A matrix product in full precision, whatever the accelerator's default."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def _jacobian_jvp(plan: Plan, wrt: tuple[bool, bool], primals: Any, tangents: Any) -> Any:
    def jacobian(key: Array, point: Point, a: Array, r: Any, operands: Any) -> tuple[Array, ...]:
        def rows_of(leaf: int) -> tuple[Array, ...]:
            def value(a: Array, r: Any) -> Array:
                return _differentiable(plan, key, point, a, r, operands)[0][leaf]

            out, pullback = jax.vjp(value, a, r)
            basis = varying(jnp.eye(out.size, dtype=out.dtype), varying_axes(out))
            rows = jax.vmap(pullback)(basis)
            return (out, *(v for v, asked in zip(rows, wrt, strict=True) if asked))

        return tuple(map(jnp.concatenate, zip(*map(rows_of, range(plan.num_outputs)), strict=True)))

    return live_jvp(jacobian, primals, tangents)


_jacobian = with_jvp(_value_and_jacobians, _jacobian_jvp, 2, symbolic_zeros=True)


# --- Spread


class Spread(NamedTuple):
    """Estimates and their standard errors: leaves of the value, and for each of them those of x."""

    value: list[Array]
    value_error: list[Array]
    jacobian: list[list[Array]]
    jacobian_error: list[list[Array]]


@partial(jax.jit, static_argnums=(0, 1))
def spread(
    plan: Plan, derive: bool, key: Array, x: list[Array], sigma: list[Array], operands: Any
) -> tuple[Spread, list[Array]]:
    """Value and, if `derive`, Jacobian in x, with their errors as the groups' spread tells them.

    Each group g makes an estimate C_g of its own, with the surrogate that is fitted on the others.
    The estimate is their mean, weighted by their sizes; its squared error that of a mean of
    independent numbers. (They are not quite: surrogates are fitted on common samples. What that
    correlates is a product of two errors of fits.)
    """
    words, point = _bits.root(key), _point(plan, x, sigma)
    noise = _noise(plan, operands)
    if derive:
        # Bounds the Jacobians of groups that are held at a time.
        most = max(1, _CHUNK["cpu"] // max(plan.num_rows * plan.dim, 1))
        if most < plan.groups_at_a_time():
            plan = dataclasses.replace(plan, batch_size=most * plan.group_size)
    noise_of = _drawer(plan, words, operands)
    sizes = jnp.asarray(_sizes(plan), plan.value_dtype)
    shares = sizes / plan.num_samples

    def evaluate(first: Array, count: int, rows: int, _: Any) -> tuple[tuple[()], Any]:
        return (), _evaluate(plan, operands, point, noise_of(first, count)[:rows])

    _, (f, aux) = _over_groups(plan, evaluate)
    value = jnp.mean(f, axis=0)
    means = jnp.sum(_grouped(plan, f - value[None]), axis=1) / sizes[:, None]
    avals = plan.fun.out_avals[: plan.num_outputs]

    def values(flat: Array) -> list[Array]:
        dtypes = plan.output_dtypes
        if not jnp.iscomplexobj(flat):  # errors are real, also those of complex numbers
            dtypes = [np.dtype(jnp.finfo(dtype).dtype) for dtype in dtypes]
        return _split(flat, avals, dtypes)

    def errors(squares: Array) -> Array:
        return jnp.sqrt(squares * (plan.num_groups / max(plan.num_groups - 1, 1)))

    value_error = errors(jnp.sum(jnp.abs(shares[:, None] * means) ** 2, axis=0))
    if not derive:
        return Spread(values(value), values(value_error), [], []), aux

    zeros = jnp.zeros((plan.dim,), plan.dtype)
    standardised, pull = jax.vjp(lambda v: _standardised(plan, v, sigma)[0], zeros)
    r = _standardised(plan, zeros, sigma)[1]

    def in_x(rows: Array) -> Array:
        return jax.vmap(pull)(rows)[0].astype(f.dtype)

    residual, beta, phi, slope = f, None, None, zeros
    if plan.degree is not None:
        if plan.degree:
            residual, beta, phi = _fit(plan, noise, noise_of, f)
            slope = in_x(
                jax.jacfwd(_surrogate.expected_features)(standardised, r, plan.degree, noise)
            )
        else:
            b = _baselines(plan, f, _value_at_x(plan, operands, point))
            residual = f - jnp.repeat(b, plan.group_size, axis=0)[: plan.num_samples]

    def jacobians(first: Array, count: int, rows: int, xs: Any) -> tuple[Array, Array]:
        """C_g of each group, (count, M, D), and its share in the whole."""
        residual, beta = xs
        z = noise_of(first, count)[:rows]
        if phi is not None:
            q = _surrogate.predict(_grouped(plan, phi(z)), beta)
            residual = residual - q.reshape(q.shape[0] * q.shape[1], plan.num_rows)[:rows]
        left = jnp.swapaxes(_grouped(plan, residual), 1, 2)
        found = _product(left, _grouped(plan, in_x(_slope(noise, z))))
        last = first + lax.iota(jnp.uint32, count) == plan.num_groups - 1
        size = jnp.where(last, sizes[-1], sizes[0])
        found = found / size[:, None, None]
        if beta is not None:
            found = found + _product(jnp.swapaxes(beta, 1, 2), slope)
        return found, (size / plan.num_samples)[:, None, None]

    def add(*args: Any) -> tuple[Array, tuple[()]]:
        found, share = jacobians(*args)
        return jnp.sum(share * found, axis=0), ()

    jacobian, _ = _over_groups(plan, add, (residual, beta))

    def add_square(*args: Any) -> tuple[Array, tuple[()]]:
        found, share = jacobians(*args)
        return jnp.sum(jnp.abs(share * (found - jacobian[None])) ** 2, axis=0), ()

    squares, _ = _over_groups(plan, add_square, (residual, beta))

    def in_leaves(rows: Array) -> list[list[Array]]:
        columns = [jnp.moveaxis(v, 0, -1) for v in values(rows.T)]
        return [
            _split(v, x, [v.dtype if jnp.iscomplexobj(v) else leaf.dtype for leaf in x])
            for v in columns
        ]

    found = Spread(
        values(value), values(value_error), in_leaves(jacobian), in_leaves(errors(squares))
    )
    return found, aux
