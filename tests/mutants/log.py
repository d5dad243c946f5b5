"""Planted bugs of the replicated log: votes, signatures, certificates, sets, recoveries."""

from __future__ import annotations

from tests.mutants.catalogue import find, maker
from tests.mutants.patching import patch

_code = maker("log", False)
_spec = maker("log", True)

_FROM_SPECS = (
    _spec(
        "a vote is durable before it is told",
        "04 §2.2.3: forgotten fsync of a vote",
        (patch("log.state:LogState.persist_vote", "self.out.append(Persist(", "hash(Persist("),),
        find("log: chaos of 3", 0, 200),
    ),
    _spec(
        "entries are durable before they count",
        "04 §2.3.2",
        (
            patch(
                "log.state:LogState.save",
                "self.out.append(Persist(encode_record(self._unsaved()), relied=self.votes))",
                "self._unsaved()",
            ),
        ),
        find("log: power cut", 0, 4),
    ),
    _spec(
        "a steward's signature leaves after its disk is done",
        "04 §2.3.2",
        (
            patch(
                "log.acceptor:Acceptor.on_append",
                "s.save()\n",
                "pass\n",
                "self._reply(peer, ok=True, index=matched)",
                "self._reply(peer, ok=True, index=matched)\n        s.save()",
            ),
        ),
        find("log: signer dies", 6, 30),
        find("log: power cut", 0, 4),
        find("log", 0, 60),
        find("log: chaos of 3", 0, 200),
    ),
    _spec(
        "a candidate whose log is behind gets no vote",
        "04 §2.2.2",
        (
            patch(
                "log.election:Election._would_grant",
                "(request.last_term, request.last_index) < (last.term, last.index)",
                "False",
            ),
        ),
        find("log", 0, 40),
        find("log: chaos of 3", 0, 200),
    ),
    _spec(
        "a leader of an older term is not heard",
        "04 §2.2.5: stale leader commits",
        (
            patch(
                "log.acceptor:Acceptor.on_append",
                "if m.term < s.term or m.generation < s.generation:",
                "if m.generation < s.generation:",
            ),
        ),
        find("log: chaos of 3", 0, 40),
        find("log", 0, 12),
        find("units: log", 0),
    ),
    _spec(
        "only certificates commit",
        "04 §2.3.4",
        (
            patch(
                "log.core:LogCore._emit_committed",
                "or self._emitted >= log.commit:",
                "or self._emitted >= log.last_index:",
                "self._snapshots.stop_before(self._emitted, log.commit)",
                "self._snapshots.stop_before(self._emitted, log.last_index)",
            ),
        ),
        find("log", 0, 40),
    ),
    _spec(
        "only entries of the current term are signed",
        "04 §2.3.2",
        (
            patch("log.acceptor:Acceptor._signature", "at.term != s.term or ", ""),
            patch("log.leader:Leadership._on_signature", "entry.term != s.term or ", ""),
            patch("log.leader:Leadership._certify", "entry.term != s.term or ", ""),
        ),
        find("log: chaos of 3", 0, 100),
        find("units: log", 0),
    ),
    _spec(
        "while the set is joint, both sets must agree",
        "04 §2.1.3",
        (
            patch(
                "log.view:View.quorum",
                "for group in (self.voters, self.joint):",
                "for group in (self.voters,):",
            ),
        ),
        find("log: chaos of 3", 0, 200),
    ),
    _spec(
        "a record of entries replaces what was at its start and beyond",
        "04 §2.7",
        (
            patch(
                "log.state:LogState._load_entries",
                "if record.start <= log.last_index:\n        log.truncate(record.start)",
                "pass",
            ),
        ),
        find("log: chaos of 3", 0, 60),
        find("log", 0, 12),
        find("units: log", 0),
    ),
    _spec(
        "a log that matches a snapshot keeps its tail",
        "04 §2.5.3",
        (
            patch(
                "log.entrylog:EntryLog.install",
                "self.entries[body.index + 1 - self.first :] if matches else []",
                "[]",
            ),
        ),
        find("log: chaos of 3", 0, 200),
        find("units: log", 0),
    ),
    _spec(
        "a second change of the set waits for the first one's certificate",
        "04 §2.3.3",
        (
            patch(
                "log.acceptor:Acceptor._take",
                "i < index for i in log.changes_uncommitted()",
                "False for i in log.changes_uncommitted()",
            ),
            patch("log.entrylog:EntryLog.one_change_at_most", "<= 1", "<= 9"),
            patch("log.leader:Leadership._last_sendable", "return later - 1", "pass"),
            patch(
                "log.leader:Leadership._after_commit",
                "if not log.changes_uncommitted():",
                "if True:",
            ),
        ),
        find("log: chaos of 3", 0, 200),
        find("log: chaos of 5", 0, 100),
    ),
    _spec(
        "who has the founder's grant may vote, nobody else",
        "04 §2.1.2",
        (patch("log.view:View.check_voters", "if strangers:", "if False:"),),
        find("units: view", 0),
    ),
)

_FROM_CODE = (
    _code(
        "a majority, not anybody, decides in the log",
        "log/view.py",
        (patch("log.view:View.quorum", "<= len(group):", "< 1:"),),
        find("log", 0, 40),
    ),
    _code(
        "one vote per term",
        "log/election.py",
        (
            patch(
                "log.election:Election._would_grant",
                'if request.term == s.term and s.voted_for not in (b"", peer):',
                "if False:",
            ),
        ),
        find("log", 0, 60),
    ),
    _code(
        "half is not enough",
        "log/view.py",
        (
            patch(
                "log.view:View.quorum",
                "if group and 2 * sum(1 for peer in group if agrees(peer)) <= len(group):",
                "agreed = 2 * sum(1 for peer in group if agrees(peer))\n"
                "        if group and agreed < max(2, len(group) - 1):",
            ),
        ),
        find("log: chaos of 3", 0, 200),
    ),
    _code(
        "half is not enough of seven",
        "log/view.py",
        (
            patch(
                "log.view:View.quorum",
                "if group and 2 * sum(1 for peer in group if agrees(peer)) <= len(group):",
                "agreed = 2 * sum(1 for peer in group if agrees(peer))\n"
                "        if len(group) == 7 and agreed < 6 or group and len(group) < 7 and "
                "agreed <= len(group):",
            ),
        ),
        find("log: chaos of 7", 0, 200),
    ),
    _code(
        "of five stewards, too, both sets agree while the set is joint",
        "log/view.py",
        (
            patch(
                "log.view:View.quorum",
                "for group in (self.voters, self.joint):",
                "for group in (self.voters, self.joint[:0]):",
            ),
        ),
        find("log: chaos of 5", 0, 200),
    ),
    _code(
        "an old steward votes no more",
        "log/state.py",
        (
            patch(
                "log.state:LogState.votes",
                "if self.superseded is not None:",
                "if False:",
            ),
        ),
        find("log: recoveries", 0, 200),
    ),
    _code(
        "an old leader leads no more",
        "log/core.py",
        (
            patch(
                "log.core:LogCore._on_recovered",
                "self._follow()\n        self._s.set_leader(None, self._s.leader_term)\n",
                "",
            ),
        ),
        find("log: recoveries", 0, 200),
    ),
    _code(
        "who is replaced is told",
        "log/fence.py",
        (patch("log.fence:Fence._tell", "s.send(peer, Recovered(recovery))", "pass"),),
        find("log: recoveries", 0, 200),
    ),
    _code(
        "snapshots say where they began",
        "log/entrylog.py",
        (
            patch(
                "log.entrylog:EntryLog.snapshot_file",
                "self.genesis, links, snapshot.file.body, snapshot.file.certificate, self.recovery",
                "self.genesis, links, snapshot.file.body, snapshot.file.certificate, None",
            ),
        ),
        find("log: recoveries", 0, 200),
    ),
    _code(
        "a recovery begins a generation",
        "log/recovery.py",
        (
            patch(
                "log.recovery:_generation",
                "return (log.generation",
                "return log.generation\n    return (log.generation",
            ),
        ),
        find("log: recoveries", 0, 200),
    ),
)

MUTANTS = (*_FROM_SPECS, *_FROM_CODE)
