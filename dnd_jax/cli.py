"""What the command lines share: the `--config` flag, and bad input as one line instead of a traceback."""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from dnd_jax.types import InputError

PACKAGES = ("dnd_jax", "data_pipeline", "experiments")


def define_config(*, required: bool = True) -> None:
    """Define the flag `--config=FILE.py[:argument]`; fields are overridden by `--config.field=value`."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. experiments/configs/tenants.py.", lock_config=True)
    if required:
        flags.mark_flag_as_required("config")


class Stderr:
    """Standard error, which may be a file on a full disk, too: what can't be written there is lost, and ends nothing."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def say(text: str) -> None:
    """Print to standard output at once; if it can't be written, this and all that follows there is lost, and ends nothing."""
    try:
        print(text, flush=True)
    except OSError:  # nobody reads on, or a full disk; what waits to be written would raise it again at the end
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)


def run(main: Callable[..., None], define_flags: Callable[[], None], *, words: bool = False) -> None:
    """Define the flags, parse the command line and run `main(flags)`, or `main(flags, *words)` if it takes words.

    Bad input, a file that can't be read or written and numbers that aren't finite become one line on stderr and exit status 1.
    Flags are defined here, not at import, so that any module can import any other.
    """
    define_flags()
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app.run(lambda argv: main(flags.FLAGS, *argv[1:]), flags_parser=functools.partial(_parse_flags, words=words))
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)  # native threads of torch and jax must not delay or change the status


def _parse_flags(argv: Sequence[str], words: bool) -> list[str]:
    """Parse, and turn what a config file or a flag can do wrong into an InputError."""
    _show_all_in_help()
    given = next((a.removeprefix("--config=") for a in argv if a.startswith("--config=")), None)
    if given is not None and not os.path.exists(path := given.partition(":")[0]):
        raise InputError(f"command line: --config={given}: {path} is not there")
    try:
        rest = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.to_dict()  # a file that can't be loaded is only noticed when its config is looked at
    except (flags.Error, OSError, SyntaxError, AttributeError, LookupError, TypeError, ValueError, ImportError) as error:
        raise InputError(f"{given or 'command line'}: {_in_words(error)}") from error
    if len(rest) > 1 and not words:
        raise InputError(f"command line: unexpected arguments {rest[1:]}")
    return rest


def _show_all_in_help() -> None:
    """Let `--help` list the flags that our modules define for each other, too."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.partition(".")[0] in PACKAGES:
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _in_words(error: Exception) -> str:
    """Return what went wrong with flags or a config, without the tracebacks and quotes that absl and ml_collections add."""
    said = str(error)
    if missing := re.findall(r"flag --(\w+)=None: Flag \S+ must have a value", said):
        return f"--{' and --'.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; --help lists the flags"
    if "Traceback" in said:  # of the config file's own error
        return said.rpartition("Error: ")[2]
    if isinstance(error, AttributeError | KeyError):
        name, _, hint = said.replace("\\n", "\n").replace("\\", "").strip("'\"").partition("\n")
        return " ".join(f"no field {name.strip(chr(39))!r} there. {hint}".split())
    return f"{type(error).__name__}: {said}"


def config_words() -> list[str]:
    """Return the words that make another command's config what this one's is, however they were written."""
    fields = [name for name in flags.FLAGS if name == "config" or name.startswith("config.")]  # of fields only those given
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in fields if name != "config"}
    return [f"--{name}={tuple(values[name])!r}" if isinstance(values.get(name), list | tuple) else flags.FLAGS[name].serialize()
            for name in fields]


def config_dict(config: ml_collections.ConfigDict) -> Any:
    """Return a config as what JSON makes of it."""
    return json.loads(config_json(config))


def config_json(config: ml_collections.ConfigDict) -> str:
    """Return a config as JSON text, fields in order of their names."""
    return config.to_json_best_effort(indent=1, sort_keys=True)

