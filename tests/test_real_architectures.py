"""The scorers' real architectures, with random weights, against their recipes written out here, from the tensors alone.

Nothing of open_clip's or transformers' networks is used on the side of the recipe: attention, layers and names are those of
the papers and of the authors' checkpoints.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from texforce import rewards, scorers, weights
from texforce.errors import ArtifactError

PROMPTS = ["a red circle left of a blue square", "An oil painting of two dogs, by the sea!"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """Checkpoints here are views of little memory; their copies in the cache would be gigabytes."""
    monkeypatch.setattr(checkpoints, "MIN_CACHED_BYTES", 2**60)


class RandomWeights:
    """Random tensors, mostly views of one piece of memory, so that a checkpoint of a billion numbers is a small file."""

    def __init__(self, seed: int) -> None:
        self.pool = 0.02 * torch.randn(55_000_000, generator=torch.Generator().manual_seed(seed))
        self.offset = 0

    def __call__(self, *shape: int) -> Tensor:
        self.offset = (self.offset + 7919) % 1_000_000
        return self.pool[self.offset : self.offset + math.prod(shape)].reshape(shape)

    def linear(self, name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(outputs, inputs), f"{name}.bias": self(outputs)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 5 * self(width), f"{name}.bias": 5 * self(width)}


# Odd numbers of pixels are left over on purpose: where half a pixel goes is part of a recipe.
def images(height: int, width: int, num_images: int = 1, seed: int = 0) -> Tensor:
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


# --- layers ---


def linear(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def norm(x: Tensor, tensors: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + eps).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Of (N, L, D), with a mask that is added to the scores."""
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


# --- CLIP ---


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
    new = RandomWeights(seed)
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
    """They are equal, and the images and prompts matter, so that it means something."""
    print(f"largest difference {(scores - expected).abs().max():.1e} in {expected.tolist()}")
    assert expected.max() - expected.min() > 50 * tolerance
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_hps_equals_its_recipe(tmp_path):
    tensors = clip_tensors(VIT_H_14, seed=0)
    torch.save({"state_dict": tensors}, tmp_path / "HPS_v2.1_compressed.pt")
    scorer = rewards.load_reward("hps", checkpoints={"hps": tmp_path / "HPS_v2.1_compressed.pt"})
    scores = scorer(images(99, 71).expand(2, -1, -1, -1), PROMPTS)
    features = image_features(pad(images(99, 71)[0], 224)[None], tensors, VIT_H_14)
    check(scores, (features * text_features(PROMPTS, tensors, VIT_H_14)).sum(dim=1), 1e-6)


@pytest.mark.slow
def test_pickscore_equals_its_recipe(tmp_path):
    tensors = clip_tensors(VIT_H_14, seed=1)
    folder = save_for_transformers(tmp_path / "pickscore", tensors, VIT_H_14)
    scorer = rewards.load_reward("pickscore", checkpoints={"pickscore": folder})
    scores = scorer(images(70, 71).expand(2, -1, -1, -1), PROMPTS)
    features = image_features(crop(images(70, 71)[0], 224, math.floor)[None], tensors, VIT_H_14)
    expected = tensors["logit_scale"].exp() * (features * text_features(PROMPTS, tensors, VIT_H_14)).sum(dim=1)
    check(scores, expected, 2e-5)


def test_clip_equals_its_recipe(tmp_path):
    tensors = clip_tensors(VIT_B_32, seed=2)
    scorer = rewards.load_reward("clip", checkpoints={"clip": save_for_transformers(tmp_path / "clip", tensors, VIT_B_32)})
    drawn, prompts = images(65, 64, num_images=4), 2 * PROMPTS
    features = image_features(torch.stack([crop(image, 224, round) for image in drawn]), tensors, VIT_B_32)
    cosines = (features * text_features(prompts, tensors, VIT_B_32)).sum(dim=1)
    check(scorer(drawn, prompts), 2.5 * cosines.clamp(min=0), 2e-6)


@pytest.mark.slow
def test_aesthetic_equals_its_recipe(tmp_path):
    tensors, new = clip_tensors(VIT_L_14, seed=3), RandomWeights(4)
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
    drawn = images(64, 65, num_images=2)
    features = image_features(torch.stack([crop(image, 224, round) for image in drawn]), tensors, VIT_L_14)
    check(scorer(drawn, ["", ""]), head(features, layers, "layers."), 5e-6)


# --- ImageReward ---


def imagereward_tensors() -> dict[str, Tensor]:
    """A checkpoint in the authors' layout."""
    new, tensors = RandomWeights(5), {}
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
    drawn = images(65, 64, num_images=3)
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
