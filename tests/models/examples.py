"""A small network of every conditional model, and tasks for it: one line for each.

A new model is tested by adding its line; the name up to a comma is that of its YAML.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metabatch_cli.models.anp import ANP
from metabatch_cli.models.banp import BANP
from metabatch_cli.models.bnp import BNP
from metabatch_cli.models.canp import CANP
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.convcnp import ConvCNP
from metabatch_cli.models.convcnp_image import ConvCNPImage
from metabatch_cli.models.gnp import GNP
from metabatch_cli.models.lbanp import LBANP
from metabatch_cli.models.np import NP
from metabatch_cli.models.rtnp import RTNP
from metabatch_cli.models.tnp import TNPA, TNPD, TNPND
from tasksets.images import pixel_centres

SIDES = 6, 5


class Example(NamedTuple):
    """A model, and what may be expected of it.

    Attributes:
        make: a small one.
        dim_x, dim_y: numbers in an x and a y.
        draws: what its random draws belong to, None if it makes none: `tasks` draws the same
            whatever the points are (a latent variable), `points` does not (a bootstrap).
        apart: whether a target's marginal is the same without the other targets.
        pixels: whether x are places in an image of SIDES.
    """

    make: Callable[[], nn.Module]
    dim_x: int = 1
    dim_y: int = 1
    draws: Literal["tasks", "points"] | None = None
    apart: bool = True
    pixels: bool = False


attentive: dict[str, Any] = {"width": 8, "heads": 2}
transformer: dict[str, Any] = {"width": 8, "heads": 2, "hidden": 8, "depth": 2}
convolutional: dict[str, Any] = {"points_per_unit": 8, "channels": 6, "levels": 2}

MODELS: dict[str, Example] = {
    "cnp": Example(lambda: CNP(2, 2, width=8), 2, 2),
    "canp": Example(lambda: CANP(2, 2, **attentive), 2, 2),
    "np": Example(lambda: NP(2, 2, width=8, dim_latent=4), 2, 2, draws="tasks"),
    "anp": Example(lambda: ANP(2, 2, dim_latent=4, **attentive), 2, 2, draws="tasks"),
    "bnp": Example(lambda: BNP(2, 2, width=8), 2, 2, draws="points"),
    "banp": Example(lambda: BANP(2, 2, **attentive), 2, 2, draws="points"),
    "tnp_d": Example(lambda: TNPD(2, 2, **transformer), 2, 2),
    "tnp_a": Example(lambda: TNPA(2, 2, **transformer), 2, 2),
    "tnp_nd": Example(
        lambda: TNPND(2, 2, covariance_depth=1, rank=3, **transformer), 2, 2, apart=False
    ),
    "rtnp": Example(lambda: RTNP(2, 2, **transformer), 2, 2),
    "gnp": Example(lambda: GNP(2, 2, rank=3, **attentive), 2, 2),
    "gnp, without attention": Example(lambda: GNP(1, 1, False, rank=3, width=8), 1, 1),
    "lbanp": Example(lambda: LBANP(2, 2, latents=3, **transformer), 2, 2),
    "convcnp": Example(lambda: ConvCNP(1, 2, **convolutional), 1, 2, apart=False),
    "convcnp_image": Example(
        lambda: ConvCNPImage((2, *SIDES), 2, channels=6, blocks=1, kernel=3, context_kernel=3),
        2,
        2,
        pixels=True,
    ),
}


class Points(NamedTuple):
    """Tasks: what a model is given, and the y that it is judged by; masks where padded."""

    context_x: Tensor
    context_y: Tensor
    target_x: Tensor
    target_y: Tensor
    context_mask: Tensor | None = None
    target_mask: Tensor | None = None


def model(name: str, seed: int = 0) -> nn.Module:
    """The example of a name, float64."""
    torch.manual_seed(seed)
    return MODELS[name].make().double()


def points(
    name: str, n_tasks: int = 3, n_context: int = 5, n_target: int = 4, seed: int = 0
) -> Points:
    """Random tasks for the example of a name, float64; their pixels are different ones."""
    example = MODELS[name]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count = n_context + n_target
    x = normal(n_tasks, count, example.dim_x)
    if example.pixels:
        centres = pixel_centres(*SIDES).double()
        orders = normal(n_tasks, len(centres)).argsort(dim=1)[:, :count]
        x = centres[orders]
    y = normal(n_tasks, count, example.dim_y)
    return Points(x[:, :n_context], y[:, :n_context], x[:, n_context:], y[:, n_context:])


def padded(given: Points, more_context: int, more_target: int, fill: float, seed: int = 0):
    """The same tasks with further points that are not real, numbers about `fill`."""
    generator = torch.Generator().manual_seed(seed)

    def longer(values: Tensor, more: int) -> Tensor:
        shape = (len(values), more, values.shape[2])
        rubbish = torch.rand(shape, generator=generator, dtype=values.dtype) * fill
        return torch.cat([values, rubbish], dim=1)

    def mask(values: Tensor, more: int) -> Tensor:
        real = torch.ones(values.shape[:2], dtype=torch.bool)
        return torch.cat([real, real.new_zeros(len(values), more)], dim=1)

    return Points(
        longer(given.context_x, more_context),
        longer(given.context_y, more_context),
        longer(given.target_x, more_target),
        longer(given.target_y, more_target),
        mask(given.context_x, more_context),
        mask(given.target_x, more_target),
    )


def predict(network: nn.Module, given: Points) -> Distribution:
    """What a network predicts, with always the same random draws, as the learner would ask."""
    torch.manual_seed(0)
    taken = inspect.signature(network.forward).parameters
    more = {"context_mask": given.context_mask, "target_mask": given.target_mask, "samples": 3}
    more = {name: v for name, v in more.items() if name in taken and v is not None}
    return network(given.context_x, given.context_y, given.target_x, **more)
