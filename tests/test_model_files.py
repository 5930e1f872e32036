"""What is read of a model before PyTorch is loaded: it is what the loaded model says, or nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from torch import nn

from texforce import model_files, models
from texforce.errors import InputError

from .small_models import PIPELINES, save_family

NAMES = ["tiny", "tiny-flow", "sd", "sdxl", *PIPELINES]


@pytest.fixture(scope="module")
def folders(stable_diffusion, sdxl, tmp_path_factory):
    """Pipelines by name, each made when it is first wanted."""
    root, made = tmp_path_factory.mktemp("families"), {"sd": stable_diffusion, "sdxl": sdxl}
    made |= {"tiny": "tiny", "tiny-flow": "tiny-flow"}

    def folder(name):
        return str(made[name] if name in made else made.setdefault(name, save_family(name, root / name)))

    return folder


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", NAMES)
def test_the_files_say_what_the_loaded_model_says(folders, name):
    facts, model = model_files.find_facts(folders(name)), models.load_model(folders(name))
    assert facts.has_unet == (model.unet is not None)
    assert facts.multiple == models.pixels_per_latent(model.vae) * models.latent_multiple(model)
    largest = getattr(model.denoiser.config, "pos_embed_max_size", None)
    assert facts.largest == (largest * facts.multiple if largest else None)
    assert facts.text_encoders.keys() == model.text_encoders.keys()
    for part, encoder in model.text_encoders.items():
        text, found = model.family.text[part], facts.text_encoders[part]
        inside = re.compile(rf"(?:.*\.)?{text.blocks}\.(\d+)\.(?:.*\.)?(\w+)")
        linear = [inside.fullmatch(name) for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
        assert found.projections == tuple(dict.fromkeys(match[2] for match in linear if match))
        num_blocks = len({match[1] for match in linear if match})
        assert found.num_read == num_blocks - text.num_unread
        assert found.most_skipped == (num_blocks - text.layer if text.layer else None)
        assert found.num_positions == (model.readers[part].num_read if text.is_clip else None)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("file", "content"), [
    ("model_index.json", None), ("model_index.json", "{"), ("unet/config.json", None), ("unet/config.json", "{}"),
    ("vae/config.json", "[]"), ("text_encoder/config.json", '{"model_type": "bert"}'), ("text_encoder/config.json", "{}"),
])  # fmt: skip
def test_of_a_model_with_a_broken_file_nothing_is_known_and_loading_it_says_why(stable_diffusion, tmp_path, file, content):
    folder = Path(shutil.copytree(stable_diffusion, tmp_path / "model"))
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert model_files.find_facts(str(folder)) is None
    with pytest.raises((InputError, FileNotFoundError), match=rf"model: |{file}: "):
        models.load_model(str(folder))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "nowhere", "tests/test_model_files.py"])
def test_of_a_model_that_is_not_here_nothing_is_known_and_nothing_is_asked_of_the_hub(name):
    assert model_files.find_facts(name) is None


def test_a_model_in_the_hubs_cache_is_known(stable_diffusion, tmp_path, monkeypatch):
    def cached(repository, file):
        assert repository == "someone/model"
        return str(stable_diffusion / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert model_files.find_facts("someone/model") == model_files.find_facts(str(stable_diffusion))


def test_a_denoiser_of_any_size_has_no_largest_one(stable_diffusion, tmp_path):
    folder = Path(shutil.copytree(stable_diffusion, tmp_path / "model"))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"pos_embed_max_size": None}))
    assert model_files.find_facts(str(folder)).largest is None
