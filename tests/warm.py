"""Run our modules in forks of a process that has imported the large libraries, as importing them takes longer than most runs."""

import atexit
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time

LIBRARIES = ("jax", "optax", "flax.linen", "orbax.checkpoint", "peft", "sentence_transformers", "datasets")
PAUSE = 0.005  # seconds between questions whether a process has ended


class Process:
    """A started module, with what our tests use of `subprocess.Popen`; it leads a process group of its own."""

    def __init__(self, ask, words, cwd, env, out, err):
        self.args, self.returncode, self._ask, self._said = words, None, ask, (out, err)
        self.pid = ask("start", words, cwd, env, *map(str, self._said))

    def poll(self):
        if self.returncode is None:
            self.returncode = self._ask("status", self.pid)
        return self.returncode

    def communicate(self, timeout=float("inf")):
        """Wait for the end; return what it wrote to standard output and error."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(PAUSE)
        return tuple(path.read_text() for path in self._said)

    def wait(self, timeout=float("inf")):
        self.communicate(timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Server:
    """A process that forks for every run; in it no library has begun to work, so that a fork has all that it needs."""

    def __init__(self, env):
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env=env)
        self._folder, self._number = pathlib.Path(tempfile.mkdtemp()), 0
        atexit.register(self._end)

    def _ask(self, *question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def _end(self):
        self._process.communicate()  # the end of its input ends it
        shutil.rmtree(self._folder)

    def start(self, words, cwd, env=None):
        """Start `python -m WORDS...` in a folder, with changes of the environment."""
        self._number += 1
        said = (self._folder / f"{self._number}.{name}" for name in ("out", "err"))
        return Process(self._ask, words, str(cwd), env or {}, *said)


def _start(words, cwd, env, *said):
    """Fork; be `python -m WORDS...` from here on in one process, return its number in the other."""
    child = os.fork()
    os.setpgid(child, child)  # in both, as either may be the first
    if child:
        return child
    os.chdir(cwd)
    os.environ.update(env)
    for descriptor, path in enumerate((os.devnull, *said)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.path[0], sys.argv = cwd, words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return None


def _status(child):
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _serve():
    for name in LIBRARIES:
        __import__(name)
    for line in sys.stdin:
        what, *question = json.loads(line)
        answer = _start(*question) if what == "start" else _status(*question)
        if answer is None and what == "start":
            return  # the module has ended
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
