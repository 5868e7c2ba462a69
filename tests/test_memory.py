"""Free memory: the machine's, or what a control group leaves."""

import psutil
import pytest

from dnd_jax import memory

GIB = 1 << 30


def group(folder, limit, used, inactive, names=("memory.max", "memory.current", "inactive_file")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used, None), strict=True):
        if value is not None:
            (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 100 GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Free", (), {"available": 100 * GIB}))
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def test_without_groups_and_without_limits_the_machine_counts(machine):
    assert memory.free_bytes(machine) == 100 * GIB
    (machine / "proc/self/cgroup").write_text("0::/\n")
    assert memory.free_bytes(machine) == 100 * GIB
    group(machine / "sys/fs/cgroup", "max", GIB, 0)
    assert memory.free_bytes(machine) == 100 * GIB


def test_the_tightest_group_around_counts_less_what_gives_way(machine):
    (machine / "proc/self/cgroup").write_text("0::/job/step/task\n")
    group(machine / "sys/fs/cgroup/job", 32 * GIB, 10 * GIB, 3 * GIB)
    group(machine / "sys/fs/cgroup/job/step", 40 * GIB, 8 * GIB, 0)
    group(machine / "sys/fs/cgroup/job/step/task", "max", 8 * GIB, 0)
    assert memory.free_bytes(machine) == 25 * GIB


def test_groups_of_version_1(machine):
    (machine / "proc/self/cgroup").write_text("5:cpu,cpuacct:/a\n4:memory:/slurm/job_1\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(machine / "sys/fs/cgroup/memory", 1 << 62, GIB, 0, names)
    group(machine / "sys/fs/cgroup/memory/slurm/job_1", 4 * GIB, 5 * GIB, 0, names)
    assert memory.free_bytes(machine) == 0
