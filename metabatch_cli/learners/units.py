"""The data's own units, and those that a network likes: x and y of mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from metabatch_cli.models.predictive import Predictive, scaled_normal


class Units(nn.Module):
    """A fixed shift and scale for each dimension of x and y, saved with the weights.

    Args:
        units: `x_mean, x_std, y_mean, y_std`, a number for each dimension.

    Raises:
        ValueError: one of these is missing, or a deviation is not above 0.
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(self, units: Mapping[str, Any]) -> None:
        super().__init__()
        for name in ("x_mean", "x_std", "y_mean", "y_std"):
            if name not in units:
                raise ValueError(f"units has no {name!r}, only {', '.join(units)}")
            numbers = torch.as_tensor(units[name], dtype=torch.get_default_dtype())
            if name.endswith("std") and not (numbers > 0).all():
                raise ValueError(f"units.{name}={units[name]} must be above 0")
            self.register_buffer(name, numbers)

    def of_x(self, x: Tensor) -> Tensor:
        """x `[…, dim_x]` as the network sees it."""
        return (x - self.x_mean) / self.x_std

    def of_y(self, y: Tensor) -> Tensor:
        """y `[…, dim_y]` as the network sees it."""
        return (y - self.y_mean) / self.y_std

    def restore(self, prediction: Distribution) -> Distribution:
        """A prediction of the network's in the data's own units."""
        if isinstance(prediction, Predictive):
            return prediction.scaled(self.y_mean, self.y_std)
        if isinstance(prediction, Independent) and isinstance(prediction.base_dist, Normal):
            return scaled_normal(prediction, self.y_mean, self.y_std)
        raise TypeError(f"a {type(prediction).__name__} cannot be brought back to own units")
