"""The log of a training run: `metrics.jsonl`, one JSON object per logged step."""

import json
import pathlib
from typing import Any, TextIO

from dnd_jax import files
from dnd_jax.types import InputError

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's log; when a run resumes, lines past the step it resumes from are dropped first.

    `seconds` is the training time that the lines kept stand for. Of several processes, one writes.
    """

    def __init__(self, workdir: pathlib.Path, first: int, writes: bool = True):
        self.seconds = 0.0
        self._file: TextIO | None = None
        if not writes:
            return
        path = workdir / NAME
        kept = [entry for entry in read_metrics(workdir) if entry["step"] <= first] if path.exists() else []
        files.write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line, at once."""
        if self._file is not None:
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last line that a kill cut short is left out.

    Raises:
      InputError: a missing log, or any other line that isn't JSON.
    """
    path = workdir / NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
