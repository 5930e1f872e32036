"""Objects whose pickles run code when they are loaded, and a record of what is run."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXECUTION = (
    "os.system", "subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.remove", "socket.connect",
    "socket.getaddrinfo",
)  # fmt: skip
EVENTS: list[str] = []  # seen by the audit hook, which cannot be removed again
RECORDING = [False]


class Hostile:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_objects(folder: Path) -> list[Hostile]:
    """Objects that make a file `created` in a folder when they are unpickled."""
    return [
        Hostile(open, str(folder / "created"), "w"),
        Hostile(os.system, f"touch {folder / 'created'}"),
        Hostile(eval, f"open({str(folder / 'created')!r}, 'w')"),
        Hostile(subprocess.Popen, ["touch", str(folder / "created")]),
    ]


def _audit(event: str, arguments: tuple) -> None:
    if RECORDING[0]:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        evaluates = event == "exec" and getattr(arguments[0], "co_filename", "") == "<string>"
        if event in EXECUTION or writes or evaluates:
            EVENTS.append(f"{event} {arguments[0]}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Give what is run, asked of the network, written and removed while the context is open."""
    EVENTS.clear()
    RECORDING[0] = True
    try:
        yield EVENTS
    finally:
        RECORDING[0] = False
