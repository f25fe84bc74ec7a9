"""Gradients and running statistics of a step, over all ranks: one flat bucket."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metabatch_cli.engine.ranks import Ranks


class Averaging:
    """Makes of every rank's loss, gradients and statistics those of the whole batch.

    With n_r tasks that count on rank r, loss and gradients are `Σ n_r g_r / Σ n_r`: the mean over
    tasks that a single process takes.

    Args:
        learner: where it computes.
        ranks: who shares the batch, in parts of as many tasks; if there is one, nothing happens.
    """

    def __init__(self, learner: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        if ranks.size == 1:
            return
        self._parts: list[_Part] = [_Gradients(learner), _Followed(learner, ranks), _Moved(learner)]
        examples = [tensor for part in self._parts for tensor in part.examples]
        dtype = reduce(torch.promote_types, [e.dtype for e in examples], torch.float32)
        sizes = [2, *(example.numel() for example in examples)]
        device = examples[0].device if examples else None
        self._bucket = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self._head, *flat = self._bucket.split(sizes)
        views = iter([view.view(e.shape) for view, e in zip(flat, examples, strict=True)])
        self._views = [[next(views) for _ in part.examples] for part in self._parts]

    def begin(self) -> None:
        """Before the learner looks at tasks."""
        if self.ranks.size > 1:
            for part in self._parts:
                part.begin()

    @torch.no_grad()
    def __call__(self, loss: Tensor, tasks: Tensor) -> Tensor:
        """Average over ranks, in place.

        Args:
            loss: the mean of this rank's.
            tasks: how many of its tasks count.

        Returns:
            The loss of the whole batch.
        """
        if self.ranks.size == 1:
            return loss
        self._bucket.zero_()
        self._head[0] = tasks
        self._head[1] = loss * tasks
        for part, views in zip(self._parts, self._views, strict=True):
            part.put(views, tasks)
        self.ranks.sum(self._bucket)
        total = self._head[0].clamp(min=1)
        for part, views in zip(self._parts, self._views, strict=True):
            part.take(views, total)
        return self._head[1] / total


class _Part(Protocol):
    """What of a learner goes into the bucket, and comes out of it."""

    @property
    def examples(self) -> list[Tensor]:
        """Tensors as large as the places that it needs."""

    def begin(self) -> None:
        """Before the learner looks at tasks."""

    def put(self, views: list[Tensor], tasks: Tensor) -> None:
        """Put what this rank has into places that are zero, to be added up over ranks."""

    def take(self, views: list[Tensor], tasks: Tensor) -> None:
        """Take out what the places add up to over all tasks."""


class _Gradients:
    """The mean of gradients. A weight that no rank's tasks used has none."""

    def __init__(self, learner: nn.Module) -> None:
        self.parameters = [weight for weight in learner.parameters() if weight.requires_grad]
        there = torch.zeros(len(self.parameters), device=_device(self.parameters))
        self.examples = [there, *self.parameters]

    def begin(self) -> None:
        pass

    def put(self, views: list[Tensor], tasks: Tensor) -> None:
        there, *gradients = views
        found = [weight.grad is not None for weight in self.parameters]
        there.copy_(torch.tensor(found, dtype=there.dtype))
        _copy([weight.grad for weight in self.parameters], gradients)
        if gradients:
            torch._foreach_mul_(gradients, tasks)

    def take(self, views: list[Tensor], tasks: Tensor) -> None:
        there, *gradients = views
        if any(weight.grad is None for weight in self.parameters):  # elsewhere it may not be
            for weight, count in zip(self.parameters, there.tolist(), strict=True):
                if weight.grad is None and count:
                    weight.grad = torch.empty_like(weight)
        if gradients:
            torch._foreach_div_(gradients, tasks)
        # not the views themselves: fused optimizers want gradients that lie as their weights do
        _copy(gradients, [weight.grad for weight in self.parameters])


class _Buffer(NamedTuple):
    """A buffer by where it stands: a network may replace the tensor."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.name))


class _Buffers:
    """Some buffers, and what they were before the learner looked at tasks."""

    def __init__(self, buffers: list[_Buffer]) -> None:
        self.buffers = buffers
        self._before: list[Tensor] = []

    @property
    def examples(self) -> list[Tensor]:
        return [buffer.tensor for buffer in self.buffers]

    def begin(self) -> None:
        self._before = [buffer.tensor.clone() for buffer in self.buffers]


class _Followed(_Buffers):
    """Running averages of batch normalisation, which follow one task after the other.

    Rank zero's tasks come first, then those of rank one, and so on, as in a single process: with
    momentum m and k_r tasks on rank r that a layer saw, `b` becomes `a_r b + (b_r − a_r b₀)` for
    one rank after the other, a_r = (1 − m)^k_r and b₀ what it was before all. A layer may see
    fewer tasks on one rank than on another, so each rank has places of its own in the bucket.
    """

    def __init__(self, learner: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.layers = [layer for layer in learner.modules() if _follows(layer)]
        moments = ("running_mean", "running_var")
        super().__init__([_Buffer(layer, name) for layer in self.layers for name in moments])
        self._counters = [_Buffer(layer, "num_batches_tracked") for layer in self.layers]
        self._counts: Tensor

    @property
    def examples(self) -> list[Tensor]:
        if not self.layers:
            return []
        each = (self._counted().float(), torch.cat(super().examples))
        return [example.expand(self.ranks.size, -1) for example in each]

    def begin(self) -> None:
        super().begin()
        if self.layers:
            self._counts = self._counted()

    def put(self, views: list[Tensor], tasks: Tensor) -> None:
        if not self.layers:
            return
        counts, moved = (view[self.ranks.rank] for view in views)
        counts.copy_(self._counted() - self._counts)
        now = torch.cat([buffer.tensor for buffer in self.buffers])
        moved.copy_(now - self._kept(counts) * torch.cat(self._before))

    def take(self, views: list[Tensor], tasks: Tensor) -> None:
        if not self.layers:
            return
        counts, moved = views
        now = torch.cat(self._before)
        for kept, by in zip(self._kept(counts), moved, strict=True):
            now = kept * now + by
        sizes = [before.numel() for before in self._before]
        _copy(now.split(sizes), [buffer.tensor for buffer in self.buffers])
        seen = self._counts + counts.sum(dim=0).to(self._counts.dtype)
        _copy(seen.unbind(), [counter.tensor for counter in self._counters])

    def _counted(self) -> Tensor:
        """How many tasks each layer has seen."""
        return torch.stack([counter.tensor for counter in self._counters])

    def _kept(self, counts: Tensor) -> Tensor:
        """What part of each number is left after so many tasks: `[…, layers]` → `[…, numbers]`."""
        shares = []
        for layer, count in zip(self.layers, counts.unbind(dim=-1), strict=True):
            share = (1 - cast(float, layer.momentum)) ** count[..., None]
            shares.append(share.expand(*count.shape, 2 * cast(int, layer.num_features)))
        return torch.cat(shares, dim=-1)


class _Moved(_Buffers):
    """Other buffers that are saved: they move by the mean of what they moved by on the ranks.

    So what is a constant stays what it is, to the bit.
    """

    def __init__(self, learner: nn.Module) -> None:
        saved = learner.state_dict().keys()
        super().__init__(
            [
                _Buffer(module, name)
                for prefix, module in learner.named_modules()
                if not _follows(module)
                for name, buffer in module.named_buffers(recurse=False)
                if (f"{prefix}.{name}" if prefix else name) in saved and buffer.is_floating_point()
            ]
        )

    def put(self, views: list[Tensor], tasks: Tensor) -> None:
        for view, buffer, before in zip(views, self.buffers, self._before, strict=True):
            view.copy_((buffer.tensor - before) * tasks)

    def take(self, views: list[Tensor], tasks: Tensor) -> None:
        for view, buffer, before in zip(views, self.buffers, self._before, strict=True):
            buffer.tensor.copy_(before + view / tasks)


def _follows(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and bool(module.momentum)


def _device(tensors: Sequence[Tensor]) -> torch.device | None:
    return tensors[0].device if tensors else None


def _copy(sources: Sequence[Tensor | None], places: Sequence[Tensor | None]) -> None:
    """Copy tensors, all at once, to where there are both a source and a place for it."""
    pairs = zip(sources, places, strict=True)
    both = [(place, own) for own, place in pairs if own is not None and place is not None]
    if both:
        to, of = zip(*both, strict=True)
        torch._foreach_copy_(to, of)
