"""Fine-tune a base model by LoRA, as `data_pipeline.collect` does for every task. Imports torch, transformers and peft lazily.

A step's loss is the mean over the response tokens of its batch, however the batch is divided: into `collect.accumulate`
microbatches, and over the processes of `accelerate launch`.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections

from dnd_jax import base_models, prompts
from dnd_jax.adapters.architecture import VISION_TOWER
from dnd_jax.images import Reader
from dnd_jax.sources import Row
from dnd_jax.types import InputError

DTYPES = ("float32", "bfloat16")
QUANTISED = ("none", "nf4")
IGNORED = -100  # the label of what isn't learned


class Example(NamedTuple):
    """Token ids and labels of a row, equally many, its images, and what loads them."""

    ids: list[int]
    labels: list[int]
    images: tuple[Any, ...] = ()
    reader: Reader | None = None


def check(c: ml_collections.ConfigDict, processes: int = 1) -> None:
    """Raise InputError at settings that can't be, or not on this machine."""
    import torch

    for key, value, expected in (("dtype", c.dtype, DTYPES), ("quantize", c.quantize, QUANTISED)):
        if value not in expected:
            raise InputError(f"config.collect.{key} is {value!r}, expected one of {expected}")
    for key, least in {"accumulate": 1, "batch_size": 1, "checkpoints": 1, "max_length": 1, "max_rows": 1, "multi_task_steps": 0,
                       "rank": 1, "steps": 0}.items():
        if c[key] is not None and c[key] < least:
            raise InputError(f"config.collect.{key} is {c[key]}, expected at least {least}")
    if c.clip_norm <= 0:
        raise InputError(f"config.collect.clip_norm is {c.clip_norm}, expected a positive number")
    if c.batch_size < c.accumulate * processes:
        raise InputError(f"config.collect.batch_size is {c.batch_size}, expected at least one row for each of {c.accumulate} "
                         f"microbatches (config.collect.accumulate) on {processes} processes")
    if c.quantize != "none" and not torch.cuda.is_available():
        raise InputError(f"config.collect.quantize is {c.quantize!r}, which needs an NVIDIA GPU, and torch finds none here")
    if c.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"config.collect.quantize is {c.quantize!r}, which needs the package bitsandbytes, not installed here")


@functools.lru_cache(maxsize=1)
def load_model(base: str, c: ml_collections.FrozenConfigDict, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Load base and tokenizer, add LoRA layers; return the PEFT model, the tokenizer and the initial LoRA weights.

    The last model is kept: the next call with the same arguments returns the same object, as trained, and the caller copies the
    initial weights back.

    The base has the dtype `c.dtype`, or is quantised to 4 bits and computes in that dtype; LoRA weights are float32.
    """
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    tokenizer = base_models.load_tokenizer(base)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, c.dtype)
    if c.quantize == "nf4":
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                       bnb_4bit_compute_dtype=dtype)
        model = base_models.load_base(base, dtype=dtype, quantization_config=four_bits, device_map=device)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model = base_models.load_base(base, dtype=dtype)
        model.to(device)
    peft_model = add_lora(model, c, seed)
    return peft_model, tokenizer, {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}


def add_lora(model: Any, c: ml_collections.ConfigDict, seed: int) -> Any:
    """Return the model with LoRA layers to train, A drawn from `seed`; of a vision-language model in its language tower only.

    Raises:
      InputError: names targets that are no modules of the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    names = [f".{name}" for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    if missing := [target for target in c.target_modules if not any(name.endswith(f".{target}") for name in names)]:
        there = sorted({name.rpartition(".")[2] for name in names})
        raise InputError(f"config.collect.target_modules has {missing}, the base's modules are {there}")
    if c.checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable()
    torch.manual_seed(seed)
    tower: dict[str, Any] = {"exclude_modules": VISION_TOWER} if hasattr(model.config, "vision_config") else {}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout,
                                            target_modules=c.target_modules, **tower))


# --- batches ---------------------------------------------------------------------------------------------------------


def tokenise(tokenizer: Any, rows: Sequence[Row], max_length: int,
             reader: Reader | None = None) -> list[Example]:
    """Return ids and labels of every row, cut off at `max_length`, without those of which no response token is left.

    What is left of a row with images has all their tokens, as they come before the response.

    Args:
      tokenizer: of the base.
      rows: of one task.
      max_length: in tokens, those of images included.
      reader: of images, where rows have them.

    Raises:
      InputError: a row with images without a reader, which would be trained on blindly.
    """
    if reader is None and (seen := next((row for row in rows if row.images), None)):
        raise InputError(f"fine-tuning takes text only, a row has images: {seen.prompt[:60]!r} with {str(seen.images[0])[:60]}")
    examples = []
    for row in rows:
        prompt = reader.prompt_ids(row) if reader and row.images else prompts.prompt_ids(tokenizer, row)
        response = prompts.response_ids(tokenizer, row)
        ids, labels = prompt + response, [IGNORED] * len(prompt) + response
        examples.append(Example(ids[:max_length], labels[:max_length], tuple(row.images), reader if row.images else None))
    return [example for example in examples if learned(example)]


def learned(example: Example) -> int:
    """Return how many tokens of an example the loss is on: all that have a label, but for the first."""
    return sum(label != IGNORED for label in example.labels[1:])


def collate(examples: Sequence[Example], fill: int) -> dict[str, Any]:
    """Return model inputs: examples padded to the right with the token `fill`, labels on responses only, and their images."""
    import torch

    width = max(len(example.ids) for example in examples)

    def pad(values: Sequence[list[int]], value: int) -> Any:
        return torch.tensor([v + [value] * (width - len(v)) for v in values])

    inputs = {"input_ids": pad([example.ids for example in examples], fill),
              "attention_mask": pad([[1] * len(example.ids) for example in examples], 0),
              "labels": pad([example.labels for example in examples], IGNORED)}
    if reader := next((example.reader for example in examples if example.reader), None):
        inputs |= reader.inputs([image for example in examples for image in example.images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == reader.token).int()
    return inputs


# --- training --------------------------------------------------------------------------------------------------------


def launched() -> Any:
    """Return accelerate's view of the processes that `accelerate launch` has started."""
    from accelerate import Accelerator

    return Accelerator()


def gpus() -> int:
    """Return how many GPUs PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def fine_tune(model: Any, examples: Sequence[Example], fill: int, c: ml_collections.ConfigDict, seed: int, steps: int,
              checkpoints: int, save: Callable[[int], None], accelerator: Any = None) -> list[float]:
    """Train the LoRA weights in place and return the loss of every step.

    The first `steps` steps follow a cosine from `learning_rate` to zero, the first `warmup_ratio` of them warming up; the
    `checkpoints` after them are consecutive steps at `continued_learning_rate`, each saved.

    Args:
      model: the PEFT model.
      examples: of one task.
      fill: token id of padding.
      c: `config.collect`.
      seed: what alone the order of examples and dropout depend on.
      steps: before the first checkpoint.
      checkpoints: steps that are saved.
      save: is called with the number of each.
      accelerator: of the processes that share every batch, if there are several.
    """
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=c.learning_rate, weight_decay=c.weight_decay)
    optimizer.zero_grad()  # of a run on the same model that has failed
    generator = torch.Generator().manual_seed(seed)
    losses, order = [], torch.empty(0, dtype=torch.long)
    warmup = max(1, math.ceil(c.warmup_ratio * steps))
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    torch.manual_seed(seed + process)
    parts = c.accumulate * processes
    model.train()
    for step in range(steps + checkpoints):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1, (step + 1) / warmup) if step < steps else 0.0
        optimizer.param_groups[0]["lr"] = c.learning_rate * cosine if step < steps else c.continued_learning_rate
        while len(order) < c.batch_size:
            order = torch.cat([order, torch.randperm(len(examples), generator=generator)])
        batch, order = [examples[i] for i in order[: c.batch_size].tolist()], order[c.batch_size :]
        loss = backward(model, [batch[i::parts] for i in range(process, parts, processes)], sum(map(learned, batch)), fill)
        if accelerator:
            loss = accelerator.reduce(loss, "sum")
            for p, gradient in zip(weights, accelerator.reduce([p.grad for p in weights], "sum"), strict=True):
                p.grad = gradient
        torch.nn.utils.clip_grad_norm_(weights, c.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {step + 1} of {steps + checkpoints}: the loss is {losses[-1]}")
        if step >= steps:
            save(step + 1)
    return losses


def backward(model: Any, microbatches: Sequence[Sequence[Example]], tokens: int, fill: int) -> Any:
    """Add the gradients of what microbatches contribute to the mean loss over `tokens` tokens; return that contribution.

    The model's loss is the mean over a microbatch's own tokens, so it counts by their share.
    """
    import torch

    total = torch.zeros((), device=model.device)
    for examples in microbatches:
        inputs = {name: value.to(model.device) for name, value in collate(examples, fill).items()}
        loss = model(**inputs).loss * (sum(map(learned, examples)) / tokens)
        loss.backward()
        total += loss.detach()
    return total
