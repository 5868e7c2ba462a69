"""What an adapter is made of, and which adapters are like it, judged by its products B A, which alone act. Pure NumPy.

An adapter is a flat dict from `/`-separated path to matrix, as in `flatten_dict(tree, sep="/")`. The scale alpha / r is left out.
Products are never made: inner products and singular values follow from matrices of the rank's size.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from dnd_jax import files, pairs, tokens, workdirs
from dnd_jax.baselines import Flat
from dnd_jax.generate import Generator
from dnd_jax.types import InputError


def modules(flat: Flat) -> list[str]:
    """Return the paths of the adapted modules, in their order."""
    return [path.removesuffix("/lora_A") for path in flat if path.endswith("/lora_A")]


def gram(adapters: Sequence[Flat]) -> Float[np.ndarray, "M K K"]:
    """Return the inner products of K adapters' products, for each of M modules: tr((B_k A_k)^T B_l A_l)."""
    found = []
    for module in modules(adapters[0]):
        a = np.stack([x[f"{module}/lora_A"] for x in adapters]).astype(np.float64)
        b = np.stack([x[f"{module}/lora_B"] for x in adapters]).astype(np.float64)
        found.append(np.einsum("krls,krls->kl", np.einsum("kri,lsi->krls", a, a, optimize=True),
                               np.einsum("kor,los->krls", b, b, optimize=True)))
    return np.stack(found)


def norms(grams: Float[np.ndarray, "... K K"]) -> Float[np.ndarray, "... K"]:
    """Return the Frobenius norms of the adapters' products."""
    return np.sqrt(np.einsum("...kk->...k", grams).clip(0))


def distances(grams: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K K"]:
    """Return the Frobenius norms of the differences of the adapters' products."""
    square = np.diag(grams)
    return np.sqrt((square[:, None] + square - 2 * grams).clip(0))


def centred(grams: Float[np.ndarray, "K K"], known: Sequence[int]) -> Float[np.ndarray, "K K"]:
    """Return the Gram matrix after the mean product of the adapters `known` is taken off every product."""
    change = np.eye(len(grams))
    change[:, list(known)] -= 1 / len(known)
    return change @ grams @ change.T


def cosines(grams: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K K"]:
    """Return the cosines of the angles between the adapters' products; 0 with one that is zero but for rounding."""
    length = norms(grams)
    length[length <= 1e-6 * length.max()] = np.inf
    return grams / np.outer(length, length)


def spectrum(flat: Flat) -> Float[np.ndarray, "M r"]:
    """Return the singular values of every module's product, the greatest first, filled up with zeros to the largest rank."""
    rows = []
    for module in modules(flat):
        a, b = (np.asarray(flat[f"{module}/lora_{side}"], np.float64) for side in "AB")
        rows.append(np.linalg.svd(np.linalg.qr(b)[1] @ np.linalg.qr(a.T)[1].T, compute_uv=False))
    return np.stack([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])


# --- of one training run ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Specimens:
    """Adapters by task: as training gave them, of tasks trained on and of held-out ones; and as the decoder makes the latter."""

    train: dict[str, Flat]
    held_out: dict[str, Flat]
    generated: dict[str, Flat]


def read(workdir: files.PathLike) -> Specimens:
    """Return the last checkpoints of the store that a workdir was trained on, and generate from one draw of prompts a test task.

    Raises:
      InputError: no workdir, another store by now, or one without test tasks.
    """
    config = files.read_json(f"{workdir}/config.json")
    store, generator = pairs.open_store(config["export"]["store"]), Generator(workdir)
    workdirs.check_store(store, pathlib.Path(workdir))
    if not (test := store.split("test")):
        raise InputError(f"{store.folder}: has no test task, for which an adapter could be generated")

    def trained(tasks: Sequence[pairs.Task]) -> dict[str, Flat]:
        return {task.name: flatten_dict(tokens.decode(task.tokens[-1], store.layout), sep="/") for task in tasks}

    def generate(task: pairs.Task) -> Flat:
        return flatten_dict(generator(pairs.condition_of(task, config["seed"], 0, generator.prompts)), sep="/")

    return Specimens(trained(store.split("train")), trained(test), {task.name: generate(task) for task in test})


def neighbours(s: Specimens) -> list[dict[str, str | float]]:
    """Return for every held-out task how far the generated adapter is from others.

    Distances are in units of how far the trained adapter of the task is from the mean training adapter: `generated_trained` is
    0 for training's own result, and 1 for the mean adapter. `cosine_trained` is that of both adapters' deviations from the
    mean: 0 for an averager.
    """
    names, known = list(s.train), range(len(s.train))
    held_out = range(len(known), len(known) + len(s.held_out))
    grams = gram([*s.train.values(), *s.held_out.values(), *(s.generated[task] for task in s.held_out)]).sum(0)
    far, around_mean = distances(grams), centred(grams, known)
    to_mean, alike = norms(around_mean), cosines(around_mean)
    rows: list[dict[str, str | float]] = []
    for task, trained in zip(s.held_out, held_out, strict=True):
        made, unit = trained + len(s.held_out), to_mean[trained]
        nearest, rival = int(np.argmin(far[made, known])), int(np.argmin(far[trained, known]))
        values = {"generated_trained": far[made, trained] / unit, "generated_mean": to_mean[made] / unit,
                  "generated_nearest": far[made, nearest] / unit, "trained_nearest": far[trained, rival] / unit,
                  "cosine_trained": alike[made, trained], "cosine_nearest": alike[made, nearest]}
        rows.append({"task": task, "nearest": names[nearest]} | {name: float(value) for name, value in values.items()})
    return rows
