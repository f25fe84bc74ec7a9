"""Conv-4: the four-block convolutional network of the few-shot literature."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from metabatch_cli.models.conv2d import Conv2d
from metabatch_cli.models.normalisation import BatchNorm, inside_transform


class Conv4(nn.Module):
    """Blocks of 3×3 convolution, batch normalisation, ReLU and 2×2 max pooling.

    The embedding of Vinyals et al. 2016 (arXiv:1606.04080) and Snell et al. 2017
    (arXiv:1703.05175): 64 features for a 28×28 image. MAML's for Omniglot (Finn et al. 2017,
    arXiv:1703.03400, §5.2) has convolutions of stride 2 instead of pooling, and in the published
    code each channel's mean over all places for a feature: `strided=True, average=True`.

    Args:
        x_shape: `(C, H, W)` of an image.
        dim_y: outputs of the head, if there is one.
        width: channels of each block.
        depth: blocks.
        norm: `batch` normalises as the learner chooses (models/normalisation.py), else as torch
            does: by the images at hand while training, by running averages in evaluation.
            `transductive` keeps no averages, so that those at hand count in both; `none` not.
        channels_last: memory layout of the convolutions, the faster one on CPUs.
        head: whether a linear layer follows, for classes; without it an embedding.
        pools: how many blocks halve the image, the first ones; None for all.
        flatten: whether the maps of the last block become a vector.
        strided: whether convolutions of stride 2 halve the image, instead of pooling.
        average: whether the features are each channel's mean over all places, `width` of them.
    """

    def __init__(
        self,
        x_shape: tuple[int, int, int],
        dim_y: Annotated[int, Ge(1)] = 1,
        width: Annotated[int, Ge(1)] = 64,
        depth: Annotated[int, Ge(1)] = 4,
        norm: Literal["batch", "transductive", "none"] = "batch",
        channels_last: bool = True,
        head: bool = False,
        pools: Annotated[int, Ge(0)] | None = None,
        flatten: bool = True,
        strided: bool = False,
        average: bool = False,
    ) -> None:
        super().__init__()
        channels, *sides = x_shape
        pools = depth if pools is None else pools
        if pools > depth:
            raise ValueError(
                f"pools={pools} is more than depth={depth}: a block pools at most once"
            )
        if not flatten and (head or average):
            taker = "a head does not take" if head else "average=True leaves nothing of"
            raise ValueError(f"flatten=False gives feature maps, which {taker}")
        if min(sides) < 2**pools and not strided:
            said = f"pools={pools}" if pools < depth else f"depth={depth}"
            raise ValueError(
                f"{said} halves an image {pools} times: {sides[0]}×{sides[1]} pixels "
                f"are too few (at least {2**pools}×{2**pools})"
            )
        blocks: list[nn.Module] = []
        for block in range(depth):
            inputs = channels if block == 0 else width
            halved = block < pools
            stride = 2 if halved and strided else 1
            blocks.append(Conv2d(inputs, width, 3, stride, padding=1, bias=norm == "none"))
            if norm != "none":
                blocks.append(BatchNorm(width, track_running_stats=norm == "batch"))
            # the largest of four, then ReLU: the same as the other way round, on a quarter of them
            blocks += [nn.MaxPool2d(2) if halved and not strided else nn.Identity(), nn.ReLU()]
            if halved:
                sides = [-(-side // 2) if strided else side // 2 for side in sides]
        last = _Mean() if average else nn.Flatten() if flatten else nn.Identity()
        self.blocks = nn.Sequential(*blocks, last)
        features = width if average else width * sides[0] * sides[1]
        self.head = nn.Linear(features, dim_y) if head else nn.Identity()
        self.classifies = head  # what compares embeddings asks
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.layout)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """`x [points, C, H, W]`, float or uint8 → `[points, features]` or `[points, dim_y]`."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the head is given, `[points, features]`; unflattened `[points, width, …]`.

        Bytes 0 … 255 become numbers 0 … 1 here, on the device.
        """
        if x.dtype == torch.uint8:
            x = x.to(next(self.parameters()).dtype) / 255
        if not inside_transform():  # vmap has no such layouts
            x = x.contiguous(memory_format=self.layout)
        for layer, following in pairwise([*self.blocks, None]):
            if isinstance(layer, nn.Conv2d) and isinstance(following, BatchNorm):
                x = following.after(layer, x)
            elif not isinstance(layer, BatchNorm):
                x = layer(x)
        return x


class _Mean(nn.Module):
    """`[points, channels, height, width]` → `[points, channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
