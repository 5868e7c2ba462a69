"""What ends a training run before its last step: a signal, or a value that isn't finite."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def until_terminated() -> Iterator[Callable[[int], bool]]:
    """Yield a function that tells after a step whether SIGTERM has come; it no longer ends the process while the block runs.

    Of several processes, one gets it first: JAX then agrees on a step after which all of them are told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def check_finite(metrics: dict[str, float], step: int, names: set[str]) -> None:
    """Raise FloatingPointError naming step, metric and the tasks of the batch unless every metric is finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is {value}, tasks {sorted(names)}")
