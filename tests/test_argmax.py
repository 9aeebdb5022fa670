"""Perturbed optimizers: closed forms, Danskin's rule, symmetry, and what solvers may return."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import closed_forms as cf
import perturbax as px
from helpers import (
    ALL_ORDERS,
    FIRST_ORDER,
    assert_biased,
    assert_trees_close,
    assert_unbiased,
    derivatives,
)

KEY = jax.random.key(0, impl="threefry2x32")
SCORES = np.array([0.5, 0.0625, -0.3125])
X = jnp.array(SCORES, jnp.float32)
SIGMA = 0.5
LAWS = {
    "gumbel": (px.Gumbel(), cf.gumbel),
    "normal": (px.Normal(), cf.normal),
    "laplace": (px.Laplace(), cf.laplace),
    "cauchy": (px.Cauchy(), cf.cauchy),
    "logistic": (px.Logistic(), cf.logistic),
}
SAMPLERS = {
    "independent": px.Independent(),
    "antithetic": px.Antithetic(),
    "orthogonal": px.Orthogonal(),
    "sobol": px.Sobol(),
}
# For what holds whatever the sampler: half of the time of compilation, or less.
INDEPENDENT = {"sampler": px.Independent(), "degree": 0}
one_hot = px.solvers.one_hot_argmax


def argmax(solver=one_hot, num_samples=64, sigma=SIGMA, noise=px.Gumbel(), **options):
    return px.make_perturbed_argmax(solver, num_samples, sigma, noise, **options)


def maximum(solver=one_hot, num_samples=64, sigma=SIGMA, noise=px.Gumbel(), **options):
    return px.make_perturbed_max(solver, num_samples, sigma, noise, **options)


# --- Closed forms


PROMISES = {"value": 0.01, "gradient": 0.02, "dsigma": 0.05, "hessian": 0.1, "mixed": 0.1}


def estimates_of(layer, names):
    """The named derivatives of a layer, which is made of a scale."""
    return derivatives(lambda key, x, sigma: layer(sigma)(key, x), names)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_argmax_is_a_softmax(sampler, everything):
    """Value, Jacobian and the derivative in sigma by every sampler, second derivatives by some."""
    twice = everything or sampler in ("independent", "sobol")
    names = (*FIRST_ORDER, "hessian") if twice else FIRST_ORDER
    exact = cf.smooth_argmax_gumbel(SCORES, SIGMA).as_dict(*names)
    estimates = estimates_of(lambda s: argmax(sigma=s, sampler=SAMPLERS[sampler]), tuple(exact))
    promise = {name: PROMISES[name] for name in exact}
    # Those of pairs and of directions are skewed.
    num_keys = 32_768 if everything and sampler in ("antithetic", "orthogonal") else 7168
    assert_unbiased(estimates, exact, seed=11, num_keys=num_keys, args=(X, SIGMA), promise=promise)


# Layers know no law: those of one derivative, or without moments, are in test_noise.py.
@pytest.mark.parametrize(
    "law",
    [
        "gumbel",
        "normal",
        "logistic",
        pytest.param("laplace", marks=pytest.mark.full),
        pytest.param("cauchy", marks=pytest.mark.full),
    ],
)
def test_argmax_and_ranks_under_other_noise(law, everything):
    noise, exact_noise = LAWS[law]
    names = {"choice": FIRST_ORDER, "ranks": FIRST_ORDER}
    if law in ("normal", "logistic") or (everything and law != "laplace"):
        names["ranks"] = (*FIRST_ORDER, "hessian")
    solvers = {"choice": one_hot, "ranks": px.solvers.ranks}
    smooth = {"choice": cf.smooth_argmax, "ranks": cf.smooth_ranks}

    def estimates(key, x, sigma):
        return {
            name: estimates_of(
                functools.partial(argmax_of, solver=solver, noise=noise), names[name]
            )(key, x, sigma)
            for name, solver in solvers.items()
        }

    exact = {
        name: smooth[name](SCORES, SIGMA, exact_noise).as_dict(*of_it)
        for name, of_it in names.items()
    }
    promise = {name: {quantity: PROMISES[quantity] for quantity in exact[name]} for name in exact}
    num_keys = 6144 if everything else 5120
    assert_unbiased(estimates, exact, seed=22, num_keys=num_keys, args=(X, SIGMA), promise=promise)


def argmax_of(sigma, solver, noise):
    return argmax(solver, sigma=sigma, noise=noise)


MAX_PROMISES = {
    "value": 0.002,
    "gradient": 0.005,
    "dsigma": 0.01,
    "hessian": 0.02,
    "mixed": 0.05,
    "dsigma2": 0.1,
    "third": 0.1,
}


@pytest.mark.parametrize("law", ["gumbel", pytest.param("normal", marks=pytest.mark.full)])
def test_max_at_every_order(law):
    noise, exact_noise = LAWS[law]
    exact = cf.smooth_max(SCORES, SIGMA, exact_noise)
    if law == "gumbel":
        assert_trees_close(
            exact.as_dict(), cf.smooth_max_gumbel(SCORES, SIGMA).as_dict(), atol=1e-8
        )
    estimates = estimates_of(lambda s: maximum(sigma=s, noise=noise), ALL_ORDERS)
    assert_unbiased(
        estimates,
        exact.as_dict(),
        seed=13,
        num_keys=9216,
        args=(X, SIGMA),
        promise=MAX_PROMISES,
        keys_per_batch=64,  # third derivatives of more do not fit into a core's cache
    )


@pytest.mark.parametrize("sampler", ["antithetic", "orthogonal", "sobol"])
def test_max_by_every_sampler(sampler):
    names = ("value", "gradient", "dsigma", "mixed")
    exact = cf.smooth_max(SCORES, SIGMA, cf.normal).as_dict(*names)
    estimates = estimates_of(
        lambda s: maximum(sigma=s, noise=px.Normal(), sampler=SAMPLERS[sampler], degree=0), names
    )
    promise = {name: PROMISES[name] for name in exact}
    num_keys = 5120 if sampler == "orthogonal" else 2048
    assert_unbiased(estimates, exact, seed=14, num_keys=num_keys, args=(X, SIGMA), promise=promise)


def two_way(theta, sigma):
    """E max(theta W) for two positive scores with independent log-normal factors of mean 1."""
    one, two = theta
    spread = sigma * np.sqrt(2)
    near = np.log(one / two) / spread
    first, second = near + spread / 2, -near + spread / 2
    cdf, pdf = scipy.stats.norm.cdf, scipy.stats.norm.pdf
    cross = -pdf(first) / (two * spread)
    slope = pdf(near) / spread
    choice = {
        "value": np.array([cdf(near), cdf(-near)]),
        "gradient": np.array([[slope / one, -slope / two], [-slope / one, slope / two]]),
        "dsigma": -near / sigma * pdf(near) * np.array([1, -1]),
    }
    best = {
        "value": one * cdf(first) + two * cdf(second),
        "gradient": np.array([cdf(first), cdf(second)]),
        "dsigma": np.sqrt(2) * one * pdf(first),
        "hessian": np.array(
            [[pdf(first) / (one * spread), cross], [cross, pdf(second) / (two * spread)]]
        ),
        # d/dsigma of Phi(first): first' = (-near / sigma + 1 / sqrt(2)).
        "mixed": np.array(
            [
                pdf(first) * (-near / sigma + np.sqrt(0.5)),
                pdf(second) * (near / sigma + np.sqrt(0.5)),
            ]
        ),
    }
    return choice, best


def test_multiplicative_perturbation():
    """Two positive scores: closed forms of the choice and of the maximum."""
    theta, sigma = np.array([1.5, 1.0]), 0.6
    choice, best = two_way(theta, sigma)
    options = {"noise": px.Normal(), "multiplicative": True}
    choose = estimates_of(lambda s: argmax(sigma=s, **options), tuple(choice))
    take = estimates_of(lambda s: maximum(sigma=s, **options), tuple(best))

    def estimates(key, x, sigma):
        return {"choice": choose(key, x, sigma), "best": take(key, x, sigma)}

    args = (jnp.asarray(theta, jnp.float32), sigma)
    exact = {"choice": choice, "best": best}
    promise = {name: {key: PROMISES[key] for key in exact[name]} for name in exact}
    assert_unbiased(estimates, exact, seed=15, num_keys=5120, args=args, promise=promise)

    def without_factor(key, x, sigma):
        return {"gradient": argmax(sigma=sigma, **options)(key, x)}

    mutant = {"gradient": best["gradient"]}
    assert_biased(without_factor, mutant, seed=15, num_keys=256, args=args)


def test_symmetrizing_what_is_no_gradient_is_noticed():
    """The tests above would see a wrong transpose: here the true Jacobian is not symmetric."""

    def no_argmax(x):
        return one_hot(x) * jnp.array([1.0, 0.0, 0.0])

    exact = cf.smooth_argmax_gumbel(SCORES, SIGMA).gradient * np.array([[1.0], [0.0], [0.0]])

    def jacobian(key, x, symmetrize):
        return jax.jacrev(argmax(no_argmax, symmetrize=symmetrize), argnums=1)(key, x)

    settings = {"seed": 16, "args": (X,)}
    right, wrong = (functools.partial(jacobian, symmetrize=yes) for yes in (False, True))
    assert_unbiased(right, exact, num_keys=1024, promise=0.05, **settings)
    assert_biased(wrong, exact, num_keys=128, **settings)


def test_objective_with_features_and_an_offset():
    """<theta, g(P)> + h(P) over permutation matrices, with h = 0: the gradient is the mean rank."""
    places = jnp.arange(1.0, 4.0)

    def objective(theta, matrix, weight):
        return weight * (theta @ (places @ matrix.astype(theta.dtype)))

    def solver(theta, weight):
        del weight
        return px.solvers.ranks(theta)[None, :] == places[:, None]

    layer = maximum(solver, objective=objective)
    exact = cf.smooth_ranks(SCORES, SIGMA, cf.gumbel)

    def estimates(key, x):
        by_x = jax.grad(layer, argnums=1)
        return {
            "gradient": by_x(key, x, 1.0),
            "hessian": jax.jacfwd(by_x, argnums=1)(key, x, 1.0),
            "weight": jax.grad(layer, argnums=2)(key, x, 2.0) - layer(key, x, 1.0),
        }

    exact = {"gradient": exact.value, "hessian": exact.gradient, "weight": np.zeros(())}
    scale = {"gradient": None, "hessian": None, "weight": 1.0}
    assert_unbiased(estimates, exact, seed=17, num_keys=512, args=(X,), promise=0.05, scale=scale)


# --- Identities that hold sample by sample


def test_the_value_is_that_of_make_perturbed_fun():
    plain = px.make_perturbed_fun(one_hot, 64, SIGMA)
    assert_trees_close(argmax()(KEY, X), plain(KEY, X), atol=1e-6)


def test_danskin():
    """At the same key the gradient is the mean solution, for one sample as for many."""
    for num_samples in (1, 7):
        gradient = jax.grad(maximum(num_samples=num_samples), argnums=1)(KEY, X)
        assert_trees_close(gradient, argmax(num_samples=num_samples)(KEY, X))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 5, **INDEPENDENT},
        {"num_samples": 3, "batch_size": 1, **INDEPENDENT},
        # What the default is.
        pytest.param({"sampler": px.Sobol(), "degree": 1}, marks=pytest.mark.full),
        {"use_baseline": False, "sigma": jnp.array([0.3, 0.5, 0.9]), **INDEPENDENT},
    ],
    ids=str,
)
def test_the_jacobian_is_the_symmetric_part(options):
    symmetric = argmax(**options)

    @jax.jit
    def derivatives(x):
        plain = jax.jacrev(argmax(**options, symmetrize=False), argnums=1)(KEY, x)
        return plain, [
            jax.jacrev(symmetric, argnums=1)(KEY, x),
            jax.jacfwd(symmetric, argnums=1)(KEY, x),
            jax.hessian(maximum(**options), argnums=1)(KEY, x),
        ]

    jacobian, found = derivatives(X)
    jacobian = np.asarray(jacobian)
    assert np.abs(jacobian - jacobian.T).max() > 1e-3
    for one in found:
        assert_trees_close(one, (jacobian + jacobian.T) / 2, atol=2e-6)


def test_modes_of_second_derivatives_of_the_maximum_agree():
    @jax.jit
    def second_derivatives(*at):
        def best(x, sigma):
            return maximum(sigma=sigma, **INDEPENDENT)(KEY, x)

        gradient = jax.grad(best, argnums=(0, 1))
        return [outer(gradient, argnums=(0, 1))(*at) for outer in (jax.jacrev, jax.jacfwd)]

    reverse, forward = second_derivatives(X, SIGMA)
    assert_trees_close(reverse, forward, atol=1e-5)
    assert np.abs(reverse[1][1]) > 1e-3


def test_many_scores():
    """Beyond eight outputs the estimator takes another way."""
    layers = argmax(symmetrize=False, **INDEPENDENT), argmax(batch_size=10, **INDEPENDENT)
    both = jax.jit(lambda x: [jax.jacrev(layer, argnums=1)(KEY, x) for layer in layers])
    jacobian, found = map(np.asarray, both(np.linspace(-1, 1, 12, dtype=np.float32)))
    assert_trees_close(found, (jacobian + jacobian.T) / 2, atol=1e-5)


def test_other_derivatives_are_not_touched():
    """Those in sigma and in further arguments are what they are without symmetry."""

    def solver(x, shift):
        return one_hot(x) * shift

    def value(shift, sigma, symmetrize):
        return argmax(solver, sigma=sigma, symmetrize=symmetrize, **INDEPENDENT)(KEY, X, shift)

    @jax.jit
    def derivatives(shift, sigma):
        pairs = [
            [transform(value, argnums=(0, 1))(shift, sigma, s) for s in (True, False)]
            for transform in (jax.jacfwd, jax.jacrev)
        ]
        layer = functools.partial(argmax(solver, **INDEPENDENT), KEY)
        along = jax.jvp(layer, (X, shift), (jnp.ones(3), 1.0))[1]
        by_x = jax.jvp(lambda x: layer(x, shift), (X,), (jnp.ones(3),))[1]
        return pairs, along, by_x

    pairs, along, by_x = derivatives(1.5, SIGMA)
    for one, two in pairs:
        assert_trees_close(one, two, atol=1e-6)
    # Along the scores and an argument at once.
    assert_trees_close(along, by_x + pairs[0][0][0], atol=1e-5)


def test_trees_of_scores():
    scores = np.asarray(X)
    x = {"a": scores[:2], "b": scores[2:].reshape(1, 1)}
    sigma = {"a": np.float32([0.5, 0.25]), "b": 0.75}

    def solver(tree):
        y = one_hot(jnp.concatenate([tree["a"], tree["b"].ravel()]))
        return {"a": y[:2], "b": y[2:].reshape(1, 1)}

    flat_sigma = np.float32([0.5, 0.25, 0.75])
    value, found = jax.jit(value_and_jacobian(argmax(solver, sigma=sigma, **INDEPENDENT)))(x)
    flat = jax.jit(value_and_jacobian(argmax(sigma=flat_sigma, **INDEPENDENT)))(X)
    expected, jacobian = map(np.asarray, flat)
    assert_trees_close(value, {"a": expected[:2], "b": expected[2:].reshape(1, 1)}, atol=1e-6)
    assert_trees_close(np.ravel(found["a"]["b"]), jacobian[:2, 2], atol=2e-6)
    assert_trees_close(np.ravel(found["b"]["a"]), jacobian[2, :2], atol=2e-6)

    def slopes(sigma, solver, x):
        def best(sigma, x):
            return maximum(solver, sigma=sigma, **INDEPENDENT)(KEY, x)

        return jax.jit(jax.grad(best, argnums=(0, 1)))(sigma, x)

    found, best = slopes(sigma, solver, x)
    assert_trees_close(best, value)
    expected = np.asarray(slopes(flat_sigma, one_hot, X)[0])
    assert_trees_close(found["a"], expected[:2], atol=1e-5)
    assert_trees_close(found["b"], expected[2], atol=1e-5)


def value_and_jacobian(layer):
    return lambda x: (layer(KEY, x), jax.jacrev(layer, argnums=1)(KEY, x))


@pytest.mark.parametrize("options", [{}, {"noise": px.Normal(), "multiplicative": True}], ids=str)
def test_minimising_is_maximising_the_opposite(options):
    def cheapest(costs):
        return one_hot(-costs)

    for make in (argmax, maximum):
        found = make(cheapest, maximize=False, **INDEPENDENT, **options)
        mirror = make(**INDEPENDENT, **options)
        sign = 1 if make is argmax else -1
        value, derivative = jax.jit(value_and_jacobian(found))(X)
        mirrored, expected = map(np.asarray, jax.jit(value_and_jacobian(mirror))(-X))
        assert_trees_close(value, sign * mirrored, atol=1e-6)
        assert_trees_close(derivative, -sign * expected, atol=1e-6)


def test_transforms_and_modes():
    xs = np.stack([X, -X])
    keys = jax.random.split(KEY, 2)
    for layer in (argmax(**INDEPENDENT), maximum(**INDEPENDENT)):
        jacobian = jax.jit(jax.jacrev(layer, argnums=1))
        single = np.stack([jacobian(k, x) for k, x in zip(keys, xs, strict=True)])
        batch = jax.jit(jax.vmap(jacobian))(keys, xs)
        assert_trees_close(batch, single, atol=1e-5)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_key_reuse(True),
    ):
        jax.jit(jax.hessian(maximum(), argnums=1))(jax.random.key(1), X)
        jax.jit(jax.jacrev(argmax(), argnums=1))(jax.random.key(2), X)
        by_sigma = jax.jit(jax.grad(lambda key, s: maximum(sigma=s)(key, X), argnums=1))
        by_sigma(jax.random.key(3), SIGMA)


def test_eager_calls_compile_once():
    def gradients():
        jax.block_until_ready(jax.grad(maximum(), argnums=1)(KEY, X))
        jax.block_until_ready(jax.jacrev(argmax(), argnums=1)(KEY, X))

    gradients()
    rules = px.optimizers._symmetric
    compiled = rules.symmetrized, rules.with_envelope_derivatives
    sizes = [f._cache_size() for f in compiled]
    gradients()
    assert sizes == [f._cache_size() for f in compiled]


# --- Solvers


class HostSolver:
    """A solver outside JAX that counts its calls."""

    def __init__(self):
        self.solves = 0

    def __call__(self, x):
        like = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jax.pure_callback(self.solve, like, x, vmap_method="sequential")

    def solve(self, x):
        self.solves += 1
        return np.eye(len(x), dtype=np.float32)[np.argmax(x)]


@pytest.mark.parametrize("num_samples", [1, 6])
def test_number_of_solves(num_samples):
    """A value and the derivatives of a maximum take num_samples, a score takes one more."""
    solver = HostSolver()

    def solves(call):
        solver.solves = 0
        jax.block_until_ready(call())
        return solver.solves

    choose, best = argmax(solver, num_samples), maximum(solver, num_samples)
    assert solves(lambda: choose(KEY, X)) == num_samples
    assert solves(lambda: best(KEY, X)) == num_samples
    assert solves(lambda: jax.value_and_grad(best, argnums=1)(KEY, X)) == num_samples
    loss = jax.jit(jax.value_and_grad(best, argnums=1))
    assert solves(lambda: loss(KEY, X)) == num_samples
    by_score = jax.jit(jax.jacrev(choose, argnums=1))
    assert solves(lambda: by_score(KEY, X)) == num_samples + 1


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8, np.float16])
def test_solutions_of_any_dtype(dtype):
    def solver(x):
        return one_hot(x).astype(dtype)

    expected = argmax(**INDEPENDENT)(KEY, X)
    assert_trees_close(argmax(solver, **INDEPENDENT)(KEY, X), expected)
    assert_trees_close(jax.grad(maximum(solver, **INDEPENDENT), argnums=1)(KEY, X), expected)


def test_scores_of_low_precision():
    x = X.astype(jnp.bfloat16)
    assert argmax()(KEY, x).dtype == jnp.float32
    jacobian = jax.jacrev(argmax(), argnums=1)(KEY, x)
    assert jacobian.dtype == jnp.bfloat16
    assert jax.grad(maximum(), argnums=1)(KEY, x).dtype == jnp.bfloat16


def test_masked_scores():
    """A score of -inf is never chosen, and neither value nor derivatives suffer."""
    x = np.float32([0.5, -np.inf, 0.0625, -0.3125])
    keep = np.array([0, 2, 3])
    options = {"num_samples": 4000, "noise": px.Normal(), "sampler": px.Independent(), "degree": 0}
    for multiplicative in (False, True):
        layer = maximum(**options, multiplicative=multiplicative)
        derivatives = jax.jit(
            lambda x, layer=layer: (
                *jax.value_and_grad(layer, argnums=1)(KEY, x),
                jax.hessian(layer, argnums=1)(KEY, x),
            )
        )
        value, gradient, hessian = map(np.asarray, derivatives(x))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert gradient[1] == 0
        assert np.isfinite(hessian).all()
        assert not np.any(hessian[1])
    jacobian = np.asarray(jax.jit(jax.jacrev(argmax(**options), argnums=1))(KEY, x))
    exact = cf.smooth_argmax(SCORES, SIGMA, cf.normal).gradient
    np.testing.assert_allclose(jacobian[np.ix_(keep, keep)], exact, atol=0.15)
    assert not np.any(jacobian[1])


def test_a_zero_score_under_multiplicative_noise():
    """The maximum has its gradient there; the mean solution's derivative does not exist."""
    x = np.float32([0, 1, -1])
    options = {"noise": px.Normal(), "multiplicative": True}
    np.testing.assert_allclose(argmax(**options)(KEY, x), [0, 1, 0])
    assert np.isfinite(jax.grad(maximum(**options), argnums=1)(KEY, x)).all()
    assert not np.isfinite(jax.jacrev(argmax(**options), argnums=1)(KEY, x)).all()


def test_solvers_with_side_effects():
    """An ordered callback: no symmetry, but Danskin's gradient, which was that of the score."""
    seen = []

    def solver(x, shift=0.0):
        jax.experimental.io_callback(lambda v: seen.append(v), None, x[0], ordered=True)
        return one_hot(x) + shift

    def pure(x, shift=0.0):
        return one_hot(x) + shift

    options = {"num_samples": 4, "batch_size": 1, **INDEPENDENT}
    assert_trees_close(argmax(solver, **options)(KEY, X), argmax(**options)(KEY, X))

    def derivatives(solver):
        def value(x, sigma, shift):
            return maximum(solver, sigma=sigma, symmetrize=False, **options)(KEY, x, shift)

        return jax.jit(functools.partial(all_derivatives, value))(X, SIGMA, 0.5)

    def all_derivatives(value, *args):
        return {
            "first": jax.value_and_grad(value, argnums=range(3))(*args),
            "second": jax.jacfwd(jax.jacfwd(value, argnums=range(3)))(*args),
        }

    assert_trees_close(derivatives(solver), derivatives(pure), atol=2e-5)

    def by_noise(loc, solver):
        return maximum(solver, noise=TheirNormal(loc), **options)(KEY, X)

    slope = jax.jit(jax.grad(by_noise), static_argnums=1)
    assert_trees_close(slope(0.1, solver), slope(0.1, pure), atol=1e-5)
    jax.effects_barrier()
    assert seen


class TheirNormal:
    """Normal noise of another library, with a density up to a constant."""

    def __init__(self, loc=0.0, scale=1.0):
        self.loc, self.scale = loc, scale

    def sample(self, key, sample_shape=(), dtype=float):
        return self.loc + self.scale * px.Normal().sample(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -0.5 * ((inputs - self.loc) / self.scale) ** 2


def test_multiplicative_perturbation_by_the_normal_noise_of_others():
    """Only this library's own was taken."""
    options = {"multiplicative": True, "num_samples": 16}
    optax = pytest.importorskip("optax.perturbations")
    argmax(noise=optax.Normal(), **options)
    theta, sigma = np.array([1.5, 1.0]), 0.6
    choice, _ = two_way(theta, sigma)

    def estimates(key, x):  # the noise is looked at inside a trace
        layer = argmax(noise=TheirNormal(), sigma=sigma, **options)
        return {"value": layer(key, x), "gradient": jax.jacrev(layer, argnums=1)(key, x)}

    exact = {name: choice[name] for name in ("value", "gradient")}
    args = (jnp.asarray(theta, jnp.float32),)
    promise = {"value": 0.01, "gradient": 0.03}
    assert_unbiased(estimates, exact, seed=17, num_keys=20480, args=args, promise=promise)


# --- Errors


def test_wrong_shapes_are_told():
    with pytest.raises(ValueError, match=r"\(2,\), expected that of theta, \(3,\)"):
        argmax(lambda x: x[:2])(KEY, X)
    with pytest.raises(ValueError, match=r"\(\), expected that of theta, \(3,\)"):
        maximum(jnp.argmax)(KEY, X)
    with pytest.raises(ValueError, match=r"structure .* expected that of theta"):
        argmax(lambda x: (x, x))(KEY, X)
    with pytest.raises(ValueError, match=r"\['b'\] has the shape \(2,\).*theta\['b'\], \(3,\)"):
        argmax(lambda x: {"b": x["b"][:2]})(KEY, {"b": X})
    with pytest.raises(ValueError, match=r"objective must return one real .* float32\[3\]"):
        maximum(objective=lambda theta, y: theta * y)(KEY, X)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "needs noise=Normal", {"multiplicative": True}),
        (ValueError, r"got Gumbel\(\)", {"multiplicative": True}),
        (ValueError, r"got TheirNormal$", {"multiplicative": True, "noise": TheirNormal(scale=2)}),
        (ValueError, r"got TheirNormal$", {"multiplicative": True, "noise": TheirNormal(loc=1)}),
        (TypeError, "maximize must be a bool", {"maximize": 1}),
        (TypeError, "symmetrize must be a bool", {"symmetrize": None}),
        (TypeError, "multiplicative must be a bool", {"multiplicative": "yes"}),
        (TypeError, "argmax_fun must be callable", {"solver": 3}),
        (ValueError, "num_samples must be >= 1", {"num_samples": 0}),
        (ValueError, "sigma must be > 0", {"sigma": -1.0}),
    ],
)
def test_wrong_options_are_told(error, message, options):
    for make in (argmax, maximum):
        with pytest.raises(error, match=message):
            make(**options)


def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match="objective must be callable"):
        maximum(objective=2)
    with pytest.raises(TypeError, match=r"'theta' is int32"):
        argmax()(KEY, jnp.arange(3))
    with pytest.raises(TypeError, match=r"'theta\[0\]' is str"):
        argmax()(KEY, ["a"])
    with pytest.raises(TypeError, match=r"did you call g\(x, key\)"):
        argmax()(X, KEY)
    with pytest.raises(ValueError, match="does not broadcast into leaf 'theta'"):
        argmax(sigma=jnp.ones(2))(KEY, X)
    assert np.isnan(jax.jit(lambda s: argmax(sigma=s)(KEY, X))(-1.0)).all()
    assert np.isnan(jax.jit(lambda s: maximum(sigma=s)(KEY, X))(0.0))


@pytest.mark.parametrize("symmetrize", [True, False])
def test_joint_derivatives_of_the_maximum_in_chunks(symmetrize):
    """In scores and a further argument at once, whatever the number of samples at a time."""

    def solver(u, shift):
        return one_hot(u) + shift

    def hessian(batch_size):
        options = {"batch_size": batch_size, "symmetrize": symmetrize, **INDEPENDENT}
        fun = maximum(solver, 8, **options)
        derived = jax.jacfwd(jax.grad(fun, argnums=(1, 2)), argnums=(1, 2))
        return jax.jit(derived)(KEY, X, jnp.float32(0.5))

    whole = hessian(None)
    assert_trees_close(hessian(2), whole, rtol=1e-4, atol=1e-5)
    assert np.abs(whole[0][0]).max() > 0.1


class RowNoise:
    """Noise whose log-density is known of whole rows alone, for its coordinates are correlated."""

    factor = np.float32(np.eye(X.size) + 0.3)

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype) @ self.factor.T

    def log_prob(self, z):
        return -jnp.sum(jnp.linalg.solve(self.factor, z) ** 2) / 2


def test_noise_of_whole_rows_is_never_asked_about_a_single_number():
    def solver(x):
        jax.experimental.io_callback(lambda v: None, None, x[0], ordered=True)
        return one_hot(x)

    options = {"num_samples": 16, "sigma": SIGMA, "noise": RowNoise(), "batch_size": 1}
    found = [jax.grad(maximum(s, **options), argnums=1)(KEY, X) for s in (solver, one_hot)]
    assert_trees_close(*found, atol=1e-6)
    with pytest.raises(ValueError, match=r"multiplicative=True needs noise=Normal\(\)"):
        maximum(**options, multiplicative=True)


def test_the_hessian_of_a_maximum_with_a_forced_score_is_finite():
    """It is the Jacobian of the mean solution, whatever becomes of the value."""
    x = np.array(X)
    x[1] = np.inf

    def top_2(x):
        return px.solvers.top_k_mask(x, 2)

    hessian = np.asarray(jax.jit(jax.hessian(maximum(top_2), argnums=1))(KEY, x))
    jacobian = np.asarray(jax.jit(jax.jacrev(argmax(top_2), argnums=1))(KEY, x))
    others = np.delete(np.arange(X.size), 1)
    assert np.isfinite(hessian[others][:, others]).all()
    np.testing.assert_allclose(hessian[others][:, others], jacobian[others][:, others], atol=1e-5)


def test_complex_results_are_told():
    """Their imaginary parts were cut off."""
    with pytest.raises(TypeError, match=r"objective must return one real .* complex64\[\]"):
        maximum(objective=lambda x, y: (1j * x) @ y)(KEY, X)
    with pytest.raises(ValueError, match="must be real numbers, got complex64"):
        argmax(lambda x: (1 + 2j) * one_hot(x))(KEY, X)
