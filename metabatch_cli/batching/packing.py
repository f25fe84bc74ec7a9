"""Packing: a batch as a few bytes for a pipe, with its tensors in memory that both sides see."""

from __future__ import annotations

import io
import math
import pickle
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and what vector instructions like

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by their width in bytes
_PLAIN_KINDS = "biufc"  # of numpy arrays that are nothing but their bytes


class Outgoing:
    """Memory that a worker fills from its start, one tensor after the other.

    Args:
        buffer: uint8 `[bytes]`, seen by the main process too; None for nothing.
    """

    def __init__(self, buffer: np.ndarray | None = None) -> None:
        self.buffer = buffer
        self.size = 0 if buffer is None else len(buffer)
        self.address = 0 if buffer is None else buffer.ctypes.data
        self.used = 0
        self.lent = False  # whether a task set fills some of it itself

    def take(self, count: int) -> int | None:
        """Where the next `count` bytes go; None where they no longer fit."""
        start = self.used
        if start + count > self.size or count == 0:
            return None
        self.used = -(-(start + count) // ALIGNMENT) * ALIGNMENT
        return start

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in here already."""
        return self.address <= tensor.data_ptr() < self.address + self.used


class Incoming(Protocol):
    """Memory in which a batch has arrived: gives tensors and arrays without copying."""

    def tensor(self, start: int, shape: Sequence[int], dtype: str) -> Tensor:
        """The tensor of a numpy type that begins at a byte."""

    def array(self, start: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        """The same as an array."""


class HostMemory:
    """Ordinary memory, also memory shared with a worker.

    Every tensor has a version counter of its own: writing into one does not disturb what
    autograd saved of another.

    Args:
        buffer: uint8 `[bytes]`; lives as long as any tensor in it.
    """

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer

    def tensor(self, start: int, shape: Sequence[int], dtype: str) -> Tensor:
        return torch.from_numpy(np.ndarray(shape, dtype, self.buffer, start))

    def array(self, start: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.ndarray(shape, dtype, self.buffer, start)


class EachAlone(HostMemory):
    """Memory to leave at once: every tensor is copied into memory of its own.

    Whoever keeps the labels of all batches then keeps their labels in memory, not their images.
    """

    def tensor(self, start: int, shape: Sequence[int], dtype: str) -> Tensor:
        return torch.from_numpy(self.array(start, shape, dtype))

    def array(self, start: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        return super().array(start, shape, dtype).copy()


class TorchMemory:
    """A torch buffer, page-locked or on a device.

    Args:
        buffer: uint8 `[bytes]`.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def tensor(self, start: int, shape: Sequence[int], dtype: str) -> Tensor:
        kind = _torch_type(dtype)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        empty = torch.empty(0, dtype=kind, device=self.buffer.device)
        storage = self.buffer.untyped_storage()
        return empty.set_(storage, start // kind.itemsize, tuple(shape), tuple(strides))

    def array(self, start: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        kind = np.dtype(dtype)  # not by way of a tensor: torch lacks some of these
        stop = start + math.prod(shape) * kind.itemsize
        return self.buffer[start:stop].cpu().numpy().view(kind).reshape(shape)


# Where the batch that this thread is making will be sent from, and where the one that it is
# unpacking has arrived. Pickle calls the two functions below without saying in whose name.
_here = threading.local()


def sending() -> bool:
    """Whether what is created here is sent to another process: whether `empty` saves a copy."""
    return getattr(_here, "outgoing", None) is not None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory for a tensor of the batch being made, where it will be sent from.

    A task set that fills it (`out=`) instead of a tensor of its own saves a worker one copy of
    the batch. It belongs to the batch that is returned: do not keep it for another one. Outside
    a worker it is `torch.empty`.

    Args:
        shape: as in `torch.empty`.
        dtype: the type of its numbers.
    """
    outgoing: Outgoing | None = getattr(_here, "outgoing", None)
    if outgoing is not None:
        count = math.prod(shape) * dtype.itemsize
        start = outgoing.take(count)
        if start is not None:
            assert outgoing.buffer is not None
            outgoing.lent = True
            flat = torch.from_numpy(outgoing.buffer[start : start + count])
            return flat.view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype)


class Packer:
    """Turns batches, any trees of tensors, arrays and whatever can be pickled, into bytes.

    Tensors and arrays are written into `outgoing`; what does not fit travels in the bytes.
    """

    def __init__(self) -> None:
        self.outgoing = Outgoing()
        self.inline = 0  # bytes of tensors that did not fit since `fill`
        self._file = io.BytesIO()
        self._pickler = _Pickler(self._file, self)

    def fill(self, buffer: np.ndarray | None) -> None:
        """Write what follows into this memory, from its start."""
        self.outgoing = _here.outgoing = Outgoing(buffer)
        self.inline = 0

    def pack(self, batch: Any) -> bytes:
        """The bytes that `unpack` makes the batch of again.

        Raises:
            TypeError: something in the batch cannot be sent.
        """
        self._file.seek(0)
        self._file.truncate()
        self._pickler.clear_memo()
        try:
            self._pickler.dump(batch)
        except Exception as error:
            raise TypeError(
                f"a worker cannot send this {type(batch).__name__} to the main process: {error}"
            ) from None
        return self._file.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, packer: Packer) -> None:
        super().__init__(file, protocol=5)
        self.packer = packer

    def reducer_override(self, thing: Any) -> Any:
        kind = type(thing)
        if kind is Tensor:
            return self._reduce_tensor(thing)
        if kind is np.ndarray and thing.dtype.kind in _PLAIN_KINDS:
            return self._reduce(_array, thing)
        return NotImplemented

    def _reduce_tensor(self, tensor: Tensor) -> Any:
        try:
            array = tensor.numpy()
        except (RuntimeError, TypeError):
            return self._reduce_unusual(tensor)
        outgoing = self.packer.outgoing
        if outgoing.lent and outgoing.holds(tensor) and tensor.is_contiguous():
            return _tensor, (tensor.data_ptr() - outgoing.address, array.shape, array.dtype.str)
        return self._reduce(_tensor, array)

    def _reduce_unusual(self, tensor: Tensor) -> Any:
        if tensor.requires_grad:
            raise TypeError("it holds a tensor with a graph: detach it")
        if tensor.device.type != "cpu":
            raise TypeError(
                f"it holds a tensor on {tensor.device}: workers make tasks on the CPU, the loader "
                "moves them"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return NotImplemented  # torch's own way
        if tensor.is_conj() or tensor.is_neg():
            return self._reduce_tensor(tensor.resolve_conj().resolve_neg())
        # numpy has no such numbers: they travel as integers of the same width
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        return _as_type, (flat.view(_INTEGERS[tensor.itemsize]), tensor.dtype, tuple(tensor.shape))

    def _reduce(self, function: Any, array: np.ndarray) -> Any:
        outgoing = self.packer.outgoing
        shape, dtype = array.shape, array.dtype
        start = outgoing.take(array.nbytes)
        if start is None:
            self.packer.inline += array.nbytes
            inline = bytearray(array.tobytes())
            return _inline, (function is _tensor, inline, shape, dtype.str)
        np.ndarray(shape, dtype, outgoing.buffer, start)[...] = array
        return function, (start, shape, dtype.str)


def _tensor(start: int, shape: Sequence[int], dtype: str) -> Tensor:
    return _here.incoming.tensor(start, shape, dtype)


def _array(start: int, shape: Sequence[int], dtype: str) -> np.ndarray:
    return _here.incoming.array(start, shape, dtype)


def _inline(as_tensor: bool, data: bytearray, shape: Sequence[int], dtype: str) -> Any:
    array = np.ndarray(shape, dtype, data)
    return torch.from_numpy(array) if as_tensor else array


def _as_type(integers: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return integers.view(dtype).view(shape)


def unpack(data: bytes, memory: Incoming | None) -> Any:
    """The batch that was packed; its tensors lie in `memory`."""
    outer = getattr(_here, "incoming", None)
    _here.incoming = memory
    try:
        return pickle.loads(data)
    finally:
        _here.incoming = outer


_TORCH_TYPES: dict[str, torch.dtype] = {}


def _torch_type(dtype: str) -> torch.dtype:
    if dtype not in _TORCH_TYPES:
        _TORCH_TYPES[dtype] = torch.from_numpy(np.empty(0, dtype)).dtype
    return _TORCH_TYPES[dtype]
