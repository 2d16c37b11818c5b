"""One real step of every stage before a run: rows that add up, memory that runs out in a worker, what would fit."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradine.configs.schema import EnvironmentFault, Run, UserError, as_dict, assign, dump, from_dict
from gradine.pipeline import __main__ as command_line
from gradine.pipeline import plan as planning
from gradine.pipeline import preflight
from gradine.pipeline.group import Group
from gradine.pipeline.preflight import Row, what_would_fit
from gradine.stages import trial as trials
from gradine.stages.data import noise
from gradine.stages.memory import OutOfMemory
from gradine.stages.networks import Discriminator, Generator
from gradine.stages.trial import first_moment, moments, trial

Make = Callable[..., Run]
HUNGRY = {"latent_size": 8, "fmap_base": 256, "fmap_max": 4}  # feature maps are all that counts: 12 MB an image
ROOM_FOR_16 = 320  # MB a worker may grow by: 16 images of 128 px take about 225, 32 take 400, 4 take 60


def configured(changes: dict[str, Any], folder: Path) -> Run:
    """Runs of one or more stages for which no image need exist: preflight reads none."""
    raw: dict[str, Any] = {
        "name": "tiny", "runs": str(folder / "runs"), "data": {"source": "none", "shards": "none"},
        "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8},
        "training": {"precision": "float32", "channels_last": False},
        "stages": [{"resolution": 4 * 2**n, "fade_images": 96, "hold_images": 200, "batch_size": 16, "threads": 1}
                   for n in range(2)]}
    for path, value in changes.items():
        assign(raw, path, value)
    return from_dict(raw)


def hungry(folder: Path, **stage: Any) -> Run:
    """One stage of 128 px."""
    return configured({"network": HUNGRY, "stages": [{"resolution": 128, "threads": 1, "cpus": 0.5, **stage}]}, folder)


def limited(monkeypatch: pytest.MonkeyPatch, headroom_mb: int, stages: tuple[int, ...] = (0,), rank: int = 0) -> None:
    """From now on a group's worker `rank` of these stages may take only so much address space more."""

    def limit() -> None:
        import resource

        if int(os.environ.get("RANK", "0")) == rank:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (headroom_mb << 20), resource.RLIM_INFINITY))

    class Limited(Group):
        def __init__(self, run: Run, stage: int) -> None:
            super().__init__(run, stage)
            if stage in stages:
                workers = run.stages[stage].workers
                small = replace(run.stages[stage], resolution=4, batch_size=4 * workers, micro_batch=4)
                # all that torch loads in its first step is there before the limit counts
                self.call(trial, replace(run, stages=[small]), 0)
                self.call(limit)

    monkeypatch.setattr(preflight, "Group", Limited)


@pytest.fixture(scope="module")
def rows(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Row], Path]:
    """Preflight of two stages, the second on two workers."""
    folder = tmp_path_factory.mktemp("preflight")
    run = configured({"stages.1.workers": 2, "stages.*.cpus": 0.5}, folder)
    shown: list[Row] = []
    _, rows = preflight.preflight(run, shown.append)
    assert shown == rows
    return run, rows, folder


def test_every_stage_has_a_row_and_its_counts_add_up(rows: tuple[Run, list[Row], Path]) -> None:
    run, found, _ = rows
    assert [row.stage.resolution for row in found] == [4, 8]
    assert [row.images for row in found] == [208, 96 + 208]  # 200 images take 13 whole batches of 16
    assert [row.stage.micro_batch for row in found] == [16, 8]
    for row in found:
        assert row.images_per_s == pytest.approx(16 / row.seconds)
        assert row.hours * 3600 == pytest.approx(row.images / 16 * row.seconds)
        assert 0.1 < row.memory_gb < 2  # a process with torch in it
        assert not row.lacks
        assert not row.note


def test_checkpoint_bytes_are_three_networks_and_two_sets_of_moments(rows: tuple[Run, list[Row], Path]) -> None:
    run, found, _ = rows
    for index, row in enumerate(found):
        nets = [kind(run.network, 4 * 2**index, index > 0, 3) for kind in (Generator, Discriminator)]
        generator, discriminator = (sum(p.numel() for p in net.parameters()) for net in nets)
        steps = sum(1 for net in nets for _ in net.parameters())  # Adam counts them for each parameter
        assert row.checkpoint_bytes == 4 * (4 * generator + 3 * discriminator + steps)


def test_nothing_is_written(rows: tuple[Run, list[Row], Path]) -> None:
    assert list(rows[2].rglob("*")) == []


def test_a_stage_no_cluster_can_place_is_refused_before_any_step(ray_cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 8px asks for 1 workers of 64 CPU each"):
        preflight.preflight(configured({"stages.1.cpus": 64}, tmp_path))


@pytest.mark.fault
def test_f22_the_micro_batch_is_halved_when_one_worker_of_two_runs_out(
        ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_AS on rank 1 alone, while rank 0 waits for it in the reduction; the next smaller micro-batch fits."""
    limited(monkeypatch, ROOM_FOR_16, rank=1)
    run, (row,) = preflight.preflight(hungry(tmp_path, batch_size=64, workers=2))
    assert (row.asked, row.stage.micro_batch, row.stage.batch_size, row.stage.workers) == (32, 16, 64, 2)
    assert row.note == "stages.0.micro_batch=16"
    assert not row.lacks
    assert run.stages[0].micro_batch == 32  # the configuration stays the user's


@pytest.mark.fault
def test_f22_where_no_micro_batch_fits_the_other_stages_are_tried_and_the_command_ends_with_3(
        ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """RLIMIT_AS leaves the first of two stages 30 MB: less than one stddev group takes."""
    limited(monkeypatch, 30)
    run = configured({"network": HUNGRY, "stages": [{"resolution": size, "batch_size": 8, "threads": 1, "cpus": 0.5}
                                                    for size in (128, 256)]}, tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(dump(run))
    monkeypatch.setattr(sys, "argv", ["gradine", "preflight", str(config), "stages.1.batch_size=4"])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == 3
    out, err = capsys.readouterr()
    table = [line.split() for line in out.splitlines() if re.match(r" +(128|256) ", line)]
    assert [(row[0], row[1], row[3]) for row in table] == [("128", "8", "4"), ("256", "4", "4")]
    assert "no micro-batch fits" in out
    assert float(table[1][6]) > 0  # seconds a step of the stage that fits
    assert len(err.splitlines()) == 1
    assert err.startswith("gradine: stage 128px: no micro-batch fits (OutOfMemory: stage 128px: no memory for a ")
    assert "The smallest, 4, needs roughly" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.fault
def test_f22_a_worker_that_the_kernel_kills_counts_as_out_of_memory(
        ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of rank 1, as a host out of memory does it, while rank 0 waits for its gradients; at micro-batch 8."""

    def killed(run: Run, stage: int) -> dict[str, float]:
        import torch

        from gradine.stages.loop import new_accelerator

        if run.stages[stage].micro_batch > 4:
            accelerator = new_accelerator(cpu=True, workers=2)
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            accelerator.reduce(torch.ones(1))
        return {"seconds": 1.0, "memory_mb": 1.0, "gpu_mb": 0.0, "checkpoint_bytes": 1.0}

    monkeypatch.setattr(preflight, "trial", killed)
    _, (row,) = preflight.preflight(hungry(tmp_path, batch_size=16, workers=2))
    assert (row.asked, row.note) == (8, "stages.0.micro_batch=4")


@pytest.mark.fault
def test_f22_a_broken_connection_is_traced_to_the_peer_that_died(ray_cluster: Any, tmp_path: Path) -> None:
    """SIGKILL of one of two workers, when the other one's error is all that has been heard of it."""
    group = Group(hungry(tmp_path, batch_size=16, workers=2), 0)
    broken = RuntimeError("Connection closed by peer")
    try:
        assert preflight.death_behind(group, broken) is broken
        os.kill(ray_cluster.get(group.workers[1].call.remote(os.getpid)), signal.SIGKILL)
        assert preflight.shortage(preflight.death_behind(group, broken)).startswith("a worker died")
    finally:
        group.end()


def test_another_error_of_a_worker_is_no_lack_of_memory(ray_cluster: Any, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Run, stage: int) -> None:
        raise IndexError("off by one")

    monkeypatch.setattr(preflight, "trial", wrong)
    with pytest.raises(EnvironmentFault, match="stage 4px: its first step failed: IndexError: off by one"):
        preflight.preflight(configured({}, tmp_path))


def test_out_of_memory_keeps_its_micro_batch_through_ray(ray_cluster: Any) -> None:
    @ray_cluster.remote
    def fails() -> None:
        from gradine.stages.memory import OutOfMemory

        raise OutOfMemory("no memory for a micro-batch of 8", 8)

    with pytest.raises(OutOfMemory) as raised:
        ray_cluster.get(fails.remote())
    assert raised.value.cause.micro_batch == raised.value.micro_batch == 8
    assert preflight.shortage(raised.value) == "OutOfMemory: no memory for a micro-batch of 8"


def large(folder: Path, **stage: Any) -> Run:
    """A stage of 256 px whose smallest micro-batch takes about 3 GB by the estimate."""
    return configured({"network": {"latent_size": 512, "fmap_base": 8192, "fmap_max": 512},
                       "stages": [{"resolution": 256, "batch_size": 16, "micro_batch": 4, "threads": 1, **stage}]},
                      folder)


def proposals(line: str) -> list[str]:
    return re.findall(r"(?:training|network|stages)\.[\w.]+=\w+(?: (?:training|network|stages)\.[\w.]+=\w+)*", line)


def with_settings(run: Run, settings: str) -> Run:
    raw = as_dict(run)
    for text in settings.split():
        path, _, value = text.partition("=")
        assign(raw, path, int(value) if value.isdigit() else value)
    return from_dict(raw)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_what_is_proposed_fits_by_the_estimate_and_is_the_widest_that_does(tmp_path: Path, share: float) -> None:
    run = large(tmp_path)
    needs = planning.memory_gb(run, run.stages[0])
    room = share * needs
    line = what_would_fit(run, 0, room)
    assert len(line.splitlines()) == 1
    assert f"stage 256px: no micro-batch fits. The smallest, 4, needs roughly {needs:.2g} GB" in line
    assert f"{room:.2g} GB of host memory are there" in line
    assert proposals(line)
    for settings in proposals(line):
        changed = with_settings(run, settings)
        assert planning.memory_gb(changed, changed.stages[0]) <= 0.9 * room
        if "fmap" in settings:
            name, width = re.search(r"(fmap_\w+)=(\d+)", settings).groups()  # type: ignore[union-attr]
            wider = with_settings(changed, f"network.{name}={int(width) + getattr(run.network, name) // 16}")
            assert planning.memory_gb(wider, wider.stages[0]) > 0.9 * room
    assert any("bfloat16" in text and "fmap" not in text for text in proposals(line)) == (share > 0.6)


def test_fewer_workers_are_proposed_where_workers_share_a_host(tmp_path: Path) -> None:
    run = large(tmp_path, workers=4)
    needs = planning.memory_gb(run, run.stages[0])
    line = what_would_fit(run, 0, 0.6 * needs, sharing=4)  # 2.4 times what one needs: two workers fit, three cannot
    assert "stages.0.workers=2 stages.0.micro_batch=4" in proposals(line)
    assert with_settings(run, "stages.0.workers=2 stages.0.micro_batch=4").stages[0].batch_size == 16
    assert "workers=" not in what_would_fit(run, 0, 0.6 * needs, sharing=2)  # two hosts: who moves where is not known
    assert "workers=" not in what_would_fit(replace(run, stages=[replace(run.stages[0], gpus=1)]), 0, 0.6 * needs)


def test_a_step_that_failed_although_the_estimate_fits_moves_the_estimate(tmp_path: Path) -> None:
    run = large(tmp_path)
    room = 5 * planning.memory_gb(run, run.stages[0])
    line = what_would_fit(run, 0, room)
    assert f"needs roughly {room:.2g} GB a worker, {room:.2g} GB of host memory are there" in line
    assert proposals(line)


def test_where_no_setting_helps_the_stage_is_to_be_left_out(tmp_path: Path) -> None:
    line = what_would_fit(large(tmp_path, gpus=1), 0, 0.001, reason="OutOfMemory: CUDA out of memory")
    assert proposals(line) == []
    assert "no micro-batch fits (OutOfMemory: CUDA out of memory)" in line
    assert "GB of GPU memory are there. Leave this stage out, or give each worker" in line


def test_the_disk_must_hold_every_stages_end_and_one_more_checkpoint_than_is_kept(tmp_path: Path) -> None:
    run = configured({"checkpoints.keep": 2}, tmp_path)
    made = [Row(index, stage, 16, 100, 1.0, 1.0, 0.0, size) for index, (stage, size) in enumerate(
        zip(run.stages, (10**9, 2 * 10**9), strict=True))]
    line = preflight.disk_line(run, made)
    assert "9.00 GB for the ends of all stages and 3 checkpoints inside one" in line  # 1 + 2 + 3 * 2
    assert "4px 1,000.0, 8px 2,000.0" in line
    assert f"free at {tmp_path}" in line  # the run folder does not exist, and is not made
    too_large = [replace(row, checkpoint_bytes=10**16) for row in made]
    assert preflight.disk_line(run, too_large).startswith("WARNING  too little disk: 50,000,000.00 GB")
    assert preflight.disk_line(configured({"checkpoints.location": "s3://bucket/runs"}, tmp_path), too_large) == ""


def test_the_step_measured_is_one_of_the_middle_of_the_fade(tmp_path: Path) -> None:
    run = configured({"stages.1.workers": 2, "stages.1.micro_batch": 4}, tmp_path)
    assert (first_moment(run, 0).alpha, first_moment(run, 1).alpha) == (1.0, 0.5)
    sharp = configured({"stages.1.fade_images": 0}, tmp_path)
    assert first_moment(sharp, 1).alpha == 1.0  # fades nothing
    (first, second) = noise(run, 1, 0, 2)
    assert first.reals.shape == second.reals.shape == (4, 3, 8, 8)
    assert first.reals.float().std() == pytest.approx(256 / math.sqrt(12), rel=0.1)  # uniform bytes


def test_a_stages_step_is_the_mean_over_the_images_of_its_fade_and_its_hold(tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """96 images in steps of 3 s, then 208 (200 in whole batches) in steps of 1 s."""
    run = configured({}, tmp_path)
    assert [(moment.phase.kind, moment.alpha, images) for moment, images in moments(run, 1)] == [
        ("fade", 0.5, 96), ("hold", 1.0, 208)]
    monkeypatch.setattr(trials, "timed_step", lambda state, shares, moment, rules, reduce: 5 - 4 * moment.alpha)
    assert trial(run, 1)["seconds"] == pytest.approx((96 * 3 + 208 * 1) / 304)
    assert trial(run, 0)["seconds"] == 1


def test_a_step_is_the_mean_of_those_with_a_turn_of_g_or_a_penalty_and_those_without(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every 6 steps, 0 and 2 and 4 have a penalty, 2 and 5 a turn of G: here 2 s each beside the 1 s of D."""
    run = configured({"training.d_steps": 3, "training.penalty_every": 2}, tmp_path)
    seen = [(int(moment.images_seen - moment.phase.start) // moment.phase.batch_size, images)
            for moment, images in moments(run, 0)]
    assert [step % 6 for step, _ in seen] == [2, 5, 0, 1]  # the heaviest first
    whole = sum(images for _, images in seen)
    assert [images / whole for _, images in seen] == pytest.approx([1 / 6, 1 / 6, 2 / 6, 2 / 6])
    taking = {2: 5.0, 5: 3.0, 0: 3.0, 1: 1.0}
    monkeypatch.setattr(trials, "timed_step", lambda state, shares, moment, *_: taking[
        (moment.images_seen - moment.phase.start) // moment.phase.batch_size])
    assert trial(run, 0)["seconds"] == pytest.approx((5 + 3 + 2 * 3 + 2 * 1) / 6)
    assert trial(run, 0)["checkpoint_bytes"] == trial(configured({}, tmp_path), 0)["checkpoint_bytes"]


def test_a_save_beside_the_steps_takes_its_largest_file_twice_more(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """That file holds the moments: two floats a weight and a count a tensor, of both networks."""
    monkeypatch.setattr(trials, "timed_step", lambda *_: 5.0)
    monkeypatch.setattr(trials, "peak_memory_mb", lambda _: 100.0)
    run = configured({}, tmp_path)
    parameters = [p for kind in (Generator, Discriminator) for p in kind(run.network, 8, True, 3).parameters()]
    moments_mb = 4 * (2 * sum(p.numel() for p in parameters) + len(parameters)) / 1e6
    beside, before_the_next = (trial(configured({"checkpoints.background": value}, tmp_path), 1)["memory_mb"]
                               for value in (True, False))
    assert before_the_next == 100
    assert beside == pytest.approx(100 + 2 * moments_mb)
