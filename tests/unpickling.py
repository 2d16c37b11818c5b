"""An audit hook that sees every unpickling in this process and refuses those that gradine causes.

Python tells its audit hooks of each class a pickle asks for, whoever reads it and from wherever. Ray's and
torch.distributed's own messages between processes are pickles by design: allowed, as told by the frames between the
unpickling and the first frame of gradine. A hook stays until its process ends; outside of unpickling it costs one
comparison.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

EVENTS = ("pickle.find_class", "marshal.loads", "marshal.load")
TRANSPORT = ("ray", "torch.distributed", "accelerate.utils.operations", "multiprocessing", "concurrent.futures")
IMPORTS = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "zipimport")  # read byte code by marshal
offences: list[str] = []


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def caused_by(frame: FrameType | None, event: str = EVENTS[0]) -> str | None:
    """The line of gradine that unpickles, from the innermost frame outwards; None if it is not gradine's doing."""
    allowed = TRANSPORT if event == EVENTS[0] else (*TRANSPORT, *IMPORTS)
    while frame:
        module = frame.f_globals.get("__name__") or ""
        if within(module, allowed):
            return None
        if within(module, ("gradine",)):
            return f"{module} line {frame.f_lineno}: {event}"
        frame = frame.f_back
    return None


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS and (line := caused_by(sys._getframe(1), event)):
        offences.append(f"{line} {arguments[:2] if event == EVENTS[0] else ''}")
        raise RuntimeError(f"gradine unpickles nothing, and did: {offences[-1]}")


def watch() -> None:
    sys.addaudithook(hook)
