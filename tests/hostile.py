"""Objects whose pickles run code when they are loaded, a record of what is run, and PNGs that are large inside."""

import contextlib
import os
import struct
import subprocess
import sys
import zlib
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


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def blank_png(*sizes: tuple[int, int], rows: int | None = None) -> bytes:
    """A black PNG of two colours, with a header for each size, and so many rows of the last one."""
    width, height = sizes[-1]
    headers = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)) for size in sizes]
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * (height if rows is None else rows), 9)
    return b"".join((b"\x89PNG\r\n\x1a\n", *headers, png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")))
