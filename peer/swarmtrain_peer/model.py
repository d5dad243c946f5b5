"""Having the run's model logged, by whichever trainer is first."""

from __future__ import annotations

from swarmtrain_peer import host
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.errors import QuorumLost
from swarmtrain_protocols.messages.member import Propose

LOG_MODEL_TIMEOUT_S = 600.0
LOG_MODEL_RETRY_S = 1.0


async def log_model(runtime: PeerRuntime, body: e.ModelDefined) -> None:
    """Propose ``body`` until the log holds a model, this one or another member's.

    Raises:
        QuorumLost: there is no leader for too long.
    """
    node = runtime.node
    deadline = host.mono_s() + LOG_MODEL_TIMEOUT_S
    while node.ledger.model is None:
        if host.mono_s() > deadline:
            raise QuorumLost("the model could not be logged", "no leader answers", "")
        if node.log.leader is not None:
            runtime.driver.run(node.propose, Propose(e.encode_body(body)))
        await runtime.until(lambda: node.ledger.model is not None, LOG_MODEL_RETRY_S)
