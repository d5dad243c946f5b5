"""A log that nobody can write any more, and one that was written twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import swarmtrain as st
from swarmtrain_peer.halting import PROOF_FILE
from swarmtrain_peer.spawn import child_environment
from swarmtrain_protocols.errors import Diverged, GroupLost
from tests.swarm.harness import WAIT_S, Swarm, poll_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

FOUNDER = """
import sys
import swarmtrain as st
with st.Peer.start() as peer:
    print(peer.ticket, flush=True)
    sys.stdin.read()
"""


def test_a_call_ends_with_a_typed_error_long_before_its_timeout() -> None:
    """The only steward is killed while another member waits for a result."""
    founder = subprocess.Popen(
        [sys.executable, "-c", FOUNDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
        text=True,
    )
    assert founder.stdin is not None and founder.stdout is not None
    try:
        ticket = founder.stdout.readline().strip()
        with st.Peer.start(ticket=ticket) as peer:
            assert len(peer.members) == 2
            founder.kill()
            started = time.monotonic()
            with pytest.raises(GroupLost) as lost:
                peer.all_reduce(np.ones(4, np.float32), expect=2, timeout=110.0)
            assert lost.value.retry
            assert time.monotonic() - started < 40.0
    finally:
        founder.kill()
        founder.wait(WAIT_S)
        founder.stdin.close()
        founder.stdout.close()


def test_a_steward_that_comes_back_from_an_old_copy_is_proven_to_have_signed_twice(
    tmp_path: Path,
) -> None:
    """Its second life signs other entries at places that its first life had signed."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(config={"trains": False})
        ada = swarm.enter("ada", founder.ticket(), config={"votes": False, "trains": False})
        copy = tmp_path / "copy"
        poll_until(lambda: founder.status()["members"] == 2, "ada is a member")
        shutil.copy(founder.site.log_path, copy)
        bob = swarm.enter("bob", founder.ticket(), config={"votes": False, "trains": False})
        ada.wait_event("member_joined", lambda r: r["peer"] == bob.id)
        bob.kill()
        founder.kill()
        shutil.copy(copy, founder.site.log_path)
        founder.start()
        for name in ("cyd", "dan", "eve"):  # until the new log is longer than the old one was
            swarm.enter(name, founder.ticket(), config={"votes": False, "trains": False})
        assert ada.process is not None
        assert ada.process.wait(WAIT_S) == Diverged.exit_code
        found = [json.loads(line) for line in ada.site.events_path.read_text().splitlines()]
        (told,) = [record for record in found if record["name"] == "conflicting_certificates"]
        proof = json.loads((ada.site.folder / PROOF_FILE).read_text())
        assert proof["index"] == told["index"]
        assert proof["ours_at"] != proof["theirs_at"]
        assert "signed different logs" in ada.site.output_path.read_text()
