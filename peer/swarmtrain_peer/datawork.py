"""What the node wants done with bytes: parts reduced, results stored and applied, states fetched.

The work runs on the pool (tiny work on the spot) and comes back to the node on the loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from swarmtrain_peer import host
from swarmtrain_peer.keeper import Keeper
from swarmtrain_peer.roundclock import RoundClock
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import StateSpoilt, SwarmError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import RoundKey
from swarmtrain_protocols.rounds import effects as fx

if TYPE_CHECKING:
    from swarmtrain_peer.driver import Driver

INLINE_BYTES_MAX = 64 * 1024
"""Work on fewer bytes than this is done on the spot: a thread costs more."""


class DataWork:
    """The part of a ``Driver`` that carries out effects on the data plane.

    ``on_state`` is called on a pool thread with a channel whose state has just moved and holds
    still.
    """

    def __init__(
        self,
        driver: Driver,
        data: DataPlane,
        keeper: Keeper | None,
        clock: RoundClock,
        on_event: Callable[[object], None],
        on_state: Callable[[str], None],
    ) -> None:
        self._driver = driver
        self._data = data
        self._keeper = keeper
        self._clock = clock
        self._on_event = on_event
        self._on_state = on_state

    def execute(self, effect: Effect) -> bool:
        """Begin what the effect asks for; False if it is none of these."""
        if isinstance(effect, fx.BeginAttempt):
            self._data.begin(effect.opened)
        elif isinstance(effect, fx.MeasurePart):
            self._measure(effect)
        elif isinstance(effect, fx.ReducePart):
            self._reduce(effect)
        elif isinstance(effect, fx.StoreResult):
            self._store_result(effect.key)
        elif isinstance(effect, fx.ApplyResult):
            self._apply(effect)
        elif isinstance(effect, fx.PrepareSnapshot):
            wanted = effect.snapshot
            self._driver.offload(
                partial(self._data.prepare, wanted),
                lambda found: self._driver.run(
                    self._driver.node.prepared, wanted.channel, wanted.root, *found
                ),
                partial(self._install_failed, wanted.channel),
            )
        elif isinstance(effect, fx.InstallSnapshot):
            install = partial(self._data.install, effect.snapshot)
            self._driver.offload(
                partial(self._advance, effect.snapshot.channel, install),
                partial(self._applied, effect.snapshot.channel),
                partial(self._install_failed, effect.snapshot.channel),
            )
        elif isinstance(effect, fx.CompleteResult):
            result = effect.result
            self._driver.offload(
                partial(self._complete, result),
                lambda _: self._driver.run(self._driver.node.completed, result),
                partial(self._install_failed, result.channel),
            )
        elif isinstance(effect, fx.ReleaseAttempt):
            self._data.release_attempt(effect.key)
            self._driver.allotment.release(effect.key)
        elif isinstance(effect, fx.ReleaseContribution):
            self._data.drop(effect.root)
        elif isinstance(effect, fx.DropState):
            self._data.drop_state(effect.channel)
            if self._keeper is not None:
                self._keeper.drop_state(effect.channel)
        else:
            return False
        return True

    def attempt_bytes(self, purpose: object) -> int:
        """Size in fp32 of what is fetched for an attempt; 0: for none."""
        key = getattr(purpose, "key", None)
        return 0 if key is None else self._key_bytes(key)

    def _key_bytes(self, key: RoundKey) -> int:
        channel = self._driver.node.ledger.channels.get(key.channel)
        return INLINE_BYTES_MAX if channel is None else channel.values * 4

    def _measure(self, effect: fx.MeasurePart) -> None:
        self._driver.offload(
            partial(self._data.measure, effect.key, effect.part, effect.index),
            partial(self._driver.run, self._driver.node.measured, effect),
            lambda error: None,  # released meanwhile: nobody waits for it
            nbytes=self._key_bytes(effect.key),
        )

    def _reduce(self, effect: fx.ReducePart) -> None:
        key, part, begin_s = effect.key, effect.part, host.mono_s()

        def done(root: bytes) -> None:
            self._clock.worked(key, "reduce", begin_s, host.mono_s())
            self._clock.names(root, key)
            self._driver.run(self._driver.node.reduced, key, part, root)

        self._driver.offload(
            partial(self._data.reduce, key, part, effect.chosen),
            done,
            lambda error: self._on_event(
                fx.Notice("contribution_rejected", {"reason": f"{key} part {part}: {error}"})
            ),
            nbytes=self._key_bytes(key),
        )

    def _store_result(self, key: RoundKey) -> None:
        def work() -> tuple[Blob, bool, float]:
            blob = self._data.assemble(key)
            stepwise = self._data.rules.stepwise(key.channel)
            norm = self._data.square_norm(blob.root) if stepwise else 0.0
            return blob, self._to_disk(key.channel, key.round, blob), norm

        def done(outcome: tuple[Blob, bool, float]) -> None:
            blob, durable, norm = outcome
            self._clock.names(blob.root, key)
            self._driver.run(self._driver.node.stored, key, blob.root, durable, norm)

        group = not key.channel.startswith("train/")
        self._driver.offload(
            work,
            done,
            lambda error: None,  # released meanwhile: nobody waits for it
            nbytes=self._key_bytes(key) if group else INLINE_BYTES_MAX,
        )

    def _to_disk(self, channel: str, round_number: int, blob: Blob) -> bool:
        if self._keeper is None or not channel.startswith("train/"):
            return False
        return self._keeper.store_result(
            channel, round_number, blob, self._data.result_codec(blob.root)
        )

    def _complete(self, result: fx.WholeResult) -> None:
        blob = self._data.complete(result)
        self._to_disk(result.channel, result.round, blob)

    def _apply(self, effect: fx.ApplyResult) -> None:
        begin_s = host.mono_s()

        def done(outcome: tuple[int, bytes]) -> None:
            key = self._clock.latest(effect.channel, effect.round)
            if key is not None:
                self._clock.worked(key, "apply", begin_s, host.mono_s())
            self._applied(effect.channel, outcome)

        apply = partial(self._data.apply, effect)

        def failed(error: SwarmError) -> None:
            if not isinstance(error, StateSpoilt):
                raise error  # a committed result that cannot be applied
            self._install_failed(effect.channel, error, spoilt=True)

        self._driver.offload(partial(self._advance, effect.channel, apply), done, failed)

    def _advance(self, channel: str, work: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
        """Move a state, then show it to whoever watches while it holds still."""
        outcome = work()
        self._on_state(channel)
        return outcome

    def _applied(self, channel: str, outcome: tuple[int, bytes]) -> None:
        self._driver.run(self._driver.node.applied, channel, outcome[0], outcome[1])

    def _install_failed(self, channel: str, error: SwarmError, spoilt: bool = False) -> None:
        self._driver.run(self._driver.node.install_failed, channel, str(error), spoilt)
