"""The list of tasks: which data sets belong to which task, and its split."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from dnd_jax import files, sources
from dnd_jax.pairs import SPLITS
from dnd_jax.sources import Source
from dnd_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's name, split, and its data sets; `test` is None for a task that is never evaluated."""

    name: str
    split: str
    train: Source
    test: Source | None


def read_tasks(source: files.PathLike | Mapping[str, Any] | ml_collections.ConfigDict) -> list[Task]:
    """Read `{"<task>": {"split": ..., "train": SOURCE, "test": SOURCE}}`, from a config or from a JSON file.

    Sources are as in `dnd_jax.sources`; files are relative to the JSON file, or to the working directory.

    Raises:
      InputError: a malformed file, an unknown split, or a dataset file that isn't there.
    """
    if isinstance(source, ml_collections.ConfigDict):
        source = source.to_dict()
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
    found = {part: sources.parse(entry[part], folder, where) for part in ("train", "test") if part in entry}
    return Task(name, entry["split"], found["train"], found.get("test"))
