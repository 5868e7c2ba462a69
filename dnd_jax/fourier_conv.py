"""The plane convolution as a tiled Fourier convolution (overlap-save), written as batched matrix products.

A plane of S1 x S2 positions is cut into tiles of n1 x n2 that overlap by the taps less one; each gives m1 x m2 outputs. An
axis of one tile is the whole axis with zeros at its end, which wrap around to both sides. Along the first axis the tiles'
transform is real: half a spectrum, at frequencies between those of a period, so that none is its own conjugate (what wraps
around changes its sign, but all of that is cut off or zero). Along the second axis it is complex. A product of complex numbers
is three real ones (Karatsuba; for many tiles), or each part of the kernel with both of X (for few, where the kernel's spectrum
is what costs). The signs and sums of either are part of the matrices:

    X = input_2 cut(input_1 cut(x))         [F, P R, C]
    W = kernel_2 (kernel_1 w)               [F, C, O], one array, or one for each part
    Y = X W                                 [F, P R, O]
    y = output_1 (output_2 Y), summed over the arrays

F frequencies (three for each where Karatsuba's), R rows: the tiles of all examples, P = 1, or 2 for the real and the imaginary
part. The channels come last around the product Y; a block is transposed twice, each time between the matrices of its two axes.

A kernel goes through this in chunks of its output channels where its spectrum takes much memory, and, where no gradient follows,
in bands of the first axis' frequencies where it takes more than a cache but that of one frequency doesn't.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dnd_jax.fourier_constants import cutter, matrices
from dnd_jax.fourier_plan import Plan, make_plan
from dnd_jax.types import Block

Kernel = Float[Array, "k k I O"]
FEW = 100  # rows of X up to which it pays to transpose it for the kernel's gradient: XLA's products on CPU do that slowly, or, of
# bfloat16 (jax 0.10.2), not at all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A kernel's transform, arrays `[F, I, O]`, kept; good for inputs of the plan's shape only."""

    values: list[jax.Array]
    plan: Plan = dataclasses.field(metadata={"static": True})


def convolve(x: Block, kernel: Kernel | Spectrum, axes: tuple[int, int, int], mesh: Mesh | None = None) -> Block:
    """Convolve the plane of two axes of a block, a third being the channels: stride 1, zeros outside, same size.

    Picks the form, direct or Fourier and then its tiles, from the shapes.

    Args:
      x: block of four axes, the first the batch.
      kernel: `[k, k, in, out]`, its first axis along the first axis of the plane, or what `prepare` made of it. For an even k
        the extra zero is on the high side.
      axes: of the plane (first and second) and of the channels.
      mesh: of several devices, with axes `data`, `fsdp` and `tensor`: each device then convolves its examples, the batch being
        split over `data` and `fsdp`, to its output channels, split over `tensor`; the partitioner by itself replicates. A batch
        that the devices don't divide is replicated.

    Returns:
      Block with the axes of x, of x's dtype; products of bfloat16 are summed in float32 and the transforms are float32, but on
      GPUs (TF32) and TPUs (bfloat16) as exact as JAX's default matmul precision is.
    """
    if mesh is None or mesh.size == 1:
        return _convolve(x, kernel, axes)
    split = {axis for axis, size in mesh.shape.items() if size > 1}  # over axes of one device gradients are summed, too
    batch = tuple(axis for axis in ("data", "fsdp") if axis in split)
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in batch):
        batch = ()
    tensor = "tensor" in split and isinstance(kernel, jax.Array) and kernel.shape[-1] % mesh.shape["tensor"] == 0
    of_kernel = PartitionSpec(None, None, None, "tensor") if tensor else PartitionSpec()
    out = PartitionSpec(batch or None, *("tensor" if tensor and axis == axes[2] else None for axis in (1, 2, 3)))
    dtypes = jax.tree.map(lambda a: a.dtype, (x, kernel))

    def each(*args: Any) -> Block:
        return _convolve(*jax.tree.map(lambda a, dtype: a.astype(dtype), args, dtypes), axes=axes)

    # Gradients are summed over devices in float32. In bfloat16 it would be less exact, and XLA on CPU (jax 0.10.2) aborts.
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, kernel))
    return jax.shard_map(each, mesh=mesh, axis_names=split, out_specs=out, check_vma=False,
                         in_specs=(PartitionSpec(batch or None), of_kernel))(*wide)


def prepare(kernel: Kernel, x: Any, axes: tuple[int, int, int]) -> Spectrum | None:
    """Return the kernel's transform for inputs like x (shape and dtype), or None where `convolve` would be direct."""
    plan = _plan(x, kernel, axes)
    if plan is None:
        return None
    chunks = jax.lax.map(lambda w: _kernel(w, plan), _chunked(_ordered(kernel, plan), plan.chunks))
    return Spectrum(jax.tree.map(_joined, chunks), plan)


@functools.partial(jax.jit, static_argnames="axes", inline=True)  # outside of any jit: one compilation rather than dozens
def _convolve(x: Block, kernel: Kernel | Spectrum, axes: tuple[int, int, int]) -> Block:
    plan = kernel.plan if isinstance(kernel, Spectrum) else _plan(x, kernel, axes)
    if plan is None:
        assert isinstance(kernel, jax.Array)
        return _direct(x, kernel, axes)
    if plan.batch != x.shape[0]:
        raise ValueError(f"a batch of {x.shape[0]} examples, but the kernel's transform was prepared for {plan.batch}")
    return _planned(x, kernel, axes, plan)


def _planned(x: Block, kernel: Kernel | Spectrum, axes: tuple[int, int, int], plan: Plan) -> Block:
    first = axes[plan.swapped]
    order = (0, first, *(axis for axis in (1, 2, 3) if axis != first))
    channels = order.index(axes[2])
    y = _fourier(x.transpose(order), kernel if isinstance(kernel, Spectrum) else _ordered(kernel, plan), plan, channels)
    return y.transpose(np.argsort(order))


def _ordered(kernel: Kernel, plan: Plan) -> Kernel:
    """Return a kernel with its taps along the plan's first axis first."""
    return kernel.swapaxes(0, 1) if plan.swapped else kernel


def _plan(x: Any, kernel: Kernel, axes: tuple[int, int, int]) -> Plan | None:
    batch, (size_1, size_2) = x.shape[0], (x.shape[axis] for axis in axes[:2])
    # The last axis of a block is not the first to be transformed: neighbours in memory stay neighbours.
    orders = tuple(swapped for swapped in (False, True) if axes[swapped] != 3)
    return make_plan(batch, size_1, size_2, *kernel.shape[2:], kernel.shape[0], orders)


def _direct(x: Block, kernel: Kernel, axes: tuple[int, int, int]) -> Block:
    low = (kernel.shape[0] - 1) // 2
    padding = (low, kernel.shape[0] - 1 - low)
    letters = "N" + "".join("HWC"[axes.index(axis)] for axis in (1, 2, 3))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (padding, padding), dimension_numbers=(letters, "HWIO", letters))


# --- the bilinear form, of a block with the plan's first axis after the batch, the others in their order -----------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fourier(x: Float[Array, "B S1 _ _"], kernel: Kernel | Spectrum, plan: Plan, channels: int) -> Float[Array, "B S1 _ _"]:
    """Convolve where no gradient follows, which would want all of the spectrum again."""
    if isinstance(kernel, Spectrum):
        return _output(_multiply(_input(x, plan, channels), kernel.values), plan, channels, x.dtype)
    return _by_frequencies(x, kernel, plan, channels) if plan.bands > 1 else _by_outputs(x, kernel, plan, channels)


def _by_frequencies(x: jax.Array, kernel: Kernel, plan: Plan, channels: int) -> jax.Array:
    """Convolve with one band of the first axis' frequencies after the other, each band's spectrum while it is in a cache."""
    spectrum, zero = _input(x, plan, channels), _late_zero(x)
    per_frequency = spectrum.reshape(plan.half, -1, *spectrum.shape[1:])
    products = []
    for band in np.array_split(np.arange(plan.half), plan.bands):
        of = slice(band[0], band[-1] + 1)
        products.append(_multiply(per_frequency[of].reshape(-1, *spectrum.shape[1:]), _kernel(kernel, plan, zero, of)))
        zero = _late_zero(products[-1][-1])
    return _output([jnp.concatenate(parts) for parts in zip(*products, strict=True)], plan, channels, x.dtype)


def _by_outputs(x: jax.Array, kernel: Kernel, plan: Plan, channels: int) -> jax.Array:
    spectrum, zero = _input(x, plan, channels), _late_zero(x)

    def part(w: Kernel) -> jax.Array:
        return _output(_multiply(spectrum, _kernel(w, plan, zero)), plan, channels, x.dtype)

    return _joined(jax.lax.map(part, _chunked(kernel, plan.chunks)), channels)


def _forward(x: jax.Array, kernel: Kernel, plan: Plan, channels: int) -> tuple[jax.Array, tuple[jax.Array, Kernel]]:
    return _by_outputs(x, kernel, plan, channels), (x, kernel)


def _backward(plan: Plan, channels: int, saved: tuple[jax.Array, Kernel], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients. Spectra are larger than what they are of, so none is saved; XLA may find that it has one already."""
    x, kernel = saved
    zero = _late_zero(x)
    spectrum, input_transposed = jax.vjp(lambda x: _input(x, plan, channels), x)
    turned = spectrum.swapaxes(1, 2)
    if spectrum.shape[1] <= FEW or (spectrum.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"):
        turned = jax.lax.optimization_barrier(turned)

    def part(d_spectrum: jax.Array, of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, kernel_transposed = jax.vjp(lambda w: _kernel(w, plan, zero), of[0])
        y = [jnp.zeros((*spectrum.shape[:2], part.shape[-1])) for part in w]
        (d_y,) = jax.vjp(lambda y: _output(y, plan, channels, x.dtype), y)[1](of[1])
        d_y = [part.astype(x.dtype) for part in d_y]
        d_spectrum += sum(_product("fro,fko->frk", *both) for both in zip(d_y, w, strict=True))
        d_w = [_product("fkr,fro->fko", turned, part).astype(kernel.dtype) for part in d_y]
        return d_spectrum, kernel_transposed(d_w)[0]

    chunks = (_chunked(kernel, plan.chunks), _chunked(g, plan.chunks, channels))
    d_spectrum, d_kernel = jax.lax.scan(part, jnp.zeros(spectrum.shape), chunks)
    return input_transposed(d_spectrum.astype(spectrum.dtype))[0], _joined(d_kernel)


_fourier.defvjp(_forward, _backward)


def _chunked(a: jax.Array, chunks: int, axis: int = -1) -> jax.Array:
    """Return an array with one of its axes in chunks, `[chunks, ...]`."""
    axis %= a.ndim
    return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, -1, *a.shape[axis + 1:]), axis, 0)


def _joined(chunks: jax.Array, axis: int = -1) -> jax.Array:
    axis %= chunks.ndim - 1
    a = jnp.moveaxis(chunks, 0, axis)
    return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2:])


def _late_zero(x: jax.Array) -> jax.Array:
    """Return a zero that XLA doesn't know before x: what it is added to waits for x.

    A kernel's transform needs only parameters. XLA on CPU therefore began with the transforms of all kernels of a decoder, which
    then were in memory together, and in no cache when they were used.
    """
    first = x[(0,) * x.ndim]
    return (jnp.isnan(first) & jnp.isinf(first)).astype(jnp.float32)


def _linear(matrix: np.ndarray, x: jax.Array, zero: jax.Array | float = 0.0) -> jax.Array:
    """Return a constant matrix (with a zero added, repeated if need be) times x, `[..., M, K]` times `[..., K, N]`; the gradient
    has a constant of its own, since XLA's products on CPU are slow where the left side is to be transposed."""
    transposed = np.ascontiguousarray(matrix.swapaxes(-1, -2))

    def times(matrix: jax.Array | np.ndarray, x: jax.Array) -> jax.Array:
        return jnp.matmul(jnp.broadcast_to(matrix, x.shape[:-2] + matrix.shape[-2:]), x)

    multiply = jax.custom_vjp(lambda x: times(matrix + zero, x))
    multiply.defvjp(lambda x: (times(matrix + zero, x), None), lambda _, g: (times(transposed, g),))
    return multiply(x)


def _multiply(spectrum: jax.Array, kernel: list[jax.Array]) -> list[jax.Array]:
    return [_product("frk,fko->fro", spectrum, part) for part in kernel]


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


# --- transforms ------------------------------------------------------------------------------------------------------


def _input(x: jax.Array, plan: Plan, channels: int) -> jax.Array:
    """Return the spectra of all tiles, `[F, P R, C]`, of x's dtype."""
    m, second = matrices(plan), 5 - channels  # one is axis 2, the other 3
    rows = x.astype(jnp.float32).reshape(plan.batch, plan.first.size, -1)
    tiles = cutter(plan.first)(rows).reshape(plan.batch, plan.first.tiles, plan.first.rows, -1)
    half = _linear(m.input_1, tiles).reshape(plan.batch, plan.first.tiles, 2 * plan.half, *x.shape[2:])  # B, t1, f1 p, S2 and C
    rows = half.transpose(2, second + 1, 1, 0, channels + 1).reshape(2 * plan.half, plan.second.size, -1)
    tiles = cutter(plan.second, tiles_last=True)(rows).reshape(plan.half, 2 * plan.second.rows, -1)  # f1, p n2, t2 t1 B C
    return _linear(m.input_2, tiles).astype(x.dtype).reshape(-1, plan.parts * plan.rows, x.shape[channels])


def _kernel(kernel: Kernel, plan: Plan, zero: jax.Array | float = 0.0, of: slice = slice(None)) -> list[jax.Array]:
    """Return the spectra `[F, I, O]` of a kernel, of its dtype, or those of some of the first axis' frequencies; taps that never
    meet the plane are left out. A `_late_zero` says when."""
    a, b, m = plan.first, plan.second, matrices(plan)
    low = (kernel.shape[0] - 1) // 2
    taps = kernel[low - a.low:low + a.high + 1, low - b.low:low + b.high + 1].astype(jnp.float32)
    kernel_1 = m.kernel_1.reshape(plan.half, -1, a.taps)[of].reshape(-1, a.taps)
    half = _linear(kernel_1, taps.reshape(a.taps, -1), zero).reshape(len(kernel_1) // 2, 2 * b.taps, -1)
    return [_linear(matrix[of], half).astype(kernel.dtype).reshape(-1, *kernel.shape[2:]) for matrix in m.kernel_2]


def _output(products: list[jax.Array], plan: Plan, channels: int, dtype: jnp.dtype) -> jax.Array:
    """Return the block, B and S1 first, of products `[F, P R, O]`."""
    m, a, b, out = matrices(plan), plan.first, plan.second, products[0].shape[-1]
    tiles = [_linear(matrix, y.reshape(plan.half, -1, plan.rows * out)) for matrix, y in zip(m.output_2, products, strict=True)]
    half = functools.reduce(jnp.add, tiles).reshape(2 * plan.half, b.step, b.tiles, a.tiles, plan.batch, out)
    half = half.transpose(4, 3, 0, *((2, 1, 5) if channels == 3 else (5, 2, 1)))  # B, t1, f1 p, t2 m2 and O
    plane = _linear(m.output_1, half.reshape(plan.batch, a.tiles, 2 * plan.half, -1))
    shape = (plan.batch, a.tiles * a.step, b.tiles * b.step, out)
    plane = plane.reshape(shape if channels == 3 else shape[:2] + shape[:1:-1])[:, :a.size]
    return jax.lax.slice_in_dim(plane, 0, b.size, axis=5 - channels).astype(dtype)
