"""SIGTERM and Ctrl-C in the driver: the first asks for a checkpoint and an orderly end, the second quits at once.

`--until` asks as the first of them does, by SIGALRM, and is not counted as one.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

from gradine.configs.schema import UserError

STOPS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_S = 0.5  # `timeout` and service managers signal the process and its group at once
LOOK_AGAIN_S = 60.0  # at the clock, which may have been set, or have gone on while the machine slept


@dataclass(frozen=True)
class Deadline:
    """When a run has ended, with its checkpoint written."""

    text: str  # as it was asked for
    unix_s: float

    @staticmethod
    def next(text: str, now: float) -> Deadline:
        """The first moment after `now` at which local clocks show `text`, HH:MM; UserError if that is no time of day.

        A change of the clocks in between is reckoned with. What it leaves out comes as late as if there were none:
        clocks then show 03:30 for 02:30.
        """
        if not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", text):
            raise UserError(f"--until {text!r} is no time of day. Use HH:MM by the local clock, e.g. --until 06:00.")
        hour, minute = map(int, text.split(":"))
        today = datetime.fromtimestamp(now).replace(hour=hour, minute=minute, second=0, microsecond=0)
        times = [(today + timedelta(days)).replace(fold=fold) for days in (0, 1) for fold in (0, 1)]
        moments = [time.timestamp() for time in times if not time.fold or _is_shown(time)]
        return Deadline(text, min(moment for moment in moments if moment > now))

    def seconds_left(self) -> float:
        return self.unix_s - time.time()


def _is_shown(time: datetime) -> bool:
    return datetime.fromtimestamp(time.timestamp()).timetuple()[:5] == time.timetuple()[:5]


def exit_code_of(number: int) -> int:
    """Of a process that ended because it was asked to: at its deadline it did what it should."""
    return 0 if number == signal.SIGALRM else 128 + number


class Stopped(KeyboardInterrupt):  # Ray lets nothing else out of its waits, and no `except Exception` swallows it
    """The run was asked to end by signal `args[0]`."""

    @property
    def exit_code(self) -> int:
        return exit_code_of(int(self.args[0]))


class Signals:
    """`asked` is the signal that came, or 0. Outside `gently` it raises Stopped wherever the driver is.

    `grace_s` before the deadline comes SIGALRM.
    """

    def __init__(self, deadline: Deadline | None = None, grace_s: float = 0.0) -> None:
        self.asked, self.gentle = 0, False
        self.deadline, self.grace_s = deadline, grace_s
        self.until = f"until {deadline.text}" if deadline else ""
        self.asked_at = 0.0
        self.leaving: threading.Timer | None = None

    @contextmanager
    def heard(self) -> Iterator[Signals]:
        """Installs the handlers; in another thread than the main one Python cannot, and signals do what they did."""
        before = self.listen()
        try:
            yield self
        except KeyboardInterrupt as error:  # out of Ray's waits comes a plain one
            raise Stopped(self.asked or signal.SIGINT) from error
        except SystemExit as error:  # how Ray, while it starts, answers SIGTERM
            raise Stopped(signal.SIGTERM) if error.code == signal.SIGTERM else error from None
        finally:
            if self.leaving:
                self.leaving.cancel()
            self.forget_deadline()
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def listen(self) -> dict[int, Any]:
        """Installs the handlers, again after Ray put its own in their place. -> those before them"""
        if threading.current_thread() is not threading.main_thread():
            return {}
        before = {int(number): signal.signal(number, self._hear) for number in STOPS}
        if self.deadline:
            before[int(signal.SIGALRM)] = signal.signal(signal.SIGALRM, self._look_at_the_clock)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        return before

    def forget_deadline(self) -> None:
        """The session has ended: what it still tells is not to be interrupted."""
        if self.deadline and threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.deadline = None

    @property
    def reason(self) -> str:
        """Who asked: `SIGTERM`, or `until 06:00`."""
        if self.asked == signal.SIGALRM:
            return self.until
        return signal.Signals(self.asked or signal.SIGINT).name

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Within, the first signal only sets `asked`: whoever trains looks at it and ends in order."""
        self.gentle = True
        try:
            yield
        finally:
            self.gentle = False
        if self.asked:
            raise Stopped(self.asked)

    def leave_within(self, seconds: float) -> None:
        """The process ends by then: a Ray whose own processes got the same signal is waited for much longer."""
        if self.asked and not self.leaving:
            self.leaving = threading.Timer(seconds, os._exit, (exit_code_of(self.asked),))
            self.leaving.daemon = True
            self.leaving.start()

    def _look_at_the_clock(self, *_: Any) -> None:
        if self.asked or not self.deadline:
            return
        if (left := self.deadline.seconds_left() - self.grace_s) > 0:
            signal.setitimer(signal.ITIMER_REAL, min(left, LOOK_AGAIN_S))
            return
        self.asked = signal.SIGALRM
        if not self.gentle:
            raise Stopped(signal.SIGALRM)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.asked == signal.SIGALRM:  # it ends already, and this is the first request
            self.asked, self.asked_at = number, time.monotonic()
            return
        if self.asked and time.monotonic() - self.asked_at < ONE_REQUEST_S:
            return
        if self.asked:
            for each in STOPS:
                signal.signal(each, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked, self.asked_at = number, time.monotonic()
        if not self.gentle:
            raise Stopped(number)
