"""The optimizer of the decoder."""

import ml_collections
import optax


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Return AdamW with clipping by global norm, linear warm-up and a cosine to zero (paper, section 4.1)."""
    t = config.train
    rate = optax.warmup_cosine_decay_schedule(0.0, t.learning_rate, t.warmup_steps, t.steps)
    return optax.chain(optax.clip_by_global_norm(t.clip_norm), optax.adamw(rate, weight_decay=t.weight_decay))
