"""Claims about sources: every kind of pile gives the same images and labels, and nothing is lost without a word.

The archives are made by tarfile, zipfile and pyarrow or byte by byte; pixels are read back by Pillow.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import UserError
from gradine.pipeline import containers, sources
from gradine.pipeline.sources import Found, digest, list_source, locate, read_images
from gradine.stages.pixels import Rejected
from gradine.stages.store import Store
from tests.object_store import BUCKET, Fault, aws, moto, proxy, web_folder  # noqa: F401 (moto is a fixture)

CLASSES = {"day": 7, "night": 5}
PICTURES = {f"{name}/{n:02d}": np.random.default_rng(n).integers(0, 256, (6, 8), dtype=np.uint8)
            for name, count in CLASSES.items() for n in range(count)}
IMAGES = {f"{path}.png": pixels for path, pixels in PICTURES.items()}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {path: png(pixels) for path, pixels in IMAGES.items()}


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tar_bytes(files: list[tuple[str | tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def idx(path: Path, pixels: np.ndarray, magic: int = 0x803) -> None:
    content = struct.pack(f">{1 + pixels.ndim}I", magic, *pixels.shape) + pixels.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def parquet(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, group: int = 5) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def listed(source: Path, labels: str = "auto") -> sources.Listing:
    return list_source(str(source), labels, 9.0)


def labels_of(source: Path, labels: str = "auto") -> dict[str, str | None]:
    return {image.path: image.label for image in listed(source, labels).images}


def contents(source: Path, paths: list[str] | None = None) -> dict[str, bytes | str]:
    """Bytes of each image, or why it is rejected."""
    found: dict[str, bytes | str] = {}
    for path, read in read_images(str(source), paths or [image.path for image in listed(source).images], 9.0):
        try:
            found[path] = read()
        except Rejected as error:
            found[path] = str(error)
    return found


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def decoded(content: bytes | str) -> np.ndarray:
    assert isinstance(content, bytes), content
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


# ---- One pile, packed in every way


def as_folder(path: Path) -> Path:
    return folder_of(path / "set", FILES)


def as_zip(path: Path) -> Path:
    return zip_of(path / "set.zip", FILES)


def as_tar(end: str, pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        file = path / f"set{end}"
        file.write_bytes(pack(tar_bytes(list(reversed(FILES.items())))))  # type: ignore[arg-type]
        return file

    return make


def as_wrapped_zip(path: Path) -> Path:
    return zip_of(path / "set.zip", {f"set/all/{name}": content for name, content in FILES.items()})


def as_webdataset(path: Path) -> Path:
    """Three tars with .cls members, before their image and after it."""
    items = list(FILES.items())
    for n in range(3):
        members: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for number, (name, content) in list(enumerate(items))[n::3]:
            pair = [(f"{number:05d}.png", content), (f"{number:05d}.cls", name.split("/")[0].encode())]
            members += pair if number % 2 else reversed(pair)
        folder_of(path / "wds", {f"{n:06d}.tar": tar_bytes(members)})
    return path / "wds"


def as_zips_by_class(path: Path) -> Path:
    for name in CLASSES:
        (path / "zips" / name).mkdir(parents=True)
        zip_of(path / "zips" / name / "part.zip", {p: c for p, c in FILES.items() if p.startswith(name)})
    return path / "zips"


def as_parquet(path: Path) -> Path:
    names = [name.split("/")[0] for name in FILES]
    rows = [{"bytes": content, "path": f"/etc/{n}.png"} for n, content in enumerate(FILES.values())]
    return parquet(path / "data" / "train-00000-of-00001.parquet",
                   {"image": rows, "label": [sorted(CLASSES).index(name) for name in names]},
                   {"label": {"names": sorted(CLASSES), "_type": "ClassLabel"}}).parent


def as_plain_parquet(path: Path) -> Path:
    return parquet(path / "t.parquet", {"n": list(range(len(FILES))), "jpg": list(FILES.values()),
                                        "class": [name.split("/")[0] for name in FILES]})


def as_labelled(end: str, write: Callable[[list[tuple[str, str]]], str]) -> Callable[[Path], Path]:
    """A flat folder and a labels file in it that `auto` does not take unless it is dataset.json."""
    def make(path: Path) -> Path:
        flat = {name.replace("/", "-"): content for name, content in FILES.items()}
        pairs = [(name, name.split("-")[0]) for name in flat]
        return folder_of(path / "flat", {**flat, end: write(pairs).encode("utf-8-sig")})

    return make


def csv_text(pairs: list[tuple[str, str]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([("file", "kind"), *pairs])
    return out.getvalue()


def jsonl_text(pairs: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"file_name": f".\\{path}", "label": label}) + "\n\n" for path, label in pairs)


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder": (as_folder, "auto"), "folder-folders": (as_folder, "folders"), "zip": (as_zip, "auto"),
    "wrapped-zip": (as_wrapped_zip, "folders"), "tar": (as_tar(".tar", bytes), "auto"),
    "tar.gz": (as_tar(".tar.gz", gzip.compress), "auto"), "tgz": (as_tar(".tgz", gzip.compress), "folders"),
    "tar.xz": (as_tar(".tar.xz", lzma.compress), "auto"), "tar.bz2": (as_tar(".tar.bz2", bz2.compress), "auto"),
    "webdataset": (as_webdataset, "auto"), "zips": (as_zips_by_class, "auto"),
    "parquet": (as_parquet, "auto"), "plain-parquet": (as_plain_parquet, "auto"),
    "dataset.json": (as_labelled("dataset.json", lambda pairs: json.dumps({"labels": pairs})), "auto"),
    "labels.csv": (as_labelled("labels.csv", csv_text), "labels.csv"),
    "metadata.jsonl": (as_labelled("metadata.jsonl", jsonl_text), "metadata.jsonl")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pile_gives_the_same_pixels_with_the_same_labels(kind: str, tmp_path: Path) -> None:
    make, labels = KINDS[kind]
    source = make(tmp_path)
    listing = listed(source, labels)
    assert listing.classes == ["day", "night"]
    paths = [image.path for image in listing.images]
    assert paths == sorted(set(paths))
    read = contents(source, paths)
    assert list(read) == paths
    shown = sorted((image.label or "", decoded(read[image.path]).tobytes()) for image in listing.images)
    assert shown == sorted((path.split("/")[0], pixels.tobytes()) for path, pixels in IMAGES.items())
    if "parquet" not in kind:
        assert [image.size for image in listing.images] == [len(read[path]) for path in paths]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("alone", [True, False])
def test_idx_images_come_as_pgm_with_the_label_of_their_row(packed: str, alone: bool, tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (25, 5, 7), dtype=np.uint8)
    classes = np.arange(25) % 11
    idx(tmp_path / f"train-images-idx3-ubyte{packed}", stack)
    idx(tmp_path / f"train-labels-idx1-ubyte{packed}", classes, 0x801)
    listing = listed(tmp_path / f"train-images-idx3-ubyte{packed}" if alone else tmp_path)
    name = f"train-images-idx3-ubyte{packed}"
    assert listing.images == [Found(f"{name}/{n:08d}", 35, str(n % 11)) for n in range(25)]
    assert listing.classes == [str(n) for n in range(11)]  # 10 after 9
    assert listing.ignored == 0
    order = [f"{name}/{n:08d}" for n in (3, 24, 0, 24)]
    for path, read in read_images(str(tmp_path), order, 9.0):
        content = read()
        assert content.startswith(b"P5\n7 5\n255\n")
        np.testing.assert_array_equal(decoded(content), stack[int(path[-8:])])


def test_a_single_image_is_a_source(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.JPEG": b"one", "b.png": b"two"})
    assert listed(tmp_path / "a.JPEG").images == [Found("a.JPEG", 3, None)]
    assert contents(tmp_path / "a.JPEG") == {"a.JPEG": b"one"}


def test_beside_images_containers_are_only_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": b"a", "more.tar": b"junk", "t.parquet": b"junk", "x.txt": b"", ".h/b.png": b"b"})
    listing = listed(tmp_path)
    assert [image.path for image in listing.images] == ["a.png"]
    assert listing.ignored == 4


def test_hidden_files_and_what_a_mac_leaves_are_no_images(tmp_path: Path) -> None:
    files = {"a.png": b"a", ".a.png": b"", "._b.png": b"", ".git/b.png": b"b", "__MACOSX/b.png": b"b",
             "sub/.DS_Store": b"", "notes.txt": b""}
    zip_of(tmp_path / "in.zip", files)
    (tmp_path / "in.tar").write_bytes(tar_bytes(list(files.items())))  # type: ignore[arg-type]
    for source in (folder_of(tmp_path / "in", files), tmp_path / "in.zip", tmp_path / "in.tar"):
        listing = listed(source)
        assert ([image.path for image in listing.images], listing.ignored) == (["a.png"], 6)


def test_names_that_tar_writes_with_a_dot_in_front_are_the_plain_names(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes([("./a/1.png", b"1"), ("./b/2.png", b"2")]))
    assert labels_of(tmp_path / "s.tar") == {"a/1.png": "a", "b/2.png": "b"}
    assert contents(tmp_path / "s.tar") == {"a/1.png": b"1", "b/2.png": b"2"}


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".zip"])
def test_of_members_of_one_name_the_last_counts(end: str, tmp_path: Path) -> None:
    source = tmp_path / f"in{end}"
    if end == ".zip":
        zip_of(source, {"a.png": b"old", "b.png": b"b"})
        with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", b"newer")
    else:
        content = tar_bytes([("a.png", b"old"), ("b.png", b"b"), ("a.png", b"newer")])
        source.write_bytes(gzip.compress(content) if end == ".tar.gz" else content)
    assert [(image.path, image.size) for image in listed(source).images] == [("a.png", 5), ("b.png", 1)]
    assert contents(source) == {"a.png": b"newer", "b.png": b"b"}


# ---- The list


@pytest.mark.parametrize("kind", ["folder", "tar", "webdataset", "dataset.json", "zips"])
def test_the_order_a_disk_lists_in_changes_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, labels = KINDS[kind]
    source = make(tmp_path)
    straight = listed(source, labels), digest(str(source), labels, 9.0)
    scandir, listdir = os.scandir, os.listdir

    class Shuffled:
        def __init__(self, *args: Any) -> None:
            with scandir(*args) as entries:
                self.entries = iter(random.Random(3).sample(found := list(entries), len(found)))

        def __enter__(self) -> Shuffled:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def close(self) -> None:
            pass

        def __iter__(self) -> Iterator[Any]:
            return self.entries

        def __next__(self) -> Any:
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", lambda *args: sorted(listdir(*args), reverse=True))
    assert (listed(source, labels), digest(str(source), labels, 9.0)) == straight


def test_a_digest_names_files_sizes_and_labels_and_opens_no_container(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {"a/1.png": b"1", "b/2.png": b"22"})
    seen = [digest(str(source), "auto", 9.0)]

    def again(labels: str = "auto") -> bool:
        """Whether the digest is one that was not seen before."""
        seen.append(digest(str(source), labels, 9.0))
        return seen[-1] not in seen[:-1]

    folder_of(source, {"notes.txt": b"hello", ".cache/x.png": b""})
    assert not again()
    folder_of(source, {"b/2.png": b"333"})
    assert again()
    (source / "b/2.png").rename(source / "b/3.png")
    assert again()
    folder_of(source, {"dataset.json": b'{"labels": [["a/1.png", 1], ["b/3.png", 2]]}'})
    assert again()
    folder_of(source, {"dataset.json": b'{"labels": [["a/1.png", 2], ["b/3.png", 1]]}'})
    assert again()
    assert not again("none") or not again("folders")
    labels = tmp_path / "labels.csv"
    labels.write_text("a/1.png,x\nb/3.png,y\n")
    assert again(str(labels))
    labels.write_text("a/1.png,y\nb/3.png,x\n")
    assert again(str(labels))
    moved = source.rename(tmp_path / "elsewhere")
    assert digest(str(moved), str(labels), 9.0) == seen[-1]
    junk = folder_of(tmp_path / "junk", {"a.zip": b"junk", "b.tar": b"junk"})
    assert len(digest(str(junk), "auto", 9.0)) == 64


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb\x1b[31m.png", b"back\\slash.png", b"\\u0041.png",
                                  "naïve 雪.png".encode()])
@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip"])
def test_a_name_of_any_bytes_is_listed_as_text_that_reads_back(kind: str, name: bytes, tmp_path: Path) -> None:
    text = os.fsdecode(name)
    if kind == "folder":
        source = folder_of(tmp_path / "in", {text: b"it", "A.png": b"other"})
    elif kind == "zip":
        if b"\xe9" in name:
            pytest.skip("a zip's names are cp437 or UTF-8")
        source = zip_of(tmp_path / "in.zip", {text: b"it", "A.png": b"other"})
    else:
        content = tar_bytes([(text, b"it"), ("A.png", b"other")])
        source = tmp_path / f"in.{kind}"
        source.write_bytes(gzip.compress(content) if kind == "tar.gz" else content)
    path, = (image.path for image in listed(source).images if image.path != "A.png")
    assert path.isprintable()
    assert json.loads(json.dumps(path, ensure_ascii=False).encode()) == path
    assert contents(source, [path, "A.png"]) == {path: b"it", "A.png": b"other"}


# ---- Labels


def flat(path: Path, **files: str) -> Path:
    return folder_of(path / "flat", {"a/1.png": b"1", "b/2.png": b"2", "c/3.png": b"3",
                                     **{name.replace("__", "."): text.encode() for name, text in files.items()}})


def test_dataset_json_goes_before_folders_and_null_means_none(tmp_path: Path) -> None:
    given = '{"labels": [["a/1.png", 10], ["b\\\\2.png", 9], ["c/3.png", 10], ["gone.png", 3]]}'
    listing = listed(flat(tmp_path, dataset__json=given))
    assert {image.path: image.label for image in listing.images} == {"a/1.png": "10", "b/2.png": "9", "c/3.png": "10"}
    assert listing.classes == ["9", "10"]
    assert set(labels_of(flat(tmp_path, dataset__json='{"labels": null}')).values()) == {None}
    assert list(labels_of(tmp_path / "flat", "folders").values()) == ["a", "b", "c"]
    assert set(labels_of(tmp_path / "flat", "none").values()) == {None}


@pytest.mark.parametrize("end", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("around", ["", "stylegan/"])
def test_a_labels_file_is_found_inside_an_archive(end: str, around: str, tmp_path: Path) -> None:
    files = {f"{around}00000/1.png": b"1", f"{around}00001/2.png": b"2",
             f"{around}dataset.json": b'{"labels": [["00000/1.png", 4], ["00001/2.png", 2]]}',
             "labels.csv": f"{around}00000/1.png,x\n{around}00001/2.png,y\n".encode()}
    source = tmp_path / f"s.{end}"
    if end == "zip":
        zip_of(source, files)
    else:
        content = tar_bytes(list(files.items()))  # type: ignore[arg-type]
        source.write_bytes(gzip.compress(content) if end == "tar.gz" else content)
    assert list(labels_of(source).values()) == ["4", "2"]
    assert list(labels_of(source, "labels.csv").values()) == ["x", "y"]


@pytest.mark.parametrize(("name", "text", "parts"), [
    ("dataset.json", '{"labels": [["a/1.png", 1]]}', ["2 of 3 images have no label", "first: b/2.png"]),
    ("dataset.json", '{"labels": [["x.png", 1]]}', ["names none of the 3 images", "x.png", "a/1.png"]),
    ("dataset.json", '{"labels": [["a/1.png", [0, 1]]]}', ["[0, 1]", "a/1.png", "neither a whole number nor text"]),
    ("dataset.json", '{"labels": [["a/1.png", 0.5]]}', ["0.5", "neither a whole number nor text"]),
    ("dataset.json", '{"labels": [["a/1.png", 1], ["a/1.png", 2]]}', ["a/1.png", "both '1' and '2'"]),
    ("dataset.json", '[1, 2]', ["cannot be read", "StyleGAN"]),
    ("dataset.json", '{"labels": 5}', ["cannot be read", "StyleGAN"]),
    ("dataset.json", "[" * 100_000, ["cannot be read"]),
    ("l.csv", "a/1.png\n", ["cannot be read"]),
    ("l.csv", "a/1.png,1\nb/2.png,\nc/3.png,1", ["1 of 3 images have no label", "first: b/2.png"]),
    ("l.csv", "", ["names none of the 3 images"]),
    ("l.jsonl", '{"file": "a/1.png"}', ["3 of 3 images have no label"]),
    ("l.jsonl", "no json", ["cannot be read"]),
    ("gone.csv", None, ["gone.csv", "neither a file here nor in"]),
])
def test_labels_that_do_not_fit_are_refused_in_one_line(name: str, text: str | None, parts: list[str],
                                                        tmp_path: Path) -> None:
    source = flat(tmp_path, **({} if text is None else {name: text}))
    said = refusal(lambda: listed(source, "auto" if name == "dataset.json" else name))
    for part in parts:
        assert part in said


def test_a_local_labels_file_and_one_without_a_header_are_read(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('a/1.png,"x, y"\nb\\2.png,z,more\nc/3.png,z\n')
    assert list(labels_of(flat(tmp_path), str(tmp_path / "own.csv")).values()) == ["x, y", "z", "z"]


def test_a_tar_whose_samples_lack_a_class_is_refused_or_taken_without(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes([("1.png", b"1"), ("1.cls", b"3"), ("2.seg.png", b"2")]))
    assert "1 of 2 images have no label (first: 2.seg.png)" in refusal(lambda: listed(tmp_path / "s.tar"))
    assert labels_of(tmp_path / "s.tar", "none") == {"1.png": None, "2.seg.png": None}


def test_shards_of_one_set_are_no_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, {f"{n}.tar": tar_bytes([(f"{n}.png", b"x")]) for n in range(3)})
    assert labels_of(tmp_path) == {f"{n}.tar/{n}.png": None for n in range(3)}


def test_parquet_rows_without_an_image_are_rejected_and_vector_labels_refused(tmp_path: Path) -> None:
    source = parquet(tmp_path / "t.parquet", {"image": [{"bytes": b"one", "path": "x"}, {"bytes": None, "path": "y"},
                                                        None]})
    assert list(contents(source).values()) == [b"one", "has no bytes in its row", "has no bytes in its row"]
    vectors = parquet(tmp_path / "v.parquet", {"img": [b"1"], "label": [[0, 1]]})
    assert "neither a whole number nor text" in refusal(lambda: listed(vectors))
    unknown = parquet(tmp_path / "u.parquet", {"img": [b"1", b"2"], "label": [0, 5]}, {"label": {"names": ["a", "b"]}})
    assert "label 5 of row 1" in refusal(lambda: listed(unknown))
    none = parquet(tmp_path / "n.parquet", {"text": ["a"], "data": [b"x"]})
    assert "no column of images among text, data" in refusal(lambda: listed(none))


def test_of_a_parquet_file_one_row_group_at_a_time_is_read_and_each_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    source = parquet(tmp_path / "t.parquet", {"image": [bytes([n]) for n in range(23)]}, group=5)
    groups: list[int] = []
    read = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        groups.append(group)
        return read(self, group, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    paths = [f"t.parquet/{n:08d}" for n in range(7, 22)]
    assert list(contents(source, paths).values()) == [bytes([n]) for n in range(7, 22)]
    assert groups == [1, 2, 3, 4]


def test_without_pyarrow_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "t.parquet", {"image": [b"1"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'gradine[parquet]'" in refusal(lambda: listed(source))


# ---- Damage and hostility


@pytest.mark.parametrize(("name", "content", "part"), [
    ("s.zip", b"PK\3\4 and no more", "damaged"), ("s.tar", b"", "damaged"), ("s.tar", b"x" * 2000, "damaged"),
    ("s.tar.gz", gzip.compress(tar_bytes([("a.png", b"x" * 9000)]))[:-9], "damaged"),
    ("s.tar.xz", lzma.compress(tar_bytes([("a.png", b"x" * 9000)]))[:-9], "damaged"),
    ("s.tar.bz2", bz2.compress(tar_bytes([("a.png", bytes(range(256)))]))[:-9], "damaged"),
    ("s.tgz", b"\x1f\x8b junk", "damaged"), ("s.parquet", b"PAR1 junk", "damaged"),
    ("s.tar.zst", b"(\xb5/\xfd", "pack it as .tar.gz"), ("s.7z", b"7z", "neither a folder nor a zip or tar"),
    ("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 3, 2, 2) + bytes(11), "damaged: its header says 3 x 2 x 2"),
    ("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 3, 2, 2) + bytes(13), "damaged: its header says 3 x 2 x 2"),
    ("train-images-idx3-ubyte", struct.pack(">4I", 0xD03, 3, 2, 2) + bytes(12), "0x00000803"),
    ("train-images-idx3-ubyte", b"\0\0\x08", "damaged"),
    ("train-images-idx3-ubyte.gz", gzip.compress(struct.pack(">4I", 0x803, 1, 2, 2) + bytes(4))[:-5], "damaged"),
    ("s.zip", zipfile.ZipFile(empty := io.BytesIO(), "w").close() or empty.getvalue(), "holds no image"),
])
def test_a_file_that_is_not_whole_is_refused_in_one_line(name: str, content: bytes, part: str, tmp_path: Path) -> None:
    folder_of(tmp_path, {name: content})
    said = refusal(lambda: listed(tmp_path / name))
    assert part in said
    assert name in said
    if "neither" not in said:
        assert part in refusal(lambda: listed(tmp_path))


def test_labels_of_another_count_than_the_idx_images_are_refused(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 2, 2)))
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(4), 0x801)
    assert "4 labels for the 3 images" in refusal(lambda: listed(tmp_path))


def small_tar(kind: int) -> bytes:
    """Six images, one with a name too long for the header, one empty; a text and a folder between them."""
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        (f"{n}.png" if n != 3 else f"{'long' * 40}.png", bytes([n + 1]) * (700 * n % 1500)) for n in range(6)]
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    return tar_bytes([*members[:4], (folder, b""), ("notes.txt", b"hello"), *members[4:]], kind)


def header_offsets(content: bytes) -> list[int]:
    """Where a tar's header blocks begin, by walking the sizes in them (octal, as both formats write them here)."""
    offsets, at = [], 0
    while any(content[at:at + 512]):
        offsets.append(at)
        at += 512 + -(-int(content[at + 124:at + 136].rstrip(b"\0 "), 8) // 512) * 512
    return offsets


@pytest.mark.fault
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_f31_no_cut_no_flipped_bit_and_no_zeroed_header_of_a_tar_loses_an_image_silently(
        kind: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = small_tar(kind)
    source = tmp_path / "s.tar"
    source.write_bytes(whole)
    expected = contents(source)
    assert len(expected) == 6

    file = source.open("r+b", buffering=0)
    refused = 0

    def lost(content: bytes) -> bool:
        """Whether it is taken for a whole source of other images. A source of equal ones has lost nothing."""
        nonlocal refused
        file.seek(0)
        file.write(content)
        file.truncate()
        containers.REMEMBERED.clear()  # the clock of the file system may be coarser than this loop
        try:
            return contents(source) != expected
        except UserError:
            refused += 1
            return False

    headers = header_offsets(whole)
    cuts = range(0, len(whole), 512)
    assert [cut for cut in cuts if lost(whole[:cut])] == []
    odd_cuts = [cut + step for cut in cuts for step in (1, 511)]
    assert [cut for cut in odd_cuts if lost(whole[:cut])] == []
    flips = [(at + byte, bit) for at in headers for byte in range(512) for bit in range(8)]
    silent = []
    for byte, bit in flips:
        mutated = bytearray(whole)
        mutated[byte] ^= 1 << bit
        if lost(bytes(mutated)):
            silent.append((byte, bit))
    assert silent == []
    # the last header and its only block of data cannot be told from the end marker's zeros when both are gone
    zeroed = [(at, size) for at in headers for size in (512, 1024) if size == 512 or at != headers[-1]]
    assert [gap for gap in zeroed if lost(whole[:gap[0]] + bytes(gap[1]) + whole[sum(gap):])] == []
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    before = refused
    assert not lost(whole[:end + 1024])
    assert refused == before
    assert not lost(whole[:end + 512])
    assert refused == before + 1  # one zero block is no end
    assert [tail for tail in (whole, b"x", bytes(512)) if lost(whole + tail)] == []
    file.close()
    tried = len(cuts) + len(odd_cuts) + len(flips) + len(zeroed) + 5
    assert refused > 0.95 * tried  # the rest: padding after the end, bits that a header's checksum field does not use
    with capsys.disabled():
        print(f"\n  F31 sources: {len(cuts)} cuts at 512, {len(odd_cuts) + 2} others, {len(flips)} bit flips, "
              f"{len(zeroed)} zeroed headers, 3 tails: {refused} of {tried} refused, the rest whole, 0 silent losses")


@pytest.mark.fault
def test_f31_a_cut_or_flipped_compressed_tar_loses_nothing_silently(tmp_path: Path) -> None:
    whole = gzip.compress(small_tar(tarfile.GNU_FORMAT))
    source = tmp_path / "s.tar.gz"
    source.write_bytes(whole)
    expected = contents(source)
    tried = 0
    for mutated in [*(whole[:cut] for cut in range(len(whole))),
                    *(whole[:n] + bytes([whole[n] ^ 4]) + whole[n + 1:] for n in range(len(whole)))]:
        source.write_bytes(mutated)
        tried += 1
        try:
            assert contents(source) == expected  # a flip in the packer's name or time of making
        except UserError:
            continue
    print(f"\n  F31 compressed sources: {tried} tried")


def odd_members() -> list[tuple[str | tarfile.TarInfo, bytes]]:
    odd: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for name, kind, link in [("hard.png", tarfile.LNKTYPE, "good.png"), ("soft.png", tarfile.SYMTYPE, "/etc/passwd"),
                             ("fifo.png", tarfile.FIFOTYPE, ""), ("device.png", tarfile.CHRTYPE, ""),
                             ("block.png", tarfile.BLKTYPE, "")]:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        odd.append((member, b""))
    return [("good.png", b"good"), *odd, ("../out.png", b"out"), ("/tmp/gradine-absolute.png", b"out"),
            ("a/../../up.png", b"out")]


def sparse_member(size: int) -> bytes:
    """GNU's old sparse header of a file that claims `size` bytes, all of them a hole."""
    header = bytearray(tarfile.TarInfo("sparse.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.fault
@pytest.mark.parametrize("end", ["tar", "tar.gz"])
def test_f31_links_devices_sparse_files_and_ways_out_are_rejected_and_nothing_is_written(
        end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "deep" / "down"
    place.mkdir(parents=True)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(place)
    content = sparse_member(1 << 32) + tar_bytes(odd_members())
    source = place / f"s.{end}"
    source.write_bytes(gzip.compress(content) if end == "tar.gz" else content)
    found = contents(source)
    assert found.pop("good.png") == b"good"
    assert len(found) == 9
    assert set(found.values()) == {"is no plain file in the tar"}
    assert [p for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink()] == [source]
    assert not Path("/tmp/gradine-absolute.png").exists()


def gnu_long(size: int) -> bytes:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return member.tobuf(tarfile.GNU_FORMAT)


def pax_global(n: int) -> bytes:
    record = b"comment%05d=%s\n" % (n, b"x" * 60_000)
    body = b"%d " % (len(record) + 6) + record
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XGLTYPE, len(body)
    return member.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def bomb(kind: str) -> bytes:
    zeros = bytes(1 << 20)
    if kind == "long name":  # of 300 MB
        return gnu_long(300 << 20) + zeros * 300
    if kind == "long names in a row":
        return (gnu_long(100) + b"x" * 100 + bytes(412)) * 50_000
    if kind == "attributes":
        return b"".join(pax_global(n) + tarfile.TarInfo(f"{n}.txt").tobuf(tarfile.GNU_FORMAT) for n in range(1000))
    if kind == "names":
        return (gnu_long(60_000) + b"x" * 60_000 + bytes(416) + tarfile.TarInfo("a").tobuf()) * 1000
    header = bytearray(sparse_member(1 << 32))  # and an endless map of its holes
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + (b"0" * 504 + b"\1" + bytes(7)) * 200_000


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["long name", "long names in a row", "attributes", "names", "sparse map"])
def test_f31_a_bomb_in_a_tar_header_is_refused_within_64_mb(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "s.tar.gz"
    source.write_bytes(gzip.compress(bomb(kind) + tar_bytes([("a.png", b"1")]), 1))
    tracemalloc.start()
    try:
        assert "damaged" in refusal(lambda: listed(source))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.fault
def test_f31_a_negative_size_is_damage_and_no_endless_loop(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("b.png").tobuf())
    header[124:136] = b"\xff" * 10 + b"\xfe\0"  # base 256: -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(tarfile.TarInfo("a.png").tobuf() + header + bytes(1024))
    assert "damaged" in refusal(lambda: listed(tmp_path / "s.tar"))


@pytest.mark.fault
def test_f31_a_member_that_unpacks_to_more_than_a_gibibyte_is_rejected_unread(tmp_path: Path) -> None:
    zipped = bytearray(zip_of(tmp_path / "s.zip", {"a.png": b"a", "b.png": b"b"}).read_bytes())
    at = zipped.index(b"PK\1\2")
    zipped[at + 24:at + 28] = struct.pack("<I", (1 << 30) + 1)
    (tmp_path / "s.zip").write_bytes(zipped)
    assert contents(tmp_path / "s.zip") == {"a.png": "claims 1,073,741,825 bytes, more than 1,073,741,824",
                                            "b.png": b"b"}


def test_encrypted_and_linked_zip_members_are_rejected_and_a_bad_checksum_is_an_error(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("good.png", b"good")
        archive.writestr("secret.png", b"plain really")
        archive.writestr("torn.png", b"torn bytes")
        archive.writestr(link, b"/etc/passwd")
    content = bytearray((tmp_path / "s.zip").read_bytes().replace(b"torn bytes", b"torn BYTES"))
    at = content.rindex(b"secret.png") - 46
    content[at + 8] |= 1
    (tmp_path / "s.zip").write_bytes(content)
    assert contents(tmp_path / "s.zip", ["good.png", "link.png", "secret.png"]) == {
        "good.png": b"good", "link.png": "is no plain file in the zip", "secret.png": "is encrypted"}
    (_, read), = read_images(str(tmp_path / "s.zip"), ["torn.png"], 9.0)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        read()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.fault
def test_f32_hostile_members_are_never_decoded_or_shelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    canary = tmp_path / "canary"
    loaded = pickle.dumps(Canary(canary))
    objects = io.BytesIO()
    np.save(objects, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    hostile = {"a.pkl": loaded, "a.pth": loaded, "a.pyd": loaded, "a.npy": objects.getvalue(), "a.pickle": loaded,
               "pipe:touch canary": b"", "pipe:touch canary.png": b"no image", "b.png": b"image"}
    names = ["b.png", "pipe:touch canary.png"]
    folder_of(work / "folder", hostile)
    zip_of(work / "s.zip", hostile)
    (work / "s.tar").write_bytes(tar_bytes(list(hostile.items())))  # type: ignore[arg-type]
    (work / "s.tar.gz").write_bytes(gzip.compress((work / "s.tar").read_bytes()))
    parquet(work / "s.parquet", {"image": [loaded, b"x"], "label": ["pipe:touch canary", "b"]})
    (work / "cls.tar").write_bytes(tar_bytes([("pipe:touch canary.png", b"x"), ("pipe:touch canary.cls", loaded)]))
    folder_of(work / "pipe:touch canary.tar", {"in.png": b"x"})

    def ran(*args: Any, **options: Any) -> None:
        raise AssertionError(f"a command was run: {args}")

    monkeypatch.setattr(subprocess, "Popen", ran)
    monkeypatch.setattr(os, "system", ran)
    for source in ("folder", "s.zip", "s.tar", "s.tar.gz"):
        found = contents(work / source)
        assert found == {"b.png": b"image", "pipe:touch canary.png": b"no image"}
        assert list(found) == names
    assert contents(work / "s.parquet") == {"s.parquet/00000000": loaded, "s.parquet/00000001": b"x"}
    assert "is no text" in refusal(lambda: listed(work / "cls.tar"))
    assert contents(work / "pipe:touch canary.tar") == {"in.png": b"x"}
    with pytest.raises(UserError, match="does not exist"):
        locate("pipe:touch canary")
    assert not list(tmp_path.rglob("canary"))


# ---- Reading


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "webdataset", "parquet"])
def test_images_come_in_the_order_asked_from_whatever_order_they_lie_in(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind][0](tmp_path)
    straight = contents(source)
    for seed in range(3):
        order = random.Random(seed).sample(sorted(straight), 7)
        assert list(contents(source, order).items()) == [(path, straight[path]) for path in order]


def test_a_compressed_tar_is_unpacked_once_a_call_and_leaves_no_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KINDS["tar.gz"][0](tmp_path)
    paths = [image.path for image in listed(source).images]
    unpacked = 0

    class Counted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal unpacked
            content = super().read(size)
            unpacked += len(content)
            return content

        def seek(self, offset: int, whence: int = 0) -> int:
            assert whence or offset >= self.tell(), "a step back unpacks all again"
            return super().seek(offset, whence)

    monkeypatch.setitem(containers.UNPACKERS, b"\x1f\x8b", lambda file: Counted(fileobj=file))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for _, read in read_images(str(source), paths, 9.0):
        assert read()
        assert not list(temporary.iterdir())
    assert 0 < unpacked <= len(gzip.decompress(source.read_bytes()))


def test_a_changed_archive_is_not_read_by_what_was_remembered_of_it(tmp_path: Path) -> None:
    source = tmp_path / "s.tar"
    for names in ("ab", "ba"):
        source.write_bytes(tar_bytes([(f"{name}.png", name.encode()) for name in names]))
        os.utime(source, ns=(0, ord(names[0])))
        assert contents(source) == {"a.png": b"a", "b.png": b"b"}


def test_locate_gives_absolute_paths_and_leaves_urls_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    assert locate("set") == str(tmp_path / "set")
    assert locate("s3://bucket/set") == "s3://bucket/set"
    assert Path(locate("bundled:demo_images.zip")).is_file()
    assert "'gone' does not exist" in refusal(lambda: locate("gone"))


# ---- Remote


PACKED = {"folder": "set", "zip": "set.zip", "tar": "set.tar", "tar.gz": "set.tar.gz", "webdataset": "wds",
          "parquet": "data", "zips": "zips", "metadata.jsonl": "flat"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for kind in PACKED:
        KINDS[kind][0](folder)
    idx(folder / "train-images-idx3-ubyte.gz", np.zeros((3, 2, 2)))
    idx(folder / "train-labels-idx1-ubyte.gz", np.arange(3), 0x801)
    return folder


def same_as_local(location: str, local: Path, labels: str) -> None:
    there, here = list_source(location, labels, 30.0), listed(local, labels)
    assert [(image.path, image.label) for image in there.images] == [(image.path, image.label) for image in here.images]
    assert (there.classes, there.ignored) == (here.classes, here.ignored)
    if location.startswith("s3:"):  # a web server's page has no sizes
        assert digest(location, labels, 30.0) == digest(str(local), labels, 30.0)
    paths = [image.path for image in there.images]
    read = {path: read() for path, read in read_images(location, paths, 30.0)}
    assert read == contents(local, paths)


@pytest.mark.fault
@pytest.mark.parametrize("ranges", [True, False])
def test_f33_a_web_folder_gives_what_the_local_one_gives(packed: Path, ranges: bool) -> None:
    with web_folder(packed, ranges) as url:
        for kind, name in PACKED.items():
            same_as_local(f"{url}/{name}", packed / name, KINDS[kind][1])
        same_as_local(f"{url}/train-images-idx3-ubyte.gz", packed / "train-images-idx3-ubyte.gz", "auto")


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["", "503", "half", "reset"])
def test_f33_an_object_store_with_faults_gives_what_the_local_folder_gives(
        kind: str, packed: Path, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    aws(monkeypatch, moto)
    for file in packed.rglob("*"):
        if file.is_file():
            Store(f"s3://{BUCKET}/sources").write(str(file.relative_to(packed)), file.read_bytes())
    fault = Fault(kind, hits=lambda number: bool(kind) and number % 5 == 2)
    with proxy(moto, fault) as endpoint:
        aws(monkeypatch, endpoint)
        for packing in ("folder", "tar", "webdataset") if kind else ("zip", "tar.gz", "parquet", "metadata.jsonl"):
            same_as_local(f"s3://{BUCKET}/sources/{PACKED[packing]}", packed / PACKED[packing], KINDS[packing][1])
    assert fault.done >= 5 or not kind


@pytest.mark.fault
def test_no_message_about_a_remote_source_holds_a_password(tmp_path: Path) -> None:
    folder_of(tmp_path, {"s.tar": b"junk", "empty/notes.txt": b"", "set/a.png": b"a"})
    with web_folder(tmp_path) as url:
        login = url.replace("://", "://me:s3cret@")
        for source, labels in ((f"{login}/s.tar?token=s3cret", "auto"), (f"{login}/empty/", "auto"),
                               (f"{login}/set?token=s3cret", "labels.csv")):
            assert "s3cret" not in refusal(lambda source=source, labels=labels: list_source(source, labels, 9.0))
