"""Writes texts for whoever asks on the control socket, one token at a time, by the whole swarm.

The history is here (``pipeline/generation.py``); each token is an errand that any worker can do, so
a worker's death costs a hop. A client hears ``generated`` pushes: one for each token, then one with
``finish`` and the whole text, or one with ``error``. A client that goes away ends its texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.control import error_to_dict
from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.tensors import TensorStore
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import (
    ConfigError,
    LocalProtocolError,
    NoWorker,
    PeerFault,
    RunOver,
    ShareUsedUp,
    SwarmError,
    UsageError,
)
from swarmtrain_protocols.pipeline.errands import ErrandDone, ErrandFailed
from swarmtrain_protocols.pipeline.generation import (
    Generation,
    Piece,
    TextModel,
    Wanted,
    prompt_of,
    text_model,
)
from swarmtrain_protocols.pipeline.hops import ENDS, stage_of
from swarmtrain_protocols.pipeline.sampling import Sampling

Document = dict[str, Any]
Errand = ErrandDone | ErrandFailed

TOKEN_TIMEOUT_S = 30.0
TOKEN_TIMEOUT_S_MAX = 600.0
TRIES = 3
"""For answers that are no logits."""
INLINE_BYTES_MAX = 64 * 1024
"""Logits of more bytes are drawn from on a pool thread."""


class Writer:
    """One per peer process.

    Args:
        tensors: of whoever takes in the answers of errands.
        own: what the trainer of this site reads, if it says so.
    """

    def __init__(
        self, runtime: PeerRuntime, tensors: TensorStore, own: Callable[[], TextModel | None]
    ) -> None:
        self._runtime = runtime
        self._tensors = tensors
        self._own = own
        self._waiting: dict[int, asyncio.Future[Errand]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        runtime.listeners.append(self._on_core_event)

    def _on_core_event(self, event: object) -> None:
        if isinstance(event, ErrandDone | ErrandFailed):
            waiting = self._waiting.pop(event.handle, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(event)

    def model(self) -> TextModel:
        """What the run's model reads.

        Raises:
            UsageError: it is none of the presets, and no trainer here says.
        """
        keys = self._runtime.manifest.keys
        found = self._own() or text_model(keys.preset, dict(keys.model))
        if found is None:
            raise UsageError(
                f"a model {keys.preset!r}",
                "its context and tokenizer are not known here",
                "ask at a site whose trainer knows them",
            )
        return found

    async def generate(self, args: Document, connection: ControlConnection) -> Document:
        """Begin a text: ``id`` (of the caller's choice) comes back with every push about it.

        Other arguments: ``prompt`` (text) or ``tokens`` (ids), ``max_tokens``, ``temperature``,
        ``top_k``, ``top_p``, ``seed``, ``stop`` (list of strings), ``timeout_s`` (for one token).

        Raises:
            UsageError, ConfigError: a request that cannot be meant.
            RunOver, NoWorker, ShareUsedUp: it cannot be done now.
        """
        model = self.model()
        generation = Generation(wanted_of(args, model), model)
        timeout_s = float(args.get("timeout_s") or TOKEN_TIMEOUT_S)
        if not 0 < timeout_s <= TOKEN_TIMEOUT_S_MAX:
            raise UsageError(f"timeout_s {timeout_s:g}", f"at most {TOKEN_TIMEOUT_S_MAX:g}")
        self._check_run()
        self._check_room()
        number = args.get("id", 0)
        task = asyncio.ensure_future(self._write(number, generation, connection, timeout_s))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)
        connection.on_close(partial(_cancel, task))
        runtime, keys = self._runtime, self._runtime.manifest.keys
        return {
            "id": number,
            "run": runtime.settings.run.hex(),
            "name": keys.name,
            "prompt_tokens": len(generation.wanted.prompt),
            "context": model.context,
            "counts": "steps" if keys.stages and keys.pipeline_mode == "sync" else "rounds",
        }

    def _check_run(self) -> None:
        ledger = self._runtime.node.ledger
        if ledger.ended:
            raise RunOver("the run is over", ledger.ended, "its checkpoints have the weights")
        if ledger.model is None:
            raise NoWorker("the run has no model yet", "no trainer has come", "try again later")

    def _check_room(self) -> None:
        if not self._runtime.manifest.keys.generate_share:
            raise ShareUsedUp(
                "this run gives generation no time", "generate_share is 0", "found another run"
            )
        if len(self._tasks) >= limits.GENERATIONS_MAX:
            raise ShareUsedUp(
                "too many texts at once", f"{len(self._tasks)} are being written", "try again later"
            )

    # -- one text --------------------------------------------------------------------------------

    async def _write(
        self, number: object, text: Generation, connection: ControlConnection, timeout_s: float
    ) -> None:
        began_s, why, error = host.mono_s(), "", None
        try:
            while not text.finish:
                self._check_run()
                piece = await self._token(text, timeout_s)
                about = {"token": piece.token, "text": piece.text, "version": piece.version}
                connection.push({"event": "generated", "id": number, **about})
        except asyncio.CancelledError:
            why = "nobody listens any more"
            raise
        except SwarmError as caught:
            error, why = caught, str(caught)
        finally:
            self._runtime.events.emit(
                "generated",
                tokens=len(text.tokens),
                seconds=round(host.mono_s() - began_s, 6),
                versions=[version for version, _ in text.versions][-16:],
                finish=text.finish or "failed",
                reason=why,
            )
        if error is not None:
            push: Document = {"error": error_to_dict(error)}
        else:
            push = {
                "finish": text.finish,
                "text": text.text,
                "tokens": text.tokens,
                "versions": [list(one) for one in text.versions],
            }
        connection.push({"event": "generated", "id": number, **push})

    async def _token(self, text: Generation, timeout_s: float) -> Piece:
        """The next token, whoever computes it.

        Raises:
            SwarmError: nobody did in time.
        """
        fault: PeerFault | None = None
        for _ in range(TRIES):
            done = await self._errand(text.context(), timeout_s)
            if isinstance(done, ErrandFailed):
                raise self._failure(done)
            data = self._tensors.data_of(done.output)
            try:
                if len(data) <= INLINE_BYTES_MAX:
                    return text.take(data, done.version)
                loop, pool = asyncio.get_running_loop(), self._runtime.pool
                return await loop.run_in_executor(pool, text.take, data, done.version)
            except PeerFault as caught:
                fault = caught
        raise NoWorker("the answers are no logits", str(fault), "look at the workers' events")

    async def _errand(self, tokens: bytes, timeout_s: float) -> Errand:
        runtime = self._runtime
        pipeline = runtime.node.pipeline

        def start(now: float) -> int:
            return pipeline.errand(now, "generate", tokens, timeout_s=timeout_s)

        try:
            handle: int = runtime.driver.run(start)
        except LocalProtocolError as error:
            raise ShareUsedUp(error.what, error.why, "try again later") from None
        waiting: asyncio.Future[Errand] = asyncio.get_running_loop().create_future()
        self._waiting[handle] = waiting
        try:
            return await waiting
        finally:
            if self._waiting.pop(handle, None) is not None:
                pipeline.cancel_errand(handle)

    def _failure(self, failed: ErrandFailed) -> SwarmError:
        """The typed error of an errand that failed."""
        stages = self._runtime.manifest.keys.stages
        stage = stage_of(failed.hop, stages)
        name = "the ends" if stage == ENDS else f"stage {stage}"
        whose = f"a worker of {name}" if stages else "a trainer"
        if failed.code == "share":
            return ShareUsedUp(
                "generation has used up its share of the workers' time",
                failed.reason,
                "try again later; the run key generate_share says how much it is",
            )
        if failed.code == "malformed":
            return UsageError("the request is refused", failed.reason, "shorten the prompt")
        if failed.code == "no_worker":
            what = f"nobody serves {name}" if stages else "no trainer is in reach"
            return NoWorker(what, failed.reason, "wait for one to join")
        return NoWorker(f"no answer from {whose}", failed.reason, "try again later")

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def wanted_of(args: Document, model: TextModel) -> Wanted:
    """The request that the arguments of ``generate`` say.

    Raises:
        UsageError: out of bounds, or of another type.
    """
    tokens, stop = args.get("tokens"), args.get("stop") or []
    try:
        sampling = Sampling(
            float(args.get("temperature") or 0.0),
            int(args.get("top_k") or 0),
            1.0 if args.get("top_p") is None else float(args["top_p"]),
            int(args.get("seed") or 0),
        )
        return Wanted(
            prompt_of(
                None if args.get("prompt") is None else str(args["prompt"]),
                None if tokens is None else [int(one) for one in tokens],
                model,
            ),
            16 if args.get("max_tokens") is None else int(args["max_tokens"]),
            sampling,
            tuple(str(one).encode("utf-8", "surrogateescape") for one in stop),
        )
    except ConfigError as error:
        raise UsageError(error.what, error.why, error.todo) from None
    except (TypeError, ValueError) as error:
        raise UsageError("the request", str(error), "see `swarmtrain generate --help`") from None
