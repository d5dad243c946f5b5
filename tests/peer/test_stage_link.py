"""The line between a peer process and the trainer of its stages."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.control import ControlClosed
from swarmtrain_protocols.errors import LocalProtocolError


def pair() -> tuple[sl.StageLine, sl.StageLine]:
    left, right = socket.socketpair()
    return sl.StageLine(left), sl.StageLine(right)


def test_frames_with_large_payloads_arrive_whole() -> None:
    here, there = pair()
    parts = [os.urandom(3 << 20), b"", os.urandom(17)]
    run = sl.Run(1, 1, "backward", 1, len(parts[0]), 0, len(parts[2]))
    sender = threading.Thread(target=here.send, args=(run, parts))
    sender.start()
    header, payload = there.receive()
    sender.join()
    assert header == run and payload == b"".join(parts)
    there.send(sl.Done(0.5, 0.25), [memoryview(b"abcd")])
    assert here.receive() == (sl.Done(0.5, 0.25), bytearray(b"abcd"))


def test_the_other_side_going_away_is_a_typed_error() -> None:
    here, there = pair()
    there.close()
    with pytest.raises(ControlClosed):
        here.receive()
    with pytest.raises(ControlClosed):
        for _ in range(2):
            here.send(sl.Clear((1,)), [bytes(1 << 20)])
    here.close()
    here.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff" + bytes(8),
        b"\x01\0\0\0" + b"\xff" * 8,
        b"\x01\0\0\0" + bytes(8) + b"\xc1",
        b"\x02\0\0\0" + bytes(8) + b"\xa1x",
    ],
)
def test_what_is_no_frame_is_refused_before_memory_is_taken(data: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(data)
    left.close()
    with pytest.raises(LocalProtocolError, match="stage line"):
        sl.StageLine(right).receive()
    right.close()


def test_only_the_owner_may_open_the_line(tmp_path: Path) -> None:
    path = tmp_path / "stage.sock"
    with pytest.raises(ControlClosed):
        sl.connect(path)
    listener = sl.listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    line = sl.connect(path)
    end, _ = listener.accept()
    line.send(sl.Serve((0, 1)))
    assert sl.StageLine(end).receive()[0] == sl.Serve((0, 1))
    listener.close()
    again = sl.listen(path)  # a socket that an earlier life left behind is replaced
    again.close()
