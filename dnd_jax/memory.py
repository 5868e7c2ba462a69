"""How much memory is left to this process."""

import contextlib
import pathlib
from collections.abc import Iterator

import psutil

from dnd_jax.files import PathLike

# of a control group, by the name of its controller: its place, and its files for limit and use, and what gives way of that
GROUPS = {"": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
          "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}


def free_bytes(root: PathLike = "/") -> int:
    """Return the bytes that this process may still take: what the machine has, or less where a control group (version 1 or 2) has
    a limit, as containers and cluster jobs have.

    Args:
      root: folder under which `proc` and `sys` lie.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups(pathlib.Path(root))]))


def _left_in_groups(root: pathlib.Path) -> Iterator[int]:
    """Yield what is left of the limits of this process' groups and of those around them."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            for place, limit, used, inactive in (GROUPS[c] for c in controllers.split(",") if c in GROUPS):
                group = pathlib.PurePath(name.lstrip("/"))
                for folder in (root / place / g for g in (group, *group.parents)):
                    with contextlib.suppress(OSError, ValueError):  # the outermost has no limit; others say "max"
                        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                        yield int((folder / limit).read_text()) - int((folder / used).read_text()) + int(stat.get(inactive, 0))
