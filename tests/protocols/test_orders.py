"""Orders count only as the founder signed them, for this run, and not for long."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.identity import Ed25519Keyring, verify_ed25519
from swarmtrain_protocols.orders import is_authorised, sign_order

FOUNDER = Ed25519Keyring(b"\x01" * 32)
OTHER = Ed25519Keyring(b"\x02" * 32)
RUN = bytes(range(32))
AT = 50_000
ORDER = sign_order(FOUNDER, RUN, AT, e.Paused("tea"))


def good(order: Any = ORDER, **changes: Any) -> bool:
    given = {"founder": FOUNDER.peer_id, "run": RUN, "index": AT, "verify": verify_ed25519}
    return is_authorised(order, **{**given, **changes})


def test_the_founder_is_obeyed() -> None:
    assert good() and e.decode_body(ORDER.body) == e.Paused("tea")
    young = sign_order(FOUNDER, RUN, -1, e.Paused("tea"))
    assert young.at == 0 and good(young, index=0)


@pytest.mark.parametrize("position", range(0, 64, 7))
def test_no_other_signature_will_do(position: int) -> None:
    flipped = bytearray(ORDER.signature)
    flipped[position] ^= 1
    assert not good(msgspec.structs.replace(ORDER, signature=bytes(flipped)))
    assert not good(msgspec.structs.replace(ORDER, signature=b""))


def test_nothing_that_is_signed_may_change() -> None:
    assert not good(msgspec.structs.replace(ORDER, body=e.encode_body(e.RunEnded("tea"))))
    assert not good(msgspec.structs.replace(ORDER, at=AT + 1))
    assert not good(run=bytes(32))
    assert not good(founder=OTHER.peer_id)
    assert not good(sign_order(OTHER, RUN, AT, e.Paused("tea")))


def test_an_old_order_is_void() -> None:
    assert good(index=AT + limits.ORDER_ENTRIES) and good(index=AT - limits.ORDER_ENTRIES)
    assert not good(index=AT + limits.ORDER_ENTRIES + 1)
    assert not good(index=AT - limits.ORDER_ENTRIES - 1)
