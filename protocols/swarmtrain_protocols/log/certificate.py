"""What stewards sign, and how a newcomer that knows only run and founder checks it.

The chain of trust: the founder signs genesis, which names the first steward. Every change of the
steward set is certified by a majority of the set before it, and the digest over all changes is
part of every later statement. Those changes with their certificates, the *links*, are kept for
ever, so that the set in force can be derived without the entries in between (spec 04, §3).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import blake3
import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import Genesis, StewardsChanged, decode_body
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log import anchor
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.manifest import check_genesis
from swarmtrain_protocols.messages.common import Count, Hash, Key
from swarmtrain_protocols.messages.log import (
    Certificate,
    Endorsement,
    Endorsements,
    Recovery,
    SnapshotCertificate,
    WireEntry,
)

DOMAIN = b"log"
SNAPSHOT_DOMAIN = b"snapshot"
_NUMBERS = struct.Struct("<QQQ")


class Link(msgspec.Struct, frozen=True, array_like=True):
    """A committed ``StewardsChanged`` entry and the certificate that committed it."""

    index: Count
    entry: WireEntry
    certificate: Certificate


class SnapshotBody(msgspec.Struct, frozen=True, array_like=True):
    """What the stewards sign the hash of: equal bytes at all members with equal ledgers."""

    index: Count
    term: Count
    chain_hash: Hash
    generation: Count
    capable: Annotated[tuple[Key, ...], Meta(max_length=limits.MEMBERS_MAX)]
    ledger: Annotated[bytes, Meta(max_length=limits.SNAPSHOT_BYTES_MAX)]


class SnapshotFile(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot that proves itself: what is kept on disk and sent to those far behind.

    With a ``recovery`` trust begins there, and ``links`` are those since.
    """

    genesis: Annotated[bytes, Meta(max_length=limits.ENTRY_BYTES_MAX)]
    links: Annotated[tuple[Link, ...], Meta(max_length=limits.STEWARD_LINKS_MAX)]
    body: Annotated[bytes, Meta(max_length=limits.SNAPSHOT_BYTES_MAX)]
    certificate: SnapshotCertificate
    recovery: Recovery | None = None


_encoder = msgspec.msgpack.Encoder()
_body_decoder: msgspec.msgpack.Decoder[SnapshotBody] = msgspec.msgpack.Decoder(SnapshotBody)
_file_decoder: msgspec.msgpack.Decoder[SnapshotFile] = msgspec.msgpack.Decoder(SnapshotFile)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A decoded and checked snapshot, ready to become the base of a log."""

    file: SnapshotFile
    body: SnapshotBody
    view: View


def encode_snapshot_body(body: SnapshotBody) -> tuple[bytes, bytes]:
    """The bytes of a snapshot body and their BLAKE3 hash."""
    data = _encoder.encode(body)
    return data, blake3.blake3(data).digest()


def encode_snapshot_file(file: SnapshotFile) -> bytes:
    """The bytes that are stored and sent."""
    return _encoder.encode(file)


def statement(run: bytes, view: View, term: int, index: int, chain_hash: bytes) -> bytes:
    """What a steward signs about its log, in the domain ``log``.

    run (32) ‖ u64 generation ‖ u64 term ‖ u64 index ‖ chain hash (32) ‖ steward digest (32).
    """
    return run + _NUMBERS.pack(view.generation, term, index) + chain_hash + view.digest


@dataclass(frozen=True, slots=True)
class Trust:
    """What this site believes before it has heard anything: one run, its founder, its own keys."""

    run: bytes
    founder: bytes
    keyring: Keyring

    def genesis(self, data: bytes) -> tuple[Genesis, View]:
        """Check entry 0 and return it with the first view.

        Raises:
            PeerFault: ``malformed`` or ``bad_genesis``.
        """
        body = decode_body(data)
        if not isinstance(body, Genesis):
            raise PeerFault("bad_genesis", "entry 0 is something else")
        check_genesis(body, run=self.run, founder=self.founder, verify=self.keyring.verify)
        return body, View.first(body, data)

    def recovered(self, recovery: Recovery) -> View:
        """The first view of a log that the founder began again.

        Raises:
            PeerFault: ``bad_recovery`` or ``bad_deed``.
        """
        return anchor.recovered_view(self.run, self.founder, self.keyring.verify, recovery)

    def sign(self, view: View, term: int, index: int, chain_hash: bytes) -> bytes:
        """This site's signature over its log up to ``index``."""
        return self.keyring.sign(DOMAIN, statement(self.run, view, term, index, chain_hash))

    def signed_by(
        self, peer: bytes, signature: bytes, view: View, term: int, index: int, chain_hash: bytes
    ) -> bool:
        payload = statement(self.run, view, term, index, chain_hash)
        return self.keyring.verify(peer, DOMAIN, payload, signature)

    def certifies(self, view: View, certificate: Certificate) -> bool:
        """True if a majority under ``view``, the view at its index, signed the certificate."""
        c = certificate
        if c.generation != view.generation or c.stewards != view.digest:
            return False
        payload = statement(self.run, view, c.term, c.index, c.chain_hash)
        return self._majority(view, DOMAIN, payload, c.endorsements)

    def sign_snapshot(
        self, view: View, term: int, index: int, chain_hash: bytes, snapshot_hash: bytes
    ) -> bytes:
        """This site's signature over its snapshot: the log's statement ‖ snapshot hash."""
        payload = statement(self.run, view, term, index, chain_hash) + snapshot_hash
        return self.keyring.sign(SNAPSHOT_DOMAIN, payload)

    def snapshot_signed_by(
        self,
        peer: bytes,
        signature: bytes,
        view: View,
        term: int,
        index: int,
        chain_hash: bytes,
        snapshot_hash: bytes,
    ) -> bool:
        payload = statement(self.run, view, term, index, chain_hash) + snapshot_hash
        return self.keyring.verify(peer, SNAPSHOT_DOMAIN, payload, signature)

    def certifies_snapshot(self, view: View, certificate: SnapshotCertificate) -> bool:
        """As ``certifies``, for a snapshot."""
        c = certificate
        if c.generation != view.generation or c.stewards != view.digest:
            return False
        payload = statement(self.run, view, c.term, c.index, c.chain_hash) + c.snapshot_hash
        return self._majority(view, SNAPSHOT_DOMAIN, payload, c.endorsements)

    def _majority(
        self, view: View, domain: bytes, payload: bytes, endorsements: Endorsements
    ) -> bool:
        valid: dict[bytes, bool] = {}
        for item in endorsements:
            if item.signer in valid or not view.has_voter(item.signer):
                continue
            valid[item.signer] = self.keyring.verify(item.signer, domain, payload, item.signature)
        return view.quorum(lambda peer: valid.get(peer, False))

    def snapshot(self, data: bytes) -> Snapshot:
        """Check a snapshot file down to the founder's signature.

        Raises:
            PeerFault: ``malformed``, ``bad_genesis``, ``bad_recovery``, ``bad_deed``,
                ``bad_stewards`` or ``bad_certificate``.
        """
        try:
            file = _file_decoder.decode(data)
            body = _body_decoder.decode(file.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PeerFault("malformed", f"snapshot: {error}") from None
        view = self._walk(file)
        c = file.certificate
        view = view_of_snapshot(view, body)
        stated = (c.index, c.term, c.chain_hash, c.snapshot_hash)
        actual = (body.index, body.term, body.chain_hash, blake3.blake3(file.body).digest())
        if stated != actual or not self.certifies_snapshot(view, c):
            raise PeerFault("bad_certificate", f"snapshot at {body.index} is not certified")
        if file.recovery is not None and not self._begins_so(file.recovery, body):
            raise PeerFault("bad_recovery", f"snapshot at {body.index} is not what was recovered")
        return Snapshot(file, body, view)

    def _begins_so(self, recovery: Recovery, body: SnapshotBody) -> bool:
        """Whether this is the ledger that the founder vouched for, or a later one."""
        if body.index != recovery.index:
            return body.index > recovery.index and body.generation >= recovery.generation
        return (
            (body.generation, body.term) == (recovery.generation, recovery.term)
            and body.chain_hash == anchor.digest(self.run, recovery)
            and anchor.content_hash(body.capable, body.ledger) == recovery.content
        )

    def _walk(self, file: SnapshotFile) -> View:
        """The view after all links, each certified by the set before it."""
        _, view = self.genesis(file.genesis)
        index = 0
        if file.recovery is not None:
            view, index = self.recovered(file.recovery), file.recovery.index
        for link in file.links:
            body = decode_body(link.entry.body)
            if not isinstance(body, StewardsChanged) or link.index <= index:
                raise PeerFault("bad_stewards", f"link at {link.index} is no later change")
            # The grants are proven by the certificate: stewards refuse changes without them.
            granted = View(
                link.certificate.generation,
                view.voters,
                view.joint,
                view.digest,
                frozenset(body.voters),
                view.founding,
            )
            view = granted.after(link.index, link.entry.term, link.entry.body, body)
            if link.certificate.index < link.index or not self.certifies(view, link.certificate):
                raise PeerFault("bad_certificate", f"change at {link.index} is not certified")
            index = link.index
        return view


def view_of_snapshot(view: View, body: SnapshotBody) -> View:
    """The steward set of ``view`` with generation and grants as the snapshot states them."""
    return View(
        body.generation,
        view.voters,
        view.joint,
        view.digest,
        frozenset(body.capable),
        view.founding,
    )


def endorsed(signatures: Mapping[bytes, bytes]) -> tuple[Endorsement, ...]:
    """Signatures by signer, as they stand in a certificate: in key order."""
    return tuple(Endorsement(peer, signatures[peer]) for peer in sorted(signatures))
