"""A site with a data cap leaves politely before it is exceeded, and stays away until renewed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from swarmtrain_peer import host
from swarmtrain_peer.shifts import Used, rest_of
from swarmtrain_protocols.errors import SiteRests, SwarmError
from tests.swarm.harness import WAIT_S, Swarm, closing_all
from tests.swarm.synthetic import Plan, Trainer

pytestmark = pytest.mark.timeout(120)
CAP_BYTES = 30_000_000


@pytest.mark.slow
def test_a_data_cap_is_kept_and_ends_with_its_period(tmp_path: Path) -> None:
    """Within 5 % by the bytes that the process itself counted on its links."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2, codec_scatter="fp32", codec_gather="fp32")
        capped = swarm.enter("ada", founder.ticket(), config={"data_cap": "30MB/month"})
        trainers = [
            Trainer(founder.site, Plan(key=1, phase_s=0.05)).start(),
            Trainer(capped.site, Plan(key=2, phase_s=0.05)).start(),
        ]
        with closing_all(*trainers):
            near = capped.wait_event("data_cap_near")
            assert 0.8 * CAP_BYTES <= near["used_bytes"] < 0.95 * CAP_BYTES
            capped.wait_event("data_cap_reached")
            assert "data cap" in capped.wait_event("resting")["reason"]
            left = founder.wait_event("member_left", lambda r: r["peer"] == capped.id)
            assert left["reason"] == "leave", "politely"
            assert capped.process is not None
            assert capped.process.wait(WAIT_S) == 0
            lines = capped.site.events_path.read_bytes().splitlines()
            stopped = next(r for r in map(msgspec.json.decode, lines) if r["code"] == "P101")
            moved = stopped["bytes_sent"] + stopped["bytes_received"]
            assert 0.9 * CAP_BYTES <= moved <= 1.05 * CAP_BYTES
            rest = rest_of(capped.site, host.local_now())
            assert rest is not None and rest.until.day == 1
            with pytest.raises(SwarmError, match="did not start") as refused:
                capped.start()
            assert refused.value.exit_code == SiteRests.exit_code
            assert "resting until" in refused.value.why
            since = founder.last_seq
            path = capped.site.traffic_path
            used = msgspec.json.decode(path.read_bytes(), type=Used)
            assert abs(used.nbytes - moved) <= 0.01 * CAP_BYTES
            used.begins = "2000-01-01"  # as if it had been another month
            path.write_bytes(msgspec.json.encode(used))
            capped.start()
            again = founder.wait_event("member_joined", lambda r: r["peer"] == capped.id, since)
            assert again["seq"] > left["seq"]
        swarm.check_hashes()
