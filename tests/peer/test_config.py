"""Settings: order of force, origins, unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_peer.config import (
    PEER_KEYS,
    RUN_KEYS,
    PeerConfig,
    load_settings,
    parse_rate,
)
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys


def origin(settings: object, key: str) -> str:
    return next(value.origin for value in settings.values if value.key == key)  # type: ignore[attr-defined]


def test_every_run_key_and_peer_key_can_be_written_or_is_internal() -> None:
    assert {field for fields in RUN_KEYS.values() for field in fields} == set(
        RunKeys.__struct_fields__
    )
    assert set(PEER_KEYS.values()) == set(PeerConfig.__struct_fields__) - {"owned"}
    assert not set(RUN_KEYS) & set(PEER_KEYS)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\nname = "a"\nseed = 7\n[train]\ninner_steps = 30\n[net]\nup = "8Mbit"\n'
        "[comm]\ncodec_gather = 'fp32'\ncodec = 'bf16'\n"
    )
    environ = {
        "SWARMTRAIN_RUN__NAME": "b",
        "SWARMTRAIN_TRAIN__INNER_STEPS": "40",
        "SWARMTRAIN_LISTEN": "127.0.0.1:0",
        "SWARMTRAIN_TICKET": "not a setting",
        "PATH": "/bin",
    }
    settings = load_settings(path, environ, {"run.name": "c", "run.seed": None})
    assert settings.run.name == "c"
    assert settings.run.seed == 7
    assert settings.run.inner_steps == 40
    assert (settings.run.codec_scatter, settings.run.codec_gather) == ("bf16", "fp32")
    assert settings.run.batch_size == RunKeys().batch_size
    assert settings.peer.up_bytes_per_s == 1_000_000
    assert settings.peer.listen == "127.0.0.1:0"
    assert origin(settings, "run.name") == "flag"
    assert origin(settings, "run.seed") == f"file {path}"
    assert origin(settings, "train.inner_steps") == "environment SWARMTRAIN_TRAIN__INNER_STEPS"
    assert origin(settings, "net.listen") == "environment SWARMTRAIN_LISTEN"
    assert origin(settings, "train.batch_size") == "default"
    assert set(settings.given_run) == {
        "name",
        "seed",
        "inner_steps",
        "codec_scatter",
        "codec_gather",
    }


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[comm]\ncodek = 'int8'\n", "did you mean comm.codec?"),
        ("[training]\ninner_steps = 5\n", "did you mean train.inner_steps?"),
        ("name = 'x'\n", "did you mean"),
        ("[peer]\nzzzzqqq = 1\n", "config show"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(tmp_path: Path, text: str, hint: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert "unknown key" in caught.value.what
    assert hint in caught.value.todo
    assert str(path) in caught.value.why


def test_a_mistyped_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="SWARMTRAIN_COMM__CODEK") as caught:
        load_settings(None, {"SWARMTRAIN_COMM__CODEK": "int8"})
    assert caught.value.todo == "did you mean comm.codec?"


@pytest.mark.parametrize(
    "flags",
    [
        {"train.inner_steps": 0},
        {"train.inner_steps": "many"},
        {"comm.codec": "int3"},
        {"net.listen": "nowhere"},
        {"net.announce": "no-port"},
        {"net.up": "fast"},
        {"net.donor_share": 0.0},
        {"net.donor_share": 1.5},
        {"peer.trains": "maybe"},
        {"peer.name": "n" * 65},
        {"log.level": "loud"},
    ],
)
def test_a_bad_value_is_an_error_at_the_edge(flags: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {}, flags)
    assert caught.value.exit_code == 3


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not TOML"):
        load_settings(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("auto", 0),
        (5000, 5000),
        ("250000", 250_000),
        ("50Mbit", 6_250_000),
        ("1 Gbit/s", 125_000_000),
        ("10MB/s", 10_000_000),
        ("10MiB", 10 * 1024 * 1024),
        ("8kbps", 8000 // 8),
        ("1.5MB", 1_500_000),
    ],
)
def test_rates(text: str | int, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["9" * 400, "9" * 305 + "GB", "fast", float("inf"), -1, "-1"])
def test_what_is_no_rate_or_beyond_all_numbers_is_refused(text: str | float) -> None:
    with pytest.raises(ConfigError):
        parse_rate(text)


def test_words_for_truth_and_lists_from_the_environment() -> None:
    settings = load_settings(
        None, {"SWARMTRAIN_PEER__TRAINS": "no", "SWARMTRAIN_ANNOUNCE": "a.example:1, [::1]:2"}
    )
    assert settings.peer.trains is False
    assert settings.peer.announce == ("a.example:1", "[::1]:2")


def test_a_site_has_a_name_even_without_one() -> None:
    assert PeerConfig().display_name
    assert PeerConfig(name="bob").display_name == "bob"
