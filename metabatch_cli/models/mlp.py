"""A multi-layer perceptron over the last dimension."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}
Activation = Literal["relu", "gelu", "tanh", "silu"]


class MLP(nn.Module):
    """Linear layers with an activation between them: `[…, dim_x]` → `[…, dim_y]`.

    Args:
        dim_x: numbers in an input.
        dim_y: numbers in an output.
        width: units of each hidden layer.
        depth: hidden layers.
        activation: between the layers.
        init: `default` (torch's) or `truncated_normal`, N(0, 0.01²) cut at two standard
            deviations with zero biases, as in MAML's code (Finn et al. 2017).
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 40,
        depth: Annotated[int, Ge(0)] = 2,
        activation: Activation = "relu",
        init: Literal["default", "truncated_normal"] = "default",
    ) -> None:
        super().__init__()
        self.layers = layers([dim_x, *[width] * depth, dim_y], activation)
        if init == "truncated_normal":
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                    nn.init.zeros_(layer.bias)

    @property
    def head(self) -> nn.Module:
        """The last layer."""
        return self.layers[-1]

    def features(self, x: Tensor) -> Tensor:
        """What the last layer is given: `x [..., dim_x]` → `[..., width]`."""
        return self.layers[:-1](x)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., dim_x]` → `[..., dim_y]`."""
        return self.layers(x)


class SkinnyLinear(nn.Linear):
    """A linear layer of few inputs, whose gradient takes half the time.

    By the layout of the weights autograd chooses how it multiplies for their gradient. As they are
    it would be `[outputs, points] · [points, inputs]`, which MKL is slow in where inputs are few
    (two of them, 128 outputs, 400 points: forth and back 78 µs instead of 39 on an AMD EPYC).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return super().forward(x)
        return torch.addmm(self.bias, x, self.weight.t().contiguous())


class Layers(nn.Sequential):
    """Linear layers and activations over the last dimension.

    All points are rows of one matrix on their way: autograd then has a third as much to do as if
    every layer turned them into a matrix and back, and a ReLU overwrites what a layer says.
    """

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`x [..., inputs]` → `[..., outputs]`, through the layers from `start` to `stop`.

        With `start`, x is what the layers before it made, and may be overwritten.
        """
        shape = x.shape[:-1]
        before = self[start - 1] if start else None
        for layer in list(self)[start:stop]:
            if isinstance(layer, nn.ReLU) and isinstance(before, nn.Linear):
                x = x.relu_()  # not of a view of it: autograd would copy the whole four times
            else:
                x = layer(x.flatten(0, -2) if x.dim() > 2 else x)
            before = layer
        return x if x.shape[:-1] == shape else x.unflatten(0, shape)


def layers(dims: Sequence[int], activation: Activation = "relu") -> Layers:
    """Linear layers from `dims[0]` through `dims[1]` … to `dims[-1]`, activations between."""
    parts: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(dims)):
        if number:
            parts.append(ACTIVATIONS[activation]())
        kind = SkinnyLinear if 1 < inputs < 8 else nn.Linear
        parts.append(kind(inputs, outputs))
    return Layers(*parts)
