"""Dots followed from frame to frame by scipy's assignment, tuned on the links that it gets wrong.

Twelve dots move about and bounce off the walls. Each frame gives their positions and their colours
with errors, in no order. A tracker predicts where each dot will be, and `linear_sum_assignment` of
scipy matches predictions with detections. What one frame gets wrong the next ones inherit: the
assignment is in a loop. The cost of a match weighs the distance and three channels of colour, of
which one is steady, one flickers and one says nothing. Five numbers are tuned: the logarithms of
the four weights, and how much of each new velocity is believed.

What is minimised is the share of links between frames that join different dots. It is counted by
numpy and scipy, and is a step function. The gradient is estimated from 40 evaluations a step.

    python examples/assignment.py
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOTS, FRAMES = 12, 25
START = {"log_weights": np.zeros(4, np.float32), "belief": np.float32(0.0)}
SIGMA = 0.4


class Scenes(NamedTuple):
    """Detections, shuffled in each frame, and which dot each of them is."""

    positions: np.ndarray  # (scenes, FRAMES, DOTS, 2)
    colours: np.ndarray  # (scenes, FRAMES, DOTS, 3)
    dots: np.ndarray  # (scenes, FRAMES, DOTS)


class Result(NamedTuple):
    """What was found, and on the way."""

    tuned: dict
    curve: np.ndarray  # (num_steps,), the share of wrong links in training, mean under noise
    untuned_error: float  # on new scenes
    tuned_error: float


def make_scenes(count, seed):
    """Scenes of dots that bounce in a square of side 1."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 1, (count, 1, DOTS, 2))
    velocity = rng.normal(0, 0.06, (count, 1, DOTS, 2))
    turned = np.cumsum(rng.normal(0, 0.01, (count, FRAMES, DOTS, 2)), axis=1)
    path = start + np.cumsum(velocity + turned, axis=1)
    positions = 1 - np.abs(1 - np.mod(path, 2))  # reflected at the walls
    positions = positions + rng.normal(0, 0.005, positions.shape)
    flicker = np.array([0.15, 0.6, 10.0])
    colours = rng.uniform(0, 1, (count, 1, DOTS, 3))
    colours = colours + flicker * rng.normal(0, 1, (count, FRAMES, DOTS, 3))
    dots = rng.permuted(np.broadcast_to(np.arange(DOTS), (count, FRAMES, DOTS)), axis=-1)
    order = dots[..., None]
    return Scenes(
        np.take_along_axis(positions, order, 2), np.take_along_axis(colours, order, 2), dots
    )


def follow(settings, scenes):
    """The detection that each track has in each frame, (scenes, FRAMES, DOTS)."""
    weights = np.exp(np.asarray(settings["log_weights"], float))
    belief = 1 / (1 + np.exp(-float(settings["belief"])))
    scene = np.arange(len(scenes.dots))[:, None]
    place, colour = scenes.positions[:, 0], scenes.colours[:, 0]
    velocity = np.zeros_like(place)
    tracks = [np.broadcast_to(np.arange(DOTS), place.shape[:2])]
    for frame in range(1, FRAMES):
        positions, colours = scenes.positions[:, frame], scenes.colours[:, frame]
        away = positions[:, None] - (place + velocity)[:, :, None]
        differences = (colours[:, None] - colour[:, :, None]) ** 2
        # A distance of a tenth costs as much as a whole step of colour.
        costs = 100 * weights[0] * np.sum(away**2, axis=-1) + differences @ weights[1:]
        chosen = np.array([linear_sum_assignment(c)[1] for c in costs])
        now = positions[scene, chosen]
        velocity = (1 - belief) * velocity + belief * (now - place)
        place, colour = now, 0.8 * colour + 0.2 * colours[scene, chosen]
        tracks.append(chosen)
    return np.stack(tracks, axis=1)


def wrong_links(settings, scenes):
    """Which tracks pass from one dot to another, (scenes, FRAMES - 1, DOTS)."""
    followed = np.take_along_axis(scenes.dots, follow(settings, scenes), 2)
    return followed[:, 1:] != followed[:, :-1]


def tune(error, num_steps, num_samples, learning_rate=0.25):
    """Descends the mean of the error under noise; the settings in the end, and that mean."""
    smooth = px.make_perturbed_fun(error, num_samples, SIGMA, px.Normal())
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    @jax.jit
    def update(key, settings, state):
        value, gradient = jax.value_and_grad(smooth, argnums=1)(key, settings)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(settings, updates), state, value

    settings = jax.tree.map(jnp.asarray, START)
    state, curve = optimizer.init(settings), []
    for key in jax.random.split(jax.random.key(0), num_steps):
        settings, state, value = update(key, settings, state)
        curve.append(float(value))
    return jax.tree.map(np.asarray, settings), np.array(curve)


def main(path="build/assignment.png", num_steps=40, num_samples=40, num_scenes=6):
    """Tunes the tracker, prints what that is worth, and draws it; returns the Result."""
    training, test = make_scenes(num_scenes, seed=0), make_scenes(20, seed=1)

    def wrong_share(settings):
        return wrong_links(settings, training).mean()

    error = px.host_function(wrong_share, like=0.0)
    tuned, curve = tune(error, num_steps, num_samples)
    wrong = [wrong_links(settings, test) for settings in (START, tuned)]
    result = Result(tuned, curve, *(float(w.mean()) for w in wrong))
    show(result)
    draw(Path(path), result, test)
    print(f"Figure: {path}")
    return result


def show(result):
    weights = np.exp(result.tuned["log_weights"])
    print("  weights: distance {:.2f}, channels of colour {:.2f}, {:.2f}, {:.2f}".format(*weights))
    print("  wrong links in new scenes")
    print(f"  all weights 1   {result.untuned_error:6.1%}")
    print(f"  tuned           {result.tuned_error:6.1%}")


def draw(path, result, scenes, scene=0):
    """The error on the way, and the tracks of one scene before and after."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9), dpi=150, layout="constrained")
    panels[0].plot(100 * result.curve, color="#1f77b4")
    panels[0].set(xlabel="step of Adam", ylabel="wrong links, %, mean under noise", ylim=(0, None))
    panels[0].spines[["top", "right"]].set_visible(False)
    one = Scenes(*(v[scene : scene + 1] for v in scenes))
    for axes, settings, name in zip(
        panels[1:], (START, result.tuned), ("all weights 1", "tuned"), strict=True
    ):
        order = follow(settings, one)[0][..., None]
        places = np.take_along_axis(one.positions[0], order, 1)
        wrong = wrong_links(settings, one)[0]
        for frame, dot in np.ndindex(wrong.shape):
            colour, width = ("#d62728", 1.4) if wrong[frame, dot] else ("#7f7f7f", 0.8)
            axes.plot(*places[frame : frame + 2, dot].T, color=colour, lw=width)
        axes.plot(*places[-1].T, "o", color="#1f77b4", ms=4)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(f"{name}: {wrong.sum()} wrong links (red)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
