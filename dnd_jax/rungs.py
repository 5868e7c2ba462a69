"""The rungs of the ladder: which adapter each gives a task, and what they share.

What a rung chooses, it chooses on validation tasks; without these, the rungs that choose are left out.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from dnd_jax import adapters, base_models, baselines, checksums, embeddings, encoders, pairs, prompts, scoring
from dnd_jax.adapters import Spec
from dnd_jax.baselines import Flat
from dnd_jax.generate import Generator
from dnd_jax.scoring import kinds
from dnd_jax.scoring.kinds import Scores
from dnd_jax.settings import check_store
from dnd_jax.sources import Row
from dnd_jax.tasks import SPLITS, digest, multi_task, read_tasks, step_folders
from dnd_jax.types import InputError

DRAWN = ("nearest", "weighted_topk", "ridge", "ridge_wide", "dnd", "dnd_shuffled", "dnd_random_text")  # by the prompts drawn
RIDGE_NUMBERS = 2**27  # features of all samples, 1 GB as float64; kinds by position that have more are left out
Features = Callable[[np.ndarray], np.ndarray]
Adapter = tuple[Flat, Spec]
MakeAdapter = Callable[[pairs.Task, int], Adapter]


class Evaluation:
    """What all rungs share: tasks with their rows, the training adapters, the base model, prompt draws."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.e = config, config.evaluate
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
        self.collected = {task.name: self._read(task.name) for task in (*self.train, *self.test)}
        self.multi_task = self._read(multi_task(listed))
        self.train_adapters = [self.collected[task.name][0] for task in self.train]
        self.embeddings = np.stack([embeddings.pool(task.condition) for task in self.train])
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
        check_exported(folder, run, self.store)
        tree, spec = adapters.read(step_folders(folder)[-1])
        return flatten_dict(tree, sep="/"), spec

    def with_carried(self, flat: Flat) -> Adapter:
        """Return an adapter of matrices that no run gave, with what the store's adapters hold beside A and B."""
        return flat, self.store.spec

    def draw(self, task: pairs.Task, draw: int) -> np.ndarray:
        """Return the condition `[N, L, C]` of one prompt draw; the same for every rung."""
        return pairs.condition_of(task, self.config.seed, draw, self.generator.prompts)

    def score_task(self, task: pairs.Task, **how: Any) -> Scores:
        """Score what the model answers to a task as it is now."""
        valid = {row.response for part in self.rows.values() for row in part[task.name]}
        return self.score_rows(self.e.scoring, self.rows["test"][task.name], valid=valid, **how)

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
    check_store(config, store)

    def compare(what: str, found: Any, expected: Any, place: str = workdir) -> None:
        if found != expected:
            raise InputError(f"{place}: {what} {str(found)[:300]}, {store.folder} says {str(expected)[:300]}")

    compare("its layout is", about["layout"], store.manifest["layout"])
    compare("its encoder is", about["encoder"], store.manifest["encoder"])
    if about["embeddings"]:  # a decoder from elsewhere may have none
        compare("it was trained on", sorted(about["embeddings"]), sorted(task.name for task in store.split("train")))
    for name, known in about["runs_sha256"].items():
        if None not in (known, store.run_of(name)):  # not of runs without hashes
            compare(f"it was trained on adapters of {name} with sha256", known, store.run_of(name))
    splits = {name: entry["split"] for name, entry in store.manifest["tasks"].items()}
    for name in sorted(splits.keys() | listed.keys()):
        compare(f"the split of {name} is", listed.get(name), splits.get(name), "config.tasks")
    compare("its form is", about["form"], store.manifest["form"])
    if None not in (about["encoder_sha256"], store.manifest["encoder_sha256"]):  # not of every hub's encoder
        compare("its encoder_sha256 is", about["encoder_sha256"], store.manifest["encoder_sha256"])
    encoders.check_same(about)
    found, known = base_models.identity(config.base), store.manifest["base"]
    if not base_models.is_same(found, known):
        compare(f"{config.base} has sha256", found["sha256"], known["sha256"], "config.base")


def check_exported(folder: pathlib.Path, run: str, store: pairs.Store) -> None:
    """Raise InputError unless a run is the one that the store was made of, as far as the store knows."""
    found, known = digest(folder), store.run_of(run)
    if None not in (found, known) and found != known:
        raise InputError(f"{folder}: its adapters have sha256 {str(found)[:12]}..., those that {store.folder} was made of "
                         f"{str(known)[:12]}...; export again, and train a decoder on that")


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
    return embeddings.similarities(embeddings.pool(ev.draw(task, draw)), ev.embeddings)


def nearest(ev: Evaluation) -> MakeAdapter:
    """Take the training adapter of the most similar prompts."""
    return lambda task, draw: ev.collected[ev.train[int(np.argmax(similarities(ev, task, draw)))].name]


def top_k(ev: Evaluation, k: int, temperature: float) -> MakeAdapter:
    """Weigh the k training adapters of the most similar prompts."""
    def make(task: pairs.Task, draw: int) -> Adapter:
        weights = baselines.top_k_weights(similarities(ev, task, draw), k, temperature)
        return ev.with_carried(baselines.weighted_mean(ev.train_adapters, weights))
    return make


def ridges(ev: Evaluation, kinds: Mapping[str, Features]) -> Iterator[tuple[str, MakeAdapter]]:
    """Regress training adapters on features of many prompt draws of the decoder's size, one kind and penalty after the other."""
    draws = [(task, draw) for task in ev.train for draw in range(100, 100 + ev.e.ridge_draws)]
    for kind, features in kinds.items():
        if "position" in kind and len(draws) * features(ev.draw(*draws[0])).size > RIDGE_NUMBERS:
            continue
        x = np.stack([features(ev.draw(task, draw)) for task, draw in draws])
        for penalty in ev.e.penalties:
            yield f"{kind}, penalty {penalty}", ridge(ev, features, baselines.Ridge(x, ev.train_adapters, penalty))


def ridge(ev: Evaluation, features: Features, model: baselines.Ridge) -> MakeAdapter:
    """Predict by a ridge regression on features."""
    return lambda task, draw: ev.with_carried(model(features(ev.draw(task, draw))))


def generated(ev: Evaluation, shuffled: bool = False) -> MakeAdapter:
    """Generate from the task's prompts; if `shuffled`, from the next test task's, or another task's if that is the only one."""
    others = ev.test if len(ev.test) > 1 else [*ev.test, *ev.validation, *ev.train]

    def make(task: pairs.Task, draw: int) -> Adapter:
        source = others[(others.index(task) + 1) % len(others)] if shuffled else task
        return ev.with_carried(flatten_dict(ev.generator(ev.draw(source, draw)), sep="/"))
    return make


def random_text(ev: Evaluation) -> MakeAdapter:
    """Generate from random strings in place of prompts."""
    encoder = encoders.make(ev.generator.about["encoder"])  # whose files `check_belonging` has compared
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))

    def make(task: pairs.Task, draw: int) -> Adapter:
        rng = np.random.default_rng((ev.config.seed, pairs.RANDOM_TEXT, draw, *task.name.encode()))
        texts = ["".join(rng.choice(letters, 40)) for _ in range(ev.generator.prompts)]
        return ev.with_carried(flatten_dict(ev.generator(encoder(texts)), sep="/"))
    return make


def choosing_rungs(ev: Evaluation) -> dict[str, tuple[MakeAdapter, str]]:
    """Return the rungs that leave something open, and what is best on the validation tasks."""
    single, use_single = best_single(ev)
    (k, temperature), use_top_k = ev.best([((k, t), top_k(ev, k, t)) for k in ev.e.top_k for t in ev.e.temperatures])
    pooled, use_ridge = ev.best(ridges(ev, {"pooled": embeddings.pool}))
    wide, use_wide = ev.best(ridges(ev, embeddings.WIDE))
    return {"best_single": (use_single, single), "weighted_topk": (use_top_k, f"k = {k}, temperature {temperature}"),
            "ridge": (use_ridge, pooled), "ridge_wide": (use_wide, wide)}


def adapter_rungs(ev: Evaluation) -> dict[str, tuple[MakeAdapter, str]]:
    """Return every rung that is an adapter of the store's rank, with what it chose on the validation tasks."""
    rng = np.random.default_rng((ev.config.seed, pairs.RANDOM_ADAPTER))
    return {
        "mean_adapter": (fixed(ev.with_carried(baselines.weighted_mean(ev.train_adapters, np.ones(len(ev.train_adapters))))), ""),
        **(choosing_rungs(ev) if ev.validation else {}),
        "nearest": (nearest(ev), ""),
        "random": (fixed(ev.with_carried(baselines.random_like(ev.train_adapters, rng))), ""),
        "multi_task": (fixed(ev.multi_task), ""),
        "dnd": (generated(ev), f"step {ev.generator.step}"),
        "dnd_shuffled": (generated(ev, shuffled=True), ""),
        "dnd_random_text": (random_text(ev), ""),
        "in_task": (lambda task, draw: ev.collected[task.name], ""),
    }
