"""Look for what makes a result on datasets meaningless, before any model is asked.

    python -m data_pipeline.datasets audit data/*.json
    python -m data_pipeline.datasets audit --config=experiments/configs/common_sense.py:ARC-c

Prints the facts of every dataset and a sentence for every finding, and exits with status 1 if there is any. Datasets are
JSON, JSON lines or folders saved by `datasets`, as in `dnd_jax.sources`. With a config they are those of its tasks: what they
are trained on (held-out ones for the in-task rung) against what they are tested on. Of files, those whose name holds `train`
are trained on, all others tested on.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dnd_jax import cli, sources
from dnd_jax.audit import audit
from dnd_jax.sources import Row
from dnd_jax.tasks import read_tasks
from dnd_jax.types import InputError


def audit_sets(trained: Mapping[str, Sequence[Row]], test: Mapping[str, Sequence[Row]]) -> tuple[str, list[str]]:
    """Return the facts of datasets as a table, and the audit's findings."""
    found = audit(test, trained, ngram=13)
    training_only = audit(trained, {})
    tasks = training_only["tasks"] | found["tasks"]
    findings = training_only["findings"] + [f for f in found["findings"] if f not in training_only["findings"]]
    width = max(map(len, tasks))
    lines = [f"{'dataset'.ljust(width)}    rows  labels  majority  chance  distribution"]
    for name, facts in tasks.items():
        choice = (f"{facts['majority']:8.1%}  {facts['chance']:6.1%}  "
                  + ", ".join(f"{_in_line(label)} {share:.0%}" for label, share in list(facts["distribution"].items())[:6])
                  if "majority" in facts else "       -       -")
        lines.append(f"{name.ljust(width)}  {facts['rows']:6d}  {facts['labels']:6d}  {choice}")
    return "\n".join(lines), findings


def _in_line(label: str) -> str:
    return " ".join(label.split()).encode(errors="backslashreplace").decode()


def sets_of_config(config: Any) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows that a config's tasks are trained on, and those that they are tested on."""
    tasks = read_tasks(config.tasks)
    return ({f"{task.name} train": sources.read(task.train) for task in tasks},
            {f"{task.name} test": sources.read(task.test) for task in tasks if task.test})


def sets_of_files(names: Sequence[str]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows of files with and without `train` in their name."""
    found = {name: sources.read(name) for name in names}
    trained = {name: rows for name, rows in found.items() if "train" in pathlib.Path(name).name}
    return trained, {name: rows for name, rows in found.items() if name not in trained}


def define_flags() -> None:
    cli.define_config(required=False)


def main(args: Any, *words: str) -> None:
    command, *names = words or ("nothing",)
    if command != "audit" or bool(names) == bool(args.config):
        given = " ".join(words) or "nothing"
        raise InputError(f"command line: {given!r} given, expected 'audit FILE...' or 'audit --config=...'")
    table, findings = audit_sets(*(sets_of_config(args.config) if args.config else sets_of_files(names)))
    print(table)
    for finding in findings:
        print(f"finding: {finding}")
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, define_flags, words=True)
