"""Signals that end a run: raised at once, but never in the middle of a save; a second one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import NoReturn

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


_received: int | None = None
_raised = False  # whether the received signal was raised, and is not held back
_num_deferring = 0


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and Terminated on SIGTERM, wherever it is; a second one ends the process."""
    global _received, _raised
    _received, _raised = None, False
    heeded = [number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores some
    previous = {number: signal.signal(number, _handle) for number in heeded}
    try:
        with recognised():
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _received, _raised = None, False


@contextlib.contextmanager
def recognised() -> Iterator[None]:
    """Re-raise the signal when a library turned it into an ordinary exception, as interrupted imports and loading do.

    An exception beside a deferred signal has another cause, and passes unchanged.
    """
    try:
        yield
    except Exception:
        if _raised:
            check()
        raise


def _handle(number: int, frame: object) -> None:
    global _received
    if _received is not None:
        # Nothing is half written: files take their place when they are complete.
        os._exit(EXIT_CODES[signal.Signals(number)])
    _received = number
    if not _num_deferring:
        _raise(number)


def _raise(number: int) -> NoReturn:
    global _raised
    _raised = True
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold signals back until the end."""
    global _num_deferring
    before = _received
    _num_deferring += 1
    try:
        yield
    finally:
        _num_deferring -= 1
    if _received is not None and before is None and not _num_deferring:
        _raise(_received)


def check() -> None:
    """Raise a signal again that was swallowed, by a finaliser or by a library that catches everything."""
    if _received is not None and not _num_deferring:
        _raise(_received)
