"""The log of a training run: `metrics.jsonl`, one JSON object per logged step; and the logs of many runs as one table."""

import contextlib
import glob
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dnd_jax import cli, files
from dnd_jax.types import InputError

if TYPE_CHECKING:
    import pandas

NAME = "metrics.jsonl"
ALWAYS = ("loss", "validation_loss", "seconds")  # columns of the table of runs


class MetricsLog:
    """Appends to a run's log; when a run resumes, lines past the step it resumes from are dropped first.

    A line has `step`, `loss`, `gradient_norm`, `learning_rate`, `norm_ratio` (predicted tokens over target tokens); where the
    step was validated `validation_loss` and `validation_loss/<task>`; since the line before `steps_per_s`, `samples_per_s` and
    `input_wait_s`; and `seconds` of training since step 0, however often the run was resumed. Of several processes, one writes.

    Attributes:
      failure: why the latest line could not be written, if it could not; it is kept and written before the next one. Or why
        TensorBoard's file could not: it ends there.
    """

    def __init__(self, workdir: pathlib.Path, first: int, writes: bool = True, tensorboard: bool = False):
        self._path, self._file, self._board = workdir / NAME, None, None
        self._unwritten, self._size = b"", 0
        self.failure: OSError | None = None
        self._last, self._before, self._waited = (first, time.perf_counter()), 0.0, 0.0
        if not writes:
            return
        known = read_metrics(workdir) if self._path.exists() else []
        kept = [entry for entry in known if entry["step"] <= first]
        if known and not kept:
            cli.say(f"{self._path}: {len(known)} lines dropped, as the run begins anew at step {first}")
        files.write_text(self._path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        self._before = kept[-1].get("seconds", 0.0) if kept else 0.0
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115, closed by __exit__
        self._size = self._path.stat().st_size
        self._board = _Board(workdir / "tensorboard", first) if tensorboard else None

    def append(self, step: int, metrics: dict[str, float], batch_size: int, waited: float) -> dict[str, float]:
        """Write one line, at once, and return it without its step; `waited` is how long the run has waited for input so far, s.

        Where it can't be written, `failure` and standard error say so.
        """
        now = time.perf_counter()
        steps_per_s = (step - self._last[0]) / (now - self._last[1])
        self._before += now - self._last[1]
        entry = metrics | {"steps_per_s": steps_per_s, "samples_per_s": steps_per_s * batch_size,
                           "input_wait_s": waited - self._waited, "seconds": self._before}
        self._last, self._waited = (step, now), waited
        self._unwritten += json.dumps({"step": step} | entry, allow_nan=False).encode() + b"\n"
        self._write()
        if self._board is not None:
            try:
                self._board.add(step, entry)
            except OSError as error:
                self._board.close()
                self._board = None
                self._fail(error)
        return entry

    def _write(self) -> None:
        if self._file is None:
            self._unwritten = b""
            return
        try:
            with files.named(self._path):
                self._file.truncate(self._size)  # after a write that failed half-way
                rest = self._unwritten
                while rest:
                    rest = rest[self._file.write(rest):]
                os.fsync(self._file.fileno())
            self._size, self._unwritten, self.failure = self._size + len(self._unwritten), b"", None
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        print(f"\nerror: {error}", file=cli.Stderr(), flush=True)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close; raise the failure if lines are still unwritten, unless an error ended the block."""
        if self.failure is not None and kind is None:
            self._write()
        for opened in (self._file, self._board):
            if opened is not None:
                opened.close()
        if self.failure is not None and kind is None:
            raise self.failure


class _Board:
    """A file of TensorBoard's, by tensorboardX, whose usual writer has a thread: where that can't write, the next call hangs.

    What earlier files say past the step that a run resumes from is hidden.
    """

    def __init__(self, folder: pathlib.Path, first: int):
        try:
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import RecordWriter
        except ImportError as error:
            raise InputError("config.train.tensorboard is set, but tensorboardX is missing: pip install tensorboardX") from error
        self._folder, self._event, self._summary = folder, event_pb2.Event, summary_pb2.Summary
        with files.named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
            self._write(file_version="brain.Event:2")
            self._write(step=first + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, entry: dict[str, float]) -> None:
        """Write the scalars of a step, at once; raise OSError, naming the folder, if that can't be."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in entry.items()]
        with files.named(self._folder):
            self._write(step=step, summary=self._summary(value=values))

    def _write(self, **event: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all is written already, or what wasn't is known
            self._writer.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last line that a kill cut short is left out.

    Raises:
      InputError: a missing log, or any other line that isn't JSON.
    """
    path = workdir / NAME
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return [_entry(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def _entry(where: str, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}; move the file away to go on without it") from error
    if not (isinstance(entry, dict) and isinstance(entry.get("step"), int)):
        raise InputError(f"{where}: no JSON object with a step; move the file away to go on without it")
    return entry


# --- many runs -------------------------------------------------------------------------------------------------------


def load_runs(pattern: str) -> "pandas.DataFrame":
    """Read the logs, checkpoints' metrics and configs of all training runs into one table. Imports pandas lazily.

    One row per run and step that its log or a checkpoint knows, in the order of runs' names and of steps; a run that knows
    none has one row without a step. The columns:

        run         the workdir, as the pattern found it
        step        the training step
        checkpoint  whether a checkpoint of that step is there; its metrics count where the log has others
        warnings    what could not be read of the run, each file by its name; empty if all could
        loss, validation_loss, seconds   what `metrics.jsonl` and checkpoints say of the step, also where no run says any of it
        ...                              what else they say; nested names joined by dots
        config.seed, config.train.steps  fields of the run's `config.json`, lists as JSON text

    Args:
      pattern: of workdirs, as the shell has them, `**` for any depth: `build/sweep/*`. Folders that hold neither a log nor
        checkpoints are passed over.

    Raises:
      InputError: nothing there is a workdir.
    """
    import pandas

    found = [path for path in map(pathlib.Path, sorted(glob.glob(pattern, recursive=True)))
             if (path / NAME).exists() or (path / "checkpoints").is_dir()]
    if not found:
        raise InputError(f"{pattern}: no folder of that name holds {NAME} or checkpoints")
    table = pandas.json_normalize([row for path in found for row in _run_rows(path)])
    table = table.assign(**{name: math.nan for name in ALWAYS if name not in table})
    first, configs = ["run", "step", "checkpoint", "warnings"], [c for c in table.columns if c.startswith("config.")]
    metrics = [c for c in table.columns if c not in {*first, *configs}]
    return table[[*first, *ALWAYS, *(c for c in metrics if c not in ALWAYS), *configs]].astype({"step": "Int64"})


def _run_rows(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield a run's rows by step; what is malformed is left out and named in every one of them."""
    warnings: list[str] = []
    steps: dict[int, dict[str, Any]] = {}
    for place, text in _lines(workdir / NAME, warnings):
        if entry := _parse(place, text, warnings, "step"):
            steps[entry["step"]] = entry
    kept = [path.parent.parent for path in (workdir / "checkpoints").glob("[0-9]*/metrics/metrics")]
    for path in sorted((path for path in kept if path.name.isdigit()), key=lambda path: int(path.name)):
        place = f"checkpoints/{path.name}/metrics/metrics"
        for _, text in _lines(workdir / place, warnings, whole=True):
            if (entry := _parse(place, text, warnings)) is not None:
                steps[int(path.name)] = {**steps.get(int(path.name), {}), **entry, "checkpoint": True}
    config: dict[str, Any] = {}
    for _, text in _lines(workdir / "config.json", warnings, whole=True):
        config = _parse("config.json", text, warnings) or {}
    shared = {"run": str(workdir), "warnings": "; ".join(warnings), **({"config": _plain(config)} if config else {})}
    if not steps:
        yield {"checkpoint": False, "step": None, **shared}
    for step, entry in sorted(steps.items()):
        yield {"checkpoint": False, **entry, "step": step, **shared}


def _lines(path: pathlib.Path, warnings: list[str], *, whole: bool = False) -> list[tuple[str, str]]:
    """Return a file's lines with their places, but for one that is being written; or the whole text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        warnings.append(f"{path.name}: {getattr(error, 'strerror', None) or error}")
        return []
    if whole:
        return [(path.name, text)]
    return [(f"{path.name} line {number}", line) for number, line in enumerate(text.split("\n")[:-1], 1)]


def _parse(place: str, text: str, warnings: list[str], required: str | None = None) -> dict[str, Any] | None:
    """Return a JSON object, one with an integer `required` if that is named, or None after noting why there is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        warnings.append(f"{place}: not JSON: {error}")
        return None
    if not isinstance(value, dict) or (required and not isinstance(value.get(required), int)):
        warnings.append(f"{place}: expected an object{f' with an integer {required!r}' if required else ''}, found {text[:40]}")
        return None
    return value


def _plain(config: Any) -> Any:
    """Return a nested config with lists as JSON text, so that every field is one comparable value."""
    if isinstance(config, dict):
        return {key: _plain(value) for key, value in config.items()}
    return json.dumps(config) if isinstance(config, list) else config
