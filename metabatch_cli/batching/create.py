"""Creation: from a BatchSpec to a batch, under its own random streams, by the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from metabatch_cli.batching import denormals
from metabatch_cli.batching.collate import padded, stacked
from metabatch_cli.batching.plan import BatchSpec
from metabatch_cli.batching.streams import (
    GeneratorStates,
    StepStream,
    Stream,
    borrowed_global_generators,
    one_at_a_time,
    seed_global_generators,
)
from metabatch_cli.batching.task import Task, concatenate, contiguous
from metabatch_cli.batching.taskset import TaskSet, makes_whole_batches


class BatchMaker:
    """Makes the batch of a spec; the only place where a task set's code runs.

    Args:
        taskset: whose tasks.
        seed, split: choose the streams.
        collate: joins a list of tasks; only for sets of `__gettask__`.
        device: creates whole batches there, from that device's own generator: other numbers
            than on the CPU. None for the CPU.

    Raises:
        ValueError: a task set that cannot create on a device.
    """

    def __init__(
        self,
        taskset: TaskSet,
        seed: int,
        split: str,
        collate: Callable[[list[Any]], Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if device is not None and not (taskset.creates_anywhere and makes_whole_batches(taskset)):
            raise ValueError(
                f"create_on='device': {type(taskset).__name__} creates on the CPU; a set whose "
                "__gettasks__ computes where its generator is says `creates_anywhere = True`"
            )
        self.taskset = taskset
        self.whole = makes_whole_batches(taskset)
        self.collate = collate or (padded if taskset.ragged else stacked)
        self.preserves = True
        """Whether the global generators' states are given back; a worker needs none of them."""
        self.device = device
        self._seeds = StepStream(seed, split, "device", width=4)
        self._states = GeneratorStates(seed, split, "batch")
        self._task_stream = Stream(seed, split, "task")

    def __call__(self, spec: BatchSpec) -> Any:
        """The batch of a spec.

        Raises:
            Exception: what the task set raises, with a note that names the spec.
        """
        with one_at_a_time, denormals.kept():
            threads = torch.get_num_threads()
            if threads > 1:  # sums and factorisations have other bits on two (a worker has one)
                torch.set_num_threads(1)
            try:
                batch = self._make_whole(spec) if self.whole else self._make_each(spec)
                return contiguous(batch)
            except Exception as error:
                error.add_note(self.note(spec))
                raise
            finally:
                if threads > 1:
                    torch.set_num_threads(threads)

    def note(self, spec: BatchSpec) -> str:
        """What to say about an error at a spec."""
        return f"while creating {spec} of {type(self.taskset).__name__}"

    def _make_whole(self, spec: BatchSpec) -> Any:
        step, _, sizes, indices, first, shard_size = spec
        if len(indices) <= shard_size:
            return self._make_shard(step, sizes, indices, first // shard_size)
        starts = range(0, len(indices), shard_size)
        return concatenate(
            [
                self._make_shard(
                    step, sizes, indices[start : start + shard_size], (first + start) // shard_size
                )
                for start in starts
            ]
        )

    def _make_shard(
        self, step: int, sizes: Mapping[str, int], indices: np.ndarray, shard: int
    ) -> Any:
        numbers = torch.from_numpy(indices)
        if self.device is None:
            generator = torch.Generator()
            generator.set_state(self._states.at(step, shard))
        else:
            generator = torch.Generator(self.device)
            generator.manual_seed(self._seeds.at(step, shard)[0] >> 1)
            numbers = numbers.to(self.device)
        n_context, n_target, more = _split(sizes)
        made = self.taskset.__gettasks__(numbers, n_context, n_target, generator=generator, **more)
        if not self.taskset.ragged:
            self._check_count(made, len(indices))
        return made

    def _check_count(self, made: Any, wanted: int) -> None:
        targets = made.get("target_x") if isinstance(made, dict) else None
        targets = made.target_x if isinstance(made, Task) else targets
        if torch.is_tensor(targets) and len(targets) != wanted:
            raise ValueError(
                f"{type(self.taskset).__name__}.__gettasks__ made {len(targets)} tasks of {wanted} "
                f"indices: target_x is {list(targets.shape)}, and tasks are its first dimension"
            )

    def _make_each(self, spec: BatchSpec) -> Any:
        tasks = []
        n_context, n_target, more = _split(spec.sizes)
        with borrowed_global_generators() if self.preserves else nullcontext():
            for position, index in enumerate(spec.indices.tolist(), start=spec.first):
                seed_global_generators(self._task_stream, spec.step, position)
                tasks.append(self.taskset.__gettask__(index, n_context, n_target, **more))
            return self.collate(tasks)


_BY_POSITION = ("n_context", "n_target")


def _split(sizes: Mapping[str, int]) -> tuple[int, int, dict[str, int]]:
    """The two sizes that are passed by position, whatever a task set calls them, and the rest."""
    more = {} if len(sizes) == 2 else {k: v for k, v in sizes.items() if k not in _BY_POSITION}
    return sizes["n_context"], sizes["n_target"], more
