"""The decoder in PyTorch, written from its description alone: the yardstick of tests and of `experiments/benchmarks/decoder.py`.

Parameters have the released checkpoints' names: `load_state_dict(released.params_to_torch(params))` takes ours.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# For each convolution: the block's axes that become (channels, height, width) of a picture; what is left is the picture's number.
ORDERS = {"conv1w": (3, 2, 1), "conv1h": (2, 1, 3), "conv2h": (2, 1, 3), "conv2w": (3, 2, 1), "linear2": (1, 2, 3)}


class Decoder(nn.Module):
    """Map conditions `[B, N, L, C]` to tokens `[B, T, H, W]`."""

    def __init__(self, features: Sequence[tuple[int, int, int]], kernel_size: int):
        super().__init__()
        layers = [Layer(source, target, kernel_size) for source, target in itertools.pairwise(features)]
        self.model = nn.ModuleDict({"decoder": nn.ModuleDict({"module_list": nn.ModuleList(layers)})})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.get_submodule("model.decoder.module_list").children():
            y = layer(x)
            x = x + y if x.shape == y.shape else y
        return x


class Branches(nn.Module):
    """The norm and the four convolutions before the last one."""

    def __init__(self, source: tuple[int, int, int], target: tuple[int, int, int], k: int):
        super().__init__()
        (_, length, channels), (_, length_out, channels_out) = source, target
        self.norm = nn.LayerNorm((length, channels))
        self.conv1w = conv(channels, channels_out, k, bias=False)
        self.conv1h = conv(length, length_out, k, bias=False)
        self.conv2h = conv(length, length_out, k, bias=False)
        self.conv2w = conv(channels, channels_out, k, bias=False)
        self.bias = nn.Parameter(torch.empty(length_out, channels_out).uniform_(-1, 1) / (length_out * channels_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        width = over_plane(self.conv1h, over_plane(self.conv1w, x, "conv1w"), "conv1h")
        height = over_plane(self.conv2w, over_plane(self.conv2h, x, "conv2h"), "conv2w")
        return (width + torch.tanh(height) + self.bias) / 3


class Layer(nn.Module):
    """One layer (N, L, C) -> (N', L', C')."""

    def __init__(self, source: tuple[int, int, int], target: tuple[int, int, int], k: int):
        super().__init__()
        self.linear1 = Branches(source, target, k)
        self.linear2 = conv(source[0], target[0], k, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return over_plane(self.linear2, self.linear1(x), "linear2")


def conv(channels: int, channels_out: int, k: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels_out, k, padding="same", bias=bias)


def over_plane(convolution: nn.Conv2d, x: Tensor, name: str) -> Tensor:
    """Convolve a block's plane; where the kernel's memory is channels-last, the picture's is too."""
    order = (0, *ORDERS[name])
    last = convolution.weight.is_contiguous(memory_format=torch.channels_last) and convolution.weight.shape[1] > 1
    picture = x.permute(order).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return convolution(picture).permute([order.index(axis) for axis in range(4)])
