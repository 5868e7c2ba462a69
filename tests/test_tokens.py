"""Weight tokens: the published layout element for element, and exact inverses for any rank and width."""

import json
import pathlib

import numpy as np
import pytest

from dnd_jax import tokens
from dnd_jax.adapters import InputError, Leaf, Spec
from dnd_jax.adapters.architecture import spec_of_model

GOLDEN = pathlib.Path(__file__).parent / "golden"
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def qwen_shapes(hidden, kv, intermediate):
    return {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden),
            "gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}


def golden_adapter(config):
    """Build the adapter that the golden file's formula describes: tree and spec."""
    shapes = qwen_shapes(config["hidden"], config["kv"], config["intermediate"])
    layers, leaves, i = {}, {}, 0
    for layer in range(config["layers"]):
        for name in ORDER:
            out, width = shapes[name]
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            for side, shape in (("lora_A", (config["rank"], width)), ("lora_B", (out, config["rank"]))):
                row, col = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
                value = np.sin(0.37 * i + 0.011 * row + 0.0007 * col * (1 + i % 5)) * 0.02 * (1 + 0.1 * i)
                modules = layers.setdefault(str(layer), {}).setdefault(block, {}).setdefault(name, {})
                modules[side] = value.astype(np.float32)
                leaves[f"model/layers/{layer}/{block}/{name}/{side}"] = Leaf(shape, "float32")
                i += 1
    return {"model": {"layers": layers}}, Spec({"r": config["rank"]}, leaves)


@pytest.mark.parametrize("name", ["tokens_qwen2.5-0.5b", "tokens_qwen2.5-vl-3b"])
def test_golden_elements(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(golden["config"].tobytes())
    tree, spec = golden_adapter(config)
    model = {"hidden_size": config["hidden"], "num_attention_heads": config["hidden"] // 64, "intermediate_size":
             config["intermediate"], "num_key_value_heads": config["kv"] // 64, "num_hidden_layers": config["layers"]}
    layout = tokens.plan(spec_of_model(model, config["rank"]))  # from the model's config alone
    assert layout == tokens.plan(spec)
    actual, mask = tokens.encode(tree, layout)
    assert actual.dtype == np.float32 and layout.shape == actual.shape == tuple(golden["shape"])
    assert layout.shape[1:] == tuple(config["token_size"])
    t, i, j = golden["index"].T
    np.testing.assert_allclose(actual[t, i, j], golden["value"], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal((~mask).sum((1, 2)), golden["nan_per_token"])
    np.testing.assert_allclose(np.nansum(actual.astype(np.float64), (1, 2)), golden["per_token_sum"], atol=5e-3)


def random_adapter(rng, shapes):
    flat = {path: rng.normal(rng.normal(), 10 ** rng.uniform(-4, 0), shape).astype(np.float32)
            for path, shape in shapes.items()}
    tree = tokens.unflatten_dict(flat, sep="/")
    return flat, tree, Spec({}, {p: Leaf(v.shape, "float32") for p, v in flat.items()})


@pytest.mark.parametrize("rank,width,out,chunk", [
    (1, 7, 5, None), (3, 33, 65, None), (2, 64, 96, None), (5, 13, 1, 4), (4, 10, 30, 7), (3, 48, 80, 16), (8, 100, 1000, 300),
])
def test_round_trip_of_odd_ranks_and_widths(rank, width, out, chunk):
    rng = np.random.default_rng(0)
    flat, tree, spec = random_adapter(rng, {"layers/0/q_proj/lora_A": (rank, width), "layers/0/q_proj/lora_B": (out, rank),
                                            "layers/1/q_proj/lora_A": (1, 9), "layers/1/q_proj/lora_B": (11, 1)})
    layout = tokens.plan(spec, chunk)
    encoded, mask = tokens.encode(tree, layout)
    assert mask.sum() == sum(v.size for v in flat.values()) + encoded.shape[0] * (
        encoded.shape[1] * encoded.shape[2] - layout.rank * layout.chunk)
    back = tokens.flatten_dict(tokens.decode(np.where(mask, encoded, 0), layout), sep="/")
    assert back.keys() == flat.keys()
    for path, value in flat.items():
        np.testing.assert_allclose(back[path], value, atol=4e-6 * max(np.abs(value).max(), 0.1), err_msg=path)


def test_zero_matrices_stay_zero():
    tree = {"layers": {"0": {"q_proj": {"lora_A": np.ones((2, 8), np.float32), "lora_B": np.zeros((8, 2), np.float32)}}}}
    spec = Spec({}, {"layers/0/q_proj/lora_A": Leaf((2, 8), "float32"), "layers/0/q_proj/lora_B": Leaf((8, 2), "float32")})
    layout = tokens.plan(spec)
    encoded, mask = tokens.encode(tree, layout)
    assert mask.all() and np.isfinite(encoded).all()
    np.testing.assert_allclose(tokens.decode(encoded, layout)["layers"]["0"]["q_proj"]["lora_B"], 0, atol=1e-7)


def test_order_is_by_layer_then_module_and_numbers_are_numbers():
    paths = [f"model/layers/{layer}/mlp/{name}/lora_{side}"
             for layer in (10, 2) for name in ("down_proj", "gate_proj", "up_proj") for side in "BA"]
    paths += ["lm_head/lora_A", "lm_head/lora_B"]
    spec = Spec({}, {p: Leaf((2, 4) if p.endswith("A") else (4, 2), "float32") for p in paths})
    order = [m.path for m in tokens.plan(spec).matrices]
    assert order[:4] == ["model/layers/2/mlp/up_proj/lora_A", "model/layers/2/mlp/up_proj/lora_B",
                         "model/layers/2/mlp/gate_proj/lora_A", "model/layers/2/mlp/gate_proj/lora_B"]
    assert order[6] == "model/layers/10/mlp/up_proj/lora_A" and order[-1] == "lm_head/lora_B"


def test_layout_survives_json():
    _, _, spec = random_adapter(np.random.default_rng(0), {"layers/0/v_proj/lora_A": (3, 10), "layers/0/v_proj/lora_B": (6, 3)})
    layout = tokens.plan(spec)
    assert tokens.Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_wrong_token_shape_names_both():
    _, _, spec = random_adapter(np.random.default_rng(0), {"layers/0/v_proj/lora_A": (3, 10), "layers/0/v_proj/lora_B": (6, 3)})
    layout = tokens.plan(spec)
    with pytest.raises(ValueError, match=r"tokens are \[1, 2, 3\], the layout expects"):
        tokens.decode(np.zeros((1, 2, 3), np.float32), layout)


def test_what_has_no_layout_or_another_is_named():
    shapes = {"layers/0/v_proj/lora_A": (3, 10), "layers/0/v_proj/lora_B": (6, 3)}
    _, tree, spec = random_adapter(np.random.default_rng(0), shapes)
    with pytest.raises(InputError, match="nothing that could be generated"):
        tokens.plan(Spec({}, {}))
    for chunk in (0, -4):
        with pytest.raises(InputError, match=f"config.export.chunk, is {chunk}, expected at least 1"):
            tokens.plan(spec, chunk)
    layout = tokens.plan(spec, 16)
    tree["layers"]["0"]["v_proj"]["lora_A"] = np.ones((3, 12), np.float32)  # as many tiles
    with pytest.raises(InputError, match=r"layers/0/v_proj/lora_A is \[3, 12\], the layout expects \[3, 10\]"):
        tokens.encode(tree, layout)
