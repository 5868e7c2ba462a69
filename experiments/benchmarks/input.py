"""Whether input keeps the device waiting: samples/s of the input path beside samples/s of the training step.

    python -m experiments.benchmarks.input --config=experiments/configs/tenants.py            # its store, by `make demo`
    python -m experiments.benchmarks.input --config=experiments/configs/common_sense.py:ARC-c # random store, cut down on a CPU

Where the config's store isn't there, one of random values with the config's shapes is written to a temporary folder; without
an accelerator `--scale` (8 by default) divides its widths as in `overhead.py`. Rows: the input path alone, from memory maps to
arrays on the device; the step alone, on one batch again and again; both as in training (but that the loop waits for each step),
with the share of the time in which it waited for input. Files just written or read are in the page cache: a disk's own speed
comes out only with stores larger than memory.
"""

import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from dnd_jax import cli, files, inputs, optimizers, pairs, sharding, train
from dnd_jax.decoder import HyperConvDecoder
from experiments.benchmarks import overhead

TASKS, CHECKPOINTS = 4, 2  # of a random store


def random_tasks(folder: pathlib.Path, decoder: HyperConvDecoder) -> list[pairs.Task]:
    """Write and map tasks of random values with twice as many prompts as a condition takes."""
    rng, tasks = np.random.default_rng(0), []
    n, *shape = decoder.condition_shape
    for i in range(TASKS):
        for name, size, dtype in (("tokens", (CHECKPOINTS, *decoder.features[-1]), "float32"),
                                  ("condition", (2 * n, *shape), "float16")):
            array = np.lib.format.open_memmap(folder / f"{name}{i}.npy", "w+", dtype, size)
            for row in array:
                row[:] = rng.standard_normal(row.shape, np.float32)
        tokens, condition = (np.load(folder / f"{name}{i}.npy", mmap_mode="r") for name in ("tokens", "condition"))
        tasks.append(pairs.Task(f"task{i}", "train", tokens, condition, ("",) * 2 * n))
    return tasks


def measure(config: ml_collections.ConfigDict, decoder: HyperConvDecoder, tasks: Sequence[pairs.Task], steps: int
            ) -> dict[str, float]:
    """Return samples/s of input, step and both, bytes of a sample, and the share of the time spent waiting for input."""
    mesh, size = sharding.make_mesh(config.mesh), config.train.batch_size
    decoder = decoder.clone(mesh=mesh)
    read = inputs.make_read(config, tasks, mesh)
    mask = np.ones(tasks[0].tokens[0].shape, bool)
    step = jax.jit(train.make_train_step(config, decoder, mesh, mask, np.ones(len(mask), np.float32)), donate_argnums=0)
    batch = read(0)
    state, _ = step(train.make_state(config, decoder, mesh), *batch)  # compiled, and not timed

    began = time.perf_counter()
    with inputs.Prefetch(read, 0, steps, config.train.prefetch) as batches:
        for batch in batches:
            jax.block_until_ready(batch)
    input_s = time.perf_counter() - began

    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, *batch)
    jax.block_until_ready(metrics)
    step_s = time.perf_counter() - began

    began = time.perf_counter()
    with inputs.Prefetch(read, 0, steps, config.train.prefetch) as batches:
        for batch in batches:
            state, metrics = step(state, *batch)
            jax.block_until_ready(metrics)
        both_s = time.perf_counter() - began
    count = size * steps
    return {"input": count / input_s, "step": count / step_s, "both": count / both_s, "waited": batches.wait_s / both_s,
            "bytes": sum(a.nbytes for a in batch) / size}


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_integer("steps", 20, "Batches of each row.")
    flags.DEFINE_integer("scale", None, "Divides every width of a random store; by default 1 with an accelerator, 8 without.")
    flags.DEFINE_string("json", None, "File that the figures are written to.")


def main(args: Any) -> None:
    config, scale = args.config, args.scale or (8 if jax.default_backend() == "cpu" else 1)
    with tempfile.TemporaryDirectory() as folder:
        if pathlib.Path(config.export.store).exists():
            store, scale = pairs.open_store(config.export.store), 1
            decoder, tasks = train.make_decoder(config, store), list(store.split("train"))
        else:
            config = overhead.cut_down(config, scale)
            decoder = overhead.make_decoder(config)[0].clone(
                dtype=optimizers.dtype_of(config, "compute_dtype"), remat=config.train.remat)
            tasks = random_tasks(pathlib.Path(folder), decoder)
        found = measure(config, decoder, tasks, args.steps)
    print(f"{jax.devices()[0].device_kind}, batch {config.train.batch_size}, {config.train.prefetch} batches ahead"
          + (f", every width divided by {scale}" if scale > 1 else ""))
    print(f"input alone   {found['input']:10.1f} samples/s of {found['bytes'] / 1e6:.2f} MB")
    print(f"step alone    {found['step']:10.1f} samples/s")
    print(f"both          {found['both']:10.1f} samples/s, waiting for input {found['waited']:.1%} of the time")
    if args.json:
        files.write_json(args.json, {"device": jax.devices()[0].device_kind, "scale": scale, **found})


if __name__ == "__main__":
    cli.run(main, define_flags)
