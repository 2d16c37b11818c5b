"""Claims about sets of shards: the same bytes whatever happens meanwhile, read by plain WebDataset, errors in one line.

What is claimed of "the same bytes" compares every file of a set with those of one that was made without disturbance.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import pickle
import random
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image

from gradine.configs.schema import Data, EnvironmentFault, UserError
from gradine.pipeline import shards as module
from gradine.pipeline import shards as shards_module
from gradine.pipeline.shards import make_slice, shard
from gradine.stages.data import Images
from gradine.stages.store import Store

from .object_store import BUCKET, Fault, aws, juicefs, moto, proxy

__all__ = ["juicefs", "moto"]

pytestmark = pytest.mark.usefixtures("ray_cluster")


def noise(seed: int, width: int, height: int | None = None) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height or width, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def sharded(source: Path | str, out: Path, resolution: int = 8, add: bool = False, **settings: Any) -> dict[str, Any]:
    data = Data(**{"source": str(source), "shards": str(out), "shard_images": 3, **settings})
    return shard(data, resolution, add=add)


def samples(tar: Path) -> list[dict[str, Any]]:
    """What plain WebDataset makes of a shard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file for the collector to close
        dataset = webdataset.WebDataset(str(tar), shardshuffle=False)  # type: ignore[attr-defined]
        found = list(dataset.decode("rgb8"))
        gc.collect()
    return found


def picture(sample: dict[str, Any]) -> np.ndarray:
    """The one image of a sample, under whichever extension."""
    (pixels,) = (value for key, value in sample.items() if not key.startswith("__") and key != "cls")
    return pixels


def level(out: Path, size: int) -> list[dict[str, Any]]:
    return [sample for tar in sorted((out / f"r{size:04d}").glob("*.tar")) for sample in samples(tar)]


def index(out: Path, size: int) -> dict[str, Any]:
    return json.loads((out / f"r{size:04d}" / "index.json").read_text())


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def members(out: Path, size: int) -> dict[str, bytes]:
    """Name -> bytes of every file in a level's tars."""
    found = {}
    for path in sorted((out / f"r{size:04d}").glob("*.tar")):
        with tarfile.open(path) as tar:
            found.update({m.name: tar.extractfile(m).read() for m in tar})  # type: ignore[union-attr]
    return found


def rejected_lines(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def mtimes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


OWN_RAY = """
import json, sys
import ray
from gradine.configs.schema import Data, EnvironmentFault, UserError
from gradine.pipeline.shards import shard
job = json.load(sys.stdin)
ray.init(address="local", num_cpus=job["cpus"], include_dashboard=False, log_to_driver=False, configure_logging=False,
         object_store_memory=150 << 20)
for settings, resolution, add in job["calls"]:
    try:
        said = shard(Data(**settings), resolution, add=add)
    except (UserError, EnvironmentFault) as error:
        said = {type(error).__name__: str(error)}
    print(json.dumps(said), flush=True)
"""


def call(source: Path | str, out: Path | str, resolution: int, add: bool = False, **settings: Any) -> list[Any]:
    return [{"source": str(source), "shards": str(out), "shard_images": 3, **settings}, resolution, add]


def environment() -> dict[str, str]:
    """Of a user's shell: no trace of the Ray that this session runs."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def in_own_ray(cpus: int, calls: list[list[Any]], script: str = OWN_RAY) -> list[dict[str, Any]]:
    """What `shard` says to each call, on a Ray of its own that has this environment."""
    of_ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    ended = subprocess.run([sys.executable, "-c", script], input=json.dumps({"cpus": cpus, "calls": calls}), text=True,
                           capture_output=True, env={**environment(), **of_ray}, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def gradine(*arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "gradine.pipeline", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())


def answer(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, what it printed, what it complained of)."""
    printed, complained = process.communicate(timeout=300)
    assert "Traceback" not in complained
    return process.returncode, printed, complained


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight 8 px images, in two class folders: three slices of at most three."""
    files = {f"{'b' if n % 2 else 'a'}/{n}.png": encoded(noise(n, 8)) for n in range(8)}
    return folder_of(tmp_path_factory.mktemp("eight"), files)


# ---- Levels


def test_every_level_of_a_1024_px_image_is_the_plain_chain_of_two_by_two_means(tmp_path: Path) -> None:
    images = {"a/0.png": noise(0, 1024), "b/1.png": noise(1, 1024)}
    sharded(folder_of(tmp_path / "in", {name: encoded(image, compress_level=1) for name, image in images.items()}),
            tmp_path / "out", 1024)
    chains = [np.asarray(image, np.float64) for image in images.values()]
    for size in (1024, 512, 256, 128, 64, 32, 16, 8, 4):
        shown = level(tmp_path / "out", size)
        assert [(s["__key__"], s["cls"]) for s in shown] == [("00000000", 0), ("00000001", 1)]
        for number, sample in enumerate(shown):
            exact = chains[number]
            assert picture(sample).shape == (size, size, 3)
            off = np.abs(picture(sample) - exact)
            assert (off <= 0.5).all()  # rounded; at exactly .5 either way will do
            chains[number] = (exact[::2, ::2] + exact[1::2, ::2] + exact[::2, 1::2] + exact[1::2, 1::2]) / 4
    assert len(list((tmp_path / "out").glob("r[0-9]*"))) == 9


# ---- Shards are plain WebDataset


def test_plain_webdataset_reads_every_shard_and_finds_what_the_index_says(shards: Path, image_folder: Path) -> None:
    for size in (4, 8, 16, 32):
        listed = index(shards, size)
        found = [samples(shards / f"r{size:04d}" / entry["file"]) for entry in listed["shards"]]
        assert [len(part) for part in found] == [entry["images"] for entry in listed["shards"]] == [16, 16, 16]
        assert listed["images"] == 48
        assert listed["classes"] == ["day", "night"]
        flat = [sample for part in found for sample in part]
        assert [s["__key__"] for s in flat] == [f"{n:08d}" for n in range(48)]
        assert [s["cls"] for s in flat] == [0] * len(list((image_folder / "day").iterdir())) + [1] * 16
        assert all(picture(s).shape == (size, size, 3) and picture(s).dtype == np.uint8 for s in flat)


def test_the_index_names_the_bytes_and_sha256_of_each_tar(shards: Path) -> None:
    for size in (4, 32):
        for entry in index(shards, size)["shards"]:
            content = (shards / f"r{size:04d}" / entry["file"]).read_bytes()
            assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_labels_none_and_a_single_folder_give_no_cls(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path / "none", labels="none")
    sharded(eight / "a", tmp_path / "one")
    for out in ("none", "one"):
        assert all("cls" not in sample for sample in level(tmp_path / out, 4))
        assert index(tmp_path / out, 4)["classes"] == []


# ---- The same again


def test_two_runs_into_two_folders_give_identical_bytes(eight: Path, tmp_path: Path) -> None:
    first, second = (sharded(eight, tmp_path / name) for name in ("x", "y"))
    assert first == second
    assert first["made"] == 3
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_a_second_run_makes_nothing_and_rewrites_nothing(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path)
    before = mtimes(tmp_path)
    assert sharded(eight, tmp_path)["made"] == 0
    assert mtimes(tmp_path) == before


@pytest.mark.parametrize("lost", ["r0004/000001.tar", "r0008/000001.tar", "parts/000001.json"])
def test_after_a_loss_only_that_slice_is_made_and_its_bytes_are_the_same(
        eight: Path, tmp_path: Path, lost: str) -> None:
    sharded(eight, tmp_path)
    before, stamps = contents(tmp_path), mtimes(tmp_path)
    (tmp_path / lost).unlink()
    assert sharded(eight, tmp_path)["made"] == 1
    assert contents(tmp_path) == before
    assert {name for name, stamp in mtimes(tmp_path).items() if stamps[name] != stamp} == {
        "r0004/000001.tar", "r0008/000001.tar", "parts/000001.json"}


def test_a_tar_cut_short_is_made_again(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path)
    before = contents(tmp_path)
    os.truncate(tmp_path / "r0008/000002.tar", 1000)
    assert sharded(eight, tmp_path)["made"] == 1
    assert contents(tmp_path) == before


def test_folder_zip_and_tar_of_the_same_images_give_identical_tars(eight: Path, tmp_path: Path) -> None:
    names = [str(p.relative_to(eight)) for p in eight.rglob("*.png")]
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in sorted(names, reverse=True):
            archive.write(eight / name, name)
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(tmp_path / f"in.{suffix}", mode) as tar:  # type: ignore[call-overload]
            for name in sorted(names, reverse=True):  # a tar lists in the order of its making
                tar.add(eight / name, name)
    sharded(eight, tmp_path / "folder")
    for source in ("in.zip", "in.tar", "in.tar.gz"):
        sharded(tmp_path / source, tmp_path / f"out-{source}")
        assert contents(tmp_path / f"out-{source}", "*.tar") == contents(tmp_path / "folder", "*.tar")
        assert index(tmp_path / f"out-{source}", 8) == index(tmp_path / "folder", 8)


@pytest.mark.fault
def test_a_full_disk_is_one_clear_line_and_with_more_room_the_same_command_goes_on(eight: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        with pytest.raises(EnvironmentFault, match="No space left on device") as caught:
            sharded(eight, disk / "out", shard_images=8)
        for part in (str(disk), "bytes are free there", "same command"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(disk.rglob("index.json"))
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        sharded(eight, disk / "out", shard_images=8)
        sharded(eight, tmp_path / "roomy", shard_images=8)
        assert contents(disk / "out") == contents(tmp_path / "roomy")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_shards_of_one_cpu_and_of_two_are_the_same_bytes(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    for cpus in (1, 2):
        (made,) = in_own_ray(cpus, [call(image_folder, tmp_path / f"{cpus}", 32, shard_images=16)])
        assert made["made"] == 3
        assert contents(tmp_path / f"{cpus}") == contents(shards)


def test_a_slice_is_made_of_the_same_bytes_twice_and_says_what_it_wrote(eight: Path, tmp_path: Path) -> None:
    files = sorted(str(path.relative_to(eight)) for path in eight.rglob("*.png"))
    entries = [module.Entry(f"{n:08d}", name, (eight / name).stat().st_size, n % 2) for n, name in enumerate(files)]
    for name in "xy":
        (tmp_path / name).mkdir()
        part = make_slice(str(eight), entries, 5, Data(source=str(eight), shards=str(tmp_path / name)), 8)
        assert json.loads((tmp_path / name / "parts/000005.json").read_text()) == part
        assert part["labels"] == [0, 1] * 4
        assert part["source_bytes"] == sum((eight / file).stat().st_size for file in files)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert sorted(contents(tmp_path / "x")) == ["parts/000005.json", "r0004/000005.tar", "r0008/000005.tar"]


def test_the_summary_counts_the_bytes_of_all_tars_and_of_the_source(eight: Path, tmp_path: Path) -> None:
    summary = sharded(eight, tmp_path / "out")
    assert summary["bytes"] == sum(map(len, contents(tmp_path / "out", "*.tar").values()))
    assert summary["source_bytes"] == sum(map(len, contents(eight).values()))
    assert summary["images"] == 8
    assert (summary["shards"], summary["classes"], summary["rejected"], summary["ignored"]) == (3, 2, 0, 0)


def test_the_order_in_which_a_disk_lists_its_files_changes_no_byte(eight: Path, tmp_path: Path) -> None:
    files = contents(eight)
    for name, order in (("x", sorted(files)), ("y", sorted(files, reverse=True))):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        folder_of(tmp_path / "in", {file: files[file] for file in order})
        sharded(tmp_path / "in", tmp_path / name)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def failing(error: Callable[[], Exception], at: int) -> Callable[..., dict[str, Any]]:
    """`make_slice` with an error in slice `at`; a closure, so that Ray sends it by value."""
    def fail(source: str, entries: list[Any], number: int, *rest: Any) -> dict[str, Any]:
        from gradine.pipeline.shards import make_slice

        if number == at:
            raise error()
        return make_slice(source, entries, number, *rest)

    return fail


@pytest.mark.parametrize(("error", "kind", "parts"), [
    (lambda: UserError("x=1 is wrong. Use 2."), UserError, ["x=1 is wrong. Use 2."]),
    (lambda: EnvironmentFault("host h is silent. Wake it."), EnvironmentFault, ["host h is silent. Wake it."]),
    (lambda: MemoryError("no\nroom"), EnvironmentFault, ["slice 1", "MemoryError: no room.", "same command"]),
    (lambda: OSError(5, "Input/output error"), EnvironmentFault, ["slice 1", "Input/output error", "bytes are free"]),
    (lambda: ZeroDivisionError("bug"), EnvironmentFault, ["slice 1", "ZeroDivisionError: bug"]),
], ids=["user", "environment", "memory", "disk", "bug"])
def test_what_ends_a_task_is_told_in_one_line_and_the_same_command_makes_what_is_missing(
        error: Callable[[], Exception], kind: type[Exception], parts: list[str], eight: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(eight, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_slice", failing(error, 1))
        with pytest.raises(kind) as caught:
            sharded(eight, tmp_path / "out")
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("index.json"))
    assert sharded(eight, tmp_path / "out")["made"] >= 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_cannot_be_read_is_the_machines_fault_and_no_bad_image(
        eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(eight, tmp_path / "in")

    def unreadable(source: str, entries: list[Any], *rest: Any) -> dict[str, Any]:
        from gradine.pipeline.shards import make_slice

        Path(source, "a/0.png").unlink(missing_ok=True)  # after it was listed
        return make_slice(source, entries, *rest)

    monkeypatch.setattr(module, "make_slice", unreadable)
    with pytest.raises(EnvironmentFault, match="No such file or directory.*a/0.png"):
        sharded(tmp_path / "in", tmp_path / "out", max_rejected_share=0.5)


# ---- Bad images


def huge_header() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels, and which has none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pieces = b"\x89PNG\r\n\x1a\n", struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header)), b"\0\0\0\1IDAT"
    return b"".join(pieces)


BAD = {"03-cut.jpg": (encoded(noise(3, 64), "JPEG")[:700], "Premature end"),
       "05-text.png": (b"not an image at all", "no image"),
       "06-empty.png": (b"", "no image"),
       "08-small.png": (encoded(noise(8, 7)), "7x7 is smaller than 8x8"),
       "09-wide.png": (encoded(noise(9, 16, 8)), "16x8 is not square"),
       "11-huge.png": (huge_header(), "60000x60000 is more than data.max_pixels=100000000")}
GOOD = {f"{n:02d}-good.png": encoded(noise(n, 8)) for n in range(13) if n not in (3, 5, 6, 8, 9, 11)}


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "torn", {**GOOD, **{name: content for name, (content, _) in BAD.items()}})


def test_bad_images_are_set_aside_with_path_and_reason_and_the_others_keep_their_keys(
        torn: Path, tmp_path: Path) -> None:
    summary = sharded(torn, tmp_path / "out", crop="none", max_rejected_share=0.5)
    assert (summary["images"], summary["rejected"]) == (7, 6)
    lines = rejected_lines(tmp_path / "out")
    assert [line["path"] for line in lines] == sorted(BAD)
    for line in lines:
        assert BAD[line["path"]][1] in line["reason"]
        assert " at 0x" not in line["reason"]  # the same reason every time
    for size in (4, 8):
        shown = level(tmp_path / "out", size)
        assert [int(s["__key__"]) for s in shown] == [0, 1, 2, 4, 7, 10, 12]
    for sample in shown:
        np.testing.assert_array_equal(picture(sample), np.asarray(noise(int(sample["__key__"]), 8)))


def test_too_many_pixels_are_refused_from_the_header_before_anything_is_decoded(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", {"a.png": encoded(noise(0, 20)), "b.png": encoded(noise(1, 19))})
    sharded(source, tmp_path / "out", max_pixels=399, max_rejected_share=0.5)
    assert json.loads((tmp_path / "out/rejected.jsonl").read_text()) == {
        "path": "a.png", "reason": "20x20 is more than data.max_pixels=399"}


def test_a_slice_without_one_good_image_leaves_no_empty_shard_in_the_index(tmp_path: Path) -> None:
    files = {f"{n}.png": b"junk" if n in (3, 4, 5) else encoded(noise(n, 8)) for n in range(7)}
    sharded(folder_of(tmp_path / "in", files), tmp_path / "out", max_rejected_share=0.5)
    listed = [(entry["file"], entry["images"]) for entry in index(tmp_path / "out", 8)["shards"]]
    assert listed == [("000000.tar", 3), ("000002.tar", 1)]


def test_above_the_allowed_share_it_stops_names_share_first_reason_and_way_out_and_writes_no_index(
        torn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refusal(lambda: sharded(torn, out, crop="none", max_rejected_share=0.4))
    for part in ("6 of 13", "46.2%", "40.0%", "03-cut.jpg", "Premature end", "rejected.jsonl", "raise the share"):
        assert part in said
    assert not list(out.rglob("index.json"))
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 6
    said_next = sharded(torn, out, crop="none", max_rejected_share=0.47)
    assert said_next["made"] == 3  # of 5: those with a bad image, which may have been mended
    assert index(out, 8)["images"] == 7


# ---- Refusals, each one line


@pytest.mark.parametrize(("make", "parts"), [
    (lambda _: None, ["does not exist", "folder, .zip or .tar"]),
    (lambda path: path.mkdir(), ["holds no image (0 other files)", ".png"]),
    (lambda path: folder_of(path, {"a.txt": b"", "b.csv": b""}), ["holds no image (2 other files)"]),
    (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c"), ["neither a folder nor a zip or tar"]),
    (lambda path: folder_of(path, {"a.png": b"", "b.png": b""}), ["none of the 2 images", "a.png: no image"]),
], ids=["missing", "empty", "no-image", "archive", "all-rejected"])
def test_a_source_without_images_is_refused_in_one_line(make: Callable[[Path], Any], parts: list[str],
                                                        tmp_path: Path) -> None:
    make(tmp_path / "source")
    said = refusal(lambda: sharded(tmp_path / "source", tmp_path / "out", max_rejected_share=0.99))
    for part in ("source'", *parts):
        assert part in said
    assert not list(tmp_path.rglob("index.json"))


def test_a_changed_source_or_other_settings_into_the_same_folder_are_refused(eight: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(eight, source)
    sharded(source, out)
    before = contents(out)
    assert "resolution was 8 and is now 4" in refusal(lambda: sharded(source, out, 4))
    assert "crop was centre and is now none" in refusal(lambda: sharded(source, out, crop="none"))
    assert "labels was auto and is now none" in refusal(lambda: sharded(source, out, labels="none"))
    assert "shard_images was 3 and is now 4" in refusal(lambda: sharded(source, out, shard_images=4))
    original = (source / "a/0.png").read_bytes()
    (source / "a/0.png").write_bytes(original + b"\0")
    said = refusal(lambda: sharded(source, out))
    for part in ("1 of its 8 images", "first: a/0.png", "Give another data.shards"):
        assert part in said
    assert refusal(lambda: sharded(source, out, add=True)) == said
    (source / "a/0.png").write_bytes(original)
    (source / "a/new.png").write_bytes(original)
    assert "lack 1 images" in (said := refusal(lambda: sharded(source, out)))
    assert "gradine shard --add appends them" in said
    (source / "a/new.png").unlink()
    (source / "a/0.png").rename(source / "a/00.png")
    assert "first: a/0.png" in refusal(lambda: sharded(source, out, add=True))
    (source / "a/00.png").rename(source / "a/0.png")
    shutil.move(source / "a/0.png", source / "b/0.png")
    assert "first: a/0.png" in refusal(lambda: sharded(source, out, add=True))
    shutil.move(source / "b/0.png", source / "a/0.png")
    assert contents(out) == before
    assert sharded(source, out)["made"] == 0


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(eight: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "out", {"thesis.tex": b"years of work"})
    said = refusal(lambda: sharded(eight, tmp_path / "out"))
    assert "thesis.tex" in said
    assert "empty or new folder" in said
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}
    assert "is a file" in refusal(lambda: sharded(eight, tmp_path / "out/thesis.tex"))


def test_a_first_run_killed_before_its_first_file_does_not_block_the_next(eight: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "out", {"source.json.77.partial": b'{"sch'})
    assert sharded(eight, tmp_path / "out")["images"] == 8


def test_a_source_mended_after_a_refusal_goes_on_in_the_same_folder(ray_cluster: Any, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number}.png")
    (images / "5.png").write_bytes(b"torn")
    data = Data(source=str(images), shards=str(tmp_path / "shards"), shard_images=3)
    with pytest.raises(UserError, match=r"5\.png"):
        shard(data, 8)
    untouched = (tmp_path / "shards/r0008/000000.tar").stat().st_mtime_ns
    Image.new("RGB", (8, 8), "red").save(images / "5.png")
    assert shard(data, 8)["made"] == 1
    assert (tmp_path / "shards/r0008/000000.tar").stat().st_mtime_ns == untouched


# ---- Crops, sizes, channels, encodings


def test_tiles_are_the_squares_of_the_middle_row_by_row_each_with_the_class_of_its_image(tmp_path: Path) -> None:
    wide, tall = noise(0, 36, 20), noise(1, 8, 17)
    sharded(folder_of(tmp_path / "in", {"a/0.png": encoded(wide), "b/1.png": encoded(tall)}), tmp_path / "out",
            crop="tile")
    pixels, other = np.asarray(wide), np.asarray(tall)
    expected = [(f"00000000-{4 * row + column:03d}", 0, pixels[2 + 8 * row:][:8, 2 + 8 * column:][:, :8])
                for row in (0, 1) for column in (0, 1, 2, 3)]
    expected += [("00000001-000", 1, other[:8]), ("00000001-001", 1, other[8:16])]  # one row is left over below
    shown = level(tmp_path / "out", 8)
    assert [(s["__key__"], s["cls"]) for s in shown] == [(key, label) for key, label, _ in expected]
    for sample, (_, _, square) in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(picture(sample), square)
    listed = index(tmp_path / "out", 8)
    assert (listed["images"], listed["crop"]) == (10, "tile")
    assert [entry["labels"] for entry in listed["shards"]] == [[0] * 8 + [1] * 2]


def test_random_crops_are_squares_of_their_image_that_depend_on_seed_and_path_alone(tmp_path: Path) -> None:
    large, small = noise(0, 13, 11), noise(1, 8)
    one = folder_of(tmp_path / "one", {"a/0.png": encoded(large)})
    two = folder_of(tmp_path / "two", {**contents(one), "a/00.png": encoded(small), "b/1.png": encoded(small)})
    for name, source, seed in (("x", one, 0), ("y", two, 0), ("z", two, 1)):
        sharded(source, tmp_path / name, crop="random-40", crop_seed=seed)
    x, y, z = ([picture(s) for s in level(tmp_path / name, 8)] for name in "xyz")
    assert [s["__key__"] for s in level(tmp_path / "y", 8)] == [f"{n:08d}-{k:03d}" for n in range(3) for k in range(40)]
    assert [s["cls"] for s in level(tmp_path / "y", 8)] == [0] * 80 + [1] * 40
    np.testing.assert_array_equal(x, y[:40])
    assert not np.array_equal(y[:40], z[:40])
    np.testing.assert_array_equal(y[40:], [np.asarray(small)] * 80)  # there is only one square of 8x8
    pixels = np.asarray(large)
    windows = {pixels[top:top + 8, left:left + 8].tobytes() for top in range(4) for left in range(6)}
    unscaled = {crop.tobytes() for crop in x} & windows  # sides are 8 to 11, a quarter each: about ten are 8
    assert 4 <= len(unscaled) <= 20
    assert len({crop.tobytes() for crop in x}) > 15  # of 50 that there are


@pytest.mark.parametrize(("small", "rejected", "upscaled"), [("reject", 2, 0), ("upscale", 0, 2), ("pad", 0, 0)])
def test_small_images_are_treated_as_the_setting_says_and_the_index_tells_how(
        small: str, rejected: int, upscaled: int, tmp_path: Path) -> None:
    flat = encoded(Image.new("RGB", (4, 6), (200, 100, 50)))
    source = folder_of(tmp_path / "in", {"0.png": flat, "1.png": encoded(noise(1, 8)), "2.png": flat})
    summary = sharded(source, tmp_path / "out", small=small, background="#010203", max_rejected_share=0.9)
    assert (summary["images"], summary["rejected"]) == (3 - rejected, rejected)
    for size in (4, 8):
        listed = index(tmp_path / "out", size)
        assert (listed["small"], listed["upscaled"], listed["images"]) == (small, upscaled, 3 - rejected)
    shown = {s["__key__"]: picture(s) for s in level(tmp_path / "out", 8)}
    np.testing.assert_array_equal(shown["00000001"], np.asarray(noise(1, 8)))
    if small == "upscale":
        np.testing.assert_array_equal(shown["00000000"], np.full((8, 8, 3), (200, 100, 50)))
    if small == "pad":
        padded = np.full((8, 8, 3), (1, 2, 3))
        padded[1:7, 2:6] = (200, 100, 50)
        np.testing.assert_array_equal(shown["00000002"], padded)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding", ["raw", "png", "webp", "jpeg", "raw:8,png:16,jpeg"])
def test_plain_webdataset_reads_every_level_in_every_encoding(encoding: str, channels: int, image_folder: Path,
                                                              tmp_path: Path) -> None:
    sharded(image_folder, tmp_path / "out", 32, encoding=encoding, channels=channels, shard_images=48)
    sharded(image_folder, tmp_path / "lossless", 32, encoding="png", channels=channels, shard_images=48)
    mixed = {4: "raw", 8: "raw", 16: "png", 32: "jpeg"}
    by_level = mixed if ":" in encoding else dict.fromkeys(mixed, encoding)
    for size, kind in by_level.items():
        shown, exact = level(tmp_path / "out", size), level(tmp_path / "lossless", size)
        assert len(shown) == len(exact) == 48
        ending = {"raw": "pgm" if channels == 1 else "ppm", "jpeg": "jpg"}.get(kind, kind)
        assert all(ending in sample for sample in shown)
        assert index(tmp_path / "out", size)["encoding"] == kind
        assert index(tmp_path / "out", size)["channels"] == channels
        off = np.abs(np.array([picture(s) for s in shown]).astype(int) - [picture(s) for s in exact])
        assert off.shape == (48, size, size, 3)  # rgb8 makes three of one
        assert off.max() <= (12 if kind == "jpeg" else 0)
        assert off.mean() <= 2
        if channels == 1:
            assert all((picture(s) == picture(s)[..., :1]).all() for s in shown)


# ---- Images that are added later


def grown(folder: Path, count: int, first: int = 0) -> Path:
    return folder_of(folder, {f"{'ab'[n % 2]}/{n:02d}.png": encoded(noise(n, 8)) for n in range(first, first + count)})


def whole(out: Path) -> None:
    """Every shard of every index has the digest it should have: what is listed can be read."""
    for path in out.rglob("index.json"):
        for entry in json.loads(path.read_text())["shards"]:
            content = (path.parent / entry["file"]).read_bytes()
            assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_added_images_come_after_the_old_ones_in_shards_of_their_own_and_touch_no_old_tar(tmp_path: Path) -> None:
    source, out = grown(tmp_path / "in", 8), tmp_path / "out"
    sharded(source, out)
    tars, stamps = contents(out, "*.tar"), mtimes(out)
    folder_of(source, {"Aa/00.png": encoded(noise(90, 8)), "a/00a.png": encoded(noise(91, 8)),
                       "c/z.png": encoded(noise(92, 8)), "b/zz.png": encoded(noise(93, 8))})  # before, between, after
    assert sharded(source, out, add=True)["made"] == 2
    assert {name: contents(out, "*.tar")[name] for name in tars} == tars
    assert all(mtimes(out)[name] == stamps[name] for name in [*tars, *(n for n in stamps if n.startswith("parts/"))])
    for size in (4, 8):
        listed = index(out, size)
        assert [(e["file"], e["images"]) for e in listed["shards"]] == [
            ("000000.tar", 3), ("000001.tar", 3), ("000002.tar", 2), ("000003.tar", 3), ("000004.tar", 1)]
        assert listed["classes"] == ["a", "b", "Aa", "c"]
        assert listed["images"] == 12
        assert [s["__key__"] for s in level(out, size)] == [f"{n:08d}" for n in range(12)]
    shown = level(out, 8)
    assert [s["cls"] for s in shown] == [0] * 4 + [1] * 4 + [2, 0, 1, 3]
    assert listed["shards"][3]["labels"] + listed["shards"][4]["labels"] == [2, 0, 1, 3]
    for sample, number in zip(shown, [0, 2, 4, 6, 1, 3, 5, 7, 90, 91, 93, 92], strict=True):
        np.testing.assert_array_equal(picture(sample), np.asarray(noise(number, 8)))
    before = contents(out)
    assert sharded(source, out)["made"] == sharded(source, out, add=True)["made"] == 0
    assert contents(out) == before
    whole(out)


def test_images_are_added_twice_and_every_generation_keeps_its_tars(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    tars: dict[str, bytes] = {}
    for turn, (count, made) in enumerate([(4, 2), (5, 2), (1, 1)]):
        grown(source, count, first=10 * turn)
        assert sharded(source, out, add=True)["made"] == made
        assert contents(out, "*.tar").items() >= tars.items()
        tars = contents(out, "*.tar")
    assert json.loads((out / "source.json").read_text())["generations"] == [4, 5, 1]
    assert [e["images"] for e in index(out, 8)["shards"]] == [3, 1, 3, 2, 1]
    assert [s["__key__"] for s in level(out, 8)] == [f"{n:08d}" for n in range(10)]


def test_an_interrupted_addition_leaves_the_first_images_readable_and_goes_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = grown(tmp_path / "in", 4), tmp_path / "out"
    for name in ("out", "undisturbed"):
        sharded(source, tmp_path / name)
    first = index(out, 8)["shards"]
    grown(source, 6, first=10)
    sharded(source, tmp_path / "undisturbed", add=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_slice", failing(lambda: EnvironmentFault("power"), 3))
        with pytest.raises(EnvironmentFault, match="power"):
            sharded(source, out, add=True)
    assert index(out, 8)["shards"] == first
    whole(out)
    assert sharded(source, out)["images"] == 10  # it was asked for: no need to ask again
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("mend", ["mended", "taken out", "renamed"])
def test_bad_images_that_stop_an_addition_can_be_mended_or_taken_out_again(mend: str, tmp_path: Path) -> None:
    source, out = grown(tmp_path / "in", 4), tmp_path / "out"
    sharded(source, out)
    before, indices = contents(out, "*.tar"), contents(out, "index.json")
    folder_of(grown(source, 4, first=10), {"a/20.png": b"torn"})
    assert "a/20.png: no image" in refusal(lambda: sharded(source, out, add=True))
    assert contents(out, "index.json") == indices
    (source / "a/20.png").unlink()
    if mend != "taken out":
        (source / f"a/{'2' if mend == 'renamed' else '20'}.png").write_bytes(encoded(noise(20, 8)))
    summary = sharded(source, out, add=True)
    assert summary["images"] == (8 if mend == "taken out" else 9)
    assert contents(out, "*.tar").items() >= before.items()
    assert sorted(picture(s).tobytes() for s in level(out, 8)) == sorted(
        np.asarray(noise(n, 8)).tobytes() for n in (0, 1, 2, 3, 10, 11, 12, 13, *([] if mend == "taken out" else [20])))
    whole(out)


def test_an_addition_that_is_given_up_leaves_the_set_as_it_was(tmp_path: Path) -> None:
    source, out = grown(tmp_path / "in", 4), tmp_path / "out"
    sharded(source, out)
    before = contents(out)
    grown(source, 1, first=10)
    (source / "a/10.png").write_bytes(b"torn")
    refusal(lambda: sharded(source, out, add=True))
    (source / "a/10.png").unlink()
    assert sharded(source, out)["made"] == 0
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {  # in no index
        "parts/000002.json", "r0004/000002.tar", "r0008/000002.tar"}


# ---- The command


def test_resume_goes_on_from_the_place_alone_with_the_settings_of_the_first_time(
        eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(eight.parent)
    sharded(eight.name, tmp_path / "out", 8, crop="random-2", crop_seed=7, encoding="png", labels="none", small="pad")
    before = contents(tmp_path / "out")
    (tmp_path / "out/parts/000001.json").unlink()
    monkeypatch.chdir(tmp_path)  # the source was given as seen from another folder
    code, printed, complained = answer(gradine("shard", "--resume", "out"))
    assert (code, complained) == (0, "")
    assert "16 images in 3 shards per level, 1 made now" in printed
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("arguments", "says"), [
    (["in", "out", "crp=tile"], "did you mean 'crop'?"),
    (["in", "out", "crop=tiles"], "did you mean 'tile'?"),
    (["in", "out", "encoding=raw:64,web"], "did you mean 'webp'?"),
    (["in", "out", "encoding=raw:64"], "data.encoding='raw:64' is not kind:px"),
    (["in", "out", "small=pat"], "did you mean 'pad'?"),
    (["in", "out", "labels=folder"], "did you mean 'folders'?"),
    (["in", "out", "channels=2"], "data.channels=2: use 3 for colour or 1 for gray"),
    (["in", "out", "background=snowwhite"], "data.background='snowwhite' is no colour"),
    (["in", "out", "shard_images=0"], "data.shard_images=0 must be positive"),
    (["in", "out", "shard_images=many"], "data.shard_images"),
    (["in", "out", "max_rejected_share=1"], "data.max_rejected_share=1.0 is a share"),
    (["in", "out", "crop=random-0"], "data.crop='random-0'"),
    (["in"], "wants SOURCE OUT"),
    (["in", "--resume"], "holds no shards to go on with"),
    (["out", "in", "--resume"], "OUT alone with --resume"),
    (["ftp://host/x", "out"], "'ftp://host/x' is no location"),
])
def test_wrong_settings_of_the_shard_command_are_one_line(
        arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from gradine.pipeline import __main__ as command

    folder_of(tmp_path / "in", {"a.png": encoded(noise(0, 8))})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradine", "shard", *arguments, "--resolution", "8"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    complained = capsys.readouterr().err
    assert ended.value.code == 2
    assert says in complained
    assert len(complained.splitlines()) == 1
    assert not list(tmp_path.rglob("index.json"))


# ---- F28, F29, F32: what people's folders hold


def spoiled(good: bytes, jpeg: bytes, number: int) -> bytes:
    """Ten ways in which a file is no whole image, four degrees of each."""
    way, degree = number % 10, number // 10 + 1
    middle = len(good) // 2
    return [b"", b"<html>404 Not Found</html>" * degree, good[:8 * degree], good[:len(good) * degree // 5],
            jpeg[:len(jpeg) * degree // 5], jpeg[:2] + bytes(500 * degree), bytes(1000 * degree),
            good[:middle] + bytes([good[middle] ^ 1 << degree]) + good[middle + 1:],
            b"GIF89a" + bytes(degree), b"BM" + b"\xff" * 40 * degree][way]


@pytest.mark.fault
def test_f28_forty_bad_files_are_set_aside_and_the_other_images_keep_keys_labels_and_bytes(tmp_path: Path) -> None:
    good = {f"{'ab'[n % 2]}/{n:03d}.{'jpg' if n % 3 else 'png'}": encoded(noise(n, 16), "JPEG" if n % 3 else "PNG")
            for n in range(160)}
    names = random.Random(0).sample(sorted(good), 40)
    bad = {name: spoiled(encoded(noise(n, 16)), encoded(noise(n, 16), "JPEG"), n) for n, name in enumerate(names)}
    folder_of(tmp_path / "good", good)
    folder_of(tmp_path / "torn", {**good, **bad})
    sharded(tmp_path / "good", tmp_path / "whole", 16, shard_images=25)

    out = tmp_path / "out"
    began = ["shard", tmp_path / "torn", out, "--resolution", 16, "shard_images=25"]
    code, _, complained = answer(gradine(*began, "max_rejected_share=0.24"))
    assert code == 2
    assert len(complained.splitlines()) == 1
    for part in ("gradine: 40 of 160 images (25.0%) were rejected",
                 "max_rejected_share=24.0%", "rejected.jsonl", sorted(names)[0]):
        assert part in complained
    assert not list(out.rglob("index.json"))
    code, printed, _ = answer(gradine(*began, "max_rejected_share=0.25"))
    assert code == 0
    assert "120 images" in printed
    assert "40 rejected" in printed

    lines = rejected_lines(out)
    assert [line["path"] for line in lines] == sorted(names)
    assert all(len(line["reason"]) > 8 for line in lines)
    keys = {f"{n:08d}" for n, name in enumerate(sorted(good)) if name not in bad}
    for size in (4, 8, 16):
        expected = {name: content for name, content in members(tmp_path / "whole", size).items() if name[:8] in keys}
        assert members(out, size) == expected
    print(f"f28: {len(lines)} of 40 bad files set aside, {len(expected)} members of the rest equal")


@pytest.mark.fault
def test_f28_an_image_mended_at_equal_size_is_taken_up_by_the_same_command(tmp_path: Path) -> None:
    right = encoded(noise(7, 8))
    source = folder_of(tmp_path / "in", {f"{n}.png": encoded(noise(n, 8)) for n in range(9)})
    sharded(source, tmp_path / "undisturbed")
    (source / "7.png").write_bytes(b"torn".ljust(len(right)))
    assert "7.png: no image" in refusal(lambda: sharded(source, tmp_path / "out"))
    (source / "7.png").write_bytes(right)
    assert sharded(source, tmp_path / "out")["made"] == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.fault
def test_f29_f32_a_bomb_and_hostile_pickles_are_rejected_and_the_rest_is_intact(tmp_path: Path) -> None:
    canary, buffer, array = tmp_path / "canary", io.BytesIO(), io.BytesIO()
    torch.save(Hostile(canary), buffer)
    np.save(array, np.array([Hostile(canary)], dtype=object), allow_pickle=True)
    good = {f"{n}.png": encoded(noise(n, 8)) for n in range(8)}
    pickled, torched = pickle.dumps(Hostile(canary)), buffer.getvalue()
    hostile = {"3-bomb.png": bomb(12_000), "4-pickle.png": pickled, "5-torch.jpg": torched,
               "6-array.webp": array.getvalue(), "7-script.gif": b"%!PS-Adobe-3.0\n(%pipe%touch x) (w) file"}
    ignored = {"8.pkl": pickled, "8.cls": pickled, "8.pth": torched}
    named = {"pipe:touch canary;.png": encoded(noise(8, 8)), "$(touch canary).png": encoded(noise(9, 8))}
    folder_of(tmp_path / "in", {**good, **hostile, **ignored, **named})
    folder_of(tmp_path / "clean", {**good, **named})
    summary = sharded(tmp_path / "in", tmp_path / "out", max_rejected_share=0.5)
    assert (summary["images"], summary["rejected"], summary["ignored"]) == (10, 5, 3)
    reasons = {line["path"]: line["reason"] for line in rejected_lines(tmp_path / "out")}
    assert sorted(reasons) == sorted(hostile)
    assert reasons.pop("3-bomb.png") == "12000x12000 is more than data.max_pixels=100000000"
    assert set(reasons.values()) == {"no image, or of a kind that is not read here"}
    sharded(tmp_path / "clean", tmp_path / "whole")
    np.testing.assert_array_equal([picture(s) for s in level(tmp_path / "out", 8)],
                                  [picture(s) for s in level(tmp_path / "whole", 8)])
    assert "does not exist" in refusal(lambda: sharded(f"pipe:touch {canary}", tmp_path / "other"))
    assert not list(tmp_path.rglob("*canary"))
    assert not Path("canary").exists()


def bomb(side: int) -> bytes:
    """A whole PNG of side x side black pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ---- Kills in mid-write


def begun(out: Path) -> list[Path]:
    """The tars that are being filled for a set."""
    return [path for path in out.glob(".partial-*/*.tar") if path.stat().st_size]


def writers(out: Path) -> list[int]:
    """The processes that have such a tar open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = link.readlink()
            if ".partial-" in str(target) and target.is_relative_to(out) and target.stat().st_size:
                found.add(int(link.parts[2]))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    end = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 512 px: twelve slices of four, each long enough to be met in mid-write."""
    files = {f"{'ab'[n % 2]}/{n:02d}.png": encoded(noise(n, 512), compress_level=1) for n in range(48)}
    return folder_of(tmp_path_factory.mktemp("heavy"), files)


@pytest.fixture(scope="module")
def undisturbed(heavy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the set that `heavy` makes, by its path."""
    out = tmp_path_factory.mktemp("undisturbed")
    sharded(heavy, out, 512, shard_images=4)
    return contents(out)


@pytest.mark.fault
def test_a_set_whose_workers_were_killed_three_times_in_mid_write_is_the_same_bytes(
        heavy: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out, killed = tmp_path / "out", []

    def kill_three() -> None:
        for _ in range(3):
            pid = wait_for(lambda: [pid for pid in writers(out) if pid not in killed])[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill_three, daemon=True)
    killer.start()
    summary = sharded(heavy, out, 512, shard_images=4)
    killer.join(1)
    assert len(set(killed)) == 3
    assert os.getpid() not in killed
    assert (summary["made"], summary["images"]) == (12, 48)
    assert contents(out) == undisturbed
    assert not list(out.rglob("*partial*"))


@pytest.mark.fault
def test_a_set_whose_whole_command_was_killed_three_times_in_mid_write_is_the_same_bytes(
        heavy: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["shard", heavy, out, "--resolution", 512, "shard_images=4"]
    for with_its_tasks in (False, True, True):
        process = gradine(*command)
        wait_for(lambda: begun(out), process)
        kill(process, with_its_tasks)
        assert begun(out) or not with_its_tasks
        assert not list(out.rglob("index.json"))
    code, printed, _ = answer(gradine(*command))
    assert code == 0
    assert "48 images in 12 shards per level" in printed
    assert contents(out) == undisturbed
    assert not list(out.rglob("*partial*"))


def kill(process: subprocess.Popen[str], with_its_tasks: bool) -> None:
    """SIGKILL to a `gradine` process, and to all of its Ray; that would end by itself, two seconds later."""
    of_its_ray = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for own in of_its_ray if with_its_tasks else ():
        own.kill()
    process.communicate()
    _, alive = psutil.wait_procs(of_its_ray, 20)
    for left in alive:
        left.kill()


@pytest.mark.fault
def test_an_addition_killed_in_mid_write_leaves_the_first_images_readable_and_goes_on(
        heavy: Path, tmp_path: Path) -> None:
    files, source, out = contents(heavy), tmp_path / "in", tmp_path / "out"
    folder_of(source, dict(list(files.items())[::3]))
    for name in ("out", "whole"):
        sharded(source, tmp_path / name, 512, shard_images=4)
    first, stamps = contents(out, "*/*"), mtimes(out)
    folder_of(source, files)
    process = gradine("shard", "--add", source, out, "--resolution", 512, "shard_images=4")
    wait_for(lambda: (out / "parts/000004.json").exists() and begun(out), process)
    kill(process, with_its_tasks=True)
    assert {name: contents(out)[name] for name in first} == first
    images = Images(Data(source="", shards=str(out), cache_gb=0), 512)
    assert len(images) == 16
    assert not list(images.damaged())
    images.close()
    sharded(source, out, 512, add=True, shard_images=4)
    sharded(source, tmp_path / "whole", 512, add=True, shard_images=4)
    assert contents(out) == contents(tmp_path / "whole")
    assert all(mtimes(out)[name] == stamps[name] for name in first if name.endswith(".tar"))
    assert not list(out.rglob("*partial*"))


TWO_NODES = """
import json, os, signal, socket, sys, threading, time
from pathlib import Path
import psutil
import ray
from ray.cluster_utils import Cluster
from gradine.configs.schema import Data
from gradine.pipeline.shards import shard

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

(settings, resolution, _), = json.load(sys.stdin)["calls"]
out = Path(settings["shards"])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "gcs_server_port": free_port(),
                  "include_dashboard": False, "temp_dir": os.environ["NODES"]})
other = cluster.add_node(num_cpus=2, temp_dir=os.environ["NODES"])
ray.init(address=cluster.address, log_to_driver=False)
raylet = psutil.Process(other.all_processes["raylet"][0].process.pid)
killed = []

def kill_node():
    while not killed:
        for child in raylet.children(recursive=True):
            try:
                if any(".partial-" in file.path and file.path.startswith(str(out)) for file in child.open_files()):
                    node = raylet.children(recursive=True)
                    raylet.kill()
                    for one in node:
                        one.kill()
                    killed.append(raylet.pid)
                    return
            except psutil.Error:
                pass
        time.sleep(0.005)

threading.Thread(target=kill_node, daemon=True).start()
summary = shard(Data(**settings), resolution)
nodes = len(ray.nodes())
end = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) == nodes and time.monotonic() < end:
    time.sleep(0.2)
alive = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({**summary, "nodes": nodes, "alive": alive, "killed": len(killed)}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.fault
def test_a_set_made_on_two_nodes_of_which_one_dies_is_the_same_bytes(
        heavy: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="nodes-") as short:  # Ray's sockets want a short path
        monkeypatch.setenv("NODES", short)
        (said,) = in_own_ray(0, [call(heavy, tmp_path / "out", 512, shard_images=4)], TWO_NODES)
    assert (said["nodes"], said["alive"], said["killed"]) == (2, 1, 1)
    assert (said["images"], said["made"]) == (48, 12)
    assert contents(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out").rglob("*partial*"))


# ---- F33: from and into an object store


def stored(place: str) -> dict[str, bytes]:
    store = Store(place)
    return {name: store.read(name) for name, _ in store.list()}


def upload(folder: Path, place: str) -> str:
    for name, content in contents(folder).items():
        Store(place).write(name, content)
    return place


def without_source(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but the file that says where the images came from."""
    return {name: content for name, content in files.items() if name != "source.json"}


@pytest.mark.fault
@pytest.mark.parametrize("server", ["juicefs", "moto"])
def test_f33_a_set_in_an_object_store_and_of_images_in_one_equals_the_local_set(
        server: str, eight: Path, tmp_path: Path, request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, request.getfixturevalue(server))
    place = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    source, inside, back = upload(eight, f"{place}/in"), f"{place}/out", f"{place}/back"
    sharded(eight, tmp_path / "local")
    expected = contents(tmp_path / "local")
    folder_of(tmp_path / "more", {**contents(eight), "c/9.png": encoded(noise(9, 8))})
    said = in_own_ray(2, [call(eight, inside, 8), call(source, back, 8), call(source, tmp_path / "back", 8),
                          call(eight, inside, 8), call(eight, inside, 8, crop="none"),
                          call(tmp_path / "more", inside, 8), call(tmp_path / "more", inside, 8, add=True)])
    assert [line.get("made") for line in said] == [3, 3, 3, 0, None, None, 1]
    assert "crop was centre and is now none" in said[4]["UserError"]
    assert "lack 1 images" in said[5]["UserError"]
    assert without_source(contents(tmp_path / "back")) == without_source(stored(back)) == without_source(expected)
    tars = {name: content for name, content in expected.items() if name.endswith(".tar")}
    assert stored(inside).items() >= tars.items()
    assert json.loads(Store(inside).read("r0008/index.json"))["images"] == 9
    assert not [name for name in stored(inside) if "partial" in name]


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["503", "reset", "half", "lost"])
def test_f33_through_a_network_that_breaks_every_ninth_request_the_set_is_the_same_bytes(
        kind: str, eight: Path, juicefs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    aws(monkeypatch, juicefs)
    source = upload(eight, f"{place}/in")
    sharded(eight, tmp_path / "local")
    fault = Fault(kind, hits=lambda number: number % 9 == 4)
    with proxy(juicefs, fault) as url:
        aws(monkeypatch, url)
        (said,) = in_own_ray(2, [call(source, f"{place}/out", 8)])
    aws(monkeypatch, juicefs)
    assert said.get("made") == 3, said
    assert fault.done >= 4
    assert without_source(stored(f"{place}/out")) == without_source(contents(tmp_path / "local"))
    print(f"f33 {kind}: {fault.done} of {len(fault.requests)} requests broken, all bytes equal")


@pytest.mark.fault
@pytest.mark.parametrize("side", ["source", "shards"])
def test_f33_a_wrong_secret_is_one_line_within_seconds_and_is_not_shown(
        side: str, eight: Path, juicefs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, juicefs, secret="wr0ng-secret-canary")
    source, out = (f"s3://{BUCKET}/in", tmp_path / "out") if side == "source" else (eight, f"s3://{BUCKET}/wrong")
    began = time.monotonic()
    code, printed, complained = answer(gradine("shard", source, out, "--resolution", 8))
    assert time.monotonic() - began < 60  # most of it is Python and Ray on a busy machine; data.deadline_s is 600
    assert code == 2
    assert len(complained.splitlines()) == 1
    assert "AWS_SECRET_ACCESS_KEY" in complained
    assert "canary" not in printed + complained
    (fast,) = in_own_ray(1, [call(source, out, 8, deadline_s=5)])
    assert "is refused" in fast["UserError"]


@pytest.mark.fault
def test_f34_of_two_commands_with_other_settings_in_one_place_one_is_refused(
        eight: Path, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, moto)
    out = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    command = ["shard", eight, out, "--resolution", 8, "shard_images=3"]
    both = [gradine(*command, f"encoding={kind}") for kind in ("raw", "png")]
    answers = [answer(process) for process in both]
    assert sorted(code for code, _, _ in answers) == [0, 2]
    refused = next(complained for code, _, complained in answers if code)
    assert len(refused.splitlines()) == 1
    assert out in refused
    winner = "raw" if not answers[0][0] else "png"
    sharded(eight, tmp_path / "local", encoding=winner)
    assert stored(out) == contents(tmp_path / "local")


@pytest.mark.fault
def test_f34_an_unfinished_set_in_an_object_store_is_not_written_over_with_other_settings_or_images(
        eight: Path, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, moto)
    out = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    torn = folder_of(tmp_path / "torn", {**contents(eight), "a/0.png": b"torn"})
    other = folder_of(tmp_path / "other", {"0.png": encoded(noise(0, 8))})
    calls = [call(torn, out, 8), call(torn, out, 8, encoding="png"), call(other, out, 8)]
    said = [line["UserError"] for line in in_own_ray(1, calls)]
    assert "1 of 8 images (12.5%) were rejected" in said[0]
    assert "encoding was raw:64,webp and is now png" in said[1]
    assert f"source was {torn}"[:40] in said[2]
    folder_of(torn, {"a/0.png": encoded(noise(0, 8))})
    (mended,) = in_own_ray(1, [call(torn, out, 8)])
    assert (mended["images"], mended["made"]) == (8, 1)
    sharded(torn, tmp_path / "local")
    assert stored(out) == contents(tmp_path / "local")


def test_a_machine_out_of_memory_is_no_bad_image(eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    entries = [shards_module.Entry("00000000", "a/0.png", 1, None)]
    data = Data(source=str(eight), shards=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shards_module, "open_image", out_of_memory)
    with pytest.raises(MemoryError):
        shards_module.make_slice(str(eight), entries, 0, data, 8)


def test_finished_shards_whose_indexes_cannot_be_read_are_not_made_over(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path / "out")
    for path in (tmp_path / "out").glob("r*/index.json"):
        path.write_text("{")
    before = contents(tmp_path / "out")
    assert "no index of theirs can be read" in refusal(lambda: sharded(eight, tmp_path / "out", crop="tile"))
    assert contents(tmp_path / "out") == before


def test_a_torn_source_json_is_told_in_a_line(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path / "out")
    (tmp_path / "out" / "source.json").write_text('{"schema": ')
    assert "source.json is damaged" in refusal(lambda: sharded(eight, tmp_path / "out"))


def test_a_finished_set_with_other_pixels_than_the_settings_say_is_refused(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path / "out")
    data = Data(source="gone", shards=str(tmp_path / "out"), shard_images=3)
    shards_module.refuse_other_settings(data)
    for name, value in (("crop", "tile"), ("background", "black"), ("encoding", "png"), ("small", "pad")):
        other = replace(data, **{name: value})
        said = refusal(lambda other=other: shards_module.refuse_other_settings(other))
        assert name in said
        assert value in said
