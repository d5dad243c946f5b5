"""Every control message: one closed tagged union of msgspec structs, MessagePack on the wire."""

from __future__ import annotations

import types
from typing import Any, Union

import msgspec

from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages import (
    dht,
    fetch,
    log,
    member,
    pipeline,
    reach,
    rounds,
    session,
)
from swarmtrain_protocols.messages.common import RoundKey

Message = msgspec.Struct
"""Any struct defined in a module of this package with a ``tag``."""


def _structs(module: types.ModuleType) -> list[type[msgspec.Struct]]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == module.__name__
        and value.__struct_config__.tag is not None
    ]
    return sorted(found, key=lambda cls: str(cls.__struct_config__.tag))


MESSAGES: tuple[type[msgspec.Struct], ...] = tuple(
    cls
    for module in (session, member, log, rounds, fetch, dht, pipeline, reach)
    for cls in _structs(module)
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Union[MESSAGES])  # noqa: UP007


def encode(message: msgspec.Struct) -> bytes:
    """MessagePack bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Decode and validate one message.

    Raises:
        PeerFault: ``malformed`` for anything outside the schema.
    """
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerFault("malformed", str(error)) from None
    return message


__all__ = ["MESSAGES", "Message", "RoundKey", "decode", "encode"]
