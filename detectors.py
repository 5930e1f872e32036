"""Scorers that look for something in the image: the text that the prompt quotes, a face, a hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce.checkpoints import load_pretrained, refused
from texforce.scorers import FrozenNetwork, to_bytes


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


def quoted(prompt: str) -> str:
    """The text in a prompt's quotation marks.

    Raises:
        ValueError: it has none.
    """
    texts = [group for match in re.findall(r'"([^"]+)"|“([^”]+)”|(?<!\w)\'([^"]+?)\'(?!\w)', prompt) for group in match]
    text = " ".join(filter(str.strip, texts))
    if not text:
        raise ValueError(f"prompts: the ocr reward needs the text to be drawn in quotation marks, which {prompt!r} lacks")
    return text


def text_similarity(wanted: str, found: str) -> float:
    from rapidfuzz.distance import Levenshtein

    wanted, found = ("".join(text.split()).casefold() for text in (wanted, found))
    distance = 0 if wanted in found else Levenshtein.distance(wanted, found)
    return 1 - min(distance / len(wanted), 1)


class Face:
    """Quality of the face in the image (pyiqa's topiq_nr-face, arXiv:2308.03060), 0 to 1; 0 where there is no face."""

    def __init__(self, device: str = "cpu") -> None:
        import pyiqa

        try:
            self.metric = pyiqa.create_metric("topiq_nr-face", device=torch.device(device))
        except OSError as error:
            raise FileNotFoundError(f"reward: pyiqa could not fetch the weights of face: {error}") from error

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
