"""How people read who can be dialled, and by which way a link goes."""

from __future__ import annotations

from swarmtrain.cli.paths import carried, reachability, reached

SEED = "ab" * 32


def test_a_member_and_the_way_to_it() -> None:
    there = {"addresses": ["44.1.0.1:4000"], "reachability": "reachable", "via": None}
    assert reached(there) == "44.1.0.1:4000"
    assert reached({**there, "reachability": "unknown"}) == "44.1.0.1:4000 (not tried from here)"
    hidden = {"addresses": [], "reachability": "outgoing only", "via": None}
    assert reached(hidden) == "outgoing only"
    assert reached({**hidden, "via": SEED}) == "outgoing only, relayed by abababab"
    assert reached({"addresses": ["44.1.0.1:4000"]}) == "44.1.0.1:4000", "an older peer process"


def test_what_others_find() -> None:
    def say(state: str, agree: int, asked: int, mapped: str | None = None) -> str:
        found = {"state": state, "agree": agree, "asked": asked, "mapped": mapped}
        return reachability({"reachability": found})

    assert say("reachable", 2, 2) == "reachable, as 2 of 2 others found"
    assert say("reachable", 2, 3, "PCP") == "reachable (PCP), as 2 of 3 others found"
    assert say("outgoing only", 3, 3) == "outgoing only, as 3 of 3 others found"
    assert say("outgoing only", 0, 0) == "outgoing only: it does not listen"
    assert say("unknown", 0, 0) == "unknown: nobody has tried to dial this site"
    assert say("unknown", 0, 2) == "unknown: no two agree"
    assert reachability({}) == ""


def test_what_is_relayed() -> None:
    assert carried({"relay": {"relayed_bytes": 5}}) == {"relayed_bytes": 5}
    assert carried({}) == {}
