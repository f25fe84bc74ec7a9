"""`metabatch bench learner`: steps of MAML a second, ours and others', which compute the same."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from rich.table import Table
from torch import Tensor

from metabatch_cli.bench import machine, results
from metabatch_cli.bench.measure import spread
from metabatch_cli.bench.meta_rivals import (
    META_RIVALS,
    Setting,
    Stepper,
    begin,
    conventional,
    missing_meta,
)
from metabatch_cli.bench.meta_work import META_WORKS
from metabatch_cli.bench.table import rounded
from metabatch_cli.config.check import check_fields
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.config.schema import BenchLearnerConfig
from metabatch_cli.report.console import Reporter

if TYPE_CHECKING:
    from omegaconf import DictConfig

CHECKED = 3  # steps whose losses have to agree
BESIDE = ("conventional", "jax")  # what others are compared with


def job(config: DictConfig) -> None:
    """Measure, show and write."""
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    checked = check_fields(BenchLearnerConfig, plain)
    out = results.writable("out", checked.out)
    reporter = Reporter()
    with tempfile.TemporaryDirectory(prefix="metabatch-") as scratch:
        if checked.cold:  # read when torch's compiler is first imported
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        found = measured(checked, reporter)
    if out is not None:
        results.write(out, "learner", found)
    for name, work in found["works"].items():
        for count in found["threads"]:
            rows = [r for r in found["rows"] if (r["work"], r["threads"]) == (name, count)]
            reporter.console.print()
            reporter.console.print(table(name, work["summary"], count, rows))
    for note in notes(found):
        reporter.say(note)
    if out is not None:
        reporter.say(f"written: {checked.out}")


def measured(config: BenchLearnerConfig, reporter: Reporter) -> dict[str, Any]:
    """Measure every rival at every work, on every number of threads."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    absent = {str(name): why for name in config.rivals if (why := missing_meta(name)) is not None}
    groups = grid(config, device, absent)
    found: dict[str, Any] = {
        "machine": {**machine.facts(), "device": device, "jax": _version("jax")},
        "method": {
            "seconds": config.seconds,
            "repeats": config.repeats,
            "step": "loss, meta-gradient and Adam; batches lie ready",
            "cold": config.cold,
        },
        "tasks": config.tasks,
        "first_order": config.first_order,
        "threads": list(dict.fromkeys(config.threads)),
        "works": {
            setting.work.name: {
                "summary": setting.work.summary,
                "inner_steps": setting.work.inner_steps,
            }
            for setting, _ in groups
        },
        "missing": absent,
        "refused": [],
        "rows": [],
    }
    reporter.plan("measuring", describe(found, groups))
    for name, why in absent.items():
        reporter.say(f"{META_RIVALS[name].label}: {why}")
    found["disturbed_by"] = machine.disturbance()
    if found["disturbed_by"] is not None:
        reporter.say(f"warning: the machine is not idle ({found['disturbed_by']}): rates are off")
    begin()
    for setting, names in groups:
        rows, refused = compared(setting, names, config.seconds, config.repeats, reporter)
        found["rows"] += rows
        found["refused"] += refused
    return found


def grid(
    config: BenchLearnerConfig, device: str, absent: dict[str, str]
) -> list[tuple[Setting, list[str]]]:
    """Who is compared with whom: the rivals of each work and number of threads.

    Raises:
        ConfigError: nobody is left.
    """
    groups = []
    for kind in dict.fromkeys(config.work):
        work = META_WORKS[kind](config.tasks, config.inner_steps)
        names = [
            name
            for name in dict.fromkeys(config.rivals)
            if name not in absent and META_RIVALS[name].does(work)
        ]
        for count in dict.fromkeys(config.threads):
            if names:
                setting = Setting(work, config.first_order, count, device, config.training)
                groups.append((setting, [str(name) for name in names]))
    if not groups:
        why = [f"{META_RIVALS[name].label} is {why}" for name, why in absent.items()]
        raise ConfigError(
            "rivals",
            "nothing can be measured of these: "
            + ("; ".join(why) or f"none of them does {', '.join(config.work)}"),
            value=", ".join(dict.fromkeys(config.rivals)),
        )
    return groups


def compared(
    setting: Setting, names: list[str], seconds: float, repeats: int, reporter: Reporter
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of those who take the right steps, and who does not, in words.

    Rivals take turns, every other round backwards: what slowly changes meets all alike.
    """
    right_losses, right_gradients = reference(setting)
    taking: dict[str, tuple[Stepper, dict[str, Any]]] = {}
    refused = []
    with (
        ExitStack() as stack,
        reporter.counting("measure", len(names) * (1 + repeats)) as next_is,
    ):
        for name in names:
            next_is(f"{META_RIVALS[name].label}: {setting.work.name}, first steps")
            stepper = META_RIVALS[name].make(setting)
            stack.callback(stepper.close)
            losses, first_step = stepper.steps(1)
            gradients = stepper.gradients()
            losses += stepper.steps(CHECKED - 1)[0]
            errors = {
                "gradient_error": distance(gradients, right_gradients),
                "loss_error": distance([torch.tensor(losses)], [torch.tensor(right_losses)]),
            }
            limit = META_RIVALS[name].rounding
            if not max(errors.values()) <= limit:
                said = ", ".join(f"{key.partition('_')[0]} {e:.2g}" for key, e in errors.items())
                refused.append(
                    f"{META_RIVALS[name].label} at {setting.work.name}: other steps than the "
                    f"reference's, by {said} of their length (at most {limit:g})"
                )
                continue
            taking[name] = stepper, {"first_step_seconds": first_step, **errors}
        rates: dict[str, list[float]] = {name: [] for name in taking}
        for number in range(repeats):
            for name in taking if number % 2 == 0 else reversed(taking):
                threads = f"{setting.threads} thread{'s' * (setting.threads > 1)}"
                next_is(f"{META_RIVALS[name].label}: {setting.work.name}, {threads}")
                rates[name].append(taking[name][0].pace(seconds))
        rows = [
            {
                "work": setting.work.name,
                "threads": setting.threads,
                "rival": name,
                "label": META_RIVALS[name].label,
                "about": stepper.about,
                "steps_per_second": {**spread(rates[name]), "rounds": rates[name]},
                **{f"over_{other}": _ratio(rates[name], rates.get(other)) for other in BESIDE},
                **facts,
            }
            for name, (stepper, facts) in taking.items()
        ]
    return rows, refused


def reference(setting: Setting) -> tuple[list[float], list[Tensor]]:
    """The losses of the first steps, and the gradients of the very first, in 64 bits."""
    stepper = conventional(replace(setting, device="cpu"), bits=64)
    losses, _ = stepper.steps(1)
    gradients = stepper.gradients()
    return losses + stepper.steps(CHECKED - 1)[0], gradients


def distance(found: list[Tensor], right: list[Tensor]) -> float:
    """How far numbers are from the right ones, of the right ones' length."""
    one, other = (torch.cat([part.double().flatten() for part in of]) for of in (found, right))
    return float((one - other).norm() / other.norm())


def _ratio(above: list[float], below: list[float] | None) -> float | None:
    if not below:
        return None
    # of what was measured in the same round: how fast the machine was at the moment cancels out
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(
    found: dict[str, Any], groups: list[tuple[Setting, list[str]]]
) -> list[tuple[str, str]]:
    """What will be measured, a row for each part."""
    on = found["machine"]
    order = "first" if found["first_order"] else "second"
    rivals = {META_RIVALS[name].label: META_RIVALS[name].summary for _, of in groups for name in of}
    versions = f"torch {on['torch']}, Python {on['python']}"
    return [
        ("machine", f"{on['cpu']}, {on['cores']} cores, load {on['load']}, {on['device']}"),
        ("versions", versions + (f", JAX {on['jax']}" if on["jax"] else "")),
        ("MAML", f"{found['tasks']} tasks a step, {order} order"),
        *(
            (name, f"{work['summary']}, inner steps: {work['inner_steps']}")
            for name, work in found["works"].items()
        ),
        *rivals.items(),
    ]


def table(name: str, summary: str, threads: int, rows: list[dict[str, Any]]) -> Table:
    """Steps a second of all rivals at a work."""
    title = f"{name}: {summary}, {threads} thread{'s' * (threads > 1)}"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column("rival", style="bold cyan", no_wrap=True)
    columns = ("steps/s", "lowest – highest", "/ conventional", "/ JAX", "first step", "off by")
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("how")
    for row in rows:
        rates = row["steps_per_second"]
        shown.add_row(
            row["label"],
            rounded(rates["median"]),
            f"{rounded(rates['min'])} – {rounded(rates['max'])}",
            *(_times(row[f"over_{other}"]) for other in BESIDE),
            f"{row['first_step_seconds']:.3g} s",
            f"{row['gradient_error']:.0e}",
            row["about"],
        )
    return shown


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.0f} ×"


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader of the tables has to know."""
    said = ["off by: the first gradient from the one in 64 bits, of that one's length"]
    said += [f"{META_RIVALS[name].label}: {why}" for name, why in found["missing"].items()]
    said += [f"not reported: {text}" for text in found["refused"]]
    if found["disturbed_by"]:
        said.append(f"warning: the machine was not idle: {found['disturbed_by']}")
    return said
