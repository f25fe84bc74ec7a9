"""Loss and meta-gradient as one computation: in the shape that autograd asks for, and compiled."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import platformdirs
import torch
from torch import Tensor

Named = dict[str, Tensor]
Found = tuple[Tensor, Named, Named]
"""A loss, its gradient for each parameter, and new values of buffers, if there are any."""

Compute = Callable[[Named, Named, Named, Named], Found]
"""From parameters, buffers, the context's and the target's points to what is found."""

log = logging.getLogger("metabatch")

NOT_COMPILED = "not compiled, so that steps take longer: %s"

SECONDS_A_NODE = 0.09  # to compile a graph's operation: 0.05 to 0.12 on two cores, without cache
OPTIONS = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}
OVERHEAD_A_NODE = 8e-6  # seconds that each costs in a step, that a compiled one does not
LARGE = 30_000  # numbers that an operation makes; beyond, what it costs to call does not count


class WithGradients(torch.autograd.Function):
    """A loss whose gradient is known already: `backward` only hands it over.

    `WithGradients.apply(loss, gradients, *parameters)` → the loss, a scalar.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradients, scale)


class Differentiated:
    """The same without autograd: as that of a tensor, `backward` puts gradients into `.grad`.

    What autograd does for that takes a third of a small compiled step.

    Args:
        loss: a scalar.
        gradients: its gradient for each parameter.
        parameters: whose `.grad` these are.
    """

    def __init__(
        self, loss: Tensor, gradients: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self.loss = loss
        self.gradients = gradients
        self.parameters = parameters

    def __mul__(self, scale: Tensor | float) -> Differentiated:
        gradients = torch._foreach_mul(list(self.gradients), scale)
        return Differentiated(self.loss * scale, gradients, self.parameters)

    def backward(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if not parameter.requires_grad:  # frozen
                continue
            if gradient.stride() != parameter.stride():
                # fused optimizers go through both in memory's order, without a look at it
                gradient = torch.empty_like(parameter).copy_(gradient)
            before = parameter.grad
            parameter.grad = gradient if before is None else before + gradient

    def detach(self) -> Tensor:
        return self.loss

    def item(self) -> float:
        return self.loss.item()


@contextlib.contextmanager
def without_cache(device_type: str) -> Iterator[None]:
    """The autocast at work, if there is one, without its memory of weights in fewer bits: it does
    not tell the levels of nested derivatives apart."""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
        yield


class Compiled:
    """A computation of loss and gradients, traced to one graph of simple operations and compiled.

    Python is left out of it: what takes hundreds of small operations, each with its dispatch, its
    derivative and its place under `vmap`, becomes a few dozen loops and products. The first call
    with each new shape is compared with the computation as it is; where they differ, or nothing
    can be compiled here, that goes on instead, with a warning.

    Args:
        compute: the computation; what it does depends on its arguments and on `state()` only.
        varying: whether numbers of points change from call to call, so that one graph shall do
            for all of them; else every shape gets a graph of its own.
        state: hashable.
    """

    def __init__(
        self, compute: Compute, varying: bool, state: Callable[[], Any] = lambda: None
    ) -> None:
        self.compute = compute
        self.varying = varying
        self.state = state
        self._graphs: dict[Any, Callable[..., Found] | None] = {}
        self._checked: set[Any] = set()

    def __call__(self, *trees: Named) -> Found:
        """As the computation itself."""
        points = [leaf for tree in trees[2:] for leaf in tree.values()]
        shapes = (self.state(), *map(tuple, trees[2:]), *(leaf.shape for leaf in points))
        # a graph for all sizes takes them to be more than one
        general = self.varying and all(leaf.shape[1] > 1 for leaf in points)
        key = (*shapes[:3], *((s[0], *s[2:]) for s in shapes[3:])) if general else shapes
        if key not in self._graphs:
            self._graphs[key] = self._build(trees, general)
        graph = self._graphs[key]
        if graph is None:
            return self.compute(*trees)
        if shapes in self._checked:
            return graph(*trees)
        self._checked.add(shapes)
        expected = self.compute(*trees)
        try:
            found = graph(*trees)
        except Exception as error:
            self._graphs[key] = None
            log.warning(NOT_COMPILED, reason(error))
            return expected
        if not agree(found, expected):
            log.warning("compiled, the loss or its gradient comes out otherwise: not compiled")
            self._graphs[key] = None
            return expected
        return found

    def _build(self, trees: tuple[Named, ...], general: bool) -> Callable[..., Found] | None:
        try:
            graph, new = traced(self.compute, trees, general)
            run = compiled(graph, leaves_of(trees), general)
        except Exception as error:
            log.warning(NOT_COMPILED, reason(error))
            return None

        def found(*trees: Named) -> Found:
            with torch.no_grad():
                loss, *rest = run(*leaves_of(trees))
            gradients, buffers = rest[: len(trees[0])], rest[len(trees[0]) :]
            return (
                loss,
                dict(zip(trees[0], gradients, strict=True)),
                dict(zip(new, buffers, strict=True)),
            )

        return found


def traced(
    compute: Compute, trees: tuple[Named, ...], general: bool
) -> tuple[torch.fx.GraphModule, list[str]]:
    """The graph of a computation, from the leaves of its arguments to those of what it finds.

    Args:
        general: whether it shall do for other numbers of points.

    Returns:
        The graph, to loss, gradients in the order of the parameters, and new buffers; these by
        name.
    """
    keep_compiled()
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    names: list[str] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        rest = iter(leaves)
        loss, gradients, new = compute(*({name: next(rest) for name in tree} for tree in trees))
        names[:] = new
        # side by side in memory, as optimizers want them
        return [loss, *(gradients[name].contiguous() for name in trees[0]), *new.values()]

    products: Any = {torch.ops.aten.mm.default: _thin, torch.ops.aten.bmm.default: _thin}
    if not general:
        graph = make_fx(flat, products)(*leaves_of(trees))
    else:
        fake = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
        inputs = []
        for number, tree in enumerate(trees):
            for leaf in tree.values():
                sizes = [DimDynamic.STATIC] * leaf.dim()
                if number > 1:
                    sizes[1] = DimDynamic.DYNAMIC
                context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
                inputs.append(fake.from_tensor(leaf, symbolic_context=context))
        with fake:
            graph = make_fx(flat, products, tracing_mode="fake")(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, names


def _thin(one: Tensor, other: Tensor) -> Tensor:
    """A product of matrices `[…, m, k] × […, k, n]` that have one row or column, as a loop.

    The compiler merges it with the loops around it; a call of a library for it, and the memory
    that it is given, take longer than it does.
    """
    (m, k), n = one.shape[-2:], other.shape[-1]
    if k == 1:
        return one * other
    if n == 1:
        return (one * other.mT).sum(dim=-1, keepdim=True)
    if m == 1:
        return (one.mT * other).sum(dim=-2, keepdim=True)
    return NotImplemented


def leaves_of(trees: tuple[Named, ...]) -> list[Tensor]:
    """The tensors of all trees, in order."""
    return [leaf for tree in trees for leaf in tree.values()]


def reason(error: Exception) -> str:
    """The first line of what an exception says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def keep_compiled() -> None:
    """Let what is compiled outlive a restart of the machine, in the user's cache folder.

    Has to come before anything is traced, which else chooses a folder in /tmp.
    """
    folder = platformdirs.user_cache_path("metabatch") / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compiled(
    graph: torch.fx.GraphModule, leaves: list[Tensor], general: bool
) -> Callable[..., Any]:
    """The graph as machine code; kept on disk, so that the next run takes seconds."""
    from torch._inductor import standalone_compile
    from torch.fx.experimental import _config

    # sizes that are equal by chance are not the same size
    with torch.no_grad(), _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        return standalone_compile(
            graph,
            [leaf.detach() for leaf in leaves],
            dynamic_shapes="from_graph" if general else "from_example_inputs",
            options={"config_patches": OPTIONS},
        )


def agree(found: Found, expected: Found) -> bool:
    """Whether two results are the same but for rounding, gradients by length and angle."""

    def close(one: Tensor, other: Tensor) -> bool:
        tolerance = 1e-6 if one.dtype == torch.float64 else 2e-2
        one, other = one.double(), other.double()
        return bool((one - other).norm() <= tolerance * other.norm() + 1e-9)

    gradients, right = (
        torch.cat([gradient.flatten() for gradient in of[1].values()]) for of in (found, expected)
    )
    if not (right.isfinite().all() and expected[0].isfinite()):
        return True  # a loss that is no number is for the training loop to explain
    return close(found[0], expected[0]) and close(gradients, right)
