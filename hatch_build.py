"""Lays the flat checkout out as the package `texforce`: in a wheel, and for an editable install."""

import shutil
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What is shipped; another file that lies in the checkout is not.
MODULES = (
    "adapters", "api", "cli", "config", "detector", "draw_config", "errors", "eval_checks", "evaluation", "experience",
    "families", "files", "flags", "heldout", "hub", "interrupts", "ldm", "learner", "lora_files", "measures", "merging",
    "model_files", "models", "options", "plan", "presets", "processes", "prompt_sets", "report", "reward_specs", "rewards",
    "run", "sampler", "scorers", "server", "single_file", "stages", "texforce", "tokenization", "training", "views",
    "weights", "world",
)  # fmt: skip
DATA = ("prompts", "tiny", "tiny-flow", "report.html", "py.typed")
EDITABLE = ".editable"  # on the path of an editable install, so that `texforce` is importable and nothing else


class FlatLayout(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root, modules = Path(self.root), [f"{name}.py" for name in MODULES]
        places = {name: f"texforce/{'__init__.py' if name == 'texforce.py' else name}" for name in (*modules, *DATA)}
        if version != "editable":
            build_data["force_include"] |= {str(root / name): place for name, place in places.items()}
            return
        shutil.rmtree(root / EDITABLE, ignore_errors=True)
        (root / EDITABLE / "texforce").mkdir(parents=True)
        for name in (*modules, "py.typed"):  # editors follow the links; Python goes by texforce.__path__
            (root / EDITABLE / places[name]).symlink_to(root / name)
