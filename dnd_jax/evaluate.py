"""Evaluate generated adapters on held-out tasks, beside every baseline that could explain them away.

    python -m dnd_jax.evaluate --config=experiments/configs/tenants.py --workdir=build/tenants/run

Writes `report.json` and `report.html` to the workdir. What a rung chooses, it chooses on validation tasks; without these, the
rungs that choose are left out. Answers are scored by `config.evaluate.scoring`, one of `scoring.kinds`.

    python -m dnd_jax.evaluate --base=Qwen/Qwen2.5-0.5B-Instruct --data=FILE.json --scoring=choice [--adapter=DIR]

scores one dataset file, see `score`.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from dnd_jax import baselines, cli, encoders, files, harm, logs, pairs, report, score
from dnd_jax.adapters.profiles import beyond_lora
from dnd_jax.audit import audit
from dnd_jax.rungs import DRAWN, Adapter, Evaluation, adapter_rungs, generated
from dnd_jax.scoring import kinds
from dnd_jax.scoring.kinds import Scores
from dnd_jax.sources import Row
from dnd_jax.types import InputError


def check(e: ml_collections.ConfigDict) -> None:
    """Raise InputError at settings of `config.evaluate` that no rung can be asked with."""
    for pair in e.unrelated:
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"config.evaluate.unrelated has {pair!r}, expected pairs of a file and its scoring, as "
                             "(('MMLU_test.json', 'choice'),)")
    for kind in (e.scoring, *(kind for _, kind in e.unrelated)):
        kinds.check(kind)
    for field, least in {"draws": 1, "batch_size": 1, "max_new_tokens": 1, "samples": 1, "in_context_examples": 0,
                         "ridge_draws": 1}.items():
        if e[field] < least:
            raise InputError(f"config.evaluate.{field} is {e[field]}, expected at least {least}")
    for field in ("top_k", "temperatures", "penalties"):
        if not e[field] or min(e[field]) <= 0:
            raise InputError(f"config.evaluate.{field} is {tuple(e[field])}, expected positive numbers, one at least")
    if e.temperature <= 0:
        raise InputError(f"config.evaluate.temperature is {e.temperature}, expected a positive number")


def ask_all(ev: Evaluation) -> tuple[dict[str, list[list[Scores]]], dict[str, str]]:
    """Return the scores of every rung by test task and prompt draw, and what the rungs chose."""
    examples = [ev.rows["train"][task.name][: ev.e.in_context_examples] for task in ev.test]
    scores = {"base": [[ev.score_task(task, adapter=False)] for task in ev.test],
              "in_context": [[ev.score_task(task, adapter=False, examples=shown)]
                             for task, shown in zip(ev.test, examples, strict=True)]}
    if more := beyond_lora(ev.store.spec):
        print(f"mean_product is left out: the adapters have {', '.join(more)}")
    else:
        ev.use(baselines.mean_product(ev.train_adapters, ev.store.spec))
        scores["mean_product"] = [[ev.score_task(task)] for task in ev.test]
    rungs = adapter_rungs(ev)
    for name, (make, _) in tqdm(rungs.items(), desc="rungs"):
        draws = ev.e.draws if name in DRAWN else 1
        scores[name] = [[ev.score_adapter(make(task, d), task) for d in range(draws)] for task in ev.test]
    return scores, {name: note for name, (_, note) in rungs.items() if note}


def harms(ev: Evaluation) -> dict[str, Any]:
    """Score the generated and the in-task adapters on `config.evaluate.unrelated`."""
    def ask(kind: str, rows: Sequence[Row], adapter: Adapter | None) -> Scores:
        if adapter is not None:
            ev.use(adapter)
        return ev.score_rows(kind, rows, valid={row.response for row in rows}, adapter=adapter is not None)

    made = {"dnd": [generated(ev)(task, 0) for task in ev.test], "in_task": [ev.collected[task.name] for task in ev.test]}
    return harm.measure(ev.unrelated, made, ask)


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(ev: Evaluation, workdir: pathlib.Path) -> dict[str, float | None]:
    """Return seconds of collecting, training, generating, and how many adapters pay them back against in-task training.

    Generating is from prompts to weights, the encoder's part included.

    A figure is None where it isn't known, as for runs and decoders from elsewhere; `adapters_to_break_even` also where in-task
    training takes no longer than generating.
    """
    collect_s = _sum([_collect_s(ev, task) for task in (*ev.train, *ev.validation)])
    in_task_s = _sum([_collect_s(ev, task) for task in ev.test], of=len(ev.test))
    log = logs.read_metrics(workdir) if (workdir / logs.NAME).exists() else []
    train_s = log[-1].get("seconds") if log else None
    generate_s = _generate_s(ev, ev.test[0])
    pays = None
    if collect_s is not None and train_s is not None and in_task_s is not None and in_task_s > generate_s:
        pays = (collect_s + train_s) / (in_task_s - generate_s)
    return {"collect_s": collect_s, "train_s": train_s, "generate_s": generate_s, "in_task_s": in_task_s,
            "adapters_to_break_even": pays}


def _generate_s(ev: Evaluation, task: pairs.Task) -> float:
    """Return the median time from a draw of a task's prompts to weights, after a first one that compiles and warms up."""
    encoder, seconds = encoders.make(ev.generator.about["encoder"]), []
    for draw in range(11):
        texts = [task.prompts[i] for i in pairs.drawn(task, ev.config.seed, draw, ev.generator.prompts)]
        began = time.perf_counter()
        ev.generator(encoder(texts))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def _collect_s(ev: Evaluation, task: pairs.Task) -> float | None:
    path = pathlib.Path(ev.config.collect.out) / task.name / "run.json"
    return files.read_json(path).get("seconds") if path.exists() else None


def _sum(seconds: Sequence[float | None], of: int = 1) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) / of if len(known) == len(seconds) else None


def define_flags() -> None:
    cli.define_config(required=False)
    flags.DEFINE_string("workdir", None, "Folder of a training run.")
    flags.DEFINE_bool("despite_findings", False, "Go on whatever the audit finds, and report it.")
    score.define_flags()


def main(args: Any) -> None:
    if args.data is not None:
        return score.main(args)
    if given := [name for name in score.FLAGS if args[name].present]:
        raise InputError(f"command line: --{' and --'.join(given)} without --data; of the ladder config.evaluate says what is "
                         "asked, and --workdir where the report is written")
    if args.config is None or args.workdir is None:
        raise InputError("command line: expected --config and --workdir, for the ladder, or --base and --data, for one file")
    return climb(args.config, pathlib.Path(args.workdir), args.despite_findings)


def climb(config: ml_collections.ConfigDict, workdir: pathlib.Path, despite_findings: bool = False) -> None:
    """Ask for every rung on the test tasks and write the report; raise InputError at what the audit finds, or else report it."""
    check(config.evaluate)
    ev = Evaluation(config, workdir)
    found = audit({task.name: ev.rows["test"][task.name] for task in (*ev.test, *ev.validation)}, ev.rows["train"])
    if found["findings"] and not despite_findings:
        raise InputError(f"{config.tasks}: {'; '.join(found['findings'])}")
    result = report.summarise(*ask_all(ev), [task.name for task in ev.test])
    result |= {"form": ev.store.manifest["form"], "harm": harms(ev), "cost": cost(ev, workdir), "audit": found,
               "checkpoint": ev.generator.step}
    cli.say(report.table(result))  # first, so that it is not lost where the report can't be written
    report.write(result, workdir)


if __name__ == "__main__":
    cli.run(main, define_flags)
