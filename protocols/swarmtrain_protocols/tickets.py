"""Tickets: what a machine needs to find and enter a run (spec 05).

``swarm://host:port[,host:port]/RUN#SECRET``. RUN is the run id in hex; SECRET is a capability that
the founder signed, in URL-safe base64 without padding. The secret stands in the fragment, which no
web client sends to a server, and never appears in a ``repr``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.errors import ConfigError, NotAuthorised
from swarmtrain_protocols.identity import Keyring, verify_ed25519
from swarmtrain_protocols.messages.common import Count, Hash, Signature

Role = Literal["trainer", "observer", "seed"]
ROLES: tuple[Role, ...] = ("trainer", "observer", "seed")

_SCHEME = "swarm://"
_SHAPE = "swarm://host:port[,host:port]/RUN#SECRET"
_RUN = re.compile(r"[0-9a-f]{64}\Z")
_SECRET = re.compile(r"[A-Za-z0-9_-]+\Z")
_TICKET_CHARS_MAX = 4096


class Capability(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the founder lets the bearer do. ``id`` may be logged and revoked; the bytes are secret.

    ``expires_s``: Unix wall clock in whole seconds, 0: never. ``uses``: members that may join with
    it, 0: any number; the ledger counts them. ``vote``: the bearer may become a steward.
    """

    id: Annotated[bytes, Meta(min_length=8, max_length=16)]
    run: Hash
    role: Role = "trainer"
    vote: bool = False
    expires_s: Count = 0
    uses: Count = 0

    def __repr__(self) -> str:
        return f"Capability(id={self.id.hex()}, role={self.role}, vote={self.vote})"


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    payload: Annotated[bytes, Meta(max_length=limits.CAPABILITY_BYTES_MAX)]
    signature: Signature


_encoder = msgspec.msgpack.Encoder()
_signed_decoder = msgspec.msgpack.Decoder(_Signed)
_decoder = msgspec.msgpack.Decoder(Capability)


def sign_capability(founder: Keyring, capability: Capability) -> bytes:
    """The bytes of a ticket's secret: ``[payload, signature]``, domain ``capability``."""
    payload = _encoder.encode(capability)
    _decoder.decode(payload)  # local misuse (a short id, an unknown role) must not be signed
    data = _encoder.encode(_Signed(payload, founder.sign(b"capability", payload)))
    assert len(data) <= limits.CAPABILITY_BYTES_MAX
    return data


def _refused(why: str, todo: str) -> NotAuthorised:
    return NotAuthorised("ticket refused", why, todo)


def _decode_signed(data: bytes) -> tuple[_Signed, Capability]:
    try:
        if len(data) > limits.CAPABILITY_BYTES_MAX:
            raise ValueError("too long")
        signed = _signed_decoder.decode(data)
        return signed, _decoder.decode(signed.payload)
    except (ValueError, RecursionError):  # msgspec and Unicode errors are ValueErrors
        raise _refused(
            "malformed: its secret is no capability", "copy the whole ticket again"
        ) from None


def parse_capability(
    data: bytes,
    *,
    founder: bytes,
    run: bytes,
    wall_s: float,
    verify: Callable[[bytes, bytes, bytes, bytes], bool] = verify_ed25519,
) -> Capability:
    """The capability in ``data`` if the founder signed it for this run and it has not expired.

    ``wall_s`` is the Unix wall clock. The signature is checked before anything in it is believed.

    Raises:
        NotAuthorised: why is one of malformed, bad signature, wrong run, expired.
    """
    signed, capability = _decode_signed(data)
    if not verify(founder, b"capability", signed.payload, signed.signature):
        raise _refused("bad signature: the founder of this run did not sign it", "get a new ticket")
    if capability.run != run:
        raise _refused("wrong run: it was made for another run", "get a ticket for this run")
    if capability.expires_s and wall_s >= capability.expires_s:
        raise _refused(
            f"expired {wall_s - capability.expires_s:.0f} s ago",
            "get a new ticket, and check this machine's clock",
        )
    return capability


def _bad_ticket(why: str) -> ConfigError:
    return ConfigError("malformed ticket", why, f"a ticket looks like {_SHAPE}; copy it whole")


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where to knock, which run, and the secret. ``str()`` gives the URL, ``repr()`` masks it.

    ``run`` is 32 bytes; ``capability`` holds the signed bytes, which only the run's manifest (with
    the founder's key) can verify.
    """

    addresses: tuple[str, ...]
    run: bytes
    capability: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.addresses) <= limits.ADDRESSES_PER_PEER_MAX:
            raise _bad_ticket(f"it needs 1 to {limits.ADDRESSES_PER_PEER_MAX} addresses")
        for number, address in enumerate(self.addresses, 1):
            try:
                split_address(address)
            except ValueError as error:  # not quoted: of a garbled ticket it may hold the secret
                which = f"address {number} of {len(self.addresses)}"
                raise _bad_ticket(f"{which}: {error}") from None
        if len(self.run) != 32:
            raise _bad_ticket("the run id is not 32 bytes")
        try:
            _, capability = _decode_signed(self.capability)
        except NotAuthorised:
            raise _bad_ticket("the secret after # is cut short or damaged") from None
        if capability.run != self.run:
            raise _bad_ticket("its secret belongs to another run")

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """Parse a ticket URL; surrounding white space is ignored.

        Raises:
            ConfigError: what is wrong with it. The message never contains the secret.
        """
        if len(text) > _TICKET_CHARS_MAX:  # looked at first: what is stripped is copied
            raise _bad_ticket(f"longer than {_TICKET_CHARS_MAX} characters")
        text = text.strip()
        if not text.startswith(_SCHEME):
            raise _bad_ticket(f"it does not begin with {_SCHEME}")
        place, sharp, secret = text[len(_SCHEME) :].partition("#")
        hosts, slash, run = place.partition("/")
        if not slash or not _RUN.match(run):
            raise _bad_ticket("the run id between / and # is not 64 hex digits")
        if not sharp or not secret:
            raise _bad_ticket("the secret after # is missing (quote the ticket in a shell)")
        if not _SECRET.match(secret):
            raise _bad_ticket("the secret after # has characters that do not belong there")
        try:
            capability = base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4))
        except (binascii.Error, ValueError):
            raise _bad_ticket("the secret after # is cut short or damaged") from None
        return cls(tuple(hosts.split(",")), bytes.fromhex(run), capability)

    @property
    def unverified(self) -> Capability:
        """What the secret claims (role, expiry), for display before the founder's key is known."""
        return _decode_signed(self.capability)[1]

    def __str__(self) -> str:
        secret = base64.urlsafe_b64encode(self.capability).rstrip(b"=").decode("ascii")
        return f"{_SCHEME}{','.join(self.addresses)}/{self.run.hex()}#{secret}"

    def __repr__(self) -> str:
        return f"Ticket({_SCHEME}{','.join(self.addresses)}/{self.run.hex()[:16]}…#***)"


__all__ = ["ROLES", "Capability", "Role", "Ticket", "parse_capability", "sign_capability"]
