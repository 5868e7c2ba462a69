"""Run one program in a child process that can reach nothing, and clean up after it. Standard library only.

`python -I -S -c "... supervisor.main()"` reads a request as JSON from stdin and writes the outcome as JSON to stdout. The child
can't start processes, so that nothing of it is left when it is dead; it is killed when its time or its files are used up, when
this process ends, and when the process that asked for it ends.

What this doesn't stop: the program shares its process with what reports its success, so one that looks for it there can report
a success that isn't. That is the program's author cheating at a test, not reaching anything.
"""

import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
import types

from dnd_jax.jail import isolation

LONGEST = 4096  # bytes of a report
FILES, DISK_MB, MEMORY_MB = 200, 8, 512  # of the temporary folder, all files together; of address space


def main() -> None:
    """Serve one request: program, seconds, kinds, and where temporary folders go."""
    ctypes.CDLL(None).prctl(isolation.PARENT_DEATH, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    request = json.load(sys.stdin)
    folder = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-", dir=request["temporary"]))
    try:
        print(json.dumps(_supervise(request, folder)), flush=True)
    finally:
        shutil.rmtree(folder)


def _supervise(request: dict, folder: str) -> dict:
    secret = secrets.token_bytes(16)  # a program that ends itself early can't say that it has passed
    reading, writing = os.pipe()
    os.setsid()
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # as in `isolation`: where there is no such user, it stays root's
            os.chown(folder, isolation.own_user(), isolation.own_user())
    child = os.fork()
    if child == 0:
        _become_child(request, folder, secret, writing)
    os.close(writing)
    try:
        killed = _wait(reading, folder, request["seconds"])
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if killed:
        return {"status": "failed", "reason": killed}
    os.set_blocking(reading, False)
    report = _read(reading)
    if report[: len(secret)] == secret:
        return json.loads(report[len(secret) :])
    how = f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else "ended itself"
    return {"status": "failed", "reason": f"{how} before the end"}


def _wait(reading: int, folder: str, seconds: float) -> str:
    """Wait until the child has reported or ended; return why it must be killed, or nothing."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([reading], [], [], 0.02)[0]:
            return ""  # a report, or the end of the pipe with the child's
        sizes = _sizes(folder)
        if sum(sizes) > DISK_MB << 20 or len(sizes) > FILES:
            return f"wrote {len(sizes)} files of {sum(sizes) >> 20} MB, {FILES} and {DISK_MB} are allowed"
    return f"not done after {seconds:g} s"


def _sizes(folder: str) -> list[int]:
    """Return the bytes on disk of every file in a folder whose files come and go."""
    sizes = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
    return sizes


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, LONGEST)
    except BlockingIOError:
        return b""


# --- the child -------------------------------------------------------------------------------------------------------


def _become_child(request: dict, folder: str, secret: bytes, writing: int) -> None:
    """Isolate this process, run the program, report, and end."""
    reported = False

    def report(status: str, reason: str) -> None:
        nonlocal reported
        if not reported:
            reported = True
            os.write(3, secret + json.dumps({"status": status, "reason": reason[:300]}).encode())

    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.dup2(writing, 3)
        os.closerange(4, 4096)
        os.chdir(folder)
        os.environ.update({"HOME": folder, "TMPDIR": folder})
        tempfile.tempdir = None
        isolation.limit(request["seconds"], MEMORY_MB, DISK_MB)
        isolation.isolate(folder, tuple(request["kinds"]))
    except BaseException as error:
        report("refused", f"{type(error).__name__}: {error}")
        os._exit(code)
    try:
        module = sys.modules["generated"] = types.ModuleType("generated")  # not the main one: what that does is no part of a test
        exec(compile(request["program"], "<generated>", "exec"), module.__dict__)
        code = 0
        report("passed", "")
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the tests weren't reached
        report("failed", f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)
