"""The published decoders on an accelerator, in bfloat16 with random parameters; part of `experiments.benchmarks.decoder`.

Each row is measured in a process of its own, which has all of the device's memory. None of this has been run on an accelerator
by us; the floors are computed.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax import files, released
from dnd_jax.decoder import HyperConvDecoder, prepare
from experiments.benchmarks import overhead
from experiments.configs import coding, common_sense, multimodal

PEAK = {"H100": 790.0, "H200": 790.0, "A100": 312.0}  # dense bf16 TFLOP/s that matrix products reach or are sold with
BANDWIDTH = 3.3e12  # of an H100's memory, bytes a second
CONFIGS: dict[str, Callable[[], Any]] = {
    "0.5b": common_sense.get_config, "1.5b": coding.get_config, "3b": multimodal.get_config,
    "7b": lambda: coding.get_config("7b")}
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")


def decoder_of(config: Any) -> HyperConvDecoder:
    """Return a published decoder at its true size."""
    return overhead.make_decoder(config)[0].clone(dtype=jnp.bfloat16)


def floors() -> str:
    """Return what would run on an H100, and the least time of a direct convolution there."""
    lines = [f"No accelerator. On one, this would time, with peak memory: floors on H100 of the direct convolution at "
             f"{PEAK['H100']:.0f} TFLOP/s and {BANDWIDTH / 1e12:.1f} TB/s, one adapter and one training step"]
    for name, get_config in CONFIGS.items():
        config = get_config()
        decoder, batch = decoder_of(config), config.train.batch_size
        compute = decoder.flops / PEAK["H100"] / 1e12
        parameters = overhead.size_of(decoder)["parameters"]
        memory = 2 * parameters / BANDWIDTH
        lines.append(f"{name:5} {decoder.flops / 1e12:5.1f} TFLOP, {parameters / 1e9:.2f} G parameters: adapter "
                     f"{1000 * max(compute, memory):.1f} ms ({1000 * memory:.1f} ms of it to read bf16 parameters at the least), "
                     f"step of {batch} {3 * batch * compute:.1f} s")
    return "\n".join(lines)


def backend() -> dict[str, str]:
    """Return what JAX runs on here."""
    return {"backend": jax.default_backend()}


def measure_all(path: str | None) -> None:
    """Print, and keep in a file, a row for each published decoder, and how exact each precision is."""
    rows: list[dict[str, Any]] = [{"relative_error": in_own_process(errors)}]
    for name in CONFIGS:
        for measure in (measure_ours, measure_torch):
            rows.append({"decoder": name, "by": measure.__name__.removeprefix("measure_"), **in_own_process(measure, name)})
            print(rows[-1], flush=True)
            if path:
                files.write_json(path, rows)
    print(rows[0])


def in_own_process(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return what a measurement returns, or `failed` with the reason, such as memory that does not suffice."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(measure, *args).result()
        except Exception as error:  # of JAX, of PyTorch, or of a process that was killed
            return {"failed": (str(error).splitlines() or [type(error).__name__])[0][:200]}


def measure_ours(name: str) -> dict[str, Any]:
    """Time one adapter with kernels' transforms kept and a gradient of batch 1.

    TFLOP/s are of what is computed, not of a direct convolution; memory is arguments, results and temporaries of the program.
    """
    decoder = decoder_of(CONFIGS[name]())
    device = jax.devices()[0]
    x = jax.random.normal(jax.random.key(1), (1, *decoder.condition_shape))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), jax.jit(decoder.init)(jax.random.key(0), x)["params"])

    def loss(params: Any) -> jax.Array:
        y: Any = decoder.apply({"params": params}, x)
        return jnp.square(y.astype(jnp.float32)).mean()

    def timed(call: Callable[..., Any], *args: Any) -> list[Any]:
        lowered = jax.jit(call).lower(*args)
        compiled = lowered.compile()
        time_s = overhead.median_seconds(lambda: compiled(*args), 5)
        tflops = (lowered.cost_analysis() or {}).get("flops", 0) / time_s / 1e12
        used: Any = compiled.memory_analysis()
        size = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        return [1000 * time_s, tflops / peak if peak else None, size / 1e9]

    peak = next((p for chip, p in PEAK.items() if chip in device.device_kind), None)
    kept = jax.jit(lambda p: prepare(decoder, p))(params)
    names = ("{}_ms", "{}_tflops_over_peak", "{}_peak_gb")
    row: dict[str, Any] = dict(zip((n.format("adapter") for n in names), timed(decoder.apply, kept, x), strict=True))
    del kept
    row["device"] = device.device_kind
    return row | dict(zip((n.format("step_batch_1") for n in names), timed(jax.grad(loss), params), strict=True))


def errors() -> dict[str, float]:
    """Return the error of the Fourier form for each matmul precision of float32 and for bfloat16, relative to PyTorch's direct
    convolution in float64."""
    import torch

    from tests.torch_decoder import Decoder

    plain = HyperConvDecoder(((32, 32, 64), (64, 32, 64)), 11)
    x = jax.random.normal(jax.random.key(1), (1, *plain.condition_shape))
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]

    def run(decoder: HyperConvDecoder, precision: str) -> np.ndarray:
        with jax.default_matmul_precision(precision):
            return np.asarray(jax.jit(decoder.apply)({"params": params}, x), np.float64)

    module = Decoder(plain.features, plain.kernel_size)
    module.load_state_dict({name: torch.tensor(value) for name, value in released.params_to_torch(params).items()})
    with torch.no_grad():
        expected = module.double()(torch.tensor(np.asarray(x, np.float64))).numpy()
    outputs = {p: run(plain, p) for p in PRECISIONS} | {"bfloat16 inputs": run(plain.clone(dtype=jnp.bfloat16), "default")}
    return {name: float(np.sqrt(np.square(y - expected).mean() / np.square(expected).mean())) for name, y in outputs.items()}


def measure_torch(name: str) -> dict[str, Any]:
    """Time the yardstick in bf16 with `torch.compile`; the projection that shortens long prompts is left out of it."""
    import torch

    from tests.torch_decoder import Decoder

    if not torch.cuda.is_available():
        return {"failed": "this PyTorch sees no CUDA device"}
    decoder = decoder_of(CONFIGS[name]())
    module = Decoder(decoder.features, decoder.kernel_size).to("cuda", torch.bfloat16)
    run, x = torch.compile(module), torch.randn(1, *decoder.features[0], device="cuda", dtype=torch.bfloat16)

    def call(gradient: bool) -> None:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            y = run(x)
        if gradient:
            y.float().square().mean().backward()
        torch.cuda.synchronize()

    row: dict[str, Any] = {}
    for what, gradient in (("adapter", False), ("step_batch_1", True)):
        torch.cuda.reset_peak_memory_stats()
        row |= {f"{what}_ms": 1000 * overhead.median_seconds(functools.partial(call, gradient), 5)}
        row |= {f"{what}_peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return row
