"""Run all stages on the embedded world, each only when something it depends on has changed.

    python -m experiments.demo            # what `make demo` calls; --arg=seed=1 for another world

A stage's key is a hash of its code with all of ours that this imports, the config and the key of the stage before it. When
interrupted, collecting and training go on where they were; a stage whose key has changed starts afresh.
"""

import json
import modulefinder
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import ml_collections
from absl import flags

from dnd_jax import cli, files, report, workdirs
from dnd_jax.types import InputError
from experiments.configs import tenants


def stages(arg: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return each stage's command line and the outputs that go when it starts afresh."""
    config = tenants.get_config(arg)
    root, other = pathlib.Path(config.tasks).parent, suffix(config)
    run, store, collected = f"{root}/run{other}", config.export.store, config.collect.out
    held_out = f"{root}/datasets/{{test}}_train.json"
    with_config = [f"--config=experiments/configs/tenants.py:{arg}" if arg else "--config=experiments/configs/tenants.py"]
    world = [f"--out={root}", f"--seed={config.seed}", *(["--smoke"] if "smoke" in arg else [])]
    parts = [f"{root}/{name}" for name in (
        "base", "encoder", "datasets", "unrelated", "base_model.json", "tasks.json", "world.json")]
    return {
        "tenants": (["data_pipeline.tenants", *world], parts),
        "collect": (["data_pipeline.collect", *with_config, f"--jobs={min(2, os.cpu_count() or 1)}"], [collected]),
        "export": (["data_pipeline.export", *with_config], [store]),
        "train": (["dnd_jax.train", *with_config, f"--workdir={run}"], [run]),
        "generate": (["dnd_jax.generate", f"--workdir={run}", f"--prompts={held_out}", f"--out={root}/generated{other}/{{test}}"],
                     [f"{root}/generated{other}"]),
        "evaluate": (["dnd_jax.evaluate", *with_config, f"--workdir={run}"], [f"{run}/report.json", f"{run}/report.html"]),
    }


def suffix(config: ml_collections.ConfigDict) -> str:
    """Return what the names of a gauge's folders end in, which are beside those of the demo; empty without one."""
    return pathlib.Path(config.export.store).name.removeprefix("store")


def stamp_of(config: ml_collections.ConfigDict, name: str) -> pathlib.Path:
    """Return the file that says which key a stage has run with, and how long; all gauges have one world and one collection."""
    collected = pathlib.Path(config.collect.out).name.removeprefix("adapters")
    other = {"tenants": "", "collect": collected}.get(name, suffix(config))
    return pathlib.Path(config.tasks).parent / "stamps" / f"{name}{other}.json"


def settings_of(config: ml_collections.ConfigDict, name: str) -> str:
    """Return what of the config a stage depends on, at the most."""
    settings = cli.config_dict(config)
    if name == "collect":
        del settings["export"]
    return "" if name == "tenants" else json.dumps(settings)


def run_stages(arg: str) -> tuple[pathlib.Path, list[str]]:
    """Bring every stage up to date; return the run's workdir and the stages that had to run."""
    config = tenants.get_config(arg)
    workdir = pathlib.Path(config.tasks).parent / f"run{suffix(config)}"
    key, ran = "", []
    for name, (command, outputs) in stages(arg).items():
        words = [part for part in command if not part.startswith("--config=")]
        key = files.sha256_text(key + code_hash(command[0]) + settings_of(config, name) + " ".join(words))
        stamp = stamp_of(config, name)
        found = files.read_json(stamp) if stamp.exists() else {}
        if found.get("key") != key:
            for path in map(pathlib.Path, outputs):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif found["seconds"] is not None and all(pathlib.Path(path).exists() for path in outputs):
            continue
        files.write_json(stamp, {"key": key, "seconds": None})
        began = time.perf_counter()
        print(f"== {name}: python -m {' '.join(command)}", flush=True)
        test = next((t for t, entry in _tasks(config.tasks).items() if entry["split"] == "test"), "")
        done = subprocess.run([sys.executable, "-m", *(part.replace("{test}", test) for part in command)])
        if done.returncode:
            raise InputError(f"python -m {command[0]} ended with status {done.returncode}; the same command goes on from there")
        if name == "train":
            workdirs.check_trained(config, workdir)
        files.write_json(stamp, {"key": key, "seconds": round(time.perf_counter() - began, 1)})
        ran.append(name)
    return workdir, ran


def code_hash(module: str) -> str:
    """Return hashes of a module's file and of those in this folder that it imports, directly or not."""
    finder = modulefinder.ModuleFinder(["."])
    finder.run_script(f"{module.replace('.', '/')}.py")
    modules: dict[str, Any] = finder.modules
    return "".join(sorted(files.sha256_file(found.__file__) for found in modules.values() if found.__file__))


def _tasks(path: str) -> dict[str, dict[str, str]]:
    return files.read_json(path) if pathlib.Path(path).exists() else {}


def define_flags() -> None:
    flags.DEFINE_string("arg", "", "Argument of experiments/configs/tenants.py.")


def main(args: Any) -> None:
    try:
        config = tenants.get_config(args.arg)
    except ValueError as error:
        raise InputError(f"--arg={args.arg}: {error}") from error
    workdir, ran = run_stages(args.arg)
    seconds = {name: files.read_json(stamp_of(config, name))["seconds"] for name in stages(args.arg)}
    if "evaluate" not in ran:
        print(report.table(files.read_json(workdir / "report.json")))
    print(f"\n{workdir}/report.html; seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
          + f", together {sum(seconds.values()):.0f}")


if __name__ == "__main__":
    cli.run(main, define_flags)
