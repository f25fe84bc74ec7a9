"""The precision of a training: the type of its numbers, and what is computed in bfloat16."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.batching.task import as_task, tree_map
from metabatch_cli.learners.learner import Learner


class Precision:
    """64-bit, 32-bit, or bfloat16 where that is safe.

    Args:
        bits: 64, 32 or `bf16`.
        device: where is computed.
    """

    def __init__(self, bits: int | str, device: torch.device) -> None:
        self.bits = bits
        self.device = device
        self.dtype = torch.float64 if bits == 64 else torch.float32

    def convert(self, learner: Learner) -> Learner:
        """The learner with weights of this precision (32 bits for bf16), on the device."""
        return learner.to(self.device, self.dtype)

    def prepare(self, batch: Any) -> Tasks:
        """A loader's batch as tasks whose floating-point numbers are of this precision."""
        dtype = self.dtype

        def convert(leaf: Any) -> Any:
            other = isinstance(leaf, Tensor) and leaf.dtype is not dtype
            return leaf.to(dtype) if other and leaf.is_floating_point() else leaf

        return tree_map(convert, as_task(batch))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass."""
        if self.bits == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()
