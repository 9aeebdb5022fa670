"""Scales that are matrices, y = x + L eps: closed forms, identities, and what must fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import closed_forms as cf
import perturbax as px
from helpers import assert_biased, assert_trees_close, assert_unbiased, enable_x64
from perturbax.scale import _matrices

KEY = jax.random.key(0, impl="threefry2x32")
X = jnp.array([0.2, -0.1])
L = jnp.array([[0.5, 0.0], [0.3, 0.4]])
MATRIX = jnp.array([[2.0, 0.5], [0.5, -1.0]])
NOISES = {"Normal": (px.Normal(), cf.normal), "Gumbel": (px.Gumbel(), cf.gumbel)}


def quadratic(y):
    return y @ MATRIX @ y


def smooth(fun, num_samples=64, noise=px.Normal(), **options):
    """A function of a key, x and sigma."""
    return lambda key, x, sigma: px.make_perturbed_fun(fun, num_samples, sigma, noise, **options)(
        key, x
    )


def exact_quadratic(x, factor, noise):
    """E of the quadratic at x + L eps, with eps of mean m and variance v in each coordinate."""
    centre = x + factor @ jnp.full(2, noise.mean)
    return quadratic(centre) + noise.variance * jnp.trace(factor.T @ MATRIX @ factor)


# --- Identities


@pytest.mark.parametrize(
    ("sampler", "noise"), [(px.Independent(), px.Gumbel()), (px.Sobol(), px.Normal())], ids=str
)
def test_derivatives_of_a_quadratic_are_exact(sampler, noise):
    fun = smooth(quadratic, 256, noise, sampler=sampler, degree=2)

    def both(fun):
        one = jax.grad(fun, argnums=(0, 1))
        two = jax.jacfwd(one, argnums=(0, 1))
        return jax.jit(lambda *at: {"first": one(*at), "second": two(*at)})(X, L)

    exact = both(lambda x, factor: exact_quadratic(x, factor, noise))
    assert_trees_close(both(lambda x, factor: fun(KEY, x, factor)), exact, atol=2e-3)


def test_squares_alone_above_twenty_coordinates():
    """The surrogate of degree 2 then leaves products out; squares of the noise are still exact."""
    dim = 22
    factor = np.float32(np.eye(dim) * 0.5 + 0.1 * np.tri(dim, k=-1))
    inverse = np.linalg.inv(factor)
    fun = smooth(lambda y: jnp.sum((inverse @ y) ** 2), 512, sampler=px.Sobol(), degree=2)
    slope = jax.jit(jax.grad(fun, argnums=2))(KEY, np.zeros(dim, np.float32), factor)
    np.testing.assert_allclose(slope, 2 * inverse.T, atol=2e-2)


@pytest.mark.parametrize("degree", [0, 1])
def test_a_diagonal_matrix_is_a_scale_for_each_coordinate(degree):
    scales = np.float32([0.5, 0.8])
    fun = smooth(lambda y: jnp.sum(jnp.abs(y)) + y[0] * y[1], degree=degree)

    def derivatives(of):
        one = jax.grad(of, argnums=(0, 1))
        two = jax.jacfwd(one, argnums=(0, 1))
        return jax.jit(lambda *at: (of(*at), one(*at), two(*at)))(X, scales)

    dense = derivatives(lambda x, s: fun(KEY, x, jnp.diag(s)))
    assert_trees_close(dense, derivatives(lambda x, s: fun(KEY, x, s)), rtol=1e-4, atol=1e-4)


def test_trees_of_matrices_and_scales():
    """A matrix leaf, (2, 2), has a matrix of shape (2, 2, 2, 2); others have numbers or none."""
    square = np.float32([[0.1, 0.2], [0.3, 0.4]])
    x = {"a": X, "b": square, "c": np.float32(0.5), "n": 3}
    wide = np.float32(0.4 * np.eye(4) + 0.1 * np.tri(4, k=-1))
    sigma = {"a": 0.3, "b": wide.reshape(2, 2, 2, 2), "c": 0.7, "n": 1.0}

    def fun(x):
        return jnp.sum(x["a"]) * x["c"] + jnp.sum(x["b"] ** 2) * x["n"]

    def estimate(x, sigma):
        return smooth(fun, 1024, degree=2)(KEY, x, sigma)

    gradient, slope = jax.grad(estimate, argnums=(0, 1), allow_int=True)(x, sigma)
    np.testing.assert_allclose(np.reshape(slope["b"], (4, 4)), 6 * wide, atol=1e-3)
    np.testing.assert_allclose([slope["a"], slope["c"]], 0.0, atol=1e-3)
    np.testing.assert_allclose(gradient["b"], 6 * x["b"], atol=1e-3)
    np.testing.assert_allclose(gradient["a"], [0.5, 0.5], atol=1e-3)


def test_an_empty_leaf_beside_a_matrix():
    """numpy and JAX find no largest number of none."""
    factor = np.float32([[0.5, 0.0], [0.1, 0.4]])

    def of_both(x):
        return jnp.sum(jnp.floor(x["a"])) + jnp.sum(x["b"])

    gradient = jax.grad(smooth(of_both), argnums=1)
    alone = jax.grad(smooth(lambda a: jnp.sum(jnp.floor(a))), argnums=1)(KEY, X, factor)
    none = np.zeros((0, 0), np.float32)
    both = KEY, {"a": X, "b": none.ravel()}, {"a": factor, "b": none}
    for found in (gradient(*both), jax.jit(gradient)(*both)):
        np.testing.assert_allclose(found["a"], alone, rtol=1e-5)
        assert found["b"].shape == (0,)


def test_a_leaf_of_many_coordinates_beside_a_matrix_costs_no_square():
    x = {"few": X, "many": np.zeros(100_000, np.float32)}
    sigma = {"few": L, "many": np.float32(0.1)}

    def fun(y):
        value = jnp.sum(y["few"]) + jnp.mean(y["many"])
        return value, (value, y)

    with_samples = smooth(fun, 8, use_baseline=False, has_aux=True)
    slope, (f, y) = jax.grad(with_samples, argnums=2, has_aux=True)(KEY, x, sigma)
    # By hand: the mean of f times L^-T (z z' - 1), and of f times (sum z^2 - D) / sigma.
    f, inverse = np.asarray(f, np.float64), np.linalg.inv(np.asarray(L, np.float64))
    z = np.float64(np.asarray(y["few"]) - np.asarray(X)) @ inverse.T
    few = inverse.T @ np.einsum("n,nij->ij", f, z[:, :, None] * z[:, None, :] - np.eye(2)) / 8
    np.testing.assert_allclose(slope["few"], few, rtol=1e-4, atol=1e-4)
    many = np.mean(f * (np.sum((np.asarray(y["many"], np.float64) / 0.1) ** 2, axis=1) - 1e5) / 0.1)
    np.testing.assert_allclose(slope["many"], many, rtol=1e-3)


def test_transforms_and_batches():
    def gradient(x, factor, **options):
        fun = smooth(lambda y: jnp.max(jnp.abs(y)), 96, degree=1, **options)
        return jax.grad(fun, argnums=(1, 2))(KEY, x, factor)

    one = np.asarray(L)
    factors = np.stack([one, 2 * one, np.float32([[0.0, 1.0], [-1.0, 0.5]])])
    single = jax.jit(gradient, static_argnames="batch_size")
    loop = [single(X, factor) for factor in factors]
    stacked = jax.tree.map(lambda *v: np.stack(v), *loop)
    close = {"rtol": 1e-4, "atol": 1e-5}
    many = jax.jit(jax.vmap(gradient, (None, 0)))(X, factors)
    assert_trees_close(many, stacked, **close)
    assert_trees_close(gradient(X, L), loop[0], **close)
    assert_trees_close(single(X, L, batch_size=10), loop[0], **close)


def test_double_precision():
    with enable_x64(True):
        x, factor = (jnp.asarray(np.asarray(v, np.float64)) for v in (X, L))
        key = jax.random.key(0, impl="threefry2x32")
        fun = smooth(lambda y: y @ y, 64, degree=2)
        slope = jax.grad(fun, argnums=2)(key, x, factor)
        assert slope.dtype == np.float64
        np.testing.assert_allclose(slope, 2 * factor, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_inverses(seed):
    """Without pivots or scaling of rows, zeros and units would spoil them."""
    matrix = np.random.default_rng(seed).normal(size=(9, 9)).astype(np.float32)
    matrix[np.arange(9), np.arange(9)] = 0.0
    units = 10.0 ** np.arange(-12, 15, 3)
    inverse = jax.jit(_matrices.invert)((matrix * units[:, None]).astype(np.float32))
    exact = np.linalg.inv(matrix.astype(np.float64))
    np.testing.assert_allclose(inverse * units[None], exact, atol=1e-4 * np.abs(exact).max())


def test_the_unit_and_its_determinant():
    """Third derivatives of R = (1 + H)^-1 and log |det R| against JAX's own."""
    step = np.float32([[0.3, -0.2], [0.5, 0.1]])

    def third(inverse, log_det):
        def along(t):
            return inverse(jnp.eye(2) + t * step), log_det(jnp.eye(2) + t * step)

        return jax.jit(jax.jacfwd(jax.jacfwd(jax.jacfwd(along))))(0.0)

    def log_det(matrix):
        return jnp.log(jnp.abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]))

    ours = third(_matrices._inverse_of_unit, _matrices._log_det)
    assert_trees_close(ours, third(jnp.linalg.inv, log_det), rtol=1e-4)


# --- Against closed forms


WEIGHTS = np.array([1.0, 0.5])
# Where no derivative below is small against the others.
AT = jnp.array([0.3, 0.0])
HALFSPACE = {"value": 0.01, "gradient": 0.02, "matrix": 0.02, "hessian": 0.06, "mixed": 0.06}


def halfspace(y):
    return (y @ jnp.asarray(WEIGHTS, jnp.float32) > 0).astype(jnp.float32)


def exact_halfspace():
    """Phi(w'x / |L'w|), and its derivatives in x and L, by hand."""
    x, factor, w = np.asarray(AT, np.float64), np.asarray(L, np.float64), WEIGHTS
    along = factor.T @ w
    s = np.linalg.norm(along)
    t = w @ x / s
    phi = np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    ds = np.outer(w, along) / s
    return {
        "value": scipy.special.ndtr(t),
        "gradient": phi * w / s,
        "matrix": -phi * t / s * ds,
        "hessian": -phi * t / s**2 * np.outer(w, w),
        # d/dL of phi(t) w / s, where dt = -t ds / s
        "mixed": w[:, None, None] * (phi * (t * t - 1) / s**2 * ds)[None],
    }


def all_derivatives(estimate):
    """The derivatives of `exact_halfspace`, of an estimate (key, x, matrix)."""

    def estimator(key, x, factor):
        def slope(x, factor):
            value, one = jax.value_and_grad(estimate, argnums=(1, 2))(key, x, factor)
            return one[0], (value, one)

        two, (value, one) = jax.jacfwd(slope, argnums=(0, 1), has_aux=True)(x, factor)
        return {
            "value": value,
            "gradient": one[0],
            "matrix": one[1],
            "hessian": two[0],
            "mixed": two[1],
        }

    return estimator


SETTINGS = {"seed": 40, "num_keys": 9 * 2**10}


@pytest.mark.parametrize(
    ("degree", "num_keys"), [(None, 36_864), (0, 12_288), (1, 6144), (2, 6144)]
)
def test_a_halfspace(degree, num_keys):
    options = {"use_baseline": False} if degree is None else {"degree": degree}
    assert_unbiased(
        all_derivatives(smooth(halfspace, 128, sampler=px.Independent(block=16), **options)),
        exact_halfspace(),
        args=(AT, L),
        promise={"value": 0.01, "gradient": 0.02, "matrix": 0.05, "hessian": 0.1, "mixed": 0.1},
        seed=40,
        num_keys=num_keys,
    )


def corner(y):
    """1[u_0 > 0] 1[u_1 > 0] for u = L0^-1 y: it factorises at L = L0."""
    u = jnp.asarray(np.linalg.inv(np.asarray(L, np.float64)), jnp.float32) @ y
    return ((u[0] > 0) & (u[1] > 0)).astype(jnp.float32)


CORNER = np.array([0.5, -0.25])
CORNER_ARGS = (jnp.asarray(np.asarray(L, np.float64) @ CORNER, jnp.float32), L)


def exact_corner(law):
    """With x = L c, u = c + L0^-1 L eps; derivatives in x by those in c, known for any noise."""
    inverse = np.linalg.inv(np.asarray(L, np.float64))
    c = CORNER
    parts = cf.smooth_profile(cf.step, c, 1.0, law)
    value, first, second = parts["value"], parts["first"], parts["second"]
    in_c = np.array([first[0] * value[1], value[0] * first[1]])
    hessian = np.array(
        [
            [second[0] * value[1], first[0] * first[1]],
            [first[0] * first[1], value[0] * second[1]],
        ]
    )
    # In M = L0^-1 L: the diagonal has scales; off it, dP / dM_jk = E[eps_k 1[u_k > 0]] p_j(c_j).
    tail = law.ramp(c) - c * value  # E[eps 1[c + eps > 0]]
    in_m = np.diag([parts["dsigma"][0] * value[1], value[0] * parts["dsigma"][1]])
    in_m[0, 1], in_m[1, 0] = first[0] * tail[1], first[1] * tail[0]
    return {
        "value": value[0] * value[1],
        "gradient": inverse.T @ in_c,
        "hessian": inverse.T @ hessian @ inverse,
        "matrix": inverse.T @ in_m,
    }


@pytest.mark.parametrize("name", ["Normal", "Gumbel"])
def test_a_corner_in_the_coordinates_of_the_noise(name):
    noise, law = NOISES[name]
    exact = exact_corner(law)
    full = all_derivatives(smooth(corner, 128, noise, degree=2))

    def estimator(*args):
        found = full(*args)
        return {name: found[name] for name in exact}

    assert_unbiased(
        estimator,
        exact,
        args=CORNER_ARGS,
        promise={name: HALFSPACE[name] for name in exact},
        **SETTINGS,
    )


# --- Wrong estimators must fail


def wrong(mutation):
    """The score-function estimate with degree None, written down, less one of its parts."""

    def estimate(key, x, factor):
        x0, fixed = jax.lax.stop_gradient((x, factor))
        z = jax.random.normal(key, (128, 2))
        f = jax.vmap(lambda one: halfspace(x0 + fixed @ one))(z)
        moved = factor.T if mutation == "transposed" else factor
        inverse = jnp.array([[moved[1, 1], -moved[0, 1]], [-moved[1, 0], moved[0, 0]]])
        det = moved[0, 0] * moved[1, 1] - moved[0, 1] * moved[1, 0]
        whitened = (x0[None] + z @ fixed.T - x[None]) @ inverse.T / det
        density = -jnp.sum(whitened**2, axis=1) / 2
        if mutation != "no determinant":
            density -= jnp.log(det)
        return jnp.mean(f * jnp.exp(density - jax.lax.stop_gradient(density)))

    return estimate


def first_derivatives(estimate):
    return lambda *args: dict(
        zip(("gradient", "matrix"), jax.grad(estimate, argnums=(1, 2))(*args), strict=True)
    )


def test_the_protocol_finds_what_is_wrong():
    exact = {name: exact_halfspace()[name] for name in ("gradient", "matrix")}
    settings = {"args": (AT, L), "seed": 41}
    right = first_derivatives(wrong("nothing"))
    promise = {"gradient": 0.02, "matrix": 0.05}
    assert_unbiased(right, exact, num_keys=36864, promise=promise, **settings)
    for mutation in ("no determinant", "transposed"):
        estimator = first_derivatives(wrong(mutation))
        assert_biased(estimator, exact, quantities=("matrix",), num_keys=2**9, **settings)


def test_a_part_of_the_library_left_out_is_found(monkeypatch):
    """With Gumbel noise: for Normal noise s z' is symmetric, and a transpose changes nothing."""
    blocks = _matrices.Blocks
    times = blocks.times
    wrong = {
        "log_det": lambda self: jnp.zeros(()),
        "times": lambda self, z: times(blocks(tuple(r.T for r in self.blocks)), z),
    }
    for part, instead in wrong.items():
        jax.clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(blocks, part, instead)
            assert_biased(
                first_derivatives(smooth(corner, 128, px.Gumbel(), use_baseline=False)),
                {name: exact_corner(cf.gumbel)[name] for name in ("gradient", "matrix")},
                quantities=("matrix",),
                args=CORNER_ARGS,
                seed=42,
                num_keys=2**9,
            )
    jax.clear_caches()


# --- Mistakes


def call(sigma, x=X, **options):
    return px.make_perturbed_fun(jnp.sum, 8, sigma, px.Normal(), **options)(KEY, x)


@pytest.mark.parametrize(
    ("sigma", "parts"),
    [
        (np.ones((2, 2)), "matrix of shape (2, 2) for leaf 'x' .* be invertible, .*singular"),
        (jnp.zeros((2, 2)), "must be invertible, but row 0 is zero.*Cholesky factor"),
        (np.array([[0.1, 0.2], [0.3, 0.6]]), "singular to the precision of float32"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), "sigma must be finite, got nan"),
        (np.array([[1.0, 1e300], [0.0, 1.0]]), "within the range of float32"),
        (np.ones((2, 3)), "does not broadcast into leaf 'x'.*no matrix for it, of shape (2, 2)"),
    ],
)
def test_wrong_matrices_are_refused(sigma, parts):
    pattern = parts.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=pattern):
        call(sigma)


def test_scales_of_a_square_leaf_are_still_checked():
    with pytest.raises(ValueError, match=r"sigma must be > 0 .*got -1.0"):
        call(np.array([[1.0, -1.0], [1.0, 1.0]]), np.ones((2, 2), np.float32))


def test_one_matrix_does_not_serve_several_leaves():
    with pytest.raises(ValueError, match="for this leaf alone"):
        call(np.eye(2), [X, X])
    with pytest.raises(ValueError, match="sigma must be > 0"):
        call(np.eye(2), [np.outer(X, X)] * 2)


def test_units_of_coordinates_do_not_make_a_matrix_singular():
    assert np.isfinite(call(np.diag([1e-12, 1e12]), np.zeros(2, np.float32)))


@pytest.mark.parametrize(
    "sigma", [np.ones((2, 2), np.float32), np.float32([[0.1, 0.2], [0.3, 0.6]])]
)
def test_a_traced_singular_matrix_gives_nan(sigma):
    value, slope = jax.jit(jax.value_and_grad(lambda sigma, x: call(sigma, x), argnums=1))(sigma, X)
    assert np.isnan(value)
    assert np.isnan(slope).all()
    assert np.isfinite(jax.jit(call)(0.5 * np.eye(2, dtype=np.float32) - sigma))


@pytest.mark.parametrize(
    "make",
    [
        px.make_perturbed_argmax,
        px.make_perturbed_max,
        px.make_perturbed_distribution,
        lambda fun, num_samples, sigma: (
            lambda key, x: px.make_fenchel_young_loss(fun, num_samples=num_samples, sigma=sigma)(
                key, x, X
            )
        ),
    ],
)
def test_perturbed_optimizers_say_what_they_take(make):
    layer = make(px.solvers.one_hot_argmax, 8, np.asarray(L) + 0.0)
    with pytest.raises(ValueError, match=r"matrix for 'theta.*make_perturbed_fun takes"):
        layer(KEY, X)


def test_other_layers_take_matrices():
    fun = px.make_straight_through_fun(jnp.sign, 4096, np.asarray(L), px.Normal())
    np.testing.assert_allclose(fun(KEY, X), [1.0, -1.0])
    slope = jax.jit(jax.jacrev(fun, argnums=1))(KEY, X)
    s = np.linalg.norm(L, axis=1)
    exact = np.diag(2 * np.exp(-((np.asarray(X) / s) ** 2) / 2) / np.sqrt(2 * np.pi) / s)
    np.testing.assert_allclose(slope, exact, atol=0.1)
    mean = px.make_implicit_mle(px.solvers.one_hot_argmax, 4096, np.asarray(L), px.Normal())
    chance = scipy.special.ndtr(0.3 / np.linalg.norm(np.asarray(L)[0] - np.asarray(L)[1]))
    np.testing.assert_allclose(mean(KEY, X), [chance, 1 - chance], atol=0.02)
