"""Vision and language, Qwen2.5-VL-3B: train on MathV360K, generate for MathVision and MathVista. The adapters are of the
language tower, the conditions of the prompts' text.

    python -m experiments.run --config=experiments/configs/multimodal.py --workdir=runs/multimodal

Hardware: an A100 with 80 GB, where `config.train.accumulate` divides what doesn't fit; the decoder has 2.4 G parameters, 29
TFLOP per adapter.
Expected: 0.61 s and 20.3 GB to generate an adapter on an A100 (paper, its own figures).
"""

import ml_collections

from experiments.configs import common

VARIANTS = {"3b": "vl-3b"}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the config."""
    return common.published(
        "multimodal/3b", common.choose(VARIANTS, arg, "3b"), listed=common.tasks(["MathV360K"], ["MathVision", "MathVista"]),
        prompts=16, length=1536, blocks=((64, 500, 300), (256, 125, 300), (1024, 64, 300), (2048, 16, 256)), kernel_size=11,
        batch_size=64, steps=5000, checkpoints=100, scoring="vision")
