"""Adapter shapes from a model's config alone are those that PEFT gives to the model itself."""

import numpy as np
import pytest
import torch
import transformers
from conftest import small_base
from flax.traverse_util import unflatten_dict
from peft import LoraConfig, PeftModel, get_peft_model

from dnd_jax import adapters, tokens
from dnd_jax.adapters import InputError
from dnd_jax.adapters.architecture import ALL_LINEAR, spec_of_model
from dnd_jax.adapters.spec import key_of
from experiments.configs.common import MODELS as MODELS_OF_CONFIGS

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama3": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=6)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "qwen2": lambda: small_base("qwen2"),
    "qwen2_5_vl": lambda: small_base("qwen2_5_vl"),
}
KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
# from the published table: the KEYS, rank -> tokens
QWEN = {
    "0.5b": (896, 14, 2, 4864, 24, 8, (4296, 10, 130)),
    "1.5b": (1536, 12, 2, 8960, 28, 16, (4508, 18, 258)),
    "7b": (3584, 28, 4, 18944, 28, 16, (4928, 18, 514)),
    "vl-3b": (2048, 16, 2, 11008, 36, 16, (7308, 18, 258)),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_peft(name):
    model = MODELS[name]()
    # Names of the language tower; the vision tower's MLPs have the same names and no index of a layer stack "layers".
    peft_model = get_peft_model(model, LoraConfig(r=3, target_modules=rf".*layers\.\d+\..*({'|'.join(ALL_LINEAR)})"))
    theirs = {n.replace(".default", ""): tuple(p.shape) for n, p in peft_model.named_parameters() if "lora_" in n}
    spec = spec_of_model(model.config.to_dict(), 3)
    assert ("exclude_modules" in spec.config) == (name == "qwen2_5_vl")
    assert {key_of(path): leaf.shape for path, leaf in spec.leaves.items()} == theirs


@pytest.mark.parametrize("name", QWEN)
def test_published_token_blocks(name):
    hidden, heads, kv, intermediate, layers, rank, block = QWEN[name]
    _, published_rank, model = MODELS_OF_CONFIGS[name]
    spec = spec_of_model(model, rank)
    assert tokens.plan(spec).shape == block and rank == published_rank
    assert [model[key] for key in KEYS] == [hidden, heads, kv, intermediate, layers]
    assert spec.modules[0] == f"model{'.language_model' if name == 'vl-3b' else ''}.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("shapes", [{"vision_config": {}}, {}])
def test_what_is_made_of_a_vision_language_models_shapes_acts_on_it(shapes, tmp_path):
    """Its published config has the language tower's sizes beside the vision tower's; in files of ours they are apart."""
    model = small_base("qwen2_5_vl")
    text = model.config.to_dict()["text_config"]
    spec = spec_of_model(text | shapes if shapes else {"text_config": text}, 2)
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in spec.leaves.items()}
    adapters.write(tmp_path / "made", unflatten_dict(flat, sep="/"), spec)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / "made")
        assert (adapted(input_ids=ids).logits - before).abs().max() > 0.01
    assert sum(name.endswith("lora_A.default.weight") for name, _ in adapted.named_parameters()) == len(spec.modules)


@pytest.mark.parametrize("missing", [*KEYS[:2], *KEYS[3:]])
def test_an_unknown_config_is_named(missing):
    model = {key: 2 for key in KEYS if key != missing}
    with pytest.raises(InputError, match=f"'{missing}' is missing, found"):
        spec_of_model(model, 2)
