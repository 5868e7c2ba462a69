"""The pair store: prompts and weight tokens of every task, memory-mapped; any sample is a pure function of its place.

    store/manifest.json                      format, base model, adapter spec, layout, encoder, tasks, hashes
    store/manifest.sha256                    hash of manifest.json
    store/importance.npy                     float32 [T]
    store/carried.safetensors                what generated adapters hold beside A and B, if anything
    store/tasks/<task>/tokens.npy            float32 [K, T, H, W], one entry per checkpoint
    store/tasks/<task>/condition.npy         float16 [P, L, C], one entry per prompt
    store/tasks/<task>/prompts.json          the P texts, prompts or, by the config's form, with answers
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float

from dnd_jax import files
from dnd_jax.adapters import Spec
from dnd_jax.tokens import Layout
from dnd_jax.types import InputError

FORMAT = 3
# Second number of a generator's seed, where it is no step. NumPy fills seeds up with zeros: (s, 1, i, 0) is sample i of step 1.
VALIDATION, CONDITION, RANDOM_TEXT, RANDOM_ADAPTER = 1, 2, 3, 4
CARRIED = "carried.safetensors"
SEAL = "manifest.sha256"
NAMES = rf"{SEAL}|{CARRIED}|importance.npy|tasks"  # of what a store holds beside its manifest, as a pattern


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a store: `tokens` float32 `[K, T, H, W]` and `condition` float16 `[P, L, C]`, memory-mapped; its P prompts."""

    name: str
    split: str
    tokens: np.ndarray
    condition: np.ndarray
    prompts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened pair store; arrays are memory maps."""

    folder: pathlib.Path
    manifest: dict[str, Any]
    layout: Layout
    spec: Spec
    importance: np.ndarray
    tasks: tuple[Task, ...]

    def split(self, name: str) -> tuple[Task, ...]:
        return tuple(task for task in self.tasks if task.split == name)

    def run_of(self, task: str) -> str | None:
        """Return the hash of the run whose adapters a task has; None if the store doesn't know it, or not the task."""
        return self.manifest["tasks"].get(task, {}).get("run_sha256")


def open_store(folder: files.PathLike) -> Store:
    """Open a pair store after comparing every file with its hash in the manifest.

    Raises:
      InputError: a missing manifest, another format version, or a file whose hash differs.
    """
    folder = pathlib.Path(folder)
    if not (folder / "manifest.json").exists():
        raise InputError(f"{folder / 'manifest.json'}: No such file, so no pair store; run data_pipeline.export first")
    manifest = files.read_json(folder / "manifest.json")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{folder / 'manifest.json'}: format is {found!r}, expected {FORMAT}")
    if (folder / SEAL).exists() and files.sha256_file(folder / "manifest.json") != (folder / SEAL).read_text(errors="replace"):
        raise InputError(f"{folder / 'manifest.json'}: its sha256 is not the one that {SEAL} says")
    for name, expected in manifest["sha256"].items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing, the manifest lists it")
        if (found := files.sha256_file(folder / name)) != expected:
            raise InputError(f"{folder / name}: sha256 is {found}, the manifest says {expected}")
    carried = folder / CARRIED
    spec = Spec.from_json(manifest["spec"], safetensors.numpy.load_file(carried) if carried.exists() else None)
    return Store(
        folder, manifest, Layout.from_json(manifest["layout"]), spec, np.load(folder / "importance.npy"),
        tuple(_open_task(folder, name, entry) for name, entry in manifest["tasks"].items()),
    )


def _open_task(folder: pathlib.Path, name: str, entry: dict[str, Any]) -> Task:
    path = folder / "tasks" / name
    return Task(
        name, entry["split"], np.load(path / "tokens.npy", mmap_mode="r"),
        np.load(path / "condition.npy", mmap_mode="r"), tuple(files.read_json(path / "prompts.json")),
    )


def draw_prompts(rng: np.random.Generator, available: int, count: int) -> np.ndarray:
    """Draw `count` prompt indices without replacement; fewer prompts than that are all taken, then repeated."""
    order = rng.permutation(available)
    return np.resize(order, count) if available < count else order[:count]


def draw(tasks: Sequence[Task], seed: int, step: int, index: int, prompts: int) -> tuple[int, int, np.ndarray]:
    """Return what sample `index` of the batch of a step is made of: numbers of a task, of a checkpoint and of its prompts."""
    rng = np.random.default_rng((seed, step, index))
    number = int(rng.integers(len(tasks)))
    checkpoint = int(rng.integers(len(tasks[number].tokens)))
    return number, checkpoint, draw_prompts(rng, len(tasks[number].condition), prompts)


def condition_of(task: Task, seed: int, draw: int, prompts: int) -> Float[np.ndarray, "N L C"]:
    """Return a task's condition for one draw of its prompts: the same for every rung, and of no training sample."""
    return task.condition[drawn(task, seed, draw, prompts)]


def drawn(task: Task, seed: int, draw: int, prompts: int) -> np.ndarray:
    """Return the indices of the prompts that `condition_of` draws."""
    rng = np.random.default_rng((seed, CONDITION, draw, *task.name.encode()))
    return draw_prompts(rng, len(task.condition), prompts)


def sample(tasks: Sequence[Task], seed: int, step: int, index: int, prompts: int
           ) -> tuple[Float[np.ndarray, "N L C"], Float[np.ndarray, "T H W"]]:
    """Return sample `index` of the batch of a step: condition and tokens.

    One task, one of its checkpoints and a fresh batch of its prompts, drawn from `(seed, step, index)` alone, so that
    any host makes any sample of any step.
    """
    number, checkpoint, chosen = draw(tasks, seed, step, index, prompts)
    return tasks[number].condition[chosen], tasks[number].tokens[checkpoint]


def batch(tasks: Sequence[Task], seed: int, step: int, rows: Sequence[int], prompts: int
          ) -> tuple[Float[np.ndarray, "B N L C"], Float[np.ndarray, "B T H W"]]:
    """Return samples `rows` of one step, stacked: conditions float16, tokens float32."""
    conditions, tokens = zip(*(sample(tasks, seed, step, i, prompts) for i in rows), strict=True)
    return np.stack(conditions), np.stack(tokens)
