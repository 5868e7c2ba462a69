"""Export collected runs to a pair store: PEFT folders become weight tokens, prompts become conditions.

    python -m data_pipeline.export --config=experiments/configs/tenants.py
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import safetensors.numpy
from jaxtyping import Float
from tqdm import tqdm

from data_pipeline import collect, datasets
from dnd_jax import adapters, cli, files, pairs, prompts, tokens
from dnd_jax.encoders import SentenceEncoder
from dnd_jax.tokens import Layout
from dnd_jax.types import InputError


def step_folders(run: pathlib.Path) -> list[pathlib.Path]:
    """Return a run's adapter folders in order of their steps."""
    found = [path for path in run.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    if not found:
        raise InputError(f"{run}: holds no step_<n> folder, expected one per checkpoint")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def agree(reference: adapters.Spec, spec: adapters.Spec, where: pathlib.Path, first: pathlib.Path) -> None:
    """Raise InputError unless two adapters have the same config and matrices; the message names both values."""
    for key in sorted(reference.config.keys() | spec.config.keys()):
        ours, theirs = (_unordered(s.config.get(key)) for s in (spec, reference))
        if ours != theirs:
            raise InputError(f"{where}: {key} is {ours!r}, {first} has {theirs!r}")
    for path in sorted(reference.leaves.keys() | spec.leaves.keys()):
        if reference.leaves.get(path) != spec.leaves.get(path):
            raise InputError(f"{where}: {path} is {spec.leaves.get(path)}, {first} has {reference.leaves.get(path)}")
    for key in sorted(reference.carried.keys() | spec.carried.keys()):
        both = key in reference.carried and key in spec.carried
        if not both or not np.array_equal(reference.carried[key], spec.carried[key]):
            raise InputError(f"{where}: {key}, which no decoder generates, is not the same as in {first}")


def read_tokens(run: pathlib.Path, reference: adapters.Spec, layout: Layout, first: pathlib.Path
                ) -> Float[np.ndarray, "K T H W"]:
    """Return the weight tokens of all checkpoints of a run, padding NaN."""
    encoded = []
    for folder in step_folders(run):
        tree, spec = adapters.read(folder)
        agree(reference, spec, folder, first)
        encoded.append(tokens.encode(tree, layout)[0])
    return np.stack(encoded)


def importance(per_task: Sequence[Float[np.ndarray, "K T H W"]]) -> Float[np.ndarray, " T"]:
    """Return the weight of each token in the loss.

    The deviation over a task's checkpoints, averaged over the token's elements, divided by the average over all
    elements; then the mean over tasks. Tasks with one checkpoint, or none that differ, weigh every token 1.
    """
    weights = []
    for value in per_task:
        deviation = value.std(0, ddof=1) if len(value) > 1 else np.zeros_like(value[0])
        average = np.nanmean(deviation)
        weights.append(np.nanmean(deviation, axis=(1, 2)) / average if average > 0 else np.ones(value.shape[1]))
    return np.mean(weights, axis=0).astype(np.float32)


def export(config: ml_collections.ConfigDict) -> None:
    """Write the pair store of `config.export.store` whole, or raise InputError and write nothing."""
    tasks, runs = datasets.read_tasks(config.tasks), pathlib.Path(config.collect.out)
    first = step_folders(runs / tasks[0].name)[0]
    _, reference = adapters.read(first)
    layout = tokens.plan(reference, config.export.chunk)
    base = files.read_json(runs / tasks[0].name / "run.json")["base"]
    if base != (found := collect.base_identity(config.base)):
        raise InputError(f"{runs / tasks[0].name}: collected on base {base}, the config's is {found}")
    encoder = SentenceEncoder(config.encoder.name, config.encoder.length)
    entries: dict[str, dict[str, Any]] = {}
    with files.atomic_folder(config.export.store) as folder:
        weighed = []
        for task in tqdm(tasks, desc="export"):
            encoded = read_tokens(runs / task.name, reference, layout, first)
            texts = [row.prompt for row in prompts.read_rows(task.train)]
            target = folder / "tasks" / task.name
            target.mkdir(parents=True)
            np.save(target / "tokens.npy", encoded)
            np.save(target / "condition.npy", encoder(texts))
            files.write_json(target / "prompts.json", texts)
            entries[task.name] = {"split": task.split, "checkpoints": len(encoded), "prompts": len(texts)}
            if task.split == "train":
                weighed.append(encoded)
        np.save(folder / "importance.npy", importance(weighed))
        if reference.carried:
            safetensors.numpy.save_file(reference.carried, folder / "carried.safetensors")
        files.write_json(folder / "manifest.json", {
            "format": pairs.FORMAT, "base": base, "spec": reference.to_json(), "layout": layout.to_json(),
            "encoder": {"name": config.encoder.name, "length": config.encoder.length}, "tasks": entries,
            "sha256": {str(p.relative_to(folder)): files.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        })
    print(f"{config.export.store}: {len(tasks)} tasks, tokens {list(layout.shape)}, chunk {layout.chunk}")


def _unordered(value: Any) -> Any:
    return sorted(value, key=json.dumps) if isinstance(value, list) else value


def define_flags() -> None:
    cli.define_config()


def main(args: Any) -> None:
    export(args.config)


if __name__ == "__main__":
    cli.run(main, define_flags)
