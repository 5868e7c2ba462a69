"""The loss against its formula, written out."""

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.losses import add_noise, token_loss


def test_masked_weighted_mean_of_squares():
    predicted = jnp.array([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    target = jnp.array([[[[0.0, jnp.nan]], [[1.0, 1.0]]]])
    mask = np.array([[[True, False]], [[True, True]]])
    loss = token_loss(predicted, target, mask, np.array([2.0, 0.5], np.float32))
    np.testing.assert_allclose(loss, [(2 * 1 + 0.5 * (4 + 9)) / 3], rtol=1e-6)


def test_padding_has_no_gradient_and_no_nan():
    mask = np.array([[[True, False]]])
    target = jnp.array([[[[0.5, jnp.nan]]]])
    gradient = jax.grad(lambda y: token_loss(y, target, mask, np.ones(1)).sum())(jnp.ones((1, 1, 1, 2)))
    np.testing.assert_allclose(gradient, [[[[1.0, 0.0]]]])


def test_loss_is_float32_for_bfloat16_predictions():
    loss = token_loss(jnp.ones((1, 1, 1, 2), jnp.bfloat16), jnp.zeros((1, 1, 1, 2)), np.ones((1, 1, 2), bool), np.ones(1))
    assert loss.dtype == jnp.float32


def test_noise_has_the_amplitude_asked_for():
    noise = add_noise(jax.random.key(0), jnp.zeros(100_000), 1e-2)
    np.testing.assert_allclose(noise.std(), 1e-2, rtol=0.02)
