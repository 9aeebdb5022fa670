"""Plain score-function estimators to hold the library against, and to break on purpose.

`make_reference_fun` is the whole method in thirty lines, without batching, casting or checks; its
``mutation`` argument builds the wrong estimators that the statistical tests must catch.
`differentiate_samples` is the same mathematics without automatic differentiation: each derivative
of the expectation is the mean of the function times an explicit ratio, in float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MUTATIONS = {
    "sign_flipped": "derivatives have the wrong sign",
    "gradient_zeroed": "derivatives are zero",
    "five_percent_off": "derivatives are too large by 5 %",
    "own_sample_in_baseline": "the baseline of a sample is the mean of all, itself included",
    "sigma_term_dropped": "the log-density lacks -log(sigma) for each coordinate",
    "bfloat16_noise": "noise is drawn, and its density evaluated, in bfloat16",
    "noise_recomputed": "the noise is recovered from the sample, as (y - x) / sigma",
    "noise_shared_by_leaves": "all leaves of one shape get the same noise",
    "fun_differentiated": "the derivative of the function itself is added",
    "baseline_detached": "the baseline is subtracted with its parameters, added without",
    "arguments_detached": "derivatives in further arguments are lost",
}


def make_reference_fun(
    fun: Callable[..., Any],
    num_samples: int,
    sigma: Any,
    noise: Any,
    use_baseline: bool = True,
    *,
    mutation: str | None = None,
) -> Callable[..., Any]:
    """The estimate of ``E fun(x + sigma * eps)``, differentiable through the weights of samples.

    With y held fixed, ``l = sum log p((y - x) / sigma) - log(sigma)`` is the log-density of the
    sample y; the weight ``exp(l - stop_gradient(l))`` is one, and its derivatives are those of the
    density over the density. The baseline of a sample is the mean of the other samples and of the
    unperturbed point.

    Args:
        fun: From a pytree of floating arrays (and further arguments) to a pytree of arrays.
        num_samples: N.
        sigma: A number, or a pytree like x.
        noise: An object with ``sample`` and ``log_prob``.
        use_baseline: Whether to subtract the baseline.
        mutation: One of `MUTATIONS`, or None for the right estimator.

    Returns:
        The function ``g(key, x, *args)``.
    """
    if mutation is not None and mutation not in MUTATIONS:
        raise ValueError(f"mutation must be one of {sorted(MUTATIONS)}, got {mutation!r}")
    dtype = jnp.bfloat16 if mutation == "bfloat16_noise" else jnp.float32
    hold = jax.lax.stop_gradient
    draw = noise.sample
    if mutation == "bfloat16_noise":
        # From bits as few as the type has: 128 different numbers.
        draw = getattr(jax.random, type(noise).__name__.lower())

    def estimate(key: jax.Array, x: Any, *args: Any) -> Any:
        one_scale = jax.tree.structure(sigma).num_nodes == 1
        scales = jax.tree.map(lambda leaf: sigma, x) if one_scale else sigma
        leaves, structure = jax.tree.flatten(x)
        keys = jax.random.split(key, len(leaves))
        if mutation == "noise_shared_by_leaves":
            keys = keys[jnp.zeros(len(leaves), jnp.int32)]

        samples, log_density = [], jnp.zeros(num_samples)
        for leaf_key, leaf, scale in zip(keys, leaves, jax.tree.leaves(scales), strict=True):
            scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), leaf.shape)
            z = draw(leaf_key, (num_samples, *leaf.shape), dtype)
            for_sample = leaf if mutation == "fun_differentiated" else hold(leaf)
            shift = hold(scale)[None] * z.astype(jnp.float32)
            y = for_sample[None] + shift.astype(leaf.dtype)
            # y - x, written so that its value is the shift without the rounding of y.
            difference = shift + (hold(leaf) - leaf)[None]
            if mutation == "noise_recomputed":
                difference = hold(y) - leaf[None]
            terms = noise.log_prob((difference / scale[None]).astype(dtype)).astype(jnp.float32)
            if mutation != "sigma_term_dropped":
                terms = terms - jnp.log(scale)[None]
            log_density = log_density + terms.reshape(num_samples, -1).sum(axis=1)
            samples.append(y)

        weights = jnp.exp(log_density - hold(log_density))
        points = jax.tree.unflatten(structure, samples)
        values = jax.vmap(lambda point: fun(point, *args))(points)
        at_x = fun(hold(x), *args)

        def combine(f: jax.Array, f_at_x: jax.Array) -> jax.Array:
            f, f_at_x = f.astype(jnp.float32), f_at_x.astype(jnp.float32)[None]
            if mutation == "arguments_detached":
                f, f_at_x = hold(f), hold(f_at_x)
            total = f.sum(axis=0)[None]
            if not use_baseline:
                baseline = jnp.zeros_like(f)
            elif mutation == "own_sample_in_baseline":
                baseline = jnp.broadcast_to(total / num_samples, f.shape)
            else:
                baseline = (total - f + f_at_x) / num_samples
            added = hold(baseline) if mutation == "baseline_detached" else baseline
            w = weights.reshape((num_samples,) + (1,) * (f.ndim - 1))
            result = jnp.mean(w * (f - baseline) + added, axis=0)
            factor = {"sign_flipped": -1.0, "gradient_zeroed": 0.0, "five_percent_off": 1.05}
            if mutation in factor:
                result = hold(result) + factor[mutation] * (result - hold(result))
            return result

        return jax.tree.map(combine, values, at_x)

    return estimate


def log_prob_derivatives(name: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first three derivatives of the log-density of Normal or Gumbel noise."""
    if name == "Normal":
        return -z, -np.ones_like(z), np.zeros_like(z)
    if name == "Gumbel":
        t = np.exp(-z)
        return t - 1.0, -t, t
    raise ValueError(f"no formula for {name} noise")


def differentiate_samples(
    values: Any, z: Any, sigma: float, noise_name: str, baseline: Any = 0.0
) -> dict[str, np.ndarray]:
    """Value and derivatives of the expectation from N samples, by explicit formulas.

    With ``p`` the density of ``y = x + sigma z`` at fixed y, each derivative of the expectation is
    the mean of ``(f - baseline)`` times that derivative of p over p.

    Args:
        values: The function at the samples, (N, *out).
        z: Their noise, (N, D).
        sigma: The scale.
        noise_name: ``"Normal"`` or ``"Gumbel"``.
        baseline: What is subtracted from the values in derivatives; broadcasts into them.

    Returns:
        Value, gradient, Hessian and third derivative in x (trailing axes), and dsigma, mixed and
        dsigma2, the derivatives in sigma.
    """
    f, z = np.asarray(values).astype(np.float64), np.asarray(z).astype(np.float64)
    n, d = z.shape
    p1, p2, p3 = log_prob_derivatives(noise_name, z)
    # Derivatives of log p((y - x) / sigma) - D log(sigma): a, b, c in x_i; t, tt in sigma; m mixed.
    a, b, c = -p1 / sigma, p2 / sigma**2, -p3 / sigma**3
    t = np.sum(-p1 * z - 1.0, axis=1) / sigma
    tt = np.sum(p2 * z**2 + 2.0 * p1 * z + 1.0, axis=1) / sigma**2
    m = (p2 * z + p1) / sigma**2
    i = np.arange(d)

    hessian = np.einsum("ni,nj->nij", a, a)
    hessian[:, i, i] += b
    third = np.einsum("ni,nj,nk->nijk", a, a, a)
    third[:, i, i, :] += b[:, :, None] * a[:, None, :]
    third[:, i, :, i] += np.swapaxes(b[:, :, None] * a[:, None, :], 0, 1)
    third[:, :, i, i] += a[:, :, None] * b[:, None, :]
    third[:, i, i, i] += c
    ratios = {
        "gradient": a,
        "hessian": hessian,
        "third": third,
        "dsigma": t,
        "mixed": a * t[:, None] + m,
        "dsigma2": t**2 + tt,
    }
    centred = f - baseline
    derivatives = {
        name: np.tensordot(centred, ratio, axes=(0, 0)) / n for name, ratio in ratios.items()
    }
    return {"value": f.mean(axis=0), **derivatives}
