"""Scorers against PIL, open_clip and their recipes written out, and the protocol they are held to.

The last part builds the published architectures with random weights; the large ones are slow.
"""

import io
import json
import math
import random
import re
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from texforce import reward_specs, rewards, scorers, weights, world
from texforce.errors import ArtifactError, InputError, RewardError
from texforce.prompt_sets import KINDS, read_prompts

NUM_RENDERINGS = 200


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
    padded = scorers.pad_to_square(images, 224)
    assert padded.shape == (2, 3, 224, 224)
    torch.testing.assert_close(padded, torch.stack([pad_by_pil(image, 224) for image in images]), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(384, 512), (512, 200), (300, 300), (32, 32)])
def test_preprocessing_equals_open_clips_own_within_its_rounding(height, width):
    transform = open_clip.image_transform(224, is_train=False, resize_mode="longest", fill_color=0)
    images = smooth_images(2, height, width)
    mine = scorers.normalise(scorers.pad_to_square(images, 224))
    theirs = torch.stack([transform(to_pil(image)) for image in images])
    levels = (mine - theirs).abs() * torch.tensor(scorers.CLIP_STD)[:, None, None] * 255
    assert levels.max() <= 1.6  # of 255: PIL rounds once going in and once coming out


def test_padding_is_black_and_centred_to_the_pixel():
    padded = scorers.pad_to_square(torch.ones(1, 3, 10, 3), 9)  # 9 x 2.7, so 9 x 3 pixels
    expected = torch.zeros(1, 3, 9, 9)
    expected[..., 3:6] = 1
    torch.testing.assert_close(padded, expected)
    odd = scorers.pad_to_square(torch.ones(1, 3, 2, 8), 8)
    assert odd[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    uneven = scorers.pad_to_square(torch.ones(1, 3, 3, 8), 8)
    assert uneven[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]  # the odd row goes below


def test_an_extremely_long_image_keeps_a_row():
    padded = scorers.pad_to_square(torch.ones(1, 3, 1, 500), 16)
    assert padded.shape == (1, 3, 16, 16)
    assert padded[0, 0].sum().item() == pytest.approx(16)


def test_normalising_by_hand():
    images = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(1, 3, 2, 2)
    normalised = scorers.normalise(images)[0, :, 0, 0].tolist()
    by_hand = [(0 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    assert normalised == pytest.approx(by_hand, abs=1e-6)


# --- CLIP's preprocessing ---


def crop_by_pil(image: Tensor, size: int) -> Tensor:
    """The shortest side to `size` by PIL's bicubic filter, and the square in the middle, as torchvision does it."""
    from torchvision.transforms import v2

    height, width = image.shape[1:]
    shape = (int(size * width / height), size) if width > height else (size, int(size * height / width))
    channels = [Image.fromarray(channel.numpy()).resize(shape, Image.Resampling.BICUBIC) for channel in image]
    return v2.CenterCrop(size)(torch.from_numpy(np.stack([np.array(channel) for channel in channels])).clamp(0, 1))


SIZES = [(512, 512), (384, 512), (512, 200), (301, 227), (99, 333), (64, 48), (32, 32), (224, 224), (70, 71), (65, 64)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cropping_to_a_square_equals_pil(height, width):
    images = random_images(2, height, width)
    cropped = scorers.crop_to_square(images, 224)
    assert cropped.shape == (2, 3, 224, 224)
    torch.testing.assert_close(cropped, torch.stack([crop_by_pil(image, 224) for image in images]), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("height", "width"), [(384, 512), (512, 200), (301, 227), (32, 32), (70, 71), (65, 64)])
def test_cropping_equals_openclips_and_transformers_own_within_their_rounding(height, width):
    import open_clip
    from transformers import CLIPImageProcessor

    images = smooth_images(2, height, width)
    pictures = [to_pil(image) for image in images]
    transform = open_clip.image_transform(224, is_train=False)
    theirs = CLIPImageProcessor()(pictures, return_tensors="pt").pixel_values
    for expected, offset in ((torch.stack([transform(picture) for picture in pictures]), round), (theirs, math.floor)):
        mine = scorers.normalise(scorers.crop_to_square(images, 224, offset))
        levels = (mine - expected).abs() * torch.tensor(scorers.CLIP_STD)[:, None, None] * 255
        assert levels.max() <= 1.6  # of 255


# --- the preprocessing of the scorers' own code, to the bit ---


def levels_of_255(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_exact_cropping_is_that_of_the_scorers_own_code_to_the_bit(height, width):
    """torchvision's, as CLIP, ImageReward and LAION's predictor have it, and that of transformers, as PickScore has it."""
    from torchvision import transforms
    from transformers import CLIPImageProcessorPil

    images = levels_of_255(random_images(2, height, width))
    pictures = [to_pil(image) for image in images]
    steps = (transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor())
    theirs = torch.stack([transforms.Compose(steps)(picture) for picture in pictures])
    assert torch.equal(scorers.crop_to_square_exactly(images, 224), theirs)
    processed = CLIPImageProcessorPil()(pictures, return_tensors="pt").pixel_values
    mine = scorers.normalise(scorers.crop_to_square_exactly(images, 224, math.floor))
    torch.testing.assert_close(mine, processed, rtol=0, atol=1e-6)  # it multiplies by 1 / 255


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_exact_padding_is_that_of_hpsv2s_own_code_to_the_bit_with_its_overshoot(height, width):
    from torchvision import transforms
    from torchvision.transforms import functional as tv

    images, theirs = levels_of_255(random_images(2, height, width).round()), []
    for image in images:
        pixels, scale = transforms.ToTensor()(to_pil(image)), 224 / float(max(height, width))
        size = [round(height * scale), round(width * scale)]
        pixels = tv.resize(pixels, size, transforms.InterpolationMode.BICUBIC)
        over = [224 - size[1], 224 - size[0]]
        theirs.append(tv.pad(pixels, [over[0] // 2, over[1] // 2, over[0] - over[0] // 2, over[1] - over[1] // 2]))
    mine = scorers.pad_to_square_exactly(images, 224)
    assert torch.equal(mine, torch.stack(theirs))
    assert (mine.amax() > 1) == ((height, width) != (224, 224))


@pytest.mark.parametrize(("exact", "on_floats"), [
    (scorers.crop_to_square_exactly, scorers.crop_to_square), (scorers.pad_to_square_exactly, scorers.pad_to_square),
])  # fmt: skip
def test_exact_preprocessing_is_of_eight_bits_and_near_that_of_training_where_images_are_smooth(exact, on_floats):
    images = smooth_images(2, 301, 227)
    assert torch.equal(exact(images, 224), exact(levels_of_255(images), 224))
    assert 0 < (exact(images, 224) - on_floats(images, 224)).abs().max() < 2 / 255


@pytest.mark.parametrize("name", ["hps", "imagereward", "pickscore", "aesthetic", "clip"])
def test_a_network_scores_what_its_own_code_would_make_of_the_images(small_networks, monkeypatch, name):
    scorer, images, prompts = small_networks[name], smooth_images(4, 60, 48), [f"{i} red circles" for i in range(4)]
    on_floats = scorer(images, prompts)
    monkeypatch.setattr(scorer, "exact", True)
    scores = scorer(images, prompts)
    if name == "aesthetic":
        monkeypatch.setattr(scorer.clip, "exact", False)
    assert torch.equal(scores, scorer(levels_of_255(images), prompts))
    assert 0 < (scores - on_floats).abs().max() < on_floats.std()
    monkeypatch.setattr(scorers, "crop_to_square", lambda *_: pytest.fail("it was resized on floats"))
    monkeypatch.setattr(scorers, "pad_to_square", lambda *_: pytest.fail("it was resized on floats"))
    assert torch.equal(scores, scorer(images, prompts))


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
    assert torch.equal(scorers.incompress(images, ["", ""]), scorers.incompress(clamped, ["", ""]))
    assert scorers.incompress(images.half(), ["", ""]).dtype == torch.float32


# --- the protocol ---


def test_scores_come_back_detached_in_float32_on_the_cpu():
    images = random_images(3).requires_grad_()
    scores = scorers.score(lambda images, prompts: images.double().mean(dim=(1, 2, 3)), images, ["a"] * 3)
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)
    assert scorers.score(lambda images, prompts: torch.tensor([1, 2, 3]), images, ["a"] * 3).tolist() == [1.0, 2.0, 3.0]


def test_non_finite_scores_are_passed_on():
    given = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf")])
    scores = scorers.score(lambda images, prompts: given, random_images(4), ["a"] * 4)
    torch.testing.assert_close(scores, given, equal_nan=True)


@pytest.mark.parametrize(("returned", "words"), [
    (torch.zeros(2), r"shape \(3,\) but returned a tensor of shape \(2,\)"),
    (torch.zeros(3, 1), r"shape \(3, 1\)"),
    (torch.zeros(()), r"shape \(\)"),
    ([1.0, 2.0], r"shape \(2,\)"),
    ([1.0, "2.0", 3.0], "returned list that holds '2.0'"),
    ([1.0, None, 3.0], "returned list that holds None"),
    ([1.0, 10**400, 3.0], "returned list"),
    (["1", "2", "3"], "returned list that holds '1'"),
    (np.array(["1", "2", "3"]), "returned ndarray"),
    (np.zeros((3, 1)), r"shape \(3, 1\)"),
    (np.zeros(()), "returned ndarray"),
    ({0: 1.0, 1: 2.0, 2: 3.0}, "returned dict"),
    ([1j, 2j, 3j], "real numbers"),
    (1.0, "returned float"),
    (None, "returned NoneType"),
])  # fmt: skip
def test_a_scorer_that_returns_something_else_is_a_reward_error_with_its_name(returned, words):
    with pytest.raises(RewardError, match=rf"^reward: mine\.py:f must return .*{words}"):
        scorers.score(lambda images, prompts: returned, random_images(3), ["a"] * 3, "mine.py:f")


@pytest.mark.parametrize("returned", [
    [0.5, 1.0, float("nan")], np.array([0.5, 1.0, np.nan]), (0.5, 1, float("nan")),
    [torch.tensor(0.5), torch.tensor(1.0), torch.tensor(torch.nan)], np.array([np.nan, 1.0, 0.5], dtype=">f8")[::-1],
    list(np.array([0.5, 1.0, np.nan], dtype=np.float16)),
], ids=["a list", "an array", "also a tuple", "also tensors", "also other bytes", "also half precision"])  # fmt: skip
def test_a_scorer_may_return_a_list_or_an_array(returned):
    scores = scorers.score(lambda images, prompts: returned, random_images(3), ["a"] * 3)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([0.5, 1.0, float("nan")], nan_ok=True)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("boom"), ZeroDivisionError("zero"), AssertionError("no face")])
def test_a_scorer_that_raises_is_a_reward_error_with_its_cause(error):
    def scorer(images, prompts):
        raise error

    with pytest.raises(RewardError, match=f"the scorer raised {type(error).__name__}: .*{error.args[0]}") as caught:
        scorers.score(scorer, random_images(1), ["a"])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("such a prompt"), torch.OutOfMemoryError("gone"), KeyboardInterrupt()])
def test_bad_input_lack_of_memory_and_interrupts_are_not_the_scorers_failure(error):
    def scorer(images, prompts):
        raise error

    with pytest.raises(type(error)):
        scorers.score(scorer, random_images(1), ["a"])


# --- networks, of small sizes ---


@pytest.fixture(scope="module")
def small_networks(tmp_path_factory):
    """Scorers with random weights: the classes are those that serve the published ones, their towers are small."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(2)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=tower | {"eos_token_id": 49407}, vision_config=vision, projection_dim=24)
    model = CLIPModel(config)
    for parameter in model.parameters():  # as drawn, all images look alike to it
        if parameter.ndim > 1:
            parameter.data *= 3
    model.save_pretrained(folder)
    torch.save(
        {f"layers.{name}": tensor for name, tensor in scorers.linear_head(24).state_dict().items()}, folder / "head.pth"
    )
    paths = {"clip": folder, "pickscore": folder, "aesthetic": folder / "head.pth", "aesthetic-clip": folder}
    networks = {
        name: rewards.load_reward(name, checkpoints=paths).parts[name] for name in ("clip", "pickscore", "aesthetic")
    }
    return networks | {"hps": rewards.load_reward("hps").parts["hps"], "imagereward": small_imagereward(folder)}


def small_imagereward(folder):
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    torch.manual_seed(2)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionModel(BlipVisionConfig(**tower, image_size=32, patch_size=8))
    text = BlipTextConfig(**tower, vocab_size=30524, encoder_hidden_size=32, is_decoder=True)
    models = vision, BlipTextModel(text, add_pooling_layer=False), scorers.linear_head(32)
    for parameter in (parameter for model in models[:2] for parameter in model.parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    states = {part: model.state_dict() for part, model in zip(("vision", "text", "head"), models, strict=True)}
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circles", "blue"]
    words += [f"##{i}" for i in range(30522 - len(words))]
    tokenizer = folder / "bert"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.save({}, folder / "ImageReward.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "build_blip", lambda: models)
        patch.setattr(scorers, "blip_tensors", lambda *_: states)
        patch.setattr(scorers.ImageReward, "IMAGE_SIZE", 32)
        paths = {"imagereward": folder / "ImageReward.pt", "imagereward-tokenizer": tokenizer}
        scorer = rewards.load_reward("imagereward", checkpoints=paths).parts["imagereward"]
    scorer.IMAGE_SIZE = 32
    return scorer


@pytest.mark.parametrize("name", ["hps", "imagereward", "pickscore", "aesthetic", "clip"])
def test_scores_of_a_batch_equal_those_of_each_image(small_networks, name):
    scorer, images = small_networks[name], smooth_images(32, 32, 32)
    prompts = [f"a {word} circle" for word in ("red", "blue", "green", "red")] * 8  # some twice
    each = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]) for i in range(32)])
    assert each.std() > 1e-3
    torch.testing.assert_close(scorer(images, prompts), each, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["hps", "imagereward", "pickscore", "aesthetic", "clip"])
def test_gradients_reach_the_images_and_are_the_scores_slope(small_networks, name):
    scorer, images = small_networks[name], (0.3 + 0.4 * smooth_images(2, 32, 32)).requires_grad_()
    candidates = [f"{i} red circles" for i in range(20)]  # where the cosine is negative, CLIPScore has no slope
    prompts = [max(candidates, key=lambda prompt: scorer(image[None], [prompt]).item()) for image in images]
    scores = scorer.with_gradients(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    slope = (scorer(images.detach() + step, prompts) - scorer(images.detach() - step, prompts)) / 2e-3
    torch.testing.assert_close(slope, gradient.flatten(1).norm(dim=1), rtol=0.05, atol=0)


def test_scoring_keeps_no_graph_and_the_scorers_weights_take_no_gradient(small_networks):
    images = smooth_images(2, 32, 32).requires_grad_()
    for scorer in small_networks.values():
        assert not scorer(images, ["a", "b"]).requires_grad
        modules = [module for module in vars(scorer).values() if isinstance(module, torch.nn.Module)]
        assert modules
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


def test_clipscore_is_two_and_a_half_times_the_positive_cosine(small_networks):
    images, prompts = smooth_images(8, 32, 32), [f"{i} circles" for i in range(8)]
    cosines = small_networks["clip"].cosine(images, prompts)
    assert cosines.min() < 0 < cosines.max()
    torch.testing.assert_close(small_networks["clip"](images, prompts), 2.5 * cosines.clamp(min=0))


def test_a_folders_own_tokenizer_is_used_and_must_fit_its_model(tmp_path, small_networks):
    from types import SimpleNamespace

    config = small_networks["clip"].model.config.text_config
    shutil.copytree(reward_specs.EMBEDDED_HPS.parent / "tokenizer", tmp_path / "tokenizer")
    ids = scorers.clip_tokenizer(tmp_path / "tokenizer", config)(["a red circle"])
    assert ids.shape == (1, 77)
    assert ids.max() < 1144
    with pytest.raises(ArtifactError, match=r"it knows .* tokens, its text encoder 9"):
        scorers.clip_tokenizer(tmp_path / "tokenizer", SimpleNamespace(max_position_embeddings=77, vocab_size=9))


def tokenizer_with(flaw: str, folder) -> None:
    """Spoil the tokenizer in a folder."""
    if flaw == "empty object":
        (folder / "tokenizer.json").write_text("{}")
    elif flaw == "half an object":
        (folder / "tokenizer.json").write_text("{")
    elif flaw == "half of its files":
        for file in folder.iterdir():
            file.unlink()
        (folder / "merges.txt").write_text("#version: 0.2\n")
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize("flaw", ["empty object", "half an object", "half of its files", "missing"])
def test_a_broken_tokenizer_is_refused_with_its_place(tmp_path, small_networks, flaw):
    checkpoint = copy_config(tmp_path)
    shutil.copy(reward_specs.EMBEDDED_HPS, checkpoint)
    tokenizer_with(flaw, tmp_path / "tokenizer")
    with pytest.raises(ArtifactError, match=r"c\.json: refused as a scorer's checkpoint"):
        rewards.load_reward("hps", checkpoints={"hps": checkpoint})
    if flaw != "missing":  # then it is CLIP's own
        with pytest.raises(ArtifactError, match=r"tokenizer: refused as a scorer's checkpoint"):
            scorers.clip_tokenizer(tmp_path / "tokenizer", small_networks["clip"].model.config.text_config)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"embed_dim": 8}', '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": 3}']
)
def test_a_broken_architecture_beside_a_checkpoint_is_refused(tmp_path, content):
    checkpoint = copy_config(tmp_path)
    shutil.copy(reward_specs.EMBEDDED_HPS, checkpoint)
    checkpoint.with_suffix(".json").write_text(content)
    with pytest.raises(ArtifactError, match=r"refused as a scorer's checkpoint"):
        rewards.load_reward("hps", checkpoints={"hps": checkpoint})


@pytest.mark.parametrize("words", [[], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]], ids=["no files", "few words"])
def test_an_imagereward_without_berts_words_is_refused(tmp_path, words):
    torch.save({}, tmp_path / "ImageReward.pt")
    folder = tmp_path / "bert"
    folder.mkdir()
    if words:
        (folder / "vocab.txt").write_text("\n".join(words))
    paths = {"imagereward": tmp_path / "ImageReward.pt", "imagereward-tokenizer": folder}
    with pytest.raises(ArtifactError, match=r"bert: refused.*not the tokenizer of bert-base-uncased"):
        rewards.load_reward("imagereward", checkpoints=paths)


# --- text in the image ---


def written(text: str, size: int = 256, seed: int = 0) -> Tensor:
    """A text on a ground of colours, as an image (3, size, size)."""
    canvas = to_pil(0.6 + 0.4 * F.interpolate(random_images(1, 3, 3, seed), (size, size), mode="bilinear")[0])
    font = ImageFont.load_default(size // 8)
    ImageDraw.Draw(canvas).text((size // 12, size // 3), text, fill=(20, 20, 60), font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def ocr():
    return rewards.load_reward("ocr")


@pytest.mark.quick(1)
@pytest.mark.parametrize(("right", "wrong", "size"), [("coffee shop", "HELLO", 128), ("HELLO", "Open 24 hours", 512)])
def test_the_right_text_scores_high_and_a_wrong_one_low(ocr, right, wrong, size):
    images = torch.stack([written(right, size), written(wrong, size)])
    high, low = ocr(images, [f'a sign that says "{right}"'] * 2).tolist()
    assert high > 0.9
    assert low < 0.4


@pytest.mark.slow
def test_sentences_of_the_set_text_score_higher_with_their_own_text_than_with_anothers(ocr):
    prompts = [prompt for prompt in read_prompts("text") if reward_specs.quoted(prompt) in ("OPEN LATE", "STOP", "PLUM")]
    assert len(prompts) == 3
    images = torch.stack([written(reward_specs.quoted(prompt)) for prompt in prompts])
    assert ocr(images, prompts).min() > 0.7 > 0.5 > ocr(images.roll(1, 0), prompts).max()


def test_an_image_without_text_scores_zero(ocr):
    images = torch.stack([torch.zeros(3, 64, 64), random_images(1, 64, 64)[0]])
    assert ocr(images, ['"hello"'] * 2).tolist() == [0, 0]


@pytest.mark.parametrize(("wanted", "found", "expected"), [
    ("HELLO", "hello", 1.0),
    ("HELLO", "say hel lo twice", 1.0),
    ("HELLO", "hallo", 0.8),
    ("HELLO", "", 0.0),
    ("HELLO", "help", 0.6),
    ("ok", "something else entirely", 0.0),
    ("coffee shop", "COFFEESHOP", 1.0),
    ("straße", "STRASSE", 1.0),
])  # fmt: skip
def test_the_similarity_of_texts_by_hand(wanted, found, expected):
    assert scorers.text_similarity(wanted, found) == pytest.approx(expected)


@pytest.mark.parametrize(("prompt", "expected"), [
    ('a sign that says "Open"', "Open"),
    ("a sign that says 'Open'", "Open"),
    ("a sign that says “Open now”", "Open now"),
    ('"one" over "two"', "one two"),
    ("the dog's bowl with 'Rex' on it", "Rex"),
])  # fmt: skip
def test_the_text_to_be_drawn_is_the_quoted_one(prompt, expected):
    assert reward_specs.quoted(prompt) == expected


@pytest.mark.parametrize("prompt", ["a sign", "the dog's bowl and the cat's", 'a lone " mark', '""', "'  '"])
def test_a_prompt_without_a_quoted_text_is_named(prompt):
    with pytest.raises(ValueError, match=r"quotation marks, which .* lacks"):
        reward_specs.quoted(prompt)


# --- faces and hands ---


class FakeMetric:
    """What pyiqa's topiq_nr-face does with its input; its weights are not to be had offline."""

    def __call__(self, image: Tensor) -> Tensor:
        assert image.shape[0] == 1, f"Only support batch size 1, but got {image.shape[0]}"
        assert image.min() >= 0, "range"
        if image.mean() < 0.1:
            raise AssertionError("No face detected in the input image.")
        if image.mean() > 0.9:
            raise AssertionError("something else")
        return image.mean()[None, None]


@pytest.fixture
def pyiqa(monkeypatch):
    made = []

    def create_metric(name, device):
        made.append((name, device))
        return FakeMetric()

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    monkeypatch.setattr(reward_specs, "missing_packages", lambda name: [])
    return made


def test_faces_are_judged_one_by_one_and_an_image_without_one_gets_the_floor(pyiqa):
    scorer = rewards.load_reward("face")
    images = torch.tensor([0.5, 0.05, 0.25])[:, None, None, None].expand(3, 3, 8, 8)
    assert scorer(images, ["a", "b", "c"]).tolist() == [0.5, 0.0, 0.25]
    assert pyiqa == [("topiq_nr-face", torch.device("cpu"))]
    with pytest.raises(RewardError, match="AssertionError: something else"):
        scorer(torch.ones(1, 3, 8, 8), ["a"])


def test_faces_without_their_weights_are_bad_input(pyiqa, monkeypatch):
    def create_metric(name, device):
        raise OSError("Name or service not known")

    monkeypatch.setattr(sys.modules["pyiqa"], "create_metric", create_metric)
    with pytest.raises(FileNotFoundError, match=r"weights of face: Name or service"):
        rewards.load_reward("face")


def test_hands_are_owlv2s_surest_box(tmp_path, monkeypatch):
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(reward_specs.EMBEDDED_HPS.parent / "tokenizer")
    config = Owlv2Config(
        text_config=tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config=tower | {"image_size": 64, "patch_size": 16},
        projection_dim=32,
    )  # fmt: skip
    model = Owlv2ForObjectDetection(config).eval()
    torch.nn.init.constant_(model.class_head.logit_scale.bias, -3.0)  # as drawn, it is sure of everything
    model.save_pretrained(tmp_path)
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    processor.save_pretrained(tmp_path)
    scorer = rewards.load_reward("hand", checkpoints={"hand": tmp_path})
    images = smooth_images(3, 40, 56)
    scores = scorer(images, [""] * 3)
    inputs = processor(text=[["a human hand"]] * 3, images=[to_pil(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    found = processor.post_process_grounded_object_detection(outputs, threshold=0.0)
    expected = torch.stack([boxes["scores"].max() for boxes in found])
    assert expected.std() > 1e-5
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(scorers.Hand, "MAX_BATCH", 2)
    torch.testing.assert_close(scorer(images, [""] * 3), scores, rtol=0, atol=1e-6)


# --- HPS ---


@pytest.fixture(scope="module")
def hps():
    return rewards.load_reward("hps")


def copy_config(folder):
    """A folder with the embedded scorer's architecture and tokenizer, and the path of a checkpoint to put beside them."""
    tiny = reward_specs.EMBEDDED_HPS.parent
    shutil.copy(tiny / "hps.json", folder / "c.json")
    shutil.copytree(tiny / "tokenizer", folder / "tokenizer")
    return folder / "c.pt"


@pytest.fixture(scope="module")
def renderings(tiny_build):
    rng = random.Random(0)
    scenes = [tiny_build.draw_scene(rng, KINDS[k % 4]) for k in range(NUM_RENDERINGS)]
    prompts = [tiny_build.caption(scene, rng, rare_probability=0.35) for scene in scenes]
    return scenes, prompts, tiny_build.render(scenes, random.Random(1))


@pytest.fixture(scope="module")
def scores(hps, renderings):
    """hps of the renderings with their own prompts."""
    _, prompts, images = renderings
    return hps(images, prompts)


def test_hps_equals_open_clip_itself_on_pil_images(hps):
    tiny = reward_specs.EMBEDDED_HPS.parent
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


def test_rounding_an_image_to_eight_bits_hardly_moves_hps(hps, renderings, scores):
    _, prompts, images = renderings
    rounded = hps((images * 255).round() / 255, prompts)
    assert (scores - rounded).abs().mean() <= 0.1 * scores.std()


def test_hps_is_a_cosine_in_float32(scores):
    assert (scores.dtype, scores.shape) == (torch.float32, (NUM_RENDERINGS,))
    assert scores.abs().max() <= 1


def test_hps_of_a_batch_equals_hps_of_each(hps, renderings):
    _, prompts, images = renderings
    prompts = prompts[:28] + prompts[:4]  # some twice
    whole = hps(images[:32], prompts)
    each = torch.cat([hps(images[i : i + 1], prompts[i : i + 1]) for i in range(32)])
    torch.testing.assert_close(whole, each, rtol=0, atol=1e-5)


def test_hps_of_equal_prompts_goes_to_the_right_images(hps, renderings, scores):
    _, prompts, images = renderings
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    shuffled = hps(images[:32][order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (65, 32), (32, 65)])
def test_the_embedded_scorer_refuses_images_that_are_not_of_its_world(hps, height, width):
    with pytest.raises(ValueError, match=f"32x32 pixels only, not {width}x{height}.*--reward-checkpoint"):
        hps(torch.zeros(1, 3, height, width), ["a red circle"])


def test_the_refusal_passes_through_the_protocol_as_bad_input(hps):
    with pytest.raises(ValueError, match="embedded hps"):
        scorers.score(hps, torch.zeros(1, 3, 512, 512), ["a red circle"])


def test_a_checkpoint_of_ones_own_takes_any_size_and_the_name_hps_v2(tmp_path):
    checkpoint = copy_config(tmp_path)
    shutil.copy(reward_specs.EMBEDDED_HPS, checkpoint)
    scorer = rewards.load_reward("hps-v2", checkpoints={"hps-v2": checkpoint})
    assert scorer(random_images(1, 128, 96), ["a red circle"]).shape == (1,)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_hps_checkpoint_is_refused(tmp_path, share):
    content = reward_specs.EMBEDDED_HPS.read_bytes()
    checkpoint = copy_config(tmp_path)
    checkpoint.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        rewards.load_reward("hps", checkpoints={"hps": checkpoint})


def test_a_checkpoint_that_lacks_a_key_is_refused(tmp_path):
    checkpoint = copy_config(tmp_path)
    state_dict = torch.load(reward_specs.EMBEDDED_HPS, weights_only=True)["state_dict"]
    del state_dict["text_projection"]
    torch.save({"state_dict": state_dict}, checkpoint)
    with pytest.raises(ArtifactError, match="text_projection"):
        rewards.load_reward("hps", checkpoints={"hps": checkpoint})


# --- what the embedded scorer prefers ---


def meaning(scene: world.Scene) -> tuple:
    mirrored = {"right of": "left of", "below": "above"}
    if scene.relation in mirrored:
        return mirrored[scene.relation], scene.objects[::-1]
    return scene.relation, scene.objects if scene.relation else tuple(sorted(scene.objects))


def share_above(better: Tensor, worse: Tensor) -> float:
    return (better > worse).double().mean().item()


def test_hps_ranks_the_right_prompt_above_a_wrong_one(hps, renderings, scores, tiny_build):
    scenes, _, images = renderings
    rng = random.Random(2)
    wrong = []
    for scene in scenes:  # another sentence of the same kind with another meaning
        other = tiny_build.draw_scene(rng, scene.kind)
        while meaning(other) == meaning(scene):
            other = tiny_build.draw_scene(rng, scene.kind)
        wrong.append(tiny_build.caption(other, rng))
    share = share_above(scores, hps(images, wrong))
    print(f"right above wrong prompt: {share:.4f}")
    assert share >= 0.95


def test_hps_ranks_the_right_prompt_above_one_that_differs_in_one_thing(hps, renderings, scores, tiny_build):
    scenes, _, images = renderings
    rng = random.Random(3)
    mutants = [tiny_build.mutate(scene, rng) for scene in scenes]
    fair = torch.tensor([meaning(one) != meaning(other) for one, other in zip(scenes, mutants, strict=True)])
    right, wrong = scores, hps(images, [tiny_build.caption(mutant, rng) for mutant in mutants])
    for kind in KINDS:
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
def test_hps_prefers_a_clean_image_to_a_degraded_one(hps, renderings, scores, degrade):
    _, prompts, images = renderings
    share = share_above(scores, hps(degrade(images), prompts))
    print(f"clean above {degrade.__name__}: {share:.4f}")
    assert share >= 0.90


# --- the published architectures, with random weights, against their recipes ---
#
# Nothing of open_clip's or transformers' networks is used on the side of the recipe: attention, layers and names are those
# of the papers and of the authors' checkpoints.

PROMPTS = ["a red circle left of a blue square", "An oil painting of two dogs, by the sea!"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class RandomWeights:
    """Random tensors, all views of one piece of memory, so that a checkpoint of a billion numbers is a small file."""

    def __init__(self, seed: int, largest: int) -> None:
        self.pool = 0.02 * torch.randn(largest + 1_000_000, generator=torch.Generator().manual_seed(seed))
        self.offset = 0

    def __call__(self, *shape: int) -> Tensor:
        self.offset = (self.offset + 7919) % 1_000_000
        return self.pool[self.offset : self.offset + math.prod(shape)].reshape(shape)

    def linear(self, name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(outputs, inputs), f"{name}.bias": self(outputs)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 5 * self(width), f"{name}.bias": 5 * self(width)}


def odd_images(height: int, width: int, num_images: int = 1, seed: int = 0) -> Tensor:
    """Smooth images. Sizes with an odd number of pixels left over show where a recipe puts the half pixel."""
    coarse = torch.rand(num_images, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """By PIL's bicubic filter, which has antialiasing, in float."""
    channels = [
        np.array(Image.fromarray(channel.numpy()).resize((width, height), Image.Resampling.BICUBIC)) for channel in image
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 1)


def crop(image: Tensor, size: int, to_whole) -> Tensor:
    """The shortest side to size, and the square in the middle."""
    height, width = image.shape[1:]
    shortest = min(height, width)
    image = resize(image, int(size * height / shortest), int(size * width / shortest))
    top, left = (to_whole((side - size) / 2) for side in image.shape[1:])
    return (image[:, top : top + size, left : left + size] - MEAN) / STD


def pad(image: Tensor, size: int) -> Tensor:
    """The longest side to size, on a black square."""
    height, width = image.shape[1:]
    scale = size / max(height, width)
    image = resize(image, round(scale * height), round(scale * width))
    square = torch.zeros(3, size, size)
    top, left = (size - image.shape[1]) // 2, (size - image.shape[2]) // 2
    square[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return (square - MEAN) / STD


# --- their layers ---


def linear(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def norm(x: Tensor, tensors: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + eps).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention over (N, L, D), with a mask that is added to the scores."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def head(features: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """768-1024-128-64-16-1 without activations; dropout takes up the numbers between."""
    for number in (0, 2, 4, 6, 7):
        features = linear(features, tensors, f"{prefix}{number}")
    return features.squeeze(1)


# --- their CLIP ---


@dataclass(frozen=True)
class Size:
    """A published CLIP: layers, width and heads of the towers, patches of the image, width of the features."""

    image: tuple[int, int, int]
    text: tuple[int, int, int]
    patch: int
    features: int
    activation: Callable[[Tensor], Tensor]


VIT_H_14 = Size((32, 1280, 16), (24, 1024, 16), 14, 1024, gelu)
VIT_L_14 = Size((24, 1024, 16), (12, 768, 12), 14, 768, quick_gelu)
VIT_B_32 = Size((12, 768, 12), (12, 512, 8), 32, 512, quick_gelu)


def clip_tensors(size: Size, seed: int) -> dict[str, Tensor]:
    """By the names of OpenAI's and open_clip's checkpoints."""
    new = RandomWeights(seed, largest=49408 * size.text[1])
    tensors = {"logit_scale": torch.tensor(4.6052)}
    for prefix, (num_layers, width, _) in (("visual.", size.image), ("", size.text)):
        for layer in range(num_layers):
            block = f"{prefix}transformer.resblocks.{layer}."
            tensors |= new.norm(block + "ln_1", width) | new.norm(block + "ln_2", width)
            tensors |= {block + "attn.in_proj_weight": new(3 * width, width), block + "attn.in_proj_bias": new(3 * width)}
            tensors |= new.linear(block + "attn.out_proj", width, width)
            tensors |= new.linear(block + "mlp.c_fc", width, 4 * width) | new.linear(block + "mlp.c_proj", 4 * width, width)
    width, text_width = size.image[1], size.text[1]
    tensors |= {
        "visual.class_embedding": new(width),
        "visual.positional_embedding": new((224 // size.patch) ** 2 + 1, width),
        "visual.conv1.weight": new(width, 3, size.patch, size.patch),
        "visual.proj": new(width, size.features),
        "token_embedding.weight": new(49408, text_width),
        "positional_embedding": new(77, text_width),
        "text_projection": new(text_width, size.features),
    }
    tensors |= new.norm("visual.ln_pre", width) | new.norm("visual.ln_post", width) | new.norm("ln_final", text_width)
    return tensors


def tower(x: Tensor, tensors: dict[str, Tensor], prefix: str, size: tuple[int, int, int], activation, mask=None) -> Tensor:
    num_layers, _, num_heads = size
    for layer in range(num_layers):
        block = f"{prefix}transformer.resblocks.{layer}."
        inner = norm(x, tensors, block + "ln_1", 1e-5)
        parts = (inner @ tensors[block + "attn.in_proj_weight"].T + tensors[block + "attn.in_proj_bias"]).chunk(3, dim=-1)
        x = x + linear(attention(*parts, num_heads, mask), tensors, block + "attn.out_proj")
        inner = activation(linear(norm(x, tensors, block + "ln_2", 1e-5), tensors, block + "mlp.c_fc"))
        x = x + linear(inner, tensors, block + "mlp.c_proj")
    return x


def image_features(pixels: Tensor, tensors: dict[str, Tensor], size: Size) -> Tensor:
    patches = F.conv2d(pixels, tensors["visual.conv1.weight"], stride=size.patch).flatten(2).transpose(1, 2)
    first = tensors["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + tensors["visual.positional_embedding"]
    x = tower(norm(x, tensors, "visual.ln_pre", 1e-5), tensors, "visual.", size.image, size.activation)
    return unit(norm(x[:, 0], tensors, "visual.ln_post", 1e-5) @ tensors["visual.proj"])


def text_features(prompts: list[str], tensors: dict[str, Tensor], size: Size) -> Tensor:
    ids = open_clip.get_tokenizer("ViT-B-32")(prompts)
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    causal = torch.full((77, 77), -math.inf).triu(1)
    x = norm(tower(x, tensors, "", size.text, size.activation, causal), tensors, "ln_final", 1e-5)
    return unit(x[torch.arange(len(ids)), ids.argmax(dim=1)] @ tensors["text_projection"])


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def save_for_transformers(folder: Path, tensors: dict[str, Tensor], size: Size) -> Path:
    """The same CLIP as a folder in transformers' format."""
    named = {"logit_scale": tensors["logit_scale"]}
    for theirs, ours in {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }.items():
        named[theirs] = tensors[ours]
    named |= {"visual_projection.weight": tensors["visual.proj"].T, "text_projection.weight": tensors["text_projection"].T}
    norms = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post"}
    layers = norms | {"text_model.final_layer_norm": "ln_final"}
    for model, prefix, (num_layers, _, _) in (("vision_model", "visual.", size.image), ("text_model", "", size.text)):
        for layer in range(num_layers):
            theirs, ours = f"{model}.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                parts = tensors[f"{ours}attn.in_proj_{kind}"].chunk(3)
                named |= {f"{theirs}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
            names = ("self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
            own = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
            layers |= {theirs + name: ours + other for name, other in zip(names, own, strict=True)}
    for theirs, ours in layers.items():
        named |= {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    towers = {}
    for part, (num_layers, width, num_heads) in (("vision_config", size.image), ("text_config", size.text)):
        towers[part] = {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads, "projection_dim": size.features,
            "hidden_act": "gelu" if size.activation is gelu else "quick_gelu",
        }  # fmt: skip
    towers["vision_config"] |= {"patch_size": size.patch, "image_size": 224}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": size.features} | towers))
    torch.save(named, folder / "pytorch_model.bin")
    return folder


def check(scores: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check that scores equal the expected ones, which must differ among themselves."""
    print(f"largest difference {(scores - expected).abs().max():.1e} in {expected.tolist()}")
    assert expected.max() - expected.min() > 50 * tolerance
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_hps_equals_its_recipe(tmp_path):
    tensors = clip_tensors(VIT_H_14, seed=0)
    torch.save({"state_dict": tensors}, tmp_path / "HPS_v2.1_compressed.pt")
    scorer = rewards.load_reward("hps", checkpoints={"hps": tmp_path / "HPS_v2.1_compressed.pt"})
    scores = scorer(odd_images(99, 71).expand(2, -1, -1, -1), PROMPTS)
    features = image_features(pad(odd_images(99, 71)[0], 224)[None], tensors, VIT_H_14)
    check(scores, (features * text_features(PROMPTS, tensors, VIT_H_14)).sum(dim=1), 1e-6)


@pytest.mark.slow
def test_pickscore_equals_its_recipe(tmp_path):
    tensors = clip_tensors(VIT_H_14, seed=1)
    folder = save_for_transformers(tmp_path / "pickscore", tensors, VIT_H_14)
    scorer = rewards.load_reward("pickscore", checkpoints={"pickscore": folder})
    scores = scorer(odd_images(70, 71).expand(2, -1, -1, -1), PROMPTS)
    features = image_features(crop(odd_images(70, 71)[0], 224, math.floor)[None], tensors, VIT_H_14)
    expected = tensors["logit_scale"].exp() * (features * text_features(PROMPTS, tensors, VIT_H_14)).sum(dim=1)
    check(scores, expected, 2e-5)


def test_clip_equals_its_recipe(tmp_path):
    tensors = clip_tensors(VIT_B_32, seed=2)
    scorer = rewards.load_reward("clip", checkpoints={"clip": save_for_transformers(tmp_path / "clip", tensors, VIT_B_32)})
    drawn, prompts = odd_images(65, 64, num_images=2), PROMPTS
    features = image_features(torch.stack([crop(image, 224, round) for image in drawn]), tensors, VIT_B_32)
    cosines = (features * text_features(prompts, tensors, VIT_B_32)).sum(dim=1)
    check(scorer(drawn, prompts), 2.5 * cosines.clamp(min=0), 2e-6)


@pytest.mark.slow
def test_aesthetic_equals_its_recipe(tmp_path):
    tensors, new = clip_tensors(VIT_L_14, seed=3), RandomWeights(4, largest=768 * 1024)
    sizes = (768, 1024, 128, 64, 16, 1)
    layers = {}
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        layers |= {name: 5 * tensor for name, tensor in new.linear(f"layers.{number}", inputs, outputs).items()}
    torch.save(layers, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    scorer = rewards.load_reward(
        "aesthetic",
        checkpoints={
            "aesthetic": tmp_path / "sac+logos+ava1-l14-linearMSE.pth",
            "aesthetic-clip": save_for_transformers(tmp_path / "clip", tensors, VIT_L_14),
        },
    )
    drawn = odd_images(64, 65, num_images=2)
    features = image_features(torch.stack([crop(image, 224, round) for image in drawn]), tensors, VIT_L_14)
    check(scorer(drawn, ["", ""]), head(features, layers, "layers."), 5e-6)


# --- their ImageReward ---


def imagereward_tensors() -> dict[str, Tensor]:
    """A checkpoint in the authors' layout."""
    new, tensors = RandomWeights(5, largest=30524 * 768), {}
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    tensors |= {vision + "cls_token": new(1, 1, 1024), vision + "pos_embed": new(1, 197, 1024)}
    tensors |= {vision + "patch_embed.proj.weight": new(1024, 3, 16, 16), vision + "patch_embed.proj.bias": new(1024)}
    for layer in range(24):
        block = f"{vision}blocks.{layer}."
        tensors |= new.norm(block + "norm1", 1024) | new.norm(block + "norm2", 1024)
        tensors |= new.linear(block + "attn.qkv", 1024, 3072) | new.linear(block + "attn.proj", 1024, 1024)
        tensors |= new.linear(block + "mlp.fc1", 1024, 4096) | new.linear(block + "mlp.fc2", 4096, 1024)
    tensors |= new.norm(vision + "norm", 1024)
    tensors[text + "embeddings.position_ids"] = torch.arange(512)[None]
    tensors[text + "embeddings.word_embeddings.weight"] = new(30524, 768)
    tensors[text + "embeddings.position_embeddings.weight"] = new(512, 768)
    tensors |= new.norm(text + "embeddings.LayerNorm", 768)
    for layer in range(12):
        block = f"{text}encoder.layer.{layer}."
        for kind, width in (("attention", 768), ("crossattention", 1024)):
            tensors |= new.linear(f"{block}{kind}.self.query", 768, 768)
            tensors |= new.linear(f"{block}{kind}.self.key", width, 768) | new.linear(
                f"{block}{kind}.self.value", width, 768
            )
            tensors |= new.linear(f"{block}{kind}.output.dense", 768, 768)
            tensors |= new.norm(f"{block}{kind}.output.LayerNorm", 768)
        tensors |= new.linear(block + "intermediate.dense", 768, 3072) | new.linear(block + "output.dense", 3072, 768)
        tensors |= new.norm(block + "output.LayerNorm", 768)
    tensors |= new.linear("blip.vision_proj", 1024, 256) | new.linear("blip.text_proj", 768, 256)
    sizes = (768, 1024, 128, 64, 16, 1)
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        tensors |= {name: 2 * tensor for name, tensor in new.linear(f"mlp.layers.{number}", inputs, outputs).items()}
    return tensors


WORDS = ["a", "red", "circle", "left", "of", "blue", "square", ",", "!"]
# bert-base-uncased's size and special tokens; its other words are not to be had offline
VOCABULARY = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
VOCABULARY += [f"[unused{i}]" for i in range(99, 99 + 30522 - len(VOCABULARY))]


def bert_ids(prompt: str, length: int = 35) -> tuple[Tensor, Tensor]:
    """Ids and the mask that is added to attention's scores, padded or cut to a length with its last token kept."""
    words = re.findall(r"\w+|[^\w\s]", prompt.lower())[: length - 2]
    ids = [101, *(VOCABULARY.index(word) if word in WORDS else 100 for word in words), 102]
    padding = length - len(ids)
    return torch.tensor(ids + [0] * padding), torch.tensor([0.0] * len(ids) + [-math.inf] * padding)


def imagereward(pixels: Tensor, prompts: list[str], tensors: dict[str, Tensor]) -> Tensor:
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    weight, bias = (tensors[f"{vision}patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    patches = F.conv2d(pixels, weight, bias, stride=16).flatten(2).transpose(1, 2)
    x = (
        torch.cat([tensors[vision + "cls_token"].expand(len(pixels), -1, -1), patches], dim=1)
        + tensors[vision + "pos_embed"]
    )
    for layer in range(24):
        block = f"{vision}blocks.{layer}."
        parts = linear(norm(x, tensors, block + "norm1", 1e-6), tensors, block + "attn.qkv").chunk(3, dim=-1)
        x = x + linear(attention(*parts, 16), tensors, block + "attn.proj")
        inner = gelu(linear(norm(x, tensors, block + "norm2", 1e-6), tensors, block + "mlp.fc1"))
        x = x + linear(inner, tensors, block + "mlp.fc2")
    seen = norm(x, tensors, vision + "norm", 1e-6)

    ids, masks = (torch.stack(items) for items in zip(*(bert_ids(prompt) for prompt in prompts), strict=True))
    x = (
        tensors[text + "embeddings.word_embeddings.weight"][ids]
        + tensors[text + "embeddings.position_embeddings.weight"][:35]
    )
    x = norm(x, tensors, text + "embeddings.LayerNorm", 1e-12)
    for layer in range(12):
        block = f"{text}encoder.layer.{layer}."
        for kind, other, mask in (("attention", None, masks[:, None, None]), ("crossattention", seen, None)):
            source = x if other is None else other
            parts = [linear(x, tensors, f"{block}{kind}.self.query")]
            parts += [linear(source, tensors, f"{block}{kind}.self.{name}") for name in ("key", "value")]
            inner = linear(attention(*parts, 12, mask), tensors, f"{block}{kind}.output.dense")
            x = norm(x + inner, tensors, f"{block}{kind}.output.LayerNorm", 1e-12)
        inner = linear(gelu(linear(x, tensors, block + "intermediate.dense")), tensors, block + "output.dense")
        x = norm(x + inner, tensors, block + "output.LayerNorm", 1e-12)
    return (head(x[:, 0], tensors, "mlp.layers.") - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def imagereward_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    tensors = imagereward_tensors()
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return tensors, {"imagereward": folder / "ImageReward.pt", "imagereward-tokenizer": folder}


@pytest.mark.slow
def test_imagereward_equals_its_recipe(imagereward_files):
    tensors, files = imagereward_files
    scorer = rewards.load_reward("imagereward", checkpoints=files)
    drawn = odd_images(65, 64, num_images=3)
    prompts = ["a red circle", "A blue square, left of a zebra!", 20 * "a red circle left of a blue square "]
    expected = imagereward(torch.stack([crop(image, 224, round) for image in drawn]), prompts, tensors)
    check(scorer(drawn, prompts), expected, 1e-6)


def test_every_tensor_of_imagereward_is_used_but_those_no_score_needs(imagereward_files):
    tensors, files = imagereward_files
    parts = scorers.blip_tensors(tensors, files["imagereward"])
    for part, model in zip(("vision", "text", "head"), weights.build_empty(scorers.build_blip), strict=True):
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in parts[part].items()} == shapes
    unused = {
        name for name in tensors if name.startswith(("blip.vision_proj.", "blip.text_proj.")) or "position_ids" in name
    }
    assert sum(map(len, parts.values())) == len(tensors) - len(unused) == len(tensors) - 5


@pytest.mark.parametrize("change", ["lacks blip.visual_encoder.blocks.7.attn.qkv.bias", "has blip.more.weight"])
def test_an_imagereward_of_other_tensors_is_refused(imagereward_files, tmp_path, change):
    tensors, files = imagereward_files
    verb, name = change.split()
    tensors = {n: t for n, t in tensors.items() if n != name} | ({name: torch.zeros(1)} if verb == "has" else {})
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(ArtifactError, match=rf"ImageReward\.pt: refused.*{'blip.more' if verb == 'has' else 'qkv.bias'}"):
        rewards.load_reward("imagereward", checkpoints=files | {"imagereward": tmp_path / "ImageReward.pt"})
