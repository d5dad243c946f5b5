"""Error feedback: what is lost comes back, and only committed rounds count."""

from __future__ import annotations

import numpy as np
import pytest

from swarmtrain_protocols.codecs import ErrorFeedback, get_codec
from swarmtrain_protocols.errors import LocalProtocolError

INT8 = get_codec("int8")


def send(feedback: ErrorFeedback, x: np.ndarray, chunk: int = 300) -> np.ndarray:
    """Encode by chunk, return what receivers decode."""
    decoded = np.zeros(x.size, np.float32)
    feedback.begin()
    for start in range(0, x.size, chunk):
        piece = x[start : start + chunk]
        out = bytearray(INT8.encoded_nbytes(piece.size))
        feedback.encode(start, piece, INT8, out)
        INT8.decode(out, decoded[start : start + chunk])
    return decoded


def test_the_running_sum_is_exact_up_to_one_residual() -> None:
    rng = np.random.default_rng(4)
    feedback = ErrorFeedback(1000)
    wanted, got, plain = np.zeros(1000), np.zeros(1000), np.zeros(1000)
    constant = rng.standard_normal(1000).astype(np.float32)
    for _ in range(40):
        wanted += constant
        got += send(feedback, constant)
        feedback.commit()
        out, once = bytearray(INT8.encoded_nbytes(1000)), np.zeros(1000, np.float32)
        INT8.encode(constant, out)
        INT8.decode(out, once)
        plain += once
    np.testing.assert_allclose(got + feedback.residual, wanted, atol=1e-4)
    step = np.abs(constant).max() / 127
    assert np.abs(got - wanted).max() <= step
    assert np.abs(plain - wanted).max() > 10 * step  # without feedback the same loss adds up


def test_rollback_restores_the_residual_bit_for_bit() -> None:
    rng = np.random.default_rng(6)
    feedback = ErrorFeedback(500)
    send(feedback, rng.standard_normal(500).astype(np.float32))
    feedback.commit()
    before = feedback.residual.copy()
    assert before.any()
    send(feedback, rng.standard_normal(500).astype(np.float32))
    feedback.rollback()
    assert feedback.residual.tobytes() == before.tobytes()
    # The contribution that was rolled back leaves no trace in the next one either.
    other = ErrorFeedback(500)
    other.residual[:] = before
    x = rng.standard_normal(500).astype(np.float32)
    assert send(feedback, x).tobytes() == send(other, x).tobytes()


def test_the_input_is_not_written() -> None:
    x = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    copy = x.copy()
    send(ErrorFeedback(500), x)
    assert x.tobytes() == copy.tobytes()


def test_order_of_calls_is_enforced() -> None:
    feedback = ErrorFeedback(10)
    for call in (feedback.commit, feedback.rollback):
        with pytest.raises(LocalProtocolError):
            call()
    with pytest.raises(LocalProtocolError):
        feedback.encode(0, np.zeros(10, np.float32), INT8, bytearray(14))
    feedback.begin()
    with pytest.raises(LocalProtocolError):
        feedback.begin()
