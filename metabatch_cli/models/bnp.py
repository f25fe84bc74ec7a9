"""Bootstrapping neural processes: a conditional one, asked again with resampled contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Independent
from torch.nn import functional as F

from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.encoders import Decoder
from metabatch_cli.models.masking import masked_mean
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
        codes = self.encode(context_x, context_y, target_x, context_mask)
        again = self._resampled(context_x, context_y, samples, context_mask)
        x, mask = _repeated(context_x, samples), _repeated(context_mask, samples)
        of_samples = self.encode(x, again, _repeated(target_x, samples), mask)
        weights = self.of_bootstrap.weight.split(self.sizes, dim=1)
        parts = [F.linear(code, own) for code, own in zip(of_samples, weights, strict=True)]
        more = sum(parts[1:], parts[0]).unflatten(0, (samples, -1))
        paths = self.decode(codes, target_x, more)
        return self.decode(codes, target_x), Paths(paths, target_mask)

    @torch.no_grad()
    def _resampled(self, x: Tensor, y: Tensor, samples: int, mask: Tensor | None) -> Tensor:
        """Another y `[samples · tasks, points, dim_y]` for every context point."""
        x, y, mask = _repeated(x, samples), _repeated(y, samples), _repeated(mask, samples)
        if not x.shape[1]:
            return y
        chosen, again = _with_replacement(x, mask)
        # as many points are drawn as are real
        codes = self.encode(_at(x, chosen), _at(y, chosen), x, mask)
        prediction = self.decode(codes, x)
        mean, sigma = prediction.mean, prediction.stddev
        residuals = _at((y - mean) / sigma, again)
        residuals = residuals - masked_mean(residuals, mask)[:, None]
        return mean + sigma * residuals


class BNP(Bootstrapping, CNP):  # type: ignore[misc]  # a joint prediction
    """A bootstrapping neural process around a `CNP`, whose arguments it has."""


Part = TypeVar("Part", Tensor, Tensor | None)


def _repeated(part: Part, samples: int) -> Part:
    """`[tasks, …]` → `[samples · tasks, …]`."""
    return part if part is None else part.repeat(samples, *[1] * (part.dim() - 1))


def _with_replacement(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two draws of as many points as there are, all real: their numbers, `[tasks, points]`."""
    n_tasks, n_points, _ = x.shape
    if mask is None:
        one, other = (
            torch.randint(n_points, (n_tasks, n_points), device=x.device) for _ in range(2)
        )
        return one, other
    # point after point: those of a longer padding are drawn after all others
    drawn = torch.rand(n_points, 2, n_tasks, device=x.device).permute(1, 2, 0)
    count = mask.sum(dim=1)[:, None]
    place = (drawn * count).long().minimum((count - 1).clamp(min=0))
    real_first = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    one, other = (real_first.gather(1, places) for places in place)
    return one, other


def _at(values: Tensor, chosen: Tensor) -> Tensor:
    """The points of `values [tasks, points, dim]` that `chosen [tasks, points]` names."""
    return values.gather(1, chosen[:, :, None].expand(-1, -1, values.shape[2]))
