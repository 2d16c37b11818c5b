"""Who may write to a run: one process at a time, also where several machines see one disk.

On a local disk this is the kernel's flock: free at once when its holder dies. On a shared disk, and in an object store,
it is a lease: the file with the highest number in `lease/`, renewed every 15 s, free 60 s after its last renewal, or at
once for who sees that its holder is dead: a process of the same machine and pid namespace. Who takes it creates the
next number exclusively: of many one wins, a kill at any moment leaves a lease that expires, and who had it before sees
the higher number. No two machines' clocks are compared: a lease is as old as the place's own times say, beside that of
a file written just now.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from gradine.configs.schema import EnvironmentFault, UserError
from gradine.stages.commits import myself
from gradine.stages.store import Store, is_remote, make_folder, write_atomic

LEASE_S, RENEW_S = 60.0, 15.0
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "ramfs", "overlay",
         "fuse.fuse-overlayfs", "fuseblk", "vfat", "exfat", "ntfs3"}
SHARED = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "9p", "virtiofs", "glusterfs", "beegfs",
          "afs", "ocfs2", "gfs2", "wekafs", "panfs", "fuse"}


class InUse(UserError):
    """Another process holds what was asked for: the fact alone, and with the way out."""

    def __init__(self, fact: str, way_out: str) -> None:
        super().__init__(f"{fact}. {way_out}")
        self.fact = fact


class Held:
    """What is held, for its holder to look at now and then."""

    def __init__(self) -> None:
        self.locks: list[Flock | Lease] = []

    @property
    def lost(self) -> str | None:
        """Why another process has it now, in one line, or None."""
        return next((lock.lost for lock in self.locks if lock.lost), None)


@contextmanager
def held(folder: Path, take_over: bool = False, disk: str = "", lease_s: float = LEASE_S,
         renew_s: float = RENEW_S) -> Iterator[Held]:
    """Holds a run folder; UserError naming the holder if another process does.

    `take_over` takes a lease whose holder may be alive. `disk`: `local`, `shared` or `unknown` instead of what it is.
    """
    with _held(folder, f"run folder {folder}", "", take_over, disk, lease_s, renew_s) as now:
        yield now


@contextmanager
def _held(folder: Path, what: str, prefix: str, take_over: bool, disk: str, lease_s: float,
          renew_s: float) -> Iterator[Held]:
    make_folder(folder)
    disk, now = disk or disk_kind(folder), Held()
    with ExitStack() as stack:
        if disk != "shared":
            now.locks.append(stack.enter_context(Flock(folder / f"{prefix}lock", what, take_over, disk == "local")))
        if disk != "local":
            place = Disk(folder / f"{prefix}lease")
            now.locks.append(stack.enter_context(Lease(place, what, take_over, lease_s, renew_s)))
        yield now


@contextmanager
def lease(location: str, take_over: bool = False, lease_s: float = LEASE_S, renew_s: float = RENEW_S,
          disk: str = "") -> Iterator[Held]:
    """Holds a location of checkpoints: a folder like `held`, an object store's prefix by a lease."""
    what = f"{Store(location).shown} (checkpoints.location)"
    if not is_remote(location):  # its own names: it may be the run folder, which this process holds already
        with _held(Path(location), what, "checkpoints-", take_over, disk, lease_s, renew_s) as now:
            yield now
        return
    now = Held()
    with Lease(Objects(location, deadline_s=2 * renew_s), what, take_over, lease_s, renew_s) as taken:
        now.locks.append(taken)
        yield now


def disk_kind(path: Path, mounts: str | None = None) -> str:
    """`local`, `shared` or `unknown`: what the mount that `path` lies on is. `mounts`: text as of /proc/mounts."""
    if mounts is None:
        try:
            mounts = os.fsdecode(Path("/proc/mounts").read_bytes())
        except OSError:  # no Linux
            return "unknown"
    here, found = path.resolve(), (0, "")
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        if here.is_relative_to(point) and len(Path(point).parts) >= found[0]:  # of two on one point the later one shows
            found = len(Path(point).parts), kind
    kind = found[1]
    return "local" if kind in LOCAL else "shared" if kind in SHARED or kind.startswith("fuse.") else "unknown"


def process() -> dict[str, Any]:
    """Which process this is, for another one to find out later whether it lives; {} where that cannot be known."""
    try:
        return {"pid": os.getpid(), "host": socket.gethostname(),
                "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                "pid_namespace": Path("/proc/self/ns/pid").stat().st_ino, "started": _started(os.getpid())}
    except OSError:  # no Linux
        return {}


def _started(pid: int) -> int:
    """When a process started, in the kernel's ticks since boot. OSError if there is none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _gone(other: Any) -> bool:
    """Whether the process that `process` described is certainly dead.

    Only who shares its machine, boot and pid namespace can tell: elsewhere its pid means nothing. A namespace's number
    is given anew only after all its processes died, so that what this one lacks is dead in either.
    """
    mine = process()
    if not mine or not isinstance(other, dict) or other.keys() != mine.keys():
        return False
    if any(other[name] != mine[name] for name in ("host", "boot", "pid_namespace")):
        return False
    try:
        os.kill(other["pid"], 0)
        return _started(other["pid"]) != other["started"]  # its pid is another's now, such as 1 in a new container
    except ProcessLookupError:
        return True
    except (OSError, TypeError, ValueError, OverflowError):  # another user's, or no pid
        return False


class Flock:
    """The kernel's lock on a file, which holds the name of its holder."""

    def __init__(self, path: Path, what: str, take_over: bool, certain: bool) -> None:
        self.path, self.what, self.take_over, self.certain = path, what, take_over, certain

    def __enter__(self) -> Flock:
        self.file = self.path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise InUse(f"{self.what} is in use by {holder}", self._way_out(holder)) from None
        except OSError:  # a disk without flock
            if self.certain:
                self.file.close()
                raise
        with suppress(OSError):  # on a full disk it holds all the same, without a name
            self.file.truncate(0)
            self.file.write(myself())
            self.file.flush()
        return self

    def _way_out(self, holder: str) -> str:
        if self.take_over:
            here = holder.replace(socket.gethostname(), "this host").partition(" since ")[0]
            return f"--take-over does not help against a live process: end {here}, then give the same command again."
        return "Wait for it, stop it, or give this run another name=."

    @property
    def lost(self) -> str | None:
        """A lock file that someone removed locks nobody out; whoever made it anew holds that one."""
        with suppress(OSError):
            if self.path.stat().st_ino != os.fstat(self.file.fileno()).st_ino:
                return f"{self.what} was taken over by {self.path.read_text() or 'another process'}: lock was replaced"
        return None

    def __exit__(self, *_: object) -> None:
        self.file.close()


class Place(Protocol):
    """Where leases lie, by number from 1."""

    def highest(self) -> int: ...  # 0: none

    def read(self, number: int) -> bytes: ...  # b"": none

    def create(self, number: int, content: bytes) -> bool: ...  # of many at once, one gets True

    def write(self, number: int, content: bytes) -> None: ...  # it is as of now

    def age_s(self, number: int) -> float: ...  # since it was written, by the place's own clock

    def expire(self, number: int) -> None: ...  # where it cannot be written

    def forget(self, below: int) -> None: ...


class Lease:
    """The highest number at a place, while its holder renews it."""

    def __init__(self, place: Place, what: str, take_over: bool, lease_s: float, renew_s: float) -> None:
        self.place, self.what, self.take_over, self.lease_s, self.renew_s = place, what, take_over, lease_s, renew_s
        self.mine = json.dumps({"holder": myself(), "process": process(), "token": secrets.token_hex(8)}).encode()
        self.ended, self.looking = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._lost: str | None = None

    def __enter__(self) -> Lease:
        newest = self.place.highest()
        if newest and not self.take_over:
            self._refuse_live(newest)
        self.number = newest + 1
        if not self.place.create(self.number, self.mine) and self.place.read(self.number) != self.mine:
            self._refuse(self.number, "It took it at this very moment")
        if (newest := self.place.highest()) > self.number:  # a shared disk may have shown an old list of them before
            self._refuse(newest, "It took it at this very moment")
        self.place.forget(self.number)
        self.looked = time.monotonic()
        self.thread.start()
        return self

    def _refuse_live(self, number: int) -> None:
        age, content = self.place.age_s(number), _parsed(self.place.read(number))
        # One written in the future is live too.
        if age <= self.lease_s and not content.get("released") and not _gone(content.get("process")):
            self._refuse(number, f"It gave a sign of life {max(age, 0):.0f} s ago; if it is dead, this is free "
                                 f"{self.lease_s:.0f} s after the last")

    def _refuse(self, number: int, sign: str) -> None:
        raise InUse(f"{self.what} is in use by {self._holder(number)}", f"{sign}. Wait for it, stop it, give this run "
                    "another name=, or add --take-over: then what that process saves from now on does not count.")

    def _holder(self, number: int) -> str:
        return _parsed(self.place.read(number)).get("holder") or "another process"

    def _keep(self) -> None:
        while not self.ended.wait(self.renew_s):
            self.look()

    def look(self) -> None:
        """Renews the lease, or finds that it is another's now."""
        with self.looking:
            if self._lost or self.ended.is_set():
                return
            try:
                newest = self.place.highest()
                if newest > self.number or self.place.read(self.number) not in (self.mine, b""):
                    self._lost = f"{self.what} was taken over by {self._holder(max(newest, self.number))}"
                else:
                    self.place.write(self.number, self.mine)
            except (OSError, EnvironmentFault, UserError):
                pass  # disk or network are away; until another process has taken it, it is this one's
            self.looked = time.monotonic()

    @property
    def lost(self) -> str | None:
        if time.monotonic() - self.looked > self.lease_s:  # this process was stopped: its thread may not have woken yet
            self.look()
        return self._lost

    def __exit__(self, *_: object) -> None:
        with self.looking:  # what comes after would renew it again
            self.ended.set()
        self.thread.join()
        if self._lost:
            return
        try:
            if self.place.highest() == self.number and self.place.read(self.number) == self.mine:
                self.place.write(self.number, json.dumps({**_parsed(self.mine), "released": True}).encode())
        except (OSError, EnvironmentFault, UserError):
            with suppress(OSError, EnvironmentFault, UserError):
                self.place.expire(self.number)


def _parsed(content: bytes) -> dict[str, Any]:
    """{} for the file of a process that was killed before it wrote its name."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


class Disk:
    """Leases in a folder, on a disk that several machines may see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def highest(self) -> int:
        make_folder(self.folder)
        return max((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), default=0)

    def read(self, number: int) -> bytes:
        try:
            return self._path(number).read_bytes()
        except FileNotFoundError:
            return b""

    def create(self, number: int, content: bytes) -> bool:
        try:
            with self._path(number).open("xb") as file:  # unlike a link, every shared disk has it
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return True
        except FileExistsError:
            return False

    def write(self, number: int, content: bytes) -> None:
        try:
            write_atomic(self._path(number), content)
        except OSError:
            if self.read(number) != content:
                raise
            os.utime(self._path(number))  # a full disk still takes a new time

    def age_s(self, number: int) -> float:
        """Opens what it looks at: a name's cached attributes may be of a minute ago on NFS."""
        probe = self.folder / f"probe-{secrets.token_hex(8)}"
        try:
            with probe.open("xb") as file:
                file.write(b".")
                file.flush()
                os.fsync(file.fileno())
                now = os.fstat(file.fileno()).st_mtime
            with self._path(number).open("rb") as file:
                return now - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)

    def expire(self, number: int) -> None:
        os.utime(self._path(number), (0, 0))

    def forget(self, below: int) -> None:
        """Removes older leases, and probes of processes that were killed."""
        for path in self.folder.iterdir():
            if not path.name.isdigit() or int(path.name) < below:
                with suppress(OSError):
                    path.unlink()


class Objects:
    """Leases below an object store's prefix; its server stamps what it is given with its own time."""

    def __init__(self, location: str, deadline_s: float) -> None:
        self.store = Store(f"{location.rstrip('/')}/lease", deadline_s)

    def highest(self) -> int:
        return max((int(name) for name, _ in self.store.list() if name.isdigit()), default=0)

    def read(self, number: int) -> bytes:
        try:
            return self.store.read(f"{number:06d}")
        except FileNotFoundError:
            return b""

    def create(self, number: int, content: bytes) -> bool:
        return self.store.create(f"{number:06d}", content)

    def write(self, number: int, content: bytes) -> None:
        self.store.write(f"{number:06d}", content)

    def age_s(self, number: int) -> float:
        self.store.write("probe", b".")
        try:
            return self.store.modified("probe") - self.store.modified(f"{number:06d}")
        except FileNotFoundError:
            return float("inf")

    def expire(self, number: int) -> None:
        """It expires by itself."""

    def forget(self, below: int) -> None:
        for name, _ in self.store.list():
            if name.isdigit() and int(name) < below:
                with suppress(EnvironmentFault, UserError):  # a key may lack the right
                    self.store.remove(name)
