"""Read a safetensors file with suspicion: every fault is found before its bytes are used, none crashes the process.

Nothing is memory-mapped, because truncating a mapped file kills the process that maps it.
"""

import concurrent.futures
import io
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dnd_jax import files
from dnd_jax.types import InputError

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 40_000  # 128 experts x 3 matrices x 48 layers x (A, B) are 36,864
MAX_NAME = 500
PIECE_BYTES = 2**21  # still in a cache when it is checked after being read
THREADS = 2
MAX_VALUES = 12 * MAX_TENSORS  # in a header: ten for each tensor, and what people note in the metadata
MAX_BYTES = 32 * 2**30
DTYPES = {"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
          "I16": np.int16, "U16": np.uint16, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32,
          "F32": np.float32, "F64": np.float64, "I64": np.int64, "U64": np.uint64}
ITEMSIZE = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
# All exponent bits set: the smallest pattern, sign apart, that is infinite or not a number.
NOT_FINITE = {np.dtype(ml_dtypes.float8_e5m2): 0x7C, np.dtype(ml_dtypes.float8_e4m3fn): 0x7F, np.dtype(np.float16): 0x7C00,
              np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float32): 0x7F800000, np.dtype(np.float64): 0x7FF0000000000000}
INTEGERS = {1: (np.int8, np.uint8, 1 << 7), 2: (np.int16, np.uint16, 1 << 15), 4: (np.int32, np.uint32, 1 << 31),
            8: (np.int64, np.uint64, 1 << 63)}

Extent = tuple[str, tuple[int, ...], int, int]


class TensorFile:
    """An opened safetensors file whose header describes exactly its bytes: each tensor once and none empty.

    Raises InputError on opening unless that is so. `shapes` maps keys to shapes; use as a context manager.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._file = open_regular(self.path)
        try:
            self._start, self._entries = _read_header(self.path, self._file)
        except BaseException:
            self._file.close()
            raise
        self.shapes = {key: shape for key, (_, shape, _, _) in self._entries.items()}

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> dict[str, np.ndarray]:
        """Return all tensors, in their dtypes, as writable views of buffers of about PIECE_BYTES.

        Raises:
          InputError: a value that isn't finite, or a file that has shrunk since it was opened.
        """
        blocks = list(self._blocks())
        # Made here, since an allocator gives each new thread memory that was never touched.
        buffers = [np.empty(self._entries[block[-1]][3] - self._entries[block[0]][2], np.uint8) for block in blocks]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            read = {key: value for block in pool.map(self._read, blocks, buffers) for key, value in block.items()}
        return {key: read[key] for key in self._entries}

    def _blocks(self) -> Iterator[list[str]]:
        """Yield keys in order of the file, in blocks of one dtype and, but for the last tensor, of less than PIECE_BYTES."""
        block: list[str] = []
        for key in sorted(self._entries, key=lambda key: self._entries[key][2]):
            if block and (self._entries[key][0] != self._entries[block[0]][0]
                          or self._entries[key][2] - self._entries[block[0]][2] >= PIECE_BYTES):
                yield block
                block = []
            block.append(key)
        if block:
            yield block

    def _read(self, block: list[str], buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Read neighbours into one buffer, piece by piece, each checked while the processor's cache holds it."""
        dtype, _, first, _ = self._entries[block[0]]
        finite = True
        for begin in range(0, len(buffer), PIECE_BYTES):
            piece = buffer[begin : begin + PIECE_BYTES]
            if (found := os.preadv(self._file.fileno(), [piece.data], self._start + first + begin)) != len(piece):
                raise InputError(f"{self.path}: {block[0]}: {found} bytes read, the header says {len(piece)}")
            finite = finite and is_finite(piece, DTYPES[dtype])
        tensors = {}
        for key in block:
            _, shape, begin, end = self._entries[key]
            tensor = buffer[begin - first : end - first].view(DTYPES[dtype]).reshape(shape)
            tensors[key] = tensor if tensor.flags.aligned else tensor.copy()
            if not finite:
                check_finite(tensors[key], f"{self.path}: {key}")
        return tensors


def open_regular(path: pathlib.Path) -> io.FileIO:
    """Open a regular file, unbuffered; raise InputError for anything else (a pipe would wait for ever)."""
    try:
        file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"{path}: not a regular file")
    return file


def is_finite(value: np.ndarray, dtype: npt.DTypeLike) -> bool:
    """Return whether no value is infinite or not a number; integers count as finite.

    Compares bit patterns, which takes two passes and no memory: as signed integers for the positive ones, as unsigned
    ones, where the sign bit makes them the largest, for the negative.

    Args:
      value: contiguous.
      dtype: to read the bytes of `value` as.
    """
    dtype = np.dtype(dtype)
    if (limit := NOT_FINITE.get(dtype)) is None or value.size == 0:
        return True
    signed, unsigned, sign = INTEGERS[dtype.itemsize]
    flat = value.reshape(-1)
    return bool(flat.view(signed).max() < limit and flat.view(unsigned).max() < limit + sign)


def check_finite(value: np.ndarray, where: str) -> None:
    """Raise InputError, its message beginning with `where`, unless `is_finite`."""
    if not is_finite(value, value.dtype):
        raise InputError(f"{where}: holds a value that is not finite")


def check_values(text: bytes, limit: int, where: str) -> None:
    """Raise InputError at JSON text of more values than a limit: parsed, an empty list takes 20 times its room."""
    if (count := sum(map(text.count, (b",", b"[", b"{")))) > limit:
        raise InputError(f"{where}: {count} values, at most {limit}")


def _read_header(path: pathlib.Path, file: io.FileIO) -> tuple[int, dict[str, Extent]]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(f"{path}: header of {length} bytes in a file of {size}, at most {MAX_HEADER_BYTES}")
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes, at most {MAX_BYTES}")
    text = file.read(length)
    if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
        raise InputError(f"{path}: {count} tensors, at most {MAX_TENSORS}")
    check_values(text, MAX_VALUES, f"{path}: header")
    try:
        header = json.loads(text, object_pairs_hook=files.unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: header is not JSON with unique keys: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    if longest := next((key for key in header if len(key) > MAX_NAME), None):
        raise InputError(f"{path}: {longest[:80]}...: a name of {len(longest)} characters, at most {MAX_NAME}")
    entries = {key: _extent(path, key, entry) for key, entry in header.items()}
    end = 0
    for begin, stop, key in sorted((begin, stop, key) for key, (_, _, begin, stop) in entries.items()):
        if begin != end:
            raise InputError(f"{path}: {key} begins at byte {begin}, the tensor before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise InputError(f"{path}: tensors end at byte {end}, the file's data at {size - 8 - length}")
    return 8 + length, entries


def _extent(path: pathlib.Path, name: str, entry: Mapping[str, Any]) -> Extent:
    try:
        (begin, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        item = ITEMSIZE[dtype]
        numbers = (begin, stop, *shape)
        integers = {*map(type, numbers)} == {int} and min(numbers) >= 0 and max(numbers) < 1 << 48
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {name}: malformed entry {str(error)[:80]}") from error
    count = item
    for dimension in shape if integers and len(shape) <= 8 else (0,):
        count *= dimension
    if count == 0:
        raise InputError(f"{path}: {name}: shape {str(shape)[:80]} is empty or not one of an array")
    if stop - begin != count:
        raise InputError(f"{path}: {name}: bytes {begin} to {stop} do not hold {dtype} {shape}")
    return dtype, tuple(shape), begin, stop
