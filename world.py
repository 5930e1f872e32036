"""The sentences of the embedded tiny world: coloured shapes on a dark ground. detector.py reads the shapes off its images.

A prompt is one of four kinds: colour ("a red circle"), composition ("a red circle and a blue square"), position
("a red circle left of a blue square") and count ("three red circles"). Every colour and shape has a common word and a
rare synonym of exactly the same meaning ("crimson disc"). Scenes are 32 x 32 pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError
from .presets import EMBEDDED

IMAGE_SIZE = 32
COLOURS = {  # common word: (rare synonym, RGB)
    "red": ("crimson", (0.90, 0.10, 0.10)),
    "green": ("emerald", (0.10, 0.70, 0.20)),
    "blue": ("navy", (0.15, 0.30, 0.95)),
    "yellow": ("golden", (0.95, 0.90, 0.10)),
    "purple": ("violet", (0.60, 0.15, 0.80)),
    "orange": ("amber", (1.00, 0.50, 0.05)),
    "cyan": ("turquoise", (0.10, 0.85, 0.90)),
    "white": ("ivory", (1.00, 1.00, 1.00)),
}
SHAPES = {"circle": "disc", "square": "box", "triangle": "wedge", "cross": "plus"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # image axes: y points down
COUNTS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"cross": "crosses", "box": "boxes", "plus": "pluses"}  # all others add an s

COLOUR_WORDS = [(common, rare) for common, (rare, _) in COLOURS.items()]
SHAPE_WORDS = list(SHAPES.items())
RARE_WORDS = frozenset(rare for _, rare in COLOUR_WORDS + SHAPE_WORDS)

_COLOUR_INDEX = {word: i for i, words in enumerate(COLOUR_WORDS) for word in words}
_SHAPE_INDEX = {word: i for i, words in enumerate(SHAPE_WORDS) for word in words}


def plural(word: str) -> str:
    return PLURALS.get(word, word + "s")


_PLURAL_INDEX = {plural(word): index for word, index in _SHAPE_INDEX.items()}
_COLOUR_PATTERN = "|".join(_COLOUR_INDEX)
_NOUN = rf"an? ({_COLOUR_PATTERN}) ({'|'.join(_SHAPE_INDEX)})"
_ONE = re.compile(rf"^{_NOUN}$")
_TWO = re.compile(rf"^{_NOUN} (and|{'|'.join(RELATIONS)}) {_NOUN}$")
_MANY = re.compile(rf"^({'|'.join(COUNTS.values())}) ({_COLOUR_PATTERN}) ({'|'.join(_PLURAL_INDEX)})$")


@dataclass(frozen=True)
class Scene:
    """What a prompt means: its kind, the (colour, shape) indices of every object, and the relation of two."""

    kind: str
    objects: tuple[tuple[int, int], ...]
    relation: str | None = None


def parse(prompt: str) -> Scene:
    """The scene that a prompt describes.

    Raises:
        InputError: the prompt is not a sentence of the tiny world.
    """
    text = " ".join(prompt.lower().split())
    if match := _ONE.match(text):
        colour, shape = match.groups()
        return Scene("colour", ((_COLOUR_INDEX[colour], _SHAPE_INDEX[shape]),))
    if match := _TWO.match(text):
        colour, shape, link, other_colour, other_shape = match.groups()
        objects = ((_COLOUR_INDEX[colour], _SHAPE_INDEX[shape]), (_COLOUR_INDEX[other_colour], _SHAPE_INDEX[other_shape]))
        return Scene("composition", objects) if link == "and" else Scene("position", objects, link)
    if match := _MANY.match(text):
        count, colour, shape = match.groups()
        number = next(n for n, word in COUNTS.items() if word == count)
        return Scene("count", ((_COLOUR_INDEX[colour], _PLURAL_INDEX[shape]),) * number)
    raise InputError(
        f"prompt {prompt!r} is not a sentence of the tiny world, so alignment cannot be judged; "
        "it knows sentences such as 'a red circle left of a blue square' and 'three red circles'"
    )


def rare_words(prompt: str) -> list[str]:
    """The words of a prompt, in lower case, that are rare ones or their plurals."""
    singular = {plural(word): word for word in RARE_WORDS}
    return [word for word in prompt.lower().split() if singular.get(word, word) in RARE_WORDS]


def has_rare_word(prompt: str) -> bool:
    return bool(rare_words(prompt))


def is_world(prompts: Sequence[str]) -> bool:
    """Whether every prompt is a sentence of the tiny world."""
    try:
        return all(parse(prompt) for prompt in prompts)
    except InputError:
        return False


def foreign_note(model: str, prompts: Sequence[str]) -> str | None:
    """What to say of prompts that an embedded model cannot draw; None if it can draw all of them, or for other models."""
    foreign = [prompt for prompt in prompts if not is_world([prompt])] if model in EMBEDDED else []
    if not foreign:
        return None
    return (
        f"{model} knows only coloured shapes, so {len(foreign)} of {len(prompts)} prompts mean nothing to it, "
        f"as {foreign[0][:60]!r}; it knows 'a red circle left of a blue square' and 'three red circles'"
    )
