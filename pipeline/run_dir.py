"""The run folder, the only truth: paths, atomic files, the lock, the ledger.

runs/<name>/ config.yaml ledger.jsonl metrics.jsonl lock checkpoints/ samples/ tensorboard/ report.html export/
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradine.configs.schema import UserError


class RunDir:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.superseded = self.path / "superseded"
        self.initial = self.path / "initial"
        self.report = self.path / "report.html"

    @staticmethod
    def existing(path: str | Path) -> RunDir:
        folder = RunDir(path)
        if not folder.config.is_file():
            raise UserError(f"{path} is no run folder: it has no config.yaml. Give one such as runs/NAME.")
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run folder; UserError naming the holder if a live process has it. Freed when the holder dies."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise UserError(f"run folder {self.path} is in use by {lock.read().strip() or 'another process'}. "
                                "Wait for it, stop it, or give this run another name=.") from None
            lock.truncate(0)
            lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
            lock.flush()
            yield

    def record(self, event: str, **facts: Any) -> dict[str, Any]:
        """Appends one line to the ledger."""
        return self.append("ledger.jsonl", {"time": round(time.time(), 3), "event": event, **facts})

    def append(self, file: str, line: dict[str, Any]) -> dict[str, Any]:
        """Appends one line to a .jsonl file; a torn line left by a kill is closed first."""
        with (self.path / file).open("a+b") as out:
            if out.tell() and os.pread(out.fileno(), 1, out.tell() - 1) != b"\n":
                out.write(b"\n")
            out.write(json.dumps(line).encode() + b"\n")
        return line

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Every whole line of a .jsonl file; one torn by a kill in mid-write is left out."""
        path = self.path / file
        parsed = []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            with suppress(ValueError):
                parsed.append(json.loads(line))
        return parsed

    def history(self) -> list[dict[str, Any]]:
        """The ledger as one lineage: what a later resume or branch went back behind is dropped."""
        lineage: list[dict[str, Any]] = []
        for line in self.lines("ledger.jsonl"):
            if line["event"] == "resume":
                lineage = [old for old in lineage if old.get("images_seen", 0) <= line["images_seen"]]
            lineage.append(line)
        return lineage
