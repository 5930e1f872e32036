"""--long-prompt: prompts that the text encoders do not read whole are refused, cut, or read in chunks, as A1111 does."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from texforce import evaluation, models, run, tokenization, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import SampleOptions, resolve_sample
from texforce.errors import InputError
from texforce.plan import plan

from .commands import invoke

SHORT, LONG = "a red circle", "a navy box left of " + "two blue squares and " * 10 + "a crimson disc"
DRAWING = {"num_inference_steps": 2, "guidance_scale": 4.0, "eta": 0.0}


def a1111_rows(tokenizer, text, count):
    """Ids of each chunk as A1111 makes them: filled up with end tokens, then what comes after the first one is padding."""
    size, end = tokenizer.model_max_length - 2, tokenizer.eos_token_id
    tokens, rows = tokenizer(text, add_special_tokens=False, verbose=False).input_ids, []
    for k in range(count):
        part = tokens[k * size : (k + 1) * size]
        row = [tokenizer.bos_token_id, *part, *[end] * (size - len(part)), end]
        first = row.index(end)
        rows.append(torch.tensor(row[: first + 1] + [tokenizer.pad_token_id] * (size + 1 - first)))
    return rows


def lpw_rows(tokenizer, text, count):
    """The same of diffusers' community pipeline: all tokens padded at once, and pieces whose ends are overwritten."""
    size = tokenizer.model_max_length - 2
    tokens = tokenizer(text, verbose=False).input_ids[1:-1]
    whole = [
        tokenizer.bos_token_id,
        *tokens,
        *[tokenizer.pad_token_id] * (count * size - len(tokens)),
        tokenizer.eos_token_id,
    ]
    pieces = [whole[k * size : (k + 1) * size + 2] for k in range(count)]
    return [torch.tensor([whole[0], *piece[1:-1], whole[-1]]) for piece in pieces]


@torch.no_grad()
def joined(pipeline, text, count, rows_of):
    """Embeddings of chunks that are encoded one by one, and the pooled text of the first."""
    if not hasattr(pipeline, "text_encoder_2"):
        rows = rows_of(pipeline.tokenizer, text, count)
        return torch.cat([pipeline.text_encoder(row[None])[0] for row in rows], dim=1), None
    states, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):  # fmt: skip
        outputs = [encoder(row[None], output_hidden_states=True) for row in rows_of(tokenizer, text, count)]
        states.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=1))
        pooled = outputs[0][0]
    return torch.cat(states, dim=-1), pooled


def plain_images(folder, prompts, negative, count, rows_of=a1111_rows):
    """The images of the plain pipeline for embeddings that are joined here."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    encoded = [joined(pipeline, text, count, rows_of) for text in (*prompts, negative or "")]
    embeds, null = torch.cat([each for each, _ in encoded[:-1]]), encoded[-1][0].repeat(len(prompts), 1, 1)
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": null}
    if encoded[0][1] is not None:
        pooled = torch.cat([pooled for _, pooled in encoded[:-1]]), encoded[-1][1].repeat(len(prompts), 1)
        if not negative:  # the pipeline's zeros
            options["negative_prompt_embeds"], pooled = torch.zeros_like(null), (pooled[0], torch.zeros_like(pooled[1]))
        options |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipeline(generator=generator, output_type="pt", **DRAWING, **options).images


def our_images(folder, prompts, **options):
    config = resolve_sample(SampleOptions(model=str(folder), prompt=prompts, **DRAWING | options))
    return evaluation.sample(config, prompts, range(len(prompts)))["base"]


# --- what is drawn ---


@pytest.mark.quick(2)
@pytest.mark.parametrize("negative", [None, "not " + LONG], ids=["null", "long"])
@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_chunks_draw_what_the_plain_pipeline_draws_of_embeddings_joined_as_a1111_does(family, negative, request):
    folder = request.getfixturevalue(family)
    ours = our_images(folder, [SHORT, LONG], long_prompt="chunk", negative_prompt=negative)
    torch.testing.assert_close(ours, plain_images(folder, [SHORT, LONG], negative, 3), rtol=0, atol=1e-4)
    assert (ours - our_images(folder, [SHORT, LONG], negative_prompt=negative)).abs().max() > 1e-3  # cut


def test_chunks_draw_what_diffusers_community_pipeline_draws(stable_diffusion):
    ours = our_images(stable_diffusion, [SHORT, LONG], long_prompt="chunk", negative_prompt="blurry")
    plain = plain_images(stable_diffusion, [SHORT, LONG], "blurry", 3, lpw_rows)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_prompts_that_fit_are_drawn_by_chunk_as_by_cut_to_the_byte(family, request):
    folder, fits = request.getfixturevalue(family), " ".join(["red"] * 22)  # with start and end, 24
    ours = our_images(folder, [SHORT, fits], long_prompt="chunk", negative_prompt="blurry")
    assert torch.equal(ours, our_images(folder, [SHORT, fits], negative_prompt="blurry"))


def test_a_short_prompt_beside_a_long_one_is_filled_with_chunks_of_the_empty_prompt(sdxl):
    model = replace(models.load_model(str(sdxl)), num_chunks=3)
    ids, empty = (models.split_ids(model, models.tokenize_for(model, [prompt])) for prompt in (SHORT, ""))
    for name, reader in model.readers.items():
        assert ids[name].shape == (1, 3 * reader.num_read)
        assert torch.equal(ids[name][:, reader.num_read :], empty[name][:, reader.num_read :])
        assert torch.equal(empty[name][:, : reader.num_read], empty[name][:, -reader.num_read :])


def test_a_text_encoder_that_is_off_the_device_reads_chunks_alike(sdxl):
    model = replace(models.load_model(str(sdxl)), num_chunks=3)
    ids = models.tokenize_for(model, [SHORT, LONG])
    expected = models.encode(model, ids)
    for name, encoder in model.text_encoders.items():
        model.encode_once[name] = tokenization.EncodeOnce(encoder, model.readers[name])
    torch.testing.assert_close(models.encode(model, ids), expected, rtol=0, atol=1e-5)


# --- what is refused ---


def arguments(command, tmp_path, *options):
    path = tmp_path / "prompts.txt"
    tmp_path.mkdir(exist_ok=True)
    path.write_text(f"{SHORT}\n{LONG}\n{LONG} again\n")
    given = {
        "train": ["--prompts", path, "--reward", "jpeg", "--output-dir", tmp_path / "out"],
        "sample": ["--prompts", path, "--num-inference-steps", 1, "--num-images", 1, "--output-dir", tmp_path / "out"],
        "eval": ["--benchmark", path, "--num-inference-steps", 1, "--num-images", 1, "--output-dir", tmp_path / "out"],
    }[command]
    given += ["--reward", "jpeg"] if command == "eval" else []
    return [command, *map(str, given), "--model", "tiny", *map(str, options)]


@pytest.mark.parametrize("command", ["train", "sample", "eval"])
def test_refuse_names_the_first_of_the_prompts_that_are_too_long_and_their_number(command, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)  # it is found before
    result = invoke(*arguments(command, tmp_path, "--long-prompt", "refuse"))
    assert result.exit_code == 2, result.output
    said = f"the 24 tokens that the text encoder reads, the first is {LONG[:60]!r}"
    assert f"--long-prompt: 2 of 3 prompts are longer than {said}" in " ".join(result.output.split())


def test_refuse_looks_at_negative_and_anchor_prompts_too(small_run, tmp_path):
    with pytest.raises(InputError, match=r"^long_prompt: 1 of 1 prompts are longer"):
        our_images("tiny", [SHORT], long_prompt="refuse", negative_prompt=LONG)
    (tmp_path / "anchors.txt").write_text(LONG)
    more = {"anchor_prompts": str(tmp_path / "anchors.txt"), "null_anchor": 1.0, "long_prompt": "refuse"}
    with pytest.raises(InputError, match=r"^long_prompt: 1 of 7 prompts are longer"):
        plan(resolve(TrainOptions(**small_run, **more)))


@pytest.mark.parametrize("long_prompt", ["cut", "refuse"])
def test_prompts_that_fit_are_drawn_alike(long_prompt):
    images = our_images("tiny", [SHORT], long_prompt=long_prompt)
    assert torch.equal(images, our_images("tiny", [SHORT]))


def test_chunk_is_refused_where_another_text_encoder_than_clip_reads_the_prompt():
    with pytest.raises(InputError, match=r"^long_prompt: chunk is for models .* CLIPs alone; 'tiny-flow' reads"):
        our_images("tiny-flow", [LONG], long_prompt="chunk", eta=0.0)


def test_another_word_is_refused_and_the_known_ones_are_named(tmp_path):
    result = invoke(*arguments("sample", tmp_path, "--long-prompt", "chunks"))
    assert result.exit_code == 2
    assert "--long-prompt: must be one of refuse, cut, chunk, not 'chunks'" in " ".join(result.output.split())


# --- a training, and what is drawn of its adapter ---


@pytest.fixture
def options(small_run, narrow_model, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
    monkeypatch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))
    (tmp_path / "heldout.txt").write_text(LONG)
    (tmp_path / "prompts.txt").write_text(f"{SHORT}\ntwo blue squares\n")
    shorter = {"num_inference_steps": 2, "num_samples_per_prompt": 2, "sample_batch_size": 4, "micro_batch_size": 4}
    return small_run | shorter | {"output_dir": str(tmp_path / "out"), "long_prompt": "chunk"}


def test_a_training_reads_all_its_prompts_in_the_chunks_of_the_longest_and_says_so(options, tmp_path):
    messages, config = [], resolve(TrainOptions(**options))
    assert plan(config)["prompts"] == "2 for training, 1 held out, read in 3 chunks"
    result = training.train(config, warn=messages.append)
    message, foreign = messages
    assert "only coloured shapes" in foreign
    assert message == "prompts: " + tokenization.chunks_note(3)
    assert (result["long_prompt"], result["num_chunks"], result["num_prompts_cut"]) == ("chunk", 3, 0)
    assert result["max_ratio_deviation"] <= 5e-6
    assert "Prompts were read in 3 chunks (`--long-prompt chunk`)." in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["long_prompt"] == "chunk"
    assert training.train(config, resume=True) == result
    with pytest.raises(InputError, match=r"resume: changed since the checkpoint: long_prompt: chunk -> cut"):
        training.train(replace(config, long_prompt="cut"), resume=True)


@pytest.mark.slow
def test_a_resumed_training_in_chunks_gives_the_same_adapter(options, tmp_path):
    from safetensors.torch import load_file

    whole = options | {"num_epochs": 2, "checkpoint_every": 1}
    training.train(resolve(TrainOptions(**whole)))
    cut_off = resolve(TrainOptions(**whole | {"output_dir": str(tmp_path / "again")}))
    report = [].append

    def stop(measures):
        report(measures)
        if measures["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(cut_off, stop)
    training.train(cut_off, resume=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_an_adapters_config_decides_how_its_long_prompts_are_drawn(options, tmp_path):
    training.train(resolve(TrainOptions(**options)))
    given = {"adapter": [str(tmp_path / "out")], "prompt": [LONG]}
    assert resolve_sample(SampleOptions(**given)).long_prompt == "chunk"
    assert resolve_sample(SampleOptions(**given, long_prompt="cut")).long_prompt == "cut"
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["long_prompt"]  # a run of before there was a choice
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    assert resolve_sample(SampleOptions(**given)).long_prompt == "cut"


# --- what the commands say and write down ---


def test_sample_says_in_how_many_chunks_it_reads_and_writes_it_into_the_images(tmp_path):
    result = invoke(*arguments("sample", tmp_path, "--long-prompt", "chunk"))
    assert result.exit_code == 0, result.output
    assert tokenization.chunks_note(3) in result.output
    with Image.open(tmp_path / "out" / "00001.png") as image:
        assert (image.text["long_prompt"], image.text["num_chunks"]) == ("chunk", "3")
        assert "prompt_cut_to" not in image.text


def test_eval_says_it_in_results_and_report_and_goes_on_only_with_the_same(tmp_path):
    def evaluated(*options):
        return invoke(*arguments("eval", tmp_path, *options))

    result = evaluated("--long-prompt", "chunk")
    assert result.exit_code == 0, result.output
    assert tokenization.chunks_note(3) in result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["long_prompt"], results["num_chunks"], results["prompts_cut"]) == ("chunk", 3, [])
    assert "read in 3 chunks of tokens" in " ".join((tmp_path / "out" / "report.html").read_text().split())
    for options, new in (((), "cut"), (("--long-prompt", "cut"), "cut")):
        result = evaluated(*options)
        assert result.exit_code == 2
        assert f"holds another evaluation: --long-prompt chunk there, {new} asked for" in " ".join(result.output.split())


def test_without_the_option_images_and_results_hold_nothing_new(tmp_path):
    for command in ("sample", "eval"):
        result = invoke(*arguments(command, tmp_path / command, "--output-dir", tmp_path / command / "out"))
        assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "sample" / "out" / "00000.png") as image:
        assert not {"long_prompt", "num_chunks"} & image.text.keys()
    for name in ("settings.json", "results.json"):
        assert not {"long_prompt", "num_chunks"} & json.loads((tmp_path / "eval" / "out" / name).read_text()).keys()
