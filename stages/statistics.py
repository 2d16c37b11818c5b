"""What depends on real images alone, kept on the node: statistics of reals are computed once, not at each evaluation.

A file is named by the sha256 of its facts (which images, in which order, by which features) and by what it holds. It is
safetensors, so reading runs no code, and carries its facts and a sha256 over all its bytes. One that is torn, altered
or of other facts is never used: its content is computed anew and takes its place. A folder that cannot be written to
costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from gradine.configs.schema import EnvironmentFault
from gradine.stages.cache import locked, make_room
from gradine.stages.store import write_atomic

SCHEMA = 1  # raise it when the same facts shall give other statistics
UNSIGNED = b"0" * 64  # stands in the file where its sha256 will, while that is taken


class Remembered:
    """The statistics of one set of facts: `remembered("fd", compute)` reads them, or computes and keeps them.

    Of a node's processes one computes, the others wait for it. `facts` must be JSON. `budget` is in bytes, for all
    files of the folder: those used longest ago go. `notes` holds a line for each thing that went wrong on the way.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], budget: int) -> None:
        self.folder, self.budget = folder, budget
        self.facts = json.dumps({"schema": SCHEMA, **facts}, sort_keys=True)
        self.notes: list[str] = []

    def __call__(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.budget <= 0:
            return compute()
        path = self.folder / f"{_digest(self.facts.encode()).decode()}-{name}.safetensors"
        with ExitStack() as held:
            locks = True
            try:
                held.enter_context(locked(path))
            except (OSError, EnvironmentFault) as error:
                locks = False
                self.notes.append(f"statistics of reals are not kept: {error}")
            found = self._read(path)
            if found is not None:
                return found
            made = compute()
            if locks:
                self._keep(path, made)
            return made

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """None if there is no such file, or it must not be used."""
        try:
            content = path.read_bytes()
            with suppress(OSError):  # of a read-only disk
                os.utime(path)  # used now: others go first
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.notes.append(f"statistics of reals in {path} are unreadable, hence computed anew: {error.strerror}")
            return None
        signed = re.search(rb'"sha256":"([0-9a-f]{64})"', content)
        if not signed or _digest(_signed(content, signed[1], UNSIGNED)) != signed[1]:
            self.notes.append(f"statistics of reals in {path} are damaged, hence computed anew")
            return None
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        if header["__metadata__"]["facts"] != self.facts:
            self.notes.append(f"statistics of reals in {path} are those of others, hence computed anew")
            return None
        return safetensors.torch.load(content)

    def _keep(self, path: Path, made: dict[str, Tensor]) -> None:
        apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in made.items()}
        content = safetensors.torch.save(apart, {"facts": self.facts, "sha256": UNSIGNED.decode()})
        content = _signed(content, UNSIGNED, _digest(content))
        if len(content) > self.budget:
            self.notes.append(f"statistics of reals are not kept: {len(content):,} bytes are more than the "
                              f"{self.budget:,} of the cache. Raise data.cache_gb.")
            return
        try:
            with locked(self.folder / "room"):
                make_room(path, len(content), self.budget)
                write_atomic(path, content)
        except (OSError, EnvironmentFault) as error:
            self.notes.append(f"statistics of reals are not kept in {self.folder}: {error}")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _signed(content: bytes, digest: bytes, other: bytes) -> bytes:
    """The file with another digest in its header, where quotes within facts are escaped: the first place is the one."""
    return content.replace(b'"sha256":"%b"' % digest, b'"sha256":"%b"' % other, 1)
