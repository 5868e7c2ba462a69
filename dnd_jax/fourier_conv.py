"""The plane convolution as a tiled Fourier convolution (overlap-save), written as batched matrix products.

A plane of S1 x S2 positions is cut into tiles of n1 x n2 that overlap by the taps less one; each gives m1 x m2 outputs. An
axis of one tile is the whole axis with zeros at its end, which wrap around to both sides. Along the first axis the tiles'
transform is real (half a spectrum), along the second complex, both by small constant matrices. A product of complex numbers
is three real ones (Karatsuba; for many tiles) or four (for few, where the kernel's spectrum is what costs). The sums and
signs of either are part of the matrices, so nothing is sliced or transposed between products:

    X   = input_2 (input_1 tiles(x))          [F, R, C]
    W_j = kernel_2_j (kernel_1 w)             [F, C, O]    j = 1, or 1 and 2
    y   = untile(output_1 sum_j output_2_j (X W_j))

F frequencies (three for each where Karatsuba's), R rows: the tiles of all examples (real and imaginary parts where there
are four products).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dnd_jax.fourier_plan import Axis, Plan, make_plan
from dnd_jax.types import Block

Kernel = Float[Array, "O I k k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A kernel's transform, kept: `parts` are `[chunks, F, C, O / chunks]`; good for inputs of the plan's shape only."""

    parts: tuple[jax.Array, ...]
    plan: Plan = dataclasses.field(metadata={"static": True})


def convolve(x: Block, kernel: Kernel | Spectrum, axes: tuple[int, int, int], mesh: Mesh | None = None) -> Block:
    """Convolve the plane of two axes of a block, a third being the channels: stride 1, zeros outside, same size.

    Picks the form, direct or Fourier and then its tiles, from the shapes.

    Args:
      x: block of four axes, the first the batch.
      kernel: `[out, in, k, k]`, its first tap axis along the first axis of the plane, or what `prepare` made of it. For an even
        k the extra zero is on the high side.
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
    tensor = "tensor" if isinstance(kernel, jax.Array) and kernel.shape[0] % mesh.shape["tensor"] == 0 else None
    out = PartitionSpec(batch, *("tensor" if tensor and axis == axes[2] else None for axis in (1, 2, 3)))
    return jax.shard_map(functools.partial(_convolve, axes=axes), mesh=mesh, out_specs=out, check_vma=False,
                         in_specs=(PartitionSpec(batch), PartitionSpec(tensor)))(x, kernel)


def prepare(kernel: Kernel, x: Any, axes: tuple[int, int, int]) -> Spectrum | None:
    """Return the kernel's transform for inputs like x (shape and dtype), or None where `convolve` would be direct."""
    plan = _plan(x, kernel, axes)
    if plan is None:
        return None
    return Spectrum(jax.lax.map(lambda w: _kernel_in(w, plan), _chunked(kernel, plan)), plan)


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
    return make_plan(batch, size_1, size_2, kernel.shape[1], kernel.shape[0], kernel.shape[-1], jax.default_backend())


def _direct(x: Block, kernel: Kernel, axes: tuple[int, int, int]) -> Block:
    low = (kernel.shape[-1] - 1) // 2
    padding = (low, kernel.shape[-1] - 1 - low)
    letters = "N" + "".join("HWC"[axes.index(axis)] for axis in (1, 2, 3))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (padding, padding), dimension_numbers=(letters, "OIHW", letters))


# --- the bilinear form, channels last --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fourier(x: Float[Array, "B S1 S2 C"], kernel: Kernel | Spectrum, plan: Plan) -> Float[Array, "B S1 S2 O"]:
    return _forward(x, kernel, plan)[0]


def _forward(x: jax.Array, kernel: Kernel | Spectrum, plan: Plan) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    spectrum = _input(x, plan)

    def part(of_kernel: Any) -> jax.Array:
        parts = of_kernel if isinstance(kernel, Spectrum) else _kernel_in(of_kernel, plan)
        return _output([_product(spectrum, w, "frc,fco->fro") for w in parts], plan).astype(x.dtype)

    y = _over_chunks(part, kernel.parts if isinstance(kernel, Spectrum) else _chunked(kernel, plan))
    return y[..., :plan.out], (x, kernel)


def _backward(plan: Plan, saved: tuple[jax.Array, Any], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients; spectra are computed anew rather than kept, being larger than what they are computed from."""
    x, kernel = saved
    spectrum, input_transposed = jax.vjp(lambda x: _input(x, plan), x)
    rows = spectrum.shape[:2]

    def part(accumulated: jax.Array | None, of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, g = of
        parts, kernel_transposed = jax.vjp(lambda w: _kernel_in(w, plan), w)
        like = [jax.ShapeDtypeStruct((*rows, g.shape[-1]), jnp.float32)] * len(parts)
        (products,) = jax.linear_transpose(lambda ys: _output(ys, plan), like)(g.astype(jnp.float32))
        products = [p.astype(x.dtype) for p in products]
        terms = [_product(p, w, "fro,fco->frc") for p, w in zip(products, parts, strict=True)]
        if accumulated is not None:
            terms.append(accumulated)
        (d_w,) = kernel_transposed(tuple(_product(spectrum, p, "frc,fro->fco").astype(x.dtype) for p in products))
        return functools.reduce(jnp.add, terms), d_w

    chunks = _chunked(kernel, plan)
    if plan.chunks == 1:
        d_spectrum, d_kernel = part(None, (chunks[0], g))
    else:
        padded = jnp.pad(g, ((0, 0),) * 3 + ((0, plan.chunks * plan.chunk - plan.out),))
        g_chunks = jnp.moveaxis(padded.reshape(*g.shape[:-1], plan.chunks, plan.chunk), -2, 0)
        d_spectrum, d_kernel = jax.lax.scan(part, jnp.zeros(spectrum.shape, jnp.float32), (chunks, g_chunks))
    (d_x,) = input_transposed(d_spectrum.astype(spectrum.dtype))
    return d_x, d_kernel.reshape(-1, *kernel.shape[1:])[:plan.out]


_fourier.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, letters: str) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _chunked(kernel: Kernel, plan: Plan) -> jax.Array:
    """Return the kernel as `[chunks, O / chunks, I, k, k]`, with zeros for output channels that are missing."""
    if missing := plan.chunks * plan.chunk - plan.out:
        kernel = jnp.pad(kernel, ((0, missing),) + ((0, 0),) * 3)
    return kernel.reshape(plan.chunks, plan.chunk, *kernel.shape[1:])


def _over_chunks(function: Callable[[Any], jax.Array], chunks: Any) -> jax.Array:
    """Return the results for each chunk of output channels, side by side on the last axis."""
    if len(jax.tree.leaves(chunks)[0]) == 1:
        return function(jax.tree.map(lambda a: a[0], chunks))
    y = jnp.moveaxis(jax.lax.map(function, chunks), 0, -2)
    return y.reshape(*y.shape[:-2], -1)


# --- transforms ------------------------------------------------------------------------------------------------------


def _input(x: jax.Array, plan: Plan) -> jax.Array:
    """Return the spectra `[F, R, C]` of all tiles, of x's dtype."""
    a, b, m = plan.first, plan.second, _matrices(plan)
    tiles = _tiles(_tiles(x.astype(jnp.float32), 1, a), 3, b).transpose(2, 4, 0, 1, 3, 5)  # n1 n2 B t1 t2 C
    half = jnp.dot(m.input_1, tiles.reshape(a.length, -1)).reshape(plan.half, 2 * b.length, -1)
    return jnp.matmul(m.input_2, half).astype(x.dtype).reshape(plan.frequencies, -1, x.shape[-1])


def _tiles(x: jax.Array, axis: int, a: Axis) -> jax.Array:
    """Cut one axis into two, tiles and positions of a tile, as views of whole blocks: slices that overlap differentiate badly."""
    blocks = a.tiles + -(-a.length // a.step) - 1 if a.tiles > 1 else 1
    width = a.step if a.tiles > 1 else a.length
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (a.low, blocks * width - a.low - a.size, 0)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    x = x.reshape(*x.shape[:axis], blocks, width, *x.shape[axis + 1:])
    views = []
    for i in range(-(-a.length // width)):
        view = jax.lax.slice_in_dim(x, i, i + a.tiles, axis=axis)
        views.append(jax.lax.slice_in_dim(view, 0, min(width, a.length - i * width), axis=axis + 1))
    return jnp.concatenate(views, axis + 1) if len(views) > 1 else views[0]


def _kernel_in(kernel: Kernel, plan: Plan) -> tuple[jax.Array, ...]:
    """Return the spectra `[F, I, O]` of a kernel, of its dtype; taps that never meet the plane are left out."""
    a, b, m = plan.first, plan.second, _matrices(plan)
    low = (kernel.shape[-1] - 1) // 2
    taps = kernel[:, :, low - a.low:low + a.high + 1, low - b.low:low + b.high + 1]
    o, i, k1, k2 = taps.shape
    # As three axes XLA's transposition is twice as fast as with four.
    taps = taps.reshape(o, i, k1 * k2).transpose(2, 1, 0).reshape(k1, -1).astype(jnp.float32)
    half = jnp.dot(m.kernel_1, taps).reshape(plan.half, 2 * k2, -1)
    return tuple(jnp.matmul(matrix, half).astype(kernel.dtype).reshape(plan.frequencies, i, o) for matrix in m.kernel_2)


def _output(products: list[jax.Array], plan: Plan) -> jax.Array:
    """Return the plane `[B, S1, S2, O]` of products `[F, R, O]`."""
    a, b, m = plan.first, plan.second, _matrices(plan)
    out = products[0].shape[-1]
    flat = [p.reshape(plan.half, matrix.shape[-1], -1) for p, matrix in zip(products, m.output_2, strict=True)]
    half = functools.reduce(jnp.add, map(jnp.matmul, m.output_2, flat))
    y = jnp.dot(m.output_1, half.reshape(2 * plan.half, -1))
    y = y.reshape(a.step, b.step, plan.batch, a.tiles, b.tiles, out).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(plan.batch, a.tiles * a.step, b.tiles * b.step, out)[:, :a.size, :b.size]


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """Real matrices of the complex transforms; those of second axes are repeated for each frequency of the first."""

    input_1: np.ndarray
    input_2: np.ndarray
    kernel_1: np.ndarray
    kernel_2: tuple[np.ndarray, ...]
    output_1: np.ndarray
    output_2: tuple[np.ndarray, ...]


@functools.lru_cache
def _matrices(plan: Plan) -> _Matrices:
    a, b = plan.first, plan.second
    forward_1, forward_2 = _fourier_matrix(a.length, -1)[:plan.half], _fourier_matrix(b.length, -1)
    # Convolutions of networks are correlations: the kernel's transform is the conjugate one.
    kernel_1, kernel_2 = forward_1.conj()[:, :a.taps], forward_2.conj()[:, :b.taps]
    back_1 = _fourier_matrix(a.length, 1)[:a.step, :plan.half] / a.length
    back_2 = _fourier_matrix(b.length, 1)[:b.step] / b.length
    alone = np.array([f in (0, a.length - f) for f in range(plan.half)])
    back_1 = back_1 * np.where(alone, 1, 2)  # the other half of the spectrum is the conjugate of this one
    # What a product of X and W contributes to each of its real components' sum: three products or twice two.
    kernels: Sequence[tuple[complex, ...]]
    sums: Sequence[tuple[complex, ...]]
    if plan.karatsuba:
        kernels, sums = [(1, 1j, 1 + 1j)], [(1 - 1j, -1 - 1j, 1j)]
    else:
        kernels, sums = [(1,), (1j,)], [(1, 1j), (1j, -1)]
    rows = (1, 1j, 1 + 1j)[:3 if plan.karatsuba else 2]
    repeat = functools.partial(_repeated, times=plan.half)
    return _Matrices(
        _stack([forward_1.real, forward_1.imag]), repeat(_components(forward_2, rows)),
        _stack([kernel_1.real, kernel_1.imag]), tuple(repeat(_components(kernel_2, which)) for which in kernels),
        _stack([back_1.real.T, -back_1.imag.T]).T.copy(), tuple(repeat(_combine(back_2, which)) for which in sums))


def _fourier_matrix(length: int, sign: int) -> np.ndarray:
    turns = np.outer(np.arange(length), np.arange(length)) % length
    return np.exp(sign * 2j * math.pi * turns / length)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """Interleave the rows of matrices."""
    return np.stack(rows, 1).reshape(-1, rows[0].shape[-1]).astype(np.float32)


def _components(matrix: np.ndarray, which: tuple[complex, ...]) -> np.ndarray:
    """Return the matrix from (real, imaginary) columns to rows: the real part for 1, the imaginary for 1j, or their sum."""
    wide = np.concatenate([matrix, 1j * matrix], 1)
    return _stack([wide.real * complex(c).real + wide.imag * complex(c).imag for c in which])


def _combine(matrix: np.ndarray, weights: tuple[complex, ...]) -> np.ndarray:
    """Return the matrix from real products to (real, imaginary) rows, each product weighing as given in its complex sum."""
    wide = (matrix[:, :, None] * np.array(weights)).reshape(len(matrix), -1)
    return np.concatenate([wide.real, wide.imag]).astype(np.float32)


def _repeated(matrix: np.ndarray, times: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(matrix, (times, *matrix.shape)))
