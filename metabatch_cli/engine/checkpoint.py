"""Checkpoints: all that a training needs in order to go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.report.files import write_atomically

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
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of an unpickler, which speaks of its own workings
        raise UserError(f"{file}: is no checkpoint, or a damaged one") from error
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
    if not path.exists():
        raise UserError(f"{key}={source}: there is no such run or checkpoint")
    if path.is_dir():
        run = RunDirectory.existing(path, key)
        path = run.best_checkpoint if run.best_checkpoint.exists() else run.last_checkpoint
    weights = load(path)["learner"]
    own = learner.state_dict()
    for name in {**own, **weights}:
        theirs, ours = weights.get(name), own.get(name)
        if theirs is None or ours is None or theirs.shape != ours.shape:
            shapes = [
                "missing" if part is None else "×".join(map(str, part.shape)) or "a number"
                for part in (theirs, ours)
            ]
            raise UserError(f"{key}={source}: {name} is {shapes[0]} there and {shapes[1]} here")
    learner.load_state_dict(weights)
