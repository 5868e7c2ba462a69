"""Files that are complete under their final name, or absent; JSON, lines and hashes."""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors import SafetensorError

from dnd_jax.types import InputError

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def named(path: PathLike) -> Iterator[None]:
    """Turn a failed write, as on a full disk, into an OSError that names `path`, which the operating system does not."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: not written: {error}") from error
    except OSError as error:
        if error.filename is not None or str(path) in str(error):
            raise
        raise OSError(f"{path}: not written: {error.strerror or error}") from error


def temporary_name(final: pathlib.Path, kind: str = "tmp") -> pathlib.Path:
    """Return a name that no other writer uses: containers may share a host's name and processes' numbers, so it is drawn."""
    return final.with_name(f".{final.name}.{kind}-{socket.gethostname()}-{secrets.randbelow(10**18)}")


@contextlib.contextmanager
def atomic_file(final: PathLike) -> Iterator[pathlib.Path]:
    """Yield a path beside `final`; what is written there takes that name when the block ends without error."""
    final = pathlib.Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(final)
    try:
        with named(final):
            yield temporary
            sync(temporary)
        os.rename(temporary, final)
        sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy(source: PathLike, target: PathLike) -> None:
    """Copy a file to `target` atomically."""
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: PathLike, value: Any) -> None:
    """Write strict JSON (no NaN) to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: PathLike) -> Any:
    """Read JSON; raise InputError that names the file when it is missing, unreadable or malformed, as with a key twice."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON pairs; raise ValueError at a key that occurs twice (for `object_pairs_hook`)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} occurs twice")
    return found


def read_lines(path: PathLike) -> list[str]:
    """Return a text file's lines, which only \\n, \\r and \\r\\n end, unlike in `str.splitlines`.

    Raises:
      InputError: it can't be read.
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def sha256_file(path: PathLike) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_files(paths: Iterable[pathlib.Path]) -> str:
    """Return one hexadecimal SHA-256 over names and bytes of files, in their order."""
    return sha256_text("".join(f"{path.name}\0{sha256_file(path)}\n" for path in paths))


def sync(path: PathLike) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
