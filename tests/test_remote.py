"""Scorers over HTTP: the client against servers that fail in every way, and the server against such clients."""

import base64
import http.client
import http.server
import io
import itertools
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from texforce import rewards, scorers
from texforce.errors import RewardError

PROMPTS = ["a red circle", "zwei Würfel ☃", "a red circle"]


def random_images(num_images: int, height: int = 8, width: int = 12) -> Tensor:
    """Of whole levels of 255, so that PNG keeps them."""
    return torch.randint(256, (num_images, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255


@contextmanager
def running(server: http.server.HTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(respond: Callable) -> Iterator[str]:
    """A server that lets `respond(handler, request)` do what it likes; handler.number counts the requests from 0."""
    numbers = iter(range(1000))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.number = next(numbers)
            respond(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def ask(url: str, timeout: float = 10.0, backoff: float = 0.01) -> Tensor:
    return rewards.Remote(url, timeout, backoff=backoff)(random_images(3), PROMPTS)


def scores_of(*scores: object) -> bytes:
    return json.dumps({"scores": list(scores)}).encode()


# --- the client ---


def test_a_request_holds_the_prompts_and_the_images_as_png():
    seen = []

    def respond(handler, request):
        seen.append(request)
        handler.send(200, scores_of(1, 2.5, -3))

    with answering(respond) as url:
        assert ask(url).tolist() == [1, 2.5, -3]
    assert seen[0].keys() == {"prompts", "images"}
    assert seen[0]["prompts"] == PROMPTS
    for image, text in zip(random_images(3), seen[0]["images"], strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert (picture.format, picture.size) == ("PNG", (12, 8))
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), (255 * image).round().byte())


def test_null_and_what_is_not_finite_drop_the_image():
    with answering(lambda handler, _: handler.send(200, b'{"scores": [null, NaN, 1e999]}')) as url:
        assert not ask(url).isfinite().any()
    with answering(lambda handler, _: handler.send(200, b'{"scores": [1' + 400 * b"0" + b", 2, 3]}")) as url:
        assert ask(url).tolist() == [math.inf, 2, 3]


@pytest.mark.parametrize(("body", "words"), [
    (scores_of(1, 2), "must answer with 3 scores, but gave 2 scores"),
    (scores_of(1, 2, 3, 4), "but gave 4 scores"),
    (scores_of(), "but gave 0 scores"),
    (b"[1, 2, 3]", "no list of scores"),
    (b'{"scores": 3}', "no list of scores"),
    (b'{"score": [1, 2, 3]}', "no list of scores"),
    (scores_of(1, "2", 3), "gave '2' for a score"),
    (scores_of(1, True, 3), "gave 'True' for a score"),
    (scores_of(1, [2], 3), r"gave '\[2\]' for a score"),
    (b"<html>welcome</html>", "is not JSON"),
    (b"", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (100_000 * b"[", "is not JSON"),
    (b" " * (rewards.MAX_RESPONSE_BYTES + 10), "is longer than 16777216 bytes"),
], ids=lambda value: None if isinstance(value, str) else f"{value[:20]!r}")  # fmt: skip
def test_an_answer_that_breaks_the_protocol_is_a_reward_error_at_once(body, words):
    requests = []

    def respond(handler, _):
        requests.append(handler.number)
        handler.send(200, body)

    with answering(respond) as url, pytest.raises(RewardError, match=f"{re.escape(url)}.*{words}"):
        ask(url)
    assert requests == [0]


def reset(handler) -> None:
    """Close the connection with RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


FAILURES = {
    "500": lambda handler: handler.send(500, b'{"error": "no memory left"}'),
    "503": lambda handler: handler.send(503, b"", Retry_After="0"),
    "501": lambda handler: handler.send(501, b""),
    "520": lambda handler: handler.send(520, b""),
    "half an answer": lambda handler: handler.send(200, b'{"scores"', Content_Length="100"),
    "429": lambda handler: handler.send(429, b""),
    "reset": reset,
    "no answer": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "no HTTP": lambda handler: handler.wfile.write(b"220 smtp ready\r\n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_pass_is_tried_again(failure):
    with answering(
        lambda handler, _: FAILURES[failure](handler) if handler.number < 2 else handler.send(200, scores_of(1, 2, 3))
    ) as url:
        assert ask(url).tolist() == [1, 2, 3]


@pytest.mark.parametrize("failure", FAILURES)
def test_what_does_not_pass_is_given_up_after_five_tries(failure):
    requests = []

    def respond(handler, _):
        requests.append(handler.number)
        FAILURES[failure](handler)

    with answering(respond) as url, pytest.raises(RewardError, match=re.escape(url)) as caught:
        ask(url)
    assert requests == [0, 1, 2, 3, 4]
    if failure == "500":
        assert "status 500" in str(caught.value)
        assert "no memory left" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 301, 302, 307])
def test_a_refusal_or_redirection_is_not_tried_again(status):
    requests = []

    def respond(handler, _):
        requests.append(handler.number)
        handler.send(status, b'{"error": "because"}', Location="http://127.0.0.1:9/elsewhere")

    with (
        answering(respond) as url,
        pytest.raises(RewardError, match=f"status {status}: " + (".*because" if status >= 400 else "")),
    ):
        ask(url)
    assert requests == [0]


def test_the_pauses_between_tries_grow():
    times = []

    def respond(handler, _):
        times.append(time.perf_counter())
        handler.send(500, b"")

    with answering(respond) as url, pytest.raises(RewardError):
        ask(url, backoff=0.05)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[-1] > 2.5 * pauses[1] > 0.2


@pytest.mark.parametrize("way", ["says nothing", "drips", "wants a long pause"])
def test_a_server_that_hangs_is_given_up_in_time(way):
    release = threading.Event()

    def respond(handler, _):
        if way == "drips":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            while not release.wait(0.1):
                handler.wfile.write(b" ")
        elif way == "wants a long pause":
            handler.send(503, b"", Retry_After="3600")
        else:
            release.wait(30)

    with answering(respond) as url:
        scorer = rewards.load_reward(url, timeout=0.8)
        start = time.perf_counter()
        with pytest.raises(RewardError, match=re.escape(url)):
            scorer(random_images(3), PROMPTS)
        assert time.perf_counter() - start < 5
        release.set()


def test_nobody_at_the_port_is_a_reward_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RewardError, match=f"http://127.0.0.1:{port}/score failed: .*refused"):
        ask(f"http://127.0.0.1:{port}/score")


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with answering(lambda handler, _: handler.send(200, scores_of(1, 2, 3))) as url:
        assert ask(url).tolist() == [1, 2, 3]


# --- the server ---


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    if "fail" in prompts:
        raise ZeroDivisionError("fail")
    if "refuse" in prompts:
        raise ValueError("such a prompt")
    scores = images.mean(dim=(1, 2, 3))
    return torch.tensor([math.nan if prompt == "nan" else score for prompt, score in zip(prompts, scores, strict=True)])


@pytest.fixture
def served():
    with running(rewards.make_server(brightness, 0)) as url:
        yield url


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(*re.match(r"http://(.+):(\d+)", url).groups(), timeout=10)
    connection.request("POST", url.split("/", 3)[3].join(["/", ""]), body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_served_scorer_scores_as_it_does_here(served):
    scorer = rewards.load_reward(served)
    torch.testing.assert_close(scorer(random_images(3), PROMPTS), brightness(random_images(3), PROMPTS))
    nan = scorer(random_images(3), ["a", "nan", "b"])
    assert nan.isfinite().tolist() == [True, False, True]


def test_the_embedded_hps_scores_the_same_over_http():
    hps, images = rewards.load_reward("hps"), random_images(3, 32, 32)
    with running(rewards.make_server(hps, 0)) as url:
        torch.testing.assert_close(rewards.load_reward(url)(images, PROMPTS), hps(images, PROMPTS))


def test_what_the_served_scorer_raises_reaches_the_client(served):
    scorer = rewards.Remote(served, 10.0, backoff=0.01)
    with pytest.raises(RewardError, match=r"status 500: .*ZeroDivisionError: fail"):
        scorer(random_images(1), ["fail"])
    with pytest.raises(RewardError, match=r"status 400: .*such a prompt"):
        scorer(random_images(1), ["refuse"])
    assert scorer(random_images(1), ["fine"]).isfinite().all()


def png(width: int = 4, height: int = 4) -> str:
    return rewards.encode_png(torch.rand(3, height, width))


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"3", b"\xff", 100_000 * b"[",
    json.dumps({"prompts": ["a"]}).encode(),
    json.dumps({"prompts": ["a", "b"], "images": [png()]}).encode(),
    json.dumps({"prompts": [], "images": []}).encode(),
    json.dumps({"prompts": "a", "images": [png()]}).encode(),
    json.dumps({"prompts": [1], "images": [png()]}).encode(),
    json.dumps({"prompts": ["a", "b"], "images": [png(4), png(5)]}).encode(),
    json.dumps({"prompts": ["a"], "images": ["no base64!"]}).encode(),
    json.dumps({"prompts": ["a"], "images": [base64.b64encode(b"no png").decode()]}).encode(),
    json.dumps({"prompts": ["a"], "images": [png()[:60]]}).encode(),
    json.dumps({"prompts": ["a"], "images": [7]}).encode(),
], ids=range(16))  # fmt: skip
def test_a_bad_request_is_answered_with_400_and_the_server_goes_on(served, body):
    status, content = post(served, body)
    assert status == 400
    assert content["error"]
    assert ask(served).isfinite().all()


def test_other_pictures_than_png_are_not_opened(served):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    body = json.dumps({"prompts": ["a"], "images": [base64.b64encode(buffer.getvalue()).decode()]})
    assert post(served, body.encode())[0] == 400


def test_a_request_elsewhere_or_too_long_is_refused(served):
    assert post(served.replace("/score", "/other"), b"{}")[0] == 404
    assert post(served, b"", **{"Content-Length": str(10 * rewards.MAX_REQUEST_BYTES)})[0] == 413


def test_a_client_that_keeps_its_connection_open_does_not_stop_the_others(served):
    host, port = re.match(r"http://(.+):(\d+)", served).groups()
    with socket.create_connection((host, int(port))) as idle:
        idle.send(b"POST /score HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert ask(served, timeout=5).isfinite().all()


def test_png_keeps_eight_bits_and_any_shape():
    image = random_images(1, 5, 9)[0]
    torch.testing.assert_close(rewards.decode_png(rewards.encode_png(image)), image)
    assert torch.equal(
        rewards.decode_png(rewards.encode_png(2 * image - 0.5)),
        scorers.to_bytes((2 * image - 0.5)[None])[0].permute(2, 0, 1) / 255,
    )


def test_the_module_serves_as_a_program(tmp_path):
    command = [sys.executable, "-u", "-m", "texforce.rewards", "--serve", "jpeg", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(scorers.EMBEDDED_HPS.parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    try:
        url = re.fullmatch(r"jpeg at (http://127\.0\.0\.1:\d+/score)\n", process.stdout.readline()).group(1)
        torch.testing.assert_close(ask(url), rewards.load_reward("jpeg")(random_images(3), PROMPTS))
    finally:
        process.terminate()
        process.wait(10)
