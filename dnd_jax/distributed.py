"""Several processes as one run: how they find each other, and how all of them end when one does.

SLURM, Kubernetes (an indexed Job or a JobSet) and TPU pods on GKE are detected by JAX; elsewhere every process is started with
`--coordinator=HOST:PORT --num_processes=N --process_id=I`. A process alone needs none of this.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from dnd_jax.types import InputError

HEARTBEAT_S = 10  # a process silent for so long counts as dead; JAX's own 100 s leave a job of dead peers running
JOIN_S = 300  # nodes of a cluster start at different times
# variables that say that this process is one of several, where JAX finds out the rest by itself
CLUSTERS = {
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_PROCID"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
    "TPU pod": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
}


def define_flags() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes run outside a known cluster.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0.")


def settings(args: Any, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what `jax.distributed.initialize` is to be told, empty if it finds out by itself; None for a process alone.

    Raises:
      InputError: some of the three flags, or values that can't be.
    """
    given = {"coordinator_address": args.coordinator, "num_processes": args.num_processes, "process_id": args.process_id}
    if all(value is None for value in given.values()):
        if int(environ.get("SLURM_NTASKS", 2)) < 2:
            return None  # one task keeps all its devices; JAX would leave it the first
        return {} if any(all(name in environ for name in names) for names in CLUSTERS.values()) else None
    if None in given.values() or not 0 <= args.process_id < args.num_processes or ":" not in args.coordinator:
        raise InputError(f"command line: --coordinator is {args.coordinator}, --num_processes {args.num_processes}, --process_id "
                         f"{args.process_id}; expected HOST:PORT, a number, and a smaller number from 0")
    return given


@contextlib.contextmanager
def joined(args: Any) -> Iterator[None]:
    """Join the other processes, if there are any; then only the first one's standard output is seen.

    It waits for them for JOIN_S. An error ends the process at once, so that the others notice; when another one ends, this one
    does too, in HEARTBEAT_S or little more: by an error of the exchange that it was waiting in, or else by JAX, which aborts with
    a message.
    """
    told = settings(args, os.environ)
    if told is None:
        yield
        return
    try:
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=HEARTBEAT_S, initialization_timeout=JOIN_S)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"joining the other processes failed: {error}") from error
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what native libraries print too
    try:
        yield
    except InputError:
        raise  # cli.run ends the process
    except BaseException as error:
        traceback.print_exc()
        print(f"error: process {jax.process_index()} of {jax.process_count()} ends: {' '.join(str(error).split())[:300]} "
              "(if another process ended first, it says why; the same command resumes)", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # leaving in order would wait for the others, and they for this one


def is_first() -> bool:
    """Tell whether this process is the one that prints, logs and writes what isn't an array."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """Return the first process's number in all of them, whose views of a shared file system may differ for a while."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def texts(text: str) -> list[str]:
    """Return the text that each process gives, by process, in all of them."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    filled = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) - len(own))))
    return [row[:size].tobytes().decode() for row, size in zip(np.asarray(filled), sizes, strict=True)]


def first_with(flag: bool) -> int | None:
    """Return the first process in which a flag is set, the same answer in all of them."""
    flags = np.atleast_1d(multihost_utils.process_allgather(np.array(flag)) if jax.process_count() > 1 else flag)
    return int(np.argmax(flags)) if flags.any() else None


def by_first(action: Callable[[], None]) -> None:
    """Run an action in the first process, while the others wait until it is done."""
    if is_first():
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("done by the first process")
