"""What is to be done: all that is static about an estimate, and the flat arrays it is done with."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from ..noise._protocol import NoiseDistribution
from ..noise._traced import TracedNoise, with_numbers
from ..sampling._protocol import Sampler
from ..scale._matrices import departures, scaled
from ..tracing._derivative_rules import departure
from ..tracing._signature import TracedFunction
from . import _devices

# Numbers in flight at a time: a chunk of noise should stay in the cache of a core, and fill a GPU.
CHUNK = {"cpu": 2**19}
_CHUNK_ACCELERATOR = 2**26
# Where several passes read the noise, each draws that of every chunk again, if there are several:
# chunks this many times as large make that rarer.
_PASSES = 2
# Slightly more than a chunk is one, which saves what is left a compilation of its own.
_AT_ONCE = 1.5
# With more leaves than that, those of x that have few numbers are read by index: as fast, for few.
_MANY, _TINY = 16, 8
# Devices have groups of their own if at least this part of them is busy until the end.
_BUSY = 0.75
# How much longer than need be the longest share may be, to save a compilation.
_UNEVEN = 1.25
# Up to this many outputs, the Jacobian is accumulated while evaluating: the noise is drawn once.
MAX_ROWS = 8


def chunk_size() -> int:
    """Numbers in flight at a time on the default backend."""
    return CHUNK.get(jax.default_backend(), _CHUNK_ACCELERATOR)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about an estimate: what to evaluate, how often, with what noise."""

    fun: TracedFunction
    noise: NoiseDistribution | TracedNoise
    sampler: Sampler
    num_samples: int
    batch_size: int | None
    degree: int | None  # of the surrogate; None for none
    num_outputs: int  # leaves of fun's result that are its value; the rest is aux
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    dtype: np.dtype  # of the noise, the scores and the weights: at least float32
    drop_missing: bool = False  # whether samples whose value has a NaN are left out
    mesh: Mesh | None = None  # whose devices share the samples
    # Operands of fun that are leaves of x: callbacks of many points see them at each point.
    own_operands: tuple[int, ...] = ()
    most_groups: int | None = None  # that a chunk holds, where sums over groups take more memory

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
    def evaluates_at_x(self) -> bool:
        """Whether the value at x is part of the baseline, for want of other values.

        Beside n others it lowers the variance by a part of about 1 / n^2 to 2 / n^2, and it takes
        one evaluation of N, and compiling fun once more (`benchmarks/value_at_x.py`).
        """
        others = self.num_samples - self.group_size
        return self.degree == 0 and others**2 < self.num_samples

    @property
    def outputs(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the leaves of fun's value."""
        return self.fun.out_avals[: self.num_outputs]

    @property
    def output_dtypes(self) -> list[np.dtype]:
        """Dtypes of the estimate's leaves: those of fun's values, at least float32."""
        # By hand: with jax_numpy_dtype_promotion='strict' JAX refuses to promote.
        return [
            self.dtype
            if not jnp.issubdtype(a.dtype, jnp.inexact)
            else np.dtype(a.dtype if a.dtype.itemsize >= 4 else np.float32)
            for a in self.outputs
        ]

    @property
    def value_dtype(self) -> np.dtype:
        """Dtype in which values are combined."""
        return np.result_type(self.dtype, *self.output_dtypes)

    @property
    def num_rows(self) -> int:
        """Number M of scalar outputs."""
        return sum(a.size for a in self.outputs)

    @property
    def width(self) -> int:
        """Numbers of the widest array that one sample needs; symbolic, if any of them is."""
        widths = (self.dim, self.num_rows, *self.fun.widths)
        symbolic = [v for v in widths if not isinstance(v, int)]
        return symbolic[0] if symbolic else max(widths, default=1) or 1

    @property
    def fits_each_sample(self) -> bool:
        """Whether a linear surrogate of each sample is fitted on all others at once."""
        return self.degree == 1 and self.group_size == 1

    @property
    def shares_groups(self) -> bool:
        """Whether devices share the groups; where these are few, they share each group's samples.

        Those cost more to draw, for each device then draws them all.
        """
        if self.mesh is None:
            return False
        most = np.diff(_devices.starts(self.num_groups, self.mesh.size)).max()
        return self.num_groups >= _BUSY * self.mesh.size * most

    def groups_at_a_time(self) -> int:
        """How many groups a chunk holds."""
        if not isinstance(self.width, int):  # a symbolic shape, while exporting
            most = 16
        elif self.batch_size is None:
            budget = chunk_size()
            own = max(self.dim, self.num_rows, 1)
            if self.width == own and (self.degree or self.num_rows > MAX_ROWS):
                budget *= _PASSES
            # Evaluations on the host keep its workers busy, whatever the noise takes.
            points = max((host.points_at_a_time() for host in self.fun.hosts), default=1)
            most = max(budget // self.width, points) // self.group_size
            if self.num_samples * self.width <= _AT_ONCE * budget:
                most = self.num_groups
        else:
            most = self.batch_size // self.group_size
        most = min(max(most, 1), self.num_groups, self.most_groups or self.num_groups)
        if self.mesh is not None and self.shares_groups:
            return self._groups_of_a_share(most, _devices.num_slots(self.mesh))
        if self.batch_size is None and self.most_groups is None:
            # A divisor saves the last, smaller chunk a compilation of its own.
            for count in range(most, most // 2, -1):
                if self.num_groups % count == 0:
                    return count
        return most

    def _groups_of_a_share(self, most: int, slots: int) -> int:
        """At most so many that all slots have as many chunks, but for one."""
        each = -(-self.num_groups // slots)
        most = min(most, each)
        if self.num_groups * self.group_size == self.num_samples:
            # A divisor saves the last, smaller chunk a compilation of its own.
            for count in range(most, most // 4, -1):
                longest = count * -(-self.num_groups // count // slots)
                if self.num_groups % count == 0 and longest <= _UNEVEN * each:
                    return count
        return -(-each // -(-each // most))


class Operands(NamedTuple):
    """What the function and the noise close over."""

    fun: tuple[Any, ...]
    noise: dict[str, tuple[Any, ...]] | None  # None for noise that is static as a whole


def noise_in(plan: Plan, operands: Operands) -> NoiseDistribution | TracedNoise:
    """The noise, with what it closes over."""
    return with_numbers(plan.noise, operands.noise)


# A number for all coordinates, one each, (D,), or one array a leaf, if one of them is a matrix.
Scale = Array | list[Array]


class Point(NamedTuple):
    """Where the function is evaluated: x (D,), and its scale, held fixed."""

    x: Array
    scale: Scale


def flat_scale(plan: Plan, sigma: list[Array]) -> Scale:
    """One scale a leaf, or a single one for all, as what flat arrays are multiplied by."""
    sigma = [v.astype(plan.dtype) for v in sigma]
    if len(sigma) == 1 and not sigma[0].ndim:
        return sigma[0]
    if any(v.ndim > len(shape) for v, shape in zip(sigma, plan.shapes, strict=True)):
        return sigma
    spread = [jnp.broadcast_to(v, shape) for v, shape in zip(sigma, plan.shapes, strict=True)]
    return concatenate(spread, plan.dtype)


def perturbed(plan: Plan, point: Point, z: Array) -> list[Array]:
    """The leaves of x + sigma z, for one z of shape (D,)."""
    specs = [jax.ShapeDtypeStruct(shape, plan.dtype) for shape in plan.shapes]
    if isinstance(point.scale, list):
        noise = split_leaves(z, specs, [plan.dtype] * len(specs))
        parts = [scaled(s, v) for s, v in zip(point.scale, noise, strict=True)]
        step = concatenate(parts, plan.dtype)
    else:
        step = point.scale * z
    y = point.x + step
    parts = cut_small(y, specs, _TINY) if len(specs) > _MANY else cut(y, specs)
    return shaped(parts, specs, plan.dtypes)


def standardised(plan: Plan, flat_x: Array, scale: Scale) -> tuple[Array, Any]:
    """a and r of `estimator/_formula.py`: always 0 and 1, with derivatives in x and sigma."""
    away = departure(flat_x)
    if isinstance(scale, list):
        return departures(away, scale, plan.shapes)
    return -away / scale, lax.stop_gradient(scale) / scale


def concatenate(leaves: Sequence[Array], dtype: np.dtype) -> Array:
    """All leaves in one flat array of `dtype`."""
    if not leaves:
        return jnp.zeros((0,), dtype)
    # By lax, and converted together if they can be: what is done leaf by leaf is compiled so.
    flat = [leaf if leaf.ndim == 1 else lax.reshape(leaf, (leaf.size,)) for leaf in leaves]
    if len({leaf.dtype for leaf in flat}) > 1:
        flat = [leaf.astype(dtype) for leaf in flat]
    return lax.concatenate(flat, 0).astype(dtype)


def split_leaves(flat: Array, avals: Sequence[Any], dtypes: Sequence[np.dtype]) -> list[Array]:
    """Cuts the last axis of `flat` into leaves of the given shapes and dtypes."""
    return shaped(cut(flat, avals), avals, dtypes)


def cut(flat: Array, avals: Sequence[Any], axis: int = -1) -> list[Array]:
    """Cuts an axis of `flat` into parts of the sizes of the leaves."""
    if len(avals) == 1:
        return [flat]
    return list(lax.split(flat, [aval.size for aval in avals], axis % flat.ndim)) if avals else []


def cut_small(flat: Array, avals: Sequence[Any], most: int = 2**10) -> list[Array]:
    """`cut` along the last axis; parts of at most so many numbers are read by index.

    Slices at different places are different programs to XLA, and are compiled one by one, at about
    ten milliseconds each; reads at given places are one program for each shape.
    """
    parts, start, axis = [], 0, flat.ndim - 1
    for aval in avals:
        size, end = aval.size, start + aval.size
        if len(avals) == 1 or size > most:
            parts.append(lax.slice_in_dim(flat, start, end, axis=axis))
        else:
            dimensions = lax.GatherDimensionNumbers(tuple(range(axis)), (axis,), (axis,))
            places = np.arange(start, end, dtype=np.int32)[:, None]
            sizes, mode = (*flat.shape[:-1], 1), lax.GatherScatterMode.PROMISE_IN_BOUNDS
            parts.append(lax.gather(flat, places, dimensions, sizes, mode=mode))
        start = end
    return parts


def shaped(parts: Sequence[Array], avals: Sequence[Any], dtypes: Sequence[np.dtype]) -> list[Array]:
    """Gives the last axis of each part the shape of its leaf, and the part the leaf's dtype."""
    leaves = []
    for part, aval, dtype in zip(parts, avals, dtypes, strict=True):
        if jnp.iscomplexobj(part) and not jnp.issubdtype(dtype, jnp.complexfloating):
            part = part.real
        shape = (*part.shape[:-1], *aval.shape)
        part = part if part.shape == shape else lax.reshape(part, shape)
        leaves.append(part if part.dtype == dtype else part.astype(dtype))
    return leaves


def group_sizes(plan: Plan) -> np.ndarray:
    """Samples in each group."""
    sizes = np.full(plan.num_groups, plan.group_size)
    sizes[-1] = plan.num_samples - plan.group_size * (plan.num_groups - 1)
    return sizes


def in_groups(plan: Plan, rows: Array) -> Array:
    """Rows (C, ...) cut into groups (count, n, ...), zeros for what the last one lacks."""
    missing = -rows.shape[0] % plan.group_size
    if missing:
        rows = jnp.concatenate([rows, jnp.zeros((missing, *rows.shape[1:]), rows.dtype)])
    # In sizes, for -1 says nothing about an array without elements.
    return rows.reshape(rows.shape[0] // plan.group_size, plan.group_size, *rows.shape[1:])
