"""The tree of errors: exit codes are a contract, and every one is documented at the top."""

from __future__ import annotations

import re

from swarmtrain_protocols import errors
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, RoundFailed, SwarmError

EXIT_CODES = {
    "SwarmError": 1,
    "LocalProtocolError": 1,
    "PeerFault": 1,
    "UsageError": 2,
    "ConfigError": 3,
    "NoPeerReachable": 4,
    "NotAuthorised": 6,
    "VersionMismatch": 7,
    "RunMismatch": 8,
    "NoDevice": 9,
    "DataUnavailable": 10,
    "CheckpointError": 11,
    "QuorumLost": 12,
    "Diverged": 13,
    "DiskFull": 14,
    "RoundFailed": 75,
    "GroupLost": 75,
}


def classes() -> dict[str, type[SwarmError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, SwarmError)
    }


def test_exit_codes_never_change() -> None:
    found = {name: cls.exit_code for name, cls in classes().items()}
    assert {name: found[name] for name in EXIT_CODES} == EXIT_CODES


def test_the_tree_at_the_top_shows_every_error_and_its_code() -> None:
    tree = errors.__doc__ or ""
    for name, cls in classes().items():
        line = re.search(rf"^.*\b{name}\b.*$", tree, re.MULTILINE)
        assert line, f"{name} is missing from the tree"
        if stated := re.search(r"exit (\d+)", line[0]):
            assert int(stated[1]) == cls.exit_code


def test_an_error_says_what_why_and_what_to_do() -> None:
    error = SwarmError("the log cannot be read", "it is truncated", "restore it from a peer")
    assert (error.what, error.why, error.todo) == (
        "the log cannot be read",
        "it is truncated",
        "restore it from a peer",
    )
    assert str(error) == "the log cannot be read: it is truncated"
    assert str(SwarmError("only what")) == "only what"


def test_a_failed_round_says_if_a_later_one_may_work() -> None:
    assert RoundFailed("no outcome").retry is True
    assert RoundFailed("the run has ended", retry=False).retry is False


def test_blame_is_a_type() -> None:
    fault = PeerFault("malformed", "why", b"p" * 32)
    assert (fault.code, fault.peer) == ("malformed", b"p" * 32)
    assert not isinstance(fault, LocalProtocolError)
