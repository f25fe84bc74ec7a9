"""Checkpoints: all that a training needs in order to go on as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.run_directory import RunDirectory, write_atomically

FORMAT = 1


def save(file: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that `torch.load(weights_only=True)` reads, as a whole or not at all."""
    write_atomically(file, lambda stream: torch.save({"format": FORMAT, **state}, stream))


def load(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UserError: it is not there, damaged, or of another version; names the file.
    """
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such checkpoint") from None
    except Exception as error:
        raise UserError(f"{file}: is no checkpoint, or a damaged one: {error}") from error
    if not isinstance(state, dict) or "learner" not in state:
        raise UserError(f"{file}: is no checkpoint of metabatch: it has no entry 'learner'")
    if state.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{file}: has checkpoint format {state['format']}, this version reads {FORMAT}"
        )
    return state


def load_weights(learner: torch.nn.Module, source: str, key: str = "trainer.init_from") -> None:
    """Give a learner the weights of another run (its best ones) or of a checkpoint.

    Raises:
        UserError: nothing there, or weights of another shape; names the first that differs.
    """
    path = Path(source)
    if path.is_dir():
        run = RunDirectory.existing(path, key)
        path = run.best_checkpoint if run.best_checkpoint.exists() else run.last_checkpoint
    weights = load(path)["learner"]
    own = learner.state_dict()
    for name in own.keys() | weights.keys():
        theirs, ours = weights.get(name), own.get(name)
        if theirs is None or ours is None or theirs.shape != ours.shape:
            shapes = [
                "missing" if part is None else "×".join(map(str, part.shape)) or "a number"
                for part in (theirs, ours)
            ]
            raise UserError(f"{key}={source}: {name} is {shapes[0]} there and {shapes[1]} here")
    learner.load_state_dict(weights)


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
def preserved_random_states() -> Iterator[None]:
    """Give all global generators their states back afterwards."""
    states = random_states()
    try:
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
