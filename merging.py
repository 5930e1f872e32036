"""texforce merge: adapters and U-Nets joined with a base model, and written in the formats that others load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce import __version__

from . import adapters, files, ldm, models, stages
from .draw_config import SETTINGS, MergeConfig, System
from .errors import ArtifactError, InputError
from .families import Family
from .files import read_json
from .lora_files import (
    ARCHITECTURES,
    PARTS,
    Adapter,
    Layer,
    lora_config,
    lora_tensors,
    named_as_in,
    named_as_published,
    read_adapter,
)
from .weights import read_tensors

WRITTEN = "texforce-merge.json"  # the files of an output with their SHA-256; what it does not name is somebody else's
LORA_FORMATS = ("peft", "diffusers", "kohya")
FULL_FORMATS = ("pipeline", "checkpoint")
ACCESSORIES = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Merged:
    """The merged adapter and its pipeline, whose U-Net is already replaced if a whole one was given."""

    model: Any  # a diffusers pipeline
    adapter: Adapter
    config: MergeConfig


def merge(config: MergeConfig) -> Path:
    """Merge by a resolved configuration; returns the folder that was written.

    Raises:
        NotFoundError, InputError: bad input. ArtifactError: a refused file. OSError: storage.
    """
    output = Path(config.output_dir)
    check_output(config)
    system = config.system
    adapters.check_inputs(system)
    _refuse_tokens(system)
    family = models.pipeline_kind(models.find_model(config.model)).family
    check_format(family, {}, config.format)
    # Only a pipeline holds parts that are no networks. LoRA formats need the text encoders' weights, and the U-Net's if
    # --unet gives one to compare it with.
    compared = bool(config.unet) and family.part == "unet"
    hollow = () if config.format in FULL_FORMATS else ("vae",) if compared else (family.part, "vae")
    stages.report("loading the model")
    model = load_pipeline(config.model, () if config.format == "pipeline" else ACCESSORIES, hollow)
    terms = adapters.read_terms(system.adapters, model)
    whole_unet = False
    if config.unet:
        unet = adapters.read_unet(config.unet, model)
        terms.append((unet.adapter, config.unet_strength))
        whole_unet = bool(unet.tensors) and config.unet_strength != 0
        if unet.tensors and config.format in LORA_FORMATS:
            raise InputError(f"format: {config.unet!r} is a whole U-Net, which {config.format} cannot hold; use pipeline")
        if whole_unet:
            adapters.move_towards(model.unet, unet.tensors, config.unet_strength)
    adapter = adapters.fuse(terms)
    if not adapter and not whole_unet:
        raise InputError("adapter: with weights of 0 nothing is merged")
    check_sum(model, adapter)
    check_format(models.family_of(model), adapter, config.format)
    files.make_folder(output.parent)
    with files.replacing(output) as folder:
        folder.mkdir()
        merged = Merged(model, adapter, config)
        stages.report("writing")
        WRITERS[config.format](merged, folder)
        stages.report("reading it back")
        check_written(merged, folder)
        (folder / "README.md").write_text(model_card(config, adapter))
        baked = ("model", "null_prompt") if config.format in FULL_FORMATS else ()
        files.write_json(folder / SETTINGS, {name: value for name, value in config.settings.items() if name not in baked})
        files.write_json(folder / WRITTEN, files.describe_files(folder)["sha256"])
        check_output(config)  # again: a merge takes time, in which others can write
    return output


def _refuse_tokens(system: System) -> None:
    """Raise InputError for learned tokens, which are not part of any weights."""
    if tokens := [path for path, _ in system.adapters if adapters.token_shapes(path)]:
        raise InputError(
            f"adapter: {tokens[0]!r} holds learned tokens, which belong to prompts and not to a model's weights; load the "
            "file itself as a textual inversion in diffusers, A1111 or ComfyUI"
        )


def check_sum(model: Any, adapter: Adapter) -> None:
    """Check that a fused adapter is finite, and changes the text encoders' embeddings.

    Raises:
        InputError: it is not finite. ArtifactError: it changes nothing.
    """
    for layers in adapter.values():
        for name, layer in layers.items():
            if not layer.delta().isfinite().all():
                raise InputError(f"adapter: with these weights the change of {name} is not finite; lower them")
    adapters.check_embeddings(model, adapter)


def check_format(family: Family, adapter: Adapter, format: str) -> None:
    """Check that a format's readers take what is to be written.

    Raises:
        InputError: they do not.
    """
    if format == "checkpoint" and family.part != "unet":
        raise InputError(f"format: checkpoint is a layout of Stable Diffusion 1.x to XL, not of {family.name}; use pipeline")
    readers = {
        "diffusers": ("diffusers' load_lora_weights", family.diffusers_lora),
        "kohya": ("sd-scripts and ComfyUI", tuple(family.kohya)),
    }
    if format in readers:
        name, taken = readers[format]
        if foreign := [part for part in adapter if part not in (*taken, "unet")]:
            raise InputError(
                f"format: {name} take no LoRA of the {foreign[0]} of {family.name}; use peft (for its PeftModel) or pipeline"
            )


def check_output(config: MergeConfig) -> None:
    """Check that the output can be written, and that neither output nor inputs lie in each other.

    Raises:
        InputError: it exists, or is an input. OSError: it cannot be written.
    """
    output = Path(config.output_dir).resolve()
    system = config.system
    inputs = [path for path, _ in (*system.adapters, *system.unets)] + [config.model]
    for path in (Path(name).resolve() for name in inputs if Path(name).exists()):
        if output == path or output in path.parents or path in output.parents:
            raise InputError(f"output_dir: {config.output_dir!r} and the input {str(path)!r} must not lie in each other")
    if output.exists() and not config.overwrite:
        raise InputError(f"output_dir: {config.output_dir!r} exists; choose another, or give --overwrite")
    check_replaceable(Path(config.output_dir))
    files.check_writable(output.parent)


def check_replaceable(output: Path) -> None:
    """Check that an output is not there, or is an empty folder, or holds what `merge` wrote and nothing else.

    Raises:
        InputError: there is something else, which is not to be removed; names it.
    """
    if output.is_symlink():
        raise InputError(f"output_dir: {str(output)!r} is a link, which is not replaced; name the folder itself, or another")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / WRITTEN).is_file():
        raise InputError(
            f"output_dir: {str(output)!r} holds no {WRITTEN}, by which texforce merge knows what it wrote; it is not "
            "overwritten, so choose another output or move it away"
        )
    written = read_json(output / WRITTEN)
    folders = {parent.as_posix() for name in written for parent in Path(name).parents}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        is_named = name in folders if path.is_dir() else path.is_file() and name in {*written, WRITTEN}
        if path.is_symlink() or not is_named or (name in written and written[name] != files.sha256(path)):
            raise InputError(
                f"output_dir: {str(path)!r} was not written by texforce merge, or has changed since; it is not overwritten, "
                "so choose another output or move it away"
            )


def load_pipeline(name: str, without: Sequence[str] = (), hollow: Sequence[str] = ()) -> Any:
    """A pipeline of diffusers, of a family in families.py, none of its tensors missing, in float32.

    The parts in `without` are not read. Those in `hollow` have no weights, but a checkpoint of one file is read whole.

    Raises:
        NotFoundError, InputError: as `models.load_model`.
    """
    from diffusers import DiffusionPipeline

    source = models.find_model(name)
    with models.reading_model(name):
        kind = models.pipeline_kind(source)
        file = models.checkpoint_file(name)
        parts = models.load_tokenizers(source, kind) | models.load_parts(source, kind, file=file, without=hollow)
        models.size_of(kind.family, parts[kind.family.part])
        absent = kind.family.text.keys() - kind.text_parts.keys()
        parts |= {name.replace("text_encoder", what): None for name in absent for what in ("text_encoder", "tokenizer")}
        parts |= _accessories(source, ACCESSORIES if file else without) | {"scheduler": _own_scheduler(source)}
        pipeline = DiffusionPipeline.from_pretrained(source, **parts)
        models.check_text(pipeline, source)
    return pipeline


def _own_scheduler(source: str) -> Any:
    """The scheduler that a pipeline comes with."""
    import diffusers

    name = models.scheduler_config(source)["_class_name"]
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise InputError(f"model: the {models.SCHEDULER_FILE} of {source!r} is of a {name}, which diffusers does not know")
    with models.reading_part(source, "scheduler", (models.SCHEDULER_FILE,)):
        return getattr(diffusers, name).from_pretrained(source, subfolder="scheduler")


def _accessories(source: str, without: Sequence[str]) -> dict[str, Any]:
    """The safety checker of a pipeline and what it reads images with; None for those in `without`."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    index: Any = DiffusionPipeline.load_config(source)
    parts: dict[str, Any] = {part: None for part in without if part in index}
    there = [part for part in ACCESSORIES if part not in parts and (index.get(part) or [None])[-1] is not None]
    if "safety_checker" in there:
        parts["safety_checker"] = models.load_network(StableDiffusionSafetyChecker, source, "safety_checker")
    if "feature_extractor" in there:
        with models.reading_part(source, "feature_extractor", ("preprocessor_config.json",)):
            parts["feature_extractor"] = CLIPImageProcessor.from_pretrained(source, subfolder="feature_extractor")
    return parts


# --- the folder ---


USAGE = {
    "pipeline": '`DiffusionPipeline.from_pretrained("{name}")` of diffusers loads this folder.',
    "checkpoint": "A1111 reads `{name}.safetensors` from `models/Stable-diffusion`, ComfyUI from `models/checkpoints`.",
    "peft": '`PeftModel.from_pretrained(pipeline.text_encoder, "{name}")` of peft loads this folder; a part in a subfolder '
    "goes on the part of the pipeline that is called so.",
    "diffusers": '`pipeline.load_lora_weights("{name}")` of diffusers loads this folder.',
    "kohya": "A1111 reads `{name}.safetensors` from `models/Lora`, as `<lora:{name}:1>` in the prompt; ComfyUI from "
    "`models/loras`, by a Load LoRA node whose CLIP goes to both text nodes.",
}


def model_card(config: MergeConfig, adapter: Adapter) -> str:
    """The README.md of a merge: its inputs, their weights, and how to use it."""
    rows = [f"| adapter | `{path}` | {weight:g} |" for path, weight in config.system.adapters]
    rows += [f"| U-Net | `{config.unet}` | {config.unet_strength:g} |"] if config.unet else []
    parts = ", ".join(f"{part} ({len(layers)} layers)" for part, layers in adapter.items()) or "none"
    steps = config.settings.get("adapter_steps")
    ranged = (
        [f"The text encoder's is for the share {steps} of the denoising steps; texforce honours it.", ""] if steps else []
    )
    return "\n".join(
        [
            "---", "library_name: diffusers", "tags: [texforce, text-to-image, lora]", "---",
            f"# {Path(config.output_dir).name}", "",
            f"Merged by texforce {__version__} into the format `{config.format}`, for the model `{config.model}`. "
            "Changes are summed, each times its weight.",
            "", "| what | from | weight |", "|---|---|---|", *rows, "", f"LoRA: {parts}.", "", *ranged,
            USAGE[config.format].format(name=Path(config.output_dir).name), "",
        ]
    )  # fmt: skip


# --- LoRA ---


def write_peft(merged: Merged, folder: Path) -> None:
    """peft's folders: the text encoder's itself, others in subfolders of the part's name."""
    for part, layers in merged.adapter.items():
        place = folder if part == "text_encoder" else folder / part
        place.mkdir(exist_ok=True)
        named = named_as_in(getattr(merged.model, part), layers)  # peft looks for these
        config = lora_config(named) | {"peft_type": "LORA", "base_model_name_or_path": merged.config.model}
        config |= {"inference_mode": True, "bias": "none", "lora_dropout": 0.0}
        files.write_json(place / "adapter_config.json", config)
        tensors = {f"base_model.model.{key}": tensor for key, tensor in lora_tensors(named).items()}
        save(tensors, place / "adapter_model.safetensors", {"format": "pt"})


def write_diffusers(merged: Merged, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`, with metadata.

    Alpha is written as the rank, and the scale is folded into `up`: readers that ignore the metadata, as ComfyUI, assume a
    scale of 1.
    Text encoders' tensors have the level `text_model.` in their names, without which ComfyUI knows none of them. In the
    metadata the names do without: peft takes the ends of names too, so that they fit transformers before and after 5.6.
    """
    arguments: dict[str, Any] = {}
    for part, layers in merged.adapter.items():
        layers = {name: Layer(layer.down, layer.scale * layer.up, layer.rank) for name, layer in layers.items()}
        named = layers if part == "unet" else named_as_published(getattr(merged.model, part), layers)
        arguments[f"{part}_lora_layers"] = lora_tensors(named)
        arguments[f"{part}_lora_adapter_metadata"] = lora_config(layers)
    merged.model.save_lora_weights(folder, **arguments)


def write_kohya(merged: Merged, folder: Path) -> None:
    """A file of kohya's names for A1111, ComfyUI and whatever else reads them, each layer with its alpha."""
    family, tensors = models.family_of(merged.model), {}
    for part, layers in merged.adapter.items():
        named = layers if part == "unet" else named_as_published(getattr(merged.model, part), layers)
        for name, layer in named.items():
            if part != "unet":
                full = family.kohya[part] + name
            elif not family.pooled:
                full = "lora_unet_" + name
            else:  # Stable Diffusion XL's go by the names of its own code
                full = "lora_unet_" + ldm.unet_name(name, merged.model.unet.config)
            full = full.replace(".", "_")
            tensors[f"{full}.lora_down.weight"] = layer.down.contiguous()
            tensors[f"{full}.lora_up.weight"] = layer.up.contiguous()
            tensors[f"{full}.alpha"] = torch.tensor(layer.alpha)
    every = [layer for layers in merged.adapter.values() for layer in layers.values()]
    base = architecture_of(merged.model)[0]
    metadata = modelspec(merged, "/lora") | {
        "ss_network_module": "networks.lora", "ss_base_model_version": base, "ss_v2": str(base == "sd_v2"),
        "ss_v_parameterization": str(prediction_type(merged.model) == "v"),
        "ss_network_dim": common(str(layer.rank) for layer in every),
        "ss_network_alpha": common(str(layer.alpha) for layer in every),
        "ss_sd_model_name": merged.config.model, "ss_output_name": Path(merged.config.output_dir).name,
    }  # fmt: skip
    save(tensors, folder / f"{Path(merged.config.output_dir).name}.safetensors", metadata)


def common(values: Iterator[str]) -> str:
    """The value that all share; else Dynamic, as kohya has it."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"


def architecture_of(model: Any) -> tuple[str, str]:
    """kohya's and modelspec's names of the base model; general ones for models that were not published."""
    family = models.family_of(model)
    if family.part != "unet":
        return family.kohya_base, family.architecture
    base, name = ARCHITECTURES.get(model.unet.config.cross_attention_dim, ("", "stable-diffusion"))
    if base == "sd_v2":
        name += "-768-v" if prediction_type(model) == "v" else "-512"
    return base, name


def prediction_type(model: Any) -> str:
    """The prediction type as modelspec names it."""
    if models.family_of(model).flow:
        return "flow"
    return "v" if model.scheduler.config.get("prediction_type") == "v_prediction" else "epsilon"


def modelspec(merged: Merged, kind: str) -> dict[str, str]:
    """Metadata of Stability's Model Spec 1.0.0; `kind` follows the architecture, as /lora."""
    model, config = merged.model, merged.config
    family = models.family_of(model)
    size = models.size_of(family, getattr(model, family.part)) or 64
    pixels = size * models.pixels_per_latent(model.vae)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture_of(model)[1] + kind,
        "modelspec.implementation": "diffusers" if kind else "sgm",
        "modelspec.title": Path(config.output_dir).name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": prediction_type(model),
        "modelspec.description": f"merged by texforce {__version__}",
        "texforce": json.dumps(
            {"adapter": config.adapter, "unet": config.unet, "model": config.model}
            | {"layers": {part: len(layers) for part, layers in merged.adapter.items()}}
        ),
    }  # fmt: skip


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def check_written(merged: Merged, folder: Path) -> None:
    """Check that what was written is what was merged, read back by the names that it has in the file.

    Raises:
        ArtifactError: it is not.
    """
    if merged.config.format in FULL_FORMATS:
        wrong = _differing_tensors(merged, folder)
    else:
        again = read_adapter(folder, merged.model)
        pairs = {(part, name): layer for part, layers in merged.adapter.items() for name, layer in layers.items()}
        found = {(part, name): layer for part, layers in again.items() for name, layer in layers.items()}
        wrong = [" ".join(name) for name in pairs.keys() ^ found.keys()] or [
            " ".join(name)
            for name, layer in pairs.items()
            if not torch.allclose(layer.delta(), found[name].delta(), 1e-4, 1e-6)
        ]
    if wrong:
        raise ArtifactError(
            f"output_dir: {len(wrong)} layers or tensors were not written as they were merged, as {min(wrong)}"
        )


def _differing_tensors(merged: Merged, folder: Path) -> list[str]:
    """Names of tensors in a written pipeline or checkpoint that are missing, foreign or not those of the merged model."""
    if merged.config.format == "checkpoint":
        written = read_tensors(next(folder.glob("*.safetensors")), "a checkpoint")
        expected = ldm.checkpoint_tensors(merged.model)
        return _differing(written, expected)
    wrong = []
    for part in (name for name in (*PARTS, "transformer", "vae") if getattr(merged.model, name, None) is not None):
        module = getattr(merged.model, part)
        written = models.load_network(type(module), str(folder), part).state_dict()
        wrong += [f"{part}.{name}" for name in _differing(written, module.state_dict())]
    return wrong


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    both = one.keys() & other.keys()
    return [*(one.keys() ^ other.keys()), *(name for name in both if not torch.equal(one[name], other[name]))]


# --- whole models ---


def _bake(merged: Merged) -> None:
    for part, layers in merged.adapter.items():
        adapters.bake(getattr(merged.model, part), layers)


def write_pipeline(merged: Merged, folder: Path) -> None:
    """A folder for diffusers' `from_pretrained`, everything baked in."""
    _bake(merged)
    merged.model.save_pretrained(folder)


def write_checkpoint(merged: Merged, folder: Path) -> None:
    """One file in the layout of Stable Diffusion's own code, everything baked in."""
    _bake(merged)
    path = folder / f"{Path(merged.config.output_dir).name}.safetensors"
    save(ldm.checkpoint_tensors(merged.model), path, modelspec(merged, ""))


WRITERS: dict[str, Callable[[Merged, Path], None]] = {
    "peft": write_peft, "diffusers": write_diffusers, "kohya": write_kohya,
    "pipeline": write_pipeline, "checkpoint": write_checkpoint,
}  # fmt: skip
