"""Solvers to put inside perturbed optimizers: plain JAX functions that jit and vmap.

Each takes scores (to maximise) or costs (to minimise) and returns a hard solution, mostly as a
0/1 array of the same shape, so that `sum(scores * solution)` is the objective. Their own
derivative is zero; perturbation is what gives them one.
"""

from ._assignment import assignment as assignment
from ._knapsack import knapsack as knapsack
from ._ordering import ranks as ranks, sorting_permutation as sorting_permutation
from ._paths import (
    graph_shortest_path as graph_shortest_path,
    grid_shortest_path as grid_shortest_path,
    lattice_edges as lattice_edges,
)
from ._selection import (
    median as median,
    one_hot_argmax as one_hot_argmax,
    quantile as quantile,
    top_k_mask as top_k_mask,
)
from ._trees import minimum_spanning_tree as minimum_spanning_tree
