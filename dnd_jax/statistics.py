"""Intervals by bootstrap over tasks and items."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 4000
AT_ONCE = 1 << 24  # numbers


def nested_interval(scores: Sequence[Float[np.ndarray, " I"]]) -> tuple[float, list[float]]:
    """Return the mean over tasks of their mean score, and its 95% interval, where each task has items of its own.

    Tasks are resampled, and items within each. The resamples depend on the numbers of items alone, so that they are the same for
    all quantities, and intervals of differences are paired.

    Args:
      scores: per task, one score an item (a mean over prompt draws, or a paired difference).
    """
    counts = np.array([len(s) for s in scores])
    padded = np.stack([np.pad(np.asarray(s, np.float64), (0, counts.max() - len(s))) for s in scores])
    means = [((padded[tasks[..., None], items] * valid).sum(2) / valid.sum(2)).mean(1)
             for tasks, items, valid in _resamples(counts)]
    return float(np.mean([np.mean(s) for s in scores])), _middle(np.concatenate(means))


def _resamples(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield resamples, some at a time: tasks `[R, S]`, items `[R, S, I]`, and which of these are any."""
    rng, number, width = np.random.default_rng(0), len(counts), counts.max()
    tasks = rng.integers(number, size=(RESAMPLES, number))
    for part in np.array_split(tasks, math.ceil(RESAMPLES * number * width / AT_ONCE)):
        chosen = counts[part][..., None]
        items = np.minimum((rng.random((*part.shape, width)) * chosen).astype(np.int64), chosen - 1)
        yield part, items, np.arange(width) < chosen


def crossed_interval(scores: Float[np.ndarray, "S I"]) -> tuple[float, list[float]]:
    """Return the mean over tasks and items, and its 95% interval, where all tasks have the same items."""
    rng, (number, width) = np.random.default_rng(0), scores.shape
    means = [scores[rng.integers(number, size=number)].mean(0)[rng.integers(width, size=width)].mean() for _ in range(RESAMPLES)]
    return float(scores.mean()), _middle(means)


def _middle(means: Sequence[float] | np.ndarray) -> list[float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(low), float(high)]
