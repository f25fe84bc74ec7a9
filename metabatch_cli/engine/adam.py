"""Adam in two operations a step, where torch's takes one more for every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer


class _Weights(NamedTuple):
    """What the kernel wants of a group of weights, the same in every step but for gradients."""

    group: dict[str, Any]
    weights: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    counters: list[Tensor]
    all_counters: Tensor
    """The memory of the counters."""


class _CountedAtOnce(torch.optim.Optimizer):
    """One of torch's fused optimizers, with the weights' counters of steps side by side in memory.

    torch's kernel is one pass over all weights. Around it torch gathers lists anew in every step,
    and adds 1 to the counters one after the other, which together take longer than the pass
    where weights are few (1 of 1.6 ms for 330,000 on a CPU); and it tells profilers of the step,
    whether there are any or not (0.3 of 9.4 ms of a step of CANP). The numbers are the same to the
    bit, and so is what is saved. Whatever is out of the ordinary is left to torch.
    """

    kernel: Callable[..., Any]
    decoupled: bool
    """Whether the kernel's weight decay is."""
    _prepared: list[_Weights] | None = None

    def step(self, closure: Any = None) -> Any:
        """One step; see `torch.optim.Adam`."""
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        of_all = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        return self._step_with_hooks(closure) if own or of_all else self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; see `torch.optim.Optimizer.zero_grad`."""
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    @torch.no_grad()
    def _step(self, closure: Any = None) -> Any:
        if closure is not None or self._prepared is None:
            return self._step_as_torch(closure)
        gradients = [[weight.grad for weight in of.weights] for of in self._prepared]
        if any(gradient is None for of in gradients for gradient in of):
            return self._step_as_torch(closure)
        for of, of_weights in zip(self._prepared, gradients, strict=True):
            of.all_counters.add_(1)
            self.kernel(
                of.weights,
                of_weights,
                of.means,
                of.squares,
                [],
                of.counters,
                lr=of.group["lr"],
                beta1=of.group["betas"][0],
                beta2=of.group["betas"][1],
                weight_decay=of.group["weight_decay"],
                eps=of.group["eps"],
                amsgrad=False,
                maximize=of.group["maximize"],
            )
        return None

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._prepared = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also of `load_state_dict`
        self._prepared = None

    def _step_as_torch(self, closure: Any) -> Any:
        step = super().step.__func__  # type: ignore[attr-defined]
        if getattr(step, "hooked", False):  # by torch, if it was used by itself; ours were called
            step = step.__wrapped__
        loss = step(self, closure)
        suits = all(self._suits(group) for group in self.param_groups)
        self._prepared = [self._prepare(group) for group in self.param_groups] if suits else None
        return loss

    def _suits(self, group: dict[str, Any]) -> bool:
        """Whether all weights have moved, in the plain way, and lie in one place."""
        other = group["amsgrad"] or isinstance(group["lr"], Tensor)
        decoupled = group.get("decoupled_weight_decay", self.decoupled) == self.decoupled
        plain = group["fused"] and decoupled and not other
        moved = all("step" in self.state[weight] for weight in group["params"])
        places = {(weight.device, weight.dtype) for weight in group["params"]}
        return bool(plain and moved and len(places) == 1)

    def _prepare(self, group: dict[str, Any]) -> _Weights:
        weights = group["params"]
        states = [self.state[weight] for weight in weights]
        all_counters = torch.stack([state["step"] for state in states])
        counters = list(all_counters.unbind())
        for state, counter in zip(states, counters, strict=True):
            state["step"] = counter
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        return _Weights(group, weights, means, squares, counters, all_counters)


class Adam(_CountedAtOnce, torch.optim.Adam):
    """Kingma & Ba 2015 (arXiv:1412.6980)."""

    decoupled = False
    kernel = staticmethod(torch._fused_adam_)


class AdamW(_CountedAtOnce, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    decoupled = True
    kernel = staticmethod(torch._fused_adamw_)
