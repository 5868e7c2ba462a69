"""Folders that are complete under their final name, or absent; links and locks."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator

from dnd_jax import files
from dnd_jax.types import InputError

NEW_S = 60  # seconds in which a temporary folder is left alone
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_LOCKED: set[pathlib.Path] = set()  # by this process


@contextlib.contextmanager
def atomic_folder(final: files.PathLike, marker: str, names: str = ".*") -> Iterator[pathlib.Path]:
    """Yield a new folder that takes the name `final` when the block ends without error.

    Args:
      final: replaced, if it is an empty folder or one that was written by us.
      marker: a file that every folder of this kind holds.
      names: a pattern of what else it may hold.

    Raises:
      InputError: something else has that name, or the folder holds something else.
    """
    check_ours(final, marker, names)
    with temporary_folder(final) as temporary:
        yield temporary
        publish(temporary, final)


def check_ours(final: files.PathLike, marker: str, names: str = ".*") -> None:
    """Raise InputError if a name is taken by a file, or by a folder with something in it that isn't ours, see `atomic_folder`."""
    path = pathlib.Path(final)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / marker).exists()):
        raise InputError(f"{path}: is there and would be replaced, but holds no {marker} as what is written here does; move it "
                         "away, or choose another name")
    if strange := [p.name for p in sorted(path.glob("*")) if p.name != marker and not re.fullmatch(names, p.name)]:
        raise InputError(f"{path}: is there and would be replaced, but holds {strange[0]}, which isn't written here; move it "
                         "away, or choose another name")


@contextlib.contextmanager
def temporary_folder(final: files.PathLike) -> Iterator[pathlib.Path]:
    """Yield a new folder beside `final`, removed if it is still there when the block ends; after a kill, by this host's next."""
    final = pathlib.Path(final)
    temporary = files.temporary_name(final)
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
        with files.named(final):
            yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


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


def publish(temporary: pathlib.Path, final: files.PathLike) -> None:
    """Rename a complete folder to its final name, after its files are on disk, atomically replacing what has that name."""
    final = pathlib.Path(final)
    sync_all(temporary)
    if os.path.lexists(final):
        _exchange(temporary, final)
        if temporary.is_symlink() or temporary.is_file():
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        os.rename(temporary, final)
    files.sync(final.parent)


def publish_new(temporary: pathlib.Path, final: files.PathLike) -> None:
    """Rename a complete folder to its final name, unless a folder has that name already, which is then left as it is."""
    final = pathlib.Path(final)
    sync_all(temporary)
    try:
        os.rename(temporary, final)
    except OSError as error:  # an empty folder would be replaced
        if not (error.errno in (errno.EEXIST, errno.ENOTEMPTY) and final.is_dir()):
            raise
    files.sync(final.parent)


def sync_all(folder: pathlib.Path) -> None:
    """See to it that a folder and everything below it is on disk, whatever happens to the power."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            files.sync(path)


def _exchange(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Swap two names atomically, or one after the other where the system has no call for that."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(final), _RENAME_EXCHANGE) == 0:
        return
    old = files.temporary_name(final, "old")
    os.rename(final, old)
    os.rename(temporary, final)
    os.rename(old, temporary)
    for path in final.parent.glob(f"{glob.escape(f'.{final.name}.old')}-*"):  # of writers killed in between
        shutil.rmtree(path, ignore_errors=True)


def check_link(name: files.PathLike) -> pathlib.Path:
    """Return a path that `link` can make a link; raise InputError if something else has that name."""
    path = pathlib.Path(name)
    if path.exists() and not path.is_symlink():
        raise InputError(f"{path}: is there and not a link, which is to be made there; give another name, as {path}/new, or "
                         "move it away")
    return path


def link(name: files.PathLike, target: pathlib.Path) -> None:
    """Make `name` a relative symbolic link to `target`, atomically replacing a link of that name."""
    path = check_link(name)
    temporary = files.temporary_name(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)
    os.replace(temporary, path)
    files.sync(path.parent)


def lock(folder: files.PathLike) -> None:
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
    with contextlib.suppress(OSError):  # a full disk; the owner's name is for messages only
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
