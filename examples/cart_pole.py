"""A pole balanced on a cart: the policy is a hard choice, the return a whole number.

A cart on a track is pushed to the left or to the right, fifty times a second, so that the pole on
it does not fall. The policy is linear: push to the right where the weighted sum of position, speed,
angle and angular speed is positive. The return is the number of pushes until the pole leans by more
than 12 degrees or the cart is farther than 2.4 m from the middle, at most 500. As a function of the
four weights it is a step function; `px.minimize` ascends it from values alone.

The equations are those of Barto, Sutton and Anderson, Neuronlike adaptive elements that can solve
difficult learning control problems, 1983, without friction; limits and starts are those of the
customary benchmark CartPole-v1.

    python examples/cart_pole.py
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRAVITY, CART, POLE, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
FORCE, SECONDS, LIMIT = 10.0, 0.02, 500  # N, of a step, steps
FARTHEST, STEEPEST = 2.4, np.deg2rad(12)


class Result(NamedTuple):
    """What was found, and how it does on new starts."""

    found: px.MinimizeResult
    returns: np.ndarray  # (starts,), of the weights found
    angles: list[np.ndarray]  # radians, until the end; untrained and trained, from one start


def accelerations(state, force):
    """Of cart and pole, by the equations of motion."""
    _, _, angle, angular_speed = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pushed = (force + POLE * HALF_LENGTH * angular_speed**2 * sine) / (CART + POLE)
    inertia = HALF_LENGTH * (4 / 3 - POLE * cosine**2 / (CART + POLE))
    angular = (GRAVITY * sine - cosine * pushed) / inertia
    return pushed - POLE * HALF_LENGTH * angular * cosine / (CART + POLE), angular


def balance(weights, start):
    """Whether the pole is still up after each of 500 steps, and its angle."""

    def step(carry, _):
        state, up = carry
        force = jnp.where(weights @ state > 0, FORCE, -FORCE)
        linear, angular = accelerations(state, force)
        state = state + SECONDS * jnp.stack([state[1], linear, state[3], angular])
        up = up & (jnp.abs(state[0]) < FARTHEST) & (jnp.abs(state[2]) < STEEPEST)
        return (state, up), (up, state[2])

    return jax.lax.scan(step, (start, True), length=LIMIT)[1]


def lost(key, weights, num_starts=8):
    """The mean number of steps short of 500, from random starts."""
    starts = jax.random.uniform(key, (num_starts, 4), minval=-0.05, maxval=0.05)
    up, _ = jax.vmap(balance, (None, 0))(weights, starts)
    return LIMIT - jnp.mean(jnp.sum(up, axis=1))


def main(path="build/cart_pole.png", max_evaluations=500, num_starts=100):
    """Finds a policy, prints how long it balances, and draws it; returns the Result."""
    untrained = jnp.zeros(4)
    # `lost` takes a key: the starts, the same for all samples of a step.
    found = px.minimize(
        lost, untrained, jax.random.key(0), takes_key=True, max_evaluations=max_evaluations
    )
    starts = jax.random.uniform(jax.random.key(1), (num_starts, 4), minval=-0.05, maxval=0.05)
    watch = jax.jit(jax.vmap(balance, (None, 0)))
    angles = []
    for weights in (untrained, found.x):
        up, angle = watch(weights, starts)
        returns = np.sum(np.asarray(up), axis=1)
        angles.append(np.asarray(angle)[0, : returns[0] + 1])
    result = Result(found, returns, angles)
    print(f"  {int(found.num_evaluations)} evaluations of {lost.__defaults__[0]} runs each")
    direction = np.asarray(found.x / jnp.linalg.norm(found.x))  # the length decides nothing
    print(f"  weights, to length 1: {np.array2string(direction, precision=2)}")
    print(f"  {num_starts} new starts: balanced for {returns.mean():.1f} of {LIMIT} steps")
    draw(Path(path), result)
    print(f"Figure: {path}")
    return result


def draw(path, result):
    """The return on the way, and the pole's angle before and after."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
    history = result.found.history
    for values, name, colour in (
        (history.smoothed_value, "mean under noise", "#1f77b4"),
        (history.best_value, "best of these means", "#7f7f7f"),
    ):
        left.plot(history.evaluations, LIMIT - np.asarray(values), color=colour, label=name)
    left.set(xlabel="evaluations", ylabel="steps balanced", ylim=(0, LIMIT * 1.03))
    left.legend(frameon=False, loc="lower right")
    for angle, name, colour in zip(
        result.angles, ("untrained", "trained"), ("#7f7f7f", "#1f77b4"), strict=True
    ):
        right.plot(SECONDS * np.arange(len(angle)), np.rad2deg(angle), color=colour, label=name)
    right.axhspan(-12, 12, color="#1f77b4", alpha=0.06, lw=0)
    right.set(xlabel="seconds", ylabel="angle of the pole, degrees (shaded: up)")
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
