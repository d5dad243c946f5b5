"""``swarmtrain run recover`` says what it would do, and does it when told so."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from swarmtrain.cli.main import app
from swarmtrain_protocols.errors import NotAuthorised
from tests.peer.test_recovering import site as founded

site = founded


def test_it_asks_first(site: Path, tmp_path: Path) -> None:
    home = ["--home", str(tmp_path / "home")]
    before = site.log_path.read_bytes()  # type: ignore[attr-defined]
    first = CliRunner().invoke(app, ["run", "recover", *home])
    assert first.exit_code == 0
    assert "nothing was changed; --yes does it" in first.stdout
    assert "kept: 2 entries, no model yet" in first.stdout
    assert site.log_path.read_bytes() == before  # type: ignore[attr-defined]
    second = CliRunner().invoke(app, ["run", "recover", "--yes", "--json", *home])
    document = json.loads(second.stdout.splitlines()[-1])
    assert document["ok"] and document["done"] and document["kept_entries"] == 2
    assert site.log_path.read_bytes() != before  # type: ignore[attr-defined]
    third = CliRunner().invoke(app, ["run", "recover", *home])
    assert f"generation {document['generation'] // 1000 + 1}" in third.stdout


def test_another_key_is_refused(site: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    arguments = ["run", "recover", "--founder-key", str(key), "--home", str(tmp_path / "home")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, NotAuthorised)
