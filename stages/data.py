"""Shards -> batches. Which image comes when is arithmetic on (seed, images seen), so resuming needs no replay.

A set is one resolution's folder: plain WebDataset tars beside an `index.json` with each tar's bytes, sha256 and image
count. Pixels are uint8 [N, 3, R, R]. A small level is decoded once into a mapped file; a large one streams through
decode threads.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import queue
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from gradine.configs.schema import Data, EnvironmentFault, Run, UserError
from gradine.stages import growth
from gradine.stages.step import Share

T = TypeVar("T")
BLOCK_SHARDS = 16  # shards shuffled together: a reader stays within these for a while


def level_folder(shards: str | Path, resolution: int) -> Path:
    return Path(shards) / f"r{resolution:04d}"


def read_index(shards: str | Path, resolution: int) -> dict[str, Any]:
    """The index of one level; UserError where the level was never made or the index contradicts itself."""
    path = level_folder(shards, resolution) / "index.json"
    try:
        index = json.loads(path.read_text())
        images = sum(s["images"] for s in index["shards"] if s["file"] and s["bytes"] and s["sha256"])
        if (index["resolution"], index["images"]) != (resolution, images) or not images:
            raise ValueError(f"{index['images']} images of {index['resolution']}px in all, {images} in its shards")
        return index
    except FileNotFoundError:
        raise UserError(f"shards {shards} have no {resolution}px level. Make it with gradine shard.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no valid index ({type(error).__name__}: {error}). "
                        "Delete it and run gradine shard again.") from error


def data_digest(shards: str | Path, resolution: int) -> str:
    """Names a level's exact content: sha256 over its shards' sha256."""
    return hashlib.sha256("".join(s["sha256"] for s in read_index(shards, resolution)["shards"]).encode()).hexdigest()


@lru_cache(maxsize=4)
def epoch_order(shard_images: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows the samples 0..n-1, int64 [n].

    Shards are shuffled, then the samples within each block of shards, so that reading stays local. Sorting raw Philox
    output keeps the order the same under every numpy version.
    """
    bits = np.random.Philox(growth.random_seed(seed, "order", epoch))
    first = np.cumsum((0, *shard_images[:-1]))
    shards = np.argsort(bits.random_raw(len(shard_images)), kind="stable")
    blocks = []
    for start in range(0, len(shards), BLOCK_SHARDS):
        block = shards[start:start + BLOCK_SHARDS]
        samples = np.concatenate([np.arange(first[s], first[s] + shard_images[s]) for s in block])
        blocks.append(samples[np.argsort(bits.random_raw(len(samples)), kind="stable")])
    return np.concatenate(blocks)


@dataclass
class Images:
    """One resolution's images by sample id, 0..len-1 in the order of shards and of members inside them."""

    folder: Path
    resolution: int
    index: dict[str, Any]
    decode_threads: int = 1
    _members: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # shard -> (offset, bytes) of each image
    _files: dict[int, int] = field(default_factory=dict)  # shard -> file descriptor
    _pixels: np.ndarray | None = None  # the mapped cache
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor | None = None

    @staticmethod
    def open(data: Data, resolution: int, decode_threads: int = 1) -> Images:
        """Checks every shard's length now, its sha256 and count when it is first read. UserError where they differ."""
        index = read_index(data.shards, resolution)
        images = Images(level_folder(data.shards, resolution), resolution, index, decode_threads)
        for shard in index["shards"]:
            path = images.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise UserError(f"shard {path} has {'no file' if size is None else f'{size} bytes'}, its index says "
                                f"{shard['bytes']}. Run gradine shard again to make what is missing.")
        if len(images) * 3 * resolution**2 <= data.cache_gb * 1e9:
            images._map_cache(Path(data.cache_dir).expanduser())
        return images

    def __len__(self) -> int:
        return self.index["images"]

    def ids(self, seed: int, start: int, count: int) -> np.ndarray:
        """Sample ids at positions start..start+count-1 of the endless sequence of epochs."""
        shard_images = tuple(shard["images"] for shard in self.index["shards"])
        positions = np.arange(start, start + count)
        epochs = positions // len(self)
        return np.concatenate([epoch_order(shard_images, seed, int(epoch))[positions[epochs == epoch] % len(self)]
                               for epoch in np.unique(epochs)])

    def pixels(self, ids: np.ndarray) -> np.ndarray:
        """uint8 [len(ids), 3, R, R]."""
        if self._pixels is not None:
            return self._pixels[ids]
        self._pool = self._pool or ThreadPoolExecutor(self.decode_threads)
        return np.stack(list(self._pool.map(self._decode, ids.tolist())))

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._pool:
            self._pool.shutdown()

    def _decode(self, sample: int) -> np.ndarray:
        shard = 0
        while sample >= self.index["shards"][shard]["images"]:
            sample -= self.index["shards"][shard]["images"]
            shard += 1
        descriptor = self._open_shard(shard)
        offset, size = self._members[shard][sample]
        with Image.open(io.BytesIO(os.pread(descriptor, size, offset))) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)

    def _open_shard(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                entry = self.index["shards"][shard]
                path = self.folder / entry["file"]
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != entry["sha256"]:
                    raise UserError(f"shard {path} has sha256 {digest[:12]}..., its index says "
                                    f"{entry['sha256'][:12]}...: it is damaged. Delete it and run gradine shard again.")
                with tarfile.open(path, "r:") as tar:
                    members = [(m.offset_data, m.size) for m in tar if m.isfile() and m.name.endswith(".png")]
                if len(members) != entry["images"]:
                    raise UserError(f"shard {path} holds {len(members)} images, its index says {entry['images']}.")
                self._members[shard] = members
                self._files[shard] = os.open(path, os.O_RDONLY)
            return self._files[shard]

    def _map_cache(self, folder: Path) -> None:
        """Maps this level's decoded pixels; the first process of a node to come decodes them, the others wait."""
        folder.mkdir(parents=True, exist_ok=True)
        content = hashlib.sha256(json.dumps(self.index["shards"]).encode()).hexdigest()[:32]
        path = folder / f"{content}-r{self.resolution:04d}.u8"
        shape = (len(self), 3, self.resolution, self.resolution)
        with (folder / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file() or path.stat().st_size != int(np.prod(shape)):
                building = path.with_suffix(".tmp")  # one name: a killed process leaves at most this one
                _allocate(building, int(np.prod(shape)))
                pixels = np.memmap(building, np.uint8, "r+", shape=shape)
                for sample in range(len(self)):
                    pixels[sample] = self._decode(sample)
                pixels.flush()
                building.rename(path)
        self._pixels = np.memmap(path, np.uint8, "r", shape=shape)


def _allocate(path: Path, size: int) -> None:
    """Makes a file whose every byte has its place on the disk: writing to a mapping with none ends the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        path.unlink(missing_ok=True)
        raise EnvironmentFault(f"image cache {path} could not be made: {error.strerror}. It needs {size:,} bytes, "
                               f"{free:,} are free. Set data.cache_dir to another disk, or data.cache_gb=0 to do "
                               "without.") from error


def draw(run: Run, purpose: str, images_seen: int, *shape: int, uniform: bool = False) -> torch.Tensor:
    """Random numbers for the GLOBAL batch at `images_seen`: N(0, 1), or U[0, 1) if `uniform`."""
    source = torch.Generator().manual_seed(growth.random_seed(run.training.seed, purpose, images_seen))
    return torch.rand(shape, generator=source) if uniform else torch.randn(shape, generator=source)


def batches(run: Run, stage: int, images: Images, images_seen: int, rank: int, workers: int) -> Iterator[list[Share]]:
    """One worker's shares of each step from `images_seen` to the stage's end, on the CPU."""
    setting = run.stages[stage]
    shares = [torch.tensor(rows) for rows in growth.micro_batches(setting, rank, workers)]
    batch, latent = setting.batch_size, run.network.latent_size
    for seen in range(images_seen, growth.schedule(run).stage_span(stage)[1], batch):
        ids = images.ids(run.training.seed, seen, batch)
        mirrored = draw(run, "mirror", seen, batch, uniform=True) < (0.5 if run.training.mirror else 0.0)
        critic, generator = (draw(run, f"latents/{who}", seen, batch, latent) for who in "DG")
        mix = draw(run, "mix", seen, batch, uniform=True)
        yield [Share(torch.from_numpy(images.pixels(ids[rows.numpy()])), mirrored[rows], critic[rows],
                     generator[rows], mix[rows]) for rows in shares]


def prefetch(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, made ahead by a thread; its exception surfaces here. Close the iterator to end the thread."""
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
            more, item = ready.get()
            if more:
                yield item
            elif item is not None:
                raise item
            else:
                return
    finally:
        stop.set()
        thread.join()
