"""What JAX does that the files in tracing/ work around, in plain JAX: each fails once it is mended.

A failure here is good news. It names what may be deleted, once the oldest release of JAX that is
supported behaves like this one.
"""

import contextlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.extend import core

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
RELEASE = tuple(map(int, jax.__version__.split(".")[:2]))


@jax.custom_jvp
def zero(x):
    """A number that does not depend on x, with a derivative that does."""
    return jnp.zeros(())


zero.defjvp(lambda primals, tangents: (zero(*primals), primals[0] * tangents[0]))


def test_results_of_derivative_rules_are_still_batched_like_those_of_the_function():
    """jax#16374: a rule's results, more batched than the function's, are summed over the batch."""
    x, weight = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 10.0, 100.0])

    def gradient(function):
        return jax.grad(lambda x: jnp.sum(weight * function(x)))(x)

    np.testing.assert_allclose(gradient(jax.vmap(zero)), weight * x)
    try:
        found = gradient(jax.vmap(jax.jit(zero)))
    except (TypeError, ValueError):
        return
    assert not np.allclose(found, weight * x), "no longer needed: delete `aligned`"


@pytest.mark.skipif(RELEASE > (0, 11), reason="allowed on 0.12")
def test_side_effects_are_still_refused_in_derivative_rules():
    """jax#11916: allowed for each kind of effect by itself, and not for callbacks' own."""
    number = jax.ShapeDtypeStruct((), np.float32)

    @jax.custom_jvp
    def asked(x):
        return io_callback(lambda v: v, number, x)

    asked.defjvp(lambda primals, tangents: (asked(*primals), tangents[0]))
    with jax.enable_checks(True):
        try:
            jax.block_until_ready(jax.jit(asked)(1.0))
        except NotImplementedError as error:
            assert "not supported in `custom_jvp`" in str(error)  # noqa: PT017
            return
    pytest.fail("no longer needed: delete the branches on `jaxpr.effects`")


def traces(context):
    """How often a jitted function is traced for a value and its derivative."""
    count = []

    @jax.jit
    def inner(x):
        count.append(x)
        return jnp.sin(x)

    @jax.custom_jvp
    def outer(x):
        with context():
            return inner(x)

    @outer.defjvp
    def outer_jvp(primals, tangents):
        with context():
            return inner(*primals), tangents[0]

    jax.value_and_grad(jax.jit(outer))(1.0)
    return len(count)


@pytest.mark.skipif(RELEASE > (0, 11), reason="told everywhere on 0.12")
def test_a_mesh_is_still_told_in_derivative_rules_alone():
    """What is traced for a value is not found again for its derivative."""
    told = lambda: jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())  # noqa: E731
    assert traces(told) == 1
    assert traces(contextlib.nullcontext) > 1, "no longer needed: delete `in_told_mesh`"


def test_equal_traces_are_still_different_objects():
    """jax#1221: a jaxpr is equal to itself alone, so that a new trace means a new compilation."""
    first, second = (jax.make_jaxpr(lambda x: 2 * x)(1.0).jaxpr for _ in range(2))
    assert str(first) == str(second)
    assert first != second, "no longer needed: delete the signatures of `TracedFunction`"


def test_numbers_are_still_part_of_a_trace():
    """A function that differs in a number alone is another program."""
    [eqn] = jax.make_jaxpr(lambda x: 0.5 * x)(1.0).jaxpr.eqns
    told = "no longer needed: delete `_with_numbers_as_operands`"
    assert any(isinstance(v, core.Literal) for v in eqn.invars), told


@pytest.mark.parametrize(
    ("old", "since", "name"),
    [
        ("aval.vma", (0, 10), "manual_axis_type"),
        ("in_told_mesh", (0, 12), "a mesh that is told everywhere"),
        ("branches on jaxpr.effects", (0, 12), "side effects in derivative rules"),
        ("core.Jaxpr beside core.ClosedJaxpr", (0, 12), "core.Jaxpr with constants"),
    ],
)
def test_old_names_are_still_supported(old, since, name):
    [minimum] = re.findall(r'"jax>=([\d.]+)"', PROJECT.read_text())
    minimum = tuple(map(int, minimum.split(".")))
    assert minimum < since, f"no longer needed: {old}; {name} is in every release supported"
