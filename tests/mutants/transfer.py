"""Planted bugs of state transfer: what is believed, kept, applied and told."""

from __future__ import annotations

from tests.mutants.catalogue import find, maker
from tests.mutants.patching import patch

_code = maker("transfer", False)
_spec = maker("transfer", True)
_also = maker("transfer", False)
"""A sentence of a specification whose code was read before."""

_FROM_SPECS = (
    _spec(
        "a state that differs from the pinned one is thrown away",
        "10 §2.2",
        (
            patch(
                "rounds.catchup:CatchUp._verify",
                "elif pinned == track.state_hash:",
                "elif pinned:",
            ),
        ),
        find("rounds", 0, 40),
    ),
    _spec(
        "a joiner counts only when it is in step",
        "10 §2.3.8: joiner counted early",
        (
            patch(
                "rounds.catchup:CatchUp.in_step",
                "and track.round == self.ledger.channels[channel].round",
                "",
            ),
            patch(
                "rounds.pinning:Pins.standing",
                "report.round == number and report.ready",
                "report.ready",
                "votes.setdefault(report.state_hash, []).append(member)",
                "pinned = self._ledger.channels[name].pinned_hash(number)\n"
                "            votes.setdefault(pinned or report.state_hash, []).append(member)",
            ),
        ),
        find("rounds", 0, 40),
    ),
    _spec(
        "a snapshot that the log does not pin is not taken",
        "10 §2.1",
        (
            patch(
                "rounds.catchup:CatchUp._usable",
                "if channel.pinned_hash(number) != root:",
                "if False:",
            ),
        ),
        find("rounds", 0, 30),
        find("units: catch-up", 0),
    ),
    _also(
        "a result counts only if its parts are all in place",
        "08 §2.3.7",
        (
            patch(
                "rounds.attempt:Attempt.step",
                "if len(self.in_place) == len(self.opened.parts) and",
                "if self.in_place and",
            ),
        ),
        find("rounds", 0, 20),
    ),
    _spec(
        "every member decodes the same result, the owner included",
        "07 §2.2",
        (
            patch(
                "dataplane:DataPlane.reduce",
                "self._put_part(buffers, part, blob)",
                "exact = self._part_memory(opened, part, scatter=False)\n"
                "    for i, n in enumerate(range(item.first, item.first + item.count)):\n"
                "        values = np.zeros(layout.nvalues(n), np.float32)\n"
                "        for c, chunks in zip(coefficients, sources):\n"
                "            codec_in.decode_accumulate(chunks[i], np.float32(c), values)\n"
                "        codec_out.encode(values * np.float32(1.01), exact[i])\n"
                "    self._put_part(buffers, part, Blob.of(exact))",
            ),
        ),
        find("rounds", 0, 20),
    ),
    _spec(
        "a result is applied once",
        "07 §2.2",
        (
            patch(
                "rounds.catchup:CatchUp.applied",
                "self._member.in_place.pop((channel, round_number - 1), None)",
                "pass",
                "track.round, track.state_hash = round_number, state_hash",
                "track.state_hash = state_hash",
            ),
        ),
        find("rounds", 0, 10),
    ),
    _spec(
        "a donor that sent bytes which do not match is not asked for them again",
        "10 §2.3.5",
        (
            patch(
                "rounds.download:Donors.lied", "self._put(self._liars, (peer, root), None)", "pass"
            ),
        ),
        find("units: download", 0),
    ),
    _also(
        "who loses the last result asks for it again",
        "10 §2.2",
        (
            patch(
                "rounds.catchup:CatchUp._failed",
                "track.next_query = now + QUERY_INTERVAL_S",
                "track.next_query = math.inf",
            ),
        ),
        find("units: catch-up", 0),
    ),
)

_FROM_CODE = (
    _code(
        "a result is applied only if the log committed its root",
        "rounds/catchup.py",
        patch(
            "rounds.catchup:CatchUp._advance",
            "(forgotten or (outcome is not None and outcome.root == stored))",
            "True",
        ),
        find("rounds: stored, then lost", 0, 40),
    ),
    _code(
        "a round is applied with the outer step of that round",
        "rounds/catchup.py",
        patch(
            "rounds.catchup:CatchUp._apply",
            "outer_at(self._keys, self.ledger, number)",
            "outer_at(self._keys, self.ledger, channel.round + 1)",
        ),
        find("rounds", 0, 40),
    ),
    _code(
        "a new leader is told who is in step",
        "rounds/catchup.py",
        patch("rounds.catchup:CatchUp.announce", "self.report(name)", "pass"),
        find("rounds", 0, 30),
    ),
)

MUTANTS = (*_FROM_SPECS, *_FROM_CODE)
