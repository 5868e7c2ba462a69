"""Make the embedded world: a base model, a text encoder and the tenants' datasets, as real files.

    python -m data_pipeline.tenants --out=build/tenants --seed=0

Writes `base/` and `encoder/`, loadable by transformers and sentence-transformers, `datasets/<tenant>_{train,test}.json`,
`unrelated/{questions,conversions}.json`, which no tenant asks, `world.json` with the settings, and `tasks.json`; prints what
the base model knows, and writes it to `base_model.json`. Deterministic in the seed on one machine.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipeline import world
from dnd_jax import cli, files, folders, prompts, scoring
from dnd_jax.sources import Row

MARKER = "../world.json"  # beside every part that is written here
Example = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the world's models are trained; shares are of the base model's batches, by kind of text."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    steps: int = 2000
    batch: int = 96
    length: int = 24
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.2
    shares: tuple[tuple[str, float], ...] = (
        ("statements", 0.05), ("named", 0.45), ("unnamed", 0.15), ("heard", 0.25), ("conversions", 0.1))
    encoder_hidden: int = 48
    encoder_layers: int = 2
    encoder_steps: int = 1000
    encoder_chosen: float = 0.3
    encoder_kept: float = 0.25
    named_every: int = 6
    held_out_entities: int = 12
    tenants: tuple[int, int, int] = (48, 4, 12)
    unrelated_rows: int = 96


# --- tokenizers ------------------------------------------------------------------------------------------------------


def make_base_tokenizer(text: Iterable[str]) -> Any:
    """Train a byte-level BPE tokenizer of Qwen2's class in which every word of the world is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    end = "<|endoftext|>"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer(vocab={end: 0}, merges=[]).backend_tokenizer.pre_tokenizer
    trained.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, special_tokens=[end], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    model = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges)


def make_encoder_tokenizer(text: Iterable[str]) -> Any:
    """Return a BERT tokenizer whose vocabulary is the world's words and single characters."""
    from transformers import BertTokenizer

    words = {word for line in text for word in line.split()}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


# --- models ----------------------------------------------------------------------------------------------------------


def make_base(text: dict[str, list[Example]], s: Settings, seed: int) -> tuple[Any, Any]:
    """Train a small Qwen2 from scratch on the encyclopedia; return model and tokenizer.

    The loss is on responses: answers to questions, and whole texts where there is no prompt. Wide initial weights
    (0.12) are what makes facts be learned in hundreds of steps instead of thousands; weight decay is what makes all
    questions about an attribute go one way, which an adapter can then redirect (`experiments/LOG.md`).
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_base_tokenizer(part for kind in text.values() for pair in kind for part in pair if part)
    torch.manual_seed(seed)
    model: Any = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=s.hidden, intermediate_size=2 * s.hidden, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.heads // 2, max_position_embeddings=256, initializer_range=0.12,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    ))
    kinds = {kind: _encode(tokenizer, pairs, s.length, end=kind != "heard") for kind, pairs in text.items()}
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterable[dict[str, Any]]:
        for _ in range(s.steps):
            chosen = [kinds[k][torch.randint(len(kinds[k]), (round(s.batch * share),), generator=generator)]
                      for k, share in s.shares]
            ids, labels = torch.cat(chosen).unbind(1)
            width = int((ids >= 0).sum(1).max())
            ids, labels = ids[:, :width], labels[:, :width]
            yield {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": labels}

    _optimize(model, batches(), s.steps, s.learning_rate, s.weight_decay, "base")
    return model, tokenizer


def make_encoder(sentences: Sequence[str], s: Settings, seed: int) -> Any:
    """Train a miniature Sentence-BERT by masked words, without labels; return a SentenceTransformer.

    As in BERT, words to be told are mostly masked, sometimes replaced and sometimes kept. The kept ones keep the
    hidden states of words apart that occur in the same places, here all jargon words.
    """
    import tempfile

    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertForMaskedLM, BertModel

    tokenizer = make_encoder_tokenizer(sentences)
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig(
        vocab_size=len(tokenizer), hidden_size=s.encoder_hidden, num_hidden_layers=s.encoder_layers, num_attention_heads=4,
        intermediate_size=2 * s.encoder_hidden, max_position_embeddings=64, initializer_range=0.12,
    ))
    ids = tokenizer(list(sentences), padding=True, return_tensors="pt").input_ids
    first_word = 1 + max(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterable[dict[str, Any]]:
        for _ in range(s.encoder_steps):
            rows = ids[torch.randint(len(ids), (64,), generator=generator)]
            chance = torch.rand((2, *rows.shape), generator=generator)
            other = torch.randint(first_word, len(tokenizer), rows.shape, generator=generator)
            chosen = (rows >= first_word) & (chance[0] < s.encoder_chosen)
            replaced, kept = chosen & (chance[1] < s.encoder_kept), chosen & (chance[1] > 1 - s.encoder_kept)
            masked = rows.masked_fill(chosen & ~kept, tokenizer.mask_token_id)
            yield {"input_ids": torch.where(replaced, other, masked),
                   "attention_mask": (rows != tokenizer.pad_token_id).long(), "labels": rows.masked_fill(~chosen, -100)}

    _optimize(model, batches(), s.encoder_steps, 2e-3, 0.01, "encoder")
    with tempfile.TemporaryDirectory() as folder:
        bert = BertModel(model.config)
        bert.load_state_dict(model.bert.state_dict(), strict=False)  # all but the pooler, which masked words don't train
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
        return SentenceTransformer(modules=[transformer, Pooling(s.encoder_hidden, "mean")], device="cpu")


def _encode(tokenizer: Any, pairs: Sequence[Example], width: int, end: bool) -> Any:
    """Return ids and labels `[examples, 2, width]`, padded with -1 and -100."""
    import torch

    rows = []
    for prompt, response in pairs:
        first = tokenizer(prompt).input_ids if prompt else []
        second = tokenizer(response).input_ids + [tokenizer.eos_token_id] * end
        rows.append((first + second, [-100] * len(first) + second))
    return torch.tensor([[ids + [-1] * (width - len(ids)), labels + [-100] * (width - len(ids))] for ids, labels in rows])


def _optimize(model: Any, batches: Iterable[dict[str, Any]], steps: int, rate: float, decay: float, name: str) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for inputs in tqdm(batches, desc=name, total=steps, mininterval=1.0):
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


# --- files -----------------------------------------------------------------------------------------------------------


def exact(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Return the share of rows that the base model answers word for word."""
    answers = scoring.greedy(model, tokenizer, [prompts.prompt_ids(tokenizer, row) for row in rows], 4)
    return float(scoring.exact_match(answers, rows).mean())


def write_world(out: pathlib.Path, seed: int, s: Settings) -> None:
    """Write the whole world, each part under its final name only when it is complete; `tasks.json` comes last.

    Raises:
      InputError: another folder has the name of a part.
    """
    for part in ("base", "encoder", "datasets", "unrelated"):
        folders.check_ours(out / part, MARKER)
    (out / "tasks.json").unlink(missing_ok=True)  # of another world, of which nothing may be left if this one is not finished
    files.write_json(out / "world.json", {"seed": seed, **dataclasses.asdict(s)})
    rng = np.random.default_rng(seed)
    facts = world.make_facts(rng)
    made = world.make_tenants(rng, test=s.tenants[2])
    tenants = {split: found[:count] for (split, found), count in zip(made.items(), s.tenants, strict=True)}
    order = world.draw_questions(rng, s.named_every)
    rows = {t: world.tenant_rows(t, facts, order, held_out=s.held_out_entities)
            for split in tenants.values() for t in split}
    text = world.encyclopedia(facts)
    base, tokenizer = make_base(text, s, seed)
    questions = [Row(*text["named"][i]) for i in rng.choice(len(text["named"]), 1000, replace=False)]
    asked = [Row(**row) for found in rows.values() for row in found["test"]]
    known = {"fact_recall": exact(base, tokenizer, questions), "tenants_prompts": exact(base, tokenizer, asked)}
    print(f"base model: fact recall {known['fact_recall']:.1%}, tenants' prompts {known['tenants_prompts']:.1%}")
    with folders.atomic_folder(out / "base", MARKER) as folder:
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    unlabeled = [response for kind in ("statements", "heard") for _, response in text[kind]]
    encoder = make_encoder(unlabeled, s, seed)
    with folders.atomic_folder(out / "encoder", MARKER) as folder:
        encoder.save(str(folder))
    tasks = {}
    with folders.atomic_folder(out / "datasets", MARKER) as folder:
        for split, members in tenants.items():
            for tenant in members:
                tasks[tenant.name] = {"split": split}
                for part in ("train", "test"):
                    files.write_json(folder / f"{tenant.name}_{part}.json", rows[tenant][part])
                    tasks[tenant.name][part] = f"datasets/{tenant.name}_{part}.json"
    with folders.atomic_folder(out / "unrelated", MARKER) as folder:
        for name, kind in (("questions", "named"), ("conversions", "conversions")):
            files.write_json(folder / f"{name}.json", world.draw_rows(rng, text[kind], s.unrelated_rows))
    files.write_json(out / "base_model.json", known)
    files.write_json(out / "tasks.json", tasks)


def define_flags() -> None:
    flags.DEFINE_string("out", None, required=True, help="Folder to write the world to.")
    flags.DEFINE_integer("seed", 0, "Seed of facts, tenants and models.", lower_bound=0)
    flags.DEFINE_bool("smoke", False, "Make a few tenants and barely train the models: for tests of the machinery.")


def main(args: Any) -> None:
    settings = Settings(steps=20, encoder_steps=20, tenants=(6, 2, 2)) if args.smoke else Settings()
    write_world(pathlib.Path(args.out), args.seed, settings)


if __name__ == "__main__":
    cli.run(main, define_flags)
