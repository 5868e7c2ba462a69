"""Kill the miniature pipeline at random moments, start it again each time, and compare with a run that nobody disturbed.

    python -m experiments.faults.kill_loop --kills=100

Each stage in turn is killed (SIGKILL, all its processes), in turns after a time drawn uniformly from its undisturbed duration
and at its first write (of a checkpoint, if it is training) or within MOMENT of it; training starts again on a mesh drawn anew.
After each kill everything that has a final name must open and agree with its hashes; how many kills came amid a write, and so
left something half-written under a temporary name, is said. Whenever a stage gets to its end, adapters and store must be equal
bit for bit; parameters, losses and the generated adapter, which other meshes round otherwise, within TOLERANCE. Hardware: 2 CPU
cores, 6 to 20 seconds a kill.
"""

import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from dnd_jax import adapters, checkpoints, checksums, cli, files, logs, pairs
from dnd_jax.types import InputError

HERE = pathlib.Path(__file__).resolve().parents[2]
ROOT = pathlib.Path("build/tenants-smoke")
CONFIG = f"--config={HERE}/experiments/configs/tenants.py:smoke"
TRAIN = ("steps=24", "validate_every=3", "keep_last=3")
# module and arguments, and what is removed to do a stage again
STAGES = {
    "collect": (["data_pipeline.collect", CONFIG, "--jobs=2"], ROOT / "adapters"),
    "export": (["data_pipeline.export", CONFIG], ROOT / "store"),
    "train": (["dnd_jax.train", CONFIG, f"--workdir={ROOT}/killed", *(f"--config.train.{s}" for s in TRAIN)], ROOT / "killed"),
    "generate": (["dnd_jax.generate", f"--workdir={ROOT}/killed", "--prompts=prompts.txt", f"--out={ROOT}/generated/mine"],
                 ROOT / "generated"),
}
MOMENT = 0.1  # seconds
WRITES = {"train": "orbax-checkpoint-tmp"}
MESHES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2))
TOLERANCE = {"parameters": 5e-6, "losses": 1e-6, "adapter": 1e-6}


def command_of(name: str, mesh: tuple[int, ...]) -> tuple[list[str], dict[str, str]]:
    """Return a stage's command line after `python -m`, and what it changes of the environment."""
    if name != "train":
        return STAGES[name][0], {"XLA_FLAGS": ""}
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    return [*STAGES[name][0], *sizes], {"XLA_FLAGS": f"--xla_force_host_platform_device_count={math.prod(mesh)}"}


def start(folder: pathlib.Path, name: str, mesh: tuple[int, ...] = MESHES[0]) -> subprocess.Popen[str]:
    """Start a stage in a folder, in a process group of its own."""
    words, env = command_of(name, mesh)
    return subprocess.Popen([sys.executable, "-m", *words], cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE)} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a stage; raise RuntimeError with what it said if it failed."""
    said = "".join(filter(None, process.communicate()))
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, process.args))}: exit status {process.returncode}\n{said[-3000:]}")  # type: ignore[arg-type]


def make_world(folder: pathlib.Path) -> None:
    """Write the embedded world's miniature."""
    command = [sys.executable, "-m", "data_pipeline.tenants", f"--out={ROOT}", "--smoke"]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE)}, check=True, stdout=subprocess.DEVNULL)


def undisturbed(folder: pathlib.Path) -> dict[str, float]:
    """Run all stages; return how long each took."""
    (folder / "prompts.txt").write_text("".join(f"how zib is the thing{i} :\n" for i in range(14)))
    seconds = {}
    for name in STAGES:
        began = time.perf_counter()
        finish(start(folder, name))
        seconds[name] = time.perf_counter() - began
    return seconds


def disturb(whole: pathlib.Path, folder: pathlib.Path, name: str, kills: int, seconds: float, rng: random.Random
            ) -> tuple[list[tuple[int, ...]], int, list[dict[str, Any]]]:
    """Kill a stage `kills` times, checking what is there each time, then let it finish.

    Returns:
      The meshes it ran on, how many kills left something half-written under a temporary name, and of each time that it got to
      its end how its results differ from those of `whole`.
    """
    meshes: list[tuple[int, ...]] = []
    amid, results = 0, []
    while kills:
        meshes.append(rng.choice(MESHES))
        before, began = temporaries(folder / ROOT), time.perf_counter()
        process = start(folder, name, meshes[-1])
        if writing := kills % 2 == 0:
            while process.poll() is None and not any(WRITES.get(name, "") in p for p, _ in temporaries(folder / ROOT) - before):
                time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.choice((0, rng.uniform(0, MOMENT))) if writing else rng.uniform(0, seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills -= 1
            amid += bool(temporaries(folder / ROOT) - before)
        else:
            finish(process)
            seconds = min(seconds, time.perf_counter() - began)  # JAX has kept what it compiled the first time
            results.append(compare(name, whole / ROOT, folder / ROOT))
            shutil.rmtree(folder / STAGES[name][1])  # nothing left to kill: do it again
        check_visible(folder / ROOT)
    meshes.append(rng.choice(MESHES))
    finish(start(folder, name, meshes[-1]))
    check_visible(folder / ROOT)
    return meshes, amid, [*results, compare(name, whole / ROOT, folder / ROOT)]


def temporaries(root: pathlib.Path) -> set[tuple[str, int]]:
    """Return what is there under the temporary names that we and Orbax write to first, and when it was made or changed."""
    found = set()
    for folder, folders, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in (*folders, *names) if ".tmp-" in name or WRITES["train"] in name):
            with contextlib.suppress(FileNotFoundError):  # it has its final name now
                found.add((path, os.stat(path).st_mtime_ns))
    return found


def check_visible(root: pathlib.Path) -> None:
    """Open everything that has a final name, and compare it with its hashes; an error names what is half-written."""
    for run in named(root / "adapters"):
        files.read_json(run / "run.json")
        for folder in run.glob("step_*"):
            adapters.read(folder)
    if (root / "store").exists():
        pairs.open_store(root / "store")
    if (root / "killed" / "config.json").exists():
        files.read_json(root / "killed" / "config.json")
    if (root / "killed" / logs.NAME).exists():
        logs.read_metrics(root / "killed")
    written = [path for path in named(root / "killed" / "checkpoints") if path.name.isdigit()]
    for path in written:
        if fault := checksums.fault(path):
            raise RuntimeError(f"{path}: {fault}")
    if written:
        checkpoints.load_latest(root / "killed" / "checkpoints")
    for path in named(root / "generated"):
        adapters.read(path)
        if not path.is_symlink() and adapters.content_hash(path) != path.name:
            raise RuntimeError(f"{path}: its content is not what its name says")


def named(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return what a folder holds under final names."""
    return [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []


def bytes_of(root: pathlib.Path, part: str) -> dict[str, str]:
    """Return hashes of all files of runs or store; of `run.json` without the seconds that it took."""
    found = {}
    for path in sorted(p for p in (root / part).rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if path.name == "run.json":
            found[name] = files.sha256_text(json.dumps(files.read_json(path) | {"seconds": None}))
        elif path.name != checksums.NAME:
            found[name] = files.sha256_file(path)
    return found


def compare(name: str, whole: pathlib.Path, killed: pathlib.Path) -> dict[str, Any]:
    """Return how a stage's results differ in two pipelines: the files that do, or the largest differences."""
    if name in ("collect", "export"):
        ours, theirs = (bytes_of(root, STAGES[name][1].name) for root in (killed, whole))
        return {"compared": theirs.keys(), "files": {file for file, _ in ours.items() ^ theirs.items()}}
    if name == "generate":
        return {"adapter": largest(*(adapters.read(root / "generated" / "mine")[0] for root in (killed, whole)))}
    steps, params = zip(*(checkpoints.load_latest(root / "killed" / "checkpoints") for root in (killed, whole)), strict=True)
    lines = [{entry["step"]: entry for entry in logs.read_metrics(root / "killed")} for root in (killed, whole)]
    losses = [abs(lines[0][step][name] / entry[name] - 1) if step in lines[0] else math.inf
              for step, entry in lines[1].items() for name in ("loss", "validation_loss") if name in entry]
    return {"steps": {*steps}, "parameters": largest(*params), "losses": float(np.max(losses))}


def worst(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the most that results differ by."""
    sets = {key: sorted({item for found in results for item in found.get(key, ())}) for key in ("files", "compared", "steps")}
    numbers = {key: float(np.max([found[key] for found in results if key in found])) for key in TOLERANCE}
    return sets | {"compared": len(sets["compared"])} | numbers


def largest(a: Any, b: Any) -> float:
    """Return the largest absolute difference of two trees; NaN, if a number is."""
    return float(np.max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b))))


def kill_loop(whole: pathlib.Path, killed: pathlib.Path, kills: int, seed: int) -> dict[str, Any]:
    """Disturb a copy of `whole`'s world, and return how its results differ from those of `whole`.

    Raises:
      RuntimeError, InputError: a stage that doesn't go on after a kill, or a half-written file under a final name.
    """
    seconds, rng = undisturbed(whole), random.Random(seed)
    for part in ("base", "encoder", "datasets", "unrelated"):
        shutil.copytree(whole / ROOT / part, killed / ROOT / part)
    for part in ("tasks.json", "base_model.json"):
        shutil.copyfile(whole / ROOT / part, killed / ROOT / part)
    shutil.copyfile(whole / "prompts.txt", killed / "prompts.txt")
    meshes: list[tuple[int, ...]] = []
    results: list[dict[str, Any]] = []
    total = 0
    for number, name in enumerate(STAGES):
        share = (kills + len(STAGES) - 1 - number) // len(STAGES)
        ran, amid, found = disturb(whole, killed, name, share, seconds[name], rng)
        meshes, total, results = meshes + (ran if name == "train" else []), total + amid, results + found
        print(f"{name}: {share} kills, {amid} of them amid a write, {len(found)} times at its end, undisturbed "
              f"{seconds[name]:.1f} s", flush=True)
    return worst(results) | {"meshes": sorted({*meshes}), "restarts of training": len(meshes) - 1, "amid a write": total}


def within(found: dict[str, Any]) -> bool:
    """Tell whether two pipelines' results are equal, as far as they can be."""
    return not found["files"] and all(found[name] <= TOLERANCE[name] for name in TOLERANCE)


def define_flags() -> None:
    flags.DEFINE_integer("kills", 10, "How often to kill, all stages together.")
    flags.DEFINE_integer("seed", 0, "Draws moments and meshes.")
    flags.DEFINE_string("out", "build/kill_loop", "Folder that is made anew; `whole` and `killed` in it are compared.")


def main(args: Any) -> None:
    out = pathlib.Path(args.out).resolve()
    if others := {path.name for path in out.glob("*")} - {"whole", "killed"}:
        raise InputError(f"{out}: holds {sorted(others)}, expected a folder of this command's own")
    for name in ("whole", "killed"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    make_world(out / "whole")
    found = kill_loop(out / "whole", out / "killed", args.kills, args.seed)
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"{args.kills} kills: " + ("everything equals the undisturbed run" if within(found) else "results DIFFER"))
    if not within(found):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, define_flags)
