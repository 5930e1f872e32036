"""No test may reach the network: the hub's client is told so before it is imported.

Two workers share the tests (pyproject.toml), each with one thread: two threads for one test are slower than that.
"""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

TRAINING_PROMPTS = ["a red circle", "two blue squares", "a crimson disc left of a green cross", "a navy box"]
HELDOUT_PROMPTS = ["a green square", "an ivory box and a golden triangle"]


def small_options(folder):
    """Options of a training of the tiny model that takes a second, with prompt files in the folder; no output_dir.

    Sampling and training use batches of one size throughout, so that the ratio before an update is 1 to the bit.
    """
    (folder / "prompts.txt").write_text("\n".join(TRAINING_PROMPTS) + "\n")
    (folder / "train.txt").write_text("\n".join(HELDOUT_PROMPTS) + "\n")
    return {
        "model": "tiny",
        "reward": "jpeg",
        "prompts": str(folder / "prompts.txt"),
        "heldout_prompts": str(folder / "train.txt"),
        "num_epochs": 1,
        "num_prompts_per_epoch": 2,
        "num_samples_per_prompt": 4,
        "num_updates_per_epoch": 2,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "lr_warmup_steps": 0,
        "lr_scheduler": "constant",
        "max_grad_norm": 1.0,
        "null_prompt": "adapted",
        "timestep_window": 1.0,
        "timestep_fraction": 1.0,
        "learning_rate": 1e-3,
        "clip_range": 5e-3,
        "ema_decay": 0.0,
        "sample_batch_size": 8,
        "micro_batch_size": 8,
        "rank": 4,
    }


@pytest.fixture
def small_run(tmp_path):
    return small_options(tmp_path)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """The same for fixtures that serve a whole file."""
    return small_options(tmp_path_factory.mktemp("prompts"))
