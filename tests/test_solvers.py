"""Every solver against brute force or another library, on thousands of random instances."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.stats
from scipy.sparse import csgraph

from helpers import enable_x64
from perturbax import solvers

SIDES = [(-1, 0), (0, -1), (0, 1), (1, 0)]
CORNERS = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
STEPS = {4: SIDES, 8: SIDES + CORNERS}


def solve_all(solver, *batch):
    """The solutions of a batch of instances, solved in one compiled call."""
    return np.asarray(jax.jit(jax.vmap(solver))(*batch))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assorted(seed, count, *shape, low=0):
    """Normal scores, then as many with so few values that most instances have ties."""
    integers = np.random.default_rng(seed).integers(low, 3, (count, *shape))
    return np.concatenate([normal(seed, count, *shape), integers]).astype(np.float32)


# Selection


def test_one_hot_argmax_marks_the_first_of_the_largest():
    scores = assorted(1, 2500, 7)
    expected = np.eye(7, dtype=np.float32)[scores.argmax(axis=1)]
    np.testing.assert_array_equal(solve_all(solvers.one_hot_argmax, scores), expected)
    np.testing.assert_array_equal(
        jax.jit(solvers.one_hot_argmax)(scores.reshape(50, 100, 7)[3]), expected[300:400]
    )


@pytest.mark.parametrize("k", [1, 3, 9])
def test_top_k_mask_marks_the_first_of_the_k_largest(k):
    scores = assorted(2, 2500, 9)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = np.zeros_like(scores)
    np.put_along_axis(expected, order[:, :k], 1, axis=1)
    solver = functools.partial(solvers.top_k_mask, k=k)
    np.testing.assert_array_equal(solve_all(solver, scores), expected)
    np.testing.assert_array_equal(
        jax.jit(solver)(scores[:6].reshape(2, 3, 9)), expected[:6].reshape(2, 3, 9)
    )


def test_top_k_mask_takes_negative_zero_for_zero():
    first = jax.jit(functools.partial(solvers.top_k_mask, k=1))
    assert first(np.float32([-0.0, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_median_is_that_of_numpy(length):
    values = normal(3, 3000, length)
    np.testing.assert_allclose(
        solve_all(solvers.median, values), np.median(values, axis=1), rtol=1e-6, atol=1e-7
    )
    assert jax.eval_shape(solvers.median, values.reshape(3, 1000, length)).shape == (3, 1000)


@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 0.99, 1])
def test_quantile_is_that_of_numpy(fraction):
    values = normal(4, 3000, 11)
    expected = np.quantile(values.astype(float), fraction, axis=1)
    actual = solve_all(functools.partial(solvers.quantile, fraction=fraction), values)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_quantile_at_an_entry_is_not_touched_by_infinite_neighbors():
    @jax.jit
    def quantiles(values):
        return [solvers.quantile(values, fraction) for fraction in (0, 0.25, 0.5, 0.75, 1)]

    found = quantiles(np.float32([np.inf, 2.0, 1.0, -np.inf, np.inf]))
    assert [float(quantile) for quantile in found] == [-np.inf, 1, 2, np.inf, np.inf]


def test_quantile_at_a_traced_fraction():
    values = np.float32([4.0, 0.0, 1.0])
    fractions = np.float32([-0.1, 0.0, 0.75, 1.0, 1.1])
    actual = jax.jit(jax.vmap(functools.partial(solvers.quantile, values)))(fractions)
    np.testing.assert_array_equal(actual, [np.nan, 0, 2.5, 4, np.nan])


# Ordering. Beyond 64 entries ranks are computed in another way.


@pytest.mark.parametrize(("count", "length"), [(2000, 1), (2000, 6), (500, 65)])
def test_ranks_are_those_of_scipy(count, length):
    scores = assorted(5, count, length)
    np.testing.assert_array_equal(
        solve_all(solvers.ranks, scores), scipy.stats.rankdata(scores, "ordinal", axis=1)
    )
    np.testing.assert_array_equal(
        solve_all(functools.partial(solvers.ranks, descending=True), scores),
        scipy.stats.rankdata(-scores, "ordinal", axis=1),
    )
    ranks = jax.jit(solvers.ranks)
    batch = np.asarray(ranks(scores[:6].reshape(3, 2, length)))
    np.testing.assert_array_equal(batch[2, 1], ranks(scores[5]))


def test_ranks_maximise_over_all_permutations():
    scores = normal(6, 2000, 5).astype(float)
    objectives = scores @ np.array(list(itertools.permutations(range(1, 6)))).T
    solutions = solve_all(solvers.ranks, scores)
    np.testing.assert_allclose((scores * solutions).sum(axis=1), objectives.max(axis=1), atol=1e-12)


@pytest.mark.parametrize(("count", "length"), [(4000, 6), (200, 70)])
@pytest.mark.parametrize("descending", [False, True])
def test_sorting_permutation_sorts_and_keeps_the_order_of_ties(count, length, descending):
    scores = assorted(7, count, length)
    solver = functools.partial(solvers.sorting_permutation, descending=descending)
    order = np.argsort(-scores if descending else scores, axis=1, kind="stable")
    expected = np.eye(length)[order]
    np.testing.assert_array_equal(solve_all(solver, scores), expected)
    np.testing.assert_array_equal(
        jax.jit(solver)(scores[:4].reshape(2, 2, length)),
        expected[:4].reshape(2, 2, length, length),
    )


# Assignment


def is_matching(solutions):
    size = min(solutions.shape[1:])
    return (
        np.isin(solutions, (0, 1)).all()
        and (solutions.sum(axis=1) <= 1).all()
        and (solutions.sum(axis=2) <= 1).all()
        and (solutions.sum(axis=(1, 2)) == size).all()
    )


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (7, 2)])
def test_assignment_is_as_good_as_that_of_scipy(shape):
    scores = assorted(8, 1000, *shape)
    solutions = solve_all(solvers.assignment, scores)
    best = [
        matrix[scipy.optimize.linear_sum_assignment(matrix, maximize=True)].sum()
        for matrix in scores
    ]
    assert is_matching(solutions)
    np.testing.assert_allclose((scores * solutions).sum(axis=(1, 2)), best, rtol=1e-5, atol=1e-5)


def test_assignment_avoids_forbidden_pairs_and_takes_obligatory_ones():
    size = np.repeat([1e-6, 1, 1e6], 800)[:, None, None].astype(np.float32)
    scores = size * normal(9, 2400, 5, 5)
    # The diagonal stays open, so that a matching always exists.
    forbidden = np.random.default_rng(10).random(scores.shape) < 0.5
    forbidden[:, np.arange(5), np.arange(5)] = False
    scores[forbidden] = -np.inf
    scores[::2, 2, 2] = np.inf
    solutions = solve_all(solvers.assignment, scores)
    assert is_matching(solutions)
    assert not solutions[forbidden].any()
    assert solutions[::2, 2, 2].all()
    bounded = np.clip(scores.astype(float) / size, -100, 100)
    best = [
        matrix[scipy.optimize.linear_sum_assignment(matrix, maximize=True)].sum()
        for matrix in bounded
    ]
    np.testing.assert_allclose((bounded * solutions).sum(axis=(1, 2)), best, rtol=1e-5, atol=1e-5)


def test_assignment_uses_as_few_forbidden_pairs_as_possible():
    closed = -np.inf
    scores = np.float32([[3, 2, 1], [-9, closed, closed], [closed] * 3])
    none = np.full((4, 4), closed, np.float32)
    some, others = jax.jit(lambda *batch: [*map(solvers.assignment, batch)])(scores, none)
    assert some[:2].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert is_matching(np.asarray(others)[None])


# Shortest paths on a grid


def grid_neighbors(shape, neighbors):
    """Pairs (cell, neighbor) of flat indices, for each cell in the solver's order of steps."""
    for row, column in np.ndindex(shape):
        for down, right in STEPS[neighbors]:
            if 0 <= row + down < shape[0] and 0 <= column + right < shape[1]:
                yield row * shape[1] + column, (row + down) * shape[1] + column + right


def grid_distances(costs, neighbors):
    """The least cost of a path between the corners, by scipy's Dijkstra."""
    pairs = np.array(list(grid_neighbors(costs.shape[1:], neighbors)))
    size = costs[0].size
    for grid in costs:
        weights = grid.ravel()[pairs[:, 1]]
        graph = scipy.sparse.csr_matrix((weights, pairs.T), shape=(size, size))
        yield grid[0, 0] + csgraph.dijkstra(graph, indices=0)[-1]


def steps_within(mask, neighbors):
    """The number of steps from corner to corner through the marked cells alone, or -1."""
    reached, frontier, count = {(0, 0)}, {(0, 0)}, 0
    while frontier:
        if (mask.shape[0] - 1, mask.shape[1] - 1) in frontier:
            return count
        frontier = {
            (row + down, column + right)
            for row, column in frontier
            for down, right in STEPS[neighbors]
            if 0 <= row + down < mask.shape[0]
            and 0 <= column + right < mask.shape[1]
            and mask[row + down, column + right]
        } - reached
        reached |= frontier
        count += 1
    return -1


@pytest.mark.parametrize("neighbors", [4, 8])
def test_grid_shortest_path_is_simple_and_as_cheap_as_dijkstras(neighbors):
    rng = np.random.default_rng(11)
    uniform, rough = rng.uniform(size=(700, 6, 7)), np.exp(4 * rng.normal(size=(700, 6, 7)))
    signed = rng.normal(0.3, 1, (700, 6, 7))
    costs = np.concatenate([uniform, rough, signed]).astype(np.float32)
    solver = functools.partial(solvers.grid_shortest_path, neighbors=neighbors)
    solutions = solve_all(solver, costs)
    assert np.isin(solutions, (0, 1)).all()
    # A path that has no shorter one inside it is walked in as many steps as it has cells.
    for solution in solutions:
        assert steps_within(solution, neighbors) == solution.sum() - 1
    # scipy takes an entry of 0 for no edge: the smallest costs are lifted by nothing that counts.
    positive = np.maximum(costs.astype(float), 1e-30)
    np.testing.assert_allclose(
        (positive * solutions).sum(axis=(1, 2)),
        list(grid_distances(positive, neighbors)),
        rtol=2e-6,
    )


@functools.cache
def simple_paths(shape, neighbors):
    """All simple paths between the corners, each as flat indices from the end backwards."""
    after = {}
    for cell, other in grid_neighbors(shape, neighbors):
        after.setdefault(cell, []).append(other)
    paths, stack = [], [(shape[0] * shape[1] - 1,)]
    while stack:
        path = stack.pop()
        if path[-1] == 0:
            paths.append(path)
        else:
            stack += [(*path, other) for other in after[path[-1]] if other not in path]
    return paths


@pytest.mark.parametrize(("shape", "neighbors"), [((3, 4), 8), ((3, 4), 4), ((1, 1), 8)])
def test_grid_shortest_path_is_the_one_documented_among_equals(shape, neighbors):
    size = shape[0] * shape[1]
    place = {pair: index for index, pair in enumerate(grid_neighbors(shape, neighbors))}

    def tie_key(path):
        return len(path), [place[pair] for pair in itertools.pairwise(path)]

    paths = sorted(simple_paths(shape, neighbors), key=tie_key)
    marks = np.zeros((len(paths), size))
    for mark, path in zip(marks, paths, strict=True):
        mark[list(path)] = 1
    costs = np.random.default_rng(12).integers(-1, 3, (3000, *shape))
    best = (np.maximum(costs, 0).reshape(-1, size) @ marks.T).argmin(axis=1)
    solver = functools.partial(solvers.grid_shortest_path, neighbors=neighbors)
    np.testing.assert_array_equal(solve_all(solver, costs), marks[best].reshape(costs.shape))


def test_grid_shortest_path_goes_round_walls_however_long_the_way():
    costs = np.ones((5, 7), np.float32)
    costs[1, :6] = costs[3, 1:] = np.inf
    solver = functools.partial(solvers.grid_shortest_path, neighbors=4)
    closed = costs.copy()
    closed[3, 0] = np.inf
    ends = np.ones((2, 5, 7), np.float32)
    ends[0, 0, 0] = ends[1, 4, 6] = np.inf
    solutions = solve_all(solver, np.stack([costs, closed, *ends]))
    np.testing.assert_array_equal(solutions[0], np.where(np.isinf(costs), 0, 1))
    assert np.isnan(solutions[1:]).all()


def test_paths_of_enormous_costs():
    """Their sums were infinite, and the end was taken for walled in."""
    cost = np.float32(3e38)
    costs = np.full((4, 4), cost)
    assert solvers.grid_shortest_path(costs).tolist() == np.eye(4).tolist()
    costs[2, 2] = np.inf
    path = np.asarray(solvers.grid_shortest_path(costs))
    assert path.sum() == 5
    assert path[2, 2] == 0
    edges = np.array([(0, 1), (1, 2), (2, 3), (0, 3), (3, 0)])
    for num_edges in (4, 5):  # without and with a cycle
        costs = np.array([cost / 4, cost / 4, cost / 4, cost, cost], np.float32)[:num_edges]
        path = solvers.graph_shortest_path(costs, edges[:num_edges], 0, 3)
        assert path.tolist() == [1, 1, 1, 0, 0][:num_edges]
        costs[:3] = cost
        costs[3] = np.inf
        path = solvers.graph_shortest_path(costs, edges[:num_edges], 0, 3)
        assert path.tolist() == [1, 1, 1, 0, 0][:num_edges]


# Shortest paths on graphs


def random_graph(seed, num_nodes, num_edges, *, acyclic=False):
    """Edges without loops or doubles; acyclic ones lead from lower to higher in a hidden order."""
    rng = np.random.default_rng(seed)
    pairs = np.array(list(itertools.permutations(range(num_nodes), 2)))
    if acyclic:
        order = rng.permutation(num_nodes)
        pairs = order[pairs[pairs[:, 0] < pairs[:, 1]]]
    edges = rng.permutation(pairs)[:num_edges]
    assert edges.max() == num_nodes - 1
    return edges


def paths_by_edges(edges, source, target, *, directed=True):
    """All simple paths, each as indices of edges from the target backwards."""
    arriving = {}
    for index, (tail, head) in enumerate(edges):
        arriving.setdefault(head, []).append((index, tail))
        if not directed:
            arriving.setdefault(tail, []).append((index, head))
    paths, stack = [], [((), (target,))]
    while stack:
        path, nodes = stack.pop()
        if nodes[-1] == source:
            paths.append(path)
            continue
        for index, tail in arriving.get(nodes[-1], []):
            if tail not in nodes:
                stack.append(((*path, index), (*nodes, tail)))
    return paths


def best_paths(costs, edges, source, target, *, directed=True, fewest=True):
    """The solutions by enumeration, with the ties as documented."""
    paths = paths_by_edges(edges, source, target, directed=directed)
    paths.sort(key=lambda path: (len(path) if fewest else 0, path))
    marks = np.zeros((len(paths), len(edges)), np.float32)
    for mark, path in zip(marks, paths, strict=True):
        mark[list(path)] = 1
    return marks[(costs.astype(float) @ marks.T).argmin(axis=1)]


def richest_ends(edges, **how):
    """The source and the target with the most paths between them."""
    ends = itertools.permutations(range(edges.max() + 1), 2)
    return max(ends, key=lambda pair: len(paths_by_edges(edges, *pair, **how)))


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_graph_shortest_path_with_cycles_is_that_of_enumeration(directed, seed):
    edges = random_graph(seed, 7, 18)
    if not directed:
        edges = np.unique(np.sort(edges, axis=1), axis=0)
    source, target = richest_ends(edges, directed=directed)
    costs = assorted(13, 1000, len(edges), low=-1)
    solver = functools.partial(
        solvers.graph_shortest_path, edges=edges, source=source, target=target, directed=directed
    )
    expected = best_paths(np.maximum(costs, 0), edges, source, target, directed=directed)
    np.testing.assert_array_equal(solve_all(solver, costs), expected)


@pytest.mark.parametrize("seed", range(3))
def test_graph_shortest_path_without_cycles_is_exact_for_negative_costs(seed):
    edges = random_graph(seed, 8, 20, acyclic=True)
    source, target = richest_ends(edges)
    assert len(paths_by_edges(edges, source, target)) >= 8
    costs = assorted(14, 1000, len(edges), low=-2)
    solver = functools.partial(
        solvers.graph_shortest_path, edges=edges, source=source, target=target
    )
    expected = best_paths(costs, edges, source, target, fewest=False)
    np.testing.assert_array_equal(solve_all(solver, costs), expected)


def test_graph_shortest_path_on_large_graphs_is_as_cheap_as_dijkstras():
    edges = random_graph(15, 60, 300)
    costs = np.random.default_rng(16).exponential(size=(500, 300)).astype(np.float32)
    for directed in (True, False):
        if not directed:
            edges = np.unique(np.sort(edges, axis=1), axis=0)
        batch = costs[:, : len(edges)]
        solver = functools.partial(
            solvers.graph_shortest_path, edges=edges, source=3, target=41, directed=directed
        )
        solutions = solve_all(solver, batch)
        best = [
            csgraph.dijkstra(
                scipy.sparse.csr_matrix((row, edges.T), shape=(60, 60)),
                directed=directed,
                indices=3,
            )[41]
            for row in batch
        ]
        np.testing.assert_allclose((batch * solutions).sum(axis=1), best, rtol=1e-5)


def test_lattice_edges_stand_row_by_row():
    expected = [(0, 1), (1, 2), (0, 3), (1, 4), (2, 5), (3, 4), (4, 5)]
    assert solvers.lattice_edges(2, 3).tolist() == [list(edge) for edge in expected]
    assert len(solvers.lattice_edges(5, 5)) == 40


def test_lattice_shortest_path_is_the_best_of_the_seventy():
    edges = solvers.lattice_edges(5, 5)
    assert len(paths_by_edges(edges, 0, 24)) == 70
    costs = normal(17, 4000, 40)
    solver = functools.partial(solvers.graph_shortest_path, edges=edges, source=0, target=24)
    expected = best_paths(costs, edges, 0, 24, fewest=False)
    np.testing.assert_array_equal(solve_all(solver, costs), expected)


def test_graph_shortest_path_between_traced_nodes():
    edges = random_graph(18, 6, 14)
    costs = np.abs(normal(19, 14))
    ends = np.array([*itertools.product(range(6), repeat=2), (0, 6), (-1, 2)])
    solutions = solve_all(lambda pair: solvers.graph_shortest_path(costs, edges, *pair), ends)
    for (source, target), solution in zip(ends, solutions, strict=True):
        inside = 0 <= source < 6 and 0 <= target < 6
        if inside and paths_by_edges(edges, source, target):
            expected = best_paths(costs[None], edges, source, target)[0]
        else:
            expected = np.full(14, np.nan)
        np.testing.assert_array_equal(solution, expected)


@pytest.mark.parametrize("edges", [[(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 1), (2, 3)]])
def test_graph_shortest_path_is_nan_where_closed_edges_leave_none(edges):
    costs = np.arange(1.0, len(edges) + 1, dtype=np.float32)
    costs[1] = np.inf
    ones = np.ones_like(costs)
    assert np.isnan(solvers.graph_shortest_path(costs, edges, 0, 3)).all()
    assert np.isnan(solvers.graph_shortest_path(ones, edges, 3, 0)).all()
    assert solvers.graph_shortest_path(costs, edges, 0, 1).tolist() == [1] + [0] * (len(edges) - 1)
    assert not np.any(solvers.graph_shortest_path(costs, edges, 2, 2))


@pytest.mark.parametrize("edges", [solvers.lattice_edges(4, 4), random_graph(1, 7, 18)])
def test_graph_shortest_path_of_costs_computed_in_the_same_call(edges):
    # XLA may fuse the product with the solver's sums, and then rounds them in different ways.
    source, target = richest_ends(edges)
    factors = normal(21, 2000, len(edges))
    solutions = solve_all(
        lambda factor: solvers.graph_shortest_path(factor * factor, edges, source, target), factors
    )
    costs = factors.astype(float) ** 2
    best = best_paths(costs, edges, source, target)
    np.testing.assert_allclose(
        (costs * solutions).sum(axis=1), (costs * best).sum(axis=1), rtol=1e-6
    )


def test_graph_shortest_path_with_an_infinitely_good_edge():
    edges = solvers.lattice_edges(3, 3)
    costs = np.abs(normal(20, 12))
    costs[9] = -np.inf
    solution = np.asarray(solvers.graph_shortest_path(costs, edges, 0, 8))
    assert solution[9] == 1
    assert tuple(np.flatnonzero(solution)[::-1]) in paths_by_edges(edges, 0, 8)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("x64", [False, True])
def test_graph_solvers_take_edges_of_any_integer_dtype(dtype, x64):
    """All but JAX's default were an error of the loop that walks back."""
    edges = np.array([(0, 1), (1, 2), (0, 2), (2, 0)], dtype)
    with enable_x64(x64):
        for num_edges, directed in [(3, True), (4, True), (3, False)]:
            costs = np.float32([1.0, 1.0, 3.0, 1.0])[:num_edges]
            path = solvers.graph_shortest_path(costs, edges[:num_edges], 0, 2, directed=directed)
            assert path.tolist() == [1, 1, 0, 0][:num_edges]
        costs = np.arange(3, dtype=np.float32)
        assert solvers.minimum_spanning_tree(costs, edges[:3]).tolist() == [1, 1, 0]


def test_graph_shortest_path_prepares_a_long_chain_in_linear_time():
    """Every eager call took a pass over all edges a level: of this chain, for half a minute."""
    edges = np.stack([np.arange(40_000), np.arange(1, 40_001)], axis=1)
    solver = functools.partial(solvers.graph_shortest_path, edges=edges, source=0, target=40_000)
    assert np.all(solver(np.ones(40_000, np.float32)))


# Knapsack


@pytest.mark.parametrize("capacity", [12, (17, 8), (9, 14, 6)])
def test_knapsack_is_the_best_of_all_subsets(capacity):
    # Lexicographically from the largest, so that the first of the best is the documented one.
    subsets = np.array(list(itertools.product([1, 0], repeat=9)))
    values = assorted(20, 300, 9, low=-1)
    shape = (9,) if isinstance(capacity, int) else (len(capacity), 9)

    @jax.jit
    def traced(values, weights):
        return jax.vmap(lambda values: solvers.knapsack(values, weights, capacity))(values)

    for seed in range(3):
        weights = np.random.default_rng(seed).integers(0, 9, shape)
        feasible = subsets[(subsets @ np.atleast_2d(weights).T <= capacity).all(axis=1)]
        expected = feasible[(values.astype(float) @ feasible.T).argmax(axis=1)]
        np.testing.assert_array_equal(traced(values, weights.astype(np.int16)), expected)
    solver = functools.partial(solvers.knapsack, weights=weights, capacity=capacity)
    np.testing.assert_array_equal(solve_all(solver, values), expected)


def test_knapsack_with_scaled_weights():
    weights = np.array([3.25, 4.75, 0.29, 7.99], np.float32)
    solver = functools.partial(solvers.knapsack, weights=weights, scale=100)
    values = np.float32([3.0, 4.0, 1.0, 6.5])
    assert solver(values, capacity=8.29).tolist() == [1, 1, 1, 0]
    assert solver(values, capacity=8.28).tolist() == [0, 0, 1, 1]
    assert solver(values, capacity=0.29).tolist() == [0, 0, 1, 0]
    assert solver(values, capacity=0.28).tolist() == [0, 0, 0, 0]


def test_knapsack_with_weights_of_each_instance():
    values, weights = (
        np.abs(normal(22, 500, 6)),
        np.random.default_rng(23).integers(0, 12, (500, 6)),
    )
    subsets = np.array(list(itertools.product([1, 0], repeat=6)))
    objectives = np.where(weights @ subsets.T <= 15, values @ subsets.T, -np.inf)
    solver = functools.partial(solvers.knapsack, capacity=15)
    np.testing.assert_array_equal(
        solve_all(solver, values, weights), subsets[objectives.argmax(axis=1)]
    )


def test_knapsack_with_known_weights_beyond_the_integers():
    """They were an OverflowError of JAX's."""
    assert solvers.knapsack(np.ones(3), [1, 2**40, 3], 5).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("weights", "dtype", "capacity", "scale", "expected"),
    [
        ([1, 2**16, 3], np.int32, 1, 2**16, [1, 0, 0]),  # 2^32, which was taken for 0
        ([1, 2**31 + 5, 3], np.uint32, 5, 1, [1, 0, 1]),
        ([1, 2, 0], np.int32, 1e-9, 10**10, [0, 0, 1]),
        ([1, 127, 3], np.int8, 300, 7, [1, 1, 1]),
    ],
)
def test_knapsack_with_traced_weights_beyond_the_integers(
    weights, dtype, capacity, scale, expected
):
    solver = functools.partial(solvers.knapsack, capacity=capacity, scale=scale)
    weights = np.array(weights, dtype)
    assert jax.jit(solver)(np.ones(3), weights).tolist() == expected


def test_knapsack_packs_what_is_left_beside_infinite_values():
    """A sum with one is infinite whatever else it is of, and the first item won."""
    solver = functools.partial(solvers.knapsack, weights=[1, 1, 1, 2], capacity=3)
    values = np.float32([[1, np.inf, 5, 2], [1, np.inf, 5, np.inf], [np.inf, 1, np.inf, np.inf]])
    expected = [[1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 0]]
    np.testing.assert_array_equal(solve_all(solver, values), expected)
    assert solvers.knapsack(np.float32([1, np.inf, 5]), [1, 1, 1], 2).tolist() == [0, 1, 1]


def test_knapsack_with_infinite_values_and_a_negative_traced_weight():
    values = np.float32([np.inf, 1.0, -np.inf, np.inf])
    assert solvers.knapsack(values, [2, 1, 0, 2], 3).tolist() == [1, 1, 0, 0]
    traced = jax.jit(lambda weights: solvers.knapsack(np.ones(2), weights, 3))
    assert np.isnan(traced(np.array([1, -1]))).all()


# Spanning trees


def kruskal(costs, edges):
    """The tree with ties to the edges that stand first."""
    tree, parts = np.zeros(len(edges)), np.arange(edges.max() + 1)
    for index in np.argsort(costs, kind="stable"):
        first, second = parts[edges[index]]
        if first != second:
            tree[index] = 1
            parts[parts == second] = first
    return tree


@pytest.mark.parametrize(
    "edges",
    [
        np.stack(np.triu_indices(7, 1), axis=1),
        solvers.lattice_edges(4, 4)[::-1],
        np.array([(3, 1), (0, 0), (1, 2), (2, 3), (2, 2), (0, 3)]),
        np.array([(1, 0)]),
        np.concatenate([solvers.lattice_edges(6, 6), [(7, 7), (35, 0), (0, 0)]])[::-1],
        np.stack([np.arange(40), np.arange(1, 41)], axis=1)[:, ::-1],
    ],
    ids=["complete", "lattice", "loops", "one edge", "sparse", "chain"],
)
def test_minimum_spanning_tree_is_that_of_kruskal(edges):
    costs = assorted(24, 1000, len(edges), low=-1)
    solver = functools.partial(solvers.minimum_spanning_tree, edges=edges)
    expected = [kruskal(row, edges) for row in costs]
    np.testing.assert_array_equal(solve_all(solver, costs), expected)


def test_minimum_spanning_tree_is_as_cheap_as_that_of_scipy():
    edges = np.stack(np.triu_indices(30, 1), axis=1)
    costs = np.random.default_rng(25).exponential(size=(300, len(edges))).astype(np.float32)
    solutions = solve_all(functools.partial(solvers.minimum_spanning_tree, edges=edges), costs)
    best = [
        csgraph.minimum_spanning_tree(scipy.sparse.csr_matrix((row, edges.T), shape=(30, 30))).sum()
        for row in costs
    ]
    np.testing.assert_allclose((costs * solutions).sum(axis=1), best, rtol=1e-5)


def test_minimum_spanning_tree_is_nan_where_removed_edges_leave_none():
    edges = np.array([(0, 1), (1, 2), (0, 2), (2, 3)])
    removed = np.float32([np.inf, 1.0, 2.0, 3.0])
    assert solvers.minimum_spanning_tree(removed, edges).tolist() == [0, 1, 1, 1]
    removed[2] = np.inf
    assert np.isnan(solvers.minimum_spanning_tree(removed, edges)).all()


def test_minimum_spanning_tree_of_a_sparse_graph_with_infinite_and_unknown_costs():
    edges = solvers.lattice_edges(6, 6)
    solver = functools.partial(solvers.minimum_spanning_tree, edges=edges)
    costs = np.zeros((4, 60), np.float32)
    costs[0, ::3], costs[0, 1::3], costs[0, [4, 25]] = -np.inf, -0.0, np.inf
    costs[1] = -np.inf
    costs[2, (edges == 0).any(axis=1)] = np.inf
    costs[3, 7] = np.nan
    solutions = solve_all(solver, costs)
    np.testing.assert_array_equal(solutions[:2], [kruskal(row, edges) for row in costs[:2]])
    assert np.isnan(solutions[2:]).all()


def test_minimum_spanning_tree_of_a_large_graph_needs_little_memory():
    """A table of all pairs of nodes was 20 GB for this one."""
    edges = solvers.lattice_edges(200, 250)
    costs = np.random.default_rng(27).exponential(size=len(edges)).astype(np.float32)
    solver = jax.jit(functools.partial(solvers.minimum_spanning_tree, edges=edges))
    compiled = solver.lower(costs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * len(edges)
    graph = scipy.sparse.csr_matrix((costs, edges.T), shape=(50_000, 50_000))
    length = costs.astype(np.float64) @ np.asarray(compiled(costs), np.float64)
    assert length == pytest.approx(csgraph.minimum_spanning_tree(graph).sum())


# What holds for all of them

EDGES = np.array([(0, 1), (1, 2), (2, 0), (0, 2), (2, 3), (1, 3)])
SOLVERS = {
    "one_hot_argmax": (solvers.one_hot_argmax, (6,)),
    "top_k_mask": (functools.partial(solvers.top_k_mask, k=2), (6,)),
    "ranks": (solvers.ranks, (6,)),
    "ranks of many": (solvers.ranks, (70,)),
    "sorting_permutation": (solvers.sorting_permutation, (6,)),
    "median": (solvers.median, (6,)),
    "quantile": (functools.partial(solvers.quantile, fraction=0.3), (6,)),
    "assignment": (solvers.assignment, (3, 4)),
    "grid_shortest_path": (solvers.grid_shortest_path, (4, 5)),
    "graph_shortest_path": (
        functools.partial(solvers.graph_shortest_path, edges=EDGES, source=0, target=3),
        (6,),
    ),
    "graph_shortest_path, acyclic": (
        functools.partial(
            solvers.graph_shortest_path, edges=solvers.lattice_edges(2, 3), source=0, target=5
        ),
        (7,),
    ),
    "knapsack": (
        functools.partial(solvers.knapsack, weights=[3, 1, 4, 1, 5, 9], capacity=10),
        (6,),
    ),
    "minimum_spanning_tree": (
        functools.partial(solvers.minimum_spanning_tree, edges=np.array([(0, 1), (1, 2), (0, 2)])),
        (3,),
    ),
    "minimum_spanning_tree, sparse": (
        functools.partial(solvers.minimum_spanning_tree, edges=solvers.lattice_edges(6, 6)),
        (60,),
    ),
}
every_solver = pytest.mark.parametrize(("solver", "shape"), SOLVERS.values(), ids=SOLVERS)


@every_solver
def test_the_result_has_the_dtype_of_the_scores(solver, shape):
    def result(dtype):
        return jax.eval_shape(solver, jax.ShapeDtypeStruct(shape, dtype)).dtype.name

    short = "float32" if solver is solvers.ranks else None
    assert [result(dtype) for dtype in ("bfloat16", "float16")] == [
        short or "bfloat16",
        short or "float16",
    ]
    assert {result(dtype) for dtype in ("float32", "int8", "int32", "uint8")} == {"float32"}
    with enable_x64(True):
        assert {result(dtype) for dtype in ("float64", "int64")} == {"float64"}
        assert result("float32") == "float32"


@every_solver
def test_bfloat16_gives_the_solution_that_float32_gives(solver, shape):
    # bfloat16 holds these numbers exactly, but not the sum of two.
    scores = 250.0 - np.random.default_rng(26).permutation(np.prod(shape)).reshape(shape)
    result, expected = jax.jit(lambda *batch: [solver(scores) for scores in batch])(
        scores.astype(jnp.bfloat16), scores.astype(np.float32)
    )
    np.testing.assert_array_equal(result, np.asarray(expected).astype(result.dtype))


def test_float64_decides_by_differences_that_float32_cannot_hold():
    triangle, square = [(0, 1), (1, 2), (0, 2)], [(0, 1), (1, 3), (0, 2), (2, 3)]

    @jax.jit
    def solutions(close, flat, grid, costs):
        return (
            solvers.one_hot_argmax(close),
            solvers.ranks(close),
            solvers.minimum_spanning_tree(close, triangle),
            solvers.knapsack(close, [1, 1, 1], 2),
            solvers.assignment(flat)[0],
            solvers.grid_shortest_path(grid, neighbors=4).ravel(),
            solvers.graph_shortest_path(costs, square, 0, 3),
        )

    one, most, more = close = 1 + 1e-12 * np.array([0, 2, 1])
    flat = np.array([close, np.ones(3), np.ones(3)])
    grid, costs = np.array([[one, most], [more, one]]), np.array([one, most, one, more])
    with enable_x64(True):
        found = [solution.tolist() for solution in solutions(close, flat, grid, costs)]
    assert found == [
        [0, 1, 0],
        [1, 3, 2],
        [1, 0, 1],
        [0, 1, 1],
        [0, 1, 0],
        [1, 0, 1, 1],
        [0, 0, 1, 1],
    ]


@every_solver
def test_nan_among_the_scores_makes_the_solution_nan(solver, shape):
    batch = np.stack([normal(29, *shape)] * 3)
    batch[1].flat[2] = np.nan
    batch[2] = np.nan
    solutions = solve_all(solver, batch)
    assert np.isfinite(solutions[0]).all()
    assert np.isnan(solutions[1:]).all()


@every_solver
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_strict_promotion(solver, shape, dtype):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.vmap(solver), jax.ShapeDtypeStruct((2, *shape), dtype))
    with enable_x64(True), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.vmap(solver), jax.ShapeDtypeStruct((2, *shape), dtype))


@every_solver
def test_the_derivative_of_a_hard_solution_is_zero(solver, shape):
    @jax.jit
    def derivatives(scores):
        def total(scores):
            return jnp.sum(solver(scores))

        return jax.grad(total)(scores), jax.jvp(total, (scores,), (jnp.ones_like(scores),))[1]

    gradient, slope = derivatives(normal(31, *shape))
    # The median and the quantile are values, and move with their arguments.
    expected = 1 if shape == (6,) and solver in (solvers.median, SOLVERS["quantile"][0]) else 0
    assert gradient.sum() == pytest.approx(expected)
    assert np.count_nonzero(gradient) == 2 * expected
    assert slope == pytest.approx(expected)


@every_solver
def test_a_second_eager_call_compiles_nothing(solver, shape):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    first, second = jnp.asarray(normal(32, *shape)), jnp.asarray(normal(33, *shape))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        solver(first).block_until_ready()
        before = len(compiled)
        jax.jit(lambda: 2 * first)()
        assert len(compiled) == before + 1, "the listener must hear a compilation"
        solver(second).block_until_ready()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == before + 1


SCORES = np.ones(6, np.float32)
WRONG = [
    (lambda: solvers.one_hot_argmax(1.0), ValueError, "scores must have at least one axis"),
    (lambda: solvers.one_hot_argmax(np.ones((2, 0))), ValueError, "scores must not be empty"),
    (lambda: solvers.one_hot_argmax("three"), TypeError, "scores must be an array .* got str"),
    (lambda: solvers.one_hot_argmax({"a": 1}), TypeError, "scores must be an array .* got dict"),
    (lambda: solvers.ranks(np.ones(3, bool)), TypeError, "scores .* dtype bool; convert"),
    (lambda: solvers.ranks(np.ones(3, complex)), TypeError, "scores .* dtype complex64"),
    (lambda: solvers.ranks(jax.random.key(0)), TypeError, "dtype key<fry>"),
    (
        lambda: solvers.ranks(SCORES, descending="no"),
        TypeError,
        r"descending must be a bool, got 'no' \(str\)",
    ),
    (
        lambda: solvers.sorting_permutation(SCORES, descending=1),
        TypeError,
        "descending must be a bool, got 1",
    ),
    (
        lambda: jax.jit(lambda d: solvers.ranks(SCORES, descending=d))(True),
        TypeError,
        "descending must be a bool, got a traced value",
    ),
    (
        lambda: solvers.graph_shortest_path(SCORES, EDGES, 0, 3, directed="no"),
        TypeError,
        "directed must be a bool, got 'no'",
    ),
    (lambda: solvers.top_k_mask(SCORES, 0), ValueError, "k must be between 1 and 6, .* got 0"),
    (lambda: solvers.top_k_mask(SCORES, 7), ValueError, "k must be between 1 and 6, .* got 7"),
    (lambda: solvers.top_k_mask(SCORES, 2.0), TypeError, "k must be a Python int, got float"),
    (lambda: solvers.top_k_mask(SCORES, True), TypeError, "k must be a Python int, got bool"),
    (lambda: jax.jit(solvers.top_k_mask)(SCORES, 2), TypeError, "k .* traced .* static_argnames"),
    (
        lambda: solvers.quantile(SCORES, 1.5),
        ValueError,
        "fraction must be between 0 and 1, got 1.5",
    ),
    (lambda: solvers.quantile(SCORES, [0.5]), ValueError, "fraction must be a scalar"),
    (lambda: solvers.quantile(SCORES, "a"), TypeError, "fraction must be a number, got str"),
    (
        lambda: solvers.graph_shortest_path(np.ones(2), [[0, 1], [1]], 0, 1),
        ValueError,
        r"edges must have shape \(num_edges, 2\)",
    ),
    (lambda: solvers.quantile(SCORES, float("nan")), ValueError, "fraction must be between"),
    (lambda: solvers.assignment(SCORES), ValueError, r"2 axes, got shape \(6,\); add"),
    (lambda: solvers.assignment(np.ones((2, 3, 3))), ValueError, "2 axes, .*; .* jax.vmap"),
    (lambda: solvers.grid_shortest_path(SCORES), ValueError, "costs must have 2 axes"),
    (lambda: solvers.grid_shortest_path(np.ones((3, 0))), ValueError, "costs must not be empty"),
    (
        lambda: solvers.grid_shortest_path(np.ones((3, 3)), neighbors=6),
        ValueError,
        "neighbors must be 4 or 8, got 6",
    ),
    (
        lambda: solvers.grid_shortest_path(np.ones((3, 3)), neighbors=np.array([4, 8])),
        TypeError,
        "neighbors must be a Python int, got ndarray",
    ),
    (
        lambda: solvers.grid_shortest_path(np.ones((3, 3)), neighbors=4.0),
        TypeError,
        "neighbors must be a Python int, got float",
    ),
    (
        lambda: jax.jit(lambda n: solvers.grid_shortest_path(np.ones((3, 3)), neighbors=n))(4),
        TypeError,
        "neighbors .* traced",
    ),
    (
        lambda: solvers.graph_shortest_path(SCORES, EDGES.T, 0, 3),
        ValueError,
        r"edges must have shape \(num_edges, 2\), got \(2, 6\)",
    ),
    (
        lambda: solvers.graph_shortest_path(SCORES, EDGES[:4], 0, 2),
        ValueError,
        "6 costs for 4 edges",
    ),
    (lambda: solvers.graph_shortest_path(SCORES, EDGES - 1, 0, 2), ValueError, ">= 0, got -1"),
    (lambda: solvers.graph_shortest_path(SCORES, EDGES + 0.5, 0, 2), TypeError, "edges .* float64"),
    (
        lambda: jax.jit(solvers.graph_shortest_path)(SCORES, EDGES, 0, 3),
        TypeError,
        "edges must be known while tracing",
    ),
    (
        lambda: solvers.graph_shortest_path(SCORES, EDGES, 0, 4),
        ValueError,
        "target .* 0 and 3, .* 4",
    ),
    (lambda: solvers.graph_shortest_path(SCORES, EDGES, -1, 3), ValueError, "source .* got -1"),
    (lambda: solvers.graph_shortest_path(SCORES, EDGES, 0.0, 3), TypeError, "source .* got float"),
    (
        lambda: jax.jit(lambda s: solvers.graph_shortest_path(SCORES, EDGES, s, 3))(0.0),
        TypeError,
        "source must be one integer",
    ),
    (lambda: solvers.lattice_edges(0, 3), ValueError, "height and width .* got 0 and 3"),
    (lambda: solvers.lattice_edges(2.0, 3), TypeError, "height must be a Python int"),
    (lambda: solvers.knapsack(SCORES, [1, 2], 3), ValueError, r"weights .* \(2,\) for 6 values"),
    (lambda: solvers.knapsack(SCORES, SCORES, -1), ValueError, "capacity .* >= 0, got -1"),
    (lambda: solvers.knapsack(SCORES, SCORES, np.inf), ValueError, "capacity must be finite"),
    (lambda: solvers.knapsack(SCORES, SCORES, [1, 2]), ValueError, "capacity .* got 2 for 1"),
    (lambda: solvers.knapsack(SCORES, SCORES, "5"), TypeError, r"capacity .* got '5' \(str\)"),
    (lambda: solvers.knapsack(SCORES, SCORES, None), TypeError, r"capacity .* got None"),
    (lambda: solvers.knapsack(SCORES, SCORES, True), TypeError, r"capacity .* got True \(bool\)"),
    (lambda: solvers.knapsack(SCORES, SCORES, [[1], [1, 2]]), TypeError, "capacity .* list"),
    (lambda: solvers.knapsack(SCORES, SCORES, 3, scale=10**9), ValueError, "capacity .* smaller"),
    (lambda: solvers.knapsack(SCORES, -SCORES, 3), ValueError, "weights must be >= 0, got -1"),
    (
        lambda: solvers.knapsack(SCORES, 1.5 * SCORES, 3),
        ValueError,
        "scale=1, got 1.5; choose scale",
    ),
    (lambda: solvers.knapsack(SCORES, np.nan * SCORES, 3), ValueError, "weights must be integers"),
    (lambda: solvers.knapsack(SCORES, np.inf * SCORES, 3), ValueError, "weights .* got inf"),
    (lambda: solvers.knapsack(SCORES, SCORES, 3, scale=0), ValueError, "scale must be at least 1"),
    (
        lambda: solvers.knapsack(SCORES, np.ones((1, 1, 6)), 3),
        ValueError,
        "weights must have shape",
    ),
    (
        lambda: jax.jit(lambda w: solvers.knapsack(SCORES, w, 3))(SCORES),
        TypeError,
        "weights must hold integers where they are traced",
    ),
    (lambda: jax.jit(solvers.knapsack)(SCORES, SCORES, 3), TypeError, "capacity must be known"),
    (
        lambda: solvers.minimum_spanning_tree(np.ones(2), [(0, 1), (2, 3)]),
        ValueError,
        "node 2 cannot be reached from node 0",
    ),
    (
        lambda: solvers.minimum_spanning_tree(np.ones(2), [(0, 1), (1, 0)]),
        ValueError,
        "every pair of nodes at most once",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_errors_name_the_argument_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_assignment_without_optax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optax.assignment", None)
    with pytest.raises(ImportError, match="pip install"):
        solvers.assignment(np.ones((9, 8)))
