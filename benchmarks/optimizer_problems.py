"""What benchmarks/optimizers.py minimises: test functions, errors of learners, and control.

Each problem is one number of a vector, has a start for each seed, and two targets: an easy and a
hard one. Those of the test functions are shares of the way from the start to the optimum, which is
known; the others are numbers of errors, scores and returns that were fixed beforehand.
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Share of the way from the start that is left at the targets of test functions, easy and hard.
LEFT = 1e-1, 1e-2
# Width of the grid that x is rounded to in the rounded test functions.
GRID = 0.5
# Starts of an episode that a policy is judged by.
EPISODES = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to minimise.

    Attributes:
      name: what it is called in the table, without its dimension.
      group: "test functions", "rounded", "learning" or "control".
      dim: number of coordinates.
      fun: for JAX, from x and args.
      args: arrays.
      start: x0 of a seed.
      targets: the easy and the hard one, of a seed.
      prepare: called with a seed before a run.
      many: values at points (n, dim), for the rivals.
      width: what the rivals are told of the scale: the first standard deviation.
      box: lower and upper ends, for those that need them.
      effort: evaluations allowed, relative to the others.
    """

    name: str
    group: str
    dim: int
    fun: Callable[..., Any]
    args: tuple[Any, ...]
    start: Callable[[int], np.ndarray]
    targets: Callable[[int], tuple[float, float]]
    many: Callable[[np.ndarray], np.ndarray]
    prepare: Callable[[int], None] = lambda seed: None
    width: float = 1.0
    box: tuple[float, float] = (-3.0, 3.0)
    effort: float = 1.0

    @property
    def label(self) -> str:
        """Name and dimension."""
        return f"{self.name} ({self.dim})"


# ---------------------------------------------------------------------------- test functions

FUNCTIONS = {
    1: "sphere",
    2: "ellipsoid, separable",
    3: "Rastrigin, separable",
    4: "Büche-Rastrigin",
    5: "linear slope",
    6: "attractive sector",
    7: "step-ellipsoid",
    8: "Rosenbrock",
    9: "Rosenbrock, rotated",
    10: "ellipsoid",
    11: "discus",
    12: "bent cigar",
    13: "sharp ridge",
    14: "different powers",
    15: "Rastrigin",
    16: "Weierstrass",
    17: "Schaffer F7",
    18: "Schaffer F7, ill-conditioned",
    19: "Griewank-Rosenbrock",
    20: "Schwefel",
    21: "Gallagher, 101 peaks",
    22: "Gallagher, 21 peaks",
    23: "Katsuura",
    24: "bi-Rastrigin",
}
ROUNDED = 1, 8, 10, 15, 17


class Coco:
    """BBOB functions of one dimension; seed s is instance s + 1."""

    def __init__(self, dim):
        import cocoex

        self.dim = dim
        self.suite = cocoex.Suite("bbob", "instances: 1-15", f"dimensions: {dim}")
        self.current = None, 0.0, None, 0.0

    def load(self, function, rounded, seed):
        """Makes one function the current one."""
        problem = self.suite.get_problem_by_function_dimension_instance(
            function, self.dim, seed + 1
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            problem._best_parameter("print")
            best = np.loadtxt(os.listdir(".")[0])
        self.current = problem, problem(best), best, GRID if rounded else 0.0

    def many(self, points):
        """Values above the optimum, at points (n, dim)."""
        problem, lowest, best, grid = self.current
        points = np.asarray(points, np.float64)
        if grid:
            points = best + grid * np.round((points - best) / grid)
        return np.array([problem(x) - lowest for x in points])

    def on_host(self, x):
        """The same at points of any batch shape."""
        found = self.many(x.reshape(-1, self.dim)).astype(np.float32)
        return found.reshape(x.shape[:-1])

    def fun(self, x):
        """The same for JAX."""
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(self.on_host, like, x, vmap_method="expand_dims")


@functools.cache
def coco(dim):
    return Coco(dim)


def bbob(function, dim, rounded):
    home = coco(dim)

    def start(seed):
        return np.random.default_rng([dim, seed]).uniform(-4, 4, dim)

    @functools.cache
    def targets(seed):
        home.load(function, rounded, seed)
        return tuple(left * float(home.many(start(seed)[None])[0]) for left in LEFT)

    return Problem(
        name=FUNCTIONS[function] + (", rounded" if rounded else ""),
        group="rounded" if rounded else "test functions",
        dim=dim,
        fun=home.fun,
        args=(),
        start=start,
        targets=targets,
        prepare=functools.partial(home.load, function, rounded),
        many=home.many,
        width=2.0,
        box=(-5.0, 5.0),
    )


# --------------------------------------------------------------------- problems that are in JAX


def in_jax(name, group, dim, fun, args, targets, **more):
    compiled = jax.jit(jax.vmap(fun, in_axes=(0, *[None] * len(args))))

    def many(points):
        return np.asarray(compiled(jnp.asarray(points, jnp.float32), *args), np.float64)

    def start(seed):
        return 0.1 * np.random.default_rng([dim, seed]).normal(size=dim)

    return Problem(name, group, dim, fun, args, start, lambda seed: targets, many=many, **more)


def with_ones(x):
    """Standardised columns, and a column of ones."""
    x = np.asarray(x, np.float64)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    return jnp.asarray(np.column_stack([x, np.ones(len(x))]), jnp.float32)


def errors(weights, x, labels, classes):
    """Number of examples that a linear classifier gets wrong."""
    scores = x @ weights.reshape(x.shape[1], -1)
    found = scores[:, 0] > 0 if classes == 2 else jnp.argmax(scores, axis=1)
    return jnp.sum(found.astype(jnp.int32) != labels).astype(jnp.float32)


def classifier(name, x, labels, classes, targets):
    x, labels = with_ones(x), jnp.asarray(labels, jnp.int32)
    dim = x.shape[1] * (1 if classes == 2 else classes)
    fun = functools.partial(errors, classes=classes)
    return in_jax(f"errors, {name}", "learning", dim, fun, (x, labels), targets)


def products(x):
    """Columns and the products of pairs of them."""
    x = (x - x.mean(0)) / x.std(0)
    i, j = np.triu_indices(x.shape[1])
    return np.column_stack([x, x[:, i] * x[:, j]])


def digits(count=600):
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    return x[:count], labels[:count]


def sign_network(targets, hidden=8):
    x, labels = digits()
    x, labels = with_ones(x), jnp.asarray(labels, jnp.int32)
    cut = x.shape[1] * hidden

    def fun(weights, x, labels):
        inner = jnp.sign(x @ weights[:cut].reshape(-1, hidden))
        scores = jnp.column_stack([inner, jnp.ones(len(x))]) @ weights[cut:].reshape(-1, 10)
        return jnp.sum(jnp.argmax(scores, axis=1) != labels).astype(jnp.float32)

    dim = cut + (hidden + 1) * 10
    return in_jax("errors, sign network", "learning", dim, fun, (x, labels), targets)


def ndcg(targets, places=10, size=34):
    """1 - NDCG@10 of a linear ranking of patients, thirteen lists of them, by their progression."""
    from sklearn.datasets import load_diabetes

    x, progression = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[: 13 * size]
    x = with_ones(products(x))[order, :-1].reshape(13, size, -1)
    levels = np.digitize(progression, np.quantile(progression, [0.5, 0.7, 0.85, 0.95]))
    gains = jnp.asarray(2.0 ** levels[order].reshape(13, size) - 1, jnp.float32)
    discounts = 1 / np.log2(np.arange(2, places + 2))
    ideal = -jnp.sort(-gains, axis=1)[:, :places] @ discounts

    def fun(weights, x, gains, ideal):
        best = jnp.argsort(-(x @ weights), axis=1)[:, :places]
        return 1 - jnp.mean(jnp.take_along_axis(gains, best, 1) @ discounts / ideal)

    return in_jax("1 - NDCG@10", "learning", x.shape[-1], fun, (x, gains, ideal), targets)


def thresholds(targets):
    """1 - F1, averaged over ten labels, of classifiers one against all: a threshold for each."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, labels = digits()
    # So strongly regularised that one half is a bad threshold.
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=1e-3)))
    scores = cross_val_predict(model, x, labels, method="decision_function", cv=3)
    truth = np.arange(10) == labels[:, None]

    def fun(cuts, scores, truth):
        found = scores > cuts
        hits = jnp.sum(found & truth, axis=0)
        return 1 - jnp.mean(2 * hits / (jnp.sum(found, axis=0) + jnp.sum(truth, axis=0)))

    args = jnp.asarray(scores, jnp.float32), jnp.asarray(truth)
    return in_jax("1 - F1 of thresholds", "learning", 10, fun, args, targets)


# ----------------------------------------------------------------------------------- control

# Returns to reach; CartPole, Acrobot and MountainCar by the customary measure of a solved task.
RETURNS = {
    "CartPole-v1": (200.0, 475.0),
    "Acrobot-v1": (-200.0, -100.0),
    "MountainCar-v0": (-150.0, -110.0),
    "Pendulum-v1": (-600.0, -250.0),
}


def control(name, hidden):
    import gymnax

    environment, params = gymnax.make(name)
    inputs = environment.observation_space(params).shape[0]
    continuous = name.startswith("Pendulum")
    actions = 1 if continuous else environment.num_actions
    dim = (inputs + 1) * (hidden or actions) + ((hidden + 1) * actions if hidden else 0)
    steps = params.max_steps_in_episode

    def layer(weights, x):
        matrix = weights.reshape(len(x) + 1, -1)
        return x @ matrix[:-1] + matrix[-1]

    def act(weights, observation):
        if hidden:
            cut = (inputs + 1) * hidden
            inner = jnp.tanh(layer(weights[:cut], observation))
            out = layer(weights[cut:], inner)
        else:
            out = layer(weights, observation)
        return 2 * jnp.tanh(out) if continuous else jnp.argmax(out)

    def episode(weights, key):
        observation, state = environment.reset_env(key, params)

        def step(carry, _):
            observation, state, on, total = carry
            key = jax.random.key(0)  # nothing here is random after the start
            action = act(weights, observation)
            observation, state, reward, done, _ = environment.step_env(key, state, action, params)
            total = total + jnp.where(on, jnp.squeeze(reward), 0.0)
            return (observation, state, on & ~done, total), None

        begun = observation, state, jnp.asarray(True), jnp.asarray(0.0)
        return jax.lax.scan(step, begun, length=steps)[0][3]

    def lost(weights, keys):
        keys = jax.random.wrap_key_data(keys)
        return -jnp.mean(jax.vmap(episode, (None, 0))(weights, keys))

    keys = jax.random.key_data(jax.random.split(jax.random.key(0), EPISODES))
    easy, hard = RETURNS[name]
    kind = f"{hidden} units" if hidden else "linear"
    title = f"{name.split('-')[0]}, {kind}"
    return in_jax(title, "control", dim, lost, (keys,), (-easy, -hard), effort=0.5)


def all_problems() -> dict[str, Callable[[], Problem]]:
    """Makers of all problems, by label without dimension, those of many coordinates first."""
    from sklearn.datasets import load_breast_cancer, load_iris, load_wine

    makers: dict[str, Callable[[], Problem]] = {}

    def learner(name, load, classes, targets, change=lambda x: x):
        def make():
            x, labels = load(return_X_y=True)
            return classifier(name, change(x), labels, classes, targets)

        makers[f"learning/{name}"] = make

    makers["learning/digits"] = lambda: classifier("digits", *digits(), 10, (60.0, 12.0))
    makers["learning/sign network"] = lambda: sign_network((300.0, 120.0))
    makers["learning/parity"] = lambda: classifier(
        "parity of digits", digits()[0], digits()[1] % 2, 2, (90.0, 50.0)
    )
    makers["learning/ndcg"] = lambda: ndcg((0.3, 0.2))
    learner("iris", load_iris, 3, (8.0, 1.0), products)
    learner("wine", load_wine, 3, (9.0, 1.0))
    learner("breast cancer", load_breast_cancer, 2, (20.0, 6.0))
    for name in RETURNS:
        makers[f"control/{name}/units"] = functools.partial(control, name, 16)
    for dim in (40, 20, 5):
        for function in FUNCTIONS:
            makers[f"bbob{dim}/f{function}"] = functools.partial(bbob, function, dim, False)
        for function in ROUNDED:
            makers[f"bbob{dim}/r{function}"] = functools.partial(bbob, function, dim, True)
    for name in RETURNS:
        makers[f"control/{name}/linear"] = functools.partial(control, name, 0)
    makers["learning/thresholds"] = lambda: thresholds((0.2, 0.1))
    return makers


def budget(problem: Problem, factor: float) -> int:
    """Evaluations allowed: in proportion to the root of the number of coordinates."""
    return int(factor * problem.effort * math.sqrt(problem.dim))
