"""Names of types that Python cannot tell."""

from collections.abc import Callable
from typing import Any, TypeAlias

# Arrays in nested tuples, lists, dictionaries and the like; or one array.
PyTree: TypeAlias = Any
# A user's function: of a pytree and further arguments of any kind.
Fun: TypeAlias = Callable[..., PyTree]
