"""Numeric codecs: how vectors become bytes. See ``protocols/spec/06-codecs.md``."""

from __future__ import annotations

from swarmtrain_protocols.codecs.base import Codec, check_finite, check_ieee_arithmetic
from swarmtrain_protocols.codecs.block import Int8
from swarmtrain_protocols.codecs.dense import Bf16, Fp32
from swarmtrain_protocols.codecs.feedback import ErrorFeedback
from swarmtrain_protocols.codecs.kernels import use_numba, uses_numba
from swarmtrain_protocols.errors import ConfigError

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32(), Bf16(), Int8())}
CODEC_NAMES = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    codec = _CODECS.get(name)
    if codec is None:
        raise ConfigError(
            f"unknown codec {name!r}", "no such codec", f"Use one of: {', '.join(CODEC_NAMES)}."
        )
    return codec


__all__ = [
    "CODEC_NAMES",
    "Codec",
    "ErrorFeedback",
    "check_finite",
    "check_ieee_arithmetic",
    "get_codec",
    "use_numba",
    "uses_numba",
]
