"""Telling on standard error how far a run is."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..host_functions._progress import backdate, has_console

# Seconds before a run says anything, and, without a bar, between two lines.
_SILENT = 1.0
_BETWEEN_LINES = 10.0
# What a run is at until its first block of steps is over.
_STARTING = "starting: compiling, first evaluations"


class Telling:
    """Tells evaluations, the lowest value and sigma: by tqdm's bar if it is installed."""

    def __init__(self, shown: bool, total: int, clock: Callable[[], float] = time.monotonic):
        """Starts the clock."""
        self._shown, self._total, self._clock = shown and has_console(), total, clock
        self._begun = self._last = clock()
        # From where rates are told: when, and how many evaluations had been made.
        self._since, self._made = self._begun, 0
        self._told = False
        self._bar: Any = None
        self._appeared = False
        self._lock = threading.RLock()
        # Compiling, or the first evaluations, may take long before there is anything to tell.
        self._timer = threading.Timer(_SILENT, self._appear_at_last)
        self._timer.daemon = True

    def begin(self) -> None:
        """Has the bar appear by itself once a second is over; to be closed from here on."""
        if self._shown:
            with contextlib.suppress(RuntimeError):  # no more threads
                self._timer.start()

    def _appear_at_last(self) -> None:
        # Of a stream that takes nothing, the run is told where it tells how far it is.
        with self._lock, contextlib.suppress(OSError, ValueError, AttributeError):
            if self._shown:
                self._appear()

    def _appear(self) -> None:
        if self._appeared:
            return
        self._appeared = True
        try:
            from tqdm import tqdm
        except ImportError:
            state = "" if self._told else f", {_STARTING}"
            sys.stderr.write(f"minimize: {self._made} of {self._total} evaluations{state}\n")
            return
        unit = " evaluations"
        self._bar = tqdm(total=self._total, initial=self._made, unit=unit, leave=False)
        backdate(self._bar, self._clock() - self._since)
        if not self._told:
            self._bar.set_postfix_str(_STARTING)

    def _count_from_here(self, evaluations: int) -> None:
        """Has the bar count from now on: the first block was compiled in the time before."""
        before, self._since, self._made = self._since, self._clock(), evaluations
        self._told = True
        if self._bar is not None:
            self._bar.n = self._bar.initial = self._bar.last_print_n = evaluations
            backdate(self._bar, before - self._since)
            self._bar.refresh()

    def tell(self, evaluations: int, value: float, sigma: float) -> None:
        """Shows how far the run is."""
        with self._lock:
            now = self._clock()
            # Of a run without a value yet there is none to be shown.
            lowest = "-" if value == math.inf else f"{value:.6g}"
            state = f"value {lowest}, sigma {sigma:.3g}"
            if self._bar is not None:
                self._bar.set_postfix_str(state, refresh=False)
            if not self._told:
                self._count_from_here(evaluations)
            if not self._shown or now - self._begun < _SILENT:
                return
            self._appear()
            if self._bar is not None:
                self._bar.set_postfix_str(state, refresh=False)
                self._bar.update(evaluations - self._bar.n)
            elif now - self._last >= _BETWEEN_LINES:
                self._last = now
                sys.stderr.write(f"minimize: {evaluations} of {self._total} evaluations, {state}\n")

    def close(self) -> None:
        """Takes the bar away."""
        self._timer.cancel()
        with self._lock:
            self._shown = False
            if self._bar is not None:
                self._bar.close()
