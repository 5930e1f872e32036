"""Several processes of one run, as torchrun and accelerate start them: each works on its share, and the first one writes.

They see each other by torch.distributed; without a launcher there is one process, which exchanges nothing.
Every process holds the whole state of the run and draws the same random numbers, so that a run is the same for any number
of them but for the order of sums.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from . import interrupts
from .errors import ProcessLost

T = TypeVar("T")
# How long one process waits for another. One that dies is known at once, by its closed connection; only one that hangs, or
# whose machine is cut off, takes this long. But one that is merely slower, by a scorer that takes longer for its share
# than this above the others' time, is given up too.
TIMEOUT = timedelta(hours=1)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it, the processes that a launcher has started are connected, each with a GPU of its own if there are any.

    All they exchange is small and goes by gloo, whose calls return when they are done or raise. NCCL's only begin, and its
    watchdog ends a process that waits for a lost one without a word.

    Raises:
        ProcessLost: they did not come together.
    """
    if count() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _reaching():
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Within it, what torch.distributed says of the others is told in one way; a signal of the launcher goes before it."""
    try:
        yield
    except RuntimeError as error:
        interrupts.check()
        raise ProcessLost(
            f"process {rank()} of {count()} has lost another one of the run; what ended that one is told before or after "
            f"this ({str(error).splitlines()[0][:200]})"
        ) from error


def share(number: int) -> bool:
    """Whether a piece of work, by its number, is this process's."""
    return number % count() == rank()


def gather(value: T) -> list[T]:
    """Every process's value, in their order, in every process; tensors must be on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _reaching():
        dist.all_gather_object(values, value)
    return values


def merged(mine: Mapping[int, T]) -> dict[int, T]:
    """Every process's items by their numbers, in the order of the numbers, in every process; tensors must be on the CPU."""
    return dict(sorted((item for items in gather(mine) for item in items.items()), key=itemgetter(0)))


def to_first(value: T) -> list[T]:
    """Every process's value, in their order, in the first one; nothing in the others. Tensors must be on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] | None = [None] * count() if is_first() else None
    with _reaching():
        dist.gather_object(value, values)
    return values or []


# --- errors ---


def agreed(function: Callable[..., T], *arguments: Any) -> T:
    """What a function gives here, once it has given something in every process; an error in one ends all of them alike.

    A signal passes through at once, and so does the loss of a process.

    Raises:
        What the function raises in any process, in every process; if in several, that of the first of them.
    """
    if count() == 1:
        return function(*arguments)
    result, failure = _outcome(function, *arguments)
    for process, error in enumerate(gather(_portable(failure))):
        if error is not None:
            raise failure if failure is not None and process == rank() else error
    return result


def from_first(make: Callable[[], T]) -> T:
    """What a function gives in the first process, in every process; it is called in the first one only.

    Raises:
        What the function raises, in every process.
    """
    if count() == 1:
        return make()
    result, failure = _outcome(make) if is_first() else (None, None)
    answer: list[Any] = [result, _portable(failure)]
    with _reaching():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1] if failure is None else failure
    return answer[0]


def _outcome(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """What a function gives, or the error that it raises."""
    try:
        return function(*arguments), None
    except ProcessLost:
        raise
    except Exception as error:
        interrupts.check()  # a signal may have been turned into an error
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """An error as another process can have it: where it cannot be pickled one of its class, or else none, with its text."""
    if error is None:
        return None
    for make in (lambda: error, lambda: type(error)(str(error))):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(make()))  # noqa: S301 - our own bytes; some are pickled but cannot be unpickled
            if type(copy) is type(error) and str(copy) == str(error):
                return copy
    return RuntimeError(f"{type(error).__name__}: {error}")


# --- gradients ---


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Put the sum of every process's gradients in the place of each's own; a gradient that is missing counts as 0.

    One that is missing in every process stays so: AdamW passes such a parameter over, and would let one of gradient 0 decay.
    They are summed explicitly, and not by a wrapper whose forward pass a policy gradient would not go through.
    """
    if count() == 1:
        return
    gradients = [torch.zeros_like(item) if item.grad is None else item.grad for item in parameters]
    num_present = gradients[0].new_tensor([float(item.grad is not None) for item in parameters])
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), num_present]).cpu()
    with _reaching():
        dist.all_reduce(flat)
    flat = flat.to(gradients[0].device)
    *sums, num_present = flat.split([*(gradient.numel() for gradient in gradients), len(gradients)])
    for parameter, part, present in zip(parameters, sums, num_present.tolist(), strict=True):
        parameter.grad = part.view_as(parameter).clone() if present else None
