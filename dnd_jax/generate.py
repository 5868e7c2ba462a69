"""Generate adapters from unlabeled prompts.

    python -m dnd_jax.generate --workdir=build/tenants/run --prompts=my_prompts.txt --out=adapters/mine
    python -m dnd_jax.generate --workdir=build/tenants/run --prompts=a.txt,b.json --prompts=c.txt --out=adapters

Writes `adapters/<hash of the content>/`, a PEFT folder with a card, and makes `adapters/mine` a link to it: servers that
cache by path never see another adapter under an old name. Of several prompt files each becomes a link of its stem in the
folder `adapters`, here `a`, `b` and `c`: the decoder is compiled once, and one adapter is written while the next is computed.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float

from dnd_jax import adapters, checkpoints, cli, embeddings, encoders, files, folders, memory, pairs, prompts, tokens
from dnd_jax.adapters import Spec
from dnd_jax.adapters.card import card
from dnd_jax.adapters.tensor_files import TensorFile
from dnd_jax.decoder import HyperConvDecoder, param_shapes, prepare
from dnd_jax.tokens import Layout
from dnd_jax.types import InputError, Params, Tree


class Generator:
    """The decoder of a training run's best checkpoint, compiled: conditions in, adapters out."""

    def __init__(self, workdir: files.PathLike):
        """Load the checkpoint and compile for one prompt batch; `compile_s` and `step` say what that took and found."""
        self.step, params, self.about, _ = checkpoints.load_best(f"{workdir}/checkpoints")
        if unknown := sorted({"carried_sha256", "encoder_sha256", "runs_sha256"} - self.about.keys()):
            raise InputError(f"{workdir}/checkpoints/{self.step}: is of another version of dnd_jax and says nothing of "
                             f"{', '.join(unknown)}; train or import it again")
        self.prompts, self.layout = self.about["features"][0][0], Layout.from_json(self.about["layout"])
        self.spec = Spec.from_json(self.about["spec"], carried_of(workdir, self.about))
        decoder = HyperConvDecoder.from_json(self.about)
        checkpoints.check_shapes(f"{workdir}/checkpoints/{self.step}", params, param_shapes(decoder))
        began = time.perf_counter()
        self._variables = keep_transforms(decoder, params)
        self._apply: Callable[..., Any] = jax.jit(decoder.apply).lower(
            self._variables, jnp.zeros((1, *decoder.condition_shape), jnp.float32)).compile()
        self.compile_s = time.perf_counter() - began

    def __call__(self, condition: Float[np.ndarray, "N L C"]) -> Tree:
        """Return the adapter's tree for one prompt batch.

        Raises:
          FloatingPointError: the decoder's output isn't finite.
        """
        out = np.asarray(self._apply(self._variables, jnp.asarray(condition[None], jnp.float32))[0])
        if not np.isfinite(out).all():
            raise FloatingPointError(f"checkpoint {self.step} generates {np.count_nonzero(~np.isfinite(out))} non-finite values")
        return tokens.decode(out, self.layout)


def keep_transforms(decoder: HyperConvDecoder, params: Params) -> dict[str, Any]:
    """Return the decoder's variables, its kernels transformed once unless that takes more than half of the free memory."""
    def transform(params: Params) -> dict[str, Any]:
        return prepare(decoder, params)

    stats = jax.devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else memory.free_bytes()
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(transform, params)))
    return jax.jit(transform)(params) if needed < free / 2 else {"params": jax.device_put(params)}


def carried_of(workdir: files.PathLike, about: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Return the tensors that the decoder doesn't generate, from the workdir.

    Raises:
      InputError: they are missing, or not those of the store that the decoder was trained on.
    """
    if not about["carried"]:
        return None
    path, expected = pathlib.Path(workdir) / pairs.CARRIED, about["carried_sha256"]
    if path.exists() and (found := files.sha256_file(path)) != expected:
        raise InputError(f"{path}: sha256 is {found[:12]}..., the checkpoint says {expected[:12]}...")
    with TensorFile(path) as file:
        return file.read()


def describe_carried(about: dict[str, Any]) -> str:
    """Return which parts of an adapter are not generated, in words; empty if all are."""
    parts = [f"{count} x {kind}" + (" (mean of the training runs)" if kind in about["averaged"] else "")
             for kind, count in about["carried"].items()]
    return f"not generated but taken from the training runs: {', '.join(parts)}" if parts else ""


def describe_form(about: dict[str, Any]) -> str:
    """Return what is wrong with conditions of prompts alone, in words; empty if the decoder was trained on such."""
    form = about["form"]
    return "" if form == "prompt" else (f"warning: the decoder was trained on conditions of form {form!r}, which hold responses; "
                                        "they are made of the given texts alone here")


def nearest_tasks(about: dict[str, Any], condition: Float[np.ndarray, "N L C"]) -> list[tuple[str, float]]:
    """Return the three training tasks whose prompts are most like these, with the cosines of their pooled embeddings."""
    if not about["embeddings"]:
        return []
    known = np.array(list(about["embeddings"].values()))
    cosines = embeddings.similarities(embeddings.pool(condition), known)
    return [(list(about["embeddings"])[i], float(cosines[i])) for i in np.argsort(-cosines)[:3]]


def choose(available: Sequence[str], count: int, seed: int, name: str) -> list[str]:
    """Return `count` of a file's prompts, in a drawn order; fewer than that are repeated, and standard output says so."""
    if len(available) < count:
        cli.say(f"{name}: {len(available)} prompts given, the decoder takes {count}: they are repeated")
    order = pairs.draw_prompts(np.random.default_rng(seed), len(available), count)
    return [available[i] for i in order]


# --- several prompt files --------------------------------------------------------------------------------------------


def plan_links(values: Sequence[str], out: str) -> dict[str, pathlib.Path]:
    """Return the link that each prompt file's adapter gets: `out`, or for several files their stems in the folder `out`.

    Args:
      values: names of files, or several separated by commas; a file whose own name has a comma is taken as it is.
      out: as given on the command line.

    Raises:
      InputError: no file, two files of one stem, or a link's name that something else has.
    """
    names = [name for value in values for name in ([value] if os.path.exists(value) else value.split(",")) if name]
    if not names:
        raise InputError("command line: --prompts names no file")
    if len(names) == 1:
        return {names[0]: folders.check_link(out)}
    if pathlib.Path(out).is_symlink():
        raise InputError(f"{out}: is a link, expected a folder for the adapters of {len(names)} prompt files")
    links: dict[str, pathlib.Path] = {}
    for name in names:
        link = folders.check_link(pathlib.Path(out) / pathlib.Path(name).stem)
        if rival := next((known for known, taken in links.items() if taken == link), None):
            raise InputError(f"{rival} and {name}: both adapters would be named {link}; give the files stems of their own")
        links[name] = link
    return links


@contextlib.contextmanager
def noted(failures: dict[str, Exception], name: str) -> Iterator[None]:
    """Keep what goes wrong with one file, so that the others are not lost."""
    try:
        yield
    except (InputError, FloatingPointError, OSError) as error:
        failures[name] = error


def raise_noted(failures: Mapping[str, Exception], count: int) -> None:
    """Raise what was noted, naming every file, if anything was; of a single file the error itself."""
    if failures and count == 1:
        raise next(iter(failures.values()))
    if failures:
        said = [text if (text := str(error)).startswith(name) else f"{name}: {text}" for name, error in failures.items()]
        raise InputError(f"{len(failures)} of {count} prompt files gave no adapter: {'; '.join(said)}")


def overlap(names: Sequence[str], compute: Callable[[str], Any], finish: Callable[[str, Any], None],
            failures: dict[str, Exception]) -> None:
    """Compute for every name in turn; beside it, in order, one thread finishes what the name before gave.

    At most one result waits in memory. What fails is noted, and the other names go on.
    """
    finishing: dict[str, futures.Future[None]] = {}
    with futures.ThreadPoolExecutor(1, "writer") as writer:
        for name in names:
            with noted(failures, name):
                result = compute(name)
                futures.wait(list(finishing.values())[-1:])
                finishing[name] = writer.submit(finish, name, result)
    for name, future in finishing.items():
        with noted(failures, name):
            future.result()


# --- command line ----------------------------------------------------------------------------------------------------


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, required=True, help="Folder of a training run.")
    flags.DEFINE_multi_string(
        "prompts", None, required=True, help="Text file with a prompt a line, or JSON list of prompts or rows; may be given "
        "several times, or be several names separated by commas.")
    flags.DEFINE_string(
        "out", None, required=True, help="Name for the adapter: a link to the folder beside it that has its content's hash for "
        "a name. With several prompt files the folder for such links, named by the files' stems.")
    flags.DEFINE_integer("seed", 0, "Draws the prompts where a file holds more than the decoder takes.", lower_bound=0)
    flags.DEFINE_enum("profile", "faithful", ["faithful", "portable"], "As trained, or plain LoRA as vLLM and SGLang take it.")


def write(args: Any, generator: Generator, link: pathlib.Path, tree: Tree, facts: Mapping[str, str]) -> str:
    """Write one adapter's folder with its card, make `link` a link to it, and return the folder's name."""
    tree, spec = adapters.portable(tree, generator.spec) if args.profile == "portable" else (tree, generator.spec)
    text = card(spec, generator.about, {
        "decoder checkpoint": f"{pathlib.Path(args.workdir).resolve().name}, step {generator.step}", "profile": args.profile,
        **facts, "date": time.strftime("%Y-%m-%d")}, describe_carried(generator.about))
    folder = adapters.write_addressed(link.parent, tree, spec, text)
    folders.link(link, folder)
    return folder.name


def main(args: Any) -> None:
    links, failures = plan_links(args.prompts, args.out), dict[str, Exception]()
    texts: dict[str, list[str]] = {}
    hashes: dict[str, str] = {}
    for name in links:
        with noted(failures, name):
            hashes[name] = f", sha256 {files.sha256_file(name)}" if os.path.isfile(name) else ""  # a pipe can be read once
            texts[name] = prompts.read_prompts(name)
    if not texts:
        raise_noted(failures, len(links))
    generator = Generator(args.workdir)
    encoder = encoders.of_decoder(generator.about)
    chosen = {name: choose(found, generator.prompts, args.seed, name) for name, found in texts.items()}
    for name, some in chosen.items():
        if remark := encoders.describe_cut(encoder, some):
            cli.say(f"{name}: {remark}")
    for remark in filter(None, (describe_carried(generator.about), describe_form(generator.about))):
        cli.say(remark)

    def compute(name: str) -> tuple[float, np.ndarray, Tree]:
        began = time.perf_counter()
        condition = encoder(chosen[name])
        return began, condition, generator(condition)

    def finish(name: str, result: tuple[float, np.ndarray, Tree]) -> None:
        began, condition, tree = result
        folder = write(args, generator, links[name], tree, {
            "prompts": f"{len(texts[name])} from {pathlib.Path(name).name}{hashes[name]}",
            "nearest training tasks": ", ".join(f"{n} ({c:.2f})" for n, c in nearest_tasks(generator.about, condition))
            or "not recorded"})
        cli.say(f"{links[name]} -> {folder}: checkpoint {generator.step}, {time.perf_counter() - began:.3f} s from prompts to "
                f"files, {generator.compile_s:.3f} s of compilation before")

    overlap(list(chosen), compute, finish, failures)
    raise_noted(failures, len(links))


if __name__ == "__main__":
    cli.run(main, define_flags)
