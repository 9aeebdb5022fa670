"""What make_perturbed_fun returns: a function to its users, an object that tells its settings."""

import copy
import dataclasses
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px

KEY = jax.random.key(0)
X = jnp.array([0.3, -0.2, 0.1])


def weighted(x, weight=1.0):
    return weight * jnp.sum(jnp.abs(x))


class Draws:
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -(inputs**2) / 2

    def __repr__(self):
        return "Draws()"


def smooth(**settings):
    return px.make_perturbed_fun(weighted, 12, noise=Draws(), **settings)


def test_it_tells_its_settings():
    made = smooth(sigma={"a": 0.5, "b": np.ones(2)}, sampler=px.Independent(), degree=0)
    assert isinstance(made, px.PerturbedFun)
    assert made.fun is weighted
    told = repr(made.settings)
    assert "num_samples=12" in told
    assert "sigma={'a': 0.5, 'b': array([1., 1.])}" in told
    assert "noise=Draws()" in told
    assert "sampler=Independent(block=1), degree=0" in told
    assert told in repr(made)


def test_it_has_every_argument_and_default_of_the_maker():
    parameters = list(inspect.signature(px.make_perturbed_fun).parameters.values())[1:]
    maker = {p.name: p.default for p in parameters}
    assert maker == {f.name: f.default for f in dataclasses.fields(px.Settings)}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_it_can_be_pickled_and_copied(again):
    made = smooth(sigma=jnp.array(0.5))
    other = again(made)
    np.testing.assert_array_equal(other(KEY, X, 2.0), made(KEY, X, 2.0))
    assert other.__name__ == made.__name__ == "perturbed_weighted"
    assert inspect.signature(other) == inspect.signature(made)


def test_it_is_a_function_to_others():
    made = smooth()

    class Model:
        layer = made

    wrapped = functools.wraps(made)(lambda *args: made(*args))
    expected = made(KEY, X)
    assert wrapped.__name__ == made.__name__
    assert wrapped.__doc__ == made.__doc__
    for function in (wrapped, Model().layer, functools.partial(made, KEY), jax.jit(made)):
        args = (X,) if isinstance(function, functools.partial) else (KEY, X)
        np.testing.assert_allclose(function(*args), expected, rtol=1e-6)
    assert len({made, smooth(), made}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.settings.num_samples = 1


def test_other_settings_are_checked_as_well():
    made = smooth(has_aux=False)
    more = px.PerturbedFun(weighted, dataclasses.replace(made.settings, num_samples=24))
    expected = px.make_perturbed_fun(weighted, 24, noise=Draws())
    np.testing.assert_array_equal(more(KEY, X), expected(KEY, X))
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
        dataclasses.replace(made.settings, num_samples=0)
    with pytest.raises(TypeError, match="fun must be callable, got int"):
        px.PerturbedFun(1, made.settings)
