"""Shortest paths: on a grid of cells, and on a graph given by its edges."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ._scores import (
    accumulator,
    as_solution,
    constant_scores,
    edge_list,
    heads_by_tail,
    is_static,
    static_bool,
    static_int,
    summable,
)

_SIDES = ((-1, 0), (0, -1), (0, 1), (1, 0))
_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def grid_shortest_path(costs: ArrayLike, *, neighbors: int = 8) -> Array:
    r"""The cheapest path over the cells of a grid, from the top left to the bottom right.

    .. math:: y^*(\theta) = \arg\min \{\langle \max(\theta, 0), y \rangle :
        y \text{ marks the cells of a simple path between the corners}\}

    Minimises; both ends count. **Negative costs count as 0**: with them the cheapest simple
    path is NP-hard to find, and Gaussian noise produces them. The result is a simple path in
    any case; where it matters that it is the best one, perturb so that costs keep their sign. A
    cost of inf is a wall. Among paths of equal cost one with the fewest cells is taken, and
    among those, from the end backwards, the first neighbour in reading order at every step,
    neighbours across a side before those across a corner.

    Args:
      costs: Shape (height, width), the cost of entering each cell.
      neighbors: 8 to step across sides and corners, 4 to step across sides only.

    Returns:
      Ones on the path and zeros elsewhere, of the shape of `costs` and of its dtype (the
      default float for integers). NaN if a cost is NaN, or if walls leave no path. Its
      derivative is zero.

    Raises:
      TypeError: If `costs` does not hold real numbers, or `neighbors` is no Python int.
      ValueError: If `costs` is empty or no matrix, or `neighbors` neither 4 nor 8.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.grid_shortest_path(jnp.array([[1, 9, 9], [1, 9, 9], [9, 1, 1]]))
      Array([[1., 0., 0.],
             [1., 0., 0.],
             [0., 1., 1.]], dtype=float32)

    References:
      Marin Vlastelica, Anselm Paulus, Vit Musil, Georg Martius, Michal Rolinek,
      "Differentiation of Blackbox Combinatorial Solvers", 2020, arXiv:1912.02175 (the
      Warcraft maps). Richard Bellman, "On a Routing Problem", 1958,
      doi:10.1090/qam/102435.
    """
    costs = constant_scores("costs", costs, ndim=2)
    neighbors = static_int("neighbors", neighbors)
    if neighbors not in (4, 8):
        raise ValueError(f"neighbors must be 4 or 8, got {neighbors!r}")
    return _grid_path(costs, _SIDES if neighbors == 4 else _SIDES + _CORNERS)


def graph_shortest_path(
    costs: ArrayLike,
    edges: ArrayLike,
    source: int | ArrayLike,
    target: int | ArrayLike,
    *,
    directed: bool = True,
) -> Array:
    r"""The cheapest path from one node of a graph to another, as the edges it uses.

    .. math:: y^*(\theta) = \arg\min \{\langle \theta, y \rangle :
        y \text{ marks the edges of a path from source to target}\}

    Minimises. On a graph without directed cycles this is exact for costs of either sign, and
    takes one pass over the edges. **On a graph with cycles negative costs count as 0**: with
    them the cheapest simple path is NP-hard to find, and Gaussian noise produces them. The
    result is a simple path in any case. A cost of inf closes an edge. Among paths of equal cost
    the choice is made from the target backwards: with cycles, first for the fewest edges; then,
    at every node, for the edge that stands first in `edges`.

    Args:
      costs: Shape (num_edges,).
      edges: Shape (num_edges, 2), integers: the tail and the head of every edge, nodes
        numbered from 0. A numpy array, since it must be known while tracing.
      source: The node to start from; may be traced.
      target: The node to reach; may be traced.
      directed: False to walk every edge both ways, at the same cost.

    Returns:
      Ones on the path's edges and zeros elsewhere, of shape (num_edges,), in the dtype of
      `costs` (the default float for integers); all zeros if source and target are the same.
      NaN if a cost is NaN, or if there is no path. Its derivative is zero.

    Raises:
      TypeError: If an argument has the wrong type, or `edges` is traced.
      ValueError: If shapes disagree, or `source` or `target` is no node of the graph.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import perturbax as px
      >>> edges = np.array([[0, 1], [1, 2], [0, 2]])
      >>> px.solvers.graph_shortest_path(jnp.array([1.0, 1.0, 3.0]), edges, source=0, target=2)
      Array([1., 1., 0.], dtype=float32)

    References:
      Richard Bellman, "On a Routing Problem", 1958, doi:10.1090/qam/102435.
    """
    costs = constant_scores("costs", costs, ndim=1)
    pairs = edge_list(costs, edges)
    num_nodes = int(pairs.max()) + 1
    source, target = (
        _node(name, node, num_nodes) for name, node in (("source", source), ("target", target))
    )
    if static_bool("directed", directed):
        levels = _levels(pairs, num_nodes)
    else:
        levels = None  # every edge and its reverse are a cycle
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
    tails, heads = pairs.T
    if levels is None:
        return _cyclic_path(costs, tails, heads, source, target, num_nodes)
    order = np.argsort(levels[heads], kind="stable")
    _, starts, sizes = np.unique(levels[heads][order], return_index=True, return_counts=True)
    blocks = (starts, sizes, np.arange(sizes.max()))
    return _acyclic_path(costs, tails, heads, order, blocks, source, target, num_nodes)


def lattice_edges(height: int, width: int) -> np.ndarray:
    """The edges of a lattice on which one steps right or down, for `graph_shortest_path`.

    Nodes are numbered row by row, so a path between the corners goes from 0 to
    `height * width - 1`. Edges stand row by row: first those to the right within the row, then
    those down to the next, the order in which PyEPO's shortest path benchmark lists its costs.

    Args:
      height: Number of rows of nodes.
      width: Number of nodes a row.

    Returns:
      An integer numpy array of shape (2 * height * width - height - width, 2).

    Raises:
      TypeError: If a size is no Python int.
      ValueError: If a size is below 1, or there is no edge.

    Example:
      >>> import perturbax as px
      >>> px.solvers.lattice_edges(2, 2)
      array([[0, 1],
             [0, 2],
             [1, 3],
             [2, 3]])
    """
    height, width = static_int("height", height), static_int("width", width)
    if height < 1 or width < 1 or height * width == 1:
        raise ValueError(
            f"height and width must be at least 1, and one of them 2, got {height} and {width}"
        )
    nodes = np.arange(height * width).reshape(height, width)
    right = np.stack([nodes[:, :-1], nodes[:, 1:]], axis=-1)
    down = np.stack([nodes[:-1], nodes[1:]], axis=-1)
    rows = [np.concatenate([right[row], down[row]]) for row in range(height - 1)]
    return np.concatenate([*rows, right[-1]])


@functools.partial(jax.jit, static_argnames="steps")
def _grid_path(costs: Array, steps: tuple[tuple[int, int], ...]) -> Array:
    """Bellman-Ford sweeps over the whole grid, then the walk back from the end.

    A sweep updates every cell at once, from its neighbours' distances in the sweep before.
    """
    width = costs.shape[1]
    entering = summable(jnp.maximum(accumulator(costs), 0), costs.size)
    distance = jnp.full(costs.shape, jnp.inf, entering.dtype).at[0, 0].set(entering[0, 0])
    changed_in = jnp.zeros(costs.shape, jnp.int32)

    def sweep(state):
        distance, changed_in, count, _ = state
        nearest = functools.reduce(_smaller, (_shift(distance, step, jnp.inf) for step in steps))
        candidate = nearest + entering
        closer = candidate < distance
        distance = jnp.where(closer, candidate, distance)
        changed_in = jnp.where(closer, count, changed_in)
        return distance, changed_in, count + 1, jnp.any(closer)

    distance, changed_in, _, _ = lax.while_loop(
        lambda state: state[-1], sweep, (distance, changed_in, jnp.int32(1), True)
    )

    # Distances alone can send the walk round a cycle of cells that cost nothing. Of two cells
    # equally far away, the one that got its distance in an earlier sweep lies before the other.
    cells = jnp.arange(costs.size, dtype=jnp.int32).reshape(costs.shape)
    best = (jnp.full_like(distance, jnp.inf), jnp.full_like(changed_in, costs.size), cells)
    for step in steps:
        other = (
            _shift(distance, step, jnp.inf),
            _shift(changed_in, step, costs.size),
            cells + (step[0] * width + step[1]),
        )
        nearer = (other[0] < best[0]) | ((other[0] == best[0]) & (other[1] < best[1]))
        best = tuple(jnp.where(nearer, new, old) for new, old in zip(other, best, strict=True))
    previous = best[2].ravel()

    def step_back(cell):
        return previous[cell], previous[cell]

    reached = distance[-1, -1] < jnp.inf
    last = jnp.where(reached, costs.size - 1, 0)
    path = jnp.zeros(costs.size, bool).at[last].set(True)
    path, arrived = _walk_back(step_back, last, 0, path, costs.size)
    return as_solution(path.reshape(costs.shape), costs, feasible=reached & arrived)


def _smaller(first: Array, second: Array) -> Array:
    """The minimum of arrays without NaN; XLA compiles it to faster code than its own."""
    return jnp.where(second < first, second, first)


def _shift(grid: Array, step: tuple[int, int], fill: float) -> Array:
    """For each cell the entry of its neighbour in the direction `step`."""
    height, width = grid.shape
    padded = jnp.pad(grid, 1, constant_values=fill)
    return lax.slice(
        padded, (1 + step[0], 1 + step[1]), (1 + step[0] + height, 1 + step[1] + width)
    )


def _node(name: str, node: int | ArrayLike, num_nodes: int) -> Array:
    """Checks a node's number as far as it is known while tracing."""
    if not is_static(node):
        traced = jnp.asarray(node)
        if traced.ndim != 0 or not jnp.issubdtype(traced.dtype, jnp.integer):
            raise TypeError(
                f"{name} must be one integer, got shape {traced.shape} and dtype {traced.dtype}"
            )
        return traced.astype(int)
    node = static_int(name, node)
    if not 0 <= node < num_nodes:
        raise ValueError(
            f"{name} must be a node between 0 and {num_nodes - 1}, the largest in edges, got {node}"
        )
    return jnp.asarray(node, int)


def _levels(pairs: np.ndarray, num_nodes: int) -> np.ndarray | None:
    """The greatest number of edges on a way to each node; None if the graph has a cycle.

    Kahn's algorithm: a node is ready when all nodes before it are done, the last of which is the
    one of the highest level. Lists, since a pass of numpy's a level is slow on a long, thin graph.
    """
    heads = heads_by_tail(pairs, num_nodes)
    waiting_for = np.bincount(pairs[:, 1], minlength=num_nodes).tolist()
    levels = [0] * num_nodes
    ready = [node for node, count in enumerate(waiting_for) if count == 0]
    for node in ready:  # which grows meanwhile
        for head in heads[node]:
            waiting_for[head] -= 1
            if waiting_for[head] == 0:
                levels[head] = levels[node] + 1
                ready.append(head)
    return np.array(levels) if len(ready) == num_nodes else None


# Where a path came from is settled by comparing sums of costs for equality. That is safe only
# between results of a loop: outside it XLA may compute a sum twice, and round it differently each
# time, for instance by fusing it with a product in the caller's code.


@functools.partial(jax.jit, static_argnames="num_nodes")
def _acyclic_path(
    costs: Array,
    tails: Array,
    heads: Array,
    order: Array,
    blocks: tuple[Array, Array, Array],
    source: Array,
    target: Array,
    num_nodes: int,
) -> Array:
    """Dynamic programming over the levels of a graph without cycles.

    In the given `order` edges stand by the level of their heads; `blocks` says where each
    level starts, how many edges it has, and counts up to the largest such number.
    """
    starts, sizes, count = blocks
    num_edges, width = costs.shape[0], count.shape[0]
    order = jnp.pad(order, (0, width))
    lengths = summable(accumulator(costs), num_edges)[order]
    distance = _starting_at(source, num_nodes, lengths)
    previous = jnp.full(num_nodes, num_edges, order.dtype)

    def relax(state, block):
        distance, previous = state
        start, size = block
        edge = lax.dynamic_slice(order, (start,), (width,))
        length = lax.dynamic_slice(lengths, (start,), (width,))
        head = heads[edge]
        candidate = _extended(distance[tails[edge]], jnp.where(count < size, length, jnp.inf))
        distance = distance.at[head].min(candidate)
        chosen = (candidate == distance[head]) & (candidate < jnp.inf)
        previous = previous.at[head].min(jnp.where(chosen, edge, num_edges))
        return (distance, previous), None

    (distance, previous), _ = lax.scan(relax, (distance, previous), (starts, sizes))
    return _edges_back(costs, previous, tails, distance, source, target)


@functools.partial(jax.jit, static_argnames="num_nodes")
def _cyclic_path(
    costs: Array, tails: Array, heads: Array, source: Array, target: Array, num_nodes: int
) -> Array:
    """Bellman-Ford sweeps over all edges, then the walk back from the target.

    Twice as many edges as costs stand for edges that may be walked both ways.
    """
    lengths = summable(jnp.maximum(accumulator(costs), 0), costs.shape[0])
    lengths = jnp.tile(lengths, tails.shape[0] // costs.shape[0])
    distance = _starting_at(source, num_nodes, lengths)
    changed_in = jnp.zeros(num_nodes, jnp.int32)

    def sweep(state):
        distance, changed_in, _, count, _ = state
        candidate = _extended(distance[tails], lengths)
        shortest = jax.ops.segment_min(candidate, heads, num_nodes)
        closer = shortest < distance
        distance = jnp.where(closer, shortest, distance)
        changed_in = jnp.where(closer, count, changed_in)
        return distance, changed_in, candidate, count + 1, jnp.any(closer)

    distance, changed_in, candidate, _, _ = lax.while_loop(
        lambda state: state[-1], sweep, (distance, changed_in, lengths, jnp.int32(1), True)
    )

    # As on the grid: among nodes equally far away only an earlier one may come before.
    before = (distance[tails] < distance[heads]) | (
        (distance[tails] == distance[heads]) & (changed_in[tails] < changed_in[heads])
    )
    tight = before & (candidate == distance[heads])
    sweeps = jnp.where(tight, changed_in[tails], num_nodes)
    tight &= sweeps == jax.ops.segment_min(sweeps, heads, num_nodes)[heads]
    edge = jnp.arange(tails.shape[0])
    previous = jax.ops.segment_min(jnp.where(tight, edge, tails.shape[0]), heads, num_nodes)
    return _edges_back(costs, previous, tails, distance, source, target)


def _starting_at(source: Array, num_nodes: int, lengths: Array) -> Array:
    """Distances before the first step: 0 at the source, infinite elsewhere."""
    return jnp.where(jnp.arange(num_nodes) == source, 0, jnp.inf).astype(lengths.dtype)


def _extended(distance: Array, length: Array) -> Array:
    """A distance and one more edge; infinite where it cannot be walked or is not known."""
    total = distance + length
    return jnp.where(jnp.isnan(total), jnp.inf, total)


def _edges_back(
    costs: Array, previous: Array, tails: Array, distance: Array, source: Array, target: Array
) -> Array:
    """The solution of a graph, given the edge by which each node is reached."""
    num_nodes, num_edges = distance.shape[0], costs.shape[0]
    reached = (target >= 0) & (target < num_nodes) & (distance[target] < jnp.inf)

    def step_back(node):
        edge = previous[node]
        return tails[edge], edge % num_edges

    start = jnp.where(reached, target, source)
    path = jnp.zeros(num_edges, bool)
    path, arrived = _walk_back(step_back, start, source, path, num_nodes)
    return as_solution(path, costs, feasible=reached & arrived)


def _walk_back(
    step_back: Callable[[Array], tuple[Array, Array]],
    start: Array,
    goal: Array | int,
    path: Array,
    limit: int,
) -> tuple[Array, Array]:
    """Marks what a walk passes, and says whether it reached its goal within `limit` steps."""

    def walk(state):
        place, path, count = state
        place, mark = step_back(place)
        return place, path.at[mark].set(True), count + 1

    place, path, _ = lax.while_loop(
        lambda state: (state[0] != goal) & (state[2] < limit), walk, (start, path, jnp.int32(0))
    )
    return path, place == goal
