"""Intervals by bootstrap over tasks and, inside them, items."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 4000


class Bootstrap:
    """The same resamples of tasks and items for every quantity, so that differences are paired."""

    def __init__(self, items: Sequence[int], seed: int = 0):
        """Draw the resamples for tasks with the given numbers of items."""
        rng = np.random.default_rng(seed)
        counts = np.asarray(items)
        self._tasks: Int[np.ndarray, "R S"] = rng.integers(len(counts), size=(RESAMPLES, len(counts)))
        uniform = rng.random((RESAMPLES, len(counts), counts.max()))
        chosen = counts[self._tasks][..., None]
        self._items = np.minimum((uniform * chosen).astype(np.int64), chosen - 1)
        self._valid = np.arange(counts.max()) < chosen

    def interval(self, scores: Sequence[Float[np.ndarray, " I"]]) -> tuple[float, list[float]]:
        """Return the mean over tasks of their mean score, and its 95% interval.

        Args:
          scores: per task, one score an item (a mean over prompt draws, or a paired difference).
        """
        width = self._items.shape[2]
        padded = np.stack([np.pad(np.asarray(s, np.float64), (0, width - len(s))) for s in scores])
        drawn = padded[self._tasks[..., None], self._items]
        means = ((drawn * self._valid).sum(2) / self._valid.sum(2)).mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(np.mean([np.mean(s) for s in scores])), [float(low), float(high)]
