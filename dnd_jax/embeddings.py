"""One vector for a batch of prompts, and which tasks' are alike. Pure NumPy."""

import numpy as np
from jaxtyping import Float


def pool(condition: Float[np.ndarray, "N L C"]) -> Float[np.ndarray, " C"]:
    """Return one embedding of a prompt batch: the mean over prompts and positions."""
    return condition.astype(np.float32).mean((0, 1))


def similarities(query: Float[np.ndarray, " C"], known: Float[np.ndarray, "K C"]) -> Float[np.ndarray, " K"]:
    """Return cosines between a query and known embeddings, after their common mean is taken off."""
    center = known.mean(0)
    a, b = query - center, known - center
    return (b @ a) / (np.linalg.norm(a) * np.linalg.norm(b, axis=1) + 1e-12)
