"""Ask a base model with an adapter, by transformers and PEFT: greedy answers, exact match. Imports torch lazily."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from dnd_jax import adapters, prompts
from dnd_jax.adapters import Spec
from dnd_jax.prompts import Row
from dnd_jax.types import Tree


class Model:
    """A base model that answers with one adapter at a time, on the best device."""

    def __init__(self, base: str, spec: Spec, batch_size: int, max_new_tokens: int):
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        self._tokenizer = prompts.load_tokenizer(base)
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = get_peft_model(model, _lora_config(spec), adapter_name=_name(spec)).eval()

    def use(self, tree: Tree, spec: Spec) -> None:
        """Answer with this adapter from now on."""
        import torch
        from peft import set_peft_model_state_dict

        name = _name(spec)
        if name not in self._model.peft_config:
            self._model.add_adapter(name, _lora_config(spec))
        self._model.set_adapter(name)
        flat = flatten_dict(tree, sep="/")
        state = {adapters.key_of(p): torch.from_numpy(np.ascontiguousarray(v, np.float32)) for p, v in flat.items()}
        state |= {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in spec.carried.items()}
        set_peft_model_state_dict(self._model, state, adapter_name=name)

    def answer(self, rows: Sequence[Row], *, adapter: bool = True, examples: Sequence[Row] = ()) -> list[str]:
        """Return greedy answers; with `adapter=False` the base model's, with `examples` shown before each prompt."""
        shown = []
        for row in examples:
            shown += prompts.prompt_ids(self._tokenizer, row) + prompts.response_ids(self._tokenizer, row)
        ids = [shown + prompts.prompt_ids(self._tokenizer, row) for row in rows]
        answers = []
        for start in range(0, len(ids), self._batch_size):
            chunk = ids[start : start + self._batch_size]
            if adapter:
                answers += greedy(self._model, self._tokenizer, chunk, self._max_new_tokens)
            else:
                with self._model.disable_adapter():
                    answers += greedy(self._model, self._tokenizer, chunk, self._max_new_tokens)
        return answers


def greedy(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Return the model's greedy continuations of token ids, padded to the left, as one batch."""
    import torch

    width, end = max(map(len, ids)), tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([[end] * (width - len(x)) + list(x) for x in ids], device=model.device),
            attention_mask=torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids], device=model.device),
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=end,
        )
    return [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def exact_match(answers: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """Return 1.0 for each answer equal to its row's response, else 0.0."""
    return np.array([float(a == row.response.strip()) for a, row in zip(answers, rows, strict=True)])


def _name(spec: Spec) -> str:
    return f"rank_{spec.config['r']}"


def _lora_config(spec: Spec) -> Any:
    from peft import LoraConfig

    return LoraConfig.from_peft_type(**spec.config)
