"""The dashboard's application over a made-up run: routes, stream, and who may look."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest

from swarmtrain.dashboard import app as dashboard_app
from swarmtrain.dashboard.app import STATIC, build_app
from swarmtrain.dashboard.feed import Feed
from swarmtrain.dashboard.guard import LOGINS_PER_MINUTE_MAX
from tests.swarmtrain.fake_pipeline import FakePipeline
from tests.swarmtrain.fake_run import IDS, FakeClient, FakeRun

T = TypeVar("T")
TOKEN = "t" * 40


def make_feed(run: FakeRun | None = None) -> Feed:
    client = FakeClient(run or FakeRun())
    feed = Feed(lambda: client)
    feed.poll()
    return feed


def browse(
    visit: Callable[[httpx.AsyncClient], Awaitable[T]],
    feed: Feed | None = None,
    *,
    token: str | None = None,
    base: str = "http://127.0.0.1:8470",
) -> T:
    async def go() -> T:
        transport = httpx.ASGITransport(build_app(feed or make_feed(), token=token))
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await visit(client)

    return asyncio.run(go())


def get(path: str, **keys: Any) -> httpx.Response:
    headers = keys.pop("headers", None)
    return browse(lambda client: client.get(path, headers=headers), **keys)


def test_the_api_has_every_section() -> None:
    run = get("/api/v1/run").json()
    assert run["source"] == {"connected": True, "error": None}
    assert run["run"]["rounds_committed"] == 24
    assert run["losses"][0] == [0, pytest.approx(FakeRun().loss(0))]
    assert [peer["id"] for peer in get("/api/v1/peers").json()["peers"]] == list(IDS)
    rounds = get("/api/v1/rounds").json()
    assert sum(one["outcome"] == "aborted" for one in rounds["rounds"]) == 2
    row = rounds["timeline"][-1]
    assert row["opened_wall_s"] == FakeRun().opened_s(row["round"])
    assert row["round"] == 23
    events = get("/api/v1/events?code=R321&last=1").json()["events"]
    assert [(event["round"], event["reason"]) for event in events] == [(15, "owner lost")]
    assert get("/api/v1/events?last=many").status_code == 400


def test_numbers_that_json_has_not_are_null() -> None:
    run = FakeRun()
    run.loss = lambda number: float("nan")  # type: ignore[method-assign]
    response = get("/api/v1/run", feed=make_feed(run))
    assert response.json()["run"]["loss"] is None


def test_a_pipeline_has_its_stages_in_the_api() -> None:
    pipeline = get("/api/v1/pipeline", feed=make_feed(FakePipeline(away=5))).json()["pipeline"]
    assert [one["state"] for one in pipeline["coverage"]] == ["ok", "ok", "ok", "endangered"]
    assert pipeline["trouble"] == ["stage 3 is endangered: 1 member in reach, at least 2 wanted"]
    rounds = get("/api/v1/rounds", feed=make_feed(FakePipeline())).json()
    row = rounds["timeline"][-1]
    assert (row["channel"], row["round"]) == ("steps", 23)
    assert row["opened_wall_s"] == pytest.approx(FakePipeline().opened_s(23) + 2.2)
    assert row["compute_spans_s"]
    assert get("/api/v1/pipeline").json() == {"pipeline": None}


def test_stages_are_gauges() -> None:
    text = get("/metrics", feed=make_feed(FakePipeline(away=5, lost=2))).text
    assert 'swarmtrain_stage_members{stage="3"} 1.0\n' in text
    assert 'swarmtrain_stage_minimum{stage="3"} 2.0\n' in text
    assert 'swarmtrain_stage_lost{stage="2"} 1.0\n' in text
    assert 'swarmtrain_stage_lost{stage="1"} 0.0\n' in text
    assert "swarmtrain_stage" not in get("/metrics").text


def test_metrics_are_prometheus() -> None:
    text = get("/metrics").text
    assert "swarmtrain_up 1.0\n" in text
    assert "swarmtrain_rounds_committed_total 24.0\n" in text
    assert 'swarmtrain_round{channel="train/0/0"} 24.0\n' in text
    assert "# TYPE swarmtrain_bytes_sent_total counter" in text
    assert "anna" not in text
    assert "203.0.113" not in text


class DealtRun(FakeRun):
    """Data dealt in shards, some of them left by a member that is gone."""

    def status(self) -> dict[str, Any]:
        data = {
            "shards": 16,
            "samples": 4096,
            "digest": "ab" * 32,
            "epoch": 3,
            "shards_done": 5,
            "samples_counted": 14_000,
            "shards_held": 9,
            "shards_free": 2,
            "epochs": 3.42,
        }
        return super().status() | {"data": data, "paused": "by hand"}

    def peers(self) -> dict[str, Any]:
        rows = super().peers()["peers"]
        return {"peers": [row | {"samples_left": 100 + n} for n, row in enumerate(rows)]}


def test_metrics_tell_of_data_members_and_troubles() -> None:
    text = get("/metrics", feed=make_feed(DealtRun())).text
    for line in (
        "swarmtrain_data_epoch 3.0",
        "swarmtrain_data_shards_free 2.0",
        "swarmtrain_data_samples_counted_total 14000.0",
        "swarmtrain_data_epochs 3.42",
        "swarmtrain_paused 1.0",
        "swarmtrain_syncing 0.0",
        "swarmtrain_stewards 3.0",
        "swarmtrain_reachable 1.0",
        "swarmtrain_relayed_bytes_total 1.048576e+06",
        "swarmtrain_trainer_steps 480.0",
        "swarmtrain_outer_lr 0.4",
        'swarmtrain_member_samples_left{member="5c5c5c5c5c5c5c5c"} 101.0',
        'swarmtrain_member_connected{member="1a1a1a1a1a1a1a1a"} 1.0',
        'swarmtrain_member_compute_utilization{member="5c5c5c5c5c5c5c5c"} 0.97',
    ):
        assert line + "\n" in text, line
    assert "ab" * 32 not in text and "laptop" not in text
    assert "swarmtrain_data" not in get("/metrics").text


def test_health_and_readiness() -> None:
    assert get("/healthz").status_code == 200
    assert get("/readyz").status_code == 200
    client = FakeClient(FakeRun())
    client.closed = True
    feed = Feed(lambda: client)
    feed.poll()
    assert get("/healthz", feed=feed).status_code == 200
    assert get("/readyz", feed=feed).status_code == 503


def test_the_page_needs_nothing_from_elsewhere() -> None:
    response = get("/")
    assert response.status_code == 200
    page = response.text
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    for match in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert match.startswith("/")
        assert get(match).status_code == 200
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r'\son\w+="', page)
    assert not re.search(r'\sstyle="', page)


def test_scripts_never_make_markup_of_text() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text()
        for bad in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert bad not in text, path.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name


def test_static_files_are_only_those() -> None:
    assert get("/static/app.js").headers["content-type"].startswith("text/javascript")
    for path in ("/static/index.html", "/static/../app.py", "/static/%2e%2e/app.py"):
        assert get(path).status_code == 404
    assert set(dashboard_app.FILES) | {"index.html", "login.html"} == {
        path.name for path in STATIC.iterdir()
    }


@pytest.mark.parametrize("name", ["127.0.0.1:8470", "localhost", "LOCALHOST:1", "[::1]:8470"])
def test_loopback_names_are_answered(name: str) -> None:
    assert get("/healthz", headers={"host": name}).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example:8470", "", "10.0.0.1"])
def test_other_names_are_misdirected(name: str) -> None:
    response = get("/api/v1/run", headers={"host": name})
    assert response.status_code == 421
    assert "anna" not in response.text


def test_a_name_can_be_allowed() -> None:
    async def visit() -> int:
        app = build_app(make_feed(), hosts=("runs.example",))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://runs.example") as one:
            return (await one.get("/healthz")).status_code

    assert asyncio.run(visit()) == 200


def test_only_reading_is_possible() -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        status = browse(lambda c, m=method: c.request(m, "/api/v1/run", content=b"x")).status_code
        assert status == 405


def test_foreign_origins_and_long_bodies_are_refused() -> None:
    response = browse(
        lambda c: c.post("/login", headers={"origin": "http://evil.example"}), token=TOKEN
    )
    assert response.status_code == 403
    response = browse(lambda c: c.post("/login", content=b"x" * 70_000), token=TOKEN)
    assert response.status_code == 413


def test_with_a_token_nothing_is_shown_without_it() -> None:
    for path in ("/", "/api/v1/run", "/events", "/metrics", "/readyz", "/static/app.js"):
        assert get(path, token=TOKEN).status_code == 401
    assert get("/healthz", token=TOKEN).status_code == 200
    assert get("/", token=TOKEN, headers={"accept": "text/html"}).headers["location"] == "/login"
    right = {"authorization": f"Bearer {TOKEN}"}
    assert get("/api/v1/run", token=TOKEN, headers=right).status_code == 200
    wrong = {"authorization": "Bearer " + "u" * 40}
    assert get("/api/v1/run", token=TOKEN, headers=wrong).status_code == 401
    assert get(f"/api/v1/run?token={TOKEN}", token=TOKEN).status_code == 401


def test_logging_in_gives_a_cookie_that_scripts_cannot_read() -> None:
    async def visit(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        login = await client.post("/login", data={"token": TOKEN})
        return login, await client.get("/api/v1/run")

    login, page = browse(visit, token=TOKEN)
    assert (login.status_code, login.headers["location"]) == (303, "/")
    cookie = login.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in cookie
    assert page.status_code == 200


def test_guessing_is_slowed_down() -> None:
    async def visit(client: httpx.AsyncClient) -> list[int]:
        return [
            (await client.post("/login", data={"token": f"guess{n}"})).status_code
            for n in range(LOGINS_PER_MINUTE_MAX + 2)
        ]

    assert browse(visit, token=TOKEN) == [401] * LOGINS_PER_MINUTE_MAX + [429, 429]


async def stream(feed: Feed, act: Callable[[], None]) -> list[tuple[str, dict[str, Any]]]:
    """The first two messages of ``/events``, with ``act`` in between, over plain ASGI."""
    app = build_app(feed)
    got: list[tuple[str, dict[str, Any]]] = []
    first, second = asyncio.Event(), asyncio.Event()
    scope = {
        "type": "http", "method": "GET", "path": "/events", "query_string": b"",
        "headers": [(b"host", b"localhost")], "scheme": "http", "http_version": "1.1",
        "root_path": "", "server": ("localhost", 80), "client": ("127.0.0.1", 9),
        "asgi": {"spec_version": "2.4", "version": "3.0"},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        await second.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        text = message.get("body", b"").decode()
        match = re.match(r"event: (\w+)\ndata: (.*)\n\n\Z", text)
        if match:
            got.append((match[1], msgspec.json.decode(match[2])))
            (second if first.is_set() else first).set()
            if second.is_set():
                raise OSError("the viewer went away")

    task = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
    await asyncio.wait_for(first.wait(), 5)
    act()
    await asyncio.wait_for(second.wait(), 5)
    await asyncio.wait([task], timeout=5)
    assert task.done()
    task.exception()
    return got


def test_the_stream_begins_with_everything_and_goes_on_with_changes() -> None:
    run = FakeRun()
    feed = make_feed(run)

    def act() -> None:
        run.rounds += 1
        feed.poll()

    (name, snapshot), (then, delta) = asyncio.run(stream(feed, act))
    assert (name, then) == ("snapshot", "delta")
    assert set(snapshot) == {
        "source", "run", "peers", "rounds", "events", "losses", "timeline",
    }  # fmt: skip
    assert snapshot["run"]["rounds_committed"] == 24
    assert delta["run"]["rounds_committed"] == 25
    assert "source" not in delta
    assert feed._subscribers == []


def test_the_static_folder_is_in_the_package() -> None:
    assert Path(dashboard_app.__file__).parent / "static" == STATIC


def test_a_query_that_is_no_text_is_refused() -> None:
    """The redirect to a path without its last slash decodes it, and would end in a traceback."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/healthz/",
        "raw_path": b"/healthz/",
        "query_string": b"a=\xdf",
        "headers": [(b"host", b"127.0.0.1:8470")],
        "scheme": "http",
        "server": ("127.0.0.1", 8470),
        "client": ("127.0.0.1", 5),
    }
    told: list[Any] = []

    async def visit() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            told.append(message)

        await build_app(make_feed())(scope, receive, send)

    asyncio.run(visit())
    assert told[0]["status"] == 400
