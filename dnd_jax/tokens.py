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
from dnd_jax.types import TokenArray, TokenMask, Tree

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
    """
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

    Positions that carry none, in partial tiles, are NaN as in the published code. A tile of equal values has deviation
    0 and zeros inside. `decode` inverts up to float32 rounding.
    """
    flat = flatten_dict(tree, sep="/")
    inside = _tile_mask(layout)
    tiles = np.zeros(inside.shape, np.float32)
    for m in layout.matrices:
        value = np.asarray(flat[m.path])
        tiles[_place(m, layout)] = _cut(value.T if m.transposed else value, layout.chunk)
    mean, std = _moments(tiles, inside)
    tokens = np.full(layout.shape, np.nan, np.float32)
    standardised = (tiles - mean) / np.where(std > 0, std, 1)
    tokens[:, :-2, :-2] = standardised if inside.all() else np.where(inside, standardised, np.nan)
    pair = np.concatenate([mean * 8, np.log(std * np.float32(0.9) + np.float32(0.1)) + np.float32(1.6)], axis=2)
    tokens[:, -2:, :] = np.tile(pair, (1, 1, layout.chunk // 2 + 2))[..., : layout.chunk + 2]
    tokens[:, :, -2:] = pair
    return tokens, ~np.isnan(tokens)


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
    tiles = tokens[:, :-2, :-2] * std[:, None, None] + (mean / 8)[:, None, None]
    flat = {}
    for m in layout.matrices:
        value = tiles[_place(m, layout)].swapaxes(0, 1).reshape(m.rank, -1)[:, : m.width]
        flat[m.path] = np.ascontiguousarray(value.T if m.transposed else value)
    return unflatten_dict(flat, sep="/")


def _cut(value: np.ndarray, chunk: int) -> np.ndarray:
    """Cut `[r, width]` into tiles `[n, r, chunk]`, the last one filled up with zeros."""
    rank, width = value.shape
    value = np.pad(value, ((0, 0), (0, -width % chunk)))
    return value.reshape(rank, -1, chunk).swapaxes(0, 1)


def _place(matrix: Matrix, layout: Layout) -> tuple[slice, slice]:
    return slice(matrix.first, matrix.first + layout.tiles(matrix)), slice(matrix.rank)


def _tile_mask(layout: Layout) -> np.ndarray:
    """Return where tiles `[T, r, c]` carry a matrix element."""
    count, height, width = layout.shape
    inside = np.zeros((count, height - 2, width - 2), bool)
    for m in layout.matrices:
        inside[_place(m, layout)] = _cut(np.ones((m.rank, m.width), bool), layout.chunk)
    return inside


def _moments(tiles: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and unbiased standard deviation of each tile's elements, `[T, 1, 1]`; tiles are zero outside."""
    count = inside.sum((1, 2), keepdims=True, dtype=np.float32)
    mean = _published_sum(tiles)[:, None, None] / count
    square = np.square(tiles - mean).sum((1, 2), keepdims=True, dtype=np.float64, where=inside)
    return mean, np.sqrt(square / np.maximum(count - 1, 1)).astype(np.float32)


def _published_sum(tiles: np.ndarray) -> np.ndarray:
    """Sum each tile `[T, r, c]` in float32 in the order of the published code's library: 4 x 8 lanes, then rows.

    The order matters in tiles whose mean is far above their deviation: one unit in the last place of the mean moves
    every standardised element by 2e-5 there.
    """
    count, rank, chunk = tiles.shape
    lanes = np.pad(tiles, ((0, 0), (0, 0), (0, -chunk % 32))).reshape(count, rank, -1, 4, 8)
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
