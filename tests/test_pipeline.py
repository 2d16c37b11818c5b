"""From a folder of images to a report, through Ray; resumed, branched, failed, sampled, exported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradine.configs.schema import EnvironmentFault, Run, UserError, dump
from gradine.pipeline import commands, driver
from gradine.pipeline.run_dir import RunDir
from gradine.stages import checkpoint, commits

TENSORS = ("generator", "discriminator", "average", "optimizers")


def weights(folder: RunDir, name: str) -> dict[str, bytes]:
    return {part: (folder.checkpoints / name / f"{part}.safetensors").read_bytes() for part in TENSORS}


def events(folder: RunDir, kind: str) -> list[dict[str, Any]]:
    return [line for line in folder.lines("ledger.jsonl") if line["event"] == kind]


@pytest.fixture(scope="module")
def trained_once(module_run: Callable[..., Run], ray_cluster: Any) -> tuple[Run, RunDir]:
    run = module_run({"stages.*.workers": 2, "stages.*.cpus": 0.5})
    return run, driver.train(run, shard_if_needed=True)


@pytest.fixture
def finished(trained_once: tuple[Run, RunDir], tmp_path: Path) -> tuple[Run, RunDir]:
    """A finished run of two workers, a test's own copy."""
    run, folder = trained_once
    shutil.copytree(folder.path, tmp_path / "runs" / run.name)
    run = replace(run, runs=str(tmp_path / "runs"))
    return run, driver.run_folder(run)


def test_a_folder_becomes_stages_checkpoints_figures_samples_and_a_report(finished: tuple[Run, RunDir]) -> None:
    run, folder = finished
    ends = [c.name for c in commits.find(folder.checkpoints)[0] if c.stage_end]
    assert ends == ["r0004-hold-000000080", "r0008-hold-000000240"]
    rows = folder.lines("metrics.jsonl")
    assert {(row["metric"], row["checkpoint"]) for row in rows} == {(metric, end) for end in ends for metric in (
        "swd", "ms_ssim", "fd_pixels16", "spread_pixels16", "kid_pixels16", "precision_pixels16", "recall_pixels16",
        "density_pixels16", "coverage_pixels16", "duplicates_pixels16", "path_length_pixels16", "copy_rate_pixels16",
        "discriminator")}
    for row in rows:
        assert row["seed"] == run.training.seed
        assert len(row["data"]) == 64
        assert (row["features"], row["features_digest"] is None) == (
            ("pixels16", False) if row["metric"].endswith("_pixels16") else (None, True))
        if row["metric"] == "ms_ssim":
            assert row["value"] is None
            assert "64 px" in row["reason"]
        else:
            assert row["value"] is not None
            assert row["reason"] is None
            assert row["count"] == 24  # half of 48
        if row["metric"] in ("swd", "fd_pixels16"):
            assert row["value"] > row["floor"] > 0
            assert row["interval"][0] <= row["value"] <= row["interval"][1]
    for size, seen in ((4, 80), (8, 240)):
        with Image.open(folder.samples / f"r{size:04d}-{seen:09d}.png") as grid:
            assert grid.size == (8 * size, size)  # eight samples in one row
    assert "data:image/png" in folder.report.read_text()
    assert list((folder.path / "tensorboard").iterdir())
    # one group of two workers served both stages, and the second began within a second of the first's end
    (group,) = events(folder, "group")
    assert group["workers"] == 2
    first_end, second_start = events(folder, "stage_end")[0], events(folder, "stage_start")[1]
    assert second_start["time"] - first_end["time"] < 1
    settings = json.loads((folder.checkpoints / ends[1] / "state.json").read_text())
    assert settings["workers"] == 2


def test_the_same_command_again_finds_nothing_left_and_changes_no_weight(finished: tuple[Run, RunDir]) -> None:
    run, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.checkpoints.rglob("*")}
    figures = folder.lines("metrics.jsonl")
    driver.train(run, shard_if_needed=True)
    assert {p: p.stat().st_mtime_ns for p in folder.checkpoints.rglob("*")} == before
    assert folder.lines("metrics.jsonl") == figures


def test_a_branch_moves_the_past_aside_and_the_same_command_continues_it(finished: tuple[Run, RunDir]) -> None:
    run, folder = finished
    old = weights(folder, "r0008-hold-000000240")
    faster = replace(run, resume="8", stages=[run.stages[0], replace(run.stages[1], learning_rate=0.01)])
    driver.train(faster, shard_if_needed=False)
    assert weights(folder, "r0008-hold-000000240") != old
    aside = RunDir(folder.path / "superseded" / "1")
    assert weights(aside, "r0008-hold-000000240") == old
    assert (folder.path / "superseded/1/samples/r0008-000000240.png").is_file()
    assert len([row for row in folder.lines("metrics.jsonl") if row["resolution"] == 8]) == 13
    new = weights(folder, "r0008-hold-000000240")
    driver.train(faster, shard_if_needed=False)
    assert weights(folder, "r0008-hold-000000240") == new
    assert len(events(folder, "branch")) == 1
    driver.train(replace(faster, branch="new"), shard_if_needed=False)
    assert len(events(folder, "branch")) == 2
    assert weights(folder, "r0008-hold-000000240") == new  # nothing changed, so the same bits again


def test_a_damaged_newest_checkpoint_is_passed_over_and_training_reaches_the_same_bits(
        finished: tuple[Run, RunDir]) -> None:
    run, folder = finished
    want = weights(folder, "r0008-hold-000000240")
    victim = folder.checkpoints / "r0008-hold-000000240" / "discriminator.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    driver.train(run, shard_if_needed=False)
    assert weights(folder, "r0008-hold-000000240-t2") == want
    assert "discriminator.safetensors" in events(folder, "resume")[-1]["reason"]
    assert weights(folder, "r0008-hold-000000240") != want  # nothing is overwritten, and it never counts again


def test_changed_settings_changed_data_and_a_fresh_start_are_refused(finished: tuple[Run, RunDir]) -> None:
    run, folder = finished
    with pytest.raises(UserError, match=r"training.seed: 0 -> 7"):
        driver.train(replace(run, training=replace(run.training, seed=7)), shard_if_needed=False)
    with pytest.raises(UserError, match="fresh wants an empty run folder"):
        driver.train(replace(run, resume="fresh"), shard_if_needed=False)
    other = replace(run, data=replace(run.data, shards=str(folder.path / "others"), source="bundled:demo_images.zip"))
    with pytest.raises(UserError, match="shards in .* are not those"):
        driver.train(other, shard_if_needed=True)


def test_new_weights_start_from_another_runs(finished: tuple[Run, RunDir]) -> None:
    run, folder = finished
    heir = replace(run, name="heir", init_from=str(folder.path),
                   stages=[replace(run.stages[0], hold_images=8, learning_rate=1e-12), run.stages[1]])
    child = driver.train(heir, shard_if_needed=False)
    loaded = [checkpoint.load_tensors(commits.read(f.checkpoints / name), "generator")["blocks.4.conv.weight"]
              for f, name in ((folder, "r0008-hold-000000240"), (child, "r0004-hold-000000008"))]
    torch.testing.assert_close(loaded[0], loaded[1], rtol=0, atol=1e-9)


def test_the_sampler_repeats_itself_and_the_export_runs_without_gradine(finished: tuple[Run, RunDir],
                                                                        tmp_path: Path) -> None:
    _, folder = finished
    for out in ("a", "b"):
        commands.sample_run(folder.path, tmp_path / out, count=3, seed=5, name="")
    pictures = [np.asarray(Image.open(tmp_path / out / "seed5-00002.png")) for out in ("a", "b")]
    assert pictures[0].shape == (8, 8, 3)
    np.testing.assert_array_equal(pictures[0], pictures[1])
    commands.export_run(folder.path, tmp_path / "export", name="")
    script = ("import sys, torch\n"
              "program = torch.export.load('generator.pt2').module()\n"
              "latents = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))\n"
              "torch.save(program(latents), 'images.pt')\n"
              "assert not any(name.split('.')[0] == 'gradine' for name in sys.modules)\n")
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "export", check=True, env={**os.environ})
    images = torch.load(tmp_path / "export" / "images.pt", weights_only=True)
    from gradine.stages.generate import load_average

    _, run, _, files = commands.chosen(folder.path, "")
    latents = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(images, load_average(run, files)(latents))


def test_the_plan_says_what_is_left_and_writes_nothing(tiny_run: Callable[..., Run], tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    commands.print_plan(run)
    out = capsys.readouterr().out
    assert "no checkpoint yet" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault
def test_a_killed_worker_is_replaced_and_the_result_is_that_of_an_unbroken_run(
        finished: tuple[Run, RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    run, unbroken = finished
    killed = []
    true_tick = driver.Display.tick

    def kill_once(self: driver.Display, event: dict[str, Any]) -> None:
        if event["images_seen"] >= 160 and not killed:
            import psutil

            workers = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]
                       and "ray::Worker" in p.info["cmdline"][0] and os.getpid() in [q.pid for q in p.parents()]]
            killed.append(workers[-1].pid)
            workers[-1].send_signal(signal.SIGKILL)
        true_tick(self, event)

    monkeypatch.setattr(driver.Display, "tick", kill_once)
    folder = driver.train(replace(run, name="killed", tick_images=8), shard_if_needed=False)
    assert killed
    (retry,) = events(folder, "retry")
    assert retry["failures"] == 1
    assert weights(folder, "r0008-hold-000000240") == weights(unbroken, "r0008-hold-000000240")


@pytest.mark.fault
def test_a_stage_that_fails_three_times_without_progress_stops_the_run(
        tiny_run: Callable[..., Run], ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: driver.Session, index: int, start: Any) -> None:
        raise RuntimeError("the same step fails")

    monkeypatch.setattr(driver.Session, "stage", broken)
    with pytest.raises(EnvironmentFault, match="failed 3 times without progress .* the same step fails"):
        driver.train(tiny_run(), shard_if_needed=True)


@pytest.mark.fault
def test_a_killed_driver_leaves_no_process_and_the_same_command_resumes_to_the_same_bits(
        finished: tuple[Run, RunDir], tmp_path: Path) -> None:
    run, unbroken = finished
    config = tmp_path / "config.yaml"
    config.write_text(dump(replace(run, name="killed", tick_images=8)))
    command = [sys.executable, "-m", "gradine.pipeline", "train", str(config)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    folder = RunDir(Path(run.runs) / "killed")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if line.strip().startswith("8px"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resume: from r000" in done.stdout
    assert weights(folder, "r0008-hold-000000240") == weights(unbroken, "r0008-hold-000000240")


def test_a_run_joins_a_cluster_that_is_there_and_leaves_it_running(
        finished: tuple[Run, RunDir], ray_cluster: Any, tmp_path: Path) -> None:
    run, alone = finished
    config = tmp_path / "config.yaml"
    config.write_text(dump(replace(run, name="joined")))
    address = ray_cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "gradine.pipeline", "train", str(config), f"ray.address={address}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # the token is in the environment
    assert done.returncode == 0, done.stderr
    folder = RunDir(Path(run.runs) / "joined")
    assert events(folder, "start")[0]["resources"]["CPU"] == 4  # the fixture's; one of its own would have 2
    assert weights(folder, "r0008-hold-000000240") == weights(alone, "r0008-hold-000000240")
    assert ray_cluster.get(ray_cluster.remote(lambda: 1).remote()) == 1
