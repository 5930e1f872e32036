"""Signals: obeyed at once, but not in the middle of a save, and never lost."""

import contextlib
import os
import signal
from typing import NoReturn

import pytest

from texforce import interrupts


@pytest.fixture(autouse=True)
def default_handlers():
    """Python's own handlers: pytest-xdist's workers ignore SIGINT, and a test must not depend on that."""
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupts.Terminated)])
def test_a_signal_is_obeyed_at_once(number, kind):
    late = []

    def work():
        send(number)
        late.append("it went on")

    with pytest.raises(KeyboardInterrupt) as raised, interrupts.handled():
        work()
    assert raised.type is kind
    assert not late


def test_the_previous_handlers_come_back():
    before = [signal.getsignal(number) for number in interrupts.EXIT_CODES]
    with interrupts.handled():
        assert [signal.getsignal(number) for number in interrupts.EXIT_CODES] != before
    with contextlib.suppress(KeyboardInterrupt), interrupts.handled():
        send(signal.SIGINT)
    assert [signal.getsignal(number) for number in interrupts.EXIT_CODES] == before


def test_an_ignored_signal_stays_ignored():
    """As nohup ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.handled():
        send(signal.SIGINT)
        interrupts.check()


def test_a_signal_waits_for_a_save():
    done = []

    def save():
        send(signal.SIGTERM)
        interrupts.check()
        done.append("saved")

    with interrupts.handled(), pytest.raises(interrupts.Terminated), interrupts.deferred():
        save()
    assert done == ["saved"]


def test_a_signal_waits_for_the_outermost_of_nested_saves():
    done = []

    def save():
        with interrupts.deferred():
            send(signal.SIGTERM)
        done.append("saved")

    with interrupts.handled(), pytest.raises(interrupts.Terminated), interrupts.deferred():
        save()
    assert done == ["saved"]


def test_a_save_after_a_signal_ends_without_raising_it_again():
    with contextlib.suppress(KeyboardInterrupt), interrupts.handled():
        try:
            send(signal.SIGTERM)
        finally:
            with interrupts.deferred():
                pass
            saved = True
    assert saved


def test_a_signal_that_was_swallowed_is_raised_by_the_next_check():
    """As a finaliser swallows it, or a library that catches everything."""
    with interrupts.handled():
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGTERM)
        with pytest.raises(interrupts.Terminated):
            interrupts.check()
    interrupts.check()


def break_off(number: int) -> NoReturn:
    """As diffusers does, which takes a signal in the loading of weights for a damaged file."""
    try:
        send(number)
    except BaseException as error:
        raise OSError("the weights are damaged") from error
    raise OSError("no room")


def test_an_error_that_a_signal_was_turned_into_is_the_signal():
    with pytest.raises(interrupts.Terminated), interrupts.handled():
        break_off(signal.SIGTERM)


def test_an_error_beside_a_signal_that_was_deferred_stays():
    with pytest.raises(OSError, match="no room"), interrupts.handled(), interrupts.deferred():
        break_off(signal.SIGTERM)


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(second, code):
    child = os.fork()
    if not child:
        try:
            with interrupts.handled(), interrupts.deferred():
                send(signal.SIGINT)
                send(second)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
