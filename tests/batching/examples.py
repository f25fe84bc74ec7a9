"""Task sets that the tests share, in a module that a spawned worker can import."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch

from metabatch_cli.batching import Task, TaskLoader, TaskSet, digest, pad
from metabatch_cli.batching.streams import uniforms


class Example(TaskSet):
    """Small sizes, and as many tasks as one wants: None is endless."""

    def __init__(
        self,
        n_tasks: int | None = 23,
        min_pts: int = 1,
        max_ctx_pts: int = 5,
        max_tgt_pts: int = 9,
        **more: Any,
    ) -> None:
        super().__init__(min_pts, max_ctx_pts, max_tgt_pts, **more)
        self.n_tasks = n_tasks

    def __len__(self) -> int:
        if self.n_tasks is None:
            raise TypeError("endless")
        return self.n_tasks


class Waves(Example):
    """Whole batches: a wave for each index, its points from the generator."""

    def __gettasks__(self, indices, n_context, n_target, generator, **more):
        height, phase = uniforms(indices, 2, "waves")[:, None, None].unbind(-1)
        x = torch.rand(len(indices), n_context + n_target, 1, generator=generator)
        y = height[..., None] * torch.sin(6 * x + phase[..., None])
        return Task(
            x[:, :n_context],
            y[:, :n_context],
            x[:, n_context:],
            y[:, n_context:],
            aux={"index": indices.clone()},
        )


class Draws(Example):
    """Single tasks that draw from `random`, `numpy.random` and torch, in odd numbers."""

    def __gettask__(self, index, n_context, n_target, **more):
        return {
            "index": index,
            "python": [random.random(), random.gauss(0, 1)],
            "numpy": np.random.randn(n_context),
            "torch": torch.randn(n_context, 1),
            "target": torch.rand(n_target, 3),
        }


KINDS = [Waves, Draws]


class Episodes(Example):
    """Whole batches of labels, made from the further sizes of the law `way_shot`."""

    def __init__(self, **more: Any) -> None:
        law = {"law": "way_shot", "ways": [2, 5], "shots": [1, 3], "queries": 2}
        super().__init__(sizes=law, **more)

    def __gettasks__(self, indices, n_context, n_target, generator, *, ways, shots, queries):
        def labels(each: int) -> torch.Tensor:
            return torch.arange(ways).repeat_interleave(each).expand(len(indices), -1)

        context, target = labels(shots), labels(queries)
        assert context.shape[1] == n_context
        assert target.shape[1] == n_target
        return Task(context[..., None], context, target[..., None], target)


class Ragged(Example):
    """Single tasks, each with a number of points of its own."""

    ragged = True

    def __gettask__(self, index, n_context, n_target):
        c, t = random.randint(0, n_context), random.randint(0, n_target)
        x = torch.rand(c + t, 1)
        y = torch.sin(6 * x + index)
        return Task(x[:c], y[:c], x[c:], y[c:], {"index": torch.tensor(index)})


class RaggedWhole(Example):
    """The same as whole batches."""

    ragged = True

    def __gettasks__(self, indices, n_context, n_target, generator):
        def points(index: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
            count = int(torch.randint(most + 1, (), generator=generator))
            x = torch.rand(count, 1, generator=generator)
            return x, torch.sin(6 * x + index)

        return pad(
            [
                Task(*points(index, n_context), *points(index, n_target))
                for index in indices.tolist()
            ]
        )


class Fails(Waves):
    """Whole batches; the task of index 6 cannot be made."""

    def __gettasks__(self, indices, *sizes, **more):
        if 6 in indices:
            raise ArithmeticError("no such wave")
        return super().__gettasks__(indices, *sizes, **more)


class FailsAlone(Draws):
    """Single tasks; the one of index 6 cannot be made."""

    def __gettask__(self, index, n_context, n_target):
        if index == 6:
            raise ArithmeticError("no such draw")
        return super().__gettask__(index, n_context, n_target)


def quietly(worker: int) -> None:
    """`worker_init_fn` of a worker that is to crash: pytest's handler would print its stack."""
    faulthandler.disable()


def global_draws() -> list[float]:
    """What the three global generators give next."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(()).item()]


def global_states() -> list[str]:
    """All that the three global generators remember, cached normal numbers too."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    torch_state = torch.default_generator.get_state().tolist()
    return [repr(random.getstate()), repr(numpy_state), repr(torch_state)]


def digests(batches: Iterable[Any]) -> list[str]:
    """One digest for each batch, in order."""
    return [digest(batch) for batch in batches]


def first(loader: TaskLoader, steps: int) -> list[str]:
    """The digests of the first steps over all epochs, each made on its own."""
    return digests(map(loader.batch_at, range(steps)))


def read(loader: TaskLoader, steps: int) -> list[str]:
    """The digests of the next steps, read epoch after epoch as a training would.

    The last iterator is dropped where it stands, with what it has prefetched.
    """
    found: list[str] = []
    while len(found) < steps:
        found += digests(islice(loader, steps - len(found)))
    return found
