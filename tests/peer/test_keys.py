"""Key files: created once, readable by their owner only, refused otherwise."""

from __future__ import annotations

import copy
import os
import stat
import threading
from pathlib import Path

import pytest

from swarmtrain_peer.keys import (
    Secret,
    create_key_file,
    load_or_create_founder,
    load_or_create_identity,
    load_or_create_key,
    read_key_file,
)
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.identity import Ed25519Keyring


def test_a_new_identity_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "site.key"
    first = load_or_create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stat().st_size == 32
    assert os.listdir(path.parent) == ["site.key"]
    assert load_or_create_identity(path).peer_id == first.peer_id
    assert Ed25519Keyring(path.read_bytes()).peer_id == first.peer_id
    assert load_or_create_founder(tmp_path / "founder.key").peer_id != first.peer_id


def test_an_open_umask_does_not_open_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_key_file(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_creation_is_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "key"
    create_key_file(path, b"a" * 32)
    with pytest.raises(ConfigError, match="exists already"):
        create_key_file(path, b"b" * 32)
    assert path.read_bytes() == b"a" * 32
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists already"):
        create_key_file(dangling)
    assert sorted(os.listdir(tmp_path)) == ["key", "link"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o644])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    create_key_file(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"others may read it .mode {mode:04o}") as caught:
        load_or_create_identity(path)
    assert "chmod 600" in caught.value.todo
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("size", [0, 31, 33, 4096])
def test_a_key_of_the_wrong_size_is_refused_and_left_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"x" * size)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{size} bytes instead of 32"):
        load_or_create_key(path)
    assert path.read_bytes() == b"x" * size


def test_links_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(ConfigError):
        read_key_file(tmp_path / "link")
    with pytest.raises(ConfigError, match="plain file"):
        read_key_file(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="plain file"):
        read_key_file(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_key_file(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="Not a directory"):
        load_or_create_key(tmp_path / "file" / "key")


def test_racing_processes_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    found: list[bytes] = []
    start = threading.Barrier(8)

    def race() -> None:
        start.wait(10)
        found.append(load_or_create_key(path).reveal())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert set(found) == {path.read_bytes()}


def test_a_secret_does_not_show() -> None:
    secret = Secret(b"hush-hush")
    shown = f"{secret} {secret!r} {[secret]}"
    assert "hush" not in shown
    assert secret.reveal() == b"hush-hush"
    assert secret == Secret(b"hush-hush")
    assert secret != Secret(b"other")
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError, match="not serialized"):
        copy.copy(secret)
