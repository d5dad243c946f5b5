"""What a session tells its shell: values that compare, match and cannot be changed."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.session_events import Closed, Identified, SessionEvent

PEER = PeerId(b"p" * 32)


def test_every_event_is_a_frozen_value() -> None:
    kinds = get_args(SessionEvent)
    assert len(kinds) == 7 and Closed in kinds
    for kind in kinds:
        names = [field.name for field in dataclasses.fields(kind)]
        one, same = (kind(**dict.fromkeys(names, 1)) for _ in range(2))
        assert one == same
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, names[0], 2)


def test_events_match_by_position() -> None:
    match Closed("idle", "nothing heard", False, True):
        case Closed(code, _, by_peer, opened):
            assert (code, by_peer, opened) == ("idle", False, True)
    assert Identified(PEER) != Identified(PeerId(b"q" * 32))
