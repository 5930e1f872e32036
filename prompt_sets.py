"""Prompts from files, from the sets in prompts/, and from published training sets and benchmarks on the hub."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import TrainConfig, specs_of
from .errors import InputError, NotFoundError, near, reading
from .files import LFS_POINTER, quiet_hub, read_text
from .reward_specs import check_captioner, check_prompts

PROMPTS = Path(__file__).parent / "prompts"
KINDS = ("colour", "composition", "position", "count")  # prompt sets that the tiny world can judge


def read_prompts(source: str, option: str = "prompts") -> list[str]:
    """The prompts of sets shipped in prompts/, of a set of TRAINING_SETS, or else of a file or folder, each prompt once.

    `world` is the four sets of the tiny world; `world,common` joins two. The name of a set always means the set: write ./hps
    for a file of that name. `option` names the source in messages.

    Raises:
        NotFoundError: there is neither such a file nor such a set, or the hub cannot be reached.
        InputError: a file is malformed or holds no prompt; names file and line.
    """
    if source in TRAINING_SETS:
        return _training_set(source, option)
    paths = [PROMPTS / f"{name}.txt" for name in _shipped_sets(source)]
    if not paths and not (source and Path(source).exists()):
        if set(map(str.strip, source.split(","))) & set(TRAINING_SETS):
            raise InputError(f"{option}: {source!r}: sets from the hub stand alone; join them with others in a file")
        known = ["world", *sorted(_known_sets()), *TRAINING_SETS]
        unknown = next((name for name in map(str.strip, source.split(",")) if name not in known), source)
        raise NotFoundError(
            f"{option}: there is no file {source!r} and no set of that name; sets are world, "
            f"{', '.join(sorted(_known_sets()))}, and from the hub {', '.join(TRAINING_SETS)}{near(unknown, known)}"
        )
    rows = (row for path in paths or [Path(source)] for row in _read_files(path, option))
    return list(_categories(f"{option}: {source!r}", rows))


def _shipped_sets(source: str) -> list[str]:
    """The sets in prompts/ that a name, or several joined by commas, stands for; none if one of them is not shipped."""
    names = []
    for name in map(str.strip, source.split(",")):
        names += [name.replace("world", kind) for kind in KINDS] if name.startswith("world") else [name]
    return names if set(names) <= _known_sets() else []


def _known_sets() -> set[str]:
    return {path.stem for path in PROMPTS.glob("*.txt")}


# What an epoch's or a result's measures are called, and how that reads: a run of a single prompt can hold none out.
MEASURED_ON = {"heldout": "held-out", "training_prompts": "training prompts"}


def find_measured(record: Mapping[str, Any]) -> str | None:
    """The name in MEASURED_ON of the measures that a record holds; None if it holds none."""
    return next((name for name in MEASURED_ON if name in record), None)


def split_prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; no sentence is in both. A single prompt is not held out.

    Sentences that differ in capitals alone are one here: CLIP reads no capitals.

    Raises:
        NotFoundError, InputError: a file is not there or unusable, or every prompt is held out.
    """
    prompts = read_prompts(config.prompts)
    kept_apart = [f"{name}-heldout" for name in _shipped_sets(config.prompts) if f"{name}-heldout" in _known_sets()]
    if config.heldout_prompts:
        heldout = read_prompts(config.heldout_prompts, "heldout_prompts")
    elif kept_apart:
        heldout = read_prompts(",".join(kept_apart))
    elif len({prompt.lower() for prompt in prompts}) == 1:
        return prompts, []
    else:
        heldout = prompts[:: min(10, len(prompts))][:64]
    held_out = {prompt.lower() for prompt in heldout}
    train = [prompt for prompt in prompts if prompt.lower() not in held_out]
    if not train:
        raise InputError(f"prompts: every prompt of {config.prompts!r} is held out, so none is left to train on")
    return train, heldout


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    train: list[str]
    heldout: list[str]  # none where there is a single prompt to train on
    anchors: list[str]  # held like the null prompt

    @property
    def measured(self) -> list[str]:
        """Those that base and tuned are measured on."""
        return self.heldout or self.train

    @property
    def all(self) -> list[str]:
        return [*self.train, *self.heldout, *self.anchors]


def read_run_prompts(config: TrainConfig) -> Prompts:
    """The prompts of a resolved configuration; raises as `split_prompts`."""
    anchors = read_prompts(config.anchor_prompts, "anchor_prompts") if config.anchor_prompts else []
    return Prompts(*split_prompts(config), anchors)


def check_judged(config: TrainConfig, prompts: Prompts) -> None:
    """Check that the rewards can judge the prompts of a run, and that `--relabel` can caption their images.

    Raises:
        InputError: one cannot.
    """
    check_prompts(specs_of(config), [*prompts.train, *prompts.heldout])
    if config.relabel:
        check_captioner(config.relabel, prompts.train)


@dataclass(frozen=True)
class Published:
    """A prompt set on the hub: files of it, or else its split `train`.

    Where no revision is pinned the newest is taken, and the results say which it was.
    """

    repository: str
    revision: str | None = None
    files: tuple[str, ...] = ()


IMAGEREWARD = ("zai-org/ImageRewardDB", "ce70065c88f101956e294bb65f78879ef89d68f9")
TRAINING_SETS = {  # prompts of the images that HPSv2, ImageReward and PickScore learnt from
    "hps": Published("ymhao/HPDv2", "bb0f2563e451e11c3f376b2ba93615db00e042e1", ("train.json",)),
    "imagereward": Published(*IMAGEREWARD, ("metadata-train.parquet",)),
    # The first version of Pick-a-Pic, without images and without the prompts that are not safe for work.
    "pickapic": Published(
        "CarperAI/pickapic_v1_no_images_training_sfw",
        "ebca1a045fbb7d4192df1d4804865f9c4c91f27b",
        ("pickapic_training_sfw.parquet",),
    ),
}
NO_TEXT = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")  # white space, control characters, halves of characters


def _training_set(name: str, option: str) -> list[str]:
    """The prompts of a set of TRAINING_SETS, in its order.

    Users typed them. Control characters become spaces, and a row without a prompt is passed over.
    """
    rows, _ = _fetch(TRAINING_SETS[name], option)
    prompts = (_prompt_of(row) for _, row in rows)
    texts = (NO_TEXT.sub(" ", prompt).strip() for prompt in prompts if isinstance(prompt, str))
    found = list(dict.fromkeys(text for text in texts if text))
    if not found:
        raise InputError(f"{option}: {TRAINING_SETS[name].repository} holds no column `prompt` or `caption` with prompts")
    return found


# --- benchmarks ---


@dataclass(frozen=True)
class Benchmark:
    """Prompts to evaluate on."""

    name: str
    prompts: list[str]
    categories: list[str]  # one a prompt; empty where the set has none
    source: dict[str, str]  # where it is from: repository and revision on the hub, or nothing more

    @property
    def sha256(self) -> str:
        """SHA-256 of the prompts and their categories."""
        return hashlib.sha256(json.dumps([self.prompts, self.categories]).encode()).hexdigest()

    def limited(self, limit: int | None) -> Benchmark:
        """`limit` of the prompts, evenly spaced over the set; all of them without a limit."""
        total = len(self.prompts)
        rows = [i * total // limit for i in range(limit)] if limit and limit < total else range(total)
        return replace(self, prompts=[self.prompts[i] for i in rows], categories=[self.categories[i] for i in rows])


BENCHMARKS = {
    "drawbench": Published("sayakpaul/drawbench", "ad794cba698c253ffdb6d18eff3fc87b004c1135"),
    "parti": Published("nateraw/parti-prompts", "944b156abfdad7627c3221b5ec4f6a6fb060a197"),
    "hps": Published(
        "zhwang/HPDv2", files=tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo"))
    ),
    "imagereward": Published(*IMAGEREWARD, ("metadata-test.parquet",)),
}
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
PROMPT_COLUMNS = ("prompt", "prompts", "caption")
CATEGORY_COLUMNS = ("category", "classification")
LIKE_JSON = re.compile(r"\s*(?:(\[)\s*[\]{\"]|\{\s*\")")  # how a list of objects or texts begins, or an object


def read_benchmark(name: str) -> Benchmark:
    """A name of BENCHMARKS, `world`, another shipped set or its held-out part (`text-heldout`), a file, or a folder of them.

    Files are those of `read_prompts`: a prompt is in what is called `prompt` (or `Prompts` or `caption`), its category in
    `category` (or `classification`), in any case; a list of texts has the file's name as its category. A prompt that comes
    twice is taken once.

    Raises:
        NotFoundError: there is no such benchmark, or the hub cannot be reached.
        InputError: a file is malformed, or a prompt holds control characters; names file and line.
    """
    if name in BENCHMARKS:
        rows, source = _fetch(BENCHMARKS[name], "benchmark")
        return _benchmark(name, rows, source)
    if name == "world":
        return _world()
    if name in _known_sets():
        return _benchmark(name, _read_files(PROMPTS / f"{name}.txt", "benchmark"), {})
    check_benchmark(name)
    path = Path(name)
    return replace(_benchmark(name, _read_files(path, "benchmark"), {}), name=path.stem)


def check_benchmark(name: str) -> None:
    """Raise NotFoundError for what is neither the name of a benchmark nor a file or folder, without fetching anything."""
    known = [*BENCHMARKS, "world", *sorted(_known_sets())]
    if name not in known and not (name and Path(name).exists()):
        raise NotFoundError(
            f"benchmark: there is no file {name!r} and no benchmark of that name; known are {', '.join(known)}"
            f"{near(name, known)}"
        )


def _world() -> Benchmark:
    """The held-out prompts of the tiny world, by kind and by whether they hold a rare word."""
    from . import world

    rows = [(kind, prompt) for kind in KINDS for prompt in read_prompts(f"{kind}-heldout")]
    categories = [f"{kind}, {'rare' if world.has_rare_word(prompt) else 'common'} words" for kind, prompt in rows]
    return Benchmark("world", [prompt for _, prompt in rows], categories, {})


Rows = Iterable[tuple[str, Mapping[str, Any]]]  # where a row stands, as messages begin, and its columns


def _benchmark(name: str, rows: Rows, source: dict[str, str]) -> Benchmark:
    categories = _categories(f"benchmark: {name!r}", rows)
    return Benchmark(name, list(categories), list(categories.values()), source)


def _categories(source: str, rows: Rows) -> dict[str, str]:
    """The distinct prompts of rows in their order, each with its category; `source` names them in messages."""
    categories: dict[str, str] = {}
    for where, row in rows:
        prompt, category = _prompt_and_category(where, row)
        categories.setdefault(prompt, category)
    if not categories:
        raise InputError(f"{source} holds no prompt")
    return categories


def _prompt_and_category(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    columns = {str(column).lower(): value for column, value in row.items()}
    prompt = _prompt_of(row)
    if not isinstance(prompt, str):
        seen = "no column `prompt`" if prompt is None else f"{type(prompt).__name__} for a prompt"
        raise InputError(f"{where}: it has {seen}")
    category = next((columns[column] for column in CATEGORY_COLUMNS if columns.get(column) is not None), "")
    prompt, category = (_one_line(text, where) for text in (prompt, str(category)))
    if not prompt:
        raise InputError(f"{where}: the prompt is empty")
    return prompt, category


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """What is in a row's column for the prompt, None without one."""
    columns = {str(column).lower(): value for column, value in row.items()}
    return next((columns[column] for column in PROMPT_COLUMNS if column in columns), None)


def _one_line(text: str, where: str) -> str:
    """Text with its white space as single spaces, as CLIP's tokenizers see it."""
    text = re.sub(r"[ \t\r\n]+", " ", text).strip()
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs"):  # control characters, halves of characters
            raise InputError(f"{where}: it holds the control character U+{ord(letter):04X}")
    return text


def _fetch(published: Published, option: str) -> tuple[Rows, dict[str, str]]:
    """The rows of a set on the hub, and where they are from; `option` is for messages."""
    advice = f"fetch its prompts elsewhere and give their file with --{option.replace('_', '-')} FILE ({', '.join(FORMATS)})"
    quiet_hub()
    with reading(f"{option}: {published.repository} could not be downloaded from the hub; {advice}", NotFoundError):
        if published.files:
            from huggingface_hub import hf_hub_download

            paths = [
                Path(hf_hub_download(published.repository, name, revision=published.revision, repo_type="dataset"))
                for name in published.files
            ]
            levels = len(Path(published.files[0]).parents)
            rows: Rows = [row for path in paths for row in _read_file(path, option)]
            revision = published.revision or paths[0].parents[levels - 1].name  # snapshots/REVISION/FILE
        else:
            from datasets import load_dataset

            dataset = load_dataset(published.repository, split="train", revision=published.revision)
            rows = [(f"{option}: {published.repository}, row {i}", row) for i, row in enumerate(dataset, 1)]
            revision = str(published.revision)
    return rows, {"repository": published.repository, "revision": revision}


# --- files ---


def _read_files(path: Path, option: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, or of a folder's files of FORMATS; `option` is for messages."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS and not file.is_dir())
    if not files:
        raise InputError(f"{option}: the folder {str(path)!r} holds no file of {', '.join(FORMATS)}")
    for file in files:
        yield from _read_file(file, option)


def _read_file(path: Path, option: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, each with where it stands; `option` is for messages.

    The suffix decides the layout. Text, or a file without a suffix, is a prompt a line unless it begins as JSON does.
    """
    kind, file = path.suffix.lower(), f"{option}: {path.name}"
    if kind not in ("", *FORMATS):
        raise InputError(f"{option}: {str(path)!r} must end in one of {', '.join(FORMATS)}")
    if kind == ".parquet":
        yield from ((f"{file}, row {i}", row) for i, row in enumerate(_read_parquet(path, file), 1))
        return
    text = read_text(path, option)
    if kind in ("", ".txt"):
        if text.startswith(LFS_POINTER):
            raise InputError(
                f"{option}: {str(path)!r} is a git-lfs pointer and not the prompts; fetch them by `git lfs pull`"
            )
        json_like = LIKE_JSON.match(text)
        kind = ".txt" if json_like is None else ".json" if json_like[1] else ".jsonl"
    if kind in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text), delimiter="," if kind == ".csv" else "\t")
        try:
            yield from ((f"{file}, line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: {error}") from error
    elif kind == ".json":
        rows = _parse_json(text, file)
        if not isinstance(rows, list):
            raise InputError(f"{file}: must hold a JSON list")
        for i, row in enumerate(rows, 1):
            yield f"{file}, entry {i}", _as_row(row, f"{file}, entry {i}", path.stem)
    else:
        for i, line in enumerate(text.split("\n"), 1):
            where = f"{file}, line {i}"
            if line.strip():
                yield where, _as_row(line if kind == ".txt" else _parse_json(line, where), where)


def _as_row(row: Any, where: str, category: str = "") -> Mapping[str, Any]:
    """A row of a file that has no columns; a text alone has the given category, as HPDv2's lists have one each."""
    if isinstance(row, str):
        return {"prompt": row, "category": category}
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with a `prompt`, not {str(row)[:40]!r}")
    return row


def _parse_json(text: str, where: str) -> Any:
    with reading(f"{where}: not JSON", InputError):
        return json.loads(text)


def _read_parquet(path: Path, where: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    with reading(f"{where}: not a parquet file", InputError):
        names = parquet.read_schema(path).names
        wanted = [name for name in names if name.lower() in (*PROMPT_COLUMNS, *CATEGORY_COLUMNS)]
        return parquet.read_table(path, columns=wanted).to_pylist()
