"""Joint predictions: distributions over all targets of a task at once.

A network that judges each target by itself returns an ordinary distribution of torch, batch
`[tasks, n_target]`, event `[dim_y]`. One whose targets depend on each other returns a
`Predictive`, batch `[tasks]`, event `[n_target, dim_y]`, which also knows its marginals. The two
functions at the end score either kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Size, Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from metabatch_cli.models.masking import blank


class Predictive(Distribution):
    """A joint distribution of all targets: batch `[tasks]`, event `[n_target, dim_y]`.

    `mean`, `variance` and `stddev`, `[tasks, n_target, dim_y]`, are those of the marginals.

    Args:
        n_tasks, n_target, dim_y: the shapes.
        mask: bool `[tasks, n_target]`, True where a target is real; None if all are.
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own attribute)

    def __init__(self, n_tasks: int, n_target: int, dim_y: int, mask: Tensor | None = None) -> None:
        super().__init__(Size([n_tasks]), Size([n_target, dim_y]), validate_args=False)
        self.mask = mask

    @property
    def marginals(self) -> Distribution:
        """What is predicted of each target alone: batch `[tasks, n_target]`, event `[dim_y]`."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        return self.marginals.mean

    @property
    def variance(self) -> Tensor:
        return self.marginals.variance

    def log_prob(self, value: Tensor) -> Tensor:
        """`[…, tasks]`: log density of all real targets together, `value […, tasks, points, y]`."""
        raise NotImplementedError

    def scaled(self, shift: Tensor, scale: Tensor) -> Predictive:
        """The distribution of `shift + scale · y`, both numbers for each dimension of y."""
        raise NotImplementedError


class Paths(Predictive):
    """A mixture of equally likely predictions, in each of which targets are independent.

    What a latent variable or a bootstrap sample makes of a context: targets depend on each other
    through it.

    Args:
        paths: batch `[samples, tasks, n_target]`, event `[dim_y]`.
        mask: as of `Predictive`.
    """

    def __init__(self, paths: Independent, mask: Tensor | None = None) -> None:
        _, n_tasks, n_target = paths.batch_shape
        super().__init__(n_tasks, n_target, paths.event_shape[0], mask)
        self.paths = paths

    @property
    def marginals(self) -> Distribution:
        normal: Normal = self.paths.base_dist  # type: ignore[assignment]
        last = [part.movedim(0, 2) for part in (normal.loc, normal.scale)]
        even = Categorical(logits=last[0].new_zeros(last[0].shape[:3]), validate_args=False)
        parts = Independent(Normal(*last, validate_args=False), 1, validate_args=False)
        return MixtureSameFamily(even, parts, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        of_points = blank(self.paths.log_prob(value[..., None, :, :, :]), self._of_paths)
        return log_mean_exp(of_points.sum(dim=-1), dim=-2)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 (torch's signature)
        count = sample_shape.numel()
        normal: Normal = self.paths.base_dist  # type: ignore[assignment]
        n_paths, n_tasks = normal.loc.shape[:2]
        chosen = torch.randint(n_paths, (count, n_tasks), device=normal.loc.device)
        tasks = torch.arange(n_tasks, device=normal.loc.device)
        mean, sigma = normal.loc[chosen, tasks], normal.scale[chosen, tasks]
        drawn = mean + sigma * torch.randn_like(mean)
        return drawn.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def scaled(self, shift: Tensor, scale: Tensor) -> Paths:
        return Paths(scaled_normal(self.paths, shift, scale), self.mask)

    @property
    def _of_paths(self) -> Tensor | None:
        return None if self.mask is None else self.mask.expand(self.paths.batch_shape)


class JointNormal(Predictive):
    """A normal distribution with a full covariance of all targets.

    Args:
        mean: `[tasks, n_target, dim_y]`.
        scale_tril: lower triangular root of the covariance, `[tasks, n, n]`, `n` being
            `n_target · dim_y`, dimensions of y innermost. Computed with in float64.
        mask: as of `Predictive`.
    """

    def __init__(self, mean: Tensor, scale_tril: Tensor, mask: Tensor | None = None) -> None:
        super().__init__(*mean.shape, mask)  # type: ignore[arg-type]
        self.joint = MultivariateNormal(
            mean.flatten(1).double(), scale_tril=scale_tril.double(), validate_args=False
        )
        self.dtype = mean.dtype

    @property
    def marginals(self) -> Distribution:
        mean = self.joint.loc.to(self.dtype).reshape(*self.batch_shape, *self.event_shape)
        rows = self.joint.scale_tril.unflatten(1, self.event_shape)
        if self.event_shape[1] == 1:
            sigma = rows.square().sum(dim=-1).sqrt().to(self.dtype)
            return Independent(Normal(mean, sigma, validate_args=False), 1, validate_args=False)
        covariance = (rows @ rows.mT).to(self.dtype)
        return MultivariateNormal(mean, covariance, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self.mask is None:
            return self.joint.log_prob(value.double().flatten(-2)).to(self.dtype)
        # padding as independent standard normal variables at 0, whose density is then taken out
        real = self.mask.repeat_interleave(self.event_shape[1], dim=1)
        root = self.joint.scale_tril
        covariance = blank((root @ root.mT).masked_fill(~real[:, None, :], 0), real)
        covariance = covariance + torch.diag_embed((~real).to(covariance))
        mean = blank(self.joint.loc, real)
        given = value.double().flatten(-2).masked_fill(~real, 0)
        together = MultivariateNormal(mean, covariance, validate_args=False).log_prob(given)
        return (together + (~real).sum(dim=1) * 0.5 * math.log(2 * math.pi)).to(self.dtype)

    def scaled(self, shift: Tensor, scale: Tensor) -> JointNormal:
        mean = self.joint.loc.reshape(*self.batch_shape, *self.event_shape) * scale + shift
        rows = scale.to(self.joint.loc).repeat(self.event_shape[0])
        root = self.joint.scale_tril * rows[:, None]
        return JointNormal(mean.to(self.dtype), root, self.mask)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 (torch's signature)
        drawn = self.joint.rsample(sample_shape).to(self.dtype)
        return drawn.reshape(*sample_shape, *self.batch_shape, *self.event_shape)


class Autoregressive(Predictive):
    """Targets one after the other, in their order, each given those before it.

    Args:
        alone: what is predicted of each target from the context only, batch `[tasks, n_target]`,
            event `[dim_y]`.
        given: from the y of all targets, `[tasks, n_target, dim_y]`, to what is predicted of each
            given the y of those before it; of the same shapes.
        mask: as of `Predictive`.
    """

    def __init__(
        self,
        alone: Callable[[], Distribution],
        given: Callable[[Tensor], Distribution],
        like: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(*like.shape, mask)  # type: ignore[arg-type]
        self.alone, self.given, self.like = alone, given, like

    @property
    def marginals(self) -> Distribution:
        return self.alone()

    def log_prob(self, value: Tensor) -> Tensor:
        return blank(self.given(value).log_prob(value), self.mask).sum(dim=-1)

    def scaled(self, shift: Tensor, scale: Tensor) -> Autoregressive:
        return Autoregressive(
            lambda: scaled_normal(self.alone(), shift, scale),
            lambda y: scaled_normal(self.given((y - shift) / scale), shift, scale),
            self.like,
            self.mask,
        )

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """As many passes as there are targets, for each sample."""
        drawn = []
        for _ in range(sample_shape.numel()):
            y = torch.zeros_like(self.like)
            for target in range(y.shape[1]):
                y[:, target] = self.given(y).sample()[:, target]
            drawn.append(y)
        return torch.stack(drawn).reshape(*sample_shape, *self.like.shape)


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """`log((1/K) Σ exp(values))` over a dimension of size K."""
    return values.logsumexp(dim) - math.log(values.shape[dim])


def scaled_normal(prediction: Distribution, shift: Tensor, scale: Tensor) -> Independent:
    """The distribution of `shift + scale · y` where y is normal, independent in its dimensions."""
    normal = prediction.base_dist  # type: ignore[attr-defined]
    moved = Normal(normal.loc * scale + shift, normal.scale * scale, validate_args=False)
    return Independent(moved, 1, validate_args=False)


def marginals(prediction: Distribution) -> Distribution:
    """What is predicted of each target alone: batch `[tasks, n_target]`, event `[dim_y]`."""
    return prediction.marginals if isinstance(prediction, Predictive) else prediction


def joint_log_prob(prediction: Distribution, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log density of all real targets of each task together, `[tasks]`.

    Args:
        prediction: of either kind.
        y: `[tasks, n_target, dim_y]`.
        mask: bool `[tasks, n_target]`, of an ordinary distribution; a `Predictive` has its own.
    """
    if isinstance(prediction, Predictive):
        return prediction.log_prob(y)
    return blank(prediction.log_prob(y), mask).sum(dim=1)
