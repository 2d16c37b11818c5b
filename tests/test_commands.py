"""The command line as a user meets it: exit codes, one clear line, nothing overwritten."""

from __future__ import annotations

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
