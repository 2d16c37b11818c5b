"""Faults of whole runs, through the command line and Ray: stopped, taken over, refused, out of memory, not finite.

The run: 4 px holds 0..80; 8 px fades 80..160 and holds to 240, in steps of 8 images with a checkpoint every 40. Nothing
here waits for a time to pass: what is injected tells when it was reached (injected.py), the ledger tells the rest.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gradine.configs.schema import Run, dump, load
from gradine.pipeline import __main__ as command_line
from gradine.pipeline import driver, evaluations, lock
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.signals import ONE_REQUEST_S
from gradine.stages import checkpoint, commits
from tests.injected import Injected, meanwhile, wait_until
from tests.object_store import BUCKET, aws, free_port, moto, tool  # noqa: F401 (a fixture)

pytestmark = pytest.mark.fault
TENSORS = [f"{part}.safetensors" for part in ("generator", "discriminator", "average", "optimizers")]
END = "r0008-hold-000000240"
CHECKPOINTS = ["r0004-hold-000000040", "r0004-hold-000000080", "r0008-fade-000000120", "r0008-fade-000000160",
               "r0008-hold-000000200", END]
WITHOUT_EVALUATIONS = 'CHANGES["gradine.pipeline.evaluations"] = without_evaluations\n'
TWO_WORKERS = {"tick_images": 8, "stages.*.workers": 2, "stages.*.cpus": 0.5}
ONE_WORKER = {"tick_images": 8, "stages.*.micro_batch": 4}  # the same sums in the same order


@pytest.fixture
def injected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Injected]:
    """Puts what a test injects on the PYTHONPATH of the processes it starts, Ray's workers among them."""
    faults = Injected(tmp_path / "injected")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(faults.folder), os.environ.get("PYTHONPATH")])))
    yield faults
    faults.end()


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations take longer than these trainings, and are of no concern to most tests here."""
    monkeypatch.setattr(evaluations.Evaluations, "start", lambda *_: None)


@pytest.fixture(scope="module")
def unbroken(module_run: Callable[..., Run], ray_cluster: Any) -> RunDir:
    """A run that nothing happened to, of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations.Evaluations, "start", lambda *_: None)
        return driver.train(module_run({**TWO_WORKERS, "name": "unbroken"}), shard_if_needed=False)


def bits(folder: RunDir, name: str = END) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes, whatever location and suffix it has."""
    found = [one for one in commits.find(commits.location_of(load(folder.config), folder.path))[0]
             if one.name.startswith(name)]
    assert len(found) == 1, found
    return {file: content for file, content in commits.read(found[0].path).items() if file in TENSORS}


def events(folder: RunDir, kind: str) -> list[dict[str, Any]]:
    return [line for line in folder.lines("ledger.jsonl") if line["event"] == kind]


def settings_of(run: Run, path: Path) -> tuple[str, RunDir]:
    """The run as a configuration file, as a user gives it, and its folder."""
    path.mkdir(exist_ok=True)
    config = path / f"{run.name}.yaml"
    config.write_text(dump(run))
    return str(config), driver.run_folder(run)


def asked_now() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Here:
    """`gradine ...` in this process: its exit code and what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> int:
        self.monkeypatch.setattr(sys, "argv", ["gradine", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        self.out, self.err = self.capsys.readouterr()
        return int(ended.value.code or 0)


@pytest.fixture
def gradine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


class Process:
    """`gradine ...` in a process of its own, with a Ray of its own and at the head of a process group of its own."""

    def __init__(self, *arguments: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        command = [sys.executable, "-m", "gradine.pipeline", *arguments]
        self.popen = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, start_new_session=True)

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.popen.pid)
        return [me, *me.children(recursive=True)]

    def ended(self) -> int:
        self.out, self.err = self.popen.communicate(timeout=180)
        return self.popen.returncode


@contextmanager
def started(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        if process.popen.poll() is None:  # only after a failure
            for one in process.family():
                one.kill()
            process.popen.wait()


def refuse_survivors(family: list[psutil.Process]) -> None:
    def alive(one: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # Ray's agents look for their parent once a minute
            return one.status() != psutil.STATUS_ZOMBIE and not "".join(one.cmdline()[:1]).endswith("Agent")
        return False

    wait_until(lambda: not any(map(alive, family)), f"{family} are gone")


# F15: asked to stop --------------------------------------------------------------------------------------------------


STOPPED_TWICE = WITHOUT_EVALUATIONS + '''
@before_steps
def stay(state, shares, seen):
    if seen in (120, 200) and rank() == 0 and first(f"asked-{seen}"):
        until_asked(str(seen))
'''


def test_f15_a_run_stopped_by_sigterm_and_then_by_ctrl_c_ends_with_the_bits_of_the_unbroken_one(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path) -> None:
    """SIGTERM to the driver in a fade, Ctrl-C to its whole process group in a hold, with two workers"""
    injected.add(STOPPED_TWICE)
    config, folder = settings_of(tiny_run({**TWO_WORKERS, "name": "stopped", "ray.grace_s": 10.0}), tmp_path)
    for where, number, phase in ((120, signal.SIGTERM, "fade"), (200, signal.SIGINT, "hold")):
        with started("train", config) as process:
            injected.reached(str(where))
            family, sent = process.family(), time.time()
            assert len(family) > 4, "the driver, Ray's own processes and two workers"
            (os.killpg if number == signal.SIGINT else os.kill)(process.popen.pid, number)
            assert process.ended() == 128 + number, process.err
        refuse_survivors(family)
        last = events(folder, "checkpoint")[-1]
        of_stage, of_run = events(folder, "stopped")[-2:]
        assert where < last["images_seen"] <= where + 24
        assert (last["images_seen"], last["phase"]) == (of_stage["images_seen"], phase)
        assert last["images_seen"] == events(folder, "tick")[-1]["images_seen"]
        assert of_run["reason"] == number.name
        assert last["time"] - sent < 10
        assert not process.err
    with started("train", config) as process:
        assert process.ended() == 0, process.err
    assert [line["start"] for line in events(folder, "resume")][1:] == [
        Path(line["path"]).name for line in events(folder, "checkpoint") if line["images_seen"] % 40]
    assert not events(folder, "retry")
    assert bits(folder) == bits(unbroken)


STUCK = WITHOUT_EVALUATIONS + '''
@before_steps
def stay(state, shares, seen):
    if seen == 120 and first("stuck-once"):
        hold("stuck")
'''


def test_f15_a_second_sigterm_ends_the_driver_and_its_ray_at_once(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path) -> None:
    """two SIGTERMs while a worker is stuck in a step, with ten minutes of grace"""
    injected.add(STUCK)
    config, folder = settings_of(tiny_run({**ONE_WORKER, "ray.grace_s": 600.0}), tmp_path)
    with started("train", config) as process:
        injected.reached("stuck")
        family = process.family()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.stdout
        for line in process.popen.stdout:
            if "once more ends at once" in line:
                break
        time.sleep(2 * ONE_REQUEST_S)
        process.popen.send_signal(signal.SIGTERM)
        assert process.ended() == -signal.SIGTERM
    refuse_survivors(family)
    assert events(folder, "tick")[-1]["images_seen"] == 120
    newest, damaged = commits.newest_valid(commits.find(folder.checkpoints)[0])
    assert newest
    assert newest[0].images_seen in (80, 120)  # the second may still have been under way
    assert not damaged


def test_f15_a_worker_that_does_not_end_within_the_grace_is_left_behind(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here, unmeasured: None) -> None:
    """SIGTERM while a worker is stuck in a step, with half a second of grace"""
    injected.add(STUCK)
    config, folder = settings_of(tiny_run({**ONE_WORKER, "ray.grace_s": 0.5}), tmp_path)

    def stop() -> None:
        injected.reached("stuck")
        asked_now()

    with meanwhile(stop):
        assert gradine("train", config) == 143
    assert "no checkpoint within ray.grace_s=0.5; the last one stands" in gradine.out
    assert [line["reason"] for line in events(folder, "stopped")] == ["SIGTERM"]


SHARDING_STUCK = WITHOUT_EVALUATIONS + '''
def change(shards):
    true_slice = shards.make_slice
    def make_slice(*arguments):
        if first("slice-once"):
            hold("slice")
        return true_slice(*arguments)
    shards.make_slice = make_slice
CHANGES["gradine.pipeline.shards"] = change
'''


def test_f15_a_stop_while_sharding_ends_promptly_and_the_same_command_makes_the_rest(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """SIGTERM to the driver while a sharding task is stuck"""
    injected.add(SHARDING_STUCK)
    run = tiny_run({**ONE_WORKER, "data.shards": str(tmp_path / "own-shards")})
    config, folder = settings_of(run, tmp_path)
    with started("run", config) as process:
        injected.reached("slice")
        family = process.family()
        process.popen.send_signal(signal.SIGTERM)
        assert process.ended() == 143, process.err
    refuse_survivors(family)
    assert [line["reason"] for line in events(folder, "stopped")] == ["SIGTERM"]
    assert "Traceback" not in process.err
    assert gradine("run", config) == 0
    assert bits(folder) == bits(unbroken)


GROUP_STUCK = '''
CHANGES["gradine.pipeline.group"] = lambda cluster: hold("group") if first("group-once") else None
'''
WORKER_STUCK = '''
CHANGES["gradine.stages.loop"] = lambda loop: hold("group") if first("group-once") else None
'''


@pytest.mark.parametrize("code", [GROUP_STUCK, WORKER_STUCK], ids=["placed", "joined"])
def test_f15_a_stop_while_a_group_starts_ends_promptly_and_the_same_command_goes_on(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None, code: str) -> None:
    """SIGTERM to the driver while a worker starts, before and after it joined its group"""
    injected.add(code)
    config, folder = settings_of(tiny_run({**ONE_WORKER, "ray.grace_s": 600.0}), tmp_path)

    def stop() -> None:
        injected.reached("group")
        asked_now()

    with meanwhile(stop):
        assert gradine("train", config) == 143
    assert [line["reason"] for line in events(folder, "stopped")] == ["SIGTERM"]
    assert not events(folder, "tick")
    assert not events(folder, "retry")
    if code == WORKER_STUCK:
        assert gradine("train", config) == 0
        assert bits(folder) == bits(unbroken)


EVALUATION_STUCK = '''
CHANGES["gradine.stages.evaluate"] = lambda module: hold("evaluation") if first("evaluation-once") else None
'''


def test_f15_a_stop_while_only_an_evaluation_runs_ends_promptly_and_the_same_command_measures(
        unbroken: RunDir, injected: Injected, tmp_path: Path, gradine: Here) -> None:
    """SIGTERM to the driver while all is trained and an evaluation is stuck"""
    injected.add(EVALUATION_STUCK)
    config, folder = copied(unbroken, tmp_path)

    def stop() -> None:
        injected.reached("evaluation")
        asked_now()

    with meanwhile(stop):
        assert gradine("train", config) == 143
    assert events(folder, "stopped")[-1]["reason"] == "SIGTERM"
    assert not folder.lines("metrics.jsonl")
    injected.let_go("evaluation")
    assert gradine("train", config) == 0
    assert {row["checkpoint"] for row in folder.lines("metrics.jsonl")} == {"r0004-hold-000000080", END}


def copied(folder: RunDir, tmp_path: Path, **changes: Any) -> tuple[str, RunDir]:
    """A test's own copy of a finished run, and its configuration file."""
    run = replace(load(folder.config), runs=str(tmp_path / "runs"), **changes)
    shutil.copytree(folder.path, tmp_path / "runs" / run.name)
    return settings_of(run, tmp_path)


# F16: one worker asked to stop ---------------------------------------------------------------------------------------


def test_f16_a_worker_that_is_told_to_end_alone_is_replaced_from_the_checkpoint_it_left(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """SIGTERM to the second of two Ray workers, and to nobody else"""
    injected.add('''
@before_steps
def stay(state, shares, seen):
    if seen == 120 and rank() == 1 and first("once"):
        until_asked("asked")
''')
    config, folder = settings_of(tiny_run(TWO_WORKERS), tmp_path)
    with meanwhile(lambda: os.kill(injected.reached("asked"), signal.SIGTERM)):
        assert gradine("train", config) == 0
    (stopped,), (retry,) = events(folder, "stopped"), events(folder, "retry")
    assert 120 < stopped["images_seen"] <= 144
    assert "SIGTERM" in retry["reason"]
    assert retry["failures"] == 1
    assert events(folder, "resume")[-1]["images_seen"] == stopped["images_seen"]
    assert len(events(folder, "group")) == 2
    assert bits(folder) == bits(unbroken)


# F08: two processes on one run ---------------------------------------------------------------------------------------


def test_f08_a_second_process_is_refused_and_one_that_slept_through_a_takeover_cannot_commit(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """`gradine train` twice on one run; then SIGSTOP to the first and all of its Ray, a takeover, SIGCONT"""
    injected.add(WITHOUT_EVALUATIONS + '''
@before_steps
def stay(state, shares, seen):
    if seen == 176 and first("once"):
        hold("step")
''')
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    with started("train", config) as process:
        injected.reached("step")
        assert gradine("train", config) == 2
        assert gradine.err.count("\n") == 1
        for part in (str(folder.path), f"by pid {process.popen.pid} on {socket.gethostname()} since 20"):
            assert part in gradine.err
        family = process.family()
        for one in family:
            one.suspend()
        newest, _ = commits.newest_valid(commits.find(folder.checkpoints)[0])
        assert newest
        assert newest[0].images_seen == 160
        taken = commits.begin_term(folder.checkpoints, newest[0])
        injected.let_go("step")
        for one in reversed(family):
            one.resume()
        assert process.ended() == 3, process.err
    assert process.err.count("\n") == 1
    assert f"term {taken.number} (pid {os.getpid()} on" in process.err
    assert events(folder, "stopped")[-1]["reason"] in process.err
    assert commits.find(folder.checkpoints)[0][-1] == newest[0]
    assert gradine("train", config) == 0
    assert bits(folder) == bits(unbroken)


def test_f08_a_driver_whose_lease_another_process_took_ends_with_one_line(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here, unmeasured: None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """--take-over of a run on a disk that counts as shared, while its first driver trains"""
    injected.add('''
@before_steps
def stay(state, shares, seen):
    if seen == 120:
        hold("step")
''')
    shared = functools.partial(lock.held, disk="shared", lease_s=60.0, renew_s=0.1)
    monkeypatch.setattr(lock, "held", shared)
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)

    def take() -> None:
        injected.reached("step")
        with shared(folder.path, take_over=True):
            wait_until(lambda: events(folder, "stopped"), "the first driver ends")

    with meanwhile(take):
        assert gradine("train", config) == 3
    assert gradine.err.count("\n") == 1
    assert f"{folder.path} was taken over by pid {os.getpid()} on {socket.gethostname()}" in gradine.err
    assert events(folder, "tick")[-1]["images_seen"] == 120


# F11: resumed with something else ------------------------------------------------------------------------------------


def other_data(run: Run, folder: RunDir, tmp_path: Path) -> Run:
    shards = tmp_path / "other-shards"
    shutil.copytree(run.data.shards, shards)
    index = shards / "r0008" / "index.json"
    body = json.loads(index.read_text())
    body["shards"][0]["sha256"] = "0" * 64
    index.write_text(json.dumps(body))
    return replace(run, data=replace(run.data, shards=str(shards)))


def newer_schema(run: Run, folder: RunDir, tmp_path: Path) -> Run:
    path = folder.checkpoints / END / "MANIFEST.json"
    body = {**json.loads(path.read_text()), "schema": 3}
    del body["sha256"]
    path.write_bytes(commits.sealed(body))
    return run


CHANGED: dict[str, tuple[Callable[..., Run], list[str]]] = {
    "settings": (lambda run, *_: replace(run, training=replace(run.training, seed=7, beta2=0.9)),
                 ["\n  training.beta2: 0.99 -> 0.9\n", "\n  training.seed: 0 -> 7\n", "another name="]),
    "architecture": (lambda run, *_: replace(run, network=replace(run.network, fmap_max=4)),
                     ["\n  network.fmap_max: 8 -> 4\n"]),
    "data": (other_data, ["the 8px shards in", "other-shards", "another name="]),
    "schema": (newer_schema, [END, "schema 3", "a newer gradine wrote it"]),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_f11_a_resume_with_other_settings_data_or_schema_is_refused_before_ray_is_asked_for_anything(
        unbroken: RunDir, tmp_path: Path, gradine: Here, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """another seed, network width, shard digest or checkpoint schema under a run that exists"""
    def no_ray(*_: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver, "connected", no_ray)
    config, folder = copied(unbroken, tmp_path)
    change, parts = CHANGED[kind]
    config, _ = settings_of(change(load(config), folder, tmp_path), tmp_path)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and path.name != "lock"}
    assert gradine("train", config) == 2
    for part in parts:
        assert part in gradine.err
    assert {path: path.read_bytes() for path in before} == before


def test_f11_the_run_folder_of_the_first_release_is_gone_on_with_by_todays_defaults(tmp_path: Path) -> None:
    """a run folder as schema 1 left it, without terms and without today's settings"""
    shutil.copytree(Path(__file__).parent / "releases" / "schema1", tmp_path / "schema1")
    folder = RunDir(tmp_path / "schema1")
    assert "location" not in folder.config.read_text()
    run, plan = driver.settle(replace(load(folder.config), runs=str(tmp_path)), folder)
    assert plan.start
    assert (plan.start.name, plan.start.term, plan.start.skipped) == ("r0008-fade-000000120", 0, ())
    assert [run.stages[index].resolution for index in plan.stages] == [8]
    assert run.checkpoints.keep == load(folder.config).checkpoints.keep
    term = commits.begin_term(folder.checkpoints, plan.start)
    assert (term.number, term.starts) == (1, {1: 120})
    assert [one.name for one in commits.find(folder.checkpoints)[0]] == ["r0004-hold-000000080", "r0008-fade-000000120"]


# F22: out of memory --------------------------------------------------------------------------------------------------


TOO_MUCH_AT_ONCE = '''
@before_steps
def allocate(state, shares, seen):
    import torch
    if seen >= 80 and max(len(share.reals) for share in shares) > {fits}:
        torch.empty(1 << 50, dtype=torch.uint8)  # a petabyte: the allocator's own words
'''


def test_f22_a_worker_out_of_memory_goes_on_with_half_the_micro_batch_and_so_does_the_next_command(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """the allocator's error in a Ray worker at the first step of a new stage, until its micro-batch is half"""
    injected.add(TOO_MUCH_AT_ONCE.format(fits=4))
    given = tiny_run({"tick_images": 8, "stages.0.micro_batch": 4})
    assert given.stages[1].micro_batch == 0
    config, folder = settings_of(given, tmp_path)
    assert gradine("train", config) == 0
    (told,) = events(folder, "micro_batch")
    assert (told["resolution"], told["was"], told["now"]) == (8, 8, 4)
    assert "can't allocate memory" in told["reason"]
    assert [stage.micro_batch for stage in load(folder.config).stages] == [4, 4]
    assert [stage.batch_size for stage in load(folder.config).stages] == [8, 8]
    state = json.loads((folder.checkpoints / END / "state.json").read_text())
    assert (state["micro_batch"], state["masked"]) == (4, [0, 0])
    assert bits(folder) == bits(unbroken)  # from its first step on it computed what two workers of 4 images do
    shutil.rmtree(folder.checkpoints / END)
    assert gradine("train", config) == 0
    assert len(events(folder, "micro_batch")) == 1
    assert bits(folder) == bits(unbroken)


def test_f22_where_nothing_smaller_is_left_the_run_ends_and_says_what_would_fit(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here, unmeasured: None) -> None:
    """the allocator's error in a Ray worker at every micro-batch"""
    injected.add(TOO_MUCH_AT_ONCE.format(fits=0))
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    assert gradine("train", config) == 3
    assert gradine.err.count("\n") == 1
    for part in ("stage 8px", "micro-batch of 4"):
        assert part in gradine.err
    print(gradine.err)
    assert events(folder, "stopped")[-1]["reason"] in gradine.err
    assert not events(folder, "micro_batch")


# F23: the same failure again and again --------------------------------------------------------------------------------


def test_f23_the_same_failure_three_times_ends_the_run_with_its_evidence_and_the_same_command_resumes(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """an exception in a Ray worker at the same step, until its cause is taken away"""
    injected.add('''
@before_steps
def fail(state, shares, seen):
    if seen == 136 and (HERE / "cause").exists():
        raise RuntimeError("the tape is torn")
''')
    cause = injected.folder / "cause"
    cause.touch()
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    assert gradine("train", config) == 5
    assert gradine.err.count("\n") == 1
    evidence = folder.path / "crashes" / "1"
    for part in ("3 times", "the tape is torn", str(evidence)):
        assert part in gradine.err
    assert [line["failures"] for line in events(folder, "retry")] == [1, 2, 3]
    assert sorted(path.name for path in evidence.iterdir()) == [
        "config.yaml", "failure-1.txt", "failure-2.txt", "failure-3.txt", "images.json"]
    assert (evidence / "config.yaml").read_text() == folder.config.read_text()
    for number in (1, 2, 3):
        stack = (evidence / f"failure-{number}.txt").read_text()
        assert "\x1b" not in stack
        assert re.search(r"sitecustomize.py\", line \d+, in fail", stack)
        assert "the tape is torn" in stack
    next_images = json.loads((evidence / "images.json").read_text())
    assert next_images["images_seen"] == 136
    assert len(next_images["ids"]) == 32
    ends_epoch, begins_next = next_images["ids"][:8], next_images["ids"][8:]  # 48 images: the third epoch ends at 144
    assert len(set(ends_epoch)) == 8
    assert len(set(begins_next)) == 24
    cause.unlink()
    assert gradine("train", config) == 0
    assert bits(folder) == bits(unbroken)


# F24: not finite -----------------------------------------------------------------------------------------------------


def poisoned(*moments: int) -> str:
    return f'''
@before_steps
def poison(state, shares, seen):
    if seen in {moments} and rank() == int(os.environ.get("WORLD_SIZE", 1)) - 1 and first(f"poisoned-{{seen}}"):
        next(state.generator.parameters()).data.view(-1)[0] = float("nan")
'''


def test_f24_a_state_that_is_not_finite_is_rolled_back_once_and_its_images_are_left_out_for_good(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """a NaN in one weight of one of two Ray workers"""
    injected.add(poisoned(176))
    config, folder = settings_of(tiny_run({**TWO_WORKERS, "checkpoints.keep": 9}), tmp_path)
    assert gradine("train", config) == 0
    (rolled,) = events(folder, "roll_back")
    assert (rolled["first"], rolled["last"]) == (160, 184)
    term = commits.newest_term(folder.checkpoints)
    assert term
    assert (term.number, term.skipped) == (2, ((160, 184),))
    skipped = {one.name: one.skipped for one in commits.find(folder.checkpoints)[0]}
    assert skipped == dict.fromkeys(CHECKPOINTS[:4], ()) | dict.fromkeys(CHECKPOINTS[4:], ((160, 184),))
    assert bits(folder, CHECKPOINTS[3]) == bits(unbroken, CHECKPOINTS[3])
    assert bits(folder) != bits(unbroken)
    ticks = [line["images_seen"] for line in events(folder, "tick")]
    assert ticks == [*range(8, 177, 8), *range(192, 241, 8)]  # none of the poisoned step, none of those left out
    files = commits.read(folder.checkpoints / END)
    for part in ("generator", "discriminator", "average", "optimizers"):
        assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load_tensors(files, part).values())


def test_f24_after_three_roll_backs_the_fourth_ends_the_run(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here, unmeasured: None) -> None:
    """a NaN in a weight of a Ray worker at four moments"""
    injected.add(poisoned(88, 120, 168, 208))
    config, folder = settings_of(tiny_run({**ONE_WORKER, "checkpoints.keep": 9}), tmp_path)
    assert gradine("train", config) == 6
    assert gradine.err.count("\n") == 1
    for part in ("NaN or infinity at images_seen=216", "rolled back 3 times", "80 to 96, 120 to 128, 160 to 176",
                 "resume=RESOLUTION branch=new"):
        assert part in gradine.err
    ranges = [(80, 96), (120, 128), (160, 176)]
    assert [(line["first"], line["last"]) for line in events(folder, "roll_back")] == ranges
    assert commits.find(folder.checkpoints)[0][-1].images_seen == 200  # what is there is finite, and stays
    assert gradine("train", config) == 0
    assert commits.describe(folder.checkpoints / END).skipped == tuple(ranges)


# What is kept --------------------------------------------------------------------------------------------------------


MEASURED_LATE = '''
WORTH = {40: 3.0, 80: 2.0, 120: 1.0, 160: 4.0, 200: 5.0, 240: 6.0}  # by images seen

def change(module):
    def evaluate(run, path, threads=1):
        seen = int(path[-9:])
        if seen == 40:
            hold("evaluation")
        assert (Path(path) / "MANIFEST.json").is_file()
        about = {"resolution": 4 if seen < 100 else 8, "images_seen": seen, "checkpoint": Path(path).name, "count": 24}
        return module.Evaluated([{**module.EMPTY, **about, "metric": "swd", "value": -WORTH[seen]},
                                 {**module.EMPTY, **about, "metric": "fd_pixels16", "value": WORTH[seen]}], {})
    module.evaluate = evaluate
CHANGES["gradine.stages.evaluate"] = change
'''


def test_f07_best_and_pinned_checkpoints_stay_and_none_goes_while_it_waits_to_be_measured(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here) -> None:
    """every checkpoint is measured, the first measurement ends after the training; checkpoints.keep is 1"""
    injected.add(MEASURED_LATE)
    config, folder = settings_of(tiny_run({
        **ONE_WORKER, "evaluation.when": "checkpoint", "checkpoints.keep": 1, "checkpoints.best": "fd_pixels16",
        "checkpoints.pin": [CHECKPOINTS[0]]}), tmp_path)
    there: list[str] = []

    def look() -> None:
        injected.reached("evaluation")
        wait_until(lambda: len(events(folder, "stage_end")) == 2, "training ends")
        there.extend(one.name for one in commits.find(folder.checkpoints)[0])
        injected.let_go("evaluation")

    with meanwhile(look):
        assert gradine("train", config) == 0
    assert there == CHECKPOINTS
    measured = events(folder, "evaluation")
    assert [line["checkpoint"] for line in measured] == CHECKPOINTS
    assert not any(line["error"] for line in measured)
    left = [one.name for one in commits.find(folder.checkpoints)[0]]
    assert left == [name for name in CHECKPOINTS if name != "r0008-fade-000000160"]  # 120 is best, 200 the newest


# Checkpoints in an object store --------------------------------------------------------------------------------------


def test_f15_a_run_with_its_checkpoints_in_an_object_store_is_stopped_resumed_branched_and_used(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """SIGTERM to the driver in a fade, with checkpoints.location on a real S3 server"""
    aws(monkeypatch, moto)
    login = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "NO_PROXY"}
    injected.add(f'os.environ.update({login!r})\n' + '''
@before_steps
def stay(state, shares, seen):
    if seen == 120 and first("once"):
        until_asked("step")
''')
    run = tiny_run({**ONE_WORKER, "name": "remote", "checkpoints.location": f"s3://{BUCKET}/checkpoints"})
    config, folder = settings_of(run, tmp_path)

    def stop() -> None:
        injected.reached("step")
        asked_now()

    with meanwhile(stop):
        assert gradine("train", config) == 143
    stopped_at = events(folder, "checkpoint")[-1]
    assert stopped_at["path"].startswith(f"s3://{BUCKET}/checkpoints/remote/r0008-fade-000000")
    assert gradine("train", config) == 0
    assert events(folder, "resume")[-1]["images_seen"] == stopped_at["images_seen"]
    assert bits(folder) == bits(unbroken)
    assert not folder.checkpoints.exists()

    assert gradine("sample", str(folder.path), "--out", str(tmp_path / "samples"), "--count", "2") == 0
    assert gradine("evaluate", str(folder.path)) == 0
    assert {row["checkpoint"][:20] for row in folder.lines("metrics.jsonl")} == {END}
    assert gradine("export", str(folder.path)) == 0
    assert (folder.path / "export" / "generator.pt2").is_file()

    location = commits.location_of(run, folder.path)
    before = commits.find(location)[0]
    faster = replace(run, resume="8", stages=[run.stages[0], replace(run.stages[1], learning_rate=0.01)])
    config, _ = settings_of(faster, tmp_path)
    assert gradine("train", config) == 0
    (branch,) = events(folder, "branch")
    after = {one.name: one for one in commits.find(location)[0]}
    fenced = [one for one in before if one.images_seen > 80]
    assert fenced
    assert not {one.name for one in fenced} & set(after)  # they no longer count, though nothing of them was deleted
    assert [commits.read(one.path) for one in fenced]
    assert [one.images_seen for one in after.values()][-1] == 240
    assert bits(folder) != bits(unbroken)
