"""What a config must be like for a run to start: numbers that mean something, sizes that fit, the same in all processes."""

import json
import math

import ml_collections

from dnd_jax import cli, distributed, files, optimizers, pairs, sharding, workdirs
from dnd_jax.types import InputError


def check_anywhere(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at settings that no run can start with anywhere."""
    t = config.train
    if t.on_failed_save not in ("stop", "continue"):
        raise InputError(f"config.train.on_failed_save is {t.on_failed_save!r}, expected 'stop' or 'continue'")
    values = workdirs.leaves(config.to_dict())
    for field, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{field} is {value}, expected a finite number")
    counts = ("accumulate", "batch_size", "keep_last", "log_every", "prefetch", "steps", "validate_every", "validation_draws")
    amounts = ("keep_every", "learning_rate", "weight_decay", "condition_noise", "token_noise")
    for least, fields in ((1, ("condition.prompts", "decoder.kernel_size", *(f"train.{name}" for name in counts))),
                          (0, ("seed", *(f"train.{name}" for name in amounts)))):
        for field in fields:
            if values[field] < least:
                raise InputError(f"config.{field} is {values[field]}, expected at least {least}")
    if t.clip_norm <= 0:
        raise InputError(f"config.train.clip_norm is {t.clip_norm}, expected a positive number")
    if not 0 <= t.warmup_steps < t.steps:
        raise InputError(f"config.train.warmup_steps is {t.warmup_steps}, expected fewer than config.train.steps, {t.steps}")
    optimizers.make_optimizer(config)
    for name in ("param_dtype", "compute_dtype"):
        optimizers.dtype_of(config, name)
    if t.calibrate and config.decoder.shortened:
        raise InputError("config.train.calibrate is set, and config.decoder.shortened, too: no norm sees whole conditions then")


def check_here(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at settings that no run can start with here, before `workdirs.claim` binds the workdir to them."""
    check_anywhere(config)
    t, mesh = config.train, sharding.make_mesh(config.mesh)
    size = sharding.microbatch_size(t.batch_size, t.accumulate)
    if size % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise InputError(f"config.train.batch_size is {t.batch_size}, in {t.accumulate} microbatches (config.train.accumulate) "
                         f"of {size} examples, which config.mesh.data x config.mesh.fsdp = {parts} devices don't divide")


def check_processes(config: ml_collections.ConfigDict, store: pairs.Store) -> None:
    """Raise InputError, in all processes, unless all have one config and one store; their parameters would drift apart."""
    own = {"config": cli.config_dict(config), "store": files.sha256_file(store.folder / "manifest.json")}
    first, *others = map(json.loads, distributed.texts(json.dumps(own)))
    for number, other in enumerate(others, 1):
        found = [f"{field} is {theirs!r}, process 0 has {ours!r}"
                 for field, (ours, theirs) in sorted(workdirs.differences(first, other).items())]
        if found:
            raise InputError(f"process {number}: {'; '.join(found)}")
