"""Configuration of the commands that take adapters: how `sample` and `eval` draw, what `merge` writes, what `eval` measures.

Their defaults come from the adapter's run, or from the model. options.py has the types; config.py has those of a training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from . import model_files
from .config import (
    LONG_PROMPT_HELP,
    PROMPT_FILES,
    TrainOptions,
    check_model,
    check_precision,
    check_sampler,
    default_device,
    default_model,
)
from .errors import InputError, naming_origins
from .files import locate, read_json
from .options import (
    FLOW_SAMPLERS,
    AdapterSteps,
    Count,
    DrawEta,
    LongPrompt,
    Natural,
    NonNegative,
    NullPrompt,
    Options,
    Precision,
    Rewards,
    Sampler,
    Seconds,
    Seed,
    Texts,
    check_steps,
    default_of,
    derived,
    given_values,
    option,
    options_of,
    validated,
)
from .presets import EMBEDDED, PRESETS, family, is_flow, sampler_defaults
from .reward_specs import check_reward

SETTINGS = "texforce.json"  # how the output of `texforce merge` is to be sampled
BASE = "base"  # the name of the base model among the systems
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a system's name


# --- sample ---

LORA_HELP = (
    "output folder of a training, a LoRA file or folder of any layout, or a hub name; PATH:WEIGHT weights it; repeatable, "
    "summed"
)
ADAPTER_HELP = LORA_HELP + "; also learned tokens"
UNET_STRENGTH_HELP = "strength of that U-Net's change: 0 is the base model's, 1 as it was tuned"
UNET_HELP = "a U-Net tuned elsewhere: a LoRA file, a diffusers U-Net, a single-file checkpoint or a hub name"
MODEL_HELP = (
    "'tiny', 'tiny-flow', a diffusers folder, a checkpoint or a hub name (default: the adapter's, else as in training)"
)


@dataclass(frozen=True)
class System:
    """Adapters and a U-Net on a base model, each as path and weight."""

    name: str
    adapters: tuple[tuple[str, float], ...] = ()
    unets: tuple[tuple[str, float], ...] = ()
    adapter_steps: str | None = None  # in which the text encoder's adapter is on; None: all


@validated
class DrawConfig:
    """How images are drawn, by `sample` and by `eval`."""

    model: str = option(MODEL_HELP)
    sampler: Sampler = option("ddim or dpm-solver, for flow matching euler (default: the adapter's, else ddim or euler)")
    num_inference_steps: Count = option("denoising steps (default: the adapter's)")
    eta: DrawEta = option("randomness of DDIM's steps, 0 to 1 (default: the adapter's, else 1; 0 for the other samplers)")
    guidance_scale: NonNegative = option("classifier-free guidance (default: the adapter's)")
    resolution: Count | None = option("pixels of a side (default: what the denoiser was made for)", None)
    width: Count | None = option("pixels from left to right, instead of --resolution", None)
    height: Count | None = option("pixels from top to bottom, instead of --resolution", None)
    batch_size: Count = option("images drawn at a time", 16)
    mixed_precision: Precision = option("no, fp16 or bf16 (default: on CUDA fp16, in flow matching bf16; else no)")
    compile: bool | None = option("compile the denoiser (default: on CUDA)", None)
    null_prompt: NullPrompt = option("adapted or base (default: the adapter's)")
    negative_prompt: str | None = option("what guidance leads away from, for example 'blurry' (default: nothing)", None)
    long_prompt: LongPrompt = option(f"{LONG_PROMPT_HELP} (default: the adapter's, else cut)")
    clip_skip: Natural = option(
        "last layers of CLIP that are skipped, as diffusers counts them (A1111's 2 is 1); null and negative prompts skip "
        "none",
        0,
    )
    prompt_weights: bool = option(
        "read weights in prompts and the negative prompt, as A1111 does: (word:1.3), (word), [word], \\( for a bracket; and "
        "[word:0-0.5:1.25], a word for a range of the steps (docs/prompts.md); else brackets are text",
        False,
    )
    adapter_steps: AdapterSteps | None = option(
        "range A-B of shares of the denoising steps, for example 0.8-1, in which the text encoder's adapter is on; 0-1 is "
        "all of them (default: the adapter's, else all)",
        None,
    )
    origins: dict[str, str] = derived(default_factory=dict)  # of options that are not given: the file that each comes from


# Options that came after others: results and metadata name them where they are not these, so that they stay as they were.
LATER_OPTIONS: dict[str, Any] = {
    "long_prompt": "cut",
    "clip_skip": 0,
    "width": None,
    "height": None,
    "prompt_weights": False,
}


def changed_later_options(config: DrawConfig) -> dict[str, Any]:
    """Those of LATER_OPTIONS that are not as they were before there was a choice, with their values."""
    return {name: getattr(config, name) for name, usual in LATER_OPTIONS.items() if getattr(config, name) != usual}


@validated
class SampleConfig(DrawConfig):
    """Everything that decides what `texforce sample` draws."""

    adapter: Texts | None = option(ADAPTER_HELP, None)
    unet: str | None = option(UNET_HELP, None)
    unet_strength: float = option(UNET_STRENGTH_HELP, 1.0)
    prompt: Texts | None = option("what to draw; repeatable", None)
    prompts: str | None = option(f"{PROMPT_FILES}; or the name of a shipped set", None)
    output_dir: str = option("where the images go; their numbers go on from those already there", "samples")
    num_images: Count = option("images for each prompt", 4)
    seed: Seed = option("seed of the first image; each next image adds 1", 0)
    strength: float = option("strength of the adapter: 0 is the base model, 1 as trained", 1.0)
    compare: bool = option("also draw the base model's images from the same noise", False)
    systems: tuple[System, ...] = derived(())  # drawn besides the base model: one, or none


SampleOptions = options_of(SampleConfig)


def parse_weighted(spec: str) -> tuple[str, float]:
    """Path and weight of PATH:0.7; without a weight it is 1.

    Raises:
        InputError: the weight is no finite number.
    """
    path, colon, text = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        if not Path(path).exists():
            return spec, 1.0  # a colon in a path
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"adapter: the weight in {spec!r} must be a finite number, not {text!r}")
    return path, weight


def _one_system(given: dict[str, Any], strength: float = 1.0) -> tuple[System, ...]:
    """The adapters and the U-Net that are given, as one system; none if nothing is given."""
    adapters = tuple((path, weight * strength) for path, weight in map(parse_weighted, given.get("adapter", ())))
    unets = ((given["unet"], given.get("unet_strength", 1.0)),) if given.get("unet") else ()
    return (System("tuned", adapters, unets),) if adapters or unets else ()


def resolve_sample(options: Options) -> SampleConfig:
    """The configuration of `texforce sample`: the options, and else the adapter's run or the model's defaults.

    Raises:
        InputError: options do not fit each other, or an adapter's folder is nonsense.
    """
    given = given_values(options)
    strength = given.get("strength", 1.0)
    if not given.get("prompt") and not given.get("prompts"):
        raise InputError("prompt: give --prompt or --prompts")
    if not given.get("adapter") and strength != 1:
        raise InputError("strength: works only together with --adapter")
    _check_unet_strength(given)
    if not given.get("adapter") and not given.get("unet") and given.get("compare"):
        raise InputError("compare: works only together with --adapter or --unet")
    systems = _with_steps(_one_system(given, strength), given)
    return SampleConfig(**_drawing(given, systems) | {"systems": systems})


def _with_steps(systems: Sequence[System], given: dict[str, Any], advice: str = "say which to use") -> tuple[System, ...]:
    """Systems with the steps in which their adapters are on: as given, or else as the adapters' runs have it.

    Raises:
        InputError: the runs of adapters that are summed differ, or steps are given without an adapter.
    """
    if "adapter_steps" in given and not given.get("adapter"):
        raise InputError("adapter_steps: works only together with --adapter")
    found = []
    for system in systems:
        saved = _steps_of(system)
        if "adapter_steps" in given:
            saved = [given["adapter_steps"]] if system.adapters else []
        if len(saved) > 1:
            texts = " and ".join(steps or "all steps" for steps in saved[:2])
            raise InputError(f"adapter_steps: adapters that are summed were trained with {texts}; {advice}")
        found.append(replace(system, adapter_steps=saved[0] if saved else None))
    return tuple(found)


def _steps_of(system: System) -> list[str | None]:
    """The different steps in which the adapters of a system that have an effect are on; raises as `_saved_steps`."""
    return list(dict.fromkeys(steps for path, weight in system.adapters if weight for steps in _saved_steps(path)))


def _saved_steps(adapter: str) -> list[str | None]:
    """The steps in which an adapter's run, or a merge, has it on; nothing of a run that trained the U-Net alone.

    Raises:
        InputError: a file in its folder is nonsense.
    """
    folder = locate(adapter, "adapter")
    folder = folder.parent if folder.name.startswith("adapter_model.") else folder
    contents = {path: read_json(path) for path in (folder / "config.json", folder / SETTINGS) if path.is_file()}
    for path, content in contents.items():
        try:
            TrainOptions(adapter_steps=content.get("adapter_steps"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    if any(content.get("target") == "unet" for content in contents.values()):
        return []
    return [next((steps for content in contents.values() if (steps := content.get("adapter_steps"))), None)]


def _check_unet_strength(given: dict[str, Any]) -> None:
    if given.get("unet_strength", 1.0) != 1 and not given.get("unet"):
        raise InputError("unet_strength: works only together with --unet")


def _drawing(given: dict[str, Any], systems: Sequence[System]) -> dict[str, Any]:
    """What is given, and how images are drawn where it is not.

    Raises:
        InputError: the adapters' runs disagree in what is not given.
    """
    if {"resolution", "width", "height"} <= given.keys():
        raise InputError("resolution: has no effect beside --width and --height; leave it out")
    if given.get("model"):
        check_model(given["model"])
    saved, origins = dict[str, Any](), dict[str, str]()
    settled = given.keys() | ({"resolution"} if {"width", "height"} <= given.keys() else set())
    for path, settings in sampling_settings(given, systems):
        for name, value in settings.items():
            if name not in settled:
                origins.setdefault(name, str(path))
            if saved.setdefault(name, value) != value and name not in settled:
                raise InputError(f"{name}: the adapters were trained with {saved[name]!r} and {value!r}; say which to use")
    device = default_device()  # loads PyTorch, so a mistyped path comes before it
    model = given.get("model") or saved.get("model") or default_model(device)
    preset = PRESETS[family(model), "default"]
    usual: dict[str, Any] = {"eta": 1.0, "sampler": preset.get("sampler", "ddim"), "null_prompt": "adapted"}
    usual["long_prompt"] = "cut"
    usual["mixed_precision"] = "no" if device == "cpu" else "bf16" if is_flow(model) else "fp16"
    usual |= {name: preset[name] for name in ("num_inference_steps", "guidance_scale")}
    sampler = given.get("sampler", saved.get("sampler", usual["sampler"]))
    usual |= {"sampler": sampler} | sampler_defaults(sampler, family(model))
    if saved.get("sampler", sampler) != sampler:
        saved.pop("eta", None)  # it was the other sampler's
        origins.pop("eta", None)
    values = usual | saved | given | {"model": model}
    with naming_origins(origins):
        check_precision(values["mixed_precision"], device)
        check_drawn(sampler, values["eta"])
        _check_model(values)
    for system in systems:
        check_steps(system.adapter_steps, values["num_inference_steps"])
    return values | {"origins": origins}


def _check_model(values: dict[str, Any]) -> None:
    """Check what is asked of a model as far as its files are here; raises as the functions of model_files.py."""
    model = values["model"]
    model_files.check_sides(model, {name: values.get(name) for name in ("resolution", "width", "height")})
    if facts := model_files.find_facts(model) if values.get("clip_skip") else None:
        most = [text.most_skipped for text in facts.text_encoders.values() if text.most_skipped is not None]
        model_files.check_clip_skip(values["clip_skip"], most, model)


def sampling_settings(given: dict[str, Any], systems: Sequence[System]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """How each adapter, U-Net and given model was trained, or merged, to be sampled, as far as a file in its folder says it.

    Raises:
        InputError: a file is nonsense.
    """
    paths = [locate(path, "adapter") for system in systems for path, _ in system.adapters]
    paths += [locate(path, "unet") for system in systems for path, _ in system.unets]
    model, named = Path(given.get("model", "")), [path / name for path in paths for name in ("config.json", SETTINGS)]
    if given.get("model"):
        named += [model.parent / SETTINGS] if model.is_file() else [model / "config.json", model / SETTINGS]
    for path in named:
        if path.is_file():
            yield path, _saved_settings(path)


def _saved_settings(path: Path) -> dict[str, Any]:
    """How a run's config.json, or a merge's texforce.json, says that images are to be sampled."""
    content = read_json(path)
    if "eta" in content:  # a run of before there was a choice
        content = {"sampler": "ddim"} | content
    if content.get("sampler") in FLOW_SAMPLERS:  # random for training on alone
        content |= {"sampler": "euler", "eta": 0.0}
    names = ["model", "sampler", "num_inference_steps", "guidance_scale", "eta", "long_prompt"]
    if content.get("target") != "unet":  # the null prompt goes through the text encoder
        names.append("null_prompt")
    saved = {name: content[name] for name in names if content.get(name) is not None}
    if "resolution" in content:
        saved["resolution"] = content["resolution"]  # null says something: what the U-Net was made for
    try:
        TrainOptions(**saved)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return saved


# --- merge ---


@validated
class MergeConfig:
    """Everything that decides what `texforce merge` writes."""

    adapter: Texts | None = option(LORA_HELP, None)
    unet: str | None = option(UNET_HELP, None)
    unet_strength: float = option(UNET_STRENGTH_HELP, 1.0)
    model: str = option(MODEL_HELP)
    format: Literal["pipeline", "checkpoint", "peft", "diffusers", "kohya"] = option(
        "pipeline (a diffusers folder) or checkpoint (one file), all baked in; or LoRA alone: peft, diffusers, kohya",
        "pipeline",
    )
    output_dir: str = option("the folder to write", "merged")
    overwrite: bool = option("replace the output if it exists", False)
    drop_adapter_steps: bool = option(
        "write an adapter that was trained for a range of steps (--adapter-steps) as one that is on in all of them", False
    )
    system: System = derived(System("tuned"))  # what is merged
    settings: dict[str, Any] = derived(default_factory=dict)  # how what is written is to be sampled
    dropped_steps: tuple[str, ...] = derived(())  # what adapters were trained for and the merged one drops
    origins: dict[str, str] = derived(default_factory=dict)  # as of DrawConfig


MergeOptions = options_of(MergeConfig)


def resolve_merge(options: Options) -> MergeConfig:
    """The configuration of `texforce merge`: the options, and else the adapters' run.

    Raises:
        InputError: options do not fit each other, or an adapter's folder is nonsense.
    """
    given = given_values(options)
    if not given.get("adapter") and not given.get("unet"):
        raise InputError("adapter: there is nothing to merge; give --adapter, --unet or both")
    _check_unet_strength(given)
    if given.get("model"):
        check_model(given["model"])
    if not given.get("output_dir", "merged").strip("./ "):
        raise InputError(f"output_dir: must name a folder to be made, not {given['output_dir']!r}")
    systems, dropped = _one_system(given), tuple[str, ...]()
    if given.get("drop_adapter_steps"):
        dropped = tuple(filter(None, _steps_of(systems[0])))
    else:
        systems = _with_steps(systems, {}, "give --drop-adapter-steps, and all are on in all steps")
        _check_carried(systems[0].adapter_steps, given.get("format", default_of(MergeConfig, "format")))
    settings: dict[str, Any] = {"adapter_steps": systems[0].adapter_steps} if systems[0].adapter_steps else {}
    origins: dict[str, str] = {}
    for path, saved in sampling_settings(given, systems):
        settings = saved | settings  # of runs that disagree the first one
        if "model" in saved and "model" not in given:
            origins.setdefault("model", str(path))
    model = given.get("model") or settings.get("model") or default_model(default_device())
    settings |= {"model": model}
    found = {"system": systems[0], "settings": settings, "dropped_steps": dropped, "origins": origins}
    return MergeConfig(**given | {"model": model} | found)


def _check_carried(adapter_steps: str | None, format: str) -> None:
    """Raise InputError for a range of steps that what reads a format would not honour."""
    if adapter_steps and format != "peft":
        raise InputError(
            f"format: the adapter is on only in the steps {adapter_steps}, and programs that read {format} leave it on in "
            "all steps; give --format peft, which stores the range in texforce.json, or --drop-adapter-steps to leave it on"
        )


# --- evaluation ---


@validated
class EvalConfig(DrawConfig):
    """Everything that decides what `texforce eval` measures."""

    benchmark: str = option(
        "drawbench, parti, hps, imagereward, world, another shipped prompt set, or a file with `prompt` and "
        "perhaps `category` in each row: .txt, .jsonl, .json, .csv, .tsv, .parquet (default: world for tiny, else "
        "drawbench)"
    )
    adapter: Texts | None = option(
        "[NAME=]PATH[:WEIGHT], compared with the base model; repeatable; what has one NAME is drawn together", None
    )
    unet: Texts | None = option("[NAME=]PATH[:WEIGHT], likewise; " + UNET_HELP, None)
    reward: Rewards = option(
        "measures, each as --reward of train takes it; several as hps,clip or by repeating the option; the first one "
        "chooses the best strength (default: hps; for world also alignment and alignment_exact)"
    )
    reward_checkpoint: Texts | None = option("NAME=PATH, weights of a scorer; repeatable; as in train", None)
    reward_timeout: Seconds = option("seconds to wait for the scores of a function or a server", 600.0)
    exact_preprocessing: bool = option(
        "resize images for the scorers as their own code does, on 8 bits, for figures beside published ones; else as in "
        "training, on floats (docs/rewards.md)",
        False,
    )
    strength: str | None = option(
        "strengths to try of every system, as 0,0.5,1: the best one on half of the prompts is measured on the other half",
        None,
    )
    num_images: Count = option("images for each prompt", 4)
    limit: Count | None = option("number of prompts to take, evenly spaced over the benchmark", None)
    seed: Seed = option("of the noise; every system gets the same, prompt by prompt", 0)
    output_dir: str = option("where images, results and the report go; an interrupted evaluation there goes on", "eval")
    overwrite: bool = option("remove the evaluation in the output folder, and begin anew", False)
    systems: tuple[System, ...] = derived(())  # compared with the base model, by their names
    strengths: tuple[float, ...] = derived(())  # to try of every system; none where they are as given
    measures: tuple[str, ...] = derived(())  # each as `rewards.load_reward` takes it


EvalOptions = options_of(EvalConfig)


def resolve_eval(options: Options) -> EvalConfig:
    """The configuration of `texforce eval`: the options, and else the adapters' runs or the model's defaults.

    Raises:
        InputError: options do not fit each other, or an adapter's folder is nonsense.
    """
    given = given_values(options)
    for spec in parse_measures(given.get("reward", ())):
        check_reward(spec)
    systems = _with_steps(parse_systems(given.get("adapter", ()), given.get("unet", ())), given)
    strengths = parse_strengths(given["strength"]) if "strength" in given else ()
    for system in systems:
        if len(system.unets) > 1:
            raise InputError(f"unet: {system.name} has {len(system.unets)}; a system takes one, give the others names")
    if strengths and not systems:
        raise InputError("strength: works only together with --adapter or --unet")
    values = _drawing(given, systems)
    benchmark = given.get("benchmark", "world" if values["model"] in EMBEDDED else "drawbench")
    usual = ["hps", "alignment", "alignment_exact"] if benchmark == "world" else ["hps"]
    values |= {"benchmark": benchmark, "reward": given.get("reward") or usual}
    values |= {"systems": systems, "strengths": strengths, "measures": parse_measures(values["reward"])}
    return EvalConfig(**values)


def parse_systems(adapters: Sequence[str], unets: Sequence[str]) -> tuple[System, ...]:
    """The systems of `[NAME=]PATH[:WEIGHT]`; what has one given name is one system.

    Raises:
        InputError: a name is missing or unusable, or comes twice without having been given.
    """
    systems: dict[str, System] = {}
    given: dict[str, bool] = {}
    for kind, specs in (("adapters", adapters), ("unets", unets)):
        for spec in specs:
            name, path, scale = parse_named(spec)
            own = name or Path(path).absolute().name.removesuffix(".safetensors")
            if not NAME.fullmatch(own) or own.lower() == BASE:
                raise InputError(f"adapter: give a name, of letters, digits, - and _, as NAME={path}; not {own!r}")
            if own in systems and not (name and given[own]):
                raise InputError(f"adapter: {own!r} comes twice; give names, as NAME={path}")
            given[own] = bool(name)
            system = systems.get(own, System(own))
            terms: dict[str, Any] = {kind: (*getattr(system, kind), (path, scale))}
            systems[own] = replace(system, **terms)
    return tuple(systems.values())


def parse_named(spec: str) -> tuple[str, str, float]:
    """Name, path and weight of [NAME=]PATH[:WEIGHT]; the name is empty where it is not given."""
    name, equals, rest = spec.partition("=")
    path, weight = parse_weighted(spec)
    if equals and NAME.fullmatch(name) and not Path(path).exists():
        return name, *parse_weighted(rest)
    return "", path, weight


def parse_strengths(text: str) -> tuple[float, ...]:
    """The strengths of `0,0.5,1`.

    Raises:
        InputError: not numbers, or one twice.
    """
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = (math.nan,)
    if not all(map(math.isfinite, strengths)) or len({f"{strength:g}" for strength in strengths}) < len(strengths):
        raise InputError(f"strength: must be different numbers, as 0,0.5,1; not {text!r}")
    return strengths


def parse_measures(specs: Sequence[str]) -> tuple[str, ...]:
    """The rewards of `--reward hps,clip --reward jpeg=0.1`, each as `rewards.load_reward` takes it.

    Raises:
        InputError: one is empty or comes twice.
    """
    measures = tuple(part.strip() for spec in specs for part in ([spec] if "=" in spec else spec.split(",")))
    if "" in measures or len(set(measures)) < len(measures):
        raise InputError(f"reward: must be different names, as hps,clip; not {','.join(measures)!r}")
    return measures


def check_drawn(sampler: str, eta: float) -> None:
    """Raise InputError for randomness in how images are drawn that a sampler does not have."""
    if sampler == "cps" or (sampler == "euler" and eta != 0):
        raise InputError(f"sampler, eta: flow matching is drawn by euler at an eta of 0, not by {sampler} at {eta:g}")
    check_sampler(sampler, eta)
