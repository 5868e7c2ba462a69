"""Train the decoder on a pair store.

    python -m dnd_jax.train --config=experiments/configs/tenants.py --workdir=build/tenants/run

The same command again resumes: every step's batch and noise are functions of the seed and the step alone. Several
processes run it as one (`distributed.py`).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from dnd_jax import checkpoints, cli, distributed, embeddings, guards, inputs, logs, optimizers, pairs, sharding, workdirs
from dnd_jax.adapters import keys
from dnd_jax.decoder import HyperConvDecoder, decoder_of
from dnd_jax.losses import add_noise, norm_ratio, token_loss
from dnd_jax.settings import check_here, check_processes, check_store
from dnd_jax.tokens import mask_of
from dnd_jax.types import InputError, Params
from dnd_jax.validation import make_validate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes, and the key that its noise is derived from."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    rng: jax.Array


# --- state -----------------------------------------------------------------------------------------------------------


def make_decoder(config: ml_collections.ConfigDict, store: pairs.Store) -> HyperConvDecoder:
    """Return the decoder from a condition of the store to its weight tokens, as the config wants it trained."""
    length, width = store.tasks[0].condition.shape[1:]
    decoder = decoder_of(config, length, width, store.layout.shape)
    return decoder.clone(dtype=optimizers.dtype_of(config, "compute_dtype"), remat=config.train.remat)


def make_state(config: ml_collections.ConfigDict, decoder: HyperConvDecoder, mesh: jax.sharding.Mesh,
               tasks: Sequence[pairs.Task] = (), restore: Callable[[State], State | None] = lambda like: None) -> State:
    """Return what `restore` makes of the abstract state, or else a new one, on the mesh.

    It is initialised in jit, so that no device holds more than its part, and not at all where there is one to restore. Given
    tasks, the first norm starts calibrated on their conditions. Moments are float32 whatever the parameters are kept in.
    """
    tx, dtype = optimizers.make_optimizer(config), optimizers.dtype_of(config, "param_dtype")
    calibrated = calibrate(tasks) if tasks else {}

    def init(rng: jax.Array) -> State:
        init_rng, rng = jax.random.split(rng)
        params = decoder.init(init_rng, jnp.zeros((1, *decoder.condition_shape)))["params"]
        params["layers_0"]["norm"] |= calibrated
        opt_state = tx.init(params)
        return State(jnp.zeros((), jnp.int32), optax.tree.cast(params, dtype), opt_state, rng)

    key = jax.random.key(config.seed, impl="threefry2x32")
    shapes = jax.eval_shape(init, key)
    places = sharding.of_state(mesh, shapes)
    like = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)
    return restore(like) or jax.jit(init, out_shardings=places)(key)


def calibrate(tasks: Sequence[pairs.Task]) -> dict[str, jax.Array]:
    """Return scale and bias `[L, C]` that take mean and deviation off each position of the normalised conditions.

    Prompts of all tasks are mostly alike; without this the decoder spends its first hundreds of steps at the mean
    adapter before it sees how they differ. Beyond the paper.
    """
    x = np.concatenate([task.condition for task in tasks]).astype(np.float32)
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    scale = 1 / (x.std(0) + 0.1)
    return {"scale": jnp.asarray(scale), "bias": jnp.asarray(-x.mean(0) * scale)}


# --- one step --------------------------------------------------------------------------------------------------------


def make_train_step(config: ml_collections.ConfigDict, decoder: HyperConvDecoder, mesh: jax.sharding.Mesh, mask: np.ndarray,
                    importance: np.ndarray) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """Return `(state, condition [B,N,L,C], tokens [B,T,H,W]) -> (state, metrics)`, a pure function.

    Losses, gradients and updates are float32 for any `param_dtype` and `compute_dtype`. With `accumulate`, microbatches
    follow each other; noise is drawn for the whole batch, so that their number changes no result but by rounding.
    """
    tx, dtype = optimizers.make_optimizer(config), optimizers.dtype_of(config, "param_dtype")
    t = config.train

    def loss_fn(params: Params, condition: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        predicted: jax.Array = decoder.apply({"params": params}, condition)  # type: ignore[assignment]
        return token_loss(predicted, tokens, mask, importance).mean(), norm_ratio(predicted, tokens, mask).mean()

    def train_step(state: State, condition: jax.Array, tokens: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        condition_rng, token_rng = jax.random.split(jax.random.fold_in(state.rng, state.step))
        noisy_condition = add_noise(condition_rng, condition.astype(jnp.float32), t.condition_noise).astype(decoder.dtype)
        noisy_tokens = add_noise(token_rng, tokens, t.token_noise)
        params = optax.tree.cast(state.params, jnp.float32)
        (loss, ratio), gradients = mean_gradient(loss_fn, params, mesh, t.accumulate, noisy_condition, noisy_tokens)
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        params = optimizers.stochastic_round(jax.random.fold_in(token_rng, 0), optax.apply_updates(params, updates), dtype)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients), "norm_ratio": ratio}
        return State(state.step + 1, params, opt_state, state.rng), metrics

    return train_step


def mean_gradient(loss_fn: Callable[..., tuple[jax.Array, jax.Array]], params: Params, mesh: jax.sharding.Mesh, count: int,
                  *batch: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """Return both values of `loss_fn`, and the first one's gradient, as means over `count` microbatches, one after another."""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        return gradient(params, *batch)

    def add(total: Any, part: Sequence[jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), sharding.of_params(mesh, params))
    total, _ = jax.lax.scan(add, ((jnp.zeros(()), jnp.zeros(())), zeros), sharding.microbatches(mesh, count, *batch))
    return jax.tree.map(lambda x: x / count, total)


# --- the loop --------------------------------------------------------------------------------------------------------


def train(config: ml_collections.ConfigDict, store: pairs.Store, workdir: pathlib.Path) -> None:
    """Train from the latest sound checkpoint, or from the start, to `config.train.steps`.

    Writes `checkpoints/<step>` every `validate_every` steps, with the losses on the validation tasks, which choose the best
    one, and appends to `metrics.jsonl`. SIGTERM saves the step under way, validated only if it is such a step, and returns;
    so does Ctrl-C of a process alone, and raises KeyboardInterrupt.

    Raises:
      FloatingPointError: a loss, a gradient or a parameter that isn't finite, before anything of it is saved.
      OSError: a checkpoint or the log can't be written, at once or, where `on_failed_save` is "continue", in the end if it was
        the last checkpoint, or the log still can't.
    """
    with guards.until_terminated() as terminated:
        _train(config, store, workdir, terminated)


def _train(config: ml_collections.ConfigDict, store: pairs.Store, workdir: pathlib.Path, terminated: Callable[[int], bool]
           ) -> None:
    t = config.train
    mesh = sharding.make_mesh(config.mesh)
    decoder = make_decoder(config, store).clone(mesh=mesh)
    tasks, mask = store.split("train"), mask_of(store.layout)
    validate = make_validate(config, store.split("validation"), decoder, mesh, mask, store.importance)
    checkpointer = checkpoints.Checkpointer(workdir / "checkpoints", about(config, store, decoder), t.keep_last, t.keep_every)
    state = make_state(config, decoder, mesh, tasks if t.calibrate else (), checkpointer.restore)
    places = sharding.of_state(mesh, state)  # not the arrays' own: Orbax restores the key with the sharding of one more axis
    sharding.check_moments(state)
    if mesh.size > 1:
        cli.say(f"{mesh.size} devices, {dict(mesh.shape)}: each holds {sharding.share_of_device(mesh, state.params):.1%} of the "
                "parameters")
    train_step = jax.jit(make_train_step(config, decoder, mesh, mask, store.importance), donate_argnums=0,
                         out_shardings=(places, None))
    first, rate = int(state.step), optimizers.schedule(config)

    def names(done: int) -> set[str]:
        return inputs.names(config, tasks, done - 1)  # batches are counted from 0

    watch = guards.Watch(names, checkpointer.last_good)
    bar = tqdm(range(first, t.steps), initial=first, total=t.steps, desc="train", mininterval=1.0,
               file=cli.Stderr(), disable=not distributed.is_first())
    with (checkpointer, logs.MetricsLog(workdir, first, distributed.is_first(), t.tensorboard) as log,
          inputs.Prefetch(inputs.make_read(config, tasks, mesh), first, t.steps, t.prefetch) as batches):
        for step, batch in zip(bar, batches, strict=False):
            done = step + 1
            state, metrics = train_step(state, *batch)
            watch.follow(done, metrics)
            stops = terminated(done)
            validates = done % t.validate_every == 0 or done == t.steps
            saves = validates or stops  # on SIGTERM nothing is validated out of turn: that may take longer than is left
            if not (saves or done % t.log_every == 0):
                continue
            watch.check()
            if saves:
                checkpointer.wait()  # as the next save must; whether the last one failed is known then
            if checkpointer.failed() and t.on_failed_save == "stop":
                return  # closing the checkpointer raises what it was
            entry = {name: float(value) for name, value in metrics.items()} | {"learning_rate": float(rate(step))}
            if validates:
                entry |= validate(state.params)
            if saves:
                overflow = {} if guards.all_finite(state) else {"a parameter or moment after the update": math.inf}
                guards.check_finite(entry | overflow, done, names, checkpointer.last_good)
            entry = log.append(done, entry, t.batch_size, batches.wait_s)
            if log.failure and t.on_failed_save == "stop":
                raise log.failure
            bar.set_postfix(loss=f"{entry['loss']:.4f}")
            if saves:
                checkpointer.save(done, state, entry)
            if stops:
                checkpointer.wait()
                if checkpointer.failure is None:
                    cli.say(f"terminated: step {done} is saved, the same command goes on from there")
                return


def about(config: ml_collections.ConfigDict, store: pairs.Store, decoder: HyperConvDecoder) -> dict[str, Any]:
    """Return what a checkpoint must say so that one can generate from it."""
    return {
        **decoder.to_json(), "config": cli.config_dict(config), "layout": store.layout.to_json(), "spec": store.manifest["spec"],
        "encoder": store.manifest["encoder"], "encoder_sha256": store.manifest["encoder_sha256"],
        "form": store.manifest["form"], "base": store.manifest["base"],
        "carried": keys.count_kinds(store.spec), "carried_sha256": store.manifest["sha256"].get(pairs.CARRIED),
        "averaged": store.manifest["averaged"],
        "runs_sha256": {t.name: store.run_of(t.name) for t in store.split("train")},
        "embeddings": {t.name: embeddings.pool(t.condition).round(6).tolist() for t in store.split("train")},
    }


def define_flags() -> None:
    cli.define_config()
    distributed.define_flags()
    flags.DEFINE_string("workdir", None, required=True, help="Folder for checkpoints, config and metrics.")


def main(args: Any) -> None:
    with distributed.joined(args):
        run(args.config, pathlib.Path(args.workdir))


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Open the config's store, make the workdir this run's, and train."""
    check_here(config)
    store = pairs.open_store(config.export.store)
    check_processes(config, store)
    check_store(config, store)
    if not store.split("train"):
        raise InputError(f"{config.export.store}: has no train task, training needs at least one")
    if not store.split("validation"):
        cli.say(f"{config.export.store}: has no validation task, so the last checkpoint is the one that counts")

    def claim() -> None:
        workdirs.claim(config, workdir)
        workdirs.keep_store(store, workdir)

    distributed.by_first(claim)
    train(config, store, workdir)


if __name__ == "__main__":
    cli.run(main, define_flags)
