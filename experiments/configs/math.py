"""Mathematics, Qwen2.5-1.5B and 7B: train on six sets, generate for GSM8K and MATH.

    python -m experiments.run --config=experiments/configs/math.py:7b --workdir=runs/math/7b

Argument: `1.5b` (default) or `7b`.
Hardware: an A100 with 80 GB, where `config.train.accumulate` divides what doesn't fit; the decoders have 1.8 and 1.9 G
parameters, 38 and 53 TFLOP per adapter.
Expected, %: 1.5B GSM8K 66.3, MATH 23.9 (base 64.4, 29.3);
7B GSM8K 83.1 (base 81.2; paper, its own figures). Conditions are of each set's first 2048 prompts, at 3.5 MB a prompt.
"""

import ml_collections

from experiments.configs import coding, common

SETS = ("Competition_Math", "Math_QA", "Math-IIO-68K-Mini", "Math-Plus", "Mu-Math", "ToT-Math-V1")
VARIANTS = {
    "1.5b": {"blocks": ((64, 500, 300), (256, 500, 300), (512, 125, 300), (1024, 64, 256), (2048, 32, 256)), "prompts": 32,
             "batch_size": 128},
    "7b": {"blocks": coding.BLOCKS_7B, "prompts": 16, "batch_size": 48},
}


def get_config(arg: str = "", **changes: object) -> ml_collections.ConfigDict:
    """Return the config of one model size; `changes` are those of an ablation."""
    variant = common.choose(VARIANTS, arg, "1.5b")
    model = arg or "1.5b"
    settings = {"name": f"math/{model}", "length": 4608, "steps": 5000, "pool": 2048} | variant | changes
    return common.published(
        model=model, listed=common.tasks(SETS, ["GSM8K", "MATH"]), shortened=1000, kernel_size=11, checkpoints=80,
        rows=10_000, cut_off=4400, scoring="final_answer", max_new_tokens=1024, **settings)
