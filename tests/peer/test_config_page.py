"""The page of all keys, and what a misspelt or impossible pipeline key gets."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from swarmtrain_peer.config import PEER_KEYS, RUN_KEYS, load_settings
from swarmtrain_peer.config_page import HEAD, PEER_TEXTS, RUN_TEXTS, page
from swarmtrain_protocols.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_is_described() -> None:
    assert list(RUN_TEXTS) == list(RUN_KEYS)
    assert list(PEER_TEXTS) == list(PEER_KEYS)
    text = page()
    for key in (*RUN_KEYS, *PEER_KEYS):
        assert f"| `{key}` |" in text


def test_the_page_is_in_the_documents() -> None:
    found = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert found == page(), "run: python -m swarmtrain_peer.config_page > docs/configuration.md"


def test_the_example_on_the_page_is_a_run(tmp_path: Path) -> None:
    body = HEAD.split("```toml\n")[1].split("```")[0]
    assert tomllib.loads(body)["pipeline"]["stages"] == 4
    path = tmp_path / "run.toml"
    path.write_text(body)
    assert load_settings(path).run.model == {"layers": 8}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("pipeline.stage = 4", "pipeline.stages"),
        ("pipeline.microbatches = 8", "pipeline.micro_batches"),
        ("pipeline.replica_min = 2", "pipeline.replicas_min"),
        ("pipeline.end_replicas = 2", "pipeline.ends_replicas"),
        ("pipelines.mode = 'sync'", "pipeline.mode"),
        ("pipeline.close_fractions = 0.5", "pipeline.close_fraction"),
        ("pipeline.swaped = true", "pipeline.swapped"),
        ("train.stages = 4", "pipeline.stages"),
    ],
)
def test_a_misspelt_key_is_refused_with_a_suggestion(
    tmp_path: Path, written: str, meant: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(written + "\n")
    with pytest.raises(ConfigError) as found:
        load_settings(path)
    assert found.value.todo == f"did you mean {meant}?"
    assert str(path) in found.value.why


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("stages = -1", "0 to 128"),
        ("stages = 4\nmode = 'async'", "sync, diloco"),
        ("stages = 4\ncodec = 'int9'", "int8"),
        ("stages = 4\nmicro_batches = 0", "1 to"),
        ("stages = 2\nswapped = true", "raise stages to 4"),
        ("stages = 4\nends_replicas = 1", "raise ends_replicas"),
        ("stages = 4\nclose_fraction = 1.5", "at most 1"),
        ("stages = 1\nskip_fraction = 0.1", "raise stages"),
        ("stages = 'four'", "0 to 128"),
    ],
)
def test_impossible_values_say_what_is_allowed(tmp_path: Path, written: str, why: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[pipeline]\n{written}\n")
    with pytest.raises(ConfigError) as found:
        load_settings(path)
    assert why in found.value.todo
    assert found.value.exit_code == 3
