"""The list of tasks: which datasets belong to which task, and its split; the checkpoints of its run."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from dnd_jax import checksums, files, sources
from dnd_jax.sources import Source
from dnd_jax.types import InputError

SPLITS = ("train", "validation", "test")
MULTI_TASK = "multi_task"  # begins the name of a run on the data of all training tasks


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's name, split, and its datasets; `test` is None for a task that is never evaluated."""

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
    if not isinstance(listed, Mapping) or not listed:
        raise InputError(f"{where}: expected tasks by name, found {str(listed)[:60]!r}")
    return [_read_task(name, entry, folder, f"{where}: {name}") for name, entry in listed.items()]


def _read_task(name: str, entry: Mapping[str, Any], folder: pathlib.Path, where: str) -> Task:
    if not re.fullmatch(r"[^/\0.][^/\0]*", name) or name.startswith(MULTI_TASK):
        raise InputError(f"{where}: a task's name is that of folders, so not {name!r}")
    if not isinstance(entry, Mapping) or (unknown := entry.keys() - {"split", "train", "test"}):
        found = sorted(unknown) if isinstance(entry, Mapping) else repr(entry)[:60]
        raise InputError(f"{where}: expected 'split', 'train' and 'test', found {found}")
    if entry.get("split") not in SPLITS:
        raise InputError(f"{where}: split is {entry.get('split')!r}, expected one of {SPLITS}")
    if "train" not in entry:
        raise InputError(f"{where}: names no 'train' file, only {sorted(entry)}")
    named = {part: sources.parse(entry[part], folder, where) for part in ("train", "test") if part in entry}
    return Task(name, entry["split"], named["train"], named.get("test"))


def multi_task(tasks: Sequence[Task]) -> str:
    """Return the name of the run on the data of all training tasks, which no other list of these has."""
    return f"{MULTI_TASK}-{files.sha256_text(json.dumps([task.name for task in tasks if task.split == 'train']))[:8]}"


def digest(run: pathlib.Path) -> str | None:
    """Return one hash of all adapters of a run; None of one that has no record of its files."""
    return checksums.digest(run, without="run.json")  # which says how long it took


def step_folders(run: pathlib.Path) -> list[pathlib.Path]:
    """Return a run's adapter folders in order of their steps."""
    found = [path for path in run.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    if not found:
        raise InputError(f"{run}: holds no step_<n> folder, one per checkpoint; run data_pipeline.collect first")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
