"""`texforce serve`: a scorer behind HTTP, by the protocol of `rewards.Remote`, with limits for its clients."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, RewardError, is_out_of_memory, reading
from .rewards import MAX_REQUEST_IMAGES, MAX_REQUEST_PIXELS
from .scorers import Scorer, score

# So that all requests together stay far below 1 GiB.
MAX_LETTERS = 10_000  # in one prompt
MAX_VALUES = 2**20  # brackets and commas: an empty list takes three bytes here, and 64 in memory
MAX_REQUEST_BYTES = 40 * 2**20  # what so many pixels take that do not compress, and the prompts
MAX_HELD_BYTES = 4 * MAX_REQUEST_BYTES  # in all waiting requests together
MAX_CLIENTS = 64
SECONDS_TO_SEND = 60


# --- the request ---


class TooLarge(ValueError):
    """A request beyond a limit of the server."""


def decode_png(text: str, max_pixels: int = MAX_REQUEST_PIXELS) -> Tensor:
    """The image (3, H, W) in [0, 1] of a PNG in base64, which is decoded only if its header promises at most `max_pixels`.

    Raises:
        InputError: it is none. TooLarge: it has more pixels.
    """
    from PIL import Image

    opened = None
    with reading("not a PNG in base64", InputError), contextlib.suppress(Image.DecompressionBombError):
        opened = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    if opened is None or math.prod(opened.size) > max_pixels:
        raise TooLarge(f"a request may have {MAX_REQUEST_PIXELS} pixels in all; send fewer images at a time")
    with reading("not a PNG in base64", InputError):
        image = opened.convert("RGB")
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1) / 255


def read_request(body: bytes) -> tuple[Tensor, list[str]]:
    """The images (N, 3, H, W) in [0, 1] and the N prompts of a request.

    Limits are checked before what they limit is made: values before the JSON is parsed, pixels before a PNG is decoded.

    Raises:
        TooLarge: a limit is passed. ValueError, KeyError, TypeError, RecursionError: it is no request.
    """
    if sum(body.count(sign) for sign in (b"[", b"{", b",")) > MAX_VALUES:
        raise TooLarge(f"a request may have {MAX_VALUES} brackets and commas in all")
    content = json.loads(body)
    prompts, texts = content["prompts"], content["images"]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a list of texts")
    if not isinstance(texts, list) or not texts or len(prompts) != len(texts):
        raise ValueError("there must be as many images as prompts, and at least one")
    if len(texts) > MAX_REQUEST_IMAGES or max(map(len, prompts)) > MAX_LETTERS:
        raise TooLarge(f"a request may have {MAX_REQUEST_IMAGES} images, and prompts of {MAX_LETTERS} letters each")
    images, num_pixels = [], 0
    for text in texts:
        images.append(decode_png(text, MAX_REQUEST_PIXELS - num_pixels))
        num_pixels += images[-1][0].numel()
    if len({image.shape for image in images}) > 1:
        raise ValueError("all images must be of one size")
    return torch.stack(images), prompts


def answer(scorer: Scorer, body: bytes) -> tuple[int, dict[str, Any]]:
    """HTTP status and content for a request to a scorer's server."""
    try:
        scores = score(scorer, *read_request(body))
    except TooLarge as error:
        return 413, {"error": str(error)}
    except RewardError as error:
        return 500, {"error": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return 500, {"error": f"out of memory: {error}"}
        if not isinstance(error, ValueError | KeyError | TypeError | RecursionError):
            raise
        return 400, {"error": f"{type(error).__name__}: {error}"}
    return 200, {"scores": [value if math.isfinite(value) else None for value in scores.tolist()]}


# --- the server ---


def http_answer(status: int, content: dict[str, Any]) -> bytes:
    """A whole answer, after which the connection ends."""
    data = json.dumps(content, allow_nan=False).encode()
    lines = (
        f"HTTP/1.0 {status} {http.HTTPStatus(status).phrase}", "Content-Type: application/json",
        f"Content-Length: {len(data)}", "Connection: close", "", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + data


class ScoreHandler(http.server.BaseHTTPRequestHandler):
    """One request of one client."""

    server: ScoreServer
    answered = False

    def is_in_time(self) -> bool:
        return self.connection in self.server.deadlines

    def parse_request(self) -> bool:
        """Read the lines before the content; False if they are none, or were cut off as the client's time was over."""
        return self.is_in_time() and super().parse_request() and self.is_in_time()

    def handle(self) -> None:
        super().handle()
        if not self.answered and not self.is_in_time():
            self.reply(408, {"error": f"a request must be sent within {SECONDS_TO_SEND} s"})

    def do_POST(self) -> None:
        """Answer a request for scores, or refuse it before its content is read."""
        size = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self.reply(404, {"error": "the scorer is at /score"})
        elif not re.fullmatch("[0-9]{1,12}", size) or int(size) > MAX_REQUEST_BYTES:
            self.reply(413, {"error": f"Content-Length must be given, and be at most {MAX_REQUEST_BYTES}"})
        else:
            with self.server.room_for(int(size)) as there_is_room:
                if not there_is_room:
                    self.reply(503, {"error": "too many requests at a time; try again"})
                elif len(body := self.rfile.read(int(size))) == int(size):
                    self.server.deadlines.pop(self.connection, None)
                    with self.server.scoring:
                        self.reply(*answer(self.server.scorer, body))

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Print nothing for a request that succeeded: the training may share the terminal."""

    def reply(self, status: int, content: dict[str, Any]) -> None:
        """Send an answer, and read what the client still sends, or else it would see a reset connection only."""
        self.answered = True
        self.connection.settimeout(SECONDS_TO_SEND)
        self.wfile.write(http_answer(status, content))
        if self.is_in_time():
            self.connection.shutdown(socket.SHUT_WR)
        while self.is_in_time() and self.rfile.read1(2**16):
            pass


class ScoreServer(http.server.ThreadingHTTPServer):
    """A server of a scorer at /score, which scores one request at a time, and holds its clients to limits."""

    def __init__(self, address: tuple[str, int], scorer: Scorer) -> None:
        self.scorer, self.scoring, self.lock = scorer, threading.Lock(), threading.Lock()
        self.num_clients = self.num_bytes = 0
        self.deadlines: dict[socket.socket, float] = {}  # of the clients that have not sent everything
        super().__init__(address, ScoreHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a client a thread, if there are not too many."""
        with self.lock:
            is_one_too_many = self.num_clients >= MAX_CLIENTS
            self.num_clients += 1
        if is_one_too_many:
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(http_answer(503, {"error": "too many clients at a time; try again"}))
            self.shutdown_request(request)
        else:
            self.deadlines[request] = time.monotonic() + SECONDS_TO_SEND
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self.lock:
            self.num_clients -= 1
        self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End the reading from clients whose time is over; called twice a second."""
        for connection, deadline in list(self.deadlines.items()):
            if time.monotonic() > deadline and self.deadlines.pop(connection, 0.0):
                with contextlib.suppress(OSError):  # it has just ended
                    connection.shutdown(socket.SHUT_RD)

    @contextlib.contextmanager
    def room_for(self, size: int) -> Iterator[bool]:
        """Count the bytes of a request as long as they are held; False if there would be too many."""
        with self.lock:
            there_is_room = self.num_bytes + size <= MAX_HELD_BYTES
            self.num_bytes += size if there_is_room else 0
        try:
            yield there_is_room
        finally:
            with self.lock:
                self.num_bytes -= size if there_is_room else 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of a bug; a client that is gone is none."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def make_server(scorer: Scorer, port: int, host: str = "127.0.0.1") -> ScoreServer:
    """A server of a scorer; `serve_forever` runs it."""
    return ScoreServer((host, port), scorer)
