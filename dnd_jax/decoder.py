"""The hyper-convolutional decoder: a condition block in, weight tokens out, as a cascade of five-convolution layers.

A block is `[B, N, L, C]`: batch, prompts, token positions, channels. Each layer takes one block of shape (N, L, C) to
the next (O, M, D), so `features = ((N, L, C), ..., (T, H, W))` is the whole architecture; for long prompts a learned projection
first shortens L. Source: Liang et al., arXiv 2506.16406, section 3.4 and its public implementation.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax import fourier_conv
from dnd_jax.types import Block, Condition, Params, Tokens

Shape3 = tuple[int, int, int]


class HyperConvDecoder(nn.Module):
    """Map a condition to weight tokens: `apply({"params": p}, condition [B, N, L, C]) -> [B, T, H, W]`.

    Attributes:
      features: block shapes from the condition's (N, L, C) to the tokens' (T, H, W).
      kernel_size: taps k of every k x k convolution.
      length: L of the condition where that is longer than the first block's L and is to be shortened to it.
      dtype: of activations and products, whatever the parameters are kept in; norms are computed in float32.
      remat: whether the backward pass computes each layer again, instead of keeping what is inside it.
      mesh: of several devices (`dnd_jax.sharding.make_mesh`), for each to convolve its own examples and channels only; needed
        where arguments of `apply` lie on such a mesh: `decoder.clone(mesh=mesh)`.
    """

    features: Sequence[Shape3]
    kernel_size: int
    length: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "HyperConvDecoder":
        """Return the decoder that `to_json` describes; further keys don't count."""
        return cls(tuple(map(tuple, value["features"])), value["kernel_size"], value["length"])

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint must say of the decoder."""
        features = [list(map(int, shape)) for shape in self.features]
        return {"features": features, "kernel_size": self.kernel_size, "length": self.length}

    @property
    def condition_shape(self) -> Shape3:
        """The (N, L, C) of a condition."""
        n, l, c = self.features[0]
        return n, self.length or l, c

    @property
    def flops(self) -> int:
        """Multiplications and additions of one adapter's convolutions and projection; zero padding counts."""
        k, (n, l, c) = self.kernel_size, self.features[0]
        total = 2 * n * c * l * (self.length + l) if self.length else 0
        for (n, l, c), (o, m, d) in itertools.pairwise(self.features):
            total += 2 * k * k * (n * l * c * d + n * d * l * m + n * c * l * m + n * m * c * d + m * d * n * o)
        return total

    @nn.compact
    def __call__(self, condition: Condition) -> Tokens:
        expected = self.condition_shape
        if condition.shape[1:] != expected:
            raise ValueError(f"condition is [B, N, L, C] with (N, L, C) = {condition.shape[1:]}, expected {expected}")
        x = jnp.asarray(condition, self.dtype)
        if self.length is not None:
            x = Shorten(self.features[0][1], self.dtype, name="shorten")(x)
        layer = nn.remat(HyperConvLayer) if self.remat else HyperConvLayer
        shapes = list(itertools.pairwise(self.features))
        for i, (source, target) in enumerate(shapes):
            # A later layer's norm takes a constant per prompt off again, unless only residual layers follow.
            train_out_bias = all(s == t for s, t in shapes[i + 1:])
            y = layer(source, target, self.kernel_size, self.dtype, train_out_bias, self.mesh, name=f"layers_{i}")(x)
            x = x + y if source == target else y
        return x


def decoder_of(config: ml_collections.ConfigDict, length: int, width: int, tokens: tuple[int, int, int]) -> HyperConvDecoder:
    """Return the decoder from conditions (N, L, C), shortened to `config.decoder.shortened` positions if that is set."""
    shortened = config.decoder.shortened
    features = ((config.condition.prompts, shortened or length, width), *map(tuple, config.decoder.blocks), tokens)
    return HyperConvDecoder(features, config.decoder.kernel_size, length if shortened else None)


class Shorten(nn.Module):
    """Shorten a condition `[B, N, L, C]` to `[B, N, M, C]` by two affine maps, L to M and M to M.

    As published, the block is reinterpreted as `[B, N, C, L]` (reshaped, not transposed) before and back after. Weights are
    stored `[out, in]`.
    """

    length: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Block) -> Block:
        b, n, l, c = x.shape
        x = x.reshape(b, n, c, l)
        for name, width in (("down", l), ("gate", self.length)):
            weight = self.param(f"{name}_weight", nn.initializers.normal(1.0), (self.length, width))
            bias = self.param(f"{name}_bias", _uniform(width**-0.5), (self.length,))
            x = jnp.einsum("BNCL,ML->BNCM", x, weight.astype(self.dtype)) + bias.astype(self.dtype)
        return x.reshape(b, n, self.length, c)


class HyperConvLayer(nn.Module):
    """One layer (N, L, C) -> (O, M, D): two branches of plane convolutions, then one that mixes prompts.

        width  = conv_LM[NxD](conv_CD[LxN](norm(x)))
        height = tanh(conv_CD[MxN](conv_LM[NxC](norm(x))))
        y      = conv_NO[MxD]((width + height + bias) / 3) + out_bias

    Kernels are stored `[k, k, in, out]`, as Flax has them. Unless `train_out_bias`, no output depends on `out_bias`
    and its gradient is exactly zero: rounding would make it noise, which Adam turns into steps of full size.
    """

    source: Shape3
    target: Shape3
    kernel_size: int
    dtype: jnp.dtype = jnp.float32
    train_out_bias: bool = True
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(self, x: Block) -> Block:
        n, (o, m, d) = self.source[0], self.target
        x = JointLayerNorm(self.dtype, name="norm")(x)
        width = self._conv(x, "width_conv_c", d, "BNLC,LN->BNLD")
        width = self._conv(width, "width_conv_l", m, "BNLD,ND->BNMD")
        height = self._conv(x, "height_conv_l", m, "BNLC,NC->BNMC")
        height = jnp.tanh(self._conv(height, "height_conv_c", d, "BNMC,MN->BNMD"))
        bias = self.param("bias", _uniform(1.0 / (m * d)), (m, d))
        y = (width + height + bias.astype(self.dtype)) / 3
        out_bias = self.param("out_bias", _uniform((n * self.kernel_size**2) ** -0.5), (o,))
        out_bias = out_bias if self.train_out_bias else jax.lax.stop_gradient(out_bias)
        y = self._conv(y, "out_conv", o, "BNMD,MD->BOMD")
        return y + out_bias.astype(self.dtype)[:, None, None]

    def _conv(self, x: Block, name: str, out: int, spec: str) -> Block:
        """Convolve by the parameter `name`, or by its transform where `prepare` kept that."""
        axes = plane_axes(spec)
        if self.has_variable("spectra", name):
            return fourier_conv.convolve(x, self.get_variable("spectra", name), axes, self.mesh)
        channels, k = x.shape[axes[2]], self.kernel_size
        bound = (channels * k * k) ** -0.5  # PyTorch's default for convolutions
        kernel = self.param(name, _uniform(bound), (k, k, channels, out)).astype(self.dtype)
        if self.is_mutable_collection("spectra") and not self.is_initializing():
            self.put_variable("spectra", name, fourier_conv.prepare(kernel, x, axes))
        return fourier_conv.convolve(x, kernel, axes, self.mesh)


class JointLayerNorm(nn.Module):
    """Normalise over the last two axes jointly, with an affine map per position `[L, C]`, in float32."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Block) -> Block:
        shape = x.shape[-2:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        rows = x.astype(jnp.float32).reshape(-1, scale.size)  # XLA on CPU is slow to sum gradients of four axes
        mean = rows.mean(-1, keepdims=True)
        variance = jnp.square(rows - mean).mean(-1, keepdims=True)
        y = (rows - mean) * jax.lax.rsqrt(variance + 1e-5) * scale.ravel() + bias.ravel()
        return y.reshape(x.shape).astype(self.dtype)


def plane_axes(spec: str) -> tuple[int, int, int]:
    """Return where a block has the plane's two axes and the channels: `"BNLC,LN->BNLD"` gives (2, 1, 3)."""
    block, plane = spec.split("->")[0].split(",")
    (channel,) = set(block) - set(plane) - {"B"}
    return block.index(plane[0]), block.index(plane[1]), block.index(channel)


def prepare(decoder: HyperConvDecoder, params: Params, batch: int = 1) -> dict[str, Any]:
    """Return the variables for `apply` to conditions of one batch size, kernels' transforms in place of the kernels.

    For generation, where one set of parameters serves many conditions; there are no gradients. On a mesh the batch is that of one
    device. The transforms take several times the memory of the kernels, `jax.eval_shape` tells how much. Where the direct
    convolution is cheaper, the kernel stays.
    """
    condition = jnp.zeros((batch, *decoder.condition_shape))
    spectra = decoder.apply({"params": params}, condition, mutable=["spectra"])[1].get("spectra", {})
    spectra = {path: s for path, s in flatten_dict(spectra).items() if s is not None}
    rest = {path: p for path, p in flatten_dict(dict(params)).items() if path not in spectra}
    return {"params": unflatten_dict(rest), "spectra": unflatten_dict(spectra)}


def param_shapes(decoder: HyperConvDecoder) -> Params:
    """Return a decoder's parameters as `jax.ShapeDtypeStruct`s, without making them."""
    condition = jax.ShapeDtypeStruct((1, *decoder.condition_shape), jnp.float32)
    params: Params = jax.eval_shape(lambda x: decoder.init(jax.random.key(0), x), condition)["params"]
    return params


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(rng, tuple(shape), dtype, -bound, bound)
    return init
