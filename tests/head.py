"""A Ray head of a test's own, as an operator starts one: dashboard, token; its own ports, folder and processes."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.injected import PATIENCE_S, wait_until
from tests.object_store import free_port, tool


@dataclass
class Head:
    url: str  # of the dashboard
    address: str  # of the control service
    token: str
    folder: Path  # Ray's own files
    process: subprocess.Popen[bytes]

    def environment(self, **more: str) -> dict[str, str]:
        """Of a client on another machine: it knows the dashboard and the token."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
        return {**kept, "RAY_API_SERVER_ADDRESS": self.url, "RAY_AUTH_TOKEN": self.token, "NO_PROXY": "127.0.0.1",
                **more}

    def client(self, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        """`gradine ...` there."""
        return subprocess.Popen([sys.executable, "-m", "gradine.pipeline", *arguments], cwd=cwd,
                                env=self.environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def gradine(self, *arguments: str, cwd: Path | None = None, **more: str) -> tuple[int, str, str]:
        """-> its exit code, what it printed, what it complained of"""
        process = self.client(*arguments, cwd=cwd, **more)
        try:
            out, err = process.communicate(timeout=2 * PATIENCE_S)
        finally:
            process.kill()
        return process.returncode, out, err

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def logs(self) -> Path:
        return self.folder / "session_latest" / "logs"


@contextmanager
def started_head(pythonpath: str = "") -> Iterator[Head]:
    port, dashboard, token = free_port(), free_port(), secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # sockets' paths are short
        command = [tool("ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1",
                   "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=4", f"--temp-dir={short}",
                   "--object-store-memory=150000000", "--disable-usage-stats",
                   f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
        environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_worker_niceness": "0",
                       "OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([str(Path(sys.executable).parent),
                                                                        os.environ["PATH"]])}
        if pythonpath:
            environment["PYTHONPATH"] = pythonpath
        log = Path(short) / "head.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token, Path(short), process)
        try:
            def answers() -> bool:
                assert process.poll() is None, log.read_text()[-1000:]
                return head.gradine("status")[0] == 0

            wait_until(answers, "the head answers")
            yield head
        finally:
            family = head.family()
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
