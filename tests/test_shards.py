"""Claims about sharding: pixels against arithmetic by hand, tars as plain WebDataset reads them, errors in one line."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from gradine.configs.schema import Data, EnvironmentFault, UserError
from gradine.pipeline.shards import list_source, open_image, shard

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


def sharded(source: Path, out: Path, resolution: int = 8, **settings: Any) -> dict[str, Any]:
    return shard(Data(**{"source": str(source), "shards": str(out), "shard_images": 3, **settings}), resolution)


def samples(tar: Path) -> list[dict[str, Any]]:
    """What plain WebDataset makes of a shard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file for the collector to close
        dataset = webdataset.WebDataset(str(tar), shardshuffle=False)  # type: ignore[attr-defined]
        found = list(dataset.decode("rgb8"))
        gc.collect()
    return found


def level(out: Path, size: int) -> list[dict[str, Any]]:
    return [sample for tar in sorted((out / f"r{size:04d}").glob("*.tar")) for sample in samples(tar)]


def index(out: Path, size: int) -> dict[str, Any]:
    return json.loads((out / f"r{size:04d}" / "index.json").read_text())


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def mtimes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(image: Image.Image | bytes, resolution: int = 4, crop: str = "centre") -> np.ndarray:
    content = image if isinstance(image, bytes) else encoded(image)
    return open_image(content, resolution, crop, 10**8)


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
            assert sample["png"].shape == (size, size, 3)
            off = np.abs(sample["png"] - exact)
            assert (off <= 0.5).all()  # rounded; at exactly .5 either way will do
            chains[number] = (exact[::2, ::2] + exact[1::2, ::2] + exact[::2, 1::2] + exact[1::2, 1::2]) / 4
    assert len(list((tmp_path / "out").glob("r[0-9]*"))) == 9


@pytest.mark.parametrize(("side", "resolution"), [(5, 4), (13, 8), (12, 4), (31, 16)])
def test_a_side_that_is_no_power_of_two_is_reduced_to_exact_area_means(side: int, resolution: int) -> None:
    image = noise(side, side)
    source, cell = np.asarray(image).tolist(), Fraction(side, resolution)

    def overlap(pixel: int, out: int) -> Fraction:
        return max(Fraction(0), Fraction(min(pixel + 1, (out + 1) * cell) - max(pixel, out * cell)))

    spans = [[(p, w) for p in range(side) if (w := overlap(p, out))] for out in range(resolution)]
    expected = [[[float(sum(wy * wx * source[y][x][c] for y, wy in spans[row] for x, wx in spans[column]) / cell**2)
                  for c in range(3)] for column in range(resolution)] for row in range(resolution)]
    np.testing.assert_allclose(pixels(image, resolution), np.array(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tall", [False, True])
def test_the_centre_third_of_a_three_to_one_image_is_what_remains(tall: bool) -> None:
    thirds = [np.full((4, 4), value, np.uint8) for value in (10, 20, 30)]
    thirds[1] = np.arange(100, 116, dtype=np.uint8).reshape(4, 4)
    image = Image.fromarray(np.concatenate(thirds, axis=0 if tall else 1))
    np.testing.assert_array_equal(pixels(image)[..., 1], np.arange(100, 116).reshape(4, 4))


# ---- Modes of images, computed by hand


def two_by_two(mode: str, values: list[Any]) -> Image.Image:
    """Four pixels, each as a 2x2 block of a 4x4 image."""
    image = Image.new(mode, (2, 2))
    image.putdata(values)
    return image.resize((4, 4), Image.Resampling.NEAREST)


def corners(shown: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(v) for v in shown[y, x]) for y, x in ((0, 0), (0, 3), (3, 0), (3, 3))]


def palette_image() -> Image.Image:
    image = two_by_two("P", [0, 1, 2, 1])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def gray16(values: list[int]) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint16).reshape(2, 2).repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(("content", "expected"), [
    (encoded(two_by_two("L", [0, 77, 128, 255])), [(0,) * 3, (77,) * 3, (128,) * 3, (255,) * 3]),
    (encoded(two_by_two("1", [0, 255, 255, 0])), [(0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3]),
    # 16 bit: value / 257, so that 65535 is 255 and 200 * 257 is 200
    (encoded(gray16([0, 300, 51400, 65535])), [(0,) * 3, (1,) * 3, (200,) * 3, (255,) * 3]),
    (encoded(gray16([0, 300, 51400, 65535]), "TIFF"), [(0,) * 3, (1,) * 3, (200,) * 3, (255,) * 3]),
    # on white: c * a + 255 * (1 - a) with a = 1, 0, 51/255 = 0.2, 1
    (encoded(two_by_two("RGBA", [(10, 20, 30, 255), (10, 20, 30, 0), (10, 20, 30, 51), (0, 0, 0, 255)])),
     [(10, 20, 30), (255, 255, 255), (206, 208, 210), (0, 0, 0)]),
    (encoded(two_by_two("LA", [(100, 255), (100, 0), (100, 51), (0, 255)])),
     [(100,) * 3, (255,) * 3, (224,) * 3, (0,) * 3]),
    (encoded(palette_image()), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 0)]),
    (encoded(palette_image(), transparency=0), [(255, 255, 255), (0, 255, 0), (0, 0, 255), (0, 255, 0)]),
    # (1 - ink) * (1 - black) * 255
    (encoded(two_by_two("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 0, 51)]), "TIFF"),
     [(255, 255, 255), (0, 255, 255), (0, 0, 0), (204, 0, 204)]),
], ids=["gray", "bilevel", "gray16-png", "gray16-tiff", "rgba", "gray-alpha", "palette", "palette-transparent", "cmyk"])
def test_a_mode_of_image_becomes_rgb_as_computed_by_hand(content: bytes, expected: list[tuple[int, ...]]) -> None:
    assert corners(pixels(content)) == expected


def test_exif_orientation_6_turns_the_stored_rows_into_columns_from_the_right() -> None:
    stored = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = pixels(encoded(Image.fromarray(stored), exif=exif))[..., 0]
    for row in range(4):
        np.testing.assert_array_equal(shown[:, 3 - row], stored[row])


def test_the_crop_is_centred_in_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.arange(7 * 4, dtype=np.uint8).reshape(4, 7)  # upright it is 4 wide and 7 high: rows 1..4 are the centre
    shown = pixels(encoded(Image.fromarray(stored), exif=exif))[..., 0]
    upright = [[stored[3 - column][row] for column in range(4)] for row in range(7)]
    np.testing.assert_array_equal(shown, upright[1:5])


# ---- Shards are plain WebDataset


def test_plain_webdataset_reads_every_shard_and_finds_what_the_index_says(shards: Path, image_folder: Path) -> None:
    for size in (4, 8, 16, 32):
        listed = index(shards, size)
        found = [samples(shards / f"r{size:04d}" / entry["file"]) for entry in listed["shards"]]
        assert [len(part) for part in found] == [entry["images"] for entry in listed["shards"]] == [16, 16, 16]
        assert listed["images"] == 48
        assert listed["labels"] == ["day", "night"]
        flat = [sample for part in found for sample in part]
        assert [s["__key__"] for s in flat] == [f"{n:08d}" for n in range(48)]
        assert [s["cls"] for s in flat] == [0] * len(list((image_folder / "day").iterdir())) + [1] * 16
        assert all(s["png"].shape == (size, size, 3) and s["png"].dtype == np.uint8 for s in flat)


def test_the_index_names_the_bytes_and_sha256_of_each_tar(shards: Path) -> None:
    import hashlib

    for size in (4, 32):
        for entry in index(shards, size)["shards"]:
            content = (shards / f"r{size:04d}" / entry["file"]).read_bytes()
            assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_labels_none_and_a_single_folder_give_no_cls(eight: Path, tmp_path: Path) -> None:
    sharded(eight, tmp_path / "none", labels="none")
    sharded(eight / "a", tmp_path / "one")
    for out in ("none", "one"):
        assert all("cls" not in sample for sample in level(tmp_path / out, 4))
        assert index(tmp_path / out, 4)["labels"] == []


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


def test_a_file_appended_to_a_tar_again_replaces_its_older_self(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in (("a.png", noise(1, 9)), ("b.png", noise(2, 8)), ("a.png", noise(3, 8))):
            member = tarfile.TarInfo(name)
            data = encoded(content)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert sharded(tmp_path / "in.tar", tmp_path / "out")["images"] == 2
    shown = level(tmp_path / "out", 8)
    np.testing.assert_array_equal([s["png"] for s in shown], [np.asarray(noise(3, 8)), np.asarray(noise(2, 8))])


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


# ---- Bad images


def huge_header() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels, and which has none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pieces = b"\x89PNG\r\n\x1a\n", struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header)), b"\0\0\0\1IDAT"
    return b"".join(pieces)


BAD = {"03-cut.jpg": (encoded(noise(3, 64), "JPEG")[:700], "truncated"),
       "05-text.png": (b"not an image at all", "no image"),
       "06-empty.png": (b"", "no image"),
       "08-small.png": (encoded(noise(8, 7, 9)), "7x9 is smaller than 8x8"),
       "09-wide.png": (encoded(noise(9, 16, 8)), "16x8 is not square"),
       "11-huge.png": (huge_header(), "60000x60000 is more than data.max_pixels=200000000")}
GOOD = {f"{n:02d}-good.png": encoded(noise(n, 8)) for n in range(13) if n not in (3, 5, 6, 8, 9, 11)}


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "torn", {**GOOD, **{name: content for name, (content, _) in BAD.items()}})


def test_bad_images_are_set_aside_with_path_and_reason_and_the_others_keep_their_keys(
        torn: Path, tmp_path: Path) -> None:
    summary = sharded(torn, tmp_path / "out", crop="none", max_rejected_share=0.5)
    assert (summary["images"], summary["rejected"]) == (7, 6)
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == sorted(BAD)
    for line in lines:
        assert BAD[line["path"]][1] in line["reason"]
        assert " at 0x" not in line["reason"]  # the same reason every time
    for size in (4, 8):
        shown = level(tmp_path / "out", size)
        assert [int(s["__key__"]) for s in shown] == [0, 1, 2, 4, 7, 10, 12]
    for sample in shown:
        np.testing.assert_array_equal(sample["png"], np.asarray(noise(int(sample["__key__"]), 8)))


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
    for part in ("6 of 13", "46.2%", "40.0%", "03-cut.jpg", "truncated", "rejected.jsonl", "raise the share"):
        assert part in said
    assert not list(out.rglob("index.json"))
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 6
    assert sharded(torn, out, crop="none", max_rejected_share=0.47)["made"] == 0  # nothing is made twice
    assert index(out, 8)["images"] == 7


def test_hidden_files_and_what_a_mac_leaves_in_a_zip_are_ignored(tmp_path: Path) -> None:
    good = encoded(noise(0, 8))
    files = {"a.png": good, ".a.png": b"", "._a.png": b"", ".git/b.png": good, "__MACOSX/b.png": good,
             "__MACOSX/._a.png": b"junk", "sub/.DS_Store": b"junk", "notes.txt": b"hello"}
    folder_of(tmp_path / "in", files)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    for source in ("in", "in.zip"):
        summary = sharded(tmp_path / source, tmp_path / f"out-{source}")
        assert (summary["images"], summary["rejected"], summary["ignored"]) == (1, 0, 7)


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
    assert "labels was ['a', 'b'] and is now []" in refusal(lambda: sharded(source, out, labels="none"))
    assert "shard_images was 3 and is now 4" in refusal(lambda: sharded(source, out, shard_images=4))
    original = (source / "a/0.png").read_bytes()
    (source / "a/0.png").write_bytes(original + b"\0")
    said = refusal(lambda: sharded(source, out))
    assert "files were added, removed or changed in size" in said
    assert "Give another data.shards" in said
    (source / "a/0.png").write_bytes(original)
    (source / "a/new.png").write_bytes(original)
    assert "files were added" in refusal(lambda: sharded(source, out))
    (source / "a/new.png").unlink()
    (source / "a/0.png").rename(source / "a/00.png")
    assert "files were added" in refusal(lambda: sharded(source, out))
    (source / "a/00.png").rename(source / "a/0.png")
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


def test_one_folder_around_all_others_is_no_class(image_folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(image_folder.rglob("*.*")):
            out.write(path, f"set/all/{path.relative_to(image_folder)}")
    inside, plain = list_source(archive, "folders"), list_source(image_folder, "folders")
    assert inside[1] == plain[1] == ["day", "night"]
    assert [entry.label for entry in inside[0]] == [entry.label for entry in plain[0]]


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
