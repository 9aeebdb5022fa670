"""Orthogonal directions."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks
from ..noise._inverse import from_normal
from ..noise._protocol import NoiseDistribution
from ..noise._quantiles import from_bits
from ..noise._smooth import Normal
from ..tracing._broadcasting import where
from ..tracing._linear_algebra import matmul
from ._drawn_together import DrawnTogether
from ._protocol import MAX_GROUP
from ._random_bits import kept_words, materialise

# Coordinates of the smallest matrices at least: those of one share the angles of its rows.
_LEAST_LEAF = 8
# Operations of a product of matrices that take as long as a step of a loop does by itself.
_STEP = 10_000
# Up to so many degrees of freedom a squared length is a sum of squares; beyond, so many candidates
# are enough, of which all but two in a thousand are accepted.
_FEW_FREEDOMS = 32
_CANDIDATES = 6


@dataclasses.dataclass(frozen=True)
class Orthogonal(DrawnTogether):
    """Blocks of orthogonal Gaussian directions, carried to other laws coordinate by coordinate.

    Each direction is uniformly distributed, and lengths are chi-distributed and independent, so
    that each sample is exactly Gaussian. A block takes fewer random numbers than as many
    independent samples, and no factorisation.

    Attributes:
      block: directions in a block, at most the number of coordinates; None for as many as that.
      antithetic: whether each direction comes with its opposite.

    References:
      - Choromanski et al., Structured Evolution with Compact Architectures for Scalable Policy
        Optimization, 2018, arXiv:1804.02395
      - Genz, Methods for Generating Random Orthogonal Matrices, Monte Carlo and Quasi-Monte Carlo
        Methods 1998, 2000, 199-213
    """

    block: int | None = None
    antithetic: bool = False

    needs_inverse: ClassVar[bool] = True
    needs_dim: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks block and antithetic."""
        if self.block is not None:
            object.__setattr__(self, "block", _checks.check_count(self.block, "block"))
        pairs = _checks.check_bool(self.antithetic, "antithetic")
        object.__setattr__(self, "antithetic", pairs)

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        directions = min(dim, self.block or dim, MAX_GROUP)
        return min(num_samples, max(1, directions) * (2 if self.antithetic else 1))

    def _draw(
        self,
        key: Array,
        numbers: Array,
        noise: NoiseDistribution,
        group_size: int,
        dim: int,
        dtype: np.dtype,
    ) -> Array:
        shape = len(numbers) * group_size, dim
        rows = -(-group_size // 2) if self.antithetic else group_size
        z = gaussian_directions(key, numbers, rows, dim, dtype)
        if not self.antithetic:
            return materialise(lambda: from_normal(noise, z).reshape(shape), shape, dtype, key)
        # Dealt to coordinates once, apart from what the law makes of each number and its opposite:
        # by the same loop as these it would be done number by number.
        dealt = materialise(lambda: z, z.shape, dtype, key)

        def pairs() -> Array:
            both = [from_normal(noise, dealt), from_normal(noise, -dealt)]
            return jnp.concatenate(both, axis=1)[:, :group_size].reshape(shape)

        return materialise(pairs, shape, dtype, key)


def gaussian_directions(key: Array, groups: Array, rows: int, dim: int, dtype: np.dtype) -> Array:
    """Orthogonal vectors, each of which is standard normal, for each group: (groups, rows, dim).

    Their directions are made of small random matrices by two steps that keep each row uniformly
    distributed:

    - Doubling: row i of one matrix times a cosine beside row i of another times the sine, and the
      former times minus the sine beside the latter times the cosine. The squared cosine has the
      distribution of the squared length of half of a uniform vector, a symmetric beta distribution.
      Each i has an angle of its own.
    - Adding a coordinate: rows get a zero at its place, and its unit vector becomes one more. Then
      all are reflected so that the latter becomes a uniform vector. The others are uniform among
      those orthogonal to it, hence among all.

    After doubling, coordinates are dealt at random, for those of one small matrix share angles.
    """
    count = len(groups)
    leaf, doublings = _shape_of(rows, dim)
    size = leaf << doublings if doublings else dim - rows
    added, number = dim - size, 2**doublings
    lengths = dim if dim <= _FEW_FREEDOMS else _CANDIDATES
    # All random words at once, for each generator takes a tenth of a second to compile.
    normals = [added * dim, lengths * rows] + [number * leaf**2] * (doublings > 0)
    uniforms = [lengths * rows] * (lengths < dim) + [doublings * size] * (doublings > 0)
    sizes = np.cumsum([*normals, *uniforms, dim * (doublings > 0)])
    bits = kept_words(key, groups, int(sizes[-1]), dtype)
    few, many = sizes[len(normals) - 1], sizes[len(normals) + len(uniforms) - 1]
    normal = materialise(lambda: Normal().from_bits(bits[:, :few]), (count, few), dtype, key)
    uniform = 2 * from_bits(bits[:, few:many])[0]
    steps = normal[:, : sizes[0]].reshape(count, added, dim)
    radii = _chi(normal[:, sizes[0] : sizes[1]].reshape(count, lengths, rows), uniform, dim)
    if not doublings:
        found = _extended(jnp.zeros((count, size, 0), dtype), steps)
        return found.mT * radii[..., None]
    angles = uniform[:, uniform.shape[1] - doublings * size :]
    angles = angles.reshape(count, 2, doublings, size // 2)
    # In two steps, for arrays on a mesh with explicit axes: one that splits, one that merges.
    leaves = normal[:, sizes[1] :].reshape(count, number, leaf, leaf)
    leaves = leaves.reshape(count * number, leaf, leaf)
    leaves = _extended(jnp.zeros((count * number, 0, 0), dtype), leaves)
    leaves = leaves.reshape(count, number, leaf, leaf)

    def whole() -> Array:
        base = _doubled(leaves, angles, key)[:, :, :rows]
        return _extended(base, steps)[:, :, :rows] * radii[:, None]

    # Apart from what deals the coordinates, which would make each number slowly.
    found = materialise(whole, (count, dim, rows), dtype, key)
    # By ranks, for sorting compiles slowly.
    words = bits[:, None, many:]
    order = jnp.sum(words < words.mT, axis=2, dtype=jnp.int32)
    return jnp.take_along_axis(found, order[..., None], axis=1).mT


def _shape_of(rows: int, dim: int) -> tuple[int, int]:
    """Coordinates of the smallest matrices, and how often they are doubled; what takes least."""

    def operations(doublings: int) -> int:
        leaf = dim >> doublings if doublings else 0
        added = dim - (leaf << doublings) if doublings else rows
        # A row by row sum takes several times as long as as many operations of a product.
        sums = (leaf**3 << doublings) + added**2 * rows
        return 16 * sums + 2 * added * rows * dim + _STEP * (leaf + added)

    possible = [k for k in range(dim.bit_length()) if not k or dim >> k >= _LEAST_LEAF]
    best = min(possible, key=operations)
    return dim >> best, best


def _extended(base: Array, normal: Array) -> Array:
    """Orthogonal unit vectors, the columns of `base` (count, n, rows), in more coordinates.

    And one more vector for each coordinate, by a reflection for each, of which random numbers
    `normal` (count, added, n + added) tell the directions: (count, n + added, rows + added). With
    a base without columns, uniform among all orthogonal vectors.

    References:
      Stewart, The Efficient Generation of Random Orthogonal Matrices with an Application to
      Condition Estimators, 1980, doi:10.1137/0717034
    """
    added, start = normal.shape[1], base.shape[1]
    if not added:
        return base
    coordinate, place = np.arange(start + added), np.arange(start, start + added)[:, None]
    own = (coordinate == place)[None]
    last = jnp.sum(where(own, normal, 0), axis=2)
    sign = jnp.where(last < 0, -1, 1).astype(base.dtype)
    # The reflection takes minus the sign times the unit vector to the uniform vector: so it is not
    # made of the difference of nearly equal numbers.
    normal = where((coordinate <= place)[None], normal, 0)
    length = jnp.sqrt(jnp.sum(normal**2, axis=2, keepdims=True))
    vectors = normal + where(own, sign[..., None] * length, 0)
    vectors = vectors / jnp.sqrt(length * (length + jnp.abs(last)[..., None]))
    # One by one: found - v (v . found), for each v. Together: found - sum of v times its product
    # with what the reflections before have left, by their products with each other.
    parts = -vectors[:, :, start:] * sign[:, None]
    if start:
        parts = jnp.concatenate([matmul(vectors[:, :, :start], base), parts], axis=2)
    before = where(np.tri(added, k=-1, dtype=bool)[None], matmul(vectors, vectors.mT), 0)

    def reflect(i: Array, products: Array) -> Array:
        column = lax.dynamic_slice_in_dim(before, i, 1, 2)
        return products - column * lax.dynamic_slice_in_dim(products, i, 1, 1)

    products = lax.fori_loop(0, added, reflect, parts)
    units = where(own, -sign[..., None], 0).mT
    found = jnp.concatenate([jnp.pad(base, ((0, 0), (0, added), (0, 0))), units], axis=2)
    # Behind a barrier, for products with a transposed matrix take three times as long.
    return found - matmul(lax.optimization_barrier(vectors.mT), products)


def _doubled(leaves: Array, uniform: Array, key: Array) -> Array:
    """Orthogonal unit vectors as columns, as many as coordinates, each uniformly distributed.

    Made of those in `leaves` (count, 2**k, n, n), by numbers `uniform` (count, 2, k, 2**k n / 2)
    for the angles: (count, 2**k n, 2**k n).
    """
    count, number, leaf, _ = leaves.shape
    doublings, half, dtype = uniform.shape[2], uniform.shape[3], leaves.dtype

    def angles() -> Array:
        # Twice a squared cosine, less one, has the distribution of a coordinate of a uniform vector
        # of one coordinate more than a half has: of two, radius and angle are known.
        halves = leaf * 2 ** np.arange(doublings - 1, -1, -1)[:, None]
        power = (2 / (halves - 1)).astype(dtype)[None]
        radius = jnp.sqrt(-jnp.expm1(power * jnp.log(uniform[:, 0])))
        shift = radius * jnp.cos(np.pi * uniform[:, 1]).astype(dtype)
        return jnp.sqrt((1 + jnp.stack([shift, -shift])) / 2)

    cosine, sine = materialise(angles, (2, count, doublings, half), dtype, key)

    # Row (b, i), b of as many bits as there are doublings, is a multiple of row i of each small
    # matrix c: the product over the bits of what the angle for the bits of c before, those of b
    # after it, and i makes of the two.
    def multiples() -> Array:
        found = jnp.ones((1,) * (2 * doublings + 2), dtype)
        for bit in range(doublings):
            before, after = (2,) * bit, (2,) * (doublings - 1 - bit)
            first, last = (1,) * len(before), (1,) * len(after)
            shape = (count, *before, 1, *last, *first, 1, *after, leaf)
            c, s = cosine[:, bit].reshape(shape), sine[:, bit].reshape(shape)
            index = np.arange(2).reshape(1, 2, *last, *first, 1, *last, 1)
            other = np.arange(2).reshape(2, *last, 1)
            found = found * jnp.where(index == other, c, jnp.where(index > other, s, -s))
        # One by one, as for arrays split over a mesh with explicit axes.
        found = found.reshape(count, number, *(2,) * doublings, leaf)
        return found.reshape(count, number, number, leaf)

    multiple = materialise(multiples, (count, number, number, leaf), dtype, key)
    found = multiple[:, :, None] * leaves[:, :, :, None]
    found = found.reshape(count, 2 * half, number, leaf)
    return found.reshape(count, 2 * half, 2 * half)


def _chi(normal: Array, uniform: Array, freedoms: int) -> Array:
    """Independent chi-distributed numbers, (count, rows), of several each (count, several, rows).

    References:
      Marsaglia and Tsang, A Simple Method for Generating Gamma Variables, 2000,
      doi:10.1145/358407.358414
    """
    several, rows = normal.shape[1:]
    if several == freedoms:
        return jnp.sqrt(jnp.sum(normal**2, axis=1))
    uniform = uniform[:, : several * rows].reshape(normal.shape)
    shape = freedoms / 2 - 1 / 3
    cube = jnp.maximum(1 + normal * (9 * shape) ** -0.5, 0) ** 3
    taken = jnp.log(uniform) < normal**2 / 2 + shape * (1 - cube + jnp.log(cube))
    found = cube[:, -1]
    for k in range(several - 2, -1, -1):
        found = jnp.where(taken[:, k], cube[:, k], found)
    return jnp.sqrt(2 * shape * found)
