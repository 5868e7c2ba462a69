"""Collect adapters: fine-tune the base model on every task by LoRA and keep consecutive checkpoints.

    python -m data_pipeline.collect --config=experiments/configs/tenants.py --jobs=2

Each task is trained to a point, then continued with every step saved, all tasks from one initial A, as published, unless
`collect.seed_per_task`. A run is `out/<task>/{run.json,step_<n>/}`; finished runs are skipped, unfinished ones start over.
"""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections
from absl import flags
from tqdm import tqdm

from dnd_jax import cli, files, prompts
from dnd_jax.sources import Source
from dnd_jax.tasks import read_tasks
from dnd_jax.types import InputError

MULTI_TASK = "multi_task"


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning run: rows of `sources` for `steps` steps, then `checkpoints` more, each saved."""

    name: str
    split: str
    sources: tuple[Source, ...]
    steps: int
    checkpoints: int


def plan_runs(config: ml_collections.ConfigDict) -> list[Run]:
    """Return a run per task, and first the multi-task run on the union of the training tasks."""
    tasks = read_tasks(config.tasks)
    c = config.collect
    union = tuple(task.train for task in tasks if task.split == "train")
    runs = [Run(task.name, task.split, (task.train,), c.steps, c.checkpoints) for task in tasks]
    return [Run(MULTI_TASK, "baseline", union, c.multi_task_steps, 1), *runs]


def identity(config: ml_collections.ConfigDict, run: Run) -> dict[str, Any]:
    """Return what a run depends on: prompts, base model, LoRA config and training settings, with hashes."""
    return {
        "task": run.name, "split": run.split, "base": base_identity(config.base), "seed": config.seed,
        "files": {str(source): source.sha256() for source in run.sources},
        "collect": json.loads(config.collect.to_json_best_effort()) | {"out": None},
        "steps": run.steps, "checkpoints": run.checkpoints, "initial_seed": initial_seed(config, run),
    }


def initial_seed(config: ml_collections.ConfigDict, run: Run) -> int:
    """Return the seed of a run's initial A: one for all, as published, or with `seed_per_task` one made of its name."""
    c = config.collect
    return c.initial_seed + (int(files.sha256_text(run.name)[:6], 16) if c.seed_per_task else 0)


def base_identity(base: str) -> dict[str, str]:
    """Return a base model's name and a hash: of a folder's config and weights, or a hub repository's commit."""
    if pathlib.Path(base).is_dir():
        weights = files.sha256_folder(base, "*.safetensors") + files.sha256_folder(base, "config.json")
        return {"name": base, "sha256": files.sha256_text(weights)}
    from transformers import AutoConfig

    return {"name": base, "sha256": str(getattr(AutoConfig.from_pretrained(base), "_commit_hash", None))}


def is_finished(folder: pathlib.Path, expected: dict[str, Any]) -> bool:
    """Return whether a run is there; raise InputError when it was made from something else."""
    if not (folder / "run.json").exists():
        return False
    found = files.read_json(folder / "run.json")
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(f"{folder / 'run.json'}: {key} was {found.get(key)}, is now {value}; move the folder away")
    return True


# --- training --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def load_model(base: str, lora: tuple[tuple[str, Any], ...], seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Load base and tokenizer, add LoRA layers; return the PEFT model, the tokenizer and the initial LoRA weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tokenizer = prompts.load_tokenizer(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **dict(lora)))
    return peft_model, tokenizer, {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}


def collate(tokenizer: Any, rows: Sequence[prompts.Row], max_length: int) -> Callable[[Sequence[int]], dict[str, Any]]:
    """Return `indices -> model inputs`: prompts and responses padded to the right, labels on responses only."""
    import torch

    examples = []
    for row in rows:
        prompt, response = prompts.prompt_ids(tokenizer, row), prompts.response_ids(tokenizer, row)
        examples.append(((prompt + response)[:max_length], ([-100] * len(prompt) + response)[:max_length]))

    def batch(indices: Sequence[int]) -> dict[str, Any]:
        chosen = [examples[i] for i in indices]
        width = max(len(ids) for ids, _ in chosen)

        def pad(values: Iterable[tuple[list[int], int]]) -> Any:
            return torch.tensor([v + [fill] * (width - len(v)) for v, fill in values])

        return {"input_ids": pad((ids, tokenizer.eos_token_id) for ids, _ in chosen),
                "attention_mask": pad(([1] * len(ids), 0) for ids, _ in chosen),
                "labels": pad((labels, -100) for _, labels in chosen)}

    return batch


def fine_tune(model: Any, batch: Callable[[Sequence[int]], dict[str, Any]], rows: int, config: ml_collections.ConfigDict,
              run: Run, save: Callable[[int], None]) -> list[float]:
    """Train the LoRA weights in place and return the loss of every step.

    The first `run.steps` steps follow a cosine from `learning_rate` to zero; the checkpoints after them are
    consecutive steps at `continued_learning_rate`. The order of rows depends on `config.seed` alone.
    """
    import torch

    c = config.collect
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=c.learning_rate, weight_decay=c.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    losses, order = [], torch.empty(0, dtype=torch.long)
    warmup = max(1, math.ceil(c.warmup_ratio * run.steps))
    model.train()
    for step in range(run.steps + run.checkpoints):
        cosine = 0.5 * (1 + math.cos(math.pi * step / run.steps)) * min(1, (step + 1) / warmup)
        rate = c.learning_rate * cosine if step < run.steps else c.continued_learning_rate
        optimizer.param_groups[0]["lr"] = rate
        while len(order) < c.batch_size:
            order = torch.cat([order, torch.randperm(rows, generator=generator)])
        indices, order = order[: c.batch_size].tolist(), order[c.batch_size :]
        loss = model(**{k: v.to(model.device) for k, v in batch(indices).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, c.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step >= run.steps:
            save(step + 1)
    return losses


def collect_one(config: ml_collections.ConfigDict, run: Run) -> str:
    """Train one run and write its folder whole; return its name."""
    began = time.perf_counter()
    c = config.collect
    lora = {"r": c.rank, "lora_alpha": c.alpha, "target_modules": c.target_modules, "lora_dropout": c.dropout}
    model, tokenizer, initial = load_model(config.base, tuple(lora.items()), initial_seed(config, run))
    for name, parameter in model.named_parameters():
        if name in initial:
            parameter.data.copy_(initial[name])
    rows = [row for source in run.sources for row in prompts.read_rows(source)[: c.max_rows]]
    with files.atomic_folder(pathlib.Path(c.out) / run.name) as folder:
        losses = fine_tune(model, collate(tokenizer, rows, c.max_length), len(rows), config, run,
                           lambda step: model.save_pretrained(folder / f"step_{step}"))
        files.write_json(folder / "run.json", {
            **identity(config, run), "loss": losses, "rows": len(rows), "seconds": time.perf_counter() - began,
        })
    return run.name


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_integer("jobs", max(1, (os.cpu_count() or 1) // 2), "Tasks trained at once, each in its own process.")


def main(args: Any) -> None:
    config = ml_collections.FrozenConfigDict(args.config)
    prompts.load_tokenizer(config.base)
    runs = plan_runs(config)
    todo = [run for run in runs if not is_finished(pathlib.Path(config.collect.out) / run.name, identity(config, run))]
    if not todo:
        print(f"collect: all {len(runs)} runs are there")
        return
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with multiprocessing.get_context("spawn").Pool(args.jobs, _start_worker, (threads,)) as pool:
        finished = pool.imap_unordered(functools.partial(collect_one, config), todo)
        for _ in tqdm(finished, desc="collect", initial=len(runs) - len(todo), total=len(runs)):
            pass


if __name__ == "__main__":
    cli.run(main, define_flags)
