"""Files that a node's processes share and that keep within a budget: decoded levels, downloaded shards."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gradine.configs.schema import EnvironmentFault


class NoRoom(EnvironmentFault):
    """The disk of a cache file is full: what it would speed up works without."""


def mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A cache file, marked as used now; None if there is none, or one of another length."""
    try:
        if path.stat().st_size != int(np.prod(shape)):
            return None
        os.utime(path)
        return np.memmap(path, np.uint8, "r", shape=shape)
    except FileNotFoundError:  # it had to go just now
        return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this node at a time makes `path`; the lock ends with its holder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("w")
    except OSError as error:
        raise fault(error)(f"data.cache_dir: {path.parent} cannot be written: {error.strerror}. "
                           "Set it to a folder that can.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish(made: Path, path: Path, budget: int) -> None:
    """Gives a finished file its name, when its folder has room for it whoever else was making one."""
    with locked(path.parent / "room"):
        make_room(path, made.stat().st_size, budget)
        made.rename(path)


def make_room(path: Path, size: int, budget: int) -> None:
    """Removes files like `path` that were used longest ago until `size` bytes more keep the budget.

    Processes that have one mapped or open keep theirs.
    """
    files = []
    for other in path.parent.glob(f"*{path.suffix}"):
        with suppress(FileNotFoundError):
            files.append((other.stat().st_mtime, other.stat().st_size, other))
    excess = sum(held for _, held, _ in files) + size - budget
    for _, held, other in sorted(files):
        if excess <= 0:
            return
        other.unlink(missing_ok=True)
        excess -= held


def allocate(path: Path, size: int) -> None:
    """Makes a file whose every byte has its place on the disk: writing to a mapping with none ends the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        path.unlink(missing_ok=True)
        raise fault(error)(f"image cache {path} could not be made: {error.strerror}. It needs {size:,} bytes, "
                           f"{free:,} are free. Set data.cache_dir to another disk, or data.cache_gb=0 to do "
                           "without.") from error


def fault(error: OSError) -> type[EnvironmentFault]:
    return NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT) else EnvironmentFault
