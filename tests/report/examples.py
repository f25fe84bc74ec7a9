"""Directories as runs leave them, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metabatch_cli.engine.run_directory import RunDirectory


def write(
    directory: Path,
    seed: int = 0,
    *,
    status: str = "completed",
    typed: tuple[str, ...] = (),
    metrics: dict[str, float | None] | None = None,
    error: str | None = None,
    how: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """What a run of some seed leaves behind.

    Args:
        metrics: by name, the mean; `test/accuracy` of seed/10 if it is left out.
        how: further fields of each metric.
        config: further sections of its configuration.
    """
    run = RunDirectory(directory)
    tree = {"seed": seed, "model": {"_target_": "a.CNP", "width": 8}, **config}
    run.write_config(tree, [*typed, f"seed={seed}"])
    means = {"test/accuracy": seed / 10} if metrics is None else metrics
    entries = {
        name: {"mean": m, "ci95": 0.25, "tasks": 16, **(how or {})} for name, m in means.items()
    }
    run.write_result(
        status=status,
        step=10,
        seconds=60.0 + seed,
        error=error,
        metrics=entries if status == "completed" else {},
        monitor={"metric": "val/accuracy", "best": 0.5},
    )
    return directory


def model(width: int) -> dict[str, Any]:
    return {"model": {"_target_": "a.CNP", "width": width}}
