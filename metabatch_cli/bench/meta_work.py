"""What meta-steps are measured with: a network, tasks for it, and how it adapts."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from metabatch_cli.batching.task import Task, tree_map
from metabatch_cli.models.conv4 import Conv4
from metabatch_cli.models.mlp import MLP

BATCHES = 16  # that are made before anything is measured, and taken in turn


class MetaWork:
    """A network that MAML trains, and random tasks.

    Args:
        tasks: in a batch.
        inner_steps: None for those of the paper's set-up.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    ways: ClassVar[int | None]
    inner_lr: ClassVar[float]
    inner_steps: int

    def __init__(self, tasks: int = 16, inner_steps: int | None = None) -> None:
        self.tasks = tasks
        self.inner_steps = self.inner_steps if inner_steps is None else inner_steps

    def network(self) -> nn.Module:
        """Ours, with the same first weights every time."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """The same network of torch's own layers: parameters in the same order, as they begin."""
        raise NotImplementedError

    def batch(self, generator: torch.Generator) -> Task:
        """Tasks of which only shapes and kinds matter here."""
        raise NotImplementedError

    def batches(self) -> list[Task]:
        """The same ones for every rival."""
        generator = torch.Generator().manual_seed(1)
        return [self.batch(generator) for _ in range(BATCHES)]


class SineMLP(MetaWork):
    """MAML's sine waves (Finn et al. 2017, §5.1): 10 shots and 10 more points, an MLP 1-40-40-1."""

    name = "sine_mlp"
    summary = "MLP 1-40-40-1, 10 shots, 10 targets"
    ways = None
    inner_lr = 0.01
    inner_steps = 5
    points = 10

    def network(self) -> MLP:
        torch.manual_seed(0)
        return MLP(1, 1)

    def plain(self) -> nn.Module:
        return self.network().layers

    def batch(self, generator: torch.Generator) -> Task:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(self.tasks, *shape, generator=generator) * (high - low) + low

        x = uniform(-5, 5, 2 * self.points, 1)
        y = uniform(0.1, 5, 1, 1) * torch.sin(x + uniform(0, math.pi, 1, 1))
        context_x, target_x = x.split(self.points, dim=1)
        context_y, target_y = y.split(self.points, dim=1)
        task = Task(context_x, context_y, target_x, target_y, {})
        return tree_map(torch.Tensor.contiguous, task)


class OmniglotConv4(MetaWork):
    """MAML's 5-way 1-shot Omniglot (§5.2), a target a class; images are noise."""

    name = "omniglot_conv4"
    summary = "Conv-4 with strides, 64 channels, 5-way 1-shot, a target a class, noise of 28 × 28"
    ways = 5
    inner_lr = 0.4
    inner_steps = 1
    side = 28

    def network(self) -> Conv4:
        torch.manual_seed(0)
        return Conv4(
            (1, self.side, self.side),
            dim_y=self.ways,
            strided=True,
            average=True,
            norm="transductive",
            head=True,
        )

    def plain(self) -> nn.Module:
        width, blocks = 64, []
        for inputs in (1, width, width, width):
            # its running averages are kept up to date, as everywhere where they are the default
            blocks += [
                nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = nn.Sequential(*blocks, *pooled, nn.Linear(width, self.ways))
        with torch.no_grad():
            ours = self.network().parameters()
            for parameter, begin in zip(model.parameters(), ours, strict=True):
                parameter.copy_(begin)
        return model

    def batch(self, generator: torch.Generator) -> Task:
        def images() -> Tensor:
            shape = (self.tasks, self.ways, 1, self.side, self.side)
            return torch.rand(shape, generator=generator)

        def classes() -> Tensor:
            drawn = torch.rand(self.tasks, self.ways, generator=generator)
            return drawn.argsort(dim=1)

        return Task(images(), classes(), images(), classes(), {})


META_WORKS: dict[str, type[MetaWork]] = {kind.name: kind for kind in (SineMLP, OmniglotConv4)}
