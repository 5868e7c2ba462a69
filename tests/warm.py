"""Run our modules in forks of a process that has imported the large libraries, as importing them takes longer than most runs."""

import atexit
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

LIBRARIES = ("jax", "optax", "flax.linen", "orbax.checkpoint", "peft", "sentence_transformers", "datasets")


class Server:
    """A process that forks for every run; in it no library has begun to work, so that a fork has all that it needs."""

    def __init__(self, env):
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env=env)
        atexit.register(self._process.communicate)  # the end of its input ends it

    def run(self, words, cwd):
        """Return the finished process of `python -m WORDS...` in a folder."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (pathlib.Path(folder, name) for name in ("out", "err"))
            self._process.stdin.write(json.dumps([words, str(cwd), str(out), str(err)]) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


def _become(words, cwd, out, err):
    """Be `python -m WORDS...` from here on."""
    os.chdir(cwd)
    for descriptor, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.path[0], sys.argv = cwd, words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _serve():
    for name in LIBRARIES:
        __import__(name)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return _become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
