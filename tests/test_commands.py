"""The command line as a user meets it: exit codes, one clear line, nothing overwritten."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gradine.configs.schema import Run, dump
from gradine.pipeline import __main__ as command_line


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
    for command in ("run", "shard", "inspect", "train", "evaluate", "sample", "report", "plan", "preflight", "export"):
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
