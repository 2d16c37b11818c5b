"""Any pile of images -> per-resolution WebDataset shards + index, over Ray tasks.

<out>/r0064/000012.tar       plain WebDataset: <key>.<ppm, pgm, png, webp or jpg> and, with labels, <key>.cls
<out>/r0064/index.json       per shard bytes, sha256, image count, labels; written last
<out>/parts/000012.json      what slice 12 of the source gave: a second run makes only the slices that lack one
<out>/source.json            the source's digest and the settings that shaped the pixels
<out>/sources.jsonl          key, path and label of every source image
<out>/rejected.jsonl         path and reason of each image that could not be used

Every tar is a pure function of its slice of the source list, which is sorted; images that are added later come after
it, in slices of their own. Each image is decoded once; its levels are a chain of 2x2 means, rounded only when written.
<out> is a folder or the prefix of an object store.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from gradine.configs.schema import Data, EnvironmentFault, UserError, require
from gradine.pipeline.cluster import cancel
from gradine.pipeline.sources import Listing, digest, list_source, locate, read_images
from gradine.stages.growth import resolutions
from gradine.stages.pixels import Rejected, colour, encode, levels, open_image, squares, suffix
from gradine.stages.store import Store, is_remote

SCHEMA = 2
SHAPING = ("channels", "crop", "crop_seed", "small", "background", "labels", "encoding", "max_pixels", "shard_images")


@dataclass(frozen=True)
class Entry:
    """One source image; `key` is its place in the list, whatever happens to the others."""

    key: str
    path: str
    size: int
    label: int | None


# One slice: source images -> a tar per level ------------------------------------------------------------------------


class Tar:
    """A tar whose bytes are a function of its members alone, hashed as they are written."""

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.file, self.hash = path.name, path, path.open("wb"), hashlib.sha256()
        self.tar = tarfile.TarFile(fileobj=self, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def tell(self) -> int:
        return self.file.tell()

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        return self.file.write(content)

    def add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # its time is 0, its owner nobody
        member.size, member.mode = len(content), 0o644
        self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self.tar.close()
        self.file.close()


def make_slice(source: str, entries: list[Entry], number: int, data: Data, resolution: int) -> dict[str, Any]:
    """Writes shard `number` of every level, then its part file; returns the part. Same input, same bytes."""
    out, sizes = Store(data.shards, data.deadline_s), list(resolutions(resolution))
    kinds = {size: data.encoding_of(size) for size in sizes}
    rejected, labels, hashed = [], [], hashlib.sha256()
    source_bytes = upscaled = 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(
            prefix=".partial-", dir=None if out.remote else out.location)))
        tars = {size: Tar(scratch / f"{size}.tar") for size in sizes}
        for tar in tars.values():
            stack.callback(tar.file.close)
        read = read_images(source, [entry.path for entry in entries], data.deadline_s)
        for entry, (_, content_of) in zip(entries, read, strict=True):
            try:
                content = content_of()
                hashed.update(hashlib.sha256(content).digest())
                source_bytes += len(content)
                image = open_image(content, data)
                samples = [_encoded_levels(square, kinds) for square in squares(image, entry.path, data, resolution)]
            except (UserError, EnvironmentFault, MemoryError):  # of the machine, not of the image
                raise
            except Exception as error:  # any decoder may fail in any way on a bad file: it is set aside with its reason
                if isinstance(error, OSError) and error.errno:
                    raise  # the machine's: a file that is gone or cannot be read, a full disk
                reason = str(error) if isinstance(error, Rejected) else f"{type(error).__name__}: {error}"
                rejected.append({"path": entry.path, "reason": " ".join(reason.split())})
                continue
            upscaled += len(samples) if min(image.size) < resolution and data.small == "upscale" else 0
            for crop, sample in enumerate(samples):
                key = entry.key if data.crop in ("centre", "none") else f"{entry.key}-{crop:03d}"
                labels.append(entry.label)
                for size, encoded in sample.items():
                    tars[size].add(f"{key}.{suffix(kinds[size], data.channels)}", encoded)
                    if entry.label is not None:
                        tars[size].add(f"{key}.cls", str(entry.label).encode())
        made: dict[str, Any] = {}
        for size, tar in tars.items():
            tar.close()
            name, length = f"{number:06d}.tar", tar.path.stat().st_size
            out.put(tar.path, f"r{size:04d}/{name}")
            made[str(size)] = {"file": name, "bytes": length, "images": len(labels), "sha256": tar.hash.hexdigest()}
    part = {"made_from": slice_digest(entries, data, resolution), "images": len(labels), "rejected": rejected,
            "upscaled": upscaled, "labels": labels if any(label is not None for label in labels) else [],
            "content": hashed.hexdigest(), "source_bytes": source_bytes, "levels": made}
    out.write(f"parts/{number:06d}.json", json.dumps(part).encode())
    return part


def _encoded_levels(square: Any, kinds: dict[int, str]) -> dict[int, bytes]:
    return {size: encode(level, kinds[size]) for size, level in levels(square)}


def slice_digest(entries: list[Entry], data: Data, resolution: int) -> str:
    """Names what a slice's tars are made from: its source files by path and size, and the settings of their pixels."""
    settings = [getattr(data, name) for name in SHAPING]
    made_from = [*(astuple(entry) for entry in entries), settings, resolution, SCHEMA]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


# The whole set ------------------------------------------------------------------------------------------------------


def shard(data: Data, resolution: int, progress: Callable[[int, int], None] = lambda *_: None,
          add: bool = False) -> dict[str, Any]:
    """Makes what is missing of data.shards, on the Ray this process is connected to, and returns a summary.

    `add` appends what the source has gained to a finished set; its shards stay as they are. Raises UserError for an
    unusable source, for shards made from something else, and when more than data.max_rejected_share of the images are
    bad; `rejected.jsonl` then says which and why.
    """
    data = replace(data, shards=absolute_location(data.shards))  # tasks run in folders of their own
    source, out = locate(data.source), Store(data.shards, data.deadline_s)
    colour(data.background)
    made_from = {"schema": SCHEMA, "resolution": resolution, **{name: getattr(data, name) for name in SHAPING},
                 "listing": digest(source, data.labels, data.deadline_s)}
    named = data.source if data.source.startswith("bundled:") else Store(source).shown
    there = dict(out.list())
    finished = _finished_generations(out, there)
    before = _refuse_other_shards(out, there, {**made_from, "source": named}, bool(finished))
    with _held(out):
        entries, about = _entries(source, data, out, before, finished, {**made_from, "source": named}, add)
        if before is None and not out.create("source.json", json.dumps(about, indent=1).encode()):
            raise UserError(f"shards {out.shown} are being made by another process. Wait for it, then run again.")
        _write(out, "sources.jsonl", "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))
        _write(out, "source.json", json.dumps(about, indent=1))
        slices = list(_slices(entries, about["generations"], data.shard_images))
        kept = len(list(_slices(entries, finished, data.shard_images)))
        parts = {n: part for n, own in enumerate(slices)
                 if (part := _finished_part(out, there, n, slice_digest(own, data, resolution)))
                 and (n < kept or not part["rejected"])}  # until then a bad image may be mended and tried again
        missing = [n for n in range(len(slices)) if n not in parts]
        progress(len(parts), len(slices))
        for number, part in _over_ray(source, slices, missing, data, resolution):
            parts[number] = part
            progress(len(parts), len(slices))
        ordered = [parts[n] for n in sorted(parts)]
        rejected = [line for part in ordered for line in part["rejected"]]
        _write(out, "rejected.jsonl", "".join(json.dumps(line) + "\n" for line in rejected))
        _refuse_torn_set(rejected, len(entries), data)
        for size in resolutions(resolution):
            _write(out, f"r{size:04d}/index.json", json.dumps(_index(size, ordered, about, data), indent=1))
    return {"images": sum(part["images"] for part in ordered), "rejected": len(rejected), "ignored": about["ignored"],
            "classes": len(about["classes"]), "shards": len(slices), "made": len(missing),
            "bytes": sum(level["bytes"] for part in ordered for level in part["levels"].values()),
            "source_bytes": sum(part["source_bytes"] for part in ordered)}


def _index(size: int, parts: list[dict[str, Any]], about: dict[str, Any], data: Data) -> dict[str, Any]:
    shards = [{**part["levels"][str(size)], **({"labels": part["labels"]} if part["labels"] else {})}
              for part in parts if part["images"]]
    content = hashlib.sha256("".join(part["content"] for part in parts).encode()).hexdigest()
    return {"schema": SCHEMA, "resolution": size, "channels": data.channels,
            "images": sum(shard["images"] for shard in shards), "classes": about["classes"], "crop": data.crop,
            "small": data.small, "upscaled": sum(part["upscaled"] for part in parts), "filter": "box",
            "encoding": data.encoding_of(size), "source": content, "generations": about["generations"],
            "shards": shards}


def _finished_generations(out: Store, there: dict[str, int]) -> list[int]:
    """How many source images came at first, and each time that some were added, as far as an index covers them."""
    found: list[list[int]] = []
    indexes = [name for name in there if name.endswith("/index.json")]
    for name in indexes:
        try:
            found.append(json.loads(out.read(name))["generations"])
        except (ValueError, KeyError, TypeError):
            continue  # if it is damaged, it is written again
    require(bool(found) or not indexes, f"shards {out.shown} were finished, and no index of theirs can be read "
                                        f"({indexes[:1]}): they are damaged or of another version. Give another "
                                        "data.shards, or delete every rNNNN/index.json to have them made again.")
    return max(found, key=len, default=[])


def _entries(source: str, data: Data, out: Store, before: dict[str, Any] | None, finished: list[int],
             made_from: dict[str, Any], add: bool) -> tuple[list[Entry], dict[str, Any]]:
    """The source list with its keys, and what source.json says; as they stand if the source is still the same.

    What was never finished is listed anew: nothing was trained on it, slices that changed are made again.
    """
    old: list[Entry] = []
    classes: list[str] = []
    if before and finished:
        listed = [Entry(**line) for line in read_lines(out, "sources.jsonl")]
        if before["listing"] == made_from["listing"]:
            return listed, before
        old = listed[:sum(finished)]
        classes = before["classes"][:1 + max((entry.label for entry in old if entry.label is not None), default=-1)]
    listing = list_source(source, data.labels, data.deadline_s)
    if finished:
        _refuse_lost(old, classes, listing, out, add)
    known = {entry.path for entry in old}
    new = [found for found in listing.images if found.path not in known]
    classes = [*classes, *(name for name in listing.classes if name not in classes)]
    numbers = {name: number for number, name in enumerate(classes)}
    entries = [*old, *(Entry(f"{n:08d}", found.path, found.size, None if found.label is None else numbers[found.label])
                       for n, found in enumerate(new, len(old)))]
    return entries, {**made_from, "images": len(entries), "classes": classes, "ignored": listing.ignored,
                     "generations": [*finished, *([len(new)] if new else [])]}


def _refuse_lost(old: list[Entry], classes: list[str], listing: Listing, out: Store, add: bool) -> None:
    """UserError where a finished set's source does not still hold every image as it was, or gained some unasked."""
    now = {found.path: (found.size, found.label) for found in listing.images}
    changed = [entry.path for entry in old
               if now.get(entry.path) != (entry.size, None if entry.label is None else classes[entry.label])]
    require(not changed, f"shards {out.shown} were made from another source: {len(changed)} of its {len(old)} "
                         f"images are gone or differ in size or label (first: {', '.join(changed[:1])}). Give another "
                         "data.shards, or the source they were made from.")
    gained = len(listing.images) - len(old)
    require(add or not gained, f"shards {out.shown} lack {gained} images that files added to the source since. "
                               "gradine shard --add appends them (a run that began on these shards then cannot go on "
                               "with them); else give another data.shards, or take them out.")


def _slices(entries: list[Entry], generations: list[int], shard_images: int) -> Iterator[list[Entry]]:
    """Each generation's entries, `shard_images` at a time: what is added later leaves earlier slices as they are."""
    start = 0
    for count in generations:
        for first in range(start, start + count, shard_images):
            yield entries[first:min(first + shard_images, start + count)]
        start += count


@contextmanager
def _held(out: Store) -> Iterator[None]:
    """One process at a time makes shards in a folder; the lock is on the folder itself and ends with its holder.

    In an object store two may work at once: they write the same bytes to the same names.
    """
    if out.remote:
        yield
        return
    Path(out.location).mkdir(parents=True, exist_ok=True)
    folder = os.open(out.location, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sweep(Path(out.location))
        yield
        _sweep(Path(out.location))
    except BlockingIOError:
        raise UserError(f"shards {out.shown} are being made by another process. Wait for it, then run "
                        "again.") from None
    finally:
        os.close(folder)


def _sweep(folder: Path) -> None:
    """Removes what tasks that were killed have left."""
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for file in folder.rglob("*.partial"):
        file.unlink(missing_ok=True)


def absolute_location(location: str, home: bool = True) -> str:
    """One that holds in every process, whatever folder it runs in; without `home`, a ~ stays each process's own."""
    if is_remote(location) or (not home and location.startswith("~")):
        return location
    return str(Path(location).expanduser().absolute())


def summary_line(summary: dict[str, Any], shards: str) -> str:
    """What `shard` did, in a line."""
    times = f", {summary['bytes'] / summary['source_bytes']:.1f} times the source" if summary["source_bytes"] else ""
    return (f"{summary['images']:,} images in {summary['shards']} shards per level, {summary['made']} made now; "
            f"{summary['bytes'] / 1e6:,.1f} MB in {shards}{times}; {summary['classes']} classes, {summary['rejected']} "
            f"rejected, {summary['ignored']} other files ignored")


def source_of(out: Store) -> dict[str, Any]:
    """What existing shards were made from, {} where there are none. UserError for a torn file."""
    try:
        return next(iter(read_lines(out, "source.json", whole=True)))
    except FileNotFoundError:
        return {}


def read_lines(out: Store, name: str, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, or one in all. UserError for a torn file."""
    content = out.read(name)
    try:
        return [json.loads(part) for part in ([content] if whole else content.decode().splitlines())]
    except ValueError as error:
        raise UserError(f"{out.shown}/{name} is damaged: {error}. Put it back, or delete the shards and make them "
                        "again.") from error


def refuse_other_settings(data: Data) -> None:
    """UserError where finished shards have other pixels than the settings say."""
    before = source_of(Store(data.shards, data.deadline_s))
    for name in SHAPING if before else ():
        _refuse_difference(data.shards, name, before.get(name), getattr(data, name))


def _refuse_difference(shards: str, name: str, before: Any, now: Any) -> None:
    require(before == now, f"shards {shards} were made with other settings: {name} was {str(before)[:40]} and is now "
                           f"{str(now)[:40]}. Give another data.shards, or the settings they were made with.")


def _over_ray(source: str, slices: list[list[Entry]], missing: list[int], data: Data,
              resolution: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, part) of each missing slice as its task ends; a few tasks per CPU in flight bound the memory.

    A task whose worker or node dies is started again by Ray, elsewhere if need be: it only repeats its own slice.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(make_slice)
    in_flight: dict[Any, int] = {}
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(missing)
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < limit:
                number = waiting.pop(0)
                in_flight[task.remote(source, slices[number], number, data, resolution)] = number
            (done,), _ = ray.wait(list(in_flight), num_returns=1)
            number = in_flight.pop(done)
            try:
                part = ray.get(done)
            except (OSError, UserError, EnvironmentFault, ray.exceptions.RayError) as error:
                raise _told(error, number, data) from error
            yield number, part
    finally:
        cancel(in_flight)  # nobody waits for them any more: they must not write once the folder is free


def _told(error: Exception, number: int, data: Data) -> Exception:
    """What ended a slice, in one line."""
    cause = getattr(error, "cause", None) or error  # Ray raises what a task raised as its own kind
    if isinstance(cause, UserError | EnvironmentFault):
        return type(cause)(str(cause))
    what = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(".: ")[:600]
    return EnvironmentFault(f"shards {data.shards}: slice {number} could not be made: {what}. {_free(data.shards)}The "
                            "same command makes what is missing.")


def _free(shards: str) -> str:
    return f"{shutil.disk_usage(shards).free:,} bytes are free there. " if Path(shards).is_dir() else ""


def _finished_part(out: Store, there: dict[str, int], number: int, made_from: str) -> dict[str, Any] | None:
    """The part of this very slice whose every tar has the length it had; None if it is to be made (again)."""
    name = f"parts/{number:06d}.json"
    try:
        part = json.loads(out.read(name)) if name in there else {}
        whole = all(there.get(f"r{int(size):04d}/{level['file']}") == level["bytes"]
                    for size, level in part["levels"].items())
        return part if whole and part["made_from"] == made_from else None
    except (OSError, ValueError, KeyError):
        return None


def _write(out: Store, name: str, content: str) -> None:
    """Leaves a file that says so already as it is: a second run changes nothing, and needs no right to write."""
    try:
        same = out.read(name) == content.encode()
    except FileNotFoundError:
        same = False
    if not same:
        out.write(name, content.encode())


def _refuse_other_shards(out: Store, there: dict[str, int], wanted: dict[str, Any],
                         finished: bool) -> dict[str, Any] | None:
    """What the set that stands there was made from, if any; UserError if that is not what is wanted now."""
    require(out.remote or Path(out.location).is_dir() or not Path(out.location).exists(),
            f"data.shards={out.shown!r} is a file. Give a folder, new or empty.")
    if "source.json" not in there:
        strangers = [name for name in there if not name.startswith(".partial-")]
        require(not strangers, f"data.shards={out.shown!r} holds other files ({', '.join(strangers[:3])}) and no "
                               "source.json. Give an empty or new folder.")
        return None
    before = source_of(out)
    for key, value in wanted.items() if finished or out.remote else ():  # in a folder the lock keeps others out
        if key not in ("listing", "source" if finished else ""):
            _refuse_difference(out.shown, key, before.get(key), value)
    return before


def _refuse_torn_set(rejected: list[dict[str, str]], total: int, data: Data) -> None:
    if not rejected:
        return
    first = rejected[0]
    where = f"first: {first['path']}: {first['reason']}; all in {data.shards}/rejected.jsonl"
    require(len(rejected) < total, f"none of the {total} images of {data.source!r} can be used ({where}).")
    share = len(rejected) / total
    require(share <= data.max_rejected_share,
            f"{len(rejected)} of {total} images ({share:.1%}) were rejected, more than data.max_rejected_share="
            f"{data.max_rejected_share:.1%} ({where}). Mend the source, ask for a smaller resolution or raise the "
            "share.")
