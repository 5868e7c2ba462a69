"""Adapter shapes from a model's config alone are those that PEFT gives to the model itself."""

import pytest
import transformers
from conftest import small_base
from peft import LoraConfig, get_peft_model

from dnd_jax import tokens
from dnd_jax.adapters import InputError
from dnd_jax.adapters.architecture import ALL_LINEAR, spec_of_model
from dnd_jax.adapters.spec import key_of

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
# from the published table: hidden, heads, kv heads, intermediate, layers, rank -> tokens
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
    assert {key_of(path): leaf.shape for path, leaf in spec.leaves.items()} == theirs


@pytest.mark.parametrize("name", QWEN)
def test_published_token_blocks(name):
    hidden, heads, kv, intermediate, layers, rank, block = QWEN[name]
    model = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": intermediate,
             "num_hidden_layers": layers}
    assert tokens.plan(spec_of_model(model, rank)).shape == block


def test_an_unknown_config_is_named():
    with pytest.raises(InputError, match="'hidden_size' is missing"):
        spec_of_model({"n_embd": 16, "num_hidden_layers": 1}, 2)
