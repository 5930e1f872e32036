"""`--lora-layers` and `--lora-modules`: which layers get LoRA, and that all that is read and written keeps to them."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import texforce
from texforce import adapters, lora_files, merging, models, run, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import MergeOptions, System, resolve_merge
from texforce.errors import InputError
from texforce.plan import plan

from .commands import invoke
from .small_models import save_family

PROMPTS = ["a red circle", "two blue squares"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(scope="module")
def folders(stable_diffusion, sdxl, tmp_path_factory):
    """Pipelines by name, each made when it is first wanted."""
    root, made = tmp_path_factory.mktemp("families"), {"sd": stable_diffusion, "sdxl": sdxl}

    def folder(name):
        return made[name] if name in made else made.setdefault(name, save_family(name, root / name))

    return folder


def adapted(folder, **options) -> models.Model:
    """A model with fresh LoRA."""
    config = resolve(TrainOptions(**{"model": str(folder), "mixed_precision": "no", "rank": 2} | options))
    return texforce.add_lora(models.load_model(str(folder)), config)


def trained_layers(encoder) -> dict[str, torch.nn.Parameter]:
    """The second factor of each layer that has LoRA, by the layer's name."""
    parameters = dict(encoder.named_parameters())
    start, end = "base_model.model.", ".lora_B.default.weight"
    return {name.removeprefix(start).removesuffix(end): part for name, part in parameters.items() if name.endswith(end)}


def numbers(names, blocks="layers") -> set[int]:
    return {int(re.search(rf"\b{blocks}\.(\d+)\.", name)[1]) for name in names}


# --- which layers ---


@pytest.mark.quick(4)
@pytest.mark.parametrize(("name", "asked", "expected"), [
    ("sd", "all", {"text_encoder": {0, 1, 2}}),
    ("sd", "last:1", {"text_encoder": {2}}),
    ("sd", "first:2", {"text_encoder": {0, 1}}),
    ("sdxl", "last:1", {"text_encoder": {1}, "text_encoder_2": {2}}),  # the first one's last block is not read
    ("sdxl", "last:2", {"text_encoder": {0, 1}, "text_encoder_2": {1, 2}}),
    ("sd3", "last:2", {"text_encoder": {1, 2}, "text_encoder_2": {1, 2}}),
    ("flux", "last:2", {"text_encoder": {1, 2}}),
    ("pixart-sigma", "last:1", {"text_encoder": {1}}),
    ("pixart-sigma", "first:1", {"text_encoder": {0}}),
    ("sana", "last:1", {"text_encoder": {1}}),
])  # fmt: skip
def test_the_blocks_asked_for_get_lora_and_each_of_them_reaches_the_denoiser(folders, name, asked, expected):
    model = adapted(folders(name), lora_layers=asked)
    embeds = models.encode(model, models.tokenize_for(model, PROMPTS))
    weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    (embeds * weights).sum().backward()
    for part, blocks in expected.items():
        layers = trained_layers(model.text_encoders[part])
        assert numbers(layers, model.family.text[part].blocks) == blocks
        assert len(layers) == 4 * len(blocks)
        assert all(parameter.grad.abs().max() > 0 for parameter in layers.values())
    assert {part for part, encoder in model.text_encoders.items() if hasattr(encoder, "peft_config")} == expected.keys()


@pytest.mark.parametrize(("name", "modules"), [
    ("sd", ["q_proj"]), ("sd", ["fc1", "fc2"]), ("sdxl", ["v_proj", "out_proj"]), ("pixart-sigma", ["v", "wi_0"]),
    ("sana", ["o_proj", "down_proj"]),
])  # fmt: skip
def test_the_projections_asked_for_get_lora_and_no_others(folders, name, modules):
    model = adapted(folders(name), lora_layers="first:1", lora_modules=modules)
    for part in model.family.text_encoders:
        found = [layer.rpartition(".")[2] for layer in trained_layers(model.text_encoders[part])]
        assert sorted(found) == sorted(modules)


def test_the_last_block_that_nothing_reads_changes_no_embedding(folders):
    """So that counting it would train nothing."""
    model = adapted(folders("sdxl"), lora_layers="all")
    models.encode(model, models.tokenize_for(model, PROMPTS)).sum().backward()
    unread = [part for name, part in trained_layers(model.text_encoder).items() if ".layers.2." in name]
    assert len(unread) == 4
    assert all(part.grad is None for part in unread)


# --- what is written and read ---


def save_moved(model: models.Model, folder: Path, **options) -> models.Model:
    """Write LoRA that changes something, as a training does; gives the adapted model."""
    config = resolve(TrainOptions(model=model.name, mixed_precision="no", rank=2, num_inference_steps=2, **options))
    policy = texforce.make_policy(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    policy.save(folder)
    return policy.model


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """A function that gives a pipeline's folder, an adapter's, and the embeddings of the model that wrote it."""
    root, made = tmp_path_factory.mktemp("written"), {}

    def give(name):
        if name not in made:
            options = {"lora_layers": "last:1", "lora_modules": ["v", "o"] if "pixart" in name else ["out_proj", "fc1"]}
            model = save_moved(models.load_model(str(folders(name))), root / name, **options)
            with torch.no_grad():
                embeds = models.encode(model, models.tokenize_for(model, PROMPTS))
            made[name] = folders(name), root / name, embeds
        return made[name]

    return give


def embeddings(model) -> torch.Tensor:
    with torch.no_grad():
        return models.encode(model, models.tokenize_for(model, PROMPTS))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma"])
def test_pefts_own_fields_say_which_layers_and_plain_peft_loads_them(written, name):
    folder, adapter, expected = written(name)
    model = models.load_model(str(folder))
    config = json.loads((adapter / "adapter_config.json").read_text())
    text = model.family.text["text_encoder"]
    assert config["layers_pattern"] == text.blocks
    assert config["layers_to_transform"] == [2] if name == "sd" else [1]
    assert sorted(config["target_modules"]) == (["o", "v"] if name == "pixart-sigma" else ["fc1", "out_proj"])
    for part in model.family.text_encoders:
        place = adapter if part == "text_encoder" else adapter / part
        object.__setattr__(model, part, PeftModel.from_pretrained(getattr(model, part), place))
    torch.testing.assert_close(embeddings(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma"])
def test_sampling_puts_on_exactly_the_layers_that_were_trained(written, name):
    folder, adapter, expected = written(name)
    model = models.load_model(str(folder))
    layers = lora_files.read_adapter(adapter, model)
    assert all(len(found) == 2 for found in layers.values())
    tuned = adapters.put_on(model, System("tuned", ((str(adapter), 1.0),)))
    torch.testing.assert_close(embeddings(tuned), expected, rtol=0, atol=1e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "pipeline", "checkpoint"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_each_format_holds_these_layers_alone_and_is_read_back(written, tmp_path, name, format):
    folder, adapter, expected = written(name)
    options = {"adapter": [str(adapter)], "model": str(folder), "output_dir": str(tmp_path / "merged"), "format": format}
    out = merging.merge(resolve_merge(MergeOptions(**options)))
    if format in merging.FULL_FORMATS:
        place = out if format == "pipeline" else next(out.glob("*.safetensors"))
        model, base = models.load_model(str(place)), models.load_model(str(folder))
        torch.testing.assert_close(embeddings(model), expected, rtol=0, atol=1e-5)
        for part in base.text_encoders:
            pairs = zip(getattr(base, part).named_parameters(), getattr(model, part).parameters(), strict=True)
            changed = {key for (key, before), after in pairs if not torch.equal(before, after)}
            last = base.family.text[part].num_unread
            assert changed == {key for key in changed if f"layers.{2 - last}." in key and re.search("out_proj|fc1", key)}
            assert len(changed) == 2
        return
    model = models.load_model(str(folder))
    for found, original in zip(
        lora_files.read_adapter(out, model).values(), lora_files.read_adapter(adapter, model).values(), strict=True
    ):
        assert found.keys() == original.keys()
    tuned = adapters.put_on(model, System("tuned", ((str(out), 1.0),)))
    torch.testing.assert_close(embeddings(tuned), expected, rtol=0, atol=1e-5)
    if format == "diffusers" or (format, name) == ("kohya", "sd"):
        import diffusers

        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)  # it knows kohya's names by out_proj alone
        pipeline.load_lora_weights(out, weight_name=next(out.glob("*.safetensors")).name)
        ids = models.split_ids(model, models.tokenize_for(model, PROMPTS))
        plain = {part: getattr(pipeline, part) for part in model.text_encoders}
        with torch.no_grad():
            texts = {part: model.family.text[part].read(plain[part], ids[part]) for part in plain}
        packed = model.packing.pack(model.family.join(texts, pipeline.unet))
        torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)


def test_adapters_of_different_layers_are_summed(folders, written, tmp_path):
    folder, adapter, _ = written("sd")
    other = tmp_path / "other"
    save_moved(models.load_model(str(folder)), other, lora_layers="first:1")
    model = models.load_model(str(folder))
    both = adapters.fuse(adapters.read_terms([(str(adapter), 1.0), (str(other), 0.5)], model))
    assert numbers(both["text_encoder"]) == {0, 2}
    assert len(both["text_encoder"]) == 6


# --- a run ---


@pytest.fixture
def quick(narrow_model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name, *given, **named: narrow_model())
    monkeypatch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))


LAYERS = {"lora_layers": "last:1", "lora_modules": ["v_proj", "out_proj"], "ema_decay": 0.5, "checkpoint_every": 1}


@pytest.mark.slow
def test_a_run_of_some_layers_goes_on_byte_for_byte_and_with_no_others(quick, small_run, tmp_path, monkeypatch):
    options = small_run | LAYERS | {"num_epochs": 2}
    result = training.train(resolve(TrainOptions(**options, output_dir=str(tmp_path / "whole"))))
    original, epochs = training.train_epoch, []

    def stopping(current, config):
        epochs.append(current)
        if len(epochs) == 2:
            raise RuntimeError("stopped")
        return original(current, config)

    monkeypatch.setattr(training, "train_epoch", stopping)
    parted = resolve(TrainOptions(**options, output_dir=str(tmp_path / "parted")))
    with pytest.raises(RuntimeError, match="stopped"):
        training.train(parted)
    for change in ({"lora_layers": "all"}, {"lora_modules": ["q_proj"]}):
        with pytest.raises(InputError, match=rf"^resume: changed since the checkpoint: {next(iter(change))}: "):
            training.train(resolve(TrainOptions(**options | change, output_dir=str(tmp_path / "parted"))), resume=True)
    training.train(parted, resume=True)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parted")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tensors = load_file(files[0])
    assert result["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert len(tensors) == 4
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "on the text-encoder, blocks last:1, projections v_proj, out_proj, trained" in card


def test_a_run_saved_before_there_were_these_options_goes_on_with_all_layers(small_run, tmp_path):
    config = resolve(TrainOptions(**small_run))
    saved = {name: value for name, value in config.__dict__.items() if name not in ("lora_layers", "lora_modules")}
    assert run.differences(saved, config.__dict__) == []


def test_the_plan_counts_the_parameters_of_these_layers(quick, small_run):
    plans = [plan(resolve(TrainOptions(**small_run | options))) for options in ({}, {"lora_layers": "first:1"})]
    assert plans[0]["LoRA on"] == "text_encoder"
    assert plans[1]["LoRA on"] == "text_encoder, blocks first:1"
    num_blocks = models.load_model("tiny").text_encoder.config.num_hidden_layers
    assert plans[0]["trained parameters"] == num_blocks * plans[1]["trained parameters"]


def test_the_commands_take_them(quick, small_run, tmp_path):
    given = {name.replace("_", "-"): value for name, value in small_run.items()} | {"output-dir": tmp_path / "out"}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    layers = ["--lora-layers", "last:1", "--lora-modules", "v_proj", "--lora-modules", "fc2"]
    outputs = [
        ["train", *arguments, *layers],
        ["sample", "--adapter", tmp_path / "out", "--prompt", "a red circle", "--output-dir", tmp_path / "samples"],
        ["eval", "--adapter", tmp_path / "out", "--benchmark", tmp_path / "heldout.txt", "--reward", "jpeg", "--num-images",
         "1", "--output-dir", tmp_path / "eval"],
    ]  # fmt: skip
    for command in outputs:
        result = invoke(*command)
        assert result.exit_code == 0, result.output
    assert numbers(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        models.load_model("tiny").text_encoder.config.num_hidden_layers - 1
    }


@pytest.mark.parametrize(("options", "message"), [
    (["--lora-layers", "last:0"], "--lora-layers: must be all, first:N or last:N with N from 1 on, as last:4, not 'last:0'"),
    (["--lora-layers", "middle:2"], "--lora-layers: must be all, first:N or last:N"),
    (["--lora-layers", "last:2\n"], "--lora-layers: must be all, first:N or last:N"),
    (["--lora-layers", "last:99"], "blocks that are read, so N must be at most that, not 99"),
    (["--lora-modules", "q_prj"], "it has k_proj, v_proj, q_proj, out_proj, fc1, fc2; did you mean 'q_proj'?"),
    (["--lora-layers", "last:1", "--target", "unet"], "--lora-layers: chooses layers of a text encoder that is trained"),
    (["--lora-modules", "q_proj", "--target", "unet"], "--lora-modules: chooses layers of a text encoder that is trained"),
])  # fmt: skip
def test_values_that_cannot_be_are_refused(quick, small_run, tmp_path, options, message):
    given = ["--model", "tiny", "--reward", "jpeg", "--output-dir", str(tmp_path / "out"), "--null-prompt", "adapted"]
    result = invoke("train", *given, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
