"""Encoders of every kind on miniature models: shapes, batches, padding, windows, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from dnd_jax import encoders
from dnd_jax.types import InputError

WORDS = "how zib is the whale ant crow reply in roman : ? bear".split()
PROMPTS = [*(f"how zib is the {name} :" for name in ("whale", "ant", "crow", "bear")), "how",
           "zib is the whale ant crow ? : how zib"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sentence encoder of 8 positions, a T5, a causal model and a file of word vectors."""
    import transformers as t
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    bert = t.BertModel(t.BertConfig(vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=24, max_position_embeddings=8, initializer_range=0.3))
    bert.save_pretrained(root / "bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    t.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(root / "bert")
    SentenceTransformer(modules=[Transformer(str(root / "bert")), Pooling(16, "mean")]).save(str(root / "sentence"))
    roberta = t.RobertaModel(t.RobertaConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=10, pad_token_id=1))
    roberta.save_pretrained(root / "roberta")
    t.BertTokenizer(vocab={piece: i for i, piece in enumerate(["[UNK]", "[PAD]", *pieces[2:]])}).save_pretrained(root / "roberta")
    SentenceTransformer(modules=[Transformer(str(root / "roberta")), Pooling(16, "mean")]).save(str(root / "roberta-sentence"))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    t5 = t.T5EncoderModel(t.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    gpt = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, n_positions=32,
                                          bos_token_id=1, eos_token_id=1))
    for name, model in (("t5", t5), ("gpt", gpt)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "glove.txt").write_text("".join(f"{w} {i}.5 -1 0.25\n" for i, w in enumerate(WORDS[:8])))
    return root


def settings(folders):
    return {
        "sentence": {"name": str(folders / "sentence"), "length": 8},
        "windows": {"name": str(folders / "sentence"), "length": 24},
        "roberta": {"name": str(folders / "roberta-sentence"), "length": 16},  # two windows: of ten positions two are unused
        "t5": {"kind": "t5", "name": str(folders / "t5"), "length": 10},
        "causal_lm": {"kind": "causal_lm", "name": str(folders / "gpt"), "length": 10, "layer": 1},
        "glove": {"kind": "glove", "name": str(folders / "glove.txt"), "length": 10},
    }


@pytest.mark.parametrize("name", ["sentence", "windows", "roberta", "t5", "causal_lm", "glove"])
def test_a_prompt_has_one_condition_whatever_its_batch(folders, name):
    chosen = settings(folders)[name]
    encoder = encoders.make(chosen)
    together = encoder(PROMPTS)
    assert together.shape == (6, chosen["length"], encoder.width) and together.dtype == np.float16
    assert np.isfinite(together).all() and not np.array_equal(together[0], together[1])
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(encoder([prompt])[0], together[i])
    many = encoder(PROMPTS * 30)
    np.testing.assert_array_equal(many[:6], together)
    np.testing.assert_array_equal(many[-6:], together)


@pytest.mark.parametrize("name,length,count", [  # of tokens of the longest prompt, with those that the tokenizer adds
    ("sentence", 8, 12), ("windows", 16, 12), ("roberta", 8, 12), ("t5", 9, 10), ("causal_lm", 12, 10), ("glove", 9, 10)])
def test_prompts_that_are_cut_are_counted(folders, name, length, count):
    encoder = encoders.make(settings(folders)[name] | {"length": length})
    assert max(encoder.count_tokens(PROMPTS)) == count == encoder.count_tokens(PROMPTS[-1:])[0]
    cut, whole = (encoders.describe_cut(encoder, [PROMPTS[i]] * 3) for i in (-1, 4))
    assert cut == (f"3 of 3 texts have more than the encoder's {length} tokens, and are cut there" if count > length else "")
    assert not whole
    assert np.array_equal(*encoder([PROMPTS[-1], PROMPTS[-1] + " ant"])) == (count > length)


def test_windows_are_encoded_on_their_own(folders):
    chosen = settings(folders)
    long, short = encoders.make(chosen["windows"]), encoders.make(chosen["sentence"])
    text = "zib is the whale ant crow ? : how zib is the bear :"
    ids = long._tokenizer(text, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.inference_mode():
        windows = [short._model(input_ids=ids.input_ids[:, i : i + 8], attention_mask=ids.attention_mask[:, i : i + 8])
                   .last_hidden_state[0] for i in (0, 8, 16)]
    np.testing.assert_allclose(long([text])[0], torch.cat(windows).numpy(), atol=2e-3)


@pytest.mark.parametrize("name", ["sentence", "t5", "causal_lm"])
def test_options_beyond_the_paper(folders, name):
    chosen = settings(folders)[name]
    plain = encoders.make(chosen)(["how"])[0].astype(np.float32)
    masked = encoders.make(chosen | {"mask_padding": True})(["how"])[0].astype(np.float32)
    used = np.abs(masked).sum(1) > 0
    assert 0 < used.sum() < len(used) and np.abs(plain[~used]).sum() > 0
    np.testing.assert_array_equal(masked[used], plain[used])
    pooled = encoders.make(chosen | {"pooled": True})(["how"])
    assert pooled.shape == (1, 1, 16)
    np.testing.assert_allclose(pooled[0, 0], plain[used].mean(0), atol=2e-3)


def test_hidden_states_beyond_float16_are_refused(folders, tmp_path):
    import transformers as t

    model = t.T5EncoderModel.from_pretrained(folders / "t5")
    model.encoder.final_layer_norm.weight.data *= 1e6
    model.save_pretrained(tmp_path)
    t.AutoTokenizer.from_pretrained(folders / "t5").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"a hidden state is .*e\+0\d, float16 ends at 65504"):
        encoders.make({"kind": "t5", "name": str(tmp_path), "length": 10})(["how"])


def test_a_causal_encoder_reads_the_layer_it_is_told(folders):
    chosen = settings(folders)["causal_lm"]
    ids = torch.tensor([[3, 4, 5] + [0] * 7])
    encoder = encoders.make(chosen)
    with torch.inference_mode():
        states = encoder._model(input_ids=ids, attention_mask=(ids > 0).long(), output_hidden_states=True).hidden_states
    assert len(states) == 4
    np.testing.assert_allclose(encoder(["how zib is"])[0], states[2][0].numpy(), atol=2e-3)


def test_words_of_a_vector_file_may_have_spaces(tmp_path):
    (tmp_path / "v.txt").write_text("a 1 2\n. . . 3 4\nat a@b.org 5 6\n")
    assert list(encoders.GloveEncoder(str(tmp_path / "v.txt"), 4)._vectors) == ["a", ". . .", "at a@b.org"]


@pytest.mark.parametrize("kind", ["qwen3", "t5"])
def test_sentence_encoders_of_other_kinds_than_bert(folders, tmp_path, kind):
    """Without a table of positions, whose size would be the length of a window."""
    import transformers as t
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    model = t.T5EncoderModel.from_pretrained(folders / "t5") if kind == "t5" else t.Qwen3Model(t.Qwen3Config(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "model")
    t.AutoTokenizer.from_pretrained(folders / "t5").save_pretrained(tmp_path / "model")
    SentenceTransformer(modules=[Transformer(str(tmp_path / "model")), Pooling(16, "mean")]).save(str(tmp_path / "sentence"))
    encoder = encoders.make({"name": str(tmp_path / "sentence"), "length": 24})
    condition = encoder(PROMPTS)
    assert condition.shape == (6, 24, 16) and np.isfinite(condition).all() and not np.array_equal(condition[0], condition[1])
    np.testing.assert_array_equal(encoder(PROMPTS[:1])[0], condition[0])


def test_a_sentence_encoder_without_a_state_per_token_is_refused(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "how": 1}, "[UNK]"))
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)]).save(str(tmp_path / "static"))
    with pytest.raises(InputError, match="static: begins with StaticEmbedding, expected a transformer"):
        encoders.make({"name": str(tmp_path / "static"), "length": 8})


def test_a_decoder_gets_the_encoder_of_its_conditions_or_none(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders / "sentence", tmp_path / "sentence")
    chosen = {"name": str(tmp_path / "sentence"), "length": 8}
    about = {"encoder": chosen, "encoder_sha256": encoders.identity(chosen), "features": [[4, 8, 16], [2, 2, 2]]}
    assert encoders.identity(chosen) == encoders.identity({"name": str(folders / "sentence")})
    (tmp_path / "sentence" / "README.md").write_text("words only")
    (tmp_path / "sentence" / ".cache" / "hub").mkdir(parents=True)
    (tmp_path / "sentence" / ".cache" / "hub" / "model.metadata").write_text("of a download")
    assert encoders.of_decoder(about).width == 16
    weights = tmp_path / "sentence" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"sentence: its files have sha256 \w+\.\.\., those of the decoder's conditions had"):
        encoders.of_decoder(about)
    with pytest.raises(InputError, match="sentence: has 16 channels, the decoder takes 24"):
        encoders.of_decoder(about | {"features": [[4, 8, 24]]})
    monkeypatch.setattr(encoders, "identity", lambda settings: "commit b")
    encoders.of_decoder(about | {"encoder_sha256": "commit a"})
    assert "sentence is of commit b, that of the decoder's conditions was commit a" in capsys.readouterr().out


def test_glove_knows_padding_and_unknown_words(folders):
    condition = encoders.make(settings(folders)["glove"])(["How nobody"])[0]
    np.testing.assert_array_equal(condition[:3], [[0.5, -1, 0.25], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("change,message", [
    ({"length": 12}, "length is 12, expected at most 8 or a multiple"), ({"kind": "word2vec"}, "'word2vec', expected one of"),
    ({"name": "nowhere/at/all"}, "nowhere/at/all"), ({"lenght": 8}, r"\['lenght'\] are unknown for kind 'sentence'"),
    ({"kind": "glove", "pooled": True}, r"\['pooled'\] are unknown for kind 'glove', which takes name, length"),
    ({"kind": "causal_lm", "layer": 3}, "layer is 3, the model has 3"),
    ({"kind": "glove", "name": "nowhere.txt"}, "nowhere.txt"),
    ({"length": 0}, "length is 0, expected a number of positions"), ({"length": -1, "kind": "glove"}, "length is -1, expected"),
])
def test_bad_settings_are_named(folders, change, message):
    chosen = settings(folders)["causal_lm" if change.get("kind") == "causal_lm" else "sentence"]
    with pytest.raises(InputError, match=message):
        encoders.make(chosen | change)


@pytest.mark.parametrize("setting", [{}, {"classifier_dropout": None}])
def test_a_model_of_another_kind_is_refused_instead_of_drawn_at_random(folders, tmp_path, setting):
    other = shutil.copytree(folders / "bert", tmp_path / "bert")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "classifier_dropout"} | setting))
    with pytest.raises(InputError, match=r"encoder .*bert: (its files lack \d+ parameters of T5|.*classifier_dropout)"):
        encoders.make({"kind": "t5", "name": str(other), "length": 10})


@pytest.mark.parametrize("text,message", [
    ("a 1 2\nb 1\n", "line 2 has 1 values, expected 2"), ("", "no vectors"), ("a\n", "line 1"), ("a 1 x\n", "line 1: could not"),
    ("a 1 2\nb 1 2 3\n", "line 2 has 3 values, expected 2"), ("a 1 nan\n", "line 1: a value of 'a' isn't finite in float16"),
    ("a 1 2\nb 1e6 2\n", "line 2: a value of 'b' isn't finite in float16, which ends at 65504")])
def test_broken_vector_files_are_named(tmp_path, text, message):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        encoders.GloveEncoder(str(tmp_path / "v.txt"), 4)
