"""Files and folders: read, locked, and written so that they are there whole or not at all; images with their labels."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, NotFoundError, StorageError, reading, safetensors_failure

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LOCK, HOLDER = ".lock", ".holder"  # in a folder that a process works in: the lock, and which process has it
MAX_IMAGE_PIXELS = 2**25  # larger images are not read: at 12 bytes a pixel this many take less than a GiB
LFS_POINTER = "version https://git-lfs"  # begins what git leaves in the place of a large file that was not fetched
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")  # end the names of files of weights
TORCH_STARTS = (b"PK", b"\x80")  # begin what torch.save writes: a zip file, formerly a pickle
KINDS = {"adapter": "an adapter", "unet": "a U-Net"}  # what messages call the file of an option
TEMPORARY = ".tmp"  # ends the name of what is not yet in its place


# --- reading ---


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        NotFoundError, InputError: the file is not there, or holds no JSON object.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {str(path)!r}")
    return _parse_object(path.read_bytes(), path)


def _parse_object(text: bytes, where: object) -> dict[str, Any]:
    with reading(f"{where}: not JSON", InputError):
        content = json.loads(text.decode())
    if not isinstance(content, dict):
        raise InputError(f"{where}: must hold a JSON object")
    return content


def read_text(path: Path, option: str) -> str:
    """The text of a file that an option names.

    Raises:
        InputError: it cannot be read, or is not UTF-8 text.
    """
    with reading(f"{option}: {str(path)!r} cannot be read", InputError):
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{option}: {str(path)!r} is not UTF-8 text (byte {error.start})") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; removes a last line that was cut off, which has no line end.

    Raises:
        InputError: another line holds no object; names the file and the line, and leaves the file as it is.
    """
    if not path.is_file():
        return []
    *ended, last = path.read_bytes().split(b"\n")
    lines = [_parse_object(text, f"{path}, line {i}") for i, text in enumerate(ended, 1) if text.strip()]
    if last:
        with contextlib.suppress(InputError):
            lines.append(_parse_object(last, path))
        with reading(f"{path}: not JSON", InputError):  # of NaN
            write_lines(path, lines)
    return lines


def locate(name: str | Path, option: str) -> Path:
    """The file or folder of an adapter or a U-Net; of a repository on the hub, its copy in the hub's cache.

    A name whose first part is a folder here, or which ends as weights do, is a path: the hub is not asked about a mistyped
    one. `option` is for messages.

    Raises:
        NotFoundError: there is neither such a path nor such a repository. ArtifactError: the file holds no weights.
    """
    path = Path(name)
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and path.suffix not in WEIGHT_SUFFIXES
    if path.is_file():
        with reading(f"{path}: refused as {KINDS[option]}"):
            check_content(path)
    if path.exists():
        return path
    if path.parent.exists() or not is_name:
        raise NotFoundError(f"{option}: there is no file or folder {str(name)!r}")
    with reading(f"{option}: there is no file or folder {str(name)!r}, and the hub does not give it", NotFoundError):
        return _fetch_weights(str(name))


def check_content(path: Path) -> None:
    """Check that a file may hold weights, by its first bytes; raises ValueError."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER.encode():
        raise ValueError("it is a git-lfs pointer and not the weights; fetch them with `git lfs pull`")
    if not start:
        raise ValueError("it is empty; fetch it anew")
    if path.suffix != ".safetensors" and not start.startswith(TORCH_STARTS):
        raise ValueError("it holds no weights: it is neither a .safetensors file nor one that torch.save wrote")


@functools.cache
def quiet_hub() -> None:
    """Keep the hub's client from printing each of its tries; its error says the same."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


@functools.cache
def _fetch_weights(name: str) -> Path:
    from huggingface_hub import snapshot_download

    quiet_hub()
    patterns = ["*.json", "*.safetensors", "*.bin"]
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*checkpoint*/*"]))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(path: Path) -> dict[str, Any]:
    """A file's or folder's name, and the SHA-256 of what is in it."""
    if path.is_file():
        return {"name": path.name, "sha256": sha256(path)}
    contents = sorted(file for file in path.rglob("*") if file.is_file())
    return {"name": path.name, "sha256": {file.relative_to(path).as_posix(): sha256(file) for file in contents}}


# --- writing ---


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, whatever happens to the machine."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(item, allow_nan=False) + "\n" for item in items))


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add an object to a file of JSON lines, which is not a link; raises OSError if it is one."""
    line = json.dumps(content, allow_nan=False) + "\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(line)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; the file or folder that is written there takes its place at the end.

    The new content is on the disk before it is moved. After an error `path` is as it was, and nothing is left beside it.

    Raises:
        OSError: storage.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY) as folder:
        temporary = Path(folder, path.name)
        with storage_errors(path):
            yield temporary
        for written in (*temporary.rglob("*"), temporary):
            open_to_umask(written)
            sync(written)
        take_place(temporary, path)
    sync(path.parent)


def take_place(temporary: Path, path: Path) -> None:
    """Move a file or folder to `path`; what was there is moved aside first, and comes back on failure.

    A file takes the place of another one at once.
    """
    if not os.path.lexists(path) or not (path.is_dir() or temporary.is_dir()):
        temporary.rename(path)
        return
    # Not beside `temporary`, whose folder is removed even if the old one cannot be moved back.
    place = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY))
    aside = place / path.name
    try:
        path.rename(aside)
        temporary.rename(path)
    except BaseException:
        if os.path.lexists(aside):
            aside.rename(path)
        place.rmdir()
        raise
    shutil.rmtree(place)


def remove_temporaries(folder: Path, *subfolders: str) -> None:
    """Remove what writings that were cut off have left in a folder and in its subfolders by glob patterns.

    A subfolder that a link leads to is another's, and stays as it is.
    """
    for place in (folder, *(path for pattern in subfolders for path in folder.glob(pattern))):
        if place.resolve().is_relative_to(folder.resolve()):
            for orphan in place.glob(f".*{TEMPORARY}"):
                if orphan.is_dir() and not orphan.is_symlink():
                    shutil.rmtree(orphan)
                else:
                    orphan.unlink()


def remove(path: Path) -> None:
    """Remove a folder or file; it is moved aside first, so that an interrupted removal leaves no valid checkpoint behind."""
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY))
    path.rename(doomed / path.name)
    shutil.rmtree(doomed)


def open_to_umask(path: Path) -> None:
    """Give a new file or folder the permissions of the umask; safetensors and tempfile make theirs the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    mode = path.stat().st_mode
    path.chmod(((0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask) | (mode & stat.S_ISGID))


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors says of the disk into an OSError, as every other writer raises.

    Raises:
        OSError: the disk refused.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        failure = safetensors_failure(error, path)
        if failure is None:
            raise
        raise failure from error


# --- images ---


@dataclass(frozen=True)
class SampledImage:
    """An image that `texforce sample` wrote.

    Attributes:
        system: `base` or `tuned`.
        prompt, seed: what it was drawn from.
        path: its PNG.
    """

    system: str
    prompt: str
    seed: int
    path: Path

    def open(self) -> Image:
        """The image, read from its file."""
        from PIL import Image

        return Image.open(self.path)


def next_number(folder: Path) -> int:
    """The number of the next image in a folder, after all that `write_images` numbered there."""
    found = [re.fullmatch(r"(\d{5,})(_base|_tuned)?", path.stem) for path in folder.glob("*.png")]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def write_images(
    folder: Path, images: Tensor, labels: Sequence[Mapping[str, Any]], first: int, ending: str = ""
) -> list[Path]:
    """Write images (N, 3, H, W) in [0, 1] as PNG, numbered from `first` on, with labels in their metadata."""
    make_folder(folder)
    paths = [folder / f"{first + i:05d}{ending}.png" for i in range(len(images))]
    for path, image, label in zip(paths, images, labels, strict=True):
        write_image(path, image, label)
    return paths


def write_image(path: Path, image: Tensor, label: Mapping[str, Any]) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG, with a label in its metadata."""
    from PIL import PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    for name, value in label.items():
        metadata.add_itxt(name, str(value))
    with replacing(path) as temporary:
        to_image(image).save(temporary, "png", pnginfo=metadata)


def to_image(image: Tensor) -> Image:
    """PIL's image of an image (3, H, W) in [0, 1]."""
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def read_image(path: Path) -> tuple[Tensor, dict[str, str]]:
    """An image (3, H, W) in [0, 1], and its label.

    Raises:
        ArtifactError: it is damaged.
    """
    import numpy as np
    import torch

    image = open_image(path)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div_(255)
    return pixels, dict(getattr(image, "text", {}))  # only PNG has it


def open_image(path: Path) -> Image:
    """PIL's image of a file, read whole.

    Raises:
        ArtifactError: it is damaged, or larger than anything that is drawn here.
    """
    from PIL import Image

    with (
        reading(f"{path}: not an image that can be read; delete it and run the command again to draw it anew"),
        Image.open(path) as image,
    ):
        if image.width * image.height > MAX_IMAGE_PIXELS:  # by the header: decoding it could take all memory
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        image.load()
        return image


# --- folders ---


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written to, without making it.

    Raises:
        InputError: a part of its path is a file. OSError: one is not to be written to.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(f"output_dir: {str(parent)!r} is a file, and no folder to write into; choose another")
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


def check_unused(folder: Path) -> None:
    """Check that a training can begin in a folder.

    Raises:
        InputError: there is more in it than a training leaves that was refused before its first image.
    """
    known = {LOCK, HOLDER}
    if (folder / LOCK).is_file() and not any((folder / "grids").glob("*")):
        known |= {"config.json", "grids"}
    if any(path.name not in known and path.suffix != TEMPORARY for path in folder.glob("*")):
        is_run = (folder / "config.json").is_file()
        run = f", go on with the run in it by --resume {folder}, or begin anew by --overwrite" if is_run else ""
        raise InputError(f"output_dir: {str(folder)!r} is not empty; choose another folder{run}")


def make_folder(folder: Path) -> None:
    """Make a folder for outputs and those above it, if they are missing.

    Raises:
        OSError, StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # as in /proc; elsewhere what is not there is no fault of the disk
        raise StorageError(f"storage: {error.strerror}: {folder}") from error


def check_new_folder(folder: Path) -> None:
    """Check that a command can begin in a folder; raises as `check_writable` and `check_unused`."""
    check_writable(folder)
    check_unused(folder)


def check_written(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files in a folder, after a look that a command wrote all of them; `patterns` are of their names in the folder.

    Raises:
        InputError: there is something else in the folder, or a link.
    """
    written = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    known = set(written)
    for path in folder.rglob("*"):
        is_ours = path in known or path.name in (LOCK, HOLDER) or path.suffix == TEMPORARY
        if path.is_symlink() or not (path.is_dir() or is_ours):
            raise InputError(
                f"output_dir: {str(path)!r} was not written by texforce; it is not overwritten, so choose another folder or "
                "move it away"
            )
    return written


def remove_written(folder: Path, patterns: Sequence[str]) -> None:
    """Remove what a command wrote into its folder; what the first pattern names goes last, since the folder is known by it.

    Raises:
        InputError: there is something else in the folder, or a link; nothing is removed then.
    """
    for path in reversed(check_written(folder, patterns)):
        path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # one that is not empty holds a lock, or another's temporary file
            path.rmdir()


@contextlib.contextmanager
def locked(folder: Path, check: Callable[[], object]) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is missing and `check` passes, and goes if it stays empty.

    `check` runs before anything is written into a folder that holds no lock yet, and again with the lock held.

    Raises:
        InputError: another process works in it, or its lock or a folder in it is a link. Whatever the check raises.
    """
    from filelock import FileLock, Timeout

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if not (folder / LOCK).exists():
        check()
        make_folder(folder)
    check_writable(folder)
    for path in (folder / LOCK, *folder.glob("*/"), *folder.glob("images/*/")):
        if path.is_symlink():  # a folder that came from others could lead anywhere
            raise InputError(f"output_dir: {str(path)!r} is a link, through which nothing is written; remove it")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"output_dir: {str(folder)!r} is in use by {_holder(folder)}") from None
    try:
        write_text(folder / HOLDER, f"process {os.getpid()} on {platform.node()}")
        check()
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        if made and os.listdir(folder) == [LOCK]:  # bad input was found with the lock held
            (folder / LOCK).unlink()
            with contextlib.suppress(OSError):  # another process is faster
                for path in made:
                    path.rmdir()
        lock.release()


def _holder(folder: Path) -> str:
    """The process that says it works in a folder."""
    path = folder / HOLDER
    if path.is_symlink() or not path.is_file():
        return "another process"
    return path.read_text(errors="replace")[:200]
