"""A multi-layer perceptron over the last dimension."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor, nn

from metabatch_cli.models.linear import Linear

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


class Layers(nn.Sequential):
    """Linear layers and activations over the last dimension.

    All points are rows of one matrix on their way: autograd then has a third as much to do as if
    every layer turned them into a matrix and back, and a ReLU is part of the layer before it.
    """

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`x [..., inputs]` → `[..., outputs]`, through the layers from `start` to `stop`.

        With `start`, x is what the layers before it made, and may be overwritten.
        """
        shape = x.shape[:-1]
        parts = list(self)[start:stop]
        if start and isinstance(next(iter(parts), None), nn.ReLU):
            x, parts = x.relu_(), parts[1:]
        x = x.flatten(0, -2) if x.dim() > 2 else x
        both = False
        for layer, after in zip_longest(parts, parts[1:]):
            if both:  # this is the ReLU of the layer before
                both = False
                continue
            both = isinstance(layer, Linear) and isinstance(after, nn.ReLU)
            x = layer(x, relu=True) if both else layer(x)
        return x if x.shape[:-1] == shape else x.unflatten(0, shape)


def layers(dims: Sequence[int], activation: Activation = "relu") -> Layers:
    """Linear layers from `dims[0]` through `dims[1]` … to `dims[-1]`, activations between."""
    parts: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(dims)):
        if number:
            parts.append(ACTIVATIONS[activation]())
        parts.append(Linear(inputs, outputs))
    return Layers(*parts)
