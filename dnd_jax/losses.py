"""The training loss: squared error of weight tokens, masked and weighted by importance."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dnd_jax.types import Tokens


def token_loss(
    predicted: Tokens, target: Tokens, mask: Bool[Array | np.ndarray, "T H W"], importance: Float[Array | np.ndarray, " T"]
) -> Float[Array, " B"]:
    """Return per example, in float32,  sum_thw m_thw i_t (y_thw - t_thw)^2 / sum_thw m_thw.

    Args:
      predicted: `[B, T, H, W]`.
      target: `[B, T, H, W]`; ignored, NaN allowed, where the mask is false.
      mask: true where a position carries a value.
      importance: one weight per token.
    """
    error = predicted.astype(jnp.float32) - jnp.where(mask, target, 0)
    square = jnp.where(mask, jnp.square(error), 0) * importance[:, None, None]
    return square.sum((1, 2, 3)) / mask.sum()


def norm_ratio(predicted: Tokens, target: Tokens, mask: Bool[Array | np.ndarray, "T H W"]) -> Float[Array, " B"]:
    """Return per example the norm of the predicted tokens over that of the target's: 0 predicts nothing, 1 full strength."""
    norms = [jnp.sqrt(jnp.where(mask, jnp.square(x.astype(jnp.float32)), 0).sum((1, 2, 3))) for x in (predicted, target)]
    return norms[0] / norms[1]


def add_noise(rng: jax.Array, x: Float[Array, "..."], amplitude: float) -> Float[Array, "..."]:
    """Return x plus Gaussian noise of the given standard deviation."""
    return x + amplitude * jax.random.normal(rng, x.shape, x.dtype)
