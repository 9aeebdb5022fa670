"""Telling on standard error how far a run is."""

import sys
import time
from collections.abc import Callable
from typing import Any

# Seconds before a run says anything, and, without a bar, between two lines.
_SILENT = 1.0
_BETWEEN_LINES = 10.0


class Telling:
    """Tells evaluations, the lowest value and sigma: by tqdm's bar if it is installed."""

    def __init__(self, shown: bool, total: int, clock: Callable[[], float] = time.monotonic):
        """Starts the clock; nothing is shown before a second is over."""
        self._shown, self._total, self._clock = shown, total, clock
        self._begun = self._last = clock()
        self._bar: Any = None
        self._has_tqdm = True

    def tell(self, evaluations: int, value: float, sigma: float) -> None:
        """Shows how far the run is."""
        now = self._clock()
        if not self._shown or now - self._begun < _SILENT:
            return
        if self._bar is None and self._has_tqdm:
            try:
                from tqdm import tqdm

                self._bar = tqdm(total=self._total, unit=" evaluations", leave=False)
            except ImportError:
                self._has_tqdm = False
                self._last = now - _BETWEEN_LINES
        if self._bar is not None:
            self._bar.set_postfix_str(f"value {value:.6g}, sigma {sigma:.3g}", refresh=False)
            self._bar.update(evaluations - self._bar.n)
        elif now - self._last >= _BETWEEN_LINES:
            self._last = now
            sys.stderr.write(
                f"minimize: {evaluations} of {self._total} evaluations, value {value:.6g}, "
                f"sigma {sigma:.3g}\n"
            )

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
