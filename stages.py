"""Reports what a long piece of work is doing to a listener, such as a progress bar; and durations in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[str, int, int], None]  # takes the stage, the number of items done, and their total

_listener: Listener | None = None


@contextlib.contextmanager
def reporting_to(listener: Listener) -> Iterator[None]:
    """Report every stage to a listener while the context is open."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def report(stage: str, done: int = 0, total: int = 0) -> None:
    """Report that `done` of `total` items of a stage are done; a total of 0 means that it is unknown."""
    if _listener is not None:
        _listener(stage, done, total)


def duration(seconds: float) -> str:
    """Seconds in the unit that one would say: 95 s, 12 min, 3.4 h, 2.1 days."""
    for limit, size, unit, form in ((120, 1, "s", ".0f"), (7200, 60, "min", ".0f"), (172_800, 3600, "h", ".1f")):
        if seconds < limit:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds / 86_400:.1f} days"
