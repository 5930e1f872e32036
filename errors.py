"""The errors that texforce expects, each with its exit code, and "did you mean"; anything else is a bug."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# Errors of the disk or of process limits: they do not depend on which file is read.
STORAGE = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOSPC", "EPERM", "EROFS", "ESTALE")
    if hasattr(errno, name)
}
# Error numbers of a place for outputs, which an option names: another place would do.
OUTPUT_PLACE = {errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}
# What libraries advise to switch off or on, and what a message says instead.
_COULD_RUN_CODE = "it is not a file of tensors alone, and reading it could run code"
SAFETY_SWITCHES = dict.fromkeys(
    ("weights_only", "allow_pickle", "use_safetensors", "serious vulnerability"), _COULD_RUN_CODE
) | {"trust_remote_code": "it asks to run code of its author, which texforce never does"}


class TexforceError(Exception):
    """An expected error; its message names what the user can change."""

    exit_code = 1


class InputError(TexforceError, ValueError):
    """Bad input or usage: an option, a file or a prompt that cannot be used."""

    exit_code = 2


class NotFoundError(InputError, FileNotFoundError):
    """What an option names is not there: a file, a folder, a model, or the hub."""


class ArtifactError(TexforceError):
    """A file of weights or images that is damaged, foreign or unsafe, and was refused."""

    exit_code = 3


class DivergedError(TexforceError):
    """Training went wrong numerically and was stopped."""

    exit_code = 4


class StorageError(TexforceError):
    """The disk refused to read or write."""

    exit_code = 5


class OutOfMemory(TexforceError):
    """The device or the machine has no memory left."""

    exit_code = 5


class ProcessLost(TexforceError):
    """Another process of the run has ended, or cannot be reached any more."""

    exit_code = 5


class RewardError(TexforceError):
    """A scorer failed or broke the protocol."""

    exit_code = 6


@contextlib.contextmanager
def reading(what: object, kind: type[TexforceError] = ArtifactError) -> Iterator[None]:
    """Raise `kind` for whatever a library raises while it reads a file or asks a service of others.

    The message is `what`, a colon and the cause's first line. Lists of exception classes do not do: what a damaged file can
    make its reader raise is without end. Expected errors, errors of the disk and a lack of memory pass unchanged.
    """
    try:
        yield
    except TexforceError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_storage(error):
            raise
        failure = safetensors_failure(error, what)
        if failure is not None and (is_out_of_memory(failure) or is_storage(failure)):
            raise failure from error
        raise kind(f"{what}: {cause(error)}") from error


@contextlib.contextmanager
def naming_origins(origins: Mapping[str, str]) -> Iterator[None]:
    """Add to an error about an option, which its message begins with, the file of `origins` that the value comes from."""
    try:
        yield
    except TexforceError as error:
        name = str(error).partition(":")[0]
        if name not in origins:
            raise
        raise type(error)(f"{error} (it comes from {origins[name]}; --{name.replace('_', '-')} overrides it)") from error


def cause(error: BaseException) -> str:
    """The first line of an exception's text, or the first two; never a library's advice to switch a safety off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for switch, answer in SAFETY_SWITCHES.items():
        if re.search(rf"(?<![\w/\\]){switch}(?![\w/\\]|\.\w)", str(error)):  # a word, and no part of a path
            return answer
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not lines or isinstance(error, KeyError):
        return f"{type(error).__name__} {' '.join(lines)[:300]}".rstrip()
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # torch names the tensors below a heading
    return first[:300]


def near(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'hps'?" if a known one is nearly that."""
    names = {each.lower(): each for each in known}
    found = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def origin(error: BaseException) -> BaseException:
    """The exception that an exception goes back to: of a client's failed connection the system's own error."""
    while before := error.__cause__ or error.__context__:
        error = before
    return error


def describe(error: BaseException) -> str:
    """Class and message of an exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe_in(error: BaseException, file: str) -> str:
    """Class and message of an exception, and the last line of a Python file that it went through."""
    path = Path(file).resolve()
    stack = traceback.walk_tb(error.__traceback__)
    lines = [number for frame, number in stack if Path(frame.f_code.co_filename).resolve() == path]
    return describe(error) + (f" ({path.name}, line {lines[-1]})" if lines else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on the CPU, and in a GPU's libraries, torch has no class for that."""
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    named = type(error).__name__ == "OutOfMemoryError"  # torch's; this file does not import torch
    numbered = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return named or numbered or isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def is_storage(error: BaseException) -> bool:
    """Whether an exception is an error of the disk or of the process, which no other file would mend."""
    return isinstance(error, OSError) and error.errno in STORAGE


def safetensors_failure(error: BaseException, file: object) -> OSError | None:
    """The OSError that a SafetensorError of a file stands for, which has the error number only in its text; or None."""
    code = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(code[1]), os.strerror(int(code[1])), str(file)) if code else None


def expected(error: BaseException) -> TexforceError | None:
    """The expected error that an exception is or stands for; None for a bug."""
    if isinstance(error, TexforceError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory ({str(error).partition(chr(10))[0]})")
    if isinstance(error, OSError) and error.errno in STORAGE | OUTPUT_PLACE:
        file = f": {error.filename}" if error.filename else ""
        return StorageError(f"storage: {error.strerror or error}{file}")
    return None
