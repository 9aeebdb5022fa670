"""Pictures of what was measured, by matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np

GREY, BAND, BLUE, RED = "0.6", "#cfdcec", "#1f4e8c", "#b3400e"


def axes(ax: Any) -> Any:
    """The axes to draw into, new ones if None.

    Raises:
      ImportError: without matplotlib.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(
            "plots need matplotlib: pip install 'perturbax[plots]', or pip install matplotlib"
        ) from None
    return plt.subplots(layout="constrained")[1]


def plot_errors(
    ax: Any,
    measured: Sequence[tuple[int, float, float]],
    wanted: float,
    suggested: int | None,
    ends: tuple[float, float],
    now: tuple[int, float],
) -> Any:
    """Relative errors against numbers of samples: measured, asked for, as it is now."""
    ax = axes(ax)
    if measured:
        numbers, errors, freedom = np.array(measured, np.float64).T
        # Of the root of a mean of so many squares, 90 %.
        spread = np.exp(1.645 / np.sqrt(2 * np.maximum(freedom, 1)))
        bars = [errors - errors / spread, errors * spread - errors]
        ax.errorbar(numbers, errors, bars, fmt="o", color=BLUE, ms=4, label="measured")
    ax.axhline(wanted, color=GREY, lw=1, ls="--", label="asked for")
    if suggested is not None:
        ax.axvspan(*ends, color=BAND, lw=0)
        ax.axvline(suggested, color=RED, label=f"suggested: {suggested:,} samples")
    if np.isfinite(now[1]):
        ax.plot(*now, "D", mfc="none", color=RED, label="as it is")
    ax.set(xscale="log", yscale="log", xlabel="samples", ylabel="relative error of the gradient")
    ax.legend(frameon=False)
    return ax
