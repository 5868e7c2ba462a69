"""Evaluate generated adapters on held-out tasks, beside every baseline that could explain them away.

    python -m dnd_jax.evaluate --config=experiments/configs/tenants.py --workdir=build/tenants/run

Writes `report.json` and `report.html` to the workdir. What a rung chooses, it chooses on validation tasks; without these, the
rungs that choose are left out. Answers are scored by `config.evaluate.scoring`, one of `scoring.kinds`.

    python -m dnd_jax.evaluate --base=Qwen/Qwen2.5-0.5B-Instruct --data=FILE.json --scoring=choice [--adapter=DIR]

scores one dataset file, see `score`.
"""

import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from dnd_jax import adapters, baselines, checksums, cli, encoders, files, harm, logs, pairs, prompts, report, score, scoring
from dnd_jax.adapters import Spec
from dnd_jax.adapters.profiles import beyond_lora
from dnd_jax.audit import audit
from dnd_jax.baselines import Flat
from dnd_jax.generate import Generator
from dnd_jax.prompts import Row
from dnd_jax.scoring import kinds
from dnd_jax.scoring.kinds import Scores
from dnd_jax.tasks import MULTI_TASK, SPLITS, read_tasks, step_folders
from dnd_jax.types import InputError

Adapter = tuple[Flat, Spec]
MakeAdapter = Callable[[pairs.Task, int], Adapter]


class Evaluation:
    """What all rungs share: tasks with their rows, the training adapters, the base model, prompt draws."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.e = config, config.evaluate
        check(self.e)
        self.unrelated = [(path, kind, prompts.read_rows(path)) for path, kind in self.e.unrelated]
        self.store = pairs.open_store(config.export.store)
        self.generator = Generator(workdir)
        listed = read_tasks(config.tasks)
        check_belonging(config, self.store, self.generator.about, str(workdir), {task.name: task.split for task in listed})
        self.rows = {"train": {task.name: prompts.read_rows(task.train) for task in listed},
                     "test": {task.name: prompts.read_rows(task.test) for task in listed if task.test}}
        self.train, self.validation, self.test = (self.store.split(s) for s in SPLITS)
        if not self.test:
            raise InputError(f"{config.export.store}: has no test task, on which the rungs are compared; give a task that split")
        self._check_rows({task.name: task.test or task.train for task in listed})
        self.collected = {name: self._read(name) for name in (*(task.name for task in (*self.train, *self.test)), MULTI_TASK)}
        self.known = [self.collected[task.name][0] for task in self.train]
        self.embeddings = np.stack([baselines.pool(task.condition) for task in self.train])
        self.model = scoring.Model(config.base, self.store.spec, self.e.batch_size, self.e.max_new_tokens)

    def _check_rows(self, sources: Mapping[str, Any]) -> None:
        """Raise InputError at what a rung would fail on after hours: a task without test rows, rows that can't be scored."""
        for task in (*self.validation, *self.test):
            if task.name not in self.rows["test"]:
                raise InputError(f"{self.config.tasks}: {task.name} names no 'test' file, on which the rungs are compared")
            kinds.check_rows(self.e.scoring, self.rows["test"][task.name], str(sources[task.name]))
        for path, kind, rows in self.unrelated:
            kinds.check_rows(kind, rows, path)

    def _read(self, run: str) -> Adapter:
        """Return the last checkpoint of a collected run, as it is; raise InputError if it isn't what was written."""
        folder = pathlib.Path(self.config.collect.out) / run
        if fault := checksums.fault(folder):
            raise InputError(f"{folder}/{fault}; move the run away and collect it again")
        tree, spec = adapters.read(step_folders(folder)[-1])
        return flatten_dict(tree, sep="/"), spec

    def made(self, flat: Flat) -> Adapter:
        """Return an adapter that no run gave, with what those of the store hold beside A and B."""
        return flat, self.store.spec

    def draw(self, task: pairs.Task, draw: int) -> np.ndarray:
        """Return the condition `[N, L, C]` of one prompt draw; the same for every rung."""
        return pairs.condition_of(task, self.config.seed, draw, self.generator.prompts)

    def score_task(self, task: pairs.Task, **how: Any) -> Scores:
        """Score what the model answers to a task as it is now."""
        known = {row.response for part in self.rows.values() for row in part[task.name]}
        return self.score_rows(self.e.scoring, self.rows["test"][task.name], known=known, **how)

    def score_rows(self, kind: str, rows: Sequence[Row], **how: Any) -> Scores:
        """Score what the model answers to rows as it is now."""
        return kinds.score(kind, self.model, rows, samples=self.e.samples, temperature=self.e.temperature, **how)

    def use(self, adapter: Adapter) -> None:
        """Let the model answer with an adapter."""
        flat, spec = adapter
        self.model.use(unflatten_dict(flat, sep="/"), spec)

    def score_adapter(self, adapter: Adapter, task: pairs.Task) -> Scores:
        """Score what the model answers to a task with an adapter."""
        self.use(adapter)
        return self.score_task(task)

    def validate(self, make: MakeAdapter) -> float:
        """Return the mean over validation tasks and prompt draws of the mean score on a task's rows."""
        return float(np.mean([self.score_adapter(make(task, d), task).main.mean()
                              for task in self.validation for d in range(self.e.draws)]))

    def best(self, candidates: Iterable[tuple[Any, MakeAdapter]]) -> tuple[Any, MakeAdapter]:
        """Return the candidate that is best on validation tasks, the first of equals."""
        return max(candidates, key=lambda candidate: self.validate(candidate[1]))


def check(e: ml_collections.ConfigDict) -> None:
    """Raise InputError at settings of `config.evaluate` that no rung can be asked with."""
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


def check_belonging(config: ml_collections.ConfigDict, store: pairs.Store, about: dict[str, Any], workdir: str,
                    listed: Mapping[str, str]) -> None:
    """Raise InputError unless config, store, decoder and base are of one experiment, so that what is held out is held out.

    Args:
      config: of the experiment.
      store: that of the config.
      about: what the decoder's checkpoint says of itself.
      workdir: for messages.
      listed: the split of each task of the config.
    """
    def compare(what: str, found: Any, expected: Any, place: str = workdir) -> None:
        if found != expected:
            raise InputError(f"{place}: {what} {str(found)[:300]}, {store.folder} says {str(expected)[:300]}")

    compare("its layout is", about["layout"], store.manifest["layout"])
    compare("its encoder is", about["encoder"], store.manifest["encoder"])
    if about["embeddings"]:  # a decoder from elsewhere may have none
        compare("it was trained on", sorted(about["embeddings"]), sorted(task.name for task in store.split("train")))
    for name, entry in store.manifest["tasks"].items():
        compare(f"the split of {name} is", listed.get(name), entry["split"], "config.tasks")
    known = store.manifest["base"]["sha256"]
    compare(f"{config.base} has sha256", prompts.base_identity(config.base)["sha256"], known, "config.base")


# --- rungs -----------------------------------------------------------------------------------------------------------


def fixed(adapter: Adapter) -> MakeAdapter:
    """Return the rung that gives every task the same adapter."""
    return lambda task, draw: adapter


def best_single(ev: Evaluation) -> tuple[str, MakeAdapter]:
    """Choose the training adapter that serves the validation tasks best."""
    names = [task.name for task in ev.train]
    scores = [np.mean([ev.score_adapter(ev.collected[name], t).main.mean() for t in ev.validation])
              for name in tqdm(names, desc="best single", leave=False)]
    chosen = names[int(np.argmax(scores))]
    return chosen, fixed(ev.collected[chosen])


def similarities(ev: Evaluation, task: pairs.Task, draw: int) -> np.ndarray:
    """Return how alike a draw of a task's prompts is to those of every training task."""
    return baselines.similarities(baselines.pool(ev.draw(task, draw)), ev.embeddings)


def nearest(ev: Evaluation) -> MakeAdapter:
    """Take the training adapter of the most similar prompts."""
    return lambda task, draw: ev.collected[ev.train[int(np.argmax(similarities(ev, task, draw)))].name]


def top_k(ev: Evaluation, k: int, temperature: float) -> MakeAdapter:
    """Weigh the k training adapters of the most similar prompts."""
    def make(task: pairs.Task, draw: int) -> Adapter:
        weights = baselines.top_k_weights(similarities(ev, task, draw), k, temperature)
        return ev.made(baselines.weighted_mean(ev.known, weights))
    return make


def ridge(ev: Evaluation, penalty: float) -> MakeAdapter:
    """Regress training adapters on embeddings of many prompt draws of the decoder's size."""
    draws = range(100, 100 + ev.e.ridge_draws)
    x = np.stack([baselines.pool(ev.draw(task, d)) for task in ev.train for d in draws])
    model = baselines.Ridge(x, [flat for flat in ev.known for _ in draws], penalty)
    return lambda task, draw: ev.made(model(baselines.pool(ev.draw(task, draw))))


def generated(ev: Evaluation, shuffled: bool = False) -> MakeAdapter:
    """Generate from the task's prompts, or shuffled from those of the next test task; of another task if there is one only."""
    others = ev.test if len(ev.test) > 1 else [*ev.test, *ev.validation, *ev.train]

    def make(task: pairs.Task, draw: int) -> Adapter:
        source = others[(others.index(task) + 1) % len(others)] if shuffled else task
        return ev.made(flatten_dict(ev.generator(ev.draw(source, draw)), sep="/"))
    return make


def random_text(ev: Evaluation) -> MakeAdapter:
    """Generate from random strings in place of prompts."""
    encoder = encoders.of_decoder(ev.generator.about)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))

    def make(task: pairs.Task, draw: int) -> Adapter:
        rng = np.random.default_rng((ev.config.seed, 3, draw, *task.name.encode()))
        texts = ["".join(rng.choice(letters, 40)) for _ in range(ev.generator.prompts)]
        return ev.made(flatten_dict(ev.generator(encoder(texts)), sep="/"))
    return make


def choosing_rungs(ev: Evaluation) -> dict[str, tuple[MakeAdapter, str]]:
    """Return the rungs that leave something open, and what is best on the validation tasks."""
    single, use_single = best_single(ev)
    (k, temperature), use_top_k = ev.best([((k, t), top_k(ev, k, t)) for k in ev.e.top_k for t in ev.e.temperatures])
    penalty, use_ridge = ev.best((p, ridge(ev, p)) for p in ev.e.penalties)
    return {"best_single": (use_single, single), "weighted_topk": (use_top_k, f"k = {k}, temperature {temperature}"),
            "ridge": (use_ridge, f"penalty {penalty}")}


def adapter_rungs(ev: Evaluation) -> dict[str, tuple[MakeAdapter, str]]:
    """Return every rung that is an adapter of the store's rank, with what it chose on the validation tasks."""
    rng = np.random.default_rng((ev.config.seed, 4))
    return {
        "mean_adapter": (fixed(ev.made(baselines.weighted_mean(ev.known, np.ones(len(ev.known))))), ""),
        **(choosing_rungs(ev) if ev.validation else {}),
        "nearest": (nearest(ev), ""),
        "random": (fixed(ev.made(baselines.random_like(ev.known, rng))), ""),
        "multi_task": (fixed(ev.collected[MULTI_TASK]), ""),
        "dnd": (generated(ev), f"step {ev.generator.step}"),
        "dnd_shuffled": (generated(ev, shuffled=True), ""),
        "dnd_random_text": (random_text(ev), ""),
        "in_task": (lambda task, draw: ev.collected[task.name], ""),
    }


def ask_all(ev: Evaluation) -> tuple[dict[str, list[list[Scores]]], dict[str, str]]:
    """Return the scores of every rung by test task and prompt draw, and what the rungs chose."""
    examples = [ev.rows["train"][task.name][: ev.e.in_context_examples] for task in ev.test]
    scores = {"base": [[ev.score_task(task, adapter=False)] for task in ev.test],
              "in_context": [[ev.score_task(task, adapter=False, examples=shown)]
                             for task, shown in zip(ev.test, examples, strict=True)]}
    if more := beyond_lora(ev.store.spec):
        print(f"mean_product is left out: the adapters have {', '.join(more)}")
    else:
        ev.use(baselines.mean_product(ev.known, ev.store.spec))
        scores["mean_product"] = [[ev.score_task(task)] for task in ev.test]
    rungs = adapter_rungs(ev)
    for name, (make, _) in tqdm(rungs.items(), desc="rungs"):
        draws = ev.e.draws if name in report.DRAWN else 1
        scores[name] = [[ev.score_adapter(make(task, d), task) for d in range(draws)] for task in ev.test]
    return scores, {name: note for name, (_, note) in rungs.items() if note}


def harms(ev: Evaluation) -> dict[str, Any]:
    """Score the generated and the in-task adapters on `config.evaluate.unrelated`."""
    def ask(kind: str, rows: Sequence[Row], adapter: Adapter | None) -> Scores:
        if adapter is not None:
            ev.use(adapter)
        return ev.score_rows(kind, rows, known={row.response for row in rows}, adapter=adapter is not None)

    made = {"dnd": [generated(ev)(task, 0) for task in ev.test], "in_task": [ev.collected[task.name] for task in ev.test]}
    return harm.measure(ev.unrelated, made, ask)


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(ev: Evaluation, workdir: pathlib.Path) -> dict[str, float | None]:
    """Return seconds of collecting, training, generating, and how many adapters pay them back against in-task training.

    None is what isn't known, as of runs and decoders from elsewhere, and the adapters if they never do.
    """
    collect_s = _sum([_collect_s(ev, task) for task in (*ev.train, *ev.validation)])
    in_task_s = _sum([_collect_s(ev, task) for task in ev.test], of=len(ev.test))
    log = logs.read_metrics(workdir) if (workdir / logs.NAME).exists() else []
    train_s = log[-1].get("seconds") if log else None
    seconds = []
    for draw in range(10):
        began = time.perf_counter()
        ev.generator(ev.draw(ev.test[0], draw))
        seconds.append(time.perf_counter() - began)
    generate_s = float(np.median(seconds))
    pays = None
    if collect_s is not None and train_s is not None and in_task_s is not None and in_task_s > generate_s:
        pays = (collect_s + train_s) / (in_task_s - generate_s)
    return {"collect_s": collect_s, "train_s": train_s, "generate_s": generate_s, "in_task_s": in_task_s,
            "adapters_to_break_even": pays}


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
    if given := [name for name in ("base", "scoring", "adapter", "out", "lm_eval") if getattr(args, name) is not None]:
        raise InputError(f"command line: --{' and --'.join(given)} without --data; of the ladder config.evaluate says what is "
                         "asked, and --workdir where the report is written")
    if args.config is None or args.workdir is None:
        raise InputError("command line: expected --config and --workdir, for the ladder, or --base and --data, for one file")
    return climb(args.config, pathlib.Path(args.workdir), args.despite_findings)


def climb(config: ml_collections.ConfigDict, workdir: pathlib.Path, despite_findings: bool = False) -> None:
    """Ask for every rung on the test tasks and write the report; raise InputError at what the audit finds, or else report it."""
    ev = Evaluation(config, workdir)
    found = audit({task.name: ev.rows["test"][task.name] for task in (*ev.test, *ev.validation)}, ev.rows["train"])
    if found["findings"] and not despite_findings:
        raise InputError(f"{config.tasks}: {'; '.join(found['findings'])}")
    result = report.summarise(*ask_all(ev), [task.name for task in ev.test])
    result |= {"form": ev.store.manifest.get("form", "prompt"), "harm": harms(ev), "cost": cost(ev, workdir), "audit": found,
               "checkpoint": ev.generator.step}
    print(report.table(result), flush=True)
    report.write(result, workdir)


if __name__ == "__main__":
    cli.run(main, define_flags)
