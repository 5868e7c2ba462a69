"""Run generated code where it can reach nothing: no network, no writes but to a temporary folder, bounded time and memory."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import dnd_jax
from dnd_jax.jail import isolation
from dnd_jax.types import InputError

ROOT = str(pathlib.Path(dnd_jax.__file__).parent.parent)
# only while the supervisor is imported: generated code finds the standard library and nothing else
START = f"import sys; sys.path.insert(0, {ROOT!r}); from dnd_jax.jail import supervisor; sys.path.pop(0); supervisor.main()"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    reason: str = ""


def run(program: str, *, seconds: float = 5.0, kinds: tuple[str, ...] = isolation.KINDS) -> Outcome:
    """Run a Python program within the limits of `jail.supervisor`; it passes by running to its end without an exception.

    Args:
      program: source, of which only the standard library can be imported.
      seconds: of wall time before it is killed; processor time is limited to one second more.
      kinds: of `isolation.KINDS`, in order of preference.

    Raises:
      InputError: the system offers none of the kinds; the program wasn't run.
    """
    request = {"program": program, "seconds": seconds, "kinds": kinds, "temporary": tempfile.gettempdir()}
    env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # Python's own library may lie there
    done = subprocess.run([sys.executable, "-I", "-S", "-c", START], input=json.dumps(request), env=env, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the sandbox failed: {done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    if result["status"] == "refused":
        raise InputError(f"generated code isn't run: this system can't isolate it: {result['reason']}")
    return Outcome(result["status"] == "passed", result["reason"])
