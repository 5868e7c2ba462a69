"""Constants of a Fourier form: which rows tiles take, and the real matrices of the complex transforms."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.fourier_plan import Axis, Plan


@functools.lru_cache
def cutter(axis: Axis, tiles_last: bool = False) -> Callable[[jax.Array], jax.Array]:
    """Return what cuts rows of an axis into tiles, `[_, S, _]` to `[_, t n, _]` or `[_, n t, _]`, zeros beyond its ends.

    Its gradient takes rows, too; JAX's own would be a scatter.
    """
    low = axis.low if axis.tiles > 1 else 0
    places = np.arange(axis.tiles)[:, None] * axis.step + np.arange(axis.rows) - low
    index = np.where((places >= 0) & (places < axis.size), places, axis.size).ravel("F" if tiles_last else "C")

    def take(rows: jax.Array, index: np.ndarray) -> jax.Array:
        if index.shape == (rows.shape[1],) and (index == np.arange(len(index))).all():
            return rows
        return jnp.take(rows, index, axis=1, mode="fill", fill_value=0)

    back = _inverse(index, axis.size)
    cut = jax.custom_vjp(lambda rows: take(rows, index))
    cut.defvjp(lambda rows: (take(rows, index), None),
               lambda _, g: (functools.reduce(jnp.add, [take(g, places) for places in back]),))
    return cut


def _inverse(index: np.ndarray, size: int) -> list[np.ndarray]:
    """Return where each of `size` rows was taken to, `[times, size]`, and beyond the end where it was taken fewer times."""
    order = np.argsort(index, kind="stable")
    order = order[index[order] < size]
    rows = index[order]
    times = np.arange(len(rows)) - np.searchsorted(rows, rows)
    places = np.full((times.max() + 1, size), len(index))
    places[times, rows] = order
    return list(places)


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Real matrices of the complex transforms; those of second axes are repeated for each frequency of the first."""

    input_1: np.ndarray
    input_2: np.ndarray
    kernel_1: np.ndarray
    kernel_2: list[np.ndarray]
    output_1: np.ndarray
    output_2: list[np.ndarray]


@functools.lru_cache
def matrices(plan: Plan) -> Matrices:
    """Return the matrices of a plan, float32: of first axes `[out, in]`, of second axes `[frequencies, out, in]`."""
    a, b = plan.first, plan.second
    forward_1, forward_2 = _fourier_matrix(a.length, 0.5)[:plan.half], _fourier_matrix(b.length)
    # Convolutions of networks are correlations: the kernel's transform is the conjugate one.
    kernel_1, kernel_2 = forward_1.conj()[:, :a.taps], forward_2.conj()[:, :b.taps]
    output_1 = 2 * forward_1[:, :a.step] / a.length  # its conjugate leads back; twice: for the other half
    back_2 = forward_2.conj().T[:b.step] / b.length
    input_1, input_2 = _of_rows(forward_1, a), _of_rows(forward_2, b)
    # Parts of X, and for each array of W: its parts, and what each real product weighs in the complex one.
    inputs: list[complex]
    products: list[tuple[list[complex], list[complex]]]
    if plan.karatsuba:
        inputs, products = [1, 1j, 1 + 1j], [([1, 1j, 1 + 1j], [1 - 1j, -1 - 1j, 1j])]
    else:
        inputs, products = [1, 1j], [([1], [1, 1j]), ([1j], [1j, -1])]
    repeat = functools.partial(_repeated, times=plan.half)
    return Matrices(
        _parts(input_1), repeat(_components(input_2, inputs)),
        _parts(kernel_1), [repeat(_components(kernel_2, parts)) for parts, _ in products],
        _parts(output_1).T.copy(), [repeat(_combine(back_2, weights)) for _, weights in products])


def _of_rows(forward: np.ndarray, axis: Axis) -> np.ndarray:
    """Return a transform's columns for the rows that a tile has: those of the only one, less its zeros."""
    return forward[:, axis.low:axis.low + axis.size] if axis.tiles == 1 else forward


def _parts(matrix: np.ndarray) -> np.ndarray:
    """Return complex `[f, s]` as real `[f p, s]`."""
    return np.stack([matrix.real, matrix.imag], 1).reshape(-1, matrix.shape[-1]).astype(np.float32)


def _fourier_matrix(length: int, shift: float = 0.0) -> np.ndarray:
    turns = np.outer(np.arange(length) + shift, np.arange(length)) % length
    return np.exp(-2j * math.pi * turns / length)


def _components(matrix: np.ndarray, parts: list[complex]) -> np.ndarray:
    """Return the matrix from (real, imaginary) columns to rows: the real part for 1, the imaginary for 1j, or their sum."""
    wide = np.concatenate([matrix, 1j * matrix], 1)
    rows = [wide.real * complex(c).real + wide.imag * complex(c).imag for c in parts]
    return np.stack(rows, 1).reshape(-1, wide.shape[1]).astype(np.float32)


def _combine(matrix: np.ndarray, weights: list[complex]) -> np.ndarray:
    """Return the matrix from real products to (real, imaginary) rows, each product weighing as given in its complex sum."""
    wide = (matrix[:, :, None] * np.array(weights)).reshape(len(matrix), -1)
    return np.concatenate([wide.real, wide.imag]).astype(np.float32)


def _repeated(matrix: np.ndarray, times: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(matrix, (times, *matrix.shape)))
