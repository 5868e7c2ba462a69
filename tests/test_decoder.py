"""The decoder against arrays of the published implementation, and its shapes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dnd_jax import released
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.types import InputError

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(name):
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    config = json.loads(arrays.pop("config").tobytes())
    state = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    gradients = {k.removeprefix("grad/"): v for k, v in arrays.items() if k.startswith("grad/")}
    decoder = HyperConvDecoder(tuple(map(tuple, config["features"])), config["kernel_size"])
    return decoder, released.params_from_torch(state), released.params_from_torch(gradients), arrays


def assert_near(actual, expected, name, relative=1e-5):
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(actual) - expected).max() <= relative * max(scale, 1e-3), name


@pytest.mark.parametrize("name", ["hcd_a", "hcd_c"])
def test_golden_output_and_gradients(name):
    decoder, params, gradients, arrays = load(name)

    def loss(params, x):
        y = decoder.apply({"params": params}, x)
        return jnp.vdot(y, arrays["cotangent"]), y

    (_, y), (d_params, d_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, arrays["input"])
    assert_near(y, arrays["output"], "output")
    assert_near(d_x, arrays["grad_input"], "input")
    largest = max(np.abs(g).max() for g in flatten_dict(gradients).values())
    for path, expected in flatten_dict(gradients, sep="/").items():
        actual = flatten_dict(d_params, sep="/")[path]
        if path.endswith("out_bias") and not path.startswith(f"layers_{len(params) - 1}"):
            # The next layer's norm removes it where no residual carries it: rounding noise there, exactly zero here.
            assert np.abs(actual - expected).max() <= 1e-5 * largest, path
        else:
            assert_near(actual, expected, path)


@pytest.mark.parametrize("name", ["hcd_a", "hcd_c"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_yardstick_computes_the_same(name):
    """Of the benchmark: an independent implementation in PyTorch."""
    import torch

    from tests.torch_decoder import Decoder

    decoder, params, _, arrays = load(name)
    yardstick = Decoder(decoder.features, decoder.kernel_size)
    yardstick.load_state_dict({key: torch.tensor(value) for key, value in released.params_to_torch(params).items()})
    with torch.no_grad():
        y = yardstick(torch.tensor(arrays["input"])).numpy()
    assert_near(y, arrays["output"], "golden output")
    assert_near(jax.jit(decoder.apply)({"params": params}, arrays["input"]), y, "ours")


@pytest.mark.parametrize("features,k", [(((3, 4, 5), (6, 2, 7)), 4), (((2, 3, 4), (2, 3, 4), (5, 4, 3)), 3)])
def test_shapes_follow_features(features, k):
    decoder = HyperConvDecoder(features, k)
    x = jnp.ones((2, *features[0]))
    params = decoder.init(jax.random.key(0), x)["params"]
    assert decoder.apply({"params": params}, x).shape == (2, *features[-1])


A, B, C = (3, 4, 5), (6, 2, 7), (2, 3, 4)


@pytest.mark.parametrize("features,counts", [((A, A, A), [True, True]), ((A, B, B, C), [False, False, True])])
def test_output_biases_that_no_output_depends_on_have_zero_gradients(features, counts, rng):
    """All others have gradients, and moving one by 1 moves the output if and only if it has."""
    decoder = HyperConvDecoder(features, 3)
    x = jnp.asarray(rng.normal(size=(2, *features[0])), jnp.float32)
    params = decoder.init(jax.random.key(0), x)["params"]
    apply = jax.jit(lambda params: decoder.apply({"params": params}, x))
    gradients = jax.jit(jax.grad(lambda params: jnp.square(decoder.apply({"params": params}, x)).sum()))(params)
    for i, expected in enumerate(counts):
        moved = {**params, f"layers_{i}": {**params[f"layers_{i}"], "out_bias": params[f"layers_{i}"]["out_bias"] + 1}}
        moves = np.abs(apply(moved) - apply(params)).max()
        assert (moves > 0.1) == expected and (expected or moves < 1e-4), (i, moves)
        assert (np.abs(gradients[f"layers_{i}"].pop("out_bias")) > 0).all() == expected, i
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_wrong_condition_names_both_shapes():
    decoder = HyperConvDecoder(((3, 4, 5), (6, 2, 7)), 3)
    with pytest.raises(ValueError, match=r"\(3, 4, 6\), expected \(3, 4, 5\)"):
        decoder.init(jax.random.key(0), jnp.ones((1, 3, 4, 6)))


def test_released_names_round_trip():
    arrays = np.load(GOLDEN / "hcd_a.npz")
    state = {k.removeprefix("param/"): arrays[k] for k in arrays if k.startswith("param/")}
    back = released.params_to_torch(released.params_from_torch(state))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[k], state[k]) for k in state)


def test_released_names_that_do_not_fit():
    arrays = np.load(GOLDEN / "hcd_a.npz")
    state = {k.removeprefix("param/"): arrays[k] for k in arrays if k.startswith("param/")}
    unknown = {"model.decoder.module_list.0.linear1.conv9.weight": np.zeros(3)}
    with pytest.raises(ValueError, match="conv9"):
        released.params_from_torch({**state, **unknown})
    state.pop("model.decoder.module_list.1.linear2.bias")
    with pytest.raises(ValueError, match=r"module_list\.1\.linear2\.bias"):
        released.params_from_torch(state)


def test_shortening_is_the_published_projection(rng):
    """Reinterpreted, through two affine maps of PyTorch, reinterpreted back, then the decoder without it."""
    import torch

    features = ((2, 3, 4), (5, 4, 6))
    decoder, plain = HyperConvDecoder(features, 3, length=7), HyperConvDecoder(features, 3)
    x = rng.normal(size=(2, 2, 7, 4)).astype(np.float32)
    params = decoder.init(jax.random.key(0), x)["params"]
    state = released.params_to_torch(params)
    assert {"down_proj.weight", "gate_proj.bias"} <= state.keys()
    with torch.no_grad():
        down, gate = torch.nn.Linear(7, 3), torch.nn.Linear(3, 3)
        for name, module in (("down_proj", down), ("gate_proj", gate)):
            module.weight.copy_(torch.tensor(state[f"{name}.weight"]))
            module.bias.copy_(torch.tensor(state[f"{name}.bias"]))
        short = gate(down(torch.tensor(x).reshape(2, 2, 4, 7))).reshape(2, 2, 3, 4).numpy()
    rest = {name: value for name, value in params.items() if name != "shorten"}
    expected = plain.apply({"params": rest}, short)
    assert_near(decoder.apply({"params": params}, x), expected, "output")
    back = flatten_dict(released.params_from_torch(state), sep="/")
    assert back.keys() == flatten_dict(params, sep="/").keys()
    state.pop("gate_proj.bias")
    with pytest.raises(InputError, match=r"gate_proj\.bias is missing"):
        released.params_from_torch(state)
