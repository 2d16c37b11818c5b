"""SIGTERM and Ctrl-C in the driver: the first asks for a checkpoint and an orderly end, the second quits at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_S = 0.5  # `timeout` and service managers signal the process and its group at once


class Stopped(KeyboardInterrupt):  # Ray lets nothing else out of its waits, and no `except Exception` swallows it
    """The run was asked to end by signal `args[0]`."""

    @property
    def exit_code(self) -> int:
        return 128 + int(self.args[0])


class Signals:
    """`asked` is the signal that came, or 0. Outside `gently` it raises Stopped wherever the driver is."""

    def __init__(self) -> None:
        self.asked, self.gentle = 0, False
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
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def listen(self) -> dict[int, Any]:
        """Installs the handlers, again after Ray put its own in their place. -> those before them"""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {int(number): signal.signal(number, self._hear) for number in STOPS}

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
            self.leaving = threading.Timer(seconds, os._exit, (128 + self.asked,))
            self.leaving.daemon = True
            self.leaving.start()

    def _hear(self, number: int, _: FrameType | None) -> None:
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
