"""The "sometimes" points are complete: every kind of fault, way out and reason of an abort.

Read from the code: whoever adds a reason must add its point, or name the test that reaches it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

from swarmtrain_protocols.rounds import catchup, leader, member, owners
from swarmtrain_protocols.testing.faults import KINDS
from swarmtrain_protocols.testing.nightly import SOMETIMES

ROOT = Path(__file__).resolve().parents[2]
DECIDES = "tests/protocols/test_rounds_leader_decides.py"
CATCHUP = "tests/protocols/test_rounds_catchup.py"
ELSEWHERE = {
    "a contributor is lost": "tests/protocols/pipeline/test_steps.py",
    "results differ": DECIDES,
    "a result is not on disk": DECIDES,
    "owner lost, no deputy": DECIDES,
}
"""Reasons of aborts that honest sites, at these sizes, cannot cause or hardly ever do."""
RESYNC_ELSEWHERE = {
    "the run was rewound": CATCHUP,
    "is no longer in the log's history": CATCHUP,
    "the log has forgotten the round of the snapshot that was being fetched": CATCHUP,
}


def texts(function: object) -> Iterator[str]:
    """Sentences in the source of a function, without its docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    doc = ast.get_docstring(body, clean=False)
    for node in ast.walk(body):
        found = node.value if isinstance(node, ast.Constant) else None
        if isinstance(found, str) and found != doc and " " in found.strip():
            yield found.strip()


def test_every_kind_of_fault_has_a_point() -> None:
    assert [kind for kind in KINDS if "fault:" + kind not in SOMETIMES] == []


def test_every_reason_of_an_abort_has_a_point_or_a_test() -> None:
    rounds = leader.RoundLeader
    found = [*texts(rounds._gather), *texts(rounds._decide), *texts(owners.Owners._replace)]
    assert len(found) >= 7
    for reason in found:
        assert ("abort:" + reason in SOMETIMES) != (reason in ELSEWHERE), reason
    assert set(ELSEWHERE) <= set(found)


def test_every_way_out_of_trouble_has_a_point_or_a_test() -> None:
    reasons = [*texts(catchup.CatchUp._verify), *texts(catchup.CatchUp._advance)]
    reasons += [*texts(catchup.CatchUp._attend), *texts(catchup.CatchUp._failed)]
    points = [name.removeprefix("resync:") for name in SOMETIMES if name.startswith("resync:")]
    assert len(reasons) >= 5
    for reason in reasons:
        named = any(point == reason for point in points)
        flipped = reason.startswith("own state differs")  # its point is that of the flipped bit
        assert named or flipped or reason in RESYNC_ELSEWHERE, reason
    assert "flip:named" in SOMETIMES
    for fallback in (*texts(member.RoundMember._fall_back), "deputy"):
        assert "notice:fallback:" + fallback in SOMETIMES, fallback


def test_what_is_reached_elsewhere_is_in_that_test() -> None:
    for reason, path in {**ELSEWHERE, **RESYNC_ELSEWHERE}.items():
        words = reason.removeprefix("a ")
        assert words in (ROOT / path).read_text(encoding="utf-8"), (reason, path)
