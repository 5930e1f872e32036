"""Prompts from files, from the sets in prompts/, and from the published benchmarks."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import InputError, NotFoundError, reading
from .files import read_text

PROMPTS = Path(__file__).parent / "prompts"
KINDS = ("colour", "composition", "position", "count")  # prompt sets that the tiny world can judge


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, or of a set shipped in prompts/; `world` is the four sets of the tiny world.

    Raises:
        NotFoundError: there is neither such a file nor such a set.
        InputError: it holds no prompt, or is not UTF-8 text.
    """
    known = sorted(path.stem for path in PROMPTS.glob("*.txt"))
    if source.startswith("world"):
        parts = [source.replace("world", kind) for kind in KINDS]
        if set(parts) <= set(known):
            return [prompt for part in parts for prompt in read_prompts(part)]
    path = PROMPTS / f"{source}.txt" if source in known else Path(source)
    if not path.is_file():
        raise NotFoundError(
            f"prompts: there is no file {source!r} and no set of that name; sets are world, {', '.join(known)}"
        )
    lines = read_text(path, "prompts").splitlines()
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise InputError(f"prompts: {source!r} holds no prompt; write one a line")
    return prompts


def split_prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; no sentence is in both, but for a file with a single prompt, which is both.

    Raises:
        NotFoundError, InputError: a file is not there or unusable, or every prompt is held out.
    """
    prompts = read_prompts(config.prompts)
    if config.heldout_prompts:
        heldout = read_prompts(config.heldout_prompts)
    elif config.prompts in ("world", *KINDS):
        heldout = read_prompts(f"{config.prompts}-heldout")
    elif len(prompts) == 1:
        return prompts, prompts
    else:
        heldout = prompts[:: min(10, len(prompts))][:64]
    train = [prompt for prompt in prompts if prompt not in set(heldout)]
    if not train:
        raise InputError(f"prompts: every prompt of {config.prompts!r} is held out, so none is left to train on")
    return train, heldout


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


@dataclass(frozen=True)
class Published:
    """A prompt set on the hub: files of it, or else its split `train`.

    Where no revision is pinned the newest is taken, and the results say which it was.
    """

    repository: str
    revision: str | None = None
    files: tuple[str, ...] = ()


BENCHMARKS = {
    "drawbench": Published("sayakpaul/drawbench", "ad794cba698c253ffdb6d18eff3fc87b004c1135"),
    "parti": Published("nateraw/parti-prompts", "944b156abfdad7627c3221b5ec4f6a6fb060a197"),
    "hps": Published(
        "zhwang/HPDv2", files=tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo"))
    ),
    "imagereward": Published("THUDM/ImageRewardDB", files=("metadata-test.parquet",)),
}
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
PROMPT_COLUMNS = ("prompt", "prompts")
CATEGORY_COLUMNS = ("category", "classification")


def read_benchmark(name: str) -> Benchmark:
    """A name of BENCHMARKS, `world` or another shipped set, a file of FORMATS, or a folder of such files.

    A prompt is in what is called `prompt` (or `Prompts`), its category in `category` (or `classification`), in any case;
    a list of texts has the file's name as its category. A prompt that comes twice is taken once.

    Raises:
        NotFoundError: there is no such benchmark, or the hub cannot be reached.
        InputError: a file is malformed, or a prompt holds control characters; names file and line.
    """
    if name in BENCHMARKS:
        rows, source = _fetch(name)
        return _benchmark(name, rows, source)
    path = Path(name)
    if name == "world":
        return _world()
    if path.suffix.lower() in FORMATS or (name and path.is_dir()):
        return replace(_benchmark(name, _read_files(path), {}), name=path.stem)
    if path.is_file():
        raise InputError(f"benchmark: {name!r} must end in one of {', '.join(FORMATS)}")
    shipped = [path.stem for path in PROMPTS.glob("*.txt") if not path.stem.endswith("-heldout")]
    if name not in shipped:
        known = ", ".join([*BENCHMARKS, "world", *sorted(shipped)])
        raise NotFoundError(f"benchmark: there is no file {name!r} and no benchmark of that name; known are {known}")
    return _benchmark(name, ((f"line {i}", {"prompt": prompt}) for i, prompt in enumerate(read_prompts(name), 1)), {})


def _world() -> Benchmark:
    """The held-out prompts of the tiny world, by kind and by whether they hold a rare word."""
    from . import world

    rows = [(kind, prompt) for kind in KINDS for prompt in read_prompts(f"{kind}-heldout")]
    categories = [f"{kind}, {'rare' if world.has_rare_word(prompt) else 'common'} words" for kind, prompt in rows]
    return Benchmark("world", [prompt for _, prompt in rows], categories, {})


Rows = Iterable[tuple[str, Mapping[str, Any]]]  # where a row stands, for messages, and its columns


def _benchmark(name: str, rows: Rows, source: dict[str, str]) -> Benchmark:
    categories: dict[str, str] = {}
    for where, row in rows:
        prompt, category = _prompt_and_category(where, row)
        categories.setdefault(prompt, category)
    if not categories:
        raise InputError(f"benchmark: {name!r} holds no prompt")
    return Benchmark(name, list(categories), list(categories.values()), source)


def _prompt_and_category(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    columns = {str(column).lower(): value for column, value in row.items()}
    prompt = next((columns[column] for column in PROMPT_COLUMNS if column in columns), None)
    if not isinstance(prompt, str):
        seen = "no column `prompt`" if prompt is None else f"{type(prompt).__name__} for a prompt"
        raise InputError(f"benchmark: {where}: it has {seen}")
    category = next((columns[column] for column in CATEGORY_COLUMNS if columns.get(column) is not None), "")
    prompt, category = (_one_line(text, where) for text in (prompt, str(category)))
    if not prompt:
        raise InputError(f"benchmark: {where}: the prompt is empty")
    return prompt, category


def _one_line(text: str, where: str) -> str:
    """Text with its white space as single spaces, as CLIP's tokenizers see it."""
    text = re.sub(r"[ \t\r\n]+", " ", text).strip()
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs"):  # control characters, halves of characters
            raise InputError(f"benchmark: {where}: it holds the control character U+{ord(letter):04X}")
    return text


def _fetch(name: str) -> tuple[Rows, dict[str, str]]:
    published = BENCHMARKS[name]
    advice = f"fetch its prompts elsewhere and give their file with --benchmark FILE ({', '.join(FORMATS)})"
    with reading(f"benchmark: {published.repository} could not be downloaded from the hub; {advice}", NotFoundError):
        if published.files:
            from huggingface_hub import hf_hub_download

            paths = [
                Path(hf_hub_download(published.repository, file, revision=published.revision, repo_type="dataset"))
                for file in published.files
            ]
            levels = len(Path(published.files[0]).parents)
            rows: Rows = [row for path in paths for row in _read_file(path)]
            revision = published.revision or paths[0].parents[levels - 1].name  # snapshots/REVISION/FILE
        else:
            from datasets import load_dataset

            dataset = load_dataset(published.repository, split="train", revision=published.revision)
            rows = [(f"{name}, row {i}", row) for i, row in enumerate(dataset, 1)]
            revision = str(published.revision)
    return rows, {"repository": published.repository, "revision": revision}


def _read_files(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.exists():
        raise NotFoundError(f"benchmark: there is no file {str(path)!r}")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS and not file.is_dir())
    if not files:
        raise InputError(f"benchmark: the folder {str(path)!r} holds no file of {', '.join(FORMATS)}")
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, each with where it stands."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from ((f"{path.name}, row {i}", row) for i, row in enumerate(_read_parquet(path), 1))
        return
    text = read_text(path, "benchmark")
    if kind in (".csv", ".tsv"):
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter="," if kind == ".csv" else "\t")
        try:
            yield from ((f"{path.name}, line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise InputError(f"benchmark: {path.name}, line {reader.line_num}: {error}") from error
    elif kind == ".json":
        rows = _parse_json(text, path.name)
        if not isinstance(rows, list):
            raise InputError(f"benchmark: {path.name}: must hold a JSON list")
        yield from ((f"{path.name}, entry {i}", _as_row(row, path, f"entry {i}")) for i, row in enumerate(rows, 1))
    else:
        for i, line in enumerate(text.split("\n"), 1):
            where = f"{path.name}, line {i}"
            if line.strip():
                yield where, _as_row(line if kind == ".txt" else _parse_json(line, where), path, f"line {i}")


def _as_row(row: Any, path: Path, where: str) -> Mapping[str, Any]:
    if isinstance(row, str):  # a text alone; a list of them is of one category, as in HPDv2
        return {"prompt": row} | ({"category": path.stem} if path.suffix.lower() == ".json" else {})
    if not isinstance(row, dict):
        raise InputError(f"benchmark: {path.name}, {where}: must be an object with a `prompt`, not {str(row)[:40]!r}")
    return row


def _parse_json(text: str, where: str) -> Any:
    with reading(f"benchmark: {where}: not JSON", InputError):
        return json.loads(text)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    with reading(f"benchmark: {path.name}: not a parquet file", InputError):
        names = parquet.read_schema(path).names
        wanted = [name for name in names if name.lower() in (*PROMPT_COLUMNS, *CATEGORY_COLUMNS)]
        return parquet.read_table(path, columns=wanted).to_pylist()
