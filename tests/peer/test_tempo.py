"""What a trainer hears of the pace and the progress of the run."""

from __future__ import annotations

from swarmtrain_peer.tempo import tempo_of
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import RoundKey

A, B = bytes(32), bytes(31) + b"\1"


def commit(ledger: Ledger, channel: str, number: int, samples: float, phase_s: float) -> None:
    key = RoundKey(0, channel, number, 0)
    listed = (e.Contributor(A, bytes(32), samples, number), e.Contributor(B, bytes(32), 1.0, 0))
    parts = (e.Part(0, 1, A, B),)
    opened = e.RoundOpened(key, listed, parts, (A,), 8, "fp32", "fp32", bytes(32), phase_s)
    chosen = e.RoundSet(key, (e.Coefficient(0, 1.0),))
    for body in (opened, chosen, e.RoundCommitted(key, bytes(32), (A,))):
        assert ledger.apply(ledger.index + 1, body)


def test_progress_is_that_of_the_channel_that_is_least_far() -> None:
    ledger = Ledger()
    assert tempo_of(ledger) == {"pace_s": 0.0, "progress": 0.0, "gain": 0.0}
    layout = tuple(e.ChannelLayout(name, 8) for name in ("train/0/0", "train/0/1"))
    assert ledger.apply(0, e.ModelDefined(bytes(32), layout, (bytes(32), bytes(32)), A))
    assert tempo_of(ledger)["progress"] == 0.0
    for number in range(3):
        commit(ledger, "train/0/0", number, 40.0, 7.0)
    assert tempo_of(ledger) == {"pace_s": 7.0, "progress": 0.0, "gain": 0.0}
    for number in range(2):
        commit(ledger, "train/0/1", number, 30.0 + number, 8.0)
    assert tempo_of(ledger) == {"pace_s": 8.0, "progress": 61.0, "gain": 31.0}
