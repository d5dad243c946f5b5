"""``/v1/completions`` and ``/v1/models``: the run's model, in the shape of OpenAI's API.

Clients made for that API work with ``base_url=http://127.0.0.1:8470/v1`` and the dashboard's token
as key. A text is written by the swarm that trains (``swarmtrain_peer/writer.py``), each token by
the newest weights, within ``generate_share`` of the workers' time. Beyond that API's fields an
answer has ``swarmtrain``: which tokens came from which version of the weights, and their ids.
Default settings are that API's: 16 tokens, temperature 1, a seed that nobody knows.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

import msgspec
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from swarmtrain.dashboard.feed import Feed
from swarmtrain_peer import host
from swarmtrain_peer import talk as tk
from swarmtrain_peer.control import ControlClosed
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import (
    PromptTooLong,
    RunOver,
    ShareUsedUp,
    SwarmError,
    UsageError,
)

Document = dict[str, Any]

NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
}
"""Fields that do nothing here, and the values besides null with which they ask for nothing."""
KNOWN = {
    *NOT_SUPPORTED, "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed",
    "stop", "stream", "stream_options", "user",
}  # fmt: skip
RETRY_AFTER_S = "2"


class Client(tk.Client, Protocol):
    """A control connection for one text."""

    def close(self) -> None:
        """Disconnect: that ends the text."""


class BadRequest(UsageError):
    """A field that cannot be meant."""

    def __init__(self, why: str, param: str | None = None) -> None:
        super().__init__(why)
        self.param = param


def error_response(error: SwarmError) -> Response:
    """An error in the shape of that API, with its HTTP status."""
    status, kind, code = 503, "server_error", "unavailable"
    if isinstance(error, PromptTooLong):
        status, kind, code = 400, "invalid_request_error", "context_length_exceeded"
    elif isinstance(error, UsageError):
        status, kind, code = 400, "invalid_request_error", "invalid_value"
    elif isinstance(error, ShareUsedUp):
        status, kind, code = 429, "rate_limit_error", "share_used_up"
    elif isinstance(error, RunOver):
        code = "run_over"
    headers = {"Retry-After": RETRY_AFTER_S} if status in (429, 503) else {}
    # Paths of this machine are nobody's business who asks from elsewhere.
    message = error.what if isinstance(error, ControlClosed) else str(error)
    return error_json(status, message, kind, code, getattr(error, "param", None), headers)


def error_json(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """``{"error": {message, type, param, code}}``."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return Response(msgspec.json.encode(body), status, headers, "application/json")


class Completions:
    """The handlers.

    Args:
        feed: knows the run's name.
        connect: opens a control connection to the peer process.
    """

    def __init__(self, feed: Feed, connect: Callable[[], Client]) -> None:
        self._feed = feed
        self._connect = connect
        self._began_s = int(host.wall_s())
        self._running = 0

    async def models(self, request: Request) -> Response:
        """The one model of the run."""
        name = self._names()[0]
        model = {"id": name, "object": "model", "created": self._began_s, "owned_by": "swarmtrain"}
        body = {"object": "list", "data": [model] if name else []}
        return Response(msgspec.json.encode(body), media_type="application/json")

    async def nothing(self, request: Request) -> Response:
        """Any other path of that API."""
        return error_json(404, f"no such path: {request.url.path}", code="unknown_url")

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        try:
            body = _parsed(await request.body())
            names = self._names()
            asked = body.get("model")
            if asked is not None and asked not in names:
                message = f"no model {asked!r} here; this run's is {names[0]!r}"
                return error_json(404, message, code="model_not_found", param="model")
            args = arguments_of(body)
            if self._running >= limits.GENERATIONS_MAX:
                raise ShareUsedUp("too many texts at once", f"{self._running} are being written")
        except SwarmError as error:
            return error_response(error)
        self._running += 1
        answer = _Answer(names[0], int(host.wall_s()), self._connect)
        try:
            await answer.begin(args)
            if body.get("stream"):
                usage = bool((body.get("stream_options") or {}).get("include_usage"))
                return _Stream(answer.stream(usage), lambda: self._end(answer))
            whole = await answer.whole(request)
        except SwarmError as error:
            self._end(answer)
            return error_response(error)
        except BaseException:
            self._end(answer)
            raise
        self._end(answer)
        return Response(msgspec.json.encode(whole), media_type="application/json")

    def _names(self) -> list[str]:
        """What the model may be called: the run's name, and its id."""
        run = self._feed.snapshot()["run"]
        return [str(run.get("name") or ""), str(run.get("run") or "")]

    def _end(self, answer: _Answer) -> None:
        self._running -= 1
        answer.close()


class _Stream(StreamingResponse):
    """Server-sent events; however they end, begun or not, ``end`` is called once."""

    def __init__(self, stream: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        headers = {"X-Accel-Buffering": "no"}
        super().__init__(stream, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class _Answer:
    """One text on its way."""

    def __init__(self, model: str, created_s: int, connect: Callable[[], Client]) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._closed = False
        self._pieces: Iterator[Document] = iter(())
        self._first: Document = {}
        self._begun: Document = {}
        self._base: Document = {
            "id": f"cmpl-{host.entropy(12).hex()}",
            "object": "text_completion",
            "created": created_s,
            "model": model,
        }

    async def begin(self, args: Document) -> None:
        """Ask, and wait for the first token: until then an error has a status of its own.

        Raises:
            SwarmError: as ``Talk``.
        """

        def ask() -> None:
            self._client = self._connect()
            if self._closed:  # whoever asked is gone
                self._client.close()
            talk = tk.Talk(self._client, args)
            self._begun, self._pieces = talk.begun, talk.pieces()
            self._first = next(self._pieces)

        await run_in_threadpool(ask)

    def close(self) -> None:
        """Let go: a text that is not done is written no further."""
        self._closed = True
        if self._client is not None:
            self._client.close()

    async def _all(self) -> AsyncIterator[Document]:
        yield self._first
        async for piece in iterate_in_threadpool(self._pieces):
            yield piece

    async def whole(self, request: Request) -> Document:
        """The answer in one piece."""
        last: Document = {}
        async for piece in self._all():
            last = piece
            if await request.is_disconnected():
                raise SwarmError("the client went away")
        return {
            **self._chunk(last["text"], last["finish"], self._said(last)),
            "usage": self._usage(last),
        }

    async def stream(self, include_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each token, one with the reason of the end, [DONE]."""
        try:
            async for piece in self._all():
                if piece.get("finish"):
                    yield _event(self._chunk("", piece["finish"], self._said(piece)))
                    if include_usage:
                        yield _event({**self._base, "choices": [], "usage": self._usage(piece)})
                else:
                    about = {"version": piece["version"], "token_id": piece["token"]}
                    yield _event(self._chunk(piece["text"], None, about))
        except SwarmError as error:
            yield b"data: " + bytes(error_response(error).body) + b"\n\n"
            return
        yield b"data: [DONE]\n\n"

    def _chunk(self, text: str, finish: str | None, about: Document) -> Document:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        about = {**about, "counts": self._begun["counts"]}
        return {**self._base, "choices": [choice], "swarmtrain": about}

    def _said(self, last: Document) -> Document:
        versions = [{"version": version, "tokens": n} for version, n in last["versions"]]
        return {"versions": versions, "token_ids": last["tokens"]}

    def _usage(self, last: Document) -> Document:
        prompt, said = int(self._begun["prompt_tokens"]), len(last["tokens"])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
        }


def _event(document: Document) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _json(text: str) -> Any:
    """A document of JSON; from the standard library, as msgspec takes 30 µs for 1e308.

    Raises:
        ValueError: none, or with a number or a character that we cannot send on.
    """
    body = json.loads(text, parse_int=_whole, parse_constant=_none)
    for value in body.values() if isinstance(body, dict) else ():
        if isinstance(value, float) and not math.isfinite(value):  # lists of them are refused
            raise ValueError("number out of range")
        for said in value if isinstance(value, list) else [value]:
            if isinstance(said, str):
                said.encode()  # half a surrogate pair is no character
    return body


def _whole(digits: str) -> int:
    if not -(1 << 63) <= (number := int(digits)) < 1 << 64:
        raise ValueError("number out of range")
    return number


def _none(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _parsed(data: bytes) -> Document:
    try:
        body = _json(data.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is a JSON object")
    for name in sorted(body):
        if name not in KNOWN:
            raise BadRequest(f"unknown field {name!r}", name)
        value = body[name]
        nothing = NOT_SUPPORTED.get(name)
        if nothing is not None and value is not None and value not in nothing:
            raise BadRequest(f"{name} = {str(value)[:100]!r} is not supported", name)
    return body


def arguments_of(body: Document) -> Document:
    """The arguments of ``writer.generate`` for a body of that API.

    Raises:
        BadRequest: a field of another type.
    """
    args: Document = {
        "id": 0,
        "max_tokens": _number(body, "max_tokens", 16, whole=True),
        "temperature": _number(body, "temperature", 1.0),
        "top_p": _number(body, "top_p", 1.0),
        "top_k": _number(body, "top_k", 0, whole=True),
        "seed": int.from_bytes(host.entropy(8), "little"),
    }
    if body.get("seed") is not None:
        args["seed"] = _number(body, "seed", 0, whole=True)
    stop = body.get("stop")
    args["stop"] = [stop] if isinstance(stop, str) else stop or []
    if not (isinstance(args["stop"], list) and all(isinstance(s, str) for s in args["stop"])):
        raise BadRequest("stop is a string, or a list of strings", "stop")
    if not isinstance(body.get("stream_options") or {}, dict):
        raise BadRequest("stream_options is an object", "stream_options")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        args["prompt"] = prompt
    elif isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        args["tokens"] = prompt
    else:
        raise BadRequest("prompt is one string, or one list of token ids", "prompt")
    return args


def _number(body: Document, name: str, default: float, *, whole: bool = False) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise BadRequest(f"{name} is a {'whole ' if whole else ''}number", name)
    return value
