"""Dataset files as tasks of lm-evaluation-harness, scored as here: by its own multiple choice, or by our functions.

A task folder holds the rows, rendered for one base's tokenizer, and a YAML file a task; names of tasks end in the metric's. Use:

    lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --include_path FOLDER --tasks NAME_loglikelihood
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnd_jax import base_models, files, folders, prompts
from dnd_jax.scoring import choice, final_answer
from dnd_jax.sources import Row
from dnd_jax.types import InputError

UTILS = '''"""How dnd_jax scores answers, which has to be installed or on PYTHONPATH."""

from dnd_jax.scoring.harness import process_results  # noqa: F401
'''
KINDS = ("exact", "choice", "final_answer")


def export(folder: files.PathLike, name: str, kind: str, rows: Sequence[Row], base: str, max_new_tokens: int) -> list[str]:
    """Write a task folder, replacing one of the same kind; return the names of its tasks.

    Raises:
      InputError: a kind that the harness has no safe or equal form of, or a row with images.
    """
    if kind not in KINDS:
        raise InputError(f"--scoring={kind} can't be exported, only {KINDS}: lm-evaluation-harness runs code without isolation, "
                         "and its models take no images here")
    if any(row.images for row in rows):
        raise InputError(f"{name}: a row has images, which aren't exported")
    tokenizer = base_models.load_tokenizer(base)
    options = choice.options(rows, name) if kind == "choice" else [[] for _ in rows]
    lines = [json.dumps({"context": prompts.prompt_text(tokenizer, row), "response": row.response, "kind": kind, "options": found,
                         "gold": found.index(row.response.strip()) if found else 0}, ensure_ascii=False)
             for row, found in zip(rows, options, strict=True)]
    data = pathlib.Path(folder).resolve() / "rows.jsonl"
    common: dict[str, Any] = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "context", "target_delimiter": ""}
    answer = {
        "output_type": "generate_until", "doc_to_target": "response", "process_results": "!function utils.process_results",
        "generation_kwargs": {"until": [tokenizer.eos_token], "do_sample": False, "repetition_penalty": 1.0,
                              "max_gen_toks": max_new_tokens},
        "metric_list": [_metric(kind), _metric("unparsable")]}
    tasks = {f"{name}_{kind}": common | answer}
    if kind == "choice":
        tasks[f"{name}_loglikelihood"] = common | {"output_type": "multiple_choice", "doc_to_choice": "options",
                                                   "doc_to_target": "gold", "metric_list": [_metric("acc")]}
    with folders.atomic_folder(folder, "rows.jsonl") as temporary:
        (temporary / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (temporary / "utils.py").write_text(UTILS)
        for task, settings in tasks.items():
            # JSON is YAML, but for the tag, which must not be quoted
            text = json.dumps({"task": task, **settings}, indent=1, ensure_ascii=False)
            (temporary / f"{task}.yaml").write_text(text.replace('"!function utils.process_results"',
                                                                 "!function utils.process_results") + "\n", encoding="utf-8")
    return list(tasks)


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": name != "unparsable"}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer; the harness calls this."""
    rows, answers = [Row("", doc["response"])], [results[0].strip()]
    kind = doc["kind"]
    if kind == "exact":
        right, unparsable = np.array([answers[0] == doc["response"].strip()]), np.zeros(1)
    elif kind == "choice":
        right, unparsable = choice.by_answer(answers, [doc["options"]], rows)
    else:
        right, unparsable = final_answer.correct(answers, rows)
    return {kind: float(right[0]), "unparsable": float(unparsable[0])}
