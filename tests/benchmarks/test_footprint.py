"""The bars of the footprint: a seed's memory, the cost of the import."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOOTPRINT = Path(__file__).resolve().parents[2] / "benchmarks" / "footprint.py"


@pytest.fixture
def footprint() -> ModuleType:
    location = importlib.util.spec_from_file_location("footprint", FOOTPRINT)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def test_a_seed_and_the_import_stay_small(
    footprint: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (footprint.SEED_RSS_BYTES_MAX, footprint.IMPORT_USER_S_MAX) == (90_000_000, 0.150)
    assert footprint.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["ok", "ok"]


def test_more_than_the_bar_fails(
    footprint: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "seed_rss_bytes", lambda: footprint.SEED_RSS_BYTES_MAX + 1)
    monkeypatch.setattr(footprint, "import_user_s", lambda: 0.01)
    assert footprint.main() == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("ABOVE")
