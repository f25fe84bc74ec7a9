"""The convolutional conditional neural process for images: known pixels to all pixels."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import ACTIVATIONS, Activation, layers


class ResidualBlock(nn.Module):
    """An activation, then a convolution of each channel by itself and a mix of channels; twice,
    added to what came in.

    Args:
        channels: of the image.
        kernel: odd, pixels that a convolution looks at in each direction.
        activation: before the convolutions.
    """

    def __init__(self, channels: int, kernel: int, activation: Activation) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [
                ACTIVATIONS[activation](),
                nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
                nn.Conv2d(channels, channels, kernel_size=1),
            ]
        self.parts = nn.Sequential(*parts)

    def forward(self, image: Tensor) -> Tensor:
        """`image [tasks, channels, H, W]` → the same shape."""
        return image + self.parts(image)


class ConvCNPImage(nn.Module):
    """Gordon et al. 2020, "Convolutional Conditional Neural Processes" (arXiv:1910.13556), §4:
    the model for data on a grid.

    Known pixels are put in their places; a convolution with positive weights makes of the places
    a density, and of the intensities a mean weighted by distance; residual convolutions follow,
    depthwise separable as in the code of Dubois et al. 2020 ("Neural Process Family"), and a few
    layers at the target pixels. Without any normalisation of batches: tasks do not see each other.

    Args:
        image_shape: `(C, H, W)` of the images that tasks are pixels of.
        dim_y: numbers in a y, those of a pixel.
        channels: of each convolution.
        blocks: residual blocks, of two convolutions each.
        kernel: pixels that a convolution looks at in each direction, odd.
        context_kernel: the same of the convolution over the known pixels.
        head_depth: linear layers at each target pixel.
        activation: between the layers.
        min_sigma, sigma: as for `CNP`.

    Raises:
        ValueError: an even kernel; when predicting, x outside [−1, 1].
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] | None,
        dim_y: Annotated[int, Ge(1)],
        channels: Annotated[int, Ge(1)] = 64,
        blocks: Annotated[int, Ge(1)] = 4,
        kernel: Annotated[int, Ge(1)] = 5,
        context_kernel: Annotated[int, Ge(1)] = 9,
        head_depth: Annotated[int, Ge(1)] = 2,
        activation: Activation = "relu",
        min_sigma: MinSigma = 0.05,
        sigma: Sigma = "scaled",
    ) -> None:
        super().__init__()
        if image_shape is None:
            raise ValueError(
                "image_shape is not known: ConvCNPImage completes images, of which this task set "
                "has none"
            )
        for name, size in (("kernel", kernel), ("context_kernel", context_kernel)):
            if not size % 2:
                raise ValueError(f"{name}={size} has no middle: it must be odd")
        self.sides = tuple(image_shape[1:])
        self.min_sigma, self.sigma = min_sigma, sigma
        # positive weights, nearly flat at first, one for all channels' density and intensities
        self.weights = nn.Parameter(torch.rand(1, 1, context_kernel, context_kernel))
        self.enter = nn.Conv2d(1 + dim_y, channels, kernel_size=1)
        self.blocks = nn.Sequential(
            *(ResidualBlock(channels, kernel, activation) for _ in range(blocks))
        )
        self.head = layers([channels] * head_depth + [2 * dim_y], activation)

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
    ) -> Distribution:
        """The predictive distribution at the target pixels.

        Args:
            context_x: `[tasks, n_context, 2]`, places of pixels from (−1, −1), the top left corner
                of the image, to (1, 1); each stands for the pixel that it lies in.
            context_y: `[tasks, n_context, dim_y]`.
            target_x: `[tasks, n_target, 2]`.
            context_mask: bool `[tasks, n_context]`, True where a point is real; None if all are.
                Padding is finite and within the image, as 0 is.

        Returns:
            Normal, batch `[tasks, n_target]`, event `[dim_y]`.
        """
        known = self.encode(self.pixels(context_x), context_y, context_mask)
        hidden = self.blocks(self.enter(known)).flatten(2)
        wanted = self.pixels(target_x)[:, None, :].expand(-1, hidden.shape[1], -1)
        raw = self.head(hidden.gather(2, wanted).mT)
        # the likelihood is no place for bfloat16
        return normal(raw.to(target_x.dtype), self.min_sigma, self.sigma)

    def pixels(self, x: Tensor) -> Tensor:
        """The numbers of the pixels that places lie in, row by row: int64 `[tasks, points]`."""
        if not bool((x.abs() <= 1).all()):
            raise ValueError(
                "x is outside [−1, 1], or no number: ConvCNPImage takes the places of pixels as "
                "tasksets.images.ImageCompletion gives them, not normalised"
            )
        height, width = self.sides
        row, column = (
            ((place + 1) * (side / 2)).long().clamp(max=side - 1)
            for place, side in zip(x.unbind(dim=-1), (height, width), strict=True)
        )
        return row * width + column

    def encode(self, pixels: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Known pixels as images `[tasks, 1 + dim_y, H, W]`: `d / (1 + d)`, and y divided by d.

        Gordon et al. 2020, §4: d, the density, and y are sums over the neighbourhood with the same
        positive weights.
        """
        known = torch.cat([torch.ones_like(y[..., :1]), y], dim=-1)
        if mask is not None:
            known = known.masked_fill(~mask[..., None], 0)
        n_tasks, channels = len(y), known.shape[-1]
        places = pixels[:, None, :].expand(-1, channels, -1)
        height, width = self.sides
        image = known.new_zeros(n_tasks, channels, height * width)
        image = image.scatter_add(2, places, known.mT)
        # every image channel is convolved with the same kernel
        stacked = image.reshape(n_tasks * channels, 1, height, width)
        weights = F.softplus(self.weights)
        with torch.autocast(y.device.type, enabled=False):  # a density is no matter for bfloat16
            summed = F.conv2d(stacked, weights, padding=weights.shape[-1] // 2)
        density, data = summed.view(n_tasks, channels, height, width).split([1, channels - 1], 1)
        # bounded: nothing after this is normalised, and dozens of neighbours may be known
        return torch.cat([density / (1 + density), data / density.clamp(min=1e-5)], dim=1)
