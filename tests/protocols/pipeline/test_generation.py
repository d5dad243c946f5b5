"""A generated text: what is asked for, what comes out, and where it ends."""

from __future__ import annotations

import codecs
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.boundary import decode_tokens, pack_header
from swarmtrain_protocols.errors import PeerFault, PromptTooLong, UsageError
from swarmtrain_protocols.pipeline.generation import (
    BYTES,
    Generation,
    TextModel,
    Wanted,
    prompt_of,
    text_model,
)
from swarmtrain_protocols.pipeline.sampling import Sampling

MODEL = TextModel(8, BYTES)
FP32 = 1


def answer(token: int, vocabulary: int = BYTES) -> bytes:
    """Logits whose greedy choice is ``token``."""
    logits = np.zeros(vocabulary, np.float32)
    logits[token] = 1.0
    return pack_header(FP32, (1, 1, vocabulary)) + logits.tobytes()


def say(generation: Generation, text: bytes, version: int = 0) -> list[str]:
    """Feed the tokens of ``text`` until it is finished; the pieces of text that come out."""
    pieces = []
    for token in text:
        pieces.append(generation.take(answer(token), version).text)
        if generation.finish:
            break
    return pieces


def wanted(prompt: bytes = b"ab", **more: object) -> Wanted:
    return dataclasses.replace(Wanted(tuple(prompt), max_tokens=100), **more)  # type: ignore[arg-type]


def test_the_window_slides_over_prompt_and_tokens() -> None:
    generation = Generation(wanted(b"abcdef", max_tokens=4), MODEL)
    seen = []
    for token in b"wxyz":
        ids = decode_tokens(generation.context(), 1, MODEL.context, BYTES)
        seen.append(bytes(ids[0].tolist()))
        piece = generation.take(answer(token), 7)
        assert (piece.token, piece.version) == (token, 7)
    assert seen == [b"abcdef", b"abcdefw", b"abcdefwx", b"bcdefwxy"]
    assert (generation.text, generation.finish) == ("wxyz", "length")
    assert generation.tokens == list(b"wxyz")


def test_versions_say_which_weights_said_what() -> None:
    generation = Generation(wanted(), MODEL)
    for version in (3, 3, 4, 4, 4, 6):
        generation.take(answer(65), version)
    assert generation.versions == [(3, 2), (4, 3), (6, 1)]


def test_half_a_character_waits_for_its_other_half() -> None:
    assert say(Generation(wanted(), MODEL), "aß€".encode()) == ["a", "", "ß", "", "", "€"]
    cut = Generation(wanted(max_tokens=2), MODEL)
    assert say(cut, "a€".encode()) == ["a", "\ufffd"]


def test_a_stop_string_ends_it_and_is_not_part_of_it() -> None:
    generation = Generation(wanted(stop=(b"stop", b"!!")), MODEL)
    pieces = say(generation, b"st stopped")
    assert pieces == ["", "", "st ", "", "", "", ""]
    assert (generation.text, generation.finish) == ("st ", "stop")
    assert len(generation.tokens) == 7


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    generation = Generation(wanted(max_tokens=3, stop=(b"xyz",)), MODEL)
    assert say(generation, b"axy") == ["a", "", "xy"]
    assert generation.finish == "length"


@given(st.binary(min_size=1, max_size=40), st.lists(st.binary(min_size=1, max_size=3), max_size=3))
def test_the_text_is_what_stands_before_the_first_stop(said: bytes, stops: list[bytes]) -> None:
    """Against a search over the whole: the first token after which any stop string is there."""
    generation = Generation(wanted(max_tokens=len(said), stop=tuple(stops)), MODEL)
    pieces = say(generation, said)
    ends = (n for n in range(1, len(said) + 1) if any(stop in said[:n] for stop in stops))
    end = next(ends, None)
    kept = said
    if end is not None:
        kept = said[: min(at for stop in stops if (at := said[:end].find(stop)) >= 0)]
    assert "".join(pieces) == generation.text == codecs.decode(kept, "utf-8", "replace")
    assert generation.finish == ("length" if end is None else "stop")


def test_the_same_seed_draws_the_same_whoever_begins_it_again() -> None:
    noise = np.random.default_rng(0).standard_normal((6, BYTES)).astype(np.float32)
    rows = [pack_header(FP32, (1, 1, BYTES)) + row.tobytes() for row in noise]

    def draw(seed: int) -> list[int]:
        generation = Generation(wanted(sampling=Sampling(temperature=1.0, seed=seed)), MODEL)
        return [generation.take(row, 0).token for row in rows]

    assert draw(1) == draw(1) != draw(2)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(PromptTooLong, match="9 tokens"):
        Generation(wanted(b"123456789"), MODEL)
    with pytest.raises(UsageError, match="token 300"):
        Generation(Wanted((300,)), MODEL)
    with pytest.raises(UsageError, match="empty prompt"):
        Wanted(())
    for most in (0, limits.GENERATE_TOKENS_MAX + 1):
        with pytest.raises(UsageError, match="max_tokens"):
            Wanted((1,), most)
    with pytest.raises(UsageError, match="stop"):
        Wanted((1,), stop=(b"",))
    with pytest.raises(UsageError, match="not bytes"):
        Generation(Wanted((1,), stop=(b"x",)), TextModel(8, 1000))


@pytest.mark.parametrize(
    "answered", [b"", b"x" * 16, answer(1, 300), answer(1)[:-1], answer(1)[:-4] + b"\xff" * 4]
)
def test_logits_of_another_shape_are_a_fault(answered: bytes) -> None:
    generation = Generation(wanted(), MODEL)
    with pytest.raises(PeerFault):
        generation.take(answered, 0)
    assert generation.tokens == []


def test_token_ids_where_the_vocabulary_is_not_known() -> None:
    generation = Generation(Wanted((1000, 2), 2), TextModel(8, 0))
    assert generation.take(answer(777, 1000), 0).text == ""
    assert generation.take(answer(999, 1000), 0).finish == "length"
    assert generation.tokens == [777, 999]
    huge = pack_header(FP32, (1, 1, limits.VOCABULARY_MAX + 1))
    with pytest.raises(PeerFault, match="oversize"):
        Generation(Wanted((1,)), TextModel(8, 0)).take(huge, 0)


def test_prompts_are_text_or_ids() -> None:
    assert prompt_of("aé", None, MODEL) == (97, 0xC3, 0xA9)
    assert prompt_of(None, [5, 6], TextModel(8, 1000)) == (5, 6)
    with pytest.raises(UsageError, match="tokenizer"):
        prompt_of("text", None, TextModel(8, 1000))
    for both in (("a", [1]), (None, None)):
        with pytest.raises(UsageError, match="either"):
            prompt_of(*both, MODEL)


def test_presets_have_a_context_that_the_run_may_change() -> None:
    assert text_model("lm-small", {}) == TextModel(128, BYTES)
    assert text_model("decoder-tiny", {"context": 32, "vocabulary": 999}) == TextModel(32, 999)
    assert text_model("my-own", {}) is None
