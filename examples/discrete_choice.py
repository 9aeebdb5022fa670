"""A choice among three options, optimised by gradient descent through an argmax.

The objective is piecewise linear in the weights: it scores three options, takes the best and
returns minus its score. Perturbation makes it smooth; optax's Adam does the rest.

    python examples/discrete_choice.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.integrate

import perturbax as px


class Result(NamedTuple):
    """The objective and the weights, step by step."""

    losses: np.ndarray  # (num_steps,), the estimate that each step saw
    exact: np.ndarray  # (num_steps,), its expectation
    weights: np.ndarray  # (num_steps + 1, 3), before the first step and after each


def discrete_objective(weights):
    # The element-wise product: `weights @ values` would be a single number, with nothing to choose.
    scores = weights * jnp.array([1.0, 2.0, 3.0])
    best_choice = jnp.argmax(scores)  # not differentiable
    return -scores[best_choice]  # negative, because the score should grow


def exact_objective(weights, sigma):
    """E[discrete_objective(weights + sigma eps)] with Gumbel noise, by quadrature.

    The largest score is at most t with probability prod_i exp(-exp(-(t / i - w_i) / sigma)), and
    its expectation is the end of the grid minus the integral of that probability.
    """
    values = np.array([1.0, 2.0, 3.0])
    t = np.linspace(-10.0, 30.0, 20_001)
    below = np.exp(-np.exp(-(t[:, None] / values - np.asarray(weights)) / sigma).sum(axis=1))
    return scipy.integrate.trapezoid(below, t) - t[-1]


def main(num_steps=100, num_samples=2000, sigma=0.2, learning_rate=0.01):
    objective = px.make_perturbed_fun(discrete_objective, num_samples, sigma)
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def update(key, weights, state):
        loss, gradient = jax.value_and_grad(objective, argnums=1)(key, weights)
        updates, state = optimizer.update(gradient, state, weights)
        return loss, optax.apply_updates(weights, updates), state

    weights = jnp.array([0.1, 0.1, 0.1])
    state = optimizer.init(weights)
    losses, path = [], [weights]
    for step in range(num_steps):
        loss, weights, state = update(jax.random.key(step), weights, state)
        losses.append(loss)
        path.append(weights)

    path = np.stack(path)
    exact = np.array([exact_objective(w, sigma) for w in path[:-1]])
    result = Result(np.stack(losses), exact, path)
    show(result)
    return result


def show(result):
    last = len(result.losses) - 1
    print("  step   objective     exact     weights")
    for step in [*range(0, last, 20), last]:
        weights = " ".join(f"{w:6.3f}" for w in result.weights[step])
        print(f"  {step:4d}  {result.losses[step]:10.3f}  {result.exact[step]:8.3f}    {weights}")


if __name__ == "__main__":
    main()
