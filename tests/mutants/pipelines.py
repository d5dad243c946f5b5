"""Planted bugs of pipelines: what is in a step, whose it is, and how a lost stage comes back."""

from __future__ import annotations

from tests.mutants.catalogue import find, maker
from tests.mutants.patching import patch

WORKERS = find("pipelines: workers die", 5, 25)
LOST = find("pipelines: stage lost", 5, 9)
LATE = find("pipelines: late messages", 5, 9)

_code = maker("pipelines", False, WORKERS)
_spec = maker("pipelines", True, WORKERS)
_also = maker("pipelines", False, WORKERS)
"""A sentence of a specification whose code was read before."""

_FROM_SPECS = (
    _spec(
        "what is in the accumulator is not added again",
        "11 §2.2.3",
        (
            patch(
                "pipeline.worker:WorkerCore._start",
                "claim = self._sums.claim(hop, k)",
                "claim = None",
            ),
        ),
    ),
    _spec(
        "an owner takes out what others own",
        "11 §2.4.3",
        (patch("pipeline.sums:Sums._undo", "if not shares.get(hop, 0) >> k & 1:", "if False:"),),
    ),
    _spec(
        "a step holds micro-batches that were computed at every hop",
        "11 §2.4",
        (
            patch(
                "pipeline.claims:settle",
                "if lacking[path]:",
                "if len(lacking[path]) > 1:",
                "next(\n                peer for peer in sorted(answers) if "
                "answers[peer].get((hop, path), 0) >> k & 1\n            )",
                "next(\n                (p for p in sorted(answers) if "
                "answers[p].get((hop, path), 0) >> k & 1), sorted(answers)[0]\n            )",
            ),
        ),
    ),
    _spec(
        "every micro-batch weighs the same",
        "11 §2.4.4",
        (
            patch(
                "pipeline.book:_closed",
                "tuple(e.Coefficient(i, share) for i in everybody)",
                "tuple(e.Coefficient(i, _fp32(1.0 / len(everybody))) for i in everybody)",
            ),
        ),
    ),
    _spec(
        "a step is clipped by its norm over all stages",
        "11 §2.4.5",
        (
            patch(
                "pipeline.step_policy:clip_scale",
                "total += value",
                "total = max(total, value)",
            ),
        ),
    ),
    _spec(
        "a worker that has told its claims takes no backwards",
        "11 §2.4.1",
        (
            patch(
                "pipeline.sums:Sums.holds_back",
                'return request.kind == "backward" and self.closing',
                "return False",
            ),
        ),
        find("pipelines: closed late", 1, 9),
        find("units: sums", 0),
    ),
    _spec(
        "a new leader deals nothing while leases of the old one may be alive",
        "11 §2.4.7",
        (
            patch(
                "pipeline.leases:Vacancy.over_at",
                "return max(now + ttl_s / 3, since + ttl_s)",
                "return now",
            ),
        ),
        find("pipelines: leader gone", 0, 9),
        find("units: leases", 0),
    ),
    _spec(
        "who is not in step with a stage is not believed about it",
        "11 §2.4.1",
        (
            patch(
                "pipeline.steps:StepLeader._answered",
                "if peer in holders]",
                "if True]",
            ),
        ),
        find("pipelines", 0, 8),
        find("units: steps", 0),
    ),
    _spec(
        "have-sets are empty when a step begins",
        "11 §2.2.4",
        (patch("pipeline.sums:Sums._clear", "self._have.clear()", "pass"),),
    ),
    _spec(
        "accumulators are empty when a step begins",
        "11 §2.2.4",
        (
            patch(
                "pipeline.sums:Sums._clear",
                "self._out.append(px.ClearGradients(tuple(stages), self.life))",
                "pass",
            ),
        ),
    ),
    _spec(
        "what is said of an attempt that stays open is said again",
        "08 §2.5",
        (
            patch(
                "rounds.member:RoundMember.announcement_due",
                "any(attempt.tells for attempt in attempts)",
                "False",
            ),
        ),
        find("pipelines", 4732),
        find("pipelines", 4176),
        find("local", 619),
    ),
    _spec(
        "where the others are not enough, the suspended count",
        "08 §2.9.3",
        (
            patch(
                "rounds.lobby:Lobbies.usable",
                "return trusted(ledger, present) if enough else present",
                "return trusted(ledger, present)",
            ),
        ),
        find("local", 395),
        find("local", 412),
    ),
    _spec(
        "a host begins anew when its stage has gone on",
        "11 §2.5.2",
        (
            patch(
                "pipeline.rebuild:Rebuilder.reconcile",
                "moved = known.host and channel.round != work.round",
                "moved = False",
            ),
        ),
        find("local", 405),
    ),
    _spec(
        "what was asked of a trainer that is lost is void",
        "11 §2.2.5",
        (patch("pipeline.sums:Sums.lost", "self.life += 1", "pass"),),
        find("pipelines", 3011),
    ),
    _spec(
        "when only the attempt moves, what was accumulated stays",
        "11 §2.2.4",
        (
            patch(
                "pipeline.sums:Sums.reconcile",
                "if key != self._key:",
                "if key != self._key and not moved:\n        self._have.clear()\n"
                "    if key != self._key:",
            ),
        ),
        WORKERS,
        find("pipelines", 0, 40),
    ),
    _spec(
        "a loss begins a new era",
        "11 §2.1",
        (patch("pipeline.book:_lost", "state.era += 1", "pass"),),
        LATE,
    ),
    _also(
        "a leader that lost a contributor gives up the attempt",
        "11 §2.4",
        (
            patch(
                "rounds.phases:Phase.undeliverable",
                "return True",
                "return False",
            ),
        ),
        find("pipelines: workers die", 5, 8),
        find("units: steps", 0),
    ),
)

_FROM_CODE = (
    _code(
        "what is being added at this moment is waited for",
        "pipeline/worker.py",
        patch("pipeline.worker:WorkerCore._start", "if adder is not None:", "if False:"),
        find("pipelines", 60, 130),
    ),
    _code(
        "a gradient that was taken out is claimed no more",
        "pipeline/sums.py",
        patch("pipeline.sums:Sums.undone", "del self._have[hop][k]", "pass"),
    ),
    _code(
        "weights of another version are refused",
        "pipeline/requests.py",
        patch(
            "pipeline.requests:trouble",
            '("version", request.version, channel.round if training or not local else None),\n'
            '        ("step", request.id.step, state.step if sync and training else None),',
            "",
        ),
        find("pipelines", 5, 40),
    ),
    _code(
        "a trainer that died takes its claims with it",
        "pipeline/sums.py",
        patch("pipeline.sums:Sums.lost", "self._have.clear()", "pass"),
        find("pipelines", 0, 40),
    ),
    _code(
        "the owner of a gradient is one",
        "pipeline/sums.py",
        patch(
            "pipeline.sums:Sums._planned",
            "self._plan = _Plan(plan.key, digest, cl.by_stage(mine, self._blocks))",
            "mine = {h: cl.mask_of(self.have(h)) for h in mine}\n"
            "    self._plan = _Plan(plan.key, digest, cl.by_stage(mine, self._blocks))",
        ),
    ),
    _code(
        "a step is clipped",
        "pipeline/step_policy.py",
        patch(
            "pipeline.step_policy:clip_scale", "scale: float =", "return 1.0\n    scale: float ="
        ),
    ),
    _code(
        "a driver that stepped forgets the step before",
        "pipeline/driver.py",
        patch("pipeline.driver:DriverCore.reconcile", "self._forget()", "pass"),
    ),
    _code(
        "no step closes with less than what is asked for",
        "pipeline/steps.py",
        patch(
            "pipeline.steps:StepLeader._settle",
            "if count < self.policy.micro_batches and not (late and count >= self.policy.least):",
            "if not count:",
        ),
    ),
    _code(
        "a lease runs out with its driver",
        "pipeline/leases.py",
        patch(
            "pipeline.leases:Leases.deal",
            "(lease.driver is None or lease.until <= now)",
            "lease.driver is None",
        ),
        find("pipelines: driver gone", 5, 9),
    ),
    _code(
        "what nobody has any more is sent again",
        "pipeline/leases.py",
        patch("pipeline.leases:Leases.settle", "lease.redo = list(hops)", "lease.redo = []"),
        find("pipelines: workers die", 5, 7),
    ),
    _code(
        "the candidate with the least loss is chosen",
        "pipeline/rebuild.py",
        patch("pipeline.rebuild:Rebuilder._decide", "best = min(scored", "best = max(scored"),
        LOST,
    ),
    _code(
        "the loss of a candidate is its own",
        "pipeline/rebuild.py",
        patch("pipeline.rebuild:Rebuilder.candidate_ready", "work.heard.clear()", "pass"),
        LOST,
    ),
    _code(
        "what is installed is what was chosen",
        "pipeline/rebuild.py",
        patch(
            "pipeline.rebuild:Rebuilder._decide",
            "root = work.roots[best]",
            "root = work.roots[work.names[0]]",
        ),
        LOST,
    ),
    _code(
        "only the state before the lost step passes for the state itself",
        "pipeline/rebuild.py",
        patch(
            "pipeline.rebuild:Rebuilder._kept",
            "held is None or held[0] != work.round or",
            "held is None or",
        ),
        LOST,
    ),
    _code(
        "a stage is lost only if nobody has its state",
        "pipeline/recovery.py",
        patch("pipeline.recovery:RecoveryLeader._look", "if front:", "if front and now < 0.0:"),
        find("pipelines: calm", 5, 9),
    ),
    _code(
        "requests of an older era are refused",
        "pipeline/requests.py",
        patch("pipeline.requests:trouble", '("era", request.stage_generation, state.era),', ""),
        LATE,
    ),
    _code(
        "sums of an older era are cleared",
        "pipeline/sums.py",
        patch(
            "pipeline.sums:Sums.reconcile",
            "moved = ground != self._ground",
            "moved = ground[:2] != self._ground[:2]",
        ),
        LATE,
    ),
    _code(
        "drivers drop what they have from an older era",
        "pipeline/driver.py",
        patch(
            "pipeline.driver:DriverCore.reconcile",
            "if view != self._view:",
            "same = view is None or (self._view is not None and "
            "view.step == self._view.step)\n"
            "    self._view = self._view if view is None or not same else view\n"
            "    if not same:",
        ),
        LATE,
    ),
    _code(
        "a rebuilt stage warms up",
        "pipeline/book.py",
        patch("pipeline.book:_recovered", "stage.recovered_step = body.step", "pass"),
        LOST,
    ),
    _code(
        "only so many micro-batches leave out a stage",
        "pipeline/paths.py",
        patch(
            "pipeline.paths:PathRule.of_step",
            "if skip and k < self.skips",
            "if skip and k <= self.skips",
        ),
        find("pipelines: skipping", 1, 5),
    ),
    _code(
        "a step leaves out what its predecessor's outcome says",
        "pipeline/book.py",
        patch("pipeline.book:_outcome", "state.skip = body.skip", "state.skip = 0"),
        find("pipelines: skipping", 1, 5),
    ),
)

LOCAL = find("pipelines: local steps", 6, 18)

_LOCAL = (
    _code(
        "what is under way at a local step is weighed with that step",
        "pipeline/localsteps.py",
        patch(
            "pipeline.localsteps:LocalSteps._step",
            "for job, (ground, (hop, _)) in self._adding.items():",
            "for job, (ground, (hop, _)) in ():",
        ),
        LOCAL,
    ),
    _code(
        "a backward whose answer was lost is not added again in a later local step",
        "pipeline/localsteps.py",
        patch(
            "pipeline.localsteps:LocalSteps.claim", "return self._done.get((hop, k))", "return None"
        ),
        LOCAL,
    ),
    _code(
        "a stage contributes after a whole phase",
        "pipeline/localsteps.py",
        patch(
            "pipeline.localsteps:first_phase",
            "return stage * inner_steps // stages or inner_steps",
            "return 1",
        ),
        LOCAL,
    ),
    _code(
        "what was handed over is not trained on",
        "pipeline/localsteps.py",
        patch("pipeline.localsteps:_Phase.waits", "return self.steps >= self.due", "return False"),
        LOCAL,
    ),
)

MUTANTS = (*_FROM_SPECS, *_FROM_CODE, *_LOCAL)
