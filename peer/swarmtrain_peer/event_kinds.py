"""The catalogue of events: every name that a site may log, with its code and fields.

Codes are stable: they stand in logs, in the dashboard and in the documentation. ``docs/events.md``
is printed from this table by ``python -m swarmtrain_peer.events``.
"""

from __future__ import annotations

from swarmtrain_peer.event_kind import Kind
from swarmtrain_peer.event_kinds_reach import REACH_KINDS
from swarmtrain_peer.event_kinds_state import STATE_KINDS

__all__ = ["KINDS", "Kind"]

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        # The peer process
        Kind(
            "peer_started",
            "info",
            "P100",
            "The peer process serves its site.",
            ("listen?", "version?", "pid?"),
        ),
        Kind(
            "peer_stopped",
            "info",
            "P101",
            "The peer process ends; its totals.",
            ("bytes_sent", "bytes_received", "reason?", "compute_utilization?"),
        ),
        Kind(
            "process_restarted",
            "warning",
            "P102",
            "A process of the site died and was started again.",
            ("process", "exit_code", "restarts", "wait_s"),
        ),
        Kind(
            "process_ended",
            "error",
            "P103",
            "A process of the site died and is not started again.",
            ("process", "exit_code", "reason"),
        ),
        Kind(
            "fallback",
            "warning",
            "P110",
            "Something runs in a slower or weaker way than asked for.",
            ("what", "why", "using?"),
        ),
        Kind(
            "disk_full",
            "error",
            "P120",
            "The disk takes no more bytes; training goes on, results are not kept. A steward that "
            "cannot write its log stands still until it can.",
            ("path?", "free_bytes?", "what?", "reason?"),
        ),
        Kind(
            "disk_freed",
            "info",
            "P121",
            "Whatever found no space on the disk is on it now.",
            ("full_s?", "path?"),
        ),
        Kind(
            "stood_still",
            "warning",
            "P130",
            "This process did not run for a while (sleep, a stop, overload). What it waited for "
            "gets the rest of its time; nobody is blamed.",
            ("slept_s",),
        ),
        Kind(
            "clock_off",
            "warning",
            "P131",
            "This machine's wall clock is behind that of most others by so much (ahead: negative); "
            "expiries go by theirs. 0: it is right again.",
            ("off_s",),
        ),
        Kind("note", "info", "P132", "What a command says to people; not in the log.", ("text",)),
        Kind(
            "command_failed",
            "error",
            "P133",
            "A command ends with this exit code; not in the log.",
            ("what", "why", "do", "exit_code"),
        ),
        Kind(
            "internal_error",
            "error",
            "P190",
            "A bug on this side: please report it with this line.",
            ("why",),
        ),
        # Membership and stewards
        Kind(
            "member_joined",
            "info",
            "M200",
            "The log admitted a member.",
            ("peer", "peer_name?", "trains?", "holds_state?", "votes?"),
        ),
        Kind("member_left", "info", "M201", "The log let a member go.", ("peer", "reason")),
        Kind(
            "member_suspended",
            "warning",
            "M209",
            "A member was silent or lied as the owner of a part: for some rounds it owns none, and "
            "its contributions to the model are not taken.",
            ("peer", "reason"),
        ),
        Kind("member_banned", "warning", "M202", "The log banned a member.", ("peer", "reason")),
        Kind("ban_lifted", "info", "M204", "A banned member may return.", ("peer", "reason?")),
        Kind("ticket_revoked", "info", "M205", "A ticket is void.", ("ticket", "reason?")),
        Kind("allow_changed", "info", "M206", "The allow list changed.", ("allowed", "peer?")),
        Kind("founder_changed", "warning", "M207", "The run was handed over.", ("peer", "reason?")),
        Kind(
            "join_refused",
            "warning",
            "M203",
            "A machine asked to join and was refused.",
            ("reason", "peer?"),
            limited=True,
        ),
        Kind(
            "leader_changed",
            "info",
            "M210",
            "Another steward leads the log, or none does (leader is null).",
            ("leader", "term"),
        ),
        Kind("stewards_changed", "info", "M211", "Other members vote.", ("voters",)),
        Kind(
            "quorum_lost",
            "error",
            "M212",
            "No majority of stewards answers: nothing commits until one does.",
            ("wait_s?",),
        ),
        Kind("quorum_regained", "info", "M213", "A majority of stewards answers again.", ()),
        Kind(
            "conflicting_certificates",
            "error",
            "M220",
            "Two majorities certified different logs: somebody lied, and the run halts.",
            ("index?", "peer?"),
        ),
        Kind(
            "ledger_diverged",
            "error",
            "M221",
            "A majority derived another ledger from the same entries than this site, which ends.",
            ("index", "state_hash", "expected_hash"),
        ),
        Kind(
            "log_superseded",
            "warning",
            "M222",
            "The founder began the log again, without the stewards it had: what only the old log "
            "held is void, and this site takes the new one.",
            ("old_generation", "steward"),
        ),
        # Rounds
        Kind(
            "model_defined",
            "info",
            "R300",
            "The run's model is fixed.",
            ("values", "schema_hash?"),
        ),
        Kind(
            "contribution_ready",
            "info",
            "R301",
            "A trainer's pseudo-gradient is encoded and announced.",
            ("samples?", "bytes?", "encode_s?", "member?"),
        ),
        Kind(
            "round_opened",
            "info",
            "R310",
            "The log fixed an attempt: who contributes, who reduces what.",
            ("contributors?", "parts?", "holders?"),
        ),
        Kind(
            "round_set",
            "info",
            "R311",
            "The log fixed who is summed, with which weights.",
            ("contributors?",),
        ),
        Kind(
            "part_reduced",
            "info",
            "R312",
            "This site summed a part it owns and published the result.",
            ("part?", "bytes?", "reduce_s?"),
        ),
        Kind(
            "result_held",
            "info",
            "R313",
            "This site has every byte of a round's result.",
            ("bytes?", "receive_s?"),
        ),
        Kind(
            "round_committed",
            "info",
            "R320",
            "The one outcome of a round.",
            ("root?", "contributors?", "samples?"),
        ),
        Kind("round_aborted", "warning", "R321", "An attempt ended without effect.", ("reason",)),
        Kind(
            "round_figures",
            "info",
            "R330",
            "What this site spent on a round. `bytes_sent` and `bytes_received` are of all its "
            "links since its previous figures, `bytes_up` and `bytes_down` of the round's "
            "chunks; offsets and spans count from ROUND_OPENED as this site saw it, those of steps "
            "of a pipeline from the closing of the step.",
            (
                "bytes_sent",
                "bytes_received",
                "bytes_up?",
                "bytes_down?",
                "compute_s?",
                "wait_s?",
                "encode_s?",
                "send_s?",
                "receive_s?",
                "reduce_s?",
                "apply_s?",
                "t_open_offset_s?",
                "t_send_offset_s?",
                "t_receive_offset_s?",
                "t_reduce_offset_s?",
                "t_apply_offset_s?",
                "send_spans_s?",
                "receive_spans_s?",
                "compute_spans_s?",
                "samples?",
                "loss?",
                "compute_utilization?",
            ),
        ),
        # Pipelines
        Kind(
            "stage_assigned",
            "info",
            "L800",
            "The log says which stages a member serves from now on.",
            ("peer", "stages", "reason?"),
        ),
        Kind(
            "step_closed",
            "info",
            "L810",
            "The log fixed the micro-batches of a step, each with one owner at every hop.",
            ("step", "micro_batches", "contributors?"),
        ),
        Kind(
            "step_committed",
            "info",
            "L811",
            "All stages took the step. `loss` is the mean over its micro-batches as drivers saw "
            "it, `scale` what clipping made of the gradient.",
            ("step", "micro_batches", "loss?", "scale?", "step_s?"),
        ),
        Kind(
            "step_aborted",
            "warning",
            "L812",
            "No stage took the step; its gradients are kept and it is closed again.",
            ("step", "reason"),
        ),
        Kind(
            "stage_lost",
            "error",
            "L820",
            "The last holder of a stage is gone; a host rebuilds it.",
            ("stage", "step", "host", "reason?"),
        ),
        Kind(
            "stage_recovered",
            "warning",
            "L821",
            "A stage lives again: candidates by name with their losses, and the one installed.",
            ("stage", "step", "host", "candidates", "losses", "choice"),
        ),
        Kind(
            "candidates_built",
            "info",
            "L822",
            "This site hosts a lost stage and has made weights it could go on with, from `inputs`:"
            " states by name with their steps. Each one is tried next.",
            ("stage", "candidates", "inputs?", "build_s?"),
        ),
        Kind(
            "stage_adopted",
            "info",
            "L823",
            "The weights that the log chose for a lost stage are on this site's disk and in use.",
            ("stage", "step", "choice", "state_hash?", "bytes?", "adopt_s?"),
        ),
        Kind(
            "hop_failed",
            "warning",
            "L830",
            "A worker did not do a hop; another one is asked.",
            ("peer", "hop", "reason", "backward?"),
            limited=True,
        ),
        Kind(
            "generate_deferred",
            "info",
            "L831",
            "Generation has used up its share of this site's time; requests wait or go elsewhere.",
            ("peer", "share"),
            limited=True,
        ),
        Kind(
            "generated",
            "info",
            "L832",
            "A text asked for at this site is done, by weights of these versions, or could not be.",
            ("tokens", "seconds", "versions", "finish", "reason?"),
        ),
        # State
        *STATE_KINDS,
        *REACH_KINDS,
        # Trainers
        Kind(
            "trainer_attached",
            "info",
            "T500",
            "A trainer is connected to this peer process.",
            ("ranks?", "device?"),
        ),
        Kind(
            "trainer_lost",
            "warning",
            "T501",
            "A trainer went away; nothing half-written of it was used.",
            ("reason?",),
        ),
        Kind(
            "handover",
            "info",
            "T510",
            "A trainer handed over a pseudo-gradient and went on training.",
            ("samples?", "inner_steps?", "blocked_s?", "compute_s?"),
        ),
        Kind(
            "evaluated",
            "info",
            "T520",
            "Loss of the canonical state on the fixed held-out set, nats per token.",
            ("loss", "member?", "tokens?"),
        ),
        Kind(
            "diverged",
            "error",
            "T530",
            "Loss or gradients are not finite; this site stops contributing.",
            ("reason", "loss?"),
        ),
        Kind(
            "contribution_rejected",
            "warning",
            "T531",
            "A contribution of this site was not admitted; it goes into the next one.",
            ("reason",),
        ),
        Kind(
            "contribution_clipped",
            "warning",
            "T532",
            "A member's contribution is louder than the others' and counts in part (spec 15).",
            ("peer", "norm", "reference", "factor"),
            limited=True,
        ),
        # Network
        Kind("peer_connected", "info", "N600", "An encrypted link is up.", ("peer", "address?")),
        Kind(
            "peer_disconnected",
            "info",
            "N601",
            "A link went down.",
            ("peer", "reason?"),
            limited=True,
        ),
        Kind(
            "link_refused",
            "warning",
            "N602",
            "A link was refused, here or there.",
            ("reason", "peer?", "address?"),
            limited=True,
        ),
        Kind(
            "peer_fault",
            "warning",
            "N610",
            "A remote peer broke the protocol.",
            ("peer", "fault", "why?"),
            limited=True,
        ),
        Kind(
            "message_ignored",
            "info",
            "N611",
            "A message counted for nothing: older or newer than the log, or there is no room.",
            ("peer", "reason"),
            limited=True,
        ),
        Kind(
            "peer_unreachable", "warning", "N620", "No address of a peer answers.", ("peer",), True
        ),
        Kind("dht_rejoined", "info", "N630", "A remembered peer answers again.", ("peer",)),
        Kind(
            "dht_crowded", "warning", "N631", "Keys were made to crowd a DHT key.", ("key",), True
        ),
        Kind("contacts_unreadable", "warning", "N632", "Contacts are not kept.", ("reason",)),
        # The run
        Kind("paused", "warning", "U700", "The run is paused.", ("reason",)),
        Kind("resumed", "info", "U701", "The run goes on.", ("reason?",)),
        Kind("leaving", "info", "U702", "This site leaves the run.", ("now", "reason?")),
        Kind(
            "resting",
            "info",
            "U704",
            "This site leaves after the round and comes back by itself: `--hours`, `--data-cap`.",
            ("reason", "until"),
        ),
        Kind(
            "data_cap_near",
            "warning",
            "U705",
            "Most of the data cap of this period is used.",
            ("used_bytes", "cap_bytes", "period"),
        ),
        Kind(
            "data_cap_reached",
            "warning",
            "U706",
            "Another round might not fit into the data cap of this period.",
            ("used_bytes", "cap_bytes", "period"),
        ),
        Kind(
            "config_changed",
            "info",
            "U703",
            "From this round on every member has another value: as measured, or by order.",
            ("key", "value", "why?"),
        ),
        Kind("run_ended", "info", "U710", "The run is over.", ("reason",)),
        # Data that are dealt in shards
        Kind(
            "data_defined",
            "info",
            "D800",
            "What is trained on is known: samples in an epoch, and their hash.",
            ("samples", "digest"),
        ),
        Kind(
            "epoch_finished",
            "info",
            "D801",
            "Every sample of an epoch has counted once.",
            ("epoch", "samples", "counted"),
        ),
        Kind(
            "shards_returned",
            "info",
            "D802",
            "A member left shards unfinished; others go on with them.",
            ("peer", "shards"),
        ),
    )
}
