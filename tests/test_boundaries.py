"""Whatever a library raises while it reads a file of others becomes an expected error that names the file."""

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from texforce import (
    adapters,
    eval_checks,
    evaluation,
    files,
    lora_files,
    merging,
    models,
    prompt_sets,
    report,
    rewards,
    sampler,
    scorers,
)
from texforce.draw_config import SampleOptions, System, resolve_sample
from texforce.errors import SAFETY_SWITCHES, ArtifactError, InputError, NotFoundError, TexforceError
from texforce.lora_files import lora_tensors

from .hostile import blank_png, hostile_objects
from .small_models import random_layers

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Contents that take the place of a whole file; each is wrong wherever JSON, tensors, a table or an image is expected.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "a pointer of git-lfs": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    "a JSON list": lambda whole: b"[1, [2]]",
    "deep JSON": lambda whole: b"[" * 100_000,
    "JSON of other fields": lambda whole: (
        b'{"r": "x", "target": [], "model": 7, "state_dict": null, "hidden_size": "x", "text_config": 7}'
    ),
    "no UTF-8": lambda whole: b"\xff\xfe\x00{",
}
FOLDER, PICKLE = "a folder", "a pickle that runs code"
KINDS = (*DAMAGES, FOLDER, PICKLE)


def link_folder(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are hard links, where the file system has them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy(one, other)

    return Path(shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def damage(path: Path, kind: str, created_in: Path) -> None:
    """Put something wrong in the place of a file, which may be a hard link and is therefore removed first."""
    whole = path.read_bytes()
    path.unlink()
    if kind == FOLDER:
        path.mkdir()
    elif kind == PICKLE:
        hostile, content = hostile_objects(created_in)[0], io.BytesIO()
        torch.save(hostile, content) if path.suffix in WEIGHTS else pickle.dump(hostile, content)
        path.write_bytes(content.getvalue())
    else:
        path.write_bytes(DAMAGES[kind](whole))


def damage_part(path: Path, kind: str, created_in: Path) -> Path:
    """Damage a file of a pipeline, or remove it; weights of safetensors become a pickle first if the name asks for one."""
    if path.suffix == ".bin":
        safe = next(path.parent.glob("*.safetensors"))
        torch.save(load_file(safe), path)
        safe.unlink()
    if kind == "nothing":
        path.unlink()
    else:
        damage(path, kind, created_in)
    return path


def check_refused(read: Callable[[], object], path: Path, kind: type[TexforceError], tmp_path: Path) -> None:
    """Check the class and the message of the error that reading a damaged file raises, and that no code was run."""
    with pytest.raises(TexforceError) as caught:
        read()
    error, message = caught.value, str(caught.value)
    assert isinstance(error, (kind, NotFoundError) if path.is_dir() else kind), repr(error)
    assert path.name in message or str(path.parent) in message or str(path.parents[1]) in message, message
    assert not any(switch in message for switch in SAFETY_SWITCHES), message
    assert len(message.splitlines()) == 1, message
    assert not (tmp_path / "created").exists()


# --- models ---


MODEL_FILES = (
    "model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip


@pytest.fixture
def no_safety_by_environment(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not open the door


@pytest.mark.quick(40)
@pytest.mark.parametrize("kind", [*KINDS, "nothing"])
@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.usefixtures("no_safety_by_environment")
def test_a_damaged_file_of_a_model_is_bad_input_that_names_the_model(stable_diffusion, tmp_path, name, kind):
    folder = link_folder(stable_diffusion, tmp_path / "model")
    path = damage_part(folder / name, kind, tmp_path)
    part = path if path.parent == folder else path.parent
    check_refused(lambda: models.load_model(str(folder)), part, InputError, tmp_path)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("kind", ["a pointer of git-lfs", "also empty", "also no UTF-8"])
def test_a_file_of_a_model_that_has_no_content_of_its_kind_is_named_itself(stable_diffusion, tmp_path, name, kind):
    folder = link_folder(stable_diffusion, tmp_path / "model")
    path = folder / name
    if path.suffix == ".bin":
        next(path.parent.glob("*.safetensors")).rename(path)
    if path.suffix != ".json" and kind == "also no UTF-8":
        return
    damage(path, kind.removeprefix("also "), tmp_path)
    with pytest.raises(InputError, match=name):
        models.load_model(str(folder))


@pytest.fixture(scope="module")
def with_checker(stable_diffusion, tmp_path_factory) -> Path:
    """The folder of a pipeline with a safety checker. Do not change it."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = link_folder(stable_diffusion, tmp_path_factory.mktemp("checked") / "model")
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").unlink()  # a hard link
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


ACCESSORIES = (
    "safety_checker/config.json", "safety_checker/model.safetensors", "safety_checker/pytorch_model.bin",
    "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
)  # fmt: skip


@pytest.mark.quick(8)
@pytest.mark.parametrize("kind", ["empty", "truncated", "a pointer of git-lfs", "JSON of other fields", PICKLE, "nothing"])
@pytest.mark.parametrize("name", ACCESSORIES)
@pytest.mark.usefixtures("no_safety_by_environment")
def test_a_damaged_file_of_a_pipeline_to_merge_into_is_bad_input_that_names_the_part(with_checker, tmp_path, name, kind):
    folder = link_folder(with_checker, tmp_path / "model")
    path = damage_part(folder / name, kind, tmp_path)
    if (path.parent.name, kind) == ("feature_extractor", "JSON of other fields"):  # its fields are all optional
        merging.load_pipeline(str(folder))
        return
    check_refused(lambda: merging.load_pipeline(str(folder)), path.parent, InputError, tmp_path)


def test_a_pipeline_with_a_safety_checker_is_loaded_whole_and_its_parts_are_only_read_if_wanted(with_checker, tmp_path):
    folder = link_folder(with_checker, tmp_path / "model")
    checker = merging.load_pipeline(str(folder)).safety_checker.state_dict()
    for name, tensor in load_file(folder / "safety_checker" / "model.safetensors").items():
        assert torch.equal(checker[name.replace("vision_model.vision_model", "vision_model")], tensor)
    for part in merging.ACCESSORIES:
        shutil.rmtree(folder / part, ignore_errors=True)
    assert merging.load_pipeline(str(folder), merging.ACCESSORIES).safety_checker is None
    models.load_model(str(folder))


WRONG_FIELDS = [
    ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}),
    ("unet/config.json", {"sample_size": [8, 16]}),
    ("unet/config.json", {"sample_size": "8"}),
    ("unet/config.json", {"sample_size": []}),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "foo"}),
    ("scheduler/scheduler_config.json", {"timestep_spacing": ["leading"]}),
    ("scheduler/scheduler_config.json", {"steps_offset": "x", "timestep_spacing": "leading"}),
]


@pytest.mark.quick(3)
@pytest.mark.parametrize(("name", "fields"), WRONG_FIELDS)
def test_a_field_of_a_model_that_cannot_be_used_is_bad_input(stable_diffusion, tmp_path, name, fields):
    path = link_folder(stable_diffusion, tmp_path / "model") / name
    content = json.loads(path.read_text()) | fields
    path.unlink()
    path.write_text(json.dumps(content))

    def use() -> None:
        model = models.load_model(str(tmp_path / "model"))
        sampler.ddim_schedule(model.scheduler, 4, 1.0)

    with pytest.raises(InputError, match=path.name if "scheduler" in name else str(tmp_path / "model")):
        use()


# --- adapters and U-Nets ---


PEFT = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
ADAPTER_FILES = (
    "peft/adapter_config.json", "peft/adapter_model.safetensors", "pickled/adapter_config.json", "pickled/adapter_model.bin",
    "lora.safetensors", "lora.bin", "diffusers/pytorch_lora_weights.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(stable_diffusion):
    return merging.load_pipeline(str(stable_diffusion))


@pytest.fixture(scope="module")
def whole_adapters(pipeline, tmp_path_factory) -> Path:
    """A folder with an adapter in each of the files and folders of ADAPTER_FILES."""
    folder = tmp_path_factory.mktemp("adapters")
    tensors = lora_tensors(random_layers(pipeline.text_encoder, 1))
    in_diffusers = {f"text_encoder.{name}": tensor for name, tensor in tensors.items()}
    in_peft = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    for name in ADAPTER_FILES:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(PEFT))
        else:
            content = in_peft if path.name.startswith("adapter_model") else in_diffusers
            save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return folder


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_the_adapters_that_are_damaged_below_are_read_whole(pipeline, whole_adapters, name):
    path = whole_adapters / name
    lora_files.read_adapter(path if path.parent == whole_adapters else path.parent, pipeline)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.usefixtures("no_safety_by_environment")
def test_a_damaged_file_of_an_adapter_is_refused_by_name(pipeline, whole_adapters, tmp_path, name, kind):
    folder = link_folder(whole_adapters, tmp_path / "adapters")
    path = folder / name
    damage(path, kind, tmp_path)
    source = path if path.parent == folder else path.parent
    if (name, kind) == ("peft/adapter_config.json", FOLDER):  # the file of weights alone is an adapter too
        lora_files.read_adapter(source, pipeline)
        return
    check_refused(lambda: lora_files.read_adapter(source, pipeline), path, ArtifactError, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["unet.safetensors", "unet.bin", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.usefixtures("no_safety_by_environment")
def test_a_damaged_file_of_a_tuned_unet_is_refused_by_name(pipeline, tmp_path, name, kind):
    path = tmp_path / "tuned" / name
    path.parent.mkdir(parents=True)
    state = pipeline.unet.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    damage(path, kind, tmp_path)
    source = path.parent if path.parent.name == "unet" else path
    check_refused(lambda: adapters.read_unet(source, pipeline), path, ArtifactError, tmp_path)


# --- scorers ---


SCORER_FILES = {
    "hps": ("hps.pt", "hps.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "hps.safetensors"),
    "clip": (
        "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json",
    ),
    "hand": ("preprocessor_config.json",),
    "imagereward": ("reward.pt", "vocab.txt", "tokenizer.json"),
    "aesthetic": ("head.pth",),
}  # fmt: skip


HARMLESS = {  # tokenizer.json holds all that is needed
    ("hps", "tokenizer/tokenizer_config.json"): (FOLDER, "JSON of other fields"),
    ("clip", "tokenizer_config.json"): (FOLDER,),
}


@pytest.fixture(scope="module")
def scorer_folders(tmp_path_factory) -> Path:
    """A folder of each scorer, small and whole as far as it is read before the damaged file."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("scorers")
    tokenizer = models.TINY / "tokenizer"
    hps = folder / "hps"
    hps.mkdir()
    shutil.copytree(tokenizer, hps / "tokenizer")
    for name in ("hps.pt", "hps.json"):
        shutil.copy(models.TINY / name, hps / name)
    save_file(torch.load(hps / "hps.pt")["state_dict"], hps / "hps.safetensors")
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 1144, "max_position_embeddings": 24},
        vision_config=tower | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    shutil.copytree(tokenizer, folder / "clip", dirs_exist_ok=True)
    torch.save(load_file(folder / "clip" / "model.safetensors"), folder / "clip" / "pytorch_model.bin")
    shutil.copytree(folder / "clip", folder / "hand")
    (folder / "hand" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Owlv2ImageProcessor"}))
    for name in ("imagereward", "aesthetic"):
        shutil.copytree(tokenizer, folder / name)
        for file in ("reward.pt", "head.pth"):
            torch.save({}, folder / name / file)
        (folder / name / "vocab.txt").write_text("[CLS]\n[SEP]\n")
    return folder


def load_scorer(name: str, folder: Path, file: str) -> object:
    if name == "hps":
        checkpoint = folder / (file if file.startswith("hps.") and file != "hps.json" else "hps.pt")
        return rewards.load_reward("hps", checkpoints={"hps": checkpoint})
    if name == "imagereward":
        return scorers.ImageReward(folder / "reward.pt", folder)
    if name == "aesthetic":
        return scorers.Aesthetic(folder / "head.pth", folder.parent / "clip")
    return {"clip": scorers.CLIP, "hand": scorers.Hand}[name](folder)


@pytest.mark.quick(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, given in SCORER_FILES.items() for file in given])
@pytest.mark.usefixtures("no_safety_by_environment")
def test_a_damaged_file_of_a_scorer_is_refused_by_name(scorer_folders, tmp_path, name, file, kind):
    folder = link_folder(scorer_folders / name, tmp_path / name)
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    damage(folder / file, kind, tmp_path)
    if kind in HARMLESS.get((name, file), ()):
        load_scorer(name, folder, file)
        return
    check_refused(lambda: load_scorer(name, folder, file), folder / file, ArtifactError, tmp_path)


def test_a_scorer_without_a_file_of_settings_is_named_by_its_checkpoint(scorer_folders, tmp_path, monkeypatch):
    import open_clip

    def fail(name):
        raise KeyError(name)

    monkeypatch.setattr(open_clip, "get_model_config", fail)
    path = link_folder(scorer_folders / "hps", tmp_path / "hps") / "hps.pt"
    path.with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match=rf"^{path}: refused"):
        scorers.HPS(path)


def test_a_library_that_cannot_be_imported_is_no_fault_of_a_scorers_file(scorer_folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="open_clip"):
        scorers.HPS(scorer_folders / "hps" / "hps.pt")


def test_the_scorers_that_are_damaged_above_are_read_whole(scorer_folders):
    for name in ("hps", "clip"):
        load_scorer(name, scorer_folders / name, "")


# --- prompts ---


TABLES = {
    ".txt": "a red circle\ntwo blue squares\n",
    ".jsonl": '{"prompt": "a red circle"}\n{"prompt": "two blue squares", "category": "count"}\n',
    ".json": '[{"prompt": "a red circle"}, {"prompt": "two blue squares"}]',
    ".csv": 'prompt,category\n"a red circle",colour\n"two blue squares",count\n',
    ".parquet": "",
}
TEXT_IS_FINE = ("truncated", "a pointer of git-lfs", "a JSON list", "deep JSON", "JSON of other fields")


def damages_of_tables() -> Iterator[tuple[str, str]]:
    for suffix in TABLES:
        for kind in KINDS:
            if not (suffix == ".txt" and kind in TEXT_IS_FINE) and (suffix, kind) != (".csv", "truncated"):
                yield suffix, kind


@pytest.mark.parametrize(("suffix", "kind"), damages_of_tables())
def test_a_damaged_file_of_prompts_is_bad_input_that_is_named(tmp_path, suffix, kind):
    path = tmp_path / f"some{suffix}"
    path.write_text(TABLES[suffix])
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"prompt": ["a red circle", "two blue squares"]}), path)
    assert len(prompt_sets.read_benchmark(str(path)).prompts) == 2
    damage(path, kind, tmp_path)
    check_refused(lambda: prompt_sets.read_benchmark(str(path)), path, InputError, tmp_path)
    if suffix == ".txt":
        check_refused(lambda: prompt_sets.read_prompts(str(path)), path, InputError, tmp_path)


# --- evaluations and runs ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_of_an_evaluation_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "00000_0.png"
    files.write_image(path, torch.rand(3, 16, 16), {"prompt": "a red circle"})
    damage(path, kind, tmp_path)
    check_refused(lambda: files.read_image(path), path, ArtifactError, tmp_path)


@pytest.mark.parametrize(("sizes", "rows"), [
    ([(60_000, 60_000)], 1), ([(8192, 4097)], 1), ([(16, 16), (8192, 8192)], None),
], ids=["60,000 x 60,000", "also a little too large", "also with two headers"])  # fmt: skip
def test_an_image_larger_than_any_that_is_drawn_is_refused_before_it_is_decoded(tmp_path, monkeypatch, sizes, rows):
    from PIL import PngImagePlugin

    path = tmp_path / "00000_0.png"
    path.write_bytes(blank_png(*sizes, rows=rows))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("it was decoded"))
    for read in (files.read_image, report.thumbnail):
        check_refused(lambda read=read: read(path), path, ArtifactError, tmp_path)


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (16, 16)], ids=["also upright", "also lying", "another size"])
def test_images_of_a_prompt_that_differ_in_size_are_refused_by_name(tmp_path, size):
    config = SimpleNamespace(num_images=2, output_dir=str(tmp_path), batch_size=2)
    small = evaluation.Evaluation(config, SimpleNamespace(prompts=["a"]), [System("base")])
    (tmp_path / "images" / "base").mkdir(parents=True)
    paths = [tmp_path / small.image(System("base"), 0, k) for k in range(2)]
    for path, shape in zip(paths, ((8, 8), size), strict=True):
        path.write_bytes(blank_png(shape))
    check_refused(lambda: small.read_images(System("base"), range(1)), paths[1], ArtifactError, tmp_path)


@pytest.mark.parametrize("line", [
    '{"system": 1}', "[]", "[" * 100_000, '{"a":' * 100_000, '{"system": [1], "measure": "a", "start": 0, "scores": []}',
    "7", '{"system": "base", "measure": {}, "start": 0, "scores": []}',
], ids=["no measure", "a list", "deep lists", "also objects", "also a name", "also a number", "also an object"])  # fmt: skip
def test_a_line_of_scores_that_is_none_is_bad_input_that_is_named(tmp_path, line):
    path = tmp_path / evaluation.SCORES
    path.write_text(line + "\n")
    check_refused(lambda: evaluation.ScoreFile(path), path, InputError, tmp_path)


@pytest.fixture
def begun(tmp_path, monkeypatch) -> SimpleNamespace:
    """An evaluation with its settings in its folder."""
    settings = {"model": "tiny", "systems": {"base": {"adapters": [], "unets": []}}}
    monkeypatch.setattr(evaluation, "describe", lambda begun: settings)
    begun = SimpleNamespace(folder=tmp_path / "eval", systems=[System(name="base")])
    begun.folder.mkdir()
    evaluation.write_settings(begun)
    return begun


@pytest.mark.parametrize("kind", [*DAMAGES, PICKLE, "systems that are none"])
def test_damaged_settings_of_an_evaluation_are_bad_input_that_is_named(begun, tmp_path, kind):
    path = begun.folder / eval_checks.SETTINGS
    if kind in KINDS:
        damage(path, kind, tmp_path)
    else:
        path.write_text('{"model": "tiny", "systems": {"base": 7}}')
    check_refused(lambda: evaluation.write_settings(begun), path, InputError, tmp_path)


@pytest.mark.parametrize("kind", [*DAMAGES, PICKLE])
def test_damaged_scores_of_an_evaluation_are_measured_anew_or_named(tmp_path, kind):
    path = tmp_path / evaluation.SCORES
    line = {"system": "base", "measure": "jpeg", "start": 0, "scores": [1.0]}
    path.write_text(json.dumps(line) + "\n")
    damage(path, kind, tmp_path)
    if kind in ("JSON of other fields", "a pointer of git-lfs"):  # the others are one line that may have been cut off
        check_refused(lambda: evaluation.ScoreFile(path), path, InputError, tmp_path)
    else:
        assert evaluation.ScoreFile(path).scores == {}
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("scores", [
    None, 7, {"0": 1.0}, "12", [], [1.0], [1.0, 2.0, 3.0], ["1", "2"], [True, False], [[1.0], [2.0]], [1.0, 10**400],
], ids=str)  # fmt: skip
def test_scores_of_an_evaluation_that_are_none_or_too_few_are_bad_input_that_is_named(tmp_path, scores):
    path = tmp_path / evaluation.SCORES
    lines = [{"system": "base", "measure": "jpeg", "start": start, "scores": [0.0, None]} for start in (0, 2)]
    files.append_line(path, lines[0])
    files.append_line(path, lines[1])
    chunks = [range(2), range(2, 4)]
    assert evaluation.ScoreFile(path).table("base", "jpeg", chunks, 1).shape == (4, 1)
    files.append_line(path, lines[1] | {"scores": scores})
    check_refused(lambda: evaluation.ScoreFile(path).table("base", "jpeg", chunks, 1), path, InputError, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "texforce.json"])
@pytest.mark.parametrize("kind", [*DAMAGES, PICKLE])
def test_damaged_settings_of_a_run_or_a_merge_are_bad_input_that_is_named(tmp_path, name, kind):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text(json.dumps({"model": "tiny", "num_inference_steps": 4}))
    options = SampleOptions(adapter=[str(path.parent)], prompt=["a red circle"])
    assert resolve_sample(options).num_inference_steps == 4
    damage(path, kind, tmp_path)
    check_refused(lambda: resolve_sample(options), path, InputError, tmp_path)
