"""Which form a plane convolution takes: a cost model of its shapes.

The constants are nanoseconds and rates of one core of an AVX2 machine; only their ratios matter, and they hold roughly
elsewhere too. They come from trials of single convolutions (`experiments/LOG.md`, 2026-11-25).
"""

import dataclasses
import functools

FLOPS, DIRECT_FLOPS = 55.0, 25.0  # products and XLA's direct convolution with both gradients, GFLOP/s
HALF_DIRECT = 1000  # channels in times channels out at which the direct one runs at half of that
HALF_SPEED = 12  # rows of a product at which it runs at half of that
OVERHEAD = 200_000.0  # of the many small steps of the Fourier form, ns
BYTES = 8.0  # to and from memory, GB/s
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A Fourier form: two axes, three products or four, output channels in chunks, X with its channels last or its rows."""

    batch: int
    first: Axis
    second: Axis
    karatsuba: bool
    chunks: int = 1
    rows_last: bool = False

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
def make_plan(batch: int, size_1: int, size_2: int, channels: int, out: int, taps: int) -> Plan | None:
    """Return the cheapest Fourier form of a convolution, or None where the direct one is cheaper."""
    best, best_cost = None, 3 * 2 * batch * size_1 * size_2 * taps**2 * (channels * out + HALF_DIRECT) / DIRECT_FLOPS
    for first in axes(size_1, taps, even=True):
        for second in axes(size_2, taps):
            for karatsuba in (False, True):
                plan = Plan(batch, first, second, karatsuba)
                if (cost := _cost(plan, channels, out)) < best_cost:
                    best, best_cost = plan, cost
    return best and _chunk(best, channels, out)


def _cost(plan: Plan, channels: int, out: int) -> float:
    """Return nanoseconds of a convolution and its two gradients, each of which costs about as much."""
    a, b, half = plan.first, plan.second, plan.half
    rows, parts = plan.parts * plan.rows, plan.parts
    frequencies = half * b.length * (3 if plan.karatsuba else 1)
    products = 2 * frequencies * rows * parts * channels * out / (FLOPS * rows / (rows + HALF_SPEED))

    def transform(length_1: int, length_2: int, times: int, parts: int) -> float:
        flops = 2 * times * (2 * half * length_1 * length_2 + frequencies * parts * 2 * length_2)
        traffic = 4 * times * (length_1 * length_2 + 4 * half * length_2 + 2 * frequencies * parts)
        return flops / FLOPS + traffic / BYTES

    kernel = transform(a.taps, b.taps, channels * out, parts)
    source = transform(a.length, b.length, plan.rows * channels, parts**2)
    result = transform(a.step, b.step, plan.rows * out, parts)
    return 3 * products + 2 * (kernel + source + result) + OVERHEAD


def _chunk(plan: Plan, channels: int, out: int) -> Plan:
    """Return the plan with chunks of output channels for a kernel's spectrum to stay in a moderate memory."""
    spectrum = 4 * plan.half * plan.second.length * (3 if plan.karatsuba else 2) * channels * out
    chunks = next(n for n in range(1, out + 1) if out % n == 0 and (spectrum <= n * MEMORY or n == out))
    return dataclasses.replace(plan, chunks=chunks)
