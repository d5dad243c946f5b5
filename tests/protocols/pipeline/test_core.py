"""A node's part in a pipeline, composed: whole nodes in calm weather, and a node without stages."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.orders import sign_order
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.effects import StepDone
from swarmtrain_protocols.pipeline.errands import ErrandDone
from swarmtrain_protocols.pipeline.requests import inline_tensor
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart, PipelineSite
from swarmtrain_protocols.testing.pipeline_swarm import Pipeline, build, make_spec
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.world import World
from tests.protocols.rounds_kit import Net, sent

TOY = Toy(3, 2, 4)


class Heard(Checker):
    """Events of one kind, by site."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.events: dict[str, list[object]] = {}

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, self.kind):
            self.events.setdefault(host.name, []).append(event)


def calm(names: str = "abcd", drivers: str = "a", toy: Toy = TOY) -> Pipeline:
    parts = [PipelinePart(name, drives=name in drivers) for name in names]
    return build(3, make_spec(3, toy), parts, model=NetworkModel())


def site(swarm: Pipeline, name: str) -> PipelineSite:
    found = swarm.site(name)
    assert found is not None
    return found


def test_steps_are_committed_and_told_everywhere_in_order() -> None:
    swarm = calm()
    heard = Heard(StepDone)
    swarm.world.watch(heard)
    swarm.world.run(15.0)
    assert len(swarm.steps.committed) >= 5 and swarm.steps.aborted == 0
    for name in "abcd":
        told = [x for x in heard.events[name] if isinstance(x, StepDone)]
        assert len(told) >= len(swarm.steps.committed) - 1
        assert [x.step for x in told] == list(range(len(told)))
        assert all(x.committed and x.micro_batches == 4 and x.attempt == 0 for x in told)
        closed = [swarm.steps.closed[swarm.steps.committed[x.step]] for x in told]
        assert [x.loss for x in told] == [body.loss for body in closed]
        assert all(0.0 < x.loss < 4.0 for x in told)


def test_workers_are_those_assigned_and_linked_and_this_node_if_it_computes() -> None:
    swarm = calm("abc")
    swarm.world.run(10.0)
    pipeline = site(swarm, "b").core.pipeline
    everybody = pipeline.ledger.pipeline.serving(1)
    assert list(pipeline.workers(1)) == everybody
    other = next(PeerId(k) for k in everybody if k != swarm.world.hosts["b"].peer)
    host = swarm.world.hosts["b"]
    host.call("disconnected", other)
    assert other not in pipeline.workers(1)
    mine = [s for s in range(3) if host.peer in pipeline.ledger.pipeline.serving(s)]
    assert mine and all(host.peer in pipeline.workers(s) for s in mine)
    pipeline.set_worker(host.local_now(), 0)
    assert all(host.peer not in pipeline.workers(s) for s in mine)


def order(swarm: Pipeline, body: e.EntryBody) -> None:
    core = site(swarm, "a").core
    request = sign_order(FakeKeyring("founder"), core.run, core.ledger.index, body)
    core.propose(swarm.world.hosts["a"].local_now(), request)


def test_a_pause_in_the_log_stops_steps_and_its_end_lets_them_go_on() -> None:
    swarm = calm()
    swarm.world.run(10.0)
    host = swarm.world.hosts["a"]
    order(swarm, e.Paused("tea"))
    host.settle()
    swarm.world.run(13.0)
    before = len(swarm.steps.committed)
    swarm.world.run(20.0)
    assert len(swarm.steps.committed) == before
    assert site(swarm, "a").core.pipeline.driver.figures()["active"] == 0
    order(swarm, e.Resumed("done"))
    host.settle()
    swarm.world.run(25.0)
    assert len(swarm.steps.committed) >= before + 3


def test_an_errand_evaluates_between_steps_and_touches_no_sum() -> None:
    swarm = calm()
    heard = Heard(ErrandDone)
    swarm.world.watch(heard)
    swarm.world.run(10.0)
    host = swarm.world.hosts["b"]
    tokens = TOY.tokens(999, 0)
    pipeline = site(swarm, "b").core.pipeline
    handle = pipeline.errand(host.local_now(), "evaluate", tokens, timeout_s=30.0)
    host.settle()
    swarm.world.run(13.0)
    (done,) = heard.events["b"]
    assert isinstance(done, ErrandDone) and done.handle == handle
    thetas = {s: known[done.version].theta for s, known in swarm.steps.weights.items()}
    assert done.loss == TOY.evaluate(tokens, thetas)


def test_a_tensor_that_cannot_be_fetched_is_asked_for_elsewhere() -> None:
    swarm = calm()
    swarm.world.run(8.0)
    host, pipeline = swarm.world.hosts["a"], site(swarm, "a").core.pipeline
    swarm.world.run(60.0, lambda: bool(pipeline.driver.issues()))
    (identity, peer), *_ = pipeline.driver.issues()
    reply = m.HopReply(identity, m.Tensor(b"x" * 32, 9), 0.0, 0, 0.1)
    pipeline.unresolved(host.local_now(), peer, reply)
    host.settle()
    assert (identity, peer) not in pipeline.driver.issues()
    assert pipeline.driver.router.is_banned(host.local_now(), peer)
    before = len(swarm.steps.committed)
    swarm.world.run(swarm.world.now + 10.0)
    assert len(swarm.steps.committed) > before


def test_a_run_without_stages_refuses_its_hops() -> None:
    net = Net(2)
    net.run(3.0)
    pipeline = net[0].node.pipeline
    assert not pipeline.enabled and pipeline.deadline() == math.inf
    pipeline.set_driver(net.now, True)
    pipeline.set_worker(net.now, 100)
    request = m.HopRequest(
        m.HopId(0, 0, 0, 0, False, 0), "forward", 0, 0, (0, 1, 2), m.EMPTY, m.EMPTY, b"t"
    )
    net[0].node.receive(net.now, net[1].id, request)
    (refused,) = [x for _, x in sent(net[0].node.drain(), m.HopRefused)]
    assert refused.code == "malformed"
    with pytest.raises(LocalProtocolError, match="no stages"):
        pipeline.errand(net.now, "evaluate", b"t", timeout_s=1.0)


def test_without_stages_a_node_has_the_whole_model_asked_of_whoever_trains() -> None:
    net = Net(2)
    net.run(3.0)
    assert net.model().size
    net.run(1.0)
    asker, worker = net[1], net[0]
    worker.node.pipeline.set_answers(net.now, True)
    net.run(1.0)
    handle = asker.node.pipeline.errand(net.now, "generate", b"text", timeout_s=5.0)
    ((_, request),) = sent(asker.node.drain(), m.HopRequest)
    worker.node.receive(net.now, asker.id, request)
    (job,) = [x for x in worker.node.drain() if isinstance(x, px.Compute)]
    worker.node.pipeline.answered(net.now, job.job, inline_tensor(job.tokens[::-1]), 0.01)
    net.carry_out(worker)
    net.settle()
    (done,) = asker.told_of(ErrandDone)
    assert (done.handle, done.output.data, done.version) == (handle, b"txet", 0)
    again = asker.node.pipeline.errand(net.now, "generate", b"text", timeout_s=5.0)
    asker.node.pipeline.cancel_errand(again)
    ((_, request),) = sent(asker.node.drain(), m.HopRequest)
    worker.node.receive(net.now, asker.id, request)
    (job,) = [x for x in worker.node.drain() if isinstance(x, px.Compute)]
    worker.node.pipeline.not_answered(net.now, job.job, "stale", "a round ahead")
    ((_, refused),) = sent(worker.node.drain(), m.HopRefused)
    assert refused.code == "stale"
    assert asker.node.pipeline.whole.errands.busy is False
