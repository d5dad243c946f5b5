"""A text that the swarm goes on with: all of its state, kept by whoever asked for it.

Workers keep nothing between two tokens. Each token costs one forward pass over the last tokens of
the context window, so a worker that dies costs one hop and no history, and the text is the same
whoever computed it. Token k is drawn by (logits, settings, position of k) alone (``sampling.py``).
Tokens may come from weights of different versions: ``versions`` says which came from which.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.boundary import Buffer
from swarmtrain_protocols.errors import PromptTooLong, UsageError
from swarmtrain_protocols.pipeline.sampling import (
    Sampling,
    encode_context,
    last_logits,
    next_token,
)

BYTES = 256
"""Vocabulary of byte-level models: token id = byte of UTF-8."""
Finish = Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class TextModel:
    """What a run's model reads and writes. ``vocabulary`` 0: not known, ids only."""

    context: int
    vocabulary: int

    @property
    def is_text(self) -> bool:
        """Tokens are bytes; else whoever asks gives and gets token ids."""
        return self.vocabulary == BYTES


_PRESETS = {
    "lm-tiny": TextModel(64, BYTES),
    "lm-small": TextModel(128, BYTES),
    "lm-base": TextModel(256, BYTES),
    "decoder-tiny": TextModel(64, BYTES),
    "decoder-small": TextModel(256, BYTES),
}


def text_model(preset: str, sizes: dict[str, int]) -> TextModel | None:
    """Context and vocabulary of a preset, with the run key ``model``; None: of no preset.

    A copy of what the presets themselves say, for processes without torch; a test compares them.
    """
    known = _PRESETS.get(preset)
    if known is None:
        return None
    return TextModel(sizes.get("context", known.context), sizes.get("vocabulary", known.vocabulary))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for text. ``stop``: strings of UTF-8 that end it and are not part of it.

    Raises:
        UsageError: out of bounds.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("an empty prompt", "there is nothing to go on with", "give some text")
        if not 1 <= self.max_tokens <= limits.GENERATE_TOKENS_MAX:
            most = limits.GENERATE_TOKENS_MAX
            raise UsageError(f"max_tokens {self.max_tokens}", f"1 to {most}")
        if len(self.stop) > limits.GENERATE_STOPS_MAX or not all(self.stop):
            raise UsageError("stop", f"at most {limits.GENERATE_STOPS_MAX}, none of them empty")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added. ``text`` may lag behind: half a character, or half a stop string."""

    token: int
    text: str
    version: int
    finish: Finish


class Generation:
    """One sequence: the tokens so far, and what to ask for next.

    Args:
        model: of the run; the prompt must fit its context. Later the window slides: the last
            ``context`` tokens are what the next one follows from.

    Raises:
        PromptTooLong: longer than the context.
        UsageError: a token id outside the vocabulary, or stop strings where tokens are no bytes.
    """

    def __init__(self, wanted: Wanted, model: TextModel) -> None:
        if len(wanted.prompt) > model.context:
            raise PromptTooLong(
                f"a prompt of {len(wanted.prompt)} tokens",
                f"the model's context is {model.context}",
                "shorten the prompt",
            )
        outside = [t for t in wanted.prompt if not 0 <= t < (model.vocabulary or 1 << 31)]
        if outside:
            raise UsageError(f"token {outside[0]}", f"the vocabulary is 0 … {model.vocabulary - 1}")
        if wanted.stop and not model.is_text:
            raise UsageError("stop strings", "the tokens of this model are not bytes")
        self.wanted = wanted
        self.model = model
        self.tokens: list[int] = []
        self.text = ""
        self.versions: list[tuple[int, int]] = []
        """(version, tokens that came from it), in order."""
        self.finish: Finish = ""
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def context(self) -> bytes:
        """Encoded tokens i32 [1, time] that the next token follows from."""
        history = [*self.wanted.prompt, *self.tokens][-self.model.context :]
        return encode_context(history)

    def take(self, logits: Buffer, version: int) -> Piece:
        """The answer of the swarm to ``context()``, computed by weights of ``version``.

        Raises:
            PeerFault: ``malformed``, ``oversize`` or ``non_finite`` logits.
        """
        position = len(self.wanted.prompt) + len(self.tokens)
        token = next_token(
            last_logits(logits, self.model.vocabulary), self.wanted.sampling, position
        )
        self.tokens.append(token)
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1] = version, self.versions[-1][1] + 1
        else:
            self.versions.append((version, 1))
        text = self._spoken(token) if self.model.is_text else ""
        if not self.finish and len(self.tokens) >= self.wanted.max_tokens:
            self.finish = "length"
            text += self._decoder.decode(self._held, final=True)
        self.text += text
        return Piece(token, text, version, self.finish)

    def _spoken(self, token: int) -> str:
        """Text that is certain now: what may yet become a stop string is held back."""
        self._held += bytes([token])
        found = [at for stop in self.wanted.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            return self._decoder.decode(self._held[: min(found)], final=True)
        keep = max((_overlap(self._held, stop) for stop in self.wanted.stop), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[-keep:][:keep]
        return self._decoder.decode(certain)


def _overlap(text: bytes, stop: bytes) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def prompt_of(text: str | None, tokens: Sequence[int] | None, model: TextModel) -> tuple[int, ...]:
    """Token ids of a prompt: the bytes of ``text``, or ids as they are.

    Raises:
        UsageError: both, neither, or text for a model whose tokens are no bytes.
    """
    if (text is None) == (tokens is None):
        raise UsageError("the prompt", "either text or token ids", "give one of them")
    if text is None:
        return tuple(tokens or ())
    if not model.is_text:
        raise UsageError(
            "a prompt of text",
            "this run's model has a tokenizer that swarmtrain does not know",
            "give token ids",
        )
    return tuple(text.encode("utf-8", "surrogateescape"))
