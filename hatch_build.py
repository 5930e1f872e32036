"""Lays the flat checkout out as the package `texforce` in a wheel."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DATA = ("prompts", "tiny", "report.html")


class FlatLayout(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # dev-mode-dirs serves the live files
            return
        root = Path(self.root)
        modules = [path.name for path in root.glob("*.py") if path.name != Path(__file__).name]
        for name in (*modules, *DATA):
            target = "__init__.py" if name == "texforce.py" else name
            build_data["force_include"][str(root / name)] = f"texforce/{target}"
