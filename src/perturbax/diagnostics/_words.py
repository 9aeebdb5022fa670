"""Numbers as the reports of diagnostics tell them."""

from typing import Any

import jax
import numpy as np


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


def numbers_of(value: Any, error: Any = None) -> str:
    """The first few numbers of a pytree, with their errors."""
    flat = _flat(value)
    words = [f"{v:.5g}" for v in flat[:3]]
    if error is not None:
        words = [f"{word} ± {e:.1g}" for word, e in zip(words, _flat(error), strict=False)]
    more = f", ... ({flat.size:,} numbers)" if flat.size > 3 else ""
    return ", ".join(words) + more


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)] or [np.zeros(0)])
