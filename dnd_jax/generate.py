"""Generate an adapter from unlabeled prompts.

    python -m dnd_jax.generate --workdir=build/tenants/run --prompts=my_prompts.txt --out=adapters/mine

Writes `adapters/<hash of the content>/`, a PEFT folder with a card, and makes `adapters/mine` a link to it: servers that
cache by path never see another adapter under an old name.
"""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float

from dnd_jax import adapters, baselines, checkpoints, cli, encoders, files, pairs, prompts, tokens
from dnd_jax.adapters import Spec
from dnd_jax.adapters.card import card
from dnd_jax.adapters.tensor_files import TensorFile
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.tokens import Layout
from dnd_jax.types import Tree


class Generator:
    """The decoder of a training run's best checkpoint, compiled: conditions in, adapters out."""

    def __init__(self, workdir: files.PathLike):
        """Load the checkpoint and compile for one prompt batch; `compile_s` and `step` say what that took and found."""
        self.step, params, self.about, self.metrics = checkpoints.load_best(f"{workdir}/checkpoints")
        features = tuple(map(tuple, self.about["features"]))
        self.prompts, self.layout = features[0][0], Layout.from_json(self.about["layout"])
        self.spec = Spec.from_json(self.about["spec"], carried_of(workdir, self.about))
        decoder = HyperConvDecoder(features, self.about["kernel_size"], self.about["length"])
        self._params = jax.device_put(params)
        began = time.perf_counter()
        self._apply: Callable[..., Any] = jax.jit(decoder.apply).lower(
            {"params": self._params}, jnp.zeros((1, *decoder.condition_shape), jnp.float32)).compile()
        self.compile_s = time.perf_counter() - began

    def __call__(self, condition: Float[np.ndarray, "N L C"]) -> Tree:
        """Return the adapter's tree for one prompt batch.

        Raises:
          FloatingPointError: the decoder's output isn't finite.
        """
        out = np.asarray(self._apply({"params": self._params}, jnp.asarray(condition[None], jnp.float32))[0])
        if not np.isfinite(out).all():
            raise FloatingPointError(f"checkpoint {self.step} generates {np.count_nonzero(~np.isfinite(out))} non-finite values")
        return tokens.decode(out, self.layout)


def carried_of(workdir: files.PathLike, about: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Return the tensors that the decoder doesn't generate, from the workdir."""
    if not about["carried"]:
        return None
    with TensorFile(pathlib.Path(workdir) / pairs.CARRIED) as file:
        return file.read()


def describe_carried(about: dict[str, Any]) -> str:
    """Return which parts of an adapter are not generated, in words; empty if all are."""
    parts = [f"{count} x {kind}" + (" (mean of the training runs)" if kind in about["averaged"] else "")
             for kind, count in about["carried"].items()]
    return f"not generated but taken from the training runs: {', '.join(parts)}" if parts else ""


def nearest_tasks(about: dict[str, Any], condition: Float[np.ndarray, "N L C"], count: int = 3) -> list[tuple[str, float]]:
    """Return the training tasks whose prompts are most like these, with the cosines of their pooled embeddings."""
    if not about["embeddings"]:
        return []
    known = np.array(list(about["embeddings"].values()))
    cosines = baselines.similarities(baselines.pool(condition), known)
    return [(list(about["embeddings"])[i], float(cosines[i])) for i in np.argsort(-cosines)[:count]]


def choose(available: Sequence[str], count: int, seed: int) -> list[str]:
    """Return `count` of the prompts, in a drawn order; fewer than that are repeated, and standard output says so."""
    if len(available) < count:
        print(f"{len(available)} prompts given, the decoder takes {count}: they are repeated")
    order = pairs.draw_prompts(np.random.default_rng(seed), len(available), count)
    return [available[i] for i in order]


def define_flags() -> None:
    cli.define_string("workdir", "Folder of a training run.")
    cli.define_string("prompts", "Text file with a prompt a line, or JSON list of prompts or rows.")
    cli.define_string("out", "Name for the adapter: a link to the folder beside it that has its content's hash for a name.")
    flags.DEFINE_integer("seed", 0, "Draws the prompts where the file holds more than the decoder takes.")
    flags.DEFINE_enum("profile", "faithful", ["faithful", "portable"], "As trained, or plain LoRA as vLLM and SGLang take it.")


def main(args: Any) -> None:
    texts, out = prompts.read_prompts(args.prompts), files.check_link(args.out)
    generator = Generator(args.workdir)
    encoder = encoders.make(generator.about["encoder"])
    began = time.perf_counter()
    condition = encoder(choose(texts, generator.prompts, args.seed))
    tree, spec = generator(condition), generator.spec
    if args.profile == "portable":
        tree, spec = adapters.portable(tree, spec)
    text = card(spec, generator.about, {
        "decoder checkpoint": f"{pathlib.Path(args.workdir).resolve().name}, step {generator.step}", "profile": args.profile,
        "prompts": f"{len(texts)} from {pathlib.Path(args.prompts).name}, sha256 {files.sha256_file(args.prompts)}",
        "nearest training tasks": ", ".join(f"{n} ({c:.2f})" for n, c in nearest_tasks(generator.about, condition))
        or "not recorded",
        "date": time.strftime("%Y-%m-%d"),
    }, describe_carried(generator.about))
    folder = adapters.write_addressed(out.parent, tree, spec, text)
    files.link(out, folder)
    seconds = time.perf_counter() - began
    if remark := describe_carried(generator.about):
        print(remark)
    print(f"{out} -> {folder.name}: checkpoint {generator.step}, {seconds:.3f} s from prompts to files, "
          f"{generator.compile_s:.3f} s of compilation before")


if __name__ == "__main__":
    cli.run(main, define_flags)
