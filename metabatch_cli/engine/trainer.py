"""The training loop: receive tasks, learn, log, validate, save, until it is done."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from metabatch_cli import mkl
from metabatch_cli.batching.loader import StateMismatch, TaskLoader
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.batching.task import POINTS, slice_tasks
from metabatch_cli.config.errors import UserError
from metabatch_cli.config.schema import TrainerConfig
from metabatch_cli.engine import checkpoint, random_states
from metabatch_cli.engine.average import Averaging
from metabatch_cli.engine.evaluator import evaluate, monitored
from metabatch_cli.engine.precision import Precision
from metabatch_cli.engine.ranks import Ranks
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.stop import StopSignals
from metabatch_cli.learners.learner import Learner
from metabatch_cli.learners.meta_gradient import Differentiated
from metabatch_cli.report.console import Reporter
from metabatch_cli.report.loggers import Logger


class TrainingFailed(UserError):
    """The loss is no longer a number; says at which step, on which batch, and what is saved."""


class Trainer:
    """One training in one directory, exact to the bit through kills and resumes.

    Args:
        config: the section `trainer`.
        run: where checkpoints go.
        learner, optimizer, scheduler: what learns.
        loader: training tasks.
        validation: loaders of the validation sets by their qualifiers.
        loggers: take the rows of metrics.
        reporter: tells a person.
        compute_loss: the learner's loss of tasks, compiled or not; None for the learner itself.
        ranks: the processes that share this training, each with its own loader, loggers and
            reporter; only rank zero writes.
    """

    def __init__(
        self,
        config: TrainerConfig,
        run: RunDirectory,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loader: TaskLoader,
        validation: dict[str, TaskLoader],
        loggers: Sequence[Logger],
        reporter: Reporter,
        compute_loss: Callable[[Tasks], Tensor | Differentiated] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.average = Averaging(learner, self.ranks)
        self.run = run
        self.learner = learner
        self.parameters = list(learner.parameters())
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loader = loader
        self.validation = validation
        self.loggers = loggers
        self.reporter = reporter
        self.device = loader.device or torch.device("cpu")
        self.precision = Precision(config.precision, self.device)
        self.metric = monitored(learner.metric, config.monitor)
        self.compute_loss = learner if compute_loss is None else compute_loss
        self.stop = StopSignals()
        self.stopped_by = 0  # the signal that ends it on all ranks

        self.step = 0
        self.seconds = 0.0  # of training and validation, over all resumes
        self.best: float | None = None
        self.evaluations_without_gain = 0
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._losses = torch.zeros((), dtype=wide, device=self.device)  # since the last row
        self._counted = 0
        self._first_bad = torch.zeros((), dtype=torch.int64, device=self.device)  # step, 0 if none
        self._clock = 0.0
        self._validated_at = self._saved_at = -1

    # --- the loop, in verbs ------------------------------------------------------------------

    def fit(self) -> None:
        """Train until the last step, the last second, the end of patience, or a signal."""
        self.learner.train()
        batches = self.batches()
        self._clock = time.monotonic()
        with self.profiler() as profiler, self.narrate():
            while not self.finished():
                tasks = self.precision.prepare(next(batches))
                loss = self.update(tasks)
                self.observe(loss)
                if self.due(self.config.log_every):
                    self.log_training()
                if self.due(self.config.eval_every):
                    self.validate()
                if self.due(self.config.checkpoint_every):
                    self.save()
                profiler.step()
            unvalidated = not self.stopped_by and self._validated_at != self.step
            if unvalidated:
                self.validate()
            if unvalidated or self._saved_at != self.step:
                self.save()

    def batches(self) -> Iterator[Any]:
        """The batches from the current step on."""
        if self.config.overfit:
            return itertools.repeat(self.loader.batch_at(0))
        return self.loader.stream()

    def finished(self) -> bool:
        """Whether there is no further step to take."""
        self._tick()
        out_of_time = self.config.max_time is not None and self.seconds >= self.config.max_time
        out_of_patience = (
            self.config.patience is not None
            and self.evaluations_without_gain >= self.config.patience
        )
        done = self.step >= self.config.max_steps
        return self.has_been_told_to_stop(out_of_time) or done or out_of_patience

    def has_been_told_to_stop(self, out_of_time: bool = False) -> bool:
        """Whether a signal came, or time is over, for any of the ranks: all heed it together."""
        self.stopped_by, over = self.ranks.largest([self.stop.received, out_of_time])
        return bool(self.stopped_by or over)

    def update(self, tasks: Tasks) -> Tensor:
        """One optimisation step; returns the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.begin(self.step)
        self.average.begin()
        total = len(tasks.target_x)
        size = -(-total // self.config.accumulate)
        shared = size < total or self.ranks.size > 1
        counted = self.judged(tasks) if shared else torch.ones(())
        losses = []
        for start in range(0, total, size):
            whole = size == total
            part = tasks if whole else slice_tasks(tasks, start, min(start + size, total))
            with self.precision.autocast():
                loss = self.compute_loss(part)
                if not whole:  # its share of the mean
                    loss = loss * (self.judged(part) / counted.clamp(min=1))
            loss.backward()
            losses.append(loss.detach())
        own_loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        loss_of_all = self.average(own_loss, counted)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        return loss_of_all

    def observe(self, loss: Tensor) -> None:
        """Keep the loss for the next row; notice where it is no longer a number."""
        self._counted += 1
        if self.device.type == "cpu":  # looking at the number costs nothing
            value = loss.item()
            if not math.isfinite(value):
                self.fail("the loss is", self.step)
            self._losses += value
            self.reporter.advance(self.step, self.config.max_steps, value)
            return
        self._losses += loss
        bad = ~torch.isfinite(loss) & (self._first_bad == 0)
        self._first_bad = torch.where(bad, self.step, self._first_bad)
        # looking at the number waits for a GPU to get there: we look once a row
        if self.step % self.config.log_every == 0:
            self.ranks.largest([self.step])  # tells who is gone: a sum on GPUs waits for them
            self.refuse_bad_loss()
            self.reporter.advance(self.step, self.config.max_steps, loss.item())

    def refuse_bad_loss(self) -> None:
        """Raise TrainingFailed if a loss was NaN or infinite: nothing after it is worth saving."""
        if int(self._first_bad):
            self.fail("the loss is", int(self._first_bad))

    def refuse_bad_numbers(self) -> None:
        """The same of weights, before they are saved: a gradient can be bad where a loss is not."""
        self.refuse_bad_loss()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            self.fail("a weight is", self.step)

    def fail(self, what: str, step: int) -> NoReturn:
        """Raise TrainingFailed about a step: its batch, what is saved, and what often helps."""
        saved = self.run.last_checkpoint
        raise TrainingFailed(
            f"{what} not finite at step {step:,}\n"
            f"  batch: {self._batch_of(step)}\n"
            f"  last checkpoint: {saved if saved.exists() else 'none yet'}\n"
            "  often helps: a smaller optimizer.lr, trainer.clip_norm=1.0, trainer.precision=64"
        )

    def _batch_of(self, step: int) -> str:
        """What is known of the batch of a step, and of its own numbers that are not finite."""
        number = 0 if self.config.overfit else step - 1
        said = str(self.loader.plan.spec(number))
        tasks = self.precision.prepare(self.loader.batch_at(number))
        for name in POINTS:
            values = getattr(tasks, name)
            if values.is_floating_point() and not values.isfinite().all():
                task = int((~values.isfinite()).flatten(1).any(dim=1).nonzero()[0])
                return f"{said}\n  {name} of its task {task} is not finite: the data is to blame"
        return said

    def log_training(self) -> None:
        """Write a row of training metrics: means since the last row."""
        self._tick()
        row = {
            "step": self.step,
            "loss": (self._losses / max(self._counted, 1)).item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.elapsed,
        }
        self._losses.zero_()
        self._counted = 0
        self.write(row)

    def validate(self) -> None:
        """Score the validation tasks; keep the weights if they are the best so far."""
        self.refuse_bad_numbers()
        evaluation = evaluate(
            self.learner,
            self.validation,
            self.precision,
            split="val",
            n_tasks=self.config.eval_tasks,
            ranks=self.ranks,
        )
        score = evaluation.find("val", self.metric.name)
        if score is None:
            raise KeyError(f"{self.metric.name}: the learner's own metric is not among its scores")
        row: dict[str, Any] = {"step": self.step}
        for name, entry in evaluation.metrics.items():
            row[name] = entry["mean"]
            row.update(
                {f"{name}/{part}": entry[part] for part in ("ci95", "oracle") if part in entry}
            )
        self.write(row)
        better = math.isfinite(score) and self.metric.is_better(score, self.best)
        self.evaluations_without_gain = 0 if better else self.evaluations_without_gain + 1
        if better:
            self.best = score
            state = {"learner": self.learner.state_dict(), "step": self.step, "score": score}
            if self.ranks.leads:
                checkpoint.save(self.run.best_checkpoint, state)
        self._validated_at = self.step
        self.reporter.validated(self.step, self.metric.name, score, better)

    def save(self) -> None:
        """Write last.pt: everything that the next step depends on."""
        self.refuse_bad_numbers()
        self._tick()
        state = self.state_dict()
        if self.ranks.leads:
            checkpoint.save(self.run.last_checkpoint, state)
            self.run.write_result(step=self.step, seconds=self.elapsed)
        self._saved_at = self.step

    # --- their parts -------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now."""
        return self.step % every == 0 or self.step == self.config.max_steps

    def judged(self, tasks: Tasks) -> Tensor:
        """How many tasks the mean in a loss is over."""
        dtype, judged = self.precision.dtype, self.learner.judged(tasks)
        if judged is None:
            return torch.tensor(len(tasks.target_x), dtype=dtype)
        return judged.sum(dtype=dtype)

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics to all loggers."""
        for logger in self.loggers:
            logger.log(row)

    @contextlib.contextmanager
    def narrate(self) -> Iterator[None]:
        """The progress bar."""
        with self.reporter.training(self.step, self.config.max_steps):
            yield

    @contextlib.contextmanager
    def profiler(self) -> Iterator[Any]:
        """torch's profiler over steps 2 to 25, where it is asked for."""
        if not self.config.profile or not self.ranks.leads:
            yield _NoProfiler()
            return
        few = torch.profiler.schedule(wait=0, warmup=1, active=24, repeat=1)

        def export(profile: Any) -> None:
            profile.export_chrome_trace(str(self.run.profile_file))
            table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
            self.reporter.say(f"{table}\nprofile: {self.run.profile_file}")

        with torch.profiler.profile(
            record_shapes=True, schedule=few, on_trace_ready=export
        ) as profile:
            yield profile

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All of a checkpoint."""
        own, *others = self.ranks.gather(random_states.random_states(self.device))
        return {
            "step": self.step,
            "seconds": self.seconds,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "loader": self.loader.state_dict(),
            "random": own,
            "random_of_others": others,
            "best": self.best,
            "evaluations_without_gain": self.evaluations_without_gain,
            "validated_at": self._validated_at,
            "losses": self._losses.item(),
            "counted": self._counted,
            "mkl_avx512": mkl.avx512_enabled(),
        }

    def load_learner(self, file: Path) -> None:
        """Give the learner the weights of a checkpoint that rank zero has."""
        found = checkpoint.load(file)["learner"] if self.ranks.leads else None
        self.learner.load_state_dict(self.ranks.from_leader(found))

    def restore(self) -> None:
        """Go on from last.pt, where there is one; forget rows that were logged after it."""
        saved = self.ranks.leads and self.run.last_checkpoint.exists()
        state = checkpoint.load(self.run.last_checkpoint) if saved else None
        if state := self.ranks.from_leader(state):
            try:
                self.learner.load_state_dict(state["learner"])
                self.optimizer.load_state_dict(state["optimizer"])
            except (RuntimeError, ValueError) as error:  # the configuration is the same
                raise UserError(
                    f"{self.run.last_checkpoint}: does not fit this version of the code, which has "
                    "other weights: go on with the version that began it, or fresh=true"
                ) from error
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            try:
                self.loader.load_state_dict(state["loader"])
            except StateMismatch as error:
                raise UserError(f"{self.run.last_checkpoint}: {error}") from error
            self.step = state["step"]
            self._restore_random_states(state["random"], state.get("random_of_others", []))
            self.seconds = state["seconds"]
            self.best = state["best"]
            self.evaluations_without_gain = state["evaluations_without_gain"]
            self._validated_at = state["validated_at"]
            self._saved_at = self.step
            self._losses.fill_(state["losses"])
            self._counted = state["counted"]
            self._warn_of_other_digits(state.get("mkl_avx512", False))
        elif self.ranks.size > 1:
            # another machine may begin otherwise, and has no need of what `init_from` names
            own = {name: part.cpu() for name, part in self.learner.state_dict().items()}
            self.learner.load_state_dict(self.ranks.from_leader(own))
            if not self.ranks.leads:
                self._restore_random_states({}, [])
        for logger in self.loggers:
            logger.rewind(self.step)

    def _warn_of_other_digits(self, avx512: bool) -> None:
        """Say so if MKL computes otherwise than it did until here (see mkl.py)."""
        if avx512 == mkl.avx512_enabled():
            return
        if avx512:
            change = "no longer uses"
            reason = f"another processor, {mkl.SWITCH}=0, or torch imported before metabatch_cli"
        else:
            change, reason = "now uses", f"{mkl.SWITCH}=0 goes on as before"
        self.reporter.say(
            f"warning: MKL {change} AVX-512 on an AMD processor ({reason}): last digits may differ "
            "from those of a run in one go"
        )

    def _restore_random_states(self, of_leader: dict[str, Any], others: list[Any]) -> None:
        """Set the global generators; of a rank that is new here, to numbers of its own."""
        rank = self.ranks.rank
        if self.ranks.leads:
            random_states.restore_random_states(of_leader, self.device)
        elif rank <= len(others):
            random_states.restore_random_states(others[rank - 1], self.device)
        else:
            random_states.seed_everything(self.loader.seed, f"rank {rank}", self.step)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, to the millisecond."""
        return round(self.seconds, 3)

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock if self._clock else 0.0
        self._clock = now


class _NoProfiler:
    def step(self) -> None:
        pass
