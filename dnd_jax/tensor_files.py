"""Check a safetensors file before a library maps it: the faults that libraries accept, or answer with a crash."""

import json
import os
import pathlib
from typing import Any

from dnd_jax.types import InputError

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65_536
ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
             "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless the header describes exactly the bytes of the file, each tensor once and none empty."""
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(f"{path}: header of {length} bytes in a file of {size}, at most {MAX_HEADER_BYTES}")
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: header is not JSON with unique keys: {error}") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path}: header is a {type(entries).__name__}, expected an object")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise InputError(f"{path}: {len(entries)} tensors, at most {MAX_TENSORS}")
    end = 0
    for name, begin, stop in sorted(((k, *_extent(path, k, v)) for k, v in entries.items()), key=lambda e: e[1]):
        if begin != end:
            raise InputError(f"{path}: {name} begins at byte {begin}, the tensor before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise InputError(f"{path}: tensors end at byte {end}, the file's data at {size - 8 - length}")


def _extent(path: pathlib.Path, name: str, entry: Any) -> tuple[int, int]:
    try:
        (begin, stop), shape, bits = entry["data_offsets"], entry["shape"], ITEM_BITS[entry["dtype"]]
        count = 1
        for dimension in shape:
            count *= dimension
        integers = all(type(x) is int and x >= 0 for x in (begin, stop, *shape))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {name}: malformed entry {str(entry)[:80]}") from error
    if not integers or stop - begin != count * bits // 8:
        raise InputError(f"{path}: {name}: bytes {begin} to {stop} do not hold {entry['dtype']} {shape}")
    if count == 0:
        raise InputError(f"{path}: {name}: shape {shape} has no elements")
    return begin, stop


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found
