"""`texforce merge`: others read what it writes as it was meant, and it reads the layouts of others as they are."""

import copy
import functools
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import texforce
from texforce import adapters, cli, evaluate, ldm, merge, models, sampler, train, weights
from texforce.errors import ArtifactError
from texforce.config import TrainConfig, resolve
from texforce.config import MergeConfig, SampleConfig, parse_weighted, resolve_merge, resolve_sample
from texforce.adapters import Layer

PROMPTS = ["a crimson disc", "two blue squares"]


# --- pipelines and adapters to merge ---


def attention_names(module: torch.nn.Module) -> list[str]:
    names = re.compile(r"(.*\.)?(q_proj|k_proj|v_proj|out_proj|to_q|to_k|to_v|to_out\.0)")
    return [name for name, layer in module.named_modules() if names.fullmatch(name) and hasattr(layer, "weight")]


def random_layers(
    module: torch.nn.Module, seed: int, rank: int = 3, alpha: float = 6.0, size: float = 0.3
) -> dict[str, Layer]:
    """LoRA that shows in the images, of another alpha than its rank, by our names."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name in attention_names(module):
        weight = module.get_submodule(name).weight
        down = torch.randn(rank, weight.shape[1], generator=generator) * size / math.sqrt(weight.shape[1])
        up = torch.randn(weight.shape[0], rank, generator=generator) * size / math.sqrt(rank)
        layers[name.removeprefix("text_model.")] = Layer(down, up, alpha)
    return layers


def write_adapter(folder: Path, models, seed: int, parts=("text_encoder", "unet"), **options) -> Path:
    """An adapter in the layout of this project's trainings, as plain peft writes it."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    for part in parts:
        module = getattr(models, part)
        layers = adapters.named_as_in(module, random_layers(module, seed, **options))
        rank, alpha = (getattr(next(iter(layers.values())), name) for name in ("rank", "alpha"))
        kinds = ["to_q", "to_k", "to_v", "to_out.0"] if part == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        clone = type(module).from_config(module.config) if part == "unet" else type(module)(module.config)
        adapted = get_peft_model(clone, LoraConfig(r=rank, lora_alpha=alpha, target_modules=kinds))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in adapters.lora_tensors(layers).items()}
        set_peft_model_state_dict(adapted, tensors)
        adapted.save_pretrained(folder if part == "text_encoder" else folder / part, save_embedding_layers=False)
    return folder


def unet_of_shape(**options):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
    return UNet2DConditionModel(**sizes | options)


def vae_of_shape():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=64, scaling_factor=0.18215,
    )  # fmt: skip


def text_encoder_of_shape(cls, act: str, layers: int, width: int = 32):
    from transformers import CLIPTextConfig

    tokenizer = tiny_tokenizer()
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=77, hidden_act=act, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=0, pad_token_id=1,
            projection_dim=width,
        )
    )  # fmt: skip


def tiny_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", model_max_length=77)


def save_stable_diffusion(folder: Path, version: int) -> Path:
    """A pipeline with every block of Stable Diffusion 1.5 or 2.1, of narrow layers and random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    options = {} if version == 1 else {"use_linear_projection": True, "attention_head_dim": (2, 4, 4, 8)}
    StableDiffusionPipeline(
        vae=vae_of_shape(), unet=unet_of_shape(**options), tokenizer=tiny_tokenizer(), safety_checker=None,
        text_encoder=text_encoder_of_shape(CLIPTextModel, *(("quick_gelu", 12) if version == 1 else ("gelu", 23))),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_stable_diffusion_xl(folder: Path) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = unet_of_shape(
        block_out_channels=(32, 32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=96,
        transformer_layers_per_block=(1, 2, 2), attention_head_dim=(2, 4, 8), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=112,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae_of_shape(), unet=unet, tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
        text_encoder=text_encoder_of_shape(CLIPTextModel, "quick_gelu", 3),
        text_encoder_2=text_encoder_of_shape(CLIPTextModelWithProjection, "gelu", 4, width=64),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    ).save_pretrained(folder)  # fmt: skip
    return folder


class Base:
    """A pipeline's folder, and the pipeline in it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.parts = ("text_encoder", "text_encoder_2", "unet") if name == "sdxl" else ("text_encoder", "unet")
        self.loaded = quiet(merge.load_pipeline(str(folder)))
        self.images = draw(self.loaded)

    def pipeline(self):
        """A copy that may be changed."""
        copies = {part: copy.deepcopy(getattr(self.loaded, part)) for part in self.parts}
        return quiet(
            type(self.loaded)(**self.loaded.components | copies, requires_safety_checker=False)
            if self.name != "sdxl"
            else type(self.loaded)(**self.loaded.components | copies)
        )


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BASES = ("tiny", "sd15", "sd21", "sdxl")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tiny": Base("tiny", models.TINY),
        "sd15": Base("sd15", save_stable_diffusion(folder / "sd15", 1)),
        "sd21": Base("sd21", save_stable_diffusion(folder / "sd21", 2)),
        "sdxl": Base("sdxl", save_stable_diffusion_xl(folder / "sdxl")),
    }


@pytest.fixture(scope="module")
def pairs(bases, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Two adapters of every base, of other ranks and alphas."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: (
            write_adapter(folder / f"{name}-1", base.pipeline(), 1, base.parts, rank=3, alpha=6.0),
            write_adapter(folder / f"{name}-2", base.pipeline(), 2, base.parts, rank=2, alpha=1.0),
        )
        for name, base in bases.items()
    }


def draw(pipeline) -> Tensor:
    """Images of plain diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt"}
    if "text_encoder_2" in pipeline.config:
        options |= {"height": 64, "width": 64}
    return quiet(pipeline)(PROMPTS, generator=generators, **options).images


def adapted_by_hand(base: Base, *weighted: tuple[Path, float]):
    """The pipeline with the weights changed by plain arithmetic on the files' own tensors."""
    pipeline = base.pipeline()
    for folder, weight in weighted:
        for part in base.parts:
            place = folder if part == "text_encoder" else folder / part
            config = json.loads((place / "adapter_config.json").read_text())
            tensors = load_file(place / "adapter_model.safetensors")
            for key, down in tensors.items():
                if ".lora_A." in key:
                    up = tensors[key.replace("lora_A", "lora_B")]
                    name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    layer = getattr(pipeline, part).get_submodule(name)
                    delta = weight * config["lora_alpha"] / config["r"] * (up @ down)
                    layer.weight.data += delta.reshape(layer.weight.shape)
    return pipeline


def merge(base: Base, output: Path, *specs: str, **options) -> Path:
    config = MergeConfig(adapter=list(specs) or None, model=str(base.folder), output=str(output), **options)
    return merge.merge(resolve_merge(config))


@pytest.fixture(scope="module")
def fused(bases, pairs):
    """Of a base's name: the pipeline with 0.7 times the one adapter and -0.4 times the other, by hand; not to be changed."""
    return functools.cache(lambda name: adapted_by_hand(bases[name], (pairs[name][0], 0.7), (pairs[name][1], -0.4)))


@pytest.fixture(scope="module")
def merged(bases, pairs, tmp_path_factory):
    """Of a base's name and a format: the folder with the same, written by this project."""

    def write(name: str, format: str) -> Path:
        one, other = pairs[name]
        output = tmp_path_factory.mktemp("fused") / "merged"
        return merge(bases[name], output, f"{one}:0.7", f"{other}:-0.4", format=format)

    return functools.cache(write)


# --- others read what is written ---


def read_by_others(base: Base, format: str, folder: Path):
    """A pipeline with what was written, by plain diffusers and peft."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import PeftModel

    if format == "pipeline":
        return DiffusionPipeline.from_pretrained(folder)
    if format == "checkpoint":
        cls = StableDiffusionXLPipeline if base.name == "sdxl" else StableDiffusionPipeline
        return cls.from_single_file(folder / f"{folder.name}.safetensors", config=str(base.folder), local_files_only=True)
    pipeline = base.pipeline()
    if format == "peft":
        for part in base.parts:
            place = folder if part == "text_encoder" else folder / part
            setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), place).merge_and_unload())
        return pipeline
    pipeline.load_lora_weights(folder if format == "diffusers" else folder / f"{folder.name}.safetensors")
    return pipeline


FORMATS = ("peft", "diffusers", "kohya", "pipeline", "checkpoint")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", BASES)
def test_others_draw_the_same_images_from_every_format(bases, fused, merged, name, format):
    expected = draw(fused(name))
    assert (expected - bases[name].images).abs().max() > 0.01
    found = draw(read_by_others(bases[name], format, merged(name, format)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["sd15"])
def test_a_single_adapter_keeps_its_alpha_in_every_format(bases, pairs, tmp_path, name, format):
    base, (one, _) = bases[name], pairs[name]
    expected = draw(adapted_by_hand(base, (one, 1.0)))
    folder = merge(base, tmp_path / "merged", str(one), format=format)
    torch.testing.assert_close(draw(read_by_others(base, format, folder)), expected, rtol=0, atol=1e-4)
    if format == "kohya":
        alphas = {
            tensor.item() for key, tensor in load_file(folder / "merged.safetensors").items() if key.endswith(".alpha")
        }
        assert alphas == {6.0}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", BASES)
def test_this_project_reads_every_format_back(bases, fused, merged, name, format):
    base, expected, folder = bases[name], fused(name), merged(name, format)
    if format in merge.FULL_FORMATS:
        source = folder if format == "pipeline" else folder / "merged.safetensors"
        tensors = adapters.read_unet(source, base.pipeline()).tensors
        for key, tensor in expected.unet.state_dict().items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-6)
        return
    source = folder / "merged.safetensors" if format == "kohya" else folder
    pipeline = base.pipeline()
    adapter = adapters.read_adapter(source, pipeline)
    assert set(adapter) == set(base.parts)
    for part, layers in adapter.items():
        adapters.bake(getattr(pipeline, part), layers)
        found = getattr(pipeline, part).state_dict()
        for key, tensor in getattr(expected, part).state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


def test_diffusers_keys_hold_the_level_that_comfyui_looks_for(bases, pairs, tmp_path):
    """ComfyUI, comfy/adapters.py (model_lora_keys_clip): `text_encoder.text_model.encoder.layers.{}.{}` and nothing shorter."""
    folder = merge(bases["sd15"], tmp_path / "merged", str(pairs["sd15"][0]), format="diffusers")
    keys = {key for key in load_file(folder / "pytorch_lora_weights.safetensors") if key.startswith("text_encoder.")}
    kinds = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
    names = [f"text_encoder.text_model.encoder.layers.{n}.{kind}" for n in range(12) for kind in kinds]
    assert keys == {f"{name}.lora_{matrix}.weight" for name in names for matrix in "AB"}


def test_kohyas_keys_are_those_that_a1111_and_comfyui_look_up(bases, pairs, tmp_path):
    """ComfyUI, comfy/adapters.py: `lora_te_text_model_encoder_layers_{}_{}`, XL `lora_te1_...` and `lora_te2_...`, each with
    `.lora_up.weight`, `.lora_down.weight` and `.alpha`. AUTOMATIC1111, extensions-builtin/Lora/networks.py: the same for
    text, `lora_unet_down_blocks_(d)_attentions_(d)_(.+)` and its likes for the U-Net."""
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    kinds = [f"self_attn_{letter}_proj" for letter in ("q", "k", "v", "out")]
    for name, prefixes in (
        ("sd15", {"lora_te_": 12}),
        ("sd21", {"lora_te_": 23}),
        ("sdxl", {"lora_te1_": 3, "lora_te2_": 4}),
    ):
        folder = merge(bases[name], tmp_path / name, str(pairs[name][0]), format="kohya")
        keys = set(load_file(folder / f"{name}.safetensors"))
        expected = {
            f"{prefix}text_model_encoder_layers_{n}_{kind}{end}"
            for prefix, number in prefixes.items() for n in range(number) for kind in kinds for end in ends
        }  # fmt: skip
        assert {key for key in keys if key.startswith("lora_te")} == expected
        blocks = r"(down_blocks_\d_attentions_\d|mid_block_attentions_0|up_blocks_\d_attentions_\d)"
        if name == "sdxl":
            blocks = r"(input_blocks_\d_1|middle_block_1|output_blocks_\d_1)"
        pattern = re.compile(
            rf"lora_unet_{blocks}_transformer_blocks_\d_attn[12]_to_(q|k|v|out_0)({'|'.join(map(re.escape, ends))})"
        )
        assert all(pattern.fullmatch(key) for key in keys - expected)
        assert len(keys - expected) == 3 * len(attention_names(bases[name].pipeline().unet))


def test_kohyas_metadata_say_what_it_is(bases, pairs, tmp_path):
    folder = merge(bases["sd15"], tmp_path / "mine", str(pairs["sd15"][0]), format="kohya")
    with safe_open(folder / "mine.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora",
        "3",
        "6.0",
    )
    assert (metadata["ss_output_name"], metadata["modelspec.title"]) == ("mine", "mine")
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"].endswith("/lora")


@pytest.mark.parametrize(("width", "base", "architecture"), [
    (768, "sd_v1", "stable-diffusion-v1"), (1024, "sd_v2", "stable-diffusion-v2-512"),
    (1024, "sd_v2", "stable-diffusion-v2-768-v"), (2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
])  # fmt: skip
def test_the_published_models_have_their_names(width, base, architecture):
    kind = "v_prediction" if architecture.endswith("-v") else "epsilon"
    models = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width)),
        scheduler=SimpleNamespace(config={"prediction_type": kind}),
    )
    assert merge.architecture_of(models) == (base, architecture)


# --- fusion ---


def test_the_fusion_of_two_is_the_weighted_sum_of_what_they_change(bases, pairs):
    base = bases["tiny"]
    one, other = (adapters.read_adapter(path, base.pipeline()) for path in pairs["tiny"])
    fused = adapters.fuse([(one, 0.3), (other, 0.7)])
    for part in base.parts:
        for name, layer in fused[part].items():
            expected = 0.3 * one[part][name].delta() + 0.7 * other[part][name].delta()
            torch.testing.assert_close(layer.delta(), expected, rtol=0, atol=1e-6)
            assert layer.rank == 5


def test_with_weights_one_and_zero_it_is_the_first_bit_for_bit(bases, pairs):
    one, other = (adapters.read_adapter(path, bases["tiny"].pipeline()) for path in pairs["tiny"])
    for terms in ([(one, 1.0), (other, 0.0)], [(other, 0.0), (one, 1.0)], [(one, 1.0)]):
        assert adapters.fuse(terms) == one


def test_the_parts_of_different_adapters_join(bases, tmp_path):
    pipeline = bases["tiny"].pipeline()
    text = adapters.read_adapter(write_adapter(tmp_path / "text", pipeline, 1, ("text_encoder",)), pipeline)
    unet = adapters.read_adapter(write_adapter(tmp_path / "unet", pipeline, 2, ("unet",)), pipeline)
    fused = adapters.fuse([(text, 1.0), (unet, 1.0)])
    assert fused == text | unet


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
    with pytest.raises(ValueError, match=f"adapter: the weight in 'out:{weight}'"):
        parse_weighted(f"out:{weight}")


# --- layouts of others ---


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
def test_a_unets_lora_of_every_layout_is_read(bases, tmp_path, layout, ending):
    pipeline = bases["sd15"].pipeline()
    layers = random_layers(pipeline.unet, 3)
    tensors = in_layout(layout, layers, True, pipeline.unet.config)
    assert len(tensors) == len(layers) * (3 if "kohya" in layout else 2)
    path = tmp_path / f"ddpo.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    check_same(adapters.read_unet(path, pipeline).adapter["unet"], layers, "kohya" in layout)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_a_text_encoders_lora_of_every_layout_is_read(bases, tmp_path, layout, ending):
    pipeline = bases["sd15"].pipeline()
    layers = random_layers(pipeline.text_encoder, 3)
    tensors = in_layout(layout, layers, False)
    assert len(tensors) == len(layers) * (3 if "kohya" in layout else 2)
    path = tmp_path / f"adapter.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    check_same(adapters.read_adapter(path, pipeline)["text_encoder"], layers, "kohya" in layout)


@pytest.mark.parametrize("layout", ["old peft", "peft"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_peft_folder_of_either_layout_is_read_with_its_alpha(bases, tmp_path, layout, file):
    """The authors' release is of the old layout, in a pickle."""
    pipeline = bases["sd15"].pipeline()
    layers = random_layers(pipeline.text_encoder, 3)
    tensors = in_layout(layout, layers, False)
    torch.save(tensors, tmp_path / file) if file.endswith("bin") else save_file(tensors, tmp_path / file)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_same(adapters.read_adapter(tmp_path, pipeline)["text_encoder"], layers, True)


def test_peft_patterns_and_rank_stabilised_alphas_are_honoured(bases, tmp_path):
    pipeline = bases["sd15"].pipeline()
    layers = random_layers(pipeline.text_encoder, 3)
    one = "encoder.layers.3.self_attn.q_proj"
    layers[one] = Layer(layers[one].down[:2], layers[one].up[:, :2].contiguous(), 9.0)
    save_file(in_layout("peft", layers, False), tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "rank_pattern": {one: 2}, "alpha_pattern": {"layers.3.self_attn.q_proj": 9},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_same(adapters.read_adapter(tmp_path, pipeline)["text_encoder"], layers, True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    found = adapters.read_adapter(tmp_path, pipeline)["text_encoder"]
    assert found[one].scale == pytest.approx(9 / math.sqrt(2))
    assert found[one.replace("3", "4")].scale == pytest.approx(6 / math.sqrt(3))


def test_metadata_of_a_diffusers_file_give_its_alphas(bases, pairs, tmp_path):
    pipeline = bases["sd15"].pipeline()
    adapter = adapters.read_adapter(pairs["sd15"][0], pipeline)
    arguments = {f"{part}_lora_layers": adapters.lora_tensors(layers) for part, layers in adapter.items()}
    metadata = {f"{part}_lora_adapter_metadata": adapters.lora_config(layers) for part, layers in adapter.items()}
    pipeline.save_lora_weights(tmp_path, **arguments, **metadata)
    for part, layers in adapters.read_adapter(tmp_path, pipeline).items():
        check_same(layers, adapter[part], True)
    pipeline.save_lora_weights(tmp_path, **arguments)
    for part, layers in adapters.read_adapter(tmp_path, pipeline).items():
        check_same(layers, adapter[part], False)


def test_a_file_of_a_diffusers_unet_alone_has_metadata_without_a_prefix(bases, tmp_path):
    """As `save_lora_adapter` writes them; where ranks differ, their patterns begin with ^."""
    pipeline = bases["sd15"].pipeline()
    layers = random_layers(pipeline.unet, 3)
    odd = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layers[odd] = Layer(layers[odd].down[:2], layers[odd].up[:, :2].contiguous(), 6.0)  # diffusers loses other alphas here
    save_file(in_layout("kohya", layers, True), tmp_path / "kohya.safetensors")
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="default")
    pipeline.unet.save_lora_adapter(tmp_path / "out", weight_name="unet.safetensors")
    with safe_open(tmp_path / "out" / "unet.safetensors", framework="pt") as file:
        assert "^" in file.metadata()["lora_adapter_metadata"]
    found = adapters.read_unet(tmp_path / "out", bases["sd15"].pipeline()).adapter["unet"]
    check_same(found, layers, True)


def test_the_file_of_a_peft_folder_has_the_alpha_of_the_folder(bases, pairs):
    pipeline = bases["tiny"].pipeline()
    whole = adapters.read_adapter(pairs["tiny"][0], pipeline)
    check_same(
        adapters.read_adapter(pairs["tiny"][0] / "adapter_model.safetensors", pipeline)["text_encoder"],
        whole["text_encoder"],
        True,
    )
    for path in (pairs["tiny"][0] / "unet", pairs["tiny"][0] / "unet" / "adapter_model.safetensors"):
        check_same(adapters.read_unet(path, pipeline).adapter["unet"], whole["unet"], True)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_locon_of_all_layers_makes_the_round_trip(bases, tmp_path, name):
    """kohya's with convolutions, ff, proj_in and proj_out, in half precision, alphas included."""
    base, generator = bases[name], torch.Generator().manual_seed(0)
    pipeline, layers, tensors = base.pipeline(), {}, {}
    for key, module in pipeline.unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            weight = module.weight
            down = (0.1 * torch.randn(2, *weight.shape[1:], generator=generator)).half()
            up = (0.1 * torch.randn(weight.shape[0], 2, *(1 for _ in weight.shape[2:]), generator=generator)).half()
            layers[key] = Layer(down, up, 1.0)
            full = "lora_unet_" + (ldm.unet_name(key, pipeline.unet.config) if name == "sdxl" else key).replace(".", "_")
            tensors |= {
                f"{full}.lora_down.weight": down,
                f"{full}.lora_up.weight": up,
                f"{full}.alpha": torch.tensor(1.0).half(),
            }
    save_file(tensors, tmp_path / "locon.safetensors")
    found = adapters.read_unet(tmp_path / "locon.safetensors", pipeline).adapter["unet"]
    check_same(found, layers, True)
    expected = copy.deepcopy(pipeline.unet)
    for key, layer in layers.items():
        expected.get_submodule(key).weight.data += layer.delta()
    for format in ("kohya", "pipeline"):
        folder = merge(base, tmp_path / format, unet=str(tmp_path / "locon.safetensors"), format=format)
        again = base.pipeline()
        if format == "kohya":
            adapters.bake(again.unet, adapters.read_unet(folder, again).adapter["unet"])
        else:
            again = read_by_others(base, format, folder)
        found = again.unet.state_dict()
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


def test_a_part_of_the_blocks_and_of_their_attentions_is_an_adapter_too(bases, tmp_path):
    pipeline = bases["sd15"].pipeline()
    layers = random_layers(pipeline.unet, 3)
    some = {name: layer for name, layer in layers.items() if name.startswith("up_blocks.1.attentions.0")}
    kinds = {name: layer for name, layer in layers.items() if "attn1" in name or name.endswith(("to_k", "to_v"))}
    for number, wanted in enumerate((some, kinds)):
        save_file(in_layout("lora_A", wanted, True), tmp_path / f"{number}.safetensors")
        check_same(adapters.read_unet(tmp_path / f"{number}.safetensors", pipeline).adapter["unet"], wanted, False)


def test_factors_of_fewer_or_more_axes_than_the_weight_are_fitted(bases, tmp_path):
    pipeline = bases["sd15"].pipeline()
    proj, linear = "mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    flat = Layer(torch.randn(2, 64), torch.randn(64, 2), 2.0)
    long = Layer(torch.randn(2, 256, 1, 1), torch.randn(64, 2, 1, 1), 2.0)
    save_file(in_layout("lora_A", {proj: flat, linear: long}, True), tmp_path / "odd.safetensors")
    adapter = adapters.read_unet(tmp_path / "odd.safetensors", pipeline).adapter
    assert adapter["unet"][proj].down.shape == (2, 64, 1, 1)
    assert adapter["unet"][linear].up.shape == (64, 2)
    adapters.apply(models.load_model(str(bases["sd15"].folder)), adapter)
    folder = merge(bases["sd15"], tmp_path / "merged", unet=str(tmp_path / "odd.safetensors"), format="diffusers")
    read_by_others(bases["sd15"], "diffusers", folder)


def test_eight_bit_files_are_read(bases, tmp_path):
    pipeline = bases["tiny"].pipeline()
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in pipeline.unet.state_dict().items()}
    save_file(state, tmp_path / "fp8.safetensors")
    tensors = adapters.read_unet(tmp_path / "fp8.safetensors", pipeline)  # it is not the very same: rounding changed it
    assert tensors.tensors["conv_in.weight"].dtype == torch.float16


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin"])
def test_a_variant_of_a_unet_is_read_if_it_is_the_only_one(bases, pairs, tmp_path, name):
    state = adapted_by_hand(bases["tiny"], (pairs["tiny"][0], 1.0)).unet.state_dict()
    torch.save(state, tmp_path / name) if name.endswith("bin") else save_file(state, tmp_path / name)
    assert adapters.read_unet(tmp_path, bases["tiny"].pipeline()).tensors.keys() == state.keys()
    save_file(state, tmp_path / f"diffusion_pytorch_model-00001-of-00002.{name.rpartition('.')[2]}")
    with pytest.raises(ArtifactError, match="holds 2 files of a U-Net"):
        adapters.read_unet(tmp_path, bases["tiny"].pipeline())


def test_blocks_of_different_lengths_do_not_keep_a_text_encoders_adapter_from_being_read(bases, pairs):
    pipeline = bases["sd15"].pipeline()
    pipeline.unet.register_to_config(layers_per_block=(2, 2, 2, 2))
    assert "text_encoder" in adapters.read_adapter(pairs["sd15"][0], pipeline)


def test_a_pickle_leaves_no_copy(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MIN_CACHED_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipeline = bases["tiny"].pipeline()
    torch.save(in_layout("peft", random_layers(pipeline.text_encoder, 1), False), tmp_path / "adapter.bin")
    adapters.read_adapter(tmp_path / "adapter.bin", pipeline)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_names_another_family_is_refused(bases, tmp_path):
    pipeline = bases["sd15"].pipeline()
    tensors = in_layout("kohya", random_layers(pipeline.text_encoder, 1), False)
    save_file(tensors, tmp_path / "adapters.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    adapters.read_adapter(tmp_path / "adapters.safetensors", pipeline)  # of narrow models nothing is known
    pipeline.unet.register_to_config(cross_attention_dim=768)
    with pytest.raises(ArtifactError, match=r"made for another model: it says sdxl_base_v1-0, and this one is sd_v1"):
        adapters.read_adapter(tmp_path / "adapters.safetensors", pipeline)


@pytest.mark.parametrize("origin", ["file", "pickle", "folder", "pipeline", "single file"])
@pytest.mark.parametrize("name", ["tiny", "sd15"])
def test_a_whole_unet_of_every_origin_is_read(bases, pairs, tmp_path, name, origin):
    base = bases[name]
    tuned = adapted_by_hand(base, (pairs[name][0], 1.0))
    state = tuned.unet.state_dict()
    path = tmp_path / "unet"
    if origin == "file":
        path = tmp_path / "unet.safetensors"
        save_file(state, path)
    elif origin == "pickle":
        path = tmp_path / "unet.bin"
        torch.save(state, path)
    elif origin == "folder":
        tuned.unet.save_pretrained(path)
    elif origin == "pipeline":
        tuned.save_pretrained(path)
    else:
        path = tmp_path / "model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in ldm.checkpoint_tensors(tuned).items()}, path)
    tensors = adapters.read_unet(path, base.pipeline()).tensors
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


def test_the_strength_of_a_unet_goes_from_the_base_to_the_tuned_one(bases, pairs, tmp_path):
    base, (one, _) = bases["tiny"], pairs["tiny"]
    tuned = adapted_by_hand(base, (one, 1.0)).unet.state_dict()
    save_file(tuned, tmp_path / "unet.safetensors")
    plain = base.pipeline().unet.state_dict()
    for scale in (0.25, 1.0, 1.5):
        folder = merge(base, tmp_path / str(scale), unet=str(tmp_path / "unet.safetensors"), unet_scale=scale)
        found = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for key in plain:
            torch.testing.assert_close(found[key], plain[key] + scale * (tuned[key] - plain[key]), rtol=0, atol=1e-6)


def test_a_unet_of_others_and_an_adapter_are_merged_and_drawn_alike(bases, pairs, tmp_path):
    """`merge --unet ddpo.safetensors --adapter out`, and `sample` with the same."""
    pipeline = bases["tiny"].pipeline()
    text = write_adapter(tmp_path / "text", pipeline, 1, ("text_encoder",))
    layers = random_layers(pipeline.unet, 3)
    save_file(in_layout("processors", layers, True), tmp_path / "ddpo.safetensors")
    unet = str(tmp_path / "ddpo.safetensors")
    folder = merge(bases["tiny"], tmp_path / "merged", f"{text}:0.8", unet=unet)
    options = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 3.0}
    merged = resolve_sample(SampleConfig(model=str(folder), **options))
    beside = resolve_sample(SampleConfig(model="tiny", adapter=[f"{text}:0.8"], unet=unet, **options))
    drawn = [evaluate.sample(config, PROMPTS, [5, 6]) for config in (merged, beside)]
    torch.testing.assert_close(drawn[0]["base"], drawn[1]["tuned"], rtol=0, atol=1e-4)
    alone = merge(bases["tiny"], tmp_path / "alone", unet=unet)
    assert not torch.equal(draw(read_by_others(bases["tiny"], "pipeline", alone)), bases["tiny"].images)


def test_a_whole_unet_is_drawn_with_and_compared_to_the_base(bases, pairs, tmp_path):
    base, (one, _) = bases["tiny"], pairs["tiny"]
    tuned = adapted_by_hand(base, (one, 1.0))
    save_file(tuned.unet.state_dict(), tmp_path / "unet.safetensors")
    options = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 3.0, "compare": True}
    config = resolve_sample(SampleConfig(model="tiny", unet=str(tmp_path / "unet.safetensors"), **options))
    images = evaluate.sample(config, PROMPTS, [5, 6])
    pipeline = base.pipeline()
    torch.testing.assert_close(images["base"], base.images, rtol=0, atol=1e-4)
    pipeline.unet = tuned.unet
    torch.testing.assert_close(images["tuned"], draw(pipeline), rtol=0, atol=1e-4)


# --- the folder that is written ---


def test_what_is_written_may_be_read_by_whom_the_umask_lets(bases, pairs, tmp_path):
    previous = os.umask(0o027)
    try:
        folder = merge(bases["tiny"], tmp_path / "merged", str(pairs["tiny"][0]))
    finally:
        os.umask(previous)
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_the_card_says_from_what_and_at_which_weights(bases, pairs, tmp_path):
    one, other = pairs["tiny"]
    folder = merge(bases["tiny"], tmp_path / "merged", f"{one}:0.3", str(other), format="peft")
    card = (folder / "README.md").read_text()
    for words in (f"| adapter | `{one}` | 0.3 |", f"| adapter | `{other}` | 1 |", "`peft`", str(models.TINY)):
        assert words in card


def test_an_output_that_exists_is_replaced_only_if_that_is_wanted_and_it_is_ours(bases, pairs, tmp_path):
    output, one = tmp_path / "merged", str(pairs["tiny"][0])
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"output: .* exists; choose another, or give --overwrite"):
        merge(bases["tiny"], output, one, format="peft")
    with pytest.raises(ValueError, match=r"output: .* was not written by texforce merge"):
        merge(bases["tiny"], output, one, format="peft", overwrite=True)
    assert (output / "mine.txt").read_text() == "precious"
    (output / "mine.txt").unlink()
    merge(bases["tiny"], output, one, format="peft", overwrite=True)
    merge(bases["tiny"], output, one, format="kohya", overwrite=True)
    assert {path.name for path in output.iterdir()} == {"README.md", "merged.safetensors", "texforce.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_no_input_is_written_over(bases, pairs, tmp_path):
    one = Path(shutil.copytree(pairs["tiny"][0], tmp_path / "one"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    for output in (one, one / "unet", one / "new", tmp_path):
        with pytest.raises(ValueError, match="must not lie in each other"):
            merge(bases["tiny"], output, str(one), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("failing", ["writing", 1, 2])
def test_a_merge_that_fails_leaves_what_was_there(bases, pairs, tmp_path, monkeypatch, failing):
    """In writing, or in a rename: of what is there out of the way, or of what is new into its place."""
    output = tmp_path / "merged"
    merge(bases["tiny"], output, str(pairs["tiny"][0]), format="peft")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if failing == "writing":
        monkeypatch.setattr(export, "save", fail)
    else:
        original, calls = os.rename, []

        def rename(source, target):
            calls.append(source)
            return fail() if len(calls) == failing else original(source, target)

        monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        merge(bases["tiny"], output, str(pairs["tiny"][1]), format="peft", overwrite=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_when_nothing_can_be_renamed_any_more_the_old_is_not_deleted(bases, pairs, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    merge(bases["tiny"], output, str(pairs["tiny"][0]), format="peft")
    old, original = (output / "adapter_model.safetensors").read_bytes(), os.rename

    def rename(source, target):
        if Path(target) == output:
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        merge(bases["tiny"], output, str(pairs["tiny"][1]), format="peft", overwrite=True)
    assert [path.read_bytes() for path in tmp_path.rglob("adapter_model.safetensors") if path.parent.name == "merged"] == [
        old
    ]


def test_a_trainings_own_folder_keeps_its_permissions(small_run, tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    train.train(TrainConfig(**small_run | {"output_dir": str(tmp_path / "out")}))
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_a_training_leaves_files_that_the_umask_lets_read(small_run, tmp_path):
    train.train(TrainConfig(**small_run | {"output_dir": str(tmp_path / "out")}))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out" / "adapter_model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_the_model_of_the_run_is_the_default(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce.config.default_model", lambda device: "another")
    train.train(TrainConfig(**small_run | {"output_dir": str(tmp_path / "out")}))
    assert resolve_merge(MergeConfig(adapter=[f"{tmp_path / 'out'}:0.5"])).model == "tiny"
    assert resolve_merge(MergeConfig(unet=str(tmp_path / "out"))).model == "tiny"
    unet = str(models.TINY / "unet")  # whose config.json is diffusers'
    assert resolve_merge(MergeConfig(unet=unet)).model == "another"


def test_trained_parts_merged_into_one_pipeline_draw_what_they_draw_side_by_side(small_run, tmp_path):
    options = small_run | {"learning_rate": 0.03, "num_epochs": 2}
    for target in ("text-encoder", "unet"):
        train.train(TrainConfig(**options | {"target": target, "output_dir": str(tmp_path / target)}))
    specs = [str(tmp_path / "text-encoder"), str(tmp_path / "unet")]
    folder = merge(Base("tiny", models.TINY), tmp_path / "merged", *specs)
    config = resolve(TrainConfig(**options))
    drawn = []
    for models in (models.load_model(str(folder)), adapters.load_adapters(models.load_model("tiny"), specs)):
        schedule = sampler.ddim_schedule(models.scheduler, config.num_inference_steps, config.eta)
        denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale)
        drawn.append(train.heldout_images(texforce.Policy(models), denoiser, PROMPTS, config))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)


def test_what_is_merged_is_sampled_as_what_it_was_made_of(small_run, tmp_path):
    options = small_run | {"null_prompt": "base", "guidance_scale": 2.0, "learning_rate": 0.03}
    train.train(TrainConfig(**options | {"output_dir": str(tmp_path / "out")}))
    expected = evaluate.sample(
        resolve_sample(SampleConfig(adapter=[str(tmp_path / "out")], prompt=PROMPTS)), PROMPTS, [5, 6]
    )
    for format in merge.LORA_FORMATS:
        config = MergeConfig(adapter=[str(tmp_path / "out")], output=str(tmp_path / format), format=format)
        config = resolve_sample(SampleConfig(adapter=[str(merge.merge(resolve_merge(config)))], prompt=PROMPTS))
        assert (config.model, config.null_prompt, config.guidance_scale, config.num_inference_steps) == (
            "tiny",
            "base",
            2.0,
            4,
        )
        torch.testing.assert_close(evaluate.sample(config, PROMPTS, [5, 6])["tuned"], expected["tuned"], rtol=0, atol=1e-4)
    config = MergeConfig(adapter=[str(tmp_path / "out")], output=str(tmp_path / "pipeline"))
    config = resolve_sample(SampleConfig(model=str(merge.merge(resolve_merge(config))), prompt=PROMPTS))
    assert (config.model, config.null_prompt) == (str(tmp_path / "pipeline"), "adapted")
    assert (config.guidance_scale, config.num_inference_steps) == (2.0, 4)


# --- what is refused ---


BadFiles = dict[str, tuple[Path, str, int]]  # each with the option that names it and the exit code


def bad_files(folder: Path, pipeline) -> BadFiles:
    """Files and folders that must not get through."""
    text = random_layers(pipeline.text_encoder, 1)
    unet = in_layout("lora.down", random_layers(pipeline.unet, 1), True)
    return {
        **unreadable_files(folder, unet),
        **hostile_files(folder),
        **bad_adapters(folder, text),
        **bad_peft_folders(folder, in_layout("peft", text, False)),
        **bad_unets(folder, pipeline.unet.state_dict(), unet),
        "text encoder as unet": (write_tensors(folder / "text", in_layout("lora_A", text, False)), "unet", 3),
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
        "mistyped path": (folder / "absent", "adapter", 2),
        "mistyped unet": (folder / "absent.safetensors", "unet", 2),
        "empty folder": (folder / "nothing", "adapter", 2),
        "empty folder as unet": (folder / "nothing", "unet", 2),
        "empty file": (write_bytes(folder / "empty.safetensors", b""), "adapter", 3),
        "empty pickle": (write_bytes(folder / "empty.bin", b""), "unet", 3),
        "html": (write_bytes(folder / "page.safetensors", page), "adapter", 3),
        "html pickle": (write_bytes(folder / "page.bin", page), "unet", 3),
        "lfs pointer": (write_bytes(folder / "lfs.safetensors", pointer), "unet", 3),
        "truncated": (write_bytes(folder / "cut.safetensors", whole[: len(whole) // 2]), "unet", 3),
        "truncated by a byte": (write_bytes(folder / "cut1.safetensors", whole[:-1]), "unet", 3),
        "no tensors": (write_tensors(folder / "none", {}), "adapter", 3),
    }


PEFT = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def hostile_files(folder: Path) -> BadFiles:
    hostile, peft = folder / "hostile.bin", folder / "hostile-peft"
    torch.save({"a": Hostile(os.system, f"touch {folder / 'created'}")}, hostile)
    peft.mkdir()
    shutil.copy(hostile, peft / "adapter_model.bin")
    (peft / "adapter_config.json").write_text(json.dumps(PEFT))
    return {
        "pickle with code": (hostile, "adapter", 3),
        "pickle with code as unet": (hostile, "unet", 3),
        "peft pickle with code": (peft, "adapter", 3),
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
    return {name: (path, "adapter", 3) for name, path in files.items()}


def bad_peft_folders(folder: Path, content: dict[str, Tensor]) -> BadFiles:
    good = json.dumps(PEFT)
    configs = {
        "hostile target_modules": json.dumps(PEFT | {"target_modules": r"^(([a-z]+)+\.?)+$"}),
        "hostile alpha_pattern": json.dumps(PEFT | {"alpha_pattern": {r"^(([a-z]+)+\.?)+$": 3}}),
        "configuration no json": "{",
        "configuration nested": "[" * 100_000,
        "another rank": json.dumps(PEFT | {"r": 8}),
        "another method": json.dumps(PEFT | {"peft_type": "LOHA"}),
        "alpha infinite": good.replace("6", "1e999"),
        "rank beyond all bounds": good.replace('"r": 3', '"r": 1' + 400 * "0"),
        "alpha beyond all bounds": good.replace("6", "1" + 400 * "0"),
        "changed base weights": json.dumps(PEFT | {"init_lora_weights": "pissa"}),
    }
    files: BadFiles = {}
    for name, config in configs.items():
        path = folder / name.replace(" ", "-")
        path.mkdir()
        save_file(content, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(config)
        files[name] = (path, "adapter", 3)
    return files


def bad_unets(folder: Path, state: dict[str, Tensor], lora_tensors: dict[str, Tensor]) -> BadFiles:
    sparse = folder / "sparse.bin"
    torch.save({"conv_in.weight": torch.eye(3).to_sparse()}, sparse)
    contents = {
        "zero unet": {k: t * 0 for k, t in lora_tensors.items()},
        "the very same unet": state,
        "the same unet in half precision": {k: t.half() for k, t in state.items()},
        "a unet lacking a tensor": {k: t for k, t in state.items() if k != "conv_out.bias"},
        "a unet of other shapes": state | {"conv_in.weight": torch.ones(8, 4, 3, 3)},
        "a unet with NaN": state | {"conv_out.bias": math.nan * state["conv_out.bias"]},
        "half a checkpoint": {ldm.UNET + "out.2.bias": torch.ones(8)},
    }
    files = {name: write_tensors(folder / name.replace(" ", "-"), content) for name, content in contents.items()}
    return {name: (path, "unet", 3) for name, path in files.items()} | {"a sparse tensor": (sparse, "unet", 3)}


class Hostile:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


EXECUTION = ("os.system", "subprocess.Popen", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo")
EVENTS: list[str] = []
RECORDING = [False]


def audit(event: str, arguments: tuple) -> None:
    if RECORDING[0] and event in (
        "os.system",
        "subprocess.Popen",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "socket.getaddrinfo",
    ):
        EVENTS.append(f"{event} {arguments}")


@pytest.mark.parametrize("command", ["merge", "sample"])
def test_bad_files_are_refused_at_once_with_nothing_run_asked_or_written(bases, tmp_path, command):
    files = bad_files(tmp_path, bases["tiny"].pipeline())
    assert len(files) >= 25
    sys.addaudithook(audit)
    arguments = {"merge": ["--output"], "sample": ["--prompt", "a red circle", "--output-dir"]}[command]
    before = sorted(tmp_path.rglob("*"))
    for name, (path, option, code) in files.items():
        EVENTS.clear()
        RECORDING[0] = True
        start = time.perf_counter()
        try:
            result = CliRunner().invoke(
                cli.app, [command, "--model", "tiny", f"--{option}", str(path), *arguments, str(tmp_path / "written")]
            )
        finally:
            RECORDING[0] = False
        seconds = time.perf_counter() - start
        assert result.exit_code == code, (name, result.exit_code, result.output, repr(result.exception))
        assert "Traceback" not in result.output, name
        assert (
            re.sub(r"[\s]", "", path.name) in re.sub(r"[\s]", "", result.output) or "all zero" in name or name == "zero unet"
        ), (name, result.output)
        assert EVENTS == [], (name, EVENTS)
        assert seconds < 2, (name, seconds)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "words"), [
    ([], ["nothing to merge", "--adapter", "--unet"]),
    (["--adapter", "ADAPTER", "--format", "onnx"], ["format", "pipeline, checkpoint, peft, diffusers, kohya"]),
    (["--adapter", "ADAPTER:nan"], ["weight", "finite"]),
    (["--adapter", "ADAPTER:0"], ["weights of 0"]),
    (["--adapter", "ADAPTER:1e39"], ["not finite"]),
    (["--adapter", "ADAPTER", "--unet-scale", "0.5"], ["unet_scale", "--unet"]),
    (["--adapter", "ADAPTER", "--output", "."], ["output"]),
    (["--adapter", "ADAPTER", "--output", ""], ["output"]),
    (["--adapter", "ADAPTER", "--unet", "UNET", "--format", "kohya"], ["format", "whole U-Net", "use pipeline"]),
    (["--unet", "UNET", "--unet-scale", "nan"], ["unet_scale"]),
    (["--unet", "UNET", "--unet-scale", "0"], ["nothing is merged"]),
    (["--adapter", "ADAPTER", "--model", "nobody/no-such-model"], ["nobody/no-such-model"]),
])  # fmt: skip
def test_bad_input_to_merge_is_named(bases, pairs, tmp_path, arguments, words):
    tuned = adapted_by_hand(bases["tiny"], (pairs["tiny"][0], 1.0))
    save_file(tuned.unet.state_dict(), tmp_path / "unet.safetensors")
    named = {"ADAPTER": str(pairs["tiny"][0]), "UNET": str(tmp_path / "unet.safetensors")}
    arguments = [re.sub("ADAPTER|UNET", lambda match: named[match[0]], argument) for argument in arguments]
    defaults = ["--output", str(tmp_path / "out")] if "--output" not in arguments else []
    defaults += ["--model", "tiny"] if "--model" not in arguments else []
    result = CliRunner().invoke(cli.app, ["merge", *arguments, *defaults], env={"COLUMNS": "1000"})
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
