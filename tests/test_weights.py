"""Weights of scorers: what is refused, what runs nothing, and where the hub's lie."""

import contextlib
import fnmatch
import hashlib
import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from texforce import hub, reward_specs, rewards, scorers, weights
from texforce.errors import ArtifactError, NotFoundError

from .hostile import hostile_objects, recorded


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def save(path, content) -> None:
    torch.save(content, path)


def load(model, path) -> None:
    weights.fill(model, weights.read_tensors(path), path)


def test_a_checkpoint_fills_the_model(small_model, tmp_path):
    path = tmp_path / "c.pt"
    save(path, {"state_dict": {"weight": torch.ones(2, 3), "bias": torch.arange(2.0)}, "epoch": 3})
    model = torch.nn.Linear(3, 2)
    load(model, path)
    assert model.weight.eq(1).all()
    assert model.bias.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("checkpoint", ["absent.pt", "."])
def test_a_missing_checkpoint_is_named_before_a_billion_parameters_are_built(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(scorers, "build_clip", lambda config: pytest.fail("built the model first"))
    with pytest.raises(FileNotFoundError, match="reward_checkpoint: there is no checkpoint .*" + re.escape(tmp_path.name)):
        rewards.load_reward("hps", checkpoints={"hps": tmp_path / checkpoint})


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
    {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}},
    *({"state_dict": content} for content in (None, [1], {1: torch.ones(2)}, {"weight": 1, "bias": 2})),
    *([1, 2], None, "text", torch.ones(3)),
], ids=["key", "none in it", "list in it", "integer keys", "integers in it", "list", "none", "text", "tensor"])  # fmt: skip
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


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_checkpoint_is_refused_or_loads_whatever_byte_it_is(small_model, tmp_path, zipped):
    path, rng = tmp_path / "c.pt", random.Random(0)
    torch.save({"state_dict": small_model.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load(torch.nn.Linear(3, 2), path)
        except ArtifactError:
            refused += 1
    assert refused > 15


# --- files that run code ---


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("where", ["instead of the checkpoint", "beside the tensors", "bare pickle"])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(small_model, tmp_path, monkeypatch, where, number):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not open the door
    hostile, path = hostile_objects(tmp_path)[number], tmp_path / "c.pt"
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        state_dict = small_model.state_dict()
        save(path, hostile if where.startswith("instead") else {"state_dict": state_dict, "extra": hostile})
    with recorded() as events, pytest.raises(ArtifactError, match=r"c\.pt: refused"):
        load(small_model, path)
    assert events == []
    assert not (tmp_path / "created").exists()
    with recorded() as events, contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)  # where one lets it, it does harm
    assert events


@pytest.mark.parametrize("name", ["hps", "hps-v2", "imagereward", "aesthetic", "clip", "pickscore"])
def test_a_hostile_checkpoint_of_any_scorer_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content, folder = {"state_dict": {}, "extra": hostile_objects(tmp_path)[1]}, tmp_path / "folder"
    folder.mkdir()
    save(folder / "pytorch_model.bin", content)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    paths = dict.fromkeys(reward_specs.CATALOGUE[name].weights, folder)
    if isinstance(hub.HUB[name], hub.HubFile):
        paths[name] = folder / "pytorch_model.bin"
    with recorded() as events, pytest.raises(ArtifactError, match=r"refused as a scorer's checkpoint"):
        rewards.load_reward(name, checkpoints=paths)
    assert events == []
    assert not (tmp_path / "created").exists()


# --- what is read ---


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A pickle of tensors that share memory and have other strides."""
    pool = torch.arange(12.0)
    save(tmp_path / "c.pt", {"state_dict": {"a": pool[:6].reshape(2, 3), "b": pool[3:].reshape(3, 3).T}})
    return tmp_path / "c.pt"


def check_content(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["b"].tolist() == [[3, 6, 9], [4, 7, 10], [5, 8, 11]]


def test_a_file_of_the_hubs_cache_must_have_the_sha256_of_its_name(checkpoint, tmp_path):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, blob in ((good, digest), (bad, "0" * 64)):
        folder.mkdir()
        shutil.copy(checkpoint, folder / blob)
        (folder / "HPS.pt").symlink_to(folder / blob)
    check_content(weights.read_tensors(good / "HPS.pt"))
    with pytest.raises(ArtifactError, match=rf"HPS\.pt: refused.*SHA-256 is {digest}; delete it"):
        weights.read_tensors(bad / "HPS.pt")


def test_a_pickle_leaves_no_copy(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_content(weights.read_tensors(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_safetensors_are_read_as_they_are(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "c.safetensors")
    assert weights.read_tensors(tmp_path / "c.safetensors")["a"].tolist() == [1, 1]
    (tmp_path / "c.safetensors").write_bytes(b"\x08" + b"\0" * 20)
    with pytest.raises(ArtifactError, match=r"c\.safetensors: refused"):
        weights.read_tensors(tmp_path / "c.safetensors")


# --- the hub ---


@pytest.fixture
def stub_hub(monkeypatch, tmp_path):
    """A hub that notes what it is asked for; its repositories hold what `stub_hub.files` says."""
    asked = []

    class Hub:
        files = ("config.json",)
        calls = asked

    def download(repository, name, revision):
        asked.append((repository, revision, name))
        return str(tmp_path / name)

    def snapshot(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        for name in Hub.files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return Hub


def test_every_weight_is_fetched_at_a_pinned_revision(stub_hub):
    for name, source in hub.HUB.items():
        stub_hub.calls.clear()
        hub.find_weights(name, {})
        for repository, revision, _ in stub_hub.calls:
            assert repository == source.repository
            assert re.fullmatch("[0-9a-f]{40}", revision)


def test_each_version_of_hps_is_its_published_file(stub_hub):
    names = [hub.find_weights(name, {}).name for name in ("hps", "hps-v2")]
    assert names == ["HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt"]


@pytest.mark.parametrize(("files", "num_calls"), [
    (("config.json", "model.safetensors", "pytorch_model.bin"), 1),
    (("config.json", "pytorch_model.bin"), 2),
])  # fmt: skip
def test_a_models_pickle_is_fetched_only_where_there_are_no_safetensors(stub_hub, tmp_path, files, num_calls):
    stub_hub.files = files
    hub.find_weights("pickscore", {})
    assert len(stub_hub.calls) == num_calls
    assert (tmp_path / "pytorch_model.bin").exists() == (num_calls == 2)


def test_a_tokenizer_is_fetched_without_the_model(stub_hub, tmp_path):
    stub_hub.files = ("config.json", "vocab.txt", "tokenizer.json", "model.safetensors", "pytorch_model.bin")
    hub.find_weights("imagereward-tokenizer", {})
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.txt", "tokenizer.json"}


@pytest.mark.parametrize("name", hub.HUB)
def test_what_the_hub_does_not_give_is_named_with_the_option_that_helps(name):
    with pytest.raises(FileNotFoundError, match=rf"{hub.HUB[name].repository} .*--reward-checkpoint {name}=PATH"):
        hub.find_weights(name, {})
    assert not hub.is_fetched(name)


@pytest.mark.parametrize("error", [TimeoutError("read timed out"), RuntimeError("proxy"), ValueError("odd answer")])
def test_whatever_goes_wrong_on_the_way_to_the_hub_is_named(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=rf"could not be downloaded from the hub; give it .*{error.args[0]}"):
        hub.find_weights("hps", {})


def test_a_full_disk_is_not_the_hubs_fault(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        hub.find_weights("hps", {})
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(("name", "cached", "there"), [
    ("hps", {"HPS_v2.1_compressed.pt"}, True),
    ("hps", {"HPS_v2_compressed.pt"}, False),
    ("clip", {"config.json", "tokenizer.json", "vocab.json"}, False),
    ("clip", {"config.json", "pytorch_model.bin"}, True),
    ("pickscore", {"model.safetensors.index.json"}, True),
    ("imagereward-tokenizer", {"config.json"}, False),
    ("imagereward-tokenizer", {"vocab.txt"}, True),
])  # fmt: skip
def test_what_is_here_is_seen_without_asking(monkeypatch, name, cached, there):
    def look(repository, file, revision):
        assert (repository, revision) == (hub.HUB[name].repository, hub.HUB[name].revision)
        return f"/cache/{file}" if file in cached else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look)
    assert hub.is_fetched(name) == there


@pytest.mark.parametrize(("name", "kind"), [("hps", "a file"), ("clip", "a folder")])
def test_a_path_of_the_wrong_kind_is_named(tmp_path, name, kind):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint .*{tmp_path.name}.* for {name} it must be {kind}"):
        hub.find_weights(name, {name: tmp_path if kind == "a file" else tmp_path / "file"})


# --- models in transformers' format ---


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return small_clip(tmp_path_factory.mktemp("clip"))


def small_clip(folder: Path) -> Path:
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_a_whole_folder_loads(clip_folder, tmp_path, pickled):
    if pickled:
        shutil.copy(clip_folder / "config.json", tmp_path)
        torch.save(load_file(clip_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    state = weights.load_pretrained(CLIPModel, tmp_path if pickled else clip_folder).state_dict()
    for name, tensor in load_file(clip_folder / "model.safetensors").items():
        assert torch.equal(state[name], tensor)


def test_a_configuration_of_fewer_layers_than_the_weights_is_refused(clip_folder, tmp_path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"tensors are missing, foreign"):
        weights.load_pretrained(CLIPModel, folder)


@pytest.mark.parametrize("flaw", ["lacks a tensor", "has a tensor more", "another shape", "cut short", "broken config"])
def test_a_folder_with_a_flaw_is_refused_and_not_filled_at_random(clip_folder, tmp_path, flaw):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    name = next(name for name in tensors if "out_proj.weight" in name)
    if flaw == "lacks a tensor":
        save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    elif flaw == "has a tensor more":
        save_file(tensors | {"more.weight": torch.zeros(4)}, file, {"format": "pt"})
    elif flaw == "another shape":
        save_file(tensors | {name: torch.zeros(4, 4)}, file, {"format": "pt"})
    elif flaw == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        config.write_text("{")
    with pytest.raises(ArtifactError, match=r"clip.*: refused as a scorer's checkpoint"):
        weights.load_pretrained(CLIPModel, folder)


def test_a_folder_without_weights_or_configuration_is_named(clip_folder, tmp_path):
    with pytest.raises(NotFoundError, match=rf"no config\.json in '{re.escape(str(tmp_path))}'"):
        weights.load_pretrained(CLIPModel, tmp_path)
    shutil.copy(clip_folder / "config.json", tmp_path)
    with pytest.raises(NotFoundError, match=rf"'{re.escape(str(tmp_path))}' holds neither model\.safetensors nor pytorch_"):
        weights.load_pretrained(CLIPModel, tmp_path)


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ArtifactError, match=rf"{name}: refused.*git-lfs pointer.*git lfs pull"):
        weights.read_tensors(tmp_path / name)
