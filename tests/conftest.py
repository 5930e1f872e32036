"""No test may reach the network: the hub's client is told so before it is imported.

No test may depend on where it runs either: commands print to a terminal of one width, whatever the environment says.
Two workers share the tests (pyproject.toml), each with one thread: two threads for one test are slower than that.
"""

import collections
import contextlib
import copy
import functools
import os
import runpy
import types
from dataclasses import replace
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "1000"  # so that a message is a line, also in processes of their own

TRAINING_PROMPTS = ["a red circle", "two blue squares", "a crimson disc left of a green cross", "a navy box"]
HELDOUT_PROMPTS = ["a green square", "an ivory box and a golden triangle"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark every case after the first n of a test marked quick(n) as slow."""
    seen = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("quick"):
            seen[item.path, item.originalname] += 1
            if seen[item.path, item.originalname] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Print each message of a command as a line."""
    from texforce import cli

    monkeypatch.setattr(cli.progress, "_width", 1000)
    monkeypatch.setattr(cli.output, "_width", 1000)


def small_options(folder):
    """Options of a training of the tiny model that takes a second, with prompt files in the folder; no output_dir.

    Sampling and training use batches of one size throughout, so that the ratio before an update is 1 to the bit.
    """
    (folder / "prompts.txt").write_text("\n".join(TRAINING_PROMPTS) + "\n")
    (folder / "heldout.txt").write_text("\n".join(HELDOUT_PROMPTS) + "\n")
    return {
        "model": "tiny",
        "algorithm": "ppo",
        "reward": "jpeg",
        "prompts": str(folder / "prompts.txt"),
        "heldout_prompts": str(folder / "heldout.txt"),
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


# --- the tiny world's drawings ---


@pytest.fixture(scope="session")
def tiny_build():
    """What tiny/build.py defines: how scenes of the tiny world are drawn and described, and how its models are trained."""
    return types.SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny" / "build.py")))


# --- small pipelines ---


def unet_config(cross_attention_dim):
    return {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": cross_attention_dim,
    }


def small_parts():
    """VAE and scheduler of a small pipeline, whose images of 32 pixels have latents of 8."""
    from diffusers import AutoencoderKL, DDIMScheduler

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return {"vae": vae, "scheduler": scheduler}


def small_text_encoder(cls, tokenizer, width, act):
    from transformers import CLIPTextConfig

    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=24,
            hidden_act=act,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """The folder of a Stable Diffusion pipeline with narrow layers and random weights. Do not change it."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from texforce import models

    folder = tmp_path_factory.mktemp("small") / "stable-diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(models.TINY / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusionPipeline(
            **small_parts(),
            unet=UNet2DConditionModel(**unet_config(16)),
            text_encoder=small_text_encoder(CLIPTextModel, tokenizer, 16, "quick_gelu"),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """The same of Stable Diffusion XL: its two tokenizers pad differently, as the published ones. Do not change it."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from texforce import models

    folder = tmp_path_factory.mktemp("small") / "sdxl"
    tokenizer = CLIPTokenizer.from_pretrained(models.TINY / "tokenizer")
    tokenizer_2 = CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", pad_token="!")  # noqa: S106
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            **unet_config(40),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=48,  # pooled text of 24, and 6 sizes of 4 numbers
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        )
        StableDiffusionXLPipeline(
            **small_parts(),
            unet=unet,
            text_encoder=small_text_encoder(CLIPTextModel, tokenizer, 16, "quick_gelu"),
            text_encoder_2=small_text_encoder(CLIPTextModelWithProjection, tokenizer_2, 24, "gelu"),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def narrow_model():
    """A function that gives copies, in a precision, of the tiny model with a small U-Net of random weights.

    Its images have 16 pixels, and a step takes a fraction of the time. The trained U-Net enlarges float32's rounding up to a
    thousandfold besides.
    """
    import torch

    from texforce import models

    load_model = models.load_model  # tests put this fixture's models in its place

    @functools.cache
    def load(dtype):
        base = load_model("tiny", dtype=dtype)
        shape = {
            "sample_size": 4,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = type(base.unet).from_config(dict(base.unet.config) | shape)
        return replace(base, unet=unet.requires_grad_(False).eval().to(dtype))

    def make(dtype=torch.float32):
        base = load(dtype)
        return replace(base, **{name: copy.deepcopy(getattr(base, name)) for name in ("text_encoder", "unet", "scheduler")})

    return make


@pytest.fixture
def peak_of_saved_bytes():
    """A context manager that gives the largest number of bytes that autograd kept at a time for backward passes.

    It takes a model, whose weights do not count.
    """
    import torch

    @contextlib.contextmanager
    def measure(model):
        weights = {p.untyped_storage().data_ptr() for part in model.policy_parts.values() for p in part.parameters()}
        holders, sizes, peak = {}, {}, [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
                holders[self.key] = holders.get(self.key, 0) + 1
                sizes[self.key] = 0 if self.key in weights else tensor.untyped_storage().nbytes()
                peak[0] = max(peak[0], sum(sizes.values()))

            def __del__(self):
                holders[self.key] -= 1
                if not holders[self.key]:
                    del holders[self.key], sizes[self.key]

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            yield peak
        assert not holders  # else something outlived the update

    return measure
