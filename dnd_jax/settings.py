"""What a config must be like for a run to start: numbers that mean something, sizes that fit, the same in all processes."""

import json
import math
from typing import Any

import ml_collections

from dnd_jax import cli, distributed, files, optimizers, pairs, sharding, workdirs
from dnd_jax.types import InputError

COUNTS = ("condition.prompts", "decoder.kernel_size", *(f"train.{name}" for name in (  # at least 1
    "accumulate", "batch_size", "keep_last", "log_every", "prefetch", "steps", "validate_every", "validation_draws")))
INDICES = ("seed", "train.keep_every", "train.warmup_steps")  # at least 0
AMOUNTS = tuple(f"train.{name}" for name in ("clip_norm", "condition_noise", "learning_rate", "token_noise", "weight_decay"))
OTHERS = ("mesh", "decoder.blocks", "decoder.shortened", *(f"train.{name}" for name in (
    "calibrate", "compute_dtype", "on_failed_save", "optimizer", "param_dtype", "remat", "tensorboard")))


def check_anywhere(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at settings that no run can start with anywhere."""
    _check_numbers(config)
    t = config.train
    if t.on_failed_save not in ("stop", "continue"):
        raise InputError(f"config.train.on_failed_save is {t.on_failed_save!r}, expected 'stop' or 'continue'")
    if t.clip_norm == 0:
        raise InputError(f"config.train.clip_norm is {t.clip_norm}, expected a positive number")
    if t.warmup_steps >= t.steps:
        raise InputError(f"config.train.warmup_steps is {t.warmup_steps}, expected fewer than config.train.steps, {t.steps}")
    sharding.microbatch_size(t.batch_size, t.accumulate)
    optimizers.make_optimizer(config)
    for name in ("param_dtype", "compute_dtype"):
        optimizers.dtype_of(config, name)
    if t.calibrate and config.decoder.shortened:
        raise InputError("config.train.calibrate is set, and config.decoder.shortened, too: no norm sees whole conditions then")


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at a field that is missing, a number that isn't finite or is too small, and sizes that are none."""
    for field in (*COUNTS, *INDICES, *AMOUNTS, *OTHERS):
        section, _, name = field.rpartition(".")
        if name not in (config.get(section, {}) if section else config):
            raise InputError(f"config.{field} is missing")
    values = workdirs.leaves(config.to_dict())
    for field, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{field} is {value}, expected a finite number")
    for field in (*COUNTS, *INDICES, *AMOUNTS):
        check_number(f"config.{field}", values[field], int(field in COUNTS), whole=field not in AMOUNTS)
    for block in config.decoder.blocks:
        if not isinstance(block, list | tuple) or len(block) != 3:
            raise InputError(f"config.decoder.blocks has {block!r}, expected three numbers (N, L, C)")
        for size in block:
            check_number(f"config.decoder.blocks has {tuple(block)}, where a size", size, 1)
    if config.decoder.shortened is not None:
        check_number("config.decoder.shortened", config.decoder.shortened, 1)


def check_number(name: str, value: Any, least: int, whole: bool = True) -> None:
    """Raise InputError unless a value is a number, or a whole one of 64 bits, and no smaller than `least`."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise InputError(f"{name} is {value!r}, expected a {'whole ' * whole}number")
    if not least <= value < 2**63:
        raise InputError(f"{name} is {value}, expected at least {least}" + " and less than 2^63" * (value >= 2**63))


def check_here(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at settings that no run can start with here, before `workdirs.claim` binds the workdir to them."""
    check_anywhere(config)
    t, mesh = config.train, sharding.make_mesh(config.mesh)
    size = sharding.microbatch_size(t.batch_size, t.accumulate)
    if size % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise InputError(f"config.train.batch_size is {t.batch_size}, in {t.accumulate} microbatches (config.train.accumulate) "
                         f"of {size} examples, which config.mesh.data x config.mesh.fsdp = {parts} devices don't divide")


def check_store(config: ml_collections.ConfigDict, store: pairs.Store) -> None:
    """Raise InputError unless a store was exported with the encoder, form and gauge of the config."""
    known = {"encoder": store.manifest["encoder"], "condition.form": store.manifest["form"],
             "export.gauge": store.manifest["gauge"]}
    wanted = {"encoder": config.encoder.to_dict(), "condition.form": config.condition.form, "export.gauge": config.export.gauge}
    if found := workdirs.differences(known, wanted):
        said = [f"config.{field} is {new!r}, {store.folder} was exported with {old!r}" for field, (old, new) in found.items()]
        raise InputError(f"{'; '.join(said)}; export again")


def check_processes(config: ml_collections.ConfigDict, store: pairs.Store) -> None:
    """Raise InputError, in all processes, unless all have one config and one store; their parameters would drift apart."""
    own = {"config": cli.config_dict(config), "store": files.sha256_file(store.folder / "manifest.json")}
    first, *others = map(json.loads, distributed.texts(json.dumps(own)))
    for number, other in enumerate(others, 1):
        found = [f"{field} is {theirs!r}, process 0 has {ours!r}"
                 for field, (ours, theirs) in sorted(workdirs.differences(first, other).items())]
        if found:
            raise InputError(f"process {number}: {'; '.join(found)}")
