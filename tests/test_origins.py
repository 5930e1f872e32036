"""Where options come from: files of others run no code, messages name option and file, and passwords stay out of files."""

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import pytest

from texforce import cli, models, rewards, run, training
from texforce.config import ALGORITHM_OPTIONS, TrainOptions, resolve
from texforce.errors import InputError, RewardError
from texforce.reward_specs import password_of, without_passwords

from .commands import check_failure, flags, invoke

# --- code of others ---


@pytest.fixture
def foreign(small_run, tmp_path) -> tuple[Path, Path]:
    """The run folder of somebody else, whose reward is code, and the file that this code makes."""
    folder, created = tmp_path / "theirs", tmp_path / "created"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(created)!r}, 'w')\nraise SystemExit('it ran')\ndef f(): ...\n")
    config = resolve(TrainOptions(**small_run | {"reward": f"{folder / 'evil.py'}:f", "output_dir": str(folder)}))
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder, created


def change(folder: Path, **options: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def arguments(folder: Path, how: str) -> list[object]:
    if how == "--resume":
        return ["train", "--resume", folder]
    return ["train", "--config", folder / "config.json", "--output-dir", folder.parent / "out"]


@pytest.mark.quick(4)
@pytest.mark.parametrize("how", ["--resume", "--config"])
@pytest.mark.parametrize("field", ["reward", "also in a mixture", "also eval_reward", "also relabel"])
def test_code_that_a_file_of_others_names_is_asked_for_and_not_run(foreign, how, field):
    folder, created = foreign
    spec = f"{folder / 'evil.py'}:f"
    if field == "also in a mixture":
        change(folder, reward=f"jpeg=1,{spec}=0.5")
    elif field == "also eval_reward":
        change(folder, reward="jpeg", eval_reward=["incompress", spec])
    elif field == "also relabel":
        change(folder, reward="jpeg", algorithm="matching", relabel=spec)
    check_failure(invoke(*arguments(folder, how)), 2, "evil.py", "--trust-reward-code")
    assert not created.exists()
    check_failure(invoke(*arguments(folder, how), "--trust-reward-code"), 2, "evil.py", "could not be imported", "it ran")
    assert created.exists()  # as it was asked for


@pytest.mark.parametrize("how", ["--resume", "--config"])
def test_code_that_the_command_line_names_needs_no_more_words(foreign, how):
    folder, created = foreign
    check_failure(invoke(*arguments(folder, how), "--reward", f"{folder / 'evil.py'}:f"), 2, "it ran")
    assert created.exists()


@pytest.mark.parametrize("given", [[], ["--reward"], ["--trust-reward-code"]], ids=["file", "also option", "also trusted"])
def test_a_dry_run_executes_nothing(foreign, given):
    folder, created = foreign
    extra = ["--reward", f"{folder / 'evil.py'}:f"] if given == ["--reward"] else given
    for how in ("--resume", "--config"):
        result = invoke(*arguments(folder, how), *extra, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "images in all" in result.stdout
    assert not created.exists()


def test_code_is_not_run_to_see_whether_it_has_changed(foreign):
    folder, created = foreign
    spec = f"{folder / 'evil.py'}:f"
    assert rewards.locate(spec, {})[spec]["name"] == "evil.py"
    assert not created.exists()


def test_the_hint_to_resume_says_that_the_reward_is_code(small_run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")

    def fail(*_):
        raise RewardError("reward: gone")

    monkeypatch.setattr(training, "train_epoch", fail)
    spec = f"{tmp_path / 'mine.py'}:f"
    common = {name: value for name, value in small_run.items() if ALGORITHM_OPTIONS.get(name) != "ppo"}
    relabelling = common | {"algorithm": "matching", "relabel": spec}
    runs = (small_run | {"reward": spec}, True), (small_run, False), (relabelling, True)
    for number, (options, hinted) in enumerate(runs):
        result = invoke("train", *flags(options | {"output_dir": tmp_path / str(number)}))
        hint = f"resume with: texforce train --resume {tmp_path / str(number)}" + " --trust-reward-code" * hinted
        assert hint in result.stderr.splitlines()


# --- passwords ---

SECRET = "s3cr,t=p@ss/w:rd"  # noqa: S105
ENCODED = quote(SECRET, safe="")


@pytest.fixture
def locked_server() -> Iterator[tuple[str, str]]:
    """A scorer for the user `me` with the password: its place, and the URL with the password."""
    expected = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.headers.get("Authorization") == expected
            self.send_response(200 if known else 401)
            self.end_headers()
            scores = [float(len(image)) for image in request["images"]]
            self.wfile.write(json.dumps({"scores": scores} if known else {"error": "who are you"}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}/score"
        yield f"http://me@{place}", f"http://me:{ENCODED}@{place}"
        server.shutdown()


def check_secret(result, *folders: Path) -> None:
    """The password stands neither in what a command said nor in a file."""
    for secret in (SECRET, ENCODED):
        assert secret not in result.output
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            assert secret.encode() not in path.read_bytes(), path


@pytest.mark.quick(1)
@pytest.mark.parametrize("reward", [pytest.param("{}", marks=pytest.mark.slow), "also jpeg=0.1,{}=1"])
def test_a_password_in_a_rewards_url_opens_the_server_and_is_written_nowhere(
    reward, locked_server, small_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_text(reward))
    monkeypatch.setattr("texforce.reward_specs._passwords", {})
    (public, url), reward = locked_server, reward.removeprefix("also ")
    options = small_run | {"num_inference_steps": 2, "output_dir": tmp_path / "out", "eval_reward": "incompress"}
    result = invoke("train", *flags(options | {"reward": reward.format(url)}))
    assert result.exit_code == 0, result.output
    check_secret(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reward"] == reward.format(public)
    assert public in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "result.json").unlink()
    monkeypatch.setattr("texforce.reward_specs._passwords", {})  # as in another process
    again = ["train", "--resume", tmp_path / "out", "--num-epochs", 2, "--force-resume"]
    check_failure(invoke(*again), 6, "status 401", "a password is never saved")
    result = invoke(*again, "--reward", reward.format(url))
    assert result.exit_code == 0, result.output
    check_secret(result, tmp_path / "out")


def test_also_an_evaluation_and_a_refusal_keep_a_password_to_themselves(locked_server, tmp_path):
    public, url = locked_server
    options = ["--model", "tiny", "--limit", 1, "--num-images", 1, "--num-inference-steps", 1]
    result = invoke("eval", *options, "--reward", url, "--output-dir", tmp_path / "eval")
    assert result.exit_code == 0, result.output
    assert public in json.loads((tmp_path / "eval" / "results.json").read_text())["rewards"]
    check_secret(result, tmp_path / "eval")
    for bad in (
        f"http://me:{SECRET}@host/score", f"http://me:{ENCODED}@host:x/score", f"http://me:{ENCODED}@host/s=a,b",
        "http://me:12#s3cr@host/score", "http://me@corp.com:s3cr/t@host/score",
    ):  # fmt: skip
        result = invoke("train", "--model", "tiny", "--reward", bad, "--output-dir", tmp_path / "out")
        check_failure(result, 2, "reward")
        assert "s3cr" not in result.output


@pytest.mark.parametrize("user", ["me", "also me@corp.com", "also me%40corp.com"])
def test_a_password_is_taken_out_whatever_the_user_is_called(user):
    user = user.removeprefix("also ")
    assert without_passwords(f"http://{user}:s3cr@host:80/score") == f"http://{user}@host:80/score"
    assert password_of(f"{user}@host:80") == "s3cr"


# --- what a message calls options and files ---


@pytest.mark.parametrize(("message", "expected"), [
    ("num_epochs: must be a whole number", "--num-epochs: must be a whole number"),
    ("null_prompt: base needs target text-encoder", "--null-prompt: base needs target text-encoder"),
    ("backprop_steps: must be at most num_inference_steps, 8", "--backprop-steps: must be at most --num-inference-steps, 8"),
    ("resume: changed: rank: 4 -> 8; lora_alpha: 4 -> 8", "--resume: changed: --rank: 4 -> 8; --lora-alpha: 4 -> 8"),
    ("sampler, eta: euler has an eta of 0", "--sampler, --eta: euler has an eta of 0"),
    ("adapter_steps, timestep_window: none", "--adapter-steps, --timestep-window: none"),
    ("prompts: there is no file 'lora_alpha'", "--prompts: there is no file 'lora_alpha'"),
    ("model: no folder '/a/output_dir/b.num_epochs'", "--model: no folder '/a/output_dir/b.num_epochs'"),
    ("/a/config.json: num_epochs: must be a whole number", "/a/config.json: num_epochs: must be a whole number"),
    ("the loss of reward is not finite", "the loss of reward is not finite"),
])  # fmt: skip
def test_a_message_calls_an_option_as_one_types_it_and_a_files_field_as_it_stands_there(message, expected):
    assert cli.as_typed(message) == expected


@pytest.mark.parametrize("content", [
    {"num_epochs": "three"}, {"epochs": 3}, pytest.param({"num_epochs": 10**400}, id="also"),
    pytest.param({"learning_rate": 10**400}, id="also a number"),
])  # fmt: skip
def test_a_field_of_a_config_file_is_named_with_its_file(tmp_path, content):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    result = invoke("train", "--model", "tiny", "--config", tmp_path / "mine.json", "--output-dir", tmp_path / "out")
    check_failure(result, 2, f"{tmp_path / 'mine.json'}: ", *content)
    assert len(result.stderr) < 500


@pytest.fixture
def adapter_of(tmp_path):
    """A function that makes the folder of an adapter, whose run had some settings."""

    def make(**settings: object) -> Path:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, '
                                                                  '"target_modules": ["q_proj"]}')  # fmt: skip
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        (tmp_path / "adapter" / "config.json").write_text(json.dumps(settings))
        return tmp_path / "adapter"

    return make


def use(command: str, adapter: Path, *more: object) -> list[object]:
    """A command with an adapter."""
    output = ["--output-dir", adapter.parent / "new"]
    needed = {"sample": ["--prompt", "a red circle"], "eval": ["--benchmark", "colour", "--reward", "jpeg"], "merge": []}
    return [command, "--adapter", adapter, *needed[command], *output, *more]


@pytest.mark.parametrize("command", ["sample", "merge", "eval"])
@pytest.mark.parametrize(("model", "words"), [
    ("./gone", "there is no folder './gone'"),
    pytest.param("nobody/no-such-model", "could not be loaded", id="also a name on the hub"),
])  # fmt: skip
def test_a_model_that_an_adapters_config_names_is_said_to_come_from_there(adapter_of, command, model, words):
    adapter = adapter_of(model=model)
    origin = f"(it comes from {adapter / 'config.json'}; --model overrides it)"
    check_failure(invoke(*use(command, adapter)), 2, words, origin)
    result = invoke(*use(command, adapter, "--model", "./typed"))
    check_failure(result, 2, "there is no folder './typed'")
    assert "comes from" not in result.stderr


@pytest.mark.parametrize(("settings", "words"), [
    pytest.param({"resolution": 33}, "(it comes from", id="also a size that the model has not"),
    pytest.param({"num_inference_steps": 4000}, "(it comes from", id="also more steps than the model has"),
    pytest.param({"sampler": "dpm-solver", "eta": 1.0}, "(it comes from", id="also randomness that the sampler has not"),
    ({"resolution": 10**400}, "config.json: resolution: must be a whole number"),
    pytest.param({"num_inference_steps": 10**400}, "config.json: num_inference_steps: must be", id="also"),
    pytest.param({"guidance_scale": 10**400}, "config.json: guidance_scale: must be", id="also a number"),
])  # fmt: skip
def test_a_setting_of_an_adapters_config_that_cannot_be_used_is_said_to_come_from_there(
    adapter_of, narrow_model, monkeypatch, settings, words
):
    model = narrow_model()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: model)
    monkeypatch.setattr("texforce.adapters.put_on", lambda model, system: model)
    result = invoke(*use("sample", adapter_of(model="tiny", **settings)))
    check_failure(result, 2, "config.json", words)
    assert len(result.stderr) < 500


def test_a_name_of_an_option_in_python_is_the_field():
    with pytest.raises(InputError, match=r"^num_epochs: must be"):
        TrainOptions(num_epochs=0)
    assert not [name for name in cli.OPTION_NAMES if not re.fullmatch("[a-z0-9_]+", name)]
