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

    A process alone hears Ctrl-C (SIGINT), too, once: after the block it ends by KeyboardInterrupt, and a second one ends it at
    once. It has to be in its main thread, which alone hears signals.

    Of several processes, one gets SIGTERM first: JAX then agrees on a step after which all of them are told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []

    def hear(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a shell's background
        heard.append(signal.SIGINT)
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield lambda step: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in came:
        raise KeyboardInterrupt


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
