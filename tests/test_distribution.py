"""The distribution of perturbed solutions: which there are, how often, and what they cost."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import closed_forms as cf
import perturbax as px
from helpers import assert_biased, assert_trees_close, assert_unbiased, enable_x64, twice
from perturbax.estimator import _formula
from perturbax.optimizers import _distribution
from test_argmax import KEY, SAMPLERS, SCORES, SIGMA, HostSolver, X, one_hot, two_way


def make(solver=one_hot, num_samples=64, sigma=SIGMA, **options):
    return px.make_perturbed_distribution(solver, num_samples, sigma, **options)


@functools.cache
def default():
    """One distribution for all tests that look at it, of an eager call."""
    return make()(KEY, X)


def found_by_hand(solutions):
    rows, counts = np.unique(np.asarray(solutions), axis=0, return_counts=True)
    return {tuple(row): count for row, count in zip(rows, counts, strict=True)}


@pytest.mark.parametrize("dim", [3, 40])
def test_distinct_solutions_and_their_frequencies(dim):
    x = np.linspace(-1, 1, dim, dtype=np.float32)

    def solver(u):
        return u > 0.4

    found = make(solver, 200)(KEY, x)
    _, drawn = px.make_perturbed_fun(
        lambda u: (0.0, solver(u)), 200, SIGMA, use_baseline=False, has_aux=True
    )(KEY, x)
    expected = found_by_hand(drawn)
    num = len(expected)
    weights, solutions = np.asarray(found.weights), np.asarray(found.solutions)
    assert solutions.shape == (200, dim)
    assert solutions.dtype == bool
    assert np.all(np.diff(weights) <= 0)
    assert np.all(weights[num:] == 0)
    counts = {tuple(row): round(200 * w) for row, w in zip(solutions[:num], weights, strict=False)}
    assert counts == expected
    assert np.all(solutions[num:] == solutions[0])


def test_equality_is_by_value_in_every_leaf():
    def solver(x):
        sign = jnp.where(x[0] > 0.5, 1.0, -1.0)
        return {
            "zero": 0.0 * sign,  # 0 and -0 are one solution
            "float": jnp.round(x[:2]),
            "half": (x[1] > 0).astype(jnp.bfloat16),
            "int": jnp.argmax(x).astype(jnp.int8),
            "complex": jnp.sign(x[2]) * 1j,
        }

    found = make(solver, 300)(KEY, X)
    rows = np.concatenate(
        [np.asarray(v).astype(complex).reshape(300, -1) for v in jax.tree.leaves(found.solutions)],
        axis=1,
    )
    distinct = int(np.sum(np.asarray(found.weights) > 0))
    assert 4 < distinct < 100
    assert len(np.unique(rows, axis=0)) == distinct


def orders():
    """Every order of three, best first, and its Plackett-Luce probability."""
    p = scipy.special.softmax(SCORES / SIGMA)
    for order in itertools.permutations(range(3)):
        yield order, p[order[0]] * p[order[1]] / (1 - p[order[0]])


def test_orders_follow_plackett_luce():
    def cost(order, wanted):
        return jnp.all(order == wanted).astype(jnp.float32)

    wanted = jnp.array([order for order, _ in orders()])

    def estimates(key, x):
        found = make(lambda u: jnp.argsort(-u))(key, x)
        return jax.vmap(lambda w: found.expectation(cost, w))(wanted)

    exact = np.array([chance for _, chance in orders()])
    assert_unbiased(estimates, exact, seed=51, num_keys=2048, args=(X,), promise=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mean_permutation_matrix_and_its_derivatives(sampler):
    noise = px.Normal() if sampler != "independent" else px.Gumbel()
    law = cf.normal if sampler != "independent" else cf.gumbel
    exact = cf.smooth_permutation(SCORES, SIGMA, law).as_dict("value", "gradient", "dsigma")

    def mean(key, x, sigma):
        layer = make(cf.permutation, sigma=sigma, noise=noise, sampler=SAMPLERS[sampler])
        return layer(key, x).expectation(lambda y: y)

    def estimates(key, x, sigma):
        by_both = jax.jacrev(twice(mean), argnums=(1, 2), has_aux=True)
        (gradient, dsigma), value = by_both(key, x, sigma)
        return {"value": value, "gradient": gradient, "dsigma": dsigma}

    promise = {"value": 0.01, "gradient": 0.03, "dsigma": 0.05}
    num_keys = {"sobol": 5120, "orthogonal": 8192}.get(sampler, 9216)
    settings = {"seed": 52, "num_keys": num_keys, "args": (X, SIGMA), "keys_per_batch": 256}
    assert_unbiased(estimates, exact, promise=promise, **settings)


def test_second_derivatives_and_multiplicative_noise():
    exact = cf.smooth_argmax_gumbel(SCORES, SIGMA).hessian
    choice, _ = two_way(np.array([1.5, 1.0]), 0.6)

    def estimates(key, x):
        layer = make()
        other = make(sigma=0.6, noise=px.Normal(), multiplicative=True)
        one, two = jax.random.split(key)
        by_factor = jax.jacrev(lambda x: other(two, x).expectation(lambda y: y))
        return {
            "hessian": jax.hessian(lambda x: layer(one, x).expectation(lambda y: y))(x),
            "factor": by_factor(jnp.array([1.5, 1.0])),
        }

    exact = {"hessian": exact, "factor": choice["gradient"]}
    promise = {"hessian": 0.1, "factor": 0.02}
    assert_unbiased(estimates, exact, seed=53, num_keys=20480, args=(X,), promise=promise)


# Of the source of `weights_less_baselines`: what a line has, and what a wrong one has instead.
BASELINE_MUTATIONS = {
    "none": [],
    "the own group's share not added": [("change + share[group]", "change")],
    "the shares not subtracted": [("- jnp.sum(share)", "- 0 * jnp.sum(share)")],
    "own group in the baseline": [
        ("change + share[group]", "change"),
        ("num - np.bincount(group)", "num + 0 * np.bincount(group)"),
    ],
}


@pytest.mark.parametrize(
    ("mutation", "sampler"),
    [*((name, "independent") for name in BASELINE_MUTATIONS), ("none", "sobol")],
)
def test_the_baseline_is_of_other_groups_alone(mutation, sampler, monkeypatch):
    """Eight samples, where a baseline that sees its own sample is off by an eighth."""
    lines = inspect.getsource(_formula.weights_less_baselines)
    for right, wrong in BASELINE_MUTATIONS[mutation]:
        assert lines.count(right) == 1
        lines = lines.replace(right, wrong)
    names = dict(vars(_formula))
    exec(lines, names)
    monkeypatch.setattr(_formula, "weights_less_baselines", names["weights_less_baselines"])
    # Compiled anew: what is kept was traced with the right lines.
    tabulate = _distribution._tabulate.__wrapped__
    fresh = jax.jit(lambda *args: tabulate(*args), static_argnums=0)
    monkeypatch.setattr(_distribution, "_tabulate", fresh)

    def mean(key, x, sigma):
        layer = make(num_samples=8, sigma=sigma, noise=px.Normal(), sampler=SAMPLERS[sampler])
        return layer(key, x).expectation(lambda y: y)

    def estimates(key, x, sigma):
        gradient, dsigma = jax.jacrev(mean, argnums=(1, 2))(key, x, sigma)
        return {"gradient": gradient, "dsigma": dsigma}

    exact = cf.smooth_argmax(SCORES, SIGMA, cf.normal).as_dict("gradient", "dsigma")
    settings = {"seed": 54, "args": (X, SIGMA), "keys_per_batch": 4096}
    if mutation == "none":
        promise = {"gradient": 0.03, "dsigma": 0.05}
        assert_unbiased(estimates, exact, num_keys=65536, promise=promise, **settings)
    else:
        assert_biased(estimates, exact, num_keys=4096, quantities=("gradient",), **settings)


def test_gradient_is_that_of_the_baseline_of_other_samples():
    """Exactly what make_perturbed_fun of the cost gives, but for fun(x) among its baseline."""
    cost = jnp.array([1.0, 5.0, -2.0])

    def expected(x, use_baseline):
        layer = make(num_samples=50, use_baseline=use_baseline, sampler=px.Independent())
        return layer(KEY, x).expectation(lambda y: y @ cost)

    settings = {"use_baseline": False, "sampler": px.Independent()}
    plain = px.make_perturbed_fun(lambda u: one_hot(u) @ cost, 50, SIGMA, **settings)
    gradient = jax.jit(jax.grad(plain, argnums=1))(KEY, X)
    slope = jax.jit(jax.grad(expected), static_argnums=1)
    assert_trees_close(slope(X, False), gradient, atol=1e-4)
    # By hand, with the mean of the 49 others.
    _, (u, y) = px.make_perturbed_fun(
        lambda u: (0.0, (u, one_hot(u))), 50, SIGMA, **settings, has_aux=True
    )(KEY, X)
    u, y, x = map(np.asarray, (u, y, X))
    score = 1 - np.exp(-(u - x) / SIGMA)
    costs = y @ np.asarray(cost)
    baseline = (costs.sum() - costs) / 49
    by_hand = np.mean((costs - baseline)[:, None] * score, axis=0) / SIGMA
    np.testing.assert_allclose(slope(X, True), by_hand, atol=1e-4)


PAIRS = px.Orthogonal(antithetic=True)


@pytest.mark.parametrize(
    ("num_samples", "chosen", "other"),
    [(1000, px.Sobol(), px.Independent()), (11, PAIRS, px.Sobol()), (2, px.Independent(), PAIRS)],
)
def test_the_default_sampler_is_that_of_degree_0(num_samples, chosen, other):
    """As `make_perturbed_fun` chooses, in draws and in the groups of the baseline."""
    choice = px.choose_sampler(num_samples, 3, px.Normal(), degree=0)
    assert choice.sampler == chosen

    def results(sampler):
        def cost(x):
            layer = make(num_samples=num_samples, noise=px.Normal(), sampler=sampler)
            return layer(KEY, x).expectation(lambda y: y @ jnp.array([1.0, 5.0, -2.0]))

        return jax.jit(jax.value_and_grad(cost))(X)

    default = results(None)
    assert_trees_close(default, results(chosen))
    assert np.abs(default[1] - results(other)[1]).max() > 1e-3


def test_a_single_sample_has_no_baseline():
    """As documented: a constant cost has the gradient zero from two samples on."""

    def expected(x, num_samples):
        return make(num_samples=num_samples)(KEY, x).expectation(lambda y: 5.0)

    slope = jax.jit(jax.grad(expected), static_argnums=1)
    assert np.abs(slope(X, 1)).max() > 0.1
    np.testing.assert_allclose(slope(X, 2), 0, atol=1e-5)


def test_solves_transforms_and_costs_with_parameters():
    solver = HostSolver()
    jax.block_until_ready(jax.jit(make(solver, 7))(KEY, X))
    assert solver.solves == 7
    keys, xs = jax.random.split(KEY, 2), np.stack([X, -X])
    batch = jax.jit(jax.vmap(make()))(keys, xs)
    single = [make()(k, x) for k, x in zip(keys, xs, strict=True)]
    assert_trees_close(batch, jax.tree.map(lambda *v: np.stack(v), *single), atol=1e-6)

    @jax.jit
    def expectations(found, weights):
        by_weight = jax.grad(lambda w: found.expectation(lambda y, w: y @ w, w))(weights)
        return by_weight, found.expectation(lambda y: y)

    assert_trees_close(*expectations(single[0], np.ones(3, np.float32)), atol=1e-6)
    mirror = make(lambda c: one_hot(-c), maximize=False)(KEY, -X)
    assert_trees_close(mirror, default(), atol=1e-6)
    assert np.isnan(jax.jit(lambda s: make(sigma=s)(KEY, X).weights)(-1.0)).all()


@pytest.mark.parametrize("dtype", [int, bool, jnp.int8, jnp.bfloat16])
def test_an_expectation_has_the_dtype_of_the_weights(dtype):
    """With integer costs it was float64, and without 64 bits a warning."""
    cost, found = np.array([0, 1, 1], dtype), default()

    @jax.jit
    def means(found, cost):
        return found.expectation(lambda y: cost[jnp.argmax(y)]), found.expectation(lambda y: y)

    with enable_x64(True):
        # In 64 bits, int is int64.
        wide, _ = jax.eval_shape(means, make()(KEY, X), cost)
        of_complex = jax.eval_shape(lambda: found.expectation(lambda y: 1j * y[0]))
    mean, solution = means(found, jnp.asarray(cost))
    assert wide.dtype == mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, np.asarray(solution)[1:].sum(), rtol=1e-6)
    assert of_complex.dtype == jnp.complex64


def test_an_infinite_cost_has_an_infinite_mean():
    """It was NaN wherever a solution occurred twice: its cost has weight 0 in spare places."""
    found = default()
    assert np.any(np.asarray(found.weights) == 0)
    assert found.expectation(lambda y: jnp.where(y[0] >= 0, jnp.inf, 0.0)) == jnp.inf


def test_it_prints_as_a_short_table():
    """It printed all solutions, as often as there are samples."""
    texts = []

    def solver(theta):
        return {"chosen": px.solvers.one_hot_argmax(theta), "of": jnp.sum(theta > 0)}

    @jax.jit
    def traced(theta):
        found = px.make_perturbed_distribution(solver, 200, 0.1)(KEY, theta)
        texts.append(str(found))
        return found

    found = jax.tree.map(np.asarray, traced(np.arange(40, dtype=np.float32) / 40))
    assert "Tracer" in texts[0]
    head, names, first, *_, rest = str(found).splitlines()
    assert repr(found) == str(found)
    assert found in {found}
    distinct = np.count_nonzero(found.weights)
    assert head == f"{distinct} distinct solutions of 200 samples"
    assert names.split() == ["weight", "solution"]
    one, of = np.argmax(found.solutions["chosen"][0]), found.solutions["of"][0]
    assert first.strip() == f"{found.weights[0]:.3g}  ['chosen'] 1 at {one}; ['of'] {of}"
    assert rest.strip() == f"{found.weights[10:].sum():.3g}  of {distinct - 10} more solutions"
    # Few numbers are told as they are.
    three = px.make_perturbed_distribution(px.solvers.one_hot_argmax, 50, 1e-3)
    assert str(three(KEY, jnp.array([0.0, 1.0, 0.5]))).endswith(" 1  0, 1, 0")


def test_errors():
    with pytest.raises(ValueError, match="needs noise=Normal"):
        make(multiplicative=True)
    with pytest.raises(TypeError, match="argmax_fun must be callable"):
        make(2)
    with pytest.raises(TypeError, match="'theta' is int32"):
        make()(KEY, jnp.arange(3))


def test_noise_without_a_density_has_weights():
    """Values need none; they were NaN."""
    noise = px.SumOfGamma(1)
    found = px.make_perturbed_distribution(one_hot, 1000, 1.0, noise)(KEY, X)
    assert np.sum(found.weights) == pytest.approx(1)
    mean = px.make_perturbed_argmax(one_hot, 1000, 1.0, noise)(KEY, X)
    np.testing.assert_allclose(found.expectation(lambda y: y), mean, atol=1e-6)
