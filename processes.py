"""Several processes of one run, as torchrun and accelerate start them: each works on its share, and the first one writes.

They communicate by torch.distributed; without a launcher there is one process, which exchanges nothing.
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
# How long one process waits for another. A process that dies is noticed at once, by its closed connection; only one that
# hangs, or whose machine is cut off, takes this long. A process whose scorer needs this much longer than the others' is
# given up too.
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
    """Connect the processes that a launcher has started, each with a GPU of its own if there are any.

    They exchange small tensors through gloo, whose calls return when they are done, or raise. NCCL's calls return at once,
    and its watchdog ends a process that waits for a lost one without a message.

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
    """Turn torch.distributed's errors about other processes into ProcessLost; a signal from the launcher has precedence."""
    try:
        yield
    except RuntimeError as error:
        interrupts.check()
        raise ProcessLost(
            f"process {rank()} of {count()} has lost another one of the run; the error that ended it is printed before "
            f"or after this one ({str(error).splitlines()[0][:200]})"
        ) from error


def is_mine(number: int) -> bool:
    """Whether the piece of work with this number belongs to this process."""
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
    """Call a function in every process and return this process's result; an error in one process is raised in all.

    A signal passes through at once, and so does the loss of a process.

    Raises:
        The function's error, in every process; that of the first process if several fail.
    """
    if count() == 1:
        return function(*arguments)
    result, failure = _outcome(function, *arguments)
    for process, error in enumerate(gather(_portable(failure))):
        if error is not None:
            raise failure if failure is not None and process == rank() else error
    return result


def from_first(make: Callable[[], T]) -> T:
    """Call a function in the first process only, and return its result in every process.

    Raises:
        The function's error, in every process.
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
    """A function's result, or the error that it raises."""
    try:
        return function(*arguments), None
    except ProcessLost:
        raise
    except Exception as error:
        interrupts.check()  # a signal may have been turned into an error
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """An error that can be pickled: itself, a new one of its class, or a RuntimeError with its text."""
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
    """Replace each process's gradients by the sum over all processes; a missing gradient counts as 0.

    A gradient that is missing in every process stays missing: AdamW skips that parameter, and would decay it if its gradient
    were 0. The sum is explicit, since a policy gradient does not go through the forward pass of a DDP wrapper.
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
