"""A process gives up writing outside one folder, the network, other processes and its privileges. Standard library only.

Two ways to keep writes inside, the first that the kernel has: *landlock* (Linux 6.2 or newer, without privileges), by which only
the folder and Python's own libraries can be read either; *mounts* (a mount namespace, for users who aren't root inside a user
namespace), by which all is mounted read-only but the folder, and /proc, /dev, /run and /sys are hidden. The rest is seccomp's,
which both need.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys

from dnd_jax.jail import syscalls

KINDS = ("landlock", "mounts")
LIBRARIES = (f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache",
             "/etc/localtime", "/usr/share/zoneinfo")
HIDDEN = ("/proc", "/dev", "/run", "/sys")
OWN_USERS = 0x70000000  # user ids that no system gives away, one for each sandbox of a root user
THREADS = 32

CREATE_RULESET, ADD_RULE, RESTRICT_SELF, MOUNT_SETATTR = 444, 445, 446, 442  # the same on all architectures
ALL_RIGHTS = {3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version: on files; from 5 on also device ioctls
EXECUTE, WRITE, READ, READ_FOLDER, REMOVE, CREATE, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
NETWORK, SCOPES = 0b11, 0b11  # TCP bind and connect; abstract sockets and signals
PRIVATE, BIND, READ_ONLY, RECURSIVE, HERE = (1 << 18) | (1 << 14), 1 << 12, 1, 0x8000, -100
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
KEEP_CAPABILITIES, READ_SEARCH, CAPABILITY_VERSION = 8, 1 << 2, 0x20080522
PARENT_DEATH = 1  # prctl: the signal at the parent's death

_LIBC = ctypes.CDLL(None, use_errno=True)


def isolate(folder: str, kinds: tuple[str, ...]) -> str:
    """Give up all that generated code has no business with; return which of `kinds` keeps writes inside `folder`.

    Raises:
      OSError: the kernel has none of them, or no seccomp; what was given up before stays given up.
    """
    _call("prctl", syscalls.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    root = os.getuid() == 0
    reasons = []
    for kind in kinds:
        try:
            _landlock(folder) if kind == "landlock" else _mounts(folder)
        except OSError as error:
            reasons.append(f"{kind}: {error}")
            continue
        _drop_privileges(root)
        syscalls.restrict()
        return kind
    raise OSError(errno.ENOSYS, f"nothing keeps writes inside a folder here ({'; '.join(reasons)})")


def limit(seconds: float, memory_mb: int, file_mb: int) -> None:
    """Limit processor time, address space, size of files, open files and threads of this process."""
    cpu = int(seconds) + 1
    for name, value in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, memory_mb << 20), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_FSIZE, file_mb << 20), (resource.RLIMIT_NOFILE, 32)):
        resource.setrlimit(name, (value, value))
    if os.getuid() == 0:  # then the code has a user of its own; another user's processes would all be counted
        resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, THREADS))


def _landlock(folder: str) -> None:
    version = _syscall(CREATE_RULESET, None, 0, 1)
    if version < 3:
        raise OSError(errno.ENOSYS, f"version {version} can't refuse truncation, which takes version 3")
    rights = ALL_RIGHTS[5 if version >= 5 else 3]
    attributes = struct.pack("=QQQ", rights, NETWORK if version >= 4 else 0, SCOPES if version >= 6 else 0)
    ruleset = _syscall(CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in LIBRARIES:
            _allow(ruleset, path, EXECUTE | READ | READ_FOLDER)
        _allow(ruleset, "/dev/null", READ | WRITE | TRUNCATE)
        _allow(ruleset, "/dev/urandom", READ)
        # plain files only: no folders to nest without end, no links, pipes or sockets
        _allow(ruleset, folder, READ | READ_FOLDER | WRITE | TRUNCATE | CREATE | REMOVE)
        _syscall(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Add a rule for a path that this user can reach; a file has no rights of folders."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        rights &= ~0 if os.path.isdir(path) else ~READ_FOLDER
        _syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _mounts(folder: str) -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", NEW_MOUNTS | (NEW_USER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, PRIVATE)
    _set_read_only("/", True)
    _mount(folder, folder, None, BIND)
    _set_read_only(folder, False)
    for path in HIDDEN:
        _mount("none", path, "tmpfs", READ_ONLY)
    os.chdir(folder)  # the mount, not what it covers


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    _call("mount", *(text and text.encode() for text in (source, target, kind)), ctypes.c_ulong(flags), None)


def _set_read_only(path: str, on: bool) -> None:
    attributes = struct.pack("=QQQQ", READ_ONLY if on else 0, 0 if on else READ_ONLY, 0, 0)
    _syscall(MOUNT_SETATTR, HERE, path.encode(), RECURSIVE if on else 0, attributes, len(attributes))


def _drop_privileges(root: bool) -> None:
    """Become a user of one's own where root may; keep no capability, but of root to read what landlock lets through."""
    if root:
        _call("prctl", KEEP_CAPABILITIES, 1, 0, 0, 0)
        with contextlib.suppress(OSError):  # a container may know no such users; root without capabilities then
            os.setresgid(*[own_user()] * 3)
            os.setgroups([])
            os.setresuid(*[own_user()] * 3)
    kept = READ_SEARCH if root else 0  # the interpreter may lie in root's home
    _call("capset", struct.pack("=Ii", CAPABILITY_VERSION, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    _call("prctl", PARENT_DEATH, signal.SIGKILL, 0, 0, 0)  # forgotten at a change of user


def own_user() -> int:
    """Return the user id of the sandbox that this process or its child is."""
    return OWN_USERS + os.getsid(0)


def _call(name: str, *arguments: object) -> int:
    result = getattr(_LIBC, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(*arguments: object) -> int:
    return _call("syscall", *arguments)
