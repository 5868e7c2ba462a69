"""Which form a plane convolution takes: a cost model of its shapes.

The constants are nanoseconds and rates of one core of an AVX2 machine; only their ratios matter, and they hold roughly
elsewhere too. They come from trials of single convolutions (`experiments/LOG.md`, 2026-11-25), TINY, SLOWDOWN and TILE_BANDWIDTH
from later ones (2026-11-27).
"""

import dataclasses
import functools

FLOPS, DIRECT_FLOPS = 55.0, 25.0  # GFLOP/s of a matrix product; of XLA's direct convolution with both gradients
HALF_DIRECT = 1000  # channels in times channels out at which the direct convolution reaches half of DIRECT_FLOPS
HALF_SPEED = 12  # rows at which a matrix product reaches half of FLOPS
TINY, SLOWDOWN = 8, 20  # a product with all three sizes below that takes about so many times as long: XLA has other code for it
OVERHEAD = 200_000.0  # of the many small steps of the Fourier form, ns
BANDWIDTH = 8.0  # GB/s of kernels and their spectra to and from memory
TILE_BANDWIDTH = 2.1  # GB/s of tiles and their spectra, which are cut and transposed on the way
MEMORY = 1 << 30  # bytes of a kernel's spectrum at once
CACHE = 8 << 20  # bytes of a kernel's transform, after one axis and after both, that stay in a cache until they are used


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the plane, cut into overlapping tiles.

    Attributes:
      size: positions of the axis.
      low: zeros before the first position that some output reads; `high` after the last.
      tiles: number of tiles, each transformed at `length` points, which give `step` outputs.
    """

    size: int
    low: int
    high: int
    tiles: int
    step: int
    length: int

    @property
    def taps(self) -> int:
        return self.low + self.high + 1

    @property
    def rows(self) -> int:
        """Input rows of a tile; a single tile holds the `size` rows only, without zeros."""
        return self.length if self.tiles > 1 else self.size


@dataclasses.dataclass(frozen=True)
class Plan:
    """A Fourier form: two axes, those of the plane swapped or not, three products or four, output channels in chunks, the first
    axis' frequencies in bands."""

    batch: int
    first: Axis
    second: Axis
    karatsuba: bool
    swapped: bool = False
    chunks: int = 1
    bands: int = 1

    @property
    def half(self) -> int:
        return self.first.length // 2

    @property
    def parts(self) -> int:
        """Arrays of a kernel's spectrum, and parts of X that each is multiplied by."""
        return 1 if self.karatsuba else 2

    @property
    def spectrum(self) -> int:
        """Numbers of a kernel's spectrum, for each pair of channels."""
        return self.half * self.second.length * (3 if self.karatsuba else 2)

    @property
    def rows(self) -> int:
        return self.batch * self.first.tiles * self.second.tiles


def axes(size: int, taps: int, even: bool = False) -> list[Axis]:
    """Return the ways to cut an axis of one convolution, into tiles of even length if need be."""
    low = min((taps - 1) // 2, size - 1)
    high = min(taps - 1 - (taps - 1) // 2, size - 1)
    found = {}
    for tiles in range(1, size + 1):
        step = -(-size // tiles)
        tiles = -(-size // step)
        length = size + max(low, high) if tiles == 1 else step + low + high
        length += even and length % 2
        found[tiles] = Axis(size, low, high, tiles, step, length)
    return [axis for axis in found.values() if axis.length <= 64]


@functools.lru_cache(maxsize=1024)
def make_plan(batch: int, size_1: int, size_2: int, channels: int, out: int, taps: int,
              orders: tuple[bool, ...] = (False, True)) -> Plan | None:
    """Return the cheapest Fourier form of a convolution, its axes in one of the orders, or None where the direct is cheaper."""
    best, best_cost = None, 3 * 2 * batch * size_1 * size_2 * taps**2 * (channels * out + HALF_DIRECT) / DIRECT_FLOPS
    for swapped in orders:
        size_a, size_b = (size_2, size_1) if swapped else (size_1, size_2)
        for first in axes(size_a, taps, even=True):
            for second in axes(size_b, taps):
                for karatsuba in (False, True):
                    plan = Plan(batch, first, second, karatsuba, swapped)
                    if (cost := _cost(plan, channels, out)) < best_cost:
                        best, best_cost = plan, cost
    return best and _divide(best, channels, out)


def _cost(plan: Plan, channels: int, out: int) -> float:
    """Return nanoseconds of a convolution and its two gradients, each of which costs about as much."""
    rows = plan.parts * plan.rows
    products = 2 * plan.spectrum * rows * channels * out / (FLOPS * rows / (rows + HALF_SPEED))
    products *= SLOWDOWN if max(rows, channels, out) < TINY else 1
    transforms = _kernel_cost(plan) * channels * out + plan.batch * (_input_cost(plan) * channels + _output_cost(plan) * out)
    return 3 * products + 2 * transforms + OVERHEAD


def _kernel_cost(plan: Plan) -> float:
    """Return nanoseconds of one pair of channels: transformed along the first axis, then along the second."""
    a, b = plan.first, plan.second
    half = 2 * plan.half * b.taps
    numbers = a.taps * b.taps * (3 if plan.swapped else 1) + 3 * half + plan.spectrum  # swapped axes are read and written before
    return 2 * (half * a.taps + plan.spectrum * 2 * b.taps) / FLOPS + 4 * numbers / BANDWIDTH


def _input_cost(plan: Plan) -> float:
    """Return nanoseconds of one channel of an example: cut, transformed along the first axis, cut again, and transformed."""
    a, b = plan.first, plan.second
    half, spectra = 2 * plan.half * a.tiles * b.size, plan.spectrum * a.tiles * b.tiles
    numbers = a.tiles * a.rows * b.size + half + 2 * plan.half * a.tiles * b.tiles * b.rows + spectra
    return 2 * (half * a.rows + spectra * 2 * b.rows) / FLOPS + 4 * numbers / TILE_BANDWIDTH


def _output_cost(plan: Plan) -> float:
    """Return nanoseconds of one channel of an example: back along the second axis, for each array of the kernel's, then along the
    first axis their sum."""
    a, b = plan.first, plan.second
    half, spectra = 2 * plan.half * a.tiles * b.tiles * b.step, plan.parts * plan.spectrum * a.tiles * b.tiles
    numbers = spectra + (1 + plan.parts) * half + a.size * b.size
    return 2 * (spectra * 2 * b.step + half * a.step) / FLOPS + 4 * numbers / TILE_BANDWIDTH


def _divide(plan: Plan, channels: int, out: int) -> Plan:
    """Return the plan with chunks of output channels for a kernel's spectrum to stay in a moderate memory, and with bands of
    frequencies for its transform to stay in a cache, if that of one frequency does."""
    spectrum = 4 * plan.spectrum * channels * out
    transform = spectrum + 4 * 2 * plan.half * plan.second.taps * channels * out
    chunks = next(n for n in range(1, out + 1) if out % n == 0 and (spectrum <= n * MEMORY or n == out))
    bands = -(-transform // CACHE) if transform <= plan.half * CACHE else 1
    return dataclasses.replace(plan, chunks=chunks, bands=bands)
