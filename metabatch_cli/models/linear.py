"""Linear layers: products over all points, by the library that is the fastest for them.

On AMD, MKL multiplies 256 bits at a time, where since Zen 5 processors can 512. There oneDNN is
twice as fast in what is worth its calls, which take 10 µs longer each, or more.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabatch_cli.models.normalisation import inside_transform

MANY = 4_000_000  # multiplications for each thread
SIZES = 32  # numbers of points, from one power of two to the next, that kernels are made for
FEW = 8  # inputs


class Linear(nn.Linear):
    """`nn.Linear` whose product is that of `linear`."""

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """`input [..., in_features]` → `[..., out_features]`, after a ReLU if asked for."""
        return linear(input, self.weight, self.bias, relu)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """What `F.linear` says, and `relu` of it if asked for.

    Args:
        x: `[..., inputs]`.
        weight: `[outputs, inputs]`.
        bias: `[outputs]`.
        relu: whether numbers below 0 become 0.

    Returns:
        `[..., outputs]`.
    """
    if _suits_onednn(x, weight.shape[0]):
        if x.dim() == 2:
            return _LinearByOneDNN.apply(x, weight, bias, relu)
        y = _LinearByOneDNN.apply(x.flatten(0, -2), weight, bias, relu)
        return y.unflatten(0, x.shape[:-1])
    if x.dim() == 2 and bias is not None and 1 < x.shape[1] < FEW:
        # By the layout of the weights autograd chooses how it multiplies for their gradient. As
        # they are it would be `[outputs, points] · [points, inputs]`, which MKL is slow in (two
        # inputs, 128 outputs, 400 points: forth and back 78 µs instead of 39 on an AMD EPYC).
        y = torch.addmm(bias, x, weight.t().contiguous())
    else:
        y = F.linear(x, weight, bias)
    if relu:
        return y.relu_() if y.dim() == 2 else y.relu()  # of a view autograd would copy it all
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """`linear` of `x [points, inputs]`, for operations that have gradients of their own: it is not
    to be differentiated."""
    if _suits_onednn(x, weight.shape[0]):
        y = _by_onednn(x, weight, bias)[: x.shape[0]]
    else:
        y = x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return y.relu_() if relu else y


def gradient_of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """That of a `product`, `[outputs, inputs]`, not to be differentiated either.

    Args:
        gradient: of what came, `[points, outputs]`.
        x: `[points, inputs]`.
    """
    if _suits_onednn(x, gradient.shape[1]):
        return _over_points(gradient, x)
    return gradient.t().mm(x)


def _suits_onednn(x: Tensor, outputs: int) -> bool:
    """Whether oneDNN may multiply these by weights, and does it faster than MKL."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.numel() * outputs < MANY * torch.get_num_threads() or not _mkl_is_behind():
        return False
    if not (x.is_cpu and x.dtype == torch.float32 and x.shape[-1] >= FEW and outputs >= FEW):
        return False
    return not (torch.is_autocast_enabled("cpu") or inside_transform())


@cache
def _mkl_is_behind() -> bool:
    """Whether this is an AMD processor that multiplies 512 bits at a time: Zen 5, or later."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", facts, re.MULTILINE)
    return family is not None and int(family[1]) >= 26


class _LinearByOneDNN(torch.autograd.Function):
    """`linear` of `x [points, inputs]` by oneDNN, and so its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y = _by_onednn(x, weight, bias)
        if y.shape[0] > x.shape[0]:
            y.resize_(x.shape[0], y.shape[1])  # a view could not be changed in place
        y = y.relu_() if relu else y  # oneDNN's own would make 0 of what is not a number
        ctx.save_for_backward(x, weight, *([y] if relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *y = ctx.saved_tensors
        if y:
            gradient = torch.ops.aten.threshold_backward.default(gradient, y[0], 0)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        of_bias = gradient.sum(dim=0) if needs_bias else None
        if torch.is_grad_enabled() or inside_transform():  # these have gradients again, or tasks
            return gradient @ weight, gradient.t() @ x, of_bias, None
        of_x = _by_onednn(gradient, weight.t())[: x.shape[0]] if needs_x else None
        of_weight = _over_points(gradient, x) if needs_weight else None
        return of_x, of_weight, of_bias, None


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Their product, and behind it what is made of points of zeros.

    oneDNN keeps a kernel of more than half a megabyte for every number of points. With those of
    zeros there are only some such numbers.
    """
    more = -x.shape[0] % _step(x.shape[0])
    return _multiplied(F.pad(x, (0, 0, 0, more)) if more else x, weight, bias)


def _over_points(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient_of_weight`, for few numbers of points as well; those beyond are added."""
    n_points = x.shape[0]
    if beyond := n_points % _step(n_points):
        together = _over_points(gradient[:-beyond], x[:-beyond])
        return together.addmm_(gradient[-beyond:].t(), x[-beyond:])
    if gradient.shape[1] > x.shape[1]:  # the smaller one is transposed in memory
        return _multiplied(x.t(), gradient.t()).t()
    return _multiplied(gradient.t(), x.t())


def _step(n_points: int) -> int:
    """From one number of points to the next that kernels are made for."""
    return 1 << max(0, n_points.bit_length() - SIZES.bit_length())


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # of others oneDNN has no fast product
    bias = None if bias is None else bias.contiguous()  # it is taken for that
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
