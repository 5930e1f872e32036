"""Prompt sets: the set `general`, published training sets and benchmarks in their layouts, files, and what is refused."""

import csv
import io
import itertools
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from texforce import models, prompt_sets, reward_specs, run, training, views, world
from texforce.config import STABLE_DIFFUSION, TrainOptions, resolve
from texforce.errors import InputError, NotFoundError
from texforce.plan import plan
from texforce.prompt_sets import BENCHMARKS, TRAINING_SETS, Published, read_benchmark, read_prompts, split_prompts

from .commands import invoke

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


# --- the set of sentences for Stable Diffusion ---

GENERAL, HELDOUT = (read_prompts(name) for name in ("general", "general-heldout"))
TOPICS = {  # in the order of the file, equally many lines each; the pattern matches words that are typical of the topic
    "people": r"(wo)?m[ae]n|boy|girl|kids|child|(grand)?(mother|father)|[a-z]{3,}(er|or|ist|ian)",
    "animals": r"cat|kitten|dog|fox|bear|owl|wolf|tiger|elephant|rabbit|sheep|goat|turtle|frog|seal|fur|paws?|beak|tail",
    "objects": r"jar|cup|bowl|book|bottle|clock|key|lamp|candle|chair|teapot|basket|suitcase|violin|glass|brass|wooden",
    "scenes": r"street|city|village|town|forest|lake|river|sea|mountain|cliff|desert|field|garden|castle|canal|station|hill",
    "counts": r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|pair|trio",
    "colours": r"red|blue|green|yellow|purple|violet|orange|pink|white|black|grey|golden|silver|teal|turquoise|scarlet",
    "relations": r"under|beneath|below|above|behind|beside|between|inside|outside|left|right|top|opposite|next|front|over",
    "styles": r"painting|photo|photograph|print|illustration|drawing|sketch|watercolour|art|render|poster|style|film|ink",
}


def words(prompt):
    return re.findall(r"[a-z0-9]+", prompt.lower())


def shares(topic, prompts):
    """The share of the prompts with a topic's words, in the part of each topic."""
    size, expected = len(prompts) // len(TOPICS), re.compile(rf"\b({TOPICS[topic]})\b")
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return {
        other: sum(bool(expected.search(prompt)) for prompt in part) / size
        for other, part in zip(TOPICS, parts, strict=True)
    }


def test_general_has_its_size_and_no_sentence_comes_twice():
    assert len(GENERAL) >= 800
    assert len(HELDOUT) >= 100
    lines = [(prompt_sets.PROMPTS / f"{name}.txt").read_text().splitlines() for name in ("general", "general-heldout")]
    assert lines == [GENERAL, HELDOUT]
    assert len({" ".join(words(prompt)) for prompt in GENERAL + HELDOUT}) == len(GENERAL + HELDOUT)


def test_no_sentence_of_general_is_another_one_with_a_few_words_changed():
    small = set(words("a an the of in on with and its his her to at from by for one their into over under"))
    content = [set(words(prompt)) - small for prompt in GENERAL + HELDOUT]
    for one, other in itertools.combinations(content, 2):
        assert len(one & other) <= 0.4 * len(one | other), (one, other)


@pytest.mark.parametrize("topic", TOPICS)
def test_general_is_spread_evenly_over_its_topics(topic):
    found = shares(topic, GENERAL)
    assert max(found, key=found.get) == topic
    if topic not in ("animals", "objects", "scenes"):  # whose words are too many for a list
        assert found[topic] > 0.5
        assert shares(topic, HELDOUT)[topic] > 0.5


def test_every_sentence_of_general_fits_clip_easily():
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()  # CLIP's vocabulary, which Stable Diffusion's text encoders have
    for prompt in GENERAL + HELDOUT:
        assert len(prompt.split()) <= 40
        assert len(tokenizer.encode(prompt)) + 2 <= 60


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny", "world,common"),
        (STABLE_DIFFUSION, "general"),
        ("stabilityai/sd-turbo", "general"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "general"),
        ("stabilityai/sdxl-turbo", "general"),
        ("./tiny", "general"),  # a folder: presets go by the name, and so do prompts
    ],
)
def test_a_model_that_is_not_the_tiny_one_trains_on_general(model, expected):
    assert resolve(TrainOptions(model=model)).prompts == expected
    assert resolve(TrainOptions(model=model, prompts="colour")).prompts == "colour"


def test_generals_held_out_sentences_are_its_own_and_no_others_are_held_out():
    assert split_prompts(resolve(TrainOptions(model="some/model"))) == (GENERAL, HELDOUT)


# --- text ---

TEXT, HELDOUT_TEXT = (read_prompts(name) for name in ("text", "text-heldout"))


def test_each_sentence_of_text_quotes_a_text_of_its_own_of_up_to_four_words():
    assert (len(TEXT), len(HELDOUT_TEXT)) == (150, 75)
    assert all(re.fullmatch(r'[^"]+ "[^"]+"(?: [^"]+)?', prompt) for prompt in TEXT + HELDOUT_TEXT if "," not in prompt)
    texts = [reward_specs.quoted(prompt) for prompt in TEXT + HELDOUT_TEXT]
    assert all(1 <= len(text.split()) <= 4 and text == text.upper() for text in texts)
    assert all(f'"{text}"' in prompt for text, prompt in zip(texts, TEXT + HELDOUT_TEXT, strict=True))
    assert len(set(texts)) == len({" ".join(words(prompt)) for prompt in TEXT + HELDOUT_TEXT}) == 225
    assert {len(text.split()) for text in texts} == {1, 2, 3, 4}


def test_no_word_that_the_held_out_sentences_quote_is_one_that_is_trained_on():
    trained, held_out = (
        {word for prompt in part for word in words(reward_specs.quoted(prompt))} for part in (TEXT, HELDOUT_TEXT)
    )
    assert not trained & held_out
    config = resolve(TrainOptions(model="some/model", reward="ocr", prompts="text"))
    assert split_prompts(config) == (TEXT, HELDOUT_TEXT)


def test_the_held_out_part_of_a_shipped_set_is_a_benchmark():
    assert prompt_sets.read_benchmark("text-heldout").prompts == HELDOUT_TEXT
    assert prompt_sets.read_benchmark("text").prompts == TEXT


# --- published training prompts ---

LONG = "a red circle " * 30  # for the tiny model, whose text encoder reads 24 tokens


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts rows on a fake hub, as the files of the training sets in their layouts; the list of downloads."""
    asked = []

    def put(prompts):
        write(tmp_path / "train.json", json.dumps([{"human_preference": [1, 0], "prompt": prompt} for prompt in prompts]))
        ranks = list(range(len(prompts)))
        parquet.write_table(pyarrow.table({"prompt": prompts, "rank": ranks}), tmp_path / "metadata-train.parquet")
        parquet.write_table(pyarrow.table({"caption": prompts, "rank": ranks}), tmp_path / "pickapic_training_sfw.parquet")
        return asked

    def download(repository, name, revision, repo_type):
        asked.append(Published(repository, revision, (name,)))
        assert repo_type == "dataset"
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return put


@pytest.mark.parametrize("name", TRAINING_SETS)
def test_a_published_training_set_is_read_at_its_pinned_revision_each_prompt_once(name, hub):
    asked = hub(["a cat", "Zwölf Würfel ☃", " a\n\tcat ", "", "a\x1b[2J dog\x9b", None, "a bird"])
    assert read_prompts(name) == ["a cat", "Zwölf Würfel ☃", "a [2J dog", "a bird"]
    assert asked == [TRAINING_SETS[name]]
    assert re.fullmatch("[0-9a-f]{40}", TRAINING_SETS[name].revision)


def test_halves_of_characters_in_json_become_spaces(hub):
    hub(["a cat"])
    json_of_hps = Path(huggingface_hub.hf_hub_download("", "train.json", None, "dataset"))
    json_of_hps.write_text('[{"prompt": "a \\ud83d dog"}]')
    assert read_prompts("hps") == ["a dog"]


@pytest.mark.parametrize("name", TRAINING_SETS)
def test_a_tenth_of_a_published_training_set_is_held_out_and_at_most_64(name, hub):
    prompts = [f"sentence number {i}" for i in range(1000)]
    hub(prompts)
    train, heldout = split_prompts(resolve(TrainOptions(model="some/model", prompts=name)))
    assert heldout == prompts[:640:10]
    assert train == [prompt for prompt in prompts if prompt not in heldout]


@pytest.mark.parametrize("name", TRAINING_SETS)
def test_without_the_hub_one_is_told_how_to_train_on_a_file(name):
    repository = TRAINING_SETS[name].repository
    with pytest.raises(NotFoundError, match=f"^prompts: {repository} could not be downloaded.*--prompts FILE"):
        read_prompts(name)


@pytest.mark.parametrize("name", [*TRAINING_SETS, "general", "world"])
def test_the_name_of_a_set_means_the_set_though_a_file_has_it_too(name, hub, tmp_path, monkeypatch):
    hub(["a cat", "a dog"])
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    Path(name).write_text("of the file\n")
    assert "of the file" not in read_prompts(name)
    assert read_prompts(f"./{name}") == ["of the file"]


def test_an_unknown_set_of_prompts_lists_the_known_ones():
    with pytest.raises(
        NotFoundError,
        match=r"sets are world, animals, .*general, .*from the hub hps, imagereward, pickapic; did you mean 'general'\?$",
    ):
        read_prompts("genral")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "must hold a JSON list"), ("[", "not JSON"), ("[5]", "entry 1"), ('[{"text": "a"}]', "no column")],
)
def test_a_published_training_set_in_another_layout_is_refused(content, words, hub, tmp_path):
    hub(["a cat"])
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(InputError, match=f"^prompts: .*{words}"):
        read_prompts("hps")


@pytest.fixture
def options(small_run, narrow_model, monkeypatch, tmp_path):
    """Options of a short training on ImageReward's prompts, of a narrow U-Net and without a curve."""
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
    monkeypatch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))
    del small_run["heldout_prompts"]
    return small_run | {"prompts": "imagereward", "output_dir": str(tmp_path / "out")}


# --- prompts that are longer than the text encoder reads ---


@pytest.mark.quick(1)
@pytest.mark.parametrize("source", ["imagereward", "also: a file", "also: held out"])
def test_prompts_that_are_too_long_are_cut_and_told_wherever_they_come_from(source, options, hub, tmp_path):
    texts = [f"a circle and {i} squares" if i not in (4, 10, 11) else f"{i} {LONG}" for i in range(20)]
    hub(texts)
    options = (
        options
        | {
            "imagereward": {},
            "also: a file": {"prompts": str(write(tmp_path / "long.txt", "\n".join(texts)))},
            "also: held out": {"prompts": str(write(tmp_path / "a.txt", "a cross")), "heldout_prompts": "imagereward"},
        }[source]
    )
    messages, config = [], resolve(TrainOptions(**options))
    assert plan(config)["prompts"].endswith(", 3 cut to 24 tokens")
    result = training.train(config, warn=messages.append)
    message, foreign = messages
    assert "only coloured shapes" in foreign
    number = 21 if source == "also: held out" else 20
    assert message.startswith(f"prompts: 3 of {number} prompts are cut to the 24 tokens that the text encoder reads, as ")
    assert f"a red circle {LONG}"[:40] in message
    assert result["num_prompts_cut"] == json.loads((tmp_path / "out" / "result.json").read_text())["num_prompts_cut"] == 3
    assert "Prompts that were cut to what the text encoder reads: 3." in (tmp_path / "out" / "README.md").read_text()
    assert training.train(config, resume=True) == result  # the same prompts as before


def test_nothing_is_said_where_every_prompt_fits(options, hub, tmp_path):
    hub([f"a {colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES])
    messages = []
    assert training.train(resolve(TrainOptions(**options)), warn=messages.append)["num_prompts_cut"] == 0
    assert messages == []
    assert "cut" not in (tmp_path / "out" / "README.md").read_text()


# --- one prompt ---


SINGLE = {
    "one line": "a red circle",
    "the same line twice": "a red circle\na red circle\n",
    "also: but for white space": "a red circle\n a  red circle \n",
    "also: but for capitals": "a red circle\nA red Circle\n",
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("content", SINGLE.values(), ids=SINGLE)
def test_a_single_prompt_is_measured_as_the_training_prompt_that_it_is(content, options, tmp_path):
    options["prompts"] = str(write(tmp_path / "one.txt", content))
    messages, config = [], resolve(TrainOptions(**options))
    train, heldout = split_prompts(config)
    assert (train[0], heldout) == ("a red circle", [])
    assert plan(config)["prompts"] == f"{len(train)} for training, none held out"
    result = training.train(config, warn=messages.append)
    (message,) = messages
    assert "cannot be held out, so base and tuned are measured on the training prompts" in message
    written = [(tmp_path / "out" / name).read_text() for name in ("result.json", "metrics.jsonl", "README.md")]
    assert not any("held-out" in text.lower() or "heldout" in text for text in written)
    assert "Training prompts, since a single prompt cannot be held out" in written[2]
    assert json.loads(written[0])["training_prompts"]["jpeg"] == result["training_prompts"]["jpeg"]
    assert all("training_prompts" in json.loads(line) for line in written[1].splitlines())
    with Console(record=True, width=200, file=io.StringIO()) as console:
        console.print(views.results_table(result))
        view = views.EpochView(config)
        for line in written[1].splitlines():
            view(json.loads(line))
            console.print(view.line(json.loads(line)))
        console.print(view.view())
    shown = console.export_text()
    assert "training prompts" in shown
    assert "held" not in shown


@pytest.mark.parametrize("second", ["a blue square", "a red circle."])
def test_of_two_prompts_one_is_held_out(second, options, tmp_path):
    options["prompts"] = str(write(tmp_path / "two.txt", f"a red circle\n{second}\n"))
    assert split_prompts(resolve(TrainOptions(**options))) == ([second], ["a red circle"])


def test_a_prompt_is_not_held_out_in_other_capitals(tmp_path):
    for name, text in (("train", "a cat\nA Dog\na bird"), ("heldout", "A CAT\na dog")):
        write(tmp_path / f"{name}.txt", text)
    paths = {"prompts": str(tmp_path / "train.txt"), "heldout_prompts": str(tmp_path / "heldout.txt")}
    assert split_prompts(resolve(TrainOptions(model="tiny", **paths))) == (["a bird"], ["A CAT", "a dog"])


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
    revision = BENCHMARKS["imagereward"].revision
    path = tmp_path / "snapshots" / revision / "metadata-test.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(table, path)

    def download(repository, file, **options):
        assert (options["revision"], file) == (revision, path.name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    benchmark = read_benchmark("imagereward")
    check(benchmark)
    assert benchmark.source["revision"] == revision
    prompts = write(tmp_path / "benchmark-prompts.json", json.dumps([{"id": "1", "prompt": prompt} for prompt in PROMPTS]))
    check(read_benchmark(str(prompts)), PROMPTS, 3 * [""])  # as on GitHub


def test_the_documents_say_of_each_published_benchmark_whether_it_is_pinned():
    page = (Path(prompt_sets.__file__).parent / "docs" / "evaluation.md").read_text()
    for name, published in BENCHMARKS.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert published.revision is None or re.fullmatch("[0-9a-f]{40}", published.revision)
        assert ("pinned" in row, "newest revision" in row) == (published.revision is not None, published.revision is None)


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


IMAGEREWARD_LIST = json.dumps([{"id": f"000-{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)], indent=1)


def table(columns, rows, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([columns, *rows])
    return text.getvalue()


LAYOUTS = {
    "a.json": IMAGEREWARD_LIST,
    "a.csv": table(["prompt", "category"], ROWS),
    "also.txt": IMAGEREWARD_LIST,  # by its content
    "also": "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS),  # likewise
    "also.tsv": table(["Category", "Prompts"], [row[::-1] for row in ROWS], "\t"),
    "also/a.json": json.dumps(PROMPTS),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_and_sampling_read_a_file_as_an_evaluation_does(name, tmp_path):
    path = write(tmp_path / "folder" / name, LAYOUTS[name])
    assert read_prompts(str(path)) == read_benchmark(str(path)).prompts == PROMPTS
    if "/" in name:
        assert read_prompts(str(path.parent)) == PROMPTS  # a folder of files


@pytest.mark.parametrize("first", ["[red] circle", "[", "{red|blue} circle", '"stop" on a sign', "prompt", "[/b], [1, 2]"])
def test_a_prompt_that_looks_a_little_like_another_layout_is_a_prompt(first, tmp_path):
    assert read_prompts(str(write(tmp_path / "a.txt", f"{first}\na cat\n"))) == [first, "a cat"]


def test_a_row_of_a_table_ends_where_its_line_ends(tmp_path):
    assert read_prompts(str(write(tmp_path / "a.csv", "prompt\na\u2028cat\na dog\n"))) == ["a\u2028cat", "a dog"]


def test_every_command_refuses_what_no_layout_is(tmp_path):
    path = write(tmp_path / "a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    for option in ("prompts", "heldout_prompts"):
        with pytest.raises(InputError, match=f"^{option}: .*a.txt' is a git-lfs pointer"):
            read_prompts(str(path), option)
    with pytest.raises(InputError, match=r"^prompts: .*a.yaml' must end in one of .txt"):
        read_prompts(str(write(tmp_path / "a.yaml", "- a cat")))


@pytest.mark.parametrize("command", ["train", "sample", "eval"])
def test_each_command_reads_a_json_file_and_tells_what_it_cuts(command, tmp_path, monkeypatch):
    path = write(tmp_path / "long.json", json.dumps([{"id": "1", "prompt": LONG}], indent=1))
    option = {"train": "--prompts", "sample": "--prompts", "eval": "--benchmark"}[command]
    arguments = {
        "train": ["--dry-run", "--model", "tiny", "--reward", "jpeg"],
        "sample": ["--model", "tiny", "--num-inference-steps", "1", "--num-images", "1"],
        "eval": ["--model", "tiny", "--num-inference-steps", "1", "--num-images", "1", "--reward", "jpeg"],
    }[command]
    result = invoke(command, option, str(path), *arguments, "--output-dir", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    said = f"1 of 1 prompts are cut to the 24 tokens that the text encoder reads, as {LONG[:60]!r}"
    assert ("1 cut to 24 tokens" if command == "train" else said) in " ".join(result.output.split())
    if command == "sample":
        assert Image.open(tmp_path / "out" / "00000.png").text["prompt_cut_to"] == "24 tokens"
    if command == "eval":
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert (results["prompts_cut"], results["num_tokens"]) == ([LONG.strip()], 24)
        assert "negative_prompt_cut_to" not in results
        assert "1 prompts are longer than the 24 tokens" in " ".join((tmp_path / "out" / "report.html").read_text().split())


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_the_end_of_a_negative_prompt_is_told_by_its_own_option(command, tmp_path):
    path, folder = write(tmp_path / "a.txt", "red\nblue\n"), tmp_path / "out"
    given = ["--prompts", str(path)] if command == "sample" else ["--benchmark", str(path), "--reward", "jpeg"]
    common = ["--model", "tiny", "--num-inference-steps", "1", "--num-images", "1", "--output-dir", str(folder)]
    result = invoke(command, *given, *common, "--negative-prompt", LONG)
    assert result.exit_code == 0, result.output
    said = "--negative-prompt: it is cut to the 24 tokens that the text encoder reads"
    assert said in " ".join(result.output.split())
    assert "prompts are cut" not in " ".join(result.output.split())
    if command == "sample":
        labels = Image.open(folder / "00000.png").text
        assert labels["negative_prompt_cut_to"] == "24 tokens"
        assert "prompt_cut_to" not in labels
    else:
        results = json.loads((folder / "results.json").read_text())
        assert (results["prompts_cut"], results["negative_prompt_cut_to"]) == ([], 24)
        assert "The negative prompt is longer than the 24 tokens" in (folder / "report.html").read_text()


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


def test_sets_are_joined_by_commas_with_what_each_keeps_apart():
    prompts = read_prompts("world,common")
    assert prompts == [*read_prompts("world"), *read_prompts("common")]
    train, heldout = split_prompts(resolve(TrainOptions(prompts="count,common,colour")))
    assert train == [*read_prompts("count"), *read_prompts("common"), *read_prompts("colour")]
    assert heldout == [*read_prompts("count-heldout"), *read_prompts("colour-heldout")]
    assert read_prompts("world, common") == prompts
    with pytest.raises(NotFoundError, match="no file 'world,kommon'"):
        read_prompts("world,kommon")
    with pytest.raises(InputError, match="'world,hps': sets from the hub stand alone"):
        read_prompts("world,hps")
