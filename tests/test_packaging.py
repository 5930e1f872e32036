"""What is shipped: texforce as an installed package, the same from the checkout, a wheel and an sdist."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jedi
import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for path in ROOT.glob("*.py") if path.name != "hatch_build.py"]
SOURCES = {
    **{f"texforce/{path.name}": path for path in FILES},
    **{
        f"texforce/{path.relative_to(ROOT)}": path
        for folder in ("prompts", "tiny", "tiny-flow")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    },
    **{f"texforce/{name}": ROOT / name for name in ("report.html", "py.typed")},
}
SOURCES["texforce/__init__.py"] = SOURCES.pop("texforce/texforce.py")


def build(target: str, folder: Path, root: Path = ROOT) -> Path:
    """Build a distribution of the sources in root; the file that came out."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


def copy_checkout(folder: Path) -> Path:
    """The files that are shipped, and what builds them, in a folder of their own."""
    for name in ("LICENSE", "README.md", "hatch_build.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for path in SOURCES.values():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder with nothing but the wheel in it."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    return folder


def run_installed(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the installed wheel, the dependencies in reach and the checkout not."""
    others = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *others]), "COLUMNS": "200"}
    # -S: no .pth file of an editable install may bring the checkout back.
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_module_prompt_set_and_weight_file_unchanged(wheel):
    shipped = {name: data for name, data in contents(wheel).items() if name.startswith("texforce/")}
    assert sorted(shipped) == sorted(SOURCES)
    assert [name for name, path in SOURCES.items() if path.read_bytes() != shipped[name]] == []


def test_the_expected_sources_are_not_empty():
    assert {"texforce/__init__.py", "texforce/cli.py", "texforce/prompts/composition.txt"} <= set(SOURCES)
    assert any(name.startswith("texforce/tiny/") and name.endswith(".safetensors") for name in SOURCES)


def test_nothing_but_texforce_and_its_metadata_lands_in_site_packages(wheel):
    (metadata,) = {name.split("/")[0] for name in contents(wheel)} - {"texforce"}
    assert metadata.startswith("texforce-")
    assert metadata.endswith(".dist-info")


def test_every_installed_module_imports_outside_the_checkout(site):
    names = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("hatch_build", "texforce"))
    code = f"""
import importlib, sys
import texforce
for name in {names}:
    sys.modules.pop("texforce." + name, None)  # an import of a lazily loaded module may swallow its error
    print(importlib.import_module("texforce." + name).__file__)
"""
    done = run_installed(site, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(site / "texforce" / f"{name}.py") for name in names]


@pytest.mark.parametrize("command", [("-m", "texforce.cli"), ("bin/texforce",)], ids=["module", "console script"])
def test_the_installed_command_shows_its_help_outside_the_checkout(site, command):
    arguments = [str(site / word) if word.startswith("bin/") else word for word in command]
    done = run_installed(site, *arguments, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "train" in done.stdout


@pytest.mark.slow
def test_an_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build("sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    assert contents(build("wheel", tmp_path / "wheel", root)) == contents(wheel)


@pytest.mark.slow
def test_a_stray_file_in_the_checkout_does_not_land_in_the_wheel(wheel, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (copy_checkout(checkout) / "mine.py").write_text("def brightness(images, prompts): ...\n")
    assert sorted(contents(build("wheel", tmp_path / "wheel", checkout))) == sorted(contents(wheel))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an editable install of a checkout puts on the path."""
    folder = tmp_path_factory.mktemp("editable")
    (folder / "checkout").mkdir()
    wheel = build("wheel:editable", folder / "wheel", copy_checkout(folder / "checkout"))
    files = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    (path_file,) = files
    assert path_file.endswith(".pth")
    return Path(files[path_file].decode().strip())


def run_in(folder: Path, code: str, path: Path) -> list[str]:
    """The lines that a program prints which is run in a folder, with another one on its path."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_an_editable_install_serves_the_live_files_of_its_checkout(editable, tmp_path):
    code = "import texforce, texforce.rewards; print(*texforce.__path__, texforce.rewards.__file__, sep='\\n')"
    checkout = editable.parent
    assert run_in(tmp_path, code, editable) == [str(checkout), str(checkout / "rewards.py")]


def test_an_editable_install_makes_nothing_but_texforce_importable(editable, tmp_path):
    names = [path.stem for path in FILES if path.stem != "texforce"]
    code = f"import importlib.util; print([name for name in {names} if 'checkout' in str(importlib.util.find_spec(name))])"
    assert run_in(tmp_path, code, editable) == ["[]"]


@pytest.mark.slow
def test_modules_import_from_the_checkout_without_an_install():
    code = "import texforce, texforce.rewards; print(*texforce.__path__, texforce.rewards.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(ROOT), str(ROOT / "rewards.py")]


def test_the_package_run_as_a_program_says_in_one_line_how_to_run_it():
    done = subprocess.run([sys.executable, ROOT / "texforce.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "texforce train" in line


RIGHT = 'texforce.sample(prompt="a", adapter=["out"], sampler="ddim", compare=True, progress=False).images[0].seed + 1'
PROGRAMS = {
    RIGHT: "",
    "texforce.train(reward='hps', num_epochs=3, resume='out').change['hps'] + 0.5": "",
    "texforce.train(preset='papre')": "arg-type", "texforce.train(lr=1e-4)": "call-arg",
    "texforce.sample(prompt='a', systems=())": "call-arg", "texforce.merge(format='koyha')": "arg-type",
    "texforce.evaluate(benchmark='world', adapter='out').measured[0].change + 1": "operator",
}  # fmt: skip


def test_a_type_checker_knows_the_options_of_each_function_and_its_result(site, tmp_path):
    (tmp_path / "program.py").write_text("\n".join(["import texforce", *PROGRAMS]))
    options = ["--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "program.py"],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    found = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error: " in line}
    for row, (program, kind) in enumerate(PROGRAMS.items(), start=2):
        assert (f"[{kind}]" in found[row]) if kind else row not in found, (program, done.stdout)


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_an_editor_finds_the_definition_of_an_imported_name(where, site, editable, tmp_path):
    """Asked of jedi, in a program that uses the package and in one of its modules."""
    package, path = (editable.parent, editable) if where == "checkout" else (site / "texforce", site)
    (tmp_path / "program.py").write_text("from texforce.rewards import load_reward\n")
    project = jedi.Project(tmp_path, sys_path=[str(path)])
    for source, name, file in (
        (tmp_path / "program.py", "load_reward", "rewards.py"),
        (package / "rewards.py", "RewardError", "errors.py"),
    ):
        lines = source.read_text().splitlines()
        row = next(i for i, line in enumerate(lines) if "import" in line and name in line)
        (found,) = jedi.Script(path=source, project=project).goto(row + 1, lines[row].index(name) + 1, follow_imports=True)
        assert Path(found.module_path).resolve() == package / file
