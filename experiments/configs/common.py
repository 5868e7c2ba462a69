"""What the paper's experiments share: models, collecting and training settings (arXiv 2506.16406).

Dataset files are `data/<name>_train.json` and `data/<name>_test.json`, lists of prompt, response and system, made from the
sets that the paper names. Of `collect`, rank, learning rate, cosine, warm-up, dtype, cut-off, rows and checkpoints are the
paper's; the steps before these (as many for each set of the multi-task run), the rate that they are continued at, alpha, batch,
clipping and weight decay are ours. Of `train`, all is the paper's but for AdamW's moments, float32 here and 8 bits there,
validation, and what is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from dnd_jax.adapters.architecture import ALL_LINEAR

# hub name, LoRA rank, and the fields of its config.json that decide the shapes of its adapters
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", 8, {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
                                               "intermediate_size": 4864, "num_hidden_layers": 24}),
    "1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", 16, {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2,
                                                "intermediate_size": 8960, "num_hidden_layers": 28}),
    "7b": ("Qwen/Qwen2.5-7B-Instruct", 16, {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
                                            "intermediate_size": 18944, "num_hidden_layers": 28}),
    "vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 16, {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
                                                  "intermediate_size": 11008, "num_hidden_layers": 36,
                                                  "vision_config": {}}),  # of whose tower no adapter is made
}
MINILM = {"kind": "sentence", "name": "sentence-transformers/all-MiniLM-L12-v2"}
MINILM_WIDTH = 384
UNRELATED = (("data/MMLU_test.json", "choice"),)  # on which harm is measured; the paper measures none


def tasks(train: Sequence[str], test: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the list of tasks; test tasks are collected too, for the in-task rung."""
    split = dict.fromkeys(train, "train") | dict.fromkeys(test, "test")
    return {name: {"split": part, "train": f"data/{name}_train.json", "test": f"data/{name}_test.json"}
            for name, part in split.items()}


def published(
    name: str, model: str, *, listed: Mapping[str, Any] | str, prompts: int, length: int, blocks: Sequence[tuple[int, int, int]],
    kernel_size: int, batch_size: int, steps: int, checkpoints: int, shortened: int | None = None, rows: int = 5000,
    cut_off: int = 2048, encoder: Mapping[str, Any] = MINILM, width: int = MINILM_WIDTH, form: str = "prompt",
    pool: int | None = None, scoring: str = "choice", max_new_tokens: int = 512,
) -> ml_collections.ConfigDict:
    """Return the config of one published experiment.

    Args:
      name: of its folder under `runs/`; adapters are in one folder for all experiments on a model, which share them.
      model: key of MODELS.
      listed: from `tasks`, or a file as for `dnd_jax.tasks.read_tasks`.
      prompts: N, prompts of a condition.
      length: L, positions of a prompt; `shortened` is what the learned projection makes of it, where it has one.
      blocks: between the condition and the tokens.
      kernel_size: k.
      batch_size: of the decoder's training.
      steps: of the decoder's training.
      checkpoints: consecutive steps saved of every run.
      shortened: M.
      rows: of a dataset that are trained on at most.
      cut_off: tokens of a training example at most.
      encoder: kind, name and options.
      width: C, channels of the encoder.
      form: of the conditions.
      pool: prompts that conditions are drawn from, None for all.
      scoring: of the answers, of `dnd_jax.scoring.kinds`; of code, ten samples at temperature 0.8.
      max_new_tokens: of an answer.
    """
    base, rank, shapes = MODELS[model]
    sets = 0 if isinstance(listed, str) else sum(task["split"] == "train" for task in listed.values())
    config = ml_collections.ConfigDict()
    config.seed = 42
    config.base = base
    config.model = {**shapes, "condition_width": width}
    config.tasks = listed if isinstance(listed, str) else dict(listed)
    config.encoder = {**encoder, "length": length}
    config.condition = {"prompts": prompts, "form": form, "pool": pool or placeholder(int)}
    config.collect = {
        "out": f"runs/adapters/{model}", "rank": rank, "alpha": 2 * rank, "dropout": 0.0, "target_modules": ALL_LINEAR,
        "initial_seed": 42, "seed_per_task": False, "learning_rate": 1e-4, "continued_learning_rate": 1e-5,
        "warmup_ratio": 0.01, "weight_decay": 0.0, "clip_norm": 1.0, "batch_size": 16, "steps": 300, "checkpoints": checkpoints,
        "multi_task_steps": 300 * (sets or 1), "max_length": cut_off, "max_rows": rows,
        "dtype": "bfloat16", "accumulate": 4, "checkpointing": model != "0.5b", "quantize": "none",
    }
    config.export = {"store": f"runs/{name}/store", "chunk": placeholder(int), "gauge": "none"}
    config.decoder = {"blocks": tuple(blocks), "kernel_size": kernel_size, "shortened": shortened or placeholder(int)}
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.train = {
        "steps": steps, "batch_size": batch_size, "learning_rate": 3e-5, "warmup_steps": 1, "weight_decay": 0.1, "clip_norm": 1.0,
        "condition_noise": 1e-4, "token_noise": 1e-5, "calibrate": False,
        "optimizer": "adamw", "param_dtype": "float32", "compute_dtype": "bfloat16", "accumulate": 1, "remat": False,
        "prefetch": 4, "log_every": 10, "validate_every": 100, "validation_draws": 4,
        "keep_last": 2, "keep_every": 0, "on_failed_save": "continue", "tensorboard": False,
    }
    # `draws` are of a test task's prompts, `ridge_draws` of each training task's; the candidates that validation tasks decide on:
    # nearest tasks, temperatures of their weights, penalties of both ridges
    config.evaluate = {
        "scoring": scoring, "unrelated": UNRELATED, "samples": 10, "temperature": 0.8, "max_new_tokens": max_new_tokens,
        "draws": 3, "batch_size": 32, "in_context_examples": 4, "ridge_draws": 8,
        "top_k": (2, 4), "temperatures": (0.05, 0.2, 1.0), "penalties": (1e-4, 1e-2, 1.0),
    }
    return config.lock()


def choose(variants: Mapping[str, Any], arg: str, default: str) -> Any:
    """Return the variant that a config's argument names."""
    if (arg or default) not in variants:
        raise ValueError(f"argument {arg!r} is unknown, expected one of {list(variants)}")
    return variants[arg or default]
