"""Placing a stage's workers: how many, where, what gives way, and growing while it trains; on a Ray of four CPUs."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError
from gradine.pipeline import driver, evaluations
from gradine.pipeline.cluster import worker_environment
from gradine.pipeline.group import Group, interface_of
from gradine.pipeline.places import most_placeable, unplaceable
from gradine.pipeline.plan import with_workers, worker_counts
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.session import Session
from tests.injected import Injected, wait_until
from tests.test_faults_runs import bits, events, injected  # noqa: F401 (a fixture)


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@contextmanager
def taken(ray: Any, cpus: float) -> Iterator[Any]:
    """So many of the four CPUs belong to somebody else."""
    placement = ray.util.placement_group([{"CPU": cpus}])
    assert placement.wait(30)
    try:
        yield placement
    finally:
        ray.util.remove_placement_group(placement)


@pytest.mark.parametrize(("stage", "counts"), [
    (Stage(resolution=8, batch_size=24, workers=6, min_workers=1), [6, 3, 2, 1]),
    (Stage(resolution=8, batch_size=24, workers=6), [6]),
    (Stage(resolution=8, batch_size=24, workers=3, min_workers=1), [3, 1]),  # 8 images at once: two cannot share 24
    (Stage(resolution=8, batch_size=24, workers=3, min_workers=1, micro_batch=4), [3, 2, 1]),
    (Stage(resolution=8, batch_size=32, workers=8, min_workers=3), [8, 4])])
def test_a_stage_may_have_as_many_workers_as_take_whole_micro_batches_of_the_largest_group(
        stage: Stage, counts: list[int]) -> None:
    assert worker_counts(stage) == counts


def test_a_group_of_fewer_workers_keeps_micro_batch_and_batch(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run({"stages.*.workers": 2, "stages.*.min_workers": 1, "stages.*.micro_batch": 4})
    fewer = with_workers(run, 1, 1).stages
    assert [(stage.workers, stage.batch_size, stage.micro_batch) for stage in fewer] == [(2, 8, 4), (1, 8, 4)]


@pytest.mark.parametrize(("placement", "room"), [("PACK", 5), ("SPREAD", 5), ("STRICT_SPREAD", 2), ("STRICT_PACK", 3)])
def test_room_is_counted_node_by_node(placement: str, room: int) -> None:
    nodes = [node(CPU=7.0, GPU=8.0), node(CPU=5.0, GPU=2.0), node(CPU=64.0), node(False, CPU=64.0, GPU=8.0)]
    stage = Stage(resolution=8, cpus=2, gpus=1, placement=placement)
    assert most_placeable(stage, nodes) == room  # 3 by its CPUs, 2 by its GPUs, no GPU, dead


def test_what_can_never_be_placed_is_told_in_one_line(tiny_run: Callable[..., Run]) -> None:
    def told(**changes: Any) -> str:
        return unplaceable(tiny_run({key.replace("__", "."): value for key, value in changes.items()}), (0, 1),
                           [node(CPU=3.0), node(CPU=1.0)])

    assert told() == ""
    assert told(stages__1__workers=2, stages__1__cpus=2.0) == (
        "stage 8px asks for 2 workers of 2 CPU each (PACK), 1 of them have a place: Ray has 2 nodes with 4 CPUs and "
        "0 GPUs. Lower stages.<n>.workers, .min_workers or what each asks for.")
    assert told(stages__1__workers=2, stages__1__cpus=2.0, stages__1__min_workers=1) == ""
    assert "(STRICT_SPREAD), 1 of them" in told(stages__1__workers=2, stages__1__cpus=2.0,
                                                stages__1__placement="STRICT_SPREAD")
    assert told(stages__1__workers=2, stages__1__placement="STRICT_SPREAD") == ""
    assert "asks for 1 workers of 1 CPU, 1 GPU each" in told(stages__0__gpus=1.0)
    assert told(evaluation__cpus=3.0) == ""
    two = {"stages__1__workers": 2, "evaluation__cpus": 3.0}
    assert told(**two).startswith("evaluation.cpus=3 does not fit beside the training's 2:")
    assert told(**two, evaluation__when="end") == ""


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.255") == ""
    try:
        told = subprocess.run(["ip", "-o", "-4", "addr"], text=True, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("ip is not installed")
    shown = {line.split()[3].split("/")[0]: line.split()[1] for line in told.splitlines()}
    assert shown
    assert {address: interface_of(address) for address in shown} == shown
    assert set(shown.values()) <= {name for _, name in socket.if_nameindex()}


def test_a_group_starts_with_what_there_is_room_for(ray_cluster: Any, tiny_run: Callable[..., Run]) -> None:
    run = tiny_run({"stages.*.batch_size": 16, "stages.*.workers": 4, "stages.*.min_workers": 1})
    with taken(ray_cluster, 1.5):
        group = Group(run, 0)
        try:
            assert (group.count, len(group.workers), group.run.stages[0].workers) == (2, 2, 2)
            assert not group.could_grow(run.stages[0])
            assert group.nodes() == [ray_cluster.util.get_node_ip_address()] * 2
        finally:
            group.end()


def test_a_group_without_room_has_others_give_way_and_waits_no_longer_than_told(
        ray_cluster: Any, tiny_run: Callable[..., Run]) -> None:
    run = tiny_run({"stages.*.workers": 2, "stages.*.cpus": 2.0, "ray.group_timeout_s": 3.0})
    with taken(ray_cluster, 1):
        told: list[str] = []
        with pytest.raises(EnvironmentFault, match=r"stage 4px: 2 workers of 2 CPU each \(PACK\) could not be placed "
                                                   r"within ray.group_timeout_s=3. Is the cluster busy"):
            Group(run, 0, told.append)
        assert told == ["    4px waits for 2 workers of 2 CPU each (PACK): all nodes together have room for 2, not all "
                        "of it free; up to ray.group_timeout_s=3"]
    run = tiny_run({"stages.*.workers": 2, "stages.*.cpus": 2.0})
    with taken(ray_cluster, 4) as there:
        group = Group(run, 0, lambda _: ray_cluster.util.remove_placement_group(there))
        assert group.count == 2
        group.end()


LONG_ENOUGH = """
@before_steps
def stay(state, shares, seen):
    if seen == 160 and first("stayed"):
        until_asked("asked")
"""


def test_a_stage_grows_at_a_checkpoint_when_room_comes_and_its_bits_are_those_of_the_full_group(
        ray_cluster: Any, tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch,
        injected: Injected) -> None:  # noqa: F811
    monkeypatch.setattr(evaluations.Evaluations, "start", lambda *_: None)
    settings = {"stages.*.workers": 2, "tick_images": 8}
    full = driver.train(tiny_run({**settings, "name": "full"}), shard_if_needed=False)
    injected.add(LONG_ENOUGH)
    true_grow = Session.grow
    with taken(ray_cluster, 3) as others:
        def grow(session: Session, index: int) -> None:
            if index == 1 and session.group.count == 1 and not session.growing:  # at the first checkpoint of the fade
                injected.reached("asked")  # a worker asked before would leave the larger group to wait there
                ray_cluster.util.remove_placement_group(others)
                wait_until(lambda: session.could_grow(index), "the room is seen")
            true_grow(session, index)

        monkeypatch.setattr(Session, "grow", grow)
        grown = driver.train(tiny_run({**settings, "name": "grown", "stages.*.min_workers": 1}), shard_if_needed=False)
    groups, stops = events(grown, "group"), events(grown, "stopped")
    assert [(line["workers"], line["wanted"]) for line in groups] == [(1, 2), (2, 2)]
    assert len(stops) == 1
    assert stops[0]["images_seen"] in (168, 176), "the step it was asked in, or the next"
    assert not events(grown, "retry")
    assert bits(grown) == bits(full)
    assert [line["images_seen"] for line in lineage(grown)] == [line["images_seen"] for line in lineage(full)]


def test_a_group_that_does_not_grow_though_it_could_is_not_tried_again_on_the_same_nodes(
        ray_cluster: Any, tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations.Evaluations, "start", lambda *_: None)
    monkeypatch.setattr(Group, "could_grow", lambda *_: True)
    with taken(ray_cluster, 3):
        folder = driver.train(tiny_run({"stages.*.workers": 2, "stages.*.min_workers": 1}, stages=3),
                              shard_if_needed=False)
    assert [line["workers"] for line in events(folder, "group")] == [1, 1]


def test_an_evaluation_that_no_single_node_could_hold_is_refused(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run({"evaluation.cpus": 3.0})
    assert unplaceable(run, (0, 1), [node(CPU=2.0), node(CPU=2.0)]) == (
        "evaluation.cpus=3 and .gpus=0 fit on no single node: Ray has 2 nodes with 4 CPUs and 0 GPUs. Lower them.")
    assert unplaceable(run, (0, 1), [node(CPU=2.0), node(CPU=3.0)]) == ""


def test_a_worker_is_no_rank_of_what_started_ray(
        ray_cluster: Any, tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's PMI and mpirun leave their own count of processes, which Accelerate would believe."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr("gradine.pipeline.group.worker_environment", lambda threads: {"env_vars": {
        **worker_environment(threads)["env_vars"], **{name: os.environ[name] for name in (
            "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE")}}})
    group = Group(tiny_run(), 0)
    try:
        assert group.call(os.getenv, "PMI_SIZE") == group.call(os.getenv, "WORLD_SIZE") == [None]
        assert group.call(os.getenv, "OMPI_COMM_WORLD_SIZE") == [None]
    finally:
        group.end()


def lineage(folder: RunDir) -> list[dict[str, Any]]:
    return [line for line in folder.history() if line["event"] == "tick"]


def test_on_a_ray_of_its_own_what_never_fits_is_refused_at_once(
        ray_cluster: Any, tiny_run: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match="stage 8px asks for 1 workers of 5 CPU each"):
        driver.train(tiny_run({"stages.1.cpus": 5.0}), shard_if_needed=False)
