"""Which form a plane convolution takes: a cost model of its shapes.

The constants are nanoseconds and rates of one core of an AVX2 machine; only their ratios matter, and they hold roughly
elsewhere too, but for the size of a chunk. They come from trials of single convolutions (`experiments/LOG.md`, 2026-11-25).
"""

import dataclasses
import functools
import math

FLOPS, DIRECT_FLOPS = 55.0, 25.0  # products and XLA's direct convolution with both gradients, GFLOP/s
HALF_SPEED = 12  # rows of a product at which it runs at half of that
OVERHEAD = 300_000.0  # of the many small steps of the Fourier form, ns
BYTES = 8.0  # to and from memory, GB/s
CACHE, MEMORY = 8 << 20, 1 << 30  # bytes of a kernel's spectrum at once: on a CPU, what is near by when it is used; elsewhere
LEAST_CHANNELS = 32  # of a chunk


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
    """A Fourier form: two axes, three products or four, and output channels in `chunks` of `chunk`."""

    batch: int
    first: Axis
    second: Axis
    karatsuba: bool
    out: int
    chunks: int
    chunk: int

    @property
    def half(self) -> int:
        return self.first.length // 2 + 1

    @property
    def frequencies(self) -> int:
        return self.half * self.second.length * (3 if self.karatsuba else 1)


def axes(size: int, taps: int) -> list[Axis]:
    """Return the ways to cut an axis of one convolution."""
    low = min((taps - 1) // 2, size - 1)
    high = min(taps - 1 - (taps - 1) // 2, size - 1)
    found = {}
    for tiles in range(1, size + 1):
        step = -(-size // tiles)
        tiles = -(-size // step)
        length = size + max(low, high) if tiles == 1 else step + low + high
        found[tiles] = Axis(size, low, high, tiles, step, length)
    return [axis for axis in found.values() if axis.length <= 64]


@functools.lru_cache(maxsize=1024)
def make_plan(batch: int, size_1: int, size_2: int, channels: int, out: int, taps: int, backend: str) -> Plan | None:
    """Return the cheapest Fourier form of a convolution, or None where the direct one is cheaper."""
    best, best_cost = None, 3 * 2 * batch * size_1 * size_2 * channels * out * taps**2 / DIRECT_FLOPS
    for first in axes(size_1, taps):
        for second in axes(size_2, taps):
            for karatsuba in (False, True):
                plan = Plan(batch, first, second, karatsuba, out, 1, out)
                if (cost := _cost(plan, channels)) < best_cost:
                    best, best_cost = plan, cost
    return best and _chunk(best, channels, backend)


def _cost(plan: Plan, channels: int) -> float:
    """Return nanoseconds of a convolution and its two gradients, each of which costs about as much."""
    a, b, half = plan.first, plan.second, plan.half
    tiles, out = plan.batch * a.tiles * b.tiles, plan.out
    parts = 3 if plan.karatsuba else 2
    rows = tiles if plan.karatsuba else 2 * tiles
    spectrum = half * b.length * parts  # numbers for each channel
    multiplications = half * b.length * (3 if plan.karatsuba else 4) * tiles * channels * out
    products = 2 * multiplications / (FLOPS * rows / (rows + HALF_SPEED))

    def transform(length_1: int, length_2: int, times: int, numbers: int) -> float:
        flops = 2 * times * (2 * half * length_1 * length_2 + numbers * 2 * length_2)
        traffic = 4 * times * (length_1 * length_2 + 4 * half * length_2 + 2 * numbers)
        return flops / FLOPS + traffic / BYTES

    kernel = transform(a.taps, b.taps, channels * out, spectrum)
    source = transform(a.length, b.length, tiles * channels, spectrum)
    result = transform(a.step, b.step, tiles * out, spectrum if plan.karatsuba else 2 * spectrum)
    return 3 * products + 2 * (kernel + source + result) + OVERHEAD


def _chunk(plan: Plan, channels: int, backend: str) -> Plan:
    """Return the plan with output channels in chunks whose spectra stay in a cache (CPU) or in moderate memory."""
    numbers = plan.half * plan.second.length * (3 if plan.karatsuba else 2)
    least = max(math.ceil(4 * numbers * channels * plan.out / (CACHE if backend == "cpu" else MEMORY)), 1)
    least = min(least, max(plan.out // LEAST_CHANNELS, 1))
    chunks = min(range(least, 2 * least + 1), key=lambda n: (n * -(-plan.out // n), n))
    return dataclasses.replace(plan, chunks=chunks, chunk=-(-plan.out // chunks))
