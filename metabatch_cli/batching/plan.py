"""The plan: pure arithmetic from (seed, step) to what the batch of that step is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from metabatch_cli.batching.arguments import at_least
from metabatch_cli.batching.balance import Balance, BalancedDraws
from metabatch_cli.batching.sizes import WORDS, SizeLaw
from metabatch_cli.batching.streams import StepStream, Stream, distinct, permutation


class BatchSpec(NamedTuple):
    """All that a batch, or one rank's part of it, needs in order to be made.

    Attributes:
        step: counted over all epochs.
        epoch: the pass that the step belongs to.
        sizes: `n_context`, `n_target` and what else the law draws.
        indices: which tasks, int64 `[tasks]`, of this rank.
        first: the position of the first of them in the global batch.
        shard_size: tasks in each part of the global batch that has a stream of its own.
    """

    step: int
    epoch: int
    sizes: Mapping[str, int]
    indices: np.ndarray
    first: int
    shard_size: int

    @property
    def n_context(self) -> int:
        """Points in the context of every task."""
        return self.sizes["n_context"]

    @property
    def n_target(self) -> int:
        """Points in the target of every task."""
        return self.sizes["n_target"]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        shown = ", ".join(map(str, self.indices[:8]))
        more = f", … {len(self.indices)} in all" if len(self.indices) > 8 else ""
        return f"BatchSpec(step={self.step}, epoch={self.epoch}, {sizes}, indices=[{shown}{more}])"


class Plan:
    """Which tasks, of which sizes, at which step. Nothing in it depends on workers or timing.

    With a balance, or with a law whose batches are drawn from parts of the set, every batch is
    drawn by itself, and full: an epoch has `n_batches` of them, or as many as one pass would.

    Args:
        n_tasks: tasks in the set, None for an infinite one.
        law: draws the sizes.
        batch_size: tasks of one step over all ranks.
        shuffle: whether each epoch has an order of its own.
        n_batches: full batches in an epoch, drawn over repeated passes; None for one pass.
        drop_last: whether a last batch that is not full is left out.
        seed, split: choose the streams.
        rank, world_size: whose part to plan, and of how many.
        shards: equal parts of the global batch that have a stream each.
        balance: the shares of the classes in a batch; None for tasks as they come.
        classes: the class of each task, integers `[n_tasks]`, where there is a balance.

    Raises:
        ValueError: numbers that do not fit together; the message names them.
    """

    def __init__(
        self,
        *,
        n_tasks: int | None,
        law: SizeLaw,
        batch_size: int,
        shuffle: bool = False,
        n_batches: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        shards: int = 1,
        balance: Balance | None = None,
        classes: Any = None,
    ) -> None:
        at_least("batch_size", batch_size, 1)
        at_least("shards", shards, 1)
        at_least("world_size", world_size, 1)
        if batch_size % shards:
            legal = [k for k in range(1, batch_size + 1) if batch_size % k == 0]
            raise ValueError(
                f"batch_size={batch_size} cannot be made in shards={shards} equal parts; "
                f"legal numbers of shards: {', '.join(map(str, legal))}"
            )
        if shards % world_size:
            legal = [k for k in range(1, shards + 1) if shards % k == 0]
            raise ValueError(
                f"world_size={world_size} cannot share shards={shards}; legal world sizes: "
                f"{', '.join(map(str, legal))} (raise loader.shards for more)"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in 0 … {world_size - 1}")
        if n_batches is not None:
            at_least("n_batches", n_batches, 1)
            if n_tasks is not None and not shuffle:
                raise ValueError(f"n_batches={n_batches} draws at random: it needs shuffle=True")
            if n_tasks is not None and batch_size > n_tasks:
                raise ValueError(
                    f"batch_size={batch_size} is larger than the task set ({n_tasks} tasks): "
                    "n_batches gives full batches without a task twice"
                )
        if n_tasks is not None:
            at_least("len(dataset)", n_tasks, 1)
            if drop_last and n_batches is None and batch_size > n_tasks:
                raise ValueError(
                    f"batch_size={batch_size} is larger than the task set ({n_tasks} tasks): "
                    "with drop_last=True no batch is left (drop_last=False gives one, of all)"
                )
        parts = law.parts
        drawn_alone = balance is not None or parts is not None
        if balance is not None and parts is not None:
            raise ValueError("balance and a task set whose batches have one component each "
                             "contradict: leave balance out, or mix tasks")  # fmt: skip
        if drawn_alone and n_tasks is not None and not shuffle:
            what = "balance" if balance is not None else "a law of several parts"
            raise ValueError(f"shuffle=False: {what} draws at random and needs shuffle=True")
        smallest = min((len(part) for part in parts or () if part is not None), default=batch_size)
        if batch_size > smallest:
            raise ValueError(
                f"batch_size={batch_size} is larger than the smallest part that a batch is drawn "
                f"from ({smallest} tasks): at most batch_size={smallest}"
            )
        full = n_batches is not None or drop_last or drawn_alone
        if world_size > 1 and n_tasks is not None and not full:
            raise ValueError(
                f"world_size={world_size} needs drop_last=True or n_batches: a last batch that "
                "is not full cannot be shared equally"
            )

        self.n_tasks = n_tasks
        self.law = law
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.n_batches = n_batches
        self.drop_last = drop_last
        self.seed = seed
        self.split = split
        self.rank = rank
        self.world_size = world_size
        self.shards = shards
        self.shard_size = batch_size // shards
        per_rank = batch_size // world_size
        self._mine = slice(rank * per_rank, (rank + 1) * per_rank)
        self.balance = None
        if balance is not None:
            self.balance = BalancedDraws(
                balance, classes, n_tasks=n_tasks, batch_size=batch_size, seed=seed, split=split
            )
        self._parts = parts
        self._full_batches = drop_last or drawn_alone
        self.epoch_length = self._measure_epoch()
        """Steps in an epoch; None where an epoch never ends."""
        self._draws = StepStream(seed, split, "part", width=batch_size + -batch_size % 4)
        self._sizes = StepStream(seed, split, "sizes", width=WORDS)
        self._order = Stream(seed, split, "order")
        self._keep_orders()

    def _keep_orders(self) -> None:
        self._pass_order = lru_cache(maxsize=4)(self._draw_pass_order)
        self._joined_order = lru_cache(maxsize=4)(self._join_pass_order)
        self._joined_last = 0, np.arange(0)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_pass_order", "_joined_order", "_joined_last")  # every process keeps its own
        return {name: value for name, value in vars(self).items() if name not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._keep_orders()

    def _measure_epoch(self) -> int | None:
        if self.n_batches is not None:
            return self.n_batches
        if self.n_tasks is None:
            return None
        full, rest = divmod(self.n_tasks, self.batch_size)
        return full + (rest > 0 and not self._full_batches)

    def sizes(self, step: int) -> dict[str, int]:
        """The sizes at a step: the same on every rank."""
        return self.law.draw(self._sizes.at(step))

    def spec(self, step: int) -> BatchSpec:
        """The batch of a step, as far as this rank makes it."""
        length = self.epoch_length
        return BatchSpec(
            step,
            step // length if length else 0,
            self.law.draw(self._sizes.at(step)),
            self.indices(step)[self._mine],
            self._mine.start,
            self.shard_size,
        )

    def indices(self, step: int) -> np.ndarray:
        """The tasks of a step over all ranks, int64 `[tasks]`; the caller may write into it."""
        size, total = self.batch_size, self.n_tasks
        if self.balance is not None:
            return self.balance.indices(step)
        part = self._parts[self.sizes(step)["component"]] if self._parts else None
        if part is not None:
            words = self._draws.at(step)[:size]
            return np.array(distinct(words, [0] * size, [part.start], [len(part)]))
        if total is None:
            return np.arange(step * size, (step + 1) * size)
        if self.n_batches is not None:
            return self._from_repeated_passes(step)
        epoch, batch = divmod(step, self.epoch_length or 1)
        here = slice(batch * size, min((batch + 1) * size, total))
        if self.shuffle:
            return self._pass_order(epoch)[here].copy()
        return np.arange(here.start, here.stop)

    def _draw_pass_order(self, number: int) -> np.ndarray:
        assert self.n_tasks is not None
        return permutation(self._order.words(self.n_tasks, number))

    # Passes one after the other, cut into batches: a batch may begin in one pass and end in the
    # next, and then the next pass must not begin with a task that the batch has already. So the
    # tasks that it may take come first, in their order, and the others follow.

    def _from_repeated_passes(self, step: int) -> np.ndarray:
        assert self.n_tasks is not None
        number, start = divmod(step * self.batch_size, self.n_tasks)
        head = self._joined_order(number)[start : start + self.batch_size]
        missing = self.batch_size - len(head)
        tail = self._joined_order(number + 1)[:missing] if missing else head[:0]
        return np.concatenate([head, tail])

    def _join_pass_order(self, number: int) -> np.ndarray:
        assert self.n_tasks is not None
        size, total = self.batch_size, self.n_tasks
        # a pass whose start is the start of a batch needs no care; from there on each joint
        # depends on the end of the pass before, which joining changes only in its first `size`
        # tasks: in a set of two batches or more it can be read from the pass as drawn
        cycle = size // math.gcd(size, total)
        start = number - number % cycle if total < 2 * size else max(number - 1, 0)
        before = self._pass_order(start)
        last, of_last = self._joined_last  # from which one goes on, step after step
        if start < last < number:
            start, before = last, of_last
        for later in range(start + 1, number + 1):
            order = self._pass_order(later)
            taken = later * total % size  # tasks of the first batch that the pass before gave
            if taken:
                fresh = ~np.isin(order, before[total - taken :])
                first = np.flatnonzero(fresh)[: size - taken]
                rest = np.setdiff1d(np.arange(total), first, assume_unique=True)
                order = np.concatenate([order[first], order[rest]])
            before = order
        self._joined_last = number, before
        return before
