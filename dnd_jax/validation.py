"""The loss on validation tasks, which chooses the best checkpoint."""

import functools
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np

from dnd_jax import pairs, sharding
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.losses import token_loss
from dnd_jax.types import Params


def validation_batch(tasks: Sequence[pairs.Task], config: ml_collections.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Return fixed prompt draws of every validation task, and its last checkpoint as the target.

    Returns:
      Conditions float16 `[V, N, L, C]` and tokens float32 `[V, T, H, W]`, V = tasks x `validation_draws`, task after task.
    """
    conditions, tokens = [], []
    for number, task in enumerate(tasks):
        for draw in range(config.train.validation_draws):
            rng = np.random.default_rng((config.seed, pairs.VALIDATION, number, draw))
            conditions.append(task.condition[pairs.draw_prompts(rng, len(task.condition), config.condition.prompts)])
            tokens.append(task.tokens[-1])
    return np.stack(conditions), np.stack(tokens)


def make_validate(config: ml_collections.ConfigDict, tasks: Sequence[pairs.Task], decoder: HyperConvDecoder,
                  mesh: jax.sharding.Mesh, mask: np.ndarray, importance: np.ndarray) -> Callable[[Params], dict[str, float]]:
    """Return `params -> {"validation_loss": mean, "validation_loss/<task>": ...}`, which is empty without validation tasks.

    Args:
      config: of the run.
      tasks: the validation tasks.
      decoder: as it is trained.
      mesh: on which the parameters lie.
      mask: bool `[T, H, W]`, where tokens hold weights.
      importance: float32 `[T]`, of each token in the loss.
    """
    if not tasks:
        return lambda params: {}

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def evaluate(params: Params, condition: jax.Array, tokens: jax.Array) -> jax.Array:
        predicted: jax.Array = decoder.apply({"params": params}, condition)  # type: ignore[assignment]
        return token_loss(predicted, tokens, mask, importance)

    batch = validation_batch(tasks, config)
    count = len(batch[0])
    size = min(count, max(1, config.train.batch_size // config.train.accumulate))  # what a step has room for
    chunks = [np.arange(start, start + size) % count for start in range(0, count, size)]  # all alike: one compilation

    def validate(params: Params) -> dict[str, float]:
        found = [np.asarray(evaluate(params, *sharding.put_filled(mesh, *(a[rows] for a in batch))))[:size] for rows in chunks]
        losses = np.concatenate(found)[:count].reshape(len(tasks), -1).mean(1)
        return {"validation_loss": float(losses.mean())} | {
            f"validation_loss/{task.name}": float(loss) for task, loss in zip(tasks, losses, strict=True)}

    return validate
