"""Prompt sets: the published benchmarks in their layouts, files of all kinds, and what is refused."""

import csv
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from texforce import prompt_sets, world
from texforce.prompt_sets import BENCHMARKS, Published, read_benchmark

ROWS = [('A red car, "fast".', "Colors"), ("Two cats; three dogs.", "Counting"), ("Zwölf Würfel ☃", "Colors")]
PROMPTS, CATEGORIES = ([row[k] for row in ROWS] for k in (0, 1))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_table(path, columns, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([columns, *rows])
    return path


def check(benchmark, prompts=PROMPTS, categories=CATEGORIES):
    assert benchmark.prompts == prompts
    assert benchmark.categories == categories


# --- published layouts ---


def test_drawbench_is_read_in_its_layout_through_datasets_itself(tmp_path, monkeypatch):
    write_table(tmp_path / "data.csv", ["Prompts", "Category"], ROWS)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(BENCHMARKS, "drawbench", Published(str(tmp_path), "main"))
    benchmark = read_benchmark("drawbench")
    check(benchmark)
    assert benchmark.source == {"repository": str(tmp_path), "revision": "main"}
    check(read_benchmark(str(tmp_path / "data.csv")))  # the same file, given by hand


def test_parti_prompts_are_read_in_their_layout(tmp_path):
    rows = [(prompt, category, "Basic", "") for prompt, category in ROWS]
    check(
        read_benchmark(
            str(write_table(tmp_path / "PartiPrompts.tsv", ["Prompt", "Category", "Challenge", "Note"], rows, "\t"))
        )
    )


def test_hpdv2_is_read_in_its_layout_from_the_hubs_files(tmp_path, monkeypatch):
    snapshot = tmp_path / "datasets--zhwang--HPDv2" / "snapshots" / "0123abc"
    styles = ("anime", "concept-art", "paintings", "photo")
    for style in styles:
        write(snapshot / "benchmark" / f"{style}.json", json.dumps([f"{style} of {prompt}" for prompt in PROMPTS]))
    asked = []

    def download(repository, name, revision, repo_type):
        asked.append((repository, revision, repo_type))
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    benchmark = read_benchmark("hps")
    expected = [(f"{style} of {prompt}", style) for style in styles for prompt in PROMPTS]
    check(benchmark, [prompt for prompt, _ in expected], [style for _, style in expected])
    assert benchmark.source == {"repository": "zhwang/HPDv2", "revision": "0123abc"}
    assert asked == 4 * [("zhwang/HPDv2", None, "dataset")]
    check(read_benchmark(str(snapshot / "benchmark")), benchmark.prompts, benchmark.categories)  # the folder, by hand


def test_imagerewards_test_set_is_read_in_its_layout_each_prompt_once(tmp_path, monkeypatch):
    table = pyarrow.table(
        {
            "image_path": [f"images/{k}.webp" for k in range(6)],
            "prompt_id": [f"00000{k % 3}-0035" for k in range(6)],
            "prompt": 2 * PROMPTS,
            "classification": 2 * CATEGORIES,
            "rank": list(range(6)),
        }
    )
    path = tmp_path / "snapshots" / "feed" / "metadata-test.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(table, path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: str(path))
    benchmark = read_benchmark("imagereward")
    check(benchmark)
    assert benchmark.source["revision"] == "feed"
    prompts = write(tmp_path / "benchmark-prompts.json", json.dumps([{"id": "1", "prompt": prompt} for prompt in PROMPTS]))
    check(read_benchmark(str(prompts)), PROMPTS, 3 * [""])  # as on GitHub


def test_published_sets_are_pinned_or_said_not_to_be():
    readme = (Path(prompt_sets.__file__).parent / "README.md").read_text()
    for name, published in BENCHMARKS.items():
        pinned = published.revision is not None and re.fullmatch("[0-9a-f]{40}", published.revision)
        assert pinned or f"`{name}` follows" in readme.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_the_hub_one_is_told_how_to_give_the_file(name):
    with pytest.raises(FileNotFoundError, match=f"{BENCHMARKS[name].repository} could not be downloaded.*--benchmark FILE"):
        read_benchmark(name)


# --- files ---


def test_files_of_every_kind_say_the_same(tmp_path):
    lines = [json.dumps({"prompt": prompt, "category": category}) for prompt, category in ROWS]
    check(read_benchmark(str(write(tmp_path / "a.jsonl", "\n".join(lines) + "\n\n"))))
    check(read_benchmark(str(write(tmp_path / "a.json", f"[{','.join(lines)}]"))))
    check(read_benchmark(str(write(tmp_path / "a.txt", "\n".join(PROMPTS)))), PROMPTS, 3 * [""])
    check(read_benchmark(str(write(tmp_path / "b.jsonl", "\r\n".join(lines)))))
    check(read_benchmark(str(write(tmp_path / "c.jsonl", "\ufeff" + "\n".join(lines)))))
    assert read_benchmark(str(tmp_path / "a.jsonl")).sha256 == read_benchmark(str(tmp_path / "a.json")).sha256
    assert read_benchmark(str(tmp_path / "a.jsonl")).sha256 != read_benchmark(str(tmp_path / "a.txt")).sha256


def test_a_subfolder_that_is_called_like_a_file_is_passed_over(tmp_path):
    (tmp_path / "a.json").mkdir()
    write(tmp_path / "b.txt", "\n".join(PROMPTS))
    check(read_benchmark(str(tmp_path)), PROMPTS, 3 * [""])


def test_white_space_is_one_space_and_what_comes_twice_is_taken_once(tmp_path):
    lines = [{"prompt": " a red\n\tcar "}, {"prompt": "a red car", "category": None}, {"prompt": "a red car", "category": 3}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    check(read_benchmark(str(path)), ["a red car"], [""])
    check(read_benchmark(str(write(tmp_path / "b.jsonl", '{"prompt": "a", "category": 3}'))), ["a"], ["3"])


def test_world_is_the_held_out_prompts_by_kind_and_words():
    benchmark = read_benchmark("world")
    assert benchmark.prompts == prompt_sets.read_prompts("world-heldout")
    assert len(set(benchmark.categories)) == 8
    for prompt, category in zip(benchmark.prompts, benchmark.categories, strict=True):
        kind, words = category.split(", ")
        assert world.parse(prompt).kind == kind
        assert (words == "rare words") == world.has_rare_word(prompt)
    assert read_benchmark("colour").prompts == prompt_sets.read_prompts("colour")


@pytest.mark.parametrize(
    ("limit", "rows"), [(None, range(10)), (99, range(10)), (10, range(10)), (4, [0, 2, 5, 7]), (1, [0])]
)
def test_a_limit_takes_prompts_from_all_over(limit, rows):
    benchmark = prompt_sets.Benchmark("b", [f"p{i}" for i in range(10)], [f"c{i}" for i in range(10)], {})
    check(benchmark.limited(limit), [f"p{i}" for i in rows], [f"c{i}" for i in rows])


REFUSED = {
    "line.jsonl": ('{"prompt": "a"}\n\n{"prompt": "b"\n', ["line.jsonl, line 3", "not JSON"]),
    "number.jsonl": ('{"prompt": "a"}\n7\n', ["number.jsonl, line 2", "object"]),
    "column.jsonl": ('{"text": "a"}\n', ["column.jsonl, line 1", "`prompt`"]),
    "kind.jsonl": ('{"prompt": ["a"]}\n', ["kind.jsonl, line 1", "list"]),
    "empty.jsonl": ('{"prompt": "a"}\n{"prompt": " \\n "}\n', ["empty.jsonl, line 2", "empty"]),
    "escape.jsonl": ('{"prompt": "a"}\n{"prompt": "b \\u001b[2J"}\n', ["escape.jsonl, line 2", "U+001B"]),
    "category.jsonl": ('{"prompt": "a", "category": "\\u0007"}\n', ["category.jsonl, line 1", "U+0007"]),
    "half.jsonl": ('{"prompt": "\\ud800"}\n', ["half.jsonl, line 1", "U+D800"]),
    "bell.txt": ("a\nb\x07\n", ["bell.txt, line 2", "U+0007"]),
    "csi.txt": ("a\n\x9b2J\n", ["csi.txt, line 2", "U+009B"]),
    "deep.json": ("[" * 100_000, ["deep.json", "not JSON"]),
    "object.json": ('{"prompt": "a"}', ["object.json", "list"]),
    "entry.json": ('["a", 5]', ["entry.json, entry 2"]),
    "columns.csv": ("Text,Category\na,b\n", ["columns.csv, line 2", "`prompt`"]),
    "nothing.txt": ("\n \n", ["nothing", "no prompt"]),
    "nothing.json": ("[]", ["nothing", "no prompt"]),
    "quote.csv": ('prompt\n"' + 200_000 * "x", ["quote.csv, line 1"]),
    "false.parquet": ("PAR1 is not one", ["false.parquet", "parquet"]),
    "table.xlsx": ("a", ["table.xlsx", ".jsonl"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name):
    text, words = REFUSED[name]
    with pytest.raises(ValueError, match=r"^benchmark: ") as caught:
        read_benchmark(str(write(tmp_path / name, text)))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\x1b" not in str(caught.value)


def test_latin_text_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Würfel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"benchmark: .*latin.txt.*UTF-8.*byte 1"):
        read_benchmark(str(tmp_path / "latin.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"benchmark: the folder .* holds no file of \.txt"):
        read_benchmark(str(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["drawbenhc", "world-heldout2", "../animals", ""])
def test_an_unknown_benchmark_lists_the_known_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        FileNotFoundError, match=r"^benchmark: .*known are drawbench, parti, hps, imagereward, world, animals"
    ):
        read_benchmark(name)
