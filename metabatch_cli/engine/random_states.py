"""The global random generators of a process: saved, restored, seeded, lent out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from metabatch_cli.batching.streams import Stream


def random_states(device: torch.device | None = None) -> dict[str, Any]:
    """The states of all global generators: `random`, `numpy.random`, torch on CPU and CUDA.

    Args:
        device: of all GPUs this one only, which another may take the place of; none for a CPU.
    """
    if device is not None:
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    else:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": _plain(numpy_state["state"])},
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random_states(states: dict[str, Any], device: torch.device | None = None) -> None:
    """Set all global generators to states of `random_states`, of a device if one is given."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = dict(states["numpy"])
    numpy_state["state"] = {
        name: np.array(value, dtype=np.uint32) if isinstance(value, list) else value
        for name, value in numpy_state["state"].items()
    }
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"].cpu())
    cuda = [state.cpu() for state in states["cuda"]]
    if device is None:
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
    elif device.type == "cuda" and cuda:
        # older checkpoints have those of all GPUs there were
        torch.cuda.set_rng_state(cuda[min(device.index or 0, len(cuda) - 1)], device)


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Give all global generators their states back afterwards; meanwhile seed them, if asked."""
    states = random_states()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        restore_random_states(states)


def seed_everything(seed: int, purpose: str = "global", number: int = 0) -> None:
    """Seed all global generators from any integer, none of whose bits is lost.

    Args:
        purpose: other purposes, other numbers.
        number: the same of things of one purpose, such as steps.
    """
    stream = Stream(seed, purpose)
    words = stream.words(4, number)
    random.seed(int.from_bytes(words[:2].tobytes(), "little"))
    np.random.seed(words[2:].view(np.uint32))
    stream.fill(torch.default_generator, number)
    # where there is no GPU: nothing
    torch.cuda.manual_seed_all(int(stream.words(1, number, 1)[0]) >> 1)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    # torch.load(weights_only=True) refuses numpy arrays
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }
