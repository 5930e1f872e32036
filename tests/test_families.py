"""The newer families: what is drawn, encoded, trained and merged equals what diffusers' own pipelines do."""

import pytest
import torch


from texforce import Policy, families, models
from texforce.config import SampleOptions, resolve_sample

from . import small_models

PROMPTS = ["two red circle", "a Blue square and a red circle"]
FAMILIES = tuple(small_models.PIPELINES)
GUIDED = tuple(name for name in FAMILIES if name != "flux")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Pipelines by name, each made when it is first wanted."""
    root = tmp_path_factory.mktemp("families")

    def folder(name):
        return root / name if (root / name).is_dir() else small_models.save_family(name, root / name)

    return folder


def plain_pipeline(folder, scheduler=None):
    """diffusers' own, as anybody loads it."""
    import diffusers

    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    if scheduler is not None:
        pipeline.scheduler = scheduler(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_scheduler(name):
    """What our default sampler is in diffusers; None where it is the pipeline's own."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if name.startswith("pixart"):
        return lambda own: DDIMScheduler.from_config(own.config, clip_sample=False, set_alpha_to_one=False)
    return (lambda own: FlowMatchEulerDiscreteScheduler(shift=3.0)) if name == "sana" else None


def drawing(folder, **options):
    config = resolve_sample(
        SampleOptions(model=str(folder), prompt=PROMPTS, resolution=options.pop("resolution"), **options)
    )
    return Policy(models.load_model(str(folder)), config)


def resolution_of(name):
    return {"sd3": 16, "sd3-without-t5": 16, "flux": 16, "sana": 32}.get(name, 64)


def plain_images(pipeline, name, **options):
    size = resolution_of(name)
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    options |= {} if name.startswith(("sd3", "flux")) else {"use_resolution_binning": False}
    if name.startswith("pixart"):
        options["clean_caption"] = False
    return pipeline(PROMPTS, height=size, width=size, generator=generator, output_type="pt", **options).images


def our_images(folder, name, **options):
    policy = drawing(folder, resolution=resolution_of(name), **options)
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return policy.draw(models.tokenize_for(policy.model, PROMPTS), generator)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_images_equal_those_of_the_plain_pipeline(folders, name, guidance):
    options = {"num_inference_steps": 4, "guidance_scale": guidance}
    ours = our_images(folders(name), name, eta=0.0, **options)
    plain = plain_images(plain_pipeline(folders(name), plain_scheduler(name)), name, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GUIDED)
def test_a_negative_prompt_leads_away_as_in_the_plain_pipeline(folders, name):
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    ours = our_images(folders(name), name, eta=0.0, negative_prompt="Blurry", **options)
    pipeline = plain_pipeline(folders(name), plain_scheduler(name))
    plain = plain_images(pipeline, name, negative_prompt=["Blurry"] * 2, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    assert (ours - our_images(folders(name), name, eta=0.0, **options)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd3", "pixart-alpha", "pixart-sigma", "sana"])
def test_dpm_solver_draws_what_the_plain_pipeline_draws_with_it(folders, name):
    from diffusers import DPMSolverMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = (lambda own: DPMSolverMultistepScheduler(**flow)) if name == "sd3" else None
    options = {"num_inference_steps": 5, "guidance_scale": 4.0}
    ours = our_images(folders(name), name, sampler="dpm-solver", **options)
    plain = plain_images(plain_pipeline(folders(name), scheduler), name, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_equal_encode_prompts(folders, name):
    model = models.load_model(str(folders(name)))
    pipeline = plain_pipeline(folders(name))
    text = model.packing.unpack(models.encode(model, models.tokenize_for(model, PROMPTS)))
    with torch.no_grad():
        if name.startswith("sd3"):
            embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
            expected = families.Text(embeds, pooled)
        elif name == "flux":
            embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, None)
            expected = families.Text(embeds, pooled)
        else:
            instruction = {"complex_human_instruction": families.sana_instruction().split("\n")} if name == "sana" else {}
            embeds, mask, _, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, **instruction)
            expected = families.Text(embeds, mask=mask)
    for ours, theirs in ((text.embeds, expected.embeds), (text.pooled, expected.pooled), (text.mask, expected.mask)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5)
