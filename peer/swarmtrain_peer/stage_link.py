"""The line between a peer process and the trainer that computes its stages.

A Unix socket in the site's folder, owner only. The peer process sends commands, the trainer answers
each, in order. Frame: u32 LE length of the header, u64 LE length of the payload, header (one of the
structs below in MessagePack), payload (raw bytes). Both sides run as one user; lengths are checked
before memory is taken all the same.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Union

import msgspec
from msgspec import Meta

from swarmtrain_peer.control import ControlClosed, socket_address
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import LocalProtocolError, SwarmError
from swarmtrain_protocols.messages.pipeline import Kind

_HEAD = struct.Struct("<IQ")
_HEADER_BYTES_MAX = 1 << 20
_PAYLOAD_BYTES_MAX = 4 * limits.VALUES_PER_CHANNEL_MAX

Buffer = bytes | bytearray | memoryview


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Trainer -> peer process, once: what model it computes, on what, and how much room it has.

    ``values``: parameters of each stage, the ends first. ``values_max``: of all served together.
    ``plain``: ranges of values of each stage that do not decay, for ``entries.ChannelLayout``.
    ``context`` and ``vocabulary``: what the model reads, 0: not said.
    """

    pid: int
    device: str
    schema_hash: bytes
    values: tuple[int, ...]
    values_max: int
    plain: tuple[tuple[tuple[int, int], ...], ...] = ()
    context: int = 0
    vocabulary: int = 0


class Define(msgspec.Struct, frozen=True, tag="define"):
    """Asks for θ⁰ of a stage: f32 LE [values] comes as payload."""

    stage: int


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Asks for the tensors of a stage: a ``Shapes`` in MessagePack comes as payload."""

    stage: int


class Shapes(msgspec.Struct, frozen=True):
    """What a stage consists of. ``tensors``: (name, shape) in the order of its vector.

    ``depth``: blocks of the whole model.
    """

    depth: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]


class Serve(msgspec.Struct, frozen=True, tag="serve"):
    """The stages to serve from now on; others are dropped with their accumulators."""

    stages: tuple[int, ...]


class Load(msgspec.Struct, frozen=True, tag="load"):
    """New weights of a stage, f32 LE [values] as payload; its accumulator is kept."""

    stage: int
    version: int


class Run(msgspec.Struct, frozen=True, tag="run"):
    """One hop. The payload is inputs, gradient and tokens, of these lengths, one after the other.

    ``sign`` says what becomes of the gradient of the weights: +1 is added to the accumulator, -1
    taken out of it, 0 dropped.
    """

    stage: int
    hop: int
    kind: Kind
    sign: int
    inputs: int
    gradient: int
    tokens: int


class Gradient(msgspec.Struct, frozen=True, tag="gradient"):
    """Asks for the accumulator of a stage: f32 LE [values] comes as payload."""

    stage: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Mode ``diloco``: step a stage's own weights with its accumulator, then clear that.

    ``step`` counts local steps of the run, for the learning rate.
    """

    stage: int
    step: int


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """Mode ``diloco``: asks for what local steps have changed; f32 LE [values] as payload."""

    stage: int


class Clear(msgspec.Struct, frozen=True, tag="clear"):
    """Sets accumulators to zero."""

    stages: tuple[int, ...]


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Asks for the tokens of a micro-batch, or of a batch of the held-out set; payload: encoded.

    A pure function of the run keys and these numbers, the same at every trainer. In mode
    ``diloco``, where drivers count for themselves, ``step`` is the member's ordinal.
    """

    step: int
    micro_batch: int
    held_out: bool = False


class End(msgspec.Struct, frozen=True, tag="end"):
    """The run is over, or this site leaves it: answer, then end."""

    reason: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Answer: it is done; what was asked for is the payload."""

    loss: float = 0.0
    service_s: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Answer: it was not done, and nothing has changed. ``code`` as in ``HopRefused``."""

    code: str
    why: Annotated[str, Meta(max_length=512)]


Command = Define | Describe | Serve | Load | Run | Gradient | Step | Delta | Clear | Tokens | End
_Frame = Union[  # noqa: UP007
    Hello,
    Define,
    Describe,
    Serve,
    Load,
    Run,
    Gradient,
    Step,
    Delta,
    Clear,
    Tokens,
    End,
    Done,
    Failed,
]
_decoder: msgspec.msgpack.Decoder[_Frame] = msgspec.msgpack.Decoder(_Frame)


class StageLine:
    """One end of the line; blocking, used by one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, header: msgspec.Struct, payload: Sequence[Buffer] = ()) -> None:
        """Send a frame.

        Raises:
            ControlClosed: the other side is gone.
        """
        data = msgspec.msgpack.encode(header)
        parts = [memoryview(part).cast("B") for part in payload]
        head = _HEAD.pack(len(data), sum(part.nbytes for part in parts))
        pending = [memoryview(head + data), *(part for part in parts if part.nbytes)]
        try:
            while pending:
                sent = self._socket.sendmsg(pending)
                while pending and sent >= pending[0].nbytes:
                    sent -= pending.pop(0).nbytes
                if pending:
                    pending[0] = pending[0][sent:]
        except OSError as error:
            raise ControlClosed("stage line", str(error)) from None

    def receive(self) -> tuple[_Frame, bytearray]:
        """Wait for a frame.

        Raises:
            ControlClosed: the other side is gone.
            LocalProtocolError: what it said is none of the structs, or too long.
        """
        head = _HEAD.unpack(self._exactly(_HEAD.size))
        if head[0] > _HEADER_BYTES_MAX or head[1] > _PAYLOAD_BYTES_MAX:
            raise LocalProtocolError("stage line", f"a frame of {head[0]} + {head[1]} bytes")
        data = self._exactly(head[0])
        try:
            header = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LocalProtocolError("stage line", str(error)) from None
        return header, self._exactly(head[1])

    def _exactly(self, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        view = memoryview(data)
        while view.nbytes:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise ControlClosed("stage line", str(error)) from None
            if not count:
                raise ControlClosed("stage line", "the other side closed it")
            view = view[count:]
        return data

    def probe(self) -> None:
        """Notice that the other side is gone, while nothing is expected from it.

        Raises:
            ControlClosed: it is.
            LocalProtocolError: it talks without having been asked.
        """
        try:
            data = self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise ControlClosed("stage line", str(error)) from None
        if data:
            raise LocalProtocolError("stage line", "an answer to nothing")
        raise ControlClosed("stage line", "the other side closed it")

    def close(self) -> None:
        """Wake up whoever waits on either side. Safe from any thread, and twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def listen(path: Path) -> socket.socket:
    """Listen for a trainer at ``path``, which only this user may open.

    Raises:
        SwarmError: the folder is gone or the path cannot be bound.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with socket_address(path) as address:
            listener.bind(address)
    except OSError as error:
        listener.close()
        raise SwarmError("the stage line cannot be opened", f"{path}: {error}") from None
    finally:
        os.umask(mask)
    listener.listen(1)
    return listener


def connect(path: Path) -> StageLine:
    """The trainer's end.

    Raises:
        ControlClosed: no peer process listens there.
    """
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_address(path) as address:
            end.connect(address)
    except OSError as error:
        end.close()
        raise ControlClosed(f"no peer process at {path}", str(error)) from None
    return StageLine(end)
