"""Signals that end a training once it is saved."""

from __future__ import annotations

import os
import signal

import pytest

from metabatch_cli.engine.stop import Interrupted, StopSignals


@pytest.fixture(autouse=True)
def handlers():
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = {signum: signal.getsignal(signum) for signum in signums}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_kept_while_open_and_heard_by_whoever_waited_for_it_after(signum):
    heard = []
    signal.signal(signum, lambda number, frame: heard.append(number))
    with StopSignals() as stop:
        os.kill(os.getpid(), signum)
        assert stop.received == signum
    assert heard == []
    os.kill(os.getpid(), signum)
    assert heard == [signum]


def test_a_signal_that_nobody_waits_for_is_left_alone():
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not stop.received


def test_when_all_is_saved_a_signal_ends_at_once():
    with StopSignals() as stop:
        stop.at_once = True
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
