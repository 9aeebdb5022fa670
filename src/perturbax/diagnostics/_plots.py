"""Pictures of what was measured, by matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._words import one_digit

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


def plain_numbers(axis: Any, unit: float = 1) -> None:
    """Ticks of a logarithmic axis written out, of so many units.

    At 1, 2 and 5 if it is neither short nor long: it may be left without any of these.
    """
    import matplotlib.ticker

    low, high = axis.get_view_interval()
    if high < 1e3 * low:
        few = matplotlib.ticker.MaxNLocator(4, steps=(1, 2, 5, 10))
        some = matplotlib.ticker.LogLocator(subs=(1, 2, 5))
        axis.set_major_locator(few if high < 10 * low else some)
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter(lambda v, _: f"{unit * v:,.6g}")


def legend_above(ax: Any, twin: Any, handles: Sequence[Any], side: str) -> None:
    """A legend in a strip of its own, at a side of the top of axes drawn above their twin."""
    ax.set_zorder(twin.get_zorder() + 1)
    ax.patch.set_visible(False)
    twin.patch.set_visible(True)
    legend = ax.legend(handles=handles, loc=f"upper {side}", frameon=False)
    legend.set_in_layout(False)  # lest narrow axes become narrower
    strip = min(legend.get_window_extent().height / max(ax.bbox.height, 1), 0.5)
    for one in (ax, twin):
        scale = one.yaxis.get_transform()
        low, high = scale.transform(one.get_ylim())
        top = scale.inverted().transform([low + (high - low) / (1 - strip)])[0]
        one.set_ylim(top=top, auto=None)


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
    ax.set(xscale="log", yscale="log", xlabel="samples")
    plain_numbers(ax.xaxis)
    plain_numbers(ax.yaxis, 100)
    ax.set_ylabel("relative error of the gradient, %")
    ax.legend(framealpha=1, edgecolor="none")
    return ax


def plot_sweep(
    ax: Any,
    sigmas: np.ndarray,
    hard_value: float,
    values: tuple[np.ndarray, np.ndarray],
    lengths: tuple[np.ndarray, np.ndarray],
    suggested: tuple[float, float] | None,
) -> Any:
    """Smoothed values, and lengths of gradients on a second axis, with bands of two errors."""
    ax = axes(ax)
    twin = ax.twinx()
    handles = [ax.axhline(hard_value, color=GREY, lw=1, ls="--", label="hard value")]
    if suggested is not None:
        handles += [twin.axvspan(*suggested, color=BAND, lw=0, label="worth using")]
    _band(ax, sigmas, *values, BLUE, "smoothed value")
    ax.set(xscale="log", xlabel="sigma")
    ax.set_ylabel("smoothed value", color=BLUE)
    _band(twin, sigmas, *lengths, RED, "length of the gradient")
    twin.set_ylabel("length of the gradient", color=RED)
    twin.set_ylim(bottom=0)
    legend_above(ax, twin, handles, "left")
    return ax


def plot_line(
    ax: Any,
    t: np.ndarray,
    hard: tuple[np.ndarray, np.ndarray],
    smooth: tuple[np.ndarray, np.ndarray],
    tangent: tuple[float, float, float],
) -> Any:
    """A function (at points of its own), its smoothed version with a band, and its tangent.

    The tangent is given by the value at 0, the slope, and the error of the slope.
    """
    ax = axes(ax)
    ax.plot(*hard, color=GREY, lw=1, label="function")
    _band(ax, t, *smooth, BLUE, "smoothed")
    value, slope, error = tangent
    reach = 0.4 * np.array([t[0], t[-1]])
    ax.plot(
        reach, value + slope * reach, color=RED, label=f"tangent {slope:.3g} ± {one_digit(error)}"
    )
    low, high = value + (slope - 2 * error) * reach, value + (slope + 2 * error) * reach
    ax.fill_between(reach, low, high, color=RED, alpha=0.15, lw=0)
    ax.plot(0, value, "o", color=RED, ms=4)
    ax.legend(frameon=False)
    return ax


def _band(ax: Any, at: np.ndarray, middle: np.ndarray, error: np.ndarray, color: str, label: str):
    ax.plot(at, middle, color=color, label=label)
    ax.fill_between(at, middle - 2 * error, middle + 2 * error, color=color, alpha=0.2, lw=0)
