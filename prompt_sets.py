"""Prompts: of files, of the sets in prompts/, and of the published benchmarks."""

from __future__ import annotations

from pathlib import Path

from texforce.config import TrainConfig

PROMPTS = Path(__file__).parent / "prompts"
KINDS = ("colour", "composition", "position", "count")  # prompt sets that the tiny world can judge


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, or of a set shipped in prompts/; `world` is the four sets of the tiny world.

    Raises:
        FileNotFoundError: there is neither such a file nor such a set.
        ValueError: it holds no prompt, or is not UTF-8 text.
    """
    known = sorted(path.stem for path in PROMPTS.glob("*.txt"))
    if source.startswith("world"):
        parts = [source.replace("world", kind) for kind in KINDS]
        if set(parts) <= set(known):
            return [prompt for part in parts for prompt in read_prompts(part)]
    path = PROMPTS / f"{source}.txt" if source in known else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts: there is no file {source!r} and no set of that name; sets are world, {', '.join(known)}"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {source!r} is not UTF-8 text (byte {error.start})") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"prompts: {source!r} holds no prompt; write one a line")
    return prompts


def split_prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; no sentence is in both, but for a file with a single prompt, which is both.

    Raises:
        FileNotFoundError, ValueError: a file is not there or unusable, or every prompt is held out.
    """
    prompts = read_prompts(config.prompts)
    if config.heldout_prompts:
        heldout = read_prompts(config.heldout_prompts)
    elif config.prompts in ("world", *KINDS):
        heldout = read_prompts(f"{config.prompts}-heldout")
    elif len(prompts) == 1:
        return prompts, prompts
    else:
        heldout = prompts[:: min(10, len(prompts))][:64]
    train = [prompt for prompt in prompts if prompt not in set(heldout)]
    if not train:
        raise ValueError(f"prompts: every prompt of {config.prompts!r} is held out, so none is left to train on")
    return train, heldout
