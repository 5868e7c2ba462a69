"""Coding, Qwen2.5-1.5B and 7B: train on seven code sets, generate for HumanEval and LiveCodeBench.

    python -m experiments.run --config=experiments/configs/coding.py:7b --workdir=runs/coding/7b

Argument: `1.5b` (default) or `7b`.
Hardware: an A100 with 80 GB, where `config.train.accumulate` divides what doesn't fit; the decoders have 1.7 and 2.0 G
parameters, 28 and 53 TFLOP per adapter.
Expected of 1.5B on HumanEval, pass@1/5/10, %: 32.7/55.3/64.1 (base 14.7/26.5/32.3; paper, its own figures).
Conditions are of each set's first 512 prompts, at 20 MB a prompt (the paper: of all). The two test sets have no training rows of
their own: what `data/HumanEval_train.json` holds is what the in-task rung learns, and its prompts are the condition.
"""

import ml_collections

from experiments.configs import common

SETS = ("Code-74k-ShareGPT", "CodeAlpaca-20K", "Evol-Instruct-Code-80K-V1", "Glaive-Code-Assistant-V2",
        "LLaMA-Python-Codes-30K", "Python-Codes-25K", "Rosetta-Code")
BLOCKS_7B = ((64, 500, 384), (256, 125, 400), (512, 64, 400), (1024, 64, 400), (2048, 32, 400))
VARIANTS = {
    "1.5b": {"blocks": ((64, 500, 300), (256, 125, 300), (512, 64, 300), (1024, 64, 256), (2048, 32, 256)), "steps": 2500,
             "checkpoints": 80},
    "7b": {"blocks": BLOCKS_7B, "steps": 5000, "checkpoints": 100},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the config of one model size."""
    variant = common.choose(VARIANTS, arg, "1.5b")
    model = arg or "1.5b"
    return common.published(
        f"coding/{model}", model, listed=common.tasks(SETS, ["HumanEval", "LiveCodeBench"]), prompts=16, length=26624,
        shortened=1000, pool=512, kernel_size=11, batch_size=48, scoring="code", **variant)
