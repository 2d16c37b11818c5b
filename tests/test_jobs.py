"""Runs as jobs: what is sent, what comes back, who is let in. The cluster is a real head with dashboard and token."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import gradine as product
from gradine.configs.schema import EnvironmentFault, Run, UserError, dump, load
from gradine.pipeline import __main__ as command_line
from gradine.pipeline import cluster, driver, evaluations, jobs
from gradine.pipeline.run_dir import RunDir
from tests.head import Head, started_head
from tests.injected import Injected
from tests.object_store import tool

ROOT = Path(__file__).parents[1]
TENSORS = [f"{part}.safetensors" for part in ("generator", "discriminator", "average", "optimizers")]
TWO_WORKERS = {"tick_images": 8, "stages.*.workers": 2, "stages.*.cpus": 0.5}
HELD = '''
CHANGES["gradine.pipeline.evaluations"] = without_evaluations

@before_steps
def stay(state, shares, seen):
    import gradine
    (HERE / "imported").write_text(gradine.__file__)
    if seen == 120 and rank() == 0 and first("asked"):
        until_asked("120")
'''
FAILING = '''
CHANGES["gradine.pipeline.evaluations"] = without_evaluations

@before_steps
def fail(state, shares, seen):
    if seen >= 40:
        raise RuntimeError("injected")
'''


# What is sent -------------------------------------------------------------------------------------------------------


def in_the_repository() -> list[str]:
    """What a clone of this very state holds."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_symlink() or (ROOT / name).exists()]


def clone(folder: Path) -> Path:
    for name in in_the_repository():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def test_a_job_brings_all_of_gradine_as_real_files_and_the_users_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    sent = tmp_path / "sent"
    assert jobs.pack(tmp_path / "mine.yaml", sent) == "config/mine.yaml"
    wanted = {f"gradine/{name.removeprefix('gradine/')}" for name in in_the_repository()
              if name.split("/")[0] in ("configs", "pipeline", "stages", "gradine") and not (ROOT / name).is_symlink()}
    assert {str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()} == {*wanted, "config/mine.yaml"}
    assert not [path for path in sent.rglob("*") if path.is_symlink()]
    assert (sent / "gradine" / "stages" / "loop.py").read_bytes() == (ROOT / "stages" / "loop.py").read_bytes()
    assert (sent / "config" / "mine.yaml").read_text() == "name: mine\n"


def test_a_bundled_recipe_is_sent_by_its_name(tmp_path: Path) -> None:
    assert jobs.pack(jobs.find_recipe("smoke"), tmp_path / "sent") == "smoke"
    assert not (tmp_path / "sent" / "config").exists()
    assert jobs.pack(jobs.find_recipe("lectures/dcgan"), tmp_path / "again") == "lectures/dcgan"
    assert (tmp_path / "again" / "gradine" / "configs" / "lectures" / "dcgan.yaml").is_file()


def test_of_what_lies_around_gradine_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "gradine"  # as an installed wheel has it: real folders
    shutil.copytree(Path(product.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    for name in (".env", ".git/config", ".venv/lib/x.py", "configs/.netrc", "configs/id_rsa", "configs/key.pem",
                 "runs/mine/config.yaml", "pipeline/__pycache__/x.pyc", "stages/weights.safetensors", "shards/1.zip"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("secret")
    monkeypatch.setattr(product, "__file__", str(copy / "__init__.py"))
    jobs.pack(jobs.find_recipe("smoke"), tmp_path / "sent")
    assert {str(path.relative_to(tmp_path / "sent" / "gradine")) for path in (tmp_path / "sent").rglob("*")
            if path.is_file()} == before
    (copy / "configs" / "photographs.zip").write_bytes(bytes(5_000_000))
    with pytest.raises(UserError, match=r"more than 5; the biggest file is gradine/configs/photographs.zip"):
        jobs.pack(jobs.find_recipe("smoke"), tmp_path / "again")


PLACED = ["runs=/shared/runs", "data.shards=s3://bucket/smoke"]


@pytest.mark.parametrize(("settings", "named"), [
    ([], "runs='runs', data.shards='shards/smoke': relative"),
    ([*PLACED, "data.source=photos"], "data.source='photos': relative"),
    ([*PLACED, "checkpoints.location=kept"], "checkpoints.location='kept': relative"),
    ([*PLACED, "init_from=runs/old"], "init_from='runs/old': relative"),
    ([*PLACED, "data.cache_dir=cache"], "data.cache_dir='cache': relative")])
def test_a_path_that_means_nothing_on_the_nodes_is_refused_before_anything_is_sent(
        settings: list[str], named: str) -> None:
    with pytest.raises(UserError) as refused:
        jobs.submit("smoke", settings, [], "http://127.0.0.1:1", False)
    assert named in str(refused.value)
    assert "/shared/" in str(refused.value)


def test_paths_that_hold_anywhere_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match="no answer from a Ray dashboard at http://127.0.0.1:1: .*refused"):
        jobs.submit("smoke", [*PLACED, "data.cache_dir=~/cache"], [], "127.0.0.1:1", False)


def test_inside_a_job_a_run_folder_that_ray_would_delete_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("smoke")
    driver.absolute(run)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
    with pytest.raises(UserError, match="runs='runs', data.shards='shards/smoke': relative, and a job's working"):
        driver.absolute(run)
    driver.absolute(replace(run, runs="/shared/runs", data=replace(run.data, shards="/shared/x", source="photos")))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {}}}))
    driver.absolute(run)  # a job in a folder of its owner's


def test_a_secret_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hunter2-and-more")
    for setting in ("data.source=https://host/a.zip?signature=abcdef", "data.source=s3://hunter2-and-more/x"):
        with pytest.raises(UserError, match="data.source holds a secret") as refused:
            jobs.submit("smoke", [*PLACED, setting], [], "http://127.0.0.1:1", False)
        assert "abcdef" not in str(refused.value)
        assert "hunter2" not in str(refused.value)


class Taking:
    """A job server that takes a job at the third try."""

    def __init__(self, refusals: list[str]) -> None:
        self.refusals = refusals
        self.taken: dict[str, Any] = {}

    def submit_job(self, **job: Any) -> str:
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        self.taken = job
        return str(job["submission_id"])


def test_a_job_carries_its_name_its_time_to_stop_and_the_submitters_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        client = Taking(["No available agent to submit job", "Job with submission_id x already exists"])
        run = replace(load("smoke"), name="zwei Wörter", ray=replace(load("smoke").ray, grace_s=100.5))
        job = jobs.accepted(client, run, "command", "/folder", True)
        assert re.fullmatch(r"gradine-zwei-W-rter-\d{8}-\d{6}", job)
        assert client.taken["metadata"]["gradine_run"] == "zwei Wörter"
        variables = client.taken["runtime_env"]["env_vars"]
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 100.5 + 10
        there = subprocess.run(["date", "+%z"], env={"TZ": variables["TZ"]}, capture_output=True, text=True).stdout
        assert there.strip() == "+0530"
        jobs.accepted(client, run, "command", "/folder", False)
        assert "TZ" not in client.taken["runtime_env"]["env_vars"]
        with pytest.raises(RuntimeError, match="disk full"):
            jobs.accepted(Taking(["disk full"]), run, "command", "/folder", False)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(("zone", "winter", "summer"), [
    ("Europe/Berlin", "+0100", "+0200"), ("Asia/Kolkata", "+0530", "+0530"), ("America/New_York", "-0500", "-0400"),
    (":Europe/Berlin", "+0100", "+0200"), ("<-03>3", "-0300", "-0300"), ("UTC0", "+0000", "+0000")])
def test_the_submitters_clock_needs_no_zone_database_and_knows_summer(
        zone: str, winter: str, summer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    sent = {"TZ": jobs.clock(), "TZDIR": "/nowhere"}  # where a C library would look for names
    for day, offset in (("2027-01-15", winter), ("2027-07-15", summer)):
        unix = int(subprocess.run(["date", "-u", "-d", day, "+%s"], capture_output=True, text=True).stdout)
        there = subprocess.run(["date", "-d", f"@{unix}", "+%z"], env=sent, capture_output=True, text=True)
        assert there.stdout.strip() == offset, sent


def test_what_this_disk_refuses_is_not_told_of_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])

    monkeypatch.setattr(jobs.shutil, "copytree", full)
    with pytest.raises(EnvironmentFault, match="on this machine: .*No space left on device.* TMPDIR") as told:
        jobs.submit("smoke", PLACED, [], "http://127.0.0.1:1", False)
    assert "dashboard" not in str(told.value)


@pytest.mark.parametrize("error", [KeyError("ours"), RuntimeError("ours"), OSError(28, "No space left on device")])
def test_an_error_of_our_own_is_not_told_of_a_dashboard(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "refuse_silence", lambda _: None)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda url: url)
    with pytest.raises(type(error)) as told, jobs.asking("http://127.0.0.1:1"):
        raise error
    assert told.value is error


def test_the_options_of_run_are_passed_on_and_a_wrong_time_is_refused_here(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passed: list[list[str]] = []
    monkeypatch.setattr(jobs, "submit", lambda config, settings, options, *_: passed.append(options) or 7)

    def gradine(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gradine", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return int(ended.value.code or 0)

    assert gradine("submit", "smoke", "a=1", "--until", "06:00", "--queue", "--take-over", "--detach") == 7
    assert gradine("submit", "smoke") == 7
    assert passed == [["--until", "06:00", "--queue", "--take-over"], []]
    assert gradine("submit", "smoke", "--until", "6 o'clock") == 2
    assert "is no time of day" in capsys.readouterr().err
    gradine("run", "--help")
    known = capsys.readouterr().out
    assert all(option in known for option in passed[0] if option.startswith("--"))


# What is heard ------------------------------------------------------------------------------------------------------


def state(status: str, code: int | None = None, message: str = "", name: str = "smoke", entry: str = "") -> Any:
    return SimpleNamespace(
        status=SimpleNamespace(value=status, is_terminal=lambda: status not in ("PENDING", "RUNNING")), message=message,
        driver_exit_code=code, submission_id=f"gradine-{name}-1", metadata={"gradine_run": name} if name else None,
        entrypoint=entry, start_time=0)


class Breaking:
    """A job server whose log stream breaks in the middle of a line, and never tells of the end."""

    def __init__(self, log: str, cuts: list[int]) -> None:
        self.log, self.cuts, self.asked = log, cuts, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        cut = self.cuts.pop(0) if self.cuts else len(self.log) - 9  # the tail lags
        for start in range(0, cut, 7):
            yield self.log[start:min(start + 7, cut)]
        raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_logs(self, job: str) -> str:
        return self.log

    def get_job_info(self, job: str) -> Any:
        self.asked += 1
        if self.asked % 2:
            raise ConnectionError("reset")
        return state("FAILED" if self.asked >= 8 else "RUNNING", 5)


def test_a_log_whose_stream_breaks_is_shown_whole_and_once(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    log = "".join(f"line {n}\n" for n in range(20))
    info = asyncio.run(jobs.follow(Breaking(log, [30, 15, 60]), "job"))
    assert capsys.readouterr().out == log
    assert jobs.exit_code(info) == 5
    asyncio.run(jobs.follow(Breaking(log, [30, 15, 60]), "job", shown=40))
    assert capsys.readouterr().out == log[40:]


def test_a_log_that_has_been_told_to_its_end_is_not_fetched_again(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    begun = []

    class Ending(Breaking):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            begun.append(job)
            yield self.log

    asyncio.run(jobs.follow(Ending("all of it\n", []), "job"))
    assert begun == ["job"]
    assert capsys.readouterr().out == "all of it\n"


@pytest.mark.parametrize(("info", "code"), [
    (state("SUCCEEDED", 0), 0), (state("FAILED", 2), 2), (state("FAILED", 6), 6), (state("FAILED", -9), 137),
    (state("FAILED", 137), 137), (state("STOPPED"), 143), (state("FAILED", None, "no node left"), 3)])
def test_the_exit_code_is_the_runs_own(info: Any, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.outcome(info) == code
    if code == 3:
        assert capsys.readouterr().err == "gradine: gradine-smoke-1 could not run to its end: no node left\n"


@pytest.mark.parametrize(("log", "says"), [
    ("   16px stopped at 1,234 images\nstopped by SIGTERM; the same command goes on\n", "a checkpoint at 1,234 images"),
    ("no checkpoint within ray.grace_s=1; the last one stands\nstopped by SIGTERM; the same command goes on\n",
     "stopped without a new checkpoint"),
    ("SIGTERM: writing a checkpoint, then ending\n", "ended without its last words")])
def test_of_a_stop_it_is_said_whether_a_checkpoint_came_of_it(log: str, says: str) -> None:
    assert says in jobs.became(log)


def test_only_gradines_own_jobs_are_seen() -> None:
    ours = [state("RUNNING", name="a"), state("RUNNING", name="b"),
            state("RUNNING", name="", entry="python -m gradine.pipeline run smoke")]
    others = [state("RUNNING", name="", entry=entry) for entry in ("python train.py", "gradinevil run x", "ls gradine")]
    client = SimpleNamespace(list_jobs=lambda: [*others, *ours], get_address=lambda: "http://head:8265")
    assert jobs.jobs_of(client) == ours
    assert jobs.jobs_of(client, "b") == ours[1:2]
    assert jobs.jobs_of(client, "gradine-a-1") == ours[:1]
    with pytest.raises(UserError, match="no job of a run 'c', .* There are jobs of: -, a, b"):
        jobs.jobs_of(client, "c")
    with pytest.raises(UserError, match="There is no job of gradine's at all"):
        jobs.jobs_of(SimpleNamespace(list_jobs=lambda: others, get_address=lambda: "http://head:8265"), "a")


@pytest.mark.parametrize(("address", "variables", "url"), [
    ("", {}, "http://127.0.0.1:8265"),
    ("head:8265", {}, "http://head:8265"),
    ("https://ray.example/cluster/", {}, "https://ray.example:443/cluster"),
    ("", {"RAY_ADDRESS": "head:6379"}, "http://127.0.0.1:8265"),
    ("", {"RAY_ADDRESS": "http://head:9000"}, "http://head:9000"),
    ("", {"RAY_ADDRESS": "http://head:9000", "RAY_API_SERVER_ADDRESS": "http://[::1]:1"}, "http://[::1]:1"),
    ("http://mine:1", {"RAY_ADDRESS": "http://head:9000", "RAY_API_SERVER_ADDRESS": "http://api:1"}, "http://mine:1")])
def test_the_address_on_the_command_line_counts_before_those_of_the_environment(
        address: str, variables: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert jobs.job_server(address) == url


@pytest.mark.parametrize("address", ["ftp://head:21", "http://head:port", "http://me:secret@head:8265", "http://:1"])
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not the address of a Ray dashboard. Use one such as") as refused:
        jobs.job_server(address)
    assert "secret" not in str(refused.value)


def test_without_rays_job_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gradine\[cluster\]'"):
        jobs.status("", "")


# Who is let in ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without a token, and an environment that says nothing; Ray as if it were not imported yet."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    (tmp_path / ".ray").mkdir()
    return tmp_path


@pytest.mark.parametrize(("address", "variables", "let_in"), [
    ("10.0.0.1:6379", {}, False), ("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"}, False), ("auto", {}, False),
    ("head:6379", {}, False), ("ray://10.0.0.1:10001", {}, False), ("[2001:db8::1]:6379", {}, False),
    ("10.0.0.1:6379", {"RAY_AUTH_TOKEN": "t"}, True), ("10.0.0.1:6379", {"RAY_AUTH_MODE": "Token",
                                                                          "RAY_AUTH_TOKEN": "t"}, True),
    ("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t"}, False),
    ("127.0.0.1:6379", {}, True), ("127.0.0.2:6379", {"RAY_AUTH_MODE": "disabled"}, True), ("localhost:1", {}, True),
    ("[::1]:6379", {}, True), ("", {}, True), ("", {"RAY_AUTH_MODE": "token"}, True),
    ("", {"RAY_AUTH_MODE": "disabled"}, False)])
def test_a_ray_that_others_reach_is_used_with_a_token_or_by_an_explicit_word(
        address: str, variables: dict[str, str], let_in: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if let_in:
        cluster.refuse_open(address, trusted=False)
    else:
        with pytest.raises(UserError, match="or (set )?ray.trust_network=true if nobody else"):
            cluster.refuse_open(address, trusted=False)
    cluster.refuse_open(address, trusted=True)


@pytest.mark.parametrize("named", [False, True])
def test_a_token_file_that_others_can_read_is_refused_and_a_private_one_turns_token_mode_on(
        named: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / ("elsewhere" if named else ".ray/auth_token")
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
        with pytest.raises(UserError, match=f"there is no token: RAY_AUTH_TOKEN is empty, {file} is no file"):
            cluster.take_token()
    file.write_text("t" * 64)
    for rights in (0o644, 0o640, 0o604, 0o660):
        file.chmod(rights)
        with pytest.raises(UserError, match=f"has mode {rights:o}: .* Run: chmod 600 {file}"):
            cluster.take_token()
    file.chmod(0o600)
    assert cluster.take_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")  # then Ray does not read the file
    assert cluster.take_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not cluster.take_token()


def test_token_mode_without_a_token_is_refused_in_a_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cluster.take_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match="token mode is on, and there is no token"):
        cluster.take_token()


# On a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injected]:
    """Each test may put other faults into the processes that the cluster starts from then on."""
    injected = Injected(tmp_path_factory.mktemp("injected") / "here")
    yield injected
    injected.end()


@pytest.fixture(scope="module")
def head(faults: Injected) -> Iterator[Head]:
    with started_head(str(faults.folder)) as one:
        yield one


@pytest.fixture
def injected(faults: Injected) -> Iterator[Injected]:
    for left in faults.folder.iterdir():
        left.unlink()
    yield faults
    for left in faults.folder.iterdir():
        left.unlink()


def settings_of(run: Run, folder: Path) -> tuple[str, RunDir]:
    """The run as a configuration file of its user, and its folder."""
    config = folder / f"{run.name}.yaml"
    config.write_text(dump(run))
    return str(config), driver.run_folder(run)


def bits(folder: RunDir) -> dict[str, bytes]:
    """Every tensor of the last checkpoint."""
    last = sorted(folder.checkpoints.glob("r0008-hold-000000240*"))[-1]
    return {name: (last / name).read_bytes() for name in TENSORS}


def answer(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def newest_package(head: Head) -> list[Path]:
    """The files of the job that came last, as a node unpacked them."""
    unpacked = head.folder / "session_latest" / "runtime_resources" / "working_dir_files"
    newest = max((path for path in unpacked.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return [path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def uploaded_bytes(head: Head) -> list[int]:
    """The size of each package, as the node that fetched it measured it."""
    logs = "".join(log.read_text() for log in head.logs().glob("runtime_env_setup-*.log"))
    return [int(size) for size in re.findall(r"Added URI gcs://\S+ with size (\d+)", logs)]


def refuse_installs(head: Head) -> None:
    """Nothing that a package manager did, in the log of the agent that prepares nodes for jobs, or on their disk."""
    logs = "".join(log.read_text() for log in head.logs().glob("runtime_env_*.log"))
    assert "Successfully created runtime env" in logs
    assert not re.findall(r"(?i)\b(pip|uv|conda|virtualenv|venv)\b(?!\.whl).{0,40}(install|create|creating|sync)", logs)
    assert not re.findall(r'"(pip|uv|conda|py_modules)":', logs), "asked for by a job"
    made = head.folder / "session_latest" / "runtime_resources"
    for manager in ("pip", "uv", "conda", "py_modules_files"):
        assert not list((made / manager).glob("*")), manager


@pytest.mark.slow
def test_a_submitted_run_is_waited_for_and_runs_the_code_of_its_submitter(
        head: Head, injected: Injected, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    injected.add(HELD.replace("seen == 120", "False"))
    config, folder = settings_of(tiny_run(TWO_WORKERS), tmp_path)
    checkout = clone(tmp_path / "clone")
    version = checkout / "gradine" / "__init__.py"
    version.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.1+mine"', version.read_text()))
    code, out, err = head.gradine("submit", config, "name=renamed", cwd=checkout)
    assert code == 0, out + err
    assert "resume: from nothing" in out
    assert re.search(r"gradine-renamed-\d+-\d+ succeeded, exit 0$", out.strip())
    folder = RunDir(folder.path.parent / "renamed")
    (start,) = [line for line in folder.lines("ledger.jsonl") if line["event"] == "start"]
    assert start["gradine"] == "0.0.1+mine"
    assert start["command"].endswith("run config/tiny.yaml name=renamed")
    assert "working_dir_files" in (injected.folder / "imported").read_text()
    assert not [path for path in newest_package(head) if path.parts[0] not in ("gradine", "config")]
    assert max(uploaded_bytes(head)) < 5_000_000
    refuse_installs(head)
    assert re.search(r"renamed +gradine-renamed-\S+ +succeeded .* exit 0", head.gradine("status", "renamed")[1])


@pytest.mark.slow
@pytest.mark.fault
def test_f15_a_run_stopped_as_a_job_and_submitted_again_ends_with_the_bits_of_the_unbroken_one(
        head: Head, injected: Injected, tiny_run: Callable[..., Run], ray_cluster: Any, tmp_path: Path) -> None:
    """Ctrl-C to the client that waits, a second submit of the same run, then `gradine stop`, then submit again"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations.Evaluations, "start", lambda *_: None)
        unbroken = driver.train(tiny_run({**TWO_WORKERS, "name": "unbroken"}), shard_if_needed=False)
    injected.add(HELD)
    config, folder = settings_of(tiny_run({**TWO_WORKERS, "name": "broken"}), tmp_path)
    client = head.client("submit", config)
    injected.reached("120")
    client.send_signal(signal.SIGINT)
    out, err = client.communicate(timeout=60)
    assert client.returncode == 130, err
    (job,) = set(re.findall(r"gradine-broken-\d+-\d+", out))
    assert f"{job} goes on without this terminal" in out
    for way in (f"gradine logs {job} --follow", f"gradine stop {job}", "gradine status"):
        assert way in out
    assert not err

    code, out, err = head.gradine("submit", config)
    assert code == 2, out + err
    assert "is in use by pid" in out
    shown = head.gradine("status")[1]
    assert re.search(rf"broken +{job} +running +\d{{4}}-\S+ \S+ +\d+ .* left$", shown, re.MULTILINE), shown
    assert re.search(r"broken +gradine-\S+ +failed .* exit 2: gradine: ", shown), shown

    code, out, err = head.gradine("stop", job)
    assert code == 0, err
    (seen,) = re.findall(r"stopped with a checkpoint at (\d+) images; .* \(exit 143\)", out)
    assert 120 < int(seen) <= 144
    assert "SIGTERM" in head.gradine("logs", job)[1]
    again = head.gradine("stop", "broken")
    assert again[0] == 0
    assert "runs no more" in again[1]

    code, out, err = head.gradine("submit", config, "--detach")
    assert code == 0, err
    assert out.count("gradine ") == 3
    (job,) = set(re.findall(r"gradine-broken-\d+-\d+", out))
    assert f"resume: from r0008-fade-{int(seen):09d}" in head.gradine("logs", job, "--follow")[1]
    assert bits(folder) == bits(unbroken)


@pytest.mark.slow
@pytest.mark.fault
def test_f23_a_job_whose_run_fails_again_and_again_ends_with_the_runs_own_exit_code(
        head: Head, injected: Injected, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    """a step that raises in every attempt of a submitted run"""
    injected.add(FAILING)
    config, _ = settings_of(tiny_run({"tick_images": 8, "name": "looping"}), tmp_path)
    code, out, err = head.gradine("submit", config)
    assert code == 5, out + err
    assert out.strip().endswith("failed, exit 5")
    assert re.search(r"looping .* failed .* exit 5: gradine: ", head.gradine("status", "looping")[1])


@pytest.mark.slow
def test_from_a_bare_clone_rays_own_client_runs_it_and_installs_nothing(
        head: Head, injected: Injected, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    injected.add(HELD.replace("seen == 120", "False"))
    checkout = clone(tmp_path / "clone")
    for name in (".git/config", ".venv/lib/x.py", "runs/old/config.yaml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("stays")
    config, folder = settings_of(tiny_run({"tick_images": 8, "name": "bare"}), tmp_path)

    def submitted(*command: str) -> str:
        done = subprocess.run(
            [tool("ray"), "job", "submit", "--address", head.url, "--working-dir", ".", "--",
             "python", "-m", "gradine.pipeline", *command],
            cwd=checkout, env=head.environment(RAY_AUTH_MODE="token"), capture_output=True, text=True, timeout=240)
        return done.stdout + done.stderr

    out = submitted("run", config)
    assert "succeeded" in out, out
    assert "end" in [line["event"] for line in folder.lines("ledger.jsonl")]
    assert "working_dir_files" in (injected.folder / "imported").read_text()
    sent = newest_package(head)
    assert Path("gradine/stages/loop.py") in sent
    assert not {path.parts[0] for path in sent} & {".git", ".venv"}
    assert Path("runs/old/config.yaml") not in sent
    assert max(uploaded_bytes(head)) < 5_000_000
    refuse_installs(head)
    assert "gradine: runs='runs', data.shards='shards/smoke': relative, and a job's" in submitted("run", "smoke")


@pytest.mark.fault
def test_f36_the_dashboard_and_the_jobs_answer_only_to_the_right_token(head: Head) -> None:
    """no token, a wrong one and the right one, to each page that tells or does anything"""
    for page in ("/api/jobs/", "/api/version", "/api/cluster_status", "/nodes?view=summary", "/api/v0/tasks",
                 "/logical/actors"):
        assert answer(head.url + page, None) == 401, page
        assert answer(head.url + page, "wrong") == 403, page
        assert answer(head.url + page, head.token) == 200, page
    for token, says in (("", "wants a token"), ("wrong", "refuses this token")):
        for command in (["status"], ["stop", "x"], ["submit", "smoke", "runs=/x", "data.shards=/x"]):
            code, out, err = head.gradine(*command, RAY_AUTH_TOKEN=token, HOME=str(head.folder))
            assert (code, out) == (2, ""), err
            assert err.startswith(f"gradine: the cluster at {head.url} {says}. Put its token into RAY_AUTH_TOKEN")
            assert err.count("\n") == 1


@pytest.mark.fault
def test_f36_what_a_head_opens_beyond_this_machine_wants_the_token(head: Head) -> None:
    """every port that the processes of a head listen on, asked without a token"""
    open_ports = {(process.name(), at.laddr.ip.removeprefix("::ffff:"), at.laddr.port) for process in head.family()
                  for at in process.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    dashboard = int(head.url.rpartition(":")[2])
    assert {ip for _, ip, port in open_ports if port == dashboard} == {"127.0.0.1"}
    told = []
    for name, ip, port in sorted(open_ports):
        try:
            status = answer(f"http://{'127.0.0.1' if ip in ('::', '0.0.0.0') else ip}:{port}/api/jobs/", None)
        except (OSError, http.client.HTTPException):  # gRPC
            continue
        if status != 401:
            told.append((name, ip, port, status))
    assert len(told) <= 1, told  # the exporter of figures, for Prometheus
    for _, _, port, _ in told:
        assert answer(f"http://127.0.0.1:{port}/metrics", None) == 200
    assert {ip for _, ip, _ in open_ports} - {"127.0.0.1"}, "and yet Ray's own services do listen for other nodes"


@pytest.mark.fault
def test_f36_a_run_joins_no_cluster_with_a_wrong_token_and_starts_none_without_one(head: Head, tmp_path: Path) -> None:
    """`gradine train` on a cluster with the wrong token, and with Ray's authentication switched off"""
    placed = (f"runs={tmp_path}/runs", f"data.shards={tmp_path}/shards")
    code, _, err = head.gradine("run", "smoke", *placed, f"ray.address={head.address}", RAY_AUTH_TOKEN="wrong")
    assert code == 3
    assert "does not let us join" in err.splitlines()[-1]
    code, _, err = head.gradine("run", "smoke", *placed, RAY_AUTH_MODE="disabled")
    assert code == 2
    assert err.startswith("gradine: RAY_AUTH_MODE=disabled: the control service of a Ray started here listens on all")
    code, _, err = head.gradine("run", "smoke", *placed, "ray.address=192.0.2.1:6379", RAY_AUTH_MODE="disabled")
    assert code == 2
    assert "joined without a token" in err
