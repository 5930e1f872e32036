"""docs/texforce.ipynb runs, and shows what it shows when it runs."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def without_numbers(output: dict) -> tuple:
    """What a cell shows, its numbers and the spaces around them aside, and the kinds of its pictures and tables."""
    text = "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])
    text = re.sub(r"[-+]?[\d.]+(e[-+]\d+)?", "#", " ".join(text.split()))
    return re.sub(r"# (s|min|h)\b", "# s", text), sorted(output.get("data", []))  # a slow machine takes minutes


@pytest.mark.slow
def test_the_notebooks_outputs_are_those_of_its_cells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "texforce.ipynb").read_text())
    run = runpy.run_path(str(ROOT / "benchmarks" / "notebook.py"))["run"]
    written = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(written)
    for outputs, found in zip(written, run(notebook), strict=True):
        assert list(map(without_numbers, found)) == list(map(without_numbers, outputs))
