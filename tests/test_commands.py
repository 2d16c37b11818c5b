"""The command line as a user meets it: exit codes, one clear line, nothing overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gradine.configs.schema import EnvironmentFault, Run, UserError, dump
from gradine.pipeline import __main__ as command_line
from gradine.stages import commits
from gradine.stages import evaluate as evaluation


def gradine(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run([sys.executable, "-m", "gradine.pipeline", *arguments], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False)


def refused(*arguments: str, cwd: Path, code: int = 2) -> str:
    """The message of a command that must fail without a traceback."""
    result = gradine(*arguments, cwd=cwd)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("gradine: ")
    return result.stderr


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_takes_less_than_a_second_of_one_core() -> None:
    before = cpu_seconds_of_children()  # not of the clock on the wall: the machine may be busy
    result = gradine("--help")
    assert cpu_seconds_of_children() - before < 1
    assert result.returncode == 0
    assert "kimg" in result.stdout
    for command in ("run", "shard", "inspect", "train", "evaluate", "compare", "sample", "report", "plan", "preflight",
                    "export", "explore"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize(("arguments", "says"), [
    (["run", "dmo"], "did you mean 'demo'?"),
    (["run", "demo", "trainin.seed=1"], "did you mean 'training'?"),
    (["run", "celebahq1024", "data.source=x", "preset=gpu8"], "did you mean 'gpus8'?"),
    (["run", "demo", "stages.1.batch_size=18"], "minibatch-stddev groups of 4"),
    (["run", "demo", "stages.1.workers=3"], "3 workers do not divide"),
    (["run", "demo", "stages.0.resolution=6"], "power of two"),
    (["run", "folder"], "data.source='path/to/images' does not exist"),
    (["run", "demo", "resume=16"], "needs the checkpoint at the end of the 8px stage"),
    (["run", "demo", "stages.*.cpus=64", "stages.*.workers=4", "ray.address=127.0.0.1:1"], "no Ray cluster at"),
    (["shard", "nowhere", "out"], "'nowhere' does not exist"),
    (["shard", "empty", "out"], "holds no image"),
    (["shard", "small", "out", "--resolution", "64"], "smaller than 64x64"),
    (["shard", "small", "out", "--resolution", "48"], "power of two"),
    (["shard", "small", "out", "--resolution", "8", "crop=none"], "not square"),
    (["sample", "nowhere", "--out", "x"], "is no run folder"),
    (["report", "nowhere"], "is no run folder"),
    (["evaluate", "nowhere"], "is no run folder"),
    (["compare", "nowhere", "elsewhere"], "is no run folder"),
])
def test_wrong_input_is_one_clear_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    Image.new("RGB", (20, 16)).save(tmp_path / "small" / "a.png")
    message = refused(*arguments, cwd=tmp_path, code=3 if "no Ray" in says else 2)
    assert says in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.rglob("index.json"))


def test_a_run_folder_held_by_a_live_process_is_refused_by_name(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    run = tiny_run()
    config = tmp_path / "config.yaml"
    config.write_text(dump(run))
    folder = Path(run.runs) / run.name
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"pid {os.getpid()} on here")
        lock.flush()
        assert f"in use by pid {os.getpid()} on here" in refused("train", str(config), cwd=tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["lock"]


# Measuring afterwards -------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_run: Callable[..., Run]) -> Iterator[tuple[Run, Path]]:
    """A run folder with two checkpoints of 4 px and one of 8 px, that a live process holds as a training would."""
    run = tiny_run()
    folder = Path(run.runs) / run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(run))
    for size, seen in ((4, 40), (4, 80), (8, 240)):
        state = json.dumps({"schema": commits.SCHEMA, "resolution": size, "phase": "hold", "images_seen": seen,
                            "stage_end": seen > 40, "masked": [0, 0], "skipped": []}).encode()
        files = [(name, state if name == "state.json" else b"") for name in sorted(commits.FILES)]
        commits.commit(folder / "checkpoints", f"r{size:04d}-hold-{seen:09d}", files)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield run, folder


class Evaluation:
    """Stands for stages.evaluate: remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Run, str]] = []

    def __call__(self, run: Run, path: str, threads: int = 1) -> evaluation.Evaluated:
        self.asked.append((run, Path(path).name))
        row = {"metric": "swd", "value": 2.5, "reason": None, "interval": [2.0, 3.0], "floor": 1.0, "untrained": 9.0,
               "reals": None, "parts": None, "features": None, "features_digest": None, "count": 24, "resolution": 4,
               "checkpoint": Path(path).name, "images_seen": 80, "seed": 0, "data": "c" * 64, "seconds": 0.1}
        return evaluation.Evaluated([row], {"r0004-000000080.png": b"a picture"})


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    stands_in = Evaluation()
    monkeypatch.setattr(evaluation, "evaluate", stands_in)
    return stands_in


def typed(*arguments: object) -> None:
    """Runs a command in this process."""
    command_line.app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_checkpoint_is_measured_while_the_run_trains_and_only_adds_to_its_folder(
        trained: tuple[Run, Path], measuring: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = trained
    told = '{"time": 1.0, "event": "checkpoint", "resolution": 8, "images_seen": 240, "path": "r0008-hold-000000240"}\n'
    (folder / "ledger.jsonl").write_text(told)
    typed("evaluate", folder)
    typed("evaluate", folder, "--stage", 4)
    typed("evaluate", folder, "--checkpoint", "r0004-hold-000000040")
    assert [name for _, name in measuring.asked] == ["r0008-hold-000000240", "r0004-hold-000000080",
                                                     "r0004-hold-000000040"]
    assert [each.evaluation for each, _ in measuring.asked] == [run.evaluation] * 3
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert (folder / "samples" / "r0004-000000080.png").read_bytes() == b"a picture"
    assert (folder / "ledger.jsonl").read_text() == told
    assert "<td class=\"value\">2.5" in (folder / "report.html").read_text()
    assert "4px measured: swd 2.5 (floor 1, untrained 9, 24 images)" in capsys.readouterr().out


def test_what_is_measured_and_of_how_many_can_be_chosen(trained: tuple[Run, Path], measuring: Evaluation) -> None:
    run, folder = trained
    typed("evaluate", folder, "--metrics", "swd,fd", "--features", "pixels,lite0", "--count", 300)
    ((asked, _),) = measuring.asked
    assert asked == replace(run, evaluation=replace(run.evaluation, metrics=["swd", "fd"], features=["pixels", "lite0"],
                                                    count=300))


@pytest.mark.parametrize(("arguments", "says"), [
    (["--metrics", "swd,fid"], "evaluation.metrics='fid' is unknown"),
    (["--features", "litte0"], "evaluation.features='litte0' is unknown; did you mean 'lite0'?"),
    (["--count", 1], "evaluation.count=1 must be at least 2"),
    (["--stage", 16], "has no checkpoint of 16 px. Give --stage with one of: 4, 8."),
    (["--checkpoint", "r0004"], "has no checkpoint 'r0004'"),
    (["--stage", 4, "--checkpoint", "r0004"], "Give one of them")])
def test_a_wrong_wish_is_refused_before_anything_is_measured(
        arguments: list[object], says: str, trained: tuple[Run, Path], measuring: Evaluation) -> None:
    with pytest.raises(UserError) as refusal:
        typed("evaluate", trained[1], *arguments)
    assert says in str(refusal.value)
    assert measuring.asked == []
    assert not (trained[1] / "metrics.jsonl").exists()


def test_a_picture_that_the_disk_does_not_take_is_one_line(trained: tuple[Run, Path], measuring: Evaluation,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    (trained[1] / "samples").write_text("no folder")
    typed("evaluate", trained[1])
    said = capsys.readouterr()
    assert "r0004-000000080.png could not be written" in said.err
    assert said.err.count("\n") == 1
    assert len((trained[1] / "metrics.jsonl").read_text().splitlines()) == 1


def test_on_a_cluster_it_is_measured_by_an_evaluator_with_a_place_of_its_own(
        trained: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch, ray_cluster: Any) -> None:
    killed: list[Any] = []
    true_kill = ray_cluster.kill
    monkeypatch.setattr(ray_cluster, "kill", lambda actor: (killed.append(actor), true_kill(actor)))
    with pytest.raises(EnvironmentFault, match="r0008-hold-000000240 could not be measured at somewhere: Damaged"):
        typed("evaluate", trained[1], "--address", "somewhere")  # Ray is joined already; state.json has no settings
    assert len(killed) == 1
    assert not (trained[1] / "metrics.jsonl").exists()


def test_a_place_that_no_node_of_the_cluster_has_is_refused_at_once(
        trained: tuple[Run, Path], ray_cluster: Any) -> None:
    run, folder = trained
    (folder / "config.yaml").write_text(dump(replace(run, evaluation=replace(run.evaluation, cpus=99.0))))
    with pytest.raises(EnvironmentFault, match=r"no node at somewhere has evaluation\.cpus=99"):
        typed("evaluate", folder, "--address", "somewhere")


def test_compare_prints_a_table_or_json(trained: tuple[Run, Path], measuring: Evaluation, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    typed("evaluate", trained[1], "--stage", 4)
    shutil.copytree(trained[1], tmp_path / "other")
    capsys.readouterr()
    typed("compare", trained[1], tmp_path / "other")
    assert "2.5 [2 to 3]" in capsys.readouterr().out
    typed("compare", trained[1], tmp_path / "other", "--json", "--checkpoint", "r0004-hold-000000080")
    assert json.loads(capsys.readouterr().out)["resolution"] == 4


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(command_line, "app", fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT,
                                    errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("path", ["/disk/a", None])
def test_a_fault_of_a_disk_or_of_rights_is_one_line_and_exit_3(
        number: int, path: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(OSError(number, os.strerror(number), path), monkeypatch)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("gradine: ", os.strerror(number), path or "", "the same command then goes on"):
        assert part in said
    assert "None" not in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_lack_of_rights_names_the_path_and_who_lacks_them(
        number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(OSError(number, os.strerror(number), "/disk/a"), monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(SystemExit):
        command_line.main()
    assert "gradine: /disk/a: uid 4711 lacks the right" in capsys.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("no errno"),
                                   IsADirectoryError(errno.EISDIR, "Is a directory", "x")])
def test_an_error_of_ours_is_not_passed_off_as_one_of_the_disk(
        error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(error, monkeypatch)
    with pytest.raises(type(error)) as caught:
        command_line.main()
    assert caught.value is error
