"""The shape of a model's LoRA adapters from its `config.json` alone: no weights, no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from dnd_jax.adapters.spec import Leaf, Spec
from dnd_jax.types import InputError

VISION_TOWER = r".*(visual|vision).*"  # has layers of the same names as the language tower, and isn't adapted
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("up_proj", "gate_proj", "down_proj")
ALL_LINEAR = (*ATTENTION, *MLP)


def linear_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer of one decoder layer, by its name inside it.

    Serves the family of Llama: Llama, Mistral, Qwen2 and 3, Gemma, and the language towers of models built on them.

    Args:
      model: a parsed `config.json`; of a vision-language model, its `text_config` counts, if there is one.

    Raises:
      InputError: a size that isn't there.
    """
    text = model.get("text_config") or model
    hidden, heads, intermediate = (_size(text, key) for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    head = text.get("head_dim") or hidden // heads
    query, key = heads * head, (text.get("num_key_value_heads") or heads) * head
    return {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def _size(text: Mapping[str, Any], key: str) -> int:
    if key not in text:
        raise InputError(f"model config: {key!r} is missing, found {sorted(text)[:12]}")
    return text[key]


def spec_of_model(model: Mapping[str, Any], rank: int, targets: Sequence[str] = ALL_LINEAR, dtype: str = "float32") -> Spec:
    """Return the spec of a model's LoRA adapters, as PEFT would save them; of a vision-language model, of its language tower.

    Args:
      model: a parsed `config.json`, or what of it decides the shapes; one with a `vision_config` is of vision and language.
      rank: of every adapted layer.
      targets: names of the adapted layers.
      dtype: of the matrices.

    Raises:
      InputError: a size that isn't there.
    """
    vision = "vision_config" in model or "text_config" in model
    stack = "model/language_model/layers" if vision else "model/layers"
    leaves: dict[str, Leaf] = {}
    for layer in range(_size(model.get("text_config") or model, "num_hidden_layers")):
        for name, (out, width) in linear_shapes(model).items():
            if name.rpartition(".")[2] in targets:
                path = f"{stack}/{layer}/{name.replace('.', '/')}"
                leaves |= {f"{path}/lora_A": Leaf((rank, width), dtype), f"{path}/lora_B": Leaf((out, rank), dtype)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets)}
    if vision:
        config["exclude_modules"] = VISION_TOWER
    return Spec(config, leaves)
