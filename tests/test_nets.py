"""Digital nets: their points, their generators, and which products of signs they know."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from scipy.stats import qmc

import perturbax as px
from helpers import FOR_LONG_RUNS
from perturbax.sampling import _generators, _nets, _random_bits

KINDS = {"sobol": _nets.SOBOL, "array": _nets.ARRAY}


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def points(kind, keys, size, dim):
    """Words of the nets, (count, 2**levels, dim)."""
    levels, wide = _nets.shape_of(size, dim)
    number = kind.num_words(levels, dim)
    words = jax.vmap(lambda key: _random_bits.grid(key, 1, number, np.dtype(np.float32))[0])(keys)
    nets = _nets.net(kind, words, size, dim)
    assert nets.shape == (len(keys), 2**levels // wide, wide * dim)
    return nets.reshape(len(keys), 2**levels, dim)


@pytest.mark.covering
@pytest.mark.parametrize("size", [1, 2, 5, 64, 500, 3_000])
@pytest.mark.parametrize("dim", [1, 3, 7, 8, 10, 31, 32, 40])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_points_are_sums_of_generators_and_each_slice_has_one(kind, dim, size):
    """However many points share a row: point i ^ j is the sum of points i, j and 0, bit by bit."""
    keys = jnp.array([[5, 6], [3, 4]], jnp.uint32)
    nets = np.asarray(points(kind, keys, size, dim))
    if size == 5:  # whatever is drawn beside it
        np.testing.assert_array_equal(nets[1:], points(kind, keys[1:], size, dim))
    count = nets.shape[1]
    i, j = np.random.RandomState(2).randint(count, size=(2, 200))
    np.testing.assert_array_equal(nets[1, i ^ j], nets[1, i] ^ nets[1, j] ^ nets[1, 0])
    slices = np.sort(nets[1].astype(np.int64) * count >> 32, axis=0)
    np.testing.assert_array_equal(slices, np.tile(np.arange(count)[:, None], (1, dim)))


@pytest.mark.parametrize("dim", [3, 10, 70])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_ranks_and_dtypes_may_be_strict(kind, dim):
    """Sobol nets once failed where ranks are not promoted."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda k: points(kind, k, 128, dim), jnp.array([[1, 2]], jnp.uint32))


@pytest.mark.parametrize(
    ("size", "dim", "digits"),
    [(16, 15, 1), (64, 16, 2), (64, 21, 2), (64, 63, 1), (512, 33, 4), (100, 16, 3)],
)
def test_any_two_coordinates_of_an_array_are_stratified_jointly(size, dim, digits):
    """In each cell of the finest grid that so many coordinates allow there are equally many."""
    keys = jnp.array([[1, 2], [3, 4]], jnp.uint32)
    nets = np.asarray(points(_nets.ARRAY, keys, size, dim))
    cells = 4**digits
    for net in nets:
        for one, two in itertools.combinations(net.T >> np.uint32(32 - digits), 2):
            counts = np.bincount((one << np.uint32(digits)) | two, minlength=cells)
            np.testing.assert_array_equal(counts, np.full(cells, len(net) // cells))


def rank(rows):
    """Of rows of bits, over the field of two elements."""
    rows, found = [int(row) for row in rows], 0
    while rows:
        if pivot := rows.pop():
            found += 1
            lowest = pivot & -pivot
            rows = [row ^ pivot if row & lowest else row for row in rows]
    return found


def columns_of(levels, leading):
    """All of an array, as lists of their digits, each with some choice of what does not lead."""
    sizes = _generators.family_sizes(levels, leading, 2**levels)
    found = []
    for size, family in zip(sizes, _generators.families(levels, leading, len(sizes)), strict=True):
        for number in range(size):
            word = number + 1
            if family.rest:
                word = number | 1 + (5 * number) % (2**family.rest - 1) << family.rest
            bits = [b for b in range(len(family.linear)) if word >> b & 1]
            found.append(np.bitwise_xor.reduce([family.constant, *family.linear[bits]]))
    return found


@pytest.mark.parametrize("levels", range(2, 9))
def test_columns_of_an_array_are_independent(levels):
    for leading in range(1, levels // 2 + 1):
        columns = columns_of(levels, leading)
        assert all(rank(column) == levels for column in columns)
        for one, two in itertools.combinations(columns, 2):
            assert rank([*one[:leading], *two[:leading]]) == 2 * leading


def test_arrays_have_as_many_columns_as_there_are():
    """(2^m - 1) / (2^k - 1) spaces of k of m dimensions cover all, if k divides m."""
    for levels, leading in [(6, 1), (6, 2), (6, 3), (8, 4), (9, 3), (13, 1)]:
        most = (2**levels - 1) // (2**leading - 1)
        assert sum(_generators.family_sizes(levels, leading, 2**levels)) == most
    for levels, leading in [(7, 3), (9, 4), (11, 5)]:  # the most there are if it divides m - 1
        most = (2**levels - 2) // (2**leading - 1) - 1
        assert sum(_generators.family_sizes(levels, leading, 2**levels)) == most


@pytest.mark.parametrize("degree", range(1, 14))
def test_the_polynomials_are_primitive(degree):
    powers = _generators.multiples(2**degree, degree)[:1]
    assert len(np.unique(powers)) == 2**degree - 1
    assert powers[0, 0] == powers[0, -1] == 1


def test_chance_decides_which_coordinates_share_a_column():
    keys = jax.random.bits(jax.random.key(3), (4096, 2), jnp.uint32)
    signs = np.asarray(points(_nets.ARRAY, keys, 8, 20)) >> np.uint32(31)
    signs ^= signs[:, :1]
    shared = np.mean([np.all(signs[:, :, [j]] == signs, axis=1) for j in range(20)], axis=1)
    for j, row in enumerate(shared):
        own = np.arange(20) // 7 == j // 7  # seven coordinates are dealt the seven columns
        np.testing.assert_array_equal(row[own], np.arange(20)[own] == j)
        np.testing.assert_allclose(row[~own], 1 / 7, atol=5 * np.sqrt(1 / 7 / 4096))


def misses(kind, dim, size, count):
    """Mean squares of the means over nets of products of signs, as multiples of 1 / size.

    One for each product of up to five of the coordinates: 1 for independent samples.
    """
    keys = jax.random.bits(jax.random.key(4), (count, 2), jnp.uint32)
    signs = np.asarray(points(kind, keys, size, dim))[:, :size] >> np.uint32(31)
    # How many points have which signs; then a sum or a difference for each coordinate (Walsh).
    cells = signs @ (2 ** np.arange(dim)) + 2**dim * np.arange(count)[:, None]
    means = np.bincount(cells.ravel(), minlength=count * 2**dim).reshape(count, *[2] * dim)
    for axis in range(1, dim + 1):
        plus, minus = np.moveaxis(means, axis, 0)
        means = np.stack([plus + minus, plus - minus], axis)
    squares = np.mean(means.astype(np.float64) ** 2, axis=0) / size
    number = np.sum(np.indices(squares.shape), axis=0)
    return {n: squares[number == n] for n in range(1, 6)}


def test_no_product_of_signs_is_in_line_with_arrays():
    """Of one or two coordinates none is missed at all, of more none much more than by chance.

    Three digits of the 16 columns cancel with a probability of 2 / 9 / 14, not 1 / 64.
    """
    ours = misses(_nets.ARRAY, 10, 64, 8192)
    for number, found in ours.items():
        if number < 3:
            np.testing.assert_array_equal(found, 0.0)
        else:  # the standard error of each is 0.1, that of their mean 0.01
            assert np.mean(found) < 1.2
            assert np.max(found) < 1.6
    np.testing.assert_allclose(np.mean(ours[3]), 64 * 2 / 9 / 14, atol=0.06)


def test_coordinates_of_sobol_nets_change_places(monkeypatch):
    """Some products of four signs are the same at all points of a net: others at every key.

    So that each is missed about as often as it is on average over all of them.
    """
    dealt = misses(_nets.SOBOL, 10, 64, 2048)
    monkeypatch.setattr(_nets, "_MOST_DEALT", 0)
    # Other functions, lest the trace of the first be taken.
    other = _nets.Scrambling(*(lambda *args, f=f: f(*args) for f in _nets.SOBOL))
    fixed = misses(other, 10, 64, 16)
    assert np.max(fixed[4]) == 64
    for number, found in dealt.items():
        mean = np.mean(fixed[number])
        # A net misses a product altogether or not at all.
        error = np.sqrt(64 * mean / 2048)
        assert np.max(np.abs(found - mean)) <= 6 * error


def test_all_columns_of_an_array_add_up_to_zero():
    """The exception that the guide names: as many coordinates as there are columns."""
    keys = jax.random.bits(jax.random.key(5), (16, 2), jnp.uint32)
    signs = np.asarray(points(_nets.ARRAY, keys, 8, 7)) >> np.uint32(31)
    product = np.bitwise_xor.reduce(signs, axis=-1)
    np.testing.assert_array_equal(product, np.broadcast_to(product[:, :1], product.shape))


@pytest.mark.parametrize(("dim", "size", "most"), [(5, 64, 1.2), (10, 64, 2.3), (10, 500, 2.0)])
def test_products_of_signs_are_about_as_precise_as_by_leave_one_out(dim, size, most):
    """By default: with arrays; with opposites, which double the variance of odd functions; by nets.

    Of the nets' 120 products each has the same variance, 1.5 times that of independent samples,
    which is 1 / (size - 1) in each coordinate.
    """
    sets = np.array([*itertools.combinations(range(dim), 3)])
    keys = jax.random.split(jax.random.key(6), 1000)

    def products(y):
        return jnp.prod(jnp.sign(y)[sets], axis=1)

    jacobian = jax.jacrev(px.make_perturbed_fun(products, size, 1.0, px.Normal()), argnums=1)

    @functools.partial(jax.jit, compiler_options=FOR_LONG_RUNS)
    def jacobians(keys):
        # Batch by batch: the residuals of all at once take gigabytes.
        return jax.lax.map(lambda key: jacobian(key, jnp.zeros(dim)), keys, batch_size=50)

    variance = np.var(np.asarray(jacobians(keys), np.float64), axis=0).sum(axis=-1)
    assert np.max(variance) < most * dim / (size - 1)


def test_nets_have_as_many_coordinates_as_those_of_scipy():
    assert _generators.MAX_SOBOL_DIM == qmc.Sobol.MAXDIM


def test_generators_of_nets_are_those_of_scipy():
    generators = _generators.sobol(5, 4)
    points = qmc.Sobol(5, scramble=False, bits=32).random(16) * 2.0**32
    for index, point in enumerate(points.astype(np.uint64).astype(np.uint32)):
        gray = index ^ (index >> 1)
        digits = [generators[k] for k in range(4) if gray >> k & 1]
        np.testing.assert_array_equal(np.bitwise_xor.reduce([np.zeros_like(point), *digits]), point)


@pytest.mark.parametrize(("dim", "levels"), [(1, 1), (1, 9), (2, 3), (40, 12), (1111, 5)])
def test_generators_are_the_same_with_and_without_the_table(dim, levels):
    expected = _generators.from_points(dim, levels)
    np.testing.assert_array_equal(_generators.sobol(dim, levels), expected)
    table = Path(scipy.__file__).parent / "stats" / "_sobol_direction_numbers.npz"
    np.testing.assert_array_equal(_generators.from_table(table, dim, levels), expected)
