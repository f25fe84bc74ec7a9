"""Whether a directory's run is the one that is asked for, and whether it has more to do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from metabatch_cli.config.check import default_of, locate
from metabatch_cli.config.errors import UserError
from metabatch_cli.config.schema import Config, EvaluationConfig, LoaderConfig, TrainerConfig
from metabatch_cli.engine.run_directory import RunDirectory

# what may differ from the configuration of a run that is resumed: nothing that its numbers
# depend on
FREE_TO_CHANGE = (
    "fresh",
    "logger",
    "launcher",
    "loader.workers",
    "loader.multiprocessing_context",
    "loader.prefetch_factor",
    "loader.persistent_workers",
    "loader.pin_memory",
    "loader.timeout",
    "trainer.log_every",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.processes",
    "trainer.timeout",
)


def has_nothing_to_do(
    run: RunDirectory, saved: Mapping[str, Any], wanted: Mapping[str, Any], config: Config
) -> bool:
    """Whether the run of a directory is complete; UserError if it is another run."""
    refuse_other_configuration(run, saved, wanted)
    return is_complete(run, config)


def refuse_other_configuration(
    run: RunDirectory, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raise UserError if the run that the directory holds has another configuration."""
    before, now = flatten(saved), flatten(wanted)
    as_many = before.get("trainer.processes", 1) == now.get("trainer.processes", 1)
    differing = []
    for key in sorted(before.keys() | now.keys()):
        # a run may be older than a key: it was made by what is the default now
        was = before[key] if key in before else default(key, wanted)
        is_now = now.get(key, "not set")
        shared_anew = key == "trainer.threads" and not as_many
        shared_anew |= key == "loader.device" and _kind(was) == _kind(is_now)
        if was != is_now and not (_free(key) or shared_anew):
            steps = "trainer.max_steps"
            follows = was == before.get(steps) and is_now == now.get(steps)
            why = f" (it follows {steps}: another schedule is another training)" if follows else ""
            differing.append(f"  {key}: {was} in the run, {is_now} asked for{why}")
    if differing:
        raise UserError(
            f"{run.path}: holds a run of another configuration\n"
            + "\n".join(differing)
            + "\n  allowed: the same configuration, another hydra.run.dir, or fresh=true, which "
            "deletes the run"
        )


def default(key: str, config: Mapping[str, Any]) -> Any:
    """What counts where a key is not there: by the schema, or by the constructor that takes it."""
    if key in defaults():
        return defaults()[key]
    *above, name = key.split(".")
    part: Any = config
    for step in above:
        part = part.get(step) if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or "_target_" not in part:
        return "not set"
    return default_of(locate(key, str(part["_target_"])), name, "not set")


@functools.cache
def defaults() -> dict[str, Any]:
    """The default of each key of the sections that the schema describes, by its dotted name."""
    sections: dict[str, Any] = {
        "loader": LoaderConfig(),
        "trainer": TrainerConfig(),
        "evaluation": EvaluationConfig(),
    }
    return flatten({name: dataclasses.asdict(section) for name, section in sections.items()})


def is_complete(run: RunDirectory, config: Config) -> bool:
    """Whether a run has nothing left to do."""
    result = run.read_result()
    if result.get("status") != "completed":
        return False
    before = flatten(run.read_config())
    ended_early = result["step"] < (before.get("trainer.max_steps") or 0)
    same_end = all(
        before.get(f"trainer.{key}") == getattr(config.trainer, key)
        for key in ("max_steps", "max_time")
    )
    return result["step"] >= config.trainer.max_steps or (ended_early and same_end)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _kind(device: Any) -> str:
    return str(device).partition(":")[0]


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
