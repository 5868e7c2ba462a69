"""The list of tasks: which dataset files belong to which task, and its split."""

import dataclasses
import pathlib

from dnd_jax import files
from dnd_jax.pairs import SPLITS
from dnd_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """A task's name, split, and its dataset files; `test` is None for a task that is never evaluated."""

    name: str
    split: str
    train: pathlib.Path
    test: pathlib.Path | None


def read_tasks(path: files.PathLike) -> list[TaskFiles]:
    """Read `tasks.json`: `{"<task>": {"split": ..., "train": FILE, "test": FILE}}`, files relative to it.

    Raises:
      InputError: a malformed file, an unknown split, or a dataset file that isn't there.
    """
    path = pathlib.Path(path)
    tasks = []
    for name, entry in files.read_json(path).items():
        if entry.get("split") not in SPLITS:
            raise InputError(f"{path}: {name}: split is {entry.get('split')!r}, expected one of {SPLITS}")
        if "train" not in entry:
            raise InputError(f"{path}: {name}: names no 'train' file, only {sorted(entry)}")
        found = {part: path.parent / entry[part] for part in ("train", "test") if part in entry}
        for file in found.values():
            if not file.is_file():
                raise InputError(f"{path}: {name}: {file} is not there")
        tasks.append(TaskFiles(name, entry["split"], found["train"], found.get("test")))
    return tasks
