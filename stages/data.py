"""Shards -> batches. Which image comes when is arithmetic on (seed, images seen), so resuming needs no replay.

A set is one resolution's folder: plain WebDataset tars beside an `index.json` with each tar's bytes, sha256 and image
count. Pixels are uint8 [N, C, R, R], C 3 or 1, lying in memory as [N, R, R, C], as decoders write them. A small level
is decoded once into a mapped file; a large one streams through decode threads. Shards of a remote location are
downloaded ahead of their use into the cache folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import re
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gradine.configs.schema import ENCODINGS, Data, EnvironmentFault, Run, UserError
from gradine.stages import growth, order, pulse
from gradine.stages.augment import AUGMENTATION_DRAWS
from gradine.stages.cache import NoRoom, allocate, locked, make_room, mapped, publish
from gradine.stages.latents import draw as draw_latents
from gradine.stages.latents import one_hot
from gradine.stages.losses import draw_targets
from gradine.stages.pixels import decode, suffix
from gradine.stages.points import PointSet
from gradine.stages.step import Share
from gradine.stages.store import Store

T = TypeVar("T")
NICE = 10  # of decode threads: about a tenth of a core that a step also wants, all of one that waits for data


def level_folder(shards: str | Path, resolution: int) -> str:
    return f"{str(shards).rstrip('/')}/r{resolution:04d}"


def opened(data: Data, resolution: int, decode_threads: int = 1) -> Images | PointSet:
    """The reals of a stage."""
    return Images(data, resolution, decode_threads) if data.points.kind == "none" else PointSet(data)


def has_level(data: Data, resolution: int) -> bool:
    if data.points.kind != "none":  # they are drawn
        return True
    return Store(level_folder(data.shards, resolution), data.deadline_s).size("index.json") is not None


def read_index(data: Data, resolution: int) -> dict[str, Any]:
    """The index of one level; UserError where the level was never made or the index contradicts itself."""
    store = Store(level_folder(data.shards, resolution), data.deadline_s)
    try:
        index = json.loads(store.read("index.json"))
        for shard in index["shards"]:
            labels, count = shard.get("labels"), shard["images"]
            if not (re.fullmatch(r"\w[\w.-]*", shard["file"]) and re.fullmatch("[0-9a-f]{64}", shard["sha256"])):
                raise ValueError(f"shard {shard['file']!r} of sha256 {shard['sha256']!r} may lie anywhere")
            if type(count) is not int or not 0 < count <= shard["bytes"] // 1024 or (labels and len(labels) != count):
                raise ValueError(f"shard {shard['file']} has {count} images in {shard['bytes']} bytes, or other labels")
        images = sum(shard["images"] for shard in index["shards"])
        if (index["resolution"], index["images"]) != (resolution, images) or not images:
            raise ValueError(f"{index['images']} images of {index['resolution']}px in all, {images} in its shards")
        if index["channels"] not in (1, 3) or index["encoding"] not in ENCODINGS:
            raise ValueError(f"channels {index['channels']}, encoding {index['encoding']}")
        return index
    except FileNotFoundError:
        raise UserError(f"shards {Store(data.shards).shown} have no {resolution}px level. "
                        "Make it with gradine shard.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{store.shown}/index.json is no valid index ({type(error).__name__}: {error}). "
                        "Delete it and run gradine shard again.") from error


def data_digest(data: Data, resolution: int) -> str:
    """Names a level's exact content: sha256 over its shards' sha256, or over the settings of points."""
    if data.points.kind != "none":
        return hashlib.sha256(repr(data.points).encode()).hexdigest()
    return hashlib.sha256("".join(s["sha256"] for s in read_index(data, resolution)["shards"]).encode()).hexdigest()


def yield_cores() -> None:
    """The calling thread from now on has the cores' spare time: decoding ahead must not hold up a step under way."""
    if sys.platform == "linux":  # where each thread has a niceness of its own
        os.nice(NICE)


class Images:
    """One resolution's images by sample id, 0..len-1 in the order of shards and of members inside them."""

    def __init__(self, data: Data, resolution: int, decode_threads: int = 1) -> None:
        """Checks every shard's length now, its sha256 and count when it is first read. UserError where they differ."""
        self.data, self.resolution, self.index = data, resolution, read_index(data, resolution)
        self.store = Store(level_folder(data.shards, resolution), data.deadline_s)
        if self.index["channels"] != data.channels:
            raise UserError(f"shards {self.store.shown} have channels={self.index['channels']}, data.channels is "
                            f"{data.channels}. Set it to theirs, or give another data.shards to make.")
        self.cache = Path(data.cache_dir).expanduser()
        self.shards = self.index["shards"]
        self.counts = tuple(shard["images"] for shard in self.shards)
        self._first = np.cumsum((0, *self.counts[:-1]))
        self._members: dict[int, np.ndarray] = {}  # shard -> offset and bytes of each image, once it is verified
        self._locks = [threading.Lock() for _ in self.shards]
        self._pool = ThreadPoolExecutor(decode_threads, "decode", yield_cores)
        self._ahead = ThreadPoolExecutor(1, "ahead", yield_cores)
        self._asked: list[int] = []
        self._pixels: np.ndarray | None = None  # the mapped cache
        self.decoding_s = 0.0  # of work in a decode thread, or all of them if they share it
        self.notes: list[str] = []  # what a person should know of, though the images come all the same
        self._threads = decode_threads
        self._refuse_torn_set()
        self.shape = (resolution, resolution, self.index["channels"])
        if len(self) * int(np.prod(self.shape)) <= data.cache_gb * 1e9:
            try:
                self._map_cache()
            except NoRoom as error:  # the next stage, or the next start, tries again
                self.notes.append(f"{error} Until then images of {resolution}px are decoded as they come.")

    def __len__(self) -> int:
        return self.index["images"]

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, int64 [len]. UserError where the set has none."""
        labels = [label for shard in self.shards for label in shard.get("labels") or [None]]
        if not all(isinstance(label, int) for label in labels):
            raise UserError(f"shards {self.store.shown} have images without a label, which data.sampling=balanced and "
                            "network.conditioning want. Make them with data.labels, or use data.sampling=raw and "
                            "network.conditioning=none.")
        return np.array(labels)

    def ids(self, seed: int, start: int, count: int) -> np.ndarray:
        """Sample ids at positions start..start+count-1 of the endless sequence of epochs."""
        positions = np.arange(start, start + count)
        epochs = positions // len(self)
        return np.concatenate([order.epoch_order(self.counts, seed, epoch)[positions[epochs == epoch] % len(self)]
                               for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)])

    def sampler(self, seed: int) -> Callable[[int, int], np.ndarray]:
        """(start, count) -> the sample ids that training shows there, by data.sampling."""
        if self.data.sampling == "raw":
            return partial(self.ids, seed)
        labels = self.labels
        classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return partial(order.balanced_order, classes, seed)

    def pixels(self, ids: np.ndarray) -> np.ndarray:
        """uint8 [len(ids), C, R, R]."""
        return self.decoding(ids)()

    def decoding(self, ids: np.ndarray) -> Callable[[], np.ndarray]:
        """Begins to decode; what it returns waits for uint8 [len(ids), C, R, R]."""
        if self._pixels is not None:
            began = time.perf_counter()
            images = self._pixels[ids]
            self.decoding_s += time.perf_counter() - began
            return lambda: images.transpose(0, 3, 1, 2)
        wait = self._begin(ids, np.empty((len(ids), *self.shape), np.uint8))
        return lambda: wait().transpose(0, 3, 1, 2)

    def look_ahead(self, seed: int, position: int) -> None:
        """Verifies, and downloads, the shards of this and the next block in the background, in their order."""
        balanced = self.data.sampling == "balanced"
        coming = ([] if self._pixels is not None else list(range(len(self.shards))) if balanced else
                  order.coming_shards(self.counts, seed, position))
        if coming != self._asked:
            self._asked = coming
            self._ahead.submit(self._mark_used, coming)
            for shard in coming:  # what fails there fails again, and is said, where it is used
                self._ahead.submit(self._prepare, shard)

    def _mark_used(self, shards: list[int]) -> None:
        """Else a shard that is still there could go for one that comes."""
        for shard in shards if self.store.remote else ():
            with suppress(FileNotFoundError):
                os.utime(self._path(shard))

    def _prepare(self, shard: int) -> None:
        if shard in self._asked:  # else its time has passed
            self._verified(shard)
            self._open(shard).close()  # it may have had to go since it was verified

    def damaged(self) -> Iterator[str]:
        """What is wrong with each shard that is not as its index says, after reading them all."""
        for shard in range(len(self.shards)):
            try:
                self._verified(shard)
            except (UserError, EnvironmentFault) as error:
                yield str(error)

    def close(self) -> None:
        self.store.closed = True  # a download that nobody needs any more
        self._ahead.shutdown(cancel_futures=True)
        self._pool.shutdown()

    def _refuse_torn_set(self) -> None:
        """UserError for a shard that is missing or of another length, and for a disk budget that no order can keep."""
        web = self.store.remote and self.store.scheme.startswith("http")  # may serve files and list none
        sizes = {} if web else dict(self.store.list())
        for shard in self.shards:
            size = sizes.get(shard["file"])
            if not web and size != shard["bytes"]:
                raise UserError(f"shard {self.store.shown}/{shard['file']} has "
                                f"{'no file' if size is None else f'{size} bytes'}, its index says {shard['bytes']}. "
                                "Run gradine shard again to make what is missing.")
        sizes_down = sorted((shard["bytes"] for shard in self.shards), reverse=True)
        wanted = sum(sizes_down if self.data.sampling == "balanced" else sizes_down[:2 * order.BLOCK_SHARDS])
        if self.store.remote and wanted > self.data.download_gb * 1e9:
            raise UserError(f"data.download_gb={self.data.download_gb:g} is less than what is read together at "
                            f"{self.resolution}px, {wanted / 1e9:.3g} GB. Raise it, or make the shards with a smaller "
                            "data.shard_images.")

    def _begin(self, ids: np.ndarray, out: np.ndarray) -> Callable[[], np.ndarray]:
        """Has the threads decode `ids` into `out`, uint8 [len(ids), R, R, C], in stretches of at least 128 x 128 px."""
        count = min(len(ids), max(self._threads, len(ids) * self.resolution**2 // 128**2))
        edges = np.linspace(0, len(ids), count + 1).astype(int).tolist()
        begun = [self._pool.submit(self._decode, ids[start:end], out[start:end]) for start, end in pairwise(edges)]

        def wait() -> np.ndarray:
            self.decoding_s += sum([part.result() for part in begun]) / self._threads
            return out

        return wait

    def _decode(self, ids: np.ndarray, out: np.ndarray) -> float:
        """Images `ids` into `out`, uint8 [len(ids), R, R, C]. -> seconds"""
        began = time.perf_counter()
        numbers = np.searchsorted(self._first, ids, side="right") - 1
        samples = ids - self._first[numbers]
        for place, (shard, sample) in enumerate(zip(numbers.tolist(), samples.tolist(), strict=True)):
            pulse.at("decode", f"image {sample} of {self._called(shard)}")
            offset, size = self._verified(shard)[sample].tolist()
            with self._open(shard) as file:
                content = os.pread(file.fileno(), size, offset)
            try:
                decode(content, self.index["encoding"], out[place])
            except Exception as error:  # any decoder may fail in any way
                raise UserError(f"{self._called(shard)}: image {sample} is no {self.index['encoding']} of this level: "
                                f"{' '.join(str(error).split())}.") from error
        pulse.at("")
        return time.perf_counter() - began

    def _called(self, shard: int) -> str:
        return f"shard {self.shards[shard]['file']} of {self.store.shown}"

    def _path(self, shard: int) -> Path:
        entry = self.shards[shard]
        return (self.cache / "shards" / f"{entry['sha256']}.tar" if self.store.remote else
                Path(self.store.location).expanduser() / entry["file"])

    def _open(self, shard: int) -> io.FileIO:
        """Opened for each read: no shard pins a descriptor, or the disk place of one that had to go."""
        while True:
            try:
                return self._path(shard).open("rb", buffering=0)
            except FileNotFoundError:
                self._fetch(shard)

    def _verified(self, shard: int) -> np.ndarray:
        """Offset and bytes of each image of a shard, int64 [images, 2], after its sha256 and count were found right."""
        with self._locks[shard]:
            for again in (self.store.remote, False):  # a download that this disk has damaged since is made once more
                if shard in self._members:
                    break
                with self._open(shard) as file:
                    try:
                        self._refuse_damage(shard, file)
                        self._members[shard] = self._list_members(shard, file)
                    except UserError:
                        if not again:
                            raise
                        self._path(shard).unlink(missing_ok=True)
            return self._members[shard]

    def _refuse_damage(self, shard: int, file: io.FileIO) -> None:
        digest, right = hashlib.file_digest(file, "sha256").hexdigest(), self.shards[shard]["sha256"]
        if digest != right:
            raise UserError(f"{self._called(shard)} has sha256 {digest[:12]}..., its index says {right[:12]}...: it is "
                            "damaged. Delete it and run gradine shard again.")

    def _list_members(self, shard: int, file: io.FileIO) -> np.ndarray:
        """Header by header, for tarfile's own reader follows long names, sparse maps and negative sizes anywhere."""
        ending, end = f".{suffix(self.index['encoding'], self.shape[2])}", os.fstat(file.fileno()).st_size
        names, found, start = set(), [], 0
        try:
            while any(header := os.pread(file.fileno(), tarfile.BLOCKSIZE, start)):
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                start += tarfile.BLOCKSIZE
                if member.type != tarfile.REGTYPE or not 0 <= member.size <= end - start or member.name in names:
                    raise tarfile.TarError(f"its member {member.name!r} is no plain file, too long or there twice")
                names.add(member.name)
                if member.name.endswith(ending):
                    found.append((start, member.size))
                start += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        except tarfile.TarError as error:
            raise UserError(f"{self._called(shard)} is no tar of images: {error}. Delete it and run gradine shard "
                            "again.") from error
        if len(found) != self.counts[shard]:
            raise UserError(f"{self._called(shard)} holds {len(found)} images, its index says {self.counts[shard]}. "
                            "Delete it and run gradine shard again.")
        return np.array(found)

    def _fetch(self, shard: int) -> None:
        """Downloads a shard into the node's folder, once for all its workers, within data.download_gb."""
        entry, path = self.shards[shard], self._path(shard)
        if not self.store.remote:
            raise EnvironmentFault(f"shard {path} is gone since training began. Put it back; the same command resumes.")
        with locked(path):
            if path.is_file():
                return
            coming, budget = path.with_suffix(".tmp"), int(self.data.download_gb * 1e9)
            for leftover in path.parent.glob(f"{coming.name}*"):  # of a process that was killed
                leftover.unlink()
            make_room(path, entry["bytes"], budget)
            try:
                self.store.fetch(entry["file"], coming)
                with coming.open("rb", buffering=0) as file:
                    self._refuse_damage(shard, file)
                publish(coming, path, budget)
            except FileNotFoundError:
                raise UserError(f"shard {self.store.shown}/{entry['file']} is not there. Run gradine shard again to "
                                "make what is missing.") from None
            except OSError as error:
                raise EnvironmentFault(f"{self._called(shard)} could not be kept in {path.parent}: {error.strerror}. "
                                       "Set data.cache_dir to another disk, or a lower data.download_gb.") from error
            finally:
                coming.unlink(missing_ok=True)

    def _map_cache(self) -> None:
        """Maps this level's decoded pixels; the first process of a node to come decodes them, the others wait."""
        content = hashlib.sha256(json.dumps([self.shape, self.shards]).encode()).hexdigest()[:32]
        path = self.cache / f"{content}-r{self.resolution:04d}.u8"
        shape, budget = (len(self), *self.shape), int(self.data.cache_gb * 1e9)
        with locked(path):
            self._pixels = mapped(path, shape)
            if self._pixels is not None:
                return
            building, size = path.with_suffix(".tmp"), int(np.prod(shape))  # a killed process leaves at most this one
            make_room(path, size, budget)
            try:
                allocate(building, size)
                pixels = np.memmap(building, np.uint8, "r+", shape=shape)
                for first in range(0, len(self), 1024):  # or damage is told only after all threads are through
                    self._begin(np.arange(first, min(first + 1024, len(self))), pixels[first:first + 1024])()
                pixels.flush()
                made = np.memmap(building, np.uint8, "r", shape=shape)
                publish(building, path, budget)
                self._pixels = made
            finally:
                building.unlink(missing_ok=True)


def draw(run: Run, purpose: str, images_seen: int, *shape: int, uniform: bool = False) -> torch.Tensor:
    """Random numbers for the GLOBAL batch at `images_seen`: N(0, 1), or U[0, 1) if `uniform`."""
    source = torch.Generator().manual_seed(growth.random_seed(run.training.seed, purpose, images_seen))
    return torch.rand(shape, generator=source) if uniform else torch.randn(shape, generator=source)


def batches(run: Run, stage: int, images: Images | PointSet, images_seen: int, rank: int,
            workers: int) -> Iterator[list[Share]]:
    """One worker's shares of each step from `images_seen` to the stage's end, on the CPU."""
    setting, ids_at = run.stages[stage], images.sampler(run.training.seed)
    shares = [torch.tensor(rows) for rows in growth.micro_batches(setting, rank, workers)]
    batch, classes = setting.batch_size, run.network.classes
    of_images = labels_of(images, classes) if classes else None
    moments = range(images_seen, growth.schedule(run).stage_span(stage)[1], batch)

    def begun() -> Iterator[Callable[[], tuple[np.ndarray, list[np.ndarray]]]]:
        for seen in moments:
            images.look_ahead(run.training.seed, seen)
            ids = ids_at(seen, batch)
            waits = [images.decoding(ids[rows.numpy()]) for rows in shares]
            yield lambda ids=ids, waits=waits: (ids, [wait() for wait in waits])  # type: ignore[misc]

    for seen, (ids, reals) in zip(moments, overlapped(begun()), strict=True):
        drawn = draws(run, seen, batch, None if of_images is None else of_images[ids])
        yield [Share(torch.from_numpy(pixels), **{name: tensor[rows] for name, tensor in drawn.items()})
               for pixels, rows in zip(reals, shares, strict=True)]


def labels_of(images: Images | PointSet, classes: int) -> torch.Tensor:
    """Class numbers, int64 [len(images)]. UserError if the set has others than 0 to classes - 1."""
    labels = torch.from_numpy(images.labels)
    if (most := int(labels.max()) + 1) != classes:
        raise UserError(f"network.classes={classes}, but data.shards have the classes 0 to {most - 1}. "
                        f"Use network.classes={most}.")
    return labels


def draws(run: Run, images_seen: int, batch: int, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """All of a step's `Share` but the reals, for the GLOBAL batch. labels: int64 [batch], if conditional."""
    network, training = run.network, run.training

    def latents(who: str) -> torch.Tensor:
        source = torch.Generator().manual_seed(growth.random_seed(training.seed, f"latents/{who}", images_seen))
        return draw_latents(network, batch, source, labels)

    def uniform(purpose: str, *shape: int) -> torch.Tensor:
        return draw(run, purpose, images_seen, batch, *shape, uniform=True)

    turns = [latents("G" if turn == 0 else f"G{turn}") for turn in range(training.g_steps)]
    drawn = {"mirrored": uniform("mirror") < (0.5 if training.mirror else 0.0), "critic_latents": latents("D"),
             "generator_latents": turns[0] if len(turns) == 1 else torch.cat(turns, dim=1), "mix": uniform("mix")}
    if labels is not None:
        drawn["labels"] = one_hot(labels, network.classes)
    if training.changes_labels:
        drawn["targets"] = draw_targets(training, uniform("targets", 4))
    if training.augment != "none":
        drawn["augmentation"] = uniform("augmentation", (2 + training.g_steps) * AUGMENTATION_DRAWS)
    return drawn


def noise(run: Run, stage: int, rank: int, workers: int) -> list[Share]:
    """One worker's shares of one step, with random pixels for reals."""
    setting, random = run.stages[stage], torch.Generator().manual_seed(growth.random_seed(run.training.seed, "trial"))
    size, batch = setting.resolution, setting.batch_size
    labels = torch.arange(batch) % run.network.classes if run.network.classes else None
    drawn = draws(run, 0, batch, labels)

    def share(rows: list[int]) -> Share:
        shape = len(rows), run.data.channels, size, size
        reals = torch.randn(shape, generator=random) if size == 1 else torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=random)
        return Share(reals, **{name: tensor[rows] for name, tensor in drawn.items()})

    return [share(rows) for rows in growth.micro_batches(setting, rank, workers)]


def overlapped(begun: Iterator[Callable[[], T]]) -> Iterator[T]:
    """What each of `begun` waits for, in order; the next one is begun before, so that no decode thread is idle."""
    waiting: deque[Callable[[], T]] = deque()
    for wait in begun:
        waiting.append(wait)
        if len(waiting) > 1:
            yield waiting.popleft()()
    for wait in waiting:
        yield wait()


def prefetch(source: Iterator[T], depth: int = 2, patience_s: float | None = None) -> Iterator[T | None]:
    """The same items, made ahead by a thread; its exception surfaces here. Close the iterator to end the thread.

    None in between whenever `patience_s` have passed without an item.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                more, item = ready.get(timeout=patience_s)
            except queue.Empty:
                yield None
                continue
            if more:
                yield item
            elif item is not None:
                raise item
            else:
                return
    finally:
        stop.set()
        thread.join()
