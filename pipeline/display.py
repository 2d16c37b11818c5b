"""What a person watches: a live line per stage on a terminal, a line now and then in a log, TensorBoard's curves."""

from __future__ import annotations

import io
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gradine.configs.schema import Run, redacted
from gradine.pipeline.plan import seconds_left
from gradine.pipeline.run_dir import append_whole, warn
from gradine.stages import growth

LOG_EVERY_S = 15.0
LOSSES = {"D": "loss_d", "G": "loss_g", "reconstruction": "reconstruction"}  # of which a tick may lack any


class Display:
    """Feed it the stage's events; `say` prints a line that stays."""

    def __init__(self, run: Run, console: Console | None = None) -> None:
        self.run, self.schedule = run, growth.schedule(run)
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.rates: dict[int, float] = {}  # images/s by resolution, smoothed
        self.printed = 0.0
        self.shown: tuple[int, str] | None = None

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, line: str, style: str = "") -> None:
        self.console.print(Text(redacted(line), style))

    def tick(self, event: dict[str, Any]) -> None:
        size = event["resolution"]
        if event["images_per_s"]:
            self.rates[size] = 0.9 * self.rates.get(size, event["images_per_s"]) + 0.1 * event["images_per_s"]
        line = self.line(event)
        if self.live:
            self.live.update(Text(line), refresh=True)
        elif (size, event["phase"]) != self.shown or time.monotonic() - self.printed > LOG_EVERY_S:
            self.say(line)
            self.printed, self.shown = time.monotonic(), (size, event["phase"])

    def line(self, event: dict[str, Any]) -> str:
        """`  16px fade   alpha 0.42    12.3 of 40.0 kimg   130 images/s   D -3.1  G 0.9   3 min left`."""
        rate = self.rates.get(event["resolution"])
        masked = f"  {sum(event['masked']):g} updates masked" if any(event["masked"]) else ""
        losses = "  ".join(f"{name} {event[figure]:8.3f}" for name, figure in LOSSES.items() if figure in event)
        return (f"{event['resolution']:>5}px {event['phase']:<4}  alpha {event['alpha']:.2f}  "
                f"{event['images_seen'] / 1000:>8.1f} of {self.schedule.end / 1000:.1f} kimg  "
                f"{f'{rate:.0f}' if rate else '-':>5} images/s  {losses}  "
                f"{duration(seconds_left(self.run, event['images_seen'], self.rates))} left{masked}")


class Board:
    """TensorBoard's event files; their step is images seen. Disks that fail cost only the points of that time.

    Written event by event: TensorBoard's own writer leaves that to a thread, which a full disk ends for good.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = warn) -> None:
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.tell, self.failing, self.dropped = tell, False, 0

    def tick(self, event: dict[str, Any]) -> None:
        self.draw({f"train/{name}": value for name, value in event.items() if isinstance(value, float)},
                  event["images_seen"])

    def metric(self, row: dict[str, Any]) -> None:
        if row["value"] is not None:
            self.draw({f"metrics/{row['metric']}": row["value"]}, row["images_seen"])

    def draw(self, points: dict[str, float], images_seen: int) -> None:
        """Adds a point to each curve."""
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=images_seen)
        for tag, value in points.items():
            event.summary.value.add(tag=tag, simple_value=value)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not (self.path.is_file() and self.path.stat().st_size):
                append_whole(self.path, record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            append_whole(self.path, record(event))
        except OSError as error:  # the same figures are in the ledger
            self.dropped += 1
            if not self.failing:
                self.tell(f"curves in {self.path.parent} cannot be written: {error.strerror}. Training goes on without")
            self.failing = True
            return
        if self.failing:
            self.tell(f"curves in {self.path.parent} are written again; they lack {self.dropped} points")
            self.failing, self.dropped = False, 0


def record(event: Any) -> bytes:
    """An event as event files hold it: length, check sum, content, check sum."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()


def duration(seconds: float) -> str:
    """90 -> `1 min 30 s`."""
    if math.isnan(seconds):
        return "? min"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
