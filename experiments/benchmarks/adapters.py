"""How fast adapters are read, written and cut into tokens, each beside the plain thing it does, in one run.

    python -m experiments.benchmarks.adapters            # Qwen2.5-7B's shape, rank 16, all linear layers, bfloat16
    python -m experiments.benchmarks.adapters --layers=2 # a quick look

A ratio of 1 for reading means: as fast as safetensors loads the same file. Each figure is the median of `--repeats`.
"""

import math
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax import adapters, cli, files, tokens
from dnd_jax.adapters import Spec
from dnd_jax.adapters.architecture import spec_of_model
from dnd_jax.types import TokenArray, Tree
from experiments.benchmarks.overhead import seconds_of
from experiments.configs import common


def make_adapter(layers: int) -> tuple[Tree, Spec]:
    """Return a random adapter of Qwen2.5-7B's shape with so many layers."""
    _, rank, shapes = common.MODELS["7b"]
    spec = spec_of_model({**shapes, "num_hidden_layers": layers}, rank, dtype="bfloat16")
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(leaf.shape, np.float32).astype(ml_dtypes.bfloat16) for path, leaf in spec.leaves.items()}
    return unflatten_dict(flat, sep="/"), spec


def encode_by_tiles(tree: Tree, layout: tokens.Layout) -> TokenArray:
    """Return the tokens of `tokens.encode`, one tile after the other, for layouts without partial tiles."""
    flat, done = flatten_dict(tree, sep="/"), []
    for matrix in layout.matrices:
        value = np.asarray(flat[matrix.path], np.float32)
        value = value.T if matrix.transposed else value
        for start in range(0, matrix.width, layout.chunk):
            tile = value[:, start : start + layout.chunk]
            mean, std = tile.mean(), tile.std(ddof=1)
            pair = np.array([mean * 8, np.log(std * 0.9 + 0.1) + 1.6], np.float32)
            token = np.full((layout.rank + 2, layout.chunk + 2), np.nan, np.float32)
            token[: matrix.rank, :-2] = (tile - mean) / std
            for i in (-2, -1):
                for j in range(layout.chunk + 2):
                    token[i, j] = pair[j % 2]
            for i in range(layout.rank + 2):
                token[i, -2:] = pair
            done.append(token)
    return np.stack(done)


def decode_by_tiles(array: TokenArray, layout: tokens.Layout) -> Tree:
    """Return the tree of `tokens.decode`, one tile after the other, for layouts without partial tiles."""
    flat = {}
    for matrix in layout.matrices:
        tiles = []
        for token in array[matrix.first : matrix.first + layout.tiles(matrix)]:
            mean, std = (np.mean([*token[-2, j:-2:2], *token[-1, j:-2:2], *token[:, j - 2]]) for j in (0, 1))
            tiles.append(token[: matrix.rank, :-2] * ((np.exp(std - 1.6) - 0.1) / 0.9) + mean / 8)
        value = np.concatenate(tiles, axis=1)
        flat[matrix.path] = value.T if matrix.transposed else value
    return unflatten_dict(flat, sep="/")


def compare(ours: Callable[[], Any], plain: Callable[[], Any], repeats: int, clean: Callable[[], None] = lambda: None
            ) -> tuple[float, float]:
    """Return the median seconds of two actions, done in turn after one round that doesn't count; cleaning isn't timed."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append((seconds_of(ours), seconds_of(plain)))
        clean()
    return float(np.median([a for a, _ in rounds[1:]])), float(np.median([b for _, b in rounds[1:]]))


def compare_files(tree: Tree, spec: Spec, root: pathlib.Path, repeats: int) -> dict[str, tuple[float, float]]:
    """Time reading and writing an adapter folder beside safetensors doing the same bytes."""
    folder, single = root / "adapter", root / "new.safetensors"
    adapters.write(folder, tree, spec)
    tensors = folder / "adapter_model.safetensors"
    flat = safetensors.numpy.load_file(tensors)

    def save_plainly() -> None:
        safetensors.numpy.save_file(flat, single)
        files.sync(single)

    def remove() -> None:
        shutil.rmtree(root / "new")
        single.unlink()

    return {
        "read, against safetensors load": compare(
            lambda: adapters.read(folder), lambda: safetensors.numpy.load_file(tensors), repeats),
        "write, against safetensors save and sync": compare(
            lambda: adapters.write(root / "new", tree, spec), save_plainly, repeats, remove),
    }


def define_flags() -> None:
    flags.DEFINE_integer("layers", 28, "Layers of the adapter.")
    flags.DEFINE_integer("repeats", 7, "Timed repetitions.")


def main(args: Any) -> None:
    tree, spec = make_adapter(args.layers)
    layout = tokens.plan(spec)
    array, _ = tokens.encode(tree, layout)
    np.testing.assert_allclose(array, encode_by_tiles(tree, layout), atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        lines = compare_files(tree, spec, pathlib.Path(folder), args.repeats)
    lines["tree to tokens, against a loop over tiles"] = compare(
        lambda: tokens.encode(tree, layout), lambda: encode_by_tiles(tree, layout), 3)
    lines["tokens to tree, against a loop over tiles"] = compare(
        lambda: tokens.decode(array, layout), lambda: decode_by_tiles(array, layout), 3)
    count = sum(math.prod(leaf.shape) for leaf in spec.leaves.values())
    print(f"{count / 1e6:.1f} M parameters, {count * 2 / 1e6:.0f} MB, tokens {list(layout.shape)}")
    for name, (mine, other) in lines.items():
        print(f"{name:44s} {mine * 1e3:8.1f} ms {other * 1e3:8.1f} ms   speed x{other / mine:.2f}")


if __name__ == "__main__":
    cli.run(main, define_flags)
