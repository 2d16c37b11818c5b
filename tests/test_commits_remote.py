"""Checkpoints in an object store: whole or absent without a rename, fenced by terms, read back to the same bits."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gradine.configs.schema import EnvironmentFault, Run, UserError
from gradine.stages import commits
from gradine.stages.commits import Damaged, Term
from gradine.stages.loop import run_stage
from gradine.stages.store import Store
from tests.object_store import BUCKET, Fault, aws, moto, proxy  # noqa: F401 (moto is a fixture)

FILES = ("generator.safetensors", "discriminator.safetensors", "average.safetensors", "optimizers.safetensors",
         "state.json")
numbers = itertools.count()


@pytest.fixture
def location(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    """A place of its own in the store."""
    aws(monkeypatch, moto)
    return f"s3://{BUCKET}/runs-{next(numbers)}/tiny"


def contents(images: int) -> list[tuple[str, bytes]]:
    info = {"schema": 2, "resolution": 8, "phase": "hold", "images_seen": images, "stage_end": images % 400 == 0,
            "masked": [0, 0], "skipped": []}
    weights = [(name, hashlib.sha256(f"{name}{images}".encode()).digest() * 40) for name in FILES[:4]]
    return [*weights, ("state.json", json.dumps(info).encode())]


def put(location: str, images: int, term: Term | None = None) -> str:
    return commits.commit(location, f"r0008-hold-{images:09d}", iter(contents(images)), term)


def counting(location: str) -> list[tuple[int, int]]:
    return [(one.images_seen, one.term) for one in commits.find(location)[0]]


def keys(location: str) -> list[str]:
    return [name for name, _ in Store(location).list()]


@pytest.mark.fault
def test_f04_a_checkpoint_in_a_store_reads_back_as_it_was_written_and_a_harmed_one_is_refused(location: str) -> None:
    """a file of a checkpoint in an object store changed, cut, emptied, added, missing"""
    assert commits.find(location) == ([], [])
    term = commits.begin_term(location, None)
    older, path = put(location, 100, term), put(location, 200, term)
    assert path == f"{location}/r0008-hold-000000200-t1"
    assert commits.read(path) == dict(contents(200))
    assert counting(location) == [(100, 1), (200, 1)]
    store, average = Store(path), contents(200)[2][1]
    for spoiled, said in ((average[:-1] + b"x", "does not match the sha256"), (average[:-1], "has 1,279 bytes"),
                          (b"", "has 0 bytes")):
        store.write("average.safetensors", spoiled)
        with pytest.raises(Damaged, match=f"average.safetensors {said}"):
            commits.read(path)
        (chosen, files), passed = commits.newest_valid(commits.find(location)[0])  # type: ignore[misc]
        assert (chosen.path, files, len(passed)) == (older, dict(contents(100)), 1)
    store.write("average.safetensors", average)
    store.write("more", b"")
    with pytest.raises(Damaged, match="more is not in the manifest"):
        commits.read(path)
    store.remove("more")
    store.remove("state.json")
    for ask in (commits.read, commits.describe):
        with pytest.raises(Damaged, match="state.json is missing"):
            ask(path)
    assert counting(location) == [(100, 1)]


@pytest.mark.fault
@pytest.mark.parametrize("cut_at", [3, 6])
def test_f01_a_store_that_is_cut_off_during_a_commit_leaves_nothing_that_counts_and_the_next_start_removes_it(
        cut_at: int, location: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """every connection to the object store reset from the n-th write of a commit on, the manifest's the last"""
    term = commits.begin_term(location, None)
    put(location, 100, term)
    monkeypatch.setattr("gradine.stages.commits.Store", lambda location: Store(location, deadline_s=2.0))
    fault = Fault("reset", hits=lambda number: number >= cut_at, only=lambda method, path: method == "PUT")
    with proxy(moto, fault) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(EnvironmentFault, match="could not be written"):
            put(location, 200, term)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    assert fault.done
    assert len([key for key in keys(location) if "200" in key]) == cut_at - 1
    assert commits.find(location)[1] == []
    assert counting(location) == [(100, 1)]
    orphans = commits.remove_orphans(location)
    assert orphans == (["r0008-hold-000000200-t1"] if cut_at > 1 else [])
    assert not [key for key in keys(location) if "200" in key]
    assert counting(location) == [(100, 1)]
    put(location, 200, term)
    assert counting(location) == [(100, 1), (200, 1)]


@pytest.mark.fault
def test_f01_a_commit_into_a_store_killed_before_or_after_any_of_its_writes_leaves_the_old_or_the_new(
        location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """a save that ends before and after each of its six writes, and a clean-up that ends at each of its removals"""
    term = commits.begin_term(location, None)
    put(location, 100, term)
    write, points = Store.write, 0
    for cut_at in range(1, 7):
        for after in (False, True):
            calls = itertools.count(1)

            def killed(store: Store, name: str, content: bytes) -> None:
                number = next(calls)  # noqa: B023 (used within the round)
                if number < cut_at or (number == cut_at and after):  # noqa: B023
                    write(store, name, content)
                if number == cut_at:  # noqa: B023
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(Store, "write", killed)
                with pytest.raises(KeyboardInterrupt):
                    put(location, 200, term)
            done = cut_at == 6 and after
            assert counting(location) == [(100, 1), (200, 1)] if done else [(100, 1)]
            newest = commits.newest_valid(commits.find(location)[0])[0]
            assert newest
            assert newest[1] == dict(contents(200 if done else 100))
            assert len(commits.remove_orphans(location)) == (not done and cut_at + after > 1)
            points += 1
    assert counting(location) == [(100, 1), (200, 1)]
    remove = Store.remove
    for cut_at in range(1, 7):
        calls = itertools.count(1)

        def stopped(store: Store, name: str) -> None:
            remove(store, name)
            if next(calls) == cut_at:  # noqa: B023
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Store, "remove", stopped)
            with pytest.raises(KeyboardInterrupt):
                commits.delete(f"{location}/r0008-hold-000000200-t1")
        assert counting(location) == [(100, 1)]
        commits.remove_orphans(location)
        assert not [key for key in keys(location) if "200" in key]
        put(location, 200, term)
        points += 1
    print(f"F01: {points} kill points of saves and deletions in an object store")


@pytest.mark.fault
def test_f33_an_answer_that_is_lost_on_the_way_does_not_lose_the_commit(
        location: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """the server writes, its answer never comes: each third write"""
    fault = Fault("lost", hits=lambda number: number % 3 == 0, only=lambda method, path: method == "PUT")
    with proxy(moto, fault) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        term = commits.begin_term(location, None)
        path = put(location, 100, term)
        assert commits.read(path) == dict(contents(100))
    assert fault.done >= 2
    assert term.number == 1
    assert counting(location) == [(100, 1)]


@pytest.mark.fault
def test_f08_a_late_commit_of_an_older_term_into_a_store_does_not_count(location: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """a holder of term 1 that looked for later terms before term 2 began, and writes its manifest after"""
    first = commits.begin_term(location, None)
    for images in (100, 200):
        put(location, images, first)
    start = commits.find(location)[0][0]
    second = commits.begin_term(location, start)
    assert (second.number, second.starts) == (2, {1: 0, 2: 100})
    with pytest.raises(commits.Fenced, match="term 2 .pid .* has gone on with this run"):
        put(location, 300, first)
    with monkeypatch.context() as patch:
        patch.setattr(commits, "refuse_if_fenced", lambda *_: None)
        put(location, 300, first)
    put(location, 200, second)
    assert counting(location) == [(100, 1), (200, 2)]
    Store(location).remove("term-000002.json")
    assert counting(location) == [(100, 1), (200, 2)]  # the manifest of term 2 repeats it
    assert commits.begin_term(location, commits.find(location)[0][-1]).number == 3


@pytest.mark.fault
def test_f08_of_many_who_begin_a_term_in_a_store_at_once_each_gets_a_number_of_its_own(location: str) -> None:
    """six threads begin a term at once"""
    begun: list[Term] = []
    gate = threading.Barrier(6)

    def begin() -> None:
        gate.wait()
        begun.append(commits.begin_term(location, None))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(term.number for term in begun) == [1, 2, 3, 4, 5, 6]
    assert commits.terms(location) == dict.fromkeys(range(1, 7), 0)
    newest = commits.newest_term(location)
    assert newest
    assert newest.number == 6
    assert not Store(location).create("term-000003.json", b"mine")


@pytest.mark.fault
def test_f07_retiring_in_a_store_deletes_the_manifest_first_and_never_a_stages_end(location: str) -> None:
    """a deletion in an object store that came as far as the manifest"""
    term = commits.begin_term(location, None)
    for images in (100, 200, 300, 400, 500, 600):
        put(location, images, term)
    pinned = ["r0008-hold-000000200-t1"]
    assert commits.retire(location, 1, now=10**9, pinned=pinned) == [f"r0008-hold-{n:09d}-t1" for n in (100, 300, 500)]
    assert counting(location) == [(200, 1), (400, 1), (600, 1)]
    assert not [key for key in keys(location) if "100" in key or "300" in key]
    Store(f"{location}/r0008-hold-000000200-t1").remove("MANIFEST.json")  # as far as a killed deletion came
    assert counting(location) == [(400, 1), (600, 1)]
    assert commits.remove_orphans(location) == pinned
    assert counting(location) == [(400, 1), (600, 1)]
    assert len(keys(location)) == 2 * 6 + 1


@pytest.mark.fault
def test_f33_a_store_that_does_not_answer_is_never_taken_for_an_empty_or_damaged_one(
        location: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """503 to every request of a reader, then a bucket that is not there: neither means that no checkpoint is"""
    path = put(location, 100)
    with proxy(moto, Fault("503")) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setattr("gradine.stages.commits.Store", lambda location: Store(location, deadline_s=2.0))
        for ask in (lambda: commits.find(location), lambda: commits.read(path), lambda: commits.describe(path),
                    lambda: commits.read_term(location, 1)):
            with pytest.raises(EnvironmentFault):
                ask()
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    with pytest.raises(UserError):
        commits.find("s3://no-such-bucket/tiny")


@pytest.mark.fault
def test_f01_a_run_whose_checkpoints_lie_in_a_store_resumes_to_the_bits_of_one_on_disk(
        location: str, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    """two stages into an object store, the second cut in two at a checkpoint inside its fade"""
    here = tiny_run()
    there = tiny_run({"checkpoints.location": location.rpartition("/")[0]})
    assert commits.location_of(there, tmp_path / "there") == location
    places = {}
    for run, name in ((here, "here"), (there, "there")):
        folder = tmp_path / name
        where = commits.location_of(run, folder)
        term = commits.begin_term(where, None)
        list(run_stage(run, 0, None, folder, term=term))
        start = commits.find(where)[0][-1]
        assert (start.images_seen, start.stage_end) == (80, True)
        if name == "there":  # killed at 120 images, just after the save
            for event in run_stage(run, 1, start.path, folder, term=term):
                if event["event"] == "checkpoint" and event["images_seen"] == 120:
                    break
            start = next(one for one in commits.find(where)[0] if one.images_seen == 120)
            term = commits.begin_term(where, start)
            assert commits.remove_orphans(where) == []
        events = list(run_stage(run, 1, start.path, folder, term=term))
        assert events[-1]["event"] == "stage_end"
        places[name] = {(one.images_seen, one.resolution): one for one in commits.find(where)[0]}
    assert not (tmp_path / "there" / "checkpoints").exists()
    assert places["here"].keys() == places["there"].keys()
    assert len(places["here"]) == 6
    assert {one.term for key, one in places["there"].items() if key[0] > 120} == {2}
    for key, one in places["here"].items():
        ours, theirs = commits.read(one.path), commits.read(places["there"][key].path)
        for name in FILES[:4]:
            assert hashlib.sha256(ours[name]).digest() == hashlib.sha256(theirs[name]).digest(), (key, name)
        states = [json.loads(files["state.json"]) for files in (ours, theirs)]
        assert states[0] == states[1]
