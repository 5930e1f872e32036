"""Weights out: `texforce merge` joins adapters and U-Nets with a base model and writes them in the formats others load."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import texforce
from texforce import adapters, ldm, pipelines, record
from texforce.adapters import lora_config, lora_tensors, named_as_in
from texforce.config_inference import SETTINGS, MergeConfig, parse_weighted, sampling_settings
from texforce.lora import Adapter, Layer

LORA_FORMATS = ("peft", "diffusers", "kohya")
FULL_FORMATS = ("pipeline", "checkpoint")
ARCHITECTURES = {  # kohya's base model and modelspec's architecture, by the width of the text that the U-Net takes
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


@dataclass(frozen=True)
class Merged:
    """What was merged: an adapter, and a pipeline, whose U-Net is already replaced where one was given whole."""

    models: Any  # a diffusers pipeline
    adapter: Adapter
    config: MergeConfig


def merge(config: MergeConfig) -> Path:
    """Merge by a resolved configuration; returns the folder that was written.

    Raises:
        FileNotFoundError, ValueError: bad input. ArtifactError: a refused file. OSError: storage.
    """
    output = Path(config.output)
    check_output(config)
    system = config.systems[0]
    adapters.check_inputs(system)
    models = load_pipeline(config.model)
    terms = adapters.read_terms(system.adapters, models)
    whole_unet = False
    if config.unet:
        unet = adapters.read_unet(config.unet, models)
        terms.append((unet.adapter, config.unet_scale))
        whole_unet = bool(unet.tensors) and config.unet_scale != 0
        if unet.tensors and config.format in LORA_FORMATS:
            raise ValueError(f"format: {config.unet!r} is a whole U-Net, which {config.format} cannot hold; use pipeline")
        if whole_unet:
            adapters.move_towards(models.unet, unet.tensors, config.unet_scale)
    adapter = adapters.fuse(terms)
    if not adapter and not whole_unet:
        raise ValueError("adapter: with weights of 0 nothing is merged")
    check_sum(models, adapter)
    with written_folder(output, config.overwrite) as folder:
        WRITERS[config.format](Merged(models, adapter, config), folder)
        (folder / "README.md").write_text(model_card(config, adapter))
        baked = ("model", "null_prompt") if config.format in FULL_FORMATS else ()
        settings = sampling_settings(config) | {"model": config.model}
        record.write_json(folder / SETTINGS, {name: settings[name] for name in settings if name not in baked})
    return output


def check_sum(models: Any, adapter: Adapter) -> None:
    """See that a fusion is finite, and changes what the text encoders say.

    Raises:
        ValueError: it is not finite. ArtifactError: it changes nothing.
    """
    for layers in adapter.values():
        for name, layer in layers.items():
            if not layer.delta().isfinite().all():
                raise ValueError(f"adapter: with these weights the change of {name} is not finite; lower them")
    adapters.check_embeddings(models, adapter)


def check_output(config: MergeConfig) -> None:
    """See that the output can be written, and that no input lies in it or it in an input.

    Raises:
        ValueError: it exists, or is an input. OSError: it cannot be written.
    """
    output = Path(config.output).resolve()
    system = config.systems[0]
    inputs = [path for path, _ in (*system.adapters, *system.unets)] + [config.model]
    for path in (Path(name).resolve() for name in inputs if Path(name).exists()):
        if output == path or output in path.parents or path in output.parents:
            raise ValueError(f"output: {config.output!r} and the input {str(path)!r} must not lie in each other")
    if output.exists() and not config.overwrite:
        raise ValueError(f"output: {config.output!r} exists; choose another, or give --overwrite")
    if output.exists() and not _is_ours(output):
        raise ValueError(f"output: {config.output!r} was not written by texforce merge; it is not overwritten")
    record.check_writable(output.parent)


def _is_ours(output: Path) -> bool:
    """Whether a folder is empty, or one that `merge` wrote."""
    card = output / "README.md"
    return output.is_dir() and (not any(output.iterdir()) or (card.is_file() and CARD in card.read_text(errors="replace")))


def load_pipeline(name: str) -> Any:
    """A Stable Diffusion 1.x, 2.x or XL pipeline of diffusers, none of its tensors missing, in float32.

    Raises:
        FileNotFoundError, ValueError: as `pipelines.load_models`.
    """
    from diffusers import DiffusionPipeline

    source = pipelines.find_model(name)
    with pipelines.named(name):
        second, _ = pipelines.pipeline_kind(source)
        return DiffusionPipeline.from_pretrained(source, **pipelines.load_parts(source, second=second))


# --- the folder ---


@contextlib.contextmanager
def written_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the output, which takes its place when all of it is written, or leaves no trace."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        with record.storage_errors(output):
            yield folder
        for path in (*folder.rglob("*"), folder):
            record.open_to_umask(path)
        if output.exists() and overwrite:
            _swap(folder, output)
        else:
            os.rename(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, output: Path) -> None:
    """Put a folder in the place of another, which comes back if that fails."""
    place = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    old = place / output.name
    try:
        os.rename(output, old)
        os.rename(folder, output)
    except BaseException:
        if old.exists():
            os.rename(old, output)
        place.rmdir()
        raise
    shutil.rmtree(place)


CARD = "Merged by texforce"


def model_card(config: MergeConfig, adapter: Adapter) -> str:
    """README.md: from what, at which weights, it was merged."""
    rows = [f"| adapter | `{path}` | {weight:g} |" for path, weight in map(parse_weighted, config.adapter or ())]
    rows += [f"| U-Net | `{config.unet}` | {config.unet_scale:g} |"] if config.unet else []
    parts = ", ".join(f"{part} ({len(layers)} layers)" for part, layers in adapter.items()) or "none"
    return "\n".join(
        [
            "---", "library_name: diffusers", "tags: [texforce, text-to-image, lora]", "---",
            f"# {Path(config.output).name}", "",
            f"{CARD} {texforce.__version__} into the format `{config.format}`, for the model `{config.model}`. "
            "Changes are summed, each times its weight.",
            "", "| what | from | weight |", "|---|---|---|", *rows, "", f"LoRA: {parts}.", "",
        ]
    )  # fmt: skip


# --- LoRA ---


def write_peft(merged: Merged, folder: Path) -> None:
    """peft's folders: the text encoder's itself, others in subfolders of the part's name."""
    for part, layers in merged.adapter.items():
        place = folder if part == "text_encoder" else folder / part
        place.mkdir(exist_ok=True)
        named = named_as_in(getattr(merged.models, part), layers)  # peft looks for these
        config = lora_config(named) | {"peft_type": "LORA", "base_model_name_or_path": merged.config.model}
        config |= {"inference_mode": True, "bias": "none", "lora_dropout": 0.0}
        record.write_json(place / "adapter_config.json", config)
        tensors = {f"base_model.model.{key}": tensor for key, tensor in lora_tensors(named).items()}
        save(tensors, place / "adapter_model.safetensors", {"format": "pt"})


def write_diffusers(merged: Merged, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`, with metadata.

    Alpha is the rank, and its own strength is in the matrices, since readers without the metadata, as ComfyUI, take it so.
    Text encoders' tensors have the level `text_model.` in their names, without which ComfyUI knows none of them. In the
    metadata the names do without: peft takes the ends of names too, so that they fit transformers before and after 5.6.
    """
    arguments: dict[str, Any] = {}
    for part, layers in merged.adapter.items():
        layers = {name: Layer(layer.down, layer.scale * layer.up, layer.rank) for name, layer in layers.items()}
        named = layers if part == "unet" else {f"text_model.{name}": layer for name, layer in layers.items()}
        arguments[f"{part}_lora_layers"] = lora_tensors(named)
        arguments[f"{part}_lora_adapter_metadata"] = lora_config(layers)
    merged.models.save_lora_weights(folder, **arguments)


def write_kohya(merged: Merged, folder: Path) -> None:
    """A file of kohya's names for A1111, ComfyUI and whatever else reads them, each layer with its alpha."""
    second = getattr(merged.models, "text_encoder_2", None)
    prefixes = {"text_encoder": "lora_te_" if second is None else "lora_te1_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for part, layers in merged.adapter.items():
        for name, layer in layers.items():
            if part != "unet":
                full = prefixes[part] + "text_model_" + name
            elif second is None:
                full = "lora_unet_" + name
            else:  # Stable Diffusion XL's go by the names of its own code
                full = "lora_unet_" + ldm.unet_name(name, merged.models.unet.config)
            full = full.replace(".", "_")
            tensors[f"{full}.lora_down.weight"] = layer.down.contiguous()
            tensors[f"{full}.lora_up.weight"] = layer.up.contiguous()
            tensors[f"{full}.alpha"] = torch.tensor(layer.alpha)
    every = [layer for layers in merged.adapter.values() for layer in layers.values()]
    base = architecture_of(merged.models)[0]
    metadata = modelspec(merged, "/lora") | {
        "ss_network_module": "networks.lora", "ss_base_model_version": base, "ss_v2": str(base == "sd_v2"),
        "ss_v_parameterization": str(prediction_type(merged.models) == "v"),
        "ss_network_dim": common(str(layer.rank) for layer in every),
        "ss_network_alpha": common(str(layer.alpha) for layer in every),
        "ss_sd_model_name": merged.config.model, "ss_output_name": Path(merged.config.output).name,
    }  # fmt: skip
    save(tensors, folder / f"{Path(merged.config.output).name}.safetensors", metadata)


def common(values: Iterator[str]) -> str:
    """The value that all share; kohya's word for others is Dynamic."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"


def architecture_of(models: Any) -> tuple[str, str]:
    """kohya's and modelspec's words for the base model; empty and general ones for models that are none of the published."""
    base, name = ARCHITECTURES.get(models.unet.config.cross_attention_dim, ("", "stable-diffusion"))
    if base == "sd_v2":
        name += "-768-v" if prediction_type(models) == "v" else "-512"
    return base, name


def prediction_type(models: Any) -> str:
    """modelspec's word."""
    return "v" if models.scheduler.config.get("prediction_type") == "v_prediction" else "epsilon"


def modelspec(merged: Merged, kind: str) -> dict[str, str]:
    """Metadata by Stability's Model Spec 1.0.0; the kind is what stands behind the architecture, as /lora."""
    models, config = merged.models, merged.config
    pixels = (models.unet.config.sample_size or 64) * 2 ** (len(models.vae.config.block_out_channels) - 1)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture_of(models)[1] + kind,
        "modelspec.implementation": "diffusers" if kind else "sgm",
        "modelspec.title": Path(config.output).name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": prediction_type(models),
        "modelspec.description": f"merged by texforce {texforce.__version__}",
        "texforce": json.dumps({"adapter": config.adapter, "unet": config.unet, "model": config.model}),
    }  # fmt: skip


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


# --- whole models ---


def bake(merged: Merged) -> None:
    for part, layers in merged.adapter.items():
        adapters.bake(getattr(merged.models, part), layers)


def write_pipeline(merged: Merged, folder: Path) -> None:
    """A folder for diffusers' `from_pretrained`, everything baked in."""
    bake(merged)
    merged.models.save_pretrained(folder)


def write_checkpoint(merged: Merged, folder: Path) -> None:
    """One file in the layout of Stable Diffusion's own code, everything baked in."""
    bake(merged)
    path = folder / f"{Path(merged.config.output).name}.safetensors"
    save(ldm.checkpoint_tensors(merged.models), path, modelspec(merged, ""))


WRITERS: dict[str, Callable[[Merged, Path], None]] = {
    "peft": write_peft, "diffusers": write_diffusers, "kohya": write_kohya,
    "pipeline": write_pipeline, "checkpoint": write_checkpoint,
}  # fmt: skip
