"""How many derivatives a law of noise is good for, and an error where more are asked for.

The score-function method differentiates the density. Where that has a kink or a jump, automatic
differentiation does not see it, and every derivative from some order on is silently wrong.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from .._checks import check_log_prob
from .._types import PyTree
from ..tracing._dependence import is_zero, varies


class Limit(NamedTuple):
    """The most derivatives that a law of noise is good for.

    Attributes:
      law: how an error names the noise.
      derivatives: the number of derivatives, in x and sigma together; may be infinite.
      reason: why there are no more; completes "its density ...".
      remedy: what else to do than to use another noise; a clause, or nothing.
    """

    law: str
    derivatives: float
    reason: str
    remedy: str = ""

    def error(self, order: int) -> NotImplementedError:
        """What to raise where a derivative of the given order is asked for."""
        good_for = (
            "values only" if self.derivatives < 1 else f"derivatives of order {self.derivatives}"
        )
        return NotImplementedError(
            f"a derivative of order {order} was asked for, but the noise {self.law} is good for "
            f"{good_for} (orders in x and in sigma add up): its density {self.reason}. Use noise "
            f"with a smooth density on the whole line, such as Normal(), Logistic() or Gumbel()"
            f"{self.remedy}"
        )


def limit_derivatives(inputs: ArrayLike, limit: Limit, taken: int = 0) -> Array:
    """`inputs` as they are; their derivatives beyond those that `limit` allows raise.

    The argument of a function is the place for this, whatever the function is: its k-th derivative
    needs the k-th derivative of the argument. Raised while JAX traces, by forward and reverse mode
    alike, and not where the derivative is with respect to something else.

    Args:
      inputs: what a log-density (or another function) is about to be evaluated at.
      limit: how many derivatives may be taken.
      taken: how many derivatives the function stands for itself: 1 for a score.

    Raises:
      NotImplementedError: if more than `limit.derivatives` are taken.
    """
    inputs = jnp.asarray(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(jax.dtypes.canonicalize_dtype(float))
    if taken > limit.derivatives:
        raise limit.error(taken)
    return _limited(limit, taken)(inputs)


@functools.cache
def _limited(limit: Limit, taken: int) -> Callable[[Array], Array]:
    """The identity, with derivatives as far as `limit` allows.

    What the rule closes over is plain data and other such identities, so that two traces of a
    function that contains it can be told to be equal.
    """

    @jax.custom_jvp
    def identity(inputs: Array) -> Array:
        return inputs

    @functools.partial(identity.defjvp, symbolic_zeros=True)
    def identity_jvp(primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
        (inputs,), (inputs_dot,) = primals, tangents
        if isinstance(inputs_dot, SymbolicZero):
            return identity(inputs), jnp.zeros_like(inputs)
        if taken >= limit.derivatives:
            raise limit.error(taken + 1)
        # One more is taken, here and in all that is computed from here on.
        return _limited(limit, taken + 1)(inputs), inputs_dot

    del identity_jvp
    return identity


def visible_limit(log_prob: Callable[[Array], Array], inputs: PyTree, law: str) -> Limit | None:
    """The limit that the operations of a log-density give away, or None.

    A score that is the same everywhere belongs to no density on the whole line: that of Uniform,
    or of Exponential, jumps. A score that is constant in pieces jumps itself: the density, that of
    Laplace, for example, has a kink.

    Args:
      log_prob: log-density, element by element or of all elements together.
      inputs: an array, or the shape and dtype of one.
      law: how an error shall name the noise.
    """

    def total(z: Array) -> Array:
        value = log_prob(z)
        check_log_prob(value)
        return jnp.sum(value)

    score = jax.grad(total)
    if not varies(score, inputs):
        return Limit(law, 0, "has a score that is the same everywhere, so it jumps somewhere")
    if not is_zero(jax.grad(lambda v: jnp.sum(score(v))), inputs):
        return None
    if not _falls_at_both_ends(score, inputs):
        return Limit(law, 0, "jumps: its score is constant far out, and not of the sign of z")
    return Limit(law, 1, "has a score that is constant in pieces, so it has a kink somewhere")


def _falls_at_both_ends(score: Callable[[Array], Array], inputs: PyTree) -> bool:
    """Whether a density whose score is constant far out falls there; if unknown, that it does."""
    try:
        with jax.ensure_compile_time_eval():
            far = jnp.full(inputs.shape, 1e6, inputs.dtype)
            slopes = [np.asarray(score(z)) for z in (-far, far)]
    except jax.errors.TracerArrayConversionError:  # parameters that are not known yet
        return True
    return bool((slopes[0] > 0).all() and (slopes[1] < 0).all())
