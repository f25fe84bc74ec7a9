"""Batches of tasks, and a small learner of every kind, for the tests of learners."""

from __future__ import annotations

import torch

from metabatch_cli.batching import Task
from metabatch_cli.batching.task import slice_tasks
from metabatch_cli.learners.anil import ANIL
from metabatch_cli.learners.embedding import EmbeddingLearner
from metabatch_cli.learners.finetune import Finetune
from metabatch_cli.learners.learner import Learner
from metabatch_cli.learners.maml import MAML
from metabatch_cli.learners.mamlpp import MAMLPlusPlus
from metabatch_cli.learners.matching import MatchingNet
from metabatch_cli.learners.metasgd import MetaSGD
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.learners.protomaml import ProtoMAML
from metabatch_cli.learners.protonet import ProtoNet
from metabatch_cli.learners.r2d2 import R2D2
from metabatch_cli.learners.relation import RelationNet
from metabatch_cli.learners.reptile import Reptile
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.conv4 import Conv4
from metabatch_cli.models.mlp import MLP

SIDE = 8
CLASSES = 7  # of the split that tasks draw theirs from
IMAGE = (1, SIDE, SIDE)


def regression(
    n_tasks: int = 3, n_context: int = 5, n_target: int = 7, dim_y: int = 1, seed: int = 0
) -> Task:
    """Points of smooth functions, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tasks, n_context + n_target, 1, generator=generator, dtype=torch.float64)
    height = torch.randn(n_tasks, 1, dim_y, generator=generator, dtype=torch.float64)
    y = height * torch.sin(3 * x) + height
    return Task(x[:, :n_context], y[:, :n_context], x[:, n_context:], y[:, n_context:])


def classification(
    n_tasks: int = 3, ways: int = 3, shots: int = 2, queries: int = 2, seed: int = 0
) -> Task:
    """Images whose brightness tells their class, uint8, classes in an order of each task's own."""
    generator = torch.Generator().manual_seed(seed)
    each = shots + queries
    shape = (n_tasks, ways * each, 1, SIDE, SIDE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.stack(
        [torch.randperm(ways, generator=generator).repeat(each) for _ in range(n_tasks)]
    )
    n_context = ways * shots
    classes = [torch.randperm(CLASSES, generator=generator)[:ways] for _ in range(n_tasks)]
    return Task(
        images[:, :n_context],
        labels[:, :n_context],
        images[:, n_context:],
        labels[:, n_context:],
        {"classes": torch.stack(classes)},
    )


def one_task(tasks: Task, index: int) -> Task:
    """A batch of one of them."""
    return slice_tasks(tasks, index, index + 1)


def mlp(dim_y: int = 1, seed: int = 0) -> MLP:
    """Smooth, so that derivatives of derivatives exist everywhere."""
    torch.manual_seed(seed)
    return MLP(1, dim_y, width=6, depth=2, activation="tanh").double()


def conv(norm: str, dim_y: int | None = None, seed: int = 0, **more: object) -> Conv4:
    """Two blocks for images of SIDE × SIDE."""
    torch.manual_seed(seed)
    more |= {"width": 4, "depth": 2, "norm": norm, "head": dim_y is not None}
    return Conv4(IMAGE, dim_y or 1, **more).double()


def maps(norm: str = "batch") -> Conv4:
    """Feature maps of 4 × 4 instead of a vector."""
    return conv(norm, pools=1, flatten=False)


def embedding_learners(norm: str = "batch", **more: object) -> dict[str, EmbeddingLearner]:
    """One of every kind, small, for `classification`."""
    torch.manual_seed(0)
    small = {"width": 4, "hidden": 3}
    few_steps = {"eval_steps": 5, "eval_lr": 0.1}
    learners = {
        "protonet": ProtoNet(conv(norm), **more),
        "matching": MatchingNet(conv(norm), IMAGE, **more),
        "matching-euclidean": MatchingNet(conv(norm), IMAGE, "euclidean", 2.0, False, **more),
        "matching-fce": MatchingNet(conv(norm), IMAGE, fce=True, fce_steps=2, **more),
        "relation": RelationNet(maps(norm), IMAGE, **small, **more),
        "r2d2": R2D2(conv(norm), **more),
        "finetune": Finetune(conv(norm), CLASSES, IMAGE, **few_steps, **more),
        "finetune-cosine": Finetune(conv(norm), CLASSES, IMAGE, "cosine", **few_steps, **more),
    }
    return {name: learner.double() for name, learner in learners.items()}


def every_learner() -> dict[str, tuple[Learner, Task]]:
    """By the name of its YAML and of what it learns: each learner and tasks that it takes."""
    torch.manual_seed(0)
    cnp = CNP(1, 1, width=8).double()
    return {
        "neural_process": (NeuralProcess(cnp), regression()),
        "maml-regression": (MAML(mlp(), eval_steps=[0, 1, 3]), regression()),
        "maml-classification": (
            MAML(conv("transductive", 3, channels_last=False), ways=3, inner_lr=0.4),
            classification(),
        ),
        "metasgd-regression": (MetaSGD(mlp(), inner_steps=2), regression()),
        "metasgd-classification": (MetaSGD(conv("batch", 3), ways=3), classification()),
        "mamlpp-regression": (MAMLPlusPlus(mlp(), inner_steps=3), regression()),
        "mamlpp-classification": (
            MAMLPlusPlus(conv("batch", 3), ways=3, inner_steps=2),
            classification(),
        ),
        "anil-regression": (ANIL(mlp(), inner_lr=0.1, inner_steps=2), regression()),
        "anil-classification": (
            ANIL(conv("batch", 3), ways=3, normalisation="support"),
            classification(),
        ),
        "protomaml": (ProtoMAML(conv("batch"), ways=3, inner_steps=2), classification()),
        "reptile-regression": (Reptile(mlp(), inner_steps=3, inner_batch=None), regression()),
        "reptile-classification": (
            Reptile(conv("batch", 3), ways=3, inner_batch=None),
            classification(),
        ),
        **{name: (learner, classification()) for name, learner in embedding_learners().items()},
    }
