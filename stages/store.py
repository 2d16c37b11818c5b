"""A place for files: a local folder, an object-store prefix (s3://, gs://) or a web folder (http(s)://, read only).

Sizes are bytes, times seconds. What networks do now and then (5xx, resets, stalls, half bodies) is tried again until
`deadline_s` has passed for the file: then EnvironmentFault. What another try cannot mend (a wrong key, no such bucket)
is a UserError at once. No message holds the user, the password or the query of a URL.
"""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from gradine.configs.schema import EnvironmentFault, UserError, require
from gradine.stages.remote import BLOCK, EXTRA, SILENCE_S, SLOWEST, Objects, Passing, Web, judged

Ask = Callable[[Any], Coroutine[Any, Any, Any]]
NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK,
                      524})  # what disks without hard links say; 524 is the kernel's own ENOTSUPP, which some let out
logger = logging.getLogger(__name__)


def is_remote(location: str) -> bool:
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location))


def write_atomic(path: Path, content: bytes) -> None:
    """The whole new file or the old one, also after a power cut."""
    with _whole(path) as file:
        file.write(content)


@contextmanager
def _whole(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """A file to fill that gets its name, on the disk, only when all is written; FileExistsError if `exclusive`."""
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _take_name(partial, path)
            partial.unlink()
        else:
            partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk its bytes are missed
        raise
    _sync(path.parent)


def _take_name(partial: Path, path: Path) -> None:
    """Gives what is written the name `path` too, which it never replaces: FileExistsError.

    Where there are no hard links the name comes before the content, and a kill in between leaves a torn file.
    """
    try:
        path.hardlink_to(partial)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _write(path, partial.read_bytes())


def _write(path: Path, content: bytes) -> None:
    """A new file, on the disk; its name is once the folder is synced too. FileExistsError if there is one."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Creates a folder and those above it so that a power cut does not take them back."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Of a file: its content is on the disk. Of a folder: the names in it are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store:
    """Files below one location, by their path there. Threads may share it; a pickle holds the location alone."""

    def __init__(self, location: str, deadline_s: float = 600.0) -> None:
        self.location, self.deadline_s, self.remote = location, deadline_s, is_remote(location)
        self._connections: dict[int, Objects | Web] = {}  # by process: an event loop does not outlive a fork
        self.closed = False  # true: another thread's requests end at their next try
        self.shown = location
        if self.remote:
            parts = urlsplit(location)
            self.scheme, host = parts.scheme.lower(), parts.netloc.rpartition("@")[2]
            self.shown = urlunsplit((self.scheme, host, parts.path, "", ""))
            require(self.scheme in EXTRA and host != "", f"{self.shown!r} is no location. Use a path, s3://BUCKET/..., "
                                                         "gs://BUCKET/... or http(s)://HOST/...")
        else:
            self.folder = Path(location).expanduser().absolute()

    def __reduce__(self) -> tuple[type[Store], tuple[str, float]]:
        return Store, (self.location, self.deadline_s)

    def list(self) -> list[tuple[str, int]]:
        """(path, bytes) of every file below the location, sorted by path; unfinished local ones are left out.

        A web folder is what its index page links to below itself, and so on; its sizes are unknown, -1.
        """
        if not self.remote:
            return sorted(self._walk())
        if self.scheme in ("s3", "gs"):
            return sorted(self._try("listed", "", lambda objects: objects.list()))
        found: list[str] = []
        folders, seen = [""], {""}
        while folders:
            for name in self._links(folders.pop()):
                if name not in seen:
                    seen.add(name)
                    (folders if name.endswith("/") else found).append(name)
        return sorted((name, -1) for name in found)

    def size(self, name: str) -> int | None:
        """Bytes; -1 if the server does not say; None if there is no such file."""
        try:
            if self.remote:
                return self._try("looked up", name, lambda there: there.head(name), 0)[0]
            return self._path(name).stat().st_size if self._path(name).is_file() else None
        except FileNotFoundError:
            return None

    def modified(self, name: str) -> float:
        """When a file was written, in seconds, by the disk's or server's clock. FileNotFoundError if there is none."""
        if not self.remote:
            return self._path(name).stat().st_mtime
        self._refuse_web("dated")
        return self._try("looked up", name, lambda objects: objects.modified(name), 0)

    def read(self, name: str) -> bytes:
        if not self.remote:
            return self._path(name).read_bytes()
        return self._try("read", name, lambda there: there.read(name))

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in; first downloaded to a nameless one where a web server serves no ranges."""
        if not self.remote:
            return self._path(name).open("rb")
        size, ranges = self._try("looked up", name, lambda there: there.head(name), 0)
        if ranges:
            return io.BufferedReader(_Ranges(lambda *span: self._range(name, *span), size), 1 << 20)
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        self._download(name, file)
        file.seek(0)
        return file

    def write(self, name: str, content: bytes) -> None:
        """The whole new file or the old one."""
        if not self.remote:
            return write_atomic(self._path(name), content)
        self._refuse_web("written")
        return self._try("written", name, lambda objects: objects.pipe(name, content), len(content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that does not exist yet; False, and nothing has changed, if it does. Of many at once, one wins.

        On a disk without hard links one that is killed meanwhile leaves a file with a part of the content, or none.
        A server that ignores If-None-Match (the JuiceFS gateway is one) is asked first whether the file exists; two
        that ask it within the same round trip both win, and the later content stays.
        """
        if not self.remote:
            try:
                with _whole(self._path(name), exclusive=True) as file:
                    file.write(content)
                return True
            except FileExistsError:
                return False
        self._refuse_web("written")
        if self.size(name) is not None:
            return False
        writer = secrets.token_hex(16)
        try:
            self._try("created", name, lambda objects: objects.pipe(name, content, writer), len(content))
            return True
        except FileExistsError:  # if an answer was lost on the way, the file that is there may be this one
            return self._try("looked up", name, lambda objects: objects.writer(name), 0) == writer

    def put(self, local: Path, name: str) -> None:
        """A finished local file becomes `name`, whole or not at all, and is gone from where it was."""
        if self.remote:
            self._refuse_web("written")
            self._try("uploaded", name, lambda objects: objects.put(local, name), local.stat().st_size)
            return local.unlink()
        path = self._path(name)
        make_folder(path.parent)
        try:
            _sync(local)
            local.rename(path)
            return _sync(path.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:  # another disk
                raise
        self._copy(local, path)
        return local.unlink()

    def remove(self, name: str) -> None:
        """No such file any more, whether there was one or not."""
        if not self.remote:
            return self._path(name).unlink(missing_ok=True)
        self._refuse_web("removed")
        try:
            return self._try("removed", name, lambda objects: objects.remove(name), 0)
        except FileNotFoundError:
            return None

    def fetch(self, name: str, local: Path) -> None:
        """`name` as a local file, whole or not at all."""
        if not self.remote:
            return self._copy(self._path(name), local)
        with _whole(local) as file:
            return self._download(name, file)

    def _below(self, name: str) -> str:
        require(not name.startswith("/") and ".." not in name.split("/"),
                f"{name!r} is no path below {self.shown}: names neither start with / nor hold `..`.")
        return name

    def _path(self, name: str) -> Path:
        return self.folder / self._below(name)

    def _walk(self) -> Iterator[tuple[str, int]]:
        def told(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error  # else what a folder holds would go missing unsaid

        for folder, folders, names in os.walk(self.folder, onerror=told, followlinks=True):
            here = Path(folder).resolve()
            folders[:] = [name for name in folders if not name.startswith(".partial-") and not (
                Path(folder, name).is_symlink() and here.is_relative_to(Path(folder, name).resolve()))]  # it never ends
            paths = [Path(folder, name) for name in names if not name.endswith(".partial")]
            yield from ((p.relative_to(self.folder).as_posix(), p.stat().st_size) for p in paths if p.is_file())

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        with source.open("rb") as old, _whole(target) as new:
            shutil.copyfileobj(old, new, 1 << 20)

    def _refuse_web(self, doing: str) -> None:
        require(self.scheme in ("s3", "gs"), f"{self.shown} cannot be {doing}: http(s):// is read only. "
                                             "Use a folder, s3:// or gs://.")

    def _links(self, page: str) -> Any:
        return self._try("listed", page, lambda web: web.links(page))

    def _download(self, name: str, file: BinaryIO) -> None:
        size, ranges = self._try("looked up", name, lambda there: there.head(name), 0)
        if not ranges:
            return self._try("read", name, lambda web: web.stream(name, file))
        began = time.monotonic()
        for start in range(0, size, BLOCK):
            file.write(self._range(name, start, min(start + BLOCK, size), began))
        return None

    def _range(self, name: str, start: int, stop: int, began: float | None = None) -> bytes:
        return self._try("read", name, lambda there: there.range(name, start, stop), stop - start, began)

    def _there(self) -> Objects | Web:
        process = os.getpid()
        if process not in self._connections:
            kind = Objects if self.scheme in ("s3", "gs") else Web
            try:
                self._connections.setdefault(process, kind(self.location))
            except ImportError:
                raise UserError(f"{self.shown} needs more packages. Install them: "
                                f"pip install 'gradine[{EXTRA[self.scheme]}]'") from None
        return self._connections[process]

    def _try(self, doing: str, name: str, ask: Ask, size: float = math.inf, began: float | None = None) -> Any:
        """The answer to `ask`, which moves `size` bytes, tried with growing pauses until the deadline.

        `began`: when the first of several requests for one file was made.
        """
        import tenacity  # here, so that a run on local folders does not wait for the imports
        from fsspec.asyn import sync

        began, what = began or time.monotonic(), f"{self.shown.rstrip('/')}/{self._below(name)}"

        def once() -> Any:
            if self.closed:
                raise EnvironmentFault(f"{what} is not {doing} any more: its reader was closed.")
            left = self.deadline_s - (time.monotonic() - began)
            limit = max(0.01, min(left, 3 * SILENCE_S + size / SLOWEST))
            try:
                there = self._there()
                return sync(there.fs.loop, ask, there, timeout=limit)
            except Exception as error:
                raise judged(error, what, self.scheme, limit) from None

        def tell(state: tenacity.RetryCallState) -> None:
            if state.outcome and state.next_action:
                logger.warning("%s not %s yet (%s): again in %.1f s", what, doing, state.outcome.exception(),
                               state.next_action.sleep)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_before_delay(began + self.deadline_s - time.monotonic()),
            retry=tenacity.retry_if_exception_type(Passing),
            wait=tenacity.wait_exponential(0.2, max=20) + tenacity.wait_random(0, 0.5),
            before_sleep=tell, reraise=True)
        try:
            return retrying(once)
        except Passing as error:
            tries = retrying.statistics["attempt_number"]
            raise EnvironmentFault(
                f"{what} could not be {doing} in {time.monotonic() - began:.0f} s, {tries} tries; the last: {error}. "
                f"See that network and server work, or set data.deadline_s above {self.deadline_s:g}, "
                "then run the same command again.") from None


class _Ranges(io.RawIOBase):
    """A remote file whose parts are read as they are asked for."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.read_range, self.size, self.position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readall(self) -> bytes:  # the inherited one asks for 8 KiB at a time
        parts = []
        while part := self.read(BLOCK):
            parts.append(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + min(len(buffer), BLOCK), self.size)
        if stop <= self.position:
            return 0
        content = self.read_range(self.position, stop)
        buffer[:len(content)] = content
        self.position = stop
        return len(content)
