"""What `texforce eval` checks before PyTorch is loaded: its options against each other, the benchmark and the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files, reward_specs, world
from .draw_config import LATER_OPTIONS, EvalConfig, changed_later_options
from .errors import InputError
from .files import read_json
from .presets import EMBEDDED
from .prompt_sets import Benchmark

SETTINGS = "settings.json"  # in an evaluation's folder: all that decides its images
DECIDING = (
    "model", "sampler", "num_inference_steps", "eta", "guidance_scale", "null_prompt", "negative_prompt", "resolution",
    "mixed_precision", "compile", "num_images", "batch_size", "seed",
)  # fmt: skip


def check_inputs(config: EvalConfig, benchmark: Benchmark) -> None:
    """Check a resolved configuration against its benchmark and its folder.

    Raises:
        NotFoundError, InputError: a reward cannot be used or cannot judge a prompt, or the folder holds something else.
    """
    for spec in config.measures:
        reward_specs.check_reward(spec)
    if not config.prompt_weights:  # else what is judged is known once the weights are read
        reward_specs.check_prompts(config.measures, benchmark.prompts)
    usual = config.resolution or (world.IMAGE_SIZE if config.model in EMBEDDED else None)
    sides = {side or usual for side in (config.width, config.height)} - {None}  # of other models one may not be known
    if len(sides) > 1 and (judged := [spec for spec in config.measures if reward_specs.judges_world(spec)]):
        option = "width" if config.width else "height"
        raise InputError(f"{option}: {judged[0]} judges square images of the tiny world alone; give --resolution instead")
    if config.strengths and len(benchmark.prompts) < 2:
        raise InputError(
            "strength: the best one is measured on another half of the prompts, so there must be at least two prompts"
        )
    if config.exact_preprocessing and not any(map(reward_specs.resizes, config.measures)):
        raise InputError(f"exact_preprocessing: none of the measures {', '.join(config.measures)} is a network of ours")
    reward_specs.checkpoints_for(config.model, config.reward_checkpoint, config.measures)
    folder = Path(config.output_dir)
    check_folder(folder)
    files.check_writable(folder)
    if (folder / SETTINGS).is_file() and not config.overwrite:
        check_same(folder, read_json(folder / SETTINGS), describe_drawing(config, benchmark))


def describe_drawing(config: EvalConfig, benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark and the options that decide the images."""
    about = {"name": benchmark.name, "num_prompts": len(benchmark.prompts), "sha256": benchmark.sha256}
    return {
        "benchmark": about | benchmark.source,
        **{name: getattr(config, name) for name in DECIDING},
        **changed_later_options(config),
    }


def check_folder(folder: Path) -> None:
    """Check that an evaluation can begin, or go on, in a folder.

    Raises:
        InputError: something else is in it.
    """
    ours = (files.LOCK, files.HOLDER)
    if folder.is_dir() and not (folder / SETTINGS).is_file() and any(path.name not in ours for path in folder.iterdir()):
        raise InputError(f"output_dir: {str(folder)!r} is not empty and holds no evaluation; choose another folder")


def check_same(folder: Path, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that what a folder keeps was made by given settings, but for its systems.

    Raises:
        InputError: it was not.
    """
    before, now = LATER_OPTIONS | dict(kept), LATER_OPTIONS | dict(settings)
    for name, value in now.items():
        if name != "systems" and before.get(name) != value:
            difference = _difference(name, before.get(name), value)
            raise InputError(
                f"output_dir: {str(folder)!r} holds another evaluation: {difference}; choose another folder, or give "
                "--overwrite"
            )


def _difference(name: str, old: Any, new: Any) -> str:
    """How a setting in a folder differs from the one that is asked for, in words."""
    if name == "benchmark" and isinstance(old, dict):
        if old.get("name") != new["name"]:
            return f"benchmark {old.get('name')} there, {new['name']} asked for"
        if old.get("num_prompts") != new["num_prompts"]:
            return f"benchmark {new['name']}, {old.get('num_prompts')} prompts there, {new['num_prompts']} asked for"
        return f"benchmark {new['name']}, other prompts there"
    if isinstance(old, dict) and isinstance(new, dict):
        changed = next(part for part in new if old.get(part) != new[part])
        name, old, new = f"{name} of {changed}", old.get(changed), new[changed]
    return f"{name} {old} there, {new} asked for"
