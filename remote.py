"""Scorers elsewhere: a client for `--reward http://...`, and the server that `python -m texforce.rewards` runs.

The protocol is one POST of JSON, {"prompts": [text, ...], "images": [PNG in base64, ...]}, answered by {"scores": [number or
null, ...]}, one an image; null drops the image.
"""

from __future__ import annotations

import base64
import http.server
import io
import json
import math
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from texforce.checkpoints import describe
from texforce.scorers import RewardError, Scorer, score, to_bytes

MAX_RESPONSE_BYTES = 2**24
MAX_REQUEST_BYTES = 2**30


# --- the client ---


class Remote:
    """A scorer behind HTTP.

    What may pass (no connection, a reset, half an answer, the statuses 429 and 5xx) is tried again, after growing pauses.
    Redirects are not followed.
    """

    def __init__(self, url: str, timeout: float, num_retries: int = 4, backoff: float = 0.5) -> None:
        import requests

        self.url, self.timeout, self.num_retries, self.backoff = url, timeout, num_retries, backoff
        self.session = requests.Session()
        if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
            self.session.trust_env = False  # a proxy of the environment does not know this machine

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        answer = self._post({"prompts": list(prompts), "images": [encode_png(image) for image in images]})
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(images):
            seen = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise RewardError(f"reward: {self.url} must answer with {len(images)} scores, but gave {seen}")
        return torch.tensor([math.nan if item is None else self._number(item) for item in scores])

    def _number(self, item: Any) -> float:
        if isinstance(item, int | float) and not isinstance(item, bool):
            try:
                return float(item)
            except OverflowError:
                return math.inf
        raise RewardError(f"reward: {self.url} gave {str(item)[:50]!r} for a score")

    def _post(self, content: dict[str, Any]) -> Any:
        """The answer as JSON.

        Raises:
            RewardError: the server refuses, or fails every time, or its answer is not JSON.
        """
        from requests import RequestException
        from urllib3.exceptions import HTTPError

        for attempt in range(self.num_retries + 1):
            try:
                status, body = self._try(content)
                failure = f"answered with status {status}: {' '.join(body[:300].decode(errors='replace').split())}"
            except (RequestException, HTTPError, OSError) as error:
                status, failure = 0, f"failed: {describe(error)}"
            if status not in (0, 429) and status < 500:
                break
            if attempt < self.num_retries:
                time.sleep(self.backoff * 2**attempt)
        if status != 200:
            raise RewardError(f"reward: {self.url} {failure}")
        if len(body) > MAX_RESPONSE_BYTES:
            raise RewardError(f"reward: the answer of {self.url} is longer than {MAX_RESPONSE_BYTES} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"reward: the answer of {self.url} is not JSON: {describe(error)}") from error

    def _try(self, content: dict[str, Any]) -> tuple[int, bytes]:
        """Status and content of one answer, of which not more is read than may be."""
        options: dict[str, Any] = {"timeout": self.timeout, "stream": True, "allow_redirects": False}
        with self.session.post(self.url, json=content, **options) as response:
            return response.status_code, response.raw.read(MAX_RESPONSE_BYTES + 1, decode_content=True)


def encode_png(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image[None])[0].numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_png(text: str) -> Tensor:
    """The image (3, H, W) in [0, 1] of a PNG in base64.

    Raises:
        ValueError: it is none.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG in base64: {error}") from error
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1) / 255


# --- the server ---


def answer(scorer: Scorer, body: bytes) -> tuple[int, dict[str, Any]]:
    """HTTP status and content for a request to a scorer's server."""
    try:
        content = json.loads(body)
        prompts, images = content["prompts"], [decode_png(text) for text in content["images"]]
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts must be a list of texts")
        if not images or len(prompts) != len(images) or len({image.shape for image in images}) > 1:
            raise ValueError("there must be as many images as prompts, at least one, and all of one size")
        scores = score(scorer, torch.stack(images), prompts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return 400, {"error": f"{type(error).__name__}: {error}"}
    except (RewardError, torch.OutOfMemoryError) as error:
        return 500, {"error": str(error)}
    return 200, {"scores": [value if math.isfinite(value) else None for value in scores.tolist()]}


def make_server(scorer: Scorer, port: int, host: str = "127.0.0.1") -> http.server.ThreadingHTTPServer:
    """A server of a scorer at /score, which scores one request at a time; `serve_forever` runs it."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60  # seconds for a client to send what it announced

        def do_POST(self) -> None:
            size = self.headers.get("Content-Length", "")
            if self.path != "/score":
                self.reply(404, {"error": "the scorer is at /score"})
            elif not size.isdecimal() or int(size) > MAX_REQUEST_BYTES:
                self.reply(413, {"error": f"Content-Length must be given, and be at most {MAX_REQUEST_BYTES}"})
            else:
                body = self.rfile.read(int(size))
                with lock:
                    status, content = answer(scorer, body)
                self.reply(status, content)

        def log_request(self, code: object = "-", size: object = "-") -> None:
            """Say nothing of what went well: the training may share the terminal."""

        def reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return http.server.ThreadingHTTPServer((host, port), Handler)
