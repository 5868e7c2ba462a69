"""Generate an adapter from unlabeled prompts.

    python -m dnd_jax.generate --workdir=build/tenants/run --prompts=my_prompts.txt --out=my_adapter
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags
from jaxtyping import Float

from dnd_jax import adapters, checkpoints, cli, files, pairs, prompts, tokens
from dnd_jax.adapters import Spec
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.encoders import SentenceEncoder
from dnd_jax.tokens import Layout
from dnd_jax.types import InputError, Tree


class Generator:
    """The decoder of a training run's best checkpoint, compiled: conditions in, adapters out."""

    def __init__(self, workdir: files.PathLike):
        """Load the checkpoint and compile for one prompt batch; `compile_s` and `step` say what that took and found."""
        self.step, params, self.about, self.metrics = checkpoints.load_best(f"{workdir}/checkpoints")
        features = tuple(map(tuple, self.about["features"]))
        self.prompts, self.layout = features[0][0], Layout.from_json(self.about["layout"])
        self.spec = Spec.from_json(self.about["spec"], carried_of(self.about))
        decoder = HyperConvDecoder(features, self.about["kernel_size"])
        self._params = jax.device_put(params)
        began = time.perf_counter()
        self._apply: Callable[..., Any] = jax.jit(decoder.apply).lower(
            {"params": self._params}, jnp.zeros((1, *features[0]), jnp.float32)).compile()
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


def carried_of(about: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Return the tensors that the decoder doesn't generate, from the pair store it was trained on."""
    if not about["carried"]:
        return None
    path = f"{about['store']}/carried.safetensors"
    try:
        return safetensors.numpy.load_file(path)
    except OSError as error:
        raise InputError(f"{path}: {error}; the checkpoint's adapters carry {about['carried']} tensors from it") from error


def choose(available: Sequence[str], count: int, seed: int) -> list[str]:
    """Return `count` of the prompts, in a drawn order; fewer than that are repeated, and standard output says so."""
    if len(available) < count:
        print(f"{len(available)} prompts given, the decoder takes {count}: they are repeated")
    order = pairs.draw_prompts(np.random.default_rng(seed), len(available), count)
    return [available[i] for i in order]


def define_flags() -> None:
    cli.define_string("workdir", "Folder of a training run.")
    cli.define_string("prompts", "Text file with a prompt a line, or JSON list of prompts or rows.")
    cli.define_string("out", "Adapter folder to write.")
    flags.DEFINE_integer("seed", 0, "Draws the prompts where the file holds more than the decoder takes.")


def main(args: Any) -> None:
    texts = prompts.read_prompts(args.prompts)
    generator = Generator(args.workdir)
    encoder = SentenceEncoder(**generator.about["encoder"])
    began = time.perf_counter()
    tree = generator(encoder(choose(texts, generator.prompts, args.seed)))
    adapters.write(args.out, tree, generator.spec)
    seconds = time.perf_counter() - began
    print(f"{args.out}: checkpoint {generator.step}, {seconds:.3f} s from prompts to files, "
          f"{generator.compile_s:.3f} s of compilation before")


if __name__ == "__main__":
    cli.run(main, define_flags)
