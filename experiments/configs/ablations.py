"""The paper's ablations: 3000 steps, leaving out ARC-c; but for answers as conditions, which are of mathematics, 1.5B.

    python -m experiments.run --config=experiments/configs/ablations.py:extractor-t5 --workdir=runs/ablations/extractor-t5

Arguments: `form-...` what a condition is made of; `extractor-...` the text encoder; `pool-...` how many prompts the 128 of a
condition are drawn from; `prompts-...` conditions of more prompts; `sets-...` how many sets are trained on, the rest being
test.
Hardware: an A100 with 80 GB, where `config.train.accumulate` divides what doesn't fit; the decoders have 1.0 to 2.0 G
parameters (`tests/test_configs.py` prints them).
Expected: ARC-c with 4000 steps, plain prompts and MiniLM is 51.6% (base 38.3%); the paper shows the variants as charts, without
figures.
"""

from typing import Any

import ml_collections

from experiments.configs import common, common_sense, math

T5 = {"kind": "t5", "name": "google-t5/t5-base"}
QWEN = {"kind": "causal_lm", "name": "Qwen/Qwen2.5-7B-Instruct", "layer": 14}
GLOVE = {"kind": "glove", "name": "data/glove.6B.300d.txt"}
ORDER = ("ARC-e", "PIQA", "HellaSwag", "BoolQ", "WinoGrande", "OBQA", "ARC-c")

VARIANTS: dict[str, dict[str, Any]] = {
    "form-prompt": {"form": "prompt"},
    "form-prompt+answer": {"form": "prompt+answer"},
    "form-mix": {"form": "mix"},
    "form-answer": {"form": "answer", "length": 6144, "steps": 3000},
    "extractor-glove": {"encoder": GLOVE, "width": 300, "length": 200, "blocks": (
        (200, 100, 256), (256, 50, 256), (512, 20, 256), (1024, 20, 128), (2048, 10, 128))},
    "extractor-t5": {"encoder": T5, "width": 768, "blocks": (
        (256, 256, 512), (512, 100, 256), (1024, 50, 256), (2048, 20, 128))},
    "extractor-qwen7b": {"encoder": QWEN, "width": 3584, "blocks": (
        (50, 300, 2000), (128, 128, 1024), (256, 32, 512), (1024, 10, 256))},
    **{f"pool-{count}": {"pool": count} for count in (128, 256, 512, 1024, 2048)},
    **{f"prompts-{count}": {"pool": count, "prompts": count} for count in (256, 512)},
    **{f"sets-{count}": {"listed": common.tasks(ORDER[:count], ORDER[count:])} for count in (2, 3, 4, 5)},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the config of one ablation, by default of the plain prompt."""
    variant = common.choose(VARIANTS, arg, "form-prompt")
    name = f"ablations/{arg or 'form-prompt'}"
    if arg == "form-answer":
        return math.get_config("1.5b", name=name, **variant)
    settings = {
        "listed": common.tasks([s for s in common_sense.SETS if s != "ARC-c"], ["ARC-c"]), "prompts": 128, "length": 384,
        "blocks": common_sense.BLOCKS, "kernel_size": 9, "batch_size": 64, "steps": 3000, "checkpoints": 50,
        "max_new_tokens": 16, **variant}
    return common.published(name, "0.5b", **settings)
