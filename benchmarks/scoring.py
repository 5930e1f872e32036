"""Speed of the scorers, and how far a batch's scores are from those of single images: `python benchmarks/scoring.py`.

The networks have their published architectures and random weights, so nothing is downloaded. On CUDA they compute in half
precision, and how far that is from float32 is measured too. So is how far the preprocessing of training, on floats, is from
that of the scorers' own code, on 8 bits: in levels of 255, and in scores. `face` is left out, as pyiqa fetches its own
weights, and so is what judges the sentences of the tiny world only. The JSON file is written after each scorer, and the
table shows what was measured even if a later scorer fails.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from texforce import files, reward_specs, rewards, scorers, weights, world

NAMES = [name for name, entry in reward_specs.CATALOGUE.items() if name != "face" and entry.check_prompt is not world.parse]
CLIP_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # vision tower, text tower, width of the features
    "pickscore": (
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        1024,
    ),
    "aesthetic": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        768,
    ),
    "clip": ({"patch_size": 32}, {}, 512),
}


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = 0.02 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            tensors[name] += 1
        elif name.endswith("logit_scale"):
            tensors[name] = torch.tensor(4.6052)
    return tensors


def random_fill(model: nn.Module, tensors: object, path: Path) -> None:
    model.load_state_dict(random_weights(model), strict=False, assign=True)


def random_model(name: str) -> Callable[..., nn.Module]:
    """Stands in for weights.load_pretrained."""

    def load(cls: Any, folder: Path) -> Any:
        from transformers import CLIPConfig

        if name == "hand":
            text = {"max_position_embeddings": 24}  # not 16: the tiny model's tokenizer pads to 24
            return cls(cls.config_class(vision_config={"image_size": 960}, text_config=text))
        vision, text, width = CLIP_SIZES[name]
        model = weights.build_empty(cls, CLIPConfig(vision_config=vision, text_config=text, projection_dim=width))
        random_fill(model, None, folder)
        return model

    return load


def load(name: str, device: str, folder: Path) -> rewards.Scorer:
    """A scorer with random weights: only the source of its weights is replaced."""
    from transformers import CLIPTokenizer, Owlv2ImageProcessor, Owlv2Processor

    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circles"]
    words += [f"[unused{i}]" for i in range(99, 99 + 30522 - len(words))]  # as many as bert-base-uncased has
    (folder / "vocab.txt").write_text("\n".join(words))
    if name == "hand":
        tokenizer = CLIPTokenizer.from_pretrained(reward_specs.EMBEDDED_HPS.parent / "tokenizer")
        Owlv2Processor(Owlv2ImageProcessor(), tokenizer).save_pretrained(folder)
    with (
        mock.patch.object(rewards, "find_weights", return_value=folder),
        mock.patch.multiple(
            scorers,
            read_tensors=lambda path: {},
            blip_tensors=lambda *_: dict.fromkeys(("vision", "text", "head")),
            fill=random_fill,
            load_pretrained=random_model(name),
        ),
    ):
        return rewards.load_reward(name, device, {}).parts[name]


def timed(call: Callable[[], Tensor], device: str, seconds: float = 3.0) -> tuple[float, Tensor]:
    """Seconds a call takes, over as many as fit into some seconds, and its scores."""
    number, start = 0, time.perf_counter()
    while number == 0 or time.perf_counter() - start < seconds:
        scores = call().cpu()
        if device != "cpu":
            torch.cuda.synchronize()
        number += 1
    return (time.perf_counter() - start) / number, scores


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        scorer = load(name, options.device, Path(folder))
    coarse = torch.rand(options.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (options.resolution,) * 2, mode="bicubic").clamp(0, 1).to(options.device)
    prompts = [f'{i % 4} red circles that say "red"' for i in range(options.batch_size)]
    each = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]).cpu() for i in range(4)])  # and warms up
    single, _ = timed(lambda: scorer(images[:1], prompts[:1]), options.device)
    batch, scores = timed(lambda: scorer(images, prompts), options.device)
    result = {"images_per_s_1": 1 / single, f"images_per_s_{options.batch_size}": options.batch_size / batch}
    result |= {"batch_deviation": (scores[:4] - each).abs().max().item(), "deviation_over_images": scores.std().item()}
    if isinstance(scorer, scorers.NetworkScorer):
        given = (images * 255).round() / 255  # as they lie in an evaluation's folder
        floats = scorer(given, prompts)
        scorer.exact = True
        result["exact_deviation"] = (scorer(given, prompts) - floats).abs().max().item()
    if options.device != "cpu" and isinstance(scorer, scorers.NetworkScorer):
        with tempfile.TemporaryDirectory() as folder:
            exact = load(name, "cpu", Path(folder))(images[:4].cpu(), prompts[:4])
        result["half_precision_deviation"] = (scores[:4] - exact).abs().max().item()
    return result


def pixel_deviations(resolution: int, size: int = 224) -> dict[str, dict[str, float]]:
    """How far the two kinds of preprocessing are from each other, in levels of 255, over images of three kinds."""
    noise = torch.randint(256, (8, 3, resolution, resolution), generator=torch.Generator().manual_seed(0)) / 255
    coarse = F.interpolate(noise[..., :8, :8], (resolution,) * 2, mode="bicubic").clamp(0, 1)
    edges = F.interpolate(noise[..., :8, :8].round(), (resolution,) * 2, mode="nearest")
    kinds = {"smooth": (coarse * 255).round() / 255, "edges": edges, "noise": noise}
    pairs = {
        "crop": (scorers.crop_to_square, scorers.crop_to_square_exactly),
        "pad": (scorers.pad_to_square, scorers.pad_to_square_exactly),
    }
    deviations = {}
    for name, (on_floats, exactly) in pairs.items():
        for kind, images in kinds.items():
            levels = 255 * (on_floats(images, size) - exactly(images, size)).abs()
            deviations[f"{name}, {kind}"] = {"mean": levels.mean().item(), "largest": levels.max().item()}
    return deviations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    usable = [name for name in NAMES if not reward_specs.missing_packages(name)]
    parser.add_argument("--names", nargs="+", choices=NAMES, default=usable)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU x{torch.get_num_threads()}"
    results: dict[str, Any] = {"machine": where, "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__}
    results |= {"resolution": options.resolution, "levels": pixel_deviations(options.resolution), "scorers": {}}
    print(
        "levels of 255",
        {name: {k: float(f"{v:.3g}") for k, v in found.items()} for name, found in results["levels"].items()},
    )
    try:
        for name in options.names:
            results["scorers"][name] = measure(name, options)
            print(name, {key: float(f"{value:.3g}") for key, value in results["scorers"][name].items()}, flush=True)
            if options.json:
                files.write_json(options.json, results)
    finally:
        show(where, results)


def show(where: str, results: dict[str, Any]) -> None:
    """Print the table of what was measured."""
    columns = list(dict.fromkeys(key for result in results["scorers"].values() for key in result))
    table = Table("scorer", *columns, title=f"{where}, images of {results['resolution']} pixels")
    for name, result in results["scorers"].items():
        table.add_row(name, *(f"{result[key]:.3g}" if key in result else "" for key in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
