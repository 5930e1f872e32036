"""No test may reach the network: the hub's client is told so before it is imported."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

TRAINING_PROMPTS = ["a red circle", "two blue squares", "a crimson disc left of a green cross", "a navy box"]
HELDOUT_PROMPTS = ["a green square", "an ivory box and a golden triangle"]


@pytest.fixture
def small_run(tmp_path):
    """Options of a training of the tiny model that takes a second: fields of TrainConfig, with `output_dir` unset."""
    (tmp_path / "prompts.txt").write_text("\n".join(TRAINING_PROMPTS) + "\n")
    (tmp_path / "heldout.txt").write_text("\n".join(HELDOUT_PROMPTS) + "\n")
    return {
        "model": "tiny",
        "reward": "jpeg",
        "prompts": str(tmp_path / "prompts.txt"),
        "heldout_prompts": str(tmp_path / "heldout.txt"),
        "num_epochs": 1,
        "num_prompts_per_epoch": 2,
        "num_samples_per_prompt": 4,
        "num_updates_per_epoch": 2,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "timestep_window": 1.0,
        "timestep_fraction": 1.0,
        "learning_rate": 1e-3,
        "clip_range": 5e-3,
        "ema_decay": 0.0,
        "sample_batch_size": 8,
        "micro_batch_size": 8,
        "rank": 4,
    }


KNOWN_DEFECTS = (Path(__file__).parent / "known_defects.txt").read_text().splitlines()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Show tests that fail on defects not mended yet as xfailed; one leaves the list when it is mended."""
    for item in items:
        if any(item.name == name or item.name.startswith(f"{name}[") for name in KNOWN_DEFECTS):
            item.add_marker(pytest.mark.xfail(reason="a known defect, see tests/known_defects.txt", strict=False))
