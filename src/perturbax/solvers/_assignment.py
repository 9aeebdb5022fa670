"""Linear assignment: a matching of rows and columns of greatest total score."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._scores import accumulator, as_solution, constant_scores


def assignment(scores: ArrayLike) -> Array:
    r"""The matching of rows and columns with the greatest total score.

    .. math:: y^*(\theta) = \arg\max \{\langle \theta, y \rangle : y \in \{0, 1\}^{n \times m},
        \text{ at most one 1 a row and a column, } \min(n, m) \text{ in all}\}

    Maximises, by the Hungarian algorithm of `optax.assignment`; for costs pass `-costs`.
    Among matchings of equal score the choice is optax's: the same on every run, but not
    otherwise specified. A score of -inf forbids a pair: it is matched only if every matching
    contains a forbidden pair, and then as few of them as possible. Infinite scores stand for
    numbers that outweigh all finite ones; they cost the finite ones about log10(n) digits.

    Args:
      scores: Shape (n, m); a square matrix gives a permutation matrix.

    Returns:
      Zeros and ones of shape (n, m), in the dtype of `scores` (the default float for
      integers). NaN if a score is NaN. Its derivative is zero.

    Raises:
      ImportError: If optax is not installed.
      TypeError: If `scores` does not hold real numbers.
      ValueError: If `scores` is empty or no matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.assignment(jnp.array([[1.0, 5.0], [2.0, 5.5]]))
      Array([[0., 1.],
             [1., 0.]], dtype=float32)

    References:
      Harold W. Kuhn, "The Hungarian Method for the Assignment Problem", 1955,
      doi:10.1002/nav.3800020109.
    """
    scores = constant_scores("scores", scores, ndim=2)
    return _assign(scores)


@jax.jit
def _assign(scores: Array) -> Array:
    try:
        from optax.assignment import hungarian_algorithm
    except ImportError as error:
        raise ImportError(
            "solvers.assignment needs optax 0.2.4 or later for its Hungarian algorithm: "
            "pip install 'optax>=0.2.4'"
        ) from error
    # optax keeps its potentials in the default float whatever the dtype of the costs.
    costs = -_finite(accumulator(scores)).astype(jnp.result_type(float))
    rows, columns = hungarian_algorithm(costs)
    matched = jnp.zeros(scores.shape, bool).at[rows, columns].set(True)
    return as_solution(matched, scores)


def _finite(scores: Array) -> Array:
    """Replaces infinities by finite scores that outweigh every matching of the others.

    The Hungarian algorithm never ends on NaN, which infinite minus infinite would give.
    """
    finite = jnp.isfinite(scores)
    high = jnp.max(scores, where=finite, initial=-jnp.inf)
    low = jnp.min(scores, where=finite, initial=jnp.inf)
    high, low = jnp.where(high < low, 0, high), jnp.where(high < low, 0, low)
    spread = jnp.where(high > low, high - low, jnp.maximum(jnp.abs(high), 1))
    step = spread * (min(scores.shape) + 1)
    scores = jnp.where(scores == jnp.inf, high + step, scores)
    scores = jnp.where(scores == -jnp.inf, low - step, scores)
    return jnp.where(jnp.isnan(scores), 0, scores)
