"""`--prompt-weights`: parsing as A1111 documents it, embeddings by its published arithmetic, ranges of steps, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from texforce import Policy, evaluation, models, scorers, tokenization
from texforce.draw_config import (
    EvalOptions,
    SampleConfig,
    SampleOptions,
    resolve_eval,
    resolve_sample,
)
from texforce.errors import InputError
from texforce.families import FAMILIES
from texforce.tokenization import Reader, parse_weights

from .commands import invoke

# The cases in the documentation of A1111's parse_prompt_attention: each text with its weight.
DOCUMENTED = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
         (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)],
    ),
]  # fmt: skip
FURTHER = [  # by its rules
    ("", [("", 1.0)]),
    ("[cat]", [("cat", 1 / 1.1)]),
    ("(cat: 1.5 )", [("cat", 1.5)]),
    ("(cat:.5) (dog:-1)", [("cat", 0.5), (" ", 1.0), ("dog", -1.0)]),
    ("a cat) at 16:9]", [("a cat) at 16:9]", 1.0)]),
    ("(at noon:sunny)", [("at noon:sunny", 1.1)]),
    ("a cat:1.3) here", [("a cat:1.3) here", 1.0)]),
    (r"\\ and \x", [("\\ and x", 1.0)]),
    ("[a: b]", [("a: b", 1 / 1.1)]),
    ("(a|b)", [("a|b", 1.1)]),
]


def texts_at(prompt: str, share: float = 0.5) -> list[tuple[str, float]]:
    return list(tokenization.texts_at(parse_weights(prompt), share))


@pytest.mark.parametrize(("prompt", "expected"), DOCUMENTED + FURTHER)
def test_prompts_are_parsed_as_a1111_documents_it(prompt, expected):
    assert texts_at(prompt) == expected


@pytest.mark.parametrize(("prompt", "first", "last"), [
    ("a [red:0-0.5:1.25] dot", [("a ", 1.0), ("red", 1.25), (" dot", 1.0)], [("a  dot", 1.0)]),
    ("[red : .5 - 1 : 2]", [("", 1.0)], [("red ", 2.0)]),
    ("[red:0-0.5:1][blue:0.5-1:1]", [("red", 1.0)], [("blue", 1.0)]),
    ("([red:0-0.5:1.5] dot:2)", [("red", 3.0), (" dot", 2.0)], [(" dot", 2.0)]),
    ("[a [red:0-0.5:2] b:0.5-1:1]", [("", 1.0)], [("a  b", 1.0)]),
    ("a red:0-0.5:1.25] dot", [("a red:0-0.5:1.25] dot", 1.0)], [("a red:0-0.5:1.25] dot", 1.0)]),
])  # fmt: skip
def test_a_text_with_a_range_is_part_of_the_prompt_in_these_steps_alone(prompt, first, last):
    assert (texts_at(prompt, 0.25), texts_at(prompt, 0.75)) == (first, last)


UNREADABLE = [
    ("a (red:1..2) dot", "a weight must be a number from -1000 to 1000, not '1..2'"),
    ("a (red:1,3) dot", "not '1,3'"),
    ("a (red:.) dot", "not '.'"),
    ("a (red:1e3) dot", "not '1e3'"),
    ("a (red:1001) dot", "not '1001'"),
    ("a [red:0-0.5] dot", "not ''"),
    ("a [red:0-0.5:much] dot", "not 'much'"),
    ("a [red:0.5-0.2:1.3] dot", "a range of steps must be A-B with 0 <= A < B <= 1"),
    ("a [red:0-2:1.3] dot", "not '0-2'"),
    ("a [red:1..0-2:1.3] dot", "not '1..0-2'"),
    ("a [red:blue:0.5] dot", "prompt editing, alternation, BREAK and AND are not supported"),
    ("a [red:5] dot", "prompt editing"),
    ("a [red|blue] dot", "alternation"),
    ("a red dot BREAK a blue dot", "BREAK"),
    ("a red dot AND a blue dot", "AND"),
    ("a [red:0-0.5:1.25 dot", "the range 0-0.5 is not closed; write it as [text:A-B:weight]"),
    ("a [red:0-0.5:1.25) dot", "the range 0-0.5 is not closed"),
]


@pytest.mark.parametrize(("prompt", "words"), UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_prompt(prompt, words):
    with pytest.raises(InputError) as caught:
        parse_weights(prompt)
    assert str(caught.value).startswith(f"prompt_weights: the prompt {prompt!r} cannot be read: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("prompt", [
    "a [red:0-0.05:1.3] dot", "[red:0.4-0.6:1]", "[a [red:0-0.5:2] dot:0.5-1:1]", "[ [red:0.95-1:1]:0-1:1]",
])  # fmt: skip
def test_a_text_that_no_step_reads_is_refused_and_does_not_vanish(prompt, narrow_model):
    for read in (
        lambda: tokenization.counted_texts(prompt, 4),
        lambda: models.tokenize_weighted(narrow_model(), [prompt], 4),
    ):
        with pytest.raises(InputError, match=r"none of the 4 denoising steps lies in the range of '(red|a)"):
            read()


@pytest.mark.parametrize(("prompt", "expected"), [
    ("a [red:0-0.5:1.25][red:0.5-1:1] circle", "a red circle"),
    ("a [red:0-0.5:1.25] [red:0.5-1:1] circle", "a red  circle"),
    ("[(deep:1.2) red:0-0.5:1][deep red:0.5-1:2] dot", "deep red dot"),
    ("[red:0-0.5:1][blue:0.5-1:1] dot", "red blue dot"),
    ("[red:0-0.6:1][blue:0.5-1:1] dot", "redblue dot"),  # together in some steps, as one writes them
    ("a [red:0-0.5:1.25] circle", "a red circle"),
    ("[re:0-0.5:1.2]d (dot:1.3)", "red dot"),
    ("red red", "red red"),
])  # fmt: skip
def test_scorers_read_the_words_of_all_ranges_and_a_text_with_several_weights_once(prompt, expected):
    assert tokenization.plain_text(prompt) == expected


def test_words_that_are_never_together_are_not_counted_together():
    prompt = f"[{'red ' * 12}:0-0.5:1][{'blue ' * 12}:0.5-1:1]"
    config = resolve_sample(SampleOptions(model="tiny", prompt=["x"], prompt_weights=True, long_prompt="chunk"))
    assert evaluation.find_cut(config, [prompt]).prompts == []
    assert evaluation.find_chunks(config, [prompt]) == 1
    longer = prompt.replace("0.5-1", "0.4-1")
    assert evaluation.find_cut(config, [longer]).prompts == [longer]
    assert evaluation.find_chunks(config, [longer]) == 2


@pytest.mark.parametrize("prompt", ["[a:0-1" + " " * 20_000, "(" * 9 + "a:1" * 2000, "a:" * 5_000, "\\" * 9_001])
def test_a_long_prompt_takes_no_time(prompt):
    assert len(tokenization.plain_text(prompt)) >= 4000


# --- embeddings ---


def config_for(**options: object) -> SampleConfig:
    return resolve_sample(SampleOptions(prompt=["x"], prompt_weights=True, num_inference_steps=4, **options))


def reference_states(tokenizer, encoder, layer: int | None, segments: list[tuple[str, float]]) -> Tensor:
    """A1111's published arithmetic, for one prompt of at most 75 tokens, by transformers alone."""
    ids, multipliers = [tokenizer.bos_token_id], [1.0]
    for text, weight in segments:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        ids, multipliers = ids + tokens, multipliers + [weight] * len(tokens)
    length = tokenizer.model_max_length
    ids, multipliers = [*ids[: length - 1], tokenizer.eos_token_id], [*multipliers[: length - 1], 1.0]
    ids += [tokenizer.pad_token_id] * (length - len(ids))
    multipliers += [1.0] * (length - len(multipliers))
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    z = output.last_hidden_state if layer is None else output.hidden_states[layer]
    original_mean = z.mean()
    z = z * torch.tensor(multipliers)[None, :, None]
    return z * (original_mean / z.mean())


WEIGHTED = "a (crimson disc:1.4) [left] of a blue (square:0.3)"
SEGMENTS = [("a ", 1.0), ("crimson disc", 1.4), (" ", 1.0), ("left", 1 / 1.1), (" of a blue ", 1.0), ("square", 0.3)]
NEGATIVE, NEGATIVE_SEGMENTS = "(blurry:1.3) dot", [("blurry", 1.3), (" dot", 1.0)]


@torch.no_grad()
def conditionings(policy: Policy, prompts: list[str]) -> list[models.Conditioning]:
    return policy.conditionings(policy.tokenize_weighted(prompts))


@pytest.mark.parametrize("null_prompt", ["adapted", "base"])
def test_embeddings_of_stable_diffusion_equal_a1111s_arithmetic(stable_diffusion, null_prompt):
    model = models.load_model(str(stable_diffusion))
    options = {"model": str(stable_diffusion), "null_prompt": null_prompt, "negative_prompt": NEGATIVE}
    found = conditionings(Policy(model, config_for(**options)), ["a red circle", WEIGHTED])
    assert len(found) == 4
    assert len({id(text) for text in found}) == 1  # one for all steps, so that its keys are kept
    with torch.no_grad():
        expected = [
            reference_states(model.tokenizer, model.text_encoder, None, segments)
            for segments in (NEGATIVE_SEGMENTS, [("a red circle", 1.0)], SEGMENTS)
        ]
    torch.testing.assert_close(torch.cat([found[0].null_embeds, found[0].prompt_embeds]), torch.cat(expected))


def test_embeddings_of_both_encoders_of_sdxl_equal_a1111s_arithmetic_and_pooled_text_has_no_weights(sdxl):
    model = models.load_model(str(sdxl))
    policy = Policy(model, config_for(model=str(sdxl)))
    text = model.packing.unpack(conditionings(policy, [WEIGHTED])[0].prompt_embeds)
    with torch.no_grad():
        expected = [
            reference_states(tokenizer, encoder, -2, SEGMENTS)
            for tokenizer, encoder in ((model.tokenizer, model.text_encoder), (model.tokenizer_2, model.text_encoder_2))
        ]
        plain = models.encode(model, models.tokenize_for(model, ["a crimson disc left of a blue square"]))
    torch.testing.assert_close(text.embeds, torch.cat(expected, dim=-1))
    torch.testing.assert_close(text.pooled, model.packing.unpack(plain).pooled)


def test_a_prompt_without_weights_has_the_same_bits_as_without_the_option(stable_diffusion):
    model, prompts = (
        models.load_model(str(stable_diffusion)),
        ["a red circle", "two blue squares, " * 40, "", "a red circle"],
    )
    policy = Policy(model, config_for(model=str(stable_diffusion)))
    plain = Policy(model, replace(config_for(model=str(stable_diffusion)), prompt_weights=False))
    with torch.no_grad():
        expected = plain.conditionings(models.tokenize_for(model, prompts))[0]
    found = conditionings(policy, prompts)[0]
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.null_embeds, expected.null_embeds)


@pytest.mark.parametrize(("left", "within", "beyond"), [(0, "", "a blue square"), (2, "a blue", "square")])
def test_each_chunk_of_a_long_prompt_keeps_its_own_mean_as_in_a1111(stable_diffusion, left, within, beyond):
    """Also where a text with a weight crosses from one chunk into the next."""
    model = models.load_model(str(stable_diffusion))
    size = model.readers["text_encoder"].num_read - 2
    first, second = "red " * (size - left), "a blue square"  # a token a word
    found = conditionings(
        Policy(replace(model, num_chunks=2), config_for(model=str(stable_diffusion))), [f"({first}:1.4)({second}:0.3)"]
    )[0]
    with torch.no_grad():
        chunks = [[(first, 1.4), (within, 0.3)], [(beyond, 0.3)]]
        expected = [reference_states(model.tokenizer, model.text_encoder, None, segments) for segments in chunks]
    torch.testing.assert_close(found.prompt_embeds, torch.cat(expected, dim=1))


def test_the_layer_that_is_read_is_weighted_and_the_null_prompt_skips_none(stable_diffusion):
    model = replace(models.load_model(str(stable_diffusion)), clip_skip=1)
    options = {"model": str(stable_diffusion), "negative_prompt": NEGATIVE}
    found = conditionings(Policy(model, config_for(**options)), [WEIGHTED])[0]
    with torch.no_grad():
        null = reference_states(model.tokenizer, model.text_encoder, None, NEGATIVE_SEGMENTS)
        last = reference_states(model.tokenizer, model.text_encoder, None, SEGMENTS)
    torch.testing.assert_close(found.null_embeds, null)
    assert not torch.allclose(found.prompt_embeds, last, atol=1e-2)


@pytest.mark.parametrize("null_prompt", ["adapted", "base"])
def test_each_step_reads_the_prompts_that_it_has(stable_diffusion, null_prompt):
    """Of several prompts and the negative one each has its own ranges."""
    model = models.load_model(str(stable_diffusion))
    prompts, negative = ["a [red:0-0.5:1.25] dot", "a [blue:0-0.25:2] box", "a disc"], "[blurry:0.5-1:1.5]"
    options = {"model": str(stable_diffusion), "null_prompt": null_prompt}
    found = conditionings(Policy(model, config_for(negative_prompt=negative, **options)), prompts)
    steps = [
        (["a (red:1.25) dot", "a (blue:2) box", "a disc"], ""),
        (["a (red:1.25) dot", "a box", "a disc"], ""),
        (["a dot", "a box", "a disc"], "(blurry:1.5)"),
        (["a dot", "a box", "a disc"], "(blurry:1.5)"),
    ]
    for text, (prompts, negative) in zip(found, steps, strict=True):
        expected = conditionings(Policy(model, config_for(negative_prompt=negative or None, **options)), prompts)[0]
        torch.testing.assert_close(text.prompt_embeds, expected.prompt_embeds)
        torch.testing.assert_close(text.null_embeds, expected.null_embeds)
    assert found[2] is found[3]
    assert len({id(text) for text in found}) == 3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_with_another_text_encoder_than_clip_are_refused(family):
    readers = [Reader(None, part) for part in family.text.values()]
    if all(part.is_clip for part in family.text.values()):
        tokenization.check_weighable(readers)
    else:
        with pytest.raises(InputError, match="prompt_weights: is for CLIP text encoders alone"):
            tokenization.check_weighable(readers)


# --- the commands ---


@pytest.fixture
def quick(narrow_model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))


def draw(folder: Path, prompt: str, *options: object) -> tuple[Image.Image, bytes]:
    """The image that `sample` draws of a prompt, and its pixels."""
    result = invoke("sample", "--prompt", prompt, "--num-images", 1, "--num-inference-steps", 2, "--output-dir", folder,
                     *options)  # fmt: skip
    assert result.exit_code == 0, result.output
    (path,) = (path for path in folder.glob("*.png") if "grid" not in path.name)
    image = Image.open(path)
    return image, image.tobytes()


def test_brackets_are_text_unless_weights_are_asked_for_and_metadata_says_which(quick, tmp_path):
    plain = draw(tmp_path / "plain", "a red (circle:1.9)")
    weighted = draw(tmp_path / "weighted", "a red (circle:1.9)", "--prompt-weights")
    assert plain[1] != weighted[1]
    assert draw(tmp_path / "one", "a red (circle:1)", "--prompt-weights")[1] == draw(tmp_path / "same", "a red circle")[1]
    assert weighted[0].info["prompt"] == plain[0].info["prompt"] == "a red (circle:1.9)"
    assert weighted[0].info["prompt_weights"] == "True"
    assert "prompt_weights" not in plain[0].info


def test_weights_of_the_negative_prompt_show_in_the_image(quick, tmp_path):
    one, other = (
        draw(tmp_path / weight, "a red circle", "--prompt-weights", "--negative-prompt", f"a (blue square:{weight})")[1]
        for weight in ("1", "1.9")
    )
    assert one != other


@pytest.mark.parametrize("given", ["prompt", "file", "negative", "benchmark"])
def test_malformed_weights_end_with_2_and_name_the_prompt(tmp_path, given, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)  # found before anything is loaded
    prompt = "a (red:1..2) dot"
    (tmp_path / "prompts.txt").write_text(f"a disc\n{prompt}\n")
    arguments = {
        "prompt": ["sample", "--prompt", prompt],
        "file": ["sample", "--prompts", tmp_path / "prompts.txt"],
        "negative": ["sample", "--prompt", "a disc", "--negative-prompt", prompt],
        "benchmark": ["eval", "--benchmark", tmp_path / "prompts.txt", "--reward", "jpeg"],
    }[given]
    result = invoke(*arguments, "--model", "tiny", "--prompt-weights", "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert f"--prompt-weights: the prompt {prompt!r} cannot be read: a weight must be a number" in result.stderr


def test_a_model_with_a_t5_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    result = invoke(
        "sample", "--model", "tiny-flow", "--prompt", "a (disc:1.2)", "--prompt-weights", "--output-dir", tmp_path
    )
    assert result.exit_code == 2
    assert "--prompt-weights: is for CLIP text encoders alone" in result.stderr


def test_a_prompt_is_cut_by_the_tokens_of_its_text_and_not_of_its_brackets(tmp_path):
    config = resolve_sample(SampleOptions(model="tiny", prompt=["x"], prompt_weights=True, long_prompt="chunk"))
    short, long = "(((a red circle:1.2)))", "(a red circle:1.2) " * 40
    cut = evaluation.find_cut(config, [short, long])
    assert (cut.prompts, cut.num_prompts) == ([long], 2)
    plain = "a red circle " * 40
    numbers = [evaluation.find_chunks(replace(config, prompt_weights=weights), [prompt])
               for weights, prompt in ((True, long), (False, plain), (True, short))]  # fmt: skip
    assert numbers[0] == numbers[1] > numbers[2] == 1


def test_eval_draws_with_weights_scores_the_text_without_them_and_refuses_a_folder_of_other_settings(
    quick, tmp_path, monkeypatch
):
    prompts = ["a (red:1.5) circle", "a (red:0.5) circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = {"benchmark": str(tmp_path / "prompts.txt"), "reward": ["jpeg"], "num_images": 2, "model": "tiny"}
    options |= {"num_inference_steps": 2, "output_dir": str(tmp_path / "eval")}
    judged, score = [], scorers.score
    monkeypatch.setattr(
        scorers, "score", lambda scorer, images, texts, *rest: judged.extend(texts) or score(scorer, images, texts)
    )
    results = evaluation.evaluate(resolve_eval(EvalOptions(**options, prompt_weights=True)))
    assert judged == ["a red circle"] * 4
    assert [row["prompt"] for row in results["prompts"]] == prompts
    assert results["prompt_weights"] is True
    assert json.loads((tmp_path / "eval" / "settings.json").read_text())["prompt_weights"] is True
    with pytest.raises(InputError, match="another evaluation: prompt_weights True there, False asked for"):
        evaluation.evaluate(resolve_eval(EvalOptions(**options)))
    shutil.rmtree(tmp_path / "eval")
    assert "prompt_weights" not in evaluation.evaluate(resolve_eval(EvalOptions(**options)))
    with pytest.raises(InputError, match="another evaluation: prompt_weights False there, True asked for"):
        evaluation.evaluate(resolve_eval(EvalOptions(**options, prompt_weights=True)))


def test_ranges_of_words_and_of_the_adapter_go_together(narrow_model):
    """Each step reads the words that it has, by the text encoder that it has."""
    from peft import LoraConfig, get_peft_model

    model = narrow_model()
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = replace(model, text_encoder=get_peft_model(model.text_encoder, lora).eval())
    config = replace(config_for(model="tiny"), adapter_steps="0.5-1")
    found = conditionings(Policy(tuned, config), ["a [red:0.25-0.75:1.5] dot"])
    expected = []
    for steps, prompt in ((None, "a dot"), (None, "a (red:1.5) dot"), ("0-1", "a (red:1.5) dot"), ("0-1", "a dot")):
        policy = Policy(tuned, replace(config, adapter_steps=steps))
        if steps is None:
            with policy.base():
                expected.append(conditionings(policy, [prompt])[0])
        else:
            expected.append(conditionings(policy, [prompt])[0])
    for text, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(text.prompt_embeds, wanted.prompt_embeds)
        torch.testing.assert_close(text.null_embeds, wanted.null_embeds)
    assert len({id(text) for text in found}) == 4
