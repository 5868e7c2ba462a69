"""The folder of a training run: one run at a time, one config for ever."""

import pathlib
import re
from typing import Any

import ml_collections

from dnd_jax import cli, files, folders, pairs
from dnd_jax.types import InputError

# Fields that change no parameter of a run but by rounding; another value may resume it. `train.steps` is not among them: the
# learning rate falls to zero at the last step.
FREE = re.compile(r"evaluate\..*|model\..*|collect\.multi_task_steps|mesh\.(data|fsdp|tensor)|"
                  r"train\.(accumulate|remat|prefetch|log_every|tensorboard|keep_last|keep_every|on_failed_save)")


def check_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raise InputError unless a workdir is new, or its run goes on with this config."""
    _read_config(workdir / "config.json", cli.config_dict(config))


def claim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Write the config into a new workdir; in an old one it may differ in FREE fields only.

    Raises:
      InputError: another run is using the workdir, or it has another config; the message names every field and both values.
    """
    path, new = workdir / "config.json", cli.config_dict(config)
    _read_config(path, new)  # a refused command changes nothing
    folders.lock(workdir)
    if _read_config(path, new) != new:  # another run may have begun here meanwhile
        files.write_text(path, cli.config_json(config) + "\n")


def _read_config(path: pathlib.Path, new: Any) -> Any:
    """Return the config of a workdir, None of a new one; raise InputError if it may not become `new`."""
    old = files.read_json(path) if path.exists() else None
    found = differences(old, new) if old is not None else {}
    refused = [f"{path}: {field} is {before!r}, the config given says {given!r}"
               for field, (before, given) in sorted(found.items()) if not FREE.fullmatch(field)]
    if refused:
        raise InputError("; ".join(refused))
    return old


def check_store(store: pairs.Store, workdir: pathlib.Path) -> str:
    """Return a store's hash; raise InputError if a run was begun on other files, so that it could not go on with them."""
    path, found = workdir / pairs.SEAL, files.sha256_file(store.folder / "manifest.json")
    known = path.read_text(errors="replace") if path.exists() else found
    if known != found:
        raise InputError(f"{store.folder / 'manifest.json'}: sha256 is {found[:12]}..., {path} says {known[:12]}...: the store "
                         "has changed since this run began; use another workdir")
    return found


def keep_store(store: pairs.Store, workdir: pathlib.Path) -> None:
    """Record in a new workdir which store it is trained on, see `check_store`, and copy what adapters hold beside A and B."""
    found = check_store(store, workdir)
    if store.spec.carried:
        files.copy(store.folder / pairs.CARRIED, workdir / pairs.CARRIED)
    if not (workdir / pairs.SEAL).exists():
        files.write_text(workdir / pairs.SEAL, found)


def check_trained(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raise InputError unless a run has got to its last step; terminated, it ends before that, with status 0."""
    if not (workdir / "checkpoints" / str(config.train.steps)).is_dir():
        raise InputError(f"{workdir}: training ended before step {config.train.steps}; the same command goes on from there")


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested config by their fields, lists' by their numbers: `train.steps`, `decoder.blocks[0][2]`."""
    if isinstance(config, dict):
        parts = {f"{prefix}.{key}" if prefix else key: value for key, value in config.items()}
    elif isinstance(config, list | tuple):
        parts = {f"{prefix}[{i}]": value for i, value in enumerate(config)}
    else:
        return {prefix: config}
    return {field: value for path, part in parts.items() for field, value in leaves(part, path).items()}


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two nested configs differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in old.keys() | new.keys():
        found |= differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return found
