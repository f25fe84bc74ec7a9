"""The meta-step as JAX users write it, jitted as a whole, in a process that answers questions.

It is a process of its own because XLA reads how many threads it may have when it is loaded. JAX
is imported there and nowhere else; torch is not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from metabatch_cli.bench.pace import pace

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def serve(
    pipe: Connection,
    threads: int,
    device: str,
    parameters: Sequence[np.ndarray],
    batches: Sequence[Batch],
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
    lr: float,
) -> None:
    """Answer until there is nobody left who asks.

    Questions are names with an argument: the methods of `Steps`. The answer to one that failed is
    its exception.
    """
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    os.environ["NPROC"] = str(threads)
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu"}.get(device, "cuda")
    steps = None
    while True:
        try:
            question, argument = pipe.recv()
        except EOFError:
            return
        try:
            if steps is None:
                steps = Steps(parameters, batches, inner_lr, inner_steps, first_order, lr)
            pipe.send(getattr(steps, question)(argument))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


class Steps:
    """Meta-steps of MAML with Adam, in JAX."""

    def __init__(
        self,
        parameters: Sequence[np.ndarray],
        batches: Sequence[Batch],
        inner_lr: float,
        inner_steps: int,
        first_order: bool,
        lr: float,
    ) -> None:
        import jax
        from jax import numpy as jnp

        images = batches[0][0].ndim == 5
        meta = meta_loss(conv4 if images else mlp, images, inner_lr, inner_steps, first_order)
        self.differentiate = jax.value_and_grad(meta)

        def step(state: Any, batch: Any) -> Any:
            parameters, mean, square, count = state
            loss, gradients = self.differentiate(parameters, batch)
            count = count + 1
            mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradients)
            square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, gradients)
            rate, scale = lr / (1 - 0.9**count), 1 / (1 - 0.999**count)
            parameters = jax.tree.map(
                lambda p, m, v: p - rate * m / (jnp.sqrt(v * scale) + 1e-8),
                parameters,
                mean,
                square,
            )
            return (parameters, mean, square, count), loss

        self.step = jax.jit(step)
        self.parameters = [jnp.asarray(part) for part in parameters]
        zeros = [jnp.zeros_like(part) for part in self.parameters]
        self.state = (self.parameters, zeros, zeros, jnp.zeros(()))
        self.batches = [tuple(jnp.asarray(part) for part in batch) for batch in batches]
        self.taken = 0

    def gradients(self, _: None) -> list[np.ndarray]:
        """Those of the first step."""
        _, found = self.differentiate(self.parameters, self.batches[0])
        return [np.asarray(gradient) for gradient in found]

    def steps(self, count: int) -> tuple[list[float], float]:
        """The losses of the next steps, and the seconds that they took."""
        began = time.perf_counter()
        losses = [float(self._next()) for _ in range(count)]
        return losses, time.perf_counter() - began

    def pace(self, seconds: float) -> float:
        """Steps a second; on a CPU each one's loss is looked at."""
        import jax

        if jax.default_backend() != "cpu":  # ours is not looked at there either
            return pace(self._next, seconds, lambda: jax.block_until_ready(self.state))
        return pace(lambda: float(self._next()), seconds, lambda: None)

    def _next(self) -> Any:
        batch = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        self.state, loss = self.step(self.state, batch)
        return loss


def meta_loss(
    network: Callable[[Any, Any], Any],
    classifies: bool,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
) -> Callable[[Any, Any], Any]:
    """MAML's loss of a batch of tasks (Finn et al. 2017, algorithms 1 and 2)."""
    import jax
    from jax import numpy as jnp

    def loss_of(weights: Any, x: Any, y: Any) -> Any:
        outputs = network(weights, x)
        if not classifies:
            return jnp.mean((outputs - y) ** 2)
        logs = jax.nn.log_softmax(outputs)
        return -jnp.mean(jnp.take_along_axis(logs, y[:, None], axis=1))

    def task_loss(weights: Any, context_x: Any, context_y: Any, x: Any, y: Any) -> Any:
        for _ in range(inner_steps):
            gradients = jax.grad(loss_of)(weights, context_x, context_y)
            if first_order:
                gradients = jax.lax.stop_gradient(gradients)
            weights = jax.tree.map(lambda w, g: w - inner_lr * g, weights, gradients)
        return loss_of(weights, x, y)

    def batch_loss(weights: Any, batch: Any) -> Any:
        return jnp.mean(jax.vmap(lambda *task: task_loss(weights, *task))(*batch))

    return batch_loss


def mlp(weights: list[Any], x: Any) -> Any:
    """Linear layers, ReLU between them; weights as torch has them, in order."""
    import jax

    for number in range(0, len(weights), 2):
        x = jax.nn.relu(x) if number else x
        x = x @ weights[number].T + weights[number + 1]
    return x


def conv4(weights: list[Any], x: Any) -> Any:
    """Convolutions of stride 2, batch normalisation, ReLU; means over places; a linear layer."""
    import jax
    from jax import numpy as jnp

    *blocks, head, bias = weights
    x = jnp.moveaxis(x, 1, -1)
    for number in range(0, len(blocks), 3):
        kernel, scale, shift = blocks[number : number + 3]
        layout = ("NHWC", "OIHW", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout
        )
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) * (jax.lax.rsqrt(variance + 1e-5) * scale) + shift
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ head.T + bias
