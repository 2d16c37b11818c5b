"""The checkpoints of one run as files: written whole or not at all, verified before use, fenced by terms, retired.

A checkpoint is a folder of files and a MANIFEST.json that vouches for every byte. In a folder (here or shared) it is
written beside its final name, all fsynced, the manifest last, then renamed; in an object store it is written under its
final name and counts once its manifest is there. Nothing is overwritten and nothing is unpickled.

Whoever goes on with a run begins a *term*: `term-000003.json` names the images seen it goes on from. What an older term
commits beyond that (it hung, was stopped, was cut off and came back) does not count, however late it lands. Which
checkpoint is the newest is decided from manifests and terms alone: no clock, no file times, no links.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gradine.configs.schema import EnvironmentFault, Run, UserError
from gradine.stages.store import Store, _write, is_remote, make_folder
from gradine.stages.store import _sync as _sync_folder

T = TypeVar("T")
SCHEMA = 2
READABLE = (1, 2)  # 1: no terms, and a manifest that does not vouch for itself
MANIFEST = "MANIFEST.json"
PARTIAL = ".partial-"  # prefix of a folder still being written, or being deleted
NETWORKS = ("generator", "discriminator", "average")
FILES = frozenset({*(f"{part}.safetensors" for part in (*NETWORKS, "optimizers")), "state.json"})
MOST_JSON = 1 << 20  # bytes; a hostile file is not read into memory. The full networks' safetensors headers have 40 kB
LARGE = 32 << 20  # bytes from which on a file's header is checked before all of it is read
PHASES = ("fade", "hold")
DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EIO})  # else the machine is at fault
PASSING = frozenset({errno.EIO, errno.ESTALE})  # another try may read it; ESTALE of a file that has gone says so then
FOLDER = re.compile(r"r[0-9][A-Za-z0-9.-]*")  # others are not ours
TERM = re.compile(r"term-([0-9]{6,15})\.json")
Ranges = tuple[tuple[int, int], ...]  # of images_seen, each from its first value up to and without its last


class Damaged(ValueError):
    """A checkpoint that must not be used, with the file and the reason."""


class StartedOver(str):
    """The line on a whole checkpoint that does not count because the run was begun anew: nothing is lost with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its state.json describes it; `plan.py` chooses among these."""

    path: str
    resolution: int
    phase: str
    images_seen: int
    stage_end: bool
    term: int = 0  # of the holder that wrote it
    starts: dict[int, int] = field(default_factory=dict, compare=False)  # images seen its term and older ones began at
    skipped: Ranges = ()  # what its lineage left out

    @property
    def name(self) -> str:
        return Path(self.path).name


@dataclass(frozen=True)
class Term:
    """One holder's right to commit. Of the same number there is one alone; a later one ends it."""

    number: int = 0  # 0: without a fence, as tests and single processes have it
    starts: dict[int, int] = field(default_factory=dict)  # images seen that each term so far went on from
    parent: str | None = None  # the checkpoint it went on from
    skipped: Ranges = ()  # whose steps update nothing: roll-backs left them out
    holder: str = ""


def location_of(run: Run, folder: str | Path) -> str:
    """Where the checkpoints of the run in `folder` lie."""
    if run.checkpoints.location:
        return f"{run.checkpoints.location.rstrip('/')}/{run.name}"
    return str(Path(folder) / "checkpoints")


# Writing ------------------------------------------------------------------------------------------------------------


def commit(location: str | Path, name: str, files: Iterable[tuple[str, bytes]], term: Term | None = None) -> str:
    """Writes the files and their manifest so that a checkpoint appears whole or not at all. -> its path.

    Files are asked for one after another: never are two of them in memory. A name that is taken, by a damaged
    checkpoint or one that no longer counts, gets a suffix. Raises OSError or EnvironmentFault if it could not be
    written, Fenced if another holder has gone on; then nothing new counts.
    """
    term = term or Term()
    if is_remote(str(location)):
        return _upload(str(location), f"{name}-t{term.number}", files, term)
    folder = Path(location)
    make_folder(folder)
    partial = folder / f"{PARTIAL}{name}-{term.number}-{os.getpid()}"
    if partial.exists():  # of an attempt of our own that failed
        shutil.rmtree(partial)
    partial.mkdir()
    final = None
    try:
        listing = {}
        for file, content in files:
            _write(partial / file, content)
            listing[file] = content_of(content)
        _write(partial / MANIFEST, manifest(name, listing, term))
        _sync_folder(partial)
        refuse_if_fenced(location, term)
        final = _give_name(partial, folder / name, term)
        _sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            if final:  # its name may be lost in a power cut: what is reported as failed is not to count
                final.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return str(final)


def _give_name(partial: Path, final: Path, term: Term) -> Path:
    suffixes = itertools.chain([f"-t{term.number}"], (f"-t{term.number}-{n}" for n in itertools.count(2)))
    target = final
    while True:
        try:
            partial.rename(target)
            return target
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        target = final.with_name(final.name + next(suffixes))


def _upload(location: str, name: str, files: Iterable[tuple[str, bytes]], term: Term) -> str:
    """No two holders write the same names: the term is one. A retry of the same holder writes the same bytes."""
    store = Store(location)
    listing = {}
    for file, content in files:
        store.write(f"{name}/{file}", content)
        listing[file] = content_of(content)
    refuse_if_fenced(location, term)
    store.write(f"{name}/{MANIFEST}", manifest(name, listing, term))
    return f"{location.rstrip('/')}/{name}"


def content_of(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest(name: str, listing: dict[str, dict[str, Any]], term: Term) -> bytes:
    return sealed({"schema": SCHEMA, "name": name, "term": term.number, "parent": term.parent,
                   "terms": {str(number): start for number, start in term.starts.items()},
                   "created": time.time(), "files": listing})


def sealed(body: dict[str, Any]) -> bytes:
    """JSON text whose last entry is the sha256 of the text without it."""
    text = json.dumps(body, indent=1)
    return f'{text[:-2]},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}'.encode()


# Terms --------------------------------------------------------------------------------------------------------------


class Fenced(EnvironmentFault):
    """Another holder has gone on with the run: what this process still does must not count."""


def myself() -> str:
    """This process, as terms and locks name their holder."""
    return f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"


def begin_term(location: str | Path, start: Checkpoint | None, skipped: Ranges = ()) -> Term:
    """The right to commit what follows `start`, taken from every earlier holder."""
    if not is_remote(str(location)):
        make_folder(Path(location))
        for above in list(Path(location).parents)[:2]:  # whoever made location and run folder may have been killed
            with suppress(PermissionError):  # a folder of others, which may be passed through and not read
                _sync_folder(above)
    store, images_seen = Store(str(location)), start.images_seen if start else 0
    while True:
        known = _starts_of(_described(location)[0]) | terms(location)  # a term file may be gone, its manifests not
        number = max([*_term_numbers(location), *known], default=0) + 1
        term = Term(number, {**known, number: images_seen}, start.name if start else None, skipped, myself())
        body = {"schema": SCHEMA, **vars(term), "starts": {str(n): seen for n, seen in term.starts.items()}}
        if store.create(f"term-{number:06d}.json", sealed(body)):
            return term


def terms(location: str | Path) -> dict[int, int]:
    """Images seen that each term went on from, by its number. What a damaged term file said, others repeat."""
    starts: dict[int, int] = {}
    for number in _term_numbers(location):
        if term := read_term(location, number):
            starts.update(term.starts)
    return starts


def _term_numbers(location: str | Path) -> list[int]:
    return sorted({int(match[1]) for name in _names(location) if (match := TERM.fullmatch(name))})


def read_term(location: str | Path, number: int) -> Term | None:
    """A term as its file tells it; None if that is damaged or of another number. EnvironmentFault if none can tell."""
    try:
        body = opened(_bytes(Store(str(location)), f"term-{number:06d}.json", MOST_JSON))
        if body["number"] != number:
            return None
        return Term(_count(body["number"]), _starts(body["starts"]), body["parent"], _ranges(body["skipped"]),
                    str(body["holder"]))
    except UserError:  # of a key or bucket that is wrong
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def newest_term(location: str | Path) -> Term | None:
    """The newest term that is known: from its file, or from the last checkpoint that it committed and that counts.

    Of a term whose file is damaged or lost before it committed anything nothing is known: neither where it went on
    from nor what it was to skip. Then this is the one before.
    """
    from_files = (read_term(location, number) for number in reversed(_term_numbers(location)))
    term = next((term for term in from_files if term), None)
    last = max(find(location)[0], key=lambda one: (one.term, one.images_seen), default=None)
    if last and last.term > (term.number if term else 0):
        return Term(last.term, last.starts, None, last.skipped)
    return term


def refuse_if_fenced(location: str | Path, term: Term) -> None:
    """Fenced if a later term has begun. Readers keep the same rule: this only spares them the sight."""
    later = [number for number in _term_numbers(location) if number > term.number] if term.number else []
    if later:
        try:
            newest = read_term(location, later[-1])
            holder = newest.holder if newest else "its file is damaged"
        except EnvironmentFault:  # that it is there is enough
            holder = "its file cannot be read"
        raise Fenced(f"{location}: term {later[-1]} ({holder}) has gone on with this run since this process, of term "
                     f"{term.number}, last committed. What it did since does not count; let the other go on.")


# Reading ------------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, bytes]:
    """All files of a checkpoint, verified against its manifest; raises Damaged with the file and the reason.

    EnvironmentFault where the machine is at fault (no right, a server gone, no memory): then nothing is known of it.
    """
    place, listing = Store(str(path)), read_manifest(path)["files"]
    there = _sizes(place)
    if extra := sorted(set(there) - set(listing) - {MANIFEST}):
        raise Damaged(f"{path}/{_shown(extra[0])} is not in the manifest")
    for name, entry in listing.items():  # of all, before any is read
        if (size := there.get(name)) is None:
            raise Damaged(f"{path}/{name} is missing or no plain file")
        if size != entry["bytes"]:
            raise Damaged(f"{path}/{name} has {size:,} bytes, its manifest says {entry['bytes']:,}")
        if size > LARGE and name.endswith(".safetensors"):
            _refuse_false_header(place, name, size)
    files = {}
    for name, entry in listing.items():
        files[name] = _bytes(place, name, MOST_JSON if name == "state.json" else entry["bytes"])
        if content_of(files[name]) != entry:
            raise Damaged(f"{path}/{name} does not match the sha256 in its manifest")
    return files


def read_manifest(path: str | Path) -> dict[str, Any]:
    """A checkpoint's manifest, checked in itself: its own digest, its schema, the names it lists.

    Raises Damaged, and UserError for a whole one of a newer schema: to pass over that would train from an older state.
    """
    where = f"{path}/{MANIFEST}"
    content = _bytes(Store(str(path)), MANIFEST, MOST_JSON)
    try:
        body = json.loads(content)
        schema = body["schema"]
        if type(schema) is not int or schema < 1:
            raise Damaged(f"it says schema={schema!r:.80}")
        if schema != 1:
            body = opened(content)
        if schema not in READABLE:
            raise UserError(f"{path} has schema {schema}: a newer gradine wrote it, this one reads up to {SCHEMA}. "
                            "Install the newer one, or move the checkpoint out of the folder.")
        listing = {name: {"bytes": _count(entry["bytes"]), "sha256": str(entry["sha256"])}
                   for name, entry in body["files"].items()}
        if strangers := sorted(set(listing) ^ FILES):
            raise Damaged(f"it lists other files than a checkpoint has: {strangers[0]!r:.80}")
        return {**body, "files": listing, "terms": _starts(body.get("terms", {})), "term": _count(body.get("term", 0))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(f"{where} cannot be read: {_said(error)}") from error


def opened(content: bytes) -> dict[str, Any]:
    """The body of `sealed` text; Damaged if a single bit of it has changed."""
    try:
        body = json.loads(content)
        del body["sha256"]
        whole = sealed(body) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"it is no sealed JSON: {_said(error)}") from error
    if not whole:
        raise Damaged("its text does not match the sha256 at its end")
    return body


def describe(path: str | Path) -> Checkpoint:
    """What a checkpoint is of, from its manifest and state.json alone; `read` verifies the rest. Raises Damaged."""
    about, where = read_manifest(path), f"{path}/state.json"
    content = _bytes(Store(str(path)), "state.json", MOST_JSON)
    if content_of(content) != about["files"]["state.json"]:
        raise Damaged(f"{where} does not match the sha256 in its manifest")
    info = state_of(content, where)
    return Checkpoint(str(path), info["resolution"], info["phase"], info["images_seen"], info["stage_end"],
                      about["term"], about["terms"], info["skipped"])


def state_of(content: bytes, where: str = "state.json") -> dict[str, Any]:
    """What state.json says, as the newest schema has it, each field that is relied on checked. Raises Damaged."""
    try:
        info = json.loads(content)
        if info["schema"] == 1:  # `skipped` was the count of masked updates there
            info = {**info, "masked": info["skipped"], "skipped": []}
        size = _count(info["resolution"])
        if size in (0, 2) or size & (size - 1) or size > 1 << 20 or info["phase"] not in PHASES:
            raise Damaged(f"resolution={size}, phase={info['phase']!r:.80}")
        if type(info["stage_end"]) is not bool:
            raise Damaged(f"stage_end={info['stage_end']!r:.80}")
        if len(info["masked"]) != 2:
            raise Damaged(f"masked={info['masked']!r:.80}")
        return {**info, "schema": SCHEMA, "images_seen": _count(info["images_seen"]),
                "masked": [_count(number) for number in info["masked"]], "skipped": _ranges(info["skipped"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{where} cannot be used: {_said(error)}") from error


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:  # JSON readers elsewhere hold no larger one
        raise Damaged(f"{value!r:.80} is no count")
    return value


def _starts(entries: Any) -> dict[int, int]:
    return {_count(int(number)): _count(seen) for number, seen in entries.items()}


def _ranges(pairs: Any) -> Ranges:
    if type(pairs) is not list:
        raise Damaged(f"{pairs!r:.80} is no list of ranges")
    return tuple((_count(first), _count(last)) for first, last in pairs)


def _said(error: Exception) -> str:
    """What an error says, in one line of bounded length: part of it may come from the file."""
    text = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:300]


def _shown(name: str) -> str:
    return name if name.isprintable() else f"{name!a}"


def _sizes(place: Store) -> dict[str, int | None]:
    """Bytes of each entry of a checkpoint, None for what is no plain file: a link, a folder, a pipe, a device."""
    if place.remote:
        return dict(place.list())

    def sizes() -> dict[str, int | None]:
        with os.scandir(place.folder) as entries:
            return {entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False)
                    else None for entry in entries}

    return _looked_at(place.shown, sizes)


def _looked_at(where: str, look: Callable[[], T]) -> T:
    """What `look` gives. Damaged if its error is of the file, EnvironmentFault if it is of this machine or user.

    A checkpoint that is taken for damaged is left behind, and ended by the next term.
    """
    for tries_left in (1, 0):
        try:
            return look()
        except OSError as error:
            if tries_left and error.errno in PASSING:
                continue
            if isinstance(error, FileNotFoundError):
                raise Damaged(f"{where} is missing") from error
            if error.errno in DAMAGE:
                raise Damaged(f"{where} cannot be read: {error.strerror}") from error
            raise EnvironmentFault(f"{where} cannot be read: {error.strerror or error}. Give this user the right to "
                                   "read it, or mend the disk; nothing was changed.") from error
    raise AssertionError


def _bytes(place: Store, name: str, most: int) -> bytes:
    """A file's content. Damaged if it is missing, no plain file, or longer than `most` bytes."""
    where = f"{place.shown}/{name}"

    def content() -> bytes:
        if place.remote:
            size = place.size(name)
        else:
            about = (place.folder / name).lstat()
            if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait, a device do anything
                raise Damaged(f"{where} is no plain file")
            size = about.st_size
        if size is None:
            raise Damaged(f"{where} is missing")
        if size > most:
            raise Damaged(f"{where} has {size:,} bytes, more than the {most:,} it may have")
        return place.read(name)

    return _looked_at(where, content)


def _refuse_false_header(place: Store, name: str, size: int) -> None:
    """Damaged for a safetensors file of another length than its header says: seen before all of it is in memory."""
    where = f"{place.shown}/{name}"

    def start() -> tuple[int, bytes]:
        with place.open(name) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MOST_JSON, size - 8):
                raise Damaged(f"{where} claims a header of {length:,} bytes")
            return length, file.read(length)

    length, text = _looked_at(where, start)
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise Damaged(f"{where} has {size:,} bytes, its header says otherwise")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"{where} has no header: {_said(error)}") from error


# Choosing -----------------------------------------------------------------------------------------------------------


def find(location: str | Path) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that count, by images seen and then term, and a line for each folder that does not.

    Raises EnvironmentFault if `location` is there and it or what is in it cannot be read: it must not pass for empty.
    """
    found, passed = _described(location)
    starts = _starts_of(found) | terms(location)
    counting = []
    for one in found:
        ended_by = [number for number, start in starts.items() if number > one.term and start < one.images_seen]
        if ended_by:
            line = (f"{one.name} is of term {one.term}, and term {min(ended_by)} went on from "
                    f"{starts[min(ended_by)]:,} images")
            passed.append(StartedOver(line) if any(starts[number] == 0 for number in ended_by) else line)
        else:
            counting.append(one)
    return sorted(counting, key=lambda one: (one.images_seen, one.resolution, one.term, one.name)), passed


def _described(location: str | Path) -> tuple[list[Checkpoint], list[str]]:
    found, damaged = [], []
    for path in _folders(location):
        try:
            if not is_remote(path) and _looked_at(path, Path(path).is_symlink):  # it may change, and is not ours
                raise Damaged(f"{_shown(path)} is a link, no checkpoint")
            found.append(describe(path))
        except Damaged as error:
            damaged.append(str(error))
    return found, damaged


def refuse_all_lost(found: Sequence[Checkpoint], passed: Sequence[str], location: str | Path) -> None:
    """UserError if checkpoints lie there and not one can be gone on from: a new term at 0 would end them for good.

    `found` are those that count and were not seen to be damaged, `passed` the lines on all the others.
    """
    lost = [line for line in passed if not isinstance(line, StartedOver)]
    if lost and not found:
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(f"{location} holds {len(lost)} checkpoints, and not one can be gone on from: "
                        f"{'; '.join(lost[:3])}{more}. Put them right, or move them out of that folder to start over.")


def _starts_of(found: list[Checkpoint]) -> dict[int, int]:
    return {number: start for one in found for number, start in one.starts.items()}


def _folders(location: str | Path) -> list[str]:
    root, remote = str(location).rstrip("/"), is_remote(str(location))
    names = sorted(name for name in _names(location) if not remote or name.endswith(f"/{MANIFEST}"))
    return [f"{root}/{name}" for name in (name.split("/")[0] for name in names) if FOLDER.fullmatch(name)]


def _names(location: str | Path) -> list[str]:
    """Of the entries of a local folder, or of all files below a remote one."""
    if is_remote(str(location)):
        return [name for name, _ in Store(str(location)).list()]
    try:
        return [path.name for path in Path(location).iterdir()]
    except FileNotFoundError:
        if not Path(location).is_symlink():
            return []
        raise EnvironmentFault(f"{location} is a link to a folder that is not there. Mount or make it.") from None
    except OSError as error:
        raise EnvironmentFault(f"{location} cannot be listed: {error.strerror}. Make it a readable folder.") from error


def newest_valid(found: list[Checkpoint]) -> tuple[tuple[Checkpoint, dict[str, bytes]] | None, list[str]]:
    """The last of `found` that is valid, with its files, or None; and a line for each damaged one passed over."""
    damaged: list[str] = []
    for candidate in reversed(found):
        try:
            return (candidate, read(candidate.path)), damaged
        except Damaged as error:
            damaged.append(str(error))
    return None, damaged


# Cleaning -----------------------------------------------------------------------------------------------------------


def retire(location: str | Path, keep: int, now: int, pinned: Collection[str] = (),
           valid: set[str] | None = None, found: list[Checkpoint] | None = None) -> list[str]:
    """Deletes checkpoints inside stages up to images_seen `now` but the newest `keep` valid ones. -> names deleted.

    Never a stage's final one nor a pinned one. Later ones were passed over as damaged: they neither count nor go, and
    neither do those that do not count. In an object store the kept ones are not read again to see that they are valid;
    nor are those whose paths are in `valid`, to which those that were read are added and of which the deleted go.
    found: what `find` says now, if the caller has just asked it.
    """
    valid = set() if valid is None else valid
    found = find(location)[0] if found is None else found
    inside = [c for c in found if not c.stage_end and c.images_seen <= now and c.name not in pinned]
    kept = 0
    for number, checkpoint in enumerate(reversed(inside)):
        if kept == keep:
            doomed = inside[:len(inside) - number]
            break
        if checkpoint.path not in valid and _is_valid(checkpoint):
            valid.add(checkpoint.path)
        kept += checkpoint.path in valid
    else:
        return []
    for checkpoint in doomed:
        valid.discard(checkpoint.path)  # a later one may get its name
        delete(checkpoint.path)
    return [checkpoint.name for checkpoint in doomed]


def _is_valid(checkpoint: Checkpoint) -> bool:
    if is_remote(checkpoint.path):
        return True
    try:
        return bool(read(checkpoint.path))
    except Damaged:
        return False


def delete(path: str) -> None:
    """From the first moment on the checkpoint is an orphan, whatever happens while the rest goes."""
    if is_remote(path):
        store = Store(path)
        store.remove(MANIFEST)
        for name, _ in store.list():
            store.remove(name)
        return
    doomed = Path(path).with_name(f"{PARTIAL}{Path(path).name}-retired")
    if doomed.exists():  # of a deletion that failed half-way
        shutil.rmtree(doomed)
    Path(path).rename(doomed)
    _sync_folder(doomed.parent)  # else a power cut may undo the rename and not what is deleted after it
    shutil.rmtree(doomed)


def remove_orphans(location: str | Path) -> list[str]:
    """Deletes what a killed save or clean-up left. For the start of a run: its lock and term are the caller's."""
    if is_remote(str(location)):
        return _remove_remote_orphans(str(location))
    folders = sorted(Path(location).glob(f"{PARTIAL}*"))
    files = sorted(path for path in Path(location).glob("*.partial") if path.is_file() and path not in folders)
    for path in folders:
        with suppress(FileNotFoundError):  # a fenced holder, not dead yet, may delete it too
            shutil.rmtree(path)
    for path in files:
        path.unlink(missing_ok=True)
    return [path.name for path in (*folders, *files)]


def _remove_remote_orphans(location: str) -> list[str]:
    store = Store(location)
    names = [name for name, _ in store.list() if re.match(r"r\d.*/", name)]
    whole = {name.split("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}
    orphaned = [name for name in names if name.split("/")[0] not in whole]
    for name in orphaned:
        store.remove(name)
    return sorted({name.split("/")[0] for name in orphaned})
