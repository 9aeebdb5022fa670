"""The gradient of a sum of ReLUs from values alone, and the exact gradient.

With F(x) = E[f(x + sigma eps)] and f the sum of max(x_i, 0), dF/dx_i is the probability that
x_i + sigma eps_i is positive: 1 - exp(-exp(x_i / sigma)) for Gumbel noise, Phi(x_i / sigma) for
Normal noise. The estimate is repeated over many keys; their spread gives its standard error.

    python examples/relu_gradient.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import perturbax as px


class Estimates(NamedTuple):
    """Estimates of one quantity, one row a key, and the exact quantity."""

    rows: np.ndarray
    exact: np.ndarray

    @property
    def mean(self):
        """The mean over the keys."""
        return self.rows.mean(axis=0)

    @property
    def deviation(self):
        """The standard error of a single estimate."""
        return self.rows.std(axis=0, ddof=1)

    @property
    def standard_error(self):
        """The standard error of the mean over all keys."""
        return self.deviation / np.sqrt(len(self.rows))


class Result(NamedTuple):
    """Gradients at the three points, and values and gradients along the kink."""

    sigma: float
    num_samples: int
    sweep_samples: int
    points: np.ndarray
    gumbel: Estimates  # of the gradient at `points`
    normal: Estimates
    sweep: np.ndarray  # places along the kink of a single ReLU
    sweep_value: Estimates  # of F there, Gumbel noise
    sweep_gradient: Estimates


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def exact_value(x, sigma):
    """E[max(x + sigma eps, 0)] for Gumbel noise."""
    z = x / sigma
    return sigma * (scipy.special.exp1(np.exp(z)) + z + np.euler_gamma)


def exact_gradient_gumbel(x, sigma):
    return -np.expm1(-np.exp(x / sigma))


def exact_gradient_normal(x, sigma):
    return scipy.special.ndtr(x / sigma)


def main(num_samples=1000, sweep_samples=200, sigma=0.1, num_keys=100, sweep_size=25, seed=0):
    points = np.array([-1.0, 0.5, 2.0], np.float32)
    sweep = np.linspace(-3 * sigma, 3 * sigma, sweep_size, dtype=np.float32)
    smooth_gumbel = px.make_perturbed_fun(relu_sum, num_samples, sigma, px.Gumbel())
    smooth_normal = px.make_perturbed_fun(relu_sum, num_samples, sigma, px.Normal())
    smooth_one = px.make_perturbed_fun(relu_sum, sweep_samples, sigma, px.Gumbel())

    def estimate(key):
        key_gumbel, key_normal, key_sweep = jax.random.split(key, 3)
        gumbel = jax.grad(smooth_gumbel, argnums=1)(key_gumbel, points)
        normal = jax.grad(smooth_normal, argnums=1)(key_normal, points)
        # A single ReLU at every place of the sweep, from few samples.
        value, gradient = jax.vmap(jax.value_and_grad(smooth_one, argnums=1))(
            jax.random.split(key_sweep, sweep_size), sweep
        )
        return gumbel, normal, value, gradient

    keys = jax.random.split(jax.random.key(seed), num_keys)
    gumbel, normal, value, gradient = map(np.asarray, jax.lax.map(estimate, keys))
    result = Result(
        sigma=sigma,
        num_samples=num_samples,
        sweep_samples=sweep_samples,
        points=points,
        gumbel=Estimates(gumbel, exact_gradient_gumbel(points, sigma)),
        normal=Estimates(normal, exact_gradient_normal(points, sigma)),
        sweep=sweep,
        sweep_value=Estimates(value, exact_value(sweep, sigma)),
        sweep_gradient=Estimates(gradient, exact_gradient_gumbel(sweep, sigma)),
    )
    show(result)
    return result


def show(result):
    num_keys = len(result.gumbel.rows)
    print(f"  noise   at x     exact     one estimate ± its s.e.    mean of {num_keys} ± its s.e.")
    for name, estimates in (("Gumbel", result.gumbel), ("Normal", result.normal)):
        for i, x in enumerate(result.points):
            print(
                f"  {name}  {x:5.1f}  {estimates.exact[i]:9.6f}"
                f"    {estimates.rows[0, i]:z9.6f} ± {estimates.deviation[i]:.6f}"
                f"    {estimates.mean[i]:z10.7f} ± {estimates.standard_error[i]:.7f}"
            )
    print(f"  one estimate = {result.num_samples:,} samples, sigma = {result.sigma}")


if __name__ == "__main__":
    main()
