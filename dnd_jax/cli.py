"""What the command lines share: the `--config` flag, and bad input as one line instead of a traceback."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from dnd_jax.types import InputError


def define_config() -> Any:
    """Define the required flag `--config=FILE.py[:argument]`; fields are overridden by `--config.field=value`."""
    return config_flags.DEFINE_config_file("config", None, "Config file, e.g. experiments/configs/tenants.py", lock_config=True)


def run(main: Callable[..., None], required: Sequence[str] = ()) -> None:
    """Run `main(argv)` under absl; an InputError becomes one line on stderr and exit status 1.

    Args:
      main: takes what is left of the command line.
      required: names of flags that must be given.
    """
    flags.mark_flags_as_required(list(required))
    try:
        app.run(main, flags_parser=_parse_flags)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)  # native threads of torch and jax must not delay or change the status


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, OSError, SyntaxError, AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
        config = next((a for a in argv if a.startswith("--config=")), "")
        raise InputError(f"{' '.join([*config.split(), ''])}{type(error).__name__}: {error}") from error


def config_json(config: ml_collections.ConfigDict) -> str:
    """Return a config as JSON text, fields in order of their names."""
    return config.to_json_best_effort(indent=1, sort_keys=True)


def given(flag: flags.FlagHolder[str | None]) -> str:
    """Return the value of a flag that `run` required."""
    assert flag.value is not None
    return flag.value
