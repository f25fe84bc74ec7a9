"""Freed memory is kept by whatever the C library accepts, and by nothing else."""

from __future__ import annotations

import pytest

from metabatch_cli.engine import memory

TRIM, MMAP, MB = -1, -3, 1 << 20


@pytest.mark.parametrize(
    ("accepted", "set_to"),
    [
        (1 << 62, {MMAP: 1024 * MB, TRIM: 1024 * MB}),
        (32 * MB, {MMAP: 32 * MB, TRIM: 1024 * MB}),
        (0, {}),
    ],
)
def test_the_most_that_is_accepted_is_set_and_not_half_of_it(monkeypatch, accepted, set_to):
    found = {}

    class Glibc:
        def mallopt(self, parameter, value):
            if parameter == MMAP and value > accepted:
                return 0
            found[parameter] = value
            return 1

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Glibc())
    memory.keep_freed_memory()
    assert found == set_to
