"""Runs over several nodes: the bits of one process, whatever is killed and cut.

The run: 4 px holds 0..80; 8 px fades 80..160 and holds to 240, in steps of 8 images with a checkpoint every 40. Of the
cluster's nodes the head has no CPU: every worker is on a node that can be killed without the driver.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gradine.configs.schema import Run
from gradine.pipeline import evaluations
from gradine.pipeline.driver import train
from gradine.pipeline.run_dir import RunDir
from gradine.stages import commits
from tests.injected import Injected, wait_until
from tests.nodes import ROOT, Nodes, cluster
from tests.object_store import Fault, moto, proxy  # noqa: F401 (a fixture)
from tests.test_commits_remote import counting, location, put  # noqa: F401 (a fixture)
from tests.test_faults_runs import CHECKPOINTS, WITHOUT_EVALUATIONS, bits, events, settings_of

pytestmark = pytest.mark.fault
OVER_NODES = {"tick_images": 8, "checkpoints.background": False, "checkpoints.keep": 9,
              "stages.*.workers": 2, "stages.*.placement": "STRICT_SPREAD"}
ONE_PROCESS = {"tick_images": 8, "checkpoints.keep": 9, "stages.*.micro_batch": 4}  # the same sums in the same order
COMMON = WITHOUT_EVALUATIONS + '''
import hashlib, json

def also(module, change):
    earlier = CHANGES.get(module, lambda _: None)
    CHANGES[module] = lambda loaded: (earlier(loaded), change(loaded))

def log_images(loop):
    true_step = loop.train_step
    def train_step(state, shares, moment, *rest):
        seen = true_step(state, shares, moment, *rest)
        shown = [[hashlib.blake2b(image.numpy().tobytes()).hexdigest()[:12] for image in share.reals]
                 for share in shares]
        log = os.open(HERE / "images.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(log, json.dumps({"at": moment.images_seen, "rank": rank(), "shown": shown}).encode() + b"\\n")
        os.close(log)
        return seen
    loop.train_step = train_step

also("gradine.stages.loop", log_images)

def here():
    return os.environ["GRADINE_NODE_IP"]

def is_last():
    return rank() == int(os.environ.get("WORLD_SIZE", 1)) - 1

def stay(moment):
    # tells the test which node came here first, and stays
    if first(f"{moment}-once"):
        (HERE / f"{moment}.node").write_text(here())
        hold(moment)

def grow_at(seen, moment):
    # stays until the driver asks for a stop, as it does to go on with more workers
    if seen == moment and "WORLD_SIZE" not in os.environ and first(f"asked-{moment}"):
        until_asked(f"asked-{moment}")

def before_each_step(function):
    def change(loop):
        true_step = loop.train_step
        def train_step(state, shares, moment, *rest):
            function(moment.images_seen)
            return true_step(state, shares, moment, *rest)
        loop.train_step = train_step
    also("gradine.stages.loop", change)
'''


@pytest.fixture(scope="module")
def whole_cluster() -> Iterator[Nodes]:
    with cluster(0, 2, 2) as nodes:
        yield nodes


@pytest.fixture
def nodes(whole_cluster: Nodes) -> Nodes:
    """A head and two nodes with two CPUs each, whatever the test before did to them."""
    whole_cluster.mend()
    return whole_cluster


@pytest.fixture
def injected(tmp_path: Path) -> Iterator[Injected]:
    faults = Injected(tmp_path / "injected")
    faults.add(COMMON)
    yield faults
    faults.end()


@pytest.fixture(scope="module")
def unbroken(module_run: Callable[..., Run], ray_cluster: Any,
             tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[int, list[list[str]]]]:
    """What one process makes of the run, nothing having happened to it; and the images it was shown."""
    faults = Injected(tmp_path_factory.mktemp("unbroken") / "injected")
    faults.add(COMMON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(faults.folder))
        patch.setattr(evaluations.Evaluations, "start", lambda *_: None)
        folder = train(module_run({**ONE_PROCESS, "name": "unbroken"}), shard_if_needed=False)
    return folder, shown(faults)


def shown(injected: Injected) -> dict[int, list[list[str]]]:
    """By images seen: the images of each micro-batch. A step made again was shown the same."""
    steps: dict[int, dict[int, list[list[str]]]] = {}
    for line in map(json.loads, (injected.folder / "images.jsonl").read_text().splitlines()):
        of_ranks = steps.setdefault(line["at"], {})
        if len(line["shown"]) == 2:  # one worker with both micro-batches
            of_ranks |= {0: line["shown"][:1], 1: line["shown"][1:]}
        else:
            assert of_ranks.setdefault(line["rank"], line["shown"]) == line["shown"], line["at"]
    return {at: [*of_ranks[0], *of_ranks.get(1, [])] for at, of_ranks in sorted(steps.items())}


class Driver:
    """`gradine train` in the head's namespaces, as a job's driver is."""

    def __init__(self, nodes: Nodes, injected: Injected, run: Run) -> None:
        self.nodes, self.injected = nodes, injected
        self.config, self.folder = settings_of(run, injected.folder.parent)
        self.log = self.folder.path.with_suffix(".log")
        self.log.parent.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        path = os.pathsep.join([str(self.injected.folder), str(ROOT)])
        command = ["python", "-m", "gradine.pipeline", "train", self.config]
        self.popen = self.nodes.on_head(*command, log=self.log, PYTHONPATH=path)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        def fulfilled() -> object:
            assert condition() or self.popen.poll() is None, f"the driver ended before {what}"
            return condition()

        wait_until(fulfilled, what)

    def wait_for_retry(self, times: int) -> None:
        self.wait(lambda: len(self.events("retry")) == times, "it goes on")

    def node_at(self, moment: str) -> int:
        """The node that came to `stay(moment)` first."""
        self.wait((self.injected.folder / f"{moment}.reached").exists, f"a worker came to {moment}")
        return self.nodes.node_of((self.injected.folder / f"{moment}.node").read_text())

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.folder, kind)

    def terminate(self) -> None:
        (process,) = psutil.Process(self.popen.pid).children()  # nsenter passes no signals on
        process.terminate()

    def seconds_to_step(self) -> list[float]:
        """From each failure that it saw to the next step."""
        ticks = [line["time"] for line in self.events("tick")]
        return [round(min(tick for tick in ticks if tick > line["time"]) - line["time"], 1)
                for line in self.events("retry")]

    def ended(self) -> int:
        return self.popen.wait(240)


@contextmanager
def started(nodes: Nodes, injected: Injected, run: Run) -> Iterator[Driver]:
    one = Driver(nodes, injected, run)
    try:
        yield one
    finally:
        injected.end()
        print(one.log.read_text())
        if one.popen.poll() is None:  # only after a failure
            for child in psutil.Process(one.popen.pid).children():
                child.kill()
            one.popen.wait()


def assert_parity(driver: Driver, unbroken: Any) -> None:
    """The tensors of every checkpoint, and the images that each step was shown."""
    one, images = unbroken
    for name in CHECKPOINTS:
        assert bits(driver.folder, name) == bits(one, name), name
    assert shown(driver.injected) == images


def test_a_run_over_two_nodes_has_the_bits_of_one_process(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected) -> None:
    with started(nodes, injected, tiny_run({**OVER_NODES, "name": "spread"})) as driver:
        assert driver.ended() == 0
    (group,) = driver.events("group")
    assert sorted(group["nodes"]) == [nodes.address(1), nodes.address(2)]
    assert [Path(line["path"]).name for line in driver.events("checkpoint")] == CHECKPOINTS
    assert_parity(driver, unbroken)
    assert list(unbroken[1]) == list(range(0, 240, 8))
    lines = driver.log.read_text().splitlines()  # of Ray's not one
    assert len(lines) < 60
    assert [line for line in lines if not re.match(r"resume: |report: | +[48]px ", line)] == []


def test_packed_workers_share_a_node_that_has_room_for_them(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected) -> None:
    with started(nodes, injected, tiny_run({**OVER_NODES, "stages.*.placement": "PACK"})) as driver:
        assert driver.ended() == 0
    (group,) = driver.events("group")
    assert group["workers"] == 2
    assert len(set(group["nodes"])) == 1
    assert_parity(driver, unbroken)


# F14: a node is gone -------------------------------------------------------------------------------------------------


AT_EACH_MOMENT = COMMON + '''
@before_each_step
def in_a_phase(seen):
    if seen in (120, 208) and is_last():
        stay({120: "fade", 208: "hold"}[seen])

def at_the_boundary(loop):
    true_state = loop.initial_state
    def initial_state(run, stage, *rest):
        if stage == 1 and is_last():
            stay("boundary")
        return true_state(run, stage, *rest)
    loop.initial_state = initial_state

also("gradine.stages.loop", at_the_boundary)

def in_a_save(commits):
    true_write = commits._write
    def write(path, content):
        if path.name == "average.safetensors" and "000000160" in path.parent.name:
            stay("save")
        return true_write(path, content)
    commits._write = write

CHANGES["gradine.stages.commits"] = in_a_save
'''
MOMENTS = ("boundary", "fade", "save", "hold")  # as the run comes to them


@pytest.mark.parametrize("fewest", [0, 1], ids=["waits-for-the-node", "goes-on-with-one"])
def test_f14_a_run_goes_on_by_itself_whenever_a_node_is_killed(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected, fewest: int) -> None:
    """SIGKILL to a whole worker node between two stages, in a fade, inside a save and in a hold"""
    injected.add(AT_EACH_MOMENT)
    with started(nodes, injected, tiny_run({**OVER_NODES, "stages.*.min_workers": fewest})) as driver:
        for number, moment in enumerate(MOMENTS, 1):
            node = driver.node_at(moment)
            nodes.kill(node)
            if fewest:
                driver.wait_for_retry(number)
            nodes.start(node)
        assert driver.ended() == 0
    print(driver.seconds_to_step())
    assert len(driver.events("retry")) == len(MOMENTS)
    assert {group["workers"] for group in driver.events("group")} == ({1, 2} if fewest else {2})
    assert_parity(driver, unbroken)


MEASURED = COMMON + '''
CHANGES.pop("gradine.pipeline.evaluations")

def change(module):
    def evaluate(run, path, threads=1):
        stay("evaluation")
        seen = int(path[-9:])
        row = {"resolution": 4 if seen == 80 else 8, "images_seen": seen, "checkpoint": Path(path).name}
        return module.Evaluated([{**module.EMPTY, **row, "metric": "swd", "value": 1.0, "count": 24}], {})
    module.evaluate = evaluate

CHANGES["gradine.stages.evaluate"] = change
'''


def test_f14_an_evaluation_whose_node_is_killed_is_made_on_another_one(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected) -> None:
    """SIGKILL to the whole node that an evaluation runs on, beside one of the training's workers"""
    injected.add(MEASURED)
    with started(nodes, injected, tiny_run({**OVER_NODES, "stages.*.min_workers": 1})) as driver:
        nodes.kill(driver.node_at("evaluation"))
        assert driver.ended() == 0
    assert {row["checkpoint"] for row in driver.folder.lines("metrics.jsonl")} == {CHECKPOINTS[1], CHECKPOINTS[-1]}
    assert not any(line["error"] for line in driver.events("evaluation"))
    assert_parity(driver, unbroken)


def held_at(*moments: int) -> str:
    return COMMON + f'''
@before_each_step
def at_a_step(seen):
    if seen in {moments} and is_last():
        stay(str(seen))
'''


def test_f14_after_the_head_is_killed_the_same_command_goes_on_once_it_is_back(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected) -> None:
    """SIGKILL to the whole head node, the driver on it included, while two other nodes are in a fade"""
    injected.add(held_at(136))
    with started(nodes, injected, tiny_run(OVER_NODES)) as driver:
        driver.node_at("136")
        began = {node: nodes.starts(node) for node in (1, 2)}
        nodes.kill(0)
        assert driver.ended() != 0
        nodes.start(0)
        for node, times in began.items():
            nodes.wait_for_starts(node, times + 1)
        driver.start()
        assert driver.ended() == 0
    assert [line["start"] for line in driver.events("resume")] == [None, "r0008-fade-000000120"]
    assert not driver.events("retry")
    assert_parity(driver, unbroken)


# F20: a node is cut off ----------------------------------------------------------------------------------------------


def test_f20_a_run_cut_in_an_all_reduce_goes_on_when_the_node_is_back_by_itself(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected) -> None:
    """the link of a node goes down while the other worker waits in an all-reduce for it, and up when it was missed"""
    injected.add(held_at(136))
    with started(nodes, injected, tiny_run(OVER_NODES)) as driver:
        node = driver.node_at("136")
        times = nodes.starts(node)
        nodes.link(node, up=False)
        injected.let_go("136")
        driver.wait_for_retry(1)
        assert nodes.starts(node) == times
        nodes.link(node, up=True)  # its raylet hears that it was declared dead, ends, and is started again
        nodes.wait_for_starts(node, times + 1)
        assert driver.ended() == 0
    print(driver.seconds_to_step())
    assert len(driver.events("retry")) == 1
    assert [sorted(group["nodes"]) for group in driver.events("group")] == [[nodes.address(1), nodes.address(2)]] * 2
    assert_parity(driver, unbroken)


CUT_IN_A_SAVE = COMMON + '''
@before_each_step
def at_a_step(seen):
    if seen == 184 and (HERE / "save-once").exists():
        stay("hold")
    grow_at(seen, 208)

def in_a_save(commits):
    true_write = commits._write
    def write(path, content):
        if path.name == "HELD" and "000000160" in path.parent.name:
            stay("save")
        return true_write(path, content)
    commits._write = write

CHANGES["gradine.stages.commits"] = in_a_save

def around_a_save(checkpoint):
    true_commit = checkpoint.commit
    def commit(location, name, *rest):
        if name.endswith("160") and "HELD" == "none":
            stay("save")
        try:
            return true_commit(location, name, *rest)
        except BaseException as error:
            (HERE / f"refused-{here()}").write_text(type(error).__name__)
            raise
    checkpoint.commit = commit

CHANGES["gradine.stages.checkpoint"] = around_a_save
'''


@pytest.mark.parametrize(("held", "refused"), [("none", "Fenced"), ("average.safetensors", "FileNotFoundError")],
                         ids=["as-it-begins", "half-written"])
def test_f20_what_a_worker_cut_off_in_a_save_commits_later_does_not_count(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected, held: str, refused: str) -> None:
    """the link of the saving node goes down in the save, which ends while another worker goes on with the run"""
    injected.add(CUT_IN_A_SAVE.replace("HELD", held))
    with started(nodes, injected, tiny_run({**OVER_NODES, "stages.*.min_workers": 1})) as driver:
        node = driver.node_at("save")
        times = nodes.starts(node)
        nodes.link(node, up=False)
        assert driver.node_at("hold") != node  # one worker, after it saved at 160 itself
        injected.let_go("save")
        refusal = injected.folder / f"refused-{nodes.address(node)}"
        driver.wait(refusal.exists, "the late commit is refused")
        nodes.link(node, up=True)
        nodes.wait_for_starts(node, times + 1)
        injected.let_go("hold")
        assert driver.ended() == 0
    assert refusal.read_text() == refused
    assert [group["workers"] for group in driver.events("group")] == [2, 1, 2]  # and at the next checkpoint it is used
    terms = {path.name: json.loads((path / "MANIFEST.json").read_text())["term"]
             for path in driver.folder.checkpoints.glob("r0008*")}
    assert terms["r0008-fade-000000160"] == 2
    assert not [name for name in terms if re.search("-t[0-9]", name)]
    assert_parity(driver, unbroken)


def test_f20_a_commit_held_up_by_a_store_that_was_cut_off_does_not_count_once_another_has_gone_on(
        location: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """connections to the object store that take bytes and answer nothing, from the third file of a save on"""
    first, back = commits.begin_term(location, None), threading.Event()
    put(location, 100, first)
    fault = Fault("silent", hits=lambda number: number >= 3 and not back.is_set(),
                  only=lambda method, path: method == "PUT", seconds=2.0)
    refused: list[str] = []

    def late() -> None:
        with pytest.raises(commits.Fenced, match="term 2 .* has gone on") as error:
            put(location, 200, first)
        refused.append(str(error.value))

    with proxy(moto, fault) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        thread = threading.Thread(target=late)
        thread.start()
        wait_until(lambda: fault.done, "the save hangs")
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
        put(location, 200, commits.begin_term(location, commits.find(location)[0][-1]))
        back.set()
        thread.join(60)
    assert refused
    assert counting(location) == [(100, 1), (200, 2)]


# Nodes that come -----------------------------------------------------------------------------------------------------


def test_a_stage_that_began_on_one_node_takes_the_second_when_it_joins(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected) -> None:
    injected.add(held_at(104) + """    grow_at(seen, 128)
""")
    nodes.kill(2)
    with started(nodes, injected, tiny_run({**OVER_NODES, "stages.*.min_workers": 1})) as driver:
        assert driver.node_at("104") == 1
        nodes.start(2)
        injected.let_go("104")
        assert driver.ended() == 0
    one, two = (group["nodes"] for group in driver.events("group"))
    assert (one, sorted(two)) == ([nodes.address(1)], [nodes.address(1), nodes.address(2)])
    assert not driver.events("retry")
    assert_parity(driver, unbroken)


# F37: others on the same machine -------------------------------------------------------------------------------------


def test_f37_the_end_of_another_run_and_of_its_cluster_touches_nothing_of_this_one(
        unbroken: Any, nodes: Nodes, tiny_run: Callable[..., Run], injected: Injected, ray_cluster: Any,
        tmp_path: Path) -> None:
    """a run killed, one ended by SIGTERM, and their cluster ended, beside this run's and the test's own Ray"""
    injected.add(held_at(136))
    others = Injected(tmp_path / "others")
    others.add(held_at(40))
    with started(nodes, injected, tiny_run({**OVER_NODES, "name": "this"})) as driver:
        driver.node_at("136")
        family = nodes.family()
        with cluster(2) as second, started(second, others, tiny_run({**ONE_PROCESS, "name": "other"})) as other:
            other.node_at("40")
            other.terminate()
            others.let_go("40")
            assert other.ended() == 143
            second.kill(0)
        assert set(family) <= set(nodes.family())
        injected.let_go("136")
        assert driver.ended() == 0
    assert not driver.events("retry")
    assert all(node["Alive"] for node in ray_cluster.nodes())
    assert_parity(driver, unbroken)


def test_f37_nothing_of_gradine_ends_rays_that_it_did_not_start() -> None:
    """none: `ray stop`, and ending processes by their name, occur in no code and no script"""
    files = [path for folder in ("configs", "pipeline", "stages", "infra") for path in (ROOT / folder).rglob("*")
             if path.suffix in (".py", ".sh", ".yaml") or path.name == "Dockerfile"]
    assert len(files) > 40
    for path in files:
        text = re.sub(r"#.*", "", path.read_text())
        assert not re.search(r"\bray[\"', ]+stop\b|\bpkill\b|\bkillall\b", text), path


# The start scripts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environment", "says"), [
    ({"RAY_AUTH_MODE": "disabled"}, "GRADINE_TRUST_NETWORK=1"),
    ({"RAY_AUTH_MODE": "disabled", "GRADINE_NODE_IP": "127.0.0.1", "GRADINE_DASHBOARD_HOST": "0.0.0.0"}, "0.0.0.0"),
    ({"RAY_AUTH_MODE": "on"}, "RAY_AUTH_MODE='on'"),
    ({"RAY_AUTH_TOKEN_PATH": "shared-token"}, "chmod 600"),
    ({"GRADINE_HEAD": "head"}, "GRADINE_HEAD='head'"),
    ({"HOME": "/nonexistent"}, "/nonexistent/.ray/auth_token is missing"),
])
def test_a_node_that_others_could_command_or_that_has_no_head_is_refused(
        tmp_path: Path, environment: dict[str, str], says: str) -> None:
    (tmp_path / "shared-token").write_text("0" * 64)
    (tmp_path / "shared-token").chmod(0o644)
    given = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GRADINE_HEAD": "127.0.0.1:1", **environment}
    done = subprocess.run([ROOT / "infra" / "worker.sh"], env=given, cwd=tmp_path, capture_output=True, text=True,
                          timeout=30)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_head_without_a_token_makes_one_for_its_owner_alone_and_is_ended_by_one_sigterm(tmp_path: Path) -> None:
    """With a `ray` that only notes how it was called."""
    (tmp_path / "ray").write_text('#!/bin/sh\nenv > environment.$$\necho "$@" >> calls\nexec sleep 60\n')
    (tmp_path / "ray").chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "GRADINE_RESTART_S": "0",
             "GRADINE_PORT": "7001", "GRADINE_GPUS": "0"}
    head = subprocess.Popen([ROOT / "infra" / "head.sh", "--disable-x"], env=given, cwd=tmp_path,
                            stderr=subprocess.PIPE, text=True)
    calls = tmp_path / "calls"

    def called(times: int) -> bool:
        assert head.poll() is None, "the script ended"
        return calls.exists() and calls.read_text().count("\n") == times

    wait_until(lambda: called(1), "ray is started")
    for child in psutil.Process(head.pid).children():  # whatever Ray dies of, it is started again
        child.kill()
    wait_until(lambda: called(2), "ray is started again")
    head.terminate()
    _, said = head.communicate(timeout=20)
    assert "starts again in 0 s" in said
    assert "made a token" in said
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert token.read_text() not in said + calls.read_text()
    for option in ("start --head --block", "--port=7001", "--dashboard-host=127.0.0.1", "--num-gpus=0", "--disable-x"):
        assert option in calls.read_text()
    environment = next(tmp_path.glob("environment.*")).read_text().splitlines()
    for line in ("RAY_AUTH_MODE=token", "OMP_NUM_THREADS=1", "RAY_worker_niceness=0", "RAY_USAGE_STATS_ENABLED=0",
                 "RAY_health_check_failure_threshold=3", f"RAY_AUTH_TOKEN_PATH={token}"):
        assert line in environment
