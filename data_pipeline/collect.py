"""Collect adapters: fine-tune the base model on every task by LoRA and keep consecutive checkpoints.

    python -m data_pipeline.collect --config=experiments/configs/tenants.py --jobs=2     # two tasks at once, each on a GPU
    accelerate launch --num_processes=4 -m data_pipeline.collect --config=...            # one after the other, on four GPUs
    sbatch experiments/cluster/collect.sbatch experiments/configs/common_sense.py:ARC-c  # tasks over a cluster

Each task is trained to a point, then continued with every step saved, all tasks from one initial A, as published, unless
`collect.seed_per_task`. A run is `out/<task>/{run.json,step_<n>/}`; finished runs are skipped, unfinished ones start over, so
that experiments on one base, which hold out other tasks or learn from other conditions, share one `out`.
"""

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import joblib
import ml_collections
from absl import flags
from tqdm import tqdm

from data_pipeline import fine_tuning
from dnd_jax import base_models, checksums, cli, files, folders, images, prompts, workdirs
from dnd_jax.jail.isolation import PARENT_DEATH
from dnd_jax.sources import Source
from dnd_jax.tasks import multi_task, read_tasks
from dnd_jax.types import InputError

FREE = {"out": None, "multi_task_steps": None}  # of `config.collect`, no part of a run's identity, which has its own `steps`


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning run: rows of `sources` for `steps` steps, then `checkpoints` more, each saved."""

    name: str
    sources: tuple[Source, ...]
    steps: int
    checkpoints: int


def plan_runs(config: ml_collections.ConfigDict) -> list[Run]:
    """Return first the multi-task run, on the union of the training tasks, and then a run per task.

    No run depends on another task's split, so that experiments that hold out other tasks share their runs.
    """
    tasks = read_tasks(config.tasks)
    c = config.collect
    union = tuple(task.train for task in tasks if task.split == "train")
    if not union:
        raise InputError(f"{config.tasks}: no task has the split 'train', on which adapters could be learned from")
    runs = [Run(task.name, (task.train,), c.steps, c.checkpoints) for task in tasks]
    return [Run(multi_task(tasks), union, c.multi_task_steps, 1), *runs]


def take_shard(runs: Sequence[Run], shard: str) -> list[Run]:
    """Return the runs `i, i + n, ...` of a shard `i/n`, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"command line: --shard is {shard!r}, expected i/n with i from 0 to n - 1")
    return list(runs[int(match[1]) :: int(match[2])])


def identity(config: ml_collections.ConfigDict, run: Run) -> dict[str, Any]:
    """Return what a run depends on: prompts, base model, LoRA config and training settings, with hashes."""
    return {
        "task": run.name, "base": base_models.identity(config.base), "seed": config.seed,
        "files": {source.key: source.sha256() for source in run.sources},
        "collect": cli.config_dict(config.collect) | FREE,
        "steps": run.steps, "checkpoints": run.checkpoints, "initial_seed": initial_seed(config, run),
    }


def initial_seed(config: ml_collections.ConfigDict, run: Run) -> int:
    """Return the seed of a run's initial A: one for all, as published, or with `seed_per_task` one made of its name."""
    c = config.collect
    return c.initial_seed + (int(files.sha256_text(run.name)[:6], 16) if c.seed_per_task else 0)


def agrees(key: str, known: Any, value: Any) -> bool:
    """Return whether one entry of a run's recorded identity is what it is now; data files are compared by hash, not by name."""
    if isinstance(known, dict):
        if key == "base":
            return base_models.is_same(known, value)
        if key == "files":
            return [*known.values()] == [*value.values()]
        if key == "collect":
            return known | FREE == value
    return known == value


def is_finished(folder: pathlib.Path, expected: dict[str, Any]) -> bool:
    """Return whether a run is there; raise InputError when it was made from something else."""
    if not (folder / "run.json").exists():
        return False
    found = files.read_json(folder / "run.json")
    for key, value in expected.items():
        if not agrees(key, found.get(key), value):
            raise InputError(f"{folder / 'run.json'}: {changes(key, found.get(key), value)}; move the folder away, or set "
                             "another config.collect.out")
    return True


def changes(key: str, known: Any, value: Any) -> str:
    """Return in words what differs between an entry of a run's recorded identity and what it is now."""
    if key == "collect" and isinstance(known, dict):
        return "; ".join(f"{field} was {old!r}, is now {new!r}"
                         for field, (old, new) in workdirs.differences({key: known | FREE}, {key: value}).items())
    return f"{key} was {known}, is now {value}"


def collect_one(config: ml_collections.FrozenConfigDict, run: Run, accelerator: Any = None) -> str:
    """Train one run and write its folder whole; return its name. Of several processes the first one writes."""
    began, known = time.perf_counter(), identity(config, run)  # of the data as they are now
    c = config.collect
    if accelerator is None and is_finished(pathlib.Path(c.out) / run.name, known):
        return run.name  # by another experiment meanwhile
    model, tokenizer, initial = fine_tuning.load_model(config.base, c, initial_seed(config, run))
    for name, parameter in model.named_parameters():
        if name in initial:
            parameter.data.copy_(initial[name])
    rows = [row for source in run.sources for row in prompts.read_rows(source)[: c.max_rows]]
    reader = images.Reader(config.base, tokenizer) if any(row.images for row in rows) else None
    examples = fine_tuning.tokenise(tokenizer, rows, c.max_length, reader)
    if not examples:
        raise InputError(f"{run.name}: every prompt fills the cut-off, config.collect.max_length = {c.max_length} tokens")
    writes = accelerator is None or accelerator.is_main_process
    if writes and len(examples) < len(rows):
        cli.say(f"{run.name}: {len(rows) - len(examples)} of {len(rows)} rows are left out, as their prompts fill the cut-off, "
                f"config.collect.max_length = {c.max_length} tokens")
    with folders.atomic_folder(pathlib.Path(c.out) / run.name, "run.json") if writes else contextlib.nullcontext() as folder:
        losses = fine_tuning.fine_tune(
            model, examples, tokenizer.eos_token_id, c, config.seed, run.steps, run.checkpoints,
            lambda step: model.save_pretrained(folder / f"step_{step}") if folder else None, accelerator)
        if folder:
            files.write_json(folder / "run.json", {
                **known, "loss": losses, "rows": len(examples), "rows_cut_off": len(rows) - len(examples),
                "seconds": time.perf_counter() - began,
            })
            checksums.write(folder)
    return run.name


def _start_worker(threads: int, started: Any) -> None:
    """Give a worker its threads and, where there are GPUs, one of them in turn; it ends when its parent does."""
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(AttributeError):  # of systems other than Linux
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_integer("jobs", None, "Tasks trained at once, each in its own process; by default as many as there are GPUs, or "
                         "half of the processor's cores.", lower_bound=1)
    flags.DEFINE_string("shard", "0/1", "i/n: only every n-th run, from the i-th, counted from 0.")


def main(args: Any) -> None:
    config = ml_collections.FrozenConfigDict(args.config)
    together = int(os.environ.get("WORLD_SIZE", "1"))  # as accelerate launch says
    fine_tuning.check(config.collect, together)
    if config.seed < 0:
        raise InputError(f"config.seed is {config.seed}, expected at least 0")
    runs = take_shard(plan_runs(config), args.shard)
    base_models.load_tokenizer(config.base)
    todo = [run for run in runs if not is_finished(pathlib.Path(config.collect.out) / run.name, identity(config, run))]
    if not todo:
        print(f"collect: all {len(runs)} runs are there")
        return
    bar = functools.partial(tqdm, desc="collect", initial=len(runs) - len(todo), total=len(runs))
    if together > 1:
        _collect_launched(config, todo, bar)
    else:
        _collect_in_pool(config, todo, bar, args.jobs)


def _collect_launched(config: ml_collections.FrozenConfigDict, todo: Sequence[Run], bar: Callable[..., Any]) -> None:
    """Collect one run after the other, each by all processes that `accelerate launch` has started."""
    accelerator = fine_tuning.launched()
    for run in bar(todo, disable=not accelerator.is_main_process):
        collect_one(config, run, accelerator)
    accelerator.end_training()


def _collect_in_pool(config: ml_collections.FrozenConfigDict, todo: Sequence[Run], bar: Callable[..., Any],
                     jobs: int | None) -> None:
    """Collect `jobs` runs at once, each in a process of its own; what fails is raised when the others are done."""
    for source in {source.key: source for run in todo for source in run.sources}.values():
        prompts.read_rows(source)  # what is malformed is to be said before hours of training
    context = multiprocessing.get_context("spawn")
    jobs = jobs or fine_tuning.gpus() or max(1, joblib.cpu_count() // 2)
    threads = max(1, joblib.cpu_count() // jobs)
    failures: dict[str, BaseException] = {}
    with futures.ProcessPoolExecutor(jobs, context, _start_worker, (threads, context.Value("i", 0))) as pool:
        names = {pool.submit(collect_one, config, run): run.name for run in todo}
        try:
            for done in bar(futures.as_completed(names)):
                if error := done.exception():
                    failures[names[done]] = error
        except KeyboardInterrupt:  # the pool would finish all
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    _raise(failures, len(todo))


def _raise(failures: Mapping[str, BaseException], count: int) -> None:
    """Raise what runs failed with, naming each; the others are done."""
    if any(isinstance(error, BrokenProcessPool) for error in failures.values()):
        raise InputError(f"collect: a process was killed, as for want of memory; {len(failures)} of {count} runs are not done: "
                         f"{', '.join(failures)}; the same command goes on")
    if failures:
        said = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise InputError(f"collect: {len(failures)} of {count} runs failed: {said}") from next(iter(failures.values()))


if __name__ == "__main__":
    cli.run(main, define_flags)
