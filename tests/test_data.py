"""Claims about order, batches and reading. The shards here are written by this file, with tarfile and Pillow alone."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradine.configs.schema import Data, EnvironmentFault, Run, UserError, from_dict
from gradine.stages import data as data_module
from gradine.stages import order as order_module
from gradine.stages.data import (
    Images,
    batches,
    data_digest,
    draw,
    has_level,
    prefetch,
    read_index,
)
from gradine.stages.order import balanced_order, epoch_order, shuffled
from gradine.stages.pixels import decode
from gradine.stages.step import Share
from gradine.stages.store import Store

from .object_store import BUCKET, Fault, aws, moto, proxy, web_folder  # noqa: F401 (moto is a fixture)

SUFFIXES = {"raw": {3: "ppm", 1: "pgm"}, "png": {3: "png", 1: "png"}, "webp": {3: "webp", 1: "webp"},
            "jpeg": {3: "jpg", 1: "jpg"}}


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            tar.addfile(member(name, len(content)), io.BytesIO(content))
    return buffer.getvalue()


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """uint8 [R, R, C] as Pillow and the text of the PNM format have it."""
    size, _, channels = pixels.shape
    if kind == "raw":
        return b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, size, size) + pixels.tobytes()
    buffer = io.BytesIO()
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    image.save(buffer, kind.upper(), lossless=True, quality=95)  # each takes what it knows
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    return encoded(pixels, "png")


def entry_of(name: str, content: bytes, images: int) -> dict[str, Any]:
    return {"file": name, "bytes": len(content), "images": images, "sha256": hashlib.sha256(content).hexdigest()}


class Level:
    """One level's shards on disk, beside the pixels that are in them."""

    def __init__(self, path: Path, counts: tuple[int, ...] = (5, 3, 4), size: int = 4, seed: int = 0,
                 channels: int = 3, encoding: str = "png", labels: list[int] | None = None,
                 pixels: np.ndarray | None = None) -> None:
        self.root, self.size, self.encoding = path / "shards", size, encoding
        self.folder = self.root / f"r{size:04d}"
        self.folder.mkdir(parents=True)
        random = np.random.default_rng(seed).integers(0, 256, (sum(counts), size, size, channels), dtype=np.uint8)
        self.pixels = random if pixels is None else pixels
        self.counts, first = counts, 0
        self.entries: list[dict[str, Any]] = []
        for number, count in enumerate(counts):
            members = []
            for n in range(first, first + count):
                members += [(f"{n:08d}.cls", b"1"),
                            (f"{n:08d}.{SUFFIXES[encoding][channels]}", encoded(self.pixels[n], encoding))]
            self.entries.append({})
            self.replace(number, tar_of(members), count)
            if labels:
                self.entries[-1]["labels"] = labels[first:first + count]
            first += count
        self.write_index()
        self.data = Data(source="none", shards=str(self.root), cache_dir=str(path / "cache"), channels=channels,
                         deadline_s=20)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.tar"

    def replace(self, number: int, content: bytes, images: int) -> None:
        """Another shard, and an index entry (not yet written) that it agrees with."""
        self.path(number).write_bytes(content)
        self.entries[number] = entry_of(self.path(number).name, content, images)

    def write_index(self, **changes: Any) -> None:
        index = {"schema": 2, "resolution": self.size, "channels": self.pixels.shape[3], "classes": [],
                 "images": sum(self.counts), "crop": "centre", "small": "reject",
                 "upscaled": 0, "filter": "box", "encoding": self.encoding, "source": "0" * 64,
                 "shards": self.entries, **changes}
        (self.folder / "index.json").write_text(json.dumps(index))

    def open(self, cached: bool = False, **changes: Any) -> Images:
        settings = {"cache_gb": 1.0 if cached else 0.0, **changes}
        return Images(Data(**{**vars(self.data), **settings}), self.size, decode_threads=2)

    @property
    def all(self) -> np.ndarray:
        return self.pixels.transpose(0, 3, 1, 2)

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.pixels))


def numbered(path: Path, counts: tuple[int, ...], **more: Any) -> Level:
    """Images whose every pixel tells their id: red id % 251, green id // 251, blue 7."""
    ids = np.arange(sum(counts))
    colours = np.stack([ids % 251, ids // 251, np.full_like(ids, 7)], axis=1).astype(np.uint8)
    pixels = np.broadcast_to(colours[:, None, None], (len(ids), 4, 4, 3)).copy()
    return Level(path, counts, encoding="raw", pixels=pixels, **more)


def ids_of(reals: torch.Tensor) -> list[int]:
    """What the colours of uint8 [n, 3, 4, 4] say, where all 16 pixels of an image say the same."""
    assert (reals == reals[:, :, :1, :1]).all()
    assert (reals[:, 2] == 7).all()
    return (reals[:, 0, 0, 0].long() + 251 * reals[:, 1, 0, 0].long()).tolist()


@pytest.fixture
def level(tmp_path: Path) -> Level:
    return Level(tmp_path)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Order


def test_an_epoch_shows_every_sample_once_in_another_order_each_time() -> None:
    orders = [epoch_order((40, 30, 30), seed, epoch).tolist() for seed in (0, 1) for epoch in range(4)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders}) == 8


def test_the_order_is_the_one_it_was_when_this_was_written() -> None:
    """A resumed run, or one on other machines, must see the images in the same order for ever."""
    epoch_order.cache_clear()
    assert epoch_order((3, 2, 4), 7, 0).tolist() == [8, 0, 2, 1, 5, 6, 4, 3, 7]
    assert epoch_order((3, 2, 4), 7, 1).tolist() == [0, 1, 2, 4, 7, 6, 5, 8, 3]
    many = epoch_order((2,) * 20, 0, 0)
    assert many[:12].tolist() == [7, 17, 13, 35, 20, 6, 8, 14, 3, 19, 27, 12]
    large = epoch_order((1000, 999, 1001), 3, 5).astype("<i8").tobytes()
    assert hashlib.sha256(large).hexdigest()[:16] == "3bccd4156a9550c1"


def test_a_reader_stays_within_sixteen_shards_for_a_while() -> None:
    order = epoch_order((3,) * 40, 0, 0)
    blocks = [set((order[start:start + 48] // 3).tolist()) for start in (0, 48, 96)]
    assert [len(block) for block in blocks] == [16, 16, 8]
    assert set.union(*blocks) == set(range(40))
    assert order[:48].tolist() != sorted(order[:48].tolist())


def test_ids_over_any_splits_are_one_long_sequence_of_epochs(level: Level) -> None:
    images, rng = level.open(), np.random.default_rng(0)
    long = images.ids(3, 0, 12 * 9)
    for epoch in range(9):
        assert sorted(long[12 * epoch:12 * (epoch + 1)].tolist()) == list(range(12))
        np.testing.assert_array_equal(long[12 * epoch:12 * (epoch + 1)], epoch_order((5, 3, 4), 3, epoch))
    for _ in range(50):
        cuts = np.unique(rng.integers(0, 12 * 9, rng.integers(1, 8)))
        edges = [0, *cuts[cuts > 0].tolist(), 12 * 9]
        parts = [images.ids(3, start, end - start) for start, end in itertools.pairwise(edges)]
        np.testing.assert_array_equal(np.concatenate(parts), long)


def plain_epoch(counts: tuple[int, ...], seed: int, epoch: int) -> list[int]:
    """The order of an epoch, told again one number at a time: shards by a random number each, 16 of them together."""
    digest = hashlib.blake2b(f"{seed}/order/{epoch}".encode(), digest_size=8).digest()
    random = np.random.Philox(int.from_bytes(digest, "big") // 2)
    keys = [int(random.random_raw()) for _ in counts]
    order, waiting = [], sorted(range(len(counts)), key=lambda shard: keys[shard])
    while waiting:
        block, waiting = waiting[:16], waiting[16:]
        samples = [sum(counts[:shard]) + n for shard in block for n in range(counts[shard])]
        drawn = {sample: int(random.random_raw()) for sample in samples}
        order += sorted(samples, key=lambda sample: drawn[sample])
    return order


@pytest.mark.parametrize("counts", [(1,), (5, 3, 4), (3,) * 39, (7, 1, 2) * 20])
def test_the_order_is_that_of_a_plain_loop(counts: tuple[int, ...]) -> None:
    for seed, epoch in itertools.product((0, 9), (0, 1, -1, 700)):
        assert epoch_order(counts, seed, epoch).tolist() == plain_epoch(counts, seed, epoch)


# 117 images in 39 shards: blocks of 16, 16 and 7 shards
@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Level:
    return numbered(tmp_path_factory.mktemp("many"), (3,) * 39)


SPLITS = [(4, 1, 0), (8, 1, 4), (8, 2, 0), (12, 3, 0), (12, 1, 4), (16, 4, 0), (16, 2, 4), (48, 1, 16), (48, 2, 8),
          (48, 3, 0), (48, 4, 4)]


@pytest.mark.fault
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("batch", "workers", "micro_batch"), SPLITS)
def test_f35_any_workers_prefetch_and_resume_at_any_batch_give_one_list_with_each_image_once_an_epoch(
        many: Level, batch: int, workers: int, micro_batch: int, cached: bool) -> None:
    plain = [sample for epoch in range(3) for sample in plain_epoch(many.counts, 0, epoch)]
    assert [sorted(plain[start:start + 117]) for start in (0, 117)] == [list(range(117))] * 2
    run = run_on(many, workers, micro_batch, batch, images=234)
    starts = range(0, 234, batch)
    with closing(many.open(cached)) as images:
        for start, depth in itertools.product(starts, range(4)):
            shown = [n for step in laid_back(run, images, start, depth) for n in ids_of(step["reals"])]
            assert shown == plain[start:start + len(shown)]
            assert start + len(shown) == -(-234 // batch) * batch


@pytest.mark.fault
def test_f35_a_run_stopped_again_and_again_while_it_prefetches_goes_on_with_the_image_after_its_last_one(
        many: Level) -> None:
    run, rng = run_on(many, batch=4, images=234), np.random.default_rng(0)
    seen: list[int] = []
    while len(seen) < 234:
        with closing(many.open()) as images:  # a new process
            source = prefetch(batches(run, 0, images, len(seen), 0, 1), depth=int(rng.integers(1, 4)))
            for (share,) in itertools.islice(source, int(rng.integers(1, 12))):
                seen += ids_of(share.reals)
            source.close()  # type: ignore[attr-defined]
    assert seen[:117] == plain_epoch(many.counts, 0, 0)
    assert seen[117:234] == plain_epoch(many.counts, 0, 1)


def test_raw_sampling_shows_the_classes_as_often_as_they_are(tmp_path: Path) -> None:
    level = numbered(tmp_path, (5, 3, 4), labels=[0] * 9 + [1] * 2 + [7])
    with closing(level.open()) as images:
        shown = images.labels[images.sampler(0)(0, 12 * 5)]
        assert np.unique(shown, return_counts=True)[1].tolist() == [45, 10, 5]


# ---- Balanced sampling


CLASSES = [np.array([4, 9, 11, 30, 31, 32, 33]), np.array([0]), np.array([5, 6, 70])]


def test_balanced_rounds_show_every_class_once_and_a_class_all_its_images_before_one_twice() -> None:
    shown = balanced_order(CLASSES, 3, 0, 3 * 7 * 6)
    rounds = shown.reshape(-1, 3)
    own = [set(ids.tolist()) for ids in CLASSES]
    numbers = np.array([[next(n for n, ids in enumerate(own) if i in ids) for i in row] for row in rounds.tolist()])
    assert (np.sort(numbers, axis=1) == [0, 1, 2]).all()
    assert len({tuple(row) for row in numbers.tolist()}) == 6  # the classes take turns in every order
    for number, ids in enumerate(CLASSES):
        turns = rounds[numbers == number].reshape(-1, len(ids))
        assert (np.sort(turns, axis=1) == ids).all()
        assert len(ids) == 1 or len({tuple(row) for row in turns.tolist()}) > 2


def test_a_balanced_position_depends_on_no_other_and_costs_the_same_anywhere() -> None:
    whole = balanced_order(CLASSES, 3, 0, 100).tolist()
    for start in np.random.default_rng(0).permutation(100).tolist():
        shuffled.cache_clear()
        assert balanced_order(CLASSES, 3, start, 1).tolist() == whole[start:start + 1]
    assert balanced_order(CLASSES, 4, 0, 100).tolist() != whole
    began = time.process_time()
    assert len(balanced_order(CLASSES, 3, 10**15, 100)) == 100
    assert time.process_time() - began < 1


def test_the_balanced_order_is_the_one_it_was_when_this_was_written() -> None:
    assert balanced_order(CLASSES, 7, 0, 12).tolist() == [0, 4, 6, 32, 5, 0, 70, 0, 11, 6, 9, 0]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_balanced_batches_hold_the_classes_equally_often_for_any_number_of_workers(
        tmp_path: Path, workers: int) -> None:
    labels = [0] * 9 + [1] * 2 + [7]
    level = numbered(tmp_path, (5, 3, 4), labels=labels)
    level.data = Data(**{**vars(level.data), "sampling": "balanced"})
    with closing(level.open(cached=True)) as images, closing(level.open()) as streamed:
        run = run_on(level, workers, batch=48)
        shown = [n for step in laid_back(run, images, 0) for n in ids_of(step["reals"])]
        assert [n for step in laid_back(run, streamed, 48) for n in ids_of(step["reals"])] == shown[48:]
    numbers = np.array([labels[n] for n in shown]).reshape(-1, 3)
    assert (np.sort(numbers, axis=1) == [0, 1, 7]).all()


@pytest.mark.parametrize("labels", [None, [1, 2, 3, 4, 5, None, None, None, 0, 0, 0, 0]])
def test_balanced_sampling_of_images_without_labels_is_refused(tmp_path: Path, labels: list[int] | None) -> None:
    level = numbered(tmp_path, (5, 3, 4), labels=labels)
    with closing(level.open(sampling="balanced")) as images:
        said = refusal(lambda: images.sampler(0))
    for part in (str(level.root), "without a label", "data.labels", "data.sampling=raw"):
        assert part in said


# ---- Batches


def run_on(level: Level, workers: int = 1, micro_batch: int = 0, batch: int = 16, images: int = 95,
           **training: Any) -> Run:
    return from_dict({"name": "t", "data": vars(level.data), "network": {"latent_size": 6, "fmap_base": 16},
                      "training": training,
                      "stages": [{"resolution": 4, "hold_images": images, "batch_size": batch, "workers": workers,
                                  "micro_batch": micro_batch}]})


def laid_back(run: Run, images: Images, start: int, depth: int = 0) -> list[dict[str, torch.Tensor]]:
    """What all workers together see: their shares laid back onto the rows of the global batch.

    A batch of 16 has 4 groups of 4; group g is the rows g, g + 4, g + 8, g + 12. A worker owns whole groups in order.
    """
    (stage,) = run.stages
    steps: list[dict[str, torch.Tensor]] = []
    count = stage.batch_size // 4
    for rank in range(stage.workers):
        source = batches(run, 0, images, start, rank, stage.workers)
        for number, shares in enumerate(prefetch(source, depth) if depth else source):
            if rank == 0:
                steps.append({"owned": torch.zeros(stage.batch_size, dtype=torch.bool)})
            groups = iter(range(rank * count // stage.workers, (rank + 1) * count // stage.workers))
            for share in shares:
                own = [next(groups) for _ in range(len(share.mix) // 4)]
                rows = [row * count + group for row in range(4) for group in own]
                assert not steps[number]["owned"][rows].any()  # nobody else's rows
                steps[number]["owned"][rows] = True
                for name, tensor in ((name, t) for name, t in vars(share).items() if t is not None):
                    empty = torch.zeros(stage.batch_size, *tensor.shape[1:], dtype=tensor.dtype)
                    steps[number].setdefault(name, empty)[rows] = tensor
            assert next(groups, None) is None
    assert all(step.pop("owned").all() for step in steps)
    return steps


def global_batches(level: Level, workers: int, micro_batch: int = 0, start: int = 0) -> list[dict[str, torch.Tensor]]:
    with closing(level.open(cached=True)) as images:
        return laid_back(run_on(level, workers, micro_batch), images, start)


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 4), (1, 8), (2, 0), (2, 4), (4, 0)])
def test_any_number_of_workers_and_micro_batches_together_see_the_same_global_batches(
        level: Level, workers: int, micro_batch: int) -> None:
    alone, together = global_batches(level, 1), global_batches(level, workers, micro_batch)
    assert len(alone) == len(together) == 6  # 95 images in batches of 16: ceil
    for one, other in zip(alone, together, strict=True):
        for name in ("reals", "mirrored", "critic_latents", "generator_latents", "mix"):
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("workers", [1, 2])
def test_starting_in_the_middle_gives_the_tail(level: Level, workers: int) -> None:
    whole, tail = global_batches(level, workers), global_batches(level, workers, start=48)
    assert len(tail) == 3
    for one, other in zip(whole[3:], tail, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_reals_are_the_images_in_epoch_order(level: Level) -> None:
    order = np.concatenate([epoch_order((5, 3, 4), 0, epoch) for epoch in range(8)])
    seen = torch.cat([step["reals"] for step in global_batches(level, 1)])
    np.testing.assert_array_equal(seen.numpy(), level.all[order[:96]])


def test_randomness_depends_on_seed_clock_and_purpose_alone(level: Level) -> None:
    step = next(batches(run_on(level), 0, level.open(), 16, 0, 1))[0]
    again = next(batches(run_on(level), 0, level.open(), 16, 0, 1))[0]
    other_seed = next(batches(run_on(level, seed=1), 0, level.open(), 16, 0, 1))[0]
    later = next(batches(run_on(level), 0, level.open(), 32, 0, 1))[0]
    for name in ("critic_latents", "generator_latents", "mix"):
        assert torch.equal(getattr(step, name), getattr(again, name))
        assert not torch.equal(getattr(step, name), getattr(other_seed, name))
        assert not torch.equal(getattr(step, name), getattr(later, name))
    assert not torch.equal(step.critic_latents, step.generator_latents)


def test_latents_are_standard_normal_mixes_uniform_and_half_the_images_mirrored(level: Level) -> None:
    run = run_on(level)
    normal = torch.cat([draw(run, "latents/D", seen, 1000) for seen in range(20)])
    uniform = torch.cat([draw(run, "mix", seen, 1000, uniform=True) for seen in range(20)])
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert (uniform.min() >= 0, uniform.max() < 1, bool(abs(uniform.mean() - 0.5) < 0.01)) == (True, True, True)
    long = from_dict({"name": "t", "data": vars(level.data), "network": {"latent_size": 1, "fmap_base": 16},
                      "stages": [{"resolution": 4, "hold_images": 8000, "batch_size": 16}]})
    images = level.open(cached=True)
    mirrored = torch.cat([share.mirrored for (share,) in batches(long, 0, images, 0, 0, 1)])
    assert 0.47 < mirrored.float().mean() < 0.53
    assert not any(share.mirrored.any() for (share,) in batches(run_on(level, mirror=False), 0, images, 0, 0, 1))


# ---- Pixels


@pytest.mark.parametrize("cached", [True, False])
def test_pixels_from_the_cache_and_streamed_are_those_pillow_decodes(level: Level, cached: bool) -> None:
    with closing(level.open(cached)) as images:
        assert len(images) == 12
        mixed = np.array([11, 0, 7, 7, 4, 5, 8])
        shown = images.pixels(mixed)
        assert shown.dtype == np.uint8
        np.testing.assert_array_equal(shown, level.all[mixed])
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)
    assert any(Path(level.data.cache_dir).glob("*.u8")) == cached


def test_the_cache_is_used_exactly_where_its_bytes_fit_the_budget(level: Level) -> None:
    needed = 12 * 3 * 4 * 4
    for budget, cached in ((needed - 1, False), (needed, True)):
        level.open(cache_gb=budget / 1e9).close()
        assert any(Path(level.data.cache_dir).glob("*.u8")) == cached


def test_a_cache_is_never_used_for_other_content(tmp_path: Path) -> None:
    one, other = Level(tmp_path / "one", seed=1), Level(tmp_path / "other", seed=2)
    shared = str(tmp_path / "cache")
    for level in (one, other, one):
        images = level.open(cached=True, cache_dir=shared)
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)


def test_what_a_killed_builder_left_of_a_cache_does_no_harm_and_does_not_stay(level: Level) -> None:
    level.open(cached=True)
    (cache,) = Path(level.data.cache_dir).glob("*.u8")
    cache.rename(cache.with_suffix(".tmp"))
    os.truncate(cache.with_suffix(".tmp"), 100)
    np.testing.assert_array_equal(level.open(cached=True).pixels(level.ids), level.all)
    assert not list(cache.parent.glob("*.tmp"))
    os.truncate(cache, 100)
    np.testing.assert_array_equal(level.open(cached=True).pixels(level.ids), level.all)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding", ["raw", "png", "webp", "jpeg"])
def test_every_encoding_reads_back_as_it_decodes_with_its_colours_lying_side_by_side(
        tmp_path: Path, encoding: str, channels: int, cached: bool) -> None:
    coarse = np.random.default_rng(1).integers(0, 256, (7, 4, 4, channels), dtype=np.uint8)
    level = Level(tmp_path, (4, 3), 32, 0, channels, encoding, pixels=coarse.repeat(8, axis=1).repeat(8, axis=2))
    with closing(level.open(cached)) as images:
        shown = images.pixels(level.ids[::-1])[::-1]
        assert images.pixels(level.ids).transpose(0, 2, 3, 1).flags.c_contiguous
    assert (shown.shape, shown.dtype) == ((7, channels, 32, 32), np.uint8)
    wanted = np.empty_like(level.pixels)
    for pixels, out in zip(level.pixels, wanted, strict=True):
        decode(encoded(pixels, encoding), encoding, out)
    np.testing.assert_array_equal(shown, wanted.transpose(0, 3, 1, 2))
    for pixels, image in zip(level.pixels, shown.transpose(0, 2, 3, 1).astype(int), strict=True):
        pillow = np.asarray(Image.open(io.BytesIO(encoded(pixels, encoding))).convert("RGB" if channels == 3 else "L"))
        assert abs(image - pillow.reshape(image.shape)).max() <= (1 if encoding == "jpeg" else 0)
        assert encoding == "jpeg" or (image == pixels).all()


def test_shards_of_another_number_of_channels_are_refused(tmp_path: Path) -> None:
    said = refusal(lambda: Level(tmp_path, channels=1).open(channels=3))
    assert "have channels=1, data.channels is 3" in said


def test_a_home_folder_is_spelled_with_a_tilde(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(level.root.parent))
    with closing(level.open(shards="~/shards")) as images:
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)


def test_a_cache_folder_that_cannot_be_made_is_one_clear_line(level: Level, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=r"data\.cache_dir.*/file/below cannot be written"):
        level.open(cached=True, cache_dir=str(tmp_path / "file" / "below"))


def test_a_damaged_shard_leaves_no_half_made_cache(level: Level) -> None:
    flip(level.path(1), 600)
    assert "damaged" in refusal(lambda: level.open(cached=True))
    assert sorted({path.suffix for path in Path(level.data.cache_dir).iterdir()}) == [".lock"]


BUILDER = """
import sys, time
from gradine.configs.schema import Data
from gradine.stages import data
decode = data.decode
def slow(*arguments):
    print("decoded", flush=True)
    time.sleep(0.02)
    return decode(*arguments)
data.decode = slow
print("ready", flush=True)
sys.stdin.readline()
images = data.Images(Data(source="none", shards=sys.argv[1], cache_dir=sys.argv[2]), 4)
import hashlib, numpy
print(hashlib.sha256(images.pixels(numpy.arange(len(images))).tobytes()).hexdigest(), flush=True)
"""


def builders(level: Level, count: int) -> list[subprocess.Popen[str]]:
    """Processes that are past their imports and wait for a line to start."""
    arguments = [sys.executable, "-c", BUILDER, level.data.shards, level.data.cache_dir]
    started = [subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for _ in range(count)]
    for builder in started:
        assert builder.stdout
        assert builder.stdout.readline() == "ready\n"
    return started


def go(builder: subprocess.Popen[str]) -> None:
    assert builder.stdin
    builder.stdin.write("\n")
    builder.stdin.flush()


def test_two_processes_that_build_the_same_cache_at_once_both_get_it_right_and_one_decodes(level: Level) -> None:
    started = builders(level, 2)
    for builder in started:
        go(builder)
    outputs = [builder.communicate(timeout=60)[0].split() for builder in started]
    assert [output[-1] for output in outputs] == [hashlib.sha256(level.all.tobytes()).hexdigest()] * 2
    assert sorted(len(output) - 1 for output in outputs) == [0, 12]


@pytest.mark.fault
def test_a_process_killed_while_it_builds_the_cache_leaves_the_work_to_the_one_that_waits(level: Level) -> None:
    cache = Path(level.data.cache_dir)
    first, second = builders(level, 2)
    go(first)
    assert first.stdout
    for _ in range(4):
        assert first.stdout.readline() == "decoded\n"
    go(second)
    time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert not list(cache.glob("*.u8"))
    assert len(list(cache.glob("*.tmp"))) == 1
    *decoded, digest = second.communicate(timeout=60)[0].split()
    assert digest == hashlib.sha256(level.all.tobytes()).hexdigest()
    assert len(decoded) == 12
    assert not list(cache.glob("*.tmp"))
    with closing(level.open(cached=True)) as images:
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)


def held(folder: Path, pattern: str) -> int:
    """Bytes of the files there, though some may go while they are counted."""
    total = 0
    for path in folder.glob(pattern):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watched(folder: Path, pattern: str) -> Iterator[list[int]]:
    """The bytes that files there took, looked at all the time."""
    seen, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.0005):
            seen.append(held(folder, pattern))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_the_cache_used_longest_ago_goes_and_who_has_it_mapped_reads_on(tmp_path: Path) -> None:
    shared, levels = tmp_path / "cache", [Level(tmp_path / str(n), seed=n) for n in range(4)]
    opened, made = [], []
    for n in (0, 1, 0, 2, 0, 3, 1):
        opened.append((n, levels[n].open(cached=True, cache_dir=str(shared), cache_gb=2 * 576e-9)))
        assert held(shared, "*.u8") <= 2 * 576
        made.append({path.name: path.stat().st_ino for path in shared.glob("*.u8")})
        time.sleep(0.02)  # the clock of file times is coarse
    assert [len(files) for files in made] == [1, 2, 2, 2, 2, 2, 2]
    assert made[1] == made[2]  # nothing is made anew
    (kept,) = set(made[2].items()) & set(made[3].items())
    assert kept in made[0].items()  # 2 drove out 1, for 0 was used since
    assert kept in made[5].items()
    assert kept not in made[6].items()
    for n, images in opened:
        np.testing.assert_array_equal(images.pixels(levels[n].ids), levels[n].all)


def test_many_that_fill_one_cache_folder_at_once_stay_within_its_budget(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [Level(tmp_path / str(n), seed=n) for n in range(6)]
    together = threading.Barrier(12)  # 6 readers with 2 decode threads each finish their first image at once

    def slow(*arguments: Any) -> None:
        if not together.broken and threading.current_thread().name.startswith("decode"):
            with suppress(threading.BrokenBarrierError):
                together.wait(0.5)
        decode(*arguments)

    monkeypatch.setattr(data_module, "decode", slow)
    right: list[bool] = []

    def build(level: Level) -> None:
        with closing(level.open(cached=True, cache_dir=str(tmp_path / "cache"), cache_gb=2 * 576e-9)) as images:
            right.append(bool((images.pixels(level.ids) == level.all).all()))

    with watched(tmp_path / "cache", "*.u8") as seen:
        threads = [threading.Thread(target=build, args=(level,)) for level in levels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 6
    assert held(tmp_path / "cache", "*.u8") == 2 * 576
    assert max(seen) <= 2 * 576


@contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """A folder on a disk of 64 KB."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.fault
def test_f05_a_full_disk_under_the_cache_is_told_in_a_line_and_the_same_pixels_stream_instead(tmp_path: Path) -> None:
    """Cache folder on a tmpfs that is smaller than the level; then on one that is full to the last byte and inode."""
    level, cache = Level(tmp_path, counts=(300,), size=16), tmp_path / "cache"  # 230,400 bytes decoded

    def notes() -> list[str]:
        with closing(level.open(cached=True)) as images:
            np.testing.assert_array_equal(images.pixels(level.ids), level.all)
            return images.notes

    def resize(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", cache], check=True)

    with tiny_disk(cache):
        (note,) = notes()
        for part in ("needs 230,400 bytes", " are free", "data.cache_gb=0", "16px are decoded as they come"):
            assert part in note
        assert "\n" not in note
        (left,) = cache.iterdir()
        assert left.suffix == ".lock"
        left.rename(cache / "other")
        resize("nr_inodes=2")  # the folder and this file: not even a lock can be made
        assert "cannot be written: No space left" in notes()[0]
        resize("size=1m,nr_inodes=100")
        assert notes() == []
        assert list(cache.glob("*.u8"))
        assert notes() == []


# ---- Damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_shard_of_another_length_or_none_is_refused_when_the_level_is_opened(level: Level) -> None:
    shard = level.path(1)
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    said = refusal(level.open)
    for part in (str(shard), f"{len(content) - 512} bytes", str(len(content)), "gradine shard"):
        assert part in said
    shard.unlink()
    assert f"{shard} has no file" in refusal(level.open)


@pytest.mark.parametrize("at", [0, 150, 600, -1])
@pytest.mark.parametrize("cached", [True, False])
def test_one_flipped_bit_is_refused_when_the_shard_is_first_read(level: Level, at: int, cached: bool) -> None:
    flip(level.folder / "000001.tar", at)
    said = refusal(lambda: level.open(cached).pixels(np.array([0, 6])))
    for part in ("000001.tar", "sha256", "damaged", "gradine shard"):
        assert part in said


def test_shards_that_are_not_asked_for_are_not_read(level: Level) -> None:
    flip(level.folder / "000002.tar", 600)
    with closing(level.open()) as images:
        np.testing.assert_array_equal(images.pixels(level.ids[:8]), level.all[:8])


def test_a_shard_with_fewer_samples_than_its_index_says_is_refused_although_its_bytes_are_right(level: Level) -> None:
    level.replace(1, tar_of([(f"{n:08d}.png", png(level.pixels[n])) for n in (5, 7)]), 3)
    level.write_index()
    said = refusal(lambda: level.open().pixels(np.array([5])))
    assert f"000001.tar of {level.folder} holds 2 images, its index says 3" in said


def test_a_level_that_was_never_made_is_refused_with_the_command_that_makes_it(level: Level) -> None:
    said = refusal(lambda: Images(level.data, 8))
    assert "no 8px level" in said
    assert "gradine shard" in said


@pytest.mark.parametrize("text", [
    '{"resolution": 4, "sha', "", "\xff", "[]", "null", "{}", "[" * 100_000, '{"resolution": 4, "images": 3}',
    '{"resolution": 4, "images": 3, "shards": [{"file": "a.tar"}]}', '{"resolution": 4, "images": 3, "shards": 5}'])
def test_an_index_that_is_no_index_is_one_clear_line(level: Level, text: str) -> None:
    (level.folder / "index.json").write_bytes(text.encode("latin-1"))
    said = refusal(level.open)
    assert str(level.folder / "index.json") in said
    assert "gradine shard again" in said


WHERE = ["pipe:touch canary", "pipe:cat 000001.tar", "/etc/passwd", "../000001.tar", "..", "a/b.tar", "a\\..\\b", "",
         "s3://bucket/x.tar", "http://host/x.tar", "-rf", "a.tar\n", "a b.tar", None, 5, ["000001.tar"]]


@pytest.mark.fault
@pytest.mark.parametrize("name", WHERE)
def test_f32_an_index_whose_file_lies_elsewhere_is_refused_and_nothing_is_shelled(
        level: Level, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    level.entries[1]["file"] = name
    level.write_index()
    for call in (level.open, lambda: read_index(level.data, 4), lambda: data_digest(level.data, 4)):
        said = refusal(call)
        assert "index.json is no valid index" in said
        assert "gradine shard again" in said
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("changes", [
    {"images": 0}, {"images": -3}, {"images": 3.0}, {"images": True}, {"images": "3"}, {"images": None},
    {"images": float("inf")}, {"images": float("nan")}, {"images": 10**30}, {"images": 9_999}, {"sha256": ""},
    {"sha256": "0" * 63}, {"sha256": "../" * 21 + "0"}, {"sha256": None}, {"bytes": 0}, {"bytes": -1}, {"bytes": None},
    {"labels": [1]}, {"labels": 7}, {"labels": [0] * 4}])
def test_an_index_that_contradicts_itself_is_refused(level: Level, changes: dict[str, Any]) -> None:
    level.entries[1].update(changes)
    count = changes.get("images", 3)
    level.write_index(**{"images": 9 + count if isinstance(count, int | float) else 12})
    assert "index.json is no valid index" in refusal(level.open)


@pytest.mark.parametrize("changes", [
    {"resolution": 8}, {"images": 11}, {"images": 0, "shards": []}, {"shards": {}}, {"shards": None}, {"channels": 2},
    {"channels": "3"}, {"encoding": "pkl"}, {"encoding": None}, {"encoding": ["raw"]}])
def test_an_index_of_something_else_is_refused(level: Level, changes: dict[str, Any]) -> None:
    level.write_index(**changes)
    assert "index.json is no valid index" in refusal(level.open)


def test_a_level_is_there_once_it_has_an_index(level: Level) -> None:
    assert (has_level(level.data, 4), has_level(level.data, 8)) == (True, False)


@pytest.mark.fault
@pytest.mark.parametrize("cached", [True, False])
def test_f32_what_lies_beside_the_images_is_never_decoded(level: Level, tmp_path: Path, cached: bool) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(canary)]), allow_pickle=True)
    beside = {"pyd": bomb, "pth": bomb, "pt": bomb, "pkl": bomb, "pickle": bomb, "npy": objects.getvalue(),
              "npz": objects.getvalue(), "json": b"[" * 100_000, "cls": b"pipe:touch canary", "ten": b"\xff" * 99,
              "url": b"pipe:touch canary", "png.pkl": bomb, "gz": b"\x1f\x8b" * 9, "mp4": b"\0" * 9}
    members = [(f"{n:08d}.{kind}", content) for n in (5, 6, 7)
               for kind, content in {**beside, "png": png(level.pixels[n])}.items()]
    level.replace(1, tar_of(members), 3)
    level.write_index()
    with closing(level.open(cached)) as images:
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)
        assert not list(images.damaged())
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()  # the bomb works


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["raw", "png", "webp", "jpeg"])
def test_f32_a_pickle_named_as_an_image_is_no_image(tmp_path: Path, encoding: str) -> None:
    level, canary = Level(tmp_path, (1, 1), 4, encoding=encoding), tmp_path / "canary"
    level.replace(1, tar_of([(f"00000001.{SUFFIXES[encoding][3]}", pickle.dumps(Bomb(canary)))]), 1)
    level.write_index()
    for cached in (False, True):
        said = exact_or_refused(level, 1, encoding, cached)
        assert f"000001.tar of {level.folder}: image 0 is no {encoding} of this level" in said
    assert not canary.exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_the_digest_of_a_level_is_that_of_its_shards_digests(level: Level) -> None:
    joined = "".join(hashlib.sha256(level.path(number).read_bytes()).hexdigest() for number in range(3))
    assert data_digest(level.data, 4) == hashlib.sha256(joined.encode()).hexdigest()


def exact_or_refused(level: Level, number: int, tried: str, cached: bool = False) -> str:
    """What a damaged shard is refused with, naming it; "" where every pixel is exactly right."""
    try:
        with closing(level.open(cached)) as images:
            np.testing.assert_array_equal(images.pixels(level.ids), level.all, err_msg=tried)
        return ""
    except UserError as error:
        said = str(error)
    assert level.path(number).name in said, tried
    assert "\n" not in said, tried
    return said


class Tally:
    def __init__(self) -> None:
        self.tried = self.refused = 0

    def count(self, said: str) -> None:
        self.tried += 1
        self.refused += bool(said)


@pytest.mark.fault
def test_f31_every_cut_and_every_flipped_bit_is_refused_and_nothing_is_lost_silently(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage as it comes, with the index as it was."""
    level, tally = Level(tmp_path, (1, 12, 2), encoding="raw"), Tally()
    rng = np.random.default_rng(31)
    for number in range(3):
        path, whole = level.path(number), level.path(number).read_bytes()

        def tried(content: bytes, what: str, path: Path = path, number: int = number, whole: bytes = whole) -> None:
            if content != whole:
                path.write_bytes(content)
                tally.count(exact_or_refused(level, number, what))

        for end in range(0, len(whole), 512):
            tried(whole[:end], f"cut at {end}")
            tried(whole[:end] + bytes(len(whole) - end), f"zero from {end}")  # the length is right
            tried(whole[:end] + bytes(512) + whole[end + 512:], f"zero block at {end}")
            tried(whole[:end] + whole[end + 512:], f"block {end} is missing")
        for more in (b"\0", bytes(512), b"x" * 512, whole):
            tried(whole + more, "appended")
        headers = [start for start in range(0, len(whole), 512) if whole[start + 257:start + 262] == b"ustar"]
        assert len(headers) == 2 * level.counts[number]
        body = rng.integers(0, 8 * len(whole), 400).tolist()
        all_of = headers if number == 0 else []  # one shard's stand for all
        bits = [8 * start + bit for start in all_of for bit in range(8 * 512)] + body
        with path.open("wb", buffering=0) as file:
            file.write(whole)
            for bit in bits:
                flipped = bytes([whole[bit // 8] ^ (1 << bit % 8)])
                os.pwrite(file.fileno(), flipped, bit // 8)
                tally.count(exact_or_refused(level, number, f"bit {bit} of shard {number}"))
                os.pwrite(file.fileno(), whole[bit // 8:bit // 8 + 1], bit // 8)
        path.write_bytes(whole)
        assert exact_or_refused(level, number, "mended") == ""
    assert tally.refused == tally.tried > 2 * 4096 + 3 * 400 + 300
    with capsys.disabled():
        print(f"\nF31: {tally.tried:,} cuts and flips tried, 0 lost silently")


@pytest.mark.fault
def test_f31_damage_that_the_index_agrees_with_is_refused_or_reads_exactly(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The index has the damaged shard's own length and sha256: what remains is the count, and the tar itself."""
    level, tally, number = Level(tmp_path, (1, 3, 2), encoding="raw"), Tally(), 1
    whole = level.path(number).read_bytes()

    def tried(content: bytes, what: str) -> bool:
        level.replace(number, content, 3)
        level.write_index()
        tally.count(said := exact_or_refused(level, number, what))
        return bool(said)

    members = [start for start in range(0, len(whole), 512) if whole[start + 257:start + 262] == b"ustar"]
    assert members == [1024 * n for n in range(6)]
    for end in range(0, len(whole), 512):
        assert tried(whole[:end], f"cut at {end}") == (end < 6 * 1024)
        tried(whole[:end] + whole[end + 512:], f"block {end} is missing")
        if end in members:
            assert tried(whole[:end] + bytes(512) + whole[end + 512:], f"header {end} is zero")
    for start in members[:2]:  # a label and an image
        for bit in range(8 * start, 8 * (start + 512)):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            refused = tried(bytes(content), f"bit {bit}")
            assert refused or bit // 8 - start in range(148, 156)  # the checksum itself has bytes that say nothing
    assert 0 < tally.tried - tally.refused < 100
    with capsys.disabled():
        print(f"\nF31: {tally.tried:,} cuts and flips under a matching index tried, {tally.refused:,} refused, "
              "the others exact")


def header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def resized(block: bytes, size: int) -> bytes:
    """A header whose size field is `size`, in base 256, with its checksum set right."""
    block = block[:124] + (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True) + block[136:]
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def block_of(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def hostile(level: Level, kind: str, outside: Path) -> tuple[bytes, int]:
    """A shard of images 5, 6, 7 with something in it that no gradine shard writes; and the count its index says."""
    content = {n: encoded(level.pixels[n], "raw") for n in (5, 6, 7)}
    good = [header(member(f"{n:08d}.ppm", len(raw))) + block_of(raw) for n, raw in content.items()]
    end, size = bytes(1024), len(content[5])
    plain = b"".join(good)
    first_two = good[0] + good[1]
    huge = 10 << 30
    sparse_map = b"".join(b"%011o\0" % n for n in (0, 0, 0, 0, 0, 0, 0, 0)) + b"\0" + b"%011o\0" % huge
    gnu_sparse = bytearray(header(member("00000007.ppm", 0, tarfile.GNUTYPE_SPARSE)))
    gnu_sparse[386:386 + len(sparse_map)] = sparse_map
    pax = b"".join(b"%d %s\n" % (len(line) + 4, line) for line in
                   (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=00000007.ppm",
                    b"GNU.sparse.realsize=%d" % size))
    sized = b"24 size=%d\n" % huge + b" " * 3
    kinds: dict[str, tuple[bytes, int]] = {
        "duplicate": (plain + good[2], 4),
        "duplicate, counted once": (plain + good[2], 3),
        "duplicate in place of another": (good[0] + good[1] + good[1], 3),
        "duplicate label": (plain + 2 * (header(member("00000007.cls", 1)) + block_of(b"1")), 3),
        "too few": (first_two, 3), "too many": (plain, 2), "none": (b"", 3),
        "after the end": (first_two + end + good[2], 3),
        "not a tar": (b"<html>" * 1000, 3), "zeros": (bytes(10240), 3), "long zeros": (bytes(1 << 20), 3),
        "symlink": (first_two + header(member("00000007.ppm", 0, tarfile.SYMTYPE, linkname="/etc/passwd")), 3),
        "hard link": (first_two + header(member("00000007.ppm", 0, tarfile.LNKTYPE, linkname="00000005.ppm")), 3),
        "hard link with content": (first_two + header(member("00000007.ppm", size, tarfile.LNKTYPE, linkname="x"))
                                   + block_of(content[7]), 3),
        "device": (first_two + header(member("00000007.ppm", 0, tarfile.CHRTYPE, devmajor=1, devminor=5)), 3),
        "pipe": (first_two + header(member("00000007.ppm", 0, tarfile.FIFOTYPE)), 3),
        "folder": (plain + header(member("00000008.ppm/", 0, tarfile.DIRTYPE)), 4),
        "contiguous": (first_two + header(member("00000007.ppm", size, tarfile.CONTTYPE)) + block_of(content[7]), 3),
        "unknown type": (first_two + header(member("00000007.ppm", size, b"Z")) + block_of(content[7]), 3),
        "parent names": (good[0] + b"".join(header(member(f"../../../{outside.name}/{n}.ppm", size))
                                            + block_of(content[n]) for n in (6, 7)), 3),
        "absolute name": (first_two + header(member(f"{outside}/7.ppm", size)) + block_of(content[7]), 3),
        "long name": (first_two + header(member("a" * 300 + "/00000007.ppm", size)) + block_of(content[7]), 3),
        "long name of 10 GB": (resized(header(member("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)), huge) + plain, 3),
        "long link of 10 GB": (resized(header(member("././@LongLink", 0, tarfile.GNUTYPE_LONGLINK)), huge) + plain, 3),
        "long name of 8 EB": (resized(header(member("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)), 2**63) + plain, 3),
        "pax header of 10 GB": (resized(header(member("pax", 0, tarfile.XHDTYPE)), huge) + plain, 3),
        "pax size of 10 GB": (first_two + header(member("pax", len(sized), tarfile.XHDTYPE)) + block_of(sized)
                              + good[2], 3),
        "global pax header": (header(member("pax", len(sized), tarfile.XGLTYPE)) + block_of(sized) + plain, 3),
        "old sparse": (first_two + resized(bytes(gnu_sparse), 0), 3),
        "pax sparse": (first_two + header(member("pax", len(pax), tarfile.XHDTYPE)) + block_of(pax)
                       + header(member("GNUSparseFile.0/7.ppm", 512 + size)) + block_of(b"1\n0\n%d\n" % size)
                       + block_of(content[7]), 3),
        "longer than the file": (first_two + header(member("00000007.ppm", 1 << 20)) + block_of(content[7]), 3),
        "10 GB in a short file": (first_two + resized(header(member("00000007.ppm", 0)), huge) + good[2], 3),
        "back to itself": (first_two + resized(header(member("00000007.ppm", 0)), -512), 3),
        "back to the start": (first_two + resized(header(member("00000007.ppm", 0)), -512 - len(first_two)), 3),
        "long name back to itself": (first_two + resized(
            header(member("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)), -512), 3),
        "wrong checksum": (first_two + good[2][:148] + b"0000000\0" + good[2][156:], 3),
    }
    shard, count = kinds[kind]
    return block_of(shard) + end, count


KINDS = ["duplicate", "duplicate, counted once", "duplicate in place of another", "duplicate label", "too few",
         "too many", "none", "after the end", "not a tar", "zeros", "long zeros", "symlink", "hard link",
         "hard link with content", "device", "pipe", "folder", "contiguous", "unknown type", "long name",
         "long name of 10 GB", "long link of 10 GB", "long name of 8 EB", "pax header of 10 GB", "pax size of 10 GB",
         "global pax header", "old sparse", "pax sparse", "longer than the file", "10 GB in a short file",
         "back to itself", "back to the start", "long name back to itself", "wrong checksum"]


@pytest.mark.fault
@pytest.mark.parametrize("kind", KINDS)
def test_f31_a_hostile_shard_that_its_index_agrees_with_is_refused_in_little_memory_and_time(
        tmp_path: Path, kind: str) -> None:
    level, outside = Level(tmp_path / "level", encoding="raw"), tmp_path / "outside"
    content, count = hostile(level, kind, outside)
    level.replace(1, content + bytes(2048), count)  # so that length and count alone are credible
    level.write_index(images=9 + count)
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    began = time.process_time()
    try:
        with closing(level.open()) as images:
            said = refusal(lambda: images.pixels(np.array([5, 6, 7])))
            assert [said] == list(images.damaged())
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2
    assert "000001.tar" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["parent names", "absolute name"])
def test_f31_a_name_that_leads_elsewhere_is_read_as_it_is_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    level, outside = Level(tmp_path / "level", encoding="raw"), tmp_path / "outside"
    level.replace(1, *hostile(level, kind, outside))
    level.write_index()
    before = sorted(tmp_path.rglob("*"))
    assert exact_or_refused(level, 1, kind) == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["png", "webp", "jpeg", "raw"])
def test_f31_an_image_that_claims_to_be_larger_than_its_level_is_refused_from_its_header(
        tmp_path: Path, encoding: str) -> None:
    level = Level(tmp_path, (1, 1), 4, encoding=encoding)
    vast = {"png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
                   + png_chunk(b"IDAT", b"\x78\x9c" + bytes(99)) + png_chunk(b"IEND", b""),
            "raw": b"P6\n60000 60000\n255\n" + bytes(99)}
    if encoding in ("webp", "jpeg"):
        vast[encoding] = encoded(np.zeros((4000, 4000, 3), np.uint8), encoding)
    level.replace(1, tar_of([(f"1.{SUFFIXES[encoding][3]}", vast[encoding])]), 1)
    level.write_index()
    with closing(level.open()) as images:
        before = peak_bytes()
        assert "000001.tar" in refusal(lambda: images.pixels(np.array([1])))
        assert peak_bytes() - before < 20e6


def peak_bytes() -> int:
    """The most memory this process ever held."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def png_chunk(kind: bytes, content: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.fault
def test_f34_a_shard_that_is_missing_replaced_swapped_or_edited_is_refused(tmp_path: Path) -> None:
    def fresh(name: str) -> Level:
        return Level(tmp_path / name, (3, 3, 3), encoding="raw")

    missing = fresh("missing")
    missing.path(1).unlink()
    assert "000001.tar has no file" in refusal(missing.open)

    swapped = fresh("swapped")
    contents = [swapped.path(n).read_bytes() for n in range(3)]
    assert len(contents[0]) == len(contents[1])
    swapped.path(0).write_bytes(contents[1])
    swapped.path(1).write_bytes(contents[0])
    for asked, number in ((0, 0), (4, 1)):
        with closing(swapped.open()) as images:
            assert f"{number:06d}.tar" in refusal(partial(images.pixels, np.array([asked])))

    replaced = fresh("replaced")
    replaced.path(2).write_bytes(Level(tmp_path / "other", (3, 3, 3), encoding="raw", seed=9).path(2).read_bytes())
    with closing(replaced.open()) as images:
        assert [line.split()[1] for line in images.damaged()] == ["000002.tar"]

    renamed = fresh("renamed")
    renamed.entries[0]["file"], renamed.entries[1]["file"] = "000001.tar", "000000.tar"
    renamed.write_index()
    with closing(renamed.open()) as images:
        assert len(list(images.damaged())) == 2

    edited = fresh("edited")
    content = edited.path(0).read_bytes()
    edited.path(0).write_bytes(content.replace(edited.pixels[1].tobytes(), edited.pixels[0].tobytes()))
    assert edited.path(0).stat().st_size == len(content)
    assert "damaged" in exact_or_refused(edited, 0, "edited")

    gone = fresh("gone")
    with closing(gone.open()) as images:
        gone.path(1).unlink()
        np.testing.assert_array_equal(images.pixels(np.arange(3)), gone.all[:3])
        with pytest.raises(EnvironmentFault, match="000001.tar is gone since training began"):
            images.pixels(np.array([4]))


@pytest.mark.fault
def test_f34_any_change_of_a_set_changes_its_digest(tmp_path: Path) -> None:
    level = Level(tmp_path, (3, 3, 3), encoding="raw")
    digests = [data_digest(level.data, 4)]
    level.entries.reverse()
    level.write_index()
    digests.append(data_digest(level.data, 4))
    del level.entries[1]
    level.write_index(images=6)
    digests.append(data_digest(level.data, 4))
    level.replace(1, tar_of([(f"{n}.ppm", encoded(level.pixels[n], "raw")) for n in range(3)]), 3)
    level.write_index(images=6)
    digests.append(data_digest(level.data, 4))
    assert len(set(digests)) == 4


@pytest.mark.fault
def test_f34_the_order_is_that_of_the_index_whatever_the_folder_lists_first(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = numbered(tmp_path, (2,) * 20)
    listing = Store.list
    shown: list[list[int]] = []
    for change in (lambda files: files, lambda files: files[::-1], lambda files: files[7:] + files[:7]):
        for number in np.random.default_rng(len(shown)).permutation(20).tolist():
            moved = shutil.copyfile(level.path(number), tmp_path / "moved")
            level.path(number).unlink()  # made again: another place in the folder
            moved.rename(level.path(number))
        monkeypatch.setattr(Store, "list", lambda store, change=change: change(listing(store)))
        with closing(level.open()) as images:
            (steps,) = [laid_back(run_on(level, images=80), images, 0)]
            shown.append([n for step in steps for n in ids_of(step["reals"])])
    assert shown[0] == plain_epoch(level.counts, 0, 0) + plain_epoch(level.counts, 0, 1)
    assert shown[1:] == shown[:1] * 2


# ---- Looking ahead


def idle(images: Images) -> None:
    """Waits until all that was to be done ahead is done: one thread does it in order."""
    images._ahead.submit(lambda: None).result(timeout=60)


@pytest.fixture
def blocks_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(order_module, "BLOCK_SHARDS", 2)
    epoch_order.cache_clear()
    yield
    epoch_order.cache_clear()


def shard_blocks(level: Level, epochs: int) -> list[list[int]]:
    """The shards in the order of their use, two at a time, from what each epoch shows."""
    blocks = []
    for epoch in range(epochs):
        shards = (epoch_order(level.counts, 0, epoch) // level.counts[0]).tolist()
        blocks += [sorted(set(shards[start:start + 2 * level.counts[0]]))
                   for start in range(0, len(shards), 2 * level.counts[0])]
    return blocks


def test_the_shards_of_the_next_block_are_verified_before_they_are_needed_and_no_others(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks_of_two: None) -> None:
    level = numbered(tmp_path, (8,) * 9)
    read: list[tuple[str, int]] = []
    original = Images._list_members

    def recorded(images: Images, shard: int, *rest: Any) -> np.ndarray:
        read.append((threading.current_thread().name.partition("_")[0], shard))
        return original(images, shard, *rest)

    monkeypatch.setattr(Images, "_list_members", recorded)
    blocks = shard_blocks(level, 1)
    assert [len(block) for block in blocks] == [2, 2, 2, 2, 1]
    with closing(level.open()) as images:
        for start in range(0, 72, 4):
            images.look_ahead(0, start)
            idle(images)
            assert sorted(shard for _, shard in read) == sorted(itertools.chain(*blocks[:start // 16 + 2]))
            assert ids_of(torch.from_numpy(images.pixels(images.ids(0, start, 4)))) == images.ids(0, start, 4).tolist()
    assert {who for who, _ in read} == {"ahead"}
    assert [shard for _, shard in read[:2]] == [shard for shard in dict.fromkeys(
        shard for _, shard in read) if shard in blocks[0]]


def test_damage_found_ahead_is_told_when_the_shard_is_used_and_not_before(tmp_path: Path, blocks_of_two: None) -> None:
    level = numbered(tmp_path, (8,) * 6)
    bad = shard_blocks(level, 1)[1][0]
    flip(level.path(bad), 600)
    with closing(level.open()) as images:
        seen: list[int] = []

        def read_all() -> None:
            for (share,) in batches(run_on(level, batch=4, images=48), 0, images, 0, 0, 1):
                seen.extend(ids_of(share.reals))
                idle(images)

        assert re.search(f"{bad:06d}.tar .* damaged", refusal(read_all))
        order = epoch_order(level.counts, 0, 0).tolist()
        assert seen == order[:len(seen)]
        first = next(place for place, sample in enumerate(order) if sample // 8 == bad)
        assert len(seen) == first // 4 * 4 >= 16


READER = """
import re, sys, threading
import numpy as np
import torch
from PIL import Image
from gradine.configs.schema import from_dict
from gradine.stages.data import Images, batches, prefetch
from gradine.stages.pixels import decode

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

run = from_dict({"name": "t", "data": {"source": "none", "shards": sys.argv[1], "cache_dir": sys.argv[2],
                                       "cache_gb": float(sys.argv[3])},
                 "network": {"latent_size": 8, "fmap_base": 512}, "training": {},
                 "stages": [{"resolution": 4 * 2**n, "fade_images": 4, "hold_images": 4 if n < 8 else 128,
                             "batch_size": 4} for n in range(9)]})
torch.randn(8), Image.init(), np.random.Philox(0).random_raw(9)
before, peak, ended = status("RssAnon"), [0.0], threading.Event()

def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], status("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
images = Images(run.data, 1024, decode_threads=2)
shown = sum(len(share.reals) for shares in prefetch(batches(run, 8, images, 60, 0, 1)) for share in shares)
ended.set()
watcher.join()
print(shown, peak[0] - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Level:
    """128 images of 1024 px, 403 MB of pixels: two different ones, of noise that makes large files."""
    rng, base = np.random.default_rng(0), np.linspace(0, 200, 1024)[:, None, None]
    few = np.stack([(base + rng.integers(0, 50, (1024, 1024, 1))).astype(np.uint8).repeat(3, 2) for _ in range(2)])
    level = Level(tmp_path_factory.mktemp("large"), (2,), 1024, encoding="jpeg", pixels=few)
    contents = [encoded(pixels, "jpeg") for pixels in few]
    level.entries = []
    for number in range(4):
        level.entries.append({})
        level.replace(number, tar_of([(f"{n:08d}.jpg", contents[n % 2])
                                      for n in range(32 * number, 32 * number + 32)]), 32)
    level.write_index(images=128)
    return level


@pytest.mark.parametrize("cache_gb", ["0", "1"])
def test_a_worker_reads_1024px_within_300_mb_beyond_its_imports_and_the_mapped_cache(
        large: Level, tmp_path: Path, cache_gb: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = subprocess.run([sys.executable, "-c", READER, large.data.shards, str(tmp_path / "cache"), cache_gb],
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    shown, peak = result.stdout.split()
    assert int(shown) == 132  # a fade of 4 and a hold of 128
    assert float(peak) < 300
    with capsys.disabled():
        print(f"\nreading 1024px, cache_gb={cache_gb}: {float(peak):.0f} MB beyond imports and the mapped cache")


# ---- Remote shards


def downloads(level: Level) -> Path:
    return Path(level.data.cache_dir) / "shards"


def kept(level: Level) -> set[str]:
    """What the node's folder holds beside its locks."""
    return {path.name for path in downloads(level).iterdir() if path.suffix != ".lock"}


def kept_as(level: Level, *numbers: int) -> set[str]:
    return {f"{level.entries[number]['sha256']}.tar" for number in numbers}


def budget_of(level: Level, shards: int) -> float:
    """data.download_gb that holds so many of a level's shards, which are all of one length."""
    (length,) = {entry["bytes"] for entry in level.entries}
    return (shards * length + 100) / 1e9


@contextmanager
def counted(level: Level, kind: str = "", **fault: Any) -> Iterator[tuple[str, Fault]]:
    """URL of a level's set behind a proxy that counts requests for tars, and commits `kind` where `hits` says.

    A download is two requests: one for the first byte, to see the length, and one for the content.
    """
    struck = Fault(kind, only=lambda method, path: method == "GET" and path.endswith(".tar"),
                   **{"hits": lambda number: bool(kind), **fault})
    with web_folder(level.root) as served, proxy(served, struck) as url:
        yield url, struck


@pytest.fixture(params=["http", "http without ranges", "s3"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path,
              monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Level, str]]:
    """A level, and the URL of its set."""
    level = numbered(tmp_path, (8,) * 9, labels=[n % 3 for n in range(72)])
    if request.param == "s3":
        aws(monkeypatch, request.getfixturevalue("moto"))
        store = Store(f"s3://{BUCKET}/{tmp_path.name}", deadline_s=30)
        for path in sorted(level.root.rglob("*.*")):
            store.write(path.relative_to(level.root).as_posix(), path.read_bytes())
        yield level, store.location
    else:
        with web_folder(level.root, ranges=request.param == "http") as url:
            yield level, url


@pytest.mark.fault
@pytest.mark.parametrize("sampling", ["raw", "balanced"])
def test_remote_shards_give_the_same_images_in_the_same_order(elsewhere: tuple[Level, str], sampling: str) -> None:
    level, url = elsewhere
    assert data_digest(Data(source="", shards=url), 4) == data_digest(level.data, 4)
    assert has_level(Data(source="", shards=url), 4)
    assert "no 8px level" in refusal(lambda: Images(Data(source="", shards=url), 8))
    shown = []
    for where, cached in ((level.data.shards, True), (url, False), (url, True), (url + "/", False)):
        with closing(level.open(cached, shards=where, sampling=sampling)) as images:
            shown.append([n for step in laid_back(run_on(level, 2, images=160), images, 0)
                          for n in ids_of(step["reals"])])
            if where == url and not cached:
                np.testing.assert_array_equal(images.pixels(level.ids), level.all)
                assert not list(images.damaged())
    assert shown[1:] == shown[:1] * 3
    assert kept(level) == kept_as(level, *range(9))


@pytest.mark.fault
def test_downloads_stay_within_the_disk_budget_come_ahead_and_come_back(
        tmp_path: Path, blocks_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    level, fetching = numbered(tmp_path, (8,) * 9), []
    original = Store.fetch

    def recorded(store: Store, name: str, local: Path) -> None:
        fetching.append(threading.current_thread().name.partition("_")[0])
        original(store, name, local)

    monkeypatch.setattr(Store, "fetch", recorded)
    blocks, budget = shard_blocks(level, 4), budget_of(level, 4)
    with counted(level) as (url, fault), closing(level.open(shards=url, download_gb=budget)) as images, \
            watched(downloads(level), "*.tar") as seen:
        for start in range(0, 3 * 72, 4):
            images.look_ahead(0, start)
            idle(images)
            ids = images.ids(0, start, 4)
            assert ids_of(torch.from_numpy(images.pixels(ids))) == ids.tolist()
            assert kept(level) >= kept_as(level, *blocks[5 * (start // 72) + start % 72 // 16])
    assert max(seen) <= budget * 1e9
    assert set(fetching) == {"ahead"}
    assert 2 * 18 < len(fault.requests) <= 2 * 27  # each epoch some are still there from the one before
    assert len(set(fault.requests)) == 9
    assert kept(level) < kept_as(level, *range(9))


@pytest.mark.fault
def test_a_shard_that_had_to_go_is_fetched_and_checked_again_where_it_is_used(tmp_path: Path) -> None:
    level = numbered(tmp_path, (8,) * 3)
    with counted(level) as (url, fault), closing(level.open(shards=url)) as images:
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)
        for path in downloads(level).glob("*.tar"):
            path.unlink()  # another process of this node needed the room
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)
        assert len(fault.requests) == 2 * 6
        (downloads(level) / f"{level.entries[1]['sha256']}.tar").unlink()
        flip(level.path(1), 600)
        assert "000001.tar" in refusal(lambda: images.pixels(level.ids[8:9]))
        assert kept(level) == kept_as(level, 0, 2)


@pytest.mark.fault
def test_damaged_content_is_refused_by_its_sha256_and_not_kept(tmp_path: Path) -> None:
    level = numbered(tmp_path, (8,) * 3)
    flip(level.path(1), 600)
    with counted(level) as (url, fault), closing(level.open(shards=url)) as images:
        images.pixels(level.ids[:8])
        for _ in range(2):
            said = refusal(lambda: images.pixels(level.ids[8:9]))
            assert f"000001.tar of {url}/r0004 has sha256" in said
            assert kept(level) == kept_as(level, 0)
        flip(level.path(1), 600)  # mended
        np.testing.assert_array_equal(images.pixels(level.ids), level.all)
        assert len(fault.requests) == 2 * (3 + 2)
    level.path(2).unlink()
    (downloads(level) / f"{level.entries[2]['sha256']}.tar").unlink()
    with web_folder(level.root) as url, closing(level.open(shards=url)) as images:
        assert f"shard {url}/r0004/000002.tar is not there" in refusal(lambda: images.pixels(level.ids))


@pytest.mark.fault
def test_a_download_that_this_disk_has_damaged_is_made_once_more(tmp_path: Path) -> None:
    level = numbered(tmp_path, (8,) * 3)
    for number, damage in enumerate((lambda path: flip(path, 600), lambda path: os.truncate(path, 700))):
        with counted(level) as (url, fault):
            with closing(level.open(shards=url)) as images:
                np.testing.assert_array_equal(images.pixels(level.ids), level.all)
            damage(downloads(level) / f"{level.entries[1]['sha256']}.tar")
            with closing(level.open(shards=url)) as images:
                np.testing.assert_array_equal(images.pixels(level.ids), level.all)
                assert not list(images.damaged())
            assert len(fault.requests) == 2 * (1 if number else 4)


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["half", "503", "reset"])
def test_f33_what_a_bad_connection_does_to_a_shard_is_mended_by_trying_again(tmp_path: Path, kind: str) -> None:
    level = numbered(tmp_path, (8,) * 3)
    with counted(level, kind, hits=lambda number: number in (2, 3, 5, 8)) as (url, fault), \
            closing(level.open(shards=url)) as images:
        for n in level.ids:  # one after the other, so that the requests are in order
            np.testing.assert_array_equal(images.pixels(level.ids[n:n + 1]), level.all[n:n + 1])
        # half a look at the first byte does no harm
        assert (fault.done, len(fault.requests)) == (4, 2 * 3 + (3 if kind == "half" else 4))
    assert kept(level) == kept_as(level, 0, 1, 2)


@pytest.mark.fault
def test_f33_a_store_that_stays_away_is_one_line_after_the_deadline(tmp_path: Path) -> None:
    level = numbered(tmp_path, (8,) * 3)
    with counted(level, "503") as (url, _), closing(level.open(shards=url, deadline_s=1)) as images:
        began = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"000000\.tar could not be .* tries"):
            images.pixels(np.array([0]))
        assert time.monotonic() - began < 5
        assert not kept(level)


def test_a_disk_budget_for_less_than_what_is_read_together_is_refused(tmp_path: Path, blocks_of_two: None) -> None:
    level = numbered(tmp_path, (8,) * 9)
    with web_folder(level.root) as url:
        for sampling, needed in (("raw", 4), ("balanced", 9)):
            level.open(shards=url, sampling=sampling, download_gb=budget_of(level, needed)).close()
            small: dict[str, Any] = {"shards": url, "sampling": sampling, "download_gb": budget_of(level, needed - 1)}
            said = refusal(partial(level.open, **small))
            for part in ("data.download_gb=", "4px", "data.shard_images"):
                assert part in said
    level.open(download_gb=0).close()  # no matter to local shards


@pytest.mark.parametrize("url", ["http://user:canary-pw@127.0.0.1:1/set", "http://127.0.0.1:1/set?sig=canary-pw"])
def test_shards_behind_a_secret_url_are_refused_without_telling_it(url: str) -> None:
    assert "canary-pw" not in refusal(lambda: Data(source="", shards=url))


DOWNLOADER = """
import hashlib, sys
import numpy as np
from gradine.configs.schema import Data
from gradine.stages.data import Images
print("ready", flush=True)
sys.stdin.readline()
images = Images(Data(source="none", shards=sys.argv[1], cache_dir=sys.argv[2], cache_gb=0, deadline_s=30), 4)
images.look_ahead(int(sys.argv[3]), 0)
print(hashlib.sha256(images.pixels(np.arange(len(images))).tobytes()).hexdigest(), flush=True)
images.close()
"""


@pytest.mark.fault
def test_two_processes_of_a_node_download_each_shard_once(tmp_path: Path) -> None:
    level = numbered(tmp_path, (8,) * 9)
    with counted(level, "slow", seconds=0.05) as (url, fault):
        started = [subprocess.Popen([sys.executable, "-c", DOWNLOADER, url, level.data.cache_dir, str(seed)],
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for seed in (0, 0)]
        for process in started:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in started:
            go(process)
        digests = [process.communicate(timeout=60)[0].strip() for process in started]
    assert digests == [hashlib.sha256(level.all.tobytes()).hexdigest()] * 2
    assert (len(fault.requests), len(set(fault.requests))) == (2 * 9, 9)


@pytest.mark.fault
def test_what_a_process_killed_while_it_downloads_left_goes_with_the_next_download(tmp_path: Path) -> None:
    level = numbered(tmp_path, (8,) * 3)
    with counted(level, "silent", seconds=30, hits=lambda number: number == 4) as (url, fault):
        process = subprocess.Popen([sys.executable, "-c", DOWNLOADER, url, level.data.cache_dir, "0"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        go(process)
        while len(fault.requests) < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert list(downloads(level).glob("*.tmp*"))
        with closing(level.open(shards=url)) as images:
            np.testing.assert_array_equal(images.pixels(level.ids), level.all)
    assert kept(level) == kept_as(level, 0, 1, 2)
    assert 4 + 2 * 2 <= len(fault.requests) <= 4 + 2 * 3


@pytest.mark.fault
def test_a_full_disk_under_the_downloads_is_one_clear_line(tmp_path: Path) -> None:
    level = numbered(tmp_path, (60,) * 3)
    with tiny_disk(tmp_path / "cache"), web_folder(level.root) as url, closing(level.open(shards=url)) as images:
        with pytest.raises(EnvironmentFault, match=r"shard 00000\d\.tar of .* could not be kept in .*data\.cache_dir"):
            images.pixels(level.ids[:1])
        assert not kept(level)


# ---- Prefetch


def prefetching() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetch_gives_the_same_items_and_ends_its_thread() -> None:
    items: list[int | None] = [*range(50), None, 7]
    assert list(prefetch(iter(items))) == items
    assert list(prefetch(iter([]))) == []
    assert prefetching() == 0


def test_prefetch_raises_the_sources_exception_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("the shard is damaged")

    ahead = prefetch(source())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UserError, match="the shard is damaged"):
        next(ahead)
    assert prefetching() == 0


def test_prefetch_works_ahead_but_not_further_than_its_depth() -> None:
    made: list[int] = []
    ahead = prefetch((made.append(n) or n for n in range(100)), depth=2)  # type: ignore[func-returns-value]
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    ahead.close()  # type: ignore[attr-defined]


def test_closing_prefetch_early_ends_the_thread() -> None:
    ahead = prefetch(iter(range(10**9)))
    assert next(ahead) == 0
    assert prefetching() == 1
    ahead.close()  # type: ignore[attr-defined]
    assert prefetching() == 0


def test_a_share_moves_to_a_device_whole() -> None:
    share = Share(*(torch.ones(2, n + 1) for n in range(8)))
    moved = share.to(torch.device("meta"))
    assert [tensor.device.type for tensor in vars(moved).values()] == ["meta"] * 8
    assert [tensor.shape for tensor in vars(moved).values()] == [tensor.shape for tensor in vars(share).values()]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_decoding_ahead_has_only_the_time_that_steps_leave(shards: Path, tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with closing(Images(Data(source="", shards=str(shards), cache_gb=0, cache_dir=str(tmp_path)), 8)) as images:
        niceness = images._pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert niceness == min(19, before + 10)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
