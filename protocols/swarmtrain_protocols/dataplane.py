"""Where the numbers are: buffers, blobs and canonical states behind the handles of the cores.

Pure: no thread, no disk. The peer process calls it from worker threads, one call per attempt and
part at a time; the simulator calls it inline. ``provide`` may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import check_finite, get_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.entries import RoundOpened, RoundSet
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.incoming import Incoming
from swarmtrain_protocols.keptresults import Form, KeptResults
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.merkle import Blob, leaf_hash
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rules import Rules
from swarmtrain_protocols.state import (
    CanonicalState,
    Layout,
    Mapper,
    chunk_buffers,
    decode_chunks,
    header_chunk,
    reduce_chunk,
    square_of,
)

Room = Callable[[fx.Snapshot, Sequence[int]], Incoming]
"""Makes place for a snapshot with chunks of these sizes, or finds that of an earlier life."""


@dataclass(slots=True)
class _Buffers:
    """One attempt: what was fetched and what was computed."""

    opened: RoundOpened
    contributions: dict[tuple[int, int], list[memoryview]] = field(default_factory=dict)
    parts: dict[int, Blob] = field(default_factory=dict)
    incoming: dict[int, list[memoryview]] = field(default_factory=dict)
    released: bool = False


class DataPlane:
    """All tensor bytes of one node.

    Args:
        keys: of the run; None: it is no pipeline.
        run: maps chunk work over threads; ``map`` for inline work.
        chunk_values: values per chunk; smaller only in tests and in the simulator.

    ``room``: where snapshots are received; memory, if nobody says otherwise.
    """

    def __init__(
        self,
        *,
        keys: RunKeys | None = None,
        run: Mapper = map,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        self.rules = Rules(keys)
        self.states: dict[str, CanonicalState] = {}
        self._run = run
        self._chunk_values = chunk_values
        self._blobs: dict[bytes, Blob] = {}
        self._uses: dict[bytes, int] = {}
        self._attempts: dict[RoundKey, _Buffers] = {}
        self._results = KeptResults(self.drop)
        self.room: Room = lambda snapshot, sizes: Incoming.in_memory(snapshot.root, sizes)
        self._incoming: dict[tuple[str, type], Incoming] = {}
        self._foreign: dict[tuple[str, str], tuple[bytes, list[memoryview]]] = {}

    def layout(self, values: int) -> Layout:
        return Layout(values, self._chunk_values)

    # -- blobs ------------------------------------------------------------------------------

    def provide(self, root: bytes) -> Blob | None:
        """The blob under ``root`` if it is in memory here."""
        return self._blobs.get(root)

    def register(self, blob: Blob) -> None:
        """Serve a blob; registered twice it must be dropped twice."""
        self._blobs.setdefault(blob.root, blob)
        self._uses[blob.root] = self._uses.get(blob.root, 0) + 1

    def drop(self, root: bytes) -> None:
        """Undo one ``register``; unknown roots are ignored."""
        uses = self._uses.get(root, 0) - 1
        if uses > 0:
            self._uses[root] = uses
        else:
            self._uses.pop(root, None)
            self._blobs.pop(root, None)

    # -- contributions ----------------------------------------------------------------------

    def encode(self, values: F32, codec: str, *, borrow: bool = False) -> Blob:
        """Encode and register a contribution f32[n].

        With ``borrow`` the bytes of an fp32 contribution are those of ``values`` themselves, which
        must hold still until the contribution is decided.

        Raises:
            LocalProtocolError: NaN, infinity or absurd magnitudes in it.
        """
        layout, coder = self.layout(values.size), get_codec(codec)
        if borrow and codec == "fp32":
            whole = memoryview(values.data).cast("B")
            chunks = [whole[p.start * 4 : p.stop * 4] for p in map(layout.part, _all(layout))]
        else:
            borrow = False
            chunks = chunk_buffers([layout.encoded_nbytes(i, coder) for i in _all(layout)])
        leaves: list[bytes] = [b""] * len(chunks)

        def work(index: int) -> None:
            part = values[layout.part(index)]
            check_finite(part)
            if not borrow:
                coder.encode(part, chunks[index])
            leaves[index] = leaf_hash(chunks[index])

        for _ in self._run(work, _all(layout)):
            pass
        blob = Blob(chunks, leaves)
        self.register(blob)
        return blob

    # -- an attempt -------------------------------------------------------------------------

    def begin(self, opened: RoundOpened) -> None:
        self._attempts.setdefault(opened.key, _Buffers(opened))

    def destinations(self, purpose: object, first: int, count: int) -> list[memoryview]:
        """Writable memory for the chunks of a fetch, taken before anything is asked for.

        Raises:
            LocalProtocolError: the attempt is not open here.
        """
        return self._allocate(purpose, first, count)

    def _allocate(self, purpose: object, first: int, count: int) -> list[memoryview]:
        if isinstance(purpose, fx.ContributionPart):
            buffers = self._buffers(purpose.key)
            taken = self._part_memory(buffers.opened, purpose.part, scatter=True)
            buffers.contributions[purpose.part, purpose.index] = taken
            return taken
        if isinstance(purpose, fx.ResultPart):
            buffers = self._buffers(purpose.key)
            taken = self._part_memory(buffers.opened, purpose.part, scatter=False)
            buffers.incoming[purpose.part] = taken
            return taken
        if isinstance(purpose, fx.WholeResult | fx.Snapshot):
            if isinstance(purpose, fx.Snapshot) and purpose.foreign:
                return self._foreign_memory(purpose)[first : first + count]
            return self._receiving(purpose).chunks[first : first + count]
        raise LocalProtocolError("unknown purpose of a fetch", repr(purpose))

    def _receiving(self, purpose: fx.WholeResult | fx.Snapshot) -> Incoming:
        """One of a kind per channel: what an earlier download has left behind is of no use."""
        slot = purpose.channel, type(purpose)
        known = self._incoming.get(slot)
        if known is not None and known.root == purpose.root:
            return known
        if known is not None:
            known.close()
        if isinstance(purpose, fx.Snapshot):
            sizes = self._state_sizes(purpose.channel, purpose.round, purpose.values)
            found = self.room(purpose, sizes)
        else:
            sizes = self._encoded_sizes(purpose.values, purpose.codec)
            found = Incoming.in_memory(purpose.root, sizes)
        self._incoming[slot] = found
        return found

    def incoming(self, purpose: fx.Snapshot) -> Incoming | None:
        """What has come of a snapshot, if it is being fetched."""
        found = self._incoming.get((purpose.channel, fx.Snapshot))
        foreign = found is None or purpose.foreign or found.root != purpose.root
        return None if foreign else found

    def expect(self, purpose: object, first: int, leaves: Sequence[bytes]) -> None:
        """Leaf hashes of a fetch are proven; those of snapshots are remembered."""
        if isinstance(purpose, fx.SnapshotLeaves):
            purpose = purpose.snapshot
        if isinstance(purpose, fx.Snapshot) and (incoming := self.incoming(purpose)):
            incoming.expect(first, leaves)

    def _received(self, purpose: fx.WholeResult | fx.Snapshot) -> list[memoryview]:
        found = self._incoming.get((purpose.channel, type(purpose)))
        if found is None or found.root != purpose.root:
            raise LocalProtocolError("nothing of it was fetched", purpose.channel)
        del self._incoming[purpose.channel, type(purpose)]
        found.close()
        return found.chunks

    def prepare(self, purpose: fx.Snapshot) -> tuple[tuple[int, ...], bool]:
        """Make room for a snapshot: see ``Incoming.prepare``."""
        return self._receiving(purpose).prepare(self.states.get(purpose.channel))

    def _foreign_memory(self, purpose: fx.Snapshot) -> list[memoryview]:
        """One foreign state per channel and use: what an earlier one has left is of no use."""
        key = purpose.channel, purpose.foreign
        sizes = self._state_sizes(purpose.channel, purpose.round, purpose.values)
        root, whole = self._foreign.get(key, (b"", []))
        if root != purpose.root:
            whole = chunk_buffers(sizes)
            self._foreign[key] = purpose.root, whole
        return whole

    def total_chunks(self, purpose: object) -> int:
        """Chunks of the whole blob that a fetch with this purpose takes a range of."""
        if isinstance(purpose, fx.ContributionPart):
            return self.layout(self._buffers(purpose.key).opened.values).chunks
        if isinstance(purpose, fx.ResultPart):
            return self._buffers(purpose.key).opened.parts[purpose.part].count
        if isinstance(purpose, fx.WholeResult):
            return self.layout(purpose.values).chunks
        if isinstance(purpose, fx.SnapshotLeaves):
            purpose = purpose.snapshot
        assert isinstance(purpose, fx.Snapshot), purpose
        return 1 + self.layout(purpose.values).chunks

    def _buffers(self, key: RoundKey) -> _Buffers:
        buffers = self._attempts.get(key)
        if buffers is None:
            raise LocalProtocolError("no such attempt", str(key))
        return buffers

    def guest_nbytes(self, purpose: object, me: bytes) -> int:
        """Memory that a fetch takes whose size others chose: for a group ``me`` has not called."""
        if not isinstance(purpose, fx.ContributionPart) or purpose.key.channel.startswith("train/"):
            return 0
        opened = self._buffers(purpose.key).opened
        mine = any(item.member == me for item in opened.contributors)
        return 0 if mine else sum(self._part_sizes(opened, purpose.part, scatter=True))

    def _part_memory(self, opened: RoundOpened, part: int, *, scatter: bool) -> list[memoryview]:
        return chunk_buffers(self._part_sizes(opened, part, scatter=scatter))

    def _part_sizes(self, opened: RoundOpened, part: int, *, scatter: bool) -> list[int]:
        codec = get_codec(opened.scatter_codec if scatter else opened.gather_codec)
        layout, item = self.layout(opened.values), opened.parts[part]
        return [layout.encoded_nbytes(i, codec) for i in range(item.first, item.first + item.count)]

    def _encoded_sizes(self, values: int, codec_name: str) -> list[int]:
        layout, codec = self.layout(values), get_codec(codec_name)
        return [layout.encoded_nbytes(i, codec) for i in range(layout.chunks)]

    def _state_sizes(self, channel: str, round_number: int, values: int) -> list[int]:
        layout, slots = self.layout(values), self.rules.slots(channel)
        header = len(header_chunk(channel, round_number, values, slots))
        return [header, *(layout.state_nbytes(i, slots) for i in range(layout.chunks))]

    def accept(self, purpose: object, leaves: Sequence[bytes] | None = None) -> None:
        """Fetched chunks are in place and match their root; are they valid values?

        Raises:
            PeerFault: ``malformed`` or ``non_finite``.
        """
        if isinstance(purpose, fx.ContributionPart):
            buffers = self._buffers(purpose.key)
            chunks = buffers.contributions[purpose.part, purpose.index]
            codec = get_codec(buffers.opened.scatter_codec)
            layout = self.layout(buffers.opened.values)
            first = buffers.opened.parts[purpose.part].first
            for offset, chunk in enumerate(chunks):
                codec.check(chunk, layout.nvalues(first + offset))
        elif isinstance(purpose, fx.ResultPart):
            buffers = self._buffers(purpose.key)
            chunks = buffers.incoming.pop(purpose.part)
            codec = get_codec(buffers.opened.gather_codec)
            layout = self.layout(buffers.opened.values)
            first = buffers.opened.parts[purpose.part].first
            for offset, chunk in enumerate(chunks):
                n = layout.nvalues(first + offset)
                codec.check(chunk, n, limits.RESULT_MAGNITUDE_MAX)
            blob = Blob(chunks, leaves) if leaves is not None else Blob.of(chunks)
            self._put_part(buffers, purpose.part, blob)

    def measure(self, key: RoundKey, part: int, index: int) -> float:
        """Sum of the squares of contributor ``index``'s part, the same bits at every owner.

        Raises:
            LocalProtocolError: the attempt, or the contribution, is not here any more.
        """
        buffers = self._buffers(key)
        item, layout = buffers.opened.parts[part], self.layout(buffers.opened.values)
        chunks = self._source(buffers, part, index)
        sizes = [layout.nvalues(item.first + offset) for offset in range(item.count)]
        return square_of(chunks, sizes, get_codec(buffers.opened.scatter_codec), self._run)

    def reduce(self, key: RoundKey, part: int, chosen: RoundSet) -> bytes:
        """Sum a part over the logged set in member order, encode once; returns its root.

        Raises:
            PeerFault: ``non_finite``: the sum is not a legal result.
        """
        buffers = self._buffers(key)
        opened = buffers.opened
        item = opened.parts[part]
        layout = self.layout(opened.values)
        codec_in, codec_out = get_codec(opened.scatter_codec), get_codec(opened.gather_codec)
        coefficients = [c.value for c in chosen.coefficients]
        sources = [self._source(buffers, part, c.index) for c in chosen.coefficients]
        out = self._part_memory(opened, part, scatter=False)
        leaves: list[bytes] = [b""] * item.count

        def work(offset: int) -> None:
            n = layout.nvalues(item.first + offset)
            column = [chunks[offset] for chunks in sources]
            reduce_chunk(column, coefficients, codec_in, codec_out, n, out[offset])
            leaves[offset] = leaf_hash(out[offset])

        for _ in self._run(work, range(item.count)):
            pass
        blob = Blob(out, leaves)
        self._put_part(buffers, part, blob)
        return blob.root

    def _put_part(self, buffers: _Buffers, part: int, blob: Blob) -> None:
        """A part may come twice, fetched and computed; and after its attempt was released."""
        if buffers.released:
            raise LocalProtocolError("the attempt is over", str(buffers.opened.key))
        self.register(blob)
        old = buffers.parts.get(part)
        buffers.parts[part] = blob
        if old is not None:
            self.drop(old.root)

    def _source(self, buffers: _Buffers, part: int, index: int) -> Sequence[memoryview]:
        fetched = buffers.contributions.get((part, index))
        if fetched is not None:
            return fetched
        own = self._blobs.get(buffers.opened.contributors[index].root)
        if own is None:
            raise LocalProtocolError("a contribution of the set is not here", f"part {part}")
        item = buffers.opened.parts[part]
        return own.chunks[item.first : item.first + item.count]

    def assemble(self, key: RoundKey) -> Blob:
        """All parts are in place: the whole result as one blob; hashes are reused."""
        buffers = self._buffers(key)
        ordered = [buffers.parts[i] for i in range(len(buffers.opened.parts))]
        chunks = [chunk for blob in ordered for chunk in blob.chunks]
        leaves = [leaf for blob in ordered for leaf in blob.leaves]
        blob = Blob(chunks, leaves)
        opened = buffers.opened
        self._keep_result(key, blob, (opened.values, opened.gather_codec), ordered)
        return blob

    def _keep_result(
        self, of: RoundKey | fx.WholeResult, blob: Blob, form: Form, parts: Sequence[Blob] = ()
    ) -> None:
        """Serve a result, and its parts for those who ask for them late; they share memory."""
        for item in (blob, *parts):
            self.register(item)
        state = self.states.get(of.channel)
        roots = [blob.root, *(part.root for part in parts)]
        self._results.keep(of.channel, of.round, roots, form, state.round if state else None)

    def complete(self, purpose: fx.WholeResult) -> Blob:
        """A committed result that was fetched as a whole is in place."""
        blob = Blob.of(self._received(purpose))
        if blob.root != purpose.root:
            raise PeerFault("corrupt", "a fetched result does not match its root")
        self._keep_result(purpose, blob, (purpose.values, purpose.codec))
        return blob

    def release_attempt(self, key: RoundKey) -> None:
        buffers = self._attempts.pop(key, None)
        if buffers is not None:
            buffers.released = True
            for blob in buffers.parts.values():
                self.drop(blob.root)

    def result_codec(self, root: bytes) -> str:
        """Codec of a result that is kept here."""
        return self._results.form(root)[1]

    # -- results ----------------------------------------------------------------------------

    def decoded(self, root: bytes) -> F32:
        """A result as a fresh f32[n]."""
        blob = self._blobs[root]
        values, codec = self._results.form(root)
        out = np.empty(values, np.float32)
        decode_chunks(
            blob.chunks, get_codec(codec), out, chunk_values=self._chunk_values, run=self._run
        )
        return out

    def square_norm(self, root: bytes) -> float:
        """Sum of the squares of a result's values in fp64, the same bits at every holder."""
        values, codec = self._results.form(root)
        layout = self.layout(values)
        sizes = [layout.nvalues(index) for index in _all(layout)]
        return square_of(self._blobs[root].chunks, sizes, get_codec(codec), self._run)

    def apply(self, applied: fx.ApplyResult) -> tuple[int, bytes]:
        """Take the step of a committed result; returns (next round, state hash)."""
        state, root = self.states[applied.channel], applied.root
        assert state.round == applied.round, (applied, state.round)
        codec = get_codec(self._results.form(root)[1])
        state.apply(self._blobs[root].chunks, codec, self.rules.step(applied), run=self._run)
        self._results.applied(root)
        return state.round, state.root()

    def adopt_result(self, blob: Blob, values: int, codec: str, channel: str = "") -> None:
        """A result from an earlier life, kept until it is applied; the log may never ask for it.

        Or until the state of ``channel`` is dropped.
        """
        self.register(blob)
        self._results.adopt(channel, blob.root, (values, codec))

    def install(self, purpose: fx.Snapshot) -> tuple[int, bytes]:
        """Make a fetched snapshot the canonical state; returns (round, state hash).

        Raises:
            PeerFault: ``malformed`` or ``corrupt``.
        """
        state = self.fetched_state(purpose)
        self.states[purpose.channel] = state
        return state.round, purpose.root

    def fetched_state(self, purpose: fx.Snapshot) -> CanonicalState:
        """A state whose chunks have all been fetched, not installed; its memory is the caller's.

        Raises:
            PeerFault: ``malformed`` or ``corrupt``.
        """
        if purpose.foreign:
            key = purpose.channel, purpose.foreign
            root, chunks = self._foreign.pop(key, (b"", []))
            if root != purpose.root:
                raise LocalProtocolError("no such state was fetched", purpose.channel)
        else:
            chunks = self._received(purpose)
        state = self.new_state(purpose.channel, purpose.round, purpose.values)
        if bytes(chunks[0]) != state.header:
            raise PeerFault("malformed", "snapshot header of another state")
        for index, chunk in enumerate(chunks):
            state.load_chunk(index, chunk)
        if state.root() != purpose.root:
            raise PeerFault("corrupt", "a fetched snapshot does not match its root")
        return state

    def drop_foreign(self, use: str) -> None:
        """Forget what was fetched for ``use`` and not taken."""
        for key in [k for k in self._foreign if k[1] == use]:
            del self._foreign[key]

    def drop_state(self, channel: str) -> None:
        """Forget the state of a channel, its results and what was being fetched for it."""
        self.states.pop(channel, None)
        self._results.forget(channel)
        for slot in [slot for slot in self._incoming if slot[0] == channel]:
            self._incoming.pop(slot).close()

    def new_state(self, channel: str, round_number: int, values: int) -> CanonicalState:
        """A zero state with the slots of its channel; not installed."""
        return CanonicalState.first(
            channel,
            np.zeros(values, np.float32),
            self.rules.slots(channel),
            round=round_number,
            chunk_values=self._chunk_values,
        )


def _all(layout: Layout) -> range:
    return range(layout.chunks)
