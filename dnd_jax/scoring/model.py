"""Ask a base model with an adapter, by transformers and PEFT: greedy answers, samples, log-likelihoods. Imports torch lazily.

Rows with images are asked as they are fine-tuned on (`images`); the base has its own dtype.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from dnd_jax import adapters, base_models, prompts
from dnd_jax.adapters import Spec
from dnd_jax.images import Reader
from dnd_jax.sources import Row
from dnd_jax.types import InputError, Tree

IDS, NAME = "input_ids", "adapter"
# What is asked: token ids under IDS, and of rows with images their tensors, and which tokens are theirs.
Question = dict[str, Any]


class Model:
    """A base model that answers with one adapter at a time, or without, on the best device."""

    def __init__(self, base: str, spec: Spec | None, batch_size: int, max_new_tokens: int):
        import torch
        from transformers import GenerationConfig

        self.base, self._batch_size, self._max_new_tokens = base, batch_size, max_new_tokens
        self.tokenizer = base_models.load_tokenizer(base)
        model = base_models.load_base(base)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        # A base's other settings, as the penalty on repetitions that Qwen's have, would make greedy answers others than greedy.
        known = model.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id} - {None}  # which adapters train on
        model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None)
        self._config = _lora_config(spec) if spec else None
        if spec:
            from peft import get_peft_model

            with _fitting(base):
                model = get_peft_model(model, _lora_config(spec), adapter_name=NAME)
        self.model: Any = model.eval()

    def use(self, tree: Tree, spec: Spec) -> None:
        """Answer with this adapter from now on; raise InputError if it is none of the base's."""
        import torch
        from peft import set_peft_model_state_dict

        if (config := _lora_config(spec)) != self._config:
            self.model.delete_adapter(NAME)
            with _fitting(self.base):
                self.model.add_adapter(NAME, _lora_config(spec))
            self.model.set_adapter(NAME)
            self.model.eval()  # the new layers' dropout, too
            self._config = config
        flat = flatten_dict(tree, sep="/")
        state = {adapters.key_of(p): torch.from_numpy(np.ascontiguousarray(v, np.float32)) for p, v in flat.items()}
        state |= {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in spec.carried.items()}
        with _fitting(self.base):
            found: Any = set_peft_model_state_dict(self.model, state, adapter_name=NAME)
        if found.unexpected_keys:
            raise InputError(f"{self.base}: the adapter is none of this base's: {len(found.unexpected_keys)} of its tensors have "
                             f"no place there, first {found.unexpected_keys[0]}")

    def answer(self, rows: Sequence[Row], *, adapter: bool = True, examples: Sequence[Row] = ()) -> list[str]:
        """Return greedy answers; with `adapter=False` the base model's, with `examples` shown before each prompt."""
        return [text.strip() for text in self._generate(rows, adapter, examples, do_sample=False)]

    def sample(self, rows: Sequence[Row], samples: int, temperature: float, *, seed: int = 0, adapter: bool = True,
               examples: Sequence[Row] = ()) -> list[list[str]]:
        """Return several answers to each row, as they are, drawn at a temperature."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self._generate(rows, adapter, examples, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                                   num_return_sequences=samples)
        return [found[start : start + samples] for start in range(0, len(found), samples)]

    def loglikelihood(self, rows: Sequence[Row], options: Sequence[Sequence[str]], *, adapter: bool = True,
                      examples: Sequence[Row] = ()) -> list[np.ndarray]:
        """Return for each row the log-probability of each of its options as the beginning of the answer."""
        questions = self.questions(rows, examples)
        pairs = [(question, self.tokenizer(option, add_special_tokens=False).input_ids)
                 for question, found in zip(questions, options, strict=True) for option in found]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0][IDS]))
        values = np.zeros(len(pairs))
        with self._mode(adapter):
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                values[chosen] = _loglikelihoods(self.model, [pairs[i] for i in chosen], self.tokenizer.eos_token_id)
        return np.split(values, np.cumsum([len(found) for found in options])[:-1])

    def questions(self, rows: Sequence[Row], examples: Sequence[Row] = ()) -> list[Question]:
        """Return what is asked for each row, with solved examples before it."""
        shown: Question = {IDS: []}
        for row in examples:
            shown = _join(_join(shown, self._question(row)), {IDS: prompts.response_ids(self.tokenizer, row)})
        return [_join(shown, self._question(row)) for row in rows]

    def _question(self, row: Row) -> Question:
        if not row.images:
            return {IDS: prompts.prompt_ids(self.tokenizer, row)}
        ids = self._reader.prompt_ids(row)
        return {IDS: ids, **self._reader.inputs(row.images), "mm_token_type_ids": [int(i == self._reader.token) for i in ids]}

    @functools.cached_property
    def _reader(self) -> Reader:
        return Reader(self.base, self.tokenizer)

    def _generate(self, rows: Sequence[Row], adapter: bool, examples: Sequence[Row], **how: Any) -> list[str]:
        questions = self.questions(rows, examples)
        answers = []
        with self._mode(adapter):
            for start in range(0, len(questions), self._batch_size):
                chunk = questions[start : start + self._batch_size]
                answers += _continue(self.model, self.tokenizer, chunk, self._max_new_tokens, **how)
        return answers

    def _mode(self, adapter: bool) -> Any:
        return contextlib.nullcontext() if adapter or not hasattr(self.model, "peft_config") else self.model.disable_adapter()


def greedy(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Return the model's greedy continuations of token ids, as one batch."""
    questions = [{IDS: list(x)} for x in ids]
    return [text.strip() for text in _continue(model, tokenizer, questions, max_new_tokens, do_sample=False)]


def exact_match(answers: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """Return 1.0 for each answer equal to its row's response, else 0.0."""
    return np.array([float(a == row.response.strip()) for a, row in zip(answers, rows, strict=True)])


# --- batches ---------------------------------------------------------------------------------------------------------


def _continue(model: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int, **how: Any) -> list[str]:
    import torch

    inputs = _collate(questions, tokenizer.eos_token_id, model.device, left=True)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **how)
    return tokenizer.batch_decode(out[:, inputs[IDS].shape[1] :], skip_special_tokens=True)


def _loglikelihoods(model: Any, pairs: Sequence[tuple[Question, list[int]]], fill: int) -> np.ndarray:
    """Return the log-probability of each continuation of its question, as one batch."""
    import torch

    inputs = _collate([_join(question, {IDS: ids}) for question, ids in pairs], fill, model.device, left=False)
    width = inputs[IDS].shape[1]
    begins = [len(question[IDS]) - 1 for question, _ in pairs]  # what stands there predicts the first token
    with torch.inference_mode():
        logits = model(**inputs, logits_to_keep=width - min(begins)).logits
        first = width - logits.shape[1]
        values = []
        for row, begin, (_, ids) in zip(logits, begins, pairs, strict=True):
            chosen = row[begin - first : begin - first + len(ids)].float().log_softmax(-1)
            values.append(chosen.gather(1, torch.tensor(ids, device=row.device)[:, None]).double().sum().item())
    return np.array(values)


def _collate(questions: Sequence[Question], fill: int, device: Any, *, left: bool) -> dict[str, Any]:
    """Return model inputs: what has a value a token padded to one side, what is of images one after the other."""
    import torch

    width = max(len(question[IDS]) for question in questions)

    def pad(values: list[int], value: int) -> list[int]:
        padding = [value] * (width - len(values))
        return padding + values if left else values + padding

    inputs = {"attention_mask": torch.tensor([pad([1] * len(q[IDS]), 0) for q in questions])}
    for key in dict.fromkeys(key for question in questions for key in question):
        found = [q[key] for q in questions if key in q]
        if isinstance(found[0], list):
            inputs[key] = torch.tensor([pad(q.get(key, [0] * len(q[IDS])), fill if key == IDS else 0) for q in questions])
        else:
            inputs[key] = torch.cat(found)
    return {key: value.to(device) for key, value in inputs.items()}


def _join(first: Question, second: Question) -> Question:
    """Return one question after the other."""
    import torch

    joined: Question = {}
    for key in {**first, **second}:
        if any(isinstance(q.get(key), torch.Tensor) for q in (first, second)):
            joined[key] = torch.cat([q[key] for q in (first, second) if key in q])
        else:
            joined[key] = [v for q in (first, second) for v in q.get(key, [0] * len(q[IDS]))]
    return joined


@contextlib.contextmanager
def _fitting(base: str) -> Iterator[None]:
    """Turn what PEFT says of an adapter that is none of this base's into an InputError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{base}: the adapter is none of this base's: {' '.join(str(error).split())[:300]}") from error


def _lora_config(spec: Spec) -> Any:
    from peft import LoraConfig

    return LoraConfig.from_peft_type(**spec.config)
