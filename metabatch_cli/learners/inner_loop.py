"""The inner loop: each task takes gradient steps on its context, whichever learner wants them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import functional_call, grad, grad_and_value, vjp
from torch.nn import functional as F

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.at_once import (
    InnerLoop,
    each_task,
    for_each_task,
    treats_points_apart,
    why_not_at_once,
)
from metabatch_cli.learners.learner import CompileCost, Learner, Metric
from metabatch_cli.learners.meta_gradient import (
    LARGE,
    OVERHEAD_A_NODE,
    SECONDS_A_NODE,
    Compiled,
    Compute,
    Differentiated,
    Found,
    WithGradients,
    traced,
    without_cache,
)
from metabatch_cli.models.conv2d import weights_of_each_task
from metabatch_cli.models.masking import blank, masked_mean, mean_over_tasks, task_scores
from metabatch_cli.models.normalisation import Mode, check_mode, normalised, what_normalises

Weights = dict[str, Tensor]
Points = dict[str, Tensor]  # a context or a target: x, y and, if padded, mask


class GradientBased(Learner):
    """Learners that solve a task by gradient steps on its context.

    What they have in common: tasks adapt all at once (`vmap`) or one after the other; the inner
    loss is the mean squared error where y is float and the cross-entropy where it is a class;
    scores are given after any numbers of steps. The gradient for the learner's parameters is
    computed together with the loss, so that a loop over tasks holds the graph of one task only,
    and so that both can be compiled as one.

    Of tasks of unequal sizes, losses are means over the real points, and a task without context
    does not adapt. Padded tasks adapt at once only if the network treats every point by itself;
    else it sees one after the other, without the padding.

    A learner says what is peculiar to it: `seen`, `first`, `stepped`, `output` and `task_loss`.
    Their argument `meta` is all that tasks share, the learner's parameters and buffers by name.

    Args:
        model: `[points, …] → [points, dim_y]`.
        ways: classes in a task, None for regression; given by the task set.
        inner_steps: gradient steps on the context while training.
        first_order: whether to leave the derivative of the inner gradients out.
        eval_steps: numbers of inner steps to report; the positive one that is listed first is
            monitored, and what `predict` takes.
        inner_loop: `vmap`, all tasks at once, or `loop`, one after the other; `auto` for the
            faster one, of those that are right for the network.
        normalisation: whose moments batch normalisation takes, in training too (see
            models/normalisation.py): `transductive`, those of the points that the network is
            called with, which are the context in the inner loop, then the targets together;
            `support`, those of the context throughout. Running averages are no choice: an inner
            loop must not write into what all tasks share.

    Raises:
        ValueError: a name or a number that cannot be.
    """

    has_spread = False
    when_tested: ClassVar = {"inner_steps": "eval_steps", "first_order": None}

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        eval_steps: Sequence[int] | None = None,
        inner_loop: InnerLoop = "auto",
        normalisation: Mode = "transductive",
    ) -> None:
        super().__init__()
        if normalisation == "running":
            raise ValueError(
                "normalisation='running': an inner loop would write into the running averages "
                "that all tasks share; choose from transductive, support"
            )
        check_mode(model, normalisation)
        self.model = model
        self.ways = ways
        self.classifies = ways is not None
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.inner_loop: InnerLoop = one_of("inner_loop", inner_loop, get_args(InnerLoop))
        self.normalisation: Mode = normalisation
        listed = list(eval_steps if eval_steps is not None else [inner_steps])
        if not listed:
            raise ValueError("eval_steps=[] leaves nothing to report: give at least one number")
        self.monitored_steps = next((steps for steps in listed if steps > 0), listed[0])
        self.eval_steps = sorted(set(listed))
        self._at_once: bool | None = None  # decided by the first task
        self._points_apart: bool | None = None  # decided by the first padded one

    # --- what is peculiar to a learner -------------------------------------------------------

    def seen(self, meta: Weights, context: Points, target: Points) -> tuple[Points, Points]:
        """What the inner loop is shown of a task's points."""
        return context, target

    def first(self, meta: Weights, context: Points) -> Weights:
        """The weights that a task begins with; these adapt."""
        return of_model(meta, adapting(self.model))

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, step: int) -> Weights:
        """The weights after a gradient step, the `step`-th, counted from 0."""
        raise NotImplementedError

    def output(
        self,
        meta: Weights,
        weights: Weights,
        points: Points,
        step: int,
        context: Points | None = None,
    ) -> Tensor:
        """Outputs `[points, dim_y]` for points of one task, after `step` steps.

        Args:
            context: the task's, where the points are not the context itself.
        """
        return self.call(self.model, {**of_model(meta), **weights}, points, context)

    def task_loss(self, meta: Weights, context: Points, target: Points) -> Tensor:
        """What is minimised for one task: its target's loss after the inner loop."""
        context, target = self.seen(meta, context, target)
        weights = self.adapted(meta, self.first(meta, context), context, range(self.inner_steps))
        return self.loss_of(self.output(meta, weights, target, self.inner_steps, context), target)

    # --- the contract ------------------------------------------------------------------------

    @property
    def metric(self) -> Metric:
        steps = self.monitored_steps
        if self.classifies:
            return Metric(f"accuracy@steps={steps}", higher_is_better=True)
        return Metric(f"mse@steps={steps}", higher_is_better=False)

    def forward(self, tasks: Tasks) -> Tensor:
        parameters, buffers = own = self._own()
        if not torch.is_grad_enabled():
            context, target = self.shown(tasks)
            self._decide(context, target)
            with without_cache(target["x"].device.type):
                return self.batch_loss(parameters, buffers, context, target)
        loss = self._differentiated(self.loss_and_gradients, own, tasks)
        return WithGradients.apply(loss.loss, loss.gradients, *loss.parameters)

    @torch.no_grad()
    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """`mse@steps=K`, or `accuracy@steps=K`, for every K of `eval_steps`."""
        context, target = points_of(tasks)
        outputs = self._outputs(context, target, self.eval_steps)
        target_y = blank(tasks.target_y, tasks.target_mask)
        of_points = {}
        for steps, output in zip(self.eval_steps, outputs, strict=True):
            if self.classifies:
                hits = output.argmax(dim=-1) == target_y
                of_points[f"accuracy@steps={steps}"] = hits.to(
                    torch.promote_types(output.dtype, torch.float32)
                )
            else:
                of_points[f"mse@steps={steps}"] = (output - target_y).square().mean(dim=2)
        return task_scores(of_points, tasks.target_mask)

    @torch.no_grad()
    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Distribution:
        """After the monitored number of steps; regression has no spread of its own: σ = 1."""
        steps = self.monitored_steps
        context = as_points(context_mask, x=context_x, y=context_y)
        (output,) = self._outputs(context, as_points(target_mask, x=target_x), [steps])
        if self.classifies:
            return Categorical(logits=output)
        return Independent(Normal(output, torch.ones_like(output)), 1)

    def about(self, metric: str) -> dict[str, str]:
        """The normalisation, where the network has any."""
        mode = what_normalises(self.model, self.normalisation)
        return super().about(metric) | ({"normalisation": mode} if mode else {})

    def choose(self, tasks: Tasks) -> dict[str, Any]:
        """`inner_loop`, where it is `auto`: the faster of both ways, if both are right."""
        context, target = self.shown(tasks)
        self._decide(context, target)
        if self.inner_loop == "auto":
            if self._goes_at_once(context, target):
                at_once, looped = (self._seconds(way, tasks) for way in (True, False))
                self._at_once = at_once < looped
            self.inner_loop = "vmap" if self._at_once else "loop"
        return {"inner_loop": self.inner_loop}

    def cost_of_compiling(self, tasks: Tasks) -> CompileCost | None:
        """By the number of operations; None of a loop over tasks, and where operations are large:
        compiled ones are then no faster than a library's."""
        context, target = self.shown(tasks)
        self._decide(context, target)
        if not self._goes_at_once(context, target):
            return None
        seconds = self._seconds(True, tasks)
        with without_cache(target["x"].device.type):
            trees = *self._own(), context, target
            graph, _ = traced(self.loss_and_gradients, trees, general=False)
        found = [node.meta.get("val") for node in graph.graph.nodes]
        sizes = [value.numel() for value in found if isinstance(value, Tensor)]
        if statistics.mean(sizes) > LARGE:
            return None
        nodes = len(found)
        return CompileCost(SECONDS_A_NODE * nodes, min(OVERHEAD_A_NODE * nodes, 0.8 * seconds))

    def compiled(self, varying: bool) -> Callable[[Tasks], Differentiated]:
        compute = Compiled(self.loss_and_gradients, varying, self.phase)
        return partial(self._differentiated, compute, self._own())

    def phase(self) -> Any:
        """What the loss depends on beside parameters, buffers and points; hashable."""
        return None

    def shown(self, tasks: Tasks) -> tuple[Points, Points]:
        """Contexts and targets as training takes them."""
        return points_of(tasks)

    # --- one task ----------------------------------------------------------------------------

    def adapted(
        self, meta: Weights, weights: Weights, context: Points, steps: Iterable[int]
    ) -> Weights:
        """The weights after gradient steps of these numbers on one task's context."""

        def context_loss(weights: Weights, step: int) -> Tensor:
            return self.loss_of(self.output(meta, weights, context, step), context)

        if context["x"].shape[0] == 0:  # len would make a graph be for one number of points only
            return weights
        for step in steps:
            gradients = grad(context_loss)(weights, step)
            if self.first_order:
                gradients = {name: part.detach() for name, part in gradients.items()}
            weights = self.stepped(meta, weights, gradients, step)
        return weights

    def loss_of(self, output: Tensor, points: Points) -> Tensor:
        """The mean loss over one task's points; 0 if there is none."""
        mask = points.get("mask")
        loss_of = F.cross_entropy if self.classifies else F.mse_loss
        if mask is None:
            return loss_of(output, points["y"])
        losses = loss_of(output, points["y"], reduction="none")
        return masked_mean(losses, mask, dim=0).mean()

    def call(
        self, module: nn.Module, weights: Weights, points: Points, context: Points | None = None
    ) -> Tensor:
        """A module's outputs `[points, …]` for points of one task, padding among them.

        Args:
            context: the task's, where the points are not the context itself; it is shown to the
                module too if its moments normalise.
        """
        mask = points.get("mask")
        if mask is None or (self._at_once and self._points_apart):
            return self._call_real(module, weights, points["x"], context)
        if not mask.any():  # the network has to be shown something
            mask = torch.ones_like(mask)
        real = self._call_real(module, weights, points["x"][mask], context)
        return real.new_zeros(len(mask), *real.shape[1:]).index_put((mask,), real)

    def _call_real(
        self, module: nn.Module, weights: Weights, x: Tensor, context: Points | None
    ) -> Tensor:
        if context is not None and what_normalises(module, self.normalisation) == "support":
            before = context["x"] if "mask" not in context else context["x"][context["mask"]]
            if len(before):
                with normalised(module, "support", len(before)):
                    return functional_call(module, weights, (torch.cat([before, x]),))[
                        len(before) :
                    ]
        with normalised(module, "transductive"):
            return functional_call(module, weights, (x,))

    # --- all tasks of a batch ----------------------------------------------------------------

    def batch_loss(
        self, parameters: Weights, buffers: Weights, context: Points, target: Points
    ) -> Tensor:
        """The mean of `task_loss` over the tasks that have targets."""
        task_loss = partial(self.task_loss, {**parameters, **buffers})
        losses = self._for_each_task(task_loss, context, target)
        return mean_over_tasks(losses, target.get("mask"))

    def loss_and_gradients(
        self, parameters: Weights, buffers: Weights, context: Points, target: Points
    ) -> Found:
        """`batch_loss`, its gradient for every parameter, and new values of buffers, if any."""
        if self._goes_at_once(context, target):
            gradients, loss = grad_and_value(self.batch_loss)(parameters, buffers, context, target)
            return loss, gradients, {}
        tasks = each_task(context, target)
        judged = [task for task in tasks if "mask" not in task[1] or task[1]["mask"].any()]
        total = next(iter(parameters.values())).new_zeros(())
        sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for context, target in judged:  # a graph at a time
            loss_of = lambda own, *task: self.task_loss({**own, **buffers}, *task)  # noqa: E731
            gradients, loss = grad_and_value(loss_of)(parameters, context, target)
            total = total + loss / len(judged)
            torch._foreach_add_(
                list(sums.values()), [gradients[name] for name in sums], alpha=1 / len(judged)
            )
        return total, sums, {}

    def _differentiated(
        self, compute: Compute, own: tuple[Weights, Weights], tasks: Tasks
    ) -> Differentiated:
        context, target = self.shown(tasks)
        self._decide(context, target)
        parameters, buffers = own
        with without_cache(target["x"].device.type), torch.no_grad():
            loss, gradients, new = compute(parameters, buffers, context, target)
        if self.training:
            for name, value in new.items():
                buffers[name].copy_(value)
        return Differentiated(loss, [gradients[n] for n in parameters], [*parameters.values()])

    def _own(self) -> tuple[Weights, Weights]:
        """Parameters and buffers by name."""
        return dict(self.named_parameters()), dict(self.named_buffers())

    def _outputs(self, context: Points, target: Points, checkpoints: Sequence[int]) -> list[Tensor]:
        """The network's outputs `[tasks, n_target, dim_y]` after each number of inner steps."""
        self._decide(context, target)
        meta = self._meta()

        def solve(context: Points, target: Points) -> list[Tensor]:
            context, target = self.seen(meta, context, target)
            weights, done, outputs = self.first(meta, context), 0, []
            for steps in checkpoints:
                weights = self.adapted(meta, weights, context, range(done, steps))
                done = steps
                outputs.append(self.output(meta, weights, target, steps, context))
            return outputs

        with without_cache(target["x"].device.type):
            return self._for_each_task(solve, context, target)

    def _meta(self) -> Weights:
        """Parameters and buffers, without a gradient."""
        parts = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: part.detach() for name, part in parts.items()}

    def _for_each_task(self, solve: Callable[..., Any], context: Points, target: Points) -> Any:
        at_once = self._goes_at_once(context, target)
        with weights_of_each_task(at_once):
            return for_each_task(at_once, solve, context, target)

    # --- at once or not ----------------------------------------------------------------------

    def _goes_at_once(self, context: Points, target: Points) -> bool:
        """Whether these tasks adapt under vmap."""
        padded = "mask" in context or "mask" in target
        return bool(self._at_once and (self._points_apart or not padded))

    @torch.no_grad()
    def _decide(self, context: Points, target: Points) -> None:
        """Whether tasks can adapt at once, and padded ones too: asked of the network once, then
        remembered.

        Has to come before anything is traced, since tracing has no numbers to look at.
        """
        if self._at_once is None:
            self._at_once = self._can_go_at_once(context, target)
        padded = "mask" in context or "mask" in target
        if padded and self._at_once and self._points_apart is None:
            device = target["x"].device.type
            with without_cache(device), normalised(self.model, "transductive"):  # as `call` does it
                self._points_apart = treats_points_apart(self.model, target["x"])

    def _can_go_at_once(self, context: Points, target: Points) -> bool:
        """Whether tasks without padding can adapt at once, and may."""
        meta = self._meta()
        context, _ = self.seen(meta, *each_task(context, target)[0])
        weights = self.first(meta, context)

        def output_of(weights: Weights) -> Tensor:
            with weights_of_each_task():
                return self.output(meta, weights, context, 0)

        def compute() -> Tensor:
            return vjp(output_of, weights)[0]  # inside a transform, as the inner loop is

        output = compute()
        if self.ways is not None and output.shape[-1] != self.ways:
            raise ValueError(
                f"the network has {output.shape[-1]} outputs for ways={self.ways} classes (Conv-4 "
                "is an embedding unless model.head=true)"
            )
        reason = why_not_at_once(compute)
        if self.inner_loop == "vmap" and reason is not None and "wrong" in reason:
            raise ValueError(f"inner_loop='vmap': {reason}; choose from auto, loop")
        return self.inner_loop == "vmap" or (self.inner_loop == "auto" and reason is None)

    def _seconds(self, at_once: bool, tasks: Tasks) -> float:
        """A step's loss and gradients, in one of both ways: a median, after one that warms up."""
        self._at_once, before = at_once, self._at_once
        seconds: list[float] = []
        try:
            while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds) < 1):
                began = time.perf_counter()
                with torch.enable_grad():
                    self(tasks).item()
                seconds.append(time.perf_counter() - began)
        finally:
            self._at_once = before
        return statistics.median(seconds[1:])


def adapting(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that gradient steps move, by name: those that are not frozen."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def of_model(meta: Weights, names: Iterable[str] | None = None) -> Weights:
    """The network's own among all that tasks share, by their names in it."""
    if names is None:
        prefix = "model."
        return {n.removeprefix(prefix): part for n, part in meta.items() if n.startswith(prefix)}
    return {name: meta[f"model.{name}"] for name in names}


def points_of(tasks: Tasks) -> tuple[Points, Points]:
    """Contexts and targets of tasks."""
    return (
        as_points(tasks.context_mask, x=tasks.context_x, y=tasks.context_y),
        as_points(tasks.target_mask, x=tasks.target_x, y=tasks.target_y),
    )


def as_points(mask: Tensor | None, **values: Tensor) -> Points:
    """Contexts or targets, with zeros for padding and their mask where there is one."""
    if mask is None:
        return values
    return {**{name: blank(value, mask) for name, value in values.items()}, "mask": mask}
