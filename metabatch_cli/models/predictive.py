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

Shape = Size | list[int] | tuple[int, ...]


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

    def functions(self, count: int) -> Tensor:
        """Samples to look at, `[count, tasks, n_target, dim_y]`: without the noise that each
        target has by itself, where the prediction tells it apart."""
        return self.sample(Size([count]))

    def scaled(self, shift: Tensor, scale: Tensor) -> Predictive:
        """The distribution of `shift + scale · y`, both numbers for each dimension of y."""
        raise NotImplementedError

    def _real(self, value: Tensor) -> Tensor:
        """A value `[…, tasks, n_target, dim_y]` with 0 in the place of padding."""
        return value if self.mask is None else value.masked_fill(~self.mask[..., None], 0)

    def _drawn(self, sample_shape: Shape) -> tuple[int, Size]:
        """How many samples a shape asks for, and the shape of them all."""
        shape = Size(sample_shape)
        return shape.numel(), shape + self.batch_shape + self.event_shape


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
        normal: Normal = self.paths.base_dist
        mean, sigma = normal.loc.movedim(0, 2), normal.scale.movedim(0, 2)
        even = Categorical(logits=mean.new_zeros(mean.shape[:3]), validate_args=False)
        parts = Independent(Normal(mean, sigma, validate_args=False), 1, validate_args=False)
        return MixtureSameFamily(even, parts, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        of_points = self.paths.log_prob(self._real(value)[..., None, :, :, :])
        return log_mean_exp(summed(of_points, self.mask), dim=-2)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """`[*sample_shape, tasks, n_target, dim_y]`; which path it is bears no gradient."""
        count, shape = self._drawn(sample_shape)
        normal: Normal = self.paths.base_dist
        n_paths, n_tasks = normal.loc.shape[:2]
        chosen = torch.randint(n_paths, (count, n_tasks), device=normal.loc.device)
        tasks = torch.arange(n_tasks, device=normal.loc.device)
        mean, sigma = normal.loc[chosen, tasks], normal.scale[chosen, tasks]
        drawn = mean + sigma * torch.randn_like(mean)
        return drawn.reshape(shape)

    def functions(self, count: int) -> Tensor:
        number = torch.arange(count, device=self.paths.mean.device) % self.paths.batch_shape[0]
        return self.paths.mean[number]

    def scaled(self, shift: Tensor, scale: Tensor) -> Paths:
        return Paths(scaled_normal(self.paths, shift, scale), self.mask)


class JointNormal(Predictive):
    """A normal distribution with a full covariance of all targets.

    Args:
        mean: `[tasks, n_target, dim_y]`.
        scale_tril: lower triangular root of the covariance, `[tasks, n, n]`, `n` being
            `n_target · dim_y`, dimensions of y innermost. Computed with in float64.
        mask: as of `Predictive`.
    """

    def __init__(self, mean: Tensor, scale_tril: Tensor, mask: Tensor | None = None) -> None:
        n_tasks, n_target, dim_y = mean.shape
        super().__init__(n_tasks, n_target, dim_y, mask)
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
        root = torch.linalg.cholesky(rows @ rows.mT).to(self.dtype)
        return MultivariateNormal(mean, scale_tril=root, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self.mask is None:
            return self.joint.log_prob(value.double().flatten(-2)).to(self.dtype)
        # padding as independent standard normal variables at 0, whose density is then taken out
        real = self.mask.repeat_interleave(self.event_shape[1], dim=1)
        root = self.joint.scale_tril
        covariance = blank((root @ root.mT).masked_fill(~real[:, None, :], 0), real)
        covariance = covariance + torch.diag_embed((~real).to(covariance))
        mean = blank(self.joint.loc, real)
        given = self._real(value).double().flatten(-2)
        together = MultivariateNormal(mean, covariance, validate_args=False).log_prob(given)
        taken = (~real).sum(dim=1).to(together) * 0.5 * math.log(2 * math.pi)
        return (together + taken).to(self.dtype)

    def scaled(self, shift: Tensor, scale: Tensor) -> JointNormal:
        mean = self.joint.loc.reshape(*self.batch_shape, *self.event_shape) * scale + shift
        rows = scale.to(self.joint.loc).repeat(self.event_shape[0])
        root = self.joint.scale_tril * rows[:, None]
        return JointNormal(mean.to(self.dtype), root, self.mask)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """`[*sample_shape, tasks, n_target, dim_y]`."""
        _, shape = self._drawn(sample_shape)
        return self.joint.rsample(Size(sample_shape)).to(self.dtype).reshape(shape)


class LowRankNormal(Predictive):
    """A normal distribution of all targets whose covariance is `F·Fᵀ + diag(σ²)`.

    With n numbers (`n_target · dim_y`) and r columns of F, a density costs n·r² where a full
    covariance costs n³: determinant and inverse are those of an r × r matrix (Woodbury's
    identity), unless n is less than r. Computed in float64.

    Args:
        mean: `[tasks, n_target, dim_y]`.
        factor: F, `[tasks, n_target, dim_y, rank]`.
        sigma: the standard deviation of each number's own noise, `[tasks, n_target, dim_y]`,
            more than 0.
        mask: as of `Predictive`.
    """

    def __init__(
        self, mean: Tensor, factor: Tensor, sigma: Tensor, mask: Tensor | None = None
    ) -> None:
        n_tasks, n_target, dim_y = mean.shape
        super().__init__(n_tasks, n_target, dim_y, mask)
        self.loc, self.factor, self.sigma = mean.double(), factor.double(), sigma.double()
        self.dtype = mean.dtype

    @property
    def marginals(self) -> Distribution:
        mean, variance = self.loc.to(self.dtype), self.sigma.square()
        if self.event_shape[1] == 1:
            sigma = (self.factor.square().sum(dim=-1) + variance).sqrt().to(self.dtype)
            return Independent(Normal(mean, sigma, validate_args=False), 1, validate_args=False)
        covariance = self.factor @ self.factor.mT + torch.diag_embed(variance)
        root = torch.linalg.cholesky(covariance).to(self.dtype)
        return MultivariateNormal(mean, scale_tril=root, validate_args=False)

    def functions(self, count: int) -> Tensor:
        return self._in_common(count).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        # what is padding: noise of deviation 1 that is 0 and belongs to nothing else
        sigma = self.sigma
        if self.mask is not None:
            sigma = sigma.masked_fill(~self.mask[..., None], 1)
        off = self._real(self._real(value).double() - self.loc) / sigma
        whitened = blank(self.factor / sigma[..., None], self.mask).flatten(1, 2)
        off = off.flatten(-2)[..., None]  # [..., tasks, n, 1]
        count, rank = whitened.shape[1:]
        if count <= rank:
            root = torch.linalg.cholesky(torch.eye(count).to(whitened) + whitened @ whitened.mT)
            parts = [torch.linalg.solve_triangular(root, off, upper=False)]
        else:
            root = torch.linalg.cholesky(torch.eye(rank).to(whitened) + whitened.mT @ whitened)
            # what the factor explains, at its price, and what is left: no difference of squares,
            # which would have no digits left where σ is small
            half = torch.linalg.solve_triangular(root, whitened.mT @ off, upper=False)
            explained = torch.linalg.solve_triangular(root.mT, half, upper=True)
            parts = [explained, off - whitened @ explained]
        distance = torch.cat(parts, dim=-2).square().sum(dim=(-2, -1))
        volume = sigma.log().sum(dim=(1, 2)) + root.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        counted = torch.ones_like(sigma) if self.mask is None else self.mask[..., None].to(sigma)
        n = counted.expand_as(sigma).sum(dim=(1, 2))
        return (-0.5 * (distance + n * math.log(2 * math.pi)) - volume).to(self.dtype)

    def scaled(self, shift: Tensor, scale: Tensor) -> LowRankNormal:
        scale = scale.to(self.loc)
        moved = LowRankNormal(
            self.loc * scale + shift,
            self.factor * scale[..., None],
            self.sigma * scale.abs(),
            self.mask,
        )
        moved.dtype = self.dtype
        return moved

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """`[*sample_shape, tasks, n_target, dim_y]`."""
        count, shape = self._drawn(sample_shape)
        drawn = self._in_common(count)
        own = self.loc.new_empty(count, *self.loc.shape).normal_()
        return (drawn + self.sigma * own).to(self.dtype).reshape(shape)

    def _in_common(self, count: int) -> Tensor:
        """Samples without the noise of each, `[count, tasks, n_target, dim_y]`."""
        normal = self.loc.new_empty(count, len(self.loc), self.factor.shape[-1]).normal_()
        return self.loc + (self.factor @ normal[:, :, None, :, None])[..., 0]


class Autoregressive(Predictive):
    """Targets one after the other, in their order, each given those before it.

    Args:
        alone: what is predicted of each target from the context only, batch `[tasks, n_target]`,
            event `[dim_y]`.
        given: from the y of all targets, `[tasks, n_target, dim_y]`, to what is predicted of each
            given the y of those before it; of the same shapes.
        like: any `[tasks, n_target, dim_y]`, of the type and place of a sample.
        mask: as of `Predictive`.
    """

    def __init__(
        self,
        alone: Callable[[], Distribution],
        given: Callable[[Tensor], Distribution],
        like: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        n_tasks, n_target, dim_y = like.shape
        super().__init__(n_tasks, n_target, dim_y, mask)
        self.alone, self.given, self.like = alone, given, like

    @property
    def marginals(self) -> Distribution:
        return self.alone()

    def log_prob(self, value: Tensor) -> Tensor:
        if value.dim() > 3:
            return torch.stack([self.log_prob(each) for each in value])
        value = self._real(value)
        return summed(self.given(value).log_prob(value), self.mask)

    def scaled(self, shift: Tensor, scale: Tensor) -> Autoregressive:
        return Autoregressive(
            lambda: scaled_normal(self.alone(), shift, scale),
            lambda y: scaled_normal(self.given((y - shift) / scale), shift, scale),
            self.like,
            self.mask,
        )

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """As many passes as there are targets, for each sample."""
        count, shape = self._drawn(sample_shape)
        drawn = []
        for _ in range(count):
            y = torch.zeros_like(self.like)
            for target in range(y.shape[1]):
                y[:, target] = self.given(y).sample()[:, target]
            drawn.append(y)
        return torch.stack(drawn).reshape(shape)


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


def of_targets(prediction: object) -> Distribution:
    """What a network gives as a distribution of targets: of single numbers, `[tasks, n_target,
    dim_y]`, such as torch's `Normal(mean, std)`, those of a target are independent.

    Raises:
        TypeError: something else than a distribution.
    """
    if not isinstance(prediction, Distribution):
        kind = type(prediction).__name__
        raise TypeError(f"the network gives a {kind}, and should give a torch Distribution")
    if len(prediction.batch_shape) == 3 and not prediction.event_shape:
        return Independent(prediction, 1, validate_args=False)
    return prediction


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


def summed(of_points: Tensor, mask: Tensor | None) -> Tensor:
    """`[…, tasks, points]` → `[…, tasks]` over real points."""
    if mask is not None:
        of_points = of_points.masked_fill(~mask, 0)
    return of_points.sum(dim=-1)
