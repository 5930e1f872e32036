"""What `--reward` and `--relabel` may name, and whether it is there: read before PyTorch is loaded, which takes seconds.

rewards.py makes scorers of it. Read top to bottom: passwords in URLs, mixtures, what is checked.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from urllib.parse import urlsplit

from .errors import InputError, NotFoundError, near

# The names of rewards.CATALOGUE.
REWARDS = (
    "hps", "hps-v2", "imagereward", "pickscore", "aesthetic", "clip", "ocr", "face", "hand", "alignment", "alignment_exact",
    "jpeg", "incompress",
)  # fmt: skip
NO_REWARD = "none"  # what --reward takes where relabelled images alone teach
WORLD = "world"  # what --relabel takes for the tiny world's own captions
URL = ("http://", "https://")

# --- passwords ---

_PASSWORD = re.compile(r"(https?://)([^/?#:]*):([^/?#]*)@([^/?#,=@]*)")  # in a URL, between the user's name and the host
_passwords: dict[str, str] = {}  # by user@host; in no record of options, so that nothing writes or prints them


def without_passwords(spec: str) -> str:
    """What `--reward` takes, its URLs without their passwords, which `password_of` knows from now on in this process."""
    for _, user, password, host in _PASSWORD.findall(spec):
        _passwords[f"{user}@{host}"] = password
    return _PASSWORD.sub(r"\1\2@\4", spec)


def password_of(place: str) -> str | None:
    """The password that a URL with this place, user@host, was given with."""
    return _passwords.get(place)


# --- mixtures ---


def parse_mixture(spec: str, option: str = "reward") -> dict[str, float]:
    """Names and weights of `hps=1,aesthetic=0.1`; a name, a file's function or a URL alone has weight 1.

    Raises:
        InputError: a name comes twice, or a weight is no finite number other than 0.
    """
    spec = without_passwords(spec)
    if "," not in spec and ("=" not in spec or spec.startswith(URL)):
        parts = [(spec, "1")]
    else:
        parts = [(name.strip(), weight) for name, _, weight in (part.rpartition("=") for part in spec.split(","))]
    weights: dict[str, float] = {}
    for name, text in parts:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight) or weight == 0:
            raise InputError(f"{option}: a mixture is NAME=WEIGHT,NAME=WEIGHT with numbers other than 0, not {spec!r}")
        if name in weights:
            raise InputError(f"{option}: {name!r} comes twice in {spec!r}")
        weights[name] = weight
    return weights


def functions_of(spec: str) -> list[str]:
    """The parts of a reward that are functions in a file."""
    return [name for name in parse_mixture(spec) if ":" in name and not name.startswith(URL)]


def caption_files(spec: str | None) -> list[Path]:
    """The file of the function that `--relabel` names, if it names one."""
    return [Path(spec.rpartition(":")[0])] if spec and spec != WORLD else []


# --- what is checked ---


def check_reward(spec: str, option: str = "reward") -> None:
    """Check that a reward exists, without loading it.

    Raises:
        InputError: a name is unknown, a weight unusable, or a file has no such function.
        NotFoundError: the file of a function is not there.
    """
    for name in parse_mixture(spec, option):
        if name.startswith(URL):
            _check_url(name, option)
        elif ":" in name or Path(name).is_file():
            _check_function(name, option)
        elif name not in REWARDS:
            raise InputError(
                f"{option}: unknown name {name!r}; known are {', '.join(REWARDS)}, path/to/file.py:function and "
                f"http://...{near(name, REWARDS)}"
            )


def check_captioner(spec: str) -> None:
    """Check that what `--relabel` names exists.

    Raises:
        InputError: it is neither `world` nor a function in a file. NotFoundError: the file is not there.
    """
    if spec == WORLD:
        return
    if ":" not in spec and not Path(spec).is_file():
        raise InputError(f"relabel: must be world or path/to/file.py:function, not {spec!r}{near(spec, [WORLD])}")
    _check_function(spec, "relabel")


def _check_url(url: str, option: str) -> None:
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and "@" not in parts.path + parts.query + parts.fragment
        usable = usable and parts.password is None  # it is kept elsewhere
    except ValueError:  # the port is no number
        usable = False
    if not usable:
        url = re.sub("//.*@", "//", url)  # before the @ there may be a password with a slash
        raise InputError(f"{option}: {url!r} is no URL; give http://HOST:PORT/score, with %XX for signs within a password")


def _check_function(name: str, option: str) -> None:
    path, _, attribute = name.rpartition(":")
    if ":" not in name:
        raise InputError(f"{option}: {name!r} is a file; name a function in it, as {name}:function")
    if not Path(path).is_file():
        raise NotFoundError(f"{option}: there is no file {path!r}; a function of your own is path/to/file.py:function")
    found = _names_in(Path(path))
    if found is not None and attribute not in found:
        raise InputError(f"{option}: {path!r} has no function {attribute!r}{near(attribute, found)}")


def _names_in(path: Path) -> list[str] | None:
    """The names that a Python file may bind, without running it; None where only running it could tell."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # its import says what is wrong with it
    bound = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    bound += [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound += [(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)]
    computed = {"*", "__getattr__", "globals", "setattr", "exec"}
    used = computed & {node.id for node in nodes if isinstance(node, ast.Name)}
    return None if computed & set(bound) or used else list(dict.fromkeys(bound))
