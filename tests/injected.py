"""Faults inside the processes of a run: a `sitecustomize.py` on PYTHONPATH, which driver and workers import at start.

What a test injects is Python text; it may use what PRELUDE defines. Nothing in gradine knows of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 180  # until a test gives up on something that should have happened

PRELUDE = '''
import importlib.abc, importlib.util, os, sys, time
from pathlib import Path

HERE = Path(__file__).parent
CHANGES = {}  # module -> what is done with it once it is imported


def first(name):
    """Whether no process of any attempt came here before."""
    try:
        (HERE / name).open("x").close()
    except FileExistsError:
        return False
    return True


def reached(name):
    (HERE / f"{name}.partial").write_text(str(os.getpid()))
    (HERE / f"{name}.partial").rename(HERE / f"{name}.reached")


def hold(name):
    """Tells the test that it came here, and stays until the test lets go."""
    reached(name)
    while not (HERE / f"{name}.go").exists() and not (HERE / "over").exists():
        time.sleep(0.02)


def until_asked(name):
    """Tells the test that it came here, and stays until this process was asked to stop."""
    from gradine.stages import stopping
    reached(name)
    while not stopping._asked.is_set() and not (HERE / "over").exists():
        time.sleep(0.02)


def rank():
    return int(os.environ.get("RANK", 0))


def before_steps(function):
    """function(state, shares, images_seen) in every worker before each of its steps."""
    def change(loop):
        true_step = loop.train_step
        def train_step(state, shares, moment, *rest):
            function(state, shares, moment.images_seen)
            return true_step(state, shares, moment, *rest)
        loop.train_step = train_step
    CHANGES["gradine.stages.loop"] = change


def without_evaluations(module):
    module.Evaluations.start = lambda *_: None


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            change(module)
        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


class Injected:
    """One test's faults, in a folder that is on PYTHONPATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def add(self, code: str) -> None:
        (self.folder / "sitecustomize.py").write_text(PRELUDE + code)

    def reached(self, name: str) -> int:
        """Waits until a process came to `hold(name)` or `until_asked(name)`. -> its pid"""
        path = self.folder / f"{name}.reached"
        wait_until(path.exists, f"a process reaches {name!r}")
        return int(path.read_text())

    def let_go(self, name: str) -> None:
        (self.folder / f"{name}.go").touch()

    def end(self) -> None:
        """Whoever still holds goes on."""
        (self.folder / "over").touch()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert not getattr(threading.current_thread(), "needless", False), f"the test failed before {what}"
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s it did not happen that {what}"
        time.sleep(0.02)


@contextmanager
def meanwhile(function: Callable[[], object]) -> Iterator[None]:
    """Runs `function` in a thread beside the body; what it raises is raised when the body has ended."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    except BaseException:
        thread.needless = True  # type: ignore[attr-defined]
        raise
    finally:
        thread.join()
    if errors:
        raise errors[0]
