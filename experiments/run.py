"""Run one experiment from its datasets to its result: audit, collect, export, train, generate, evaluate.

    python -m experiments.run --config=experiments/configs/common_sense.py:ARC-c --workdir=runs/common_sense/ARC-c

Every stage is the command that it prints, with the same `--config.field=value`. Run again, collecting and training go on where
they were, and a store that is made of the same stays. What the audit finds stops the run, unless `--despite_findings`. The result
is an adapter for each test task, `WORKDIR/generated/TASK`, and the ladder's report; the paper's experiments have no validation
tasks, so theirs is without the rungs that choose on these.
"""

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags

from data_pipeline import export
from dnd_jax import cli, encoders, evaluate, settings, workdirs
from dnd_jax.prompts import read_rows
from dnd_jax.scoring import kinds
from dnd_jax.tasks import read_tasks
from dnd_jax.types import InputError


def stages(config: ml_collections.ConfigDict, with_config: Sequence[str], workdir: str, jobs: int,
             despite_findings: bool = False) -> list[list[str]]:
    """Return the command line of every stage after the audit, without `python -m`."""
    tasks = read_tasks(config.tasks)
    store = pathlib.Path(config.export.store)
    generated = [["dnd_jax.generate", f"--workdir={workdir}", f"--prompts={store}/tasks/{task.name}/prompts.json",
                  f"--out={workdir}/generated/{task.name}"] for task in tasks if task.split == "test"]
    return [["data_pipeline.collect", *with_config, f"--jobs={jobs}"], ["data_pipeline.export", *with_config],
            ["dnd_jax.train", *with_config, f"--workdir={workdir}"], *generated,
            ["dnd_jax.evaluate", *with_config, f"--workdir={workdir}", *["--despite_findings"] * despite_findings]]


def check(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at what a stage would fail on after days of work."""
    evaluate.check(config.evaluate)
    export.check(config)
    encoders.check(config.encoder)
    settings.check_anywhere(config)
    for place, kind in config.evaluate.unrelated:
        try:
            kinds.check_rows(kind, read_rows(place), place)
        except InputError as error:
            raise InputError(f"config.evaluate.unrelated: {error}") from error
    asked = [task for task in read_tasks(config.tasks) if task.split != "train"]
    if not any(task.split == "test" for task in asked):
        raise InputError(f"{config.tasks}: no task has the split 'test', on which the rungs are compared")
    for task in asked:
        if task.test is None:
            raise InputError(f"{config.tasks}: {task.name} names no 'test' file, on which the rungs are compared")
        kinds.check_rows(config.evaluate.scoring, read_rows(task.test), str(task.test))


def run(command: Sequence[str]) -> int:
    """Run a module's command line, print it before, and return its exit status."""
    print(f"== python -m {shlex.join(command)}", flush=True)
    return subprocess.run([sys.executable, "-m", *command]).returncode


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_string("workdir", None, required=True, help="Folder of the training run, and of what is generated.")
    flags.DEFINE_integer("jobs", 1, "Tasks collected at once, each in its own process, which share the GPUs.", lower_bound=1)
    flags.DEFINE_bool("despite_findings", False, "Go on whatever the audit finds; the report says what concerns its test tasks.")


def main(args: Any) -> None:
    with_config, workdir = cli.config_words(), pathlib.Path(args.workdir)
    check(args.config)
    workdirs.check_config(args.config, workdir)
    planned = stages(args.config, with_config, args.workdir, args.jobs, args.despite_findings)
    if run(["data_pipeline.datasets", "audit", *with_config]) and not args.despite_findings:
        raise InputError(f"{with_config[0]}: see above what the audit found; --despite_findings goes on where it can")
    for command in planned:
        if status := run(command):
            raise InputError(f"python -m {command[0]} ended with status {status}; the same command goes on from there")
        if command[0] == "dnd_jax.train":
            workdirs.check_trained(args.config, workdir)


if __name__ == "__main__":
    cli.run(main, define_flags)
