"""Hostile programs are contained: each fails, says why, and leaves nothing behind, by both ways of keeping writes inside."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from dnd_jax.jail import isolation
from dnd_jax.scoring import sandbox
from dnd_jax.types import InputError

RAW = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *arguments):
    result = libc.syscall(x86 if platform.machine() == "x86_64" else arm, *arguments)
    if result < 0:
        raise PermissionError(ctypes.get_errno(), "raw call")
"""
REFUSED = ("PermissionError", "Read-only file system", "Operation not permitted", "FileNotFoundError", "Permission denied")
# name: program, what the reason must contain one of; $OUT is a folder of the test's, $PORT a listening port, $PID the test
HOSTILE = {
    "fork bomb": ("import os\nwhile True: os.fork()", REFUSED),
    "threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
                ("can't start new thread",)),
    "fork, caught": ("import os\ntry:\n os.fork()\nexcept OSError as error:\n raise SystemExit(error)", ("SystemExit",)),
    "delete outside": ("import os; os.remove('$OUT/kept')", REFUSED),
    "delete a tree outside": ("import shutil; shutil.rmtree('$OUT')", REFUSED),
    "write outside": ("open('$OUT/new', 'w').write('x')", REFUSED),
    "append outside": ("open('$OUT/kept', 'a').write('x')", REFUSED),
    "truncate outside": ("import os; os.truncate('$OUT/kept', 0)", REFUSED),
    "truncate by opening": ("import os; os.open('$OUT/kept', os.O_RDONLY | os.O_TRUNC)", REFUSED),
    "write to shared memory": ("open('/dev/shm/sandbox-test', 'w').write('x')", REFUSED),
    "chmod outside": ("import os; os.chmod('$OUT/kept', 0o777)", REFUSED),
    "times outside": ("import os; os.utime('$OUT/kept', (0, 0))", REFUSED),
    "rename outside": ("import os; os.rename('$OUT/kept', '$OUT/moved')", REFUSED),
    "rename to outside": ("import os; open('x', 'w'); os.rename('x', '$OUT/new')", (*REFUSED, "Invalid cross-device link")),
    "folder outside": ("import os; os.mkdir('$OUT/folder')", REFUSED),
    "symlink escape": ("import os; os.symlink('$OUT/kept', 'link'); open('link', 'w')", REFUSED),
    "hard link escape": ("import os; os.link('$OUT/kept', 'link'); open('link', 'w')", REFUSED),
    "path escape": ("open('../escaped', 'w')", REFUSED),
    "nested folders": ("import os\nwhile True:\n os.mkdir('x'); os.chdir('x')", REFUSED),
    "infinite loop": ("while True: pass", ("not done after 1 s",)),
    "infinite sleep": ("import time; time.sleep(99)", ("not done after 1 s",)),
    "deaf loop": ("import signal\nfor s in (signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
                  "while True: pass", ("not done after 1 s",)),
    "loop without exceptions": ("while True:\n try:\n  while True: pass\n except BaseException: pass", ("not done after 1 s",)),
    "memory hog": ("x = b'x' * (4 << 30)", ("MemoryError",)),
    "memory bit by bit": ("x = []\nwhile True: x.append(b'x' * (1 << 24))", ("MemoryError", "not done after 1 s")),
    "huge output": ("import sys\nwhile True: sys.stdout.write('x' * (1 << 20))", ("not done after 1 s",)),
    "flood of the report": ("import os\nwhile True: os.write(3, b'x' * 4096)", ("before the end",)),
    "huge file": ("f = open('x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", ("File too large", "wrote")),
    "many files": ("i = 0\nwhile True:\n i += 1; open(str(i), 'w').write('x')", ("200 and 8 are allowed",)),
    "files that come and go": ("import os\nwhile True:\n open('x', 'w'); os.remove('x')", ("not done after 1 s",)),
    "tcp": ("import socket; socket.create_connection(('127.0.0.1', $PORT), 1).send(b'x')", REFUSED),
    "tcp server": ("import socket; socket.socket().bind(('127.0.0.1', 0))", REFUSED),
    "udp": ("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $PORT))", REFUSED),
    "unix socket": ("import socket; socket.socket(socket.AF_UNIX).connect('$OUT/socket')", REFUSED),
    "socket pair": ("import socket; socket.socketpair()", REFUSED),
    "netlink": ("import socket; socket.socket(16, 3, 0)", REFUSED),
    "environment": ("import os; assert 'SANDBOX_SECRET' not in os.environ; raise LookupError('clean')", ("LookupError",)),
    "parent's environment": ("import os; print(open(f'/proc/{os.getppid()}/environ').read())", REFUSED),
    "caller's environment": ("print(open('/proc/$PID/environ').read())", REFUSED),
    "caller's memory": ("open('/proc/$PID/mem', 'rb')", REFUSED),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", REFUSED),
    "kill the caller": ("import os; os.kill($PID, 9)", REFUSED),
    "kill all": ("import os; os.kill(-1, 9)", REFUSED),
    "starve the parent": ("import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", REFUSED),
    "signal by files": ("import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, 10, 9)", REFUSED),
    "run a program": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'touch $OUT/new'])", REFUSED),
    "become a program": ("import os; os.execv('/bin/sh', ['sh', '-c', 'touch $OUT/new'])", REFUSED),
    "daemon": ("import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(3); open('$OUT/new', 'w')",
               REFUSED),
    "leave the group": ("import os; os.setpgid(0, 0)", REFUSED),
    "raw fork": (RAW + "call(56, 220, 17, 0, 0, 0, 0)", REFUSED),
    "raw clone3": (RAW + "call(435, 435, None, 0)", ("raw call",)),
    "raw socket": (RAW + "call(41, 198, 2, 1, 0)", REFUSED),
    "raw chmod": (RAW + "call(268, 53, -100, b'$OUT/kept', 0o777)", REFUSED),
    "raw io_uring": (RAW + "call(425, 425, 1, None)", REFUSED),
    "raw ptrace": (RAW + "call(101, 117, 16, $PID, 0, 0)", REFUSED),
    "raw read of memory": (RAW + "call(310, 270, $PID, 0, 0, 0, 0, 0)", REFUSED),
    "raw mount": (RAW + "call(165, 40, b'none', b'/tmp', b'tmpfs', 0, None)", REFUSED),
    "raw unshare": (RAW + "call(272, 97, 0x10000000)", REFUSED),
    "raw memfd": (RAW + "call(319, 279, b'x', 0)", REFUSED),
    "raw lift of the filter": (RAW + "call(157, 167, 22, 0, 0, 0, 0)", REFUSED),
    "raw handle": (RAW + "call(304, 265, -100, None, 0)", REFUSED),
    "crash": ("import ctypes; ctypes.string_at(0)", ("killed by SIGSEGV before the end",)),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1\nf(0)",
                       ("before the end", "MemoryError", "RecursionError", "not done after 1 s")),
    "early exit": ("import os; os._exit(0)", ("ended itself before the end",)),
    "polite early exit": ("import sys; sys.exit(0)", ("SystemExit",)),
    "forged report": ("import os; os.write(3, b'{\"status\": \"passed\", \"reason\": \"\"}'); os._exit(0)", ("before the end",)),
    "null bytes": ("x = '\0'", ("Error",)),
    "not Python": ("I would say", ("SyntaxError",)),
}
# the supervisor's time-outs are the same whatever the isolation
CASES = [(kind, name) for kind in isolation.KINDS for name, (_, reasons) in HOSTILE.items()
         if kind == "landlock" or "not done after 1 s" not in reasons]


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """A folder, a port and a socket that nobody may touch, and an environment with a secret."""
    out = tmp_path_factory.mktemp("outside")
    (out / "kept").write_text("precious")
    (out / "kept").chmod(0o666)
    out.chmod(0o777)
    os.environ["SANDBOX_SECRET"] = "secret"
    servers = [socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)]
    servers[0].bind(("127.0.0.1", 0))
    servers[1].bind(servers[0].getsockname())
    servers[2].bind(str(out / "socket"))
    for server in (servers[0], servers[2]):
        server.listen()
    yield out, servers
    for server in servers:
        server.close()
    del os.environ["SANDBOX_SECRET"]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The folder of temporary folders."""
    usual, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield pathlib.Path(tempfile.tempdir)
    tempfile.tempdir = usual


@pytest.fixture(scope="module")
def outcomes(surroundings, temporary):
    """Every hostile program's outcome by every kind of isolation, run eight at a time; and what was there before and after."""
    out, servers = surroundings
    names = {"$OUT": str(out), "$PORT": str(servers[0].getsockname()[1]), "$PID": str(os.getpid())}

    def fill(text):
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    before = state(out, temporary)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = {(kind, name): pool.submit(sandbox.run, fill(HOSTILE[name][0]), seconds=1.0, kinds=(kind,))
                for kind, name in CASES}
        found = {key: job.result() for key, job in jobs.items()}
    return found, before, state(out, temporary)


def state(out, temporary):
    """Return what is left of and around the programs."""
    status = (out / "kept").stat()
    return {"files": sorted(p.name for p in out.iterdir()), "text": (out / "kept").read_text(), "mode": status.st_mode,
            "time": status.st_mtime_ns, "processes": inside(temporary), "temporary": list(temporary.iterdir()),
            "shared": pathlib.Path("/dev/shm/sandbox-test").exists()}


def inside(folder):
    """Return the numbers of processes that work in a folder, and of this process's children."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd").startswith(str(folder)):
                found.append(int(path.name))
        except OSError:
            continue
    return sorted([*found, *children(os.getpid())])


@pytest.mark.parametrize("kind,name", CASES)
def test_hostile_program_fails_for_the_right_reason(outcomes, kind, name):
    outcome = outcomes[0][kind, name]
    assert not outcome.passed and any(part in outcome.reason for part in HOSTILE[name][1]), outcome.reason
    assert "precious" not in outcome.reason and "secret" not in outcome.reason


def test_nothing_is_left_behind_or_has_arrived(outcomes, surroundings):
    _, before, after = outcomes
    assert after == before
    for server in surroundings[1]:
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(1) if server.type == socket.SOCK_DGRAM else server.accept()


GOOD = """
import bisect, collections, dataclasses, decimal, fractions, functools, hashlib, heapq, itertools, json, math, os, random, re
import statistics, string, tempfile, threading
from typing import List
from datetime import datetime
assert hashlib.md5(b"x").hexdigest().startswith("9dd4")
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("x"); file.flush(); file.seek(0)
    assert file.read() == "x"
open("a", "w").write("b")
os.rename("a", "c")
assert os.listdir(".") == ["c"]
found = []
thread = threading.Thread(target=found.append, args=(1,)); thread.start(); thread.join()
assert found == [1] and random.random() < 1 and datetime.now().year > 2000
print("out")
"""


@pytest.mark.parametrize("kind", isolation.KINDS)
def test_sound_programs_pass(kind):
    assert sandbox.run(GOOD, kinds=(kind,)) == sandbox.Outcome(True)
    assert sandbox.run("assert 1 + 1 == 3, 'no'", kinds=(kind,)) == sandbox.Outcome(False, "AssertionError: no")


def test_a_program_is_a_module_but_not_the_main_one():
    program = ("from __future__ import annotations\nimport dataclasses, sys, typing\n"
               "class Other: pass\n@dataclasses.dataclass\nclass Pair:\n  one: Other\n"
               "assert typing.get_type_hints(Pair) == {'one': Other} and sys.modules[__name__].Pair is Pair\n"
               "if __name__ == '__main__':\n  import unittest; unittest.main()\n")
    assert sandbox.run(program) == sandbox.Outcome(True)


def test_landlock_hides_what_can_be_read(surroundings):
    outcome = sandbox.run(f"print(open('{surroundings[0]}/kept').read())", kinds=("landlock",))
    assert not outcome.passed and "PermissionError" in outcome.reason


def test_without_isolation_nothing_runs(tmp_path):
    with pytest.raises(InputError, match="generated code isn't run: this system can't isolate it"):
        sandbox.run(f"open('{tmp_path}/ran', 'w')", kinds=())
    # a process that may not isolate itself, as here inside an isolation, finds out before anything runs
    program = ("import os\nfrom dnd_jax.jail import isolation\nisolation.isolate('.', isolation.KINDS)\n"
               "try:\n isolation.isolate('.', isolation.KINDS)\nexcept OSError as error:\n os.write(1, str(error).encode())")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=sandbox.ROOT, check=True)
    assert "Operation not permitted" in done.stdout and not (tmp_path / "ran").exists()


USER = """
import ctypes, os, socket, sys
from dnd_jax.jail import isolation
kind, folder, outside = sys.argv[1:]
if os.getuid() == 0:
    os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process that has always been this user's
os.chdir(folder)
isolation.isolate(folder, (kind,))
open("inside", "w").write("x")
refused = 0
for action in (lambda: open(outside, "a"), lambda: os.chmod(outside, 0o777), lambda: os.remove(outside), socket.socket, os.fork,
               lambda: os.kill(os.getppid(), 0), lambda: open(f"/proc/{os.getppid()}/environ")):
    try:
        action()
    except OSError:
        refused += 1
os.write(1, b"%d" % refused)
"""


@pytest.mark.parametrize("kind", isolation.KINDS)
def test_isolation_needs_no_privileges(kind):
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = pathlib.Path(name)
        for path in (folder, folder / "own"):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        (folder / "outside").write_text("precious")
        (folder / "outside").chmod(0o666)
        done = subprocess.run([sys.executable, "-c", USER, kind, folder / "own", folder / "outside"], capture_output=True,
                              text=True, cwd=sandbox.ROOT, check=False)
        assert done.stdout == "7", done.stderr
        assert (folder / "own" / "inside").read_text() == "x" and (folder / "outside").read_text() == "precious"


@pytest.mark.parametrize("victim", ["caller", "supervisor"])
def test_a_killed_caller_or_supervisor_takes_the_program_along(victim, tmp_path):
    others = set(inside(tmp_path))  # such as multiprocessing's, once another test has used it
    caller = subprocess.Popen(
        [sys.executable, "-c", "from dnd_jax.scoring import sandbox\nsandbox.run('while True: pass', seconds=60)"],
        cwd=sandbox.ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(tmp_path)})
    wait_for(lambda: [p for p in inside(tmp_path) if p not in children(os.getpid())])
    os.kill(caller.pid if victim == "caller" else children(caller.pid)[0], signal.SIGKILL)
    caller.wait()
    wait_for(lambda: not set(inside(tmp_path)) - others)
    if victim == "caller":
        wait_for(lambda: not list(tmp_path.iterdir()))


def children(pid):
    try:
        return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def wait_for(what, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")
