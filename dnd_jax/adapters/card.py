"""The card of a generated adapter: the README.md that PEFT folders have by convention."""

import json
from collections.abc import Mapping
from typing import Any

from dnd_jax.adapters.spec import Spec


def card(spec: Spec, about: Mapping[str, Any], facts: Mapping[str, str], remark: str) -> str:
    """Return Markdown with the metadata block of model hubs.

    Args:
      spec: of the adapter.
      about: of the decoder's checkpoint; its `base` gives name and hash of the base model.
      facts: further lines of the table, by name.
      remark: a sentence on what wasn't generated; may be empty.
    """
    name = spec.config.get("base_model_name_or_path") or about["base"]["name"]
    lines = {"base model": name, "base model sha256": about["base"]["sha256"],
             "rank": str(spec.config["r"]), "alpha": str(spec.config["lora_alpha"]), **facts}
    return "\n".join([
        "---", f"base_model: {json.dumps(name)}", "library_name: peft", "tags:", "- lora", "- generated", "---", "",
        "# Generated LoRA adapter", "",
        "A decoder made these weights from unlabeled prompts in one forward pass; they were not trained on the task.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in lines.items()), "",
        *([remark + ".", ""] if remark else []),
    ])
