"""What minimize returns."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from ..diagnostics import _plots
from ..diagnostics._words import are_known, fields_of
from ._states import REASONS

# Rows of the history that are printed.
_ROWS = 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MinimizeHistory:
    """The steps of a run, an array of each of these with one element a step.

    Attributes:
      evaluations: number of evaluations made, this step's included.
      smoothed_value: estimate of the smoothed function where the step began.
      standard_error: of that estimate.
      hard_value: of the function itself where the step drew its samples around; NaN in steps that
        did not evaluate it there.
      best_value: the lowest value seen so far; of a noisy function, the lowest smoothed value.
      sigma: scale of the noise, the geometric mean over coordinates.
    """

    evaluations: Any
    smoothed_value: Any
    standard_error: Any
    hard_value: Any
    best_value: Any
    sigma: Any

    def __len__(self) -> int:
        """Number of steps."""
        return int(np.shape(self.evaluations)[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MinimizeResult:
    """What `minimize` found.

    Attributes:
      x: the best point, with the structure of x0.
      value: of the function itself at x, by fresh evaluations: one, or the mean of several of a
        noisy function.
      value_error: standard error of that mean; 0 where the function is not noisy, NaN where
        all but one of its evaluations failed.
      num_evaluations: how many evaluations were made, all told.
      history: a `MinimizeHistory`, of all steps. Under `jit` and `vmap`, where the number of
        steps must not depend on values, rows behind `num_steps` are NaN.
      num_steps: number of steps.
      status: index of the reason for stopping.
    """

    x: Any
    value: Array
    value_error: Array
    num_evaluations: Array
    history: MinimizeHistory
    num_steps: Array
    status: Array

    @property
    def reason(self) -> Any:
        """Why the run ended, in words; for a batch of runs an array of them."""
        words = np.asarray(REASONS, dtype=object)[np.asarray(self.status)]
        return words if np.ndim(words) else str(words)

    def __str__(self) -> str:
        """A table of a few of the steps, and what was found."""
        if not are_known(self) or np.ndim(self.status):
            return fields_of(self)
        steps = int(self.num_steps)
        shown = np.unique(np.linspace(0, max(steps - 1, 0), _ROWS).astype(int)) if steps else ()
        lines = [
            f"value {float(self.value):.6g}"
            + (f" ± {float(self.value_error):.2g}" if float(self.value_error) else "")
            + f" after {int(self.num_evaluations)} evaluations: {self.reason}",
            f"{'step':>8}{'evaluations':>13}{'smoothed':>13}{'± error':>11}{'best':>13}"
            f"{'sigma':>11}",
        ]
        h = self.history
        for i in shown:
            lines.append(
                f"{i:>8}{int(h.evaluations[i]):>13}{float(h.smoothed_value[i]):>13.5g}"
                f"{float(h.standard_error[i]):>11.2g}{float(h.best_value[i]):>13.5g}"
                f"{float(h.sigma[i]):>11.3g}"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, *, ax: Any = None) -> Any:
        """Draws the smoothed value with its error, the best value, and sigma, against evaluations.

        Args:
          ax: matplotlib axes to draw on; None makes some.

        Returns:
          The axes with the values; those with sigma are their twin.

        Raises:
          ImportError: if matplotlib is missing.
          ValueError: if this is a batch of runs.
        """
        if np.ndim(self.status):
            raise ValueError(
                "plot draws one run, got a batch of them; take one by jax.tree.map(lambda v: v[0], "
                "result)"
            )
        steps = int(self.num_steps)
        columns = {
            field.name: np.asarray(getattr(self.history, field.name))[:steps]
            for field in dataclasses.fields(self.history)
        }
        ax = _plots.axes(ax)
        evaluations = columns["evaluations"]
        smoothed, error = columns["smoothed_value"], columns["standard_error"]
        mark = "." if steps == 1 else None
        (line,) = ax.plot(evaluations, smoothed, marker=mark, label="smoothed value")
        band = smoothed - 2 * error, smoothed + 2 * error
        ax.fill_between(evaluations, *band, color=line.get_color(), alpha=0.25, linewidth=0)
        ax.plot(evaluations, columns["best_value"], marker=mark, label="lowest so far")
        ax.set_xlabel("evaluations")
        ax.set_ylabel("value")
        twin = ax.twinx()
        style = {"color": _plots.GREY, "linestyle": ":", "marker": mark}
        twin.plot(evaluations, columns["sigma"], **style)
        twin.set_yscale("log")
        twin.set_ylabel("sigma, dotted")
        _plots.plain_numbers(twin.yaxis)
        # Values fall, so that there is room even if the scale is changed afterwards.
        _plots.legend_above(ax, twin, ax.get_lines(), "right")
        return ax
