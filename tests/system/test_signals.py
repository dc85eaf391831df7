"""Signals: the first lets a step end, the second does not, and everything is as before afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from finetune.errors import LostProcessError
from finetune.system.signals import ECHO, StopSignal

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def known_handlers() -> Iterator[None]:
    """Whoever runs the tests may ignore signals (a shell does for work in the background)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@BOTH
def test_the_first_signal_only_asks(number: int) -> None:
    done = []
    with StopSignal() as stop:
        with stop.gently():
            assert not stop.asked
            signal.raise_signal(number)
            done.append("the rest of the step")
            assert stop.asked
        assert stop.asked
    assert done


@pytest.mark.sample(1)
@BOTH
def test_the_second_signal_stops_at_once(number: int) -> None:
    reached = []
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt), stop.gently():
        signal.raise_signal(signal.SIGINT)
        reached.append("first")
        time.sleep(2 * ECHO)
        signal.raise_signal(number)
        reached.append("second")
    assert reached == ["first"] and stop.asked


@BOTH
def test_a_signal_that_comes_twice_is_one(number: int) -> None:
    """A batch system sends it to every process of a job, and the parent passes its own on."""
    with StopSignal() as stop, stop.gently():
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.asked


def test_a_failed_process_is_not_disturbed_while_it_ends() -> None:
    """A launcher asks the rest of a job to stop when one of its processes is lost."""
    with StopSignal() as stop:
        with pytest.raises(LostProcessError), stop.gently():
            raise LostProcessError("the run", "another process has ended", "Start again.")
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        time.sleep(2 * ECHO)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_job_in_the_background_can_be_interrupted() -> None:
    """A shell lets it ignore SIGINT, which a user who sends one does not mean."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop, stop.gently():
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_hangup_stays_ignored() -> None:
    """As nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop, stop.gently():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


@BOTH
def test_outside_a_signal_stops_at_once(number: int) -> None:
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not stop.asked


@BOTH
def test_after_the_gentle_part_a_signal_stops_at_once(number: int) -> None:
    with StopSignal() as stop:
        with stop.gently():
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_an_error_ends_the_gentle_part() -> None:
    with StopSignal() as stop:
        with pytest.raises(RuntimeError), stop.gently():
            raise RuntimeError
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_before_come_back() -> None:
    def own(*_: object) -> None: ...

    signal.signal(signal.SIGTERM, own)
    for error in (None, RuntimeError):
        try:
            with StopSignal():
                assert signal.getsignal(signal.SIGTERM) is not own
                if error:
                    raise error
        except RuntimeError:
            pass
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_python_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that embeds Python may have its own: ``signal.signal`` then returns None."""
    real = signal.signal
    stop = StopSignal()
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    stop.__enter__()
    monkeypatch.undo()
    stop.__exit__()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_inside_each_other() -> None:
    with StopSignal() as outer, outer.gently():
        with StopSignal() as inner, inner.gently():
            signal.raise_signal(signal.SIGINT)
        assert inner.asked and not outer.asked
        signal.raise_signal(signal.SIGINT)
        assert outer.asked


def test_off_the_main_thread_it_does_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        try:
            with StopSignal() as stop, stop.gently():
                seen.append(signal.getsignal(signal.SIGINT))
                seen.append(stop.asked)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SCRIPT = """
import sys, time
from finetune.errors import LostProcessError
from finetune.system.signals import ECHO, StopSignal

with StopSignal() as stop:
    try:
        with stop.gently():
            print("ready", flush=True)
            while not stop.asked:
                time.sleep(0.01)
            print("asked", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        print("at once", flush=True)
        sys.exit(75)
"""


@pytest.mark.sample(1)
@BOTH
def test_signals_from_another_process(number: int) -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, number)
            assert process.stdout.readline() == "asked\n"
            time.sleep(2 * ECHO)
            os.kill(process.pid, number)
            assert process.stdout.readline() == "at once\n"
            assert process.wait(20) == 75
        finally:
            process.kill()
