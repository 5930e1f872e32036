"""`texforce merge`: others read what it writes as it was meant, and it reads its own formats back."""

import copy
import functools
import json
import os
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from texforce import adapters, evaluation, files, ldm, lora_files, merging, models, tokenization, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import (
    MergeOptions,
    SampleOptions,
    System,
    resolve_merge,
    resolve_sample,
)
from texforce.errors import ArtifactError, InputError
from texforce.lora_files import Layer

from .commands import invoke
from .small_models import attention_names, random_layers, save_stable_diffusion, save_stable_diffusion_xl

PROMPTS = ["a crimson disc", "two blue squares"]


# --- pipelines and adapters to merge ---


def write_adapter(folder: Path, models, seed: int, parts=("text_encoder", "unet"), **options) -> Path:
    """An adapter in the layout of this project's trainings, as plain peft writes it."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    for part in parts:
        module = getattr(models, part)
        layers = lora_files.named_as_in(module, random_layers(module, seed, **options))
        rank, alpha = (getattr(next(iter(layers.values())), name) for name in ("rank", "alpha"))
        kinds = ["to_q", "to_k", "to_v", "to_out.0"] if part == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        adapted = get_peft_model(copy.deepcopy(module), LoraConfig(r=rank, lora_alpha=alpha, target_modules=kinds))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in lora_files.lora_tensors(layers).items()}
        set_peft_model_state_dict(adapted, tensors)
        adapted.save_pretrained(folder if part == "text_encoder" else folder / part, save_embedding_layers=False)
    return folder


class Base:
    """A pipeline's folder, and the pipeline in it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.parts = ("text_encoder", "text_encoder_2", "unet") if name == "sdxl" else ("text_encoder", "unet")
        self.loaded = quiet(merging.load_pipeline(str(folder)))
        self.latents = draw(self.loaded)

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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The base of a name."""
    folder = tmp_path_factory.mktemp("bases")
    save = {
        "tiny": lambda: models.TINY,
        "sd15": lambda: save_stable_diffusion(folder / "sd15", 1),
        "sd21": lambda: save_stable_diffusion(folder / "sd21", 2),
        "sdxl": lambda: save_stable_diffusion_xl(folder / "sdxl"),
    }
    return functools.cache(lambda name: Base(name, save[name]()))


@pytest.fixture(scope="module")
def pairs(bases, tmp_path_factory):
    """Two adapters of the base of a name, of other ranks and alphas."""
    folder = tmp_path_factory.mktemp("adapters")

    def write(name: str) -> tuple[Path, Path]:
        base = bases(name)
        return (
            write_adapter(folder / f"{name}-1", base.loaded, 1, base.parts, rank=3, alpha=6.0),
            write_adapter(folder / f"{name}-2", base.loaded, 2, base.parts, rank=2, alpha=1.0),
        )

    return functools.cache(write)


def draw(pipeline, output_type: str = "latent") -> Tensor:
    """Latents, or images, of plain diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0, "output_type": output_type}
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


def merge_into(base: Base, output: Path, *specs: str, **options) -> Path:
    config = MergeOptions(adapter=list(specs) or None, model=str(base.folder), output_dir=str(output), **options)
    return merging.merge(resolve_merge(config))


@pytest.fixture(scope="module")
def fused(bases, pairs):
    """The pipeline of a name with 0.7 times one adapter and -0.4 times the other, added by hand, and what it draws."""

    def fuse(name: str):
        one, other = pairs(name)
        pipeline = adapted_by_hand(bases(name), (one, 0.7), (other, -0.4))
        return pipeline, draw(pipeline)

    return functools.cache(fuse)


@pytest.fixture(scope="module")
def merged(bases, pairs, tmp_path_factory):
    """The folder that this project wrote for a base model's name and a format."""

    def write(name: str, format: str) -> Path:
        one, other = pairs(name)
        output = tmp_path_factory.mktemp("fused") / "merged"
        return merge_into(bases(name), output, f"{one}:0.7", f"{other}:-0.4", format=format)

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
# The single file of Stable Diffusion 2.1 has a layout of its own; the other formats are those of 1.5.
CASES = [("sd15", format) for format in FORMATS]
CASES += [pytest.param("sdxl", format, marks=pytest.mark.slow) for format in FORMATS]
CASES += [pytest.param("sd21", format, marks=pytest.mark.slow) for format in ("checkpoint", "kohya")]


@pytest.mark.parametrize(("name", "format"), CASES)
@pytest.mark.quick(1)
def test_others_draw_the_same_images_from_every_format(bases, fused, merged, name, format):
    pipeline, expected = read_by_others(bases(name), format, merged(name, format)), fused(name)[1]
    assert (expected - bases(name).latents).abs().max() > 0.05
    torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=5e-4)
    state = bases(name).loaded.vae.state_dict()
    assert pipeline.vae.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in pipeline.vae.state_dict().items())


@pytest.mark.slow
def test_a_single_adapter_keeps_its_alpha_in_every_format_of_lora(bases, pairs, tmp_path):
    base, (one, _) = bases("tiny"), pairs("tiny")
    expected = draw(adapted_by_hand(base, (one, 1.0)))
    for format in merging.LORA_FORMATS:
        folder = merge_into(base, tmp_path / format, str(one), format=format)
        torch.testing.assert_close(draw(read_by_others(base, format, folder)), expected, rtol=0, atol=5e-4)
    tensors = load_file(tmp_path / "kohya" / "kohya.safetensors")
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {6.0}


@pytest.mark.quick(2)
@pytest.mark.parametrize(("name", "format"), CASES)
def test_this_project_reads_every_format_back(bases, fused, merged, name, format):
    base, expected, folder = bases(name), fused(name)[0], merged(name, format)
    if format in merging.FULL_FORMATS:
        source = folder if format == "pipeline" else folder / "merged.safetensors"
        tensors = adapters.read_unet(source, base.pipeline()).tensors
        for key, tensor in expected.unet.state_dict().items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-6)
        return
    source = folder / "merged.safetensors" if format == "kohya" else folder
    pipeline = base.pipeline()
    adapter = lora_files.read_adapter(source, pipeline)
    assert set(adapter) == set(base.parts)
    for part, layers in adapter.items():
        adapters.bake(getattr(pipeline, part), layers)
        found = getattr(pipeline, part).state_dict()
        for key, tensor in getattr(expected, part).state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


def test_diffusers_keys_hold_the_level_that_comfyui_looks_for(bases, pairs, tmp_path):
    """ComfyUI, comfy/lora.py (model_lora_keys_clip): `text_encoder.text_model.encoder.layers.{}.{}` and nothing shorter."""
    folder = merge_into(bases("sd15"), tmp_path / "merged", str(pairs("sd15")[0]), format="diffusers")
    keys = {key for key in load_file(folder / "pytorch_lora_weights.safetensors") if key.startswith("text_encoder.")}
    kinds = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
    names = [f"text_encoder.text_model.encoder.layers.{n}.{kind}" for n in range(4) for kind in kinds]
    assert keys == {f"{name}.lora_{matrix}.weight" for name in names for matrix in "AB"}


@pytest.mark.slow
def test_kohyas_keys_are_those_that_a1111_and_comfyui_look_up(bases, pairs, tmp_path):
    """ComfyUI, comfy/lora.py: `lora_te_text_model_encoder_layers_{}_{}`, XL `lora_te1_...` and `lora_te2_...`, each with
    `.lora_up.weight`, `.lora_down.weight` and `.alpha`. AUTOMATIC1111, extensions-builtin/Lora/networks.py: the same for
    text, `lora_unet_down_blocks_(d)_attentions_(d)_(.+)` and its likes for the U-Net."""
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    kinds = [f"self_attn_{letter}_proj" for letter in ("q", "k", "v", "out")]
    for name, prefixes in (
        ("sd15", {"lora_te_": 4}),
        ("sd21", {"lora_te_": 5}),
        ("sdxl", {"lora_te1_": 3, "lora_te2_": 4}),
    ):
        folder = merge_into(bases(name), tmp_path / name, str(pairs(name)[0]), format="kohya")
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
        assert len(keys - expected) == 3 * len(attention_names(bases(name).pipeline().unet))


@pytest.mark.quick(1)
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_writing_lora_reads_weights_of_text_encoders_alone(bases, pairs, merged, tmp_path, format):
    folder = shutil.copytree(bases("sd15").folder, tmp_path / "model")
    for file in (*folder.glob("unet/*.safetensors"), *folder.glob("vae/*.safetensors")):
        file.unlink()
    base, (one, other) = SimpleNamespace(folder=folder), pairs("sd15")  # they have LoRA of the U-Net too
    written = merge_into(base, tmp_path / "merged", f"{one}:0.7", f"{other}:-0.4", format=format)
    for file in merged("sd15", format).rglob("*.safetensors"):
        found, expected = load_file(written / file.relative_to(merged("sd15", format))), load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_lora_with_another_unet_is_compared_with_the_weights_of_the_models_own(bases, pairs, tmp_path):
    own = bases("sd15").folder / "unet"
    with pytest.raises(ArtifactError, match="it is this very U-Net"):
        merge_into(bases("sd15"), tmp_path / "merged", str(pairs("sd15")[0]), unet=str(own), format="kohya")


def test_kohyas_metadata_say_what_it_is(bases, pairs, tmp_path):
    folder = merge_into(bases("sd15"), tmp_path / "mine", str(pairs("sd15")[0]), format="kohya")
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
    assert merging.architecture_of(models) == (base, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_locon_of_all_layers_makes_the_round_trip(bases, tmp_path, name):
    """kohya's with convolutions, ff, proj_in and proj_out, in half precision, alphas included."""
    base, generator = bases(name), torch.Generator().manual_seed(0)
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
    assert found.keys() == layers.keys()
    for key, layer in layers.items():
        assert torch.equal(found[key].down, layer.down)
        assert torch.equal(found[key].up, layer.up)
        assert found[key].alpha == layer.alpha
    expected = copy.deepcopy(pipeline.unet)
    for key, layer in layers.items():
        expected.get_submodule(key).weight.data += layer.delta()
    for format in ("kohya",) if name == "sd15" else ("kohya", "pipeline"):
        folder = merge_into(base, tmp_path / format, unet=str(tmp_path / "locon.safetensors"), format=format)
        again = base.pipeline()
        if format == "kohya":
            adapters.bake(again.unet, adapters.read_unet(folder, again).adapter["unet"])
        else:
            again = read_by_others(base, format, folder)
        found = again.unet.state_dict()
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_strength_of_a_unet_goes_from_the_base_to_the_tuned_one(bases, pairs, tmp_path):
    base, (one, _) = bases("tiny"), pairs("tiny")
    tuned = adapted_by_hand(base, (one, 1.0)).unet.state_dict()
    save_file(tuned, tmp_path / "unet.safetensors")
    plain = base.pipeline().unet.state_dict()
    for scale in (1.0, 1.5):
        folder = merge_into(base, tmp_path / str(scale), unet=str(tmp_path / "unet.safetensors"), unet_strength=scale)
        found = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for key in plain:
            torch.testing.assert_close(found[key], plain[key] + scale * (tuned[key] - plain[key]), rtol=0, atol=1e-6)


def test_a_unet_of_others_and_an_adapter_are_merged_and_drawn_alike(bases, pairs, tmp_path):
    """`merge --unet ddpo.safetensors --adapter out`, and `sample` with the same."""
    pipeline = bases("tiny").pipeline()
    text = write_adapter(tmp_path / "text", pipeline, 1, ("text_encoder",))
    layers = random_layers(pipeline.unet, 3)
    tensors = {f"unet.{name}": tensor for name, tensor in lora_files.lora_tensors(layers).items()}
    save_file(tensors, tmp_path / "ddpo.safetensors")
    unet = str(tmp_path / "ddpo.safetensors")
    folder = merge_into(bases("tiny"), tmp_path / "merged", f"{text}:0.8", unet=unet)
    options = {"prompt": PROMPTS, "num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0}
    merged = resolve_sample(SampleOptions(model=str(folder), **options))
    beside = resolve_sample(SampleOptions(model="tiny", adapter=[f"{text}:0.8"], unet=unet, **options))
    drawn = [evaluation.sample(config, PROMPTS, [5, 6]) for config in (merged, beside)]
    torch.testing.assert_close(drawn[0]["base"], drawn[1]["tuned"], rtol=0, atol=1e-4)
    alone = merge_into(bases("tiny"), tmp_path / "alone", unet=unet)
    assert not torch.equal(draw(read_by_others(bases("tiny"), "pipeline", alone)), bases("tiny").latents)


# --- names are the modules', and what was written is read back ---


def projection_file(pipeline, folder: Path, attentions: bool) -> tuple[Path, Tensor]:
    """kohya's file of LoRA on the second text encoder's projection, and perhaps its attentions, and the texts with it."""
    tensors, tuned = {}, copy.deepcopy(pipeline.text_encoder_2)
    layers = random_layers(pipeline.text_encoder_2, 5) if attentions else {}
    weight = pipeline.text_encoder_2.text_projection.weight
    layers["text_projection"] = Layer(torch.randn(3, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 3), 6.0)
    adapters.bake(tuned, layers)
    for name, layer in layers.items():
        full = "lora_te2_" + (name if name == "text_projection" else f"text_model_{name}".replace(".", "_"))
        tensors |= {f"{full}.lora_down.weight": layer.down, f"{full}.lora_up.weight": layer.up}
        tensors[f"{full}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", texts(type(pipeline)(**pipeline.components | {"text_encoder_2": tuned}))


def texts(pipeline) -> Tensor:
    """The prompts' embeddings and pooled text by plain diffusers, as `models.encode` gives them."""
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1)
    pooled = torch.nn.functional.pad(pooled, (0, embeds.shape[-1] - pooled.shape[-1]))
    return torch.cat([embeds, pooled[:, None]], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("attentions", [True, False], ids=["with the attentions", "also alone"])
def test_lora_on_sdxls_text_projection_is_the_same_in_every_format_and_in_sampling(bases, tmp_path, attentions):
    base = bases("sdxl")
    path, expected = projection_file(base.loaded, tmp_path, attentions)
    assert (expected - texts(base.loaded)).abs().max() > 0.1
    model = models.load_model(str(base.folder))
    tuned = adapters.put_on(model, System("tuned", ((str(path), 1.0),)))
    with torch.no_grad():
        found = models.encode(tuned, models.tokenize_for(model, PROMPTS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for format in FORMATS:
        folder = merge_into(base, tmp_path / format, str(path), format=format)
        if format in ("diffusers", "kohya") and not attentions:  # diffusers knows its own files by the attentions
            continue
        pipeline = base.pipeline()
        if format == "peft":
            from peft import PeftModel

            pipeline.text_encoder_2 = PeftModel.from_pretrained(pipeline.text_encoder_2, folder / "text_encoder_2")
        else:
            pipeline = read_by_others(base, format, folder)
        torch.testing.assert_close(texts(pipeline), expected, rtol=1e-5, atol=1e-4)


def wrong_names(module, layers):
    return {f"text_model.model.{name}": layer for name, layer in layers.items()}


def lost_layers(layers):
    return dict(list(lora_files.lora_tensors(layers).items())[2:])


WRONG_WRITING = {
    "kohya": ("named_as_published", wrong_names), "diffusers": ("named_as_published", wrong_names),
    "peft": ("named_as_in", wrong_names), "also lost layers": ("lora_tensors", lost_layers),
    "also a baked pipeline that is none": ("_bake", None), "also a checkpoint that loses a tensor": ("save", None),
}  # fmt: skip


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", WRONG_WRITING)
def test_what_is_not_written_as_it_was_merged_is_no_merge(bases, pairs, tmp_path, monkeypatch, kind):
    name, function = WRONG_WRITING[kind]
    format = {"lora_tensors": "peft", "_bake": "pipeline", "save": "checkpoint"}.get(name, kind)
    original = getattr(merging, name)
    if name == "save":

        def function(tensors, path, metadata):
            original({key: tensor for key, tensor in tensors.items() if key != min(tensors)}, path, metadata)

    elif name == "_bake":
        monkeypatch.setattr(type(bases("tiny").loaded), "save_pretrained", lambda self, folder: shutil.copytree(
            bases("tiny").folder, folder, dirs_exist_ok=True
        ))  # fmt: skip
    if function:
        monkeypatch.setattr(merging, name, function)
    with pytest.raises(ArtifactError, match=r"not written as they were merged|belongs to no layer|missing|lacks"):
        merge_into(bases("tiny"), tmp_path / "merged", str(pairs("tiny")[0]), format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("format", merging.LORA_FORMATS)
def test_lora_on_some_layers_is_written_and_read_back(bases, tmp_path, format):
    from peft import LoraConfig, get_peft_model

    base = bases("tiny")
    config = LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base.loaded.text_encoder), config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    folder = merge_into(base, tmp_path / "merged", str(tmp_path / "adapter"), format=format)
    ids = tokenization.tokenize(base.loaded.tokenizer, PROMPTS)
    tuned = adapters.put_on(models.load_model("tiny"), System("tuned", ((str(folder), 1.0),)))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(models.encode(tuned, ids), expected, rtol=1e-5, atol=1e-5)


def test_parts_without_a_single_file_layout_are_refused_by_name():
    with pytest.raises(InputError, match=r"a text encoder with encoder\.layers\.0\.gate\.weight has no single-file layout"):
        ldm.open_clip_tensors({"encoder.layers.0.gate.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"a text encoder with head\.bias has no single-file layout"):
        ldm.open_clip_tensors({"head.bias": torch.ones(1)})
    with pytest.raises(InputError, match=r"a VAE with encoder\.down_blocks\.0\.attentions\.0\.to_q\.weight has no"):
        ldm.vae_name("encoder.down_blocks.0.attentions.0.to_q.weight", 4)


# --- the safety checker ---


@pytest.mark.quick(1)
@pytest.mark.parametrize("format", [*merging.LORA_FORMATS, "checkpoint", "pipeline"])
def test_only_a_whole_pipeline_is_written_with_the_safety_checker(bases, pairs, tmp_path, format):
    folder = Path(shutil.copytree(models.TINY, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    options = MergeOptions(
        adapter=[str(pairs("tiny")[0])], model=str(folder), output_dir=str(tmp_path / "merged"), format=format
    )
    if format == "pipeline":
        with pytest.raises(InputError, match=f"the safety_checker could not be loaded: .* '{folder / 'safety_checker'}'"):
            merging.merge(resolve_merge(options))
        return
    merged = merging.merge(resolve_merge(options))
    expected = adapted_by_hand(bases("tiny"), (pairs("tiny")[0], 1.0))
    torch.testing.assert_close(draw(read_by_others(bases("tiny"), format, merged)), draw(expected), rtol=0, atol=5e-4)


# --- the folder that is written ---


def test_what_is_written_may_be_read_by_whom_the_umask_lets(bases, pairs, tmp_path):
    previous = os.umask(0o027)
    try:
        folder = merge_into(bases("tiny"), tmp_path / "merged", str(pairs("tiny")[0]))
    finally:
        os.umask(previous)
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_the_card_says_from_what_and_at_which_weights(bases, pairs, tmp_path):
    one, other = pairs("tiny")
    folder = merge_into(bases("tiny"), tmp_path / "merged", f"{one}:0.3", str(other), format="peft")
    card = (folder / "README.md").read_text()
    for words in (f"| adapter | `{one}` | 0.3 |", f"| adapter | `{other}` | 1 |", "`peft`", str(models.TINY)):
        assert words in card


@pytest.mark.parametrize("format", merging.WRITERS)
def test_the_card_says_how_to_use_it(bases, merged, format):
    folder = merged("tiny", format)
    card = (folder / "README.md").read_text()
    files_named = re.findall(r"`([\w-]+\.safetensors)`", card)
    assert files_named or f'"{folder.name}")`' in card
    assert all((folder / name).is_file() for name in files_named)


def test_an_output_that_exists_is_replaced_only_if_that_is_wanted_and_it_is_ours(bases, pairs, tmp_path):
    output, one = tmp_path / "merged", str(pairs("tiny")[0])
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"output_dir: .* exists; choose another, or give --overwrite"):
        merge_into(bases("tiny"), output, one, format="peft")
    with pytest.raises(InputError, match=r"output_dir: .* holds no texforce-merge.json"):
        merge_into(bases("tiny"), output, one, format="peft", overwrite=True)
    assert (output / "mine.txt").read_text() == "precious"
    (output / "mine.txt").unlink()
    merge_into(bases("tiny"), output, one, format="peft", overwrite=True)
    merge_into(bases("tiny"), output, one, format="kohya", overwrite=True)
    names = {"README.md", "merged.safetensors", "texforce.json", "texforce-merge.json"}
    assert {path.name for path in output.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.fixture(scope="module")
def written(bases, pairs, tmp_path_factory) -> Path:
    """What `merge` wrote. Do not change it."""
    return merge_into(bases("tiny"), tmp_path_factory.mktemp("written") / "merged", str(pairs("tiny")[0]), format="peft")


def test_what_merge_wrote_is_listed_with_its_sums(written):
    listed = json.loads((written / merging.WRITTEN).read_text())
    there = {path.relative_to(written).as_posix(): path for path in written.rglob("*") if path.is_file()}
    assert "unet/adapter_model.safetensors" in listed
    assert listed == {name: files.sha256(path) for name, path in there.items() if name != merging.WRITTEN}


FOREIGN = {
    "a card with our words": lambda output: (output / merging.WRITTEN).unlink(),
    "also a file of somebody else": lambda output: (output / "unet" / "notes.txt").write_text("mine"),
    "also a hidden folder": lambda output: (output / ".git").mkdir(),
    "also a card that was edited": lambda output: (output / "README.md").write_text("Merged by texforce, and mine"),
    "also a link": lambda output: (
        (output / "texforce.json").rename(output.parent / "t") and (output / "texforce.json").symlink_to(output.parent / "t")
    ),
    "also a list of other words": lambda output: (output / merging.WRITTEN).write_text("{}"),
    "also a list that is none": lambda output: (output / merging.WRITTEN).write_text("[]"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_holds_something_else_is_not_overwritten(bases, pairs, written, tmp_path, case):
    output, one = Path(shutil.copytree(written, tmp_path / "merged")), str(pairs("tiny")[0])
    FOREIGN[case](output)
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    with pytest.raises(
        InputError, match=r"not written by texforce merge|holds no texforce-merge.json|must hold a JSON object"
    ):
        merge_into(bases("tiny"), output, one, format="peft", overwrite=True)
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


def test_what_somebody_writes_while_a_merge_runs_is_not_overwritten(bases, pairs, written, tmp_path, monkeypatch):
    output, one = Path(shutil.copytree(written, tmp_path / "merged")), str(pairs("tiny")[0])
    write_peft = merging.WRITERS["peft"]
    monkeypatch.setitem(
        merging.WRITERS, "peft", lambda *given: (write_peft(*given), (output / "notes.txt").write_text("mine"))
    )
    with pytest.raises(InputError, match=r"notes\.txt' was not written by texforce merge"):
        merge_into(bases("tiny"), output, one, format="peft", overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["a merge", "also an empty folder", "also nothing"])
def test_a_link_as_the_output_stays_one(bases, pairs, written, tmp_path, target):
    real, link, one = tmp_path / "real", tmp_path / "merged", str(pairs("tiny")[0])
    if target == "a merge":
        shutil.copytree(written, real)
    elif target == "also an empty folder":
        real.mkdir()
    link.symlink_to(real)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"merged' is a link, which is not replaced"):
        merge_into(bases("tiny"), link, one, format="peft", overwrite=True)
    assert link.is_symlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_no_input_is_written_over(bases, pairs, tmp_path):
    one = Path(shutil.copytree(pairs("tiny")[0], tmp_path / "one"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    for output in (one, one / "unet", one / "new", tmp_path):
        with pytest.raises(InputError, match="must not lie in each other"):
            merge_into(bases("tiny"), output, str(one), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.quick(1)
@pytest.mark.parametrize("failing", ["writing", 1, 2])
def test_a_merge_that_fails_leaves_what_was_there(bases, pairs, tmp_path, monkeypatch, failing):
    """In writing, or in a rename: of what is there out of the way, or of what is new into its place."""
    output = tmp_path / "merged"
    merge_into(bases("tiny"), output, str(pairs("tiny")[0]), format="peft")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if failing == "writing":
        monkeypatch.setattr(merging, "save", fail)
    else:
        original, calls = os.rename, []

        def rename(source, target):
            calls.append(source)
            return fail() if len(calls) == failing else original(source, target)

        monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        merge_into(bases("tiny"), output, str(pairs("tiny")[1]), format="peft", overwrite=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_when_nothing_can_be_renamed_any_more_the_old_is_not_deleted(bases, pairs, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    merge_into(bases("tiny"), output, str(pairs("tiny")[0]), format="peft")
    old, original = (output / "adapter_model.safetensors").read_bytes(), os.rename

    def rename(source, target):
        if Path(target) == output:
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        merge_into(bases("tiny"), output, str(pairs("tiny")[1]), format="peft", overwrite=True)
    assert [path.read_bytes() for path in tmp_path.rglob("adapter_model.safetensors") if path.parent.name == "merged"] == [
        old
    ]


@pytest.fixture(scope="module")
def trained(shared_run, tmp_path_factory) -> Path:
    """A folder with a training each of the text encoder and of the U-Net."""
    folder = tmp_path_factory.mktemp("trained")
    options = shared_run | {"guidance_scale": 2.0, "learning_rate": 0.03}
    for target, null_prompt in (("text-encoder", "base"), ("unet", "adapted")):
        own = {"target": target, "null_prompt": null_prompt, "output_dir": str(folder / target)}
        training.train(resolve(TrainOptions(**options | own)))
    return folder


def test_the_model_of_the_run_is_the_default(trained, monkeypatch):
    monkeypatch.setattr("texforce.draw_config.default_model", lambda device: "another")
    assert resolve_merge(MergeOptions(adapter=[f"{trained / 'text-encoder'}:0.5"])).model == "tiny"
    assert resolve_merge(MergeOptions(unet=str(trained / "unet"))).model == "tiny"
    unet = str(models.TINY / "unet")  # whose config.json is diffusers'
    assert resolve_merge(MergeOptions(unet=unet)).model == "another"


def sample(**options) -> dict[str, Tensor]:
    config = resolve_sample(SampleOptions(prompt=PROMPTS, **options))
    return evaluation.sample(config, PROMPTS, [5, 6])


@pytest.mark.slow
def test_trained_parts_merged_into_one_pipeline_draw_what_they_draw_side_by_side(bases, trained, tmp_path):
    specs = [str(trained / "text-encoder"), str(trained / "unet")]
    folder = merge_into(bases("tiny"), tmp_path / "merged", *specs)
    merged = sample(model=str(folder), null_prompt="adapted")["base"]
    beside = sample(adapter=specs, null_prompt="adapted")["tuned"]
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_what_is_merged_is_sampled_as_what_it_was_made_of(trained, tmp_path):
    adapter = str(trained / "text-encoder")
    expected = sample(adapter=[adapter])["tuned"]
    for format in merging.LORA_FORMATS:
        config = MergeOptions(adapter=[adapter], output_dir=str(tmp_path / format), format=format)
        config = resolve_sample(SampleOptions(adapter=[str(merging.merge(resolve_merge(config)))], prompt=PROMPTS))
        settings = (config.model, config.null_prompt, config.guidance_scale, config.num_inference_steps)
        assert settings == ("tiny", "base", 2.0, 4)
        torch.testing.assert_close(evaluation.sample(config, PROMPTS, [5, 6])["tuned"], expected, rtol=0, atol=1e-4)
    config = MergeOptions(adapter=[adapter], output_dir=str(tmp_path / "pipeline"))
    config = resolve_sample(SampleOptions(model=str(merging.merge(resolve_merge(config))), prompt=PROMPTS))
    assert (config.model, config.null_prompt) == (str(tmp_path / "pipeline"), "adapted")
    assert (config.guidance_scale, config.num_inference_steps) == (2.0, 4)


@pytest.mark.slow
def test_what_is_merged_is_sampled_by_the_sampler_of_the_run(trained, tmp_path):
    adapter = Path(shutil.copytree(trained / "text-encoder", tmp_path / "adapter"))
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"sampler": "dpm-solver", "eta": 0.0}))
    for format, name in (("peft", "adapter"), ("pipeline", "model")):
        options = MergeOptions(adapter=[str(adapter)], output_dir=str(tmp_path / format), format=format)
        place = str(merging.merge(resolve_merge(options)))
        given = {"prompt": PROMPTS, name: [place] if name == "adapter" else place}
        config = resolve_sample(SampleOptions(**given))
        assert (config.sampler, config.eta, config.num_inference_steps) == ("dpm-solver", 0.0, 4)
        config = resolve_sample(SampleOptions(**given, sampler="ddim"))
        assert (config.sampler, config.eta, config.num_inference_steps) == ("ddim", 1.0, 4)


# --- what is refused ---


@pytest.mark.quick(6)
@pytest.mark.parametrize(("arguments", "words"), [
    ([], ["nothing to merge", "--adapter", "--unet"]),
    (["--adapter", "ADAPTER", "--format", "onnx"], ["format", "pipeline, checkpoint, peft, diffusers, kohya"]),
    (["--adapter", "ADAPTER:nan"], ["weight", "finite"]),
    (["--adapter", "ADAPTER:0"], ["weights of 0"]),
    (["--adapter", "ADAPTER:1e39"], ["not finite"]),
    (["--adapter", "ADAPTER", "--unet-strength", "0.5"], ["--unet-strength", "--unet"]),
    (["--adapter", "ADAPTER", "--output-dir", "."], ["output"]),
    (["--adapter", "ADAPTER", "--output-dir", ""], ["output"]),
    (["--adapter", "ADAPTER", "--unet", "UNET", "--format", "kohya"], ["format", "whole U-Net", "use pipeline"]),
    (["--unet", "UNET", "--unet-strength", "nan"], ["--unet-strength"]),
    (["--unet", "UNET", "--unet-strength", "0"], ["nothing is merged"]),
    (["--adapter", "ADAPTER", "--model", "nobody/no-such-model"], ["nobody/no-such-model"]),
])  # fmt: skip
def test_bad_input_to_merge_is_named(bases, pairs, tmp_path, arguments, words):
    tuned = adapted_by_hand(bases("tiny"), (pairs("tiny")[0], 1.0))
    save_file(tuned.unet.state_dict(), tmp_path / "unet.safetensors")
    named = {"ADAPTER": str(pairs("tiny")[0]), "UNET": str(tmp_path / "unet.safetensors")}
    arguments = [re.sub("ADAPTER|UNET", lambda match: named[match[0]], argument) for argument in arguments]
    defaults = ["--output-dir", str(tmp_path / "out")] if "--output-dir" not in arguments else []
    defaults += ["--model", "tiny"] if "--model" not in arguments else []
    result = invoke("merge", *arguments, *defaults)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
