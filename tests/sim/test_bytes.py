"""AR8: what a member sends for a committed round is about two vectors, with faults less than four.

Counted are chunks of contributions and results as they leave their provider; each of three sites
owns a third of the vector, so a clean round costs it 2 (1 - 1/3) vectors.
"""

from __future__ import annotations

from collections import Counter

from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.site import SitePart
from swarmtrain_protocols.testing.small import NAMES, START_S, small_spec
from swarmtrain_protocols.testing.swarm import Swarm, assemble

CLEAN_MAX, FAULTY_MAX = 2.2, 4.0
SEEDS = range(4)


def swarm_of(seed: int) -> Swarm:
    parts = [SitePart(name) for name in NAMES]
    return assemble(seed, small_spec(seed), parts, model=NetworkModel(), within_s=START_S)


def vector_nbytes(swarm: Swarm) -> int:
    """One encoded vector: equal for contributions and results of these swarms."""
    codec = get_codec(swarm.spec.manifest.keys.codec_scatter)
    (_, values), chunk = swarm.spec.layout[0], swarm.spec.chunk_values
    return sum(codec.encoded_nbytes(min(chunk, values - n)) for n in range(0, values, chunk))


def vectors_sent(swarm: Swarm, until_s: float) -> dict[str, float]:
    """Vectors that each site sends for each round that is committed from now on."""
    before, rounds = Counter(swarm.world.bytes_moved), len(swarm.rounds.committed)
    swarm.world.run(until_s)
    sent = Counter(swarm.world.bytes_moved) - before
    done = len(swarm.rounds.committed) - rounds
    assert done >= 3
    return {name: sent[name] / done / vector_nbytes(swarm) for name in NAMES}


def test_a_clean_round_costs_each_member_two_vectors_at_most() -> None:
    for seed in SEEDS:
        swarm = swarm_of(seed)
        swarm.world.run(6.0)
        for name, vectors in vectors_sent(swarm, 16.0).items():
            assert 0.5 < vectors <= CLEAN_MAX, (seed, name, vectors)


def test_with_faults_it_is_less_than_four() -> None:
    for seed in SEEDS:
        swarm = swarm_of(seed)
        swarm.world.plan(
            [
                Fault(7.0, "aim-crash", "b", "do:ReducePart", 1.0),
                Fault(9.0, "aim-isolate", "@leader", "append:RoundSet", 1.0),
                Fault(12.0, "pause", "c", "", 1.0),
            ]
        )
        swarm.world.run(6.0)
        for name, vectors in vectors_sent(swarm, 22.0).items():
            assert vectors <= FAULTY_MAX, (seed, name, vectors)
