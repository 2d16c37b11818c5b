"""What must not be trusted is not: flipped, cut and forged checkpoints, lying clocks and links, pickles."""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradine.configs.schema import EnvironmentFault, UserError, from_dict
from gradine.pipeline.plan import make_plan
from gradine.stages import checkpoint, commits, growth
from gradine.stages.commits import Damaged, Term
from gradine.stages.generate import load_average
from gradine.stages.loop import initial_state
from gradine.stages.step import Rules, Share, TrainState, train_step
from tests import unpickling

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FILES = ("generator.safetensors", "discriminator.safetensors", "average.safetensors", "optimizers.safetensors",
         "state.json")
ALL_FILES = (*FILES, "MANIFEST.json")
FLIPS = 200
RUN = from_dict({"name": "t", "data": {"source": "none", "shards": "none"},
                 "network": {"latent_size": 8, "fmap_base": 32, "fmap_max": 4},
                 "training": {"average_half_life": 50},
                 "stages": [{"resolution": size, "fade_images": 80, "hold_images": 80, "batch_size": 8}
                            for size in (4, 8, 16)]})


def trained(steps: int) -> TrainState:
    """So many steps into the stage of 8 px, from 80 images on."""
    state = initial_state(RUN, 1, None, CPU, None)
    source = torch.Generator().manual_seed(5)
    for _ in range(steps):
        share = Share(torch.randint(0, 256, (8, 3, 8, 8), generator=source, dtype=torch.uint8), torch.rand(8) < 2,
                      torch.randn(8, 8, generator=source), torch.randn(8, 8, generator=source),
                      torch.rand(8, generator=source))
        train_step(state, [share], growth.at(growth.schedule(RUN), state.images_seen), Rules.of(RUN, 8, 1))
    return state


INFO = {"resolution": 8, "phase": "fade", "stage_end": False, "workers": 1, "skipped": []}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two real checkpoints of term 1, at 88 and 96 images."""
    folder = tmp_path_factory.mktemp("originals")
    term = commits.begin_term(folder, None)
    for steps in (1, 2):
        checkpoint.save(folder, trained(steps), INFO, term)
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "checkpoints"))


def newest(folder: Path) -> tuple[Path, list[str]]:
    """The path of the newest valid checkpoint, and a line for each that was passed over."""
    found, passed = commits.find(folder)
    chosen, damaged = commits.newest_valid(found)
    assert chosen
    return Path(chosen[0].path), passed + damaged


def ends(folder: Path) -> tuple[Path, Path]:
    older, newer = sorted(folder.glob("r*"))
    return older, newer


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 1000
    return text


@contextlib.contextmanager
def no_waiting(seconds: int = 10) -> Iterator[None]:
    """A test that waits for a pipe ends."""
    def late(*_: object) -> None:
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- F03: flipped bits


def flips_of(content: bytes, count: int = FLIPS) -> list[tuple[int, int]]:
    """(offset, bit): a third each in the first and the last 64 bytes, the rest anywhere; none twice."""
    source = random.Random(len(content))
    spans = ((0, min(64, len(content))), (max(0, len(content) - 64), len(content)), (0, len(content)))
    chosen: dict[tuple[int, int], None] = {}
    while len(chosen) < min(count, 8 * len(content)):
        first, last = spans[len(chosen) % 3]
        chosen[source.randrange(first, last), source.randrange(8)] = None
    return list(chosen)


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


@pytest.mark.fault
@pytest.mark.parametrize("name", ALL_FILES)
def test_f03_each_flipped_bit_of_a_file_is_refused_by_its_name_and_the_previous_checkpoint_taken(
        name: str, folder: Path) -> None:
    """one bit flipped, 200 times in each file of a checkpoint: header, middle and tail"""
    older, newer = ends(folder)
    content = (newer / name).read_bytes()
    flips = flips_of(content)
    for at, bit in flips:
        (newer / name).write_bytes(flipped(content, at, bit))
        with pytest.raises(Damaged) as caught:
            commits.read(newer)
        assert one_line(caught.value).startswith(f"{newer}/{name} "), (at, bit)
        path, passed = newest(folder)
        assert path == older, (at, bit)
        assert [line.startswith(f"{newer}/{name} ") for line in passed] == [True]
    (newer / name).write_bytes(content)
    assert newest(folder) == (newer, [])
    print(f"F03: {len(flips)} flips of {name}, {len(content)} bytes, all refused")
    assert len(flips) == FLIPS


@pytest.mark.fault
def test_f03_each_flipped_bit_of_a_term_file_is_seen_and_no_wrong_start_is_believed(folder: Path) -> None:
    """one bit flipped, 200 times in the file of a term"""
    second = commits.begin_term(folder, commits.find(folder)[0][0])
    path = folder / "term-000002.json"
    content = path.read_bytes()
    for at, bit in flips_of(content):
        path.write_bytes(flipped(content, at, bit))
        assert commits.read_term(folder, 2) is None, (at, bit)
        assert commits.terms(folder) == {1: 0}
        with pytest.raises(commits.Fenced, match="term 2 .its file is damaged. has gone on"):
            commits.refuse_if_fenced(folder, Term(1))
    path.write_bytes(content)
    assert commits.terms(folder) == second.starts == {1: 0, 2: 88}
    print(f"F03: {FLIPS} flips of a term file, all refused")


@pytest.mark.fault
def test_f03_each_flipped_bit_of_a_first_release_manifest_is_refused_or_changes_nothing_that_is_used(
        tmp_path: Path) -> None:
    """one bit flipped, every bit of the manifest of a checkpoint of schema 1, which has no digest of its own"""
    path = Path(shutil.copytree(ROOT / "tests/releases/schema1/checkpoints/r0004-hold-000000080", tmp_path / "r0004"))
    content, files, about = (path / "MANIFEST.json").read_bytes(), commits.read(path), commits.describe(path)
    refused = 0
    for at in range(len(content)):
        for bit in range(8):
            (path / "MANIFEST.json").write_bytes(flipped(content, at, bit))
            try:
                assert commits.read(path) == files
                assert commits.describe(path) == about
            except Damaged as error:
                refused += str(path) in one_line(error)
    print(f"F03: {8 * len(content)} flips of a manifest of schema 1, {refused} refused")
    assert refused > 0.75 * 8 * len(content)


# ---- F04: cut, emptied, exchanged files


def lengths_of(size: int) -> list[int]:
    return sorted({0, 1, 7, 8, 9, size // 4, size // 2, size - 512, size - 8, size - 1} & set(range(size)))


@pytest.mark.fault
@pytest.mark.parametrize("name", ALL_FILES)
def test_f04_a_file_cut_at_any_length_holed_or_longer_is_refused_by_its_name(name: str, folder: Path) -> None:
    """truncation at ten lengths, holes of zeros at eight places, bytes added"""
    older, newer = ends(folder)
    content = (newer / name).read_bytes()
    size, hole = len(content), len(content) // 8
    spoiled = [content[:length] for length in lengths_of(size)]
    spoiled += [content[:at] + bytes(min(hole, size - at)) + content[at + hole:] for at in range(0, size, hole)]
    spoiled += [content + b"\0", content + b"\n", content + content]
    for number, bad in enumerate(spoiled):
        assert bad != content
        (newer / name).write_bytes(bad)
        with pytest.raises(Damaged) as caught:
            commits.read(newer)
        assert one_line(caught.value).startswith(f"{newer}/{name} "), number
        path, passed = newest(folder)
        assert (path, len(passed)) == (older, 1), number
    print(f"F04: {len(spoiled)} cuts and holes of {name}, all refused")


def replaced(kind: str, file: Path) -> None:
    """Puts something else in the place of a file."""
    elsewhere = file.parents[2] / "elsewhere"
    file.rename(elsewhere)
    if kind == "folder":
        file.mkdir()
    elif kind == "link to the same bytes":
        file.symlink_to(elsewhere)
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "link to a device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        import socket
        with socket.socket(socket.AF_UNIX) as there:
            os.chdir(file.parent)
            there.bind(file.name)
    elif kind == "other case":
        elsewhere.rename(file.with_name(file.name.replace(".", ".X").upper()))


@pytest.mark.fault
@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize("kind", ["gone", "folder", "link to the same bytes", "dangling link", "link to a device",
                                  "pipe", "socket", "other case"])
def test_f04_what_stands_in_the_place_of_a_file_is_refused_by_its_name_and_never_waited_for(
        kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a file missing, or a folder, link, pipe, socket or other name in its place"""
    monkeypatch.chdir(folder)
    older, newer = ends(folder)
    replaced(kind, newer / name)
    with no_waiting():
        with pytest.raises(Damaged) as caught:
            commits.read(newer)
        if kind != "other case":  # there two things are wrong
            assert one_line(caught.value).startswith(f"{newer}/{name} ")
        path, passed = newest(folder)
    assert (path, len(passed)) == (older, 1)


@pytest.mark.fault
@pytest.mark.parametrize("extra", ["pytorch_model.bin", "Generator.safetensors", "gene\u0301rator.safetensors",
                                   "state.json ", "a\nb", b"\xff\xfe", "folder/", ".hidden", "x" * 255])
def test_f04_an_extra_file_is_refused_by_name_in_one_line(extra: str | bytes, folder: Path) -> None:
    """an extra file, with names of other case, combining marks, line ends and no UTF-8"""
    older, newer = ends(folder)
    if extra == "folder/":
        (newer / "folder").mkdir()
    else:
        (newer / os.fsdecode(extra)).write_bytes(b"")
    with pytest.raises(Damaged, match="is not in the manifest") as caught:
        commits.read(newer)
    one_line(caught.value).encode()
    assert newest(folder)[0] == older


@contextlib.contextmanager
def nobody(originals: Path) -> Iterator[Path]:
    """A copy of a folder, where what one has no right to read cannot be read once `become_nobody` was called."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(originals, Path(place, "checkpoints"))
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755)
        user = os.geteuid()
        try:
            yield Path(place, "checkpoints")
        finally:
            os.seteuid(user)


def become_nobody() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.fault
@pytest.mark.parametrize("name", ALL_FILES)
def test_f04_a_file_that_may_not_be_read_stops_the_reader_and_never_passes_for_damaged(
        name: str, originals: Path) -> None:
    """a file of a checkpoint without the right to read it: with the right it is whole, so nothing may go behind it"""
    with nobody(originals) as folder:
        _, newer = ends(folder)
        (newer / name).chmod(0)
        become_nobody()
        for look in (lambda: commits.read(newer), lambda: newest(folder), lambda: commits.retire(folder, 1, 10**9)):
            with pytest.raises(EnvironmentFault, match="cannot be read: Permission denied.* nothing was") as caught:
                look()
            assert one_line(caught.value).startswith(f"{newer}/{name} ")
        assert len(ends(folder)) == 2


@pytest.mark.fault
def test_f04_a_user_who_may_read_no_file_begins_no_term_and_ends_no_checkpoint(originals: Path) -> None:
    """another user's run, all files 0600; then only the term files; then folders that may not be searched"""
    with nobody(originals) as folder:
        user, before = os.geteuid(), counting(folder)
        term_file, folders = folder / "term-000001.json", [path for path in folder.iterdir() if path.is_dir()]
        for closed, mode in ((folder.rglob("*.*"), 0o600), ([term_file], 0o600), (folders, 0o644), ([folder], 0o644)):
            there = {path: path.stat().st_mode for path in closed if path.is_file() or mode == 0o644}
            for path in there:
                path.chmod(mode)
            become_nobody()
            for look in (commits.find, commits.newest_term, lambda place: commits.begin_term(place, None)):
                with pytest.raises(EnvironmentFault, match="cannot be read: Permission denied"):
                    look(folder)
            os.seteuid(user)
            for path, was in there.items():
                path.chmod(was)
        assert counting(folder) == before
        assert [path.name for path in folder.glob("term-*")] == ["term-000001.json"]


@pytest.mark.fault
@pytest.mark.parametrize(("error", "times", "outcome"), [
    (errno.EIO, 1, None), (errno.EIO, 2, Damaged), (errno.ESTALE, 1, None), (errno.ESTALE, 2, EnvironmentFault),
    *[(number, 1, EnvironmentFault) for number in (errno.EPERM, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM)],
    *[(number, 1, Damaged) for number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)]])
@pytest.mark.parametrize("name", ["average.safetensors", "term-000001.json"])
def test_f06_only_an_error_of_the_file_itself_makes_it_damaged_and_a_passing_one_is_read_over(
        name: str, error: int, times: int, outcome: type[Exception] | None, folder: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """one file's bytes answered by each error, once or twice in a row"""
    _, newer = ends(folder)
    errors, read_bytes, whole = [error] * times, Path.read_bytes, commits.read(newer)

    def failing(path: Path) -> bytes:
        if path.name == name and errors:
            raise OSError(number := errors.pop(), os.strerror(number))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    if name.startswith("term") and outcome in (None, Damaged):
        assert (commits.read_term(folder, 1) is None) == (outcome is Damaged)
    elif outcome:
        with pytest.raises(outcome) as caught:
            commits.read_term(folder, 1) if name.startswith("term") else commits.read(newer)
        assert f"/{name} " in one_line(caught.value)
    else:
        assert commits.read(newer) == whole
    assert errors == []


@pytest.mark.fault
def test_f08_a_later_term_whose_file_may_not_be_read_fences_all_the_same(originals: Path) -> None:
    """the file of another user's later term without the right to read it"""
    with nobody(originals) as folder:
        commits.begin_term(folder, None)
        (folder / "term-000002.json").chmod(0)
        become_nobody()
        with pytest.raises(commits.Fenced, match="term 2 .its file cannot be read. has gone on"):
            commits.refuse_if_fenced(folder, Term(1))


@pytest.mark.fault
def test_f09_a_run_whose_checkpoints_are_all_lost_is_not_begun_anew_unsaid(tmp_path: Path) -> None:
    """every checkpoint damaged; none there; all of them ended by a start from nothing; one left that is whole"""
    commits.refuse_all_lost([], [], tmp_path)
    first = commits.begin_term(tmp_path, None)
    paths = [put(tmp_path, images, first) for images in (100, 200, 300, 400, 500)]
    for path in paths[1:]:
        (path / "state.json").write_bytes(b"{")
    commits.refuse_all_lost(*commits.find(tmp_path), tmp_path)
    (paths[0] / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="holds 5 checkpoints, .*; and 2 more. .* move them out of that") as caught:
        commits.refuse_all_lost(*commits.find(tmp_path), tmp_path)
    assert [path.name in one_line(caught.value) for path in paths] == [True] * 3 + [False] * 2
    other = tmp_path / "other"
    whole = put(other, 100, commits.begin_term(other, None))
    commits.begin_term(other, None)
    found, passed = commits.find(other)
    assert (found, [whole.name in line for line in passed]) == ([], [True])
    commits.refuse_all_lost(found, passed, other)  # it was begun anew before


@pytest.mark.fault
@pytest.mark.parametrize("spoiled", [b"{", None])
def test_f09_what_a_term_skips_outlives_its_file_once_it_has_committed(spoiled: bytes | None, tmp_path: Path) -> None:
    """the file of the newest term damaged or lost, before and after the term's first checkpoint"""
    put(tmp_path, 100, commits.begin_term(tmp_path, None))
    second = commits.begin_term(tmp_path, at(tmp_path, 100, 1), ((120, 140),))
    assert commits.newest_term(tmp_path) == second
    file = tmp_path / "term-000002.json"
    file.unlink() if spoiled is None else file.write_bytes(spoiled)
    before = commits.newest_term(tmp_path)
    assert before
    assert (before.number, before.skipped) == (1, ())  # nothing else tells of it yet
    put(tmp_path, 200, second, skipped=[[120, 140]])
    known = commits.newest_term(tmp_path)
    assert known
    assert (known.number, known.starts, known.skipped) == (2, {1: 0, 2: 100}, ((120, 140),))


@pytest.mark.fault
def test_f04_a_folder_that_cannot_be_listed_never_passes_for_an_empty_one(originals: Path, tmp_path: Path) -> None:
    """the folder of all checkpoints without the right to list it, as a plain file, as a dangling link"""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    for place in (tmp_path / "file", tmp_path / "link"):
        with pytest.raises(EnvironmentFault) as caught:
            commits.find(place)
        assert one_line(caught.value).startswith(f"{place} ")
    assert commits.find(tmp_path / "nowhere") == ([], [])
    with nobody(originals) as folder:
        folder.chmod(0)
        become_nobody()
        with pytest.raises(EnvironmentFault, match="cannot be listed: Permission denied"):
            commits.find(folder)


# ---- F09: clocks, times, links; which of several counts


def put(folder: Path, images: int, term: Term | None = None, stage_end: bool = False, resolution: int = 8,
        skipped: list[list[int]] | None = None) -> Path:
    """A checkpoint of a few bytes."""
    info = {"schema": 2, "resolution": resolution, "phase": "hold", "images_seen": images, "stage_end": stage_end,
            "masked": [0, 0], "skipped": skipped or [], "data": f"{term.number if term else 0}"}
    files = [(name, b"") for name in FILES[:4]] + [("state.json", json.dumps(info).encode())]
    return Path(commits.commit(folder, f"r{resolution:04d}-hold-{images:09d}", files, term))


def late(folder: Path, images: int, term: Term, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit whose holder looked for later terms just before one began."""
    with monkeypatch.context() as patch:
        patch.setattr(commits, "refuse_if_fenced", lambda *_: None)
        return put(folder, images, term)


def counting(folder: Path) -> list[tuple[int, int]]:
    return [(one.images_seen, one.term) for one in commits.find(folder)[0]]


def at(folder: Path, images: int, term: int) -> commits.Checkpoint:
    return next(one for one in commits.find(folder)[0] if (one.images_seen, one.term) == (images, term))


@pytest.mark.fault
def test_f09_what_an_older_term_commits_late_never_counts_whatever_is_deleted_or_damaged_then(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a holder of term 1 that wakes after term 2 went on from before it; then term files deleted and damaged"""
    first = commits.begin_term(tmp_path, None)
    for images in (100, 200, 300):
        put(tmp_path, images, first)
    second = commits.begin_term(tmp_path, at(tmp_path, 200, 1))
    assert counting(tmp_path) == [(100, 1), (200, 1)]  # from the moment the term has begun
    put(tmp_path, 250, second)
    with pytest.raises(commits.Fenced):
        put(tmp_path, 400, first)
    woken, same = late(tmp_path, 400, first, monkeypatch), late(tmp_path, 250, first, monkeypatch)
    assert same.name == "r0008-hold-000000250-t1"
    wanted = [(100, 1), (200, 1), (250, 2)]
    assert counting(tmp_path) == wanted
    passed = commits.find(tmp_path)[1]
    assert f"{woken.name} is of term 1, and term 2 went on from 200 images" in passed
    assert len(passed) == 3
    file = tmp_path / "term-000002.json"
    content = file.read_bytes()
    for spoiled in (b"", content[:-40], flipped(content, 20, 0), None):
        file.unlink() if spoiled is None else file.write_bytes(spoiled)
        assert counting(tmp_path) == wanted  # the manifest at 250 repeats it
    third = commits.begin_term(tmp_path, at(tmp_path, 250, 2))
    assert third.number == 3  # never the number of a lost one again
    assert third.starts == {1: 0, 2: 200, 3: 250}
    shutil.rmtree(at(tmp_path, 250, 2).path)
    assert counting(tmp_path) == wanted[:2]
    put(tmp_path, 300, third)
    assert counting(tmp_path) == [*wanted[:2], (300, 3)]
    assert sorted(p.name for p in tmp_path.glob("r*300*")) == ["r0008-hold-000000300", "r0008-hold-000000300-t3"]


@pytest.mark.fault
def test_f09_a_damaged_checkpoint_that_is_whole_again_does_not_come_back_once_a_term_went_behind_it(
        tmp_path: Path) -> None:
    """a bit flipped in the newest checkpoint and flipped back after the run has gone on from the one before"""
    first = commits.begin_term(tmp_path, None)
    put(tmp_path, 100, first)
    state = put(tmp_path, 200, first) / "state.json"
    content = state.read_bytes()
    state.write_bytes(flipped(content, 30, 1))
    assert counting(tmp_path) == [(100, 1)]
    state.write_bytes(content)
    assert counting(tmp_path) == [(100, 1), (200, 1)]
    state.write_bytes(flipped(content, 30, 1))
    second = commits.begin_term(tmp_path, at(tmp_path, 100, 1))
    state.write_bytes(content)
    assert counting(tmp_path) == [(100, 1)]
    put(tmp_path, 200, second)
    assert counting(tmp_path) == [(100, 1), (200, 2)]
    assert (tmp_path / "r0008-hold-000000200").is_dir()  # and nothing was deleted for it


@pytest.mark.fault
def test_f09_a_run_that_starts_over_or_branches_leaves_all_later_ones_behind(tmp_path: Path) -> None:
    """a branch back at the end of an earlier stage, then a start from nothing"""
    first = commits.begin_term(tmp_path, None)
    put(tmp_path, 80, first, stage_end=True, resolution=4)
    for images in (160, 240):
        put(tmp_path, images, first)
    branch = commits.begin_term(tmp_path, at(tmp_path, 80, 1))
    put(tmp_path, 120, branch)
    assert counting(tmp_path) == [(80, 1), (120, 2)]
    commits.begin_term(tmp_path, None)
    assert counting(tmp_path) == []
    assert len(commits.find(tmp_path)[1]) == 4


@pytest.mark.fault
def test_f09_times_of_files_links_and_foreign_folders_do_not_matter(folder: Path) -> None:
    """mtimes scrambled, `latest` links dangling and to invalid folders, foreign folders and files"""
    older, newer = ends(folder)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (0, 10**9 - 10**6 * number))
    os.utime(newer, (0, 0))
    os.utime(older, (0, 4 * 10**9))
    (folder / "latest").symlink_to("nowhere")
    (folder / "newest").symlink_to(older)
    (folder / "r9999-hold-999999999").symlink_to(older)
    (folder / "r9998-hold-999999998").symlink_to("nowhere")
    (folder / "r9997-hold-999999997").write_bytes(b"a file")
    (folder / "r9996-hold-999999996").mkdir()
    (folder / "r99\n96").mkdir()
    (folder / "notes").mkdir()
    (folder / f".partial-{newer.name}-1-1").mkdir()
    shutil.copytree(newer, folder / "copy of r0008")
    (folder / "term-00000x.json").write_bytes(b"")
    (folder / "term-\u0663\u0663\u0663\u0663\u0663\u0663.json").write_bytes(b"")  # digits to \d and to int()
    path, passed = newest(folder)
    assert path == newer
    assert [line.rpartition("/r99")[2][:2] for line in passed] == ["96", "97", "98", "99"]  # each a line
    assert counting(folder) == [(88, 1), (96, 1)]
    assert commits.begin_term(folder, None).number == 2


@pytest.mark.fault
def test_f09_a_clock_that_is_a_day_behind_changes_no_choice(tmp_path: Path) -> None:
    """term 2 runs with the wall clock a day before term 1's (faketime)"""
    if not shutil.which("faketime"):
        pytest.skip("faketime is not installed")
    first = commits.begin_term(tmp_path, None)
    for images in (100, 200):
        put(tmp_path, images, first)
    script = (f"from gradine.stages import commits as c; l = {str(tmp_path)!r}; found, _ = c.find(l)\n"
              "term = c.begin_term(l, found[-1]); info = c.read(found[-1].path)\n"
              "import json; s = json.loads(info['state.json']) | {'images_seen': 240}\n"
              "info['state.json'] = json.dumps(s).encode()\n"
              "c.commit(l, 'r0008-hold-000000240', info.items(), term)")
    subprocess.run(["faketime", "-f", "-1d", sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)
    created = [json.loads((path / "MANIFEST.json").read_text())["created"] for path in sorted(tmp_path.glob("r*"))]
    assert created[2] < created[0] - 80_000
    assert counting(tmp_path) == [(100, 1), (200, 1), (240, 2)]
    assert newest(tmp_path)[0].name == "r0008-hold-000000240"
    assert make_plan(RUN, commits.find(tmp_path)[0]).start.images_seen == 240  # type: ignore[union-attr]


OPERATIONS = st.lists(st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 9)), st.tuples(st.just("commit"), st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.just("harm"), st.integers(0, 9)), st.tuples(st.just("lose"), st.integers(0, 9)),
    st.tuples(st.just("age"), st.integers(0, 9))), min_size=3, max_size=14)


@pytest.mark.fault
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
def test_f09_over_random_histories_what_counts_is_what_a_plain_model_says(operations: list[tuple[Any, ...]]) -> None:
    """120 random histories of terms, late commits, damage that comes and goes, lost term files, scrambled times"""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(commits, "refuse_if_fenced", lambda *_: None)
        folder = Path(place)
        terms = [commits.begin_term(folder, None)]
        starts, made, harmed, lost = {1: 0}, [], set(), set()  # the model: made is (path, images, number of its term)

        def knows() -> set[int]:
            """Terms of which something readable is left: their file, a later one's, or a manifest of those."""
            left = {n for n in starts if n not in lost} | {n for path, _, n in made if path not in harmed}
            return {n for n in starts if any(n <= other for other in left)}

        def model() -> list[tuple[int, int]]:
            known = knows()
            return sorted((images, n) for path, images, n in made if path not in harmed and
                          not any(later > n and starts[later] < images for later in known))

        for operation, chosen, *more in operations:
            if operation == "begin":
                there = commits.find(folder)[0]
                start = there[chosen % len(there)] if there else None
                known = knows()
                terms.append(commits.begin_term(folder, start))
                number = terms[-1].number
                assert number not in starts or number not in known
                starts = {n: seen for n, seen in starts.items() if n in known and n != number}  # forgotten for good
                starts[number] = start.images_seen if start else 0
                lost.discard(number)
            elif operation == "commit":
                term = terms[chosen % len(terms)]
                if term.number in starts and starts[term.number] == term.starts[term.number]:
                    images = term.starts[term.number] + 10 * more[0]
                    made.append((put(folder, images, term), images, term.number))
            elif operation == "harm" and made:
                path = made[chosen % len(made)][0]
                state = path / "state.json"
                state.write_bytes(flipped(state.read_bytes(), 9, 2))
                harmed ^= {path}
            elif operation == "lose":
                number = chosen % len(terms) + 1
                (folder / f"term-{number:06d}.json").unlink(missing_ok=True)
                lost |= {number}
            elif operation == "age" and made:
                os.utime(made[chosen % len(made)][0], (0, 10**9))
            assert counting(folder) == model()


# ---- F10: hostile checkpoints, whose manifests are right


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def entry_of(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sealed(body: dict[str, Any]) -> bytes:
    """As whoever knows the format writes it: his own words, not the product's function."""
    text = json.dumps(body, indent=1)
    return (text[:-2] + ',\n "sha256": "' + hashlib.sha256(text.encode()).hexdigest() + '"\n}').encode()


def forge(path: Path, files: dict[str, bytes], /, **changes: Any) -> None:
    """Writes files, and a manifest that vouches for them as they are."""
    body = {"schema": 2, "name": path.name, "term": 1, "parent": None, "terms": {"1": 0}, "created": 0.0}
    listing = {name: entry_of((path / name).read_bytes()) for name in FILES if name not in files}
    for name, content in files.items():
        (path / name).write_bytes(content)
        listing[name] = entry_of(content)
    (path / "MANIFEST.json").write_bytes(sealed({**body, "files": listing, **changes}))


def everything_with(path: Path, state: TrainState, grown: TrainState) -> Counter[str]:
    """All that the product does with a checkpoint. -> what came of each; any other error than a refusal is raised."""
    outcomes: Counter[str] = Counter()

    def tried(what: str, ask: Callable[[], Any]) -> Any:
        try:
            answer = ask()
        except (Damaged, UserError) as error:
            one_line(error)
            outcomes[f"{what} {type(error).__name__}"] += 1
            return None
        outcomes[f"{what} done"] += 1
        return answer

    tried("describe", lambda: commits.describe(path))
    if found := tried("find", lambda: commits.find(path.parent)):
        tried("plan", lambda: make_plan(RUN, found[0]))
    if files := tried("read", lambda: commits.read(path)):
        tried("restore", lambda: checkpoint.restore(state, files))
        tried("grow", lambda: checkpoint.grow(grown, files))
        tried("refuse_other_channels", lambda: checkpoint.refuse_other_channels(RUN, files))
        tried("load_average", lambda: load_average(RUN, files))
    return outcomes


@pytest.fixture(scope="module")
def states() -> tuple[TrainState, TrainState]:
    return initial_state(RUN, 1, None, CPU, None), initial_state(RUN, 2, None, CPU, None)


def tensor_file(**tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save(tensors)


def header_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"blocks.4.conv.bias": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


WEIGHTS = {
    "empty": b"", "no tensors": tensor_file(), "a short header": b"\1\2", "a header of no JSON": header_file(b"{"),
    "a header that is a list": header_file([]), "a header that is null": header_file(None),
    "a header of 1 GB": header_file({}, length=1 << 30), "a header of 16 EB": header_file({}, length=(1 << 64) - 1),
    "a deep header": header_file(b"[" * 100_000), "a deep tensor": header_file(b'{"a":' * 100_000),
    "a huge shape": header_file(one(shape=[1 << 40, 1 << 40]), bytes(4)),
    "a shape of no bytes": header_file(one(shape=[0, 1 << 62], offsets=[0, 0])),
    "a negative shape": header_file(one(shape=[-1, -1]), bytes(4)),
    "a shape of fractions": header_file(one(shape=[1.5]), bytes(4)),
    "overlapping tensors": header_file({"a": one()["blocks.4.conv.bias"], "b": one()["blocks.4.conv.bias"]}, bytes(4)),
    "an offset beyond the end": header_file(one(offsets=[0, 1 << 40]), bytes(4)),
    "an offset backwards": header_file(one(offsets=[4, 0]), bytes(4)),
    "an unknown kind": header_file(one(dtype="PY_OBJECT"), bytes(4)),
    "a kind of half a byte": header_file(one(dtype="F4", shape=[8]), bytes(4)),
    "bytes of float8": header_file(one(dtype="F8_E5M2", shape=[4]), bytes(4)),
    "booleans": header_file(one(dtype="BOOL", shape=[4]), bytes(4)),
    "another tensor": tensor_file(weight=torch.zeros(3)), "a name of two lines": tensor_file(**{"a\nb": torch.ones(2)}),
    "a long name": tensor_file(**{"x" * 5000: torch.full((2,), torch.nan)}),
    "NaN": tensor_file(weight=torch.tensor([torch.nan])), "infinity": tensor_file(weight=torch.tensor([-torch.inf])),
    "NumPy's pickle": b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40), "zip": b"PK\3\4" + bytes(60),
}
VALUES = (None, True, -1, 0, 3, 1 << 53, 10**400, 1e999, float("nan"), 1.5, "", "../x", "x" * 5000, "a\nb", [], [[]],
          [1], [1, 2, 3], [-1, 0], [1.0, 2.0], ["a", "b"], [[1]], [[3, "a"]], {}, {"a": {}}, {"-1": 5}, {"1": -5})


@pytest.mark.fault
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", ALL_FILES)
def test_f10_a_pickle_in_any_file_never_runs(name: str, zipped: bool, folder: Path, tmp_path: Path,
                                             states: tuple[TrainState, TrainState]) -> None:
    """a pickle, and what torch.save makes of one, in every file, under a manifest that is right"""
    canary, (_, newer) = tmp_path / "canary", ends(folder)
    bomb = io.BytesIO()
    torch.save({"weight": Bomb(canary)}, bomb)
    content = bomb.getvalue() if zipped else pickle.dumps(Bomb(canary))
    if name == "MANIFEST.json":
        (newer / name).write_bytes(content)
    else:
        forge(newer, {name: content})
    outcomes = everything_with(newer, *states)
    assert not canary.exists()
    assert outcomes["restore done"] == 0
    if name not in FILES[3:]:  # growing needs no moments
        assert outcomes["grow done"] == 0
    if name in ("average.safetensors", "state.json", "MANIFEST.json"):
        assert outcomes["load_average done"] == 0
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()  # the bomb works


@pytest.mark.fault
@pytest.mark.parametrize("what", WEIGHTS)
def test_f10_weights_that_are_none_end_in_one_line(what: str, originals: Path, tmp_path: Path,
                                                   states: tuple[TrainState, TrainState]) -> None:
    """broken, lying and foreign safetensors in the place of each file of weights, under manifests that are right"""
    for name in FILES[:4]:
        _, newer = ends(Path(shutil.copytree(originals, tmp_path / name)))
        forge(newer, {name: WEIGHTS[what]})
        with no_waiting():
            outcomes = everything_with(newer, *states)
        if name != "optimizers.safetensors" or what != "no tensors":  # none is what a phase starts with
            assert outcomes["restore done"] == 0, name
        if name != "optimizers.safetensors":
            assert outcomes["grow done"] == 0, name
        if name == "average.safetensors":
            assert outcomes["load_average done"] == 0


def renamed(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {other + ("x" if other == name else ""): tensor for other, tensor in tensors.items()}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]]] = {
    "missing": lambda tensors, name: {n: t for n, t in tensors.items() if n != name},
    "renamed": renamed,
    "of another rank": lambda tensors, name: tensors | {name: tensors[name][None]},
    "of one number": lambda tensors, name: tensors | {name: torch.tensor(1.0)},
    "of no number": lambda tensors, name: tensors | {name: torch.zeros(0)},
    "double": lambda tensors, name: tensors | {name: tensors[name].double()},
    "half": lambda tensors, name: tensors | {name: tensors[name].half()},
    "whole numbers": lambda tensors, name: tensors | {name: tensors[name].int()},
    "complex": lambda tensors, name: tensors | {name: tensors[name].to(torch.complex64)},
    "NaN": lambda tensors, name: tensors | {name: torch.full_like(tensors[name], torch.nan)},
}


@pytest.mark.fault
@pytest.mark.parametrize("what", CHANGES)
def test_f10_tensors_of_other_names_shapes_or_kinds_are_refused_and_no_key_error(
        what: str, originals: Path, tmp_path: Path, states: tuple[TrainState, TrainState]) -> None:
    """each kind of file with one tensor or moment missing, renamed, of another shape or kind, or not finite"""
    for file, name in (("generator", "blocks.4.conv.weight"), ("discriminator", "blocks.8.conv0.weight"),
                       ("average", "blocks.4.dense.weight"), ("optimizers", "generator.blocks.4.conv.weight.exp_avg"),
                       ("optimizers", "discriminator.blocks.4.dense0.weight.step")):
        _, newer = ends(Path(shutil.copytree(originals, tmp_path / f"{file}-{name}")))
        tensors = safetensors.torch.load_file(newer / f"{file}.safetensors")
        if what == "of one number" and name.endswith("step"):
            continue  # that is what it is
        forge(newer, {f"{file}.safetensors": safetensors.torch.save(CHANGES[what](tensors, name))})
        outcomes = everything_with(newer, *states)
        assert outcomes["read done"] == 1
        assert outcomes["restore done"] == 0, name
        assert outcomes["grow done"] == (file == "optimizers"), name


@pytest.mark.fault
@pytest.mark.parametrize("key", ["schema", "resolution", "phase", "images_seen", "stage_end", "masked", "skipped"])
def test_f10_a_field_of_state_json_of_another_kind_is_refused_by_all_who_need_it(
        key: str, folder: Path, states: tuple[TrainState, TrainState]) -> None:
    """each field that is relied on set to each of 27 values of another kind, or missing, or twice"""
    _, newer = ends(folder)
    info = json.loads((newer / "state.json").read_text())
    usable = {"images_seen": (0, 3), "stage_end": (True,)}.get(key, ())  # right in kind
    for value in VALUES:
        for text in (json.dumps(info | {key: value}), json.dumps(info)[:-1] + f', "{key}": {json.dumps(value)}}}'):
            forge(newer, {"state.json": text.encode()})
            outcomes = everything_with(newer, *states)
            if value == [] and key == "skipped":
                continue
            if key == "schema" and not (type(value) in (int, bool) and value == 1):
                continue  # the manifest's is the one that is judged; what this one then says is checked all the same
            right = any(value is good for good in usable)
            assert outcomes["restore done"] == outcomes["load_average done"] == right, value
    del info[key]
    forge(newer, {"state.json": json.dumps(info).encode()})
    outcomes = everything_with(newer, *states)
    assert outcomes["restore done"] == outcomes["load_average done"] == outcomes["describe done"] == 0


@pytest.mark.fault
@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"7", b'"state"', b"{" * 400_000, b"[" * 900_000, b"\xff\xfe{",
                                  b"1" * 900_000, b'{"schema": 2}', b" " * (1 << 20) + b"{}", b'{"schema": 1e400}'])
def test_f10_json_that_is_none_is_refused_wherever_it_stands(text: bytes, folder: Path,
                                                             states: tuple[TrainState, TrainState]) -> None:
    """no JSON, deep JSON, numbers of a million digits and 1 MB of spaces as state.json, manifest and term file"""
    _, newer = ends(folder)
    forge(newer, {"state.json": text})
    outcomes = everything_with(newer, *states)
    assert outcomes["describe Damaged"] == 1
    assert outcomes["restore done"] == outcomes["grow done"] == outcomes["load_average done"] == 0
    (newer / "MANIFEST.json").write_bytes(text)
    assert everything_with(newer, *states) == Counter(["describe Damaged", "find done", "plan done", "read Damaged"])
    (folder / "term-000001.json").write_bytes(text)
    assert commits.read_term(folder, 1) is None
    known = commits.newest_term(folder)
    assert known == Term(1, {1: 0})  # as the whole older checkpoint tells it


@pytest.mark.fault
def test_f10_a_field_of_a_manifest_or_term_of_another_kind_is_refused(folder: Path) -> None:
    """each field of a manifest, of an entry in it and of a term file set to each of 27 values, all under a true seal"""
    _, newer = ends(folder)
    right = json.loads((newer / "MANIFEST.json").read_text())
    right.pop("sha256")
    term = json.loads((folder / "term-000001.json").read_text())
    term.pop("sha256")
    tried = 0
    for value in VALUES:
        spoiled = [right | {key: value} for key in ("schema", "term", "terms", "files")]
        spoiled += [right | {"files": right["files"] | {"state.json": right["files"]["state.json"] | {key: value}}}
                    for key in ("bytes", "sha256")]
        spoiled += [right | {"files": right["files"] | {name: value}} for name in FILES]
        for body in spoiled:
            (newer / "MANIFEST.json").write_bytes(sealed(body))
            usable = type(value) is int and value in (0, 3) and body["term"] is not right["term"]
            usable |= value == {} and body["terms"] is not right["terms"]
            if body["schema"] is not right["schema"] and value in (3, 1 << 53, 10**400) and type(value) is int:
                with pytest.raises(UserError, match="a newer gradine wrote it"):
                    commits.read(newer)
                with pytest.raises(UserError, match="a newer gradine wrote it"):
                    commits.find(folder)
            elif usable:
                commits.read(newer)
            else:
                for ask in (commits.read, commits.describe):
                    with pytest.raises(Damaged) as caught:
                        ask(newer)
                    assert one_line(caught.value).startswith(str(newer))
            tried += 1
        for key in ("number", "starts", "skipped"):
            (folder / "term-000001.json").write_bytes(sealed(term | {key: value}))
            found = commits.read_term(folder, 1)
            assert found is None or (key, value) in (("skipped", []), ("skipped", {}), ("starts", {}), ("number", True))
            tried += 1
    print(f"F10: {tried} fields of other kinds")


@pytest.mark.fault
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "a/../../secret", "state.json\0",
                                  "generator.safetensors/", "state.json/../../secret", "CON", "x" * 5000, "a\nb"])
@pytest.mark.parametrize("instead", [False, True], ids=["more", "instead"])
def test_f10_names_that_lead_out_of_a_checkpoint_are_refused_and_nothing_there_is_opened(
        name: str, instead: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """traversal, absolute, NUL and endless names in a manifest that is right, beside or instead of a true name"""
    _, newer = ends(folder)
    (folder / "secret").write_bytes(b"secret")
    body = json.loads((newer / "MANIFEST.json").read_text())
    body.pop("sha256")
    body["files"][name] = body["files"].pop("average.safetensors") if instead else entry_of(b"secret")
    (newer / "MANIFEST.json").write_bytes(sealed(body))
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    with pytest.raises(Damaged, match="lists other files than a checkpoint has") as caught:
        commits.read(newer)
    one_line(caught.value)
    assert opened == ["MANIFEST.json"]


MEMORY = """
import re, sys
from pathlib import Path
from gradine.stages import commits
from gradine.stages.loop import initial_state
from tests.test_faults_reading import CPU, RUN, everything_with
states = initial_state(RUN, 1, None, CPU, None), initial_state(RUN, 2, None, CPU, None)
def kb(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for path in map(Path, [sys.argv[1], *sys.argv[1:]]):  # the first one twice: to warm up
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kb("VmRSS")
    outcomes = dict(everything_with(path, *states))
    commits.newest_term(path.parent)
    print(kb("VmHWM") - before, path.parent.name, outcomes, sep="|")
"""


def sparse(path: Path, start: bytes, size: int) -> dict[str, Any]:
    """A file of `size` bytes that takes no room. -> its entry in a manifest; its digest is not come to."""
    path.write_bytes(start)
    os.truncate(path, size)
    return {"bytes": size, "sha256": "0" * 64}


@pytest.mark.fault
def test_f10_a_gigabyte_that_is_sent_along_is_not_read_into_memory(originals: Path, tmp_path: Path) -> None:
    """1 GB files (sparse), headers that claim 1 GB, 1 MB of nested JSON; the growth of a process's peak is measured"""
    size, state = 1 << 30, json.loads((ends(originals)[1] / "state.json").read_text())
    large = {"state.json": ("state.json", b"{"), "weights without a header": ("average.safetensors", b""),
             "weights behind a short header": ("average.safetensors", header_file(one())),
             "a header that claims all": ("average.safetensors", struct.pack("<Q", size - 8) + b'{"a"'),
             "moments of nested JSON": ("optimizers.safetensors", header_file(b"[" * 900_000))}
    small = {"a header of a MB": ("average.safetensors", header_file(b'{"a":[' + b"[]," * 300_000 + b"[]]}")),
             "a MB of tensors": ("generator.safetensors", header_file(
                 {f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(18_000)})),
             "a MB of ranges": ("state.json", json.dumps(state | {"skipped": [[7, 7]] * 100_000}).encode()),
             "a shape of 1 GB": ("average.safetensors", header_file(one(shape=[1 << 28], offsets=[0, size]), bytes(4)))}

    def copied(name: str) -> Path:
        return ends(Path(shutil.copytree(originals, tmp_path / name)))[1]

    paths = [copied("as it was")]
    for what, (name, content) in small.items():
        paths.append(copied(what))
        forge(paths[-1], {name: content})
    for what, (name, content) in large.items():
        paths.append(copied(what))
        listing = {other: entry_of((paths[-1] / other).read_bytes()) for other in FILES}
        forge(paths[-1], {}, files=listing | {name: sparse(paths[-1] / name, content, size)})
    paths += [copied("a manifest"), copied("a term file")]
    sparse(paths[-2] / "MANIFEST.json", b"{", size)
    sparse(paths[-1].parent / "term-000002.json", b"{", size)
    process = subprocess.run([sys.executable, "-c", MEMORY, *map(str, paths)], cwd=ROOT, timeout=120,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = [line.split("|") for line in process.stdout.splitlines()[1:]]
    grown = {what: int(kb) / 1e3 for kb, what, _ in lines}
    print(f"F10: growth of the peak in MB: {grown}")
    assert max(grown.values()) < 100
    assert [what for _, what, outcomes in lines if "load_average done" in outcomes and "restore done" in outcomes] == [
        "as it was", "a MB of ranges", "a term file"]


# ---- F10: anything at all


def mutated_json(body: Any, source: random.Random) -> bytes:
    """One to three leaves or branches exchanged, lost, doubled or added."""
    for _ in range(source.randint(1, 3)):
        where, path = body, []
        while isinstance(where, dict | list) and where and (not path or source.random() < 0.7):
            key = source.choice([*where]) if isinstance(where, dict) else source.randrange(len(where))
            path.append((where, key))
            where = where[key]
        if not path:
            return json.dumps(source.choice(VALUES)).encode()
        parent, key = path[-1]
        move = source.randrange(4)
        if move == 0:
            parent[key] = source.choice(VALUES)
        elif move == 1 and isinstance(parent, dict):
            parent[str(source.choice(VALUES))[:99]] = parent.pop(key)
        elif move == 2:
            del parent[key]
        elif isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += source.choice((-1, 1, 8, 1 << 20, 1 << 62))
        elif isinstance(parent[key], str):
            parent[key] = source.choice(("hold", "F16", "I64", "F32", parent[key][::-1], parent[key] * 2))
    text = json.dumps(body, indent=1).encode()
    return text.replace(b"{", b'{"images_seen": 1,', 1) if source.random() < 0.05 else text


def mutated_bytes(content: bytes, source: random.Random) -> bytes:
    spoiled = bytearray(content)
    for _ in range(source.randint(1, 4)):
        start = source.randrange(len(spoiled) + 1)
        stop = min(len(spoiled), start + source.choice((1, 4, 8, 64, 1000)))
        spoiled[start:stop] = source.choice((
            b"", bytes(stop - start), source.randbytes(stop - start), spoiled[start:stop] * 2, b"\xff" * 8))
    return bytes(spoiled)


def mutated(name: str, content: bytes, source: random.Random) -> bytes:
    if source.random() < 0.4:
        return mutated_bytes(content, source)
    if name.endswith(".json"):
        return mutated_json(json.loads(content), source)
    length = int.from_bytes(content[:8], "little")
    header = mutated_json(json.loads(content[8:8 + length]), source)
    return header_file(header, content[8 + length:] if source.random() < 0.8 else mutated_bytes(content, source))


@pytest.mark.fault
def test_f10_of_thousands_of_mutations_each_is_refused_or_read_as_it_was_written(
        folder: Path, states: tuple[TrainState, TrainState]) -> None:
    """2,500 seeded mutations of a checkpoint, by structure and by bytes, with manifests that vouch for them or not"""
    source, outcomes = random.Random(11), Counter[str]()
    _, newer = ends(folder)
    original = {name: (newer / name).read_bytes() for name in ALL_FILES}
    about = commits.describe(newer)
    for number in range(2500):
        names = source.sample(ALL_FILES, source.choice((1, 1, 1, 2)))
        spoiled = {name: mutated(name, original[name], source) for name in names}
        vouched = source.random() < 0.7
        if vouched and "MANIFEST.json" not in names:
            forge(newer, spoiled)
        else:
            for name, content in spoiled.items():
                if name == "MANIFEST.json" and vouched:
                    with contextlib.suppress(ValueError, AttributeError):
                        body = json.loads(content)
                        body.pop("sha256", None)
                        content = sealed(body)
                (newer / name).write_bytes(content)
        try:
            came = everything_with(newer, *states)
        except Exception as error:
            error.add_note(f"mutation {number} of {names}, vouched for: {vouched}: {spoiled[names[0]][:300]!r}")
            raise
        if came["read done"] and not vouched:  # then the mutation changed nothing
            assert commits.read(newer) == {name: original[name] for name in FILES}
            assert commits.describe(newer) == about
        outcomes += came
        for name in {*names, "MANIFEST.json"}:
            (newer / name).write_bytes(original[name])
    print(f"F10: 2,500 mutations: {dict(sorted(outcomes.items()))}")
    assert outcomes["read Damaged"] > 500
    assert outcomes["restore Damaged"] > 200
    assert outcomes["restore UserError"] > 10
    assert outcomes["restore done"] > 20


# ---- F10: nothing is unpickled


def as_if_of(module: str, source: str) -> Callable[..., Any]:
    """The function `f` of a module of that name."""
    there: dict[str, Any] = {"__name__": module}
    exec(source, there)
    return there["f"]


@pytest.fixture
def unhooked() -> Iterator[list[str]]:
    """What the hook has seen so far; forgotten at the end of the test, which would fail by it."""
    yield unpickling.offences
    unpickling.offences.clear()


LOADERS = {"pickle.loads": "import pickle\ndef f(path): return pickle.loads(path.read_bytes())",
           "Unpickler": "import pickle\ndef f(path):\n with path.open('rb') as file: pickle.Unpickler(file).load()",
           "Python's own": "import pickle\ndef f(path):\n with path.open('rb') as file: pickle._load(file)",
           "numpy.load": "import numpy\ndef f(path): return numpy.load(path, allow_pickle=True)",
           "torch.load": "import torch\ndef f(path): return torch.load(path, weights_only=False)"}


@pytest.mark.fault
@pytest.mark.parametrize("loader", LOADERS)
def test_f10_the_audit_hook_stops_an_unpickling_by_gradine_and_remembers_it(
        loader: str, tmp_path: Path, unhooked: list[str]) -> None:
    """gradine made to unpickle a file, in five ways: the hook must bite"""
    canary, file = tmp_path / "canary", tmp_path / "file"
    if loader == "torch.load":
        torch.save({"weight": Bomb(canary)}, file)
    elif loader == "numpy.load":
        with file.open("wb") as out:
            np.save(out, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(RuntimeError, match="gradine unpickles nothing"):
        as_if_of("gradine.stages.anything", LOADERS[loader])(file)
    assert not canary.exists()
    assert unhooked[0].startswith("gradine.stages.anything line ")


@pytest.mark.fault
def test_f10_the_audit_hook_lets_messages_between_processes_pass_and_other_programs_be(
        tmp_path: Path, unhooked: list[str]) -> None:
    """the same bytes unpickled by Ray's frames on gradine's behalf, and by no frame of gradine at all"""
    file = tmp_path / "file"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    by_ray = as_if_of("ray._private.serialization", LOADERS["pickle.loads"])
    asked = as_if_of("gradine.pipeline.driver", "def f(ask, path): return ask(path)")
    asked(by_ray, file)
    as_if_of("matplotlib", LOADERS["pickle.loads"])(file)
    assert unhooked == []
    with pytest.raises(RuntimeError, match="line 1"):
        asked(as_if_of("rayleigh", LOADERS["pickle.loads"]), file)
    with pytest.raises(RuntimeError, match="marshal.loads"):
        as_if_of("gradine.x", "import marshal\ndef f(): return marshal.loads(marshal.dumps(1))")()


@pytest.mark.fault
def test_f10_a_training_process_that_unpickles_dies_of_it(tmp_path: Path) -> None:
    """the same hook in tests/stage_process.py, with a product module that unpickles and catches what comes of it"""
    script = ("import sys; sys.path.insert(0, 'tests'); import stage_process as s, gradine.configs.schema as schema\n"
              "there = {'__name__': 'gradine.stages.anything'}\n"
              "exec('import pickle\\ndef f(*_):\\n try: pickle.loads(pickle.dumps(print))\\n'\n"
              "     ' except RuntimeError: pass', there)\n"
              "s.load = there['f']; s.PartialState = lambda *a, **k: None; s.commits.find = lambda _: ([],)\n"
              "s.make_plan = lambda *_: type('', (), {'stages': ()}); s.leave_group = print; s.main('', '')")
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert 'AssertionError: ["gradine.stages.anything line' in process.stderr


BANNED = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "joblib", "marshal", "jsonpickle", "pandas"}
CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package", "yaml.load", "yaml.unsafe_load",
         "yaml.full_load", "yaml.load_all", "numpy.fromregex", "eval", "exec", "compile", "__import__",
         "torch.export.load", "torch.serialization.load"}


def uses(source: str) -> Iterator[str]:
    """What a module imports or calls, by the full names of what it calls, that could run what a file says."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                full = f"{module}.{alias.name}" if module else alias.name
                names[alias.asname or alias.name.split(".")[0]] = full if alias.asname or module else full.split(".")[0]
                if full.split(".")[0] in BANNED:
                    yield full
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            called = ".".join([names.get(first, first), *rest])
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if "allow_pickle" in keywords or (called in CALLS and "Safe" not in keywords.get("Loader", "")):
                yield called


# The published feature networks come in no other form. features.py opens them once their sha256 is the one expected
# (tests/test_features.py): a state dict by torch's reader of weights alone, a TorchScript
# only if its user named its sha256.
PINNED = {"features.py": ["torch.load", "torch.jit.load"]}


def test_f10_no_module_of_gradine_calls_what_runs_what_a_file_says() -> None:
    for folder in ("configs", "stages", "pipeline"):
        files = list((ROOT / folder).glob("*.py"))
        assert files
        for file in files:
            assert list(uses(file.read_text())) == PINNED.get(file.name, []), file.name
    features = (ROOT / "stages" / "features.py").read_text()
    (load,) = (node for node in ast.walk(ast.parse(features)) if isinstance(node, ast.Call)
               and ast.unparse(node.func) == "torch.load")
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["weights_only"] == "True"


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import joblib as j", "import torch\ntorch.load(x)",
    "from torch import load as l\nl(x)", "import numpy as np\nnp.load(x, allow_pickle=True)",
    "import torch as t\nt.load(x)", "import yaml\nyaml.load(x, Loader=yaml.FullLoader)",
    "import yaml\nyaml.unsafe_load(x)", "eval(x)", "exec(x)", "import torch.jit\ntorch.jit.load(x)"])
def test_f10_the_search_for_such_calls_finds_them(source: str) -> None:
    assert list(uses(source))
    assert not list(uses("import yaml, re, safetensors.torch\nyaml.load(x, Loader=yaml.SafeLoader)\nre.compile(x)\n"
                         "safetensors.torch.load(x)\nyaml.safe_load(x)"))
