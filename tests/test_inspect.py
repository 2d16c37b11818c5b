"""Claims about `gradine inspect`: numbers against those by hand, damaged files named, the very images shown."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import UserError
from gradine.pipeline import __main__ as command
from gradine.pipeline.inspect import inspect_shards

from .object_store import BUCKET, aws, juicefs
from .test_shards import call, contents, encoded, folder_of, in_own_ray, index, level, noise, picture, sharded

__all__ = ["juicefs"]
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten 16 px images of two classes, four a shard, one of them bad; then three more, of a third class."""
    folder = tmp_path_factory.mktemp("inspected")
    files = {f"{'cat' if n < 7 else 'dog'}/{n:02d}.png": encoded(noise(n, 16)) for n in range(10)}
    folder_of(folder / "in", {**files, "dog/08.png": b"torn", "notes.txt": b"", "more.csv": b""})
    sharded(folder / "in", folder / "out", 16, shard_images=4, max_rejected_share=0.2)
    folder_of(folder / "in", {f"elk/{n}.png": encoded(noise(n, 16)) for n in (20, 21, 22)})
    sharded(folder / "in", folder / "out", 16, add=True, shard_images=4, max_rejected_share=0.2)
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def inspected(shards: Path | str, sheet: Path, capsys: pytest.CaptureFixture[str], resolution: int = 0) -> str:
    capsys.readouterr()
    inspect_shards(str(shards), resolution, sheet)
    return capsys.readouterr().out


def complaint(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a damaged set, in its one line."""
    monkeypatch.setattr(sys, "argv", ["gradine", "inspect", str(shards), "--sheet", str(tmp_path / "sheet.png")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    complained = capsys.readouterr().err
    assert len(complained.splitlines()) == 1
    assert complained.startswith("gradine: ")
    return complained


def test_it_counts_images_shards_bytes_classes_and_what_was_rejected(
        made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = inspected(made, tmp_path / "sheet.png", capsys)
    rows = {int(row[0]): row[1:] for row in map(str.split, said.splitlines()[1:4])}
    assert list(rows) == [4, 8, 16]
    for size, row in rows.items():
        held = sum(len(content) for content in contents(made / f"r{size:04d}", "*.tar").values())
        assert row == ["raw", "12", "4", f"{held / 1e6:,.1f}", f"{held / 12 / 1e3:,.1f}", "all"]
    for line in (f"source   {made.parent / 'in'}: 13 images, 3 of them added later; 2 other files",
                 "pixels   3 channels, crop centre, small ones: reject, 0 upscaled, filter box",
                 "classes  3: cat 7, dog 2, elk 3", "rejected 1",
                 "1  no image, or of a kind that is not read here  (dog/08.png)",
                 f"contact sheet of 16px: {tmp_path / 'sheet.png'}"):
        assert line in said


@pytest.mark.parametrize("resolution", [4, 8, 16])
def test_the_contact_sheet_shows_the_very_images_in_rows_of_eight(
        resolution: int, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspected(made, tmp_path / "deep/sheet.png", capsys, resolution)
    with Image.open(tmp_path / "deep/sheet.png") as image:
        shown = np.asarray(image)
    assert shown.shape == (2 * resolution, 8 * resolution, 3)
    for n, sample in enumerate(level(made, resolution)):
        top, left = n // 8 * resolution, n % 8 * resolution
        np.testing.assert_array_equal(shown[top:top + resolution, left:left + resolution], picture(sample))
    assert not shown[resolution:, 4 * resolution:].any()


def test_a_contact_sheet_of_large_images_keeps_to_its_width_and_spreads_over_the_set(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = [(20 * n, 0, 0) for n in range(11)]
    files = {f"{n:02d}.png": encoded(Image.new("RGB", (1024, 1024), colour)) for n, colour in enumerate(colours)}
    sharded(folder_of(tmp_path / "in", files), tmp_path / "out", 1024, shard_images=6)
    inspected(tmp_path / "out", tmp_path / "sheet.png", capsys, 1024)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (3072, 3072)
        shown = [image.getpixel((512 + 1024 * (n % 3), 512 + 1024 * (n // 3))) for n in range(9)]
    assert shown == [colours[n] for n in (0, 1, 2, 3, 5, 6, 7, 8, 10)]  # floor(n * 10 / 8)


def test_a_gray_set_has_a_gray_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(tmp_path / "in", {f"{n}.png": encoded(noise(n, 8).convert("L")) for n in range(3)})
    sharded(source, tmp_path / "out", 8, channels=1)
    said = inspected(tmp_path / "out", tmp_path / "sheet.png", capsys, 8)
    assert "1 channels" in said
    assert "classes" not in said
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.mode == "L"
        expected = np.hstack([np.asarray(noise(n, 8).convert("L")) for n in range(3)])
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("size", [4, 16])
def test_a_flipped_bit_in_any_shard_is_named(size: int, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / f"r{size:04d}/000001.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    said = complaint(copy, tmp_path, monkeypatch, capsys)
    assert "1 shards of" in said
    assert f"shard 000001.tar of {copy}/r{size:04d} has sha256" in said
    assert (tmp_path / "sheet.png").exists() == (size == 4)  # the level nearest to 128 px is that of 16


def test_all_damaged_shards_of_all_levels_are_named_at_once(
        copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("r0004/000000.tar", "r0004/000003.tar", "r0016/000002.tar"):
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"x")
    said = complaint(copy, tmp_path, monkeypatch, capsys)
    assert "3 shards of" in said
    for part in (f"000000.tar of {copy}/r0004", f"000003.tar of {copy}/r0004", f"000002.tar of {copy}/r0016"):
        assert part in said


def test_a_missing_shard_a_shortened_one_a_cut_index_and_a_level_without_one_are_each_named(
        made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def hurt(name: str, how: Any) -> str:
        out = Path(shutil.copytree(made, tmp_path / "hurt" / str(len(list(tmp_path.glob("hurt/*"))))))
        how(out / name)
        return complaint(out, tmp_path, monkeypatch, capsys).replace(str(out), "OUT")

    assert "shard OUT/r0008/000002.tar has no file, its index says" in hurt("r0008/000002.tar", Path.unlink)
    assert "shard OUT/r0016/000000.tar has 999 bytes, its index says" in hurt(
        "r0016/000000.tar", lambda path: os.truncate(path, 999))
    assert "OUT/r0004/index.json is no valid index" in hurt("r0004/index.json", lambda path: os.truncate(path, 300))
    assert "The 8px level has no index" in hurt("r0008/index.json", Path.unlink)


def test_a_folder_without_shards_and_a_level_that_was_not_made_are_refused(
        made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no finished shards" in complaint(tmp_path, tmp_path, monkeypatch, capsys)
    assert "holds no finished shards" in complaint(tmp_path / "nowhere", tmp_path, monkeypatch, capsys)
    with pytest.raises(UserError, match=re.escape("--resolution=32: no such level")):
        inspect_shards(str(made), 32, tmp_path / "sheet.png")


def test_a_set_whose_source_list_is_gone_can_be_inspected(
        copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("source.json", "sources.jsonl", "rejected.jsonl"):
        (copy / name).unlink()
    said = inspected(copy, tmp_path / "sheet.png", capsys)
    assert "classes  3: cat 7, dog 2, elk 3" in said
    assert "source " not in said


@pytest.mark.fault
def test_f34_a_set_in_an_object_store_is_inspected_like_a_local_one(
        made: Path, juicefs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    aws(monkeypatch, juicefs)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where downloads are kept
    out = f"s3://{BUCKET}/inspected"
    (summary,) = in_own_ray(2, [call(made.parent / "in", out, 16, shard_images=4, max_rejected_share=0.2)])
    sharded(made.parent / "in", tmp_path / "local", 16, shard_images=4, max_rejected_share=0.2)
    here = inspected(tmp_path / "local", tmp_path / "here.png", capsys)
    there = inspected(out, tmp_path / "there.png", capsys)
    assert there.replace("there.png", "here.png") == here
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    assert summary["images"] == index(tmp_path / "local", 16)["images"] == 12

    from gradine.stages.store import Store

    damaged = bytearray(Store(out).read("r0008/000001.tar"))
    damaged[700] ^= 1
    Store(out).write("r0008/000001.tar", bytes(damaged))
    shutil.rmtree(tmp_path / "home")
    said = complaint(out, tmp_path, monkeypatch, capsys)  # type: ignore[arg-type]
    assert f"shard 000001.tar of {out}/r0008 has sha256" in said
    assert json.loads(Store(out).read("source.json"))["images"] == 13
