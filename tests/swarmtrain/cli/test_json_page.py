"""``docs/json.md`` names every key that a pipeline's commands print."""

from __future__ import annotations

import re
from pathlib import Path

from tests.swarmtrain.fake_pipeline import FakePipeline

PAGE = Path(__file__).resolve().parents[3] / "docs" / "json.md"
NAMED = {word for span in re.findall(r"`([^`]+)`", PAGE.read_text()) for word in span.split()}


def test_every_key_of_a_pipeline_is_on_the_page() -> None:
    run = FakePipeline()
    status = run.status()
    stage = status["pipeline"]["coverage"][0]
    peer, step = run.peers()["peers"][0], run.all_rounds()["rounds"][0]
    for document in (status, status["pipeline"], stage, stage["members"][0], peer, step):
        assert set(document) - NAMED == set()
    assert set(peer["stages"][0]) - NAMED == set()
