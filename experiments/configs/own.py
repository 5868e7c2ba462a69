"""A base and tasks of one's own: a copy of this file is a config.

    python -m experiments.run --config=my_config.py --workdir=runs/mine/run

What isn't set here is as in the paper's experiments (`common.published`). `tasks.json` is looked for in the working folder, and
the files that it names beside it.
Hardware: as for `common_sense.py`, whose decoder this is, until blocks, prompts and positions are fewer.
Expected: nothing is known before it has run; the ladder tells.
"""

import ml_collections

from experiments.configs import common, common_sense


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the config; there are no variants, `arg` is ignored."""
    config = common.published(
        "mine", "0.5b", listed="tasks.json",  # the store is in runs/mine; base, rank and shapes of common.MODELS
        prompts=128, length=384, blocks=common_sense.BLOCKS, kernel_size=9,
        batch_size=64, steps=2000, checkpoints=50, rows=5000, cut_off=2048, scoring="exact", max_new_tokens=64)
    config.base = "Qwen/Qwen2.5-0.5B-Instruct"  # folder or hub name of any causal language model
    config.collect.out = "runs/mine/adapters"
    config.collect.rank, config.collect.alpha = 8, 16  # `collect.target_modules` has the linear layers of Qwen and Llama
    config.collect.steps, config.collect.multi_task_steps = 300, 2000  # of each task's run, and of the one on all training tasks
    config.encoder.name = "sentence-transformers/all-MiniLM-L12-v2"
    config.evaluate.unrelated = ()  # on which harm is measured, as (("MMLU_test.json", "choice"),)
    return config
