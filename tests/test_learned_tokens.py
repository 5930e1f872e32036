"""`--target tokens`: input embeddings learned at the end of every prompt, which others load as a textual inversion."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import texforce
from texforce import adapters, evaluation, models, prompt_sets, run, tokenization, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import SampleOptions, System, resolve_sample
from texforce.errors import ArtifactError, InputError
from texforce.plan import plan

from .commands import flags, invoke
from .small_models import save_family

PROMPTS, NAME = ["a red circle", "two blue squares"], {"token": "<x>"}
TOKENS = "learned_embeds.safetensors"


@pytest.fixture(scope="module")
def folders(stable_diffusion, sdxl, tmp_path_factory):
    """Pipelines by name, each made when it is first wanted."""
    root, made = tmp_path_factory.mktemp("families"), {"sd": stable_diffusion, "sdxl": sdxl}

    def folder(name):
        return made[name] if name in made else made.setdefault(name, save_family(name, root / name))

    return folder


def policy_of(folder, number=3, **options) -> texforce.Policy:
    """A policy with learned tokens that change what is drawn."""
    options = {"model": str(folder), "mixed_precision": "no", "num_inference_steps": 2, "algorithm": "matching"} | options
    config = resolve(TrainOptions(target="tokens", num_tokens=number, **options))
    policy = texforce.make_policy(models.load_model(str(folder)), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """A function that gives a family's folder, that of tokens learned for it, and the embeddings with them."""
    root, made = tmp_path_factory.mktemp("written"), {}

    def give(name):
        if name not in made:
            policy = policy_of(folders(name))
            (root / name).mkdir()
            policy.save(root / name)
            made[name] = folders(name), root / name, embeddings(policy.model)
        return made[name]

    return give


def embeddings(model) -> torch.Tensor:
    with torch.no_grad():
        return models.encode(model, models.tokenize_for(model, PROMPTS))


def by_hand(model: models.Model, folder: Path) -> models.Model:
    """The model with the tokens in its tokenizers and embedding matrices, as textual inversions are put there."""
    for part, key in adapters.token_keys(model).items():
        tokenizer, encoder, learned = model.tokenizers[part], model.text_encoders[part], load_file(folder / TOKENS)[key]
        tokenizer.add_tokens(["<x>", *(f"<x>_{i}" for i in range(1, len(learned)))])
        encoder.resize_token_embeddings(len(tokenizer))
        encoder.get_input_embeddings().weight.data[-len(learned) :] = learned
    return model


# --- what is read ---


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_the_tokens_are_read_as_a_textual_inversion_at_the_end_of_the_prompt(written, name):
    folder, tokens, ours = written(name)
    model = by_hand(models.load_model(str(folder)), tokens)
    named = [f"{prompt} <x>" for prompt in PROMPTS]  # which becomes <x> <x>_1 <x>_2
    readers = model.readers.values()
    ids = torch.cat([reader.ids(named if reader.part.is_clip else PROMPTS) for reader in readers], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(models.encode(model, ids), ours, rtol=0, atol=1e-5)
    assert (ours - embeddings(models.load_model(str(folder)))).abs().max() > 0.1


def test_pooled_text_is_read_at_the_end_token_of_a_configuration_that_names_none(written):
    """As published ones, by which transformers takes the largest id: a plain pipeline's first added token."""
    folder, tokens, ours = written("sdxl")
    tuned = adapters.put_on(models.load_model(str(folder)), System("tuned", ((str(tokens), 1.0),)))
    tuned.text_encoder_2.text_model.eos_token_id = 2
    torch.testing.assert_close(embeddings(tuned), ours, rtol=0, atol=1e-6)
    plain = by_hand(models.load_model(str(folder)), tokens)
    plain.text_encoder_2.text_model.eos_token_id = 2
    ids = models.tokenize_for(plain, [f"{prompt} <x>" for prompt in PROMPTS])
    assert (models.encode(plain, ids) - ours).abs().max() > 1e-3
    plain.text_encoder_2.text_model.eos_token_id = plain.tokenizer_2.eos_token_id  # as docs/training.md says
    torch.testing.assert_close(models.encode(plain, ids), ours, rtol=0, atol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_plain_pipeline_draws_what_sample_draws_with_them(written, name):
    folder, tokens, _ = written(name)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    config = SampleOptions(model=str(folder), adapter=[str(tokens)], prompt=PROMPTS, sampler="ddim", eta=0.0, **options)
    ours = evaluation.sample(resolve_sample(config), PROMPTS, [0, 1])["tuned"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if name == "sd":
        pipeline.load_textual_inversion(tokens, **NAME)
    else:
        tensors, second = (
            load_file(tokens / TOKENS),
            {"text_encoder": pipeline.text_encoder_2, "tokenizer": pipeline.tokenizer_2},
        )
        pipeline.load_textual_inversion(tensors["clip_l"], **NAME)
        pipeline.load_textual_inversion(tensors["clip_g"], **NAME, **second)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    named = [f"{prompt} <x>" for prompt in PROMPTS]
    plain = pipeline(named, generator=generators, output_type="pt", eta=0.0, **options).images
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    base = pipeline(
        PROMPTS, generator=[g.manual_seed(i) for i, g in enumerate(generators)], output_type="pt", **options
    ).images
    assert (base - plain).abs().max() > 1e-3


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_the_base_model_and_the_null_prompt_are_without_them(folders, name):
    policy, base = policy_of(folders(name), null_prompt="adapted"), models.load_model(str(folders(name)))
    ids = models.tokenize_for(policy.model, PROMPTS)
    with policy.base():
        assert torch.equal(embeddings(policy.model), embeddings(base))
    assert torch.equal(
        policy.base_embeds(ids)[1:].sum(), models.encode_distinct(base, models.tokenize_for(base, PROMPTS))[0][1:].sum()
    )
    assert torch.equal(policy.conditioning(ids).null_embeds, models.encode_null(base))
    assert not torch.equal(embeddings(policy.model), embeddings(base))


@pytest.mark.parametrize("word", ["red", "circle"])
def test_a_prompt_that_leaves_no_room_loses_its_end_and_is_told_as_cut(folders, word):
    policy = policy_of(folders("sd"))
    reader = policy.model.readers["text_encoder"]
    room = reader.num_read - 2 - 3  # without start, end and the tokens
    whole, cut = " ".join([word] * room), " ".join([word] * (room + 1))
    ids = reader.ids([whole, cut])
    assert torch.equal(ids[0], ids[1])
    assert ids[0, -4:].tolist() == [-2, -3, -4, reader.tokenizer.eos_token_id]
    found = tokenization.find_cut([reader], [whole, cut])
    assert (found.prompts, found.num_tokens) == ([cut], room + 2)
    assert reader.ids([cut], negative=True).min() >= 0
    assert training.check_prompts(policy, prompt_sets.Prompts([whole, cut], [], [])).prompts == [cut]


def test_the_negative_prompt_and_the_base_model_lose_no_room_to_them(written):
    folder, tokens, _ = written("sd")
    reader = models.open_readers(str(folder))[0]
    long = " ".join(["red"] * (reader.num_read - 2))
    options = {"model": str(folder), "adapter": [str(tokens)], "prompt": ["red"]}
    negative = resolve_sample(SampleOptions(**options, negative_prompt=long, long_prompt="refuse"))
    assert evaluation.find_chunks(negative, ["red"]) == 1
    told = list[str]()
    _, cut, negative_cut = evaluation.read_notes(replace(negative, long_prompt="cut"), ["red"], "prompt", told.append)
    assert (cut.prompts, negative_cut.prompts, told) == ([], [], [])
    with pytest.raises(InputError, match="long_prompt: 1 of 1 prompts are longer than the"):
        evaluation.find_chunks(negative, [long])
    assert evaluation.find_cut(negative, [long], num_learned=3).prompts == [long]
    images, _ = evaluation.sample_to_folder(
        resolve_sample(SampleOptions(**options | {"prompt": [long]}, compare=True, num_images=1, num_inference_steps=2,
                                     output_dir=str(tokens.parent / "samples")))
    )  # fmt: skip
    found = {image.system: image.open().info.get("prompt_cut_to") for image in images}
    assert found == {"base": None, "tuned": f"{reader.num_read - 3} tokens"}


def test_they_begin_as_end_tokens_so_that_the_policy_begins_as_the_base_model(folders):
    config = resolve(TrainOptions(model=str(folders("sd")), target="tokens", num_tokens=4, mixed_precision="no"))
    policy, base = (
        texforce.make_policy(models.load_model(str(folders("sd"))), config),
        models.load_model(str(folders("sd"))),
    )
    assert torch.equal(embeddings(policy.model), embeddings(base))
    embeds = models.encode(policy.model, models.tokenize_for(policy.model, PROMPTS))
    embeds.square().sum().backward()
    (gradient,) = (parameter.grad for parameter in policy.parameters)
    assert (torch.pdist(gradient) > 0).all()  # so that they part


def test_every_clip_of_tiny_flow_learns_them_whose_preset_names_some():
    config = resolve(TrainOptions(model="tiny-flow", target="tokens"))
    assert config.text_encoders is None
    assert config.null_prompt == "base"


# --- what is written ---


@pytest.mark.parametrize(("name", "keys"), [
    ("sd", {"emb_params": (3, 16)}), ("sdxl", {"clip_l": (3, 16), "clip_g": (3, 24)}),
    ("sd3", {"clip_l": (3, 32), "clip_g": (3, 32)}), ("flux", {"clip_l": (3, 32)}),
])  # fmt: skip
def test_the_file_has_the_keys_that_a1111_and_comfyui_look_up(written, name, keys):
    """A1111, modules/textual_inversion: a single tensor, or `clip_l` and `clip_g`. ComfyUI, comfy/sd1_clip.py (load_embed):
    the encoder's key, else the first tensor."""
    tensors = load_file(written(name)[1] / TOKENS)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == keys
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.quick(2)
@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_a_folder_or_its_file_alone_is_put_on_a_model(written, tmp_path, name, place):
    folder, tokens, expected = written(name)
    base = models.load_model(str(folder))
    path = tokens if place == "folder" else Path(tmp_path, "incantation.safetensors")
    if place == "file":
        path.write_bytes((tokens / TOKENS).read_bytes())
    tuned = adapters.put_on(base, System("tuned", ((str(path), 1.0),)))
    assert torch.equal(embeddings(tuned), expected)
    assert not any(parameter.requires_grad for parameter in tuned.text_encoder.parameters())
    assert base.readers["text_encoder"].num_learned == 0
    assert tokenization.learned_tokens(base.text_encoder) is None
    left_out = adapters.put_on(base, System("tuned", ((str(path), 0.0),)))
    assert torch.equal(embeddings(left_out), embeddings(base))


def test_tokens_of_several_files_follow_each_other_and_go_with_lora(folders, written, tmp_path):
    folder, tokens, expected = written("sd")
    config = resolve(TrainOptions(model=str(folder), rank=2, mixed_precision="no"))
    policy = texforce.make_policy(models.load_model(str(folder)), config)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1)
    policy.save(tmp_path)
    system = System("tuned", ((str(tokens), 1.0), (str(tmp_path), 1.0), (str(tokens), 1.0)))
    tuned = adapters.put_on(models.load_model(str(folder)), system)
    assert tokenization.num_learned(tuned.text_encoder) == adapters.num_learned(system) == 6
    assert hasattr(tuned.text_encoder, "peft_config")
    with models.adapters_disabled(tuned):
        assert torch.equal(embeddings(tuned), embeddings(models.load_model(str(folder))))
    alone = adapters.put_on(models.load_model(str(folder)), System("tuned", (*system.adapters[:1], system.adapters[2])))
    assert not torch.equal(embeddings(tuned), embeddings(alone))
    assert not torch.equal(expected, embeddings(alone))


# --- a run ---


@pytest.fixture
def quick(narrow_model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name, *given, **named: narrow_model())
    monkeypatch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))


def configured(small_run, **options):
    given = {name: value for name, value in small_run.items() if name not in ("rank", "null_prompt")}
    return resolve(TrainOptions(**given | {"target": "tokens", "num_tokens": 2} | options))


ALGORITHMS = [
    {"algorithm": "ppo"}, {"algorithm": "matching", "kl_weight": 0.1},
    {"algorithm": "gradient", "reward": "hps", "backprop_steps": 1},
]  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", ALGORITHMS, ids=lambda options: options["algorithm"])
def test_every_algorithm_learns_them_and_a_stopped_run_goes_on_byte_for_byte(
    quick, small_run, tmp_path, monkeypatch, options
):
    options |= {"num_epochs": 2, "checkpoint_every": 1, "ema_decay": 0.5}
    result = training.train(configured(small_run, output_dir=str(tmp_path / "whole"), **options))
    original, epochs = training.train_epoch, []

    def stopping(current, config):
        epochs.append(current)
        if len(epochs) == 2:
            raise RuntimeError("stopped")
        return original(current, config)

    parted = configured(small_run, output_dir=str(tmp_path / "parted"), **options)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            training.train(parted)
    changed = configured(small_run, output_dir=str(tmp_path / "parted"), **options | {"num_tokens": 3})
    with pytest.raises(InputError, match=r"^resume: changed since the checkpoint: num_tokens: 2 -> 3"):
        training.train(changed, resume=True)
    training.train(parted, resume=True)
    assert (tmp_path / "whole" / TOKENS).read_bytes() == (tmp_path / "parted" / TOKENS).read_bytes()
    (learned,) = load_file(tmp_path / "whole" / TOKENS).values()
    (first,) = texforce.make_policy(models.load_model("tiny"), parted).parameters
    assert not torch.equal(learned, first)
    assert result["num_parameters"] == learned.numel() == 2 * 96
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Learned tokens (2) at the end of every prompt, a textual inversion, trained by" in card
    assert "textual-inversion" in card
    assert "LoRA" not in card
    assert {path.name for path in (tmp_path / "whole").glob("*.safetensors")} == {TOKENS}


def test_the_plan_counts_the_tokens_parameters(quick, small_run):
    planned = plan(configured(small_run))
    assert planned["learned tokens"] == "2, read by text_encoder"
    assert planned["trained parameters"] == 2 * 96
    assert "LoRA on" not in planned


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_recomputed_activations_and_encoders_off_the_device_change_nothing(folders, name):
    options = {"gradient_checkpointing": True, "offload_text_encoders": True}
    gradients = []
    for given in ({}, options):
        policy = policy_of(folders(name), **given)
        models.encode(policy.model, models.tokenize_for(policy.model, PROMPTS)).square().sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters])
    assert len(gradients[0]) == (2 if name == "sdxl" else 1)
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)
    assert policy.model.encode_once.keys() == ({"text_encoder_2"} if name == "flux" else set())


# --- the commands ---


@pytest.fixture
def out(quick, small_run, tmp_path):
    """A training by the command line."""
    given = {name: value for name, value in small_run.items() if name not in ("rank", "null_prompt")}
    result = invoke("train", *flags(given | {"target": "tokens", "num_tokens": 2, "output_dir": tmp_path / "out"}))
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_the_commands_train_sample_and_evaluate_and_merge_refuses_them(out, tmp_path):
    from texforce.files import read_image

    long = " ".join(["red"] * 30)
    result = invoke("sample", "--adapter", out, "--prompt", "a red circle", "--prompt", long, "--compare", "--num-images", 1,
                    "--output-dir", tmp_path / "samples")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 of 2 prompts are cut to the 22 tokens" in result.stderr
    images = {read_image(path)[1]["system"]: read_image(path)[0] for path in (tmp_path / "samples").glob("[0-9]*.png")}
    assert not torch.equal(images["base"], images["tuned"])
    measured = ["--benchmark", tmp_path / "heldout.txt", "--reward", "jpeg", "--num-images", 1]
    result = invoke("eval", "--adapter", f"words={out / TOKENS}", *measured, "--output-dir", tmp_path / "eval", "--model",
                    "tiny", "--strength", "0,1")  # fmt: skip
    assert result.exit_code == 0, result.output
    drawn = [(tmp_path / "eval" / "images" / name / "00000_0.png") for name in ("base", "words@0", "words@1")]
    base, absent, there = (read_image(path)[0] for path in drawn)
    assert torch.equal(base, absent)
    assert not torch.equal(base, there)
    for refused in (
        ["merge", "--adapter", out, "--output-dir", tmp_path / "merged"],
        ["sample", "--adapter", f"{out}:0.5", "--prompt", "a red circle"],
        ["sample", "--adapter", out, "--strength", "0.5", "--prompt", "a red circle"],
        ["sample", "--adapter", out, "--prompt-weights", "--prompt", "a red circle"],
        ["sample", "--adapter", out, "--long-prompt", "chunk", "--prompt", "a red circle"],
        ["eval", "--adapter", out, *measured, "--strength", "0,0.5", "--output-dir", tmp_path / "other"],
    ):
        result = invoke(*refused)
        assert result.exit_code == 2, result.output
        assert "learned tokens" in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--num-tokens", "0"], "--num-tokens: must be a whole number, at least 1"),
    (["--num-tokens", "22"], "--num-tokens: must be at most 21 for 'tiny', to leave room for prompts, not 22"),
    (["--rank", "4"], "--rank: is an option of LoRA"),
    (["--lora-layers", "last:1"], "--lora-layers: has no effect with target tokens: there is no LoRA"),
    (["--lora-modules", "q_proj"], "--lora-modules: has no effect with target tokens: there is no LoRA"),
    (["--text-encoders", "text_encoder"], "--text-encoders: has no effect with target tokens: every CLIP"),
    (["--null-anchor", "1"], "--null-anchor: has no effect with target tokens: the null prompt is without"),
    (["--long-prompt", "chunk"], "--long-prompt: must be cut with target tokens, not chunk"),
    (["--adapter-steps", "0-0.5"], "--adapter-steps: is for LoRA"),
    (["--target", "text-encoder", "--num-tokens", "3"], "--num-tokens: is an option of --target tokens"),
])  # fmt: skip
def test_values_that_cannot_be_are_refused(tmp_path, options, message):
    given = ["--model", "tiny", "--reward", "jpeg", "--output-dir", tmp_path / "out", "--target", "tokens"]
    result = invoke("train", *given, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", ["pixart-sigma", "sana"])
def test_a_family_without_clip_is_refused(folders, tmp_path, name):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    result = invoke("train", "--model", folders(name), "--reward", "jpeg", "--prompts", prompts, "--target", "tokens",
                    "--output-dir", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 2
    assert "--target: tokens are learned by CLIP, which" in result.stderr


@pytest.mark.parametrize(("tensors", "error", "message"), [
    ({"emb_params": torch.zeros(2, 7)}, ArtifactError, r"another model: it holds .'emb_params': \(2, 7\)., this one"),
    ({"clip_l": torch.zeros(2, 16), "clip_g": torch.zeros(2, 24)}, ArtifactError, "made for another model"),
    ({"emb_params": torch.full((2, 16), torch.nan)}, ArtifactError, "not finite"),
    ({"emb_params": torch.zeros(16)}, ArtifactError, r"must be of shape \(tokens, width\)"),
    ({"emb_params": torch.zeros(())}, ArtifactError, r"must be of shape \(tokens, width\)"),
    ({"emb_params": torch.zeros(22, 16)}, InputError, "22 learned tokens leave no room for prompts; .* reads at most 21"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(folders, tmp_path, tensors, error, message):
    save_file(tensors, tmp_path / TOKENS)
    with pytest.raises(error, match=message):
        adapters.put_on(models.load_model(str(folders("sd"))), System("tuned", ((str(tmp_path), 1.0),)))


def test_a_damaged_file_is_refused_as_any_adapter(folders, tmp_path):
    (tmp_path / TOKENS).write_bytes(b"\xff" * 100)
    system = System("tuned", ((str(tmp_path), 1.0),))
    adapters.check_inputs(system)
    with pytest.raises(ArtifactError, match="refused as an adapter"):
        adapters.put_on(models.load_model(str(folders("sd"))), system)
