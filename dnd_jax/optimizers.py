"""The optimizer of the decoder, and the dtype that parameters are kept in."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dnd_jax.types import InputError, Params

DTYPES = ("float32", "bfloat16")


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Return AdamW with clipping by global norm, linear warm-up and a cosine to zero (paper, section 4.1).

    `config.train.optimizer = "adamw_factored"` keeps of the second moment only its sums over rows and columns, as Adafactor
    does (Shazeer & Stern, arXiv 1804.04235), of kernels with 128 channels or more: 4 bytes a parameter instead of 8.
    """
    t, rate = config.train, schedule(config)
    clip = optax.clip_by_global_norm(t.clip_norm)
    if t.optimizer == "adamw":
        return optax.chain(clip, optax.adamw(rate, weight_decay=t.weight_decay))
    if t.optimizer == "adamw_factored":
        return optax.chain(
            clip, optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.ema(0.9),
            optax.add_decayed_weights(t.weight_decay), optax.scale_by_learning_rate(rate),
        )
    raise InputError(f"config.train.optimizer is {t.optimizer!r}, expected 'adamw' or 'adamw_factored'")


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the steps done before."""
    t = config.train
    return optax.warmup_cosine_decay_schedule(0.0, t.learning_rate, t.warmup_steps, t.steps)


def dtype_of(config: ml_collections.ConfigDict, field: str) -> jnp.dtype:
    """Return `config.train.param_dtype` or `compute_dtype` as a dtype."""
    if (name := config.train[field]) not in DTYPES:
        raise InputError(f"config.train.{field} is {name!r}, expected one of {DTYPES}")
    return jnp.dtype(name)


def stochastic_round(rng: jax.Array, params: Params, dtype: jnp.dtype) -> Params:
    """Return float32 parameters in the dtype that they are kept in, by stochastic rounding if that is bfloat16.

    There is no float32 copy, which saves half of the parameters' memory. It costs noise: a parameter moves in steps of 2^-8
    of itself, mostly larger than an update. Chance keeps its mean right; the nearest value would be the old one,
    and training would stand still.
    """
    if dtype == jnp.float32:
        return params
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(rng, len(leaves))
    return jax.tree.unflatten(structure, [_round(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def _round(rng: jax.Array, x: jax.Array) -> jax.Array:
    """Return float32 as bfloat16, up with a chance equal to the part of the step that is cut off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(rng, x.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
