"""The convolutional conditional neural process: functions of one number, on a fine grid."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.distributions import Distribution

from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import Activation
from metabatch_cli.models.unet import UNet1d

MAX_CELLS = 2**17
"""More cells than that are a mistake of units, not a grid."""


class Grid(NamedTuple):
    """A grid for each task, over its own points; a cell is the unit of length.

    Attributes:
        context, target: where the points lie, counted in cells from the grid's first,
            `[tasks, points]`.
        cells: `[cells]`: 0, 1, 2 …, as many as the longest grid has.
        real: bool `[tasks, cells]`, True for the cells of a task's own grid; None if all are.
    """

    context: Tensor
    target: Tensor
    cells: Tensor
    real: Tensor | None


class ConvCNP(nn.Module):
    """Gordon et al. 2020, "Convolutional Conditional Neural Processes" (arXiv:1910.13556), §4.

    A set convolution puts the context onto a grid, as a density and a mean of y weighted by
    distance; a U-Net transforms it; a second set convolution carries it to the targets. All of it
    moves with the points: shifted data are predicted as before, wherever they are, exactly so for
    shifts by whole cells. For x of one number; images have `ConvCNPImage`.

    Every task has a grid of its own, over its context and targets, which begins at a whole
    multiple of the spacing: neither the batch's other tasks nor padding change a prediction.
    A target far outside lengthens the grid, though, and what is known of the grid's end changes
    predictions near it. Sizes and set convolutions are those of neuralprocesses.

    Args:
        dim_x: numbers in an x: 1.
        dim_y: numbers in a y.
        points_per_unit: cells of the grid in a unit of x, in the units that the network sees. The
            spacing is to be at most half of the smallest wiggle that shall be seen: of length
            0.1 needs 20 at least, points closer than a cell are averaged. Time grows with it.
        margin: of the grid beyond the points, in units of x.
        channels: of each layer of the U-Net.
        levels: how often the U-Net halves the grid.
        kernel: places that a convolution looks at, odd.
        scale: standard deviation of the set convolutions' Gaussian weights at first, in cells.
        learn_scale: whether training changes it. Learned scales may shrink to less than a cell,
            and predictions then show the grid; frozen ones cannot.
        activation: in the U-Net.
        min_sigma, sigma: as for `CNP`.

    Raises:
        ValueError: `dim_x` is not 1; when predicting, x that are not finite, or so far apart that
            the grid would have more than 2¹⁷ cells.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        points_per_unit: Annotated[float, Gt(0)] = 64.0,
        margin: Annotated[float, Ge(0)] = 0.1,
        channels: Annotated[int, Ge(1)] = 64,
        levels: Annotated[int, Ge(1)] = 6,
        kernel: Annotated[int, Ge(1)] = 5,
        scale: Annotated[float, Gt(0)] = 1.0,
        learn_scale: bool = True,
        activation: Activation = "relu",
        min_sigma: MinSigma = 0.001,
        sigma: Sigma = "additive",
    ) -> None:
        super().__init__()
        if dim_x != 1:
            raise ValueError(
                f"dim_x={dim_x}: the grid of a ConvCNP is a line, for x of one number; "
                "for the pixels of images there is model=convcnp_image"
            )
        self.points_per_unit, self.margin = points_per_unit, margin
        self.multiple = 2**levels
        self.min_sigma, self.sigma = min_sigma, sigma
        scales = torch.full([2], math.log(scale))  # onto the grid, and from it
        self.log_scales = nn.Parameter(scales, requires_grad=learn_scale)
        self.unet = UNet1d(1 + dim_y, 2 * dim_y, channels, levels, kernel, activation)

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Distribution:
        """The predictive distribution at the targets.

        Args:
            context_x: `[tasks, n_context, 1]`; `n_context` may be 0.
            context_y: `[tasks, n_context, dim_y]`.
            target_x: `[tasks, n_target, 1]`.
            context_mask: bool `[tasks, n_context]`, True where a point is real; None if all are.
                Padding is finite.
            target_mask: the same of the targets; padding lengthens no grid.

        Returns:
            Normal, batch `[tasks, n_target]`, event `[dim_y]`.
        """
        grid = self.grid(context_x, target_x, context_mask, target_mask)
        on_grid = self.encode(grid, context_y, context_mask)
        transformed = self.unet(on_grid.mT, grid.real).mT
        raw = self.read(grid, transformed.to(target_x.dtype))
        return normal(raw, self.min_sigma, self.sigma)

    @torch.no_grad()
    def grid(
        self,
        context_x: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Grid:
        """The grid of each task: its points and `margin`, rounded up to whole U-Net lengths."""
        context, target = (x[..., 0] * self.points_per_unit for x in (context_x, target_x))
        far = math.inf
        ends = [  # two made-up points, so that there is a first and a last
            torch.cat(
                [
                    _only(context, context_mask, sign),
                    _only(target, target_mask, sign),
                    context.new_full([len(context), 1], sign * far),
                ],
                dim=1,
            )
            for sign in (1, -1)
        ]
        first, last = ends[0].amin(dim=1), ends[1].amax(dim=1)
        nowhere = first > last  # a task without a point
        first, last = first.masked_fill(nowhere, 0), last.masked_fill(nowhere, 0)
        margin = math.ceil(self.margin * self.points_per_unit)
        start = first.floor() - margin
        needed = last.ceil() + margin + 1 - start
        lengths = (needed / self.multiple).ceil() * self.multiple
        if not len(lengths):
            lengths = lengths.new_full([1], self.multiple)
        shortest, longest = torch.stack([lengths.amin(), lengths.amax()]).tolist()
        if not longest <= MAX_CELLS:
            raise ValueError(
                f"points_per_unit={self.points_per_unit:g} makes a grid of {longest:g} cells, more "
                f"than {MAX_CELLS}: x is not finite, or wants another unit (learner.units)"
            )
        cells = torch.arange(int(longest), device=start.device, dtype=start.dtype)
        real = cells < lengths[:, None] if shortest < longest else None
        return Grid(context - start[:, None], target - start[:, None], cells, real)

    def encode(self, grid: Grid, context_y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The context on the grid, `[tasks, cells, 1 + dim_y]`: a density, and y divided by it.

        Gordon et al. 2020, eq. 4 and algorithm 1.
        """
        weights = self._weights(grid.cells[:, None], grid.context[:, None, :], self.log_scales[0])
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None, :], 0)
        known = torch.cat([torch.ones_like(context_y[..., :1]), context_y], dim=-1)
        density, data = _product(weights, known).split([1, context_y.shape[-1]], dim=-1)
        on_grid = torch.cat([density, data / (density + 1e-4)], dim=-1)
        return on_grid if grid.real is None else on_grid * grid.real[..., None]

    def read(self, grid: Grid, values: Tensor) -> Tensor:
        """Values on the grid, `[tasks, cells, channels]`, at the targets: `[tasks, n_target, …]`.

        The mean of the cells about a target, weighted by distance.
        """
        weights = self._weights(grid.target[:, :, None], grid.cells, self.log_scales[1])
        if grid.real is not None:
            weights = weights.masked_fill(~grid.real[:, None, :], 0)
        return _product(weights, values) / (weights.sum(dim=-1, keepdim=True) + 1e-8)

    def _weights(self, here: Tensor, there: Tensor, log_scale: Tensor) -> Tensor:
        return ((here - there) * (-log_scale).exp() * math.sqrt(0.5)).square().neg().exp()


def _only(x: Tensor, mask: Tensor | None, sign: int) -> Tensor:
    """x with padding moved to where it is neither the first nor the last."""
    return x if mask is None else x.masked_fill(~mask, sign * math.inf)


def _product(weights: Tensor, values: Tensor) -> Tensor:
    """Their product in full precision: distances are no matter for bfloat16."""
    with torch.autocast(weights.device.type, enabled=False):
        return weights @ values
