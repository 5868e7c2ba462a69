"""The folders of checkpoints, without Orbax: which are committed and sound, which is best; damaged ones are set aside."""

import json
import math
import pathlib
import shutil
from collections.abc import Sequence

from dnd_jax import checksums, cli, files, folders

METADATA, METRICS = "_CHECKPOINT_METADATA", "metrics/metrics"
REMOVED = ".removed"
UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name that Orbax writes a checkpoint under


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the committed checkpoints in order of their steps; empty folders and those set aside are none."""
    found = [path.parent for path in folder.glob(f"[0-9]*/{METADATA}") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def best_first(paths: Sequence[pathlib.Path]) -> dict[pathlib.Path, dict[str, float]]:
    """Return checkpoints, the best on the validation tasks first, with their metrics; of equals the latest is first."""
    metrics = {path: metrics_of(path) or {} for path in paths}

    def merit(path: pathlib.Path) -> tuple[float, int]:
        loss = metrics[path].get("validation_loss")
        return -loss if isinstance(loss, int | float) else -math.inf, int(path.name)

    return {path: metrics[path] for path in sorted(paths, key=merit, reverse=True)}


def prune(folder: pathlib.Path, last: int, every: int) -> None:
    """Remove all checkpoints but the last `last`, the best, and, if `every` is set, those of steps that it divides.

    The best is so by its metrics; its state, which can be many gigabytes, is not read again. What is removed loses its name
    first: Orbax removes file by file, and a kill would leave half a checkpoint under that name.

    Raises:
      OSError: metrics that can't be read, which may be the best ones, or a folder that can't be removed.
    """
    paths = steps(folder)
    best = next(iter(best_first(paths)), None)
    _remove_left(folder)
    going = [path for path in paths[:-last] if path != best and not (every and int(path.name) % every == 0)]
    if going:  # the newest has to stay, whatever happens to the power
        folders.sync_all(paths[-1])
        files.sync(folder)
    for path in going:
        path.rename(folder / REMOVED)
        files.sync(folder)
        shutil.rmtree(folder / REMOVED)


def _remove_left(folder: pathlib.Path) -> None:
    """Remove what a kill left of a checkpoint that had lost its name."""
    shutil.rmtree(folder / REMOVED, ignore_errors=True)


def tidy(folder: pathlib.Path) -> None:
    """Take out of the way what would keep Orbax from opening a folder of checkpoints, or from saving a step again.

    So goes what a failed or killed save has left, of which the disk may be full.

    Raises:
      OSError: a file that is there and can't be read, which is no damage.
    """
    _remove_left(folder)
    for path in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob("[0-9]*")):
        if not path.name.isdigit() or not path.is_dir():
            continue
        if not any(path.iterdir()):
            path.rmdir()
        elif not (path / METADATA).is_file():
            set_aside(path, f"incomplete: no {METADATA}")
        elif fault := checksums.fault(path, METADATA):
            set_aside(path, fault)
        elif metrics_of(path) is None:
            _lose_metrics(path)


def _lose_metrics(path: pathlib.Path) -> None:
    if (path / METRICS).is_dir():
        shutil.rmtree(path / METRICS)
    elif (path / METRICS).parent.is_file():
        (path / METRICS).parent.unlink()
    files.write_json(path / METRICS, {})
    checksums.renew(path, METRICS)


def set_changed_aside(folder: pathlib.Path) -> None:
    """Set newest checkpoints aside until one is as it was written, metrics apart."""
    for path in reversed(steps(folder)):
        if not (fault := fault_of(path)):
            return
        set_aside(path, fault)


def fault_of(path: pathlib.Path) -> str | None:
    """Return what is wrong with a checkpoint's state or metadata, as far as their hashes tell."""
    return checksums.fault(path, "state/") or checksums.fault(path, METADATA)


def set_aside(path: pathlib.Path, fault: str) -> None:
    """Rename a damaged checkpoint so that nothing takes it for one, and say so."""
    target = next(t for i in range(1000) if not (t := path.with_name(f"{path.name}.damaged{i or ''}")).exists())
    path.rename(target)
    cli.say(f"{path}: damaged ({' '.join(fault.split())[:200]}), now {target.name}")


def metrics_of(path: pathlib.Path) -> dict[str, float] | None:
    """Return a checkpoint's metrics, or None, said on standard output, where they are malformed or not those written.

    Raises:
      OSError: metrics that are there and can't be read, which says nothing about them.
    """
    fault = None
    try:
        fault = checksums.fault(path, METRICS)
        if not fault and not (path / METRICS).exists():
            return {}  # saved without any
        found = json.loads((path / METRICS).read_text(encoding="utf-8")) if not fault else None
        if isinstance(found, dict):
            return found
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        fault = str(error)
    cli.say(f"{path / METRICS}: damaged ({fault or 'no JSON object'}), so this checkpoint does not count as the best")
    return None
