"""The embedded world, end to end: 48 tenants to learn from, 4 to choose on, 12 never trained.

    make demo                                  # all stages, seed 0
    python -m dnd_jax.train --config=experiments/configs/tenants.py --workdir=build/tenants/run

Arguments: `tenants.py:seed=1` for another world, `tenants.py:smoke` for a miniature that only tests the machinery,
`tenants.py:gauge=align` (or `canonical`, `none`) for runs that start from A matrices of their own.
Hardware: 2 CPU cores, 4 GB. Expected: the table in the README.
"""

import ml_collections
from ml_collections.config_dict import placeholder

OPTIONS = {"seed": "0", "smoke": "", "gauge": ""}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the config; `arg` is a comma-separated list of `seed=N`, `smoke` and `gauge=NAME`."""
    options = dict(OPTIONS)
    for part in filter(None, arg.split(",")):
        name, _, value = part.partition("=")
        if name not in OPTIONS:
            raise ValueError(f"argument {name!r} is unknown, expected some of {sorted(OPTIONS)}")
        options[name] = value or "yes"
    if options["gauge"] not in ("", "none", "canonical", "align"):
        raise ValueError(f"gauge {options['gauge']!r} is unknown, expected 'none', 'canonical' or 'align'")
    seed, smoke = int(options["seed"]), bool(options["smoke"])
    root = "build/tenants" + ("-smoke" if smoke else "") + (f"-seed{seed}" if seed else "")

    config = ml_collections.ConfigDict()
    config.seed = seed
    config.base = f"{root}/base"
    config.tasks = f"{root}/tasks.json"
    config.encoder = {"name": f"{root}/encoder", "length": 14}
    config.condition = {"prompts": 14, "form": "prompt", "pool": placeholder(int)}

    config.collect = {
        "out": f"{root}/adapters" + ("-seeds" if options["gauge"] else ""),
        "rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ("q_proj", "k_proj", "v_proj"), "initial_seed": 0,
        "seed_per_task": bool(options["gauge"]),
        "learning_rate": 5e-3, "continued_learning_rate": 5e-4, "warmup_ratio": 0.01, "weight_decay": 0.0, "clip_norm": 1.0,
        "batch_size": 32, "steps": 2 if smoke else 90, "checkpoints": 2 if smoke else 8,
        "multi_task_steps": 2 if smoke else 1000, "max_length": 64, "max_rows": 5000,
        "dtype": "float32", "accumulate": 1, "checkpointing": False, "quantize": "none",
    }
    gauge = options["gauge"]
    store = f"{root}/store" + (f"-{gauge}" if gauge else "")
    config.export = {"store": store, "chunk": placeholder(int), "gauge": gauge or "none"}
    config.decoder = {"blocks": ((24, 10, 48), (32, 8, 48), (32, 6, 48)), "kernel_size": 5, "shortened": placeholder(int)}
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.train = {
        "steps": 4 if smoke else 1400, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 3.0,
        "clip_norm": 1.0, "condition_noise": 1e-4, "token_noise": 1e-5, "calibrate": True,
        "optimizer": "adamw", "param_dtype": "float32", "compute_dtype": "float32", "accumulate": 1, "remat": False,
        "prefetch": 2, "log_every": 1 if smoke else 10, "validate_every": 2 if smoke else 50, "validation_draws": 4,
        "keep_last": 2, "keep_every": 0, "on_failed_save": "stop", "tensorboard": False,
    }
    config.evaluate = {
        "scoring": "exact", "samples": 10, "temperature": 0.8,
        "unrelated": tuple((f"{root}/unrelated/{name}.json", "exact") for name in ("questions", "conversions")),
        "draws": 3, "batch_size": 64, "max_new_tokens": 4, "in_context_examples": 4, "ridge_draws": 8,
        "top_k": (2, 4, 8, 16), "temperatures": (0.05, 0.2, 1.0), "penalties": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    }
    return config.lock()
