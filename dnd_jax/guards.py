"""What ends a training run before its last step: a signal, or a value that isn't finite."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def until_terminated() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM has come; it no longer ends the process while the block runs."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def check_finite(metrics: dict[str, float], step: int, names: set[str]) -> None:
    """Raise FloatingPointError naming step, metric and the tasks of the batch unless every metric is finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is {value}, tasks {sorted(names)}")
