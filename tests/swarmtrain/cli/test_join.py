"""Entering and founding, up to the point where processes start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli import join as joins
from swarmtrain.cli.join import open_or_found, split_command
from swarmtrain.cli.main import app
from swarmtrain.cli.output import Output
from swarmtrain_peer.config import PeerConfig, load_settings
from swarmtrain_peer.site import Site, list_sites
from swarmtrain_protocols.errors import ConfigError, NotAuthorised, UsageError
from swarmtrain_protocols.manifest import Capability, Ticket, sign_capability


class FakeSession:
    """Records what would have run."""

    made: ClassVar[list[Any]] = []

    def __init__(self, site: Site, output: Any, trainer: Any, trackers: Any = ()) -> None:
        self.site, self.trainer, self.output = site, trainer, output
        self.trackers = [type(one).__name__ for one in trackers]
        FakeSession.made.append(self)

    def start(self) -> None:
        pass

    def run(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeSession.made = []
    monkeypatch.setattr(joins, "MemberSession", FakeSession)


def make_ticket(home: Path, role: Any = "trainer", vote: bool = False) -> Ticket:
    site, _ = open_or_found(home, None, load_settings(), new=False)
    founder = site.founder()
    assert founder is not None
    capability = Capability(id=b"12345678", run=site.run_id, role=role, vote=vote)
    return Ticket(("127.0.0.1:4000",), site.run_id, sign_capability(founder, capability))


def invoke(home: Path, *arguments: str, stdin: str | None = None) -> Result:
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    words[at:at] = ["--home", str(home)]
    return CliRunner().invoke(app, words, input=stdin)


def test_logs_and_reports_are_asked_for_by_flags_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = str(make_ticket(tmp_path / "one"))
    boards = str(tmp_path / "boards")
    flags = ["--log-format", "json", "--tensorboard", boards, "--wandb", "swarms"]
    assert invoke(tmp_path / "two", "join", ticket, *flags).exit_code == 0
    file = tmp_path / "peer.toml"
    file.write_text(f'[log]\nlevel = "warning"\ntensorboard = "{boards}"\n')
    assert invoke(tmp_path / "two", "join", ticket, "--config", str(file)).exit_code == 0
    first, second = FakeSession.made
    assert first.trackers == ["TensorBoardFiles", "WandbProject"] and first.output.log_json
    assert second.trackers == ["TensorBoardFiles"] and not second.output.log_json
    assert (first.output.level, second.output.level) == ("info", "warning")
    refused = invoke(tmp_path / "two", "join", ticket, "--log-format", "xml")
    assert isinstance(refused.exception, ConfigError) and "log_format" in str(refused.exception)
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused = invoke(tmp_path / "two", "join", ticket, "--wandb", "swarms")
    assert isinstance(refused.exception, ConfigError)


def test_join_enters_the_run_and_trains_its_preset(tmp_path: Path) -> None:
    ticket = make_ticket(tmp_path / "one")
    result = invoke(
        tmp_path / "two", "join", str(ticket), "--name", "bob", "--up", "8Mbit", "--device", "cpu"
    )
    assert result.exit_code == 0, result.exception
    (session,) = FakeSession.made
    assert session.site.ticket() == ticket
    config = session.site.config()
    assert (config.name, config.up_bytes_per_s, config.trains) == ("bob", 1_000_000, True)
    assert "swarmtrain.training.trainer" in session.trainer.arguments
    assert ticket.capability.hex() not in result.output
    assert str(ticket).partition("#")[2] not in result.output


def test_the_ticket_may_come_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = str(make_ticket(tmp_path / "one"))
    file = tmp_path / "ticket"
    file.write_text(ticket + "\n")
    home = tmp_path / "two"
    assert invoke(home, "join", "-", stdin=ticket + "\n").exit_code == 0
    assert invoke(home, "join", "--ticket-file", str(file)).exit_code == 0
    monkeypatch.setenv("SWARMTRAIN_TICKET", ticket)
    assert invoke(home, "join").exit_code == 0
    assert invoke(home, "join", "--", "python", "train.py", "--json").exit_code == 0
    assert [str(session.site.ticket()) for session in FakeSession.made] == [ticket] * 4
    assert list(FakeSession.made[-1].trainer.arguments) == ["python", "train.py", "--json"]
    assert FakeSession.made[-1].trainer.script


def test_own_code_after_two_dashes(tmp_path: Path) -> None:
    ticket = str(make_ticket(tmp_path / "one"))
    assert invoke(tmp_path / "two", "join", ticket, "--", "python", "train.py").exit_code == 0
    assert list(FakeSession.made[0].trainer.arguments) == ["python", "train.py"]


def test_the_first_word_is_the_ticket_unless_that_came_from_elsewhere() -> None:
    assert split_command("swarm://x", ["a"], None) == ("swarm://x", ["a"])
    assert split_command("python", ["a"], Path("t")) == (None, ["python", "a"])
    assert split_command("-", ["a"], None) == ("-", ["a"])
    assert split_command(None, [], None) == (None, [])


def test_a_ticket_for_seeds_does_not_train(tmp_path: Path) -> None:
    ticket = str(make_ticket(tmp_path / "one", role="seed", vote=True))
    refused = invoke(tmp_path / "two", "join", ticket)
    assert isinstance(refused.exception, NotAuthorised)
    assert invoke(tmp_path / "two", "seed", ticket, "--hold-state").exit_code == 0
    (session,) = FakeSession.made
    config = session.site.config()
    assert (config.trains, config.holds_state, config.votes) == (False, True, True)
    assert session.trainer is None


def test_run_keys_cannot_be_brought_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = str(make_ticket(tmp_path / "one"))
    monkeypatch.setenv("SWARMTRAIN_COMM__CODEC", "bf16")
    refused = invoke(tmp_path / "two", "join", ticket)
    assert isinstance(refused.exception, ConfigError)
    assert "codec_scatter" in refused.exception.why
    assert list_sites(tmp_path / "two") == []


def test_a_run_is_gone_on_with_when_its_keys_are_the_same(tmp_path: Path) -> None:
    settings = load_settings(None, {}, {"run.name": "a"})
    first, old = open_or_found(tmp_path, None, settings, new=False)
    assert not old
    assert open_or_found(tmp_path, None, settings, new=False) == (first, True)
    assert open_or_found(tmp_path, first.folder.name[:8], settings, new=False) == (first, True)
    other, old = open_or_found(tmp_path, None, settings, new=True)
    assert (old, other.run_id == first.run_id) == (False, False)
    changed = load_settings(None, {}, {"run.name": "b"})
    assert open_or_found(tmp_path, None, changed, new=False)[1] is False
    first.founder_path.unlink()
    with pytest.raises(UsageError, match="not founded here"):
        open_or_found(tmp_path, str(first.folder), settings, new=False)


def test_a_public_dashboard_gets_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(
        joins, "start_process", lambda arguments, output, **keys: started.append(arguments)
    )
    site, _ = open_or_found(tmp_path, None, load_settings(), new=False)
    joins.start_dashboard(site, PeerConfig(dashboard="127.0.0.1:1"), Output())
    assert "--token-file" not in started[0]
    joins.start_dashboard(site, PeerConfig(dashboard="0.0.0.0:1"), Output())
    file = site.folder / "dashboard.token"
    assert started[1][-2:] == ["--token-file", str(file)]
    assert len(file.read_text()) == 48
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_text() not in capsys.readouterr().err
