"""Writing without halves: a file or folder is complete under its final name, or absent."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors import SafetensorError

from dnd_jax.types import InputError

PathLike = str | os.PathLike[str]
NEW_S = 60  # seconds in which a temporary folder is left alone
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_LOCKED: set[pathlib.Path] = set()  # by this process


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


@contextlib.contextmanager
def atomic_folder(final: PathLike, marker: str) -> Iterator[pathlib.Path]:
    """Yield a new folder that takes the name `final` when the block ends without error.

    Args:
      final: replaced, if it is an empty folder or one that was written by us.
      marker: a file that every folder of this kind holds.

    Raises:
      InputError: something else has that name.
    """
    check_ours(final, marker)
    with temporary_folder(final) as temporary:
        yield temporary
        publish(temporary, final)


def check_ours(final: PathLike, marker: str) -> None:
    """Raise InputError if a name is taken by a file, or a folder with something in it but not with the file `marker`."""
    path = pathlib.Path(final)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / marker).exists()):
        raise InputError(f"{path}: is there and would be replaced, but holds no {marker} as what is written here does; move it "
                         "away, or choose another name")


@contextlib.contextmanager
def temporary_folder(final: PathLike) -> Iterator[pathlib.Path]:
    """Yield a new folder beside `final`; what is still there when the block ends is removed, after a kill by this host's next."""
    final = pathlib.Path(final)
    temporary = _temporary(final)
    of_host = re.compile(re.escape(temporary.name.rpartition("-")[0]) + r"-\d+")
    for path in final.parent.glob(".*"):
        if of_host.fullmatch(path.name) and _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with named(final):
            yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(final: pathlib.Path, kind: str = "tmp") -> pathlib.Path:
    """Return a name that no other process uses, of hosts with different names."""
    return final.with_name(f".{final.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def _abandoned(folder: pathlib.Path) -> bool:
    """Tell whether the process of a temporary folder is gone, and with it the lock; a new folder may have none yet."""
    try:
        if time.time() - folder.stat().st_mtime < NEW_S:
            return False
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def publish(temporary: pathlib.Path, final: PathLike) -> None:
    """Rename a complete folder to its final name, after its files are on disk, replacing at once what has that name."""
    final = pathlib.Path(final)
    _sync_all(temporary)
    if os.path.lexists(final):
        _exchange(temporary, final)
        if temporary.is_symlink() or temporary.is_file():
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        os.rename(temporary, final)
    sync(final.parent)


def publish_new(temporary: pathlib.Path, final: PathLike) -> None:
    """Rename a complete folder to its final name, unless a folder has that name already, which is then left as it is."""
    final = pathlib.Path(final)
    _sync_all(temporary)
    try:
        os.rename(temporary, final)
    except OSError as error:  # an empty folder would be replaced
        if not (error.errno in (errno.EEXIST, errno.ENOTEMPTY) and final.is_dir()):
            raise
    sync(final.parent)


def _sync_all(folder: pathlib.Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def _exchange(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Let two paths change names at once, or where the system has no call for that, one after the other."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(final), _RENAME_EXCHANGE) == 0:
        return
    old = _temporary(final, "old")
    os.rename(final, old)
    os.rename(temporary, final)
    os.rename(old, temporary)
    for path in final.parent.glob(f"{glob.escape(f'.{final.name}.old')}-*"):  # of writers killed in between
        shutil.rmtree(path, ignore_errors=True)


def check_link(name: PathLike) -> pathlib.Path:
    """Return a path that `link` can make a link; raise InputError if something else has that name."""
    path = pathlib.Path(name)
    if path.exists() and not path.is_symlink():
        raise InputError(f"{path}: is there and not a link; move it away")
    return path


def link(name: PathLike, target: pathlib.Path) -> None:
    """Make `name` a relative symbolic link to `target`, replacing a link of that name at once."""
    path = check_link(name)
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)
    os.replace(temporary, path)
    sync(path.parent)


def lock(folder: PathLike) -> None:
    """Make a folder this process's own until it ends, however it ends; raise InputError if it is another process's.

    Locks are the operating system's, so that none outlives its process. Some network file systems have none across hosts, or
    none at all, which standard error then says.
    """
    folder = pathlib.Path(folder).resolve()
    if folder in _LOCKED:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace")
        os.close(descriptor)
        raise InputError(f"{folder}: is in use by {owner or 'another process'}") from error
    except OSError as error:
        print(f"warning: {folder}: this file system has no locks ({error.strerror}), so see to it that no other run writes there",
              file=sys.stderr, flush=True)
    _LOCKED.add(folder)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


@contextlib.contextmanager
def atomic_file(final: PathLike) -> Iterator[pathlib.Path]:
    """Yield a path beside `final`; what is written there takes that name when the block ends without error."""
    final = pathlib.Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
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
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} occurs twice")
    return found


def read_lines(path: PathLike) -> list[str]:
    """Read the lines of a text, which end in line feeds and nothing else that Unicode knows; raise InputError if it can't."""
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
