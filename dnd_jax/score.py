"""Score one dataset file on a base model, alone or with an adapter; or write it as a task of lm-evaluation-harness.

    python -m dnd_jax.evaluate --base=Qwen/Qwen2.5-0.5B-Instruct --data=ARC-c_test.json --scoring=choice --adapter=adapters/new
    python -m dnd_jax.evaluate --base=Qwen/Qwen2.5-0.5B-Instruct --data=ARC-c_test.json --scoring=choice --lm_eval=tasks/ARC-c

The file may be JSON, JSON lines or a folder saved by `datasets`, as in `sources`; of `code`, its responses are the tests.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dnd_jax import adapters, files, prompts
from dnd_jax.scoring import Model, harness, kinds
from dnd_jax.sources import Row
from dnd_jax.types import InputError

FLAGS = ("base", "scoring", "adapter", "out", "lm_eval", "batch_size", "max_new_tokens", "samples", "temperature")  # with --data


def define_flags() -> None:
    flags.DEFINE_string("base", None, "Folder or hub name of the base model; with --data.")
    flags.DEFINE_string("data", None, "Dataset file to score, instead of the ladder.")
    flags.DEFINE_string("scoring", None, f"One of {', '.join(kinds.KINDS)}; by default exact; with --data.")
    flags.DEFINE_string("adapter", None, "Adapter folder; without, the base alone is scored; with --data.")
    flags.DEFINE_string("out", None, "JSON file for the scores; with --data.")
    flags.DEFINE_string("lm_eval", None, "Write a task folder of lm-evaluation-harness there instead of scoring; with --data.")
    flags.DEFINE_integer("batch_size", 32, "Rows asked at once; with --data.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Of an answer; with --data.", lower_bound=1)
    flags.DEFINE_integer("samples", 10, "Answers to each row, of code; with --data.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "Of the samples; with --data.", lower_bound=1e-3)


def main(args: Any) -> None:
    scoring = args.scoring or "exact"
    kinds.check(scoring)
    if args.base is None:
        raise InputError(f"command line: --data={args.data} needs --base")
    rows = prompts.read_rows(args.data)
    kinds.check_rows(scoring, rows, args.data)
    if args.lm_eval and (args.adapter or args.out):
        raise InputError("command line: --adapter and --out are of scoring, not of --lm_eval, which writes a task folder only")
    if args.lm_eval:
        names = harness.export(args.lm_eval, pathlib.Path(args.data).stem, scoring, rows, args.base, args.max_new_tokens)
        print(f"{args.lm_eval}: {len(rows)} rows; with dnd_jax installed or on PYTHONPATH\n"
              f"lm_eval --model hf --model_args pretrained={args.base},peft=ADAPTER --include_path {args.lm_eval} --tasks "
              f"{','.join(names)}")
        return
    tree, spec = adapters.read(args.adapter) if args.adapter else (None, None)
    model = Model(args.base, spec, args.batch_size, args.max_new_tokens)
    if spec:
        model.use(tree, spec)
    result = {"base": args.base, "adapter": args.adapter, "data": args.data, "scoring": scoring}
    result |= summary(scoring, model, rows, args.samples, args.temperature)
    values = {**result["metrics"], "unparsable": result["unparsable"]}
    print(", ".join(f"{name} {value:.1%}" for name, value in values.items()), f"of {len(rows)} rows", flush=True)
    if args.out:
        files.write_json(args.out, result)


def summary(kind: str, model: Model, rows: Sequence[Row], samples: int, temperature: float) -> dict[str, Any]:
    """Return the number of rows, the mean of every metric and the rate of answers that can't be parsed."""
    valid = {row.response for row in rows}
    scores = kinds.score(kind, model, rows, valid=valid, samples=samples, temperature=temperature)
    return {"n": len(rows), "metrics": {name: float(values.mean()) for name, values in scores.metrics.items()},
            "unparsable": float(scores.unparsable.mean())}
