"""Who is blamed for a hang, and which rank is called a straggler: plain figures in, plain words out."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gradine.configs.schema import Cluster
from gradine.pipeline.watchdog import Stragglers, Watchdog, Witness, verdict
from gradine.stages.pulse import Line, Sight

LIMITS = Cluster(step_timeout_s=10.0, setup_timeout_s=100.0)


def pulse(images_seen: int, doing: str = "step", **more: Any) -> dict[str, Any]:
    return {"event": "pulse", "images_seen": images_seen, "doing": doing, "windows": [], **more}


def first_answer(watchdog: Watchdog, start: int, seconds: int, said: Any = lambda now: None) -> tuple[int, str] | None:
    """(seconds after `start`, answer) of the first second in which the watchdog says anything."""
    for now in range(start + 1, start + seconds + 1):
        said(now)
        if answer := watchdog.doubt(float(now)):
            return now - start, answer
    return None


def stepping(workers: int = 2) -> Watchdog:
    watchdog = Watchdog(LIMITS, workers, 0.0)
    for rank in range(workers):
        watchdog.heard(rank, pulse(8, record=f"record-{rank}"))
    return watchdog


def test_a_group_that_steps_is_found_when_the_step_timeout_has_passed_and_not_before() -> None:
    watchdog = stepping()
    assert watchdog.records == ["record-0", "record-1"]
    assert first_answer(watchdog, 0, 60, lambda now: watchdog.heard(now % 2, pulse(8 + 8 * now))) is None
    assert first_answer(watchdog, 60, 60) == (11, "hang")


def test_a_rank_that_says_again_and_again_that_it_waits_for_data_is_no_progress() -> None:
    watchdog = stepping()
    waiting = lambda _: watchdog.heard(1, pulse(8, "data"))  # noqa: E731
    assert first_answer(watchdog, 0, 60, waiting) == (12, "hang")  # that it began to wait was news


def test_before_the_first_step_the_limit_is_that_of_the_setup_and_stopped_processes_are_looked_for() -> None:
    watchdog = Watchdog(LIMITS, 2, 0.0)
    watchdog.heard(0, pulse(0, "setup"))
    answers = [(now, answer) for now in range(1, 103) if (answer := watchdog.doubt(float(now)))]
    assert answers == [*((now, "look") for now in range(12, 102, 10)), (102, "hang")]


@pytest.mark.parametrize("doing", ["save", "write"])
def test_a_checkpoint_that_is_waited_for_may_take_longer_than_a_step(doing: str) -> None:
    watchdog = stepping()
    watchdog.ended(1)
    answers = [answer for now in range(101) if (answer := [watchdog.heard(0, pulse(80, doing)),
                                                           watchdog.doubt(float(now))][1])]
    assert answers == ["look"] * 9
    assert first_answer(watchdog, 100, 3) == (1, "hang")


def test_an_event_of_any_other_kind_is_progress() -> None:
    watchdog = stepping()
    assert first_answer(watchdog, 0, 60, lambda now: watchdog.heard(0, {"event": "save_failed"})) is None


def test_a_driver_that_slept_itself_blames_nobody() -> None:
    watchdog = stepping()
    assert watchdog.doubt(1.0) == ""
    assert watchdog.doubt(5000.0) == ""
    assert first_answer(watchdog, 5000, 60) == (9, "hang")  # 2 + 9 seconds that count


# Blame ---------------------------------------------------------------------------------------------------------------


def witness(rank: int, *lines: tuple[str, str, str, float], state: str = "S") -> Witness:
    return Witness(rank, f"10.0.0.{rank}", 100 + rank, Sight(state, "futex_wait", [Line(*line) for line in lines]))


WAITS = ("training", "reduce", "at 120 images", 15.0)


@pytest.mark.parametrize(("culprit", "said"), [
    (witness(1, WAITS, state="T"), "rank 1 (node 10.0.0.1, pid 101) is stopped (SIGSTOP, or a debugger)"),
    (witness(1, state=""), "rank 1 (node 10.0.0.1, pid 101) is gone"),
    (Witness(1, "10.0.0.1", 101, None), "rank 1 (node 10.0.0.1, pid 101) gives no answer, nor does its node"),
    (witness(1, WAITS, ("decode_0", "decode", "image 3 of shard 000001.tar of /set/r0008", 14.0)),
     "rank 1 (node 10.0.0.1, pid 101) is stuck: decode_0: decode image 3 of shard 000001.tar of /set/r0008 for 14 s"),
    (witness(1, ("training", "step", "at 120 images", 15.0)),
     "rank 1 (node 10.0.0.1, pid 101) is at step at 120 images for 15 s"),
    (witness(1, ("training", "save", "at 120 images", 15.0), state="D"),
     "rank 1 (node 10.0.0.1, pid 101) is at save at 120 images for 15 s, asleep in the kernel (futex_wait)"),
    (witness(1), "rank 1 (node 10.0.0.1, pid 101) says nothing")])
def test_blamed_is_the_rank_that_the_others_wait_for(culprit: Witness, said: str) -> None:
    others = [witness(0, WAITS), witness(2, ("training", "agree", "at 120 images", 15.0),
                                         ("decode_0", "decode", "image 9 of shard 000001.tar", 0.1))]
    assert verdict(15.0, [others[0], culprit, others[1]]) == said


def test_where_all_wait_for_each_other_the_network_between_them_is_named() -> None:
    assert verdict(15.0, [witness(0, WAITS), witness(1, WAITS)]) == (
        "every rank waits for the others: is the network between 10.0.0.0, 10.0.0.1 cut?")


def test_of_many_ranks_to_blame_two_are_named_and_the_others_counted() -> None:
    said = verdict(15.0, [witness(rank, WAITS, state="T" if rank else "S") for rank in range(6)])
    assert said.count("stopped") == 2
    assert said.endswith("and 3 more")


def test_what_is_written_down_of_a_rank_holds_its_threads_and_stacks() -> None:
    text = witness(1, WAITS, ("decode_0", "decode", "image 3", 14.0), state="D").testimony(15.0)
    for part in ("rank 1 (node 10.0.0.1, pid 101) is stuck", "state D", "futex_wait",
                 "training: reduce at 120 images for 15 s", "decode_0: decode image 3 for 14 s", "stacks:\nnone"):
        assert part in text


# Stragglers ----------------------------------------------------------------------------------------------------------


def alarms(*windows: list[tuple[float, float, float]], resolution: int = 8) -> list[dict[str, Any]]:
    """What is said of windows of 128 images; each lists (compute, data, made) seconds a step, by rank."""
    stragglers = Stragglers(len(windows[0]), resolution, lambda: [f"10.0.0.{rank}" for rank in range(9)])
    return [alarm for number, by_rank in enumerate(windows, 1) for rank, times in enumerate(by_rank)
            for alarm in stragglers.heard(rank, [[128 * number, *times]])]


EQUAL = [(0.1, 0.0, 0.05), (0.1, 0.0, 0.05)]
SLOW_COMPUTE = [(0.1, 0.0, 0.05), (0.5, 0.0, 0.05)]
SLOW_DATA = [(0.1, 0.0, 0.05), (0.1, 0.4, 0.5)]


@pytest.mark.parametrize(("slow", "phase", "value"), [(SLOW_COMPUTE, "compute", 0.5), (SLOW_DATA, "data", 0.4)])
def test_f19_a_slow_rank_is_told_once_with_its_phase_and_again_only_after_it_had_recovered(
        slow: list[tuple[float, float, float]], phase: str, value: float) -> None:
    """Windows in which one of two ranks takes five times as long"""
    found = alarms(EQUAL, *[slow] * 5, EQUAL, *[slow] * 5, EQUAL, EQUAL, *[slow] * 5)
    assert [alarm["images_seen"] for alarm in found] == [128 * 3, 128 * 16]  # one good window alone is no recovery
    for alarm in found:
        assert (alarm["event"], alarm["alarm"], alarm["rank"], alarm["node"], alarm["phase"], alarm["value"]) == (
            "alarm", "straggler", 1, "10.0.0.1", phase, value)
        assert f"rank 1 on node 10.0.0.1 holds up the others: it {'computes' if phase == 'compute' else 'waits'}" \
            in alarm["message"]


def test_f19_among_four_ranks_the_slow_one_is_named_and_not_the_others() -> None:
    """Windows of four ranks, of which one computes five times as long"""
    found = alarms(*[[(0.1, 0.0, 0.0), (0.12, 0.0, 0.0), (0.5, 0.0, 0.0), (0.09, 0.0, 0.0)]] * 3)
    assert [(alarm["rank"], alarm["phase"]) for alarm in found] == [(2, "compute")]


@pytest.mark.parametrize("windows", [
    [EQUAL, SLOW_COMPUTE, EQUAL, SLOW_COMPUTE],  # not twice in a row
    [SLOW_COMPUTE, SLOW_DATA],  # not in one phase
    [[(0.001, 0.0, 0.0), (0.005, 0.0, 0.0)]] * 10,  # the kernel's scheduler does that: 0.8 s in all
    [[(0.1, 0.0, 0.0), (0.29, 0.0, 0.0)]] * 10,
    [[(0.01, 0.0, 0.1), (0.01, 0.09, 0.11)]] * 50,  # both read at about one speed: who is slower does all the waiting
    [[(0.01, 0.2, 0.2), (0.01, 0.2, 0.2)]] * 10,
    [[(0.5, 0.0, 0.0)]] * 10])  # alone
def test_f19_what_passes_is_small_or_shared_by_all_is_no_straggler(
        windows: list[list[tuple[float, float, float]]]) -> None:
    """Windows of ranks that differ lawfully"""
    assert alarms(*windows) == []


def test_f19_noise_of_a_factor_of_two_raises_no_alarm_in_a_million_steps() -> None:
    """Ranks whose times vary at random, each window on its own"""
    rng = random.Random(0)
    assert not alarms(*[[(rng.uniform(0.1, 0.2), rng.uniform(0, 0.1), rng.uniform(0.1, 0.2)) for _ in range(2)]
                        for _ in range(1_000_000 // 16)])


def test_windows_of_one_rank_that_the_others_never_come_to_are_not_kept() -> None:
    stragglers = Stragglers(2, 8, lambda: ["a", "b"])
    for end in range(128, 128_000, 128):
        list(stragglers.heard(0, [[end, 0.1, 0.0, 0.0]]))
    list(stragglers.heard(1, [[127_872, 0.1, 0.0, 0.0]]))
    assert not stragglers.windows
