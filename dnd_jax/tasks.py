"""The list of tasks: which dataset files belong to which task, and its split."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dnd_jax import files
from dnd_jax.pairs import SPLITS
from dnd_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's name, split, and its dataset files; `test` is None for a task that is never evaluated."""

    name: str
    split: str
    train: pathlib.Path
    test: pathlib.Path | None


def read_tasks(source: files.PathLike | Mapping[str, Mapping[str, str]]) -> list[Task]:
    """Read `{"<task>": {"split": ..., "train": FILE, "test": FILE}}`, from a config or from a JSON file.

    Files are relative to the JSON file, or to the working directory.

    Raises:
      InputError: a malformed file, an unknown split, or a dataset file that isn't there.
    """
    if isinstance(source, Mapping):
        where, folder, listed = "config.tasks", pathlib.Path(), source
    else:
        where, folder, listed = str(source), pathlib.Path(source).parent, files.read_json(source)
    return [_read_task(name, entry, folder, f"{where}: {name}") for name, entry in listed.items()]


def _read_task(name: str, entry: Mapping[str, Any], folder: pathlib.Path, where: str) -> Task:
    if entry.get("split") not in SPLITS:
        raise InputError(f"{where}: split is {entry.get('split')!r}, expected one of {SPLITS}")
    if "train" not in entry:
        raise InputError(f"{where}: names no 'train' file, only {sorted(entry)}")
    found = {part: folder / entry[part] for part in ("train", "test") if part in entry}
    for file in found.values():
        if not file.is_file():
            raise InputError(f"{where}: {file} is not there")
    return Task(name, entry["split"], found["train"], found.get("test"))
