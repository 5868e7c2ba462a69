"""The Fourier form of the plane convolution against the plain one."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnd_jax import fourier_conv, fourier_plan
from dnd_jax.decoder import HyperConvDecoder, plane_axes, prepare
from dnd_jax.fourier_plan import Plan

CHANNELS, OUT = 6, 4
# plane, k, which of the ways to cut each axis (the first is one tile), Karatsuba, chunks of output channels, axes swapped
CASES = {
    "odd kernel, one tile": ((7, 9), 3, (0, 0), True, 1, False),
    "even kernel, one tile": ((7, 9), 4, (0, 0), False, 1, False),
    "odd kernel, partial tiles": ((11, 13), 5, (2, 1), True, 2, False),
    "even kernel, partial tiles": ((11, 13), 6, (1, 2), False, 2, False),
    "kernel longer than one axis": ((3, 20), 9, (0, 2), True, 1, False),
    "even kernel longer than both axes": ((2, 3), 10, (0, 0), False, 2, False),
    "tiles shorter than their overlap": ((12, 10), 7, (4, 3), True, 1, False),
    "axes swapped, odd kernel": ((11, 13), 5, (2, 1), False, 1, True),
    "axes swapped, even kernel, chunks": ((13, 4), 6, (0, 3), True, 2, True),
    "one position": ((1, 1), 5, (0, 0), True, 1, False),
}


def make_plan(plane, k, cuts, karatsuba, chunks, swapped):
    sizes = plane[::-1] if swapped else plane
    first, second = (fourier_plan.axes(size, k, even)[cut] for size, cut, even in zip(sizes, cuts, (True, False), strict=True))
    return Plan(2, first, second, karatsuba, swapped, chunks)


def operands(rng, plane, k, dtype=np.float32):
    x, kernel, g = (rng.normal(size=s) for s in ((2, *plane, CHANNELS), (k, k, CHANNELS, OUT), (2, *plane, OUT)))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), jnp.asarray(g, dtype)


def relative(actual, expected):
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    return np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())


def exact(x, kernel):
    """Return the convolution in float64 by its definition."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k, (_, s1, s2, _) = kernel.shape[0], x.shape
    low = (k - 1) // 2
    padded = np.pad(x, ((0, 0), (low, k - 1 - low), (low, k - 1 - low), (0, 0)))
    return sum(padded[:, i:i + s1, j:j + s2] @ kernel[i, j] for i in range(k) for j in range(k))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_convolution(rng, case):
    plane, k, *cuts = CASES[case]
    plan = make_plan(plane, k, *cuts)
    x, kernel, g = operands(rng, plane, k)

    @jax.jit
    def both(x, kernel, g):
        y, transposed = jax.vjp(lambda x, w: fourier_conv._planned(x, w, (1, 2, 3), plan), x, kernel)
        y_0, transposed_0 = jax.vjp(lambda x, w: fourier_conv._direct(x, w, (1, 2, 3)), x, kernel)
        return (y, *transposed(g)), (y_0, *transposed_0(g))

    ours, theirs = both(x, kernel, g)
    assert relative(ours[0], exact(x, kernel)) < 6e-7
    for name, actual, expected in zip(("output", "gradient of x", "gradient of the kernel"), ours, theirs, strict=True):
        assert actual.shape == expected.shape and relative(actual, expected) < 1e-6, name


@pytest.mark.parametrize("case", CASES)
def test_frequencies_in_bands_give_the_same(rng, case):
    """That is how it goes where no gradient follows: in two bands, of which one may be larger, and each frequency by itself."""
    plane, k, *cuts = CASES[case]
    plan = make_plan(plane, k, *cuts)
    x, kernel, _ = operands(rng, plane, k)
    for bands in {min(2, plan.half), plan.half}:
        convolve = functools.partial(fourier_conv._planned, axes=(1, 2, 3), plan=dataclasses.replace(plan, bands=bands))
        assert relative(jax.jit(convolve)(x, kernel), exact(x, kernel)) < 6e-7, bands


@pytest.mark.parametrize("spec", ["BNLC,LN->BNLD", "BNLC,NC->BNMC", "BNMC,MN->BNMD", "BNMD,MD->BOMD"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_planes_anywhere_in_a_block(rng, spec, chunks):
    """Every convolution of a layer, by Fourier with several tiles along both axes, equals the plain one with the axes moved."""
    axes = plane_axes(spec)
    sizes = {axes[0]: 11, axes[1]: 13, axes[2]: CHANNELS}
    x = jnp.asarray(rng.normal(size=(2, *(sizes[axis] for axis in (1, 2, 3)))), jnp.float32)
    _, kernel, g = operands(rng, (11, 13), 5)
    plan = make_plan((11, 13), 5, (2, 1), True, chunks, swapped=axes[0] == 3)

    def plain(x, kernel):
        return jnp.moveaxis(fourier_conv._direct(jnp.moveaxis(x, axes, (1, 2, 3)), kernel, (1, 2, 3)), (1, 2, 3), axes)

    g = jnp.moveaxis(g, (1, 2, 3), axes)
    y, transposed = jax.vjp(lambda x, w: fourier_conv._planned(x, w, axes, plan), x, kernel)
    expected, transposed_0 = jax.vjp(plain, x, kernel)
    for actual, wanted in zip((y, *transposed(g)), (expected, *transposed_0(g)), strict=True):
        assert actual.shape == wanted.shape and relative(actual, wanted) < 1e-6


def test_bfloat16_is_as_exact_as_the_plain_convolution(rng):
    plane, k, cuts, _, chunks, swapped = CASES["odd kernel, partial tiles"]
    x, kernel, g = operands(rng, plane, k, jnp.bfloat16)
    expected = exact(x, kernel)
    plain = relative(fourier_conv._direct(x, kernel, (1, 2, 3)), expected)
    for karatsuba in (False, True):
        plan = make_plan(plane, k, cuts, karatsuba, chunks, swapped)
        convolve = functools.partial(fourier_conv._planned, axes=(1, 2, 3), plan=plan)
        y, transposed = jax.jit(lambda x, w, convolve=convolve: jax.vjp(convolve, x, w))(x, kernel)
        assert y.dtype == jnp.bfloat16
        assert relative(y, expected) < max(3 * plain, 4e-3), karatsuba
        x32, kernel32, g32 = (a.astype(jnp.float32) for a in (x, kernel, g))
        gradients = jax.vjp(lambda x, w: fourier_conv._direct(x, w, (1, 2, 3)), x32, kernel32)[1](g32)
        for actual, gradient in zip(transposed(g), gradients, strict=True):
            assert actual.dtype == jnp.bfloat16 and relative(actual, gradient) < 8e-3


def test_bfloat16_gradients_of_many_examples(rng):
    """XLA on CPU (jax 0.10.2) has no product of transposed bfloat16, which it makes of a transposition that isn't done before."""
    plane, k, cuts, karatsuba, chunks, swapped = CASES["odd kernel, one tile"]
    plan = dataclasses.replace(make_plan(plane, k, cuts, karatsuba, chunks, swapped), batch=fourier_conv.FEW + 28)
    x = jnp.asarray(rng.normal(size=(plan.batch, *plane, CHANNELS)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(k, k, CHANNELS, OUT)), jnp.bfloat16)

    @jax.jit
    def gradient(kernel, x):
        return jax.grad(lambda w: jnp.square(fourier_conv._planned(x, w, (1, 2, 3), plan).astype(jnp.float32)).mean())(kernel)

    assert relative(gradient(kernel, x), gradient(kernel.astype(jnp.float32), x.astype(jnp.float32))) < 2e-2


def test_form_follows_the_shapes():
    """Few channels on a small plane are convolved directly, many by Fourier; long kernels take Fourier on less."""
    assert fourier_plan.make_plan(1, 4, 4, 2, 2, 3) is None
    plan = fourier_plan.make_plan(1, 18, 514, 256, 308, 11)
    assert plan is not None and plan.rows > 1 and plan.chunks == 1
    plan = fourier_plan.make_plan(1, 18, 514, 2048, 2464, 11)
    assert plan is not None and plan.chunks > 1 and 2464 % plan.chunks == 0
    plan = fourier_plan.make_plan(1, 48, 16, 32, 16, 9)
    assert plan is not None and plan.swapped and plan.bands == 1
    plan = fourier_plan.make_plan(1, 8, 8, 4, 6, 9)
    assert plan is None or plan.parts * plan.rows >= fourier_plan.TINY, "XLA has slow code for products as small as that"
    plan = fourier_plan.make_plan(1, 10, 34, 128, 256, 9)
    assert plan is not None and 1 < plan.bands <= plan.half, "its transform is larger than a cache, that of one frequency isn't"
    plan = fourier_plan.make_plan(1, 10, 200, 512, 512, 9)
    assert plan is not None and plan.bands == 1, "not even one frequency's fits"
    last = fourier_conv._plan(jnp.zeros((1, 32, 48, 16)), jnp.zeros((9, 9, 32, 16)), plane_axes("BNMD,MD->BOMD"))
    assert last is not None and not last.swapped, "the last axis of a block is transformed first"


def test_few_kernels_transforms_are_in_memory_together(rng):
    """XLA's scheduler would transform all kernels first, if it could: eight of them would be there."""
    x, kernels = jnp.zeros((1, 12, 12, 32)), [jnp.asarray(rng.normal(size=(9, 9, 32, 32)), jnp.float32)] * 8

    def chain(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(fourier_conv.convolve(x, kernel, (1, 2, 3)))
        return x

    spectrum = jax.eval_shape(lambda w: fourier_conv.prepare(w, x, (1, 2, 3)), kernels[0])
    size = sum(array.size * array.dtype.itemsize for array in spectrum.values)
    assert jax.jit(chain).lower(x, kernels).compile().memory_analysis().temp_size_in_bytes < 4 * size


def test_one_bands_transform_is_in_memory_at_a_time():
    x, kernel, axes = jnp.zeros((1, 128, 10, 34)), jnp.zeros((9, 9, 128, 256)), (2, 3, 1)
    spectrum = jax.eval_shape(lambda w: fourier_conv.prepare(w, x, axes), kernel)
    size = sum(array.size * array.dtype.itemsize for array in spectrum.values)

    def temporaries(f):
        return jax.jit(f).lower(x, kernel).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lambda x, w: fourier_conv.convolve(x, w, axes)) < size
    assert temporaries(jax.grad(lambda x, w: jnp.sin(fourier_conv.convolve(x, w, axes)).sum())) > size, "gradients want all"


def test_an_example_that_is_not_finite_spoils_no_other(rng):
    x, kernel, _ = operands(rng, (12, 16), 9)
    expected = fourier_conv.convolve(x, kernel, (1, 2, 3))
    for bad in (np.nan, np.inf):
        y = fourier_conv.convolve(x.at[0].set(bad), kernel, (1, 2, 3))
        assert not np.isfinite(y[0]).any() and relative(y[1], expected[1]) < 1e-6


def layer_of(features, k):
    decoder = HyperConvDecoder(features, k)
    x = jax.random.normal(jax.random.key(1), (2, *features[0]))
    return decoder, jax.jit(decoder.init)(jax.random.key(0), x)["params"], x


def test_prepared_kernels_give_the_same_tokens():
    decoder, params, x = layer_of(((16, 12, 24), (20, 10, 16)), 9)
    expected = jax.jit(decoder.apply)({"params": params}, x)
    prepared = jax.jit(lambda p: prepare(decoder, p, batch=2))(params)
    assert prepared["spectra"]["layers_0"].keys() >= {"width_conv_c", "out_conv"}
    assert not prepared["params"]["layers_0"].keys() & prepared["spectra"]["layers_0"].keys()
    assert relative(jax.jit(decoder.apply)(prepared, x), expected) < 1e-6


def test_prepared_in_chunks_gives_the_same(rng, monkeypatch):
    x, kernel, _ = operands(rng, (12, 16), 9)
    fourier_plan.make_plan.cache_clear()
    monkeypatch.setattr(fourier_plan, "MEMORY", 1 << 14)
    try:
        spectrum = fourier_conv.prepare(kernel, x, (1, 2, 3))
    finally:
        fourier_plan.make_plan.cache_clear()
    assert spectrum.plan.chunks > 1
    assert relative(fourier_conv.convolve(x, spectrum, (1, 2, 3)), exact(x, kernel)) < 6e-7


def test_prepared_kernels_of_another_batch_are_refused():
    decoder, params, x = layer_of(((16, 12, 24), (20, 10, 16)), 9)
    with pytest.raises(ValueError, match=r"batch of 2.*prepared for 1"):
        jax.eval_shape(lambda p: decoder.apply(prepare(decoder, p, batch=1), x), params)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from dnd_jax import sharding
from dnd_jax.decoder import HyperConvDecoder, prepare

decoder = HyperConvDecoder(((16, 12, 24), (20, 10, 16)), 9)
x = jax.random.normal(jax.random.key(1), (8, 16, 12, 24))
params = jax.jit(decoder.init)(jax.random.key(0), x)["params"]
g = jax.random.normal(jax.random.key(2), (8, 20, 10, 16))

def step(decoder):
    return lambda p, x: jax.value_and_grad(lambda p: jnp.vdot(decoder.apply({"params": p}, x), g))(p)

expected = jax.jit(step(decoder))(params, x)
for shape in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = sharding.make_mesh(shape)
    places = sharding.of_params(mesh, params)
    arguments = jax.device_put(params, places), jax.device_put(x, sharding.over_batch(mesh, 8))
    compiled = jax.jit(step(decoder.clone(mesh=mesh)), out_shardings=(None, places)).lower(*arguments).compile()
    for a, b in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(expected)):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 2e-5 * scale, (shape, a.shape)
    if shape == {"data": 8}:
        text = compiled.as_text()
        assert "all-gather" not in text, "activations are gathered"
        assert "f32[8,16,12,24]" not in text, "the whole batch lies on one device"
        assert "={{0},{1}," not in text, "a gradient is summed over an axis of one device"
# a batch that the devices don't divide, beside parameters in parts
alone = jax.jit(decoder.clone(mesh=mesh).apply)({"params": arguments[0]}, x[:3])
assert np.abs(np.asarray(alone) - np.asarray(jax.jit(decoder.apply)({"params": params}, x[:3]))).max() < 1e-5
# kernels' transforms kept, for the one example of each device
mesh = sharding.make_mesh({"data": 8})
kept = jax.device_put(jax.jit(lambda p: prepare(decoder, p, batch=1))(params), sharding.replicated(mesh))
tokens = jax.jit(decoder.clone(mesh=mesh).apply)(kept, jax.device_put(x, sharding.over_batch(mesh, 8)))
assert np.abs(np.asarray(tokens) - np.asarray(jax.jit(decoder.apply)({"params": params}, x))).max() < 1e-5
print("ok")
"""


def test_sharded_on_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]
