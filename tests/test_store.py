"""Claims about Store: the same files at every kind of location, whole or not at all, whatever the network does.

F33 is shown through a proxy in front of real S3 servers (object_store.py); the oracle is the bytes that were written.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gradine.configs.schema import EnvironmentFault, UserError
from gradine.stages.store import Store, is_remote, write_atomic

from .object_store import BUCKET, SECRET, Fault, aws, juicefs, moto, proxy, web_folder

__all__ = ["juicefs", "moto"]
SIZES = (0, 1, (1 << 20) + 1, 17 << 20)  # the last goes up in parts and comes down in ranges
CANARY = "s3cret-in-the-url-89"
counter = itertools.count()


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture(params=["local", pytest.param("moto", marks=pytest.mark.fault),
                        pytest.param("juicefs", marks=pytest.mark.fault)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty place that can be written to, of each kind."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    aws(monkeypatch, request.getfixturevalue(request.param))
    return Store(f"s3://{BUCKET}/place {next(counter)}/below", deadline_s=60)


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Path]]:
    """A web folder, and the folder behind it; with and without a server that knows ranges."""
    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    with web_folder(folder, ranges=request.param) as url:
        yield Store(f"{url}/data", deadline_s=30), folder / "data"


# ---- Atomic local files


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file"
    write_atomic(target, b"old" * 1000)
    reader = target.open("rb")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert reader.read() == b"old" * 1000  # who had it open still reads the old one: it was replaced, not overwritten
    reader.close()
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_the_old_file_stays_alone_if_the_disk_fails_in_mid_write(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "file"
    write_atomic(target, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    sync, target = os.fsync, tmp_path / "file"

    def watched(descriptor: int) -> None:
        seen.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), target.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_atomic(target, b"x")
    (first, named_then), (second, named_after) = seen
    assert first.startswith(f"{target}.")
    assert (named_then, second, named_after) == (False, str(tmp_path), True)


# ---- The same at every kind of location


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_put_or_created_is_what_is_read_opened_and_fetched(
        store: Store, tmp_path: Path, size: int) -> None:
    expected, local = content(size), tmp_path / "finished.tar"
    local.write_bytes(expected)
    store.write("a/written", expected)
    store.put(local, "put.tar")
    assert not local.exists()
    assert store.create("created", expected)
    for name in ("a/written", "put.tar", "created"):
        assert store.read(name) == expected
        assert store.size(name) == size
        store.fetch(name, tmp_path / "new" / "fetched")
        assert (tmp_path / "new" / "fetched").read_bytes() == expected
        with store.open(name) as file:
            assert file.read() == expected
    assert store.list() == [("a/written", size), ("created", size), ("put.tar", size)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fetched"]


def test_an_open_file_is_read_and_sought_like_a_local_one(store: Store, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.bin", content(700_000 + number))
    expected = (tmp_path / "set.zip").read_bytes()
    store.write("set.zip", expected)
    with store.open("set.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("2.bin") == content(700_002)
        assert archive.read("0.bin") == content(700_000)
    with store.open("set.zip") as file:
        for start, length in ((5, 10), (2_000_000, 200_000), (0, 1), (1_048_570, 12)):
            file.seek(start)
            assert file.read(length) == expected[start:start + length]
        file.seek(-3, os.SEEK_END)
        assert file.read(10) == expected[-3:]


def test_a_missing_file_is_none_or_file_not_found_and_an_empty_place_lists_nothing(
        store: Store, tmp_path: Path) -> None:
    assert store.list() == []
    store.write("folder/file", b"x")
    for name in ("nothing", "folder"):
        assert store.size(name) is None
    for act in (store.read, store.open, lambda name: store.fetch(name, tmp_path / "fetched")):
        with pytest.raises(FileNotFoundError, match="nothing"):
            act("nothing")
    assert not list(tmp_path.glob("fetched*"))


def test_a_listing_is_fresh_sorted_and_holds_only_what_is_below_the_location(
        request: pytest.FixtureRequest, store: Store) -> None:
    below = Store(f"{store.location}/set", deadline_s=60)
    store.write("set-2/x", b"1")
    if "moto" in request.node.name:
        store.write("set", b"12")  # a file and a folder of one name: only a true object store has it
    names = ["b", "a/z/1", "a-1", "ä ö%20+&#?", "B"]
    for number, name in enumerate(names):
        below.write(name, b"0" * number)
        assert below.list() == sorted((n, i) for i, n in enumerate(names[:number + 1]))
    below.write("b", b"longer")
    assert dict(below.list())["b"] == 6
    assert below.read("ä ö%20+&#?") == b"000"


def test_writing_replaces_and_creating_does_not(store: Store) -> None:
    store.write("x", b"old")
    assert not store.create("x", b"other")
    assert not store.create("x", b"old")
    assert store.read("x") == b"old"
    store.write("x", b"new")
    assert store.read("x") == b"new"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_name_never_leads_out_of_the_location(store: Store, name: str) -> None:
    for act in (store.read, store.open, store.size, lambda name: store.write(name, b"x")):
        with pytest.raises(UserError, match="no path below"):
            act(name)


def test_many_threads_share_a_store_and_a_pickle_of_it_holds_no_connection(store: Store) -> None:
    def round_trip(number: int) -> bool:
        store.write(f"{number}", content(50_000 + number))
        return store.read(f"{number}") == content(50_000 + number)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(40)))
    copied = pickle.loads(pickle.dumps(store))
    assert copied.list() == [(str(n), 50_000 + n) for n in sorted(range(40), key=str)]
    assert len(pickle.dumps(store)) < 300


@pytest.mark.parametrize("alike", [True, False])
def test_of_threads_that_create_one_file_at_once_exactly_one_wins(
        request: pytest.FixtureRequest, store: Store, monkeypatch: pytest.MonkeyPatch, alike: bool) -> None:
    if "juicefs" in request.node.name:
        pytest.skip("ignores If-None-Match; what is left of the race is said in Store.create")
    stores, barrier = [Store(store.location) for _ in range(4)], threading.Barrier(4)
    monkeypatch.setattr(Store, "size", lambda self, name: None)  # the check before must not decide it
    for number in range(10):
        def create(own: int, name: str = f"lock-{number}") -> bool:
            barrier.wait()
            return stores[own].create(name, b"same" if alike else str(own).encode() * 100)

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(create, range(4)))
        assert won.count(True) == 1
        assert store.read(f"lock-{number}") == (b"same" if alike else str(won.index(True)).encode() * 100)


# ---- Local only


@pytest.mark.fault
@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, 524])
def test_f08_a_file_is_created_once_on_a_disk_without_hard_links(
        error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a disk that refuses hard links (FAT, some FUSE and CIFS mounts), in each way there is to say so"""
    def no_links(self: Path, target: Path) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    store = Store(str(tmp_path))
    assert store.create("term", b"first")
    assert not store.create("term", b"second")
    assert store.read("term") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["term"]


def test_another_error_of_a_link_is_not_taken_for_a_disk_without_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "hardlink_to", broken)
    with pytest.raises(OSError, match="Input/output error"):
        Store(str(tmp_path)).create("term", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
@pytest.mark.parametrize("how", ["write", "put", "create"])
def test_f02_folders_made_for_a_file_are_on_the_disk_before_it(
        how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a file three folders below the last that is there: the folder above each new one is synced once it is in it"""
    synced: list[Path] = []
    sync, local = os.fsync, tmp_path / "local"
    local.write_bytes(b"x")

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    store = Store(str(tmp_path / "a"))
    if how == "put":
        store.put(local, "b/c/file")
    else:
        getattr(store, how)("b/c/file", b"x")
    assert synced[:3] == [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    assert synced[-1] == tmp_path / "a/b/c"


def test_unfinished_files_are_not_listed(tmp_path: Path) -> None:
    for name in ("a", "b.123-4.partial", ".partial-x/1.tar", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"xy")
    assert Store(str(tmp_path)).list() == [("a", 2), ("c/d", 2)]


def test_put_from_another_disk_leaves_the_whole_file_and_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, rename = tmp_path / "local", Path.rename

    def other_disk(self: Path, target: Path) -> Path:
        if self == local:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    local.write_bytes(content(3_000_000))
    monkeypatch.setattr(Path, "rename", other_disk)
    Store(str(tmp_path / "store")).put(local, "x/y")
    assert (tmp_path / "store/x/y").read_bytes() == content(3_000_000)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["store", "x", "y"]


def test_a_store_imports_no_torch_and_a_local_one_nothing_of_the_network() -> None:
    code = ("import sys; from gradine.stages.store import Store; Store('/tmp').size('x'); "
            "print({'torch', 'numpy', 'fsspec', 'aiohttp', 's3fs', 'tenacity'} & set(sys.modules))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


@pytest.mark.parametrize(("location", "remote"), [("s3://b/x", True), ("https://h", True), ("data/set", False),
                                                  ("/a://b", False), ("bundled:x.zip", False), ("C:/x", False)])
def test_a_location_is_remote_if_it_begins_with_a_scheme(location: str, remote: bool) -> None:
    assert is_remote(location) == remote


@pytest.mark.parametrize("location", ["ftp://host/x", "s3:///x", "file:///tmp", "pipe://cat x"])
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(UserError, match="Use a path, s3://"):
        Store(location)


@pytest.mark.parametrize(("module", "location", "extra"), [
    ("s3fs", "s3://b/x", "s3"), ("aiohttp", "http://h/x", "http"), ("gcsfs", "gs://b/x", "gs")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
        module: str, location: str, extra: str) -> None:
    code = (f"import sys; sys.modules[{module!r}] = None; "
            f"from gradine.stages.store import Store; Store({location!r}).list()")
    error = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()[-1]
    assert error.startswith("gradine.configs.errors.UserError: ")
    assert f"pip install 'gradine[{extra}]'" in error


# ---- Web folders


def test_a_web_folder_is_listed_read_opened_and_fetched(web: tuple[Store, Path], tmp_path: Path) -> None:
    store, folder = web
    names = ["a.bin", "b c/ä&#?%.bin", "b c/d/e.bin", "empty"]
    for name, size in zip(names, (SIZES[3], 5, SIZES[2], 0), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(size))
    assert store.list() == [(name, -1) for name in sorted(names)]
    for name in names:
        expected = (folder / name).read_bytes()
        assert store.size(name) == len(expected)
        assert store.read(name) == expected
        store.fetch(name, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == expected
        with store.open(name) as file:
            file.seek(len(expected) // 2)
            assert file.read() == expected[len(expected) // 2:]
    assert store.size("nothing") is store.size("b c") is None
    for act in (store.read, store.open, lambda name: store.fetch(name, tmp_path / "no")):
        with pytest.raises(FileNotFoundError):
            act("nothing")


def test_a_web_folder_is_only_what_its_pages_link_to_below_it(web: tuple[Store, Path]) -> None:
    store, folder = web
    (folder / "sub").mkdir()
    (folder.parent / "above.bin").write_bytes(b"x")
    here = store.location
    (folder / "index.html").write_text(f"""<html><a href="?C=N;O=D">Name</a> <A class=x HREF='one.bin'>1</A>
        <a href="../above.bin">up</a> <a href="/">top</a> <a href="http://127.0.0.1:1/data/foreign.bin">x</a>
        <a href="sub/">s</a> <a href="{here}/two.bin">2</a> <a href="/data/three%20%26.bin#here">3</a>
        <a href="./sub/../four.bin">4</a> http://not.a/link.bin <a href="one.bin?again">1</a></html>""")
    (folder / "sub" / "index.html").write_text('<a href="./">self</a><a href="../">loop</a><a href="five.bin">5</a>')
    assert store.list() == [(name, -1) for name in ("four.bin", "one.bin", "sub/five.bin", "three &.bin", "two.bin")]


def test_a_web_folder_without_an_index_page_is_refused(web: tuple[Store, Path]) -> None:
    store, folder = web
    (folder / "file.bin").write_bytes(b"x")
    for location in (f"{store.location}/nowhere", f"{store.location}/file.bin"):
        with pytest.raises(UserError, match="has no index page"):
            Store(location).list()


def test_a_web_folder_is_read_only(web: tuple[Store, Path], tmp_path: Path) -> None:
    store, local = web[0], tmp_path / "x"
    local.write_bytes(b"x")
    for act in (lambda: store.write("x", b""), lambda: store.create("x", b""), lambda: store.put(local, "x")):
        with pytest.raises(UserError, match="read only"):
            act()
    assert (tmp_path / "x").exists()


def test_user_password_and_query_of_a_url_are_sent_and_never_shown(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with web_folder(tmp_path) as url, proxy(url, fault := Fault("503", hits=lambda number: number > 2)) as broken:
        host = broken.removeprefix("http://")
        store = Store(f"http://user%40home:{CANARY}@{host}/?token={CANARY}", deadline_s=1)
        assert store.read("x") == b"x"
        assert store.size("x") == 1
        assert fault.requests == [f"GET /x?token={CANARY}"] * 2
        assert fault.logins == [("user@home", CANARY)] * 2
        for act in (lambda: store.read("x"), store.list, lambda: store.size("x"), lambda: store.open("x"),
                    lambda: store.write("x", b"")):
            with pytest.raises((EnvironmentFault, UserError)) as caught:
                act()
            assert CANARY not in "".join(traceback.format_exception(caught.value))
            assert f"http://{host}/" in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(EnvironmentFault) as caught:  # nobody listens there any more
        store.read("x")
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + caplog.text


# ---- S3: what no retry mends


@pytest.mark.fault
def test_a_wrong_secret_is_refused_at_once_in_one_line_that_shows_no_secret(
        juicefs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, juicefs, secret=CANARY)
    (tmp_path / "x").write_bytes(b"x")
    for act in (lambda s: s.list(), lambda s: s.size("x"), lambda s: s.read("x"), lambda s: s.open("x"),
                lambda s: s.write("x", b""), lambda s: s.create("x", b""), lambda s: s.put(tmp_path / "x", "x"),
                lambda s: s.fetch("x", tmp_path / "y")):
        began = time.monotonic()
        with pytest.raises(UserError) as caught:
            act(Store(f"s3://{BUCKET}/x", deadline_s=600))
        assert time.monotonic() - began < 10
        assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
        assert f"s3://{BUCKET}/x" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.fault
@pytest.mark.parametrize("server", ["moto", "juicefs"])
def test_a_bucket_that_does_not_exist_and_missing_credentials_are_refused_at_once(
        request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    aws(monkeypatch, request.getfixturevalue(server))
    for act in (lambda s: s.list(), lambda s: s.size("x"), lambda s: s.read("x"), lambda s: s.write("x", b"")):
        with pytest.raises(UserError, match="NoSuchBucket.*Check the bucket's name"):
            act(Store("s3://no-such-bucket/x"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        Store(f"s3://{BUCKET}/x").list()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL"):
        Store(f"s3://{BUCKET}/x").list()


# ---- F33: the network


BROKEN = (1, 17 << 20)
FAULTS = {"503": {"kind": "503"}, "reset": {"kind": "reset"}, "half": {"kind": "half"},
          "slow": {"kind": "slow", "seconds": 0.3}, "lost": {"kind": "lost"},
          "garbage": {"kind": "garbage"}}


def one_in_three(number: int) -> bool:
    return random.Random(number).random() < 1 / 3  # a fixed period can meet the same step of every try


@pytest.mark.fault
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("server", ["moto", "juicefs"])
def test_f33_a_third_of_all_requests_broken_and_the_same_bytes_all_the_same(
        request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str,
        kind: str) -> None:
    fault = Fault(**FAULTS[kind], hits=one_in_three)
    with proxy(request.getfixturevalue(server), fault) as url:
        aws(monkeypatch, url)
        store, expected = Store(f"s3://{BUCKET}/f33-{kind}", deadline_s=120), {}
        for size in BROKEN:
            name, local = f"{size:08d}", tmp_path / "local"
            expected[f"w{name}"] = expected[f"p{name}"] = content(size)
            store.write(f"w{name}", content(size))
            local.write_bytes(content(size))
            store.put(local, f"p{name}")
            assert store.create(f"c{name}", content(size))
            assert not store.create(f"c{name}", content(size) + b"x")
            expected[f"c{name}"] = content(size)
        assert store.list() == sorted((name, len(own)) for name, own in expected.items())  # none twice, none short
        for name, own in expected.items():
            assert store.read(name) == own
            assert store.size(name) == len(own)
            store.fetch(name, tmp_path / "fetched")
            assert (tmp_path / "fetched").read_bytes() == own
            with store.open(name) as file:
                assert file.read() == own
    assert fault.done > 15


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["503", "reset", "half", "slow", "garbage"])
def test_f33_a_web_folder_through_the_same_faults(
        web: tuple[Store, Path], tmp_path: Path, kind: str) -> None:
    store, folder = web
    (folder / "sub").mkdir()
    for size in BROKEN:
        (folder / "sub" / f"{size}").write_bytes(content(size))
    fault = Fault(**FAULTS[kind], hits=one_in_three)
    with proxy(store.location.removesuffix("/data"), fault) as url:
        broken = Store(f"{url}/data", deadline_s=120)
        assert broken.list() == sorted((f"sub/{size}", -1) for size in BROKEN)
        for size in BROKEN:
            assert broken.read(f"sub/{size}") == content(size)
            assert broken.size(f"sub/{size}") == size
            broken.fetch(f"sub/{size}", tmp_path / "fetched")
            assert (tmp_path / "fetched").read_bytes() == content(size)
            with broken.open(f"sub/{size}") as file:
                assert file.read() == content(size)
    assert fault.done > 5


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["503", "reset", "half", "silent"])
def test_f33_the_deadline_holds_and_the_fault_says_what_how_long_and_why(
        moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture,
        kind: str) -> None:
    aws(monkeypatch, moto)
    Store(f"s3://{BUCKET}/deadline").write("x", content(9 << 20))
    (tmp_path / "x").write_bytes(content(17 << 20))
    fault = Fault(kind, seconds=30, only=lambda method, path: kind != "half" or method == "GET")
    with proxy(moto, fault) as url:
        aws(monkeypatch, url)
        store = Store(f"s3://{BUCKET}/deadline", deadline_s=2)
        reading = [lambda: store.read("x"), store.list, lambda: store.fetch("x", tmp_path / "fetched")]
        others = [lambda: store.size("x"), lambda: store.write("y", content(17 << 20)),
                  lambda: store.create("z", b""), lambda: store.put(tmp_path / "x", "x")]
        for act in reading if kind == "half" else reading + others:
            began = time.monotonic()
            with pytest.raises(EnvironmentFault) as caught:
                act()
            assert time.monotonic() - began < 5
            said = str(caught.value)
            assert f"s3://{BUCKET}/deadline/" in said
            assert "could not be " in said
            assert " s, " in said
            assert " tries; the last: " in said
            assert "data.deadline_s" in said
            assert "\n" not in said
            assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # not gone, as it did not arrive; no half of another


@pytest.mark.fault
def test_f33_a_server_that_says_nothing_for_a_while_is_given_up_and_asked_again(
        moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradine.stages.remote

    monkeypatch.setattr(gradine.stages.remote, "SILENCE_S", 1.0)
    aws(monkeypatch, moto)
    Store(f"s3://{BUCKET}/silent").write("x", content(1000))
    with proxy(moto, fault := Fault("silent", hits=lambda number: number <= 2, seconds=60)) as url:
        aws(monkeypatch, url)
        began = time.monotonic()
        assert Store(f"s3://{BUCKET}/silent", deadline_s=60).read("x") == content(1000)
        assert time.monotonic() - began < 15
    assert fault.done == 2


@pytest.mark.fault
def test_f33_a_create_whose_answer_was_lost_is_still_ours_and_anothers_is_not(
        moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, moto)
    direct = Store(f"s3://{BUCKET}/lost", deadline_s=60)
    lost = Fault("lost", only=lambda method, path: method == "PUT", hits=lambda number: number == 1)
    with proxy(moto, lost) as url:
        aws(monkeypatch, url)
        assert Store(direct.location, deadline_s=60).create("x", b"mine")
    assert lost.done == 1
    assert len(lost.requests) == 2
    taken = Fault("reset", only=lambda method, path: method == "PUT", hits=lambda number: number % 2 == 1)
    with proxy(moto, taken) as url:
        aws(monkeypatch, url)
        store = Store(direct.location, deadline_s=60)
        monkeypatch.setattr(Store, "size", lambda self, name: None)
        assert not store.create("x", b"not mine")
        assert not store.create("x", b"mine")
    aws(monkeypatch, moto)
    assert direct.read("x") == b"mine"


@pytest.mark.fault
def test_f33_a_retry_is_logged_with_its_reason(
        moto: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    aws(monkeypatch, moto)
    Store(f"s3://{BUCKET}/logged").write("x", content(1000))
    with (proxy(moto, Fault("half", hits=lambda number: number == 1)) as url,
          caplog.at_level(logging.WARNING, "gradine.stages.store")):
        aws(monkeypatch, url)
        assert Store(f"s3://{BUCKET}/logged", deadline_s=60).read("x") == content(1000)
    assert f"s3://{BUCKET}/logged/x not read yet (" in caplog.text
    assert ": again in " in caplog.text


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_f33_after_a_fork_the_child_connects_anew(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, moto)
    store = Store(f"s3://{BUCKET}/fork", deadline_s=20)
    store.write("x", b"parent")
    child = os.fork()
    if not child:
        try:
            store.write("x", store.read("x") + b" and child")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("x") == b"parent and child"


def test_a_link_back_up_is_not_followed_and_one_to_another_folder_is(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"1")
    (tmp_path / "else" / "2.png").write_bytes(b"22")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "other").symlink_to(tmp_path / "else")
    assert Store(str(tmp_path / "set")).list() == [("a/1.png", 1), ("other/2.png", 2)]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("broken"):
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="Input/output error"):
        Store(str(tmp_path)).list()


def test_a_closed_store_tries_no_more() -> None:
    store = Store("http://127.0.0.1:1/set", 60.0)
    store.closed = True
    with pytest.raises(EnvironmentFault, match="its reader was closed"):
        store.read("a")
