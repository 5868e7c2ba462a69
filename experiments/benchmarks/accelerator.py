"""The published decoders on an accelerator, in bfloat16 with random parameters; part of `experiments.benchmarks.decoder`.

Each row is measured in a process of its own, which has all of the device's memory. None of this has been run on an accelerator
by us; the floors are computed.
"""

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from dnd_jax import files, released
from dnd_jax.decoder import HyperConvDecoder, prepare
from experiments.benchmarks import overhead
from experiments.configs import coding, common_sense, multimodal

PEAK = {"H100": 790.0, "H200": 790.0, "A100": 312.0}  # dense bf16 TFLOP/s that matrix products reach or are sold with
BANDWIDTH = 3.3e12  # of an H100's memory, bytes a second
CONFIGS: dict[str, Callable[[], Any]] = {
    "0.5b": common_sense.get_config, "1.5b": coding.get_config, "3b": multimodal.get_config,
    "7b": lambda: coding.get_config("7b")}
SETTINGS = ("eager", "eager channels-last", "compile", "compile channels-last")  # of PyTorch
PRECISIONS = {"float32": "float32", "tensorfloat32": "tensorfloat32", "bfloat16": "BF16_BF16_F32"}  # "bfloat16" is TF32 on GPUs


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


def measure_all(only: Sequence[str], path: str | None) -> None:
    """Print, and keep in a file, the rows of published decoders, and how exact each precision is."""
    rows: list[dict[str, Any]] = [{"relative_error": in_own_process(errors)}]
    for name in only:
        for what in ("adapter", "step_batch_1"):
            for by in ("ours", *SETTINGS):
                args = (measure_ours, name, what) if by == "ours" else (measure_torch, name, what, by)
                rows.append({"decoder": name, "what": what, "by": by, **in_own_process(*args)})
                print(rows[-1], flush=True)
                if path:
                    files.write_json(path, rows)
    print(rows[0])


def in_own_process(measure: Callable[..., Any], *args: Any) -> Any:
    """Return what a measurement returns, or `failed` with the reason, such as memory that does not suffice."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _take_memory) as process:
        try:
            return process.submit(measure, *args).result()
        except Exception as error:  # of JAX, of PyTorch, or of a process that was killed
            return {"failed": (str(error).splitlines() or [type(error).__name__])[0][:200]}


def _take_memory() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # 0.75 of the device's by default


def measure_ours(name: str, what: str) -> dict[str, Any]:
    """Time one adapter with kernels' transforms kept, or a gradient of batch 1.

    TFLOP/s are of the products in our form, not of a direct convolution; memory is arguments, results and temporaries of the
    program.
    """
    decoder = decoder_of(CONFIGS[name]())
    device = jax.devices()[0]
    peak = next((p for chip, p in PEAK.items() if chip in device.device_kind), None)
    x = jax.random.normal(jax.random.key(1), (1, *decoder.condition_shape))
    variables = jax.jit(decoder.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        y: Any = decoder.apply(variables, x)
        return jnp.square(y.astype(jnp.float32)).mean()

    if what == "adapter":
        variables = jax.jit(lambda variables: prepare(decoder, variables["params"]))(variables)
    call: Callable[..., Any] = decoder.apply if what == "adapter" else jax.grad(loss)
    compiled = jax.jit(call).lower(variables, x).compile()
    time_s = overhead.median_seconds(lambda: compiled(variables, x), 5)
    used: Any = compiled.memory_analysis()
    size = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    tflops = flop_of(call, variables, x) / time_s / 1e12
    return {"device": device.device_kind, "ms": 1000 * time_s, "peak_gb": size / 1e9, "tflops": tflops,
            "tflops_over_peak": tflops / peak if peak else None}


def flop_of(call: Callable[..., Any], *args: Any) -> float:
    """Return the floating point operations of the products and convolutions of a program as it is traced.

    XLA's own account has a loop's body only once, and nothing of a product that a library does.
    """
    closed = jax.make_jaxpr(call)(*args)
    used, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _flop(used)


def _flop(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(eqn.params.values()))]
        total += eqn.params.get("length", 1) * sum(_flop(value) for value in inner if hasattr(value, "eqns"))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            total += 2 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return total


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
    outputs = {name: run(plain, precision) for name, precision in PRECISIONS.items()}
    outputs["bfloat16 inputs"] = run(plain.clone(dtype=jnp.bfloat16), "default")
    return {name: float(np.sqrt(np.square(y - expected).mean() / np.square(expected).mean())) for name, y in outputs.items()}


def measure_torch(name: str, what: str, setting: str) -> dict[str, Any]:
    """Time the yardstick in bf16 in one of its settings; the projection that shortens long prompts is left out of it."""
    import torch

    from tests.torch_decoder import Decoder

    if not torch.cuda.is_available():
        return {"failed": "this PyTorch sees no CUDA device"}
    torch.backends.cudnn.benchmark = True
    decoder = decoder_of(CONFIGS[name]())
    module: Any = Decoder(decoder.features, decoder.kernel_size).to("cuda", torch.bfloat16)
    if "channels-last" in setting:
        module.to(memory_format=torch.channels_last)
    run = torch.compile(module) if "compile" in setting else module
    x = torch.randn(1, *decoder.features[0], device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        module.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if what != "adapter" else torch.no_grad():
            y = run(x)
        if what != "adapter":
            y.float().square().mean().backward()
        torch.cuda.synchronize()

    call()
    torch.cuda.reset_peak_memory_stats()  # compiling and choosing a convolution take more
    return {"device": torch.cuda.get_device_name(), "ms": 1000 * overhead.median_seconds(call, 5),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
