"""Moments in closed form."""

import math
from collections.abc import Callable


def even_moment(order: int, moment: Callable[[int], float]) -> float:
    """A moment of a symmetric law, whose even ones are `moment(order)`."""
    check_order(order)
    return 0.0 if order % 2 else float(moment(order))


def check_order(order: int) -> None:
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"order must be an int >= 0, got {order!r}")


def zeta(k: int) -> float:
    """Riemann's zeta function at k >= 2, by Euler's and Maclaurin's formula."""
    n = 20
    head = math.fsum(i**-k for i in range(1, n))
    tail = n ** (1 - k) / (k - 1) + n**-k / 2 + k * n ** (-k - 1) / 12
    tail -= k * (k + 1) * (k + 2) * n ** (-k - 3) / 720
    return head + tail + math.prod(range(k, k + 5)) * n ** (-k - 5) / 30240
