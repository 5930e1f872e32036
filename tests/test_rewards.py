"""Scorers against PIL and open_clip, the protocol they are held to, and the files that are refused."""

import contextlib
import importlib.util
import io
import json
import pickle
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from texforce import rewards, world
from texforce.rewards import ArtifactError, RewardError


def random_images(num_images: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed))


def smooth_images(num_images: int, height: int, width: int) -> Tensor:
    return F.interpolate(random_images(num_images, 6, 6), (height, width), mode="bilinear")


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


# --- HPSv2's preprocessing ---


def pad_by_pil(image: Tensor, size: int) -> Tensor:
    """HPSv2's: the longest side to `size` by PIL's bicubic filter, then centred on black; in float, so without rounding."""
    height, width = image.shape[1:]
    scale = size / max(height, width)
    new_width, new_height = round(width * scale), round(height * scale)
    padded = torch.zeros(3, size, size)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    for channel, pixels in enumerate(image):
        resized = Image.fromarray(pixels.numpy(), mode=None).resize((new_width, new_height), Image.Resampling.BICUBIC)
        padded[channel, top : top + new_height, left : left + new_width] = torch.from_numpy(np.array(resized)).clamp(0, 1)
    return padded


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (384, 512), (512, 200), (301, 227), (99, 333), (64, 48), (32, 32), (224, 224), (7, 5)]
)
def test_padding_to_a_square_equals_pil(height, width):
    images = random_images(2, height, width)
    padded = rewards.pad_to_square(images, 224)
    assert padded.shape == (2, 3, 224, 224)
    torch.testing.assert_close(padded, torch.stack([pad_by_pil(image, 224) for image in images]), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(384, 512), (512, 200), (300, 300), (32, 32)])
def test_preprocessing_equals_open_clips_own_within_its_rounding(height, width):
    import open_clip

    transform = open_clip.image_transform(224, is_train=False, resize_mode="longest", fill_color=0)
    images = smooth_images(2, height, width)
    mine = rewards.normalise(rewards.pad_to_square(images, 224))
    theirs = torch.stack([transform(to_pil(image)) for image in images])
    levels = (mine - theirs).abs() * torch.tensor(rewards.CLIP_STD)[:, None, None] * 255
    assert levels.max() <= 1.6  # of 255: PIL rounds once going in and once coming out


def test_padding_is_black_and_centred_to_the_pixel():
    padded = rewards.pad_to_square(torch.ones(1, 3, 10, 3), 9)  # 9 x 2.7, so 9 x 3 pixels
    expected = torch.zeros(1, 3, 9, 9)
    expected[..., 3:6] = 1
    torch.testing.assert_close(padded, expected)
    odd = rewards.pad_to_square(torch.ones(1, 3, 2, 8), 8)
    assert odd[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    uneven = rewards.pad_to_square(torch.ones(1, 3, 3, 8), 8)
    assert uneven[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]  # the odd row goes below


def test_an_extremely_long_image_keeps_a_row():
    padded = rewards.pad_to_square(torch.ones(1, 3, 1, 500), 16)
    assert padded.shape == (1, 3, 16, 16)
    assert padded[0, 0].sum().item() == pytest.approx(16)


def test_normalising_by_hand():
    images = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(1, 3, 2, 2)
    normalised = rewards.normalise(images)[0, :, 0, 0].tolist()
    by_hand = [(0 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    assert normalised == pytest.approx(by_hand, abs=1e-6)


# --- file size ---


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 17)])
def test_jpeg_is_minus_the_kilobytes_of_pils_file_and_incompress_plus(height, width):
    images = torch.cat([random_images(2, height, width), smooth_images(2, height, width), torch.zeros(1, 3, height, width)])
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    jpeg, incompress = (rewards.load_reward(name) for name in ("jpeg", "incompress"))
    assert incompress(images, [""] * 5).tolist() == pytest.approx(sizes)
    assert jpeg(images, [""] * 5).tolist() == pytest.approx([-size for size in sizes])
    assert incompress(images, [""] * 5)[0] > incompress(images, [""] * 5)[4]


def test_file_size_takes_half_precision_and_values_beyond_the_range():
    images = 3 * random_images(2) - 1
    clamped = images.clamp(0, 1)
    assert torch.equal(rewards.incompress(images, ["", ""]), rewards.incompress(clamped, ["", ""]))
    assert rewards.incompress(images.half(), ["", ""]).dtype == torch.float32


# --- loading by name ---


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"reward: unknown name 'hsp'.*hps, hps-v2, alignment, jpeg, incompress.*file\.py:function"
    ):
        rewards.load_reward("hsp")


def test_alignment_is_the_detector_of_the_tiny_world():
    images = world.render([world.parse("a red circle")] * 2, random.Random(0))
    assert rewards.load_reward("alignment")(images, ["a red circle", "a blue square"]).tolist() == [1.0, 0.0]


def test_the_hub_checkpoint_that_cannot_be_had_names_the_option():
    with pytest.raises(FileNotFoundError, match=r"HPS_v2\.1_compressed\.pt of xswu/HPSv2 .*--reward-checkpoint"):
        rewards.load_reward("hps", checkpoint="hub")


def test_each_version_of_hps_has_its_published_file():
    assert rewards.HPS_CHECKPOINTS == {"hps": "HPS_v2.1_compressed.pt", "hps-v2": "HPS_v2_compressed.pt"}


def test_a_function_of_a_file_is_a_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import torch\n\ndef brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    scorer = rewards.load_reward(f"{path}:brightness")
    images = random_images(3)
    torch.testing.assert_close(rewards.score(scorer, images, ["a"] * 3), images.mean(dim=(1, 2, 3)))


def test_a_reward_file_may_be_called_like_a_package(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("def dark(images, prompts):\n    return -images.mean(dim=(1, 2, 3))\n")
    rewards.load_reward(f"{path}:dark")
    assert sys.modules["json"] is json


def test_a_reward_file_may_hold_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n\n"
        "@dataclass\nclass Constant:\n    value: float\n\n"
        "    def __call__(self, images, prompts):\n        return torch.full((len(images),), self.value)\n\n"
        "seven = Constant(7.0)\n"
    )
    scorer = rewards.load_reward(f"{path}:seven")
    assert rewards.score(scorer, random_images(2), ["", ""]).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(("file", "attribute", "error", "words"), [
    ("absent.py", "f", FileNotFoundError, "there is no file .*absent.py"),
    ("mine.py", "absent", ValueError, "mine.py' has no function 'absent'"),
    ("mine.py", "", ValueError, "has no function ''"),
    ("mine.py", "number", ValueError, "has no function 'number'"),
    ("mine.txt", "f", ValueError, "mine.txt' is not a Python file"),
    ("broken.py", "f", (ValueError, RewardError), "reward: .*broken.py"),
    ("lacking.py", "f", (ValueError, RewardError), "reward: .*lacking.py"),
    ("script.py", "f", ValueError, "reward: .*script.py.*SystemExit"),
])  # fmt: skip
def test_a_reward_file_that_cannot_be_used_is_named(tmp_path, file, attribute, error, words):
    for name in ("mine.py", "mine.txt"):
        (tmp_path / name).write_text("number = 3\n\ndef f(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "lacking.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(error, match=words):
        rewards.load_reward(f"{tmp_path / file}:{attribute}")


# --- the protocol ---


def test_scores_come_back_detached_in_float32_on_the_cpu():
    images = random_images(3).requires_grad_()
    scores = rewards.score(lambda images, prompts: images.double().mean(dim=(1, 2, 3)), images, ["a"] * 3)
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)
    assert rewards.score(lambda images, prompts: torch.tensor([1, 2, 3]), images, ["a"] * 3).tolist() == [1.0, 2.0, 3.0]


def test_non_finite_scores_are_passed_on():
    given = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf")])
    scores = rewards.score(lambda images, prompts: given, random_images(4), ["a"] * 4)
    torch.testing.assert_close(scores, given, equal_nan=True)


@pytest.mark.parametrize(("returned", "words"), [
    (torch.zeros(2), r"shape \(3,\) but returned a tensor of shape \(2,\)"),
    (torch.zeros(3, 1), r"shape \(3, 1\)"),
    (torch.zeros(()), r"shape \(\)"),
    ([1.0, 2.0, 3.0], "returned list"),
    (1.0, "returned float"),
    (None, "returned NoneType"),
    (np.zeros(3), "returned ndarray"),
])  # fmt: skip
def test_a_scorer_that_returns_something_else_is_a_reward_error(returned, words):
    with pytest.raises(RewardError, match=words):
        rewards.score(lambda images, prompts: returned, random_images(3), ["a"] * 3)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("boom"), ZeroDivisionError("zero"), AssertionError("no face")]
)
def test_a_scorer_that_raises_is_a_reward_error_with_its_cause(error):
    def scorer(images, prompts):
        raise error

    with pytest.raises(RewardError, match=f"the scorer raised {type(error).__name__}: .*{error.args[0]}") as caught:
        rewards.score(scorer, random_images(1), ["a"])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("such a prompt"), torch.OutOfMemoryError("gone"), KeyboardInterrupt()])
def test_bad_input_lack_of_memory_and_interrupts_are_not_the_scorers_failure(error):
    def scorer(images, prompts):
        raise error

    with pytest.raises(type(error)):
        rewards.score(scorer, random_images(1), ["a"])


# --- checkpoints ---


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def save(path, content) -> None:
    torch.save(content, path)


def load(model, path) -> None:
    rewards.fill(model, rewards.read_state_dict(path), path)


def test_a_checkpoint_fills_the_model(small_model, tmp_path):
    path = tmp_path / "c.pt"
    save(path, {"state_dict": {"weight": torch.ones(2, 3), "bias": torch.arange(2.0)}, "epoch": 3})
    model = torch.nn.Linear(3, 2)
    load(model, path)
    assert model.weight.eq(1).all()
    assert model.bias.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("checkpoint", ["absent.pt", "."])
def test_a_missing_checkpoint_is_named_before_a_billion_parameters_are_built(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(rewards, "build_clip", lambda config: pytest.fail("built the model first"))
    with pytest.raises(FileNotFoundError, match="reward: there is no checkpoint .*" + re.escape(tmp_path.name)):
        rewards.load_reward("hps", checkpoint=tmp_path / checkpoint)


@pytest.mark.parametrize("content", [
    {"state_dict": {"weight": torch.ones(2, 3)}},
    {"state_dict": {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)}},
    {"state_dict": {"weight": torch.ones(3, 3), "bias": torch.ones(2)}},
], ids=["a key is missing", "a key is too much", "a shape is wrong"])  # fmt: skip
def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensor(small_model, tmp_path, content):
    save(tmp_path / "c.pt", content)
    tensor = {1: "bias", 2: "weight", 3: "more"}[len(content["state_dict"])]
    with pytest.raises(ArtifactError, match=rf"c\.pt: refused.*{tensor}"):
        load(small_model, tmp_path / "c.pt")


@pytest.mark.parametrize("content", [
    {"weight": torch.ones(2, 3), "bias": torch.ones(2)},
    *({"state_dict": content} for content in (None, [1], {1: torch.ones(2)}, {"weight": 1, "bias": 2})),
    *([1, 2], None, "text", torch.ones(3)),
], ids=["bare", "none in it", "list in it", "integer keys", "integers in it", "list", "none", "text", "tensor"])  # fmt: skip
def test_a_foreign_checkpoint_is_refused(small_model, tmp_path, content):
    save(tmp_path / "c.pt", content)
    with pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        load(small_model, tmp_path / "c.pt")


@pytest.mark.parametrize("content", [
    b"", b"hello world\n", b"<html></html>", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\n",
    b"PK\x03\x04" + b"\0" * 60, pickle.dumps([1, 2]), b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    b"\x80\x02X\x03\x00\x00\x00\xff\xfe\xfdq\x00.",
], ids=["empty", "text", "html", "zeros", "lfs pointer", "half a zip", "pickled list", "png", "no utf-8"])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused(small_model, tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        load(small_model, tmp_path / "c.pt")


def test_a_damaged_checkpoint_is_refused_or_loads_whatever_byte_it_is(small_model, tmp_path):
    path, rng = tmp_path / "c.pt", random.Random(0)
    save(path, {"state_dict": small_model.state_dict()})
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load(torch.nn.Linear(3, 2), path)
        except ArtifactError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_hps_checkpoint_is_refused(tmp_path, share):
    content = rewards.EMBEDDED_HPS.read_bytes()
    checkpoint = copy_config(tmp_path)
    checkpoint.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        rewards.load_reward("hps", checkpoint=checkpoint)


class Hostile:
    """Its pickle runs a program when it is loaded."""

    def __init__(self, target) -> None:
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("where", ["instead of the checkpoint", "beside the tensors", "bare pickle"])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(small_model, tmp_path, monkeypatch, where):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not open the door
    hostile, path = Hostile(tmp_path / "created"), tmp_path / "c.pt"
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        state_dict = small_model.state_dict()
        save(path, hostile if where.startswith("instead") else {"state_dict": state_dict, "extra": hostile})
    with pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        load(small_model, path)
    assert not (tmp_path / "created").exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)  # where one lets it, it does harm
    assert (tmp_path / "created").exists()


# --- HPS ---


@pytest.fixture(scope="module")
def hps():
    return rewards.load_reward("hps")


def copy_config(folder):
    """A folder with the embedded scorer's architecture and tokenizer, and the path of a checkpoint to put beside them."""
    tiny = rewards.EMBEDDED_HPS.parent
    shutil.copy(tiny / "hps.json", folder / "c.json")
    shutil.copytree(tiny / "tokenizer", folder / "tokenizer")
    return folder / "c.pt"


def scenes_and_prompts(num_scenes: int, seed: int = 0) -> tuple[list[world.Scene], list[str]]:
    rng = random.Random(seed)
    scenes = [world.draw_scene(rng, world.KINDS[k % 4]) for k in range(num_scenes)]
    return scenes, [world.caption(scene, rng, rare_probability=0.35) for scene in scenes]


@pytest.fixture(scope="module")
def renderings():
    scenes, prompts = scenes_and_prompts(300)
    return scenes, prompts, world.render(scenes, random.Random(1))


def test_hps_equals_open_clip_itself_on_pil_images(hps):
    import open_clip

    tiny = rewards.EMBEDDED_HPS.parent
    settings = json.loads((tiny / "hps.json").read_text())
    model = open_clip.CLIP(**settings)
    state_dict = torch.load(tiny / "hps.pt", weights_only=True)["state_dict"]
    model.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()}, strict=True)
    model.eval()
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    prompts = ["a red circle", "two crimson discs", "a red circle", "a navy box left of an ivory plus"]
    for size in ((32, 32), (24, 32), (64, 48)):
        images = smooth_images(4, *size)
        size = settings["vision_cfg"]["image_size"]
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        pixels = torch.stack([(pad_by_pil(image, size) - mean) / std for image in images])
        ids = tokenizer(
            prompts, padding="max_length", max_length=settings["text_cfg"]["context_length"], return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            expected = F.cosine_similarity(model.encode_image(pixels), model.encode_text(ids))
        torch.testing.assert_close(hps(images, prompts), expected, rtol=0, atol=1e-4)


def test_rounding_an_image_to_eight_bits_hardly_moves_hps(hps, renderings):
    _, prompts, images = renderings
    scores = hps(images, prompts)
    rounded = hps((images * 255).round() / 255, prompts)
    assert (scores - rounded).abs().mean() <= 0.1 * scores.std()


def test_hps_is_a_cosine_in_float32(hps, renderings):
    _, prompts, images = renderings
    scores = hps(images[:32], prompts[:32])
    assert (scores.dtype, scores.shape) == (torch.float32, (32,))
    assert scores.abs().max() <= 1


def test_hps_of_a_batch_equals_hps_of_each(hps, renderings):
    _, prompts, images = renderings
    prompts = prompts[:28] + prompts[:4]  # some twice
    whole = hps(images[:32], prompts)
    each = torch.cat([hps(images[i : i + 1], prompts[i : i + 1]) for i in range(32)])
    torch.testing.assert_close(whole, each, rtol=0, atol=1e-5)


def test_hps_of_equal_prompts_goes_to_the_right_images(hps, renderings):
    _, prompts, images = renderings
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    shuffled = hps(images[:32][order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, hps(images[:32], prompts[:32])[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (65, 32), (32, 65)])
def test_the_embedded_scorer_refuses_images_that_are_not_of_its_world(hps, height, width):
    with pytest.raises(ValueError, match=f"32x32 pixels only, not {width}x{height}.*--reward-checkpoint"):
        hps(torch.zeros(1, 3, height, width), ["a red circle"])


def test_the_refusal_passes_through_the_protocol_as_bad_input(hps):
    with pytest.raises(ValueError, match="embedded hps"):
        rewards.score(hps, torch.zeros(1, 3, 512, 512), ["a red circle"])


def test_a_checkpoint_of_ones_own_takes_any_size_and_the_name_hps_v2(tmp_path):
    checkpoint = copy_config(tmp_path)
    shutil.copy(rewards.EMBEDDED_HPS, checkpoint)
    scorer = rewards.load_reward("hps-v2", checkpoint=checkpoint)
    assert scorer(random_images(1, 128, 96), ["a red circle"]).shape == (1,)


def test_a_checkpoint_that_lacks_a_key_is_refused(tmp_path):
    checkpoint = copy_config(tmp_path)
    state_dict = torch.load(rewards.EMBEDDED_HPS, weights_only=True)["state_dict"]
    del state_dict["text_projection"]
    torch.save({"state_dict": state_dict}, checkpoint)
    with pytest.raises(ArtifactError, match="text_projection"):
        rewards.load_reward("hps", checkpoint=checkpoint)


# --- what the embedded scorer prefers ---


def meaning(scene: world.Scene) -> tuple:
    mirrored = {"right of": "left of", "below": "above"}
    if scene.relation in mirrored:
        return mirrored[scene.relation], scene.objects[::-1]
    return scene.relation, scene.objects if scene.relation else tuple(sorted(scene.objects))


def share_above(better: Tensor, worse: Tensor) -> float:
    return (better > worse).double().mean().item()


def test_hps_ranks_the_right_prompt_above_a_wrong_one(hps, renderings):
    scenes, prompts, images = renderings
    rng = random.Random(2)
    wrong = []
    for scene in scenes:  # another sentence of the same kind with another meaning
        other = world.draw_scene(rng, scene.kind)
        while meaning(other) == meaning(scene):
            other = world.draw_scene(rng, scene.kind)
        wrong.append(world.caption(other, rng))
    share = share_above(hps(images, prompts), hps(images, wrong))
    print(f"right above wrong prompt: {share:.4f}")
    assert share >= 0.95


def test_hps_ranks_the_right_prompt_above_one_that_differs_in_one_thing(hps, renderings):
    scenes, prompts, images = renderings
    specification = importlib.util.spec_from_file_location("tiny_build", rewards.EMBEDDED_HPS.parent / "build.py")
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    rng = random.Random(3)
    mutants = [build.mutate(scene, rng) for scene in scenes]
    fair = torch.tensor([meaning(one) != meaning(other) for one, other in zip(scenes, mutants, strict=True)])
    right, wrong = hps(images, prompts), hps(images, [world.caption(mutant, rng) for mutant in mutants])
    for kind in world.KINDS:
        mine = fair & torch.tensor([scene.kind == kind for scene in scenes])
        print(f"hard, {kind}: {share_above(right[mine], wrong[mine]):.4f} of {int(mine.sum())}")
    share = share_above(right[fair], wrong[fair])
    print(f"hard: {share:.4f} of {int(fair.sum())}")
    assert share >= 0.90


def blurred(images: Tensor) -> Tensor:
    small = F.interpolate(images, scale_factor=0.25, mode="bilinear", antialias=True)
    return F.interpolate(small, scale_factor=4, mode="bilinear").clamp(0, 1)


def noisy(images: Tensor, strength: float = 0.2) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + strength * noise).clamp(0, 1)


def slightly_noisy(images: Tensor) -> Tensor:
    return noisy(images, 0.02)


def mixed(images: Tensor) -> Tensor:
    return 0.6 * images + 0.4 * images.roll(1, dims=0)


@pytest.mark.parametrize("degrade", [blurred, noisy, mixed, slightly_noisy])
def test_hps_prefers_a_clean_image_to_a_degraded_one(hps, renderings, degrade):
    _, prompts, images = renderings
    share = share_above(hps(images, prompts), hps(degrade(images), prompts))
    print(f"clean above {degrade.__name__}: {share:.4f}")
    assert share >= 0.90
