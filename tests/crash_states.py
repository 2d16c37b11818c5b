"""What a disk may hold after a power cut: from strace's log of a process to every state it may have left.

The model is the least POSIX promises. An fsync of a file makes its bytes durable, one of a folder its entries. All else
may be lost, each change of an entry and each write by itself, in any order: a name may be there without its bytes, with
some, or with zeros. A rename is one change: both its halves are there or neither. Files are named by inode, so that
what becomes of a renamed folder's files is followed.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TRACED = ("mkdir,openat,write,fsync,rename,link,unlink,unlinkat,rmdir,close,?mkdirat,?open,?creat,pwrite64,fdatasync,"
          "?renameat,renameat2,linkat,?symlink,symlinkat,truncate,ftruncate,fallocate,copy_file_range,sendfile")
LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)")
MOST_PENDING = 20  # entries that are not durable: every subset of them is a state
Tree = dict[str, "bytes | Tree"]


@dataclass(eq=False)
class Inode:
    """A file with its bytes or a folder with its entries, as they are durable at first."""

    content: bytes = b""
    entries: dict[str, Inode] | None = None


@dataclass
class Entry:
    """A change of a folder's entries that is there whole or not at all; None: the name is gone."""

    folder: Inode
    changes: dict[str, Inode | None]


@dataclass
class Data:
    file: Inode
    content: bytes


@dataclass
class Sync:
    of: Inode


@dataclass
class Milestone:
    name: str


Operation = Entry | Data | Sync | Milestone


def inode_of(path: Path) -> Inode:
    if path.is_dir():
        return Inode(entries={child.name: inode_of(child) for child in path.iterdir()})
    return Inode(path.read_bytes())


@dataclass
class Recording:
    """The operations of a process below `root`, in order, from strace's log of it."""

    root: Path
    disk: Inode  # as it was before
    milestone: str
    operations: list[Operation] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)  # that changed or synced something: the n-th of a name

    def __post_init__(self) -> None:
        self.now = {self.disk: dict(self.disk.entries or {})}  # each folder's entries as the process sees them
        self._see(self.disk)
        self.open: dict[str, Inode] = {}

    def _see(self, folder: Inode) -> None:
        self.now[folder] = dict(folder.entries or {})
        for child in self.now[folder].values():
            if child.entries is not None:
                self._see(child)

    def add(self, log: str) -> Recording:
        made: Counter[str] = Counter()
        for line in log.splitlines():
            if match := LINE.match(line):
                name, result, before = match[1], int(match[3]), len(self.operations)
                made[name] += 1
                arguments = [_text(argument) for argument in match[2].split(", ")]
                if name == "rmdir" and str(arguments[0]).startswith(self.milestone):
                    self.operations.append(Milestone(str(arguments[0]).removeprefix(self.milestone)))
                elif result >= 0:
                    self._do(name, arguments, str(result))
                    self.calls += [(name, made[name])] * (len(self.operations) > before)
        return self

    def _do(self, name: str, arguments: list[str | bytes], result: str) -> None:
        if name == "openat":
            self._open(*map(str, arguments[:3]), result)
        elif name == "close":
            self.open.pop(str(arguments[0]), None)
        elif name == "fsync" and arguments[0] in self.open:
            self.operations.append(Sync(self.open[str(arguments[0])]))
        elif name == "write" and arguments[0] in self.open:
            content = arguments[1] if isinstance(arguments[1], bytes) else str(arguments[1]).encode("latin1")
            self.operations.append(Data(self.open[str(arguments[0])], content[:int(result)]))
        elif name == "mkdir":
            self._change(str(arguments[0]), Inode(entries={}))
        elif name in ("unlink", "rmdir"):
            self._change(str(arguments[0]), None)
        elif name == "unlinkat":
            self._change(str(arguments[1]), None, str(arguments[0]))
        elif name in ("rename", "link"):
            self._move(str(arguments[0]), str(arguments[1]), keep=name == "link")
        else:
            assert name in ("fsync", "write"), f"{name}{arguments} is not in the model"

    def _open(self, base: str, path: str, flags: str, result: str) -> None:
        place = self._place(path, base)
        if not place:
            return
        folder, name = place
        there = self.now[folder].get(name) if name else folder
        if there is None:
            assert "O_CREAT" in flags
            there = Inode()
            self._change(path, there, base)
        assert "O_TRUNC" not in flags or not any(isinstance(o, Data) and o.file is there for o in self.operations)
        self.open[result] = there

    def _place(self, path: str, base: str = "AT_FDCWD") -> tuple[Inode, str] | None:
        """The folder and the name in it that a path leads to, "" for the folder itself; None outside the root."""
        if path.startswith("/"):
            if not Path(path).is_relative_to(self.root):
                return None
            folder, parts = self.disk, Path(path).relative_to(self.root).parts
        elif base in self.open:
            folder, parts = self.open[base], Path(path).parts
        else:
            return None
        for part in parts[:-1]:
            folder = self.now[folder][part]
        return folder, parts[-1] if parts else ""

    def _change(self, path: str, inode: Inode | None, base: str = "AT_FDCWD") -> None:
        if place := self._place(path, base):
            folder, name = place
            self._record(folder, {name: inode})
            if inode is not None and inode.entries is not None:
                self.now[inode] = {}

    def _move(self, old: str, new: str, keep: bool) -> None:
        if source := self._place(old):
            target = self._place(new)
            assert target
            assert target[0] is source[0], "a rename into another folder is not in the model"
            gone = {} if keep else {source[1]: None}
            self._record(source[0], {**gone, target[1]: self.now[source[0]][source[1]]})

    def _record(self, folder: Inode, changes: dict[str, Inode | None]) -> None:
        self.operations.append(Entry(folder, changes))
        _apply(self.now[folder], changes)

    def states(self, count: int) -> Iterator[Tree]:
        """Each state a power cut after the first `count` operations may leave; with what was lost the most first."""
        entries: dict[Inode, dict[str, Inode]] = {}
        pending: dict[Inode, list[Entry]] = defaultdict(list)
        written: dict[Inode, bytes] = {}
        unsynced: dict[Inode, list[bytes]] = defaultdict(list)
        for operation in self.operations[:count]:
            if isinstance(operation, Entry):
                pending[operation.folder].append(operation)
            elif isinstance(operation, Data):
                unsynced[operation.file].append(operation.content)
            elif isinstance(operation, Sync) and operation.of.entries is not None:
                durable = entries.setdefault(operation.of, dict(operation.of.entries))
                for change in pending.pop(operation.of, []):
                    _apply(durable, change.changes)
            elif isinstance(operation, Sync):
                new = b"".join(unsynced.pop(operation.of, []))
                written[operation.of] = written.get(operation.of, operation.of.content) + new
        reachable = self._reachable(entries, pending)
        changes = [change for folder, group in pending.items() if folder in reachable for change in group]
        if len(changes) > MOST_PENDING:
            raise OverflowError(f"{len(changes)} entries are not durable: too many states")
        for kept in itertools.product((False, True), repeat=len(changes)):
            there = {folder: dict(names) for folder, names in entries.items()}
            for change in itertools.compress(changes, kept):
                _apply(there.setdefault(change.folder, dict(change.folder.entries or {})), change.changes)
            yield from _trees(self.disk, there, written, unsynced)


    def _reachable(self, durable: dict[Inode, dict[str, Inode]], pending: dict[Inode, list[Entry]]) -> set[Inode]:
        """What may still have a name: a folder durably gone makes no difference by what it held."""
        found, next_ones = set(), [self.disk]
        while next_ones:
            inode = next_ones.pop()
            if inode not in found:
                found.add(inode)
                next_ones += durable.get(inode, inode.entries or {}).values()
                next_ones += [there for change in pending.get(inode, []) for there in change.changes.values() if there]
        return found


def _apply(entries: dict[str, Inode], changes: dict[str, Inode | None]) -> None:
    for name, inode in changes.items():
        entries.pop(name, None)
        if inode is not None:
            entries[name] = inode


def _trees(inode: Inode, entries: dict[Inode, dict[str, Inode]], written: dict[Inode, bytes],
           unsynced: dict[Inode, list[bytes]]) -> Iterator[Tree]:
    """A folder with each combination of what may have become of the bytes below it."""
    names = entries.get(inode, inode.entries or {})
    choices = [list(_trees(child, entries, written, unsynced)) if child.entries is not None
               else _contents(written.get(child, child.content), unsynced.get(child, [])) for child in names.values()]
    for combination in itertools.product(*choices):
        yield dict(zip(names, combination, strict=True))


def _contents(durable: bytes, unsynced: list[bytes]) -> list[bytes]:
    """Lost, cut off at each write and inside each, with zeros in the place of each one and of all, and whole."""
    found = [durable]
    for number, content in enumerate(unsynced):
        before = durable + b"".join(unsynced[:number])
        after = b"".join(unsynced[number + 1:])
        found += [before, before + content[:len(content) // 2], before + bytes(len(content)) + after]
    whole = durable + b"".join(unsynced)
    return list(dict.fromkeys([*found, durable + bytes(len(whole) - len(durable)), whole]))


def materialise(tree: Tree, path: Path) -> None:
    path.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            materialise(content, path / name)
        else:
            (path / name).write_bytes(content)


def frozen(tree: Tree) -> tuple[object, ...]:
    return tuple((name, frozen(there) if isinstance(there, dict) else there) for name, there in sorted(tree.items()))


def _text(argument: str) -> str:
    """An argument as strace -xx shows it: strings are quoted and all in hex."""
    if argument.startswith('"'):
        return bytes.fromhex(argument.strip('."').replace("\\x", "")).decode("latin1")
    return argument
