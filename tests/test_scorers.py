"""Scorers against PIL, open_clip and their recipes written out, and the protocol they are held to."""

import io
import json
import math
import random
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from texforce import rewards, scorers, world
from texforce.errors import ArtifactError, RewardError
from texforce.prompt_sets import KINDS


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
    import open_clip

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
    ([1.0, 2.0, 3.0], "returned list"),
    (1.0, "returned float"),
    (None, "returned NoneType"),
    (np.zeros(3), "returned ndarray"),
])  # fmt: skip
def test_a_scorer_that_returns_something_else_is_a_reward_error(returned, words):
    with pytest.raises(RewardError, match=words):
        scorers.score(lambda images, prompts: returned, random_images(3), ["a"] * 3)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("boom"), ZeroDivisionError("zero"), AssertionError("no face")]
)
def test_a_scorer_that_raises_is_a_reward_error_with_its_cause(error):
    def scorer(images, prompts):
        raise error

    with pytest.raises(RewardError, match=f"the scorer raised {type(error).__name__}: .*{error.args[0]}") as caught:
        scorers.score(scorer, random_images(1), ["a"])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("such a prompt"), torch.OutOfMemoryError("gone"), KeyboardInterrupt()])
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
    shutil.copytree(scorers.EMBEDDED_HPS.parent / "tokenizer", tmp_path / "tokenizer")
    ids = scorers.clip_tokenizer(tmp_path / "tokenizer", config)(["a red circle"])
    assert ids.shape == (1, 77)
    assert ids.max() < 1144
    with pytest.raises(ArtifactError, match=r"tokenizer knows .* tokens and its model 9"):
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
    shutil.copy(scorers.EMBEDDED_HPS, checkpoint)
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
    shutil.copy(scorers.EMBEDDED_HPS, checkpoint)
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


@pytest.mark.parametrize(("text", "wrong"), [("HELLO", "BANK"), ("coffee shop", "Tuesday"), ("Open 24 hours", "exit")])
@pytest.mark.parametrize("size", [128, 512])
def test_the_right_text_scores_high_and_a_wrong_one_low(ocr, text, wrong, size):
    images = torch.stack([written(text, size)] * 2)
    right, other = ocr(images, [f'a sign that says "{text}"', f'a sign that says "{wrong}"']).tolist()
    print(f"{text}: {right:.2f}, {wrong}: {other:.2f}")
    assert right > 0.9
    assert other < 0.4


def test_an_image_without_text_scores_zero(ocr):
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), random_images(1, 64, 64)[0]])
    assert ocr(images, ['"hello"'] * 3).tolist() == [0, 0, 0]


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
    assert scorers.quoted(prompt) == expected


@pytest.mark.parametrize("prompt", ["a sign", "the dog's bowl and the cat's", 'a lone " mark', '""', "'  '"])
def test_a_prompt_without_a_quoted_text_is_named(prompt):
    with pytest.raises(ValueError, match=r"quotation marks, which .* lacks"):
        scorers.quoted(prompt)


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
    monkeypatch.setattr(rewards, "missing_packages", lambda name: [])
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
    tokenizer = CLIPTokenizer.from_pretrained(scorers.EMBEDDED_HPS.parent / "tokenizer")
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
    tiny = scorers.EMBEDDED_HPS.parent
    shutil.copy(tiny / "hps.json", folder / "c.json")
    shutil.copytree(tiny / "tokenizer", folder / "tokenizer")
    return folder / "c.pt"


@pytest.fixture(scope="module")
def renderings(tiny_build):
    rng = random.Random(0)
    scenes = [tiny_build.draw_scene(rng, KINDS[k % 4]) for k in range(300)]
    prompts = [tiny_build.caption(scene, rng, rare_probability=0.35) for scene in scenes]
    return scenes, prompts, tiny_build.render(scenes, random.Random(1))


def test_hps_equals_open_clip_itself_on_pil_images(hps):
    import open_clip

    tiny = scorers.EMBEDDED_HPS.parent
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
        scorers.score(hps, torch.zeros(1, 3, 512, 512), ["a red circle"])


def test_a_checkpoint_of_ones_own_takes_any_size_and_the_name_hps_v2(tmp_path):
    checkpoint = copy_config(tmp_path)
    shutil.copy(scorers.EMBEDDED_HPS, checkpoint)
    scorer = rewards.load_reward("hps-v2", checkpoints={"hps-v2": checkpoint})
    assert scorer(random_images(1, 128, 96), ["a red circle"]).shape == (1,)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_hps_checkpoint_is_refused(tmp_path, share):
    content = scorers.EMBEDDED_HPS.read_bytes()
    checkpoint = copy_config(tmp_path)
    checkpoint.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        rewards.load_reward("hps", checkpoints={"hps": checkpoint})


def test_a_checkpoint_that_lacks_a_key_is_refused(tmp_path):
    checkpoint = copy_config(tmp_path)
    state_dict = torch.load(scorers.EMBEDDED_HPS, weights_only=True)["state_dict"]
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


def test_hps_ranks_the_right_prompt_above_a_wrong_one(hps, renderings, tiny_build):
    scenes, prompts, images = renderings
    rng = random.Random(2)
    wrong = []
    for scene in scenes:  # another sentence of the same kind with another meaning
        other = tiny_build.draw_scene(rng, scene.kind)
        while meaning(other) == meaning(scene):
            other = tiny_build.draw_scene(rng, scene.kind)
        wrong.append(tiny_build.caption(other, rng))
    share = share_above(hps(images, prompts), hps(images, wrong))
    print(f"right above wrong prompt: {share:.4f}")
    assert share >= 0.95


def test_hps_ranks_the_right_prompt_above_one_that_differs_in_one_thing(hps, renderings, tiny_build):
    scenes, prompts, images = renderings
    rng = random.Random(3)
    mutants = [tiny_build.mutate(scene, rng) for scene in scenes]
    fair = torch.tensor([meaning(one) != meaning(other) for one, other in zip(scenes, mutants, strict=True)])
    right, wrong = hps(images, prompts), hps(images, [tiny_build.caption(mutant, rng) for mutant in mutants])
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
def test_hps_prefers_a_clean_image_to_a_degraded_one(hps, renderings, degrade):
    _, prompts, images = renderings
    share = share_above(hps(images, prompts), hps(degrade(images), prompts))
    print(f"clean above {degrade.__name__}: {share:.4f}")
    assert share >= 0.90
