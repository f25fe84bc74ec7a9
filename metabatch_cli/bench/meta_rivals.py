"""Who takes the meta-steps: for each rival the same steps, from the same weights and batches.

A step is all of it: the loss of a batch of tasks after the inner loop, its gradient for the first
weights, and Adam. Batches lie ready in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metabatch_cli.batching.task import tree_map
from metabatch_cli.bench import jax_step
from metabatch_cli.bench.meta_work import MetaWork
from metabatch_cli.bench.pace import pace
from metabatch_cli.engine.memory import keep_freed_memory
from metabatch_cli.engine.parts import is_worth_compiling
from metabatch_cli.engine.precision import Precision
from metabatch_cli.learners.at_once import InnerLoop
from metabatch_cli.learners.maml import MAML

LR = 1e-3  # Adam's


@dataclass(frozen=True)
class Setting:
    """What is the same for all rivals.

    Attributes:
        work: network, tasks and inner loop.
        first_order: whether the derivative of the inner gradients is left out.
        threads: of the CPU.
        device: `cpu` or `cuda`.
        training: steps of the training for which ours decides whether to compile.
    """

    work: MetaWork
    first_order: bool = False
    threads: int = 1
    device: str = "cpu"
    training: int = 60_000


class Stepper:
    """Takes meta-steps of one rival."""

    about: str = ""
    """What was decided about how, in words."""

    def steps(self, count: int) -> tuple[list[float], float]:
        """The losses of the next steps, and the seconds that they took."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """Those of the first step; asked for behind it, before the second."""
        raise NotImplementedError

    def pace(self, seconds: float) -> float:
        """Steps a second, over at least so many seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds."""


class InTorch(Stepper):
    """Steps of a torch module with Adam.

    Args:
        module: whose parameters are learned.
        differentiate: puts gradients of a batch's loss into `.grad`; returns the loss.
        precision: of what is computed; batches are converted to it.
    """

    def __init__(
        self,
        setting: Setting,
        module: nn.Module,
        differentiate: Callable[[Any], Any],
        precision: Precision,
    ) -> None:
        self.setting = setting
        self.parameters = list(module.parameters())
        self.differentiate = differentiate
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)
        tasks = [precision.prepare(task) for task in setting.work.batches()]
        self.first, *_ = all_batches = [
            tree_map(lambda part: part.to(setting.device), task) for task in tasks
        ]
        self.batches = itertools.cycle(all_batches)

    def gradients(self) -> list[Tensor]:
        found = [parameter.grad for parameter in self.parameters]
        return [gradient.cpu().clone() for gradient in found if gradient is not None]

    def steps(self, count: int) -> tuple[list[float], float]:
        with threads(self.setting.threads):
            began = time.perf_counter()
            losses = [self.step().item() for _ in range(count)]
            return losses, time.perf_counter() - began

    def pace(self, seconds: float) -> float:
        cuda = self.setting.device == "cuda"
        with threads(self.setting.threads):
            if cuda:
                return pace(self.step, seconds, torch.cuda.synchronize)
            return pace(lambda: self.step().item(), seconds, lambda: None)

    def step(self) -> Tensor:
        """One whole meta-step; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.differentiate(next(self.batches))
        self.optimizer.step()
        return loss


def conventional(setting: Setting, bits: int = 32) -> Stepper:
    """What learn2learn, higher and code like theirs does: one task after the other.

    For each task: weights of its own that autograd can follow back, per inner step one forward
    pass and one `autograd.grad(create_graph=True)`, new weights, a forward pass over the targets,
    and `backward`. learn2learn's `MAML.clone` and `adapt` do the same operations, and for weights
    of its own they copy every parameter and build a new module of the class around them; here
    `functional_call` puts the weights into the one module, which takes less.
    """
    work = setting.work
    precision = Precision(bits, torch.device(setting.device))
    model = work.plain().to(setting.device, precision.dtype)
    loss_of = F.mse_loss if work.ways is None else F.cross_entropy

    def differentiate(batch: Any) -> Tensor:
        total = torch.zeros((), device=setting.device)
        for context_x, context_y, target_x, target_y in zip(*batch[:4], strict=True):
            weights: dict[str, Tensor] = dict(model.named_parameters())
            for _ in range(work.inner_steps):
                loss = loss_of(functional_call(model, weights, (context_x,)), context_y)
                found = torch.autograd.grad(
                    loss, list(weights.values()), create_graph=not setting.first_order
                )
                weights = {
                    name: weight - work.inner_lr * gradient
                    for (name, weight), gradient in zip(weights.items(), found, strict=True)
                }
            loss = loss_of(functional_call(model, weights, (target_x,)), target_y) / work.tasks
            loss.backward()
            total = total + loss.detach()
        return total

    return InTorch(setting, model, differentiate, precision)


def ours(setting: Setting) -> Stepper:
    """As `metabatch train` runs it: at once or not, compiled or not, by its own measurement."""
    return _ours(setting)


def ours_eager(setting: Setting) -> Stepper:
    """All tasks at once, not compiled."""
    return _ours(setting, "vmap", compiled=False)


def ours_compiled(setting: Setting) -> Stepper:
    """All tasks at once, compiled."""
    return _ours(setting, "vmap", compiled=True)


def ours_loop(setting: Setting) -> Stepper:
    """One task after the other, not compiled."""
    return _ours(setting, "loop", compiled=False)


def ours_bf16(setting: Setting) -> Stepper:
    """As `metabatch train trainer.precision=bf16` runs it."""
    return _ours(setting, bits="bf16")


def _ours(
    setting: Setting,
    inner_loop: InnerLoop = "auto",
    compiled: bool | None = None,
    bits: int | str = 32,
) -> Stepper:
    work = setting.work
    learner = MAML(
        work.network(), work.ways, work.inner_lr, work.inner_steps, setting.first_order,
        inner_loop=inner_loop,
    ).to(setting.device)  # fmt: skip
    precision = Precision(bits, torch.device(setting.device))
    compute: Callable[[Any], Any] = learner

    def differentiate(batch: Any) -> Any:
        with precision.autocast():
            loss = compute(batch)
        loss.backward()
        return loss.detach()

    stepper = InTorch(setting, learner, differentiate, precision)
    with threads(setting.threads), precision.autocast():
        chosen = learner.choose(stepper.first)
        if compiled is None:
            cost = learner.cost_of_compiling(stepper.first)
            compiled = is_worth_compiling(cost, setting.training)
    if compiled:
        compute = learner.compiled(varying=False)
    stepper.about = ", ".join([*chosen.values(), "compiled" if compiled else "not compiled"])
    return stepper


class InJax(Stepper):
    """The questions to a process in which the same steps are JAX's."""

    def __init__(self, setting: Setting) -> None:
        work = setting.work
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        weights = [parameter.detach().numpy() for parameter in work.network().parameters()]
        batches = [tuple(part.numpy() for part in task[:4]) for task in work.batches()]
        how = (work.inner_lr, work.inner_steps, setting.first_order, LR)
        self.process = context.Process(
            target=jax_step.serve,
            args=(theirs, setting.threads, setting.device, weights, batches, *how),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def steps(self, count: int) -> tuple[list[float], float]:
        return self._ask("steps", count)

    def gradients(self) -> list[Tensor]:
        return [torch.tensor(gradient) for gradient in self._ask("gradients", None)]

    def pace(self, seconds: float) -> float:
        return self._ask("pace", seconds)

    def close(self) -> None:
        self.pipe.close()
        self.process.join()

    def _ask(self, question: str, argument: Any) -> Any:
        self.pipe.send((question, argument))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass(frozen=True)
class MetaRival:
    """One way to take meta-steps.

    Attributes:
        label: what tables call it.
        summary: what it is.
        make: from a setting to what takes the steps.
        rounding: how far its gradient may be from the reference's, of the reference's length.
        works: the names of works that it is for; empty for all.
    """

    label: str
    summary: str
    make: Callable[[Setting], Stepper]
    rounding: float = 1e-3
    works: frozenset[str] = field(default_factory=frozenset)

    def does(self, work: MetaWork) -> bool:
        """Whether there is such a way for this work."""
        return not self.works or work.name in self.works


META_RIVALS = {
    "conventional": MetaRival(
        "conventional", "a loop over tasks, autograd.grad(create_graph=True)", conventional
    ),
    "ours": MetaRival("ours", "MAML as metabatch train runs it", ours),
    "ours_compiled": MetaRival("ours, compiled", "all tasks at once, compiled", ours_compiled),
    "ours_eager": MetaRival("ours, eager", "all tasks at once, not compiled", ours_eager),
    "ours_loop": MetaRival("ours, loop", "one task after the other", ours_loop),
    "ours_bf16": MetaRival(
        "ours, bf16", "the same with trainer.precision=bf16", ours_bf16, 0.5,
        frozenset({"omniglot_conv4"}),
    ),
    "jax": MetaRival("JAX", "the whole step jitted, Adam too", InJax),
}  # fmt: skip


def missing_meta(name: str) -> str | None:
    """Why a rival cannot be measured here, and what helps; None where it can."""
    if name != "jax" or importlib.util.find_spec("jax") is not None:
        return None
    return "not installed: pip install jax (the extra 'bench')"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch have so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def begin() -> None:
    """What a training does before it begins, once for all."""
    keep_freed_memory()
