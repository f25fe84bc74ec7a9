"""A U-Net over sequences of different lengths, side by side in one batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metabatch_cli.models.mlp import ACTIVATIONS, Activation


class UNet1d(nn.Module):
    """Convolutions that halve a sequence, then others that double it (Ronneberger et al. 2015,
    arXiv:1505.04597), with the sizes of neuralprocesses.

    Each level halves by a strided convolution; on the way back, what comes up is put beside what
    came down at the same resolution, then doubled by a transposed convolution. Beyond a
    sequence's own end everything is kept at 0, as at the end of a convolution's padding: a
    sequence says the same in any batch.

    Args:
        inputs: channels of the sequence.
        outputs: channels that come out.
        channels: of every level.
        levels: halvings; lengths are multiples of `2^levels`.
        kernel: odd, places that a convolution looks at.
        activation: between the convolutions.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        channels: int = 64,
        levels: int = 6,
        kernel: int = 5,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if not kernel % 2:
            raise ValueError(f"kernel={kernel} has no middle: it must be odd")
        side = kernel // 2
        self.down = nn.ModuleList(
            nn.Conv1d(channels if level else inputs, channels, kernel, stride=2, padding=side)
            for level in range(levels)
        )
        # the lowest level has nothing beside it
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(
                2 * channels if level < levels - 1 else channels,
                channels,
                kernel,
                stride=2,
                padding=side,
                output_padding=1,
            )
            for level in reversed(range(levels))
        )
        self.out = nn.Conv1d(channels, outputs, kernel_size=1)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, sequence: Tensor, real: Tensor | None = None) -> Tensor:
        """`sequence [tasks, inputs, length]` → `[tasks, outputs, length]`.

        Args:
            sequence: 0 where it is not real.
            real: bool `[tasks, length]`, True up to the end of a sequence, a multiple of
                `2^levels`; None if all are as long as the batch.
        """
        came_down: list[Tensor] = []
        hidden = sequence
        for convolution in self.down:
            real_here = None if real is None else real[:, :: 2 ** (len(came_down) + 1)]
            hidden = _kept(self.activation(convolution(hidden)), real_here)
            came_down.append(hidden)
        came_down.pop()
        for left, convolution in zip(reversed(range(len(self.up))), self.up, strict=True):
            real_here = None if real is None else real[:, :: 2**left]
            hidden = _kept(self.activation(convolution(hidden)), real_here)
            if left:
                hidden = torch.cat([hidden, came_down[left - 1]], dim=1)
        return _kept(self.out(hidden), real)


def _kept(values: Tensor, real: Tensor | None) -> Tensor:
    return values if real is None else values * real[:, None]
