"""Clusters of several nodes on one machine: each node in a network namespace of its own, with an address of its own.

A hub namespace holds a bridge; each node's `eth0` is one end of a veth pair whose other end hangs on it. A node runs
infra/head.sh or infra/worker.sh as pid 1 of a pid namespace: SIGKILL to it takes the whole node away at once, as
a power cut would. Nodes share the machine's files, as those of a cluster share a disk. Everything is ended by the pids
and names made here.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.injected import wait_until

ROOT = Path(__file__).parents[1]
PORT = 6379  # of every head: no two are in one namespace
STARTED = "Ray runtime started"
# Soon enough for tests, patient enough for two busy cores: a dead link is seen after 4 x (1 s + 0.5 s).
HEALTH = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
          "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "4"}
_numbers = itertools.count()


def require_namespaces() -> None:
    """Skips where they cannot be made; in CI that is a failure."""
    if os.geteuid():
        lacking = "not root"
    elif missing := [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]:
        lacking = f"no {', '.join(missing)}"
    elif failed := subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], stderr=subprocess.PIPE).stderr:
        lacking = failed.decode().strip()
    else:
        return
    if os.environ.get("CI"):
        pytest.fail(f"network namespaces cannot be made: {lacking}")
    pytest.skip(f"network namespaces cannot be made: {lacking}")


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Nodes:
    """A cluster with a node for each of `cpus`: node 0 is the head, the others join it."""

    def __init__(self, cpus: Sequence[int], **environment: str) -> None:
        require_namespaces()
        self.name = f"gradine-{os.getpid()}-{next(_numbers)}"
        self.folder = Path(tempfile.mkdtemp(prefix="gn-"))  # sockets' paths are short
        self.environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder), "LANG": "C.UTF-8", "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32), "GRADINE_OBJECT_STORE_MB": "150", "GRADINE_RESTART_S": "2",
            **HEALTH, **environment}
        self.cpus = cpus
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.names = [f"{self.name}-hub", *(f"{self.name}-{node}" for node in range(len(cpus)))]
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self.names[0], "link", "add", "bridge", "up", "type", "bridge")
            for node in range(len(cpus)):
                self._plug_in(node)
        except BaseException:
            self.end()
            raise

    def _plug_in(self, node: int) -> None:
        hub, space = self.names[0], self.space(node)
        ip("-n", hub, "link", "add", f"to{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", hub, "link", "set", f"to{node}", "up", "master", "bridge")
        ip("-n", space, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")

    def space(self, node: int) -> str:
        return self.names[1 + node]

    def address(self, node: int) -> str:
        return f"10.231.0.{1 + node}"

    def node_of(self, address: str) -> int:
        return [self.address(node) for node in range(len(self.cpus))].index(address)

    def log(self, node: int) -> str:
        path = self.folder / f"node-{node}.log"
        return path.read_text() if path.exists() else ""

    def start(self, node: int) -> None:
        """Starts a node and waits until it has joined."""
        environment = {**self.environment, "GRADINE_NODE_IP": self.address(node),
                       "GRADINE_CPUS": str(self.cpus[node]), "GRADINE_TEMP_DIR": str(self.folder / str(node))}
        if node == 0:
            command = [str(ROOT / "infra" / "head.sh"), "--include-dashboard=false"]
        else:
            command = [str(ROOT / "infra" / "worker.sh")]
            environment["GRADINE_HEAD"] = f"{self.address(0)}:{PORT}"
        isolated = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
        before = self.starts(node)
        with (self.folder / f"node-{node}.log").open("ab") as log:
            self.processes[node] = subprocess.Popen(
                ["ip", "netns", "exec", self.space(node), *isolated, *command], env=environment, stdout=log, stderr=log,
                start_new_session=True)
        self.wait_for_starts(node, before + 1)

    def starts(self, node: int) -> int:
        """How many times Ray came up on a node."""
        return self.log(node).count(STARTED)

    def wait_for_starts(self, node: int, times: int) -> None:
        wait_until(lambda: self.starts(node) >= times, f"{self.space(node)} joins; its log: {self.log(node)[-1500:]}")

    def first_process(self, node: int) -> int:
        """Pid, on this machine, of what is pid 1 of the node."""
        return psutil.Process(self.processes[node].pid).children()[0].pid

    def family(self) -> list[psutil.Process]:
        """Ray's own processes of all nodes; those of workers come and go."""
        every = [psutil.Process(one.pid).children(recursive=True) for one in self.processes.values()]
        return [process for of_node in every for process in of_node if process.name() in ("raylet", "gcs_server")]

    def kill(self, node: int) -> None:
        """SIGKILL to all of a node at once."""
        os.kill(self.first_process(node), signal.SIGKILL)
        self.processes.pop(node).wait(20)

    def mend(self) -> None:
        """Every link up, every node there."""
        for node in range(len(self.cpus)):
            self.link(node, up=True)
            if node not in self.processes:
                self.start(node)

    def link(self, node: int, up: bool) -> None:
        """Its network link; while it is down nothing gets to it or from it, and no connection is closed."""
        ip("-n", self.names[0], "link", "set", f"to{node}", "up" if up else "down")

    def on(self, node: int, *command: str) -> list[str]:
        """The command line that runs `command` inside a node."""
        return ["nsenter", "--target", str(self.first_process(node)), "--pid", "--mount", "--net", "--", *command]

    def on_head(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A process inside the head's namespaces, as a job's driver is; it dies with the head."""
        with log.open("ab") as out:
            return subprocess.Popen(self.on(0, *command), stdout=out, stderr=out, env={
                **self.environment, "RAY_ADDRESS": f"{self.address(0)}:{PORT}", **environment})

    def end(self) -> None:
        for node in list(self.processes):
            if self.processes[node].poll() is None and psutil.Process(self.processes[node].pid).children():
                self.kill(node)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster(*cpus: int, **environment: str) -> Iterator[Nodes]:
    """Nodes with so many CPUs each, joined one after another."""
    nodes = Nodes(cpus, **environment)
    try:
        for node in range(len(cpus)):
            nodes.start(node)
        yield nodes
    finally:
        nodes.end()


def page(folder: Path) -> str:
    """docs/two-nodes.md: all that a run over two nodes prints, everything new."""
    with cluster(2, 1) as nodes:
        log = folder / "log"
        command = ["run", "smoke", f"runs={folder}/runs", f"data.shards={folder}/shards", "stages.*.workers=2",
                   "stages.*.placement=STRICT_SPREAD"]
        assert nodes.on_head("python", "-m", "gradine.pipeline", *command, log=log).wait(600) == 0, log.read_text()
    lines = [f"$ gradine {' '.join(command)}", *log.read_text().splitlines()]
    text = "".join(f"    {line}\n" for line in lines).replace(str(folder), "/shared")
    return ("# A run on two nodes\n\nThe whole log of the `smoke` recipe on a head with two CPUs and a worker node "
            f"with one, each with an address of its own;\nmade by `python -m tests.nodes`.\n\n{text}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (ROOT / "docs" / "two-nodes.md").write_text(page(Path(temporary)))
