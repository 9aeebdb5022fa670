"""Numbers, and tables of them, as results and reports tell them."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

# Longest line of a report.
_WIDTH = 100


def are_known(tree: Any) -> bool:
    """Whether all leaves are numbers that can be looked at: not traced, nor their shapes alone."""
    return all(
        isinstance(leaf, int | float | complex | np.ndarray | np.generic | jax.Array)
        and not isinstance(leaf, Tracer)
        and getattr(leaf, "is_fully_addressable", True)
        for leaf in jax.tree.leaves(tree)
    )


def fields_of(value: Any) -> str:
    """A dataclass or a named tuple as Python prints it, for one of which no numbers are known."""
    names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]
    told = ", ".join(f"{name}={getattr(value, name)!r}" for name in names)
    return f"{type(value).__name__}({told})"


def columns_of(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Lines of a table, whose columns are aligned on the right, or on the left if among `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(text: str, j: int) -> str:
        return text.ljust(widths[j]) if j in left else text.rjust(widths[j])

    return ["  ".join(cell(text, j) for j, text in enumerate(row)).rstrip() for row in rows]


def wrapped(head: str, text: str) -> str:
    """Both in one line, or in several of which the further ones are indented by the head."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def percent(share: float) -> str:
    """A share, with two digits."""
    if not np.isfinite(share):
        return f"{share:.0f}"
    number = 100 * share
    return f"{number:.2g} %" if number < 99.5 else f"{number:,.0f} %"


def count_of(number: float) -> str:
    """A large number without its digits behind the point."""
    return f"{number:,.0f}" if number < 1e9 else f"{number:.1e}"


def seconds_of(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds * 1e9:.2g} ns"


def one_digit(number: float) -> str:
    """A number with one digit, below a million without a power of ten."""
    text = f"{number:.1g}"
    return f"{float(text):.0f}" if 10 <= float(text) < 1e6 else text


def numbers_of(
    value: Any, error: Any = None, *, to: Any = None, most: int = 3, digits: int = 5
) -> str:
    """The first few numbers of a pytree, with their errors, or other ends of intervals."""
    flat = _flat(value)
    words = [f"{v:.{digits}g}" for v in flat[:most]]
    if error is not None:
        words = [f"{word} ± {one_digit(e)}" for word, e in zip(words, _flat(error), strict=False)]
    if to is not None:
        ends = zip(words, _flat(to), strict=False)
        words = [f"{word} to {end:.{digits}g}" for word, end in ends]
    more = f", ... ({flat.size:,} numbers)" if flat.size > most else ""
    return ", ".join(words) + more


def wide(value: Any) -> np.ndarray:
    """In double precision."""
    value = np.asarray(value)
    return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)] or [np.zeros(0)])
