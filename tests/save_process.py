"""Commits, begins terms and cleans up as JSON lines on stdin ask, each line in a fork of its own, for strace to harm.

    {"location": FOLDER, "steps": [["commit", 160], ["retire", 1, 160]], "reach": ["fsync", 3], "without": ""}

strace is told to harm one call of each kind a process makes, the one whose number HARMED says: `reach` makes that the
third fsync of the steps, by calls before them that change nothing. `without` takes a precaution away from the writer.
Answers: one line with the pid and what came of each step, or, from the parent, that the fork was killed.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gradine.stages import commits, store

NOWHERE, NO_FILE = "/nonexistent/nowhere", 9999
MILESTONE = "/nonexistent/milestone "  # removing it fails and stands in strace's log
HARMLESS: dict[str, Callable[[], Any]] = {  # every call by which a save or a clean-up changes the disk
    "mkdir": lambda: os.mkdir("/"),  # noqa: PTH102 (these are to make one system call each)
    "openat": lambda: os.open(NOWHERE, os.O_RDONLY),
    "write": lambda: os.write(NO_FILE, b""),
    "fsync": lambda: os.fsync(NO_FILE),
    "rename": lambda: os.rename(NOWHERE, NOWHERE),  # noqa: PTH104
    "link": lambda: os.link(NOWHERE, NOWHERE),
    "unlink": lambda: os.unlink(NOWHERE),  # noqa: PTH108
    "unlinkat": lambda: os.unlink(NOWHERE, dir_fd=0),
    "rmdir": lambda: os.rmdir(NOWHERE)}  # noqa: PTH106


HARMED = {name: 500 if name == "openat" else 150 for name in HARMLESS}  # more than the imports below strace make


def files_of(images: int, stage_end: bool = False, resolution: int = 8) -> dict[str, bytes]:
    """The files of a checkpoint that any process can make again: their bytes follow from the images seen."""
    state = {"schema": commits.SCHEMA, "resolution": resolution, "phase": "hold", "images_seen": images,
             "stage_end": stage_end, "skipped": [], "masked": [0, 0]}
    weights = {name: (8).to_bytes(8, "little") + hashlib.sha256(f"{images} {name}".encode()).digest() * 3
               for name in sorted(commits.FILES - {"state.json"})}
    return {**weights, "state.json": json.dumps(state).encode()}


def commit(location: Path, images: int, stage_end: bool = False, resolution: int = 8,
           term: commits.Term | None = None) -> str:
    files = files_of(images, stage_end, resolution).items()
    return commits.commit(location, f"r{resolution:04d}-hold-{images:09d}", files,
                          term or commits.newest_term(location))


def begin(location: Path) -> commits.Term:
    newest, _ = commits.newest_valid(commits.find(location)[0])
    return commits.begin_term(location, newest[0] if newest else None)


STEPS: dict[str, Callable[..., Any]] = {
    "mkdir": Path.mkdir, "begin": begin, "commit": commit, "retire": commits.retire, "orphans": commits.remove_orphans}


def take_away(what: str) -> None:
    """A writer that forgets one thing. Each is a bug the tests must see."""
    write, sync_folder, rmtree = commits._write, commits._sync_folder, shutil.rmtree

    def sync_only(wanted: Callable[[Path], bool]) -> None:
        commits._sync_folder = lambda path: sync_folder(path) if wanted(path) else None

    if what == "file sync":
        commits._write = Path.write_bytes
    elif what == "sync of the new folder":
        sync_only(lambda path: not path.name.startswith(commits.PARTIAL))
    elif what == "sync of the folder above":
        sync_only(lambda path: path.name.startswith(commits.PARTIAL))
    elif what == "any folder sync":
        sync_only(lambda path: False)
    elif what == "manifest":
        commits._write = lambda path, content: write(path, content) if path.name != commits.MANIFEST else None
    elif what == "the old one until the new is durable":
        def delete_first(location: Path, images: int) -> None:
            for old in commits.find(location)[0]:
                commits.delete(old.path)
            commit(location, images)
        STEPS["commit"] = delete_first
    elif what == "rename before deleting":
        commits.delete = rmtree
    elif what == "sync of a term's file":
        store.os = SimpleNamespace(**{**vars(os), "fsync": lambda descriptor: None})
    elif what == "sync of a term's folder":
        store._sync = lambda path: None
    else:
        assert not what, what


def run(job: dict[str, Any]) -> list[str]:
    location, outcomes = Path(job["location"]), []
    take_away(job["without"])
    if job["reach"]:
        call, number = job["reach"]
        for _ in range(HARMED[call] - number):
            with suppress(OSError):
                HARMLESS[call]()
    for step, *arguments in job["steps"]:
        try:
            STEPS[step](location, *arguments)
            outcomes.append("done")
        except OSError as error:
            outcomes.append(errno.errorcode[error.errno or 0])
        with suppress(OSError):
            os.rmdir(MILESTONE + step)  # noqa: PTH106
    return outcomes


def answer(**about: Any) -> None:
    os.writev(1, [json.dumps({"pid": os.getpid(), "killed": False, **about}).encode() + b"\n"])  # `write` may be harmed


def main() -> None:
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answer(outcomes=run(json.loads(line)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            answer(pid=child, killed=True)
        elif status:
            answer(pid=child, failed=status)


if __name__ == "__main__":
    main()
