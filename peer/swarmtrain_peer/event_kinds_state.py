"""The kinds of events about the state: rounds applied, snapshots fetched, checkpoints, rewinds."""

from __future__ import annotations

from swarmtrain_peer.event_kind import Kind

STATE_KINDS: tuple[Kind, ...] = (
    Kind(
        "state_applied",
        "info",
        "S400",
        "A committed round was applied; the state after it.",
        ("state_hash", "apply_s?"),
    ),
    Kind(
        "state_synced",
        "info",
        "S401",
        "This site caught up with the run's state.",
        ("state_hash?", "bytes?", "sync_s?", "donor?"),
    ),
    Kind(
        "resync",
        "warning",
        "S402",
        "This site's state differs from the run's; it fetches the run's again.",
        ("reason", "state_hash?", "expected_hash?"),
    ),
    Kind(
        "state_fetched",
        "info",
        "S403",
        "All chunks of a snapshot are here; how many of them were here before it was asked for.",
        ("chunks", "chunks_here", "donors", "fetch_s"),
    ),
    Kind(
        "donor_dropped",
        "warning",
        "S404",
        "A member that was sending state failed, lied or was too slow; others send its share.",
        ("peer", "reason"),
        limited=True,
    ),
    Kind(
        "memory_offered",
        "info",
        "S405",
        "No checkpoint here leads to the present state: joiners get a copy of the memory's.",
        ("state_hash?", "bytes?"),
    ),
    Kind(
        "checkpoint_saved",
        "info",
        "S410",
        "A checkpoint is on this site's disk.",
        ("state_hash?", "bytes?", "save_s?"),
    ),
    Kind(
        "checkpoint_refused",
        "error",
        "S411",
        "A checkpoint file is damaged and was not used; an older one is.",
        ("reason", "path?"),
    ),
    Kind(
        "copy_saved",
        "info",
        "S412",
        "A copy of a stage that others serve is on this site's disk.",
        ("state_hash?", "bytes?"),
    ),
    Kind(
        "data_loss",
        "error",
        "S420",
        "Committed rounds were lost with all their holders; the run was rewound.",
        ("reason", "rounds_lost?"),
    ),
    Kind(
        "rewound",
        "warning",
        "S421",
        "A new generation starts from an older state.",
        ("reason",),
    ),
    Kind(
        "corpus_progress",
        "info",
        "S430",
        "The run's corpus is not here; it is being fetched from members that have it.",
        ("bytes_have", "bytes", "donors?"),
    ),
    Kind(
        "corpus_ready",
        "info",
        "S431",
        "The run's corpus was fetched and matches what the run pins.",
        ("bytes", "donors?", "fetch_s?"),
    ),
    Kind(
        "corpus_missing",
        "warning",
        "S432",
        "The run's corpus cannot be had now; the trainer of this site ends.",
        ("reason",),
    ),
)
