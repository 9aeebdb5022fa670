"""A bar that shows how far the evaluations of a host function are, where they take a while."""

import math
import sys
import time
from typing import Any

# No bar for what takes less, in seconds.
_PATIENCE = 1.0


def check_progress(progress: bool) -> bool:
    """The argument; raises ImportError where what draws the bar is missing."""
    if progress:
        _tqdm()
    return progress


def _tqdm() -> Any:
    try:
        from tqdm import auto
    except ImportError as error:
        raise ImportError(
            "progress=True draws its bar with tqdm: pip install 'perturbax[progress]'"
        ) from error
    return auto.tqdm


def has_console() -> bool:
    """Whether there is a standard error to tell something on; under pythonw there is none."""
    return sys.stderr is not None


def backdate(bar: Any, seconds: float) -> None:
    """Has a bar of tqdm count from so long ago, for its rates and for the time that is left."""
    bar.start_t -= seconds
    bar.last_print_t = bar.start_t


class Bar:
    """The bar of one call back: drawn once it has taken a second.

    Attributes:
      interval: how often it wants to be updated, in seconds.
    """

    def __init__(self, shown: bool, name: str, total: int):
        """A bar for `total` points."""
        self._shown = shown and has_console()
        self._name, self._total = name, total
        self._since = time.monotonic()
        self._bar: Any = None
        self.interval = 0.2 if self._shown else math.inf

    def update(self, done: int, counts: Any) -> None:
        """Draws that so many points are done, and how many attempts failed."""
        if not self._shown:
            return
        if self._bar is None:
            if time.monotonic() - self._since < _PATIENCE:
                return
            self._bar = _tqdm()(total=self._total, desc=self._name, unit="point", leave=False)
            backdate(self._bar, time.monotonic() - self._since)
        self._bar.set_postfix(failures=counts.failures, retries=counts.retries, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
