"""Image folder, zip or tar -> per-resolution WebDataset shards + index, over Ray tasks.

<out>/r0064/000012.tar       plain WebDataset: <key>.png and, with labels, <key>.cls
<out>/r0064/index.json       per shard bytes, sha256, image count; written last
<out>/parts/000012.json      what slice 12 of the source gave: a second run makes only the slices that lack one
<out>/source.json            the sorted source list's digest and the settings that shaped the pixels
<out>/sources.jsonl          key, path and label of every source image
<out>/rejected.jsonl         path and reason of each image that could not be used

Every tar is a pure function of its slice of the sorted source list. Each image is decoded once; its levels are a
chain of 2x2 means kept in float and rounded only when written.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gradine.configs.schema import RECIPES, Data, EnvironmentFault, UserError, require
from gradine.pipeline.run_dir import write_atomic
from gradine.stages.growth import resolutions

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
Image.MAX_IMAGE_PIXELS = None  # `open_image` has the bound of data.max_pixels instead, and refuses from the header


@dataclass(frozen=True)
class Entry:
    """One source image; `key` is its place in the sorted list, whatever happens to the others."""

    key: str
    path: str
    size: int
    label: int | None


class Rejected(Exception):
    """Why an image cannot be used."""


def locate(source: str) -> Path:
    """The source's path; `bundled:` names a file that ships with gradine."""
    bundled = source.removeprefix("bundled:")
    path = RECIPES / bundled if bundled != source else Path(source).expanduser().absolute()
    require(path.exists(), f"data.source={source!r} does not exist. Give a folder, .zip or .tar of images.")
    return path


def list_source(source: Path, labels: str) -> tuple[list[Entry], list[str], int]:
    """Sorted entries, class names, and how many files are no images. UserError if there is no image at all."""
    try:
        files = _list_files(source)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"data.source={str(source)!r} is damaged: {error}. Fetch or pack it again.") from error
    hidden = [f for f in files if any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(f[0]).parts)]
    images = sorted(set(files) - set(hidden))
    images = [(path, size) for path, size in images if PurePosixPath(path).suffix.lower() in SUFFIXES]
    require(bool(images), f"data.source={str(source)!r} holds no image ({len(files)} other files). "
                          f"Images end in {', '.join(sorted(SUFFIXES))}.")
    folders = [PurePosixPath(path).parts[:-1] for path, _ in images]
    # an archive often has one folder around all others
    shared = len(PurePosixPath(os.path.commonpath(["/".join(parts) for parts in folders])).parts)
    tops = [parts[shared] if len(parts) > shared else "" for parts in folders]
    classes = sorted(set(tops)) if labels == "folders" and len(set(tops)) > 1 else []
    entries = [Entry(f"{n:08d}", path, size, classes.index(top) if classes else None)
               for n, ((path, size), top) in enumerate(zip(images, tops, strict=True))]
    return entries, classes, len(files) - len(images)


def _list_files(source: Path) -> list[tuple[str, int]]:
    """(path, bytes) of every file in a folder, zip or tar."""
    if source.is_dir():
        return [(p.relative_to(source).as_posix(), p.stat().st_size) for p in source.rglob("*") if p.is_file()]
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            return [(info.filename, info.file_size) for info in archive.infolist() if not info.is_dir()]
    if tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            return list({member.name: member.size for member in tar if member.isfile()}.items())  # the last one counts
    raise UserError(f"data.source={str(source)!r} is neither a folder nor a zip or tar. Give one of these.")


def read_entries(source: Path, entries: list[Entry]) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
    """Each entry with a function that reads its bytes."""
    if source.is_dir():
        for entry in entries:
            yield entry, (source / entry.path).read_bytes
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for entry in entries:
                yield entry, partial(archive.read, entry.path)
    else:
        with tarfile.open(source) as tar:  # in any order; a compressed tar is unpacked again for each step back
            members = {member.name: member for member in tar}
            for entry in entries:
                yield entry, partial(_read_member, tar, members[entry.path])


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise Rejected("is no plain file in the tar")
    with file:
        return file.read()


def open_image(content: bytes, resolution: int, crop: str, max_pixels: int) -> np.ndarray:
    """Encoded image -> float32 [R, R, 3] in 0..255: upright, RGB, centre square, box-reduced. Raises Rejected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata: the pixels are what counts
        try:
            opened = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:  # its own words name an object in memory, other ones every time
            raise Rejected("no image, or of a kind that Pillow does not read") from None
        with opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise Rejected(f"{width}x{height} is more than data.max_pixels={max_pixels}")
            if min(width, height) < resolution:
                raise Rejected(f"{width}x{height} is smaller than {resolution}x{resolution}")
            if crop == "none" and width != height:
                raise Rejected(f"{width}x{height} is not square and data.crop is none")
            image = to_rgb(ImageOps.exif_transpose(opened))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return np.asarray(image, np.float32)
    bands = [span_means(span_means(np.asarray(band), resolution).T, resolution).T for band in image.split()]
    return np.stack(bands, axis=2).astype(np.float32)


def span_means(rows: np.ndarray, count: int) -> np.ndarray:
    """[n, m] -> float64 [count, m]: means over `count` equal spans of the rows; a row that a span cuts counts in part.

    Pillow's BOX counts it wholly or not at all: up to 100 grey levels off where n is no multiple of `count`.
    """
    ends = np.arange(count + 1) * len(rows) / count
    whole = ends.astype(int)
    sums = np.zeros((len(rows) + 1, rows.shape[1]), np.result_type(rows, np.uint32))
    np.cumsum(rows, axis=0, out=sums[1:])
    cut = (ends - whole)[:, None] * rows[np.minimum(whole, len(rows) - 1)]
    return np.diff(sums[whole] + cut, axis=0) * (count / len(rows))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit gray is scaled, not clipped; transparency lies on white."""
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.asarray(image, np.float64)
        if image.mode == "F":
            raise Rejected("floating-point pixels have no known range; save it as 8 or 16 bit")
        return Image.fromarray(np.rint(np.clip(gray, 0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def levels(pixels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """float32 [R, R, 3] -> (size, uint8 [size, size, 3]) from R down to 4, by 2x2 means kept in float."""
    while True:
        size = len(pixels)
        yield size, np.rint(pixels).clip(0, 255).astype(np.uint8)
        if size == 4:
            return
        pixels = pixels.reshape(size // 2, 2, size // 2, 2, 3).mean(axis=(1, 3))


def make_slice(source: str, entries: list[Entry], number: int, out: str, data: Data, resolution: int) -> dict[str, Any]:
    """Writes shard `number` of every level, then its part file; returns the part. Same input, same bytes."""
    import webdataset

    writers: dict[int, tuple[Path, Path, Any]] = {}
    for size in resolutions(resolution):
        final = Path(out) / f"r{size:04d}" / f"{number:06d}.tar"
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = final.with_suffix(".tar.partial")
        writer = webdataset.TarWriter(str(unfinished), mtime=0, user="gradine", group="gradine", mode=0o644,
                                      encoder=False)
        writers[size] = unfinished, final, writer
    rejected, content = [], hashlib.sha256()
    for entry, read in read_entries(Path(source), entries):
        try:
            encoded = read()
            content.update(hashlib.sha256(encoded).digest())
            pixels = open_image(encoded, resolution, data.crop, data.max_pixels)
        except Exception as error:  # any decoder may fail in any way on a bad file: it is set aside with its reason
            reason = str(error) if isinstance(error, Rejected) else f"{type(error).__name__}: {error}"
            rejected.append({"path": entry.path, "reason": reason})
            continue
        for size, level in levels(pixels):
            sample = {"__key__": entry.key, "png": encode_png(level)}
            if entry.label is not None:
                sample["cls"] = str(entry.label).encode()
            writers[size][2].write(sample)
    part: dict[str, Any] = {"made_from": slice_digest(entries, data, resolution),
                            "images": len(entries) - len(rejected), "rejected": rejected,
                            "content": content.hexdigest(), "levels": {}}
    for size, (unfinished, final, writer) in writers.items():
        writer.close()
        with unfinished.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        unfinished.rename(final)
        part["levels"][str(size)] = {"file": final.name, "bytes": final.stat().st_size, "images": part["images"],
                                     "sha256": digest}
    write_atomic(Path(out) / "parts" / f"{number:06d}.json", json.dumps(part).encode())
    return part


def slice_digest(entries: list[Entry], data: Data, resolution: int) -> str:
    """Names what a slice's tars are made from: its source files by path and size, and the settings of their pixels."""
    return hashlib.sha256(json.dumps([*(astuple(entry) for entry in entries), data.crop, data.max_pixels,
                                      resolution]).encode()).hexdigest()


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def shard(data: Data, resolution: int, progress: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
    """Makes what is missing of data.shards, on the Ray this process is connected to, and returns a summary.

    Raises UserError for an unusable source, for shards made from something else, and when more than
    data.max_rejected_share of the images are bad; `rejected.jsonl` then says which and why.
    """
    out, source = Path(data.shards).absolute(), locate(data.source)
    entries, classes, ignored = list_source(source, data.labels)
    listing = hashlib.sha256(json.dumps([(e.path, e.size) for e in entries]).encode()).hexdigest()
    made_from = {"schema": 1, "listing": listing, "images": len(entries), "resolution": resolution, "crop": data.crop,
                 "labels": classes, "shard_images": data.shard_images, "max_pixels": data.max_pixels}
    _refuse_other_shards(out, made_from)
    out.mkdir(parents=True, exist_ok=True)
    with _held(out):
        _write(out / "source.json", json.dumps({**made_from, "source": data.source}, indent=1).encode())
        _write(out / "sources.jsonl", "".join(json.dumps(asdict(entry)) + "\n" for entry in entries).encode())
        slices = [entries[i:i + data.shard_images] for i in range(0, len(entries), data.shard_images)]
        parts = {n: part for n, own in enumerate(slices)
                 if (part := _finished_part(out, n, slice_digest(own, data, resolution)))}
        missing = [n for n in range(len(slices)) if n not in parts]
        progress(len(parts), len(slices))
        for number, part in _over_ray(source, slices, missing, out, data, resolution):
            parts[number] = part
            progress(len(parts), len(slices))
        ordered = [parts[n] for n in sorted(parts)]
        rejected = [line for part in ordered for line in part["rejected"]]
        _write(out / "rejected.jsonl", "".join(json.dumps(line) + "\n" for line in rejected).encode())
        _refuse_torn_set(rejected, len(entries), data, out)
        content = hashlib.sha256("".join(part["content"] for part in ordered).encode()).hexdigest()
        for size in resolutions(resolution):
            made = [part["levels"][str(size)] for part in ordered if part["images"]]
            index = {"schema": 1, "resolution": size, "channels": 3, "images": sum(s["images"] for s in made),
                     "labels": classes, "filter": "box", "encoding": "png", "source": content, "shards": made}
            _write(out / f"r{size:04d}" / "index.json", json.dumps(index, indent=1).encode())
        return {"images": len(entries) - len(rejected), "rejected": len(rejected), "ignored": ignored,
                "classes": len(classes), "shards": len(slices), "made": len(missing),
                "bytes": sum(level["bytes"] for part in ordered for level in part["levels"].values())}


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """One process at a time makes shards in a folder; the lock is on the folder itself and ends with its holder."""
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"shards {out} are being made by another process. Wait for it, then run again.") from None
    finally:
        os.close(folder)


def top_level(shards: str) -> int:
    """Resolution that existing shards were made to; 0 where there are none."""
    path = Path(shards) / "source.json"
    return json.loads(path.read_text())["resolution"] if path.is_file() else 0


def _over_ray(source: Path, slices: list[list[Entry]], missing: list[int], out: Path, data: Data,
              resolution: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, part) of each missing slice as its task ends; a few tasks per CPU in flight bound the memory."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(make_slice)
    in_flight: dict[Any, int] = {}
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(missing)
    while waiting or in_flight:
        while waiting and len(in_flight) < limit:
            number = waiting.pop(0)
            in_flight[task.remote(str(source), slices[number], number, str(out), data, resolution)] = number
        (done,), _ = ray.wait(list(in_flight), num_returns=1)
        try:
            part = ray.get(done)
        except (OSError, ray.exceptions.RayError) as error:  # Ray raises what a task raised as its own kind
            raise EnvironmentFault(f"shards {out}: slice {in_flight[done]} could not be made: "
                                   f"{getattr(error, 'cause', error)}. {shutil.disk_usage(out).free:,} bytes are free "
                                   "there. The same command makes what is missing.") from error
        yield in_flight.pop(done), part


def _finished_part(out: Path, number: int, made_from: str) -> dict[str, Any] | None:
    """The part of this very slice whose every tar has the length it had; None if it is to be made (again)."""
    try:
        part = json.loads((out / "parts" / f"{number:06d}.json").read_text())
        whole = all((out / f"r{int(size):04d}" / level["file"]).stat().st_size == level["bytes"]
                    for size, level in part["levels"].items())
        return part if whole and part["made_from"] == made_from else None
    except (OSError, ValueError, KeyError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Leaves a file that says so already as it is: a second run changes nothing, and needs no right to write."""
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def _refuse_other_shards(out: Path, wanted: dict[str, Any]) -> None:
    require(out.is_dir() or not out.exists(), f"data.shards={str(out)!r} is a file. Give a folder, new or empty.")
    if not (out / "source.json").is_file():
        strangers = [p.name for p in out.iterdir() if p.suffix != ".partial"] if out.is_dir() else []
        require(not strangers, f"data.shards={str(out)!r} holds other files ({', '.join(sorted(strangers)[:3])}) and "
                               "no source.json. Give an empty or new folder.")
        return
    if not any(out.glob("r*/index.json")):
        return  # never finished, so nothing was trained on it: slices that changed are made again
    there = json.loads((out / "source.json").read_text())
    for key, value in wanted.items():
        shown = (f"{key} was {str(there.get(key))[:40]} and is now {str(value)[:40]}" if key != "listing" else
                 "files were added, removed or changed in size")
        require(there.get(key) == value, f"shards {out} were made from another source or with other settings: {shown}. "
                                         "Give another data.shards, or the source and settings they were made with.")


def _refuse_torn_set(rejected: list[dict[str, str]], total: int, data: Data, out: Path) -> None:
    if not rejected:
        return
    first = rejected[0]
    where = f"first: {first['path']}: {first['reason']}; all in {out / 'rejected.jsonl'}"
    require(len(rejected) < total, f"none of the {total} images of {data.source!r} can be used ({where}).")
    share = len(rejected) / total
    require(share <= data.max_rejected_share,
            f"{len(rejected)} of {total} images ({share:.1%}) were rejected, more than data.max_rejected_share="
            f"{data.max_rejected_share:.1%} ({where}). Mend the source, ask for a smaller resolution or raise the "
            "share; images mended at equal size want the shards deleted first.")
