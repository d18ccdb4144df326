"""When a training stops or saves: signals, a dead launcher, the clock."""

import os
import signal

import pytest

from ballad_hf.training import signals as signals_module
from ballad_hf.training.signals import CheckpointTimer, StopSignals, TrainingInterrupted


def test_the_timer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    timer = CheckpointTimer(every_steps=4, every_minutes=2)
    assert [step for step in range(1, 10) if timer.due_by_steps(step)] == [4, 8]
    now[0] = 219.0
    assert not timer.due_by_clock()
    now[0] = 220.0
    assert timer.due_by_clock()
    timer.restart()
    assert not timer.due_by_clock()
    assert not CheckpointTimer().due_by_steps(1)


def test_signals_are_noted_and_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_program_ends_with_the_signals_status():
    interrupted = TrainingInterrupted(signal.SIGTERM, "Stopped after step 3.")
    assert interrupted.code == 143
    assert str(interrupted) == "Stopped after step 3."


def test_a_launcher_that_died_counts_as_sigterm(monkeypatch):
    parent = os.getppid()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launched = StopSignals()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = StopSignals()
    assert launched.received is alone.received is None
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert launched.received == signal.SIGTERM
    assert alone.received is None  # started from a shell, which may be closed while training goes on
