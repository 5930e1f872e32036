"""The policy, experience, advantages, losses, the learner and the update: against a textbook loop, and by hand."""

import errno
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import texforce
from texforce import (
    Batch,
    DivergedError,
    Share,
    detector,
    experience,
    models,
    rewards,
    sampler,
    tokenization,
)
from texforce.config import TrainConfig, TrainOptions, resolve, window_end
from texforce.errors import InputError, RewardError
from texforce.experience import PromptOrder, PromptStatistics, Samples, leave_one_out
from texforce.learner import MAX_SKIPPED_STEPS, Learner

from .small_models import all_tensors

PROMPTS = ["a red circle", "two blue squares", "a crimson disc left of a green cross"]
POLICIES = [("text-encoder", "adapted"), ("text-encoder", "base"), ("unet", "adapted"), ("both", "adapted")]
# Of five steps the last two deviate by 0.02 and 0.04 only: divided by them, rounding errors of float32 grow to 1e-5.
WIDE_STEPS, ALL_STEPS = [0, 1, 2], [0, 1, 2, 3, 4]
NAN = math.nan


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@dataclass
class Rig:
    """A policy with all that it is trained with."""

    policy: texforce.Policy
    config: TrainConfig
    scorer: Callable = brightness

    def sample(self, prompts: list[str] = PROMPTS, reward: rewards.Mixture | None = None) -> Samples:
        reward = reward or rewards.Mixture({"scorer": self.scorer}, {"scorer": 1.0})
        return experience.collect(self.policy, reward, prompts, self.config, torch.Generator().manual_seed(0))

    def collect(self, prompts: list[str] = PROMPTS) -> Batch:
        samples = self.sample(prompts)
        advantages = experience.compute_advantages(samples, self.config, PromptStatistics())
        return texforce.make_batch(samples, advantages, self.config, self.policy.model.device)

    def pairs(self, batch: Batch, steps: list[int] = WIDE_STEPS) -> Tensor:
        """The (image, step) pairs of all images and the steps, in a shuffled order."""
        pairs = torch.cartesian_prod(torch.arange(len(batch.rewards)), torch.tensor(steps))
        return pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]

    def learner(self) -> Learner:
        return Learner(self.policy.parameters, self.config)

    def accumulate(self, batch: Batch, pairs: Tensor, on_policy: bool = False, **options) -> texforce.UpdateStatistics:
        """Leave the gradient of the loss on the parameters."""
        for parameter in self.policy.parameters:
            parameter.grad = None
        config = replace(self.config, **options)
        learner = Learner(self.policy.parameters, config)
        return texforce.accumulate_gradients(
            self.policy, Share(batch, pairs, texforce.ppo_micro_batch, on_policy), learner, config
        )

    def gradient(self, batch: Batch, pairs: Tensor, **options) -> Tensor:
        self.accumulate(batch, pairs, **options)
        return gradient_of(self.policy.parameters)

    def update(self, batch: Batch, learner: Learner | None = None) -> texforce.UpdateStatistics:
        generator = torch.Generator().manual_seed(2)
        return texforce.ppo_update(self.policy, batch, learner or self.learner(), self.config, generator)

    def weights(self) -> Tensor:
        return flat(self.policy.parameters).clone()

    def perturb(self, size: float) -> None:
        """Move the weights off their start, so that ratios are not 1."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.policy.parameters:
                parameter += size * torch.randn(parameter.shape, generator=generator)


OPTIONS = {
    "model": "tiny", "algorithm": "ppo", "reward": "jpeg", "num_samples_per_prompt": 2, "num_inference_steps": 5, "rank": 4,
    "guidance_scale": 4.0, "timestep_window": 1.0, "timestep_fraction": 1.0, "ema_decay": 0.0, "micro_batch_size": 5,
    "lr_warmup_steps": 0, "lr_scheduler": "constant", "max_grad_norm": 1.0, "null_prompt": "adapted",
    "sample_batch_size": 6, "learning_rate": 1e-3, "num_updates_per_epoch": 1, "clip_range": 5e-4,
}  # fmt: skip


@pytest.fixture
def make_rig(narrow_model):
    """A function that makes a rig with some options, by default for the tiny model with a narrow U-Net."""

    def make(model: models.Model | None = None, **options) -> Rig:
        config = resolve(TrainOptions(**OPTIONS | options))
        model = model or narrow_model(models.DTYPES[config.mixed_precision])
        return Rig(texforce.make_policy(model, config), config)

    return make


def rounding_by_batch(rig: Rig) -> Rig:
    """The rig, whose updates are made as where rounding depends on a batch's size, in half precision or on a GPU."""
    rig.policy.rounds_by_batch = True
    return rig


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(parameters: list[nn.Parameter]) -> Tensor:
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def relative_difference(tensor: Tensor, reference: Tensor) -> float:
    return ((tensor.double() - reference).norm() / reference.norm()).item()


def with_log_probs(batch: Batch, log_probs: Tensor) -> Batch:
    return replace(batch, trajectory=replace(batch.trajectory, log_probs=log_probs))


@pytest.fixture
def shares(monkeypatch) -> list[Share]:
    """What each optimizer step of an update has learned from."""
    seen, original = [], texforce.accumulate_gradients

    def accumulate(policy, share, learner, config):
        seen.append(share)
        return original(policy, share, learner, config)

    monkeypatch.setattr(texforce, "accumulate_gradients", accumulate)
    return seen


# --- the policy ---


def test_lora_starts_as_the_base_model(make_rig):
    rig = make_rig(target="both")
    ids = tokenization.tokenize(rig.policy.model.tokenizer, PROMPTS)
    with torch.no_grad():
        tuned = rig.policy.conditioning(ids).prompt_embeds
        with rig.policy.base():
            base = rig.policy.conditioning(ids).prompt_embeds
        assert torch.equal(tuned, base)
        rig.perturb(1e-2)
        assert not torch.equal(rig.policy.conditioning(ids).prompt_embeds, base)
        with rig.policy.base():
            assert torch.equal(rig.policy.conditioning(ids).prompt_embeds, base)


def test_the_base_null_prompt_stays_where_it_was(make_rig):
    rig = make_rig(null_prompt="base")
    ids = tokenization.tokenize(rig.policy.model.tokenizer, PROMPTS)
    before = rig.policy.conditioning(ids)
    rig.perturb(1e-2)
    after = rig.policy.conditioning(ids)
    assert torch.equal(before.null_embeds, after.null_embeds)
    assert not torch.equal(before.prompt_embeds, after.prompt_embeds)


@pytest.mark.parametrize("target", ["unet", "both"])
def test_the_base_null_prompt_is_refused_where_the_unet_is_trained(target):
    with pytest.raises(InputError, match="null_prompt: base"):
        resolve(TrainOptions(**OPTIONS | {"target": target, "null_prompt": "base"}))


@pytest.mark.parametrize("target", ["text-encoder", "unet", "both"])
def test_only_lora_changes_in_an_update_and_it_is_float32(make_rig, target):
    rig = make_rig(target=target)
    before = {name: tensor.clone() for name, tensor in all_tensors(rig.policy.model).items()}
    rig.update(rig.collect())
    after = all_tensors(rig.policy.model)
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    lora = {name for name in after if ".lora_B." in name}  # the first update moves only these: lora_B is 0 before it
    assert changed >= lora
    assert all(".lora_A." in name for name in changed - lora)
    parts = {"text-encoder": {"text_encoder"}, "unet": {"unet"}, "both": {"text_encoder", "unet"}}[target]
    assert {name.split("/")[0] for name in changed} == parts
    assert all(after[name].dtype == torch.float32 for name in changed)
    assert rig.policy.state_dict().keys() == {name.replace("/", ".") for name in after if ".lora_" in name}


def test_lora_is_float32_over_a_frozen_model_of_half_precision(make_rig):
    rig = make_rig(mixed_precision="bf16", target="both")
    assert {parameter.dtype for parameter in rig.policy.parameters} == {torch.float32}
    frozen = [p for part in ("text_encoder", "unet", "vae") for p in getattr(rig.policy.model, part).parameters()]
    assert {parameter.dtype for parameter in frozen if not parameter.requires_grad} == {torch.bfloat16}


def test_an_adapter_of_another_rank_is_no_state_of_a_policy(make_rig):
    rig, other = make_rig(), make_rig(rank=8)
    before = rig.weights()
    with pytest.raises(InputError, match="other layers or another rank"):
        rig.policy.load_state_dict(other.policy.state_dict())
    assert torch.equal(rig.weights(), before)
    same = make_rig()
    same.perturb(1e-2)
    rig.policy.load_state_dict(same.policy.state_dict())
    assert torch.equal(rig.weights(), same.weights())


@pytest.mark.parametrize("eta", [1e-6, 1e-4])
def test_a_policy_without_a_single_trainable_step_is_refused_with_the_option(make_rig, eta):
    with pytest.raises(InputError, match=r"^eta, timestep_window: at eta .* none of the first 5 steps is random enough"):
        make_rig(eta=eta)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("target", "null_prompt"), POLICIES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_unet_samples_with_the_graph_that_it_is_trained_with(
    make_rig, target, null_prompt, precision, monkeypatch
):
    """A graph is made for each signature of its inputs; with and without gradients they are fused differently."""
    seen = []

    def compile(function, **options):
        def graph(latents, timesteps, embeds):
            given = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad) for tensor in (latents, embeds)]
            seen.append((torch.is_grad_enabled(), *given))
            return function(latents, timesteps, embeds)

        return graph

    monkeypatch.setattr(torch, "compile", compile)
    sizes = {"sample_batch_size": 3, "micro_batch_size": 3, "compile": True}
    rig = make_rig(target=target, null_prompt=null_prompt, mixed_precision=precision, **sizes)
    batch = rig.collect()
    sampling, number = set(seen), len(seen)
    statistics = rig.accumulate(batch, rig.pairs(batch, ALL_STEPS)[:6])
    training = set(seen[number:])
    assert len(training) == 1
    assert all(grad for grad, *_ in training)
    if precision == "bf16" or null_prompt == "adapted":  # else the branches of guidance are sampled as one batch
        assert training == sampling
        assert statistics.ratio_deviation == 0
    assert not batch.trajectory.latents.requires_grad
    rig.accumulate(batch, rig.pairs(batch, ALL_STEPS)[:8])
    assert set(seen[number:]) == training  # the last two pairs are filled up: another size would be compiled anew


@pytest.mark.parametrize(("text_trained", "given"), [(True, (True, True)), (False, (True, False)), (None, (False, False))])
def test_on_a_gpu_a_policy_that_is_not_compiled_samples_with_gradients_too(narrow_model, text_trained, given):
    """They choose the attention kernels there; a denoiser that is not trained keeps no activations."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    class Unet(nn.Conv2d):
        def forward(self, latents, timesteps, embeds, return_dict):
            seen.append((torch.is_grad_enabled(), embeds.requires_grad))
            return (super().forward(latents) + embeds.mean(),)

    seen = []
    schedule = sampler.ddim_schedule(narrow_model().scheduler, 5, 1.0)
    denoiser = sampler.Denoiser(Unet(4, 4, 1), schedule, 1.0, compile=False, text_trained=text_trained)
    latents, embeds = torch.zeros(2, 4, 8, 8).as_subclass(OnGpu), torch.zeros(2, 3, 4)
    with torch.no_grad():
        means, _ = denoiser.mean(latents, torch.zeros(2, dtype=torch.int64), models.Conditioning(embeds, embeds[:1]))
    assert seen == [given]
    assert not means.requires_grad


# --- experience ---


def test_every_prompt_comes_once_before_any_comes_again_and_an_order_goes_on_as_it_was():
    order = PromptOrder(["a", "b", "c"], torch.Generator().manual_seed(0))
    first, second = order.take(3), order.take(6)
    assert sorted(first) == sorted(second[:3]) == sorted(second[3:]) == ["a", "b", "c"]
    assert len({tuple(first), tuple(second[:3]), tuple(second[3:])}) > 1
    order.take(1)
    other = PromptOrder(order.prompts, torch.Generator().set_state(order.generator.get_state()))
    other.load_state_dict(order.state_dict())
    assert other.take(7) == order.take(7)


def test_the_images_of_a_prompt_lie_side_by_side_with_their_scores(make_rig):
    rig = make_rig()
    rig.scorer = lambda images, prompts: torch.tensor([float(PROMPTS.index(prompt)) for prompt in prompts])
    samples = rig.sample()
    assert samples.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert samples.rewards.tolist() == samples.parts["scorer"].tolist() == [0, 0, 1, 1, 2, 2]
    ids = tokenization.tokenize(rig.policy.model.tokenizer, samples.prompts)
    assert torch.equal(samples.trajectory.prompt_ids, ids)
    assert samples.local_indices.tolist() == list(range(6))


def test_one_batch_is_judged_while_the_next_is_sampled(make_rig, monkeypatch):
    """The first batch's judge waits for the second one's sampling to begin."""
    begun = [threading.Event(), threading.Event()]
    judged = []

    def scorer(images: Tensor, prompts: list[str]) -> Tensor:
        judged.append(begun[1].wait(30) or judged)
        return brightness(images, prompts)

    sizes = {"num_samples_per_prompt": 4, "sample_batch_size": 4}
    rig = replace(make_rig(**sizes), scorer=scorer)
    original, waiting = sampler.rollout, list(begun)
    monkeypatch.setattr(sampler, "rollout", lambda *args: (waiting.pop(0).set(), original(*args))[1])
    batch = rig.collect(PROMPTS[:2])
    monkeypatch.undo()
    assert judged == [True, True]
    assert torch.equal(batch.rewards, make_rig(**sizes).collect(PROMPTS[:2]).rewards)


def test_a_scorer_that_fails_in_the_background_ends_the_collection(make_rig):
    def scorer(images: Tensor, prompts: list[str]) -> Tensor:
        raise RewardError("reward: gone")

    with pytest.raises(RewardError, match="gone"):
        replace(make_rig(num_samples_per_prompt=4, sample_batch_size=4), scorer=scorer).collect()


def test_rewards_without_a_finite_one_are_a_reward_error(make_rig):
    rig = make_rig()
    rig.scorer = lambda images, prompts: torch.full((len(images),), NAN)
    with pytest.raises(RewardError, match="no finite score"):
        rig.collect()


def break_images(monkeypatch, numbers: set[int]) -> None:
    """Make the images of these numbers, in their order of sampling, NaN."""
    original, count = sampler.rollout, iter(range(1000))

    def rollout(*args, **kwargs):
        trajectory = original(*args, **kwargs)
        for latents, log_probs in zip(trajectory.latents, trajectory.log_probs, strict=True):
            if next(count) in numbers:
                latents[1:], log_probs[:] = NAN, NAN
        return trajectory

    monkeypatch.setattr(sampler, "rollout", rollout)


@pytest.mark.parametrize("sample_batch_size", [1, 2])
def test_a_broken_image_is_dropped_and_no_scorer_sees_it_alone(make_rig, monkeypatch, sample_batch_size):
    rig = make_rig(sample_batch_size=sample_batch_size, kl_weight=0.1)
    break_images(monkeypatch, {2})

    def scorer(images, prompts):
        assert images.isfinite().any()
        return brightness(images, prompts)

    rig.scorer = scorer
    batch = rig.collect()
    assert batch.rewards.isnan().tolist() == [False, False, True, False, False, False]
    before = rig.weights()
    rig.update(batch)  # for the KL term images without advantage count too
    assert rig.weights().isfinite().all()
    assert not torch.equal(rig.weights(), before)


def test_an_epoch_without_a_finite_image_stops_the_run(make_rig, monkeypatch):
    rig = make_rig(sample_batch_size=1)
    break_images(monkeypatch, set(range(6)))
    with pytest.raises(DivergedError, match="images are not finite"):
        rig.collect()


def test_one_unit_holds_for_all_images_that_are_compared(make_rig):
    rig = make_rig(sample_batch_size=2)
    parts = {"a": brightness, "b": lambda images, _: 50 * images[:, 0].mean(dim=(1, 2))}
    samples = rig.sample(reward=rewards.Mixture(parts, {"a": 1.0, "b": 1.0}, normalise=True))
    expected = sum(part / part.std(correction=0) for part in samples.parts.values())
    torch.testing.assert_close(samples.rewards, expected, rtol=1e-4, atol=1e-5)


# --- advantages ---


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("size", [3, 7, 8, 11])
def test_leave_one_out_of_equal_rewards_is_zero_to_the_bit(size):
    rewards = torch.stack([torch.full((size,), value) for value in (0.7, 0.1, 1 / 3)])
    assert not leave_one_out(rewards).any()
    rewards[:, 1] = NAN
    assert not leave_one_out(rewards).any()


def test_leave_one_out_passes_over_dropped_samples():
    rewards = torch.tensor([[NAN, 4.0, 8.0], [NAN, 5.0, NAN], [NAN, NAN, NAN]])
    assert leave_one_out(rewards).tolist() == [[0.0, -4.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_leave_one_out_advantages_of_a_group_sum_to_zero_and_equal_k_over_k_minus_one_times_the_centred_rewards():
    rewards = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = leave_one_out(rewards)
    torch.testing.assert_close(advantages, 7 / 6 * (rewards - rewards.mean(dim=1, keepdim=True)))


def scored(prompts: list[str], values: list[float]) -> Samples:
    """Samples of which only the rewards count."""
    rewards = torch.tensor(values)
    return Samples(prompts, None, rewards, {"scorer": rewards}, torch.arange(len(values)))


def test_advantages_are_in_standard_deviations_and_clipped():
    config = resolve(TrainOptions(model="tiny", algorithm="ppo", num_samples_per_prompt=3, advantage_clip=1.5))
    samples = scored(["a"] * 3 + ["b"] * 3, [1.0, 2.0, 6.0, NAN, 3.0, 5.0])
    raw = torch.tensor([-3.0, -1.5, 4.5, 0.0, -2.0, 2.0])
    std = torch.tensor([-3.0, -1.5, 4.5, -2.0, 2.0]).std(correction=0)
    expected = (raw / std).clamp(-1.5, 1.5)
    assert expected.max() == 1.5
    torch.testing.assert_close(experience.compute_advantages(samples, config, PromptStatistics()), expected)


def test_self_imitation_adds_what_is_above_the_epochs_mean_and_nothing_below_it():
    rewards_of = torch.tensor([1.0, 1.0, 3.0, 3.0, 0.0, 2.0, NAN, 2.0])  # finite mean 12 / 7
    deviation = (torch.tensor([1.0, 1, 3, 3, 0, 2, 2]) - 12 / 7).square().mean().sqrt()
    above = torch.tensor([0, 0, 9 / 7, 9 / 7, 0, 2 / 7, 0, 2 / 7]) / deviation
    torch.testing.assert_close(experience.above_mean(rewards_of), above)
    samples = Samples(["a"] * 2 + ["b"] * 2 + ["c"] * 2 + ["d"] * 2, None, rewards_of, {}, torch.arange(8))
    options = {"model": "tiny", "algorithm": "matching", "num_samples_per_prompt": 2}
    plain, imitating = (
        experience.compute_advantages(samples, resolve(TrainOptions(**options, imitation_weight=weight)), PromptStatistics())
        for weight in (0.0, 0.5)
    )
    torch.testing.assert_close(imitating, plain + 0.5 * above)
    assert plain[2] == 0 < imitating[2]  # a group of equal rewards teaches by imitation alone
    assert experience.above_mean(torch.full((6,), 0.333)).abs().max() == 0  # whose mean is rounded
    ppo = resolve(TrainOptions(**options | {"algorithm": "ppo"}, imitation_weight=0.5))  # as a saved config may hold it
    torch.testing.assert_close(experience.compute_advantages(samples, ppo, PromptStatistics()), plain)


def test_advantages_by_prompt_are_those_of_the_statistics_clipped_and_are_remembered():
    config = resolve(
        TrainOptions(model="tiny", algorithm="ppo", advantages="per-prompt", num_samples_per_prompt=1, advantage_clip=0.9)
    )
    statistics = PromptStatistics(min_count=2)
    samples = scored(["a", "a", "b"], [1.0, 3.0, 2.0])
    advantages = experience.compute_advantages(samples, config, statistics)
    assert advantages.tolist() == pytest.approx([-0.9, 0.9, 0.0])
    assert {prompt: list(seen) for prompt, seen in statistics.history.items()} == {"a": [1.0, 3.0], "b": [2.0]}


def test_prompt_statistics_by_hand_before_and_after_min_count():
    statistics = PromptStatistics(buffer_size=4, min_count=3)
    # Nothing is known of either prompt: mean 3 and deviation 2 of the batch.
    advantages = statistics.advantages(["a", "b"], torch.tensor([1.0, 5.0]))
    assert advantages.tolist() == pytest.approx([-1.0, 1.0], abs=1e-5)
    # a is now known from 1, 3, 8: mean 4, deviation sqrt(26 / 3). b is from two only: the batch's mean 7 and its deviation.
    batch = torch.tensor([3.0, 10.0, 8.0])
    advantages = statistics.advantages(["a", "b", "a"], batch)
    expected = [-1 / (26 / 3) ** 0.5, (10 - 7) / batch.std(correction=0).item(), 4 / (26 / 3) ** 0.5]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    # The buffer holds the last four: 3, 8, 0, 1 of mean 3 and deviation sqrt(38 / 4).
    advantages = statistics.advantages(["a", "a"], torch.tensor([0.0, 1.0]))
    assert advantages.tolist() == pytest.approx([-3 / 9.5**0.5, -2 / 9.5**0.5], abs=1e-5)


@pytest.mark.parametrize("min_count", [3, 100])
def test_prompt_statistics_of_equal_rewards_give_no_advantage_to_the_bit(min_count):
    statistics = PromptStatistics(min_count=min_count)
    for _ in range(2):
        assert not statistics.advantages(["a"] * 7, torch.full((7,), 0.7)).any()


def test_prompt_statistics_pass_over_dropped_samples():
    statistics = PromptStatistics(min_count=2)
    advantages = statistics.advantages(["a", "a", "a"], torch.tensor([1.0, NAN, 3.0]))
    assert advantages.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)
    assert list(statistics.history["a"]) == [1.0, 3.0]


# --- (image, step) pairs ---


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 4), (0.5, 2), (0.01, 1)])
def test_pairs_are_a_fraction_of_the_trainable_steps_of_each_image(fraction, expected):
    config = resolve(TrainOptions(model="tiny", algorithm="ppo", timestep_fraction=fraction))
    pairs = texforce.draw_pairs(4, torch.tensor([0, 1, 2, 5]), config, torch.Generator().manual_seed(0)).tolist()
    assert len({tuple(pair) for pair in pairs}) == len(pairs) == 4 * expected
    assert {image for image, _ in pairs} == {0, 1, 2, 3}
    assert {step for _, step in pairs} <= {0, 1, 2, 5}


def test_steps_are_drawn_anew_for_each_image_and_all_of_them_sometimes():
    config = resolve(TrainOptions(model="tiny", algorithm="ppo", timestep_fraction=0.25))
    pairs = texforce.draw_pairs(400, torch.arange(4), config, torch.Generator().manual_seed(0))
    assert torch.bincount(pairs[:, 1]).tolist() == pytest.approx([100] * 4, abs=40)


@pytest.mark.parametrize(("window", "expected"), [(1.0, [0, 1, 2, 3, 4]), (0.6, [0, 1, 2]), (0.5, [0, 1, 2]), (0.01, [0])])
def test_the_window_holds_the_first_and_noisiest_steps(narrow_model, window, expected):
    config = resolve(TrainOptions(model="tiny", algorithm="ppo", timestep_window=window, num_inference_steps=5))
    schedule = sampler.ddim_schedule(narrow_model().scheduler, 5, 1.0)
    steps = texforce.trainable_steps(schedule, config)
    assert steps.tolist() == expected
    assert schedule.std[steps].min() >= schedule.std[len(steps) :].max() if len(steps) < 5 else True


@pytest.mark.parametrize(("window", "num_steps", "expected"), [(0.28, 25, 7), (0.14, 50, 7), (0.55, 100, 55), (0.29, 25, 8)])
def test_the_windows_end_is_not_what_rounding_makes_of_it(window, num_steps, expected):
    config = resolve(TrainOptions(model="tiny", algorithm="ppo", timestep_window=window, num_inference_steps=num_steps))
    assert window_end(config) == expected


def test_a_step_without_density_is_never_trained_on():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)  # its last step has no variance
    schedule = sampler.ddim_schedule(scheduler, 5, 1.0)
    config = resolve(TrainOptions(model="tiny", algorithm="ppo", timestep_window=1.0, num_inference_steps=5))
    assert schedule.std[-1] == 0
    assert texforce.trainable_steps(schedule, config).tolist() == [0, 1, 2, 3]


def test_steps_without_randomness_are_not_trained_on(make_rig):
    rig = make_rig(deterministic_elsewhere=True, timestep_window=0.6)
    batch = rig.collect()
    assert (rig.policy.denoiser.schedule.std[3:] == 0).all()
    assert (rig.policy.drawing_denoiser.schedule.std > 0).all()
    assert texforce.trainable_steps(rig.policy.denoiser.schedule, rig.config).tolist() == [0, 1, 2]
    rig.perturb(1e-2)
    pairs = rig.pairs(batch)[:9]
    gradient = rig.gradient(batch, pairs)
    assert relative_difference(gradient, textbook_gradient(rig, batch, pairs)) <= 1e-5


def test_an_update_trains_on_steps_of_the_window_only(make_rig, shares):
    rig = make_rig(timestep_window=0.4)
    rig.update(rig.collect())
    assert set(torch.cat([share.pairs for share in shares])[:, 1].tolist()) == {0, 1}


# --- a range of steps for the adapter ---


def is_outside(config: TrainConfig, k: int) -> bool:
    """Whether step k is none of adapter_steps, by the definition."""
    first, end = map(float, (config.adapter_steps or "0-1").split("-"))
    return not first <= (k + 0.5) / config.num_inference_steps < end


def textbook_log_prob(rig: Rig, trajectory: sampler.Trajectory, image: int, k: int) -> float:
    """The log-probability of a sampled step whose text comes from the base text encoder outside adapter_steps."""
    model, config, scheduler = rig.policy.model, rig.config, rig.policy.model.scheduler
    scheduler.set_timesteps(config.num_inference_steps)
    timestep, latents = scheduler.timesteps[k], trajectory.latents[image, k][None]
    null_ids = tokenization.tokenize(model.tokenizer, [""])
    texts = []
    for ids, is_base in ((null_ids, config.null_prompt == "base"), (trajectory.prompt_ids[image][None], False)):
        with rig.policy.base() if is_base or is_outside(config, k) else nullcontext():
            texts.append(model.text_encoder(input_ids=ids).last_hidden_state)
    null, text = (model.unet(latents, timestep, embeds).sample for embeds in texts)  # its LoRA, if any, is on
    noise_pred = null + config.guidance_scale * (text - null)
    mean = scheduler.step(noise_pred, timestep, latents, eta=1.0, variance_noise=torch.zeros_like(latents)).prev_sample
    previous = timestep - scheduler.config.num_train_timesteps // config.num_inference_steps
    std = scheduler._get_variance(timestep, previous).sqrt()
    return Normal(mean, std).log_prob(trajectory.latents[image, k + 1][None]).mean().item()


@pytest.mark.parametrize(("target", "null_prompt"), [policy for policy in POLICIES if policy[0] != "unet"])
def test_outside_adapter_steps_the_base_text_encoder_conditions_the_denoiser(make_rig, target, null_prompt):
    rig = make_rig(target=target, null_prompt=null_prompt, adapter_steps="0.2-0.6")
    rig.perturb(3e-2)
    trajectory = rig.collect().trajectory
    with torch.no_grad():
        expected = [textbook_log_prob(rig, trajectory, 1, k) for k in WIDE_STEPS]
        wrong = [textbook_log_prob(replace(rig, config=replace(rig.config, adapter_steps=None)), trajectory, 1, 0)]
    assert trajectory.log_probs[1, WIDE_STEPS].tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(wrong[0] - expected[0]) > 1e-4  # the adapter would show


@pytest.mark.parametrize(("steps", "expected"), [
    ("0.8-1", [4]), ("0-0.5", [0, 1]), ("0.5-1", [2, 3, 4]), ("0.1-0.3", [0]), ("0-1", ALL_STEPS),
])  # fmt: skip
def test_ppo_trains_the_steps_in_adapter_steps_alone_and_their_ratio_is_one(make_rig, shares, steps, expected):
    rig = make_rig(adapter_steps=steps, sample_batch_size=6, micro_batch_size=6)
    assert texforce.trainable_steps(rig.policy.denoiser.schedule, rig.config).tolist() == expected
    rig.perturb(1e-2)
    statistics = rig.update(rig.collect())
    assert set(torch.cat([share.pairs for share in shares])[:, 1].tolist()) == set(expected)
    assert statistics.first_ratio_deviation <= texforce.FLOAT32_TOLERANCE


@pytest.mark.parametrize("null_prompt", ["adapted", "base"])
def test_the_gradient_within_adapter_steps_equals_that_of_the_textbook_loop(make_rig, null_prompt):
    rig = make_rig(adapter_steps="0.2-0.6", null_prompt=null_prompt, kl_weight=0.3)
    rig.perturb(1e-2)
    batch = rig.collect()
    rig.perturb(1e-2)
    pairs = rig.pairs(batch, [1, 2])[:6]
    gradient = rig.gradient(batch, pairs)
    assert relative_difference(gradient, textbook_gradient(rig, batch, pairs)) <= 1e-5


@pytest.mark.parametrize(("steps", "window"), [("0.3-0.5", 1.0), ("0.2-1", 0.6), ("0-0.4", 0.6), ("0.8-1", 1.0)])
def test_matching_draws_its_noise_levels_within_adapter_steps_and_all_of_them(make_rig, steps, window):
    rig = make_rig(**MATCHING | {"num_noise_levels": 4, "noise_window": window, "adapter_steps": steps})
    levels = texforce.draw_noising(rig.policy, 5000, rig.config, torch.Generator().manual_seed(0)).levels
    first, end = map(float, steps.split("-"))
    inside = [k for k in range(1000) if first <= 1 - k / 1000 and (1 - k / 1000 < end or end == 1)]
    wanted = [k for k in inside if k >= int((1 - window) * 999)]
    assert sorted(set(levels.flatten().tolist())) == wanted
    strata = levels.sort(dim=1).values
    assert torch.equal(strata, levels)  # one of each quarter of them
    assert (torch.searchsorted(torch.tensor(wanted), levels) * 4 // len(wanted) - torch.arange(4)).abs().max() <= 1


def test_a_range_that_holds_no_noise_level_is_refused(make_rig):
    with pytest.raises(InputError, match=r"adapter_steps: holds none of the model's noise levels: 0\.3122-0\.3128"):
        make_rig(**MATCHING | {"noise_window": 1.0, "adapter_steps": "0.3122-0.3128", "num_inference_steps": 8})


def test_a_range_without_a_random_step_is_refused(make_rig):
    with pytest.raises(InputError, match=r"none of the first 5 steps in adapter_steps 0\.8-1 is random enough"):
        make_rig(adapter_steps="0.8-1", timestep_window=0.9, eta=1e-4)


# --- the loss ---


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), [
    (1.5, 2.0, -2.4, 0.0),  # already more likely than the range allows
    (0.5, 2.0, -1.0, -1.0),  # less likely, but to become more so
    (1.5, -2.0, 3.0, 3.0),  # more likely, but to become less so
    (0.5, -2.0, 1.6, 0.0),  # already less likely than the range allows
    (1.1, 2.0, -2.2, -2.2),
    (0.9, -2.0, 1.8, 1.8),
])  # fmt: skip
def test_clipping_stops_only_the_gradient_that_moves_further_away(ratio, advantage, loss, gradient):
    old_log_probs = torch.tensor([-3.0])
    log_probs = (old_log_probs + math.log(ratio)).requires_grad_()
    value = texforce.ppo_loss(log_probs, old_log_probs, torch.tensor([advantage]), clip_range=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert log_probs.grad.item() == pytest.approx(gradient)


def test_at_a_ratio_of_one_the_gradient_is_the_policy_gradient():
    log_probs = torch.tensor([-1.0, -2.0, 0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 2.0])
    loss = texforce.ppo_loss(log_probs, log_probs.detach(), advantages, clip_range=1e-4)
    loss.backward()
    assert loss.item() == pytest.approx(-advantages.mean().item())
    torch.testing.assert_close(log_probs.grad, -advantages / 3)


def test_the_loss_is_the_mean_over_pairs():
    log_probs, old = torch.tensor([0.1, -0.2, 0.0]), torch.zeros(3)
    each = [texforce.ppo_loss(log_probs[i : i + 1], old[i : i + 1], torch.tensor([i - 1.0]), 0.15) for i in range(3)]
    together = texforce.ppo_loss(log_probs, old, torch.tensor([-1.0, 0.0, 1.0]), 0.15)
    assert together.item() == pytest.approx(sum(each).item() / 3)


# --- the gradient, against a textbook loop ---


def textbook_loss(rig: Rig, trajectory: sampler.Trajectory, advantage: float, image: int, k: int) -> Tensor:
    """PPO's loss of one image at one step, as one would write it down; everything is run anew, in float64."""
    model, config = rig.policy.model, rig.config
    scheduler = model.scheduler
    scheduler.set_timesteps(config.num_inference_steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    timestep = scheduler.timesteps[k]
    assert timestep == trajectory.timesteps[image, k]
    latents, next_latents = trajectory.latents[image, k][None].double(), trajectory.latents[image, k + 1][None].double()
    ids, null_ids = (
        trajectory.prompt_ids[image][None],
        model.tokenizer([""], padding="max_length", return_tensors="pt").input_ids,
    )

    def embed(ids: Tensor) -> Tensor:
        return model.text_encoder(input_ids=ids).last_hidden_state

    def transition(ids: Tensor) -> Normal:
        noise_pred = model.unet(latents, timestep, embed(ids)).sample
        if config.guidance_scale > 1:
            if config.null_prompt == "base":  # neither its embedding nor the frozen U-Net's prediction for it is trained
                with rig.policy.base(), torch.no_grad():
                    null_pred = model.unet(latents, timestep, embed(null_ids)).sample
            else:
                null_pred = model.unet(latents, timestep, embed(null_ids)).sample
            noise_pred = null_pred + config.guidance_scale * (noise_pred - null_pred)
        noise = torch.zeros_like(latents)
        mean = scheduler.step(noise_pred, timestep, latents, eta=config.eta, variance_noise=noise).prev_sample
        previous = timestep - scheduler.config.num_train_timesteps // config.num_inference_steps
        return Normal(mean, config.eta * scheduler._get_variance(timestep, previous).sqrt())

    distribution = transition(ids)
    log_prob = distribution.log_prob(next_latents).mean()
    ratio = (log_prob - trajectory.log_probs[image, k].double()).exp()
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    if config.kl_weight:
        with rig.policy.base(), torch.no_grad():
            base = transition(tokenization.without_learned(ids, model.tokenizer.pad_token_id))
        loss = loss + config.kl_weight * kl_divergence(distribution, base).mean()
    return loss


def textbook_gradient(rig: Rig, batch: Batch, pairs: Tensor) -> Tensor:
    """The gradient of the mean of textbook_loss, one pair at a time; leaves the models in float64."""
    rig.policy.model.text_encoder.double()
    rig.policy.model.unet.double()
    for parameter in rig.policy.parameters:
        parameter.grad = None
    for image, k in pairs.tolist():
        loss = textbook_loss(rig, batch.trajectory, batch.advantages[image].item(), image, k)
        (loss / len(pairs)).backward()
    return gradient_of(rig.policy.parameters)


@pytest.mark.quick(3)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize(("target", "null_prompt", "guidance_scale"), [(*policy, 4.0) for policy in POLICIES] + [
    ("both", "adapted", 1.0), ("tokens", "base", 4.0),
])  # fmt: skip
def test_the_gradient_equals_that_of_the_textbook_loop(make_rig, target, null_prompt, guidance_scale, kl_weight):
    options = {"target": target, "null_prompt": null_prompt, "guidance_scale": guidance_scale, "kl_weight": kl_weight}
    rig = make_rig(sample_batch_size=4, **options)
    batch = rig.collect()
    rig.perturb(1e-2)
    pairs = rig.pairs(batch)[:8]
    statistics = rig.accumulate(batch, pairs)
    gradient = gradient_of(rig.policy.parameters)
    assert 0 < statistics.num_clipped < len(pairs)
    reference = textbook_gradient(rig, batch, pairs)
    assert relative_difference(gradient, reference) <= 1e-5


@pytest.mark.parametrize("target", ["text-encoder", "unet"])
def test_the_gradient_at_the_narrow_last_steps_equals_the_textbook_loops_but_for_rounding(make_rig, target):
    rig = make_rig(target=target)
    batch = rig.collect()
    rig.perturb(1e-3)
    pairs = rig.pairs(batch, ALL_STEPS)[:10]
    assert set(pairs[:, 1].tolist()) == set(ALL_STEPS)
    gradient = rig.gradient(batch, pairs)
    reference = textbook_gradient(rig, batch, pairs)
    assert relative_difference(gradient, reference) <= 2e-4


# --- matching ---


MATCHING = {"algorithm": "matching", "num_noise_levels": 3, "num_inner_epochs": 1, "kl_weight": 0.0, "null_anchor": 0.0}


def matching_share(rig: Rig, batch: Batch) -> Share:
    """All (image, noising) pairs of a batch, in a shuffled order, with noisings of their own."""
    generator = torch.Generator().manual_seed(4)
    noising = texforce.draw_noising(rig.policy, len(PROMPTS), rig.config, generator)
    loss = functools.partial(texforce.matching_micro_batch, noising=noising)
    pairs = torch.cartesian_prod(torch.arange(len(batch.rewards)), torch.arange(rig.config.num_noise_levels))
    return Share(batch, pairs[torch.randperm(len(pairs), generator=generator)], loss)


def textbook_matching_loss(rig: Rig, batch: Batch, noising: texforce.Noising, image: int, draw: int) -> Tensor:
    """Advantage-weighted matching of one image at one noise level, as one would write it down; in float64."""
    model, config = rig.policy.model, rig.config
    group = image // config.num_samples_per_prompt
    timestep, noise = noising.levels[group, draw], noising.noise[group, draw].double()
    model.scheduler.alphas_cumprod = model.scheduler.alphas_cumprod.double()
    model.scheduler.set_timesteps(config.num_inference_steps)
    sample = batch.latents[image].double()
    noised = model.scheduler.add_noise(sample[None], noise[None], timestep[None])

    def predict() -> Tensor:
        embeds = model.text_encoder(input_ids=batch.prompt_ids[image][None]).last_hidden_state
        output = model.unet(noised, timestep, embeds).sample
        return model.scheduler.step(output, timestep, noised).pred_original_sample[0]

    prediction = predict()
    error = prediction - sample
    loss = batch.advantages[image].double() * error.square().mean() / error.detach().abs().mean()
    if config.kl_weight:
        with rig.policy.base(), torch.no_grad():
            base = predict()
        loss = loss + config.kl_weight * (prediction - base).square().mean()
    return loss


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("target", "kl_weight"), [("text-encoder", 0.0), ("text-encoder", 0.3), ("unet", 0.3), ("both", 0.0), ("tokens", 0.0)]
)
def test_the_gradient_of_matching_equals_that_of_the_textbook_loop(make_rig, target, kl_weight):
    rig = make_rig(target=target, **MATCHING | {"kl_weight": kl_weight})
    batch = rig.collect()
    assert batch.trajectory is None
    rig.perturb(1e-2)
    share, learner = matching_share(rig, batch), rig.learner()
    statistics = texforce.accumulate_gradients(rig.policy, share, learner, rig.config)
    gradient = gradient_of(rig.policy.parameters)
    rig.policy.model.text_encoder.double()
    rig.policy.model.unet.double()
    rig.learner().optimizer.zero_grad()
    losses = [textbook_matching_loss(rig, batch, share.loss.keywords["noising"], *pair) for pair in share.pairs.tolist()]
    (torch.stack(losses).sum() / len(losses)).backward()
    assert relative_difference(gradient, gradient_of(rig.policy.parameters)) <= 1e-5
    weighted = torch.stack(losses).mean().item() - kl_weight * statistics.kl / len(losses)
    assert statistics.loss / len(losses) == pytest.approx(weighted, rel=1e-3, abs=1e-6)


def gradients_in_micro_batches(rig: Rig, share: Share, sizes: tuple[int, ...]) -> list[Tensor]:
    """The gradient of a share, gathered over micro-batches of each size."""
    gradients = []
    for size in sizes:
        learner = rig.learner()
        learner.micro_batch_size = size
        learner.optimizer.zero_grad()
        texforce.accumulate_gradients(rig.policy, share, learner, rig.config)
        gradients.append(gradient_of(rig.policy.parameters))
    return gradients


def test_the_micro_batch_size_does_not_change_the_gradient_of_matching(make_rig):
    rig = make_rig(**MATCHING | {"kl_weight": 0.1})
    batch = rig.collect()
    rig.perturb(1e-2)
    reference, *others = gradients_in_micro_batches(rig, matching_share(rig, batch), (1, 7, 64))
    assert all(relative_difference(gradient, reference) <= 1e-5 for gradient in others)


def test_noise_levels_are_stratified_over_the_noisiest_share_of_them(make_rig):
    rig = make_rig(**MATCHING | {"num_noise_levels": 4, "noise_window": 0.6})
    noising = texforce.draw_noising(rig.policy, 1000, rig.config, torch.Generator().manual_seed(0))
    assert noising.levels.shape == (1000, 4)
    assert noising.noise.shape == (1000, 4, *rig.policy.latent_shape)
    edges = [0.4 + 0.15 * stratum for stratum in range(5)]
    for stratum, (low, high) in enumerate(itertools.pairwise(edges)):
        shares = noising.levels[:, stratum] / 999
        assert low - 2e-3 <= shares.min() < low + 0.01
        assert high - 0.01 < shares.max() <= high


def test_images_of_a_prompt_are_noised_alike_and_only_images_with_a_finite_reward_are(make_rig, shares):
    rig = make_rig(**MATCHING)
    batch = rig.collect()
    rewards_with_a_gap = batch.rewards.clone()
    rewards_with_a_gap[1] = NAN
    texforce.matching_update(
        rig.policy, replace(batch, rewards=rewards_with_a_gap), rig.learner(), rig.config, torch.Generator().manual_seed(0)
    )
    (share,) = shares
    assert sorted(set(share.pairs[:, 0].tolist())) == [0, 2, 3, 4, 5]
    assert share.loss.keywords["noising"].noise.shape[:2] == (len(PROMPTS), 3)


@pytest.mark.slow
def test_an_epoch_of_matching_raises_the_reward_of_what_is_drawn(make_rig):
    """The policy is moved towards its brighter images, and draws brighter ones from the same noise."""
    options = {"num_inner_epochs": 8, "num_samples_per_prompt": 8, "sample_batch_size": 24, "learning_rate": 2e-3}
    rig = make_rig(models.load_model("tiny"), **MATCHING | options)
    before = rig.sample().rewards.mean()
    texforce.matching_update(rig.policy, rig.collect(), rig.learner(), rig.config, torch.Generator().manual_seed(0))
    assert rig.sample().rewards.mean() > before + 0.005


# --- relabelling ---

CAPTIONS = ["a blue square", None, "two red circles", None, None, "a blue square"]
RELABEL = MATCHING | {"relabel": "world", "eval_reward": ["jpeg"]}


def relabelled(rig: Rig, captions: list[str | None] = CAPTIONS) -> Batch:
    """A batch whose images have captions."""
    mixture = rewards.Mixture({}, {}) if rig.config.reward == "none" else rewards.Mixture({"a": brightness}, {"a": 1.0})
    mixture.captioner = lambda images, prompts: captions
    samples = rig.sample(reward=mixture)
    advantages = experience.compute_advantages(samples, rig.config, PromptStatistics())
    return texforce.make_batch(samples, advantages, rig.config, rig.policy.model.device)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("reward", "target", "kl_weight"), [
    ("jpeg", "text-encoder", 0.3), ("jpeg", "both", 0.0), ("none", "text-encoder", 0.0),
])  # fmt: skip
def test_the_gradient_of_relabelled_images_equals_that_of_the_textbook_loop(make_rig, shares, reward, target, kl_weight):
    """Each image under its prompt, and with a constant weight under its caption, over the number of images."""
    rig = make_rig(**RELABEL | {"reward": reward, "target": target, "kl_weight": kl_weight, "relabel_weight": 0.7})
    batch = relabelled(rig)
    assert (batch.advantages == 0).all() == (reward == "none")
    rig.perturb(1e-2)
    learner = rig.learner()
    learner.step = lambda: 0.0
    statistics = texforce.matching_update(rig.policy, batch, learner, rig.config, torch.Generator().manual_seed(0))
    gradient = gradient_of(rig.policy.parameters)
    rig.policy.model.text_encoder.double()
    rig.policy.model.unet.double()
    rig.learner().optimizer.zero_grad()
    captions = tokenization.tokenize(rig.policy.model.tokenizer, [caption or "" for caption in CAPTIONS])
    under_caption = replace(batch, prompt_ids=captions, advantages=torch.full((6,), 0.7))
    noising = shares[0].loss.keywords["noising"]
    for image, draw in itertools.product(range(6), range(3)):
        loss = textbook_matching_loss(rig, batch, noising, image, draw)
        if CAPTIONS[image]:
            loss = loss + textbook_matching_loss(rig, under_caption, noising, image, draw)
        (loss / 18).backward()
    assert relative_difference(gradient, gradient_of(rig.policy.parameters)) <= 1e-5
    own = 0 if reward == "none" and not kl_weight else 18  # nothing is learned of these, so they are not run
    assert statistics.num_pairs == own + 9
    assert statistics.num_unet_calls == (own + 9) * (2 if kl_weight else 1)


@pytest.mark.slow
def test_the_micro_batch_size_does_not_change_the_gradient_of_relabelled_images(make_rig):
    rig = make_rig(**RELABEL | {"kl_weight": 0.1})
    batch = relabelled(rig)
    rig.perturb(1e-2)
    share, gradients = matching_share(rig, batch), []
    for size in (1, 4, 64):
        learner = rig.learner()
        learner.micro_batch_size = size
        learner.optimizer.zero_grad()
        texforce.gather_gradients(rig.policy, [share, texforce.relabelled_share(share, rig.config)], learner, rig.config)
        gradients.append(gradient_of(rig.policy.parameters))
    assert all(relative_difference(gradient, gradients[0]) <= 1e-5 for gradient in gradients[1:])


def test_an_optimizer_step_without_anything_to_learn_from_is_skipped(make_rig, shares):
    rig = make_rig(**RELABEL | {"reward": "none"})
    before = rig.weights()
    batch = relabelled(rig, [None] * 6)
    texforce.matching_update(rig.policy, batch, rig.learner(), rig.config, torch.Generator().manual_seed(0))
    assert torch.equal(rig.weights(), before)
    assert shares == []


def test_a_dropped_image_is_not_relabelled(make_rig):
    rig = make_rig(**RELABEL)
    mixture = rewards.Mixture({"a": lambda images, prompts: [NAN, 1, 2, 3, 4, NAN]}, {"a": 1.0})
    mixture.captioner = lambda images, prompts: CAPTIONS
    assert rig.sample(reward=mixture).captions == [None, None, "two red circles", None, None, None]


def test_the_worlds_captions_are_right_of_images_that_are_not_right_for_their_prompts(make_rig):
    rig = make_rig(models.load_model("tiny"), **RELABEL)
    seen: list[Tensor] = []

    def alignment(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(images)
        return detector.alignment(images, prompts)

    mixture = rewards.Mixture({"alignment": alignment}, {"alignment": 1.0})
    mixture.captioner = rewards.load_captioner("world")
    samples = rig.sample(["a red circle", "a crimson plus", "a navy box"], mixture)
    relabelled = [i for i, caption in enumerate(samples.captions) if caption is not None]
    assert 0 < len(relabelled) <= (samples.rewards < 1).sum()
    captions = [samples.captions[i] for i in relabelled]
    assert (samples.rewards[relabelled] < 1).all()
    assert detector.alignment(seen[0][relabelled], captions).tolist() == [1.0] * len(captions)
    ids = tokenization.tokenize(rig.policy.model.tokenizer, captions)
    assert torch.equal(samples.caption_ids[relabelled], ids)


# --- the anchor ---


@pytest.mark.parametrize("algorithm", ["ppo", "matching"])
def test_the_anchor_adds_its_weight_times_the_gradient_of_the_null_prompts_drift(make_rig, algorithm):
    options = MATCHING if algorithm == "matching" else {}
    gradients = {}
    for weight in (0.0, 2.0):
        rig = make_rig(**options | {"null_anchor": weight})
        batch = rig.collect()
        rig.perturb(1e-2)
        share = matching_share(rig, batch) if options else Share(batch, rig.pairs(batch), texforce.ppo_micro_batch)
        statistics = texforce.gather_gradients(rig.policy, [share], rig.learner(), rig.config)
        gradients[weight] = gradient_of(rig.policy.parameters)
    rig.learner().optimizer.zero_grad()
    null_ids = tokenization.tokenize(rig.policy.model.tokenizer, [""])
    base = rig.policy.base_embeds(null_ids)[0]
    drift = (rig.policy.model.text_encoder(input_ids=null_ids).last_hidden_state[0] - base).square().mean()
    drift.backward()
    assert statistics.anchor_drift == pytest.approx(drift.item(), rel=1e-4)
    expected = 2 * gradient_of(rig.policy.parameters)
    assert relative_difference(gradients[2.0] - gradients[0.0], expected.double()) <= 1e-4


def test_anchor_prompts_are_held_beside_the_null_prompt(make_rig, tmp_path):
    (tmp_path / "negative.txt").write_text("blurry\nlow quality\n")
    rig = make_rig(null_anchor=1.0, anchor_prompts=str(tmp_path / "negative.txt"))
    assert len(rig.policy.anchors.prompt_ids) == 3
    assert rig.policy.anchors.drift(rig.policy.model) == 0
    rig.perturb(1e-2)
    assert rig.policy.anchors.drift(rig.policy.model) > 0


# --- the reward's own gradient ---


GRADIENT = {
    "algorithm": "gradient", "reward": "hps", "backprop_steps": 2, "num_samples_per_prompt": 2,
    "advantages": "leave-one-out", "kl_weight": 0.0, "null_anchor": 0.0,
}  # fmt: skip


class Brightness:
    """A scorer that carries gradients."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.with_gradients(images, prompts).detach()

    def with_gradients(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.square().mean(dim=(1, 2, 3)).to(images.dtype)


REWARD = rewards.Mixture({"brightness": Brightness()}, {"brightness": 1.0})


def gradient_share(rig: Rig) -> Share:
    batch = texforce.draw_noise_batch(rig.policy, PROMPTS, rig.config, torch.Generator().manual_seed(0))
    images = torch.arange(len(batch.prompts))
    loss = functools.partial(texforce.gradient_micro_batch, reward=REWARD)
    return Share(batch, torch.stack([images, torch.zeros_like(images)], dim=1), loss)


def textbook_reward(rig: Rig, share: Share) -> Tensor:
    """The mean reward of the same images, sampled one by one by diffusers' own step in float64."""
    model, config = rig.policy.model, rig.config
    scheduler, scores = model.scheduler, []
    scheduler.set_timesteps(config.num_inference_steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    null_ids = tokenization.tokenize(model.tokenizer, [""])
    for image, prompt_ids in enumerate(share.batch.prompt_ids):
        noises = share.batch.noise[image].double()
        latents = noises[:1]
        for k, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(k >= config.num_inference_steps - config.backprop_steps):
                with rig.policy.base() if is_outside(config, k) else nullcontext():
                    encoded = [model.text_encoder(input_ids=ids).last_hidden_state for ids in (null_ids, prompt_ids[None])]
                null, text = (embeds.detach() if is_outside(config, k) else embeds for embeds in encoded)
                null_pred, text_pred = (model.unet(latents, timestep, embeds).sample for embeds in (null, text))
                noise_pred = null_pred + config.guidance_scale * (text_pred - null_pred)
                step = scheduler.step(noise_pred, timestep, latents, eta=config.eta, variance_noise=noises[1 + k][None])
                latents = step.prev_sample
        image = (model.vae.decode(latents / model.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        scores.append(Brightness().with_gradients(image, []))
    return torch.cat(scores).mean()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("target", "options"), [
    ("text-encoder", {}), ("unet", {}), ("both", {}), ("text-encoder", {"adapter_steps": "0.6-0.8"}),
    ("both", {"adapter_steps": "0.2-0.8"}), ("tokens", {}),
])  # fmt: skip
def test_the_rewards_gradient_equals_that_of_the_textbook_loop(make_rig, target, options):
    rig = make_rig(target=target, **GRADIENT | options)
    rig.perturb(1e-2)
    share = gradient_share(rig)
    statistics = texforce.accumulate_gradients(rig.policy, share, rig.learner(), rig.config)
    gradient = gradient_of(rig.policy.parameters)
    for part in (*rig.policy.model.policy_parts.values(), rig.policy.model.vae):
        part.double()
    rig.learner().optimizer.zero_grad()
    reward = textbook_reward(rig, share)
    (-reward).backward()
    assert relative_difference(gradient, gradient_of(rig.policy.parameters)) <= 1e-5
    assert statistics.loss / statistics.num_pairs == pytest.approx(-reward.item(), rel=1e-5)


@pytest.mark.slow
def test_the_rewards_gradient_is_a_finite_difference_along_a_random_direction(make_rig):
    """With all steps in the gradient, since what is cut off is no derivative of the reward."""
    rig = make_rig(**GRADIENT | {"backprop_steps": 5, "mixed_precision": "no"})
    rig.perturb(1e-2)
    for part in (*rig.policy.model.policy_parts.values(), rig.policy.model.vae):
        part.double()
    share = gradient_share(rig)
    (-textbook_reward(rig, share)).backward()
    gradient = gradient_of(rig.policy.parameters).double()
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in rig.policy.parameters]
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, step in zip(rig.policy.parameters, direction, strict=True):
                parameter += sign * 1e-4 * step.to(parameter.dtype)
            losses.append(-textbook_reward(rig, share).item())
            for parameter, step in zip(rig.policy.parameters, direction, strict=True):
                parameter -= sign * 1e-4 * step.to(parameter.dtype)
    slope = (losses[0] - losses[1]) / 2e-4
    assert slope == pytest.approx((gradient @ flat(direction).double()).item(), rel=1e-3)


def test_the_micro_batch_size_does_not_change_the_rewards_gradient(make_rig):
    rig = make_rig(**GRADIENT)
    rig.perturb(1e-2)
    reference, *others = gradients_in_micro_batches(rig, gradient_share(rig), (1, 4, 64))
    assert all(relative_difference(gradient, reference) <= 1e-5 for gradient in others)


def test_a_scorer_without_gradients_is_refused_by_name():
    reward = rewards.load_reward("jpeg")
    with pytest.raises(InputError, match=r"jpeg carries no gradients.*hps"):
        reward.with_gradients(torch.rand(1, 3, 8, 8), ["a red circle"])


# --- ways to the same gradient ---


@pytest.mark.quick(2)
@pytest.mark.parametrize(("target", "null_prompt"), POLICIES)
def test_the_micro_batch_size_changes_neither_gradient_nor_update(make_rig, target, null_prompt):
    rig = make_rig(target=target, null_prompt=null_prompt, kl_weight=0.1)
    batch = rig.collect()
    rig.perturb(1e-2)
    pairs, start = rig.pairs(batch)[:10], rig.weights()
    gradients, changes = [], []
    for size in (1, 4, 64):
        gradients.append(rig.gradient(batch, pairs, micro_batch_size=size))
        rig.learner().step()
        changes.append(rig.weights() - start)
        torch.nn.utils.vector_to_parameters(start.clone(), rig.policy.parameters)
    for gradient, change in zip(gradients[1:], changes[1:], strict=True):
        assert relative_difference(gradient, gradients[0]) <= 1e-5
        # Adam divides each entry by its own size, so that the smallest ones come out with their rounding errors enlarged.
        assert (change - changes[0]).square().mean().sqrt() <= 1e-5
    assert changes[0].square().mean().sqrt() > 5e-4


@pytest.mark.slow
def test_a_prompt_may_repeat_among_the_pairs(make_rig):
    """The text encoder runs over the distinct prompts: equal prompts of two groups share a row, and its gradient."""
    rig = make_rig(num_samples_per_prompt=3)
    batch = rig.collect([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    pairs = rig.pairs(batch)
    one_by_one = sum(rig.gradient(batch, pair[None]).double() for pair in pairs) / len(pairs)
    assert relative_difference(rig.gradient(batch, pairs), one_by_one) <= 1e-5


def test_kept_null_outputs_give_the_same_gradient_for_half_the_unet_calls(make_rig):
    rig = make_rig(null_prompt="base")
    batch = rig.collect()
    rig.perturb(1e-2)
    pairs = rig.pairs(batch)
    assert batch.trajectory.null_outputs is not None
    recomputed = replace(batch, trajectory=replace(batch.trajectory, null_outputs=None))
    counts, gradients = {}, {}
    for name, variant in (("kept", batch), ("recomputed", recomputed)):
        calls = []
        hook = rig.policy.model.unet.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(len(inputs[0])))
        counts[name] = rig.accumulate(variant, pairs).num_unet_calls
        hook.remove()
        gradients[name] = gradient_of(rig.policy.parameters)
        assert counts[name] == sum(calls)
    assert counts == {"kept": len(pairs), "recomputed": 2 * len(pairs)}
    assert relative_difference(gradients["kept"], gradients["recomputed"].double()) <= 1e-5


@pytest.mark.parametrize(("options", "calls_a_pair"), [
    ({"guidance_scale": 4.0}, 2),
    ({"guidance_scale": 1.0}, 1),
    ({"guidance_scale": 4.0, "kl_weight": 0.1}, 4),
    ({"guidance_scale": 4.0, "kl_weight": 0.1, "null_prompt": "base"}, 2),
    ({"guidance_scale": 1.0, "null_prompt": "base"}, 1),
])  # fmt: skip
def test_unet_calls_are_counted_as_they_happen(make_rig, options, calls_a_pair):
    rig = make_rig(**options)
    calls = []
    rig.policy.model.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    batch = rig.collect()
    config = replace(rig.config, num_prompts_per_epoch=len(PROMPTS))
    assert experience.num_rollout_calls(rig.policy, config) == sum(calls)
    calls.clear()
    pairs = rig.pairs(batch)
    assert rig.accumulate(batch, pairs).num_unet_calls == sum(calls) == calls_a_pair * len(pairs)


def test_the_text_encoder_runs_once_an_update_whatever_the_number_of_pairs(make_rig):
    rig = make_rig(num_samples_per_prompt=4, micro_batch_size=2)
    batch = rig.collect()
    rows = []
    rig.policy.model.text_encoder.register_forward_pre_hook(
        lambda _, inputs, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rig.accumulate(batch, rig.pairs(batch))
    assert rows == [1 + len(PROMPTS)]


def test_gradient_checkpointing_changes_nothing_but_memory(make_rig, peak_of_saved_bytes):
    plain, checkpointed = (
        make_rig(target="both", micro_batch_size=18, gradient_checkpointing=chosen) for chosen in (False, True)
    )
    batch = plain.collect()
    torch.testing.assert_close(checkpointed.collect().trajectory.log_probs, batch.trajectory.log_probs)
    pairs, peaks, gradients = plain.pairs(batch), [], []
    for rig in (plain, checkpointed):
        with peak_of_saved_bytes(rig.policy.model) as bytes_kept:
            gradients.append(rig.gradient(batch, pairs))
        peaks.append(bytes_kept[0])
    assert relative_difference(gradients[1], gradients[0].double()) <= 1e-5
    assert peaks[1] < 0.7 * peaks[0]


# --- memory ---


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.quick(2)
@pytest.mark.parametrize(("target", "error"), [
    ("text-encoder", OUT_OF_MEMORY[0]), ("unet", OUT_OF_MEMORY[0]), ("both", OUT_OF_MEMORY[0]),
    ("both", OUT_OF_MEMORY[1]), ("both", OUT_OF_MEMORY[2]), ("both", OUT_OF_MEMORY[3]),
])  # fmt: skip
def test_a_micro_batch_is_halved_when_memory_runs_out_and_the_gradient_is_the_same(make_rig, target, error, monkeypatch):
    """Memory runs out in the backward pass, where a part of the gradients is already there."""
    rig = make_rig(target=target, micro_batch="auto", micro_batch_size=64)
    batch = rig.collect()
    pairs = rig.pairs(batch)
    assert len(pairs) > 4
    whole = rig.gradient(batch, pairs).double()
    sizes, calls, grad, original = [], [], torch.autograd.grad, texforce.ppo_micro_batch

    def micro_batch_loss(policy, micro_batch, *rest):
        calls.append(len(micro_batch.pairs))
        return original(policy, micro_batch, *rest)

    def short_of_memory(loss, inputs):
        sizes.append(calls[-1])
        if sizes[-1] > 3:
            raise error
        return grad(loss, inputs)

    monkeypatch.setattr(texforce, "ppo_micro_batch", micro_batch_loss)
    monkeypatch.setattr(torch.autograd, "grad", short_of_memory)
    statistics = rig.accumulate(batch, pairs)
    assert relative_difference(gradient_of(rig.policy.parameters), whole) <= 1e-5
    assert statistics.num_pairs == len(pairs)
    assert sizes[0] == len(pairs)
    assert sum(size for size in sizes if size <= 3) == len(pairs)
    assert len([size for size in sizes if size > 3]) < 4  # it is not tried again with what did not fit
    with pytest.raises(type(error)):
        rig.accumulate(batch, pairs, micro_batch="fixed")


def test_what_did_not_fit_is_let_go_before_less_is_tried(make_rig, monkeypatch):
    rig = make_rig(micro_batch="auto", micro_batch_size=64)
    batch = rig.collect()
    tried, original, grad = [], texforce.ppo_micro_batch, torch.autograd.grad

    def micro_batch_loss(*args):
        assert all(loss() is None for loss in tried)
        return original(*args)

    def short_of_memory(loss, inputs):
        if len(tried) < 2:
            tried.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad(loss, inputs)

    monkeypatch.setattr(texforce, "ppo_micro_batch", micro_batch_loss)
    monkeypatch.setattr(torch.autograd, "grad", short_of_memory)
    rig.accumulate(batch, rig.pairs(batch))
    assert len(tried) == 2


def test_a_micro_batch_that_was_filled_up_is_halved_as_what_did_not_fit(make_rig, monkeypatch):
    """The whole size is halved, and not the number of its own pairs, which may be one."""
    rig = rounding_by_batch(make_rig(micro_batch="auto", micro_batch_size=8, sample_batch_size=8))
    batch, learner = rig.collect(), rig.learner()
    pairs, grad, sizes = rig.pairs(batch)[:9], torch.autograd.grad, []

    def short_of_memory_once(loss, inputs):
        sizes.append(learner.micro_batch_size)
        if len(sizes) == 2:
            raise OUT_OF_MEMORY[0]
        return grad(loss, inputs)

    monkeypatch.setattr(torch.autograd, "grad", short_of_memory_once)
    statistics = texforce.accumulate_gradients(
        rig.policy, Share(batch, pairs, texforce.ppo_micro_batch), learner, rig.config
    )
    assert (sizes, statistics.num_pairs) == ([8, 8, 4], 9)


def test_a_single_pair_that_does_not_fit_ends_the_run(make_rig, monkeypatch):
    rig = make_rig(micro_batch="auto")
    batch = rig.collect()

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(texforce, "ppo_micro_batch", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        rig.accumulate(batch, rig.pairs(batch))


def test_memory_depends_on_the_micro_batch_and_neither_on_images_nor_on_steps(make_rig, peak_of_saved_bytes):
    def peak(**options) -> int:
        rig = make_rig(**{"micro_batch_size": 3, "num_samples_per_prompt": 2, "num_inference_steps": 1} | options)
        batch = rig.collect()
        with peak_of_saved_bytes(rig.policy.model) as bytes_kept:
            rig.accumulate(batch, rig.pairs(batch, list(range(rig.config.num_inference_steps))))
        return bytes_kept[0]

    small = peak()
    assert small > 1e6
    assert peak(num_samples_per_prompt=4) == pytest.approx(small, rel=0.01)
    assert peak(num_inference_steps=2) == pytest.approx(small, rel=0.01)
    assert peak(num_samples_per_prompt=4, micro_batch_size=12) > 1.5 * small


# --- the ratio before the first update ---


@pytest.mark.parametrize(("target", "null_prompt"), [*POLICIES, ("tokens", "base")])
def test_the_ratio_is_one_before_the_first_update(make_rig, target, null_prompt):
    rig = make_rig(target=target, null_prompt=null_prompt, sample_batch_size=6, micro_batch_size=6)
    batch = rig.collect()
    statistics = rig.accumulate(batch, rig.pairs(batch, ALL_STEPS))
    assert statistics.num_pairs == 30
    assert statistics.ratio_deviation <= 1e-6
    assert statistics.num_clipped == 0


def test_the_ratio_is_one_whatever_the_batch_sizes_of_sampling_and_training(make_rig):
    rig = make_rig(num_samples_per_prompt=4, sample_batch_size=12)
    batch = rig.collect()
    pairs = rig.pairs(batch, ALL_STEPS)[:36]
    sizes = (1, 3, 7, 12, 24, 100)
    deviations = {size: rig.accumulate(batch, pairs, micro_batch_size=size).ratio_deviation for size in sizes}
    # Kernels round differently for batches of other sizes: the U-Net's output, not the log-probability made of it.
    assert max(deviations.values()) <= texforce.FLOAT32_TOLERANCE, deviations
    assert deviations[12] <= 1e-6


def wide_model(tiny: models.Model) -> models.Model:
    """Stable Diffusion's widths, in which kernels depend on the batch; random weights in bfloat16, few layers.

    An eighth of the widths where the processor does not compute in bfloat16: they would take minutes.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    share = 1 if torch.cpu._is_avx512_bf16_supported() else 8
    width = 768 // share
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4,
        num_attention_heads=12 if share == 1 else 3,
        max_position_embeddings=tiny.tokenizer.model_max_length, eos_token_id=tiny.tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"text_encoder": CLIPTextModel(text)}
        parts["unet"] = UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=8, layers_per_block=1,
            block_out_channels=(320 // share, 640 // share), norm_num_groups=32 if share == 1 else 8,
            cross_attention_dim=width,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    for part in parts.values():
        part.requires_grad_(False).eval().to(torch.bfloat16)
    return replace(tiny, **parts)


@pytest.mark.quick(1)
@pytest.mark.parametrize("null_prompt", ["adapted", "base"])
def test_in_half_precision_the_ratio_is_exactly_one_in_batches_of_one_size(make_rig, narrow_model, null_prompt):
    sizes = {"sample_batch_size": 4, "micro_batch_size": 4, "num_samples_per_prompt": 4}
    model = wide_model(narrow_model(torch.bfloat16))
    rig = make_rig(model, mixed_precision="bf16", null_prompt=null_prompt, **sizes)
    rig.perturb(1e-2)
    batch = rig.collect()
    assert len(batch.rewards) > rig.config.sample_batch_size
    pairs = rig.pairs(batch, ALL_STEPS)[:14]  # the last micro-batch has two of its own
    statistics = rig.accumulate(batch, pairs)
    assert (statistics.num_pairs, statistics.num_unet_calls) == (14, (2 if null_prompt == "adapted" else 1) * 16)
    assert statistics.ratio_deviation == 0


def test_while_nothing_was_learned_rounding_is_no_part_of_the_loss_in_half_precision(make_rig):
    rig = make_rig(sample_batch_size=6, micro_batch_size=6)
    batch = rig.collect()
    pairs = rig.pairs(batch, ALL_STEPS)
    expected = rig.gradient(batch, pairs)
    shifted = with_log_probs(batch, batch.trajectory.log_probs + 0.05)
    assert relative_difference(rig.gradient(shifted, pairs), expected) > 0.01
    statistics = rounding_by_batch(rig).accumulate(shifted, pairs, on_policy=True)
    assert relative_difference(gradient_of(rig.policy.parameters), expected) < 1e-4
    assert statistics.ratio_deviation == pytest.approx(1 - math.exp(-0.05), rel=1e-3)
    assert statistics.num_clipped == 0


@pytest.mark.parametrize(("shift", "stops"), [(0.05, False), (0.2, True)])
def test_half_precision_stops_when_what_is_trained_is_far_from_what_was_sampled(make_rig, shift, stops):
    rig = rounding_by_batch(make_rig(sample_batch_size=6, micro_batch_size=6))
    batch = rig.collect()
    batch = with_log_probs(batch, batch.trajectory.log_probs + shift)
    with pytest.raises(DivergedError, match="sample-batch-size") if stops else nullcontext():
        rig.update(batch)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("shift", "sample_batch_size", "anew"), [(4e-5, 6, False), (6e-5, 6, True), (4e-5, 4, True)])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_rounding_sets_apart_is_no_part_of_later_losses_either(
    make_rig, shares, shift, sample_batch_size, anew, passes
):
    """Above a tenth of the clip range, and where batches of sampling were not filled.

    The later steps compare with the policy before the first step then, as the update computes it.
    """
    sizes = {"sample_batch_size": sample_batch_size, "micro_batch_size": 6}
    rig = rounding_by_batch(make_rig(num_updates_per_epoch=3, num_inner_epochs=passes, **sizes))
    batch = rig.collect()
    log_probs = batch.trajectory.log_probs
    batch, before = with_log_probs(batch, log_probs + shift), rig.weights()
    total = rig.update(batch)
    assert not torch.equal(rig.weights(), before)
    assert total.first_ratio_deviation == pytest.approx(shift, abs=2e-6)
    assert [share.on_policy for share in shares] == [True, *((3 * passes - 1) * [False])]
    distinct = set()
    for share in shares[1:]:
        samples, steps = share.pairs.unbind(1)
        found = share.batch.trajectory.log_probs[samples, steps] - log_probs[samples, steps]
        torch.testing.assert_close(found, torch.full_like(found, 0 if anew else shift), rtol=0, atol=2e-6)
        distinct |= set(map(tuple, share.pairs.tolist()))
    more = 6 * math.ceil(len(distinct) / 6)  # micro-batches of 6 are filled up; of a share of ten pairs there are 12 rows
    assert total.num_unet_calls == 2 * (3 * passes * 12 + (more if anew else 0))


@pytest.mark.parametrize("null_prompt", ["adapted", "base"])
def test_a_micro_batch_that_is_filled_up_has_the_loss_and_gradient_of_its_own_pairs(make_rig, null_prompt):
    rig = make_rig(sample_batch_size=6, micro_batch_size=6, kl_weight=0.1, null_prompt=null_prompt)
    batch = rig.collect()
    pairs = rig.pairs(batch, ALL_STEPS)[:14]
    rig.perturb(1e-2)
    plain, plain_gradient = rig.accumulate(batch, pairs), gradient_of(rig.policy.parameters)
    filled, gradient = rounding_by_batch(rig).accumulate(batch, pairs), gradient_of(rig.policy.parameters)
    assert filled.num_unet_calls > plain.num_unet_calls
    assert filled.num_pairs == plain.num_pairs
    assert filled.kl == pytest.approx(plain.kl, rel=1e-4)
    assert relative_difference(gradient, plain_gradient) < 1e-4


@pytest.mark.parametrize("deviation", [1e-5, -1e-3, 1.0])
def test_a_ratio_that_is_not_one_before_the_first_update_stops_the_run(make_rig, deviation):
    rig = make_rig()
    batch, before = rig.collect(), rig.weights()
    log_probs = batch.trajectory.log_probs.clone()
    log_probs[2, 1] += deviation
    with pytest.raises(DivergedError, match="ratio deviates from 1 by"):
        rig.update(with_log_probs(batch, log_probs))
    assert torch.equal(rig.weights(), before)


def test_sampling_with_another_policy_than_the_one_trained_is_noticed(make_rig):
    rig = make_rig()
    batch = rig.collect()
    rig.perturb(1e-3)
    with pytest.raises(DivergedError, match="ratio"):
        rig.update(batch)


# --- the shares of an update ---


def test_each_update_of_an_epoch_trains_on_images_of_its_own(make_rig, shares):
    rig = make_rig(num_updates_per_epoch=3)
    rig.update(rig.collect())
    images = [set(share.pairs[:, 0].tolist()) for share in shares]
    assert [len(share) for share in images] == [2, 2, 2]
    assert set.union(*images) == set(range(6))


def test_each_pass_over_an_epochs_images_trains_on_all_of_them_shared_out_anew(make_rig, shares):
    rig = make_rig(num_updates_per_epoch=2, num_inner_epochs=3)
    statistics = rig.update(rig.collect())
    passes = [[frozenset(share.pairs[:, 0].tolist()) for share in shares[start : start + 2]] for start in (0, 2, 4)]
    assert [frozenset.union(*images) for images in passes] == [frozenset(range(6))] * 3
    assert len({frozenset(images) for images in passes}) > 1
    assert statistics.num_pairs == 3 * 6 * 5


def test_each_pass_draws_the_steps_of_each_image_anew(make_rig, shares):
    rig = make_rig(num_inner_epochs=3, timestep_fraction=0.4)
    rig.update(rig.collect())
    drawn = [set(map(tuple, share.pairs.tolist())) for share in shares]
    assert [len(pairs) for pairs in drawn] == [6 * 2] * 3
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.quick(2)
@pytest.mark.parametrize("silenced", [[0, 3, 4], [1], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_images_without_advantage_count_in_the_mean_as_zero_and_cost_no_unet_calls(
    make_rig, monkeypatch, silenced, kl_weight
):
    rig = make_rig(kl_weight=kl_weight, num_updates_per_epoch=1)
    batch = rig.collect()
    advantages = batch.advantages.clone()
    advantages[silenced] = 0
    batch = replace(batch, advantages=advantages, rewards=torch.ones(6))
    rig.perturb(1e-6)
    expected = rig.gradient(batch, rig.pairs(batch, ALL_STEPS))  # of all pairs, as a textbook loop has them
    monkeypatch.setattr(Learner, "step", lambda learner: 0.0)  # leaves the gradient where it is
    for parameter in rig.policy.parameters:
        parameter.grad = None
    statistics = rig.update(batch)
    assert relative_difference(gradient_of(rig.policy.parameters), expected) < 1e-5
    num_learned = 6 if kl_weight else 6 - len(silenced)
    assert statistics.num_unet_calls == num_learned * 5 * 2 * (2 if kl_weight else 1)


def test_images_that_cannot_be_shared_out_evenly_still_give_as_many_updates_as_asked(make_rig, shares):
    rig = make_rig(num_updates_per_epoch=4)
    learner = rig.learner()
    rig.update(rig.collect(), learner)
    assert len(shares) == learner.lr_scheduler.last_epoch == 4


def test_an_epoch_of_equal_rewards_changes_nothing(make_rig):
    rig = make_rig(num_updates_per_epoch=2, num_samples_per_prompt=7)
    rig.scorer = lambda images, prompts: torch.full((len(images),), 0.7)  # the mean of seven is rounded
    batch, before = rig.collect(), rig.weights()
    statistics = rig.update(batch)
    assert (batch.advantages == 0).all()
    assert statistics.num_pairs == 0
    assert torch.equal(rig.weights(), before)


def test_the_update_of_an_epoch_with_a_dropped_sample_equals_that_without_it(make_rig, shares):
    rig = make_rig(num_samples_per_prompt=3, sample_batch_size=9)
    rig.scorer = lambda images, prompts: torch.tensor([0.1, NAN, 0.5, 0.2, 0.7, 0.9, 0.3, 0.4, 0.8])[: len(images)]
    batch = rig.collect()
    assert batch.rewards.isnan().tolist() == [False, True] + [False] * 7
    assert batch.advantages[1] == 0
    rig.update(batch)
    (share,) = shares
    assert set(share.pairs[:, 0].tolist()) == {0, *range(2, 9)}
    assert rig.weights().isfinite().all()


# --- the learner ---


def few_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in (3, 5)]


def make_learner(**options) -> Learner:
    return Learner(few_parameters(), resolve(TrainOptions(**OPTIONS | options)))


def fill_gradients(learner: Learner, value: float) -> None:
    for parameter in learner.parameters:
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize(("lr_scheduler", "expected"), [
    ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464]),
])  # fmt: skip
@pytest.mark.parametrize("epochs", [{"num_epochs": 3}, {"num_epochs": 1, "num_inner_epochs": 3}])
def test_the_learning_rate_warms_up_for_the_steps_asked_and_then_follows_its_schedule(lr_scheduler, expected, epochs):
    learner = make_learner(
        lr_warmup_steps=2, lr_scheduler=lr_scheduler, num_updates_per_epoch=2, learning_rate=1.0, **epochs
    )
    rates = []
    for _ in expected:
        fill_gradients(learner, 0.0)
        rates.append(learner.optimizer.param_groups[0]["lr"])
        learner.step()
    assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("decay", [0.1, 0.9])
def test_the_average_starts_at_the_first_steps_weights_and_its_decay_comes_up_to_its_value(decay):
    learner, seen = make_learner(ema_decay=decay, learning_rate=0.1), []
    for gradient in (1.0, -2.0, 3.0, 1.0):
        fill_gradients(learner, gradient)
        learner.step()
        seen.append(flat(learner.parameters).clone())
    average = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weights
    with learner.averaged():
        torch.testing.assert_close(flat(learner.parameters), average, rtol=1e-6, atol=1e-8)
    assert torch.equal(flat(learner.parameters), seen[-1])
    assert not torch.equal(average, seen[-1])


def test_without_averaging_the_average_is_the_last():
    learner = make_learner(ema_decay=0.0)
    fill_gradients(learner, 1.0)
    learner.step()
    last = flat(learner.parameters).clone()
    with learner.averaged():
        assert torch.equal(flat(learner.parameters), last)


def fp16_learner(learner: Learner) -> Learner:
    """The learner with a scaled loss, as in fp16; the CPU has the same scaler."""
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return learner


def test_a_step_that_fp16_skips_changes_neither_weights_nor_schedule_nor_average():
    learner = fp16_learner(make_learner(ema_decay=0.9, lr_scheduler="linear", num_epochs=3))
    before = flat(learner.parameters).clone()
    for gradient, moves in ((math.inf, False), (1.0, True)):
        fill_gradients(learner, gradient)
        learner.scaler.scale(torch.ones(()))
        learner.step()
        assert torch.equal(flat(learner.parameters), before) is not moves
        assert learner.lr_scheduler.last_epoch == moves
        assert learner.ema.optimization_step == moves
    assert learner.scaler.get_scale() == 2.0**15


def test_fp16_takes_its_first_step_by_gradients_of_other_processes_alone():
    learner = fp16_learner(make_learner())
    before = flat(learner.parameters).clone()
    fill_gradients(learner, 2.0**16)
    assert learner.step() == pytest.approx(math.sqrt(len(before)))
    assert not torch.equal(flat(learner.parameters), before)


def test_fp16_gives_up_when_lowering_the_scale_does_not_help():
    learner = fp16_learner(make_learner())

    def fail() -> None:
        learner.parameters[0].grad = torch.full_like(learner.parameters[0], NAN)
        learner.scaler.scale(torch.ones(()))
        learner.step()

    for _ in range(MAX_SKIPPED_STEPS):
        fail()
    with pytest.raises(DivergedError, match="gradient is not finite"):
        fail()


def test_a_scaled_loss_gives_the_same_update(make_rig):
    weights = []
    for scaled in (False, True):
        rig = make_rig()
        rig.update(rig.collect(), fp16_learner(rig.learner()) if scaled else None)
        weights.append(rig.weights())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)


# --- what must not happen ---


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(make_rig):
    rig = make_rig(micro_batch_size=5)
    batch, before = rig.collect(), rig.weights()
    advantages = batch.advantages.clone()
    advantages[-1] = NAN
    with pytest.raises(DivergedError, match="loss is not finite"):
        rig.update(replace(batch, advantages=advantages))
    assert torch.equal(rig.weights(), before)


def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(make_rig):
    rig = make_rig()
    batch, before = rig.collect(), rig.weights()
    rig.policy.parameters[3].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match="gradient is not finite"):
        rig.update(batch)
    assert torch.equal(rig.weights(), before)


def test_log_probabilities_that_are_not_finite_end_the_run(make_rig):
    rig = rounding_by_batch(make_rig(sample_batch_size=6, micro_batch_size=6))
    batch = rig.collect()
    log_probs = batch.trajectory.log_probs.clone()
    log_probs[2, 1] = NAN
    with pytest.raises(DivergedError, match="not finite"):
        rig.update(with_log_probs(batch, log_probs))


# --- the KL term ---


@pytest.mark.quick(2)
@pytest.mark.parametrize(("target", "null_prompt"), [*POLICIES, ("tokens", "base")])
def test_the_kl_divergence_is_zero_at_the_start_and_positive_after_an_update(make_rig, target, null_prompt):
    rig = make_rig(target=target, null_prompt=null_prompt, kl_weight=0.1, micro_batch_size=15)
    batch = rig.collect()
    pairs = rig.pairs(batch)
    assert rig.accumulate(batch, pairs).kl == pytest.approx(0, abs=1e-9)
    rig.update(batch)
    assert rig.accumulate(batch, pairs).kl > 1e-6


def test_the_kl_divergence_of_an_epoch_is_that_before_the_last_step(make_rig, monkeypatch):
    rig = make_rig(kl_weight=0.1, num_updates_per_epoch=2, num_inner_epochs=2)
    measured, original = [], texforce.accumulate_gradients

    def accumulate(*args):
        measured.append(original(*args))
        return measured[-1]

    monkeypatch.setattr(texforce, "accumulate_gradients", accumulate)
    total = rig.update(rig.collect())
    means = [statistics.kl / statistics.num_pairs for statistics in measured]
    assert len(set(means)) == 4
    assert total.last_kl == means[-1]


def test_the_kl_term_pulls_towards_the_base_model(make_rig):
    rig = make_rig(kl_weight=1.0, max_grad_norm=1e9, micro_batch_size=18, learning_rate=2e-3)
    batch = rig.collect()
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    rig.perturb(1e-2)
    pairs, learner = rig.pairs(batch), rig.learner()
    divergences = []
    for _ in range(6):
        divergences.append(rig.accumulate(batch, pairs).kl)
        learner.step()
    assert divergences[-1] < 0.5 * divergences[0]
