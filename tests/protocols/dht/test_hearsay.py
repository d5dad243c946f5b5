"""Nobody can have a third party dialled by naming it again and again."""

from __future__ import annotations

import msgspec

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import Connect, PeerId
from swarmtrain_protocols.dht.hearsay import Hearsay
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.messages.dht import NodeInfo, Nodes, Values
from tests.protocols.dht.network import Network

PAUSE_S, COUNT = limits.DHT_HEARSAY_PAUSE_S, limits.DHT_HEARSAY_TRIES_MAX


def named(number: int, *addresses: str) -> Contact:
    return Contact(PeerId(number.to_bytes(32, "big")), addresses)


def test_a_public_host_is_left_alone_whatever_the_port() -> None:
    hearsay = Hearsay()
    for number in range(COUNT):
        assert hearsay.allowed(1.0, (f"8.8.4.4:{number + 1}",))
        hearsay.tried(1.0, named(number, f"8.8.4.4:{number + 1}"))
    assert hearsay.allowed(2.0, ("8.8.4.4:99", "8.8.8.8:99")) == ("8.8.8.8:99",)
    assert hearsay.allowed(1.0 + PAUSE_S, ("8.8.4.4:99",)) == ()
    assert hearsay.allowed(2.0 + PAUSE_S, ("8.8.4.4:99",)) == ("8.8.4.4:99",)


def test_behind_one_private_host_every_port_stands_for_itself() -> None:
    hearsay = Hearsay()
    for number in range(100):
        hearsay.tried(1.0, named(number, f"127.0.0.1:{number + 1}"))
    assert hearsay.allowed(1.0, ("127.0.0.1:1",))
    for number in range(COUNT):
        hearsay.tried(1.0, named(number, "127.0.0.1:7"))
    assert hearsay.allowed(1.0, ("127.0.0.1:7", "127.0.0.1:1")) == ("127.0.0.1:1",)


def test_an_answer_from_there_clears_the_name() -> None:
    hearsay = Hearsay()
    for number in range(COUNT):
        hearsay.tried(1.0, named(number, "8.8.4.4:1"))
    hearsay.found(named(99, "8.8.4.4:5"))
    assert hearsay.allowed(1.0, ("8.8.4.4:1",))


def test_it_remembers_a_bounded_number_of_hosts() -> None:
    hearsay = Hearsay()
    for number in range(limits.DHT_HEARSAY_HOSTS_MAX + 100):
        hearsay.tried(1.0, named(number, f"8.{number % 200}.{number // 200}.4:1"))
    assert len(hearsay) == limits.DHT_HEARSAY_HOSTS_MAX


def dials_of(network: Network, node: DhtCore, victim: str) -> int:
    """How often ``node`` dials ``victim`` in twenty lookups."""
    dials = 0
    drain = node.drain

    def counting() -> list[object]:
        nonlocal dials
        effects = drain()
        for effect in effects:
            if isinstance(effect, Connect):
                dials += sum(address.startswith(victim) for address in effect.addresses)
        return effects

    node.drain = counting  # type: ignore[method-assign,assignment]
    for number in range(20):
        network.settle(node, node.get(network.now, f"k{number}"), limit_s=120.0)
    return dials


def test_liars_cannot_aim_the_dials_of_others_at_a_third_party() -> None:
    network = Network(3)
    nodes = network.grow(12)

    def reflect(message: messages.Message) -> messages.Message:
        if isinstance(message, (Nodes, Values)):
            ghosts = tuple(
                NodeInfo(network.rng.randbytes(32), (f"8.8.4.4:{network.rng.randint(1, 65535)}",))
                for _ in range(limits.DHT_K)
            )
            return msgspec.structs.replace(message, contacts=ghosts)
        return message

    for liar in nodes[2:6]:
        network.tampers[liar.me.peer] = reflect
    assert 0 < dials_of(network, nodes[0], "8.8.4.4") <= COUNT
