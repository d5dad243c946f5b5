"""``/v1``: answers in the shape of OpenAI's API, streams in order, errors, and who may ask."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx
import msgspec
import pytest

from swarmtrain.dashboard.app import build_app
from swarmtrain.dashboard.feed import Feed
from swarmtrain_peer.control import ControlClosed, error_to_dict
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import (
    NoWorker,
    PromptTooLong,
    RunOver,
    ShareUsedUp,
    SwarmError,
    UsageError,
)
from tests.swarmtrain.fake_run import FakeClient, FakeRun

T = TypeVar("T")
Document = dict[str, Any]
TOKEN = "t" * 40
PIECES = [
    {"token": 104, "text": "h", "version": 3},
    {"token": 195, "text": "", "version": 3},
    {"token": 164, "text": "ä", "version": 4},
    {"finish": "stop", "text": "hä", "tokens": [104, 195, 164], "versions": [[3, 2], [4, 1]]},
]
VERSIONS = [{"version": 3, "tokens": 2}, {"version": 4, "tokens": 1}]


class Talker:
    """A control connection that writes what the script says, when it says it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.hear: Callable[[Document], None] = lambda push: None
        self.end: Callable[[], None] = lambda: None
        self.closed = False
        script.talkers.append(self)

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        assert name == "generate"
        self.script.asked.append(args or {})
        if self.script.refusal is not None:
            raise self.script.refusal
        for push in self.script.pushes:
            self.hear({"event": "generated", **push})
        self.script.begun.set()
        return {"prompt_tokens": 4, "counts": "rounds", "run": "c0ffee"}

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        self.hear = callback

    def on_close(self, callback: Callable[[], None]) -> None:
        self.end = callback

    def close(self) -> None:
        self.closed = True
        self.end()


class Script:
    def __init__(self, *pushes: Document, refusal: SwarmError | None = None) -> None:
        self.pushes = pushes or tuple(PIECES)
        self.refusal = refusal
        self.asked: list[Document] = []
        self.talkers: list[Talker] = []
        self.begun = threading.Event()

    def connect(self) -> Talker:
        return Talker(self)


def make_app(script: Script, token: str | None = None) -> Any:
    client = FakeClient(FakeRun())
    feed = Feed(lambda: client)
    feed.poll()
    return build_app(feed, token=token, connect=script.connect)


def browse(
    script: Script, visit: Callable[[httpx.AsyncClient], Awaitable[T]], token: str | None = None
) -> T:
    async def go() -> T:
        transport = httpx.ASGITransport(make_app(script, token))
        base = "http://127.0.0.1:8470"
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await visit(client)

    return asyncio.run(go())


def post(script: Script, **body: Any) -> httpx.Response:
    body = {"prompt": "def ", **body}
    return browse(script, lambda client: client.post("/v1/completions", json=body))


def chunks(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == "" and all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def test_an_answer_has_the_shape_that_clients_expect() -> None:
    script = Script()
    response = post(script, model="tiny-lm", max_tokens=3, temperature=0, seed=7, stop="x")
    assert response.status_code == 200
    document = response.json()
    assert document.pop("id").startswith("cmpl-") and document.pop("created") > 0
    assert document == {
        "object": "text_completion",
        "model": "tiny-lm",
        "choices": [{"index": 0, "text": "hä", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
        "swarmtrain": {"versions": VERSIONS, "token_ids": [104, 195, 164], "counts": "rounds"},
    }
    assert script.asked == [
        {
            "id": 0,
            "prompt": "def ",
            "max_tokens": 3,
            "temperature": 0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 7,
            "stop": ["x"],
        }
    ]
    assert [talker.closed for talker in script.talkers] == [True]


def test_defaults_are_that_apis_and_the_seed_is_a_new_one_each_time() -> None:
    script = Script()
    for _ in range(2):
        assert post(script, max_tokens=None, stop=None, n=1, echo=False).status_code == 200
    one, two = script.asked
    assert (one["max_tokens"], one["temperature"], one["stop"]) == (16, 1.0, [])
    assert one["seed"] != two["seed"] and 0 <= one["seed"] < 1 << 64


def test_token_ids_and_a_list_of_one_prompt_are_prompts() -> None:
    script = Script()
    for prompt in ([1, 2], [[3, 4]], ["text"]):
        assert post(script, prompt=prompt).status_code == 200
    assert [asked.get("tokens", asked.get("prompt")) for asked in script.asked] == [
        [1, 2], [3, 4], "text",
    ]  # fmt: skip


def test_a_stream_has_a_chunk_for_each_token_and_an_end() -> None:
    script = Script()
    events = chunks(post(script, stream=True, stream_options={"include_usage": True}))
    assert events[-1] == "[DONE]"
    documents = [msgspec.json.decode(event) for event in events[:-1]]
    assert len({document["id"] for document in documents}) == 1
    said = [
        (document["choices"][0]["text"], document["choices"][0]["finish_reason"])
        for document in documents[:-1]
    ]
    assert said == [("h", None), ("", None), ("ä", None), ("", "stop")]
    assert [document["swarmtrain"].get("version") for document in documents[:3]] == [3, 3, 4]
    assert documents[3]["swarmtrain"]["versions"] == VERSIONS
    assert (documents[4]["choices"], documents[4]["usage"]["total_tokens"]) == ([], 7)
    assert len(chunks(post(script, stream=True))) == 5, "usage only on request"
    assert all(talker.closed for talker in script.talkers)


async def streamed(app: Any, on_chunk: Callable[[bytes], None], leave: asyncio.Event) -> None:
    """A streaming request over plain ASGI, each chunk as it is sent; ends when ``leave`` is set."""
    body = msgspec.json.encode({"prompt": "a", "stream": True})
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())],
        "scheme": "http", "http_version": "1.1", "root_path": "",
        "server": ("localhost", 80), "client": ("127.0.0.1", 9),
        "asgi": {"spec_version": "2.3", "version": "3.0"},
    }  # fmt: skip
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Document:
        if given:
            return given.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Document) -> None:
        if message.get("body"):
            on_chunk(message["body"])

    await asyncio.wait_for(app(scope, receive, send), 10)


def test_tokens_are_sent_when_they_are_drawn_not_at_the_end() -> None:
    """The second piece is pushed only once the first was seen, and so on."""
    script = Script(PIECES[0])
    seen: list[bytes] = []
    rest = queue.SimpleQueue[Document]()
    for push in PIECES[1:]:
        rest.put(push)

    def on_chunk(data: bytes) -> None:
        seen.append(data)
        if not rest.empty():
            script.talkers[0].hear({"event": "generated", **rest.get()})

    async def go() -> None:
        await streamed(make_app(script), on_chunk, asyncio.Event())

    asyncio.run(go())
    assert len(seen) == 5 and seen[-1] == b"data: [DONE]\n\n"


def test_a_client_that_goes_away_ends_its_text() -> None:
    script = Script(PIECES[0])
    app = make_app(script)

    async def go() -> None:
        for _ in range(limits.GENERATIONS_MAX + 1):  # and does not keep its place
            leave = asyncio.Event()
            await streamed(app, lambda data, leave=leave: leave.set(), leave)  # type: ignore[misc]

    asyncio.run(go())
    assert [talker.closed for talker in script.talkers] == [True] * (limits.GENERATIONS_MAX + 1)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (PromptTooLong("a prompt of 65 tokens"), 400, "invalid_request_error",
         "context_length_exceeded"),
        (UsageError("max_tokens 0"), 400, "invalid_request_error", "invalid_value"),
        (ShareUsedUp("used up"), 429, "rate_limit_error", "share_used_up"),
        (NoWorker("nobody serves stage 2"), 503, "server_error", "unavailable"),
        (RunOver("the run is over"), 503, "server_error", "run_over"),
        (ControlClosed("no peer process answers"), 503, "server_error", "unavailable"),
    ],
)  # fmt: skip
def test_errors_have_a_status_before_the_first_token_and_a_chunk_after_it(
    error: SwarmError, status: int, kind: str, code: str
) -> None:
    for stream in (False, True):
        response = post(Script(refusal=error), stream=stream)
        assert response.status_code == status
        found = response.json()["error"]
        assert (found["type"], found["code"], found["message"]) == (kind, code, str(error))
        assert ("retry-after" in response.headers) == (status in (429, 503))
    late = {"error": error_to_dict(error)}
    assert post(Script(late)).status_code == status
    assert post(Script(PIECES[0], late)).status_code == status
    events = chunks(post(Script(PIECES[0], late), stream=True))
    assert msgspec.json.decode(events[-1])["error"]["code"] == code


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": True}, "temperature"),
        ({"seed": "x"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": 7}, "stop"),
        ({"stream_options": "usage"}, "stream_options"),
        ({"n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"logprobs": 1}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_fields_that_cannot_be_meant_are_named(body: Document, param: str) -> None:
    script = Script()
    response = post(script, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert script.asked == []


def test_bodies_that_are_no_objects_are_refused() -> None:
    bad = (b"", b"{", b"[]", b'"\xff"', b'{"top_p": 1e999}', b'{"top_p": NaN}', b'{"seed": %d}')
    for content in (*bad, b'{"prompt": "\\ud800"}', b'{"seed": 18446744073709551616}'):
        response = browse(
            Script(), lambda client, c=content: client.post("/v1/completions", content=c)
        )  # type: ignore[misc]
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_run_is_the_one_model() -> None:
    script = Script()
    found = browse(script, lambda client: client.get("/v1/models")).json()
    assert found["object"] == "list" and [one["id"] for one in found["data"]] == ["tiny-lm"]
    response = post(script, model="gpt-4")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert post(script, model=FakeRun().status()["run"]).status_code == 200
    other = browse(script, lambda client: client.post("/v1/chat/completions", json={}))
    assert other.status_code == 404 and other.json()["error"]["code"] == "unknown_url"


def test_the_dashboards_rules_hold_and_refusals_have_the_same_shape() -> None:
    script = Script()
    body = {"prompt": "a"}

    async def visit(client: httpx.AsyncClient) -> list[httpx.Response]:
        url = "/v1/completions"
        right = {"authorization": f"Bearer {TOKEN}"}
        return [
            await client.post(url, json=body),
            await client.post(url, json=body, headers={"authorization": "Bearer wrong"}),
            await client.post(url, json=body, headers={**right, "host": "evil.example"}),
            await client.post(url, json=body, headers={**right, "origin": "http://evil.example"}),
            await client.post(url, json={"prompt": "x" * 70_000}, headers=right),
            await client.post(url, json=body, headers=right),
        ]

    responses = browse(script, visit, TOKEN)
    assert [one.status_code for one in responses] == [401, 401, 421, 403, 413, 200]
    assert responses[0].headers["www-authenticate"] == "Bearer"
    assert responses[0].json()["error"]["type"] == "authentication_error"
    assert all(one.json()["error"]["message"] for one in responses[:-1])
    assert len(script.asked) == 1


def test_without_a_connection_there_are_no_completions() -> None:
    client = FakeClient(FakeRun())
    app = build_app(Feed(lambda: client))

    async def visit() -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as one:
            return (await one.post("/v1/completions", json={"prompt": "a"})).status_code

    assert asyncio.run(visit()) == 404


def test_paths_of_this_machine_are_not_told() -> None:
    gone = ControlClosed("no peer process answers", "runs/x/control.sock: no such file")
    response = post(Script(refusal=gone))
    assert response.json()["error"]["message"] == "no peer process answers"
