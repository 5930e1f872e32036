"""What a long piece of work is at, told to whoever listens, as a progress bar does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[str, int, int], None]  # stage, what is done of it, of how much

_listener: Listener | None = None


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Let a listener know of every stage while the context is open."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def tell(stage: str, done: int = 0, total: int = 0) -> None:
    """Say what is done of a stage; a total of 0 is one that is not known."""
    if _listener is not None:
        _listener(stage, done, total)
