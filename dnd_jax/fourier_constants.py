"""Constants of a Fourier form: the index maps between a plane and its tiles, and the real matrices of the complex transforms."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.fourier_plan import Plan


@dataclasses.dataclass(frozen=True)
class Moves:
    """From a plane's positions, as rows of an array, to the inputs of tiles in the order n1 n2 t2 t1, and from outputs back."""

    cut: Callable[[jax.Array], jax.Array]
    join: Callable[[jax.Array], jax.Array]


@functools.lru_cache
def moves(plan: Plan) -> Moves:
    """Return the moves of a plan: `cut` takes `[S1 S2, N]` to `[n1 n2 t2 t1, N]`, `join` `[m1 m2 t2 t1, N]` to `[S1 S2, N]`."""
    a, b = plan.first, plan.second

    def positions(length_1: int, length_2: int, low_1: int, low_2: int) -> np.ndarray:
        first = np.arange(a.tiles) * a.step + np.arange(length_1)[:, None, None, None] - low_1
        second = np.arange(b.tiles)[:, None] * b.step + np.arange(length_2)[:, None, None] - low_2
        inside = (first >= 0) & (first < a.size) & (second >= 0) & (second < b.size)
        return np.where(inside, first * b.size + second, a.size * b.size).ravel()

    cut, join = positions(a.length, b.length, a.low, b.low), positions(a.step, b.step, 0, 0)
    (back,) = _inverse(join, a.size * b.size)
    return Moves(_mover(cut, _inverse(cut, a.size * b.size)), _mover(back, [join]))


def _inverse(index: np.ndarray, size: int) -> list[np.ndarray]:
    """Return where each of `size` rows was taken to, `[times, size]`, and beyond the end where it was taken fewer times."""
    order = np.argsort(index, kind="stable")
    order = order[index[order] < size]
    rows = index[order]
    times = np.arange(len(rows)) - np.searchsorted(rows, rows)
    places = np.full((times.max() + 1, size), len(index))
    places[times, rows] = order
    return list(places)


def _mover(index: np.ndarray, back: list[np.ndarray]) -> Callable[[jax.Array], jax.Array]:
    """Return a function that takes rows, zeros for those beyond the end; its gradient takes rows too, where JAX would scatter."""
    def take(rows: jax.Array, index: np.ndarray) -> jax.Array:
        return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)

    move = jax.custom_vjp(lambda rows: take(rows, index))
    move.defvjp(lambda rows: (take(rows, index), None),
                lambda _, g: (functools.reduce(jnp.add, [take(g, places) for places in back]),))
    return move


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Real matrices of the complex transforms; those of second axes are repeated for each frequency of the first."""

    input_1: np.ndarray
    input_2: np.ndarray
    kernel_1: np.ndarray
    kernel_2: np.ndarray
    output_1: np.ndarray
    output_2: np.ndarray


@functools.lru_cache
def matrices(plan: Plan) -> Matrices:
    """Return the matrices of a plan, float32: of first axes `[out, in]`, of second axes `[frequencies, out, in]`."""
    a, b = plan.first, plan.second
    forward_1, forward_2 = _fourier_matrix(a.length, -1, 0.5)[:plan.half], _fourier_matrix(b.length, -1)
    # Convolutions of networks are correlations: the kernel's transform is the conjugate one.
    kernel_1, kernel_2 = forward_1.conj()[:, :a.taps], forward_2.conj()[:, :b.taps]
    back_1 = 2 * _fourier_matrix(a.length, -1, 0.5)[:plan.half, :a.step].conj().T / a.length  # twice: for the other half
    back_2 = _fourier_matrix(b.length, 1)[:b.step] / b.length
    # Parts of X, of W, and what each real product Y weighs in the complex one.
    inputs: tuple[complex, ...]
    kernels: tuple[complex, ...]
    weights: tuple[complex, ...]
    if plan.karatsuba:
        inputs, kernels, weights = (1, 1j, 1 + 1j), (1, 1j, 1 + 1j), (1 - 1j, -1 - 1j, 1j)
    else:
        inputs = (1, 1j, -1j, 1) if plan.rows_last else (1, -1j, 1j, 1)
        kernels, weights = (1, 1j), (1, 1j)
    repeat = functools.partial(_repeated, times=plan.half)
    return Matrices(
        _stack([forward_1.real, forward_1.imag]), repeat(_components(forward_2, inputs)),
        _stack([kernel_1.real, kernel_1.imag]), repeat(_components(kernel_2, kernels)),
        _stack([back_1.real.T, -back_1.imag.T]).T.copy(), repeat(_combine(back_2, weights)))


def _fourier_matrix(length: int, sign: int, shift: float = 0.0) -> np.ndarray:
    turns = np.outer(np.arange(length) + shift, np.arange(length)) % length
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
