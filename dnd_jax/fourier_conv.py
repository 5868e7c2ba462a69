"""The plane convolution as a tiled Fourier convolution (overlap-save), written as batched matrix products.

A plane of S1 x S2 positions is cut into tiles of n1 x n2 that overlap by the taps less one; each gives m1 x m2 outputs. An
axis of one tile is the whole axis with zeros at its end, which wrap around to both sides. Along the first axis the tiles'
transform is real: half a spectrum, at frequencies between those of a period, so that none is its own conjugate (what wraps
around changes its sign, but all of that is cut off or zero). Along the second axis it is complex. A product of complex numbers
is three real ones (Karatsuba; for many tiles), or four as one product of twice as many channels (for few, where the kernel's
spectrum is what costs). The signs and sums of either are part of the matrices:

    X = input_2 (input_1 tiles(x))          [F, P R, P C]
    W = kernel_2 (kernel_1 w)               [F, P C, O]
    Y = X W                                 [F, P R, O]
    y = untile(output_1 (output_2 Y))

F frequencies (three for each where Karatsuba's), R rows: the tiles of all examples, P = 1, or 2 for the real and the imaginary
parts: W has those of the kernel below each other, Y those of the outputs, and X is arranged to suit. A kernel goes through this
in chunks of its output channels where its spectrum takes much memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dnd_jax.fourier_constants import matrices, moves
from dnd_jax.fourier_plan import Plan, make_plan
from dnd_jax.types import Block

Kernel = Float[Array, "k k I O"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A kernel's transform `[F, P I, O]`, kept; good for inputs of the plan's shape only."""

    values: jax.Array
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
      Block with the axes of x, of x's dtype; products of bfloat16 are summed in float32 and the transforms are float32.
    """
    if mesh is None or mesh.size == 1:
        return _convolve(x, kernel, axes)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = ("data", "fsdp") if x.shape[0] % parts == 0 else None
    tensor = "tensor" if isinstance(kernel, jax.Array) and kernel.shape[-1] % mesh.shape["tensor"] == 0 else None
    of_kernel = PartitionSpec(None, None, None, tensor) if tensor else PartitionSpec()
    out = PartitionSpec(batch, *("tensor" if tensor and axis == axes[2] else None for axis in (1, 2, 3)))
    return jax.shard_map(functools.partial(_convolve, axes=axes), mesh=mesh, out_specs=out, check_vma=False,
                         in_specs=(PartitionSpec(batch), of_kernel))(x, kernel)


def prepare(kernel: Kernel, x: Any, axes: tuple[int, int, int]) -> Spectrum | None:
    """Return the kernel's transform for inputs like x (shape and dtype), or None where `convolve` would be direct."""
    plan = _plan(x, kernel, axes)
    if plan is None:
        return None
    return Spectrum(_joined(jax.lax.map(lambda w: _kernel(w, plan), _chunked(kernel, plan.chunks))), plan)


@functools.partial(jax.jit, static_argnames="axes", inline=True)  # outside of any jit: one compilation rather than dozens
def _convolve(x: Block, kernel: Kernel | Spectrum, axes: tuple[int, int, int]) -> Block:
    plan = kernel.plan if isinstance(kernel, Spectrum) else _plan(x, kernel, axes)
    if plan is None:
        assert isinstance(kernel, jax.Array)
        return _direct(x, kernel, axes)
    if plan.batch != x.shape[0]:
        raise ValueError(f"a batch of {x.shape[0]} examples, but the kernel's transform was prepared for {plan.batch}")
    order = (0, *axes)
    y = _fourier(x.transpose(order), kernel, plan)
    return y.transpose(np.argsort(order))


def _plan(x: Any, kernel: Kernel, axes: tuple[int, int, int]) -> Plan | None:
    batch, (size_1, size_2) = x.shape[0], (x.shape[axis] for axis in axes[:2])
    return make_plan(batch, size_1, size_2, *kernel.shape[2:], kernel.shape[0])


def _direct(x: Block, kernel: Kernel, axes: tuple[int, int, int]) -> Block:
    low = (kernel.shape[0] - 1) // 2
    padding = (low, kernel.shape[0] - 1 - low)
    letters = "N" + "".join("HWC"[axes.index(axis)] for axis in (1, 2, 3))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (padding, padding), dimension_numbers=(letters, "HWIO", letters))


# --- the bilinear form, channels last --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fourier(x: Float[Array, "B S1 S2 C"], kernel: Kernel | Spectrum, plan: Plan) -> Float[Array, "B S1 S2 O"]:
    spectrum = _input(x, plan)

    def part(w: jax.Array) -> jax.Array:
        return _output(_product(f"{_letters(plan)},fko->fro", spectrum, w), plan, x)

    if isinstance(kernel, Spectrum):
        return part(kernel.values)
    return _joined(jax.lax.map(lambda w: part(_kernel(w, plan)), _chunked(kernel, plan.chunks)))


def _forward(x: jax.Array, kernel: Kernel, plan: Plan) -> tuple[jax.Array, tuple[jax.Array, Kernel]]:
    return _fourier(x, kernel, _for_gradients(plan)), (x, kernel)


def _backward(plan: Plan, saved: tuple[jax.Array, Kernel], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients. Spectra are larger than what they are of, so none is saved; XLA may find that it has one already."""
    (x, kernel), plan = saved, _for_gradients(plan)
    spectrum, input_transposed = jax.vjp(lambda x: _input(x, plan), x)

    def part(d_spectrum: jax.Array, of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, kernel_transposed = jax.vjp(lambda w: _kernel(w, plan), of[0])
        y = jnp.zeros((len(w), plan.parts * plan.rows, w.shape[-1]))
        (d_y,) = jax.vjp(lambda y: _output(y, plan, x), y)[1](of[1])
        d_y = d_y.astype(x.dtype)
        d_spectrum += _product(f"fko,fro->{_letters(plan)}", w, d_y)
        d_w = _product(f"{_letters(plan)},fro->fko", spectrum, d_y).astype(kernel.dtype)
        return d_spectrum, kernel_transposed(d_w)[0]

    chunks = (_chunked(kernel, plan.chunks), _chunked(g, plan.chunks))
    d_spectrum, d_kernel = jax.lax.scan(part, jnp.zeros(spectrum.shape), chunks)
    return input_transposed(d_spectrum.astype(spectrum.dtype))[0], _joined(d_kernel)


_fourier.defvjp(_forward, _backward)


def _chunked(a: jax.Array, chunks: int) -> jax.Array:
    """Return an array's last axis in chunks, `[chunks, ..., O / chunks]`."""
    return jnp.moveaxis(a.reshape(*a.shape[:-1], chunks, -1), -2, 0)


def _joined(chunks: jax.Array) -> jax.Array:
    return jnp.moveaxis(chunks, 0, -2).reshape(*chunks.shape[1:-1], -1)


def _for_gradients(plan: Plan) -> Plan:
    """Return the plan with X as XLA's products for its gradient and the kernel's are fastest on CPU: few rows behind channels."""
    return dataclasses.replace(plan, rows_last=not plan.karatsuba)


def _letters(plan: Plan) -> str:
    return "fkr" if plan.rows_last else "frk"


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


# --- transforms ------------------------------------------------------------------------------------------------------


def _input(x: jax.Array, plan: Plan) -> jax.Array:
    """Return the spectra of all tiles, `[F, P R, P C]` or with the last two axes swapped, of x's dtype."""
    channels, parts, m = x.shape[-1], plan.parts, matrices(plan)
    plane = x.astype(jnp.float32).transpose(1, 2, 0, 3).reshape(-1, plan.batch * channels)
    tiles = moves(plan).cut(plane).reshape(-1, plan.rows, channels)  # n1 n2, t2 t1 B, C
    tiles = tiles.swapaxes(1, 2) if plan.rows_last else tiles
    half = jnp.dot(m.input_1, tiles.reshape(plan.first.length, -1))
    spectrum = jnp.matmul(m.input_2, half.reshape(plan.half, 2 * plan.second.length, -1)).astype(x.dtype)
    first, last = tiles.shape[1:]
    return spectrum.reshape(-1, parts, parts, first, last).swapaxes(2, 3).reshape(-1, parts * first, parts * last)


def _kernel(kernel: Kernel, plan: Plan) -> jax.Array:
    """Return the spectra `[F, P I, O]` of a kernel, of its dtype; taps that never meet the plane are left out."""
    a, b, m = plan.first, plan.second, matrices(plan)
    low = (kernel.shape[0] - 1) // 2
    taps = kernel[low - a.low:low + a.high + 1, low - b.low:low + b.high + 1].astype(jnp.float32)
    half = jnp.dot(m.kernel_1, taps.reshape(a.taps, -1))
    spectrum = jnp.matmul(m.kernel_2, half.reshape(plan.half, 2 * b.taps, -1)).astype(kernel.dtype)
    return spectrum.reshape(-1, plan.parts * kernel.shape[2], kernel.shape[3])


def _output(y: jax.Array, plan: Plan, like: Any) -> jax.Array:
    """Return the plane `[B, S1, S2, O]` of products `[F, P R, O]`, of a dtype like another's."""
    m, out = matrices(plan), y.shape[-1]
    half = jnp.matmul(m.output_2, y.reshape(plan.half, -1, plan.rows * out))
    tiles = jnp.dot(m.output_1, half.reshape(2 * plan.half, -1))
    plane = moves(plan).join(tiles.reshape(-1, plan.batch * out))  # m1 m2 t2 t1, B O
    return plane.reshape(plan.first.size, plan.second.size, plan.batch, out).transpose(2, 0, 1, 3).astype(like.dtype)
