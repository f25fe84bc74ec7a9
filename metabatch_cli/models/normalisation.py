"""Batch normalisation by the moments of chosen points, and the choice said aloud."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.models.conv2d import Window

Mode = Literal["running", "support", "transductive"]
"""Whose moments normalise a task.

`running`: those of the points at hand while training, when running averages of them are kept too;
in evaluation these averages. `support`: those of the context alone, for context and target, so
that a target is judged by itself. `transductive`: those of all points at hand.
"""

MODES: tuple[str, ...] = get_args(Mode)

_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)


def inside_transform() -> bool:
    """Whether `vmap`, `grad` or another transform of torch.func is at work."""
    return _transforms() is not None


class Choice(NamedTuple):
    """Whose moments count in the calls of a layer that are made meanwhile."""

    mode: Mode
    n_context: int | None


class BatchNorm(_BatchNorm):
    """`nn.BatchNorm1d`, `2d` and `3d` in one, for `[points, channels, …]`, until a mode is chosen.

    Parameters, buffers and arguments have the names that torch gave them, so that weights of
    either load into the other. `normalised` chooses the mode around a call of the network. Only
    `running` (and no choice at all) ever writes into a buffer, and only while training.

    With the moments of the points at hand it may be called under `torch.func` transforms, and its
    derivatives of any order are right there, which those of torch's own layer are not: under
    `vmap` the second ones are wrong, without a word, if it has weights (torch 2.13).
    """

    choice: Choice | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x [points, channels, …]` → the same shape."""
        choice = self.choice or Choice("running", None)
        if choice.mode == "running" and self.track_running_stats:
            return super().forward(x)
        n_context = choice.n_context if choice.mode == "support" else None
        if n_context in (None, len(x)) and not inside_transform():
            return _OfAllPoints.apply(x, self.weight, self.bias, self.eps)
        return by_moments(x, self.weight, self.bias, self.eps, n_context)

    def after(self, convolution: nn.Conv2d, x: Tensor) -> Tensor:
        """`self(convolution(x))`, by the convolution alone where its moments are known before it.

        They are where running averages count, and where a patch of the input has fewer numbers
        than it gives outputs: with mean m and covariance S of the patches, those of the outputs
        are `w m` and the diagonal of `w S wᵀ`. Scale and shift go into the weights then, and no
        pass is made over the outputs. Of a training step of Conv-4 on grey images the passes over
        those of its first layer are a quarter.

        Args:
            x: `[points, channels, height, width]`.
        """
        choice = self.choice or Choice("running", None)
        by_average = choice.mode == "running" and self.track_running_stats and not self.training
        if not by_average and not _has_small_patches(convolution):
            return self(convolution(x))
        weight = convolution.weight
        with torch.autocast(x.device.type, enabled=False):
            if by_average:
                mean, variance = self.running_mean, self.running_var
            else:
                n_context = choice.n_context if choice.mode == "support" else None
                mean, variance, count = _moments_of_outputs(convolution, x[:n_context])
                if choice.mode == "running" and self.track_running_stats:
                    self._track(mean, variance * count / max(count - 1, 1))
            assert mean is not None
            assert variance is not None
            scale = torch.rsqrt(variance + self.eps)
            scale = scale if self.weight is None else self.weight * scale
            shift = (0 if convolution.bias is None else convolution.bias) - mean
            shift = shift * scale + (0 if self.bias is None else self.bias)
            scaled = (weight * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)
        return convolution._conv_forward(x, scaled, shift.to(weight.dtype))

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Let the running averages follow, as torch's layer does."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"an input of {input.dim()} dimensions is not [points, channels, …]")


def by_moments(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    n_context: int | None = None,
) -> Tensor:
    """Normalise each channel by mean and variance of it in the first points.

    Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1, in simple operations: they have
    derivatives of any order, through the moments too.

    Args:
        x: `[points, channels, …]`.
        weight, bias: `[channels]`, the scale and shift behind; None for 1 and 0.
        eps: added to the variance.
        n_context: how many points the moments are of; None for all.

    Returns:
        As `x`; computed in 32 bits at least.
    """
    rows = _rows(x)
    values = rows.flatten(0, -2)
    counted = len(values) if n_context is None else n_context * rows[0, ..., 0].numel()
    centred = values - values[:counted].mean(dim=0)
    scale = torch.rsqrt(centred[:counted].square().mean(dim=0) + eps)
    scale = scale if weight is None else weight * scale
    shifted = centred * scale if bias is None else torch.addcmul(bias, centred, scale)
    return shifted.view(rows.shape).movedim(-1, 1).to(x.dtype)


def _has_small_patches(convolution: nn.Conv2d) -> bool:
    """Whether an output's patch of the input has fewer numbers than there are output channels."""
    plain = (
        convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )
    return plain and convolution.weight[0].numel() < convolution.out_channels


def _moments_of_outputs(convolution: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance `[out]` of a convolution's outputs, and how many they are of.

    Args:
        x: `[points, channels, height, width]`.
    """
    weight = convolution.weight
    above, beside = (int(padding) for padding in convolution.padding)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = F.pad(x, (beside, beside, above, above))
    window = Window(tuple(weight.shape[2:]), tuple(convolution.stride), tuple(x.shape[2:]))
    shifted = [x[:, :, down, across] for _, _, down, across in window.ranges()]
    patches = torch.stack(shifted).movedim(2, 1).flatten(0, 1).flatten(1)  # [numbers, places]
    flat = weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)
    mean = patches.mean(dim=1, keepdim=True)
    centred = patches - mean
    covariance = centred @ centred.mT / centred.shape[1]
    of_outputs = (flat @ mean)[:, 0] + (0 if convolution.bias is None else convolution.bias)
    return of_outputs, ((flat @ covariance) * flat).sum(dim=1), centred.shape[1]


def _rows(x: Tensor) -> Tensor:
    """`[points, channels, …]` as `[points, …, channels]`, in 32 bits at least.

    Convolutions leave channels last where that is fast: then this is only a view.
    """
    return x.movedim(1, -1).to(torch.promote_types(x.dtype, torch.float32))


class _OfAllPoints(torch.autograd.Function):
    """`by_moments` of all points, through torch's kernels for values and first derivatives.

    Their second derivatives are right, but 30×64×28×28 numbers with channels last take 165 ms for
    them on a CPU, and 50 ms as they are written here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        y, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        if not torch.is_grad_enabled():  # nobody asks for a derivative of this
            kernel = torch.ops.aten.native_batch_norm_backward
            saved = (None, None, mean, scale, True, ctx.eps)
            return *kernel(gradient, x, weight, *saved, ctx.needs_input_grad[:3]), None
        rows = _rows(x)
        values, given = rows.flatten(0, -2), _rows(gradient).flatten(0, -2)
        centred = values - values.mean(dim=0)
        scale = torch.rsqrt(centred.square().mean(dim=0) + ctx.eps)
        standard = centred * scale
        of_bias, of_weight = given.mean(dim=0), (given * standard).mean(dim=0)
        of_values = given - torch.addcmul(of_bias, standard, of_weight)
        of_values = of_values * (scale if weight is None else weight * scale)
        of_x = of_values.view(rows.shape).movedim(-1, 1).to(x.dtype)
        if weight is None:
            return of_x, None, None, None
        return of_x, len(values) * of_weight, len(values) * of_bias, None


@contextmanager
def normalised(model: nn.Module, mode: Mode, n_context: int | None = None) -> Iterator[None]:
    """Meanwhile, the network's normalisation layers take the moments of a mode.

    It is about what is called, not about tensors: it works around `functional_call`, inside of
    functions that `vmap` and `grad` transform, and is traced as what it chose.

    Args:
        mode: see `Mode`.
        n_context: of the points that the network is then called with, how many are the context,
            which comes first; None if all are. Only `support` asks.

    Raises:
        ValueError: a layer that knows no such mode; no context for `support` to measure.
    """
    check_mode(model, mode)
    if mode == "support" and n_context == 0:
        raise ValueError("n_context=0: normalisation=support needs a context point to measure")
    layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
    before = [layer.choice for layer in layers]
    for layer in layers:
        layer.choice = Choice(mode, n_context)
    try:
        yield
    finally:
        for layer, choice in zip(layers, before, strict=True):
            layer.choice = choice


def check_mode(model: nn.Module, mode: str) -> None:
    """Refuse a mode that does not exist, or that a layer of the network cannot follow.

    Raises:
        ValueError: about `normalisation`, the argument of learners; names the layer.
    """
    one_of("normalisation", mode, MODES)
    if mode == "running":
        return
    for name, layer in model.named_modules():
        always = mode == "transductive" and not getattr(layer, "track_running_stats", True)
        if isinstance(layer, _BatchNorm) and not isinstance(layer, BatchNorm) and not always:
            raise ValueError(
                f"normalisation={mode!r} cannot be: the network's layer {name or 'itself'!r} is "
                f"torch's {type(layer).__name__}, which takes running statistics only; use "
                "metabatch_cli.models.normalisation.BatchNorm there, which takes its weights, or "
                "normalisation=running"
            )


def what_normalises(model: nn.Module, mode: Mode) -> str | None:
    """Whose moments a mode comes to in evaluation, as results should say it.

    Returns:
        The mode; `transductive` for `running` too if a layer keeps no running statistics; None
        for a network without batch normalisation.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return None
    if mode == "running" and not all(layer.track_running_stats for layer in layers):
        return "transductive"
    return mode


def sees_other_points(model: nn.Module, mode: Mode) -> bool:
    """Whether in evaluation what a network makes of a point depends on others beside it."""
    return what_normalises(model, mode) in ("support", "transductive")
