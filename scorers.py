"""The scorers, each by its published recipe, in batches: preference, aesthetics, agreement with the prompt, size, detectors.

Every scorer takes images (N, 3, H, W) in [0, 1] and N prompts and returns (N,) float32, higher is better. Read top to
bottom: the protocol, preprocessing, networks, file size, detectors of text, faces and hands.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArtifactError, InputError, NotFoundError, RewardError, describe, is_out_of_memory, reading
from .models import check_tokenizer
from .reward_specs import EMBEDDED_HPS, quoted
from .weights import build_empty, fill, load_pretrained, read_tensors, refused

EMBEDDED_MAX_SIZE = 64  # pixels; beyond it an image is not of the tiny world
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# --- the protocol ---


class Scorer(Protocol):
    """Images (N, 3, H, W) in [0, 1], on the device that draws them, and N prompts to scores (N,); higher is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


def score(scorer: Scorer, images: Tensor, prompts: Sequence[str], name: str = "the scorer") -> Tensor:
    """Call a scorer and hold it to the protocol; scores (N,) float32 on the CPU, non-finite ones passed on.

    `name` is what messages call it. The score of an image that is not finite is NaN; the scorer is not called if no image is
    finite.

    Raises:
        RewardError: the scorer raised, or returned something other than one number an image.
        InputError: the scorer does not take such a prompt or image.
    """
    finite = are_finite(images)
    if not finite.any():
        return torch.full((len(images),), torch.nan)
    scores = call(scorer, images, prompts, name)
    return scores.detach().float().cpu().where(finite, torch.nan)  # nothing can be said of a broken image


def call(scorer: Scorer, images: Tensor, prompts: Sequence[str], name: str) -> Tensor:
    """The scores (N,) that a scorer returns; a list or an array of numbers becomes a tensor.

    Raises:
        RewardError: the scorer raised, or returned something other than one real number an image.
    """
    try:
        scores = scorer(images, prompts)
    except (RewardError, InputError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RewardError(f"reward: {name} raised {describe(error)}") from error
    if isinstance(scores, list | tuple | np.ndarray):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):  # no numbers, which the message says
            scores = torch.as_tensor(list(scores))
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        seen = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"{type(scores).__name__}"
        if isinstance(scores, list | tuple) and (odd := [each for each in scores if isinstance(each, str | dict | None)]):
            seen += f" that holds {odd[0]!r:.60}"
        raise RewardError(f"reward: {name} must return a tensor or list of shape ({len(images)},) but returned {seen}")
    if scores.is_complex():
        raise RewardError(f"reward: {name} must return real numbers but returned {scores.dtype}")
    return scores


def are_finite(images: Tensor) -> Tensor:
    """Which of images (N, 3, H, W) are: (N,) bool on the CPU."""
    return images.isfinite().flatten(1).all(dim=1).cpu()


# --- preprocessing ---


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """Resize the longest side of images (N, 3, H, W) to `size`, bicubic with antialiasing, and pad with zeros.

    This is HPSv2's preprocessing (arXiv:2306.09341) before the normalisation.
    """
    shape, left, top = _padding(images, size)
    images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    return F.pad(images, (left, size - shape[1] - left, top, size - shape[0] - top))


def _padding(images: Tensor, size: int) -> tuple[tuple[int, int], int, int]:
    """The shape of images whose longest side is `size`, and how much is padded on the left and on top."""
    scale = size / max(images.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    return (height, width), (size - width) // 2, (size - height) // 2


def crop_to_square(images: Tensor, size: int, offset: Callable[[float], int] = round) -> Tensor:
    """Resize the shortest side of images (N, 3, H, W) to `size`, bicubic with antialiasing, and crop the centre.

    This is CLIP's preprocessing (arXiv:2103.00020) before the normalisation. `offset` makes a whole number of half of what
    is over: torchvision rounds it, transformers' processors take the floor.
    """
    shape, rows, columns = _cropping(images, size, offset)
    return F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)[..., rows, columns]


def _cropping(images: Tensor, size: int, offset: Callable[[float], int]) -> tuple[tuple[int, int], slice, slice]:
    """The shape of images whose shortest side is `size`, and the rows and columns that are its centre."""
    height, width = (size * side // min(images.shape[-2:]) for side in images.shape[-2:])
    top, left = offset((height - size) / 2), offset((width - size) / 2)
    return (height, width), slice(top, top + size), slice(left, left + size)


def pad_to_square_exactly(images: Tensor, size: int) -> Tensor:
    """`pad_to_square` as HPSv2's own code does it: of 8-bit images, by torchvision, and what the filter overshoots stays."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    shape, left, top = _padding(images, size)
    pixels = to_bytes(images).permute(0, 3, 1, 2).float().div(255)
    resized = tv.resize(pixels, list(shape), InterpolationMode.BICUBIC, antialias=True)
    return tv.pad(resized, [left, top, size - shape[1] - left, size - shape[0] - top])


def crop_to_square_exactly(images: Tensor, size: int, offset: Callable[[float], int] = round) -> Tensor:
    """`crop_to_square` of 8-bit images by PIL, which rounds to 8 bits again, as the scorers' own code does it."""
    from PIL import Image

    shape, rows, columns = _cropping(images, size, offset)
    cropped = [
        np.array(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC))[rows, columns]
        for pixels in to_bytes(images).numpy()
    ]
    return torch.from_numpy(np.stack(cropped)).permute(0, 3, 1, 2).float().div(255)


def normalise(images: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its deviation, a channel each."""
    mean, std = images.new_tensor(CLIP_MEAN), images.new_tensor(CLIP_STD)
    return (images - mean[:, None, None]) / std[:, None, None]


# --- networks ---


class FrozenNetwork:
    """A network that is only used, in half precision on CUDA."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32

    def freeze(self, model: Any) -> Any:
        return model.requires_grad_(False).eval().to(self.device, self.dtype)


class NetworkScorer(FrozenNetwork):
    """A scorer that is a network; only `with_gradients` carries gradients to the images.

    With `exact`, images are preprocessed as the scorer's own code does it, on 8 bits and without gradients.
    """

    exact = False

    def pad(self, images: Tensor, size: int) -> Tensor:
        """Images (N, 3, size, size) on the device, for HPSv2."""
        resized = pad_to_square_exactly(images, size) if self.exact else pad_to_square(images.to(self.device).float(), size)
        return normalise(resized.to(self.device)).to(self.dtype)

    def crop(self, images: Tensor, size: int, offset: Callable[[float], int] = round) -> Tensor:
        """Images (N, 3, size, size) on the device, for the others."""
        if self.exact:
            resized = crop_to_square_exactly(images, size, offset)
        else:
            resized = crop_to_square(images.to(self.device).float(), size, offset)
        return normalise(resized.to(self.device)).to(self.dtype)

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.with_gradients(images, prompts)

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (N,) of images (N, 3, H, W) for N prompts, whose gradients reach the images."""
        raise NotImplementedError


class HPS(NetworkScorer):
    """Human Preference Score v2 (arXiv:2306.09341): cosine of the image and the prompt features, -1 to 1.

    Tables of the papers show it times 100. The checkpoint holds an open_clip `state_dict`; its architecture is
    ViT-H-14, or what the JSON file of the same name beside it says.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        super().__init__(device)
        self.max_size = EMBEDDED_MAX_SIZE if checkpoint == EMBEDDED_HPS else None
        tensors = read_tensors(checkpoint)
        model, self.tokenizer = build_empty(build_clip, checkpoint)
        fill(model, tensors, checkpoint)
        self.model: Any = self.freeze(model)

    def image_features(self, images: Tensor) -> Tensor:
        """Features (N, D) of length 1 of images (N, 3, H, W)."""
        if self.max_size and max(images.shape[-2:]) > self.max_size:
            raise InputError(
                f"reward: the embedded hps scorer knows the tiny world's images of 32x32 pixels only, not "
                f"{images.shape[-1]}x{images.shape[-2]}; give HPSv2's checkpoint with --reward-checkpoint"
            )
        size = self.model.visual.image_size
        size = size[0] if isinstance(size, tuple) else size
        return F.normalize(self.model.encode_image(self.pad(images, size)).float(), dim=1)

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image_features = self.image_features(images)
        unique, rows = distinct(prompts)
        text_features = F.normalize(self.model.encode_text(self.tokenizer(unique).to(self.device)).float(), dim=1)
        return (image_features * text_features[rows]).sum(dim=1)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Every prompt once, and the row of each: the images of a group share their prompt, so that it is encoded once."""
    rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(rows), [rows[prompt] for prompt in prompts]


def build_clip(checkpoint: Path) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """An open_clip model with random weights and its tokenizer.

    It is ViT-H-14, or what the JSON file of the checkpoint's name beside it says.

    Raises:
        ArtifactError: neither can be built; names the JSON file if there is one, and else the checkpoint.
    """
    import open_clip

    config, folder = checkpoint.with_suffix(".json"), checkpoint.parent / "tokenizer"
    with refused(config if config.exists() else checkpoint):
        if not config.exists():
            return open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), open_clip.get_tokenizer("ViT-H-14")
        cfg: dict[str, Any] = json.loads(config.read_text())
        if not folder.is_dir():  # or else the hub is asked for a repository of that name
            raise ValueError(f"there is no tokenizer in {str(folder)!r}")
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=cfg["text_cfg"]["context_length"])
        check_tokenizer(tokenizer.tokenizer, cfg["text_cfg"]["vocab_size"])
        return open_clip.CLIP(**cfg), tokenizer


class CLIP(NetworkScorer):
    """A CLIP model (arXiv:2103.00020) in transformers' format, on the scale of CLIPScore: 2.5 * max(cosine, 0).

    0 to 2.5; other papers report the cosine, or it times 100. CLIPScore's own figures (arXiv:2104.08718) are of prompts
    that begin with "A photo depicts", which is not added here.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPModel

        super().__init__(device)
        self.model: Any = self.freeze(load_pretrained(CLIPModel, folder))
        self.tokenize = clip_tokenizer(folder, self.model.config.text_config)

    def offset(self, half: float) -> int:
        """Where the middle square begins, if half of what is over is `half`."""
        return round(half)

    def image_features(self, images: Tensor) -> Tensor:
        """Features (N, D) of length 1 of images (N, 3, H, W)."""
        pixels = self.crop(images, self.model.config.vision_config.image_size, self.offset)
        return F.normalize(self.model.get_image_features(pixels).pooler_output.float(), dim=1)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        unique, rows = distinct(prompts)
        features = self.model.get_text_features(self.tokenize(unique).to(self.device)).pooler_output.float()
        return (self.image_features(images) * F.normalize(features, dim=1)[rows]).sum(dim=1)

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 2.5 * self.cosine(images, prompts).clamp(min=0)


def clip_tokenizer(folder: Path, config: Any) -> Callable[[list[str]], Tensor]:
    """Prompts to ids (N, L) by the folder's tokenizer, or else by CLIP's own, which comes with open_clip.

    Raises:
        ArtifactError: the folder's tokenizer is not of the model.
    """
    import open_clip
    from transformers import CLIPTokenizer

    length = config.max_position_embeddings
    with refused(folder):
        if not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
            own = open_clip.get_tokenizer("ViT-B-32", context_length=length)
            if own.vocab_size > config.vocab_size:
                raise ValueError("it lacks its tokenizer")
            return own
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        check_tokenizer(tokenizer, config.vocab_size)

    def tokenize(prompts: list[str]) -> Tensor:
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    return tokenize


class PickScore(CLIP):
    """PickScore (arXiv:2305.01569): the cosine times the model's own scale of about 100, mostly 18 to 23."""

    def offset(self, half: float) -> int:
        return math.floor(half)

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.float().exp() * self.cosine(images, prompts)


def linear_head(width: int) -> nn.Sequential:
    """The layers that LAION's aesthetic predictor and ImageReward end in: linear, without activations."""
    sizes = (width, 1024, 128, 64, 16, 1)
    layers: list[nn.Module] = []
    for index in range(5):
        layers.append(nn.Linear(sizes[index], sizes[index + 1]))
        if index < 3:
            layers.append(nn.Dropout())  # off, but it counts in the names of the tensors
    return nn.Sequential(*layers)


class Aesthetic(NetworkScorer):
    """LAION's aesthetic predictor V2 (sac+logos+ava1-l14-linearMSE): of the image alone, about 1 to 10."""

    def __init__(self, checkpoint: Path, clip: Path, device: str = "cpu") -> None:
        super().__init__(device)
        tensors = read_tensors(checkpoint)
        self.clip = CLIP(clip, device)
        head = linear_head(self.clip.model.config.projection_dim)
        fill(head, {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}, checkpoint)
        self.head = self.freeze(head).float()

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.image_features(images)).squeeze(1)

    def image_features(self, images: Tensor) -> Tensor:
        """CLIP's (N, D), of length 1."""
        self.clip.exact = self.exact
        return self.clip.image_features(images)


class ImageReward(NetworkScorer):
    """ImageReward (arXiv:2304.05977): BLIP's text encoder attends to the image; about normal, mean 0 and deviation 1."""

    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    IMAGE_SIZE, MAX_TOKENS = 224, 35
    BERT_UNCASED = (30522, 101, 102)  # tokens in all, the first and the last of a text

    def __init__(self, checkpoint: Path, tokenizer: Path, device: str = "cpu") -> None:
        from transformers import BertTokenizer

        super().__init__(device)
        tensors = blip_tensors(read_tensors(checkpoint), checkpoint)
        with refused(tokenizer):  # without its files transformers makes a tokenizer that knows no word
            self.tokenizer = BertTokenizer.from_pretrained(tokenizer, local_files_only=True)
            ids = (len(self.tokenizer), self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
            if ids != self.BERT_UNCASED:
                raise ValueError("it is not the tokenizer of bert-base-uncased")
        vision, text, head = build_empty(build_blip)
        for part, model in (("vision", vision), ("text", text), ("head", head)):
            fill(model, tensors[part], checkpoint)
        self.vision, self.text, self.head = self.freeze(vision), self.freeze(text), self.freeze(head).float()

    def with_gradients(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.crop(images, self.IMAGE_SIZE)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        features = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
        ).last_hidden_state[:, 0]
        return (self.head(features.float()).squeeze(1) - self.MEAN) / self.STD


def build_blip() -> tuple[nn.Module, nn.Module, nn.Module]:
    """ViT-L/16, a BERT with cross-attention, and the head, with random weights."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=ImageReward.IMAGE_SIZE, patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=512, layer_norm_eps=1e-12, is_decoder=True,
    )  # fmt: skip
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), linear_head(768)


UNUSED_BLIP = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")  # no score needs them
BLIP_VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."), ("blocks.", "encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
)  # fmt: skip


def blip_tensors(tensors: dict[str, Tensor], checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of ImageReward's checkpoint by part: vision, text and head, each by transformers' names.

    Raises:
        ArtifactError: a tensor is of none of them.
    """
    prefixes = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.layers.": "head"}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in prefixes.values()}
    for name, tensor in tensors.items():
        if name.startswith(UNUSED_BLIP):
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            raise ArtifactError(f"{checkpoint}: refused as a scorer's checkpoint: {name} is not of ImageReward")
        name = name.removeprefix(prefix)
        if prefixes[prefix] == "vision":
            name = re.sub(r"^norm\.", "post_layernorm.", name)
            for theirs, ours in BLIP_VISION_NAMES:
                name = name.replace(theirs, ours)
        parts[prefixes[prefix]][name] = tensor
    return parts


# --- file size ---


def to_bytes(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] as (N, H, W, 3) uint8 on the CPU."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of images (N, 3, H, W) in [0, 1] as JPEG of quality 95, in kB of 1000 bytes."""
    from PIL import Image

    sizes = []
    for pixels in to_bytes(images).numpy():
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


# --- detectors ---


class OCR:
    """Text in the image against the text that the prompt quotes, read by RapidOCR: 0 to 1.

    1 - d / n, with d the edit distance to the n quoted letters, at most n; upper case and spaces do not count, and a text
    that stands within what was read has distance 0 (arXiv:2505.05470).
    """

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        self.engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [text_similarity(quoted(prompt), self.read(image)) for image, prompt in zip(images, prompts, strict=True)]
        )

    def read(self, image: Tensor) -> str:
        """The text in an image (3, H, W), line after line."""
        pixels = to_bytes(image[None])[0].flip(-1).numpy()  # OpenCV's order of the colours
        return " ".join(self.engine(pixels).txts or ())


def text_similarity(wanted: str, found: str) -> float:
    from rapidfuzz.distance import Levenshtein

    wanted, found = ("".join(text.split()).casefold() for text in (wanted, found))
    distance = 0 if wanted in found else Levenshtein.distance(wanted, found)
    return 1 - min(distance / len(wanted), 1)


class Face:
    """Quality of the face in the image (pyiqa's topiq_nr-face, arXiv:2308.03060), 0 to 1; 0 where there is no face."""

    def __init__(self, device: str = "cpu") -> None:
        import pyiqa  # pyright: ignore[reportMissingImports]  # an extra

        with reading("reward: pyiqa could not fetch the weights of face", NotFoundError):
            self.metric = pyiqa.create_metric("topiq_nr-face", device=torch.device(device))

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self.quality(image) for image in images.float().clamp(0, 1)])

    def quality(self, image: Tensor) -> float:
        try:
            return self.metric(image[None]).item()
        except AssertionError as error:
            if "No face" not in str(error):
                raise
            return 0.0


class Hand(FrozenNetwork):
    """Confidence of the surest hand in the image, 0 to 1, by OWLv2 (arXiv:2306.09683), asked for "a human hand".

    The paper (arXiv:2311.15657) takes the surest box of a YOLO trained on hands; OWLv2 is free to use, and in transformers.
    """

    QUERY, MAX_BATCH = "a human hand", 16  # of 960 x 960 pixels

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        super().__init__(device)
        with refused(folder):
            self.processor = Owlv2Processor.from_pretrained(folder, local_files_only=True)
        self.model: Any = self.freeze(load_pretrained(Owlv2ForObjectDetection, folder))

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self.confidence(chunk) for chunk in images.split(self.MAX_BATCH)])

    def confidence(self, images: Tensor) -> Tensor:
        """(N,) of images (N, 3, H, W)."""
        inputs = self.processor(
            text=[[self.QUERY]] * len(images), images=list(to_bytes(images).numpy()), return_tensors="pt"
        )
        logits = self.model(**inputs.to(self.device, self.dtype)).logits
        return logits.float().sigmoid().flatten(1).amax(dim=1)
