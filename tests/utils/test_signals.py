"""Stop signals of one process; groups and launchers are in test_kill.py."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest

from utils import signals
from utils.signals import RESUMABLE, SIGNALS, StopSignals, end_stopped


@pytest.fixture
def ended(monkeypatch):
    """The exits that would have ended this process: code and message."""
    exits = []
    monkeypatch.setattr(signals, "end_with", lambda *given: exits.append(given))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield exits
    signal.signal(signal.SIGHUP, hangup)


def until(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_at_once_before_training_and_is_noted_then(ended, number):
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        until(lambda: ended)
        assert ended == [(RESUMABLE, f"stopped by {number.name} before training began")]
        stop.requested = ""
        stop.training()
        assert stop.agree(False) == (False, False) and stop.agree(True) == (False, True)
        os.kill(os.getpid(), number)
        until(lambda: stop.requested)
        assert stop.requested == number.name
        assert stop.agree(False) == (True, False) and stop.agree(True) == (True, True)
    assert len(ended) == 1


def test_the_first_signal_is_named_and_others_are_left_alone(ended):
    before = signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with StopSignals() as stop:
            stop.training()
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: stop.requested)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert stop.requested == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_interrupt_ends_but_not_one_that_comes_twice(ended, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        stop.training()
        for after in (0.0, 0.9):
            now[0] = 100.0 + after
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert stop.requested == "SIGINT" and not ended
        now[0] = 101.1
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(500):
            if ended:
                break
            time.sleep(0.01)
        assert [code for code, _ in ended] == [130]


def test_handlers_are_restored_and_nohup_stays(ended):
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in SIGNALS]
        with StopSignals() as stop:
            stop.training()
            now = [signal.getsignal(number) for number in SIGNALS]
            assert [old is new for old, new in zip(before, now, strict=True)] == [
                number == signal.SIGHUP for number in SIGNALS
            ]
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.requested
        assert [signal.getsignal(number) for number in SIGNALS] == before
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        assert wakeup == -1
    finally:
        signal.signal(signal.SIGHUP, hangup)


def test_in_a_group_the_answer_is_that_of_the_call_before(ended, monkeypatch):
    """So that no update waits; another process's wish is among what comes back."""
    waits, others = [], iter([(0, 0), (0, 1), (1, 0), (0, 0)])

    def ask_all(flags):
        found = [flag or bool(other) for flag, other in zip(flags, next(others), strict=True)]
        return lambda: waits.append(1) or found

    monkeypatch.setattr(signals, "world_size", lambda: 2)
    monkeypatch.setattr(signals, "ask_all", ask_all)
    with StopSignals() as stop:
        stop.training()
        answers = [stop.agree(False) for _ in range(3)]
        assert answers == [(False, False), (False, False), (False, True)] and len(waits) == 2
        assert stop.agree(False) == (True, False)


def test_a_child_ignores_the_signals():
    """Schedulers send them to all processes of a job; a worker has to deliver its batch."""
    with StopSignals() as stop:
        stop.training()
        child = os.fork()
        if not child:
            wakeup = signal.set_wakeup_fd(-1)
            ignored = all(signal.getsignal(n) is signal.SIG_IGN for n in SIGNALS)
            os._exit(0 if ignored and wakeup == -1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_lost_peer_after_a_signal_is_resumable(ended, monkeypatch):
    monkeypatch.setattr(signals, "lost_peer", lambda error: isinstance(error, ConnectionError))
    for cause in (ConnectionError("gone"), None):
        stop = StopSignals()
        stop.requested = "SIGTERM"
        error = RuntimeError("in one line")
        error.__cause__ = cause
        stop.__exit__(RuntimeError, error, None)
    assert [code for code, _ in ended] == [RESUMABLE]
    assert ended[0][1].startswith("SIGTERM: another process has ended")
    stop = StopSignals()  # no signal came
    stop.__exit__(ConnectionError, ConnectionError("gone"), None)
    assert len(ended) == 1


@pytest.mark.parametrize(("saved", "lost"), [(17, ""), (9, ", the last 8 of which are not saved")])
def test_the_end_says_where_and_what_is_lost(saved, lost):
    said = []
    logger = SimpleNamespace(info=lambda line, *given: said.append(line % given))
    with pytest.raises(SystemExit) as left:
        end_stopped(logger, 17, saved)
    assert left.value.code == RESUMABLE == 75
    assert said == [f"stopped by a signal after update 17{lost}: start again"]


def test_workers_are_killed_at_the_end():
    """They ignore the SIGTERM by which Python would end them."""
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_ignore_and_sleep, daemon=True)
    other = context.Process(target=time.sleep, args=(0.5,))
    worker.start()
    other.start()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        signals._end_workers()
        worker.join(5)
        assert worker.exitcode == -signal.SIGKILL
        other.join(5)
        assert other.exitcode == 0  # none of the loader's
    finally:
        signal.signal(signal.SIGCHLD, before)


def _ignore_and_sleep() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
