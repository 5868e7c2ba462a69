"""What ends a training run before its last step: a signal, or a value that isn't finite."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils


@contextlib.contextmanager
def until_terminated() -> Iterator[Callable[[int], bool]]:
    """Yield a function that tells after a step whether SIGTERM has come; it no longer ends the process while the block runs.

    A process alone has to be in its main thread, which alone hears signals.

    Of several processes, one gets it first: JAX then agrees on a step after which all of them are told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def check_finite(metrics: Mapping[str, Any], step: int, names: Callable[[int], set[str]], last_good: Callable[[], str]) -> None:
    """Raise FloatingPointError unless every metric is finite.

    The message names step, metric, the tasks of the batch, `names(step)`, or a metric's own, and the last good checkpoint,
    `last_good()`.
    """
    for name, value in sorted(metrics.items(), key=lambda metric: "/" not in metric[0]):  # a task's loss before their mean
        if not math.isfinite(value):
            tasks = [name.partition("/")[2]] if "/" in name else sorted(names(step))
            raise FloatingPointError(f"step {step}: {name} is {float(value)}, tasks {tasks}; {last_good()}")


class Watch:
    """Checks each step's metrics while the next step runs, so that the device never waits for it.

    At most two steps are under way at a time; more would hold their batches on the device.
    """

    def __init__(self, names: Callable[[int], set[str]], last_good: Callable[[], str]):
        self._about = names, last_good
        self._step, self._metrics = 0, dict[str, jax.Array]()

    def follow(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take note of a step that has been started; raise FloatingPointError if the one before was not finite."""
        self.check()
        self._step, self._metrics = step, metrics

    def check(self) -> None:
        """Wait for the step noted last; raise FloatingPointError if it was not finite."""
        check_finite(jax.device_get(self._metrics), self._step, *self._about)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Tell whether every number of a state is finite: an update can overflow where loss and gradient did not."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
