"""Rewards: scorers of images for their prompts, behind one protocol.

A scorer takes images (N, 3, H, W) in [0, 1] and N prompts and returns (N,) float32, higher is better.
"""

import contextlib
import importlib.util
import io
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDED_HPS = Path(__file__).parent / "tiny" / "hps.pt"
EMBEDDED_MAX_SIZE = 64  # pixels; beyond it an image is not of the tiny world
HPS_CHECKPOINTS = {"hps": "HPS_v2.1_compressed.pt", "hps-v2": "HPS_v2_compressed.pt"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Scorer(Protocol):
    """Images (N, 3, H, W) in [0, 1] and N prompts to scores (N,) float32; higher is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class ArtifactError(Exception):
    """A file of weights that is damaged, foreign or unsafe, and was refused."""


class RewardError(Exception):
    """A scorer failed or broke the protocol."""


def load_reward(spec: str, device: str = "cpu", checkpoint: str | Path | None = None) -> Scorer:
    """Load a scorer: `hps`, `hps-v2`, `alignment`, `jpeg`, `incompress`, or your own as `path/to/file.py:function`.

    For `hps` and `hps-v2` the checkpoint is a file in HPSv2's format or "hub". By default it follows the device as the
    model does: the embedded scorer of the tiny world on the CPU, the published HPSv2 from the hub on a GPU.

    Raises:
        ValueError: the name is unknown, or a checkpoint is given to a scorer that has none.
        FileNotFoundError: the checkpoint or the file of the function is not there.
        ArtifactError: the checkpoint is damaged or foreign.
    """
    check_name(spec)
    if checkpoint is not None and spec not in HPS_CHECKPOINTS:
        raise ValueError(f"reward_checkpoint: only {', '.join(HPS_CHECKPOINTS)} read one, not {spec!r}")
    if ":" in spec:
        return _load_function(spec)
    if spec in HPS_CHECKPOINTS:
        if checkpoint is None:
            checkpoint = EMBEDDED_HPS if device == "cpu" else "hub"
        return HPS(_download_hps(spec) if checkpoint == "hub" else Path(checkpoint), device)
    return PLAIN_SCORERS[spec]()


def check_name(spec: str) -> None:
    """See whether there is such a reward, without loading it.

    Raises:
        ValueError: the name is unknown. FileNotFoundError: the file of a function is not there.
    """
    known = [*HPS_CHECKPOINTS, *PLAIN_SCORERS]
    if ":" not in spec and spec not in known:
        raise ValueError(f"reward: unknown name {spec!r}; known are {', '.join(known)}, and path/to/file.py:function")
    name = spec.rpartition(":")[0]
    if name and not Path(name).is_file():
        raise FileNotFoundError(f"reward: there is no file {name!r}; a reward of your own is path/to/file.py:function")


def score(scorer: Scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Call a scorer and hold it to the protocol; scores (N,) float32 on the CPU, non-finite ones passed on.

    Raises:
        RewardError: the scorer raised, or returned something other than one number an image.
        ValueError: the scorer does not take such a prompt or image.
    """
    try:
        scores = scorer(images, prompts)
    except (RewardError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RewardError(f"reward: the scorer raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        seen = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"reward: the scorer must return a tensor of shape ({len(images)},) but returned {seen}")
    scores = scores.detach().float().cpu()
    return scores.where(images.isfinite().flatten(1).all(dim=1).cpu(), torch.nan)  # nothing can be said of a broken image


def _load_function(spec: str) -> Scorer:
    name, _, attribute = spec.rpartition(":")
    path = Path(name)
    module_name = f"texforce_reward_{path.stem}"  # a file may be called like a package
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"reward: {name!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"reward: {name!r} could not be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward: {name!r} has no function {attribute!r}")

    def scorer(images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            return function(images, prompts)
        # From a scorer of ours a ValueError says what is wrong with the input; from this one, who knows.
        except (ValueError, SystemExit) as error:
            raise RewardError(f"reward: {spec} raised {type(error).__name__}: {error}") from error

    return scorer


# --- HPSv2 ---


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """Resize the longest side of images (N, 3, H, W) to `size`, bicubic with antialiasing, and pad with zeros.

    This is HPSv2's preprocessing (arXiv:2306.09341) before the normalisation.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    down, across = size - shape[0], size - shape[1]
    return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))


def normalise(images: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its deviation, a channel each."""
    mean, std = images.new_tensor(CLIP_MEAN), images.new_tensor(CLIP_STD)
    return (images - mean[:, None, None]) / std[:, None, None]


class HPS:
    """Human Preference Score v2 (arXiv:2306.09341): cosine of the image and the prompt features, -1 to 1.

    Tables of the papers show it times 100. The checkpoint holds an open_clip `state_dict`; its architecture is
    ViT-H-14, or what the JSON file of the same name beside it says.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        self.device = device
        self.max_size = EMBEDDED_MAX_SIZE if checkpoint == EMBEDDED_HPS else None
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        state_dict = read_state_dict(checkpoint)  # before a billion parameters are made
        self.model: Any
        self.model, self.tokenizer = build_clip(checkpoint.with_suffix(".json"))
        fill(self.model, state_dict, checkpoint)
        self.model.requires_grad_(False).eval().to(device, dtype)
        self.dtype = dtype

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.max_size and max(images.shape[-2:]) > self.max_size:
            raise ValueError(
                f"reward: the embedded hps scorer knows the tiny world's images of 32x32 pixels only, not "
                f"{images.shape[-1]}x{images.shape[-2]}; give HPSv2's checkpoint with --reward-checkpoint"
            )
        size = self.model.visual.image_size
        size = size[0] if isinstance(size, tuple) else size
        pixels = normalise(pad_to_square(images.to(self.device).float(), size)).to(self.dtype)
        image_features = self.model.encode_image(pixels, normalize=True)
        unique = list(dict.fromkeys(prompts))
        text_features = self.model.encode_text(self.tokenizer(unique).to(self.device), normalize=True)
        row = {prompt: i for i, prompt in enumerate(unique)}
        text_features = text_features[[row[prompt] for prompt in prompts]]
        return (image_features.float() * text_features.float()).sum(dim=1)


def build_clip(config: Path) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """An open_clip model with random weights and its tokenizer: ViT-H-14, or as the JSON file says if it is there."""
    import open_clip

    if not config.exists():
        return open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), open_clip.get_tokenizer("ViT-H-14")
    cfg: dict[str, Any] = json.loads(config.read_text())
    tokenizer = open_clip.tokenizer.HFTokenizer(
        str(config.parent / "tokenizer"), context_length=cfg["text_cfg"]["context_length"]
    )
    return open_clip.CLIP(**cfg), tokenizer


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """The `state_dict` of a checkpoint; no code is run.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ArtifactError: it is damaged or unsafe, or holds no such thing.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"reward: there is no checkpoint {str(checkpoint)!r}")
    with _refused(checkpoint):
        return torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]


def fill(model: nn.Module, state_dict: dict[str, Tensor], checkpoint: Path) -> None:
    """Give a model a checkpoint's tensors, every one used and none missing.

    Raises:
        ArtifactError: they are another architecture's.
    """
    with _refused(checkpoint):
        model.load_state_dict(state_dict, strict=True)


@contextlib.contextmanager
def _refused(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's own words advise to run whatever code is in the file
        raise ArtifactError(f"{checkpoint}: refused as a scorer's checkpoint: not a file of tensors alone") from error
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(f"{checkpoint}: refused as a scorer's checkpoint: {reason[:300]}") from error


def _download_hps(spec: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = HPS_CHECKPOINTS[spec]
    try:
        return Path(hf_hub_download("xswu/HPSv2", name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"reward: {name} of xswu/HPSv2 could not be had from the hub ({type(error).__name__}); "
            "give the file with --reward-checkpoint"
        ) from error


# --- file size ---


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of images (N, 3, H, W) in [0, 1] as JPEG of quality 95, in kB of 1000 bytes."""
    from PIL import Image

    sizes = []
    for pixels in (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compressibility (arXiv:2305.13301): kB as JPEG, negated."""
    return -jpeg_kilobytes(images)


def incompress(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Incompressibility (arXiv:2305.13301): kB as JPEG."""
    return jpeg_kilobytes(images)


def _alignment() -> Scorer:
    from texforce.world import alignment

    return alignment


PLAIN_SCORERS: dict[str, Callable[[], Scorer]] = {
    "alignment": _alignment,
    "jpeg": lambda: jpeg,
    "incompress": lambda: incompress,
}
