"""A tree of LoRA matrices <-> weight tokens `[T, H, W]`: standardised tiles framed by their own mean and deviation.

Every `[r, width]` matrix (A, and B transposed) is cut along its width into tiles of one chunk width c. A tile is
standardised and laid in the top left of an `[r + 2, c + 2]` token whose last two rows and columns repeat
(mean * 8, log(std * 0.9 + 0.1) + 1.6). Source: the public implementation of arXiv 2506.16406.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax.adapters import Spec
from dnd_jax.types import InputError, TokenArray, TokenMask, Tree

MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
SMALLEST_COMMON_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix of the tree in token order: its path, rank, width (the axis that isn't the rank) and first tile."""

    path: str
    rank: int
    width: int
    first: int

    @property
    def transposed(self) -> bool:
        return self.path.endswith("lora_B")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every element of an adapter lies among its weight tokens.

    Attributes:
      chunk: width c of a tile; a matrix whose width it doesn't divide ends in a partial tile.
      rank: the largest rank r; matrices of smaller rank leave rows of their tiles empty.
      matrices: in token order: by layer, inside it q, k, v, o, up, gate, down, then others; A before B.
    """

    chunk: int
    rank: int
    matrices: tuple[Matrix, ...]

    def tiles(self, matrix: Matrix) -> int:
        return -(-matrix.width // self.chunk)

    def last_width(self, matrix: Matrix) -> int:
        """Return how many columns of a matrix's last tile are used."""
        return (matrix.width - 1) % self.chunk + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """The token block (T, H, W)."""
        last = self.matrices[-1]
        return last.first + self.tiles(last), self.rank + 2, self.chunk + 2

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        return {"chunk": self.chunk, "rank": self.rank, "matrices": [list(dataclasses.astuple(m)) for m in self.matrices]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Layout":
        """Return the layout that `to_json` described."""
        return cls(value["chunk"], value["rank"], tuple(Matrix(*m) for m in value["matrices"]))


def plan(spec: Spec, chunk: int | None = None) -> Layout:
    """Compute the layout of an adapter.

    Args:
      spec: of the adapter; ranks and widths may differ between its matrices.
      chunk: tile width. By default the greatest common divisor of all widths, as published for Qwen2.5; where that is
        below 32, the smallest width, but 128 at most.

    Raises:
      InputError: an adapter without matrices, or a tile width below 1.
    """
    if not spec.leaves:
        raise InputError("an adapter without A and B of linear layers has nothing that could be generated")
    if chunk is not None and chunk < 1:
        raise InputError(f"the tile width, config.export.chunk, is {chunk}, expected at least 1")
    sizes = {}
    for path, leaf in spec.leaves.items():
        out, width = leaf.shape
        sizes[path] = (width, out) if path.endswith("lora_B") else (out, width)
    widths = [width for _, width in sizes.values()]
    if chunk is None:
        chunk = math.gcd(*widths)
        if chunk < SMALLEST_COMMON_CHUNK:
            chunk = min(*widths, 128)
    matrices, first = [], 0
    for path in sorted(sizes, key=_order):
        rank, width = sizes[path]
        matrices.append(Matrix(path, rank, width, first))
        first += -(-width // chunk)
    return Layout(chunk, max(rank for rank, _ in sizes.values()), tuple(matrices))


def encode(tree: Tree, layout: Layout) -> tuple[TokenArray, TokenMask]:
    """Return an adapter as weight tokens, float32 `[T, H, W]`, and the mask of positions that carry a value.

    Positions that carry none, in partial tiles, are NaN as in the published code. A tile of zeros has deviation 0 and zeros
    inside. `decode` inverts up to float32 rounding of log(0.9 std + 0.1), which for a std far below 0.1 is coarse: 1e-6 is off by
    a part in a hundred, 1e-7 by up to a fifth. Matrix by matrix, so that one stays in cache.

    Raises:
      InputError: a matrix of another shape than the layout's.
    """
    flat = flatten_dict(tree, sep="/")
    for m in layout.matrices:
        expected = (m.width, m.rank) if m.transposed else (m.rank, m.width)
        if flat[m.path].shape != expected:
            raise InputError(f"{m.path} is {list(flat[m.path].shape)}, the layout expects {list(expected)}")
    mask = mask_of(layout)
    tokens = np.empty(layout.shape, np.float32)
    if not mask.all():
        tokens[~mask] = np.nan
    for m in layout.matrices:
        value = np.asarray(flat[m.path])
        tiles = _cut(value.T if m.transposed else value, layout.chunk)
        count, last = np.full((len(tiles), 1, 1), m.rank * layout.chunk, np.float32), layout.last_width(m)
        count[-1] = m.rank * last
        mean = _published_sum(tiles)[:, None, None] / count
        tiles -= mean
        tiles[-1, :, last:] = 0
        square = np.vecdot(tiles, tiles).sum(1, dtype=np.float64)[:, None, None]
        std = np.sqrt(square / np.maximum(count - 1, 1)).astype(np.float32)
        place = slice(m.first, m.first + len(tiles))
        tokens[place, : m.rank, :-2] = np.divide(tiles, np.where(std > 0, std, 1), out=tiles)
        tokens[place.stop - 1, : m.rank, last:-2] = np.nan
        pair = np.concatenate([mean * 8, np.log(std * np.float32(0.9) + np.float32(0.1)) + np.float32(1.6)], axis=2)
        tokens[place, -2:, :] = np.tile(pair, (1, 1, layout.chunk // 2 + 2))[..., : layout.chunk + 2]
        tokens[place, :, -2:] = pair
    return tokens, mask


def mask_of(layout: Layout) -> TokenMask:
    """Return where tokens `[T, H, W]` carry a value: all but the missing ranks and the ends of partial tiles."""
    mask = np.ones(layout.shape, bool)
    for m in layout.matrices:
        stop = m.first + layout.tiles(m)
        mask[m.first : stop, m.rank : -2, :-2] = False
        mask[stop - 1, :-2, layout.last_width(m) : -2] = False
    return mask


def decode(tokens: TokenArray, layout: Layout) -> Tree:
    """Return the tree of float32 matrices that tokens `[T, H, W]` stand for; copies of mean and deviation are averaged.

    Raises:
      ValueError: tokens of another shape than the layout's.
    """
    tokens = np.asarray(tokens, np.float32)
    if tokens.shape != layout.shape:
        raise ValueError(f"tokens are {list(tokens.shape)}, the layout expects {list(layout.shape)}")
    rows, columns = tokens[:, -2:, :-2], tokens[:, :, -2:]
    mean, log_std = (
        np.concatenate([rows[:, :, j::2].reshape(len(tokens), -1), columns[:, :, j]], axis=1).mean(1) for j in (0, 1)
    )
    std = (np.exp(log_std - np.float32(1.6)) - np.float32(0.1)) / np.float32(0.9)
    flat = {}
    for m in layout.matrices:
        place = slice(m.first, m.first + layout.tiles(m))
        tiles = tokens[place, : m.rank, :-2] * std[place, None, None]
        tiles += (mean[place] / 8)[:, None, None]
        value = tiles.transpose((0, 2, 1) if m.transposed else (1, 0, 2))
        shape = (-1, m.rank) if m.transposed else (m.rank, -1)
        kept = (slice(m.width), slice(None)) if m.transposed else (slice(None), slice(m.width))
        flat[m.path] = np.ascontiguousarray(value.reshape(shape)[kept])
    return unflatten_dict(flat, sep="/")


def _cut(value: np.ndarray, chunk: int) -> np.ndarray:
    """Cut `[r, width]` into contiguous float32 tiles `[n, r, chunk]`, the last one filled up with zeros."""
    rank, width = value.shape
    if width % chunk:
        value = np.pad(value, ((0, 0), (0, -width % chunk)))
    tiles = np.empty((value.shape[1] // chunk, rank, chunk), np.float32)
    tiles[:] = value.reshape(rank, -1, chunk).swapaxes(0, 1)
    return tiles


def _published_sum(tiles: np.ndarray) -> np.ndarray:
    """Sum each tile `[T, r, c]` in float32 in the order of the published code's library: 4 x 8 lanes, then rows.

    The order matters in tiles whose mean is far above their deviation: one unit in the last place of the mean moves
    every standardised element by 2e-5 there.
    """
    count, rank, chunk = tiles.shape
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, -chunk % 32))) if chunk % 32 else tiles
    lanes = padded.reshape(count, rank, -1, 4, 8)
    rows = lanes.sum(2).sum(2).cumsum(2)[..., -1]
    return rows.cumsum(1)[:, -1]


def _order(path: str) -> tuple[Any, ...]:
    """Sort key of a matrix: layer stack and number, then the module's place in MODULE_ORDER, then A before B."""
    *modules, side = path.split("/")
    layer = next((i for i, name in enumerate(modules) if name.isdigit()), None)
    if layer is None:
        return (1, "", 0, len(MODULE_ORDER), path)
    rest = "/".join(modules[layer + 1 :])
    place = MODULE_ORDER.index(modules[-1]) if modules[-1] in MODULE_ORDER else len(MODULE_ORDER)
    return (0, "/".join(modules[:layer]), int(modules[layer]), place, _natural(rest), side)


def _natural(text: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text)]
