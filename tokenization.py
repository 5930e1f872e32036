"""How prompts become token ids: tokenizers as the families use them, learned tokens, chunks, and weights in prompts."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .families import NO_TOKEN, Text, TextPart
from .options import parse_steps

MAX_KNOWN = 1024  # prompts whose text is kept; 4 MiB each of FLUX.1's T5
FIRST_LEARNED = NO_TOKEN - 1  # the id of a prompt's first learned token; those of the others follow downwards


def tokenize(tokenizer: Any, prompts: Sequence[str], num_tokens: int | None = None) -> Tensor:
    """Token ids (N, L) int64, padded or cut to the L tokens that the text encoder reads (77 of Stable Diffusion).

    Raises:
        InputError: a prompt is not text.
    """
    length, texts = num_tokens or tokenizer.model_max_length, convert_prompts(tokenizer, prompts)
    options = {"padding": "max_length", "max_length": length, "truncation": True, "padding_side": "right"}
    return torch.tensor(tokenizer(texts, **options).input_ids)


@dataclass(frozen=True)
class Reader:
    """A tokenizer and how a family uses it."""

    tokenizer: Any
    part: TextPart
    num_chunks: int = 1  # each with a start and an end token of its own, and read by itself
    num_learned: int = 0  # learned tokens at the end of each prompt, but of no negative one

    @functools.cached_property
    def instruction(self) -> str:
        """What comes before each prompt, but not before a negative one."""
        return self.part.instruction() if self.part.instruction else ""

    @property
    def num_read(self) -> int:
        """Tokens of a prompt that are read, with its start and end."""
        usual, most = self.part.num_tokens, self.tokenizer.model_max_length
        return most if usual is None else usual if self.part.instruction else min(usual, most)

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens L of a row of ids."""
        instruction = len(self.tokenizer.encode(self.instruction)) - 2 if self.instruction else 0
        return self.num_chunks * self.num_read + instruction

    def texts(self, prompts: Sequence[str], negative: bool = False) -> list[str]:
        """Prompts as the tokenizer gets them."""
        texts = [prompt.lower().strip() for prompt in prompts] if self.part.lowercase else list(prompts)
        return texts if negative else [self.instruction + text for text in texts]

    def ids(self, prompts: Sequence[str], negative: bool = False) -> Tensor:
        """Ids (N, L) of prompts; raises as `tokenize`."""
        if self.num_chunks > 1:
            return self._chunked_ids(prompts)
        length = self.num_read if negative else self.num_tokens
        if self.num_learned and not negative:
            return self._with_learned(tokenize(self.tokenizer, self.texts(prompts), length - self.num_learned))
        ids = tokenize(self.tokenizer, self.texts(prompts, negative), length)
        return nn.functional.pad(ids, (0, self.num_tokens - length), value=NO_TOKEN)

    def chunks(self, prompts: Sequence[str]) -> list[list[list[int]]]:
        """The token ids of each prompt in chunks, 75 of published CLIPs in each; an empty prompt has an empty chunk."""
        size, texts = self.num_read - 2, convert_prompts(self.tokenizer, self.texts(prompts))
        found = [ids[1:-1] for ids in self.tokenizer(texts, verbose=False).input_ids]
        return [[ids[start : start + size] for start in range(0, max(1, len(ids)), size)] for ids in found]

    def _chunked_ids(self, prompts: Sequence[str]) -> Tensor:
        """Ids (N, L) of chunks side by side; what is left of them is filled with chunks of the empty prompt."""
        tokenizer, rows = self.tokenizer, []
        for chunks in self.chunks(prompts):
            for k in range(self.num_chunks):
                row = [tokenizer.bos_token_id, *(chunks[k] if k < len(chunks) else ()), tokenizer.eos_token_id]
                rows.append(row + [tokenizer.pad_token_id] * (self.num_read - len(row)))
        return torch.tensor(rows).reshape(len(prompts), -1)

    def read(self, encoder: Any, ids: Tensor, clip_skip: int = 0) -> Text:
        """What a text encoder makes of ids (N, L): chunks are encoded apart and joined, the pooled text is the first one's.

        A1111 does so, and diffusers' community pipeline lpw_stable_diffusion, which has no pooled text.
        """
        options = {"clip_skip": clip_skip} if clip_skip and self.part.layer else {}
        if self.num_chunks == 1:
            return self.part.read(encoder, ids, **options)
        text = self.part.read(encoder, ids.reshape(-1, self.num_read), **options)
        apart: Any = [
            None if each is None else each.unflatten(0, (-1, self.num_chunks)) for each in (text.embeds, text.pooled)
        ]
        return Text(apart[0].flatten(1, 2), None if apart[1] is None else apart[1][:, 0])

    def _with_learned(self, ids: Tensor) -> Tensor:
        """Ids (N, L) with the learned tokens before the end token, from ids that leave room for them."""
        ends = 1 + (ids[:, 1:] == self.tokenizer.eos_token_id).int().argmax(dim=1)
        learned = torch.arange(FIRST_LEARNED, FIRST_LEARNED - self.num_learned, -1)
        rows = zip(ids, ends.tolist(), strict=True)
        return torch.stack([torch.cat([row[:end], learned, row[end:]]) for row, end in rows])


def convert_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with every token of a textual inversion of several vectors, which diffusers saves as `<cat> <cat>_1 ...`.

    The pipeline converts them so before it tokenizes them. Raises InputError for a prompt that is not text.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    _check_text(prompts)
    if not any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):
        return list(prompts)
    return TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)


def _check_text(prompts: Sequence[str]) -> None:
    if any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
        raise InputError("prompt: it holds a lone surrogate, which is not text")


@dataclass(frozen=True)
class Cut:
    """The prompts among others whose end is not read: `tokenize` cuts it off, as diffusers' pipelines do."""

    prompts: list[str]
    num_prompts: int  # with those that are read whole
    num_tokens: int  # that the text encoder reads

    def __str__(self) -> str:
        first = f", as {self.prompts[0][:60]!r}..." if self.prompts else ""
        number = f"{len(self.prompts)} of {self.num_prompts} prompts"
        return f"{number} are cut to the {self.num_tokens} tokens that the text encoder reads{first}"


def find_cut(readers: Sequence[Reader], prompts: Sequence[str]) -> Cut:
    """The prompts that none of a model's text encoders reads whole.

    Raises:
        InputError: a prompt is not text.
    """
    distinct = dict.fromkeys(prompts, True)
    for reader in readers if distinct else ():
        texts = convert_prompts(reader.tokenizer, reader.texts(list(distinct)))
        for prompt, ids in zip(distinct, reader.tokenizer(texts, verbose=False).input_ids, strict=True):
            # Each further chunk has a start and an end token of its own.
            room = reader.num_tokens - reader.num_learned - 2 * (reader.num_chunks - 1)
            distinct[prompt] = distinct[prompt] and len(ids) > room
    num_read = max(reader.num_read - reader.num_learned for reader in readers)
    return Cut([prompt for prompt, is_cut in distinct.items() if is_cut], len(distinct), num_read)


def chunks_note(num_chunks: int) -> str:
    """What is said where prompts are read in several chunks."""
    return (
        f"the longest one has {num_chunks} chunks of tokens, so every prompt is read in {num_chunks} (--long-prompt chunk)"
    )


class EncodeOnce:
    """A frozen text encoder that is on the device only while it encodes prompts, each of them once."""

    def __init__(self, encoder: nn.Module, reader: Reader) -> None:
        self.encoder, self.reader = encoder.to("cpu"), reader
        self.known: dict[bytes, Text] = {}  # on the CPU, by ids

    @torch.no_grad()
    def learn(self, prompt_ids: Tensor) -> None:
        """Encode those of the ids (N, L) that are not known, on their device."""
        rows = {_key(row): row for row in prompt_ids}
        if missing := {key: row for key, row in rows.items() if key not in self.known}:
            self.encoder.to(prompt_ids.device)
            for key, row in missing.items():
                self.known[key] = self._moved([self.reader.read(self.encoder, row[None])], torch.device("cpu"))
            self.encoder.to("cpu")
            for key in rows:
                self.known[key] = self.known.pop(key)  # the newest last
            for key in list(self.known)[: -max(MAX_KNOWN, len(rows))]:
                del self.known[key]  # captions are new in each epoch

    def __call__(self, prompt_ids: Tensor) -> Text:
        """Text of ids (N, L), on their device."""
        self.learn(prompt_ids)
        return self._moved([self.known[_key(row)] for row in prompt_ids], prompt_ids.device)

    def _moved(self, texts: Sequence[Text], device: torch.device) -> Text:
        """Texts as one, on a device."""

        def join(name: str) -> Any:
            tensors = [getattr(text, name) for text in texts]
            return None if tensors[0] is None else torch.cat(tensors).to(device)

        return Text(join("embeds"), join("pooled"), join("mask"))


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()


# --- learned tokens ---


class LearnedTokens(nn.Module):
    """A text encoder's input embeddings, with learned ones (arXiv:2208.01618) beside those of its words.

    The ids of the learned ones are negative: CLIP finds the end token as the largest id.
    """

    def __init__(self, words: nn.Module, learned: Tensor) -> None:
        super().__init__()
        self.words, self.learned = words, nn.Parameter(learned.float())
        self.enabled = True  # else prompts are read without them

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (N, L, D) of ids (N, L)."""
        embeds = self.words(ids.clamp(min=0))
        learned = self.learned[(FIRST_LEARNED - ids).clamp(0, len(self.learned) - 1)]
        return torch.where((ids <= FIRST_LEARNED)[..., None], learned.to(embeds), embeds)


def learned_tokens(part: Any) -> LearnedTokens | None:
    """The input embeddings of a part of a model if there are learned ones among them."""
    embeddings = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else None
    return embeddings if isinstance(embeddings, LearnedTokens) else None


def num_learned(part: Any) -> int:
    """The number of learned tokens that a part of a model reads."""
    tokens = learned_tokens(part)
    return 0 if tokens is None else len(tokens.learned)


def is_adapted(part: Any) -> bool:
    """Whether a part of a model carries LoRA or learned tokens."""
    return hasattr(part, "peft_config") or num_learned(part) > 0


def without_learned(ids: Tensor, pad_id: int) -> Tensor:
    """Ids (N, L) as of the same prompts without learned tokens."""
    is_learned = ids <= FIRST_LEARNED
    return ids.masked_fill(is_learned, pad_id).gather(1, is_learned.int().argsort(dim=1, stable=True))


# --- weights in prompts ---

# The parts of a prompt: brackets, what closes them (a weight a round one, a range of steps a square one), and text.
_MARKS = re.compile(
    r"\\[\\()\[\]]?|[(\[]"
    r"|:\s*(?P<weight>[-+]?[.,\d][-+.,\deE]*)\s*\)"
    r"|:\s*(?P<steps>[.\d]+\s*-\s*[.\d]+)\s*(?::(?P<own>[^\[\]():|\\]*))?\]"
    r"|:\s*(?P<editing>[.\d]+)\s*\]"
    r"|:\s*(?P<unclosed>[.\d]+\s*-\s*[.\d]+)\s*:"
    r"|[)\]]|:|[^\\()\[\]:]+"
)
_OTHER_MARKS = re.compile(r"\b(?:BREAK|AND)\b")  # A1111 takes these words for something else than text
MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: its weight, and the shares of the denoising between which it is part of the prompt."""

    text: str
    weight: float = 1.0
    first: float = 0.0
    end: float = 1.0

    def is_at(self, share: float) -> bool:
        return self.first <= share < self.end


def parse_weights(prompt: str) -> list[Piece]:
    """The pieces of a prompt with weights, as A1111 reads them; brackets that are not closed reach to the end.

    `[text:A-B:weight]` is a text that is part of the prompt in a range of the denoising steps alone (PAE, arXiv:2404.04095).

    Raises:
        InputError: a weight or a range is none, or the prompt has what A1111 takes for something else than weights.
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    usual = {"(": 1.1, "[": 1 / 1.1}

    def close(bracket: str, weight: float, first: float = 0.0, end: float = 1.0) -> None:
        start = opened[bracket].pop()
        for i, piece in enumerate(pieces[start:], start):
            pieces[i] = Piece(piece.text, piece.weight * weight, max(piece.first, first), min(piece.end, end))

    for mark in _MARKS.finditer(prompt):
        text = mark[0]
        if text.startswith("\\"):
            pieces.append(Piece(text[1:]))
        elif text in opened:
            opened[text].append(len(pieces))
        elif mark["weight"] and opened["("]:
            close("(", _weight(mark["weight"], prompt))
        elif mark["steps"] and opened["["]:
            close("[", _weight((mark["own"] or "").strip(), prompt), *_shares(mark["steps"], prompt))
        elif (bracket := {")": "(", "]": "["}.get(text)) and opened[bracket]:
            close(bracket, usual[bracket])
        elif mark["unclosed"] and opened["["]:
            raise _unreadable(prompt, f"the range {mark['unclosed']} is not closed; write it as [text:A-B:weight]")
        elif _OTHER_MARKS.search(text) or (opened["["] and (mark["editing"] or "|" in text)):
            raise _unreadable(prompt, "prompt editing, alternation, BREAK and AND are not supported")
        else:
            pieces.append(Piece(text))
    for bracket, weight in usual.items():
        while opened[bracket]:
            close(bracket, weight)
    return pieces


def _weight(text: str, prompt: str) -> float:
    number = float(text) if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", text) else float("nan")
    if not abs(number) <= MAX_WEIGHT:
        raise _unreadable(prompt, f"a weight must be a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, not {text[:20]!r}")
    return number


def _shares(text: str, prompt: str) -> tuple[float, float]:
    try:
        return parse_steps(re.sub(r"\s", "", text))
    except ValueError as error:
        raise _unreadable(prompt, f"a range of steps {error}") from error


def _unreadable(prompt: str, why: str) -> InputError:
    return InputError(f"prompt_weights: the prompt {prompt[:100]!r} cannot be read: {why}")


def plain_text(prompt: str) -> str:
    """A prompt with weights without them, as scorers read it: with the words of all ranges; raises as `parse_weights`.

    Words that are never together stand apart, and a text that takes its own place, with another weight, stands there once.
    """
    shown, before = "", Piece("")
    for (first, end), group in itertools.groupby(parse_weights(prompt), key=lambda piece: (piece.first, piece.end)):
        piece = Piece("".join(each.text for each in group), first=first, end=end)
        if piece.text.strip() and (first >= before.end or before.first >= end):
            if piece.text.strip() == before.text.strip():
                continue
            shown += "" if shown[-1:].isspace() else " "
        shown, before = shown + piece.text, piece if piece.text.strip() else before
    return shown


def shares_of(num_steps: int) -> list[float]:
    """The share of the denoising at which each of T steps reads its prompt: the middle of the step."""
    return [(k + 0.5) / num_steps for k in range(num_steps)]


def read_weights(prompt: str, num_steps: int) -> list[Piece]:
    """The pieces of a prompt that T steps read; raises as `parse_weights`, and InputError for one that no step reads."""
    pieces = parse_weights(prompt)
    for piece in pieces:
        if piece.text.strip() and not any(map(piece.is_at, shares_of(num_steps))):
            raise _unreadable(
                prompt, f"none of the {num_steps} denoising steps lies in the range of {piece.text.strip()[:40]!r}; widen it"
            )
    return pieces


def counted_texts(prompt: str, num_steps: int) -> list[str]:
    """A prompt with weights as its tokens are counted: each weighted text by itself, once for each step that differs."""
    pieces = read_weights(prompt, num_steps)
    at_steps = (" ".join(text for text, _ in texts_at(pieces, share)) for share in shares_of(num_steps))
    return list(dict.fromkeys(at_steps))


def check_weighable(readers: Sequence[Reader]) -> None:
    """Raise InputError for text encoders of which A1111's weights are not defined."""
    if not all(reader.part.is_clip for reader in readers):
        raise InputError(
            "prompt_weights: is for CLIP text encoders alone, and this model has another one, whose states A1111 does not "
            "weigh; leave it out"
        )


def texts_at(pieces: Sequence[Piece], share: float) -> tuple[tuple[str, float], ...]:
    """The texts of a prompt at a share of the denoising with their weights; neighbours of one weight are one text."""
    there = [piece for piece in pieces if piece.is_at(share)] or [Piece("")]
    alike = itertools.groupby(there, key=lambda piece: piece.weight)
    return tuple(("".join(piece.text for piece in group), weight) for weight, group in alike)


def weighted_ids(reader: Reader, texts: Sequence[tuple[str, float]]) -> Tensor:
    """Ids and weights (2, L) of texts, each tokenized by itself as in A1111; cut, chunked and padded as `Reader.ids`."""
    tokenizer, length, row = reader.tokenizer, reader.num_read, list[tuple[int, float]]()
    found = tokenizer(convert_prompts(tokenizer, [text for text, _ in texts]), add_special_tokens=False, verbose=False)
    tokens = [(token, weight) for ids, (_, weight) in zip(found.input_ids, texts, strict=True) for token in ids]
    for start in range(0, reader.num_chunks * (length - 2), length - 2):
        chunk = [(tokenizer.bos_token_id, 1.0), *tokens[start : start + length - 2], (tokenizer.eos_token_id, 1.0)]
        row += chunk + [(tokenizer.pad_token_id, 1.0)] * (length - len(chunk))
    return torch.tensor(row, dtype=torch.float64).T


def weigh(text: Text, weights: Tensor, num_chunks: int = 1) -> Text:
    """Text whose states are multiplied by weights (N, L), and then scaled so that each chunk keeps its mean, as in A1111.

    The pooled text stays as it is.
    """
    states: Any = text.embeds
    states, weights = (each.float().unflatten(1, (num_chunks, -1)) for each in (states, weights))
    weighted = states * weights[..., None]
    ratio = states.mean(dim=(2, 3)) / weighted.mean(dim=(2, 3))
    ratio = ratio.where((weights != 1).any(dim=2), torch.ones_like(ratio))
    return replace(text, embeds=(weighted * ratio[..., None, None]).flatten(1, 2))
