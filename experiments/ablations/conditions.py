"""What a condition is made of, and of how many prompts: decoders that differ in nothing else, on the ordinary ladder.

    python -m experiments.ablations.conditions --config=experiments/configs/tenants.py
    python -m experiments.ablations.conditions --config=experiments/configs/tenants.py --variants=form-answer,prompts-28

Needs the tenants' adapters, as `make demo` leaves them. Exports, trains and evaluates every variant under
`build/tenants/conditions/<variant>/{store,run}`; one that has a report is left as it is, so delete its folder to redo it, as with
other settings of collecting or training. Each trains as long as the demo does: with a quarter of its steps no decoder has learned
to tell tasks apart yet. Forms with an answer need labels of the held-out task, which plain prompts don't; of one prompt in 18,
which names its notation, the answer is cut off. `conditions.ipynb` reads the reports.
"""

import pathlib
from typing import Any

import ml_collections
from absl import flags

from data_pipeline import export
from dnd_jax import cli, evaluate, files, train, workdirs
from dnd_jax.types import InputError

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"form-{form}": {"form": form} for form in export.FORMS},
    **{f"prompts-{count}": {"prompts": count} for count in (4, 7, 28)},  # the forms have the config's
}


def folder_of(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Return where the variants are, beside the list of tasks; raise InputError where that is no file of its own."""
    if not isinstance(config.tasks, str):
        raise InputError("config.tasks is a table, expected the name of a file, beside which the variants are written")
    return pathlib.Path(config.tasks).parent / "conditions"


def vary(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Return the variant's config; `config` stays as it is."""
    changed = config.copy_and_resolve_references().unlock()
    changed.condition.update(VARIANTS[variant])
    changed.export.store = str(folder_of(config) / variant / "store")
    return changed.lock()


def run(config: ml_collections.ConfigDict, variant: str) -> None:
    """Bring one variant to its report, stage by stage."""
    changed, workdir = vary(config, variant), folder_of(config) / variant / "run"
    workdirs.check_config(changed, workdir)
    if (workdir / "report.json").exists():
        print(f"{variant}: has its report")
        return
    print(f"== {variant}", flush=True)
    export.export(changed)
    train.run(changed, workdir)
    workdirs.check_trained(changed, workdir)
    evaluate.climb(changed, workdir)


def load(folder: files.PathLike) -> dict[str, dict[str, Any]]:
    """Return the reports that are there, by variant, in the order of VARIANTS, with the prompts of a condition as `prompts`.

    Raises:
      InputError: none is there.
    """
    paths = {name: pathlib.Path(folder, name, "run", "report.json") for name in VARIANTS}
    found = {name: path for name, path in paths.items() if path.exists()}
    if not found:
        raise InputError(f"{folder}: holds no report, run experiments.ablations.conditions first")
    return {name: files.read_json(path) | {"prompts": files.read_json(path.parent / "config.json")["condition"]["prompts"]}
            for name, path in found.items()}


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_list("variants", list(VARIANTS), f"Some of {', '.join(VARIANTS)}.")


def main(args: Any) -> None:
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        raise InputError(f"command line: --variants has {unknown}, expected some of {list(VARIANTS)}")
    for variant in args.variants:
        run(args.config, variant)


if __name__ == "__main__":
    cli.run(main, define_flags)
