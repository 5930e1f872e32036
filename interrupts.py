"""Signals that end a run: obeyed at once, but never in the middle of a save; a second one ends the process."""

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
_raised = False  # and not only kept for the end of what defers it
_num_deferring = 0


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within it, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, where the program is; a second signal exits."""
    global _received, _raised
    _received, _raised = None, False
    heeded = [number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stay ignored
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
    """Within it, an error that a signal was turned into is the signal again: imports and loading broken off do that.

    An error beside a signal that was deferred is not of its making, and stays.
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
        os._exit(EXIT_CODES[signal.Signals(number)])  # whatever is being written takes its place at its end only
    _received = number
    if not _num_deferring:
        _raise(number)


def _raise(number: int) -> NoReturn:
    global _raised
    _raised = True
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it, a signal waits for the end."""
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
    """Raise what a signal has raised where it was swallowed: in a finaliser, or in a library that catches everything."""
    if _received is not None and not _num_deferring:
        _raise(_received)
