"""Checkpoints of one file as models: read by diffusers and compared with the file, with nothing asked of the hub."""

import json
import pickle
import socket

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from texforce import evaluation, merging, models, presets, single_file, tokenization
from texforce.draw_config import MergeOptions, SampleOptions, resolve_merge, resolve_sample
from texforce.errors import ArtifactError, InputError

from . import small_models
from .commands import invoke

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module", params=["1", "2", "xl"])
def checkpoint(request, tmp_path_factory):
    """A pipeline with LoRA merged into it as a checkpoint of one file, and as a folder."""
    root = tmp_path_factory.mktemp("single")
    if request.param == "xl":
        base = small_models.save_stable_diffusion_xl(root / "base")
    else:
        base = small_models.save_stable_diffusion(root / "base", int(request.param))
    pipeline = merging.load_pipeline(str(base))
    layers = {"text_encoder": small_models.random_layers(pipeline.text_encoder, 1)}
    options = {"model": str(base), "output_dir": str(root / "lora"), "format": "peft", "adapter": [str(base)]}
    (root / "lora").mkdir()
    merging.write_peft(merging.Merged(pipeline, layers, resolve_merge(MergeOptions(**options))), root / "lora")
    folders = {}
    for format in ("checkpoint", "pipeline"):
        options = {"model": str(base), "adapter": [str(root / "lora")], "output_dir": str(root / format), "format": format}
        folders[format] = merging.merge(resolve_merge(MergeOptions(**options)))
    return folders["checkpoint"] / "checkpoint.safetensors", folders["pipeline"]


def images(model, **options):
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "resolution": 64, "eta": 1.0} | options
    config = resolve_sample(SampleOptions(model=str(model), prompt=PROMPTS, **given))
    return evaluation.sample(config, PROMPTS, [0, 1])["base"]


@pytest.mark.quick(1)
def test_a_checkpoint_draws_what_its_folder_draws(checkpoint):
    file, folder = checkpoint
    assert torch.equal(images(file), images(folder))


@pytest.mark.slow
def test_a_checkpoint_in_half_precision_and_a_ckpt_are_read_too(checkpoint, tmp_path):
    file, _ = checkpoint
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "half.safetensors", header)
    torch.testing.assert_close(images(tmp_path / "half.safetensors"), images(file), rtol=0, atol=2e-2)
    assert models.load_model(str(tmp_path / "half.safetensors")).dtype == torch.float32


@pytest.mark.quick(1)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(checkpoint, tmp_path):
    file, _ = checkpoint
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    name = next(name for name in tensors if name.endswith(("mlp.fc1.weight", "mlp.c_fc.weight")))
    del tensors[name]
    save_file(tensors, tmp_path / "less.safetensors", header)
    with pytest.raises(InputError, match=r"less.safetensors' (lacks 1 tensors|could not be loaded)"):
        models.load_model(str(tmp_path / "less.safetensors"))


@pytest.mark.parametrize("base", ["somebody/model", "file.safetensors", "/no/such/folder", 5])
def test_a_base_model_that_is_not_here_is_not_asked_for(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    save_file({TEXT_LAYER: torch.zeros(3, 768)}, "file.safetensors", {"texforce": json.dumps({"model": base})})
    assert models.find_model("file.safetensors") == single_file.configuration((tmp_path / "file.safetensors").resolve())


@pytest.mark.parametrize(("marks", "said", "expected"), [
    ([], None, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
    (["v_pred", "ztsnr"], None, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    (["v_pred"], "v", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
    (["edm_mean", "edm_std"], None, "predicts neither noise nor v, but as EDM does"),
    ([], "edm", "predicts neither noise nor v, but edm"),
])  # fmt: skip
def test_tensors_that_only_mark_a_checkpoint_say_what_its_unet_predicts(tmp_path, marks, said, expected):
    tensors = {TEXT_LAYER: torch.zeros(3, 2048)} | {name: torch.zeros(1) for name in marks}
    save_file(tensors, tmp_path / "file.safetensors", {"modelspec.prediction_type": said} if said else {})
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            single_file.configuration(tmp_path / "file.safetensors")
        return
    config = models.load_scheduler(single_file.configuration(tmp_path / "file.safetensors")).config
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(("said", "size"), [("v", 96), ("epsilon", 64)])
def test_a_checkpoint_of_stable_diffusion_2_that_predicts_v_is_of_768_pixels(tmp_path, said, size):
    save_file({TEXT_LAYER: torch.zeros(3, 1024)}, tmp_path / "file.safetensors", {"modelspec.prediction_type": said})
    folder = single_file.configuration(tmp_path / "file.safetensors")
    assert json.loads((models.Path(folder) / "unet" / "config.json").read_text())["sample_size"] == size


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


TEXT_LAYER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(("content", "error", "message"), [
    ({"weight": torch.zeros(1)}, InputError, "is no checkpoint of Stable Diffusion 1.x, 2.x or XL"),
    ({TEXT_LAYER: torch.zeros(3, 5)}, InputError, "no chec"),
    ({TEXT_LAYER: torch.zeros(3, 1024)}, InputError,
     "does not say whether its U-Net predicts noise or v"),
    (b"not weights", ArtifactError, "refused as a checkpoint of a model"),
    (b"", ArtifactError, "it is empty"),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_what_is_no_checkpoint_of_a_known_architecture_is_refused(tmp_path, content, error, message, ending):
    file = tmp_path / f"file.{ending}"
    if isinstance(content, bytes):
        file.write_bytes(content)
        error = (InputError, ArtifactError)
        message = ""
    elif ending == "ckpt":
        torch.save({"state_dict": content}, file)
    else:
        save_file(content, file)
    with pytest.raises(error, match=message):
        models.load_model(str(file))


def test_a_ckpt_that_would_run_code_is_refused_and_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(ArtifactError, match=r"evil.ckpt: refused as a checkpoint of a model"):
        models.load_model(str(tmp_path / "evil.ckpt"))
    assert not (tmp_path / "executed").exists()


def test_another_file_is_no_model_and_the_command_says_so_with_two(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"PK")
    result = invoke("sample", "--model", str(tmp_path / "model.zip"), "--prompt", "a")
    assert result.exit_code == 2
    assert "is no .safetensors or .ckpt" in result.output.replace("\n", " ")


@pytest.mark.parametrize("padding", [single_file.END, single_file.FILLER])
def test_the_tokenizer_is_open_clips(padding):
    tokenizer = single_file.clip_tokenizer(padding)
    prompts = ["a photo of a cat", "Zwölf Boxkämpfer jagen Viktor, it's 12:30", "un-tokenizable: 🐈 字", "", "word " * 90]
    expected = open_clip.tokenize(prompts)
    ids = tokenization.tokenize(tokenizer, prompts)
    end = tokenizer.convert_tokens_to_ids(single_file.END)
    filler = tokenizer.convert_tokens_to_ids(padding)
    for ours, theirs in zip(ids.tolist(), expected.tolist(), strict=True):
        length = theirs.index(end) + 1
        assert ours[:length] == theirs[:length]
        assert set(ours[length:]) <= {filler}


PARAMETERS = {
    768: (859_520_964, [123_060_480]),
    1024: (865_910_724, [340_387_840]),
    2048: (2_567_463_684, [123_060_480, 694_659_840]),
}


@pytest.mark.slow
@pytest.mark.parametrize("width", PARAMETERS)
def test_the_configurations_are_those_of_the_published_architectures(width, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    file = tmp_path / "file.safetensors"
    save_file({TEXT_LAYER: torch.zeros(2, width)}, file, {"modelspec.prediction_type": "v"})
    folder = single_file.configuration(file)
    kind = models.pipeline_kind(folder)
    assert models.load_scheduler(folder).config.prediction_type == "v_prediction"
    tokenizers = models.load_tokenizers(folder, kind)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
        classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        encoders = {
            part: classes[record.encoder](classes[record.encoder].config_class.from_pretrained(folder, subfolder=part))
            for part, record in kind.text_parts.items()
        }
    num_unet, num_text = PARAMETERS[width]
    assert sum(parameter.numel() for parameter in unet.parameters()) == num_unet
    assert [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in encoders.values()] == num_text
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    models._check_kind(models.Model("file", unet=unet, vae=vae, family=kind.family, **tokenizers, **encoders))
    assert json.loads((models.Path(folder) / "model_index.json").read_text())["_class_name"] == kind.family.pipelines[0]


# --- the preset ---


@pytest.mark.parametrize(("width", "name", "expected"), [
    (768, "my-xl-finetune", "stable-diffusion"), (1024, "flux-style", "stable-diffusion"), (2048, "plain", "sdxl"),
    (2048, "plain-turbo", "turbo"), (5, "some-xl", "sdxl"),  # of no known width: by its name
])  # fmt: skip
def test_the_preset_of_a_file_goes_by_its_shapes_and_not_by_its_name(tmp_path, monkeypatch, width, name, expected):
    monkeypatch.setattr(single_file, "read", None)  # no weights are read
    save_file({TEXT_LAYER: torch.zeros(2, width)}, tmp_path / f"{name}.safetensors")
    assert presets.family(str(tmp_path / f"{name}.safetensors")) == expected


def test_the_preset_of_a_merged_file_is_that_of_the_embedded_model(tmp_path):
    save_file({TEXT_LAYER: torch.zeros(2, 96)}, tmp_path / "file.safetensors", {"texforce": json.dumps({"model": "tiny"})})
    assert presets.family(str(tmp_path / "file.safetensors")) == "tiny"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"version https://git-lfs.github.com/spec/v1"])
def test_the_preset_of_a_broken_file_goes_by_its_name(tmp_path, content):
    (tmp_path / "some-xl.safetensors").write_bytes(content)
    assert presets.family(str(tmp_path / "some-xl.safetensors")) == "sdxl"
    (tmp_path / "some-xl.ckpt").write_bytes(content)
    assert presets.family(str(tmp_path / "some-xl.ckpt")) == "sdxl"
