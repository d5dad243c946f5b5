"""The cores of one peer, made and wired to each other; how they work together is ``node.NodeCore``.

All of them write their effects to one list and read one ledger. What they need of each other is
handed over here, so that none of them looks for it.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.access import read_capability
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.detector import FailureDetector
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.finder import Finder
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.leadership import Leadership
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.manifest import Manifest
from swarmtrain_protocols.membership import Joiner, Shepherd, SiteConfig
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.pipeline.book import pipeline_state
from swarmtrain_protocols.pipeline.core import PipelineCore
from swarmtrain_protocols.proposals import Proposals
from swarmtrain_protocols.reception import Reception
from swarmtrain_protocols.rounds.catchup import CatchUp
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.leader import RoundLeader
from swarmtrain_protocols.rounds.member import RoundMember
from swarmtrain_protocols.rounds.policy import RoundPolicy, policy_of
from swarmtrain_protocols.shards import data_state
from swarmtrain_protocols.tickets import Capability


class NodeParts(ABC):
    """What a peer consists of.

    Args:
        records: what was durable in earlier incarnations, in order.
        genesis: given by the founding site at its first start only.
        wall_s: Unix seconds at ``now``; used for expiries alone.
        chunk_values: as in ``dataplane.DataPlane``.
    """

    def __init__(
        self,
        *,
        site: SiteConfig,
        manifest: Manifest,
        keyring: Keyring,
        rng: random.Random,
        now: float,
        wall_s: float,
        records: Iterable[bytes] = (),
        genesis: e.Genesis | None = None,
        policy: RoundPolicy | None = None,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        self.me = keyring.peer_id
        self.site = site
        self.manifest = manifest
        self.run = manifest.run_id
        keys = manifest.keys
        self.ledger = Ledger(
            pipeline=pipeline_state(keys.stages, keys.pipeline_mode),
            data=data_state(keys.shards, keys.inner_steps * keys.batch_size),
        )
        self._keyring = keyring
        self._raw: list[Effect] = []
        self._ready: list[Effect] = []
        self._loopback: list[Message] = []
        self._led = self.me
        """Who led the log last."""
        self._linked: dict[PeerId, None] = {}
        self._changed = False
        self._others_at: float | None = None
        """When the cores but DHT, detector and pipeline want ``tick``; None: they must be asked."""
        self.policy = policy or policy_of(manifest.keys, chunk_values)
        self._proposals = Proposals(self._raw)
        self._make_rounds(rng, chunk_values)
        self._make_membership()
        self.dht = DhtCore(
            keyring=keyring,
            rng=rng,
            now=now,
            wall_s=wall_s,
            addresses=site.addresses,
            run=self.run,
        )
        self.finder = Finder(self.me, site.addresses, self.dht, self._raw)
        self.log = LogCore(
            run=self.run,
            founder=manifest.founder,
            keyring=keyring,
            rng=rng,
            now=now,
            records=records,
            genesis=genesis,
            snapshot_of=lambda: self.ledger.snapshot(),  # noqa: PLW0108, the ledger is replaced
        )
        self._follow_log()
        self._pump(now)

    def _make_rounds(self, rng: random.Random, chunk_values: int) -> None:
        self.fetches, self.detector = Fetches(self._raw), FailureDetector(self._raw)
        self.fetches.suspected = self.detector.suspected
        self.member = RoundMember(
            keyring=self._keyring,
            rng=rng,
            ledger=self.ledger,
            fetches=self.fetches,
            out=self._raw,
            max_base_age_rounds=self.policy.max_base_age_rounds,
        )
        self.catchup = CatchUp(
            me=self.me,
            rng=rng,
            ledger=self.ledger,
            fetches=self.fetches,
            out=self._raw,
            member=self.member,
            connected=self.linked,
            keys=self.manifest.keys,
            chunk_values=chunk_values,
        )
        self.catchup.active = self.site.holds_state
        self.leader = RoundLeader(
            me=self.me,
            rng=rng,
            ledger=self.ledger,
            out=self._raw,
            policy=self.policy,
            propose=self._proposals.propose,
            connected=self.responsive,
            verify=self._keyring.verify,
        )
        self.pipeline = PipelineCore(
            me=self.me,
            keys=self.manifest.keys,
            ledger=self.ledger,
            out=self._raw,
            rng=rng,
            member=self.member,
            rounds=self.leader,
            catchup=self.catchup,
            connected=self.linked,
            propose=self._proposals.propose,
            pump=self._pump,
        )

    def _follow_log(self) -> None:
        self._proposals.log = self.log
        self.leadership = Leadership(
            me=self.me,
            ledger=self.ledger,
            log=self.log,
            out=self._raw,
            linked=self._linked,
            changed=self._leader_changed,
            announce=self._announce,
            duties=(self.shepherd, self.leader, self.pipeline),
            dispatch=self._dispatch,
        )

    def _make_membership(self) -> None:
        self.joiner = Joiner(self.me, self.site, self.ledger, self._raw)
        self.shepherd = Shepherd(
            me=self.me,
            ledger=self.ledger,
            out=self._raw,
            propose=self._proposals.propose,
            change_voters=self._proposals.change_voters,
            check_capability=self._check_capability,
            linked=self.linked,
            max_rounds=self.manifest.keys.max_rounds,
            stewards=self.manifest.keys.stewards,
            patience=lambda: self.log.timeouts.factor,
        )
        self.reception = Reception(
            ledger=self.ledger,
            manifest=self.manifest,
            out=self._raw,
            joiner=self.joiner,
            shepherd=self.shepherd,
            rounds=self.leader,
            propose=self._proposals.propose,
            verify=self._keyring.verify,
        )

    def linked(self) -> list[PeerId]:
        """Peers with a live link, in the order in which the links were made."""
        return list(self._linked)

    def responsive(self) -> list[PeerId]:
        """Those of them that nobody here waits for in vain: whom the leader's rounds count on."""
        suspected = self.detector.suspected
        if not suspected:
            return list(self._linked)
        return [peer for peer in self._linked if peer not in suspected]

    def _check_capability(self, now: float, data: bytes) -> Capability:
        wall_s, verify = self.dht.wall(now), self._keyring.verify
        return read_capability(data, self.ledger, self.manifest.founder, self.run, wall_s, verify)

    @abstractmethod
    def _pump(self, now: float) -> None:
        """Carry effects between the cores until none is left inside."""

    @abstractmethod
    def _dispatch(self, now: float, peer: PeerId, message: Message) -> None:
        """Give a message to the core that it is for."""

    @abstractmethod
    def _leader_changed(self, now: float, leader: PeerId | None) -> None:
        """The log has another leader, or none."""

    @abstractmethod
    def _announce(self, now: float) -> None:
        """Tell the leader all that it may need."""
