"""Checkpoints of a training run, by Orbax: the only file that knows it.

A checkpoint holds the training state, its metrics, and `about`: config, layout, adapter spec, encoder and base model. The
workdir around it is enough to generate.
"""

import functools
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dnd_jax import distributed, files
from dnd_jax.types import InputError, Params


def merit(metrics: dict[str, float] | None) -> float:
    """Return what the best checkpoint has most of; without validation tasks all are alike, and the latest is taken."""
    return -(metrics or {}).get("validation_loss", 0.0)


class Checkpointer:
    """Saves and restores states under `folder/<step>`, keeping the last two and the best on validation tasks."""

    def __init__(self, folder: files.PathLike, about: dict[str, Any]):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder = pathlib.Path(folder).resolve()
        self._about = about
        self._pending: Any = None
        distributed.by_first(self._set_faulty_aside)
        self._checkpointer = self._open()

    def _set_faulty_aside(self) -> None:
        for path in _steps(self._folder):
            if fault := _fault(path):
                set_aside(path, fault)

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(2), policies.BestN(get_metric_fn=merit, n=1)]
        return ocp.training.Checkpointer(
            self._folder, save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
        )

    def restore(self, like: Any) -> Any | None:
        """Return the latest sound state, laid out like the (abstract) state `like`, or None when there is none.

        A checkpoint that can't be loaded is set aside, and standard output says so.
        """
        while (latest := self._checkpointer.latest) is not None:
            try:
                return self._checkpointer.load(latest, abstract_state=like)
            except Exception as error:  # what damage raises, and where, is not documented
                distributed.by_first(functools.partial(set_aside, self._folder / str(latest.step), str(error)))
                self._checkpointer.close()
                self._checkpointer = self._open()
        return None

    def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
        """Start saving in the background; a failure of the save before is raised here."""
        self.wait()
        self._pending = self._checkpointer.save_checkpointables_async(
            step, {"state": state}, metrics={k: float(v) for k, v in metrics.items()}, custom_metadata=self._about, force=True
        )

    def wait(self) -> None:
        """Block until the save under way is on disk; raise if it failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Finish the save under way."""
        self.wait()
        self._checkpointer.close()


def set_aside(path: pathlib.Path, fault: str) -> None:
    """Rename a damaged checkpoint so that nothing takes it for one, and say so."""
    target = next(t for i in range(1000) if not (t := path.with_name(f"{path.name}.damaged{i or ''}")).exists())
    path.rename(target)
    print(f"{path}: damaged ({' '.join(fault.split())[:200]}), now {target.name}; going on from the checkpoint before it")


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())


def _fault(path: pathlib.Path) -> str | None:
    """Return what would keep the whole folder of checkpoints from opening, if there is anything."""
    if not (path / "_CHECKPOINT_METADATA").is_file():
        return "incomplete: no _CHECKPOINT_METADATA"
    try:
        metrics = path / "metrics" / "metrics"
        if metrics.exists() and not isinstance(json.loads(metrics.read_text()), dict):
            return "metrics are no JSON object"
    except ValueError as error:
        return f"metrics: {error}"
    return None


def load_best(folder: files.PathLike) -> tuple[int, Params, dict[str, Any], dict[str, float]]:
    """Return step, parameters (NumPy), `about` and metrics of the checkpoint that is best on the validation tasks.

    Raises:
      InputError: a folder without checkpoints.
    """
    with _open(folder) as checkpointer:
        best = max(checkpointer.checkpoints, key=lambda c: (merit(c.metrics), c.step))
        about = checkpointer.checkpointables_metadata(best.step).custom_metadata
        return best.step, _load_params(checkpointer, best.step), about, dict(best.metrics or {})


def load_latest(folder: files.PathLike) -> tuple[int, Params]:
    """Return step and parameters (NumPy) of the newest checkpoint."""
    with _open(folder) as checkpointer:
        step = checkpointer.latest.step
        return step, _load_params(checkpointer, step)


def _open(folder: files.PathLike) -> ocp.training.Checkpointer:
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder = pathlib.Path(folder).resolve()
    if not (steps := _steps(folder)):
        raise InputError(f"{folder}: holds no checkpoint, run dnd_jax.train first")
    for path in steps:
        if fault := _fault(path):
            raise InputError(f"{path}: {fault}; training again with the same command sets it aside")
    return ocp.training.Checkpointer(folder)


def _load_params(checkpointer: ocp.training.Checkpointer, step: int) -> Params:
    shapes = checkpointer.metadata(step).metadata["params"]
    like = {"params": jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)}
    partial = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=partial):
        return checkpointer.load(step, abstract_state=like)["params"]
