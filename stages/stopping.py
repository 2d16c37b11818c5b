"""SIGTERM to any one rank stops all ranks after the same step: a flag, summed over the ranks beside the training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

_repeats_end = True
_asked = threading.Event()  # of this process: a request that comes between two stages is met by the next


@contextmanager
def listening() -> Iterator[None]:
    """Within, the first SIGTERM only asks to stop, and a second one ends the process at once.

    Around several stages it hears what comes between them too. Outside the main thread, where Python cannot listen,
    SIGTERM does what it did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if not _asked.is_set():
        signal.signal(signal.SIGTERM, _ask)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # a generator's end may come from any
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def listen_to(number: int) -> None:
    """From now on this process is also asked to stop by signal `number`, whenever it comes."""
    signal.signal(number, lambda *_: _asked.set())


def asked() -> bool:
    """Whether this very process was asked to stop."""
    return _asked.is_set()


def ignore_repeats() -> None:
    """From now on in this process a second SIGTERM is one request with the first: several sources may send it."""
    global _repeats_end
    _repeats_end = False


def _ask(signum: int, _: object) -> None:
    if not _repeats_end:
        _asked.set()
        return
    signal.signal(signum, signal.SIG_DFL)  # the system's own: no Python has to run for a second one to end the process
    if _asked.is_set():
        os.kill(os.getpid(), signum)
    _asked.set()


class StopFlag:
    """`agreed()` once a step on every rank: whether any rank had been asked to stop when the step before began.

    The sum runs over a gloo group of its own while a step is computed, so that nothing waits, on GPUs neither.
    """

    def __init__(self, workers: int) -> None:
        self.group = dist.new_group(backend="gloo") if workers > 1 else None
        self.flag = torch.zeros(1)
        self.under_way: Any = None

    def agreed(self) -> bool:
        if self.group is None:
            return _asked.is_set()
        agreed = False
        if self.under_way is not None:
            self.under_way.wait()
            agreed = bool(self.flag.item())  # memory of the host
        self.flag = torch.tensor([float(_asked.is_set())])
        self.under_way = dist.all_reduce(self.flag, group=self.group, async_op=True)
        return agreed

    def close(self) -> None:
        if self.group is not None:
            with suppress(RuntimeError):  # of a rank that is gone: what ended it is told elsewhere
                if self.under_way is not None:
                    self.under_way.wait()
                dist.destroy_process_group(self.group)
