"""What a run leaves behind: its folder, description, figures, model card and trackers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import texforce
from texforce.checkpoints import ArtifactError
from texforce.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor


def check_writable(folder: Path) -> None:
    """See that a folder can be made and written to, without making it.

    Raises:
        OSError: a part of its path is a file, or not to be written to.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


RESULT = "result.json"
LOCK, HOLDER = ".lock", ".holder"  # of a run's folder, and who has it
ADAPTER = ".adapter-"  # begins the name of the folder in which an adapter is written first


def check_folder(name: str, go_on: bool = False) -> Path:
    """See that a training can make its output folder, or go on in it, without making it.

    Raises:
        ValueError: it is not empty and holds no run to go on with. OSError: it cannot be made or written to.
    """
    folder = Path(name)
    check_writable(folder)
    ours = go_on and (folder / "config.json").is_file()
    foreign = [path for path in folder.glob("*") if path.name not in (LOCK, HOLDER) and path.suffix != ".tmp"]
    if foreign and not ours:
        raise ValueError(
            f"output_dir: {name!r} is not empty; choose another folder, or go on with the run in it by --resume {name}"
        )
    return folder


def check_room(folder: Path, config: TrainConfig) -> None:
    """See that there is room for a checkpoint, before any model is loaded.

    Raises:
        OSError: there is not.
    """
    probe = folder / ".room.tmp"
    try:
        probe.write_bytes(bytes(checkpoint_size(config)))
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path, check: Callable[[], object]) -> Iterator[None]:
    """Within it, no other process holds the folder, which is made if a check of it passes.

    Raises:
        ValueError: one does. Whatever the check raises.
    """
    from filelock import FileLock, Timeout

    if not (folder / LOCK).exists():  # nothing is to be written into a folder that is not ours
        check()
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = (folder / HOLDER).read_text() if (folder / HOLDER).is_file() else "another process"
        raise ValueError(f"output_dir: {str(folder)!r} is in use by {holder}") from None
    try:
        write_text(folder / HOLDER, f"process {os.getpid()} on {platform.node()}")
        check()
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def checkpoint_size(config: TrainConfig) -> int:
    """About the bytes of a checkpoint, without knowing the model: for rank 16 one megabyte for tiny, else 16 or 64."""
    return config.rank * 2**16 * (1 if config.model == "tiny" else 16 if config.target == "text-encoder" else 64)


def open_to_umask(path: Path) -> None:
    """Give a new file or folder the permissions of the umask; safetensors and tempfile make theirs the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    mode = path.stat().st_mode
    path.chmod(((0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask) | (mode & stat.S_ISGID))


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path whose file takes the place of another one at the end; after an error there is neither."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Within it, what safetensors says of the disk is an OSError, as from everyone else.

    Raises:
        OSError: what is written there could not be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whatever happens to the machine."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)


def sync(path: Path) -> None:
    """See that a file, or a folder's list of files, is on the disk and not only on its way."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_result(output_dir: Path, config: TrainConfig, epochs: Sequence[Mapping[str, Any]], result: dict[str, Any]) -> None:
    """The reward curve, the model card and the result of a finished run; the last one says that it is."""
    write_curve(output_dir / "curve.png", epochs, config.reward)
    write_text(output_dir / "README.md", model_card(config, result))
    write_json(output_dir / RESULT, result)


@contextlib.contextmanager
def metrics(
    config: TrainConfig, output_dir: Path, epochs: Sequence[Mapping[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes an epoch's record to metrics.jsonl and to the tracker that --report-to names.

    The file begins with the epochs that there are: what a run that was killed wrote after its checkpoint is gone.
    """
    path = output_dir / "metrics.jsonl"
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in epochs))
    with path.open("a") as file, tracker(config, output_dir) as track:

        def log(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            track(record)

        yield log


@contextlib.contextmanager
def tracker(config: TrainConfig, output_dir: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """accelerate's tracker, as a function of an epoch's record."""
    if config.report_to == "none":
        yield lambda record: None
        return
    from accelerate import tracking

    name = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "trackio": "TrackioTracker"}[config.report_to]
    arguments = {"logging_dir": output_dir} if config.report_to == "tensorboard" else {}
    kept = getattr(tracking, name)("texforce", **arguments)
    kept.start()

    def track(record: dict[str, Any]) -> None:
        flat = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for group in ("heldout", "parts"):
            flat |= {f"{group}/{name}": value for name, value in record.get(group, {}).items()}
        kept.log(flat, step=record["epoch"])

    try:
        yield track
    finally:
        kept.finish()


def describe_run(config: TrainConfig, device: str, num_parameters: int) -> dict[str, Any]:
    """What one needs to repeat a run."""
    return {
        "seed": config.seed,
        "model": config.model,
        "reward": config.reward,
        "target": config.target,
        "preset": config.preset,
        "device": device,
        "num_parameters": num_parameters,
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Of this project and of what decides its numbers."""
    packages = ("torch", "diffusers", "transformers", "peft", "open_clip_torch")
    own = {"texforce": texforce.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def commit() -> str | None:
    """The commit of this checkout; None where the package is installed from a wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def model_card(config: TrainConfig, result: dict[str, Any]) -> str:
    """README.md of the adapter, in the hub's format."""
    rows = [f"| {name} | {value['base']:.4f} | {value['tuned']:.4f} |" for name, value in result["heldout"].items()]
    return "\n".join(
        [
            "---", "library_name: peft", "tags: [texforce, text-to-image, lora, reinforcement-learning]", "---",
            f"# TexForce adapter for {config.model}", "",
            f"LoRA (rank {config.rank}) on the {config.target}, trained by PPO (arXiv:2311.15657) on "
            f"`{config.reward}`: {result['num_images']} images, seed {config.seed}, "
            f"{result['seconds']:.0f} s on {result['device']}.",
            "", "Held-out prompts, base and tuned from the same noise:", "",
            "| measure | base | tuned |", "|---|---|---|", *rows, "",
            "Every setting is in `config.json`, every figure in `result.json` and `metrics.jsonl`.", "",
        ]
    )  # fmt: skip


def write_grid(path: Path, prompts: Sequence[str], columns: Mapping[str, Tensor], cell: int = 128) -> None:
    """A PNG with a row for each of N prompts and a column for each system's images (N, 3, H, W) in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    font, label = ImageFont.load_default(13), 18
    width = len(columns) * (cell + 4) + 4
    per_side = max(1, (len(prompts) + 3) // 4)  # four blocks side by side
    canvas = Image.new("RGB", (4 * (width + 12), label + per_side * (cell + label + 6)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        left, top = (i // per_side) * (width + 12) + 6, label + (i % per_side) * (cell + label + 6)
        draw.text((left + 4, top), _shorten(prompt, font, width), fill="black", font=font)
        for k, (name, images) in enumerate(columns.items()):
            pixels = (images[i].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            method = Image.Resampling.NEAREST if pixels.shape[0] < cell else Image.Resampling.LANCZOS
            x = left + 4 + k * (cell + 4)
            canvas.paste(Image.fromarray(pixels).resize((cell, cell), method), (x, top + label))
            if i % per_side == 0:
                draw.text((x, 2), name, fill="grey", font=font)
    canvas.save(path)


def _shorten(text: str, font: Any, width: int) -> str:
    """What of a text fits into a width, without control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    length = next(n for n in range(len(text), -1, -1) if font.getlength(text[:n]) <= width)
    return text[:length]


def write_curve(path: Path, epochs: Sequence[Mapping[str, Any]], reward: str) -> None:
    """A PNG of the training reward over images, and of the held-out reward where it was measured, first before training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="images", ylabel=f"reward: {reward}")
    images, means = zip(*((record["num_images"], record["reward_mean"]) for record in epochs[1:]), strict=True)
    axes.plot(images, means, color="tab:blue", alpha=0.5, label="training prompts")
    measured = [record for record in epochs if "heldout" in record]
    axes.plot(
        [record["num_images"] for record in measured],
        [record["heldout"][reward] for record in measured],
        "o-", color="tab:orange", label="held-out prompts",
    )  # fmt: skip
    if measured and "alignment_exact" in measured[0]["heldout"]:
        right = axes.twinx()
        right.set(ylabel="held-out prompts fully right", ylim=(0, 1))
        right.plot(
            [record["num_images"] for record in measured],
            [record["heldout"]["alignment_exact"] for record in measured],
            "s--", color="tab:green", label="held-out, fully right",
        )  # fmt: skip
        right.legend(loc="lower right")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def write_images(folder: Path, images: Tensor, labels: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write images (N, 3, H, W) in [0, 1] as PNG, numbered on from those in the folder, with labels in their metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()), default=-1)
    paths = [folder / f"{first + i:05d}.png" for i in range(len(images))]
    for path, image, label in zip(paths, images, labels, strict=True):
        write_image(path, image, label)
    return paths


def write_image(path: Path, image: Tensor, label: Mapping[str, Any]) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG, with a label in its metadata."""
    from PIL import Image, PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    for name, value in label.items():
        metadata.add_itxt(name, str(value))
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with replaced(path) as temporary:
        Image.fromarray(pixels).save(temporary, "png", pnginfo=metadata)


def read_image(path: Path) -> tuple[Tensor, dict[str, str]]:
    """An image (3, H, W) in [0, 1], and its label.

    Raises:
        ArtifactError: it is damaged.
    """
    import numpy as np
    import torch

    image = open_image(path)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return pixels, dict(getattr(image, "text", {}))  # only PNG has it


def open_image(path: Path) -> Any:
    """An image as PIL has it, read whole.

    Raises:
        ArtifactError: it is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        raise ArtifactError(f"{path}: not an image that can be read; remove it, and it is drawn again") from error
