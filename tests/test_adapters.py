"""Adapters: read in every layout, put on as plain peft and diffusers do it, refused where they are damaged."""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import texforce
from texforce import adapters, evaluation, files, heldout, ldm, lora_files, merging, models, tokenization, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import (
    MergeOptions,
    SampleOptions,
    System,
    parse_weighted,
    resolve_merge,
    resolve_sample,
)
from texforce.errors import ArtifactError, InputError, NotFoundError
from texforce.lora_files import Layer

from .commands import invoke
from .hostile import hostile_objects, recorded
from .small_models import random_layers

WEIGHTS = "adapter_model.safetensors"
PROMPTS = ["a crimson disc", "two blue squares"]
OPTIONS = {  # learning rates high enough that one epoch is seen in the images
    "model": "tiny", "reward": "jpeg", "num_epochs": 1, "num_prompts_per_epoch": 2, "num_samples_per_prompt": 2,
    "num_updates_per_epoch": 2, "num_inference_steps": 3, "guidance_scale": 3.0, "learning_rate": 0.03, "rank": 4,
    "timestep_window": 1.0, "timestep_fraction": 1.0, "clip_range": 5e-3, "ema_decay": 0.0,
    "sample_batch_size": 4, "micro_batch_size": 4, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "null_prompt": "adapted",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(stable_diffusion):
    """A small Stable Diffusion pipeline, for adapters to be read for. Do not change it."""
    return merging.load_pipeline(str(stable_diffusion))


def a_copy(pipeline, *parts: str):
    """A pipeline with copies of some parts, which may be changed."""
    return type(pipeline)(
        **pipeline.components | {part: copy.deepcopy(getattr(pipeline, part)) for part in parts},
        requires_safety_checker=False,
    )


# --- reading ---


def in_layout(layout: str, layers: dict[str, Layer], unet: bool, config=None) -> dict[str, Tensor]:
    """The tensors of a part in one of the layouts that are about."""
    tensors = {}
    for name, layer in layers.items():
        full = name if unet else "text_model." + name
        part = "unet" if unet else "text_encoder"
        processor = re.sub(r"\.(to_(?:q|k|v|out))(?:\.0)?$", r".processor.\1", full)
        old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", full)
        stems = {
            "processors": f"{processor}_lora.down.weight",
            "prefixed processors": f"{part}.{processor}_lora.down.weight",
            "diffusers' first": f"{part}.{old}_lora.down.weight",
            "diffusers' second": f"{part}.{full}.lora_linear_layer.down.weight",
            "lora.down": f"{part}.{full}.lora.down.weight",
            "lora_A": f"{part}.{full}.lora_A.weight",
            "flat lora_A": f"{part}.{name}.lora_A.weight",
            "bare peft": f"{full}.lora_A.weight",
            "peft": f"base_model.model.{name}.lora_A.weight",
            "old peft": f"base_model.model.{full}.lora_A.weight",
            "named peft": f"base_model.model.{name}.lora_A.default.weight",
            "kohya": f"lora_{'unet' if unet else 'te'}_{full.replace('.', '_')}.lora_down.weight",
            "kohya XL": f"lora_te1_{full.replace('.', '_')}.lora_down.weight",
        }  # fmt: skip
        if layout == "kohya XL" and unet:
            stems[layout] = f"lora_unet_{ldm.unet_name(name, config).replace('.', '_')}.lora_down.weight"
        down = stems[layout]
        tensors[down] = layer.down
        head, lora, tail = down.rpartition("lora")
        tensors[head + lora + tail.replace("_A", "_B").replace("down", "up")] = layer.up
        if layout.startswith("kohya"):
            tensors[down.partition(".")[0] + ".alpha"] = torch.tensor(layer.alpha)
    return tensors


PEFT = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}


LAYOUTS = [
    "processors", "prefixed processors", "lora.down", "lora_A", "bare peft", "peft", "named peft", "kohya", "kohya XL",
]  # fmt: skip
TEXT_LAYOUTS = [
    "diffusers' first", "diffusers' second", "lora.down", "lora_A", "flat lora_A", "bare peft", "peft", "old peft",
    "named peft", "kohya", "kohya XL",
]  # fmt: skip


def check_same(found: dict[str, Layer], expected: dict[str, Layer], alpha: bool) -> None:
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name].down, layer.down)
        assert torch.equal(found[name].up, layer.up)
        assert found[name].alpha == (layer.alpha if alpha else layer.rank)  # the convention where nothing is said


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unets_lora_of_every_layout_is_read(small, tmp_path, layout, ending):
    pipeline = small
    layers = random_layers(pipeline.unet, 3)
    tensors = in_layout(layout, layers, True, pipeline.unet.config)
    assert len(tensors) == len(layers) * (3 if "kohya" in layout else 2)
    path = tmp_path / f"ddpo.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    check_same(adapters.read_unet(path, pipeline).adapter["unet"], layers, "kohya" in layout)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_a_text_encoders_lora_of_every_layout_is_read(small, tmp_path, layout, ending):
    pipeline = small
    layers = random_layers(pipeline.text_encoder, 3)
    tensors = in_layout(layout, layers, False)
    assert len(tensors) == len(layers) * (3 if "kohya" in layout else 2)
    path = tmp_path / f"adapter.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    check_same(lora_files.read_adapter(path, pipeline)["text_encoder"], layers, "kohya" in layout)


@pytest.mark.parametrize("layout", ["old peft", "peft"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_peft_folder_of_either_layout_is_read_with_its_alpha(small, tmp_path, layout, file):
    """The authors' release is of the old layout, in a pickle."""
    pipeline = small
    layers = random_layers(pipeline.text_encoder, 3)
    tensors = in_layout(layout, layers, False)
    torch.save(tensors, tmp_path / file) if file.endswith("bin") else save_file(tensors, tmp_path / file)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_same(lora_files.read_adapter(tmp_path, pipeline)["text_encoder"], layers, True)


def test_peft_patterns_and_rank_stabilised_alphas_are_honoured(small, tmp_path):
    pipeline = small
    layers = random_layers(pipeline.text_encoder, 3)
    one = "encoder.layers.1.self_attn.q_proj"
    layers[one] = Layer(layers[one].down[:2], layers[one].up[:, :2].contiguous(), 9.0)
    save_file(in_layout("peft", layers, False), tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "rank_pattern": {one: 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_same(lora_files.read_adapter(tmp_path, pipeline)["text_encoder"], layers, True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    found = lora_files.read_adapter(tmp_path, pipeline)["text_encoder"]
    assert found[one].scale == pytest.approx(9 / math.sqrt(2))
    assert found[one.replace("1", "2")].scale == pytest.approx(6 / math.sqrt(3))


def test_metadata_of_a_diffusers_file_give_its_alphas(small, tmp_path):
    adapter = {part: random_layers(getattr(small, part), 1) for part in ("text_encoder", "unet")}
    arguments = {f"{part}_lora_layers": lora_files.lora_tensors(layers) for part, layers in adapter.items()}
    metadata = {f"{part}_lora_adapter_metadata": lora_files.lora_config(layers) for part, layers in adapter.items()}
    small.save_lora_weights(tmp_path, **arguments, **metadata)
    for part, layers in lora_files.read_adapter(tmp_path, small).items():
        check_same(layers, adapter[part], True)
    small.save_lora_weights(tmp_path, **arguments)
    for part, layers in lora_files.read_adapter(tmp_path, small).items():
        check_same(layers, adapter[part], False)


def test_a_file_of_a_diffusers_unet_alone_has_metadata_without_a_prefix(small, tmp_path):
    """As `save_lora_adapter` writes them; where ranks differ, their patterns begin with ^."""
    pipeline = small
    layers = random_layers(pipeline.unet, 3)
    odd = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layers[odd] = Layer(layers[odd].down[:2], layers[odd].up[:, :2].contiguous(), 6.0)  # diffusers loses other alphas here
    save_file(in_layout("kohya", layers, True), tmp_path / "kohya.safetensors")
    pipeline = a_copy(small, "unet", "text_encoder")
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="default")
    pipeline.unet.save_lora_adapter(tmp_path / "out", weight_name="unet.safetensors")
    with safe_open(tmp_path / "out" / "unet.safetensors", framework="pt") as file:
        assert "^" in file.metadata()["lora_adapter_metadata"]
    found = adapters.read_unet(tmp_path / "out", small).adapter["unet"]
    check_same(found, layers, True)


def test_the_file_of_a_peft_folder_has_the_alpha_of_the_folder(small, tmp_path):
    adapter = {part: random_layers(getattr(small, part), 1) for part in ("text_encoder", "unet")}
    for part, folder in (("text_encoder", tmp_path), ("unet", tmp_path / "unet")):
        folder.mkdir(exist_ok=True)
        save_file(in_layout("peft", adapter[part], part == "unet"), folder / WEIGHTS)
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if part == "unet" else PEFT["target_modules"]
        (folder / "adapter_config.json").write_text(json.dumps(PEFT | {"target_modules": targets}))
    whole = lora_files.read_adapter(tmp_path, small)
    for part, layers in adapter.items():
        check_same(whole[part], layers, True)
    check_same(lora_files.read_adapter(tmp_path / WEIGHTS, small)["text_encoder"], adapter["text_encoder"], True)
    for path in (tmp_path / "unet", tmp_path / "unet" / WEIGHTS):
        check_same(adapters.read_unet(path, small).adapter["unet"], adapter["unet"], True)


def test_a_part_of_the_blocks_and_of_their_attentions_is_an_adapter_too(small, tmp_path):
    pipeline = small
    layers = random_layers(pipeline.unet, 3)
    some = {name: layer for name, layer in layers.items() if name.startswith("up_blocks.0.attentions.0")}
    kinds = {name: layer for name, layer in layers.items() if "attn1" in name or name.endswith(("to_k", "to_v"))}
    for number, wanted in enumerate((some, kinds)):
        save_file(in_layout("lora_A", wanted, True), tmp_path / f"{number}.safetensors")
        check_same(adapters.read_unet(tmp_path / f"{number}.safetensors", pipeline).adapter["unet"], wanted, False)


def test_factors_of_fewer_or_more_axes_than_the_weight_are_fitted(small, stable_diffusion, tmp_path):
    proj, linear = "mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    flat = Layer(torch.randn(2, 16), torch.randn(16, 2), 2.0)
    long = Layer(torch.randn(2, 64, 1, 1), torch.randn(16, 2, 1, 1), 2.0)
    save_file(in_layout("lora_A", {proj: flat, linear: long}, True), tmp_path / "odd.safetensors")
    adapter = adapters.read_unet(tmp_path / "odd.safetensors", small).adapter
    assert adapter["unet"][proj].down.shape == (2, 16, 1, 1)
    assert adapter["unet"][linear].up.shape == (16, 2)
    adapters.apply(models.load_model(str(stable_diffusion)), adapter)
    options = {"unet": str(tmp_path / "odd.safetensors"), "output_dir": str(tmp_path / "merged"), "format": "diffusers"}
    folder = merging.merge(resolve_merge(MergeOptions(**options, model=str(stable_diffusion))))
    a_copy(small, "unet", "text_encoder").load_lora_weights(folder)


def test_eight_bit_files_are_read(small, tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in small.unet.state_dict().items()}
    save_file(state, tmp_path / "fp8.safetensors")
    unet = adapters.read_unet(tmp_path / "fp8.safetensors", small)  # it is not the very same: rounding changed it
    assert unet.tensors["conv_in.weight"].dtype == torch.float16


def tuned(unet: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a U-Net that is a little different."""
    return {name: 1.02 * tensor for name, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin"])
def test_a_variant_of_a_unet_is_read_if_it_is_the_only_one(small, tmp_path, name):
    state = tuned(small.unet)
    torch.save(state, tmp_path / name) if name.endswith("bin") else save_file(state, tmp_path / name)
    assert adapters.read_unet(tmp_path, small).tensors.keys() == state.keys()
    save_file(state, tmp_path / f"diffusion_pytorch_model-00001-of-00002.{name.rpartition('.')[2]}")
    with pytest.raises(ArtifactError, match="holds 2 files of a U-Net"):
        adapters.read_unet(tmp_path, small)


def test_blocks_of_different_lengths_do_not_keep_a_text_encoders_adapter_from_being_read(small, tmp_path):
    pipeline = a_copy(small, "unet")
    pipeline.unet.register_to_config(layers_per_block=(1, 1))
    save_file(in_layout("lora_A", random_layers(small.text_encoder, 1), False), tmp_path / "text.safetensors")
    assert "text_encoder" in lora_files.read_adapter(tmp_path / "text.safetensors", pipeline)


def test_a_file_that_names_another_family_is_refused(small, tmp_path):
    tensors = in_layout("kohya", random_layers(small.text_encoder, 1), False)
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    lora_files.read_adapter(tmp_path / "lora.safetensors", small)  # nothing is known of narrow models
    pipeline = a_copy(small, "unet")
    pipeline.unet.register_to_config(cross_attention_dim=768)
    with pytest.raises(ArtifactError, match=r"made for another model: it says sdxl_base_v1-0, and this one is sd_v1"):
        lora_files.read_adapter(tmp_path / "lora.safetensors", pipeline)


@pytest.mark.parametrize("origin", ["file", "pickle", "folder", "pipeline", "single file"])
def test_a_whole_unet_of_every_origin_is_read(small, tmp_path, origin):
    pipeline, state, path = a_copy(small, "unet"), tuned(small.unet), tmp_path / "unet"
    pipeline.unet.load_state_dict(state)
    if origin == "file":
        path = tmp_path / "unet.safetensors"
        save_file(state, path)
    elif origin == "pickle":
        path = tmp_path / "unet.bin"
        torch.save(state, path)
    elif origin == "folder":
        pipeline.unet.save_pretrained(path)
    elif origin == "pipeline":
        pipeline.save_pretrained(path)
    else:
        path = tmp_path / "model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in ldm.checkpoint_tensors(pipeline).items()}, path)
    tensors = adapters.read_unet(path, small).tensors
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


# --- what peft's own configuration declares is whole ---


DECLARED = {
    "layers_to_transform": {"target_modules": ["q_proj", "out_proj"], "layers_to_transform": [0, 2]},
    "full names": {"target_modules": ["encoder.layers.1.self_attn.v_proj", "encoder.layers.2.mlp.fc1"]},
    "a pattern": {"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"},
    "also one layer by its number": {
        "target_modules": ["q_proj", "fc2"], "layers_to_transform": 1, "layers_pattern": "layers",
    },
    "also all but excluded ones": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1.*k_proj"},
    "also all but the names of some": {
        "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"],
    },
}  # fmt: skip


def save_declared(folder: Path, module: torch.nn.Module, config: dict) -> torch.nn.Module:
    """Save LoRA of a configuration as plain peft does; gives peft's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapted = get_peft_model(copy.deepcopy(module), LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **config))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.mark.parametrize("kind", DECLARED)
def test_lora_on_some_layers_gives_the_embeddings_of_plain_peft(small, stable_diffusion, tmp_path, kind):
    plain = save_declared(tmp_path, small.text_encoder, DECLARED[kind])
    model = models.load_model(str(stable_diffusion))
    ids = tokenization.tokenize(model.tokenizer, PROMPTS)
    with torch.no_grad():
        expected, base = plain(input_ids=ids).last_hidden_state, models.encode(model, ids)
        found = models.encode(load_adapter(model, tmp_path), ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - base).abs().max() > 1e-2
    tensors = load_file(tmp_path / WEIGHTS)
    lost = min(tensors).partition(".lora_")[0]
    save_file({key: tensor for key, tensor in tensors.items() if lost not in key}, tmp_path / WEIGHTS)
    with pytest.raises(ArtifactError, match="1 layers are missing or not among target_modules"):
        lora_files.read_adapter(tmp_path, small)


@pytest.mark.parametrize("targets", [r".*attn2\.to_(k|v)", r"also a pattern|mid_block.*(to_q|to_out\.0)"])
def test_lora_of_a_unet_on_the_layers_of_a_pattern_predicts_as_plain_peft(small, stable_diffusion, tmp_path, targets):
    plain = save_declared(tmp_path / "unet", small.unet, {"target_modules": targets})
    model = load_adapter(models.load_model(str(stable_diffusion)), tmp_path)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(7), torch.randn(1, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.unet(*inputs).sample, plain(*inputs).sample, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(small.unet(*inputs).sample, plain(*inputs).sample, atol=1e-3)


def test_names_and_patterns_of_transformers_before_5_6_are_understood(small, adapter):
    for targets in (r"text_model\.encoder\.layers\.\d+\.self_attn\.\w+_proj", [
        f"text_model.encoder.layers.{n}.self_attn.{kind}" for n in range(3) for kind in PEFT["target_modules"]
    ]):  # fmt: skip
        change_config(adapter, target_modules=targets)
        assert len(lora_files.read_adapter(adapter, small)["text_encoder"]) == 12


def test_what_the_metadata_of_a_diffusers_file_declare_is_whole(small, tmp_path):
    layers = random_layers(small.text_encoder, 3)
    some = {name: layer for name, layer in layers.items() if "layers.1" in name}
    metadata = lora_files.lora_config(some) | {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    for declared in ({"layers_to_transform": [1]}, {}):
        small.save_lora_weights(
            tmp_path,
            text_encoder_lora_layers=lora_files.lora_tensors(some),
            text_encoder_lora_adapter_metadata=metadata | declared,
        )
        if declared:
            check_same(lora_files.read_adapter(tmp_path, small)["text_encoder"], some, True)
        else:
            with pytest.raises(ArtifactError, match="8 layers are missing"):
                lora_files.read_adapter(tmp_path, small)


@pytest.mark.parametrize("pattern", [
    r"^(([a-z]+)+\.?)+$", r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3!", r"((((a{5000}){5000}){5000}){5000})",
    "(" * 400 + ")*" * 400, "x" * 10**6, "(", "[",
    "(?R)", "((?R)|a)*", r"(?:q_proj){e<=3}",
], ids=lambda pattern: pattern[:20])  # fmt: skip
@pytest.mark.parametrize("field", ["target_modules", "also exclude_modules"])
def test_a_hostile_pattern_is_refused_or_excludes_nothing_in_seconds(small, adapter, field, pattern):
    change_config(adapter, **{field.removeprefix("also "): pattern})
    with at_most(10):
        if field == "target_modules":
            with pytest.raises(ArtifactError, match=rf"{WEIGHTS}: .*target_modules"):
                lora_files.read_adapter(adapter, small)
        else:  # one that excludes nothing does no harm
            with contextlib.suppress(ArtifactError):
                assert len(lora_files.read_adapter(adapter, small)["text_encoder"]) == 12


# --- what is no LoRA ---


OTHER_KINDS = {
    "DoRA": ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "dora_scale"),
    "LoHa": ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "hada_w1_a"),
    "LoKr": ("lora_unet_mid_block_attentions_0_proj_in", "lokr_w1"),
    "full differences of weights": ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "diff"),
    "also full differences of weights": ("diffusion_model.input_blocks.0.0", "diff_b"),
    "also peft's DoRA": ("base_model.model.encoder.layers.0.self_attn.q_proj", "lora_magnitude_vector.weight"),
    "also LoRA in Tucker's form": ("lora_unet_conv_in", "lora_mid.weight"),
    "also a textual inversion": ("bundle_emb.cat", "string_to_param"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_no_lora_is_called_what_it_is(small, tmp_path, kind):
    layers = in_layout("kohya", random_layers(small.text_encoder, 1), False)
    save_file(layers | {".".join(OTHER_KINDS[kind]): torch.ones(3, 3)}, tmp_path / "file.safetensors")
    words = kind.removeprefix("also ").removeprefix("peft's ")
    with pytest.raises(ArtifactError, match=rf"file.safetensors: it holds {words}, as .* and only LoRA is supported"):
        lora_files.read_adapter(tmp_path / "file.safetensors", small)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder for each repository that the hub gives, and a list of what it was asked for."""
    asked = []

    def snapshot(name, **options):
        asked.append(name)
        if not (tmp_path / "hub" / name).is_dir():
            raise FileNotFoundError(f"no {name}")
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    files._fetch_weights.cache_clear()
    return tmp_path / "hub", asked


@pytest.mark.slow
def test_an_adapter_and_a_unet_may_be_names_on_the_hub(runs, hub):
    folder, asked = hub
    shutil.copytree(runs / "text-encoder", folder / "me" / "adapter")
    shutil.copytree(runs / "unet" / "unet", folder / "me" / "also-unet" / "unet")
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    assert torch.equal(sample(["me/adapter"])["tuned"], sample([runs / "text-encoder"])["tuned"])  # with the run's settings
    drawn = sample(["me/adapter:0.5"], unet="me/also-unet", **options)["tuned"]
    assert torch.equal(drawn, sample([f"{runs / 'text-encoder'}:0.5"], unet=str(runs / "unet"), **options)["tuned"])
    assert sorted(asked) == ["me/adapter", "me/also-unet"]
    described = evaluation.describe_systems(resolve_sample(SampleOptions(adapter=["me/adapter"], prompt=PROMPTS)).systems)
    assert described["tuned"]["adapters"][0]["path"] == "me/adapter"


def test_the_hub_is_not_asked_about_a_mistyped_path(hub, small):
    (hub[0].parent / "runs").mkdir()
    for name in ("runs/absent", "absent", "./absent", "../runs/absent", "/absent/absent"):
        with pytest.raises(NotFoundError, match="adapter: there is no file or folder"):
            lora_files.read_adapter(name, small)
    assert hub[1] == []
    with pytest.raises(NotFoundError, match=r"adapter: there is no .* 'me/absent', and the hub does not give it: "):
        lora_files.read_adapter("me/absent", small)
    assert hub[1] == ["me/absent"]


# --- fusion ---


@pytest.fixture(scope="module")
def two(small) -> list[lora_files.Adapter]:
    """Two adapters of other ranks and alphas."""
    return [
        {part: random_layers(getattr(small, part), seed, rank, alpha) for part in ("text_encoder", "unet")}
        for seed, rank, alpha in ((1, 3, 6.0), (2, 2, 1.0))
    ]


def test_the_fusion_of_two_is_the_weighted_sum_of_what_they_change(two):
    one, other = two
    fused = adapters.fuse([(one, 0.3), (other, 0.7)])
    for part in ("text_encoder", "unet"):
        for name, layer in fused[part].items():
            expected = 0.3 * one[part][name].delta() + 0.7 * other[part][name].delta()
            torch.testing.assert_close(layer.delta(), expected, rtol=0, atol=1e-6)
            assert layer.rank == 5


def test_with_weights_one_and_zero_it_is_the_first_bit_for_bit(two):
    one, other = two
    for terms in ([(one, 1.0), (other, 0.0)], [(other, 0.0), (one, 1.0)], [(one, 1.0)]):
        assert adapters.fuse(terms) == one


def test_the_parts_of_different_adapters_join(two):
    text, unet = {"text_encoder": two[0]["text_encoder"]}, {"unet": two[1]["unet"]}
    assert adapters.fuse([(text, 1.0), (unet, 1.0)]) == text | unet


@pytest.mark.parametrize(("spec", "expected"), [
    ("out", ("out", 1.0)), ("out:0.5", ("out", 0.5)), ("a:b/out:-1", ("a:b/out", -1.0)), ("a:b/out", ("a:b/out", 1.0)),
    ("out:1e-2", ("out", 0.01)),
])  # fmt: skip
def test_a_weight_stands_behind_the_last_colon(spec, expected):
    assert parse_weighted(spec) == expected


def test_a_path_that_ends_like_a_weight_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:1").mkdir()
    assert parse_weighted("run:1") == ("run:1", 1.0)
    assert parse_weighted("run:1:0.5") == ("run:1", 0.5)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(InputError, match=f"adapter: the weight in 'out:{weight}'"):
        parse_weighted(f"out:{weight}")


# --- used as plain peft and diffusers use them ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a training each of the text encoder and of the U-Net, and the images that they last measured."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    (folder / "heldout.txt").write_text("\n".join(PROMPTS))
    files = {"prompts": str(folder / "prompts.txt"), "heldout_prompts": str(folder / "heldout.txt")}
    for target, options in (("text-encoder", {}), ("unet", {}), ("base-null", {"null_prompt": "base"})):
        drawn = []

        def keep(*args, drawn=drawn):
            images = original(*args)  # noqa: B023
            drawn.append(torch.cat(list(images.values())))
            return images

        with pytest.MonkeyPatch.context() as patch:
            original = heldout.draw_share
            patch.setattr(heldout, "draw_share", keep)
            target_option = {"target": target.replace("base-null", "text-encoder"), "output_dir": str(folder / target)}
            (folder / target).mkdir(mode=0o700)
            training.train(resolve(TrainOptions(**OPTIONS | files | target_option | options)))
        torch.save(drawn, folder / f"{target}.images")
    return folder


@pytest.fixture(scope="module")
def pipeline():
    """The tiny model as plain diffusers loads it."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(models.TINY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_adapter(model: models.Model, folder: Path, scale: float = 1.0) -> models.Model:
    return adapters.put_on(model, System("tuned", ((str(folder), scale),)))


def load_tiny() -> models.Model:
    return models.load_model("tiny")


def sample(paths: list[Path], **options) -> dict[str, Tensor]:
    """texforce's own images of the prompts, of seeds 5 and 6."""
    config = resolve_sample(SampleOptions(adapter=[str(path) for path in paths], prompt=PROMPTS, **options))
    return evaluation.sample(config, PROMPTS, [5, 6])


def by_diffusers(pipeline, **arguments) -> Tensor:
    """The same images by plain diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt"}
    return pipeline(PROMPTS, generator=generators, **options, **arguments).images


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


@pytest.mark.slow
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
    assert (config.model, config.num_inference_steps, config.guidance_scale) == ("tiny", 3, 3.0)
    assert config.null_prompt == "adapted"
    assert resolve_sample(SampleOptions(adapter=[str(runs / "base-null")], prompt=PROMPTS)).null_prompt == "base"


# --- the strength ---


def test_strength_zero_is_the_base_model_bit_for_bit(runs):
    for name in ("text-encoder", "unet"):
        images = sample([runs / name], strength=0.0, compare=True)
        assert torch.equal(images["tuned"], images["base"])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["text-encoder", "unet", "base-null"])
def test_strength_one_draws_the_images_that_training_measured(runs, name):
    base, tuned = torch.load(runs / f"{name}.images")
    assert (tuned - base).abs().max() > 0.01
    settings = json.loads((runs / name / "config.json").read_text())
    config = resolve(TrainOptions(**settings))
    policy = texforce.Policy(load_adapter(load_tiny(), runs / name), config)

    def draw() -> Tensor:
        return torch.cat(list(heldout.draw_share(policy, PROMPTS, config.sample_batch_size).values()))

    assert torch.equal(draw(), tuned)
    with policy.base():
        assert torch.equal(draw(), base)


@pytest.mark.quick(1)
@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_the_strength_multiplies_the_deltas_of_the_weights(runs, part):
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
    both = System("tuned", tuple((str(runs / part), 1.0) for part in ("text-encoder", "unet")))
    model = adapters.put_on(load_tiny(), both)
    for part in (model.text_encoder, model.unet):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())


# --- joining ---


@pytest.mark.slow
def test_a_text_encoders_and_a_unets_adapter_join(runs, pipeline):
    from peft import PeftModel

    joined = sample([runs / "text-encoder", runs / "unet"])["tuned"]
    assert torch.equal(sample([runs / "unet", runs / "text-encoder"])["tuned"], joined)
    for alone in ("text-encoder", "unet"):
        assert (sample([runs / alone])["tuned"] - joined).abs().max() > 0.01
    plain = pipeline.text_encoder, pipeline.unet
    model = load_tiny()
    pipeline.text_encoder = PeftModel.from_pretrained(model.text_encoder, runs / "text-encoder")
    pipeline.unet = PeftModel.from_pretrained(model.unet, runs / "unet" / "unet")
    tuned = by_diffusers(pipeline)
    pipeline.text_encoder, pipeline.unet = plain
    torch.testing.assert_close(tuned, joined, rtol=0, atol=1e-4)


def test_two_adapters_of_one_part_are_refused(runs):
    model = load_adapter(load_tiny(), runs / "text-encoder")
    with pytest.raises(InputError, match="has an adapter already"):
        load_adapter(model, runs / "base-null")


def test_one_folder_may_hold_both(runs, tmp_path):
    shutil.copytree(runs / "text-encoder", tmp_path / "both")
    shutil.copytree(runs / "unet" / "unet", tmp_path / "both" / "unet")
    joined = sample([runs / "text-encoder", runs / "unet"])["tuned"]
    assert torch.equal(sample([tmp_path / "both"])["tuned"], joined)


def test_a_whole_unet_is_drawn_with_and_compared_to_the_base(pipeline, tmp_path):
    save_file(tuned(pipeline.unet), tmp_path / "unet.safetensors")
    options = {"model": "tiny", "num_inference_steps": 3, "guidance_scale": 3.0}
    images = sample([], unet=str(tmp_path / "unet.safetensors"), compare=True, **options)
    torch.testing.assert_close(images["base"], by_diffusers(pipeline), rtol=0, atol=1e-4)
    plain, pipeline.unet = pipeline.unet, copy.deepcopy(pipeline.unet)
    pipeline.unet.load_state_dict(tuned(plain))
    drawn = by_diffusers(pipeline)
    pipeline.unet = plain
    assert (images["base"] - drawn).abs().max() > 0.01
    torch.testing.assert_close(images["tuned"], drawn, rtol=0, atol=1e-4)


def test_a_trainings_folder_keeps_its_permissions_and_its_files_have_the_umasks(runs):
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((runs / "text-encoder").stat().st_mode) == 0o700
    assert stat.S_IMODE((runs / "text-encoder" / WEIGHTS).stat().st_mode) == 0o666 & ~mask


# --- what is refused ---


@pytest.fixture
def adapter(small, tmp_path) -> Path:
    """A peft folder of the small model's text encoder, to be damaged."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(in_layout("peft", random_layers(small.text_encoder, 1), False), folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT))
    return folder


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
def test_weights_that_are_not_the_models_are_refused_by_file(small, adapter, wrong):
    change_weights(adapter, WRONG_WEIGHTS[wrong])
    with pytest.raises(ArtifactError, match=WEIGHTS):
        lora_files.read_adapter(adapter, small)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(small, adapter, share):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError, match="refused as an adapter: "):
        lora_files.read_adapter(adapter, small)


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
    ({"r": 8}, "has rank 3, and its configuration says 8"),
    ({"lora_alpha": "4"}, "lora_alpha"),
    ({"lora_alpha": math.nan}, "lora_alpha"),
    ({"lora_alpha": math.inf}, "lora_alpha"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"rank_pattern": {"q_proj": 8}}, "has rank 3, and its configuration says 8"),
    ({"rank_pattern": {r"^(([a-z]+)+\.?)+$": 8}}, "rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"alpha_pattern": {r"(a+)+$": 8}}, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
    ({"modules_to_save": ["final_layer_norm"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"r": 10**400}, "r must be"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_honoured_is_refused_at_once(small, adapter, changes, words):
    change_config(adapter, **changes)
    with at_most(10), pytest.raises(ArtifactError, match=words):
        lora_files.read_adapter(adapter, small)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"{}", b'{"r": 4}', b"[" * 100_000,
], ids=["empty", "cut", "list", "number", "null", "not-utf-8", "no-fields", "few-fields", "nested"])  # fmt: skip
def test_a_configuration_that_is_none_is_refused_by_file(small, adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        lora_files.read_adapter(adapter, small)


def test_a_unets_damaged_adapter_is_refused_too(runs, tmp_path):
    folder = Path(shutil.copytree(runs / "unet", tmp_path / "adapter"))
    change_weights(folder / "unet", WRONG_WEIGHTS["lacking"])
    with pytest.raises(ArtifactError, match=r"lacks its (down|up) matrix"):
        load_adapter(load_tiny(), folder)


def test_a_unets_adapter_may_lie_in_the_folder_itself(runs, tmp_path):
    folder = shutil.copytree(runs / "unet" / "unet", tmp_path / "adapter")
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    assert torch.equal(sample([folder], **options)["tuned"], sample([runs / "unet"], **options)["tuned"])


def test_an_adapter_of_a_wider_model_is_refused(runs, small):
    with pytest.raises(ArtifactError, match="made for another model: "):
        lora_files.read_adapter(runs / "text-encoder", small)


def test_a_folder_without_an_adapter_is_named(small, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotFoundError, match=r"holds neither adapter_config\.json|there is no file or folder") as caught:
            lora_files.read_adapter(folder, small)
        assert repr(str(folder)) in str(caught.value)


def test_a_folder_without_weights_is_named(small, adapter):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match=WEIGHTS):
        lora_files.read_adapter(adapter, small)


def test_a_refused_adapter_leaves_no_half_of_a_pair_on_the_models(runs, tmp_path):
    """The models given are what they were: a caller that catches the error still holds the base model."""
    folder = Path(shutil.copytree(runs / "unet", tmp_path / "adapter"))
    change_weights(folder / "unet", WRONG_WEIGHTS["NaN"])
    model = load_tiny()
    with pytest.raises(ArtifactError):
        load_adapter(model, folder)
    assert not hasattr(model.unet, "peft_config")


BadFiles = dict[str, tuple[Path, str, type[Exception]]]  # each with the option that names it and the error


def bad_files(folder: Path, pipeline) -> BadFiles:
    """Files and folders that must not get through."""
    text = random_layers(pipeline.text_encoder, 1)
    unet = in_layout("lora.down", random_layers(pipeline.unet, 1), True)
    return {
        **unreadable_files(folder, unet),
        **hostile_files(folder),
        **bad_adapters(folder, text),
        **bad_unets(folder, pipeline.unet.state_dict(), unet),
        "text encoder as unet": (write_tensors(folder / "text", in_layout("lora_A", text, False)), "unet", ArtifactError),
    }


def write_tensors(path: Path, content: dict[str, Tensor], metadata=None) -> Path:
    content = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in content.items()}
    save_file(content, path.with_suffix(".safetensors"), metadata)
    return path.with_suffix(".safetensors")


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def unreadable_files(folder: Path, tensors: dict[str, Tensor]) -> BadFiles:
    (folder / "nothing").mkdir()
    page = b"<!DOCTYPE html><html><body>Not found</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    whole = write_tensors(folder / "whole", tensors).read_bytes()
    return {
        "mistyped path": (folder / "absent", "adapter", NotFoundError),
        "mistyped unet": (folder / "absent.safetensors", "unet", NotFoundError),
        "empty folder": (folder / "nothing", "adapter", NotFoundError),
        "empty folder as unet": (folder / "nothing", "unet", NotFoundError),
        "empty file": (write_bytes(folder / "empty.safetensors", b""), "adapter", ArtifactError),
        "empty pickle": (write_bytes(folder / "empty.bin", b""), "unet", ArtifactError),
        "html": (write_bytes(folder / "page.safetensors", page), "adapter", ArtifactError),
        "html pickle": (write_bytes(folder / "page.bin", page), "unet", ArtifactError),
        "lfs pointer": (write_bytes(folder / "lfs.safetensors", pointer), "unet", ArtifactError),
        "truncated": (write_bytes(folder / "cut.safetensors", whole[: len(whole) // 2]), "unet", ArtifactError),
        "truncated by a byte": (write_bytes(folder / "cut1.safetensors", whole[:-1]), "unet", ArtifactError),
        "no tensors": (write_tensors(folder / "none", {}), "adapter", ArtifactError),
    }


def hostile_files(folder: Path) -> BadFiles:
    hostile, peft = folder / "hostile.bin", folder / "hostile-peft"
    torch.save({"a": hostile_objects(folder)[1]}, hostile)
    peft.mkdir()
    shutil.copy(hostile, peft / "adapter_model.bin")
    (peft / "adapter_config.json").write_text(json.dumps(PEFT))
    return {
        "pickle with code": (hostile, "adapter", ArtifactError),
        "pickle with code as unet": (hostile, "unet", ArtifactError),
        "peft pickle with code": (peft, "adapter", ArtifactError),
    }


def bad_adapters(folder: Path, text: dict[str, Layer]) -> BadFiles:
    plain, first = in_layout("lora_A", text, False), next(iter(text))
    key = f"text_encoder.text_model.{first}.lora_A.weight"
    more = {"text_encoder.more.lora_A.weight": torch.ones(3, 3)}
    wide = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in plain.items()}
    deep = {key.replace("layers.0", "layers.7"): tensor for key, tensor in plain.items() if "layers.0" in key}
    alpha = {f"lora_te_text_model_{first.replace('.', '_')}.alpha": torch.tensor(0.0)}
    contents = {
        "foreign keys": {"layer.weight": torch.ones(3)},
        "a foreign key more": plain | more,
        "wrong shapes": wide,
        "another depth": plain | deep,
        "a key missing": {k: t for k, t in plain.items() if k != key},
        "a layer missing": {k: t for k, t in plain.items() if first not in k},
        "a block missing": {k: t for k, t in plain.items() if "layers.1." not in k},
        "all NaN": {k: t * math.nan for k, t in plain.items()},
        "one infinite": plain | {key: plain[key] + math.inf},
        "all zero": {k: t * 0 for k, t in plain.items()},
        "kohya alpha zero": in_layout("kohya", text, False) | alpha,
        "twice the same": plain | in_layout("flat lora_A", text, False),
        "a wide up": plain | {key.replace("_A", "_B"): torch.ones(96, 3, 3, 3)},
    }
    files = {name: write_tensors(folder / name.replace(" ", "-"), content) for name, content in contents.items()}
    for name, metadata in {"metadata no json": "{", "metadata nonsense": '{"text_encoder.r": "x"}'}.items():
        files[name] = write_tensors(folder / name.replace(" ", "-"), plain, {"lora_adapter_metadata": metadata})
    return {name: (path, "adapter", ArtifactError) for name, path in files.items()}


def bad_unets(folder: Path, state: dict[str, Tensor], lora_tensors: dict[str, Tensor]) -> BadFiles:
    sparse = folder / "sparse.bin"
    torch.save({"conv_in.weight": torch.eye(3).to_sparse()}, sparse)
    contents = {
        "zero unet": {k: t * 0 for k, t in lora_tensors.items()},
        "the very same unet": state,
        "the same unet in half precision": {k: t.half() for k, t in state.items()},
        "a unet lacking a tensor": {k: t for k, t in state.items() if k != "conv_out.bias"},
        "a unet of other shapes": state | {"conv_in.weight": torch.ones(4, 4, 3, 3)},
        "a unet with NaN": state | {"conv_out.bias": math.nan * state["conv_out.bias"]},
        "half a checkpoint": {ldm.UNET + "out.2.bias": torch.ones(8)},
    }
    files = {name: write_tensors(folder / name.replace(" ", "-"), content) for name, content in contents.items()}
    return {name: (path, "unet", ArtifactError) for name, path in files.items()} | {
        "a sparse tensor": (sparse, "unet", ArtifactError)
    }


def read_term(path: Path, model) -> None:
    adapters.read_terms([(str(path), 1.0)], model)


def test_bad_files_are_refused_at_once_by_name_with_nothing_run_asked_or_written(small, tmp_path):
    files = bad_files(tmp_path, small)
    before = sorted(tmp_path.rglob("*"))
    for name, (path, option, kind) in files.items():
        read = adapters.read_unet if option == "unet" else read_term
        start = time.perf_counter()
        with recorded() as events, pytest.raises(kind) as caught:
            read(path, small)
        assert time.perf_counter() - start < 10, name  # a pattern could hang
        assert path.name in str(caught.value), (name, caught.value)
        assert len(str(caught.value).splitlines()) == 1, name
        assert events == [], (name, events)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["merge", "sample"])
def test_the_commands_refuse_bad_files_by_name_and_write_nothing(small, tmp_path, command):
    files = {**hostile_files(tmp_path), "mistyped path": (tmp_path / "absent", "adapter", NotFoundError)}
    arguments = {"merge": ["--output-dir"], "sample": ["--prompt", "a red circle", "--output-dir"]}[command]
    before = sorted(tmp_path.rglob("*"))
    for name, (path, option, kind) in files.items():
        command_line = [command, "--model", "tiny", f"--{option}", str(path), *arguments, str(tmp_path / "written")]
        result = invoke(*command_line)
        assert result.exit_code == kind.exit_code, (name, result.output, repr(result.exception))
        assert "Traceback" not in result.output, name
        assert re.sub(r"\s", "", path.name) in re.sub(r"\s", "", result.output), (name, result.output)
    assert sorted(tmp_path.rglob("*")) == before


# --- what is copied ---


def test_lora_is_put_on_a_copy_that_shares_the_weights_of_the_model_and_leaves_it_as_it_was(stable_diffusion, tmp_path):
    model = models.load_model(str(stable_diffusion))
    tensors = lora_files.lora_tensors(random_layers(model.text_encoder, 1))
    save_file({f"text_encoder.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    own = {parameter.data_ptr() for parameter in model.text_encoder.parameters()}
    ids = models.tokenize_for(model, PROMPTS)
    base = models.encode(model, ids)
    tuned = adapters.put_on(model, System("tuned", ((str(tmp_path / "lora.safetensors"), 1.0),)))
    assert tuned.unet is model.unet
    shared = {weight.data_ptr() for name, weight in tuned.text_encoder.named_parameters() if ".lora_" not in name}
    assert shared == own
    assert not torch.equal(models.encode(tuned, ids), base)
    assert torch.equal(models.encode(model, ids), base)
    assert not any(".lora_" in name for name, _ in model.text_encoder.named_parameters())
