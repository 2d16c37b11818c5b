"""Claims about order, batches and reading. The shards here are written by this file, with tarfile and Pillow alone."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradine.configs.schema import Data, EnvironmentFault, Run, UserError, from_dict
from gradine.stages.data import Images, batches, data_digest, draw, epoch_order, prefetch
from gradine.stages.step import Share


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_index(folder: Path, size: int, shards: dict[str, tuple[bytes, int]]) -> None:
    listed = [{"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "images": images}
              for name, (content, images) in shards.items()]
    (folder / "index.json").write_text(json.dumps({"schema": 1, "resolution": size, "channels": 3, "shards": listed,
                                                   "images": sum(images for _, images in shards.values())}))


class Level:
    """One level's shards on disk, beside the pixels that are in them."""

    def __init__(self, path: Path, counts: tuple[int, ...] = (5, 3, 4), size: int = 4, seed: int = 0) -> None:
        self.folder, self.size = path / "shards" / f"r{size:04d}", size
        self.folder.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        self.pixels = rng.integers(0, 256, (sum(counts), size, size, 3), dtype=np.uint8)
        self.shards, first = {}, 0
        for number, count in enumerate(counts):
            members = []
            for n in range(first, first + count):
                members += [(f"{n:08d}.cls", b"1"), (f"{n:08d}.png", png(self.pixels[n]))]
            self.shards[f"{number:06d}.tar"] = tar_of(members), count
            (self.folder / f"{number:06d}.tar").write_bytes(self.shards[f"{number:06d}.tar"][0])
            first += count
        write_index(self.folder, size, self.shards)
        self.data = Data(source="none", shards=str(path / "shards"), cache_dir=str(path / "cache"))

    def open(self, cached: bool = False) -> Images:
        return Images.open(Data(**{**vars(self.data), "cache_gb": 1.0 if cached else 0.0}), self.size, decode_threads=2)

    @property
    def all(self) -> np.ndarray:
        return self.pixels.transpose(0, 3, 1, 2)

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.pixels))


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


# ---- Batches


def run_on(level: Level, workers: int = 1, micro_batch: int = 0, **training: Any) -> Run:
    return from_dict({"name": "t", "data": vars(level.data), "network": {"latent_size": 6, "fmap_base": 16},
                      "training": training,
                      "stages": [{"resolution": 4, "hold_images": 95, "batch_size": 16, "workers": workers,
                                  "micro_batch": micro_batch}]})


def global_batches(level: Level, workers: int, micro_batch: int = 0, start: int = 0) -> list[dict[str, torch.Tensor]]:
    """What all workers together see: their shares laid back onto the rows of the global batch.

    A batch of 16 has 4 groups of 4; group g is the rows g, g + 4, g + 8, g + 12. A worker owns whole groups in order.
    """
    run, images = run_on(level, workers, micro_batch), level.open(cached=True)
    steps: list[dict[str, torch.Tensor]] = []
    for rank in range(workers):
        for number, shares in enumerate(batches(run, 0, images, start, rank, workers)):
            if rank == 0:
                steps.append({})
            groups = iter(range(rank * 4 // workers, (rank + 1) * 4 // workers))
            for share in shares:
                own = [next(groups) for _ in range(len(share.mix) // 4)]
                rows = [member * 4 + group for member in range(4) for group in own]
                for name, tensor in vars(share).items():
                    whole = steps[number].setdefault(name, torch.zeros(16, *tensor.shape[1:], dtype=tensor.dtype))
                    assert not whole[rows].any()  # nobody else's rows
                    whole[rows] = tensor
            assert next(groups, None) is None
    return steps


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
    assert (Path(level.data.cache_dir).is_dir() and any(Path(level.data.cache_dir).glob("*.u8"))) == cached


def test_the_cache_is_used_exactly_where_its_bytes_fit_the_budget(level: Level) -> None:
    needed = 12 * 3 * 4 * 4
    for budget, cached in ((needed - 1, False), (needed, True)):
        Images.open(Data(**{**vars(level.data), "cache_gb": budget / 1e9}), 4)
        assert any(Path(level.data.cache_dir).glob("*.u8")) == cached


def test_a_cache_is_never_used_for_other_content(tmp_path: Path) -> None:
    one, other = Level(tmp_path / "one", seed=1), Level(tmp_path / "other", seed=2)
    shared = str(tmp_path / "cache")
    for level in (one, other, one):
        images = Images.open(Data(**{**vars(level.data), "cache_dir": shared}), 4)
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


BUILDER = """
import sys, time
from pathlib import Path
from gradine.configs.schema import Data
from gradine.stages import data
decode = data.Images._decode
def slow(images, sample):
    print("decoded", flush=True)
    time.sleep(0.02)
    return decode(images, sample)
data.Images._decode = slow
print("ready", flush=True)
sys.stdin.readline()
images = data.Images.open(Data(source="none", shards=sys.argv[1], cache_dir=sys.argv[2]), 4)
import hashlib, numpy
print(hashlib.sha256(images.pixels(numpy.arange(len(images))).tobytes()).hexdigest(), flush=True)
"""


def test_two_processes_that_build_the_same_cache_at_once_both_get_it_right_and_one_decodes(level: Level) -> None:
    arguments = [sys.executable, "-c", BUILDER, level.data.shards, level.data.cache_dir]
    builders = [subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for builder in builders:
        assert builder.stdout
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:  # both are past their imports: go
        assert builder.stdin
        builder.stdin.write("\n")
        builder.stdin.flush()
    outputs = [builder.communicate(timeout=60)[0].split() for builder in builders]
    assert [output[-1] for output in outputs] == [hashlib.sha256(level.all.tobytes()).hexdigest()] * 2
    assert sorted(len(output) - 1 for output in outputs) == [0, 12]


@pytest.mark.fault
def test_a_full_disk_under_the_cache_is_one_clear_line_and_no_crash(tmp_path: Path) -> None:
    level = Level(tmp_path, counts=(300,), size=16)  # 230,400 bytes decoded
    cache = tmp_path / "cache"
    cache.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", cache],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        with pytest.raises(EnvironmentFault) as caught:
            level.open(cached=True)
        assert "needs 230,400 bytes" in str(caught.value)
        assert "data.cache_gb=0" in str(caught.value)
        assert not list(cache.glob("*.tmp"))
    finally:
        subprocess.run(["umount", cache], check=True)
    np.testing.assert_array_equal(level.open(cached=True).pixels(level.ids), level.all)


# ---- Damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_shard_of_another_length_or_none_is_refused_when_the_level_is_opened(level: Level) -> None:
    shard = level.folder / "000001.tar"
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
    content = tar_of([(f"{n:08d}.png", png(level.pixels[n])) for n in (5, 7)])
    (level.folder / "000001.tar").write_bytes(content)
    write_index(level.folder, 4, {**level.shards, "000001.tar": (content, 3)})
    said = refusal(lambda: level.open().pixels(np.array([5])))
    assert "000001.tar holds 2 images, its index says 3" in said


def test_a_level_that_was_never_made_is_refused_with_the_command_that_makes_it(level: Level) -> None:
    said = refusal(lambda: Images.open(level.data, 8))
    assert "no 8px level" in said
    assert "gradine shard" in said


@pytest.mark.parametrize("text", [
    '{"resolution": 4, "sha', "", "\xff", "[]", "null", "{}", '{"resolution": 4, "images": 3}',
    '{"resolution": 4, "images": 3, "shards": [{"file": "a.tar"}]}', '{"resolution": 4, "images": 3, "shards": 5}',
    '{"resolution": 4, "images": 3, "shards": [{"file": "a.tar", "bytes": 9, "sha256": "0", "images": 2}]}',
    '{"resolution": 8, "images": 2, "shards": [{"file": "a.tar", "bytes": 9, "sha256": "0", "images": 2}]}',
    '{"resolution": 4, "images": 0, "shards": []}'])
def test_a_broken_index_is_one_clear_line(level: Level, text: str) -> None:
    (level.folder / "index.json").write_bytes(text.encode("latin-1"))
    said = refusal(level.open)
    assert str(level.folder / "index.json") in said
    assert "gradine shard again" in said


def test_a_pickle_in_a_shard_is_never_loaded(level: Level, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    members = [(f"{n:08d}.{kind}", content) for n in (5, 6, 7)
               for kind, content in (("png", png(level.pixels[n])), ("pyd", bomb), ("pth", bomb))]
    content = tar_of(members)
    (level.folder / "000001.tar").write_bytes(content)
    write_index(level.folder, 4, {**level.shards, "000001.tar": (content, 3)})
    np.testing.assert_array_equal(level.open().pixels(level.ids), level.all)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()  # the bomb works


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_the_digest_of_a_level_is_that_of_its_shards_digests(level: Level) -> None:
    joined = "".join(hashlib.sha256(content).hexdigest() for content, _ in level.shards.values())
    assert data_digest(level.data.shards, 4) == hashlib.sha256(joined.encode()).hexdigest()


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
    share = Share(*(torch.ones(2, n + 1) for n in range(5)))
    moved = share.to(torch.device("meta"))
    assert [tensor.device.type for tensor in vars(moved).values()] == ["meta"] * 5
    assert [tensor.shape for tensor in vars(moved).values()] == [tensor.shape for tensor in vars(share).values()]
