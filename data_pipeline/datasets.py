"""Dataset files in the forms that users have, as rows of prompt, response and system; and their audit.

    python -m data_pipeline.datasets audit data/*.json

Files are JSON lists or JSON lines of rows, in columns of any names, or chats under `conversations`. The audit prints the facts
of every file and a sentence for everything that would make a result meaningless, and exits with status 1 if there is any.
Files whose name holds `train` are what is trained on, all others are tested on.
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from dnd_jax import cli, files
from dnd_jax.audit import audit
from dnd_jax.prompts import Row
from dnd_jax.types import InputError

COLUMNS = {"prompt": "prompt", "response": "response", "system": "system"}
SPEAKERS = {"human": "prompt", "user": "prompt", "gpt": "response", "assistant": "response", "system": "system"}


def read_examples(path: files.PathLike, columns: Mapping[str, str] = COLUMNS) -> list[Row]:
    """Read rows as they are; fields that a row lacks are empty.

    Args:
      path: a JSON list, or with the suffix `.jsonl` one object a line.
      columns: names of the file's columns for prompt, response and system.

    Raises:
      InputError: a malformed file or row, or columns of which none occurs.
    """
    path = pathlib.Path(path)
    raw = _read_lines(path) if path.suffix == ".jsonl" else files.read_json(path)
    if not isinstance(raw, list) or not raw or not all(isinstance(row, dict) for row in raw):
        raise InputError(f"{path}: expected a non-empty list of objects, found {str(raw)[:60]!r}")
    rows = [_from_chat(row["conversations"], f"{path}: row {i}") if "conversations" in row else
            Row(**{field: str(row.get(column) or "") for field, column in columns.items()}) for i, row in enumerate(raw)]
    if not any(row.prompt for row in rows):
        raise InputError(f"{path}: no row has a column {columns['prompt']!r}, the first has {sorted(raw[0])}")
    return rows


def _read_lines(path: pathlib.Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}: line {number}: not JSON: {error}") from error
    return rows


def _from_chat(turns: Any, where: str) -> Row:
    """Return the first exchange of a chat as a row."""
    fields = {"prompt": "", "response": "", "system": ""}
    for turn in turns if isinstance(turns, list) else [turns]:
        speaker = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        if speaker not in SPEAKERS:
            raise InputError(f"{where}: a turn is {str(turn)[:60]!r}, expected one from {sorted(SPEAKERS)}")
        field = SPEAKERS[speaker]
        fields[field] = fields[field] or str(turn.get("value") or turn.get("content") or "")
    return Row(**fields)


def audit_files(paths: list[str]) -> tuple[str, list[str]]:
    """Return the facts of dataset files as a table, and the audit's findings."""
    sets = {path: read_examples(path) for path in paths}
    trained = {path: rows for path, rows in sets.items() if "train" in pathlib.Path(path).name}
    test = {path: rows for path, rows in sets.items() if path not in trained}
    found = audit(test, trained, ngram=13)
    training_only = audit(trained, {})
    tasks = training_only["tasks"] | found["tasks"]
    findings = training_only["findings"] + [f for f in found["findings"] if f not in training_only["findings"]]
    width = max(map(len, paths))
    lines = [f"{'file'.ljust(width)}    rows  labels  majority  chance  distribution"]
    for path in paths:
        facts = tasks[path]
        choice = (f"{facts['majority']:8.1%}  {facts['chance']:6.1%}  "
                  + ", ".join(f"{label} {share:.0%}" for label, share in list(facts["distribution"].items())[:6])
                  if "majority" in facts else "       -       -")
        lines.append(f"{path.ljust(width)}  {facts['rows']:6d}  {facts['labels']:6d}  {choice}")
    return "\n".join(lines), findings


def main(args: Any, *words: str) -> None:
    if len(words) < 2 or words[0] != "audit":
        raise InputError(f"command line: {' '.join(words) or 'nothing'!r} given, expected 'audit FILE...'")
    table, findings = audit_files(list(words[1:]))
    print(table)
    for finding in findings:
        print(f"finding: {finding}")
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, lambda: None, words=True)
