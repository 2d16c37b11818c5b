"""What a worker is at: pulses, which it sends while it runs, and a record, which others read when it no longer does.

A pulse is an event, at most one a second: how far this rank is, what it does, and how long its last steps took by
itself, without waiting for other ranks. A rank that is frozen, waits for the others, holds the interpreter's lock or
was killed sends none. What it was at stands in its record: a small mapped file on its node, one line per thread.
"""

from __future__ import annotations

import faulthandler
import fcntl
import itertools
import mmap
import os
import signal
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Event = dict[str, Any]
PULSE_S = 1.0
WINDOW_STEPS = 16  # of which a pulse tells the times; they begin at the same images seen on all ranks
WAITS_FOR_OTHERS = ("reduce", "agree")
LINE, LINES = 256, 64  # bytes of a thread's line, and threads
TRAINING = "training"  # whose line is that of the steps, whatever thread they run in
LEFT_FOR_S = 3600.0  # a record whose process is gone: whoever restarts its group may still want to read it


# The record ----------------------------------------------------------------------------------------------------------


class Record:
    """The lines of this process's threads in a file that other processes of the node can read at any time."""

    def __init__(self, folder: Path) -> None:
        handle, name = tempfile.mkstemp(".record", f"{os.getpid()}-", folder)
        os.posix_fallocate(handle, 0, LINE * LINES)  # or a disk that fills up would kill the process that writes
        fcntl.flock(handle, fcntl.LOCK_SH)  # held while the process lives: `remove_left` leaves it alone
        self.path, self.mapped = name, mmap.mmap(handle, LINE * LINES)
        self.mapped[:] = b" " * LINE * LINES
        self.numbers, self.places, self.lock = itertools.count(), dict[str, int](), threading.Lock()
        self.stacks = Path(f"{name}.stacks").open("x")  # noqa: SIM115 (open as long as the process lives)
        # Written by the signal's handler itself: no thread has to run Python, or to get the interpreter's lock.
        faulthandler.register(signal.SIGUSR1, self.stacks, all_threads=True)

    def write(self, thread: str, doing: str, detail: object) -> None:
        place = self.places.get(thread)
        if place is None:
            with self.lock:
                place = self.places.setdefault(thread, next(self.numbers) % LINES)
        line = f"{time.monotonic():.3f}\t{thread}\t{doing}\t{detail}\n".encode("utf-8", "replace")
        self.mapped[place * LINE:(place + 1) * LINE] = line[:LINE].ljust(LINE)


_record: Record | None = None


def keep_record() -> str:
    """From now on this process keeps a record. -> its path; "" where the disk has no room for one."""
    global _record
    if _record is None:
        with suppress(OSError):  # training does not need it
            folder = Path(tempfile.gettempdir()) / f"gradine-records-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                folder = Path(tempfile.mkdtemp(prefix="gradine-records-"))  # that one is another user's, or open to all
            remove_left(folder)
            _record = Record(folder)
    return _record.path if _record else ""


def at(doing: str, detail: object = "") -> None:
    """Writes into the record what the calling thread begins to do; "" for nothing. Takes 2 us."""
    if _record:
        _record.write(threading.current_thread().name, doing, detail)


def remove_left(folder: Path) -> None:
    """Deletes records whose processes are gone."""
    for path in folder.glob("*.record"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > LEFT_FOR_S:
                path.unlink()
                Path(f"{path}.stacks").unlink(missing_ok=True)


# The record, read by another process of the node ---------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """What one thread is at, and for how long."""

    thread: str
    doing: str
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.thread}: {self.doing} {self.detail} for {self.seconds:.0f} s"


@dataclass(frozen=True)
class Sight:
    """A process as it is seen from outside, whatever state it is in."""

    state: str  # of /proc: R runs, S sleeps, D sleeps in the kernel, T is stopped; "" is gone
    kernel: str  # where in the kernel its main thread waits, if the kernel tells
    lines: list[Line]


def read_record(path: str) -> list[Line]:
    try:
        content = Path(path).read_bytes()
    except OSError:
        return []
    now, lines = time.monotonic(), []
    for begin in range(0, len(content), LINE):
        parts = content[begin:begin + LINE].decode("utf-8", "replace").rstrip("\n ").split("\t")
        if len(parts) == 4 and parts[2]:
            since, thread, doing, detail = parts
            lines.append(Line(thread, doing, detail, now - float(since)))
    return lines


def look_at(pid: int, record: str) -> Sight:
    process = Path(f"/proc/{pid}")
    try:
        state = process.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = ""
    kernel = ""
    with suppress(OSError):
        kernel = process.joinpath("wchan").read_text().strip("0")
    return Sight("" if state in "ZX" else state, kernel, read_record(record))


def memory_kills() -> int | None:
    """How many processes the kernel of this host has ended so far because memory ran out; None where it tells not."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts["oom_kill"])  # those in a cgroup with a limit of its own count too
    except (OSError, KeyError, ValueError):
        return None


def look_back(pid: int, record: str) -> tuple[Sight, int | None]:
    """Of a process that has ended: what it was at, and `memory_kills` by now."""
    return look_at(pid, record), memory_kills()


def last_stacks(pid: int, record: str, patience_s: float = 2.0) -> str:
    """The stacks of all threads of a process that keeps `record`, which is then ended.

    One that is stopped has to run on to write them, for some tenths of a second.
    """
    path, until, before, size = Path(f"{record}.stacks"), time.monotonic() + patience_s, 0, 0
    with suppress(OSError):
        if record not in Path(f"/proc/{pid}/maps").read_text():
            return ""  # another process has the number by now
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGCONT)
        while time.monotonic() < until and not 0 < before == size:  # until it grows no more
            time.sleep(0.15)
            before, size = size, path.stat().st_size
        os.kill(pid, signal.SIGKILL)
        return path.read_text(errors="replace")
    return ""


# Pulses --------------------------------------------------------------------------------------------------------------


def first_pulse(record: str) -> Event:
    """The first pulse of a stage, before anything that takes long."""
    if _record:
        _record.write(TRAINING, "setup", "")
    return {"event": "pulse", "images_seen": 0, "doing": "setup", "record": record, "windows": []}


class HostClock:
    """Marks of time for work that is done when its call returns."""

    mark = staticmethod(time.perf_counter)

    @staticmethod
    def passed(_: Any) -> bool:
        return True

    @staticmethod
    def between(first: float, last: float) -> float:
        return last - first


class DeviceClock:
    """Marks in a GPU's own order of work; the host waits for none."""

    @staticmethod
    def mark() -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def passed(mark: Any) -> bool:
        return bool(mark.query())

    @staticmethod
    def between(first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1e3


@dataclass
class Step:
    """Marks of one step: it begins, waits for others from an odd one to the next even one, and ends."""

    marks: list[Any]
    data_s: float = 0.0  # waited for its batch


@dataclass
class Window:
    """The steps up to images_seen `end`, and the seconds of work that went into a batch meanwhile."""

    end: int
    steps: list[Step]
    made_s: float

    def figures(self, clock: Any) -> list[float]:
        """[end, median of a step's own computing, mean wait for a batch, work on a batch], in seconds."""
        own = sorted(
            clock.between(step.marks[0], step.marks[-1])
            - sum(map(clock.between, step.marks[1:-1:2], step.marks[2:-1:2])) for step in self.steps)
        return [self.end, own[len(own) // 2], sum(step.data_s for step in self.steps) / len(own), self.made_s]


class Pulse:
    """One rank's pulses during a stage. `beat()` yields the ones that are due; unless `wanted` there are none."""

    def __init__(self, wanted: bool, batch_size: int, images_seen: int, device: bool = False) -> None:
        self.wanted, self.window_images = wanted, WINDOW_STEPS * batch_size
        self.clock: Any = DeviceClock if device else HostClock
        self.images_seen, self.said, self.said_at = images_seen, "", 0.0
        self.data_s = self.made_s = self.made_before = 0.0
        self.marks: list[Any] = []
        self.steps: list[Step] = []
        self.ended: deque[Window] = deque(maxlen=1000)  # not told yet

    def at(self, doing: str) -> None:
        if _record:
            _record.write(TRAINING, doing, f"at {self.images_seen:,} images")

    def beat(self, doing: str) -> Iterator[Event]:
        """A pulse, if the last one is a second old or said something else."""
        now = time.monotonic()
        if self.wanted and (doing != self.said or now - self.said_at >= PULSE_S):
            self.said, self.said_at = doing, now
            yield {"event": "pulse", "images_seen": self.images_seen, "doing": doing, "windows": [*self._told()]}

    def next_of(self, source: Iterator[T | None]) -> Generator[Event, None, T]:
        """What `source` gives next; it gives None when a second has passed without anything."""
        self.at("data")
        began = time.perf_counter()
        while (item := next(source)) is None:
            yield from self.beat("data")
        self.data_s = time.perf_counter() - began
        return item

    def making(self, source: Iterator[T], decoding_s: Callable[[], float]) -> Iterator[T]:
        """The same items; counts the work on them: in the thread that asks for them, or in those that decode."""
        asking_s = 0.0
        while True:
            began = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            asking_s += time.perf_counter() - began
            self.made_s = max(asking_s, decoding_s())
            yield item

    def without(self, reduce: Callable[[T], T]) -> Callable[[T], T]:
        """`reduce`, whose time counts as waiting for the others."""
        def timed(value: T) -> T:
            self.at("reduce")
            self.marks.append(self.clock.mark())
            result = reduce(value)
            self.marks.append(self.clock.mark())
            self.at("step")
            return result

        return timed

    @contextmanager
    def step(self) -> Iterator[None]:
        self.at("step")
        self.marks = [self.clock.mark()]
        yield
        self.marks.append(self.clock.mark())

    def stepped(self, images_seen: int) -> None:
        """After each step: a window ends where its images do, on all ranks alike."""
        before, self.images_seen = self.images_seen, images_seen
        self.at("agree")
        self.steps.append(Step(self.marks, self.data_s))
        if before // self.window_images != images_seen // self.window_images:
            if self.wanted and len(self.steps) == WINDOW_STEPS:  # not the first ones after a start in between
                made_s = (self.made_s - self.made_before) / WINDOW_STEPS
                self.ended.append(Window(images_seen, self.steps, made_s))
            self.steps, self.made_before = [], self.made_s

    def _told(self) -> Iterator[list[float]]:
        while self.ended and self.clock.passed(self.ended[0].steps[-1].marks[-1]):
            yield self.ended.popleft().figures(self.clock)
