"""Rewards: what `--reward` names. A published scorer, a weighted sum of several, a function of yours, or a server of yours.

Captions too, which `--relabel` names: the tiny world's own, or a function of yours.

reward_specs.py has the catalogue, and checks names; server.py has the server. Read top to bottom: from a name to a scorer,
mixtures, scorers that are not ours, captions, the HTTP client.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from . import detector, scorers
from .errors import InputError, RewardError, describe, describe_in, is_out_of_memory, near, origin
from .files import describe_files
from .hub import describe_source, describe_weights, find_weights
from .prompt_sets import NO_TEXT
from .reward_specs import (
    CATALOGUE,
    EMBEDDED_CHECKPOINTS,
    URL,
    WORLD,
    check_captioner,
    check_reward,
    functions_of,
    has_features,
    no_gradients,
    parse_mixture,
    password_of,
    weights_of,
)
from .scorers import Scorer, call, score, to_bytes

LOCAL = ("127.0.0.1", "localhost", "::1")
TIMEOUT = 600.0  # seconds
MAX_RESPONSE_BYTES = 2**24
# The largest request: our server refuses more, and the client splits its images into several requests.
MAX_REQUEST_PIXELS = 2**23  # 32 images of 512 x 512
MAX_REQUEST_IMAGES = 4096
# What makes the scorers of CATALOGUE, called with the paths of their weights and the device.
MAKERS: dict[str, Callable[..., Scorer]] = {
    "hps": scorers.HPS, "hps-v2": scorers.HPS, "imagereward": scorers.ImageReward, "pickscore": scorers.PickScore,
    "aesthetic": scorers.Aesthetic, "clip": scorers.CLIP, "ocr": lambda device: scorers.OCR(), "face": scorers.Face,
    "hand": scorers.Hand, "alignment": lambda device: detector.alignment,
    "alignment_exact": lambda device: detector.alignment_exact, "jpeg": lambda device: scorers.jpeg,
    "incompress": lambda device: scorers.incompress,
}  # fmt: skip


# --- from what --reward says to a scorer ---


def check_servers(spec: str) -> None:
    """Check that the servers of a reward are there, which a model's loading must not come before.

    Raises:
        RewardError: one cannot be connected to.
    """
    from requests.utils import get_environ_proxies

    for url in (name for name in parse_mixture(spec) if name.startswith(URL)):
        parts = urlsplit(url)
        is_local = parts.hostname in LOCAL
        if get_environ_proxies(url) and not is_local:  # it is the proxy that connects
            continue
        try:
            socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), 10).close()
        except OSError as error:
            raise RewardError(
                f"reward: no server answers at {url}: {error.strerror or error}; start it (`texforce serve`), or correct "
                "the address"
            ) from error


def load_reward(
    spec: str,
    device: str = "cpu",
    checkpoints: Mapping[str, str | Path] | None = None,
    normalise: bool = False,
    timeout: float = TIMEOUT,
) -> Mixture:
    """Load a reward: a name of CATALOGUE, `path/to/file.py:function`, a server's URL, or `hps=1,aesthetic=0.1`.

    Weights are those of `checkpoints`, by the names of hub.HUB, and otherwise, or where "hub" is given, come from the
    hub. By default, on a CPU, `hps` is the scorer of the tiny world. The timeout, in seconds, is that of one call of a
    function or server.

    Raises:
        InputError: what `check_reward` raises, or a file has no such function.
        NotFoundError: weights, or the file of the function, are not there.
        ArtifactError: weights are damaged or foreign.
    """
    check_reward(spec)
    weights = parse_mixture(spec)
    if checkpoints is None:
        checkpoints = EMBEDDED_CHECKPOINTS if device == "cpu" else {}
    parts = {name: _load_one(name, checkpoints, device, timeout) for name in weights}
    return Mixture(parts, weights, normalise and len(parts) > 1)  # advantages are in units of one reward as it is


def _load_one(name: str, checkpoints: Mapping[str, str | Path], device: str, timeout: float) -> Scorer:
    if name.startswith(URL):
        return Supervised(Remote(name, timeout), name, timeout)
    if ":" in name:
        return Supervised(_load_function(name), name, timeout)
    found = [find_weights(weights, checkpoints) for weights in CATALOGUE[name].weights]
    try:
        return MAKERS[name](*found, device=device)
    except ImportError as error:  # of what a package itself needs, as OpenCV a system's library
        raise InputError(f"reward: {name} cannot be used: {describe(error)}") from error


def locate(spec: str, checkpoints: Mapping[str, str | Path]) -> dict[str, Any]:
    """Where `load_reward` finds the parts of a reward: repository and revision, or files and their SHA-256.

    Nothing is fetched or executed.

    Raises:
        NotFoundError: a file is not there.
    """
    sources: dict[str, Any] = {}
    for weights in weights_of(spec):
        from_hub = checkpoints.get(weights, "hub") == "hub"
        sources[weights] = describe_source(weights) if from_hub else describe_weights(find_weights(weights, checkpoints))
    return sources | {name: describe_files(Path(name.rpartition(":")[0])) for name in functions_of(spec)}


def check_loadable(spec: str, checkpoints: Mapping[str, str | Path]) -> None:
    """Fetch the weights of a reward, and import the files of its functions, without loading any network.

    Raises:
        NotFoundError, InputError: something is not there, or a file has no such function.
    """
    for weights in weights_of(spec):
        find_weights(weights, checkpoints)
    for name in functions_of(spec):
        _load_function(name)


def gradient_function(scorer: Scorer, name: str) -> Scorer:
    """A scorer as a function whose scores carry gradients to the images.

    The networks have it as `with_gradients`; a function of yours says by its attribute `with_gradients = True` that its
    scores carry gradients themselves.

    Raises:
        InputError: it has none.
    """
    function = getattr(scorer, "scorer", scorer)  # the function that a Supervised scorer calls
    found = getattr(function, "with_gradients", None)
    if found is None or found is False:
        raise no_gradients(name)
    return function if found is True else found


# --- mixtures ---


class Mixture:
    """A weighted sum of scorers, each of which can also be seen on its own.

    With `normalise`, each is divided by the running deviation of its scores first, so that the easy one does not dominate.
    `captioner` says what training images show, where failed ones are relabelled.
    """

    captioner: Captioner | None = None

    def __init__(self, parts: Mapping[str, Scorer], weights: Mapping[str, float], normalise: bool = False) -> None:
        self.parts, self.weights, self.normalise = parts, weights, normalise
        self.spreads = {name: Spread() for name in parts}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine(self.score(images, prompts))

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores (N,) of each part for images (N, 3, H, W), as `scorers.score` gives them.

        Raises:
            RewardError: a part failed, or broke the protocol. InputError: one does not take such a prompt or image.
        """
        return {name: score(part, images, prompts, name) for name, part in self.parts.items()}

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores (N,) of each part, whose gradients reach the images (N, 3, H, W).

        Raises:
            InputError: a part has no gradients. RewardError: a part failed, or its scores carry none.
        """
        scores = {name: call(gradient_function(part, name), images, prompts, name) for name, part in self.parts.items()}
        for name, part in scores.items():
            if images.requires_grad and not part.requires_grad:
                raise RewardError(f"reward: {name} says with_gradients = True, but its scores carry no gradients")
        return scores

    def preprocess_exactly(self) -> None:
        """Let the networks preprocess images as their own code does it, on 8 bits; gradients end there."""
        for part in self.parts.values():
            if isinstance(part, scorers.NetworkScorer):
                part.exact = True

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Features (N, D) of length 1 of images (N, 3, H, W), by the first part that has features."""
        part: Any = next(part for name, part in self.parts.items() if has_features(name))
        return part.image_features(images).float().cpu()

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The sum (N,) of the parts' scores (N,)."""
        terms = [self.weights[name] / self._unit(name) * part for name, part in scores.items()]
        return torch.stack(terms).sum(dim=0)

    def combine_means(self, means: Mapping[str, float]) -> float:
        """The same of means over many images."""
        return sum(self.weights[name] / self._unit(name) * means[name] for name in self.parts)

    def observe(self, scores: Mapping[str, Tensor]) -> None:
        """Add scores (N,) to the running deviations."""
        for name, part in scores.items():
            self.spreads[name].add(part)

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(vars(spread)) for name, spread in self.spreads.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, numbers in state.items():
            spread = self.spreads[name]
            spread.count, spread.mean, spread.squares = (
                int(numbers["count"]),
                float(numbers["mean"]),
                float(numbers["squares"]),
            )

    def _unit(self, name: str) -> float:
        return self.spreads[name].std if self.normalise else 1.0


class Spread:
    """Deviation of all finite numbers seen so far, by Chan's update of count, mean and sum of squares."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, scores: Tensor) -> None:
        finite = scores[scores.isfinite()].double()
        if len(finite) == 0:
            return
        total, mean = self.count + len(finite), finite.mean().item()
        delta = mean - self.mean
        self.squares += (finite - mean).square().sum().item() + delta**2 * self.count * len(finite) / total
        self.mean += delta * len(finite) / total
        self.count = total

    @property
    def std(self) -> float:
        """1 until there are two different numbers."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0


# --- scorers that are not ours ---


class Supervised:
    """A scorer called in a thread of its own, so that a training does not wait for one that hangs.

    `option` is what messages begin with, `relabel` for a function that gives captions.

    Raises, when called:
        RewardError: the scorer took too long, or raised an exception.
    """

    def __init__(self, scorer: Callable[..., Any], name: str, timeout: float, option: str = "reward") -> None:
        self.scorer, self.name, self.timeout, self.option = scorer, name, timeout, option
        self.jobs: queue.SimpleQueue[tuple[Tensor, Sequence[str]]] | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.jobs is None:
            self.jobs, self.results = queue.SimpleQueue(), queue.SimpleQueue[Any]()
            threading.Thread(target=self._work, args=(self.jobs, self.results), daemon=True).start()
        self.jobs.put((images.clone(), list(prompts)))  # others see them too, and a function may change what it is given
        try:
            result = self._wait()
        except BaseException as error:
            self.jobs = None  # a late answer must not be taken for the next call's
            if not isinstance(error, queue.Empty):
                raise
            wanted = "scores" if self.option == "reward" else "captions"
            raise RewardError(f"{self.option}: {self.name} gave no {wanted} within {self.timeout:g} s") from None
        if isinstance(result, BaseException) and (isinstance(result, RewardError) or is_out_of_memory(result)):
            raise result
        if isinstance(result, BaseException):
            told = describe_in(result, self.name.rpartition(":")[0])
            raise RewardError(f"{self.option}: {self.name} raised {told}") from result
        return result

    def _wait(self) -> Any:
        """The next result, in short waits: a signal that comes just before a wait is handled only after it."""
        end = time.monotonic() + self.timeout
        while True:
            left = end - time.monotonic()
            try:
                return self.results.get(timeout=min(max(left, 0.0), 1.0))
            except queue.Empty:
                if left <= 1:
                    raise

    @torch.no_grad()  # grad mode is a thread's own
    def _work(self, jobs: queue.SimpleQueue[tuple[Tensor, Sequence[str]]], results: queue.SimpleQueue[Any]) -> None:
        while True:
            try:
                images, prompts = jobs.get()
                if images.is_cuda:
                    torch.cuda.set_device(images.device)  # this too: "cuda" is the process's own GPU
                results.put(self.scorer(images, prompts))
            except BaseException as error:  # SystemExit too: it must not end the thread without an answer
                results.put(error)


def _load_function(spec: str, option: str = "reward") -> Callable[..., Any]:
    name, _, attribute = spec.rpartition(":")
    path = Path(name)
    module_name = f"texforce_reward_{path.stem}"  # a file may be called like a package
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{option}: {name!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise InputError(f"{option}: {name!r} could not be imported: {describe(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise InputError(f"{option}: {name!r} has no function {attribute!r}{near(attribute, functions)}")
    return function


# --- captions ---

Captioner = Callable[[Tensor, Sequence[str]], list[str | None]]  # images (N, 3, H, W) in [0, 1] and N prompts


def load_captioner(spec: str, timeout: float = TIMEOUT) -> Captioner:
    """What gives images (N, 3, H, W) in [0, 1] of N prompts their captions: N texts, or None for what is not relabelled.

    Raises:
        InputError, NotFoundError: what `check_captioner` raises, or a file has no such function.
        RewardError, when called: a function failed, took too long, or returned something else.
    """
    check_captioner(spec)
    if spec == WORLD:
        return detector.captions
    function = Supervised(_load_function(spec, "relabel"), spec, timeout, "relabel")

    def caption(images: Tensor, prompts: Sequence[str]) -> list[str | None]:
        found: Any = function(images, prompts)
        whole = isinstance(found, list | tuple) and len(found) == len(images)
        if not whole or not all(text is None or isinstance(text, str) for text in found):
            raise RewardError(
                f"relabel: {spec} must return a list of {len(images)} items, each a text or None, not {str(found)[:60]!r}"
            )
        return [NO_TEXT.sub(" ", text).strip() or None if text else None for text in found]

    return caption


# --- scorers elsewhere: the client ---
#
# One POST of JSON, {"prompts": [text, ...], "images": [PNG in base64, ...]}, answered by {"scores": [number or null, ...]},
# one an image; null drops the image.


class Remote:
    """A scorer behind HTTP.

    What may pass (no connection, a reset, half an answer, the statuses 429 and 5xx) is tried again, after growing pauses.
    Redirects are not followed.
    """

    def __init__(self, url: str, timeout: float, num_retries: int = 4, backoff: float = 0.5) -> None:
        import requests

        self.url, self.timeout, self.num_retries, self.backoff = url, timeout, num_retries, backoff
        self.session = requests.Session()
        place = urlsplit(url).netloc
        if (password := password_of(place)) is not None:
            self.session.auth = (unquote(place.partition("@")[0]), unquote(password))
        if urlsplit(url).hostname in LOCAL:
            self.session.trust_env = False  # a proxy of the environment does not know this machine

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size = max(1, min(MAX_REQUEST_IMAGES, MAX_REQUEST_PIXELS // math.prod(images.shape[-2:])))
        starts = range(0, len(images), size)
        return torch.cat([self._ask(images[start : start + size], prompts[start : start + size]) for start in starts])

    def _ask(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores (n,) of what one request may hold."""
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
                status, failure = 0, f"does not answer: {describe(origin(error))}"
            if status not in (0, 429) and status < 500:
                break
            if attempt < self.num_retries:
                time.sleep(self.backoff * 2**attempt)
        if status == 401:
            failure += "; a password is never saved: give it in the URL of --reward, each time"
        if status != 200:
            raise RewardError(f"reward: {self.url} {failure}")
        if len(body) > MAX_RESPONSE_BYTES:
            raise RewardError(f"reward: the answer of {self.url} is longer than {MAX_RESPONSE_BYTES} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"reward: the answer of {self.url} is not JSON: {describe(error)}") from error

    def _try(self, content: dict[str, Any]) -> tuple[int, bytes]:
        """Status and content of one answer, read up to the largest size that is allowed."""
        options: dict[str, Any] = {"timeout": self.timeout, "stream": True, "allow_redirects": False}
        with self.session.post(self.url, json=content, **options) as response:
            return response.status_code, response.raw.read(MAX_RESPONSE_BYTES + 1, decode_content=True)


def encode_png(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image[None])[0].numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
