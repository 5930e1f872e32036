"""Whether two commits compute the same bytes: `python benchmarks/same_results.py BEFORE [AFTER]`.

Each commit is checked out into a folder of its own, where it trains, samples, evaluates and merges with one thread. All
files that the commands write are compared: of JSON everything but times, versions, paths and the options that only one of
the commits has; of safetensors the tensors and the metadata without its date; of checkpoints the tensors without their
names; of the page report.html its data.
Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--model", "tiny", "--num-epochs", "2", "--num-prompts-per-epoch", "4", "--eval-every", "1", "--seed", "3"),
    *("--micro-batch-size", "16"),
]
MIXTURE = ["--reward", "hps=1,jpeg=0.1", "--normalise-rewards", "--target", "both", "--kl-weight", "0.1"]
PAPER = ["--preset", "paper", "--reward", "jpeg", "--target", "unet", "--num-updates-per-epoch", "2"]
STRENGTHS = ["--strength", "0.5,1", "--reward", "hps,jpeg", "--limit", "6", "--num-images", "1"]
EVAL = ["--adapter", "out", "--unet", "ddpo=unet", "--limit", "8", "--num-images", "2", "--guidance-scale", "3"]
COMMANDS = {
    "train": ["train", *SMALL, "--reward", "hps", "--eval-reward", "jpeg", "--output-dir", "out"],
    "mixture": ["train", *SMALL, *MIXTURE, "--output-dir", "mixture"],
    "paper": ["train", *SMALL, *PAPER, "--output-dir", "unet"],
    "sample": ["sample", "--adapter", "out", "--prompt", "a crimson disc", "--compare", "--output-dir", "samples"],
    "eval": ["eval", *EVAL, "--num-inference-steps", "8", "--null-prompt", "base", "--output-dir", "eval"],
    "strength": ["eval", "--adapter", "out", *STRENGTHS, "--output-dir", "strength"],
    **{
        kind: ["merge", "--adapter", "out:0.8", "--unet", "unet", "--format", kind, "--output-dir", f"merged-{kind}"]
        for kind in ("pipeline", "checkpoint", "peft", "diffusers", "kohya")
    },
}
VOLATILE = {
    "seconds", "images_per_s", "sampling_share", "commit", "versions", "timings", "date", "modelspec.date", "sha256",
    "modelspec.description", "num_prompts_told", "num_prompts_measured",
    "algorithm", "num_noise_levels", "noise_window", "backprop_steps", "null_anchor", "anchor_prompts",  # newer options
}  # fmt: skip
IGNORED = ("manifest.json", "state.json", "speed.jsonl", "curve.png", ".lock", ".holder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, after = (run(commit, Path(folder, side)) for side, commit in vars(options).items())
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in different:
        kind = "differs" if name in before and name in after else "only before" if name in before else "only after"
        print(f"{kind}: {name}")
    print(f"{len(before)} files before, {len(after)} after, {len(different)} different")
    sys.exit(bool(different))


def run(commit: str, folder: Path) -> dict[str, str]:
    """The digest of each file that the commands write at a commit, by the file's name."""
    source, output = folder / "source", folder / "output"
    output.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(source)], check=True)
    subprocess.run(["git", "-C", str(source), "checkout", "--quiet", "--detach", commit], check=True)
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONHASHSEED"] = "0"  # peft writes the elements of a set in their order
    for name, arguments in COMMANDS.items():
        done = subprocess.run(
            [sys.executable, "-m", "texforce.cli", *arguments], cwd=output, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{commit}: {name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        print(f"{commit}: {name} done", file=sys.stderr)
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name not in IGNORED)
    return {str(path.relative_to(output)): digest(path, source) for path in files}


def digest(path: Path, source: Path) -> str:
    """SHA-256 of what a file says, whatever it says of the time and the place."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = dump(json.loads(content))
    elif path.suffix == ".jsonl":
        content = b"\n".join(dump(json.loads(line)) for line in content.splitlines())
    elif path.name == "tensors.safetensors":  # names in checkpoints may change
        content = "".join(sorted(tensor_digests(content))).encode()
    elif path.suffix == ".safetensors":
        header, tensors = content[8 : 8 + int.from_bytes(content[:8], "little")], content[8:]
        content = dump(json.loads(header)) + tensors[len(header) :]
    elif path.name == "report.html":
        content = re.search(rb"<script[^>]*application/json[^>]*>(.*?)</script>", content, re.DOTALL)[1]  # type: ignore[index]
    elif path.suffix in (".md", ".csv"):
        content = re.sub(rb"\d+ s on", b"s on", content)
    return hashlib.sha256(content.replace(str(source).encode(), b"")).hexdigest()


def tensor_digests(content: bytes) -> list[str]:
    """SHA-256 of each tensor's bytes in a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = [value for name, value in json.loads(content[8:start]).items() if name != "__metadata__"]
    spans = [(start + begin, start + end) for begin, end in (tensor["data_offsets"] for tensor in tensors)]
    return [hashlib.sha256(content[begin:end]).hexdigest() for begin, end in spans]


def dump(content: Any) -> bytes:
    return json.dumps(settled(content), sort_keys=True).encode()


def settled(content: Any) -> Any:
    """JSON without what differs between two runs of the same code."""
    if isinstance(content, list):
        return [settled(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        name: settled(value) for name, value in content.items() if name not in VOLATILE and value not in (None, 0, False)
    }


if __name__ == "__main__":
    main()
