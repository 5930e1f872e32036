"""What `--reward` and `--relabel` may name, and whether it is there: read before PyTorch is loaded, which takes seconds.

rewards.py makes scorers of it. Read top to bottom: the catalogue, passwords in URLs, mixtures, what the parts of a reward
are, their weights, what is checked.

To add a scorer: an entry in CATALOGUE here, its weights in hub.HUB, its class in scorers.py, a line in rewards.MAKERS, and
an extra in pyproject.toml if it needs a package.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from . import world
from .errors import InputError, NotFoundError, describe, near
from .hub import HUB, given_weights, is_fetched
from .presets import EMBEDDED

NO_REWARD = "none"  # what --reward takes where relabelled images alone teach
WORLD = "world"  # what --relabel takes for the tiny world's own captions
URL = ("http://", "https://")
EMBEDDED_HPS = Path(__file__).parent / "tiny" / "hps.pt"

# --- the catalogue ---


@dataclass(frozen=True)
class Entry:
    """What to know of a scorer before choosing it."""

    measures: str
    scale: str  # higher is better for all
    weights: tuple[str, ...] = ()  # names that hub.HUB and --reward-checkpoint know
    licence: str = "-"  # the weights' licence, or the packages' where there are none
    packages: tuple[str, ...] = ()  # that the extra of the scorer's name installs
    gradients: bool = False  # whether its `with_gradients` carries them to the images
    features: bool = False  # whether it has `image_features`
    check_prompt: Callable[[str], object] = lambda prompt: None  # raises InputError for a prompt it cannot judge


def quoted(prompt: str) -> str:
    """The text in a prompt's quotation marks.

    Raises:
        InputError: it has none.
    """
    texts = [group for match in re.findall(r'"([^"]+)"|“([^”]+)”|(?<!\w)\'([^"]+?)\'(?!\w)', prompt) for group in match]
    text = " ".join(filter(str.strip, texts))
    if not text:
        raise InputError(f"prompts: the ocr reward needs the text to be drawn in quotation marks, which {prompt!r} lacks")
    return text


CATALOGUE = {
    "hps": Entry(
        "human preference, HPSv2.1", "cosine, -1 to 1; papers show it x100", ("hps",), "Apache-2.0", gradients=True,
        features=True,
    ),
    "hps-v2": Entry(
        "human preference, HPSv2", "cosine, -1 to 1; papers show it x100", ("hps-v2",), "Apache-2.0", gradients=True,
        features=True,
    ),
    "imagereward": Entry(
        "human preference", "mean 0, deviation 1 on its data", ("imagereward", "imagereward-tokenizer"), "Apache-2.0",
        gradients=True,
    ),
    "pickscore": Entry(
        "human preference", "about 100 x cosine; mostly 18 to 23", ("pickscore",), "MIT", gradients=True, features=True
    ),
    "aesthetic": Entry(
        "beauty; ignores the prompt", "about 1 to 10", ("aesthetic", "aesthetic-clip"), "Apache-2.0, MIT",
        gradients=True, features=True,
    ),
    "clip": Entry(
        "agreement with the prompt, ViT-B/32", "2.5 x cosine, 0 to 2.5, as CLIPScore", ("clip",), "MIT", gradients=True,
        features=True,
    ),
    "ocr": Entry(
        "the prompt's quoted text, read off the image", "0 to 1", licence="Apache-2.0",
        packages=("rapidocr", "onnxruntime", "rapidfuzz"), check_prompt=quoted,
    ),
    "face": Entry(
        "quality of the face", "0 to 1; 0 without a face", licence="non-commercial (PolyForm, S-Lab)", packages=("pyiqa",)
    ),
    "hand": Entry("confidence of the surest hand", "0 to 1", ("hand",), "Apache-2.0"),
    "alignment": Entry("the share of a tiny world's sentence that is drawn", "0 to 1", check_prompt=world.parse),
    "alignment_exact": Entry("1 where all of such a sentence is drawn", "0 or 1", check_prompt=world.parse),
    "jpeg": Entry("small files", "kB as JPEG, negated"),
    "incompress": Entry("large files", "kB as JPEG"),
}  # fmt: skip
REWARDS = tuple(CATALOGUE)


def explain(measures: Iterable[str], has_own_hps: bool) -> str:
    """What measures are, as far as they have names of the catalogue; `has_own_hps` where hps is the tiny world's scorer."""
    known = {name: entry.measures for name, entry in CATALOGUE.items()} | {"diversity": "how unlike a prompt's images are"}
    if has_own_hps:
        known["hps"] = "preference by the tiny world's own scorer, which is not HPSv2.1"
    return "; ".join(f"{name}: {known[name]}" for name in measures if name in known)


def missing_packages(name: str) -> list[str]:
    """The packages of a scorer that are not installed."""
    return [package for package in CATALOGUE[name].packages if importlib.util.find_spec(package) is None]


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


# --- what the parts of a reward are ---


def resizes(spec: str) -> bool:
    """Whether a part of a reward is a network of scorers.py, which resizes images before it sees them."""
    return any(name in CATALOGUE and CATALOGUE[name].gradients for name in parse_mixture(spec))


def judges_world(spec: str) -> bool:
    """Whether a part of a reward is the tiny world's detector, which knows the shapes of square images."""
    return any(name in CATALOGUE and CATALOGUE[name].check_prompt is world.parse for name in parse_mixture(spec))


def has_features(spec: str) -> bool:
    """Whether a part of a reward has features of the image alone, so that a mixture of it does."""
    return any(name in CATALOGUE and CATALOGUE[name].features for name in parse_mixture(spec))


# --- weights ---


def parse_checkpoints(items: Sequence[str], specs: Sequence[str]) -> dict[str, str | Path]:
    """Checkpoints by name, from NAME=PATH items for the given rewards.

    A PATH alone belongs to the first weights of the only scorer; PATH "hub" means the published ones.

    Raises:
        InputError: a name that reads no checkpoint, or a path alone where there are several scorers.
    """
    names = list(dict.fromkeys(name for spec in specs for name in parse_mixture(spec)))
    known = [weights for spec in specs for weights in weights_of(spec)]
    paths: dict[str, str | Path] = {}
    for item in items:
        name, _, path = item.partition("=")
        if name not in known and len(names) == 1 and known:
            name, path = known[0], item
        if name not in known or not path:
            wanted = f"NAME is one of {', '.join(known)}" if known else f"{', '.join(names)} reads none"
            raise InputError(f"reward_checkpoint: give NAME=PATH; {wanted}, not {item!r}")
        paths[name] = path
    return paths


def weights_of(spec: str) -> list[str]:
    """The names, of hub.HUB, of the weights that the parts of a reward take."""
    return [weights for name in parse_mixture(spec) if name in CATALOGUE for weights in CATALOGUE[name].weights]


def missing_weights(name: str, checkpoints: Mapping[str, str | Path]) -> list[str]:
    """The repositories of a reward's weights that `load_reward` would fetch from the hub."""
    from_hub = [weights for weights in weights_of(name) if checkpoints.get(weights, "hub") == "hub"]
    return [HUB[weights].repository for weights in from_hub if not is_fetched(weights)]


EMBEDDED_CHECKPOINTS: dict[str, str | Path] = {"hps": EMBEDDED_HPS}  # for the tiny world's images


def checkpoints_for(model: str, items: Sequence[str] | None, specs: Sequence[str]) -> dict[str, str | Path]:
    """The checkpoints by name that `load_reward` takes for a model's images, from NAME=PATH items for the given rewards.

    Raises:
        InputError: as `parse_checkpoints`, or hps-v2 is to judge the tiny world, for which there is one scorer, hps.
        NotFoundError: a file or folder is not there.
    """
    given = parse_checkpoints(items or (), specs)
    for name, path in given.items():
        if path != "hub":
            given_weights(name, path)
    if model in EMBEDDED and "hps-v2" not in given and any("hps-v2" in parse_mixture(spec) for spec in specs):
        raise InputError(
            f"reward: hps-v2 has no scorer for {model}; take hps, or give --reward-checkpoint hps-v2=hub for its published "
            "weights"
        )
    return (EMBEDDED_CHECKPOINTS if model in EMBEDDED else {}) | given


# --- what is checked ---


def check_reward(spec: str, option: str = "reward") -> None:
    """Check that a reward exists and can be loaded, without loading it.

    Raises:
        InputError: a name is unknown, a weight unusable, a package missing, or a file is broken or has no such function.
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
        elif missing := missing_packages(name):
            needed = " ".join(CATALOGUE[name].packages)
            raise InputError(f"{option}: {name} needs {', '.join(missing)}; pip install {needed}")


def check_prompts(specs: Sequence[str], prompts: Sequence[str]) -> None:
    """Check that rewards can judge prompts.

    Raises:
        InputError: one cannot; `alignment` knows the tiny world's sentences only, `ocr` needs a quoted text.
    """
    for name in {name for spec in specs for name in parse_mixture(spec)} & CATALOGUE.keys():
        for prompt in prompts:
            CATALOGUE[name].check_prompt(prompt)


def check_gradients(spec: str) -> None:
    """Check that the parts of a reward carry gradients, as far as it shows before anything is loaded.

    Raises:
        InputError: one does not.
    """
    for name in parse_mixture(spec):
        if name.startswith(URL) or (name in CATALOGUE and not CATALOGUE[name].gradients):
            raise no_gradients(name)
    for name in functions_of(spec):
        path, _, attribute = name.rpartition(":")
        tree = _parsed(path, "reward")
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        said = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "with_gradients"]
        if attribute in defined and not said and "setattr" not in ast.dump(tree):
            raise no_gradients(name)


def no_gradients(name: str) -> InputError:
    """The error for a part of a reward that carries no gradients."""
    known = ", ".join(name for name, entry in CATALOGUE.items() if entry.gradients)
    return InputError(
        f"reward: {name} carries no gradients, which --algorithm gradient needs; those that do are {known}, mixtures of "
        "them, and functions that set with_gradients = True"
    )


def check_captioner(spec: str, prompts: Sequence[str] = ()) -> None:
    """Check that what `--relabel` names exists, and can caption the images of prompts.

    Raises:
        InputError: it is neither `world` nor a function in a file, or a prompt is not of the tiny world.
        NotFoundError: the file of a function is not there.
    """
    if spec != WORLD:
        if ":" not in spec and not Path(spec).is_file():
            raise InputError(f"relabel: must be world or path/to/file.py:function, not {spec!r}{near(spec, [WORLD])}")
        _check_function(spec, "relabel")
    elif foreign := [prompt for prompt in prompts if not world.is_world([prompt])]:
        raise InputError(f"relabel: world captions images of the tiny world's sentences, which {foreign[0]!r} is not")


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
    tree = _parsed(path, option)
    if missing := _missing_modules(tree):
        raise InputError(f"{option}: {path!r} could not be imported: there is no module {missing[0]!r} here")
    found = _names_in(tree)
    if found is not None and attribute not in found:
        raise InputError(f"{option}: {path!r} has no function {attribute!r}{near(attribute, found)}")


def _parsed(path: str, option: str) -> ast.Module:
    try:
        return ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        told = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else describe(error)
        raise InputError(f"{option}: {path!r} is not Python, {told}") from error


def _names_in(tree: ast.Module) -> list[str] | None:
    """The names that a Python file may bind, without running it; None where only running it could tell."""
    nodes = list(ast.walk(tree))
    bound = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    bound += [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound += [(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)]
    computed = {"*", "__getattr__", "globals", "setattr", "exec"}
    used = computed & {node.id for node in nodes if isinstance(node, ast.Name)}
    return None if computed & set(bound) or used else list(dict.fromkeys(bound))


def _missing_modules(tree: ast.Module) -> list[str]:
    """The modules that a Python file imports first of all, and which are not installed; none where it changes the path."""
    imported = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    names = dict.fromkeys(name.partition(".")[0] for name in imported)
    if names.keys() & {"sys", "site", "os", "importlib"}:
        return []
    return [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
