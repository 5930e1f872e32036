"""Adapters against plain peft and diffusers, at their scale, and refused where they are damaged or foreign."""

import json
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import texforce
from texforce import adapters, evaluate, models, sampler, train
from texforce.errors import ArtifactError
from texforce.config import TrainOptions, resolve
from texforce.config import SampleOptions, resolve_sample

WEIGHTS = "adapter_model.safetensors"
PROMPTS = ["a crimson disc", "two blue squares"]
OPTIONS = {  # learning rates high enough that one epoch is seen in the images
    "model": "tiny", "reward": "jpeg", "num_epochs": 1, "num_prompts_per_epoch": 2, "num_samples_per_prompt": 4,
    "num_updates_per_epoch": 2, "num_inference_steps": 5, "guidance_scale": 3.0, "learning_rate": 0.03, "rank": 4,
    "timestep_window": 1.0, "timestep_fraction": 1.0, "clip_range": 5e-3, "ema_decay": 0.0,
    "sample_batch_size": 8, "micro_batch_size": 8, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "null_prompt": "adapted",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a training each of the text encoder and of the U-Net, and the images that they last measured."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    files = {"prompts": str(folder / "prompts.txt"), "heldout_prompts": str(folder / "train.txt")}
    for target, options in (("text-encoder", {}), ("unet", {}), ("base-null", {"null_prompt": "base"})):
        drawn = []

        def keep(*args, drawn=drawn):
            images = original(*args)  # noqa: B023
            drawn.append(torch.cat(list(images.values())))
            return images

        with pytest.MonkeyPatch.context() as patch:
            original = train.draw_share
            patch.setattr(heldout, "draw_share", keep)
            target_option = {"target": target.replace("base-null", "text-encoder"), "output_dir": str(folder / target)}
            train.train(resolve(TrainOptions(**OPTIONS | files | target_option | options)))
        torch.save(drawn, folder / f"{target}.images")
    return folder


@pytest.fixture
def adapter(runs, tmp_path) -> Path:
    """A copy of the text encoder's training, to be damaged."""
    return Path(shutil.copytree(runs / "text-encoder", tmp_path / "adapter"))


@pytest.fixture(scope="module")
def pipeline():
    """The tiny model as plain diffusers loads it."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(models.TINY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_adapter(models: models.Model, folder: Path, scale: float = 1.0) -> models.Model:
    return adapters.load_adapters(models, [str(folder)], scale)


def load_tiny() -> models.Model:
    return models.load_model("tiny")


def sample(adapters: list[Path], **options) -> dict[str, Tensor]:
    """texforce's own images of the prompts, of seeds 5 and 6."""
    config = resolve_sample(SampleOptions(adapter=[str(path) for path in adapters], prompt=PROMPTS, **options))
    return evaluate.sample(config, PROMPTS, [5, 6])


def by_diffusers(pipeline, **arguments) -> Tensor:
    """The same images by plain diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt"}
    return pipeline(PROMPTS, generator=generators, **options, **arguments).images


# --- used as plain peft and diffusers use them ---


def test_plain_peft_and_diffusers_draw_the_same_images(runs, pipeline):
    from peft import PeftModel

    ours = sample([runs / "text-encoder"], compare=True)
    base = by_diffusers(pipeline)
    torch.testing.assert_close(base, ours["base"], rtol=0, atol=1e-4)
    adapted = PeftModel.from_pretrained(load_tiny().text_encoder, runs / "text-encoder")
    pipeline.text_encoder, plain = adapted, pipeline.text_encoder
    tuned = by_diffusers(pipeline)
    pipeline.text_encoder = plain
    torch.testing.assert_close(tuned, ours["tuned"], rtol=0, atol=1e-4)
    assert (tuned - base).abs().max() > 0.01


def test_plain_diffusers_draws_the_same_images_with_the_null_prompt_of_the_base_encoder(runs, pipeline):
    from peft import PeftModel

    ours = sample([runs / "base-null"])
    null, _ = pipeline.encode_prompt("", "cpu", 1, False)
    adapted = PeftModel.from_pretrained(load_tiny().text_encoder, runs / "base-null")
    pipeline.text_encoder, plain = adapted, pipeline.text_encoder
    tuned = by_diffusers(pipeline, negative_prompt_embeds=null.repeat(2, 1, 1))
    pipeline.text_encoder = plain
    torch.testing.assert_close(tuned, ours["tuned"], rtol=0, atol=1e-4)


def test_plain_peft_loads_a_unets_adapter_from_its_subfolder(runs, pipeline):
    from peft import PeftModel

    ours = sample([runs / "unet"])
    plain = pipeline.unet
    pipeline.unet = PeftModel.from_pretrained(load_tiny().unet, runs / "unet" / "unet")
    tuned = by_diffusers(pipeline)
    pipeline.unet = plain
    torch.testing.assert_close(tuned, ours["tuned"], rtol=0, atol=1e-4)


def test_the_defaults_of_sampling_are_those_of_the_adapters_training(runs):
    config = resolve_sample(SampleOptions(adapter=[str(runs / "text-encoder")], prompt=PROMPTS))
    assert (config.model, config.num_inference_steps, config.guidance_scale) == ("tiny", 5, 3.0)
    assert config.null_prompt == "adapted"
    assert resolve_sample(SampleOptions(adapter=[str(runs / "base-null")], prompt=PROMPTS)).null_prompt == "base"


# --- the scale ---


def test_scale_zero_is_the_base_model_bit_for_bit(runs):
    for name in ("text-encoder", "unet"):
        images = sample([runs / name], scale=0.0, compare=True)
        assert torch.equal(images["tuned"], images["base"])


@pytest.mark.parametrize("name", ["text-encoder", "unet", "base-null"])
def test_scale_one_draws_the_images_that_training_measured(runs, name):
    base, tuned = torch.load(runs / f"{name}.images")
    assert (tuned - base).abs().max() > 0.01
    settings = json.loads((runs / name / "config.json").read_text())
    config = resolve(TrainOptions(**settings))
    models = load_adapter(load_tiny(), runs / name)
    policy = texforce.Policy(models, config.null_prompt)
    schedule = sampler.ddim_schedule(models.scheduler, config.num_inference_steps, config.eta)
    denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale)
    assert torch.equal(train.heldout_images(policy, denoiser, PROMPTS, config), tuned)
    with policy.base():
        assert torch.equal(train.heldout_images(policy, denoiser, PROMPTS, config), base)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_the_scale_multiplies_the_deltas_of_the_weights(runs, part):
    folder = runs / part.replace("_", "-")
    base = getattr(load_tiny(), part).state_dict()

    def merged(scale: float) -> dict[str, Tensor]:
        return getattr(load_adapter(load_tiny(), folder, scale), part).merge_and_unload().state_dict()

    once, twice, half = merged(1.0), merged(2.0), merged(0.5)
    assert base.keys() == once.keys() == twice.keys()
    changed = {name for name in base if not torch.equal(base[name], once[name])}
    expected = {name.removesuffix(".lora_A.weight") for name in saved_tensors(folder) if ".lora_A." in name}
    assert changed == {f"{name.removeprefix('base_model.model.')}.weight" for name in expected}
    for name in changed:
        delta = once[name] - base[name]
        torch.testing.assert_close(twice[name] - base[name], 2 * delta, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(half[name] - base[name], delta / 2, rtol=1e-4, atol=1e-6)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    return load_file(path if path.is_file() else folder / "unet" / WEIGHTS)


def test_the_scale_counts_from_lora_alpha_over_rank(runs, tmp_path):
    """An adapter of another alpha, as other tools write it, is put on at its own strength times the scale."""
    folder = Path(shutil.copytree(runs / "text-encoder", tmp_path / "alpha"))
    change_config(folder, lora_alpha=8)
    delta = {}
    for name, path in (("plain", runs / "text-encoder"), ("double", folder)):
        layer = next(m for m in load_adapter(load_tiny(), path).text_encoder.modules() if hasattr(m, "get_delta_weight"))
        delta[name] = layer.get_delta_weight("default")
    assert delta["plain"].any()
    torch.testing.assert_close(delta["double"], 2 * delta["plain"])


def test_a_loaded_adapter_is_frozen_and_in_evaluation(runs):
    models = adapters.load_adapters(load_tiny(), [str(runs / "text-encoder"), str(runs / "unet")])
    for part in (models.text_encoder, models.unet):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())


# --- joining ---


def test_a_text_encoders_and_a_unets_adapter_join(runs, pipeline):
    from peft import PeftModel

    joined = sample([runs / "text-encoder", runs / "unet"])["tuned"]
    assert torch.equal(sample([runs / "unet", runs / "text-encoder"])["tuned"], joined)
    for alone in ("text-encoder", "unet"):
        assert (sample([runs / alone])["tuned"] - joined).abs().max() > 0.01
    plain = pipeline.text_encoder, pipeline.unet
    models = load_tiny()
    pipeline.text_encoder = PeftModel.from_pretrained(models.text_encoder, runs / "text-encoder")
    pipeline.unet = PeftModel.from_pretrained(models.unet, runs / "unet" / "unet")
    tuned = by_diffusers(pipeline)
    pipeline.text_encoder, pipeline.unet = plain
    torch.testing.assert_close(tuned, joined, rtol=0, atol=1e-4)


def test_two_adapters_of_one_part_are_refused(runs):
    models = load_adapter(load_tiny(), runs / "text-encoder")
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(models, runs / "base-null")


def test_one_folder_may_hold_both(runs, tmp_path):
    shutil.copytree(runs / "text-encoder", tmp_path / "both")
    shutil.copytree(runs / "unet" / "unet", tmp_path / "both" / "unet")
    joined = sample([runs / "text-encoder", runs / "unet"])["tuned"]
    assert torch.equal(sample([tmp_path / "both"])["tuned"], joined)


# --- refusals ---


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail rather than hang."""

    def stop(*_):
        pytest.fail(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def first_key(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


WRONG_WEIGHTS = {
    "NaN": lambda t: t | {first_key(t): t[first_key(t)] * math.nan},
    "infinite": lambda t: t | {first_key(t): t[first_key(t)] + math.inf},
    "misshapen": lambda t: t | {first_key(t): t[first_key(t)].repeat(1, 2)},
    "transposed": lambda t: t | {first_key(t): t[first_key(t)].T.contiguous()},
    "foreign": lambda t: t | {"base_model.model.encoder.layers.9.self_attn.q_proj.lora_A.weight": t[first_key(t)].clone()},
    "lacking": lambda t: {name: tensor for name, tensor in t.items() if name != first_key(t)},
    "empty": lambda t: {},
    "kohya": lambda t: {name.replace("base_model.model.", "lora_te_text_model_"): t[name] for name in t},
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused_by_file(adapter, wrong):
    change_weights(adapter, WRONG_WEIGHTS[wrong])
    with pytest.raises(ArtifactError, match=WEIGHTS):
        load_adapter(load_tiny(), adapter)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(adapter, share):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError, match="refused as an adapter: "):
        load_adapter(load_tiny(), adapter)


@pytest.mark.parametrize(("changes", "words"), [
    ({"target_modules": r"^(([a-z]+)+\.?)+$"}, "target_modules"),
    ({"target_modules": r".*q_proj"}, "target_modules"),
    ({"target_modules": ["q_proj", 3]}, "target_modules"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": []}, "adapter"),
    ({"target_modules": ["no_such_layer"]}, "not among target_modules"),
    ({"r": 10**9}, "r must be"),
    ({"r": 0}, "r must be"),
    ({"r": -4}, "r must be"),
    ({"r": "4"}, "r must be"),
    ({"r": 8}, "has rank 4, and its configuration says 8"),
    ({"lora_alpha": "4"}, "lora_alpha"),
    ({"lora_alpha": math.nan}, "lora_alpha"),
    ({"lora_alpha": math.inf}, "lora_alpha"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"rank_pattern": {"q_proj": 8}}, "has rank 4, and its configuration says 8"),
    ({"rank_pattern": {r"^(([a-z]+)+\.?)+$": 8}}, "rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"alpha_pattern": {r"(a+)+$": 8}}, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
    ({"modules_to_save": ["final_layer_norm"]}, "modules_to_save"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_honoured_is_refused_at_once(adapter, changes, words):
    change_config(adapter, **changes)
    models = load_tiny()
    with at_most(10), pytest.raises(ArtifactError, match=words):
        load_adapter(models, adapter)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"{}", b'{"r": 4}', b"[" * 100_000,
], ids=["empty", "cut", "list", "number", "null", "not-utf-8", "no-fields", "few-fields", "nested"])  # fmt: skip
def test_a_configuration_that_is_none_is_refused_by_file(adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        load_adapter(load_tiny(), adapter)


def test_a_unets_damaged_adapter_is_refused_too(runs, tmp_path):
    folder = Path(shutil.copytree(runs / "unet", tmp_path / "adapter"))
    change_weights(folder / "unet", WRONG_WEIGHTS["lacking"])
    with pytest.raises(ArtifactError, match="missing"):
        load_adapter(load_tiny(), folder)


def test_a_unets_adapter_may_lie_in_the_folder_itself(runs, tmp_path):
    folder = shutil.copytree(runs / "unet" / "unet", tmp_path / "adapter")
    options = {"num_inference_steps": 5, "guidance_scale": 3.0}
    assert torch.equal(sample([folder], **options)["tuned"], sample([runs / "unet"], **options)["tuned"])


def test_an_adapter_of_a_wider_model_is_refused(adapter):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = replace_width(load_tiny().text_encoder.config, CLIPTextConfig)
    models = replace(load_tiny(), text_encoder=CLIPTextModel(config))
    with pytest.raises(ArtifactError, match="made for another model: "):
        load_adapter(models, adapter)


def replace_width(config, kind):
    return kind(**config.to_dict() | {"hidden_size": 128, "intermediate_size": 512})


def test_a_folder_without_an_adapter_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"holds neither adapter_config\.json|there is no file or folder"):
            load_adapter(load_tiny(), folder)


def test_a_folder_without_weights_is_named(adapter):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_adapter(load_tiny(), adapter)


def test_a_refused_adapter_leaves_no_half_of_a_pair_on_the_models(runs, tmp_path):
    """The models given are what they were: a caller that catches the error still holds the base model."""
    folder = Path(shutil.copytree(runs / "unet", tmp_path / "adapter"))
    change_weights(folder / "unet", WRONG_WEIGHTS["NaN"])
    models = load_tiny()
    with pytest.raises(ArtifactError):
        load_adapter(models, folder)
    assert not hasattr(models.unet, "peft_config")
