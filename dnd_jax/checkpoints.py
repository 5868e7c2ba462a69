"""Checkpoints of a training run, by Orbax: the only file that calls it.

    checkpoints/<step>/             committed by a rename; state, with about as its metadata, metrics, sha256.json
    checkpoints/<step>.damaged/     set aside, never read
    checkpoints/.removed/           pruned, until its files are gone

A checkpoint holds the training state, its metrics, and `about`: config, layout, adapter spec, encoder and base model. The
workdir around it is enough to generate. What Orbax leaves open is closed here: damage is found by hashes, a failed write is
reported when it fails, and neither an empty folder nor a malformed metrics file keeps the others from being read.
"""

import functools
import logging
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from dnd_jax import checkpoint_folders, checksums, cli, distributed, files
from dnd_jax.types import InputError, Params

SAVE_S = 600  # a save that takes longer has failed; of several processes, the others wait so long for one that could not write


class Checkpointer:
    """Saves and restores states under `folder/<step>`.

    Keeps the last `last`, the best on validation tasks and, if `every` is set, those of steps that it divides.

    Attributes:
      failure: what the latest save failed with, if it did; older checkpoints are as they were.
    """

    def __init__(self, folder: files.PathLike, about: dict[str, Any], last: int = 2, every: int = 0):
        self._listener = _Listener(self._hear)
        _own_log().addHandler(self._listener)
        self._folder = pathlib.Path(folder).resolve()
        self._about = about
        self._keep = {"last": last, "every": every}
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._watcher: threading.Thread | None = None
        self._step = -1
        self.failure: OSError | None = None
        distributed.by_first(functools.partial(checkpoint_folders.tidy, self._folder))

    def restore(self, like: Any) -> Any | None:
        """Return the latest sound state, laid out like the (abstract) state `like`, or None when there is none; then prune.

        A checkpoint whose bytes have changed is set aside, and standard output says so. One whose writer was killed before it
        recorded the hashes is first read by every process, and set aside if none of them can.

        Raises:
          InputError: a sound checkpoint with parameters of other names or shapes, or with no optimizer's state.
          OSError: the newest checkpoint is sound but can't be loaded (for want of memory, or it holds another state), or it has
            no hashes and only some processes can read it (a shared file system that lags). Nothing is set aside then. Of
            several processes the others end too.
        """
        while (path := self._newest()) and not distributed.agreed((path / checksums.NAME).exists()):
            fault = _fault_in_loading(path)
            failing, reading = distributed.first_with(fault is not None), distributed.first_with(fault is None)
            if failing is None:
                distributed.by_first(functools.partial(checksums.write, path))
                break
            if reading is not None:
                raise OSError(f"{path}: process {failing} can't load it, process {reading} can: {fault or 'it says why'}")
            distributed.by_first(functools.partial(checkpoint_folders.set_aside, path, str(fault)))
        if path is None:
            return None
        try:
            known, wanted = _metadata(path), like if isinstance(like, dict) else vars(like)
            check_shapes(path, known["params"], wanted["params"])
            if "opt_state" in wanted and "opt_state" not in known:
                raise InputError(f"{path}: has no state of an optimizer; a decoder that was imported can't be trained on")
            state = ocp.load_checkpointables(path, {"state": like})["state"]
        except InputError:
            raise
        except Exception as error:
            raise OSError(f"{path}: process {jax.process_index()} can't load it: {error}") from error
        if distributed.is_first():
            self._prune()  # what a killed run was about to: a disk that it filled would keep the next save from being written
        return state

    def _newest(self) -> pathlib.Path | None:
        """Return the newest checkpoint that is not known to be damaged, once those that are have been set aside."""
        distributed.by_first(functools.partial(checkpoint_folders.set_changed_aside, self._folder))
        step = distributed.agreed(max((int(path.name) for path in checkpoint_folders.steps(self._folder)), default=-1))
        return self._folder / str(step) if step >= 0 else None

    def last_good(self) -> str:
        """Return the newest checkpoint on disk, in words."""
        self.wait()
        paths = checkpoint_folders.steps(self._folder)
        return f"the last good checkpoint is {paths[-1]}" if paths else "no checkpoint was written yet"

    def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
        """Start saving in the background, when the save before is done; if it fails, `failure` says so and stderr at once."""
        self.wait()
        if self.failed():
            self._close()
        self.failure, self._step = None, step
        metrics = {name: float(value) for name, value in metrics.items()}
        try:
            self._checkpointer = self._checkpointer or self._open()
            response = self._checkpointer.save_checkpointables_async(
                step, {"state": state}, metrics=metrics, custom_metadata=self._about, force=True)
        except Exception as error:  # of the file system, in whatever class Orbax and TensorStore wrap it
            self._fail(error)
            return
        self._watcher = threading.Thread(target=self._watch, args=(step, response), name="checkpoint", daemon=True)
        self._watcher.start()

    def _open(self) -> ocp.training.Checkpointer:
        with ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_S)):
            return ocp.training.Checkpointer(
                self._folder, save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True)

    def _hear(self, error: BaseException) -> None:
        """Hear at once of a failed write: before Orbax raises the error, this process waits for those that could write."""
        if self._step >= 0:
            self._fail(error)

    def _watch(self, step: int, response: Any) -> None:
        """Wait until a checkpoint is committed, then record its hashes and prune; a kill in between costs the hashes only."""
        try:
            response.result()
        except Exception as error:
            self._fail(error)
            return
        path = self._folder / str(step)
        if not (path / checkpoint_folders.METADATA).is_file():
            self._fail(f"no {checkpoint_folders.METADATA} there after saving")
            return
        if not distributed.is_first():
            return
        try:
            checksums.write(path)
        except OSError as error:  # as after a kill, damage is then noticed only where it keeps Orbax from loading
            print(f"\nwarning: {path} is written, but not its hashes: {error}", file=cli.Stderr(), flush=True)
        self._prune()

    def _prune(self) -> None:
        try:
            checkpoint_folders.prune(self._folder, **self._keep)
        except OSError as error:
            print(f"\nwarning: {self._folder}: older checkpoints can't be removed: {error}", file=cli.Stderr(), flush=True)

    def _fail(self, error: BaseException | str) -> None:
        if self.failure is None:
            reason = " ".join(str(error).split())[:500]
            self.failure = OSError(f"{self._folder / str(self._step)}: this checkpoint is not written: {reason}")
            print(f"\nerror: {self.failure}", file=cli.Stderr(), flush=True)

    def failed(self) -> bool:
        """Tell whether the latest save has failed by now, in any process; the same answer in all of them."""
        if (where := distributed.first_with(self.failure is not None)) is not None:
            self._fail(f"process {where} of {jax.process_count()} could not write its part")
        return self.failure is not None

    def wait(self) -> None:
        """Block until the save under way is on disk or has failed."""
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def _close(self) -> None:
        try:
            if self._checkpointer is not None:
                self._checkpointer.close()
        except Exception:
            if self.failure is None:  # else Orbax repeats it
                raise
        self._checkpointer = None

    def close(self) -> None:
        """Finish the save under way; raise OSError if the latest save failed, of several processes at once: others may wait."""
        if self.failure is not None and jax.process_count() > 1:
            raise self.failure
        self.wait()
        self._close()
        _own_log().removeHandler(self._listener)
        if self.failure is not None:
            raise OSError(f"{self.failure}; {self.last_good()}") from self.failure

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close; what ended the block counts for more than a failed save, which standard error has named."""
        try:
            self.close()
        except OSError:
            if kind is None:
                raise


class _Listener(logging.Handler):
    """Hands the errors of Orbax's writing threads to a function."""

    def __init__(self, hear: Callable[[BaseException], None]):
        super().__init__()
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] and record.filename == "async_checkpointer.py":
            self._hear(record.exc_info[1])


def _own_log() -> logging.Logger:
    """Return Orbax's log, which no longer goes anywhere else: failures are reported here."""
    log = logging.getLogger("absl")
    log.setLevel(logging.ERROR)
    log.propagate = False
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return log


def _surely_sound(path: pathlib.Path, error: Exception) -> bool:
    """Tell whether a checkpoint without a known fault failed to load for another reason than damage."""
    return (path / checksums.NAME).exists() or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _fault_in_loading(path: pathlib.Path) -> str | None:
    """Return what keeps this process from reading all of a checkpoint's state, one array at a time, into its memory.

    All processes must ask, for Orbax counts its calls, and go through all arrays, or none, if one of them can't list them.
    """
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here))
    fault = None
    try:
        arrays, tree = jax.tree.flatten(_metadata(path))
    except Exception as error:  # what damage raises, and where, is not documented
        fault = str(error)
    if distributed.first_with(fault is not None) is not None:
        return fault
    fault = None if arrays else "its metadata list no array"
    for i, array in enumerate(arrays):
        like = [ocp.PLACEHOLDER] * len(arrays)
        like[i] = np.empty(array.shape, array.dtype)
        try:
            with ocp.Context(multiprocessing_options=alone):
                ocp.load(path, jax.tree.unflatten(tree, like), checkpointable_name="state")
        except Exception as error:
            if _surely_sound(path, error):
                raise OSError(f"{path}: process {here} can't load it: {error}") from error
            fault = fault or str(error)
    return fault


def load_best(folder: files.PathLike) -> tuple[int, Params, dict[str, Any], dict[str, float]]:
    """Return step, parameters (NumPy), `about` and metrics of the sound checkpoint that is best on the validation tasks.

    Nothing in the folder is changed; a damaged checkpoint is passed over, and standard output says so.

    Raises:
      InputError: a folder without a sound checkpoint.
      OSError: a checkpoint that can't be read or loaded, although its bytes are those written.
    """
    metrics = checkpoint_folders.best_first(checkpoint_folders.steps(pathlib.Path(folder).resolve()))
    path, params = _first_sound(folder, list(metrics))
    return int(path.name), params, ocp.checkpointables_metadata(path).custom_metadata, metrics[path]


def load_latest(folder: files.PathLike) -> tuple[int, Params]:
    """Return step and parameters (NumPy) of the newest sound checkpoint."""
    path, params = _first_sound(folder, checkpoint_folders.steps(pathlib.Path(folder).resolve())[::-1])
    return int(path.name), params


def _first_sound(folder: files.PathLike, paths: Sequence[pathlib.Path]) -> tuple[pathlib.Path, Params]:
    _own_log()
    for path in paths:
        if not (fault := checkpoint_folders.fault_of(path)):
            try:
                return path, _load_params(path)
            except Exception as error:  # what damage raises, and where, is not documented
                # Asked again, for a run beside may have removed it meanwhile.
                if _surely_sound(path, error) and not checkpoint_folders.fault_of(path):
                    raise OSError(f"{path}: can't be loaded, although its bytes are those written: {error}") from error
                fault = str(error)
        cli.say(f"{path}: damaged ({' '.join(fault.split())[:200]}), passed over")
    found = f"none of its {len(paths)} checkpoints is sound" if paths else "holds no checkpoint"
    raise InputError(f"{folder}: {found}, run dnd_jax.train first")


def check_shapes(source: files.PathLike, found: Params, wanted: Params,
                 advice: str = "use the version of dnd_jax that wrote it, or another workdir") -> None:
    """Raise InputError unless parameters (or what has their shapes) have the names and shapes of a decoder's."""
    have, want = ({"/".join(key): tuple(leaf.shape) for key, leaf in flatten_dict(tree).items()} for tree in (found, wanted))
    for key in sorted(have | want):
        if have.get(key) != want.get(key):
            raise InputError(f"{source}: {key} has shape {have.get(key, 'none')} there, {want.get(key, 'none')} in this decoder; "
                             + advice)


def _metadata(path: pathlib.Path) -> Any:
    return ocp.metadata(path, checkpointable_name="state").metadata


def _load_params(path: pathlib.Path) -> Params:
    like = {"params": jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _metadata(path)["params"])}
    partial = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=partial):
        return ocp.load(path, like, checkpointable_name="state")["params"]
