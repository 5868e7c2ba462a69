"""Which form a plane convolution takes: a cost model of its shapes.

The constants are nanoseconds and rates of one core of an AVX2 machine; only their ratios matter, and they hold roughly
elsewhere too. They come from trials of single convolutions (`experiments/LOG.md`, 2026-11-25), TILE_BYTES from later ones
(2026-11-27).
"""

import dataclasses
import functools

FLOPS, DIRECT_FLOPS = 55.0, 25.0  # products and XLA's direct convolution with both gradients, GFLOP/s
HALF_DIRECT = 1000  # channels in times channels out at which the direct one runs at half of that
HALF_SPEED = 12  # rows of a product at which it runs at half of that
OVERHEAD = 200_000.0  # of the many small steps of the Fourier form, ns
BYTES = 8.0  # of kernels and their spectra to and from memory, GB/s
TILE_BYTES = 2.75  # of tiles and theirs, which are transposed on the way
MEMORY = 1 << 30  # bytes of a kernel's spectrum at once


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the plane: `tiles` transforms of `length`, `step` outputs of each, zeros `low` and `high` of it that matter."""

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
        """Of a tile, less the zeros of the only one."""
        return self.length if self.tiles > 1 else self.size


@dataclasses.dataclass(frozen=True)
class Plan:
    """A Fourier form: two axes, those of the plane swapped or not, three products or four, output channels in chunks."""

    batch: int
    first: Axis
    second: Axis
    karatsuba: bool
    swapped: bool = False
    chunks: int = 1

    @property
    def half(self) -> int:
        return self.first.length // 2

    @property
    def parts(self) -> int:
        return 1 if self.karatsuba else 2

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
    return best and _chunk(best, channels, out)


def _cost(plan: Plan, channels: int, out: int) -> float:
    """Return nanoseconds of a convolution and its two gradients, each of which costs about as much."""
    a, b, half, rows = plan.first, plan.second, plan.half, plan.parts * plan.rows
    numbers = half * b.length * (3 if plan.karatsuba else 2)  # of a kernel's spectrum, per pair of channels
    products = 2 * numbers * rows * channels * out / (FLOPS * rows / (rows + HALF_SPEED))

    def transform(outer: int, inner: int, spectrum: int, first: int, second: int, times: int, rate: float) -> float:
        """Cost of matrices from `outer` numbers by `first` products each to `inner`, and by `second` each to a spectrum."""
        flops = 2 * (inner * first + spectrum * second)
        return times * (flops / FLOPS + 4 * (outer + 3 * inner + spectrum) / rate)

    tiles = 2 * half * a.tiles
    kernel = transform(a.taps * b.taps, 2 * half * b.taps, numbers, a.taps, 2 * b.taps, channels * out, BYTES)
    kernel += 8 * plan.swapped * (a.taps * b.taps) * channels * out / BYTES
    taken = (a.size + 2 * a.tiles * a.rows * (a.tiles > 1)) * b.size
    source = transform(taken, tiles * b.size, numbers * plan.rows // plan.batch, a.rows,
                       2 * b.rows, plan.batch * channels, TILE_BYTES)
    result = transform(a.size * b.size, tiles * b.size, numbers * plan.parts * plan.rows // plan.batch, a.step,
                       2 * b.step, plan.batch * out, TILE_BYTES)
    return 3 * products + 2 * (kernel + source + result) + OVERHEAD


def _chunk(plan: Plan, channels: int, out: int) -> Plan:
    """Return the plan with chunks of output channels for a kernel's spectrum to stay in a moderate memory."""
    spectrum = 4 * plan.half * plan.second.length * (3 if plan.karatsuba else 2) * channels * out
    chunks = next(n for n in range(1, out + 1) if out % n == 0 and (spectrum <= n * MEMORY or n == out))
    return dataclasses.replace(plan, chunks=chunks)
