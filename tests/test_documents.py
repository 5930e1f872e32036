"""The documents: links that lead somewhere, commands that can be typed, and what README says of the files."""

import ast
import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from texforce.cli import app
from texforce.config import TrainConfig, TrainOptions, check_algorithm_options, resolve
from texforce.options import option_fields

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "EXPERIMENTS.md", "CHANGELOG.md", "benchmarks/RESULTS.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- links ---


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {f"{name}-{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)}


def links(page: Path) -> list[str]:
    """The targets of a page's relative links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_leads_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c: d's\n## x-y_z (negative)\n## Twice\n## Twice\n```sh\n# no heading\n```\n")
    assert anchors(page) == {"a-b-c-ds", "x-y_z-negative", "twice", "twice-1"}


def test_every_page_of_the_documents_can_be_reached_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked


# --- commands ---


def commands(page: Path) -> list[str]:
    """The texforce commands of a page: lines of its shell blocks, and code within a line that gives a command something."""
    text = page.read_text()
    lines = [
        line for kind, block in FENCED.findall(text) if kind == "sh" for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`((?:texforce|torchrun|accelerate launch) [^`]+ [^`]+)`", FENCED.sub("", text))
    spaced = (" ".join(line.split()) for line in lines)
    return [found[1] for line in spaced if (found := re.search(r"\btexforce(?:\.cli)? ([a-z].*)", line))]


@functools.cache
def command_line() -> Any:
    return typer.main.get_command(app)


def parse(command: str) -> dict[str, Any]:
    """The options that a command gives, up to a comment or a `&`; none where it asks for help."""
    name, *arguments = shlex.split(command.removesuffix("&"), comments=True)
    try:
        values = command_line().commands[name].make_context(name, arguments).params
    except typer.Exit:
        return {}
    return {option: value for option, value in values.items() if value not in (None, (), False)}


GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_command_of_the_guides_can_be_typed(page, tmp_path, monkeypatch):
    """Its options exist, and those of a training fit each other, as far as the folder of an earlier run has no say."""
    monkeypatch.chdir(tmp_path)  # with the reader's own files
    (tmp_path / "FOLDER").mkdir()
    for file, function in re.findall(r"(\w+\.py):(\w+)", page.read_text()):
        (tmp_path / file).write_text(f"def {function}(images, prompts): ...")
    names = {item.name for item in option_fields(TrainConfig)}
    for command in commands(page):
        given = parse(command)
        if command.startswith("train ") and not {"resume", "config", "help_all"} & given.keys():
            check_algorithm_options(
                given, resolve(TrainOptions(**{name: given[name] for name in names & given.keys()})).algorithm
            )


def test_commands_are_found_in_shell_blocks_and_in_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ntexforce train \\\n  --seed 1  # why\n```\nAs `torchrun -m texforce.cli train\n--seed 2` does.\n"
    )
    assert commands(page) == ["train --seed 1 # why", "train --seed 2"]
    assert [parse(command) for command in commands(page)] == [{"seed": 1}, {"seed": 2}]
    assert sum(len(commands(page)) for page in GUIDES) >= 40


# --- README ---


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


def test_continuous_integration_runs_the_readmes_test_command():
    (install, test) = re.search(r"`(pip install -e [^`&]+?) && (pytest)`", README).groups()
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert test in script
    assert any(install.removeprefix("pip install ") in line for line in script)


def files_by_row() -> dict[str, int]:
    """The modules that README's table of files names, by their row."""
    rows = [re.findall(r"`(\w+)\.py`", line) for line in README.splitlines() if re.match(r"\| `\w+\.py`", line)]
    return {name: number for number, row in enumerate(rows) for name in row}


def imported(module: str) -> set[str]:
    """The modules that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "texforce":
            names |= {"texforce" for alias in node.names if alias.name != "__version__"}
    return names - ({"api"} if module == "texforce" else set())  # the package hands out its functions


def test_the_readmes_table_of_files_names_every_module_and_imports_point_to_its_top():
    rows = files_by_row()
    assert set(rows) == {path.stem for path in ROOT.glob("*.py")} - {"hatch_build"}
    assert {(module, name) for module in rows for name in imported(module) if rows.get(name, 0) > rows[module]} == set()
