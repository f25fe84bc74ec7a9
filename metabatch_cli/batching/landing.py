"""Landing: where a message's batches go from shared memory, and how they get to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metabatch_cli.batching.packing import EachAlone, HostMemory, Incoming, TorchMemory, unpack
from metabatch_cli.batching.task import pin, to_device


class Landing:
    """Where batches land: in shared memory as they are, in page-locked memory, on a device.

    A message moves as a whole: one copy to page-locked memory and one to the device for all its
    batches, however many tensors they have. The second one runs on a stream of its own, beside
    what the device computes meanwhile.

    Args:
        device: where batches shall be; None for the CPU.
        pinned: whether batches shall go through, or stay in, page-locked memory.
    """

    def __init__(self, device: torch.device | None, pinned: bool) -> None:
        self.device = device if device is not None and device.type != "cpu" else None
        self.pinned = pinned and torch.cuda.is_available()
        self.moves = self.pinned or self.device is not None  # whether there is anything to do
        on_gpu = self.device is not None and self.device.type == "cuda"
        self.copies = self.pinned or on_gpu  # whether shared memory is free again at once
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None

    def share(self, buffer: np.ndarray, alone: bool = False) -> Incoming:
        """Batches stay where they are, or each of their tensors finds memory of its own."""
        return EachAlone(buffer) if alone else HostMemory(buffer)

    def copy(self, buffer: np.ndarray) -> Incoming:
        """Batches leave the memory of their message, all at once."""
        staged = torch.empty(len(buffer), dtype=torch.uint8, pin_memory=self.pinned)
        staged.numpy()[:] = buffer
        if self._stream is None:
            return TorchMemory(staged)
        with torch.cuda.stream(self._stream):
            landed = staged.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        landed.record_stream(current)
        return TorchMemory(landed)

    def land(self, packed: bytes, memory: Incoming | None) -> Any:
        """A batch of a message, and what did not travel in its memory brought after it."""
        return self.finish(unpack(packed, memory))

    def finish(self, batch: Any) -> Any:
        """A batch made anywhere, page-locked and on the device as it shall be."""
        if self.pinned:
            batch = pin(batch)
        return batch if self.device is None else to_device(batch, self.device)
