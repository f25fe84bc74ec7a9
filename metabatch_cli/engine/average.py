"""Gradients and running statistics of a step, over all ranks: flat buckets."""

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
        self._means = _Bucket([_Gradients(learner), _Moved(learner)], more=2)
        self._sums = _Bucket([_Followed(learner, ranks)])

    def begin(self) -> None:
        """Before the learner looks at tasks."""
        if self.ranks.size > 1:
            self._means.begin()
            self._sums.begin()

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
        of_all = self._means.more
        of_all[0], of_all[1] = loss, tasks
        self._means.put(tasks)
        self.ranks.mean(self._means.flat)
        self._means.take()
        if self._sums.flat.numel():
            self._sums.put(tasks)
            self.ranks.sum(self._sums.flat)
            self._sums.take()
        return of_all[0].clone()


class _Bucket:
    """The places of some parts side by side, in one tensor.

    Args:
        parts: whose places.
        more: numbers that stand behind them.
    """

    def __init__(self, parts: list[_Part], more: int = 0) -> None:
        self.parts = parts
        examples = [tensor for part in parts for tensor in part.examples]
        dtype = reduce(torch.promote_types, [e.dtype for e in examples], torch.float32)
        sizes = [*(example.numel() for example in examples), more]
        device = examples[0].device if examples else None
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        *flat, self.more = self.flat.split(sizes)
        places = iter([place.view(e.shape) for place, e in zip(flat, examples, strict=True)])
        self._places = [[next(places) for _ in part.examples] for part in parts]

    def begin(self) -> None:
        for part in self.parts:
            part.begin()

    def put(self, tasks: Tensor) -> None:
        for part, places in zip(self.parts, self._places, strict=True):
            part.put(places, tasks)

    def take(self) -> None:
        for part, places in zip(self.parts, self._places, strict=True):
            part.take(places)


class _Part(Protocol):
    """What of a learner goes into a bucket, and comes out of it."""

    @property
    def examples(self) -> list[Tensor]:
        """Tensors as large as the places that it needs."""

    def begin(self) -> None:
        """Before the learner looks at tasks."""

    def put(self, places: list[Tensor], tasks: Tensor) -> None:
        """Put what this rank has, of so many tasks that count, into all of the places."""

    def take(self, places: list[Tensor]) -> None:
        """Take out what all ranks together have there."""


class _Gradients:
    """The mean of gradients, side by side. A weight that no rank's tasks used has none."""

    def __init__(self, learner: nn.Module) -> None:
        self.parameters = [weight for weight in learner.parameters() if weight.requires_grad]
        self._there = torch.zeros(len(self.parameters), device=_device(self.parameters))
        self._sizes = [weight.numel() for weight in self.parameters]
        self._apart: list[Tensor] = []  # the places, weight by weight

    @property
    def examples(self) -> list[Tensor]:
        dtype = reduce(torch.promote_types, [w.dtype for w in self.parameters], torch.float32)
        return [self._there, self._there.new_empty((), dtype=dtype).expand(sum(self._sizes))]

    def begin(self) -> None:
        pass

    def put(self, places: list[Tensor], tasks: Tensor) -> None:
        there, flat = places
        if not self._apart:
            parts = zip(flat.split(self._sizes), self.parameters, strict=True)
            self._apart = [part.view(weight.shape) for part, weight in parts]
        gradients = [weight.grad for weight in self.parameters]
        found = [gradient for gradient in gradients if gradient is not None]
        # of no tasks infinite: that there is a gradient the others see even if it counts nothing
        share = 1 / tasks
        if found and len(found) == len(gradients) and {g.dtype for g in found} == {flat.dtype}:
            there.copy_(share)
            torch.cat([gradient.reshape(-1) for gradient in found], out=flat)
            return
        is_there = torch.tensor([gradient is not None for gradient in gradients])
        there.zero_().masked_fill_(is_there.to(there.device), share.to(there))
        flat.zero_()
        _copy(gradients, self._apart)

    def take(self, places: list[Tensor]) -> None:
        there, _ = places
        if any(weight.grad is None for weight in self.parameters):  # elsewhere it may not be
            for weight, count in zip(self.parameters, there.tolist(), strict=True):
                if weight.grad is None and count:
                    weight.grad = torch.empty_like(weight)
        for weight, mean in zip(self.parameters, self._apart, strict=True):
            if weight.grad is None:
                continue
            # fused optimizers want gradients that lie as their weights do
            if weight.is_contiguous() and weight.dtype == mean.dtype:
                weight.grad = mean
            else:
                weight.grad.copy_(mean)


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

    def put(self, places: list[Tensor], tasks: Tensor) -> None:
        if not self.layers:
            return
        for place in places:
            place.zero_()
        counts, moved = (place[self.ranks.rank] for place in places)
        counts.copy_(self._counted() - self._counts)
        now = torch.cat([buffer.tensor for buffer in self.buffers])
        moved.copy_(now - self._kept(counts) * torch.cat(self._before))

    def take(self, places: list[Tensor]) -> None:
        if not self.layers:
            return
        counts, moved = places
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

    def put(self, places: list[Tensor], tasks: Tensor) -> None:
        for place, buffer, before in zip(places, self.buffers, self._before, strict=True):
            place.copy_(buffer.tensor - before)

    def take(self, places: list[Tensor]) -> None:
        for place, buffer, before in zip(places, self.buffers, self._before, strict=True):
            buffer.tensor.copy_(before + place)


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
