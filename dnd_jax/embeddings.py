"""One vector for a batch of prompts, and which tasks' are alike. Pure NumPy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float


def pool(condition: Float[np.ndarray, "N L C"]) -> Float[np.ndarray, " C"]:
    """Return one embedding of a prompt batch: the mean over prompts and positions."""
    return condition.astype(np.float32).mean((0, 1))


def positions(condition: Float[np.ndarray, "N L C"]) -> Float[np.ndarray, " L*C"]:
    """Return the mean over prompts, each position for itself."""
    return condition.astype(np.float32).mean(0).ravel()


def extremes(condition: Float[np.ndarray, "N L C"]) -> Float[np.ndarray, " 3*C"]:
    """Return mean, maximum and minimum over prompts and positions: what a single prompt says isn't lost in a mean."""
    x = condition.astype(np.float32)
    return np.concatenate([x.mean((0, 1)), x.max((0, 1)), x.min((0, 1))])


def position_extremes(condition: Float[np.ndarray, "N L C"]) -> Float[np.ndarray, " 3*L*C"]:
    """Return mean, maximum and minimum over prompts, each position for itself."""
    x = condition.astype(np.float32)
    return np.concatenate([x.mean(0).ravel(), x.max(0).ravel(), x.min(0).ravel()])


# What tells more than the pooled embedding, and is in the conditions that a decoder sees.
WIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "positions": positions, "extremes": extremes, "position extremes": position_extremes}


def similarities(query: Float[np.ndarray, " C"], known: Float[np.ndarray, "K C"]) -> Float[np.ndarray, " K"]:
    """Return cosines between a query and known embeddings, after their common mean is taken off."""
    center = known.mean(0)
    a, b = query - center, known - center
    return (b @ a) / (np.linalg.norm(a) * np.linalg.norm(b, axis=1) + 1e-12)
