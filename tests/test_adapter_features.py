"""Every LoRA feature that PEFT saves: folder -> tree -> folder, with equal tensors, config and logits."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import small_base
from flax.traverse_util import flatten_dict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as variants

from dnd_jax import adapters
from dnd_jax.adapters import check, keys
from dnd_jax.adapters.spec import scale_of

QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name: (base architecture, LoraConfig fields, kinds of tensors that are carried beside A and B)
FEATURES = {
    "all_linear": ("qwen2", {"target_modules": "all-linear"}, set()),
    "rank_pattern": ("qwen2", {"target_modules": QV, "rank_pattern": {"layers.1.self_attn.q_proj": 3, ".*v_proj": 1}}, set()),
    "alpha_pattern": ("qwen2", {"target_modules": QV, "alpha_pattern": {"v_proj": 9}}, set()),
    "rslora": ("qwen2", {"target_modules": QV, "use_rslora": True}, set()),
    "dora": ("qwen2", {"target_modules": QV, "use_dora": True}, {keys.MAGNITUDE}),
    "lora_bias": ("qwen2", {"target_modules": QV, "lora_bias": True}, {keys.LORA_BIAS}),
    "bias_all": ("qwen2", {"target_modules": QV, "bias": "all"}, {keys.BIAS}),
    "bias_lora_only": ("qwen2", {"target_modules": QV, "bias": "lora_only"}, {keys.BIAS}),
    "modules_to_save": ("qwen2", {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}, {keys.MODULE}),
    "embedding": ("qwen2", {"target_modules": [*QV, "embed_tokens"]}, {keys.EMBEDDING, keys.VOCABULARY}),
    "embedding_only": ("qwen2", {"target_modules": ["embed_tokens"]}, {keys.EMBEDDING, keys.VOCABULARY}),
    "tied_embedding": ("tied", {"target_modules": [*QV, "embed_tokens"]}, {keys.EMBEDDING, keys.VOCABULARY}),
    "tied_module": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
                    {keys.MODULE, keys.VOCABULARY}),
    "layers_to_transform": ("qwen2", {"target_modules": QV, "layers_to_transform": [1]}, set()),
    "first_layer": ("qwen2", {"target_modules": QV, "layers_to_transform": 0}, set()),
    "layers_without_values": ("gemma4", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, set()),
    "exclude_modules": ("qwen2", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "q_proj"]}, set()),
    "regex": ("qwen2", {"target_modules": r".*layers\.1\..*(q|v)_proj"}, set()),
    "token_indices": ("qwen2", {"target_modules": QV, "trainable_token_indices": [1, 5]}, {keys.TOKENS}),
    "tied_token_indices": ("tied", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [1, 5]}}, {keys.TOKENS}),
    "experts": ("mixtral", {"target_modules": QV, "target_parameters": EXPERTS}, set()),
    "experts_only": ("qwen3_moe", {"target_modules": [], "target_parameters": EXPERTS}, set()),
    "all_linear_experts": ("mixtral", {"target_modules": "all-linear"}, set()),
    "all_linear_many_experts": ("qwen3_moe", {"target_modules": "all-linear"}, set()),
    "two_kinds_of_attention": ("kimi_linear", {"target_modules": "all-linear"}, set()),
    "kasa": ("qwen2", {"target_modules": QV, "kasa_config": variants.KasaConfig()}, {keys.VARIANT}),
    "velora": ("qwen2", {"target_modules": QV, "velora_config": variants.VeloraConfig()}, {keys.VARIANT}),
    "monteclora": ("qwen2", {"target_modules": QV, "monteclora_config": variants.MontecloraConfig()}, {keys.VARIANT}),
    "block_diagonal": ("qwen2", {"target_modules": QV, "use_bdlora": variants.BdLoraConfig(["q_proj"], ["v_proj"], nblocks=2)},
                       set()),
    "alora": ("qwen2", {"target_modules": QV, "alora_invocation_tokens": [5, 6]}, set()),
    "layer_replication": ("llama", {"target_modules": QV, "layer_replication": [(0, 2), (1, 2)]}, set()),
    "tied_lora": ("tied", {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True},
                  {keys.EMBEDDING, keys.VOCABULARY, keys.TIED}),
    "classifier": ("classifier", {"target_modules": QV, "task_type": "SEQ_CLS"}, {keys.MODULE}),
    "all_at_once": ("qwen2", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "bias": "all",
                              "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 7},
                              "modules_to_save": ["lm_head"]}, {keys.MAGNITUDE, keys.BIAS, keys.MODULE}),
    "llama": ("llama", {"target_modules": "all-linear"}, set()),
    "gemma": ("gemma", {"target_modules": "all-linear"}, set()),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, set()),
    "gpt2_dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}, {keys.MAGNITUDE}),
    "vision_language": ("qwen2_5_vl", {"target_modules": "all-linear"}, set()),
}


def make_adapter(folder, feature, dtype=torch.float32):
    """Save base and adapter, every adapter tensor moved away from its start, to `folder/base` and `folder/adapter`."""
    architecture, fields, _ = FEATURES[feature]
    torch.manual_seed(0)
    base = small_base(architecture)
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has a hint for some of these features
        config = LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | fields)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder / "adapter")


def logits(base, folder, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architecture = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
        model = architecture.from_pretrained(base)
        model = PeftModel.from_pretrained(model, folder) if folder else model
    with torch.no_grad():
        return model.to(dtype).eval()(torch.arange(1, 13)[None]).logits


def rewrite_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module", params=FEATURES)
def adapter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_adapter(folder, request.param)
    return folder, FEATURES[request.param][2]


def test_round_trip_gives_equal_tensors_config_and_logits(adapter):
    folder, carried = adapter
    tree, spec = adapters.read(folder / "adapter")
    assert set(keys.count_kinds(spec)) == carried
    adapters.write(folder / "ours", tree, spec)
    before, after = (safetensors.torch.load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "ours"))
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    configs = [json.loads((folder / name / "adapter_config.json").read_text()) for name in ("adapter", "ours")]
    for config in configs:
        for field in ("target_modules", "exclude_modules"):
            config[field] = sorted(config[field]) if isinstance(config[field], list) else config[field]
    assert configs[0] == configs[1]
    ours = logits(folder / "base", folder / "ours")
    assert torch.equal(logits(folder / "base", folder / "adapter"), ours)
    assert not torch.allclose(logits(folder / "base", None), ours, atol=1e-3)


# The state of two variants acts in training only.
CARRYING = [name for name, (_, _, kinds) in FEATURES.items()
            if kinds - {keys.VOCABULARY} and name not in ("velora", "monteclora")]


@pytest.mark.parametrize("adapter", CARRYING, indirect=True)
def test_dropping_what_is_carried_changes_logits_or_the_read(adapter):
    """The carried tensors matter: without them the adapter is refused, or PEFT loads something else."""
    folder, _ = adapter
    tree, spec = adapters.read(folder / "adapter")
    bare = adapters.Spec(spec.config, spec.leaves)
    adapters.write(folder / "bare", tree, bare)
    try:
        adapters.read(folder / "bare")
    except adapters.InputError as error:
        assert "missing" in str(error) or "holds no" in str(error)
    else:
        assert not torch.equal(logits(folder / "base", folder / "bare"), logits(folder / "base", folder / "adapter"))


def test_portable_gives_equal_logits_or_says_why_not(adapter):
    folder, _ = adapter
    tree, spec = adapters.read(folder / "adapter")
    obstacles = adapters.profiles.beyond_lora(spec)
    if obstacles:
        with pytest.raises(adapters.InputError, match="no portable profile"):
            adapters.portable(tree, spec)
        return
    adapters.write(folder / "portable", *adapters.portable(tree, spec))
    _, plain = adapters.read(folder / "portable")
    assert plain.config["r"] == plain.config["lora_alpha"] == 8 and not plain.config["rank_pattern"]
    assert not adapters.profiles.vllm_obstacles(plain) and not adapters.profiles.sglang_obstacles(plain)
    # In float64, so that the order of the base model's own sums doesn't count.
    faithful, portable = (logits(folder / "base", folder / name, torch.float64) for name in ("adapter", "portable"))
    assert 0 < float((faithful - portable).abs().max()) <= 1e-6


def test_check_explains(adapter):
    folder, carried = adapter
    text = check.explain(folder / "adapter")
    assert "yes: every tensor is expected" in text
    assert all(kind in text for kind in carried)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path, dtype):
    make_adapter(tmp_path, "all_linear", dtype)
    tree, spec = adapters.read(tmp_path / "adapter")
    adapters.write(tmp_path / "ours", tree, spec)
    before, after = (safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "ours"))
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype == dtype and torch.equal(before[k], after[k]) for k in before)
    theirs, ours = (logits(tmp_path / "base", tmp_path / name, dtype) for name in ("adapter", "ours"))
    assert ours.dtype == dtype and torch.equal(theirs, ours)
    plain, _ = adapters.portable(tree, spec)
    scaled = plain["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_B"]
    np.testing.assert_array_equal(scaled[:, :2], np.float32(2.5) * np.asarray(
        tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_B"], np.float32))


@pytest.mark.parametrize("leaf,made", [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_portable_of_another_dtype_is_what_is_written_as_trained(tmp_path, leaf, made):
    """A generated tree is float32, whatever the training runs' adapters were."""
    make_adapter(tmp_path, "rslora")
    tree, spec = adapters.read(tmp_path / "adapter")
    tree = jax.tree.map(lambda x: x.astype(np.float64) * (1 + 1e-9) if leaf == "float64" else x, tree)
    spec = adapters.Spec(spec.config, {path: adapters.Leaf(found.shape, leaf) for path, found in spec.leaves.items()})
    adapters.write(tmp_path / "faithful", tree, spec)
    written, _ = adapters.read(tmp_path / "faithful")
    plain, plain_spec = adapters.portable(tree, spec)
    scale = scale_of(spec.modules[0], spec.config)
    for module in spec.modules:
        _, b = spec.pair(module)
        found, expected = (np.asarray(flatten_dict(t, sep="/")[b]) for t in (plain, written))
        assert found.dtype == plain_spec.leaves[b].dtype == made
        np.testing.assert_allclose(found[:, :2], expected.astype(np.float64) * scale, rtol=1e-15 if leaf == "float64" else 1e-7)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_more_names_of_embeddings_and_convolutions_in_groups(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"])).save_pretrained(
        tmp_path / "neox", save_embedding_layers=True)
    assert keys.count_kinds(adapters.read(tmp_path / "neox")[1]) == {keys.VOCABULARY: 2}
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2), torch.nn.Conv2d(8, 8, 3))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"])).save_pretrained(tmp_path / "groups")
    assert keys.count_kinds(adapters.read(tmp_path / "groups")[1]) == {keys.MATRIX: 4}
