"""How the records of options are made: rules for values, ranges of steps, and records that hold their fields to their rules.

A command has two types. Its *Options* are what is given, each None unless somebody sets it; its *Config* is resolved: every
field has a value, from the options, the preset or the adapter's run. Types, rules, defaults and help texts stand once, at
the fields of the Config (config.py, draw_config.py). These files import nothing heavy, so that `--help` is at once there.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
from pydantic import Field

from .errors import InputError, near
from .reward_specs import without_passwords

# --- rules for values ---

MAX_SEED = 2**63  # room below torch's limit of 2**64 for the seeds that are counted up from it
MAX_COUNT = 10**9  # more of anything is a typing error, and would overflow in some library
MAX_RANK = 1024  # of LoRA; no layer here is wider than 1280
MAX_TIMEOUT = 7 * 24 * 3600  # seconds; what threads can wait for is limited too

# The description of a rule completes "must be ..." in messages.
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, description=f"a whole number, at least 1 and at most {MAX_COUNT}")]
Natural = Annotated[int, Field(ge=0, le=MAX_COUNT, description=f"a whole number from 0 to {MAX_COUNT}")]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK, description=f"a whole number, at least 1 and at most {MAX_RANK}")]
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED - 1}")]
Positive = Annotated[float, Field(gt=0, description="a finite number above 0")]
NonNegative = Annotated[float, Field(ge=0, description="a finite number, not negative")]
StepShare = Annotated[float, Field(gt=0, le=1, description="above 0 and at most 1 (a share of the steps)")]
DrawEta = Annotated[float, Field(ge=0, le=1, description="from 0 to 1")]
LoraLayers = Annotated[
    str,
    Field(pattern=r"^(all|(first|last):[1-9]\d{0,3})$", description="all, first:N or last:N with N from 1 on, as last:4"),
]
Decay = Annotated[float, Field(ge=0, lt=1, description="from 0 to below 1")]
AdapterSteps = Annotated[
    str,
    Field(description="a range A-B of shares of the denoising steps with 0 <= A < B <= 1, as 0.8-1"),
    pydantic.AfterValidator(lambda text: parse_steps(text) and text),
]
Seconds = Annotated[float, Field(gt=0, le=MAX_TIMEOUT, description=f"above 0 and at most {MAX_TIMEOUT} seconds")]
Algorithm = Literal["ppo", "matching", "gradient"]
Precision = Literal["no", "fp16", "bf16"]
Sampler = Literal["ddim", "dpm-solver", "euler", "cps"]
FLOW_SAMPLERS = ("euler", "cps")  # for models of flow matching
NullPrompt = Literal["adapted", "base"]
LongPrompt = Literal["refuse", "cut", "chunk"]
Reward = Annotated[str, Field(description="a text"), pydantic.AfterValidator(lambda spec: without_passwords(spec))]
PLAIN = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}


def _as_list(given: Any) -> Any:
    """A text as a list of one, and a tuple as a list."""
    return [given] if isinstance(given, str) else list(given) if isinstance(given, tuple) else given


# A list; for type checkers a sequence, as a single text is one too.
Texts = Annotated[Sequence[str], Field(description="a text or a list of texts"), pydantic.BeforeValidator(_as_list)]
Rewards = Annotated[Sequence[Reward], Field(description="a text or a list of texts"), pydantic.BeforeValidator(_as_list)]


# --- ranges of steps ---


@functools.cache
def parse_steps(text: str) -> tuple[float, float]:
    """Beginning and end of a range A-B of shares of the denoising steps; raises ValueError unless 0 <= A < B <= 1."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)-(\d+\.?\d*|\.\d+)", text)
    first, end = map(float, found.groups()) if found else (math.nan, math.nan)
    if not 0 <= first < end <= 1:
        raise ValueError(f"must be A-B with 0 <= A < B <= 1, as 0.8-1, not {text!r}")
    return first, end


def is_inside(steps: str | None, share: float) -> bool:
    """Whether a share of the denoising, from 0 at the pure noise to 1, lies in a range A-B of them; None is all of it."""
    first, end = parse_steps(steps) if steps else (0.0, 1.0)
    return first <= share and (share < end or end == 1)


def steps_inside(steps: str | None, num_steps: int) -> list[bool]:
    """Which of the denoising steps lie in a range A-B: step k does where A <= (k + 0.5) / num_steps < B."""
    return [is_inside(steps, (k + 0.5) / num_steps) for k in range(num_steps)]


def check_steps(steps: str | None, num_steps: int) -> None:
    """Raise InputError for a range in which no step lies."""
    if not any(steps_inside(steps, num_steps)):
        raise InputError(
            f"adapter_steps: none of the {num_steps} denoising steps lies in {steps} (step k does by (k + 0.5) / "
            f"{num_steps}); widen it, or raise --num-inference-steps"
        )


# --- validated records ---

T = TypeVar("T")


def derived(default: Any = MISSING, *, init: Literal[False] = False, **others: Any) -> Any:
    """A field that follows from the options; `init` says to type checkers and editors that nobody gives it."""
    return field(**others) if default is MISSING else field(default=default, **others)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, derived))
def validated(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that holds its fields to their types and rules.

    Its `__init__` raises InputError with the field, the rule and the value.
    """
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    record: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=config)
    validate = record.__init__

    @functools.wraps(validate)
    def init(self: object, **values: Any) -> None:
        try:
            validate(self, **values)
        except pydantic.ValidationError as error:
            raise InputError(_first_message(error, record)) from error

    record.__init__ = init
    return record


def _first_message(error: pydantic.ValidationError, record: type) -> str:
    """What is wrong first: field, rule and value."""
    found = error.errors()[0]
    name = str(found["loc"][0])
    if found["type"] == "unexpected_keyword_argument":
        return f"{name}: there is no such option{near(name, typing.get_type_hints(record))}"
    if found["type"] == "missing":
        return f"{name}: must be given"
    kind, value = typing.get_type_hints(record, include_extras=True)[name], found["input"]
    hint = "; write a function as 'path/to/file.py:function'" if callable(value) else near(value, _choices(kind))
    return f"{name}: must be {_rule(kind)}, not {repr(value)[:100]}{hint}"


def _choices(kind: Any) -> list[str]:
    """The values that a field's type names."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [choice for part in typing.get_args(kind) for choice in _choices(part)]


def _rule(kind: Any) -> str:
    """What a field's type asks for, in words."""
    if typing.get_origin(kind) is Annotated:
        return kind.__metadata__[0].description
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_rule(part) for part in typing.get_args(kind) if part is not type(None))
    return PLAIN.get(typing.get_origin(kind) or kind, str(kind))


def option(text: str, default: Any = MISSING) -> Any:
    """A field that is an option of the command, with its help text; without a default the preset or `resolve` has it."""
    return field(metadata={"help": text}) if default is MISSING else field(default=default, metadata={"help": text})


class Options:
    """What is given for a command: a field for each option, None where nothing is given."""

    if TYPE_CHECKING:

        def __init__(self, **given: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


def options_of(config_class: Any) -> type[Options]:
    """The Options of a Config: its fields that are options, each of which may be None."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    given = option_fields(config_class)
    body: dict[str, Any] = {item.name: field(default=None, metadata=item.metadata) for item in given}
    body["__annotations__"] = {item.name: hints[item.name] | None for item in given}
    return validated(type(config_class.__name__.replace("Config", "Options"), (Options,), body | {"__module__": __name__}))


def option_fields(record: Any) -> list[Any]:
    """The fields of a Config or of its Options that are options of the command."""
    return [item for item in fields(record) if "help" in item.metadata]


def given_values(options: Options) -> dict[str, Any]:
    """The options that are given, by name."""
    values = {item.name: getattr(options, item.name) for item in option_fields(type(options))}
    return {name: value for name, value in values.items() if value is not None}


def default_of(record: Any, name: str) -> Any:
    """The default of a field."""
    return next(item.default for item in fields(record) if item.name == name)
