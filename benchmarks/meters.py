"""What the scripts measure with: seconds, memory, the fastest matrix product of the machine, and held-out prompts."""

import gc
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch, _pytree

from texforce import Policy, heldout, models
from texforce.experience import gather_scores
from texforce.scorers import Scorer


def seconds(work: Callable[[], Any], device: str) -> float:
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Meter(_python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors made while it is active: on a CPU what a GPU's allocator counts."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # storage: bytes, 0 if it was there before
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, new=True)
        return result

    def _see(self, tree: Any, new: bool) -> None:
        for tensor in _pytree.tree_leaves(tree):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = size = storage.nbytes() if new else 0
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
                self.now += size
                self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """The most bytes that a piece of work holds, beyond what was there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Meter() as meter:
        work()
    return meter.peak


def held_bytes(device: str) -> int:
    """The most that the process has held on a GPU since the last peak was asked for, weights and all; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else 0


def matrix_rate(device: str, precision: str) -> float:
    """FLOP/s of products of large square matrices, the best of several sizes and tries; on a GPU of ten in a row."""
    dtype, best = models.DTYPES[precision], 0.0
    number = 10 if device == "cuda" else 1
    for size in (4096, 8192, 16384) if device == "cuda" else (512, 1024, 2048):
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products = lambda: [one @ other for _ in range(number)]  # noqa: B023, E731
        best = max(best, *(number * 2 * size**3 / seconds(products, device) for _ in range(8)))
    return best


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions; attention is written out, so that all of it counts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def heldout_images(policy: Policy, prompts: Sequence[str], batch_size: int) -> Tensor:
    """The images (N, 3, H, W) that a training's measurement draws, from its noise."""
    return torch.cat(list(heldout.draw_share(policy, prompts, batch_size).values()))


def heldout_means(images: Tensor, prompts: Sequence[str], measured_by: Mapping[str, Scorer]) -> dict[str, float]:
    """The means of the scores of images (N, 3, H, W), as a training's measurement takes them."""
    batches = dict(zip(range(0, len(images), 128), images.split(128), strict=True))
    return heldout.means(gather_scores(heldout.score_share(batches, prompts, measured_by)).scores, prompts)
