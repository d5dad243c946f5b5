"""As many inner steps as fit the pace of the swarm, and no wavering."""

from __future__ import annotations

import math

import pytest

from swarmtrain.training.tempo import Progress, Tempo


def after(tempo: Tempo, *step_s: float) -> list[int]:
    found = []
    for seconds in step_s:
        tempo.phase_done(seconds)
        found.append(tempo.steps)
    return found


def test_a_member_five_times_slower_does_a_fifth_of_the_steps() -> None:
    tempo = Tempo(20)
    assert after(tempo, 0.5) == [20], "nobody knows the pace yet"
    tempo.heard(2.0)  # 20 steps of 0.1 s
    assert after(tempo, 0.5, 0.5, 0.5) == [20, 4, 4], "the second phase in a row says so"


def test_like_members_keep_the_steps_of_the_run() -> None:
    tempo = Tempo(20)
    tempo.heard(2.0)
    assert after(tempo, 0.12, 0.09, 0.11, 0.3, 0.1, 0.3, 0.1) == [20] * 7


def test_a_phase_ends_early_when_its_steps_take_longer_than_the_pace() -> None:
    tempo = Tempo(20)
    assert not tempo.is_over(19, 9.0), "nobody knows the pace yet"
    tempo.heard(2.0)
    assert [tempo.is_over(steps, 0.5) for steps in (1, 4, 5, 6)] == [False, False, True, True]
    assert not tempo.is_over(19, 0.13), "a little slower than most"
    assert Tempo(7).is_over(6, 9.0) is False
    streamed = Tempo(20, steps_min=6)
    streamed.heard(2.0)
    assert not streamed.is_over(5, 9.0)


def test_it_follows_when_things_change_and_comes_back_to_the_usual() -> None:
    tempo = Tempo(20)
    tempo.heard(2.0)
    assert after(tempo, 0.2, 0.2, 0.21, 0.25, 0.1) == [20, 10, 10, 8, 20]


@pytest.mark.parametrize(("step_s", "steps"), [(100.0, 1), (1e-9, 40), (0.01, 40), (1.0, 2)])
def test_a_phase_has_bounds(step_s: float, steps: int) -> None:
    tempo = Tempo(20)
    tempo.heard(2.0)
    assert after(tempo, step_s, step_s)[1] == steps


def test_fragments_share_a_phase_and_streaming_keeps_its_delay() -> None:
    tempo = Tempo(20, fragments=4)
    tempo.heard(0.5)  # a contribution of any of four channels
    assert after(tempo, 0.2, 0.2)[1] == 10
    streamed = Tempo(20, steps_min=6)
    streamed.heard(2.0)
    assert after(streamed, 1.0, 1.0)[1] == 6


def test_where_members_share_after_few_steps_all_do_the_same() -> None:
    tempo = Tempo(7)
    tempo.heard(2.0)
    assert after(tempo, 5.0, 5.0, 0.01, 0.01) == [7] * 4


def test_a_new_number_of_steps_keeps_the_share_that_fits_here() -> None:
    tempo = Tempo(20)
    tempo.heard(2.0)
    assert after(tempo, 0.2, 0.2)[1] == 10
    tempo.retune(5, 40)
    assert tempo.steps == 20
    tempo.retune(4, 20)
    assert tempo.steps == 20, "another fragment is not that far yet"
    tempo.retune(6, 4)
    assert tempo.steps == 2
    tempo.retune(7, 1)
    assert tempo.steps == 1


@pytest.mark.parametrize("pace_s", [0.0, -1.0, math.nan])
def test_without_a_pace_nothing_changes(pace_s: float) -> None:
    tempo = Tempo(20)
    tempo.heard(pace_s)
    assert after(tempo, 5.0, 5.0, math.nan, 0.0) == [20] * 4


def test_progress_is_what_all_have_done_and_a_share_of_what_comes() -> None:
    progress = Progress()
    assert progress.at(0.5) == 0.0
    progress.heard(1000.0, 200.0)
    assert [progress.at(share) for share in (0.0, 0.5, 1.0, 3.0)] == [1000, 1100, 1200, 1200]
