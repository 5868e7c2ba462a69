"""The folder of a training run: one run at a time, one config for ever."""

import json
import pathlib
from typing import Any

import ml_collections

from dnd_jax import cli, files
from dnd_jax.types import InputError

# Fields that change no parameter of a run but by rounding; another value may resume it. `train.steps` is not among them: the
# learning rate falls to zero at the last step.
FREE = frozenset({"mesh.data", "mesh.fsdp", "mesh.tensor", "train.prefetch", "train.log_every", "train.tensorboard",
                  "train.keep_last", "train.keep_every", "train.on_failed_save"})


def claim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Write the config into a new workdir; in an old one it may differ in FREE fields only.

    Raises:
      InputError: another run is using the workdir, or it has another config; the message names every field and both values.
    """
    path = workdir / "config.json"
    new = json.loads(cli.config_json(config))
    old = files.read_json(path) if path.exists() else None
    if old is not None:
        found = {field: values for field, values in differences(old, new).items() if field not in FREE}
        if found:
            raise InputError("; ".join(f"{path}: {field} is {old!r}, the config given says {given!r}"
                                       for field, (old, given) in sorted(found.items())))
    files.lock(workdir)
    if old != new:
        files.write_text(path, cli.config_json(config) + "\n")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two nested configs differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in old.keys() | new.keys():
        found |= differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return found
