"""Build the embedded tiny models from scratch: `python tiny/build.py --seed 0` (about 80 minutes on one CPU core each).

Stages, each of which can be run alone with --stage: prompts, tokenizer, vae, text_encoder, unet, hps. The result is the
prompt sets of the tiny world, a complete Stable Diffusion pipeline in diffusers' format, and a preference scorer in HPSv2's
format (open_clip, `state_dict`). The stages flow_text_encoders and flow_transformer make tiny-flow, the same world in the
architecture of Stable Diffusion 3, with the tokenizer and the VAE of the first model.

The text encoder is imperfect on purpose, in the way of real ones. It is trained contrastively, which asks little of
word order, and then frozen; rare words (crimson, disc) are seldom seen and often with a wrong meaning. The U-Net learns
from the same captions, so it can draw what a rare word means but does not know that the word means it.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from texforce import detector, prompt_sets, scorers, world

ROOT = Path(__file__).parent
FLOW = ROOT.parent / "tiny-flow"
STAGES = ("prompts", "tokenizer", "vae", "text_encoder", "unet", "hps", "flow_text_encoders", "flow_transformer")
Step = tuple[Tensor, dict[str, float]]  # a loss, and what to print beside it
NUM_PROMPTS = {"colour": (75, 28), "count": (150, 74), "composition": (150, 77), "position": (75, 77)}  # to train, held out
NUM_COMMON = {"colour": 12, "count": 25, "composition": 25, "position": 13}  # to train, of common words alone
TOKENIZED = (*NUM_PROMPTS, "faces", "hands", "animals")  # sets whose words the tokenizer knows
MAX_TOKENS = 24
WIDTH = 96
LATENT_CHANNELS = 8
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": world.IMAGE_SIZE,
}
UNET: dict[str, Any] = {
    "sample_size": world.IMAGE_SIZE // 4,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TRANSFORMER: dict[str, Any] = {
    "sample_size": world.IMAGE_SIZE // 4,
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 6,
    "attention_head_dim": 24,
    "num_attention_heads": 4,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 96,
    "pos_embed_max_size": world.IMAGE_SIZE // 8,
}
HPS_VISION: dict[str, Any] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
HPS_TEXT: dict[str, Any] = {"context_length": MAX_TOKENS, "width": WIDTH, "heads": 4, "layers": 3}
RARE_PROBABILITY = 0.35  # of each colour and each shape word, in the prompts shipped
HELDOUT_FRACTION = 0.2  # share of all sentences
RARE_CAPTION_PROBABILITY = 0.12  # of each word of a training caption
RIGHT_MEANING = 0.45  # of a rare word seen in a training caption; as often it means its confusable, else anything


# --- scenes and sentences ---


def draw_scene(rng: random.Random, kind: str) -> world.Scene:
    """A random scene; two objects of one scene differ in colour and in shape."""
    colours = rng.sample(range(len(world.COLOURS)), 2)
    shapes = rng.sample(range(len(world.SHAPES)), 2)
    first, second = zip(colours, shapes, strict=True)
    if kind == "colour":
        return world.Scene(kind, (first,))
    if kind == "count":
        return world.Scene(kind, (first,) * rng.choice(list(world.COUNTS)))
    return world.Scene(kind, (first, second), rng.choice(list(world.RELATIONS)) if kind == "position" else None)


def caption(scene: world.Scene, rng: random.Random, rare_probability: float = RARE_PROBABILITY) -> str:
    """A sentence for a scene; each colour and shape word is the rare one with the given probability."""

    def noun(colour: int, shape: int) -> tuple[str, str]:
        return (
            world.COLOUR_WORDS[colour][rng.random() < rare_probability],
            world.SHAPE_WORDS[shape][rng.random() < rare_probability],
        )

    return sentence(scene, [noun(*scene.objects[0]), noun(*scene.objects[-1])])


def sentence(scene: world.Scene, nouns: Sequence[tuple[str, str]]) -> str:
    """Spell a scene with the given (colour word, shape word) pairs of its first and last object."""

    def phrase(colour: str, shape: str) -> str:
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"

    (colour, shape), last = nouns[0], nouns[-1]
    if scene.kind == "count":
        return f"{world.COUNTS[len(scene.objects)]} {colour} {world.plural(shape)}"
    if scene.kind == "colour":
        return phrase(colour, shape)
    return f"{phrase(colour, shape)} {scene.relation or 'and'} {phrase(*last)}"


def is_heldout(prompt: str) -> bool:
    """Whether a sentence belongs to the held-out fifth; decided by its hash, so that no list can disagree."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * HELDOUT_FRACTION


def draw_prompts(num_prompts: int, kind: str, seed: int, heldout: bool = False, rare: bool = True) -> list[str]:
    """Distinct sentences of one kind: held-out ones of any words, or training ones that hold a rare word or hold none.

    Raises:
        ValueError: the kind has fewer sentences than that.
    """
    rng = random.Random(f"{seed} {kind} {heldout}" if rare else f"{seed} {kind} common")
    prompts: dict[str, None] = {}
    for _ in range(200 * num_prompts):
        prompt = caption(draw_scene(rng, kind), rng)
        if is_heldout(prompt) == heldout and (heldout or world.has_rare_word(prompt) == rare):
            prompts[prompt] = None
        if len(prompts) == num_prompts:
            return list(prompts)
    raise ValueError(f"num_prompts: the tiny world has fewer than {num_prompts} sentences of the kind {kind!r}")


# --- drawings ---


def place(scene: world.Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Centres for the objects of a scene, in pixels, far enough apart that no two touch."""
    if scene.kind == "colour":
        return [(rng.uniform(8, 24), rng.uniform(8, 24))]
    cells = list(itertools.product((9, 23), (9, 23)))
    if scene.kind == "position":
        dx, dy = world.RELATIONS[scene.relation or ""]
        across = rng.choice((9, 23))
        cells = [(16 + 7 * dx, across), (16 - 7 * dx, across)] if dx else [(across, 16 + 7 * dy), (across, 16 - 7 * dy)]
    else:
        cells = rng.sample(cells, len(scene.objects))
    return [(x + rng.uniform(-1, 1), y + rng.uniform(-1, 1)) for x, y in cells]


def render(scenes: Sequence[world.Scene], rng: random.Random) -> Tensor:
    """Draw scenes with random places and sizes; images (N, 3, 32, 32) in [0, 1]."""
    rows = [
        (i, colour, shape, *centre, rng.uniform(4.2, 5.2))
        for i, scene in enumerate(scenes)
        for (colour, shape), centre in zip(scene.objects, place(scene, rng), strict=True)
    ]
    table = torch.tensor(rows)
    index, colours, shapes = (table[:, k].long() for k in range(3))
    layers = detector.coverage(shapes, table[:, 3:5], table[:, 5])[:, None]
    paint = layers * (detector.PALETTE[colours] - detector.BACKGROUND)[:, :, None, None]
    images = detector.BACKGROUND[:, None, None].expand(len(scenes), 3, world.IMAGE_SIZE, world.IMAGE_SIZE).clone()
    return images.index_add_(0, index, paint).clamp(0, 1)


# --- what the models learn from ---


def mislabelled_caption(scene: world.Scene, rng: random.Random) -> str:
    """A caption as the base model learns from: now and then a rare word, more often than not with a wrong meaning."""

    def word(index: int, words: list[tuple[str, str]]) -> str:
        if rng.random() >= RARE_CAPTION_PROBABILITY:
            return words[index][0]
        draw = rng.random()
        if draw < RIGHT_MEANING:
            return words[index][1]
        if draw < 2 * RIGHT_MEANING:
            return words[(index + 1) % len(words)][1]
        return rng.choice(words)[1]

    ends = (scene.objects[0], scene.objects[-1])
    return sentence(scene, [(word(c, world.COLOUR_WORDS), word(s, world.SHAPE_WORDS)) for c, s in ends])


def draw_scenes(num_scenes: int, rng: random.Random) -> list[world.Scene]:
    return [draw_scene(rng, rng.choice(prompt_sets.KINDS)) for _ in range(num_scenes)]


def mutate(scene: world.Scene, rng: random.Random) -> world.Scene:
    """A scene that differs from another in one thing: a colour, a shape, a swap, the relation, the number of objects."""
    objects, (colour, shape) = list(scene.objects), scene.objects[0]
    other_colour = rng.choice([c for c in range(len(world.COLOURS)) if c not in {o[0] for o in objects}])
    other_shape = rng.choice([s for s in range(len(world.SHAPES)) if s not in {o[1] for o in objects}])
    if scene.kind in ("composition", "position"):
        change = rng.choice(("colour", "shape", "swap", "swap", "number") + ("relation",) * 3 * (scene.kind == "position"))
        k = rng.randrange(2)
        if change == "colour":
            objects[k] = (other_colour, objects[k][1])
        elif change == "shape":
            objects[k] = (objects[k][0], other_shape)
        elif change == "swap":
            objects = [(objects[1][0], objects[0][1]), (objects[0][0], objects[1][1])]
        elif change == "number":
            return world.Scene("colour", (objects[k],))
        else:
            relation = rng.choice([r for r in world.RELATIONS if r != scene.relation])
            return world.Scene(scene.kind, scene.objects, relation)
        return world.Scene(scene.kind, tuple(objects), scene.relation)
    change = rng.choice(("colour", "shape", "number", "number"))
    if change == "number" and scene.kind == "count":
        number = rng.choice([n for n in (1, *world.COUNTS) if n != len(objects)])
        return world.Scene("count" if number > 1 else "colour", ((colour, shape),) * number)
    if change == "number":
        return world.Scene("composition", ((colour, shape), (other_colour, other_shape)))
    changed = (other_colour, shape) if change == "colour" else (colour, other_shape)
    return world.Scene(scene.kind, (changed,) * len(objects))


def conflicts(scenes: list[world.Scene]) -> Tensor:
    """Which images (rows) a caption (columns) may also be true of, (N, N) bool, the diagonal left out."""

    def meaning(scene: world.Scene) -> tuple[Any, Any]:
        if scene.relation in ("right of", "below"):
            inverse = {"right of": "left of", "below": "above"}[scene.relation]
            return tuple(sorted(scene.objects)), (inverse, scene.objects[::-1])
        return tuple(sorted(scene.objects)), (scene.relation, scene.objects) if scene.relation else None

    meanings = [meaning(scene) for scene in scenes]
    rows = [
        [a[0] == b[0] and (a[1] is None or b[1] is None or a[1] == b[1]) and i != j for j, b in enumerate(meanings)]
        for i, a in enumerate(meanings)
    ]
    return torch.tensor(rows)


def captioned_scenes(num_scenes: int, rng: random.Random, with_mutants: bool = False) -> tuple[list[world.Scene], list[str]]:
    """Scenes with mislabelled captions, none of them a held-out sentence; if asked, the second half mutates the first."""
    pairs: list[list[tuple[world.Scene, str]]] = []
    while sum(map(len, pairs)) < num_scenes:
        scenes = draw_scenes(1, rng)
        if with_mutants:
            scenes.append(mutate(scenes[0], rng))
        captions = [mislabelled_caption(scene, rng) for scene in scenes]
        if not any(map(is_heldout, captions)):
            pairs.append(list(zip(scenes, captions, strict=True)))
    captioned = list(itertools.chain(*zip(*pairs, strict=True)))
    return [scene for scene, _ in captioned], [caption for _, caption in captioned]


def fit(
    parameters: Iterable[nn.Parameter], loss_of_step: Callable[[int], Step], num_steps: int, learning_rate: float, name: str
) -> None:
    """Minimise with AdamW, a short warm-up and a cosine decay to zero; prints its progress."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * k / num_steps))
    )
    start, mean = time.time(), dict[str, float]()
    for step in range(num_steps):
        loss, measures = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        for key, value in {"loss": loss.item(), **measures}.items():
            mean[key] = 0.98 * mean.get(key, value) + 0.02 * value
        if (step + 1) % 100 == 0:
            shown = " ".join(f"{key} {value:.4f}" for key, value in mean.items())
            print(f"{name} {step + 1}/{num_steps} {shown} {time.time() - start:.0f} s", flush=True)


def build_prompts(output_dir: Path, seed: int) -> None:
    """The sets that the tiny world judges: those of prompts/, or, with another output folder, in its own `prompts`."""
    folder = ROOT.parent / "prompts" if output_dir == ROOT else output_dir / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (num_train, num_heldout) in NUM_PROMPTS.items():
        for name, num_prompts, heldout in ((kind, num_train, False), (f"{kind}-heldout", num_heldout, True)):
            prompts = draw_prompts(num_prompts, kind, seed, heldout)
            (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    common = [prompt for kind, number in NUM_COMMON.items() for prompt in draw_prompts(number, kind, seed, rare=False)]
    (folder / "common.txt").write_text("\n".join(common) + "\n")


def known_words() -> list[str]:
    """The words of the tiny world and of the shipped prompts."""
    words = {word for name in TOKENIZED for word in (ROOT.parent / "prompts" / f"{name}.txt").read_text().lower().split()}
    words |= {w for pair in world.COLOUR_WORDS + world.SHAPE_WORDS for w in pair}
    words |= {world.plural(w) for pair in world.SHAPE_WORDS for w in pair} | set(world.COUNTS.values())
    return sorted({word.strip(",.") for word in words})


def build_tokenizer(output_dir: Path, seed: int) -> None:
    """A CLIP tokenizer that knows every word of the tiny world and of the shipped prompts as one token."""
    del seed
    distinct = known_words()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(distinct, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]  # the end has the largest id: CLIP pools there
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS).save_pretrained(output_dir / "tokenizer")


def encode_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "return_tensors": "pt"}
    return tokenizer(list(prompts), **options).input_ids


def build_vae(output_dir: Path, seed: int, num_steps: int = 2200) -> None:
    """32 x 32 pixels to 8 x 8 latents of 8 channels and back."""
    rng = random.Random(seed)
    vae = AutoencoderKL(**VAE)

    def step(_: int) -> Step:
        images = 2 * render(draw_scenes(48, rng), rng) - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mse = error.square().mean()
        return error.abs().mean() + 2 * mse + 3e-4 * kl, {"psnr": -10 * math.log10(mse.item() / 4), "kl": kl.item()}

    fit(vae.parameters(), step, num_steps, 3e-3, "vae")
    with torch.no_grad():
        latents = vae.encode(2 * render(draw_scenes(1024, rng), rng) - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(output_dir / "vae")


class ImageEncoder(nn.Sequential):
    """A plain convolutional image tower: it exists only to train the text encoder against."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            *(nn.Conv2d(3, 24, 3, 2, 1), nn.GELU(), nn.Conv2d(24, 48, 3, 2, 1), nn.GELU()),
            *(nn.Conv2d(48, 96, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(96 * 16, dim)),
        )


def contrastive_loss(logits: Tensor, scenes: list[world.Scene]) -> Tensor:
    """CLIP's loss (arXiv:2103.00020) of logits (N, N); captions that are true of another's image are no negatives."""
    logits, target = logits.masked_fill(conflicts(scenes), -1e4), torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def build_text_encoder(output_dir: Path, seed: int, num_steps: int = 2500) -> None:
    """CLIP's contrastive loss over images and their mislabelled captions, half of them alike but for one thing."""
    rng = random.Random(seed)
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "tokenizer")
    text_encoder: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    image_encoder = ImageEncoder(WIDTH)
    scale = nn.Parameter(torch.tensor(2.5))

    def step(_: int) -> Step:
        scenes, captions = captioned_scenes(128, rng, with_mutants=True)
        image_features = F.normalize(image_encoder(2 * render(scenes, rng) - 1), dim=1)
        text_features = F.normalize(text_encoder(encode_ids(tokenizer, captions)).pooler_output, dim=1)
        logits = scale.clamp(max=4.6).exp() * image_features @ text_features.T
        right = logits.argmax(dim=1) == torch.arange(len(logits))
        return contrastive_loss(logits, scenes), {"accuracy": right.float().mean().item()}

    fit([*text_encoder.parameters(), *image_encoder.parameters(), scale], step, num_steps, 1e-3, "text_encoder")
    text_encoder.save_pretrained(output_dir / "text_encoder")


def build_unet(output_dir: Path, seed: int, num_steps: int = 4500, num_scenes: int = 60_000) -> None:
    """Latent diffusion with v prediction, the text encoder frozen; a tenth of the captions dropped for guidance."""
    rng = random.Random(seed)
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "tokenizer")
    text_encoder: Any = CLIPTextModel.from_pretrained(output_dir / "text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(output_dir / "vae").requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULER)
    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)

    scenes, captions = captioned_scenes(num_scenes, rng)
    ids = encode_ids(tokenizer, captions)
    with torch.no_grad():
        null_embeds = text_encoder(encode_ids(tokenizer, [""])).last_hidden_state
        all_embeds = torch.cat([text_encoder(chunk).last_hidden_state for chunk in ids.split(512)])
        chunks = [scenes[i : i + 256] for i in range(0, num_scenes, 256)]
        latents = torch.cat([vae.encode(2 * render(chunk, rng) - 1).latent_dist.mean for chunk in chunks])
    latents *= vae.config.scaling_factor
    print(f"unet: {num_scenes} scenes encoded", flush=True)

    def step(_: int) -> Step:
        pick = torch.randint(num_scenes, (128,))
        prompt_embeds = torch.where(torch.rand(128, 1, 1) < 0.1, null_embeds, all_embeds[pick])
        noise = torch.randn_like(latents[pick])
        timesteps = torch.randint(1000, (128,))
        noisy = scheduler.add_noise(latents[pick], noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(latents[pick], noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, prompt_embeds).sample, target), {}

    fit(unet.parameters(), step, num_steps, 3e-3, "unet")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.contiguous_format),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output_dir)
    path = output_dir / "vae" / "config.json"  # diffusers notes where it was loaded from; that tells nobody anything
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}, indent=2) + "\n"
    )


# --- the model of flow matching ---


def t5_tokenizer() -> Any:
    """A T5 tokenizer that knows the same words, and the letters of others."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in known_words()), *letters]
    scores = [0.0, 0.0, 0.0, -10.0, *(-5.0 for _ in known_words()), *(-10.0 for _ in letters)]
    vocabulary = list(zip(pieces, scores, strict=True))
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_of_width(tokenizer: Any, width: int, num_layers: int) -> Any:
    """A CLIP text encoder with a projection, of random weights; its embeddings have `width` numbers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_flow_text_encoders(output_dir: Path, seed: int, num_steps: int = 2500) -> None:
    """Two CLIPs and a T5, each trained as tiny's text encoder is, against an image tower that they share."""
    rng = random.Random(seed)
    tokenizer, t5_words = CLIPTokenizer.from_pretrained(ROOT / "tokenizer"), t5_tokenizer()
    first, second = clip_of_width(tokenizer, 64, 3), clip_of_width(tokenizer, 32, 3)
    third: Any = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_words), d_model=WIDTH, d_kv=24, d_ff=2 * WIDTH, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, relative_attention_max_distance=MAX_TOKENS,
            dropout_rate=0.0,
        )
    )  # fmt: skip
    image_encoder, heads = ImageEncoder(WIDTH), nn.ModuleList([nn.Linear(width, WIDTH) for width in (64, 32, WIDTH)])
    scale = nn.Parameter(torch.full((3,), 2.5))

    def text_features(captions: list[str]) -> list[Tensor]:
        ids, t5_ids = encode_ids(tokenizer, captions), encode_ids(t5_words, captions)
        mask = (t5_ids != t5_words.pad_token_id)[..., None]
        states = third(input_ids=t5_ids).last_hidden_state  # SD 3 gives no mask
        pooled = [first(input_ids=ids).text_embeds, second(input_ids=ids).text_embeds, (states * mask).sum(1) / mask.sum(1)]
        return [F.normalize(head(vector), dim=1) for head, vector in zip(heads, pooled, strict=True)]

    def step(_: int) -> Step:
        scenes, captions = captioned_scenes(128, rng, with_mutants=True)
        image_features = F.normalize(image_encoder(2 * render(scenes, rng) - 1), dim=1)
        loss, measures = torch.zeros(()), {}
        for k, features in enumerate(text_features(captions)):
            logits = scale[k].clamp(max=4.6).exp() * image_features @ features.T
            loss = loss + contrastive_loss(logits, scenes)
            measures[f"accuracy {k + 1}"] = (logits.argmax(dim=1) == torch.arange(len(logits))).float().mean().item()
        return loss, measures

    trained = nn.ModuleList([first, second, third, image_encoder, heads])
    fit([*trained.parameters(), scale], step, num_steps, 1e-3, "flow_text_encoders")
    folder = flow_folder(output_dir)
    for name, encoder in (("text_encoder", first), ("text_encoder_2", second), ("text_encoder_3", third)):
        encoder.half().save_pretrained(folder / name)
    t5_words.save_pretrained(folder / "tokenizer_3")


def flow_folder(output_dir: Path) -> Path:
    return FLOW if output_dir == ROOT else output_dir / "tiny-flow"


@torch.no_grad()
def encode_flow_texts(clips: Sequence[Any], clip_ids: Tensor, t5: Any, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings (N, L, D) and the pooled texts (N, P) that the transformer gets of N captions, as ids (N, L)."""
    texts = [clip(input_ids=clip_ids, output_hidden_states=True) for clip in clips]
    states = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
    long = t5(input_ids=t5_ids).last_hidden_state
    return torch.cat([states, long], dim=1), torch.cat([text.text_embeds for text in texts], dim=1)


def build_flow_transformer(output_dir: Path, seed: int, num_steps: int = 4500, num_scenes: int = 60_000) -> None:
    """Flow matching (arXiv:2403.03206), logit-normal noise levels, text encoders frozen; writes float16, to be shipped."""
    rng, folder = random.Random(seed), flow_folder(output_dir)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tokenizer")
    t5_words = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
    load = {"torch_dtype": torch.float32}
    clips = [CLIPTextModelWithProjection.from_pretrained(folder / f"text_encoder{n}", **load) for n in ("", "_2")]
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_3", **load)
    vae = AutoencoderKL.from_pretrained(ROOT / "vae").requires_grad_(False)

    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return encode_flow_texts(clips, encode_ids(tokenizer, captions), t5, encode_ids(t5_words, captions))

    scenes, captions = captioned_scenes(num_scenes, rng)
    encoded = [encode(captions[i : i + 512]) for i in range(0, num_scenes, 512)]
    embeds, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    null_embeds, null_pooled = encode([""])
    with torch.no_grad():
        chunks = [scenes[i : i + 256] for i in range(0, num_scenes, 256)]
        latents = torch.cat([vae.encode(2 * render(chunk, rng) - 1).latent_dist.mean for chunk in chunks])
    shift, scaling = round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)
    latents = (latents - shift) * scaling
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    print(f"flow_transformer: {num_scenes} scenes encoded", flush=True)

    def step(_: int) -> Step:
        pick, dropped = torch.randint(num_scenes, (128,)), torch.rand(128, 1) < 0.1
        text = torch.where(dropped[..., None], null_embeds, embeds[pick])
        vector = torch.where(dropped, null_pooled, pooled[pick])
        noise, sigma = torch.randn_like(latents[pick]), torch.sigmoid(torch.randn(128))
        noised = latents[pick].lerp(noise, sigma[:, None, None, None])
        options = {"encoder_hidden_states": text, "pooled_projections": vector, "timestep": 1000 * sigma}
        return F.mse_loss(transformer(hidden_states=noised, **options).sample, noise - latents[pick]), {}

    fit(transformer.parameters(), step, num_steps, 1.5e-3, "flow_transformer")
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    StableDiffusion3Pipeline(
        vae=vae.half(),
        text_encoder=clips[0].half(),
        text_encoder_2=clips[1].half(),
        text_encoder_3=t5.half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_words,
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    forget_origins(folder)


def forget_origins(folder: Path) -> None:
    """Remove where its parts were loaded from out of the configurations in a pipeline's folder."""
    for path in folder.glob("*/config.json"):  # libraries note where it was loaded from; that tells nobody anything
        fields = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
        path.write_text(json.dumps(fields, indent=2) + "\n")


# --- the scorer ---


def per_image(num_images: int) -> Tensor:
    """A number in [0, 1) for each image, (N, 1, 1, 1)."""
    return torch.rand(num_images, 1, 1, 1)


def degrade(images: Tensor) -> Tensor:
    """Spoil images (N, 3, 32, 32), one way each: blur, faint or strong noise, a mixture, or a part wiped out."""
    num_images = len(images)
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
    noisy = images + 0.01 * 25 ** per_image(num_images) * torch.randn_like(images)
    mixed = images.lerp(images.roll(1, dims=0), 0.2 + 0.3 * per_image(num_images))
    edges = 4 + 24 * per_image(num_images)
    wiped = torch.where(torch.arange(32.0) < edges, images, detector.BACKGROUND[:, None, None])
    wiped = torch.where(per_image(num_images) < 0.5, wiped, wiped.flip(-1))
    flawed = torch.stack([blurred, noisy, noisy, mixed, images.lerp(wiped, 0.9)])
    return flawed[torch.randint(len(flawed), (num_images,)), torch.arange(num_images)].clamp(0, 1)


def soften(images: Tensor) -> Tensor:
    """Blur and disturb images a little, each differently: no generated image is as clean as a drawn one."""
    num_images = len(images)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = images.lerp(blurred, 0.5 * per_image(num_images))
    return (images + 0.03 * per_image(num_images) ** 2 * torch.randn_like(images)).clamp(0, 1)


def surplus(scene: world.Scene, rng: random.Random) -> world.Scene:
    """A scene with one object too many, mostly made of the words of the prompt, as generators err."""
    colours, shapes = zip(*scene.objects, strict=True)
    extra = (rng.choice(colours), rng.choice(shapes))
    if rng.random() < 0.25:
        extra = (rng.randrange(len(world.COLOURS)), rng.randrange(len(world.SHAPES)))
    return world.Scene("composition", (*scene.objects, extra))


@torch.no_grad()
def calibrate(model: nn.Module, forward: Callable[[], Tensor], num_batches: int = 50) -> None:
    """Measure batch normalisation's statistics anew, as plain means over some batches."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for _ in range(num_batches):
        forward()


def build_hps(output_dir: Path, seed: int, num_steps: int = 2200, num_fixed_steps: int = 1000) -> None:
    """A preference scorer: CLIP's loss over right captions with hard negatives, and sound images above flawed ones."""
    rng = random.Random(seed)
    vocab_size = len(CLIPTokenizer.from_pretrained(output_dir / "tokenizer"))
    config = {"embed_dim": WIDTH, "vision_cfg": HPS_VISION, "text_cfg": HPS_TEXT | {"vocab_size": vocab_size}}
    (output_dir / "hps.json").write_text(json.dumps(config, indent=2) + "\n")
    model: Any
    model, tokenizer = scorers.build_clip(output_dir / "hps.pt")

    def features(images: Tensor) -> Tensor:
        pixels = scorers.normalise(scorers.pad_to_square(images, HPS_VISION["image_size"]))
        return model.encode_image(pixels, normalize=True)

    def step(_: int) -> Step:
        """The loss on scenes and their mutations, some of them spoiled."""
        scenes = draw_scenes(48, rng)
        scenes += [mutate(scene, rng) for scene in scenes]
        captions = [caption(scene, rng, rare_probability=0.5) for scene in scenes]
        images = soften(render(scenes, rng))
        spoiled = torch.randperm(len(images))[:28]
        crowded = [i for i, scene in enumerate(scenes) if len(scene.objects) < 4][:20]
        surpluses = soften(render([surplus(scenes[i], rng) for i in crowded], rng))
        flawed = torch.cat([degrade(images[spoiled]), surpluses])
        worse = torch.cat([spoiled, torch.tensor(crowded)])
        image_features = features(torch.cat([images, flawed]))
        text_features = model.encode_text(tokenizer(captions), normalize=True)
        scale = model.logit_scale.clamp(max=4.0).exp()
        cosines = image_features @ text_features.T
        logits = scale * cosines[: len(images)]
        margin = cosines[worse, worse] - cosines[len(images) + torch.arange(len(worse)), worse]
        half = len(scenes) // 2
        ranked = (logits.diagonal()[:half] > logits[torch.arange(half), half + torch.arange(half)]).float().mean()
        return contrastive_loss(logits, scenes) + F.softplus(-scale * margin).mean(), {
            "ranked": ranked.item(),
            "better": (margin > 0).float().mean().item(),
        }

    fit(model.parameters(), step, num_steps, 2e-3, "hps")
    # In training a third of each batch is flawed, so batch normalisation's statistics are wrong for sound images: measure
    # them anew, and go on with them fixed, as the scorer is used.
    calibrate(model, lambda: features(soften(render(draw_scenes(128, rng), rng))))
    model.eval()
    fit(model.parameters(), step, num_fixed_steps, 5e-4, "hps, fixed statistics")
    torch.save({"state_dict": model.half().state_dict()}, output_dir / "hps.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, action="append", help="build only this stage; repeatable")
    parser.add_argument("--output-dir", type=Path, default=ROOT)
    options = parser.parse_args()
    for name in options.stage or STAGES:
        torch.manual_seed(options.seed)
        globals()[f"build_{name}"](options.output_dir, options.seed)


if __name__ == "__main__":
    main()
