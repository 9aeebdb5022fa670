"""The minimum spanning tree of a graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ._scores import as_solution, constant_scores, edge_list, heads_by_tail, solution_dtype


def minimum_spanning_tree(costs: ArrayLike, edges: ArrayLike) -> Array:
    r"""The edges of the cheapest tree that connects all nodes of an undirected graph.

    .. math:: y^*(\theta) = \arg\min \{\langle \theta, y \rangle :
        y \text{ marks the edges of a spanning tree}\}

    Minimises, exactly (integers from 2**24 on are rounded in single precision), for costs of
    either sign; for the maximum spanning tree pass `-scores`. Among edges of equal cost those
    that stand first in `edges` are preferred, as in Kruskal's algorithm with a stable sort. A
    cost of inf removes an edge.

    Args:
      costs: Shape (num_edges,).
      edges: Shape (num_edges, 2), integers: the two ends of every edge, nodes numbered from
        0. A numpy array, since it must be known while tracing; for all pairs of n nodes,
        `np.stack(np.triu_indices(n, 1), axis=1)`.

    Returns:
      Ones on the tree's edges and zeros elsewhere, of shape (num_edges,), in the dtype of
      `costs` (the default float for integers). NaN if a cost is NaN, or if removed edges
      leave no tree. Its derivative is zero.

    Raises:
      TypeError: If an argument has the wrong type, or `edges` is traced.
      ValueError: If shapes disagree, the graph is not connected, or a pair of
        nodes occurs twice.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import perturbax as px
      >>> edges = np.array([[0, 1], [1, 2], [0, 2]])
      >>> px.solvers.minimum_spanning_tree(jnp.array([1.0, 5.0, 2.0]), edges)
      Array([1., 0., 1.], dtype=float32)

    References:
      Robert C. Prim, "Shortest Connection Networks and Some Generalizations", 1957,
      doi:10.1002/j.1538-7305.1957.tb01515.x (for dense graphs). Jaroslav Nesetril, Eva Milkova,
      Helena Nesetrilova, "Otakar Boruvka on Minimum Spanning Tree Problem", 2001,
      doi:10.1016/S0012-365X(00)00224-7 (for sparse ones). Lawrence Stewart, Francis Bach,
      Felipe Llinares-Lopez, Quentin Berthet, "Differentiable Clustering with Perturbed
      Spanning Forests", 2023, arXiv:2305.16358.
    """
    costs = constant_scores("costs", costs, ndim=1)
    pairs = edge_list(costs, edges)
    num_nodes = int(pairs.max()) + 1
    apart = np.flatnonzero(~_connected(pairs, num_nodes))
    if apart.size:
        raise ValueError(
            f"edges must connect all nodes from 0 to {num_nodes - 1}, "
            f"but node {apart[0]} cannot be reached from node 0"
        )
    if len(np.unique(np.sort(pairs, axis=1), axis=0)) < len(pairs):
        raise ValueError("edges must hold every pair of nodes at most once, in one direction")
    # About where the two algorithms take equally long on a CPU. It also keeps the table of all
    # pairs of nodes in proportion to the edges.
    if num_nodes**2 > 16 * len(pairs):
        tails, heads = np.concatenate([pairs, pairs[:, ::-1]]).T
        return _merge_trees(costs, tails, heads, num_nodes)
    between = np.full((num_nodes, num_nodes), len(pairs))
    for first, second in (pairs.T, pairs.T[::-1]):
        between[first, second] = np.arange(len(pairs))
    return _grow_tree(costs, between)


def _connected(pairs: np.ndarray, num_nodes: int) -> np.ndarray:
    """Which nodes a walk along the edges from node 0 reaches."""
    heads = heads_by_tail(np.concatenate([pairs, pairs[:, ::-1]]), num_nodes)
    reached = np.arange(num_nodes) == 0
    stack = [0]
    while stack:
        for node in heads[stack.pop()]:
            if not reached[node]:
                reached[node] = True
                stack.append(node)
    return reached


@jax.jit
def _grow_tree(costs: Array, between: Array) -> Array:
    """Prim's algorithm with the cheapest link from the tree to every node outside.

    For dense graphs, since every step is over all nodes.
    `between[i, j]` is the edge between two nodes, or the number of edges where there is none.
    """
    num_nodes, none = between.shape[0], costs.shape[0]
    lengths = jnp.append(costs.astype(solution_dtype(costs)), jnp.inf)
    nodes = jnp.arange(num_nodes)

    def grow(_, state):
        link, length, inside, tree, complete = state
        outside = jnp.where(inside, jnp.inf, length)
        shortest = jnp.min(outside)
        edge = jnp.min(jnp.where((outside == shortest) & ~inside, link, none))
        node = jnp.argmax((link == edge) & ~inside)
        complete &= shortest < jnp.inf
        other = between[node]
        new = lengths[other]
        closer = (new < length) | ((new == length) & (other < link))
        link, length = jnp.where(closer, other, link), jnp.where(closer, new, length)
        return link, length, inside | (nodes == node), tree.at[edge].set(True), complete

    tree = jnp.zeros(costs.shape, bool)
    state = (between[0], lengths[between[0]], nodes == 0, tree, jnp.bool_(True))
    *_, tree, complete = lax.fori_loop(0, num_nodes - 1, grow, state)
    return as_solution(tree, costs, feasible=complete)


@functools.partial(jax.jit, static_argnames="num_nodes")
def _merge_trees(costs: Array, tails: Array, heads: Array, num_nodes: int) -> Array:
    """Boruvka's algorithm: every tree of a forest takes the cheapest edge that leaves it.

    For sparse graphs, since every step is over all edges, and there are as many steps as halvings
    of the number of nodes. Each edge stands twice, its reverse in the second half.
    """
    num_edges = costs.shape[0]
    # NaN compares with nothing, and a tree that finds no edge would keep the loop from ending.
    lengths = jnp.where(jnp.isnan(costs), jnp.inf, costs.astype(solution_dtype(costs)))
    both, edge = jnp.tile(lengths, 2), jnp.tile(jnp.arange(num_edges), 2)
    nodes = jnp.arange(num_nodes)

    def merge(state):
        root, tree, _ = state
        here, there = root[tails], root[heads]
        leaving = here != there
        shortest = jax.ops.segment_min(jnp.where(leaving, both, jnp.inf), here, num_nodes)
        # Of equally short ones the first: in such an order of all edges the only cycles of trees
        # that follow their links are two trees with the same one.
        taken = leaving & (both == shortest[here])
        link = jax.ops.segment_min(jnp.where(taken, edge, num_edges), here, num_nodes)
        parent = jnp.where(link < num_edges, here[link] + there[link] - nodes, nodes)
        parent = jnp.where((parent[parent] == nodes) & (nodes < parent), nodes, parent)
        parent = lax.while_loop(
            lambda parent: jnp.any(parent[parent] != parent), lambda parent: parent[parent], parent
        )
        root = parent[root]
        return root, tree.at[link].set(True, mode="drop"), jnp.any(root != root[0])

    state = (nodes, jnp.zeros(num_edges, bool), jnp.bool_(True))
    _, tree, _ = lax.while_loop(lambda state: state[-1], merge, state)
    return as_solution(tree, costs, feasible=~jnp.any(tree & (lengths == jnp.inf)))
