"""The kinds of events about who answers, who can be dialled, relayed links and mapped ports."""

from __future__ import annotations

from swarmtrain_peer.event_kind import Kind

REACH_KINDS: tuple[Kind, ...] = (
    Kind(
        "peer_silent",
        "warning",
        "N660",
        "A linked peer that is waited for says nothing and answers no ping for longer than answers "
        "took so far: rounds go on without it until it does.",
        ("peer", "silent_s", "answer_s"),
    ),
    Kind("peer_answers", "info", "N661", "A silent peer is back.", ("peer", "silent_s")),
    Kind(
        "reachability",
        "info",
        "N640",
        "What others find when they dial this site: reachable, outgoing only, or unknown so far.",
        ("state", "agree", "asked", "seen?"),
    ),
    Kind(
        "link_relayed",
        "warning",
        "N641",
        "A link goes through a third member, for neither side can dial the other.",
        ("peer", "via"),
        limited=True,
    ),
    Kind(
        "relay_failed",
        "warning",
        "N642",
        "A member cannot be dialled, and no third one carries a link to it (for now).",
        ("peer", "reason"),
        limited=True,
    ),
    Kind(
        "relay_began",
        "info",
        "N643",
        "This site carries a stream between two members.",
        ("peer", "other", "bytes", "reason?"),
        limited=True,
    ),
    Kind(
        "relay_ended",
        "info",
        "N644",
        "A stream that this site carried, or was to carry, is over.",
        ("peer", "other", "bytes", "reason"),
        limited=True,
    ),
    Kind(
        "port_mapped",
        "info",
        "N650",
        "The gateway sends connections to one of its ports on to this site.",
        ("address", "protocol", "lease_s"),
    ),
    Kind(
        "port_mapping_failed",
        "info",
        "N651",
        "No gateway maps a port to this site, or it does so no longer.",
        ("reason",),
    ),
)
