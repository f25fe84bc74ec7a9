"""Bootstrapping neural processes: a conditional one, asked again with resampled contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Independent
from torch.nn import functional as F

from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.encoders import Decoder
from metabatch_cli.models.masking import mean_of_points
from metabatch_cli.models.predictive import Paths


class Bootstrapping(nn.Module):
    """Lee et al. 2020, "Bootstrapping Neural Processes" (arXiv:2008.02956), §3.

    Each sample draws context points with replacement, takes the residuals that the prediction
    from these leaves on the whole context, draws from the residuals, and so gets a context with
    another y at every point. What that one says is added to the first layer of the decoder, beside
    what the true context says. Mixed into a conditional network with `encode` and `decode`.
    """

    encode: Callable[..., list[Tensor]]
    decode: Callable[..., Independent]
    decoder: Decoder

    def __init__(self, dim_x: int, dim_y: int, **arguments: Any) -> None:
        super().__init__(dim_x, dim_y, **arguments)
        self.sizes = self.decoder.sizes[:-1]
        width = self.decoder.layers[0].out_features
        self.of_bootstrap = nn.Linear(sum(self.sizes), cast(int, width), bias=False)

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        samples: int = 1,
    ) -> Paths:
        """The prediction by `samples` bootstraps of the context; arguments as of `NP`."""
        context = context_x, context_y
        return self.bootstrap(*context, target_x, samples, context_mask, target_mask)[1]

    def bootstrap(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        samples: int,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> tuple[Independent, Paths]:
        """The prediction without bootstrap, batch `[tasks, n_target]`, and the one with it."""
        again = self._resampled(context_x, context_y, samples, context_mask)
        together = torch.cat([context_y[None], again])
        codes = self.encode(context_x, together, target_x, context_mask)
        of_context, of_samples = zip(*(code.split([1, samples]) for code in codes), strict=True)
        weights = self.of_bootstrap.weight.split(self.sizes, dim=1)
        parts = [F.linear(code, own) for code, own in zip(of_samples, weights, strict=True)]
        own = [code[0] for code in of_context]
        paths = self.decode(own, target_x, sum(parts[1:], parts[0]))
        return self.decode(own, target_x), Paths(paths, target_mask)

    @torch.no_grad()
    def _resampled(self, x: Tensor, y: Tensor, samples: int, mask: Tensor | None) -> Tensor:
        """Another y `[samples, tasks, points, dim_y]` for every context point."""
        if not x.shape[1]:
            return y.expand(samples, *y.shape)
        chosen, again = _with_replacement(x, samples, mask)
        # as many points are drawn as are real
        drawn = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        counts = x.new_zeros(chosen.shape).scatter_add_(2, chosen, drawn.expand(chosen.shape))
        prediction = self.decode(self.encode(x, y, x, counts), x)
        mean, sigma = prediction.mean, prediction.stddev
        residuals = (y - mean) / sigma
        residuals = residuals.gather(2, again[..., None].expand(residuals.shape))
        residuals = residuals - mean_of_points(residuals, mask)[:, :, None]
        return mean + sigma * residuals


class BNP(Bootstrapping, CNP):  # type: ignore[misc]  # a joint prediction
    """A bootstrapping neural process around a `CNP`, whose arguments it has."""


def _with_replacement(x: Tensor, samples: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two draws of as many points as there are, all real: numbers `[samples, tasks, points]`."""
    n_tasks, n_points, _ = x.shape
    shape = samples, n_tasks, n_points
    if mask is None:
        one, other = (torch.randint(n_points, shape, device=x.device) for _ in range(2))
        return one, other
    # point after point: those of a longer padding are drawn after all others
    drawn = torch.rand(n_points, 2, samples, n_tasks, device=x.device).permute(1, 2, 3, 0)
    count = mask.sum(dim=1)[:, None]
    place = (drawn * count).long().minimum((count - 1).clamp(min=0))
    real_first = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    one, other = (real_first.expand(shape).gather(2, places) for places in place)
    return one, other
