"""Export collected runs to a pair store: PEFT folders become weight tokens, prompts become conditions.

    python -m data_pipeline.export --config=experiments/configs/tenants.py
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np
import safetensors.numpy
from jaxtyping import Float
from tqdm import tqdm

from data_pipeline import agreement, collect
from dnd_jax import adapters, base_models, checksums, cli, encoders, files, folders, pairs, prompts, tokens
from dnd_jax.adapters import Spec
from dnd_jax.sources import Row
from dnd_jax.tasks import Task, digest, read_tasks, step_folders
from dnd_jax.tokens import Layout
from dnd_jax.types import InputError, Tree

FORMS = ("prompt", "prompt+answer", "answer", "mix")
GAUGES = ("none", "canonical", "align")


def read_run(run: pathlib.Path, change: Callable[[Tree], Tree], reference: Spec, layout: Layout, first: str
             ) -> tuple[Float[np.ndarray, "K T H W"] | None, Spec, list[str]]:
    """Return the weight tokens of all checkpoints of a run, padding NaN, its last spec, and what it disagrees on.

    Tokens are None where the run disagrees.
    """
    encoded, found = [], []
    if fault := checksums.fault(run):
        raise InputError(f"{run}/{fault}; move the run away and collect it again")
    for folder in step_folders(run):
        tree, spec = adapters.read(folder)
        agreement.refuse_altered_base(spec, str(folder))
        found += agreement.disagreements(reference, spec, str(folder), first)
        if not found:
            encoded.append(tokens.encode(change(tree), layout)[0])
    return (None if found else np.stack(encoded)), spec, found


def check(config: ml_collections.ConfigDict) -> None:
    """Raise InputError at a form of conditions, a pool or a gauge that can't be."""
    if config.condition.form not in FORMS:
        raise InputError(f"config.condition.form is {config.condition.form!r}, expected one of {FORMS}")
    if config.condition.pool is not None and config.condition.pool < 1:
        raise InputError(f"config.condition.pool is {config.condition.pool}, expected a number of prompts, at least 1, or None")
    if config.export.gauge not in GAUGES:
        raise InputError(f"config.export.gauge is {config.export.gauge!r}, expected one of {GAUGES}")


def make_gauge(name: str, reference: Tree, spec: Spec) -> Callable[[Tree], Tree]:
    """Return the change of matrices that keeps products: `none`, `canonical`, or `align` to a reference's A."""
    changes: dict[str, Callable[[Tree], Tree]] = {
        "none": lambda tree: tree, "canonical": adapters.canonical, "align": lambda tree: adapters.align(tree, reference)}
    if name != "none" and spec.config.get("target_parameters"):
        raise InputError(f"config.export.gauge is {name!r}, but the runs adapt stacks of experts, where it isn't defined")
    return changes[name]


def condition_texts(rows: Sequence[Row], settings: ml_collections.ConfigDict) -> list[str]:
    """Return what is encoded of the rows that a task trains on: the first `pool` of them, or all, in one of the paper's forms.

    `prompt`; `prompt+answer`; `answer`; or `mix`, in which a fifth of the prompts has its answer: by one draw for all samples,
    which is our reading of the paper.
    """
    rows = rows[: settings.pool] if settings.pool else rows
    with_answer = np.random.default_rng(0).random(len(rows)) < {"prompt+answer": 1.0, "mix": 0.2}.get(settings.form, 0.0)
    if settings.form == "answer":
        return [row.response for row in rows]
    return [f"{row.prompt}\n{row.response}" if both else row.prompt for row, both in zip(rows, with_answer, strict=True)]


def importance(tokens: Float[np.ndarray, "K T H W"]) -> Float[np.ndarray, " T"]:
    """Return the weight of each token in the loss, by one task; the mean over tasks is what counts.

    The deviation over a task's checkpoints, averaged over the token's elements, divided by the average over all elements. A task
    with one checkpoint, or none that differ, weighs every token 1.
    """
    deviation = tokens.std(0, ddof=1) if len(tokens) > 1 else np.zeros_like(tokens[0])
    average = np.nanmean(deviation)
    return np.nanmean(deviation, axis=(1, 2)) / average if average > 0 else np.ones(tokens.shape[1])


def export(config: ml_collections.ConfigDict) -> None:
    """Write the pair store of `config.export.store` whole, or raise InputError and write nothing."""
    check(config)
    tasks, runs = read_tasks(config.tasks), pathlib.Path(config.collect.out)
    trained = [task.name for task in tasks if task.split == "train"]
    if not trained:
        raise InputError(f"{config.tasks}: no task has the split 'train'; the decoder needs at least one to be trained on")
    folders.check_ours(config.export.store, "manifest.json", pairs.NAMES)
    first = step_folders(runs / trained[0])[-1]
    reference_tree, reference = adapters.read(first)
    agreement.refuse_altered_base(reference, str(first))
    layout = tokens.plan(reference, config.export.chunk)
    change = make_gauge(config.export.gauge, reference_tree, reference)
    base = check_runs(config)
    made_of = identity(config, tasks, base)
    if _is_made_of(config.export.store, made_of):
        print(f"{config.export.store}: is there, made of the same")
        return
    if os.path.exists(f"{config.export.store}/manifest.json"):
        cli.say(f"{config.export.store}: is there, made of something else or damaged: made anew; workdirs trained on it don't "
                "go on with the new one")
    encoder, encoder_sha256 = encoders.make(config.encoder), encoders.identity(config.encoder)
    if remark := encoders.describe_cut(encoder, [text for task in tasks for text in texts_of(config, task)]):
        cli.say(remark)
    entries: dict[str, dict[str, Any]] = {}
    with folders.atomic_folder(config.export.store, "manifest.json", pairs.NAMES) as folder:
        weights, specs, found = [], {}, []
        for task in tqdm(tasks, desc="export"):
            encoded, spec, differences = read_run(runs / task.name, change, reference, layout, str(first))
            found += differences
            if encoded is None:
                continue
            texts = texts_of(config, task)
            write_task(folder / "tasks" / task.name, encoded, texts, encoder)
            entries[task.name] = {"split": task.split, "checkpoints": len(encoded), "prompts": len(texts),
                                  "run_sha256": digest(runs / task.name)}
            if task.split == "train":
                weights.append(importance(encoded))
                specs[str(runs / task.name)] = spec
        agreement.raise_all(found)
        np.save(folder / "importance.npy", np.mean(weights, axis=0).astype(np.float32))
        carried, averaged = agreement.default_parts(specs)
        if carried:
            safetensors.numpy.save_file(carried, folder / pairs.CARRIED)
        files.write_json(folder / "manifest.json", {
            "format": pairs.FORMAT, "base": base, "spec": reference.to_json(), "layout": layout.to_json(),
            "gauge": config.export.gauge, "averaged": averaged,
            "encoder": config.encoder.to_dict(), "encoder_sha256": encoder_sha256,
            "form": config.condition.form, "tasks": entries, "made_of": made_of,
            "sha256": {str(p.relative_to(folder)): files.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        })
        files.write_text(folder / pairs.SEAL, files.sha256_file(folder / "manifest.json"))
    print(f"{config.export.store}: {len(tasks)} tasks, tokens {list(layout.shape)}, chunk {layout.chunk}")


def identity(config: ml_collections.ConfigDict, tasks: Sequence[Task], base: dict[str, str]) -> str | None:
    """Return a hash of all that a store is made of; None if a run has no record of its files, or others by now.

    Made again of the same, on a machine of another kind, it could be another one by a rounding, on which no training goes on.
    """
    folders_of = {task.name: pathlib.Path(config.collect.out) / task.name for task in tasks}
    runs = {name: None if checksums.fault(folder) else digest(folder) for name, folder in folders_of.items()}
    made_of = {"format": pairs.FORMAT, "base": base, "gauge": config.export.gauge, "chunk": config.export.chunk,
               "encoder": [config.encoder.to_dict(), encoders.identity(config.encoder)],
               "tasks": [[task.name, task.split, runs[task.name], texts_of(config, task)] for task in tasks]}
    return None if None in runs.values() else files.sha256_text(json.dumps(made_of))


def _is_made_of(store: str, made_of: str | None) -> bool:
    try:
        return made_of is not None and pairs.open_store(store).manifest["made_of"] == made_of
    except InputError:  # none is there, or a damaged one
        return False


def texts_of(config: ml_collections.ConfigDict, task: Task) -> list[str]:
    """Return the texts of a task's conditions, of the rows that it is trained on."""
    return condition_texts(prompts.read_rows(task.train)[: config.collect.max_rows], config.condition)


def write_task(folder: pathlib.Path, encoded: np.ndarray, texts: Sequence[str], encoder: encoders.Encoder) -> None:
    """Write a task's weight tokens `[K, T, H, W]`, and the texts of its conditions, as they are and encoded `[P, L, C]`."""
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", encoded)
    np.save(folder / "condition.npy", encoder(texts))
    files.write_json(folder / "prompts.json", texts)


def check_runs(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Return the base that all runs were collected on.

    Raises:
      InputError: names every run with another base or initial A, or of other data or settings than the config's.
    """
    _, *runs = collect.plan_runs(config)  # without the multi-task run
    collected = {run.name: pathlib.Path(config.collect.out) / run.name for run in runs}
    if missing := [str(folder) for folder in collected.values() if not (folder / "run.json").exists()]:
        raise InputError(f"{', '.join(missing)}: no such run; run data_pipeline.collect first")
    records = {str(folder): files.read_json(folder / "run.json") for folder in collected.values()}
    for name, record in records.items():
        if not isinstance(record, dict) or "base" not in record:
            raise InputError(f"{name}/run.json: doesn't say on which base, found {str(record)[:60]!r}; collect it again")
    base = base_models.identity(config.base)
    found = [f"{name}: collected on base {record['base']}, the config's is {base}"
             for name, record in records.items() if not base_models.is_same(record["base"], base)]
    for run in runs:
        known, wanted = records[str(collected[run.name])], collect.identity(config, run)
        others = [key for key in ("collect", "steps", "checkpoints", "files")
                  if key in known and not collect.agrees(key, known[key], wanted[key])]
        found += [f"{collected[run.name]}: {collect.changes(key, known[key], wanted[key])}; collect it again" for key in others]
    seeds = {name: record.get("initial_seed") for name, record in records.items()}
    if not config.collect.seed_per_task:
        found += agreement.check_initial_seeds(seeds, config.export.gauge)
    agreement.raise_all(found)
    return base


def define_flags() -> None:
    cli.define_config()


def main(args: Any) -> None:
    export(args.config)


if __name__ == "__main__":
    cli.run(main, define_flags)
