"""The global random generators of a process: saved, restored, seeded, lent out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states of all global generators: `random`, `numpy.random`, torch on CPU and CUDA."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": _plain(numpy_state["state"])},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set all global generators to states of `random_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = dict(states["numpy"])
    numpy_state["state"] = {
        name: np.array(value, dtype=np.uint32) if isinstance(value, list) else value
        for name, value in numpy_state["state"].items()
    }
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


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


def seed_everything(seed: int) -> None:
    """Seed all global generators."""
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(abs(seed)).generate_state(4))
    torch.manual_seed(seed % 2**64)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    # torch.load(weights_only=True) refuses numpy arrays
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }
