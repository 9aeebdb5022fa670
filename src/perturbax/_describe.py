"""How the functions that the library makes are called, and how they describe themselves."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, Self

from ._checks import is_key
from ._types import Fun

_Arguments = ParamSpec("_Arguments")
# Where `describe` puts what it tells.
_TOLD = ("__name__", "__qualname__", "__doc__", "__signature__")


@dataclasses.dataclass(eq=False, repr=False)
class Made:
    """A function that was made of another one, and how: so it can be made again, and pickled.

    Else it is like any function: to `help` and `copy`, and as a method.

    Attributes:
      function: what is called.
      maker: the public function that made it.
      arguments: of that, by name.
    """

    function: Fun
    maker: Callable[..., Fun]
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        """Takes over what the function tells about itself."""
        for attribute in (*_TOLD, "__module__", "__annotations__"):
            setattr(self, attribute, getattr(self.function, attribute))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)

    def again(self, **changes: Any) -> Fun:
        """Made anew with some other arguments."""
        return self.maker(**{**self.arguments, **changes})

    def __repr__(self) -> str:
        (_, fun), *others = self.arguments.items()
        told = [repr(fun), *(f"{name}={value!r}" for name, value in others)]
        return f"{self.maker.__name__}({', '.join(told)})"

    def __reduce__(self) -> Any:
        return functools.partial(self.maker, **self.arguments), ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


def remembered(maker: Callable[_Arguments, Fun]) -> Callable[_Arguments, Fun]:
    """Has what a maker makes remember how it was made."""
    signature = inspect.signature(maker)

    @functools.wraps(maker)
    def remembering(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Fun:
        function = maker(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Made(function, remembering, dict(bound.arguments))

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
    given, named = len(args), sorted(kwargs)
    for name in names[given:]:
        if name not in kwargs:
            if given and names[0] not in kwargs and not is_key(args[0]):
                rest = ", ".join(names[1:])
                raise TypeError(
                    f"the key is missing: call g(key, {rest}), for example g(jax.random.key(0), "
                    f"{rest}); where a function without a key is asked for, give the one that was "
                    "perturbed"
                )
            raise TypeError(
                f"{name} is missing: this function is called as g({', '.join(names)}, ...), got "
                f"{given} of them by position and the names {named}"
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
    called = f"{kind}_{name}"
    for attribute, value in zip(_TOLD, (called, called, text, _signature(fun, names)), strict=True):
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
