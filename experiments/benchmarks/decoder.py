"""Speed of the decoder beside an independent PyTorch implementation of the same function, `tests/torch_decoder.py`.

    python -m experiments.benchmarks.decoder                                        # everything
    python -m experiments.benchmarks.decoder --only=small --taps=9 --cores=1 --json=rows.json

A row is a decoder, a kernel size, a batch, a number of cores, and the forward pass (`forward`; `kept` with the kernels'
transforms computed before, as generation does) or the gradients of a squared error for all parameters (`step`). PyTorch has
each of its settings, eager or `torch.compile` (`--nocompile` saves most of the time), channels-last or not; the ratio is its
fastest float32 median over ours, above 1 is faster, and bf16 autocast is a ratio of its own. On several cores our batch, where
they divide it, is split over as many devices of JAX, as in training. A CPU without instructions for bf16 would take hours for
that: where one convolution takes more than twice as long as in float32, the row says how much longer and leaves it out. All
rows of a decoder, kernel size and batch are interleaved in a process of their own with one allocator setting, after parity to
1e-5 of outputs and gradients was checked. One that fails costs no other; `layer` with batch 16 wants 24 GB and more on two
cores. The Fourier form is an algorithm, not a virtue of JAX: PyTorch could be given it, too.

On an accelerator the published decoders are timed instead, in bfloat16 (`experiments/benchmarks/accelerator.py`); without one
their floors are printed after the rows.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dnd_jax import cli, files, fourier_conv, released, sharding
from dnd_jax.decoder import HyperConvDecoder, plane_axes, prepare
from dnd_jax.types import InputError
from experiments.benchmarks import accelerator
from experiments.benchmarks.overhead import seconds_of
from experiments.configs import tenants

# Pages of large temporaries are kept and are huge, and all threads have one arena, as those of others give theirs back to the
# system when empty: without this, faults dominate XLA on CPU, and cost PyTorch too.
ALLOCATOR = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=200000000000:"
             "glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1")
HEAP = 4 << 30  # bytes touched before anything is timed: in a virtual machine a huge page that is new can take 6 ms
DECODERS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "tenants": ((14, 14, 48), *tenants.get_config().decoder.blocks, (30, 4, 66)),
    "small": ((16, 64, 96), (16, 48, 64), (64, 32, 48), (128, 16, 48), (256, 10, 34)),
    "wide": ((16, 64, 128), (64, 32, 128), (128, 16, 128), (256, 10, 130)),
    "layer": ((256, 50, 200), (512, 50, 200)),  # `layers_3` of the 0.5B decoder, at true size
    "k11": ((256, 18, 514), (308, 18, 514)),  # the last convolution of the 7B decoder, channels scaled down
}
SLOW = ("k11",)  # at batch 1 only
TOO_SLOW = 2  # times as long in bf16 as in float32, of a convolution in PyTorch
AT_LEAST = 15.0  # seconds that the timings of one decoder's rows go on together
SHORT = 2.0  # seconds of a call below which spinning and sleeping threads matter
WARM = 0.05  # seconds of own calls before such a call is timed
TAPS = {"k11": (11,)}


def rows_of(only: list[str], taps: list[int], batches: list[int]) -> Iterator[tuple[str, int, int]]:
    """Yield name, kernel size and batch of what is to be measured."""
    for name in only:
        for k in TAPS.get(name, (5, 9, 11)):
            for batch in (1,) if name in SLOW else (1, 16):
                if k in taps and batch in batches:
                    yield name, k, batch


class OneConvolution(nn.Module):
    """Only the last convolution of a layer, with the names and attributes that are used of a decoder."""

    features: tuple[tuple[int, int, int], ...]
    kernel_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, self.features[0][0], self.features[1][0])
        kernel = self.param("weight", nn.initializers.normal(0.01), shape)
        return fourier_conv.convolve(x, kernel, plane_axes("BNMD,MD->BOMD"))


def ours(decoder: Any, params: Any, x: np.ndarray, target: np.ndarray, cores: int = 1) -> dict[str, Callable[[], Any]]:
    """Return what is timed, jitted; each call waits until its result is there."""
    def apply(decoder: Any, variables: Any, x: jax.Array) -> jax.Array:
        y: Any = decoder.apply(variables, x)
        return y

    def loss(decoder: Any, params: Any, x: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.square(apply(decoder, {"params": params}, x) - wanted).mean()

    forward, step = jax.jit(apply, static_argnums=0), jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    parts = cores if len(x) % cores == 0 else 1
    kept = None
    if isinstance(decoder, HyperConvDecoder):
        kept = jax.jit(functools.partial(prepare, decoder, batch=len(x) // parts))(params)
    if parts > 1:
        mesh = sharding.make_mesh()
        decoder, (params, kept) = decoder.clone(mesh=mesh), jax.device_put((params, kept), sharding.replicated(mesh))
        source, wanted = sharding.put(mesh, len(x), x, target)
    else:
        source, wanted = jnp.asarray(x), jnp.asarray(target)
    calls = {"forward": lambda: forward(decoder, {"params": params}, source).block_until_ready(),
             "step": lambda: jax.block_until_ready(step(decoder, params, source, wanted))}
    return calls if kept is None else {**calls, "kept": lambda: forward(decoder, kept, source).block_until_ready()}


def theirs(decoder: Any, params: Any, x: np.ndarray, target: np.ndarray, compilers: list[bool]
           ) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return for each setting of PyTorch what is timed, without `torch.compile` or with it or both."""
    import torch

    from tests.torch_decoder import Decoder

    whole = isinstance(decoder, HyperConvDecoder)
    state = {key: torch.tensor(value) for key, value in to_torch(decoder, params).items()}
    picture, wanted = torch.tensor(x), torch.tensor(target)
    found = {}
    for compiled in compilers:
        for last in (False, True):
            for half in (False, True):
                module: Any = Decoder(decoder.features, decoder.kernel_size) if whole else torch.nn.Conv2d(
                    decoder.features[0][0], decoder.features[1][0], decoder.kernel_size, padding="same", bias=False)
                module.load_state_dict(state)
                if last:
                    module.to(memory_format=torch.channels_last)
                run = torch.compile(module) if compiled else module
                setting = ("compile" if compiled else "eager") + last * " channels-last" + half * " bf16"
                found[setting] = _timed_in_torch(module, run, picture, wanted, half)
    return found


def _timed_in_torch(module: Any, run: Any, x: Any, target: Any, half: bool) -> dict[str, Callable[[], Any]]:
    import torch

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()

    def forward() -> Any:
        with torch.no_grad(), autocast():
            return run(x)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        with autocast():
            loss = (run(x).float() - target).square().mean()
        loss.backward()

    def gradients() -> dict[str, np.ndarray]:
        module.zero_grad(set_to_none=True)
        y = run(x)
        y.retain_grad()
        (y - target).square().mean().backward()
        found = {name: p.grad.numpy() for name, p in module.named_parameters()}
        # On one thread the convolution sums a bias' terms one by one: 1.7e-5 off for the 160,000 of `layer` with batch 16.
        last = [name for name in found if name.endswith("linear2.bias")][-1:]
        return found | {name: y.grad.sum((0, 2, 3), dtype=torch.float64).numpy() for name in last}

    return {"forward": forward, "step": step, "gradients": gradients}


def measure(name: str, k: int, batch: int, cores: int, repeats: int, compilers: list[bool]) -> list[dict[str, Any]]:
    """Return the rows of one decoder: medians in ms and ratios."""
    import torch

    torch.set_num_threads(cores)
    torch._dynamo.reset()
    decoder = (OneConvolution if name == "k11" else HyperConvDecoder)(DECODERS[name], k)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *decoder.features[0])).astype(np.float32)
    target = rng.normal(size=(batch, *decoder.features[-1])).astype(np.float32)
    # Drawn here, as `init` takes a minute to compile; the scale is what keeps a convolution's outputs as large as its inputs.
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), x[:1])["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[:-1])), jnp.float32), shapes)
    mine, yours = ours(decoder, params, x, target, cores), theirs(decoder, params, x, target, compilers)
    error = parity(decoder, mine, yours["eager"])
    if not error <= 1e-5:
        raise InputError(f"{name}, k={k}: results differ from PyTorch's by {error:.1e} of the largest, at most 1e-5 is parity")
    cost = cost_of_bf16(k)
    if cost > TOO_SLOW:
        yours = {setting: calls for setting, calls in yours.items() if not setting.endswith("bf16")}
    # All rows together: what disturbs the machine for some seconds falls on few timings of each.
    calls = {("ours", what): call for what, call in mine.items()}
    calls |= {(setting, what): its[what] for setting, its in yours.items() for what in ("forward", "step")}
    seconds = interleaved(calls, repeats, AT_LEAST)
    rows = []
    for what in mine:
        own = seconds["ours", what]
        times = {setting: seconds[setting, "step" if what == "step" else "forward"] for setting in yours}
        half = {s: t for s, t in times.items() if s.endswith("bf16")}
        full = {s: t for s, t in times.items() if s not in half}
        best, best_half = min(full, key=full.__getitem__), min(half, key=half.__getitem__, default=None)
        rows.append({"decoder": name, "k": k, "batch": batch, "cores": cores, "what": what, "ratio": full[best] / own,
                     "bf16_ratio": half[best_half] / own if best_half else None, "best": best, "best_bf16": best_half,
                     "bf16_cost": cost, "error": error, "ms": {s: round(1000 * t, 3) for s, t in {"ours": own, **times}.items()}})
    return rows


def parity(decoder: Any, mine: dict[str, Callable[[], Any]], yours: dict[str, Callable[[], Any]]) -> float:
    """Return how far outputs and gradients are from PyTorch's, in units of the largest of each; NaN, if a number is."""
    expected = np.asarray(yours["forward"]())
    outputs = [np.asarray(mine[what]()) for what in ("forward", "kept") if what in mine]
    gradients, found = yours["gradients"](), to_torch(decoder, mine["step"]())
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    return float(np.max([np.abs(output - expected).max() / np.abs(expected).max() for output in outputs]
                        + [np.abs(found[name] - gradient).max() / largest for name, gradient in gradients.items()]))


def to_torch(decoder: Any, params: Any) -> dict[str, np.ndarray]:
    """Return parameters or their gradients as the yardstick has them."""
    if isinstance(decoder, HyperConvDecoder):
        return released.params_to_torch(params)
    return {"weight": np.asarray(params["weight"]).transpose(3, 2, 0, 1)}


def cost_of_bf16(k: int) -> float:
    """Return how many times as long as in float32 PyTorch's convolution takes in bf16: 64 channels to 64 on 16 x 16."""
    import torch

    def convolution(dtype: Any) -> Callable[[], Any]:
        x, kernel = torch.ones(1, 64, 16, 16, dtype=dtype), torch.ones(64, 64, k, k, dtype=dtype)
        return lambda: torch.nn.functional.conv2d(x, kernel, padding="same")

    seconds = interleaved({dtype: convolution(dtype) for dtype in (torch.bfloat16, torch.float32)}, 3)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def interleaved(calls: dict[Any, Callable[[], Any]], repeats: int, at_least: float = 0.0) -> dict[Any, float]:
    """Return median seconds of each, taken in turns, after a call to compile and one to get its memory: of `repeats` timings, and
    more where these take less than `at_least` seconds together, for the first can take three times as long as the others.

    A short call is timed right after others of its own, as in a loop: threads of others (PyTorch's) spin on for a while, those
    of this one have gone to sleep, and the caches are theirs.
    """
    times = {name: [seconds_of(call)] for name, call in calls.items()}
    began, rounds = time.perf_counter(), 0
    while rounds < 1 + repeats or time.perf_counter() - began < at_least:
        rounds += 1
        for name, call in calls.items():
            if times[name][-1] < SHORT:
                warm = time.perf_counter() + WARM
                call()
                while time.perf_counter() < warm:
                    call()
            times[name].append(seconds_of(call))
    return {name: float(np.median(t[2:])) for name, t in times.items()}


def report(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    half = f"  bf16 {row['bf16_ratio']:5.2f}" if row["best_bf16"] else f"  bf16 takes {row['bf16_cost']:.0f} times as long"
    return (f"{row['decoder']:8} k={row['k']:<2} batch {row['batch']:<2} {row['cores']} core{'s' if row['cores'] > 1 else ' '} "
            f"{row['what']:8} {row['ms']['ours']:9.1f} ms  {row['ratio']:5.2f} ({row['best']}){half}")


def define_flags() -> None:
    flags.DEFINE_list("only", [*DECODERS, *accelerator.CONFIGS], "Decoders to measure: sizes on an accelerator, others on CPU.")
    flags.DEFINE_list("taps", ["5", "9", "11"], "Kernel sizes to measure.")
    flags.DEFINE_list("batch", ["1", "16"], "Batches to measure.")
    flags.DEFINE_list("cores", ["1", "2"], "Numbers of cores.")
    flags.DEFINE_bool("compile", True, "Whether PyTorch's settings include torch.compile.")
    flags.DEFINE_integer("repeats", 5, "Timings that a median is of, at least.")
    flags.DEFINE_string("json", None, "File to keep the rows in.")
    flags.DEFINE_string("rows", None, "Set by the command itself: the file that a process writes its rows to.")


def _measure_here(args: Any) -> None:
    cores = int(args.cores[0])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    jax.config.update("jax_num_cpu_devices", cores)
    warnings.filterwarnings("ignore", message=".*even kernel lengths")
    np.ones(HEAP, np.uint8)  # freed at once, and kept by the allocator
    (row,) = _cases(args)
    rows = measure(*row, cores, args.repeats, [False, True] if args.compile else [False])
    print("\n".join(map(report, rows)), flush=True)
    files.write_json(args.rows, rows)


def _cases(args: Any) -> list[tuple[str, int, int]]:
    return list(rows_of([name for name in args.only if name in DECODERS], list(map(int, args.taps)), list(map(int, args.batch))))


def _in_own_process(name: str, k: int, batch: int, cores: str, repeats: int, compiles: bool) -> list[dict[str, Any]]:
    """Return the rows that another process measures; none if it fails, which it has said, or is killed."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "rows.json")
        command = [sys.executable, "-m", "experiments.benchmarks.decoder", f"--only={name}", f"--taps={k}", f"--batch={batch}",
                   f"--cores={cores}", f"--repeats={repeats}", f"--compile={compiles}", f"--rows={path}"]
        status = subprocess.run(command, env=os.environ | {"GLIBC_TUNABLES": ALLOCATOR}).returncode
        return json.loads(path.read_text()) if status == 0 else []


def main(args: Any) -> None:
    for name, known in {"only": [*DECODERS, *accelerator.CONFIGS], "taps": ["5", "9", "11"]}.items():
        if unknown := set(getattr(args, name)) - set(known):
            raise InputError(f"--{name}: {sorted(unknown)} is none of {known}")
    for name in ("batch", "cores"):
        if not all(number.isdigit() and int(number) for number in getattr(args, name)):
            raise InputError(f"--{name}: {getattr(args, name)}, expected numbers")
    if args.rows:
        return _measure_here(args)
    if accelerator.in_own_process(accelerator.backend).get("backend", "cpu") != "cpu":  # who asks, holds it
        if not (sizes := [name for name in accelerator.CONFIGS if name in args.only]):
            raise InputError(f"--only={args.only}: none of {list(accelerator.CONFIGS)}, which an accelerator is measured by")
        return accelerator.measure_all(sizes, args.json)
    if not _cases(args):
        raise InputError(f"--only={args.only} --taps={args.taps} --batch={args.batch}: none of the rows; batches are 1 and 16, "
                         f"k11 has k = 11 and batch 1 only")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not args.compile or not compiler:
        print("torch.compile is left out" + ("" if compiler else ": no C++ compiler"))
    rows, failed = [], []
    for cores in args.cores:
        if int(cores) > len(os.sched_getaffinity(0)):
            print(f"{cores} cores: this process may use {len(os.sched_getaffinity(0))} only, left out")
            continue
        for name, k, batch in _cases(args):
            found = _in_own_process(name, k, batch, cores, args.repeats, bool(args.compile and compiler))
            rows += found
            failed += [] if found else [f"{name}, k={k}, batch {batch}, {cores} cores"]
            if args.json:
                files.write_json(args.json, rows)
    print(accelerator.floors())
    if failed:
        raise InputError(f"not measured, as their processes failed or were killed: {'; '.join(failed)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
