"""The hyper-convolutional decoder: a condition block in, weight tokens out, as a cascade of five-convolution layers.

A block is `[B, N, L, C]`: batch, prompts, token positions, channels. Each layer takes one block of shape (N, L, C) to
the next (O, M, D), so `features = ((N, L, C), ..., (T, H, W))` is the whole architecture; for long prompts a learned projection
first shortens L. Source: Liang et al., arXiv 2506.16406, section 3.4 and its public implementation.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dnd_jax.types import Block, Condition, Tokens

Shape3 = tuple[int, int, int]


class HyperConvDecoder(nn.Module):
    """Map a condition to weight tokens: `apply({"params": p}, condition [B, N, L, C]) -> [B, T, H, W]`.

    Attributes:
      features: block shapes from the condition's (N, L, C) to the tokens' (T, H, W).
      kernel_size: taps k of every k x k convolution.
      length: L of the condition where that is longer than the first block's L and is to be shortened to it.
      dtype: of activations and products, whatever the parameters are kept in; norms are computed in float32.
      remat: whether the backward pass computes each layer again, instead of keeping what is inside it.
    """

    features: Sequence[Shape3]
    kernel_size: int
    length: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @property
    def condition_shape(self) -> Shape3:
        """The (N, L, C) of a condition."""
        n, l, c = self.features[0]  # noqa: E741
        return n, self.length or l, c

    @property
    def flops(self) -> int:
        """Multiplications and additions of one adapter's convolutions and projection; zero padding counts."""
        k, (n, l, c) = self.kernel_size, self.features[0]  # noqa: E741
        total = 2 * n * c * l * (self.length + l) if self.length else 0
        for (n, l, c), (o, m, d) in zip(self.features, self.features[1:], strict=False):  # noqa: E741
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
        steps = list(zip(self.features, self.features[1:], strict=False))
        for i, (source, target) in enumerate(steps):
            # A later norm takes a constant per prompt off again, wherever it is not the residual that carries it to the end.
            counts = all(s == t for s, t in steps[i + 1:])
            y = layer(source, target, self.kernel_size, self.dtype, counts, name=f"layers_{i}")(x)
            x = x + y if source == target else y
        return x


class Shorten(nn.Module):
    """Shorten a condition `[B, N, L, C]` to `[B, N, M, C]` by two affine maps, L to M and M to M.

    As published, the block is reinterpreted as `[B, N, C, L]` (reshaped, not transposed) before and back after. Weights are
    stored `[out, in]`.
    """

    length: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Block) -> Block:
        b, n, l, c = x.shape  # noqa: E741
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

    Kernels are stored `[out, in, k, k]` as in the released checkpoints. Unless `bias_counts`, no output depends on `out_bias`
    and its gradient is exactly zero: rounding would make it noise, which Adam turns into steps of full size.
    """

    source: Shape3
    target: Shape3
    kernel_size: int
    dtype: jnp.dtype = jnp.float32
    bias_counts: bool = True

    @nn.compact
    def __call__(self, x: Block) -> Block:
        (n, l, c), (o, m, d) = self.source, self.target  # noqa: E741
        x = JointLayerNorm(self.dtype, name="norm")(x)
        width = plane_conv(x, self._kernel("width_conv_c", d, c), "BNLC,LN->BNLD")
        width = plane_conv(width, self._kernel("width_conv_l", m, l), "BNLD,ND->BNMD")
        height = plane_conv(x, self._kernel("height_conv_l", m, l), "BNLC,NC->BNMC")
        height = jnp.tanh(plane_conv(height, self._kernel("height_conv_c", d, c), "BNMC,MN->BNMD"))
        bias = self.param("bias", _uniform(1.0 / (m * d)), (m, d))
        y = (width + height + bias.astype(self.dtype)) / 3
        out_bias = self.param("out_bias", _uniform((n * self.kernel_size**2) ** -0.5), (o,))
        out_bias = out_bias if self.bias_counts else jax.lax.stop_gradient(out_bias)
        y = plane_conv(y, self._kernel("out_conv", o, n), "BNMD,MD->BOMD")
        return y + out_bias.astype(self.dtype)[:, None, None]

    def _kernel(self, name: str, channels_out: int, channels_in: int) -> Float[Array, "O I k k"]:
        k = self.kernel_size
        bound = (channels_in * k * k) ** -0.5  # PyTorch's default for convolutions
        return self.param(name, _uniform(bound), (channels_out, channels_in, k, k)).astype(self.dtype)


class JointLayerNorm(nn.Module):
    """Normalise over the last two axes jointly, with an affine map per position `[L, C]`, in float32."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Block) -> Block:
        shape = x.shape[-2:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x.astype(jnp.float32)
        mean = x.mean((-2, -1), keepdims=True)
        variance = jnp.square(x - mean).mean((-2, -1), keepdims=True)
        return ((x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(self.dtype)


def plane_conv(x: Block, kernel: Float[Array, "O I k k"], spec: str) -> Block:
    """Convolve one plane of a block, the third axis being the channels: stride 1, zeros outside, same size.

    Args:
      x: block with axes as in `spec`.
      kernel: `[out, in, k, k]`; its first tap axis runs along the first axis of the plane.
      spec: `"BNLC,LN->BNLD"` reads: over the plane (L, N), channels C become D. For an even k the extra zero column
        goes to the high side.
    """
    axes, plane_and_out = spec.split(",")
    plane, out_axes = plane_and_out.split("->")
    (channel,) = set(axes) - set(plane) - {"B"}
    (out_channel,) = set(out_axes) - set(plane) - {"B"}
    low = (kernel.shape[-1] - 1) // 2
    padding = (low, kernel.shape[-1] - 1 - low)

    def letters(names: str, channel_name: str, as_channel: str) -> str:
        return "".join({"B": "N", channel_name: as_channel, plane[0]: "H", plane[1]: "W"}[a] for a in names)

    return jax.lax.conv_general_dilated(
        x, kernel, window_strides=(1, 1), padding=(padding, padding),
        dimension_numbers=(letters(axes, channel, "C"), "OIHW", letters(out_axes, out_channel, "C")),
    )


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(rng, tuple(shape), dtype, -bound, bound)
    return init
