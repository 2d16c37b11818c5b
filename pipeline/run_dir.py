"""The run folder, the only truth: paths, atomic files, the lock, the ledger.

runs/<name>/ config.yaml ledger.jsonl metrics.jsonl lock checkpoints/ samples/ tensorboard/ report.html export/

Lines of the .jsonl files that a full or failing disk does not take wait in memory, and go before the next ones.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradine.configs.schema import EnvironmentFault, UserError, redacted
from gradine.pipeline import lock
from gradine.stages.store import write_atomic

PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # a disk may recover from these
RIGHTS = {errno.EROFS, errno.EACCES}  # someone may mend these; a run that had them from the start cannot begin
MOST_WAITING = 10_000  # lines per file, some 4 MB: a tick a second for almost three hours


def warn(line: str) -> None:
    print(f"gradine: {line}", file=sys.stderr, flush=True)


class RunDir:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.initial = self.path / "initial"
        self.report = self.path / "report.html"
        self.tell: Callable[[str], None] = warn  # how a person hears of a disk that fails, and that it works again
        self.journals: dict[str, Journal] = {}
        self.began = False  # this process has added a line

    @staticmethod
    def existing(path: str | Path) -> RunDir:
        folder = RunDir(path)
        if not folder.config.is_file():
            raise UserError(f"{path} is no run folder: it has no config.yaml. Give one such as runs/NAME.")
        return folder

    def numbered(self, name: str) -> Path:
        """The first of the folders <name>/1, <name>/2, ... that is not there yet."""
        return next(path for n in range(1, 10**6) if not (path := self.path / name / str(n)).exists())

    @contextmanager
    def locked(self, take_over: bool = False) -> Iterator[lock.Held]:
        """Holds the run folder; UserError naming the holder if a live process has it. See `lock.held`."""
        with lock.held(self.path, take_over) as held:
            try:
                yield held
            except BaseException:
                for line in self.unwritten():
                    self.tell(line)
                raise
            self.close()

    def close(self) -> None:
        """Writes what still waits. EnvironmentFault if the disk does not take it even now."""
        if lost := self.unwritten():
            raise EnvironmentFault("; ".join(lost))

    def unwritten(self) -> list[str]:
        """One more try to write what waits, then a line for each file that lacks lines for good."""
        return [line for journal in self.journals.values() if (line := journal.last_words())]

    def record(self, event: str, **facts: Any) -> None:
        """Appends one line to the ledger."""
        self.append("ledger.jsonl", {"time": round(time.time(), 3), "event": event, **facts})

    def append(self, file: str, *lines: dict[str, Any]) -> None:
        """Appends lines to a .jsonl file, without the secrets in their texts; they may wait for a disk to recover.

        Those of one call go in one write: a process that is killed leaves all of them or none.
        Once a line was taken, one also waits where the right to write is gone: checkpoints may lie on another disk.
        """
        journal = self.journals.setdefault(file, Journal(self.path / file, lambda text: self.tell(text)))
        content = b"".join(json.dumps(without_secrets(line)).encode() + b"\n" for line in lines)
        journal.append(content, PASSING | RIGHTS if self.began else PASSING)
        self.began = True

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Every whole line of a .jsonl file and those that wait; one torn by a kill in mid-write is left out."""
        path, journal = self.path / file, self.journals.get(file)
        content = path.read_bytes() if path.is_file() else b""
        content += b"\n" + b"".join(journal.waiting if journal else ())
        parsed = []
        for text in content.decode(errors="replace").splitlines():
            with suppress(ValueError):
                parsed.append(json.loads(text))
        return parsed

    def keep_pictures(self, pictures: dict[str, bytes]) -> None:
        """Writes each, by its name, into samples/, whole or not at all. A disk that fails costs only the pictures."""
        for name, content in pictures.items():
            try:
                write_atomic(self.samples / name, content)
            except (OSError, EnvironmentFault) as error:
                self.tell(f"{self.samples / name} could not be written: {error}")

    def history(self) -> list[dict[str, Any]]:
        """The ledger as one lineage: what a later resume or branch went back behind is dropped."""
        return lineage(self.lines("ledger.jsonl"))


def lineage(ledger: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for line in ledger:
        if line["event"] == "resume":
            kept = [old for old in kept if old.get("images_seen", 0) <= line["images_seen"]]
        kept.append(line)
    return kept


class Journal:
    """A file of lines, each whole and in order, that a full or failing disk only holds up."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self.tell = path, tell
        self.waiting: deque[bytes] = deque()
        self.failing, self.dropped = False, 0
        self.writing = threading.Lock()

    def append(self, line: bytes, passing: Collection[int]) -> None:
        """Writes what waits, then `line`; OSError for what is not `passing`, such as a folder that is gone."""
        with self.writing:
            if len(self.waiting) < MOST_WAITING:
                self.waiting.append(line)
            else:
                self._drop()
            try:
                self._write()
            except OSError as error:
                if error.errno not in passing:
                    self.waiting.pop()
                    raise
                if not self.failing:
                    self.tell(f"{self.path} cannot be written: {self._need(error)} Its lines wait in memory, all else "
                              f"goes on: {_mend(error)} there.")
                self.failing = True

    def _drop(self) -> None:
        self.dropped += 1
        if self.dropped == 1:
            self.tell(f"{self.path}: {MOST_WAITING:,} lines wait for its disk, later ones are dropped")

    def _write(self) -> None:
        while self.waiting:
            append_whole(self.path, (b"\n" if self._torn() else b"") + self.waiting[0])
            self.waiting.popleft()
        if self.failing:
            lost = f"; {self.dropped:,} lines were dropped" if self.dropped else ", no line is lost"
            self.tell(f"{self.path} is written again{lost}")
            self.failing, self.dropped = False, 0

    def _torn(self) -> bool:
        """Whether a kill in mid-write left half a line, which must not swallow the next one."""
        try:
            with self.path.open("rb") as file:
                return bool(file.seek(0, os.SEEK_END)) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        except FileNotFoundError:
            return False

    def last_words(self) -> str:
        """Tries once more; then a line about what cannot be written, or nothing."""
        with self.writing:
            try:
                self._write()
            except OSError as error:
                dropped = f" and {self.dropped:,} dropped ones" if self.dropped else ""
                return (f"{len(self.waiting):,} lines{dropped} of {self.path} are lost: {self._need(error)} The "
                        f"checkpoints are as they were; {_mend(error)} there before the next run")
        return ""

    def _need(self, error: OSError) -> str:
        try:
            free = f"{shutil.disk_usage(self.path.parent).free:,}"
        except OSError:
            free = "unknown"
        return f"{error.strerror}. It needs {sum(map(len, self.waiting)):,} bytes, {free} are free."


def _mend(error: OSError) -> str:
    return f"give uid {os.geteuid()} the right to write" if error.errno in RIGHTS else "make room"


def append_whole(path: Path, content: bytes) -> None:
    """Puts all of `content` at the end of a file, or raises OSError and leaves the file as it was."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    end = os.fstat(file).st_size
    try:
        try:
            while content:  # a disk takes what still fits, and tells its trouble at the next try
                content = content[os.write(file, content):]
        finally:
            os.close(file)  # NFS tells here
    except OSError:
        with suppress(OSError):
            os.truncate(path, end)
        raise


def without_secrets(tree: Any) -> Any:
    """JSON-ready data with every text `redacted`."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    return [without_secrets(item) for item in tree] if isinstance(tree, list | tuple) else tree
