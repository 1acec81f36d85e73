"""Clock, card and types that the rows of `benchmarks.gpu` share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

Found = dict[str, Any]


def median_seconds(step: Callable[[], Any], *, repeats: int) -> float:
    """Return the median seconds of a step that ends when its result is on the host, after two that are not timed."""
    seconds = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def device() -> Any:
    """Return torch's card, or its CPU where there is none, set up for speed."""
    import torch

    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def host(value: Any) -> float:
    """Wait for a value of torch or JAX, and return it as a number."""
    return float(value)
