"""The batches of a run's steps, read from the pair store ahead of the device.

Nothing here has a state: the batch of a step is a function of the seed and the step (`pairs.sample`), so that a run resumes
at any step, on any number of processes. Texts were encoded when the store was written.
"""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections

from dnd_jax import pairs, sharding


def make_read(config: ml_collections.ConfigDict, tasks: Sequence[pairs.Task], mesh: jax.sharding.Mesh
              ) -> Callable[[int], list[jax.Array]]:
    """Return `step -> [condition [B,N,L,C], tokens [B,T,H,W]]` on the mesh; each process reads its own samples only."""
    size = config.train.batch_size
    rows = sharding.local_rows(mesh, size)

    def read(step: int) -> list[jax.Array]:
        return sharding.put(mesh, size, *pairs.batch(tasks, config.seed, step, rows, config.condition.prompts))

    return read


def names(config: ml_collections.ConfigDict, tasks: Sequence[pairs.Task], step: int) -> set[str]:
    """Return the names of the tasks in the batch of a step, those of all processes."""
    return {tasks[pairs.draw(tasks, config.seed, step, i, 0)[0]].name for i in range(config.train.batch_size)}


class Prefetch:
    """Iterate over `make(first), ..., make(last - 1)`, in that order, while threads make the next `ahead` of them.

    What `make` raises is raised where its result would have come. Leaving the block waits for what is being made.

    Attributes:
      wait_s: seconds that the caller has waited for results so far; the device may have been busy meanwhile.
    """

    def __init__(self, make: Callable[[int], Any], first: int, last: int, ahead: int):
        self.wait_s = 0.0
        self._make = make
        self._steps = iter(range(first, last))
        self._threads = concurrent.futures.ThreadPoolExecutor(ahead, thread_name_prefix="input")
        self._coming: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for _ in range(ahead):
            self._start()

    def _start(self) -> None:
        if (step := next(self._steps, None)) is not None:
            self._coming.append(self._threads.submit(self._make, step))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._coming:
            raise StopIteration
        began = time.perf_counter()
        result = self._coming.popleft().result()
        self.wait_s += time.perf_counter() - began
        self._start()
        return result

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
