"""Tiny runs in this process, learners and task sets of their own will, equality of whole runs."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from metabatch_cli.batching import Task, TaskSet
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.engine.parts import Parts
from metabatch_cli.engine.run import train
from metabatch_cli.learners.learner import CompileCost, Learner, Metric
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.report.console import Reporter
from tasksets.functions import Functions
from tests.composed import composed

HERE = "tests.engine.examples"
TINY = (
    "+experiment=cnp_sine",
    "+debug=short",
    "model.width=8",
    "model.encoder_depth=2",
    "model.decoder_depth=2",
    "loader.batch_size=4",
    "loader.device=cpu",
    "trainer.threads=1",
    "evaluation.figures=false",
)


_SCRATCH = tempfile.TemporaryDirectory(prefix="metabatch-tests-")  # deleted when we end


def new_directory() -> Path:
    """For runs that several tests, or several examples of one, look at."""
    return Path(tempfile.mkdtemp(dir=_SCRATCH.name))


@functools.cache
def settings(*overrides: str) -> DictConfig:
    """A configuration of ten steps in a tenth of a second."""
    return composed(*TINY, *overrides)


def settings_of(taskset: str, *overrides: str) -> DictConfig:
    """The same with a task set of this file that knows nothing but its sizes."""
    return with_taskset(settings(*overrides), taskset)


def with_taskset(config: DictConfig, taskset: str) -> DictConfig:
    """A configuration with a task set of this file that knows nothing but its sizes."""
    config = config.copy()
    sizes = {"min_pts": 1, "max_ctx_pts": 5, "max_tgt_pts": 9}
    config.taskset = OmegaConf.create({"_target_": f"{HERE}.{taskset}", **sizes})
    return config


def asked(*words: str) -> DictConfig:
    """A configuration from overrides; `tasks of NAME` among them chooses a task set of here."""
    mine = "tasks of "
    config = composed(*(word for word in words if not word.startswith(mine)))
    for word in words:
        if word.startswith(mine):
            config = with_taskset(config, word.removeprefix(mine))
    return config


def learner(name: str, **arguments: Any) -> tuple[str, ...]:
    """Overrides that choose a learner of this file."""
    node = {"_target_": f"{HERE}.{name}", **arguments}
    return ("~learner", "+learner={" + ",".join(f"{k}:{v}" for k, v in node.items()) + "}")


def parts(*overrides: str) -> Parts:
    """What a configuration declares, to be built when it is asked for."""
    return Parts(check(resolve(settings(*overrides))))


class Killed(BaseException):
    """Nobody catches it: the training ends in the middle of whatever it does."""


class Watcher(Reporter):
    """Calls a hook after every step, before anything is logged, validated or saved."""

    def __init__(self, after_step: Callable[[int], object] | None = None) -> None:
        super().__init__(Console(file=io.StringIO(), width=200))
        self.after_step = after_step

    def advance(self, step: int, total: int, loss: float | None) -> None:
        super().advance(step, total, loss)
        if self.after_step is not None:
            self.after_step(step)

    @property
    def text(self) -> str:
        return self.console.file.getvalue()


def kill_at(wanted: int) -> Callable[[int], None]:
    """A hook that ends the training right after a step."""

    def after_step(step: int) -> None:
        if step == wanted:
            raise Killed

    return after_step


def run(
    directory: Path,
    *overrides: str,
    after_step: Callable[[int], object] | None = None,
    taskset: str | None = None,
) -> dict[str, Any]:
    """Train without a word."""
    config = settings(*overrides) if taskset is None else settings_of(taskset, *overrides)
    return train(config, directory, reporter=Watcher(after_step))


class KillAtRow:
    """A logger that ends the training once a row is written, the one of a step and a kind."""

    def __init__(self, directory: Path, step: int, key: str) -> None:
        self.step, self.key = step, key

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step and self.key in row:
            raise Killed

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


# --- learners --------------------------------------------------------------------------------


class Choosing(NeuralProcess):
    """Has something to choose, and something to say about compiling."""

    def __init__(self, model: nn.Module, way: str = "first", seconds: float | None = None) -> None:
        super().__init__(model)
        self.way, self.seconds = way, seconds
        self.chosen = self.compiled_calls = 0

    def choose(self, tasks: Task) -> dict[str, Any]:
        torch.rand(3)
        self(tasks).backward()
        if self.way == "auto":
            self.way, self.chosen = "first", self.chosen + 1
        return {"way": self.way}

    def cost_of_compiling(self, tasks: Task) -> CompileCost | None:
        return None if self.seconds is None else CompileCost(self.seconds, 0.01)

    def compiled(self, varying: bool) -> Callable[[Task], Tensor]:
        def loss_of(tasks: Task) -> Tensor:
            self.compiled_calls += 1
            return self(tasks)

        return loss_of

    def score(self, tasks: Task) -> dict[str, Tensor]:
        ones = torch.ones(len(tasks.target_x))
        counts = {"chosen": self.chosen, "compiled_calls": self.compiled_calls}
        return super().score(tasks) | {name: count * ones for name, count in counts.items()}


class Noisy(NeuralProcess):
    """Draws from all three global generators, in odd numbers, when it learns and when it scores."""

    def forward(self, tasks: Task) -> Tensor:
        factor = 1 + 0.1 * torch.rand(()) + 0.1 * random.gauss(0, 1) + 0.1 * np.random.randn()
        return super().forward(tasks) * factor.to(tasks.target_y.dtype)

    def score(self, tasks: Task) -> dict[str, Tensor]:
        scores = super().score(tasks)
        noise = torch.rand(len(tasks.target_x)) + random.random() + np.random.randn()
        return {**scores, "noise": noise}


class Cheat(NeuralProcess):
    """Claims to know the targets."""

    def score(self, tasks: Task) -> dict[str, Tensor]:
        scores = super().score(tasks)
        return scores | {"log_likelihood": scores["log_likelihood"] + 1000}


class Scripted(Learner):
    """Counts its steps; its score is best after `best_at` of them, and its loss may go wrong.

    Args:
        nan_at: the step whose loss is not a number.
        bad_gradient_at: the step whose loss is one, but its gradient is not.
        score_nan_at: scores after so many steps are not numbers.
        fail_at: the step that raises.
    """

    def __init__(
        self,
        model: nn.Module,
        best_at: int = 4,
        nan_at: int = 0,
        bad_gradient_at: int = 0,
        score_nan_at: int = 0,
        fail_at: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.best_at = best_at
        self.nan_at = nan_at
        self.bad_gradient_at = bad_gradient_at
        self.score_nan_at = score_nan_at
        self.fail_at = fail_at

    @property
    def metric(self) -> Metric:
        return Metric("closeness", higher_is_better=True)

    def forward(self, tasks: Task) -> Tensor:
        self.steps += 1
        step = int(self.steps)
        prediction = self.predict(tasks.context_x, tasks.context_y, tasks.target_x)
        loss = -prediction.log_prob(tasks.target_y).mean() + self.weight.square()
        if step == self.fail_at:
            raise ArithmeticError(f"no step {step}")
        if step == self.nan_at:
            return loss * float("nan")
        if step == self.bad_gradient_at:
            return loss + torch.sqrt(self.weight * 0)
        return loss

    def score(self, tasks: Task) -> dict[str, Tensor]:
        far = float((self.steps - self.best_at).abs())
        if int(self.steps) == self.score_nan_at:
            far = float("nan")
        values = torch.full((len(tasks.target_x),), -far)
        return {"closeness": values, "error": -values}

    def predict(self, context_x: Tensor, context_y: Tensor, target_x: Tensor):
        return self.model(context_x, context_y, target_x)


class FailingSecond(Scripted):
    """Fails, unless it is rank zero's."""

    def __init__(self, model: nn.Module, fail_at: int) -> None:
        super().__init__(model, fail_at=fail_at if os.environ.get("RANK") == "1" else 0)


class FailingOnce(Scripted):
    """Fails on rank one of torchrun's first attempt; in the second one rank zero is slow."""

    def __init__(self, model: nn.Module) -> None:
        rank, attempt = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
        if (rank, attempt) == ("0", "1"):
            time.sleep(4)
        super().__init__(model, fail_at=2 if (rank, attempt) == ("1", "0") else 0)


# --- task sets -------------------------------------------------------------------------------


class WithOracle(Functions):
    """Whoever knows the function predicts it with the noise's own spread."""

    def oracle(self, tasks: Task) -> dict[str, Tensor]:
        truth = self.truth(tasks, tasks.target_x)
        ideal = Independent(Normal(truth, self.noise), 1)
        return {"log_likelihood": ideal.log_prob(tasks.target_y).mean(dim=1)}


class OldStyle(TaskSet):
    """As written for the original MetaBatch: one task at a time, from the global generators."""

    def __init__(self, min_pts, max_ctx_pts, max_tgt_pts, eval=False):
        super().__init__(min_pts, max_ctx_pts, max_tgt_pts, eval=eval)
        self.mode = "eval" if self.eval else "train"

    def __len__(self):
        return 50

    def __gettask__(self, index, n_context, n_target):
        x = np.random.uniform(-2, 2, (n_context + n_target, 1))
        y = np.sin(x + index) + random.gauss(0, 0.01)
        return x[:n_context], y[:n_context], x[n_context:], y[n_context:]


class Minimal(TaskSet):
    """A constructor that knows of no split and no evaluation."""

    def __init__(self, min_pts: int, max_ctx_pts: int, max_tgt_pts: int) -> None:
        super().__init__(min_pts, max_ctx_pts, max_tgt_pts)

    def __len__(self):
        return 50

    def __gettask__(self, index, n_context, n_target):
        x = torch.rand(n_context + n_target, 1)
        y = x * index
        return x[:n_context], y[:n_context], x[n_context:], y[n_context:]


class Labelled(Minimal):
    """Every fifth task is of a class of its own."""

    @property
    def classes(self):
        return (torch.arange(50) % 5 == 0).long()


class Groups(TaskSet):
    """A group for each task, some with fewer points than others, some all context, no target."""

    ragged = True

    def __init__(self, min_pts: int, max_ctx_pts: int, max_tgt_pts: int) -> None:
        super().__init__(min_pts, max_ctx_pts, max_tgt_pts)

    def __len__(self):
        return 50

    def __gettask__(self, index, n_context, n_target):
        size = 1 + 3 * index % 8
        x = np.random.uniform(-2, 2, (size, 1))
        y = np.sin(x + index) + random.gauss(0, 0.01)
        n_context = min(n_context, size)
        stop = n_context + n_target
        return x[:n_context], y[:n_context], x[n_context:stop], y[n_context:stop]


class WholeGroups(TaskSet):
    """The like as whole batches, by the names of the fields, NaN for what is not there."""

    ragged = True

    def __init__(self, min_pts: int, max_ctx_pts: int, max_tgt_pts: int) -> None:
        super().__init__(min_pts, max_ctx_pts, max_tgt_pts)

    def __len__(self):
        return 50

    def __gettasks__(self, indices, n_context, n_target, generator):
        fields = {}
        for part, most in (("context", n_context), ("target", n_target)):
            x = torch.randn(len(indices), most, 1, generator=generator)
            mask = torch.rand(len(indices), most, generator=generator) < 0.7
            x[~mask] = torch.nan
            y = torch.sin(x + indices[:, None, None])
            fields |= {f"{part}_x": x, f"{part}_y": y, f"{part}_mask": mask}
        return fields


# --- what a directory holds ------------------------------------------------------------------


def rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics without the time that they took."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def state(directory: Path, name: str = "last") -> dict[str, Any]:
    """A checkpoint without the time that it took."""
    loaded = torch.load(directory / "checkpoints" / f"{name}.pt", weights_only=True)
    loaded.pop("seconds", None)
    return loaded


def result(directory: Path) -> dict[str, Any]:
    """result.json without the time that it took."""
    read = json.loads((directory / "result.json").read_text())
    read.pop("seconds")
    return read


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two trees of tensors and numbers differ by a bit; empty if they do not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and as_bytes(one) == as_bytes(other)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        missing = object()
        return [
            found
            for key in keys
            for found in differences(
                one.get(key, missing), other.get(key, missing), f"{place}.{key}"
            )
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for n, (a, b) in pairs for found in differences(a, b, f"{place}.{n}")]
    return [] if type(one) is type(other) and one == other else [f"{place}: {one!r}, {other!r}"]


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, so that NaN equals NaN and 0.0 is not −0.0."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random states, rows and result are the same to the bit."""
    assert differences(state(one), state(other)) == []
    assert differences(state(one, "best"), state(other, "best")) == []
    assert rows(one) == rows(other)
    assert result(one) == result(other)


def fingerprint(directory: Path) -> dict[str, str]:
    """A digest of every file and folder below a directory, and when it was written."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
            if path.is_file()
            else "folder"
        )
        for path in sorted(directory.rglob("*"))
    }
