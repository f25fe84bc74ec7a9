"""How many workers: enough that training does not wait, none where they do not pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching.auto import choose_workers, measure

MS = 1e-3


@pytest.mark.parametrize(
    ("creation", "step", "cores", "busy", "workers"),
    [
        (0.06, 2.6, 2, 1.0, 0),  # sine beside a neural process: 2 % of the time
        (0.16, 4, 2, 1.0, 1),  # 4 %: a second core can take that over
        (0.16, 4, 1, 1.0, 0),  # there is no second core
        (32, 5, 2, 1.0, 2),  # Python beside a small network: two cores share the work
        (32, 5, 16, 1.0, 7),  # as many as keep up, not as many as there are cores
        (32, 64, 8, 1.0, 1),
        (0.5, 8, 2, 1.95, 1),  # two threads of a small network wait for each other half of the time
        (30, 30, 2, 2.0, 1),  # creating on one core leaves the other idle meanwhile
        (0.5, 1, 2, 3.0, 0),  # a step that keeps all cores busy leaves nothing
        (30, 30, 1, 1.0, 0),
        (5, None, 4, 1.0, 3),
    ],
)
def test_the_number_of_workers_follows_from_what_was_measured(creation, step, cores, busy, workers):
    known = None if step is None else step * MS
    chosen = choose_workers(creation * MS, known, cores, busy)
    assert chosen.workers == workers
    assert f"{creation:g}" in chosen.reason


@given(st.floats(1e-6, 10), st.none() | st.floats(1e-6, 10), st.integers(1, 256), st.floats(1, 64))
def test_there_are_never_more_workers_than_cores(creation, step, cores, busy):
    chosen = choose_workers(creation, step, cores, busy)
    assert 0 <= chosen.workers <= cores
    assert " ms" in chosen.reason


@given(st.floats(1e-6, 1), st.integers(1, 64))
def test_what_is_created_at_no_cost_needs_no_workers(step, cores):
    assert choose_workers(step * 0.02, step, cores).workers == 0


def test_measuring_acts_a_few_times_and_a_slow_action_not_often():
    done = []
    assert measure(lambda: done.append(1)) >= 0
    assert 4 <= len(done) <= 21
