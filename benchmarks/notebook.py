"""Run docs/texforce.ipynb cell by cell, in a process without Jupyter, and write what each cell shows into the file.

`python benchmarks/notebook.py` from an empty folder leaves there what the notebook writes.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "texforce.ipynb"
IMAGE, HTML = ("image/png", "_repr_png_"), ("text/html", "_repr_html_")


def run(notebook: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Run a notebook's code cells in one namespace; the outputs of each, in the notebook's format."""
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stderr(io.StringIO()) as said:
                value = execute("".join(cell["source"]), names)
            streams = (
                [{"output_type": "stream", "name": "stderr", "text": lines(said.getvalue())}] if said.getvalue() else []
            )
            yield streams + ([] if value is None else [shown(value)])


def execute(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression."""
    *before, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        before, last = [*before, last], ast.Expr(ast.Constant(None))
    exec(compile(ast.Module(before, []), "cell", "exec"), names)  # noqa: S102
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307


def shown(value: Any) -> dict[str, Any]:
    """A value as notebooks show it: as a picture, a table or text."""
    data: dict[str, Any] = {"text/plain": lines(repr(value))}
    if method := getattr(value, IMAGE[1], None):
        data[IMAGE[0]] = base64.b64encode(method()).decode()
    elif method := getattr(value, HTML[1], None):
        data[HTML[0]] = lines(method())
    return {"output_type": "display_data", "data": data, "metadata": {}}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    notebook = json.loads(NOTEBOOK.read_text())
    outputs = list(run(notebook))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, found) in enumerate(zip(cells, outputs, strict=True), start=1):
        cell |= {"execution_count": number, "outputs": found}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
