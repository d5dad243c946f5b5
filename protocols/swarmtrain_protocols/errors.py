"""All errors of the project, one tree.

SwarmError                      code, what, why, what to do
├── LocalProtocolError          this side misused a core; a bug here, raised
├── UsageError                  exit 2   a command that cannot be meant
├── ConfigError                 exit 3   a key or value in a file, flag or environment
├── NoPeerReachable             exit 4   no address answered
├── NotAuthorised               exit 6   ticket refused, expired, banned
├── VersionMismatch             exit 7
├── RunMismatch                 exit 8   other run, other model, other manifest
├── NoDevice                    exit 9
├── DataUnavailable             exit 10
├── CheckpointError             exit 11  missing, truncated or flipped
├── StateSpoilt                          a state in memory is not what it was when it was hashed
├── QuorumLost                  exit 12
├── Diverged                    exit 13
├── DiskFull                    exit 14
├── PromptTooLong               exit 2   longer than the model's context
├── RunOver                     exit 22  the run has ended
├── NoWorker                    exit 75  nobody computes now: no trainer, or a stage without one
├── ShareUsedUp                 exit 75  ``generate_share`` of the workers' time is used up
├── SiteRests                   exit 75  outside the site's hours, or its data cap is used
├── RoundFailed                 exit 75  a collective call failed; ``retry``: a later may work
│   └── GroupLost               exit 75  no majority of stewards answers: nothing can be agreed on
└── PeerFault                   a remote peer broke the protocol: an event with peer and
                                code, counted, never raised out of a core
"""

from __future__ import annotations


class SwarmError(Exception):
    """What happened, why, and what to do about it.

    Printed as three lines by the command line; ``exit_code`` is what the process ends with.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        super().__init__(what if not why else f"{what}: {why}")
        self.what = what
        self.why = why
        self.todo = todo


class LocalProtocolError(SwarmError):
    """A call that the state of a core does not allow."""


class UsageError(SwarmError):
    exit_code = 2


class ConfigError(SwarmError):
    exit_code = 3


class NoPeerReachable(SwarmError):
    exit_code = 4


class NotAuthorised(SwarmError):
    exit_code = 6


class VersionMismatch(SwarmError):
    exit_code = 7


class RunMismatch(SwarmError):
    exit_code = 8


class NoDevice(SwarmError):
    exit_code = 9


class DataUnavailable(SwarmError):
    exit_code = 10


class CheckpointError(SwarmError):
    exit_code = 11


class StateSpoilt(SwarmError):
    """Bad memory: a state differs from its own hash. Never leaves the process; 10 §2.2."""


class QuorumLost(SwarmError):
    exit_code = 12


class Diverged(SwarmError):
    exit_code = 13


class DiskFull(SwarmError):
    exit_code = 14


class PromptTooLong(UsageError):
    """More tokens than the model's context has room for."""


class RunOver(SwarmError):
    exit_code = 22


class NoWorker(SwarmError):
    """Nobody in reach computes: no trainer is at work, or a stage is served by nobody."""

    exit_code = 75


class ShareUsedUp(SwarmError):
    """Generation has had its share of the workers' time, and they are busy with training."""

    exit_code = 75


class SiteRests(SwarmError):
    """This site may not work now: outside its hours, or its data cap is used."""

    exit_code = 75


class RoundFailed(SwarmError):
    """A collective call ended without an agreed result."""

    exit_code = 75

    def __init__(self, what: str, why: str = "", todo: str = "", *, retry: bool = True) -> None:
        super().__init__(what, why, todo)
        self.retry = retry


class GroupLost(RoundFailed):
    """A collective call ended because no majority of stewards answers; a later one may succeed."""


class PeerFault(SwarmError):
    """A remote peer broke the protocol. ``code`` is stable and counted per peer."""

    def __init__(self, code: str, why: str, peer: bytes | None = None) -> None:
        super().__init__(code, why)
        self.code = code
        self.peer = peer
