"""How the functions that the library makes are called, and how they describe themselves."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

from ._types import Fun

_Arguments = ParamSpec("_Arguments")


class Made(NamedTuple):
    """How a function was made, which says so by its attribute `made`.

    Attributes:
      function: the function. What wraps it takes over its attributes, but is not it.
      maker: the public function that made it.
      arguments: of that, by name.
    """

    function: Fun
    maker: Callable[..., Fun]
    arguments: dict[str, Any]

    def again(self, **changes: Any) -> Fun:
        """Made anew with some other arguments."""
        return self.maker(**{**self.arguments, **changes})


def remembered(maker: Callable[_Arguments, Fun]) -> Callable[_Arguments, Fun]:
    """Has what a maker makes remember how it was made, for diagnostics."""
    signature = inspect.signature(maker)

    @functools.wraps(maker)
    def remembering(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Fun:
        function = maker(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        function.__dict__["made"] = Made(function, maker, dict(bound.arguments))
        return function

    return remembering


def leading(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """`args` with those of `names` in front that are not given by position.

    They are taken out of `kwargs`. Names are looked at only for what is missing by position, for
    the user's function may have arguments of these names itself.

    Raises:
      TypeError: if one of them is missing.
    """
    for name in names[len(args) :]:
        if name not in kwargs:
            raise TypeError(
                f"{name} is missing: this function is called as g({', '.join(names)}, ...), got "
                f"{len(args)} of them by position and the names {sorted(kwargs)}; where a function "
                "without a key is asked for, give the one that was perturbed"
            )
        args = (*args, kwargs.pop(name))
    return args


def describe(
    made: Fun,
    kind: str,
    fun: Fun,
    names: tuple[str, ...],
    maker: str,
    does: str,
) -> None:
    """Gives a function that was made of another one a name, a docstring and a signature of its own.

    Args:
      made: the function.
      kind: what its name starts with.
      fun: what it was made of.
      names: of its first arguments.
      maker: the name of the public function that made it.
      does: the first sentence of its docstring, with {name} in place of fun's name.
    """
    name = getattr(fun, "__name__", None)
    name = name if isinstance(name, str) else type(fun).__name__
    text = (
        f"{does.format(name=name)}\n\n"
        "`key` is one PRNG key, which is consumed. Further arguments are handed on. Made by\n"
        f"`perturbax.{maker}`, whose documentation says more."
    )
    told = {"__name__": f"{kind}_{name}", "__doc__": text, "__signature__": _signature(fun, names)}
    for attribute, value in {**told, "__qualname__": told["__name__"]}.items():
        object.__setattr__(made, attribute, value)  # what is made may be frozen


def _signature(fun: Fun, names: tuple[str, ...]) -> inspect.Signature:
    """`names`, then the further parameters of fun, if these can be told and have other names.

    Reading it from the parameters of what was made would tell nothing but (*args, **kwargs).
    """
    kind = inspect.Parameter
    own = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in names]
    rest = kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)
    try:
        first, *others = inspect.signature(fun).parameters.values()
        if first.kind == kind.VAR_POSITIONAL:
            others = [first, *others]
        return inspect.Signature([*own, *others])
    except (TypeError, ValueError):
        return inspect.Signature([*own, *rest])
