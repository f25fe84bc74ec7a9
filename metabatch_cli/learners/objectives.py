"""What a neural process minimises: a loss for every task, summed over the points it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.models.masking import joined_masks
from metabatch_cli.models.predictive import joint_log_prob, log_mean_exp, marginals, summed

Objective = Literal["likelihood", "elbo", "iwae", "bootstrap"]


class Judged(NamedTuple):
    """The context of tasks, and the points that a loss is about.

    Attributes:
        context_x, context_y: `[tasks, n_context, …]`.
        x, y: `[tasks, points, …]`: the targets, or the context's points and then the targets.
        context_mask, mask: bool `[tasks, points]`, True where a point is real; None if all are.
        holds_context: whether the context's points are among them.
    """

    context_x: Tensor
    context_y: Tensor
    x: Tensor
    y: Tensor
    context_mask: Tensor | None
    mask: Tensor | None
    holds_context: bool

    @property
    def all_points(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, y and mask of context and targets together, the context first."""
        if self.holds_context:
            return self.x, self.y, self.mask
        return joined(self.context_x, self.context_y, self.context_mask, self.x, self.y, self.mask)


Ask = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Distribution]
"""The network's prediction from `(context_x, context_y, x, context_mask, mask)`."""

Loss = Callable[[nn.Module, Ask, Judged, int], Tensor]
"""From network, its prediction, points and a number of samples to losses `[tasks]`."""


def marginal_likelihood(model: nn.Module, ask: Ask, judged: Judged, samples: int) -> Tensor:
    """`−Σ log p(y_i | C)`: every point by itself (Garnelo et al. 2018, arXiv:1807.01613, eq. 4)."""
    return -summed(marginals(_predicted(ask, judged)).log_prob(judged.y), judged.mask)


def joint_likelihood(model: nn.Module, ask: Ask, judged: Judged, samples: int) -> Tensor:
    """`−log p(y_1 … y_n | C)`, all points together.

    Of a latent variable with K samples it is `−log (1/K) Σ_k Π_i p(y_i | z_k, C)`, z_k from the
    context: maximum likelihood as of Foong et al. 2020 (arXiv:2007.01332, eq. 6).
    """
    return -joint_log_prob(_predicted(ask, judged), judged.y, judged.mask)


def elbo(model: nn.Module, ask: Ask, judged: Judged, samples: int) -> Tensor:
    """`−E_q[Σ log p(y_i | z, C)] + KL(q(z | C ∪ T) ‖ q(z | C))`.

    Garnelo et al. 2018, "Neural Processes" (arXiv:1807.01622), eq. 9; the expectation over
    `samples` draws.
    """
    prior, posterior, _, paths = _latent(model, judged, samples)
    expected = summed(paths.log_prob(judged.y), judged.mask).mean(dim=0)
    return kl_divergence(posterior, prior) - expected


def iwae(model: nn.Module, ask: Ask, judged: Judged, samples: int) -> Tensor:
    """`−log (1/K) Σ_k p(y | z_k, C) q(z_k | C) / q(z_k | C ∪ T)`, z_k from the latter.

    The importance-weighted bound of Burda et al. 2016 (arXiv:1509.00519), as the code of the
    TNP paper trains its NP and ANP, with K = 4.
    """
    prior, posterior, z, paths = _latent(model, judged, samples)
    likelihood = summed(paths.log_prob(judged.y), judged.mask)
    return -log_mean_exp(likelihood + prior.log_prob(z) - posterior.log_prob(z), dim=0)


def bootstrap(model: nn.Module, ask: Ask, judged: Judged, samples: int) -> Tensor:
    """`−Σ log p(y_i | C) − Σ log (1/K) Σ_k p(y_i | C, bootstrap k)`.

    Lee et al. 2020, "Bootstrapping Neural Processes" (arXiv:2008.02956), eq. 9.
    """
    base, paths = model.bootstrap(  # type: ignore[operator]
        judged.context_x, judged.context_y, judged.x, samples, judged.context_mask, judged.mask
    )
    alone = base.log_prob(judged.y)
    of_samples = log_mean_exp(paths.paths.log_prob(judged.y), dim=0)
    return -summed(alone + of_samples, judged.mask)


def choose(name: Objective, scoring: Literal["marginal", "joint"], model: nn.Module) -> Loss:
    """The objective of a name.

    Raises:
        ValueError: there is none of that name, or the model has not what it takes.
    """
    one_of("objective", name, get_args(Objective))
    if name == "likelihood":
        return marginal_likelihood if scoring == "marginal" else joint_likelihood
    loss, part = {
        "elbo": (elbo, "latents"),
        "iwae": (iwae, "latents"),
        "bootstrap": (bootstrap, "bootstrap"),
    }[name]
    if not hasattr(model, part):
        what = "latent variable" if part == "latents" else "bootstrap"
        raise ValueError(
            f"objective={name!r}: {type(model).__name__} has no {what}; "
            f"allowed with it: {', '.join(allowed(model))}"
        )
    return loss


def allowed(model: nn.Module) -> list[str]:
    """The names of the objectives that a model can be trained by."""
    latent = ["elbo", "iwae"] if hasattr(model, "latents") else []
    return ["likelihood", *latent, *["bootstrap"] * hasattr(model, "bootstrap")]


def joined(
    x1: Tensor, y1: Tensor, mask1: Tensor | None, x2: Tensor, y2: Tensor, mask2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two sets of points `[tasks, points, …]` side by side, with a mask if either has one."""
    mask = joined_masks(x1, mask1, x2, mask2)
    return torch.cat([x1, x2], dim=1), torch.cat([y1, y2], dim=1), mask


def counts(y: Tensor, mask: Tensor | None, empty: float = 1.0) -> int | Tensor:
    """Points of each task: a number, or of padded tasks `[tasks]`, `empty` where there are none."""
    if mask is None:
        return y.shape[1]
    real = mask.sum(dim=1)
    return real.to(y.dtype).masked_fill(real == 0, empty)


def _predicted(ask: Ask, judged: Judged) -> Distribution:
    return ask(judged.context_x, judged.context_y, judged.x, judged.context_mask, judged.mask)


def _latent(
    model: nn.Module, judged: Judged, samples: int
) -> tuple[Distribution, Distribution, Tensor, Distribution]:
    """`q(z | C)`, `q(z | C ∪ T)`, draws from the latter, and what they predict, `[samples, …]`."""
    context_x, context_y, context_mask = judged.context_x, judged.context_y, judged.context_mask
    prior, posterior = model.latents(*judged.all_points, context_x.shape[1])  # type: ignore[operator]
    z = posterior.rsample([samples])
    paths = model.decode(z, context_x, context_y, judged.x, context_mask)  # type: ignore[operator]
    return prior, posterior, z, paths
