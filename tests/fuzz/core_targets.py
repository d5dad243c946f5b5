"""Targets of the cores: the DHT, a whole node, the ledger that every member derives.

A core is used for some hundred inputs and then made anew: an input is [who says it, message].
"""

from __future__ import annotations

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import Emit, PeerId, Send
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import (
    RecordStore,
    decode_value,
    encode_value,
    is_messagepack,
    refusal,
    sign_record,
)
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import dht as dht_messages
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.fuzz.engine import Target
from tests.fuzz.mutate import splice_msgpack
from tests.fuzz.schema import SchemaSplice
from tests.fuzz.wire_targets import BODIES, ENCODED
from tests.protocols.dht.network import RUN, WALL_S, core
from tests.protocols.rounds_kit import IDS, TRAIN, Log, Net, full, joined

LIVES = 400
"""Inputs after which a core is made anew."""


def _said(seeds: list[bytes]) -> SchemaSplice:
    """Changes [who says it, message] of these seeds."""
    corpus = [messages.decode(data[1:]) for data in seeds]
    return SchemaSplice(messages.decode, messages.encode, corpus, splice_msgpack, skip=1)


# -- DHT --------------------------------------------------------------------------------------

ANN, BOB = FakeKeyring("ann"), FakeKeyring("bob")


def _record(
    sequence: int = 3, ttl_s: int = 60, value: object = "here"
) -> dht_messages.SignedRecord:
    return sign_record(ANN, RUN, b"somewhere", sequence, int(WALL_S) + ttl_s, encode_value(value))


GOOD_RECORD = _record()


def _validator(data: bytes) -> object:
    """A record is refused by name or is ann's own; what is kept decodes for every reader."""
    try:
        record = msgspec.msgpack.decode(data, type=dht_messages.SignedRecord)
    except (ValueError, RecursionError) as error:
        raise PeerFault("malformed", str(error)) from None
    code = refusal(BOB, RUN, record, WALL_S)
    if code:
        return code
    assert record == GOOD_RECORD, "forged"
    store = RecordStore()
    store.put(record, WALL_S, 0.0)
    assert len(store) == 1 and decode_value(record.value) == "here"
    return "kept"


def record() -> Target:
    seeds = [msgspec.msgpack.encode(GOOD_RECORD), msgspec.msgpack.encode(_record(9, -5))]
    return Target("dht_record", _validator, (PeerFault,), seeds, splice_msgpack, 1 << 17)


def _value(data: bytes) -> object:
    data = data[: limits.DHT_VALUE_BYTES_MAX]  # longer ones are refused unread
    if not is_messagepack(data):
        return "no"
    decode_value(data)
    return "yes"


def value() -> Target:
    seeds = [encode_value(x) for x in ("x", 5, [1, 2.5, b"y"], {"a": None}, {"b": {"c": [True]}})]
    return Target("dht_value", _value, (), seeds, splice_msgpack, 1 << 17)


class _Dht:
    """A core that has published, looked up and met three others; any of them says anything."""

    def __init__(self) -> None:
        self.inputs = 0
        self.fresh()

    def fresh(self) -> None:
        self.node: DhtCore = core("me")
        self.now = 0.0
        self.peers = [FakeKeyring(name).peer_id for name in ("ann", "bob", "eve", "joe")]
        for number, peer in enumerate(self.peers[:3]):
            self.node.connected(self.now, peer, (f"{number}.internal:1",))
        self.node.drain()

    def __call__(self, data: bytes) -> object:
        if not data:
            return "nobody"
        message = messages.decode(data[1:])
        if not isinstance(message, DHT_MESSAGES):
            return "other"
        self.inputs += 1
        if self.inputs % LIVES == 0:
            self.fresh()
        self.now += 0.01
        if isinstance(message, dht_messages.StoreRecord) and message.token == TOKEN:
            message = msgspec.structs.replace(message, token=self._token(data[0], message))
        before = len(self.node.held)
        held = {bytes(record.publisher) for record in _all(self.node)}
        self.node.receive(self.now, self.peers[data[0] % 4], message)
        if self.inputs % 16 == 0:
            self.node.tick(self.now)
        effects = self.node.drain()
        sent = [effect for effect in effects if isinstance(effect, Send)]
        assert (
            sum(len(messages.encode(s.message)) for s in sent) < 2 * limits.FRAME_BYTES_CONTROL_MAX
        )
        after = {bytes(record.publisher) for record in _all(self.node)}
        assert after - held <= {ANN.peer_id}, "a record that nobody signed"
        assert len(self.node.held) <= before + 1
        return type(message).__name__, [type(effect).__name__ for effect in effects][:2]

    def _token(self, who: int, message: dht_messages.StoreRecord) -> bytes:
        """What a writer is given by the read that has to come before."""
        self.node.receive(
            self.now, self.peers[who % 4], dht_messages.FindValue(1, message.record.key)
        )
        pages = [x.message for x in self.node.drain() if isinstance(x, Send)]
        return pages[0].token if pages and isinstance(pages[0], dht_messages.Values) else TOKEN


TOKEN = b"t" * 8


def _all(node: DhtCore) -> list[dht_messages.SignedRecord]:
    return [r for key in list(node.held.keys()) for r in node.held.under(key, WALL_S)]


DHT_MESSAGES = tuple(cls for cls in messages.MESSAGES if cls.__module__ == dht_messages.__name__)


def dht() -> Target:
    good = [data for data in ENCODED if isinstance(messages.decode(data), DHT_MESSAGES)]
    good.append(messages.encode(dht_messages.StoreRecord(9, GOOD_RECORD, TOKEN)))
    seeds = [bytes([number % 4]) + data for number, data in enumerate(good)]
    return Target("dht_core", _Dht(), (PeerFault,), seeds, _said(seeds), 1 << 19)


# -- a node -----------------------------------------------------------------------------------


class _Node:
    """The leader of three, one of its followers, in the middle of a run.

    Whatever members and strangers say, the ledger stays: it moves by certified entries alone, and
    nobody here has a second steward's signature to give.
    """

    def __init__(self, index: int) -> None:
        self.index, self.inputs = index, 0
        self.fresh()

    def fresh(self) -> None:
        self.net = Net(3)
        self.net.model()
        for number in range(3):
            self.net.contribute(number, full(float(number)))
        self.net.run(1.0)
        self.node = self.net[self.index].node
        self.now = self.net.now
        self.before = self.node.ledger.snapshot()

    def __call__(self, data: bytes) -> object:
        if not data:
            return "nobody"
        message = messages.decode(data[1:])
        self.inputs += 1
        if self.inputs % LIVES == 0:
            self.fresh()
        self.now += 1e-4
        sender = PeerId(IDS[data[0] % 8])
        if sender == self.node.me:
            return "itself"
        self.node.receive(self.now, sender, message)
        if self.inputs % 32 == 0:
            self.node.tick(self.now)
        effects = self.node.drain()
        assert self.node.ledger.snapshot() == self.before, "moved by what nobody certified"
        told = [x.event for x in effects if isinstance(x, Emit) and isinstance(x.event, fx.Notice)]
        named = [n.fields["peer"] for n in told if n.name == "peer_fault" and "peer" in n.fields]
        assert all(peer == sender.hex() for peer in named), "another is accused"
        return type(message).__name__, [n.fields.get("fault") for n in told][:1]


def _node(index: int, name: str) -> Target:
    net_said = Net(3)
    net_said.model()
    for number in range(3):
        net_said.contribute(number, full(1.0))
    net_said.run(2.0)
    real: dict[str, bytes] = {}
    for sender, _, message in net_said.log:
        data = bytes([IDS.index(sender)]) + messages.encode(message)
        real.setdefault(f"{type(message).__name__} {data[0]}", data)
    seeds = [*real.values(), *(bytes([n % 8]) + data for n, data in enumerate(ENCODED))]
    taker = _Node(index)
    return Target(name, taker, (PeerFault,), seeds, _said(seeds), 1 << 20)


def leader() -> Target:
    return _node(0, "node_leader")


def follower() -> Target:
    return _node(1, "node_follower")


# -- the ledger -------------------------------------------------------------------------------


class _Apply:
    """Any sequence of entries: each fits or is ignored, and all members agree which.

    An entry that does not fit changes nothing but the index. What results can be snapshot, loaded,
    and says the same again.
    """

    def __init__(self) -> None:
        self.inputs = 0
        self.fresh()

    def fresh(self) -> None:
        self.log = Log(*IDS[:4])
        self.ledger: Ledger = self.log.ledger

    def __call__(self, data: bytes) -> object:
        body = e.decode_body(data)
        if isinstance(body, e.Genesis):
            return "genesis"
        self.inputs += 1
        if self.inputs % 50 == 0:
            self.fresh()
        ledger = self.ledger
        before = ledger.snapshot()
        try:
            accepted = ledger.apply(ledger.index + 1, body)
        except Exception:
            self.fresh()
            raise
        after = ledger.snapshot()
        if not accepted:
            ledger.index -= 1
            assert ledger.snapshot() == before, "ignored, and yet it changed something"
            ledger.index += 1
        assert len(after) <= limits.SNAPSHOT_BYTES_MAX
        return type(body).__name__, accepted


def _entries() -> list[bytes]:
    log = Log(*IDS[:3])
    opened = log.open(IDS[:2])
    chosen = log.choose(opened, 0, 1)
    done = log.commit(opened, b"r" * 32)
    some = [joined(IDS[4]), e.MemberLeft(IDS[1], "leave"), opened, chosen, done]
    some += [e.RoundAborted(opened.key, "late"), e.Rewound(1, "x", (TRAIN,), (0,), (bytes(32),))]
    return [e.encode_body(body) for body in some]


def apply() -> Target:
    seeds = [*BODIES, *_entries()]
    corpus = [e.decode_body(data) for data in seeds]
    splice = SchemaSplice(e.decode_body, e.encode_body, corpus, splice_msgpack)
    return Target("ledger_apply", _Apply(), (PeerFault,), seeds, splice, 1 << 20)


MAKERS = (record, value, dht, leader, follower, apply)
