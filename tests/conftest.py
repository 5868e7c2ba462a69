"""What several test files make: a smoke-sized world, and PEFT adapters with values that change the logits."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import json
import pathlib
import re
import subprocess

# Dozens of processes compile the same few programs, each for half a minute: they share what was compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / "build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many of them at once as cores
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they run so briefly that most of their time is compiling

import numpy as np
import pytest
import safetensors.numpy
import warm

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = f"--config={ROOT}/experiments/configs/tenants.py:smoke"
ENV = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


@functools.cache
def uses_smoke(file):
    """Tell whether a test file, named from the project's root, uses the smoke world."""
    return re.search(r"def \w+\(.*\bsmoke\b", (ROOT / file).read_text()) is not None


def pytest_collection_modifyitems(items):
    """Begin with what takes longest."""
    items.sort(key=lambda item: not uses_smoke(item.nodeid.partition("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let one worker run all tests of a file, and all files that use the smoke world, which is then made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileAndWorld(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "smoke" if uses_smoke(file) else file

    return ByFileAndWorld(config, log)


@functools.cache
def server():
    return warm.Server({**os.environ, **ENV})


def start_module(*command, cwd=ROOT, env=None):
    """Start `python -m ...` with changes of the environment; return a process that has imported the large libraries before."""
    return server().start([*map(str, command)], cwd, env)


def run_module(*command, cwd=ROOT, check=True, env=None):
    """Run `python -m ...` as a user does; return the finished process."""
    process = start_module(*command, cwd=cwd, env=env)
    out, err = process.communicate()
    assert not check or process.returncode == 0, err[-3000:]
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def write_adapter(folder, rng, *, rank=2, layers=2, hidden=8, dtype=np.float32, **config):
    """Write a small LoRA folder by hand: q_proj and v_proj of every layer."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(layers):
        for name, out in (("q_proj", hidden), ("v_proj", hidden // 2)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(size=(rank, hidden)).astype(dtype)
            tensors[f"{key}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(dtype)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"],
                "base_model_name_or_path": "base", "task_type": "CAUSAL_LM"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The whole miniature pipeline, run once by its command lines in a folder of its own; returns that folder."""
    folder = tmp_path_factory.mktemp("smoke")
    root = "build/tenants-smoke"
    run_module("data_pipeline.tenants", f"--out={root}", "--smoke", cwd=folder)
    run_module("data_pipeline.collect", SMOKE, "--jobs=1", cwd=folder)  # each job imports torch
    run_module("data_pipeline.export", SMOKE, cwd=folder)
    run_module("dnd_jax.train", SMOKE, f"--workdir={root}/run", cwd=folder)
    return folder


@pytest.fixture(scope="session")
def root(smoke):
    """The folder of the smoke world and all that was made of it."""
    return smoke / "build" / "tenants-smoke"


def make_store(folder, rng, *, train=3, validation=1, checkpoints=2, prompts=6, length=5, width=4):
    """Write a pair store of random tasks in the format that `pairs.open_store` reads."""
    from dnd_jax import adapters, files, pairs, tokens

    folder = pathlib.Path(folder)
    write_adapter(folder / "template", rng)
    _, spec = adapters.read(folder / "template")
    layout = tokens.plan(spec)
    splits = ["train"] * train + ["validation"] * validation
    entries = {}
    for i, split in enumerate(splits):
        target = folder / "tasks" / f"task{i}"
        target.mkdir(parents=True)
        encoded = []
        for k in range(checkpoints):
            write_adapter(folder / f"adapter{k}", rng)
            encoded.append(tokens.encode(adapters.read(folder / f"adapter{k}")[0], layout)[0])
        np.save(target / "tokens.npy", np.stack(encoded))
        np.save(target / "condition.npy", rng.normal(size=(prompts, length, width)).astype(np.float16))
        files.write_json(target / "prompts.json", [f"prompt {j} of {i}" for j in range(prompts)])
        entries[f"task{i}"] = {"split": split, "checkpoints": checkpoints, "prompts": prompts, "run_sha256": None}
    np.save(folder / "importance.npy", np.ones(layout.shape[0], np.float32))
    listed = [folder / "importance.npy", *sorted((folder / "tasks").rglob("*.*"))]
    files.write_json(folder / "manifest.json", {
        "format": pairs.FORMAT, "base": {"name": "base", "sha256": "0"}, "spec": spec.to_json(), "layout": layout.to_json(),
        "gauge": "none", "averaged": [], "form": "prompt", "encoder": {"name": "none", "length": length},
        "encoder_sha256": None, "made_of": None, "tasks": entries,
        "sha256": {str(p.relative_to(folder)): files.sha256_file(p) for p in listed},
    })
    return folder


@pytest.fixture
def store(tmp_path, rng):
    return make_store(tmp_path / "store", rng)


def tiny_config(store, **train):
    """Return the tenants config cut down to a store of `make_store`."""
    from experiments.configs import tenants

    config = tenants.get_config("smoke").unlock()
    config.export.store = str(store)
    config.condition.prompts, config.encoder = 4, {"name": "none", "length": 5}
    config.decoder = {"blocks": ((6, 4, 6),), "kernel_size": 3, "shortened": None}
    config.train.update({"steps": 6, "batch_size": 8, "validate_every": 2, "log_every": 1} | train)
    return config.lock()


def train_command(store, workdir, **train):
    """Return the command line that trains `tiny_config`."""
    settings = {"steps": 6, "batch_size": 8, "validate_every": 2, "log_every": 1} | train
    return ["dnd_jax.train", SMOKE, f"--workdir={workdir}",
            f"--config.export.store={store}", "--config.encoder.name=none", "--config.encoder.length=5",
            "--config.condition.prompts=4", "--config.decoder.kernel_size=3",
            "--config.decoder.blocks=((6, 4, 6),)", *(f"--config.train.{k}={v}" for k, v in settings.items())]


VISION_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
VISION_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}" + "".join(VISION_MARKS) + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %} reply in")


@pytest.fixture(scope="session")
def vision_base(tmp_path_factory):
    """A folder with a miniature of Qwen2.5-VL, `base`, and pictures of 16 x 8 and 8 x 8 pixels, so of 2 and 1 tokens."""
    import torch
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from data_pipeline.tenants import make_base_tokenizer

    folder = tmp_path_factory.mktemp("vision")
    tokenizer = make_base_tokenizer(["user system how many what is this and that whale ant seven two 1 2 3 reply in",
                                     "which colour is it ? A: red B: blue [A] [B]"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_MARKS)})
    tokenizer.chat_template = VISION_TEMPLATE
    torch.manual_seed(0)
    model = small_base("qwen2_5_vl", vocab_size=len(tokenizer))
    model.config.vision_start_token_id, model.config.image_token_id, model.config.vision_end_token_id = (
        tokenizer.convert_tokens_to_ids(list(VISION_MARKS)))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
                             ).save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    for name, size in (("wide", (8, 16, 3)), ("small", (8, 8, 3))):
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def read_log(workdir):
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def without_times(workdir):
    """Return the lines of a run's log without what depends on the clock."""
    drop = ("seconds", "steps_per_s", "samples_per_s", "input_wait_s")
    return [{k: v for k, v in e.items() if k not in drop} for e in read_log(workdir)]


def small_base(architecture: str, **changes):
    """Return a randomly initialised transformers model of a few thousand parameters; `changes` are of its sizes."""
    import transformers as t

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
             "initializer_range": 0.1} | changes
    experts = {"num_experts_per_tok": 2}
    if architecture == "qwen2_5_vl":
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
                      "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}
        text = sizes | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
        return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, **{f"{n}_token_id": 30 + i for i, n in enumerate(
                ("image", "video", "vision_start", "vision_end"))}))
    return {
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**sizes)),
        "tied": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, tie_word_embeddings=True)),
        "classifier": lambda: t.Qwen2ForSequenceClassification(t.Qwen2Config(**sizes | {"pad_token_id": 0}, num_labels=3)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**sizes, head_dim=4)),
        "gemma4": lambda: t.Gemma4ForCausalLM(t.Gemma4TextConfig(
            **sizes | {"num_hidden_layers": 4}, layer_types=["sliding_attention", "full_attention"] * 2, attention_k_eq_v=True,
            head_dim=4, global_head_dim=4, num_global_key_value_heads=2, hidden_size_per_layer_input=0, num_kv_shared_layers=0)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**sizes, **experts, num_local_experts=3)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(
            **sizes, **experts, num_experts=3, moe_intermediate_size=12, head_dim=4)),
        "kimi_linear": lambda: t.KimiLinearForCausalLM(t.KimiLinearConfig(
            **sizes | {"num_key_value_heads": 4}, layer_types=["linear_attention", "full_attention"], first_k_dense_replace=2,
            moe_intermediate_size=12, n_routed_experts=2, num_experts=2, num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=None,
            qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, head_dim=4)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None,
            initializer_range=0.1)),
    }[architecture]()
