"""Counter-based random streams: any (seed, name, coordinate) has its own numbers, at once.

Philox-4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key
and a counter to random words without any state to advance, so that step 10⁶ costs what step 0
costs and no worker needs to know what another one drew. The key is a hash of the seed and of
the stream's name; the coordinates go into the counter's high words, so that neighbouring
streams never overlap.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

# Raised whenever the same seed would no longer give the same tasks: a run that was trained
# under another law must not be resumed under this one.
STREAM_VERSION = 2
DEVICE_STREAM_VERSION = 1002  # of tasks created on a device, by that device's own generator

_TWISTER_WORDS = 312  # 64-bit words in a Mersenne Twister, torch's CPU generator and numpy's
_KEY_WORDS = 2 * _TWISTER_WORDS  # the same in 32-bit words
_TWISTER_OFFSET = 24  # where they begin in the bytes of `torch.Generator.get_state()`
_TWISTER_BYTES = 5056
_AHEAD = 64  # steps that a StepStream makes at once: the states of generators fill 320 KB then


one_at_a_time = threading.RLock()
"""Held while a batch is created: the global generators, and the memory here, are lent to one
thread at a time."""


def _renew_lock() -> None:
    # whoever held it is not in the fork
    one_at_a_time._at_fork_reinit()  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_renew_lock)


class Stream:
    """The random streams of one purpose, one stream for each coordinate pair.

    Args:
        seed: any integer, of any size.
        name: what the numbers are for, such as `("train", "sizes")`; other names, other numbers.
    """

    def __init__(self, seed: int, *name: str) -> None:
        label = repr((int(seed), *name)).encode()
        digest = hashlib.blake2b(label, digest_size=16, person=b"metabatch-v1").digest()
        self._philox = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
        self._state: Any = self._philox.state
        self._counter = self._state["state"]["counter"]

    def words(self, count: int, major: int, minor: int = 0, skip: int = 0) -> np.ndarray:
        """The first `count` random 64-bit words of the stream at (major, minor), as uint64.

        Raw words are the same on every machine and under every version of numpy.

        Args:
            skip: words before the first one, a multiple of four.
        """
        with one_at_a_time:
            self._counter[0] = skip // 4
            self._counter[2] = minor
            self._counter[3] = major
            self._philox.state = self._state
            return self._philox.random_raw(count)

    def fill(self, generator: torch.Generator, major: int, minor: int = 0) -> None:
        """Put a CPU generator at the start of the stream at (major, minor)."""
        words = self.words(_TWISTER_WORDS, major, minor)
        (state,) = _States(1).write(words[None])
        generator.set_state(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._state["state"]["key"].tobytes(),)


def _restore(key: bytes) -> Stream:
    stream = Stream(0)
    stream._state["state"]["key"] = np.frombuffer(key, dtype=np.uint64)
    return stream


_NOTHING: tuple[int, list[Any]] = (-1, [])


class StepStream:
    """A stream for each step and lane, `width` words long, made many steps at a time.

    Whoever reads one step after the other pays for a call of Philox every `_AHEAD` steps;
    whoever asks for a single step anywhere gets that one alone, and the same words.

    Args:
        seed, name: as in `Stream`.
        width: words of a step, a multiple of four.
    """

    def __init__(self, seed: int, *name: str, width: int) -> None:
        self.width = width
        self._stream = Stream(seed, *name)
        self._made: dict[int, tuple[int, list[Any]]] = {}  # lane: (first step, of each step)

    def at(self, step: int, lane: int = 0) -> Any:
        """The `width` random 64-bit words of a step, as a list of integers."""
        first, made = self._made.get(lane, _NOTHING)
        if not 0 <= step - first < len(made):
            count = _AHEAD if step == first + len(made) else 1
            drawn = self._stream.words(count * self.width, 0, lane, skip=step * self.width)
            first, made = self._made[lane] = (
                step,
                self._prepare(drawn.reshape(count, self.width), lane),
            )
        return made[step - first]

    def _prepare(self, words: np.ndarray, lane: int) -> list[Any]:
        return words.tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}


class GeneratorStates(StepStream):
    """States of a CPU `torch.Generator`, one for each step and lane.

    All 19,968 bits of a state come from the stream: seeding by number would use only 32 of them,
    and tasks would repeat themselves after some ten thousands. A state is to be used before the
    next one is asked for: its memory is written again.

    Args:
        seed, name: as in `Stream`.
    """

    def __init__(self, seed: int, *name: str) -> None:
        super().__init__(seed, *name, width=_TWISTER_WORDS)
        self._memory: dict[tuple[int, int], _States] = {}

    def _prepare(self, words: np.ndarray, lane: int) -> list[Any]:
        place = lane, len(words)
        if place not in self._memory:
            self._memory[place] = _States(len(words))
        return self._memory[place].write(words)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memory": {}}


class _States:
    """Memory for states of CPU generators, as what `torch.Generator.set_state` takes."""

    def __init__(self, count: int) -> None:
        state = torch.Generator().get_state().numpy()
        if len(state) != _TWISTER_BYTES:
            raise RuntimeError(
                f"the state of a CPU torch.Generator has {len(state)} bytes, not "
                f"{_TWISTER_BYTES}: torch {torch.__version__} changed its layout"
            )
        states = np.tile(state, (count, 1))
        twisters = states[:, _TWISTER_OFFSET : _TWISTER_OFFSET + 16 * _TWISTER_WORDS]
        self._twisters = twisters.view(np.uint64)  # a 32-bit word in each
        # each from its own array: set_state reads a view with an offset at the wrong place (2.13)
        self._tensors = [torch.from_numpy(row) for row in states]

    def write(self, words: np.ndarray) -> list[torch.Tensor]:
        """Random words, uint64 `[count, 312]`, as the whole state of each generator."""
        self._twisters[:] = words.view(np.uint32)
        return self._tensors


def permutation(words: np.ndarray) -> np.ndarray:
    """The order that sorts random words: a uniform permutation, int64, the same everywhere."""
    return np.argsort(words, kind="stable")


def integer(word: int, low: int, high: int) -> int:
    """A random 64-bit word as an integer of [low, high], both ends included.

    Multiply-and-shift (Lemire 2019): its bias is at most (high − low + 1) / 2⁶⁴.
    """
    return low + (int(word) * (high - low + 1) >> 64)


def distinct(
    words: Sequence[int], groups: Sequence[int], starts: Sequence[int], sizes: Sequence[int]
) -> list[int]:
    """An integer of its group for each word, none of them twice, every choice equally likely.

    The beginning of a shuffle by Fisher and Yates in each group, which costs as much as is
    drawn: the few places that were swapped are remembered instead of the whole group.

    Args:
        words: random 64-bit words.
        groups: the group that each of them draws from, no group more often than it is large.
        starts, sizes: group g are the integers `starts[g] … starts[g] + sizes[g] − 1`.
    """
    drawn: list[int] = []
    swapped: dict[int, int] = {}
    taken: dict[int, int] = {}
    for word, group in zip(words, groups, strict=False):
        before = taken.get(group, 0)
        taken[group] = before + 1
        here = starts[group] + before
        there = here + (word * (sizes[group] - before) >> 64)
        drawn.append(swapped.get(there, there))
        swapped[there] = swapped.get(here, here)
    return drawn


def unit(word: int) -> float:
    """A random 64-bit word as a float of [0, 1): its upper 53 bits."""
    return (int(word) >> 11) * 2.0**-53


def uniforms(indices: torch.Tensor, count: int, *name: str) -> torch.Tensor:
    """`count` numbers of [0, 1) for each index, always the same for the same index and name.

    This is what makes an index the name of a task: the function it stands for depends on
    nothing else. SplitMix64 (Steele et al. 2014) as a hash, over whole batches.

    Args:
        indices: int64, `[tasks]`.

    Returns:
        float64, `[tasks, count]`.
    """
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8, person=b"metabatch-v1").digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    cells: Any = indices.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(count)
    cells = cells + np.arange(count, dtype=np.uint64)
    words = _splitmix64(_splitmix64(cells) ^ key)
    units = torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return units.to(indices.device)


def _splitmix64(words: Any) -> Any:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class _Lent:
    """The generator that `numpy.random` draws from while tasks are made."""

    def __init__(self) -> None:
        self.in_use = False
        self.bits = np.random.MT19937(0)
        state = (ctypes.c_uint32 * (_KEY_WORDS + 1)).from_address(self.bits.ctypes.state_address)
        self._state = np.ctypeslib.as_array(state)
        self.states = _States(1)

    def seed_numpy(self, words: np.ndarray) -> None:
        """Fill the state of the lent generator, in its own memory: `state = …` takes 40 µs."""
        self._state[:_KEY_WORDS] = words.view(np.uint32)
        self._state[_KEY_WORDS] = _KEY_WORDS  # all used up: the next draw twists


@contextmanager
def borrowed_global_generators() -> Iterator[np.random.MT19937]:
    """Lend out `random`, `numpy.random` and torch's CPU generator, and give their states back.

    Yields the bit generator that `numpy.random` draws from meanwhile: swapping it is faster than
    restoring its state, and keeps a generator of the caller's own.
    """
    python_state = random.getstate()
    numpy_random: Any = np.random
    numpy_bits = numpy_random.get_bit_generator()
    numpy_state = np.random.get_state(legacy=False)
    torch_state = torch.default_generator.get_state()
    outer = _thread.lent
    lent = _thread.lent = _Lent() if outer.in_use else outer
    lent.in_use = True
    numpy_random.set_bit_generator(lent.bits)
    try:
        yield lent.bits
    finally:
        lent.in_use = False
        _thread.lent = outer
        random.setstate(python_state)
        numpy_random.set_bit_generator(numpy_bits)
        if numpy_state["has_gauss"]:
            np.random.set_state(numpy_state)  # swapping forgets a normal number kept for later
        torch.default_generator.set_state(torch_state)


def seed_global_generators(stream: Stream, major: int, minor: int) -> None:
    """Seed `random`, `numpy.random` and torch's CPU generator from one stream.

    Only while they are borrowed: it is numpy's lent generator that is seeded.

    Raises:
        RuntimeError: they are not borrowed.
    """
    if not _thread.lent.in_use:
        raise RuntimeError("seed_global_generators outside of borrowed_global_generators")
    words = stream.words(4 + 2 * _TWISTER_WORDS, major, minor)
    random.seed(int.from_bytes(words[:2].tobytes(), "little"))
    lent, numpy_random = _thread.lent, cast(Any, np.random)
    numpy_random.set_bit_generator(lent.bits)  # forgets a normal number kept for later
    lent.seed_numpy(words[4 : 4 + _TWISTER_WORDS])
    (state,) = lent.states.write(words[None, 4 + _TWISTER_WORDS :])
    torch.default_generator.set_state(state)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.lent = _Lent()


_thread = _Thread()
